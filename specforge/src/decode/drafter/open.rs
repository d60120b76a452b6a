//! From what a user names to a drafter: an export, a checkpoint, a smaller model, or prompt lookup, and its tree.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tch::Tensor;

use super::{
    Asked, DraftSampling, Drafter, Guesser, ModelDrafter, Plain, PromptLookup, Trained, Trees, WithLookup,
    of_algorithm, of_format, tree_file, tree_text,
};
use crate::checkpoint;
use crate::data::ChatTokenizer;
use crate::draft::{self, DraftModel, vocabulary};
use crate::error::{Error, Result};
use crate::export::{self, Format};
use crate::gguf::packed;
use crate::models::{self, TargetModel};
use crate::strict;

/// A drafter, and what it is called.
pub struct Opened<'a> {
    /// The drafter.
    pub drafter: Box<dyn Drafter + 'a>,
    /// `none`, `prompt-lookup`, `model`, or the algorithm of a trained draft.
    pub method: String,
    /// Its tree, as it was understood.
    pub tree: String,
    /// What its trees are like.
    pub trees: Trees,
    /// Folder it was read from.
    pub folder: Option<PathBuf>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// Name of prompt lookup, where a folder could stand.
pub const PROMPT_LOOKUP: &str = "prompt-lookup";

/// The target, and where it was read from.
type Target<'a, 'p> = (&'a dyn TargetModel, &'p Path);

/// Opens what `draft` names with the tree that `tree` describes or a file names; a draft's own default where that is not
/// given.
pub fn open<'a>(
    draft: Option<&str>,
    tree: Option<&str>,
    target: Target<'a, '_>,
    sampling: DraftSampling,
) -> Result<Opened<'a>> {
    let Some(folder) = draft.filter(|draft| *draft != PROMPT_LOOKUP) else {
        return untrained(draft.is_some(), tree);
    };
    let folder = Path::new(folder);
    let opened = beside_lookup(tree, sampling, |tree| from_folder(folder, tree, target, sampling))?;
    Ok(Opened { folder: Some(folder.to_path_buf()), ..opened })
}

/// Prompt lookup, or nothing that guesses.
fn untrained<'a>(lookup: bool, tree: Option<&str>) -> Result<Opened<'a>> {
    let named = tree.map(tree_file::named).transpose()?;
    let tree = named.as_deref();
    match lookup {
        false => match tree {
            None => {
                let plain =
                    Guesser { drafter: Box::new(Plain), tree: "none".to_owned(), notes: Vec::new(), method: None };
                Ok(opened(plain, "none", Trees::None))
            }
            Some(tree) => Err(Error::Usage(format!("--tree {tree}: there is no --draft to guess with"))),
        },
        true => {
            let lookup = tree_text::lookup(tree.unwrap_or_default())?;
            let PromptLookup { longest_match, depth, nodes, .. } = lookup;
            let tree = format!("depth={depth},nodes={nodes},match={longest_match}");
            let guesser = Guesser { drafter: Box::new(lookup), tree, notes: Vec::new(), method: None };
            Ok(opened(guesser, PROMPT_LOOKUP, Trees::Lookup))
        }
    }
}

/// What `open` makes of a tree, and the lookup beside it that the end of the tree's text may ask for.
fn beside_lookup<'a>(
    text: Option<&str>,
    sampling: DraftSampling,
    open: impl FnOnce(Option<&str>) -> Result<Opened<'a>>,
) -> Result<Opened<'a>> {
    let (base, asked) = tree_text::split_lookup(text.unwrap_or_default());
    let named = tree_file::named(base)?;
    // A file may hold both.
    let (tree, inner) = tree_text::split_lookup(&named);
    let asked = asked.or(inner);
    let own = text.map(|_| tree).filter(|tree| !tree.is_empty() || asked.is_none());
    let Some(asked) = asked else { return open(own) };
    let beside = tree_text::lookup_beside(asked)?;
    if let DraftSampling::Drawn { .. } = sampling {
        let problem = "--tree: what is looked up cannot stand among guesses that are drawn; leave `+lookup` out, or decode \
                       with --policy keyed, which is lossless too";
        return Err(Error::Usage(problem.to_owned()));
    }
    let opened = open(own)?;
    let tree = format!("{}+lookup:{}", opened.tree, beside.keys());
    let tree_text::LookupBeside { lookup, alone, most } = beside;
    Ok(Opened { drafter: Box::new(WithLookup { draft: opened.drafter, lookup, alone, most }), tree, ..opened })
}

/// Whether what `draft` names is a model of its own, which guesses without anything of the target's.
pub fn is_model(folder: &Path) -> bool {
    if export::file_format_of(folder).is_some() {
        return false;
    }
    if packed::is_packed(folder) {
        return true;
    }
    let config = std::fs::read(folder.join("config.json")).ok();
    let config: Option<Value> = config.and_then(|text| strict::from_json(&text).ok());
    config.is_some_and(|config| {
        config.get("train").is_none() && export::format_of(&config).is_none() && checkpoint::find(folder).is_err()
    })
}

/// The drafter of a draft in training, with its values of this moment.
pub fn of_training<'a>(
    draft: &dyn DraftModel,
    tree: Option<&str>,
    target: &'a dyn TargetModel,
    sampling: DraftSampling,
) -> Result<Opened<'a>> {
    let parameters = draft.parameters().iter().map(|parameter| (parameter.name.clone(), parameter.value.detach()));
    let tensors: Vec<(String, Tensor)> = parameters.chain(draft.buffers()).collect();
    beside_lookup(tree, sampling, |tree| trained(&draft.description(), &tensors, tree, target, sampling))
}

fn from_folder<'a>(
    folder: &Path,
    tree: Option<&str>,
    (target, target_path): Target<'a, '_>,
    sampling: DraftSampling,
) -> Result<Opened<'a>> {
    if let Some(format) = export::file_format_of(folder) {
        return from_export(format, folder, tree, target, sampling);
    }
    if packed::is_packed(folder) {
        return from_model(folder, tree, (target, target_path), sampling);
    }
    let config_path = folder.join("config.json");
    if !folder.is_dir() {
        return Err(Error::bad_file(folder, "is not a folder").with_hint(format!(
            "name an exported draft, a run's output folder, a model folder, a GGUF file, or {PROMPT_LOOKUP}"
        )));
    }
    let not_a_checkpoint = match checkpoint::find(folder) {
        Ok(found) => {
            return trained(&found.manifest.draft, &found.tensors()?, tree, target, sampling)
                .map_err(|error| of_checkpoint(&found.path, error));
        }
        Err(error) => error,
    };
    if !config_path.exists() {
        return Err(not_a_checkpoint);
    }
    let text = std::fs::read(&config_path).map_err(Error::io("read", &config_path))?;
    let config: Value = strict::from_json(&text)
        .map_err(|problem| Error::bad_file(&config_path, format!("not valid JSON: {problem}")))?;
    // A run's own folder holds a config.json too: that of the run.
    if config.get("train").is_some() {
        return Err(not_a_checkpoint);
    }
    if let Some(format) = export::format_of(&config) {
        return from_export(format, folder, tree, target, sampling);
    }
    from_model(folder, tree, (target, target_path), sampling)
}

/// The drafter of an export.
fn from_export<'a>(
    format: &Format,
    path: &Path,
    tree: Option<&str>,
    target: &'a dyn TargetModel,
    sampling: DraftSampling,
) -> Result<Opened<'a>> {
    let kind = of_format(format.name).ok_or_else(|| {
        Error::bad_file(path, format!("decoding with drafts of the format `{}` is not supported", format.name))
    })?;
    let asked = Asked { tree: tree.unwrap_or(kind.default_tree), target, sampling };
    let guesser = (kind.from_export)(path, asked).map_err(|error| of_folder(path, error))?;
    Ok(opened(guesser, kind.algorithm, kind.trees))
}

/// The drafter that a smaller model is.
fn from_model<'a>(
    folder: &Path,
    tree: Option<&str>,
    (target, target_path): Target<'a, '_>,
    sampling: DraftSampling,
) -> Result<Opened<'a>> {
    let model = models::load_target(folder, target.kind(), target.device())?;
    let tokenizers = [ChatTokenizer::load(target_path, None)?, ChatTokenizer::load(folder, None)?];
    ModelDrafter::check_tokenizers(&tokenizers[0], &tokenizers[1]).map_err(|error| of_folder(folder, error))?;
    let (tree, text) = tree_text::dynamic(tree.unwrap_or(tree_text::DEFAULT))?;
    let drafter = ModelDrafter::new(model, target.info(), tree, sampling).map_err(|error| of_folder(folder, error))?;
    let guesser = Guesser { drafter: Box::new(drafter), tree: text, notes: Vec::new(), method: None };
    Ok(opened(guesser, "model", Trees::Dynamic))
}

fn of_folder(folder: &Path, error: Error) -> Error {
    match error {
        Error::Failed(problem) => Error::bad_file(folder, problem),
        other => other,
    }
}

/// An error over a checkpoint, whose manifest holds a configuration of its own.
fn of_checkpoint(folder: &Path, error: Error) -> Error {
    match error {
        Error::Config { key, problem, hint } if key.starts_with("draft") => {
            let path = folder.join(checkpoint::manifest::MANIFEST_FILE);
            Error::BadFile { path, problem: format!("`{key}`: {problem}"), hint }
        }
        other => of_folder(folder, other),
    }
}

fn opened<'a>(guesser: Guesser<'a>, method: &str, trees: Trees) -> Opened<'a> {
    let Guesser { drafter, tree, notes, method: own } = guesser;
    Opened { drafter, method: own.unwrap_or(method).to_owned(), tree, trees, folder: None, notes }
}

/// The drafter of a checkpoint's description and tensors.
fn trained<'a>(
    description: &Value,
    tensors: &[(String, Tensor)],
    tree: Option<&str>,
    target: &'a dyn TargetModel,
    sampling: DraftSampling,
) -> Result<Opened<'a>> {
    let algorithm = draft::algorithm(&description["draft"])?.name;
    let kind = of_algorithm(algorithm).ok_or_else(|| {
        Error::Failed(format!("decoding with drafts of the algorithm `{algorithm}` is not supported"))
    })?;
    let trained = Trained { description, tensors, vocabulary: vocabulary::from_tensors(tensors)? };
    let asked = Asked { tree: tree.unwrap_or(kind.default_tree), target, sampling };
    Ok(opened((kind.from_checkpoint)(&trained, asked)?, kind.algorithm, kind.trees))
}
