//! What the device can do at best: the rate of large matrix products, and the bandwidth of large copies. Measured, not
//! read from a data sheet, so that a share of it means the same on every card.

use std::time::Instant;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::device;
use crate::error::Result;

/// Sizes of the measurements.
#[derive(Debug, Clone, Copy)]
pub struct CeilingSizes {
    /// Rows and columns of the bfloat16 matrices.
    pub bfloat16: i64,
    /// Rows and columns of the float32 matrices.
    pub float32: i64,
    /// Bytes copied.
    pub copy_bytes: i64,
    /// Products and copies between two looks at the clock.
    pub batch: u32,
    /// Looks at the clock.
    pub repeats: u32,
}

impl CeilingSizes {
    /// Sizes that fill a card.
    pub const FULL: Self = Self { bfloat16: 8192, float32: 4096, copy_bytes: 2 << 30, batch: 10, repeats: 7 };
    /// Sizes that try the code out.
    pub const QUICK: Self = Self { bfloat16: 256, float32: 256, copy_bytes: 8 << 20, batch: 2, repeats: 3 };
}

/// Medians of what was measured.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Ceilings {
    /// Rows and columns of the bfloat16 matrices.
    pub bfloat16_size: i64,
    /// Floating-point operations a second of a bfloat16 product.
    pub bfloat16_rate: f64,
    /// Rows and columns of the float32 matrices.
    pub float32_size: i64,
    /// Floating-point operations a second of a float32 product, without TF32.
    pub float32_rate: f64,
    /// Bytes read and written a second by a copy within the device's memory.
    pub copy_bandwidth: f64,
}

impl Ceilings {
    /// Operations a second of products in an element type.
    pub fn rate(&self, kind: Kind) -> f64 {
        if kind == Kind::Float { self.float32_rate } else { self.bfloat16_rate }
    }
}

/// Measures a device. Values are random: products of zeros are faster than any real ones.
pub fn measure(device: Device, sizes: CeilingSizes) -> Result<Ceilings> {
    let _guard = tch::no_grad_guard();
    let copy_bandwidth = {
        let from = Tensor::f_randn([sizes.copy_bytes / 4], (Kind::Float, device))?;
        let mut to = from.f_zeros_like()?;
        let seconds = median_seconds(device, sizes, || Ok(to.f_copy_(&from)?))?;
        2.0 * sizes.copy_bytes as f64 / seconds
    };
    Ok(Ceilings {
        bfloat16_size: sizes.bfloat16,
        bfloat16_rate: product_rate(device, Kind::BFloat16, sizes.bfloat16, sizes)?,
        float32_size: sizes.float32,
        float32_rate: product_rate(device, Kind::Float, sizes.float32, sizes)?,
        copy_bandwidth,
    })
}

fn product_rate(device: Device, kind: Kind, size: i64, sizes: CeilingSizes) -> Result<f64> {
    let random = || Tensor::f_randn([size, size], (kind, device));
    let (left, right) = (random()?, random()?);
    let product = left.f_zeros_like()?;
    let seconds = median_seconds(device, sizes, || {
        left.f_mm_out(&product, &right).map(drop)?;
        Ok(())
    })?;
    Ok(2.0 * (size as f64).powi(3) / seconds)
}

/// Median time of one run of `body`, warmed up by a batch that is not timed.
fn median_seconds(device: Device, sizes: CeilingSizes, mut body: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut times = Vec::new();
    for _ in 0..=sizes.repeats {
        device::synchronize(device);
        let started = Instant::now();
        for _ in 0..sizes.batch {
            body()?;
        }
        device::synchronize(device);
        times.push(started.elapsed().as_secs_f64() / f64::from(sizes.batch));
    }
    Ok(median(&mut times[1..]))
}

/// The middle value, or the mean of the two in the middle; NaN of nothing.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match values {
        [] => f64::NAN,
        _ => (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&mut []).is_nan());
    }

    #[test]
    fn a_cpu_has_rates_too() {
        let ceilings = measure(Device::Cpu, CeilingSizes { bfloat16: 64, float32: 64, ..CeilingSizes::QUICK }).unwrap();
        for rate in [ceilings.bfloat16_rate, ceilings.float32_rate, ceilings.copy_bandwidth] {
            assert!(rate > 1e6 && rate < 1e15, "{ceilings:?}");
        }
        assert_eq!(ceilings.rate(Kind::Float), ceilings.float32_rate);
    }
}
