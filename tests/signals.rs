//! A signal in every phase of every long command: one line says what happens, the command ends soon, and nothing half done
//! is left. No test depends on speed: what is to be hit either waits for the signal or would go on for hours.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fixture::{Workspace, conversations, json_of, litter, specforge};
use crate::processes::{PATIENCE, signal};

/// A command whose stderr is watched line by line.
struct Watched {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Watched {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = mpsc::channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        thread::spawn(move || stderr.lines().map_while(Result::ok).for_each(|line| drop(sender.send(line))));
        Self { child, lines, seen: Vec::new() }
    }

    /// Waits for a line that begins so, behind the name of a rank where there is one.
    fn wait_for(&mut self, beginning: &str) {
        let started = Instant::now();
        while !self.seen.iter().any(|line| begins(line, beginning)) {
            let left = PATIENCE.saturating_sub(started.elapsed());
            let line = self.lines.recv_timeout(left);
            self.seen.push(line.unwrap_or_else(|error| panic!("no line `{beginning}`: {error}\n{:#?}", self.seen)));
        }
    }

    fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    /// Waits for the end; gives how it ended, what was printed, and the lines in which stopping was announced.
    fn end(mut self) -> (ExitStatus, String, Vec<String>) {
        let started = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            if started.elapsed() > PATIENCE {
                self.child.kill().unwrap();
                panic!("the command goes on: {:#?}", self.seen);
            }
            thread::sleep(Duration::from_millis(5));
        }
        let output = self.child.wait_with_output().unwrap();
        self.seen.extend(self.lines.iter());
        let said = self.seen.iter().filter(|line| begins(line, "stopping")).cloned().collect();
        (output.status, String::from_utf8(output.stdout).unwrap(), said)
    }

    /// The end by the signal itself, with one line and nothing on stdout.
    fn ends_by(self, number: i32) {
        let (status, stdout, said) = self.end();
        assert_eq!((status.signal(), stdout.as_str()), (Some(number), ""), "{status}: {said:?}");
        assert!(said.len() == 1 && said[0].contains("nothing to save"), "{said:?}");
    }
}

fn begins(line: &str, beginning: &str) -> bool {
    line.trim_start_matches("[rank 0] ").starts_with(beginning)
}

fn make_fifo(path: &Path) {
    let _ = fs::remove_file(path);
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// Everything in a folder and below it that is no lock of a run's folder.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    crate::fixture::contents(folder).into_iter().map(|(path, _)| path).collect()
}

/// While tokens are made, while weights are loaded: here from files that nobody ever fills.
#[test]
fn before_the_loop_training_ends_at_once_and_leaves_nothing() {
    let workspace = Workspace::new();
    let text = fs::read(workspace.path("conversations.jsonl")).unwrap();
    for (name, number) in [("INT", 2), ("TERM", 15)] {
        make_fifo(&workspace.path("conversations.jsonl"));
        let run = Watched::start(&mut workspace.train_command("data", &[]));
        // Opening waits for the program to open it too.
        let unfilled = fs::OpenOptions::new().write(true).open(workspace.path("conversations.jsonl")).unwrap();
        run.signal(name);
        run.ends_by(number);
        drop(unfilled);
        fs::remove_file(workspace.path("conversations.jsonl")).unwrap();
        fs::write(workspace.path("conversations.jsonl"), &text).unwrap();
    }
    let weights = workspace.path("model/model.safetensors");
    fs::remove_file(&weights).unwrap();
    make_fifo(&weights);
    let mut run = Watched::start(&mut workspace.train_command("weights", &[]));
    run.wait_for("loading ");
    run.signal("TERM");
    run.ends_by(15);
    for out in ["data", "weights"] {
        assert_eq!(files_below(&workspace.path(out)), Vec::<PathBuf>::new(), "{out}");
    }
    assert_eq!(litter(&workspace.path("")), Vec::<PathBuf>::new());
}

/// A file that is begun and not whole goes with the process: here the token cache, whose last conversation never comes.
#[test]
fn an_unfinished_file_goes_with_the_process() {
    let mut workspace = Workspace::new();
    fs::write(workspace.path("conversations.jsonl"), conversations(20_000)).unwrap();
    workspace.set("train.max_steps", 1_000_000);
    // Wherever the signal falls, either the cache is there or it is not.
    for wait in [0, 100, 1000] {
        let mut run = Watched::start(&mut workspace.train_command("run", &[]));
        run.wait_for("tokenise");
        thread::sleep(Duration::from_millis(wait));
        run.signal("TERM");
        let (status, _, said) = run.end();
        assert!(status.signal() == Some(15) || status.code() == Some(0), "{status}");
        assert_eq!(said.len(), 1, "{said:?}");
        assert_eq!(litter(&workspace.path("")), Vec::<PathBuf>::new());
        let caches: Vec<PathBuf> =
            fs::read_dir(workspace.path("cache")).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(caches.iter().all(|path| path.extension().is_none_or(|end| end != "lock")), "{caches:?}");
        if workspace.path("run").is_dir() {
            fs::remove_dir_all(workspace.path("run")).unwrap();
        }
        caches.into_iter().for_each(|path| fs::remove_file(path).unwrap());
    }
}

/// Evaluations that would go on for hours: one before the first step, and one after it.
#[test]
fn an_evaluation_is_left_for_the_next_part() {
    let mut workspace = Workspace::new();
    fs::write(workspace.path("held-out.jsonl"), conversations(8_000)).unwrap();
    workspace.set("data.eval", vec![json!(workspace.path("held-out.jsonl"))]).set("eval.max_tokens", 0);
    workspace.set("train.micro_batch_tokens", 64).set("train.max_steps", 5);
    let mut run = Watched::start(&mut workspace.train_command("run", &[]));
    run.wait_for("loading ");
    run.signal("INT");
    run.ends_by(2);
    assert_eq!(files_below(&workspace.path("run")).iter().filter(|path| path.ends_with("manifest.json")).count(), 0);
    // A short evaluation at first, and the long one after the first step of the next part.
    let short = ["--set", "eval.max_tokens=100", "--set", "train.max_steps=1", "--set", "optim.schedule.total_steps=5"];
    workspace.train("run", &short);
    let long = ["--resume", "--set", "train.eval_every=1", "--set", "optim.schedule.total_steps=5"];
    let mut run = Watched::start(&mut workspace.train_command("run", &long));
    run.wait_for("step 2:");
    run.signal("TERM");
    let (status, stdout, said) = run.end();
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((status.code(), &report["steps"], &report["stopped_by"]), (Some(0), &json!(2), &json!(15)), "{said:?}");
    assert!(said.len() == 1 && said[0].contains("a checkpoint is written"), "{said:?}");
    let manifest = fs::read(workspace.path("run/step-00000002/manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    assert_eq!((&manifest["owed"]["evaluation"], &manifest["metrics"]), (&json!(true), &json!({})));
    // What goes on evaluates first, with as much as it is now told to.
    let short = ["--resume", "--set", "eval.max_tokens=100", "--set", "optim.schedule.total_steps=5"];
    let report = workspace.train("run", &short);
    assert_eq!((&report["steps"], &report["stopped_by"]), (&json!(5), &Value::Null));
    let log = fs::read_to_string(workspace.path("run/metrics.jsonl")).unwrap();
    let evaluated: Vec<u64> = log
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|row| row["eval/loss"].is_number())
        .map(|row| row["step"].as_u64().unwrap())
        .collect();
    assert_eq!(evaluated, [0, 1, 2, 5]);
}

/// Two ranks under the launcher, in the evaluation before the first step: the launcher ends as they do.
#[test]
fn ranks_that_have_nothing_to_save_end_together() {
    let mut workspace = Workspace::new();
    fs::write(workspace.path("held-out.jsonl"), conversations(8_000)).unwrap();
    workspace.set("data.eval", vec![json!(workspace.path("held-out.jsonl"))]).set("eval.max_tokens", 0);
    let mut launch = specforge(&["launch", "--nproc-per-node", "2", "--max-restarts", "3"]);
    let train = workspace.train_command("run", &[]);
    let mut run = Watched::start(launch.args(train.get_args()));
    run.wait_for("loading ");
    run.signal("TERM");
    run.ends_by(15);
}

/// Commands that only read and measure end at once; what they had begun to write is gone.
#[test]
fn commands_that_measure_end_at_once() {
    let workspace = Workspace::new();
    let questions: String =
        (0..5000).map(|number| json!({"id": number, "prompt": "the cold bird"}).to_string() + "\n").collect();
    fs::write(workspace.path("questions.jsonl"), questions).unwrap();
    let path = |name: &str| workspace.path(name).display().to_string();
    let (model, questions, trace) = (path("model"), path("questions.jsonl"), path("trace.jsonl"));
    let config = workspace.config().display().to_string();
    let runs: [(&[&str], &str); 3] = [
        (&["eval", "--target", &model, "--draft", "prompt-lookup", "--data", &questions, "--trace", &trace], "eval: "),
        (&["bench", "--target", &model, "--prefill", "1x8", "--repeat", "1000000000"], ""),
        (&["bench-train", "--config", &config, "--batch", "2x16", "--repeat", "1000000000"], ""),
    ];
    for (arguments, line) in runs {
        let mut run = Watched::start(specforge(arguments).args(["--device", "cpu"]));
        match line {
            // They say nothing before their end: until they listen, the signal ends them without a word.
            "" => thread::sleep(Duration::from_secs(1)),
            line => run.wait_for(line),
        }
        run.signal("INT");
        let (status, stdout, said) = run.end();
        assert_eq!((status.signal(), stdout.as_str()), (Some(2), ""), "{arguments:?}");
        assert!(said.len() == 1 || line.is_empty() && said.is_empty(), "{arguments:?}: {said:?}");
    }
    assert!(!workspace.path("trace.jsonl").exists());
    assert_eq!(litter(&workspace.path("")), Vec::<PathBuf>::new());
}

/// Commands whose work is kept say so, and the same command goes on.
#[test]
fn commands_that_keep_their_work_say_so() {
    let mut workspace = Workspace::new();
    fs::write(workspace.path("conversations.jsonl"), conversations(6_000)).unwrap();
    workspace.set("train.micro_batch_tokens", 64);
    let path = |name: &str| workspace.path(name).display().to_string();
    let (config, store) = (workspace.config().display().to_string(), path("store"));
    let (model, prompts, answers) = (path("model"), path("conversations.jsonl"), path("answers.jsonl"));
    let runs: [(&[&str], &str); 2] = [
        (&["capture", "--json", "--config", &config, "--out", &store, "--shard-tokens", "2000"], "capture: "),
        (
            &[
                "regen",
                "--json",
                "--target",
                &model,
                "--prompts",
                &prompts,
                "--out",
                &answers,
                "--max-new-tokens",
                "20",
            ],
            "regen: ",
        ),
    ];
    for (arguments, line) in runs {
        let mut run = Watched::start(specforge(arguments).args(["--device", "cpu"]));
        run.wait_for(line);
        run.signal("TERM");
        let (status, stdout, said) = run.end();
        assert_eq!(status.code(), Some(0), "{arguments:?}: {said:?}");
        assert!(said.len() == 1 && said[0].contains("the same command goes on"), "{said:?}");
        let report: Value = serde_json::from_str(&stdout).unwrap();
        assert!(report["stopped_by"] == 15 || report["interrupted"] == true, "{report}");
    }
    assert_eq!(litter(&workspace.path("")), Vec::<PathBuf>::new());
    // A plan writes nothing, and knows what is there.
    let plan = json_of(specforge(runs[0].0).args(["--device", "cpu", "--plan"]));
    assert!(plan["documents"].as_u64() > plan["documents_before"].as_u64(), "{plan}");
}
