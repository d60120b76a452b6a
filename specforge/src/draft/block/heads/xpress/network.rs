//! XPress' refiner: what the tokens before a row add to its logits, for all rows of a block in one pass.
//!
//! A row's state is made of its hidden state, the mean of its block's and the token before it; rows are mixed causally,
//! channel by channel, and an MLP follows. The state's readout is added to the base logits. Decoding is a Jacobi iteration:
//! each pass reads the tokens that the pass before chose. A prefix that has settled stays, so that after as many passes as
//! there are slots the tokens are those of left-to-right decoding.
//!
//! Shape legend: `n` blocks, `b` rows of them (`B` in training), `S` slots, `H` hidden size, `r` rank, `C` candidates of a
//! slot, `V` vocabulary of the target, `DV` of the draft.

use tch::{Kind, Tensor};

use super::super::{Start, TensorSpec, Tensors};
use super::XpressConfig;
use crate::draft::block::config::{BlockShape, Layout};
use crate::error::Result;
use crate::nn::linear;

/// Deviation of everything but the mixer at the beginning.
const START: f64 = 0.02;

/// The network.
#[derive(Debug)]
pub struct Xpress {
    /// `[V, r]`
    tokens: Tensor,
    /// `[r, H]`
    down_h: Tensor,
    /// `[r, H]`
    down_g: Tensor,
    /// `[r, 3 r]`
    in_proj: Tensor,
    /// `[r, B, B]`, of which the lower triangle counts: channel, asking row, row that is read.
    mix: Tensor,
    /// `[m, r]`
    gate: Tensor,
    /// `[m, r]`
    up: Tensor,
    /// `[r, m]`
    down: Tensor,
    /// `[DV, r]`
    readout: Tensor,
    layout: Layout,
    /// `[DV]` the target's ids of the draft's own vocabulary, where that is smaller.
    target_ids: Option<Tensor>,
}

/// What stands before the rows of blocks.
#[derive(Debug, Clone, Copy)]
pub struct Before<'a> {
    /// `[n]` the anchor.
    pub anchor: &'a Tensor,
    /// `[n]` the token before it, or the anchor itself where there is none. Only the anchor's own row of the fill-in layout
    /// reads it. vLLM, which does not have that token at hand, always takes the anchor.
    pub earlier: &'a Tensor,
}

/// Tokens of a Jacobi iteration.
#[derive(Debug)]
pub struct Refined {
    /// `[n, S]` the last pass's choice.
    pub tokens: Tensor,
    /// `[n, S, DV]` the last pass's logits, or `[n, S, C]` of the candidates.
    pub logits: Tensor,
    /// `[n, S]` each pass's choice, beginning with the base logits' own.
    pub passes: Vec<Tensor>,
}

/// Tensors of the head in creation order.
pub fn tensors(config: &XpressConfig, shape: &BlockShape) -> Vec<TensorSpec> {
    let (r, wide, vocabulary, block) = (config.xpress_rank, shape.hidden_size, shape.vocab_size, shape.block_size);
    let inner = r * config.xpress_mlp_ratio;
    let noise = Start::Normal(START);
    [
        ("w1.weight", vec![vocabulary, r], noise),
        ("down_h.weight", vec![r, wide], noise),
        ("down_g.weight", vec![r, wide], noise),
        ("in_proj.weight", vec![r, 3 * r], noise),
        ("mix.L", vec![r, block, block], Start::Zeros),
        ("mlp.gate_proj.weight", vec![inner, r], noise),
        ("mlp.up_proj.weight", vec![inner, r], noise),
        ("mlp.down_proj.weight", vec![r, inner], noise),
        ("w2.weight", vec![shape.draft_vocab_size, r], noise),
    ]
    .map(|(name, shape, start)| TensorSpec::new(format!("xpress_head.{name}"), &shape, start))
    .into()
}

impl Xpress {
    /// The refiner on tensors that are found by name.
    pub fn new(shape: &BlockShape, tensors: Tensors<'_>) -> Result<Self> {
        let find = |name: &str| tensors(&format!("xpress_head.{name}"));
        Ok(Self {
            tokens: find("w1.weight")?,
            down_h: find("down_h.weight")?,
            down_g: find("down_g.weight")?,
            in_proj: find("in_proj.weight")?,
            mix: find("mix.L")?,
            gate: find("mlp.gate_proj.weight")?,
            up: find("mlp.up_proj.weight")?,
            down: find("mlp.down_proj.weight")?,
            readout: find("w2.weight")?,
            layout: shape.layout,
            target_ids: None,
        })
    }

    /// The same with a vocabulary of the draft's own, whose tokens are `target_ids [DV]` of the target's. All tokens that are
    /// read and given are the target's.
    #[must_use]
    pub fn with_vocabulary(self, target_ids: Option<Tensor>) -> Self {
        Self { target_ids, ..self }
    }

    /// What all passes share: `[n, b, 2 r]` from all rows of the blocks, `[n, b, H]`.
    pub fn cache(&self, hidden: &Tensor) -> Tensor {
        let own = linear(hidden, &self.down_h, None); // [n, b, r]
        let mean = hidden.mean_dim([1].as_slice(), true, None::<Kind>); // [n, 1, H]
        let shared = linear(&mean, &self.down_g, None).expand_as(&own);
        Tensor::cat(&[own.shallow_clone(), shared], -1)
    }

    /// `[n, b]` the tokens before the rows, when the slots hold `tokens [n, S]`, of which the last is not read.
    pub fn previous(&self, before: Before<'_>, tokens: &Tensor) -> Tensor {
        let behind = tokens.narrow(1, 0, tokens.size()[1] - 1);
        let (anchor, earlier) = (before.anchor.unsqueeze(1), before.earlier.unsqueeze(1));
        match self.layout {
            Layout::FillIn => Tensor::cat(&[earlier, anchor, behind], 1),
            Layout::Shift => Tensor::cat(&[anchor, behind], 1),
        }
    }

    /// States of the slots, `[n, S, r]`, behind `previous [n, b]`.
    pub fn states(&self, cache: &Tensor, previous: &Tensor) -> Tensor {
        let rows = cache.size()[1];
        let embedded = Tensor::embedding(&self.tokens, previous, -1, false, false); // [n, b, r]
        let input = linear(&Tensor::cat(&[cache.shallow_clone(), embedded], -1), &self.in_proj, None); // [n, b, r]
        let mix = self.mix.narrow(1, 0, rows).narrow(2, 0, rows).tril(0); // [r, b, b]
        // Channels first, so that the mixer is a product of matrices for each: [r, b, b] [r, b, n].
        let mixed = mix.matmul(&input.permute([2, 1, 0])).permute([2, 1, 0]); // [n, b, r]
        let states = &input + mixed;
        let inner = linear(&states, &self.gate, None).silu() * linear(&states, &self.up, None); // [n, b, m]
        let states = &states + linear(&inner, &self.down, None);
        let first = match self.layout {
            Layout::FillIn => 1,
            Layout::Shift => 0,
        };
        states.narrow(1, first, rows - first)
    }

    /// What states `[.., r]` add to base logits: `[.., DV]`.
    pub fn bias(&self, states: &Tensor) -> Tensor {
        linear(states, &self.readout, None)
    }

    /// Base logits `[n, S, DV]` and what a pass adds to them when the slots hold `tokens [n, S]`: slot `s` reads the tokens
    /// before it alone, so that a walk from left to right fills one slot after the other.
    pub fn pass(&self, cache: &Tensor, base: &Tensor, before: Before<'_>, tokens: &Tensor) -> Tensor {
        base + self.bias(&self.states(cache, &self.previous(before, tokens))).to_kind(base.kind())
    }

    /// `passes` of the Jacobi iteration from base logits `[n, S, DV]`; `hidden [n, b, H]` are all rows. Where `candidates`
    /// says so, a slot's token is one of that many likeliest of its base logits.
    pub fn refine(
        &self,
        hidden: &Tensor,
        base: &Tensor,
        before: Before<'_>,
        passes: usize,
        candidates: Option<i64>,
    ) -> Refined {
        let cache = self.cache(hidden);
        let few = candidates.filter(|&count| count > 0 && count < base.size()[2]);
        let few = few.map(|count| base.topk(count, -1, true, true)); // [n, S, C] each
        // The candidates' part of the readout is looked up once for all passes.
        let readout = few.as_ref().map(|(_, ids)| Tensor::embedding(&self.readout, ids, -1, false, false)); // [n, S, C, r]
        let named = |ids: Tensor| match &self.target_ids {
            Some(target_ids) => target_ids.index_select(0, &ids.flatten(0, -1)).view_as(&ids),
            None => ids,
        };
        let mut chosen = vec![named(base.argmax(-1, false))]; // [n, S]
        let mut logits = few.as_ref().map_or(base, |(logits, _)| logits).shallow_clone();
        for pass in 0..passes {
            let states = self.states(&cache, &self.previous(before, &chosen[pass])); // [n, S, r]
            let token = match (&few, &readout) {
                (Some((few_logits, ids)), Some(readout)) => {
                    let bias = readout.matmul(&states.unsqueeze(-1)).squeeze_dim(-1); // [n, S, C]
                    logits = few_logits + bias.to_kind(base.kind());
                    ids.gather(-1, &logits.argmax(-1, true), false).squeeze_dim(-1)
                }
                _ => {
                    logits = base + self.bias(&states).to_kind(base.kind());
                    logits.argmax(-1, false)
                }
            };
            chosen.push(named(token));
        }
        Refined { tokens: chosen[passes].shallow_clone(), logits, passes: chosen }
    }

    /// `[n, DV]` logits of a slot when the tokens before it are `chosen [n, slot]`: a step of a walk from left to right.
    /// The rows after the slot are not read.
    pub fn step(&self, cache: &Tensor, base: &Tensor, before: Before<'_>, slot: i64, chosen: &Tensor) -> Tensor {
        let (blocks, slots) = (base.size()[0], base.size()[1]);
        let rest = Tensor::zeros([blocks, slots - slot], (Kind::Int64, base.device()));
        let tokens = Tensor::cat(&[chosen.shallow_clone(), rest], 1); // [n, S]
        let states = self.states(cache, &self.previous(before, &tokens)).select(1, slot); // [n, r]
        base.select(1, slot) + self.bias(&states).to_kind(base.kind())
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::nn::drawn;

    const OPTIONS: (Kind, Device) = (Kind::Double, Device::Cpu);

    fn refiner(layout: Layout) -> Xpress {
        let [v, h, r, b] = [13, 6, 4, 5];
        let find = |name: &str| {
            let shape: &[i64] = match name.trim_start_matches("xpress_head.") {
                "w1.weight" | "w2.weight" => &[v, r],
                "down_h.weight" | "down_g.weight" => &[r, h],
                "in_proj.weight" => &[r, 3 * r],
                "mix.L" => &[r, b, b],
                "mlp.down_proj.weight" => &[r, 2 * r],
                _ => &[2 * r, r],
            };
            Ok(drawn::randn(shape, OPTIONS))
        };
        let shape = super::super::tests::shape(layout);
        Xpress::new(&shape, &find).unwrap()
    }

    #[test]
    fn as_many_passes_as_slots_are_decoding_from_left_to_right() {
        drawn::seed(21);
        for layout in [Layout::FillIn, Layout::Shift] {
            let refiner = refiner(layout);
            let hidden = drawn::randn([6, 5, 6], OPTIONS);
            let slots = if layout == Layout::FillIn { 4 } else { 5 };
            let base = drawn::randn([6, slots, 13], OPTIONS);
            let anchor = Tensor::from_slice(&[1i64, 2, 3, 4, 5, 6]);
            let earlier = &anchor + 1;
            let before = Before { anchor: &anchor, earlier: &earlier };
            let refined = refiner.refine(&hidden, &base, before, slots as usize, None);
            let cache = refiner.cache(&hidden);
            let mut chosen = Tensor::zeros([6, 0], (Kind::Int64, Device::Cpu));
            for slot in 0..slots {
                let logits = refiner.step(&cache, &base, before, slot, &chosen);
                assert!(logits.allclose(&refined.logits.select(1, slot), 1e-12, 1e-12, false));
                chosen = Tensor::cat(&[chosen, logits.argmax(-1, true)], 1);
            }
            assert!(refined.tokens.equal(&chosen), "{layout:?}");
            // A settled prefix stays: pass p has the first p slots right.
            for (pass, tokens) in refined.passes.iter().enumerate() {
                let settled = (pass as i64).min(slots);
                assert!(tokens.narrow(1, 0, settled).equal(&chosen.narrow(1, 0, settled)), "{layout:?}, pass {pass}");
            }
            assert!(!refined.passes[0].equal(&chosen), "the refiner should change something");
            // Another pass changes nothing, and all tokens as candidates are the whole vocabulary.
            let more = refiner.refine(&hidden, &base, before, slots as usize + 1, Some(13));
            assert!(more.tokens.equal(&chosen));
            let all = refiner.refine(&hidden, &base, before, slots as usize, Some(12));
            assert_eq!(all.logits.size(), [6, slots, 12]);
        }
    }

    #[test]
    fn fewer_rows_are_the_first_of_the_block() {
        drawn::seed(22);
        let refiner = refiner(Layout::FillIn);
        let (hidden, base) = (drawn::randn([2, 3, 6], OPTIONS), drawn::randn([2, 2, 13], OPTIONS));
        let anchor = Tensor::from_slice(&[1i64, 2]);
        let before = Before { anchor: &anchor, earlier: &anchor };
        assert_eq!(refiner.refine(&hidden, &base, before, 2, Some(4)).tokens.size(), [2, 2]);
    }
}
