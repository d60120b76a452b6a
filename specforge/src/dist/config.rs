//! The `parallel` section of a configuration. None of it changes an update.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How several processes train as one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ParallelConfig {
    /// MiB of gradients that are summed over the ranks at once, while later ones are still being computed.
    pub bucket_mib: usize,
    /// How long a rank waits for its peers before it gives the run up.
    pub timeout_seconds: u64,
    /// Each rank keeps the optimizer's state of its share of the parameters alone.
    pub shard_optimizer: bool,
}

impl Default for ParallelConfig {
    fn default() -> Self {
        Self { bucket_mib: 25, timeout_seconds: 1800, shard_optimizer: true }
    }
}

impl ParallelConfig {
    /// Refuses values that mean nothing.
    pub fn validate(&self) -> Result<()> {
        // Far beyond any machine, and small enough that bytes and milliseconds stay within 64 bits.
        let most = i32::MAX as u64;
        for (key, value) in [("bucket_mib", self.bucket_mib as u64), ("timeout_seconds", self.timeout_seconds)] {
            if !(1..=most).contains(&value) {
                return Err(Error::config(format!("parallel.{key}"), format!("expected 1 to {most}, got {value}")));
            }
        }
        Ok(())
    }

    /// Size of a bucket.
    pub fn bucket_bytes(&self) -> usize {
        self.bucket_mib << 20
    }

    /// How long a rank waits for its peers.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_mean_nothing_are_refused() {
        ParallelConfig::default().validate().unwrap();
        for (key, config) in [
            ("bucket_mib", ParallelConfig { bucket_mib: 0, ..ParallelConfig::default() }),
            ("bucket_mib", ParallelConfig { bucket_mib: usize::MAX, ..ParallelConfig::default() }),
            ("timeout_seconds", ParallelConfig { timeout_seconds: 0, ..ParallelConfig::default() }),
        ] {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(&format!("`parallel.{key}`")), "{error}");
        }
    }
}
