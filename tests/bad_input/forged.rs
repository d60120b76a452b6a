//! Names and texts from files that would forge messages, steer the terminal or fill it.

use std::fs;
use std::process::Command;

use serde_json::json;
use specforge::weights;
use tch::{Device, Kind, Tensor};

use super::{Case, check, edit_json, train, train_with};
use crate::fixture::{Workspace, conversations, output_of, specforge, stderr_of, tensors_of};

/// Colours the terminal, moves the cursor, and says something in this program's name.
const FORGED: &str = "a\u{1b}[31m\u{9b}2J\r\nerror: forged\nhint: \u{202e}trust me";
/// How it is shown.
const SHOWN: &str = "a\\u{1b}[31m\\u{9b}2J\\r\\nerror: forged\\nhint: \\u{202e}trust me";

fn with_template(workspace: &Workspace, template: &str) -> Command {
    fs::write(workspace.path("model/chat_template.jinja"), template).unwrap();
    train(workspace)
}

fn inspect(workspace: &Workspace, arguments: &[&str]) -> Command {
    let mut command = specforge(&["inspect", "--target"]);
    command.arg(workspace.path("model")).arg("--data").arg(workspace.path("conversations.jsonl")).args(arguments);
    command
}

/// One wrong line among good ones, named in a warning or an error.
fn with_line(workspace: &Workspace, line: &serde_json::Value) -> Command {
    fs::write(workspace.path("conversations.jsonl"), format!("{}{line}\n", conversations(5))).unwrap();
    train(workspace)
}

#[test]
fn forged_names() {
    check(&[
        Case {
            name: "a data file",
            spoil: |workspace| {
                let mut command = specforge(&["inspect", "--target"]);
                command.arg(workspace.path("model")).arg("--data").arg(workspace.path(FORGED));
                command
            },
            exit_code: 2,
            expected: &["error: cannot open {}/", SHOWN],
        },
        Case {
            name: "a tensor",
            spoil: |workspace| {
                let path = workspace.path("model/model.safetensors");
                let mut tensors = tensors_of(&path);
                tensors.push((FORGED.to_owned(), Tensor::zeros([2], (Kind::Float, Device::Cpu))));
                weights::write_tensors(&path, &tensors, &[]).unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &["surplus (1):\n    ", SHOWN],
        },
        Case {
            name: "a role",
            spoil: |workspace| with_line(workspace, &json!({"messages": [{"role": FORGED, "content": "x"}]})),
            exit_code: 2,
            expected: &["conversations.jsonl:6:", SHOWN],
        },
        Case {
            name: "the keys of a record",
            spoil: |workspace| with_line(workspace, &json!({FORGED: "x"})),
            exit_code: 2,
            expected: &["conversations.jsonl:6:", SHOWN],
        },
        Case {
            name: "an id that is looked for",
            spoil: |workspace| inspect(workspace, &["--id", FORGED]),
            exit_code: 2,
            expected: &["--id: no document has the id `", SHOWN],
        },
        Case {
            name: "a key of the configuration",
            spoil: |workspace| {
                workspace.configuration["optim"][FORGED] = json!(1);
                train(workspace)
            },
            exit_code: 2,
            expected: &["configuration: `optim.a", SHOWN, "unknown key"],
        },
        Case {
            name: "a value of the configuration",
            spoil: |workspace| {
                workspace.set("draft.algorithm", FORGED);
                train(workspace)
            },
            exit_code: 2,
            expected: &["`draft.algorithm`", SHOWN],
        },
        Case {
            name: "a key on the command line",
            spoil: |workspace| train_with(workspace, FORGED),
            exit_code: 2,
            expected: &["--set: expected key=value, got `", SHOWN],
        },
        Case {
            name: "a value on the command line",
            spoil: |workspace| {
                let mut command = specforge(&["generate", "--prompt", "x", "--dtype", FORGED, "--target"]);
                command.arg(workspace.path("model"));
                command
            },
            exit_code: 2,
            expected: &["--dtype", SHOWN],
        },
        Case {
            name: "a device",
            spoil: |workspace| workspace.train_command("run", &["--device", FORGED]),
            exit_code: 2,
            expected: &[SHOWN],
        },
        Case {
            name: "a rank of the environment",
            spoil: |workspace| {
                let mut command = train(workspace);
                command.env("RANK", FORGED).env("WORLD_SIZE", "2").env("MASTER_ADDR", FORGED).env("MASTER_PORT", "1");
                command
            },
            exit_code: 2,
            expected: &["RANK", SHOWN],
        },
        Case {
            name: "a model_type",
            spoil: |workspace| {
                edit_json(&workspace.path("model/config.json"), |config| config["model_type"] = json!(FORGED));
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/config.json", SHOWN],
        },
        Case {
            name: "what a template says",
            spoil: |workspace| {
                with_template(workspace, &format!("{{{{ raise_exception({:?}) }}}}", "no\nerror: forged"))
            },
            exit_code: 2,
            expected: &["the chat template refuses it: no\\nerror: forged"],
        },
        Case {
            name: "what a template raises of a message",
            spoil: |workspace| with_template(workspace, "{{ raise_exception('\u{1b}[31m' ~ messages[0].content) }}"),
            exit_code: 2,
            expected: &["the chat template refuses it: \\u{1b}[31m"],
        },
        Case {
            name: "the name of a template",
            spoil: |workspace| {
                edit_json(&workspace.path("model/tokenizer_config.json"), |config| {
                    config["chat_template"] = json!([{"name": FORGED, "template": "x"}]);
                });
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/tokenizer_config.json", SHOWN],
        },
    ]);
}

/// One megabyte where a word would do: the message stays a line that can be read.
#[test]
fn endless_names() {
    check(&[
        Case {
            name: "a role",
            spoil: |workspace| {
                with_line(workspace, &json!({"messages": [{"role": "x".repeat(1 << 20), "content": "x"}]}))
            },
            exit_code: 2,
            expected: &["conversations.jsonl:6:", "unknown role `xxx", "xxx…xxx"],
        },
        Case {
            name: "ten thousand keys",
            spoil: |workspace| {
                let keys = (0..10_000).map(|key| (format!("key{key}"), json!(1)));
                let record = serde_json::Value::Object(keys.collect());
                with_line(workspace, &record)
            },
            exit_code: 2,
            expected: &["conversations.jsonl:6:", "key0, key1"],
        },
        Case {
            name: "a model_type",
            spoil: |workspace| {
                edit_json(&workspace.path("model/config.json"), |config| {
                    config["model_type"] = json!("y".repeat(100_000));
                });
                train(workspace)
            },
            exit_code: 2,
            expected: &["model_type `yyy", "yyy…yyy", "supported: llama"],
        },
        Case {
            name: "what a template says",
            spoil: |workspace| with_template(workspace, "{{ raise_exception('no way, ' * 100000) }}"),
            exit_code: 2,
            expected: &["the chat template refuses it: no way, no way", "…"],
        },
        Case {
            name: "a tensor",
            spoil: |workspace| {
                let path = workspace.path("model/model.safetensors");
                let mut tensors = tensors_of(&path);
                let name = |number: usize| format!("{}{number}", "z".repeat(5000));
                tensors.extend((0..100).map(|number| (name(number), Tensor::zeros([1], (Kind::Float, Device::Cpu)))));
                weights::write_tensors(&path, &tensors, &[]).unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &["surplus (100):\n    zzz", "and 92 more"],
        },
        Case {
            name: "a key of the configuration",
            spoil: |workspace| train_with(workspace, &format!("optim.{}=1", "k".repeat(100_000))),
            exit_code: 2,
            expected: &["configuration: `optim.kkk", "kkk…kkk", "unknown key"],
        },
        Case {
            name: "a value of the configuration",
            spoil: |workspace| {
                workspace.set("optim.learning_rate", "fast ".repeat(100_000));
                train(workspace)
            },
            exit_code: 2,
            expected: &["`optim.learning_rate`: invalid type: string \"fast fast", "…"],
        },
    ]);
}

/// Notes, tables and documents are shown as safely as errors; JSON holds what is there.
#[test]
fn forged_names_in_results() {
    let workspace = Workspace::new();
    let messages = json!([{"role": "user", "content": "x\u{1b}[2Jy"}, {"role": "assistant", "content": "ok\u{7}"}]);
    let line = json!({"id": FORGED, "messages": messages}).to_string();
    fs::write(workspace.path("conversations.jsonl"), line).unwrap();
    let output = output_of(inspect(&workspace, &["--show", "1"]).env("XDG_CACHE_HOME", workspace.path("cache")));
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(output.status.success(), "{}", stderr_of(&output));
    assert!(text.starts_with(&format!("── {SHOWN} (")), "{text}");
    assert!(text.contains("x\\u{1b}[2Jy") && text.contains("ok\\u{7}"), "{text}");
    let harmful = |letter: char| letter.is_control() && letter != '\n';
    assert!(!text.contains(harmful) && !stderr_of(&output).contains(harmful), "{text}");
    let output = output_of(&mut inspect(&workspace, &["--json", "--show", "1"]));
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["shown"][0]["id"], FORGED);
    assert!(value["shown"][0]["text"].as_str().unwrap().contains("x\u{1b}[2Jy"));
}
