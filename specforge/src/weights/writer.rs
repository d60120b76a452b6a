//! Writes safetensors files: piece by piece, flushed to disk, then renamed into place. Whoever wants a digest of a file sees
//! its bytes on their way.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::files;

/// The header ends at a multiple of this.
const ALIGNMENT: usize = 8;
/// The longest header that readers take.
const LARGEST_HEADER: usize = 100_000_000;
/// Bytes that are written, and shown, at once.
const PIECE: usize = 1 << 20;

/// One tensor to write: little-endian bytes, row-major.
pub struct TensorBytes<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// The elements.
    pub bytes: Cow<'a, [u8]>,
}

/// Writes tensors given as bytes. `metadata` is added to the header beside `format: pt`.
pub fn write_bytes(path: &Path, tensors: &[(String, TensorBytes<'_>)], metadata: &[(&str, String)]) -> Result<()> {
    write_bytes_seen(path, tensors, metadata, &mut |_| ())
}

/// The same; `see` is given every byte of the file, in order.
pub fn write_bytes_seen(
    path: &Path,
    tensors: &[(String, TensorBytes<'_>)],
    metadata: &[(&str, String)],
    see: &mut dyn FnMut(&[u8]),
) -> Result<()> {
    let bad = |problem: String| Error::bad_file(path, format!("cannot be written: {problem}"));
    let mut notes = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    notes.extend(metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
    // The widest elements first, so that all of them lie at multiples of their size; then by name.
    let mut ordered: Vec<&(String, TensorBytes<'_>)> = tensors.iter().collect();
    ordered.sort_by(|(name, one), (other_name, other)| other.dtype.cmp(&one.dtype).then(name.cmp(other_name)));
    let mut end = 0;
    let place = |(name, tensor): &&(String, TensorBytes<'_>)| {
        let start = end;
        end += tensor.bytes.len();
        (name.clone(), TensorInfo { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets: (start, end) })
    };
    let infos = ordered.iter().map(place).collect();
    let header = Metadata::new(Some(notes), infos).map_err(|error| bad(error.to_string()))?;
    let mut header = serde_json::to_vec(&header).map_err(|error| bad(error.to_string()))?;
    header.resize(header.len().next_multiple_of(ALIGNMENT), b' ');
    if header.len() > LARGEST_HEADER {
        return Err(bad(format!("its header takes {} bytes, readers take {LARGEST_HEADER}", header.len())));
    }
    files::write_file(path, |writer| {
        let length = (header.len() as u64).to_le_bytes();
        let tensors = ordered.iter().map(|(_, tensor)| &*tensor.bytes);
        for whole in [&length[..], &header[..]].into_iter().chain(tensors) {
            for piece in whole.chunks(PIECE) {
                see(piece);
                writer.write_all(piece)?;
            }
        }
        Ok(())
    })
}

/// Writes libtorch tensors, from any device.
pub fn write_tensors(path: &Path, tensors: &[(String, Tensor)], metadata: &[(&str, String)]) -> Result<()> {
    write_tensors_seen(path, tensors, metadata, &mut |_| ())
}

/// The same; `see` is given every byte of the file, in order.
pub fn write_tensors_seen(
    path: &Path,
    tensors: &[(String, Tensor)],
    metadata: &[(&str, String)],
    see: &mut dyn FnMut(&[u8]),
) -> Result<()> {
    let on_host: Vec<Tensor> = tensors
        .iter()
        .map(|(_, tensor)| Ok(tensor.f_detach()?.f_to_device(tch::Device::Cpu)?.f_contiguous()?))
        .collect::<Result<_>>()?;
    let entries: Vec<(String, TensorBytes<'_>)> = tensors
        .iter()
        .zip(&on_host)
        .map(|((name, _), tensor)| {
            let shape = tensor.size().iter().map(|&size| size as usize).collect();
            let bytes = Cow::Borrowed(host_bytes(tensor));
            Ok((name.clone(), TensorBytes { dtype: dtype_of(tensor.kind())?, shape, bytes }))
        })
        .collect::<Result<_>>()?;
    write_bytes_seen(path, &entries, metadata, see)
}

/// The bytes of a contiguous tensor in host memory.
pub fn host_bytes(tensor: &Tensor) -> &[u8] {
    let length = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if length == 0 {
        return &[];
    }
    // SAFETY: the tensor is contiguous, lives in host memory and outlives the slice.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<u8>(), length) }
}

/// safetensors' element type for libtorch's.
pub fn dtype_of(kind: Kind) -> Result<Dtype> {
    Ok(match kind {
        Kind::Float => Dtype::F32,
        Kind::Double => Dtype::F64,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Half => Dtype::F16,
        Kind::Int64 => Dtype::I64,
        Kind::Int => Dtype::I32,
        Kind::Int16 => Dtype::I16,
        Kind::Int8 => Dtype::I8,
        Kind::Uint8 => Dtype::U8,
        Kind::Float8e4m3fn => Dtype::F8_E4M3,
        Kind::Bool => Dtype::BOOL,
        other => {
            return Err(Error::Failed(format!("tensors of type {other:?} have no place in a safetensors file")));
        }
    })
}

/// libtorch's element type for safetensors', where there is one.
pub fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::F64 => Kind::Double,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F16 => Kind::Half,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::I16 => Kind::Int16,
        Dtype::I8 => Kind::Int8,
        Dtype::U8 => Kind::Uint8,
        Dtype::F8_E4M3 => Kind::Float8e4m3fn,
        Dtype::BOOL => Kind::Bool,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;
    use tch::Device;

    use super::*;

    /// Byte for byte what the format's own library writes, and what is seen is what is there.
    #[test]
    fn a_file_is_that_of_the_formats_own_library() {
        let folder = tempfile::tempdir().unwrap();
        let full = |shape: &[i64], kind| Tensor::full(shape, 3.0, (kind, Device::Cpu));
        let tensors = [
            ("b".to_owned(), full(&[3], Kind::Uint8)),
            ("\u{e4}.\"weight\"".to_owned(), full(&[5, 7], Kind::Float)),
            ("a".to_owned(), full(&[700, 1000], Kind::Float)),
            ("half".to_owned(), full(&[2, 3], Kind::BFloat16)),
            ("none".to_owned(), full(&[0, 3], Kind::Float)),
            ("number".to_owned(), full(&[], Kind::Int64)),
        ];
        for count in [0, 1, tensors.len()] {
            let path = folder.path().join("tensors");
            let mut seen = Vec::new();
            write_tensors_seen(&path, &tensors[..count], &[], &mut |piece| seen.extend_from_slice(piece)).unwrap();
            let views = tensors[..count].iter().map(|(name, tensor)| {
                let shape = tensor.size().iter().map(|&size| size as usize).collect();
                (name, TensorView::new(dtype_of(tensor.kind()).unwrap(), shape, host_bytes(tensor)).unwrap())
            });
            let notes = HashMap::from([("format".to_owned(), "pt".to_owned())]);
            let want = safetensors::serialize(views, Some(notes)).unwrap();
            assert!(std::fs::read(&path).unwrap() == want && seen == want, "{count} tensors");
        }
    }
}
