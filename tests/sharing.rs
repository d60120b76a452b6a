//! `regen`, `eval` and `capture` with several processes that share the work: what one process writes, whatever happens.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::fixture::{
    Workspace, contents, conversations, json_of, litter, output_of, specforge, stderr_of, write_model,
};
use crate::processes::{children, end_of, signal, wait_for};

/// A command that `ranks` processes share; one process where that is 0.
pub fn shared(ranks: usize, arguments: &[&str]) -> Command {
    match ranks {
        0 => specforge(arguments),
        _ => {
            let mut command = specforge(&["launch", "--nproc-per-node", &ranks.to_string()]);
            command.args(arguments);
            command
        }
    }
}

/// Prompts of one to three turns.
fn prompts(workspace: &Workspace, count: usize) {
    let turns = ["The river runs.", "And then?", "Why never?"];
    let row = |row: usize| format!("{}\n", json!({"id": format!("p{row}"), "turns": &turns[..1 + row % 3]}));
    fs::write(workspace.path("prompts.jsonl"), (0..count).map(row).collect::<String>()).unwrap();
}

fn regen(workspace: &Workspace, ranks: usize, out: &str, more: &[&str]) -> Command {
    let fixed = ["regen", "--json", "--device", "cpu", "--temperature", "1", "--max-rows", "3"];
    let mut command = shared(ranks, &fixed);
    command.arg("--target").arg(workspace.path("model")).arg("--prompts").arg(workspace.path("prompts.jsonl"));
    command.arg("--out").arg(workspace.path(out)).args(more);
    command
}

fn lines_of(path: &Path) -> usize {
    fs::read_to_string(path).unwrap_or_default().matches('\n').count()
}

/// Figures of a report that no clock decides.
fn counted(report: &Value) -> Value {
    fn without_times(value: &mut Value) {
        const TIMES: [&str; 11] = [
            "seconds",
            "tokens_per_second",
            "wall_seconds",
            "prefill_seconds",
            "decode_seconds",
            "draft_share",
            "verify_share",
            "overhead_share",
            "speedup",
            "processes",
            "out",
        ];
        if let Some(object) = value.as_object_mut() {
            object.retain(|key, _| !TIMES.contains(&key.as_str()));
            object.values_mut().for_each(without_times);
        }
    }
    let mut report = report.clone();
    without_times(&mut report);
    report
}

#[test]
fn answers_are_those_of_one_process() {
    let workspace = Workspace::new();
    prompts(&workspace, 8);
    let lengths = ["--max-new-tokens", "12", "--on-length", "drop"];
    for (name, more) in [("kept", &lengths[..2]), ("dropped", &lengths[..])] {
        let want = json_of(&mut regen(&workspace, 0, name, more));
        assert!(name == "kept" || want["dropped"].as_u64() > Some(0), "{want}");
        for ranks in [2, 3] {
            let out = format!("{name}-{ranks}");
            let got = json_of(&mut regen(&workspace, ranks, &out, more));
            assert_eq!(counted(&got), counted(&want), "{out}");
            let read = |out: &str| fs::read_to_string(workspace.path(out)).unwrap();
            assert_eq!(read(&out), read(name), "{out}");
            // Nothing is left to do, whoever looks.
            let again = json_of(&mut regen(&workspace, 3 - ranks, &out, more));
            assert_eq!((&again["answered"], &again["answered_before"]), (&json!(0), &want["answered"]));
            assert_eq!(read(&out), read(name), "{out}");
        }
    }
    // Rows that cannot be answered are listed once, and the run says so at its end.
    let long = json!({"id": "long", "turns": ["the river ".repeat(200)]});
    let all = fs::read_to_string(workspace.path("prompts.jsonl")).unwrap();
    fs::write(workspace.path("prompts.jsonl"), format!("{long}\n{all}")).unwrap();
    let output = output_of(&mut regen(&workspace, 2, "failing", &lengths[..2]));
    let message = stderr_of(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    let last = message.lines().rev().find(|line| line.starts_with("error: ")).unwrap();
    assert!(last.contains("rank 0") && last.contains("1 rows could not be answered"), "{message}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["failed"], &report["answered"]), (&json!(1), &json!(8)));
    assert_eq!(lines_of(&workspace.path("failing.errors.jsonl")), 1);
}

/// A target that takes its time, and some.
fn slow_workspace() -> Workspace {
    let workspace = Workspace::with_model(&json!({"hidden_size": 128, "num_hidden_layers": 4}));
    prompts(&workspace, ROWS);
    workspace
}

const ROWS: usize = 240;
const SLOW: [&str; 2] = ["--max-new-tokens", "40"];

/// A rank that is killed ends all; what was answered stays, and another number of processes goes on from it.
#[test]
fn a_killed_rank_costs_no_answer() {
    let workspace = slow_workspace();
    json_of(&mut regen(&workspace, 0, "undisturbed", &SLOW));
    let out = workspace.path("killed");
    for (ranks, victim) in [(2, 1), (3, 0)] {
        let before = lines_of(&out);
        let mut child = regen(&workspace, ranks, "killed", &SLOW).spawn().unwrap();
        assert!(wait_for(&mut child, || lines_of(&out) > before + 1), "the run ended before it was disturbed");
        signal(children(child.id())[victim], "KILL");
        let output = end_of(child);
        let message = stderr_of(&output);
        assert!(!output.status.success() && message.contains("ended by SIGKILL"), "{message}");
        assert!(message.lines().last().is_some_and(|line| !line.contains("panicked")), "{message}");
    }
    let answered = lines_of(&out);
    assert!((4..ROWS).contains(&answered), "{answered}");
    let report = json_of(&mut regen(&workspace, 2, "killed", &SLOW));
    // A line that was torn is answered again.
    let before = report["answered_before"].as_u64().unwrap() as usize;
    assert!(before == answered || before + 1 == answered, "{before} of {answered}");
    assert!(fs::read(&out).unwrap() == fs::read(workspace.path("undisturbed")).unwrap(), "the answers differ");
}

#[test]
fn a_polite_signal_to_any_rank_stops_all_and_the_run_goes_on() {
    let workspace = slow_workspace();
    json_of(&mut regen(&workspace, 0, "undisturbed", &SLOW));
    let out = workspace.path("stopped");
    let mut child = regen(&workspace, 2, "stopped", &SLOW).spawn().unwrap();
    assert!(wait_for(&mut child, || lines_of(&out) > 2), "the run ended before it was disturbed");
    signal(children(child.id())[1], "TERM");
    let output = end_of(child);
    assert_eq!(output.status.code(), Some(0), "{}", stderr_of(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["interrupted"], true);
    assert_eq!(lines_of(&out), report["answered"].as_u64().unwrap() as usize);
    json_of(&mut regen(&workspace, 0, "stopped", &SLOW));
    assert!(fs::read(&out).unwrap() == fs::read(workspace.path("undisturbed")).unwrap(), "the answers differ");
}

fn eval(workspace: &Workspace, ranks: usize, more: &[&str]) -> Command {
    let fixed = ["eval", "--json", "--device", "cpu", "--draft", "prompt-lookup", "--tree", "depth=4,nodes=6,match=1"];
    let mut command = shared(ranks, &fixed);
    command.args(["--max-new-tokens", "24", "--target"]).arg(workspace.path("model"));
    command.arg("--data").arg(workspace.path("questions.jsonl")).args(more);
    command
}

#[test]
fn a_reports_counts_are_those_of_one_process() {
    let workspace = Workspace::new();
    let question = |number: usize| {
        let (category, turns) = (["birds", "stones"][number % 3 / 2], ["a cold bird", "the river runs", "why"]);
        format!("{}\n", json!({"question_id": number, "category": category, "turns": &turns[..1 + number % 3]}))
    };
    fs::write(workspace.path("questions.jsonl"), (0..9).map(question).collect::<String>()).unwrap();
    for more in [&["--batch", "2"][..], &["--temperature", "0.9", "--no-baseline"]] {
        let want = json_of(&mut eval(&workspace, 0, more));
        assert!(want["tokens"].as_u64().unwrap() > 100 && want["processes"] == 1, "{want}");
        for ranks in [2, 3] {
            let got = json_of(&mut eval(&workspace, ranks, more));
            assert_eq!(counted(&got), counted(&want));
            assert_eq!(got["processes"], ranks);
            assert!(got["wall_seconds"].as_f64().unwrap() > 0.0);
        }
    }
    let mut traced = eval(&workspace, 2, &["--trace"]);
    let output = output_of(traced.arg(workspace.path("trace")));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr_of(&output).contains("--trace: one process records a decode"), "{}", stderr_of(&output));
    assert!(!workspace.path("trace").exists());
}

/// Processes that another launcher started, each with arguments of its own.
fn by_hand(commands: impl IntoIterator<Item = Command>) -> Vec<Output> {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    let commands: Vec<Command> = commands.into_iter().collect();
    let world_size = commands.len().to_string();
    let start = |(rank, mut command): (usize, Command)| {
        command.envs([("RANK", rank.to_string().as_str()), ("WORLD_SIZE", &world_size)]);
        command.envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port.to_string())]).spawn().unwrap()
    };
    let started: Vec<_> = commands.into_iter().enumerate().map(start).collect();
    started.into_iter().map(end_of).collect()
}

/// The environment of torchrun is enough, and ranks that mean different things are refused.
#[test]
fn ranks_that_were_started_differently_are_refused() {
    let workspace = Workspace::new();
    prompts(&workspace, 4);
    let seeds = |seeds: [&str; 2]| {
        by_hand(seeds.map(|seed| regen(&workspace, 0, "answers", &["--max-new-tokens", "4", "--seed", seed])))
    };
    let outputs = seeds(["0", "1"]);
    let (first, second) = (stderr_of(&outputs[0]), stderr_of(&outputs[1]));
    assert!(second.contains("rank 1 was started on something else than rank 0: seed: expected 0, got 1"), "{second}");
    assert!(outputs.iter().all(|output| !output.status.success()), "{first}\n{second}");
    assert!(first.contains("rank 1 failed first"), "{first}");
    let outputs = seeds(["0", "0"]);
    assert!(outputs.iter().all(|output| output.status.success()), "{}", stderr_of(&outputs[1]));
    assert_eq!((outputs[1].stdout.len(), lines_of(&workspace.path("answers"))), (0, 4));
}

fn capture(workspace: &Workspace, ranks: usize, out: &str, more: &[&str]) -> Command {
    let mut command = shared(ranks, &["capture", "--json", "--device", "cpu", "--config"]);
    command.arg(workspace.config()).arg("--out").arg(workspace.path(out)).args(more);
    command
}

fn shards_of(store: &Path) -> usize {
    let manifest = fs::read(store.join("store.json")).ok();
    let manifest = manifest.and_then(|text| serde_json::from_slice::<Value>(&text).ok());
    manifest.map_or(0, |manifest| manifest["shards"].as_array().unwrap().len())
}

/// Two stores hold the same bytes, and nothing unfinished.
#[track_caller]
fn assert_same_store(workspace: &Workspace, got: &str, want: &str) {
    let (got, want) = (workspace.path(got), workspace.path(want));
    let (left, right) = (contents(&got), contents(&want));
    let names = |files: &[(PathBuf, Vec<u8>)]| files.iter().map(|(path, _)| path.clone()).collect::<Vec<_>>();
    assert_eq!(names(&left), names(&right));
    let differing: Vec<_> =
        left.iter().zip(&right).filter(|(left, right)| left != right).map(|(left, _)| &left.0).collect();
    assert!(differing.is_empty(), "{differing:?} of {} are other files than in {}", got.display(), want.display());
    assert_eq!(litter(&got), Vec::<PathBuf>::new());
}

/// However many processes capture, and whether the target is loaded whole or a layer at a time: the same bytes.
#[test]
fn a_store_is_that_of_one_process() {
    let mut workspace = Workspace::new();
    workspace.set("data.eval", json!([]));
    let shards = ["--layers", "0,1", "--shard-tokens", "300"];
    for element in ["float32", "bfloat16", "float8"] {
        let arguments = [&shards[..], &["--dtype", element]].concat();
        let alone = format!("{element}-alone");
        let want = json_of(&mut capture(&workspace, 0, &alone, &arguments));
        assert!(want["shards"].as_u64() > Some(5), "{want}");
        let streamed = ["--stream-layers", "--window-tokens", "700"];
        let ways: [(usize, &[&str]); 5] = [(1, &[]), (2, &[]), (3, &[]), (0, &streamed), (2, &streamed)];
        // One element type goes every way.
        for (ranks, more) in ways.into_iter().filter(|(ranks, _)| element == "float32" || *ranks == 2) {
            let out = format!("{element}-{ranks}-{}", more.len());
            let got = json_of(&mut capture(&workspace, ranks, &out, &[&arguments[..], more].concat()));
            for key in ["documents", "tokens", "bytes", "shards", "tokens_captured", "complete"] {
                assert_eq!(got[key], want[key], "{out}: {key}");
            }
            assert_eq!(got["processes"], ranks.max(1));
            assert_same_store(&workspace, &out, &alone);
            // Nothing is left to do, whoever looks.
            let again = json_of(&mut capture(&workspace, 2 - ranks.min(2), &out, &arguments));
            assert_eq!((&again["tokens_captured"], &again["complete"]), (&json!(0), &json!(true)), "{out}");
        }
    }
    // A tied head, and documents longer than a pack, each of which passes alone.
    write_model(&workspace.path("model"), &json!({"tie_word_embeddings": true}));
    workspace.set("train.micro_batch_tokens", 16);
    json_of(&mut capture(&workspace, 0, "tied-alone", &shards));
    json_of(&mut capture(&workspace, 2, "tied", &[&shards[..], &["--stream-layers"]].concat()));
    assert_same_store(&workspace, "tied", "tied-alone");
    workspace.set("train.micro_batch_tokens", 128);
    json_of(
        &mut workspace
            .train_command("run", &["--set", &format!("target.feature_store={}", workspace.path("tied").display())]),
    );
}

/// Wide enough for a capture to take a while.
fn slow_to_capture() -> Workspace {
    let workspace =
        Workspace::with_model(&json!({"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}));
    fs::write(workspace.path("conversations.jsonl"), conversations(700)).unwrap();
    workspace
}

const SHARDS: [&str; 6] = ["--dtype", "float8", "--layers", "2,5", "--shard-tokens", "400"];

/// A rank that is killed ends all; whole shards stay, and any number of processes goes on from them, in either way.
#[test]
fn a_killed_rank_costs_no_whole_shard() {
    let workspace = slow_to_capture();
    let total = json_of(&mut capture(&workspace, 0, "undisturbed", &SHARDS))["shards"].as_u64().unwrap() as usize;
    let store = workspace.path("killed");
    let streamed = [&SHARDS[..], &["--stream-layers", "--window-tokens", "1000"]].concat();
    for (ranks, victim, arguments) in [(2, 1, &SHARDS[..]), (3, 0, &SHARDS), (2, 0, &streamed)] {
        let goal = shards_of(&store) + 2;
        let mut child = capture(&workspace, ranks, "killed", arguments).spawn().unwrap();
        assert!(wait_for(&mut child, || shards_of(&store) >= goal), "the run ended before it was disturbed");
        signal(children(child.id())[victim], "KILL");
        let output = end_of(child);
        let message = stderr_of(&output);
        assert!(!output.status.success() && message.contains("ended by SIGKILL"), "{message}");
    }
    let whole = shards_of(&store);
    assert!(whole >= 6 && whole < total, "{whole} of {total}");
    // One rank is asked to stop, and all do.
    let mut child = capture(&workspace, 2, "killed", &SHARDS).spawn().unwrap();
    assert!(wait_for(&mut child, || shards_of(&store) > whole), "the run ended before it was disturbed");
    signal(children(child.id())[1], "TERM");
    let output = end_of(child);
    assert_eq!(output.status.code(), Some(0), "{}", stderr_of(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["complete"], &report["shards"]), (&json!(false), &json!(shards_of(&store))));
    let report = json_of(&mut capture(&workspace, 3, "killed", &SHARDS));
    assert_eq!((&report["complete"], &report["shards"]), (&json!(true), &json!(total)));
    assert_same_store(&workspace, "killed", "undisturbed");
}

#[test]
fn a_plan_of_streaming_says_windows_and_memory() {
    let workspace = slow_to_capture();
    let arguments = [&SHARDS[..], &["--stream-layers", "--plan"]].concat();
    let plan = |more: &[&str]| json_of(&mut capture(&workspace, 0, "store", &[&arguments[..], more].concat()));
    let figure = |plan: &Value, key: &str| plan["streaming"][key].as_u64().unwrap();
    let (one, many) = (plan(&[]), plan(&["--window-tokens", "1000"]));
    assert_eq!((figure(&one, "windows"), figure(&one, "window_tokens")), (1, one["tokens"].as_u64().unwrap()));
    let windows = figure(&many, "windows");
    assert!(windows > 5 && figure(&many, "window_tokens") <= 1000, "{many}");
    // Every window reads all of the file but its header.
    let file = fs::metadata(workspace.path("model/model.safetensors")).unwrap().len();
    let read = figure(&many, "bytes_a_window");
    assert!(read <= file && read > file - 20_000, "{read} of {file}");
    assert_eq!(figure(&many, "bytes_read"), windows * read);
    assert_eq!(figure(&many, "whole_target"), read);
    assert!(figure(&many, "largest_part") * 4 < figure(&many, "whole_target"), "{many}");
    assert!(figure(&many, "peak_host") * 5 < figure(&one, "peak_host"));
    assert!(!workspace.path("store").exists());
}
