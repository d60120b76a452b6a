//! The feature store through the real program: an offline run is the online run, a killed capture loses nothing, and
//! states that are damaged or not the target's are refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use specforge::models;
use specforge::weights;
use tch::{Device, Kind};

use crate::fixture::{Workspace, contents, conversations, json_of, litter, model_config, model_tensors, output_of};
use crate::fixture::{specforge, stderr_of, write_model};
use crate::processes::PATIENCE;

mod eagle3;
mod elsewhere;
mod imported;
mod served;
mod tampered;

const ELEMENTS: [&str; 3] = ["float32", "bfloat16", "float8"];

fn capture_command(workspace: &Workspace, out: &str, arguments: &[&str]) -> Command {
    let mut command = specforge(&["capture", "--json", "--device", "cpu", "--config"]);
    command.arg(workspace.config()).arg("--out").arg(workspace.path(out)).args(arguments);
    command
}

fn capture(workspace: &Workspace, out: &str, arguments: &[&str]) -> Value {
    json_of(&mut capture_command(workspace, out, arguments))
}

fn offline(workspace: &Workspace, run: &str, store: &str) -> Command {
    workspace.train_command(run, &["--set", &format!("target.feature_store={}", workspace.path(store).display())])
}

/// Names and bytes of a store, sorted.
fn files_of(store: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    contents(store)
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// Runs a command that must fail, and returns what it said.
#[track_caller]
fn refused(command: &mut Command, exit_code: i32, words: &[&str]) -> String {
    let output = output_of(command);
    let message = stderr_of(&output);
    assert_eq!(output.status.code(), Some(exit_code), "{message}");
    assert_eq!(output.stdout, b"", "{message}");
    for word in words {
        assert!(message.contains(word), "no `{word}` in:\n{message}");
    }
    for noise in ["panicked", "internal error", "c10::"] {
        assert!(!message.contains(noise), "{message}");
    }
    message
}

#[test]
fn a_run_from_a_store_is_the_online_run() {
    let mut workspace = Workspace::new();
    workspace.set("train.max_steps", 12).set("train.epochs", 3).set("train.eval_every", 5);
    let online = workspace.train("online", &[]);
    let steps = online["steps"].as_u64().unwrap();
    let checkpoint = |run: &str| {
        let folder = workspace.path(run).join(format!("step-{steps:08}"));
        ["model", "optimizer"].map(|name| fs::read(folder.join(format!("{name}.safetensors"))).unwrap())
    };
    let remembered = workspace.train("remembered", &["--set", "target.keep_hidden_states=true"]);
    assert!(checkpoint("remembered") == checkpoint("online"), "remembered states are others");
    assert_eq!(remembered["end"], online["end"]);

    // One store serves several methods: it holds more than this one asks for.
    for element in ELEMENTS {
        capture(&workspace, element, &["--dtype", element, "--layers", "1,0", "--shard-tokens", "500"]);
        let report = json_of(&mut offline(&workspace, &format!("run-{element}"), element));
        let loss = |report: &Value, when: &str| report[when]["loss"].as_f64().unwrap();
        let difference = |when| (loss(&report, when) - loss(&online, when)).abs() / loss(&online, when);
        let (start, end) = (difference("start"), difference("end"));
        println!("{element}: held-out loss differs by {start:.2e} before and {end:.2e} after training");
        match element {
            "float32" => {
                assert!(checkpoint("run-float32") == checkpoint("online"), "a float32 store trains on other bits");
                assert_eq!((&report["start"], &report["end"]), (&online["start"], &online["end"]));
            }
            "bfloat16" => assert!(start > 0.0 && start < 5e-4 && end < 2e-3),
            _ => assert!(start > 0.0 && start < 5e-3 && end < 2e-2),
        }
    }
}

#[test]
fn tables_are_those_of_the_whole_target() {
    let workspace = Workspace::new();
    for tied in [false, true] {
        let folder = workspace.path(&format!("model-{tied}"));
        write_model(&folder, &json!({"tie_word_embeddings": tied}));
        for kind in [Kind::Float, Kind::BFloat16] {
            let whole = models::load_target(&folder, kind, Device::Cpu).unwrap();
            let tables = models::load_tables(&folder, kind, Device::Cpu).unwrap();
            assert_eq!(&tables.info, whole.info());
            assert!(
                tables.embedding.table.equal(&whole.embedding().table)
                    && tables.head.weight.equal(&whole.head().weight)
            );
            assert_eq!((tables.head.kind(), tables.embedding.kind()), (kind, kind));
            assert_eq!(tables.head.weight.data_ptr() == tables.embedding.table.data_ptr(), tied);
        }
    }
    // The same errors as the whole target's.
    let folder = workspace.path("model-false");
    let mut tensors = model_tensors(&model_config(&json!({})));
    tensors.retain(|(name, _)| name != "model.layers.1.mlp.up_proj.weight");
    weights::write_tensors(&folder.join("model.safetensors"), &tensors, &[]).unwrap();
    let error = models::load_tables(&folder, Kind::Float, Device::Cpu).unwrap_err().to_string();
    let whole = models::load_target(&folder, Kind::Float, Device::Cpu).err().unwrap().to_string();
    assert!(error == whole && error.contains("model.layers.1.mlp.up_proj.weight"), "{error}");
}

#[test]
fn a_plan_knows_the_size_and_writes_nothing() {
    let workspace = Workspace::new();
    for element in ELEMENTS {
        let arguments = ["--dtype", element, "--layers", "0,1", "--shard-tokens", "700"];
        let plan = capture(&workspace, element, &[&arguments[..], &["--plan"]].concat());
        assert!(!workspace.path(element).exists());
        let report = capture(&workspace, element, &arguments);
        assert_eq!((&plan["documents"], &plan["tokens"]), (&report["documents"], &report["tokens"]));
        assert_eq!(plan["shards"], report["shards"]);
        assert!(report["shards"].as_u64().unwrap() > 3);
        assert_eq!(report["layers"], json!([0, 1, 2]));
        let (planned, bytes) = (plan["bytes"].as_f64().unwrap(), report["bytes"].as_f64().unwrap());
        assert!((planned / bytes - 1.0).abs() < 0.05, "{element}: planned {planned}, got {bytes}");
        // The second time there is nothing left to do.
        let before = files_of(&workspace.path(element));
        let again = capture(&workspace, element, &arguments);
        assert_eq!((&again["tokens_captured"], &again["bytes"]), (&json!(0), &report["bytes"]));
        assert!(files_of(&workspace.path(element)) == before);
    }
    // The trainer's plan counts the store and not the layers.
    let mut run = offline(&workspace, "run", "float8");
    let plan = json_of(run.arg("--plan"));
    let whole = json_of(&mut workspace.train_command("run", &["--plan"]));
    assert!(plan["store_bytes"].as_u64().unwrap() > 1000 && whole["store_bytes"].is_null());
    assert!(plan["memory"]["target"].as_u64() < whole["memory"]["target"].as_u64());
}

/// Wide enough for a capture to take a while.
fn slow_workspace() -> Workspace {
    let workspace =
        Workspace::with_model(&json!({"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}));
    fs::write(workspace.path("conversations.jsonl"), conversations(300)).unwrap();
    workspace
}

const SLOW: [&str; 6] = ["--dtype", "float8", "--layers", "2,5", "--shard-tokens", "400"];

fn shards_of(store: &Path) -> usize {
    let value = fs::read(store.join("store.json")).ok().and_then(|text| serde_json::from_slice::<Value>(&text).ok());
    value.map_or(0, |value| value["shards"].as_array().unwrap().len())
}

#[test]
fn a_killed_capture_ends_with_the_bytes_of_an_undisturbed_one() {
    let workspace = slow_workspace();
    let total = capture(&workspace, "undisturbed", &SLOW)["shards"].as_u64().unwrap() as usize;
    assert!(total > 20, "{total}");
    let store = workspace.path("killed");
    // Kills at the start, between shards, and while one is being written.
    for (number, goal) in [0, 2, 5, total / 2, total / 2 + 1].into_iter().enumerate() {
        let mut child = capture_command(&workspace, "killed", &SLOW).spawn().unwrap();
        let started = Instant::now();
        let being_written = || goal % 2 == 1 && litter(&store).is_empty();
        while shards_of(&store) < goal || (goal > 0 && being_written()) {
            assert!(started.elapsed() < PATIENCE, "the capture hangs");
            assert!(child.try_wait().unwrap().is_none(), "the capture ended before kill {number}");
            sleep(Duration::from_micros(100));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        println!("killed with {} of {total} shards", shards_of(&store));
    }
    assert!(shards_of(&store) < total, "nothing was left to do");
    let report = capture(&workspace, "killed", &SLOW);
    assert_eq!(report["complete"], true);
    assert!(report["tokens_captured"].as_u64() < report["tokens"].as_u64());
    let (left, right) = (files_of(&store), files_of(&workspace.path("undisturbed")));
    let differing: Vec<_> =
        left.iter().filter(|entry| !right.contains(entry)).map(|entry| (&entry.0, entry.1.len())).collect();
    assert!(left == right, "the stores differ: {differing:?} of {}", left.len());
}

#[test]
fn a_polite_signal_ends_well() {
    let workspace = slow_workspace();
    capture(&workspace, "undisturbed", &SLOW);
    for (signal, number) in [("TERM", 15), ("INT", 2)] {
        let store = workspace.path(signal);
        let child = capture_command(&workspace, signal, &SLOW).spawn().unwrap();
        let started = Instant::now();
        while shards_of(&store) < 3 {
            assert!(started.elapsed() < PATIENCE, "the capture hangs");
            sleep(Duration::from_micros(200));
        }
        let sent = Command::new("sh").args(["-c", &format!("kill -{signal} {}", child.id())]).status().unwrap();
        assert!(sent.success());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr_of(&output));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&report["stopped_by"], &report["complete"]), (&json!(number), &json!(false)));
        assert_eq!(litter(&store), Vec::<PathBuf>::new());
        // What is there is usable as far as it goes, and says what is missing.
        refused(&mut offline(&workspace, "run", signal), 2, &["lacks", "documents of this run", "capture"]);
        let report = capture(&workspace, signal, &SLOW);
        assert_eq!((&report["stopped_by"], &report["complete"]), (&Value::Null, &json!(true)));
        assert!(files_of(&store) == files_of(&workspace.path("undisturbed")), "the stores differ");
    }
}

#[test]
fn damaged_shards_are_captured_again_and_new_documents_are_added() {
    let workspace = Workspace::new();
    let arguments = ["--dtype", "bfloat16", "--shard-tokens", "500"];
    capture(&workspace, "store", &arguments);
    let store = workspace.path("store");
    let whole = files_of(&store);
    let shard = |number: usize| store.join(format!("shard-{number:05}.safetensors"));
    let mut bytes = fs::read(shard(1)).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(shard(1), &bytes).unwrap();
    fs::write(shard(3), b"nothing of a shard").unwrap();
    fs::remove_file(shard(4)).unwrap();
    let output = output_of(&mut capture_command(&workspace, "store", &arguments));
    let message = stderr_of(&output);
    assert!(output.status.success(), "{message}");
    for part in ["shard-00001", "CRC-32C", "shard-00003", "expected", "shard-00004", "No such file", "captured again"] {
        assert!(message.contains(part), "no `{part}` in:\n{message}");
    }
    assert!(files_of(&store) == whole, "the store is another");

    // Documents are found by their tokens: in another order, and among others.
    let path = workspace.path("conversations.jsonl");
    let text = conversations(75);
    let mut lines: Vec<&str> = text.lines().collect();
    lines.reverse();
    fs::write(&path, lines.join("\n")).unwrap();
    refused(&mut offline(&workspace, "run", "store"), 2, &["lacks", "documents of this run", "among them `c"]);
    let report = capture(&workspace, "store", &arguments);
    assert!(report["tokens_captured"].as_u64() < report["tokens"].as_u64());
    for (name, bytes) in whole.iter().filter(|(name, _)| name.extension().is_some_and(|kind| kind == "safetensors")) {
        assert!(fs::read(store.join(name)).unwrap() == *bytes, "{} changed", name.display());
    }
    json_of(&mut offline(&workspace, "run", "store"));
}

#[test]
fn stores_that_do_not_fit_are_refused_before_the_first_step() {
    type Spoil = fn(&mut Workspace);
    fn store(workspace: &Workspace) -> PathBuf {
        workspace.path("store")
    }
    let cases: [(&str, Spoil, &[&str]); 13] = [
        ("no store", |workspace| fs::remove_dir_all(store(workspace)).unwrap(), &["is no feature store: store.json"]),
        (
            "a truncated shard",
            |workspace| {
                let file =
                    fs::File::options().write(true).open(store(workspace).join("shard-00001.safetensors")).unwrap();
                file.set_len(file.metadata().unwrap().len() - 3).unwrap();
            },
            &["shard-00001.safetensors: is truncated", "run the same `specforge capture` again"],
        ),
        (
            "an absent shard",
            |workspace| {
                fs::remove_file(store(workspace).join("shard-00001.safetensors")).unwrap();
            },
            &["shard-00001.safetensors", "No such file"],
        ),
        (
            "a flipped byte",
            |workspace| {
                let path = store(workspace).join("shard-00000.safetensors");
                let mut bytes = fs::read(&path).unwrap();
                *bytes.last_mut().unwrap() ^= 1;
                fs::write(path, bytes).unwrap();
            },
            &["shard-00000.safetensors: is damaged: expected CRC-32C"],
        ),
        (
            "a manifest that is cut off",
            |workspace| {
                let path = store(workspace).join("store.json");
                let text = fs::read(&path).unwrap();
                fs::write(path, &text[..text.len() / 2]).unwrap();
            },
            &["store.json: not valid JSON"],
        ),
        (
            "a manifest of a later version",
            |workspace| {
                edit_json(&store(workspace).join("store.json"), |value| value["format_version"] = json!(2));
            },
            &["`format_version`: expected 1, got 2"],
        ),
        (
            "a manifest with an unknown key",
            |workspace| {
                edit_json(&store(workspace).join("store.json"), |value| value["shards"][0]["colour"] = json!("red"));
            },
            &["store.json: `shards[0]", "colour"],
        ),
        (
            "a manifest with absurd counts",
            |workspace| {
                edit_json(&store(workspace).join("store.json"), |value| {
                    value["shards"][0]["documents"] = json!(u64::MAX);
                });
            },
            &["counts of `shard-00000.safetensors` cannot be right"],
        ),
        (
            "a manifest that names a file elsewhere",
            |workspace| {
                edit_json(&store(workspace).join("store.json"), |value| value["shards"][0]["file"] = json!("../x"));
            },
            &["expected names of files in this folder, got `../x`"],
        ),
        (
            "another target",
            |workspace| {
                write_model(&workspace.path("model"), &json!({"hidden_size": 64}));
            },
            &["was captured from", "config.json of", "hidden size: expected 64, got 32"],
        ),
        (
            "another tokenizer",
            |workspace| {
                let path = workspace.path("model/tokenizer.json");
                edit_json(&path, |value| value["added_tokens"][0]["single_word"] = json!(true));
            },
            &["its documents were made by another tokenizer or chat template"],
        ),
        (
            "states kept twice",
            |workspace| {
                workspace.set("target.keep_hidden_states", true);
            },
            &["`target.keep_hidden_states`: cannot be used with target.feature_store"],
        ),
        (
            "documents that are not there",
            |workspace| {
                fs::write(workspace.path("conversations.jsonl"), conversations(61)).unwrap();
            },
            &["lacks 1 of the", "among them `c60`", "run `specforge capture`"],
        ),
    ];
    let mut wrong = Vec::new();
    for (name, spoil, words) in cases {
        let mut workspace = Workspace::new();
        capture(&workspace, "store", &["--shard-tokens", "600"]);
        spoil(&mut workspace);
        let before = files_of(&workspace.path(""));
        let output = output_of(&mut offline(&workspace, "run", "store"));
        let message = stderr_of(&output);
        let sound = output.status.code() == Some(2)
            && words.iter().all(|word| message.contains(word))
            && message.contains("\nhint: ")
            && !message.contains("panicked")
            && !workspace.path("run/config.json").exists();
        let changed = before.iter().any(|(path, bytes)| {
            !path.starts_with("run")
                && fs::read(workspace.path("").join(path)).ok().as_ref() != Some(bytes)
                && path != Path::new("run.json")
        });
        if !sound || changed {
            wrong.push(format!("-- {name}: {} {words:?}\n{message}", output.status));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn captures_that_cannot_be_are_refused_and_change_nothing() {
    let mut workspace = Workspace::new();
    let fixed = ["--shard-tokens", "600"];
    capture(&workspace, "store", &fixed);
    let before = files_of(&workspace.path("store"));
    let attempt = |arguments: &[&str]| capture_command(&workspace, "store", &[&fixed[..], arguments].concat());
    let another = "holds another store";
    refused(&mut attempt(&["--dtype", "float8"]), 2, &[another, "--dtype: asked for float8, the store has bfloat16"]);
    refused(&mut attempt(&["--layers", "1"]), 2, &[another, "--layers: asked for 1,2, the store has 2"]);
    refused(&mut attempt(&["--set", "target.dtype=bfloat16"]), 2, &[another, "target.dtype: asked for bfloat16"]);
    refused(&mut attempt(&["--set", "data.template_arguments.x=1"]), 2, &[another, "tokenizer or chat template"]);
    refused(&mut attempt(&["--layers", "3"]), 2, &["--layers: this target has hidden states 0 to 2, got 3"]);
    refused(&mut attempt(&["--layers", "last"]), 2, &["invalid value 'last'"]);
    refused(
        &mut attempt(&["--whole-vocabulary"]),
        2,
        &[another, "--whole-vocabulary: asked for it, the store has none"],
    );
    let narrow = ["--whole-vocabulary", "--set", "target.dtype=bfloat16"];
    refused(&mut attempt(&narrow), 2, &["--whole-vocabulary: is noted by a target in float32 alone", "bfloat16"]);
    refused(&mut attempt(&["--dtype", "int4"]), 2, &["expected float32, bfloat16 or float8, got `int4`"]);
    let other = ["--shard-tokens", "700"];
    refused(&mut capture_command(&workspace, "store", &other), 2, &[another, "--shard-tokens: asked for 700"]);
    refused(&mut capture_command(&workspace, "new", &["--shard-tokens", "0"]), 2, &["--shard-tokens"]);
    assert!(files_of(&workspace.path("store")) == before, "the store changed");

    let foreign = workspace.path("photos");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("cat.png"), "a cat").unwrap();
    refused(&mut capture_command(&workspace, "photos", &[]), 2, &["holds `cat.png` and no store.json"]);
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 1);
    // A file system without room, asked before any weight is loaded.
    let mut full = specforge(&["capture", "--device", "cpu", "--out", "/proc/store", "--config"]);
    refused(full.arg(workspace.config()), 2, &["/proc/store: the store needs about", "only 0.0 MiB are free"]);
    // A file where the folder should be.
    refused(
        &mut capture_command(&workspace, "conversations.jsonl", &[]),
        2,
        &["conversations.jsonl", "Not a directory"],
    );
    let mut nowhere = specforge(&["capture", "--config"]);
    refused(nowhere.arg(workspace.config()), 2, &["--out", "target.feature_store"]);
    // The store's name may stand in the configuration.
    workspace.set("target.feature_store", workspace.path("store").to_str().unwrap());
    let mut named = specforge(&["capture", "--json", "--device", "cpu", "--shard-tokens", "600", "--config"]);
    assert_eq!(json_of(named.arg(workspace.config()))["tokens_captured"], 0);

    // States that are not finite, of weights that are.
    let mut tensors = model_tensors(&model_config(&json!({})));
    drop(tensors.last_mut().unwrap().1.get(0).fill_(1.0));
    let down = tensors.iter_mut().find(|(name, _)| name == "model.layers.0.mlp.down_proj.weight").unwrap();
    drop(down.1.get(0).fill_(3e38));
    weights::write_tensors(&workspace.path("model/model.safetensors"), &tensors, &[]).unwrap();
    let words = ["hidden state 1 of document `", "is not finite"];
    refused(&mut capture_command(&workspace, "infinite", &["--layers", "1"]), 1, &words);
    assert_eq!(litter(&workspace.path("infinite")), Vec::<PathBuf>::new());
}

/// Files that may not grow beyond a limit are what a full disk looks like from inside.
#[test]
fn a_full_disk_costs_the_shard_at_hand_and_nothing_else() {
    let workspace = Workspace::new();
    // Shards of 20 KiB, and then a document with a shard of its own that does not fit.
    let arguments = ["--dtype", "float32", "--shard-tokens", "60"];
    capture(&workspace, "whole", &arguments);
    let sizes: Vec<u64> = files_of(&workspace.path("whole"))
        .iter()
        .filter(|(path, _)| path.extension().is_some_and(|kind| kind == "safetensors"))
        .map(|(_, bytes)| bytes.len() as u64)
        .collect();
    // In KiB: a limit that the first shard stays below and a later one does not.
    let limit = sizes[0].div_ceil(1024);
    assert!(sizes.iter().any(|size| *size > limit << 10), "{sizes:?}");
    let command = capture_command(&workspace, "store", &arguments);
    let mut limited = Command::new("bash");
    limited.args(["-c", &format!("trap '' XFSZ; ulimit -f {limit}; exec \"$@\""), "bash"]);
    limited.arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs().filter_map(|(key, value)| Some((key, value?))) {
        limited.env(key, value);
    }
    refused(&mut limited, 1, &["error: cannot write", "File too large"]);
    let store = workspace.path("store");
    assert_eq!(litter(&store), Vec::<PathBuf>::new());
    assert!(shards_of(&store) > 0);
    capture(&workspace, "store", &arguments);
    assert!(files_of(&store) == files_of(&workspace.path("whole")), "the stores differ");
}
