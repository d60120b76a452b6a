//! LiLiCorr's scorer of candidates: which token fits behind which, and behind the anchor.
//!
//! Every candidate of a block is a row that attends to all others; from each come two unit vectors, `in` and `out`, and the
//! score of a step is the scaled cosine of the earlier one's `out` and the later one's `in`. The anchor's `out` comes from
//! the features of the token before it.
//!
//! Shape legend: `n` blocks, `S` slots of them, `K` candidates, `L = S K` rows, `H` the draft's hidden size, `h` the head's
//! width, `N` its attention heads, `D` size of the factors.

use tch::{Device, Kind, Tensor};

use super::super::lattice::{Candidates, Lattice, wide};
use super::super::{Start, TensorSpec, Tensors};
use super::LilicorrConfig;
use crate::draft::block::config::BlockShape;
use crate::error::Result;
use crate::nn::{Linear, RmsNorm};

/// Numbers that describe a candidate beside its embedding: log-probability, probability, distance to the likeliest, rank,
/// and whether it is the likeliest.
const FEATURES: i64 = 5;
/// Epsilon of the layer normalisation of those numbers.
const FEATURE_EPSILON: f64 = 1e-5;
/// Deviation of the projections at the beginning.
const START: f64 = 0.02;

/// The network.
#[derive(Debug)]
pub struct Lilicorr {
    token_proj: Option<Linear>,
    pass_hidden_proj: Linear,
    feature_norm: Linear,
    feature_up: Linear,
    feature_down: Linear,
    /// `[1, 1, B - 1, 1, h]`
    slot_embedding: Tensor,
    /// `[1, 1, 1, K, h]`
    rank_embedding: Tensor,
    /// `[N, 2 B - 1]`
    relative_slot_bias: Tensor,
    /// `[N]`
    same_slot_bias: Tensor,
    context_proj: Linear,
    layers: Vec<Layer>,
    output_norm: RmsNorm,
    anchor_norm: RmsNorm,
    factor_input_proj: Linear,
    out_head: Linear,
    in_head: Linear,
    anchor_out_head: Linear,
    num_heads: i64,
    vector_eps: f64,
    logit_scale: f64,
}

/// Pre-norm attention among all candidates of a block, and an MLP.
#[derive(Debug)]
struct Layer {
    attn_norm: RmsNorm,
    qkv: Linear,
    out: Linear,
    mlp_norm: RmsNorm,
    up: Linear,
    down: Linear,
}

/// Tensors of the head in creation order.
pub fn tensors(config: &LilicorrConfig, shape: &BlockShape) -> Vec<TensorSpec> {
    let (wide, h, factor) = (shape.hidden_size, config.width(shape), config.lilicorr_factor_dim);
    let (heads, block) = (config.lilicorr_num_heads, shape.block_size);
    let mut specs = Vec::new();
    let mut add =
        |name: &str, shape: &[i64], start| specs.push(TensorSpec::new(format!("lilicorr.{name}"), shape, start));
    let linear = |add: &mut dyn FnMut(&str, &[i64], Start), name: &str, out: i64, width: i64| {
        add(&format!("{name}.weight"), &[out, width], Start::Normal(START));
        add(&format!("{name}.bias"), &[out], Start::Zeros);
    };
    if wide != h {
        linear(&mut add, "token_proj", h, wide);
    }
    linear(&mut add, "pass_hidden_proj", h, wide);
    add("feature_norm.weight", &[FEATURES], Start::Ones);
    add("feature_norm.bias", &[FEATURES], Start::Zeros);
    linear(&mut add, "feature_mlp.up_proj", h, FEATURES);
    linear(&mut add, "feature_mlp.down_proj", h, h);
    add("slot_embedding", &[1, 1, shape.slots(), 1, h], Start::Zeros);
    add("rank_embedding", &[1, 1, 1, config.lilicorr_candidate_topk, h], Start::Zeros);
    add("relative_slot_bias", &[heads, 2 * block - 1], Start::Zeros);
    add("same_slot_bias", &[heads], Start::Zeros);
    linear(&mut add, "context_proj", h, wide);
    for layer in 0..config.lilicorr_num_layers {
        let name = |part: &str| format!("layers.{layer}.{part}");
        add(&name("attn_norm.weight"), &[h], Start::Ones);
        add(&name("attn.in_proj_weight"), &[3 * h, h], Start::Xavier);
        add(&name("attn.in_proj_bias"), &[3 * h], Start::Zeros);
        linear(&mut add, &name("attn.out_proj"), h, h);
        add(&name("mlp_norm.weight"), &[h], Start::Ones);
        linear(&mut add, &name("mlp.up_proj"), config.mlp_width(shape), h);
        linear(&mut add, &name("mlp.down_proj"), h, config.mlp_width(shape));
    }
    add("output_norm.weight", &[h], Start::Ones);
    add("anchor_norm.weight", &[h], Start::Ones);
    linear(&mut add, "factor_input_proj", h, 3 * h);
    for name in ["out_head", "in_head", "anchor_out_head"] {
        linear(&mut add, name, factor, h);
    }
    specs
}

impl Lilicorr {
    /// The scorer of a configuration, on tensors that are found by name.
    pub fn new(config: &LilicorrConfig, shape: &BlockShape, tensors: Tensors<'_>) -> Result<Self> {
        let find = |name: &str| tensors(&format!("lilicorr.{name}"));
        let linear = |name: &str| {
            let (weight, bias) = (find(&format!("{name}.weight"))?, find(&format!("{name}.bias"))?);
            Ok::<_, crate::error::Error>(Linear { weight, bias: Some(bias) })
        };
        let norm = |name: &str| {
            Ok::<_, crate::error::Error>(RmsNorm {
                weight: find(&format!("{name}.weight"))?,
                epsilon: shape.layer.rms_norm_eps,
            })
        };
        let layer = |layer: i64| {
            let name = |part: &str| format!("layers.{layer}.{part}");
            let (weight, bias) = (find(&name("attn.in_proj_weight"))?, find(&name("attn.in_proj_bias"))?);
            Ok(Layer {
                attn_norm: norm(&name("attn_norm"))?,
                qkv: Linear { weight, bias: Some(bias) },
                out: linear(&name("attn.out_proj"))?,
                mlp_norm: norm(&name("mlp_norm"))?,
                up: linear(&name("mlp.up_proj"))?,
                down: linear(&name("mlp.down_proj"))?,
            })
        };
        let narrower = shape.hidden_size != config.width(shape);
        Ok(Self {
            token_proj: narrower.then(|| linear("token_proj")).transpose()?,
            pass_hidden_proj: linear("pass_hidden_proj")?,
            feature_norm: linear("feature_norm")?,
            feature_up: linear("feature_mlp.up_proj")?,
            feature_down: linear("feature_mlp.down_proj")?,
            slot_embedding: find("slot_embedding")?,
            rank_embedding: find("rank_embedding")?,
            relative_slot_bias: find("relative_slot_bias")?,
            same_slot_bias: find("same_slot_bias")?,
            context_proj: linear("context_proj")?,
            layers: (0..config.lilicorr_num_layers).map(layer).collect::<Result<_>>()?,
            output_norm: norm("output_norm")?,
            anchor_norm: norm("anchor_norm")?,
            factor_input_proj: linear("factor_input_proj")?,
            out_head: linear("out_head")?,
            in_head: linear("in_head")?,
            anchor_out_head: linear("anchor_out_head")?,
            num_heads: config.lilicorr_num_heads,
            vector_eps: config.lilicorr_vector_eps,
            logit_scale: config.lilicorr_logit_scale,
        })
    }

    /// Scores of all steps through candidates `[n, S, K]` with log-probabilities `log_q [n, S, K]` over the whole
    /// vocabulary. `rows [n, S, H]` are those of the slots, `context [n, H]` is what the backbone reads of the token before the
    /// anchor, a row of zeros where there is none; `embedding [V, H]` gets no gradient. A draft that is shorter than the head
    /// was trained for has fewer slots or candidates.
    pub fn lattice(
        &self,
        candidates: &Candidates,
        log_q: &Tensor,
        rows: &Tensor,
        context: &Tensor,
        embedding: &Tensor,
    ) -> Lattice {
        let ids = &candidates.ids;
        let (slots, count) = (ids.size()[1], ids.size()[2]);
        let kind = self.slot_embedding.kind();
        let embedded = Tensor::embedding(&embedding.detach(), ids, -1, false, false).to_kind(kind); // [n, S, K, H]
        let embedded = self.token_proj.as_ref().map_or(embedded.shallow_clone(), |project| project.forward(&embedded));
        let slot = self.slot_embedding.squeeze_dim(0).narrow(1, 0, slots); // [1, S, 1, h]
        let rank = self.rank_embedding.squeeze_dim(0).narrow(2, 0, count); // [1, 1, K, h]
        let states = embedded
            + self.pass_hidden_proj.forward(rows).unsqueeze(2)
            + self.describe(&wide(log_q), kind)
            + slot
            + rank; // [n, S, K, h]
        let bias = self.bias(slots, count); // [N, L, L]
        let mut states = states.flatten(1, 2); // [n, L, h]
        for layer in &self.layers {
            states = layer.forward(&states, &bias, self.num_heads);
        }
        let states = self.output_norm.forward(&states).unflatten(1, [slots, count]); // [n, S, K, h]
        let anchor = self.anchor(context); // [n, h]

        let beside = anchor.unsqueeze(1).unsqueeze(1).expand_as(&states);
        let joined = Tensor::cat(&[states.shallow_clone(), beside.shallow_clone(), states * beside], -1);
        let factor = self.factor_input_proj.forward(&joined).silu(); // [n, S, K, h]
        let out = self.unit(&self.out_head.forward(&factor.narrow(1, 0, slots - 1))); // [n, S - 1, K, D]
        let into = self.unit(&self.in_head.forward(&factor)); // [n, S, K, D]
        let first = self.unit(&self.anchor_out_head.forward(&anchor)); // [n, D]
        let start = into.select(1, 0).matmul(&first.unsqueeze(-1)).squeeze_dim(-1); // [n, K]
        let pairs = out.matmul(&into.narrow(1, 1, slots - 1).transpose(2, 3)); // [n, S - 1, K, K]
        Lattice { ids: ids.shallow_clone(), start: start * self.logit_scale, pairs: pairs * self.logit_scale }
    }

    /// The numbers that describe candidates, projected: `[n, S, K, h]` from log-probabilities `[n, S, K]`.
    fn describe(&self, log_q: &Tensor, kind: Kind) -> Tensor {
        let count = log_q.size()[2];
        let options = (log_q.kind(), log_q.device());
        let rank = Tensor::arange(count, options) / (count - 1).max(1) as f64; // [K]
        let first = Tensor::arange(count, options).eq(0).to_kind(log_q.kind()); // [K]
        let best = log_q.amax([-1], true); // [n, S, 1]
        let numbers = [log_q.shallow_clone(), log_q.exp(), log_q - best, rank.expand_as(log_q), first.expand_as(log_q)];
        let numbers = Tensor::stack(&numbers, -1).to_kind(kind); // [n, S, K, 5]
        let (weight, bias) = (&self.feature_norm.weight, self.feature_norm.bias.as_ref());
        let normed = numbers.layer_norm([FEATURES], Some(weight), bias, FEATURE_EPSILON, true);
        self.feature_down.forward(&self.feature_up.forward(&normed).silu())
    }

    /// What attention adds for the distance of slots: `[N, L, L]`, asking row first.
    fn bias(&self, slots: i64, count: i64) -> Tensor {
        let device: Device = self.relative_slot_bias.device();
        let slot = Tensor::arange(slots, (Kind::Int64, device)).repeat_interleave_self_int(count, None, None); // [L]
        let distance = slot.unsqueeze(1) - slot.unsqueeze(0); // [L, L]
        let block = (self.relative_slot_bias.size()[1] + 1) / 2;
        let place = (&distance + (block - 1)).flatten(0, -1);
        let length = slots * count;
        // A matrix product gathers: its gradient is a sum in a fixed order, an index's is not on a GPU.
        let chosen = place.one_hot(2 * block - 1).to_kind(self.relative_slot_bias.kind()); // [L L, 2 B - 1]
        let relative = self.relative_slot_bias.matmul(&chosen.transpose(0, 1)).view([-1, length, length]);
        let same = distance.eq(0).to_kind(relative.kind()); // [L, L]
        relative + same.unsqueeze(0) * self.same_slot_bias.view([-1, 1, 1])
    }

    /// The anchor's state, `[n, h]`; zero where nothing stands before the anchor, whatever the projection adds.
    fn anchor(&self, context: &Tensor) -> Tensor {
        let there = context.detach().ne(0.0).any_dim(-1, true); // [n, 1]
        let projected = self.context_proj.forward(context);
        let there = there.to_kind(projected.kind());
        self.anchor_norm.forward(&(projected * there))
    }

    /// Vectors of length 1, in float32 at least; shorter ones than the epsilon are divided by that.
    fn unit(&self, vectors: &Tensor) -> Tensor {
        let vectors = wide(vectors);
        let length = vectors.norm_scalaropt_dim(2.0, [-1], true).clamp_min(self.vector_eps);
        vectors / length
    }
}

impl Layer {
    /// `[n, L, h]` to `[n, L, h]`.
    fn forward(&self, states: &Tensor, bias: &Tensor, num_heads: i64) -> Tensor {
        let h = states.size()[2];
        let head_dim = h / num_heads;
        let qkv = self.qkv.forward(&self.attn_norm.forward(states)); // [n, L, 3 h]
        let part = |index: i64| {
            qkv.narrow(2, index * h, h).unflatten(2, [num_heads, head_dim]).transpose(1, 2) // [n, N, L, h / N]
        };
        let scores = (part(0) * (head_dim as f64).powf(-0.5)).matmul(&part(1).transpose(2, 3)) + bias; // [n, N, L, L]
        let weights = wide(&scores).softmax(-1, None::<Kind>).to_kind(states.kind());
        let mixed = weights.matmul(&part(2)).transpose(1, 2).flatten(2, 3); // [n, L, h]
        let states = states + self.out.forward(&mixed);
        let up = self.up.forward(&self.mlp_norm.forward(&states)).silu();
        &states + self.down.forward(&up)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::draft::block::config::BlockConfig;
    use crate::models::TargetInfo;
    use crate::nn::drawn::Drawn;

    const OPTIONS: (Kind, Device) = (Kind::Double, Device::Cpu);

    /// A scorer of numbers without meaning; `anchor_bias` is added to what the anchor is projected to.
    fn scorer(anchor_bias: f64) -> Lilicorr {
        let head = json!({"lilicorr_candidate_topk": 3, "lilicorr_hidden_size": 8, "lilicorr_num_heads": 2,
            "lilicorr_factor_dim": 5});
        let section = json!({"algorithm": "lilicorr", "block_size": 5, "num_layers": 1, "mask_token_id": 9,
            "target_layer_ids": [1], "head": head});
        let config = BlockConfig::read(&section).unwrap();
        let shape = config.shape(&TargetInfo::of(8, 10, 6, 64)).unwrap();
        let own = LilicorrConfig::of(&config, &shape).unwrap();
        let specs = tensors(&own, &shape);
        assert!(!specs.iter().any(|spec| spec.name.contains("token_proj")), "as wide as the draft");
        let drawn = Drawn::of(41);
        let values: Vec<(String, Tensor)> =
            specs.into_iter().map(|spec| (spec.name, drawn.normal(&spec.shape))).collect();
        let find = |name: &str| {
            let value = &values.iter().find(|(own, _)| own == name).unwrap().1;
            Ok(if name == "lilicorr.context_proj.bias" { value + anchor_bias } else { value.shallow_clone() })
        };
        Lilicorr::new(&own, &shape, &find).unwrap()
    }

    fn lattice(scorer: &Lilicorr, slots: i64, count: i64, context: f64) -> Lattice {
        let drawn = Drawn::of(42);
        let logits = drawn.normal(&[2, slots, 10]);
        let candidates = Candidates::likeliest(&logits, count);
        let log_q = &candidates.logits - logits.logsumexp([-1].as_slice(), true);
        let rows = drawn.normal(&[2, slots, 8]);
        let context = Tensor::full([2, 8], context, OPTIONS);
        scorer.lattice(&candidates, &log_q, &rows, &context, &drawn.normal(&[10, 8]))
    }

    #[test]
    fn scores_are_scaled_cosines() {
        let lattice = lattice(&scorer(0.0), 4, 3, 1.0);
        assert_eq!((lattice.start.size(), lattice.pairs.size()), (vec![2, 3], vec![2, 3, 3, 3]));
        assert!(
            lattice.pairs.abs().max().double_value(&[]) <= 8.0 && lattice.start.abs().max().double_value(&[]) <= 8.0
        );
    }

    #[test]
    fn without_a_token_before_the_anchor_its_state_is_zero() {
        let scores = |bias, context| lattice(&scorer(bias), 4, 3, context);
        assert!(scores(0.0, 0.0).pairs.equal(&scores(2.0, 0.0).pairs));
        assert!(!scores(0.0, 1.0).pairs.equal(&scores(2.0, 1.0).pairs));
    }

    #[test]
    fn shorter_drafts_have_fewer_slots_or_candidates() {
        for (slots, count) in [(4, 1), (1, 3), (2, 2)] {
            let lattice = lattice(&scorer(0.0), slots, count, 1.0);
            assert_eq!(lattice.pairs.size(), [2, slots - 1, count, count]);
            assert_eq!(lattice.walk().tokens.size(), [2, slots]);
        }
    }
}
