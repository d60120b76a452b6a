//! Invariants of whole training runs, through the program.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use specforge::weights;

use crate::fixture::{Workspace, contents, conversations, json_of, largest_difference, model_config, model_tensors};
use crate::fixture::{litter, output_of, stderr_of, tensors_of};
use crate::processes::PATIENCE;

#[test]
fn weights_do_not_depend_on_the_micro_batch_size() {
    let mut workspace = Workspace::new();
    workspace.set("train.batch_tokens", 512).set("train.max_steps", 10).set("optim.learning_rate", 1e-3);
    for projection in ["own", "shared"] {
        workspace.set("draft.projection", projection);
        let trained = [512, 128, 64].map(|tokens| {
            let out = format!("{projection}{tokens}");
            workspace.train(&out, &["--set", &format!("train.micro_batch_tokens={tokens}")]);
            tensors_of(&workspace.path(&out).join("step-00000010/model.safetensors"))
        });
        for other in &trained[1..] {
            for ((name, whole), (_, split)) in trained[0].iter().zip(other) {
                let difference = largest_difference(whole, split);
                assert!(difference < 1e-5, "{projection} {name}: {difference:e}");
            }
        }
    }
}

/// Measuring how much of the gradients is chance takes the same updates, and is refused where there is nothing to compare.
#[test]
fn the_noise_of_gradients_is_logged_and_changes_no_update() {
    let mut workspace = Workspace::new();
    workspace.set("train.batch_tokens", 512).set("train.max_steps", 8).set("train.log_every", 8);
    let trained = |out: &str| fs::read(workspace.path(out).join("step-00000008/model.safetensors")).unwrap();
    let logged = |out: &str| {
        let text = fs::read_to_string(workspace.path(out).join("metrics.jsonl")).unwrap();
        let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        rows.filter_map(|row| row["train/gradient_noise_tokens"].as_f64()).collect::<Vec<_>>()
    };
    workspace.train("plain", &[]);
    workspace.train("measured", &["--set", "train.gradient_noise=true"]);
    assert!(trained("plain") == trained("measured"));
    assert_eq!(logged("plain"), Vec::<f64>::new());
    assert!(matches!(logged("measured")[..], [tokens] if tokens > 0.0), "{:?}", logged("measured"));

    let alone = ["--set", "train.gradient_noise=true", "--set", "train.micro_batch_tokens=512"];
    let output = output_of(&mut workspace.train_command("refused", &alone));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr_of(&output).contains("`train.gradient_noise`"), "{}", stderr_of(&output));
}

/// Products of bfloat16 factors end elsewhere than those of float32, but not far; where a processor has no use for them the run
/// says so, and ends at the same bits.
#[test]
fn mixed_precision_is_float32_but_for_rounding() {
    let mut workspace = Workspace::new();
    workspace.set("train.max_steps", 8).set("optim.learning_rate", 1e-3).set("train.log_every", 8);
    let end = |out: &str| {
        let text = fs::read_to_string(workspace.path(out).join("metrics.jsonl")).unwrap();
        let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let loss = rows.filter_map(|row| row["eval/loss"].as_f64()).next_back().unwrap();
        (loss, fs::read(workspace.path(out).join("step-00000008/model.safetensors")).unwrap())
    };
    workspace.train("exact", &[]);
    let output = output_of(&mut workspace.train_command("mixed", &["--set", "train.mixed_precision=bfloat16"]));
    assert!(output.status.success(), "{}", stderr_of(&output));
    let is_left_out = stderr_of(&output).contains("train.mixed_precision is left out: this processor");
    let ((exact, exact_bits), (mixed, mixed_bits)) = (end("exact"), end("mixed"));
    assert_eq!(exact_bits == mixed_bits, is_left_out);
    assert!((exact - mixed).abs() < 1e-2 * exact, "{exact} and {mixed}");

    let output = output_of(&mut workspace.train_command("refused", &["--set", "train.mixed_precision=float16"]));
    assert_eq!(output.status.code(), Some(2));
    let said = stderr_of(&output);
    assert!(said.contains("train.mixed_precision") && said.contains("bfloat16"), "{said}");
}

/// What a run with averages measures and saves is not what it goes on with; the parameters lie beside.
#[test]
fn averages_are_what_a_checkpoint_s_model_holds() {
    let mut workspace = Workspace::new();
    workspace.set("train.max_steps", 6).set("optim.learning_rate", 1e-2);
    let read = |out: &str, name: &str| tensors_of(&workspace.path(out).join("step-00000006").join(name));
    workspace.train("plain", &[]);
    workspace.train("averaged", &["--set", "optim.average=0.5"]);
    let (plain, averaged) = (read("plain", "model.safetensors"), read("averaged", "model.safetensors"));
    let beside = read("averaged", "optimizer.safetensors");
    let differences: Vec<f64> = plain
        .iter()
        .zip(&averaged)
        .map(|((name, value), (_, average))| {
            let master = &beside.iter().find(|(key, _)| *key == format!("master.{name}")).unwrap().1;
            assert_eq!(largest_difference(value, master), 0.0, "{name}");
            let kept = &beside.iter().find(|(key, _)| *key == format!("average.{name}")).unwrap().1;
            assert_eq!(largest_difference(average, kept), 0.0, "{name}");
            largest_difference(value, average)
        })
        .collect();
    assert!(differences.iter().any(|difference| *difference > 0.0));

    // The same updates, and other weights that were measured.
    let last = |out: &str, key: &str| {
        let text = fs::read_to_string(workspace.path(out).join("metrics.jsonl")).unwrap();
        let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        rows.filter_map(|row| row[key].as_f64()).next_back().unwrap()
    };
    assert_eq!(last("plain", "train/loss"), last("averaged", "train/loss"));
    assert_ne!(last("plain", "eval/loss"), last("averaged", "eval/loss"));
}

/// The target is frozen: it is not in the optimizer, and its files stay as they are.
#[test]
fn only_the_draft_is_trained_and_the_plan_knows_how_much() {
    let mut workspace = Workspace::new();
    let before = contents(&workspace.path("model"));
    for (projection, share) in [("own", false), ("shared", false), ("own", true)] {
        let out = format!("{projection}{share}");
        workspace.set("draft.projection", projection).set("draft.num_layers", 2).set("draft.share_layers", share);
        let plan = json_of(&mut workspace.train_command(&out, &["--plan"]));
        assert!(!workspace.path(&out).exists(), "--plan writes nothing");
        let report = workspace.train(&out, &[]);
        let checkpoint = workspace.path(&out).join("step-00000004");
        assert_eq!(report["checkpoint"], json!(checkpoint));
        let model = tensors_of(&checkpoint.join("model.safetensors"));
        let count = |tensors: &[(String, tch::Tensor)]| tensors.iter().map(|(_, tensor)| tensor.numel()).sum::<usize>();
        assert_eq!(plan["trainable_parameters"], count(&model), "{out}");
        // Two moments for each parameter, and the number of steps.
        let optimizer = tensors_of(&checkpoint.join("optimizer.safetensors"));
        assert_eq!(count(&optimizer), 2 * count(&model) + 1, "{out}");
        assert_eq!(optimizer.len(), 2 * model.len() + 1, "{out}");
        let bytes: u64 = ["model", "optimizer"]
            .map(|name| fs::metadata(checkpoint.join(format!("{name}.safetensors"))).unwrap().len())
            .iter()
            .sum();
        let planned = plan["checkpoint_bytes"].as_u64().unwrap();
        assert!((planned..planned + 8192).contains(&bytes), "{out}: planned {planned}, got {bytes}");
    }
    assert!(contents(&workspace.path("model")) == before, "the target's files changed");
}

/// Logits of all rows at once would take 1.4 GB; the whole process stays far below.
#[test]
fn memory_does_not_grow_with_rows_times_vocabulary() {
    let vocabulary = 100_000;
    let mut workspace = Workspace::with_model(&json!({"vocab_size": vocabulary}));
    workspace
        .set("draft.num_heads", 1)
        .set("draft.projection", "shared")
        .set("data.eval_fraction", 0.0)
        .set("data.supervise", "all")
        .set("train.max_steps", 1)
        .set("train.batch_tokens", 4096)
        .set("train.micro_batch_tokens", 4096)
        .set("train.chunk_mib", 8);
    let mut child = workspace.train_command("run", &[]).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let (mut peak, started) = (0, Instant::now());
    while child.try_wait().unwrap().is_none() {
        assert!(started.elapsed() < PATIENCE, "the run hangs");
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kibibytes = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
        peak = kibibytes.unwrap_or(0).max(peak);
        std::thread::sleep(Duration::from_millis(2));
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr_of(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = report["tokens"].as_u64().unwrap();
    let one_tensor = (rows * vocabulary * 4) >> 10;
    println!("peak {} MiB, {rows} tokens, rows x vocabulary {} MiB", peak >> 10, one_tensor >> 10);
    assert!(rows > 3600, "{rows}");
    assert!(peak > 50 << 10, "VmHWM was not read");
    assert!(peak < one_tensor / 2, "peak {peak} KiB, rows x vocabulary {one_tensor} KiB");
}

#[test]
fn one_conversation_is_learned_by_heart() {
    let mut workspace = Workspace::with_model(&json!({"hidden_size": 64}));
    let one = workspace.path("one.jsonl");
    let messages = json!([
        {"role": "user", "content": "What did the fox say?"},
        {"role": "assistant", "content": "Nothing at all, it was asleep under the old green bridge."},
    ]);
    fs::write(&one, json!({"id": "fox", "messages": messages}).to_string()).unwrap();
    workspace.set("data.train", vec![json!(one)]).set("data.eval", vec![json!(one)]);
    for projection in ["own", "shared"] {
        // A head that may not change its projection learns more slowly.
        let steps = if projection == "own" { "train.max_steps=60" } else { "train.max_steps=300" };
        workspace.set("draft.projection", projection);
        let report = workspace.train(projection, &["--set", steps]);
        for head in 1..=3 {
            assert_eq!(report["end"][format!("head{head}/top1")], 1.0, "{projection}: {:#}", report["end"]);
        }
        assert_eq!(report["end"]["simulated_acceptance_length"], 4.0);
        assert!(report["start"]["head1/top1"].as_f64().unwrap() < 0.5);
    }
}

/// Two epochs of documents, one of which holds a token that no other does.
fn with_a_zebra() -> Workspace {
    let mut workspace = Workspace::with_model(&json!({"rms_norm_eps": 0.0}));
    let poisoned = json!({"id": "poisoned", "messages": [
        {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Zebras. ZZZZ, many zebras."},
    ]});
    let path = workspace.path("conversations.jsonl");
    fs::write(&path, conversations(60) + &poisoned.to_string()).unwrap();
    workspace
        .set("data.eval_fraction", 0.0)
        .set("train.batch_tokens", 128)
        .set("train.epochs", 2)
        .set("train.max_steps", Value::Null)
        .set("train.save_every", 1);
    workspace
}

/// The embedding of that token becomes zero, which such a model's norms divide by. NaN itself would not be loaded.
fn poison(workspace: &Workspace) {
    let config = model_config(&json!({}));
    let tokenizer: Value = serde_json::from_slice(&fs::read(workspace.path("model/tokenizer.json")).unwrap()).unwrap();
    let token = tokenizer["model"]["vocab"]["Z"].as_i64().unwrap();
    let tensors = model_tensors(&config);
    drop(tensors[0].1.get(token).zero_());
    assert_eq!(tensors[0].0, "model.embed_tokens.weight");
    weights::write_tensors(&workspace.path("model/model.safetensors"), &tensors, &[]).unwrap();
}

#[test]
fn a_value_that_is_not_finite_stops_the_run_and_overwrites_nothing() {
    let workspace = with_a_zebra();
    let sound = workspace.train("sound", &[]);
    assert!(sound["steps"].as_u64().unwrap() > 10);
    poison(&workspace);

    // A run that meets it at once, and one that goes on from a sound checkpoint of the run above.
    let run = |out: &str, arguments: &[&str]| {
        let output = output_of(&mut workspace.train_command(out, arguments));
        let message = stderr_of(&output);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert_eq!(output.stdout, b"");
        let line = message.lines().find(|line| line.starts_with("error: ")).unwrap().to_owned();
        assert!(line.contains("is not finite") && line.contains("poisoned"), "{line}");
        let step = line.strip_prefix("error: step ").unwrap().split(':').next().unwrap().parse::<u64>().unwrap();
        assert!(message.contains("\nhint: "), "{message}");
        assert_eq!(litter(&workspace.path(out)), Vec::<std::path::PathBuf>::new());
        step
    };
    let step = run("fresh", &[]);
    let newest = |out: &str| {
        let names = fs::read_dir(workspace.path(out)).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter_map(|name| name.to_string_lossy().strip_prefix("step-")?.parse::<u64>().ok()).max()
    };
    assert_eq!(newest("fresh"), Some(step - 1).filter(|&step| step > 0), "nothing was saved at or after step {step}");

    // The same run again, from a checkpoint two steps earlier: it stops at the same step and keeps what was there.
    assert!(step > 1, "the order of documents leaves room for a checkpoint before");
    let checkpoint = |out: &str| workspace.path(out).join(format!("step-{:08}", step - 1));
    let before = contents(&checkpoint("fresh"));
    assert_eq!(run("fresh", &["--resume"]), step);
    assert!(contents(&checkpoint("fresh")) == before, "the checkpoint changed");
    assert_eq!(newest("fresh"), Some(step - 1));
}

/// What an evaluation reads is chosen by content: the same from files in another order, and as much as the plan says.
#[test]
fn an_evaluation_reads_a_part_that_does_not_depend_on_the_order_of_files() {
    let mut workspace = Workspace::new();
    workspace.set("data.eval_fraction", 0.5).set("train.eval_every", 3).set("eval.max_tokens", 300);
    let plan = json_of(&mut workspace.train_command("run", &["--plan"]));
    let tokens = plan["evaluation"]["tokens"].as_u64().unwrap();
    assert!((200..=300).contains(&tokens), "{plan}");
    // Before the first step, after the third, and after the fourth, which is the last.
    assert_eq!(plan["evaluation"]["evaluations"], 3);
    let share = plan["evaluation"]["share"].as_f64().unwrap();
    assert!(share > 0.0 && share < 1.0, "{share}");
    let all = json_of(&mut workspace.train_command("run", &["--plan", "--set", "eval.max_tokens=0"]));
    assert!(all["evaluation"]["tokens"].as_u64().unwrap() > 1000 && all["evaluation"]["share"].as_f64() > Some(share));
    let none = json_of(&mut workspace.train_command("run", &["--plan", "--set", "data.eval_fraction=0"]));
    assert_eq!(none["evaluation"], Value::Null);

    let path = workspace.path("conversations.jsonl");
    let lines = fs::read_to_string(&path).unwrap();
    let part = workspace.train("part", &[]);
    let whole = workspace.train("whole", &["--set", "eval.max_tokens=0"]);
    assert_ne!(part["start"]["loss"], whole["start"]["loss"]);
    fs::write(&path, lines.lines().rev().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    assert_eq!(workspace.train("turned", &[])["start"], part["start"]);
}

/// A name that no evaluation of the run gives is refused before anything is loaded, and one of the log's names is taken.
#[test]
fn the_best_checkpoint_is_that_of_a_metric_that_is_measured() {
    let mut workspace = Workspace::new();
    workspace.set("train.eval_every", 1).set("checkpoint.best_is", "lower");
    let lower = |name: &str| format!("checkpoint.best_metric={name}");
    let output = output_of(&mut workspace.train_command("none", &["--set", &lower("eval/los")]));
    let message = stderr_of(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("checkpoint.best_metric") && message.contains("head3/chain"), "{message}");
    assert!(!message.contains("loading") && !workspace.path("none").exists(), "{message}");
    workspace.train("run", &["--set", &lower("eval/head2/loss")]);
    let read = |name: &str| -> Value { serde_json::from_slice(&fs::read(workspace.path(name)).unwrap()).unwrap() };
    let best = read("run/best.json");
    assert_eq!(best["metric"], "head2/loss");
    let log = fs::read_to_string(workspace.path("run/metrics.jsonl")).unwrap();
    let rows = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).filter(|row| row["step"] != 0);
    let lowest = rows.filter_map(|row| row["eval/head2/loss"].as_f64()).fold(f64::INFINITY, f64::min);
    assert_eq!(best["value"].as_f64(), Some(lowest));
}

/// Each epoch meets the poisoned document once. A step that is passed over leaves nothing behind but its number, also where
/// the run goes on in another process, and one too many ends the run.
#[test]
fn some_steps_that_are_not_finite_may_be_passed_over() {
    let mut workspace = with_a_zebra();
    workspace.set("optim.schedule", json!({"kind": "constant", "warmup_steps": 2}));
    workspace.set("train.log_every", 3).set("train.skip_non_finite", 2).set("checkpoint.keep_last", 0);
    poison(&workspace);
    let run = |out: &str, arguments: &[&str]| output_of(&mut workspace.train_command(out, arguments));
    let output = run("whole", &[]);
    let (message, report) = (stderr_of(&output), serde_json::from_slice::<Value>(&output.stdout).unwrap());
    assert!(output.status.success(), "{message}");
    assert_eq!(report["skipped_steps"], 2);
    let lines: Vec<&str> = message.lines().filter(|line| line.starts_with("warning: step ")).collect();
    assert!(lines.len() == 2 && lines.iter().all(|line| line.contains("poisoned")), "{message}");
    assert!(lines[0].contains("skipped, 1 of 2") && lines[1].contains("skipped, 2 of 2"), "{lines:?}");
    let step: u64 = lines[0].split(' ').nth(2).unwrap().trim_end_matches(':').parse().unwrap();

    let folder = |out: &str, step: u64| workspace.path(out).join(format!("step-{step:08}"));
    let tensors = |step: u64| tensors_of(&folder("whole", step).join("optimizer.safetensors"));
    for ((name, before), (_, after)) in tensors(step - 1).iter().zip(&tensors(step)) {
        assert_eq!(largest_difference(before, after), 0.0, "{name} of a step that was passed over");
    }
    let figures = |out: &str| {
        let text = fs::read_to_string(workspace.path(out).join("metrics.jsonl")).unwrap();
        let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let kept = |mut row: Value| {
            let clock = |name: &str| name == "time" || name.ends_with("_seconds") || name.ends_with("_per_second");
            row.as_object_mut().unwrap().retain(|name, _| !clock(name));
            row
        };
        rows.map(kept).collect::<Vec<_>>()
    };
    let rows = figures("whole");
    let logged: Vec<&Value> = rows.iter().filter(|row| row.get("train/loss").is_some()).collect();
    assert!(logged.len() > 3 && logged.last().unwrap()["train/skipped_steps"] == 2.0, "{rows:?}");
    for row in &logged {
        let of = |name: &str| row[format!("train/{name}")].as_f64().unwrap_or_else(|| panic!("{name}: {row}"));
        assert!(of("loss") > 0.1 && of("head1/loss") > 0.1, "{row}");
        assert!(of("gradient_norm") > 0.0 && of("gradient_norm") <= of("gradient_norm_max"), "{row}");
        assert!(of("gradient_norm_mean") > 0.0 && of("gradient_norm_mean") <= of("gradient_norm_max"), "{row}");
    }

    // In two parts: the same bytes, the same figures.
    let stop = format!("train.max_steps={step}");
    assert!(run("parts", &["--set", &stop]).status.success());
    let output = run("parts", &["--resume"]);
    assert!(output.status.success(), "{}", stderr_of(&output));
    let steps = report["steps"].as_u64().unwrap();
    for name in ["model.safetensors", "optimizer.safetensors"] {
        let read = |out: &str| fs::read(folder(out, steps).join(name)).unwrap();
        assert!(read("whole") == read("parts"), "{name}");
    }
    let last = |out: &str| figures(out).into_iter().rfind(|row| row.get("train/loss").is_some());
    assert_eq!(last("whole"), last("parts"));

    // One too many, with the first of them in an earlier process; a run that ended so may be allowed more.
    assert!(run("short", &["--set", &stop, "--set", "train.skip_non_finite=1"]).status.success());
    let output = run("short", &["--resume", "--set", "train.skip_non_finite=1"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr_of(&output).contains("is not finite; stopped before the update"), "{}", stderr_of(&output));
    let output = run("short", &["--resume"]);
    assert!(output.status.success(), "{}", stderr_of(&output));
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["skipped_steps"], 2);
}
