//! How far pictures are from each other: pixel by pixel, and as sets.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::models::vqvae::Vqvae;

/// Pictures whose features are computed at once.
const AT_ONCE: i64 = 64;

/// Peak signal-to-noise ratio in decibels of pixels from 0 to 1; nothing where all are equal.
pub fn psnr(one: &Tensor, other: &Tensor) -> Result<Option<f64>> {
    let mse = one.f_mse_loss(other, tch::Reduction::Mean)?.double_value(&[]);
    Ok((mse > 0.0).then(|| -10.0 * mse.log10()))
}

/// Features of pictures `[B, 3, h, w]` of pixels from 0 to 1: what the image tokenizer's encoder makes of each, averaged over
/// its patches, `[B, C]` float64.
pub fn features(tokenizer: &Vqvae, pictures: &Tensor) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let mut rows = Vec::new();
    for part in pictures.f_split(AT_ONCE, 0)? {
        let part = (part * 2.0 - 1.0).f_to_kind(tokenizer.kind())?.f_to_device(tokenizer.device())?;
        let features = tokenizer.features(&part)?; // [B, C, P, P]
        rows.push(features.f_mean_dim([2i64, 3].as_slice(), false, Kind::Double)?);
    }
    Ok(Tensor::f_cat(&rows, 0)?)
}

/// Fréchet distance between two sets of features `[N, C]` float64, each taken to be a normal distribution:
/// `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))` (Dowson and Landau 1982). With other features than Inception's it is no FID,
/// and numbers of one encoder say nothing beside those of another.
pub fn frechet(one: &Tensor, other: &Tensor) -> Result<f64> {
    let (mean_one, spread_one) = moments(one)?;
    let (mean_other, spread_other) = moments(other)?;
    // (S1 S2)^(1/2) has the trace of (R S2 R)^(1/2) with R = S1^(1/2), which is symmetric.
    let root = root(&spread_one)?;
    let product = root.f_matmul(&spread_other)?.f_matmul(&root)?;
    let (values, _) = product.f_linalg_eigh("L")?;
    let cross = values.f_clamp_min(0.0)?.f_sqrt()?.f_sum(Kind::Double)?.double_value(&[]);
    let apart = (mean_one - mean_other).f_square()?.f_sum(Kind::Double)?.double_value(&[]);
    let traces = (spread_one + spread_other).f_trace()?.double_value(&[]);
    Ok((apart + traces - 2.0 * cross).max(0.0))
}

/// Mean `[C]` and covariance `[C, C]`.
fn moments(features: &Tensor) -> Result<(Tensor, Tensor)> {
    let (count, _) = features.size2()?;
    if count < 2 {
        return Err(Error::Failed(format!("a distance between sets needs two pictures in each, got {count}")));
    }
    let mean = features.f_mean_dim([0i64].as_slice(), false, Kind::Double)?;
    let around = features - &mean;
    Ok((mean, around.f_transpose(0, 1)?.f_matmul(&around)? / (count - 1) as f64))
}

/// The symmetric root of a covariance.
fn root(spread: &Tensor) -> Result<Tensor> {
    let (values, vectors) = spread.f_linalg_eigh("L")?;
    let scaled = &vectors * values.f_clamp_min(0.0)?.f_sqrt()?; // columns
    Ok(scaled.f_matmul(&vectors.f_transpose(0, 1)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::vqvae;
    use crate::nn::noise;

    #[test]
    fn a_frechet_distance_is_its_formula() {
        let set = noise::normal(&[400, 3], 1.0, 1, 1).to_kind(Kind::Double);
        assert!(frechet(&set, &set).unwrap() < 1e-9);
        // Moved: the square of the way.
        assert!((frechet(&set, &(&set + 2.0)).unwrap() - 12.0).abs() < 1e-9);
        // Stretched: the roots of the variances differ.
        let variances = set.var_dim([0i64].as_slice(), true, false).sum(Kind::Double).double_value(&[]);
        let mean = set.mean_dim([0i64].as_slice(), false, Kind::Double);
        let stretched = (&set - &mean) * 3.0 + &mean;
        assert!((frechet(&set, &stretched).unwrap() - 4.0 * variances).abs() < 1e-9);
        assert!((frechet(&stretched, &set).unwrap() - 4.0 * variances).abs() < 1e-9);
        assert!(frechet(&set, &set.narrow(0, 0, 1)).is_err());
    }

    #[test]
    fn pixels_and_features() {
        let pictures = noise::normal(&[3, 3, 8, 8], 0.2, 1, 2).clamp(0.0, 1.0);
        assert_eq!(psnr(&pictures, &pictures).unwrap(), None);
        assert!((psnr(&pictures, &(&pictures + 0.1)).unwrap().unwrap() - 20.0).abs() < 1e-3);
        let rows = features(&vqvae::tiny(), &pictures).unwrap();
        assert_eq!((rows.size(), rows.kind()), (vec![3, 4], Kind::Double));
    }
}
