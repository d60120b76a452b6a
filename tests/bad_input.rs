//! Bad input of every kind, through the real program: a clear message, the right exit code, nothing half-written.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use specforge::weights;
use tch::{Device, Kind, Tensor};

use crate::fixture::{Workspace, contents, conversations, json_of, litter, model_config, model_tensors};
use crate::fixture::{output_of, specforge, stderr_of, write_gguf};

/// One way to go wrong.
struct Case {
    name: &'static str,
    /// Spoils something in a sound workspace and says what to run.
    spoil: fn(&mut Workspace) -> Command,
    exit_code: i32,
    /// Parts of the message. `{}` stands for the workspace's folder.
    expected: &'static [&'static str],
}

/// Runs each case in a workspace of its own.
fn check(cases: &[Case]) {
    check_in(cases, &|| Workspace::new());
}

/// Runs all cases before it fails, so that one look shows all that is wrong.
fn check_in(cases: &[Case], make: &dyn Fn() -> Workspace) {
    let wrong: Vec<String> = cases
        .iter()
        .filter_map(|case| {
            let (message, problems) = problems_of(case, &mut make());
            let text = format!("-- {}: {}\n{message}", case.name, problems.join("; "));
            (!problems.is_empty()).then_some(text)
        })
        .collect();
    assert!(wrong.is_empty(), "{} of {} cases are wrong:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

/// Looks at message, exit code, stdout and what is left on disk.
fn problems_of(case: &Case, workspace: &mut Workspace) -> (String, Vec<String>) {
    let mut command = (case.spoil)(workspace);
    let folder = workspace.path("");
    let before = contents(&folder);
    let output = output_of(&mut command);
    let message = stderr_of(&output);
    let mut problems = Vec::new();
    let mut expect = |holds: bool, problem: String| {
        if !holds {
            problems.push(problem);
        }
    };
    expect(output.status.code() == Some(case.exit_code), format!("{}", output.status));
    expect(output.stdout.is_empty(), "something is on stdout".to_owned());
    for part in case.expected {
        let part = part.replace("{}", folder.to_str().unwrap().trim_end_matches('/'));
        expect(message.contains(&part), format!("no `{part}`"));
    }
    // The error is the last thing said, with at most a hint after it.
    let last: Vec<&str> = message.lines().skip_while(|line| !line.starts_with("error: ")).collect();
    let hints = last.iter().filter(|line| line.starts_with("hint: ")).count();
    expect(
        !last.is_empty() && message.lines().filter(|line| line.starts_with("error: ")).count() == 1 && hints <= 1,
        "not one error".to_owned(),
    );
    for noise in ["panicked", "RUST_BACKTRACE", "internal error", "frame #", "Exception raised", "c10::"] {
        expect(!message.contains(noise), format!("`{noise}` in the message"));
    }
    expect(litter(&folder).is_empty(), format!("left behind: {:?}", litter(&folder)));
    // What was there is there still, and what is new is no result.
    let after = contents(&folder);
    for (path, bytes) in before.iter().filter(|(path, _)| !path.starts_with("cache")) {
        let now = after.iter().find(|(other, _)| other == path);
        expect(now.is_some_and(|(_, now)| now == bytes), format!("{} changed", path.display()));
    }
    for (path, _) in after.iter().filter(|(path, _)| !before.iter().any(|(other, _)| other == path)) {
        let is_result = path.iter().any(|part| part.to_string_lossy().starts_with("step-"))
            || path.file_name().is_some_and(|name| name == "report.json" || name == "model.safetensors");
        expect(!is_result, format!("{} was written", path.display()));
    }
    (message, problems)
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

fn edit_model(workspace: &Workspace, edit: impl FnOnce(&mut Vec<(String, Tensor)>)) {
    let mut tensors = model_tensors(&model_config(&json!({})));
    edit(&mut tensors);
    weights::write_tensors(&workspace.path("model/model.safetensors"), &tensors, &[]).unwrap();
}

fn truncate(path: &Path, drop: u64) {
    let length = fs::metadata(path).unwrap().len();
    fs::File::options().write(true).open(path).unwrap().set_len(length - drop).unwrap();
}

fn train(workspace: &Workspace) -> Command {
    workspace.train_command("run", &[])
}

fn train_with(workspace: &Workspace, setting: &str) -> Command {
    workspace.train_command("run", &["--set", setting])
}

fn with_data(workspace: &Workspace, text: impl AsRef<[u8]>) -> Command {
    fs::write(workspace.path("conversations.jsonl"), text).unwrap();
    train(workspace)
}

/// The configuration as text, changed.
fn with_config(workspace: &Workspace, change: impl FnOnce(String) -> String) -> Command {
    let command = train(workspace);
    let path = workspace.path("run.json");
    fs::write(&path, change(fs::read_to_string(&path).unwrap())).unwrap();
    command
}

#[test]
fn configurations() {
    check(&[
        Case {
            name: "no configuration",
            spoil: |workspace| {
                let mut command = specforge(&["train", "--config"]);
                command.arg(workspace.path("nowhere.json"));
                command
            },
            exit_code: 2,
            expected: &["cannot read {}/nowhere.json: No such file or directory"],
        },
        Case {
            name: "a folder as configuration",
            spoil: |workspace| {
                let mut command = specforge(&["train", "--config"]);
                command.arg(workspace.path("model"));
                command
            },
            exit_code: 2,
            expected: &["cannot read {}/model: Is a directory"],
        },
        Case {
            name: "configuration that is no JSON",
            spoil: |workspace| {
                with_config(workspace, |text| {
                    text.replace("\"shared\"", "").replace("\"epochs\": 1000,", "\"epochs\": ,")
                })
            },
            exit_code: 2,
            expected: &["{}/run.json:", "not valid JSON", "expected value at line"],
        },
        Case {
            name: "configuration that is empty",
            spoil: |workspace| with_config(workspace, |_| String::new()),
            exit_code: 2,
            expected: &["{}/run.json:", "not valid JSON: EOF"],
        },
        Case {
            name: "configuration that is a list",
            spoil: |workspace| {
                let path = workspace.config();
                fs::write(&path, "[]").unwrap();
                let mut command = specforge(&["train", "--config"]);
                command.arg(path);
                command
            },
            exit_code: 2,
            expected: &["configuration", "expected struct RunConfig"],
        },
        Case {
            name: "configuration that is no text",
            spoil: |workspace| {
                let command = train(workspace);
                fs::write(workspace.path("run.json"), b"{\"\xff\xfe\": 1}").unwrap();
                command
            },
            exit_code: 2,
            expected: &["{}/run.json", "UTF-8"],
        },
        Case {
            name: "a typo",
            spoil: |workspace| {
                workspace.set("optim.learning_rte", 1);
                train(workspace)
            },
            exit_code: 2,
            expected: &["`optim.learning_rte`: unknown key; did you mean `learning_rate`?", "hint: known keys here: "],
        },
        Case {
            name: "a typo in the draft's section",
            spoil: |workspace| train_with(workspace, "draft.num_head=3"),
            exit_code: 2,
            expected: &["`draft.num_head`: unknown key; did you mean `num_heads`?"],
        },
        Case {
            name: "an unknown section",
            spoil: |workspace| train_with(workspace, "trian.epochs=3"),
            exit_code: 2,
            expected: &["`trian`: unknown key; did you mean `train`?"],
        },
        Case {
            name: "a section that is missing",
            spoil: |workspace| {
                workspace.configuration.as_object_mut().unwrap().remove("target");
                train(workspace)
            },
            exit_code: 2,
            expected: &["missing field `target`"],
        },
        Case {
            name: "a wrong type",
            spoil: |workspace| train_with(workspace, "train.epochs=many"),
            exit_code: 2,
            expected: &["`train.epochs`", "invalid type: string \"many\", expected u64"],
        },
        Case {
            name: "a negative count",
            spoil: |workspace| train_with(workspace, "train.batch_tokens=-5"),
            exit_code: 2,
            expected: &["`train.batch_tokens`", "integer `-5`"],
        },
        Case {
            name: "an override without a value",
            spoil: |workspace| train_with(workspace, "train.epochs"),
            exit_code: 2,
            expected: &["--set: expected key=value, got `train.epochs`"],
        },
        Case {
            name: "an override inside a number",
            spoil: |workspace| train_with(workspace, "train.epochs.first=1"),
            exit_code: 2,
            expected: &["--set train.epochs.first=1", "`first`"],
        },
        Case {
            name: "an unknown algorithm",
            spoil: |workspace| train_with(workspace, "draft.algorithm=hydra"),
            exit_code: 2,
            expected: &["`draft.algorithm`: expected one of medusa", "got `hydra`"],
        },
        Case {
            name: "no heads",
            spoil: |workspace| train_with(workspace, "draft.num_heads=0"),
            exit_code: 2,
            expected: &["`draft.num_heads`: expected 1 to 32, got 0"],
        },
        Case {
            name: "weights for other heads",
            spoil: |workspace| train_with(workspace, "draft.loss_weights=[1,2]"),
            exit_code: 2,
            expected: &["`draft.loss_weights`: expected 3 numbers", "got [1.0, 2.0]"],
        },
        Case {
            name: "a negative learning rate",
            spoil: |workspace| train_with(workspace, "optim.learning_rate=-0.001"),
            exit_code: 2,
            expected: &["`optim.learning_rate`: expected a number above 0, got -0.001"],
        },
        Case {
            name: "a batch smaller than a micro-batch",
            spoil: |workspace| train_with(workspace, "train.batch_tokens=64"),
            exit_code: 2,
            expected: &["`train.micro_batch_tokens`: expected at most batch_tokens (64), got 128"],
        },
        Case {
            name: "no step between log lines",
            spoil: |workspace| train_with(workspace, "train.log_every=0"),
            exit_code: 2,
            expected: &["`train.log_every`: expected at least 1, got 0"],
        },
        Case {
            name: "everything held out",
            spoil: |workspace| train_with(workspace, "data.eval_fraction=1"),
            exit_code: 2,
            expected: &["`data.eval_fraction`: expected a share from 0 to below 1, got 1"],
        },
        Case {
            name: "an unknown element type",
            spoil: |workspace| train_with(workspace, "target.dtype=int8"),
            exit_code: 2,
            expected: &["`target.dtype`", "unknown variant `int8`", "`bfloat16`"],
        },
        Case {
            name: "an unknown device",
            spoil: |workspace| workspace.train_command("run", &["--device", "tpu"]),
            exit_code: 2,
            expected: &["--device", "auto, cpu, cuda or cuda:N, got `tpu`"],
        },
        Case {
            name: "a device that is not there",
            spoil: |workspace| workspace.train_command("run", &["--device", "cuda:97"]),
            exit_code: 2,
            expected: &["--device cuda:97: ", "CUDA"],
        },
    ]);
}

#[test]
fn models() {
    check(&[
        Case {
            name: "no model folder",
            spoil: |workspace| {
                workspace.set("target.path", "/nowhere/model");
                train(workspace)
            },
            exit_code: 2,
            expected: &["/nowhere/model", "is not there"],
        },
        Case {
            name: "a file as model folder",
            spoil: |workspace| {
                let path = workspace.path("conversations.jsonl");
                workspace.set("target.path", json!(path));
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/conversations.jsonl", "is not there"],
        },
        Case {
            name: "no config.json",
            spoil: |workspace| {
                fs::remove_file(workspace.path("model/config.json")).unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model", "config.json is not there", "hint: "],
        },
        Case {
            name: "no model_type",
            spoil: |workspace| {
                edit_json(&workspace.path("model/config.json"), |config| {
                    config.as_object_mut().unwrap().remove("model_type");
                });
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/config.json", "missing field `model_type`"],
        },
        Case {
            name: "an unknown model_type",
            spoil: |workspace| {
                edit_json(&workspace.path("model/config.json"), |config| config["model_type"] = json!("mamba"));
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/config.json", "model_type `mamba` is not supported; supported: llama"],
        },
        Case {
            name: "config.json cut off",
            spoil: |workspace| {
                truncate(&workspace.path("model/config.json"), 5);
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/config.json", "EOF"],
        },
        Case {
            name: "heads that do not divide the hidden size",
            spoil: |workspace| {
                edit_json(&workspace.path("model/config.json"), |config| {
                    config["num_attention_heads"] = json!(6);
                    config["num_key_value_heads"] = json!(6);
                });
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/config.json", "`num_attention_heads`", "hidden_size", "32", "6"],
        },
        Case {
            name: "groups that do not divide the heads",
            spoil: |workspace| {
                edit_json(&workspace.path("model/config.json"), |config| config["num_key_value_heads"] = json!(3));
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/config.json", "`num_key_value_heads`: expected a divisor of the 4 heads, got 3"],
        },
        Case {
            name: "an unknown rotary variant",
            spoil: |workspace| {
                edit_json(&workspace.path("model/config.json"), |config| {
                    config["rope_scaling"] = json!({"rope_type": "spiral", "factor": 2.0});
                });
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/config.json", "`rope_type`: expected default, linear", "got spiral"],
        },
        Case {
            name: "no weights",
            spoil: |workspace| {
                fs::remove_file(workspace.path("model/model.safetensors")).unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model", "holds neither model.safetensors nor model.safetensors.index.json"],
        },
        Case {
            name: "truncated weights",
            spoil: |workspace| {
                truncate(&workspace.path("model/model.safetensors"), 100);
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/model.safetensors: is not a whole safetensors file", "hint: "],
        },
        Case {
            name: "weights cut off in their header",
            spoil: |workspace| {
                let path = workspace.path("model/model.safetensors");
                truncate(&path, fs::metadata(&path).unwrap().len() - 40);
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/model.safetensors: is not a whole safetensors file"],
        },
        Case {
            name: "empty weights",
            spoil: |workspace| {
                fs::write(workspace.path("model/model.safetensors"), "").unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/model.safetensors: is not a whole safetensors file"],
        },
        Case {
            name: "weights that are a pointer of a large-file store",
            spoil: |workspace| {
                let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
                fs::write(workspace.path("model/model.safetensors"), pointer).unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/model.safetensors: is not a whole safetensors file"],
        },
        Case {
            name: "a missing tensor",
            spoil: |workspace| {
                edit_model(workspace, |tensors| {
                    tensors.retain(|(name, _)| name != "model.layers.1.mlp.up_proj.weight")
                });
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model", "missing (1)", "model.layers.1.mlp.up_proj.weight [48, 32]"],
        },
        Case {
            name: "a surplus tensor",
            spoil: |workspace| {
                let bias = ("model.layers.0.self_attn.q_proj.bias", Tensor::zeros([32], (Kind::Float, Device::Cpu)));
                edit_model(workspace, |tensors| tensors.push((bias.0.to_owned(), bias.1)));
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model", "surplus (1)", "model.layers.0.self_attn.q_proj.bias [32]"],
        },
        Case {
            name: "a wrong shape",
            spoil: |workspace| {
                edit_model(workspace, |tensors| tensors[0].1 = tensors[0].1.narrow(0, 0, 400).contiguous());
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model", "wrong shape (1)", "model.embed_tokens.weight: expected [454, 32], got [400, 32]"],
        },
        Case {
            name: "a shard that is missing",
            spoil: |workspace| {
                fs::remove_file(workspace.path("model/model.safetensors")).unwrap();
                let index = json!({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}});
                fs::write(workspace.path("model/model.safetensors.index.json"), index.to_string()).unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &[
                "{}/model/model-00002-of-00002.safetensors: is named in model.safetensors.index.json but not there",
            ],
        },
        Case {
            name: "a tokenizer larger than the model",
            spoil: |workspace| {
                let config = model_config(&json!({"vocab_size": 440}));
                fs::write(workspace.path("model/config.json"), config.to_string()).unwrap();
                weights::write_tensors(&workspace.path("model/model.safetensors"), &model_tensors(&config), &[])
                    .unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model", "440"],
        },
        Case {
            name: "no tokenizer",
            spoil: |workspace| {
                fs::remove_file(workspace.path("model/tokenizer.json")).unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/tokenizer.json: is not there", "hint: "],
        },
        Case {
            name: "a broken tokenizer",
            spoil: |workspace| {
                truncate(&workspace.path("model/tokenizer.json"), 300);
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/tokenizer.json: is not a tokenizer this program can read"],
        },
        Case {
            name: "no chat template",
            spoil: |workspace| {
                edit_json(&workspace.path("model/tokenizer_config.json"), |config| {
                    config.as_object_mut().unwrap().remove("chat_template");
                });
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model", "has no chat template", "hint: "],
        },
        Case {
            name: "a chat template that is no Jinja",
            spoil: |workspace| {
                edit_json(&workspace.path("model/tokenizer_config.json"), |config| {
                    config["chat_template"] = json!("{% for message in messages %}{{ message.content }}");
                });
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/tokenizer_config.json", "template"],
        },
    ]);
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
            name: "compressed data",
            spoil: |workspace| with_data(workspace, b"\x1f\x8b\x08\x00rest"),
            exit_code: 2,
            expected: &["{}/conversations.jsonl: is compressed with gzip", "hint: unpack it"],
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
            name: "an id that no document has",
            spoil: |workspace| {
                let mut command = specforge(&["inspect", "--id", "c999", "--target"]);
                command.arg(workspace.path("model")).arg("--data").arg(workspace.path("conversations.jsonl"));
                command
            },
            exit_code: 2,
            expected: &["--id: no document has the id `c999`"],
        },
    ]);
}

/// A workspace with a finished run of two checkpoints in it.
fn with_run() -> Workspace {
    let mut workspace = Workspace::new();
    workspace.set("train.save_every", 2);
    workspace.train("run", &[]);
    workspace
}

fn resume(workspace: &Workspace, arguments: &[&str]) -> Command {
    workspace.train_command("run", &[&["--resume"], arguments].concat())
}

#[test]
fn runs_and_checkpoints() {
    let cases = [
        Case {
            name: "a folder that holds a run",
            spoil: |workspace| train(workspace),
            exit_code: 2,
            expected: &["{}/run: already holds a run", "step-00000004", "hint: continue it with --resume"],
        },
        Case {
            name: "nothing to resume",
            spoil: |workspace| workspace.train_command("new", &["--resume"]),
            exit_code: 2,
            expected: &["{}/new: holds no checkpoint to resume from"],
        },
        Case {
            name: "another learning rate",
            spoil: |workspace| resume(workspace, &["--set", "optim.learning_rate=0.5"]),
            exit_code: 2,
            expected: &["`optim.learning_rate`: the checkpoint was trained with 0.01, got 0.5", "hint: "],
        },
        Case {
            name: "another draft",
            spoil: |workspace| resume(workspace, &["--set", "draft.num_heads=2"]),
            exit_code: 2,
            expected: &["`draft.num_heads`: the checkpoint was trained with 3, got 2"],
        },
        Case {
            name: "other data under the same name",
            spoil: |workspace| {
                fs::write(workspace.path("conversations.jsonl"), conversations(50)).unwrap();
                resume(workspace, &[])
            },
            exit_code: 2,
            expected: &["{}/run/step-00000004: the data changed since this checkpoint", "hint: restore the files"],
        },
        Case {
            name: "a damaged optimizer",
            spoil: |workspace| {
                let path = workspace.path("run/step-00000004/optimizer.safetensors");
                let mut bytes = fs::read(&path).unwrap();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                fs::write(&path, bytes).unwrap();
                resume(workspace, &[])
            },
            exit_code: 2,
            expected: &[
                "{}/run/step-00000004/optimizer.safetensors: expected SHA-256",
                "hint: the checkpoint is damaged",
            ],
        },
        Case {
            name: "checkpoints that are all damaged",
            spoil: |workspace| {
                fs::write(workspace.path("run/step-00000002/manifest.json"), "{").unwrap();
                truncate(&workspace.path("run/step-00000004/model.safetensors"), 1);
                resume(workspace, &[])
            },
            exit_code: 2,
            expected: &[
                "warning: {}/run/step-00000002: damaged checkpoint passed over",
                "warning: {}/run/step-00000004: damaged checkpoint passed over",
                "{}/run: holds no checkpoint to resume from",
            ],
        },
        Case {
            name: "a checkpoint of a later version",
            spoil: |workspace| {
                for step in ["2", "4"] {
                    let path = workspace.path(&format!("run/step-0000000{step}/manifest.json"));
                    edit_json(&path, |manifest| manifest["format_version"] = json!(99));
                }
                resume(workspace, &[])
            },
            exit_code: 2,
            expected: &["expected format_version 1, got 99"],
        },
        Case {
            name: "metrics that are no metrics",
            spoil: |workspace| {
                fs::write(workspace.path("run/metrics.jsonl"), "hello\n").unwrap();
                resume(workspace, &["--set", "train.max_steps=6"])
            },
            exit_code: 2,
            expected: &["{}/run/metrics.jsonl:1: expected an object with a whole number `step`"],
        },
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
                let mut command = specforge(&["export", "--format", "gguf", "--checkpoint"]);
                command.arg(workspace.path("run")).arg("--out").arg(workspace.path("export"));
                command
            },
            exit_code: 2,
            expected: &["--format: expected one of medusa, medusa-vllm, got `gguf`"],
        },
    ];
    let sound = with_run();
    // The finished run is copied: training anew for each case takes longer. The paths in it are put right.
    check_in(&cases, &|| {
        let mut workspace = Workspace::new();
        workspace.set("train.save_every", 2);
        let (old, new) = (sound.path(""), workspace.path(""));
        for (path, bytes) in contents(&sound.path("run")) {
            let path = workspace.path("run").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let text = String::from_utf8(bytes)
                .map(|text| text.replace(old.to_str().unwrap(), new.to_str().unwrap()).into_bytes());
            fs::write(path, text.unwrap_or_else(|error| error.into_bytes())).unwrap();
        }
        workspace
    });
    // A sound older checkpoint is used where the newest is damaged.
    truncate(&sound.path("run/step-00000004/model.safetensors"), 1);
    let output = output_of(&mut resume(&sound, &[]));
    let message = stderr_of(&output);
    assert!(output.status.success(), "{message}");
    assert!(message.contains("step-00000004: damaged checkpoint passed over"), "{message}");
    assert!(message.contains("resuming from") && message.contains("step-00000002"), "{message}");
}

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

/// Folders that nobody can write to, root included.
#[test]
fn folders_that_cannot_be_written() {
    check(&[
        Case {
            name: "an output folder in a file system that takes no files",
            spoil: |workspace| train_with(workspace, "train.output_dir=/proc/specforge"),
            exit_code: 2,
            expected: &["cannot create folder /proc/specforge: "],
        },
        Case {
            name: "an output folder below a file",
            spoil: |workspace| {
                let setting = format!("train.output_dir={}", workspace.path("conversations.jsonl/run").display());
                train_with(workspace, &setting)
            },
            exit_code: 2,
            expected: &["cannot create folder {}/conversations.jsonl/run: Not a directory"],
        },
        Case {
            name: "a cache folder that is a file",
            spoil: |workspace| {
                let setting = format!("data.cache_dir={}", workspace.path("conversations.jsonl").display());
                train_with(workspace, &setting)
            },
            exit_code: 2,
            expected: &["{}/conversations.jsonl: "],
        },
        Case {
            name: "an export below a file",
            spoil: |workspace| {
                workspace.train("run", &[]);
                let mut command = specforge(&["export", "--checkpoint"]);
                command.arg(workspace.path("run")).arg("--out").arg(workspace.path("run/config.json/export"));
                command
            },
            exit_code: 2,
            expected: &["{}/run/config.json: File exists"],
        },
        Case {
            name: "an import in a file system that takes no files",
            spoil: |workspace| {
                let mut command = specforge(&["import"]);
                command.arg(workspace.path("conversations.jsonl")).arg("--out").arg("/proc/imported");
                command
            },
            exit_code: 2,
            expected: &["/proc"],
        },
    ]);
}

/// A command under a limit that bash's `ulimit` sets, in the same environment.
fn limited(limit: &str, inner: &Command) -> Command {
    let mut command = Command::new("bash");
    // A file beyond its limit then fails to be written instead of raising a signal.
    let script = format!("trap '' XFSZ; ulimit {limit}; exec \"$@\"");
    command.args(["-c", &script, "limited"]).arg(inner.get_program()).args(inner.get_args());
    for (key, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    command.stdin(std::process::Stdio::null());
    command
}

/// Files that may not grow beyond a limit are what a full disk looks like from inside: some writes succeed, and then
/// one does not.
#[test]
fn a_full_disk_costs_the_new_checkpoint_and_nothing_else() {
    let mut workspace = Workspace::new();
    // A constant rate, so that a longer run begins like a shorter one.
    workspace.set("train.save_every", 2).set("train.max_steps", 2).set("optim.schedule", json!({"kind": "constant"}));
    workspace.train("run", &[]);
    let checkpoint = workspace.path("run/step-00000002");
    let size = |name: &str| fs::metadata(checkpoint.join(name)).unwrap().len();
    let (model, optimizer) = (size("model.safetensors"), size("optimizer.safetensors"));
    let before = contents(&checkpoint);
    workspace.set("train.max_steps", 6);
    // The model file fits and the optimizer's does not; not even the model file fits.
    for limit in [(model + optimizer) / 2, model / 2] {
        let output = output_of(&mut limited(&format!("-f {}", limit >> 10), &resume(&workspace, &[])));
        let message = stderr_of(&output);
        println!("{message}");
        assert_eq!(output.status.signal(), None);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(
            message.contains("error: cannot write") && message.contains("safetensors: File too large"),
            "{message}"
        );
        assert!(!message.contains("panicked") && !message.contains("internal"), "{message}");
        assert_eq!(output.stdout, b"");
        assert!(contents(&checkpoint) == before, "the older checkpoint changed");
        assert!(!workspace.path("run/step-00000004").exists());
        assert_eq!(litter(&workspace.path("run")), Vec::<std::path::PathBuf>::new());
    }
    // With room again, the run goes on as if nothing had been.
    let report = json_of(&mut resume(&workspace, &[]));
    assert_eq!(report["steps"], 6);
    let undisturbed = workspace.train("undisturbed", &[]);
    assert_eq!(undisturbed["end"], report["end"]);
}

/// The real thing, where the machine lets one be made: a file system of one mebibyte.
#[test]
fn a_file_system_without_room() {
    let workspace = Workspace::new();
    let small = workspace.path("small");
    fs::create_dir(&small).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=200k", "specforge-test"]).arg(&small).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        println!("no file system can be mounted here; the limit on file sizes stands for it");
        return;
    }
    let output = output_of(&mut workspace.train_command("small/run", &[]));
    let left = litter(&small);
    let has_checkpoint = small.join("run/step-00000004").exists();
    assert!(Command::new("umount").arg(&small).status().unwrap().success());
    let message = stderr_of(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("No space left on device"), "{message}");
    assert!(message.contains("hint: free some space or choose another folder"), "{message}");
    assert!(!has_checkpoint);
    assert_eq!(left, Vec::<std::path::PathBuf>::new());
}

/// libtorch's own refusals, here of memory, are one line of ours.
#[test]
fn memory_that_is_not_there() {
    let mut workspace = Workspace::with_model(&json!({"vocab_size": 100_000}));
    workspace.set("draft.num_heads", 32);
    let output = output_of(&mut limited("-v 1300000", &train(&workspace)));
    let message = stderr_of(&output);
    println!("{message}");
    assert_eq!(output.status.code(), Some(1), "{message}");
    let error = message.lines().find(|line| line.starts_with("error: ")).unwrap();
    assert!(error.contains("memory"), "{message}");
    assert!(message.contains("hint: lower train.micro_batch_tokens"), "{message}");
    assert!(!message.contains("frame #") && !message.contains("panicked"), "{message}");
    assert_eq!(litter(&workspace.path("run")), Vec::<std::path::PathBuf>::new());
}

/// A pipe whose reader went away is no error of ours.
#[test]
fn a_reader_that_goes_away() {
    let workspace = Workspace::new();
    let mut command = specforge(&["inspect", "--show", "60", "--target"]);
    command.arg(workspace.path("model")).arg("--data").arg(workspace.path("conversations.jsonl"));
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr_of(&output));
    assert!(!stderr_of(&output).contains("panicked"));
}
