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
