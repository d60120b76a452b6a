//! Going on from a checkpoint that is not the newest.

use std::fs;
use std::path::Path;

use serde_json::json;

use super::{assert_same_metrics, metrics};
use crate::fixture::{Workspace, contents, output_of, stderr_of};
use crate::processes::{children, logged_step, signal, wait_for};

/// A run of 40 steps that keeps a checkpoint of every tenth, evaluated there.
fn workspace() -> Workspace {
    let mut workspace = super::workspace(600, 32);
    workspace.set("train.save_every", 10).set("checkpoint.keep_last", 0);
    workspace
}

fn steps(run: &Path) -> Vec<u64> {
    let names = fs::read_dir(run).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut steps: Vec<u64> = names.filter_map(|name| name.strip_prefix("step-")?.parse().ok()).collect();
    steps.sort_unstable();
    steps
}

#[test]
fn a_run_that_goes_back_sets_aside_what_came_later() {
    let workspace = workspace();
    workspace.train("undisturbed", &[]);
    let (run, undisturbed) = (workspace.path("run"), workspace.path("undisturbed"));
    workspace.train("run", &[]);
    let before = metrics(&run);
    let report = workspace.train("run", &["--resume", "20"]);
    assert_eq!(report["steps"], super::STEPS);
    super::assert_same_end(&run, &undisturbed);
    assert_same_metrics(&run, &undisturbed);
    assert_eq!(steps(&run), [10, 20, 30, 40]);
    let aside = run.join("set-aside-1");
    assert_eq!(steps(&aside), [30, 40]);
    assert_eq!(metrics(&aside), before);
    let model = |run: &Path| fs::read(run.join("step-00000040/model.safetensors")).unwrap();
    assert!(model(&aside) == model(&undisturbed), "what was set aside changed");

    // Another way from there, and back again.
    let longer = ["--resume", "10", "--set", "train.micro_batch_tokens=64"];
    workspace.train("run", &longer);
    assert_eq!(steps(&run.join("set-aside-2")), [20, 30, 40]);
    // The newest, by its number: nothing is moved.
    workspace.train("run", &["--resume", "40"]);
    workspace.train("run", &["--resume=newest"]);
    assert!(!run.join("set-aside-3").exists());
}

#[test]
fn the_best_checkpoint_can_be_gone_on_from() {
    let mut workspace = workspace();
    workspace.train("run", &[]);
    let run = workspace.path("run");
    let pointer: serde_json::Value = serde_json::from_slice(&fs::read(run.join("best.json")).unwrap()).unwrap();
    let best = pointer["step"].as_u64().unwrap();
    let output = output_of(&mut workspace.train_command("run", &["--resume", "best"]));
    let message = stderr_of(&output);
    assert!(output.status.success() && message.contains(&format!("step-{best:08}")), "{message}");
    assert_eq!(run.join("set-aside-1").exists(), best < super::STEPS, "{message}");

    // Nothing was ever measured.
    workspace.set("checkpoint.best_metric", json!("sharpness"));
    let output = output_of(&mut workspace.train_command("run", &["--resume", "best"]));
    let message = stderr_of(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
}

#[test]
fn a_checkpoint_that_is_not_there_is_an_error_that_says_what_is() {
    let workspace = workspace();
    workspace.train("run", &["--set", "train.max_steps=20", "--set", "optim.schedule.total_steps=40"]);
    let before = contents(&workspace.path("run"));
    for (arguments, words) in [
        (
            &["--resume", "15"][..],
            &["run: holds no whole checkpoint of step 15: there are steps 10, 20", "hint: name one"][..],
        ),
        (&["--resume", "later"], &["invalid value 'later' for '--resume", "expected a step, `best` or `newest`"]),
    ] {
        let output = output_of(&mut workspace.train_command("run", arguments));
        let message = stderr_of(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
        assert!(contents(&workspace.path("run")) == before, "something changed");
    }
    let output = output_of(&mut workspace.train_command("empty", &["--resume", "15"]));
    assert!(stderr_of(&output).contains("there is none"), "{}", stderr_of(&output));
}

/// A launcher's restart goes on from the newest checkpoint, also where the run was told to go back to an older one.
#[test]
fn a_restart_does_not_go_back_again() {
    let mut workspace = super::workspace(2000, 64);
    workspace.set("train.save_every", 5).set("checkpoint.keep_last", 0);
    workspace.train("undisturbed", &[]);
    workspace.train("run", &[]);
    let run = workspace.path("run");
    let mut command = crate::fixture::specforge(&["launch", "--nproc-per-node", "1", "--max-restarts", "1", "train"]);
    command.args(["--json", "--device", "cpu", "--config"]).arg(workspace.config());
    command.arg("--set").arg(format!("train.output_dir={}", run.display())).args(["--resume", "10"]);
    let mut child = command.spawn().unwrap();
    let launcher = child.id();
    // A checkpoint beyond the one that was gone back to, of this way.
    let is_saved = || run.join("step-00000015/manifest.json").exists();
    let beyond = || run.join("set-aside-1").exists() && logged_step(&run) > 15 && logged_step(&run) < 30 && is_saved();
    assert!(wait_for(&mut child, beyond), "the run ended before it was killed");
    children(launcher).into_iter().for_each(|rank| signal(rank, "KILL"));
    let output = child.wait_with_output().unwrap();
    let message = stderr_of(&output);
    assert!(output.status.success(), "{message}");
    let resumed: Vec<&str> = message.lines().filter(|line| line.contains("resuming from")).collect();
    assert_eq!(resumed.len(), 2, "{message}");
    assert!(resumed[0].contains("step-00000010") && !resumed[1].contains("step-00000010"), "{resumed:?}");
    assert!(!run.join("set-aside-2").exists());
    for name in ["model.safetensors", "optimizer.safetensors"] {
        let read = |run: &Path| fs::read(run.join("step-00000040").join(name)).unwrap();
        assert!(read(&run) == read(&workspace.path("undisturbed")), "{name} differs");
    }
}
