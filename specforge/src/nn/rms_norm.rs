//! Root mean square normalisation (Zhang and Sennrich 2019, <https://arxiv.org/abs/1910.07467>).

use tch::{Kind, Tensor};

/// `x / sqrt(mean(x^2) + epsilon) * weight`, the mean in float32, as Hugging Face's Llama computes it.
#[derive(Debug)]
pub struct RmsNorm {
    /// `[H]`
    pub weight: Tensor,
    /// Added to the mean of squares.
    pub epsilon: f64,
}

impl RmsNorm {
    /// `[.., H]` to `[.., H]`, in the element type of `input`.
    ///
    /// On a GPU one kernel each way, which keeps its sums in float32 too and rounds once: the six operators below would
    /// carry float32 numbers of every row through its memory five times.
    pub fn forward(&self, input: &Tensor) -> Tensor {
        let kind = input.kind();
        if input.device().is_cuda() && kind == self.weight.kind() && kind != Kind::Double {
            let (normed, _) =
                input.internal_fused_rms_norm(self.weight.size().as_slice(), Some(&self.weight), self.epsilon);
            return normed;
        }
        // float64 stays float64: exact tests run there.
        let wide = if kind == Kind::Double { input.shallow_clone() } else { input.to_kind(Kind::Float) };
        let mean_of_squares = wide.square().mean_dim(-1, true, wide.kind()); // [.., 1]
        let normed = (mean_of_squares + self.epsilon).rsqrt_() * wide; // [.., H]
        normed.to_kind(kind) * &self.weight
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

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
}
