//! Whole EAGLE-3 runs through the program: what is learned, what is exported, and how much memory a step takes.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::fixture::{Workspace, conversations, json_of, specforge};

fn workspace() -> Workspace {
    let mut workspace = Workspace::new();
    workspace.configuration["draft"] =
        json!({"algorithm": "eagle3", "capture": [0, 1], "draft_vocab_size": 200, "ttt_steps": 7});
    workspace
}

/// A draft that has seen one conversation often enough names every token of it, at every step.
#[test]
fn one_conversation_is_learned_by_heart() {
    let mut workspace = workspace();
    fs::write(workspace.path("one.jsonl"), conversations(1)).unwrap();
    let one = json!([workspace.path("one.jsonl")]);
    workspace.set("data.train", one.clone()).set("data.eval", one);
    workspace.set("draft.draft_vocab_size", Value::Null).set("draft.lm_head", "random");
    workspace.set("train.max_steps", 250).set("train.log_every", 50);
    let report = workspace.train("run", &[]);
    for step in 1..=7 {
        let accuracy = |when: &str| report[when][format!("step{step}/accuracy")].as_f64().unwrap();
        assert!(accuracy("start") < 0.5, "step {step} knew it already");
        assert_eq!(accuracy("end"), 1.0, "step {step}");
    }
    assert_eq!(report["end"]["step7/chain"], 1.0);
}

/// Exported files start the next run where the last one ended.
#[test]
fn a_run_starts_from_an_exported_draft() {
    let mut workspace = workspace();
    workspace.set("train.max_steps", 12);
    let first = workspace.train("first", &[]);
    let run = workspace.path("first");
    let folder = workspace.path("exported");
    let mut export = specforge(&["export", "--json", "--format", "eagle3", "--checkpoint"]);
    let report = json_of(export.arg(&run).arg("--out").arg(&folder));
    assert_eq!(report["format"], "eagle3");
    let from = format!("draft.init_from={}", folder.display());
    let map = format!("draft.vocab_map={}", run.join("vocab.safetensors").display());
    let second = workspace.train("second", &["--set", &from, "--set", &map, "--set", "train.max_steps=1"]);
    assert_eq!(second["start"], first["end"]);
    assert_ne!(second["start"], first["start"]);
}

/// Memory of a step at the sizes of the design: a third of what a dense implementation takes at most.
///
/// The dense one keeps what SpecForge keeps: teacher probabilities of every row, and for each step logits, their
/// log-softmax and its gradient over the draft's vocabulary, in float32. Only these are counted.
#[test]
fn a_step_takes_a_third_of_the_memory_of_dense_logits() {
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/../benchmarks/eagle3-step.json");
    let bench = |tokens: &str| {
        let mut command: Command = specforge(&["bench-train", "--json", "--repeat", "1", "--device", "cpu"]);
        json_of(command.args(["--config", config, "--batch", tokens, "--supervised", "0.99"]))
    };
    let report = bench("1x1024");
    let bytes = |key: &str| report[key].as_u64().unwrap();
    let taken = bytes("peak_memory_bytes") - bytes("memory_before_bytes");
    let (rows, vocabulary, draft_vocabulary, steps) = (1024, 32000, 8000, 7);
    let dense = 4 * rows * (vocabulary + 2 * draft_vocabulary + steps * 2 * draft_vocabulary);
    println!("a step takes {} MiB, dense logits {} MiB", taken >> 20, dense >> 20);
    assert!(taken < dense, "{taken} {dense}");
}
