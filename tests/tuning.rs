//! `specforge tune`, `specforge eval` of several drafts, and `specforge scale`.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::decoding::{questions, workspace};
use crate::fixture::{Workspace, json_of, output_of, specforge, stderr_of};

fn on_model(workspace: &Workspace, command: &str, arguments: &[&str]) -> Command {
    let mut command = specforge(&[command, "--device", "cpu", "--target"]);
    command.arg(workspace.path("model")).args(arguments);
    command
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("expected a number, got {value}"))
}

#[test]
fn drafts_are_tuned_ranked_and_decoded_with_what_was_found() {
    let workspace = workspace();
    let data = workspace.path("bench.jsonl");
    questions(&data);
    let out = workspace.path("tuned.json");
    let mut tune =
        on_model(&workspace, "tune", &["--json", "--batches", "2,1", "--max-new-tokens", "16", "--repeat", "1"]);
    tune.args(["--max-depth", "3", "--max-nodes", "6", "--top-k", "3", "--data"]).arg(&data).arg("--out").arg(&out);
    for draft in ["eagle3-files", "medusa-files", "small"] {
        tune.arg("--draft").arg(workspace.path(draft));
    }
    let report = json_of(tune.args(["--draft", "prompt-lookup"]));
    assert_eq!(read(&out), report);
    let drafts = report["drafts"].as_array().unwrap();
    let methods: Vec<&str> = drafts.iter().map(|draft| draft["method"].as_str().unwrap()).collect();
    assert_eq!(methods, ["eagle3", "medusa", "model", "prompt-lookup"]);
    for draft in drafts {
        let batches = draft["batches"].as_array().unwrap();
        assert_eq!(batches.iter().map(|batch| &batch["rows"]).collect::<Vec<_>>(), [1, 2]);
        for batch in batches {
            let (best, tested) = (&batch["best"], &batch["tested"]);
            assert_eq!(tested["faults"], 0, "{batch}");
            assert!(number(&best["tokens_per_second"]) > 0.0 && number(&tested["tokens_per_second"]) > 0.0);
            // Beside every draft but the lookup itself another one is tried.
            let beside = &batch["with_lookup"];
            assert_eq!(beside.is_null(), draft["method"] == "prompt-lookup", "{batch}");
            if !beside.is_null() {
                assert_eq!(beside["tested"]["faults"], 0, "{batch}");
                assert!(beside["tree"].as_str().unwrap().contains("+lookup:depth=6"), "{batch}");
            }
            // What is accepted is no matter of the clock; static trees are tried on answers that did not choose them.
            let (foreseen, got) = (number(&best["tokens_per_round"]), number(&tested["tokens_per_round"]));
            assert!(draft["method"] == "medusa" || (foreseen - got).abs() < 0.02, "{foreseen} and {got}: {batch}");
        }
        let served = draft["engines"].as_array().unwrap().len();
        let engines = match draft["method"].as_str().unwrap() {
            "eagle3" => 3,
            "medusa" => 1,
            _ => 0,
        };
        assert_eq!(served, 2 * engines, "{draft}");
    }
    let ranking = report["ranking"].as_array().unwrap();
    assert_eq!(ranking.len(), 8);
    let speedups: Vec<f64> = ranking[..4].iter().map(|place| number(&place["speedup"])).collect();
    assert!(
        ranking[..4].iter().all(|place| place["rows"] == 1) && speedups.is_sorted_by(|a, b| a >= b),
        "{speedups:?}"
    );

    // The file is a tree.
    let draft = report["draft"].as_str().unwrap();
    let mut generate = on_model(&workspace, "generate", &["--json", "--prompt", "seven stones", "--draft", draft]);
    let generated = json_of(generate.arg("--tree").arg(&out));
    assert_eq!(generated["summary"]["settings"]["tree"], report["tree"]);
}

#[test]
fn tuning_speaks_to_people_and_refuses_what_cannot_be() {
    let workspace = Workspace::new();
    let data = workspace.path("bench.jsonl");
    questions(&data);
    let tune = |arguments: &[&str]| {
        let mut command = on_model(&workspace, "tune", &["--repeat", "1", "--data"]);
        output_of(command.arg(&data).args(arguments))
    };
    let output = tune(&["--draft", "prompt-lookup", "--batches", "1", "--max-new-tokens", "12"]);
    let (text, progress) = (String::from_utf8(output.stdout.clone()).unwrap(), stderr_of(&output));
    assert!(output.status.success(), "{progress}");
    assert!(text.contains("verification, ms by tokens") && text.contains("one request alone: "), "{text}");
    assert!(progress.contains("tune: 3/3 answers") && progress.contains("verifying rounds"), "{progress}");
    let refused = |arguments: &[&str], expected: &str| {
        let output = tune(arguments);
        let message = stderr_of(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(expected), "{message}");
    };
    refused(&["--draft", "nowhere"], "nowhere: is not a folder");
    refused(&["--draft", "prompt-lookup", "--batches", "0"], "at least 1");
    refused(&["--draft", "prompt-lookup", "--temperature", "-1"], "temperature: expected 0 or more");
    refused(&["--draft", "prompt-lookup", "--max-new-tokens", "300"], "do not fit the context of 256");
    refused(&[], "--draft");
}

#[test]
fn several_drafts_are_evaluated_side_by_side() {
    let workspace = workspace();
    let data = workspace.path("bench.jsonl");
    questions(&data);
    let [one, two, page, out] =
        ["eagle3-files", "medusa-files", "page.html", "report"].map(|name| workspace.path(name));
    let eval = |arguments: &[&str]| {
        let mut command = on_model(&workspace, "eval", &["--max-new-tokens", "12", "--data"]);
        command.arg(&data).arg("--draft").arg(&one).arg("--draft").arg(&two).args(arguments);
        command
    };
    let mut both = eval(&["--json", "--tree", "chain:2"]);
    let report = json_of(both.arg("--report").arg(&page).arg("--out").arg(&out));
    let drafts = report["drafts"].as_array().unwrap();
    assert_eq!(drafts.len(), 2);
    for (draft, method) in drafts.iter().zip(["eagle3", "medusa"]) {
        assert_eq!((&draft["settings"]["method"], &draft["settings"]["tree"]), (&json!(method), &json!("chain:2")));
        assert_eq!((&draft["lossless"]["compared"], &draft["lossless"]["faults"]), (&json!(4), &json!(0)));
        assert!(draft["parameters"].as_u64().unwrap() > 100 && number(&draft["draft_seconds"]) > 0.0);
        assert_eq!(draft["per_depth"].as_array().unwrap().len(), 2);
    }
    assert_eq!(read(&out.join("report.json")), report);
    let html = fs::read_to_string(&page).unwrap();
    assert!(html.contains("2 drafts side by side") && html.contains("<polyline"), "{html}");
    assert!(!html.contains("http"), "the page asks for something elsewhere");
    // Each alone, with a tree of its own.
    let output = output_of(&mut eval(&["--tree", "dynamic:depth=2,top_k=2,nodes=4", "--tree", "mc_sim_7b_63"]));
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(output.status.success(), "{}", stderr_of(&output));
    assert!(text.contains("tree dynamic:depth=2") && text.contains("tree mc_sim_7b_63"), "{text}");
    assert!(text.lines().next().unwrap().starts_with("draft "), "{text}");

    let refused = |mut command: Command, expected: &str| {
        let output = output_of(&mut command);
        assert_eq!(output.status.code(), Some(2), "{}", stderr_of(&output));
        assert!(stderr_of(&output).contains(expected), "{}", stderr_of(&output));
    };
    let trace = workspace.path("a.trace");
    refused(eval(&["--trace", trace.to_str().unwrap()]), "--trace: expected one --draft, got 2");
    refused(eval(&["--tree", "chain:1", "--tree", "chain:2", "--tree", "chain:3"]), "one for each, got 3");
    let mut generate = on_model(&workspace, "generate", &["--prompt", "x", "--draft"]);
    generate.arg(&one).arg("--draft").arg(&two);
    refused(generate, "--draft: expected one, got 2");
}

/// A run's folder with acceptance after these steps.
fn run_of(workspace: &Workspace, name: &str, values: impl IntoIterator<Item = (u32, f64)>) -> String {
    let folder = workspace.path(name);
    fs::create_dir(&folder).unwrap();
    let rows = values.into_iter().map(|(step, value)| {
        let acceptance = json!({"step": step, "time": 0, "eval/acceptance_length": value, "eval/depth3/accepted": 0.1});
        let training = json!({"step": step, "time": 0, "train/tokens": 1000 * step, "train/draft_seconds": 36.0});
        format!("{acceptance}\n{training}\n")
    });
    fs::write(folder.join("metrics.jsonl"), rows.collect::<String>()).unwrap();
    folder.to_str().unwrap().to_owned()
}

#[test]
fn acceptance_is_foretold_by_the_curves_of_runs() {
    let workspace = Workspace::new();
    let law = |step: u32| 3.0 - 0.5 * (f64::from(step) / 1000.0).powf(-0.5);
    let steps = [50, 100, 200, 400, 600, 800, 1000];
    let long = run_of(&workspace, "long", steps.map(|step| (step, law(step))));
    let short = run_of(&workspace, "short", steps[..3].iter().map(|&step| (step, law(step))));
    let report = json_of(&mut specforge(&["scale", "--json", "--times", "4", &long]));
    let curve = &report["curves"][0];
    let expected = &curve["expected"][0];
    assert!((number(&expected["value"]) - law(4000)).abs() < 0.01, "{curve}");
    assert!(number(&expected["low"]) <= law(4000) + 1e-6 && number(&expected["high"]) >= law(4000) - 1e-6, "{curve}");
    assert_eq!((&curve["spent"]["tokens"], &curve["spent"]["seconds"]), (&json!(1e6), &json!(36.0 * 7.0)));
    let output = output_of(&mut specforge(&["scale", &long]));
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(
        output.status.success() && text.contains("10.00 M") && text.contains("7 values of eval/acceptance_length"),
        "{text}"
    );

    // One curve through the ends of several runs.
    let ends: Vec<String> =
        steps.iter().map(|&step| run_of(&workspace, &format!("end-{step}"), [(step, law(step))])).collect();
    let mut command = specforge(&["scale", "--json", "--ends", "--times", "4"]);
    let curve = json_of(command.args(&ends))["curves"][0].clone();
    assert!((number(&curve["expected"][0]["value"]) - law(4000)).abs() < 0.01, "{curve}");

    let refused = |arguments: &[&str], expected: &str| {
        let output = output_of(&mut specforge(&[&["scale"], arguments].concat()));
        let message = stderr_of(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(expected), "{message}");
    };
    refused(&[&short], "expected at least 5 values after different amounts of data, got 3");
    refused(&["nowhere"], "nowhere: holds no metrics.jsonl");
    refused(&["--metric", "eval/lost", &long], "held-out ones are eval/acceptance_length, eval/depth3/accepted");
    refused(&["--times", "0", &long], "--times: expected numbers above 0");
    refused(&[], "required");
}
