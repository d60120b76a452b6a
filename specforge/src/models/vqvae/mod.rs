//! VAR's image tokenizer: an encoder, a quantiser of residuals over several scales, and a decoder.
//!
//! Paper: Tian et al. 2024, <https://arxiv.org/abs/2404.02905>. Reference: FoundationVision/VAR at
//! 78b95394fc5896192e3a003e4b295f8ea743c48f, `models/{vqvae,quant,basic_vae}.py`.
//!
//! Shape legend of this folder: `B` images, `S` scales, `pn` patches along each side at a scale, `P` those of the last
//! scale, `C` channels of the codes (`Cvae` there), `V` codes of the codebook; images are `h = w = P * r` pixels wide, with
//! `r` pixels along a patch of the last scale. Pixels are in [-1, 1] unless said otherwise.

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::models::family::{GetTensor, Shapes};
use crate::nn::conv::Conv2d;
use crate::nn::noise;

pub mod blocks;
pub mod coders;
pub mod config;
pub mod files;
pub mod quantizer;

use blocks::{See, Source};
use coders::{COLOURS, Decoder, Encoder};

pub use config::VqvaeConfig;
pub use files::{load, load_quantizer, write};
pub use quantizer::{Encoded, PhiSharing, Quantized, Quantizer, QuantizerConfig};

/// A VQVAE. It has no state.
#[derive(Debug)]
pub struct Vqvae {
    config: VqvaeConfig,
    encoder: Encoder,
    quant_conv: Conv2d,
    quantizer: Quantizer,
    post_quant_conv: Conv2d,
    decoder: Decoder,
}

/// What one pass of training gives.
#[derive(Debug)]
pub struct Reconstruction {
    /// `[B, 3, h, w]`, not cut to the range of pixels.
    pub image: Tensor,
    /// The quantiser's loss, a number.
    pub quantizer_loss: Tensor,
    /// The maps of codes, `[B, pn * pn]` each.
    pub indices: Vec<Tensor>,
    /// What the quantiser looked up at each scale, `[B * pn * pn, C]` each, without gradients.
    pub looked_up: Vec<Tensor>,
}

impl Vqvae {
    /// A model from its tensors, which are asked for by the reference's names.
    pub fn build(config: VqvaeConfig, tensor: &mut GetTensor<'_>) -> Result<Self> {
        config.check().map_err(Error::Failed)?;
        let quantizer = Quantizer::build(config.quantizer.clone(), "quantize.", &mut *tensor)?;
        let mut source = Source { tensor, norms: config.norms };
        let channels = config.quantizer.z_channels;
        Ok(Self {
            encoder: Encoder::build(&config, &mut source)?,
            quant_conv: source.conv("quant_conv", (channels, channels), config.quant_conv_ks)?,
            post_quant_conv: source.conv("post_quant_conv", (channels, channels), config.quant_conv_ks)?,
            decoder: Decoder::build(&config, &mut source)?,
            quantizer,
            config,
        })
    }

    /// Every tensor of a model of this configuration under the reference's name, sorted by name.
    pub fn tensors(config: &VqvaeConfig) -> Result<Shapes> {
        let mut shapes = Shapes::new();
        // What is built here holds one number in place of every tensor.
        Self::build(config.clone(), &mut |name, shape| {
            shapes.push((name.to_owned(), shape.to_vec()));
            Ok(Tensor::zeros([1], (Kind::Float, Device::Cpu)).f_expand(shape, false)?)
        })?;
        shapes.sort();
        Ok(shapes)
    }

    /// Tensors that training begins with, in the order of [`Vqvae::tensors`], float32 on the CPU: convolutions as PyTorch
    /// begins them by spread (a variance of a third of the inverse of what a number is summed over), norms that change
    /// nothing, biases of 0, and a codebook that the first images are meant to fill.
    pub fn initial(config: &VqvaeConfig, seed: u64) -> Result<Vec<(String, Tensor)>> {
        let begin = |(stream, (name, shape)): (usize, (String, Vec<i64>))| {
            let inputs: i64 = shape.iter().skip(1).product();
            let value = match shape.len() {
                1 if name.ends_with(".weight") => Tensor::ones(&shape, (Kind::Float, Device::Cpu)),
                1 => Tensor::zeros(&shape, (Kind::Float, Device::Cpu)),
                2 => noise::normal(&shape, 1.0 / (config.quantizer.z_channels as f64).sqrt(), seed, stream as u64),
                _ => noise::normal(&shape, 1.0 / (3.0 * inputs as f64).sqrt(), seed, stream as u64),
            };
            (name, value)
        };
        Ok(Self::tensors(config)?.into_iter().enumerate().map(begin).collect())
    }

    /// What it is.
    pub fn config(&self) -> &VqvaeConfig {
        &self.config
    }

    /// The quantiser, with the codebook.
    pub fn quantizer(&self) -> &Quantizer {
        &self.quantizer
    }

    /// What the quantiser is given: pixels `[B, 3, h, w]` to features `[B, C, P, P]`.
    pub fn features(&self, image: &Tensor) -> Result<Tensor> {
        self.features_seen(image, &mut |_, _| ())
    }

    /// The same; `see` is shown the steps of the encoder.
    pub fn features_seen(&self, image: &Tensor, see: &mut See<'_>) -> Result<Tensor> {
        let pixels = self.config.pixels();
        match *image.size() {
            [_, COLOURS, h, w] if [h, w] == [pixels; 2] && image.kind() == self.kind() => {}
            _ => {
                return Err(Error::Failed(format!(
                    "images: expected [images, {COLOURS}, {pixels}, {pixels}] of {:?}, got {:?} of {:?}",
                    self.kind(),
                    image.size(),
                    image.kind()
                )));
            }
        }
        self.quant_conv.forward(&self.encoder.forward(image, see)?)
    }

    /// The maps of codes of pixels `[B, 3, h, w]`.
    pub fn encode(&self, image: &Tensor) -> Result<Encoded> {
        self.quantizer.encode(&self.features(image)?)
    }

    /// What codes stand for, `[B, C, P, P]`, to pixels `[B, 3, h, w]` in [-1, 1].
    pub fn decode(&self, f_hat: &Tensor) -> Result<Tensor> {
        Ok(self.decode_seen(f_hat, &mut |_, _| ())?.clamp(-1.0, 1.0))
    }

    /// The same in [0, 1], as image files have it.
    pub fn image01(&self, f_hat: &Tensor) -> Result<Tensor> {
        Ok(self.decode(f_hat)? * 0.5 + 0.5)
    }

    /// Pixels that are not cut to [-1, 1]; `see` is shown the steps of the decoder, and `post_quant_conv` before them.
    pub fn decode_seen(&self, f_hat: &Tensor, see: &mut See<'_>) -> Result<Tensor> {
        self.quantizer.check_features(f_hat)?;
        let features = self.post_quant_conv.forward(f_hat)?;
        see("post_quant_conv", &features);
        self.decoder.forward(&features, see)
    }

    /// One pass of training over pixels `[B, 3, h, w]`: gradients of the result reach every tensor of the model.
    pub fn reconstruct(&self, image: &Tensor) -> Result<Reconstruction> {
        let quantized = self.quantizer.quantize(&self.features(image)?, self.config.beta)?;
        let image = self.decode_seen(&quantized.f_hat, &mut |_, _| ())?;
        let Quantized { loss: quantizer_loss, indices, looked_up, .. } = quantized;
        Ok(Reconstruction { image, quantizer_loss, indices, looked_up })
    }

    /// Element type.
    pub fn kind(&self) -> Kind {
        self.quantizer.kind()
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        self.quantizer.device()
    }
}

/// A small model with random tensors, for tests.
#[cfg(test)]
pub(crate) fn tiny() -> Vqvae {
    let values = serde_json::json!({
        "vocab_size": 16, "z_channels": 4, "ch": 4, "ch_mult": [1, 2], "num_res_blocks": 1, "patch_nums": [1, 2, 4],
        "share_quant_resi": 2, "groupnorm_groups": 2
    });
    let (config, _) = VqvaeConfig::read(&values).unwrap();
    let mut stream = 0;
    Vqvae::build(config, &mut |_, shape| {
        stream += 1;
        Ok(crate::nn::noise::normal(shape, 0.4, 5, stream))
    })
    .unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_references() {
        let shapes = Vqvae::tensors(tiny().config()).unwrap();
        let shape = |name: &str| shapes.iter().find(|(known, _)| known == name).map(|(_, shape)| shape.clone());
        assert_eq!(shape("encoder.down.0.downsample.conv.weight"), Some(vec![4, 4, 3, 3]));
        assert_eq!(shape("encoder.down.1.block.0.nin_shortcut.weight"), Some(vec![8, 4, 1, 1]));
        assert_eq!(shape("encoder.down.1.attn.0.qkv.bias"), Some(vec![24]));
        assert_eq!(shape("decoder.up.1.upsample.conv.bias"), Some(vec![8]));
        assert_eq!(shape("decoder.up.0.block.1.conv1.weight"), Some(vec![4, 4, 3, 3]));
        assert_eq!(shape("decoder.up.0.upsample.conv.bias"), None);
        assert_eq!(shape("decoder.up.1.block.2.conv1.weight"), None);
    }

    #[test]
    fn the_published_model_has_its_number_of_parameters() {
        let values = serde_json::json!({
            "vocab_size": 4096, "z_channels": 32, "ch": 160, "patch_nums": config::PUBLISHED_PATCHES
        });
        let (config, _) = VqvaeConfig::read(&values).unwrap();
        assert_eq!(config.pixels(), 256);
        let shapes = Vqvae::tensors(&config).unwrap();
        // 324 with the counters of used codes.
        assert_eq!(shapes.len(), 323);
        let numbers: i64 = shapes.iter().map(|(_, shape)| shape.iter().product::<i64>()).sum();
        assert_eq!(numbers, 108_948_355);
    }

    #[test]
    fn images_come_back_in_their_range_and_a_batch_is_its_images() {
        let model = tiny();
        let image = noise::normal(&[2, 3, 8, 8], 0.5, 1, 1);
        let encoded = model.encode(&image).unwrap();
        let decoded = model.image01(&encoded.f_hat[2]).unwrap();
        assert_eq!(decoded.size(), [2, 3, 8, 8]);
        assert!(decoded.min().double_value(&[]) >= 0.0 && decoded.max().double_value(&[]) <= 1.0);
        let second = model.encode(&image.narrow(0, 1, 1)).unwrap();
        assert!(second.indices[2].equal(&encoded.indices[2].narrow(0, 1, 1)));
        let alone = model.image01(&second.f_hat[2]).unwrap();
        assert!(alone.allclose(&decoded.narrow(0, 1, 1), 1e-5, 1e-5, false));
    }

    #[test]
    fn images_of_another_size_are_named() {
        let said = |shape: &[i64]| tiny().features(&noise::normal(shape, 1.0, 1, 1)).unwrap_err().to_string();
        assert!(said(&[1, 3, 8, 6]).contains("expected [images, 3, 8, 8] of Float, got [1, 3, 8, 6]"));
        assert!(said(&[1, 1, 8, 8]).contains("got [1, 1, 8, 8]"));
        assert!(said(&[3, 8, 8]).contains("got [3, 8, 8]"));
    }
}
