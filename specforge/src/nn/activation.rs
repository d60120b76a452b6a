//! Activation functions of MLPs, by the names that Hugging Face's configurations use.

use tch::Tensor;

/// What an MLP does with each number between its projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x sigmoid(x)`
    Silu,
    /// `x` times the normal distribution function of `x` (Hendrycks and Gimpel 2016, <https://arxiv.org/abs/1606.08415>).
    Gelu,
    /// The same, approximated by a hyperbolic tangent.
    GeluTanh,
}

impl Activation {
    /// The activation of a name.
    pub fn named(name: &str) -> Result<Self, String> {
        match name {
            "silu" | "swish" => Ok(Self::Silu),
            "gelu" => Ok(Self::Gelu),
            "gelu_pytorch_tanh" | "gelu_new" => Ok(Self::GeluTanh),
            other => Err(format!("expected silu, gelu or gelu_pytorch_tanh, got {other}")),
        }
    }

    /// Applies it in place.
    pub fn apply(self, mut input: Tensor) -> Tensor {
        match self {
            Self::Silu => input.silu_(),
            Self::Gelu => input.gelu_("none"),
            Self::GeluTanh => input.gelu_("tanh"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_its_formula() {
        let values = [-3.0f64, -0.7, 0.0, 0.4, 2.5];
        // The distribution function by its own series, not by what is tested.
        let distribution = |x: f64| {
            let (mut term, mut sum) = (x, x);
            for n in 1..60 {
                term *= -x * x / 2.0 / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            0.5 + sum / std::f64::consts::TAU.sqrt()
        };
        let tanh = |x: f64| {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        };
        for (name, want) in [
            ("silu", values.map(|x| x / (1.0 + (-x).exp()))),
            ("gelu", values.map(|x| x * distribution(x))),
            ("gelu_pytorch_tanh", values.map(tanh)),
        ] {
            let got = Activation::named(name).unwrap().apply(Tensor::from_slice(&values));
            let difference = (got - Tensor::from_slice(&want)).abs().max().double_value(&[]);
            assert!(difference < 1e-12, "{name}: {difference:e}");
        }
        assert!(Activation::named("relu").unwrap_err().contains("relu"));
    }
}
