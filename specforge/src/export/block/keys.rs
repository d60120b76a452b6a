//! The keys of a drafter's config.json, wherever they stand: at the top, in `dflash_config` or in what speculators nests.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::head::MarkovKind;
use super::method::Layout;
use crate::draft::block::config::LayerType;

/// What a drafter's config.json may say beside the keys of any Qwen3. Null stands for nothing.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Keys {
    pub(super) model_type: Option<String>,
    // -- the block
    pub(super) block_size: Option<i64>,
    pub(super) dspark_block_size: Option<i64>,
    pub(super) xpress_block_size: Option<i64>,
    pub(super) sample_from_anchor: Option<bool>,
    pub(super) dspark_bonus_anchor: Option<bool>,
    pub(super) shift_label: Option<bool>,
    pub(super) mask_token_id: Option<i64>,
    pub(super) dspark_noise_token_id: Option<i64>,
    pub(super) mask_token: Option<String>,
    pub(super) input_embedding_scale: Option<f64>,
    // -- the target's layers
    pub(super) num_target_layers: Option<usize>,
    pub(super) target_layer_ids: Option<Vec<i64>>,
    pub(super) layer_ids: Option<Vec<i64>>,
    pub(super) dspark_target_layer_ids: Option<Vec<i64>>,
    pub(super) eagle_aux_hidden_state_layer_ids: Option<Vec<i64>>,
    pub(super) aux_hidden_state_layer_ids: Option<Vec<i64>>,
    // -- what layers see
    pub(super) layer_types: Option<Vec<LayerType>>,
    pub(super) sliding_window: Option<i64>,
    pub(super) use_sliding_window: Option<bool>,
    pub(super) use_swa: Option<bool>,
    pub(super) swa_window_size: Option<i64>,
    pub(super) is_causal: Option<bool>,
    pub(super) causal: Option<bool>,
    pub(super) sliding_window_non_causal: Option<bool>,
    // -- vocabularies
    pub(super) draft_vocab_size: Option<i64>,
    // -- heads
    pub(super) conv_kernel_size: Option<i64>,
    pub(super) conv_group_size: Option<i64>,
    pub(super) selector_rank: Option<i64>,
    pub(super) selector_top_k: Option<i64>,
    pub(super) output_multiplier: Option<f64>,
    pub(super) final_logit_softcapping: Option<f64>,
    pub(super) markov_rank: Option<i64>,
    pub(super) markov_head_type: Option<MarkovKind>,
    pub(super) enable_confidence_head: Option<bool>,
    pub(super) use_confidence_head: Option<bool>,
    pub(super) confidence_head_with_markov: Option<bool>,
    pub(super) lilicorr_enabled: Option<bool>,
    pub(super) xpress_rank: Option<i64>,
    pub(super) xpress_mlp_hidden: Option<i64>,
    pub(super) xpress_mlp_ratio: Option<i64>,
    pub(super) xpress_num_passes: Option<i64>,
    pub(super) num_jacobi_passes: Option<i64>,
    pub(super) xpress_topc: Option<i64>,
    pub(super) gru_hidden_dim: Option<i64>,
    pub(super) emb_dim: Option<i64>,
    pub(super) pure_draft_prefix_len: Option<i64>,
    // -- what no draft of this program is
    pub(super) target_hidden_size: Option<i64>,
    pub(super) attention_bias: Option<bool>,
    pub(super) mlp_bias: Option<bool>,
    pub(super) attention_sink_bias: Option<bool>,
    pub(super) add_swa_attention_sink_bias: Option<bool>,
    pub(super) use_gemma_norm: Option<bool>,
    pub(super) use_aux_hidden_state: Option<bool>,
    pub(super) is_neox_style: Option<bool>,
    pub(super) rope_is_neox_style: Option<bool>,
    pub(super) partial_rotary_factor: Option<f64>,
    pub(super) logit_scale: Option<f64>,
    pub(super) attention_value_scale: Option<f64>,
}

/// Keys that are read here, or decide nothing about the drafter's network. Every other one is named to the user.
const KNOWN: &[&str] = &[
    "block_size",
    "dspark_block_size",
    "xpress_block_size",
    "sample_from_anchor",
    "dspark_bonus_anchor",
    "shift_label",
    "mask_token_id",
    "dspark_noise_token_id",
    "mask_token",
    "input_embedding_scale",
    "num_target_layers",
    "target_layer_ids",
    "layer_ids",
    "dspark_target_layer_ids",
    "eagle_aux_hidden_state_layer_ids",
    "aux_hidden_state_layer_ids",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "use_swa",
    "swa_window_size",
    "is_causal",
    "causal",
    "sliding_window_non_causal",
    "draft_vocab_size",
    "conv_kernel_size",
    "conv_group_size",
    "selector_rank",
    "selector_top_k",
    "output_multiplier",
    "final_logit_softcapping",
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "use_confidence_head",
    "confidence_head_with_markov",
    "lilicorr_enabled",
    "lilicorr_candidate_topk",
    "lilicorr_hidden_size",
    "lilicorr_num_layers",
    "lilicorr_num_heads",
    "lilicorr_mlp_ratio",
    "lilicorr_factor_dim",
    "lilicorr_vector_eps",
    "lilicorr_logit_scale",
    "xpress_rank",
    "xpress_mlp_hidden",
    "xpress_mlp_ratio",
    "xpress_num_passes",
    "num_jacobi_passes",
    "xpress_topc",
    "xpress_compile_head",
    "gru_hidden_dim",
    "emb_dim",
    "pure_draft_prefix_len",
    "projector_type",
    "target_hidden_size",
    "attention_bias",
    "mlp_bias",
    "attention_sink_bias",
    "add_swa_attention_sink_bias",
    "use_gemma_norm",
    "use_aux_hidden_state",
    "is_neox_style",
    "rope_is_neox_style",
    "partial_rotary_factor",
    "logit_scale",
    "attention_value_scale",
    // Any Qwen3's.
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "max_window_layers",
    "tie_word_embeddings",
    "quantization_config",
    "compression_config",
    // Hugging Face's own, and names.
    "architectures",
    "model_type",
    "auto_map",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "initializer_range",
    "is_encoder_decoder",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "transformers_version",
    "use_cache",
    "_name_or_path",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "base_model_name_or_path",
    "dflash_config",
    "dspark_config",
    "eagle_config",
    "transformer_layer_config",
    "speculators_model_type",
    "speculators_version",
    "speculators_config",
    "specforge",
];

/// Sections whose keys count like those at the top.
const SECTIONS: [&str; 3] = ["dflash_config", "dspark_config", "eagle_config"];

/// Keys that a section has for itself.
const OF_A_SECTION: [&str; 6] =
    ["architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "specforge"];

/// Where keys stand: engines look for some of them in one place only.
#[derive(Debug, Clone, Default)]
pub(super) struct Places {
    top: BTreeSet<String>,
    sections: BTreeSet<String>,
}

impl Places {
    /// Whether a key is there, and not at the top.
    pub(super) fn only_in_section(&self, key: &str) -> bool {
        self.sections.contains(key) && !self.top.contains(key)
    }

    /// Whether a key is there, and in no section.
    pub(super) fn only_at_top(&self, key: &str) -> bool {
        self.top.contains(key) && !self.sections.contains(key)
    }
}

/// A config.json with all keys of one drafter in one place.
pub(super) struct Merged {
    pub(super) values: Map<String, Value>,
    /// Which of them stand at the top, and which in a section.
    pub(super) places: Places,
    /// Keys that nobody knows.
    pub(super) strange: Vec<String>,
}

/// Gathers the keys. One that stands in two places must say the same in both.
pub(super) fn merged(config: &Value, layout: Layout) -> Result<Merged, String> {
    let Some(top) = config.as_object() else { return Err("expected an object".to_owned()) };
    let mut values = Map::new();
    let mut places = Places::default();
    let sections = match layout {
        Layout::Zlab => &SECTIONS[..],
        Layout::Speculators => &["transformer_layer_config"][..],
    };
    values.extend(top.iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.clone(), value.clone())));
    places.top.extend(values.keys().cloned());
    for section in sections {
        let keys = match top.get(*section) {
            None | Some(Value::Null) if layout == Layout::Zlab => continue,
            Some(Value::Object(keys)) => keys,
            _ => return Err(format!("`{section}`: expected an object")),
        };
        for (key, value) in keys.iter().filter(|(_, value)| !value.is_null()) {
            places.sections.insert(key.clone());
            match values.get(key) {
                Some(_) if OF_A_SECTION.contains(&key.as_str()) => {}
                Some(other) if !same(other, value) => {
                    return Err(format!("`{key}`: {other} at the top, {value} in `{section}`: expected the same"));
                }
                Some(_) => {}
                None => {
                    values.insert(key.clone(), value.clone());
                }
            }
        }
        // What describes the layers there is what engines build.
        if layout == Layout::Speculators
            && let Some(kind) = keys.get("model_type")
        {
            values.insert("model_type".to_owned(), kind.clone());
        }
    }
    let strange = values.keys().filter(|key| !KNOWN.contains(&key.as_str())).cloned().collect();
    Ok(Merged { values, places, strange })
}

/// Whether two values say the same; 2 and 2.0 do.
fn same(left: &Value, right: &Value) -> bool {
    left == right || left.as_f64().is_some_and(|left| right.as_f64() == Some(left))
}
