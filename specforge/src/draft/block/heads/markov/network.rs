//! The network of DSpark's heads, the same in training and in decoding.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::super::Tensors;
use super::super::sequential::{Drafted, SequentialHead, Step};
use super::MarkovConfig;
use crate::draft::block::config::{BlockShape, Layout};
use crate::error::Result;
use crate::nn::{Linear, linear};

/// How the token before a slot, and those before that, shift its logits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MarkovKind {
    /// By its embedding alone: a low-rank table of pairs.
    #[default]
    Vanilla,
    /// By its embedding, gated by the slot's row.
    Gated,
    /// By a state that all tokens of the block before the slot have written.
    Rnn,
}

/// The tensors of a head.
#[derive(Debug)]
pub struct Markov {
    kind: MarkovKind,
    /// `[V, r]`
    first: Tensor,
    /// `[DV, r]`
    second: Tensor,
    /// `[r, H + r]` or `[3 r, 2 r + H]`; none for vanilla.
    mix: Option<Linear>,
    /// `[1, H]` or `[1, H + r]`
    confidence: Option<Linear>,
    with_markov: bool,
    /// Whether the anchor's own row writes the state before the first slot does.
    warm: bool,
    slots: i64,
}

impl Markov {
    /// Finds the tensors.
    pub fn new(config: &MarkovConfig, shape: &BlockShape, tensors: Tensors<'_>) -> Result<Self> {
        let layer = |name: &str| -> Result<Linear> {
            let (weight, bias) = (tensors(&format!("{name}.weight"))?, tensors(&format!("{name}.bias"))?);
            Ok(Linear { weight, bias: Some(bias) })
        };
        let mix = match config.markov_head_type {
            MarkovKind::Vanilla => None,
            MarkovKind::Gated => Some(layer("markov_head.gate_proj")?),
            MarkovKind::Rnn => Some(layer("markov_head.joint_proj")?),
        };
        // A rank of 0 is a table of no columns, which adds nothing.
        let table = |name: &str, rows: i64| match config.markov_rank {
            0 => tensors("norm.weight").map(|like| like.new_zeros([rows, 0], (like.kind(), like.device()))),
            _ => tensors(name),
        };
        Ok(Self {
            kind: config.markov_head_type,
            first: table("markov_head.markov_w1.weight", shape.vocab_size)?,
            second: table("markov_head.markov_w2.weight", shape.draft_vocab_size)?,
            mix,
            confidence: config.confidence_head.then(|| layer("confidence_head.proj")).transpose()?,
            with_markov: config.confidence_head_with_markov,
            warm: config.anchor_row_writes_state && shape.layout == Layout::FillIn,
            slots: shape.slots(),
        })
    }

    /// Whether a slot needs those before it.
    pub fn is_recurrent(&self) -> bool {
        self.kind == MarkovKind::Rnn
    }

    /// Whether there is a confidence head.
    pub fn has_confidence(&self) -> bool {
        self.confidence.is_some()
    }

    /// Embeddings of the tokens before some slots, `[..]` to `[.., r]`.
    pub fn embed(&self, previous: &Tensor) -> Result<Tensor> {
        Ok(Tensor::f_embedding(&self.first, previous, -1, false, false)?)
    }

    /// What [`Markov::bias`] makes logits of, `[.., r]`, for rows `[.., H]` behind tokens of these embeddings `[.., r]`.
    /// Only for heads that are not recurrent.
    pub fn latents(&self, rows: &Tensor, embedded: &Tensor) -> Tensor {
        match &self.mix {
            Some(mix) => mix.forward(&Tensor::cat(&[rows, embedded], -1)).sigmoid() * embedded, // [.., r]
            None => embedded.shallow_clone(),
        }
    }

    /// The same of whole blocks, `[n, R, H]` and `[n, R, r]` to `[n, R, r]`: consecutive rows from the first that writes the
    /// state on.
    pub fn block_latents(&self, rows: &Tensor, embedded: &Tensor) -> Tensor {
        let Some(mix) = self.mix.as_ref().filter(|_| self.is_recurrent()) else {
            return self.latents(rows, embedded);
        };
        let inputs = self.recurrent_inputs(mix, rows, embedded); // [n, R, 3 r]
        let mut state = self.empty_state(rows);
        let mut latents = Vec::new();
        for input in inputs.unbind(1) {
            let (next, latent) = self.advance(mix, &state, &input);
            state = next;
            latents.push(latent);
        }
        Tensor::stack(&latents, 1) // [n, R, r]
    }

    /// [`Markov::block_latents`] of the slots of blocks `[n, B, H]` behind the tokens `previous [n, S]`, and their
    /// embeddings: `[n, S, r]` both.
    pub fn slot_latents(&self, hidden: &Tensor, previous: &Tensor) -> Result<(Tensor, Tensor)> {
        let embedded = self.embed(previous)?;
        let slots = previous.size()[1];
        let rows = hidden.narrow(1, hidden.size()[1] - slots, slots); // [n, S, H]
        if !(self.warm && self.is_recurrent()) {
            return Ok((self.block_latents(&rows, &embedded), embedded));
        }
        // The anchor's row comes first, and reads the anchor as the first slot does.
        let written = Tensor::cat(&[&embedded.narrow(1, 0, 1), &embedded], 1); // [n, 1 + S, r]
        let rows = hidden.narrow(1, hidden.size()[1] - slots - 1, slots + 1);
        Ok((self.block_latents(&rows, &written).narrow(1, 1, slots), embedded))
    }

    /// What is added to logits: `[.., r]` to `[.., DV]`.
    pub fn bias(&self, latents: &Tensor) -> Tensor {
        linear(latents, &self.second, None)
    }

    /// Logits of how likely slots are accepted, `[..]`, from their rows `[.., H]` and the embeddings of the tokens before
    /// them.
    pub fn confidence(&self, rows: &Tensor, embedded: &Tensor) -> Option<Tensor> {
        let head = self.confidence.as_ref()?;
        let read = if self.with_markov { Tensor::cat(&[rows, embedded], -1) } else { rows.shallow_clone() };
        Some(head.forward(&read).squeeze_dim(-1))
    }

    /// `[n, r]`
    fn empty_state(&self, rows: &Tensor) -> Tensor {
        Tensor::zeros([rows.size()[0], self.second.size()[1]], (rows.kind(), rows.device()))
    }

    /// What rows bring to the state: `[.., 3 r]`, the columns of the joint projection behind those that read the state.
    fn recurrent_inputs(&self, mix: &Linear, rows: &Tensor, embedded: &Tensor) -> Tensor {
        let rank = self.second.size()[1];
        let weight = mix.weight.narrow(1, rank, mix.weight.size()[1] - rank);
        linear(&Tensor::cat(&[embedded, rows], -1), &weight, mix.bias.as_ref())
    }

    /// One row: the state `[n, r]` behind it and its latents `[n, r]`.
    fn advance(&self, mix: &Linear, state: &Tensor, input: &Tensor) -> (Tensor, Tensor) {
        let joint = input + linear(state, &mix.weight.narrow(1, 0, state.size()[1]), None); // [n, 3 r]
        let parts = joint.chunk(3, -1);
        let gate = parts[0].sigmoid();
        // g s + (1 - g) c
        let next = parts[1].tanh().lerp_tensor(state, &gate);
        (next, parts[2].tanh())
    }
}

impl SequentialHead for Markov {
    fn drafts(&self) -> i64 {
        self.slots
    }

    fn start(&self, drafted: &Drafted<'_>) -> Result<Tensor> {
        let state = self.empty_state(drafted.hidden);
        match self.mix.as_ref().filter(|_| self.warm && self.is_recurrent()) {
            Some(mix) => {
                let input = self.recurrent_inputs(mix, &drafted.hidden.select(1, 0), &self.embed(drafted.anchors)?);
                Ok(self.advance(mix, &state, &input).0)
            }
            None => Ok(state),
        }
    }

    fn step(&self, drafted: &Drafted<'_>, slot: i64, previous: &Tensor, state: &Tensor) -> Result<Step> {
        let row = drafted.row(slot); // [n, H]
        let embedded = self.embed(previous)?; // [n, r]
        let (state, latents) = match self.mix.as_ref().filter(|_| self.is_recurrent()) {
            Some(mix) => self.advance(mix, state, &self.recurrent_inputs(mix, &row, &embedded)),
            None => (state.shallow_clone(), self.latents(&row, &embedded)),
        };
        let base = drafted.base.select(1, slot);
        let logits = &base + self.bias(&latents).to_kind(base.kind()); // [n, DV]
        Ok(Step { logits, columns: None, state, confidence: self.confidence(&row, &embedded) })
    }
}
