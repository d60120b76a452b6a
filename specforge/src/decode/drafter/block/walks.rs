//! Heads as they draft: what the logits of a slot are behind paths of guesses.
//!
//! A walk goes level by level. Every step is given the nodes whose next slot is wanted: the text each is in, its parent's
//! place in the step before, and its own token. At the first step the nodes are the anchors. Chains, trees and samples are
//! the same walk; what is guessed is decided by whoever drives it.
//!
//! Shape legend: `b` texts, `m` nodes of a step, `B` rows of a block, `S` slots, `K` candidates of a slot, `H` hidden size,
//! `V` vocabulary of the target, `DV` of the draft.

use tch::{Kind, Tensor};

use crate::draft::block::heads::domino::{Domino, DominoConfig};
use crate::draft::block::heads::lattice::{Candidates, Lattice};
use crate::draft::block::heads::lilicorr::{Lilicorr, LilicorrConfig};
use crate::draft::block::heads::markov::{Markov, MarkovConfig};
use crate::draft::block::heads::selector::{Selector, SelectorConfig};
use crate::draft::block::heads::sequential::{self, SequentialHead};
use crate::draft::block::heads::xpress::{Before, Xpress};
use crate::draft::block::heads::{Tensors, domino, lilicorr, markov, plain, selector, xpress};
use crate::draft::block::{BlockConfig, BlockShape};
use crate::error::{Error, Result};
use crate::nn::Head;

/// What the backbone makes of the blocks of a round.
#[derive(Clone, Copy)]
pub(super) struct Drafted<'a> {
    /// `[b, B, H]` behind the last norm.
    pub hidden: &'a Tensor,
    /// The row of the first slot.
    pub first_row: i64,
    /// `S`, slots that are drafted: of a block's the first.
    pub slots: i64,
    /// `[b]` the newest committed tokens.
    pub anchors: &'a Tensor,
    /// `[b]` those before them.
    pub before: &'a Tensor,
    /// `[b, H]` what the backbone reads of the tokens before the anchors.
    pub last_seen: &'a Tensor,
    /// `[V, H]` the target's embedding.
    pub embedding: &'a Tensor,
    /// `[DV, H]` the vocabulary projection.
    pub head: &'a Head,
    /// `[DV]` the target's numbers of the draft's tokens, where they differ.
    pub target_ids: Option<&'a Tensor>,
}

impl Drafted<'_> {
    /// `[b, S, H]` rows of the slots.
    pub fn rows(&self) -> Tensor {
        self.hidden.narrow(1, self.first_row, self.slots)
    }

    /// `[b, S, DV]` their logits, in float32 at least.
    pub fn logits(&self) -> Tensor {
        let logits = self.head.logits(&self.rows());
        if logits.kind() == Kind::Double { logits } else { logits.to_kind(Kind::Float) }
    }
}

/// A head that drafts.
pub(super) trait HeadAtWork {
    /// A walk over the blocks of a round.
    fn walk<'a>(&'a self, drafted: &Drafted<'a>) -> Result<Box<dyn Walk + 'a>>;

    /// Most tokens that a block gives, where that is not its slots.
    fn most_drafts(&self) -> Option<i64> {
        None
    }

    /// Whether it says how likely its guesses are to be accepted.
    fn has_confidence(&self) -> bool {
        false
    }
}

/// A walk over the slots of some blocks.
pub(super) trait Walk {
    /// `[m, DV]` logits of a slot behind nodes: `texts [m]` they are in, `parents [m]` their places in the step before, and
    /// `tokens [m]` by the target's numbers.
    fn step(&mut self, slot: i64, texts: &Tensor, parents: &Tensor, tokens: &Tensor) -> Result<Tensor>;

    /// `[m]` how likely the token of the last step's slot is to be accepted if those before it are, as a logit.
    fn confidence(&self) -> Option<Tensor> {
        None
    }
}

/// Builds a head for drafting.
type Open = fn(&BlockConfig, &BlockShape, Tensors<'_>) -> Result<Box<dyn HeadAtWork>>;

/// Every head, by its algorithm.
const HEADS: &[(&str, Open)] = &[
    (plain::KIND.name, |_, _, _| Ok(Box::new(Plain))),
    (selector::KIND.name, |config, _, find| {
        let config = SelectorConfig::read(config)?;
        Ok(Box::new(Selector::new(&config, find)?))
    }),
    (markov::KIND.name, |config, shape, find| {
        let head = Markov::new(&MarkovConfig::read(config)?, shape, find)?;
        Ok(Box::new(Sequential { confident: head.has_confidence(), head: Box::new(head) }))
    }),
    (domino::KIND.name, |config, shape, find| {
        let head = Domino::new(&DominoConfig::read(config)?, shape, find)?;
        Ok(Box::new(Sequential { confident: false, head: Box::new(head) }))
    }),
    (lilicorr::KIND.name, |config, shape, find| {
        let config = LilicorrConfig::of(config, shape)?;
        let network = Lilicorr::new(&config, shape, find)?;
        Ok(Box::new(Correlated { network, top_k: config.lilicorr_candidate_topk }))
    }),
    (xpress::KIND.name, |_, shape, find| Ok(Box::new(Xpress::new(shape, find)?))),
];

/// The head of a draft, on tensors that are found by name.
pub(super) fn open(config: &BlockConfig, shape: &BlockShape, find: Tensors<'_>) -> Result<Box<dyn HeadAtWork>> {
    match HEADS.iter().find(|(name, _)| *name == config.algorithm) {
        Some((_, open)) => open(config, shape, find),
        None => {
            let name = &config.algorithm;
            Err(Error::Failed(format!("decoding with drafts of the algorithm `{name}` is not supported")))
        }
    }
}

// ---- DFlash ----

/// A slot's logits are what they are, whatever was guessed before.
struct Plain;

struct PlainWalk {
    /// `[b, S, DV]`
    logits: Tensor,
}

impl HeadAtWork for Plain {
    fn walk<'a>(&'a self, drafted: &Drafted<'a>) -> Result<Box<dyn Walk + 'a>> {
        Ok(Box::new(PlainWalk { logits: drafted.logits() }))
    }
}

impl Walk for PlainWalk {
    fn step(&mut self, slot: i64, texts: &Tensor, _parents: &Tensor, _tokens: &Tensor) -> Result<Tensor> {
        Ok(self.logits.select(1, slot).f_index_select(0, texts)?) // [m, DV]
    }
}

// ---- DSpark, Domino ----

/// A head that corrects one slot after the other.
struct Sequential {
    head: Box<dyn SequentialHead>,
    confident: bool,
}

struct SequentialWalk<'a> {
    head: &'a dyn SequentialHead,
    drafted: Drafted<'a>,
    /// `[b, S, DV]`
    base: Tensor,
    /// `[m, ..]` of the step before.
    state: Option<Tensor>,
    confidence: Option<Tensor>,
}

impl HeadAtWork for Sequential {
    fn walk<'a>(&'a self, drafted: &Drafted<'a>) -> Result<Box<dyn Walk + 'a>> {
        let base = drafted.logits();
        let drafted = *drafted;
        Ok(Box::new(SequentialWalk { head: self.head.as_ref(), drafted, base, state: None, confidence: None }))
    }

    fn most_drafts(&self) -> Option<i64> {
        Some(self.head.drafts())
    }

    fn has_confidence(&self) -> bool {
        self.confident
    }
}

impl Walk for SequentialWalk<'_> {
    fn step(&mut self, slot: i64, texts: &Tensor, parents: &Tensor, tokens: &Tensor) -> Result<Tensor> {
        let of_nodes = |values: &Tensor| of_nodes(values, texts);
        let (hidden, base) = (of_nodes(self.drafted.hidden), of_nodes(&self.base));
        let anchors = of_nodes(self.drafted.anchors);
        let drafted = sequential::Drafted {
            hidden: &hidden,
            first_row: self.drafted.first_row,
            base: &base,
            anchors: &anchors,
            embedding: self.drafted.embedding,
            tokens: self.drafted.target_ids,
            pool: None,
        };
        let state = match &self.state {
            None => self.head.start(&drafted)?,
            Some(state) => state.index_select(0, parents),
        };
        let step = self.head.step(&drafted, slot, tokens, &state)?;
        self.state = Some(step.state);
        self.confidence = step.confidence;
        Ok(step.logits)
    }

    fn confidence(&self) -> Option<Tensor> {
        self.confidence.as_ref().map(Tensor::shallow_clone)
    }
}

/// Values of texts, `[b, ..]`, for nodes: `[m, ..]`. As many nodes as texts are one for each, in order: a chain.
fn of_nodes(values: &Tensor, texts: &Tensor) -> Tensor {
    match texts.size()[0] == values.size()[0] {
        true => values.shallow_clone(),
        false => values.index_select(0, texts),
    }
}

// ---- DFlash2, LiLiCorr ----

struct LatticeWalk {
    lattice: Lattice,
    /// `DV`
    vocabulary: i64,
}

impl Walk for LatticeWalk {
    fn step(&mut self, slot: i64, texts: &Tensor, _parents: &Tensor, tokens: &Tensor) -> Result<Tensor> {
        let ids = self.lattice.ids.select(1, slot).index_select(0, texts); // [m, K]
        let scores = match slot {
            0 => self.lattice.start.index_select(0, texts), // [m, K]
            _ => {
                // A guess is one of the candidates of its slot.
                let before = self.lattice.ids.select(1, slot - 1).index_select(0, texts); // [m, K]
                let place = before.eq_tensor(&tokens.unsqueeze(1)).to_kind(Kind::Int64).argmax(1, true); // [m, 1]
                let pairs = self.lattice.pairs.select(1, slot - 1).index_select(0, texts); // [m, K, K]
                let row = place.unsqueeze(2).expand([-1, 1, pairs.size()[2]], false);
                pairs.gather(1, &row, false).squeeze_dim(1) // [m, K]
            }
        };
        let nothing =
            Tensor::full([ids.size()[0], self.vocabulary], f64::NEG_INFINITY, (scores.kind(), scores.device()));
        Ok(nothing.f_scatter(1, &ids, &scores)?) // [m, DV]
    }
}

impl HeadAtWork for Selector {
    fn walk<'a>(&'a self, drafted: &Drafted<'a>) -> Result<Box<dyn Walk + 'a>> {
        let candidates = self.candidates(&self.finish(drafted.logits()));
        let lattice = self.lattice(&candidates, &self.project(&drafted.rows()), drafted.anchors);
        Ok(Box::new(LatticeWalk { lattice, vocabulary: drafted.head.vocab_size() }))
    }
}

/// LiLiCorr's scorer.
struct Correlated {
    network: Lilicorr,
    top_k: i64,
}

impl HeadAtWork for Correlated {
    fn walk<'a>(&'a self, drafted: &Drafted<'a>) -> Result<Box<dyn Walk + 'a>> {
        let logits = drafted.logits(); // [b, S, V]
        let candidates = Candidates::likeliest(&logits, self.top_k);
        let log_q = &candidates.logits - logits.logsumexp([-1i64].as_slice(), true); // [b, S, K]
        let (context, embedding) = (drafted.last_seen, drafted.embedding);
        let lattice = self.network.lattice(&candidates, &log_q, &drafted.rows(), context, embedding);
        Ok(Box::new(LatticeWalk { lattice, vocabulary: drafted.head.vocab_size() }))
    }
}

// ---- XPress ----

struct XpressWalk<'a> {
    network: &'a Xpress,
    /// `[b, first row + S, 2 r]`
    cache: Tensor,
    /// `[b, S, DV]`
    base: Tensor,
    anchors: &'a Tensor,
    before: &'a Tensor,
    /// `[m, slot]` tokens of the paths, of the step before.
    paths: Option<Tensor>,
}

impl HeadAtWork for Xpress {
    fn walk<'a>(&'a self, drafted: &Drafted<'a>) -> Result<Box<dyn Walk + 'a>> {
        // A slot reads the rows up to its own, and the mean of all.
        let cache = self.cache(drafted.hidden).narrow(1, 0, drafted.first_row + drafted.slots);
        let base = drafted.logits();
        Ok(Box::new(XpressWalk {
            network: self,
            cache,
            base,
            anchors: drafted.anchors,
            before: drafted.before,
            paths: None,
        }))
    }
}

impl Walk for XpressWalk<'_> {
    fn step(&mut self, slot: i64, texts: &Tensor, parents: &Tensor, tokens: &Tensor) -> Result<Tensor> {
        let paths = match &self.paths {
            None => Tensor::zeros([texts.size()[0], 0], (Kind::Int64, texts.device())),
            Some(paths) => Tensor::cat(&[paths.index_select(0, parents), tokens.unsqueeze(1)], 1), // [m, slot]
        };
        let (anchor, earlier) = (of_nodes(self.anchors, texts), of_nodes(self.before, texts));
        let before = Before { anchor: &anchor, earlier: &earlier };
        let (cache, base) = (of_nodes(&self.cache, texts), of_nodes(&self.base, texts));
        let logits = self.network.step(&cache, &base, before, slot, &paths); // [m, DV]
        self.paths = Some(paths);
        Ok(logits)
    }
}
