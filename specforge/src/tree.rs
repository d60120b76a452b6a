//! Draft trees: integers only. Node 0 is the root, the token the target has already chosen; every other node guesses a
//! token behind its parent, and a parent always stands before its children.

use crate::error::{Error, Result};

/// A tree of guesses whose tokens are chosen by rank: at each depth, the `rank`-th most likely token of that depth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DraftTree {
    parents: Vec<usize>,
    depths: Vec<usize>,
    ranks: Vec<usize>,
}

impl DraftTree {
    /// A static tree from paths of ranks, such as `[0], [1], [0, 0]`: the best first guess, the second best, and the
    /// best second guess behind the best first one. Nodes are numbered by length of path, then by the path itself
    /// (FasterDecoding/Medusa `e2a5d20`, `medusa/model/utils.py`).
    pub fn from_choices(choices: &[Vec<usize>]) -> Result<Self> {
        let mut sorted: Vec<&Vec<usize>> = choices.iter().collect();
        sorted.sort_by(|a, b| a.len().cmp(&b.len()).then_with(|| a.cmp(b)));
        let mut tree = Self { parents: vec![0], depths: vec![0], ranks: vec![0] };
        for (index, path) in sorted.iter().enumerate() {
            let refuse = |problem: &str| Err(Error::Usage(format!("draft tree: path {path:?} {problem}")));
            let Some((&rank, before)) = path.split_last() else {
                return refuse("is empty: the root is there without being named");
            };
            if index > 0 && sorted[index - 1] == *path {
                return refuse("is there twice");
            }
            let parent = match before {
                [] => 0,
                _ => match sorted[..index].iter().position(|other| other.as_slice() == before) {
                    Some(position) => position + 1,
                    None => return refuse("has no parent in the tree"),
                },
            };
            tree.parents.push(parent);
            tree.depths.push(path.len());
            tree.ranks.push(rank);
        }
        Ok(tree)
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

    /// Parent of each node; the root is its own.
    pub fn parents(&self) -> &[usize] {
        &self.parents
    }

    /// Rank of each node's token among the guesses of its depth.
    pub fn ranks(&self) -> &[usize] {
        &self.ranks
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
        let mut visible = vec![false; self.len() * self.len()];
        for node in 0..self.len() {
            self.path(node).into_iter().for_each(|seen| visible[node * self.len() + seen] = true);
        }
        visible
    }

    /// Nodes without children, last one first: for static trees the longest paths come first.
    pub fn leaves(&self) -> Vec<usize> {
        let has_child = |node: usize| self.parents.iter().skip(1).any(|&parent| parent == node);
        (0..self.len()).rev().filter(|&node| !has_child(node)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_paths_and_leaves() {
        let choices = [vec![0, 0, 0], vec![1], vec![0], vec![1, 0], vec![0, 1], vec![0, 0]];
        let tree = DraftTree::from_choices(&choices).unwrap();
        assert_eq!(tree.parents(), [0, 0, 0, 1, 1, 2, 3]);
        assert_eq!(tree.depths(), [0, 1, 1, 2, 2, 2, 3]);
        assert_eq!(tree.ranks(), [0, 0, 1, 0, 1, 0, 0]);
        assert_eq!(
            tree.leaves().into_iter().map(|leaf| tree.path(leaf)).collect::<Vec<_>>(),
            [vec![0, 1, 3, 6], vec![0, 2, 5], vec![0, 1, 4]]
        );
        let row = &tree.visible()[6 * 7..];
        assert_eq!(row, [true, true, false, true, false, false, true]);
    }

    #[test]
    fn broken_trees_are_refused() {
        for (choices, problem) in
            [(vec![vec![0, 1]], "no parent"), (vec![vec![0], vec![0]], "twice"), (vec![vec![]], "empty")]
        {
            assert!(DraftTree::from_choices(&choices).unwrap_err().to_string().contains(problem));
        }
    }
}
