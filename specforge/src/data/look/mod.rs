//! What tokenised data looks like, before anything is trained on it: figures, and a page that shows them.
//!
//! `records` reads the files once more for what a token cache does not keep: who speaks, and where it stands. `duplicates`
//! are documents that are the same as another.
//! `page` writes one HTML file that needs nothing else.

use std::path::PathBuf;

use serde::Serialize;

use super::cache::TokenCache;
use super::stats::document_runs;
use super::tokenizer::ChatTokenizer;
use crate::error::Result;

mod duplicates;
mod page;
mod records;

pub use duplicates::{Duplicates, Repeated};
pub use page::{Page, page};
pub use records::Records;

/// Bars of a histogram of lengths, about.
const BARS: usize = 32;
/// Bars of a histogram of shares.
const SHARES: usize = 20;

/// How many documents lie where.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bar {
    /// Where it begins; a document at this place belongs to it.
    pub from: f64,
    /// Where it ends; the last bar has the documents at its end too.
    pub to: f64,
    /// Documents.
    pub documents: usize,
}

/// A share of what is counted that a draft's own vocabulary of a size can name.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Named {
    /// Tokens of the draft's vocabulary.
    pub size: usize,
    /// Share of the trained tokens.
    pub share: f64,
}

/// Distributions over all documents.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Distributions {
    /// Documents by their number of tokens.
    pub lengths: Vec<Bar>,
    /// Documents by the share of their tokens that is trained.
    pub coverage: Vec<Bar>,
}

impl Distributions {
    /// Of all documents of a cache.
    pub fn of(cache: &TokenCache) -> Self {
        let documents: Vec<(usize, f64)> = (0..cache.len()).map(|index| measures(cache, index)).collect();
        let longest = documents.iter().map(|(length, _)| *length).max().unwrap_or(0);
        let width = round_up(longest.div_ceil(BARS).max(1));
        let mut lengths: Vec<usize> = vec![0; longest.div_ceil(width).max(1)];
        let mut coverage = vec![0; SHARES];
        for &(length, share) in &documents {
            let bar = (length / width).min(lengths.len() - 1);
            lengths[bar] += 1;
            coverage[((share * SHARES as f64) as usize).min(SHARES - 1)] += 1;
        }
        let bars = |counts: Vec<usize>, width: f64| {
            let bar =
                |(number, documents)| Bar { from: number as f64 * width, to: (number + 1) as f64 * width, documents };
            counts.into_iter().enumerate().map(bar).collect()
        };
        Self { lengths: bars(lengths, width as f64), coverage: bars(coverage, 1.0 / SHARES as f64) }
    }
}

/// Tokens of a document, and the share of them that is trained.
fn measures(cache: &TokenCache, index: usize) -> (usize, f64) {
    let document = cache.document(index);
    let trained = document.supervised.iter().filter(|&&mark| mark != 0).count();
    (document.tokens.len(), trained as f64 / document.tokens.len().max(1) as f64)
}

/// The next of 1, 2, 5, 10, 20, 50, ...
fn round_up(number: usize) -> usize {
    let mut step = 1;
    loop {
        if let Some(width) = [1, 2, 5].into_iter().map(|digit| digit * step).find(|&width| width >= number) {
            return width;
        }
        step *= 10;
    }
}

/// A document, as it is shown.
#[derive(Debug, Clone, PartialEq)]
pub struct Shown {
    /// Its name.
    pub id: String,
    /// Where its conversation stands.
    pub place: Option<(PathBuf, usize)>,
    /// Who speaks in its conversation, in the order of their first words.
    pub roles: Vec<String>,
    /// Number of tokens.
    pub tokens: usize,
    /// Share of them that is trained.
    pub coverage: f64,
    /// Text, cut where supervision begins and ends.
    pub runs: Vec<(bool, String)>,
}

/// A sample of documents in the order of the files: always the same one for a seed, and of several samples each part of
/// the larger.
pub fn sample(cache: &TokenCache, count: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<(u64, usize)> = (0..cache.len()).map(|index| (mixed(seed, index as u64), index)).collect();
    order.sort_unstable();
    let mut chosen: Vec<usize> = order.into_iter().take(count).map(|(_, index)| index).collect();
    chosen.sort_unstable();
    chosen
}

/// splitmix64 of a seed and a number.
fn mixed(seed: u64, number: u64) -> u64 {
    let mut word = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Documents as they are shown. What is known of their conversations comes from `records`.
pub fn shown(
    cache: &TokenCache,
    indices: &[usize],
    tokenizer: &ChatTokenizer,
    records: &Records,
) -> Result<Vec<Shown>> {
    let show = |&index: &usize| {
        let document = cache.document(index);
        let (tokens, coverage) = measures(cache, index);
        let record = records.of(cache.conversation_key(index));
        Ok(Shown {
            id: document.id.to_owned(),
            place: record.map(|record| (record.path.clone(), record.line)),
            roles: record.map(|record| record.roles.clone()).unwrap_or_default(),
            tokens,
            coverage,
            runs: document_runs(tokenizer, &document)?,
        })
    };
    indices.iter().map(show).collect()
}

#[cfg(test)]
mod tests {
    use super::super::cache::CacheWriter;
    use super::super::report::BuildReport;
    use super::*;

    fn cache(documents: &[(usize, usize)]) -> TokenCache {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("look.tokens");
        let mut writer = CacheWriter::create(&path, &path, [7; 32]).unwrap();
        for (number, &(length, trained)) in documents.iter().enumerate() {
            let marks: Vec<u8> = (0..length).map(|place| u8::from(place < trained)).collect();
            writer.add(&format!("d{number}"), number as u64, &vec![1; length], &marks).unwrap();
        }
        writer.finish(&BuildReport::default()).unwrap();
        TokenCache::open(&path, &[7; 32]).unwrap().0
    }

    #[test]
    fn every_document_is_in_one_bar_of_each_histogram() {
        let cache = cache(&[(1, 1), (99, 0), (100, 50), (640, 32), (641, 641)]);
        let Distributions { lengths, coverage } = Distributions::of(&cache);
        // 641 / 32 is 21: bars of 50.
        assert_eq!((lengths[0].to, lengths.len(), lengths.last().unwrap().to), (50.0, 13, 650.0));
        let filled = |bars: &[Bar]| -> Vec<(f64, usize)> {
            bars.iter()
                .filter(|bar| bar.documents > 0)
                .map(|bar| ((bar.from * 100.0).round() / 100.0, bar.documents))
                .collect()
        };
        assert_eq!(filled(&lengths), [(0.0, 1), (50.0, 1), (100.0, 1), (600.0, 2)]);
        assert_eq!(filled(&coverage), [(0.0, 1), (0.05, 1), (0.5, 1), (0.95, 2)]);
        assert_eq!([1, 2, 3, 6, 21, 100, 101].map(round_up), [1, 2, 5, 10, 50, 100, 200]);
    }

    #[test]
    fn documents_that_are_the_same_are_duplicates() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("same.tokens");
        let mut writer = CacheWriter::create(&path, &path, [7; 32]).unwrap();
        // Conversation 1 is there three times, each as two turns; another mask is another document.
        for (id, conversation, tokens, marks) in [
            ("a#1", 1, [1, 2, 3], [0, 1, 0]),
            ("a#2", 1, [1, 2, 3], [0, 0, 1]),
            ("b#1", 1, [1, 2, 3], [0, 1, 0]),
            ("b#2", 1, [1, 2, 3], [0, 0, 1]),
            ("c#1", 1, [1, 2, 3], [0, 1, 0]),
            ("d", 2, [1, 2, 3], [0, 1, 0]),
            ("e", 3, [9, 9, 9], [0, 1, 0]),
        ] {
            writer.add(id, conversation, &tokens, &marks).unwrap();
        }
        writer.finish(&BuildReport::default()).unwrap();
        let found = Duplicates::of(&TokenCache::open(&path, &[7; 32]).unwrap().0);
        assert_eq!((found.documents, found.contents, found.share), (3, 2, 3.0 / 7.0));
        let most: Vec<_> = found.most.iter().map(|one| (one.count, one.ids.join(" "))).collect();
        assert_eq!(most, [(3, "a#1 b#1".to_owned()), (2, "a#2 b#2".to_owned())]);
    }

    #[test]
    fn a_sample_follows_its_seed_and_grows() {
        let cache = cache(&vec![(3, 1); 50]);
        let few = sample(&cache, 8, 1);
        assert_eq!(few, sample(&cache, 8, 1));
        assert!(few.windows(2).all(|pair| pair[0] < pair[1]) && few.len() == 8);
        assert_ne!(few, sample(&cache, 8, 2));
        let more = sample(&cache, 20, 1);
        assert!(few.iter().all(|index| more.contains(index)));
        assert_eq!(sample(&cache, 99, 1), (0..50).collect::<Vec<_>>());
    }
}
