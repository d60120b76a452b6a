//! What golden files of block drafters have in common: settings, weights by their engines' names, comparison, and blocks of
//! a training batch.

use serde_json::{Map, Value, json};
use specforge::draft::block::config::{BlockConfig, BlockShape};
use specforge::error::Error;
use specforge::models::TargetInfo;
use tch::{Kind, Tensor};

use super::Golden;

const TOLERANCE: f64 = 1e-5;

/// An error as text.
pub fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A metadata entry that is JSON.
pub fn json_of(golden: &Golden, key: &str) -> Result<Value, String> {
    golden.text(key).and_then(|value| serde_json::from_str(value).map_err(text))
}

/// A key of a configuration, or of a section within it.
pub fn setting<'a>(config: &'a Value, section: &str, key: &str) -> Option<&'a Value> {
    let inner = config.get(section).and_then(|section| section.get(key));
    inner.or_else(|| config.get(key)).filter(|value| !value.is_null())
}

/// Compares by the goldens' rule: integers are equal, floats differ by 1e-5 of the largest, or of 1 where that is larger.
pub fn near(what: &str, got: &Tensor, want: &Tensor) -> Result<f64, String> {
    if got.size() != want.size() {
        return Err(format!("{what}: expected shape {:?}, got {:?}", want.size(), got.size()));
    }
    if want.kind() == Kind::Int64 {
        return if got.equal(want) { Ok(0.0) } else { Err(format!("{what}: expected {want:?} {want}, got {got}")) };
    }
    if want.numel() == 0 {
        return Ok(0.0);
    }
    let (got, want) = (got.to_kind(Kind::Double), want.to_kind(Kind::Double));
    let scale = want.abs().max().double_value(&[]).max(1.0);
    let difference = (got - want).abs().max().double_value(&[]) / scale;
    // A comparison with NaN is false, and then this fails as it should.
    if difference <= TOLERANCE { Ok(difference) } else { Err(format!("{what}: differs by {difference:.3e}")) }
}

/// A tensor of a file, by the name that engines have for it.
pub fn weight(golden: &Golden, names: &[(&str, &str)], name: &str) -> Result<Tensor, String> {
    golden.tensor(&format!("w.{}", stored_name(golden, names, name)))
}

/// The name that a file has for a tensor: the engines' own, with some parts replaced, or that of an embedding module.
pub fn stored_name(golden: &Golden, names: &[(&str, &str)], name: &str) -> String {
    let of_file = names.iter().fold(name.to_owned(), |name, (engine, file)| name.replace(engine, file));
    let as_module = format!("{of_file}.weight");
    let options = [of_file.as_str(), as_module.as_str(), name];
    options.into_iter().find(|name| golden.has(&format!("w.{name}"))).unwrap_or(name).to_owned()
}

/// The same as a heads' finder of tensors.
pub fn finder<'a>(golden: &'a Golden, names: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Result<Tensor, Error> + 'a {
    move |name| weight(golden, names, name).map_err(Error::Failed)
}

/// Configuration and shape of a draft, from a file's Qwen3 configuration: sizes that heads read, and the head's own keys.
pub fn draft(
    algorithm: &str,
    config: &Value,
    block_size: i64,
    mut section: Map<String, Value>,
) -> Result<(BlockConfig, BlockShape), String> {
    let number = |key: &str| config.get(key).and_then(Value::as_i64).ok_or_else(|| format!("`{key}` is no number"));
    let target = TargetInfo::of(number("hidden_size")?, number("vocab_size")?, 40, 256);
    section.insert("algorithm".to_owned(), json!(algorithm));
    section.insert("block_size".to_owned(), json!(block_size));
    section.entry("mask_token_id").or_insert(json!(target.vocab_size - 1));
    section.entry("target_layer_ids").or_insert(json!([1]));
    section.insert("num_layers".to_owned(), json!(1));
    for key in ["layer_types", "sliding_window", "is_causal"] {
        section.remove(key);
    }
    if let Some(epsilon) = config.get("rms_norm_eps") {
        section.insert("rms_norm_eps".to_owned(), epsilon.clone());
    }
    let config = BlockConfig::read(&Value::Object(section)).map_err(text)?;
    let shape = config.shape(&target).map_err(text)?;
    Ok((config, shape))
}

/// The convolutions of a configuration, as a key of the `draft` section.
pub fn with_conv(config: &Value, section: &str, draft: &mut Map<String, Value>) {
    let size = |key: &str| setting(config, section, key).and_then(Value::as_i64);
    if let (Some(taps), Some(group)) = (size("conv_kernel_size"), size("conv_group_size")) {
        draft.insert("conv".to_owned(), json!({"kernel_size": taps, "group_size": group}));
    }
}

/// Keys of a configuration under the names of `draft.head`, those that are there.
pub fn head_keys(config: &Value, section: &str, keys: &[&str]) -> Map<String, Value> {
    keys.iter().filter_map(|&key| Some((key.to_owned(), setting(config, section, key)?.clone()))).collect()
}

/// A section with this head.
pub fn with_head(head: Map<String, Value>) -> Map<String, Value> {
    [("head".to_owned(), Value::Object(head))].into_iter().collect()
}

/// The context of the token at a place, `[1, H]`, from features `[T, F]`; zeros where the place is before the first.
pub fn context_at(golden: &Golden, features: &Tensor, place: i64, epsilon: f64) -> Result<Tensor, String> {
    let projection = golden.tensor("w.fc.weight")?;
    if place < 0 {
        return Ok(Tensor::zeros([1, projection.size()[0]], (features.kind(), features.device())));
    }
    let norm = specforge::nn::RmsNorm { weight: golden.tensor("w.hidden_norm.weight")?, epsilon };
    Ok(norm.forward(&features.narrow(0, place, 1).linear(&projection, None::<&Tensor>)))
}

/// One of the two blocks of an `infer_*` file.
pub struct Step {
    /// `out.stepN.`
    pub out: String,
    /// `[1, B, H]` hidden states behind the final norm.
    pub hidden: Tensor,
    /// `[1]` the anchor.
    pub anchor: Tensor,
    /// `[1]` the token before it.
    pub earlier: Tensor,
    /// Features of all tokens before the anchor, `[P, F]`.
    pub features: Tensor,
}

/// The blocks of an `infer_*` file.
pub fn steps(golden: &Golden) -> Result<Vec<Step>, String> {
    let (mut tokens, mut features) = (golden.integers("in.tokens")?, golden.tensor("in.features")?);
    let mut steps = Vec::new();
    for number in 1.. {
        let out = format!("out.step{number}.");
        if !golden.has(&format!("{out}hidden")) {
            break;
        }
        if number > 1 {
            tokens.extend(golden.integers(&format!("in.tokens_step{number}"))?);
            features = Tensor::cat(&[features, golden.tensor(&format!("in.features_step{number}"))?], 0);
        }
        let [.., earlier, anchor] = tokens[..] else {
            return Err(format!("expected two tokens or more before a block, got {}", tokens.len()));
        };
        let (anchor, earlier) = (Tensor::from_slice(&[anchor]), Tensor::from_slice(&[earlier]));
        let hidden = golden.tensor(&format!("{out}hidden"))?.unsqueeze(0);
        let features = features.shallow_clone();
        steps.push(Step { out, hidden, anchor, earlier, features });
    }
    if steps.is_empty() { Err("there is no `out.step1.hidden`".to_owned()) } else { Ok(steps) }
}
