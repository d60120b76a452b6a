//! P-EAGLE drafts on disk: what is written is read back, what engines cannot serve is said, and folders of others are read.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use specforge::draft::eagle3::Eagle3Shape;
use specforge::draft::peagle::PeagleShape;
use specforge::export::{self, Engine, Source, peagle};
use specforge::nn::noise;
use specforge::vocab::VocabMap;
use specforge::weights::writer;
use tch::{Kind, Tensor};

use crate::eagle3_exports;

fn shape(mapped: bool) -> PeagleShape {
    let network = eagle3_exports::shape();
    let draft_vocab_size = if mapped { network.vocab_size / 2 } else { network.vocab_size };
    let network = Eagle3Shape {
        draft_vocab_size,
        num_layers: 2,
        norm_before_residual: true,
        target_hidden_size: network.hidden_size,
        ..network
    };
    PeagleShape { network, mask_token_id: 5, num_depths: 6, windows: vec![None, None] }
}

fn source(shape: &PeagleShape) -> Source {
    let size = &shape.network;
    let random = |(stream, (name, size)): (u64, (String, Vec<i64>))| (name, noise::normal(&size, 0.5, 3, stream));
    let mut tensors: Vec<(String, Tensor)> = (0..).zip(shape.tensors()).map(random).collect();
    if size.draft_vocab_size < size.vocab_size {
        let map = VocabMap::new((0..size.draft_vocab_size).map(|id| 2 * id).collect(), size.vocab_size).unwrap();
        tensors.push(("d2t".to_owned(), Tensor::from_slice(&map.d2t())));
        tensors.push(("t2d".to_owned(), Tensor::from_slice(&map.t2d())));
    }
    Source {
        description: json!({"draft": {"algorithm": "peagle"}, "shape": shape}),
        tensors,
        target: "absent/target".into(),
        target_name: None,
        kind: None,
        q8_0: false,
    }
}

fn config(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path.join("config.json")).unwrap()).unwrap()
}

fn change(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut values = config(path);
    change(&mut values);
    fs::write(path.join("config.json"), values.to_string()).unwrap();
}

#[test]
fn a_written_draft_is_read_back() {
    for (bits, mapped) in [(0, false), (1, true), (2, true), (3, false)] {
        let mut shape = shape(mapped);
        shape.network.head_norms = bits & 1 > 0;
        shape.network.norm_before_fc = bits & 2 > 0;
        let source = source(&shape);
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("draft");
        let report = export::export(&source, "peagle", &out, None).unwrap();
        assert_eq!((report.format.as_str(), report.dtype.as_str()), ("peagle", "float32"));
        let read = peagle::read(&out, None).unwrap();
        assert_eq!(read.shape, shape, "{bits}");
        for ((name, tensor), (other, want)) in read.tensors.iter().zip(&source.tensors) {
            assert!(name == other && tensor.equal(want), "{name}");
        }
        assert_eq!(read.vocabulary.is_some(), mapped);
        let values = config(&out);
        for (key, want) in [
            ("/speculators_model_type", json!("peagle")),
            ("/mask_token_id", json!(5)),
            ("/speculators_config/algorithm", json!("peagle")),
            ("/speculators_config/proposal_methods/0/speculative_tokens", json!(6)),
            ("/transformer_layer_config/model_type", json!(if bits & 1 > 0 { "qwen3" } else { "llama" })),
            ("/transformer_layer_config/num_hidden_layers", json!(2)),
            ("/norm_before_residual", json!(true)),
            ("/embed_requires_grad", json!(true)),
        ] {
            assert_eq!(values.pointer(key), Some(&want), "{key}");
        }
        assert!(values.get("fc_norm").is_none() && values.get("norm_output").is_none());
        let names = specforge::weights::WeightsFolder::open(&out.join("model.safetensors")).unwrap();
        for name in
            ["mask_hidden", "embed_tokens.weight", "layers.0.hidden_norm.weight", "layers.1.input_layernorm.weight"]
        {
            assert!(names.contains(name), "{name}");
        }
    }
}

#[test]
fn engines_say_what_they_do() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("draft");
    let report = export::export(&source(&shape(true)), "peagle", &out, Some(Engine::Vllm)).unwrap();
    let of = |engine: Engine| report.engines.iter().find(|known| known.engine == engine).unwrap();
    assert!(of(Engine::Vllm).problems.is_empty());
    assert!(of(Engine::Vllm).resolved.iter().any(|line| line.contains("V1 runner")));
    for engine in [Engine::Sglang, Engine::LlamaCpp] {
        let error = export::check_for(&out, Some(engine)).unwrap_err().to_string();
        assert!(error.contains("no parallel drafting"), "{error}");
    }
    let windowed = PeagleShape { windows: vec![Some(8), None], ..shape(true) };
    let error = export::export(&source(&windowed), "peagle", &folder.path().join("w"), None).unwrap_err().to_string();
    assert!(error.contains("windows"), "{error}");
    let mut normed = shape(false);
    normed.network.fc_norm = true;
    let error = export::export(&source(&normed), "peagle", &folder.path().join("n"), None).unwrap_err().to_string();
    assert!(error.contains("fc_norm"), "{error}");
    // Neither kind of draft is taken for the other.
    for (format, word) in [("speculators", "EAGLE-3"), ("eagle3", "EAGLE-3"), ("gguf", "EAGLE-3")] {
        let out = folder.path().join(format!("{format}.gguf"));
        let error = export::export(&source(&shape(false)), format, &out, None).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

/// A spoilt folder is refused by the name of what is wrong.
#[test]
fn spoilt_folders_are_refused() {
    type Spoil = fn(&Path);
    fn tensors(path: &Path) -> Vec<(String, Tensor)> {
        let weights = specforge::weights::WeightsFolder::open(&path.join("model.safetensors")).unwrap();
        let load = |name: &str| weights.load(name, weights.kind(name).unwrap(), tch::Device::Cpu).unwrap().copy();
        weights.names().map(|name| (name.to_owned(), load(name))).collect()
    }
    fn rewrite(path: &Path, change: impl FnOnce(&mut Vec<(String, Tensor)>)) {
        let mut all = tensors(path);
        change(&mut all);
        writer::write_tensors(&path.join("model.safetensors"), &all, &[]).unwrap();
    }
    let cases: [(&str, Spoil); 9] = [
        ("mask_hidden", |path| rewrite(path, |all| all.retain(|(name, _)| name != "mask_hidden"))),
        ("embed_tokens.weight", |path| rewrite(path, |all| all.retain(|(name, _)| name != "embed_tokens.weight"))),
        ("fc_norm.0.weight", |path| {
            rewrite(path, |all| {
                all.push(("fc_norm.0.weight".to_owned(), Tensor::ones([4], (Kind::Float, tch::Device::Cpu))))
            });
        }),
        ("mask_hidden", |path| {
            rewrite(path, |all| {
                let found = all.iter_mut().find(|(name, _)| name == "mask_hidden").unwrap();
                found.1 = found.1.flatten(0, -1);
            });
        }),
        ("`mask_token_id`", |path| {
            change(path, |values| drop(values.as_object_mut().unwrap().remove("mask_token_id")))
        }),
        ("`mask_token_id`", |path| change(path, |values| values["mask_token_id"] = json!(1_i64 << 40))),
        ("`layer_types`", |path| {
            change(path, |values| values["transformer_layer_config"]["layer_types"] = json!(["full_attention"]));
        }),
        ("q_norm", |path| change(path, |values| values["transformer_layer_config"]["model_type"] = json!("qwen3"))),
        ("`norm_before_residual`", |path| {
            change(path, |values| drop(values.as_object_mut().unwrap().remove("norm_before_residual")));
        }),
    ];
    for (place, (word, spoil)) in cases.iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("draft");
        export::export(&source(&shape(true)), "peagle", &out, None).unwrap();
        spoil(&out);
        let error = export::check(&out).unwrap_err();
        let text = format!("{error} {error:?}");
        assert!(text.contains(word), "case {place}: {text}");
        assert!(text.contains(&*out.to_string_lossy()), "case {place}: {text}");
    }
}

/// SpecForge's folder: a flat config.json of an architecture of its own.
#[test]
fn a_flat_folder_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("draft");
    let shape = shape(true);
    export::export(&source(&shape), "peagle", &out, None).unwrap();
    change(&out, |values| {
        let mut flat = values["transformer_layer_config"].clone();
        for key in ["draft_vocab_size", "norm_before_residual", "norm_before_fc", "mask_token_id", "specforge"] {
            flat[key] = values[key].clone();
        }
        flat["eagle_aux_hidden_state_layer_ids"] = values["eagle_aux_hidden_state_layer_ids"].clone();
        flat["architectures"] = json!(["PEagleDraftModel"]);
        *values = flat;
    });
    assert_eq!(peagle::read(&out, None).unwrap().shape, shape);
    let error = export::check(&out).unwrap_err().to_string();
    assert!(error.contains("--format peagle"), "{error}");
}
