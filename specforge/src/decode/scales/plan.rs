//! How a draft is used.

use super::pace::Gamma;
use super::rule::Rule;

/// How a draft is used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Plan {
    /// The draft proposes scales, and the target looks at all of them in one pass.
    Speculate {
        /// How many scales.
        gamma: Gamma,
        /// Whether the target reads the scale behind the drafted ones in the same pass, which is then decided too where all
        /// of them are kept.
        bonus: bool,
        /// When a drafted scale is kept.
        rule: Rule,
    },
    /// The target decodes so many scales, and the smaller model all others, unseen by the target (CoDe, arXiv 2411.17787).
    /// Lossy.
    HandOver(usize),
}

impl Plan {
    /// Exact speculation over as many scales as it pays.
    pub fn exact() -> Self {
        Plan::Speculate { gamma: Gamma::Auto, bonus: true, rule: Rule::Exact }
    }

    /// Whether images are those of the target, or follow its distribution.
    pub fn is_lossless(&self) -> bool {
        match self {
            Plan::Speculate { rule, .. } => rule.is_lossless(),
            Plan::HandOver(_) => false,
        }
    }
}

impl std::fmt::Display for Plan {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Plan::Speculate { gamma, bonus, rule } => {
                match gamma {
                    Gamma::Fixed(gamma) => write!(formatter, "gamma {gamma}")?,
                    Gamma::Auto => write!(formatter, "gamma auto")?,
                }
                write!(formatter, "{}, ", if *bonus { ", bonus" } else { "" })?;
                match rule {
                    Rule::Exact => write!(formatter, "exact"),
                    Rule::Maximal => write!(formatter, "maximal coupling"),
                    Rule::MatchRate(share) => write!(formatter, "match rate {share} (lossy)"),
                    Rule::TopK(count) => write!(formatter, "top-k {count} (lossy)"),
                    Rule::Divergence(most) => write!(formatter, "divergence {most} (lossy)"),
                }
            }
            Plan::HandOver(scales) => write!(formatter, "hand-over behind {scales} scales (lossy)"),
        }
    }
}
