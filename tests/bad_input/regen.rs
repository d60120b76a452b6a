//! Prompts that cannot be answered, and answers that would be lost.

use std::fs;
use std::process::Command;

use super::{Case, check};
use crate::fixture::{Workspace, specforge};

fn regen(workspace: &Workspace, arguments: &[&str]) -> Command {
    let mut command = specforge(&["regen", "--target"]);
    command.arg(workspace.path("model")).arg("--prompts").arg(workspace.path("conversations.jsonl"));
    command.arg("--out").arg(workspace.path("answers.jsonl")).args(arguments);
    command
}

#[test]
fn regenerations() {
    check(&[
        Case {
            name: "no prompts",
            spoil: |workspace| {
                fs::remove_file(workspace.path("conversations.jsonl")).unwrap();
                regen(workspace, &[])
            },
            exit_code: 2,
            expected: &["cannot open {}/conversations.jsonl: No such file or directory"],
        },
        Case {
            name: "empty prompts",
            spoil: |workspace| {
                fs::write(workspace.path("conversations.jsonl"), "").unwrap();
                regen(workspace, &[])
            },
            exit_code: 2,
            expected: &["{}/conversations.jsonl: holds no prompts"],
        },
        Case {
            name: "answers over somebody else's file",
            spoil: |workspace| {
                fs::write(workspace.path("answers.jsonl"), "my diary").unwrap();
                regen(workspace, &[])
            },
            exit_code: 2,
            expected: &["{}/answers.jsonl: is there already", "hint: choose another --out"],
        },
        Case {
            name: "no rows at once",
            spoil: |workspace| regen(workspace, &["--max-rows", "0"]),
            exit_code: 2,
            expected: &["`max_rows`: expected at least 1, got 0"],
        },
    ]);
}
