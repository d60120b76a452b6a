//! Folders of block drafters that are not fresh exports: other trainers' layouts are read, every damage is refused by name,
//! and a draft in training starts from a published one.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::{Map, Value, json};
use specforge::data::PackedBatch;
use specforge::draft::block::config::{BlockLayer, Layout};
use specforge::draft::{Algorithm, DraftModel, Gradients, Parameter, RowPlan, StepKey, Tally};
use specforge::error::Result;
use specforge::export::block::{Imported, read};
use specforge::export::{Beginning, Engine, check, check_for, start_from};
use specforge::features::FeatureBatch;
use specforge::weights;
use tch::{Device, Kind, Tensor};

use crate::block_exports::{Drafter, LAYERS, config_of, drafters, problems, shape, source, workspace, written};
use crate::fixture::{TOKENIZER_SIZE, tensors_of, write_torch_file};

fn change_config(folder: &Path, change: impl FnOnce(&mut Value)) {
    let mut config = config_of(folder);
    let before = config.clone();
    change(&mut config);
    assert!(config != before);
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
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

fn rename(folder: &Path, name_of: impl Fn(&str) -> String) {
    change_tensors(folder, |tensors| tensors.iter_mut().for_each(|(name, _)| *name = name_of(name)));
}

fn find(name: &str) -> Drafter {
    drafters().into_iter().find(|drafter| drafter.algorithm == name).unwrap()
}

fn same_tensors(imported: &Imported, drafter: &Drafter, target: &Path) {
    for (name, want) in source(drafter, target, Kind::Float).tensors {
        let (_, got) = imported.tensors.iter().find(|(other, _)| *other == name).unwrap();
        assert!(got.equal(&want), "{name}");
    }
}

// -- other trainers' folders -------------------------------------------------------------------------------------------

/// z-lab's own code keeps codebooks as embeddings and everything of the block in `dflash_config`.
#[test]
fn z_labs_folders_are_read() {
    let (folder, target) = workspace();
    let drafter = find("dflash2");
    let out = written(&drafter, folder.path(), "out");
    change_config(&out, |config| {
        remove(config, &["specforge", "base_model_name_or_path", "num_target_layers", "layer_types", "is_causal"]);
        let size = config.as_object_mut().unwrap().shift_remove("block_size").unwrap();
        config["dflash_config"]["block_size"] = size;
    });
    rename(&out, |name| if name.ends_with("codebook") { format!("{name}.weight") } else { name.to_owned() });
    let imported = read(&out, Some(LAYERS)).unwrap();
    assert_eq!(imported.shape, drafter.shape);
    same_tensors(&imported, &drafter, &target);
    let alone = read(&out, None).unwrap();
    assert!(alone.notes.iter().any(|note| note.contains("how many layers")), "{:?}", alone.notes);
    let error = check(&out).unwrap_err().to_string();
    assert!(error.contains("vllm: does not know codebooks"), "{error}");
    assert!(error.contains("sglang: drops codebooks"), "{error}");
    // Other folders put `model.` before every name, which SGLang takes.
    rename(&out, |name| {
        format!(
            "model.{}",
            name.strip_suffix("codebook.weight").map_or(name.to_owned(), |name| format!("{name}codebook"))
        )
    });
    same_tensors(&read(&out, None).unwrap(), &drafter, &target);
    let report = check(&out).unwrap();
    assert_eq!(problems(&report, Engine::Sglang), "");
    assert!(problems(&report, Engine::Vllm).contains("puts `model.` before every name"));
}

/// ModelOpt keeps its trainer's names and says by `use_swa` and `causal` what layers see.
#[test]
fn modelopts_lilicorr_is_read() {
    let (folder, target) = workspace();
    let mut drafter = find("lilicorr");
    drafter.shape.layers = vec![BlockLayer { window: Some(6), causal: false }; 2];
    let out = written(&drafter, folder.path(), "out");
    change_config(&out, |config| {
        remove(config, &["specforge", "base_model_name_or_path", "is_causal", "use_sliding_window"]);
        config["layer_types"] = json!(["full_attention", "full_attention"]);
        for (key, value) in [("use_swa", json!(true)), ("swa_window_size", json!(6)), ("causal", json!(false))] {
            config["dflash_config"][key] = value;
        }
        config["dflash_config"]["projector_type"] = json!("lilicorr");
    });
    rename(&out, |name| {
        let parts = [
            ("feature_norm", "feature_mlp.0"),
            ("feature_mlp.up_proj", "feature_mlp.1"),
            ("feature_mlp.down_proj", "feature_mlp.3"),
        ];
        let name = parts.iter().fold(name.to_owned(), |name, (engines, own)| name.replace(engines, own));
        match name.starts_with("lilicorr.layers") {
            true => name.replace("mlp.up_proj", "mlp.0").replace("mlp.down_proj", "mlp.2"),
            false => name,
        }
    });
    assert!(tensors_of(&out).iter().any(|(name, _)| name == "lilicorr.layers.1.mlp.2.bias"));
    let imported = read(&out, Some(LAYERS)).unwrap();
    assert_eq!(imported.shape, drafter.shape);
    same_tensors(&imported, &drafter, &target);
    assert!(imported.notes.iter().any(|note| note.contains("`use_swa`")), "{:?}", imported.notes);
    let error = check(&out).unwrap_err().to_string();
    for part in [
        "vllm: does not know the tensor names feature_mlp.0",
        "sglang: does not know the tensor names feature_mlp.0",
        "sglang: gives layers the windows [none, none]",
    ] {
        assert!(error.contains(part), "no `{part}` in {error}");
    }
}

/// ModelOpt's DSpark has no engine: its architecture is DFlash's and its names are flat.
#[test]
fn modelopts_dspark_is_read() {
    let (folder, target) = workspace();
    let drafter = find("dspark");
    let out = written(&drafter, folder.path(), "out");
    change_config(&out, |config| {
        remove(config, &["specforge", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov"]);
        remove(config, &["sample_from_anchor", "mask_token_id", "target_layer_ids", "markov_rank"]);
        config["architectures"] = json!(["DFlashDraftModel"]);
        config["dflash_config"] = json!({"mask_token_id": 7, "target_layer_ids": [1, 3, 5], "projector_type": "dspark",
            "shift_label": true, "markov_rank": 6, "markov_head_type": "vanilla", "use_confidence_head": true,
            "causal": false});
    });
    rename(&out, |name| name.replace("markov_head.", "").replace("confidence_head.proj", "confidence_proj"));
    let imported = read(&out, None).unwrap();
    assert_eq!((imported.method.name(), &imported.shape), ("dspark", &drafter.shape));
    assert_eq!(Value::Object(imported.head.clone()), drafter.head);
    same_tensors(&imported, &drafter, &target);
    let error = check(&out).unwrap_err().to_string();
    assert!(error.contains("does not know the tensor names markov_w1"), "{error}");
    assert!(error.contains("vllm: looks for `markov_rank` at the top"), "{error}");
}

/// DeepSpec ships copies of the target's tables. vLLM uses them, SGLang never.
#[test]
fn deepspecs_copies_of_the_target_are_handed_out() {
    let (folder, target) = workspace();
    let drafter = find("dspark");
    let out = written(&drafter, folder.path(), "out");
    let table = Tensor::ones([TOKENIZER_SIZE, 32], (Kind::Float, Device::Cpu));
    change_tensors(&out, |tensors| {
        tensors.push(("embed_tokens.weight".to_owned(), table.copy()));
        tensors.push(("lm_head.weight".to_owned(), table.copy()));
    });
    let imported = read(&out, None).unwrap();
    same_tensors(&imported, &drafter, &target);
    assert!(imported.embedding.unwrap().equal(&table) && imported.lm_head.unwrap().equal(&table));
    let report = check(&out).unwrap();
    let warnings = report.warnings.join("\n");
    assert!(warnings.contains("`embed_tokens.weight`") && warnings.contains("SGLang takes the target's"), "{warnings}");
}

/// A speculators folder as its trainer writes it, with the trap of causality that vLLM's loader sets.
#[test]
fn speculators_folders_are_read_and_their_trap_is_said() {
    let (folder, target) = workspace();
    for (name, types, non_causal, vllm) in [
        ("dflash", ["sliding_attention"; 2], Some(false), None),
        ("dflash", ["full_attention"; 2], Some(false), Some("makes layers causal in the block as yes")),
        ("dflash", ["full_attention"; 2], None, None),
        ("dflash", ["sliding_attention", "full_attention"], Some(false), Some("one flag for all layers")),
        ("dflash2", ["sliding_attention", "full_attention"], Some(true), None),
        // Of DSpark vLLM's loader drops the key and goes by the layers' types.
        ("dspark", ["sliding_attention", "full_attention"], Some(false), None),
        ("dspark", ["sliding_attention", "full_attention"], Some(true), Some("by the type of each layer")),
    ] {
        let drafter = find(name);
        let out = written(&drafter, folder.path(), &format!("{name}-{types:?}-{non_causal:?}"));
        change_config(&out, |config| {
            let layer: Map<String, Value> = [
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "vocab_size",
                "max_position_embeddings",
                "rms_norm_eps",
                "rope_theta",
                "hidden_act",
                "model_type",
            ]
            .into_iter()
            .map(|key| (key.to_owned(), config[key].clone()))
            .collect();
            let mut own = json!({
                "speculators_model_type": name, "transformer_layer_config": layer, "draft_vocab_size": TOKENIZER_SIZE,
                "block_size": 5, "aux_hidden_state_layer_ids": [2, 4, 6], "mask_token_id": 7,
                "target_hidden_size": null, "sample_from_anchor": name == "dspark",
                "speculators_config": {"proposal_methods": [{"speculative_tokens": drafter.shape.slots()}],
                    "verifier": {"name_or_path": target}},
            });
            own["transformer_layer_config"]["layer_types"] = json!(types);
            own["transformer_layer_config"]["sliding_window"] = json!(6);
            if let Some(non_causal) = non_causal {
                own["sliding_window_non_causal"] = json!(non_causal);
            }
            if let Some(conv) = drafter.shape.conv {
                own["conv_kernel_size"] = json!(conv.kernel_size);
                own["conv_group_size"] = json!(conv.group_size);
            }
            for (key, value) in drafter.head.as_object().unwrap() {
                own[if key == "confidence_head" { "enable_confidence_head" } else { key }] = value.clone();
            }
            *config = own;
        });
        let imported = read(&out, Some(LAYERS)).unwrap();
        let sliding = |kind: &str| kind == "sliding_attention";
        let layers: Vec<BlockLayer> = types
            .iter()
            .map(|kind| BlockLayer {
                window: sliding(kind).then_some(6),
                causal: sliding(kind) && !non_causal.unwrap_or(false),
            })
            .collect();
        assert_eq!((&imported.shape.layers, &imported.shape.target_layer_ids), (&layers, &vec![1, 3, 5]));
        same_tensors(&imported, &drafter, &target);
        let result = check_for(&out, Some(Engine::Vllm));
        match vllm {
            None => drop(result.unwrap()),
            Some(problem) => {
                let error = result.unwrap_err().to_string();
                assert!(error.contains(problem), "{error}");
            }
        }
    }
}

/// speculators' XPress: another prefix and other names, and no engine that loads it.
#[test]
fn speculators_xpress_is_read() {
    let (folder, target) = workspace();
    let drafter = find("xpress");
    let out = written(&drafter, folder.path(), "out");
    change_config(&out, |config| {
        let mut layer = config.clone();
        let keys = ["architectures", "block_size", "dflash_config", "specforge", "base_model_name_or_path"];
        remove(&mut layer, &keys);
        let xpress = ["xpress_block_size", "xpress_rank", "xpress_mlp_hidden", "xpress_num_passes", "xpress_topc"];
        remove(&mut layer, &xpress);
        *config = json!({"speculators_model_type": "xpress", "transformer_layer_config": layer, "block_size": 5,
            "aux_hidden_state_layer_ids": [2, 4, 6], "mask_token_id": 7, "xpress_rank": 6, "xpress_mlp_ratio": 2,
            "num_jacobi_passes": 3, "draft_vocab_size": TOKENIZER_SIZE, "sample_from_anchor": false,
            "sliding_window_non_causal": false});
    });
    rename(&out, |name| {
        let parts = [
            ("xpress_head.w1", "refiner_head.token_embed"),
            ("xpress_head.w2", "refiner_head.readout"),
            ("xpress_head.mix.L", "refiner_head.mix_l"),
            ("xpress_head.mlp.gate_proj", "refiner_head.mlp_gate"),
            ("xpress_head.mlp.up_proj", "refiner_head.mlp_up"),
            ("xpress_head.mlp.down_proj", "refiner_head.mlp_down"),
            ("xpress_head.", "refiner_head."),
        ];
        parts.iter().fold(name.to_owned(), |name, (engines, own)| name.replace(engines, own))
    });
    let imported = read(&out, Some(LAYERS)).unwrap();
    assert_eq!(imported.shape, drafter.shape);
    assert_eq!(imported.head["xpress_num_passes"], 3);
    same_tensors(&imported, &drafter, &target);
    assert!(imported.notes.iter().any(|note| note.contains("names no number of proposed tokens")));
    let error = check(&out).unwrap_err().to_string();
    assert!(error.contains("vllm: has no loader for speculators' xpress"), "{error}");
}

/// The mask's row as `torch.save` writes a table without a token: vLLM takes it, SGLang does not.
#[test]
fn a_row_for_the_mask_is_read() {
    let (folder, _) = workspace();
    let out = written(&find("dflash"), folder.path(), "out");
    let row = Tensor::from_slice(&(0..32).map(|number| number as f32).collect::<Vec<_>>());
    write_torch_file(&out.join("mask_embedding.pt"), &[("embedding".to_owned(), row.copy())]);
    let imported = read(&out, None).unwrap();
    assert!(imported.shape.mask_embedding);
    let (_, got) = imported.tensors.iter().find(|(name, _)| name == "mask_embedding").unwrap();
    assert!(got.equal(&row));
    let report = check(&out).unwrap();
    assert_eq!(problems(&report, Engine::Vllm), "");
    assert!(problems(&report, Engine::Sglang).contains("only as a table"));
    write_torch_file(&out.join("mask_embedding.pt"), &[("embedding".to_owned(), row.narrow(0, 0, 8))]);
    let error = check(&out).unwrap_err().to_string();
    assert!(error.contains("mask_embedding.pt") && error.contains("expected 32 numbers, got 8"), "{error}");
    fs::write(out.join("mask_embedding.pt"), "no torch file").unwrap();
    assert!(check(&out).unwrap_err().to_string().contains("is no whole torch file"));
}

/// Weights that trainers and engines were run with, as folders of their layouts.
#[test]
fn goldens_make_folders_that_are_read() {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/goldens");
    let goldens = std::env::var_os("SPECFORGE_GOLDENS").map_or(committed, PathBuf::from);
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for file in fs::read_dir(goldens).unwrap().map(|entry| entry.unwrap().path()) {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let kinds = ["sp_dflash", "sp_dspark", "sp_xpress", "infer_d", "infer_lilicorr", "infer_xpress", "loop_dflash"];
        if !kinds.iter().any(|kind| name.starts_with(kind)) {
            continue;
        }
        let bytes = fs::read(&file).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap();
        let out = folder.path().join(&name);
        fs::create_dir(&out).unwrap();
        let (mut config, layers) = golden_config(&metadata);
        // The number of tokens of a smaller vocabulary is an argument of the trainer's, not one of these settings.
        if let Ok(map) = SafeTensors::deserialize(&bytes).unwrap().tensor("w.d2t") {
            config["draft_vocab_size"] = json!(map.shape()[0]);
        }
        fs::write(out.join("config.json"), config.to_string()).unwrap();
        let tensors: Vec<(String, Tensor)> = tensors_of(&file)
            .into_iter()
            .filter_map(|(name, tensor)| Some((name.strip_prefix("w.")?.to_owned(), tensor)))
            .filter(|(name, _)| !name.starts_with("target"))
            .map(|(name, tensor)| match name.as_str() {
                "t2d" => (name, tensor.to_kind(Kind::Bool)),
                _ => (name, tensor),
            })
            // The trainer saves no copy of the target's head with the whole vocabulary.
            .collect();
        weights::write_tensors(&out.join("model.safetensors"), &tensors, &[]).unwrap();
        let imported = read(&out, None).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(imported.shape.layers.len(), layers, "{name}");
        assert_eq!(imported.shape.target_layer_ids.len() as i64 * imported.shape.hidden_size, {
            imported.tensors.iter().find(|(name, _)| name == "fc.weight").unwrap().1.size()[1]
        });
        println!("read {name}: {}", imported.method.name());
    }
}

/// The config.json that the settings of a golden file stand for.
fn golden_config(metadata: &HashMap<String, String>) -> (Value, usize) {
    let value = |key: &str| metadata.get(key).map(|text| serde_json::from_str::<Value>(text).unwrap());
    let kind = &metadata["kind"];
    if let Some(layer) = value("transformer_layer_config") {
        let mut config = value("spec").unwrap();
        let layers = layer["num_hidden_layers"].as_u64().unwrap() as usize;
        config["speculators_model_type"] = json!(kind.strip_prefix("sp_"));
        config["transformer_layer_config"] = layer;
        return (config, layers);
    }
    let mut config = value("config").unwrap();
    let has = |key: &str| config.get(key).is_some() || config.pointer(&format!("/dflash_config/{key}")).is_some();
    let architecture = if has("markov_rank") {
        "Qwen3DSparkModel"
    } else if has("selector_rank") {
        "DFlash2DraftModel"
    } else if has("lilicorr_enabled") {
        "LiLiCorrDraftModel"
    } else if has("xpress_rank") {
        "Qwen3XPressModel"
    } else {
        "DFlashDraftModel"
    };
    config["architectures"] = json!([architecture]);
    let layers = config["num_hidden_layers"].as_u64().unwrap() as usize;
    (config, layers)
}

/// Tensors by name.
type Tensors = Vec<(String, Tensor)>;

// -- damaged folders ---------------------------------------------------------------------------------------------------

#[test]
fn tensors_that_do_not_fit_are_named() {
    let (folder, _) = workspace();
    for (number, drafter) in drafters().into_iter().enumerate() {
        let head = match drafter.algorithm {
            "dflash" => "norm.weight",
            "dflash2" => "candidate_selector.successor_codebook",
            "dspark" => "markov_head.markov_w2.weight",
            "lilicorr" => "lilicorr.same_slot_bias",
            "xpress" => "xpress_head.mix.L",
            _ => "prefix_gru.weight_hh_l0",
        };
        let out = written(&drafter, folder.path(), &number.to_string());
        let whole = tensors_of(&out);
        let with = |change: &dyn Fn(&mut Tensors)| {
            let mut tensors: Vec<(String, Tensor)> =
                whole.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
            change(&mut tensors);
            weights::write_tensors(&out.join("model.safetensors"), &tensors, &[]).unwrap();
            check(&out).unwrap_err().to_string()
        };
        for name in [head, "layers.1.self_attn.q_norm.weight"] {
            let missing = with(&|tensors| tensors.retain(|(other, _)| other != name));
            assert!(missing.contains("missing (1)") && missing.contains(name), "{missing}");
            assert!(missing.contains("model.safetensors"), "{missing}");
            let other = with(&|tensors| {
                let (_, tensor) = tensors.iter_mut().find(|(other, _)| other == name).unwrap();
                *tensor = Tensor::cat(&[&*tensor, &*tensor], 0);
            });
            assert!(other.contains("wrong shape (1)") && other.contains(name), "{other}");
        }
        let one = || Tensor::ones([2], (Kind::Float, Device::Cpu));
        let surplus = with(&|tensors| tensors.push(("layers.0.self_attn.attention_sink_bias".to_owned(), one())));
        assert!(surplus.contains("surplus (1)") && surplus.contains("attention_sink_bias"), "{surplus}");
        let integers = with(&|tensors| {
            let (_, tensor) = tensors.iter_mut().find(|(other, _)| other == head).unwrap();
            *tensor = tensor.to_kind(Kind::Int64);
        });
        assert!(integers.contains(head) && integers.contains("floating-point"), "{integers}");
        let infinite = with(&|tensors| {
            let (_, tensor) = tensors.iter_mut().find(|(other, _)| other == head).unwrap();
            *tensor = tensor.f_mul_scalar(f64::INFINITY).unwrap();
        });
        assert!(infinite.contains(head) && infinite.contains("finite"), "{infinite}");
        let twice = with(&|tensors| {
            let (name, tensor) = &tensors[0];
            let twin = (format!("model.{name}"), tensor.shallow_clone());
            tensors.push(twin);
        });
        assert!(twice.contains("under two names"), "{twice}");
    }
}

/// A head beside the wrong architecture is what SGLang drops in silence.
#[test]
fn a_head_beside_another_architecture_is_named() {
    let (folder, _) = workspace();
    let out = written(&find("dflash2"), folder.path(), "out");
    change_config(&out, |config| config["architectures"] = json!(["DFlashDraftModel"]));
    let error = check(&out).unwrap_err();
    assert!(error.to_string().contains("a part of dflash2, but config.json makes it dflash"), "{error}");
    assert!(error.hint().unwrap().contains("DFlash2DraftModel"));
}

#[test]
fn keys_that_cannot_be_honoured_are_refused() {
    let (folder, _) = workspace();
    type Case = (&'static str, fn(&mut Value), &'static [&'static str]);
    let cases: &[Case] = &[
        ("dflash", |it| it["is_causal"] = json!("yes"), &["`is_causal`", "boolean"]),
        (
            "dflash",
            |it| it["dflash_config"]["causal"] = json!(true),
            &["`is_causal`: false", "`dflash_config.causal` is true"],
        ),
        (
            "dflash",
            |it| it["dflash_config"]["block_size"] = json!(8),
            &["`block_size`: 5 at the top, 8 in `dflash_config`"],
        ),
        ("dflash", |it| it["target_layer_ids"] = json!([1, 3, 4]), &["`target_layer_ids`", "`dflash_config`"]),
        (
            "dflash",
            |it| it["eagle_aux_hidden_state_layer_ids"] = json!([1, 3, 5]),
            &["outputs of layers [1, 3, 5]", "[0, 2, 4]"],
        ),
        ("dflash", |it| it["dflash_config"]["target_layer_ids"] = json!([1, 3, 8]), &["to below 8"]),
        ("dflash", |it| it["dflash_config"]["target_layer_ids"] = json!([3, 1, 5]), &["low to high"]),
        ("dflash", |it| it["dflash_config"]["target_layer_ids"] = json!([-2, 3, 5]), &["from -1, the embedding"]),
        ("dflash", |it| it["dflash_config"]["target_layer_ids"] = json!([]), &["`target_layer_ids`"]),
        ("dflash", |it| it["layer_types"] = json!(["full_attention"]), &["`layer_types`: expected one for each of 2"]),
        ("dflash", |it| it["layer_types"][0] = json!("chunked_attention"), &["`layer_types[0]`", "chunked_attention"]),
        ("dflash", |it| it["layer_types"][0] = json!("sliding_attention"), &["`sliding_window`: expected a number"]),
        ("dflash", |it| remove(it, &["block_size"]), &["`block_size`: expected a number, got nothing"]),
        ("dflash", |it| it["block_size"] = json!(1), &["at least 2 rows"]),
        ("dflash", |it| it["block_size"] = json!(1i64 << 40), &["`block_size`"]),
        ("dflash", |it| remove(&mut it["dflash_config"], &["mask_token_id"]), &["`mask_token_id`"]),
        ("dflash", |it| it["dflash_config"]["mask_token_id"] = json!(-1), &["`mask_token_id`"]),
        ("dflash", |it| it["attention_bias"] = json!(true), &["`attention_bias`: expected false"]),
        ("dflash", |it| it["dflash_config"]["attention_sink_bias"] = json!(true), &["`attention_sink_bias`"]),
        (
            "dflash",
            |it| it["dflash_config"]["attention_value_scale"] = json!(0.6),
            &["`attention_value_scale`: expected 1"],
        ),
        ("dflash", |it| it["is_neox_style"] = json!(false), &["`is_neox_style`"]),
        ("dflash", |it| it["target_hidden_size"] = json!(64), &["`target_hidden_size`"]),
        ("dflash", |it| it["quantization_config"] = json!({"quant_method": "fp8"}), &["fp8"]),
        ("dflash", |it| it["num_hidden_layers"] = json!(1i64 << 40), &["`num_hidden_layers`"]),
        (
            "dflash",
            |it| it["num_target_layers"] = json!(9),
            &["number of layers: the target has 8, the draft was made for 9"],
        ),
        ("dflash", |it| it["vocab_size"] = json!(400), &["vocabulary: the target has 454"]),
        ("dflash", |it| it["rope_theta"] = json!(5e5), &["`rope_parameters` says"]),
        (
            "dflash",
            |it| remove(it, &["rope_theta", "rope_parameters"]),
            &["`rope_theta`: expected a number, got nothing", "vLLM 1000000"],
        ),
        ("dflash", |it| it["dflash_config"] = json!(7), &["`dflash_config`: expected an object"]),
        ("dflash2", |it| remove(&mut it["dflash_config"], &["selector_rank"]), &["`selector_rank`"]),
        (
            "dflash2",
            |it| it["dflash_config"]["selector_rank"] = json!(5),
            &["predecessor_codebook: expected [454, 5], got [454, 6]"],
        ),
        ("dflash2", |it| remove(&mut it["dflash_config"], &["conv_group_size"]), &["`conv_group_size`"]),
        ("dflash2", |it| it["dflash_config"]["conv_group_size"] = json!(5), &["`conv_group_size`: expected a divisor"]),
        ("dspark", |it| remove(it, &["markov_rank"]), &["`markov_rank`"]),
        ("dspark", |it| it["markov_rank"] = json!(0), &["surplus", "markov_head.markov_w1.weight"]),
        ("dspark", |it| it["markov_head_type"] = json!("lstm"), &["`markov_head_type`", "lstm"]),
        ("dspark", |it| it["dspark_bonus_anchor"] = json!(true), &["contradicts `sample_from_anchor`"]),
        (
            "lilicorr",
            |it| remove(&mut it["dflash_config"], &["lilicorr_vector_eps"]),
            &["`dflash_config.lilicorr_vector_eps`"],
        ),
        ("lilicorr", |it| it["dflash_config"]["lilicorr_enabled"] = json!(false), &["`lilicorr_enabled`"]),
        ("lilicorr", |it| it["dflash_config"]["lilicorr_factor_dim"] = json!(1i64 << 60), &["`lilicorr_factor_dim`"]),
        ("lilicorr", |it| it["dflash_config"]["lilicorr_mlp_ratio"] = json!(1e300), &["`lilicorr_mlp_ratio x"]),
        ("xpress", |it| it["xpress_block_size"] = json!(6), &["`xpress_block_size`: expected 5"]),
        ("xpress", |it| it["xpress_mlp_hidden"] = json!(13), &["a multiple of `xpress_rank` 6"]),
        ("domino", |it| remove(&mut it["dflash_config"], &["shift_label"]), &["`shift_label`"]),
        ("domino", |it| it["emb_dim"] = json!(11), &["`emb_dim`: 11 at the top, 10 in `dflash_config`"]),
        (
            "domino",
            |it| it["dflash_config"]["pure_draft_prefix_len"] = json!(0),
            &["`pure_draft_prefix_len`: expected 1"],
        ),
    ];
    for (number, (name, change, parts)) in cases.iter().enumerate() {
        let out = written(&find(name), folder.path(), &number.to_string());
        change_config(&out, change);
        let error = check(&out).unwrap_err().to_string();
        for part in parts.iter().copied().chain([out.to_str().unwrap()]) {
            assert!(error.contains(part), "{number} {name}: no `{part}` in {error}");
        }
        assert!(!error.contains('\u{1b}'));
    }
}

/// What engines would take otherwise than the file means it, or pass over.
#[test]
fn keys_in_the_wrong_place_are_told_by_engine() {
    let (folder, _) = workspace();
    type Case = (&'static str, fn(&mut Value), Engine, &'static str);
    let cases: &[Case] = &[
        ("dflash", |it| remove(it, &["model_type"]), Engine::Vllm, "no `model_type`"),
        (
            "dflash",
            |it| {
                remove(it, &["is_causal"]);
                it["dflash_config"]["causal"] = json!(true);
            },
            Engine::Sglang,
            "makes layers causal in the block as no",
        ),
        (
            "dflash",
            |it| {
                remove(it, &["is_causal", "use_sliding_window"]);
                it["layer_types"] = json!(["sliding_attention", "sliding_attention"]);
                it["sliding_window"] = json!(6);
            },
            Engine::Vllm,
            "gives layers the windows [none, none]",
        ),
        (
            "dflash",
            |it| {
                remove(it, &["is_causal"]);
                it["layer_types"] = json!(["sliding_attention", "sliding_attention"]);
                it["use_sliding_window"] = json!(true);
                it["sliding_window"] = json!(6);
            },
            Engine::LlamaCpp,
            "makes layers causal in the block as no",
        ),
        (
            "dflash",
            |it| it["dflash_config"]["sample_from_anchor"] = json!(true),
            Engine::Vllm,
            "refuses drafts whose rows",
        ),
        ("dflash", |it| it["max_position_embeddings"] = json!(64), Engine::Vllm, "sizes its rotary tables"),
        (
            "dflash2",
            |it| {
                let rank = it["dflash_config"].as_object_mut().unwrap().shift_remove("selector_rank").unwrap();
                it["selector_rank"] = rank;
            },
            Engine::Sglang,
            "looks for `selector_rank` in `dflash_config`",
        ),
        ("dspark", |it| remove(it, &["markov_head_type"]), Engine::Sglang, "needs `markov_head_type`"),
        (
            "dspark",
            |it| remove(it, &["confidence_head_with_markov"]),
            Engine::Vllm,
            "takes `confidence_head_with_markov` for false",
        ),
    ];
    for (number, (name, change, engine, part)) in cases.iter().enumerate() {
        let out = written(&find(name), folder.path(), &number.to_string());
        change_config(&out, change);
        read(&out, None).unwrap();
        let error = check_for(&out, Some(*engine)).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains(engine.name()), "{number}: no `{part}` in {error}");
    }
}

/// What nobody here knows is not passed over.
#[test]
fn strange_keys_and_frozen_tensors_are_noted() {
    let (folder, _) = workspace();
    let out = written(&find("dflash"), folder.path(), "out");
    change_config(&out, |config| {
        config["dflash_config"]["linear_position_ids"] = json!(true);
        config["rope_parameters"]["rope_dim"] = json!(6);
    });
    change_tensors(&out, |tensors| {
        let one = Tensor::ones([2], (Kind::Float, Device::Cpu));
        tensors.push(("verifier_norm.weight".to_owned(), one));
    });
    let notes = read(&out, None).unwrap().notes.join("\n");
    for part in
        ["`linear_position_ids` is not known", "`rope_parameters.rope_dim`", "`verifier_norm.weight` is no part"]
    {
        assert!(notes.contains(part), "no `{part}` in {notes}");
    }
    assert_eq!(check(&out).unwrap().warnings.join("\n"), notes);
}

// -- training that starts from a folder --------------------------------------------------------------------------------

/// A draft in training, as far as a warm start asks.
struct Draft {
    description: Value,
    parameters: Vec<Parameter>,
}

impl DraftModel for Draft {
    fn algorithm(&self) -> &'static Algorithm {
        unreachable!("a warm start asks for parameters and description alone")
    }
    fn capture(&self) -> Vec<usize> {
        unreachable!("a warm start asks for parameters and description alone")
    }
    fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }
    fn metrics(&self) -> Vec<String> {
        unreachable!("a warm start asks for parameters and description alone")
    }
    fn summary(&self, _: &[f64]) -> Vec<(String, f64)> {
        unreachable!("a warm start asks for parameters and description alone")
    }
    fn plan(&self, _: &PackedBatch, _: StepKey) -> Result<RowPlan> {
        unreachable!("a warm start asks for parameters and description alone")
    }
    fn accumulate(&self, _: &FeatureBatch, _: &RowPlan, _: &[f64], _: &mut Gradients<'_>) -> Result<Tally> {
        unreachable!("a warm start asks for parameters and description alone")
    }
    fn evaluate(&self, _: &FeatureBatch, _: &RowPlan, _: &[f64]) -> Result<Tally> {
        unreachable!("a warm start asks for parameters and description alone")
    }
    fn description(&self) -> Value {
        self.description.clone()
    }
}

fn draft(drafter: &Drafter, target: &Path) -> Draft {
    let source = source(drafter, target, Kind::Float);
    let zeros = |(name, tensor): (String, Tensor)| Parameter::new(name, tensor.zeros_like());
    Draft { description: source.description, parameters: source.tensors.into_iter().map(zeros).collect() }
}

#[test]
fn a_draft_in_training_starts_from_a_folder() {
    let (folder, target) = workspace();
    let embedding = Tensor::ones([TOKENIZER_SIZE, 32], (Kind::Float, Device::Cpu));
    for (number, drafter) in drafters().into_iter().enumerate() {
        let out = written(&drafter, folder.path(), &number.to_string());
        let own = draft(&drafter, &target);
        let beginning = Beginning { draft: &own, vocabulary: None, embedding: &embedding };
        assert_eq!(start_from(&out, &beginning).unwrap(), Vec::<String>::new());
        for (name, want) in source(&drafter, &target, Kind::Float).tensors {
            let parameter = own.parameters.iter().find(|parameter| parameter.name == name).unwrap();
            assert!(parameter.value.equal(&want), "{name}");
        }
    }
    let mut other = find("dspark");
    other.shape.block_size = 7;
    other.shape.target_layer_ids = vec![1, 2, 5];
    other.shape.layout = Layout::FillIn;
    other.shape.layers[1].window = Some(4);
    other.head["markov_head_type"] = json!("gated");
    let own = draft(&other, &target);
    let beginning = Beginning { draft: &own, vocabulary: None, embedding: &embedding };
    let error = start_from(&folder.path().join("2"), &beginning).unwrap_err().to_string();
    for part in [
        "`draft.init_from`",
        "block_size: 5 there, 7 here (draft.block_size)",
        "target_layer_ids: [1, 3, 5] there, [1, 2, 5] here (draft.target_layer_ids)",
        "layout: shift there, fill_in here (draft.layout)",
        "windows: [None, None] there, [None, Some(4)] here",
        "markov_head_type: \"vanilla\" there, \"gated\" here (draft.head.markov_head_type)",
    ] {
        assert!(error.contains(part), "no `{part}` in {error}");
    }
    let error = start_from(&folder.path().join("0"), &beginning).unwrap_err().to_string();
    assert!(error.contains("kind: dflash there, dspark here (draft.algorithm)"), "{error}");
    assert_eq!(shape().layers.len(), 2);
}
