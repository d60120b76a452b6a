//! A GGUF file where a target's folder could stand: the same numbers, tokens and identity as the folder that an import
//! makes of it, and nothing written.

use std::fs;
use std::path::Path;

use serde_json::json;
use specforge::data::ChatTokenizer;
use specforge::files::Digests;
use specforge::gguf::{ImportOptions, import};
use specforge::models::{TargetIdentity, load_head, load_tables, load_target, read_info, stored_kind};
use specforge::nn::AttentionMask;
use specforge::weights::WeightsFolder;
use tch::{Device, Kind, Tensor};

use crate::fixture::{Workspace, contents, json_of, output_of, specforge, stderr_of, write_gguf};

/// A GGUF file, and the folder that an import makes of it.
fn both() -> (tempfile::TempDir, std::path::PathBuf, std::path::PathBuf) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (file, imported) = (folder.path().join("model.gguf"), folder.path().join("imported"));
    write_gguf(&file);
    import(&file, &imported, &ImportOptions::default(), &|_, _| {}).unwrap();
    (folder, file, imported)
}

fn logits(path: &Path, kind: Kind) -> Tensor {
    let model = load_target(path, kind, Device::Cpu).unwrap();
    let ids = Tensor::from_slice(&[1i64, 70, 80, 90, 100]).view([1, 5]);
    let positions = Tensor::arange(5, (Kind::Int64, Device::Cpu)).view([1, 5]);
    let input = specforge::models::ForwardInput {
        ids: &ids,
        positions: &positions,
        mask: &AttentionMask::Causal,
        capture: &[0, 1],
        logits: specforge::models::LogitRows::All,
    };
    model.forward(&input, None).unwrap().logits.unwrap()
}

#[test]
fn a_file_is_the_model_that_its_import_is() {
    let (folder, file, imported) = both();
    let before = contents(folder.path());
    assert_eq!(read_info(&file).unwrap(), read_info(&imported).unwrap());
    assert_eq!(stored_kind(&file).unwrap(), stored_kind(&imported).unwrap());
    for kind in [Kind::Float, Kind::BFloat16] {
        assert!(logits(&file, kind).equal(&logits(&imported, kind)), "{kind:?}");
    }
    let tables = |path: &Path| load_tables(path, Kind::Float, Device::Cpu).unwrap().embedding.table;
    assert!(tables(&file).equal(&tables(&imported)));
    let hidden = Tensor::ones([1, 32], (Kind::Float, Device::Cpu));
    let head = |path: &Path| load_head(path).unwrap().logits(&hidden);
    assert!(head(&file).equal(&head(&imported)));

    let (one, other) = (WeightsFolder::open(&file).unwrap(), WeightsFolder::open(&imported).unwrap());
    assert!(one.names().eq(other.names()));
    for name in one.names() {
        assert_eq!((one.bytes(name), one.shape(name)), (other.bytes(name), other.shape(name)), "{name}");
    }
    // Whoever compares targets takes them for the same, quickly and whole.
    let digests = Digests::unnoted();
    let identity = |path: &Path| TargetIdentity::read_whole(path, &digests, &|_, _| ()).unwrap();
    let (one, other) = (identity(&file), identity(&imported));
    assert_eq!(one.differences(&other), Vec::<&str>::new());
    assert!(one.content.is_some() && one.content == other.content);

    let tokenizer = |path: &Path| ChatTokenizer::load(path, None).unwrap();
    let (one, other) = (tokenizer(&file), tokenizer(&imported));
    assert_eq!(one.fingerprint(), other.fingerprint());
    assert_eq!(one.encode("<|begin|>he sings").unwrap(), other.encode("<|begin|>he sings").unwrap());
    assert_eq!(one.eos_token_ids(), other.eos_token_ids());
    assert_eq!(contents(folder.path()), before, "something was written");
}

/// A file that changes under its name is read anew.
#[test]
fn another_file_of_the_same_name_is_another_model() {
    let (folder, file, _) = both();
    let before = TargetIdentity::read(&file).unwrap();
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 8;
    bytes[last] ^= 1;
    let other = folder.path().join("other");
    fs::write(&other, bytes).unwrap();
    fs::rename(&other, &file).unwrap();
    assert_eq!(TargetIdentity::read(&file).unwrap().differences(&before), ["the weights"]);
}

#[test]
fn every_command_takes_a_file_for_a_target() {
    let (folder, file, imported) = both();
    let data = folder.path().join("conversations.jsonl");
    fs::write(&data, crate::fixture::conversations(20)).unwrap();
    let mut workspace = Workspace::new();
    workspace.set("target.path", file.display().to_string());
    workspace.configuration["data"]["train"] = json!([data]);
    workspace.configuration["optim"]["schedule"]["total_steps"] = json!(4);
    let before = contents(folder.path());

    // Training: the same losses and the same draft as on the folder, and one goes on where the other stopped.
    let whole = workspace.train("on-file", &[]);
    let set = format!("target.path={}", imported.display());
    let other = workspace.train("on-folder", &["--set", &set]);
    assert_eq!(whole["end"], other["end"]);
    workspace.train("halves", &["--set", "train.max_steps=2"]);
    let output =
        output_of(&mut workspace.train_command("halves", &["--set", &set, "--set", "train.max_steps=4", "--resume"]));
    assert!(output.status.success(), "{}", stderr_of(&output));

    // Decoding, and the answers of the target itself.
    let decoded = |target: &Path| {
        let mut command =
            specforge(&["generate", "--json", "--device", "cpu", "--max-new-tokens", "8", "--prompt", "he"]);
        let report = json_of(command.arg("--target").arg(target).args(["--draft", "prompt-lookup"]));
        (report["token_ids"].clone(), report["summary"]["rounds"].clone())
    };
    assert_eq!(decoded(&file), decoded(&imported));
    let shown = |target: &Path| {
        let mut command = specforge(&["inspect", "--json", "--target"]);
        let mut report = json_of(command.arg(target).arg("--data").arg(&data));
        // Whoever comes second finds the tokens of the first.
        report["build"]["from_cache"].take();
        report
    };
    assert_eq!(shown(&file), shown(&imported));
    assert_eq!(contents(folder.path()), before, "something was written");

    // What is no model is told by its name.
    let bad = folder.path().join("bad.gguf");
    fs::write(&bad, b"GGUF of another world").unwrap();
    let mut command = specforge(&["generate", "--device", "cpu", "--prompt", "he", "--target"]);
    let output = output_of(command.arg(&bad));
    let message = stderr_of(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("bad.gguf") && message.contains("GGUF version"), "{message}");
}

/// A model in a GGUF file may also be the draft.
#[test]
fn a_smaller_model_in_a_file_drafts() {
    let (_folder, file, imported) = both();
    let mut command = specforge(&["generate", "--json", "--device", "cpu", "--max-new-tokens", "8", "--prompt", "he"]);
    let report = json_of(command.arg("--target").arg(&imported).arg("--draft").arg(&file));
    // Its own draft guesses everything right.
    assert!(report["summary"]["acceptance_length"].as_f64().unwrap() > 2.0, "{report}");
}
