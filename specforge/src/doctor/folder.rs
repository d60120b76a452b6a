//! A draft's folder as it lies there: looked at without the rules that a loader refuses it by, so that what is wrong can be
//! named one by one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tch::{Kind, Tensor};

use crate::checkpoint::manifest::MANIFEST_FILE;
use crate::error::{Error, Result};
use crate::export::{self, ExportReport};
use crate::strict;
use crate::weights::WeightsFolder;

/// What some tools write before every name, and engines add themselves.
pub const PREFIX: &str = "model.";

/// What is in the folder.
#[derive(Debug)]
pub struct Folder {
    /// Where it is.
    pub path: PathBuf,
    /// config.json.
    pub config: Value,
    /// Name of the format that config.json shows.
    pub format: Option<&'static str>,
    /// The file of weights.
    pub file: PathBuf,
    /// Every tensor as it is stored, whatever it holds, under its name in the file without [`PREFIX`].
    pub tensors: BTreeMap<String, Tensor>,
    /// A name in the file that begins with [`PREFIX`].
    pub prefixed: Option<String>,
    /// Why the weights could not be read.
    pub unread: Option<String>,
    /// What this program's own reader says of it.
    pub loads: Result<ExportReport, String>,
}

impl Folder {
    /// Looks at a folder. One without a readable config.json is no draft.
    pub fn open(path: &Path) -> Result<Self> {
        let config_path = path.join("config.json");
        if path.is_file() {
            return Err(Error::bad_file(path, "is a file; a draft is examined as the folder that it is made from")
                .with_hint("name the exported folder; `specforge export --check` looks at a GGUF file"));
        }
        if path.join(MANIFEST_FILE).is_file() || !config_path.is_file() {
            return Err(Error::bad_file(path, "is not an exported draft: config.json is not there")
                .with_hint("write one from a checkpoint with `specforge export`"));
        }
        let text = std::fs::read(&config_path).map_err(Error::io("read", &config_path))?;
        let config: Value = strict::from_json(&text)
            .map_err(|problem| Error::bad_file(&config_path, format!("not valid JSON: {problem}")))?;
        // A run's own folder holds a config.json too: that of the run.
        if config.get("train").is_some() {
            return Err(Error::bad_file(path, "is the output of a run, no draft that engines load")
                .with_hint("write one from its checkpoint with `specforge export`"));
        }
        let file = weights_file(path);
        let (mut tensors, mut prefixed, mut unread) = (BTreeMap::new(), None, None);
        match stored(&file) {
            Ok(stored) => {
                for (name, tensor) in stored {
                    let bare = name.strip_prefix(PREFIX).unwrap_or(&name).to_owned();
                    if bare != name {
                        prefixed.get_or_insert(name);
                    }
                    tensors.insert(bare, tensor);
                }
            }
            Err(error) => unread = Some(words(&error)),
        }
        let format = export::format_of(&config).map(|format| format.name);
        let loads = export::check(path).map_err(|error| words(&error));
        Ok(Self { path: path.to_path_buf(), config, format, file, tensors, prefixed, unread, loads })
    }

    /// Tensors of plain floating-point numbers.
    pub fn floats(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        let plain = |kind: Kind| matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16);
        self.tensors
            .iter()
            .filter(move |(_, tensor)| plain(tensor.kind()))
            .map(|(name, tensor)| (name.as_str(), tensor))
    }
}

/// The file of weights that a known format has, where one is there; else the folder itself.
fn weights_file(path: &Path) -> PathBuf {
    let names = export::formats().into_iter().flat_map(|format| format.files.iter());
    let found = names
        .map(|name| path.join(name))
        .find(|file| file.extension().is_some_and(|extension| extension == "safetensors") && file.is_file());
    found.unwrap_or_else(|| path.to_path_buf())
}

/// Every tensor, also one that holds no finite numbers.
fn stored(file: &Path) -> Result<Vec<(String, Tensor)>> {
    let weights = WeightsFolder::open(file)?;
    let tensor = |name: &str| {
        let (shape, kind) = (weights.shape(name).unwrap_or_default(), weights.kind(name));
        let (bytes, kind) = (weights.bytes(name).unwrap_or_default(), kind.unwrap_or(Kind::Float));
        Ok((name.to_owned(), Tensor::f_from_data_size(bytes, shape, kind)?))
    };
    weights.names().map(tensor).collect()
}

/// An error on one line.
pub fn words(error: &Error) -> String {
    let text = error.to_string();
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}
