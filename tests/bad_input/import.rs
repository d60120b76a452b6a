//! Files that are no GGUF, or not a whole one.

use std::fs;
use std::process::Command;

use super::{Case, check, truncate};
use crate::fixture::{Workspace, specforge, write_gguf};

fn import(workspace: &Workspace, source: &str) -> Command {
    let mut command = specforge(&["import"]);
    command.arg(workspace.path(source)).arg("--out").arg(workspace.path("imported"));
    command
}

#[test]
fn imports() {
    check(&[
        Case {
            name: "no file to import",
            spoil: |workspace| import(workspace, "nowhere.gguf"),
            exit_code: 2,
            expected: &["cannot open {}/nowhere.gguf: No such file or directory"],
        },
        Case {
            name: "a folder to import",
            spoil: |workspace| import(workspace, "model"),
            exit_code: 2,
            expected: &["{}/model: expected a GGUF file or a wheel, got a folder"],
        },
        Case {
            name: "a file that is no GGUF",
            spoil: |workspace| import(workspace, "conversations.jsonl"),
            exit_code: 2,
            expected: &["{}/conversations.jsonl", "GGUF"],
        },
        Case {
            name: "a GGUF file cut off",
            spoil: |workspace| {
                let mut bytes = b"GGUF".to_vec();
                bytes.extend(3u32.to_le_bytes());
                bytes.extend(7u64.to_le_bytes());
                bytes.extend(1u64.to_le_bytes());
                bytes.extend(20u64.to_le_bytes());
                bytes.extend(b"general.archi");
                fs::write(workspace.path("short.gguf"), bytes).unwrap();
                import(workspace, "short.gguf")
            },
            exit_code: 2,
            expected: &["{}/short.gguf"],
        },
        Case {
            name: "a GGUF file that promises more than there can be",
            spoil: |workspace| {
                let mut bytes = b"GGUF".to_vec();
                bytes.extend(3u32.to_le_bytes());
                bytes.extend([u64::MAX.to_le_bytes(), u64::MAX.to_le_bytes()].concat());
                bytes.resize(4096, 0xff);
                fs::write(workspace.path("huge.gguf"), bytes).unwrap();
                import(workspace, "huge.gguf")
            },
            exit_code: 2,
            expected: &["{}/huge.gguf"],
        },
        Case {
            name: "a GGUF file without its last tensor",
            spoil: |workspace| {
                let path = workspace.path("model.gguf");
                write_gguf(&path);
                truncate(&path, 64);
                import(workspace, "model.gguf")
            },
            exit_code: 2,
            expected: &["{}/model.gguf", "blk.0.ffn_norm.weight"],
        },
        Case {
            name: "an unknown element type",
            spoil: |workspace| {
                let mut command = import(workspace, "conversations.jsonl");
                command.args(["--dtype", "q4"]);
                command
            },
            exit_code: 2,
            expected: &["--dtype", "expected f32, bf16 or f16, got `q4`"],
        },
        Case {
            name: "an import onto a model",
            spoil: |workspace| {
                let mut command = specforge(&["import"]);
                command.arg(workspace.path("conversations.jsonl")).arg("--out").arg(workspace.path("model"));
                command
            },
            exit_code: 2,
            expected: &["{}/model: holds a model already"],
        },
    ]);
}

#[test]
fn folders_that_cannot_be_written() {
    check(&[Case {
        name: "an import in a file system that takes no files",
        spoil: |workspace| {
            let mut command = specforge(&["import"]);
            command.arg(workspace.path("conversations.jsonl")).arg("--out").arg("/proc/imported");
            command
        },
        exit_code: 2,
        expected: &["/proc"],
    }]);
}
