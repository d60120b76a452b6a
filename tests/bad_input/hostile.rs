//! Files that were made to hurt: each is refused in a line that names it, and nothing panics, hangs or fills the memory.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::{Case, check, check_with_run, edit_json, train, train_with};
use crate::fixture::{Workspace, output_of, specforge};

/// Deeper than any reader should follow.
fn nested(open: &str, close: &str) -> String {
    format!("{}1{}", open.repeat(100_000), close.repeat(100_000))
}

fn with_tokenizer(workspace: &Workspace, edit: impl FnOnce(&mut Value)) -> Command {
    edit_json(&workspace.path("model/tokenizer.json"), edit);
    train(workspace)
}

fn with_text(workspace: &Workspace, name: &str, text: impl AsRef<[u8]>) -> Command {
    fs::write(workspace.path(name), text).unwrap();
    train(workspace)
}

const TOKENIZER: &str = "{}/model/tokenizer.json: ";

#[test]
fn tokenizers() {
    check(&[
        Case {
            name: "nested without end",
            spoil: |workspace| with_text(workspace, "model/tokenizer.json", nested("[", "]")),
            exit_code: 2,
            expected: &[TOKENIZER, "is not a tokenizer this program can read"],
        },
        Case {
            name: "merges of tokens that are not there",
            spoil: |workspace| {
                with_tokenizer(workspace, |tokenizer| tokenizer["model"]["merges"] = json!([["☃", "☂"]]))
            },
            exit_code: 2,
            expected: &[TOKENIZER, "☃"],
        },
        Case {
            name: "a prefix longer than the tokens it continues",
            spoil: |workspace| {
                with_tokenizer(workspace, |tokenizer| {
                    tokenizer["model"]["continuing_subword_prefix"] = json!("a prefix longer than any token");
                })
            },
            exit_code: 2,
            expected: &[TOKENIZER, "its parts do not fit each other"],
        },
        Case {
            name: "pieces of no length",
            spoil: |workspace| {
                with_tokenizer(workspace, |tokenizer| {
                    tokenizer["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0});
                })
            },
            exit_code: 2,
            expected: &[TOKENIZER, "cannot encode a text", "use the tokenizer.json that the model was published with"],
        },
        Case {
            name: "no pattern",
            spoil: |workspace| {
                let pattern = json!({"type": "Split", "pattern": {"Regex": "(((("}, "behavior": "Isolated",
                    "invert": false});
                with_tokenizer(workspace, |tokenizer| tokenizer["pre_tokenizer"] = pattern)
            },
            exit_code: 2,
            expected: &[TOKENIZER, "is not a tokenizer this program can read"],
        },
        Case {
            name: "a table that was not compiled",
            spoil: |workspace| {
                let map = json!({"type": "Precompiled", "precompiled_charsmap": "/////w=="});
                with_tokenizer(workspace, |tokenizer| tokenizer["normalizer"] = map)
            },
            exit_code: 2,
            expected: &[TOKENIZER],
        },
        Case {
            name: "an unknown token that is not there",
            spoil: |workspace| {
                let model = json!({"type": "Unigram", "unk_id": 1_000_000, "vocab": [["a", -1.0], ["b", -2.0]]});
                with_tokenizer(workspace, |tokenizer| tokenizer["model"] = model)
            },
            exit_code: 2,
            expected: &[TOKENIZER],
        },
        Case {
            name: "ids beyond every table",
            spoil: |workspace| {
                with_tokenizer(workspace, |tokenizer| {
                    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
                    vocabulary.values_mut().for_each(|id| *id = json!(u64::from(u32::MAX) - id.as_u64().unwrap()));
                })
            },
            exit_code: 2,
            expected: &[TOKENIZER],
        },
        Case {
            name: "no JSON",
            spoil: |workspace| with_text(workspace, "model/tokenizer.json", [0xff; 100]),
            exit_code: 2,
            expected: &[TOKENIZER],
        },
        Case {
            name: "a configuration nested without end",
            spoil: |workspace| with_text(workspace, "model/tokenizer_config.json", nested(r#"{"a":"#, "}")),
            exit_code: 2,
            expected: &["{}/model/tokenizer_config.json", "recursion limit"],
        },
        Case {
            name: "special tokens that are none",
            spoil: |workspace| with_text(workspace, "model/special_tokens_map.json", "[1, 2]"),
            exit_code: 2,
            expected: &["{}/model/special_tokens_map.json", "expected a map"],
        },
    ]);
}

fn with_template(workspace: &Workspace, template: impl AsRef<[u8]>) -> Command {
    with_text(workspace, "model/chat_template.jinja", template)
}

#[test]
fn templates() {
    check(&[
        Case {
            name: "a template nested without end",
            spoil: |workspace| with_template(workspace, format!("{{{{ {} }}}}", nested("(", ")"))),
            exit_code: 2,
            expected: &["{}/model/chat_template.jinja: the chat template `default` is not valid"],
        },
        Case {
            name: "a macro that calls itself",
            spoil: |workspace| with_template(workspace, "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
            exit_code: 2,
            expected: &["{}/model/chat_template.jinja: the chat template is not usable", "calls itself without end"],
        },
        Case {
            name: "a range over everything",
            spoil: |workspace| with_template(workspace, "{% for i in range(10 ** 15) %}x{% endfor %}"),
            exit_code: 2,
            expected: &["{}/model/chat_template.jinja"],
        },
        Case {
            name: "a division by nothing",
            spoil: |workspace| with_template(workspace, "{{ 1 // 0 }}{{ 1 % 0 }}"),
            exit_code: 2,
            expected: &["the chat template of {}/model/chat_template.jinja fails"],
        },
        Case {
            name: "numbers beyond every type",
            spoil: |workspace| with_template(workspace, "{{ -170141183460469231731687303715884105728 // -1 }}"),
            exit_code: 2,
            expected: &["{}/model/chat_template.jinja"],
        },
        Case {
            name: "a filter that is not there",
            spoil: |workspace| with_template(workspace, "{{ messages | explode }}"),
            exit_code: 2,
            expected: &["{}/model/chat_template.jinja", "explode"],
        },
        Case {
            name: "a template of another that is not there",
            spoil: |workspace| with_template(workspace, "{% include '/etc/passwd' %}"),
            exit_code: 2,
            expected: &["{}/model/chat_template.jinja", "`include` is not supported"],
        },
        Case {
            name: "bytes that are no text",
            spoil: |workspace| with_template(workspace, [0xff, 0xfe, 0x00]),
            exit_code: 2,
            expected: &["cannot read {}/model/chat_template.jinja: stream did not contain valid UTF-8"],
        },
    ]);
}

fn with_data(workspace: &Workspace, text: impl AsRef<[u8]>) -> Command {
    with_text(workspace, "conversations.jsonl", text)
}

const CONVERSATIONS: &str = "{}/conversations.jsonl";

#[test]
fn conversations() {
    check(&[
        Case {
            name: "lists nested without end",
            spoil: |workspace| with_data(workspace, nested("[", "]")),
            exit_code: 2,
            expected: &[CONVERSATIONS],
        },
        Case {
            name: "lists without end",
            spoil: |workspace| with_data(workspace, "[".repeat(1 << 20)),
            exit_code: 2,
            expected: &[CONVERSATIONS],
        },
        Case {
            name: "objects nested without end",
            spoil: |workspace| with_data(workspace, nested(r#"{"messages":"#, "}")),
            exit_code: 2,
            expected: &[CONVERSATIONS],
        },
        Case {
            name: "objects over many lines without end",
            spoil: |workspace| with_data(workspace, "{\n\"messages\": [\n".repeat(50_000)),
            exit_code: 2,
            expected: &[CONVERSATIONS],
        },
        Case {
            name: "half of a character",
            spoil: |workspace| with_data(workspace, r#"{"messages": [{"role": "user", "content": "\ud800"}]}"#),
            exit_code: 2,
            expected: &[CONVERSATIONS, "is not JSON"],
        },
        Case {
            name: "a number as everything",
            spoil: |workspace| with_data(workspace, r#"{"messages": 1e999, "tools": -1e999}"#),
            exit_code: 2,
            expected: &[CONVERSATIONS, "out of range"],
        },
        Case {
            name: "nothing but zeros",
            spoil: |workspace| with_data(workspace, [0; 5000]),
            exit_code: 2,
            expected: &[CONVERSATIONS, "1 of 1 records"],
        },
        Case {
            name: "arguments of tools nested without end",
            spoil: |workspace| {
                let call = json!({"function": {"name": "f", "arguments": nested("[", "]")}});
                let messages = json!([{"role": "user", "content": "u"}, {"role": "assistant", "tool_calls": [call]}]);
                with_data(workspace, json!({"messages": messages}).to_string())
            },
            exit_code: 2,
            expected: &[CONVERSATIONS],
        },
    ]);
}

fn with_tree(workspace: &Workspace, tree: &str) -> Command {
    let mut command = specforge(&["generate", "--prompt", "why", "--max-new-tokens", "2", "--device", "cpu"]);
    command.arg("--target").arg(workspace.path("model")).arg("--draft").arg(workspace.path("run"));
    command.arg("--tree").arg(tree);
    command
}

fn with_tree_file(workspace: &Workspace, text: &str) -> Command {
    let path = workspace.path("tree.json");
    fs::write(&path, text).unwrap();
    with_tree(workspace, path.to_str().unwrap())
}

#[test]
fn trees() {
    check_with_run(&[
        Case {
            name: "nested without end",
            spoil: |workspace| with_tree_file(workspace, &nested("[", "]")),
            exit_code: 2,
            expected: &["{}/tree.json: is not JSON: recursion limit exceeded"],
        },
        Case {
            name: "a rank beyond every list",
            spoil: |workspace| with_tree_file(workspace, "[[18446744073709551615]]"),
            exit_code: 2,
            expected: &["{}/tree.json: expected ranks from 0 to 16777216, got 18446744073709551615"],
        },
        Case {
            name: "a rank below nothing",
            spoil: |workspace| with_tree_file(workspace, "[[-1]]"),
            exit_code: 2,
            expected: &["{}/tree.json: expected a list of paths"],
        },
        Case {
            name: "the same path twice",
            spoil: |workspace| with_tree_file(workspace, "[[0], [0]]"),
            exit_code: 2,
            expected: &["{}/tree.json: draft tree: path [0] is there twice"],
        },
        Case {
            name: "more paths than a mask has room for",
            spoil: |workspace| {
                with_tree_file(workspace, &json!((0..5000).map(|rank| [rank]).collect::<Vec<_>>()).to_string())
            },
            exit_code: 2,
            expected: &["{}/tree.json: expected at most 4096 paths, got 5000"],
        },
        Case {
            name: "a child without parents",
            spoil: |workspace| with_tree_file(workspace, "[[0, 0, 0]]"),
            exit_code: 2,
            expected: &["{}/tree.json: draft tree: path [0, 0, 0] has no parent in the tree"],
        },
        Case {
            name: "an empty path",
            spoil: |workspace| with_tree_file(workspace, "[[]]"),
            exit_code: 2,
            expected: &["{}/tree.json: draft tree: path [] is empty"],
        },
        Case {
            name: "a path longer than the screen",
            spoil: |workspace| with_tree_file(workspace, &json!([vec![7; 100_000]]).to_string()),
            exit_code: 2,
            expected: &["{}/tree.json: draft tree: path [7, 7", "has no parent in the tree"],
        },
        Case {
            name: "a chain beyond every number",
            spoil: |workspace| with_tree(workspace, "chain:18446744073709551616"),
            exit_code: 2,
            expected: &["tree `chain:18446744073709551616`: expected a length from 1 to 128"],
        },
        Case {
            name: "a look into the prompt beyond every prompt",
            spoil: |workspace| {
                let mut command = specforge(&["generate", "--prompt", "x", "--draft", "prompt-lookup", "--target"]);
                command.arg(workspace.path("model")).args(["--tree", "depth=18446744073709551615,nodes=5000"]);
                command
            },
            exit_code: 2,
            expected: &["depth=18446744073709551615", "numbers from 1 to 4096"],
        },
        Case {
            name: "a tree of another kind of draft",
            spoil: |workspace| with_tree(workspace, "dynamic:depth=18446744073709551615,top_k=1,nodes=1"),
            exit_code: 2,
            expected: &["tree `dynamic:depth=18446744073709551615"],
        },
    ]);
}

/// Records one answer twice and says what compares the two.
fn traces(workspace: &Workspace) -> Command {
    for name in ["a.trace", "b.trace"] {
        let mut command = specforge(&["generate", "--json", "--prompt", "why", "--max-new-tokens", "4", "--trace"]);
        command.arg(workspace.path(name)).arg("--target").arg(workspace.path("model"));
        assert!(output_of(&mut command).status.success());
    }
    let mut command = specforge(&["compare"]);
    command.arg(workspace.path("a.trace")).arg(workspace.path("b.trace"));
    command
}

/// Changes one line of the first trace.
fn with_line(workspace: &Workspace, number: usize, change: impl FnOnce(&str) -> String) -> Command {
    let command = traces(workspace);
    let path = workspace.path("a.trace");
    let text = fs::read_to_string(&path).unwrap();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines[number] = change(&lines[number]);
    fs::write(&path, lines.join("\n") + "\n").unwrap();
    command
}

fn set(line: &str, pointer: &str, value: Value) -> String {
    let mut record: Value = serde_json::from_str(line).unwrap();
    *record.pointer_mut(pointer).unwrap() = value;
    record.to_string()
}

#[test]
fn recorded_decodes() {
    check(&[
        Case {
            name: "a header nested without end",
            spoil: |workspace| with_line(workspace, 0, |_| nested("[", "]")),
            exit_code: 2,
            expected: &["{}/a.trace"],
        },
        Case {
            name: "a record nested without end",
            spoil: |workspace| with_line(workspace, 1, |_| nested(r#"{"a":"#, "}")),
            exit_code: 2,
            expected: &["{}/a.trace:2: ", "recursion limit"],
        },
        Case {
            name: "a vocabulary beyond every memory",
            spoil: |workspace| with_line(workspace, 0, |line| set(line, "/header/vocabulary", json!(u64::MAX))),
            exit_code: 2,
            expected: &["{}/a.trace"],
        },
        Case {
            name: "rows cut off",
            spoil: |workspace| {
                let command = traces(workspace);
                super::truncate(&workspace.path("a.trace.rows"), 100);
                command
            },
            exit_code: 2,
            expected: &["{}/a.trace"],
        },
        Case {
            name: "no rows",
            spoil: |workspace| {
                let command = traces(workspace);
                fs::write(workspace.path("a.trace.rows"), "").unwrap();
                command
            },
            exit_code: 2,
            expected: &["{}/a.trace"],
        },
        Case {
            name: "zeros",
            spoil: |workspace| {
                let command = traces(workspace);
                fs::write(workspace.path("a.trace"), [0; 5000]).unwrap();
                command
            },
            exit_code: 2,
            expected: &["{}/a.trace"],
        },
    ]);
}

fn with_config(workspace: &Workspace, text: &str) -> Command {
    let path = workspace.path("hostile.json");
    fs::write(&path, text).unwrap();
    let mut command = specforge(&["train", "--plan", "--config"]);
    command.arg(path);
    command
}

fn sound_config(workspace: &Workspace) -> String {
    fs::read_to_string(Path::new(&workspace.config())).unwrap()
}

#[test]
fn configurations() {
    check(&[
        Case {
            name: "nested without end",
            spoil: |workspace| with_config(workspace, &nested("[", "]")),
            exit_code: 2,
            expected: &["{}/hostile.json:1: not valid JSON: recursion limit exceeded"],
        },
        Case {
            name: "a list",
            spoil: |workspace| with_config(workspace, "[1, 2, 3]"),
            exit_code: 2,
            expected: &["configuration"],
        },
        Case {
            name: "zeros",
            spoil: |workspace| with_config(workspace, &"\0".repeat(5000)),
            exit_code: 2,
            expected: &["{}/hostile.json:1: not valid JSON"],
        },
        Case {
            name: "a number beyond every type",
            spoil: |workspace| {
                let text = sound_config(workspace).replace("\"max_steps\": 4", "\"max_steps\": 1e999");
                with_config(workspace, &text)
            },
            exit_code: 2,
            expected: &["{}/hostile.json", "number out of range"],
        },
        Case {
            name: "more steps than can be counted",
            spoil: |workspace| train_with(workspace, "train.max_steps=18446744073709551616"),
            exit_code: 2,
            expected: &["`train.max_steps`"],
        },
        Case {
            name: "a set value nested without end",
            spoil: |workspace| train_with(workspace, &format!("optim.learning_rate={}", "[".repeat(100_000))),
            exit_code: 2,
            expected: &["`optim.learning_rate`", "…"],
        },
        Case {
            name: "a set key without end",
            spoil: |workspace| train_with(workspace, &format!("{}=1", "a.".repeat(50_000))),
            exit_code: 2,
            expected: &["--set: expected a key of at most 32 parts", "…"],
        },
        Case {
            name: "heads without end",
            spoil: |workspace| {
                workspace.train_command("run", &["--plan", "--set", "draft.num_heads=4611686018427387904"])
            },
            exit_code: 2,
            expected: &["`draft.num_heads`"],
        },
    ]);
}
