//! A draft's own, smaller vocabulary: which tokens of the target it can name. Integers only.
//!
//! Engines read two tables (EAGLE-3, SafeAILab/EAGLE `cb7e084`): `d2t [DV]` int64, the **offset** to add to a draft id to
//! get the target id, and `t2d [V]` bool, whether a target token is in the draft's vocabulary.
//!
//! `choose` picks the tokens from counts, `file` keeps a map on disk, `torch_file` reads the one that SpecForge writes.

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

pub mod choose;
pub mod file;
mod torch_file;

pub use choose::{Choice, Coverage, choose, coverage, coverage_table};
pub use file::{Record, VocabFile, Wanted};

/// The target ids that a draft can name; a draft id is a place in this list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VocabMap {
    target_ids: Vec<i64>,
    target_size: i64,
}

impl VocabMap {
    /// A map from ascending, distinct target ids below `target_size`.
    pub fn new(target_ids: Vec<i64>, target_size: i64) -> Result<Self> {
        let ascending = target_ids.windows(2).all(|pair| pair[0] < pair[1]);
        let within =
            target_ids.first().is_some_and(|&id| id >= 0) && target_ids.last().is_some_and(|&id| id < target_size);
        if !ascending || !within {
            return Err(Error::Failed(format!(
                "vocabulary map: expected ascending, distinct token ids from 0 to {}, and at least one",
                target_size - 1
            )));
        }
        Ok(Self { target_ids, target_size })
    }

    /// The map of two tables that must say the same; otherwise what is wrong with them.
    pub fn from_tables(d2t: &[i64], t2d: &[bool]) -> Result<Self, String> {
        let (draft_size, target_size) = (d2t.len() as i64, t2d.len() as i64);
        if draft_size == 0 || draft_size > target_size {
            return Err(format!("expected 1 to {target_size} tokens in `d2t`, as `t2d` has, got {draft_size}"));
        }
        let mut target_ids = Vec::with_capacity(d2t.len());
        let mut before = -1;
        for (draft, &offset) in (0..).zip(d2t) {
            let id = offset.checked_add(draft).filter(|id| (before + 1..target_size).contains(id)).ok_or_else(|| {
                format!(
                    "`d2t[{draft}]` is {offset}: draft token {draft} plus its offset must be a target token from {} to \
                     {}",
                    before + 1,
                    target_size - 1
                )
            })?;
            if !t2d[id as usize] {
                return Err(format!(
                    "`d2t` and `t2d` disagree: draft token {draft} is target token {id}, and `t2d[{id}]` is false"
                ));
            }
            target_ids.push(id);
            before = id;
        }
        let named = t2d.iter().filter(|&&named| named).count() as i64;
        if named != draft_size {
            return Err(format!("`t2d` names {named} tokens, `d2t` has {draft_size}"));
        }
        Ok(Self { target_ids, target_size })
    }

    /// `DV`, tokens the draft can name.
    pub fn draft_size(&self) -> i64 {
        self.target_ids.len() as i64
    }

    /// `V`, tokens of the target.
    pub fn target_size(&self) -> i64 {
        self.target_size
    }

    /// The target id of each draft id, ascending.
    pub fn target_ids(&self) -> &[i64] {
        &self.target_ids
    }

    /// The draft id of a target id.
    pub fn draft_id(&self, target_id: i64) -> Option<i64> {
        self.target_ids.binary_search(&target_id).ok().map(|id| id as i64)
    }

    /// What to add to each draft id to get its target id, `[DV]`.
    pub fn d2t(&self) -> Vec<i64> {
        self.target_ids.iter().enumerate().map(|(draft, target)| target - draft as i64).collect()
    }

    /// Whether each target token can be named, `[V]`.
    pub fn t2d(&self) -> Vec<bool> {
        let mut named = vec![false; self.target_size as usize];
        self.target_ids.iter().for_each(|&id| named[id as usize] = true);
        named
    }

    /// SHA-256 of the map itself, as hexadecimal digits: the same for the same tokens, wherever they are stored.
    pub fn hash(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.target_size.to_le_bytes());
        self.target_ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_agree_with_each_other() {
        let map = VocabMap::new(vec![1, 3, 9, 14], 16).unwrap();
        assert_eq!(map.d2t(), [1, 2, 7, 11]);
        let named: Vec<i64> = (0..16).filter(|&id| map.t2d()[id as usize]).collect();
        assert_eq!(named, map.target_ids());
        assert_eq!((map.draft_id(9), map.draft_id(10)), (Some(2), None));
        assert_eq!(VocabMap::from_tables(&map.d2t(), &map.t2d()).unwrap(), map);
    }

    #[test]
    fn ids_that_make_no_map_are_refused() {
        for bad in [vec![], vec![2, 1], vec![1, 1], vec![-1, 2], vec![1, 16]] {
            assert!(VocabMap::new(bad, 16).is_err());
        }
    }

    #[test]
    fn tables_that_disagree_are_refused_with_the_place() {
        let t2d = |ids: &[usize]| (0..6).map(|id| ids.contains(&id)).collect::<Vec<bool>>();
        let cases: [(&[i64], &[usize], &str); 8] = [
            (&[], &[], "expected 1 to 6 tokens in `d2t`, as `t2d` has, got 0"),
            (&[0; 7], &[0, 1, 2, 3, 4, 5], "got 7"),
            (&[1, 3], &[1, 5], "draft token 1 is target token 4, and `t2d[4]` is false"),
            (&[1, 3], &[1, 2, 4], "`t2d` names 3 tokens, `d2t` has 2"),
            // Absolute ids instead of offsets.
            (&[1, 4, 5], &[1, 4, 5], "`d2t[2]` is 5: draft token 2 plus its offset must be a target token from 6 to 5"),
            (&[2, 0], &[1, 2], "`d2t[1]` is 0"),
            (&[-1], &[0], "`d2t[0]` is -1"),
            (&[0, i64::MAX], &[0, 1], "`d2t[1]` is 9223372036854775807"),
        ];
        for (d2t, named, expected) in cases {
            let problem = VocabMap::from_tables(d2t, &t2d(named)).unwrap_err();
            assert!(problem.contains(expected), "{problem}");
        }
    }

    #[test]
    fn the_hash_follows_tokens_and_both_sizes() {
        let hash = |ids: &[i64], size| VocabMap::new(ids.to_vec(), size).unwrap().hash();
        assert_eq!(hash(&[1, 3], 16), hash(&[1, 3], 16));
        let others = [hash(&[1, 4], 16), hash(&[1, 3], 17), hash(&[1], 16), hash(&[1, 3, 4], 16)];
        assert!(!others.contains(&hash(&[1, 3], 16)));
    }
}
