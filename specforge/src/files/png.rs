//! Writes PNG files (ISO/IEC 15948:2004, <https://www.w3.org/TR/png-3/>): images of 8 bits a colour, one or many on a sheet.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::write_file;
use crate::error::{Error, Result};

/// Colours of a pixel: red, green, blue.
const COLOURS: usize = 3;
/// Longest side: sizes in bytes then fit 64 bits, and most programs refuse larger ones.
const LONGEST_SIDE: usize = 1 << 16;
/// Pixels between the images of a sheet, and around them.
const GAP: i64 = 2;

/// Pixels of an image, row by row: red, green, blue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pixels {
    width: usize,
    height: usize,
    bytes: Vec<u8>,
}

impl Pixels {
    /// An image `[3, h, w]` of numbers from 0 to 1; what lies outside is cut, NaN is refused. Rounds to the nearest of 256.
    pub fn of(image: &Tensor) -> Result<Self> {
        let [colours, height, width] = <[i64; 3]>::try_from(image.size())
            .map_err(|size| Error::Failed(format!("an image to write: expected [3, h, w], got {size:?}")))?;
        let side = |size: i64| usize::try_from(size).ok().filter(|size| (1..=LONGEST_SIDE).contains(size));
        let (COLOURS, Some(height), Some(width)) = (colours as usize, side(height), side(width)) else {
            let problem = format!(
                "an image to write: expected three colours and sides from 1 to {LONGEST_SIDE}, got {:?}",
                image.size()
            );
            return Err(Error::Failed(problem));
        };
        let image = image.f_to_device(Device::Cpu)?.f_detach()?.f_to_kind(Kind::Float)?;
        if bool::try_from(image.f_isnan()?.f_any()?)? {
            return Err(Error::Failed("an image to write holds NaN".to_owned()));
        }
        let bytes = (image.clamp(0.0, 1.0) * 255.0).round().f_to_kind(Kind::Uint8)?.permute([1, 2, 0]); // [h, w, 3]
        let bytes = Vec::<u8>::try_from(bytes.f_contiguous()?.view([-1]))?;
        Ok(Self { width, height, bytes })
    }

    /// Images `[B, 3, h, w]` of numbers from 0 to 1, side by side on white, so many in a row.
    pub fn sheet(images: &Tensor, columns: i64) -> Result<Self> {
        let [count, colours, height, width] = <[i64; 4]>::try_from(images.size())
            .map_err(|size| Error::Failed(format!("images to write: expected [images, 3, h, w], got {size:?}")))?;
        if count < 1 || columns < 1 {
            return Err(Error::Failed(format!("images to write: {count} in rows of {columns}")));
        }
        let columns = columns.min(count);
        let rows = (count + columns - 1) / columns;
        let (step_down, step_right) = (height + GAP, width + GAP);
        let size = [colours, rows * step_down + GAP, columns * step_right + GAP];
        // Before anything is made as large.
        if size.iter().any(|&side| side > LONGEST_SIDE as i64) {
            return Err(Error::Failed(format!(
                "a sheet of {count} images would have {} x {} pixels",
                size[2], size[1]
            )));
        }
        let sheet = Tensor::ones(size, (Kind::Float, Device::Cpu));
        for place in 0..count {
            let (top, left) = (GAP + place / columns * step_down, GAP + place % columns * step_right);
            let mut room = sheet.narrow(1, top, height).narrow(2, left, width);
            room.f_copy_(&images.f_select(0, place)?.f_detach()?)?;
        }
        Self::of(&sheet)
    }

    /// The file.
    pub fn to_png(&self) -> std::io::Result<Vec<u8>> {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.bytes)?;
        writer.finish()?;
        Ok(file)
    }

    /// Writes the file, at once.
    pub fn write(&self, path: &Path) -> Result<()> {
        let file = self.to_png().map_err(Error::io("compress", path))?;
        write_file(path, |writer| writer.write_all(&file))
    }
}

/// Writes one image `[3, h, w]` of numbers from 0 to 1.
pub fn write_image(path: &Path, image: &Tensor) -> Result<()> {
    Pixels::of(image)?.write(path)
}

/// Writes images `[B, 3, h, w]` of numbers from 0 to 1 as one sheet, so many in a row.
pub fn write_sheet(path: &Path, images: &Tensor, columns: i64) -> Result<()> {
    Pixels::sheet(images, columns)?.write(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_holds_the_pixels() {
        let image = Tensor::arange(3 * 2 * 4, (Kind::Float, Device::Cpu)).view([3, 2, 4]) / 23.0;
        let file = Pixels::of(&image).unwrap().to_png().unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().unwrap();
        let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut bytes).unwrap();
        assert_eq!((info.width, info.height), (4, 2));
        assert_eq!((info.color_type, info.bit_depth), (png::ColorType::Rgb, png::BitDepth::Eight));
        for (place, byte) in bytes.into_iter().enumerate() {
            let (colour, pixel) = (place % 3, place / 3);
            assert_eq!(byte, ((colour * 8 + pixel) as f32 / 23.0 * 255.0).round() as u8);
        }
    }

    #[test]
    fn a_sheet_has_every_image_in_its_place() {
        let images = Tensor::arange(3, (Kind::Float, Device::Cpu)).view([3, 1, 1, 1]).expand([3, 3, 4, 5], false) / 4.0;
        let sheet = Pixels::sheet(&images, 2).unwrap();
        assert_eq!((sheet.width, sheet.height), (2 * 7 + 2, 2 * 6 + 2));
        let at = |row: usize, column: usize| sheet.bytes[(row * sheet.width + column) * 3];
        assert_eq!([at(2, 2), at(2, 9), at(8, 2), at(8, 9)], [0, 64, 128, 255]);
        assert_eq!([at(0, 0), at(5, 6), at(5, 7), at(6, 2)], [255, 0, 255, 255]);
        // Fewer images than columns: no wider than needed.
        assert_eq!(Pixels::sheet(&images, 9).unwrap().width, 3 * 7 + 2);
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let of = |shape: &[i64]| Pixels::of(&Tensor::zeros(shape, (Kind::Float, Device::Cpu)));
        for shape in [&[3, 2][..], &[1, 2, 2], &[3, 0, 2], &[3, 1, 1 << 17]] {
            assert!(of(shape).unwrap_err().to_string().contains("expected"), "{shape:?}");
        }
        let image = Tensor::zeros([3, 1, 1], (Kind::Float, Device::Cpu));
        assert!(Pixels::of(&(&image / 0.0)).unwrap_err().to_string().contains("NaN"));
        // Beyond the range: cut.
        assert_eq!(Pixels::of(&(image - 7.0)).unwrap().bytes, [0, 0, 0]);
        let many = Tensor::zeros([1, 3, 1, 1], (Kind::Float, Device::Cpu)).expand([1 << 16, 3, 1, 1], false);
        assert!(Pixels::sheet(&many, 1 << 16).unwrap_err().to_string().contains("pixels"));
        assert!(Pixels::sheet(&many.narrow(0, 0, 0), 1).is_err() && Pixels::sheet(&many, 0).is_err());
    }

    #[test]
    fn a_file_appears_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let images = Tensor::rand([2, 3, 8, 8], (Kind::Float, Device::Cpu));
        write_sheet(&path, &images, 2).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), Pixels::sheet(&images, 2).unwrap().to_png().unwrap());
        write_image(&path, &images.get(0)).unwrap();
        assert!(write_image(&path.join("b.png"), &images.get(0)).is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
