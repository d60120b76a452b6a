//! `specforge tree` on heads that were trained and exported by this program.

use std::fs;

use serde_json::{Value, json};
use specforge::decode::drafter::choices;

use crate::fixture::{Workspace, json_of, litter, output_of, specforge, stderr_of};

/// A run's heads as files, and the command on them.
fn setup() -> Workspace {
    let workspace = Workspace::new();
    workspace.train("run", &[]);
    let mut export = specforge(&["export", "--checkpoint"]);
    assert!(output_of(export.arg(workspace.path("run")).arg("--out").arg(workspace.path("heads"))).status.success());
    workspace
}

fn command(workspace: &Workspace, out: &str, arguments: &[&str]) -> std::process::Command {
    let mut command = specforge(&["tree", "--limit", "6", "--max-new-tokens", "20"]);
    command.arg("--target").arg(workspace.path("model")).arg("--draft").arg(workspace.path("heads"));
    command.arg("--data").arg(workspace.path("conversations.jsonl")).arg("--out").arg(workspace.path(out));
    command.args(arguments);
    command
}

#[test]
fn a_tree_is_chosen_written_and_read_back() {
    let workspace = setup();
    let report = json_of(command(&workspace, "tree.json", &["--nodes", "6", "--json"]).env("OMP_NUM_THREADS", "1"));
    assert_eq!((&report["answers"], &report["failed"]), (&json!(6), &json!(0)));
    let written: Value = serde_json::from_str(&fs::read_to_string(workspace.path("tree.json")).unwrap()).unwrap();
    assert_eq!(written, report);
    let tree = choices::parse(workspace.path("tree.json").to_str().unwrap()).unwrap();
    assert_eq!(json!(tree.topology().len() - 1), report["nodes"]);
    let mut paths: Vec<Vec<usize>> = serde_json::from_value(report["choices"].clone()).unwrap();
    paths.sort_by(|a, b| a.len().cmp(&b.len()).then_with(|| a.cmp(b)));
    assert_eq!(tree.choices(), paths);
    let sizes = report["sizes"].as_array().unwrap();
    let tau = |size: &Value, key: &str| size[key].as_f64().unwrap();
    assert!(sizes.iter().all(|size| tau(size, "expected_tau") >= 1.0 && tau(size, "tau") >= 1.0), "{sizes:?}");
    assert!(sizes.windows(2).all(|pair| tau(&pair[0], "expected_tau") <= tau(&pair[1], "expected_tau")));
    // The batch changes nothing.
    let alone = json_of(&mut command(&workspace, "alone.json", &["--nodes", "6", "--json", "--max-rows", "1"]));
    assert_eq!(alone["choices"], report["choices"]);

    let output = output_of(&mut command(&workspace, "tree.json", &["--nodes", "2"]));
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(output.status.success() && text.contains("2 guesses, chosen by"), "{text}");
    assert!(stderr_of(&output).contains("tree: 6/6 answers"), "{}", stderr_of(&output));
}

#[test]
fn what_cannot_be_measured_is_refused_and_nothing_is_written() {
    let workspace = setup();
    let refused = |arguments: &[&str], expected: &str| {
        let output = output_of(&mut command(&workspace, "out.json", arguments));
        let message = stderr_of(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(expected), "{message}");
        assert!(!workspace.path("out.json").exists());
    };
    refused(&["--nodes", "0"], "expected a whole number of at least 1");
    refused(&["--nodes", "4", "--temperature", "-1"], "temperature: expected 0 or more, got -1");
    fs::write(workspace.path("empty.jsonl"), "").unwrap();
    let empty = workspace.path("empty.jsonl");
    refused(&["--nodes", "4", "--data", empty.to_str().unwrap()], "holds no prompts");
    fs::remove_file(workspace.path("heads/medusa_lm_head.safetensors")).unwrap();
    refused(&["--nodes", "4"], "medusa_lm_head.safetensors");
    assert_eq!(litter(&workspace.path("")), Vec::<std::path::PathBuf>::new());
}
