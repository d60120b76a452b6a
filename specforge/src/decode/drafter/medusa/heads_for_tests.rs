//! A small target and heads that are right about it now and then.

use tch::{Kind, Tensor};

use super::MedusaHeads;
use crate::decode::tiny;
use crate::draft::medusa::{HeadProjection, MedusaConfig};
use crate::models::TargetModel;
use crate::models::llama::LlamaTarget;
use crate::nn::noise;

/// Tokens of the target.
pub(crate) const VOCABULARY: i64 = 64;

/// A target that mostly says the next token, and something else where its context has it so: its layers whisper, and its
/// projection looks for the token before.
pub(crate) fn target() -> LlamaTarget {
    let embedding = std::cell::RefCell::new(None);
    tiny::target_with(6, &|name, tensor| match name {
        "model.embed_tokens.weight" => {
            *embedding.borrow_mut() = Some(tensor.shallow_clone());
            tensor
        }
        "lm_head.weight" => {
            let embedding = embedding.borrow();
            following(embedding.as_ref().expect("the embedding is asked for first"), 1) * 1.5 + tensor * 0.8
        }
        name if name.contains("o_proj") || name.contains("down_proj") => tensor * 0.05,
        _ => tensor,
    })
}

/// Row `v` is that of the token `steps` before `v`.
fn following(embedding: &Tensor, steps: i64) -> Tensor {
    embedding.roll([steps], [0])
}

/// Heads with projections of their own that look for the token `2 + k` before, the better the less noise they have.
pub(crate) fn good(target: &LlamaTarget, heads: usize, noise: f64) -> MedusaHeads {
    let config = MedusaConfig { num_heads: heads, ..MedusaConfig::default() };
    MedusaHeads::new(&config, &good_tensors(target, heads, noise), None, target).unwrap()
}

/// Their tensors, under the names training uses.
pub(crate) fn good_tensors(target: &LlamaTarget, heads: usize, noise: f64) -> Vec<(String, Tensor)> {
    let mut tensors = blocks(heads, 1, 0.02);
    for head in 0..heads {
        let random = noise::normal(&[VOCABULARY, 32], noise, 12, head as u64).to_kind(Kind::Double);
        let projection = following(&target.embedding().table, 2 + head as i64) * 1.2 + random;
        tensors.push((format!("{head}.1.weight"), projection));
    }
    tensors
}

/// Random residual blocks.
pub(crate) fn blocks(heads: usize, layers: usize, deviation: f64) -> Vec<(String, Tensor)> {
    let mut tensors = Vec::new();
    for head in 0..heads {
        for layer in 0..layers {
            let stream = (10 * head + layer) as u64;
            let random = |shape: &[i64], seed| noise::normal(shape, deviation, seed, stream).to_kind(Kind::Double);
            tensors.push((format!("{head}.{layer}.linear.weight"), random(&[32, 32], 13)));
            tensors.push((format!("{head}.{layer}.linear.bias"), random(&[32], 14)));
        }
    }
    tensors
}

/// Random heads on the target's own projection.
pub(crate) fn random_shared(target: &LlamaTarget, heads: usize) -> MedusaHeads {
    let config =
        MedusaConfig { num_heads: heads, num_layers: 2, projection: HeadProjection::Shared, ..MedusaConfig::default() };
    MedusaHeads::new(&config, &blocks(heads, 2, 0.4), None, target).unwrap()
}
