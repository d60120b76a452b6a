//! DFlash2's candidate selector: what a token says about the candidates behind it.
//!
//! `score(previous, c) = logit(c) + <predecessor[previous] * (P h), successor[c]>`, for the `K` likeliest tokens `c` of a
//! slot. With a successor codebook of zeros, where training begins, that is the logit alone.
//!
//! Shape legend: `n` blocks, `S` slots, `K` candidates, `r` rank, `H` hidden size, `V` vocabulary.

use tch::Tensor;

use super::super::Tensors;
use super::super::lattice::{Candidates, Lattice, Walk, walk};
use super::SelectorConfig;
use crate::error::Result;
use crate::nn::linear;

/// `candidate_selector.predecessor_codebook`, `[V, r]`: what a token is to those behind it.
pub const PREDECESSOR: &str = "candidate_selector.predecessor_codebook";
/// `candidate_selector.successor_codebook`, `[V, r]`: what a candidate is to those before it.
pub const SUCCESSOR: &str = "candidate_selector.successor_codebook";
/// `candidate_selector.hidden_projection.weight`, `[r, H]`.
pub const PROJECTION: &str = "candidate_selector.hidden_projection.weight";

/// The network of the selector.
#[derive(Debug)]
pub struct Selector {
    predecessor: Tensor,
    successor: Tensor,
    projection: Tensor,
    /// `K`
    pub top_k: i64,
    /// Multiplies logits.
    pub output_multiplier: f64,
    /// `c` of `c tanh(x / c)`, which bends multiplied logits.
    pub softcap: Option<f64>,
}

impl Selector {
    /// The selector of a configuration, on tensors that are found by name.
    pub fn new(config: &SelectorConfig, tensors: Tensors<'_>) -> Result<Self> {
        Ok(Self {
            predecessor: tensors(PREDECESSOR)?,
            successor: tensors(SUCCESSOR)?,
            projection: tensors(PROJECTION)?,
            top_k: config.selector_top_k,
            output_multiplier: config.output_multiplier,
            softcap: config.final_logit_softcapping,
        })
    }

    /// The draft's logits from those of the vocabulary projection, `[.., V]`. Their order stays.
    pub fn finish(&self, logits: Tensor) -> Tensor {
        let logits = if self.output_multiplier == 1.0 { logits } else { logits * self.output_multiplier };
        match self.softcap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        }
    }

    /// The `K` likeliest tokens of finished logits `[.., V]`.
    pub fn candidates(&self, logits: &Tensor) -> Candidates {
        Candidates::likeliest(logits, self.top_k)
    }

    /// What the selector reads of rows `[.., H]`: `[.., r]`.
    pub fn project(&self, rows: &Tensor) -> Tensor {
        linear(rows, &self.projection, None)
    }

    /// `[.., K]` scores of candidates `[.., K]` behind tokens `previous [..]`, for rows projected to `[.., r]`.
    pub fn scores(&self, candidates: &Candidates, projected: &Tensor, previous: &Tensor) -> Tensor {
        let context = embedded(&self.predecessor, previous) * projected; // [.., r]
        let successors = embedded(&self.successor, &candidates.ids); // [.., K, r]
        let transition = successors.matmul(&context.unsqueeze(-1)).squeeze_dim(-1); // [.., K]
        &candidates.logits + transition.to_kind(candidates.logits.kind())
    }

    /// All steps through candidates `[n, S, K]` of rows projected to `[n, S, r]`, behind anchors `[n]`.
    pub fn lattice(&self, candidates: &Candidates, projected: &Tensor, anchor: &Tensor) -> Lattice {
        let later = candidates.ids.size()[1] - 1;
        let start = self.scores(&candidates.slot(0), &projected.select(1, 0), anchor); // [n, K]
        let previous = candidates.ids.narrow(1, 0, later); // [n, S - 1, K]
        let context = embedded(&self.predecessor, &previous) * projected.narrow(1, 1, later).unsqueeze(2);
        let successors = embedded(&self.successor, &candidates.ids.narrow(1, 1, later)); // [n, S - 1, K, r]
        let transition = context.matmul(&successors.transpose(2, 3)); // [n, S - 1, K, K]
        let logits = candidates.logits.narrow(1, 1, later).unsqueeze(2); // [n, S - 1, 1, K]
        let pairs = &logits + transition.to_kind(logits.kind());
        Lattice { ids: candidates.ids.shallow_clone(), start, pairs }
    }

    /// `[n, K]` scores of a slot's candidates behind tokens `previous [n]`: a step of a walk that is driven from outside.
    pub fn step(&self, candidates: &Candidates, projected: &Tensor, slot: i64, previous: &Tensor) -> Tensor {
        self.scores(&candidates.slot(slot), &projected.select(1, slot), previous)
    }

    /// The greedy walk through candidates `[n, S, K]`, behind anchors `[n]`: the lattice's own, without the lattice.
    pub fn walk(&self, candidates: &Candidates, projected: &Tensor, anchor: &Tensor) -> Walk {
        walk(candidates.ids.size()[1], |slot, place| {
            let previous = match place {
                Some(place) => candidates.slot(slot - 1).tokens(place),
                None => anchor.shallow_clone(),
            };
            (self.step(candidates, projected, slot, &previous), candidates.ids.select(1, slot))
        })
    }
}

/// Rows of a codebook: `[.., r]` for `[..]`.
fn embedded(codebook: &Tensor, ids: &Tensor) -> Tensor {
    Tensor::embedding(codebook, ids, -1, false, false)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::nn::drawn;

    const OPTIONS: (Kind, Device) = (Kind::Double, Device::Cpu);

    fn selector(successor: Tensor) -> Selector {
        let config = SelectorConfig { selector_top_k: 4, ..SelectorConfig::default() };
        let find = |name: &str| {
            Ok(match name {
                PREDECESSOR => drawn::randn([11, 3], OPTIONS),
                SUCCESSOR => successor.shallow_clone(),
                _ => drawn::randn([3, 6], OPTIONS),
            })
        };
        Selector::new(&config, &find).unwrap()
    }

    #[test]
    fn the_lattices_greedy_path_is_the_walk() {
        drawn::seed(11);
        let selector = selector(drawn::randn([11, 3], OPTIONS));
        let (logits, rows) = (drawn::randn([5, 3, 11], OPTIONS), drawn::randn([5, 3, 6], OPTIONS));
        let anchor = Tensor::from_slice(&[0i64, 3, 10, 2, 5]);
        let (candidates, projected) = (selector.candidates(&logits), selector.project(&rows));
        let walk = selector.walk(&candidates, &projected, &anchor);
        let by_lattice = selector.lattice(&candidates, &projected, &anchor).walk();
        assert!(walk.tokens.equal(&by_lattice.tokens) && walk.places.equal(&by_lattice.places));
        assert!(walk.scores.allclose(&by_lattice.scores, 1e-12, 1e-12, false));
        // Teacher forcing on the walk's own tokens gives its scores.
        let previous = Tensor::cat(&[anchor.unsqueeze(1), walk.tokens.narrow(1, 0, 2)], 1);
        assert!(selector.scores(&candidates, &projected, &previous).allclose(&walk.scores, 1e-12, 1e-12, false));
        assert!(
            !walk.tokens.equal(&logits.argmax(-1, false)),
            "the walk should differ from the plain argmax somewhere"
        );
    }

    #[test]
    fn with_a_successor_codebook_of_zeros_it_is_the_plain_argmax() {
        drawn::seed(12);
        let selector = selector(Tensor::zeros([11, 3], OPTIONS));
        let (logits, rows) = (drawn::randn([4, 5, 11], OPTIONS), drawn::randn([4, 5, 6], OPTIONS));
        let anchor = Tensor::zeros([4], (Kind::Int64, Device::Cpu));
        let walk = selector.walk(&selector.candidates(&logits), &selector.project(&rows), &anchor);
        assert!(walk.tokens.equal(&logits.argmax(-1, false)));
        assert!(walk.scores.equal(&selector.candidates(&logits).logits));
    }

    #[test]
    fn finished_logits_are_multiplied_then_bent() {
        let mut selector = selector(Tensor::zeros([11, 3], OPTIONS));
        let logits = Tensor::from_slice(&[-4.0, 0.0, 1.0]);
        assert!(selector.finish(logits.shallow_clone()).equal(&logits));
        (selector.output_multiplier, selector.softcap) = (0.5, Some(3.0));
        let want = [-4.0f64, 0.0, 1.0].map(|logit| 3.0 * (0.5 * logit / 3.0).tanh());
        assert!(selector.finish(logits).allclose(&Tensor::from_slice(&want), 1e-14, 1e-14, false));
    }
}
