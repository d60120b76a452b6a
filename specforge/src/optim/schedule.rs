//! Learning rates over a run.
//!
//! With base rate `b`, floor `f = min_ratio`, `w` warm-up updates and a horizon of `T` updates (those of the run, unless
//! `total_steps` says otherwise), update `s` (from 0) runs at
//!
//! | part | from | rate |
//! |---|---|---|
//! | warm-up | `s < w` | `b (s + 1) / w` |
//! | constant | `s >= w` | `b` |
//! | linear | `s >= w` | `b (f + (1 - f) (1 - p))`, `p = (s - w) / (T - w)` |
//! | cosine | `s >= w` | `b (f + (1 - f) (1 + cos(pi p)) / 2)`, the same `p` |
//! | wsd | `s >= w` | `b`, and over the last `d` updates linear with `p = (s - (T - d)) / d` |
//!
//! The first update already moves, the rate is exactly `b` where warm-up ends and never above it, the last update is
//! the last one above the floor, and the rate stays at the floor for ever after.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Warm-up where the configuration names none.
const DEFAULT_WARMUP_RATIO: f64 = 0.015;

/// What happens after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Stays at the base rate.
    Constant,
    /// A straight line to the floor.
    Linear,
    /// Half a cosine to the floor.
    #[default]
    Cosine,
    /// Warm-up, stable, decay: stays at the base rate, then a straight line to the floor at the end of the run.
    Wsd,
}

/// How the learning rate moves over a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleConfig {
    /// What happens after warm-up.
    pub kind: ScheduleKind,
    /// Updates of warm-up. At most one of this and `warmup_ratio`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<u64>,
    /// Warm-up as a share of all updates, rounded to whole updates. Without either: 0.015.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_ratio: Option<f64>,
    /// Floor as a share of the base rate.
    pub min_ratio: f64,
    /// wsd alone: the share of all updates that decay, rounded to whole updates.
    pub decay_ratio: f64,
    /// Updates that the schedule is spread over. Without it those of the run, so that a run of another length has other
    /// rates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_steps: Option<u64>,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self {
            kind: ScheduleKind::default(),
            warmup_steps: None,
            warmup_ratio: None,
            min_ratio: 0.0,
            decay_ratio: 0.1,
            total_steps: None,
        }
    }
}

impl ScheduleConfig {
    /// Refuses what no run can mean.
    pub fn validate(&self) -> Result<()> {
        if self.warmup_steps.is_some() && self.warmup_ratio.is_some() {
            return Err(Error::config("optim.schedule.warmup_ratio", "warmup_steps is given too")
                .with_hint("keep one of the two"));
        }
        let shares = [
            ("warmup_ratio", self.warmup_ratio.unwrap_or(DEFAULT_WARMUP_RATIO)),
            ("min_ratio", self.min_ratio),
            ("decay_ratio", self.decay_ratio),
        ];
        for (key, share) in shares {
            if !(0.0..=1.0).contains(&share) {
                let problem = format!("expected a share between 0 and 1, got {share}");
                return Err(Error::config(format!("optim.schedule.{key}"), problem));
            }
        }
        if self.total_steps == Some(0) {
            return Err(Error::config("optim.schedule.total_steps", "expected at least 1, got 0"));
        }
        Ok(())
    }

    /// Updates that the schedule is spread over in a run of `run_steps` updates.
    pub fn horizon(&self, run_steps: u64) -> u64 {
        self.total_steps.unwrap_or(run_steps)
    }

    /// Refuses a run so much longer than the schedule that its last updates would change nothing.
    pub fn check_length(&self, run_steps: u64) -> Result<()> {
        let horizon = self.horizon(run_steps);
        if horizon >= run_steps || self.min_ratio > 0.0 || self.kind == ScheduleKind::Constant {
            return Ok(());
        }
        let problem = format!("the learning rate is 0 after {horizon} steps, and the run has {run_steps}");
        Err(Error::config("optim.schedule.total_steps", problem)
            .with_hint("raise it, set train.max_steps to it, or set optim.schedule.min_ratio above 0"))
    }

    /// The rate of update `step` (from 0) with a horizon of `total` updates. Formulas: see the head of this file.
    pub fn learning_rate(&self, base: f64, step: u64, total: u64) -> f64 {
        let warmup = self.warmup(total);
        if step < warmup {
            return base * ((step + 1) as f64 / warmup as f64);
        }
        let remaining = match self.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Linear => 1.0 - progress(step, warmup, total),
            ScheduleKind::Cosine => (1.0 + (std::f64::consts::PI * progress(step, warmup, total)).cos()) / 2.0,
            ScheduleKind::Wsd => {
                let decay_start = total.saturating_sub(share_of(self.decay_ratio, total)).max(warmup);
                1.0 - progress(step, decay_start, total)
            }
        };
        // Written so that `remaining == 1` gives exactly `base`, whatever the floor.
        base * (1.0 - (1.0 - self.min_ratio) * (1.0 - remaining))
    }

    /// Updates of warm-up with a horizon of `total` updates.
    pub fn warmup(&self, total: u64) -> u64 {
        let ratio = self.warmup_ratio.unwrap_or(DEFAULT_WARMUP_RATIO);
        self.warmup_steps.unwrap_or_else(|| share_of(ratio, total))
    }
}

fn share_of(ratio: f64, total: u64) -> u64 {
    (ratio * total as f64).round() as u64
}

/// 0 up to `start`, 1 from `end` on, a straight line between.
fn progress(step: u64, start: u64, end: u64) -> f64 {
    if step >= end {
        return 1.0;
    }
    step.saturating_sub(start) as f64 / end.saturating_sub(start).max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind, warmup_steps: u64) -> ScheduleConfig {
        ScheduleConfig { kind, warmup_steps: Some(warmup_steps), ..ScheduleConfig::default() }
    }

    fn rates(config: &ScheduleConfig, base: f64, total: u64) -> Vec<f64> {
        (0..total).map(|step| config.learning_rate(base, step, total)).collect()
    }

    #[track_caller]
    fn assert_close(got: &[f64], expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        for (got, expected) in got.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-12, "{got} {expected}");
        }
    }

    #[test]
    fn hand_numbers() {
        use ScheduleKind::*;
        assert_close(&rates(&schedule(Constant, 4), 2.0, 6), &[0.5, 1.0, 1.5, 2.0, 2.0, 2.0]);
        assert_close(&rates(&schedule(Linear, 2), 1.0, 6), &[0.5, 1.0, 1.0, 0.75, 0.5, 0.25]);
        let root = std::f64::consts::FRAC_1_SQRT_2;
        let cosine = [0.5, 1.0, 1.0, (1.0 + root) / 2.0, 0.5, (1.0 - root) / 2.0];
        assert_close(&rates(&schedule(Cosine, 2), 1.0, 6), &cosine);
        let floor = ScheduleConfig { min_ratio: 0.2, ..schedule(Linear, 0) };
        assert_close(&rates(&floor, 10.0, 4), &[10.0, 8.0, 6.0, 4.0]);
        let wsd = ScheduleConfig { decay_ratio: 0.4, min_ratio: 0.1, ..schedule(Wsd, 2) };
        let expected = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.775, 0.55, 0.325];
        assert_close(&rates(&wsd, 1.0, 10), &expected);
    }

    #[test]
    fn warm_up_as_a_share_is_rounded_to_whole_updates() {
        let config = ScheduleConfig { warmup_ratio: Some(0.29), ..ScheduleConfig::default() };
        assert_eq!(config.warmup(100), 29);
        assert_eq!(ScheduleConfig::default().warmup(800), 12);
        assert_eq!(ScheduleConfig::default().warmup(10), 0);
    }

    #[test]
    fn every_schedule_is_continuous_positive_and_never_above_its_base() {
        use ScheduleKind::*;
        for kind in [Constant, Linear, Cosine, Wsd] {
            for (warmup, total) in [(0, 1), (0, 16), (1, 16), (16, 16), (5, 800), (40, 800), (100, 50), (700, 800)] {
                for min_ratio in [0.0, 0.3, 1.0] {
                    let config = ScheduleConfig { min_ratio, ..schedule(kind, warmup) };
                    let base = 3e-4;
                    let rates = rates(&config, base, total);
                    assert!(rates.iter().all(|&rate| rate > 0.0 && rate <= base), "{config:?} {total}");
                    let steepest = match kind {
                        Wsd => {
                            1.0 / (0.1 * total as f64).round().max(1.0).min(total.saturating_sub(warmup).max(1) as f64)
                        }
                        _ => std::f64::consts::FRAC_PI_2 / total.saturating_sub(warmup).max(1) as f64,
                    };
                    let step = base * steepest.max(1.0 / warmup.max(1) as f64) * 1.0001;
                    assert!(rates.windows(2).all(|pair| (pair[1] - pair[0]).abs() <= step), "{config:?} {total}");
                    if warmup > 0 && warmup < total {
                        assert_eq!(rates[warmup as usize - 1], base, "{config:?}");
                    }
                    if kind != Constant && warmup <= total {
                        for later in [total, total + 1, 10 * total] {
                            let rate = config.learning_rate(base, later, total);
                            assert!((rate - base * min_ratio).abs() < 1e-18, "{config:?} {rate}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_horizon_is_the_length_of_the_run_unless_it_is_given() {
        let read = |text: &str| serde_json::from_str::<ScheduleConfig>(text).unwrap();
        assert_eq!(read("{}").horizon(7), 7);
        assert_eq!(read(r#"{"total_steps": 9}"#).horizon(7), 9);
        // Beyond the horizon the rate stays at the floor: nothing is learned where that is 0.
        let error = read(r#"{"total_steps": 6}"#).check_length(7).unwrap_err();
        let want =
            "configuration: `optim.schedule.total_steps`: the learning rate is 0 after 6 steps, and the run has 7";
        assert_eq!(error.to_string(), want);
        for text in [
            "{}",
            r#"{"total_steps": 7}"#,
            r#"{"total_steps": 6, "min_ratio": 0.1}"#,
            r#"{"total_steps": 6, "kind": "constant"}"#,
        ] {
            read(text).check_length(7).unwrap();
        }
    }

    #[test]
    fn nonsense_is_refused_with_its_key() {
        for (text, key) in [
            (r#"{"warmup_steps": 3, "warmup_ratio": 0.1}"#, "optim.schedule.warmup_ratio"),
            (r#"{"warmup_ratio": 1.5}"#, "optim.schedule.warmup_ratio"),
            (r#"{"min_ratio": -0.1}"#, "optim.schedule.min_ratio"),
            (r#"{"kind": "wsd", "decay_ratio": 2}"#, "optim.schedule.decay_ratio"),
            (r#"{"total_steps": 0}"#, "optim.schedule.total_steps"),
        ] {
            let config: ScheduleConfig = serde_json::from_str(text).unwrap();
            assert!(config.validate().unwrap_err().to_string().contains(key), "{text}");
        }
        for text in [r#"{"kind": "step"}"#, r#"{"warm_up": 3}"#] {
            assert!(serde_json::from_str::<ScheduleConfig>(text).is_err(), "{text}");
        }
        assert!(ScheduleConfig { min_ratio: f64::NAN, ..ScheduleConfig::default() }.validate().is_err());
        ScheduleConfig::default().validate().unwrap();
    }
}
