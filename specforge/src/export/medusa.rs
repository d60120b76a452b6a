//! Medusa heads on disk, in two layouts.
//!
//! `medusa` is the original repository's (FasterDecoding/Medusa `e2a5d20`): `medusa_lm_head.safetensors` with
//! `{head}.{block}.linear.{weight,bias}` and, unless config.json says `"version": "2"` (heads share the target's
//! projection), `{head}.{blocks}.weight`. vLLM up to 0.32 loads it where heads have projections of their own and
//! config.json has `hidden_size`, `vocab_size` and `medusa_fc_bias`, which the original's own files lack.
//!
//! `medusa-vllm` is vLLM's up to 0.32 (0.33 has no Medusa): `model.safetensors` with `blocks.{head}.layers.{block}.{weight,bias}` and
//! `lm_heads.{head}.weight`. `medusa_fc_bias` must be set, or the engine drops the biases. Heads with a smaller
//! vocabulary have `truncated_vocab_size` rows and `token_map [DV]`, the int64 target id of each row; the original layout
//! has no place for it.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::{ExportReport, Format, Source};
use crate::draft::medusa::{HeadProjection, MedusaConfig};
use crate::draft::vocabulary;
use crate::error::{Error, Result};
use crate::files;
use crate::gguf::packed;
use crate::models::{self, limits};
use crate::nn::HeadForm;
use crate::vocab::VocabMap;
use crate::weights::{WeightsFolder, quantised, writer};

mod warm_start;

const ORIGINAL_FILE: &str = "medusa_lm_head.safetensors";
const VLLM_FILE: &str = "model.safetensors";
/// Keys of the numbers of heads and of their blocks.
const ORIGINAL_COUNTS: [&str; 2] = ["medusa_num_heads", "medusa_num_layers"];
/// The same in vLLM's layout.
const VLLM_COUNTS: [&str; 2] = ["num_heads", "num_hidden_layers"];
/// Whether blocks have biases; vLLM drops those of the file where it is not true.
const FC_BIAS: &str = "medusa_fc_bias";
/// vLLM's tensor of the target ids of a smaller vocabulary.
const TOKEN_MAP: &str = "token_map";

/// The original repository's layout.
pub const ORIGINAL: Format = Format {
    name: "medusa",
    summary: "the original repository's: medusa_lm_head.safetensors",
    files: &["config.json", ORIGINAL_FILE],
    is_file: None,
    recognise: |config| config.get("medusa_num_heads").is_some(),
    write: write_original,
    check: check_original,
    start_from: Some(warm_start::start_from),
};

/// vLLM's layout.
pub const VLLM: Format = Format {
    name: "medusa-vllm",
    summary: "vLLM up to 0.32: model.safetensors with blocks.* and lm_heads.*",
    files: &["config.json", VLLM_FILE],
    is_file: None,
    recognise: |config| config.get("model_type").is_some_and(|kind| kind == "medusa"),
    write: write_vllm,
    check: check_vllm,
    start_from: Some(warm_start::start_from),
};

/// What a checkpoint says of its heads.
struct Description {
    draft: MedusaConfig,
    hidden_size: i64,
    vocab_size: i64,
    /// What the target's head does that heads share.
    target_head: HeadForm,
}

/// The same, before it is checked.
#[derive(Deserialize)]
struct Words {
    draft: Value,
    hidden_size: i64,
    vocab_size: i64,
    #[serde(default)]
    target_head: HeadForm,
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
    /// The heads' own vocabulary, where it is smaller than the target's.
    pub vocabulary: Option<VocabMap>,
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
    let map = vocabulary::from_tensors(&source.tensors)?;
    if let Some(map) = map.as_ref().filter(|map| map.target_size() != description.vocab_size) {
        let (want, got) = (description.vocab_size, map.target_size());
        return Err(Error::Failed(format!("the checkpoint's vocabulary tables: expected {want} tokens, got {got}")));
    }
    let rows = map.as_ref().map_or(description.vocab_size, VocabMap::draft_size);
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
            let (want, got) = (shape_of(&trained, description.hidden_size, rows), value.size());
            if want != got {
                let problem = format!("the checkpoint's tensor `{trained}`: expected {want:?}, got {got:?}");
                return Err(Error::Failed(problem));
            }
            tensors.push((exported, value.f_to_kind(kind)?));
        }
    }
    Ok(tensors)
}

/// Shape of a tensor by its name in training.
fn shape_of(trained: &str, hidden: i64, vocabulary: i64) -> Vec<i64> {
    match trained.rsplit_once('.') {
        Some((_, "bias")) => vec![hidden],
        _ if trained.contains("linear") => vec![hidden; 2],
        _ => vec![vocabulary, hidden],
    }
}

fn block_of(name: &str) -> &str {
    name.split('.').nth(1).unwrap_or_default()
}

/// The target's own projection, for a layout that has no shared one: its matrix `[DV, H]`, with its scale.
fn target_head(source: &Source, description: &Description) -> Result<Tensor> {
    let HeadForm { scale, .. } = description.target_head;
    refuse_form(HeadForm { scale: 1.0, ..description.target_head }, &VLLM)?;
    let head = models::load_head(&source.target)?;
    let (want, got) = (vec![description.vocab_size, description.hidden_size], head.weight.size());
    if want != got || head.scale != scale {
        let problem = format!(
            "the head of the target is {got:?} with a scale of {}; these heads were trained on one of {want:?} with a \
             scale of {scale}",
            head.scale
        );
        return Err(Error::bad_file(&source.target, problem));
    }
    match vocabulary::from_tensors(&source.tensors)? {
        Some(map) => Ok(vocabulary::gather_rows(&head, &map)?.start()),
        None => Ok(head.start()),
    }
}

/// Refuses heads that share a target's head of which a layout cannot say everything: engines would decode with another
/// draft than was trained.
fn refuse_form(form: HeadForm, format: &Format) -> Result<()> {
    match form == HeadForm::PLAIN {
        true => Ok(()),
        false => Err(Error::Usage(format!(
            "--format {}: the heads share the target's head, which has {}; this layout holds a matrix alone. Train with \
             draft.projection=own to export",
            format.name,
            form.words()
        ))),
    }
}

fn describe(source: &Source) -> Result<Description> {
    let failed = |problem: String| Error::Failed(format!("the checkpoint is not one of Medusa heads: {problem}"));
    let Words { draft, hidden_size, vocab_size, target_head } =
        serde_path_to_error::deserialize(&source.description).map_err(|error| failed(error.to_string()))?;
    let draft = MedusaConfig::read(&draft).map_err(|error| failed(error.to_string()))?;
    limits::within(&[
        ("hidden_size", hidden_size, limits::MOST_HIDDEN),
        ("vocab_size", vocab_size, limits::MOST_TOKENS),
    ])
    .map_err(failed)?;
    Ok(Description { draft, hidden_size, vocab_size, target_head })
}

fn write_original(source: &Source, out: &Path) -> Result<()> {
    let description = describe(source)?;
    if let Some(map) = vocabulary::from_tensors(&source.tensors)? {
        return Err(Error::Usage(format!(
            "--format {}: the heads name {} of {} tokens, which this layout cannot say; write --format {}, or train \
             without draft.vocab_map and draft.draft_vocab_size",
            ORIGINAL.name,
            map.draft_size(),
            map.target_size(),
            VLLM.name
        )));
    }
    let mut config = Map::from_iter([
        ("medusa_num_heads".to_owned(), json!(description.draft.num_heads)),
        ("medusa_num_layers".to_owned(), json!(description.draft.num_layers)),
        ("hidden_size".to_owned(), json!(description.hidden_size)),
        ("vocab_size".to_owned(), json!(description.vocab_size)),
        (FC_BIAS.to_owned(), json!(true)),
        ("base_model_name_or_path".to_owned(), json!(source.target_words())),
    ]);
    if description.draft.projection == HeadProjection::Shared {
        refuse_form(description.target_head, &ORIGINAL)?;
        config.insert("version".to_owned(), json!("2"));
    }
    writer::write_tensors(&out.join(ORIGINAL_FILE), &renamed(source, &description, false)?, &[])?;
    files::write_json(&out.join("config.json"), &config)
}

fn write_vllm(source: &Source, out: &Path) -> Result<()> {
    let description = describe(source)?;
    let mut tensors = renamed(source, &description, true)?;
    let dtype = dtype(tensors[0].1.kind());
    // A map of all tokens is none to the engine.
    let map = vocabulary::from_tensors(&source.tensors)?.filter(|map| map.draft_size() < map.target_size());
    let truncated = map.as_ref().map_or(description.vocab_size, VocabMap::draft_size);
    tensors.extend(map.map(|map| (TOKEN_MAP.to_owned(), Tensor::from_slice(map.target_ids()))));
    let config = json!({
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": description.hidden_size,
        "vocab_size": description.vocab_size,
        "truncated_vocab_size": truncated,
        "num_heads": description.draft.num_heads,
        "num_hidden_layers": description.draft.num_layers,
        FC_BIAS: true,
        "torch_dtype": dtype,
        "base_model_name_or_path": source.target_words(),
    });
    writer::write_tensors(&out.join(VLLM_FILE), &tensors, &[])?;
    files::write_json(&out.join("config.json"), &config)
}

/// Hugging Face's name of an element type.
pub fn dtype(kind: Kind) -> &'static str {
    match kind {
        Kind::Float => "float32",
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "unsupported",
    }
}

/// A number of config.json that must be there, at least 1, and no larger than any vocabulary.
fn count(path: &Path, config: &Value, key: &str) -> Result<usize> {
    let (value, most) = (config.get(key), limits::MOST_TOKENS as u64);
    let number = value.and_then(Value::as_u64).filter(|number| (1..=most).contains(number));
    number.map(|number| number as usize).ok_or_else(|| {
        let got = value.map_or("nothing".to_owned(), Value::to_string);
        Error::bad_file(path.join("config.json"), format!("`{key}`: expected a number from 1 to {most}, got {got}"))
    })
}

/// Number of heads and of their blocks. The file must hold weight and bias of each block: lists are made of both numbers.
fn heads_and_layers(path: &Path, config: &Value, file: &str, [heads, layers]: [&str; 2]) -> Result<(usize, usize)> {
    if let Some(problem) = quantised::configured(config) {
        return Err(Error::bad_file(path.join("config.json"), problem).with_hint(quantised::HINT));
    }
    let (num_heads, num_layers) = (count(path, config, heads)?, count(path, config, layers)?);
    let tensors = WeightsFolder::open(&path.join(file))?.names().count();
    let needed = num_heads.checked_mul(num_layers).and_then(|blocks| blocks.checked_mul(2));
    if needed.is_some_and(|needed| needed <= tensors) {
        return Ok((num_heads, num_layers));
    }
    let problem = format!(
        "`{heads}`, `{layers}`: expected as many heads and blocks as the {tensors} tensors of {file} make, got \
         {num_heads} heads of {num_layers}"
    );
    Err(Error::bad_file(path.join("config.json"), problem))
}

/// Whether heads of the original layout share the target's projection.
fn projection_of(path: &Path, config: &Value) -> Result<HeadProjection> {
    match config.get("version") {
        None | Some(Value::Null) => Ok(HeadProjection::Own),
        Some(version) if version == "1" => Ok(HeadProjection::Own),
        Some(version) if version == "2" => Ok(HeadProjection::Shared),
        Some(other) => {
            let problem = format!("`version`: expected \"2\" or none, got {other}");
            Err(Error::bad_file(path.join("config.json"), problem))
        }
    }
}

fn check_original(path: &Path, value: &Value) -> Result<ExportReport> {
    let projection = projection_of(path, value)?;
    let (num_heads, num_layers) = heads_and_layers(path, value, ORIGINAL_FILE, ORIGINAL_COUNTS)?;
    let config = MedusaConfig { num_heads, num_layers, projection, ..MedusaConfig::default() };
    let mut report = check_tensors(path, ORIGINAL_FILE, &config, false, None)?;
    report.resolved.push(vllm_on_original(path, value, &config)?);
    Ok(ExportReport { format: ORIGINAL.name.to_owned(), ..report })
}

/// What vLLM makes of the original layout. The keys that it builds the heads by must fit where they are there.
fn vllm_on_original(path: &Path, value: &Value, config: &MedusaConfig) -> Result<String> {
    let weights = WeightsFolder::open(&path.join(ORIGINAL_FILE))?;
    let rows = |name: String| weights.shape(&name).and_then(|shape| shape.first()).copied();
    let sizes = [
        ("hidden_size", rows("0.0.linear.bias".to_owned())),
        ("vocab_size", rows(format!("0.{}.weight", config.num_layers))),
    ];
    let is_there = |key: &str| value.get(key).is_some_and(|value| !value.is_null());
    for (key, want) in sizes {
        let (true, Some(want)) = (is_there(key), want) else { continue };
        let got = count(path, value, key)?;
        if got as i64 != want {
            let problem = format!("`{key}`: the tensors say {want}, got {got}");
            return Err(Error::bad_file(path.join("config.json"), problem));
        }
    }
    let missing: Vec<&str> = ["hidden_size", "vocab_size"].into_iter().filter(|key| !is_there(key)).collect();
    let has_bias = value.get(FC_BIAS) == Some(&json!(true));
    Ok(match config.projection {
        HeadProjection::Shared => {
            format!("vLLM needs projections in the file: write --format {}", VLLM.name)
        }
        HeadProjection::Own if missing.is_empty() && has_bias => {
            "vLLM up to 0.32 loads these names too, with \"method\": \"medusa\"".to_owned()
        }
        HeadProjection::Own => {
            format!(
                "vLLM needs `hidden_size`, `vocab_size` and `{FC_BIAS}`: true in config.json, or --format {}",
                VLLM.name
            )
        }
    })
}

fn check_vllm(path: &Path, value: &Value) -> Result<ExportReport> {
    let (num_heads, num_layers) = heads_and_layers(path, value, VLLM_FILE, VLLM_COUNTS)?;
    let config = MedusaConfig { num_heads, num_layers, ..MedusaConfig::default() };
    if value.get(FC_BIAS) != Some(&json!(true)) {
        return Err(Error::bad_file(
            path.join("config.json"),
            format!("`{FC_BIAS}`: expected true, the heads have biases"),
        )
        .with_hint("vLLM drops the biases without it, and acceptance falls"));
    }
    let (vocab_size, truncated) = (count(path, value, "vocab_size")?, count(path, value, "truncated_vocab_size")?);
    let weights = WeightsFolder::open(&path.join(VLLM_FILE))?;
    let map = token_map(path, &weights, vocab_size as i64)?;
    let rows = weights.shape("lm_heads.0.weight").and_then(|shape| shape.first()).copied();
    if map.is_none() && truncated < vocab_size && rows == Some(truncated as i64) {
        let problem = format!("expected a tensor `{TOKEN_MAP}`: config.json names {truncated} of {vocab_size} tokens");
        return Err(Error::bad_file(path.join(VLLM_FILE), problem));
    }
    let mut report = check_tensors(path, VLLM_FILE, &config, true, map.as_ref())?;
    let head = weights.shape("lm_heads.0.weight").unwrap_or(&[0, 0]);
    let pairs = [
        ("vocab_size", vocab_size, map.as_ref().map_or(head[0], VocabMap::target_size)),
        ("truncated_vocab_size", truncated, head[0]),
        ("hidden_size", count(path, value, "hidden_size")?, head[1]),
    ];
    if let Some((key, got, want)) = pairs.iter().find(|(_, got, want)| *got as i64 != *want) {
        let problem = format!("`{key}`: the tensors say {want}, got {got}");
        return Err(Error::bad_file(path.join("config.json"), problem));
    }
    if let Some(map) = &map {
        report.resolved.push(format!("heads name {} of the target's {vocab_size} tokens", map.draft_size()));
    }
    Ok(ExportReport { format: VLLM.name.to_owned(), ..report })
}

/// The `token_map` of a file, where there is one: ascending target ids, one for each row of the heads.
fn token_map(path: &Path, weights: &WeightsFolder, vocab_size: i64) -> Result<Option<VocabMap>> {
    let Some(shape) = weights.shape(TOKEN_MAP) else {
        return Ok(None);
    };
    let wrong = |problem: String| Error::bad_file(path.join(VLLM_FILE), format!("`{TOKEN_MAP}`: {problem}"));
    let kind = weights.kind(TOKEN_MAP).unwrap_or(Kind::Float);
    if kind != Kind::Int64 || shape.len() != 1 {
        return Err(wrong(format!("expected int64 with one axis, got {kind:?} of shape {shape:?}")));
    }
    let rows = weights.shape("lm_heads.0.weight").and_then(|shape| shape.first());
    if let Some(rows) = rows.filter(|rows| **rows != shape[0]) {
        return Err(wrong(format!("expected {rows} ids, a row of the heads each, got {}", shape[0])));
    }
    let ids = Vec::<i64>::try_from(weights.load(TOKEN_MAP, Kind::Int64, Device::Cpu)?)?;
    let map = VocabMap::new(ids, vocab_size);
    map.map(Some).map_err(|_| wrong(format!("expected ascending, distinct token ids from 0 to {}", vocab_size - 1)))
}

/// Checks names, shapes and element types. Sizes come from the first block and the first projection.
fn check_tensors(
    path: &Path,
    file: &str,
    config: &MedusaConfig,
    vllm: bool,
    map: Option<&VocabMap>,
) -> Result<ExportReport> {
    let file_path = path.join(file);
    let weights = WeightsFolder::open(&file_path)?;
    let first = names(0, config, vllm);
    let size = |name: Option<&(String, String)>| name.and_then(|(_, name)| weights.shape(name)?.first().copied());
    let hidden = size(first.first());
    let has_projection = first.len() > 2 * config.num_layers;
    let vocabulary = if has_projection { size(first.last()) } else { None };
    let mut expected = Vec::new();
    for head in 0..config.num_heads {
        for (trained, exported) in names(head, config, vllm) {
            expected.push((exported, shape_of(&trained, hidden.unwrap_or(-1), vocabulary.unwrap_or(-1))));
        }
    }
    let is_map = |name: &str| name == TOKEN_MAP && map.is_some();
    weights.check(&expected, is_map)?;
    let kinds: Vec<Kind> = weights.names().filter(|name| !is_map(name)).filter_map(|name| weights.kind(name)).collect();
    let kind = kinds[0];
    if dtype(kind) == "unsupported" || kinds.iter().any(|other| *other != kind) {
        return Err(Error::bad_file(
            &file_path,
            format!("expected one floating-point type in all tensors, got {kinds:?}"),
        ));
    }
    let mut warnings = Vec::new();
    let base = base_model(path);
    match &base {
        Some(base) if packed::has_file(base, "config.json") => {
            let target = models::read_info(base)?;
            // With a map, the heads' vocabulary is the one that the map leads to.
            let vocabulary = map.map(VocabMap::target_size).or(vocabulary);
            let pairs = [("hidden size", hidden, target.hidden_size), ("vocabulary", vocabulary, target.vocab_size)];
            if let Some((what, got, want)) = pairs.iter().find(|(_, got, want)| got.is_some_and(|got| got != *want)) {
                let problem = format!("{what}: the target has {want}, the heads have {}", got.unwrap_or_default());
                return Err(Error::bad_file(&file_path, problem));
            }
        }
        Some(base) => warnings.push(format!("target {} is not here: its sizes were not compared", base.display())),
        None => warnings.push("config.json names no base_model_name_or_path".to_owned()),
    }
    let projection = if has_projection { "own projections" } else { "the target's projection" };
    let resolved = vec![
        format!("{} heads of {} residual blocks, {projection}", config.num_heads, config.num_layers),
        "head k predicts token t + 2 + k from the target's normed hidden state of token t".to_owned(),
    ];
    let parameters = expected.iter().map(|(_, shape)| shape.iter().product::<i64>() as u64).sum();
    let (tensors, dtype) = (expected.len() + usize::from(map.is_some()), dtype(kind).to_owned());
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
    let (keys, file) = if vllm { (VLLM_COUNTS, VLLM_FILE) } else { (ORIGINAL_COUNTS, ORIGINAL_FILE) };
    let (num_heads, num_layers) = heads_and_layers(path, &value, file, keys)?;
    let projection = if vllm { HeadProjection::Own } else { projection_of(path, &value)? };
    let config = MedusaConfig { num_heads, num_layers, projection, ..MedusaConfig::default() };
    let weights = WeightsFolder::open(&path.join(file))?;
    let mut tensors = Vec::new();
    for head in 0..config.num_heads {
        for (trained, exported) in names(head, &config, vllm) {
            let kind = weights.kind(&exported).unwrap_or(Kind::Float);
            tensors.push((trained, weights.load(&exported, kind, Device::Cpu)?));
        }
    }
    let hidden_size = tensors[0].1.size()[0];
    let vocabulary = match vllm {
        true => token_map(path, &weights, count(path, &value, "vocab_size")? as i64)?,
        false => None,
    };
    Ok(Heads { config, hidden_size, tensors, vocabulary })
}
