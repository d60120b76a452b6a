//! Draft trees: integers only. Node 0 is the root, the token the target has already chosen; every other node guesses a
//! token behind its parent, and a parent always stands before its children.
//!
//! A [`ChoiceTree`] says which guesses to take (the rank among each depth's best), a [`TokenTree`] what they are. Sizes
//! are free: what a node sees is derived from its parents, never stored in a word of fixed width.

use crate::error::{Error, Result};

/// Guesses of a static tree. What a node sees is a table of all pairs of nodes, made for every pass.
pub const MOST_NODES: usize = 4096;
/// Ranks of a static tree: far beyond what any head can be right with.
const MOST_RANK: usize = 1 << 22;
/// Ranks of a path that a message shows.
const SHOWN: usize = 16;

/// Parents and depths of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    parents: Vec<usize>,
    depths: Vec<usize>,
}

impl Topology {
    /// The root alone.
    fn root() -> Self {
        Self { parents: vec![0], depths: vec![0] }
    }

    fn push(&mut self, parent: usize) -> usize {
        let node = self.parents.len();
        self.parents.push(parent);
        self.depths.push(self.depths[parent] + 1);
        node
    }

    /// Number of nodes, the root included.
    pub fn len(&self) -> usize {
        self.parents.len()
    }

    /// Whether the tree is the root alone.
    pub fn is_empty(&self) -> bool {
        self.len() == 1
    }

    /// Distance of each node from the root.
    pub fn depths(&self) -> &[usize] {
        &self.depths
    }

    /// Depth of the deepest node.
    pub fn depth(&self) -> usize {
        self.depths.iter().copied().max().unwrap_or(0)
    }

    /// Parent of each node; the root is its own.
    pub fn parents(&self) -> &[usize] {
        &self.parents
    }

    /// Nodes from the root down to `node`, both included.
    pub fn path(&self, node: usize) -> Vec<usize> {
        let mut path: Vec<usize> =
            std::iter::successors(Some(node), |&at| (at != 0).then(|| self.parents[at])).collect();
        path.reverse();
        path
    }

    /// Row by row, whether a node (row) sees another (column): its ancestors and itself.
    pub fn visible(&self) -> Vec<bool> {
        let count = self.len();
        let mut visible = vec![false; count * count];
        for node in 0..count {
            // A parent stands before its child: its row is complete, and the child sees what it sees.
            let (before, row) = visible.split_at_mut(node * count);
            let parent = self.parents[node];
            if node != 0 {
                row[..count].copy_from_slice(&before[parent * count..(parent + 1) * count]);
            }
            row[node] = true;
        }
        visible
    }

    /// Children of a node, in order.
    pub fn children(&self, node: usize) -> impl Iterator<Item = usize> + '_ {
        (node + 1..self.len()).filter(move |&child| self.parents[child] == node)
    }

    /// Nodes up to a depth, ascending. With a node its parent is among them.
    pub fn within(&self, depth: usize) -> Vec<usize> {
        (0..self.len()).filter(|&node| self.depths[node] <= depth).collect()
    }

    /// Nodes without children, last one first: for static trees the longest paths come first.
    pub fn leaves(&self) -> Vec<usize> {
        let mut has_child = vec![false; self.len()];
        self.parents.iter().skip(1).for_each(|&parent| has_child[parent] = true);
        (0..self.len()).rev().filter(|&node| !has_child[node]).collect()
    }
}

/// A static tree whose tokens are chosen by rank: at each depth, the `rank`-th most likely token of that depth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChoiceTree {
    topology: Topology,
    ranks: Vec<usize>,
}

impl ChoiceTree {
    /// A tree from paths of ranks, such as `[0], [1], [0, 0]`: the best first guess, the second best, and the best
    /// second guess behind the best first one. Nodes are numbered by length of path, then by the path itself
    /// (FasterDecoding/Medusa `e2a5d20`, `medusa/model/utils.py`).
    pub fn from_choices(choices: &[Vec<usize>]) -> Result<Self> {
        let mut sorted: Vec<&Vec<usize>> = choices.iter().collect();
        sorted.sort_by(|a, b| a.len().cmp(&b.len()).then_with(|| a.cmp(b)));
        let mut tree = Self { topology: Topology::root(), ranks: vec![0] };
        if sorted.len() > MOST_NODES {
            let got = sorted.len();
            return Err(Error::Usage(format!("draft tree: expected at most {MOST_NODES} paths, got {got}")));
        }
        for (index, path) in sorted.iter().enumerate() {
            let refuse = |problem: &str| {
                // A path that is no tree's may be of any length.
                let shown = &path[..path.len().min(SHOWN)];
                Err(Error::Usage(format!("draft tree: path {shown:?} {problem}")))
            };
            if let Some(rank) = path.iter().find(|rank| **rank > MOST_RANK) {
                return refuse(&format!("has the rank {rank}; expected ranks from 0 to {MOST_RANK}"));
            }
            let Some((&rank, before)) = path.split_last() else {
                return refuse("is empty: the root is there without being named");
            };
            if index > 0 && sorted[index - 1] == *path {
                return refuse("is there twice");
            }
            let parent = match before {
                [] => 0,
                _ => match sorted[..index]
                    .binary_search_by(|other| other.len().cmp(&before.len()).then_with(|| other.as_slice().cmp(before)))
                {
                    Ok(position) => position + 1,
                    Err(_) => return refuse("has no parent in the tree"),
                },
            };
            tree.topology.push(parent);
            tree.ranks.push(rank);
        }
        Ok(tree)
    }

    /// The best guess behind the best guess, `length` of them.
    pub fn chain(length: usize) -> Self {
        let mut tree = Self { topology: Topology::root(), ranks: vec![0; length + 1] };
        (0..length).for_each(|node| {
            tree.topology.push(node);
        });
        tree
    }

    /// The paths of [`ChoiceTree::from_choices`], in the order of the nodes.
    pub fn choices(&self) -> Vec<Vec<usize>> {
        let ranks = |node| self.topology.path(node)[1..].iter().map(|&node| self.ranks[node]).collect();
        (1..self.topology.len()).map(ranks).collect()
    }

    /// Without what is deeper than `depth`.
    pub fn cut(&self, depth: usize) -> Self {
        // Nodes are numbered by depth: those that stay are the first ones.
        let stay = self.topology.depths.iter().take_while(|&&at| at <= depth).count();
        let (parents, depths) = (self.topology.parents[..stay].to_vec(), self.topology.depths[..stay].to_vec());
        Self { topology: Topology { parents, depths }, ranks: self.ranks[..stay].to_vec() }
    }

    /// Parents and depths.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Rank of each node's token among the guesses of its depth; 0 for the root.
    pub fn ranks(&self) -> &[usize] {
        &self.ranks
    }
}

/// A tree of guessed tokens. Siblings guess different tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenTree {
    topology: Topology,
    tokens: Vec<u32>,
}

impl TokenTree {
    /// The root alone: nothing is guessed.
    pub fn root(token: u32) -> Self {
        Self { topology: Topology::root(), tokens: vec![token] }
    }

    /// One guess behind the other.
    pub fn chain(root: u32, guesses: &[u32]) -> Self {
        let mut tree = Self::root(root);
        let mut node = 0;
        for &token in guesses {
            node = tree.push(node, token);
        }
        tree
    }

    /// Guesses `token` behind `parent` and returns its node: the one that is there, where a sibling guesses it already.
    ///
    /// # Panics
    /// If `parent` is no node of the tree.
    pub fn push(&mut self, parent: usize, token: u32) -> usize {
        if let Some(node) = self.child(parent, token) {
            return node;
        }
        self.tokens.push(token);
        self.topology.push(parent)
    }

    /// Parents and depths.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Number of nodes, the root included.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether nothing is guessed.
    pub fn is_empty(&self) -> bool {
        self.len() == 1
    }

    /// Token of each node.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The child of `node` that guesses `token`.
    pub fn child(&self, node: usize, token: u32) -> Option<usize> {
        self.topology.children(node).find(|&child| self.tokens[child] == token)
    }

    /// The tree of these nodes alone: ascending, the root the first of them, and with every node its parent.
    pub fn only(&self, kept: &[usize]) -> Self {
        let mut tree = Self::root(self.tokens[0]);
        for &node in &kept[1..] {
            let parent = kept.binary_search(&self.topology.parents[node]).unwrap_or(0);
            tree.tokens.push(self.tokens[node]);
            tree.topology.push(parent);
        }
        tree
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_paths_and_leaves() {
        let choices = [vec![0, 0, 0], vec![1], vec![0], vec![1, 0], vec![0, 1], vec![0, 0]];
        let tree = ChoiceTree::from_choices(&choices).unwrap();
        let topology = tree.topology();
        assert_eq!(topology.parents(), [0, 0, 0, 1, 1, 2, 3]);
        assert_eq!(topology.depths(), [0, 1, 1, 2, 2, 2, 3]);
        assert_eq!(tree.ranks(), [0, 0, 1, 0, 1, 0, 0]);
        assert_eq!(
            topology.leaves().into_iter().map(|leaf| topology.path(leaf)).collect::<Vec<_>>(),
            [vec![0, 1, 3, 6], vec![0, 2, 5], vec![0, 1, 4]]
        );
        let row = &topology.visible()[6 * 7..];
        assert_eq!(row, [true, true, false, true, false, false, true]);
        assert_eq!(topology.children(1).collect::<Vec<_>>(), [3, 4]);
    }

    #[test]
    fn a_choice_tree_gives_its_paths_back_and_can_be_cut() {
        let choices = [vec![0], vec![2], vec![0, 1], vec![2, 0], vec![2, 0, 3]];
        let tree = ChoiceTree::from_choices(&choices).unwrap();
        assert_eq!(tree.choices(), choices);
        for depth in 0..5 {
            let within: Vec<_> = choices.iter().filter(|path| path.len() <= depth).cloned().collect();
            assert_eq!(tree.cut(depth), ChoiceTree::from_choices(&within).unwrap());
        }
        assert_eq!(ChoiceTree::chain(3).choices(), [vec![0], vec![0, 0], vec![0, 0, 0]]);
    }

    #[test]
    fn broken_trees_are_refused() {
        for (choices, problem) in
            [(vec![vec![0, 1]], "no parent"), (vec![vec![0], vec![0]], "twice"), (vec![vec![]], "empty")]
        {
            assert!(ChoiceTree::from_choices(&choices).unwrap_err().to_string().contains(problem));
        }
    }

    #[test]
    fn siblings_guess_different_tokens() {
        let mut tree = TokenTree::root(9);
        let first = tree.push(0, 4);
        assert_eq!((tree.push(0, 5), tree.push(0, 4), tree.push(first, 4)), (2, first, 3));
        assert_eq!((tree.child(0, 5), tree.child(0, 9), tree.child(first, 4)), (Some(2), None, Some(3)));
        assert_eq!(tree.topology().parents(), [0, 0, 0, 1]);
    }

    #[test]
    fn a_cut_tree_is_the_upper_part() {
        let mut tree = TokenTree::chain(1, &[2, 3, 4]);
        tree.push(0, 7);
        tree.push(4, 8);
        let kept = tree.topology().within(2);
        assert_eq!(kept, [0, 1, 2, 4, 5]);
        let cut = tree.only(&kept);
        assert_eq!(cut.tokens(), [1, 2, 3, 7, 8]);
        assert_eq!(cut.topology().parents(), [0, 0, 1, 0, 3]);
        assert!(tree.only(&tree.topology().within(0)).is_empty());
    }
}
