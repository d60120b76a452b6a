//! Kept states over several ranks: every document is computed once in the whole run, by the one rank that keeps it.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use serde_json::json;
use specforge::config::RunConfig;
use specforge::data::{PackedBatch, split};
use specforge::features::{FeatureSource, OnlineFeatures, Pending, RememberedFeatures};
use specforge::plan::Plan;
use tch::{Device, Kind};

use super::{Cut, WHOLE, World, largest};

/// Three epochs, and some of a fourth.
const STEPS: usize = 24;

/// Documents computed and bytes kept by each rank of the last run.
pub type Counts = Mutex<Vec<(u64, u64)>>;

/// Kept states whose figures are noted when a rank ends.
pub struct Counted<'a> {
    source: RememberedFeatures<OnlineFeatures>,
    counts: &'a Counts,
}

impl<'a> Counted<'a> {
    pub fn new(online: OnlineFeatures, counts: &'a Counts) -> Self {
        Self { source: RememberedFeatures::new(online, Device::Cpu, u64::MAX), counts }
    }
}

impl FeatureSource for Counted<'_> {
    fn begin(&self, batch: Arc<PackedBatch>, capture: &[usize]) -> Pending<'_> {
        self.source.begin(batch, capture)
    }

    fn remembers(&self) -> bool {
        self.source.remembers()
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.counts.lock().unwrap().push((self.source.computed(), self.source.held()));
    }
}

#[test]
fn every_document_is_computed_once_by_the_rank_that_keeps_it() {
    let world = World::new();
    let mut configuration = world.workspace.configuration.clone();
    configuration["draft"] = json!({"algorithm": "eagle3", "capture": [0, 1], "ttt_steps": 2});
    configuration["train"]["max_steps"] = json!(STEPS);
    configuration["train"]["eval_every"] = json!(5);
    let whole = world.train("kept-whole", &configuration, Kind::Double, WHOLE, None);

    // The run goes through its documents several times.
    let config = RunConfig::from_value(&configuration).unwrap();
    let (train, held_out) = split(&world.cache, config.data.eval_fraction);
    let lengths: Vec<usize> = train.iter().map(|&index| world.cache.length(index)).collect();
    let order = config.train.order(lengths.clone()).unwrap();
    let epochs: usize = (0..3).map(|epoch| order.epoch(epoch).unwrap().len()).sum();
    assert!(epochs < STEPS, "three epochs are {epochs} steps");
    let documents: Vec<usize> = [train.clone(), held_out].concat();
    let distinct: HashSet<&[u32]> = documents.iter().map(|&index| world.cache.document(index).tokens).collect();
    let tokens: usize = distinct.iter().map(|tokens| tokens.len()).sum();
    // Equal documents may have different owners.
    let (least, most) = (distinct.len() as u64, documents.len() as u64);
    // Two captured states and the last one of 32 numbers in float64.
    let bytes = (tokens * 3 * 32 * 8) as u64;

    configuration["target"]["keep_hidden_states"] = json!(true);
    for ranks in [0, 2, 4] {
        world.kept.lock().unwrap().clear();
        let cut = Cut { ranks, micro_batch_tokens: 128, shard_optimizer: true };
        let outcomes = world.train(&format!("kept-{ranks}"), &configuration, Kind::Double, cut, None);
        let difference = largest(&outcomes[0].parameters, &whole[0].parameters);
        assert!(difference <= 1e-10, "{ranks} ranks: parameters differ by {difference:e}");
        let counts = world.kept.lock().unwrap().clone();
        assert_eq!(counts.len(), ranks.max(1));
        let computed: u64 = counts.iter().map(|(computed, _)| computed).sum();
        assert!((least..=most).contains(&computed), "{ranks} ranks: {computed} of {most} documents");
        let held: u64 = counts.iter().map(|(_, held)| held).sum();
        assert!(held >= bytes && held <= bytes * most / least + bytes / 10, "{ranks} ranks: {held} bytes, not {bytes}");
        // Held-out documents come in whole micro-batches, so shares are not quite even.
        let share = held / counts.len() as u64;
        let uneven = counts.iter().map(|(_, held)| held.abs_diff(share)).max().unwrap();
        assert!(uneven * 4 < share.max(1), "{ranks} ranks: {counts:?}");
        // The plan knows it, in the configuration's own element type of half the width.
        let config = RunConfig::from_value(&configuration).unwrap();
        let planned = 2 * Plan::new(&config, ranks.max(1)).unwrap().memory.hidden_states;
        let most = counts.iter().map(|(_, held)| *held).max().unwrap();
        assert!(planned.abs_diff(most) * 6 < most, "{ranks} ranks: {planned} planned, {most} kept");
    }
}
