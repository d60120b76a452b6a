//! A draft's own, smaller vocabulary: which tokens of the target it can name. Integers only.
//!
//! Engines read two tables (EAGLE-3, SafeAILab/EAGLE `cb7e084`): `d2t [DV]` int64, the **offset** to add to a draft id to
//! get the target id, and `t2d [V]` bool, whether a target token is in the draft's vocabulary.

use crate::error::{Error, Result};

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
    }

    #[test]
    fn ids_that_make_no_map_are_refused() {
        for bad in [vec![], vec![2, 1], vec![1, 1], vec![-1, 2], vec![1, 16]] {
            assert!(VocabMap::new(bad, 16).is_err());
        }
    }
}
