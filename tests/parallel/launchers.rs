//! Launchers that others made. They are no part of this repository: `scripts/slurm-check` brings the machine what it
//! needs and names it in the environment; without that, these tests say that they were skipped.

use std::process::Command;

use super::{assert_same_run, eagle3, workspace};
use crate::fixture::{json_of, output_of, stderr_of};

/// A program that a script names, or nothing, said aloud.
fn launcher(variable: &str, script: &str) -> Option<std::ffi::OsString> {
    let named = std::env::var_os(variable);
    if named.is_none() {
        println!("SKIPPED: {variable} names no launcher; {script} sets it");
    }
    named
}

/// `launcher` before a command, in the command's own environment.
fn under(launcher: &std::ffi::OsStr, arguments: &[&str], inner: &Command) -> Command {
    let mut command = Command::new(launcher);
    command.args(arguments).arg(inner.get_program()).args(inner.get_args());
    for (key, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    command.stdin(std::process::Stdio::null()).current_dir(env!("CARGO_TARGET_TMPDIR"));
    command
}

#[test]
fn slurm() {
    let Some(srun) = launcher("SPECFORGE_SRUN", "scripts/slurm-check") else { return };
    let workspace = workspace(eagle3());
    workspace.train("alone", &[]);
    // More tasks than the machine has processors is what `--overcommit` allows.
    let step = ["--ntasks=2", "--overcommit", "--kill-on-bad-exit"];
    let report = json_of(&mut under(&srun, &step, &workspace.train_command("slurm", &[])));
    assert_eq!(report["steps"], 6);
    assert_same_run(&workspace, "slurm", "alone", 6);
    // A folder that holds a run already: the first rank's message reaches the user, and every rank ends.
    let output = output_of(&mut under(&srun, &step, &workspace.train_command("slurm", &[])));
    assert!(!output.status.success());
    assert!(stderr_of(&output).contains("already holds a run"), "{}", stderr_of(&output));
}
