//! Every family of the table through the whole program, on a tiny random model: a draft of each method is trained, exported in
//! every layout, checked for every engine, and decoded with. What is new in the table is covered by being there.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use specforge::export::{self, Engine};
use specforge::models::TargetConfig;
use specforge::weights::write_tensors;

use crate::decoding;
use crate::families;
use crate::fixture::{TOKENIZER_SIZE, Workspace, json_of, output_of, specforge, stderr_of};

/// A folder with a model of a family, few conversations and questions.
fn workspace(family: &str) -> Workspace {
    let mut workspace = Workspace::new();
    let mut config = families::config(family);
    config["architectures"] = json!([families::architecture(family)]);
    config["vocab_size"] = TOKENIZER_SIZE.into();
    config["max_position_embeddings"] = 256.into();
    if config.get("original_max_position_embeddings").is_some() {
        config["original_max_position_embeddings"] = 128.into();
    }
    let model = workspace.path("model");
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    let shapes = TargetConfig::from_value(&config).unwrap().tensors().unwrap();
    let tensor = |(name, shape): (String, Vec<i64>)| (name.clone(), families::random(&name, &shape));
    let tensors: Vec<_> = shapes.into_iter().map(tensor).collect();
    write_tensors(&model.join("model.safetensors"), &tensors, &[]).unwrap();
    decoding::questions(&workspace.path("questions.jsonl"));
    workspace
        .set("train.max_steps", 2)
        .set("train.batch_tokens", 128)
        .set("optim.schedule", json!({"kind": "constant"}));
    workspace
}

/// Exports a run; what the program says where it refuses to.
fn exported(workspace: &Workspace, format: &str, out: &Path) -> Result<(), String> {
    let mut command = specforge(&["export", "--format", format, "--checkpoint"]);
    let output = output_of(command.arg(workspace.path("run")).arg("--out").arg(out));
    if output.status.success() { Ok(()) } else { Err(stderr_of(&output)) }
}

/// Batches decoded with a draft are plain decoding's, token for token.
fn lossless(workspace: &Workspace, family: &str, draft: &Path, tree: &str) {
    let mut command = specforge(&["eval", "--json", "--device", "cpu", "--max-new-tokens", "10", "--batch", "3"]);
    command.args(["--tree", tree, "--target"]).arg(workspace.path("model")).arg("--draft").arg(draft);
    let report = json_of(command.arg("--data").arg(workspace.path("questions.jsonl")));
    let Value::Object(lossless) = &report["lossless"] else { panic!("{report}") };
    assert_eq!((&lossless["promise"], &lossless["faults"]), (&json!("exact"), &json!(0)), "{family}, {tree}: {report}");
    assert!(lossless["compared"].as_u64() > Some(0), "{family}, {tree}: {report}");
}

/// An engine serves an export, or says that it is the target's class that it does not serve.
fn engines(family: &str, path: &Path) -> Vec<Engine> {
    let serves = |engine: &Engine| match export::check_for(path, Some(*engine)) {
        Ok(_) => true,
        Err(error) => {
            let (problem, class) = (error.to_string(), families::architecture(family));
            let of_layout = problem.contains("speculators format") || problem.contains("cannot be told what it is");
            assert!(of_layout || problem.contains(class), "{family}, {}: {problem}", path.display());
            false
        }
    };
    Engine::ALL.into_iter().filter(serves).collect()
}

#[test]
fn eagle3_of_every_family_is_trained_exported_checked_and_lossless() {
    let mut in_one_file = 0;
    for family in families::names() {
        println!("{family}");
        let mut workspace = workspace(family);
        workspace.configuration["draft"] =
            json!({"algorithm": "eagle3", "draft_vocab_size": 200, "ttt_steps": 2, "capture": [0, 1, 2]});
        workspace.train("run", &[]);
        let out = |name: &str| workspace.path(name);
        exported(&workspace, "eagle3", &out("raw")).unwrap();
        exported(&workspace, "speculators", &out("speculators")).unwrap();
        let read = |name: &str| -> Value {
            serde_json::from_slice(&fs::read(workspace.path(name).join("config.json")).unwrap()).unwrap()
        };
        // Engines know drafts of all targets by one name; the target's own class stands where its format has a place for it.
        assert_eq!(read("raw")["architectures"], json!(["LlamaForCausalLMEagle3"]));
        let verifier = &read("speculators")["speculators_config"]["verifier"];
        assert_eq!(verifier["architectures"], json!([families::architecture(family)]));
        lossless(&workspace, family, &out("raw"), "dynamic:depth=3,top_k=3,nodes=7");
        lossless(&workspace, family, &out("speculators"), "chain:3");
        let served = engines(family, &out("raw"));
        match family {
            "llama" | "mistral" | "qwen3" => assert_eq!(served, Engine::ALL, "{family}"),
            "gemma" | "gemma2" => assert!(served.is_empty(), "{family}: {served:?}"),
            "gemma3_text" => assert_eq!(served, [Engine::Sglang]),
            "granite" | "olmo2" => assert_eq!(served, [Engine::Vllm], "{family}"),
            _ => {}
        }
        engines(family, &out("speculators"));
        match exported(&workspace, "gguf", &out("draft.gguf")) {
            Ok(()) => {
                lossless(&workspace, family, &out("draft.gguf"), "chain:2");
                in_one_file += 1;
            }
            Err(problem) => assert!(problem.contains("cannot say what this draft is"), "{family}: {problem}"),
        }
    }
    assert!(in_one_file > 10, "{in_one_file}");
}

#[test]
fn medusa_of_every_family_is_trained_exported_checked_and_lossless() {
    for family in families::names() {
        println!("{family}");
        let mut workspace = workspace(family);
        workspace.configuration["draft"] = json!({"algorithm": "medusa", "num_heads": 2});
        workspace.train("run", &[]);
        for (format, tree) in [("medusa", "mc_sim_7b_63"), ("medusa-vllm", "chain:2")] {
            let out = workspace.path(format);
            match exported(&workspace, format, &out) {
                Ok(()) => {
                    export::check(&out).unwrap();
                    lossless(&workspace, family, &out, tree);
                }
                // Their files have no place for what the head does beside its product.
                Err(problem) => {
                    assert!(problem.contains("soft cap") || problem.contains("scale"), "{family}: {problem}")
                }
            }
        }
        lossless(&workspace, family, &workspace.path("run"), "chain:2");
    }
}
