//! From a label to pixels: VAR and its VQVAE together, with keyed noise (FoundationVision/VAR @78b9539).
//!
//! File layout: `w.*` weights of both models, whose names are disjoint; `in.label`; `out.RUN.idx.S`, `out.RUN.f_hat` and
//! `out.RUN.image01`. Metadata `config`: sizes of both, and `runs`.

use std::path::Path;

use serde_json::json;
use specforge::models::vqvae::{Vqvae, VqvaeConfig};
use specforge::weights::WeightsFolder;
use tch::{Device, Kind};

use super::var::{VarFile, decoded, near, sampling_of, text};

/// Keys of the configuration that are the VQVAE's.
const KEYS: [&str; 9] = [
    "vocab_size",
    "z_channels",
    "ch",
    "ch_mult",
    "patch_nums",
    "share_quant_resi",
    "quant_resi",
    "groupnorm_groups",
    "groupnorm_eps",
];

/// Checks one file and says what was compared.
pub fn check(path: &Path) -> Result<String, String> {
    let file = VarFile::open(path)?;
    let model = file.model("w.", &file.config)?;
    let mut values = json!({});
    for key in KEYS {
        values[key] = file.config[key].clone();
    }
    let (config, _) = VqvaeConfig::read(&values)?;
    let weights = WeightsFolder::open(path).map_err(text)?;
    let mut get = |name: &str, _: &[i64]| weights.load(&format!("w.{name}"), Kind::Float, Device::Cpu);
    let tokenizer = Vqvae::build(config, &mut get).map_err(text)?;
    let runs = file.config["runs"].as_object().ok_or("`config.runs`: expected an object")?;
    for (run, settings) in runs {
        let labels = file.labels(None)?;
        let name = format!("out.{run}");
        let got = decoded(&file, &model, tokenizer.quantizer(), (&name, sampling_of(settings)?), &labels, None)?;
        near(&format!("{name}.f_hat"), got.committed.f_hat(), &file.golden, 1e-5)?;
        let image = tokenizer.image01(got.committed.f_hat()).map_err(text)?;
        near(&format!("{name}.image01"), &image, &file.golden, 2e-4)?;
    }
    Ok(format!("{} runs from label to pixels", runs.len()))
}
