//! `specforge export`

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::{Output, note, record};
use crate::checkpoint;
use crate::config::Dtype;
use crate::error::{Error, Result, foreign};
use crate::export::{self, Engine, ExportReport, Source};

#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// A checkpoint folder (`step-...`), or a run's output folder for its newest one.
    #[arg(long, required_unless_present = "check", conflicts_with = "check")]
    checkpoint: Option<PathBuf>,
    /// File layout: medusa (the original repository's), medusa-vllm, eagle3 (SGLang and vLLM) or speculators (vLLM).
    #[arg(long, default_value = "medusa")]
    format: String,
    /// Folder to write.
    #[arg(long, required_unless_present = "check", conflicts_with = "check")]
    out: Option<PathBuf>,
    /// Element type to write: float32, bfloat16 or float16. The checkpoint's own where none is given.
    #[arg(long)]
    dtype: Option<Dtype>,
    /// Read an exported folder back and check names, shapes, types and configuration.
    #[arg(long, value_name = "DIR")]
    check: Option<PathBuf>,
    /// Refuse what this engine cannot serve: sglang or vllm. Without it, what no engine can serve is refused.
    #[arg(long)]
    engine: Option<Engine>,
}

pub(super) fn run(args: &ExportArgs, output: &Output) -> Result<()> {
    let report = match (&args.check, &args.checkpoint, &args.out) {
        (Some(folder), ..) => export::check_for(folder, args.engine)?,
        (None, Some(checkpoint), Some(out)) => {
            let checkpoint = checkpoint::find(checkpoint)?;
            let manifest = &checkpoint.manifest;
            let target = manifest.configuration["target"]["path"].as_str().unwrap_or_default();
            let source = Source {
                description: manifest.draft.clone(),
                tensors: checkpoint.tensors()?,
                target: PathBuf::from(target),
                kind: args.dtype.map(Dtype::kind),
            };
            let report = export::export(&source, &args.format, out, args.engine).map_err(|error| match error {
                Error::Failed(problem) => Error::bad_file(&checkpoint.path, problem),
                other => other,
            })?;
            // What `specforge doctor` compares the folder with, also when the checkpoint is gone.
            let configuration = json!({
                "checkpoint": checkpoint.path,
                "step": manifest.step,
                "format": args.format,
                "draft": manifest.draft,
                "inputs": manifest.inputs,
            });
            record::write(&out.join(record::FILE_NAME), &configuration, 1)?;
            report
        }
        _ => return Err(Error::Usage("export: name --checkpoint and --out, or --check".to_owned())),
    };
    report.warnings.iter().for_each(|warning| note(format!("warning: {warning}")));
    output.result(&report, || text(&report));
    Ok(())
}

fn text(report: &ExportReport) -> String {
    let head = format!(
        "{}: {} layout, {} tensors, {} parameters, {}: names, shapes, types and configuration fit",
        foreign::path(&report.path),
        report.format,
        report.tensors,
        report.parameters,
        report.dtype
    );
    let mut lines = vec![head];
    lines.extend(report.resolved.iter().map(|line| format!("  {}", foreign::one_line(line))));
    for known in &report.engines {
        lines.push(match known.problems.is_empty() {
            true => format!("{}: serves it", known.engine.name()),
            false => format!("{}: cannot serve it", known.engine.name()),
        });
        let words = known.problems.iter().chain(&known.resolved);
        lines.extend(words.map(|line| format!("  {}", foreign::one_line(line))));
    }
    lines.join("\n")
}
