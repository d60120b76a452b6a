//! A few candidates for each slot of a block, and scores of every step from a candidate to one of the next slot.
//!
//! Heads that choose among candidates (DFlash2's selector, LiLiCorr) end in a [`Lattice`]: the greedy walk, samples and
//! trees need nothing else of them. The walk is greedy from slot to slot on purpose: what counts is the accepted prefix, and
//! the best path as a whole gives up early slots for late ones.
//!
//! Shape legend: `n` blocks, `S` slots, `K` candidates of a slot, `V` vocabulary.

use tch::{Kind, Tensor};

/// The likeliest tokens of slots.
#[derive(Debug)]
pub struct Candidates {
    /// `[.., K]` tokens, the likeliest first.
    pub ids: Tensor,
    /// `[.., K]` their logits, with a graph to those of the whole vocabulary.
    pub logits: Tensor,
}

impl Candidates {
    /// The `count` likeliest tokens of each row of `logits [.., V]`.
    pub fn likeliest(logits: &Tensor, count: i64) -> Self {
        let (logits, ids) = logits.topk(count, -1, true, true);
        Self { ids, logits }
    }

    /// Those of a slot: `[n, K]` of `[n, S, K]`.
    pub fn slot(&self, slot: i64) -> Self {
        Self { ids: self.ids.select(1, slot), logits: self.logits.select(1, slot) }
    }

    /// Tokens in places `[..]` among the candidates: `[..]`.
    pub fn tokens(&self, places: &Tensor) -> Tensor {
        pick(&self.ids, places)
    }

    /// Where tokens `[..]` stand among the candidates, 0 for those that do not, and whether they do: `[..]` each.
    pub fn find(&self, tokens: &Tensor) -> (Tensor, Tensor) {
        let equal = self.ids.eq_tensor(&tokens.unsqueeze(-1)); // [.., K]
        (equal.to_kind(Kind::Int64).argmax(-1, false), equal.any_dim(-1, false))
    }
}

/// Scores of all steps through the candidates of blocks.
#[derive(Debug)]
pub struct Lattice {
    /// `[n, S, K]` tokens, the likeliest first.
    pub ids: Tensor,
    /// `[n, K]` scores of slot 0's candidates behind the anchor.
    pub start: Tensor,
    /// `[n, S - 1, K, K]` scores of slot `s + 1`'s candidates, the last axis, behind each of slot `s`.
    pub pairs: Tensor,
}

/// A way through a lattice.
#[derive(Debug)]
pub struct Walk {
    /// `[n, S]` tokens.
    pub tokens: Tensor,
    /// `[n, S]` their places among the candidates.
    pub places: Tensor,
    /// `[n, S, K]` scores of all candidates behind the token chosen before.
    pub scores: Tensor,
}

impl Lattice {
    /// `S`
    pub fn slots(&self) -> i64 {
        self.ids.size()[1]
    }

    /// `[n, K]` scores of a slot's candidates behind the previous slot's candidate in `place [n]`, which slot 0 has none of.
    pub fn step(&self, slot: i64, place: Option<&Tensor>) -> Tensor {
        match place {
            Some(place) if slot > 0 => {
                let pairs = self.pairs.select(1, slot - 1); // [n, K, K]
                let row = place.view([-1, 1, 1]).expand([-1, 1, pairs.size()[2]], false);
                pairs.gather(1, &row, false).squeeze_dim(1)
            }
            _ => self.start.shallow_clone(),
        }
    }

    /// `[n, S, K]` scores along a given way, as in training: slot `s` behind the candidate in `places[.., s - 1]`.
    /// `places [n, S]`; the last slot's is not looked at.
    pub fn along(&self, places: &Tensor) -> Tensor {
        let behind = self.slots() - 1;
        let row = places.narrow(1, 0, behind).unsqueeze(-1).unsqueeze(-1); // [n, S - 1, 1, 1]
        let row = row.expand([-1, -1, 1, self.ids.size()[2]], false);
        let later = self.pairs.gather(2, &row, false).squeeze_dim(2); // [n, S - 1, K]
        Tensor::cat(&[self.start.unsqueeze(1), later], 1)
    }

    /// The greedy walk.
    pub fn walk(&self) -> Walk {
        walk(self.slots(), |slot, place| {
            let scores = self.step(slot, place);
            let ids = self.ids.select(1, slot);
            (scores, ids)
        })
    }
}

/// Walks greedily through slots. `step` gives the scores and the tokens of a slot's candidates, `[n, K]` each, from the place
/// that was chosen in the slot before, `[n]`.
pub(super) fn walk(slots: i64, mut step: impl FnMut(i64, Option<&Tensor>) -> (Tensor, Tensor)) -> Walk {
    let (mut tokens, mut places, mut scores) = (Vec::new(), Vec::<Tensor>::new(), Vec::new());
    for slot in 0..slots {
        let (of_slot, ids) = step(slot, places.last());
        let place = of_slot.argmax(-1, false); // [n]
        tokens.push(pick(&ids, &place));
        places.push(place);
        scores.push(of_slot);
    }
    Walk { tokens: Tensor::stack(&tokens, 1), places: Tensor::stack(&places, 1), scores: Tensor::stack(&scores, 1) }
}

/// Values `[.., K]` in places `[..]`: `[..]`.
pub(super) fn pick(values: &Tensor, places: &Tensor) -> Tensor {
    values.gather(-1, &places.unsqueeze(-1), false).squeeze_dim(-1)
}

/// Float32 at least.
pub(super) fn wide(values: &Tensor) -> Tensor {
    values.to_kind(if values.kind() == Kind::Double { Kind::Double } else { Kind::Float })
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::nn::drawn;

    #[test]
    fn scores_along_the_walk_are_the_walks_own() {
        drawn::seed(7);
        let options = (Kind::Double, Device::Cpu);
        let logits = drawn::randn([3, 4, 9], options);
        let candidates = Candidates::likeliest(&logits, 5);
        let (start, pairs) = (drawn::randn([3, 5], options), drawn::randn([3, 3, 5, 5], options));
        let lattice = Lattice { ids: candidates.ids.shallow_clone(), start, pairs };
        let walk = lattice.walk();
        assert!(lattice.along(&walk.places).equal(&walk.scores));
        assert!(candidates.tokens(&walk.places).equal(&walk.tokens));
        let (places, found) = candidates.find(&walk.tokens);
        assert!(places.equal(&walk.places) && bool::try_from(found.all()).unwrap());
        // Written out for one block.
        let mut place = lattice.start.get(1).argmax(-1, false).int64_value(&[]);
        for slot in 1..4 {
            place = lattice.pairs.get(1).get(slot - 1).get(place).argmax(-1, false).int64_value(&[]);
            assert_eq!(walk.places.int64_value(&[1, slot]), place);
        }
    }

    #[test]
    fn a_token_that_is_no_candidate_is_not_found() {
        let logits = Tensor::from_slice2(&[[0.0, 3.0, 1.0, 2.0]]);
        let candidates = Candidates::likeliest(&logits, 2);
        for (token, place, there) in [(1, 0, true), (3, 1, true), (0, 0, false)] {
            let (places, found) = candidates.find(&Tensor::from_slice(&[token]));
            assert_eq!((places.int64_value(&[0]), found.int64_value(&[0]) == 1), (place, there));
        }
    }

    #[test]
    fn one_slot_is_a_lattice_too() {
        let start = Tensor::from_slice2(&[[0.0, 1.0]]);
        let pairs = Tensor::zeros([1, 0, 2, 2], (Kind::Double, Device::Cpu));
        let lattice = Lattice { ids: Tensor::from_slice(&[7i64, 5]).view([1, 1, 2]), start, pairs };
        assert_eq!(lattice.walk().tokens.int64_value(&[0, 0]), 5);
        assert_eq!(lattice.along(&Tensor::from_slice(&[0i64]).view([1, 1])).size(), [1, 1, 2]);
    }
}
