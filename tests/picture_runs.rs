//! `specforge train` on pictures: a next-scale target from nothing, a draft from its distributions, exact resume, two ranks,
//! exports that decode, the report, and input that is refused by name.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::fixture::{json_of, output_of, specforge, stderr_of};
use crate::images::{config, maps, write_vae, write_var};
use crate::parallel::figures;

/// A folder with pictures, an image tokenizer, and a target of it with the tokenizer inside.
struct Pictures {
    folder: tempfile::TempDir,
}

impl Pictures {
    fn new() -> Self {
        let pictures = Self { folder: tempfile::tempdir().unwrap() };
        let line = |row: usize| {
            let pixels: Vec<String> = (0..64).map(|place| ((place * 37 + row * row * 91) % 256).to_string()).collect();
            format!("{},{}\n", pixels.join(","), row % 10)
        };
        fs::write(pictures.path("pictures.csv"), (0..40).map(line).collect::<String>()).unwrap();
        write_vae(&pictures.path("vae"), 16);
        write_var(&pictures.path("target"), &config(), 3);
        write_vae(&pictures.path("target/vae"), 16);
        pictures
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A run of eight steps in float32 with two micro-batches each.
    fn configuration(&self, teacher: &str) -> Value {
        let target = if teacher == "codes" { "vae" } else { "target" };
        json!({
            "target": {"path": self.path(target), "keep_hidden_states": teacher == "target"},
            "draft": {
                "algorithm": "next_scale", "depth": 2, "embed_dim": 8, "num_heads": 2, "num_classes": 10,
                "teacher": teacher, "label_dropout": 0.3, "scale_weights": [2, 1, 0.5],
            },
            "data": {"train": [self.path("pictures.csv")], "eval_fraction": 0.2, "cache_dir": self.path("tokens")},
            "optim": {"learning_rate": 3e-3, "epsilon": 1e-6},
            "train": {"epochs": 9, "max_steps": 8, "batch_tokens": 176, "micro_batch_tokens": 88, "log_every": 2,
                "eval_every": 4, "save_every": 4},
        })
    }

    fn command(&self, launcher: &[&str], configuration: &Value, out: &str, arguments: &[&str]) -> Command {
        let file = self.path(&format!("{out}.json"));
        fs::write(&file, configuration.to_string()).unwrap();
        let mut command = specforge(launcher);
        command.args(["train", "--json", "--device", "cpu", "--config"]).arg(&file);
        command.arg("--set").arg(format!("train.output_dir={}", self.path(out).display())).args(arguments);
        command.env("OMP_NUM_THREADS", "1");
        command
    }

    fn train(&self, teacher: &str, out: &str, arguments: &[&str]) -> Value {
        json_of(&mut self.command(&[], &self.configuration(teacher), out, arguments))
    }

    fn export(&self, run: &str, out: &str) -> Value {
        let mut command = specforge(&["export", "--json", "--format", "var", "--checkpoint"]);
        json_of(command.arg(self.path(run)).arg("--out").arg(self.path(out)))
    }

    fn said(&self, configuration: &Value, arguments: &[&str]) -> String {
        let output = output_of(&mut self.command(&[], configuration, "refused", arguments));
        assert_eq!(output.status.code(), Some(2), "{}", stderr_of(&output));
        stderr_of(&output)
    }
}

fn checkpoint(run: &Path, step: u64) -> Vec<Vec<u8>> {
    let folder = run.join(format!("step-{step:08}"));
    ["model.safetensors", "optimizer.safetensors"].map(|name| fs::read(folder.join(name)).unwrap()).into()
}

/// A target from nothing, a draft from it, both exported; the draft's pictures are the target's.
#[test]
fn a_target_and_its_draft_are_trained_exported_and_decode() {
    let pictures = Pictures::new();
    let report = pictures.train("codes", "target-run", &[]);
    assert_eq!(report["steps"], 8);
    let figure = |report: &Value, at: &str, name: &str| report[at][name].as_f64().unwrap();
    assert!(figure(&report, "end", "loss") < figure(&report, "start", "loss"));
    assert!(report["end"]["scale3/chain"].is_number() && report["end"]["expected_scales"].is_number());
    assert!(fs::read_to_string(pictures.path("target-run/report.html")).unwrap().contains("next_scale"));
    let exported = pictures.export("target-run", "own-target");
    assert_eq!((&exported["format"], &exported["dtype"]), (&json!("var"), &json!("float32")));

    let mut distilled = pictures.configuration("target");
    distilled["target"]["path"] = json!(pictures.path("own-target"));
    let report = json_of(&mut pictures.command(&[], &distilled, "draft-run", &[]));
    assert!(figure(&report, "end", "loss") < figure(&report, "start", "loss"), "{report}");
    pictures.export("draft-run", "own-draft");
    let generate = |out: &str, more: &[&str]| {
        let mut command = specforge(&["images", "generate", "--json", "--labels", "3,7,none,1", "--device", "cpu"]);
        json_of(
            command.arg("--target").arg(pictures.path("own-target")).arg("--out").arg(pictures.path(out)).args(more),
        )
    };
    let draft = pictures.path("own-draft").display().to_string();
    let alone = generate("alone", &[]);
    assert_eq!(maps(&alone), maps(&generate("drafted", &["--draft", &draft, "--gamma", "2"])));

    // What the target made is data like any other.
    distilled["data"]["train"] = json!([pictures.path("pictures.csv"), pictures.path("alone/images.json")]);
    let plan = |arguments: &[&str]| json_of(&mut pictures.command(&[], &distilled, "plan", arguments));
    let planned = plan(&["--plan"]);
    assert_eq!((&planned["algorithm"], &planned["steps"]), (&json!("next_scale"), &json!(8)));
    assert_eq!(planned["data"]["supervised"], json!(44 * 21));
    let report = json_of(&mut pictures.command(&[], &distilled, "on-policy-run", &[]));
    let tokens = planned["data"]["tokens"].as_u64().unwrap() + planned["evaluation"]["tokens"].as_u64().unwrap();
    assert_eq!((tokens, &report["steps"]), (44 * 22, &json!(8)));

    let mut eval =
        specforge(&["images", "eval", "--json", "--images", "6", "--cfg", "0.5", "--rules", "match-rate:0.5"]);
    eval.args(["--device", "cpu", "--real"]).arg(pictures.path("pictures.csv")).arg("--target");
    eval.arg(pictures.path("own-target")).args(["--draft", &draft, "--out"]).arg(pictures.path("eval"));
    let report = json_of(&mut eval);
    let rows = report["drafted"].as_array().unwrap();
    assert!(rows.iter().filter(|row| row["exact"] == true).all(|row| row["identical"] == 6 && row["psnr"].is_null()));
    assert_eq!((rows.len(), &report["alone"]["target_calls"]), (5, &json!(18)));
    assert!(report["alone"]["frechet_to_real"].as_f64().unwrap() > 0.0);
    let page = fs::read_to_string(pictures.path("eval/report.html")).unwrap();
    assert!(page.contains("data:image/png;base64,") && page.contains("match rate 0.5 (lossy)"));
    assert!(fs::read(pictures.path("eval/contact-sheet.png")).unwrap().starts_with(b"\x89PNG"));
}

#[test]
fn a_run_in_parts_is_a_run_in_one() {
    let pictures = Pictures::new();
    for teacher in ["codes", "target"] {
        let (whole, parts) = (format!("{teacher}-whole"), format!("{teacher}-parts"));
        pictures.train(teacher, &whole, &[]);
        // The schedule is that of eight steps in both.
        pictures.train(teacher, &parts, &["--set", "train.max_steps=4", "--set", "optim.schedule.total_steps=8"]);
        let report = pictures.train(teacher, &parts, &["--resume", "--set", "optim.schedule.total_steps=8"]);
        assert_eq!(report["steps"], 8);
        assert!(checkpoint(&pictures.path(&whole), 8) == checkpoint(&pictures.path(&parts), 8), "{teacher}");
        assert_eq!(figures(&pictures.path(&whole)), figures(&pictures.path(&parts)), "{teacher}");
    }
    // Another image tokenizer is another run.
    write_vae(&pictures.path("vae"), 17);
    let mut configuration = pictures.configuration("codes");
    configuration["train"]["max_steps"] = json!(9);
    let mut command = pictures.command(&[], &configuration, "codes-whole", &["--resume"]);
    let said = stderr_of(&output_of(&mut command));
    assert!(said.contains("tokenizer changed"), "{said}");
}

#[test]
fn two_ranks_make_the_updates_of_one() {
    let pictures = Pictures::new();
    for teacher in ["codes", "target"] {
        let (alone, ranks) = (format!("{teacher}-alone"), format!("{teacher}-ranks"));
        pictures.train(teacher, &alone, &[]);
        let launcher = ["launch", "--nproc-per-node", "2"];
        json_of(&mut pictures.command(&launcher, &pictures.configuration(teacher), &ranks, &[]));
        let (got, want) = (figures(&pictures.path(&ranks)), figures(&pictures.path(&alone)));
        assert!(got.keys().eq(want.keys()) && got.len() > 20);
        for (key, want) in want {
            let got = got[&key];
            assert!((got - want).abs() <= 1e-5 * want.abs().max(1.0), "{teacher} {key:?}: expected {want}, got {got}");
        }
    }
}

#[test]
fn what_cannot_be_trained_is_named() {
    let pictures = Pictures::new();
    let with = |teacher: &str, key: &str, value: Value| {
        let mut configuration = pictures.configuration(teacher);
        let mut place = &mut configuration;
        for part in key.split('.') {
            place = &mut place[part];
        }
        *place = value;
        configuration
    };
    let refused = |configuration: Value, words: &[&str]| {
        let said = pictures.said(&configuration, &[]);
        assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
        assert!(!pictures.path("refused").join("step-00000008").exists());
    };
    refused(with("codes", "draft.num_classes", json!(9)), &["pictures.csv:10", "label", "0 to 8", "got 9"]);
    refused(with("codes", "draft.num_classes", Value::Null), &["draft.num_classes"]);
    refused(with("target", "draft.num_classes", json!(9)), &["draft.num_classes", "expected 10"]);
    refused(with("codes", "draft.teacher", json!("target")), &["draft.teacher", "image tokenizer alone"]);
    refused(with("codes", "draft.scale_weights", json!([1, 1])), &["draft.scale_weights", "3 numbers"]);
    refused(with("codes", "data.max_length", json!(21)), &["data.max_length", "22 tokens"]);
    refused(with("codes", "eval.every", json!(2)), &["eval.every", "images eval"]);
    refused(with("codes", "target.dtype", json!("bfloat16")), &["target.dtype", "float32"]);
    refused(with("codes", "target.path", json!(pictures.path("nowhere"))), &["nowhere", "is not there"]);
    refused(with("codes", "data.train", json!([pictures.path("nowhere.csv")])), &["nowhere.csv"]);
    refused(with("target", "target.feature_store", json!("x")), &["target.feature_store"]);
    write_vae(&pictures.path("target/vae"), 17);
    refused(pictures.configuration("target"), &["vocab_size", "16", "17"]);
    write_vae(&pictures.path("target/vae"), 16);
    let weights = pictures.path("vae/model.safetensors");
    let mut broken = fs::read(&weights).unwrap();
    let last = broken.len() - 4;
    broken[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, &broken).unwrap();
    refused(pictures.configuration("codes"), &["NaN"]);
}
