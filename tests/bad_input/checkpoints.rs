//! Checkpoints whose digests hold and whose content is not that of the run: what another program, or a hand, made of them.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};
use specforge::checkpoint::FileDigest;
use specforge::weights;
use tch::{Device, Kind, Tensor};

use super::train::resume;
use super::{Case, check_with_run, edit_json};
use crate::fixture::{Workspace, specforge, tensors_of};

const STEP: &str = "run/step-00000004";

/// Changes the tensors of a file of the newest checkpoint, and makes its digest fit.
fn tamper(workspace: &Workspace, file: &str, edit: impl FnOnce(&mut Vec<(String, Tensor)>)) {
    let path = workspace.path(STEP).join(file);
    let mut tensors = tensors_of(&path);
    edit(&mut tensors);
    weights::write_tensors(&path, &tensors, &[]).unwrap();
    edit_json(&workspace.path(STEP).join("manifest.json"), |manifest| {
        manifest["files"][file] = json!(FileDigest::of(&path).unwrap());
    });
}

fn manifest(workspace: &Workspace, key: &str, value: Value) -> Command {
    edit_json(&workspace.path(STEP).join("manifest.json"), |manifest| {
        *manifest.pointer_mut(&format!("/{}", key.replace('.', "/"))).unwrap() = value;
    });
    resume(workspace, &[])
}

fn named<'a>(tensors: &'a mut [(String, Tensor)], name: &str) -> &'a mut Tensor {
    &mut tensors.iter_mut().find(|(other, _)| other == name).unwrap().1
}

fn export(workspace: &Workspace) -> Command {
    let out: PathBuf = workspace.path("export");
    let mut command = specforge(&["export", "--checkpoint"]);
    command.arg(workspace.path(STEP)).arg("--out").arg(out);
    command
}

#[test]
fn tensors_that_are_not_the_drafts() {
    check_with_run(&[
        Case {
            name: "a matrix of another shape",
            spoil: |workspace| {
                tamper(workspace, "model.safetensors", |tensors| {
                    let value = named(tensors, "0.0.linear.weight");
                    *value = value.narrow(0, 0, 16).contiguous();
                });
                resume(workspace, &[])
            },
            exit_code: 2,
            expected: &["{}/run/step-00000004/model.safetensors", "0.0.linear.weight: expected [32, 32], got [16, 32]"],
        },
        Case {
            name: "one number where a row was, which libtorch would spread",
            spoil: |workspace| {
                tamper(workspace, "model.safetensors", |tensors| {
                    *named(tensors, "1.0.linear.bias") = Tensor::ones([1], (Kind::Float, Device::Cpu));
                });
                resume(workspace, &[])
            },
            exit_code: 2,
            expected: &["{}/run/step-00000004/model.safetensors", "1.0.linear.bias: expected [32], got [1]"],
        },
        Case {
            name: "a tensor that is missing and one too many",
            spoil: |workspace| {
                tamper(workspace, "model.safetensors", |tensors| tensors[0].0 = "7.0.linear.bias".to_owned());
                resume(workspace, &[])
            },
            exit_code: 2,
            expected: &["missing (1):\n    0.0.linear.bias [32]", "surplus (1):\n    7.0.linear.bias [32]"],
        },
        Case {
            name: "integers",
            spoil: |workspace| {
                tamper(workspace, "model.safetensors", |tensors| {
                    let value = named(tensors, "0.0.linear.weight");
                    *value = value.to_kind(Kind::Int8);
                });
                resume(workspace, &[])
            },
            exit_code: 2,
            expected: &["`0.0.linear.weight`: expected floating-point numbers, got Int8"],
        },
        Case {
            name: "a value that is no number",
            spoil: |workspace| {
                tamper(workspace, "model.safetensors", |tensors| {
                    let _ = named(tensors, "2.1.weight").get(3).get(5).fill_(f64::NAN);
                });
                resume(workspace, &[])
            },
            exit_code: 2,
            expected: &["model.safetensors: `2.1.weight`: expected finite numbers, element 101 is NaN", "hint: "],
        },
        Case {
            name: "a moment of another shape",
            spoil: |workspace| {
                tamper(workspace, "optimizer.safetensors", |tensors| {
                    let (_, value) = tensors.iter_mut().find(|(name, _)| name.contains("0.0.linear.weight")).unwrap();
                    *value = value.narrow(1, 0, 8).contiguous();
                });
                resume(workspace, &[])
            },
            exit_code: 2,
            expected: &["{}/run/step-00000004/optimizer.safetensors", "expected [32, 32], got [32, 8]"],
        },
        Case {
            name: "an infinite moment",
            spoil: |workspace| {
                tamper(workspace, "optimizer.safetensors", |tensors| {
                    let (_, value) = tensors.iter_mut().find(|(name, _)| name.contains("0.0.linear.bias")).unwrap();
                    let _ = value.get(2).fill_(f64::INFINITY);
                });
                resume(workspace, &[])
            },
            exit_code: 2,
            expected: &["optimizer.safetensors: `", "expected finite numbers, element 2 is inf"],
        },
        Case {
            name: "heads of another shape to export",
            spoil: |workspace| {
                tamper(workspace, "model.safetensors", |tensors| {
                    let value = named(tensors, "1.0.linear.weight");
                    *value = value.narrow(0, 0, 16).contiguous();
                });
                export(workspace)
            },
            exit_code: 2,
            expected: &[
                "{}/run/step-00000004: the checkpoint's tensor `1.0.linear.weight`: expected [32, 32], got [16, 32]",
            ],
        },
    ]);
}

#[test]
fn numbers_of_a_manifest() {
    check_with_run(&[
        Case {
            name: "more steps than can be counted to",
            spoil: |workspace| {
                let path = workspace.path("run/step-4611686018427387904");
                fs::rename(workspace.path(STEP), &path).unwrap();
                edit_json(&path.join("manifest.json"), |manifest| manifest["step"] = json!(1u64 << 62));
                resume(workspace, &[])
            },
            exit_code: 2,
            expected: &["{}/run/step-4611686018427387904/manifest.json: `step`: expected at most 4"],
        },
        Case {
            name: "a place within the epoch that the run does not come through",
            spoil: |workspace| manifest(workspace, "position", json!(u64::MAX)),
            exit_code: 2,
            expected: &[
                "{}/run/step-00000004/manifest.json: `epoch`, `position`: 18446744073709551615 batches of epoch 0",
            ],
        },
        Case {
            name: "an epoch that there is not",
            spoil: |workspace| manifest(workspace, "epoch", json!(u64::MAX)),
            exit_code: 2,
            expected: &["{}/run/step-00000004/manifest.json: `epoch`: expected a number below 1000"],
        },
        Case {
            name: "more tokens than there were",
            spoil: |workspace| manifest(workspace, "tokens_seen", json!(u64::MAX)),
            exit_code: 2,
            expected: &["{}/run/step-00000004/manifest.json: `tokens_seen`: expected at most 1024 after 4 steps"],
        },
        Case {
            name: "heads without number to export",
            spoil: |workspace| {
                let _ = manifest(workspace, "draft.draft.num_heads", json!(1u64 << 62));
                export(workspace)
            },
            exit_code: 2,
            expected: &["{}/run/step-00000004", "`draft.num_heads`: expected 1 to 32, got 4611686018427387904"],
        },
        Case {
            name: "a hidden size without end to export",
            spoil: |workspace| {
                let _ = manifest(workspace, "draft.hidden_size", json!(1u64 << 62));
                export(workspace)
            },
            exit_code: 2,
            expected: &["{}/run/step-00000004", "`hidden_size`: expected a number from 1 to"],
        },
    ]);
}
