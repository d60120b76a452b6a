//! Several processes that train as one, on libtorch's own distributed engine.
//!
//! A run of `world_size` processes has ranks `0 .. world_size`. They find each other through a [`Store`], a small table
//! of bytes over TCP, and then talk through a [`ProcessGroup`]: collectives that every rank calls in the same order. A
//! [`Reducer`] sums gradients over the ranks in buckets while later gradients are still being computed.
//!
//! Gloo carries tensors of host memory. [`ProcessGroup::add_nccl`] has NCCL carry those of CUDA devices in the same group.
//!
//! Work that falls into pieces needs no collectives: ranks take it from one list, see [`SharedWork`].
//!
//! A process on its own has [`ProcessGroup::single`], for which every collective is the identity: nothing above this room
//! asks how many processes there are in order to be correct.

mod c10d;
pub mod config;
pub mod group;
pub mod meeting;
pub mod nccl;
pub mod placement;
pub mod reducer;
pub mod shared_work;
pub mod store;

pub use config::ParallelConfig;
pub use group::{ProcessGroup, ReduceOp};
pub use meeting::Meeting;
pub use placement::Placement;
pub use reducer::{BucketTime, Reducer};
pub use shared_work::SharedWork;
pub use store::Store;
