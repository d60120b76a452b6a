//! Whole P-EAGLE runs through the program: what is learned, what is exported, and what decodes.

use std::fs;

use serde_json::{Value, json};

use crate::fixture::{Workspace, conversations, json_of, specforge};

fn workspace() -> Workspace {
    let mut workspace = Workspace::new();
    workspace.configuration["draft"] = json!({
        "algorithm": "peagle", "capture": [0, 1], "draft_vocab_size": 200, "num_layers": 1, "num_depths": 4,
        "mask_token_id": 5,
    });
    workspace
}

/// A draft that has seen one conversation often enough names every token of it, at every depth.
#[test]
fn one_conversation_is_learned_by_heart() {
    let mut workspace = workspace();
    fs::write(workspace.path("one.jsonl"), conversations(1)).unwrap();
    let one = json!([workspace.path("one.jsonl")]);
    workspace.set("data.train", one.clone()).set("data.eval", one);
    workspace.set("draft.draft_vocab_size", Value::Null).set("draft.lm_head", "random");
    workspace.set("train.max_steps", 1000).set("train.log_every", 50).set("optim.learning_rate", 5e-3);
    let report = workspace.train("run", &[]);
    for depth in 0..4 {
        let accuracy = |when: &str| report[when][format!("depth{depth}/accuracy")].as_f64().unwrap();
        assert!(accuracy("start") < 0.5, "depth {depth} knew it already");
        assert_eq!(accuracy("end"), 1.0, "depth {depth} of {report}");
    }
    assert_eq!(report["end"]["simulated_acceptance_length"], 5.0);
}

/// Exported files start the next run where the last one ended, and decode as the checkpoint does.
#[test]
fn an_exported_draft_is_the_checkpoints() {
    let mut workspace = workspace();
    workspace.set("train.max_steps", 12);
    let first = workspace.train("first", &[]);
    let (run, folder) = (workspace.path("first"), workspace.path("exported"));
    let mut export = specforge(&["export", "--json", "--format", "peagle", "--checkpoint"]);
    let report = json_of(export.arg(&run).arg("--out").arg(&folder));
    assert_eq!((&report["format"], &report["warnings"]), (&json!("peagle"), &json!([])), "{report}");
    let from = format!("draft.init_from={}", folder.display());
    let map = format!("draft.vocab_map={}", run.join("vocab.safetensors").display());
    let second = workspace.train("second", &["--set", &from, "--set", &map, "--set", "train.max_steps=1"]);
    assert_eq!(second["start"], first["end"]);
    assert_ne!(second["start"], first["start"]);

    let generate = |draft: Option<&std::path::Path>, tree: &[&str]| {
        let mut command = specforge(&["generate", "--json", "--max-new-tokens", "30", "--prompt", "seven stones"]);
        command.arg("--target").arg(workspace.path("model")).args(tree);
        json_of(if let Some(draft) = draft { command.arg("--draft").arg(draft) } else { &mut command })
    };
    let plain = generate(None, &[]);
    assert_eq!(plain["token_ids"].as_array().unwrap().len(), 30);
    for (tree, deepest) in
        [(&[][..], 4), (&["--tree", "chain:6"], 6), (&["--tree", "dynamic:depth=3,top_k=2,nodes=6"], 3)]
    {
        let [one, other] = [&run, &folder].map(|draft| generate(Some(draft), tree));
        assert_eq!(one["token_ids"], plain["token_ids"], "{tree:?}");
        assert_eq!(other["token_ids"], plain["token_ids"], "{tree:?}");
        assert_eq!(one["summary"]["rounds"], other["summary"]["rounds"], "{tree:?}");
        let said = one["summary"]["settings"]["tree"].as_str().unwrap();
        assert!(said.contains(&deepest.to_string()), "{said}");
    }
}
