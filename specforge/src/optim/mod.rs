//! The optimizer: AdamW and Muon on float32 masters, alone or cut over ranks, averages of parameters, learning-rate
//! schedules, and their configuration.

mod average;
pub mod config;
mod cut;
pub mod muon;
pub mod norm;
pub mod optimizer;
pub mod parameter;
mod pattern;
pub mod schedule;
mod state;

#[cfg(test)]
mod across_ranks;

pub use config::{GroupConfig, OptimConfig};
pub use muon::MuonConfig;
pub use norm::global_norm;
pub use optimizer::{NonFinite, NonFiniteSteps, Optimizer, StepReport};
pub use parameter::ParameterSlot;
pub use schedule::{ScheduleConfig, ScheduleKind};
