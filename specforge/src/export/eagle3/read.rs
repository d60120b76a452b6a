//! Reads a draft of any layout: SafeAILab's, SpecForge's, speculators', llama.cpp's and our own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use super::config::{self, Keys, Parsed};
use super::{CONFIG_FILE, D2T, EMBEDDING, Layout, T2D, WEIGHTS_FILE, gguf, layout, pickled, trained_name, twin_norm};
use crate::draft::eagle3::Eagle3Shape;
use crate::error::{Error, Result, TensorMismatch};
use crate::gguf::packed;
use crate::vocab::VocabMap;
use crate::weights::WeightsFolder;

/// Rows of an embedding that are converted at a time to be compared.
const ROWS_COMPARED: i64 = 4096;

/// A draft read from a folder.
#[derive(Debug)]
pub struct Imported {
    /// Its architecture. `num_target_layers` is 0 where nothing says it.
    pub shape: Eagle3Shape,
    /// What it is if the folder's `norm_output` has SpecForge's meaning and not the engines', where the folder does not
    /// say which.
    pub alternative: Option<Eagle3Shape>,
    /// Tensors in the order and under the names of training, on the CPU. They may lie in the mapped file: read-only.
    pub tensors: Vec<(String, Tensor)>,
    /// The draft's own vocabulary, where it is smaller than the target's.
    pub vocabulary: Option<VocabMap>,
    /// An embedding that the folder holds although its draft is as wide as the target: to be compared with the target's,
    /// of which it mostly is a copy.
    pub embedding: Option<Tensor>,
    /// What was left out.
    pub warnings: Vec<String>,
}

/// Reads a published draft, a folder or a GGUF file. `num_target_layers` is needed for folders that name no captured layers.
pub fn read(path: &Path, num_target_layers: Option<usize>) -> Result<Imported> {
    let folder = Folder::open(path, num_target_layers)?;
    let names = folder.shape.tensors();
    let take = |(name, _): (String, Vec<i64>)| folder.tensors.get(&name).map(|tensor| (name, tensor.shallow_clone()));
    let tensors = names.into_iter().filter_map(take).collect();
    let embedding = folder.embedding().map(Tensor::shallow_clone);
    let Folder { shape, alternative, vocabulary, warnings, .. } = folder;
    Ok(Imported { shape, alternative, tensors, vocabulary, embedding, warnings })
}

/// The architecture that a folder's config.json describes, whatever its tensors are; see [`read`].
pub fn read_shape(path: &Path, num_target_layers: Option<usize>) -> Result<Eagle3Shape> {
    let values = super::super::config(path)?;
    // An architecture that nobody knows may still have the keys.
    let layout = layout(&values).unwrap_or(Layout::Raw);
    Ok(config::parse(&path.join(CONFIG_FILE), layout, &values, num_target_layers)?.shape)
}

/// Whether an embedding that came with a draft holds other numbers than the target's, as far as its element type tells.
pub fn is_other_embedding(own: &Tensor, target: &Tensor) -> Result<bool> {
    if own.size() != target.size() {
        return Ok(true);
    }
    let kind = own.kind();
    let rows = own.size()[0];
    for start in (0..rows).step_by(ROWS_COMPARED as usize) {
        let count = ROWS_COMPARED.min(rows - start);
        let theirs = target.f_narrow(0, start, count)?.f_to_device(Device::Cpu)?.f_to_kind(kind)?;
        if !own.f_narrow(0, start, count)?.f_equal(&theirs)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// An opened folder whose tensors fit its configuration.
pub(super) struct Folder {
    pub(super) layout: Layout,
    /// The configuration as engines see it.
    pub(super) values: serde_json::Value,
    pub(super) keys: Keys,
    pub(super) shape: Eagle3Shape,
    alternative: Option<Eagle3Shape>,
    pub(super) target: Option<PathBuf>,
    /// Element type of everything but the vocabulary's tables.
    pub(super) kind: Kind,
    /// By the names of training.
    tensors: BTreeMap<String, Tensor>,
    /// Names in the file.
    pub(super) stored: Vec<String>,
    vocabulary: Option<VocabMap>,
    pub(super) warnings: Vec<String>,
}

impl Folder {
    pub(super) fn open(path: &Path, num_target_layers: Option<usize>) -> Result<Self> {
        if packed::is_packed(path) {
            let gguf::Draft { values, tensors, stored } = gguf::read(path)?;
            let parsed = config::parse(path, Layout::Gguf, &values, num_target_layers)?;
            return Self::of(Layout::Gguf, parsed, path, tensors, stored);
        }
        let config_path = path.join(CONFIG_FILE);
        let values = super::super::config(path)?;
        let layout = layout(&values).ok_or_else(|| {
            Error::bad_file(&config_path, "is of no EAGLE-3 draft")
                .with_hint("expected `architectures` with LlamaForCausalLMEagle3, or `speculators_model_type`: eagle3")
        })?;
        let parsed = config::parse(&config_path, layout, &values, num_target_layers)?;
        let (weights_path, tensors, stored) = weights(path)?;
        Self::of(layout, parsed, &weights_path, tensors, stored)
    }

    fn of(
        layout: Layout,
        parsed: Parsed,
        weights_path: &Path,
        tensors: BTreeMap<String, Tensor>,
        stored: Vec<String>,
    ) -> Result<Self> {
        let shape = parsed.shape;
        fit(weights_path, &tensors, &shape, layout)?;
        let kind = one_kind(weights_path, &tensors)?;
        let vocabulary = vocabulary(weights_path, &tensors, &shape)?;
        let warnings = Vec::new();
        for layer in 1..shape.num_layers {
            let (norm, twin) = twin_norm(layer);
            if tensors.get(&twin).is_some_and(|value| !value.equal(&tensors[&norm])) {
                let problem = format!("`{twin}`, which SGLang reads, differs from `{norm}`, which others read");
                return Err(Error::bad_file(weights_path, problem));
            }
        }
        let (values, keys, alternative, target) = (parsed.values, parsed.keys, parsed.alternative, parsed.target);
        Ok(Self { layout, values, keys, shape, alternative, target, kind, tensors, stored, vocabulary, warnings })
    }

    /// An embedding beside the target's, of the same width.
    pub(super) fn embedding(&self) -> Option<&Tensor> {
        let shares = self.shape.hidden_size == self.shape.target_hidden_size;
        self.tensors.get(EMBEDDING).filter(|_| shares)
    }

    pub(super) fn tensor_count(&self) -> usize {
        self.tensors.len()
    }

    pub(super) fn contains(&self, trained: &str) -> bool {
        self.tensors.contains_key(trained)
    }
}

/// The file of weights, its tensors by the names of training, and their names in the file.
pub(in crate::export) fn weights(path: &Path) -> Result<(PathBuf, BTreeMap<String, Tensor>, Vec<String>)> {
    let (weights_path, older) = (path.join(WEIGHTS_FILE), path.join(pickled::FILE));
    if !weights_path.is_file() && older.is_file() {
        let tensors = pickled::tensors(&older)?;
        return Ok((older, tensors, Vec::new()));
    }
    let weights = WeightsFolder::open(&weights_path)?;
    let (mut tensors, mut stored) = (BTreeMap::new(), Vec::new());
    for name in weights.names() {
        let kind = weights.kind(name).unwrap_or(Kind::Float);
        let trained = trained_name(name);
        if tensors.insert(trained.clone(), weights.load(name, kind, Device::Cpu)?).is_some() {
            return Err(Error::bad_file(&weights_path, format!("holds `{trained}` under two names")));
        }
        stored.push(name.to_owned());
    }
    Ok((weights_path, tensors, stored))
}

/// Every tensor of the shape is there and no other, but for those that may be.
fn fit(path: &Path, tensors: &BTreeMap<String, Tensor>, shape: &Eagle3Shape, layout: Layout) -> Result<()> {
    let (hidden, vocabulary) = (shape.hidden_size, shape.vocab_size);
    let mut needed = shape.tensors();
    let tables = [(D2T.to_owned(), vec![shape.draft_vocab_size]), (T2D.to_owned(), vec![vocabulary])];
    let mut allowed = vec![(EMBEDDING.to_owned(), vec![vocabulary, hidden])];
    match shape.draft_vocab_size < vocabulary {
        true => needed.extend(tables),
        false => allowed.extend(tables),
    }
    allowed.extend((1..shape.num_layers).map(|layer| (twin_norm(layer).1, vec![hidden])));
    fit_names(path, tensors, &needed, &allowed, &|name| layout.stored(name))
}

/// Every tensor that is needed is there, and no other but those that may be. `stored` gives the name in the file of one of
/// training.
pub(in crate::export) fn fit_names(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    needed: &[(String, Vec<i64>)],
    allowed: &[(String, Vec<i64>)],
    stored: &dyn Fn(&str) -> String,
) -> Result<()> {
    let mut mismatch = TensorMismatch::default();
    for (name, want) in needed {
        if !tensors.contains_key(name) {
            mismatch.missing.push(format!("{} {want:?}", stored(name)));
        }
    }
    for (name, tensor) in tensors {
        let want = needed.iter().chain(allowed).find(|(known, _)| known == name).map(|(_, want)| want);
        let (name, got) = (stored(name), tensor.size());
        match want {
            None => mismatch.surplus.push(format!("{name} {got:?}")),
            Some(want) if *want != got => mismatch.misshaped.push((name, want.clone(), got)),
            Some(_) => {}
        }
    }
    if mismatch.is_empty() { Ok(()) } else { Err(Error::Tensors { path: path.to_path_buf(), mismatch }) }
}

/// The element type that all tensors share, the vocabulary's tables aside.
pub(in crate::export) fn one_kind(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<Kind> {
    let mut found: Option<(&str, Kind)> = None;
    for (name, tensor) in tensors {
        let kind = tensor.kind();
        let problem = match (name.as_str(), found) {
            (D2T, _) if kind == Kind::Int64 => continue,
            (T2D, _) if kind == Kind::Bool => continue,
            (D2T, _) => format!("`{D2T}`: expected elements of Int64, got {kind:?}"),
            (T2D, _) => format!("`{T2D}`: expected elements of Bool, got {kind:?}"),
            (_, Some((_, first))) if kind == first => continue,
            (_, Some((other, first))) => {
                format!(
                    "expected one floating-point type in all tensors, got {first:?} in `{other}`, {kind:?} in `{name}`"
                )
            }
            (_, None) if matches!(kind, Kind::Float | Kind::BFloat16 | Kind::Half) => {
                found = Some((name, kind));
                continue;
            }
            (_, None) => format!("`{name}`: expected a floating-point type, got {kind:?}"),
        };
        return Err(Error::bad_file(path, problem));
    }
    Ok(found.map_or(Kind::Float, |(_, kind)| kind))
}

/// The draft's vocabulary from its two tables, which must agree.
pub(in crate::export) fn vocabulary(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    shape: &Eagle3Shape,
) -> Result<Option<VocabMap>> {
    let (Some(d2t), Some(t2d)) = (tensors.get(D2T), tensors.get(T2D)) else {
        return match tensors.keys().find(|name| [D2T, T2D].contains(&name.as_str())) {
            Some(name) => Err(Error::bad_file(path, format!("holds `{name}` without the other of `{D2T}`, `{T2D}`"))),
            None => Ok(None),
        };
    };
    let offsets = Vec::<i64>::try_from(d2t)?;
    let ids = offsets.iter().enumerate().map(|(draft, offset)| offset.saturating_add(draft as i64)).collect();
    let map = VocabMap::new(ids, shape.vocab_size).map_err(|error| {
        Error::bad_file(path, format!("`{D2T}`: {error}"))
            .with_hint("d2t holds what is added to a draft id, not the target's ids themselves")
    })?;
    let named = Vec::<bool>::try_from(t2d)?;
    if let Some(token) = map.t2d().iter().zip(&named).position(|(want, got)| want != got) {
        let problem = format!("`{T2D}[{token}]`: `{D2T}` says {}, got {}", !named[token], named[token]);
        return Err(Error::bad_file(path, problem));
    }
    Ok((map.draft_size() < map.target_size()).then_some(map))
}
