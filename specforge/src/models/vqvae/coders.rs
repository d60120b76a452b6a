//! Encoder and decoder: pixels to features of patches and back.
//!
//! Reference: `Encoder` and `Decoder` of `models/basic_vae.py`, FoundationVision/VAR at
//! 78b95394fc5896192e3a003e4b295f8ea743c48f.

use tch::Tensor;

use super::blocks::{Downsample, Level, Middle, See, Source, Upsample};
use super::config::VqvaeConfig;
use crate::error::Result;
use crate::nn::conv::Conv2d;
use crate::nn::group_norm::GroupNorm;

/// Red, green, blue.
pub const COLOURS: i64 = 3;

/// Pixels `[B, 3, h, w]` to features `[B, C, h / r, w / r]`, with `r` of [`VqvaeConfig::pixels_a_patch`].
#[derive(Debug)]
pub struct Encoder {
    conv_in: Conv2d,
    /// From the pixels down, each but the last with what halves the image behind it.
    levels: Vec<(Level, Option<Downsample>)>,
    middle: Middle,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    pub(super) fn build(config: &VqvaeConfig, source: &mut Source<'_, '_>) -> Result<Self> {
        let lowest = config.ch_mult.len() - 1;
        let conv_in = source.conv("encoder.conv_in", (COLOURS, config.ch), 3)?;
        let mut levels = Vec::new();
        let mut inside = config.ch;
        for (number, factor) in config.ch_mult.iter().enumerate() {
            let (name, out) = (format!("encoder.down.{number}"), config.ch * factor);
            let level = Level::build(source, &name, (inside, out), config.num_res_blocks, number == lowest)?;
            let halve =
                (number < lowest).then(|| Downsample::build(source, &format!("{name}.downsample"), out)).transpose()?;
            levels.push((level, halve));
            inside = out;
        }
        Ok(Self {
            conv_in,
            levels,
            middle: Middle::build(source, "encoder.mid", inside)?,
            norm_out: source.norm("encoder.norm_out", inside)?,
            conv_out: source.conv("encoder.conv_out", (inside, config.quantizer.z_channels), 3)?,
        })
    }

    /// `[B, 3, h, w]` to `[B, C, h / r, w / r]`.
    pub fn forward(&self, image: &Tensor, see: &mut See<'_>) -> Result<Tensor> {
        let mut hidden = self.conv_in.forward(image)?;
        see("conv_in", &hidden);
        for (number, (level, halve)) in self.levels.iter().enumerate() {
            hidden = level.forward(&hidden)?;
            see(&format!("level.{number}"), &hidden);
            if let Some(halve) = halve {
                hidden = halve.forward(&hidden)?;
            }
        }
        hidden = self.middle.forward(&hidden, see)?;
        let out = self.conv_out.forward(&self.norm_out.forward(&hidden)?.silu())?;
        see("out", &out);
        Ok(out)
    }
}

/// Features `[B, C, h / r, w / r]` to pixels `[B, 3, h, w]`.
#[derive(Debug)]
pub struct Decoder {
    conv_in: Conv2d,
    middle: Middle,
    /// From the lowest level up to the pixels, each but the last with what doubles the image behind it.
    levels: Vec<(Level, Option<Upsample>)>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    pub(super) fn build(config: &VqvaeConfig, source: &mut Source<'_, '_>) -> Result<Self> {
        let lowest = config.ch_mult.len() - 1;
        let mut inside = config.ch * config.ch_mult.last().copied().unwrap_or(1);
        let conv_in = source.conv("decoder.conv_in", (config.quantizer.z_channels, inside), 3)?;
        let middle = Middle::build(source, "decoder.mid", inside)?;
        let mut levels = Vec::new();
        for (number, factor) in config.ch_mult.iter().enumerate().rev() {
            let (name, out) = (format!("decoder.up.{number}"), config.ch * factor);
            // One block more than the encoder has, as in the reference.
            let level = Level::build(source, &name, (inside, out), config.num_res_blocks + 1, number == lowest)?;
            let double = (number > 0).then(|| Upsample::build(source, &format!("{name}.upsample"), out)).transpose()?;
            levels.push((level, double));
            inside = out;
        }
        Ok(Self {
            conv_in,
            middle,
            levels,
            norm_out: source.norm("decoder.norm_out", inside)?,
            conv_out: source.conv("decoder.conv_out", (inside, COLOURS), 3)?,
        })
    }

    /// `[B, C, h / r, w / r]` to `[B, 3, h, w]`, not cut to the range of pixels.
    pub fn forward(&self, features: &Tensor, see: &mut See<'_>) -> Result<Tensor> {
        let mut hidden = self.conv_in.forward(features)?;
        see("conv_in", &hidden);
        hidden = self.middle.forward(&hidden, see)?;
        let lowest = self.levels.len();
        for (place, (level, double)) in self.levels.iter().enumerate() {
            hidden = level.forward(&hidden)?;
            see(&format!("level.{}", lowest - 1 - place), &hidden);
            if let Some(double) = double {
                hidden = double.forward(&hidden)?;
            }
        }
        let out = self.conv_out.forward(&self.norm_out.forward(&hidden)?.silu())?;
        see("out_unclamped", &out);
        Ok(out)
    }
}
