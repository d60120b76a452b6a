//! Guesses that a draft has run but nobody has verified: where they stand in its cache, and what each may see.
//!
//! A draft runs its tree level by level. Every level lies behind the one before it in the cache, padded to the same number
//! of guesses in every row of the batch.

use tch::{Device, Tensor};

use crate::device;
use crate::error::Result;
use crate::nn::{AttentionMask, TreeMask};

/// A guess that is run next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Branch {
    /// The guess, a token of the target's.
    pub token: u32,
    /// Place of its parent in the level before; 0 behind the root.
    pub parent: usize,
}

/// A guess that was run.
#[derive(Debug, Clone)]
struct Ran {
    token: u32,
    /// Slots behind the row's base, from below the root to the guess itself.
    slots: Vec<i64>,
}

/// The guesses of every row of a batch.
#[derive(Debug, Default)]
pub(super) struct Branches {
    /// Tokens in each row's cache before the first guess.
    base: Vec<i64>,
    levels: Vec<Vec<Vec<Ran>>>,
    /// Slots behind the base that are taken.
    taken: i64,
}

/// Input of the pass over one level.
pub(super) struct Level {
    /// `[B, T]`
    pub ids: Tensor,
    /// `[B, T]`
    pub positions: Tensor,
    /// Places of the parents in the level before, `[B, T]`.
    pub parents: Tensor,
    /// Of the slots behind the base alone: everything before it is seen.
    pub mask: AttentionMask,
    /// `T`
    pub width: i64,
}

impl Branches {
    /// Nothing run yet, behind caches of these lengths.
    pub fn behind(base: &[i64]) -> Self {
        Self { base: base.to_vec(), levels: Vec::new(), taken: 0 }
    }

    /// Tokens in each row's cache before the first guess.
    pub fn base(&self) -> &[i64] {
        &self.base
    }

    /// Adds a level, whose guesses stand one position behind their parents.
    pub fn level(&mut self, frontier: &[Vec<Branch>], device: Device) -> Result<Level> {
        let width = frontier.iter().map(Vec::len).max().unwrap_or(0);
        let slots = self.taken as usize + width;
        let mut mask = vec![false; frontier.len() * width * slots];
        let (mut ids, mut positions, mut parents) = (Vec::new(), Vec::new(), Vec::new());
        let mut level = Vec::new();
        for (row, (branches, &base)) in frontier.iter().zip(&self.base).enumerate() {
            let mut ran = Vec::new();
            for place in 0..width {
                let line = &mut mask[(row * width + place) * slots..][..slots];
                let own = self.taken + place as i64;
                // Padding sees itself, so that its softmax is defined.
                line[own as usize] = true;
                let branch = branches.get(place).copied().unwrap_or(Branch { token: 0, parent: 0 });
                ids.push(i64::from(branch.token));
                positions.push(base + self.levels.len() as i64);
                parents.push(branch.parent as i64);
                if place < branches.len() {
                    let above = self.levels.last().map(|level| level[row][branch.parent].slots.as_slice());
                    let slots: Vec<i64> = above.unwrap_or_default().iter().copied().chain([own]).collect();
                    slots.iter().for_each(|slot| line[*slot as usize] = true);
                    ran.push(Ran { token: branch.token, slots });
                }
            }
            level.push(ran);
        }
        self.levels.push(level);
        self.taken += width as i64;
        let shape = [frontier.len() as i64, width as i64];
        let shaped = |values: &[i64]| device::send(&Tensor::from_slice(values).view(shape), device);
        let seen = device::send(&Tensor::from_slice(&mask).view([shape[0], shape[1], slots as i64]), device);
        Ok(Level {
            ids: shaped(&ids),
            positions: shaped(&positions),
            parents: shaped(&parents),
            mask: AttentionMask::Tree(TreeMask { base: self.base.clone(), seen }),
            width: width as i64,
        })
    }

    /// Keeps the rows named, in that order.
    pub fn retain(&mut self, rows: &[usize]) {
        self.base = rows.iter().map(|&row| self.base[row]).collect();
        for level in &mut self.levels {
            *level = rows.iter().map(|&row| level[row].clone()).collect();
        }
    }

    /// Slots behind the base of the guesses of a row that came true: those along `tokens`, as far as they were run.
    pub fn came_true(&self, row: usize, tokens: &[u32]) -> Vec<i64> {
        let mut path: Vec<i64> = Vec::new();
        for (level, &token) in self.levels.iter().zip(tokens) {
            let depth = path.len();
            let on_the_path = |ran: &&Ran| ran.token == token && ran.slots[..depth] == path[..];
            match level[row].iter().find(on_the_path) {
                Some(ran) => path.push(ran.slots[depth]),
                None => break,
            }
        }
        path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn branch(token: u32, parent: usize) -> Branch {
        Branch { token, parent }
    }

    fn seen(level: &Level, row: i64, place: i64) -> Vec<i64> {
        let AttentionMask::Tree(TreeMask { base, seen }) = &level.mask else { panic!() };
        let behind: Vec<i64> = Vec::try_from(seen.get(row).get(place).nonzero().flatten(0, -1)).unwrap();
        let base = base[row as usize];
        (0..base).chain(behind.into_iter().map(|slot| base + slot)).collect()
    }

    #[test]
    fn guesses_see_their_row_their_ancestors_and_themselves() {
        let mut branches = Branches::behind(&[3, 1]);
        let first = branches.level(&[vec![branch(5, 0), branch(6, 0)], vec![branch(7, 0)]], Device::Cpu).unwrap();
        assert_eq!((seen(&first, 0, 0), seen(&first, 0, 1)), (vec![0, 1, 2, 3], vec![0, 1, 2, 4]));
        assert_eq!((seen(&first, 1, 0), seen(&first, 1, 1)), (vec![0, 1], vec![0, 2]));
        let second = branches.level(&[vec![branch(5, 1)], vec![branch(7, 0), branch(8, 0)]], Device::Cpu).unwrap();
        assert_eq!(seen(&second, 0, 0), [0, 1, 2, 4, 5]);
        assert_eq!((seen(&second, 1, 0), seen(&second, 1, 1)), (vec![0, 1, 3], vec![0, 1, 4]));
        let positions: Vec<i64> = Vec::try_from(second.positions.flatten(0, -1)).unwrap();
        assert_eq!(positions, [4, 4, 2, 2]);
        assert_eq!(branches.came_true(0, &[6, 5, 1]), [1, 2]);
        assert!(branches.came_true(0, &[4, 5]).is_empty());
        assert_eq!(branches.came_true(0, &[5, 5]), [0]);
        assert_eq!(branches.came_true(1, &[7, 8]), [0, 3]);
    }
}
