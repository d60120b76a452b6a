//! LLaDA: a Llama without the causal mask, which fills masked tokens in; its names of keys and tensors are its own.
//!
//! Reference: `llada/model/modeling_llada.py` of NVlabs/Fast-dLLM, commit 24cc59e75f20a6384bae8c905965bb090b96388e, and
//! `GUIDELINES.md` of ML-GSAI/LLaDA, commit b7e6c3565f194352da44b38dd12b6970597309f3.

use std::rc::Rc;

use serde_json::{Value, json};

use super::decoder::names::{EMBEDDING, HEAD, NORM, Spelling};
use super::decoder::{self, DecoderFamily, Design, GatedDesign, LayerDesign, Sizes, mlp};
use super::keys::Keys;
use super::rope_keys::RopeDesign;
use super::{Family, Infilling, LayerShape, MaskedDiffusion, limits};
use crate::nn::{RopeConfig, RopeScaling};

/// Row of the table of families.
pub const FAMILY: Family = Family { table_names: &[TABLE, OUTPUT], ..decoder::family::<Llada>("llada") };

/// Its name of the token embedding.
const TABLE: &str = "model.transformer.wte.weight";
/// Its name of the vocabulary projection.
const OUTPUT: &str = "model.transformer.ff_out.weight";

/// Keys that no number depends on, beside those of all families.
const HARMLESS: [&str; 13] = [
    "alibi_bias_max",
    "attention_layer_norm_with_affine",
    "bias_for_layer_norm",
    "embedding_dropout",
    "flash_attention",
    "init_cutoff_factor",
    "init_device",
    "init_fn",
    "init_std",
    "layer_norm_with_affine",
    "precision",
    "residual_dropout",
    "rope_full_precision",
];

/// The family.
#[derive(Debug)]
pub enum Llada {}

impl DecoderFamily for Llada {
    fn design(keys: &Keys<'_>) -> Result<Design, String> {
        keys.know(HARMLESS);
        keys.know(["mlp_ratio"]);
        plain_arithmetic(keys)?;
        let sizes = sizes(keys)?;
        let width = match keys.maybe_whole("mlp_hidden_size", None)? {
            Some(width) => width,
            None => {
                let ratio = keys.whole_or("mlp_ratio", 4)?;
                limits::within(&[("mlp_ratio", ratio, limits::WIDEST / sizes.hidden_size)])?;
                ratio * sizes.hidden_size
            }
        };
        limits::within(&[("mlp_hidden_size", width, limits::WIDEST)])?;
        let mlp = GatedDesign::new(sizes.hidden_size, width, mlp::activation(keys, "activation_type", "silu")?);
        let rope = RopeConfig {
            theta: keys.positive_or("rope_theta", 10_000.0)?,
            head_dim: sizes.head_dim,
            max_position_embeddings: sizes.max_position_embeddings,
            scaling: RopeScaling::Default,
        };
        let mut attention = sizes.attention();
        attention.bias = keys.flag_or("include_qkv_bias", false)?;
        let layer = LayerDesign::new(attention, Rc::new(mlp));
        let mask = keys.whole("mask_token_id")?;
        Ok(Design {
            spelling: Spelling { tensor: own_name, tied: "weight_tying" },
            diffusion: Some(MaskedDiffusion { mask, shift: false }),
            ..Design::new(sizes, &layer, RopeDesign::Plain(rope))
        })
    }
}

/// config.json of a model of plain layers.
pub(super) fn written(model: &Infilling) -> Value {
    let LayerShape { intermediate_size, num_attention_heads, num_key_value_heads, rms_norm_eps, rope, .. } =
        model.layer;
    json!({
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rms_norm_eps": rms_norm_eps,
        "d_model": model.hidden_size,
        "n_layers": model.num_layers,
        "n_heads": num_attention_heads,
        "n_kv_heads": num_key_value_heads,
        "mlp_hidden_size": intermediate_size,
        "vocab_size": model.vocab_size,
        "embedding_size": model.vocab_size,
        "max_sequence_length": rope.max_position_embeddings,
        "rope": true,
        "rope_theta": rope.theta,
        "alibi": false,
        "include_bias": false,
        "include_qkv_bias": false,
        "weight_tying": model.tied,
        "mask_token_id": model.diffusion.mask,
    })
}

/// Refuses what its configuration can say and no published model has.
fn plain_arithmetic(keys: &Keys<'_>) -> Result<(), String> {
    let no = json!(false);
    for key in ["alibi", "attention_layer_norm", "include_bias", "input_emb_norm", "scale_logits"] {
        keys.only(key, &no)?;
    }
    keys.only("clip_qkv", &Value::Null)?;
    keys.only("block_type", &json!("llama"))?;
    keys.only("block_group_size", &json!(1))?;
    keys.only("layer_norm_type", &json!("rms"))?;
    match keys.flag_or("rope", true)? {
        true => Ok(()),
        false => Err("`rope`: only true is supported, got false".to_owned()),
    }
}

fn sizes(keys: &Keys<'_>) -> Result<Sizes, String> {
    let hidden_size = keys.whole("d_model")?;
    let heads = keys.whole("n_heads")?;
    let layers = keys.whole("n_layers")?;
    let vocabulary = keys.whole("vocab_size")?;
    let rows = keys.whole_or("embedding_size", vocabulary)?;
    if rows < vocabulary {
        return Err(format!("`embedding_size`: expected at least `vocab_size` ({vocabulary}), got {rows}"));
    }
    let one_group = keys.flag_or("multi_query_attention", false)?;
    let groups = keys.maybe_whole("n_kv_heads", None)?.unwrap_or(if one_group { 1 } else { heads });
    let max_position_embeddings = keys.whole_or("max_sequence_length", 1024)?;
    limits::within(&[
        ("d_model", hidden_size, limits::MOST_HIDDEN),
        ("n_layers", layers, limits::MOST_LAYERS),
        ("n_heads", heads, limits::MOST_HEADS),
        ("n_kv_heads", groups, limits::MOST_HEADS),
        ("vocab_size", vocabulary, limits::MOST_TOKENS),
        ("embedding_size", rows, limits::MOST_TOKENS),
        ("max_sequence_length", max_position_embeddings, limits::LONGEST_CONTEXT),
    ])?;
    if hidden_size % heads != 0 {
        return Err(format!("`n_heads`: expected a divisor of `d_model` ({hidden_size}), got {heads}"));
    }
    if heads % groups != 0 {
        return Err(format!("`n_kv_heads`: expected a divisor of `n_heads` ({heads}), got {groups}"));
    }
    Ok(Sizes {
        hidden_size,
        // Logits have a number for every row of the embedding.
        vocab_size: rows,
        max_position_embeddings,
        layers: usize::try_from(layers).unwrap_or(0),
        heads,
        groups,
        head_dim: hidden_size / heads,
        epsilon: keys.number_or("rms_norm_eps", 1e-5)?,
        tied: keys.flag_or("weight_tying", true)?,
    })
}

/// Its name of a tensor.
pub(super) fn own_name(usual: &str) -> String {
    match usual {
        EMBEDDING => return TABLE.to_owned(),
        HEAD => return OUTPUT.to_owned(),
        NORM => return "model.transformer.ln_f.weight".to_owned(),
        _ => {}
    }
    const PARTS: [(&str, &str); 6] = [
        ("self_attn.o_proj.", "attn_out."),
        ("self_attn.", ""),
        ("mlp.gate_proj.", "ff_proj."),
        ("mlp.up_proj.", "up_proj."),
        ("mlp.down_proj.", "ff_out."),
        ("post_attention_layernorm.", "ff_norm."),
    ];
    let of_layer = usual.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    let Some((layer, part)) = of_layer else { return usual.to_owned() };
    let renamed = PARTS.iter().find_map(|(from, to)| Some(format!("{to}{}", part.strip_prefix(from)?)));
    let part = renamed.unwrap_or_else(|| part.replacen("input_layernorm.", "attn_norm.", 1));
    format!("model.transformer.blocks.{layer}.{part}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::TargetConfig;

    /// What GSAI-ML/LLaDA-8B-Instruct's config.json says.
    fn published() -> Value {
        let text = r#"{
            "model_type": "llada", "activation_type": "silu", "alibi": false, "alibi_bias_max": 8.0,
            "attention_dropout": 0.0, "attention_layer_norm": false, "attention_layer_norm_with_affine": true,
            "bias_for_layer_norm": false, "block_group_size": 1, "block_type": "llama", "d_model": 4096,
            "embedding_dropout": 0.0, "embedding_size": 126464, "eos_token_id": 126081, "flash_attention": false,
            "include_bias": false, "include_qkv_bias": false, "init_cutoff_factor": null, "init_device": "meta",
            "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": false, "layer_norm_type": "rms",
            "layer_norm_with_affine": true, "mask_token_id": 126336, "max_sequence_length": 4096,
            "mlp_hidden_size": 12288, "mlp_ratio": 4, "multi_query_attention": null, "n_heads": 32, "n_kv_heads": 32,
            "n_layers": 32, "pad_token_id": 126081, "precision": "amp_bf16", "residual_dropout": 0.0,
            "rms_norm_eps": 1e-5, "rope": true, "rope_full_precision": true, "rope_theta": 500000.0,
            "scale_logits": false, "use_cache": false, "vocab_size": 126464, "weight_tying": false
        }"#;
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn the_published_model_is_what_its_configuration_says() {
        let values = published();
        let keys = Keys::new(&values);
        let design = Llada::design(&keys).unwrap();
        assert_eq!(keys.strange(), Vec::<String>::new());
        let config = TargetConfig::from_value(&values).unwrap();
        let info = config.info();
        assert_eq!(info.diffusion, Some(MaskedDiffusion { mask: 126336, shift: false }));
        // d (V + V + 1) + n (4 d^2 + 3 d w + 2 d)
        let (d, v, w) = (4096u64, 126464, 12288);
        assert_eq!(info.parameters.all, d * (2 * v + 1) + 32 * (4 * d * d + 3 * d * w + 2 * d));
        assert_eq!((design.sizes.groups, design.sizes.head_dim), (32, 128));
        let names: Vec<String> = config.tensors().unwrap().into_iter().map(|(name, _)| name).collect();
        for name in [
            "wte.weight",
            "ln_f.weight",
            "ff_out.weight",
            "blocks.31.attn_norm.weight",
            "blocks.0.q_proj.weight",
            "blocks.0.attn_out.weight",
            "blocks.0.ff_norm.weight",
            "blocks.0.ff_proj.weight",
            "blocks.0.up_proj.weight",
            "blocks.0.ff_out.weight",
        ] {
            assert!(names.contains(&format!("model.transformer.{name}")), "{name}: {names:?}");
        }
    }

    #[test]
    fn what_no_published_model_has_is_refused_by_its_key() {
        for (change, word) in [
            (json!({"mask_token_id": null}), "`mask_token_id`"),
            (json!({"mask_token_id": 126464}), "`mask_token_id`"),
            (json!({"alibi": true}), "`alibi`"),
            (json!({"rope": false}), "`rope`"),
            (json!({"block_type": "sequential"}), "`block_type`"),
            (json!({"layer_norm_type": "default"}), "`layer_norm_type`"),
            (json!({"clip_qkv": 8.0}), "`clip_qkv`"),
            (json!({"embedding_size": 1000}), "`embedding_size`"),
            (json!({"n_kv_heads": 5}), "`n_kv_heads`"),
            (json!({"n_heads": 33}), "`n_heads`"),
            (json!({"n_layers": -1}), "`n_layers`"),
            (json!({"mlp_hidden_size": i64::MAX}), "`mlp_hidden_size`"),
            (json!({"mlp_hidden_size": null, "mlp_ratio": i64::MAX}), "`mlp_ratio`"),
            (json!({"block_group_size": 2}), "`block_group_size`"),
            (json!({"rope_theta": 0.0}), "`rope_theta`"),
        ] {
            let mut values = published();
            change.as_object().unwrap().iter().for_each(|(key, value)| values[key] = value.clone());
            let problem = TargetConfig::from_value(&values).unwrap_err();
            assert!(problem.contains(word), "{change}: {problem}");
        }
    }
}
