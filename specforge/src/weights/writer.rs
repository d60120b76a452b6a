//! Writes safetensors files: through the `safetensors` crate, flushed to disk, then renamed into place.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{Dtype, View};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::files;

/// One tensor to write: little-endian bytes, row-major.
pub struct TensorBytes<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// The elements.
    pub bytes: Cow<'a, [u8]>,
}

impl View for &TensorBytes<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Writes tensors given as bytes. `metadata` is added to the header beside `format: pt`.
pub fn write_bytes(path: &Path, tensors: &[(String, TensorBytes<'_>)], metadata: &[(&str, String)]) -> Result<()> {
    let mut header = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    header.extend(metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
    let views = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    files::write_through(path, |temporary| {
        safetensors::serialize_to_file(views, Some(header), temporary).map_err(|error| match error {
            safetensors::SafeTensorError::IoError(source) => Error::io("write", path)(source),
            other => Error::bad_file(path, format!("cannot be written: {other}")),
        })
    })
}

/// Writes libtorch tensors, from any device.
pub fn write_tensors(path: &Path, tensors: &[(String, Tensor)], metadata: &[(&str, String)]) -> Result<()> {
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
    write_bytes(path, &entries, metadata)
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
        Dtype::BOOL => Kind::Bool,
        _ => return None,
    })
}
