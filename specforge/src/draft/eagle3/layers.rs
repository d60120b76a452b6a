//! The network: captured features and one token embedding in, a feature and logits out.
//!
//! One plain layer, except that it reads the embedding of the next token beside the feature, each normed by
//! itself. Rows are packed: a row is one position of one document, and attention works on runs of them.
//!
//! Shape legend: `n` rows (all `T` of a batch, or the `R` of a step), `H` hidden size, `TH` the target's, `N` heads, `G`
//! key/value heads, `D` head size, `I` keys of a row's own, `DV` draft vocabulary.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::config::Eagle3Shape;
use super::steps::{Step, Steps};
use crate::draft::Parameter;
use crate::error::{Error, Result};
use crate::nn::merged_attention::{self, Own, Runs};
use crate::nn::rope::RopeTables;
use crate::nn::{
    Head, KvCache, Options, PreparedMask, RmsNorm, Rope, attention, gated_linear, linear, linear_each, trained_linear,
};

/// The draft's weights, by what they do. They share their memory with the trained parameters.
#[derive(Debug)]
pub struct Network {
    embedding: Tensor,
    input_norm: Option<RmsNorm>,
    fc_norms: Vec<RmsNorm>,
    fc: Tensor,
    pub(in crate::draft) layers: Vec<Layer>,
    norm: Option<RmsNorm>,
    head: Head,
    rope: Rope,
    pub(in crate::draft) shape: Eagle3Shape,
}

#[derive(Debug)]
pub(in crate::draft) struct Layer {
    /// Of the feature; the first layer's alone.
    hidden_norm: Option<RmsNorm>,
    input_norm: RmsNorm,
    query: Tensor,
    key: Tensor,
    /// Of each head of queries and of keys.
    head_norms: Option<[RmsNorm; 2]>,
    value: Tensor,
    output: Tensor,
    post_attention_norm: RmsNorm,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    head_dim: i64,
    norm_before_residual: bool,
}

/// Keys and values of each layer: of every row from step 0, `[T, G, D]`, or of each row's own, `[R, I, G, D]`.
pub type LayerKeys = Vec<[Tensor; 2]>;

impl Network {
    /// The network over the trained parameters; `embedding [V, H]` is used where none of them is: the target's bare table.
    /// A scale of the target's embedding is left out, in training as in decoding: the first layer norms what it reads, which
    /// undoes any scale, and engines hand a draft the table.
    pub fn new(shape: &Eagle3Shape, parameters: &[Parameter], embedding: &Tensor, device: Device) -> Result<Self> {
        let values: HashMap<&str, &Tensor> =
            parameters.iter().map(|parameter| (parameter.name.as_str(), &parameter.value)).collect();
        let find = |name: String| {
            let value = values.get(format!("{name}.weight").as_str()).map(|value| value.shallow_clone());
            value.ok_or_else(|| Error::Failed(format!("EAGLE-3: there is no parameter `{name}.weight`")))
        };
        let epsilon = shape.layer.rms_norm_eps;
        let norm = |name: String| Ok::<_, Error>(RmsNorm { weight: find(name)?, epsilon });
        let optional = |wanted: bool, name: &str| wanted.then(|| norm(name.to_owned())).transpose();
        let fc_norms = if shape.fc_norm { shape.capture.len() } else { 0 };
        let layer = |index: usize| {
            let prefix = Eagle3Shape::layer_prefix(index);
            let at = |name: &str| format!("{prefix}.{name}");
            Ok::<_, Error>(Layer {
                hidden_norm: optional(index == 0, &at("hidden_norm"))?,
                input_norm: norm(at("input_layernorm"))?,
                query: find(at("self_attn.q_proj"))?,
                key: find(at("self_attn.k_proj"))?,
                head_norms: match shape.head_norms {
                    true => Some([norm(at("self_attn.q_norm"))?, norm(at("self_attn.k_norm"))?]),
                    false => None,
                },
                value: find(at("self_attn.v_proj"))?,
                output: find(at("self_attn.o_proj"))?,
                post_attention_norm: norm(at("post_attention_layernorm"))?,
                gate: find(at("mlp.gate_proj"))?,
                up: find(at("mlp.up_proj"))?,
                down: find(at("mlp.down_proj"))?,
                head_dim: shape.layer.head_dim,
                norm_before_residual: shape.norm_before_residual,
            })
        };
        Ok(Self {
            embedding: find("embed_tokens".to_owned()).unwrap_or_else(|_| embedding.shallow_clone()),
            input_norm: optional(shape.norm_before_fc, "input_norm")?,
            fc_norms: (0..fc_norms).map(|index| norm(format!("fc_norm.{index}"))).collect::<Result<_>>()?,
            fc: find("fc".to_owned())?,
            layers: (0..shape.num_layers).map(layer).collect::<Result<_>>()?,
            norm: optional(shape.norm_output || shape.norm_feedback, "norm")?,
            head: Head::plain(find("lm_head".to_owned())?),
            rope: Rope::new(shape.layer.rope, device),
            shape: shape.clone(),
        })
    }

    /// Element type of what it computes; weights may be [`compact`](crate::nn::compact).
    pub fn kind(&self) -> Kind {
        self.layers[0].input_norm.weight.kind()
    }

    /// The vocabulary projection: a trained matrix `[DV, H]` and nothing else.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Captured features, `[n, TH]` each, to the draft's width: `[n, H]`.
    pub fn project_hidden_states(&self, captured: &[Tensor]) -> Result<Tensor> {
        let kind = self.kind();
        let parts: Vec<Tensor> = captured
            .iter()
            .enumerate()
            .map(|(index, part)| match self.fc_norms.get(index) {
                Some(norm) => norm.forward(&part.to_kind(kind)),
                None => part.to_kind(kind),
            })
            .collect();
        let mut wide = Tensor::cat(&parts, 1); // [n, captured * TH]
        if let Some(norm) = &self.input_norm {
            wide = norm.forward(&wide);
        }
        Ok(linear(&wide, &self.fc, None)) // [n, H]
    }

    /// Embeddings of token ids `[n]`: `[n, H]`.
    pub fn embed_input_ids(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(Tensor::f_embedding(&self.embedding, ids, -1, false, false)?.to_kind(self.kind()))
    }

    /// Runs all steps from the projected features of every row, `[T, H]`. Returns what each step's rows become, `[R, H]`,
    /// before any norm.
    pub fn backbone(&self, plan: &Steps, features: &Tensor) -> Result<Vec<Tensor>> {
        let Some(first) = plan.steps.first() else {
            return Ok(Vec::new());
        };
        let (hidden, shared) = self.first_step(plan, first, features)?;
        let mut own = no_own_keys(first, &shared)?;
        let mut outputs = vec![hidden];
        for step in &plan.steps[1..] {
            let (hidden, longer) = self.later_step(step, &outputs[outputs.len() - 1], &shared, &own)?;
            own = longer;
            outputs.push(hidden);
        }
        Ok(outputs)
    }

    /// What the vocabulary projection reads of the trained rows of a step's output: `[M, H]`.
    pub fn trained_rows(&self, step: &Step, hidden: &Tensor) -> Tensor {
        match step.trained.size()[0] == step.len {
            true => self.normed(hidden),
            false => self.normed(&hidden.index_select(0, &step.trained)),
        }
    }

    /// What the vocabulary projection reads of a step's output.
    pub fn normed(&self, hidden: &Tensor) -> Tensor {
        match &self.norm {
            Some(norm) if self.shape.norm_output => norm.forward(hidden),
            _ => hidden.shallow_clone(),
        }
    }

    /// Logits of rows `[n, H]`: `[n, DV]`.
    pub fn compute_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        trained_linear(&self.normed(hidden), &self.head.weight)
    }

    /// What the next step reads of a step's output.
    pub(super) fn feature(&self, hidden: &Tensor) -> Tensor {
        match &self.norm {
            Some(norm) if self.shape.norm_feedback => norm.forward(hidden),
            _ => hidden.shallow_clone(),
        }
    }

    /// Step 0: keys of every row; queries, and everything after them, of the step's rows alone. Below the last layer,
    /// every row is computed, since the layer above needs its keys. Returns the rows' output and every layer's keys.
    pub(super) fn first_step(&self, plan: &Steps, first: &Step, features: &Tensor) -> Result<(Tensor, LayerKeys)> {
        let embedded = self.embed_input_ids(&plan.tokens)?; // [T, H]
        let rope = self.tables(&plan.positions);
        let step_rope = self.tables(&first.positions);
        let mut hidden = features.shallow_clone(); // [T, H]
        let mut keys = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let (input, residual) = layer.read(&embedded, &hidden);
            let shared = layer.keys(&input, &rope)?;
            let last = index + 1 == self.layers.len();
            let rows = if last { first.len } else { features.size()[0] };
            let none = merged_attention::no_own_keys(rows, &shared[0])?;
            let own = [&none, &none];
            hidden = if last {
                let select = |tensor: Tensor| tensor.index_select(0, &first.rows);
                layer.mix(&select(input), &select(residual), &step_rope, &shared, own, &first.runs)?
            } else {
                layer.mix(&input, &residual, &rope, &shared, own, &plan.runs)?
            };
            keys.push(shared);
        }
        Ok((hidden, keys))
    }

    /// A later step, from the output of the step before and each of its rows' own keys: every layer adds one of those.
    /// Returns the rows' output and their own keys.
    pub(super) fn later_step(
        &self,
        step: &Step,
        previous: &Tensor,
        shared: &LayerKeys,
        own: &LayerKeys,
    ) -> Result<(Tensor, LayerKeys)> {
        let embedded = self.embed_input_ids(&step.tokens)?; // [R, H]
        let rope = self.tables(&step.positions);
        let mut hidden = self.feature(previous).index_select(0, &step.kept); // [R, H]
        let mut longer = Vec::new();
        for (layer, (shared, own)) in self.layers.iter().zip(shared.iter().zip(own)) {
            let (input, residual) = layer.read(&embedded, &hidden);
            let [key, value] = layer.keys(&input, &rope)?; // [R, G, D]
            let add = |own: &Tensor, new: Tensor| Tensor::cat(&[own.index_select(0, &step.kept), new.unsqueeze(1)], 1);
            let own = [add(&own[0], key), add(&own[1], value)]; // [R, I, G, D]
            hidden = layer.mix(&input, &residual, &rope, shared, [&own[0], &own[1]], &step.runs)?;
            longer.push(own);
        }
        Ok((hidden, longer))
    }

    /// cos and sin for `positions [n]`, a row of one token each.
    pub(in crate::draft) fn tables(&self, positions: &Tensor) -> RopeTables {
        self.rope.tables(&positions.unsqueeze(1), self.kind())
    }
}

impl Layer {
    /// What the projections read, `[n, 2H]` in the first layer and `[n, H]` above it, and the residual, `[n, H]`.
    pub(in crate::draft) fn read(&self, embedded: &Tensor, hidden: &Tensor) -> (Tensor, Tensor) {
        let Some(norm) = &self.hidden_norm else {
            return (self.input_norm.forward(hidden), hidden.shallow_clone());
        };
        let normed = norm.forward(hidden); // [n, H]
        let input = Tensor::cat(&[&self.input_norm.forward(embedded), &normed], 1); // [n, 2H]
        (input, if self.norm_before_residual { normed } else { hidden.shallow_clone() })
    }

    /// Rotated keys, and values: `[n, G, D]` each. One row of input may stand for all that `rope` has places of.
    pub(in crate::draft) fn keys(&self, input: &Tensor, rope: &RopeTables) -> Result<[Tensor; 2]> {
        let key = self.split(&trained_linear(input, &self.key)?);
        let key = rope.rotate_rows(&key, self.head_norm(1)); // [n, G, D]
        let value = self.split(&trained_linear(input, &self.value)?).f_expand(key.size(), false)?;
        Ok([key, value])
    }

    /// Rotated queries: `[n, N, D]`; see [`Layer::keys`].
    pub(in crate::draft) fn query(&self, input: &Tensor, rope: &RopeTables) -> Result<Tensor> {
        let query = self.split(&trained_linear(input, &self.query)?);
        Ok(rope.rotate_rows(&query, self.head_norm(0)))
    }

    /// Attention and MLP of rows: `[n, H]`.
    pub(in crate::draft) fn mix(
        &self,
        input: &Tensor,
        residual: &Tensor,
        rope: &RopeTables,
        shared: &[Tensor; 2],
        own: [&Tensor; 2],
        runs: &Runs,
    ) -> Result<Tensor> {
        let query = self.query(input, rope)?; // [n, N, D]
        let own = Own { key: own[0], value: own[1], queries_per_own: 1, hidden: None };
        let attended = merged_attention::merged_attention(&query, [&shared[0], &shared[1]], own, runs)?; // [n, N, D]
        self.finish(residual, &attended)
    }

    /// What follows attention: its projection and the MLP, from `attended [n, N, D]` and the residual, `[n, H]` or one row
    /// for all.
    pub(in crate::draft) fn finish(&self, residual: &Tensor, attended: &Tensor) -> Result<Tensor> {
        let hidden = residual + trained_linear(&attended.flatten(1, 2), &self.output)?; // [n, H]
        let normed = self.post_attention_norm.forward(&hidden);
        let (gate, up) = (trained_linear(&normed, &self.gate)?, trained_linear(&normed, &self.up)?);
        Ok(hidden + gated_linear(&gate, &up, &self.down)?) // [n, H]
    }

    /// The same of `[B * T]` rows without gradients, on keys that a cache keeps: row `b * T + t` sees what query `t` of
    /// row `b` may see. Writes the new keys behind those of layer `index`.
    pub(in crate::draft) fn mix_cached(
        &self,
        (input, residual): (&Tensor, &Tensor),
        rope: &RopeTables,
        mask: &PreparedMask,
        (index, cache): (usize, &mut KvCache),
    ) -> Tensor {
        // [B * T, heads, D] to [B, heads, T, D]
        let batch = |heads: &Tensor| heads.unflatten(0, [cache.rows(), -1]).transpose(1, 2).contiguous();
        let turned = |place: usize, heads: &Tensor| batch(&rope.rotate_rows(&self.split(heads), self.head_norm(place)));
        let [query, key, value] =
            linear_each(input, [&self.query, &self.key, &self.value].map(|weight| (weight, None)));
        let (query, key) = (turned(0, &query), turned(1, &key)); // [B, N, T, D], [B, G, T, D]
        let value = batch(&self.split(&value));
        let (keys, values) = cache.write(index, &key, &value); // [B, G, S, D]
        let attended =
            attention(&query, &keys, &values, mask, &Options::default()).transpose(1, 2).flatten(0, 1).flatten(1, 2); // [B * T, N * D]
        let hidden = residual + linear(&attended, &self.output, None); // [B * T, H]
        let normed = self.post_attention_norm.forward(&hidden);
        let [gate, up] = linear_each(&normed, [(&self.gate, None), (&self.up, None)]);
        hidden + linear(&(gate.silu() * up), &self.down, None) // [B * T, H]
    }

    /// The norm of heads of queries (0) or keys (1), where there is one.
    fn head_norm(&self, place: usize) -> Option<&RmsNorm> {
        self.head_norms.as_ref().map(|norms| &norms[place])
    }

    /// `[n, heads * D]` to `[n, heads, D]`
    fn split(&self, projected: &Tensor) -> Tensor {
        projected.view([projected.size()[0], projected.size()[1] / self.head_dim, self.head_dim])
    }
}

/// What the rows of step 0 have of their own: nothing, `[R, 0, G, D]`.
pub(super) fn no_own_keys(first: &Step, shared: &LayerKeys) -> Result<LayerKeys> {
    let none = |keys: &[Tensor; 2]| merged_attention::no_own_keys(first.len, &keys[0]);
    shared.iter().map(|keys| Ok([none(keys)?, none(keys)?])).collect()
}
