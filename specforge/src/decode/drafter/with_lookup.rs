//! A draft whose guesses are joined by what stood in the text before: both in one tree, which the target verifies in one pass.
//!
//! A draft and a lookup are right about different tokens: one about what is usual, the other about names, numbers, code and
//! quotations that the text repeats. Snowflake's Arctic Inference serves the same pair (Oliaro et al. 2024, "SuffixDecoding",
//! <https://arxiv.org/abs/2411.04975>). Different from it: both guess, and only where the lookup is sure the draft is not asked,
//! which saves its passes.

use super::{Context, Drafter, Joining, Progress, PromptLookup};
use crate::decode::policy::Proposal;
use crate::error::Result;

/// A draft and a lookup.
pub struct WithLookup<'a> {
    /// The draft.
    pub draft: Box<dyn Drafter + 'a>,
    /// What looks guesses up, of matches that are long enough to be worth it.
    pub lookup: PromptLookup,
    /// Where so many last tokens stood here before, the draft is not asked.
    pub alone: usize,
}

/// The draft's guesses, and those of the lookup that it did not make.
fn join(mut drafted: Proposal, found: &Proposal) -> Proposal {
    let mut places = vec![0; found.tree.len()];
    for node in 1..found.tree.len() {
        let parent = places[found.tree.topology().parents()[node]];
        places[node] = drafted.tree.push(parent, found.tree.tokens()[node]);
        if places[node] == drafted.scores.len() {
            drafted.scores.push(found.scores[node]);
            drafted.drawn_from.push(None);
            // Nobody was asked how sure it is.
            drafted.entropies.iter_mut().for_each(|entropies| entropies.push(f64::INFINITY));
        }
    }
    Proposal { confidence: None, ..drafted }
}

impl Drafter for WithLookup<'_> {
    fn capture(&self) -> Vec<usize> {
        self.draft.capture()
    }

    fn join(&mut self, rows: &[Joining<'_>]) -> Result<()> {
        self.draft.join(rows)
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        let found = self.lookup.propose(rows)?;
        let sure = |proposal: &Proposal| proposal.scores[1..].iter().any(|score| *score >= self.alone as f64);
        let asked: Vec<Context<'_>> = rows
            .iter()
            .zip(&found)
            .map(|(row, proposal)| if sure(proposal) { Context { depth: 0, ..*row } } else { *row })
            .collect();
        let drafted = self.draft.propose(&asked)?;
        Ok(drafted.into_iter().zip(&found).map(|(drafted, found)| join(drafted, found)).collect())
    }

    fn commit(&mut self, rows: &[Progress<'_>]) -> Result<()> {
        self.draft.commit(rows)
    }

    fn retain(&mut self, rows: &[usize]) {
        self.draft.retain(rows);
    }

    fn can_rewind(&self) -> bool {
        self.draft.can_rewind()
    }

    fn rewind(&mut self, lengths: &[usize]) -> Result<()> {
        self.draft.rewind(lengths)
    }

    fn cache_lengths(&self) -> Vec<i64> {
        self.draft.cache_lengths()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::TokenTree;

    /// Guesses 3 4 and 3 5 as deep as it is asked to.
    struct Fixed;

    impl Drafter for Fixed {
        fn join(&mut self, _rows: &[Joining<'_>]) -> Result<()> {
            Ok(())
        }

        fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
            let mut tree = TokenTree::chain(2, &[3, 4]);
            tree.push(1, 5);
            let proposal = Proposal::picked(tree, vec![0.0, 0.9, 0.8, 0.7])
                .with_confidence(vec![1.0, 2.0, 3.0])
                .with_entropies(Some(vec![0.0, 0.1, 0.2, 0.3]));
            Ok(rows.iter().map(|row| proposal.clone().cut(row.depth)).collect())
        }

        fn commit(&mut self, _rows: &[Progress<'_>]) -> Result<()> {
            Ok(())
        }

        fn retain(&mut self, _rows: &[usize]) {}
    }

    fn guesses(tokens: &[u32], shortest_match: usize) -> Proposal {
        let lookup = PromptLookup { longest_match: 4, shortest_match, depth: 3, nodes: 3 };
        let mut both = WithLookup { draft: Box::new(Fixed), lookup, alone: 3 };
        both.propose(&[Context { tokens, depth: 3, key: 0, temperature: 0.0 }]).unwrap().remove(0)
    }

    #[test]
    fn both_share_what_they_agree_on() {
        // "1 2" stood here before, and 3 4 8 behind it.
        let proposal = guesses(&[1, 2, 3, 4, 8, 1, 2], 2);
        assert_eq!(proposal.tree.tokens(), [2, 3, 4, 5, 8]);
        assert_eq!(proposal.tree.topology().parents(), [0, 0, 1, 1, 2]);
        assert_eq!(proposal.scores, [0.0, 0.9, 0.8, 0.7, 2.0]);
        assert_eq!(proposal.drawn_from.len(), 5);
        assert_eq!(proposal.entropies.as_deref(), Some([0.0, 0.1, 0.2, 0.3, f64::INFINITY].as_slice()));
        // A budget of what is verified goes by the draft's own word for every guess.
        assert_eq!(proposal.confidence, None);
    }

    #[test]
    fn the_draft_is_asked_unless_the_lookup_is_sure() {
        assert_eq!(guesses(&[9, 1, 2], 1).tree.tokens(), [2, 3, 4, 5]);
        assert_eq!(guesses(&[1, 2, 7, 9, 1, 2], 3).tree.tokens(), [2, 3, 4, 5]);
        assert_eq!(guesses(&[0, 1, 2, 7, 0, 1, 2], 1).tree.tokens(), [2, 7, 0, 1]);
    }
}
