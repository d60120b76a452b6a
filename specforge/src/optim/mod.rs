//! The optimizer: AdamW on float32 masters, alone or cut over ranks, learning-rate schedules, and their configuration.

pub mod adamw;
pub mod config;
mod cut;
pub mod norm;
pub mod parameter;
pub mod schedule;
mod state;

#[cfg(test)]
mod across_ranks;

pub use adamw::{AdamW, NonFinite, NonFiniteSteps, StepReport};
pub use config::{GroupConfig, OptimConfig};
pub use norm::global_norm;
pub use parameter::ParameterSlot;
pub use schedule::{ScheduleConfig, ScheduleKind};
