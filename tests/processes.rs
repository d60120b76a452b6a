//! Processes that tests watch, wait for and kill.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

/// No wait is longer.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// Children of a process.
pub fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// Whether a process runs; one that ended and was not waited for does not.
pub fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
}

/// Sends a signal such as `TERM` to a process, which may be gone already.
pub fn signal(pid: u32, name: &str) {
    let _ = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).stderr(Stdio::null()).status().unwrap();
}

/// The end of a command that must come to one.
pub fn end_of(child: Child) -> Output {
    let (pid, started) = (child.id(), Instant::now());
    let waiting = std::thread::spawn(move || child.wait_with_output().unwrap());
    while !waiting.is_finished() {
        if started.elapsed() > PATIENCE {
            signal(pid, "KILL");
            panic!("the command hangs");
        }
        sleep(Duration::from_millis(10));
    }
    waiting.join().unwrap()
}

/// Looks every so often until `reached`; false if the process ended before.
pub fn wait_for(child: &mut Child, reached: impl Fn() -> bool) -> bool {
    let started = Instant::now();
    while !reached() {
        assert!(started.elapsed() < PATIENCE, "the run hangs");
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        sleep(Duration::from_micros(200));
    }
    true
}

/// The last step in a run's log; 0 if there is none.
pub fn logged_step(run: &Path) -> u64 {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    let last = text.lines().next_back().and_then(|line| serde_json::from_str::<Value>(line).ok());
    last.and_then(|row| row["step"].as_u64()).unwrap_or(0)
}
