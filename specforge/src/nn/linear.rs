//! `y = x W^T + b`.

use std::ffi::{c_char, c_int};

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

unsafe extern "C" {
    fn specforge_onednn_linear(
        input: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        output: *mut *mut C_tensor,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
}

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
/// Where nothing asks for a gradient, several float32 rows on the CPU are multiplied by oneDNN; everything else is
/// libtorch's `linear`. A single row is bound by memory, and there MKL's kernel is the better one.
pub fn linear(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let plain =
        |tensor: &Tensor| tensor.device() == Device::Cpu && tensor.kind() == Kind::Float && !tensor.requires_grad();
    let several_rows = input.numel() as i64 > weight.size()[1];
    if several_rows && plain(input) && plain(weight) && bias.is_none_or(plain) {
        onednn_linear(input, weight, bias)
    } else {
        input.linear(weight, bias)
    }
}

fn onednn_linear(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let mut output = std::ptr::null_mut();
    let mut error = [0u8; 1024];
    let bias = bias.map_or(std::ptr::null(), |bias| bias.as_ptr());
    // SAFETY: the tensors outlive the call, and `error` is as long as it says.
    let status = unsafe {
        let (text, size) = (error.as_mut_ptr().cast(), error.len());
        specforge_onednn_linear(input.as_ptr(), weight.as_ptr(), bias, &mut output, text, size)
    };
    if status != 0 {
        let text = error.split(|&byte| byte == 0).next().unwrap_or_default();
        // Shapes that do not fit are a mistake in the program, as everywhere in libtorch's own operators.
        panic!("oneDNN: {}", String::from_utf8_lossy(text));
    }
    // SAFETY: the shim made this tensor and handed it over.
    unsafe { Tensor::from_ptr(output) }
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
    #[should_panic(expected = "oneDNN")]
    fn shapes_that_do_not_fit_are_named() {
        let _ = linear(&random(&[3, 6], Kind::Float), &random(&[4, 5], Kind::Float), None);
    }
}
