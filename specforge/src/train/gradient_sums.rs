//! Gradients of an optimizer step: summed over its micro-batches here, and over the ranks by whoever trains with us.

use tch::Tensor;

use crate::dist::{BucketTime, ParallelConfig, ProcessGroup, Reducer};
use crate::draft::{Gradients, Parameter};
use crate::error::Result;

/// The totals, one for each parameter, and the way to the other ranks.
#[derive(Debug)]
pub struct GradientSums<'a> {
    totals: Vec<Tensor>,
    /// `None` for a process on its own.
    reducer: Option<Reducer<'a>>,
}

impl<'a> GradientSums<'a> {
    /// Totals of zero. Every rank of the group must call this, with the same parameters.
    pub fn new(parameters: &[Parameter], group: &'a ProcessGroup, parallel: &ParallelConfig) -> Result<Self> {
        let totals = Gradients::zeros(parameters)?;
        let reducer = match group.is_distributed() {
            true => Some(Reducer::new(group, &totals, parallel.bucket_bytes())?),
            false => None,
        };
        Ok(Self { totals, reducer })
    }

    /// Before the first micro-batch of a step.
    pub fn start(&mut self) -> Result<()> {
        self.totals.iter_mut().try_for_each(|total| total.f_zero_().map(drop))?;
        self.reducer.as_mut().map_or(Ok(()), Reducer::prepare)
    }

    /// Lets a micro-batch add to the totals. What the last one of a step completes is on its way to the other ranks
    /// while the rest of it runs.
    pub fn add<T>(&mut self, is_last: bool, batch: impl FnOnce(&mut Gradients<'_>) -> Result<T>) -> Result<T> {
        match self.reducer.as_mut().filter(|_| is_last) {
            Some(reducer) => {
                let mut announce = |index: usize, gradient: &Tensor| reducer.ready(index, gradient);
                batch(&mut Gradients::announced(&mut self.totals, &mut announce))
            }
            None => batch(&mut Gradients::new(&mut self.totals)),
        }
    }

    /// After the last micro-batch, and by a rank that had none: the totals become those over all ranks.
    pub fn finish(&mut self) -> Result<()> {
        let Some(reducer) = &mut self.reducer else {
            return Ok(());
        };
        reducer.finish(&mut self.totals)
    }

    /// One for each parameter, in order.
    pub fn totals(&self) -> &[Tensor] {
        &self.totals
    }

    /// When the buckets of the last step were summed; none for a process on its own.
    pub fn bucket_times(&self) -> Result<Vec<BucketTime>> {
        self.reducer.as_ref().map_or(Ok(Vec::new()), Reducer::times)
    }
}
