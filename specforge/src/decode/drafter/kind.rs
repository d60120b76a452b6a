//! A kind of drafter: what makes one of a trained draft. One row for each algorithm that can be decoded with.

use std::path::Path;

use serde_json::Value;
use tch::Tensor;

use super::{DraftSampling, Drafter};
use crate::error::Result;
use crate::models::TargetModel;
use crate::vocab::VocabMap;

/// One row of the table of drafters.
#[derive(Clone, Copy)]
pub struct DrafterKind {
    /// The algorithm, by its name in `draft::algorithms`.
    pub algorithm: &'static str,
    /// The exports it reads, by their names in `export::formats`.
    pub formats: &'static [&'static str],
    /// A drafter of a checkpoint, or of a draft in training.
    pub from_checkpoint: for<'a> fn(&Trained<'_>, Asked<'a, '_>) -> Result<Guesser<'a>>,
    /// A drafter of an exported folder.
    pub from_export: for<'a> fn(&Path, Asked<'a, '_>) -> Result<Guesser<'a>>,
    /// The tree where nobody asks for one.
    pub default_tree: &'static str,
    /// What its trees are like.
    pub trees: Trees,
}

/// What decides the shape of a drafter's trees, and with it how they are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trees {
    /// Nothing is guessed.
    None,
    /// Paths of ranks, chosen beforehand; what a level guesses does not depend on the guesses before it.
    Static,
    /// The draft's own probabilities, up to a depth, a number of children and a number of guesses.
    Dynamic,
    /// What stood in the text before.
    Lookup,
    /// Something of its own: only its default is known.
    Own,
}

/// What a checkpoint holds of a draft. The tensors of a draft in training are the live ones.
#[derive(Debug)]
pub struct Trained<'a> {
    /// `DraftModel::description`.
    pub description: &'a Value,
    /// Parameters and buffers, by name.
    pub tensors: &'a [(String, Tensor)],
    /// The draft's own vocabulary, where it is smaller than the target's.
    pub vocabulary: Option<VocabMap>,
}

/// What a drafter shall do.
#[derive(Clone, Copy)]
pub struct Asked<'a, 't> {
    /// The tree, as `--tree` has it.
    pub tree: &'t str,
    /// Whose tokens it guesses.
    pub target: &'a dyn TargetModel,
    /// How it picks its guesses.
    pub sampling: DraftSampling,
}

/// A drafter that was made.
pub struct Guesser<'a> {
    /// The drafter.
    pub drafter: Box<dyn Drafter + 'a>,
    /// Its tree, as it was understood.
    pub tree: String,
    /// What the user should know.
    pub notes: Vec<String>,
    /// Its algorithm, where a format holds drafts of several.
    pub method: Option<&'static str>,
}
