//! What the target's cache takes, so that a limit can be kept before it is passed.

use crate::models::TargetModel;

/// Slots that a request is given beside its own tokens: the guesses of a round stand there until they are decided.
pub const TREE: usize = 64;
/// Slots that a cache grows by at least; see `nn::kv_cache`.
const GROWTH: u64 = 64;

/// Bytes of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    per_token: u64,
    per_row: u64,
}

impl Cost {
    /// Of a target, measured on two small caches.
    pub fn of(target: &dyn TargetModel) -> Self {
        let [one, many] = [1, 1 + GROWTH as i64].map(|slots| target.new_cache(1, slots).bytes());
        let per_token = many.saturating_sub(one) / GROWTH;
        Self { per_token, per_row: one.saturating_sub(per_token) }
    }

    /// Most that a cache takes of which every row may come to hold `longest` tokens, and which has `capacity` slots a row
    /// already: it grows by half of what it is, at least.
    pub fn bytes(&self, rows: usize, longest: usize, capacity: usize) -> u64 {
        let grown = (longest as u64).saturating_add(longest as u64 / 2).saturating_add(GROWTH);
        let slots = grown.max(capacity as u64);
        (rows as u64).saturating_mul(slots.saturating_mul(self.per_token).saturating_add(self.per_row))
    }

    /// Most that one request alone takes, by the lengths of its prompt and its answer.
    pub fn alone(&self, prompt: usize, answer: usize) -> u64 {
        self.bytes(1, prompt + answer + TREE, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::tiny;

    #[test]
    fn a_cache_takes_no_more_than_was_said() {
        let target = tiny::target(1);
        let cost = Cost::of(&target);
        for (rows, slots) in [(1usize, 70i64), (3, 200), (5, 1)] {
            let bytes = target.new_cache(rows as i64, slots).bytes();
            assert_eq!(bytes, rows as u64 * (slots as u64 * cost.per_token + cost.per_row));
            assert!(bytes <= cost.bytes(rows, slots as usize, 0) && bytes <= cost.bytes(rows, 0, slots as usize));
        }
        // It grows from 10 slots by half of what it is, and by 64 at least, as often as it must.
        for longest in [1, 60, 75, 300, 1000] {
            let mut capacity = 10;
            while capacity < longest {
                capacity += (longest - capacity).min(1).max(capacity / 2).max(GROWTH as usize);
            }
            let taken = 2 * capacity as u64 * cost.per_token;
            assert!(taken <= cost.bytes(2, longest, 10), "{longest} tokens take {taken} bytes");
        }
        assert_eq!(cost.alone(5, 6), cost.bytes(1, 11 + TREE, 0));
        assert_eq!(cost.bytes(usize::MAX, usize::MAX, 0), u64::MAX);
    }
}
