//! A moving average of the parameters, kept beside them and put in their place while a draft is measured or saved.
//!
//! After update `t`, with the decay `d` of the configuration:
//!
//! ```text
//! a <- a + max(1 - d, 9 / (10 + t)) (p - a)
//! ```
//!
//! The second share lets the average forget where the run began while it is young; that of
//! `tf.train.ExponentialMovingAverage` with a count of updates. Updates themselves never see the average: a run without it
//! takes the same ones.

use tch::Tensor;

use super::optimizer::Optimizer;
use super::parameter::Parameter;
use crate::error::Result;

impl Optimizer<'_> {
    /// Moves the averages after an update. `taken` is 1, or 0 where the update was refused: float32 scalar on the device.
    pub(super) fn follow(&self, decay: f64, taken: &Tensor) -> Result<()> {
        let young = self.step.f_add_scalar(10.0)?.f_reciprocal()?.f_mul_scalar(9.0)?;
        let share = young.f_clamp_min(1.0 - decay)?.f_mul(taken)?;
        for Parameter { master, average, .. } in &self.parameters {
            if let Some(average) = average {
                let _ = average.shallow_clone().f_lerp_tensor_(master, &share.f_to_kind(master.kind())?)?;
            }
        }
        Ok(())
    }

    /// What a checkpoint's model holds of each parameter: the average where one is kept, in the parameter's type, and else
    /// the value. Over several ranks, every one must call this.
    pub fn saved_values(&self) -> Result<Vec<(String, Tensor)>> {
        let _no_grad = tch::no_grad_guard();
        let saved = |parameter: &Parameter| {
            let value = &parameter.slot.value;
            let saved = match &parameter.average {
                Some(average) => parameter
                    .cut
                    .gathered(average, self.group)?
                    .f_view(value.size().as_slice())?
                    .f_to_kind(value.kind())?,
                None => value.f_detach()?,
            };
            Ok((parameter.slot.name.clone(), saved))
        };
        self.parameters.iter().map(saved).collect()
    }

    /// Puts the averages in the parameters' place, or does nothing where none are kept. No step may be taken before
    /// [`Optimizer::hide_averages`]. Over several ranks, every one must call both.
    pub fn show_averages(&mut self) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        self.parameters.iter_mut().try_for_each(|parameter| parameter.swap_average(self.group))
    }

    /// Takes [`Optimizer::show_averages`] back, to the bit.
    pub fn hide_averages(&mut self) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        for parameter in &mut self.parameters {
            // A value of 16 bits is its master, rounded.
            match parameter.has_own_master() {
                true if parameter.average.is_some() => parameter.publish(self.group)?,
                true => {}
                false => parameter.swap_average(self.group)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::super::{OptimConfig, ParameterSlot};
    use super::*;
    use crate::dist::ProcessGroup;

    const DECAY: f64 = 0.6;

    fn optimizer(kind: Kind) -> Optimizer<'static> {
        let start = Tensor::from_slice(&[1.0f32, -2.0, 3.0]).to_kind(kind).set_requires_grad(true);
        let config = OptimConfig { average: Some(DECAY), ..OptimConfig::default() };
        Optimizer::new(vec![ParameterSlot::new("w", start)], &config, ProcessGroup::SINGLE, false).unwrap()
    }

    fn step(optimizer: &mut Optimizer<'_>, gradient: f64) {
        let kind = optimizer.slots().next().unwrap().master_kind();
        let gradients = [Tensor::from_slice(&[gradient, 0.5, -gradient]).to_kind(kind)];
        optimizer.step(&gradients, 0.1, None, &Tensor::from(1f32)).unwrap();
    }

    fn doubles(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.detach().to_kind(Kind::Double).flatten(0, -1)).unwrap()
    }

    fn value(optimizer: &Optimizer<'_>) -> Vec<f64> {
        doubles(&optimizer.slots().next().unwrap().value)
    }

    fn saved(optimizer: &Optimizer<'_>) -> Vec<f64> {
        doubles(&optimizer.saved_values().unwrap()[0].1)
    }

    #[test]
    fn averages_follow_the_written_out_formula_and_pass_over_refused_steps() {
        let mut optimizer = optimizer(Kind::Float);
        let mut expected = value(&optimizer);
        for update in 1..=30 {
            step(&mut optimizer, if update % 4 == 0 { -1.0 } else { 0.3 });
            let share = f64::max(1.0 - DECAY, 9.0 / (10.0 + f64::from(update)));
            expected
                .iter_mut()
                .zip(value(&optimizer))
                .for_each(|(average, value)| *average += share * (value - *average));
            for (got, expected) in saved(&optimizer).iter().zip(&expected) {
                assert!((got - expected).abs() < 1e-5, "update {update}: {got} {expected}");
            }
            assert_ne!(saved(&optimizer), value(&optimizer));
        }
        let before = saved(&optimizer);
        step(&mut optimizer, f64::NAN);
        assert_eq!(saved(&optimizer), before);
    }

    #[test]
    fn updates_never_see_the_averages_that_were_shown() {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Double] {
            let (mut shown, mut alone) = (optimizer(kind), optimizer(kind));
            for gradient in [0.1, -0.3, 0.2, 0.5, -0.1] {
                step(&mut shown, gradient);
                step(&mut alone, gradient);
                let before = value(&shown);
                shown.show_averages().unwrap();
                assert_eq!(value(&shown), saved(&alone), "{kind:?}");
                shown.hide_averages().unwrap();
                assert_eq!(value(&shown), before, "{kind:?}");
                assert_eq!(saved(&shown), saved(&alone), "{kind:?}");
            }
            assert_eq!(value(&shown), value(&alone), "{kind:?}");
        }
    }
}
