//! `specforge eval` for targets of masked diffusion: every way to decode, side by side.

use std::path::Path;

use super::decoding::DecodingArgs;
use super::diffusion::DiffusionArgs;
use super::{LazyProgress, Output, note};
use crate::decode::diffusion::Network;
use crate::error::Result;
use crate::eval::acceptance::Question;
use crate::eval::infilling::{self, InfillingOptions, InfillingReport, report};
use crate::files;

/// What is measured.
pub(super) struct Asked<'a> {
    /// The prompts.
    pub(super) questions: &'a [Question],
    /// Whether the others are compared with the decoder without a cache.
    pub(super) baseline: bool,
    /// Masked copies by which likelihoods are estimated.
    pub(super) samples: usize,
    /// Folder for the report.
    pub(super) out: Option<&'a Path>,
}

/// Answers all questions in every way.
pub(super) fn run(args: &DiffusionArgs, decoding: &DecodingArgs, asked: &Asked<'_>, output: &Output) -> Result<()> {
    let models = decoding.diffusion_models()?;
    let network = Network::of(models.target.as_ref())?;
    let modes = args.modes(decoding, models.tokenizer.eos_token_ids(), asked.baseline)?;
    let options = InfillingOptions { modes, seed: decoding.seed().unwrap_or(0), samples: asked.samples };
    let progress = LazyProgress::new("eval", "questions");
    let all = asked.questions.len() as u64;
    progress.set(0, all);
    let answered = infilling::measure(network, &models.tokenizer, asked.questions, &options, &|done| {
        progress.set(done as u64, all);
    })?;
    progress.finish("done");
    let report = InfillingReport::new(decoding.place(&models), &options.modes, options.samples, answered);
    if let Some(folder) = asked.out {
        let path = folder.join("report.json");
        files::create_dir_all(folder)?;
        files::write_json(&path, &report)?;
        note(format!("report: {}", path.display()));
    }
    output.result(&report, || report::text(&report));
    Ok(())
}
