//! Hidden states on their way: float32, bfloat16, or 8 bits with a scale for every token.
//!
//! What a draft reads decides how well it guesses and nothing else: the output does not depend on how they travel.

use half::bf16;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

/// How hidden states travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// 4 bytes a value.
    Float32,
    /// 2 bytes a value.
    #[default]
    Bfloat16,
    /// A byte a value, from -127 to 127, and a float32 for each token and layer that multiplies them.
    Int8,
}

/// Hidden states of some tokens, of each layer that was asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Features {
    /// How they are written.
    pub encoding: Encoding,
    /// Layers.
    pub layers: u32,
    /// Tokens.
    pub tokens: u32,
    /// Values of a token and layer.
    pub width: u32,
    /// All values, layer by layer and token by token, little endian.
    pub values: Vec<u8>,
    /// Scales of [`Encoding::Int8`], layer by layer; else none.
    pub scales: Vec<f32>,
}

/// Most values that are taken from a peer: what is said of sizes is not allocated before it fits what is there.
const MOST_VALUES: u64 = 1 << 32;

impl Features {
    /// Writes the states `[T, H]` of every layer.
    pub fn encode(layers: &[Tensor], encoding: Encoding) -> Result<Self> {
        let (tokens, width) = match layers.first() {
            Some(first) => first.size2()?,
            None => (0, 0),
        };
        let (mut values, mut scales) = (Vec::new(), Vec::new());
        for layer in layers {
            let flat = layer.to_device(Device::Cpu).to_kind(Kind::Float).contiguous().view([-1]);
            let flat: Vec<f32> = Vec::try_from(flat)?; // T * H
            match encoding {
                Encoding::Float32 => values.extend(flat.iter().flat_map(|value| value.to_le_bytes())),
                Encoding::Bfloat16 => {
                    values.extend(flat.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()));
                }
                Encoding::Int8 => {
                    for token in flat.chunks(width.max(1) as usize) {
                        let largest = token.iter().fold(0f32, |most, value| most.max(value.abs()));
                        let scale = if largest > 0.0 { largest / 127.0 } else { 1.0 };
                        scales.push(scale);
                        values.extend(token.iter().map(|value| (value / scale).round() as i8 as u8));
                    }
                }
            }
        }
        let (layers, tokens, width) = (layers.len() as u32, tokens as u32, width as u32);
        Ok(Self { encoding, layers, tokens, width, values, scales })
    }

    /// Reads them again: one `[T, H]` for each layer. Refuses sizes that are not those that are wanted, or not those of
    /// what is there.
    pub fn decode(&self, layers: usize, tokens: usize, (kind, device): (Kind, Device)) -> Result<Vec<Tensor>> {
        let Self { encoding, width, values, scales, .. } = self;
        if (self.layers as usize, self.tokens as usize) != (layers, tokens) {
            let (got_layers, got_tokens) = (self.layers, self.tokens);
            return Err(Error::Failed(format!(
                "features from the cloud: expected {layers} layers of {tokens} tokens, got {got_layers} of {got_tokens}"
            )));
        }
        let count = u64::from(self.layers) * u64::from(self.tokens) * u64::from(*width);
        let size = match encoding {
            Encoding::Float32 => 4,
            Encoding::Bfloat16 => 2,
            Encoding::Int8 => 1,
        };
        let want_scales = if *encoding == Encoding::Int8 { layers * tokens } else { 0 };
        if count > MOST_VALUES || values.len() as u64 != count * size || scales.len() != want_scales {
            return Err(Error::Failed(format!(
                "features from the cloud: {} bytes and {} scales are not those of {layers} layers of {tokens} tokens of \
                 {width} values",
                values.len(),
                scales.len()
            )));
        }
        if values.is_empty() {
            return Ok((0..layers).map(|_| Tensor::zeros([tokens as i64, 0], (kind, device))).collect());
        }
        let read = |(index, part): (usize, &[u8])| -> Result<Tensor> {
            let flat: Vec<f32> = match encoding {
                Encoding::Float32 => part.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
                Encoding::Bfloat16 => {
                    part.as_chunks::<2>().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect()
                }
                Encoding::Int8 => {
                    let scales = &scales[index * tokens..(index + 1) * tokens];
                    let rows = part.chunks(*width as usize).zip(scales);
                    rows.flat_map(|(row, scale)| row.iter().map(move |&byte| f32::from(byte as i8) * scale)).collect()
                }
            };
            let layer = Tensor::from_slice(&flat).f_view([tokens as i64, i64::from(*width)])?; // [T, H]
            Ok(layer.f_to_device(device)?.f_to_kind(kind)?)
        };
        values.chunks(values.len() / layers.max(1)).enumerate().map(read).collect()
    }

    /// Bytes of the values and scales.
    pub fn bytes(&self) -> usize {
        self.values.len() + 4 * self.scales.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::drawn;

    #[test]
    fn what_is_written_is_read_as_closely_as_its_bits_allow() {
        drawn::seed(3);
        // Tokens of very different sizes: each has its own scale.
        let sizes = Tensor::from_slice(&[1e-3f64, 1.0, 500.0]).unsqueeze(-1);
        let layers = [0, 1].map(|_| drawn::randn([3, 16], (Kind::Double, Device::Cpu)) * &sizes);
        for (encoding, most, bytes) in
            [(Encoding::Float32, 1e-7, 384), (Encoding::Bfloat16, 4e-3, 192), (Encoding::Int8, 1.0 / 254.0, 96 + 24)]
        {
            let features = Features::encode(&layers, encoding).unwrap();
            assert_eq!(features.bytes(), bytes);
            let read = features.decode(2, 3, (Kind::Double, Device::Cpu)).unwrap();
            for (want, got) in layers.iter().zip(&read) {
                let scale = want.abs().amax([-1i64].as_slice(), true); // [3, 1]
                let off = ((want - got).abs() / scale).max().double_value(&[]);
                assert!(off <= most * 1.001, "{encoding:?}: {off:e}");
            }
        }
    }

    #[test]
    fn sizes_that_are_not_true_are_refused() {
        let layers = [Tensor::ones([2, 4], (Kind::Float, Device::Cpu))];
        let features = Features::encode(&layers, Encoding::Int8).unwrap();
        let cpu = (Kind::Float, Device::Cpu);
        assert!(features.decode(1, 2, cpu).is_ok());
        assert!(features.decode(1, 3, cpu).is_err() && features.decode(2, 2, cpu).is_err());
        for broken in [
            Features { values: vec![0; 7], ..features.clone() },
            Features { scales: vec![1.0], ..features.clone() },
            Features { width: u32::MAX, ..features.clone() },
            Features { encoding: Encoding::Float32, ..features.clone() },
        ] {
            assert!(broken.decode(1, 2, cpu).unwrap_err().to_string().contains("are not those of"));
        }
        let nothing = Features::encode(&[], Encoding::Float32).unwrap();
        assert!(nothing.decode(0, 0, cpu).unwrap().is_empty());
    }
}
