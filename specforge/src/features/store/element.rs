//! How one number of a hidden state is stored.

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

/// Element type of the hidden states of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Element {
    /// Four bytes. What a target computes in float32 comes back bit for bit.
    Float32,
    /// Two bytes. What a target computes in bfloat16 comes back bit for bit.
    Bfloat16,
    /// One byte and a scale for each token, see [`super::float8`].
    Float8,
}

impl Element {
    /// Name on the command line and in a store's manifest.
    pub fn name(self) -> &'static str {
        match self {
            Element::Float32 => "float32",
            Element::Bfloat16 => "bfloat16",
            Element::Float8 => "float8",
        }
    }

    /// Element type in a safetensors file.
    pub fn dtype(self) -> Dtype {
        match self {
            Element::Float32 => Dtype::F32,
            Element::Bfloat16 => Dtype::BF16,
            Element::Float8 => Dtype::F8_E4M3,
        }
    }

    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Element::Float32 => 4,
            Element::Bfloat16 => 2,
            Element::Float8 => 1,
        }
    }

    /// Bytes of a hidden state of `width` numbers.
    pub fn state_bytes(self, width: usize) -> usize {
        width * self.bytes() + if self.has_scales() { size_of::<f32>() } else { 0 }
    }

    /// Whether each token has a scale.
    pub fn has_scales(self) -> bool {
        self == Element::Float8
    }

    /// Largest relative error of a stored number: half of its last digit.
    pub fn relative_error(self) -> f64 {
        match self {
            Element::Float32 => 0.0,
            Element::Bfloat16 => 1.0 / 256.0,
            Element::Float8 => 1.0 / 16.0,
        }
    }
}

impl std::str::FromStr for Element {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "float32" | "f32" => Ok(Element::Float32),
            "bfloat16" | "bf16" => Ok(Element::Bfloat16),
            "float8" | "f8" => Ok(Element::Float8),
            other => Err(format!("expected float32, bfloat16 or float8, got `{other}`")),
        }
    }
}
