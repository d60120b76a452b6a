//! A safetensors file with the hidden states of one document, as vLLM writes it (`ExampleHiddenStatesConnector`, 0.32) and
//! speculators keeps it (`hs_N.safetensors`): `hidden_states [T, L, H]` and `token_ids [T]`.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::error::Error;
use crate::strict;

const STATES: &str = "hidden_states";
const IDS: &str = "token_ids";

/// An open file. Its sizes have been compared with its length.
pub(super) struct StatesFile {
    map: Mmap,
}

impl StatesFile {
    /// Opens a file. A problem is given in words.
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        let file = File::open(path).map_err(|error| Error::io("open", path)(error).to_string())?;
        // SAFETY: whoever writes such files writes them once; replacing one under a running program is not supported.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::io("map", path)(error).to_string())?;
        if let Some(name) = strict::repeated_tensor(&map) {
            return Err(format!("its header names `{name}` twice"));
        }
        let file = Self { map };
        file.tensors()?;
        Ok(file)
    }

    fn tensors(&self) -> Result<SafeTensors<'_>, String> {
        SafeTensors::deserialize(&self.map).map_err(|error| format!("is no whole safetensors file: {error}"))
    }

    /// Its token ids, `[T]`.
    pub(super) fn ids(&self) -> Result<Vec<i64>, String> {
        let tensors = self.tensors()?;
        let view = tensors.tensor(IDS).map_err(|_| format!("holds no tensor `{IDS}`"))?;
        match (view.shape(), view.dtype()) {
            ([_], Dtype::I64) => Ok(view.data().as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect()),
            ([_], Dtype::I32) => {
                Ok(view.data().as_chunks().0.iter().map(|&bytes| i64::from(i32::from_le_bytes(bytes))).collect())
            }
            (shape, dtype) => Err(format!("`{IDS}`: expected int64 with one axis, got {dtype:?} {shape:?}")),
        }
    }

    /// Number of states of each token.
    pub(super) fn layers(&self) -> Result<usize, String> {
        let tensors = self.tensors()?;
        let view = tensors.tensor(STATES).map_err(|_| format!("holds no tensor `{STATES}`"))?;
        match view.shape() {
            &[_, layers, _] => Ok(layers),
            shape => Err(format!("`{STATES}`: expected three axes [tokens, layers, width], got {shape:?}")),
        }
    }

    /// Its states, one `[T, H]` for each captured layer, in the element type of the file.
    pub(super) fn states(&self) -> Result<Vec<Tensor>, String> {
        let tensors = self.tensors()?;
        let view = tensors.tensor(STATES).map_err(|_| format!("holds no tensor `{STATES}`"))?;
        let kind = match view.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::BF16 => Kind::BFloat16,
            Dtype::F16 => Kind::Half,
            other => return Err(format!("`{STATES}`: expected float32, bfloat16 or float16, got {other:?}")),
        };
        if view.shape().len() != 3 {
            return Err(format!("`{STATES}`: expected three axes [tokens, layers, width], got {:?}", view.shape()));
        }
        let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
        let whole = Tensor::f_from_data_size(view.data(), &shape, kind).map_err(|error| error.to_string())?;
        (0..shape[1]).map(|layer| whole.f_select(1, layer).map_err(|error| error.to_string())).collect()
    }
}

/// Whether a file is as long as its header says: a writer that is not done has a shorter one.
pub(super) fn is_whole(path: &Path) -> bool {
    lengths(path).is_ok_and(|(got, wanted)| wanted == Some(got))
}

/// How long a file is, and how long it will be, if its header is there already.
fn lengths(path: &Path) -> std::io::Result<(u64, Option<u64>)> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut first = [0; 8];
    file.read_exact(&mut first)?;
    let header = u64::from_le_bytes(first);
    if header > length {
        return Ok((length, None));
    }
    let mut text = vec![0; header as usize];
    file.read_exact(&mut text)?;
    let Ok(Value::Object(tensors)) = serde_json::from_slice(&text) else { return Ok((length, None)) };
    let ends = tensors.values().filter_map(|tensor| tensor.pointer("/data_offsets/1").and_then(Value::as_u64));
    Ok((length, ends.max().and_then(|end| end.checked_add(header + 8))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_being_written_is_not_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hs_0.safetensors");
        assert!(!is_whole(&path));
        let states = Tensor::arange(24, (Kind::Float, tch::Device::Cpu)).view([3, 2, 4]);
        let tensors = [(STATES.to_owned(), states), (IDS.to_owned(), Tensor::from_slice(&[5i64, 6, 7]))];
        crate::weights::write_tensors(&path, &tensors, &[]).unwrap();
        assert!(is_whole(&path));
        let file = StatesFile::open(&path).unwrap();
        assert_eq!((file.ids().unwrap(), file.layers().unwrap()), (vec![5, 6, 7], 2));
        let second = file.states().unwrap().remove(1);
        assert_eq!(Vec::<f32>::try_from(second.get(2)).unwrap(), [20.0, 21.0, 22.0, 23.0]);
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(!is_whole(&path), "{length} bytes");
            assert!(StatesFile::open(&path).is_err(), "{length} bytes");
        }
    }
}
