//! Heads that correct the logits of a slot by the tokens drafted before it, and the walk from slot to slot.
//!
//! The backbone has given the rows of a block and their logits in one pass; what is left is a few small products for each
//! slot, one after the other. Whoever walks decides how a token is picked: [`greedy`], or a sample.
//!
//! Shape legend: `n` blocks, `B` rows of a block, `S` slots, `H` hidden size, `DV` vocabulary of the draft, `K` tokens that a
//! slot chooses among: `DV`, or the candidates of a pool.

use tch::Tensor;

use crate::error::{Error, Result};

/// What the backbone makes of some blocks.
#[derive(Debug)]
pub struct Drafted<'a> {
    /// `[n, B, H]` behind the last norm.
    pub hidden: &'a Tensor,
    /// The row of the first slot.
    pub first_row: i64,
    /// `[n, S, DV]` logits of the slots, of as many as are drafted at least.
    pub base: &'a Tensor,
    /// `[n]` the newest committed tokens, by the target's numbers.
    pub anchors: &'a Tensor,
    /// `[V, H]` the target's embedding.
    pub embedding: &'a Tensor,
    /// `[DV]` the target's numbers of the draft's tokens, where they differ.
    pub tokens: Option<&'a Tensor>,
    /// `[n, K]` the tokens that corrected slots choose among, by the draft's numbers; all where there is no pool.
    pub pool: Option<Tensor>,
}

impl Drafted<'_> {
    /// `[n, H]` the row of a slot.
    pub fn row(&self, slot: i64) -> Tensor {
        self.hidden.select(1, self.first_row + slot)
    }

    /// The target's numbers of some of a step's columns, `[n]` each.
    fn named(&self, columns: Option<&Tensor>, picked: &Tensor) -> Result<Tensor> {
        let own = match columns {
            Some(columns) => columns.f_gather(1, &picked.unsqueeze(1), false)?.squeeze_dim(1),
            None => picked.shallow_clone(),
        };
        Ok(match self.tokens {
            Some(tokens) => tokens.f_index_select(0, &own)?,
            None => own,
        })
    }
}

/// One slot of a walk.
#[derive(Debug)]
pub struct Step {
    /// `[n, K]` final logits.
    pub logits: Tensor,
    /// `[n, K]` tokens of the columns, by the draft's numbers; the draft's vocabulary where there are none.
    pub columns: Option<Tensor>,
    /// What the next step is given.
    pub state: Tensor,
    /// `[n]` logit of how likely the slot's token is accepted, given that those before it are.
    pub confidence: Option<Tensor>,
}

/// A head that is decoded slot by slot.
pub trait SequentialHead {
    /// Most tokens that a block gives.
    fn drafts(&self) -> i64;
    /// What the first step is given.
    fn start(&self, drafted: &Drafted<'_>) -> Result<Tensor>;
    /// The slot behind the tokens `previous [n]`, by the target's numbers: the anchors for the first slot.
    fn step(&self, drafted: &Drafted<'_>, slot: i64, previous: &Tensor, state: &Tensor) -> Result<Step>;
}

/// The tokens of some blocks.
#[derive(Debug)]
pub struct Walk {
    /// `[n, count]` by the target's numbers.
    pub tokens: Tensor,
    /// `[n, K]` final logits of each slot along the path.
    pub logits: Vec<Tensor>,
    /// `[n, count]`, where the head has an opinion.
    pub confidence: Option<Tensor>,
}

/// Drafts `count` tokens of every block. `pick` is given a slot and its final logits `[n, K]` and answers with a column of
/// each block, `[n]`.
pub fn walk(
    head: &dyn SequentialHead,
    drafted: &Drafted<'_>,
    count: i64,
    pick: &mut dyn FnMut(i64, &Tensor) -> Result<Tensor>,
) -> Result<Walk> {
    let most = head.drafts().min(drafted.base.size()[1]);
    if !(1..=most).contains(&count) {
        let problem = format!("a block of this draft gives 1 to {most} tokens, and {count} are asked for");
        return Err(Error::Failed(problem));
    }
    let _guard = tch::no_grad_guard();
    let mut state = head.start(drafted)?;
    let mut previous = drafted.anchors.shallow_clone();
    let (mut tokens, mut logits, mut confidence) = (Vec::new(), Vec::new(), Vec::new());
    for slot in 0..count {
        let step = head.step(drafted, slot, &previous, &state)?;
        previous = drafted.named(step.columns.as_ref(), &pick(slot, &step.logits)?)?;
        tokens.push(previous.shallow_clone());
        logits.push(step.logits);
        confidence.extend(step.confidence);
        state = step.state;
    }
    let confidence = if confidence.is_empty() { None } else { Some(Tensor::f_stack(&confidence, 1)?) };
    Ok(Walk { tokens: Tensor::f_stack(&tokens, 1)?, logits, confidence })
}

/// Picks the likeliest.
pub fn greedy(_slot: i64, logits: &Tensor) -> Result<Tensor> {
    Ok(logits.f_argmax(-1, false)?)
}
