//! What the command line shows: help, typical errors, and JSON that is JSON and alone on stdout.

use std::fs;
use std::path::Path;
use std::process::Command;

use clap::Parser;
use serde_json::{Value, json};
use specforge::cli::Cli;

use crate::fixture::{Workspace, json_of, output_of, specforge, stderr_of, write_gguf};

/// Compares with a file of tests/snapshots, under this name. `INSTA_UPDATE=always cargo test` writes them anew.
fn compare(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/snapshots"));
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

fn help_of(arguments: &[&str]) -> String {
    let output = output_of(&mut specforge(arguments));
    assert_eq!(output.status.code(), Some(0), "{}", stderr_of(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn help() {
    let help = help_of(&["--help"]);
    compare("help", &help);
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let names: Vec<&str> = commands.filter_map(|line| line.split_whitespace().next()).collect();
    assert!(names.contains(&"train") && names.contains(&"doctor"), "{names:?}");
    for name in names.into_iter().filter(|name| *name != "help") {
        compare(&format!("help-{name}"), &help_of(&[name, "--help"]));
    }
}

#[test]
fn version() {
    assert_eq!(help_of(&["--version"]), format!("specforge {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn nothing_asked_for_is_answered_with_help() {
    let output = output_of(&mut specforge(&[]));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr_of(&output).contains("Usage: specforge"), "{}", stderr_of(&output));
}

/// stderr of a failing command, with the workspace's folder as `<folder>`.
fn error_of(workspace: &Workspace, command: &mut Command) -> String {
    let output = output_of(command);
    assert_eq!(output.status.code(), Some(2), "{}", stderr_of(&output));
    assert_eq!(output.stdout, b"");
    let lines = stderr_of(&output).replace(workspace.path("").to_str().unwrap().trim_end_matches('/'), "<folder>");
    // Progress before the error depends on the clock.
    lines.lines().filter(|line| !line.starts_with("tokenise: ")).map(|line| format!("{line}\n")).collect()
}

#[test]
fn typical_errors() {
    let workspace = Workspace::new();
    let train = |arguments: &[&str]| workspace.train_command("run", arguments);
    compare("error-unknown-command", &error_of(&workspace, &mut specforge(&["trian"])));
    compare("error-missing-argument", &error_of(&workspace, &mut specforge(&["train"])));
    compare("error-typo", &error_of(&workspace, &mut train(&["--set", "optim.learning_rte=1"])));
    compare("error-wrong-type", &error_of(&workspace, &mut train(&["--set", "train.epochs=many"])));
    compare("error-no-model", &error_of(&workspace, &mut train(&["--set", "target.path=/nowhere/model"])));

    let good = fs::read(workspace.path("conversations.jsonl")).unwrap();
    fs::write(workspace.path("conversations.jsonl"), "once upon a time\n{\"messages\": 7}\n").unwrap();
    compare("error-malformed-data", &error_of(&workspace, &mut train(&[])));
    fs::write(workspace.path("conversations.jsonl"), good).unwrap();

    let weights = workspace.path("model/model.safetensors");
    let whole = fs::read(&weights).unwrap();
    fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    compare("error-truncated-weights", &error_of(&workspace, &mut train(&[])));
    let config = fs::read_to_string(workspace.path("model/config.json")).unwrap();
    fs::write(&weights, &whole).unwrap();
    let deeper = config.replace("\"num_hidden_layers\":2", "\"num_hidden_layers\":3");
    fs::write(workspace.path("model/config.json"), deeper).unwrap();
    compare("error-missing-tensors", &error_of(&workspace, &mut train(&[])));
    fs::write(workspace.path("model/config.json"), config).unwrap();

    workspace.train("run", &[]);
    compare("error-run-is-there", &error_of(&workspace, &mut train(&[])));
    let changed = ["--resume", "--set", "optim.learning_rate=0.5"];
    compare("error-changed-configuration", &error_of(&workspace, &mut train(&changed)));
}

/// Runs with `--json` and demands that stdout is one JSON value, and that what is for people is on stderr.
fn value_of(command: &mut Command, for_people: &str) -> Value {
    let output = output_of(command);
    assert!(output.status.success(), "{}", stderr_of(&output));
    assert!(stderr_of(&output).contains(for_people), "{}", stderr_of(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn json_is_alone_on_stdout() {
    let workspace = Workspace::new();
    let (model, data) = (workspace.path("model"), workspace.path("conversations.jsonl"));
    let report = value_of(&mut workspace.train_command("run", &[]), "step 4: loss");
    assert_eq!((&report["steps"], &report["total_steps"]), (&json!(4), &json!(4)));
    assert!(report["end"]["loss"].is_f64());
    let plan = value_of(&mut workspace.train_command("run", &["--plan"]), "");
    assert!(plan["memory"]["total"].as_u64().unwrap() > 0);

    let mut inspect = specforge(&["inspect", "--json", "--show", "2", "--target"]);
    inspect.arg(&model).arg("--data").arg(&data);
    let report = value_of(&mut inspect, "");
    assert_eq!(report["shown"].as_array().unwrap().len(), 2);
    assert_eq!(report["build"]["conversations"], 60);

    let out = workspace.path("export");
    let mut export = specforge(&["export", "--json", "--checkpoint"]);
    let report = value_of(export.arg(workspace.path("run")).arg("--out").arg(&out), "");
    assert_eq!(json_of(specforge(&["--json", "export", "--check"]).arg(&out)), report);

    let report = json_of(&mut specforge(&["doctor", "--json"]));
    assert_eq!(report["versions"]["specforge"], env!("CARGO_PKG_VERSION"));
    assert_eq!(report["devices"][0], "cpu");

    let gguf = workspace.path("small.gguf");
    write_gguf(&gguf);
    let imported = workspace.path("imported");
    let mut import = specforge(&["import", "--json", "--dtype", "bf16"]);
    let report = value_of(import.arg(&gguf).arg("--out").arg(&imported), "import: ");
    assert_eq!(
        (&report["tensors"], &report["dtype"], &report["chat_template"]),
        (&json!(11), &json!("bf16"), &json!(true))
    );
    // What was imported is a model like any other.
    let report = workspace.train("of-imported", &["--set", &format!("target.path={}", imported.display())]);
    assert_eq!(report["steps"], 4);

    // Without --json the same commands speak to people.
    let output = output_of(specforge(&["export", "--check"]).arg(&out));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("9 tensors") && serde_json::from_str::<Value>(&text).is_err(), "{text}");
}

/// Whoever sets either variable is left alone.
#[test]
fn idle_threads_sleep_beside_others_unless_the_environment_says_otherwise() {
    let waiting = |set: Option<(&str, &str)>| {
        let mut command = specforge(&["doctor", "--json"]);
        command.env_remove("GOMP_SPINCOUNT").env_remove("OMP_WAIT_POLICY").envs(set);
        json_of(&mut command)["idle_threads"].as_str().unwrap().to_owned()
    };
    // libgomp reads its environment before `main`: where neighbours cannot be seen, only a program that was started with
    // the variable has it, so what `doctor` finds in its own environment was there in time.
    let by_itself = match Path::new("/proc/self/schedstat").exists() {
        true => "spin while nobody else wants their cores, and sleep while somebody does",
        false => "sleep after 1000 rounds of spinning (GOMP_SPINCOUNT)",
    };
    assert_eq!(waiting(None), by_itself);
    assert_eq!(waiting(Some(("GOMP_SPINCOUNT", "7"))), "sleep after 7 rounds of spinning (GOMP_SPINCOUNT)");
    assert_eq!(waiting(Some(("OMP_WAIT_POLICY", "active"))), "wait as OMP_WAIT_POLICY=active says");
}

/// Words of a shell line: quotes hold words together, a backslash at the end is gone already.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut quote) = (vec![String::new()], None);
    for letter in line.chars() {
        match (quote, letter) {
            (None, ' ') => words.push(String::new()),
            (None, '"' | '\'') => quote = Some(letter),
            (Some(open), _) if letter == open => quote = None,
            _ => words.last_mut().unwrap().push(letter),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[test]
fn commands_in_the_documentation_are_commands() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut files = vec![root.join("README.md")];
    for folder in ["docs", "examples", "benchmarks", "examples/data"] {
        let entries = fs::read_dir(root.join(folder)).unwrap().map(|entry| entry.unwrap().path());
        files.extend(entries.filter(|path| path.extension().is_some_and(|extension| extension == "md")));
    }
    let mut seen = 0;
    for path in files {
        let text = fs::read_to_string(&path).unwrap().replace("\\\n", " ");
        for line in text.lines().map(str::trim) {
            let Some(arguments) = line.strip_prefix("target/debug/specforge ").or(line.strip_prefix("specforge "))
            else {
                continue;
            };
            // Sentences that begin with the program's name are no commands.
            let words = words(arguments);
            if !words[0].chars().all(|letter| letter.is_ascii_lowercase() || letter == '-') || !arguments.contains("--")
            {
                continue;
            }
            let parsed = Cli::try_parse_from(std::iter::once("specforge".to_owned()).chain(words.clone()));
            assert!(parsed.is_ok(), "{}: {line}\n{}", path.display(), parsed.unwrap_err());
            let config = words.iter().position(|word| word == "--config").map(|at| root.join(&words[at + 1]));
            assert!(config.is_none_or(|config| config.is_file()), "{}: {line}", path.display());
            seen += 1;
        }
    }
    assert!(seen > 10, "only {seen} commands were found");
}
