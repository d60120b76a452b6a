//! Which documents each optimizer step sees: a function of the seed, the epoch and the lengths alone.
//!
//! Documents are shuffled, packed into global batches of at most `batch_tokens` tokens, and each global batch is split
//! into micro-batches of at most `micro_batch_tokens`. The split changes memory and speed, never the update.

use crate::data;
use crate::error::{Error, Result};
use crate::nn::noise;

/// Order of the documents of a training run.
#[derive(Debug, Clone)]
pub struct DataOrder {
    /// Length in tokens of each document.
    lengths: Vec<usize>,
    batch_tokens: usize,
    micro_batch_tokens: usize,
    seed: u64,
}

/// Documents of one optimizer step, as micro-batches of indices into the training split.
pub type GlobalBatch = Vec<Vec<usize>>;

impl DataOrder {
    /// Checks that every document fits a micro-batch.
    pub fn new(lengths: Vec<usize>, batch_tokens: usize, micro_batch_tokens: usize, seed: u64) -> Result<Self> {
        let longest = lengths.iter().copied().max().unwrap_or(0);
        if longest > micro_batch_tokens {
            let problem = format!("a document has {longest} tokens, a micro-batch holds {micro_batch_tokens}");
            return Err(Error::config("train.micro_batch_tokens", problem)
                .with_hint("raise train.micro_batch_tokens or lower data.max_length"));
        }
        Ok(Self { lengths, batch_tokens, micro_batch_tokens, seed })
    }

    /// All global batches of one epoch.
    pub fn epoch(&self, epoch: u64) -> Result<Vec<GlobalBatch>> {
        let order = noise::permutation(self.lengths.len(), self.seed, epoch);
        let lengths: Vec<usize> = order.iter().map(|&document| self.lengths[document]).collect();
        let batches = data::pack(&lengths, &order, self.batch_tokens)?;
        Ok(batches.into_iter().map(|batch| self.split(&batch)).collect())
    }

    /// Documents in their own order, as micro-batches: for evaluation.
    pub fn in_order(&self) -> Vec<Vec<usize>> {
        self.split(&(0..self.lengths.len()).collect::<Vec<_>>())
    }

    fn split(&self, batch: &[usize]) -> Vec<Vec<usize>> {
        let mut parts: Vec<Vec<usize>> = Vec::new();
        let mut room = 0;
        for &document in batch {
            let length = self.lengths[document];
            if length > room {
                parts.push(Vec::new());
                room = self.micro_batch_tokens;
            }
            room -= length;
            if let Some(part) = parts.last_mut() {
                part.push(document);
            }
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_holds_every_document_once_within_its_limits() {
        let lengths: Vec<usize> = (0..97).map(|index| 3 + index * 7 % 30).collect();
        let order = DataOrder::new(lengths.clone(), 100, 40, 5).unwrap();
        let epoch = order.epoch(0).unwrap();
        let mut seen: Vec<usize> = epoch.iter().flatten().flatten().copied().collect();
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..97));
        let tokens = |part: &[usize]| part.iter().map(|&document| lengths[document]).sum::<usize>();
        assert!(epoch.iter().flatten().all(|part| tokens(part) <= 40 && !part.is_empty()));
        assert!(epoch.iter().all(|batch| tokens(&batch.concat()) <= 100));
        assert_eq!(epoch, order.epoch(0).unwrap());
        assert_ne!(epoch, order.epoch(1).unwrap());
    }

    #[test]
    fn the_micro_batch_size_does_not_change_the_global_batches() {
        let lengths: Vec<usize> = (0..50).map(|index| 5 + index % 20).collect();
        let flat = |micro| {
            let epoch = DataOrder::new(lengths.clone(), 120, micro, 9).unwrap().epoch(3).unwrap();
            epoch.into_iter().map(|batch| batch.concat()).collect::<Vec<_>>()
        };
        assert_eq!(flat(24), flat(120));
    }

    #[test]
    fn a_document_that_fits_no_micro_batch_is_refused() {
        let error = DataOrder::new(vec![10, 50], 100, 40, 0).unwrap_err();
        assert!(error.to_string().contains("50 tokens"), "{error}");
    }
}
