//! Whole runs of the program with the family of `plugins/windowed.rs`: what they make is what any family's make.

use serde_json::{Value, json};

use crate::fixture::{TOKENIZER_SIZE, Workspace, json_of, largest_difference, output_of, stderr_of, tensors_of};
use crate::plugins::windowed;

/// The program on a folder of this family.
fn workspace(draft: Value) -> Workspace {
    let mut workspace = Workspace::with_plugins();
    windowed::write(&workspace.path("model"), TOKENIZER_SIZE);
    workspace.configuration["draft"] = draft;
    workspace.set("train.save_every", 2).set("optim.schedule", json!({"kind": "cosine", "total_steps": 4}));
    workspace.set("optim.learning_rate", 1e-3).set("optim.epsilon", 1e-6);
    workspace
}

/// Largest difference of the trained values of two runs.
fn apart(workspace: &Workspace, left: &str, right: &str) -> f64 {
    let trained = |run: &str| tensors_of(&workspace.path(run).join("step-00000004/model.safetensors"));
    let pairs = trained(left).into_iter().zip(trained(right));
    pairs.map(|((_, left), (_, right))| largest_difference(&left, &right)).fold(0.0, f64::max)
}

/// Training online, from a store, in two parts and in two processes makes the same draft; decoding with it is lossless.
#[test]
fn whole_runs_are_those_of_any_family() {
    for draft in [
        json!({"algorithm": "medusa", "num_heads": 2}),
        json!({"algorithm": "medusa", "num_heads": 2, "projection": "shared"}),
        json!({"algorithm": "eagle3", "capture": [0, 1, 2], "ttt_steps": 3, "draft_vocab_size": 300}),
    ] {
        let workspace = workspace(draft.clone());
        let report = workspace.train("online", &[]);
        assert_eq!(report["steps"], 4, "{draft}");

        let store = workspace.path("store");
        let mut capture =
            workspace.program(&["capture", "--json", "--device", "cpu", "--dtype", "float32", "--config"]);
        json_of(capture.arg(workspace.config()).arg("--out").arg(&store));
        let from_store = format!("target.feature_store={}", store.display());
        workspace.train("offline", &["--set", &from_store]);
        assert_eq!(apart(&workspace, "online", "offline"), 0.0, "{draft}");

        workspace.train("parts", &["--set", "train.max_steps=2"]);
        workspace.train("parts", &["--resume"]);
        assert_eq!(apart(&workspace, "online", "parts"), 0.0, "{draft}");

        let mut launch = workspace.program(&["launch", "--nproc-per-node", "2", "train", "--json", "--device", "cpu"]);
        launch.arg("--config").arg(workspace.config());
        json_of(launch.arg("--set").arg(format!("train.output_dir={}", workspace.path("ranks").display())));
        let difference = apart(&workspace, "online", "ranks");
        assert!(difference < 1e-5, "{draft}: {difference:e}");

        let generate = |drafted: bool| {
            let mut command = workspace.program(&["generate", "--json", "--device", "cpu", "--max-new-tokens", "40"]);
            command.args(["--prompt", "a cold bird sings over the river", "--target"]).arg(workspace.path("model"));
            if drafted {
                command.arg("--draft").arg(workspace.path("online"));
            }
            json_of(&mut command)["token_ids"].clone()
        };
        assert_eq!(generate(true), generate(false), "{draft}");
    }
}

/// What a layout cannot say of the target's head is refused by name; what is the draft's own is written.
#[test]
fn exports_say_everything_or_nothing() {
    let workspace = workspace(json!({"algorithm": "medusa", "num_heads": 2, "projection": "shared"}));
    workspace.train("run", &[]);
    for format in ["medusa", "medusa-vllm"] {
        let mut command = workspace.program(&["export", "--json", "--format", format, "--checkpoint"]);
        let output = output_of(command.arg(workspace.path("run")).arg("--out").arg(workspace.path(format)));
        let message = stderr_of(&output);
        assert!(!output.status.success() && message.contains("a bias and "), "{message}");
        assert!(message.contains("draft.projection=own"), "{message}");
        assert!(!workspace.path(format).join("config.json").exists());
    }
}
