//! The running requests: row `i` of the engine is row `i` of every cache.

use tch::Tensor;

use crate::data::Finish;
use crate::decode::drafter::last;
use crate::nn::Processors;

use super::request::{Decoded, Left, Request, RoundOutcome};

/// A request that waits for a place.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) request: Request,
    /// What is done to the target's rows for it.
    pub(super) processors: Processors,
}

impl Waiting {
    pub(super) fn prompt_length(&self) -> usize {
        self.request.prompt.len()
    }
}

/// A running request.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) tag: u64,
    pub(super) key: u64,
    /// What is done to the target's rows for it.
    pub(super) processors: Processors,
    /// Everything committed, the prompt first.
    pub(super) tokens: Vec<u32>,
    pub(super) prompt_length: usize,
    /// New tokens this request may have, the context's end considered.
    pub(super) limit: usize,
    pub(super) rounds: Vec<RoundOutcome>,
    /// What the draft was given of this row so far, where it is kept: of each captured layer `[T, H]`, piece by piece.
    pub(super) features: Vec<Vec<Tensor>>,
}

impl Row {
    /// A request whose prompt is about to be run on a target with this context, which is longer than the prompt.
    pub(super) fn new(Waiting { request, processors }: Waiting, context: usize) -> Self {
        let Request { tag, prompt, max_new_tokens, key } = request;
        let (prompt_length, limit) = (prompt.len(), max_new_tokens.min(context - prompt.len()));
        let (rounds, features) = (Vec::new(), Vec::new());
        Self { tag, key, processors, tokens: prompt, prompt_length, limit, rounds, features }
    }

    pub(super) fn new_tokens(&self) -> usize {
        self.tokens.len() - self.prompt_length
    }

    pub(super) fn left(&self) -> usize {
        self.limit - self.new_tokens()
    }

    /// Why it goes on no further, if it does not.
    pub(super) fn ended(&self, stop_tokens: &[u32]) -> Option<Finish> {
        if self.new_tokens() > 0 && stop_tokens.contains(&last(&self.tokens)) {
            return Some(Finish::Stop);
        }
        (self.left() == 0).then_some(Finish::Length)
    }

    pub(super) fn finish(&mut self, finish: Finish) -> Left {
        let tokens = self.tokens[self.prompt_length..].to_vec();
        let rounds = std::mem::take(&mut self.rounds);
        Left { tag: self.tag, decoded: Ok(Decoded { tag: self.tag, tokens, finish, rounds }) }
    }
}

/// The rows that stay, in the order in which they stay: the place of one that is gone is taken by the last one, so that no
/// other moves.
pub(super) fn staying(gone: &[bool]) -> Vec<usize> {
    let mut rows: Vec<usize> = (0..gone.len()).collect();
    let mut place = 0;
    while place < rows.len() {
        if gone[rows[place]] {
            rows.swap_remove(place);
        } else {
            place += 1;
        }
    }
    rows
}

/// Rows of which the target's rows are processed alike: the processors, and the places of the rows in order.
pub(super) fn alike(rows: &[Row]) -> Vec<(Processors, Vec<usize>)> {
    let mut groups: Vec<(Processors, Vec<usize>)> = Vec::new();
    for (place, row) in rows.iter().enumerate() {
        match groups.iter_mut().find(|(processors, _)| *processors == row.processors) {
            Some((_, places)) => places.push(place),
            None => groups.push((row.processors, vec![place])),
        }
    }
    groups
}

/// The rows named, in that order.
pub(super) fn select(rows: Vec<Row>, order: &[usize]) -> Vec<Row> {
    let mut rows: Vec<Option<Row>> = rows.into_iter().map(Some).collect();
    order.iter().filter_map(|&row| rows[row].take()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_rows_take_the_places_of_those_that_leave() {
        let staying = |gone: &str| staying(&gone.chars().map(|mark| mark == 'x').collect::<Vec<_>>());
        assert_eq!(staying("....."), [0, 1, 2, 3, 4]);
        assert_eq!(staying(".x..."), [0, 4, 2, 3]);
        assert_eq!(staying("....x"), [0, 1, 2, 3]);
        assert_eq!(staying("x..x."), [4, 1, 2]);
        assert_eq!(staying("xx..x"), [3, 2]);
        assert!(staying("xxx").is_empty());
    }
}
