//! Disks that fill up and memory that is not there.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use serde_json::json;

use super::train;
use super::train::resume;
use crate::fixture::{Workspace, contents, json_of, litter, output_of, specforge, stderr_of};

/// A command under a limit that bash's `ulimit` sets, in the same environment. One that hangs is killed.
pub(crate) fn limited(limit: &str, inner: &Command) -> Command {
    let mut command = Command::new("bash");
    // A file beyond its limit then fails to be written instead of raising a signal.
    let script = format!("trap '' XFSZ; ulimit {limit}; exec timeout -s KILL 60 \"$@\"");
    command.args(["-c", &script, "limited"]).arg(inner.get_program()).args(inner.get_args());
    for (key, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    command.stdin(std::process::Stdio::null());
    command
}

/// Files that may not grow beyond a limit are what a full disk looks like from inside: some writes succeed, and then
/// one does not.
#[test]
fn a_full_disk_costs_the_new_checkpoint_and_nothing_else() {
    let mut workspace = Workspace::new();
    // A constant rate, so that a longer run begins like a shorter one.
    workspace.set("train.save_every", 2).set("train.max_steps", 2).set("optim.schedule", json!({"kind": "constant"}));
    workspace.train("run", &[]);
    let checkpoint = workspace.path("run/step-00000002");
    let size = |name: &str| fs::metadata(checkpoint.join(name)).unwrap().len();
    let (model, optimizer) = (size("model.safetensors"), size("optimizer.safetensors"));
    let before = contents(&checkpoint);
    workspace.set("train.max_steps", 6);
    // The model file fits and the optimizer's does not; not even the model file fits.
    for limit in [(model + optimizer) / 2, model / 2] {
        let output = output_of(&mut limited(&format!("-f {}", limit >> 10), &resume(&workspace, &[])));
        let message = stderr_of(&output);
        println!("{message}");
        assert_eq!(output.status.signal(), None);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(
            message.contains("error: cannot write") && message.contains("safetensors: File too large"),
            "{message}"
        );
        assert!(!message.contains("panicked") && !message.contains("internal"), "{message}");
        assert_eq!(output.stdout, b"");
        assert!(contents(&checkpoint) == before, "the older checkpoint changed");
        assert!(!workspace.path("run/step-00000004").exists());
        assert_eq!(litter(&workspace.path("run")), Vec::<std::path::PathBuf>::new());
    }
    // With room again, the run goes on as if nothing had been.
    let report = json_of(&mut resume(&workspace, &[]));
    assert_eq!(report["steps"], 6);
    let undisturbed = workspace.train("undisturbed", &[]);
    assert_eq!(undisturbed["end"], report["end"]);
}

/// The real thing, where the machine lets one be made: a file system of one mebibyte.
#[test]
fn a_file_system_without_room() {
    let workspace = Workspace::new();
    let small = workspace.path("small");
    fs::create_dir(&small).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=200k", "specforge-test"]).arg(&small).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        println!("no file system can be mounted here; the limit on file sizes stands for it");
        return;
    }
    let output = output_of(&mut workspace.train_command("small/run", &[]));
    let left = litter(&small);
    let has_checkpoint = small.join("run/step-00000004").exists();
    assert!(Command::new("umount").arg(&small).status().unwrap().success());
    let message = stderr_of(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("No space left on device"), "{message}");
    assert!(message.contains("hint: free some space or choose another folder"), "{message}");
    assert!(!has_checkpoint);
    assert_eq!(left, Vec::<std::path::PathBuf>::new());
}

/// A result that nobody can read is no success.
#[test]
fn results_that_cannot_be_printed() {
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = output_of(specforge(&["doctor"]).stdout(full));
    assert_eq!(output.status.code(), Some(1), "{}", stderr_of(&output));
    let want = "error: cannot write standard output: No space left on device (os error 28)\n\
                hint: free some space or choose another folder\n";
    assert_eq!(stderr_of(&output), want);
}

/// libtorch's own refusals, here of memory, are one line of ours. A backtrace would take memory that is not there.
#[test]
fn memory_that_is_not_there() {
    let mut workspace = Workspace::with_model(&json!({"vocab_size": 100_000}));
    workspace.set("draft.num_heads", 32);
    for backtrace in ["0", "1"] {
        let mut command = train(&workspace);
        command.env("RUST_BACKTRACE", backtrace);
        let output = output_of(&mut limited("-v 1300000", &command));
        let message = stderr_of(&output);
        println!("{message}");
        assert_eq!(output.status.code(), Some(1), "{message}");
        let error = message.lines().find(|line| line.starts_with("error: ")).unwrap();
        assert!(error.contains("memory"), "{message}");
        assert!(message.contains("hint: lower train.micro_batch_tokens"), "{message}");
        assert!(!message.contains("frame #") && !message.contains("panicked"), "{message}");
        assert_eq!(litter(&workspace.path("run")), Vec::<std::path::PathBuf>::new());
    }
}
