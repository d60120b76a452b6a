//! Gradients summed over the ranks in buckets, while later ones are still being computed: `c10d::Reducer`, the engine of
//! DistributedDataParallel.
//!
//! Li et al. 2020, <https://arxiv.org/abs/2006.15704>. Whoever computes gradients announces each one as soon as nothing
//! more will be added to it. A bucket whose gradients are all announced is handed to the process group and summed by
//! other threads; the last announcement returns when every bucket is back. Gradients live in their buckets, so reducing
//! costs no second copy of them.

use tch::Tensor;

use super::c10d::{self, CBucketTime, CReducer};
use super::group::{ProcessGroup, failed};
use crate::error::{Error, Result};
use crate::shim::{checked, made};

/// When one bucket of gradients was summed; times are nanoseconds of one steady clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BucketTime {
    /// Size of the bucket.
    pub bytes: i64,
    /// When its last gradient was announced and it was handed to the process group.
    pub launched: i64,
    /// When the sum was there.
    pub finished: i64,
}

/// Sums one list of gradients again and again.
#[derive(Debug)]
pub struct Reducer<'a> {
    raw: *mut CReducer,
    group: &'a ProcessGroup,
    /// Which gradients of the step have been announced.
    announced: Vec<bool>,
}

impl Drop for Reducer<'_> {
    fn drop(&mut self) {
        // SAFETY: made by the shim, and freed once.
        unsafe { c10d::specforge_reducer_free(self.raw) }
    }
}

impl<'a> Reducer<'a> {
    /// A reducer for gradients that look like `gradients`, the same on every rank. Buckets hold about `bucket_bytes`.
    /// The group must be distributed.
    pub fn new(group: &'a ProcessGroup, gradients: &[Tensor], bucket_bytes: usize) -> Result<Self> {
        if !group.is_distributed() {
            return Err(Error::Failed("a reducer needs a process group".to_owned()));
        }
        let pointers: Vec<_> = gradients.iter().map(|tensor| tensor.as_ptr()).collect();
        let mut raw = std::ptr::null_mut();
        // SAFETY: a live group and live tensors; the place outlives the call.
        checked(|error, size| unsafe {
            let (count, bytes) = (pointers.len() as i64, bucket_bytes as i64);
            c10d::specforge_reducer_new(group.raw(), pointers.as_ptr(), count, bytes, &raw mut raw, error, size)
        })
        .map_err(|error| failed(group.rank(), "making the reducer", &error))?;
        Ok(Self { raw, group, announced: vec![true; gradients.len()] })
    }

    /// Before the pass in which the gradients of a step become complete.
    pub fn prepare(&mut self) -> Result<()> {
        self.announced.fill(false);
        // SAFETY: a live reducer.
        checked(|error, size| unsafe { c10d::specforge_reducer_prepare(self.raw, error, size) })
            .map_err(|error| failed(self.group.rank(), "reducing gradients", &error))
    }

    /// Nothing more will be added to gradient `index`. Announcing one twice does nothing.
    pub fn ready(&mut self, index: usize, gradient: &Tensor) -> Result<()> {
        if std::mem::replace(&mut self.announced[index], true) {
            return Ok(());
        }
        // SAFETY: a live reducer and a live tensor; the index is below the number of gradients.
        checked(|error, size| unsafe {
            c10d::specforge_reducer_ready(self.raw, index as i64, gradient.as_ptr(), error, size)
        })
        .map_err(|error| failed(self.group.rank(), "reducing gradients", &error))
    }

    /// Announces every gradient that was not, waits for the sums, and puts them into `gradients`: from now on these are
    /// places in the buckets.
    pub fn finish(&mut self, gradients: &mut [Tensor]) -> Result<()> {
        for (index, gradient) in gradients.iter().enumerate() {
            self.ready(index, gradient)?;
        }
        for (index, gradient) in gradients.iter_mut().enumerate() {
            // SAFETY: a live reducer whose gradients are all there.
            *gradient = made(|output, error, size| unsafe {
                c10d::specforge_reducer_gradient(self.raw, index as i64, output, error, size)
            })?;
        }
        Ok(())
    }

    /// Times of the buckets of the last step, in the order in which they were handed over.
    pub fn times(&self) -> Result<Vec<BucketTime>> {
        let mut times = vec![CBucketTime::default(); self.announced.len()];
        let mut count = 0;
        // SAFETY: a live reducer; there are at most as many buckets as gradients.
        checked(|error, size| unsafe {
            let capacity = times.len() as i64;
            c10d::specforge_reducer_times(self.raw, times.as_mut_ptr(), capacity, &raw mut count, error, size)
        })?;
        times.truncate(count as usize);
        let time =
            |time: CBucketTime| BucketTime { bytes: time.bytes, launched: time.launched, finished: time.finished };
        Ok(times.into_iter().map(time).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use tch::{Device, Kind};

    use super::super::group::tests::on_ranks;
    use super::*;

    /// Gradient `index` of a rank at a step.
    fn gradient(rank: usize, step: usize, index: usize) -> Tensor {
        let start = (100 * step + 10 * rank + index) as f64;
        Tensor::arange_start(start, start + 1000.0, (Kind::Double, Device::Cpu))
    }

    /// Sums are those over the ranks in every step, whatever the order of announcement, and the same bits on all ranks.
    #[test]
    fn gradients_are_sums_over_the_ranks() {
        for world_size in [1, 2, 4] {
            let all = on_ranks(world_size, |group| {
                let mut gradients: Vec<Tensor> = (0..5).map(|index| gradient(0, 0, index).zeros_like()).collect();
                let mut reducer = Reducer::new(group, &gradients, 16_000).unwrap();
                let mut kept = Vec::new();
                for step in 0..4 {
                    for (index, total) in gradients.iter_mut().enumerate() {
                        let _ = total.zero_();
                        *total += gradient(group.rank(), step, index);
                    }
                    reducer.prepare().unwrap();
                    for index in [3, 1] {
                        reducer.ready(index, &gradients[index]).unwrap();
                    }
                    reducer.finish(&mut gradients).unwrap();
                    let buckets: Vec<i64> = reducer.times().unwrap().iter().map(|time| time.bytes).collect();
                    assert_eq!(buckets.iter().sum::<i64>(), 5 * 8000);
                    kept.push(
                        gradients.iter().map(|gradient| Vec::<f64>::try_from(gradient).unwrap()).collect::<Vec<_>>(),
                    );
                }
                kept
            });
            for (step, of_rank) in all[0].iter().enumerate() {
                for (index, sum) in of_rank.iter().enumerate() {
                    let want: Tensor = (0..world_size).map(|rank| gradient(rank, step, index)).sum();
                    assert_eq!(
                        sum,
                        &Vec::<f64>::try_from(want).unwrap(),
                        "step {step} gradient {index} of {world_size}"
                    );
                }
            }
            assert!(all.iter().all(|rank| *rank == all[0]));
        }
    }

    /// A bucket is back before the last gradient is even announced. How long its sum takes is the machine's affair, so the
    /// rest of the backward pass takes longer and longer; a sum that waits for the end is never there before.
    #[test]
    fn a_bucket_is_summed_while_later_gradients_are_computed() {
        let overlaps = |rest: u64| {
            let all = times_of_two_ranks(Duration::from_millis(rest));
            assert!(all.iter().all(|times| times.len() == 3));
            all.iter().all(|times| times[0].launched < times[0].finished && times[0].finished < times[1].launched)
        };
        assert!([200, 1000, 5000, 20_000].into_iter().any(overlaps));
    }

    /// When the buckets of each rank were sent and were back, with so much work behind the first gradient.
    fn times_of_two_ranks(rest: Duration) -> Vec<Vec<BucketTime>> {
        on_ranks(2, |group| {
            let mut gradients: Vec<Tensor> = (0..3).map(|index| gradient(group.rank(), 0, index)).collect();
            let mut reducer = Reducer::new(group, &gradients, 8000).unwrap();
            for _ in 0..2 {
                reducer.prepare().unwrap();
                reducer.ready(0, &gradients[0]).unwrap();
                thread::sleep(rest);
                reducer.finish(&mut gradients).unwrap();
            }
            reducer.times().unwrap()
        })
    }
}
