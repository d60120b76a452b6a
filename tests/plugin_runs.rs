//! Whole runs of a draft that the program knows from `tests/plugins` alone, in real processes: everything that the program's
//! own drafts do.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::fixture::{Workspace, json_of, largest_difference, output_of, stderr_of, tensors_of};
use crate::parallel::{assert_same_run, figures, launch_command};

/// A run of six steps with three between checkpoints.
fn workspace() -> Workspace {
    let mut workspace = Workspace::with_plugins();
    workspace.configuration["draft"] = json!({"algorithm": "anchors"});
    workspace.set("train.max_steps", 6).set("train.save_every", 3).set("train.eval_every", 3);
    workspace.set("train.micro_batch_tokens", 256);
    workspace.set("optim.learning_rate", 1e-3).set("optim.epsilon", 1e-6);
    workspace.set("optim.schedule", json!({"kind": "constant"}));
    workspace
}

fn step_folder(workspace: &Workspace, run: &str, step: u64) -> PathBuf {
    workspace.path(run).join(format!("step-{step:08}"))
}

fn refusal(command: &mut Command) -> String {
    let output = output_of(command);
    assert_eq!(output.status.code(), Some(2), "{}", stderr_of(&output));
    stderr_of(&output)
}

#[track_caller]
fn assert_same_bytes(one: &Path, other: &Path) {
    for name in ["model.safetensors", "optimizer.safetensors"] {
        let read = |folder: &Path| fs::read(folder.join(name)).unwrap();
        assert!(read(one) == read(other), "{name} differs");
    }
}

/// Which anchors are picked, and their noise, is no matter of ranks, micro-batches or where the states come from.
#[test]
fn the_same_updates_at_any_world_size_online_and_from_a_store() {
    let workspace = workspace();
    workspace.train("alone", &[]);
    let store = workspace.path("store");
    let mut capture = workspace.program(&["capture", "--json", "--dtype", "float32", "--device", "cpu", "--config"]);
    json_of(capture.arg(workspace.config()).arg("--out").arg(&store));
    let from_store = format!("target.feature_store={}", store.display());
    for (ranks, micro_batch, stored) in
        [(1, 64, false), (2, 256, false), (3, 64, false), (1, 256, true), (2, 128, true)]
    {
        let run = format!("{ranks}x{micro_batch}-{stored}");
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

/// A run in two parts ends with the bytes of a run in one, and its checkpoint says which parameter has another rate.
#[test]
fn a_run_in_parts_is_the_run_in_one() {
    let workspace = workspace();
    workspace.train("whole", &[]);
    workspace.train("parts", &["--set", "train.max_steps=3"]);
    workspace.train("parts", &["--resume"]);
    assert_same_bytes(&step_folder(&workspace, "parts", 6), &step_folder(&workspace, "whole", 6));
    assert_eq!(figures(&workspace.path("parts")), figures(&workspace.path("whole")));
    let manifest = fs::read(step_folder(&workspace, "whole", 6).join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    assert_eq!(manifest["groups"], json!({"target.lm_head.weight": {"decay": true, "rate": 0.25}}));

    // Another rate of the draft's own is another configuration; one that the file alone has is found too.
    let rate = ["--resume", "--set", "train.max_steps=9", "--set", "draft.projection_rate=0.5"];
    assert!(refusal(&mut workspace.train_command("parts", &rate)).contains("`draft.projection_rate`"));
    let path = step_folder(&workspace, "parts", 6).join("manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"rate\": 0.25", "\"rate\": 0.75")).unwrap();
    let message = refusal(&mut workspace.train_command("parts", &["--resume", "--set", "train.max_steps=9"]));
    let words = ["`target.lm_head.weight`", "0.75 times the learning rate", "got 0.25 times"];
    assert!(words.iter().all(|word| message.contains(word)), "{message}");
}

/// The copied tensor moves, and by a quarter of what it would.
#[test]
fn groups_have_rates_of_their_own() {
    let mut workspace = workspace();
    workspace.set("train.max_steps", 1).set("train.save_every", 1);
    let start = tensors_of(&workspace.path("model"));
    let (_, start) = start.into_iter().find(|(name, _)| name == "lm_head.weight").unwrap();
    let moved = |run: &str, arguments: &[&str]| {
        workspace.train(run, arguments);
        let tensors = tensors_of(&step_folder(&workspace, run, 1).join("model.safetensors"));
        let (_, end) = tensors.into_iter().find(|(name, _)| name == "target.lm_head.weight").unwrap();
        largest_difference(&end, &start)
    };
    let quarter = moved("quarter", &[]);
    assert!(quarter > 1e-5, "{quarter:e}");
    let groups = r#"optim.groups=[{"parameters": "target.*", "rate": 2}, {"parameters": "*", "rate": 0.5}]"#;
    let half = moved("half", &["--set", groups]);
    assert!((half / quarter - 2.0).abs() < 1e-2, "{half:e} {quarter:e}");
    let idle = r#"optim.groups=[{"parameters": "heads.*", "rate": 2}]"#;
    let message = refusal(&mut workspace.train_command("idle", &["--set", idle]));
    assert!(message.contains("optim.groups[0].parameters") && message.contains("target.lm_head.weight"), "{message}");
}

/// A draft whose updates follow the length of the run keeps it.
#[test]
fn a_draft_that_follows_the_length_of_the_run_is_not_given_another_one() {
    let mut workspace = workspace();
    workspace.set("draft.fading", true).set("optim.schedule", json!({"kind": "constant", "total_steps": 6}));
    workspace.train("whole", &[]);
    workspace.train("parts", &["--set", "train.max_steps=3"]);
    let longer = ["--resume", "--set", "optim.schedule.total_steps=12"];
    let message = refusal(&mut workspace.train_command("parts", &longer));
    assert!(message.contains("one of 6 steps, got 12") && message.contains("total_steps=6"), "{message}");
    workspace.train("parts", &["--resume"]);
    assert_same_bytes(&step_folder(&workspace, "parts", 6), &step_folder(&workspace, "whole", 6));
}

/// From a checkpoint, from an export and while it is trained, decoding with it gives what plain decoding gives.
#[test]
fn decoding_with_it_is_plain_decoding() {
    let mut workspace = workspace();
    workspace.configuration["eval"] = json!({"every": 3, "prompts": 3, "max_new_tokens": 12});
    workspace.set("optim.learning_rate", 1e-2);
    let report = workspace.train("run", &[]);
    assert!(report["end"]["acceptance_length"].as_f64().unwrap() >= 1.0, "{report}");
    assert!(report["end"]["depth3/accepted"].is_number(), "{report}");
    let export = workspace.path("export");
    let arguments = ["export", "--json", "--format", "anchors", "--checkpoint"];
    let written = json_of(workspace.program(&arguments).arg(workspace.path("run")).arg("--out").arg(&export));
    assert_eq!(written["tensors"], 7);
    let names: Vec<String> =
        tensors_of(&export.join("anchors.safetensors")).into_iter().map(|(name, _)| name).collect();
    assert!(names.contains(&"lm_head.weight".to_owned()), "the target's name: {names:?}");
    json_of(workspace.program(&["export", "--json", "--check"]).arg(&export));

    let generate = |temperature: &str, draft: Option<&Path>| {
        let prompt = ["--prompt", "the river runs", "--max-new-tokens", "24", "--temperature", temperature];
        let mut command = workspace.program(&["generate", "--json", "--device", "cpu", "--target"]);
        command.arg(workspace.path("model")).args(prompt);
        if let Some(draft) = draft {
            command.arg("--draft").arg(draft);
        }
        json_of(&mut command)
    };
    for temperature in ["0", "1"] {
        let plain = generate(temperature, None);
        for draft in [workspace.path("run"), export.clone()] {
            let drafted = generate(temperature, Some(&draft));
            assert_eq!(drafted["text"], plain["text"], "{}, {temperature}", draft.display());
            assert_eq!(drafted["tokens"], plain["tokens"]);
        }
    }

    // The exported draft is one to start from, and a file that does not fit is refused by name.
    let from = format!("draft.init_from={}", export.display());
    let again = workspace.train("again", &["--set", &from, "--set", "train.max_steps=1"]);
    assert_eq!(again["start"], report["end"]);
    let wider = ["--set", &from, "--set", "draft.block=4"];
    let message = refusal(&mut workspace.train_command("wider", &wider));
    assert!(message.contains("`draft.init_from`") && message.contains("`blocks.3.weight`"), "{message}");
}
