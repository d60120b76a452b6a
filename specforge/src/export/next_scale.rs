//! A next-scale transformer as its authors' files have it: `model.safetensors` with the original names (FoundationVision/VAR
//! @78b9539) and config.json, with the image tokenizer it reads codes of in the folder `vae`. `images generate` takes the
//! folder as a target or as a draft.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use tch::{Kind, Tensor};

use super::{ExportReport, Format, Source};
use crate::error::{Error, Result};
use crate::files;
use crate::models::picture_target::TOKENIZER_FOLDER;
use crate::models::var::{VarConfig, config_of};
use crate::models::{PictureTarget, vqvae};
use crate::weights::{WeightsFolder, writer};

const WEIGHTS: &str = "model.safetensors";
const MODEL_TYPE: &str = "var";

/// The layout.
pub const FORMAT: Format = Format {
    name: MODEL_TYPE,
    summary: "a next-scale transformer with its image tokenizer, for images generate",
    files: &["config.json", WEIGHTS, TOKENIZER_FOLDER],
    is_file: None,
    recognise: |config| config.get("model_type").is_some_and(|kind| kind == MODEL_TYPE),
    write,
    check,
    start_from: None,
};

/// What a checkpoint says of its transformer.
#[derive(Deserialize)]
struct Description {
    transformer: Value,
}

/// The configuration of tensors and a config.json, held against each other.
fn described(values: &Value, tensors: &[(String, Tensor)]) -> Result<VarConfig> {
    let shape = |name: &str| tensors.iter().find(|(known, _)| known == name).map(|(_, tensor)| tensor.size());
    let (config, _) = VarConfig::read(Some(values), &shape, None).map_err(Error::Failed)?;
    Ok(config)
}

fn write(source: &Source, folder: &Path) -> Result<()> {
    let description = Description::deserialize(&source.description)
        .map_err(|_| Error::Failed(format!("holds no next-scale transformer, which the format {MODEL_TYPE} is for")))?;
    if source.kind.is_some_and(|kind| kind != Kind::Float) {
        return Err(Error::Usage(format!("--dtype: the format {MODEL_TYPE} is float32")));
    }
    let config = described(&description.transformer, &source.tensors)?;
    writer::write_tensors(&folder.join(WEIGHTS), &source.tensors, &[])?;
    files::write_json(&folder.join("config.json"), &config.values())?;
    copy_tokenizer(&source.target, &folder.join(TOKENIZER_FOLDER))
}

/// The image tokenizer of the target the transformer was trained for, as safetensors.
fn copy_tokenizer(target: &Path, folder: &Path) -> Result<()> {
    let target = PictureTarget::find(target)?;
    let info = target.info()?;
    let patches = info.pictures.as_ref().map(|pictures| pictures.patch_nums.as_slice());
    let weights = target.open_tokenizer()?;
    let (config, _) = vqvae::files::read_config(&target.tokenizer, &weights, patches)?;
    let load = |(name, _): (String, Vec<i64>)| {
        let value = weights.load(&name, Kind::Float, tch::Device::Cpu)?;
        Ok((name, value))
    };
    let tensors = vqvae::Vqvae::tensors(&config)?.into_iter().map(load).collect::<Result<Vec<_>>>()?;
    vqvae::write(folder, &config, &tensors)
}

fn check(folder: &Path, values: &Value) -> Result<ExportReport> {
    let weights = WeightsFolder::open(folder)?;
    let refuse = |problem: String| Error::bad_file(folder.join("config.json"), problem);
    let (config, strange) = config_of(&weights, Some(values)).map_err(refuse)?;
    let shapes = config.tensors();
    weights.check(&shapes, |_| false)?;
    weights.check_numbers(&shapes)?;
    let numbers = |(_, shape): &(String, Vec<i64>)| shape.iter().product::<i64>() as u64;
    // Refuses an image tokenizer of other codes or scales.
    PictureTarget::find(folder)?.info()?;
    let warnings = strange.iter().map(|key| format!("config.json: `{key}` is not known and was passed over")).collect();
    Ok(ExportReport {
        path: folder.to_path_buf(),
        format: MODEL_TYPE.to_owned(),
        tensors: shapes.len(),
        parameters: shapes.iter().map(numbers).sum(),
        dtype: "float32".to_owned(),
        resolved: vec![format!(
            "scales {:?}, {} codes, {} labels, {} blocks of width {}",
            config.patch_nums, config.vocab_size, config.num_classes, config.depth, config.embed_dim
        )],
        engines: Vec::new(),
        warnings,
    })
}
