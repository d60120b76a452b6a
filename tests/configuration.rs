//! docs/configuration.md and the program name the same keys with the same defaults.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use specforge::config::RunConfig;
use specforge::plan::Plan;

use crate::fixture::{Workspace, json_of, output_of, specforge, stderr_of};

/// Keys that a default configuration leaves out because nothing is set.
const UNSET: [&str; 7] = [
    "target.config",
    "target.devices",
    "target.feature_store",
    "optim.schedule.warmup_steps",
    "optim.schedule.warmup_ratio",
    "optim.schedule.total_steps",
    "optim.groups",
];

fn flatten(prefix: &str, value: &Value, into: &mut BTreeMap<String, String>) {
    match value.as_object().filter(|object| !object.is_empty()) {
        Some(object) => object.iter().for_each(|(key, value)| flatten(&format!("{prefix}{key}."), value, into)),
        None => drop(into.insert(prefix.trim_end_matches('.').to_owned(), value.to_string())),
    }
}

#[test]
fn the_documentation_lists_every_key_with_its_default() {
    for algorithm in specforge::draft::ALGORITHMS {
        documents(algorithm.name);
    }
}

/// The tables of all sections, and that of one algorithm under a heading of its own.
fn documents(algorithm: &str) {
    let minimal = json!({"target": {"path": "x"}, "draft": {"algorithm": algorithm}, "data": {"train": ["x"]}});
    let mut program = BTreeMap::new();
    flatten("", &json!(RunConfig::from_value(&minimal).unwrap()), &mut program);
    for required in ["target.path", "draft.algorithm", "data.train"] {
        program.insert(required.to_owned(), "required".to_owned());
    }
    program.extend(UNSET.map(|key| (key.to_owned(), "none".to_owned())));

    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    let text = std::fs::read_to_string(path).unwrap();
    let headings = |line: &&str| line.starts_with("## ") || line.starts_with("### ");
    let mut heading = "";
    let rows = text.lines().filter(|line| {
        if headings(line) {
            heading = line;
        }
        // A heading may stand for several.
        let belongs = |names: &str| names.split(", ").any(|name| name == algorithm);
        line.starts_with("| `") && heading.strip_prefix("### ").is_none_or(belongs)
    });
    let documented: BTreeMap<String, String> = rows
        .map(|row| {
            let cells: Vec<&str> = row.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
            (cells[1].to_owned(), cells[2].to_owned())
        })
        .collect();
    assert_eq!(documented, program, "{algorithm}");
}

#[test]
fn every_recipe_is_valid_and_can_be_planned() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    let mut recipes = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        RunConfig::load(&path, &[]).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        recipes += 1;
    }
    assert!(recipes >= 3);
}

/// What a plan says of a block drafter, without the model.
#[test]
fn a_plan_of_blocks_counts_them() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    let plan = |recipe: &str, set: &[&str]| {
        let set: Vec<String> = set.iter().map(|text| (*text).to_owned()).collect();
        Plan::new(&RunConfig::load(&configs.join(recipe), &set).unwrap(), 1).unwrap()
    };
    for (model, vocabulary, mask) in [("qwen3-8B", 151_936, 151_669), ("llama3.1-8B", 128_256, 128_002)] {
        for head in ["dflash", "dflash2", "dspark", "lilicorr", "domino", "xpress"] {
            let plan = plan(&format!("{model}-{head}.json"), &[]);
            let (block, text) = (if head == "dspark" { 7 } else { 16 }, plan.to_string());
            assert_eq!(plan.footprint.rows, Some(1024 * block), "{head}");
            assert!(plan.trainable_parameters > 1_048_000_000 && plan.draft_vocabulary == vocabulary, "{head}");
            let mask = format!("mask token {mask}");
            for part in ["at most 512 a document", "1024 blocks of 2 documents of 3072 tokens", &mask] {
                assert!(text.contains(part), "{model}, {head}: {text}");
            }
        }
        let depths = plan(&format!("{model}-peagle.json"), &[]);
        assert!(depths.trainable_parameters > 1_048_000_000 && depths.draft_vocabulary == 32_000, "{model}");
    }
    let whole = plan("llama3.1-8B-dflash.json", &[]);
    let half = plan("llama3.1-8B-dflash.json", &["draft.num_anchors=256"]);
    assert_eq!(half.footprint.rows, whole.footprint.rows.map(|rows| rows / 2));
    assert!(
        half.memory.activations < whole.memory.activations && half.operations_per_token < whole.operations_per_token
    );
}

/// The largest sizes that pass the checks are planned without an overflow anywhere.
#[test]
fn the_largest_model_that_is_accepted_can_be_planned() {
    let value = json!({
        "target": {"path": "/nowhere", "keep_hidden_states": true, "config": {
            "model_type": "llama", "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_hidden_layers": 10_000,
            "num_attention_heads": 8192, "head_dim": 512, "vocab_size": 1 << 22,
            "max_position_embeddings": 1u64 << 40,
        }},
        "draft": {"algorithm": "medusa", "num_heads": 32, "num_layers": 32},
        "data": {"train": [concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")]},
        "train": {"batch_tokens": i32::MAX, "micro_batch_tokens": i32::MAX, "chunk_mib": i32::MAX, "epochs": u64::MAX},
        "checkpoint": {"keep_last": u64::MAX},
    });
    let plan = Plan::new(&RunConfig::from_value(&value).unwrap(), 2).unwrap();
    assert!(plan.memory.total > 1 << 60 && plan.steps == Some(u64::MAX), "{plan:?}");
}

/// What a plan says of a target over several devices, none of which needs to be there, and what it refuses.
#[test]
fn a_plan_says_which_device_gets_which_layers() {
    let mut workspace = Workspace::with_model(&json!({"num_hidden_layers": 5}));
    let plan = |workspace: &Workspace, arguments: &[&str]| {
        let mut command = specforge(&["train", "--plan", "--config"]);
        command.arg(workspace.config()).args(arguments);
        command
    };
    let plain = json_of(&mut plan(&workspace, &["--json"]));
    assert!(plain.get("devices").is_none());
    workspace.set("target.devices", json!(["cuda:0", "cuda:6"]));
    let spread = json_of(&mut plan(&workspace, &["--json"]));
    let devices = spread["devices"].as_array().unwrap();
    // The tables are where the draft is, which then gets fewer layers.
    assert_eq!((&devices[0]["device"], &devices[0]["layers"]), (&json!("cuda:0"), &json!([0, 4])), "{spread}");
    assert_eq!((&devices[1]["device"], &devices[1]["is_home"]), (&json!("cuda:6"), &json!(true)));
    let bytes: u64 = devices.iter().map(|device| device["bytes"].as_u64().unwrap()).sum();
    let memory = |name: &str| spread["memory"][name].as_u64().unwrap();
    assert_eq!(bytes, memory("total") - memory("checkpoint") - memory("hidden_states"));
    let list = ["--target-devices", "cuda:0=2,cuda:1=3"];
    let text = String::from_utf8(output_of(&mut plan(&workspace, &list)).stdout).unwrap();
    assert!(text.contains("layers 0 to 1 of the target\n") && text.contains("layers 2 to 4 of the target;"), "{text}");

    let refused = |names: &[&str], ranks: Option<&str>, word: &str| {
        let mut command = plan(&workspace, &["--target-devices", &names.join(",")]);
        if let Some(ranks) = ranks {
            for (name, value) in
                [("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", ranks), ("LOCAL_WORLD_SIZE", ranks)]
            {
                command.env(name, value);
            }
            command.envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")]);
        }
        let output = output_of(&mut command);
        assert!(!output.status.success() && stderr_of(&output).contains(word), "{names:?}: {}", stderr_of(&output));
    };
    refused(&["cuda:0", "cuda:0"], None, "twice");
    refused(&["cuda:0=1", "cuda:1=1"], None, "the devices get 2");
    refused(&["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:4", "cuda:5"], None, "fewer than the 6 devices");
    refused(&["cpu", "cuda:1"], None, "`cpu`");
    refused(&["cuda:0", "cuda:1", "cuda:2"], Some("2"), "multiple of 2");
}
