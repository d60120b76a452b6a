//! How prompts are cut into passes: short ones run together, padded to one length, and long ones piece by piece.

use std::ops::Range;

/// Sizes of the passes over prompts, in tokens of a batch with its padding.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Passes {
    /// Most tokens of prompts that run together. More gains nothing and costs memory.
    together: usize,
    /// Tokens of a piece of a prompt that is longer than that. A piece sees everything before it, so its mask and its
    /// scores grow with the prompt: smaller pieces keep both small.
    piece: usize,
}

impl Default for Passes {
    fn default() -> Self {
        Self { together: 8192, piece: 2048 }
    }
}

/// Prompts share a pass while the longest has at most this many tokens more than 1.25 times the shortest.
const SLACK: usize = 16;

impl Passes {
    /// Other sizes, for tests.
    #[cfg(test)]
    pub(crate) fn of(together: usize, piece: usize) -> Self {
        Self { together, piece }
    }

    /// How many prompts of these lengths, ascending, go into one pass: at least one.
    pub(crate) fn group(&self, lengths: impl Iterator<Item = usize>) -> usize {
        let mut most = None;
        let fits = |&(index, length): &(usize, usize)| {
            let most = *most.get_or_insert(length + length / 4 + SLACK);
            length <= most && (index + 1) * length <= self.together
        };
        lengths.enumerate().take_while(fits).count().max(1)
    }

    /// The pieces of a group whose longest prompt has so many tokens. A prompt of more than one piece is alone.
    pub(crate) fn pieces(&self, longest: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let piece = if longest > self.together { self.piece } else { longest.max(1) };
        (0..longest).step_by(piece).map(move |start| start..longest.min(start + piece))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_hold_prompts_of_similar_length_and_bounded_size() {
        let group = |lengths: &[usize]| Passes::default().group(lengths.iter().copied());
        assert_eq!(group(&[4, 10, 21, 22]), 3);
        assert_eq!(group(&[100, 141, 142]), 2);
        assert_eq!(group(&[4000, 4000, 4000]), 2);
        assert_eq!(group(&[9000, 9000]), 1);
    }

    #[test]
    fn long_prompts_run_in_pieces_and_short_ones_at_once() {
        let pieces = |longest| Passes::of(10, 4).pieces(longest).collect::<Vec<_>>();
        assert_eq!(pieces(10), vec![0..10; 1]);
        assert_eq!(pieces(11), [0..4, 4..8, 8..11]);
        assert_eq!(pieces(12), [0..4, 4..8, 8..12]);
        assert!(pieces(0).is_empty());
    }
}
