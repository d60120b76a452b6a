//! Rotary position embedding (Su et al. 2021, <https://arxiv.org/abs/2104.09864>) and its long-context variants, as
//! Hugging Face's `modeling_rope_utils.py` defines them. Tables are float32 whatever the model's element type is.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::RmsNorm;
use crate::device;
use crate::shim;

/// How frequencies are stretched for contexts longer than the model was pretrained on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum RopeScaling {
    /// As pretrained.
    Default,
    /// Positions divided by `factor`.
    Linear {
        /// Stretch.
        factor: f64,
    },
    /// Base grows with the length of the sequence once it is longer than `max_position_embeddings` (NTK-aware).
    Dynamic {
        /// Stretch.
        factor: f64,
    },
    /// Llama 3.1: low frequencies stretched, high ones kept, a ramp between.
    Llama3 {
        /// Stretch of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are stretched.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of pretraining.
        original_max_position_embeddings: f64,
    },
    /// YaRN (Peng et al. 2023, <https://arxiv.org/abs/2309.00071>).
    Yarn {
        /// Stretch of the interpolated dimensions.
        factor: f64,
        /// Multiplies cos and sin.
        attention_factor: f64,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated.
        beta_slow: f64,
        /// Context length of pretraining.
        original_max_position_embeddings: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
}

/// Everything rotary tables depend on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Channels of a head that turn: `D`, or fewer where a family turns a part.
    pub head_dim: i64,
    /// Context length of the model.
    pub max_position_embeddings: i64,
    /// Variant.
    pub scaling: RopeScaling,
}

impl RopeConfig {
    /// What each pair of channels turns by at each position, `[D / 2]` float32 on the CPU.
    pub fn frequencies(&self) -> Tensor {
        inverse_frequencies(self)
    }

    /// Refuses numbers that make no finite tables: they come from files.
    pub fn check(&self) -> Result<(), String> {
        let attention_factor = match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            // The base grows with a power of D / (D - 2).
            RopeScaling::Dynamic { .. } if self.head_dim <= 2 => f64::INFINITY,
            _ => 1.0,
        };
        let frequencies = || inverse_frequencies(self).isfinite().all().int64_value(&[]) == 1;
        match (attention_factor as f32).is_finite() && frequencies() {
            true => Ok(()),
            false => Err(format!("rope scaling: no finite frequencies follow from {self:?}")),
        }
    }
}

/// LongRoPE (Ding et al. 2024, <https://arxiv.org/abs/2402.13753>): each pair of channels has two factors of its own, one for
/// texts within the context of pretraining and one for longer ones.
#[derive(Debug, Clone, PartialEq)]
pub struct LongRope {
    /// Base and channels; its variant is not looked at.
    pub config: RopeConfig,
    /// What frequencies are divided by in short texts, `D / 2` numbers.
    pub short: Vec<f64>,
    /// The same in long ones.
    pub long: Vec<f64>,
    /// Context length of pretraining: texts of more tokens are long.
    pub original_max_position_embeddings: f64,
    /// Multiplies cos and sin.
    pub attention_factor: f64,
}

impl LongRope {
    /// Refuses numbers that make no finite tables: they come from files.
    pub fn check(&self) -> Result<(), String> {
        self.config.check()?;
        let pairs = (self.config.head_dim / 2) as usize;
        for (key, factors) in [("short_factor", &self.short), ("long_factor", &self.long)] {
            if factors.len() != pairs {
                let got = factors.len();
                return Err(format!("rope scaling: `{key}`: expected {pairs} numbers, one for each pair, got {got}"));
            }
        }
        let is_finite = |factors: &[f64]| self.frequencies(factors).isfinite().all().int64_value(&[]) == 1;
        match (self.attention_factor as f32).is_finite() && is_finite(&self.short) && is_finite(&self.long) {
            true => Ok(()),
            false => Err("rope scaling: no finite frequencies follow from `short_factor` and `long_factor`".to_owned()),
        }
    }

    /// Computed as the reference does it: the base to its power first, then the factor.
    fn frequencies(&self, factors: &[f64]) -> Tensor {
        let factors = Tensor::from_slice(factors).to_kind(Kind::Float);
        (factors * Tensor::pow_scalar(self.config.theta, &exponents(self.config.head_dim))).reciprocal() // [D / 2]
    }
}

/// Rotary embedding of one model.
#[derive(Debug)]
pub struct Rope {
    config: RopeConfig,
    /// `[D / 2]` float32
    inverse_frequencies: Tensor,
    /// The same for long texts, and how many tokens a short one has at most.
    long: Option<(Tensor, i64)>,
    /// Multiplies cos and sin (YaRN, LongRoPE; 1 otherwise).
    attention_factor: f64,
}

/// cos and sin of one pass, each `[B, 1, T, D]`, in the element type of the heads.
#[derive(Debug)]
pub struct RopeTables {
    /// Both halves alike.
    cos: Tensor,
    /// The first half negated, so that turning a head is only swapping its halves.
    sin: Tensor,
}

impl Rope {
    /// Frequencies for a configuration.
    pub fn new(config: RopeConfig, device: Device) -> Self {
        let attention_factor = match config.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        };
        let inverse_frequencies = inverse_frequencies(&config).to_device(device);
        Self { config, inverse_frequencies, long: None, attention_factor }
    }

    /// Frequencies that change with the length of a text.
    pub fn of_lengths(rope: &LongRope, device: Device) -> Self {
        let [short, long] = [&rope.short, &rope.long].map(|factors| rope.frequencies(factors).to_device(device));
        let pretrained = rope.original_max_position_embeddings as i64;
        Self {
            config: rope.config,
            inverse_frequencies: short,
            long: Some((long, pretrained)),
            attention_factor: rope.attention_factor,
        }
    }

    /// Tables for `positions [B, T]`.
    pub fn tables(&self, positions: &Tensor, kind: Kind) -> RopeTables {
        let frequencies = match (&self.long, self.config.scaling) {
            (Some((long, pretrained)), _) => {
                let is_long = last_positions(positions).ge(*pretrained).unsqueeze(-1); // [B, T, 1]
                long.where_self(&is_long, &self.inverse_frequencies) // [B, T, D / 2]
            }
            (None, RopeScaling::Dynamic { factor }) => self.dynamic_frequencies(positions, factor), // [B, T, D / 2]
            (None, _) => self.inverse_frequencies.shallow_clone(),                                  // [D / 2]
        };
        let angles = (positions.to_kind(Kind::Float).unsqueeze(-1) * frequencies).unsqueeze(1); // [B, 1, T, D / 2]
        let (cos, sin) = (angles.cos() * self.attention_factor, angles.sin() * self.attention_factor);
        let cos = Tensor::cat(&[&cos, &cos], -1).to_kind(kind); // [B, 1, T, D]
        let sin = Tensor::cat(&[&sin.neg(), &sin], -1).to_kind(kind); // [B, 1, T, D]
        RopeTables { cos, sin }
    }

    /// Dynamic scaling looks at the longest position of the pass, each text for itself, so that a batch equals its rows alone
    /// and a pack its documents. A text within the pretrained length keeps its frequencies to the last bit.
    fn dynamic_frequencies(&self, positions: &Tensor, factor: f64) -> Tensor {
        let (pretrained, dim) = (self.config.max_position_embeddings as f64, self.config.head_dim as f64);
        let length: Tensor = last_positions(positions).unsqueeze(-1) + 1; // [B, T, 1]
        let length = length.to_kind(Kind::Float).clamp_min(pretrained);
        let growth: Tensor = length * factor / pretrained - (factor - 1.0);
        let theta: Tensor = growth.pow_tensor_scalar(dim / (dim - 2.0)) * self.config.theta;
        theta.pow(&device::send(&exponents(self.config.head_dim), positions.device())).reciprocal() // [B, T, D / 2]
    }
}

impl RopeTables {
    /// Rotates `[B, N, T, D]` in halves: `(x1, x2)` becomes `(x1 cos - x2 sin, x2 cos + x1 sin)`. Tables that are narrower
    /// than the heads turn the first channels and leave the others.
    pub fn rotate(&self, heads: &Tensor) -> Tensor {
        let (turned, all) = (self.cos.size()[3], heads.size()[3]);
        if turned < all {
            let first = self.rotate(&heads.narrow(3, 0, turned));
            // Heads of one row may stand for all that there are tables of.
            let mut shape = first.size();
            shape[3] = all - turned;
            return Tensor::cat(&[&first, &heads.narrow(3, turned, all - turned).expand(&shape, false)], 3);
        }
        let half = turned / 2;
        let (first, second) = (heads.narrow(3, 0, half), heads.narrow(3, half, half));
        let swapped = Tensor::cat(&[second, first], 3); // [B, N, T, D]
        (heads * &self.cos).addcmul_(&swapped, &self.sin)
    }

    /// Heads of `n` rows, `[n, N, D]`, each behind `norm` where there is one, rotated by the tables of `n` texts of one token.
    /// Heads of one row may stand for all that there are tables of.
    pub fn rotate_rows(&self, heads: &Tensor, norm: Option<&RmsNorm>) -> Tensor {
        if heads.size()[0] == self.cos.size()[0] {
            let norm = norm.map(|norm| (&norm.weight, norm.epsilon));
            if let Some(rotated) = shim::normed_rows(heads, norm, Some([&self.cos, &self.sin])) {
                return rotated;
            }
        }
        let heads = norm.map_or_else(|| heads.shallow_clone(), |norm| norm.forward(heads));
        self.rotate(&heads.unsqueeze(2)).squeeze_dim(2)
    }
}

/// More than any position, and little enough that as many of them as tokens fit into 64 bits.
const FAR: i64 = 1 << 40;

/// The largest position of the text that each of `positions [B, T]` belongs to, `[B, T]`. In a pack, a text begins where
/// positions begin again at 0.
fn last_positions(positions: &Tensor) -> Tensor {
    // Texts one behind the other and far from each other: what was largest so far is of the own text.
    let place = positions.eq(0).cumsum(1, Kind::Int64) * FAR; // [B, T]
    let (before, _) = (positions + &place).cummax(1);
    let (behind, _) = (positions - &place).flip([1]).cummax(1);
    (before - &place).maximum(&(behind.flip([1]) + &place))
}

/// `2i / D`
fn exponents(head_dim: i64) -> Tensor {
    Tensor::arange_start_step(0, head_dim, 2, (Kind::Int64, Device::Cpu)).to_kind(Kind::Float) / head_dim as f64
}

/// `theta^(-2i / D)`, computed as PyTorch does it so that tables agree to the last bit.
fn default_frequencies(theta: f64, head_dim: i64) -> Tensor {
    Tensor::pow_scalar(theta, &exponents(head_dim)).reciprocal() // [D / 2]
}

fn inverse_frequencies(config: &RopeConfig) -> Tensor {
    let default = default_frequencies(config.theta, config.head_dim);
    match config.scaling {
        RopeScaling::Default | RopeScaling::Dynamic { .. } => default,
        RopeScaling::Linear { factor } => default / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let wavelengths = default.reciprocal() * std::f64::consts::TAU; // [D / 2]
            let longest = original_max_position_embeddings / low_freq_factor;
            let shortest = original_max_position_embeddings / high_freq_factor;
            let stretched = default.where_self(&wavelengths.le(longest), &(&default / factor));
            let kept_share = (wavelengths.reciprocal() * original_max_position_embeddings - low_freq_factor)
                / (high_freq_factor - low_freq_factor);
            let ramp = (kept_share.ones_like() - &kept_share) * &stretched / factor + &kept_share * &stretched;
            let between = wavelengths.ge(shortest).logical_and(&wavelengths.le(longest));
            ramp.where_self(&between, &stretched)
        }
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_max_position_embeddings, truncate, .. } => {
            let dim = config.head_dim as f64;
            // The dimension that turns `rotations` times within the pretrained context.
            let dimension_of = |rotations: f64| {
                dim * (original_max_position_embeddings / (rotations * std::f64::consts::TAU)).ln()
                    / (2.0 * config.theta.ln())
            };
            let (mut low, mut high) = (dimension_of(beta_fast), dimension_of(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            (low, high) = (low.max(0.0), high.min(dim - 1.0));
            if low == high {
                high += 0.001; // as the reference does, to avoid a division by zero
            }
            let ramp = ((Tensor::arange(config.head_dim / 2, (Kind::Float, Device::Cpu)) - low) / (high - low))
                .clamp(0.0, 1.0);
            let kept = ramp.ones_like() - &ramp;
            (&default / factor) * (kept.ones_like() - &kept) + &default * &kept
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::drawn::Drawn;

    fn rope(scaling: RopeScaling) -> Rope {
        let config = RopeConfig { theta: 1000.0, head_dim: 8, max_position_embeddings: 16, scaling };
        Rope::new(config, Device::Cpu)
    }

    fn positions(rows: &[[i64; 2]]) -> Tensor {
        Tensor::from_slice2(rows)
    }

    #[test]
    fn a_rotation_turns_pairs_by_their_angle_and_keeps_lengths() {
        let tables = rope(RopeScaling::Default).tables(&positions(&[[0, 5]]), Kind::Double);
        let heads = Tensor::randn([1, 3, 2, 8], (Kind::Double, Device::Cpu));
        let turned = tables.rotate(&heads);
        assert!(turned.select(2, 0).equal(&heads.select(2, 0)));
        for pair in 0..4 {
            let angle = 5.0 * 1000f64.powf(-2.0 * pair as f64 / 8.0);
            let at = |tensor: &Tensor, dim: i64| tensor.double_value(&[0, 1, 1, dim]);
            let (first, second) = (at(&heads, pair), at(&heads, pair + 4));
            assert!((at(&turned, pair) - (first * angle.cos() - second * angle.sin())).abs() < 1e-6);
            assert!((at(&turned, pair + 4) - (second * angle.cos() + first * angle.sin())).abs() < 1e-6);
        }
        let wider = Tensor::randn([1, 3, 2, 12], (Kind::Double, Device::Cpu));
        let part = tables.rotate(&wider);
        assert!(part.narrow(3, 0, 8).equal(&tables.rotate(&wider.narrow(3, 0, 8))));
        assert!(part.narrow(3, 8, 4).equal(&wider.narrow(3, 8, 4)));
    }

    /// One kernel for float32, operators for float64: rows, and gradients of heads and norm.
    #[test]
    fn rows_are_normed_and_rotated_as_by_operators() {
        let drawn = Drawn::of(11);
        for (dim, turned) in [(64, 64), (24, 24), (40, 16), (6, 2)] {
            let config = RopeConfig {
                theta: 1000.0,
                head_dim: turned,
                max_position_embeddings: 16,
                scaling: RopeScaling::Default,
            };
            let positions = Tensor::from_slice(&[0i64, 3, 9, 100, 7]).unsqueeze(1);
            let (heads, weight, slope) =
                (drawn.normal(&[5, 3, dim]) * 2.0, drawn.normal(&[dim]), drawn.normal(&[5, 3, dim]));
            for normed in [true, false] {
                let [exact, got] = [Kind::Double, Kind::Float].map(|kind| {
                    let [heads, weight] =
                        [&heads, &weight].map(|tensor| tensor.to_kind(kind).copy().set_requires_grad(true));
                    let norm = normed.then(|| RmsNorm { weight: weight.shallow_clone(), epsilon: 1e-3 });
                    let tables = Rope::new(config, Device::Cpu).tables(&positions, kind);
                    let rows = tables.rotate_rows(&heads, norm.as_ref());
                    (&rows * slope.to_kind(kind)).sum(kind).backward();
                    let weight_slope = if normed { weight.grad() } else { weight.zeros_like() };
                    [rows, heads.grad(), weight_slope].map(|tensor| tensor.to_kind(Kind::Double))
                });
                for (got, want) in got.iter().zip(&exact) {
                    assert!(got.allclose(want, 1e-5, 1e-5, false), "{dim} {turned} {normed}: {got} {want}");
                }
                let one = heads.narrow(0, 0, 1).to_kind(Kind::Float);
                let tables = Rope::new(config, Device::Cpu).tables(&positions, Kind::Float);
                let all = tables.rotate_rows(&one.expand([5, 3, dim], false), None);
                assert!(tables.rotate_rows(&one, None).allclose(&all, 1e-6, 1e-6, false));
            }
        }
    }

    /// Each text for itself: in a batch, and in a pack. A text of exactly the context of pretraining is short.
    #[test]
    fn long_texts_have_frequencies_of_their_own() {
        let config =
            RopeConfig { theta: 1000.0, head_dim: 4, max_position_embeddings: 64, scaling: RopeScaling::Default };
        let long_rope = LongRope {
            config,
            short: vec![1.0, 2.0],
            long: vec![3.0, 5.0],
            original_max_position_embeddings: 4.0,
            attention_factor: 1.5,
        };
        long_rope.check().unwrap();
        assert!(LongRope { long: vec![1.0], ..long_rope.clone() }.check().unwrap_err().contains("long_factor"));
        assert!(LongRope { short: vec![0.0, 1.0], ..long_rope.clone() }.check().is_err());
        let rope = Rope::of_lengths(&long_rope, Device::Cpu);
        let angle = |position: i64, pair: usize, long: bool| {
            let factor = if long { long_rope.long[pair] } else { long_rope.short[pair] };
            position as f64 / factor / 1000f64.powf(pair as f64 / 2.0)
        };
        let check = |positions: &[&[i64]], long: &[&[bool]]| {
            let shape = [positions.len() as i64, positions[0].len() as i64];
            let tables = rope.tables(&Tensor::from_slice(&positions.concat()).view(shape), Kind::Double);
            for (row, (positions, long)) in positions.iter().zip(long).enumerate() {
                for (token, (&position, &long)) in positions.iter().zip(*long).enumerate() {
                    for pair in 0..2 {
                        let got = tables.cos.double_value(&[row as i64, 0, token as i64, pair as i64]);
                        let want = 1.5 * angle(position, pair, long).cos();
                        assert!((got - want).abs() < 1e-5, "{positions:?} {token} {pair}: {got} and not {want}");
                    }
                }
            }
        };
        let (short, long) = ([false; 4], [true; 5]);
        check(&[&[0, 1, 2, 3], &[3, 4, 4, 5]], &[&short, &[true; 4]]);
        check(&[&[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1]], &[&[&short[..], &long, &short[..2]].concat()]);
    }

    /// A long row must not stretch its neighbours, or a batch would not equal its rows alone.
    #[test]
    fn dynamic_scaling_is_each_rows_own() {
        let dynamic = rope(RopeScaling::Dynamic { factor: 2.0 });
        let batch = dynamic.tables(&positions(&[[3, 4], [30, 31]]), Kind::Float);
        let default = rope(RopeScaling::Default).tables(&positions(&[[3, 4], [30, 31]]), Kind::Float);
        assert!(batch.cos.get(0).equal(&default.cos.get(0)));
        assert!(!batch.cos.get(1).equal(&default.cos.get(1)));
        assert!(batch.sin.get(1).equal(&dynamic.tables(&positions(&[[30, 31]]), Kind::Float).sin.get(0)));
    }
}
