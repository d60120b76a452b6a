//! What a draft would guess behind every token of answers that the target decodes by itself.
//!
//! A round begins where the one before it ended, which depends on the tree. Guesses at every token let every tree be tried on
//! paper afterwards: what is guessed depends on the committed tokens alone.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use crate::decode::drafter::{Context, Joining, Progress};
use crate::decode::event::Silent;
use crate::decode::policy::Proposal;
use crate::decode::{Drafter, Engine, EngineOptions, Finish, Request};
use crate::error::{Error, Result};
use crate::models::TargetModel;
use crate::tree::TokenTree;

/// A prompt to answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// What it is called.
    pub id: String,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// The request's own key of the sampling noise; no two are equal.
    pub key: u64,
}

/// What the target answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// New tokens; the first comes from the prompt's pass.
    pub tokens: Vec<u32>,
    /// Whether it ended by itself.
    pub ended: bool,
}

impl Answer {
    /// Tokens that stand behind each token but the last: what should be guessed there.
    pub fn continuations(&self) -> impl Iterator<Item = &[u32]> {
        (1..self.tokens.len()).map(|from| &self.tokens[from..])
    }
}

/// Guesses behind one token.
#[derive(Debug)]
pub struct Noted {
    /// Deepest guess that could be of use.
    pub room: usize,
    /// What is guessed.
    pub tree: TokenTree,
    /// The draft's score of each node.
    pub scores: Vec<f64>,
}

/// How many guesses of a tree come true: the longest path that `continuation` goes.
pub fn accepted(tree: &TokenTree, continuation: &[u32]) -> usize {
    let path = continuation.iter().scan(0, |node, &token| {
        *node = tree.child(*node, token)?;
        Some(())
    });
    path.count()
}

/// Takes the guesses behind every token of an answer but the last: the prompt's place, its answer, and the notes.
pub type Take<'a> = &'a mut dyn FnMut(usize, &Answer, Vec<Noted>) -> Result<()>;

type Notes = Rc<RefCell<HashMap<u64, Vec<Noted>>>>;

/// Guesses as a draft does, writes it down, and lets the target go on without.
struct Probe<'d, 'a> {
    inner: &'d mut (dyn Drafter + 'a),
    /// By the request's key.
    notes: Notes,
}

impl Drafter for Probe<'_, '_> {
    fn capture(&self) -> Vec<usize> {
        self.inner.capture()
    }

    fn join(&mut self, rows: &[Joining<'_>]) -> Result<()> {
        self.inner.join(rows)
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        let proposals = self.inner.propose(rows)?;
        let mut notes = self.notes.borrow_mut();
        for (row, proposal) in rows.iter().zip(proposals) {
            let Proposal { tree, scores, .. } = proposal.cut(row.depth);
            notes.entry(row.key).or_default().push(Noted { room: row.depth, tree, scores });
        }
        let last = |row: &Context<'_>| row.tokens.last().copied().unwrap_or_default();
        Ok(rows.iter().map(|row| Proposal::nothing(last(row))).collect())
    }

    fn commit(&mut self, rows: &[Progress<'_>]) -> Result<()> {
        self.inner.commit(rows)
    }

    fn retain(&mut self, rows: &[usize]) {
        self.inner.retain(rows);
    }

    fn cache_lengths(&self) -> Vec<i64> {
        self.inner.cache_lengths()
    }
}

/// Lets the target answer prompts while a draft guesses beside it. `progress` hears of answers done.
pub fn record(
    target: &dyn TargetModel,
    drafter: &mut dyn Drafter,
    prompts: &[Prompt],
    (options, max_new_tokens): (&EngineOptions, usize),
    take: Take<'_>,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Answer>> {
    let notes: Notes = Rc::default();
    let probe = Probe { inner: drafter, notes: Rc::clone(&notes) };
    let mut engine = Engine::new(target, Box::new(probe), options.clone())?;
    for (tag, Prompt { tokens, key, .. }) in (0..).zip(prompts) {
        engine.submit(Request { tag, prompt: tokens.clone(), max_new_tokens, key: *key })?;
    }
    let mut answers = BTreeMap::new();
    while engine.pending() > 0 {
        for left in engine.step(&mut Silent)? {
            let place = left.tag as usize;
            let prompt = &prompts[place];
            let decoded = left.decoded.map_err(|error| Error::Failed(format!("prompt {}: {error}", prompt.id)))?;
            let answer = Answer { ended: decoded.finish == Finish::Stop, tokens: decoded.tokens };
            let noted = notes.borrow_mut().remove(&prompt.key).unwrap_or_default();
            take(place, &answer, noted)?;
            answers.insert(place, answer);
            progress(answers.len());
        }
    }
    Ok(answers.into_values().collect())
}

/// Best guesses of each level behind the best guess of the level before, best first: all there is to know where a level does
/// not depend on the guesses before it.
pub fn best_of_levels(tree: &TokenTree) -> Vec<Vec<u32>> {
    let mut levels = Vec::new();
    let mut node = Some(0);
    while let Some(parent) = node {
        let children: Vec<usize> = tree.topology().children(parent).collect();
        node = children.first().copied();
        levels.extend((!children.is_empty()).then(|| children.iter().map(|&child| tree.tokens()[child]).collect()));
    }
    levels
}
