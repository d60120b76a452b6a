//! Pictures as image models take them.

use tch::{Device, Kind, Tensor};

use crate::data::GreyImages;
use crate::error::{Error, Result};

/// Some images of a file, in the middle of black squares: `[B, 3, side, side]` float32 in [-1, 1] on the CPU, three equal
/// colours.
pub fn pixels(images: &GreyImages, which: &[usize], side: i64) -> Result<Tensor> {
    let own = images.side() as i64;
    if own > side {
        return Err(Error::Failed(format!("images of {own} x {own} pixels do not fit a model of {side} x {side}")));
    }
    let mut bytes = Vec::with_capacity(which.len() * images.side() * images.side());
    for &index in which {
        if index >= images.len() {
            return Err(Error::Failed(format!("image {index}: expected from 0 to {}", images.len() - 1)));
        }
        bytes.extend_from_slice(images.image(index));
    }
    let count = which.len() as i64;
    let small = Tensor::from_slice(&bytes).to_kind(Kind::Float).view([count, 1, own, own]) / 127.5 - 1.0;
    let whole = Tensor::full([count, 1, side, side], -1.0, (Kind::Float, Device::Cpu));
    let before = (side - own) / 2;
    whole.narrow(2, before, own).narrow(3, before, own).f_copy_(&small)?;
    Ok(whole.expand([count, 3, side, side], false).contiguous())
}

#[cfg(test)]
pub(crate) fn test_images(text: &str) -> GreyImages {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("images.csv");
    std::fs::write(&path, text).unwrap();
    GreyImages::read(&path).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_stand_in_the_middle_of_black() {
        let images = test_images("0,255,51,0,1\n9,9,9,9,2\n");
        let got = pixels(&images, &[0], 5).unwrap();
        assert_eq!(got.size(), [1, 3, 5, 5]);
        let at = |row, column| got.double_value(&[0, 2, row, column]);
        // One row and column before, two behind.
        assert_eq!([at(1, 1), at(1, 2), at(0, 1), at(3, 3)], [-1.0, 1.0, -1.0, -1.0]);
        assert!((at(2, 1) + 0.6).abs() < 1e-6);
        assert_eq!(pixels(&images, &[1, 0], 2).unwrap().size(), [2, 3, 2, 2]);
        assert!(pixels(&images, &[0], 1).unwrap_err().to_string().contains("do not fit"));
        assert!(pixels(&images, &[2], 2).unwrap_err().to_string().contains("image 2"));
    }
}
