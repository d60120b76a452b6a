//! What finished requests leave for those that go on where they ended: the next turn of a conversation begins with the last.
//!
//! A row that ends leaves its keys and values, and what the draft reads of the target, in memory of their own. A prompt that
//! begins with the same tokens is given as many of them as it shares and runs the rest alone; its last token is always run,
//! since what comes behind it is asked for. Whatever was asked for longest ago goes when there is no room. What is kept is the
//! target's own: answers change by no more than the order in which numbers are added up.

use tch::Tensor;

use crate::nn::KvCache;

/// Fewer tokens than these are run again: a pass takes as long.
const LEAST: usize = 16;

/// What one row left.
#[derive(Debug)]
struct Prefix {
    tokens: Vec<u32>,
    /// One row that holds these tokens.
    cache: KvCache,
    /// Of each captured layer, `[T, H]`.
    features: Vec<Tensor>,
    bytes: u64,
    /// When it was asked for last.
    used: u64,
}

/// What finished requests left, up to a limit.
#[derive(Debug)]
pub(super) struct Prefixes {
    kept: Vec<Prefix>,
    limit: u64,
    clock: u64,
}

/// What a prompt is given: a row with its first tokens, and their features.
pub(super) struct Given {
    pub(super) cache: KvCache,
    pub(super) features: Vec<Tensor>,
}

impl Prefixes {
    /// Room for so many bytes.
    pub(super) fn new(limit: u64) -> Self {
        Self { kept: Vec::new(), limit, clock: 0 }
    }

    /// Bytes that are kept.
    pub(super) fn bytes(&self) -> u64 {
        self.kept.iter().map(|prefix| prefix.bytes).sum()
    }

    /// Keeps what a row holds of these tokens, `[T, H]` of each layer that the draft reads.
    pub(super) fn keep(&mut self, tokens: &[u32], cache: KvCache, features: Vec<Tensor>) {
        let of_features = |layer: &Tensor| (layer.numel() * layer.kind().elt_size_in_bytes()) as u64;
        let bytes = cache.bytes() + features.iter().map(of_features).sum::<u64>();
        if tokens.len() < LEAST || bytes > self.limit {
            return;
        }
        // A conversation's earlier end is part of its newest.
        self.kept.retain(|prefix| !tokens.starts_with(&prefix.tokens));
        self.clock += 1;
        self.kept.push(Prefix { tokens: tokens.to_vec(), cache, features, bytes, used: self.clock });
        while self.bytes() > self.limit {
            let oldest = (0..self.kept.len()).min_by_key(|&index| self.kept[index].used).unwrap_or(0);
            self.kept.swap_remove(oldest);
        }
    }

    /// How many of a prompt's first tokens are there.
    pub(super) fn shared(&self, prompt: &[u32]) -> usize {
        self.best(prompt).map_or(0, |(_, shared)| shared)
    }

    fn best(&self, prompt: &[u32]) -> Option<(usize, usize)> {
        let most = prompt.len().saturating_sub(1);
        let shared = |prefix: &Prefix| {
            prefix.tokens.iter().zip(prompt).take_while(|(own, wanted)| own == wanted).count().min(most)
        };
        let each = self.kept.iter().map(shared).enumerate();
        each.max_by_key(|&(_, shared)| shared).filter(|&(_, shared)| shared >= LEAST)
    }

    /// As many of a prompt's first tokens as are there, in `empty`, a cache of one row.
    pub(super) fn give(&mut self, prompt: &[u32], empty: KvCache) -> Given {
        let Some((place, shared)) = self.best(prompt) else { return Given { cache: empty, features: Vec::new() } };
        self.clock += 1;
        let prefix = &mut self.kept[place];
        prefix.used = self.clock;
        let cache = empty.with_row_of(&prefix.cache, 0, shared as i64);
        let features = prefix.features.iter().map(|layer| layer.narrow(0, 0, shared as i64)).collect();
        Given { cache, features }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::tiny;
    use crate::models::TargetModel;

    fn filled(target: &dyn TargetModel, tokens: usize) -> KvCache {
        target.new_cache(1, tokens as i64)
    }

    #[test]
    fn the_longest_beginning_is_given_and_the_oldest_goes_first() {
        let target = tiny::target(1);
        let tokens: Vec<u32> = (0..40).collect();
        let size = filled(&target, 40).bytes();
        let mut prefixes = Prefixes::new(2 * size);
        prefixes.keep(&tokens[..8], filled(&target, 8), Vec::new());
        assert_eq!(prefixes.bytes(), 0, "few tokens are run again");
        prefixes.keep(&tokens[..20], filled(&target, 20), Vec::new());
        assert_eq!((prefixes.shared(&tokens), prefixes.shared(&tokens[..20])), (20, 19));
        // Its continuation takes its place.
        prefixes.keep(&tokens, filled(&target, 40), Vec::new());
        assert_eq!((prefixes.kept.len(), prefixes.shared(&tokens[..30])), (1, 29));
        let other: Vec<u32> = (10..50).collect();
        prefixes.keep(&other, filled(&target, 40), Vec::new());
        assert_eq!((prefixes.kept.len(), prefixes.shared(&other), prefixes.shared(&[1; 30])), (2, 39, 0));
        // The first was asked for last: the second has to go.
        assert_eq!(prefixes.give(&[&tokens[..], &[7]].concat(), filled(&target, 41)).cache.len(), 40);
        assert!(prefixes.give(&[9; 30], filled(&target, 41)).cache.is_empty());
        prefixes.keep(&[5; 40], filled(&target, 40), Vec::new());
        assert_eq!((prefixes.shared(&other), prefixes.shared(&tokens)), (0, 39));
        prefixes.keep(&[6; 200], filled(&target, 100), Vec::new());
        assert_eq!(prefixes.shared(&[6; 200]), 0, "what is larger than the limit is not kept");
    }
}
