//! The optimizer: AdamW on float32 masters, learning-rate schedules, and their configuration.

pub mod adamw;
pub mod config;
pub mod norm;
pub mod schedule;

pub use adamw::{AdamW, Group, NonFinite, ParameterSlot, StepReport};
pub use config::OptimConfig;
pub use norm::global_norm;
pub use schedule::{ScheduleConfig, ScheduleKind};
