//! How a masked diffusion model decodes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::network::Network;
use super::rule::Rule;
use super::state::TokenSkip;

/// What is kept between passes over a block. Everything but `None` is approximate: keys and values outside the view are those
/// of the block's first pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cache {
    /// Nothing: every pass is over the whole text.
    #[default]
    None,
    /// Keys and values before the block: passes are over it and all behind it.
    Prefix,
    /// Those behind it too: passes are over the block.
    Dual,
}

impl Cache {
    /// As the command line names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Prefix => "prefix",
            Self::Dual => "dual",
        }
    }
}

impl FromStr for Cache {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = [Self::None, Self::Prefix, Self::Dual];
        let found = known.into_iter().find(|cache| cache.name() == text);
        found.ok_or_else(|| format!("expected none, prefix or dual, got `{text}`"))
    }
}

/// In which order tokens become known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Remasking {
    /// The surest first.
    #[default]
    Confidence,
    /// Any.
    Random,
}

/// Several states of a text side by side in one pass: exactly the tokens of a decoder without a cache, which takes a pass for
/// each step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parallel {
    /// States of a pass, the one that is known included.
    pub states: usize,
    /// Where the others come from.
    pub guess: Guess,
}

/// Where guessed states come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Guess {
    /// Passes over the block, with everything else from the last verified pass.
    Cache,
    /// No pass: the steps that the rule would make if the logits stayed what they are.
    Order,
}

impl FromStr for Parallel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("expected states=N[,guess=cache|order], got `{text}`");
        let (mut states, mut guess) = (None, Guess::Cache);
        for part in text.split(',') {
            match part.split_once('=').ok_or_else(refuse)? {
                ("states", count) => states = Some(count.parse().map_err(|_| refuse())?),
                ("guess", "cache") => guess = Guess::Cache,
                ("guess", "order") => guess = Guess::Order,
                _ => return Err(refuse()),
            }
        }
        Ok(Self { states: states.ok_or_else(refuse)?, guess })
    }
}

impl fmt::Display for Parallel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let guess = match self.guess {
            Guess::Cache => "cache",
            Guess::Order => "order",
        };
        write!(f, "states={},guess={guess}", self.states)
    }
}

/// How a masked diffusion model decodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Tokens of an answer.
    pub length: usize,
    /// Tokens of a block; blocks become known one behind the other.
    pub block: usize,
    /// How many tokens become known after a pass.
    pub rule: Rule,
    /// In which order.
    pub remasking: Remasking,
    /// Scales the noise of tokens; 0 is greedy.
    pub temperature: f64,
    /// Strength of classifier-free guidance; 0 is none, and needs no second pass.
    pub guidance: f64,
    /// What is kept between passes.
    pub cache: Cache,
    /// When rows leave later layers out; for [`Cache::Dual`].
    pub skip: Option<TokenSkip>,
    /// Several states in one pass; for [`Cache::None`].
    pub parallel: Option<Parallel>,
    /// Tokens that end an answer: once a block that holds one is known, no further block is begun.
    pub stop_tokens: Vec<u32>,
}

impl Options {
    /// Greedy decoding without a cache, one token a pass.
    pub fn plain(length: usize, block: usize) -> Self {
        Self {
            length,
            block,
            rule: Rule::Quota { steps: block },
            remasking: Remasking::Confidence,
            temperature: 0.0,
            guidance: 0.0,
            cache: Cache::None,
            skip: None,
            parallel: None,
            stop_tokens: Vec::new(),
        }
    }

    /// Refuses what means nothing, in words that begin with the option's name.
    pub fn check(&self, network: &Network<'_>) -> Result<(), String> {
        let (length, block) = (self.length, self.block);
        if block == 0 || length == 0 || length % block != 0 {
            return Err(format!("block-length: expected a divisor of the answer's {length} tokens, got {block}"));
        }
        self.rule.check(block)?;
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(format!("temperature: expected a number from 0, got {}", self.temperature));
        }
        if !(self.guidance.is_finite() && self.guidance >= 0.0) {
            return Err(format!("cfg: expected a number from 0, got {}", self.guidance));
        }
        if let Some(skip) = &self.skip {
            skip.check(network.layers()).map_err(|problem| format!("token-skip: {problem}"))?;
            if self.cache != Cache::Dual {
                let got = self.cache.name();
                return Err(format!(
                    "token-skip: rows of the block can be skipped with the cache `dual` alone, got `{got}`"
                ));
            }
        }
        match &self.parallel {
            Some(Parallel { states: 0, .. }) => Err("exact-parallel: expected at least 1 state, got 0".to_owned()),
            Some(_) if self.cache != Cache::None => {
                let got = self.cache.name();
                Err(format!(
                    "exact-parallel: gives what a decoder without a cache gives: expected the cache `none`, got `{got}`"
                ))
            }
            _ => Ok(()),
        }
    }

    /// Whether every token is the one that passes over whole texts alone give.
    pub fn is_lossless(&self) -> bool {
        self.cache == Cache::None
    }

    /// As they were parsed.
    pub fn settings(&self) -> Value {
        json!({
            "max_new_tokens": self.length,
            "block_length": self.block,
            "rule": self.rule.to_string(),
            "remasking": match self.remasking {
                Remasking::Confidence => "low-confidence",
                Remasking::Random => "random",
            },
            "temperature": self.temperature,
            "cfg": self.guidance,
            "cache": self.cache.name(),
            "token_skip": self.skip.map(|skip| skip.to_string()),
            "exact_parallel": self.parallel.map(|parallel| parallel.to_string()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_as_they_are_written() {
        let parallel: Parallel = "states=4,guess=order".parse().unwrap();
        assert_eq!(parallel, Parallel { states: 4, guess: Guess::Order });
        assert_eq!(parallel.to_string().parse(), Ok(parallel));
        assert_eq!("states=2".parse(), Ok(Parallel { states: 2, guess: Guess::Cache }));
        for text in ["", "states", "guess=cache", "states=-1", "states=2,guess=odd"] {
            assert!(text.parse::<Parallel>().unwrap_err().contains("states=N"));
        }
        assert_eq!("prefix".parse(), Ok(Cache::Prefix));
        assert!("both".parse::<Cache>().unwrap_err().contains("`both`"));
    }
}
