//! `specforge validate`

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;

use super::hub::{self, Place};
use super::mask::MaskArgs;
use super::template::TemplateArgs;
use super::{LazyProgress, Output, numbers};
use crate::data::{self, DataConfig, Group, Supervise, Validation};
use crate::error::{Error, Result, foreign};
use crate::hub::Wanted;

#[derive(Debug, Clone, Args)]
pub(super) struct ValidateArgs {
    /// Files of conversations: JSONL, JSON, Parquet; hf://datasets/ORG/NAME/FILE is one on a hub.
    #[arg(required = true, num_args = 1.., value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Model folder, GGUF file, or name on a hub (ORG/NAME[@REVISION]): records are also rendered with its chat template, masked and tokenised.
    #[arg(long)]
    target: Option<PathBuf>,
    #[command(flatten)]
    template: TemplateArgs,
    #[command(flatten)]
    mask: MaskArgs,
    /// Longest document, in tokens; longer ones are warned about. Without it 2048.
    #[arg(long, requires = "target", allow_hyphen_values = true, value_parser = numbers::at_least(2usize))]
    max_length: Option<usize>,
    /// How many findings of each kind to print; all are counted.
    #[arg(long, default_value_t = 3, allow_hyphen_values = true, value_parser = numbers::at_least(0usize))]
    examples: usize,
}

pub(super) fn run(args: &ValidateArgs, output: &Output) -> Result<()> {
    let mut args = args.clone();
    let target = args.target.iter_mut().map(|target| Place::Model(target, Wanted::Description));
    hub::fetch(args.files.iter_mut().map(Place::Data).chain(target).collect(), None)?;
    let mut config = DataConfig::default();
    config.max_length = args.max_length.unwrap_or(config.max_length);
    args.mask.apply(&mut config);
    let tokenizer = match &args.target {
        Some(target) => Some(args.template.tokenizer(target)?),
        None if args.template.is_given() || config.supervise != Supervise::Assistant || !config.mask.is_default() => {
            let problem = "a chat template or a mask is looked at together with a tokenizer: name one with --target";
            return Err(Error::Usage(problem.to_owned()));
        }
        None => None,
    };
    let progress = LazyProgress::new("validate", "records");
    let found = data::validate(&args.files, tokenizer.as_ref(), &config, args.examples, &|done, total| {
        progress.set(done, total);
    })?;
    progress.finish("done");
    output.result(&found, || text(&found));
    match found.fault_count {
        0 => Ok(()),
        count => {
            let plural = |count: usize, word: &str| format!("{count} {word}{}", if count == 1 { "" } else { "s" });
            let unusable = format!("{} in {}", plural(count, "fault"), plural(found.faulty, "record or file"));
            Err(Error::Failed(unusable.replace("record or files", "records or files")))
        }
    }
}

fn text(found: &Validation) -> String {
    let mut text = String::new();
    let mut list = |groups: &[Group], mark: &str| {
        for group in groups {
            let _ = writeln!(text, "{mark} {}: {}", group.title, group.count);
            for finding in &group.examples {
                let line = finding.line.map(|line| format!(":{line}")).unwrap_or_default();
                let _ = writeln!(
                    text,
                    "    {}{line}: {}",
                    foreign::path(&finding.path),
                    foreign::one_line(&finding.problem)
                );
            }
            let more = group.count - group.examples.len();
            if more > 0 {
                let _ = writeln!(text, "    and {more} more");
            }
        }
    };
    list(&found.warnings, "warning:");
    list(&found.faults, "fault:");
    let Validation { files, records, faulty, fault_count, .. } = found;
    let _ = write!(text, "{files} files, {records} records, {faulty} of them unusable, {fault_count} faults");
    text
}
