//! Layers of one target on two devices: the numbers of one device to the last bit. The stand-in refuses an operator on
//! tensors of two, so that every move that is missing is found.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::{Counts, on_device, rehearsed};
use crate::decoding;
use crate::fixture::{Workspace, output_of, specforge, stderr_of};

const TWO: &str = "cuda:0,cuda:1";
/// Of the targets below the one that everything is done with.
const WHOLE: usize = 1;

/// Targets of which each has something that others lack: a plain one, windows with two rotary embeddings and a tied head,
/// experts with sinks, frequencies that follow from the length.
fn targets() -> [Value; 4] {
    [
        json!({"num_hidden_layers": 5}),
        json!({"model_type": "gemma3_text", "num_hidden_layers": 4, "sliding_window": 8, "sliding_window_pattern": 2,
            "rope_local_base_freq": 100.0, "tie_word_embeddings": true}),
        json!({"model_type": "gpt_oss", "num_hidden_layers": 3, "num_local_experts": 4, "num_experts_per_tok": 2,
            "sliding_window": 8, "head_dim": 8,
            "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}}),
        json!({"model_type": "phi3", "num_hidden_layers": 2, "original_max_position_embeddings": 128,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [2.0, 2.5, 3.0, 4.0]}}),
    ]
}

fn with_two(command: &mut Command, workspace: &Workspace) -> Option<(Value, Counts)> {
    on_device(command.env("REHEARSAL_DEVICES", "2"), workspace)
}

/// Every file below a folder with its bytes, those left out that hold times and places.
fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        let name = entry.file_name().unwrap().to_string_lossy().into_owned();
        match entry.is_dir() {
            true => files.extend(self::files(&entry)),
            false if name.ends_with(".safetensors") || name.ends_with(".bin") => {
                files.push((name, fs::read(&entry).unwrap()));
            }
            false => {}
        }
    }
    files.sort();
    files
}

/// Training with real acceptance on the way for every target; of one that has most to move, both methods, capture, and batches of
/// trees.
#[test]
fn two_devices_give_the_bits_of_one() {
    for (place, target) in targets().into_iter().enumerate() {
        let is_whole = place == WHOLE;
        let mut workspace = Workspace::with_model(&target);
        workspace.configuration["eval"] = json!({"every": 3, "prompts": 3, "max_new_tokens": 6});
        workspace.set("train.max_steps", 3);
        for draft in [
            json!({"algorithm": "medusa", "num_heads": 2}),
            json!({"algorithm": "eagle3", "draft_vocab_size": 200, "ttt_steps": 2, "capture": [0, 1, 2]}),
        ] {
            if draft["algorithm"] == "medusa" && !is_whole {
                continue;
            }
            workspace.configuration["draft"] = draft.clone();
            let name = draft["algorithm"].as_str().unwrap();
            let out = |devices: &str| format!("{name}-{devices}");
            let train = |devices: &str| {
                let list = ["--device", "auto", "--target-devices", devices];
                with_two(&mut workspace.train_command(&out(devices), &list), &workspace)
            };
            let Some((one, alone)) = train("cuda:1") else { return };
            let (two, spread) = train(TWO).unwrap();
            assert_eq!(two["end"], one["end"], "{target}, {name}");
            let [one, two] = ["cuda:1", TWO].map(|devices| files(&workspace.path(&out(devices))));
            assert!(one.len() > 1 && one == two, "{target}, {name}: checkpoints differ");
            assert!(alone.bytes["between"] == 0 && spread.bytes["between"] > 0, "{:?} {:?}", alone.bytes, spread.bytes);
            // Copies between devices wait for nobody.
            let waits = |counts: &Counts| {
                counts.waits.get("copy to the host").copied().unwrap_or(0)
                    + counts.waits.get("synchronize").unwrap_or(&0)
            };
            assert_eq!(waits(&alone), waits(&spread), "{:?} {:?}", alone.waits, spread.waits);
        }

        if !is_whole {
            continue;
        }
        let capture = |devices: &str| {
            let mut command = specforge(&["capture", "--json", "--dtype", "float32", "--target-devices", devices]);
            command
                .arg("--config")
                .arg(workspace.config())
                .arg("--out")
                .arg(workspace.path(&format!("store-{devices}")));
            with_two(&mut command, &workspace).unwrap();
            files(&workspace.path(&format!("store-{devices}")))
        };
        let (one, two) = (capture("cuda:1"), capture(TWO));
        assert!(!one.is_empty() && one == two, "{target}: stores differ");

        let data = workspace.path("questions.jsonl");
        decoding::questions(&data);
        for (draft, tree) in [("medusa", "mc_sim_7b_63"), ("eagle3", "dynamic:depth=3,top_k=3,nodes=7")] {
            let eval = |devices: &str| {
                let mut command =
                    specforge(&["eval", "--json", "--max-new-tokens", "12", "--batch", "3", "--tree", tree]);
                command.args(["--target-devices", devices, "--target"]).arg(workspace.path("model"));
                command.arg("--draft").arg(workspace.path(&format!("{draft}-{TWO}"))).arg("--data").arg(&data);
                with_two(&mut command, &workspace).unwrap().0
            };
            let (one, two) = (eval("cuda:1"), eval(TWO));
            assert_eq!(two["lossless"]["faults"], 0, "{two}");
            for key in ["tokens", "rounds", "accepted_lengths"] {
                assert_eq!(two[key], one[key], "{target}, {draft}: {key}");
            }
            assert_eq!((&one["settings"]["device"], &two["settings"]["device"]), (&json!("cuda:1"), &json!(TWO)));
        }
    }
}

/// The other commands that load a target take the list, with numbers of layers in it, and the draft may be elsewhere.
#[test]
fn every_command_takes_the_list() {
    let workspace = decoding::workspace();
    let (model, heads, data) = (workspace.path("model"), workspace.path("medusa-files"), workspace.path("bench.jsonl"));
    decoding::questions(&data);
    let run = |devices: &[&str], command: &str, arguments: &[&dyn AsRef<std::ffi::OsStr>]| {
        let mut command = specforge(&[command, "--json"]);
        command.args(devices).arg("--target").arg(&model).args(arguments);
        with_two(&mut command, &workspace)
    };
    let (two, one) = (["--target-devices", "cuda:1=1,cuda:0=1"], ["--device", "cuda:0"]);
    let (length, out) = (["--max-new-tokens", "12"], |name: &str| workspace.path(name));
    let regen = |devices: &[&str], name: &str| {
        run(devices, "regen", &[&"--prompts", &data, &"--out", &out(name), &length[0], &length[1]])
    };
    if regen(&one, "one.jsonl").is_none() {
        return;
    }
    regen(&two, "two.jsonl").unwrap();
    assert_eq!(fs::read(out("one.jsonl")).unwrap(), fs::read(out("two.jsonl")).unwrap());
    let tree = |devices: &[&str], name: &str| {
        let arguments: [&dyn AsRef<std::ffi::OsStr>; 8] =
            [&"--draft", &heads, &"--data", &data, &"--out", &out(name), &"--nodes", &"4"];
        run(devices, "tree", &arguments).unwrap().0["choices"].clone()
    };
    assert_eq!(tree(&one, "one.json"), tree(&two, "two.json"));
    let generate = |devices: &[&str], name: &str| {
        let arguments: [&dyn AsRef<std::ffi::OsStr>; 8] =
            [&"--draft", &heads, &"--prompt", &"a cold bird", &length[0], &length[1], &"--trace", &out(name)];
        run(devices, "generate", &arguments).unwrap().0["token_ids"].clone()
    };
    assert_eq!(generate(&one, "a"), generate(&two, "b"));
    // Layers on one device, everything else on the other.
    assert_eq!(generate(&["--device", "cuda:0", "--target-devices", "cuda:1"], "c"), generate(&one, "d"));
    let compared = run(&two, "compare", &[&out("a"), &out("b")]).unwrap().0;
    assert_eq!(compared["verdict"], "equal", "{compared}");
    run(&two, "bench", &[&"--prefill", &"1x16", &"--decode", &"2x8x4", &"--verify", &"1x8x4"]).unwrap();
    let mut doctor = specforge(&["doctor", "--json", "--max-new-tokens", "8"]);
    doctor.args(two).arg("--target").arg(&model).arg("--draft").arg(&heads).env("REHEARSAL_DEVICES", "2");
    let output = output_of(rehearsed(&mut doctor).unwrap());
    assert!(!stderr_of(&output).contains("same device"), "{}", stderr_of(&output));
}

/// A list of one device asks for nothing that `--device` does not.
#[test]
fn a_list_of_one_costs_nothing() {
    let workspace = decoding::workspace();
    let generate = |devices: &[&str]| {
        let mut command = specforge(&["generate", "--json", "--max-new-tokens", "16", "--prompt", "a cold bird"]);
        command.args(devices).arg("--target").arg(workspace.path("model"));
        with_two(command.arg("--draft").arg(workspace.path("eagle3-files")), &workspace)
    };
    let Some((_, plain)) = generate(&["--device", "cuda:0"]) else { return };
    let (_, listed) = generate(&["--target-devices", "cuda:0"]).unwrap();
    assert_eq!((plain.kernels, plain.waits, plain.bytes), (listed.kernels, listed.waits, listed.bytes));
}

#[test]
fn devices_that_are_not_there_are_refused() {
    let workspace = Workspace::new();
    for (list, word) in [
        ("cuda:0,cuda:2", "cuda:2 is not there"),
        ("cuda:0,cuda:0", "twice"),
        ("cuda:0=3,cuda:1=3", "the devices get 6"),
        ("cpu,cuda:0", "`cpu`"),
    ] {
        let mut command = specforge(&["generate", "--prompt", "a", "--target-devices", list, "--target"]);
        let Some(command) = rehearsed(command.arg(workspace.path("model")).env("REHEARSAL_DEVICES", "2")) else {
            return;
        };
        let output = output_of(command);
        assert_eq!(output.status.code(), Some(2), "{list}: {}", stderr_of(&output));
        assert!(stderr_of(&output).contains(word), "{list}: {}", stderr_of(&output));
    }
    let mut command = specforge(&["generate", "--prompt", "a", "--device", "cpu", "--target-devices", TWO, "--target"]);
    let output = output_of(rehearsed(command.arg(workspace.path("model"))).unwrap());
    assert!(output.status.code() == Some(2) && stderr_of(&output).contains("on the CPU"), "{}", stderr_of(&output));
}
