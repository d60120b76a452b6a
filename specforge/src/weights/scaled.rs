//! Weights of a few bits with scales beside them, as the numbers they stand for. Exact: each is one product of two numbers
//! that float32 holds.
//!
//! | stored | scale | who writes it |
//! |---|---|---|
//! | `X.weight` float8 (e4m3) | `X.weight_scale`: one number, one a row, or one a block | compressed-tensors, AutoFP8 |
//! | `X.weight` float8 (e4m3) | `X.weight_scale_inv`: one a block; it multiplies, whatever its name says | DeepSeek |
//! | `X_blocks` two float4 (e2m1) a byte, the lower half first | `X_scales`: an exponent for 32 of them | gpt-oss (MXFP4) |
//! | `X.weight_packed` the same | `X.weight_scale` of bytes | compressed-tensors (MXFP4) |

use tch::{Kind, Tensor};

use crate::error::Result;

/// Numbers that share an exponent in MXFP4.
const GROUP: i64 = 32;
/// What an exponent of MXFP4 is stored above.
const BIAS: f64 = 127.0;
/// Numbers of a row or column of a block that share a scale, unless the shapes say otherwise.
const USUAL_BLOCK: i64 = 128;
/// The sixteen numbers of e2m1, by their bits.
const E2M1: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// What one scale is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Share {
    /// The whole tensor.
    Tensor,
    /// A row.
    Row,
    /// A block of so many rows and columns.
    Block([i64; 2]),
    /// Groups of MXFP4.
    Group,
}

impl Share {
    /// What is stored that way, for people.
    pub(super) fn words(self) -> &'static str {
        match self {
            Share::Tensor => "float8 with one scale",
            Share::Row => "float8 with a scale a row",
            Share::Block(_) => "float8 with a scale a block",
            Share::Group => "MXFP4",
        }
    }
}

/// The names of a tensor and of its scale, for each pair that may stand under a name in a file.
pub(super) fn partner(stored: &str, is_there: impl Fn(&str) -> bool) -> Option<(String, String)> {
    if let Some(base) = stored.strip_suffix("_blocks") {
        let scale = format!("{base}_scales");
        return is_there(&scale).then(|| (base.to_owned(), scale));
    }
    if let Some(base) = stored.strip_suffix("weight_packed") {
        let scale = format!("{base}weight_scale");
        return is_there(&scale).then(|| (format!("{base}weight"), scale));
    }
    let scales = ["_scale_inv", "_scale"].map(|end| format!("{stored}{end}"));
    let scale = scales.into_iter().find(|name| stored.ends_with("weight") && is_there(name))?;
    Some((stored.to_owned(), scale))
}

/// The shape of the numbers that bytes of MXFP4 stand for: `[.., groups, 16]` or `[.., bytes]`.
pub(super) fn unpacked_shape(stored: &[i64], scales: &[i64]) -> Option<Vec<i64>> {
    let rows = scales.split_last().filter(|(_, rows)| !rows.is_empty());
    let (groups, rows) = rows?;
    let bytes = groups.checked_mul(GROUP / 2)?;
    let fits = [[rows, &[*groups, GROUP / 2]].concat(), [rows, &[bytes]].concat()].iter().any(|shape| shape == stored);
    fits.then(|| [rows, &[bytes * 2]].concat())
}

/// A shape with its last two axes in each other's place.
pub(super) fn turned(shape: &[i64]) -> Vec<i64> {
    let mut turned = shape.to_vec();
    if let [.., rows, columns] = turned.as_mut_slice() {
        std::mem::swap(rows, columns);
    }
    turned
}

/// What a scale of this shape is for, beside a float8 matrix `[out, in]`.
pub(super) fn share(weight: &[i64], scale: &[i64]) -> Option<Share> {
    let &[rows, columns] = weight else { return None };
    match *scale {
        [] | [1] => Some(Share::Tensor),
        [count] if count == rows => Some(Share::Row),
        [count, 1] if count == rows && rows > 1 => Some(Share::Row),
        [down, across] => Some(Share::Block([block(rows, down)?, block(columns, across)?])),
        _ => None,
    }
}

/// Numbers of an axis that share a scale, from how many scales there are.
fn block(size: i64, scales: i64) -> Option<i64> {
    let counts = |block: i64| (size + block - 1) / block == scales;
    // One scale for a short axis says nothing of the block, and needs not.
    let powers = (4..=12).map(|power| 1i64 << power);
    if scales == 1 { Some(size) } else { [USUAL_BLOCK].into_iter().chain(powers).find(|&block| counts(block)) }
}

/// The numbers of a float8 matrix `[out, in]` with its scale, in float32.
pub(super) fn of_float8(weight: &Tensor, scale: &Tensor, share: Share) -> Result<Tensor> {
    let values = weight.f_to_kind(Kind::Float)?;
    let scale = scale.f_to_kind(Kind::Float)?;
    let scale = match share {
        Share::Row => scale.f_view([-1, 1])?, // [out, 1]
        Share::Block([rows, columns]) => {
            let (out, input) = values.size2()?;
            let wide = scale.f_repeat_interleave_self_int(columns, 1, None::<i64>)?.f_narrow(1, 0, input)?;
            wide.f_repeat_interleave_self_int(rows, 0, None::<i64>)?.f_narrow(0, 0, out)? // [out, in]
        }
        Share::Tensor | Share::Group => scale.f_view([1])?,
    };
    Ok(values.f_mul(&scale)?)
}

/// The numbers of bytes of MXFP4 with their exponents `[.., groups]`, in float32 of this shape.
pub(super) fn of_float4(bytes: &Tensor, exponents: &Tensor, shape: &[i64]) -> Result<Tensor> {
    let bytes = bytes.f_reshape([-1])?.f_to_kind(Kind::Int64)?;
    let halves = Tensor::f_stack(&[bytes.f_bitwise_and(15)?, bytes.f_bitwise_right_shift_tensor_scalar(4)?], 1)?; // [N, 2]
    let values = Tensor::from_slice(&E2M1).f_index_select(0, &halves.f_reshape([-1])?)?;
    let scales = (exponents.f_reshape([-1, 1])?.f_to_kind(Kind::Double)? - BIAS).f_exp2()?; // [groups, 1]
    let values = values.f_view([-1, GROUP])?.f_to_kind(Kind::Double)?.f_mul(&scales)?;
    Ok(values.f_to_kind(Kind::Float)?.f_view(shape)?)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn pairs_are_found_by_name() {
        let names =
            ["a.weight_scale", "b.weight_scale_inv", "experts.up_blocks", "experts.up_scales", "c.weight_scale"];
        let is_there = |name: &str| names.contains(&name);
        let pair = |stored: &str| partner(stored, is_there);
        let named = |name: &str, scale: &str| Some((name.to_owned(), scale.to_owned()));
        assert_eq!(pair("a.weight"), named("a.weight", "a.weight_scale"));
        assert_eq!(pair("b.weight"), named("b.weight", "b.weight_scale_inv"));
        assert_eq!(pair("experts.up_blocks"), named("experts.up", "experts.up_scales"));
        assert_eq!(pair("c.weight_packed"), named("c.weight", "c.weight_scale"));
        assert_eq!(pair("d.weight"), None);
        assert_eq!(pair("a.bias"), None);
    }

    #[test]
    fn shapes_say_what_a_scale_is_for() {
        assert_eq!(share(&[6, 4], &[]), Some(Share::Tensor));
        assert_eq!(share(&[6, 4], &[1]), Some(Share::Tensor));
        assert_eq!(share(&[6, 4], &[6, 1]), Some(Share::Row));
        assert_eq!(share(&[6, 4], &[6]), Some(Share::Row));
        assert_eq!(share(&[300, 130], &[3, 2]), Some(Share::Block([128, 128])));
        assert_eq!(share(&[64, 100], &[2, 4]), Some(Share::Block([32, 32])));
        assert_eq!(share(&[64, 100], &[3, 9]), None);
        assert_eq!(share(&[6, 4, 2], &[1, 1, 1]), None);
        assert_eq!(unpacked_shape(&[5, 7, 3, 16], &[5, 7, 3]), Some(vec![5, 7, 96]));
        assert_eq!(unpacked_shape(&[7, 48], &[7, 3]), Some(vec![7, 96]));
        assert_eq!(unpacked_shape(&[7, 47], &[7, 3]), None);
        assert_eq!(unpacked_shape(&[16], &[1]), None);
    }

    /// What was quantised here comes back to the last bit.
    #[test]
    fn float8_times_its_scale_is_exact() {
        let weight = Tensor::randn([300, 130], (Kind::Float, Device::Cpu)).to_kind(Kind::Float8e4m3fn);
        let plain = weight.to_kind(Kind::Float);
        for (scale, share) in [
            (Tensor::from_slice(&[0.37f32]), Share::Tensor),
            (Tensor::rand([300, 1], (Kind::Float, Device::Cpu)), Share::Row),
            (Tensor::rand([3, 2], (Kind::Float, Device::Cpu)), Share::Block([128, 128])),
        ] {
            let got = of_float8(&weight, &scale, share).unwrap();
            for (row, column) in [(0, 0), (127, 127), (128, 5), (299, 129), (256, 128)] {
                let factor = match share {
                    Share::Tensor | Share::Group => scale.double_value(&[0]),
                    Share::Row => scale.double_value(&[row, 0]),
                    Share::Block(_) => scale.double_value(&[row / 128, column / 128]),
                };
                let want = (plain.double_value(&[row, column]) * factor) as f32;
                assert_eq!(got.double_value(&[row, column]) as f32, want, "{share:?} {row} {column}");
            }
        }
    }

    #[test]
    fn float4_counts_from_the_lower_half_and_by_its_exponent() {
        // A row of two groups: exponents 0 and 3.
        let mut bytes = vec![0u8; 32];
        (bytes[0], bytes[1], bytes[15], bytes[16]) = (0x72, 0xf8, 0x10, 0x9a);
        let got = of_float4(
            &Tensor::from_slice(&bytes).view([1, 2, 16]),
            &Tensor::from_slice(&[127u8, 130]).view([1, 2]),
            &[1, 64],
        );
        let got = Vec::<f32>::try_from(got.unwrap().view([-1])).unwrap();
        assert_eq!(got[..4], [1.0, 6.0, -0.0, -6.0]);
        assert_eq!(got[30..34], [0.0, 0.5, -8.0, -4.0]);
        assert!(got[4..30].iter().chain(&got[34..]).all(|value| *value == 0.0));
    }
}
