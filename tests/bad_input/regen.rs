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
            name: "answers into a folder",
            spoil: |workspace| {
                fs::create_dir(workspace.path("answers.jsonl")).unwrap();
                regen(workspace, &[])
            },
            exit_code: 2,
            expected: &["{}/answers.jsonl: expected a file to write to, found a folder", "hint: choose another --out"],
        },
        Case {
            name: "no rows at once",
            spoil: |workspace| regen(workspace, &["--max-rows", "0"]),
            exit_code: 2,
            expected: &["'--max-rows <MAX_ROWS>': expected a whole number of at least 1"],
        },
        Case {
            name: "a negative temperature",
            spoil: |workspace| regen(workspace, &["--temperature", "-1"]),
            exit_code: 2,
            expected: &["`temperature`: expected 0 (greedy) or a positive number, got -1"],
        },
        Case {
            name: "a temperature without end",
            spoil: |workspace| regen(workspace, &["--temperature", "-inf"]),
            exit_code: 2,
            expected: &["`temperature`: expected 0 (greedy) or a positive number, got -inf"],
        },
        Case {
            name: "a temperature that is no number",
            spoil: |workspace| regen(workspace, &["--temperature", "warm"]),
            exit_code: 2,
            expected: &["'--temperature <TEMPERATURE>': expected a number"],
        },
        Case {
            name: "a negative share",
            spoil: |workspace| regen(workspace, &["--max-bad-share", "-1e-3"]),
            exit_code: 2,
            expected: &["`max_bad_share`: expected a share from 0 to 1, got -0.001"],
        },
        Case {
            name: "a negative seed",
            spoil: |workspace| regen(workspace, &["--seed", "-1"]),
            exit_code: 2,
            expected: &["'--seed <SEED>': expected a whole number of at least 0"],
        },
        Case {
            name: "a negative length of answers",
            spoil: |workspace| regen(workspace, &["--max-new-tokens", "-5"]),
            exit_code: 2,
            expected: &["'--max-new-tokens <MAX_NEW_TOKENS>': expected a whole number of at least 1"],
        },
    ]);
}
