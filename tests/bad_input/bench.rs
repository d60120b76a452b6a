//! Shapes that cannot be timed.

use std::process::Command;

use super::{Case, check};
use crate::fixture::{Workspace, specforge};

fn bench(workspace: &Workspace, arguments: &[&str]) -> Command {
    let mut command = specforge(&["bench", "--device", "cpu", "--target"]);
    command.arg(workspace.path("model")).args(arguments);
    command
}

fn bench_train(workspace: &Workspace, arguments: &[&str]) -> Command {
    let mut command = specforge(&["bench-train", "--device", "cpu", "--config"]);
    command.arg(workspace.config()).args(arguments);
    command
}

#[test]
fn shapes() {
    check(&[
        Case {
            name: "nothing to time",
            spoil: |workspace| bench(workspace, &[]),
            exit_code: 2,
            expected: &["nothing to time: give --prefill RxT, --decode RxTxN or --verify RxCxN"],
        },
        Case {
            name: "a negative number of rows",
            spoil: |workspace| bench(workspace, &["--prefill", "-1x4"]),
            exit_code: 2,
            expected: &["'--prefill <RxT>': expected ROWSxTOKENS, such as 8x128, got `-1x4`"],
        },
        Case {
            name: "more rows than can be counted",
            spoil: |workspace| bench(workspace, &["--decode", "9999999999x9999999999x1"]),
            exit_code: 2,
            expected: &["'--decode <RxTxN>': expected ROWSxPROMPTxNEW"],
        },
        Case {
            name: "rows longer than the target's context",
            spoil: |workspace| bench(workspace, &["--decode", "1x250x7"]),
            exit_code: 2,
            expected: &["--decode: expected rows of at most 256 tokens, the target's context, got 257"],
        },
        Case {
            name: "no runs",
            spoil: |workspace| bench(workspace, &["--prefill", "1x4", "--repeat", "-1"]),
            exit_code: 2,
            expected: &["'--repeat <REPEAT>': expected a whole number of at least 1"],
        },
        Case {
            name: "a negative share of supervised tokens",
            spoil: |workspace| bench_train(workspace, &["--supervised", "-0.5"]),
            exit_code: 2,
            expected: &["--supervised: expected a share from 0 to below 1, got -0.5"],
        },
        Case {
            name: "a negative number of documents",
            spoil: |workspace| bench_train(workspace, &["--batch", "-2x8"]),
            exit_code: 2,
            expected: &["'--batch <DxT>': expected DOCUMENTSxTOKENS, such as 2x512, got `-2x8`"],
        },
        Case {
            name: "no steps",
            spoil: |workspace| bench_train(workspace, &["--repeat", "-1"]),
            exit_code: 2,
            expected: &["'--repeat <REPEAT>': expected a whole number of at least 1"],
        },
        Case {
            name: "no threads",
            spoil: |workspace| bench(workspace, &["--prefill", "1x4", "--threads", "0"]),
            exit_code: 2,
            expected: &["'--threads <THREADS>': expected a whole number of at least 1"],
        },
    ]);
}
