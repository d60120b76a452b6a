//! Whether a run may go on with another length: it may where the updates already made stay what they were.
//!
//! A resumed run is, bit for bit, the run that its configuration describes. Most schedules spread over the whole run, so
//! another `train.epochs` or `train.max_steps` can mean other learning rates for steps that are done. Those rates are
//! compared one by one, so that no schedule needs a rule of its own.

use serde_json::Value;

use super::{DataOrder, TrainConfig};
use crate::error::{Error, Result};
use crate::optim::{OptimConfig, ScheduleConfig};
use crate::strict;

/// Where a run stands, as a checkpoint has it.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Optimizer steps taken.
    pub step: u64,
    /// Epochs finished.
    pub epoch: u64,
    /// Batches of the next epoch that are used.
    pub batch: u64,
    /// Tokens of all batches used.
    pub tokens: u64,
}

/// Whether the run of a checkpoint's own configuration, `then`, comes through this place; otherwise what is wrong with
/// it. Its numbers are those of a file: nothing may be counted up to them before.
pub fn is_on_the_way(then: &Value, order: &DataOrder, place: &Place) -> Result<(), String> {
    let config: TrainConfig = strict::from_value(&then["train"], "train").map_err(|error| error.to_string())?;
    config.validate().map_err(|error| error.to_string())?;
    let total = config.total_steps(order).map_err(|error| error.to_string())?;
    if place.step > total {
        return Err(format!(
            "`step`: expected at most {total}, as many as its configuration makes, got {}",
            place.step
        ));
    }
    if place.epoch >= config.epochs {
        return Err(format!("`epoch`: expected a number below {}, got {}", config.epochs, place.epoch));
    }
    // Every batch is one step.
    let (mut steps, mut length) = (0, 0);
    for epoch in 0..=place.epoch {
        steps += length;
        length = order.epoch(epoch).map_err(|error| error.to_string())?.len() as u64;
        if steps > place.step {
            break;
        }
    }
    if place.batch > length || steps + place.batch != place.step {
        let Place { step, epoch, batch, .. } = place;
        return Err(format!("`epoch`, `position`: {batch} batches of epoch {epoch} are not where step {step} is"));
    }
    let most = place.step.saturating_mul(config.batch_tokens as u64);
    if place.tokens > most {
        return Err(format!("`tokens_seen`: expected at most {most} after {} steps, got {}", place.step, place.tokens));
    }
    Ok(())
}

/// Refuses a continuation in which one of the `done` steps would have had another learning rate. `then` is the
/// configuration that the checkpoint records; whatever decides the order of the data is known to be the same.
pub fn same_learning_rates(
    then: &Value,
    train: &TrainConfig,
    optim: &OptimConfig,
    order: &DataOrder,
    done: u64,
) -> Result<()> {
    let then_train: TrainConfig = strict::from_value(&then["train"], "train")?;
    let then_optim: OptimConfig = strict::from_value(&then["optim"], "optim")?;
    let now_steps = train.total_steps(order)?;
    let then_horizon = then_optim.schedule.horizon(then_train.total_steps(order)?);
    let now_horizon = optim.schedule.horizon(now_steps);
    let rate_then = |step| then_optim.schedule.learning_rate(then_optim.learning_rate, step, then_horizon);
    let rate_now = |step| optim.schedule.learning_rate(optim.learning_rate, step, now_horizon);
    let Some(step) = (0..done).find(|&step| rate_then(step) != rate_now(step)) else {
        return Ok(());
    };
    let problem = format!(
        "the checkpoint's learning rates are spread over {then_horizon} steps, got {now_horizon}: of the {done} steps \
         done, step {} had {:e} and would now have {:e}",
        step + 1,
        rate_then(step),
        rate_now(step)
    );
    let back = "set train.epochs, train.max_steps and optim.schedule.total_steps back";
    let pinned = ScheduleConfig { total_steps: Some(then_horizon), ..optim.schedule.clone() };
    let hint = match pinned.check_length(now_steps) {
        Ok(()) => format!("keep them with optim.schedule.total_steps={then_horizon}, or {back}"),
        Err(_) => format!(
            "{back}; a run that shall grow needs optim.schedule.total_steps from its start, or a constant schedule with \
             warmup_steps"
        ),
    };
    Err(Error::config("optim.schedule", problem).with_hint(hint))
}

/// Refuses a continuation whose schedules are spread over another number of steps than the checkpoint's: for drafts whose
/// updates depend on how much of the run is over, whatever the learning rate does.
pub fn same_length(then: &Value, train: &TrainConfig, optim: &OptimConfig, order: &DataOrder) -> Result<()> {
    let then_train: TrainConfig = strict::from_value(&then["train"], "train")?;
    let then_optim: OptimConfig = strict::from_value(&then["optim"], "optim")?;
    let then_horizon = then_optim.schedule.horizon(then_train.total_steps(order)?);
    let now_horizon = optim.schedule.horizon(train.total_steps(order)?);
    if then_horizon == now_horizon {
        return Ok(());
    }
    let problem = format!(
        "this draft is trained by how much of the run is over: the checkpoint's was one of {then_horizon} steps, got \
         {now_horizon}"
    );
    Err(Error::config("optim.schedule.total_steps", problem)
        .with_hint(format!("keep them with optim.schedule.total_steps={then_horizon}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Four documents, each a batch: an epoch has four steps.
    fn order() -> DataOrder {
        DataOrder::new(vec![10; 4], 10, 10, 0).unwrap()
    }

    /// Whether 4 epochs, 16 steps, may go on with `change` after `done` steps. `schedule` holds before and after.
    fn outcome(schedule: Value, change: Value, done: u64) -> Result<()> {
        let then = json!({"train": {"epochs": 4}, "optim": {"schedule": schedule}});
        let mut now = then.clone();
        for (section, values) in change.as_object().unwrap() {
            for (key, value) in values.as_object().unwrap() {
                match section.as_str() {
                    "schedule" => now["optim"]["schedule"][key] = value.clone(),
                    _ => now[section][key] = value.clone(),
                }
            }
        }
        let train: TrainConfig = strict::from_value(&now["train"], "train")?;
        let optim: OptimConfig = strict::from_value(&now["optim"], "optim")?;
        same_learning_rates(&then, &train, &optim, &order(), done)
    }

    #[test]
    fn a_run_may_change_its_length_where_no_rate_that_was_used_depends_on_it() {
        let longer = json!({"train": {"epochs": 8}});
        let shorter = json!({"train": {"max_steps": 9}});
        for change in [&longer, &shorter] {
            for schedule in [
                json!({"kind": "constant", "warmup_steps": 3}),
                json!({"kind": "constant", "warmup_ratio": 0.0}),
                json!({"kind": "cosine", "total_steps": 16, "min_ratio": 0.1}),
                json!({"kind": "linear", "total_steps": 50}),
            ] {
                outcome(schedule, change.clone(), 8).unwrap();
            }
            for schedule in [
                json!({"kind": "constant", "warmup_ratio": 0.3}),
                json!({"kind": "cosine", "warmup_steps": 3}),
                json!({"kind": "linear", "warmup_steps": 3}),
                json!({}),
            ] {
                let error = outcome(schedule.clone(), change.clone(), 8).unwrap_err().to_string();
                assert!(error.contains("spread over 16 steps"), "{schedule}: {error}");
            }
        }
        // A limit that the run does not reach changes nothing.
        outcome(json!({}), json!({"train": {"max_steps": 16}}), 8).unwrap();
        outcome(json!({}), json!({"train": {"max_steps": 99}}), 8).unwrap();
    }

    #[test]
    fn a_stable_phase_may_grow_and_a_decay_that_began_may_not() {
        let wsd = json!({"kind": "wsd", "warmup_steps": 2, "decay_ratio": 0.25});
        let longer = json!({"train": {"epochs": 8}});
        // The decay begins after 12 of 16 steps: the 13th still runs at the base rate, the 14th does not.
        outcome(wsd.clone(), longer.clone(), 12).unwrap();
        outcome(wsd.clone(), longer.clone(), 13).unwrap();
        let error = outcome(wsd, longer, 14).unwrap_err().to_string();
        assert!(error.contains("step 14 had"), "{error}");
    }

    #[test]
    fn a_place_that_a_run_does_not_come_through_is_refused() {
        let then = json!({"train": {"epochs": 4, "batch_tokens": 10, "micro_batch_tokens": 10}});
        let check = |step, epoch, batch, tokens| is_on_the_way(&then, &order(), &Place { step, epoch, batch, tokens });
        for (step, epoch, batch) in [(0, 0, 0), (3, 0, 3), (4, 0, 4), (5, 1, 1), (16, 3, 4)] {
            check(step, epoch, batch, 10 * step).unwrap();
        }
        for (step, epoch, batch, tokens, word) in [
            (17, 3, 4, 0, "`step`: expected at most 16"),
            (u64::MAX, 3, 4, 0, "`step`"),
            (1 << 62, 0, 1 << 62, 0, "`step`"),
            (4, 4, 0, 0, "`epoch`: expected a number below 4"),
            (4, u64::MAX, 0, 0, "`epoch`"),
            (5, 0, 5, 0, "5 batches of epoch 0 are not where step 5 is"),
            (5, 1, 2, 0, "2 batches of epoch 1"),
            (5, 1, u64::MAX, 0, "`position`"),
            (5, 1, 1, 51, "`tokens_seen`: expected at most 50"),
            (5, 1, 1, u64::MAX, "`tokens_seen`"),
        ] {
            let problem = check(step, epoch, batch, tokens).unwrap_err();
            assert!(problem.contains(word), "{problem}");
        }
        // A configuration that would be counted for ever.
        let endless = json!({"train": {"epochs": u64::MAX, "batch_tokens": 10, "micro_batch_tokens": 10}});
        let problem =
            is_on_the_way(&endless, &order(), &Place { step: 1, epoch: 0, batch: 1, tokens: 10 }).unwrap_err();
        assert!(problem.contains("`train.epochs`: expected at most 100000"), "{problem}");
    }

    #[test]
    fn the_hint_says_what_would_keep_the_rates() {
        let longer = json!({"train": {"epochs": 8}});
        let hint = |schedule: Value, change: &Value| outcome(schedule, change.clone(), 8).unwrap_err().hint().unwrap();
        assert!(hint(json!({"min_ratio": 0.1}), &longer).contains("keep them with optim.schedule.total_steps=16"));
        outcome(json!({"min_ratio": 0.1}), json!({"train": {"epochs": 8}, "schedule": {"total_steps": 16}}), 8)
            .unwrap();
        // A schedule that ends at 0 cannot carry a longer run, and a shorter one it can.
        assert!(!hint(json!({}), &longer).contains("keep them"));
        assert!(hint(json!({}), &json!({"train": {"max_steps": 9}})).contains("keep them"));
        outcome(json!({}), json!({"schedule": {"total_steps": 20}}), 8).unwrap_err();
    }
}
