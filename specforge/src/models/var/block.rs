//! One block: attention and MLP behind norms whose scale and shift come from the label.

use std::f64::consts::LN_10;

use tch::Tensor;

use super::config::VarConfig;
use crate::error::Result;
use crate::models::family::GetTensor;
use crate::nn::{AttentionMask, Linear, Options, PreparedMask, attention, linear};

/// Largest logarithm of a head's temperature: `ln 100`.
const MOST_LOG_SCALE: f64 = 2.0 * LN_10;
/// Shortest length that a query or key is divided by, as PyTorch's `normalize` has it.
const SHORTEST: f64 = 1e-12;
/// What the scores are multiplied with where queries and keys are not normed: this over the root of a head's channels.
const PLAIN_SCALE: f64 = 0.25;

/// Where a block's norms get their numbers from.
#[derive(Debug)]
enum Adaptive {
    /// A projection of the label.
    Own(Linear),
    /// An offset `[1, 1, 6, C]` to the projection that all blocks share.
    Shared(Tensor),
}

/// A block of the transformer (FoundationVision/VAR @78b9539, `models/basic_var.py:47-174`).
#[derive(Debug)]
pub(super) struct Block {
    adaptive: Adaptive,
    /// `[3 C, C]`: queries, keys, values.
    qkv: Tensor,
    /// `[C]`; keys have no bias.
    query_bias: Tensor,
    /// `[C]`
    value_bias: Tensor,
    /// Logarithm of each head's temperature, `[1, N, 1, 1]`, where queries and keys are normed.
    log_scale: Option<Tensor>,
    projection: Linear,
    widen: Linear,
    narrow: Linear,
    heads: i64,
    epsilon: f64,
}

/// What a block computed on the way, for whoever looks for a wrong step.
pub struct BlockSteps {
    /// Number of the block.
    pub block: usize,
    /// What went in, `[B, T, C]`.
    pub input: Tensor,
    /// Attention behind its projection, before gamma: `[B, T, C]`.
    pub attention: Tensor,
    /// The MLP, before gamma: `[B, T, C]`.
    pub feed_forward: Tensor,
    /// What came out, `[B, T, C]`.
    pub output: Tensor,
    /// Keys and values of the past and of this pass, `[B, N, S, D]` each.
    pub cache: (Tensor, Tensor),
}

impl Block {
    /// Builds block number `block` from its tensors.
    pub(super) fn build(config: &VarConfig, block: i64, get: &mut GetTensor<'_>) -> Result<Self> {
        let (width, hidden) = (config.embed_dim, config.mlp_hidden);
        let mut get = |name: &str, shape: &[i64]| get(&format!("blocks.{block}.{name}"), shape);
        let adaptive = match config.shared_aln {
            true => Adaptive::Shared(get("ada_gss", &[1, 1, 6, width])?),
            false => Adaptive::Own(Linear {
                weight: get("ada_lin.1.weight", &[6 * width, width])?,
                bias: Some(get("ada_lin.1.bias", &[6 * width])?),
            }),
        };
        let log_scale = match config.attn_l2_norm {
            true => Some(get("attn.scale_mul_1H11", &[1, config.num_heads, 1, 1])?),
            false => None,
        };
        let mut layer = |name: &str, out: i64, into: i64| {
            let weight = get(&format!("{name}.weight"), &[out, into])?;
            Ok::<_, crate::error::Error>(Linear { weight, bias: Some(get(&format!("{name}.bias"), &[out])?) })
        };
        let projection = layer("attn.proj", width, width)?;
        let widen = layer("ffn.fc1", hidden, width)?;
        let narrow = layer("ffn.fc2", width, hidden)?;
        Ok(Self {
            adaptive,
            qkv: get("attn.mat_qkv.weight", &[3 * width, width])?,
            query_bias: get("attn.q_bias", &[width])?,
            value_bias: get("attn.v_bias", &[width])?,
            log_scale,
            projection,
            widen,
            narrow,
            heads: config.num_heads,
            epsilon: config.norm_eps,
        })
    }

    /// The numbers of this block's norms, `[B, 1, 6, C]`, from SiLU of the label's embedding `[B, C]` or from the shared
    /// projection of it, `[B, 1, 6, C]`: gammas of attention and MLP, their scales, their shifts.
    pub(super) fn modulation(&self, label: &Tensor, shared: Option<&Tensor>) -> Tensor {
        match (&self.adaptive, shared) {
            (Adaptive::Own(projection), _) => six(&projection.forward(label)),
            (Adaptive::Shared(offset), Some(shared)) => offset + shared,
            (Adaptive::Shared(offset), None) => offset.shallow_clone(),
        }
    }

    /// One pass over `input [B, T, C]` behind the keys and values of the past. `visible` is `[T, S]` booleans over past and
    /// new tokens; without it everything is seen.
    pub(super) fn forward(
        &self,
        block: usize,
        input: &Tensor,
        modulation: &Tensor,
        past: Option<(&Tensor, &Tensor)>,
        visible: Option<&Tensor>,
    ) -> BlockSteps {
        let parts = modulation.unbind(2); // 6 of [B, 1, C]
        let normed = |states: &Tensor, scale: &Tensor, shift: &Tensor| {
            norm(states, self.epsilon) * (scale + 1.0) + shift // [B, T, C]
        };
        let (attended, cache) = self.attend(&normed(input, &parts[2], &parts[4]), past, visible);
        let between = input + &parts[0] * &attended;
        let wide = self.widen.forward(&normed(&between, &parts[3], &parts[5])).gelu("tanh");
        let fed = self.narrow.forward(&wide);
        let output = &between + &parts[1] * &fed;
        BlockSteps { block, input: input.shallow_clone(), attention: attended, feed_forward: fed, output, cache }
    }

    /// Attention of normed states `[B, T, C]`, projected, with the keys and values of past and new tokens.
    fn attend(
        &self,
        states: &Tensor,
        past: Option<(&Tensor, &Tensor)>,
        visible: Option<&Tensor>,
    ) -> (Tensor, (Tensor, Tensor)) {
        let (rows, tokens, width) = (states.size()[0], states.size()[1], states.size()[2]);
        let bias = Tensor::cat(&[&self.query_bias, &self.value_bias.zeros_like(), &self.value_bias], 0);
        let all = linear(states, &self.qkv, Some(&bias)); // [B, T, 3 C]
        let all = all.view([rows, tokens, 3, self.heads, width / self.heads]).permute([2, 0, 3, 1, 4]);
        let (query, key, value) = (all.get(0), all.get(1), all.get(2)); // [B, N, T, D]
        let (query, key, scale) = match &self.log_scale {
            Some(log_scale) => (unit(&query) * log_scale.clamp_max(MOST_LOG_SCALE).exp(), unit(&key), 1.0),
            None => (query, key, PLAIN_SCALE / ((width / self.heads) as f64).sqrt()),
        };
        let (key, value) = match past {
            Some((keys, values)) => (Tensor::cat(&[keys, &key], 2), Tensor::cat(&[values, &value], 2)), // [B, N, S, D]
            None => (key, value),
        };
        let mask = match visible {
            Some(visible) => AttentionMask::Visible(visible.unsqueeze(0)).prepare(&[], tokens, states.device()),
            None => PreparedMask::Full,
        };
        let options = Options { scale: Some(scale), ..Options::default() };
        let attended = attention(&query, &key, &value, &mask, &options); // [B, N, T, D]
        let joined = attended.transpose(1, 2).reshape([rows, tokens, width]);
        (self.projection.forward(&joined), (key, value))
    }
}

/// A projection `[B, 6 C]` as the six parts of a block, `[B, 1, 6, C]`.
pub(super) fn six(projected: &Tensor) -> Tensor {
    let (rows, width) = (projected.size()[0], projected.size()[1] / 6);
    projected.view([rows, 1, 6, width])
}

/// Layer norm without weights over the last axis.
pub(super) fn norm(states: &Tensor, epsilon: f64) -> Tensor {
    let width = states.size().last().copied().unwrap_or(1);
    states.layer_norm([width], None::<&Tensor>, None::<&Tensor>, epsilon, false)
}

/// Vectors of length 1 along the last axis.
fn unit(states: &Tensor) -> Tensor {
    let lengths = states.norm_scalaropt_dim(2.0, [-1i64].as_slice(), true).clamp_min(SHORTEST);
    states / lengths
}
