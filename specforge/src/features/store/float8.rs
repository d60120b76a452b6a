//! Hidden states in eight bits: float8 e4m3fn values, and one float32 scale for each token. The loops are in `hot/`; here they
//! are held to libtorch's own numbers.

pub use specforge_hot::float8::{NUMBERS, decode, encode};

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use specforge_hot::float8::{LARGEST, LARGEST_CODE, code};

    use super::*;

    #[test]
    fn every_code_is_libtorchs_number_and_its_own_code() {
        let codes: Vec<u8> = (0..=255).collect();
        let theirs = Tensor::from_data_size(&codes, &[256], Kind::Float8e4m3fn).to_kind(Kind::Float);
        let theirs = Vec::<f32>::try_from(theirs).unwrap();
        for (byte, &want) in codes.into_iter().zip(&theirs) {
            let got = NUMBERS[usize::from(byte)];
            assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()), "{byte:#x}: {got} {want}");
            assert!(got.is_nan() || code(got) == byte, "{byte:#x}");
        }
    }

    /// All midpoints between neighbours, a hair to both sides of them, and many others.
    #[test]
    fn rounding_is_libtorchs() {
        let mut values: Vec<f32> = Vec::new();
        for pair in NUMBERS[..usize::try_from(LARGEST_CODE).unwrap() + 1].windows(2) {
            let middle = (pair[0] + pair[1]) / 2.0;
            values.extend([middle, middle.next_up(), middle.next_down()]);
        }
        values.extend((0..100_000).map(|step| (step as f32 * 0.37).sin() * (step as f32 * 1.3e-4).exp2()));
        values.retain(|value| value.abs() <= LARGEST);
        values.extend(values.clone().iter().map(|value| -value));
        assert!(values.len() > 100_000);
        let theirs = Tensor::from_slice(&values).to_kind(Kind::Float8e4m3fn).to_kind(Kind::Float);
        let theirs = Vec::<f32>::try_from(theirs).unwrap();
        for (&value, want) in values.iter().zip(theirs) {
            let got = NUMBERS[usize::from(code(value))];
            assert_eq!(got.to_bits(), want.to_bits(), "{value:e}: {got:e} {want:e}");
        }
        for beyond in [449.0, 463.9, 464.0, 1e9, f32::MAX] {
            assert_eq!((code(beyond), code(-beyond)), (0x7E, 0xFE));
        }
    }

    #[test]
    fn tokens_keep_a_relative_precision_of_their_own() {
        let width = 64;
        let sizes = [1.0, 1e-20, 3e30, 0.0, f32::MIN_POSITIVE];
        let values = Tensor::randn([5, width as i64], (Kind::Float, Device::Cpu));
        let mut values = Vec::<f32>::try_from(values.flatten(0, -1)).unwrap();
        values.chunks_mut(width).zip(sizes).for_each(|(row, size)| row.iter_mut().for_each(|value| *value *= size));
        let (mut codes, mut scales, mut decoded) = (Vec::new(), Vec::new(), vec![f32::NAN; values.len()]);
        encode(&values[..2 * width], width, &mut codes, &mut scales);
        encode(&values[2 * width..], width, &mut codes, &mut scales);
        decode(&codes, &scales, width, &mut decoded);
        for (row, (want, got)) in values.chunks(width).zip(decoded.chunks(width)).enumerate() {
            let largest = want.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            for (want, got) in want.iter().zip(got) {
                // Half of the last of four digits, or half of the smallest step.
                let bound = (want.abs() / 16.0).max(largest / LARGEST / 1024.0).max(f32::MIN_POSITIVE);
                assert!((want - got).abs() <= bound, "row {row}: {want:e} {got:e}");
            }
        }
    }
}
