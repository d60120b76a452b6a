//! How much of a gradient is chance: the gradient noise scale, in tokens.
//!
//! McCandlish et al. 2018, <https://arxiv.org/abs/1812.06162>, appendix A.1. From the gradient of `b` tokens, those of a
//! rank's first micro-batch, and that of all `B` tokens of a step:
//!
//! ```text
//! |G|^2 ~ (B |G_B|^2 - b |G_b|^2) / (B - b)        S ~ (|G_b|^2 - |G_B|^2) / (1 / b - 1 / B)
//! ```
//!
//! Either is right on average alone, so both are averaged over the steps between two log lines before `S / |G|^2` is taken.
//! A batch of that many tokens is as much signal as noise: well below it, twice the tokens of an update take nearly half the
//! updates; well above it, they take no fewer.

use tch::{Device, Kind, Tensor};

use crate::dist::{ProcessGroup, ReduceOp};
use crate::error::Result;
use crate::optim::{StepReport, global_norm};

/// The gradient of a step's first micro-batch on this rank.
#[derive(Debug)]
pub(super) struct FirstGradient {
    /// Norm, as if it were the whole step's: scalar on the device.
    norm: Tensor,
    tokens: f64,
}

impl FirstGradient {
    /// `sums` hold the micro-batch's gradients alone, divided by the counts of each loss term over the whole step.
    pub(super) fn new(sums: &[Tensor], (own, whole): (&[f64], &[f64]), tokens: u64) -> Result<Option<Self>> {
        let shares: Vec<f64> =
            own.iter().zip(whole).filter(|(_, whole)| **whole > 0.0).map(|(own, whole)| own / whole).collect();
        let share = shares.iter().sum::<f64>() / shares.len().max(1) as f64;
        if share <= 0.0 {
            return Ok(None); // nothing in it is trained on
        }
        Ok(Some(Self { norm: global_norm(sums)?.f_div_scalar(share)?, tokens: tokens as f64 }))
    }
}

/// Sums of both estimates over steps.
#[derive(Debug, Default)]
pub(super) struct GradientNoise {
    /// `[2]` float64 on the device: `|G|^2` and `S`.
    sums: Option<Tensor>,
}

impl GradientNoise {
    /// Adds a step of so many tokens; one that changed nothing adds nothing.
    pub(super) fn add(&mut self, first: &FirstGradient, tokens: u64, report: &StepReport) -> Result<()> {
        let (small, large) = (first.tokens, tokens as f64);
        if small >= large {
            return Ok(());
        }
        let square = |norm: &Tensor| norm.f_to_kind(Kind::Double)?.f_square();
        let (of_small, of_large) = (square(&first.norm)?, square(&report.gradient_norm)?);
        let signal = (&of_large * large - &of_small * small) / (large - small);
        let noise = (of_small - of_large) / (1.0 / small - 1.0 / large);
        let new = Tensor::f_stack(&[signal, noise], 0)?.f_masked_fill(&report.refused.f_to_kind(Kind::Bool)?, 0.0)?;
        self.sums = Some(match self.sums.take() {
            Some(sums) => sums + new,
            None => new,
        });
        Ok(())
    }

    /// The sums as a checkpoint keeps them; none where no step was added.
    pub(super) fn state(&self) -> Result<Vec<f64>> {
        self.sums.as_ref().map_or(Ok(Vec::new()), |sums| Ok(Vec::try_from(sums.f_to_device(Device::Cpu)?)?))
    }

    /// As it was when one or more ranks kept these states.
    pub(super) fn restore(states: &[&[f64]], device: Device) -> Result<Self> {
        let states = states.iter().filter(|state| state.len() == 2);
        let sums = states.fold([0.0; 2], |sums, state| [sums[0] + state[0], sums[1] + state[1]]);
        let sums = (sums != [0.0; 2]).then(|| Tensor::from_slice(&sums).f_to_device(device)).transpose()?;
        Ok(Self { sums })
    }

    /// The noise scale in tokens over all ranks, and a new start. `None` where the steps were too few or too noisy to tell.
    /// Every rank must call this.
    pub(super) fn take(&mut self, device: Device, group: &ProcessGroup) -> Result<Option<f64>> {
        let sums = self.sums.take().map_or_else(|| Tensor::f_zeros([2], (Kind::Double, device)), Ok)?;
        group.all_reduce(&sums, ReduceOp::Sum)?;
        let sums = Vec::<f64>::try_from(sums.f_to_device(Device::Cpu)?)?;
        let scale = sums[1] / sums[0];
        Ok((sums[0] > 0.0 && scale.is_finite() && scale > 0.0).then_some(scale))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::noise;

    /// Gradients of tokens are a vector of 1000 numbers and noise around each of them: what is drawn comes back.
    #[test]
    fn the_noise_of_drawn_gradients_comes_back() {
        let (dimensions, small, large) = (1000, 4, 64);
        let signal = noise::normal(&[dimensions], 0.05, 7, 0);
        let deviation = 0.4;
        let mut measured = GradientNoise::default();
        for step in 0..50 {
            let tokens = noise::normal(&[large, dimensions], deviation, 8, step) + &signal; // [B, D]
            let all = tokens.mean_dim([0i64].as_slice(), false, Kind::Float);
            // The first micro-batch's rows alone, divided by the count of all.
            let first =
                tokens.narrow(0, 0, small).sum_dim_intlist([0i64].as_slice(), false, Kind::Float) / large as f64;
            let shares: (&[f64], &[f64]) = (&[small as f64], &[large as f64]);
            let first = FirstGradient::new(&[first], shares, small as u64).unwrap().unwrap();
            let report = |refused: f64| StepReport {
                gradient_norm: global_norm(&[all.shallow_clone()]).unwrap(),
                refused: Tensor::from(refused as f32),
            };
            measured.add(&first, large as u64, &report(0.0)).unwrap();
            measured.add(&first, large as u64, &report(1.0)).unwrap(); // adds nothing
        }
        let device = signal.device();
        let kept = measured.state().unwrap();
        let halves = [kept[0] / 2.0, kept[1] / 2.0];
        let mut restored = GradientNoise::restore(&[&halves, &halves, &[]], device).unwrap();
        let expected = dimensions as f64 * deviation * deviation / signal.square().sum(Kind::Double).double_value(&[]);
        let got = measured.take(device, ProcessGroup::SINGLE).unwrap().unwrap();
        assert!((got / expected - 1.0).abs() < 0.05, "{got} {expected}");
        assert_eq!(restored.take(device, ProcessGroup::SINGLE).unwrap(), Some(got));
        assert_eq!(measured.take(device, ProcessGroup::SINGLE).unwrap(), None);
    }

    #[test]
    fn a_micro_batch_without_a_trained_row_says_nothing() {
        let sums = [Tensor::from_slice(&[1f32, 2.0])];
        assert!(FirstGradient::new(&sums, (&[0.0, 0.0], &[3.0, 0.0]), 5).unwrap().is_none());
        assert!(FirstGradient::new(&sums, (&[1.0, 0.0], &[3.0, 0.0]), 5).unwrap().is_some());
    }
}
