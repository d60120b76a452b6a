//! Reads a drafter of any layout: z-lab's, speculators', ModelOpt's, DeepSpec's and our own.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use super::head::Head;
use super::method::{self, Layout, Method};
use super::parse::{Parsed, parse};
use super::tensors::{D2T, EMBEDDING, LM_HEAD, MASK_EMBEDDING, Named, Spelling, T2D, meaning, needed};
use super::{CONFIG_FILE, WEIGHTS_FILE, mask};
use crate::draft::block::config::BlockShape;
use crate::error::{Error, Result, TensorMismatch};
use crate::vocab::VocabMap;
use crate::weights::WeightsFolder;

/// A drafter read from a folder.
#[derive(Debug)]
pub struct Imported {
    /// Its kind: the value of `draft.algorithm`.
    pub method: Method,
    /// Its architecture. `num_target_layers` is 0 where nothing says it.
    pub shape: BlockShape,
    /// The keys of `draft.head` that describe its head.
    pub head: Map<String, Value>,
    /// Tensors under the names of training, on the CPU, in the element type of the file: `mask_embedding` among them where
    /// the shape says so. They may lie in the mapped file: read-only.
    pub tensors: Vec<(String, Tensor)>,
    /// The draft's own vocabulary, where it is smaller than the target's.
    pub vocabulary: Option<VocabMap>,
    /// A vocabulary projection that the folder holds, `[DV, H]`. With the whole vocabulary mostly a copy of the target's:
    /// vLLM and llama.cpp then take it where it differs, SGLang never.
    pub lm_head: Option<Tensor>,
    /// An embedding that the folder holds, `[V, H]`: mostly a copy of the target's.
    pub embedding: Option<Tensor>,
    /// What a user should know: what was passed over, and what was taken for granted.
    pub notes: Vec<String>,
}

/// Reads a published drafter. `num_target_layers` is that of the target it is used with, where it is known: a folder made
/// for another is refused.
pub fn read(path: &Path, num_target_layers: Option<usize>) -> Result<Imported> {
    let Folder { parsed, tensors: mut found, mask_row, vocabulary, .. } = Folder::open(path, num_target_layers)?;
    let Parsed { method, shape, head, mut notes, .. } = parsed;
    let lm_head = found.remove(LM_HEAD);
    let embedding = found.remove(EMBEDDING);
    let names = needed(&shape, &head);
    let mut tensors: Vec<(String, Tensor)> =
        names.into_iter().filter_map(|(name, _)| found.remove(&name).map(|tensor| (name, tensor))).collect();
    tensors.extend(mask_row.map(|row| (MASK_EMBEDDING.to_owned(), row)));
    if shape.num_target_layers == 0 {
        notes.push("config.json does not say how many layers the target has".to_owned());
    } else if shape.target_layer_ids.contains(&(shape.num_target_layers as i64 - 1)) {
        notes.push(format!(
            "it reads the target's last layer ({}): trainers on Hugging Face hand that over behind the final norm, \
             engines before it",
            shape.num_target_layers - 1
        ));
    }
    Ok(Imported { method, shape, head: head.training_keys(), tensors, vocabulary, lm_head, embedding, notes })
}

/// An opened folder whose tensors fit its configuration.
pub(super) struct Folder {
    pub(super) parsed: Parsed,
    /// Element type of most tensors.
    pub(super) kind: Kind,
    /// By the names that engines load.
    tensors: BTreeMap<String, Tensor>,
    /// Ways of naming tensors that were met.
    pub(super) spellings: BTreeSet<Spelling>,
    pub(super) mask_row: Option<Tensor>,
    /// Whether the file of the mask's row names its token.
    pub(super) mask_token: Option<i64>,
    vocabulary: Option<VocabMap>,
}

impl Folder {
    pub(super) fn open(path: &Path, num_target_layers: Option<usize>) -> Result<Self> {
        let config_path = path.join(CONFIG_FILE);
        let values = crate::export::config(path)?;
        let (layout, method) = method::of(&values).ok_or_else(|| {
            Error::bad_file(&config_path, "is of no block drafter").with_hint(
                "expected `architectures` with DFlashDraftModel, DFlash2DraftModel, Qwen3DSparkModel, \
                 LiLiCorrDraftModel or Qwen3XPressModel, or a `speculators_model_type` of that kind",
            )
        })?;
        let single = path.join(WEIGHTS_FILE);
        let weights_path = if single.is_file() { single } else { path.to_path_buf() };
        let weights = WeightsFolder::open(&weights_path)?;
        let Renamed { stored, spellings, unused } = renamed(&weights, method, &weights_path)?;
        let shapes =
            stored.iter().filter_map(|(name, stored)| Some((name.clone(), weights.shape(stored)?.to_vec()))).collect();
        let mut parsed = parse(&config_path, (layout, method), &values, &shapes, num_target_layers)?;
        parsed
            .notes
            .extend(unused.iter().map(|name| format!("tensor `{name}` is no part of a drafter and was not read")));
        hint_at_architecture(&parsed, &stored, &weights_path)?;
        fit(&weights_path, &shapes, &parsed)?;
        let tensors = load(&weights, &stored)?;
        let kind = kinds(&weights_path, &tensors, &mut parsed.notes)?;
        let vocabulary = vocabulary(&weights_path, &tensors, &parsed)?;
        let mut folder = Self { parsed, kind, tensors, spellings, mask_row: None, mask_token: None, vocabulary };
        folder.read_mask(&path.join(mask::FILE))?;
        Ok(folder)
    }

    fn read_mask(&mut self, file: &Path) -> Result<()> {
        if !file.is_file() {
            return Ok(());
        }
        let mask::MaskRow { row, token } = mask::read(file)?;
        let (hidden, wanted) = (self.parsed.shape.hidden_size, self.parsed.shape.mask_token_id);
        if row.size() != [hidden] {
            let problem = format!("`embedding`: expected {hidden} numbers, got {}", row.numel());
            return Err(Error::bad_file(file, problem));
        }
        if let Some(token) = token.filter(|token| *token != wanted) {
            let problem = format!("`mask_token_id`: expected {wanted}, as config.json has it, got {token}");
            return Err(Error::bad_file(file, problem));
        }
        self.parsed.shape.mask_embedding = true;
        self.mask_token = token;
        self.mask_row = Some(row);
        Ok(())
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub(super) fn tensor_count(&self) -> usize {
        self.tensors.len() + usize::from(self.mask_row.is_some())
    }

    pub(super) fn target(&self) -> Option<&PathBuf> {
        self.parsed.target.as_ref()
    }
}

struct Renamed {
    /// Names in the file by the names that engines load.
    stored: BTreeMap<String, String>,
    spellings: BTreeSet<Spelling>,
    unused: Vec<String>,
}

fn renamed(weights: &WeightsFolder, method: Method, path: &Path) -> Result<Renamed> {
    let mut all = Renamed { stored: BTreeMap::new(), spellings: BTreeSet::new(), unused: Vec::new() };
    for name in weights.names() {
        let (named, spellings) = meaning(method, name);
        all.spellings.extend(spellings);
        match named {
            Named::Unused => all.unused.push(name.to_owned()),
            Named::Tensor(engines) => {
                if let Some(other) = all.stored.insert(engines.clone(), name.to_owned()) {
                    let problem = format!("holds `{engines}` under two names, `{other}` and `{name}`");
                    return Err(Error::bad_file(path, problem));
                }
            }
        }
    }
    Ok(all)
}

/// A wrong architecture is met as surplus tensors, or with SGLang not at all: it drops what it does not know.
fn hint_at_architecture(parsed: &Parsed, stored: &BTreeMap<String, String>, path: &Path) -> Result<()> {
    let marks = [
        ("candidate_selector.", Method::Dflash2),
        ("markov_head.", Method::Dspark),
        ("lilicorr.", Method::Lilicorr),
        ("xpress_head.", Method::Xpress),
        ("prefix_gru.", Method::Domino),
    ];
    for (mark, method) in marks {
        let Some((_, name)) = stored.iter().find(|(name, _)| name.starts_with(mark)) else { continue };
        if method != parsed.method {
            let (is, built) = (method.name(), parsed.method.name());
            let problem = format!("holds `{name}`, a part of {is}, but config.json makes it {built}");
            return Err(Error::bad_file(path, problem).with_hint(format!(
                "set `architectures` to {} (and `projector_type` for domino): by the name SGLang would drop the \
                 head in silence",
                method.architecture()
            )));
        }
    }
    Ok(())
}

/// Every tensor of the drafter is there and no other, but for those that may be.
fn fit(path: &Path, shapes: &BTreeMap<String, Vec<i64>>, parsed: &Parsed) -> Result<()> {
    let Parsed { shape, head, .. } = parsed;
    let (hidden, vocabulary) = (shape.hidden_size, shape.vocab_size);
    let mut wanted = needed(shape, head);
    let tables =
        [(LM_HEAD.to_owned(), vec![shape.draft_vocab_size, hidden]), (D2T.to_owned(), vec![shape.draft_vocab_size])];
    let mut allowed = vec![(EMBEDDING.to_owned(), vec![vocabulary, hidden]), (T2D.to_owned(), vec![vocabulary])];
    match shape.draft_vocab_size < vocabulary {
        true => wanted.extend(tables),
        false => allowed.extend(tables),
    }
    let mut mismatch = TensorMismatch::default();
    for (name, want) in wanted.iter().filter(|(name, _)| !shapes.contains_key(name)) {
        mismatch.missing.push(format!("{name} {want:?}"));
    }
    let known: BTreeMap<&str, &Vec<i64>> =
        wanted.iter().chain(&allowed).map(|(name, want)| (name.as_str(), want)).collect();
    for (name, got) in shapes {
        match known.get(name.as_str()) {
            None => mismatch.surplus.push(format!("{name} {got:?}")),
            Some(want) if *want != got => mismatch.misshaped.push((name.clone(), (*want).clone(), got.clone())),
            Some(_) => {}
        }
    }
    if mismatch.is_empty() { Ok(()) } else { Err(Error::Tensors { path: path.to_path_buf(), mismatch }) }
}

fn load(weights: &WeightsFolder, stored: &BTreeMap<String, String>) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for (name, stored) in stored {
        let kind = weights.kind(stored).unwrap_or(Kind::Float);
        tensors.insert(name.clone(), weights.load(stored, kind, Device::Cpu)?);
    }
    Ok(tensors)
}

/// The element type of most numbers. Other floating-point types are noted, everything else is refused.
fn kinds(path: &Path, tensors: &BTreeMap<String, Tensor>, notes: &mut Vec<String>) -> Result<Kind> {
    let mut counts: Vec<(Kind, usize)> = Vec::new();
    for (name, tensor) in tensors {
        let kind = tensor.kind();
        let wanted = match name.as_str() {
            D2T if kind == Kind::Int64 => continue,
            T2D if kind == Kind::Bool => continue,
            D2T => "Int64",
            T2D => "Bool",
            _ if matches!(kind, Kind::Float | Kind::BFloat16 | Kind::Half) => {
                match counts.iter_mut().find(|(known, _)| *known == kind) {
                    Some((_, count)) => *count += 1,
                    None => counts.push((kind, 1)),
                }
                continue;
            }
            _ => "a floating-point type",
        };
        return Err(Error::bad_file(path, format!("`{name}`: expected elements of {wanted}, got {kind:?}")));
    }
    if counts.len() > 1 {
        notes.push(format!("tensors are of several types: {counts:?}; engines convert them to one"));
    }
    Ok(counts.into_iter().max_by_key(|(_, count)| *count).map_or(Kind::Float, |(kind, _)| kind))
}

/// The draft's vocabulary from its tables, which must agree. speculators keeps both, engines read `d2t`.
fn vocabulary(path: &Path, tensors: &BTreeMap<String, Tensor>, parsed: &Parsed) -> Result<Option<VocabMap>> {
    let Some(d2t) = tensors.get(D2T) else { return Ok(None) };
    let offsets = Vec::<i64>::try_from(d2t)?;
    let ids = offsets.iter().enumerate().map(|(draft, offset)| offset.saturating_add(draft as i64)).collect();
    let map = VocabMap::new(ids, parsed.shape.vocab_size).map_err(|error| {
        Error::bad_file(path, format!("`{D2T}`: {error}"))
            .with_hint("d2t holds what is added to a draft id, not the target's ids themselves")
    })?;
    if let Some(t2d) = tensors.get(T2D) {
        let named = Vec::<bool>::try_from(t2d)?;
        if let Some(token) = map.t2d().iter().zip(&named).position(|(want, got)| want != got) {
            let problem = format!("`{T2D}[{token}]`: `{D2T}` says {}, got {}", !named[token], named[token]);
            return Err(Error::bad_file(path, problem));
        }
    }
    Ok((map.draft_size() < map.target_size()).then_some(map))
}

impl Folder {
    /// Number of trained numbers.
    pub(super) fn parameters(&self) -> u64 {
        let Parsed { shape, head, .. } = &self.parsed;
        let sizes = needed(shape, head).into_iter();
        let row = if self.mask_row.is_some() { shape.hidden_size as u64 } else { 0 };
        sizes.map(|(_, shape)| shape.iter().product::<i64>() as u64).sum::<u64>() + row
    }

    /// Whether the head is one of the vanilla Markov kind, or none at all.
    pub(super) fn head(&self) -> &Head {
        &self.parsed.head
    }

    pub(super) fn is_zlab(&self) -> bool {
        self.parsed.layout == Layout::Zlab
    }
}
