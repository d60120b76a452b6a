//! Root mean square normalisation (Zhang and Sennrich 2019, <https://arxiv.org/abs/1910.07467>).

use tch::{Kind, Tensor};

use crate::shim;

/// `x / sqrt(mean(x^2) + epsilon) * weight`, the mean in float32, as Hugging Face's Llama computes it.
///
/// Llama rounds to the element type of its input before it multiplies with the weight; Gemma, OLMo and gpt-oss round after
/// it. Weights of float32 beside narrower inputs say the latter.
#[derive(Debug)]
pub struct RmsNorm {
    /// `[H]`, in the element type of the inputs or in float32.
    pub weight: Tensor,
    /// Added to the mean of squares.
    pub epsilon: f64,
}

impl RmsNorm {
    /// `[.., H]` to `[.., H]`, in the element type of `input`.
    ///
    /// One kernel each way: on a GPU libtorch's, which keeps its sums in float32 too and rounds once, in float32 on the CPU
    /// our own (`csrc/layer_parts.cpp`). The six operators below would carry every row through memory five times.
    pub fn forward(&self, input: &Tensor) -> Tensor {
        let kind = input.kind();
        let rounds_last = self.weight.kind() == Kind::Float && kind != Kind::Float && kind != Kind::Double;
        if input.device().is_cuda() && (rounds_last || kind == self.weight.kind()) && kind != Kind::Double {
            let input = if rounds_last { input.to_kind(Kind::Float) } else { input.shallow_clone() };
            let (normed, _) =
                input.internal_fused_rms_norm(self.weight.size().as_slice(), Some(&self.weight), self.epsilon);
            return normed.to_kind(kind);
        }
        if let Some(normed) = shim::normed_rows(input, Some((&self.weight, self.epsilon)), None) {
            return normed;
        }
        // float64 stays float64: exact tests run there.
        let wide = if kind == Kind::Double { input.shallow_clone() } else { input.to_kind(Kind::Float) };
        let mean_of_squares = wide.square().mean_dim(-1, true, wide.kind()); // [.., 1]
        let normed = (mean_of_squares + self.epsilon).rsqrt_() * wide; // [.., H]
        match rounds_last {
            true => (normed * &self.weight).to_kind(kind),
            false => normed.to_kind(kind) * &self.weight,
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::nn::drawn::Drawn;

    #[test]
    fn equals_the_formula_and_keeps_the_element_type() {
        let rows = [[3.0, -4.0, 0.0, 1.0], [1e-3, 2e-3, -1e-3, 0.0]];
        let weight = [1.0, 0.5, 2.0, -1.0];
        let want = rows.map(|row| {
            let scale = (row.iter().map(|value: &f64| value * value).sum::<f64>() / 4.0 + 1e-5).sqrt();
            [0, 1, 2, 3].map(|index| row[index] / scale * weight[index])
        });
        for (kind, tolerance) in [(Kind::Double, 1e-15), (Kind::Float, 1e-6), (Kind::BFloat16, 2e-2)] {
            let norm = RmsNorm { weight: Tensor::from_slice(&weight).to_kind(kind), epsilon: 1e-5 };
            let got = norm.forward(&Tensor::from_slice2(&rows).to_kind(kind));
            assert_eq!((got.kind(), got.device()), (kind, Device::Cpu));
            assert!(
                (got.to_kind(Kind::Double) - Tensor::from_slice2(&want)).abs().max().double_value(&[]) <= tolerance
            );
        }
    }

    /// One kernel for float32, operators for float64.
    #[test]
    fn gradients_equal_those_of_the_operators() {
        let drawn = Drawn::of(12);
        for (rows, width) in [(1, 1), (3, 7), (200, 40), (2, 5000)] {
            let [input, weight, slope] =
                [vec![rows, 2, width], vec![width], vec![rows, 2, width]].map(|shape| drawn.normal(&shape));
            let [want, got] = [Kind::Double, Kind::Float].map(|kind| {
                let [input, weight] =
                    [&input, &weight].map(|tensor| tensor.to_kind(kind).copy().set_requires_grad(true));
                let normed = RmsNorm { weight: weight.shallow_clone(), epsilon: 1e-2 }.forward(&input);
                (&normed * slope.to_kind(kind)).sum(kind).backward();
                [normed, input.grad(), weight.grad()].map(|tensor| tensor.to_kind(Kind::Double))
            });
            for (got, want) in got.iter().zip(&want) {
                assert!(got.allclose(want, 1e-5, 1e-5, false), "{rows} x {width}: {got} {want}");
            }
        }
    }

    /// In bfloat16, 1.0 to 2.0 have steps of 1/128: what is rounded when can be counted.
    #[test]
    fn a_wide_weight_is_multiplied_before_the_rounding() {
        let input = Tensor::from_slice(&[1.0f32, 1.01, 0.99, 1.004]).to_kind(Kind::BFloat16);
        let weight = Tensor::from_slice(&[1.003f32, 1.001, 1.005, 0.997]);
        let exact =
            RmsNorm { weight: weight.to_kind(Kind::Double), epsilon: 0.0 }.forward(&input.to_kind(Kind::Double));
        let wide = RmsNorm { weight: weight.shallow_clone(), epsilon: 0.0 }.forward(&input);
        assert_eq!(wide.kind(), Kind::BFloat16);
        assert!(wide.equal(&exact.to_kind(Kind::BFloat16)));
        let narrow = RmsNorm { weight: weight.to_kind(Kind::BFloat16), epsilon: 0.0 }.forward(&input);
        assert!(!wide.equal(&narrow));
    }
}
