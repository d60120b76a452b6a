//! Several processes that train as one, with the real program over loopback: the same update at any world size,
//! checkpoints that any world size reads, and failures that cost nothing that was saved.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::fixture::{TOKENIZER_SIZE, Workspace, json_of, largest_difference, specforge, tensors_of, write_model};

mod failures;
mod launchers;
mod two_nodes;

/// A run of a few steps whose documents have many lengths.
fn workspace(draft: Value) -> Workspace {
    let mut workspace = Workspace::new();
    workspace.configuration["draft"] = draft;
    workspace.set("train.max_steps", 6).set("train.eval_every", 3).set("train.micro_batch_tokens", 256);
    // Adam divides by the size of a gradient, so where that is nothing but the rounding of a sum, an update would be as
    // large as any other: epsilon lies above the rounding here.
    workspace.set("optim.learning_rate", 1e-3).set("optim.epsilon", 1e-6);
    workspace
}

fn medusa() -> Value {
    json!({"algorithm": "medusa", "num_heads": 3})
}

fn eagle3() -> Value {
    json!({"algorithm": "eagle3", "capture": [0, 1], "draft_vocab_size": 300, "ttt_steps": 3})
}

/// `specforge launch` of `specforge train` into the folder `out`.
pub(crate) fn launch_command(workspace: &Workspace, ranks: usize, out: &str, arguments: &[&str]) -> Command {
    launched(workspace, &["--nproc-per-node", &ranks.to_string()], out, arguments)
}

fn launched(workspace: &Workspace, launcher: &[&str], out: &str, arguments: &[&str]) -> Command {
    let mut command = workspace.program(&["launch"]);
    command.args(launcher).args(["train", "--json", "--device", "cpu", "--config"]).arg(workspace.config());
    command.arg("--set").arg(format!("train.output_dir={}", workspace.path(out).display())).args(arguments);
    command
}

/// Largest differences between the ends of two runs: parameters, and moments relative to the largest of their tensor.
fn differences(left: &Path, right: &Path) -> (f64, f64) {
    let (mut parameters, mut moments) = (0f64, 0f64);
    for (file, largest) in [("model.safetensors", &mut parameters), ("optimizer.safetensors", &mut moments)] {
        let (left, right) = (tensors_of(&left.join(file)), tensors_of(&right.join(file)));
        assert_eq!(left.len(), right.len());
        for ((name, left), (other, right)) in left.iter().zip(&right) {
            assert_eq!(name, other);
            let size = if file.starts_with("optimizer") { right.abs().max().double_value(&[]).max(1e-30) } else { 1.0 };
            let difference = largest_difference(left, right) / size;
            assert!(difference.is_finite(), "{name}");
            *largest = largest.max(difference);
        }
    }
    (parameters, moments)
}

/// Every logged figure that does not depend on the clock, by step and name.
pub(crate) fn figures(run: &Path) -> BTreeMap<(u64, String), f64> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let mut figures = BTreeMap::new();
    for line in text.lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        let step = row["step"].as_u64().unwrap();
        for (name, value) in row.as_object().unwrap() {
            let of_the_clock = name.contains("seconds") || name.contains("per_second") || name == "time";
            if let (false, Some(value)) = (of_the_clock, value.as_f64()) {
                figures.insert((step, name.clone()), value);
            }
        }
    }
    figures
}

/// Two runs made the same updates, to the rounding of float32 sums, and logged the same figures.
#[track_caller]
pub(crate) fn assert_same_run(workspace: &Workspace, run: &str, reference: &str, steps: u64) {
    let folder = |run: &str| workspace.path(run).join(format!("step-{steps:08}"));
    let (parameters, moments) = differences(&folder(run), &folder(reference));
    assert!(parameters <= 1e-5 && moments <= 1e-4, "{run}: parameters {parameters:e}, moments {moments:e}");
    let (got, want) = (figures(&workspace.path(run)), figures(&workspace.path(reference)));
    assert!(got.keys().eq(want.keys()), "{run}: other figures are logged");
    assert!(got.len() > 20);
    for (key, want) in want {
        let got = got[&key];
        assert!((got - want).abs() <= 1e-5 * want.abs().max(1.0), "{run}: {key:?}: expected {want}, got {got}");
    }
    println!("{run}: parameters within {parameters:.1e}, moments within {moments:.1e}");
}

/// The whole table: 1, 2, 4 processes and accumulation of 1, 2, 4 against the run of one process.
fn the_same_at_any_world_size(workspace: &Workspace, name: &str, arguments: &[&str]) {
    let reference = format!("{name}-alone");
    workspace.train(&reference, arguments);
    for (ranks, micro_batch) in [(1, 256), (2, 256), (2, 128), (2, 64), (4, 128)] {
        let run = format!("{name}-{ranks}x{micro_batch}");
        let micro_batch = format!("train.micro_batch_tokens={micro_batch}");
        let mut all = arguments.to_vec();
        all.extend(["--set", &micro_batch]);
        let report = json_of(&mut launch_command(workspace, ranks, &run, &all));
        assert_eq!(report["steps"], 6);
        assert_same_run(workspace, &run, &reference, 6);
    }
    // Without processes, accumulation alone.
    for micro_batch in [128, 64] {
        let run = format!("{name}-alone-{micro_batch}");
        let micro_batch = format!("train.micro_batch_tokens={micro_batch}");
        let mut all = arguments.to_vec();
        all.extend(["--set", &micro_batch]);
        workspace.train(&run, &all);
        assert_same_run(workspace, &run, &reference, 6);
    }
}

fn online_and_offline(draft: Value) {
    let workspace = workspace(draft);
    the_same_at_any_world_size(&workspace, "online", &[]);
    let store = workspace.path("store");
    let mut capture = specforge(&["capture", "--json", "--dtype", "float32", "--device", "cpu", "--config"]);
    json_of(capture.arg(workspace.config()).arg("--out").arg(&store));
    let from_store = format!("target.feature_store={}", store.display());
    the_same_at_any_world_size(&workspace, "offline", &["--set", &from_store]);
    assert_same_run(&workspace, "offline-alone", "online-alone", 6);
}

#[test]
fn medusa_makes_the_same_updates_at_any_world_size() {
    online_and_offline(medusa());
}

#[test]
fn eagle3_makes_the_same_updates_at_any_world_size() {
    online_and_offline(eagle3());
}

fn dflash2() -> Value {
    json!({"algorithm": "dflash2", "num_layers": 2, "block_size": 4, "num_anchors": 6, "target_layer_ids": [0, -1],
        "mask_token_id": 1, "head": {"selector_rank": 6, "selector_top_k": 4}, "conv": {"kernel_size": 2, "group_size": 8}})
}

fn dspark() -> Value {
    json!({"algorithm": "dspark", "num_layers": 2, "block_size": 4, "num_anchors": 6, "target_layer_ids": [0, -1],
        "mask_token_id": 1, "draft_vocab_size": 300, "head": {"markov_rank": 6, "markov_head_type": "rnn"}})
}

/// One, two and four processes, online and from a store.
#[test]
fn block_drafters_make_the_same_updates_at_any_world_size() {
    for (name, draft) in [("dflash2", dflash2()), ("dspark", dspark())] {
        let workspace = workspace(draft);
        workspace.train("alone", &[]);
        let store = workspace.path("store");
        let mut capture = specforge(&["capture", "--json", "--dtype", "float32", "--device", "cpu", "--config"]);
        json_of(capture.arg(workspace.config()).arg("--out").arg(&store));
        let from_store = format!("target.feature_store={}", store.display());
        let sizes = [(1, 64, false), (2, 256, false), (4, 64, false), (1, 256, true), (2, 128, true), (4, 256, true)];
        for (ranks, micro_batch, stored) in sizes {
            let run = format!("{name}-{ranks}x{micro_batch}-{stored}");
            let micro_batch = format!("train.micro_batch_tokens={micro_batch}");
            let mut arguments = vec!["--set", &micro_batch];
            if stored {
                arguments.extend(["--set", &from_store]);
            }
            match ranks {
                1 => workspace.train(&run, &arguments),
                _ => json_of(&mut launch_command(&workspace, ranks, &run, &arguments)),
            };
            assert_same_run(&workspace, &run, "alone", 6);
        }
    }
}

#[test]
fn peagle_makes_the_same_updates_at_any_world_size() {
    online_and_offline(json!({
        "algorithm": "peagle", "capture": [0, 1], "draft_vocab_size": 300, "num_layers": 1, "num_depths": 4,
        "mask_token_id": 5,
    }));
}

/// A model that is trained whole, whose documents are masked by chance.
#[test]
fn masked_diffusion_makes_the_same_updates_at_any_world_size() {
    let draft = json!({"algorithm": "masked_diffusion", "mask_token_id": TOKENIZER_SIZE});
    let mut workspace = workspace(draft);
    write_model(&workspace.path("model"), &json!({"vocab_size": TOKENIZER_SIZE + 1}));
    workspace.set("train.save_every", 3).set("optim.schedule", json!({"kind": "constant"}));
    workspace.train("alone", &[]);
    for (ranks, micro_batch) in [(1, 64), (2, 256), (2, 64)] {
        let run = format!("{ranks}x{micro_batch}");
        let micro_batch = format!("train.micro_batch_tokens={micro_batch}");
        let arguments = ["--set", &micro_batch];
        match ranks {
            1 => workspace.train(&run, &arguments),
            _ => json_of(&mut launch_command(&workspace, ranks, &run, &arguments)),
        };
        assert_same_run(&workspace, &run, "alone", 6);
    }
    // Stopped and gone on with, a run ends in the same bytes.
    workspace.train("resumed", &["--set", "train.max_steps=3"]);
    workspace.train("resumed", &["--resume"]);
    for name in ["model.safetensors", "optimizer.safetensors"] {
        let read = |run: &str| fs::read(workspace.path(run).join("step-00000006").join(name)).unwrap();
        assert!(read("resumed") == read("alone"), "{name} differs");
    }
}

/// With and without the optimizer's state spread over the ranks; more ranks than a batch has documents.
#[test]
fn spreading_the_optimizer_and_idle_ranks_change_nothing() {
    let mut workspace = workspace(eagle3());
    // Batches of two to four documents for five ranks.
    workspace.set("train.batch_tokens", 128).set("train.micro_batch_tokens", 64);
    workspace.train("alone", &[]);
    for shard in ["true", "false"] {
        let run = format!("five-{shard}");
        let shard = format!("parallel.shard_optimizer={shard}");
        json_of(&mut launch_command(&workspace, 5, &run, &["--set", &shard]));
        assert_same_run(&workspace, &run, "alone", 6);
    }
}

/// Two ranks save, one rank or four go on; and back again.
#[test]
fn a_checkpoint_is_read_by_any_world_size() {
    for draft in [medusa(), eagle3(), dspark()] {
        let mut workspace = workspace(draft);
        workspace.set("train.save_every", 3).set("optim.schedule", json!({"kind": "constant"}));
        workspace.train("alone", &[]);
        for ranks in [1, 2, 4] {
            let run = format!("two-then-{ranks}");
            let first = json_of(&mut launch_command(&workspace, 2, &run, &["--set", "train.max_steps=3"]));
            assert_eq!(first["steps"], 3);
            let second = match ranks {
                1 => workspace.train(&run, &["--resume"]),
                _ => json_of(&mut launch_command(&workspace, ranks, &run, &["--resume"])),
            };
            assert_eq!(second["steps"], 6);
            let folder = |run: &str| workspace.path(run).join("step-00000006");
            let (parameters, moments) = differences(&folder(&run), &folder("alone"));
            assert!(parameters <= 1e-5 && moments <= 1e-4, "{run}: {parameters:e} {moments:e}");
        }
        workspace.train("one-then-two", &["--set", "train.max_steps=3"]);
        json_of(&mut launch_command(&workspace, 2, "one-then-two", &["--resume"]));
        let folder = |run: &str| workspace.path(run).join("step-00000006");
        let (parameters, _) = differences(&folder("one-then-two"), &folder("alone"));
        assert!(parameters <= 1e-5, "{parameters:e}");
    }
}

/// Two ranks that keep states make the updates of one that does not; stopped and gone on with, they end in the same bytes,
/// whatever they may keep.
#[test]
fn ranks_that_keep_states_change_nothing() {
    let mut workspace = workspace(eagle3());
    // Three epochs of some seven batches.
    workspace.set("train.max_steps", 21).set("train.eval_every", 10);
    workspace.set("optim.schedule", json!({"kind": "constant", "warmup_steps": 2}));
    workspace.train("alone", &[]);
    let keeping = ["--set", "target.keep_hidden_states=true"];
    json_of(&mut launch_command(&workspace, 2, "kept", &keeping));
    assert_same_run(&workspace, "kept", "alone", 21);
    let half = [&keeping[..], &["--set", "train.max_steps=10"]].concat();
    json_of(&mut launch_command(&workspace, 2, "resumed", &half));
    let none = [&keeping[..], &["--resume", "--set", "target.keep_hidden_mib=0"]].concat();
    let output = crate::fixture::output_of(&mut launch_command(&workspace, 2, "resumed", &none));
    let message = crate::fixture::stderr_of(&output);
    assert!(output.status.success(), "{message}");
    let said = message.matches("0 % of the tokens are computed once").count();
    assert_eq!(said, 1, "{message}");
    for name in ["model.safetensors", "optimizer.safetensors"] {
        let read = |run: &str| fs::read(workspace.path(run).join("step-00000021").join(name)).unwrap();
        assert!(read("resumed") == read("kept"), "{name} differs");
    }
}
