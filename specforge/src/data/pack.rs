//! Fills batches with documents.

use std::collections::BTreeSet;
use std::fmt;

use super::cache::TokenCache;
use crate::error::{Error, Result};

/// Documents to choose from while a batch is filled. More fill batches better and mix the order more.
const WINDOW: usize = 256;

/// Packs the documents of an epoch into batches of at most `max_tokens` tokens. `order` lists documents, `lengths` the
/// length of each in the same order.
///
/// Each batch starts with the document that has waited longest and takes, from the next few hundred, always the longest
/// that still fits. Every document is in exactly one batch, and equal input gives equal output.
pub fn pack(lengths: &[usize], order: &[usize], max_tokens: usize) -> Result<Vec<Vec<usize>>> {
    if lengths.len() != order.len() {
        let (lengths, order) = (lengths.len(), order.len());
        return Err(Error::Failed(format!(
            "packing: expected as many lengths as documents, got {lengths} and {order}"
        )));
    }
    if let Some(position) = lengths.iter().position(|&length| length > max_tokens) {
        let problem = format!("expected at least the longest document, {} tokens, got {max_tokens}", lengths[position]);
        return Err(Error::config("train.micro_batch_tokens", problem).with_hint("or lower data.max_length"));
    }
    // Positions that wait, by length and by age.
    let mut waiting: BTreeSet<(usize, std::cmp::Reverse<usize>)> = BTreeSet::new();
    let mut ages: BTreeSet<usize> = BTreeSet::new();
    let mut next = 0;
    let mut batches = Vec::new();
    loop {
        let mut room = max_tokens;
        let mut batch = Vec::new();
        loop {
            while next < lengths.len() && ages.len() < WINDOW {
                waiting.insert((lengths[next], std::cmp::Reverse(next)));
                ages.insert(next);
                next += 1;
            }
            let chosen = if batch.is_empty() {
                ages.first().copied()
            } else {
                let fits = waiting.range(..=(room, std::cmp::Reverse(0))).next_back();
                fits.map(|(_, std::cmp::Reverse(position))| *position)
            };
            let Some(position) = chosen else { break };
            waiting.remove(&(lengths[position], std::cmp::Reverse(position)));
            ages.remove(&position);
            room -= lengths[position];
            batch.push(order[position]);
        }
        if batch.is_empty() {
            return Ok(batches);
        }
        batches.push(batch);
    }
}

/// Documents one after the other. They must not see each other: `lengths` says where each ends.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PackedBatch {
    /// Token ids, `[T]`.
    pub ids: Vec<i64>,
    /// Place of each token in its document, from 0, `[T]`.
    pub positions: Vec<i64>,
    /// Whether each token is trained, `[T]`.
    pub supervised: Vec<bool>,
    /// Tokens of each document.
    pub lengths: Vec<i64>,
    /// The documents.
    pub documents: Vec<DocumentRef>,
}

/// A document of a batch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DocumentRef {
    /// Its name, for messages.
    pub name: String,
    /// Its number among all documents of its files: the same in every batch, on every rank and in every epoch.
    pub number: u64,
}

impl DocumentRef {
    /// A document.
    pub fn new(name: impl Into<String>, number: u64) -> Self {
        Self { name: name.into(), number }
    }
}

impl fmt::Display for DocumentRef {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.name)
    }
}

impl PackedBatch {
    /// Each document as a batch of its own, in order.
    pub fn each(&self) -> impl Iterator<Item = PackedBatch> {
        let mut start = 0;
        self.lengths.iter().zip(&self.documents).map(move |(&length, document)| {
            let range = start..start + length as usize;
            start = range.end;
            PackedBatch {
                ids: self.ids[range.clone()].to_vec(),
                positions: self.positions[range.clone()].to_vec(),
                supervised: self.supervised[range].to_vec(),
                lengths: vec![length],
                documents: vec![document.clone()],
            }
        })
    }
}

/// Puts documents into one batch.
pub fn assemble(cache: &TokenCache, documents: &[usize]) -> PackedBatch {
    let mut batch = PackedBatch::default();
    for &index in documents {
        let document = cache.document(index);
        let length = document.tokens.len() as i64;
        batch.ids.extend(document.tokens.iter().map(|&token| i64::from(token)));
        batch.positions.extend(0..length);
        batch.supervised.extend(document.supervised.iter().map(|&flag| flag != 0));
        batch.lengths.push(length);
        batch.documents.push(DocumentRef::new(document.id, index as u64));
    }
    batch
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look random and are the same every time.
    fn lengths(count: usize, max: usize) -> Vec<usize> {
        (0..count)
            .scan(1u64, |state, _| {
                *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                Some(1 + (*state >> 33) as usize % max)
            })
            .collect()
    }

    #[test]
    fn every_document_once_and_little_room_wasted() {
        let lengths = lengths(3000, 700);
        let order: Vec<usize> = (0..3000).rev().collect();
        let by_position: Vec<usize> = order.iter().map(|&document| lengths[document]).collect();
        let batches = pack(&by_position, &order, 2048).unwrap();
        let mut seen: Vec<usize> = batches.concat();
        seen.sort_unstable();
        assert_eq!(seen, (0..3000).collect::<Vec<_>>());
        let tokens = |batch: &Vec<usize>| batch.iter().map(|&document| lengths[document]).sum::<usize>();
        assert!(batches.iter().all(|batch| !batch.is_empty() && tokens(batch) <= 2048));
        let used: usize = lengths.iter().sum();
        let share = used as f64 / (batches.len() * 2048) as f64;
        assert!(share > 0.98, "{share}");
        assert_eq!(batches, pack(&by_position, &order, 2048).unwrap());
        // Nobody waits for long.
        assert!(batches.iter().position(|batch| batch.contains(&order[0])) == Some(0));
    }

    #[test]
    fn edges() {
        assert_eq!(pack(&[], &[], 10).unwrap(), Vec::<Vec<usize>>::new());
        assert_eq!(pack(&[10, 10], &[7, 3], 10).unwrap(), [[7], [3]]);
        assert_eq!(pack(&[4, 3, 6, 7], &[0, 1, 2, 3], 10).unwrap(), [vec![0, 2], vec![1, 3]]);
        let error = pack(&[11], &[0], 10).unwrap_err().to_string();
        assert!(error.contains("train.micro_batch_tokens") && error.contains("11"), "{error}");
        assert!(pack(&[1], &[], 10).is_err());
    }
}
