//! Whole runs of block drafters through the program, head by head: what is learned, decoded, exported, read back, resumed,
//! traced and calibrated.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::decoding::questions;
use crate::fixture::{Workspace, conversations, json_of, specforge};
use crate::parallel::figures;

/// A section of every head, by name, for a target of four layers.
fn sections() -> Vec<(&'static str, Value)> {
    let section = |algorithm: &str, more: Value| {
        let mut section = json!({"algorithm": algorithm, "num_layers": 2, "block_size": 5, "num_anchors": 16,
            "target_layer_ids": [0, 2], "mask_token_id": 1});
        section.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        section
    };
    let sliding = json!({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16});
    let selector =
        json!({"head": {"selector_rank": 6, "selector_top_k": 4}, "conv": {"kernel_size": 2, "group_size": 8}});
    let lilicorr = json!({"head": {"lilicorr_candidate_topk": 4, "lilicorr_hidden_size": 24, "lilicorr_num_heads": 3,
        "lilicorr_factor_dim": 10}});
    vec![
        ("dflash", section("dflash", sliding)),
        ("dflash2", section("dflash2", selector)),
        ("dspark", dspark()),
        ("lilicorr", section("lilicorr", lilicorr)),
        ("domino", section("domino", json!({"head": {"gru_hidden_dim": 14, "emb_dim": 10}}))),
        ("xpress", section("xpress", json!({"head": {"xpress_rank": 6, "xpress_topc": 64}}))),
    ]
}

fn dspark() -> Value {
    json!({"algorithm": "dspark", "num_layers": 2, "block_size": 4, "num_anchors": 16, "target_layer_ids": [0, 2],
        "mask_token_id": 1, "head": {"markov_rank": 6}})
}

/// A run of six steps on a Qwen3, whose drafts engines take.
fn workspace(section: &Value) -> Workspace {
    let model =
        json!({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 4, "head_dim": 8});
    let mut workspace = Workspace::with_model(&model);
    workspace.configuration["draft"] = section.clone();
    workspace.set("train.max_steps", 6).set("train.save_every", 3).set("train.eval_every", 3);
    workspace
}

fn generate(workspace: &Workspace, draft: Option<&Path>, arguments: &[&str]) -> Value {
    let mut command = specforge(&["generate", "--json", "--device", "cpu", "--max-new-tokens", "24", "--prompt"]);
    command.arg("the river runs").args(arguments).arg("--target").arg(workspace.path("model"));
    if let Some(draft) = draft {
        command.arg("--draft").arg(draft);
    }
    json_of(&mut command)
}

fn eval(workspace: &Workspace, draft: &Path, arguments: &[&str]) -> Value {
    let data = workspace.path("questions.jsonl");
    questions(&data);
    let mut command = specforge(&["eval", "--json", "--device", "cpu", "--max-new-tokens", "16", "--data"]);
    command.arg(&data).args(arguments).arg("--draft").arg(draft).arg("--target").arg(workspace.path("model"));
    let report = json_of(&mut command);
    assert_eq!(report["lossless"]["faults"], 0, "{report}");
    report
}

fn export(workspace: &Workspace, run: &str, format: &str) -> PathBuf {
    let out = workspace.path(&format!("{run}-{format}"));
    let mut command = specforge(&["export", "--json", "--dtype", "float32", "--format", format, "--checkpoint"]);
    let written = json_of(command.arg(workspace.path(run)).arg("--out").arg(&out));
    let checked = json_of(specforge(&["export", "--json", "--check"]).arg(&out));
    assert_eq!((&written["format"], &written["tensors"]), (&checked["format"], &checked["tensors"]));
    out
}

/// Trained, measured on the way, decoded from the checkpoint and from its export: the text of plain decoding, and as many
/// guesses right from either; the export is a draft to start from.
#[test]
fn every_head_goes_the_whole_way() {
    for (name, section) in sections() {
        let mut workspace = workspace(&section);
        workspace.configuration["eval"] = json!({"every": 3, "prompts": 3, "max_new_tokens": 12});
        let report = workspace.train("run", &[]);
        for figure in ["acceptance_length", "simulated_acceptance_length"] {
            let of = |when: &str| report[when][figure].as_f64().unwrap();
            assert!(of("start") >= 1.0 && of("end") >= 1.0 && of("end") <= 5.0, "{name}: {report}");
        }
        assert!(report["end"]["slot1/accuracy"].is_number() && report["end"]["loss"].is_number(), "{name}: {report}");
        let mut drafts = vec![workspace.path("run"), export(&workspace, "run", "block")];
        if matches!(name, "dflash2" | "dspark") {
            drafts.push(export(&workspace, "run", "block-speculators"));
        }
        let own: &[&str] = &[];
        let tree: &[&str] = &["--tree", "dynamic:depth=3,top_k=2,nodes=5"];
        for (temperature, tree) in [("0", own), ("0.8", tree)] {
            let sampling = ["--temperature", temperature, "--seed", "5"];
            let plain = generate(&workspace, None, &sampling);
            for draft in &drafts {
                let drafted = generate(&workspace, Some(draft), &[&sampling, tree].concat());
                for key in ["token_ids", "text", "finish"] {
                    assert_eq!(drafted[key], plain[key], "{name}, {}, {temperature}", draft.display());
                }
                assert_eq!(drafted["summary"]["lossless"], true);
            }
        }
        let reports: Vec<Value> = drafts.iter().map(|draft| eval(&workspace, draft, &["--batch", "3"])).collect();
        for other in &reports[1..] {
            assert_eq!(other["accepted_lengths"], reports[0]["accepted_lengths"], "{name}");
        }
        // Where the run ended, another begins; where its figures are of the same documents, they are the same.
        let from = format!("draft.init_from={}", drafts[1].display());
        let again = workspace.train("again", &["--set", &from, "--set", "train.max_steps=1"]);
        for (key, want) in report["end"].as_object().unwrap() {
            let (got, want) = (again["start"][key].as_f64().unwrap(), want.as_f64().unwrap());
            // Domino's loss follows how much of the run is over.
            assert!(
                name == "domino" || (got - want).abs() <= 1e-6 * want.abs().max(1.0),
                "{name}: {key}: {got}, {want}"
            );
        }
    }
}

/// A run in two parts ends with the bytes and figures of a run in one.
#[test]
fn a_run_in_parts_is_the_run_in_one() {
    for (name, section) in sections() {
        let mut workspace = workspace(&section);
        workspace.set("optim.schedule", json!({"kind": "constant", "total_steps": 6}));
        workspace.train("whole", &[]);
        workspace.train("parts", &["--set", "train.max_steps=3"]);
        workspace.train("parts", &["--resume"]);
        let end = |run: &str| workspace.path(run).join("step-00000006");
        for file in ["model.safetensors", "optimizer.safetensors"] {
            let read = |run: &str| fs::read(end(run).join(file)).unwrap();
            assert!(read("parts") == read("whole"), "{name}: {file} differs");
        }
        assert_eq!(figures(&workspace.path("parts")), figures(&workspace.path("whole")), "{name}");
    }
}

/// A draft that has seen one conversation often enough names the tokens of its blocks.
#[test]
fn one_conversation_is_learned_by_heart() {
    for (name, section) in sections() {
        let mut workspace = workspace(&section);
        fs::write(workspace.path("one.jsonl"), conversations(1)).unwrap();
        let one = json!([workspace.path("one.jsonl")]);
        workspace.set("data.train", one.clone()).set("data.eval", one);
        workspace.set("train.max_steps", 400).set("train.log_every", 100).set("train.eval_every", 0);
        workspace.set("train.save_every", 0).set("optim.learning_rate", 5e-3);
        // The text, not what the target would say instead.
        workspace.set("draft.loss", "ce");
        let report = workspace.train("run", &[]);
        for slot in 1..=4 {
            let accuracy = |when: &str| report[when][format!("slot{slot}/accuracy")].as_f64().unwrap();
            assert!(accuracy("start") < 0.5, "{name}: slot {slot} knew it already");
            assert!(accuracy("end") >= 0.9, "{name}: slot {slot} of {report}");
        }
    }
}

/// A run chooses the tokens of its draft; checkpoint and export know them.
#[test]
fn a_smaller_vocabulary_goes_the_whole_way() {
    let mut section = dspark();
    section["draft_vocab_size"] = json!(200);
    let mut workspace = workspace(&section);
    workspace.configuration["eval"] = json!({"every": 3, "prompts": 3, "max_new_tokens": 12});
    workspace.train("run", &[]);
    let plain = generate(&workspace, None, &[]);
    for draft in [workspace.path("run"), export(&workspace, "run", "block-speculators")] {
        assert_eq!(generate(&workspace, Some(&draft), &[])["token_ids"], plain["token_ids"], "{}", draft.display());
    }
}

#[test]
fn traces_of_two_trees_are_equal() {
    let workspace = workspace(&sections()[1].1);
    workspace.train("run", &[]);
    let run = workspace.path("run");
    let [a, b] = [("a.trace", "chain"), ("b.trace", "dynamic:depth=3,top_k=3,nodes=8")].map(|(name, tree)| {
        let trace = workspace.path(name);
        let arguments = ["--tree", tree, "--temperature", "0.7", "--trace", trace.to_str().unwrap()];
        generate(&workspace, Some(&run), &arguments);
        trace
    });
    let mut compare = specforge(&["compare", "--json"]);
    let report = json_of(compare.args([&a, &b]).arg("--target").arg(workspace.path("model")));
    assert_eq!(report["verdict"], "equal", "{report}");
}

/// Calibrated by its confidences, a draft has its blocks cut as is worth it, and the text stays.
#[test]
fn confidences_are_calibrated_and_cut_blocks() {
    let workspace = workspace(&dspark());
    let report = workspace.train("run", &[]);
    assert!(report["end"]["confidence_error"].as_f64().unwrap() < 1.0, "{report}");
    let (run, budget) = (workspace.path("run"), workspace.path("budget"));
    let budget = budget.to_str().unwrap();
    let whole = eval(&workspace, &run, &["--calibrate", budget]);
    assert!(whole["calibration"].is_object(), "{whole}");
    let read = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(workspace.path("budget").join(name)).unwrap()).unwrap()
    };
    assert_eq!(read("sts.json")["temperatures"].as_array().unwrap().len(), 4);
    assert!(read("sps.json").is_object());
    let cut = eval(&workspace, &run, &["--verify-budget", budget]);
    assert_eq!(cut["tokens"], whole["tokens"]);
    let plain = generate(&workspace, None, &[]);
    assert_eq!(generate(&workspace, Some(&run), &["--verify-budget", budget])["token_ids"], plain["token_ids"]);
}
