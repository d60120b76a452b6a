//! A small target and heads that are right about it now and then.

use tch::{Kind, Tensor};

use super::MedusaHeads;
use crate::decode::Decoded;
use crate::decode::tiny;
use crate::draft::medusa::{HeadProjection, MedusaConfig};
use crate::models::llama::LlamaTarget;
use crate::models::{ForwardInput, LogitRows, TargetModel};
use crate::nn::{AttentionMask, noise};

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

/// A target that says the same of every place, whatever stands before it.
pub(crate) mod forgetful {
    use super::*;

    fn changed(name: &str, tensor: Tensor) -> Tensor {
        match name {
            "model.embed_tokens.weight" => tensor.get(0).expand([VOCABULARY, 32], false).contiguous(),
            name if name.contains("o_proj") || name.contains("down_proj") => tensor * 0.0,
            _ => tensor,
        }
    }

    /// The target.
    pub(crate) fn target() -> LlamaTarget {
        tiny::target_with(6, &changed)
    }

    /// `[H]` its last norm.
    pub(crate) fn last_norm() -> Tensor {
        let found = std::cell::RefCell::new(None);
        tiny::target_with(6, &|name, tensor| {
            if name == "model.norm.weight" {
                *found.borrow_mut() = Some(tensor.shallow_clone());
            }
            changed(name, tensor)
        });
        found.into_inner().expect("a target has a last norm")
    }
}

/// Every token of every answer of a forgetful target is one draw from one distribution: their frequencies against the
/// target's own.
#[track_caller]
pub(crate) fn assert_follow_the_target(target: &LlamaTarget, decoded: &[Decoded], what: &str) {
    let (ids, positions) = (Tensor::from_slice(&[5i64]).unsqueeze(0), Tensor::from_slice(&[0i64]).unsqueeze(0));
    let (mask, logits) = (&AttentionMask::Causal, LogitRows::All);
    let input = ForwardInput { ids: &ids, positions: &positions, mask, capture: &[], logits };
    let logits = target.forward(&input, None).unwrap().logits.unwrap();
    let shares = Vec::<f64>::try_from(logits.get(0).softmax(-1, Kind::Double)).unwrap();
    let mut counts = vec![0.0; VOCABULARY as usize];
    decoded.iter().flat_map(|one| &one.tokens).for_each(|&token| counts[token as usize] += 1.0);
    let total: f64 = counts.iter().sum();
    assert!(total >= 2000.0, "{what}: {total} tokens");
    // Rare tokens are one class.
    let (mut square, mut classes) = (0.0, 0);
    let mut rare = (0.0, 0.0);
    for (want, got) in shares.iter().map(|share| share * total).zip(counts) {
        if want < 8.0 {
            rare = (rare.0 + want, rare.1 + got);
        } else {
            square += (got - want) * (got - want) / want;
            classes += 1;
        }
    }
    square += (rare.1 - rare.0) * (rare.1 - rare.0) / rare.0;
    // Four deviations of a chi-square with as many degrees of freedom as there are classes before the last.
    let limit = f64::from(classes) + 4.0 * (2.0 * f64::from(classes)).sqrt();
    assert!(square < limit && classes > 10, "{what}: chi-square {square} with {classes} degrees of freedom");
}
