//! Every family of the table, on a tiny random model each: what must hold of a target holds of all of them.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use specforge::data::{DocumentRef, PackedBatch};
use specforge::draft::{Gradients, StepKey};
use specforge::features::{FeatureSource, OnlineFeatures};
use specforge::models::parts::{Part, Passing};
use specforge::models::{
    self, ForwardInput, LayerKind, LayerWise, LogitRows, SharedTarget, TargetConfig, TargetModel, families,
};
use specforge::nn::{AttentionMask, noise};
use specforge::weights::write_tensors;
use tch::{Device, Kind, Tensor};

use crate::plugins::windowed;
use crate::quantised_targets::mxfp4;
use crate::target_rules::{self, VOCABULARY, near, tokens};

/// What engines build a model of a family by, as its config.json has it.
pub fn architecture(model_type: &str) -> &'static str {
    match model_type {
        "llama" => "LlamaForCausalLM",
        "mistral" => "MistralForCausalLM",
        "qwen2" => "Qwen2ForCausalLM",
        "qwen2_5_vl_text" | "qwen2_5_vl" => "Qwen2_5_VLForConditionalGeneration",
        "qwen3" => "Qwen3ForCausalLM",
        "qwen3_vl_text" => "Qwen3VLForConditionalGeneration",
        "phi3" => "Phi3ForCausalLM",
        "smollm3" => "SmolLM3ForCausalLM",
        "olmo2" => "Olmo2ForCausalLM",
        "olmo3" => "Olmo3ForCausalLM",
        "granite" => "GraniteForCausalLM",
        "gemma" => "GemmaForCausalLM",
        "gemma2" => "Gemma2ForCausalLM",
        "gemma3_text" => "Gemma3ForCausalLM",
        "mixtral" => "MixtralForCausalLM",
        "qwen2_moe" => "Qwen2MoeForCausalLM",
        "qwen3_moe" => "Qwen3MoeForCausalLM",
        "gpt_oss" => "GptOssForCausalLM",
        "llada" => "LLaDAModelLM",
        "Dream" => "DreamModel",
        other => panic!("add the class of `{other}` here"),
    }
}

/// A small model: keys that all configurations have, with those of a family.
pub fn config(model_type: &str) -> Value {
    let mut config = json!({
        "model_type": model_type, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY,
        "max_position_embeddings": 64, "rope_theta": 1000.0, "tie_word_embeddings": false,
    });
    let own = match model_type {
        "llama" => json!({}),
        "mistral" => json!({"sliding_window": 4}),
        "qwen2" | "qwen2_5_vl_text" | "qwen2_5_vl" => {
            json!({"use_sliding_window": true, "sliding_window": 4, "max_window_layers": 1,
                "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}})
        }
        "qwen3" => json!({"use_sliding_window": true, "sliding_window": 5, "max_window_layers": 2}),
        "qwen3_vl_text" => json!({"rope_scaling": {"rope_type": "mrope", "mrope_section": [2, 1, 1]}}),
        // Cached keys keep the frequencies they were made with: no text of the rules grows out of its context.
        "phi3" => json!({"sliding_window": 6, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 64,
            "max_position_embeddings": 128,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}}),
        "smollm3" => json!({"no_rope_layers": [1, 0, 1], "use_sliding_window": true, "sliding_window": 5}),
        "olmo2" => json!({}),
        "olmo3" => json!({"sliding_window": 4, "layer_types":
            ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        "granite" => json!({"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.3,
            "logits_scaling": 0.5}),
        "gemma" => json!({"tie_word_embeddings": true}),
        "gemma2" => json!({"sliding_window": 4, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0}),
        "gemma3_text" => json!({"sliding_window": 4, "sliding_window_pattern": 3, "rope_local_base_freq": 100.0}),
        "mixtral" => json!({"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7}),
        "qwen2_moe" => json!({"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20, "mlp_only_layers": [1], "use_sliding_window": true, "sliding_window": 5}),
        "qwen3_moe" => json!({"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
            "norm_topk_prob": true, "use_sliding_window": true, "sliding_window": 5}),
        "gpt_oss" => json!({"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 4,
            "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}}),
        "llada" => json!({"d_model": 24, "n_heads": 6, "n_kv_heads": 2, "n_layers": 3, "mlp_hidden_size": 32,
            "max_sequence_length": 64, "mask_token_id": VOCABULARY - 1, "weight_tying": false, "include_qkv_bias": true}),
        "Dream" => json!({"head_dim": null, "mask_token_id": VOCABULARY - 1}),
        other => panic!("add a small model of `{other}` here"),
    };
    for (key, value) in own.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    config
}

/// Every causal family that this program has of itself.
pub fn names() -> Vec<&'static str> {
    let names = all_names().into_iter();
    names.filter(|name| !DIFFUSION.contains(name)).collect()
}

/// Families of masked diffusion: what holds of them is shown in `diffusion`.
pub const DIFFUSION: [&str; 2] = ["llada", "Dream"];

/// Every family that this program has of itself.
fn all_names() -> Vec<&'static str> {
    let names = families().into_iter().map(|family| family.model_type);
    names.filter(|name| *name != windowed::FAMILY.model_type).collect()
}

/// A random tensor of a model, by its name.
pub fn random(name: &str, shape: &[i64]) -> Tensor {
    let stream = name.bytes().fold(7u64, |hash, byte| hash.wrapping_mul(131).wrapping_add(u64::from(byte)));
    let is_norm = name.contains("norm");
    let deviation = match shape {
        [_] => 0.2,
        [.., _] if name.contains("embed_tokens") => 0.5,
        [.., width] => 1.2 / (*width as f64).sqrt(),
        [] => 1.0,
    };
    noise::normal(shape, deviation, 5, stream) + if is_norm { 1.0 } else { 0.0 }
}

fn model(name: &str, kind: Kind) -> Box<dyn TargetModel> {
    let config = TargetConfig::from_value(&config(name)).unwrap();
    config.build(Device::Cpu, &mut |name, shape| Ok(random(name, shape).to_kind(kind))).unwrap()
}

/// Runs a rule on every family, and names the one that breaks it.
fn each(rule: impl Fn(&str)) {
    for name in names() {
        println!("{name}");
        rule(name);
    }
}

#[test]
fn packs_equal_documents() {
    each(|name| target_rules::a_pack_equals_its_documents_alone(model(name, Kind::Double).as_ref()));
}

#[test]
fn cached_pieces_equal_texts() {
    each(|name| target_rules::cached_pieces_equal_the_texts_alone(model(name, Kind::Double).as_ref()));
}

#[test]
fn nodes_of_trees_equal_their_paths() {
    each(|name| target_rules::every_node_of_a_tree_equals_its_path(model(name, Kind::Double).as_ref()));
}

#[test]
fn greedy_decoding_is_lossless_on_every_family() {
    // Text models of those that see images are the same ones under other names.
    for name in names().into_iter().filter(|name| !name.contains("_vl")) {
        println!("{name}");
        target_rules::greedy_decoding_is_lossless(model(name, Kind::Double).as_ref());
    }
}

/// A folder of the model, in float32.
fn folder(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let config = config(name);
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let shapes = TargetConfig::from_value(&config).unwrap().tensors().unwrap();
    let tensors: Vec<_> = shapes.into_iter().map(|(name, shape)| (name.clone(), random(&name, &shape))).collect();
    write_tensors(&folder.path().join("model.safetensors"), &tensors, &[]).unwrap();
    folder
}

/// The states of a pack layer by layer are those of the model to the last bit, whose tables are the ones loaded alone.
#[test]
fn layers_one_at_a_time_and_tables_alone_are_the_models() {
    each(|name| {
        let folder = folder(name);
        let target = models::load_target(folder.path(), Kind::Float, Device::Cpu).unwrap();
        let layers = target.info().num_layers();
        let ids = Tensor::from_slice(&tokens(13, 4)).unsqueeze(0);
        let positions: Vec<i64> = (0..9).chain(0..4).collect();
        let positions = Tensor::from_slice(&positions).unsqueeze(0);
        let mask = AttentionMask::Documents(vec![9, 4]);
        let capture: Vec<usize> = (0..=layers).collect();
        let input =
            ForwardInput { ids: &ids, positions: &positions, mask: &mask, capture: &capture, logits: LogitRows::All };
        let output = target.forward(&input, None).unwrap();

        let streamed = LayerWise::open(folder.path(), Kind::Float, Device::Cpu).unwrap();
        let (mut hidden, mut count) = (None::<Tensor>, 0);
        for part in Part::all(layers) {
            let passing = Passing { ids: &ids, positions: &positions, mask: &mask, hidden: hidden.as_ref() };
            let next = streamed.load(part).unwrap().forward(&passing).unwrap();
            if let Some(state) = part.state(layers) {
                assert!(next.equal(&output.hidden[state]), "{name}: state {state}");
                count += 1;
            }
            hidden = Some(next);
        }
        assert_eq!(count, layers + 1);

        let tables = models::load_tables(folder.path(), Kind::Float, Device::Cpu).unwrap();
        assert!(tables.embedding.look_up(&ids).unwrap().equal(&output.hidden[0]), "{name}");
        let logits = tables.head.logits(&output.hidden[layers].squeeze_dim(0));
        assert!(logits.equal(&output.logits.unwrap()), "{name}");
        assert_eq!((tables.info, streamed.head().unwrap().form()), (target.info().clone(), target.head().form()));
    });
}

/// One document of supervised tokens behind a short prompt.
fn batch() -> PackedBatch {
    PackedBatch {
        ids: tokens(14, 8),
        positions: (0..14).collect(),
        supervised: (0..14).map(|token| token > 2).collect(),
        lengths: vec![14],
        documents: vec![DocumentRef::new("a document".to_owned(), 40)],
    }
}

/// A step against the gradient of a draft lowers what it was the gradient of.
#[test]
fn drafts_learn_on_every_family() {
    let sections = [
        json!({"algorithm": "eagle3", "capture": [0, 1, 2], "ttt_steps": 2}),
        json!({"algorithm": "medusa", "num_heads": 2}),
    ];
    each(|name| {
        let target = SharedTarget::from(model(name, Kind::Double));
        let source = OnlineFeatures::new(target.clone());
        for section in &sections {
            let draft = target_rules::draft(&*target.in_use(), section);
            let (batch, key) = (batch(), StepKey { seed: 3, step: 2, total: 10 });
            let plan = draft.plan(&batch, key).unwrap();
            let features = source.features(Arc::new(batch), &draft.capture()).unwrap();
            let mut gradients = Gradients::zeros(draft.parameters()).unwrap();
            let before = draft
                .accumulate(&features, &plan, &plan.counts, &mut Gradients::new(&mut gradients))
                .unwrap()
                .objective
                .double_value(&[]);
            let norm = gradients.iter().map(|one| one.square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt();
            assert!(norm.is_finite() && norm > 1e-6, "{name}: {norm}");
            let _no_grad = tch::no_grad_guard();
            for (parameter, gradient) in draft.parameters().iter().zip(&gradients) {
                drop(parameter.value.shallow_clone().g_sub_(&(gradient * (1e-3 / norm))));
            }
            let after = draft.evaluate(&features, &plan, &plan.counts).unwrap().objective.double_value(&[]);
            assert!(after < before, "{name}, {section}: {before} became {after}");
        }
    });
}

/// A folder of a model that sees images: its text model is read as if it lay alone.
#[test]
fn text_models_of_larger_folders_are_read() {
    for (prefix, head) in [("language_model.model.", "language_model.lm_head."), ("model.language_model.", "lm_head.")]
    {
        let alone = folder("qwen3");
        let whole = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let wrapped = json!({"model_type": "something_with_images", "text_config": config("qwen3"),
            "vision_config": {"hidden_size": 7}});
        std::fs::write(whole.path().join("config.json"), wrapped.to_string()).unwrap();
        let renamed = |(name, tensor): (String, Tensor)| {
            let name = match name.strip_prefix("model.") {
                Some(rest) => format!("{prefix}{rest}"),
                None => name.replacen("lm_head.", head, 1),
            };
            (name, tensor)
        };
        let mut tensors: Vec<_> =
            crate::fixture::tensors_of(&alone.path().join("model.safetensors")).into_iter().map(renamed).collect();
        tensors.push(("vision_tower.norm.weight".to_owned(), Tensor::ones([7], (Kind::Float, Device::Cpu))));
        write_tensors(&whole.path().join("model.safetensors"), &tensors, &[]).unwrap();

        models::check(whole.path()).unwrap();
        let load = |folder: &tempfile::TempDir| models::load_target(folder.path(), Kind::Double, Device::Cpu).unwrap();
        let [got, want] = [&whole, &alone].map(|folder| target_rules::alone(load(folder).as_ref(), &tokens(9, 2)));
        near(&got, &want);
        assert_eq!(models::stored_kind(whole.path()).unwrap(), Kind::Float);
        assert_eq!(models::load_head(whole.path()).unwrap().vocab_size(), VOCABULARY);
        models::TargetIdentity::read(whole.path()).unwrap();
    }
}

/// What a configuration may not say, and the key that is named.
#[test]
fn configurations_that_cannot_be_run_are_refused_by_their_keys() {
    for (name, changes, word) in [
        ("mistral", json!({"sliding_window": 0}), "`sliding_window`"),
        ("mistral", json!({"hidden_act": "relu"}), "`hidden_act`"),
        ("mistral", json!({"num_key_value_heads": 4}), "`num_key_value_heads`"),
        ("mistral", json!({"hidden_size": "wide"}), "`hidden_size`"),
        ("mistral", json!({"intermediate_size": i64::MAX}), "`intermediate_size`"),
        ("qwen2", json!({"layer_types": ["full_attention"]}), "`layer_types`"),
        ("qwen3", json!({"layer_types": ["linear_attention", "full_attention", "full_attention"]}), "linear_attention"),
        ("phi3", json!({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}), "`long_factor`"),
        (
            "phi3",
            json!({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}),
            "`short_factor`",
        ),
        ("phi3", json!({"partial_rotary_factor": 0.1}), "`partial_rotary_factor`"),
        ("olmo2", json!({"rope_scaling": {"rope_type": "odd"}}), "`rope_type`"),
        ("smollm3", json!({"no_rope_layers": [1]}), "`no_rope_layers`"),
        ("granite", json!({"logits_scaling": 0}), "`logits_scaling`"),
        ("gemma", json!({"use_bidirectional_attention": true}), "`use_bidirectional_attention`"),
        ("gemma2", json!({"final_logit_softcapping": -1.0}), "`final_logit_softcapping`"),
        ("gemma3_text", json!({"attn_logit_softcapping": 50.0}), "`attn_logit_softcapping`"),
        ("mixtral", json!({"num_experts_per_tok": 6}), "`num_experts_per_tok`"),
        ("mixtral", json!({"num_local_experts": 1_000_000}), "`num_local_experts`"),
        ("qwen3_moe", json!({"moe_intermediate_size": -1}), "`moe_intermediate_size`"),
        ("gpt_oss", json!({"hidden_act": "gelu"}), "`hidden_act`"),
    ] {
        let mut values = config(name);
        changes.as_object().unwrap().iter().for_each(|(key, value)| values[key] = value.clone());
        let problem = TargetConfig::from_value(&values).unwrap_err();
        assert!(problem.contains(word), "{name} {changes}: {problem}");
    }
    let unknown = TargetConfig::from_value(&json!({"model_type": "x", "text_config": {"model_type": "y"}}));
    assert!(unknown.unwrap_err().contains("text_config: model_type `y` is not supported"));
}

/// Windows, parameters and what a draft takes after, of a few whose rules are their own.
#[test]
fn a_family_says_what_it_is() {
    let info = |name: &str| TargetConfig::from_value(&config(name)).unwrap().info().clone();
    use LayerKind::{Full, Window};
    assert_eq!(info("qwen2").layers, [Full, Window(4), Window(4)]);
    assert_eq!(info("gemma2").layers, [Window(4), Full, Window(4)]);
    assert_eq!(info("gemma3_text").layers, [Window(4), Window(4), Full]);
    assert_eq!(info("olmo3").layers, [Window(4), Full, Window(4)]);
    let mixture = info("qwen3_moe");
    // Three of five experts are idle on each of three layers.
    let idle = 3 * 3 * (3 * 24 * 12);
    assert_eq!(mixture.parameters.all - mixture.parameters.tables - mixture.parameters.a_token, idle);
    assert_eq!((mixture.widest, mixture.template.intermediate_size), (24, 24));
    assert_eq!(info("qwen2_moe").template.intermediate_size, 2 * 12 + 20);
    let gemma = info("gemma2");
    assert_eq!((gemma.embedding_scale, gemma.head.softcap), (24f64.sqrt(), Some(8.0)));
    assert_eq!((info("granite").head.scale, info("phi3").template.rope.head_dim), (2.0, 8));
}

/// First paragraph of a file's header: the name of a family, and what it is.
fn header(text: &str) -> (String, String) {
    let lines = text.lines().map_while(|line| line.strip_prefix("//! "));
    let paragraph = lines.collect::<Vec<_>>().join(" ");
    let (name, rest) = paragraph.split_once(": ").unwrap();
    (name.to_owned(), rest.trim_end_matches('.').to_owned())
}

/// The table of docs/targets.md, from the files of the families and their small models.
fn table() -> String {
    let mut rows = vec![
        "| family | `model_type` | what it is | windows | experts |".to_owned(),
        "| --- | --- | --- | --- | --- |".to_owned(),
    ];
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/models");
    let mut texts: Vec<String> = Vec::new();
    for entry in std::fs::read_dir(sources).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            texts.push(std::fs::read_to_string(path).unwrap());
        }
    }
    for name in all_names() {
        let says = |text: &&String| text.contains("decoder::family::<") && text.contains(&format!("(\"{name}\")"));
        let text = texts.iter().find(says).unwrap_or_else(|| panic!("no file has a family `{name}`"));
        let (family, what) = header(text);
        let config = TargetConfig::from_value(&config(name)).unwrap();
        let info = config.info();
        let windows = info.layers.iter().filter(|layer| matches!(layer, LayerKind::Window(_))).count();
        let windows = if windows > 0 { "yes" } else { "" };
        let numbers = info.parameters;
        let experts = if numbers.all - numbers.tables > numbers.a_token { "yes" } else { "" };
        rows.push(format!("| {family} | `{name}` | {what} | {windows} | {experts} |"));
    }
    rows.join("\n") + "\n"
}

/// `INSTA_UPDATE=always` writes the table anew, as it does snapshots.
#[test]
fn the_documentation_has_the_table_of_families() {
    const MARKS: [&str; 2] = ["<!-- families: written by a test -->\n", "<!-- end of families -->\n"];
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/targets.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(MARKS[0]).unwrap();
    let (got, after) = rest.split_once(MARKS[1]).unwrap();
    if std::env::var("INSTA_UPDATE").is_ok_and(|update| update == "always") {
        std::fs::write(&path, [before, MARKS[0], &table(), MARKS[1], after].concat()).unwrap();
        return;
    }
    assert!(got == table(), "docs/targets.md: expected\n{}", table());
}

/// Only layers without a window stretch their positions, whichever way the file says it.
#[test]
fn olmo_stretches_layers_without_a_window_alone() {
    let logits = |changes: Value| {
        let mut values = config("olmo3");
        values.as_object_mut().unwrap().retain(|key, _| !key.starts_with("rope"));
        changes.as_object().unwrap().iter().for_each(|(key, value)| values[key] = value.clone());
        let config = TargetConfig::from_value(&values).unwrap();
        let mut tensor = |name: &str, shape: &[i64]| Ok(random(name, shape).to_kind(Kind::Double));
        target_rules::alone(config.build(Device::Cpu, &mut tensor).unwrap().as_ref(), &tokens(12, 3))
    };
    let scaled = json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0});
    let plain = json!({"rope_type": "default", "rope_theta": 1000.0});
    let want = logits(json!({"rope_parameters": {"full_attention": scaled, "sliding_attention": plain}}));
    near(&logits(json!({"rope_theta": 1000.0, "rope_scaling": {"type": "linear", "factor": 4.0}})), &want);
    near(&logits(json!({"rope_parameters": scaled})), &want);
    let everywhere = logits(json!({"rope_parameters": {"full_attention": scaled, "sliding_attention": scaled}}));
    assert!((everywhere - &want).abs().max().double_value(&[]) > 1e-3);
}

/// Experts in MXFP4 as gpt-oss has them, blocks row by row, are the plain ones that lie column by column.
#[test]
fn experts_of_a_few_bits_are_the_numbers_they_stand_for() {
    let mut values = config("gpt_oss");
    values["hidden_size"] = 32.into();
    let (mut stored, mut plain) = (Vec::new(), Vec::new());
    for (name, shape) in TargetConfig::from_value(&values).unwrap().tensors().unwrap() {
        let value = random(&name, &shape);
        if !name.ends_with("_proj") {
            stored.push((name.clone(), value.shallow_clone()));
            plain.push((name, value));
            continue;
        }
        let [experts, input, out] = <[i64; 3]>::try_from(shape).unwrap();
        let rows = value.transpose(1, 2).reshape([experts * out, input]);
        let (tensors, numbers) = mxfp4(&name, &rows);
        for (tensor, (end, width)) in tensors.into_iter().zip([("blocks", 16), ("scales", 1)]) {
            let shape = [experts, out, input / 32, width];
            let shape = if width == 1 { &shape[..3] } else { &shape[..] };
            stored.push((format!("{name}_{end}"), tensor.1.view(shape)));
        }
        plain.push((name, numbers.view([experts, out, input]).transpose(1, 2).contiguous()));
    }
    let logits = |tensors: &[(String, Tensor)], quantised: bool| {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut values = values.clone();
        if quantised {
            values["quantization_config"] = json!({"quant_method": "mxfp4"});
        }
        std::fs::write(folder.path().join("config.json"), values.to_string()).unwrap();
        write_tensors(&folder.path().join("model.safetensors"), tensors, &[]).unwrap();
        let target = models::load_target(folder.path(), Kind::Double, Device::Cpu).unwrap();
        target_rules::alone(target.as_ref(), &tokens(9, 1))
    };
    near(&logits(&stored, true), &logits(&plain, false));
}
