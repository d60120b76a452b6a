//! What a draft decides about a batch before anything is computed: which rows it trains, and everything that chance picks.
//!
//! Chance has a key. A draw depends on the run's seed, the step, the document, the place in it and what the draw is for,
//! and on nothing else: not on the other documents of a batch, not on the rank or how many there are, and not on how often
//! a run was interrupted. Whoever plans a document of a step plans the same.

use std::any::Any;

use crate::data::DocumentRef;
use crate::error::{Error, Result};
use crate::nn::noise;

/// Tells these draws from all others of a seed.
const CHANCE: u64 = 0x706c_616e;

/// Where in a run a batch is trained: the same on every rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepKey {
    /// Seed of the run.
    pub seed: u64,
    /// Optimizer steps taken before.
    pub step: u64,
    /// Steps that the run's schedules are spread over.
    pub total: u64,
}

impl StepKey {
    /// The key of every evaluation: whenever and wherever it is made, it measures the same thing, and a schedule is at its
    /// end.
    pub const EVALUATION: Self = Self { seed: 0x6865_6c64, step: 1, total: 1 };

    /// How much of the run is over, from 0 to 1.
    pub fn progress(self) -> f64 {
        (self.step as f64 / self.total.max(1) as f64).min(1.0)
    }

    /// The draws for one document of this step. `purpose` tells those of one kind from those of another: a number of the
    /// draft's own.
    pub fn draws(self, document: &DocumentRef, purpose: u64) -> Draws {
        let of_document = noise::keyed_bits(self.seed, CHANCE, self.step, document.number);
        Draws { key: noise::keyed_bits(of_document, purpose, 0, 0) }
    }
}

/// Draws of one kind for one document of a step; each has a place of two numbers, such as a token and a column.
#[derive(Debug, Clone, Copy)]
pub struct Draws {
    key: u64,
}

impl Draws {
    /// 64 random bits.
    pub fn bits(self, row: u64, column: u64) -> u64 {
        noise::keyed_bits(self.key, CHANCE, row, column)
    }

    /// A number from 0 to below 1.
    pub fn uniform(self, row: u64, column: u64) -> f64 {
        (self.bits(row, column) >> 11) as f64 * 2f64.powi(-53)
    }

    /// `count` of `items` without putting back, in their own order; all where there are no more. Which ones are picked is
    /// decided by the items themselves, numbers such as tokens of the document, and not by their places in the list.
    pub fn choose(self, items: &[i64], count: usize) -> Vec<i64> {
        let mut ranked: Vec<(u64, i64)> = items.iter().map(|&item| (self.bits(item as u64, 0), item)).collect();
        if count < ranked.len() {
            ranked.sort_unstable();
            ranked.truncate(count);
            ranked.sort_unstable_by_key(|(_, item)| *item);
        }
        ranked.into_iter().map(|(_, item)| item).collect()
    }
}

/// A planned batch.
pub struct RowPlan {
    /// What each loss term is divided by, as far as these documents go: mostly trained rows. The plans of several batches
    /// have the sum of their counts.
    pub counts: Vec<f64>,
    own: Box<dyn Any + Send>,
}

impl std::fmt::Debug for RowPlan {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "RowPlan {{ counts: {:?}, .. }}", self.counts)
    }
}

impl RowPlan {
    /// A plan of these counts; `own` is whatever the draft wants to find again. It is made ahead, perhaps on another thread,
    /// so nothing in it is on a device.
    pub fn new(counts: Vec<f64>, own: impl Any + Send) -> Self {
        Self { counts, own: Box::new(own) }
    }

    /// What the draft put into its plan.
    pub fn own<T: Any>(&self) -> Result<&T> {
        let foreign = || Error::Failed("a batch was planned by another draft than the one that trains it".to_owned());
        self.own.downcast_ref().ok_or_else(foreign)
    }
}

/// Adds the counts of one batch to those of others.
pub fn add_counts(total: &mut Vec<f64>, counts: &[f64]) {
    total.resize(total.len().max(counts.len()), 0.0);
    total.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draw_depends_on_seed_step_document_place_and_purpose_and_on_nothing_else() {
        let key = StepKey { seed: 1, step: 2, total: 10 };
        let draw = |key: StepKey, number, purpose, row, column| {
            key.draws(&DocumentRef::new("any", number), purpose).bits(row, column)
        };
        let one = draw(key, 3, 4, 5, 6);
        assert_eq!(one, key.draws(&DocumentRef::new("other", 3), 4).bits(5, 6), "its name is no matter");
        assert_eq!(one, draw(StepKey { total: 11, ..key }, 3, 4, 5, 6));
        let others = [
            draw(StepKey { seed: 2, ..key }, 3, 4, 5, 6),
            draw(StepKey { step: 3, ..key }, 3, 4, 5, 6),
            draw(key, 4, 4, 5, 6),
            draw(key, 3, 5, 5, 6),
            draw(key, 3, 4, 6, 6),
            draw(key, 3, 4, 5, 7),
        ];
        assert!(others.iter().all(|other| *other != one));
    }

    #[test]
    fn chosen_items_are_a_fair_part_of_all() {
        let items: Vec<i64> = (10..30).collect();
        let mut times = [0; 30];
        for step in 0..2000 {
            let draws = StepKey { seed: 7, step, total: 1 }.draws(&DocumentRef::new("", 0), 0);
            let chosen = draws.choose(&items, 5);
            assert!(chosen.len() == 5 && chosen.is_sorted());
            chosen.iter().for_each(|&item| times[item as usize] += 1);
            assert_eq!(draws.choose(&items, 20), items);
        }
        assert!(times[10..].iter().all(|&times| (420..580).contains(&times)), "{times:?}");
    }

    #[test]
    fn a_plan_is_its_drafts_own() {
        let plan = RowPlan::new(vec![2.0], vec![1i64, 2]);
        assert_eq!(plan.own::<Vec<i64>>().unwrap(), &[1, 2]);
        assert!(plan.own::<Vec<u8>>().unwrap_err().to_string().contains("another draft"));
        let mut total = Vec::new();
        add_counts(&mut total, &plan.counts);
        add_counts(&mut total, &[1.0]);
        assert_eq!(total, [3.0]);
    }
}
