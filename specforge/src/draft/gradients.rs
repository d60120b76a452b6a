//! Sums of gradients over the batches of an optimizer step, and who is told when one of them is complete.
//!
//! A backward pass finishes some gradients long before others. Over several processes, those can be summed while the rest
//! is still being computed, so a draft says of each one when nothing more will be added to it.

use tch::{Kind, Tensor};

use super::Parameter;
use crate::error::Result;

/// Is told that nothing more will be added to the gradient of an index.
pub type Listener<'a> = &'a mut dyn FnMut(usize, &Tensor) -> Result<()>;

/// One total for each parameter of a draft, in order.
pub struct Gradients<'a> {
    totals: &'a mut [Tensor],
    listener: Option<Listener<'a>>,
}

impl<'a> Gradients<'a> {
    /// Totals that a batch adds to; nobody waits for them.
    pub fn new(totals: &'a mut [Tensor]) -> Self {
        Self { totals, listener: None }
    }

    /// Totals whose last batch this is: `listener` is told of each one that is complete.
    pub fn announced(totals: &'a mut [Tensor], listener: Listener<'a>) -> Self {
        Self { totals, listener: Some(listener) }
    }

    /// Totals of zero for these parameters: float64 where a parameter is, else float32.
    pub fn zeros(parameters: &[Parameter]) -> Result<Vec<Tensor>> {
        let zeros = |Parameter { value, .. }: &Parameter| {
            let kind = if value.kind() == Kind::Double { Kind::Double } else { Kind::Float };
            Ok(Tensor::f_zeros(value.size(), (kind, value.device()))?)
        };
        parameters.iter().map(zeros).collect()
    }

    /// Number of totals.
    pub fn len(&self) -> usize {
        self.totals.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.totals.is_empty()
    }

    /// The total of a parameter.
    pub fn total(&mut self, index: usize) -> &mut Tensor {
        &mut self.totals[index]
    }

    /// Adds a gradient that is `lift` times as large as it should be. What has 16 bits is divided in the total's own type.
    pub fn add(&mut self, index: usize, gradient: &Tensor, lift: f64) -> Result<()> {
        let total = &mut self.totals[index];
        if lift == 1.0 {
            let _ = total.f_add_(gradient)?;
        } else {
            let share = Tensor::f_full([0i64; 0], lift.recip(), (total.kind(), total.device()))?;
            let _ = total.f_addcmul_(gradient, &share)?;
        }
        Ok(())
    }

    /// Says that this batch adds nothing more to the total of a parameter. What is never said is taken to be complete
    /// when the batch is.
    pub fn complete(&mut self, index: usize) -> Result<()> {
        match &mut self.listener {
            Some(listener) => listener(index, &self.totals[index]),
            None => Ok(()),
        }
    }
}
