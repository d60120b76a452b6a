//! Medusa as a drafter: a static tree, filled with the best guesses of each head.
//!
//! Cai et al. 2024, <https://arxiv.org/abs/2401.10774>; FasterDecoding/Medusa `e2a5d20`, `medusa/model/utils.py`. Head
//! `k` reads the target's last hidden state of the token before the root and guesses `k + 1` behind the root: every node
//! of depth `k + 1` holds one of its guesses, whatever its parent.
//!
//! Different from the reference: the tree may have any size, a path that ends early is not padded with a token, and when
//! sampling the guesses are ranked with the noise that the target will choose by.

use tch::Tensor;

use super::{Asked, Context, DraftSampling, Drafter, DrafterKind, Guesser, Joining, Progress, Trees, choices, last};
use crate::decode::policy::Proposal;
use crate::draft::medusa::MedusaConfig;
use crate::error::{Error, Result};
use crate::export;
use crate::tree::{ChoiceTree, TokenTree};

mod heads;
#[cfg(test)]
pub(crate) mod heads_for_tests;

pub use heads::{Guesses, MedusaHeads, Place};

/// Row of the table of drafters.
pub const KIND: DrafterKind = DrafterKind {
    algorithm: crate::draft::medusa::ALGORITHM.name,
    formats: &[export::medusa::ORIGINAL.name, export::medusa::VLLM.name],
    from_checkpoint: |trained, asked| {
        let config = MedusaConfig::read(&trained.description["draft"])?;
        guesser(MedusaHeads::new(&config, trained.tensors, trained.vocabulary.as_ref(), asked.target)?, asked)
    },
    from_export: |folder, asked| guesser(MedusaHeads::read(folder, asked.target)?, asked),
    default_tree: WHOLE_CHAIN,
    trees: Trees::Static,
};

/// A chain of one guess of every head.
const WHOLE_CHAIN: &str = "chain";

fn guesser<'a>(heads: MedusaHeads, asked: Asked<'a, '_>) -> Result<Guesser<'a>> {
    let tree = match asked.tree {
        WHOLE_CHAIN => format!("chain:{}", heads.len()),
        named => named.to_owned(),
    };
    let drafter = MedusaDrafter::new(heads, &choices::parse(&tree)?, asked.sampling);
    let notes = drafter.warning().map(str::to_owned).into_iter().collect();
    Ok(Guesser { drafter: Box::new(drafter), tree, notes, method: None })
}

/// Guesses with Medusa heads.
#[derive(Debug)]
pub struct MedusaDrafter {
    heads: MedusaHeads,
    tree: ChoiceTree,
    sampling: DraftSampling,
    /// Guesses that the tree asks of a head.
    count: usize,
    warning: Option<String>,
    /// For each row, the hidden state of the token before the root, `[H]`.
    states: Vec<Tensor>,
}

impl MedusaDrafter {
    /// A drafter without rows. What of the tree is deeper than there are heads is left out, with a warning.
    pub fn new(heads: MedusaHeads, tree: &ChoiceTree, sampling: DraftSampling) -> Self {
        let (depth, nodes) = (tree.topology().depth(), tree.topology().len());
        let tree = tree.cut(heads.len());
        let warning = (depth > heads.len()).then(|| {
            let (left, guesses) = (nodes - tree.topology().len(), nodes - 1);
            let count = heads.len();
            format!(
                "the tree is {depth} deep and there are {count} heads: {left} of its {guesses} guesses are left out"
            )
        });
        let topology = tree.topology();
        let count = match sampling {
            DraftSampling::Drawn { .. } => {
                (0..topology.len()).map(|node| topology.children(node).count()).max().unwrap_or(0)
            }
            _ if topology.is_empty() => 0,
            _ => tree.ranks().iter().max().map_or(0, |rank| rank + 1),
        };
        Self { heads, tree, sampling, count, warning, states: Vec::new() }
    }

    /// What the user should know of the tree.
    pub fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }

    /// The tree, as far as there are heads for it.
    pub fn tree(&self) -> &ChoiceTree {
        &self.tree
    }

    /// The tree with guesses, one list for each head. A node whose head has no guess of its rank is not there, and
    /// neither is what hangs on it.
    fn fill(&self, root: u32, guesses: &[Guesses], depth: usize) -> Proposal {
        let topology = self.tree.topology();
        let mut proposal = Proposal::nothing(root);
        let mut filled = TokenTree::root(root);
        let mut nodes: Vec<Option<usize>> = vec![None; topology.len()];
        nodes[0] = Some(0);
        for node in 1..topology.len() {
            let at = topology.depths()[node];
            if at > depth {
                break;
            }
            let Some(parent) = nodes[topology.parents()[node]] else { continue };
            let Some(guesses) = guesses.get(at - 1) else { break };
            let rank = match guesses.drawn_from {
                // Draws are worth something in their order only: none may be passed over.
                Some(_) => filled.topology().children(parent).count(),
                None => self.tree.ranks()[node],
            };
            let Some(&token) = guesses.tokens.get(rank) else { continue };
            nodes[node] = Some(filled.push(parent, token));
            proposal.scores.push(proposal.scores[parent] + guesses.log_probabilities[rank]);
            proposal.drawn_from.push(None);
            if proposal.drawn_from[parent].is_none() {
                proposal.drawn_from[parent].clone_from(&guesses.drawn_from);
            }
        }
        Proposal { tree: filled, ..proposal }
    }
}

impl Drafter for MedusaDrafter {
    fn capture(&self) -> Vec<usize> {
        vec![self.heads.layer()]
    }

    fn join(&mut self, rows: &[Joining<'_>]) -> Result<()> {
        let states = rows.iter().map(|row| last_state(&row.features)).collect::<Result<Vec<_>>>()?;
        self.states.extend(states);
        Ok(())
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        let wanted = rows.iter().map(|row| row.depth).max().unwrap_or(0);
        let depth = wanted.min(self.tree.topology().depth());
        if depth == 0 {
            return Ok(rows.iter().map(|row| Proposal::nothing(last(row.tokens))).collect());
        }
        let states = Tensor::f_stack(&self.states, 0)?; // [B, H]
        let places: Vec<Place> = rows.iter().map(Place::behind).collect();
        let guesses = self.heads.guess(&states, depth, self.count, self.sampling, &places)?;
        Ok(rows.iter().zip(&guesses).map(|(row, guesses)| self.fill(last(row.tokens), guesses, row.depth)).collect())
    }

    fn commit(&mut self, rows: &[Progress<'_>]) -> Result<()> {
        self.states = rows.iter().map(|row| last_state(&row.features)).collect::<Result<Vec<_>>>()?;
        Ok(())
    }

    fn retain(&mut self, rows: &[usize]) {
        self.states = rows.iter().map(|&row| self.states[row].shallow_clone()).collect();
    }
}

impl Place {
    /// The place behind everything committed.
    pub(super) fn behind(row: &Context<'_>) -> Self {
        Self { position: row.tokens.len(), key: row.key, temperature: row.temperature }
    }
}

/// The last of a row's features `[T, H]`, as a tensor of its own: `[H]`.
pub(super) fn last_state(features: &[Tensor]) -> Result<Tensor> {
    let rows = features.first().filter(|rows| rows.size()[0] > 0);
    let rows = rows.ok_or_else(|| Error::Failed("the engine handed Medusa heads no hidden state".to_owned()))?;
    // A view would keep the whole pass in memory.
    Ok(rows.get(rows.size()[0] - 1).copy())
}

#[cfg(test)]
mod tests;
