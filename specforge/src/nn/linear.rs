//! `y = x W^T + b`.

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::shim;

/// A linear layer in PyTorch's layout.
#[derive(Debug)]
pub struct Linear {
    /// `[out, in]`
    pub weight: Tensor,
    /// `[out]`
    pub bias: Option<Tensor>,
}

impl Linear {
    /// `[.., in]` to `[.., out]`.
    pub fn forward(&self, input: &Tensor) -> Tensor {
        linear(input, &self.weight, self.bias.as_ref())
    }
}

/// `input [.., in]` times the transpose of `weight [out, in]`, plus `bias [out]`.
///
/// Where nothing asks for a gradient, float32 rows on the CPU are multiplied by oneDNN, but for the few of a round of decoding,
/// which have a kernel of their own (`csrc/few_rows.cpp`); everything else is libtorch's `linear`.
pub fn linear(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let plain =
        |tensor: &Tensor| tensor.device() == Device::Cpu && tensor.kind() == Kind::Float && !tensor.requires_grad();
    let [_, width] = <[i64; 2]>::try_from(weight.size()).unwrap_or([0, 1]);
    let rows = input.numel() as i64 / width.max(1);
    if rows < 1 || !(plain(input) && plain(weight) && bias.is_none_or(plain)) {
        return input.linear(weight, bias);
    }
    if rows <= 32 && weight.is_contiguous() && shim::few_rows_pay() {
        let product = made(shim::few_rows_linear(&input.contiguous(), weight));
        return match bias {
            Some(bias) => product + bias,
            None => product,
        };
    }
    made(shim::onednn_linear(input, weight, bias))
}

/// The product. Shapes that do not fit are a mistake in the program, as everywhere in libtorch's own operators.
fn made(product: Result<Tensor>) -> Tensor {
    product.unwrap_or_else(|error| panic!("linear: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(shape: &[i64], kind: Kind) -> Tensor {
        Tensor::randn(shape, (kind, Device::Cpu))
    }

    #[test]
    fn every_path_equals_the_product_written_out() {
        tch::manual_seed(3);
        for kind in [Kind::Float, Kind::Double] {
            for shape in [vec![5], vec![1, 5], vec![7, 5], vec![2, 3, 5], vec![0, 5]] {
                let (input, weight, bias) = (random(&shape, kind), random(&[4, 5], kind), random(&[4], kind));
                let product = input.matmul(&weight.transpose(0, 1));
                for (bias, want) in [(None, product.shallow_clone()), (Some(&bias), &product + &bias)] {
                    let got = linear(&input, &weight, bias);
                    assert_eq!(got.size(), want.size());
                    assert!(got.allclose(&want, 1e-5, 1e-5, false), "{shape:?} {kind:?}");
                }
            }
        }
    }

    #[test]
    fn the_few_rows_of_a_tree_equal_the_product_in_double() {
        tch::manual_seed(5);
        for rows in [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33] {
            for (out, width) in [(24, 576), (7, 33), (9, 1), (300, 130), (13, 200)] {
                let (input, weight) = (random(&[1, rows, width], Kind::Float), random(&[out, width], Kind::Float));
                let bias = random(&[out], Kind::Float);
                let want =
                    input.to_kind(Kind::Double).linear(&weight.to_kind(Kind::Double), Some(bias.to_kind(Kind::Double)));
                let got = linear(&input, &weight, Some(&bias)).to_kind(Kind::Double);
                assert_eq!(got.size(), [1, rows, out]);
                assert!(got.allclose(&want, 1e-5, 2e-5, false), "{rows} rows, {out} x {width}");
            }
        }
    }

    #[test]
    fn strided_inputs_and_weights_are_understood() {
        tch::manual_seed(4);
        let input = random(&[6, 10], Kind::Float).narrow(1, 2, 5);
        let weight = random(&[5, 8], Kind::Float).transpose(0, 1).narrow(0, 1, 4);
        let want = input.contiguous().matmul(&weight.contiguous().transpose(0, 1));
        assert!(linear(&input, &weight, None).allclose(&want, 1e-5, 1e-5, false));
    }

    #[test]
    fn a_gradient_that_is_asked_for_is_computed() {
        let input = random(&[3, 5], Kind::Float);
        let weight = random(&[4, 5], Kind::Float).set_requires_grad(true);
        linear(&input, &weight, None).sum(Kind::Float).backward();
        let want = input.sum_dim_intlist([0].as_slice(), false, Kind::Float).expand([4, 5], false);
        assert!(weight.grad().allclose(&want, 1e-5, 1e-5, false));
    }

    #[test]
    #[should_panic(expected = "linear")]
    fn shapes_that_do_not_fit_are_named() {
        let _ = linear(&random(&[3, 6], Kind::Float), &random(&[4, 5], Kind::Float), None);
    }
}
