//! Bad input of every kind, through the real program: a clear message, the right exit code, nothing half-written.
//!
//! One file for each subcommand, and for what `train` reads: its models and its data. Each case is one row of a table.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::fixture::{Workspace, contents, litter, output_of, stderr_of};

mod bench;
mod checkpoints;
mod data;
mod export;
mod forged;
mod hostile;
mod import;
mod models;
mod mutants;
mod regen;
pub(crate) mod resources;
mod train;

/// One way to go wrong.
struct Case {
    name: &'static str,
    /// Spoils something in a sound workspace and says what to run.
    spoil: fn(&mut Workspace) -> Command,
    exit_code: i32,
    /// Parts of the message. `{}` stands for the workspace's folder.
    expected: &'static [&'static str],
}

/// Runs each case in a workspace of its own.
fn check(cases: &[Case]) {
    check_in(cases, &|| Workspace::new());
}

/// Runs all cases before it fails, so that one look shows all that is wrong.
fn check_in(cases: &[Case], make: &dyn Fn() -> Workspace) {
    let wrong: Vec<String> = cases
        .iter()
        .filter_map(|case| {
            let (message, problems) = problems_of(case, &mut make());
            let text = format!("-- {}: {}\n{message}", case.name, problems.join("; "));
            (!problems.is_empty()).then_some(text)
        })
        .collect();
    assert!(wrong.is_empty(), "{} of {} cases are wrong:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

/// Looks at message, exit code, stdout and what is left on disk.
fn problems_of(case: &Case, workspace: &mut Workspace) -> (String, Vec<String>) {
    let mut command = (case.spoil)(workspace);
    let folder = workspace.path("");
    let before = contents(&folder);
    let output = output_of(&mut command);
    let message = stderr_of(&output);
    let mut problems = Vec::new();
    let mut expect = |holds: bool, problem: String| {
        if !holds {
            problems.push(problem);
        }
    };
    expect(output.status.code() == Some(case.exit_code), format!("{}", output.status));
    expect(output.stdout.is_empty(), "something is on stdout".to_owned());
    for part in case.expected {
        let part = part.replace("{}", folder.to_str().unwrap().trim_end_matches('/'));
        expect(message.contains(&part), format!("no `{part}`"));
    }
    // The error is the last thing said, with at most a hint after it.
    let last: Vec<&str> = message.lines().skip_while(|line| !line.starts_with("error: ")).collect();
    let hints = last.iter().filter(|line| line.starts_with("hint: ")).count();
    expect(
        !last.is_empty() && message.lines().filter(|line| line.starts_with("error: ")).count() == 1 && hints <= 1,
        "not one error".to_owned(),
    );
    for noise in ["panicked", "RUST_BACKTRACE", "internal error", "frame #", "Exception raised", "c10::"] {
        expect(!message.contains(noise), format!("`{noise}` in the message"));
    }
    // Whatever a file calls its parts: a terminal obeys none of it, and a reader is done with it soon.
    let harmful = message.chars().find(|&letter| letter.is_control() && letter != '\n');
    expect(harmful.is_none(), format!("{harmful:?} in the message"));
    let longest = message.lines().map(|line| line.chars().count()).max().unwrap_or(0);
    expect(longest <= 1500 && message.lines().count() <= 60, format!("a line of {longest} characters"));
    expect(litter(&folder).is_empty(), format!("left behind: {:?}", litter(&folder)));
    // What was there is there still, and what is new is no result.
    let after = contents(&folder);
    for (path, bytes) in before.iter().filter(|(path, _)| !path.starts_with("cache")) {
        let now = after.iter().find(|(other, _)| other == path);
        expect(now.is_some_and(|(_, now)| now == bytes), format!("{} changed", path.display()));
    }
    for (path, _) in after.iter().filter(|(path, _)| !before.iter().any(|(other, _)| other == path)) {
        let is_result = path.iter().any(|part| part.to_string_lossy().starts_with("step-"))
            || path.file_name().is_some_and(|name| name == "report.json" || name == "model.safetensors");
        expect(!is_result, format!("{} was written", path.display()));
    }
    (message, problems)
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

fn truncate(path: &Path, drop: u64) {
    let length = fs::metadata(path).unwrap().len();
    fs::File::options().write(true).open(path).unwrap().set_len(length - drop).unwrap();
}

fn train(workspace: &Workspace) -> Command {
    workspace.train_command("run", &[])
}

fn train_with(workspace: &Workspace, setting: &str) -> Command {
    workspace.train_command("run", &["--set", setting])
}

/// A workspace with a finished run of two checkpoints in it.
fn with_run() -> Workspace {
    let mut workspace = Workspace::new();
    workspace.set("train.save_every", 2);
    workspace.train("run", &[]);
    workspace
}

/// Runs each case in a workspace that holds a finished run.
fn check_with_run(cases: &[Case]) {
    let sound = with_run();
    // The finished run is copied: training anew for each case takes longer. The paths in it are put right.
    check_in(cases, &|| {
        let mut workspace = Workspace::new();
        workspace.set("train.save_every", 2);
        let (old, new) = (sound.path(""), workspace.path(""));
        for (path, bytes) in contents(&sound.path("run")) {
            let path = workspace.path("run").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let text = String::from_utf8(bytes)
                .map(|text| text.replace(old.to_str().unwrap(), new.to_str().unwrap()).into_bytes());
            fs::write(path, text.unwrap_or_else(|error| error.into_bytes())).unwrap();
        }
        workspace
    });
}
