//! P-EAGLE drafts on disk: the format of vllm-project/speculators 0.9 with `speculators_model_type` `peagle`, which vLLM
//! 0.33.0 maps to its EAGLE-3 drafter with parallel drafting; folders of other trainers are read too.
//!
//! | key or tensor | what it is |
//! |---|---|
//! | `mask_token_id` | the token of what is not known yet; vLLM's `pard_token` |
//! | `mask_hidden [1, 1, nf TH]` | its features, before `fc`: vLLM projects them once |
//! | `embed_tokens.weight [V, H]` | trained, so that it is never the target's |
//! | `transformer_layer_config.model_type` | `llama`, or `qwen3` where heads of queries and keys are normed |
//!
//! `norm_output` has no meaning here, as no output is fed back, and vLLM has no `fc_norm` for these drafts: neither is
//! written.
//!
//! Shape legend: `nf` captured layers, `H` hidden size, `TH` the target's, `V` vocabulary.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::eagle3::config::{self, Target};
use super::eagle3::{
    CONFIG_FILE, D2T, Layout, T2D, WEIGHTS_FILE, read as eagle3_read, targets, trained_tensor, warm_start,
};
use super::medusa::dtype;
use super::{Beginning, Engine, EngineReport, ExportReport, Format, START_KEY, Source};
use crate::draft::peagle::PeagleShape;
use crate::draft::peagle::config::{EMBEDDING, MASK_HIDDEN, has_head_norms, windows};
use crate::error::{Error, Result};
use crate::files;
use crate::nn::RopeScaling;
use crate::vocab::VocabMap;
use crate::weights::writer;

/// Value of `speculators_model_type`.
const MODEL_TYPE: &str = "peagle";
/// Guesses where a folder does not say how many it was trained for, as in the references.
const DEPTHS: usize = 8;
/// Names of the mask's token in folders of different trainers.
const MASK_KEYS: [&str; 3] = ["mask_token_id", "pard_token", "ptd_token_id"];
/// Architectures by which a folder without `speculators_model_type` is known.
const ARCHITECTURES: [&str; 3] = ["PEagleDraftModel", "PeagleLlamaForCausalLM", "PeagleQwen3ForCausalLM"];

/// The layout of speculators and vLLM.
pub const FORMAT: Format = Format {
    name: "peagle",
    summary: "vLLM: vllm-project/speculators' P-EAGLE, layers.* and mask_hidden",
    files: &[CONFIG_FILE, WEIGHTS_FILE],
    is_file: None,
    recognise: |config| layout(config).is_some(),
    write,
    check,
    start_from: Some(start_from),
};

fn layout(config: &Value) -> Option<Layout> {
    match config.get("speculators_model_type") {
        Some(kind) => (kind == MODEL_TYPE).then_some(Layout::Speculators),
        None => {
            let names = config.get("architectures").and_then(Value::as_array)?;
            let known = names.iter().filter_map(Value::as_str).any(|name| ARCHITECTURES.contains(&name));
            known.then_some(Layout::Raw)
        }
    }
}

// -- writing ---------------------------------------------------------------------------------------------------------

fn write(source: &Source, out: &Path) -> Result<()> {
    let shape = PeagleShape::from_description(&source.description)
        .map_err(|problem| Error::Failed(format!("the checkpoint is not one of a P-EAGLE draft: {problem}")))?;
    if shape.network.fc_norm {
        return Err(Error::Failed(
            "the draft norms each captured layer by itself (`fc_norm`), which vLLM does not do for P-EAGLE".to_owned(),
        ));
    }
    let mut tensors = Vec::new();
    let mut kind = source.kind;
    for (name, want) in shape.tensors() {
        let value = trained_tensor(source, &name, &want)?;
        // Engines want one type in a file.
        let value = value.f_to_kind(*kind.get_or_insert(value.kind()))?;
        tensors.push((Layout::Speculators.stored(&name), value));
    }
    let size = &shape.network;
    if size.draft_vocab_size < size.vocab_size {
        tensors.push((D2T.to_owned(), trained_tensor(source, D2T, &[size.draft_vocab_size])?.shallow_clone()));
        tensors.push((T2D.to_owned(), trained_tensor(source, T2D, &[size.vocab_size])?.shallow_clone()));
    }
    let values = values(&shape, source, dtype(kind.unwrap_or(Kind::Float)));
    writer::write_tensors(&out.join(WEIGHTS_FILE), &tensors, &[])?;
    files::write_json(&out.join(CONFIG_FILE), &values)
}

/// config.json: an EAGLE-3 draft's, and what differs.
fn values(shape: &PeagleShape, source: &Source, dtype: &str) -> Value {
    let mut values = config::speculators(&shape.network, source, dtype);
    if let Some(values) = values.as_object_mut() {
        values.retain(|key, _| !["fc_norm", "norm_output"].contains(&key.as_str()));
        values.append(&mut config::object(json!({
            "architectures": ["PEagleSpeculator"],
            "speculators_model_type": MODEL_TYPE,
            "mask_token_id": shape.mask_token_id,
            "embed_requires_grad": true,
        })));
    }
    values["speculators_config"]["algorithm"] = json!(MODEL_TYPE);
    values["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = json!(shape.num_depths);
    values["specforge"]["num_depths"] = json!(shape.num_depths);
    let layer = &mut values["transformer_layer_config"];
    if shape.network.head_norms {
        layer["model_type"] = json!("qwen3");
    }
    if let Some(window) = shape.windows.iter().flatten().next() {
        let kind = |window: &Option<i64>| if window.is_some() { "sliding_attention" } else { "full_attention" };
        layer["layer_types"] = json!(shape.windows.iter().map(kind).collect::<Vec<_>>());
        layer["sliding_window"] = json!(window);
    }
    values
}

// -- reading ---------------------------------------------------------------------------------------------------------

/// A draft read from a folder.
#[derive(Debug)]
pub struct Imported {
    /// Its architecture. `num_target_layers` is 0 where nothing says it.
    pub shape: PeagleShape,
    /// Tensors in the order and under the names of training, on the CPU. They may lie in the mapped file: read-only.
    pub tensors: Vec<(String, Tensor)>,
    /// The draft's own vocabulary, where it is smaller than the target's.
    pub vocabulary: Option<VocabMap>,
    /// What a user should know.
    pub warnings: Vec<String>,
}

/// An opened folder whose tensors fit its configuration.
struct Folder {
    layout: Layout,
    /// The target as config.json names it.
    target: Option<PathBuf>,
    kind: Kind,
    /// Tensors in the file.
    stored: usize,
    imported: Imported,
}

/// Reads a published draft. `num_target_layers` is needed for folders that name no captured layers.
pub fn read(path: &Path, num_target_layers: Option<usize>) -> Result<Imported> {
    Ok(open(path, num_target_layers)?.imported)
}

fn open(path: &Path, num_target_layers: Option<usize>) -> Result<Folder> {
    let config_path = path.join(CONFIG_FILE);
    let config = super::config(path)?;
    let layout = layout(&config).ok_or_else(|| {
        Error::bad_file(&config_path, "is of no P-EAGLE draft").with_hint("expected `speculators_model_type`: peagle")
    })?;
    let (shape, target) = parse(&config_path, layout, &config, num_target_layers)?;
    let (weights_path, tensors, stored) = eagle3_read::weights(path)?;
    let size = &shape.network;
    let mut needed = shape.tensors();
    let tables = [(D2T.to_owned(), vec![size.draft_vocab_size]), (T2D.to_owned(), vec![size.vocab_size])];
    let mut allowed = Vec::new();
    match size.draft_vocab_size < size.vocab_size {
        true => needed.extend(tables),
        false => allowed.extend(tables),
    }
    eagle3_read::fit_names(&weights_path, &tensors, &needed, &allowed, &|name| layout.stored(name))?;
    let kind = eagle3_read::one_kind(&weights_path, &tensors)?;
    let vocabulary = eagle3_read::vocabulary(&weights_path, &tensors, size)?;
    let take = |(name, _): (String, Vec<i64>)| tensors.get(&name).map(|tensor| (name, tensor.shallow_clone()));
    let tensors = shape.tensors().into_iter().filter_map(take).collect();
    let imported = Imported { shape, tensors, vocabulary, warnings: Vec::new() };
    Ok(Folder { layout, target, kind, stored: stored.len(), imported })
}

/// The architecture and the target that a config.json describes.
fn parse(
    path: &Path,
    layout: Layout,
    config: &Value,
    num_target_layers: Option<usize>,
) -> Result<(PeagleShape, Option<PathBuf>)> {
    let refuse = |problem: String| Error::bad_file(path, problem);
    let inner = |config: &Value| match layout {
        Layout::Speculators => config.get("transformer_layer_config").cloned().unwrap_or(Value::Null),
        _ => config.clone(),
    };
    let layer = inner(config);
    // What an EAGLE-3 draft of ours cannot be, and this one can.
    let mut plain = config.clone();
    let keys = match layout {
        Layout::Speculators => plain.get_mut("transformer_layer_config").and_then(Value::as_object_mut),
        _ => plain.as_object_mut(),
    };
    if let Some(keys) = keys {
        if has_head_norms(&layer) {
            keys.insert("model_type".to_owned(), json!("llama"));
        }
        keys.retain(|key, _| !["layer_types", "parallel_drafting"].contains(&key.as_str()));
    }
    if let Some(keys) = plain.as_object_mut() {
        keys.retain(|key, _| key != "norm_output");
    }
    let parsed = config::parse(path, layout, &plain, num_target_layers)?;
    let mask = MASK_KEYS.iter().find_map(|key| config.get(key).filter(|value| !value.is_null()));
    let mask_token_id = mask.and_then(Value::as_i64).ok_or_else(|| {
        let problem = "`mask_token_id`: expected the token that stands for unknown ones";
        Error::bad_file(path, problem).with_hint("vLLM drafts nothing in parallel without it")
    })?;
    let depths = ["/specforge/num_depths", "/speculators_config/proposal_methods/0/speculative_tokens"];
    let depths = depths.iter().find_map(|key| config.pointer(key)).and_then(Value::as_u64);
    let num_depths = depths.and_then(|depths| usize::try_from(depths).ok()).unwrap_or(DEPTHS);
    let mut network = parsed.shape;
    network.head_norms = has_head_norms(&layer);
    let windows = windows(&layer, network.num_layers).map_err(refuse)?;
    let shape = PeagleShape { network, mask_token_id, num_depths, windows };
    shape.check().map_err(refuse)?;
    Ok((shape, parsed.target))
}

// -- checking --------------------------------------------------------------------------------------------------------

fn check(path: &Path, _: &Value) -> Result<ExportReport> {
    let folder = open(path, None)?;
    let Imported { shape, warnings, .. } = &folder.imported;
    let mut warnings = warnings.clone();
    let target = Target::read(folder.target.as_deref());
    match &target {
        Some(target) => target.fits(&path.join(CONFIG_FILE), &shape.network)?,
        None => warnings.push(match &folder.target {
            Some(name) => format!("target {} is not here: its sizes were not compared", name.display()),
            None => "config.json names no target: its sizes were not compared".to_owned(),
        }),
    }
    let engines = Engine::ALL.map(|engine| report(engine, &folder, target.as_ref())).to_vec();
    let parameters = shape.tensors().iter().map(|(_, shape)| shape.iter().product::<i64>() as u64).sum();
    let mut resolved = config::lines(&shape.network);
    resolved.push(format!(
        "{} guesses in one pass; token {} and `{MASK_HIDDEN}` stand for unknown ones; `{EMBEDDING}` is its own",
        shape.num_depths, shape.mask_token_id
    ));
    Ok(ExportReport {
        path: path.to_path_buf(),
        format: FORMAT.name.to_owned(),
        tensors: folder.stored,
        parameters,
        dtype: dtype(folder.kind).to_owned(),
        resolved,
        engines,
        warnings,
    })
}

/// What an engine will do with a folder: vLLM's V1 runner serves it, nobody else does.
fn report(engine: Engine, folder: &Folder, target: Option<&Target>) -> EngineReport {
    let (mut resolved, mut problems) = (Vec::new(), Vec::new());
    let unserved = targets::refusal(engine, target);
    let shape = &folder.imported.shape;
    let size = &shape.network;
    if engine != Engine::Vllm {
        problems.push("has no parallel drafting with EAGLE layers (P-EAGLE): vLLM alone serves it".to_owned());
        return EngineReport { engine, resolved, problems, unserved, direct: engine != Engine::LlamaCpp };
    }
    resolved.push(format!("captures what layers {:?} read", size.capture));
    resolved.push("its V1 runner alone, method eagle3 with parallel drafting".to_owned());
    resolved.push(match size.draft_vocab_size < size.vocab_size {
        true => format!("vocabulary: {} of {} tokens, through d2t", size.draft_vocab_size, size.vocab_size),
        false => format!("vocabulary: all {} tokens", size.vocab_size),
    });
    resolved.push("projects `mask_hidden` once; embedding: the draft's own".to_owned());
    if folder.layout != Layout::Speculators {
        problems.push(
            "takes the mask's token and the target from the speculators layout; write --format peagle".to_owned(),
        );
    }
    if size.fc_norm {
        problems.push("has no `fc_norm` for P-EAGLE: its configuration does not carry the key".to_owned());
    }
    if shape.windows.iter().any(Option::is_some) {
        problems.push("is not known to give a P-EAGLE draft's layers their windows".to_owned());
    }
    if let RopeScaling::Dynamic { .. } = size.layer.rope.scaling {
        problems.push("stretches dynamic rotary embeddings once, not with the length as in training".to_owned());
    }
    let last = target.and_then(|target| target.num_hidden_layers).unwrap_or(size.num_target_layers);
    if last > 0 && size.capture.contains(&last) {
        problems.push(format!("cannot capture the last, normed output of the target (index {last})"));
    }
    if folder.imported.vocabulary.is_none() && folder.stored > shape.tensors().len() {
        problems.push("refuses `d2t` where the draft has the target's whole vocabulary".to_owned());
    }
    EngineReport { engine, resolved, problems, unserved, direct: true }
}

// -- starting from one -----------------------------------------------------------------------------------------------

/// Copies the values of the draft in a folder into a draft in training. Everything that decides what the values mean must be
/// the same in both; the error names what is not, and the key.
fn start_from(path: &Path, beginning: &Beginning<'_>) -> Result<Vec<String>> {
    let Beginning { draft, vocabulary, .. } = *beginning;
    let own = PeagleShape::from_description(&draft.description())
        .map_err(|problem| Error::config(START_KEY, format!("this draft is no P-EAGLE draft: {problem}")))?;
    let imported = read(path, Some(own.network.num_target_layers))?;
    let mut wrong = warm_start::differences(&imported.shape.network, &own.network);
    let (theirs, ours) = (imported.shape.mask_token_id, own.mask_token_id);
    if theirs != ours {
        wrong.push(format!("mask token: {theirs} there, {ours} here (draft.mask_token_id)"));
    }
    let (theirs, ours) = (&imported.shape.windows, &own.windows);
    if theirs != ours {
        wrong.push(format!("windows of layers: {theirs:?} there, {ours:?} here (draft.config)"));
    }
    if imported.vocabulary.as_ref() != vocabulary {
        let tokens = |map: Option<&VocabMap>| map.map_or(own.network.vocab_size, VocabMap::draft_size);
        let (theirs, ours) = (tokens(imported.vocabulary.as_ref()), tokens(vocabulary));
        let what = if theirs == ours { "of other tokens".to_owned() } else { format!("{theirs} there, {ours} here") };
        wrong.push(format!("vocabulary map: {what} (draft.vocab_map={}/{WEIGHTS_FILE})", path.display()));
    }
    if !wrong.is_empty() {
        let problem = format!("{} is another draft than the one configured:\n  {}", path.display(), wrong.join("\n  "));
        return Err(Error::config(START_KEY, problem).with_hint("set these keys"));
    }
    let _no_grad = tch::no_grad_guard();
    for parameter in draft.parameters() {
        let found = imported.tensors.iter().find(|(name, _)| *name == parameter.name);
        let (_, value) = found.ok_or_else(|| {
            Error::bad_file(path, format!("holds no tensor `{}` of shape {:?}", parameter.name, parameter.value.size()))
        })?;
        parameter.value.shallow_clone().f_copy_(value)?;
    }
    Ok(imported.warnings)
}
