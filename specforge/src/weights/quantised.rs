//! Quantised weights, told by name: this program computes with plain floating-point numbers and takes nothing else for
//! them. Targets whose weights are float8 or MXFP4 with scales are read as the numbers they stand for (`scaled`); all other
//! methods are refused, and in drafts these two as well.
//!
//! A folder says that it is quantised in its configuration, in a file beside it, in the names of its tensors or in their
//! element types. Each is looked at, because tools that rewrite folders forget one or the other.

use std::path::Path;

use safetensors::Dtype;
use serde_json::Value;

/// What to do about it.
pub const HINT: &str = "name the folder of the original model, or one whose weights were converted back to bfloat16";

/// Keys of config.json under which quantisers write.
const KEYS: [&str; 2] = ["quantization_config", "compression_config"];

/// Files that quantisers leave beside config.json.
const FILES: [&str; 3] = ["quantize_config.json", "quant_config.json", "hf_quant_config.json"];

/// How the tensors of quantised layers are called, and by whom. Plain models know none of these endings.
const ENDINGS: [(&str, &str); 17] = [
    (".qweight", "GPTQ or AWQ"),
    (".qzeros", "GPTQ or AWQ"),
    (".g_idx", "GPTQ"),
    (".scales", "GPTQ or AWQ"),
    (".SCB", "bitsandbytes, 8 bits"),
    (".weight_format", "bitsandbytes, 8 bits"),
    (".absmax", "bitsandbytes, 4 bits"),
    (".nested_absmax", "bitsandbytes, 4 bits"),
    (".quant_map", "bitsandbytes, 4 bits"),
    ("bitsandbytes__nf4", "bitsandbytes, 4 bits"),
    ("bitsandbytes__fp4", "bitsandbytes, 4 bits"),
    (".weight_packed", "compressed-tensors"),
    (".weight_zero_point", "compressed-tensors"),
    (".weight_scale_inv", "fp8"),
    (".weight_scale", "fp8 or compressed-tensors"),
    (".input_scale", "fp8"),
    (".weight._data", "quanto"),
];

/// What a configuration says of quantisation that no target is read with; see [`configured`].
pub fn unreadable(config: &Value) -> Option<String> {
    let (_, section) = section(config)?;
    if is_readable(section) { None } else { configured(config) }
}

/// Whether weights of this method are float8 or MXFP4 with scales, as far as its configuration says: their files are
/// looked at in any case.
fn is_readable(section: &Value) -> bool {
    let text = |name: &str| section.get(name).and_then(Value::as_str).unwrap_or_default().to_lowercase();
    match text("quant_method").as_str() {
        "fp8" | "fbgemm_fp8" | "mxfp4" => true,
        "modelopt" => text("quant_algo") == "fp8",
        "compressed-tensors" => ["float-quantized", "mxfp4-pack-quantized"].contains(&text("format").as_str()),
        _ => false,
    }
}

/// The key and the section of a configuration that speak of quantisation.
fn section(config: &Value) -> Option<(&'static str, &Value)> {
    let parts = [Some(config), config.get("text_config")];
    let mut found = parts.into_iter().flatten().flat_map(|part| KEYS.map(|key| (key, part.get(key))));
    let is_empty = |value: &Value| value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty);
    found.find_map(|(key, value)| Some((key, value.filter(|value| !is_empty(value))?)))
}

/// What a configuration says of quantisation: key, method and bits.
pub fn configured(config: &Value) -> Option<String> {
    let (key, value) = section(config)?;
    let text = |name: &str| value.get(name).and_then(Value::as_str);
    let mut words = vec![text("quant_method").or_else(|| text("quant_algo")).unwrap_or("an unknown method").to_owned()];
    let flag = |name: &str| value.get(name) == Some(&Value::Bool(true));
    match value.get("bits").or_else(|| value.get("w_bit")).and_then(Value::as_u64) {
        Some(bits) => words.push(format!("{bits} bits")),
        None if flag("load_in_4bit") => words.push("4 bits".to_owned()),
        None if flag("load_in_8bit") => words.push("8 bits".to_owned()),
        None => words.extend(text("format").or_else(|| text("weights")).map(str::to_owned)),
    }
    // Whatever a stranger wrote there stays a word of a message.
    let words: String = words.join(", ").chars().filter(|letter| !letter.is_control()).take(80).collect();
    Some(format!("the weights are quantised (`{key}`: {words}); expected float32, bfloat16 or float16"))
}

/// A file beside the configuration that only quantisers write.
pub fn file_beside(folder: &Path) -> Option<&'static str> {
    FILES.into_iter().find(|name| folder.join(name).is_file())
}

/// What a tensor's name says of quantisation.
pub(super) fn method_of(name: &str) -> Option<&'static str> {
    ENDINGS.iter().find(|(ending, _)| name.ends_with(ending)).map(|(_, method)| *method)
}

/// Whether an element type is one of a few bits, which quantised weights alone have.
pub(super) fn is_narrow_float(dtype: Dtype) -> bool {
    dtype.bitsize() <= 8 && !matches!(dtype, Dtype::U8 | Dtype::I8 | Dtype::BOOL)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn configurations_name_their_method() {
        for (config, want) in [
            (json!({}), None),
            (json!({"quantization_config": null}), None),
            (json!({"quantization_config": {}}), None),
            (
                json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}),
                Some("`quantization_config`: gptq, 4 bits"),
            ),
            (json!({"quantization_config": {"quant_method": "awq", "w_bit": 4}}), Some("awq, 4 bits")),
            (json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true}}), Some("8 bits")),
            (json!({"quantization_config": {"quant_method": "fp8"}}), Some("`quantization_config`: fp8)")),
            (json!({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack"}}), Some("pack")),
            (json!({"quantization_config": "something"}), Some("an unknown method")),
            (
                json!({"compression_config": {"format": "dense"}}),
                Some("`compression_config`: an unknown method, dense"),
            ),
            (json!({"text_config": {"quantization_config": {"quant_method": "fp8"}}}), Some("fp8")),
        ] {
            let got = configured(&config);
            assert_eq!(got.is_some(), want.is_some(), "{config}");
            assert!(got.unwrap_or_default().contains(want.unwrap_or_default()), "{config}");
        }
        let hostile = json!({"quantization_config": {"quant_method": "x\n\u{1b}[31m".repeat(1000)}});
        let text = configured(&hostile).unwrap_or_default();
        assert!(text.len() < 300 && !text.contains(['\n', '\u{1b}']), "{text}");
    }

    #[test]
    fn names_and_types_tell_quantised_tensors() {
        for (name, quantised) in [
            ("model.layers.0.mlp.up_proj.qweight", true),
            ("model.layers.0.mlp.up_proj.weight_scale_inv", true),
            ("model.layers.0.mlp.up_proj.weight.absmax", true),
            ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", true),
            ("model.layers.0.mlp.up_proj.SCB", true),
            ("model.layers.0.mlp.up_proj.weight", false),
            ("model.layers.0.self_attn.rotary_emb.inv_freq", false),
        ] {
            assert_eq!(method_of(name).is_some(), quantised, "{name}");
        }
        assert!(is_narrow_float(Dtype::F8_E4M3) && is_narrow_float(Dtype::F8_E5M2) && is_narrow_float(Dtype::F4));
        assert!(![Dtype::F32, Dtype::BF16, Dtype::U8, Dtype::I8, Dtype::BOOL].into_iter().any(is_narrow_float));
    }
}
