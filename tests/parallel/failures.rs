//! What goes wrong while several processes train: ranks that are killed, disks that are full, signals. The last
//! checkpoint stays whole, nothing runs on, and going on ends in the very bytes of the run that nobody disturbed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use specforge::nn::noise;

use super::{launch_command, medusa};
use crate::fixture::{Workspace, json_of, litter, output_of, specforge, stderr_of};
use crate::processes::{PATIENCE, children, is_alive, logged_step, signal, wait_for};

const STEPS: u64 = 40;

/// A run of two ranks with a checkpoint every fifth step, and steps long enough to be hit.
fn workspace() -> Workspace {
    let mut workspace = Workspace::with_model(&json!({"vocab_size": 2000, "hidden_size": 64}));
    workspace.configuration["draft"] = medusa();
    workspace.set("train.max_steps", STEPS).set("train.save_every", 5);
    workspace
}

fn has_checkpoint(run: &Path) -> bool {
    let names = fs::read_dir(run).map(|entries| entries.flatten().map(|entry| entry.file_name()).collect::<Vec<_>>());
    names.unwrap_or_default().iter().any(|name| name.to_string_lossy().starts_with("step-"))
}

/// The last checkpoint is that of the reference to the byte.
#[track_caller]
fn assert_same_bytes(run: &Path, reference: &Path) {
    assert_same_bytes_at(STEPS, run, reference);
}

#[track_caller]
fn assert_same_bytes_at(step: u64, run: &Path, reference: &Path) {
    for name in ["model.safetensors", "optimizer.safetensors"] {
        let read = |run: &Path| fs::read(run.join(format!("step-{step:08}")).join(name)).unwrap();
        assert!(read(run) == read(reference), "{name} differs");
    }
    assert_eq!(litter(run), Vec::<PathBuf>::new());
}

/// Kills a rank that is chosen by `random`, or the launcher itself, and watches everything end. Returns whether the run
/// was still going on.
fn kill_one(child: &mut Child, ranks: &[u32], random: u64) -> bool {
    let victim = match random % 5 {
        0 => child.id(), // the launcher
        other => ranks[other as usize % ranks.len()],
    };
    signal(victim, "KILL");
    let killed = Instant::now();
    wait_for(child, || false);
    assert!(killed.elapsed() < PATIENCE, "the launcher took {:?} to end", killed.elapsed());
    let hit = !child.wait().unwrap().success();
    let gone = || ranks.iter().all(|&rank| !is_alive(rank));
    while !gone() {
        assert!(killed.elapsed() < PATIENCE, "a rank outlives its launcher");
        sleep(Duration::from_millis(5));
    }
    hit
}

/// Kills a run of two ranks again and again, at any moment, and lets it go on each time.
fn kills_change_nothing(kills: u64, seed: u64) {
    let workspace = workspace();
    json_of(&mut launch_command(&workspace, 2, "undisturbed", &[]));
    let run = workspace.path("killed");
    let (mut hits, mut starts) = (0, 0);
    while hits < kills {
        starts += 1;
        let start = starts;
        let random = |stream: u64| noise::keyed_bits(seed, stream, start, 0);
        assert!(starts <= 3 * kills, "most runs end before they are killed");
        if logged_step(&run) + 15 >= STEPS {
            fs::remove_dir_all(&run).unwrap(); // too little is left to be hit: begin anew
        }
        let resume: &[&str] = if has_checkpoint(&run) { &["--resume"] } else { &[] };
        let mut command = launch_command(&workspace, 2, "killed", resume);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let pid = child.id();
        assert!(wait_for(&mut child, || children(pid).len() == 2), "the launcher ended before its ranks started");
        let ranks = children(pid);
        // While the ranks start and meet, or after some steps and a bit.
        let steps = random(1) % 8;
        let goal = if steps == 0 { 0 } else { logged_step(&run) + steps };
        wait_for(&mut child, || logged_step(&run) >= goal);
        sleep(Duration::from_micros(random(2) % if steps == 0 { 1_500_000 } else { 60_000 }));
        if kill_one(&mut child, &ranks, random(3)) {
            hits += 1;
            println!(
                "kill {hits} of {}: after step {goal}",
                if random(3) % 5 == 0 { "the launcher" } else { "a rank" }
            );
        }
    }
    let resume: &[&str] = if has_checkpoint(&run) { &["--resume"] } else { &[] };
    json_of(&mut launch_command(&workspace, 2, "killed", resume));
    assert_same_bytes(&run, &workspace.path("undisturbed"));
}

#[test]
fn kills_of_any_rank_at_any_moment_change_nothing() {
    kills_change_nothing(4, u64::from(std::process::id()));
}

/// The soak test: thirty kills.
#[test]
#[ignore = "takes minutes; scripts/test --long runs it"]
fn thirty_kills_change_nothing() {
    kills_change_nothing(30, u64::from(std::process::id()));
}

/// Ranks are killed under a launcher that starts them again by itself.
fn restarts_change_nothing(kills: usize) {
    let workspace = workspace();
    json_of(&mut launch_command(&workspace, 2, "undisturbed", &[]));
    let run = workspace.path("killed");
    let restarts = kills.to_string();
    let launcher = ["--nproc-per-node", "2", "--max-restarts", &restarts];
    let mut command = super::launched(&workspace, &launcher, "killed", &["--set", "train.save_every=1"]);
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    let pid = child.id();
    let mut before: Vec<u32> = Vec::new();
    for kill in 0..kills {
        let fresh = || {
            let ranks = children(pid);
            ranks.len() == 2 && ranks.iter().all(|rank| !before.contains(rank))
        };
        assert!(wait_for(&mut child, fresh), "the launcher gave up at kill {kill}");
        let ranks = children(pid);
        let goal = logged_step(&run) + 1;
        assert!(wait_for(&mut child, || logged_step(&run) >= goal), "the run ended before kill {kill}");
        signal(ranks[kill % 2], "KILL");
        before = ranks;
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["steps"], STEPS);
    assert_same_bytes(&run, &workspace.path("undisturbed"));
}

#[test]
fn a_launcher_restarts_what_was_killed() {
    restarts_change_nothing(3);
}

#[test]
#[ignore = "takes minutes; scripts/test --long runs it"]
fn thirty_restarts_change_nothing() {
    restarts_change_nothing(30);
}

/// A run that no test waits for to end: its length is decided by where it was stopped, which a constant rate allows.
fn endless() -> Workspace {
    let mut workspace = workspace();
    workspace.set("train.max_steps", 1_000_000);
    workspace.set("optim.schedule", json!({"kind": "constant", "warmup_steps": 3}));
    workspace
}

/// One signal to the launcher, and all ranks stop after the same step with everything saved.
#[test]
fn a_polite_signal_saves_and_ends_well() {
    let workspace = endless();
    for (name, number) in [("TERM", 15), ("INT", 2)] {
        let run = workspace.path(name);
        let mut child = launch_command(&workspace, 2, name, &[]).stderr(Stdio::null()).spawn().unwrap();
        assert!(wait_for(&mut child, || logged_step(&run) >= 7), "the run ended before it was asked to");
        signal(child.id(), name);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let steps = report["steps"].as_u64().unwrap();
        assert_eq!(report["stopped_by"], number);
        assert!(steps >= 7, "{steps}");
        let (end, whole) = (steps + 3, format!("{name}-undisturbed"));
        let length = format!("train.max_steps={end}");
        json_of(&mut launch_command(&workspace, 2, name, &["--resume", "--set", &length]));
        json_of(&mut launch_command(&workspace, 2, &whole, &["--set", &length]));
        assert_same_bytes_at(end, &run, &workspace.path(&whole));
    }
}

/// A signal that reaches one rank alone, as a scheduler may send it, stops all of them after one step. Rank 0 says so.
#[test]
fn a_signal_to_one_rank_stops_all() {
    let workspace = endless();
    let run = workspace.path("run");
    let mut child = launch_command(&workspace, 2, "run", &[]).spawn().unwrap();
    let pid = child.id();
    assert!(wait_for(&mut child, || logged_step(&run) >= 7), "the run ended before it was asked to");
    let ranks = children(pid);
    signal(ranks[1], "TERM");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["stopped_by"], 15);
    assert_eq!(stderr_of(&output).matches("stopping").count(), 1, "{}", stderr_of(&output));
}

/// Each rank checks its share of a store, and what one finds stops all before the first step, with that rank's message.
#[test]
fn a_damaged_shard_stops_all_whichever_rank_finds_it() {
    let workspace = Workspace::new();
    let store = workspace.path("store");
    let mut capture = specforge(&["capture", "--json", "--device", "cpu", "--shard-tokens", "500", "--config"]);
    let report = json_of(capture.arg(workspace.config()).arg("--out").arg(&store));
    assert!(report["shards"].as_u64().unwrap() >= 3, "{report}");
    let from_store = format!("target.feature_store={}", store.display());
    for (shard, rank) in [(0, 0), (1, 1), (2, 0)] {
        let name = format!("shard-{shard:05}.safetensors");
        let whole = fs::read(store.join(&name)).unwrap();
        let mut damaged = whole.clone();
        let middle = damaged.len() / 2;
        damaged[middle] ^= 1;
        fs::write(store.join(&name), damaged).unwrap();
        let run = format!("damaged-{shard}");
        let output = output_of(&mut launch_command(&workspace, 2, &run, &["--set", &from_store]));
        let message = stderr_of(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        let last = message.lines().rev().find(|line| line.starts_with("error: ")).unwrap();
        assert!(last.contains(&format!("rank {rank}")) && last.contains("is damaged"), "{message}");
        assert!(message.contains(&name), "{message}");
        assert!(!workspace.path(&run).join("metrics.jsonl").exists());
        fs::write(store.join(&name), whole).unwrap();
    }
    let report = json_of(&mut launch_command(&workspace, 2, "sound", &["--set", &from_store]));
    assert_eq!(report["steps"], 4);
}

/// The disk fills while rank 0 saves: all ranks end, the message is that of the disk, the older checkpoint stays.
#[test]
fn a_full_disk_ends_all_ranks_and_keeps_the_last_checkpoint() {
    let workspace = workspace();
    let run = workspace.path("run");
    json_of(&mut launch_command(
        &workspace,
        2,
        "run",
        &["--set", "train.max_steps=5", "--set", "optim.schedule.total_steps=40"],
    ));
    let checkpoint = run.join("step-00000005");
    let before = crate::fixture::contents(&checkpoint);
    let size = fs::metadata(checkpoint.join("optimizer.safetensors")).unwrap().len();
    let resume = ["--resume", "--set", "optim.schedule.total_steps=40"];
    let output = output_of(&mut crate::bad_input::resources::limited(
        &format!("-f {}", (size / 2) >> 10),
        &launch_command(&workspace, 2, "run", &resume),
    ));
    let message = stderr_of(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("cannot write") && message.contains("File too large"), "{message}");
    let last = message.lines().rev().find(|line| line.starts_with("error: ")).unwrap();
    assert!(last.contains("rank 0") && last.contains("File too large"), "{message}");
    assert!(crate::fixture::contents(&checkpoint) == before, "the older checkpoint changed");
    assert_eq!(litter(&run), Vec::<PathBuf>::new());
    let report = json_of(&mut launch_command(&workspace, 2, "run", &resume));
    assert_eq!(report["steps"], STEPS);
}
