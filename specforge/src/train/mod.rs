//! The one training loop. No algorithm has a name here: a draft gives gradients and metrics, a feature source gives
//! hidden states, and this room owns time: steps, accumulation, logging, evaluation, saving, stopping.
//!
//! Several processes run the same loop on the same global batches, each on its share of the documents. Losses, metrics and
//! gradients are sums over all of them divided by global counts, so the update does not depend on how many there are.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tch::Device;

use crate::error::{Error, Result};

pub mod agreement;
mod ahead;
pub mod continuation;
mod finite;
mod gradient_noise;
pub mod gradient_sums;
mod held_out;
pub mod metrics;
pub mod order;
pub mod parts;
mod planning;
pub mod report;
pub mod seconds;
pub mod trainer;

#[cfg(test)]
mod one_writer;

pub use continuation::{Place, is_on_the_way, same_learning_rates, same_length};
pub use gradient_sums::GradientSums;
pub use order::DataOrder;
pub use parts::{Provenance, Split, TrainerParts, Writer};
pub use report::TrainReport;
pub use seconds::Seconds;
pub use trainer::Trainer;

/// More micro-batches than these would fill the memory for nothing: one is enough to keep a device busy.
const MOST_PREFETCHED: usize = 16;

/// Whoever loses more steps than this has another problem; the optimizer keeps a list of that length.
const MOST_SKIPPED: u64 = 10_000;

/// The `train` section of a configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Where checkpoints, logs and the resolved configuration go.
    pub output_dir: PathBuf,
    /// Passes over the training documents.
    pub epochs: u64,
    /// Stop after this many optimizer steps, whatever `epochs` says.
    pub max_steps: Option<u64>,
    /// Most tokens of one optimizer step, over all micro-batches.
    pub batch_tokens: usize,
    /// Most tokens that run through target and draft at once. Changes memory and speed, never the update.
    pub micro_batch_tokens: usize,
    /// Seed of data order and initial values.
    pub seed: u64,
    /// Optimizer steps between log lines.
    pub log_every: u64,
    /// Optimizer steps between evaluations on held-out documents; 0 evaluates at the start and the end only.
    pub eval_every: u64,
    /// Optimizer steps between checkpoints; 0 saves at the end and after the best evaluations only.
    pub save_every: u64,
    /// Most MiB that one chunk of logits takes; without it what suits the device, see [`Self::chunk_bytes`].
    pub chunk_mib: Option<usize>,
    /// Whether a GPU has to compute the same bits every time, which takes longer. A CPU does anyway.
    pub deterministic: bool,
    /// Micro-batches whose hidden states are fetched while another is trained on; 0 fetches each when its turn comes.
    pub prefetch: usize,
    /// Steps with a loss or a gradient that is not finite that a run passes over before it ends at the next one.
    pub skip_non_finite: u64,
    /// Whether to measure how much of the gradients is chance, and log it as `gradient_noise_tokens`.
    pub gradient_noise: bool,
    /// What factors a CPU multiplies; `None` for the float32 that everything else is in.
    pub mixed_precision: Option<Factors>,
}

/// Element types of factors in mixed precision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Factors {
    /// Eight significant bits, the range of float32.
    Bfloat16,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            output_dir: PathBuf::from("runs/default"),
            epochs: 1,
            max_steps: None,
            batch_tokens: 16384,
            micro_batch_tokens: 4096,
            seed: 42,
            log_every: 10,
            eval_every: 200,
            save_every: 200,
            chunk_mib: None,
            deterministic: false,
            prefetch: 1,
            skip_non_finite: 0,
            gradient_noise: false,
            mixed_precision: None,
        }
    }
}

const CHUNK_MIB_ON_CPU: usize = 64;
const CHUNK_MIB_ON_GPU: usize = 512;

/// Epochs that are counted through to know how many steps a run has.
const MOST_EPOCHS: u64 = 100_000;

impl TrainConfig {
    /// Checks values that the types allow and the loop does not.
    pub fn validate(&self) -> Result<()> {
        let positive = [
            ("epochs", self.epochs),
            ("max_steps", self.max_steps.unwrap_or(1)),
            ("batch_tokens", self.batch_tokens as u64),
            ("micro_batch_tokens", self.micro_batch_tokens as u64),
            ("log_every", self.log_every),
            ("chunk_mib", self.chunk_mib.unwrap_or(1) as u64),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(Error::config(format!("train.{key}"), "expected at least 1, got 0"));
        }
        // Far beyond any machine, and small enough that sizes in bytes stay within 64 bits.
        for (key, value) in [("batch_tokens", self.batch_tokens), ("chunk_mib", self.chunk_mib.unwrap_or(1))] {
            if value > i32::MAX as usize {
                return Err(Error::config(
                    format!("train.{key}"),
                    format!("expected at most {}, got {value}", i32::MAX),
                ));
            }
        }
        if self.prefetch > MOST_PREFETCHED {
            let problem = format!("expected at most {MOST_PREFETCHED}, got {}", self.prefetch);
            return Err(Error::config("train.prefetch", problem));
        }
        if self.skip_non_finite > MOST_SKIPPED {
            let problem = format!("expected at most {MOST_SKIPPED}, got {}", self.skip_non_finite);
            return Err(Error::config("train.skip_non_finite", problem));
        }
        if self.micro_batch_tokens > self.batch_tokens {
            let problem =
                format!("expected at most batch_tokens ({}), got {}", self.batch_tokens, self.micro_batch_tokens);
            return Err(Error::config("train.micro_batch_tokens", problem));
        }
        if self.gradient_noise && 2 * self.micro_batch_tokens > self.batch_tokens {
            let problem = format!(
                "compares an update's first micro-batch with all of it, and micro-batches of {} tokens leave updates of {} one",
                self.micro_batch_tokens, self.batch_tokens
            );
            return Err(Error::config("train.gradient_noise", problem)
                .with_hint("set train.micro_batch_tokens to at most half of train.batch_tokens"));
        }
        Ok(())
    }

    /// Most bytes of a chunk of logits on a device.
    ///
    /// Every chunk reads the heads again and adds to the head's whole gradient. On a GPU those passes over memory are most of
    /// what a small chunk costs; on a CPU a large one falls out of the caches and is none the faster.
    pub fn chunk_bytes(&self, device: Device) -> usize {
        let default = if device.is_cuda() { CHUNK_MIB_ON_GPU } else { CHUNK_MIB_ON_CPU };
        self.chunk_mib.unwrap_or(default) << 20
    }

    /// The order of training documents of these lengths.
    pub fn order(&self, lengths: Vec<usize>) -> Result<DataOrder> {
        DataOrder::new(lengths, self.batch_tokens, self.micro_batch_tokens, self.seed)
    }

    /// Optimizer steps of a run over documents in this order.
    pub fn total_steps(&self, order: &DataOrder) -> Result<u64> {
        let most = self.max_steps.unwrap_or(u64::MAX);
        let mut steps = 0;
        for epoch in 0..self.epochs {
            if epoch == MOST_EPOCHS {
                let problem = format!("expected at most {MOST_EPOCHS}, or fewer steps in train.max_steps");
                return Err(Error::config("train.epochs", format!("{problem}, got {}", self.epochs)));
            }
            let of_epoch = order.epoch(epoch)?.len() as u64;
            steps += of_epoch;
            if steps >= most || of_epoch == 0 {
                break;
            }
        }
        Ok(steps.min(most))
    }
}
