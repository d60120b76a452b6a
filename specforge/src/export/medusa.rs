//! Medusa heads on disk, in two layouts.
//!
//! `medusa` is the original repository's (FasterDecoding/Medusa `e2a5d20`): `medusa_lm_head.safetensors` with
//! `{head}.{block}.linear.{weight,bias}` and, unless config.json says `"version": "2"` (heads share the target's
//! projection), `{head}.{blocks}.weight`.
//!
//! `medusa-vllm` is vLLM's up to 0.30: `model.safetensors` with `blocks.{head}.layers.{block}.{weight,bias}` and
//! `lm_heads.{head}.weight`. `medusa_fc_bias` must be set there, or the engine drops the biases.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::{ExportReport, Format, Source};
use crate::draft::medusa::{HeadProjection, MedusaConfig};
use crate::error::{Error, Result};
use crate::files;
use crate::models::LlamaConfig;
use crate::weights::{WeightsFolder, writer};

const ORIGINAL_FILE: &str = "medusa_lm_head.safetensors";
const VLLM_FILE: &str = "model.safetensors";

/// The original repository's layout.
pub const ORIGINAL: Format = Format {
    name: "medusa",
    summary: "the original repository's names: medusa_lm_head.safetensors",
    files: &["config.json", ORIGINAL_FILE],
    recognise: |config| config.get("medusa_num_heads").is_some(),
    write: write_original,
    check: check_original,
};

/// vLLM's layout.
pub const VLLM: Format = Format {
    name: "medusa-vllm",
    summary: "vLLM up to 0.30: model.safetensors with blocks.* and lm_heads.*",
    files: &["config.json", VLLM_FILE],
    recognise: |config| config.get("model_type").is_some_and(|kind| kind == "medusa"),
    write: write_vllm,
    check: check_vllm,
};

/// What a checkpoint says of its heads.
#[derive(Deserialize)]
struct Description {
    draft: MedusaConfig,
    hidden_size: i64,
    vocab_size: i64,
}

/// Heads read back from an export, under the names training uses.
#[derive(Debug)]
pub struct Heads {
    /// Number of heads and blocks, projection.
    pub config: MedusaConfig,
    /// `H`
    pub hidden_size: i64,
    /// Tensors by training name.
    pub tensors: Vec<(String, Tensor)>,
}

/// Tensor names of one head: (name in training with every block spelled out, name in the layout).
fn names(head: usize, config: &MedusaConfig, vllm: bool) -> Vec<(String, String)> {
    let mut names = Vec::new();
    for block in 0..config.num_layers {
        for part in ["weight", "bias"] {
            let trained = format!("{head}.{block}.linear.{part}");
            let vllm_name = format!("blocks.{head}.layers.{block}.{part}");
            names.push((trained.clone(), if vllm { vllm_name } else { trained }));
        }
    }
    if config.projection == HeadProjection::Own || vllm {
        let trained = format!("{head}.{}.weight", config.num_layers);
        names.push((trained.clone(), if vllm { format!("lm_heads.{head}.weight") } else { trained }));
    }
    names
}

/// The tensors of a source under a layout's names.
fn renamed(source: &Source, description: &Description, vllm: bool) -> Result<Vec<(String, Tensor)>> {
    let config = &description.draft;
    let find =
        |name: &str| source.tensors.iter().find(|(other, _)| other == name).map(|(_, tensor)| tensor.shallow_clone());
    let shared = match config.projection {
        HeadProjection::Shared if vllm => Some(target_head(source, description)?),
        _ => None,
    };
    // The target's head follows the trained tensors: engines want one type in a file.
    let kind = source.kind.or_else(|| source.tensors.first().map(|(_, tensor)| tensor.kind())).unwrap_or(Kind::Float);
    let mut tensors = Vec::new();
    for head in 0..config.num_heads {
        for (trained, exported) in names(head, config, vllm) {
            // Tied blocks are stored once in training and once for each place in an export.
            let first_block = trained.replacen(&format!("{head}.{}.", block_of(&trained)), &format!("{head}.0."), 1);
            let tied = || config.share_layers.then(|| find(&first_block)).flatten();
            let value = find(&trained).or_else(tied).or_else(|| shared.as_ref().map(Tensor::shallow_clone));
            let value = value.ok_or_else(|| Error::Failed(format!("the checkpoint holds no tensor `{trained}`")))?;
            tensors.push((exported, value.f_to_kind(kind)?));
        }
    }
    Ok(tensors)
}

fn block_of(name: &str) -> &str {
    name.split('.').nth(1).unwrap_or_default()
}

/// The target's own projection, for a layout that has no shared one.
fn target_head(source: &Source, description: &Description) -> Result<Tensor> {
    let weights = WeightsFolder::open(&source.target)?;
    let name = if weights.contains("lm_head.weight") { "lm_head.weight" } else { "model.embed_tokens.weight" };
    let kind = weights.kind(name).unwrap_or(Kind::Float);
    let expected = vec![(name.to_owned(), vec![description.vocab_size, description.hidden_size])];
    weights.check(&expected, |_| true)?;
    weights.load(name, kind, Device::Cpu)
}

fn describe(source: &Source) -> Result<Description> {
    serde_json::from_value(source.description.clone())
        .map_err(|error| Error::Failed(format!("the checkpoint is not one of Medusa heads: {error}")))
}

fn write_original(source: &Source, out: &Path) -> Result<()> {
    let description = describe(source)?;
    let mut config = Map::from_iter([
        ("medusa_num_heads".to_owned(), json!(description.draft.num_heads)),
        ("medusa_num_layers".to_owned(), json!(description.draft.num_layers)),
        ("base_model_name_or_path".to_owned(), json!(source.target)),
    ]);
    if description.draft.projection == HeadProjection::Shared {
        config.insert("version".to_owned(), json!("2"));
    }
    writer::write_tensors(&out.join(ORIGINAL_FILE), &renamed(source, &description, false)?, &[])?;
    files::write_json(&out.join("config.json"), &config)
}

fn write_vllm(source: &Source, out: &Path) -> Result<()> {
    let description = describe(source)?;
    let tensors = renamed(source, &description, true)?;
    let config = json!({
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": description.hidden_size,
        "vocab_size": description.vocab_size,
        "truncated_vocab_size": description.vocab_size,
        "num_heads": description.draft.num_heads,
        "num_hidden_layers": description.draft.num_layers,
        "medusa_fc_bias": true,
        "torch_dtype": dtype(tensors[0].1.kind()),
        "base_model_name_or_path": source.target,
    });
    writer::write_tensors(&out.join(VLLM_FILE), &tensors, &[])?;
    files::write_json(&out.join("config.json"), &config)
}

/// Hugging Face's name of an element type.
pub(super) fn dtype(kind: Kind) -> &'static str {
    match kind {
        Kind::Float => "float32",
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "unsupported",
    }
}

/// A number of config.json that must be there and at least 1.
fn count(path: &Path, config: &Value, key: &str) -> Result<usize> {
    let value = config.get(key);
    value.and_then(Value::as_u64).filter(|&number| number > 0).map(|number| number as usize).ok_or_else(|| {
        let got = value.map_or("nothing".to_owned(), Value::to_string);
        Error::bad_file(path.join("config.json"), format!("`{key}`: expected a positive number, got {got}"))
    })
}

fn check_original(path: &Path, config: &Value) -> Result<ExportReport> {
    let shared = match config.get("version").and_then(Value::as_str) {
        Some("2") => true,
        None | Some("1") => false,
        Some(other) => {
            let problem = format!("`version`: expected \"2\" or none, got \"{other}\"");
            return Err(Error::bad_file(path.join("config.json"), problem));
        }
    };
    let config = MedusaConfig {
        num_heads: count(path, config, "medusa_num_heads")?,
        num_layers: count(path, config, "medusa_num_layers")?,
        projection: if shared { HeadProjection::Shared } else { HeadProjection::Own },
        ..MedusaConfig::default()
    };
    let report = check_tensors(path, ORIGINAL_FILE, &config, false)?;
    Ok(ExportReport { format: ORIGINAL.name.to_owned(), ..report })
}

fn check_vllm(path: &Path, value: &Value) -> Result<ExportReport> {
    let config = MedusaConfig {
        num_heads: count(path, value, "num_heads")?,
        num_layers: count(path, value, "num_hidden_layers")?,
        ..MedusaConfig::default()
    };
    if value.get("medusa_fc_bias") != Some(&json!(true)) {
        return Err(Error::bad_file(
            path.join("config.json"),
            "`medusa_fc_bias`: expected true, the heads have biases",
        )
        .with_hint("vLLM drops the biases without it, and acceptance falls"));
    }
    let report = check_tensors(path, VLLM_FILE, &config, true)?;
    let weights = WeightsFolder::open(&path.join(VLLM_FILE))?;
    let head = weights.shape("lm_heads.0.weight").unwrap_or(&[0, 0]);
    for (key, want) in [("vocab_size", head[0]), ("truncated_vocab_size", head[0]), ("hidden_size", head[1])] {
        let got = count(path, value, key)? as i64;
        if got != want {
            let problem = format!("`{key}`: the tensors say {want}, got {got}");
            return Err(Error::bad_file(path.join("config.json"), problem));
        }
    }
    Ok(ExportReport { format: VLLM.name.to_owned(), ..report })
}

/// Checks names, shapes and element types. Sizes come from the first block and the first projection.
fn check_tensors(path: &Path, file: &str, config: &MedusaConfig, vllm: bool) -> Result<ExportReport> {
    let file_path = path.join(file);
    let weights = WeightsFolder::open(&file_path)?;
    let first = names(0, config, vllm);
    let size = |name: Option<&(String, String)>| name.and_then(|(_, name)| weights.shape(name)).map(|shape| shape[0]);
    let hidden = size(first.first());
    let has_projection = first.len() > 2 * config.num_layers;
    let vocabulary = if has_projection { size(first.last()) } else { None };
    let mut expected = Vec::new();
    for head in 0..config.num_heads {
        for (trained, exported) in names(head, config, vllm) {
            let shape = match trained.rsplit_once('.') {
                Some((_, "bias")) => vec![hidden.unwrap_or(-1)],
                _ if trained.contains("linear") => vec![hidden.unwrap_or(-1); 2],
                _ => vec![vocabulary.unwrap_or(-1), hidden.unwrap_or(-1)],
            };
            expected.push((exported, shape));
        }
    }
    weights.check(&expected, |_| false)?;
    let kinds: Vec<Kind> = weights.names().filter_map(|name| weights.kind(name)).collect();
    let kind = kinds[0];
    if dtype(kind) == "unsupported" || kinds.iter().any(|other| *other != kind) {
        return Err(Error::bad_file(
            &file_path,
            format!("expected one floating-point type in all tensors, got {kinds:?}"),
        ));
    }
    let mut warnings = Vec::new();
    let base = base_model(path);
    match base.as_ref().map(|base| (base, base.join("config.json"))) {
        Some((_, config_path)) if config_path.is_file() => {
            let target = LlamaConfig::read(&config_path)?;
            let pairs = [("hidden size", hidden, target.hidden_size), ("vocabulary", vocabulary, target.vocab_size)];
            if let Some((what, got, want)) = pairs.iter().find(|(_, got, want)| got.is_some_and(|got| got != *want)) {
                let problem = format!("{what}: the target has {want}, the heads have {}", got.unwrap_or_default());
                return Err(Error::bad_file(&file_path, problem));
            }
        }
        Some((base, _)) => warnings.push(format!("target {} is not here: its sizes were not compared", base.display())),
        None => warnings.push("config.json names no base_model_name_or_path".to_owned()),
    }
    let projection = if has_projection { "own projections" } else { "the target's projection" };
    let resolved = vec![
        format!("{} heads of {} residual blocks, {projection}", config.num_heads, config.num_layers),
        "head k predicts token t + 2 + k from the target's normed hidden state of token t".to_owned(),
    ];
    let parameters = expected.iter().map(|(_, shape)| shape.iter().product::<i64>() as u64).sum();
    let (tensors, dtype) = (expected.len(), dtype(kind).to_owned());
    let (path, format, engines) = (path.to_path_buf(), String::new(), Vec::new());
    Ok(ExportReport { path, format, tensors, parameters, dtype, resolved, engines, warnings })
}

fn base_model(path: &Path) -> Option<std::path::PathBuf> {
    let text = std::fs::read_to_string(path.join("config.json")).ok()?;
    let config: Value = serde_json::from_str(&text).ok()?;
    config.get("base_model_name_or_path").and_then(Value::as_str).filter(|name| !name.is_empty()).map(Into::into)
}

/// Reads an exported folder of either layout, under the names training uses.
pub fn read(path: &Path) -> Result<Heads> {
    let report = super::check(path)?;
    let vllm = report.format == VLLM.name;
    let value = super::config(path)?;
    let (heads_key, layers_key, file) = match vllm {
        true => ("num_heads", "num_hidden_layers", VLLM_FILE),
        false => ("medusa_num_heads", "medusa_num_layers", ORIGINAL_FILE),
    };
    let shared = !vllm && value.get("version").is_some();
    let config = MedusaConfig {
        num_heads: count(path, &value, heads_key)?,
        num_layers: count(path, &value, layers_key)?,
        projection: if shared { HeadProjection::Shared } else { HeadProjection::Own },
        ..MedusaConfig::default()
    };
    let weights = WeightsFolder::open(&path.join(file))?;
    let mut tensors = Vec::new();
    for head in 0..config.num_heads {
        for (trained, exported) in names(head, &config, vllm) {
            let kind = weights.kind(&exported).unwrap_or(Kind::Float);
            tensors.push((trained, weights.load(&exported, kind, Device::Cpu)?));
        }
    }
    let hidden_size = tensors[0].1.size()[0];
    Ok(Heads { config, hidden_size, tensors })
}
