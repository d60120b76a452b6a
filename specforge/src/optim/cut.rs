//! Which elements of a parameter a rank updates, and how the ranks' parts become a whole again.
//!
//! ZeRO, stage 1 (Rajbhandari et al. 2019, <https://arxiv.org/abs/1910.02054>): the optimizer's state is cut over the
//! ranks, values and gradients are whole everywhere. Every parameter is flattened and cut for itself into `W` ranges of
//! one length; the last ones are shorter or empty where the length does not divide.

use tch::Tensor;

use crate::dist::ProcessGroup;
use crate::error::Result;

/// Ranges begin at multiples of this many elements. libtorch's CPU kernel updates whole vectors (16 float32 at most) with
/// fused multiply-adds and what remains at the end one by one, which may round differently: cut elsewhere, an element
/// would be in the remainder of one rank's range and in a vector of the whole.
const ALIGNMENT: i64 = 16;

/// One rank's range of a flattened parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    /// Elements of the whole parameter.
    whole: i64,
    /// Ranges; 1 without sharding.
    ranges: i64,
    start: i64,
    /// Elements of this rank's range.
    pub(super) length: i64,
    /// The rank that has everything, where one does.
    owner: Option<usize>,
}

impl Cut {
    /// Range `rank` of `world_size` of `whole` elements.
    pub(super) fn new(whole: usize, rank: usize, world_size: usize) -> Self {
        let (whole, rank, world_size) = (whole as i64, rank as i64, world_size as i64);
        let stride = match world_size {
            1 => whole,
            _ => (whole as u64).div_ceil(world_size as u64).next_multiple_of(ALIGNMENT as u64) as i64,
        };
        let start = (rank * stride).min(whole);
        Self { whole, ranges: world_size, start, length: stride.min(whole - start), owner: None }
    }

    /// Everything for the rank `owner`, nothing for the others.
    pub(super) fn owned(whole: usize, owner: usize, rank: usize, world_size: usize) -> Self {
        if world_size == 1 {
            return Self::new(whole, 0, 1);
        }
        let (whole, ranges) = (whole as i64, world_size as i64);
        Self { whole, ranges, start: 0, length: if rank == owner { whole } else { 0 }, owner: Some(owner) }
    }

    /// Whether there is one range only, everything.
    pub(super) fn is_whole(&self) -> bool {
        self.ranges == 1
    }

    /// This rank's elements of a whole contiguous tensor, in its memory.
    pub(super) fn part(&self, whole: &Tensor) -> Result<Tensor> {
        if self.is_whole() {
            return Ok(whole.shallow_clone());
        }
        Ok(whole.f_view(-1)?.f_narrow(0, self.start, self.length)?)
    }

    /// Every rank's elements of a contiguous `whole` reach the others, straight from memory to memory: one broadcast for
    /// each range. An all-gather would copy everything twice more, and took up to twice as long over Gloo. A collective if
    /// there is more than one range.
    pub(super) fn gather(&self, whole: &Tensor, group: &ProcessGroup) -> Result<()> {
        if self.is_whole() {
            return Ok(());
        }
        let flat = whole.f_view(-1)?;
        if let Some(owner) = self.owner {
            return group.broadcast(&flat, owner);
        }
        for root in 0..group.world_size() {
            let cut = Self::new(self.whole as usize, root, group.world_size());
            if cut.length > 0 {
                group.broadcast(&cut.part(&flat)?, root)?;
            }
        }
        Ok(())
    }

    /// Every rank's `part` in one flat tensor, a new one. A collective if there is more than one range; otherwise `part`.
    pub(super) fn gathered(&self, part: &Tensor, group: &ProcessGroup) -> Result<Tensor> {
        if self.is_whole() {
            return Ok(part.shallow_clone());
        }
        let whole = Tensor::f_empty([self.whole], (part.kind(), part.device()))?;
        self.part(&whole)?.f_copy_(part)?;
        self.gather(&whole, group)?;
        Ok(whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_every_element_once_and_begin_at_vectors() {
        for whole in [0, 1, 15, 16, 17, 31, 32, 33, 100, 1000, 4096] {
            for world_size in 1..=5 {
                let cuts: Vec<Cut> = (0..world_size).map(|rank| Cut::new(whole, rank, world_size)).collect();
                let mut next = 0;
                for cut in &cuts {
                    assert!(cut.length == 0 || cut.start % 16 == 0, "{cut:?}");
                    assert_eq!(cut.start, next);
                    next += cut.length;
                }
                assert_eq!(next, whole as i64, "{cuts:?}");
                assert!(cuts[0].length < (whole / world_size) as i64 + 17);
            }
        }
        assert_eq!(Cut::new(128, 1, 2), Cut { whole: 128, ranges: 2, start: 64, length: 64, owner: None });
    }
}
