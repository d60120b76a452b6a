//! Convolutions over images.
//!
//! Shape legend of everything about images: `B` images, `C` channels, `h` rows and `w` columns of pixels or patches.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// A convolution over two axes in PyTorch's layout, with a step of one and zeros around the image, as many as keep its
/// size, unless said otherwise.
#[derive(Debug)]
pub struct Conv2d {
    /// `[out, in, k, k]`
    pub weight: Tensor,
    /// `[out]`
    pub bias: Tensor,
    /// Pixels from one place of the kernel to the next.
    pub stride: i64,
    /// Rows and columns of zeros on each side.
    pub padding: i64,
}

impl Conv2d {
    /// One that keeps an image's size, for a kernel of odd width.
    pub fn same(weight: Tensor, bias: Tensor) -> Self {
        let padding = weight.size().last().map_or(0, |width| width / 2);
        Self { weight, bias, stride: 1, padding }
    }

    /// `[B, in, h, w]` to `[B, out, h', w']`. An image of other channels is an error.
    pub fn forward(&self, image: &Tensor) -> Result<Tensor> {
        let (step, zeros) = ([self.stride; 2], [self.padding; 2]);
        Ok(image.f_conv2d(&self.weight, Some(&self.bias), step, zeros, [1i64; 2], 1)?)
    }

    /// Element type.
    pub fn kind(&self) -> Kind {
        self.weight.kind()
    }
}

/// The mean of every patch of `size * size`: `[B, C, h, w]` to `[B, C, size, size]`, patches as
/// `torch.nn.functional.interpolate(mode="area")` cuts them.
pub fn area_resize(image: &Tensor, size: i64) -> Result<Tensor> {
    Ok(image.f_adaptive_avg_pool2d([size; 2])?)
}

/// Bicubic interpolation to `[B, C, size, size]`, corners not aligned, as
/// `torch.nn.functional.interpolate(mode="bicubic")` does it.
pub fn bicubic_resize(image: &Tensor, size: i64) -> Result<Tensor> {
    Ok(image.f_upsample_bicubic2d([size; 2], false, None, None)?)
}

/// Every pixel as four: `[B, C, h, w]` to `[B, C, 2h, 2w]`.
pub fn nearest_double(image: &Tensor) -> Result<Tensor> {
    let [_, _, rows, columns] = <[i64; 4]>::try_from(image.size()).map_err(|size| {
        Error::Failed(format!("images: expected four axes (images, channels, rows, columns), got {size:?}"))
    })?;
    Ok(image.f_upsample_nearest2d([2 * rows, 2 * columns], None, None)?)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::nn::drawn;

    #[test]
    fn a_convolution_is_the_sum_written_out() {
        drawn::seed(1);
        let options = (Kind::Double, Device::Cpu);
        let (image, weight, bias) =
            (drawn::randn([1, 2, 4, 5], options), drawn::randn([3, 2, 3, 3], options), drawn::randn([3], options));
        let conv = Conv2d::same(weight.shallow_clone(), bias.shallow_clone());
        let got = conv.forward(&image).unwrap();
        assert_eq!(got.size(), [1, 3, 4, 5]);
        // At row 0 and column 2 the kernel's first row lies outside.
        let seen = image.narrow(2, 0, 2).narrow(3, 1, 3).select(0, 0); // [2, 2, 3]
        let want = (weight.select(0, 1).narrow(1, 1, 2) * seen).sum(Kind::Double) + bias.get(1);
        assert!((got.double_value(&[0, 1, 0, 2]) - want.double_value(&[])).abs() < 1e-12);
        assert!(conv.forward(&image.narrow(1, 0, 1)).is_err());
    }

    #[test]
    fn areas_are_means_and_doubling_repeats() {
        let image = Tensor::arange(9, (Kind::Double, Device::Cpu)).view([1, 1, 3, 3]);
        assert_eq!(area_resize(&image, 1).unwrap().double_value(&[0, 0, 0, 0]), 4.0);
        // Patches of three on two overlap: rows 0 and 1, columns 1 and 2.
        assert_eq!(area_resize(&image, 2).unwrap().double_value(&[0, 0, 0, 1]), 3.0);
        let doubled = nearest_double(&image).unwrap();
        assert_eq!((doubled.size(), doubled.double_value(&[0, 0, 3, 5])), (vec![1, 1, 6, 6], 5.0));
        assert!(nearest_double(&image.view([9])).is_err());
        assert_eq!(bicubic_resize(&image, 5).unwrap().size(), [1, 1, 5, 5]);
    }
}
