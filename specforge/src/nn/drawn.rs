//! Numbers of tests that draw the same ones twice.
//!
//! libtorch has one generator for all threads, and the tests of a process run side by side: between a seed and the draws
//! that follow it another test may draw or seed. A stream of one's own is nobody else's.

use std::cell::{Cell, RefCell};

use tch::{Device, Kind, Tensor};

use super::noise;

/// A stream of numbers from a seed. Equal seeds give equal draws in the same order, whatever else runs.
pub struct Drawn {
    seed: u64,
    draws: Cell<u64>,
}

impl Drawn {
    /// A stream of its own.
    pub fn of(seed: u64) -> Self {
        Self { seed, draws: Cell::new(0) }
    }

    /// Normal numbers in float64.
    pub fn normal(&self, shape: &[i64]) -> Tensor {
        self.draws.set(self.draws.get() + 1);
        noise::normal(shape, 1.0, self.seed, self.draws.get()).to_kind(Kind::Double)
    }

    /// Whole numbers from 0 up to a bound.
    pub fn below(&self, bound: i64, shape: &[i64]) -> Tensor {
        (self.normal(shape).abs() * 1e6).to_kind(Kind::Int64).remainder(bound)
    }
}

thread_local! {
    /// The stream of a test, which has a thread of its own.
    static STREAM: RefCell<Drawn> = RefCell::new(Drawn::of(0));
}

/// Begins the stream of the thread anew.
pub fn seed(seed: u64) {
    STREAM.set(Drawn::of(seed));
}

/// The next normal numbers of the thread's stream.
pub fn randn(shape: impl AsRef<[i64]>, (kind, device): (Kind, Device)) -> Tensor {
    STREAM.with_borrow(|stream| stream.normal(shape.as_ref())).to_kind(kind).to_device(device)
}
