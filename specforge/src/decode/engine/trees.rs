//! Trees of a round as the target runs over them: padded to one size, each behind its row's cache.

use tch::Tensor;

use crate::decode::policy::Proposal;
use crate::device;
use crate::nn::AttentionMask;
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
pub(super) fn mask(proposals: &[Proposal], nodes: usize, lengths: &[i64], device: tch::Device) -> AttentionMask {
    if nodes == 1 {
        return AttentionMask::Causal;
    }
    let trees: Vec<&TokenTree> = proposals.iter().map(|proposal| &proposal.tree).collect();
    AttentionMask::Visible(device::send(&visible(&trees, nodes, lengths), device))
}

/// What each node sees: its row's cache, its ancestors and itself. `[B, T, S + T]`, where `S` is the longest row's cache.
/// Padding sees itself, so that its softmax is defined.
pub(crate) fn visible(trees: &[&TokenTree], nodes: usize, lengths: &[i64]) -> Tensor {
    let slots = lengths.iter().copied().max().unwrap_or(0) as usize + nodes;
    let mut mask = vec![false; trees.len() * nodes * slots];
    for (row, (tree, &length)) in trees.iter().zip(lengths).enumerate() {
        let (length, own) = (length as usize, tree.len());
        let ancestors = tree.topology().visible();
        for node in 0..nodes {
            let line = &mut mask[(row * nodes + node) * slots..][..slots];
            if node < own {
                line[..length].fill(true);
                line[length..length + own].copy_from_slice(&ancestors[node * own..(node + 1) * own]);
            } else {
                line[length + node] = true;
            }
        }
    }
    Tensor::from_slice(&mask).view([trees.len() as i64, nodes as i64, slots as i64])
}
