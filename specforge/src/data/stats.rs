//! Describes tokenised data: how long documents are, how much of them is trained, and which tokens those are.

use std::fmt;
use std::ops::Range;

use serde::Serialize;

use super::cache::{Document, TokenCache};
use super::tokenizer::ChatTokenizer;
use crate::error::{Result, foreign};

const PERCENTILES: [usize; 7] = [5, 25, 50, 75, 90, 95, 99];

/// Lengths and mask coverage of documents.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Statistics {
    /// Number of documents.
    pub documents: usize,
    /// Number of tokens.
    pub tokens: u64,
    /// Number of trained tokens.
    pub supervised: u64,
    /// Percent and the length that so many documents do not exceed.
    pub length_percentiles: Vec<(usize, usize)>,
    /// The same for the number of trained tokens in a document.
    pub supervised_percentiles: Vec<(usize, usize)>,
    /// Longest document.
    pub longest: usize,
}

impl Statistics {
    /// Of the given documents.
    pub fn of(cache: &TokenCache, documents: impl IntoIterator<Item = usize>) -> Self {
        let (mut lengths, mut supervised) = (Vec::new(), Vec::new());
        for index in documents {
            let document = cache.document(index);
            lengths.push(document.tokens.len());
            supervised.push(document.supervised.iter().filter(|&&flag| flag != 0).count());
        }
        lengths.sort_unstable();
        supervised.sort_unstable();
        Self {
            documents: lengths.len(),
            tokens: lengths.iter().map(|&length| length as u64).sum(),
            supervised: supervised.iter().map(|&count| count as u64).sum(),
            length_percentiles: percentiles(&lengths),
            supervised_percentiles: percentiles(&supervised),
            longest: lengths.last().copied().unwrap_or(0),
        }
    }

    /// Share of tokens that are trained.
    pub fn coverage(&self) -> f64 {
        self.supervised as f64 / self.tokens.max(1) as f64
    }
}

/// Nearest rank: the smallest value that at least so many percent do not exceed.
fn percentiles(sorted: &[usize]) -> Vec<(usize, usize)> {
    let at = |percent: usize| (percent * sorted.len()).div_ceil(100).max(1) - 1;
    if sorted.is_empty() { Vec::new() } else { PERCENTILES.map(|percent| (percent, sorted[at(percent)])).to_vec() }
}

impl fmt::Display for Statistics {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { documents, tokens, supervised, .. } = self;
        let percent = 100.0 * self.coverage();
        writeln!(formatter, "{documents} documents, {tokens} tokens, {supervised} supervised ({percent:.1} %)")?;
        let row = |values: &[(usize, usize)]| {
            values.iter().map(|(percent, value)| format!("p{percent} {value}")).collect::<Vec<_>>().join("  ")
        };
        writeln!(formatter, "length      {}  max {}", row(&self.length_percentiles), self.longest)?;
        write!(formatter, "supervised  {}", row(&self.supervised_percentiles))
    }
}

/// Cuts a mask into runs of equal flags.
pub fn mask_runs(mask: &[u8]) -> Vec<(bool, Range<usize>)> {
    let mut runs: Vec<(bool, Range<usize>)> = Vec::new();
    for (index, &flag) in mask.iter().enumerate() {
        match runs.last_mut() {
            Some((last, range)) if *last == (flag != 0) => range.end = index + 1,
            _ => runs.push((flag != 0, index..index + 1)),
        }
    }
    runs
}

/// A document as text, cut where supervision begins and ends.
pub fn document_runs(tokenizer: &ChatTokenizer, document: &Document<'_>) -> Result<Vec<(bool, String)>> {
    let mut runs = Vec::new();
    let mut before = String::new();
    for (flag, range) in mask_runs(document.supervised) {
        // Some decoders treat the start of a text specially, so each run is what it adds to the text before it.
        let through = tokenizer.decode(&document.tokens[..range.end], false)?;
        let text = match through.strip_prefix(&before) {
            Some(added) => added.to_owned(),
            None => tokenizer.decode(&document.tokens[range], false)?,
        };
        runs.push((flag, text));
        before = through;
    }
    Ok(runs)
}

/// The same as one string, with supervised text in green, or between `⟦` and `⟧` where colours are not wanted.
pub fn document_text(tokenizer: &ChatTokenizer, document: &Document<'_>, colour: bool) -> Result<String> {
    Ok(marked(document_runs(tokenizer, document)?, colour))
}

/// The same without anything else that a terminal would obey.
pub fn document_for_terminal(tokenizer: &ChatTokenizer, document: &Document<'_>, colour: bool) -> Result<String> {
    let runs = document_runs(tokenizer, document)?;
    let shown = runs.into_iter().map(|(flag, text)| (flag, foreign::block(&text).into_owned()));
    Ok(marked(shown, colour))
}

fn marked(runs: impl IntoIterator<Item = (bool, String)>, colour: bool) -> String {
    let (open, close) = if colour { ("\u{1b}[32m", "\u{1b}[0m") } else { ("⟦", "⟧") };
    runs.into_iter().map(|(flag, text)| if flag { format!("{open}{text}{close}") } else { text }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_and_percentiles() {
        let runs = mask_runs(&[0, 0, 1, 1, 1, 0]);
        assert_eq!(runs, [(false, 0..2), (true, 2..5), (false, 5..6)]);
        assert!(mask_runs(&[]).is_empty());
        let sorted: Vec<usize> = (1..=200).collect();
        assert_eq!(percentiles(&sorted)[..3], [(5, 10), (25, 50), (50, 100)]);
        assert_eq!(percentiles(&[7])[6], (99, 7));
        assert!(percentiles(&[]).is_empty());
    }
}
