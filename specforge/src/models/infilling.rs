//! A masked diffusion model of plain layers: what a causal model becomes when its tokens see those behind them. Every family of
//! masked diffusion writes one as a configuration of its own.

use super::info::{LayerShape, MaskedDiffusion, TargetInfo};
use crate::nn::RopeScaling;

/// Its sizes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Infilling {
    /// `H`
    pub hidden_size: i64,
    /// `V`
    pub vocab_size: i64,
    /// Number of layers.
    pub num_layers: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Each of its layers.
    pub layer: LayerShape,
    /// What makes it one.
    pub diffusion: MaskedDiffusion,
}

/// A tensor of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfillingTensor {
    /// The name that most families give it.
    pub usual: String,
    /// Its shape.
    pub shape: Vec<i64>,
}

impl Infilling {
    /// One of the shape of a causal model of plain layers.
    pub fn of(target: &TargetInfo, diffusion: MaskedDiffusion) -> Self {
        let tables = (target.vocab_size * target.hidden_size) as u64;
        Self {
            hidden_size: target.hidden_size,
            vocab_size: target.vocab_size,
            num_layers: target.num_layers(),
            tied: target.parameters.tables <= tables,
            layer: target.draft_template(),
            diffusion,
        }
    }

    /// Refuses what no family of masked diffusion can write down.
    pub fn check(&self) -> Result<(), String> {
        let rope = &self.layer.rope;
        if rope.scaling != RopeScaling::Default {
            return Err("its rotary embedding is scaled, which masked diffusion models have no key for".to_owned());
        }
        let LayerShape { num_attention_heads, head_dim, .. } = self.layer;
        if num_attention_heads * head_dim != self.hidden_size {
            let hidden = self.hidden_size;
            return Err(format!(
                "its {num_attention_heads} heads of {head_dim} channels are not its width of {hidden}, which masked diffusion \
                 models have no key for"
            ));
        }
        self.layer.check()?;
        self.diffusion.check(self.vocab_size)
    }

    /// Every tensor, in the order of the model's file.
    pub fn tensors(&self) -> Vec<InfillingTensor> {
        let hidden = self.hidden_size;
        let LayerShape { intermediate_size: width, num_attention_heads, num_key_value_heads, head_dim, .. } =
            self.layer;
        let (query, group) = (num_attention_heads * head_dim, num_key_value_heads * head_dim);
        let mut tensors = Vec::new();
        let mut add = |usual: String, shape: &[i64]| tensors.push(InfillingTensor { usual, shape: shape.to_vec() });
        add("model.embed_tokens.weight".to_owned(), &[self.vocab_size, hidden]);
        for layer in 0..self.num_layers {
            let mut of_layer = |name: &str, shape: &[i64]| add(format!("model.layers.{layer}.{name}"), shape);
            for (name, out) in [("q", query), ("k", group), ("v", group)] {
                of_layer(&format!("self_attn.{name}_proj.weight"), &[out, hidden]);
                // The family whose rows say what stands behind them has biases there.
                if self.diffusion.shift {
                    of_layer(&format!("self_attn.{name}_proj.bias"), &[out]);
                }
            }
            of_layer("self_attn.o_proj.weight", &[hidden, query]);
            of_layer("mlp.gate_proj.weight", &[width, hidden]);
            of_layer("mlp.up_proj.weight", &[width, hidden]);
            of_layer("mlp.down_proj.weight", &[hidden, width]);
            of_layer("input_layernorm.weight", &[hidden]);
            of_layer("post_attention_layernorm.weight", &[hidden]);
        }
        add("model.norm.weight".to_owned(), &[hidden]);
        if !self.tied {
            add("lm_head.weight".to_owned(), &[self.vocab_size, hidden]);
        }
        tensors
    }

    /// Its numbers.
    pub fn parameters(&self) -> u64 {
        self.tensors().iter().map(|tensor| tensor.shape.iter().product::<i64>() as u64).sum()
    }
}
