//! How often each token is trained. What a draft's own vocabulary is chosen from.

use rayon::prelude::*;

use super::cache::TokenCache;
use crate::error::{Error, Result};

/// Trained tokens of some documents, by token id; `vocab_size` entries. Documents are read in parallel from the mapped
/// file, and sums of integers do not depend on who adds them.
pub fn supervised_counts(cache: &TokenCache, documents: &[usize], vocab_size: usize) -> Result<Vec<u64>> {
    // A few pieces for each thread, each with a table of its own.
    let piece = documents.len().div_ceil(4 * rayon::current_num_threads()).max(1);
    let tables = documents.par_chunks(piece).map(|piece| {
        let mut counts = vec![0u64; vocab_size];
        for &index in piece {
            let document = cache.document(index);
            for (&token, &mark) in document.tokens.iter().zip(document.supervised) {
                if mark != 0 {
                    let count = counts.get_mut(token as usize).ok_or_else(|| beyond(document.id, token, vocab_size))?;
                    *count += 1;
                }
            }
        }
        Ok(counts)
    });
    tables.try_reduce(
        || vec![0; vocab_size],
        |mut sums, counts| {
            sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
            Ok(sums)
        },
    )
}

/// The same for a vocabulary that nobody has told: entries up to the highest trained token.
pub fn all_supervised_counts(cache: &TokenCache, documents: &[usize]) -> Vec<u64> {
    let piece = documents.len().div_ceil(4 * rayon::current_num_threads()).max(1);
    let tables = documents.par_chunks(piece).map(|piece| {
        let mut counts: Vec<u64> = Vec::new();
        for document in piece.iter().map(|&index| cache.document(index)) {
            for (&token, _) in document.tokens.iter().zip(document.supervised).filter(|(_, mark)| **mark != 0) {
                let token = token as usize;
                if token >= counts.len() {
                    counts.resize(token + 1, 0);
                }
                counts[token] += 1;
            }
        }
        counts
    });
    tables.reduce(Vec::new, |mut sums, counts| {
        sums.resize(sums.len().max(counts.len()), 0);
        sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        sums
    })
}

fn beyond(document: &str, token: u32, vocab_size: usize) -> Error {
    Error::Failed(format!("document `{document}` holds token {token}, but the target has {vocab_size} tokens"))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::cache::CacheWriter;
    use super::super::report::BuildReport;
    use super::*;

    /// A cache of documents of one length, with tokens from `token` and every third one not trained.
    fn cache(folder: &std::path::Path, documents: usize, length: usize, token: impl Fn(u64) -> u32) -> TokenCache {
        let path = folder.join("counts.tokens");
        let mut writer = CacheWriter::create(&path, &path, [7; 32]).unwrap();
        let marks: Vec<u8> = (0..length).map(|place| u8::from(place % 3 != 0)).collect();
        for document in 0..documents {
            let tokens: Vec<u32> = (0..length).map(|place| token((document * length + place) as u64)).collect();
            writer.add(&format!("d{document}"), document as u64, &tokens, &marks).unwrap();
        }
        writer.finish(&BuildReport::default()).unwrap();
        TokenCache::open(&path, &[7; 32]).unwrap().0
    }

    #[test]
    fn trained_tokens_of_the_chosen_documents_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path(), 57, 11, |place| (place * place % 13) as u32);
        for documents in [(0..57).collect::<Vec<_>>(), vec![3, 50, 4], vec![]] {
            let mut expected = vec![0; 13];
            for &document in &documents {
                let trained = (0..11).filter(|place| place % 3 != 0).map(|place| (document * 11 + place) as u64);
                trained.for_each(|place| expected[(place * place % 13) as usize] += 1);
            }
            assert_eq!(supervised_counts(&cache, &documents, 13).unwrap(), expected);
            assert_eq!(expected.iter().sum::<u64>(), 7 * documents.len() as u64);
        }
        let error = supervised_counts(&cache, &[0, 1], 12).unwrap_err().to_string();
        assert!(error.contains("holds token 12, but the target has 12 tokens"), "{error}");
    }

    /// A hundred million tokens of a large vocabulary take seconds, opening and checking the file included.
    #[test]
    #[ignore = "writes 500 MB"]
    fn a_large_corpus_takes_seconds() {
        let folder = tempfile::tempdir().unwrap();
        let cache =
            cache(folder.path(), 100_000, 1000, |place| (place.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 47) as u32);
        let started = Instant::now();
        let counts = supervised_counts(&cache, &(0..cache.len()).collect::<Vec<_>>(), 1 << 17).unwrap();
        let seconds = started.elapsed().as_secs_f64();
        println!("{} tokens counted in {seconds:.2} s", cache.total_tokens());
        assert_eq!(counts.iter().sum::<u64>(), cache.supervised_tokens());
        assert!(seconds < 10.0, "{seconds}");
    }
}
