//! gpt-oss: experts with biases and a clamped gate, a sink for each head, and a window on every other layer.
//!
//! Reference: `transformers/models/gpt_oss/modeling_gpt_oss.py` (Hugging Face transformers 5.8.1), the weights as plain
//! floating-point numbers.

use std::rc::Rc;

use serde_json::{Value, json};
use tch::Tensor;

use super::Family;
use super::decoder::names::{GetPart, Shapes, linear};
use super::decoder::{
    self, AttentionDesign, DecoderFamily, Design, ExpertCounts, LayerDesign, MlpDesign, NormWeights, Silent, Sizes,
    windows,
};
use super::keys::Keys;
use super::limits;
use super::rope_keys::RopeSource;
use crate::error::Result as Loaded;
use crate::nn::{Experts, FeedForward, Linear, Router, Scoring};

/// Row of the table of families.
pub const FAMILY: Family = decoder::family::<GptOss>("gpt_oss");

/// What a configuration leaves out.
const SILENT: Silent = Silent { head_dim: Some(64), epsilon: 1e-5, tied: false };
/// Slope of the gate's sigmoid.
const SLOPE: f64 = 1.702;

/// The family.
#[derive(Debug)]
pub enum GptOss {}

impl DecoderFamily for GptOss {
    fn design(keys: &Keys<'_>) -> Result<Design, String> {
        let sizes = Sizes::read(keys, SILENT)?;
        keys.only("hidden_act", &json!("silu"))?;
        // Names of the same things in the files of its makers.
        keys.know(["initial_context_length", "experts_per_token"]);
        let width = keys.whole_or("intermediate_size", 2880)?;
        limits::within(&[("intermediate_size", width, limits::WIDEST)])?;
        let all = keys.whole_or("num_experts", 128)?;
        let counts = ExpertCounts {
            all: keys.whole_or("num_local_experts", all)?,
            chosen: keys.whole_or("num_experts_per_tok", 4)?,
        };
        let counts = counts.check("num_local_experts", sizes.layers)?;
        let limit = keys.positive_or("swiglu_limit", 7.0)?;
        let experts = ClampedExperts { hidden: sizes.hidden_size, width, counts, limit };
        let silent = yarn();
        let mut source = RopeSource::read(keys, 150_000.0, sizes.head_dim, sizes.max_position_embeddings)?;
        if source.variant.is_null() {
            source.variant = &silent;
        }
        let rope = source.design()?;
        let window = windows::width(keys, Some(128), false)?;
        let windows = windows::read(keys, sizes.layers, window, |layer| layer % 2 == 0)?;
        let bias = keys.flag_or("attention_bias", true)?;
        let attention = AttentionDesign { bias, output_bias: bias, sinks: true, ..sizes.attention() };
        let layer = LayerDesign::new(attention, Rc::new(experts));
        let design = Design::new(sizes, &layer, rope).with_windows(&windows);
        Ok(Design { norm_weights: NormWeights::Wide, ..design })
    }
}

/// Its rotary embedding, where the configuration has none.
fn yarn() -> Value {
    json!({
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
        "original_max_position_embeddings": 4096,
    })
}

/// Experts whose tensors lie one behind the other in four.
#[derive(Debug)]
struct ClampedExperts {
    hidden: i64,
    width: i64,
    counts: ExpertCounts,
    limit: f64,
}

impl MlpDesign for ClampedExperts {
    fn tensors(&self) -> Shapes {
        let Self { hidden, width, counts: ExpertCounts { all, .. }, .. } = *self;
        let tensors = [
            ("router.weight", vec![all, hidden]),
            ("router.bias", vec![all]),
            ("experts.gate_up_proj", vec![all, hidden, 2 * width]),
            ("experts.gate_up_proj_bias", vec![all, 2 * width]),
            ("experts.down_proj", vec![all, width, hidden]),
            ("experts.down_proj_bias", vec![all, hidden]),
        ];
        tensors.map(|(name, shape)| (format!("mlp.{name}"), shape)).to_vec()
    }

    fn a_token(&self) -> i64 {
        self.counts.chosen * self.width
    }

    fn idle(&self) -> u64 {
        let one = 3 * self.hidden * self.width + 2 * self.width + self.hidden;
        (self.counts.all - self.counts.chosen) as u64 * one as u64
    }

    fn build(&self, get: &mut GetPart<'_>) -> Loaded<Box<dyn FeedForward>> {
        let projection = linear("mlp.router", true, get)?;
        let router = Router { projection, chosen: self.counts.chosen, scoring: Scoring::OfChosen };
        let mut stacked = |name: &str| {
            let weight = get(&format!("mlp.experts.{name}"))?; // [E, in, out]
            let bias = get(&format!("mlp.experts.{name}_bias"))?; // [E, out]
            Ok::<_, crate::error::Error>((weight.transpose(1, 2), bias))
        };
        let (into, back) = (stacked("gate_up_proj")?, stacked("down_proj")?);
        let of = |(weight, bias): &(Tensor, Tensor), expert: i64| Linear {
            weight: weight.get(expert),
            bias: Some(bias.get(expert)),
        };
        let expert = |number: i64| {
            let expert = ClampedMlp { into: of(&into, number), back: of(&back, number), limit: self.limit };
            Box::new(expert) as Box<dyn FeedForward>
        };
        Ok(Box::new(Experts { router, experts: (0..self.counts.all).map(expert).collect(), shared: None }))
    }
}

/// One expert: gate and up in turns, both clamped, and one more than up.
struct ClampedMlp {
    /// `[2 width, H]`
    into: Linear,
    /// `[H, width]`
    back: Linear,
    limit: f64,
}

impl FeedForward for ClampedMlp {
    fn forward(&self, input: &Tensor) -> Tensor {
        let both = self.into.forward(input); // [.., 2 width]
        let gate = both.slice(-1, 0, None, 2).clamp_max(self.limit);
        let up = both.slice(-1, 1, None, 2).clamp(-self.limit, self.limit);
        let gated = &gate * (&gate * SLOPE).sigmoid();
        self.back.forward(&((up + 1.0) * gated))
    }
}
