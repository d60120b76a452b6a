//! What `train` is told: configurations, output folders, and runs to go on with.

use std::fs;
use std::process::Command;

use serde_json::json;

use super::{Case, check, check_with_run, edit_json, train, train_with, truncate, with_run};
use crate::fixture::{Workspace, conversations, output_of, specforge, stderr_of};

/// The configuration as text, changed.
fn with_config(workspace: &Workspace, change: impl FnOnce(String) -> String) -> Command {
    let command = train(workspace);
    let path = workspace.path("run.json");
    fs::write(&path, change(fs::read_to_string(&path).unwrap())).unwrap();
    command
}

pub(super) fn resume(workspace: &Workspace, arguments: &[&str]) -> Command {
    workspace.train_command("run", &[&["--resume"], arguments].concat())
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
            name: "more tokens than can be counted",
            spoil: |workspace| train_with(workspace, "train.batch_tokens=9223372036854775807"),
            exit_code: 2,
            expected: &["`train.batch_tokens`: expected at most 2147483647, got 9223372036854775807"],
        },
        Case {
            name: "chunks larger than any memory",
            spoil: |workspace| train_with(workspace, "train.chunk_mib=17592186044416"),
            exit_code: 2,
            expected: &["`train.chunk_mib`: expected at most 2147483647, got 17592186044416"],
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
fn runs_and_checkpoints() {
    check_with_run(&[
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
            name: "another length under a schedule that spreads over it",
            spoil: |workspace| resume(workspace, &["--set", "train.max_steps=6"]),
            exit_code: 2,
            expected: &[
                "`optim.schedule`: the checkpoint's learning rates are spread over 4 steps, got 6",
                "hint: set train.epochs, train.max_steps and optim.schedule.total_steps back",
            ],
        },
        Case {
            name: "another horizon of the schedule",
            spoil: |workspace| resume(workspace, &["--set", "optim.schedule.total_steps=40"]),
            exit_code: 2,
            expected: &["are spread over 4 steps, got 40", "hint: keep them with optim.schedule.total_steps=4, or"],
        },
        Case {
            name: "steps after the learning rate fell to 0",
            spoil: |workspace| {
                resume(workspace, &["--set", "train.max_steps=6", "--set", "optim.schedule.total_steps=4"])
            },
            exit_code: 2,
            expected: &[
                "`optim.schedule.total_steps`: the learning rate is 0 after 4 steps, and the run has 6",
                "hint: raise it",
            ],
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
                resume(workspace, &[])
            },
            exit_code: 2,
            expected: &["{}/run/metrics.jsonl:1: expected an object with a whole number `step`"],
        },
    ]);
}

#[test]
fn a_sound_older_checkpoint_is_used_where_the_newest_is_damaged() {
    let sound = with_run();
    truncate(&sound.path("run/step-00000004/model.safetensors"), 1);
    let output = output_of(&mut resume(&sound, &[]));
    let message = stderr_of(&output);
    assert!(output.status.success(), "{message}");
    assert!(message.contains("step-00000004: damaged checkpoint passed over"), "{message}");
    assert!(message.contains("resuming from") && message.contains("step-00000002"), "{message}");
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
    ]);
}
