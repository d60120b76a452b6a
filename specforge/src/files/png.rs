//! Writes PNG files (ISO/IEC 15948:2004, <https://www.w3.org/TR/png-3/>): images of 8 bits a colour, one or many on a sheet.

use std::io::Write;
use std::path::Path;

use flate2::Compression;
use flate2::write::ZlibEncoder;
use tch::{Device, Kind, Tensor};

use super::write_file;
use crate::error::{Error, Result};

/// Every PNG file begins with this.
const SIGNATURE: [u8; 8] = [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n'];
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
        let mut header = Vec::with_capacity(13);
        for side in [self.width, self.height] {
            header.extend((side as u32).to_be_bytes());
        }
        // 8 bits, colours without transparency, the one compression and filtering there are, not interlaced.
        header.extend([8, 2, 0, 0, 0]);
        let mut rows = ZlibEncoder::new(Vec::new(), Compression::default());
        let mut filtered = Vec::with_capacity(1 + self.width * COLOURS);
        for row in self.bytes.chunks_exact(self.width * COLOURS) {
            // Filter 1: each byte less that of the pixel on its left.
            filtered.clear();
            filtered.push(1);
            filtered.extend(row.iter().take(COLOURS));
            filtered.extend(row.iter().skip(COLOURS).zip(row).map(|(byte, left)| byte.wrapping_sub(*left)));
            rows.write_all(&filtered)?;
        }
        let mut file = SIGNATURE.to_vec();
        for (name, content) in [(b"IHDR", header), (b"IDAT", rows.finish()?), (b"IEND", Vec::new())] {
            chunk(&mut file, name, &content)?;
        }
        Ok(file)
    }

    /// Writes the file, at once.
    pub fn write(&self, path: &Path) -> Result<()> {
        let file = self.to_png().map_err(Error::io("compress", path))?;
        write_file(path, |writer| writer.write_all(&file))
    }
}

/// Length, name, content, and a checksum of the last two.
fn chunk(file: &mut Vec<u8>, name: &[u8; 4], content: &[u8]) -> std::io::Result<()> {
    let length = u32::try_from(content.len()).map_err(|_| std::io::Error::other("the image is too large for a PNG"))?;
    let mut sum = flate2::Crc::new();
    sum.update(name);
    sum.update(content);
    file.extend(length.to_be_bytes());
    file.extend(name);
    file.extend(content);
    file.extend(sum.sum().to_be_bytes());
    Ok(())
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
    use std::io::Read;

    use super::*;

    /// Chunks of a file by name, whose checksums hold.
    fn chunks(file: &[u8]) -> Vec<(String, Vec<u8>)> {
        assert_eq!(file[..8], SIGNATURE);
        let (mut rest, mut found) = (&file[8..], Vec::new());
        while !rest.is_empty() {
            let length = u32::from_be_bytes(rest[..4].try_into().unwrap()) as usize;
            let named = &rest[4..8 + length];
            // CRC-32 bit by bit.
            let sum = named.iter().fold(u32::MAX, |sum, byte| {
                (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ (0xEDB8_8320 * (sum & 1)))
            });
            assert_eq!(rest[8 + length..12 + length], (!sum).to_be_bytes());
            found.push((String::from_utf8(named[..4].to_vec()).unwrap(), named[4..].to_vec()));
            rest = &rest[12 + length..];
        }
        found
    }

    #[test]
    fn a_file_holds_the_pixels() {
        let image = Tensor::arange(3 * 2 * 4, (Kind::Float, Device::Cpu)).view([3, 2, 4]) / 23.0;
        let file = Pixels::of(&image).unwrap().to_png().unwrap();
        let chunks = chunks(&file);
        let names: Vec<&str> = chunks.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["IHDR", "IDAT", "IEND"]);
        assert_eq!(chunks[0].1, [0, 0, 0, 4, 0, 0, 0, 2, 8, 2, 0, 0, 0]);
        let mut rows = Vec::new();
        flate2::read::ZlibDecoder::new(&*chunks[1].1).read_to_end(&mut rows).unwrap();
        for (row, bytes) in rows.chunks(13).enumerate() {
            assert_eq!(bytes[0], 1);
            let mut pixel = [0u8; 3];
            for (column, differences) in bytes[1..].chunks(3).enumerate() {
                for colour in 0..3 {
                    pixel[colour] = pixel[colour].wrapping_add(differences[colour]);
                    let number = (colour * 8 + row * 4 + column) as f32 / 23.0;
                    assert_eq!(pixel[colour], (number * 255.0).round() as u8);
                }
            }
        }
        assert_eq!(rows.len(), 26);
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
