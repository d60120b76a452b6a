//! Golden tests: files of tensors that a reference implementation made, by name prefix.
//!
//! `SPECFORGE_GOLDENS=DIR ./scripts/test goldens` runs every file under a folder; without the variable the committed
//! files of `tests/data/goldens` are run. A file that no prefix claims fails, so that none is skipped by accident.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use safetensors::SafeTensors;
use specforge::weights::WeightsFolder;
use tch::{Device, Kind, Tensor};

mod block_batch;
mod block_domino;
mod block_dspark;
mod block_heads;
mod block_inference;
mod block_lilicorr;
mod block_losses;
mod block_parts;
mod block_selector;
mod block_training;
mod block_xpress;
mod chat_templates;
mod eagle3;
mod eagle_trees;
mod families;
mod llada;
mod medusa;
mod medusa_trees;
mod noise_keyed;
mod peagle;
mod smollm2;
mod tiny_llama;
mod var;
mod var_e2e;
mod var_spec;
mod verify_budget;
mod vqvae;

/// Checks one file. `Ok` says what was compared, `Err` what differs.
type Check = fn(&Path) -> Result<String, String>;

/// Which check a file belongs to, by the beginning of its name: the longest that fits. Adding a golden is adding a line.
const PREFIXES: &[(&str, Check)] = &[
    // targets
    ("smollm2", smollm2::check),
    ("tiny_llama_", tiny_llama::check),
    ("family_", families::check),
    ("llada_forward", llada::check_forward),
    ("llada_generate", llada::check_generate),
    ("llada_tokenskip", llada::check_tokenskip),
    // what they are given
    ("template_", chat_templates::check),
    // drafts
    ("eagle3_official", eagle3::check_official),
    ("eagle3_summary", eagle3::summary::check),
    ("eagle3_", eagle3::check),
    ("eagle_tree_", eagle_trees::check),
    ("medusa_choices", medusa_trees::check_choices),
    ("medusa", medusa::check),
    // block drafters
    ("losses", block_losses::check),
    ("infer_dflash2", |path| block_inference::behind_backbone(path, block_selector::check_inference)),
    ("infer_dflash", block_inference::check_dflash),
    ("loop_dflash", block_inference::check_loop),
    ("sp_peagle", peagle::check_speculators),
    ("infer_peagle", peagle::check_inference),
    ("peagle_", peagle::check_specforge),
    ("sp_dflash_", block_training::check_speculators_dflash),
    ("dflash", block_training::check_specforge_dflash),
    ("dpace", block_training::check_specforge_dflash),
    ("infer_dspark", |path| block_inference::behind_backbone(path, block_dspark::check_block)),
    ("sp_dspark", block_dspark::check_speculators),
    ("dspark_", block_dspark::check_specforge),
    ("infer_domino", |path| block_inference::behind_backbone(path, block_domino::check_block)),
    ("domino_", block_domino::check_specforge),
    // image models
    ("vqvae_", vqvae::check),
    ("vqvae_ch32_hash_", vqvae::check_hashed),
    ("vqvae_phi_index_", vqvae::check_phi_index),
    // what of them is verified
    ("dspark_schedule", verify_budget::check),
    ("infer_lilicorr", |path| block_inference::behind_backbone(path, block_lilicorr::check_inference)),
    ("infer_xpress", |path| block_inference::behind_backbone(path, block_xpress::check_inference)),
    ("sp_dflash2", block_selector::check_speculators),
    ("mo_dflash2", block_selector::check_modelopt),
    ("na_dflash2", block_selector::check_automodel),
    ("mo_lilicorr", block_lilicorr::check_modelopt),
    ("sp_xpress", block_xpress::check_speculators),
    // images
    ("noise_keyed_", noise_keyed::check),
    ("var_", var::check),
    ("var_spec_", var_spec::check),
    ("var_e2e_", var_e2e::check),
    ("var_filter_", var::check_filter),
];

/// How the names of folders begin that are one golden each.
const FOLDERS: &str = "family_";

#[test]
fn goldens() {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/goldens");
    let folder = std::env::var_os("SPECFORGE_GOLDENS").map_or(committed, PathBuf::from);
    if let Err(problems) = run_folder(&folder) {
        panic!("{problems}");
    }
}

/// Runs every golden file under a folder and returns how many there were, or what failed, a line each.
pub fn run_folder(folder: &Path) -> Result<usize, String> {
    let mut files = Vec::new();
    collect(folder, &mut files).map_err(|error| format!("{}: {error}", folder.display()))?;
    files.sort();
    if files.is_empty() {
        return Err(format!("{}: no golden file lies here", folder.display()));
    }
    let mut problems = Vec::new();
    for file in &files {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let claims = PREFIXES.iter().filter(|(prefix, _)| name.starts_with(prefix));
        let check = claims.max_by_key(|(prefix, _)| prefix.len());
        let known = || PREFIXES.iter().map(|(prefix, _)| *prefix).collect::<Vec<_>>().join(", ");
        match check.map_or_else(|| Err(format!("no golden test knows it; known: {}", known())), |(_, run)| run(file)) {
            Ok(summary) => println!("golden ok      {}: {summary}", file.display()),
            Err(problem) => {
                println!("golden FAILED  {}: {problem}", file.display());
                problems.push(format!("{}: {problem}", file.display()));
            }
        }
    }
    if problems.is_empty() {
        return Ok(files.len());
    }
    Err(format!("{} of {} golden files failed\n{}", problems.len(), files.len(), problems.join("\n")))
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let is_one = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(FOLDERS));
        if path.is_dir() && !is_one {
            collect(&path, files)?;
        } else if path.file_name().is_none_or(|name| name != "README.md") {
            files.push(path);
        }
    }
    Ok(())
}

/// One golden file: its tensors and its metadata.
pub struct Golden {
    tensors: Rc<WeightsFolder>,
    /// Tensors that are not in the file.
    added: HashMap<String, Tensor>,
    metadata: HashMap<String, String>,
}

impl Golden {
    /// Opens a file.
    pub fn open(path: &Path) -> Result<Self, String> {
        let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| error.to_string())?;
        let tensors = WeightsFolder::open(path).map_err(|error| error.to_string())?;
        let metadata = header.metadata().clone().unwrap_or_default();
        Ok(Self { tensors: Rc::new(tensors), added: HashMap::new(), metadata })
    }

    /// A tensor in its stored element type.
    pub fn tensor(&self, name: &str) -> Result<Tensor, String> {
        if let Some(tensor) = self.added.get(name) {
            return Ok(tensor.shallow_clone());
        }
        let kind = self.tensors.kind(name).unwrap_or(Kind::Float);
        self.tensors.load(name, kind, Device::Cpu).map_err(|error| error.to_string())
    }

    /// Whether a tensor is there.
    pub fn has(&self, name: &str) -> bool {
        self.added.contains_key(name) || self.tensors.contains(name)
    }

    /// The integers of a tensor.
    pub fn integers(&self, name: &str) -> Result<Vec<i64>, String> {
        Vec::<i64>::try_from(self.tensor(name)?.to_kind(Kind::Int64).flatten(0, -1)).map_err(|error| error.to_string())
    }

    /// A metadata entry.
    pub fn text(&self, key: &str) -> Result<&str, String> {
        self.metadata.get(key).map(String::as_str).ok_or_else(|| format!("the metadata lack `{key}`"))
    }

    /// The same file with another metadata entry.
    pub fn with_text(mut self, key: &str, value: &str) -> Self {
        self.metadata.insert(key.to_owned(), value.to_owned());
        self
    }

    /// The same file with one more tensor.
    pub fn with_tensor(mut self, name: &str, tensor: Tensor) -> Self {
        self.added.insert(name.to_owned(), tensor);
        self
    }

    /// Another handle of the same file.
    pub fn again(&self) -> Self {
        let added = self.added.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        Self { tensors: Rc::clone(&self.tensors), added, metadata: self.metadata.clone() }
    }

    /// Names of the tensors that begin with `prefix`, without it.
    pub fn names_after<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        self.tensors.names().filter_map(move |name| name.strip_prefix(prefix))
    }
}

/// Largest difference of any row (last dimension) of two tensors; an error where it exceeds the tolerance, naming the
/// row. NaN never passes.
pub fn compare(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) -> Result<f64, String> {
    compare_scaled(what, got, want, tolerance, 0.0)
}

/// The same where a row's tolerance is the absolute one or `relative` times its largest value, whichever is larger.
pub fn compare_scaled(what: &str, got: &Tensor, want: &Tensor, absolute: f64, relative: f64) -> Result<f64, String> {
    if got.size() != want.size() {
        return Err(format!("{what}: expected shape {:?}, got {:?}", want.size(), got.size()));
    }
    let width = *want.size().last().unwrap_or(&1);
    let (got, want) = (got.to_kind(Kind::Double), want.to_kind(Kind::Double));
    let largest = |tensor: Tensor| Vec::<f64>::try_from(tensor.abs().view([-1, width]).amax([-1], false));
    let differences = largest(got - &want).map_err(|error| error.to_string())?;
    let sizes = largest(want).map_err(|error| error.to_string())?;
    for (row, (&difference, size)) in differences.iter().zip(sizes).enumerate() {
        let tolerance = absolute.max(relative * size);
        if difference.is_nan() || difference > tolerance {
            return Err(format!("{what}: row {row} differs by {difference:.3e}, tolerance {tolerance:.1e}"));
        }
    }
    Ok(differences.into_iter().fold(0.0, f64::max))
}

#[test]
fn a_folder_without_goldens_or_with_a_stranger_fails() {
    let folder = tempfile::tempdir().unwrap();
    assert!(run_folder(&folder.path().join("absent")).is_err());
    assert!(run_folder(folder.path()).unwrap_err().contains("no golden file"));
    std::fs::create_dir(folder.path().join("inner")).unwrap();
    std::fs::write(folder.path().join("inner/stranger.safetensors"), "x").unwrap();
    assert!(run_folder(folder.path()).unwrap_err().contains("no golden test knows it"));
}
