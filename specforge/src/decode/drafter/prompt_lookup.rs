//! Prompt lookup: what followed the last few tokens when they stood here before. No model, no training.
//!
//! Saxena 2023, <https://github.com/apoorvumang/prompt-lookup-decoding>. Different from the reference: every earlier
//! occurrence may contribute, so that guesses form a tree where a text went on in several ways.

use super::{Context, Drafter, Joining, Progress, last};
use crate::decode::policy::Proposal;
use crate::error::Result;
use crate::tree::TokenTree;

/// Looks guesses up in what is already there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PromptLookup {
    /// Longest run of last tokens that is looked for; shorter ones are tried after it.
    pub longest_match: usize,
    /// The shortest that is tried, at least 1.
    pub shortest_match: usize,
    /// Guesses behind one occurrence.
    pub depth: usize,
    /// Most guesses in all.
    pub nodes: usize,
}

impl PromptLookup {
    fn guess(&self, tokens: &[u32], depth: usize) -> Proposal {
        let depth = depth.min(self.depth);
        let mut tree = TokenTree::root(last(tokens));
        let mut scores = vec![0.0];
        let longest = self.longest_match.min(tokens.len().saturating_sub(1));
        'all: for length in (self.shortest_match.max(1)..=longest).rev() {
            let (before, wanted) = tokens.split_at(tokens.len() - length);
            // Newest occurrence first; one that reaches into the last tokens themselves counts too.
            for start in (0..before.len()).rev() {
                if tokens[start..start + length] != *wanted {
                    continue;
                }
                let mut node = 0;
                for &token in tokens[start + length..].iter().take(depth) {
                    if tree.len() > self.nodes {
                        break 'all;
                    }
                    let next = tree.push(node, token);
                    // Longer matches are surer.
                    scores.resize(tree.len(), length as f64);
                    node = next;
                }
            }
            if !tree.is_empty() {
                break;
            }
        }
        Proposal::picked(tree, scores)
    }
}

impl Drafter for PromptLookup {
    fn join(&mut self, _rows: &[Joining<'_>]) -> Result<()> {
        Ok(())
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        Ok(rows.iter().map(|row| self.guess(row.tokens, row.depth)).collect())
    }

    fn commit(&mut self, _rows: &[Progress<'_>]) -> Result<()> {
        Ok(())
    }

    fn retain(&mut self, _rows: &[usize]) {}

    /// Nothing is kept of a row.
    fn can_rewind(&self) -> bool {
        true
    }

    fn rewind(&mut self, _lengths: &[usize]) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOKUP: PromptLookup = PromptLookup { longest_match: 2, shortest_match: 1, depth: 3, nodes: 5 };

    #[test]
    fn the_longest_match_goes_first_and_its_continuations_form_a_tree() {
        // "1 2" stood here twice, followed by 3 4 5 and by 3 6 7.
        let proposal = LOOKUP.guess(&[1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 2, 8, 1, 2], 3);
        assert_eq!(proposal.tree.tokens(), [2, 3, 6, 7, 4, 5]);
        assert_eq!(proposal.tree.topology().parents(), [0, 0, 1, 2, 1, 4]);
        assert_eq!(proposal.scores, [0.0, 2.0, 2.0, 2.0, 2.0, 2.0]);
    }

    #[test]
    fn a_match_that_is_too_short_is_none() {
        let lookup = PromptLookup { shortest_match: 2, ..LOOKUP };
        assert!(lookup.guess(&[1, 2, 3, 4, 2], 3).tree.is_empty());
        assert_eq!(lookup.guess(&[1, 2, 3, 4, 1, 2], 3).tree.tokens(), [2, 3, 4, 1]);
    }

    #[test]
    fn a_repeated_token_continues_itself() {
        assert_eq!(LOOKUP.guess(&[4, 4], 3).tree.tokens(), [4, 4]);
        assert_eq!(LOOKUP.guess(&[4, 4, 4, 4], 3).tree.tokens(), [4, 4, 4]);
    }

    #[test]
    fn nothing_is_guessed_behind_what_is_new() {
        assert!(LOOKUP.guess(&[1, 2, 3], 3).tree.is_empty());
        assert!(LOOKUP.guess(&[9], 3).tree.is_empty());
        assert!(LOOKUP.guess(&[1, 1], 0).tree.is_empty());
    }
}
