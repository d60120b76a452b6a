//! The multi-scale residual quantiser: an image's features as maps of codes, a small map first, each of what is left.
//!
//! Reference: `models/quant.py` of FoundationVision/VAR at 78b95394fc5896192e3a003e4b295f8ea743c48f. Everything here gives a
//! new value: what was handed in is never written to, so a state that somebody has committed stays what it is, whatever is
//! drafted upon it. (The reference adds to its argument in place.)

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::models::family::{GetTensor, Shapes};
use crate::models::limits;
use crate::nn::conv::{Conv2d, area_resize, bicubic_resize};

/// Most scales of an image.
const MOST_SCALES: usize = 256;
/// Most patches along a side.
const MOST_PATCHES: i64 = 1024;
/// Below this share, the reference leaves the convolutions out.
const LEAST_SHARE: f64 = 1e-6;

/// Which convolutions ("phi") there are, and how scales share them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PhiSharing {
    /// One for every scale (`share_quant_resi` 1).
    One,
    /// So many, each for neighbouring scales (`share_quant_resi` 2 and more).
    Several(usize),
    /// Nothing is shared (`share_quant_resi` 0): one for each scale, or so many as `default_qresi_counts` says.
    Own(usize),
}

impl PhiSharing {
    /// How many convolutions.
    pub fn count(self) -> usize {
        match self {
            Self::One => 1,
            Self::Several(count) | Self::Own(count) => count,
        }
    }

    /// Which one a scale uses, from 0: the one whose tick is nearest to the scale's place between 0 and 1.
    ///
    /// Ticks lie evenly, as `numpy.linspace` computes them in float64. Where two are equally near the first counts, and
    /// the last bit of a tick decides whether they are, so the arithmetic is numpy's, operation by operation.
    pub fn index(self, scale: usize, scales: usize) -> usize {
        if self == Self::One {
            return 0;
        }
        let place = scale as f64 / (scales.max(2) - 1) as f64;
        let mut nearest = (0, f64::INFINITY);
        for (index, tick) in self.ticks().into_iter().enumerate() {
            let distance = (tick - place).abs();
            if distance < nearest.1 {
                nearest = (index, distance);
            }
        }
        nearest.0
    }

    /// Where each convolution stands between 0 and 1.
    pub fn ticks(self) -> Vec<f64> {
        let count = self.count();
        let first = if count == 4 { 1.0 / 3.0 / 4.0 } else { 1.0 / 2.0 / count as f64 };
        let last = 1.0 - first;
        let step = (last - first) / (count.max(2) - 1) as f64;
        let tick = |index: usize| index as f64 * step + first;
        (0..count).map(|index| if index + 1 == count && count > 1 { last } else { tick(index) }).collect()
    }

    /// Name of a convolution behind the quantiser's prefix.
    fn name(self, index: usize) -> String {
        match self {
            Self::One => "quant_resi.qresi".to_owned(),
            Self::Several(_) => format!("quant_resi.qresi_ls.{index}"),
            Self::Own(_) => format!("quant_resi.{index}"),
        }
    }
}

/// What a quantiser is.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizerConfig {
    /// `V`
    pub vocab_size: i64,
    /// `C`
    pub z_channels: i64,
    /// Patches along each side, scale by scale. The last scale has those of the encoder's output.
    pub patch_nums: Vec<i64>,
    /// The convolutions.
    pub sharing: PhiSharing,
    /// How much of a convolution's output is mixed with its input, whatever the sign; next to 0 there are no convolutions.
    pub quant_resi: f64,
}

impl QuantizerConfig {
    /// Refuses what no quantiser can be.
    pub fn check(&self) -> Result<(), String> {
        limits::within(&[
            ("vocab_size", self.vocab_size, limits::MOST_TOKENS),
            ("z_channels", self.z_channels, limits::WIDEST),
        ])?;
        let scales = self.patch_nums.len();
        if !(2..=MOST_SCALES).contains(&scales) {
            return Err(format!("`patch_nums`: expected from 2 to {MOST_SCALES} scales, got {scales}"));
        }
        limits::within(&[("patch_nums", self.side(), MOST_PATCHES)])?;
        if let Some(wrong) = self.patch_nums.iter().find(|&&patches| !(1..=self.side()).contains(&patches)) {
            return Err(format!("`patch_nums`: expected from 1 to {} of the last scale, got {wrong}", self.side()));
        }
        if !(1..=MOST_SCALES).contains(&self.sharing.count()) {
            let count = self.sharing.count();
            return Err(format!("`share_quant_resi`: expected at most {MOST_SCALES} convolutions, got {count}"));
        }
        match self.quant_resi.is_finite() {
            true => Ok(()),
            false => Err(format!("`quant_resi`: expected a finite number, got {}", self.quant_resi)),
        }
    }

    /// `S`
    pub fn scales(&self) -> usize {
        self.patch_nums.len()
    }

    /// `P`
    pub fn side(&self) -> i64 {
        self.patch_nums.last().copied().unwrap_or(0)
    }

    /// Whether there are convolutions.
    pub fn has_phi(&self) -> bool {
        self.quant_resi.abs() > LEAST_SHARE
    }

    /// Every tensor under the reference's name, behind `prefix` (`"quantize."` in a file of a whole model).
    pub fn tensors(&self, prefix: &str) -> Shapes {
        let channels = self.z_channels;
        let mut shapes = vec![(format!("{prefix}embedding.weight"), vec![self.vocab_size, channels])];
        for index in (0..self.sharing.count()).filter(|_| self.has_phi()) {
            let name = self.sharing.name(index);
            shapes.push((format!("{prefix}{name}.weight"), vec![channels, channels, 3, 3]));
            shapes.push((format!("{prefix}{name}.bias"), vec![channels]));
        }
        shapes
    }
}

/// What encoding gives, scale by scale.
#[derive(Debug)]
pub struct Encoded {
    /// The maps of codes, `[B, pn * pn]` int64 each, row by row of the image.
    pub indices: Vec<Tensor>,
    /// What the codes of this scale and all before it stand for, `[B, C, P, P]` each.
    pub f_hat: Vec<Tensor>,
}

/// What quantising gives in training.
#[derive(Debug)]
pub struct Quantized {
    /// `[B, C, P, P]`: the codes' value, with the gradient of the features (straight through).
    pub f_hat: Tensor,
    /// A number: the mean over scales of how far codes and features are apart.
    pub loss: Tensor,
    /// The maps of codes, `[B, pn * pn]` int64 each.
    pub indices: Vec<Tensor>,
    /// What was looked up at each scale, `[B * pn * pn, C]` each, without gradients.
    pub looked_up: Vec<Tensor>,
}

/// The quantiser: a codebook, the convolutions, and the sizes of the maps. It has no state.
#[derive(Debug)]
pub struct Quantizer {
    config: QuantizerConfig,
    /// `[V, C]`
    embedding: Tensor,
    /// `[C, C, 3, 3]` each
    phi: Vec<Conv2d>,
    /// For each scale its convolution.
    phi_of: Vec<usize>,
}

impl Quantizer {
    /// A quantiser from its tensors, which are asked for by their names behind `prefix`.
    pub fn build(config: QuantizerConfig, prefix: &str, tensor: &mut GetTensor<'_>) -> Result<Self> {
        config.check().map_err(Error::Failed)?;
        let shapes = config.tensors(prefix);
        let mut tensors = Vec::with_capacity(shapes.len());
        for (name, shape) in &shapes {
            tensors.push(tensor(name, shape)?);
        }
        let mut tensors = tensors.into_iter();
        let absent = || Error::Failed(format!("`{prefix}embedding.weight` was not given"));
        let embedding = tensors.next().ok_or_else(absent)?;
        let mut phi = Vec::new();
        while let (Some(weight), Some(bias)) = (tensors.next(), tensors.next()) {
            phi.push(Conv2d::same(weight, bias));
        }
        let phi_of = (0..config.scales()).map(|scale| config.sharing.index(scale, config.scales())).collect();
        Ok(Self { config, embedding, phi, phi_of })
    }

    /// What it is.
    pub fn config(&self) -> &QuantizerConfig {
        &self.config
    }

    /// The codebook, `[V, C]`.
    pub fn embedding(&self) -> &Tensor {
        &self.embedding
    }

    /// Patches along each side at a scale; a scale that is not there is an error.
    pub fn patches(&self, scale: usize) -> Result<i64> {
        self.config.patch_nums.get(scale).copied().ok_or_else(|| {
            let last = self.config.scales() - 1;
            Error::Failed(format!("scale {scale}: expected from 0 to {last}, the scales of this quantiser"))
        })
    }

    /// What no code stands for yet: zeros `[B, C, P, P]`.
    pub fn empty(&self, images: i64) -> Tensor {
        let (channels, side) = (self.config.z_channels, self.config.side());
        Tensor::zeros([images, channels, side, side], (self.kind(), self.device()))
    }

    /// What the codes of one scale stand for: `indices [B, pn * pn]` int64 to `[B, C, P, P]`. A code outside the codebook is
    /// an error.
    pub fn residual(&self, scale: usize, indices: &Tensor) -> Result<Tensor> {
        let patches = self.patches(scale)?;
        let images = self.check_map(scale, indices)?;
        let codes = Tensor::f_embedding(&self.embedding, indices, -1, false, false)?; // [B, pn * pn, C]
        let codes = codes.transpose(1, 2).reshape([images, self.config.z_channels, patches, patches]);
        let codes = match scale + 1 == self.config.scales() {
            true => codes,
            false => bicubic_resize(&codes, self.config.side())?, // [B, C, P, P]
        };
        self.phi(scale, &codes)
    }

    /// `f_hat [B, C, P, P]` with one more scale, `indices [B, pn * pn]` int64: a new tensor of the same shape. Summed scale by
    /// scale from [`Quantizer::empty`], the result is the same to the bit whoever sums.
    pub fn add_scale(&self, f_hat: &Tensor, scale: usize, indices: &Tensor) -> Result<Tensor> {
        let images = self.check_features(f_hat)?;
        let codes = self.residual(scale, indices)?; // [B, C, P, P]
        if codes.size().first() != Some(&images) {
            let got = indices.size();
            return Err(Error::Failed(format!("scale {scale}: expected codes of {images} images, got shape {got:?}")));
        }
        Ok(f_hat.f_add(&codes)?)
    }

    /// What a model reads for scale `scale + 1` once `f_hat [B, C, P, P]` holds all scales up to `scale`: the means of its
    /// patches, `[B, C, pn, pn]` with `pn` of scale `scale + 1`. Behind the last scale there is nothing to read: an error.
    pub fn next_input(&self, f_hat: &Tensor, scale: usize) -> Result<Tensor> {
        self.check_features(f_hat)?;
        area_resize(f_hat, self.patches(scale + 1)?)
    }

    /// What all scales up to the last given one stand for: `indices[s] [B, pn * pn]` to `[B, C, P, P]`.
    pub fn f_hat_of(&self, indices: &[Tensor]) -> Result<Tensor> {
        let first = indices.first().ok_or_else(|| Error::Failed("no map of codes was given".to_owned()))?;
        let mut f_hat = self.empty(first.size().first().copied().unwrap_or(0));
        for (scale, map) in indices.iter().enumerate() {
            f_hat = self.add_scale(&f_hat, scale, map)?;
        }
        Ok(f_hat)
    }

    /// What a model reads for the scales behind the first when the maps are known: `indices[s] [B, pn * pn]` of the first
    /// scales, as many as there are, to `[B, L, C]`, with `L` the patches of scales 1 to the number of maps. All maps, or all
    /// but the last, give every input there is.
    pub fn idx_to_var_input(&self, indices: &[Tensor]) -> Result<Tensor> {
        let first = indices.first().ok_or_else(|| Error::Failed("no map of codes was given".to_owned()))?;
        let scales = self.config.scales();
        if indices.len() > scales {
            return Err(Error::Failed(format!("expected at most {scales} maps of codes, got {}", indices.len())));
        }
        let mut f_hat = self.empty(first.size().first().copied().unwrap_or(0));
        let mut inputs = Vec::new();
        for (scale, map) in indices.iter().enumerate().take(scales - 1) {
            f_hat = self.add_scale(&f_hat, scale, map)?;
            inputs.push(self.next_input(&f_hat, scale)?.flatten(2, 3).transpose(1, 2)); // [B, pn * pn, C]
        }
        Ok(Tensor::f_cat(&inputs, 1)?)
    }

    /// The maps of an encoder's output `f [B, C, P, P]`: at every scale the nearest codes of what the scales before it leave.
    pub fn encode(&self, f: &Tensor) -> Result<Encoded> {
        let images = self.check_features(f)?;
        let mut encoded = Encoded { indices: Vec::new(), f_hat: Vec::new() };
        let (mut rest, mut f_hat) = (f.shallow_clone(), self.empty(images));
        for scale in 0..self.config.scales() {
            let (indices, _) = self.nearest(scale, &rest)?;
            let codes = self.residual(scale, &indices)?;
            rest = rest.f_sub(&codes)?;
            f_hat = f_hat.f_add(&codes)?;
            encoded.indices.push(indices);
            encoded.f_hat.push(f_hat.shallow_clone());
        }
        Ok(encoded)
    }

    /// Quantises `f [B, C, P, P]` for training (`VectorQuantizer2.forward` there).
    ///
    /// The loss is the mean over scales of `beta * mse(f_hat fixed, f) + mse(f_hat, f fixed)` with `f_hat` of the scales so far:
    /// the first term draws the features to their codes, the second codes and convolutions to the features.
    pub fn quantize(&self, f: &Tensor, beta: f64) -> Result<Quantized> {
        let images = self.check_features(f)?;
        let fixed = f.detach();
        let mut f_hat = self.empty(images);
        let (mut indices, mut looked_up) = (Vec::new(), Vec::new());
        let mut loss = Tensor::zeros([], (self.kind(), self.device()));
        let mut rest = fixed.shallow_clone();
        for scale in 0..self.config.scales() {
            let (map, rows) = self.nearest(scale, &rest)?;
            let codes = self.residual(scale, &map)?;
            rest = rest.f_sub(&codes.detach())?;
            f_hat = f_hat.f_add(&codes)?;
            let commitment = f_hat.detach().f_mse_loss(f, tch::Reduction::Mean)? * beta;
            loss += commitment + f_hat.f_mse_loss(&fixed, tch::Reduction::Mean)?;
            indices.push(map);
            looked_up.push(rows);
        }
        let f_hat = (f_hat.detach() - &fixed) + f; // the value of f_hat, the gradient of f
        Ok(Quantized { f_hat, loss: loss / self.config.scales() as f64, indices, looked_up })
    }

    /// The nearest code of every patch of `rest [B, C, P, P]` at a scale: `[B, pn * pn]` int64, and the patches,
    /// `[B * pn * pn, C]`.
    fn nearest(&self, scale: usize, rest: &Tensor) -> Result<(Tensor, Tensor)> {
        let _guard = tch::no_grad_guard();
        let patches = self.patches(scale)?;
        let rest = match scale + 1 == self.config.scales() {
            true => rest.shallow_clone(),
            false => area_resize(rest, patches)?, // [B, C, pn, pn]
        };
        let images = rest.size().first().copied().unwrap_or(0);
        let rows = rest.permute([0, 2, 3, 1]).reshape([-1, self.config.z_channels]); // [B * pn * pn, C]
        let squares = |rows: &Tensor, keep| rows.square().sum_dim_intlist([1i64].as_slice(), keep, rows.kind());
        // |a - b|^2 written out: one product of matrices in place of a difference for every pair.
        let products = rows.f_matmul(&self.embedding.transpose(0, 1))?; // [B * pn * pn, V]
        let distances = squares(&rows, true) + squares(&self.embedding, false) - products * 2.0;
        Ok((distances.argmin(1, false).view([images, patches * patches]), rows))
    }

    /// A scale's convolution mixed with its input: `[B, C, P, P]` both.
    fn phi(&self, scale: usize, codes: &Tensor) -> Result<Tensor> {
        let phi = self.phi_of.get(scale).and_then(|&index| self.phi.get(index));
        let Some(phi) = phi else { return Ok(codes.shallow_clone()) };
        let share = self.config.quant_resi.abs();
        Ok(codes * (1.0 - share) + phi.forward(codes)? * share)
    }

    /// Refuses features of another shape than `[B, C, P, P]`; gives `B`.
    pub(super) fn check_features(&self, f: &Tensor) -> Result<i64> {
        let (channels, side) = (self.config.z_channels, self.config.side());
        match *f.size() {
            [images, c, h, w] if [c, h, w] == [channels, side, side] && f.kind() == self.kind() => Ok(images),
            _ => Err(Error::Failed(format!(
                "features: expected [images, {channels}, {side}, {side}] of {:?}, got {:?} of {:?}",
                self.kind(),
                f.size(),
                f.kind()
            ))),
        }
    }

    /// Refuses a map of another shape than `[B, pn * pn]`; gives `B`.
    fn check_map(&self, scale: usize, indices: &Tensor) -> Result<i64> {
        let patches = self.patches(scale)?;
        match *indices.size() {
            [images, count] if count == patches * patches && indices.kind() == Kind::Int64 => Ok(images),
            _ => Err(Error::Failed(format!(
                "codes of scale {scale}: expected [images, {}] of Int64, got {:?} of {:?}",
                patches * patches,
                indices.size(),
                indices.kind()
            ))),
        }
    }

    /// Element type.
    pub fn kind(&self) -> Kind {
        self.embedding.kind()
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        self.embedding.device()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::noise;

    fn config(sharing: PhiSharing) -> QuantizerConfig {
        QuantizerConfig { vocab_size: 11, z_channels: 5, patch_nums: vec![1, 2, 4], sharing, quant_resi: 0.5 }
    }

    fn quantizer(sharing: PhiSharing) -> Quantizer {
        let mut stream = 0;
        let mut tensor = |_: &str, shape: &[i64]| {
            stream += 1;
            Ok(noise::normal(shape, 0.3, 7, stream))
        };
        Quantizer::build(config(sharing), "quantize.", &mut tensor).unwrap()
    }

    /// Two images.
    fn maps() -> Vec<Tensor> {
        let map = |count: i64, step: i64| {
            Tensor::arange(2 * count, (Kind::Int64, Device::Cpu)).g_mul_scalar(step).remainder(11).view([2, count])
        };
        vec![map(1, 3), map(4, 5), map(16, 7)]
    }

    /// What VAR's ten scales use, two of them by the last bit of a tick.
    #[test]
    fn ticks_are_those_of_numpy() {
        let used = |sharing: PhiSharing, scales| (0..scales).map(|s| sharing.index(s, scales)).collect::<Vec<_>>();
        assert_eq!(used(PhiSharing::Several(4), 10), [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]);
        assert_eq!(used(PhiSharing::One, 3), [0, 0, 0]);
        assert_eq!(used(PhiSharing::Own(10), 10), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(PhiSharing::Several(2).ticks(), [0.25, 0.75]);
    }

    #[test]
    fn names_are_the_references() {
        let names =
            |sharing| config(sharing).tensors("quantize.").into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(
            names(PhiSharing::One),
            ["quantize.embedding.weight", "quantize.quant_resi.qresi.weight", "quantize.quant_resi.qresi.bias"]
        );
        assert_eq!(names(PhiSharing::Several(4))[7], "quantize.quant_resi.qresi_ls.3.weight");
        assert_eq!(names(PhiSharing::Own(3))[6], "quantize.quant_resi.2.bias");
        let none = QuantizerConfig { quant_resi: 0.0, ..config(PhiSharing::Own(3)) };
        assert_eq!(none.tensors("").len(), 1);
    }

    #[test]
    fn a_state_that_was_handed_in_stays_what_it_is() {
        let quantizer = quantizer(PhiSharing::Several(2));
        let maps = maps();
        let committed = quantizer.f_hat_of(&maps[..1]).unwrap();
        let before = committed.copy();
        let drafted = quantizer.add_scale(&committed, 1, &maps[1]).unwrap();
        assert_eq!(quantizer.next_input(&drafted, 1).unwrap().size(), [2, 5, 4, 4]);
        assert!(committed.equal(&before) && !drafted.equal(&before));
        assert!(drafted.equal(&quantizer.f_hat_of(&maps[..2]).unwrap()));
    }

    #[test]
    fn inputs_of_known_maps_are_those_of_each_step() {
        let quantizer = quantizer(PhiSharing::Own(3));
        let maps = maps();
        let inputs = quantizer.idx_to_var_input(&maps).unwrap();
        assert_eq!(inputs.size(), [2, 20, 5]);
        assert!(quantizer.idx_to_var_input(&maps[..2]).unwrap().equal(&inputs));
        assert!(quantizer.idx_to_var_input(&maps[..1]).unwrap().equal(&inputs.narrow(1, 0, 4)));
        let second = quantizer.next_input(&quantizer.f_hat_of(&maps[..2]).unwrap(), 1).unwrap();
        assert!(second.flatten(2, 3).transpose(1, 2).equal(&inputs.narrow(1, 4, 16)));
    }

    /// Without convolutions the last scale's code is the nearest of what the others leave, found here pair by pair.
    #[test]
    fn codes_are_the_nearest_of_what_is_left() {
        let mut stream = 0;
        let mut tensor = |_: &str, shape: &[i64]| {
            stream += 1;
            Ok(noise::normal(shape, 1.0, 3, stream))
        };
        let plain = QuantizerConfig { quant_resi: 0.0, ..config(PhiSharing::One) };
        let quantizer = Quantizer::build(plain, "", &mut tensor).unwrap();
        let f = noise::normal(&[2, 5, 4, 4], 2.0, 4, 1);
        let encoded = quantizer.encode(&f).unwrap();
        assert!(encoded.f_hat[2].equal(&quantizer.f_hat_of(&encoded.indices).unwrap()));
        let rest = (&f - &encoded.f_hat[1]).permute([0, 2, 3, 1]).reshape([32, 1, 5]);
        let distances =
            (rest - quantizer.embedding().unsqueeze(0)).square().sum_dim_intlist([2i64].as_slice(), false, None);
        assert!(distances.argmin(1, false).equal(&encoded.indices[2].flatten(0, -1)));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let quantizer = quantizer(PhiSharing::One);
        let (maps, empty) = (maps(), quantizer.empty(2));
        let said = |result: Result<Tensor>| result.unwrap_err().to_string();
        assert!(said(quantizer.add_scale(&empty, 3, &maps[2])).contains("scale 3: expected from 0 to 2"));
        assert!(said(quantizer.add_scale(&empty, 1, &maps[2])).contains("codes of scale 1: expected [images, 4]"));
        assert!(said(quantizer.add_scale(&quantizer.empty(3), 1, &maps[1])).contains("codes of 3 images"));
        assert!(quantizer.add_scale(&empty, 1, &(&maps[1] + 11)).is_err());
        assert!(said(quantizer.next_input(&empty, 2)).contains("scale 3"));
        assert!(said(quantizer.next_input(&empty.narrow(2, 0, 3), 0)).contains("features: expected [images, 5, 4, 4]"));
        assert!(said(quantizer.idx_to_var_input(&[])).contains("no map"));
        let wrong = |patch_nums: &[i64]| {
            QuantizerConfig { patch_nums: patch_nums.to_vec(), ..config(PhiSharing::One) }.check().unwrap_err()
        };
        assert!(wrong(&[4]).contains("from 2 to"));
        assert!(wrong(&[1, 5, 4]).contains("from 1 to 4 of the last scale, got 5"));
        assert!(wrong(&[1, 0]).contains("patch_nums"));
        assert!(wrong(&[1, 1 << 40]).contains("patch_nums"));
    }
}
