//! config.json of both layouts: written from a draft's shape, and read back into one.
//!
//! | key | who reads it |
//! |---|---|
//! | `eagle_aux_hidden_state_layer_ids` | vLLM: captured layer `k` is what layer `k` reads |
//! | the key of that name in `eagle_config` | SGLang: what layer `k` gives, one less |
//! | `norm_output` | engines: the next step's feature is the normed output. SpecForge: the head reads the normed output |
//! | `norm_feedback`, `specforge` | this program: what the engines have no key for |

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::{ARCHITECTURE, CONFIG_FILE, Layout, Source};
use crate::draft::eagle3::Eagle3Shape;
use crate::error::{Error, Result};
use crate::gguf::packed;
use crate::models::plain_model;
use crate::nn::{RopeConfig, RopeScaling};
use crate::weights::quantised;

/// Tokens a chain proposes where nobody says otherwise, as speculators' own converter writes it.
const SPECULATIVE_TOKENS: u32 = 3;

// -- writing ---------------------------------------------------------------------------------------------------------

/// config.json of the raw layout.
pub(in crate::export) fn raw(shape: &Eagle3Shape, source: &Source, dtype: &str) -> Value {
    let outputs: Vec<i64> = shape.capture.iter().map(|&index| index as i64 - 1).collect();
    let mut values = object(json!({"architectures": [ARCHITECTURE]}));
    values.append(&mut transformer(shape, &source.target, dtype));
    values.append(&mut object(json!({
        "draft_vocab_size": shape.draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": shape.capture,
        "eagle_config": {"use_aux_hidden_state": true, "eagle_aux_hidden_state_layer_ids": outputs},
        "fc_norm": shape.fc_norm,
        "norm_before_fc": shape.norm_before_fc,
        "norm_before_residual": shape.norm_before_residual,
    })));
    // SGLang takes a key without a value for another width and then keeps an embedding nobody loaded.
    if shape.target_hidden_size != shape.hidden_size {
        values.insert("target_hidden_size".to_owned(), json!(shape.target_hidden_size));
    }
    // Only where it is on: trainers give `norm_output` another meaning, and another default.
    if shape.norm_feedback {
        values.append(&mut object(json!({"norm_output": true, "norm_feedback": true})));
    }
    values.insert("base_model_name_or_path".to_owned(), json!(source.target_words()));
    values.append(&mut own_section(shape));
    Value::Object(values)
}

/// config.json of the speculators layout.
pub(in crate::export) fn speculators(shape: &Eagle3Shape, source: &Source, dtype: &str) -> Value {
    let target = &source.target;
    let architectures = Target::read(Some(target)).and_then(|target| target.architectures);
    let other_width = (shape.target_hidden_size != shape.hidden_size).then_some(shape.target_hidden_size);
    let mut values = object(json!({
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "torch_dtype": dtype,
        "draft_vocab_size": shape.draft_vocab_size,
        "norm_before_residual": shape.norm_before_residual,
        "norm_before_fc": shape.norm_before_fc,
        "fc_norm": shape.fc_norm,
        "norm_output": shape.norm_feedback,
        "embed_requires_grad": other_width.is_some(),
        "target_hidden_size": other_width,
        "eagle_aux_hidden_state_layer_ids": shape.capture,
        "transformer_layer_config": transformer(shape, target, dtype),
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{
                "proposal_type": "greedy",
                "speculative_tokens": SPECULATIVE_TOKENS,
                "accept_tolerance": 0.0,
                "verifier_accept_k": 1,
            }],
            "default_proposal_method": "greedy",
            "verifier": {
                "name_or_path": source.target_words(),
                "architectures": architectures.unwrap_or_else(|| json!(["LlamaForCausalLM"])),
            },
        },
    }));
    values.append(&mut own_section(shape));
    Value::Object(values)
}

/// What any Llama's config.json says, and the number of captured layers.
fn transformer(shape: &Eagle3Shape, target: &Path, dtype: &str) -> Map<String, Value> {
    let layer = &shape.layer;
    // A shorter length than the target's is what vLLM sizes its rotary tables by: it fails on the first longer text.
    let target_length = Target::read(Some(target)).and_then(|target| target.max_position_embeddings);
    let length = target_length.unwrap_or(0).max(shape.max_position_embeddings);
    // Dynamic scaling depends on the length itself.
    let dynamic = matches!(layer.rope.scaling, RopeScaling::Dynamic { .. });
    let rope = rope_parameters(&layer.rope);
    let mut values = object(json!({
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": layer.num_attention_heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "head_dim": layer.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": if dynamic { layer.rope.max_position_embeddings } else { length },
        "hidden_act": "silu",
        "rms_norm_eps": layer.rms_norm_eps,
        "rope_theta": layer.rope.theta,
        "rope_parameters": rope,
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": false,
        "use_cache": true,
        "torch_dtype": dtype,
        "num_aux_hidden_states": shape.capture.len(),
    }));
    if layer.rope.scaling != RopeScaling::Default {
        let mut older = rope;
        older.shift_remove("rope_theta");
        values.insert("rope_scaling".to_owned(), Value::Object(older));
    }
    values
}

/// The rotary variant as Hugging Face spells it.
pub(in crate::export) fn rope_parameters(rope: &RopeConfig) -> Map<String, Value> {
    let variant = match rope.scaling {
        RopeScaling::Default => json!({"rope_type": "default"}),
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Dynamic { factor } => json!({"rope_type": "dynamic", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": whole(original_max_position_embeddings),
        }),
        RopeScaling::Yarn {
            factor,
            attention_factor,
            beta_fast,
            beta_slow,
            original_max_position_embeddings,
            truncate,
        } => json!({
            "rope_type": "yarn",
            "factor": factor,
            // vLLM reads the first, SGLang multiplies YaRN's own value by the second.
            "attention_factor": attention_factor,
            "attn_factor": attention_factor / (0.1 * factor.max(1.0).ln() + 1.0),
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "original_max_position_embeddings": whole(original_max_position_embeddings),
            "truncate": truncate,
        }),
    };
    let mut values = object(json!({"rope_theta": rope.theta}));
    values.append(&mut object(variant));
    values
}

/// A number without a fraction is written without one: engines use it as a size.
fn whole(number: f64) -> Value {
    if number.fract() == 0.0 && number.abs() < 9e15 { json!(number as i64) } else { json!(number) }
}

/// What engines do not read, and import does.
fn own_section(shape: &Eagle3Shape) -> Map<String, Value> {
    object(json!({
        "specforge": {
            "num_target_layers": shape.num_target_layers,
            "max_position_embeddings": shape.max_position_embeddings,
        },
    }))
}

pub(in crate::export) fn object(value: Value) -> Map<String, Value> {
    if let Value::Object(map) = value { map } else { Map::new() }
}

// -- reading ---------------------------------------------------------------------------------------------------------

/// Keys beside those of any Llama. Trainers write null for what they do not set.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(in crate::export) struct Keys {
    pub(in crate::export) model_type: Option<String>,
    pub(in crate::export) draft_vocab_size: Option<i64>,
    pub(in crate::export) target_hidden_size: Option<i64>,
    pub(in crate::export) num_aux_hidden_states: Option<usize>,
    pub(in crate::export) fc_norm: Option<bool>,
    /// SGLang's older name for `fc_norm`.
    pub(in crate::export) use_aux_norm: Option<bool>,
    pub(in crate::export) norm_before_fc: Option<bool>,
    pub(in crate::export) norm_before_residual: Option<bool>,
    pub(in crate::export) norm_output: Option<bool>,
    norm_feedback: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    bias: Option<bool>,
    pub(in crate::export) tie_word_embeddings: Option<bool>,
    parallel_drafting: Option<bool>,
    logit_scale: Option<f64>,
    layer_types: Option<Vec<String>>,
    pub(in crate::export) eagle_aux_hidden_state_layer_ids: Option<Vec<usize>>,
    pub(in crate::export) eagle_config: Option<EagleKeys>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(in crate::export) struct EagleKeys {
    use_aux_hidden_state: Option<bool>,
    norm_before_fc: Option<bool>,
    /// -1 stands for the embeddings.
    pub(in crate::export) eagle_aux_hidden_state_layer_ids: Option<Vec<i64>>,
}

/// What this program writes for itself.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct OwnKeys {
    num_target_layers: Option<usize>,
    max_position_embeddings: Option<i64>,
}

/// A config.json and what it says.
pub(in crate::export) struct Parsed {
    /// The values as engines see them: of the speculators layout, flattened as vLLM does it.
    pub(in crate::export) values: Value,
    pub(in crate::export) keys: Keys,
    pub(in crate::export) shape: Eagle3Shape,
    /// The other meaning of `norm_output`, where the file has it and does not say which is meant.
    pub(in crate::export) alternative: Option<Eagle3Shape>,
    pub(in crate::export) target: Option<PathBuf>,
}

/// Reads a config.json. `num_target_layers` is needed where the file names no captured layers.
pub(in crate::export) fn parse(
    path: &Path,
    layout: Layout,
    config: &Value,
    num_target_layers: Option<usize>,
) -> Result<Parsed> {
    let refuse = |problem: String| Error::bad_file(path, problem);
    let values = match layout {
        Layout::Raw | Layout::Gguf => config.clone(),
        Layout::Speculators => flattened(path, config)?,
    };
    if let Some(problem) = quantised::configured(&values).or_else(|| quantised::configured(config)) {
        return Err(refuse(problem).with_hint(quantised::HINT));
    }
    let keys: Keys = named(&values, "").map_err(refuse)?;
    let own: OwnKeys = match config.get("specforge") {
        Some(own) => named(own, "specforge.").map_err(refuse)?,
        None => OwnKeys::default(),
    };
    supported(&keys).map_err(refuse)?;
    let sizes = plain_model(&values).map_err(refuse)?;
    one_rope(&values).map_err(refuse)?;
    let num_target_layers = own.num_target_layers.or(num_target_layers).unwrap_or(0);
    let capture = capture(&keys, num_target_layers).map_err(refuse)?;
    let (norm_output, norm_feedback) = match (layout, keys.norm_feedback) {
        (Layout::Speculators, _) => (true, keys.norm_output.unwrap_or(false)),
        (Layout::Raw | Layout::Gguf, Some(feedback)) => (keys.norm_output.unwrap_or(true), feedback),
        (Layout::Raw | Layout::Gguf, None) => (true, keys.norm_output.unwrap_or(false)),
    };
    let draft_vocab_size = keys.draft_vocab_size.unwrap_or(sizes.vocab_size);
    if !(1..=sizes.vocab_size).contains(&draft_vocab_size) {
        return Err(refuse(format!(
            "`draft_vocab_size`: expected 1 to `vocab_size`, which is {}, got {draft_vocab_size}",
            sizes.vocab_size
        )));
    }
    let target_hidden_size = keys.target_hidden_size.unwrap_or(sizes.hidden_size);
    let mut shape = Eagle3Shape {
        hidden_size: sizes.hidden_size,
        target_hidden_size,
        num_target_layers,
        vocab_size: sizes.vocab_size,
        draft_vocab_size,
        num_layers: sizes.num_layers,
        max_position_embeddings: own.max_position_embeddings.unwrap_or(sizes.max_position_embeddings),
        layer: sizes.layer,
        capture,
        fc_norm: keys.fc_norm.unwrap_or(false) || keys.use_aux_norm.unwrap_or(false),
        norm_before_fc: keys.eagle_config.as_ref().and_then(|keys| keys.norm_before_fc).or(keys.norm_before_fc)
            == Some(true),
        norm_before_residual: keys.norm_before_residual.unwrap_or(false),
        norm_output,
        norm_feedback,
        head_norms: false,
    };
    shape.layer.rope.max_position_embeddings = shape.max_position_embeddings;
    shape.check().map_err(refuse)?;
    let alternative = match (layout, keys.norm_feedback, keys.norm_output) {
        (Layout::Raw, None, Some(norm_output)) => {
            Some(Eagle3Shape { norm_output, norm_feedback: false, ..shape.clone() })
        }
        _ => None,
    };
    let target = match layout {
        Layout::Raw | Layout::Gguf => config.get("base_model_name_or_path"),
        Layout::Speculators => config.pointer("/speculators_config/verifier/name_or_path"),
    };
    let target = target.and_then(Value::as_str).filter(|name| !name.is_empty()).map(PathBuf::from);
    Ok(Parsed { values, keys, shape, alternative, target })
}

/// Keys of an object; the problem names the key.
pub(in crate::export) fn named<T: DeserializeOwned>(value: &Value, section: &str) -> Result<T, String> {
    serde_path_to_error::deserialize(value).map_err(|error| format!("`{section}{}`: {}", error.path(), error.inner()))
}

/// What vLLM makes of a speculators configuration.
fn flattened(path: &Path, config: &Value) -> Result<Value> {
    let refuse = |problem: &str, hint: &str| Err(Error::bad_file(path, problem).with_hint(hint));
    let Some(Value::Object(layer)) = config.get("transformer_layer_config") else {
        return refuse("`transformer_layer_config`: expected an object", "vLLM takes the draft's architecture from it");
    };
    if config.pointer("/speculators_config/proposal_methods/0/speculative_tokens").and_then(Value::as_u64).is_none() {
        let problem = "`speculators_config.proposal_methods[0].speculative_tokens`: expected a number";
        return refuse(problem, "vLLM proposes that many tokens");
    }
    if config.pointer("/speculators_config/verifier/name_or_path").and_then(Value::as_str).is_none() {
        let problem = "`speculators_config.verifier.name_or_path`: expected the target's name";
        return refuse(problem, "vLLM loads the target that it names");
    }
    if !config.get("norm_before_residual").is_some_and(Value::is_boolean) {
        let problem = "`norm_before_residual`: expected true or false";
        return refuse(problem, "without it speculators takes false and vLLM true");
    }
    let mut values = layer.clone();
    let keys = [
        "draft_vocab_size",
        "target_hidden_size",
        "norm_before_residual",
        "norm_before_fc",
        "fc_norm",
        "norm_output",
        "eagle_aux_hidden_state_layer_ids",
    ];
    for key in keys {
        if let Some(value) = config.get(key).filter(|value| !value.is_null()) {
            values.insert(key.to_owned(), value.clone());
        }
    }
    Ok(Value::Object(values))
}

/// Refuses what a draft of this program cannot be.
fn supported(keys: &Keys) -> Result<(), String> {
    if let Some(kind) = keys.model_type.as_deref().filter(|kind| *kind != "llama") {
        return Err(format!("`model_type`: expected llama, got {kind}"));
    }
    let biases = [("attention_bias", keys.attention_bias), ("mlp_bias", keys.mlp_bias), ("bias", keys.bias)];
    if let Some((key, _)) = biases.iter().find(|(_, value)| *value == Some(true)) {
        return Err(format!("`{key}`: expected false, biases are not supported in a draft"));
    }
    if keys.parallel_drafting == Some(true) {
        return Err("`parallel_drafting`: expected false, P-EAGLE is not supported".to_owned());
    }
    if keys.eagle_config.as_ref().is_some_and(|keys| keys.use_aux_hidden_state == Some(false)) {
        return Err("`eagle_config.use_aux_hidden_state`: expected true".to_owned());
    }
    if let Some(scale) = keys.logit_scale.filter(|scale| *scale != 1.0) {
        return Err(format!("`logit_scale`: expected 1, got {scale}"));
    }
    if let Some(kind) = keys.layer_types.iter().flatten().find(|kind| *kind != "full_attention") {
        return Err(format!("`layer_types`: expected full_attention, got {kind}"));
    }
    Ok(())
}

/// Older readers take `rope_theta` and `rope_scaling`, newer ones `rope_parameters`: they must say the same.
pub(in crate::export) fn one_rope(values: &Value) -> Result<(), String> {
    const OLDER: [&str; 2] = ["rope_theta", "rope_scaling"];
    let newer = values.get("rope_parameters").and_then(Value::as_object).filter(|keys| !keys.is_empty());
    let is_there = |key: &str| values.get(key).is_some_and(|value| !value.is_null());
    if newer.is_none() || !OLDER.into_iter().any(is_there) {
        return Ok(());
    }
    let without = |keys: &[&str]| {
        let mut values = values.clone();
        if let Some(values) = values.as_object_mut() {
            values.retain(|key, _| !keys.contains(&key.as_str()));
        }
        Ok::<_, String>(plain_model(&values)?.layer.rope)
    };
    let (older, newer) = (without(&["rope_parameters"])?, without(&OLDER)?);
    if older == newer {
        return Ok(());
    }
    Err(format!("`rope_parameters` says {newer:?}, `rope_theta` and `rope_scaling` {older:?}"))
}

/// Captured layers by Hugging Face's index.
fn capture(keys: &Keys, num_target_layers: usize) -> Result<Vec<usize>, String> {
    let key = "eagle_aux_hidden_state_layer_ids";
    let outputs = keys.eagle_config.as_ref().and_then(|keys| keys.eagle_aux_hidden_state_layer_ids.as_ref());
    let outputs = match outputs.map(|ids| inputs_of(ids)) {
        Some(None) => return Err(format!("`eagle_config.{key}`: expected layers from -1, got {outputs:?}")),
        Some(inputs) => inputs,
        None => None,
    };
    let capture = match (keys.eagle_aux_hidden_state_layer_ids.clone().filter(|ids| !ids.is_empty()), outputs) {
        (Some(inputs), Some(outputs)) if inputs != outputs => {
            return Err(format!(
                "`{key}` names what layers {inputs:?} read, the key of that name in `eagle_config` what the layers \
                 before {outputs:?} give: expected the same layers, one less each in `eagle_config`"
            ));
        }
        (Some(inputs), _) => inputs,
        (None, Some(outputs)) => outputs,
        (None, None) => default_capture(num_target_layers)
            .ok_or_else(|| format!("`{key}` is missing, and the number of the target's layers is not known"))?,
    };
    let ascending = !capture.is_empty() && capture.windows(2).all(|pair| pair[0] < pair[1]);
    if !ascending || (num_target_layers > 0 && capture.last().is_some_and(|&last| last > num_target_layers)) {
        let most = if num_target_layers > 0 { format!(" up to {num_target_layers}") } else { String::new() };
        return Err(format!("`{key}`: expected layers{most}, low to high, got {capture:?}"));
    }
    if let Some(count) = keys.num_aux_hidden_states.filter(|&count| count != capture.len()) {
        return Err(format!(
            "`num_aux_hidden_states`: expected {}, one for each captured layer, got {count}",
            capture.len()
        ));
    }
    Ok(capture)
}

/// The layers that read what these layers give.
pub fn inputs_of(outputs: &[i64]) -> Option<Vec<usize>> {
    outputs.iter().map(|id| id.checked_add(1).and_then(|id| usize::try_from(id).ok())).collect()
}

/// What both engines capture where a file names no layers.
pub fn default_capture(num_target_layers: usize) -> Option<Vec<usize>> {
    (num_target_layers > 3).then(|| vec![2, num_target_layers / 2, num_target_layers - 3])
}

// -- the target ------------------------------------------------------------------------------------------------------

/// Sizes from a target's config.json, where the folder is there.
#[derive(Debug, Clone, Deserialize)]
pub(in crate::export) struct Target {
    pub(in crate::export) architectures: Option<Value>,
    pub(in crate::export) hidden_size: Option<i64>,
    pub(in crate::export) vocab_size: Option<i64>,
    pub(in crate::export) num_hidden_layers: Option<usize>,
    pub(in crate::export) max_position_embeddings: Option<i64>,
}

impl Target {
    pub(in crate::export) fn read(path: Option<&Path>) -> Option<Self> {
        let named = path.filter(|path| !path.as_os_str().is_empty())?;
        let text = packed::read_file(named, CONFIG_FILE).ok()??;
        let values: Value = serde_json::from_slice(&text).ok()?;
        // A model that sees images keeps the sizes of its text model apart.
        let sizes = Self::deserialize(values.get("text_config").unwrap_or(&values)).ok()?;
        Some(Self { architectures: values.get("architectures").cloned(), ..sizes })
    }

    /// Classes that engines build it by.
    pub(in crate::export) fn architectures(&self) -> impl Iterator<Item = &str> {
        self.architectures.iter().filter_map(Value::as_array).flatten().filter_map(Value::as_str)
    }

    /// Whether a draft of this shape is one for this target.
    pub(in crate::export) fn fits(&self, path: &Path, shape: &Eagle3Shape) -> Result<()> {
        let layers = |layers: usize| i64::try_from(layers).unwrap_or(i64::MAX);
        let pairs = [
            ("hidden size", self.hidden_size, Some(shape.target_hidden_size)),
            ("vocabulary", self.vocab_size, Some(shape.vocab_size)),
            (
                "number of layers",
                self.num_hidden_layers.map(layers),
                Some(layers(shape.num_target_layers)).filter(|&count| count > 0),
            ),
        ];
        for (what, target, draft) in pairs {
            if let (Some(target), Some(draft)) = (target, draft)
                && target != draft
            {
                let problem = format!("{what}: the target has {target}, the draft was made for {draft}");
                return Err(Error::bad_file(path, problem));
            }
        }
        Ok(())
    }
}

/// A draft in words.
pub(in crate::export) fn lines(shape: &Eagle3Shape) -> Vec<String> {
    let layer = &shape.layer;
    let flags = [
        ("fc_norm", shape.fc_norm),
        ("norm_before_fc", shape.norm_before_fc),
        ("norm_before_residual", shape.norm_before_residual),
        ("norm_feedback", shape.norm_feedback),
    ];
    let on: Vec<&str> = flags.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
    vec![
        format!(
            "{} of hidden size {}, {} heads of {}, {} for keys and values{}",
            if shape.num_layers == 1 { "1 layer".to_owned() } else { format!("{} layers", shape.num_layers) },
            shape.hidden_size,
            layer.num_attention_heads,
            layer.head_dim,
            layer.num_key_value_heads,
            if on.is_empty() { String::new() } else { format!(", {}", on.join(", ")) }
        ),
        format!("reads what layers {:?} of the target read (hidden_states index)", shape.capture),
    ]
}
