//! Every way that the program goes on a GPU, gone without one: `libtorch_cuda.cpp` plays libtorch's CUDA half, `libcuda.cpp`
//! NVIDIA's driver and compiler, and the unchanged program opens them. What is computed is then the CPU's, so results must be those of `--device cpu`; what is
//! seen is whether all tensors of an operator are on one device, whether memory of the device is read as the host's, and
//! how often the host waits for the device.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::{Value, json};
use specforge::device::{self, CudaState};
use specforge::weights;
use tch::{Device, Kind, Tensor};

mod devices;
mod kernels;

use crate::decoding;
use crate::fixture::{Workspace, json_of, model_config, model_tensors, output_of, specforge, stderr_of};

/// The folder of libtorch's libraries with the stand-in among them, or why there is none.
fn libraries() -> Result<&'static Path, &'static str> {
    static FOLDER: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    FOLDER.get_or_init(make_libraries).as_deref().map_err(String::as_str)
}

fn make_libraries() -> Result<PathBuf, String> {
    let libtorch = device::libtorch_folder().ok_or("libtorch is not loaded")?;
    if libtorch.join("libtorch_cuda.so").exists() {
        return Err(format!("{} has the real one", libtorch.display()));
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-rehearsal");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
    // The program looks beside the libtorch_cpu that it has loaded, and the system tells it no links' names.
    for entry in fs::read_dir(&libtorch).map_err(|error| error.to_string())?.flatten() {
        let place = folder.join(entry.file_name());
        if entry.path().is_file() && fs::hard_link(entry.path(), &place).is_err() {
            fs::copy(entry.path(), &place).map_err(|error| error.to_string())?;
        }
    }
    let include = libtorch.with_file_name("include");
    compile("libtorch_cuda.cpp", &folder.join("libtorch_cuda.so"), |command| {
        command.args(["-ltorch_cpu", "-lc10", "-L"]).arg(&libtorch);
        command.arg("-I").arg(&include).arg("-I").arg(include.join("torch/csrc/api/include"));
    })?;
    // What it takes from the other is there when it is opened.
    let driver = folder.join("libcuda.so.1");
    compile("libcuda.cpp", &driver, |_| {})?;
    fs::hard_link(&driver, folder.join("libnvrtc.so.13")).map_err(|error| error.to_string())?;
    Ok(folder)
}

/// Compiles a file of this folder into a library.
fn compile(source: &str, library: &Path, more: impl Fn(&mut Command)) -> Result<(), String> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/rehearsal").join(source);
    // It may be two words, such as `ccache g++`.
    let mut words = compiler.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or("c++"));
    command.args(words).args(["-O1", "-std=c++17", "-fPIC", "-shared", "-w"]).arg(&source);
    more(&mut command);
    let output = command.arg("-o").arg(library).output().map_err(|error| format!("{compiler}: {error}"))?;
    // A compiler that is there and refuses is a fault of the source.
    assert!(output.status.success(), "{}", stderr_of(&output));
    Ok(())
}

/// The program with this libtorch; nothing where it cannot be made.
fn rehearsed(command: &mut Command) -> Option<&mut Command> {
    match libraries() {
        Ok(folder) => Some(command.env("LD_LIBRARY_PATH", folder)),
        Err(reason) => {
            eprintln!("SKIPPED: no rehearsal of CUDA: {reason}");
            None
        }
    }
}

/// What the stand-in counted while a command ran, by the reason of the wait or the name of the operator.
struct Counts {
    waits: BTreeMap<String, i64>,
    kernels: BTreeMap<String, i64>,
    /// Copied `to_device` and `to_host`.
    bytes: BTreeMap<String, i64>,
}

impl Counts {
    fn waits(&self) -> i64 {
        self.waits.values().sum()
    }

    fn launches(&self) -> i64 {
        self.kernels.values().sum()
    }
}

/// Runs a command on the rehearsed device: its result and what was counted.
fn on_device(command: &mut Command, workspace: &Workspace) -> Option<(Value, Counts)> {
    let file = workspace.path("counts.json");
    let result = json_of(rehearsed(command)?.env("REHEARSAL_COUNTS", &file));
    let counts: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    let list = |key: &str| serde_json::from_value(counts[key].clone()).unwrap();
    Some((result, Counts { waits: list("waits"), kernels: list("kernels"), bytes: list("bytes") }))
}

/// Numbers of two results are the same but for rounding, wherever they stand in them.
#[track_caller]
fn near(got: &Value, want: &Value, tolerance: f64, place: &str) {
    match (got, want) {
        (Value::Object(got), Value::Object(want)) => {
            assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "{place}");
            got.iter().for_each(|(key, got)| near(got, &want[key], tolerance, &format!("{place}.{key}")));
        }
        _ => match (got.as_f64(), want.as_f64()) {
            (Some(got), Some(want)) => {
                assert!((got - want).abs() <= tolerance * (1.0 + want.abs()), "{place}: {got} and not {want}");
            }
            _ => assert_eq!(got, want, "{place}"),
        },
    }
}

fn eagle3(workspace: &mut Workspace) {
    workspace.configuration["draft"] =
        json!({"algorithm": "eagle3", "draft_vocab_size": 200, "ttt_steps": 3, "capture": [0, 1]});
}

/// A block drafter with everything that the family may have: windows, convolutions, a head.
fn block(workspace: &mut Workspace, algorithm: &str) {
    let mut section = json!({"algorithm": algorithm, "num_layers": 2, "block_size": 4, "num_anchors": 8,
        "target_layer_ids": [0, -1], "mask_token_id": 1});
    let more = match algorithm {
        "dflash" => json!({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}),
        "dflash2" => json!({"head": {"selector_rank": 6, "selector_top_k": 4},
            "conv": {"kernel_size": 2, "group_size": 8}}),
        _ => json!({"head": {"markov_rank": 6, "markov_head_type": "rnn"}, "draft_vocab_size": 200}),
    };
    section.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    workspace.configuration["draft"] = section;
}

/// Asks this process, started with the stand-in, to do what a GPU refuses.
const REFUSED: &str = "SPECFORGE_TEST_REHEARSAL";

/// The rehearsal is worth something: it refuses what CUDA refuses, and lets through what CUDA lets through.
#[test]
fn what_a_gpu_refuses_is_refused() {
    if std::env::var_os(REFUSED).is_some() {
        return;
    }
    let run = |what: &str| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "rehearsal::a_fault_in_a_process_of_its_own", "--nocapture"]);
        command.env(REFUSED, what).env("REHEARSAL_DEVICES", "2");
        Some(output_of(rehearsed(&mut command)?))
    };
    let Some(sound) = run("sound") else { return };
    assert!(sound.status.success(), "{}", stderr_of(&sound));
    for fault in ["two devices", "two GPUs", "indices of the host", "a list of two devices"] {
        let output = run(fault).unwrap();
        assert!(!output.status.success(), "{fault}");
        assert!(stderr_of(&output).contains("Expected all tensors to be on the same device"), "{}", stderr_of(&output));
    }
    // The system ends who reads the device's memory as the host's.
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(run("the host reads").unwrap().status.signal(), Some(11));
}

#[test]
fn a_fault_in_a_process_of_its_own() {
    let Some(what) = std::env::var_os(REFUSED) else { return };
    assert_eq!(device::cuda(), &CudaState::Usable(2));
    let here = Tensor::arange(6, (Kind::Float, Device::Cpu));
    let there = here.to_device(Device::Cuda(0));
    match what.to_str().unwrap() {
        "sound" => {
            assert_eq!(there.device(), Device::Cuda(0));
            // A number may be the host's.
            let sum = &there + Tensor::from(1f32);
            let _ = there.shallow_clone().view([2, 3]).transpose(0, 1).fill_(7.0);
            assert_eq!(Vec::<f32>::try_from(&there).unwrap(), [7.0; 6]);
            assert_eq!(Vec::<f32>::try_from(&sum).unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
            let other = device::moved(&sum, Device::Cuda(1));
            assert!(other.device() == Device::Cuda(1) && (&other + &other).device() == Device::Cuda(1));
            assert_eq!(Vec::<f32>::try_from(&other + 1.0).unwrap(), [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
        }
        "two devices" => drop(&there + &here),
        "two GPUs" => drop(&there + here.to_device(Device::Cuda(1))),
        "indices of the host" => drop(there.index_select(0, &Tensor::from_slice(&[1i64, 2]))),
        "a list of two devices" => drop(Tensor::cat(&[&there, &here], 0)),
        "the host reads" => {
            // SAFETY: none; that is what is tried.
            let number = unsafe { *there.data_ptr().cast::<f32>() };
            println!("read {number}");
        }
        other => panic!("{other}"),
    }
}

/// All that `gpu-check` compares between a GPU and the CPU.
#[test]
fn the_check_of_a_gpu_passes() {
    let mut command = specforge(&["gpu-check", "--quick", "--device", "cuda", "--json"]);
    let Some(command) = rehearsed(&mut command) else { return };
    let report = json_of(command);
    assert_eq!((&report["device"], &report["passed"]), (&json!("cuda:0"), &json!(true)), "{report}");
    assert!(report["parity"].as_array().unwrap().len() > 50);
    assert_eq!(report["kernels"]["state"], "compiled for sm_90");
    assert_eq!(report["repeat"]["state"], "cuda:0");
    assert!(report["repeat"]["checks"].as_array().unwrap().len() > 5);
    let drafts = report["training"].as_array().unwrap();
    assert!(
        drafts.len() == 6 && drafts.iter().all(|draft| draft["result"]["peak_bytes"].as_i64() > Some(0)),
        "{drafts:?}"
    );
}

/// The same numbers as on the CPU, online and from a store that the device filled; few waits in a step.
#[test]
fn training_is_that_of_the_cpu() {
    for algorithm in ["medusa", "eagle3", "dflash", "dflash2", "dspark"] {
        let mut workspace = Workspace::new();
        match algorithm {
            "medusa" => {}
            "eagle3" => eagle3(&mut workspace),
            _ => block(&mut workspace, algorithm),
        }
        workspace.set("train.log_every", 1000);
        let train = |workspace: &Workspace, out: &str, more: &[&str]| {
            on_device(&mut workspace.train_command(out, &[&["--device", "cuda"], more].concat()), workspace)
        };
        let want = workspace.train("cpu", &["--device", "cpu"]);
        let Some((got, short)) = train(&workspace, "cuda", &[]) else { return };
        near(&got["end"], &want["end"], 1e-4, algorithm);

        // States that are kept on the host come back as they were.
        let keeping = ["--set", "target.keep_hidden_states=true", "--set", "train.max_steps=8"];
        let (kept, _) = train(&workspace, "kept", &keeping).unwrap();
        near(&kept["end"], &workspace.train("cpu-long", &["--set", "train.max_steps=8"])["end"], 1e-4, "kept states");

        for (element, tolerance) in [("float32", 1e-4), ("float8", 0.05)] {
            let mut store = specforge(&["capture", "--json", "--device", "cuda", "--dtype", element, "--config"]);
            store.arg(workspace.config()).arg("--out").arg(workspace.path(element));
            on_device(&mut store, &workspace).unwrap();
            let from_store = format!("target.feature_store={}", workspace.path(element).display());
            let (offline, _) = train(&workspace, &format!("from-{element}"), &["--set", &from_store]).unwrap();
            near(&offline["end"]["loss"], &want["end"]["loss"], tolerance, element);
        }

        // bfloat16 differs where the device adds up in float32 what the CPU rounds.
        let narrow = ["--set", "target.dtype=bfloat16"];
        let (got, _) = train(&workspace, "cuda-narrow", &narrow).unwrap();
        near(&got["end"]["loss"], &workspace.train("cpu-narrow", &narrow)["end"]["loss"], 0.02, "bfloat16");

        // Twice as many steps wait as much longer as four steps do.
        let (_, long) = train(&workspace, "long", &["--set", "train.max_steps=8"]).unwrap();
        let a_step = (long.waits() - short.waits()) as f64 / 4.0;
        let kernels = (long.launches() - short.launches()) / 4;
        println!("{algorithm}: {a_step} waits and {kernels} kernels a step; {:?} in all", long.waits);
        assert!(a_step <= 3.0, "{algorithm}: {a_step} waits a step");
    }
}

/// Attention of a pack does not cost a launch for each of its documents: four times as many are the same launches, in 16 bits
/// and in 32.
#[test]
fn launches_of_a_step_do_not_grow_with_its_documents() {
    let mut workspace = Workspace::new();
    eagle3(&mut workspace);
    // One chunk of logits: there are more of them with more rows.
    workspace.set("train.chunk_mib", 64);
    for (dtype, kernel) in
        [("bfloat16", "aten::_flash_attention_forward"), ("float32", "aten::_efficient_attention_forward")]
    {
        workspace.set("target.dtype", dtype);
        let launches = |batch: &str| {
            let mut command =
                specforge(&["bench-train", "--json", "--device", "cuda", "--repeat", "1", "--batch", batch]);
            command.arg("--config").arg(workspace.config());
            on_device(&mut command, &workspace).map(|(_, counts)| counts)
        };
        let Some(few) = launches("6x24") else { return };
        let many = launches("24x24").unwrap();
        println!("{dtype}: {} and {} launches", few.launches(), many.launches());
        assert_eq!(few.launches(), many.launches(), "{:?}\n{:?}", few.kernels, many.kernels);
        // Three steps, forward and again for the backward pass, three times.
        assert_eq!(many.kernels.get(kernel), Some(&18), "{:?}", many.kernels);
    }
}

/// Nor do those of a block drafter with its documents, its blocks or the context that they see. Windows, which move with the
/// row, are a run of each row.
#[test]
fn launches_of_a_block_drafters_step_do_not_grow_with_its_blocks() {
    for algorithm in ["dflash", "dflash2", "dspark"] {
        let mut workspace = Workspace::new();
        block(&mut workspace, algorithm);
        workspace.set("draft.layer_types", Value::Null).set("draft.sliding_window", Value::Null);
        // One chunk of logits: there are more of them with more rows.
        workspace.set("train.chunk_mib", 64).set("target.dtype", "bfloat16").set("draft.num_anchors", 64);
        let launches = |batch: &str| {
            let mut command =
                specforge(&["bench-train", "--json", "--device", "cuda", "--repeat", "1", "--batch", batch]);
            command.arg("--config").arg(workspace.config());
            on_device(&mut command, &workspace).map(|(_, counts)| counts)
        };
        let Some(few) = launches("2x24") else { return };
        let many = launches("8x48").unwrap();
        println!("{algorithm}: {} and {} launches", few.launches(), many.launches());
        assert_eq!(few.launches(), many.launches(), "{algorithm}: {:?}\n{:?}", few.kernels, many.kernels);
        assert_eq!(few.waits(), many.waits(), "{algorithm}: {:?}\n{:?}", few.waits, many.waits);
    }
}

/// What a round copies does not grow with the vocabulary, whatever the policy: tokens and scores travel, never a row.
#[test]
fn a_round_copies_no_row_of_the_vocabulary() {
    let workspace = decoding::workspace();
    let policies = [
        &["--temperature", "0.8"][..],
        &["--temperature", "0.9", "--top-p", "0.9", "--top-k", "40"],
        &["--temperature", "1", "--policy", "maximal"],
    ];
    for draft in [None, Some("medusa-files"), Some("eagle3")] {
        for policy in policies {
            let generate = |length: &str| {
                let mut command =
                    specforge(&["generate", "--json", "--max-new-tokens", length, "--prompt", "a cold bird"]);
                command.args(["--device", "cuda", "--target"]).arg(workspace.path("model")).args(policy);
                if let Some(draft) = draft {
                    command.arg("--draft").arg(workspace.path(draft));
                }
                on_device(&mut command, &workspace)
            };
            let Some(((short, few), (long, many))) = generate("8").zip(generate("32")) else { return };
            let rounds = |result: &serde_json::Value| result["summary"]["rounds"].as_i64().unwrap();
            let more = rounds(&long) - rounds(&short);
            assert!(more > 4, "{long}");
            let copied = |way: &str| (many.bytes[way] - few.bytes[way]) / more;
            println!(
                "{draft:?} {policy:?}: {} to the host and {} back a round",
                copied("to_host"),
                copied("to_device")
            );
            // A row of 454 logits in float32.
            assert!(copied("to_host") < 454 * 4, "{draft:?} {policy:?}: {} bytes a round", copied("to_host"));
        }
    }
}

/// A checkpoint of one device goes on on the other; real acceptance is measured on the way, with a smaller vocabulary.
#[test]
fn a_checkpoint_changes_devices() {
    let mut workspace = Workspace::new();
    workspace.set("draft.draft_vocab_size", 200);
    workspace.configuration["eval"] = json!({"every": 2, "prompts": 2, "max_new_tokens": 8});
    workspace.set("train.save_every", 2).set("optim.schedule", json!({"kind": "cosine", "total_steps": 4}));
    let want = workspace.train("whole", &[]);
    for (first, second) in [("cuda", "cpu"), ("cpu", "cuda")] {
        let mut begin = workspace.train_command(first, &["--device", first, "--set", "train.max_steps=2"]);
        let Some(begin) = rehearsed(&mut begin) else { return };
        json_of(begin);
        let mut rest = workspace.train_command(first, &["--device", second, "--resume"]);
        near(&json_of(rehearsed(&mut rest).unwrap())["end"], &want["end"], 1e-4, second);
    }
}

/// The same text as on the CPU with every kind of draft and every policy; real acceptance while training.
#[test]
fn decoding_is_that_of_the_cpu() {
    let workspace = decoding::workspace();
    let generate = |device: &str, draft: Option<&str>, more: &[&str]| {
        let mut command = specforge(&["generate", "--json", "--max-new-tokens", "24", "--prompt", "a cold bird"]);
        command.args(["--device", device, "--target"]).arg(workspace.path("model")).args(more);
        if let Some(draft) = draft {
            let folder = workspace.path(draft);
            command.arg("--draft").arg(if folder.is_dir() { folder.as_os_str() } else { draft.as_ref() });
        }
        on_device(&mut command, &workspace)
    };
    let policies =
        [&[][..], &["--temperature", "0.8"], &["--temperature", "1", "--policy", "maximal"], &["--policy", "typical"]];
    for draft in [None, Some("medusa-files"), Some("eagle3"), Some("small"), Some("prompt-lookup")] {
        for policy in policies {
            let Some((got, counts)) = generate("cuda", draft, policy) else { return };
            let (want, _) = generate("cpu", draft, policy).unwrap();
            assert_eq!(got["token_ids"], want["token_ids"], "{draft:?} {policy:?}");
            let rounds = want["summary"]["rounds"].as_i64().unwrap();
            println!("{draft:?} {policy:?}: {} waits in {rounds} rounds: {:?}", counts.waits(), counts.waits);
            // Loading waits about forty times; a round for the target's choices, and for each depth of a tree.
            assert!(!policy.is_empty() || counts.waits() <= 50 + 5 * rounds, "{draft:?}: {:?}", counts.waits);
            if policy.is_empty() && matches!(draft, None | Some("prompt-lookup")) {
                let of = |reason: &str| counts.waits.get(reason).copied().unwrap_or(0);
                // The prompt's choice, and one for each round.
                assert_eq!((of("copy to the host"), of("synchronize")), (1 + rounds, 0), "{draft:?}");
            }
        }
    }
}

/// The other commands that run a target.
#[test]
fn every_command_runs() {
    let workspace = decoding::workspace();
    let (model, heads) = (workspace.path("model"), workspace.path("medusa-files"));
    let (data, prompts) = (workspace.path("bench.jsonl"), workspace.path("prompts.jsonl"));
    decoding::questions(&data);
    let prompt = |id: &str, text: &str| json!({"id": id, "messages": [{"role": "user", "content": text}]}).to_string();
    fs::write(&prompts, [prompt("a", "a cold bird"), prompt("b", "the river")].join("\n")).unwrap();
    let run = |command: &str, arguments: &[&dyn AsRef<std::ffi::OsStr>]| {
        let mut command = specforge(&[command, "--json", "--device", "cuda"]);
        command.args(arguments);
        on_device(&mut command, &workspace).map(|(result, _)| result)
    };
    let length = ["--max-new-tokens", "12"];
    let (target, draft, set) = ("--target", "--draft", "--data");
    let Some(report) = run("eval", &[&target, &model, &draft, &heads, &set, &data, &length[0], &length[1]]) else {
        return;
    };
    assert_eq!(report["lossless"]["faults"], 0, "{report}");
    let out = |name: &str| workspace.path(name);
    run("tree", &[&target, &model, &draft, &heads, &set, &prompts, &"--out", &out("tree.json"), &"--nodes", &"4"]);
    run("regen", &[&target, &model, &"--prompts", &prompts, &"--out", &out("answers.jsonl"), &length[0], &length[1]]);
    assert_eq!(fs::read_to_string(out("answers.jsonl")).unwrap().lines().count(), 2);
    run("bench", &[&target, &model, &"--prefill", &"1x16", &"--decode", &"2x8x4", &"--verify", &"1x8x4"]);
    run("bench-train", &[&"--config", &workspace.config(), &"--batch", &"2x32", &"--repeat", &"1"]);
    for name in ["a", "b"] {
        let trace = out(name);
        run("generate", &[&target, &model, &"--prompt", &"a cold bird", &length[0], &length[1], &"--trace", &trace]);
    }
    let compared = run("compare", &[&out("a"), &out("b"), &target, &model]).unwrap();
    assert_eq!(compared["verdict"], "equal", "{compared}");
}

/// Where nobody says which, a target runs in its files' type on the device and in float32 on the CPU, in every command.
#[test]
fn without_a_word_a_target_runs_in_its_files_type_on_the_device_alone() {
    let mut workspace = Workspace::new();
    workspace.configuration["target"].as_object_mut().unwrap().remove("dtype");
    let narrow = |(name, tensor): (String, Tensor)| (name, tensor.to_kind(Kind::BFloat16));
    let tensors: Vec<_> = model_tensors(&model_config(&json!({}))).into_iter().map(narrow).collect();
    weights::write_tensors(&workspace.path("model/model.safetensors"), &tensors, &[]).unwrap();
    let (model, data) = (workspace.path("model"), workspace.path("bench.jsonl"));
    decoding::questions(&data);
    for (device, want) in [("cpu", "float32"), ("cuda", "bfloat16")] {
        let run = |command: &mut Command| rehearsed(command.args(["--json", "--device", device])).map(json_of);
        let out = |name: &str| workspace.path(&format!("{name}-{device}"));
        let read = |path: PathBuf| serde_json::from_slice::<Value>(&fs::read(path).unwrap()).unwrap();
        let configured = |command: &str| {
            let mut command = specforge(&[command, "--config"]);
            command.arg(workspace.config()).arg("--set").arg(format!("train.output_dir={}", out("run").display()));
            command
        };
        let on_model = |command: &str| {
            let mut command = specforge(&[command, "--max-new-tokens", "4", "--target"]);
            command.arg(&model);
            command
        };
        let Some(plan) = run(configured("train").arg("--plan")) else { return };
        assert_eq!(plan["element_type"], want);
        run(&mut configured("train"));
        assert_eq!(read(out("run").join("config.json"))["target"]["dtype"], want);
        run(configured("capture").arg("--out").arg(out("store")));
        assert_eq!(read(out("store").join("store.json"))["target_dtype"], want);
        let answer = run(on_model("generate").args(["--prompt", "a cold bird"])).unwrap();
        assert_eq!(answer["summary"]["settings"]["dtype"], want);
        let report = run(on_model("eval").args(["--draft", "prompt-lookup", "--data"]).arg(&data)).unwrap();
        assert_eq!(report["settings"]["dtype"], want);
        run(on_model("regen").arg("--prompts").arg(&data).arg("--out").arg(out("answers")));
        assert_eq!(read(out("answers").with_extension("run.json"))["same"]["element_type"], want);
        // What is said counts on either.
        let told = run(on_model("generate").args(["--prompt", "a cold bird", "--dtype", "float16"])).unwrap();
        assert_eq!(told["summary"]["settings"]["dtype"], "float16");
    }
}
