//! A GGUF file whose tensors are read one by one.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::dimensions::Dimensions;
use super::ggml_types::{self, ElementType};
use super::header::{self, TensorInfo};
use super::metadata::Metadata;
use super::rope::{self, Rope};
use super::{config, source, tensors};
use crate::error::{Error, Result};

/// An open file whose header is sound, and whose tensors all lie within it.
#[derive(Debug)]
pub struct GgufFile {
    metadata: Metadata,
    file: File,
}

impl GgufFile {
    /// Opens a file and reads its header.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = source::open_plain(path)?;
        let content = header::read(path, &mut file)?;
        Ok(Self { metadata: Metadata::new(path.to_path_buf(), content), file })
    }

    /// Its metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Sizes of the network, which must be of this architecture.
    pub fn dimensions(&self, architecture: &str) -> Result<Dimensions> {
        Dimensions::read(&self.metadata, architecture)
    }

    /// What norms add to the mean square.
    pub fn epsilon(&self) -> Result<f64> {
        config::epsilon(&self.metadata)
    }

    /// The rotary embedding of a network of these sizes.
    pub fn rope(&self, sizes: &Dimensions) -> Result<Rope> {
        let factors = match self.tensor(tensors::FACTORS) {
            Some(info) if info.shape != [sizes.head_dim / 2] => {
                let (want, got) = (sizes.head_dim / 2, &info.shape);
                return Err(self.metadata.bad(format!("`{}`: expected [{want}], got {got:?}", tensors::FACTORS)));
            }
            Some(_) => Some(self.numbers(tensors::FACTORS)?),
            None => None,
        };
        rope::read(&self.metadata, sizes, factors.as_deref())
    }

    /// Every tensor: its name, its shape with the innermost dimension last, and what its element type is called.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize], &'static str)> {
        let tensors = self.metadata.content.tensors.iter();
        tensors.map(|(name, info)| (name.as_str(), info.shape.as_slice(), info.kind.name()))
    }

    /// Whether a tensor is there.
    pub fn contains(&self, name: &str) -> bool {
        self.tensor(name).is_some()
    }

    fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.metadata.content.tensors.get(name)
    }

    /// The numbers of a tensor in float32, row-major. What is not a finite number is refused.
    pub fn numbers(&self, name: &str) -> Result<Vec<f32>> {
        let info = self.need(name)?;
        let ElementType::Numbers(kind) = info.kind else {
            let problem = format!("tensor `{name}`: {}", ggml_types::unreadable(info.kind.name()));
            return Err(self.metadata.bad(problem).with_hint(ggml_types::HINT));
        };
        let count = info.shape.iter().product();
        if count == 0 {
            return Ok(Vec::new());
        }
        let values = tensors::decode((&self.metadata.path, &self.file), name, kind, info.start, count)?;
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(place) => {
                let problem = format!("`{name}`: expected finite numbers, element {place} is {}", values[place]);
                Err(self.metadata.bad(problem).with_hint("the weights are damaged: fetch or write them again"))
            }
        }
    }

    /// The whole numbers of a tensor.
    pub fn whole_numbers(&self, name: &str) -> Result<Vec<i64>> {
        let info = self.need(name)?;
        if info.kind != ElementType::I64 {
            return Err(self.metadata.bad(format!("tensor `{name}`: expected I64, got {}", info.kind.name())));
        }
        let mut bytes = vec![0; info.bytes as usize];
        let path = &self.metadata.path;
        self.file.read_exact_at(&mut bytes, info.start).map_err(Error::io("read", path))?;
        let (words, _) = bytes.as_chunks::<8>();
        Ok(words.iter().map(|word| i64::from_le_bytes(*word)).collect())
    }

    fn need(&self, name: &str) -> Result<&TensorInfo> {
        self.tensor(name).ok_or_else(|| self.metadata.bad(format!("holds no tensor `{name}`")))
    }
}
