//! A run that is killed or asked to stop, and goes on, ends with the very bytes of a run that nobody disturbed:
//! parameters, optimizer, schedule and order of the data included. Real processes, real signals.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use serde_json::Value;
use specforge::nn::noise;

use crate::fixture::{Workspace, contents, json_of, litter, output_of, specforge, stderr_of};
use crate::processes::{logged_step, wait_for};

mod content;
mod going_back;

const STEPS: u64 = 40;

/// A run of 40 steps with 20 between checkpoints, evaluated now and then.
fn workspace(vocabulary: i64, hidden: i64) -> Workspace {
    let mut workspace = Workspace::with_model(&serde_json::json!({"vocab_size": vocabulary, "hidden_size": hidden}));
    workspace.set("train.max_steps", STEPS).set("train.save_every", STEPS / 2).set("train.eval_every", 10);
    workspace
}

/// Two threads, so that sums are split as they are on a user's machine.
fn threaded(mut command: Command) -> Command {
    command.env("OMP_NUM_THREADS", "2");
    command
}

fn step_folder(run: &Path, step: u64) -> PathBuf {
    run.join(format!("step-{step:08}"))
}

/// Step of the newest checkpoint; 0 if there is none.
fn newest_step(run: &Path) -> u64 {
    let entries = fs::read_dir(run).map(|entries| entries.flatten().collect::<Vec<_>>()).unwrap_or_default();
    let names = entries.iter().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter_map(|name| name.strip_prefix("step-")?.parse().ok()).max().unwrap_or(0)
}

/// Whether a checkpoint is being written right now.
fn is_saving(run: &Path) -> bool {
    let entries = fs::read_dir(run).map(|entries| entries.flatten().collect::<Vec<_>>()).unwrap_or_default();
    entries.iter().any(|entry| {
        entry.file_name().to_string_lossy().starts_with(".partial-")
            && entry.file_type().is_ok_and(|kind| kind.is_dir())
    })
}

/// The logged lines of a run without what depends on the clock.
fn metrics(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        let object = row.as_object_mut().unwrap();
        object.remove("time").unwrap();
        object.retain(|name, _| !name.ends_with("_per_second") && !name.ends_with("_seconds"));
        row
    };
    text.lines().map(line).collect()
}

/// Every step was logged once, with the same figures.
fn assert_same_metrics(run: &Path, reference: &Path) {
    let (rows, expected) = (metrics(run), metrics(reference));
    for (row, expected) in rows.iter().zip(&expected) {
        assert_eq!(row, expected);
    }
    assert_eq!(rows.len(), expected.len());
    assert_eq!(rows.iter().filter(|row| row["train/loss"].is_number()).count(), STEPS as usize);
}

/// The newest checkpoints are the same to the byte, and nothing unfinished is left.
fn assert_same_end(run: &Path, reference: &Path) {
    for name in ["model.safetensors", "optimizer.safetensors"] {
        let read = |run: &Path| fs::read(step_folder(run, STEPS).join(name)).unwrap();
        assert!(read(run) == read(reference), "{name} differs");
    }
    let manifest = |run: &Path| -> Value {
        serde_json::from_slice(&fs::read(step_folder(run, STEPS).join("manifest.json")).unwrap()).unwrap()
    };
    let (manifest, expected) = (manifest(run), manifest(reference));
    for key in ["step", "epoch", "position", "tokens_seen", "data_hashes", "metrics", "draft"] {
        assert_eq!(manifest[key], expected[key], "{key}");
    }
    assert_eq!(litter(run), Vec::<PathBuf>::new());
}

/// The checkpoint of step 20 is there, the one of step 40 is being written, and then the process is gone.
#[test]
fn a_kill_while_saving_loses_nothing_that_was_saved() {
    // Large projections, so that a save takes long enough to be hit.
    let workspace = workspace(6000, 64);
    json_of(&mut threaded(workspace.train_command("undisturbed", &[])));
    let reference = workspace.path("undisturbed");
    let run = (0..10)
        .map(|attempt| format!("killed{attempt}"))
        .find(|name| {
            let run = workspace.path(name);
            let mut child = threaded(workspace.train_command(name, &[])).spawn().unwrap();
            let hit = wait_for(&mut child, || step_folder(&run, STEPS / 2).exists())
                && wait_for(&mut child, || is_saving(&run));
            child.kill().unwrap();
            child.wait().unwrap();
            hit && !step_folder(&run, STEPS).exists()
        })
        .expect("one of ten kills comes in time");
    assert!(!litter(&workspace.path(&run)).is_empty(), "the kill left nothing unfinished");

    let again = output_of(&mut threaded(workspace.train_command(&run, &[])));
    assert_eq!(again.status.code(), Some(2), "{}", stderr_of(&again));
    assert!(stderr_of(&again).contains("--resume"), "{}", stderr_of(&again));

    let report = json_of(&mut threaded(workspace.train_command(&run, &["--resume"])));
    assert_eq!(report["steps"], STEPS);
    let run = workspace.path(&run);
    assert_same_end(&run, &reference);
    assert_same_metrics(&run, &reference);
}

#[test]
fn kills_at_any_moment_change_nothing() {
    kills_change_nothing(&mut workspace(2000, 64));
}

/// The same for a draft with a vocabulary of its own, a loop of its own and averaged weights, with the target and from a store.
#[test]
fn kills_at_any_moment_change_nothing_for_eagle3() {
    let mut workspace = workspace(2000, 64);
    workspace.configuration["draft"] = serde_json::json!({
        "algorithm": "eagle3", "capture": [0, 1], "draft_vocab_size": 300, "ttt_steps": 3,
    });
    workspace.set("optim.average", 0.9);
    kills_change_nothing(&mut workspace);
    let store = workspace.path("store");
    let mut capture = specforge(&["capture", "--json", "--dtype", "float32", "--device", "cpu", "--config"]);
    json_of(capture.arg(workspace.config()).arg("--out").arg(&store));
    // Online and offline are the same run.
    workspace.set("target.feature_store", store.display().to_string());
    let report = workspace.train("offline", &["--set", "train.save_every=0"]);
    assert_eq!(report["steps"], STEPS);
    assert_same_end(&workspace.path("offline"), &workspace.path("undisturbed"));
    for run in ["undisturbed", "killed"] {
        fs::rename(workspace.path(run), workspace.path(&format!("{run}-online"))).unwrap();
    }
    workspace.set("train.save_every", STEPS / 2);
    kills_change_nothing(&mut workspace);
    assert_same_end(&workspace.path("undisturbed"), &workspace.path("undisturbed-online"));
}

fn kills_change_nothing(workspace: &mut Workspace) {
    json_of(&mut workspace.train_command("undisturbed", &[]));
    workspace.set("train.save_every", 5);
    let run = workspace.path("killed");
    let seed = u64::from(std::process::id());
    let resume = |run: &Path| if newest_step(run) > 0 { &["--resume"][..] } else { &[] };
    // Steps to do before a kill: none is while the program starts, the others are anywhere between two saves.
    for (kill, steps) in [0, 3, 6, 6, 6].into_iter().enumerate() {
        let goal = logged_step(&run) + steps;
        let mut child = workspace.train_command("killed", resume(&run)).spawn().unwrap();
        wait_for(&mut child, || logged_step(&run) >= goal);
        let longest = if steps == 0 { 300_000 } else { 20_000 };
        let pause = Duration::from_micros(noise::keyed_bits(seed, 0, kill as u64, 0) % longest);
        sleep(pause);
        child.kill().unwrap();
        child.wait().unwrap();
        println!("killed {pause:?} after step {goal}; newest checkpoint: {}", newest_step(&run));
    }
    json_of(&mut workspace.train_command("killed", resume(&run)));
    assert_same_end(&run, &workspace.path("undisturbed"));
    assert_same_metrics(&run, &workspace.path("undisturbed"));
}

/// The run has no end of its own, so the signal always comes in time; where it stopped decides how long the run shall be.
#[test]
fn a_polite_signal_saves_and_ends_well() {
    let mut workspace = workspace(1000, 32);
    workspace.set("optim.schedule", serde_json::json!({"kind": "constant", "warmup_steps": 3}));
    workspace.set("train.log_every", 3);
    for (signal, number) in [("TERM", 15), ("INT", 2)] {
        let run = workspace.path(signal);
        let mut child = workspace.train_command(signal, &["--set", "train.max_steps=1000000"]).spawn().unwrap();
        assert!(wait_for(&mut child, || logged_step(&run) >= 7), "the run ended before it was asked to");
        crate::processes::signal(child.id(), signal);
        let output = crate::processes::end_of(child);
        assert_eq!(output.status.code(), Some(0), "{}", stderr_of(&output));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let steps = report["steps"].as_u64().unwrap();
        assert_eq!(report["stopped_by"], number);
        assert!(steps >= 7, "{steps}");
        assert!(step_folder(&run, steps).join("manifest.json").is_file());
        let said = stderr_of(&output).lines().filter(|line| line.starts_with("stopping")).count();
        assert_eq!(said, 1, "{}", stderr_of(&output));

        let end = steps + 5;
        let length = format!("train.max_steps={end}");
        let report = json_of(&mut workspace.train_command(signal, &["--resume", "--set", &length]));
        assert_eq!((&report["steps"], &report["stopped_by"]), (&end.into(), &Value::Null));
        let whole = format!("{signal}-undisturbed");
        json_of(&mut workspace.train_command(&whole, &["--set", &length]));
        let (rows, expected) = (metrics(&run), metrics(&workspace.path(&whole)));
        assert_eq!(rows, expected);
        for name in ["model.safetensors", "optimizer.safetensors"] {
            let read = |run: &Path| fs::read(step_folder(run, end).join(name)).unwrap();
            assert!(read(&run) == read(&workspace.path(&whole)), "{name} differs");
        }
        let best = |run: &Path| fs::read_to_string(run.join("best.json")).unwrap();
        assert_eq!(best(&run), best(&workspace.path(&whole)));
        assert_eq!(litter(&run), Vec::<PathBuf>::new());
    }
}

/// A finished run that is asked to go on does nothing, and says the same.
#[test]
fn resuming_a_finished_run_changes_nothing() {
    let workspace = workspace(600, 32);
    let first = workspace.train("run", &[]);
    let run = workspace.path("run");
    let (before, logged) = (contents(&step_folder(&run, STEPS)), metrics(&run));
    let second = workspace.train("run", &["--resume"]);
    assert_eq!(second["end"], first["end"]);
    assert_eq!(second["checkpoint"], first["checkpoint"]);
    assert!(contents(&step_folder(&run, STEPS)) == before);
    assert!(metrics(&run) == logged, "something was logged again");
}

/// A schedule that is pinned, or that never falls, lets a run grow: the end is that of a run that was long from its
/// start.
#[test]
fn a_run_may_grow_under_a_schedule_that_does_not_depend_on_its_length() {
    for (name, schedule) in [
        ("pinned", serde_json::json!({"kind": "cosine", "total_steps": STEPS, "warmup_ratio": 0.1})),
        ("constant", serde_json::json!({"kind": "constant", "warmup_steps": 3})),
    ] {
        let mut workspace = workspace(600, 32);
        workspace.set("optim.schedule", schedule);
        workspace.train("undisturbed", &[]);
        let short = workspace.train(name, &["--set", "train.max_steps=14"]);
        assert_eq!((&short["steps"], &short["total_steps"]), (&14.into(), &14.into()));
        let report = workspace.train(name, &["--resume"]);
        assert_eq!(report["steps"], STEPS);
        assert_same_end(&workspace.path(name), &workspace.path("undisturbed"));
    }
}

/// A part of a run that was killed after an owed evaluation and before its save leaves a row that the next part writes
/// again: the log has it once.
#[test]
fn an_owed_evaluation_has_one_row_however_often_it_is_made_up_for() {
    let workspace = workspace(600, 32);
    workspace.train("run", &[]);
    let run = workspace.path("run");
    let before = metrics(&run);
    let path = step_folder(&run, STEPS).join("manifest.json");
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    manifest["owed"] = serde_json::json!({"evaluation": true, "decoding": false});
    fs::write(&path, manifest.to_string()).unwrap();
    workspace.train("run", &["--resume"]);
    let evaluations =
        |rows: &[Value]| rows.iter().filter(|row| row["eval/loss"].is_number()).cloned().collect::<Vec<_>>();
    assert!(evaluations(&before).len() > 2);
    assert_eq!(evaluations(&metrics(&run)), evaluations(&before));
}
