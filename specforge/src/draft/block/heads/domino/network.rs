//! The network of Domino's head, the same in training and in decoding.

use tch::{Kind, Tensor};

use super::super::Tensors;
use super::super::sequential::{Drafted, SequentialHead, Step};
use super::DominoConfig;
use crate::draft::block::config::BlockShape;
use crate::error::Result;
use crate::nn::linear;

/// The tensors of a head.
#[derive(Debug)]
pub struct Domino {
    /// `[3 g, H]` reset, update and candidate of the recurrence, what they read of an embedding.
    inward: Tensor,
    /// `[3 g, g]` what they read of the state.
    onward: Tensor,
    /// `[m, H + g]`
    first: Tensor,
    /// `[V, m]`
    second: Tensor,
    /// Slots before this one keep the backbone's logits.
    prefix: i64,
    drafts: i64,
}

impl Domino {
    /// Finds the tensors.
    pub fn new(config: &DominoConfig, shape: &BlockShape, tensors: Tensors<'_>) -> Result<Self> {
        Ok(Self {
            inward: tensors("prefix_gru.weight_ih_l0")?,
            onward: tensors("prefix_gru.weight_hh_l0")?,
            first: tensors("embed_proj.0.weight")?,
            second: tensors("embed_proj.2.weight")?,
            prefix: config.pure_draft_prefix_len,
            drafts: shape.block_size - 1,
        })
    }

    /// The state of each slot: what the recurrence has made of the anchor and the tokens up to the one before the slot.
    /// `previous [n, S]` to `[n, S, g]`.
    pub fn states(&self, embedding: &Tensor, previous: &Tensor) -> Result<Tensor> {
        let inputs = self.inputs(embedding, previous)?; // [n, S, 3 g]
        let mut state = self.empty_state(previous.size()[0], &inputs);
        let mut states = Vec::new();
        for input in inputs.unbind(1) {
            state = self.advance(&state, &input);
            states.push(state.shallow_clone());
        }
        Ok(Tensor::f_stack(&states, 1)?)
    }

    /// What [`Domino::bias`] makes logits of, `[.., m]`, for rows `[.., H]` and states `[.., g]`.
    pub fn latents(&self, rows: &Tensor, states: &Tensor) -> Tensor {
        linear(&Tensor::cat(&[rows, states], -1), &self.first, None).silu()
    }

    /// What is added to logits: `[.., m]` to `[.., V]`.
    pub fn bias(&self, latents: &Tensor) -> Tensor {
        linear(latents, &self.second, None)
    }

    /// The tokens that all corrected slots of a block choose among, `[n, count]`: those that some slot but the first likes
    /// best, by logits `[n, S, V]`.
    pub fn pool(&self, base: &Tensor, count: i64) -> Option<Tensor> {
        let (slots, vocabulary) = (self.drafts.min(base.size()[1]), base.size()[2]);
        if self.prefix >= slots || !(1..vocabulary).contains(&count) {
            return None;
        }
        let best = base.narrow(1, self.prefix, slots - self.prefix).amax(1, false); // [n, V]
        Some(best.topk(count, -1, true, true).1)
    }

    fn inputs(&self, embedding: &Tensor, previous: &Tensor) -> Result<Tensor> {
        let embedded = Tensor::f_embedding(embedding, previous, -1, false, false)?; // [.., H]
        Ok(linear(&embedded.to_kind(self.inward.kind()), &self.inward, None))
    }

    fn empty_state(&self, blocks: i64, like: &Tensor) -> Tensor {
        Tensor::zeros([blocks, self.onward.size()[1]], (like.kind(), like.device()))
    }

    /// One token: the state behind it, `[n, g]`.
    fn advance(&self, state: &Tensor, input: &Tensor) -> Tensor {
        let (read, kept) = (input.chunk(3, -1), linear(state, &self.onward, None).chunk(3, -1));
        let reset = (&read[0] + &kept[0]).sigmoid();
        let update = (&read[1] + &kept[1]).sigmoid();
        let candidate = (&read[2] + reset * &kept[2]).tanh();
        // (1 - u) c + u s
        candidate.lerp_tensor(state, &update)
    }

    /// Whether slots are corrected.
    pub fn corrects(&self, slot: i64) -> bool {
        slot >= self.prefix
    }

    /// `[C, 1]` 1 for the corrected ones of some places among `n * S` slots, 0 for the others.
    pub fn corrected(&self, places: &Tensor, slots: i64, kind: Kind) -> Tensor {
        places.remainder(slots).ge(self.prefix).to_kind(kind).unsqueeze(1)
    }
}

impl SequentialHead for Domino {
    fn drafts(&self) -> i64 {
        self.drafts
    }

    fn start(&self, drafted: &Drafted<'_>) -> Result<Tensor> {
        Ok(self.empty_state(drafted.hidden.size()[0], &self.inward))
    }

    fn step(&self, drafted: &Drafted<'_>, slot: i64, previous: &Tensor, state: &Tensor) -> Result<Step> {
        let state = self.advance(state, &self.inputs(drafted.embedding, previous)?); // [n, g]
        let base = drafted.base.select(1, slot); // [n, V]
        if !self.corrects(slot) {
            return Ok(Step { logits: base, columns: None, state, confidence: None });
        }
        let latents = self.latents(&drafted.row(slot), &state); // [n, m]
        let Some(pool) = &drafted.pool else {
            let logits = &base + self.bias(&latents).to_kind(base.kind());
            return Ok(Step { logits, columns: None, state, confidence: None });
        };
        let weight = Tensor::f_embedding(&self.second, pool, -1, false, false)?; // [n, K, m]
        let bias = weight.f_bmm(&latents.unsqueeze(-1))?.squeeze_dim(-1); // [n, K]
        let logits = base.f_gather(1, pool, false)? + bias.to_kind(base.kind());
        Ok(Step { logits, columns: Some(pool.shallow_clone()), state, confidence: None })
    }
}
