//! Keys and values of the scales that a transformer has seen.

use tch::Tensor;

/// Keys and values of whole scales, as a value: what is appended or cut makes another one, so that nobody who drafts on it
/// changes what somebody else has committed.
#[derive(Debug, Default)]
pub struct ScaleCache {
    /// Key and value of each block, `[B, N, S, D]` each; keys are stored as attention uses them, normed where they are.
    layers: Vec<(Tensor, Tensor)>,
    /// Tokens of each scale.
    tokens: Vec<i64>,
}

impl ScaleCache {
    /// A cache of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Scales whose keys and values are there.
    pub fn scales(&self) -> usize {
        self.tokens.len()
    }

    /// Tokens `S` whose keys and values are there.
    pub fn tokens(&self) -> i64 {
        self.layers.first().and_then(|(key, _)| key.size().get(2).copied()).unwrap_or(0)
    }

    /// Key and value of a block, `[B, N, S, D]` each.
    pub fn layer(&self, block: usize) -> Option<(&Tensor, &Tensor)> {
        self.layers.get(block).map(|(key, value)| (key, value))
    }

    /// Rows `B`; `None` for a cache of nothing.
    pub fn rows(&self) -> Option<i64> {
        self.layers.first().and_then(|(key, _)| key.size().first().copied())
    }

    /// A cache with the keys and values that blocks have after a pass over further scales of so many tokens each.
    pub(super) fn with(&self, layers: Vec<(Tensor, Tensor)>, tokens: &[i64]) -> Self {
        Self { layers, tokens: [&self.tokens, tokens].concat() }
    }

    /// The first scales alone. Those that are not there are no error: a cache may be behind.
    pub fn truncated(&self, scales: usize) -> Self {
        let tokens: Vec<i64> = self.tokens.iter().take(scales).copied().collect();
        let kept = self.tokens().min(tokens.iter().sum());
        let cut = |tensor: &Tensor| tensor.narrow(2, 0, kept);
        let layers = match tokens.is_empty() {
            true => Vec::new(),
            false => self.layers.iter().map(|(key, value)| (cut(key), cut(value))).collect(),
        };
        Self { layers, tokens }
    }

    /// The same scales without their keys and values: what a pass is asked from to find out whether another one lost them.
    pub fn forgotten(&self) -> Self {
        Self { layers: Vec::new(), tokens: self.tokens.clone() }
    }

    /// These keys and values with those of a later cache behind them: what a seeded mistake must put right again.
    #[cfg(test)]
    pub(crate) fn joined(&self, later: &Self) -> Self {
        if self.layers.is_empty() {
            return Self { layers: later.truncated(later.scales()).layers, tokens: later.tokens.clone() };
        }
        let both = self.layers.iter().zip(&later.layers);
        let cat = |one: &Tensor, other: &Tensor| Tensor::cat(&[one, other], 2);
        let layers = both.map(|(one, other)| (cat(&one.0, &other.0), cat(&one.1, &other.1))).collect();
        Self { layers, tokens: later.tokens.clone() }
    }
}
