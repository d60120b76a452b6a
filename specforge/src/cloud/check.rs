//! What is refused of a tree that comes from elsewhere. A tree that passes is one that the target can run: every parent comes
//! before its children, siblings guess different tokens, and every token is the target's.

use thiserror::Error;

use super::protocol::Node;
use crate::tree::TokenTree;

/// Why a tree is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BadTree {
    /// More nodes than are allowed.
    #[error("the tree has {got} nodes behind its root, at most {most} are verified")]
    TooManyNodes {
        /// Nodes behind the root.
        got: usize,
        /// What is allowed.
        most: usize,
    },
    /// A parent that is not there.
    #[error("node {node} stands behind node {parent}; the last one is {last}")]
    NoSuchParent {
        /// The node.
        node: usize,
        /// Its parent.
        parent: usize,
        /// The last node of the tree.
        last: usize,
    },
    /// A node that is its own ancestor.
    #[error("node {node} is its own ancestor, by way of node {parent}")]
    Cycle {
        /// The node.
        node: usize,
        /// Its parent.
        parent: usize,
    },
    /// A parent that comes after its child.
    #[error("node {node} stands behind node {parent}, which comes after it")]
    ParentAfterChild {
        /// The node.
        node: usize,
        /// Its parent.
        parent: usize,
    },
    /// A token that the target does not have.
    #[error("node {node} guesses token {token}; the target's vocabulary has {vocabulary}")]
    TokenOutOfRange {
        /// The node.
        node: usize,
        /// Its guess.
        token: u32,
        /// What the target has.
        vocabulary: i64,
    },
    /// Two siblings with one guess.
    #[error("nodes {first} and {second} stand behind node {parent} and both guess token {token}")]
    DuplicateSiblings {
        /// The first of the two.
        first: usize,
        /// The second.
        second: usize,
        /// Their parent.
        parent: usize,
        /// Their guess.
        token: u32,
    },
}

/// The tree of these nodes behind the last committed token, for a target with so many tokens. Nodes keep their numbers.
pub fn tree(root: u32, nodes: &[Node], vocabulary: i64, most: usize) -> Result<TokenTree, BadTree> {
    if nodes.len() > most {
        return Err(BadTree::TooManyNodes { got: nodes.len(), most });
    }
    let mut tree = TokenTree::root(root);
    for (index, &Node { parent, token }) in nodes.iter().enumerate() {
        let (node, parent) = (index + 1, parent as usize);
        if parent > nodes.len() {
            return Err(BadTree::NoSuchParent { node, parent, last: nodes.len() });
        }
        if parent >= node {
            return Err(match is_own_ancestor(nodes, node) {
                true => BadTree::Cycle { node, parent },
                false => BadTree::ParentAfterChild { node, parent },
            });
        }
        if i64::from(token) >= vocabulary {
            return Err(BadTree::TokenOutOfRange { node, token, vocabulary });
        }
        if let Some(first) = tree.child(parent, token) {
            return Err(BadTree::DuplicateSiblings { first, second: node, parent, token });
        }
        tree.push(parent, token);
    }
    Ok(tree)
}

/// Whether a node is met again on the way from it to the root. Parents may be anything.
fn is_own_ancestor(nodes: &[Node], node: usize) -> bool {
    let mut at = node;
    // A way that is longer than the tree goes in a circle, though perhaps not through this node.
    for _ in 0..nodes.len() {
        let Some(above) = at.checked_sub(1).and_then(|index| nodes.get(index)) else { return false };
        at = above.parent as usize;
        if at == node {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::noise::keyed_stream;

    fn nodes(of: &[(u32, u32)]) -> Vec<Node> {
        of.iter().map(|&(parent, token)| Node { parent, token }).collect()
    }

    #[test]
    fn a_tree_keeps_its_numbers() {
        let tree = tree(9, &nodes(&[(0, 1), (0, 2), (1, 1), (2, 1), (3, 5)]), 10, 5).unwrap();
        assert_eq!(tree.tokens(), [9, 1, 2, 1, 1, 5]);
        assert_eq!(tree.topology().parents(), [0, 0, 0, 1, 2, 3]);
        assert!(super::tree(9, &[], 10, 0).unwrap().is_empty());
    }

    #[test]
    fn every_broken_tree_is_refused_by_name() {
        use BadTree::*;
        let refused = |of: &[(u32, u32)]| tree(9, &nodes(of), 10, 4).unwrap_err();
        assert_eq!(refused(&[(0, 1); 5]), TooManyNodes { got: 5, most: 4 });
        assert_eq!(refused(&[(0, 1), (4, 2)]), NoSuchParent { node: 2, parent: 4, last: 2 });
        assert_eq!(refused(&[(1, 1)]), Cycle { node: 1, parent: 1 });
        assert_eq!(refused(&[(0, 1), (3, 2), (2, 3)]), Cycle { node: 2, parent: 3 });
        assert_eq!(refused(&[(2, 1), (0, 2)]), ParentAfterChild { node: 1, parent: 2 });
        // The circle lies above it: it is no ancestor of its own.
        assert_eq!(refused(&[(2, 1), (3, 2), (2, 3)]), ParentAfterChild { node: 1, parent: 2 });
        assert_eq!(refused(&[(0, 1), (1, 10)]), TokenOutOfRange { node: 2, token: 10, vocabulary: 10 });
        let twice = DuplicateSiblings { first: 1, second: 3, parent: 0, token: 1 };
        assert_eq!(refused(&[(0, 1), (1, 1), (0, 1)]), twice);
        assert_eq!(refused(&[(u32::MAX, 1)]), NoSuchParent { node: 1, parent: u32::MAX as usize, last: 1 });
    }

    #[test]
    fn whatever_arrives_is_a_tree_or_is_refused() {
        let mut next = keyed_stream(1, 9);
        let mut trees = 0;
        for _ in 0..2000 {
            let count = next() % 8;
            let of: Vec<(u32, u32)> = (0..count).map(|_| ((next() % 6) as u32, (next() % 5) as u32)).collect();
            if let Ok(tree) = tree(1, &nodes(&of), 4, 6) {
                trees += 1;
                assert_eq!(tree.len(), of.len() + 1);
                for (index, &(parent, token)) in of.iter().enumerate() {
                    let node = index + 1;
                    assert_eq!((tree.topology().parents()[node], tree.tokens()[node]), (parent as usize, token));
                }
            }
        }
        assert!((100..1900).contains(&trees), "{trees} trees");
    }
}
