//! Muon for matrices (Jordan et al. 2024, <https://kellerjordan.github.io/posts/muon/>), scaled so that AdamW's learning rate
//! and weight decay fit it (Liu et al. 2025, <https://arxiv.org/abs/2502.16982>).
//!
//! For a matrix `p [m, n]` with gradient `g`, clipped as AdamW's are, at learning rate `l`:
//!
//! ```text
//! v <- u v + (1 - u) g             d <- (1 - u) g + u v            u: the momentum
//! x <- d / |d|,  and as often as `iterations` says  x <- a x + (b (x x^T) + c (x x^T)^2) x
//! p <- p - l wd p                  p <- p - l 0.2 sqrt(max(m, n)) x
//! ```
//!
//! The iteration brings all singular values of `x` near 1. It is computed in float32 on a CPU and in bfloat16 on a GPU, as
//! everywhere. An update takes `iterations (4 m n min(m, n) + 2 min(m, n)^3)` operations, whatever the batch.
//!
//! Over several ranks, each matrix belongs to one of them, which keeps its state, computes its update and hands out the new
//! values: products of matrices need not round alike on two machines.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::parameter::Parameter;
use super::pattern;
use crate::error::{Error, Result};
use crate::nn;

/// Of a quintic that lifts small singular values fast and stays near 1: Jordan's.
const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];
/// Root mean square of an update's numbers, about that of AdamW's.
const UPDATE_SIZE: f64 = 0.2;

/// Which matrices Muon updates, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MuonConfig {
    /// Names of the matrices; `*` stands for anything. All else is updated by AdamW.
    pub parameters: Vec<String>,
    /// How much of the gradients before stays.
    pub momentum: f64,
    /// Newton-Schulz iterations.
    pub iterations: u32,
}

impl Default for MuonConfig {
    fn default() -> Self {
        // Projections of layers and of features. Embeddings and heads, whose rows are tokens, are AdamW's.
        let parameters = ["*_proj.weight", "fc.weight", "*.linear.weight"].map(str::to_owned).to_vec();
        Self { parameters, momentum: 0.95, iterations: 5 }
    }
}

impl MuonConfig {
    pub(super) fn validate(&self) -> Result<()> {
        if !(0.0..1.0).contains(&self.momentum) {
            let problem = format!("expected a number from 0 to below 1, got {}", self.momentum);
            return Err(Error::config("optim.muon.momentum", problem));
        }
        if !(1..=20).contains(&self.iterations) {
            let problem = format!("expected a number from 1 to 20, got {}", self.iterations);
            return Err(Error::config("optim.muon.iterations", problem));
        }
        Ok(())
    }

    /// Whether the parameter of this name and shape is updated by Muon.
    pub(super) fn has(&self, name: &str, shape: &[i64]) -> bool {
        shape.len() == 2 && self.parameters.iter().any(|pattern| pattern::names(pattern, name))
    }
}

impl Parameter {
    /// One update of a matrix that is here as a whole. `gradient` has the master's type; `refused` is true where nothing may
    /// change: scalar on the device.
    pub(super) fn step_muon(
        &mut self,
        config: &MuonConfig,
        gradient: &Tensor,
        (learning_rate, weight_decay): (f64, f64),
        refused: &Tensor,
    ) -> Result<()> {
        let shape = self.slot.value.size();
        let momentum = self.first_moment.f_lerp(gradient, 1.0 - config.momentum)?;
        let direction = gradient.f_lerp(&momentum, config.momentum)?;
        let direction = orthogonal(&direction.f_view(shape.as_slice())?, config.iterations)?;
        let longest = shape.iter().copied().max().unwrap_or(1) as f64;
        let decayed = self.master.f_mul_scalar(1.0 - learning_rate * weight_decay)?;
        let step = direction.f_mul_scalar(learning_rate * UPDATE_SIZE * longest.sqrt())?;
        let updated = decayed.f_sub(&step.f_view(decayed.size().as_slice())?)?;
        for (old, new) in [(&mut self.first_moment, momentum), (&mut self.master, updated)] {
            old.f_copy_(&old.f_where_self(refused, &new)?)?;
        }
        Ok(())
    }
}

/// The matrix `[m, n]` with singular values near 1 in place of its own, in its type.
fn orthogonal(matrix: &Tensor, iterations: u32) -> Result<Tensor> {
    let [a, b, c] = COEFFICIENTS;
    let is_tall = matrix.size()[0] > matrix.size()[1];
    let kind = match (matrix.kind(), matrix.device().is_cuda()) {
        (Kind::Float, true) => Kind::BFloat16,
        (kind, _) => kind,
    };
    let norm = matrix.f_norm()?.f_add_scalar(1e-7)?;
    let mut wide = if is_tall { matrix.f_tr()? } else { matrix.shallow_clone() };
    wide = wide.f_div(&norm)?.f_to_kind(kind)?.f_contiguous()?; // [k, l], k <= l
    for _ in 0..iterations {
        let gram = nn::linear(&wide, &wide, None); // [k, k], symmetric
        let polynomial = gram.f_mul_scalar(b)? + nn::linear(&gram, &gram, None).f_mul_scalar(c)?;
        let columns = wide.f_tr()?.f_contiguous()?; // [l, k]
        wide = wide.f_mul_scalar(a)? + nn::linear(&polynomial, &columns, None);
    }
    let turned = if is_tall { wide.f_tr()? } else { wide };
    Ok(turned.f_contiguous()?.f_to_kind(matrix.kind())?)
}

#[cfg(test)]
mod tests {
    use super::super::{OptimConfig, Optimizer, ParameterSlot};
    use super::*;
    use crate::dist::ProcessGroup;
    use crate::nn::noise;

    #[test]
    fn singular_values_come_near_one() {
        for shape in [[24, 24], [16, 40], [40, 16], [1, 8]] {
            let matrix = noise::normal(&shape, 3.0, 1, 0);
            let turned = orthogonal(&matrix, 5).unwrap();
            assert_eq!(turned.size(), shape);
            let (before_u, _, before_v) = matrix.svd(true, true);
            let (_, values, _) = turned.svd(true, true);
            let all: Vec<f64> = Vec::try_from(values.to_kind(Kind::Double)).unwrap();
            // Where the quintic of Jordan leaves them.
            assert!(all.iter().all(|value| (0.5..1.3).contains(value)), "{shape:?} {all:?}");
            // Left and right singular vectors stay: in their base, what came out is diagonal.
            let diagonal = before_u.tr().matmul(&turned).matmul(&before_v);
            let off = &diagonal - diagonal.diagonal(0, 0, 1).diag(0);
            assert!(off.abs().max().double_value(&[]) < 1e-3, "{shape:?}");
        }
    }

    fn value(optimizer: &Optimizer<'_>, index: usize) -> Tensor {
        optimizer.slots().nth(index).unwrap().value.detach().copy()
    }

    /// A matrix by the written-out formula, in float64; beside it a head, a bias and a matrix of another name by AdamW.
    #[test]
    fn steps_are_those_of_the_formula_and_other_parameters_are_adamw_s() {
        let shapes: [(&str, &[i64]); 4] =
            [("q_proj.weight", &[6, 9]), ("lm_head.weight", &[12, 6]), ("q_proj.bias", &[6]), ("mix", &[4, 4])];
        let slots = |config: &OptimConfig| {
            let parameter = |(index, (name, shape)): (usize, &(&str, &[i64]))| {
                crate::draft::Parameter::new(*name, noise::normal(shape, 1.0, 2, index as u64).to_kind(Kind::Double))
            };
            config.slots(&shapes.iter().enumerate().map(parameter).collect::<Vec<_>>()).unwrap()
        };
        let plain = OptimConfig { weight_decay: 0.1, ..OptimConfig::default() };
        let config = OptimConfig { muon: Some(MuonConfig::default()), ..plain.clone() };
        let new = |config: &OptimConfig| Optimizer::new(slots(config), config, ProcessGroup::SINGLE, false).unwrap();
        let (mut optimizer, mut adamw) = (new(&config), new(&plain));
        let (mut expected, mut momentum) =
            (value(&optimizer, 0), Tensor::zeros([6, 9], (Kind::Double, tch::Device::Cpu)));
        let loss = Tensor::from(1f32);
        for step in 0..6 {
            let gradients = || -> Vec<Tensor> {
                let gradient = |(index, (_, shape)): (usize, &(&str, &[i64]))| {
                    noise::normal(shape, 1.0, 50 + step, index as u64).to_kind(Kind::Double)
                };
                shapes.iter().enumerate().map(gradient).collect()
            };
            let rate = 0.1 / (step + 1) as f64;
            optimizer.step(&gradients(), rate, None, &loss).unwrap();
            adamw.step(&gradients(), rate, None, &loss).unwrap();
            let gradient = gradients().swap_remove(0);
            momentum = momentum * 0.95 + &gradient * 0.05;
            let mut x = &gradient * 0.05 + &momentum * 0.95;
            x = &x / x.norm();
            for _ in 0..5 {
                let gram = x.matmul(&x.tr());
                x = &x * 3.4445 + (&gram * -4.7750 + gram.matmul(&gram) * 2.0315).matmul(&x);
            }
            expected = &expected - &expected * (rate * 0.1) - x * (rate * 0.2 * 3.0);
            let off = (value(&optimizer, 0) - &expected).abs().max().double_value(&[]);
            assert!(off < 1e-6, "step {step}: {off}");
        }
        assert!((1..4).all(|index| value(&optimizer, index) == value(&adamw, index)));
        let before = value(&optimizer, 0);
        let nan: Vec<Tensor> =
            shapes.iter().map(|(_, shape)| Tensor::full(*shape, f64::NAN, (Kind::Double, tch::Device::Cpu))).collect();
        optimizer.step(&nan, 0.1, Some(1.0), &loss).unwrap();
        assert_eq!(value(&optimizer, 0), before);
        let names: Vec<String> = optimizer.state().unwrap().into_iter().map(|(name, _)| name).collect();
        assert!(names.contains(&"first_moment.q_proj.weight".to_owned()));
        assert!(!names.contains(&"second_moment.q_proj.weight".to_owned()));
    }

    #[test]
    fn patterns_that_name_no_matrix_are_refused() {
        let head = [crate::draft::Parameter::new("lm_head.weight", noise::normal(&[4, 4], 1.0, 1, 1))];
        let config = OptimConfig { muon: Some(MuonConfig::default()), ..OptimConfig::default() };
        let error = config.slots(&head).unwrap_err();
        assert!(error.to_string().contains("`optim.muon.parameters`"), "{error}");
        assert!(error.hint().unwrap().contains("lm_head.weight"));
        let slot = ParameterSlot::new("lm_head.weight", noise::normal(&[4, 4], 1.0, 1, 1));
        assert!(!slot.muon);
    }
}
