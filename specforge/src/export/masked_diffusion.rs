//! A masked diffusion model as a model folder: config.json of its family, its tensors under the family's names, and the target's
//! tokenizer. `specforge generate` decodes it, and so does what reads the published models of the family.

use std::path::Path;

use serde_json::Value;

use super::medusa::dtype;
use super::{ExportReport, Format, Source};
use crate::error::{Error, Result};
use crate::files;
use crate::gguf::packed;
use crate::models::{MaskedDiffusion, TargetConfig};
use crate::weights::{WeightsFolder, writer};

const WEIGHTS: &str = "model.safetensors";
/// What belongs to the tokenizer and is copied as it is.
const TOKENIZER: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];

/// The layout.
pub const FORMAT: Format = Format {
    name: "masked-diffusion",
    summary: "a whole model: config.json, model.safetensors and the tokenizer",
    files: &[
        "config.json",
        WEIGHTS,
        TOKENIZER[0],
        TOKENIZER[1],
        TOKENIZER[2],
        TOKENIZER[3],
        TOKENIZER[4],
        TOKENIZER[5],
        TOKENIZER[6],
        GENERATION,
    ],
    is_file: None,
    recognise: |config| diffusion_of(config).is_ok_and(|diffusion| diffusion.is_some()),
    write,
    check,
    start_from: None,
};

/// Where end tokens stand.
const GENERATION: &str = "generation_config.json";

fn diffusion_of(config: &Value) -> Result<Option<MaskedDiffusion>, String> {
    Ok(TargetConfig::from_value(config)?.info().diffusion)
}

fn write(source: &Source, out: &Path) -> Result<()> {
    let failed =
        |problem: String| Error::Failed(format!("the checkpoint is not one of a masked diffusion model: {problem}"));
    let mut config = source.description["model"].clone();
    let diffusion = diffusion_of(&config).map_err(failed)?;
    if diffusion.is_none() {
        return Err(failed("its config.json is that of another model".to_owned()));
    }
    let mut tensors = Vec::with_capacity(source.tensors.len());
    for (name, tensor) in &source.tensors {
        let kind = source.kind.unwrap_or(tensor.kind());
        config["torch_dtype"] = dtype(kind).into();
        tensors.push((name.clone(), tensor.f_to_kind(kind)?));
    }
    for name in TOKENIZER.into_iter().chain([GENERATION]) {
        if let Some(content) = packed::read_file(&source.target, name)? {
            files::write_file(&out.join(name), |file| file.write_all(&content))?;
        }
    }
    if !out.join(TOKENIZER[0]).is_file() {
        let problem = format!("{} is not there: the model would have no tokenizer", TOKENIZER[0]);
        return Err(Error::bad_file(&source.target, problem).with_hint("put the target back where it was in training"));
    }
    // The target's end tokens are those of the text.
    if let Some(content) = packed::read_file(&source.target, "config.json")?
        && let Ok(Value::Object(target)) = serde_json::from_slice(&content)
    {
        let ends = ["bos_token_id", "eos_token_id", "pad_token_id"];
        ends.iter().filter_map(|key| Some((key, target.get(*key)?))).for_each(|(key, id)| config[*key] = id.clone());
    }
    writer::write_tensors(&out.join(WEIGHTS), &tensors, &[])?;
    files::write_json(&out.join("config.json"), &config)
}

fn check(path: &Path, values: &Value) -> Result<ExportReport> {
    let bad = |problem: String| Error::bad_file(path.join("config.json"), problem);
    let config = TargetConfig::from_value(values).map_err(bad)?;
    let weights = WeightsFolder::open(&path.join(WEIGHTS))?;
    config.check(&weights)?;
    let MaskedDiffusion { mask, shift } =
        config.info().diffusion.ok_or_else(|| bad("is of a causal model".to_owned()))?;
    let row = if shift { "the row before a token says what it is" } else { "a token's own row says what it is" };
    let kind = weights.names().next().and_then(|name| weights.kind(name));
    Ok(ExportReport {
        path: path.to_path_buf(),
        format: FORMAT.name.to_owned(),
        tensors: weights.names().count(),
        parameters: config.info().parameters.all,
        dtype: kind.map_or("nothing", dtype).to_owned(),
        resolved: vec![format!("{} layers, mask token {mask}, {row}", config.info().num_layers())],
        engines: Vec::new(),
        warnings: Vec::new(),
    })
}
