//! Which documents each optimizer step sees: a function of the seed, the epoch and the lengths alone.
//!
//! Documents are shuffled and packed into global batches of at most `batch_tokens` tokens. Each global batch is shared out
//! over the ranks, and a rank's share is split into micro-batches of at most `micro_batch_tokens`. Sharing and splitting
//! change memory and speed, never the update.
//!
//! Where a document costs less the second time, it has an owner: a rank that it comes to in every epoch. Owners are chosen
//! once, so that every rank has the same tokens in all and, as nearly as can be, in every batch of the first epochs.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::data;
use crate::error::{Error, Result};
use crate::nn::noise;

/// Tells the order of an epoch's batches from the order of its documents.
const BATCHES: u64 = 1 << 63;

/// Order of the documents of a training run.
#[derive(Debug, Clone)]
pub struct DataOrder {
    /// Length in tokens of each document.
    lengths: Vec<usize>,
    batch_tokens: usize,
    micro_batch_tokens: usize,
    seed: u64,
    /// Rank of each document, where documents have owners.
    owners: Option<Vec<u32>>,
}

/// Epochs whose batches owners balance. Always so many, whatever the run's length: a run that grows keeps its owners.
const BALANCED_EPOCHS: u64 = 8;

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
        Ok(Self { lengths, batch_tokens, micro_batch_tokens, seed, owners: None })
    }

    /// Gives every document an owner among `world_size` ranks.
    ///
    /// Longest first, each goes to the rank that has the fewest tokens in the batches that the document is in, those of
    /// eight epochs together; of equal ones to the one with the fewest in all.
    pub fn with_owners(mut self, world_size: usize) -> Result<Self> {
        let epochs = (0..BALANCED_EPOCHS).map(|epoch| self.epoch(epoch)).collect::<Result<Vec<_>>>()?;
        // Batch of each document in each epoch, and tokens of each rank in each batch.
        let mut batch_of = vec![vec![0; self.lengths.len()]; epochs.len()];
        let mut loads: Vec<Vec<u64>> = epochs.iter().map(|batches| vec![0; batches.len() * world_size]).collect();
        for (batches, batch_of) in epochs.iter().zip(&mut batch_of) {
            for (number, batch) in batches.iter().enumerate() {
                batch.iter().for_each(|&document| batch_of[document] = number * world_size);
            }
        }
        let mut longest_first: Vec<usize> = (0..self.lengths.len()).collect();
        longest_first.sort_by_key(|&document| Reverse(self.lengths[document])); // stable: equal lengths keep their order
        let mut totals = vec![0; world_size];
        let mut owners = vec![0; self.lengths.len()];
        for document in longest_first {
            let load = |rank: usize| -> u64 {
                loads.iter().zip(&batch_of).map(|(loads, batch_of)| loads[batch_of[document] + rank]).sum()
            };
            let owner = (0..world_size).min_by_key(|&rank| (load(rank), totals[rank])).unwrap_or(0);
            owners[document] = owner as u32;
            totals[owner] += self.lengths[document] as u64;
            for (loads, batch_of) in loads.iter_mut().zip(&batch_of) {
                loads[batch_of[document] + owner] += self.lengths[document] as u64;
            }
        }
        self.owners = Some(owners);
        Ok(self)
    }

    /// Tokens of the rank that owns most; of all documents where none has an owner.
    pub fn most_owned_tokens(&self) -> u64 {
        let mut totals: BTreeMap<u32, u64> = BTreeMap::new();
        for (document, &length) in self.lengths.iter().enumerate() {
            *totals.entry(self.owners.as_ref().map_or(0, |owners| owners[document])).or_default() += length as u64;
        }
        totals.into_values().max().unwrap_or(0)
    }

    /// All global batches of one epoch. Packing takes long documents first and leaves short ones for the end, so that the
    /// batches are shuffled too.
    pub fn epoch(&self, epoch: u64) -> Result<Vec<GlobalBatch>> {
        let order = noise::permutation(self.lengths.len(), self.seed, epoch);
        let lengths: Vec<usize> = order.iter().map(|&document| self.lengths[document]).collect();
        let mut packed = data::pack(&lengths, &order, self.batch_tokens)?;
        let order = noise::permutation(packed.len(), self.seed, epoch ^ BATCHES);
        Ok(order.into_iter().map(|batch| std::mem::take(&mut packed[batch])).collect())
    }

    /// Micro-batches of one rank of `world_size`; none where there are fewer documents than ranks.
    pub fn micro_batches(&self, batch: &[usize], rank: usize, world_size: usize) -> Vec<Vec<usize>> {
        self.split(&self.share(batch, rank, world_size))
    }

    /// Documents of one rank, in the batch's own order: those that it owns. Without owners ranks are balanced by tokens:
    /// the longest document left goes to the rank with the fewest, the lower one of two.
    fn share(&self, batch: &[usize], rank: usize, world_size: usize) -> Vec<usize> {
        if let Some(owners) = &self.owners {
            return batch.iter().copied().filter(|&document| owners[document] as usize == rank).collect();
        }
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

    /// Long and short documents are spread over the whole epoch, though packing takes the long ones first.
    #[test]
    fn the_ends_of_an_epoch_are_alike() {
        let mut random = noise::keyed_stream(3, 1);
        // Many short documents and a long tail.
        let lengths: Vec<usize> = (0..1500).map(|_| 20 + 1200 / (1 + (random() % 40) as usize)).collect();
        let mean = |batches: &[GlobalBatch]| {
            let documents = batches.concat();
            documents.iter().map(|&document| lengths[document] as f64).sum::<f64>() / documents.len() as f64
        };
        let (mut first, mut last) = (0.0, 0.0);
        for seed in 0..10 {
            let epoch = DataOrder::new(lengths.clone(), 2048, 2048, seed).unwrap().epoch(seed % 3).unwrap();
            let tenth = epoch.len() / 10;
            first += mean(&epoch[..tenth]);
            last += mean(&epoch[epoch.len() - tenth..]);
        }
        assert!((first / last - 1.0).abs() < 0.15, "{first} tokens at the start, {last} at the end");
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

    /// Documents as they are found: many short ones, some long.
    fn corpus(count: usize, most: usize) -> Vec<usize> {
        let mut random = noise::keyed_stream(8, 2);
        let mut uniform = || (random() >> 11) as f64 / (1u64 << 53) as f64;
        (0..count).map(|_| ((40.0 / (0.02 + uniform() * uniform())) as usize).clamp(20, most)).collect()
    }

    /// Every batch is dealt whole, every document comes to the same rank in every epoch, and no rank waits much longer for
    /// the slowest than chance would make it.
    #[test]
    fn owners_are_for_life_and_share_the_work() {
        let lengths = corpus(4000, 1000);
        for (world_size, most) in [(2, 1.03), (4, 1.1), (8, 1.35)] {
            let order = DataOrder::new(lengths.clone(), 16_384, 2048, 5).unwrap().with_owners(world_size).unwrap();
            let mut owners: Vec<Option<usize>> = vec![None; lengths.len()];
            let mut tokens = vec![0; world_size];
            let (mut slowest, mut mean) = (0, 0.0);
            for epoch in 0..4 {
                for batch in order.epoch(epoch).unwrap() {
                    let mut loads = Vec::new();
                    let mut dealt = 0;
                    for (rank, tokens) in tokens.iter_mut().enumerate() {
                        let own = order.micro_batches(&batch, rank, world_size).concat();
                        dealt += own.len();
                        loads.push(own.iter().map(|&document| lengths[document]).sum::<usize>());
                        for document in own {
                            assert_eq!(*owners[document].get_or_insert(rank), rank, "document {document}");
                            *tokens += lengths[document];
                        }
                    }
                    assert_eq!(dealt, batch.len());
                    slowest += loads.iter().max().unwrap();
                    mean += loads.iter().sum::<usize>() as f64 / world_size as f64;
                }
            }
            assert!(owners.iter().all(Option::is_some));
            let imbalance = slowest as f64 / mean;
            assert!(imbalance < most, "{world_size} ranks: {imbalance}");
            let share = 4 * lengths.iter().sum::<usize>() / world_size;
            assert!(tokens.iter().all(|&own| own.abs_diff(share) * 50 < share), "{tokens:?}");
            assert_eq!(order.most_owned_tokens() * 4, *tokens.iter().max().unwrap() as u64);
        }
    }

    #[test]
    fn owners_change_no_batch() {
        let lengths = corpus(300, 400);
        let order = || DataOrder::new(lengths.clone(), 2048, 512, 1).unwrap();
        assert_eq!(order().epoch(2).unwrap(), order().with_owners(3).unwrap().epoch(2).unwrap());
        assert_eq!(order().most_owned_tokens(), lengths.iter().sum::<usize>() as u64);
        // One rank owns everything, in the batch's own order.
        let alone = order().with_owners(1).unwrap();
        let batch = &alone.epoch(0).unwrap()[0];
        assert_eq!(&alone.micro_batches(batch, 0, 1).concat(), batch);
    }

    #[test]
    fn a_document_that_fits_no_micro_batch_is_refused() {
        let error = DataOrder::new(vec![10, 50], 100, 40, 0).unwrap_err();
        assert!(error.to_string().contains("50 tokens"), "{error}");
    }
}
