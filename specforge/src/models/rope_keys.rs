//! Rotary embeddings as configurations write them: Hugging Face's `modeling_rope_utils.py` (transformers 5.8.1), and the
//! spelling of version 4 (`rope_theta`, `rope_scaling` with `type` or `rope_type`).

use serde_json::Value;

use super::keys::Keys;
use crate::nn::{LongRope, RopeConfig, RopeScaling};

/// A rotary embedding of a model.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeDesign {
    /// Frequencies that follow from a few numbers.
    Plain(RopeConfig),
    /// Frequencies with factors of their own.
    Long(LongRope),
}

impl RopeDesign {
    /// What a draft gets where its configuration is silent: whole heads turn, with the same base, and with the same variant
    /// where drafts have it.
    pub fn for_drafts(&self, head_dim: i64) -> RopeConfig {
        match self {
            Self::Plain(config) => RopeConfig { head_dim, ..*config },
            Self::Long(long) => RopeConfig { head_dim, scaling: RopeScaling::Default, ..long.config },
        }
    }

    /// The same without a variant.
    pub fn unscaled(&self) -> Self {
        let (Self::Plain(config) | Self::Long(LongRope { config, .. })) = self;
        Self::Plain(RopeConfig { scaling: RopeScaling::Default, ..*config })
    }

    /// Refuses numbers that make no finite tables.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Self::Plain(config) => config.check(),
            Self::Long(long) => long.check(),
        }
    }
}

/// What a rotary embedding is read from.
#[derive(Debug)]
pub struct RopeSource<'a> {
    /// The keys of the variant, inside `rope_parameters` or `rope_scaling`; `null` where there are none.
    pub variant: &'a Value,
    /// The base, where the variant does not say it.
    pub theta: f64,
    /// `D`
    pub head_dim: i64,
    /// Share of a head's channels that turn, where the variant does not say it.
    pub share: f64,
    /// Whether a family can turn a part of a head.
    pub turns_parts: bool,
    /// Longest context.
    pub max_position_embeddings: i64,
    /// Context length of pretraining, where it is said outside the variant: it goes before the one inside.
    pub pretrained: Option<f64>,
    /// Whether `yarn` and `su` are old names of LongRoPE here.
    pub long_by_other_names: bool,
}

/// Keys of a variant that are understood.
const KNOWN: [&str; 18] = [
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "short_factor",
    "long_factor",
    "mrope_section",
    "mrope_interleaved",
];

impl<'a> RopeSource<'a> {
    /// The usual keys at the top of a configuration: `rope_scaling` goes before `rope_parameters`.
    pub fn read(keys: &Keys<'a>, default_theta: f64, head_dim: i64, context: i64) -> Result<Self, String> {
        let theta = keys.positive_or("rope_theta", default_theta)?;
        let pretrained = keys.maybe_number("original_max_position_embeddings", None)?;
        Ok(Self { pretrained, ..Self::of(keys, variant(keys), theta, [head_dim, context]) })
    }

    /// A variant and a base, of heads of `D` channels and for texts of so many tokens.
    pub fn of(keys: &Keys<'_>, variant: &'a Value, theta: f64, [head_dim, context]: [i64; 2]) -> Self {
        wonder(keys, variant);
        Self {
            variant,
            theta,
            head_dim,
            share: 1.0,
            turns_parts: false,
            max_position_embeddings: context,
            pretrained: None,
            long_by_other_names: false,
        }
    }

    /// The rotary embedding.
    pub fn design(&self) -> Result<RopeDesign, String> {
        let values = self.variant;
        let number = |key: &str| values.get(key).and_then(Value::as_f64);
        let need = |key: &str| match number(key) {
            Some(value) if value > 0.0 => Ok(value),
            Some(value) => Err(format!("rope scaling: `{key}`: expected a number above 0, got {value}")),
            None => Err(format!("rope scaling: `{key}` is missing or no number")),
        };
        let share = number("partial_rotary_factor").unwrap_or(self.share);
        if share != 1.0 && !self.turns_parts {
            return Err(format!("`partial_rotary_factor`: expected 1, got {share}; partial rotation is not supported"));
        }
        // Whole heads of an odd width are somebody else's to refuse.
        let channels = if share == 1.0 { self.head_dim } else { (self.head_dim as f64 * share) as i64 };
        if share != 1.0 && (channels < 2 || channels > self.head_dim || channels % 2 != 0) {
            let all = self.head_dim;
            return Err(format!(
                "`partial_rotary_factor`: expected an even number of a head's {all} channels, got {channels}"
            ));
        }
        let theta = number("rope_theta").unwrap_or(self.theta);
        if theta <= 0.0 {
            return Err(format!("`rope_theta`: expected a number above 0, got {theta}"));
        }
        let pretrained = self.pretrained.or(number("original_max_position_embeddings"));
        if let Some(length) = pretrained.filter(|length| *length < 1.0) {
            return Err(format!("`original_max_position_embeddings`: expected a number from 1, got {length}"));
        }
        let context = self.max_position_embeddings as f64;
        let original_max_position_embeddings = pretrained.unwrap_or(context);
        let plain = |scaling| {
            let max_position_embeddings = self.max_position_embeddings;
            RopeConfig { theta, head_dim: channels, max_position_embeddings, scaling }
        };
        let scaling = match self.kind() {
            // Positions of text along three axes are one position.
            "default" | "mrope" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: need("factor")? },
            "dynamic" => RopeScaling::Dynamic { factor: need("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_max_position_embeddings,
            },
            "yarn" => {
                let stretch = pretrained.map(|original| context / original);
                let factor = number("factor").or(stretch).map_or_else(|| need("factor"), Ok)?;
                RopeScaling::Yarn {
                    factor,
                    attention_factor: number("attention_factor")
                        .unwrap_or_else(|| yarn_attention_factor(factor, number("mscale"), number("mscale_all_dim"))),
                    beta_fast: number("beta_fast").filter(|&beta| beta != 0.0).unwrap_or(32.0),
                    beta_slow: number("beta_slow").filter(|&beta| beta != 0.0).unwrap_or(1.0),
                    original_max_position_embeddings,
                    truncate: values.get("truncate").and_then(Value::as_bool).unwrap_or(true),
                }
            }
            "longrope" => {
                let factor = number("factor").unwrap_or(context / original_max_position_embeddings);
                let attention_factor = number("attention_factor").unwrap_or_else(|| match factor <= 1.0 {
                    true => 1.0,
                    false => (1.0 + factor.ln() / original_max_position_embeddings.ln()).sqrt(),
                });
                return Ok(RopeDesign::Long(LongRope {
                    config: plain(RopeScaling::Default),
                    short: factors(values, "short_factor")?,
                    long: factors(values, "long_factor")?,
                    original_max_position_embeddings,
                    attention_factor,
                }));
            }
            other => {
                return Err(format!(
                    "`rope_type`: expected default, linear, dynamic, llama3, yarn or longrope, got {other}"
                ));
            }
        };
        Ok(RopeDesign::Plain(plain(scaling)))
    }

    /// Name of the variant.
    fn kind(&self) -> &'a str {
        let kind = self.variant.get("rope_type").or_else(|| self.variant.get("type"));
        match kind.and_then(Value::as_str).unwrap_or("default") {
            "su" | "yarn" if self.long_by_other_names => "longrope",
            kind => kind,
        }
    }
}

/// Keys of the variant of a configuration that has one for all layers; `null` where there are none.
pub fn variant<'a>(keys: &Keys<'a>) -> &'a Value {
    let filled = |values: &&Value| values.as_object().is_some_and(|keys| !keys.is_empty());
    let sources = [keys.any("rope_scaling"), keys.any("rope_parameters")];
    sources.into_iter().flatten().find(filled).unwrap_or(&Value::Null)
}

/// Variants of layers without and with a window, where `rope_parameters` has one for each kind of layer.
pub fn by_kind<'a>(keys: &Keys<'a>) -> Result<Option<[&'a Value; 2]>, String> {
    let Some(parameters) = keys.filled("rope_parameters") else { return Ok(None) };
    let variants = ["full_attention", "sliding_attention"].map(|kind| parameters.get(kind).unwrap_or(&Value::Null));
    match variants.iter().any(|variant| variant.is_object()) {
        false => Ok(None),
        true if keys.filled("rope_scaling").is_some() => {
            Err("`rope_scaling`: expected nothing beside `rope_parameters` for each kind of layer".to_owned())
        }
        true => Ok(Some(variants)),
    }
}

/// Notes the keys of a variant that are not understood.
pub fn wonder(keys: &Keys<'_>, variant: &Value) {
    let names = variant.as_object().into_iter().flat_map(serde_json::Map::keys);
    names.filter(|name| !KNOWN.contains(&name.as_str())).for_each(|name| keys.wonder(format!("rope scaling: {name}")));
}

fn factors(values: &Value, key: &str) -> Result<Vec<f64>, String> {
    let wrong = || format!("rope scaling: longrope needs `{key}`, a list of numbers");
    let list = values.get(key).and_then(Value::as_array).ok_or_else(wrong)?;
    list.iter().map(|value| value.as_f64().filter(|factor| *factor > 0.0).ok_or_else(wrong)).collect()
}

/// What YaRN multiplies cos and sin with where the file does not say it.
fn yarn_attention_factor(factor: f64, scale: Option<f64>, scale_all: Option<f64>) -> f64 {
    let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    match (scale, scale_all) {
        (Some(scale), Some(all)) if scale != 0.0 && all != 0.0 => magnitude(scale) / magnitude(all),
        _ => magnitude(1.0),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(values: &Value) -> Result<RopeDesign, String> {
        RopeSource { turns_parts: true, ..RopeSource::read(&Keys::new(values), 500.0, 16, 64)? }.design()
    }

    #[test]
    fn both_spellings_say_the_same() {
        let yarn = |kind: &str| json!({kind: "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": false});
        let mut newer = yarn("rope_type");
        newer["rope_theta"] = 900.0.into();
        let want = read(&json!({"rope_parameters": newer})).unwrap();
        assert_eq!(read(&json!({"rope_theta": 900.0, "rope_scaling": yarn("type")})).unwrap(), want);
        assert_eq!(read(&json!({"rope_theta": 900.0, "rope_scaling": yarn("rope_type")})).unwrap(), want);
        let RopeDesign::Plain(RopeConfig { theta, scaling, .. }) = want else { panic!("{want:?}") };
        assert!(theta == 900.0 && matches!(scaling, RopeScaling::Yarn { truncate: false, .. }));
        let RopeDesign::Plain(plain) = read(&json!({"rope_scaling": null})).unwrap() else { panic!() };
        assert_eq!((plain.theta, plain.scaling), (500.0, RopeScaling::Default));
    }

    #[test]
    fn a_part_of_a_head_turns_where_a_family_can() {
        let half = json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}});
        let RopeDesign::Plain(plain) = read(&half).unwrap() else { panic!() };
        assert_eq!(plain.head_dim, 8);
        let whole = RopeSource::read(&Keys::new(&half), 500.0, 16, 64).unwrap().design().unwrap_err();
        assert!(whole.contains("`partial_rotary_factor`: expected 1"), "{whole}");
        let odd = json!({"rope_parameters": {"partial_rotary_factor": 0.05}});
        assert!(read(&odd).unwrap_err().contains("even number"));
    }

    #[test]
    fn longrope_takes_its_factor_from_the_lengths() {
        let values = json!({"original_max_position_embeddings": 16,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}});
        let RopeDesign::Long(long) = read(&values).unwrap() else { panic!() };
        assert!((long.attention_factor - (1.0 + 4f64.ln() / 16f64.ln()).sqrt()).abs() < 1e-15);
        let broken = json!({"rope_scaling": {"type": "longrope", "short_factor": [1.0, -1.0]}});
        assert!(read(&broken).unwrap_err().contains("`short_factor`"));
    }

    #[test]
    fn what_is_not_understood_is_noted() {
        let values = json!({"rope_scaling": {"type": "linear", "factor": 2.0, "finetuned": true}});
        let keys = Keys::new(&values);
        RopeSource::read(&keys, 500.0, 16, 64).unwrap().design().unwrap();
        assert_eq!(keys.strange(), ["rope scaling: finetuned"]);
    }
}
