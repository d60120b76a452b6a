//! Exports of what is no run, in no format, to no folder.

use super::{Case, check, check_with_run};
use crate::fixture::specforge;

#[test]
fn exports() {
    check_with_run(&[
        Case {
            name: "an export of nothing",
            spoil: |workspace| {
                let mut command = specforge(&["export", "--checkpoint"]);
                command.arg(workspace.path("model")).arg("--out").arg(workspace.path("export"));
                command
            },
            exit_code: 2,
            expected: &["{}/model: holds no whole checkpoint", "hint: name a step-... folder"],
        },
        Case {
            name: "an export to an unknown format",
            spoil: |workspace| {
                let mut command = specforge(&["export", "--format", "onnx", "--checkpoint"]);
                command.arg(workspace.path("run")).arg("--out").arg(workspace.path("export"));
                command
            },
            exit_code: 2,
            expected: &[
                "--format: expected one of medusa, medusa-vllm, eagle3, speculators, gguf, peagle, block, block-speculators, var, masked-diffusion, got `onnx`",
            ],
        },
    ]);
}

#[test]
fn folders_that_cannot_be_written() {
    check(&[Case {
        name: "an export below a file",
        spoil: |workspace| {
            workspace.train("run", &[]);
            let mut command = specforge(&["export", "--checkpoint"]);
            command.arg(workspace.path("run")).arg("--out").arg(workspace.path("run/config.json/export"));
            command
        },
        exit_code: 2,
        expected: &["{}/run/config.json: File exists"],
    }]);
}
