//! A digest of every byte of a set of weights, however its tensors are spread over files.
//!
//! Each tensor has a digest of its own: name, element type, shape, and the CRC-32C of its elements. Those of all tensors
//! are added up without carry, so that neither their order nor their files matter.

use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::WeightsFolder;
use super::writer::host_bytes;
use crate::error::{Error, Result};
use crate::files::{Digests, hexadecimal};

const BYTES: usize = 32;

/// The digest in hexadecimal. Files whose digest is noted are not read. `progress` is told how many bytes have been read,
/// and how many there are of all files.
pub fn digest(weights: &WeightsFolder, digests: &Digests, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<String> {
    let files = weights.by_file();
    let size = |name: &str| weights.bytes(name).map_or(0, <[u8]>::len) as u64;
    let total = files.iter().flat_map(|(_, names)| names).map(|name| size(name)).sum();
    let done = AtomicU64::new(0);
    let tensor = |name: &&str| {
        let mut checksum = 0;
        weights.read_pieces(name, |piece| {
            let bytes = host_bytes(piece);
            checksum = crc32c::crc32c_append(checksum, bytes);
            let length = bytes.len() as u64;
            progress(done.fetch_add(length, Ordering::Relaxed) + length, total);
            Ok(())
        })?;
        let (kind, shape) = (weights.kind(name), weights.shape(name));
        Ok::<_, Error>(<[u8; BYTES]>::from(Sha256::digest(format!("{name} {kind:?} {shape:?} {checksum:08x}"))))
    };
    let mut sum = [0; BYTES];
    for (path, names) in files {
        // Which of its tensors count may depend on an index beside the file.
        let what = format!("weights {}", hexadecimal(&Sha256::digest(names.join("\n"))));
        let of_file = digests.of(path, &what, || {
            let parts: Vec<[u8; BYTES]> = names.par_iter().map(tensor).collect::<Result<_>>()?;
            Ok(hexadecimal(&parts.iter().fold([0; BYTES], |sum, part| add(sum, *part))))
        })?;
        let part = read(&of_file).ok_or_else(|| Error::bad_file(path, format!("its noted digest is `{of_file}`")))?;
        sum = add(sum, part);
    }
    Ok(hexadecimal(&sum))
}

fn add(left: [u8; BYTES], right: [u8; BYTES]) -> [u8; BYTES] {
    std::array::from_fn(|index| left[index] ^ right[index])
}

fn read(text: &str) -> Option<[u8; BYTES]> {
    let bytes: Option<Vec<u8>> = (0..text.len())
        .step_by(2)
        .map(|at| text.get(at..at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok()))
        .collect();
    bytes?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::weights::write_tensors;

    fn tensors() -> Vec<(String, Tensor)> {
        let values = |start: i64, count: i64| Tensor::arange_start(start, start + count, (Kind::Float, Device::Cpu));
        // The first one is longer than what is looked at in one piece.
        vec![("a".to_owned(), values(0, 3 << 20)), ("b".to_owned(), values(7, 24).view([4, 6]))]
    }

    fn digest_of(path: &Path) -> String {
        digest(&WeightsFolder::open(path).unwrap(), &Digests::unnoted(), &|_, _| ()).unwrap()
    }

    #[test]
    fn every_byte_counts_and_the_files_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        write_tensors(&path, &tensors(), &[]).unwrap();
        let whole = digest_of(folder.path());
        assert_eq!(whole.len(), 2 * BYTES);

        // The same tensors in two shards.
        let shards = tempfile::tempdir().unwrap();
        let mut map = serde_json::Map::new();
        for (number, tensor) in tensors().into_iter().enumerate() {
            let file = format!("part-{number}.safetensors");
            map.insert(tensor.0.clone(), file.clone().into());
            write_tensors(&shards.path().join(file), &[tensor], &[]).unwrap();
        }
        let index = serde_json::json!({"weight_map": map}).to_string();
        fs::write(shards.path().join("model.safetensors.index.json"), index).unwrap();
        assert_eq!(digest_of(shards.path()), whole);

        // One bit anywhere, far from both ends of a tensor.
        let bytes = fs::read(&path).unwrap();
        for place in [bytes.len() / 2, bytes.len() - 60] {
            let mut changed = bytes.clone();
            changed[place] ^= 1;
            fs::write(&path, changed).unwrap();
            assert_ne!(digest_of(folder.path()), whole, "byte {place}");
        }
        // The same numbers under exchanged names, and in another shape.
        let mut exchanged = tensors();
        exchanged[0].0 = "b".to_owned();
        exchanged[1].0 = "a".to_owned();
        write_tensors(&path, &exchanged, &[]).unwrap();
        assert_ne!(digest_of(folder.path()), whole);
        let mut reshaped = tensors();
        reshaped[1].1 = reshaped[1].1.view([6, 4]);
        write_tensors(&path, &reshaped, &[]).unwrap();
        assert_ne!(digest_of(folder.path()), whole);
    }
}
