//! `specforge images generate` on small random models of real files: images with a draft are those without one, traces are
//! compared, and bad input is named.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use specforge::models::var::VarConfig;
use specforge::models::vqvae::{self, Vqvae, VqvaeConfig};
use specforge::nn::noise;
use specforge::weights::write_tensors;
use tch::Tensor;

use super::fixture::{json_of, output_of, specforge, stderr_of};

/// A folder with a target, its image tokenizer, and a draft.
struct Models {
    folder: tempfile::TempDir,
}

impl Models {
    fn new() -> Self {
        let models = Self { folder: tempfile::tempdir().unwrap() };
        write_var(&models.path("target"), &config(), 3);
        write_var(&models.path("draft"), &VarConfig { depth: 1, embed_dim: 8, mlp_hidden: 16, ..config() }, 4);
        write_vae(&models.path("target/vae"), 16);
        models
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, out: &str, more: &[&str]) -> std::process::Command {
        let mut command = specforge(&["images", "generate", "--json", "--labels", "3,7,7,none", "--device", "cpu"]);
        command.arg("--target").arg(self.path("target")).arg("--out").arg(self.path(out)).args(more);
        command
    }

    fn drafted(&self, out: &str, more: &[&str]) -> Value {
        json_of(self.command(out, more).arg("--draft").arg(self.path("draft")))
    }
}

pub(crate) fn config() -> VarConfig {
    VarConfig {
        depth: 2,
        embed_dim: 16,
        num_heads: 2,
        mlp_hidden: 64,
        patch_nums: vec![1, 2, 4],
        vocab_size: 16,
        z_channels: 4,
        num_classes: 10,
        shared_aln: false,
        attn_l2_norm: true,
        norm_eps: 1e-6,
    }
}

pub(crate) fn write_var(folder: &Path, config: &VarConfig, seed: u64) {
    let tensors = config.tensors().into_iter().enumerate();
    let tensors: Vec<(String, Tensor)> =
        tensors.map(|(stream, (name, shape))| (name, noise::normal(&shape, 0.3, seed, stream as u64))).collect();
    fs::create_dir_all(folder).unwrap();
    write_tensors(&folder.join("model.safetensors"), &tensors, &[]).unwrap();
    let values = json!({"model_type": "var", "patch_nums": config.patch_nums});
    fs::write(folder.join("config.json"), values.to_string()).unwrap();
}

pub(crate) fn write_vae(folder: &Path, codes: i64) {
    let values = json!({
        "vocab_size": codes, "z_channels": 4, "ch": 4, "ch_mult": [1, 2], "num_res_blocks": 1, "patch_nums": [1, 2, 4],
        "share_quant_resi": 2, "groupnorm_groups": 2
    });
    let (config, _) = VqvaeConfig::read(&values).unwrap();
    let shapes = Vqvae::tensors(&config).unwrap().into_iter().enumerate();
    let tensors: Vec<(String, Tensor)> =
        shapes.map(|(stream, (name, shape))| (name, noise::normal(&shape, 0.4, 5, stream as u64))).collect();
    vqvae::write(folder, &config, &tensors).unwrap();
}

pub(crate) fn maps(report: &Value) -> Vec<Value> {
    report["images"].as_array().unwrap().iter().map(|image| image["maps"].clone()).collect()
}

#[test]
fn images_with_a_draft_are_those_without_one() {
    let models = Models::new();
    let alone = json_of(&mut models.command("alone", &["--seed", "5"]));
    assert_eq!(
        (&alone["lossless"], &alone["target_calls"], &alone["draft_calls"]),
        (&json!(true), &json!(3), &json!(0))
    );
    assert_eq!((&alone["tokens"], &alone["images"][3]["label"]), (&json!(84), &Value::Null));
    let sizes: Vec<usize> =
        maps(&alone)[0].as_array().unwrap().iter().map(|map| map.as_array().unwrap().len()).collect();
    assert_eq!(sizes, [1, 4, 16]);
    assert_ne!(maps(&alone)[1], maps(&alone)[2], "two images of one label");
    for (number, more) in [
        &["--gamma", "1"][..],
        &["--gamma", "2", "--no-bonus"],
        &["--gamma", "9", "--max-rows", "4"],
        &["--gamma", "0"],
        &[],
    ]
    .into_iter()
    .enumerate()
    {
        let out = format!("drafted-{number}");
        let report = models.drafted(&out, &[&["--seed", "5"][..], more].concat());
        assert_eq!(maps(&report), maps(&alone), "{more:?}");
        assert_eq!(report["lossless"], true);
        let calls = report["target_calls"].as_u64().unwrap();
        assert!(calls <= report["scales"].as_u64().unwrap());
        for file in ["image-0000.png", "image-0003.png", "contact-sheet.png"] {
            let bytes = fs::read(models.path(&out).join(file)).unwrap();
            assert_eq!(bytes, fs::read(models.path("alone").join(file)).unwrap(), "{file}");
            assert!(bytes.starts_with(b"\x89PNG"));
        }
    }
    assert_ne!(maps(&json_of(&mut models.command("other", &["--seed", "6"]))), maps(&alone));
    let lossy = models.drafted("lossy", &["--rule", "hand-over:1"]);
    assert_eq!((&lossy["lossless"], &lossy["target_calls"]), (&json!(false), &json!(4)));
    let maximal = models.drafted("maximal", &["--rule", "maximal", "--gamma", "2"]);
    assert_eq!(maximal["lossless"], true);
}

#[test]
fn traces_of_images_are_compared() {
    let models = Models::new();
    let trace = |name: &str| models.path(name).display().to_string();
    json_of(&mut models.command("alone", &["--trace", &trace("a.trace")]));
    models.drafted("drafted", &["--trace", &trace("b.trace"), "--gamma", "2"]);
    let mut compare = specforge(&["compare", "--json", &trace("a.trace"), &trace("b.trace"), "--target"]);
    let comparison = json_of(compare.arg(models.path("target")));
    assert_eq!((&comparison["verdict"], &comparison["judged"]), (&json!("equal"), &json!(true)));
    assert_eq!((&comparison["images"], &comparison["scales"]), (&json!(4), &json!(12)));
    // One of another seed.
    models.drafted("seeded", &["--trace", &trace("c.trace"), "--gamma", "2", "--seed", "1"]);
    let output = output_of(&mut specforge(&["compare", &trace("a.trace"), &trace("c.trace")]));
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stdout).unwrap().contains("other settings"));
    let mut other = specforge(&["compare", &trace("a.trace"), &trace("b.trace"), "--vae"]);
    let output = output_of(other.arg(models.path("target/vae")).arg("--target").arg(models.path("draft")));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr_of(&output).contains("is not the model of"), "{}", stderr_of(&output));
}

#[test]
fn bad_input_is_named() {
    let models = Models::new();
    let refused = |command: &mut std::process::Command, words: &[&str]| {
        let output = output_of(command);
        let said = stderr_of(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
        assert!(!models.path("bad").exists());
    };
    let mut label = specforge(&["images", "generate", "--labels", "3,10", "--target"]);
    refused(label.arg(models.path("target")).arg("--out").arg(models.path("bad")), &["--labels", "0 to 9", "got 10"]);
    refused(&mut models.command("bad", &["--cfg", "-1"]), &["--cfg"]);
    refused(&mut models.command("bad", &["--top-p", "1.5"]), &["--top-p"]);
    refused(&mut models.command("bad", &["--gamma", "2"]), &["--draft"]);
    refused(models.command("bad", &["--rule", "top-k:0"]).arg("--draft").arg(models.path("draft")), &["--rule"]);
    refused(models.command("bad", &["--vae"]).arg(models.path("nowhere")), &["nowhere"]);
    write_vae(&models.path("codes"), 17);
    refused(
        models.command("bad", &["--vae"]).arg(models.path("codes")),
        &["vocab_size", "16", "17", "image tokenizer"],
    );
    write_var(&models.path("scales"), &VarConfig { patch_nums: vec![1, 3, 4], ..config() }, 3);
    refused(models.command("bad", &["--draft"]).arg(models.path("scales")), &["patch_nums", "[1, 3, 4]", "the draft"]);

    let weights = models.path("target/model.safetensors");
    let whole = fs::read(&weights).unwrap();
    fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    refused(&mut models.command("bad", &[]), &["model.safetensors"]);
    let mut broken = whole.clone();
    let last = broken.len() - 4;
    broken[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, &broken).unwrap();
    refused(&mut models.command("bad", &[]), &["NaN"]);
    fs::write(&weights, &whole).unwrap();
    let config = models.path("target/config.json");
    fs::write(&config, r#"{"patch_nums": [1, 2, 5]}"#).unwrap();
    refused(&mut models.command("bad", &[]), &["pos_1LC"]);
    fs::write(&config, r#"{"patch_nums": [1, 2, 4], "depth": 3}"#).unwrap();
    refused(&mut models.command("bad", &[]), &["depth", "says 3", "say 2"]);
    fs::write(&config, r#"{"patch_nums": [1, 2, 4]}"#).unwrap();

    fs::create_dir(models.path("full")).unwrap();
    fs::write(models.path("full/mine.txt"), "mine").unwrap();
    let output = output_of(&mut models.command("full", &[]));
    assert!(stderr_of(&output).contains("not empty"), "{}", stderr_of(&output));
    assert_eq!(fs::read_to_string(models.path("full/mine.txt")).unwrap(), "mine");
}
