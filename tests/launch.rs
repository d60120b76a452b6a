//! `specforge launch` with the real program: mistakes are said once, results stay results, and no process outlives its
//! launcher. The same under torchrun, where there is one.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::fixture::{Workspace, output_of, specforge, stderr_of};
use crate::processes::{PATIENCE, children, end_of, is_alive, signal};

fn launch(arguments: &[&str]) -> Command {
    let mut command = specforge(&["launch"]);
    command.args(arguments);
    command
}

fn until(what: &str, reached: impl Fn() -> bool) {
    let started = Instant::now();
    while !reached() {
        assert!(started.elapsed() < PATIENCE, "{what} never came");
        sleep(Duration::from_millis(5));
    }
}

/// A configuration that nobody writes: whoever reads it waits.
fn endless_configuration(workspace: &Workspace) -> PathBuf {
    let path = workspace.path("pipe.json");
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    path
}

#[test]
fn a_command_line_that_cannot_be_launched_is_refused_before_anything_starts() {
    let refused = |arguments: &[&str]| {
        let output = output_of(&mut launch(arguments));
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert_eq!(output.stdout, b"");
        stderr_of(&output)
    };
    let one = ["--nproc-per-node", "2"];
    let with = |more: &[&str]| refused(&[&one[..], more].concat());
    assert_eq!(
        with(&["doctor"]),
        "error: launch: `doctor` runs as one process; `train`, `capture`, `regen` and `eval` can be launched\n"
    );
    let message = with(&["train", "--confg", "x"]);
    assert!(message.starts_with("error: unexpected argument '--confg'"), "{message}");
    assert_eq!(message.matches("error").count(), 1, "{message}");
    let train = ["train", "--config", "x"];
    assert!(
        refused(&[&["--nproc-per-node", "0"], &train[..]].concat()).contains("expected a number from 1 on, or auto")
    );
    let message = with(&[&["--nnodes", "2"], &train[..]].concat());
    assert_eq!(message, "error: --node-rank is missing: --nnodes 2 needs it on every machine\n");
    let message = with(&[&["--nnodes", "2", "--node-rank", "2"], &train[..]].concat());
    assert_eq!(message, "error: --node-rank: expected less than --nnodes, which is 2, got 2\n");
    let message = with(&[&["--nnodes", "2", "--node-rank", "1"], &train[..]].concat());
    assert!(message.starts_with("error: --master-addr is missing"), "{message}");
}

#[test]
fn help_of_what_is_launched_is_its_own() {
    let output = output_of(&mut launch(&["--nproc-per-node", "2", "train", "--help"]));
    assert_eq!(output.status.code(), Some(0), "{}", stderr_of(&output));
    assert!(String::from_utf8(output.stdout).unwrap().contains("Usage: specforge train"));
}

#[test]
fn bad_input_of_all_ranks_is_one_error_at_the_end() {
    let message = |output: &Output| {
        assert_eq!(output.status.code(), Some(2), "{}", stderr_of(output));
        assert_eq!(output.stdout, b"");
        stderr_of(output)
    };
    let arguments = ["--nproc-per-node", "2", "--max-restarts", "3", "train", "--config", "/nowhere/run.json"];
    let text = message(&output_of(&mut launch(&arguments)));
    let own: Vec<&str> = text.lines().filter(|line| !line.starts_with("[rank ")).collect();
    assert_eq!(own.len(), 1, "{text}");
    assert!(
        own[0].starts_with("error: rank ") && own[0].contains(") failed: cannot read /nowhere/run.json: No such"),
        "{text}"
    );
    assert!(
        text.contains("[rank 0] error: cannot read /nowhere/run.json") || text.contains("[rank 1] error: "),
        "{text}"
    );
}

#[test]
fn results_of_the_first_rank_are_results() {
    let workspace = Workspace::new();
    let config = workspace.config();
    let arguments =
        ["--json", "--nproc-per-node", "1", "train", "--device", "cpu", "--config", config.to_str().unwrap()];
    let output = end_of(launch(&arguments).spawn().unwrap());
    assert_eq!(output.status.code(), Some(0), "{}", stderr_of(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["steps"], 4);
    let text = stderr_of(&output);
    assert!(text.lines().count() > 2 && text.lines().all(|line| line.starts_with("[rank 0] ")), "{text}");
}

/// The plan is printed once, and says what one of the ranks takes: a share of the optimizer's state, more of gradients.
#[test]
fn a_plan_is_one_ranks() {
    let workspace = Workspace::new();
    let config = workspace.config();
    let plan = |ranks: &str, more: &[&str]| {
        let train = ["train", "--plan", "--config", config.to_str().unwrap()];
        let output = output_of(&mut launch(&[&["--json", "--nproc-per-node", ranks], &train[..], more].concat()));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let (one, three) = (plan("1", &[]), plan("3", &[]));
    assert_eq!((&one["world_size"], &three["world_size"]), (&Value::from(1), &Value::from(3)));
    let bytes = |plan: &Value, key: &str| plan["memory"][key].as_u64().unwrap();
    assert_eq!(bytes(&three, "optimizer"), bytes(&one, "optimizer").div_ceil(3));
    assert_eq!(bytes(&three, "gradients"), 2 * bytes(&one, "gradients"));
    assert_eq!((&three["checkpoint_bytes"], &three["steps"]), (&one["checkpoint_bytes"], &one["steps"]));
    let whole = plan("3", &["--set", "parallel.shard_optimizer=false"]);
    assert_eq!(bytes(&whole, "optimizer"), bytes(&one, "optimizer"));
}

#[test]
fn no_process_outlives_a_launcher_that_is_killed() {
    let workspace = Workspace::new();
    let config = endless_configuration(&workspace);
    let child = launch(&["--nproc-per-node", "2", "train", "--config", config.to_str().unwrap()]).spawn().unwrap();
    let pid = child.id();
    until("the ranks", || children(pid).len() == 2);
    let ranks = children(pid);
    assert!(ranks.iter().all(|&rank| is_alive(rank)));
    signal(pid, "KILL");
    assert_eq!(end_of(child).status.code(), None);
    until("the end of the ranks", || !ranks.iter().any(|&rank| is_alive(rank)));
}

/// Before a rank can save anything, a signal ends it, and the launcher too, which starts nothing again.
#[test]
fn a_signal_before_training_ends_everything() {
    let workspace = Workspace::new();
    let config = endless_configuration(&workspace);
    let arguments = ["--nproc-per-node", "2", "--max-restarts", "3", "train", "--config", config.to_str().unwrap()];
    let child = launch(&arguments).spawn().unwrap();
    let pid = child.id();
    until("the ranks", || children(pid).len() == 2);
    let ranks = children(pid);
    signal(pid, "TERM");
    let output = end_of(child);
    assert_eq!(output.status.signal(), Some(15), "{}", stderr_of(&output));
    assert!(!ranks.iter().any(|&rank| is_alive(rank)));
}

/// The program of the variable SPECFORGE_TORCHRUN, which scripts/torchrun-check sets.
fn torchrun() -> Option<Command> {
    let Some(program) = std::env::var_os("SPECFORGE_TORCHRUN") else {
        println!("SKIPPED: SPECFORGE_TORCHRUN names no torchrun; scripts/torchrun-check has one");
        return None;
    };
    let inner = specforge(&[]);
    let mut command = Command::new(program);
    command.args(["--standalone", "--no-python", "--nproc-per-node", "2"]).arg(inner.get_program());
    command.envs(inner.get_envs().filter_map(|(key, value)| Some((key, value?))));
    command.current_dir(env!("CARGO_TARGET_TMPDIR"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Some(command)
}

#[test]
fn torchrun_shows_the_error_of_a_rank() {
    let Some(mut command) = torchrun() else { return };
    let output = end_of(command.args(["train", "--config", "/nowhere/run.json"]).spawn().unwrap());
    let text = stderr_of(&output);
    assert!(!output.status.success(), "{text}");
    let root = text.split("Root Cause (first observed failure):").nth(1).unwrap_or_else(|| panic!("{text}"));
    assert!(root.contains("traceback : cannot read /nowhere/run.json: No such file"), "{text}");
    assert!(root.contains("exitcode  : 2"), "{text}");
}

#[test]
fn torchrun_trains_as_one_process_does() {
    let Some(mut command) = torchrun() else { return };
    let workspace = Workspace::new();
    let alone = workspace.train("alone", &[]);
    command.args(["train", "--json", "--device", "cpu", "--config"]).arg(workspace.config());
    command.arg("--set").arg(format!("train.output_dir={}", workspace.path("both").display()));
    let output = end_of(command.spawn().unwrap());
    assert!(output.status.success(), "{}", stderr_of(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["steps"], &report["tokens"]), (&alone["steps"], &alone["tokens"]));
    for (name, value) in alone["end"].as_object().unwrap() {
        let (value, other) = (value.as_f64().unwrap(), report["end"][name].as_f64().unwrap());
        assert!((value - other).abs() <= 1e-4 * value.abs().max(1.0), "{name}: {value} alone, {other} with two");
    }
}
