//! Exports, read back: the same logits to the bit as the checkpoint, and a clear refusal of every damage.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use specforge::draft::medusa::{HeadProjection, Medusa, MedusaConfig};
use specforge::draft::{DraftContext, DraftModel};
use specforge::export::medusa::{Heads, read};
use specforge::models::TargetInfo;
use specforge::nn::{Embedding, Head, noise};
use specforge::weights;
use tch::{Device, Kind, Tensor};

use crate::fixture::{
    TOKENIZER_SIZE, Workspace, contents, json_of, litter, output_of, specforge, stderr_of, tensors_of,
};

const HIDDEN: i64 = 32;

/// Logits of every head on the same random rows.
fn logits(config: &MedusaConfig, tensors: &[(String, Tensor)], head: &Tensor, kind: Kind) -> Vec<Tensor> {
    let target = TargetInfo::of(HIDDEN, TOKENIZER_SIZE, 2, 256);
    let (embedding, head) = (&Embedding::plain(head.shallow_clone()), &Head::plain(head.shallow_clone()));
    let vocabulary = None;
    let (device, seed, chunk_bytes) = (Device::Cpu, 0, 1 << 20);
    let context = DraftContext { target, embedding, head, vocabulary, weights: None, kind, device, seed, chunk_bytes };
    let draft = Medusa::new(config.clone(), &context).unwrap();
    let _no_grad = tch::no_grad_guard();
    for parameter in draft.parameters() {
        let (_, value) = tensors.iter().find(|(name, _)| *name == parameter.name).unwrap();
        assert_eq!(value.kind(), kind, "{}", parameter.name);
        parameter.value.shallow_clone().copy_(value);
    }
    let rows = noise::normal(&[9, HIDDEN], 1.0, 5, 5).to_kind(kind);
    (0..config.num_heads).map(|number| draft.compute_logits(number, &rows)).collect()
}

fn export(checkpoint: &Path, format: &str, out: &Path, more: &[&str]) -> Value {
    let mut command = specforge(&["export", "--json", "--format", format, "--checkpoint"]);
    json_of(command.arg(checkpoint).arg("--out").arg(out).args(more))
}

fn check(folder: &Path) -> Value {
    json_of(specforge(&["export", "--json", "--check"]).arg(folder))
}

#[test]
fn exported_heads_give_the_logits_of_the_checkpoint() {
    let mut workspace = Workspace::new();
    workspace.set("draft.num_layers", 2).set("draft.num_heads", 2);
    let head = tensors_of(&workspace.path("model")).into_iter().find(|(name, _)| name == "lm_head.weight").unwrap().1;
    for (projection, dtype, share) in [
        ("own", "float32", false),
        ("own", "bfloat16", true),
        ("shared", "float32", true),
        ("shared", "bfloat16", false),
    ] {
        let run = format!("{projection}-{dtype}");
        workspace.set("draft.projection", projection).set("draft.share_layers", share).set("target.dtype", dtype);
        workspace.train(&run, &[]);
        let checkpoint = workspace.path(&run);
        let trained = tensors_of(&checkpoint.join("step-00000004/model.safetensors"));
        let config = MedusaConfig::read(&workspace.configuration["draft"]).unwrap();
        for (format, written) in
            [("medusa", None), ("medusa-vllm", None), ("medusa", Some("float32")), ("medusa-vllm", Some("bfloat16"))]
        {
            let out = workspace.path(&format!("{run}-{format}-{}", written.unwrap_or("as-is")));
            let more = written.map_or(vec![], |dtype| vec!["--dtype", dtype]);
            let report = export(&checkpoint, format, &out, &more);
            let place = out.display();
            assert_eq!(json!(specforge::export::check(&out).unwrap()), report, "{place}");
            assert_eq!(report["warnings"], json!([]), "{place}");
            assert_eq!((&report["format"], &report["dtype"]), (&json!(format), &json!(written.unwrap_or(dtype))));

            let Heads { config: read_config, hidden_size, tensors, vocabulary } = read(&out).unwrap();
            assert_eq!(vocabulary, None, "{place}");
            assert_eq!((read_config.num_heads, read_config.num_layers, hidden_size), (2, 2, HIDDEN), "{place}");
            let is_own = projection == "own" || format == "medusa-vllm";
            assert_eq!(read_config.projection == HeadProjection::Own, is_own, "{place}");
            assert_eq!(report["parameters"], tensors.iter().map(|(_, tensor)| tensor.numel()).sum::<usize>());
            let kind = if report["dtype"] == "float32" { Kind::Float } else { Kind::BFloat16 };
            let cast: Vec<(String, Tensor)> =
                trained.iter().map(|(name, tensor)| (name.clone(), tensor.to_kind(kind))).collect();
            // The projection that heads share is the target's in the type the heads are written in.
            let head = head.to_kind(kind);
            let expected = logits(&config, &cast, &head, kind);
            for (number, (got, want)) in logits(&read_config, &tensors, &head, kind).iter().zip(&expected).enumerate() {
                // Equal weights lie elsewhere in memory: a product may add them in another order.
                let near = if kind == Kind::Float { 1e-5 } else { 1e-2 };
                assert!(got.allclose(want, near, near, false), "{place}: logits of head {number} differ");
                assert!(want.abs().max().double_value(&[]) > 0.0);
            }
        }
    }
}

/// An engine is started from anywhere, and a folder is published under a name.
#[test]
fn files_name_the_target_by_its_absolute_path_or_as_asked() {
    let mut workspace = Workspace::new();
    let model = workspace.path("model");
    let relative = model.strip_prefix(env!("CARGO_TARGET_TMPDIR")).unwrap().to_str().unwrap();
    workspace.set("target.path", relative);
    workspace.train("run", &[]);
    for format in ["medusa", "medusa-vllm"] {
        let (here, named) = (workspace.path(&format!("{format}-here")), workspace.path(&format!("{format}-named")));
        let report = export(&workspace.path("run"), format, &here, &[]);
        assert_eq!((&base_model(&here), &report["warnings"]), (&json!(model), &json!([])), "{format}");
        let report = export(&workspace.path("run"), format, &named, &["--target-name", "someone/model"]);
        assert_eq!(base_model(&named), "someone/model", "{format}");
        let warning = report["warnings"][0].as_str().unwrap();
        assert!(warning.contains("someone/model is not here"), "{warning}");
        let differing = contents(&here).into_iter().zip(contents(&named)).filter(|(a, b)| a != b).map(|(a, _)| a.0);
        assert!(differing.into_iter().all(|path| path.extension().is_some_and(|end| end == "json")), "{format}");
    }
    let mut command = specforge(&["export", "--target-name", "", "--out", "none", "--checkpoint"]);
    let output = output_of(command.arg(workspace.path("run")));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr_of(&output).contains("--target-name"));
}

fn base_model(folder: &Path) -> Value {
    let config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
    config["base_model_name_or_path"].clone()
}

/// vLLM builds heads by three keys that the original's own files lack, and takes projections from the file alone.
#[test]
fn the_original_layout_says_what_vllm_makes_of_it() {
    let mut workspace = Workspace::new();
    for (projection, words) in
        [("own", "vLLM up to 0.32 loads these names too"), ("shared", "write --format medusa-vllm")]
    {
        workspace.set("draft.projection", projection);
        workspace.train(projection, &[]);
        let out = workspace.path(&format!("{projection}-out"));
        let said = |report: &Value| report["resolved"].to_string();
        let report = export(&workspace.path(projection), "medusa", &out, &[]);
        assert!(said(&report).contains(words), "{report}");
        let mut config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
        let sizes = json!([config["hidden_size"], config["vocab_size"], config["medusa_fc_bias"]]);
        assert_eq!(sizes, json!([HIDDEN, TOKENIZER_SIZE, true]), "{projection}");
        // Other people's files.
        for key in ["hidden_size", "vocab_size", "medusa_fc_bias"] {
            config.as_object_mut().unwrap().remove(key).unwrap();
        }
        fs::write(out.join("config.json"), config.to_string()).unwrap();
        let words = if projection == "own" { "vLLM needs `hidden_size`" } else { words };
        assert!(said(&check(&out)).contains(words), "{projection}");
    }
}

/// What is changed in a sound export, and what the refusal must say.
type Damage = (&'static str, fn(&Path), &'static [&'static str]);

fn change_tensors(path: &Path, change: impl FnOnce(&mut Vec<(String, Tensor)>)) {
    let mut tensors = tensors_of(path);
    change(&mut tensors);
    weights::write_tensors(path, &tensors, &[]).unwrap();
}

fn change_config(folder: &Path, key: &str, value: Value) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert!(config.get(key).is_some_and(|old| *old != value), "{key}");
    config[key] = value;
    fs::write(path, config.to_string()).unwrap();
}

fn find<'a>(tensors: &'a mut [(String, Tensor)], wanted: &str) -> &'a mut (String, Tensor) {
    tensors.iter_mut().find(|(name, _)| name == wanted).unwrap()
}

const ORIGINAL: &str = "medusa_lm_head.safetensors";
const VLLM: &str = "model.safetensors";

const ORIGINAL_DAMAGES: &[Damage] = &[
    (
        "missing tensor",
        |folder| {
            change_tensors(&folder.join(ORIGINAL), |tensors| tensors.retain(|(name, _)| name != "1.0.linear.bias"))
        },
        &[ORIGINAL, "missing (1)", "1.0.linear.bias [32]"],
    ),
    (
        "no tensor at all",
        |folder| change_tensors(&folder.join(ORIGINAL), Vec::clear),
        &["the 0 tensors of medusa_lm_head.safetensors"],
    ),
    (
        "surplus tensor",
        |folder| {
            let extra = ("3.0.linear.bias".to_owned(), Tensor::zeros([32], (Kind::Float, Device::Cpu)));
            change_tensors(&folder.join(ORIGINAL), |tensors| tensors.push(extra));
        },
        &[ORIGINAL, "surplus (1)", "3.0.linear.bias [32]"],
    ),
    (
        "wrong shape",
        |folder| {
            change_tensors(&folder.join(ORIGINAL), |tensors| {
                let tensor = find(tensors, "2.0.linear.weight");
                tensor.1 = tensor.1.narrow(0, 0, 31).contiguous();
            });
        },
        &[ORIGINAL, "wrong shape (1)", "2.0.linear.weight: expected [32, 32], got [31, 32]"],
    ),
    (
        "one head of another vocabulary",
        |folder| {
            change_tensors(&folder.join(ORIGINAL), |tensors| {
                let tensor = find(tensors, "1.1.weight");
                tensor.1 = tensor.1.narrow(0, 0, 400).contiguous();
            });
        },
        &[ORIGINAL, "1.1.weight: expected [454, 32], got [400, 32]"],
    ),
    (
        "all heads of another vocabulary than the target",
        |folder| {
            change_tensors(&folder.join(ORIGINAL), |tensors| {
                for (_, tensor) in tensors.iter_mut().filter(|(name, _)| name.ends_with(".1.weight")) {
                    *tensor = tensor.narrow(0, 0, 400).contiguous();
                }
            });
        },
        &[ORIGINAL, "vocabulary", "the target has 454, the heads have 400"],
    ),
    (
        "mixed element types",
        |folder| {
            change_tensors(&folder.join(ORIGINAL), |tensors| {
                let tensor = find(tensors, "1.0.linear.bias");
                tensor.1 = tensor.1.to_kind(Kind::BFloat16);
            });
        },
        &[ORIGINAL, "one floating-point type", "Float", "BFloat16"],
    ),
    (
        "integers",
        |folder| {
            change_tensors(&folder.join(ORIGINAL), |tensors| {
                tensors.iter_mut().for_each(|(_, tensor)| *tensor = tensor.to_kind(Kind::Int));
            });
        },
        &[ORIGINAL, "one floating-point type", "Int"],
    ),
    (
        "more heads in config.json",
        |folder| change_config(folder, "medusa_num_heads", json!(4)),
        &["missing", "3.0.linear"],
    ),
    (
        "fewer heads in config.json",
        |folder| change_config(folder, "medusa_num_heads", json!(2)),
        &["surplus", "2.0.linear"],
    ),
    (
        "more layers in config.json",
        |folder| change_config(folder, "medusa_num_layers", json!(2)),
        &["expected as many heads and blocks as the 9 tensors"],
    ),
    (
        "no heads",
        |folder| change_config(folder, "medusa_num_heads", json!(0)),
        &["config.json", "`medusa_num_heads`: expected a number from 1 to 4194304, got 0"],
    ),
    (
        "heads that are no number",
        |folder| change_config(folder, "medusa_num_heads", json!("three")),
        &["config.json", "`medusa_num_heads`: expected a number from 1 to 4194304, got \"three\""],
    ),
    (
        "another hidden size in config.json",
        |folder| change_config(folder, "hidden_size", json!(64)),
        &["config.json", "`hidden_size`: the tensors say 32, got 64"],
    ),
    (
        "another vocabulary in config.json",
        |folder| change_config(folder, "vocab_size", json!(400)),
        &["config.json", "`vocab_size`: the tensors say 454, got 400"],
    ),
    ("no config.json", |folder| fs::remove_file(folder.join("config.json")).unwrap(), &["config.json", "No such file"]),
    (
        "config.json cut off",
        |folder| fs::write(folder.join("config.json"), "{\"medusa_num_heads\": 3").unwrap(),
        &["config.json", "not valid JSON"],
    ),
    (
        "another model's config.json",
        |folder| fs::write(folder.join("config.json"), "{}").unwrap(),
        &["no known format"],
    ),
    (
        "truncated file",
        |folder| {
            let path = folder.join(ORIGINAL);
            let length = fs::metadata(&path).unwrap().len();
            fs::File::options().write(true).open(&path).unwrap().set_len(length - 10).unwrap();
        },
        &[ORIGINAL, "is not a whole safetensors file"],
    ),
    (
        "empty file",
        |folder| fs::write(folder.join(ORIGINAL), "").unwrap(),
        &[ORIGINAL, "is not a whole safetensors file"],
    ),
    ("no file", |folder| fs::remove_file(folder.join(ORIGINAL)).unwrap(), &[ORIGINAL]),
];

const VLLM_DAMAGES: &[Damage] = &[
    (
        "missing tensor",
        |folder| change_tensors(&folder.join(VLLM), |tensors| tensors.retain(|(name, _)| name != "lm_heads.2.weight")),
        &[VLLM, "missing (1)", "lm_heads.2.weight [454, 32]"],
    ),
    (
        "tensors of the other layout",
        |folder| {
            change_tensors(&folder.join(VLLM), |tensors| {
                find(tensors, "blocks.0.layers.0.bias").0 = "0.0.linear.bias".to_owned();
            });
        },
        &[VLLM, "missing (1)", "surplus (1)"],
    ),
    (
        "biases switched off",
        |folder| change_config(folder, "medusa_fc_bias", json!(false)),
        &["config.json", "`medusa_fc_bias`: expected true", "hint: vLLM drops the biases"],
    ),
    (
        "more heads in config.json",
        |folder| change_config(folder, "num_heads", json!(5)),
        &["expected as many heads and blocks as the 9 tensors"],
    ),
    (
        "another hidden size in config.json",
        |folder| change_config(folder, "hidden_size", json!(64)),
        &["config.json", "`hidden_size`: the tensors say 32, got 64"],
    ),
    (
        "another vocabulary in config.json",
        |folder| change_config(folder, "truncated_vocab_size", json!(453)),
        &["config.json", "`truncated_vocab_size`: the tensors say 454, got 453"],
    ),
];

#[test]
fn every_damage_is_refused_by_name() {
    let workspace = Workspace::new();
    workspace.train("run", &[]);
    for (format, damages) in [("medusa", ORIGINAL_DAMAGES), ("medusa-vllm", VLLM_DAMAGES)] {
        let sound = workspace.path(&format!("{format}-sound"));
        export(&workspace.path("run"), format, &sound, &[]);
        for (number, (name, damage, expected)) in damages.iter().enumerate() {
            let folder = workspace.path(&format!("{format}-{number}"));
            fs::create_dir(&folder).unwrap();
            contents(&sound).into_iter().for_each(|(path, bytes)| fs::write(folder.join(path), bytes).unwrap());
            damage(&folder);
            let output = output_of(specforge(&["export", "--json", "--check"]).arg(&folder));
            let message = stderr_of(&output);
            assert_eq!(output.status.code(), Some(2), "{format}, {name}: {message}");
            assert_eq!(output.stdout, b"", "{format}, {name}");
            assert!(
                message.starts_with(&format!("error: {}", folder.display())) || message.contains("cannot read"),
                "{message}"
            );
            for part in *expected {
                assert!(message.contains(part), "{format}, {name}: no `{part}` in: {message}");
            }
        }
        // And the sound one is still found sound.
        check(&sound);
    }
}

/// Folders of other people's files are refused and left alone; an older export of the same format is replaced.
#[test]
fn nothing_foreign_is_overwritten() {
    let workspace = Workspace::new();
    workspace.train("run", &[]);
    let refused = |out: &Path, format: &str, expected: &str| {
        let before = contents(&workspace.path(""));
        let mut command = specforge(&["export", "--format", format, "--checkpoint"]);
        let output = output_of(command.arg(workspace.path("run")).arg("--out").arg(out));
        let message = stderr_of(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(expected) && message.contains(&*out.to_string_lossy()), "{message}");
        assert!(contents(&workspace.path("")) == before, "{message}");
        assert_eq!(litter(&workspace.path("")), Vec::<std::path::PathBuf>::new());
    };
    let foreign = workspace.path("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("thesis.txt"), "years of work").unwrap();
    refused(&foreign, "medusa", "holds files that are no medusa export");
    // A model folder has a config.json too.
    refused(&workspace.path("model"), "medusa", "holds files that are no medusa export");
    refused(&workspace.path("model"), "medusa-vllm", "holds files that are no medusa-vllm export");
    refused(&workspace.path("run"), "medusa", "holds files that are no medusa export");
    let file = workspace.path("conversations.jsonl");
    refused(&file, "medusa", "found a file");

    let out = workspace.path("export");
    fs::create_dir(&out).unwrap();
    export(&workspace.path("run"), "medusa", &out, &[]);
    refused(&out, "medusa-vllm", "holds files that are no medusa-vllm export");
    fs::write(out.join("notes.txt"), "mine").unwrap();
    refused(&out, "medusa", "holds files that are no medusa export: notes.txt");
    fs::remove_file(out.join("notes.txt")).unwrap();
    let first = contents(&out);
    export(&workspace.path("run/step-00000004"), "medusa", &out, &["--dtype", "bfloat16"]);
    assert!(contents(&out) != first);
    assert_eq!(check(&out)["dtype"], "bfloat16");
    assert_eq!(litter(&workspace.path("")), Vec::<std::path::PathBuf>::new());
}

/// Where one run of heads ended another begins, through each layout; other heads are refused with their keys.
#[test]
fn heads_start_from_an_export() {
    let mut workspace = Workspace::new();
    workspace.set("draft.num_heads", 2).set("draft.num_layers", 2);
    let first = workspace.train("first", &[]);
    assert!(first["end"] != first["start"]);
    for format in ["medusa", "medusa-vllm"] {
        let out = workspace.path(format);
        export(&workspace.path("first"), format, &out, &[]);
        let init = format!("draft.init_from={}", out.display());
        let more = ["--set", &init, "--set", "train.max_steps=1"];
        let second = workspace.train(&format!("second-{format}"), &more);
        assert_eq!(second["start"], first["end"], "{format}");
        // A resumed run does not start again.
        let more = ["--set", &init, "--set", "train.max_steps=2", "--resume"];
        assert_ne!(workspace.train(&format!("second-{format}"), &more)["end"], second["end"]);

        for (change, part) in [
            ("draft.num_heads=3", "num_heads: 2 there, 3 here (draft.num_heads)"),
            ("draft.num_layers=1", "num_layers: 2 there, 1 here (draft.num_layers)"),
            ("draft.projection=shared", "projection: own there, shared here (draft.projection)"),
            ("draft.share_layers=true", "(draft.share_layers)"),
            ("draft.draft_vocab_size=99", "vocabulary map: 454 there, 99 here (draft.vocab_map)"),
            ("draft={\"algorithm\": \"eagle3\", \"capture\": [0, 1]}", "this draft has no Medusa heads"),
        ] {
            let mut command = workspace.train_command("other", &["--set", change, "--set", &init]);
            let output = output_of(&mut command);
            let message = stderr_of(&output);
            assert_eq!(output.status.code(), Some(2), "{message}");
            assert!(message.contains("`draft.init_from`") && message.contains(part), "no `{part}` in {message}");
            assert!(!workspace.path("other").join("config.json").exists(), "nothing was begun");
        }
    }
    // What no format knows, and a format that is another algorithm's.
    let foreign = workspace.path("model");
    let init = format!("draft.init_from={}", foreign.display());
    let output = output_of(&mut workspace.train_command("other", &["--set", &init]));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr_of(&output).contains("is of no known format"), "{}", stderr_of(&output));
}
