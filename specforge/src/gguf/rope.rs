//! The rotary embedding's base and variant from GGUF metadata.
//!
//! Llama 3's variant is not in the metadata but in a tensor of factors that divide the frequencies. Its four numbers
//! are recovered by trying the published ones and comparing every factor; anything else is refused.

use serde_json::{Value, json};

use super::dimensions::Dimensions;
use super::metadata::{Metadata, six_digits};
use crate::error::Result;

/// Original context, low and high frequency factor of every published Llama 3.
const LLAMA3_ORIGINAL: f64 = 8192.0;
const LLAMA3_LOW: f64 = 1.0;
const LLAMA3_HIGH: f64 = 4.0;

const SCALING: &str = "rope.scaling.";
const KNOWN: [&str; 9] = [
    "type",
    "factor",
    "original_context_length",
    "finetuned",
    "attn_factor",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
];

/// What `config.json` says about the rotary embedding.
#[derive(Debug)]
pub struct Rope {
    /// Base.
    pub theta: f64,
    /// The variant as Hugging Face spells it; null for the plain one.
    pub scaling: Value,
}

/// Reads base and variant.
pub(super) fn read(metadata: &Metadata, sizes: &Dimensions, factors: Option<&[f32]>) -> Result<Rope> {
    let base = metadata.key("rope.freq_base");
    let theta = metadata.number(&base)?.unwrap_or(10_000.0);
    if theta <= 0.0 {
        return Err(metadata.bad(format!("`{base}`: expected a positive number, got {theta}")));
    }
    let mut scaling = scaling_keys(metadata)?;
    if let Some(factors) = factors.filter(|factors| factors.iter().any(|&factor| factor != 1.0)) {
        if !scaling.is_null() {
            let key = metadata.key("rope.scaling.type");
            return Err(metadata.bad(format!("has both `{key}` and the tensor `rope_freqs.weight`")));
        }
        scaling = llama3(metadata, sizes, theta, factors)?;
    }
    Ok(Rope { theta, scaling })
}

/// The variants that the metadata can name.
fn scaling_keys(metadata: &Metadata) -> Result<Value> {
    let prefix = metadata.key(SCALING);
    let unknown = |key: &&String| key.strip_prefix(&prefix).is_some_and(|name| !KNOWN.contains(&name));
    if let Some(key) = metadata.content.metadata.keys().find(unknown) {
        return Err(metadata.bad(format!("`{key}` is not supported")));
    }
    let number =
        |name: &str| -> Result<Option<f64>> { Ok(metadata.number(&format!("{prefix}{name}"))?.map(six_digits)) };
    let older = metadata.number(&metadata.key("rope.scale_linear"))?.map(six_digits);
    let factor = number("factor")?.or(older);
    let kind = match metadata.text(&format!("{prefix}type"))? {
        Some(kind) => kind,
        // Files from before the key existed; 0 stands for no scaling, too.
        None if factor.is_some_and(|factor| factor != 0.0 && factor != 1.0) => "linear",
        None => "none",
    };
    let factor = || match factor {
        Some(factor) if factor > 0.0 => Ok(factor),
        Some(factor) => Err(metadata.bad(format!("`{prefix}factor`: expected a positive number, got {factor}"))),
        None => Err(metadata.bad(format!("the metadata key `{prefix}factor` is missing"))),
    };
    match kind {
        "none" => Ok(Value::Null),
        "linear" => Ok(json!({ "rope_type": "linear", "factor": factor()? })),
        "yarn" => {
            for (name, neutral) in [("attn_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_ext_factor", 1.0)] {
                if let Some(value) = number(name)?.filter(|&value| value != neutral) {
                    return Err(metadata.bad(format!("`{prefix}{name}` = {value} is not supported")));
                }
            }
            let mut scaling = json!({ "rope_type": "yarn", "factor": factor()? });
            if let Some(original) = metadata.whole(&format!("{prefix}original_context_length"))? {
                scaling["original_max_position_embeddings"] = original.into();
            }
            for (name, key) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
                if let Some(value) = number(name)? {
                    scaling[key] = value.into();
                }
            }
            Ok(scaling)
        }
        other => Err(metadata.bad(format!("`{prefix}type`: expected none, linear or yarn, got `{other}`"))),
    }
}

/// Recovers Llama 3's four numbers from the factors, or refuses.
fn llama3(metadata: &Metadata, sizes: &Dimensions, theta: f64, factors: &[f32]) -> Result<Value> {
    // The lowest frequency is divided by the whole factor.
    let factor = factors.last().map_or(1.0, |&last| six_digits(f64::from(last)));
    let original = metadata.whole(&metadata.key("rope.scaling.original_context_length"))?;
    let original = original.map_or(LLAMA3_ORIGINAL, |original| original as f64);
    let same = factors.iter().enumerate().all(|(pair, &got)| {
        let want = llama3_factor(pair, sizes.head_dim, theta, factor, original);
        (f64::from(got) - want).abs() <= 1e-4 * want
    });
    if !same || factor <= 1.0 {
        return Err(metadata
            .bad(format!(
                "the factors in `rope_freqs.weight` are not Llama 3's (original context {original}, low frequency \
                 factor {LLAMA3_LOW}, high frequency factor {LLAMA3_HIGH})"
            ))
            .with_hint("import the model from its Hugging Face folder instead"));
    }
    Ok(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": original as u64,
    }))
}

/// What the frequency of one pair of channels is divided by.
fn llama3_factor(pair: usize, head_dim: usize, theta: f64, factor: f64, original: f64) -> f64 {
    let wavelength = std::f64::consts::TAU * theta.powf(2.0 * pair as f64 / head_dim as f64);
    if wavelength < original / LLAMA3_HIGH {
        1.0
    } else if wavelength > original / LLAMA3_LOW {
        factor
    } else {
        let smooth = (original / wavelength - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW);
        1.0 / ((1.0 - smooth) / factor + smooth)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::quantized::gguf_file::Value as GgufValue;
    use serde_json::Value;

    use super::super::synthetic::{HEAD_DIM, Synthetic, SyntheticTensor};
    use super::super::{ImportOptions, import};
    use super::*;

    /// What `config.json` says after an import of a file with these keys and factors.
    fn rope_of(keys: &[(&str, GgufValue)], factors: Option<&[f32]>) -> Result<(Value, Value)> {
        let folder = tempfile::tempdir().unwrap();
        let mut file = Synthetic::plain();
        for (key, value) in keys {
            file.set(key, value.clone());
        }
        if let Some(factors) = factors {
            file.tensors.push(SyntheticTensor::floats("rope_freqs.weight", factors));
        }
        let out = folder.path().join("out");
        import(&file.write(folder.path()), &out, &ImportOptions::default(), &|_, _| {})?;
        let config = std::fs::read(Path::join(&out, "config.json")).unwrap();
        let config: Value = serde_json::from_slice(&config).unwrap();
        Ok((config["rope_theta"].clone(), config["rope_scaling"].clone()))
    }

    fn message(keys: &[(&str, GgufValue)], factors: Option<&[f32]>) -> String {
        rope_of(keys, factors).unwrap_err().to_string()
    }

    /// The factors as convert_hf_to_gguf.py computes them.
    fn factors(theta: f64, factor: f64, low: f64, high: f64, original: f64) -> Vec<f32> {
        let one = |pair: usize| {
            let frequency = 1.0 / theta.powf(2.0 * pair as f64 / HEAD_DIM as f64);
            let wavelength = 2.0 * std::f64::consts::PI / frequency;
            if wavelength < original / high {
                1.0
            } else if wavelength > original / low {
                factor as f32
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
            }
        };
        (0..HEAD_DIM / 2).map(one).collect()
    }

    #[test]
    fn named_variants_become_rope_scaling() {
        use GgufValue::{F32, String, U32};
        let kind = |text: &str| ("llama.rope.scaling.type", String(text.to_owned()));
        let factor = |value: f32| ("llama.rope.scaling.factor", F32(value));
        assert_eq!(rope_of(&[], None).unwrap(), (json!(500_000.0), Value::Null));
        assert_eq!(rope_of(&[kind("none")], None).unwrap().1, Value::Null);
        let linear = json!({ "rope_type": "linear", "factor": 2.1 });
        assert_eq!(rope_of(&[kind("linear"), factor(2.1)], None).unwrap().1, linear);
        assert_eq!(rope_of(&[factor(2.1)], None).unwrap().1, linear);
        assert_eq!(rope_of(&[("llama.rope.scale_linear", F32(2.1))], None).unwrap().1, linear);
        let original = ("llama.rope.scaling.original_context_length", U32(512));
        let yarn = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512 });
        assert_eq!(rope_of(&[kind("yarn"), factor(4.0), original], None).unwrap().1, yarn);
        assert!(message(&[kind("linear")], None).contains("`llama.rope.scaling.factor` is missing"));
        assert!(message(&[kind("linear"), factor(-1.0)], None).contains("expected a positive number, got -1"));
        assert!(message(&[kind("longrope")], None).contains("got `longrope`"));
        let unknown = ("llama.rope.scaling.new_idea", F32(1.0));
        assert!(message(&[unknown], None).contains("`llama.rope.scaling.new_idea` is not supported"));
        let magnitude = ("llama.rope.scaling.attn_factor", F32(1.5));
        assert!(message(&[kind("yarn"), factor(4.0), magnitude], None).contains("attn_factor` = 1.5 is not supported"));
        let theta = [("llama.rope.freq_base", F32(10_000.0))];
        assert_eq!(rope_of(&theta, None).unwrap().0, json!(10_000.0));
    }

    #[test]
    fn llama3_is_recovered_from_its_factors() {
        for factor in [8.0, 32.0] {
            let want = json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            });
            assert_eq!(rope_of(&[], Some(&factors(500_000.0, factor, 1.0, 4.0, 8192.0))).unwrap().1, want);
        }
        assert_eq!(rope_of(&[], Some(&[1.0; HEAD_DIM / 2])).unwrap().1, Value::Null);
        let strange = [
            factors(500_000.0, 8.0, 1.0, 2.0, 8192.0),
            factors(500_000.0, 8.0, 1.0, 4.0, 4096.0),
            factors(10_000.0, 8.0, 1.0, 4.0, 8192.0),
            vec![0.5; HEAD_DIM / 2],
        ];
        for factors in strange {
            assert!(message(&[], Some(&factors)).contains("are not Llama 3's"));
        }
        let linear = [
            ("llama.rope.scaling.type", GgufValue::String("linear".to_owned())),
            ("llama.rope.scaling.factor", GgufValue::F32(2.0)),
        ];
        assert!(message(&linear, Some(&factors(500_000.0, 8.0, 1.0, 4.0, 8192.0))).contains("has both"));
        assert!(message(&[], Some(&[1.0; 4])).contains("expected [32], got [4]"));
    }
}
