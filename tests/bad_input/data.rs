//! Conversations that cannot be trained on, through `train` and `inspect`.

use std::fs;
use std::process::Command;

use serde_json::json;

use super::{Case, check, train, train_with};
use crate::fixture::{Workspace, conversations, specforge, stderr_of};

fn with_data(workspace: &Workspace, text: impl AsRef<[u8]>) -> Command {
    fs::write(workspace.path("conversations.jsonl"), text).unwrap();
    train(workspace)
}

fn inspect(workspace: &Workspace, arguments: &[&str]) -> Command {
    let mut command = specforge(&["inspect", "--target"]);
    command.arg(workspace.path("model")).arg("--data").arg(workspace.path("conversations.jsonl")).args(arguments);
    command
}

#[test]
fn data() {
    check(&[
        Case {
            name: "no data file",
            spoil: |workspace| {
                fs::remove_file(workspace.path("conversations.jsonl")).unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &["cannot open {}/conversations.jsonl: No such file or directory"],
        },
        Case {
            name: "no data named",
            spoil: |workspace| train_with(workspace, "data.train=[]"),
            exit_code: 2,
            expected: &["`data.train`", "names no file"],
        },
        Case {
            name: "a folder as data",
            spoil: |workspace| {
                let folder = workspace.path("model");
                workspace.set("data.train", vec![json!(folder)]);
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model: is a folder, expected a file"],
        },
        Case {
            name: "an empty file",
            spoil: |workspace| with_data(workspace, ""),
            exit_code: 2,
            expected: &["{}/conversations.jsonl", "no document to train on is left of 0 records"],
        },
        Case {
            name: "a file of white space",
            spoil: |workspace| with_data(workspace, "\n\n  \n"),
            exit_code: 2,
            expected: &["{}/conversations.jsonl", "no document to train on is left of 0 records"],
        },
        Case {
            name: "malformed lines only",
            spoil: |workspace| with_data(workspace, "once upon a time\nthere was no JSON\n"),
            exit_code: 2,
            expected: &["conversations.jsonl", "2 of 2 records (100.0 %) cannot be used", "data.max_bad_share = 0.01"],
        },
        Case {
            name: "too many malformed lines",
            spoil: |workspace| with_data(workspace, conversations(40) + "{\"messages\": [\n{\"messages\": 7}\n"),
            exit_code: 2,
            expected: &["conversations.jsonl:41:", "conversations.jsonl:42:", "2 of 42 records"],
        },
        Case {
            name: "an unknown role",
            spoil: |workspace| {
                let messages = json!([{"role": "oracle", "content": "Beware."}]);
                with_data(workspace, json!({"messages": messages}).to_string())
            },
            exit_code: 2,
            expected: &["conversations.jsonl:1:", "oracle"],
        },
        Case {
            name: "questions without answers",
            spoil: |workspace| {
                let line = json!({"messages": [{"role": "user", "content": "Anybody there?"}]}).to_string();
                with_data(workspace, format!("{line}\n{line}\n"))
            },
            exit_code: 2,
            expected: &[
                "{}/conversations.jsonl",
                "no document to train on is left of 2 records",
                "2 without supervised",
            ],
        },
        Case {
            name: "answers so short that no head has a row",
            spoil: |workspace| {
                workspace.set("data.supervise", "last_turn").set("data.max_length", 2).set("data.eval_fraction", 0.0);
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/conversations.jsonl", "no document to train on is left"],
        },
        Case {
            name: "bytes that are no text",
            spoil: |workspace| {
                with_data(workspace, b"{\"messages\": [{\"role\": \"user\", \"content\": \"\xff\xfe\"}]}\n")
            },
            exit_code: 2,
            expected: &["conversations.jsonl:1:", "UTF-8"],
        },
        Case {
            name: "something behind a list",
            spoil: |workspace| {
                let list = conversations(3).trim_end().replace('\n', ",\n");
                with_data(workspace, format!("[{list}]\n<html>504 Gateway Time-out</html>\n"))
            },
            exit_code: 2,
            expected: &["conversations.jsonl:4:", "expected another list or object, or the end of the file"],
        },
        Case {
            name: "a weight between",
            spoil: |workspace| {
                let messages = json!([{"role": "user", "content": "Hi."},
                    {"role": "assistant", "content": "Ho.", "weight": 0.5}]);
                with_data(workspace, json!({"messages": messages}).to_string())
            },
            exit_code: 2,
            expected: &["conversations.jsonl:1: message 2: `weight`: expected 0 or 1, got 0.5"],
        },
        Case {
            name: "damaged compressed data",
            spoil: |workspace| with_data(workspace, b"\x1f\x8b\x08\x00rest"),
            exit_code: 2,
            expected: &[
                "{}/conversations.jsonl: is compressed with gzip and damaged",
                "hint: fetch or make the file again",
            ],
        },
        Case {
            name: "data compressed in another way",
            spoil: |workspace| with_data(workspace, b"BZh91AY&SY"),
            exit_code: 2,
            expected: &["{}/conversations.jsonl: is compressed with bzip2", "hint: unpack it with bunzip2"],
        },
        Case {
            name: "documents longer than a micro-batch",
            spoil: |workspace| {
                let long = "a very long answer ".repeat(200);
                let messages = json!([{"role": "user", "content": "Go on."}, {"role": "assistant", "content": long}]);
                workspace.set("data.max_length", 200);
                with_data(workspace, conversations(5) + &json!({"id": "long", "messages": messages}).to_string())
            },
            exit_code: 2,
            expected: &[
                "`train.micro_batch_tokens`: a document has 200 tokens, a micro-batch holds 128",
                "data.max_length",
            ],
        },
        Case {
            name: "documents longer than the target's context",
            spoil: |workspace| {
                let long = "a very long answer ".repeat(200);
                let messages = json!([{"role": "user", "content": "Go on."}, {"role": "assistant", "content": long}]);
                workspace.set("data.max_length", 300).set("train.batch_tokens", 512);
                workspace.set("train.micro_batch_tokens", 512);
                with_data(workspace, conversations(5) + &json!({"id": "long", "messages": messages}).to_string())
            },
            exit_code: 2,
            expected: &["`data.max_length`", "300", "256"],
        },
        Case {
            name: "fewer than no documents to show",
            spoil: |workspace| inspect(workspace, &["--show", "-1"]),
            exit_code: 2,
            expected: &["'--show <SHOW>': expected a whole number of at least 0"],
        },
        Case {
            name: "documents too short to train on",
            spoil: |workspace| inspect(workspace, &["--max-length", "1"]),
            exit_code: 2,
            expected: &["'--max-length <MAX_LENGTH>': expected a whole number of at least 2"],
        },
        Case {
            name: "an id that no document has",
            spoil: |workspace| inspect(workspace, &["--id", "c999"]),
            exit_code: 2,
            expected: &["--id: no document has the id `c999`"],
        },
    ]);
}

/// A pipe whose reader went away is no error of ours.
#[test]
fn a_reader_that_goes_away() {
    let workspace = Workspace::new();
    let mut child = inspect(&workspace, &["--show", "60"]).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr_of(&output));
    assert!(!stderr_of(&output).contains("panicked"));
}
