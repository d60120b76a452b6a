//! `specforge generate` and `specforge eval` on drafts that this program trained and exported, and real acceptance while
//! training.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::fixture::{Workspace, json_of, output_of, specforge, stderr_of, write_model};

/// A model, and drafts of every kind for it, by the name of their folders.
pub fn workspace() -> Workspace {
    let mut workspace = Workspace::new();
    workspace.set("train.max_steps", 30);
    workspace.train("medusa", &[]);
    export(&workspace, "medusa", "medusa", "medusa-files");
    export(&workspace, "medusa", "medusa-vllm", "medusa-vllm-files");
    workspace.configuration["draft"] = json!({
        "algorithm": "eagle3", "draft_vocab_size": 200, "ttt_steps": 3, "capture": [0, 1],
    });
    workspace.train("eagle3", &[]);
    export(&workspace, "eagle3", "eagle3", "eagle3-files");
    export(&workspace, "eagle3", "speculators", "speculators-files");
    write_model(&workspace.path("small"), &json!({"num_hidden_layers": 1}));
    workspace
}

fn export(workspace: &Workspace, run: &str, format: &str, out: &str) {
    let mut command = specforge(&["export", "--format", format, "--checkpoint"]);
    command.arg(workspace.path(run)).arg("--out").arg(workspace.path(out));
    let output = output_of(&mut command);
    assert!(output.status.success(), "{}", stderr_of(&output));
}

fn on_model(workspace: &Workspace, command: &str, arguments: &[&str]) -> Command {
    let mut command = specforge(&[command, "--device", "cpu", "--target"]);
    command.arg(workspace.path("model")).args(arguments);
    command
}

#[test]
fn every_draft_generates_what_the_target_generates() {
    let workspace = workspace();
    let generate = |draft: Option<&str>, arguments: &[&str]| {
        let mut command = on_model(&workspace, "generate", &["--json", "--max-new-tokens", "40"]);
        command.args(["--prompt", "the river runs over"]).args(arguments);
        if let Some(draft) = draft {
            let folder = workspace.path(draft);
            command.arg("--draft").arg(if folder.is_dir() { folder.as_os_str() } else { draft.as_ref() });
        }
        json_of(&mut command)
    };
    let drafts = [
        ("medusa-files", "chain:2"),
        ("medusa-vllm-files", "mc_sim_7b_63"),
        ("medusa", "chain:3"),
        ("eagle3-files", "chain:3"),
        ("speculators-files", "dynamic:depth=3,top_k=3,nodes=9"),
        ("eagle3", "dynamic:depth=4,top_k=2,nodes=6,min_probability=0.01"),
        ("small", "dynamic:depth=2,top_k=4,nodes=8"),
        ("prompt-lookup", "depth=4,nodes=6,match=2"),
    ];
    for sampling in [&[][..], &["--temperature", "0.8", "--seed", "5"], &["--temperature", "1", "--top-p", "0.9"]] {
        let plain = generate(None, sampling);
        assert_eq!(plain["summary"]["acceptance_length"], 1.0);
        for (draft, tree) in drafts {
            let drafted = generate(Some(draft), &[sampling, &["--tree", tree]].concat());
            for key in ["token_ids", "text", "finish"] {
                assert_eq!(drafted[key], plain[key], "{draft}, {tree}, {sampling:?}");
            }
            let summary = &drafted["summary"];
            assert!(summary["lossless"] == true && summary["settings"]["tree"] == tree, "{summary}");
            assert!(summary["acceptance_length"].as_f64().unwrap() >= 1.0);
        }
    }
    // A small model that is the target itself is always right.
    let twin = generate(Some("model"), &["--tree", "chain:3"]);
    assert!(twin["summary"]["acceptance_length"].as_f64().unwrap() > 3.5, "{}", twin["summary"]);
    let lossy = generate(Some("medusa-files"), &["--temperature", "1", "--policy", "typical"]);
    assert_eq!(lossy["summary"]["lossless"], false);
}

#[test]
fn text_alone_goes_to_stdout_and_a_conversation_is_held_on_stdin() {
    let workspace = Workspace::new();
    let arguments = ["--max-new-tokens", "12", "--draft", "prompt-lookup", "--prompt", "a cold bird"];
    let json = json_of(on_model(&workspace, "generate", &arguments).arg("--json"));
    let output = output_of(&mut on_model(&workspace, "generate", &arguments));
    assert_eq!(String::from_utf8(output.stdout.clone()).unwrap(), format!("{}\n", json["text"].as_str().unwrap()));
    assert!(stderr_of(&output).contains("tokens/s") && stderr_of(&output).contains("lossless"));

    let turns = workspace.path("turns");
    fs::write(&turns, "a cold bird\n\nsings at noon\n").unwrap();
    let mut chat = on_model(&workspace, "generate", &["--chat", "--max-new-tokens", "12"]);
    let output = output_of(chat.stdin(fs::File::open(&turns).unwrap()));
    assert!(output.status.success(), "{}", stderr_of(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with(&format!("{}\n", json["text"].as_str().unwrap())) && text.len() > 14, "{text}");
}

pub fn questions(path: &Path) {
    let lines = [
        json!({"question_id": 1, "category": "verse", "turns": ["the river runs over seven stones", "and why"]}),
        json!({"question_id": 2, "category": "prose", "turns": ["a cold bird sings at noon"]}),
        json!({"question_id": 3, "category": "verse", "turns": ["never asks why"]}),
    ];
    fs::write(path, lines.map(|line| line.to_string()).join("\n")).unwrap();
}

#[test]
fn an_evaluation_proves_losslessness_and_writes_a_report() {
    let workspace = workspace();
    let data = workspace.path("bench.jsonl");
    questions(&data);
    let eval = |arguments: &[&str]| {
        let mut command = on_model(&workspace, "eval", &["--json", "--max-new-tokens", "24", "--data"]);
        command.arg(&data).args(arguments);
        json_of(&mut command)
    };
    let draft = workspace.path("eagle3-files");
    let (draft, out) = (draft.to_str().unwrap(), workspace.path("report"));
    let alone = eval(&["--draft", draft, "--out", out.to_str().unwrap()]);
    assert_eq!(alone["lossless"]["promise"], "exact");
    assert_eq!((&alone["lossless"]["compared"], &alone["lossless"]["faults"]), (&json!(4), &json!(0)));
    assert_eq!(alone["lossless"]["divergences"], json!([]));
    let number = |value: &Value| value.as_f64().unwrap();
    // Every token but the first of each answer belongs to a verification, and each verification gives one more than it
    // accepts.
    assert_eq!(alone["tokens"], alone["drafted"]["decode_tokens"]);
    assert_eq!(alone["tokens"], alone["plain"]["decode_tokens"]);
    let (tokens, rounds) = (number(&alone["tokens"]), number(&alone["rounds"]));
    assert!((number(&alone["acceptance_length"]) - tokens / rounds).abs() < 1e-12);
    let lengths: f64 = alone["accepted_lengths"].as_array().unwrap().iter().map(number).sum();
    assert_eq!(lengths, rounds);
    let datasets = alone["datasets"].as_object().unwrap();
    assert_eq!(datasets.keys().collect::<Vec<_>>(), ["bench/prose", "bench/verse"]);
    let shares = ["draft_share", "verify_share", "overhead_share"].map(|share| number(&alone["drafted"][share]));
    assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-6, "{shares:?}");
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("bench/verse") && !page.contains("http"), "{page}");
    let written: Value = serde_json::from_str(&fs::read_to_string(out.join("report.json")).unwrap()).unwrap();
    assert_eq!(written["acceptance_length"], alone["acceptance_length"]);

    // Together, and sampled, the same tokens are accepted as alone.
    for sampling in [&[][..], &["--temperature", "0.9", "--seed", "3"]] {
        let [one, three] = ["1", "3"].map(|batch| eval(&[&["--draft", draft, "--batch", batch], sampling].concat()));
        assert_eq!(three["lossless"]["faults"], 0);
        assert_eq!(one["tokens"], three["tokens"]);
        assert_eq!(one["accepted_lengths"], three["accepted_lengths"]);
    }
    let maximal = eval(&["--draft", draft, "--temperature", "0.9", "--policy", "maximal"]);
    assert_eq!(
        (&maximal["lossless"]["promise"], &maximal["lossless"]["compared"]),
        (&json!("distribution"), &json!(0))
    );
}

#[test]
fn traces_of_two_trees_are_equal() {
    let workspace = workspace();
    let [a, b] = [("a.trace", "chain:2"), ("b.trace", "dynamic:depth=3,top_k=3,nodes=8")].map(|(name, tree)| {
        let trace = workspace.path(name);
        let mut command = on_model(&workspace, "generate", &["--max-new-tokens", "20", "--prompt", "seven stones"]);
        command.args(["--tree", tree, "--draft"]).arg(workspace.path("eagle3-files")).arg("--trace").arg(&trace);
        let output = output_of(&mut command);
        assert!(output.status.success(), "{}", stderr_of(&output));
        trace
    });
    let mut compare = specforge(&["compare", "--json"]);
    let report = json_of(compare.args([&a, &b]).arg("--target").arg(workspace.path("model")));
    assert_eq!(report["verdict"], "equal", "{report}");
}

#[test]
fn real_acceptance_is_measured_while_training_and_the_best_is_kept() {
    for algorithm in ["medusa", "eagle3"] {
        let mut workspace = Workspace::new();
        workspace.configuration["draft"] = json!({"algorithm": algorithm});
        if algorithm == "eagle3" {
            workspace.set("draft.capture", vec![0, 1, 2]).set("draft.ttt_steps", 3);
        }
        workspace.configuration["eval"] = json!({"every": 3, "prompts": 4, "max_new_tokens": 16, "tree": "chain:2"});
        workspace.set("train.max_steps", 9);
        let report = workspace.train("run", &[]);
        assert!(report["start"]["acceptance_length"].as_f64().unwrap() >= 1.0, "{report}");
        assert!(report["end"]["depth1/accepted"].as_f64().unwrap() <= 1.0);
        let best: Value = serde_json::from_str(&fs::read_to_string(workspace.path("run/best.json")).unwrap()).unwrap();
        assert_eq!(best["metric"], "acceptance_length");
        let metrics = fs::read_to_string(workspace.path("run/metrics.jsonl")).unwrap();
        let logged: Vec<f64> = metrics
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).unwrap()["eval/acceptance_length"].as_f64())
            .collect();
        // Before the first step, and at steps 3, 6 and 9.
        assert_eq!(logged.len(), 4, "{metrics}");
        let highest = logged[1..].iter().copied().fold(0.0, f64::max);
        assert_eq!(best["value"].as_f64().unwrap(), highest);

        // The page shows what was logged, and three of the answers.
        let page = fs::read_to_string(workspace.path("run/report.html")).unwrap();
        for shown in
            ["<h2>Acceptance length</h2>", "<h2>Loss</h2>", "acceptance_length, held out", "<h2>Where the time went"]
        {
            assert!(page.contains(shown), "{shown}: {page}");
        }
        assert_eq!(page.matches("<div class=\"text\">").count(), 3, "{page}");
        assert!(page.contains(&format!(
            "<b>{:.3}</b>tokens a verification",
            report["end"]["acceptance_length"].as_f64().unwrap()
        )));

        // Decoding on the way changes nothing that is trained.
        workspace.configuration["eval"] = json!({});
        let without = workspace.train("without", &[]);
        assert_eq!(without["end"]["loss"], report["end"]["loss"]);
    }
}

#[test]
fn what_cannot_be_decoded_is_refused_in_words() {
    let mut workspace = Workspace::new();
    write_model(&workspace.path("wider"), &json!({"hidden_size": 64}));
    workspace.set("train.max_steps", 1);
    workspace.train("run", &[]);
    let [run, empty] = ["run", "empty"].map(|name| workspace.path(name));
    fs::write(run.join("step-00000001/model.safetensors"), "cut").unwrap();
    fs::create_dir(&empty).unwrap();
    let data = workspace.path("bench.jsonl");
    questions(&data);
    let refused = |command: &str, arguments: &[&str], expected: &str| {
        let output = output_of(&mut on_model(&workspace, command, arguments));
        let message = stderr_of(&output);
        assert!(!output.status.success() && output.stdout.is_empty(), "{arguments:?}");
        assert!(message.contains(expected), "{arguments:?}: {message}");
        assert!(!message.contains("internal error") && !message.contains("panicked"), "{message}");
    };
    let prompt = ["--prompt", "x"];
    let generate = |arguments: &[&str], expected: &str| refused("generate", &[&prompt, arguments].concat(), expected);
    generate(&["--draft", "nowhere"], "nowhere: is not a folder");
    generate(&["--draft", run.to_str().unwrap()], "run: holds no whole checkpoint; ");
    generate(&["--draft", run.to_str().unwrap()], "step-00000001: damaged checkpoint passed over");
    generate(&["--draft", empty.to_str().unwrap()], "empty: holds no whole checkpoint");
    generate(&["--tree", "chain:3"], "there is no --draft");
    generate(&["--draft", "prompt-lookup", "--tree", "binary"], "--tree: expected");
    generate(&["--temperature", "-1"], "temperature: expected 0 or more");
    generate(&["--top-p", "0"], "top-p: expected above 0");
    generate(&["--policy", "greedy-ish"], "--policy: expected");
    generate(&["--max-new-tokens", "0"], "at least 1");
    refused("generate", &["--raw", "--prompt", ""], "the prompt is empty");
    let data = data.to_str().unwrap();
    refused("eval", &["--data", "nothing.jsonl"], "nothing.jsonl");
    let broken = workspace.path("broken.jsonl");
    fs::write(&broken, "{\"turns\": [\"fine\"]}\n{\"turn\": 3}\n").unwrap();
    refused("eval", &["--data", broken.to_str().unwrap()], "broken.jsonl:2");
    let long = workspace.path("long.jsonl");
    fs::write(&long, json!({"id": "long", "prompt": "river ".repeat(400)}).to_string()).unwrap();
    refused("eval", &["--data", long.to_str().unwrap()], "leaves no room");
    refused("eval", &["--data", data, "--draft", "nowhere"], "nowhere: is not a folder");

    // Budgets are for drafts that say how sure they are.
    let lookup = ["--data", data, "--draft", "prompt-lookup"];
    let lookup = |arguments: &[&str], expected: &str| refused("eval", &[&lookup, arguments].concat(), expected);
    lookup(
        &["--calibrate", "budget"],
        "`prompt-lookup` with the tree `depth=5,nodes=10,match=3`, which gives no confidence",
    );
    lookup(&["--calibrate", "budget", "--verify-budget", "budget"], "cannot be used with");
    let budget = workspace.path("budget");
    fs::create_dir(&budget).unwrap();
    let budget = |arguments: &[&str], expected: &str| {
        let folder = budget.to_str().unwrap();
        lookup(&["--verify-budget", folder], expected);
        generate(&[arguments, &["--verify-budget", folder]].concat(), expected);
    };
    budget(&[], "sts.json: No such file");
    fs::write(workspace.path("budget/sts.json"), "{\"temperatures\": [1.5, 2]}").unwrap();
    budget(&[], "sps.json: No such file");
    let steps = json!({"sample_batch_tokens": [1, 4], "sample_steps_per_sec": [9, 5], "max_batch_tokens": 4});
    fs::write(workspace.path("budget/sps.json"), steps.to_string()).unwrap();
    budget(&["--draft", "prompt-lookup"], "this draft gives no confidence");
}
