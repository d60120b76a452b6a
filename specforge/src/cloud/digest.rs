//! A running hash of committed tokens: two lists of one length with one digest are the same list, but for chance (2^-64).

use crate::nn::noise::keyed_bits;

/// Noise domain of digests, so that they have nothing to do with any choice.
const DIGEST: u64 = 48;

/// Digest of a list of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Digest {
    bits: u64,
    length: u64,
}

impl Digest {
    /// That of a list.
    pub fn of(tokens: &[u32]) -> Self {
        let mut digest = Self::default();
        digest.extend(tokens);
        digest
    }

    /// Adds tokens at the end.
    pub fn extend(&mut self, tokens: &[u32]) {
        for &token in tokens {
            self.bits = keyed_bits(self.bits, DIGEST, self.length, u64::from(token));
            self.length += 1;
        }
    }

    /// What travels.
    pub fn bits(self) -> u64 {
        self.bits
    }

    /// How many tokens it is of.
    pub fn length(self) -> u64 {
        self.length
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_length_and_every_token_count() {
        let lists: [&[u32]; 6] = [&[], &[0], &[0, 0], &[1, 2], &[2, 1], &[1, 2, 0]];
        for (place, list) in lists.iter().enumerate() {
            for other in &lists[place + 1..] {
                assert_ne!(Digest::of(list).bits(), Digest::of(other).bits(), "{list:?} and {other:?}");
            }
        }
        let mut grown = Digest::of(&[5, 6]);
        grown.extend(&[7]);
        assert_eq!(grown, Digest::of(&[5, 6, 7]));
    }
}
