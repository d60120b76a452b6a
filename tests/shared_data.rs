//! Processes that want the same tokens at once: one makes them, the others wait, and nothing that happens to one of them
//! hurts the others. Real processes, real signals.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Output};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::fixture::{conversations, specforge, stderr_of, write_model};
use crate::processes::PATIENCE;

/// A folder with a model and conversations, where the cache will be too.
fn folder_with(lines: &str) -> TempDir {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    write_model(&folder.path().join("model"), &Value::Object(serde_json::Map::new()));
    fs::write(folder.path().join("data.jsonl"), lines).unwrap();
    folder
}

fn start(folder: &Path) -> Child {
    let mut command = specforge(&["inspect", "--json", "--show", "0", "--target", "model", "--data", "data.jsonl"]);
    command.current_dir(folder).env("RAYON_NUM_THREADS", "1").spawn().unwrap()
}

/// Waits for the end of a process; one that hangs is killed, and its output says so.
fn finish(mut child: Child) -> Output {
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > PATIENCE {
            child.kill().unwrap();
        }
        sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

fn cache_of(folder: &Path) -> PathBuf {
    folder.join(".cache/tokens")
}

fn names_in(folder: &Path) -> Vec<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Demands success of all and that they saw the same; returns how many made the cache themselves.
fn makers(outputs: &[Output]) -> usize {
    let report = |output: &Output| -> Value {
        assert!(output.status.success(), "{}\n{}", output.status, stderr_of(output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let reports: Vec<Value> = outputs.iter().map(report).collect();
    assert!(reports.iter().all(|report| report["statistics"] == reports[0]["statistics"]));
    reports.iter().filter(|report| report["build"]["from_cache"] == false).count()
}

/// The process that is making the cache, once it has made some of it.
fn process_at_work(cache: &Path) -> u32 {
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        let entries = fs::read_dir(cache).into_iter().flatten().map(|entry| entry.unwrap().path());
        let locks = entries.filter(|path| path.extension().is_some_and(|extension| extension == "lock"));
        for text in locks.filter_map(|path| fs::read(path).ok()) {
            let Ok(state) = serde_json::from_slice::<Value>(&text) else { continue };
            if state["making"]["done"].as_u64().is_some_and(|done| done > 0) {
                return state["making"]["process"].as_u64().unwrap() as u32;
            }
        }
        sleep(Duration::from_millis(1));
    }
    panic!("nobody makes the cache");
}

#[test]
fn one_of_many_makes_the_tokens() {
    let folder = folder_with(&conversations(3000));
    let children: Vec<Child> = (0..5).map(|_| start(folder.path())).collect();
    let outputs: Vec<Output> = children.into_iter().map(finish).collect();
    assert_eq!(makers(&outputs), 1);
    let names = names_in(&cache_of(folder.path()));
    assert!(names.len() == 1 && names[0].ends_with(".tokens"), "{names:?}");
}

/// The one that makes them is killed half way: another one starts anew, the rest goes on waiting.
#[test]
fn another_one_takes_over_from_a_killed_process() {
    let folder = folder_with(&conversations(12_000));
    let mut children: Vec<Child> = (0..4).map(|_| start(folder.path())).collect();
    let cache = cache_of(folder.path());
    let at_work = process_at_work(&cache);
    let place = children.iter().position(|child| child.id() == at_work).expect("a process of this test");
    let mut killed = children.remove(place);
    killed.kill().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&killed.wait().unwrap()), Some(9));
    // Killed before it was done: what it wrote is still there under its temporary name, or has just been cleared.
    assert!(!names_in(&cache).iter().any(|name| name.ends_with(".tokens") && !name.starts_with('.')));
    let outputs: Vec<Output> = children.into_iter().map(finish).collect();
    assert_eq!(makers(&outputs), 1);
    let names = names_in(&cache);
    assert!(names.len() == 1 && names[0].ends_with(".tokens"), "{names:?}");
}

#[test]
fn data_that_cannot_be_used_is_everybodys_error() {
    let folder = folder_with(&"{\"messages\": 7}\n".repeat(5000));
    let children: Vec<Child> = (0..4).map(|_| start(folder.path())).collect();
    for output in children.into_iter().map(finish) {
        let message = stderr_of(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains("error: ") && message.contains("data.jsonl"), "{message}");
    }
    assert_eq!(names_in(&cache_of(folder.path())), Vec::<String>::new());
}
