//! Trees of a round as the target runs over them: padded to one size, each behind its row's cache.

use tch::{Device, Tensor};

use crate::decode::policy::Proposal;
use crate::device;
use crate::nn::{AttentionMask, TreeMask};
use crate::tree::TokenTree;

/// Token ids and positions of all trees behind caches of these lengths, `[B, T]` each. Padding is token 0 at position 0.
pub(super) fn inputs(proposals: &[Proposal], nodes: usize, lengths: &[i64]) -> (Vec<i64>, Vec<i64>) {
    let mut ids = vec![0i64; proposals.len() * nodes];
    let mut positions = vec![0i64; proposals.len() * nodes];
    for (row, (proposal, &length)) in proposals.iter().zip(lengths).enumerate() {
        let tree = &proposal.tree;
        for (node, (&token, &depth)) in tree.tokens().iter().zip(tree.topology().depths()).enumerate() {
            ids[row * nodes + node] = i64::from(token);
            positions[row * nodes + node] = length + depth as i64;
        }
    }
    (ids, positions)
}

/// What each node sees. Roots alone are ordinary next tokens.
pub(super) fn mask(proposals: &[Proposal], nodes: usize, lengths: &[i64], device: Device) -> AttentionMask {
    if nodes == 1 {
        return AttentionMask::Causal;
    }
    let trees: Vec<&TokenTree> = proposals.iter().map(|proposal| &proposal.tree).collect();
    tree_mask(&trees, nodes, lengths, device)
}

/// What each node sees: its row's cache, its ancestors and itself. Padding sees itself too, so that its softmax is defined.
/// Only `[B, T, T]` is sent to the device.
pub(crate) fn tree_mask(trees: &[&TokenTree], nodes: usize, lengths: &[i64], device: Device) -> AttentionMask {
    let mut seen = vec![false; trees.len() * nodes * nodes];
    for (tree, table) in trees.iter().zip(seen.chunks_exact_mut(nodes * nodes)) {
        let own = tree.len();
        for (line, ancestors) in table.chunks_exact_mut(nodes).zip(tree.topology().visible().chunks_exact(own)) {
            line[..own].copy_from_slice(ancestors);
        }
        (own..nodes).for_each(|node| table[node * nodes + node] = true);
    }
    let seen = Tensor::from_slice(&seen).view([trees.len() as i64, nodes as i64, nodes as i64]);
    AttentionMask::Tree(TreeMask { base: lengths.to_vec(), seen: device::send(&seen, device) })
}
