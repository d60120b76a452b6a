//! One layer of a causal transformer, as a value: attention and an MLP, with norms before or behind each.
//!
//! Families differ in which norms there are, in what stands between projections and scores, in what a layer sees and in its
//! MLP. All of that is handed in; no family has a layer of its own.

use tch::{Device, Tensor};

use super::activation::Activation;
use super::attention::{Options, attention};
use super::kv_cache::KvCache;
use super::linear::{Linear, linear_each};
use super::mask::PreparedMask;
use super::rms_norm::RmsNorm;
use super::rope::RopeTables;

/// What a layer does with each token for itself.
pub trait FeedForward: Send {
    /// `[.., H]` to `[.., H]`, in memory of its own.
    fn forward(&self, input: &Tensor) -> Tensor;
}

/// Gate and up projection of an MLP.
#[derive(Debug)]
pub enum GateUp {
    /// Two matrices, `[width, H]` each.
    Apart {
        /// What the activation is applied to.
        gate: Linear,
        /// What it is multiplied with.
        up: Linear,
    },
    /// One matrix, `[2 width, H]`, the gate's rows first.
    Joined(Linear),
}

/// `down(activation(gate x) * up x)`
#[derive(Debug)]
pub struct GatedMlp {
    /// The projections in.
    pub projection: GateUp,
    /// The projection back.
    pub down: Linear,
    /// What is applied to the gate.
    pub activation: Activation,
}

impl FeedForward for GatedMlp {
    fn forward(&self, input: &Tensor) -> Tensor {
        let gated = match &self.projection {
            GateUp::Apart { gate, up } => {
                let [gate, up] = linear_each(input, [gate.parts(), up.parts()]);
                self.activation.apply(gate) * up
            }
            GateUp::Joined(both) => {
                let both = both.forward(input); // [.., 2 width]
                let width = both.size().last().copied().unwrap_or(0) / 2;
                self.activation.apply(both.narrow(-1, 0, width).contiguous()) * both.narrow(-1, width, width)
            }
        }; // [.., width]
        self.down.forward(&gated)
    }
}

/// The projections of attention.
#[derive(Debug)]
pub enum QueryKeyValue {
    /// Three matrices.
    Apart {
        /// `[N D, H]`
        query: Linear,
        /// `[G D, H]`
        key: Linear,
        /// `[G D, H]`
        value: Linear,
    },
    /// One matrix, `[(N + 2 G) D, H]`: the rows of the queries, the keys and the values.
    Joined(Linear),
}

/// What queries and keys pass through before they turn.
#[derive(Debug)]
pub enum HeadNorms {
    /// Nothing.
    None,
    /// A norm over each head, weights `[D]`.
    EachHead {
        /// Of the queries.
        query: RmsNorm,
        /// Of the keys.
        key: RmsNorm,
    },
    /// A norm over all heads together, weights `[N D]` and `[G D]`.
    AllHeads {
        /// Of the queries.
        query: RmsNorm,
        /// Of the keys.
        key: RmsNorm,
    },
}

/// Causal attention with grouped heads.
#[derive(Debug)]
pub struct SelfAttention {
    /// Queries, keys and values.
    pub projection: QueryKeyValue,
    /// `[H, N D]`
    pub output: Linear,
    /// `N`
    pub heads: i64,
    /// `G`
    pub groups: i64,
    /// `D`
    pub head_dim: i64,
    /// Norms of queries and keys.
    pub norms: HeadNorms,
    /// Multiplies the scores; `1 / sqrt(D)` where it is not given.
    pub scale: Option<f64>,
    /// See [`Options::softcap`].
    pub softcap: Option<f64>,
    /// See [`Options::sinks`].
    pub sinks: Option<Tensor>,
}

impl SelfAttention {
    /// Projections of the input `[B, T, H]`: `[B, T, N D]` and twice `[B, T, G D]`.
    fn project(&self, input: &Tensor) -> [Tensor; 3] {
        match &self.projection {
            QueryKeyValue::Apart { query, key, value } => {
                linear_each(input, [query.parts(), key.parts(), value.parts()])
            }
            QueryKeyValue::Joined(all) => {
                let all = all.forward(input);
                let (query, group) = (self.heads * self.head_dim, self.groups * self.head_dim);
                [(0, query), (query, group), (query + group, group)].map(|(start, count)| all.narrow(-1, start, count))
            }
        }
    }

    /// `[B, T, H]` to `[B, T, H]`. Without tables, nothing turns.
    pub fn forward(
        &self,
        input: &Tensor,
        rope: Option<&RopeTables>,
        mask: &PreparedMask,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Tensor {
        let (rows, tokens, _) = input.size3().expect("hidden states are [B, T, H]");
        // 1. Project, norm and split into heads.
        let [query, key, value] = self.project(input);
        let (query, key) = match &self.norms {
            HeadNorms::AllHeads { query: of_query, key: of_key } => (of_query.forward(&query), of_key.forward(&key)),
            HeadNorms::None | HeadNorms::EachHead { .. } => (query, key),
        };
        let split = |projected: Tensor, heads: i64| projected.view([rows, tokens, heads, self.head_dim]);
        let (query, key) = (split(query, self.heads), split(key, self.groups)); // [B, T, N, D] and [B, T, G, D]
        let (query, key) = match &self.norms {
            HeadNorms::EachHead { query: of_query, key: of_key } => (of_query.forward(&query), of_key.forward(&key)),
            HeadNorms::None | HeadNorms::AllHeads { .. } => (query, key),
        };
        let (query, key) = (query.transpose(1, 2), key.transpose(1, 2)); // [B, N, T, D] and [B, G, T, D]
        let value = split(value, self.groups).transpose(1, 2); // [B, G, T, D]
        // 2. Rotate.
        let (query, key) = match rope {
            Some(rope) => (rope.rotate(&query), rope.rotate(&key)),
            None => (query, key),
        };
        // 3. Add the past.
        let (key, value) = match cache {
            Some((cache, layer)) => cache.write(layer, &key, &value), // [B, G, S, D]
            None => (key, value),
        };
        // 4. Attend and join the heads.
        let options = Options { scale: self.scale, softcap: self.softcap, sinks: self.sinks.as_ref() };
        let attended = attention(&query, &key, &value, mask, &options); // [B, N, T, D]
        let joined = attended.transpose(1, 2).reshape([rows, tokens, self.heads * self.head_dim]);
        self.output.forward(&joined) // [B, T, H]
    }
}

/// The norms around the two blocks of a layer; most layers have those before the blocks.
#[derive(Debug, Default)]
pub struct LayerNorms {
    /// Of what attention reads.
    pub before_attention: Option<RmsNorm>,
    /// Of what attention gives, before it is added.
    pub after_attention: Option<RmsNorm>,
    /// Of what the MLP reads.
    pub before_mlp: Option<RmsNorm>,
    /// Of what the MLP gives, before it is added.
    pub after_mlp: Option<RmsNorm>,
}

/// A layer.
pub struct DecoderLayer {
    /// Its attention.
    pub attention: SelfAttention,
    /// Its MLP.
    pub mlp: Box<dyn FeedForward>,
    /// Norms around both.
    pub norms: LayerNorms,
    /// Multiplies what each block gives before it is added; 1 for most.
    pub residual_scale: f64,
    /// Tokens that it sees, the one that looks included; `None` for all.
    pub window: Option<i64>,
    /// Which of the model's rotary embeddings turns its heads; `None` where nothing turns.
    pub rope: Option<usize>,
}

impl DecoderLayer {
    /// Where it runs.
    pub fn device(&self) -> Device {
        self.attention.output.weight.device()
    }

    /// `[B, T, H]` to `[B, T, H]`. The mask is one for the layer's window, the tables are those of its rotary embedding.
    pub fn forward(
        &self,
        input: &Tensor,
        rope: Option<&RopeTables>,
        mask: &PreparedMask,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Tensor {
        let norms = &self.norms;
        let attended = self.attention.forward(&read(input, norms.before_attention.as_ref()), rope, mask, cache);
        let hidden = self.add(attended, norms.after_attention.as_ref(), input);
        let fed = self.mlp.forward(&read(&hidden, norms.before_mlp.as_ref()));
        self.add(fed, norms.after_mlp.as_ref(), &hidden)
    }

    /// Each block's own output takes the sum: the input itself may have been captured.
    fn add(&self, block: Tensor, norm: Option<&RmsNorm>, input: &Tensor) -> Tensor {
        let block = match norm {
            Some(norm) => norm.forward(&block),
            None => block,
        };
        let mut scaled = if self.residual_scale == 1.0 { block } else { block * self.residual_scale };
        scaled.g_add_(input)
    }
}

fn read(input: &Tensor, norm: Option<&RmsNorm>) -> Tensor {
    norm.map_or_else(|| input.shallow_clone(), |norm| norm.forward(input))
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::nn::drawn::Drawn;
    use crate::nn::mask::Masks;
    use crate::nn::{AttentionMask, Rope, RopeConfig, RopeScaling};

    const OPTIONS: (Kind, Device) = (Kind::Double, Device::Cpu);

    fn stacked(parts: &[&Linear]) -> Linear {
        let weight = Tensor::cat(&parts.iter().map(|part| &part.weight).collect::<Vec<_>>(), 0);
        let biases: Vec<&Tensor> = parts.iter().filter_map(|part| part.bias.as_ref()).collect();
        Linear { weight, bias: Some(Tensor::cat(&biases, 0)) }
    }

    /// 6 heads in 2 groups of 4 channels, and a width of 10.
    fn layer(joined: bool) -> DecoderLayer {
        let drawn = Drawn::of(3);
        let linear = |out, input| {
            let (weight, bias) = (drawn.normal(&[out, input]) * 0.3, drawn.normal(&[out]));
            Linear { weight, bias: Some(bias) }
        };
        let norm = |width| RmsNorm { weight: drawn.normal(&[width]), epsilon: 1e-5 };
        let [query, key, value] = [24, 8, 8].map(|out| linear(out, 12));
        let [gate, up] = [10, 10].map(|out| linear(out, 12));
        let attention = SelfAttention {
            projection: match joined {
                true => QueryKeyValue::Joined(stacked(&[&query, &key, &value])),
                false => QueryKeyValue::Apart { query, key, value },
            },
            output: linear(12, 24),
            heads: 6,
            groups: 2,
            head_dim: 4,
            norms: HeadNorms::EachHead { query: norm(4), key: norm(4) },
            scale: Some(0.4),
            softcap: None,
            sinks: None,
        };
        let mlp = GatedMlp {
            projection: match joined {
                true => GateUp::Joined(stacked(&[&gate, &up])),
                false => GateUp::Apart { gate, up },
            },
            down: linear(12, 10),
            activation: Activation::Silu,
        };
        let norms = LayerNorms { after_attention: Some(norm(12)), before_mlp: Some(norm(12)), ..LayerNorms::default() };
        DecoderLayer { attention, mlp: Box::new(mlp), norms, residual_scale: 0.7, window: None, rope: Some(0) }
    }

    fn run(layer: &DecoderLayer, input: &Tensor) -> [Tensor; 2] {
        let positions = Tensor::arange(5, (Kind::Int64, Device::Cpu)).expand([2, 5], false);
        let scaling = RopeScaling::Default;
        let rope = RopeConfig { theta: 100.0, head_dim: 4, max_position_embeddings: 8, scaling };
        let tables = Rope::new(rope, Device::Cpu).tables(&positions, Kind::Double);
        let causal = AttentionMask::Causal;
        let mut masks = Masks::new(&causal, &positions);
        let attended = layer.attention.forward(input, Some(&tables), masks.of(None), None);
        [layer.forward(input, Some(&tables), masks.of(None), None), attended]
    }

    #[test]
    fn joined_projections_are_the_same_ones() {
        let input = Tensor::randn([2, 5, 12], OPTIONS);
        let [apart, joined] = [false, true].map(|joined| run(&layer(joined), &input)[0].shallow_clone());
        assert!((apart - joined).abs().max().double_value(&[]) < 1e-12);
    }

    /// The sum of a layer written out, and the input untouched: it may have been captured.
    #[test]
    fn what_blocks_give_is_normed_and_scaled_before_it_is_added() {
        let layer = layer(false);
        let input = Tensor::randn([2, 5, 12], OPTIONS);
        let before = input.copy();
        let [got, attended] = run(&layer, &input);
        assert!(input.equal(&before));
        let LayerNorms { after_attention: Some(after), before_mlp: Some(before), .. } = &layer.norms else { panic!() };
        let hidden = &input + after.forward(&attended) * 0.7;
        let want = &hidden + layer.mlp.forward(&before.forward(&hidden)) * 0.7;
        assert!((got - want).abs().max().double_value(&[]) < 1e-12);
    }
}
