//! `specforge export`

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use serde_json::json;
use tch::Kind;

use super::{Output, hub, note, record};
use crate::checkpoint;
use crate::config::Dtype;
use crate::error::{Error, Result, foreign};
use crate::export::{self, Engine, ExportReport, Source};

#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// A checkpoint folder (`step-...`), or a run's output folder for its newest one.
    #[arg(long, required_unless_present = "check", conflicts_with = "check")]
    checkpoint: Option<PathBuf>,
    #[arg(long, default_value = "medusa", help = formats())]
    format: String,
    /// Folder to write; for the layout gguf a file, such as draft.gguf.
    #[arg(long, required_unless_present = "check", conflicts_with = "check")]
    out: Option<PathBuf>,
    /// Element type to write: float32, bfloat16 or float16; for the layout gguf also q8_0, 8 bits a number. The checkpoint's
    /// own where none is given; bfloat16 for block drafters, as engines run them.
    #[arg(long)]
    dtype: Option<ExportDtype>,
    /// What the files call the target, such as its name on a hub: vLLM loads a speculators folder's target by it. The
    /// absolute path of the target's folder where none is given.
    #[arg(long, value_name = "NAME", conflicts_with = "check", value_parser = NonEmptyStringValueParser::new())]
    target_name: Option<String>,
    /// Read an exported folder, or a GGUF file, back and check names, shapes, types and configuration.
    #[arg(long, value_name = "PATH")]
    check: Option<PathBuf>,
    /// Refuse what this engine cannot serve: sglang, vllm or llama.cpp. Without it, what no engine can serve is refused.
    #[arg(long)]
    engine: Option<Engine>,
}

/// Value of `--dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ExportDtype {
    Whole(Dtype),
    Q8_0,
}

impl ExportDtype {
    fn kind(self) -> Option<Kind> {
        match self {
            Self::Whole(dtype) => Some(dtype.kind()),
            Self::Q8_0 => None,
        }
    }
}

impl FromStr for ExportDtype {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "q8_0" => Ok(Self::Q8_0),
            _ => text
                .parse()
                .map(Self::Whole)
                .map_err(|_: String| format!("expected float32, bfloat16, float16 or q8_0, got `{text}`")),
        }
    }
}

pub(super) fn run(args: &ExportArgs, output: &Output) -> Result<()> {
    let report = match (&args.check, &args.checkpoint, &args.out) {
        (Some(folder), ..) => export::check_for(folder, args.engine)?,
        (None, Some(checkpoint), Some(out)) => {
            let checkpoint = checkpoint::find(checkpoint)?;
            let manifest = &checkpoint.manifest;
            let target = manifest.configuration["target"]["path"].as_str().unwrap_or_default();
            let (target, on_the_hub) = hub::recorded_target(target);
            let source = Source {
                description: manifest.draft.clone(),
                tensors: checkpoint.tensors()?,
                target,
                target_name: args.target_name.clone().or(on_the_hub),
                kind: args.dtype.and_then(ExportDtype::kind),
                q8_0: args.dtype == Some(ExportDtype::Q8_0),
            };
            let report = export::export(&source, &args.format, out, args.engine).map_err(|error| match error {
                Error::Failed(problem) => Error::bad_file(&checkpoint.path, problem),
                other => other,
            })?;
            // What `specforge doctor` compares the export with, also when the checkpoint is gone. A format of one file has no
            // folder for a record.
            let configuration = json!({
                "checkpoint": checkpoint.path,
                "step": manifest.step,
                "format": args.format,
                "draft": manifest.draft,
                "inputs": manifest.inputs,
            });
            if out.is_dir() {
                record::write(&out.join(record::FILE_NAME), &configuration, 1)?;
            }
            report
        }
        _ => return Err(Error::Usage("export: name --checkpoint and --out, or --check".to_owned())),
    };
    report.warnings.iter().for_each(|warning| note(format!("warning: {warning}")));
    output.result(&report, || text(&report));
    Ok(())
}

/// Help of `--format`: every row of the table.
fn formats() -> String {
    let rows = export::formats().into_iter().map(|format| format!("{} ({})", format.name, format.summary));
    format!("File layout: {}", rows.collect::<Vec<_>>().join("; "))
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
        lines.push(match known.problems.is_empty() && known.unserved.is_none() {
            true => format!("{}: serves it", known.engine.name()),
            false => format!("{}: cannot serve it", known.engine.name()),
        });
        let words = known.problems.iter().chain(&known.unserved).chain(&known.resolved);
        lines.extend(words.map(|line| format!("  {}", foreign::one_line(line))));
    }
    lines.join("\n")
}
