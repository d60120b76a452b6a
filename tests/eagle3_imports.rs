//! EAGLE-3 folders that are not fresh exports: SafeAILab's and SpecForge's are read, every damage is refused by name.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use specforge::decode::drafter::{DraftSampling, open};
use specforge::export::eagle3::read;
use specforge::export::{Engine, check, check_for, export};
use specforge::models::load_target;
use specforge::weights;
use tch::{Kind, Tensor};

use crate::eagle3_exports::{DRAFT_VOCABULARY, LAYERS, engine_of, map, shape, source, workspace};
use crate::fixture::{TOKENIZER_SIZE, contents, output_of, specforge, stderr_of, tensors_of, write_torch_file};

fn change_config(folder: &Path, change: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let before = config.clone();
    change(&mut config);
    assert!(config != before);
    fs::write(path, config.to_string()).unwrap();
}

fn remove(config: &mut Value, keys: &[&str]) {
    let object = config.as_object_mut().unwrap();
    keys.iter().for_each(|key| assert!(object.shift_remove(*key).is_some(), "{key}"));
}

fn change_tensors(folder: &Path, change: impl FnOnce(&mut Vec<(String, Tensor)>)) {
    let path = folder.join("model.safetensors");
    let mut tensors = tensors_of(&path);
    change(&mut tensors);
    weights::write_tensors(&path, &tensors, &[]).unwrap();
}

const OWN_KEYS: &[&str] = &["specforge", "base_model_name_or_path"];

/// No keys for layers or base: the default layers of the target, and base 10000 whatever the target's is.
#[test]
fn safeailabs_folders_are_read() {
    let (folder, target) = workspace();
    let out = folder.path().join("out");
    export(&source(&shape(), &target, Kind::Half), "eagle3", &out, None).unwrap();
    change_config(&out, |config| {
        remove(config, OWN_KEYS);
        remove(config, &["rope_theta", "rope_parameters", "head_dim", "num_aux_hidden_states"]);
        remove(config, &["eagle_aux_hidden_state_layer_ids", "eagle_config", "fc_norm", "norm_before_fc"]);
        config["max_position_embeddings"] = json!(64);
        config["num_attention_heads"] = json!(4);
    });
    // Heads are as wide as the hidden size says.
    change_tensors(&out, |tensors| {
        for (name, tensor) in tensors.iter_mut().filter(|(name, _)| name.contains("self_attn")) {
            let shape = match name.as_str() {
                "midlayer.self_attn.o_proj.weight" => [32, 32],
                "midlayer.self_attn.q_proj.weight" => [32, 64],
                _ => [16, 64],
            };
            *tensor = Tensor::ones(shape, (Kind::Half, tch::Device::Cpu));
        }
    });
    let imported = read(&out, Some(LAYERS)).unwrap();
    assert_eq!((imported.shape.capture, imported.shape.layer.rope.theta), (vec![2, 4, 5], 10_000.0));
    assert_eq!(imported.shape.layer.head_dim, 8);
    assert_eq!((imported.shape.norm_output, imported.shape.norm_feedback), (true, false));
    let error = read(&out, None).unwrap_err().to_string();
    assert!(error.contains("number of the target's layers is not known"), "{error}");

    // The same in SafeAILab's own kind of file.
    let pickled = out.join("pytorch_model.bin");
    write_torch_file(&pickled, &tensors_of(&out));
    fs::remove_file(out.join("model.safetensors")).unwrap();
    let again = read(&out, Some(LAYERS)).unwrap();
    assert_eq!(again.vocabulary, Some(map(DRAFT_VOCABULARY)));
    assert_eq!(again.tensors.len(), imported.tensors.len());
    for ((name, got), (_, want)) in again.tensors.iter().zip(&imported.tensors) {
        assert!(got.kind() == Kind::Half && got.equal(want), "{name}");
    }
    let bytes = fs::read(&pickled).unwrap();
    for length in [0, 10, bytes.len() / 2, bytes.len() - 10] {
        fs::write(&pickled, &bytes[..length]).unwrap();
        let error = read(&out, Some(LAYERS)).unwrap_err();
        assert!(error.to_string().contains("pytorch_model.bin") && error.exit_code() == 2, "{error}");
    }
}

/// Output ids alone, embeddings that are not needed, a `norm_output` of two meanings.
#[test]
fn specforges_folders_are_read_and_what_vllm_would_make_of_them_is_told() {
    let (folder, target) = workspace();
    let out = folder.path().join("out");
    export(&source(&shape(), &target, Kind::BFloat16), "eagle3", &out, None).unwrap();
    change_config(&out, |config| {
        remove(config, OWN_KEYS);
        remove(config, &["eagle_aux_hidden_state_layer_ids"]);
        config["norm_output"] = json!(true);
    });
    change_tensors(&out, |tensors| {
        let embedding = Tensor::zeros([TOKENIZER_SIZE, 32], (Kind::BFloat16, tch::Device::Cpu));
        tensors.push(("embed_tokens.weight".to_owned(), embedding));
    });
    let imported = read(&out, Some(LAYERS)).unwrap();
    assert_eq!(imported.shape.capture, [2, 4, 5]);
    let alternative = imported.alternative.unwrap();
    assert!(imported.shape.norm_feedback && !alternative.norm_feedback && alternative.norm_output);
    // Whether it is the target's is to be seen beside the target.
    assert!(imported.warnings.is_empty() && imported.embedding.is_some(), "{:?}", imported.warnings);
    let report = check(&out).unwrap();
    assert_eq!(engine_of(&report, Engine::Sglang).1, "");
    assert!(
        engine_of(&report, Engine::Vllm)
            .1
            .contains("captures what layers [1, 3, 4] read, the draft was trained on [2, 4, 5]")
    );
    let error = check_for(&out, Some(Engine::Vllm)).unwrap_err().to_string();
    assert!(error.contains("vllm: captures what layers [1, 3, 4]"), "{error}");
}

/// What is changed in a sound export, and what the refusal must say.
type Damage = (&'static str, fn(&Path), &'static [&'static str]);

fn tensor<'a>(tensors: &'a mut [(String, Tensor)], wanted: &str) -> &'a mut Tensor {
    &mut tensors.iter_mut().find(|(name, _)| name == wanted).unwrap().1
}

const DAMAGES: &[Damage] = &[
    (
        "a missing tensor",
        |folder| change_tensors(folder, |tensors| tensors.retain(|(name, _)| name != "midlayer.hidden_norm.weight")),
        &["missing (1)", "midlayer.hidden_norm.weight [32]"],
    ),
    (
        "a missing map",
        |folder| change_tensors(folder, |tensors| tensors.retain(|(name, _)| name != "d2t" && name != "t2d")),
        &["missing (2)", "d2t [40]", "t2d [454]"],
    ),
    (
        "a surplus tensor",
        |folder| {
            let extra = ("mask_hidden".to_owned(), Tensor::zeros([1, 1, 96], (Kind::Float, tch::Device::Cpu)));
            change_tensors(folder, |tensors| tensors.push(extra));
        },
        &["surplus (1)", "mask_hidden [1, 1, 96]"],
    ),
    (
        "another shape",
        |folder| {
            change_tensors(folder, |tensors| {
                let tensor = tensor(tensors, "fc.weight");
                *tensor = tensor.narrow(1, 0, 64).contiguous();
            })
        },
        &["wrong shape (1)", "fc.weight: expected [32, 96], got [32, 64]"],
    ),
    (
        "one tensor twice",
        |folder| {
            let extra =
                ("layers.0.hidden_norm.weight".to_owned(), Tensor::zeros([32], (Kind::Float, tch::Device::Cpu)));
            change_tensors(folder, |tensors| tensors.push(extra));
        },
        &["`midlayer.hidden_norm.weight` under two names"],
    ),
    (
        "mixed types",
        |folder| {
            change_tensors(folder, |tensors| {
                *tensor(tensors, "norm.weight") = tensor(tensors, "norm.weight").to_kind(Kind::Half)
            })
        },
        &["one floating-point type", "Half in `norm.weight`"],
    ),
    (
        "ids where offsets belong",
        |folder| {
            change_tensors(folder, |tensors| {
                let d2t = tensor(tensors, "d2t");
                *d2t = d2t.shallow_clone() + Tensor::arange(40, (Kind::Int64, tch::Device::Cpu)) * 20;
            })
        },
        &["`d2t`", "expected ascending, distinct token ids from 0 to 453", "hint: d2t holds what is added"],
    ),
    (
        "a map that disagrees with itself",
        |folder| change_tensors(folder, |tensors| drop(tensor(tensors, "t2d").get(8).fill_(0))),
        &["`t2d[8]`: `d2t` says true, got false"],
    ),
    (
        "a map of another type",
        |folder| change_tensors(folder, |tensors| *tensor(tensors, "d2t") = tensor(tensors, "d2t").to_kind(Kind::Int)),
        &["`d2t`: expected elements of Int64, got Int"],
    ),
    (
        "a mask of another type",
        |folder| {
            change_tensors(folder, |tensors| *tensor(tensors, "t2d") = tensor(tensors, "t2d").to_kind(Kind::Uint8))
        },
        &["`t2d`: expected elements of Bool, got Uint8"],
    ),
    (
        "two conventions that disagree",
        |folder| {
            change_config(folder, |config| {
                config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = json!([2, 4, 5]);
            })
        },
        &["names what layers [2, 4, 5] read", "[3, 5, 6]"],
    ),
    (
        "layers out of order",
        |folder| {
            change_config(folder, |config| {
                config["eagle_aux_hidden_state_layer_ids"] = json!([5, 4, 2]);
                config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = json!([4, 3, 1]);
            })
        },
        &["expected layers up to 8, low to high, got [5, 4, 2]"],
    ),
    (
        "another number of layers",
        |folder| change_config(folder, |config| config["num_aux_hidden_states"] = json!(4)),
        &["`num_aux_hidden_states`: expected 3"],
    ),
    (
        "two rotary embeddings",
        |folder| change_config(folder, |config| config["rope_parameters"]["rope_theta"] = json!(500000.0)),
        &["`rope_parameters` says", "500000", "`rope_theta` and `rope_scaling`"],
    ),
    (
        "norms that are not there",
        |folder| change_config(folder, |config| config["fc_norm"] = json!(true)),
        &["missing (3)", "fc_norm.0.weight [32]"],
    ),
    (
        "another vocabulary",
        |folder| change_config(folder, |config| config["draft_vocab_size"] = json!(41)),
        &["lm_head.weight: expected [41, 32], got [40, 32]"],
    ),
    (
        "a vocabulary larger than the target's",
        |folder| change_config(folder, |config| config["draft_vocab_size"] = json!(500)),
        &["`draft_vocab_size`: expected 1 to `vocab_size`, which is 454, got 500"],
    ),
    (
        "another head size",
        |folder| change_config(folder, |config| config["head_dim"] = json!(8)),
        &["q_proj.weight: expected [32, 64], got [24, 64]"],
    ),
    (
        "more draft layers",
        |folder| change_config(folder, |config| config["num_hidden_layers"] = json!(2)),
        &["missing", "layers.1."],
    ),
    (
        "another target",
        |folder| change_config(folder, |config| config["specforge"]["num_target_layers"] = json!(12)),
        &["number of layers: the target has 8, the draft was made for 12"],
    ),
    (
        "biases",
        |folder| change_config(folder, |config| config["attention_bias"] = json!(true)),
        &["`attention_bias`: expected false"],
    ),
    (
        "a short context and a projection that is not used",
        |folder| {
            change_config(folder, |config| {
                config["max_position_embeddings"] = json!(64);
                config["tie_word_embeddings"] = json!(true);
            })
        },
        &["cannot be served", "sglang: replaces the projection", "vllm: sizes its rotary tables"],
    ),
    (
        "a number that is none",
        |folder| change_config(folder, |config| config["hidden_size"] = json!("32")),
        &["config.json", "expected i64"],
    ),
    (
        "a file cut off",
        |folder| {
            let file = fs::File::options().write(true).open(folder.join("model.safetensors")).unwrap();
            file.set_len(file.metadata().unwrap().len() - 10).unwrap();
        },
        &["is not a whole safetensors file"],
    ),
];

#[test]
fn every_damage_is_refused_by_name() {
    let (folder, target) = workspace();
    let sound = folder.path().join("sound");
    export(&source(&shape(), &target, Kind::Float), "eagle3", &sound, None).unwrap();
    for (number, (name, damage, expected)) in DAMAGES.iter().enumerate() {
        let damaged = folder.path().join(number.to_string());
        fs::create_dir(&damaged).unwrap();
        contents(&sound).into_iter().for_each(|(path, bytes)| fs::write(damaged.join(path), bytes).unwrap());
        damage(&damaged);
        let output = output_of(specforge(&["export", "--json", "--check"]).arg(&damaged));
        let message = stderr_of(&output);
        assert_eq!(output.status.code(), Some(2), "{name}: {message}");
        assert_eq!(output.stdout, b"", "{name}");
        assert!(message.starts_with(&format!("error: {}", damaged.display())), "{name}: {message}");
        expected.iter().for_each(|part| assert!(message.contains(part), "{name}: no `{part}` in: {message}"));
    }
    // And the sound one is still found sound.
    check(&sound).unwrap();
}

/// An embedding beside the target's is mostly a copy of it, rounded to the draft's own type: compared, not passed over.
#[test]
fn an_embedding_that_comes_with_a_draft_is_compared_with_the_targets() {
    let (folder, target) = workspace();
    let out = folder.path().join("out");
    export(&source(&shape(), &target, Kind::Half), "eagle3", &out, None).unwrap();
    let model = load_target(&target, Kind::Float, tch::Device::Cpu).unwrap();
    let notes = |embedding: Tensor| {
        change_tensors(&out, |tensors| {
            tensors.retain(|(name, _)| name != "embed_tokens.weight");
            tensors.push(("embed_tokens.weight".to_owned(), embedding));
        });
        open::open(out.to_str(), None, (model.as_ref(), target.as_path()), DraftSampling::Greedy).unwrap().notes
    };
    let own = model.embedding().table.to_kind(Kind::Half);
    assert_eq!(notes(own.copy()), Vec::<String>::new());
    let other = own.copy();
    let _ = other.get(100).get(3).fill_(9.0);
    let notes = notes(other);
    assert!(notes.len() == 1 && notes[0].contains("the draft's own is used"), "{notes:?}");
}
