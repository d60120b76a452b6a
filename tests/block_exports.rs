//! Exports of block drafters: what is written is read back, names and shapes are those of the engines, and what an engine
//! would serve otherwise than it was trained is refused with the reason.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use specforge::draft::block::config::{BlockLayer, BlockShape, Convolution, Layout};
use specforge::export::block::{Imported, read};
use specforge::export::{Engine, ExportReport, Source, check, check_for, export};
use specforge::models::LayerShape;
use specforge::nn::{RopeConfig, RopeScaling, noise};
use specforge::vocab::VocabMap;
use tch::{Kind, Tensor};

use crate::eagle3_exports::engine_of;
use crate::fixture::{
    TOKENIZER_SIZE, Workspace, contents, json_of, litter, output_of, specforge, stderr_of, tensors_of, write_model,
};

/// Layers of the target.
pub const LAYERS: usize = 8;
const HIDDEN: i64 = 32;

/// A folder with a Qwen3 target, where exports go too.
pub fn workspace() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let target = folder.path().join("target");
    write_model(
        &target,
        &json!({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": LAYERS, "head_dim": 6,
            "rms_norm_eps": 1e-6}),
    );
    (folder, target)
}

/// Two layers that see everything, on three layers of the target.
pub fn shape() -> BlockShape {
    BlockShape {
        hidden_size: HIDDEN,
        num_target_layers: LAYERS,
        vocab_size: TOKENIZER_SIZE,
        draft_vocab_size: TOKENIZER_SIZE,
        block_size: 5,
        layout: Layout::FillIn,
        target_layer_ids: vec![1, 3, 5],
        mask_token_id: 7,
        layers: vec![BlockLayer { window: None, causal: false }; 2],
        layer: LayerShape {
            intermediate_size: 48,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 6,
            rms_norm_eps: 1e-6,
            rope: RopeConfig {
                theta: 10_000.0,
                head_dim: 6,
                max_position_embeddings: 256,
                scaling: RopeScaling::Default,
            },
        },
        conv: None,
        mask_embedding: false,
        input_embedding_scale: 1.0,
    }
}

/// A drafter: its kind, its shape and the keys of its head.
#[derive(Clone)]
pub struct Drafter {
    pub algorithm: &'static str,
    pub shape: BlockShape,
    pub head: Value,
}

/// One of each kind, and DSpark's three heads.
pub fn drafters() -> Vec<Drafter> {
    let shift = BlockShape { layout: Layout::Shift, ..shape() };
    let conv = BlockShape { conv: Some(Convolution { kernel_size: 2, group_size: 8 }), ..shape() };
    let dspark = |kind: &str, confidence: bool, with_markov: bool| {
        json!({"markov_rank": 6, "markov_head_type": kind, "confidence_head": confidence,
            "confidence_head_with_markov": with_markov, "anchor_row_writes_state": false})
    };
    let lilicorr = json!({"lilicorr_candidate_topk": 4, "lilicorr_hidden_size": 24, "lilicorr_num_layers": 2,
        "lilicorr_num_heads": 3, "lilicorr_mlp_ratio": 2.0, "lilicorr_factor_dim": 10, "lilicorr_vector_eps": 1e-4,
        "lilicorr_logit_scale": 8.0});
    let xpress = json!({"xpress_rank": 6, "xpress_mlp_ratio": 2, "xpress_num_passes": 3, "xpress_topc": 9});
    let domino = json!({"gru_hidden_dim": 14, "emb_dim": 10, "pure_draft_prefix_len": 1});
    let selector = json!({"selector_rank": 6, "selector_top_k": 4, "input_embedding_scale": 1.0,
        "output_multiplier": 1.0});
    let one = |algorithm, shape: &BlockShape, head: Value| Drafter { algorithm, shape: shape.clone(), head };
    vec![
        one("dflash", &shape(), json!({})),
        one("dflash2", &conv, selector),
        one("dspark", &shift, dspark("vanilla", true, true)),
        one("dspark", &shape(), dspark("gated", true, false)),
        one("dspark", &shift, dspark("rnn", false, false)),
        one("lilicorr", &shape(), lilicorr.clone()),
        one("lilicorr", &conv, lilicorr),
        one("xpress", &shape(), xpress),
        one("domino", &shape(), domino.clone()),
        one("domino", &shift, domino),
    ]
}

/// Names and shapes that engines load, from their code: the shapes of `LiLiCorrHead` and the like.
fn names(drafter: &Drafter) -> BTreeMap<String, Vec<i64>> {
    let Drafter { algorithm, shape, head } = drafter;
    let number = |key: &str| head[key].as_i64().unwrap();
    let (h, v, b) = (shape.hidden_size, shape.vocab_size, shape.block_size);
    let layer = shape.layer;
    let (q, kv) = (layer.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim);
    let mut all = BTreeMap::new();
    let mut add = |name: String, shape: &[i64]| drop(all.insert(name, shape.to_vec()));
    add("fc.weight".into(), &[h, h * shape.target_layer_ids.len() as i64]);
    add("hidden_norm.weight".into(), &[h]);
    add("norm.weight".into(), &[h]);
    for i in 0..shape.layers.len() {
        let mut add = |name: &str, shape: &[i64]| add(format!("layers.{i}.{name}"), shape);
        add("input_layernorm.weight", &[h]);
        add("post_attention_layernorm.weight", &[h]);
        add("self_attn.q_proj.weight", &[q, h]);
        add("self_attn.k_proj.weight", &[kv, h]);
        add("self_attn.v_proj.weight", &[kv, h]);
        add("self_attn.o_proj.weight", &[h, q]);
        add("self_attn.q_norm.weight", &[layer.head_dim]);
        add("self_attn.k_norm.weight", &[layer.head_dim]);
        add("mlp.gate_proj.weight", &[layer.intermediate_size, h]);
        add("mlp.up_proj.weight", &[layer.intermediate_size, h]);
        add("mlp.down_proj.weight", &[h, layer.intermediate_size]);
        if let Some(conv) = shape.conv {
            for name in ["attention_conv", "mlp_conv"] {
                add(&format!("{name}.base_kernel"), &[2, conv.kernel_size, h]);
                let rows = 2 * conv.kernel_size * (h / conv.group_size);
                add(&format!("{name}.kernel_projection.weight"), &[rows, h]);
            }
        }
    }
    match *algorithm {
        "dflash2" => {
            let r = number("selector_rank");
            add("candidate_selector.predecessor_codebook".into(), &[v, r]);
            add("candidate_selector.successor_codebook".into(), &[v, r]);
            add("candidate_selector.hidden_projection.weight".into(), &[r, h]);
        }
        "dspark" => {
            let r = number("markov_rank");
            add("markov_head.markov_w1.weight".into(), &[v, r]);
            add("markov_head.markov_w2.weight".into(), &[shape.draft_vocab_size, r]);
            match head["markov_head_type"].as_str().unwrap() {
                "gated" => {
                    add("markov_head.gate_proj.weight".into(), &[r, h + r]);
                    add("markov_head.gate_proj.bias".into(), &[r]);
                }
                "rnn" => {
                    add("markov_head.joint_proj.weight".into(), &[3 * r, 2 * r + h]);
                    add("markov_head.joint_proj.bias".into(), &[3 * r]);
                }
                _ => {}
            }
            if head["confidence_head"] == true {
                let width = if head["confidence_head_with_markov"] == true { h + r } else { h };
                add("confidence_head.proj.weight".into(), &[1, width]);
                add("confidence_head.proj.bias".into(), &[1]);
            }
        }
        "lilicorr" => {
            let (w, heads, d) =
                (number("lilicorr_hidden_size"), number("lilicorr_num_heads"), number("lilicorr_factor_dim"));
            let mut add = |name: &str, shape: &[i64]| add(format!("lilicorr.{name}"), shape);
            let linear = |add: &mut dyn FnMut(&str, &[i64]), name: &str, rows: i64, columns: i64| {
                add(&format!("{name}.weight"), &[rows, columns]);
                add(&format!("{name}.bias"), &[rows]);
            };
            for (name, rows, columns) in [
                ("token_proj", w, h),
                ("pass_hidden_proj", w, h),
                ("context_proj", w, h),
                ("feature_mlp.up_proj", w, 5),
                ("feature_mlp.down_proj", w, w),
                ("factor_input_proj", w, 3 * w),
                ("out_head", d, w),
                ("in_head", d, w),
                ("anchor_out_head", d, w),
            ] {
                linear(&mut add, name, rows, columns);
            }
            for i in 0..number("lilicorr_num_layers") {
                linear(&mut add, &format!("layers.{i}.attn.out_proj"), w, w);
                linear(&mut add, &format!("layers.{i}.mlp.up_proj"), 2 * w, w);
                linear(&mut add, &format!("layers.{i}.mlp.down_proj"), w, 2 * w);
                add(&format!("layers.{i}.attn.in_proj_weight"), &[3 * w, w]);
                add(&format!("layers.{i}.attn.in_proj_bias"), &[3 * w]);
                add(&format!("layers.{i}.attn_norm.weight"), &[w]);
                add(&format!("layers.{i}.mlp_norm.weight"), &[w]);
            }
            add("feature_norm.weight", &[5]);
            add("feature_norm.bias", &[5]);
            add("slot_embedding", &[1, 1, b - 1, 1, w]);
            add("rank_embedding", &[1, 1, 1, number("lilicorr_candidate_topk"), w]);
            add("relative_slot_bias", &[heads, 2 * b - 1]);
            add("same_slot_bias", &[heads]);
            add("output_norm.weight", &[w]);
            add("anchor_norm.weight", &[w]);
        }
        "xpress" => {
            let (r, m) = (number("xpress_rank"), number("xpress_rank") * number("xpress_mlp_ratio"));
            let mut add = |name: &str, shape: &[i64]| add(format!("xpress_head.{name}"), shape);
            add("w1.weight", &[v, r]);
            add("down_h.weight", &[r, h]);
            add("down_g.weight", &[r, h]);
            add("in_proj.weight", &[r, 3 * r]);
            add("mix.L", &[r, b, b]);
            add("mlp.gate_proj.weight", &[m, r]);
            add("mlp.up_proj.weight", &[m, r]);
            add("mlp.down_proj.weight", &[r, m]);
            add("w2.weight", &[v, r]);
        }
        "domino" => {
            let (g, m) = (number("gru_hidden_dim"), number("emb_dim"));
            add("prefix_gru.weight_ih_l0".into(), &[3 * g, h]);
            add("prefix_gru.weight_hh_l0".into(), &[3 * g, g]);
            add("embed_proj.0.weight".into(), &[m, h + g]);
            add("embed_proj.2.weight".into(), &[v, m]);
        }
        _ => {}
    }
    all
}

/// Random values for a drafter, as a checkpoint describes it.
pub fn source(drafter: &Drafter, target: &Path, kind: Kind) -> Source {
    let named = names(drafter).into_iter().enumerate();
    let mut tensors: Vec<(String, Tensor)> =
        named.map(|(stream, (name, size))| (name, noise::normal(&size, 0.5, 3, stream as u64).to_kind(kind))).collect();
    if drafter.shape.mask_embedding {
        tensors.push(("mask_embedding".to_owned(), noise::normal(&[HIDDEN], 0.5, 3, 999).to_kind(kind)));
    }
    Source {
        // What only training reads is in a description too.
        description: json!({
            "draft": {"algorithm": drafter.algorithm, "head": drafter.head, "num_anchors": 512},
            "shape": drafter.shape,
        }),
        tensors,
        target: target.to_path_buf(),
        target_name: None,
        kind: Some(kind),
        q8_0: false,
    }
}

/// Exports a drafter into a new folder.
pub fn written(drafter: &Drafter, folder: &Path, name: &str) -> PathBuf {
    let out = folder.join(name);
    export(&source(drafter, &folder.join("target"), Kind::Float), "block", &out, None).unwrap();
    out
}

pub fn config_of(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap()
}

fn same(imported: &Imported, drafter: &Drafter, source: &Source) {
    assert_eq!(imported.method.name(), drafter.algorithm);
    assert_eq!(imported.shape, drafter.shape, "{}", drafter.algorithm);
    assert_eq!(Value::Object(imported.head.clone()), drafter.head, "{}", drafter.algorithm);
    let mut names: Vec<&String> = imported.tensors.iter().map(|(name, _)| name).collect();
    let mut wanted: Vec<&String> = source.tensors.iter().map(|(name, _)| name).collect();
    names.sort();
    wanted.sort();
    assert_eq!(names, wanted);
    for (name, tensor) in &imported.tensors {
        let (_, want) = source.tensors.iter().find(|(other, _)| other == name).unwrap();
        assert!(tensor.kind() == source.kind.unwrap() && tensor.equal(want), "{name}");
    }
}

#[test]
fn what_is_written_is_read_back() {
    let (folder, target) = workspace();
    let sliding = |causal| BlockLayer { window: Some(6), causal };
    let full = |causal| BlockLayer { window: None, causal };
    let layers = [
        vec![full(false), full(false)],
        vec![sliding(true), full(false)],
        vec![sliding(false), full(false)],
        vec![sliding(true), sliding(true)],
        vec![full(true), full(true), full(true)],
    ];
    let scalings = [
        RopeScaling::Default,
        RopeScaling::Linear { factor: 2.5 },
        RopeScaling::Yarn {
            factor: 4.0,
            attention_factor: 1.25,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_max_position_embeddings: 64.0,
            truncate: true,
        },
    ];
    let mut number = 0;
    for drafter in drafters() {
        for (place, layers) in layers.iter().enumerate() {
            let mut drafter = drafter.clone();
            drafter.shape.layers = layers.clone();
            drafter.shape.mask_embedding = place == 2;
            drafter.shape.layer.rope.scaling = scalings[number % 3];
            number += 1;
            let kind = if number.is_multiple_of(2) { Kind::Float } else { Kind::BFloat16 };
            let source = source(&drafter, &target, kind);
            let [first, second] = ["first", "second"].map(|name| folder.path().join(format!("{name}-{number}")));
            // Some of them no engine serves: then nothing is written, and the reason is said.
            let report = match export(&source, "block", &first, None) {
                Ok(report) => report,
                Err(error) => {
                    let error = error.to_string();
                    assert!(error.contains("cannot be served as it was trained"), "{error}");
                    assert!(drafter.shape.mask_embedding, "{error}");
                    continue;
                }
            };
            assert_eq!(report.format, "block");
            let parameters: i64 = source.tensors.iter().map(|(_, tensor)| tensor.numel() as i64).sum();
            assert_eq!(report.parameters, parameters as u64);
            assert_eq!(first.join("mask_embedding.pt").is_file(), drafter.shape.mask_embedding);
            let imported = read(&first, Some(LAYERS)).unwrap();
            assert_eq!(imported.notes, Vec::<String>::new());
            same(&imported, &drafter, &source);
            let again = Source { tensors: imported.tensors, ..self::source(&drafter, &target, kind) };
            export(&again, "block", &second, None).unwrap();
            assert!(contents(&first) == contents(&second), "{}", drafter.algorithm);
        }
    }
    assert_eq!(litter(folder.path()), Vec::<PathBuf>::new());
}

/// Without `--dtype`, block drafters are written as engines run them.
#[test]
fn bfloat16_is_what_engines_run() {
    let (folder, target) = workspace();
    let out = folder.path().join("out");
    let source = Source { kind: None, ..source(&drafters()[0], &target, Kind::Float) };
    let report = export(&source, "block", &out, None).unwrap();
    assert_eq!((report.dtype.as_str(), config_of(&out)["torch_dtype"].as_str()), ("bfloat16", Some("bfloat16")));
    assert!(tensors_of(&out).iter().all(|(_, tensor)| tensor.kind() == Kind::BFloat16));
}

#[test]
fn the_speculators_layout_comes_back_too() {
    let (folder, target) = workspace();
    let sliding = |causal| vec![BlockLayer { window: Some(6), causal }; 2];
    for (number, drafter) in drafters().into_iter().enumerate() {
        for (place, layers) in [drafter.shape.layers.clone(), sliding(true), sliding(false)].into_iter().enumerate() {
            let mut drafter = drafter.clone();
            drafter.shape.layers = layers;
            let out = folder.path().join(format!("{number}-{place}"));
            let source = source(&drafter, &target, Kind::BFloat16);
            let result = export(&source, "block-speculators", &out, None);
            if ["lilicorr", "xpress", "domino"].contains(&drafter.algorithm) {
                let error = result.unwrap_err().to_string();
                assert!(error.contains("write --format block") && error.contains(drafter.algorithm), "{error}");
                continue;
            }
            if drafter.algorithm == "dspark" && drafter.head["markov_head_type"] != "vanilla" {
                let error = result.unwrap_err().to_string();
                assert!(error.contains("vllm: has the vanilla Markov head only"), "{error}");
                continue;
            }
            let report = result.unwrap();
            assert_eq!(engine_of(&report, Engine::Vllm).1, "", "{}", drafter.algorithm);
            assert!(engine_of(&report, Engine::Sglang).1.contains("does not read the speculators format"));
            let config = config_of(&out);
            // One more than the layer whose output it is.
            assert_eq!(config["aux_hidden_state_layer_ids"], json!([2, 4, 6]));
            assert_eq!(
                config["speculators_config"]["proposal_methods"][0]["speculative_tokens"],
                drafter.shape.slots()
            );
            assert!(config["transformer_layer_config"]["is_causal"].is_boolean());
            let imported = read(&out, Some(LAYERS)).unwrap();
            same(&imported, &drafter, &source);
            assert_eq!(imported.notes.is_empty(), place == 0, "{:?}", imported.notes);
            assert!(export(&source, "block-speculators", &out, None).is_ok());
        }
    }
}

// -- config.json -------------------------------------------------------------------------------------------------------

#[test]
fn configurations_have_the_keys_where_engines_look() {
    let (folder, _) = workspace();
    let mut found = BTreeMap::new();
    for (number, drafter) in drafters().into_iter().enumerate() {
        let out = written(&drafter, folder.path(), &number.to_string());
        found.insert(number, config_of(&out));
    }
    for config in found.values() {
        assert_eq!(config["model_type"], "qwen3");
        assert_eq!(config["num_target_layers"], LAYERS);
        assert_eq!(config["layer_types"], json!(["full_attention", "full_attention"]));
        assert_eq!(config["is_causal"], false);
        assert_eq!(
            (config["rope_theta"].as_f64(), config["rope_parameters"]["rope_theta"].as_f64()),
            (Some(1e4), Some(1e4))
        );
        assert_eq!(config["max_position_embeddings"], 256);
        // Two places that name layers could part.
        let ids = [config.pointer("/target_layer_ids"), config.pointer("/dflash_config/target_layer_ids")];
        assert_eq!(ids.iter().flatten().collect::<Vec<_>>(), vec![&&json!([1, 3, 5])]);
    }
    let architectures = |number: usize| found[&number]["architectures"][0].as_str().unwrap().to_owned();
    let wanted = [
        "DFlashDraftModel",
        "DFlash2DraftModel",
        "Qwen3DSparkModel",
        "Qwen3DSparkModel",
        "Qwen3DSparkModel",
        "LiLiCorrDraftModel",
        "LiLiCorrDraftModel",
        "Qwen3XPressModel",
        "DFlashDraftModel",
        "DFlashDraftModel",
    ];
    assert_eq!((0..10).map(architectures).collect::<Vec<_>>(), wanted);
    assert_eq!(
        found[&1]["dflash_config"],
        json!({"mask_token_id": 7, "target_layer_ids": [1, 3, 5], "conv_kernel_size": 2, "conv_group_size": 8,
            "selector_rank": 6, "selector_top_k": 4, "output_multiplier": 1.0})
    );
    // DSpark: all at the top; the number of drafts for the size of the block.
    let dspark = &found[&2];
    assert!(dspark.get("dflash_config").is_none());
    assert_eq!((&dspark["block_size"], &dspark["sample_from_anchor"]), (&json!(5), &json!(true)));
    assert_eq!((&found[&3]["block_size"], &found[&3]["sample_from_anchor"]), (&json!(4), &json!(false)));
    assert_eq!(found[&3]["confidence_head_with_markov"], false);
    assert_eq!(found[&4]["enable_confidence_head"], false);
    assert_eq!(found[&5]["dflash_config"]["lilicorr_logit_scale"], 8.0);
    assert_eq!(found[&6]["dflash_config"]["conv_kernel_size"], 2);
    let xpress = &found[&7];
    assert_eq!((&xpress["xpress_mlp_hidden"], &xpress["xpress_block_size"]), (&json!(12), &json!(5)));
    let domino = &found[&9];
    assert_eq!((&domino["dflash_config"]["shift_label"], &domino["emb_dim"]), (&json!(true), &json!(10)));
    assert_eq!(domino["dflash_config"]["projector_type"], "domino");
}

// -- what engines make of it -------------------------------------------------------------------------------------------

#[test]
fn each_engine_says_what_it_serves() {
    let (folder, _) = workspace();
    let missing = [
        (Engine::Vllm, "domino", "has no Domino"),
        (Engine::Sglang, "xpress", "has no XPress"),
        (Engine::LlamaCpp, "lilicorr", "has no LiLiCorr"),
        (Engine::LlamaCpp, "xpress", "has no XPress"),
        (Engine::LlamaCpp, "domino", "has no Domino"),
    ];
    for (number, drafter) in drafters().into_iter().enumerate() {
        let out = written(&drafter, folder.path(), &number.to_string());
        let report = check(&out).unwrap();
        for engine in Engine::ALL {
            let (_, problems) = engine_of(&report, engine);
            let known = missing.iter().find(|(other, name, _)| *other == engine && *name == drafter.algorithm);
            let is_other_markov = drafter.algorithm == "dspark" && drafter.head["markov_head_type"] != "vanilla";
            match known {
                Some((_, _, problem)) => assert!(problems.contains(problem), "{problems}"),
                None if is_other_markov && engine != Engine::Sglang => {
                    assert!(problems.contains("has the vanilla Markov head only"), "{problems}");
                }
                None => assert_eq!(problems, "", "{engine:?} {}", drafter.algorithm),
            }
            assert_eq!(check_for(&out, Some(engine)).is_ok(), problems.is_empty(), "{engine:?} {}", drafter.algorithm);
        }
    }
}

type Change = fn(&mut Drafter);

/// What is refused whoever asks, because no words of the layout say it or no engine serves it.
#[test]
fn traps_are_refused_with_their_reason() {
    let (folder, target) = workspace();
    let find = |name: &str| drafters().into_iter().find(|drafter| drafter.algorithm == name).unwrap();
    let cases: &[(&str, &str, Change, &[&str])] = &[
        ("dflash", "block", |it| it.shape.layout = Layout::Shift, &["layout shift", "sample_from_anchor"]),
        ("dflash2", "block", |it| it.shape.layout = Layout::Shift, &["layout shift"]),
        ("lilicorr", "block", |it| it.shape.layout = Layout::Shift, &["layout shift"]),
        ("xpress", "block", |it| it.shape.layout = Layout::Shift, &["layout shift"]),
        ("dflash", "block-speculators", |it| it.shape.layout = Layout::Shift, &["layout shift"]),
        (
            "dflash",
            "block-speculators",
            |it| it.shape.layers[0] = BlockLayer { window: Some(6), causal: true },
            &["one flag for all layers", "write --format block"],
        ),
        (
            "dflash",
            "block-speculators",
            |it| it.shape.layers.iter_mut().for_each(|layer| layer.causal = true),
            &["in speculators they never are"],
        ),
        ("dflash", "block", |it| it.shape.layers[0].causal = true, &["`is_causal` is one for all"]),
        (
            "dflash",
            "block",
            |it| it.shape.layers = [4, 6].map(|size| BlockLayer { window: Some(size), causal: true }).to_vec(),
            &["windows of [4, 6]"],
        ),
        ("dflash", "block", |it| it.shape.target_layer_ids = vec![3, 1, 5], &["do not ascend"]),
        (
            "dflash",
            "block",
            |it| it.shape.target_layer_ids = vec![1, 3, 7],
            &["vllm: hands over the last layer of the target (7) before its final norm", "sglang: hands over"],
        ),
        (
            "dflash",
            "block",
            |it| it.shape.layer.rope.scaling = RopeScaling::Dynamic { factor: 2.0 },
            &["vllm: stretches dynamic", "sglang: stretches dynamic"],
        ),
        ("lilicorr", "block", |it| it.head["lilicorr_candidate_topk"] = json!(6), &["a power of two up to 16"]),
        ("lilicorr", "block", |it| it.head["lilicorr_candidate_topk"] = json!(32), &["a power of two up to 16"]),
        (
            "dspark",
            "block",
            |it| it.shape.mask_embedding = true,
            &["vllm: reads no mask_embedding.pt", "sglang: reads no"],
        ),
        (
            "dspark",
            "block",
            |it| {
                it.head["anchor_row_writes_state"] = json!(true);
                it.shape.layout = Layout::FillIn;
            },
            &["engines begin with the first draft"],
        ),
        ("dflash2", "block-speculators", |it| it.head["output_multiplier"] = json!(2.0), &["have no place there"]),
        ("dflash", "block", |it| it.shape.mask_token_id = TOKENIZER_SIZE, &["`mask_token_id`", "below `vocab_size`"]),
        ("domino", "block", |it| it.head["pure_draft_prefix_len"] = json!(2), &["`pure_draft_prefix_len`: expected 1"]),
        ("dflash2", "block", |it| it.head["selector_top_k"] = json!(0), &["`selector_top_k`"]),
        ("lilicorr", "block", |it| it.head["lilicorr_num_heads"] = json!(5), &["`lilicorr_num_heads`", "divisor"]),
    ];
    for (number, (name, format, change, parts)) in cases.iter().enumerate() {
        let mut drafter = find(name);
        change(&mut drafter);
        let out = folder.path().join(format!("{number}"));
        let error = export(&source(&drafter, &target, Kind::Float), format, &out, None).unwrap_err().to_string();
        parts.iter().for_each(|part| assert!(error.contains(part), "{number} {name}: no `{part}` in {error}"));
        assert!(!out.exists());
    }
}

/// What one engine would serve otherwise.
#[test]
fn an_engine_is_not_given_what_it_would_serve_otherwise() {
    let (folder, target) = workspace();
    let find = |name: &str| drafters().into_iter().find(|drafter| drafter.algorithm == name).unwrap();
    let cases: &[(&str, Change, Engine, &str)] = &[
        ("dflash2", |it| it.shape.input_embedding_scale = 2.0, Engine::Sglang, "does not read `input_embedding_scale`"),
        (
            "dflash2",
            |it| it.head["input_embedding_scale"] = json!(2.0),
            Engine::Sglang,
            "does not read `input_embedding_",
        ),
        (
            "dflash",
            |it| it.shape.target_layer_ids = vec![-1, 3, 5],
            Engine::Sglang,
            "refuses -1, the target's embedding",
        ),
        ("dflash2", |it| it.shape.conv = None, Engine::Vllm, "needs `conv_kernel_size`"),
        (
            "dflash",
            |it| it.shape.conv = Some(Convolution { kernel_size: 2, group_size: 8 }),
            Engine::Vllm,
            "builds no convolutions for DFlashDraftModel",
        ),
        ("xpress", |it| it.shape.mask_embedding = true, Engine::Vllm, "reads no mask_embedding.pt"),
        (
            "dflash",
            |it| it.shape.layers[0] = BlockLayer { window: Some(6), causal: true },
            Engine::LlamaCpp,
            "one flag for all layers",
        ),
        ("dflash2", |it| it.head["selector_top_k"] = json!(8), Engine::LlamaCpp, "has no room for 8 candidates"),
    ];
    for (number, (name, change, engine, problem)) in cases.iter().enumerate() {
        let mut drafter = find(name);
        change(&mut drafter);
        assert!(
            export(
                &source(&drafter, &target, Kind::Float),
                "block",
                &folder.path().join(format!("any-{number}")),
                None
            )
            .is_ok()
                || *name == "xpress"
        );
        let out = folder.path().join(format!("{number}"));
        let error = export(&source(&drafter, &target, Kind::Float), "block", &out, Some(*engine)).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(problem) && error.contains(engine.name()), "{error}");
        assert!(!out.exists());
    }
}

#[test]
fn a_target_whose_class_gives_nothing_is_named() {
    let (folder, target) = workspace();
    let out = written(&drafters()[0], folder.path(), "out");
    let path = target.join("config.json");
    let mut config = config_of(&target);
    config["architectures"] = json!(["MixtralForCausalLM"]);
    fs::write(path, config.to_string()).unwrap();
    assert!(check(&out).is_ok());
    for (engine, part) in [(Engine::Sglang, "set_dflash_layers_to_capture"), (Engine::Vllm, "SupportsEagle3")] {
        let error = check_for(&out, Some(engine)).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("MixtralForCausalLM"), "{error}");
    }
}

// -- vocabularies ------------------------------------------------------------------------------------------------------

/// A smaller vocabulary takes its rows of the target's head along, which vLLM reads from the draft's file.
#[test]
fn a_smaller_vocabulary_takes_its_head_along() {
    let (folder, target) = workspace();
    let map = VocabMap::new((0..40).map(|id| id * 7 + id % 3).collect(), TOKENIZER_SIZE).unwrap();
    for (number, mut drafter) in drafters().into_iter().enumerate() {
        drafter.shape.draft_vocab_size = 40;
        let mut source = source(&drafter, &target, Kind::Float);
        source.tensors.push(("d2t".to_owned(), Tensor::from_slice(&map.d2t())));
        source.tensors.push(("t2d".to_owned(), Tensor::from_slice(&map.t2d())));
        let out = folder.path().join(format!("{number}"));
        let result = export(&source, "block", &out, None);
        match (drafter.algorithm, drafter.head["markov_head_type"].as_str()) {
            ("dflash", _) | ("dspark", Some("vanilla")) => {
                let report = result.unwrap();
                assert_eq!(engine_of(&report, Engine::Vllm).1, "");
                assert!(engine_of(&report, Engine::Sglang).1.contains("drops `d2t` in silence"));
                let imported = read(&out, None).unwrap();
                assert_eq!(imported.vocabulary.as_ref(), Some(&map));
                let head = tensors_of(&target).into_iter().find(|(name, _)| name == "lm_head.weight").unwrap().1;
                let rows = head.index_select(0, &Tensor::from_slice(map.target_ids()));
                assert!(imported.lm_head.unwrap().equal(&rows));
            }
            ("dspark", _) => {
                let error = result.unwrap_err().to_string();
                assert!(error.contains("vanilla") && error.contains("d2t"), "{error}");
            }
            _ => {
                let error = result.unwrap_err().to_string();
                assert!(error.contains("names 40 of 454 tokens"), "{error}");
            }
        }
    }
}

/// Nothing trained is left out of a folder unseen.
#[test]
fn a_checkpoint_with_other_tensors_is_refused() {
    let (folder, target) = workspace();
    let out = folder.path().join("out");
    let whole = source(&drafters()[2], &target, Kind::Float);
    let copy = |tensors: &[(String, Tensor)]| {
        tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect::<Vec<_>>()
    };
    let with = |tensors| Source {
        tensors,
        description: whole.description.clone(),
        ..source(&drafters()[0], &target, Kind::Float)
    };
    let mut more = copy(&whole.tensors);
    more.push(("markov_head.markov_w3.weight".to_owned(), Tensor::ones([2, 2], (Kind::Float, tch::Device::Cpu))));
    let mut less = copy(&whole.tensors);
    less.retain(|(name, _)| name != "hidden_norm.weight");
    let mut other = copy(&whole.tensors);
    other.iter_mut().filter(|(name, _)| name == "fc.weight").for_each(|(_, tensor)| *tensor = tensor.transpose(0, 1));
    for (tensors, part) in [
        (more, "`markov_head.markov_w3.weight` has no place in a dspark folder"),
        (less, "no tensor `hidden_norm.weight`"),
        (other, "`fc.weight`: expected shape [32, 96], got [96, 32]"),
    ] {
        let error = export(&with(tensors), "block", &out, None).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert!(!out.exists());
    }
    let mut strange = source(&drafters()[0], &target, Kind::Float);
    strange.description["draft"]["algorithm"] = json!("eagle3");
    let error = export(&strange, "block", &out, None).unwrap_err().to_string();
    assert!(error.contains("expected a block drafter, got eagle3"), "{error}");
}

// -- the program -------------------------------------------------------------------------------------------------------

/// Where one run ended another begins, through each layout.
#[test]
fn training_starts_from_an_export() {
    let mut workspace = Workspace::with_model(&json!({"num_hidden_layers": LAYERS}));
    workspace.configuration["draft"] =
        json!({"algorithm": "dflash", "num_layers": 2, "block_size": 4, "num_anchors": 8, "mask_token_id": 7});
    let first = workspace.train("first", &[]);
    for format in ["block", "block-speculators"] {
        let out = workspace.path(format);
        let arguments =
            ["export", "--json", "--format", format, "--dtype", "float32", "--engine", "vllm", "--checkpoint"];
        let report = json_of(specforge(&arguments).arg(workspace.path("first")).arg("--out").arg(&out));
        assert_eq!(report["engines"][1]["problems"], json!([]), "{report}");
        let init = format!("draft.init_from={}", out.display());
        let second = workspace.train(&format!("second-{format}"), &["--set", &init, "--set", "train.max_steps=1"]);
        assert!(first["end"] != first["start"]);
        assert_eq!(second["start"], first["end"], "{format}");
        let mut command = workspace.train_command("other", &["--set", &init, "--set", "draft.block_size=5"]);
        let output = output_of(&mut command);
        let message = stderr_of(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains("block_size: 4 there, 5 here (draft.block_size)"), "{message}");
    }
    let out = workspace.path("block").display().to_string();
    let output = output_of(&mut specforge(&["export", "--check", &out, "--engine", "sglang"]));
    assert!(output.status.success(), "{}", stderr_of(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for part in
        ["block layout", "sglang: serves it", "llama.cpp: serves it", "DFLASH", "captures what layers [1, 5] give"]
    {
        assert!(text.contains(part), "no `{part}` in {text}");
    }
}

/// An engine's report by name, for other tests.
pub fn problems(report: &ExportReport, engine: Engine) -> String {
    engine_of(report, engine).1
}
