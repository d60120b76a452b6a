//! `specforge inspect`

use std::fmt::Write;
use std::io::IsTerminal;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::template::TemplateArgs;
use super::{LazyProgress, Output, note, numbers};
use crate::data::{self, BuildReport, ChatTokenizer, DataConfig, Statistics, TokenCache};
use crate::error::{Error, Result, foreign};

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// Model folder, or GGUF file, whose tokenizer and chat template are used.
    #[arg(long)]
    target: PathBuf,
    #[command(flatten)]
    template: TemplateArgs,
    /// Files of conversations.
    #[arg(long, required = true, num_args = 1..)]
    data: Vec<PathBuf>,
    /// How many documents to print.
    #[arg(long, default_value_t = 3, allow_hyphen_values = true, value_parser = numbers::at_least(0usize))]
    show: usize,
    /// Print the document of this id instead, or the turns of the conversation of this id.
    #[arg(long)]
    id: Option<String>,
    /// Longest document, in tokens.
    #[arg(long, default_value_t = 2048, allow_hyphen_values = true, value_parser = numbers::at_least(2usize))]
    max_length: usize,
    /// When to mark supervised tokens by colour; without colour they stand between ⟦ and ⟧.
    #[arg(long, value_enum, default_value_t = When::Auto)]
    color: When,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum When {
    Auto,
    Always,
    Never,
}

#[derive(Serialize)]
struct Report {
    statistics: Statistics,
    build: BuildReport,
    shown: Vec<Shown>,
}

#[derive(Serialize)]
struct Shown {
    id: String,
    tokens: usize,
    supervised: usize,
    text: String,
}

pub(super) fn run(args: &InspectArgs, output: &Output) -> Result<()> {
    let config = DataConfig { train: args.data.clone(), max_length: args.max_length, ..DataConfig::default() };
    let tokenizer = args.template.tokenizer(&args.target)?;
    let progress = LazyProgress::new("tokenise", "conversations");
    let (cache, build) =
        TokenCache::build_or_open(&args.data, &tokenizer, &config, &|done, total| progress.set(done, total))?;
    progress.finish("done");
    build.note.iter().for_each(|line| note(format!("warning: {line}")));
    build.warnings.iter().for_each(|line| note(format!("warning: {line}")));
    build.rejected.iter().for_each(|line| note(format!("warning: skipped {line}")));
    let chosen: Vec<usize> = match &args.id {
        Some(id) => {
            let found = cache.find(id);
            if found.is_empty() {
                return Err(Error::Usage(format!("--id: no document has the id `{id}`")));
            }
            found
        }
        None => (0..cache.len().min(args.show)).collect(),
    };
    let colour = match args.color {
        When::Auto => !output.json && std::io::stdout().is_terminal(),
        When::Always => true,
        When::Never => false,
    };
    let shown = chosen
        .into_iter()
        .map(|index| show(&cache, index, &tokenizer, (output.json, colour)))
        .collect::<Result<Vec<_>>>()?;
    let report = Report { statistics: Statistics::of(&cache, 0..cache.len()), build, shown };
    output.coloured_result(&report, || text(&report));
    Ok(())
}

fn show(cache: &TokenCache, index: usize, tokenizer: &ChatTokenizer, (json, colour): (bool, bool)) -> Result<Shown> {
    let document = cache.document(index);
    let text = match json {
        true => data::document_text(tokenizer, &document, colour),
        false => data::document_for_terminal(tokenizer, &document, colour),
    }?;
    let supervised = document.supervised.iter().filter(|&&mark| mark != 0).count();
    Ok(Shown { id: document.id.to_owned(), tokens: document.tokens.len(), supervised, text })
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for shown in &report.shown {
        let id = foreign::name(&shown.id);
        let _ = writeln!(text, "── {id} ({} tokens, {} supervised)", shown.tokens, shown.supervised);
        let _ = writeln!(text, "{}\n", shown.text.trim_end());
    }
    let _ = writeln!(text, "{}", report.statistics);
    let build = &report.build;
    let _ = write!(
        text,
        "{} conversations read, {} rejected, {} without supervision dropped, {} truncated, {} split by turn, \
         {} from token ids, {} answers cut off",
        build.conversations,
        build.rejected_count,
        build.without_supervision,
        build.truncated,
        build.fanned_out,
        build.from_token_ids,
        build.cut_answers
    );
    text
}
