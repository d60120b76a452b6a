//! Layouts of files with the hidden states of one document.
//!
//! | written by | file | tensors |
//! |---|---|---|
//! | SpecForge, EAGLE-3 | `data_N.ckpt`, `.ckpt.gz` | `input_ids [T]`, `loss_mask [T]`, `aux_hidden_state [1, T, nH]`, `hidden_state [1, T, H]`: the final one, behind the last norm |
//! | SpecForge, DSpark | `data_N.ckpt` | `input_ids`, `loss_mask`, `hidden_states [1, T, nH]`, `target_last_hidden_states [1, T, H]` |
//! | speculators 0.3 and later | `hs_N.safetensors` | `token_ids [T]`, `hidden_states [T, n + 1, H]`: the last one before the last norm |
//! | speculators before | `data_N.pt` | `input_ids [T]`, `loss_mask [T]`, `hidden_states`: a list of `n + 1` tensors `[T, H]` |
//!
//! The first, second and last are what `torch.save` writes, read without running anything.
//!
//! SpecForge pads the documents of a batch at their ends and writes the padding: a run of one token at the end that is not
//! trained.

use std::path::Path;

use tch::{Kind, Tensor};

use crate::features::states_file::StatesFile;
use crate::files::torch_file::{TensorHeader, TorchFile};

/// Longest document, and widest states of all layers together.
const MOST_TOKENS: u64 = 1 << 24;
const MOST_ELEMENTS: u64 = 1 << 36;

/// An open file.
pub(super) enum ForeignFile {
    Torch(Box<TorchFile>),
    States(StatesFile),
}

/// Tokens of a document, and whether each is trained.
type Tokens = (Vec<i64>, Option<Vec<bool>>);

impl ForeignFile {
    /// Whether trainers give such names to files with states.
    pub(super) fn is_named_so(path: &Path) -> bool {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let ends = |ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
        !name.starts_with('.')
            && (ends(&[".ckpt", ".ckpt.gz"])
                || (name.starts_with("data_") && ends(&[".pt"]))
                || (name.starts_with("hs_") && ends(&[".safetensors"])))
    }

    /// Opens a file. A problem is given in words.
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        match path.extension().is_some_and(|extension| extension == "safetensors") {
            true => StatesFile::open(path).map(Self::States),
            false => TorchFile::open(path).map(|file| Self::Torch(Box::new(file))),
        }
    }

    /// Tokens and marks, with padding.
    pub(super) fn tokens(&mut self) -> Result<Tokens, String> {
        let (ids, marks) = match self {
            Self::States(file) => (file.ids()?, None),
            Self::Torch(file) => {
                let ids = integers(file, "input_ids")?;
                let marks = match file.header("loss_mask") {
                    Some(_) => Some(integers(file, "loss_mask")?.into_iter().map(|mark| mark != 0).collect::<Vec<_>>()),
                    None => None,
                };
                (ids, marks)
            }
        };
        if ids.is_empty() {
            return Err("holds no tokens".to_owned());
        }
        match &marks {
            Some(marks) if marks.len() != ids.len() => {
                let (want, got) = (ids.len(), marks.len());
                Err(format!("`loss_mask`: expected a mark for each of {want} tokens, got {got}"))
            }
            _ => Ok((ids, marks)),
        }
    }

    /// Number of states of each token, from the shapes alone.
    pub(super) fn layers(&self) -> Result<usize, String> {
        match self {
            Self::States(file) => file.layers(),
            Self::Torch(file) => match layout(file)? {
                Layout::List(names) => Ok(names.len()),
                Layout::Joined { others, last } => {
                    let (others_width, width) = (width_of(file, others)?, width_of(file, last)?);
                    match width > 0 && others_width % width == 0 {
                        true => Ok((others_width / width) as usize + 1),
                        false => Err(format!("`{others}`: expected a multiple of {width} numbers, got {others_width}")),
                    }
                }
            },
        }
    }

    /// The states, `[T, H]` for each layer, in the element type of the file.
    pub(super) fn states(&mut self) -> Result<Vec<Tensor>, String> {
        match self {
            Self::States(file) => file.states(),
            Self::Torch(file) => match layout(file)? {
                Layout::List(names) => names.iter().map(|name| matrix(file, name)).collect(),
                Layout::Joined { others, last } => {
                    let (joined, last) = (matrix(file, others)?, matrix(file, last)?);
                    let width = last.size()[1];
                    let count = self.layers()? as i64 - 1;
                    let part = |layer: i64| joined.f_narrow(1, layer * width, width).map_err(|error| error.to_string());
                    let mut states = (0..count).map(part).collect::<Result<Vec<_>, String>>()?;
                    states.push(last);
                    Ok(states)
                }
            },
        }
    }
}

/// How a torch file names its states.
enum Layout {
    /// Side by side, the final one apart.
    Joined { others: &'static str, last: &'static str },
    /// One by one, the final one last.
    List(Vec<String>),
}

fn layout(file: &TorchFile) -> Result<Layout, String> {
    let has = |name: &str| file.header(name).is_some();
    if has("aux_hidden_state") && has("hidden_state") {
        return Ok(Layout::Joined { others: "aux_hidden_state", last: "hidden_state" });
    }
    if has("hidden_states") && has("target_last_hidden_states") {
        return Ok(Layout::Joined { others: "hidden_states", last: "target_last_hidden_states" });
    }
    let listed: Vec<String> =
        (0..).map(|place| format!("hidden_states.{place}")).take_while(|name| has(name)).collect();
    if !listed.is_empty() {
        return Ok(Layout::List(listed));
    }
    let names = file.names().collect::<Vec<_>>().join(", ");
    if has("hidden_states") || has("hidden_state") {
        return Err(format!(
            "holds no final state beside the others (its tensors: {names}): without it there is nothing to learn from; it was \
             written for a method that runs the target's last layer itself, or without --enable-aux-hidden-states"
        ));
    }
    Err(format!("holds no hidden states in a known layout; its tensors: {names}"))
}

/// The last axis of a tensor.
fn width_of(file: &TorchFile, name: &str) -> Result<u64, String> {
    let header = file.header(name).ok_or_else(|| format!("holds no tensor `{name}`"))?;
    Ok(header.shape.last().copied().unwrap_or(0))
}

/// A tensor `[T, W]` or `[1, T, W]` of floating-point numbers, as `[T, W]`.
fn matrix(file: &mut TorchFile, name: &str) -> Result<Tensor, String> {
    let TensorHeader { storage, shape } = file.header(name).ok_or_else(|| format!("holds no tensor `{name}`"))?;
    let (kind, width) = match storage {
        "FloatStorage" => (Kind::Float, 4),
        "BFloat16Storage" => (Kind::BFloat16, 2),
        "HalfStorage" => (Kind::Half, 2),
        other => return Err(format!("`{name}`: expected float32, bfloat16 or float16, got {other}")),
    };
    let size = match shape {
        &[tokens, numbers] | &[1, tokens, numbers] => [tokens as i64, numbers as i64],
        other => return Err(format!("`{name}`: expected [tokens, width] or [1, tokens, width], got {other:?}")),
    };
    let bytes = file.elements(name, width, MOST_ELEMENTS)?;
    Tensor::f_from_data_size(&bytes, &size, kind).map_err(|error| format!("`{name}`: {error}"))
}

/// A tensor `[T]` or `[1, T]` of whole numbers or truth values.
fn integers(file: &mut TorchFile, name: &str) -> Result<Vec<i64>, String> {
    let TensorHeader { storage, shape } = file.header(name).ok_or_else(|| format!("holds no tensor `{name}`"))?;
    let width = match storage {
        "LongStorage" => 8,
        "IntStorage" => 4,
        "BoolStorage" | "ByteStorage" => 1,
        other => return Err(format!("`{name}`: expected whole numbers, got {other}")),
    };
    if !matches!(shape, [_] | [1, _]) {
        return Err(format!("`{name}`: expected one axis, got shape {shape:?}"));
    }
    let bytes = file.elements(name, width, MOST_TOKENS)?;
    Ok(match width {
        8 => bytes.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect(),
        4 => bytes.as_chunks().0.iter().map(|&bytes| i64::from(i32::from_le_bytes(bytes))).collect(),
        _ => bytes.iter().map(|&byte| i64::from(byte)).collect(),
    })
}

/// Tokens before the padding: a run of two or more of the same token at the end, none of them trained. One such token ends
/// many templates.
pub(super) fn unpadded(ids: &[i64], marks: Option<&[bool]>) -> usize {
    let Some(marks) = marks else { return ids.len() };
    let Some(last) = ids.last() else { return 0 };
    let run = ids.iter().zip(marks).rev().take_while(|&(id, mark)| id == last && !mark).count();
    if run < 2 { ids.len() } else { ids.len() - run }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_ends_where_something_else_begins() {
        let length = |ids: &[i64], trained: &[usize]| {
            let marks: Vec<bool> = (0..ids.len()).map(|place| trained.contains(&place)).collect();
            unpadded(ids, Some(&marks))
        };
        assert_eq!(length(&[5, 6, 2, 0, 0, 0], &[1, 2]), 3);
        assert_eq!(length(&[5, 6, 2, 2, 2, 2], &[1, 2]), 3, "padding with the end of a turn");
        assert_eq!(length(&[5, 6, 2, 0], &[1, 2]), 4, "one token that is not trained ends many templates");
        assert_eq!(length(&[5, 6, 2], &[1, 2]), 3);
        assert_eq!(length(&[0, 0], &[]), 0);
    }

    /// What PyTorch itself writes; see tests/data/states/README.md.
    #[test]
    fn files_that_pytorch_writes_are_read() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/states");
        for (name, kind) in [("data_0.ckpt", Kind::BFloat16), ("data_0.pt", Kind::Float)] {
            let mut file = ForeignFile::open(&folder.join(name)).unwrap();
            assert_eq!(file.layers().unwrap(), 4, "{name}");
            let (ids, marks) = file.tokens().unwrap();
            assert_eq!((ids, marks), (vec![1, 5, 6, 7, 2], Some(vec![false, false, true, true, true])));
            let states = file.states().unwrap();
            let base = Tensor::arange(20, (Kind::Float, tch::Device::Cpu)).view([5, 4]);
            let want: Vec<Tensor> = (0..3).map(|layer| &base + 100 * layer).chain([&base / 8]).collect();
            assert_eq!(states.len(), want.len());
            for (got, want) in states.iter().zip(want) {
                assert!(got.kind() == kind && got.equal(&want.to_kind(kind)), "{name}");
            }
        }
    }

    #[test]
    fn names_tell_files_with_states_from_others() {
        let named = |name: &str| ForeignFile::is_named_so(Path::new(name));
        for yes in ["rows_0-2000/data_7.ckpt", "data_7.ckpt.gz", "data_12.pt", "out/hs_3.safetensors"] {
            assert!(named(yes), "{yes}");
        }
        for no in
            ["token_freq.pt", "model.safetensors", ".data_7.ckpt", "data_config.json", "data-00000-of-00001.arrow"]
        {
            assert!(!named(no), "{no}");
        }
    }
}
