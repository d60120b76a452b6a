//! The global norm of many gradients.

use tch::{Kind, Tensor};

use crate::error::Result;

/// libtorch's CPU kernel sums squares in float32; beyond a few hundred of them it loses digits (0.8 % at ten million).
const NORM_BLOCK: i64 = 512;

/// Root of the sum of all squares: scalar, float64 if a gradient is and else float32. Blocks are reduced in the gradient's
/// own type, the numbers that remain in float64.
pub fn global_norm(gradients: &[Tensor]) -> Result<Tensor> {
    let mut norms = Vec::new();
    for gradient in gradients {
        let flat = gradient.f_view(-1)?;
        let length = flat.size()[0];
        let whole = length / NORM_BLOCK * NORM_BLOCK;
        for (start, size, block) in [(0, whole, NORM_BLOCK), (whole, length - whole, length - whole)] {
            if size > 0 {
                let blocks = flat.f_narrow(0, start, size)?.f_view([-1, block])?;
                norms.push(blocks.f_norm_scalaropt_dim(2.0, [1i64], false)?);
            }
        }
    }
    let double = gradients.iter().any(|gradient| gradient.kind() == Kind::Double);
    let kind = if double { Kind::Double } else { Kind::Float };
    let squares = Tensor::f_cat(&norms, 0)?.f_to_kind(Kind::Double)?.f_square()?;
    Ok(squares.f_sum(Kind::Double)?.f_sqrt()?.f_to_kind(kind)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn the_norm_of_a_large_tensor_is_exact_enough() {
        let full = |count: i64| Tensor::full([count], 0.1, (Kind::Float, Device::Cpu));
        for count in [1, 511, 512, 513, 10_000_000] {
            let norm = global_norm(&[full(count), full(1)]).unwrap().double_value(&[]);
            assert!((norm / (((count + 1) as f64).sqrt() * 0.1) - 1.0).abs() < 1e-6, "{count} {norm}");
        }
        assert!(global_norm(&[full(0), full(1)]).unwrap().double_value(&[]) > 0.0);
    }
}
