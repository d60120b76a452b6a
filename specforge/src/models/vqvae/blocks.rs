//! What encoder and decoder are made of.
//!
//! Reference: `models/basic_vae.py` of FoundationVision/VAR at 78b95394fc5896192e3a003e4b295f8ea743c48f, which has it from
//! the VQGAN of Esser et al. 2021 (<https://arxiv.org/abs/2012.09841>).

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::models::family::GetTensor;
use crate::nn::conv::{Conv2d, nearest_double};
use crate::nn::group_norm::GroupNorm;

/// How channels are normed everywhere in a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norms {
    /// Groups of channels.
    pub groups: i64,
    /// Added to variances.
    pub epsilon: f64,
}

/// Where a part finds its tensors: their source, and what stands before their names.
pub(super) struct Source<'a, 'b> {
    pub tensor: &'a mut GetTensor<'b>,
    pub norms: Norms,
}

impl Source<'_, '_> {
    /// A convolution `in` to `out` channels with a kernel of so many pixels each way.
    pub fn conv(&mut self, name: &str, channels: (i64, i64), kernel: i64) -> Result<Conv2d> {
        let weight = (self.tensor)(&format!("{name}.weight"), &[channels.1, channels.0, kernel, kernel])?;
        let bias = (self.tensor)(&format!("{name}.bias"), &[channels.1])?;
        Ok(Conv2d::same(weight, bias))
    }

    pub fn norm(&mut self, name: &str, channels: i64) -> Result<GroupNorm> {
        let weight = (self.tensor)(&format!("{name}.weight"), &[channels])?;
        let bias = (self.tensor)(&format!("{name}.bias"), &[channels])?;
        Ok(GroupNorm { weight, bias, groups: self.norms.groups, epsilon: self.norms.epsilon })
    }
}

/// Two convolutions behind norms, added to what came in: `[B, in, h, w]` to `[B, out, h, w]`.
#[derive(Debug)]
pub(super) struct Residual {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    /// Brings what came in to the width of what goes out, where those differ.
    shortcut: Option<Conv2d>,
}

impl Residual {
    pub fn build(source: &mut Source<'_, '_>, name: &str, (inside, out): (i64, i64)) -> Result<Self> {
        Ok(Self {
            norm1: source.norm(&format!("{name}.norm1"), inside)?,
            conv1: source.conv(&format!("{name}.conv1"), (inside, out), 3)?,
            norm2: source.norm(&format!("{name}.norm2"), out)?,
            conv2: source.conv(&format!("{name}.conv2"), (out, out), 3)?,
            shortcut: match inside == out {
                true => None,
                false => Some(source.conv(&format!("{name}.nin_shortcut"), (inside, out), 1)?),
            },
        })
    }

    pub fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let inner = self.conv1.forward(&self.norm1.forward(input)?.silu())?;
        let inner = self.conv2.forward(&self.norm2.forward(&inner)?.silu())?;
        match &self.shortcut {
            Some(shortcut) => Ok(shortcut.forward(input)? + inner),
            None => Ok(input + inner),
        }
    }
}

/// Every pixel attends to every pixel with one head of all channels, added to what came in: `[B, C, h, w]` both.
#[derive(Debug)]
pub(super) struct PixelAttention {
    norm: GroupNorm,
    qkv: Conv2d,
    proj_out: Conv2d,
}

impl PixelAttention {
    pub fn build(source: &mut Source<'_, '_>, name: &str, channels: i64) -> Result<Self> {
        Ok(Self {
            norm: source.norm(&format!("{name}.norm"), channels)?,
            qkv: source.conv(&format!("{name}.qkv"), (channels, 3 * channels), 1)?,
            proj_out: source.conv(&format!("{name}.proj_out"), (channels, channels), 1)?,
        })
    }

    pub fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let [images, channels, rows, columns] = four_axes(input)?;
        let joined = self.qkv.forward(&self.norm.forward(input)?)?; // [B, 3C, h, w]
        let parts = joined.view([images, 3, channels, rows * columns]).unbind(1); // 3 of [B, C, hw]
        let [query, key, value] = parts.as_slice() else {
            return Err(Error::Failed("attention: expected queries, keys and values".to_owned()));
        };
        let scores = query.transpose(1, 2).f_bmm(key)? * (channels as f64).powf(-0.5); // [B, hw, hw]
        let shares = scores.softmax(-1, None::<Kind>);
        let mixed = value.f_bmm(&shares.transpose(1, 2))?.view([images, channels, rows, columns]);
        Ok(input + self.proj_out.forward(&mixed)?)
    }
}

/// Half as many rows and columns: `[B, C, h, w]` to `[B, C, h / 2, w / 2]`. Zeros stand at the right and below alone.
#[derive(Debug)]
pub(super) struct Downsample(Conv2d);

impl Downsample {
    pub fn build(source: &mut Source<'_, '_>, name: &str, channels: i64) -> Result<Self> {
        let conv = source.conv(&format!("{name}.conv"), (channels, channels), 3)?;
        Ok(Self(Conv2d { stride: 2, padding: 0, ..conv }))
    }

    pub fn forward(&self, input: &Tensor) -> Result<Tensor> {
        self.0.forward(&input.f_constant_pad_nd([0, 1, 0, 1])?)
    }
}

/// Twice as many rows and columns, every pixel four times, then a convolution: `[B, C, h, w]` to `[B, C, 2h, 2w]`.
#[derive(Debug)]
pub(super) struct Upsample(Conv2d);

impl Upsample {
    pub fn build(source: &mut Source<'_, '_>, name: &str, channels: i64) -> Result<Self> {
        source.conv(&format!("{name}.conv"), (channels, channels), 3).map(Self)
    }

    pub fn forward(&self, input: &Tensor) -> Result<Tensor> {
        self.0.forward(&nearest_double(input)?)
    }
}

/// The lowest level's middle: residual, attention, residual.
#[derive(Debug)]
pub(super) struct Middle {
    before: Residual,
    attention: PixelAttention,
    after: Residual,
}

impl Middle {
    pub fn build(source: &mut Source<'_, '_>, name: &str, channels: i64) -> Result<Self> {
        Ok(Self {
            before: Residual::build(source, &format!("{name}.block_1"), (channels, channels))?,
            attention: PixelAttention::build(source, &format!("{name}.attn_1"), channels)?,
            after: Residual::build(source, &format!("{name}.block_2"), (channels, channels))?,
        })
    }

    pub fn forward(&self, input: &Tensor, see: &mut See<'_>) -> Result<Tensor> {
        let attended = self.attention.forward(&self.before.forward(input)?)?;
        see("mid.attn_1", &attended);
        let out = self.after.forward(&attended)?;
        see("mid.block_2", &out);
        Ok(out)
    }
}

/// The blocks of one level: residuals, each with attention behind it at the lowest level.
#[derive(Debug)]
pub(super) struct Level {
    blocks: Vec<(Residual, Option<PixelAttention>)>,
}

impl Level {
    pub fn build(
        source: &mut Source<'_, '_>,
        name: &str,
        (mut inside, out): (i64, i64),
        blocks: i64,
        attends: bool,
    ) -> Result<Self> {
        let mut level = Self { blocks: Vec::new() };
        for block in 0..blocks {
            let residual = Residual::build(source, &format!("{name}.block.{block}"), (inside, out))?;
            let attention =
                attends.then(|| PixelAttention::build(source, &format!("{name}.attn.{block}"), out)).transpose()?;
            level.blocks.push((residual, attention));
            inside = out;
        }
        Ok(level)
    }

    pub fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let mut hidden = input.shallow_clone();
        for (residual, attention) in &self.blocks {
            hidden = residual.forward(&hidden)?;
            if let Some(attention) = attention {
                hidden = attention.forward(&hidden)?;
            }
        }
        Ok(hidden)
    }
}

/// Is shown what a pass computes on its way, by the reference's names of the parts: `conv_in`, `level.0`, `mid.attn_1`.
pub type See<'a> = dyn FnMut(&str, &Tensor) + 'a;

/// The sizes of an image or of features.
pub(super) fn four_axes(image: &Tensor) -> Result<[i64; 4]> {
    <[i64; 4]>::try_from(image.size()).map_err(|size| {
        Error::Failed(format!("images: expected four axes (images, channels, rows, columns), got {size:?}"))
    })
}
