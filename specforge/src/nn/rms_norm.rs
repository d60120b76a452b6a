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
    pub fn forward(&self, input: &Tensor) -> Tensor {
        let kind = input.kind();
        // float64 stays float64: exact tests run there.
        let wide = if kind == Kind::Double { input.shallow_clone() } else { input.to_kind(Kind::Float) };
        let mean_of_squares = wide.square().mean_dim(-1, true, wide.kind()); // [.., 1]
        let normed = (mean_of_squares + self.epsilon).rsqrt_() * wide; // [.., H]
        normed.to_kind(kind) * &self.weight
    }
}
