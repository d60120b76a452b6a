//! How large a model may be. The limits are far beyond any real one, and keep parameters, bytes and operations within 64
//! bits: numbers of a file are compared with them before anything is computed or allocated.

/// Width of the hidden states.
pub const MOST_HIDDEN: i64 = WIDEST / 4;
/// Width of anything else: an MLP, all heads of a layer together.
pub const WIDEST: i64 = 1 << 22;
/// Layers of a model.
pub const MOST_LAYERS: i64 = 10_000;
/// Heads of a layer.
pub const MOST_HEADS: i64 = 10_000;
/// Experts of a layer.
pub const MOST_EXPERTS: i64 = 10_000;
/// Experts of all layers together: each has tensors of its own.
pub const MOST_EXPERTS_OF_A_MODEL: i64 = 200_000;
/// Tokens of a vocabulary.
pub const MOST_TOKENS: i64 = 1 << 22;
/// Tokens of a context.
pub const LONGEST_CONTEXT: i64 = 1 << 40;

/// Refuses the first size that is not from 1 to its limit: (key, value, limit).
pub fn within(sizes: &[(&str, i64, i64)]) -> Result<(), String> {
    match sizes.iter().find(|(_, value, limit)| !(1..=*limit).contains(value)) {
        Some((key, value, limit)) => Err(format!("`{key}`: expected a number from 1 to {limit}, got {value}")),
        None => Ok(()),
    }
}

/// A count as a signed number; one that does not fit is beyond every limit.
pub fn signed(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
