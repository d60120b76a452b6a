//! The draft of an edge: what it was told, what of that came true, and what it guessed ahead.
//!
//! A draft that reads tokens alone may be told what has not come true yet: the likeliest path of the tree that is on its way.
//! From there it guesses on while the verdict travels, beginning with what the target will choose behind that path. Whatever
//! the verdict is, the draft goes back to the longest common beginning of what it was told and what is committed. A draft
//! that reads the target's features is told what is committed, when its features come.

use tch::Tensor;

use super::protocol::Choice;
use crate::decode::Proposal;
use crate::decode::drafter::{Context, Drafter, Joining, Progress, last};
use crate::error::{Error, Result};
use crate::tree::TokenTree;

/// How often guessing ahead was worth it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ahead {
    /// Guesses made ahead that were sent.
    pub promoted: u64,
    /// Guesses made ahead that the verdict made useless.
    pub dropped: u64,
}

/// A drafter with one row.
pub(super) struct Drafting<'a> {
    drafter: Box<dyn Drafter + 'a>,
    key: u64,
    temperature: f64,
    /// What the drafter was told; `None` before it has a row.
    told: Option<Vec<u32>>,
    /// Its guesses behind everything it was told. A draft is asked once behind the same tokens: what it has run of its tree is
    /// where its next word begins.
    made: Option<Proposal>,
    /// Whether they were made ahead, and nobody has asked for them yet.
    is_ahead: bool,
    pub(super) counts: Ahead,
}

impl<'a> Drafting<'a> {
    pub(super) fn new(drafter: Box<dyn Drafter + 'a>, choice: &Choice) -> Self {
        let (key, temperature) = (choice.key, choice.processors.temperature);
        Self { drafter, key, temperature, told: None, made: None, is_ahead: false, counts: Ahead::default() }
    }

    /// Hidden states of the target that it reads.
    pub(super) fn capture(&self) -> Vec<usize> {
        self.drafter.capture()
    }

    fn reads_features(&self) -> bool {
        !self.drafter.capture().is_empty()
    }

    /// Whether it can be told what has not come true yet.
    pub(super) fn can_go_ahead(&self) -> bool {
        !self.reads_features() && self.drafter.can_rewind()
    }

    /// Whether it has heard of a session.
    pub(super) fn has_begun(&self) -> bool {
        self.told.is_some()
    }

    /// A session has begun with these tokens, and the features of all but the last.
    pub(super) fn begin(&mut self, tokens: &[u32], features: Vec<Tensor>) -> Result<()> {
        if self.told.is_some() {
            if !self.reads_features() && self.drafter.can_rewind() {
                // What it knows of an earlier session of the same answer stays.
                return Ok(());
            }
            self.drafter.retain(&[]);
        }
        (self.made, self.is_ahead) = (None, false);
        self.drafter.join(&[Joining { tokens, features }])?;
        self.told = Some(tokens.to_vec());
        Ok(())
    }

    /// The last `new` of these tokens were committed. Only a draft that reads features has to hear of it at once.
    pub(super) fn committed(&mut self, tokens: &[u32], new: usize, features: Vec<Tensor>) -> Result<()> {
        if !self.reads_features() && self.drafter.can_rewind() {
            return Ok(());
        }
        self.made = None;
        self.drafter.commit(&[Progress { tokens, new, features }])?;
        self.told = Some(tokens.to_vec());
        Ok(())
    }

    /// Guesses behind these tokens, at most `depth` deep: those that were made ahead, where they are behind the right ones.
    pub(super) fn propose(&mut self, tokens: &[u32], depth: usize) -> Result<Proposal> {
        let ready = self.ready(tokens);
        if std::mem::take(&mut self.is_ahead) {
            self.counts.promoted += u64::from(ready.is_some());
            self.counts.dropped += u64::from(ready.is_none());
        }
        match ready {
            Some(ready) => Ok(ready.cut(depth)),
            None => {
                self.align(tokens)?;
                self.guess(tokens, depth)
            }
        }
    }

    /// Guesses on behind the likeliest path of a tree that is on its way; `depth` is how far an answer may go behind `tokens`.
    pub(super) fn go_ahead(&mut self, tokens: &[u32], sent: &Proposal, depth: usize) -> Result<bool> {
        let path = likeliest(sent);
        if path.is_empty() || depth < path.len() + 2 || !self.can_go_ahead() {
            return Ok(false);
        }
        let hoped = [tokens, &path].concat();
        if self.made.is_some() && self.told.as_ref() == Some(&hoped) {
            return Ok(false);
        }
        self.align(&hoped)?;
        self.guess(&hoped, depth - path.len())?;
        self.is_ahead = true;
        Ok(true)
    }

    /// What there is already of guesses behind these tokens: those that were made, or where the last token was one of them,
    /// what hangs on it.
    fn ready(&self, tokens: &[u32]) -> Option<Proposal> {
        let (told, made) = (self.told.as_ref()?, self.made.as_ref()?);
        if tokens == told {
            return Some(made.clone());
        }
        let (&newest, before) = tokens.split_last()?;
        let node = if before == told && self.can_go_ahead() { made.tree.child(0, newest)? } else { return None };
        Some(behind(made, node))
    }

    fn guess(&mut self, tokens: &[u32], depth: usize) -> Result<Proposal> {
        let mut proposals =
            self.drafter.propose(&[Context { tokens, depth, key: self.key, temperature: self.temperature }])?;
        match (proposals.pop(), proposals.is_empty()) {
            (Some(proposal), true) if proposal.tree.tokens().first() == Some(&last(tokens)) => {
                let proposal = proposal.cut(depth);
                self.made = Some(proposal.clone());
                Ok(proposal)
            }
            _ => Err(Error::Failed("the draft made no single tree behind the last committed token".to_owned())),
        }
    }

    /// Tells the draft of these tokens, and takes back whatever else it was told.
    fn align(&mut self, tokens: &[u32]) -> Result<()> {
        let Some(told) = &mut self.told else {
            return Err(Error::Failed("the draft was asked for guesses before a session began".to_owned()));
        };
        let shared = told.iter().zip(tokens).take_while(|(told, token)| told == token).count();
        if shared < told.len() {
            self.made = None;
            self.drafter.rewind(&[shared])?;
            told.truncate(shared);
        }
        let new = tokens.len() - shared;
        if new > 0 {
            self.made = None;
            self.drafter.commit(&[Progress { tokens, new, features: Vec::new() }])?;
            told.extend(&tokens[shared..]);
        }
        Ok(())
    }

    /// Gives the draft back, without what it knew of the answer.
    pub(super) fn into_drafter(mut self) -> Box<dyn Drafter + 'a> {
        if self.told.is_some() {
            self.drafter.retain(&[]);
        }
        self.drafter
    }

    /// What it was told.
    #[cfg(test)]
    pub(super) fn told(&self) -> &[u32] {
        self.told.as_deref().unwrap_or_default()
    }
}

/// Guesses along the best child of every node, from the root down.
fn likeliest(proposal: &Proposal) -> Vec<u32> {
    let (tree, mut node, mut path) = (&proposal.tree, 0, Vec::new());
    let score = |node: usize| proposal.scores.get(node).copied().unwrap_or(f64::NEG_INFINITY);
    loop {
        // The first of equal ones.
        let best =
            tree.topology().children(node).reduce(|best, child| if score(child) > score(best) { child } else { best });
        match best {
            Some(child) => node = child,
            None => return path,
        }
        path.push(tree.tokens()[node]);
    }
}

/// The part of a proposal that begins with a node.
fn behind(proposal: &Proposal, node: usize) -> Proposal {
    let (tree, topology) = (&proposal.tree, proposal.tree.topology());
    let score = |node: usize| proposal.scores.get(node).copied().unwrap_or(0.0);
    let mut places = vec![None; tree.len()];
    places[node] = Some(0);
    let (mut part, mut scores, mut kept) = (TokenTree::root(tree.tokens()[node]), vec![0.0], vec![node]);
    for child in node + 1..tree.len() {
        if let Some(parent) = places[topology.parents()[child]] {
            places[child] = Some(part.push(parent, tree.tokens()[child]));
            scores.push(score(child) - score(node));
            kept.push(child);
        }
    }
    let own = |entropies: &Vec<f64>| kept.iter().map(|&node| entropies[node]).collect();
    Proposal::picked(part, scores).with_entropies(proposal.entropies.as_ref().map(own))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proposal(parents: &[usize], tokens: &[u32], scores: &[f64]) -> Proposal {
        let mut tree = TokenTree::root(tokens[0]);
        for (&parent, &token) in parents.iter().zip(&tokens[1..]) {
            tree.push(parent, token);
        }
        Proposal::picked(tree, scores.to_vec())
    }

    #[test]
    fn the_likeliest_path_follows_the_best_children() {
        let tree = proposal(&[0, 0, 1, 2, 2], &[1, 2, 3, 4, 5, 6], &[0.0, -2.0, -1.0, -2.1, -3.0, -2.5]);
        assert_eq!(likeliest(&tree), [3, 6]);
        assert!(likeliest(&Proposal::nothing(4)).is_empty());
    }

    #[test]
    fn a_part_of_a_tree_is_what_hangs_on_its_root() {
        let tree = proposal(&[0, 0, 2, 2, 1, 4], &[1, 2, 3, 4, 5, 6, 7], &[0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0]);
        let part = behind(&tree, 2);
        assert_eq!(part.tree.tokens(), [3, 4, 5, 7]);
        assert_eq!(part.tree.topology().parents(), [0, 0, 0, 2]);
        assert_eq!(part.scores, [0.0, -1.0, -2.0, -4.0]);
    }
}
