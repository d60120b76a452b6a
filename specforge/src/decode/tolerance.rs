//! How far sound decodes of one text are apart: kernels add in another order for another number of tokens.

use serde::Serialize;
use tch::Kind;

/// What rounding may do, by the target's element type.
///
/// Measured on SmolLM2-135M on a CPU, 160 positions in float32 and 64 in bfloat16, single tokens against trees of 64
/// nodes and batches of 4: the worst of 49,152 logits is apart by 1.1e-4 and by 1.3, the distances of the three largest
/// by 6.9e-5 and 0.38. float16 keeps three bits more than bfloat16.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Tolerance {
    /// How far the worst logit of two sound rows may be apart.
    pub rows: f64,
    /// How close the scores of two tokens must be to change places.
    pub near_tie: f64,
}

impl Tolerance {
    /// That of an element type by its name in files.
    pub fn of(dtype: &str) -> Self {
        let (rows, near_tie) = match dtype {
            "float64" => (1e-9, 1e-9),
            "float32" => (5e-4, 1e-4),
            "float16" => (0.25, 0.0625),
            _ => (2.0, 0.5),
        };
        Self { rows, near_tie }
    }

    /// That of an element type.
    pub fn of_kind(kind: Kind) -> Self {
        Self::of(match kind {
            Kind::Double => "float64",
            Kind::Float => "float32",
            Kind::Half => "float16",
            _ => "bfloat16",
        })
    }

    /// The wider of two.
    pub fn or(self, other: Self) -> Self {
        Self { rows: self.rows.max(other.rows), near_tie: self.near_tie.max(other.near_tie) }
    }
}
