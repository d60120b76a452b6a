//! Whether parts look as they were made and not trained: matrices whose numbers have the very distribution that trainers
//! begin with, beside norms that are still one everywhere.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use super::case::Case;
use super::finding::Findings;
use crate::error::Result;

/// Deviation of the normal noise that this program and the references begin with.
const DEVIATION: f64 = 0.02;
/// A matrix of fewer numbers says too little.
const FEWEST: usize = 1024;

/// What a part of the draft looks like.
#[derive(Default)]
struct Part<'a> {
    matrices: usize,
    /// Those that look as they were made, and like what.
    fresh: Vec<(&'a str, &'static str)>,
    norms: usize,
    /// Norms that are one everywhere.
    ones: usize,
}

/// See the file's own words.
pub fn look(case: &Case<'_>, found: &mut Findings) -> Result<()> {
    let mut parts: BTreeMap<&str, Part<'_>> = BTreeMap::new();
    for (name, tensor) in case.folder.floats() {
        let part = parts.entry(name.split('.').next().unwrap_or_default()).or_default();
        match tensor.dim() {
            1 if name.contains("norm") => {
                part.norms += 1;
                part.ones += usize::from(bool::try_from(tensor.f_eq(1.0)?.f_all()?)?);
            }
            2 if tensor.numel() >= FEWEST => {
                part.matrices += 1;
                part.fresh.extend(beginning(tensor)?.map(|what| (name, what)));
            }
            _ => {}
        }
    }
    for (name, part) in parts.iter().filter(|(_, part)| !part.fresh.is_empty()) {
        let (tensor, what) = part.fresh[0];
        let text = format!(
            "`{name}`: {} of {} matrices look untrained, `{tensor}` like {what}",
            part.fresh.len(),
            part.matrices
        );
        let advice = "serve a checkpoint that was trained, and look whether its values reached the export";
        // A run of a few steps leaves matrices nearly as they were, but moves norms.
        match part.fresh.len() == part.matrices && part.ones == part.norms && part.norms > 0 {
            true => found.fault(format!("{text}; its {} norms are one everywhere", part.norms), advice),
            false => found.warning(text, advice),
        }
    }
    if found.is_sound() && !parts.is_empty() {
        found.ok("no part looks as it was made");
    }
    Ok(())
}

/// The distribution that a matrix `[out, in]` has the moments of, if it is one that trainers begin with.
fn beginning(matrix: &Tensor) -> Result<Option<&'static str>> {
    let values = matrix.f_to_kind(Kind::Double)?;
    let second = values.f_square()?.f_mean(Kind::Double)?.double_value(&[]);
    let (count, deviation) = (matrix.numel() as f64, second.sqrt());
    if !(second.is_finite() && second > 0.0) {
        return Ok(None);
    }
    let fourth = values.f_square()?.f_square()?.f_mean(Kind::Double)?.double_value(&[]);
    let shape = fourth / (second * second);
    let mean = values.f_mean(Kind::Double)?.double_value(&[]) / deviation;
    // Five deviations of each estimate from `count` numbers; rounding to 16 bits is far below.
    let near = |got: f64, want: f64, spread: f64| (got - want).abs() <= 5.0 * spread / count.sqrt() + 1e-4 * want.abs();
    if !near(mean, 0.0, 1.0) {
        return Ok(None);
    }
    let normal = near(deviation / DEVIATION, 1.0, 0.71) && near(shape, 3.0, 4.9);
    if normal {
        return Ok(Some("normal noise of deviation 0.02"));
    }
    // torch.nn.Linear: uniform up to 1 / sqrt(in).
    let bound = (matrix.size()[1] as f64).sqrt().recip();
    let uniform = near(deviation * 3f64.sqrt() / bound, 1.0, 0.45) && near(shape, 1.8, 1.3);
    Ok(uniform.then_some("uniform noise up to 1 / sqrt(inputs)"))
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::nn::noise;

    #[test]
    fn what_trainers_begin_with_is_known_and_nothing_else() {
        let fresh = noise::normal(&[96, 64], DEVIATION, 3, 1);
        let uniform = (Tensor::rand([96, 64], (Kind::Double, Device::Cpu)) * 2.0 - 1.0) / 8.0;
        assert_eq!(beginning(&fresh).unwrap(), Some("normal noise of deviation 0.02"));
        assert_eq!(beginning(&fresh.to_kind(Kind::BFloat16)).unwrap(), Some("normal noise of deviation 0.02"));
        assert_eq!(beginning(&uniform).unwrap(), Some("uniform noise up to 1 / sqrt(inputs)"));
        for trained in [&fresh * 1.2, &fresh + 0.005, fresh.abs(), &fresh * &uniform, Tensor::zeros_like(&fresh)] {
            assert_eq!(beginning(&trained).unwrap(), None);
        }
    }
}
