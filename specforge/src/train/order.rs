//! Which documents each optimizer step sees: a function of the seed, the epoch and the lengths alone.
//!
//! Documents are shuffled and packed into global batches of at most `batch_tokens` tokens. Each global batch is shared out
//! over the ranks, and a rank's share is split into micro-batches of at most `micro_batch_tokens`. Sharing and splitting
//! change memory and speed, never the update.

use std::cmp::Reverse;

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

/// Documents of one optimizer step, as indices into the training split: the same for any number of ranks.
pub type GlobalBatch = Vec<usize>;

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
        data::pack(&lengths, &order, self.batch_tokens)
    }

    /// Micro-batches of one rank of `world_size`; none where there are fewer documents than ranks.
    pub fn micro_batches(&self, batch: &[usize], rank: usize, world_size: usize) -> Vec<Vec<usize>> {
        self.split(&self.share(batch, rank, world_size))
    }

    /// Documents of one rank, in the batch's own order. Ranks are balanced by tokens: the longest document left goes to
    /// the rank with the fewest, the lower one of two.
    fn share(&self, batch: &[usize], rank: usize, world_size: usize) -> Vec<usize> {
        let mut places: Vec<usize> = (0..batch.len()).collect();
        places.sort_by_key(|&place| Reverse(self.lengths[batch[place]])); // stable: equal lengths keep their order
        let mut loads = vec![0; world_size];
        let mut owners = vec![0; batch.len()];
        for place in places {
            let owner = (0..world_size).min_by_key(|&rank| loads[rank]).unwrap_or(0);
            loads[owner] += self.lengths[batch[place]];
            owners[place] = owner;
        }
        let own = batch.iter().zip(owners).filter(|(_, owner)| *owner == rank);
        own.map(|(&document, _)| document).collect()
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
        let mut seen = epoch.concat();
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..97));
        let tokens = |part: &[usize]| part.iter().map(|&document| lengths[document]).sum::<usize>();
        assert!(epoch.iter().all(|batch| tokens(batch) <= 100));
        for batch in &epoch {
            let parts = order.micro_batches(batch, 0, 1);
            assert!(parts.iter().all(|part| tokens(part) <= 40 && !part.is_empty()));
            assert_eq!(&parts.concat(), batch, "a process on its own keeps the order of its batch");
        }
        assert_eq!(epoch, order.epoch(0).unwrap());
        assert_ne!(epoch, order.epoch(1).unwrap());
    }

    #[test]
    fn the_micro_batch_size_does_not_change_the_global_batches() {
        let lengths: Vec<usize> = (0..50).map(|index| 5 + index % 20).collect();
        let epoch = |micro| DataOrder::new(lengths.clone(), 120, micro, 9).unwrap().epoch(3).unwrap();
        assert_eq!(epoch(24), epoch(120));
    }

    /// Random batches, ranks and lengths: nothing is lost or doubled, order is kept, and no rank has more tokens than
    /// another by more than one document.
    #[test]
    fn ranks_share_a_batch_by_tokens() {
        let mut random = noise::keyed_stream(21, 0);
        let mut empty = 0;
        for _ in 0..300 {
            let count = 1 + (random() % 24) as usize;
            let lengths: Vec<usize> = (0..count).map(|_| 1 + (random() % 60) as usize).collect();
            let world_size = 1 + (random() % 9) as usize;
            let order = DataOrder::new(lengths.clone(), 60 * 24, 64, random()).unwrap();
            let batch = order.epoch(0).unwrap().concat();
            let shares: Vec<Vec<Vec<usize>>> =
                (0..world_size).map(|rank| order.micro_batches(&batch, rank, world_size)).collect();
            let mut all = shares.iter().flatten().flatten().copied().collect::<Vec<_>>();
            all.sort_unstable();
            assert!(all.into_iter().eq(0..count));
            let tokens = |part: &[usize]| part.iter().map(|&document| lengths[document]).sum::<usize>();
            let place = |document: &usize| batch.iter().position(|other| other == document);
            for share in &shares {
                assert!(share.concat().is_sorted_by_key(place), "{share:?} of {batch:?}");
                assert!(share.iter().all(|part| !part.is_empty() && tokens(part) <= 64));
                empty += usize::from(share.is_empty());
            }
            let loads: Vec<usize> = shares.iter().map(|share| tokens(&share.concat())).collect();
            let spread = loads.iter().max().unwrap() - loads.iter().min().unwrap();
            assert!(spread <= *lengths.iter().max().unwrap(), "{loads:?} of {lengths:?}");
        }
        assert!(empty > 50, "some batches have fewer documents than ranks");
    }

    #[test]
    fn the_longest_document_goes_first_and_the_lower_rank_wins() {
        let order = DataOrder::new(vec![2, 9, 4, 5, 2], 100, 100, 0).unwrap();
        let share = |rank| order.micro_batches(&[4, 0, 3, 2, 1], rank, 2).concat();
        // 9 to rank 0, then 5 and 4 to rank 1, and of two ranks with 9 tokens the lower takes the first 2.
        assert_eq!((share(0), share(1)), (vec![4, 1], vec![0, 3, 2]));
    }

    #[test]
    fn a_document_that_fits_no_micro_batch_is_refused() {
        let error = DataOrder::new(vec![10, 50], 100, 40, 0).unwrap_err();
        assert!(error.to_string().contains("50 tokens"), "{error}");
    }
}
