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
    /// Most guesses of both together, where there is a limit: no fewer than the lookup's.
    pub most: Option<usize>,
}

/// The draft's guesses without as many of the unlikeliest as leaves room for `most` with those that the lookup adds.
fn make_room(drafted: Proposal, found: &Proposal, most: usize) -> Proposal {
    // Guesses that both made stay, and with them all before them.
    let mut shared = vec![Some(0); found.tree.len()];
    for node in 1..found.tree.len() {
        let parent = shared[found.tree.topology().parents()[node]];
        shared[node] = parent.and_then(|parent| drafted.tree.child(parent, found.tree.tokens()[node]));
    }
    let added = shared.iter().filter(|place| place.is_none()).count();
    let over = (drafted.tree.len() - 1 + added).saturating_sub(most);
    let mut kept: Vec<usize> = (0..drafted.tree.len()).collect();
    for _ in 0..over {
        let parents = drafted.tree.topology().parents();
        let is_leaf = |node: usize| !kept[1..].iter().any(|&other| parents[other] == node);
        let may_go = kept[1..].iter().copied().filter(|&node| !shared.contains(&Some(node)) && is_leaf(node));
        let Some(least) = may_go.min_by(|&a, &b| drafted.scores[a].total_cmp(&drafted.scores[b]).then(b.cmp(&a)))
        else {
            break;
        };
        kept.retain(|&node| node != least);
    }
    if kept.len() == drafted.tree.len() { drafted } else { drafted.only(&kept) }
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
        let both = |(drafted, found): (Proposal, &Proposal)| match self.most {
            Some(most) => join(make_room(drafted, found, most), found),
            None => join(drafted, found),
        };
        Ok(drafted.into_iter().zip(&found).map(both).collect())
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
        limited(tokens, shortest_match, None)
    }

    fn limited(tokens: &[u32], shortest_match: usize, most: Option<usize>) -> Proposal {
        let lookup = PromptLookup { longest_match: 4, shortest_match, depth: 3, nodes: 3 };
        let mut both = WithLookup { draft: Box::new(Fixed), lookup, alone: 3, most };
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
    fn the_unlikeliest_guesses_of_the_draft_make_room() {
        // 3 4 8 stood behind "1 2": 3 and 4 are the draft's too, its 5 has to go, and nothing else may.
        let text = [1, 2, 3, 4, 8, 1, 2];
        let whole = guesses(&text, 2);
        for most in [4, 5, 100] {
            let proposal = limited(&text, 2, Some(most));
            assert_eq!((proposal.tree, proposal.scores), (whole.tree.clone(), whole.scores.clone()));
        }
        for most in [3, 2] {
            let proposal = limited(&text, 2, Some(most));
            assert_eq!(proposal.tree.tokens(), [2, 3, 4, 8]);
            assert_eq!(proposal.tree.topology().parents(), [0, 0, 1, 2]);
            assert_eq!(proposal.scores, [0.0, 0.9, 0.8, 2.0]);
            assert_eq!(proposal.entropies.as_deref(), Some([0.0, 0.1, 0.2, f64::INFINITY].as_slice()));
        }
        // Nothing in common: 7 and 6 stood there. Leaves go, and what they leave behind as leaves.
        let other = [1, 2, 7, 6, 1, 2];
        assert_eq!(limited(&other, 2, Some(5)).tree.tokens(), [2, 3, 4, 7, 6, 1]);
        assert_eq!(limited(&other, 2, Some(4)).tree.tokens(), [2, 3, 7, 6, 1]);
        assert_eq!(limited(&other, 2, Some(3)).tree.tokens(), [2, 7, 6, 1]);
        // Where nothing is found, nothing has to go.
        assert_eq!(limited(&[9, 1, 2], 1, Some(3)).tree.tokens(), [2, 3, 4, 5]);
    }

    #[test]
    fn the_draft_is_asked_unless_the_lookup_is_sure() {
        assert_eq!(guesses(&[9, 1, 2], 1).tree.tokens(), [2, 3, 4, 5]);
        assert_eq!(guesses(&[1, 2, 7, 9, 1, 2], 3).tree.tokens(), [2, 3, 4, 5]);
        assert_eq!(guesses(&[0, 1, 2, 7, 0, 1, 2], 1).tree.tokens(), [2, 7, 0, 1]);
    }
}
