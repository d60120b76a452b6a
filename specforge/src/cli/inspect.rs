//! `specforge inspect`

use std::fmt::Write;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::hub::{self, Place};
use super::mask::MaskArgs;
use super::template::TemplateArgs;
use super::{LazyProgress, Output, note, numbers};
use crate::data::look::{self, Distributions, Duplicates, Named, Page, Records};
use crate::data::{self, BuildReport, ChatTokenizer, DataConfig, Mask, Statistics, Supervise, TokenCache, Validation};
use crate::error::{Error, Result, foreign};
use crate::files;
use crate::hub::Wanted;
use crate::vocab;

#[derive(Debug, Clone, Args)]
pub(super) struct InspectArgs {
    /// Model folder, GGUF file, or name on a hub (ORG/NAME[@REVISION]), whose tokenizer and chat template are used.
    #[arg(long)]
    target: PathBuf,
    #[command(flatten)]
    template: TemplateArgs,
    #[command(flatten)]
    mask: MaskArgs,
    /// Files of conversations: JSONL, JSON, Parquet; hf://datasets/ORG/NAME/FILE is one on a hub.
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
    /// Write a page with documents, coverage, lengths, duplicates, warnings and filters: one file for any browser.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// How many documents, chosen by chance, the page shows.
    #[arg(long, value_name = "N", default_value_t = 100, requires = "html", allow_hyphen_values = true)]
    #[arg(value_parser = numbers::at_least(1usize))]
    sample: usize,
    /// Another seed chooses others.
    #[arg(long, value_name = "S", default_value_t = 0, requires = "html")]
    seed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum When {
    Auto,
    Always,
    Never,
}

/// Findings of a kind that a page shows.
const EXAMPLES: usize = 5;

#[derive(Serialize)]
struct Report {
    trained: Trained,
    statistics: Statistics,
    distributions: Distributions,
    /// Share of the trained tokens that drafts of several sizes can name.
    vocabulary: Vec<Named>,
    duplicates: Duplicates,
    build: BuildReport,
    /// Faults and warnings by kind; with --html.
    #[serde(skip_serializing_if = "Option::is_none")]
    findings: Option<Validation>,
    shown: Vec<Shown>,
}

#[derive(Serialize)]
struct Trained {
    supervise: Supervise,
    mask: Mask,
}

impl Trained {
    fn words(&self) -> String {
        match self.supervise {
            Supervise::All => "every token".to_owned(),
            Supervise::Assistant => self.mask.words(),
            Supervise::LastTurn => format!("{} (the last turn)", self.mask.words()),
        }
    }
}

#[derive(Serialize)]
struct Shown {
    id: String,
    tokens: usize,
    supervised: usize,
    text: String,
}

pub(super) fn run(args: &InspectArgs, output: &Output) -> Result<()> {
    let mut args = args.clone();
    let target = Place::Model(&mut args.target, Wanted::Description);
    hub::fetch(args.data.iter_mut().map(Place::Data).chain([target]).collect(), None)?;
    let mut config = DataConfig { train: args.data.clone(), max_length: args.max_length, ..DataConfig::default() };
    args.mask.apply(&mut config);
    let usual_share = config.max_bad_share;
    if args.html.is_some() {
        if let Some(path) = args.data.iter().find(|path| path.exists() && !path.is_file()) {
            let path = foreign::path(path);
            return Err(Error::Usage(format!("--html: reads data more than once, and {path} is no file")));
        }
        // Whoever looks at data wants to see what is wrong with it too.
        config.max_bad_share = 1.0;
    }
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
    let mut report = Report {
        trained: Trained { supervise: config.supervise, mask: config.mask.clone() },
        statistics: Statistics::of(&cache, 0..cache.len()),
        distributions: Distributions::of(&cache),
        vocabulary: vocabulary(&cache, &tokenizer)?,
        duplicates: Duplicates::of(&cache),
        build,
        findings: None,
        shown,
    };
    if let Some(path) = &args.html {
        let records = Records::read(&args.data)?;
        let checking = LazyProgress::new("validate", "records");
        let progress = |done, total| checking.set(done, total);
        report.findings = Some(data::validate(&args.data, Some(&tokenizer), &config, EXAMPLES, &progress)?);
        checking.finish("done");
        write_page(path, &args, (&cache, &tokenizer, &records), (&report, usual_share))?;
    }
    output.coloured_result(&report, || text(&report));
    Ok(())
}

/// What the commonest trained tokens cover, as `specforge vocab` counts them.
fn vocabulary(cache: &TokenCache, tokenizer: &ChatTokenizer) -> Result<Vec<Named>> {
    let documents: Vec<usize> = (0..cache.len()).collect();
    let counts = data::supervised_counts(cache, &documents, tokenizer.id_limit())?;
    let limit = tokenizer.id_limit() as i64;
    let forced: Vec<i64> = tokenizer.special_token_ids().into_iter().map(i64::from).filter(|&id| id < limit).collect();
    let table = vocab::coverage_table(&counts, &forced, counts.len()).map_err(Error::Failed)?;
    Ok(table.into_iter().map(|row| Named { size: row.size, share: row.share }).collect())
}

fn write_page(
    path: &Path,
    args: &InspectArgs,
    (cache, tokenizer, records): (&TokenCache, &ChatTokenizer, &Records),
    (report, max_bad_share): (&Report, f64),
) -> Result<()> {
    let chosen = look::sample(cache, args.sample, args.seed);
    let documents = look::shown(cache, &chosen, tokenizer, records)?;
    let Some(findings) = &report.findings else { return Ok(()) };
    let page = look::page(&Page {
        target: &args.target,
        files: &args.data,
        trained: &report.trained.words(),
        max_length: args.max_length,
        max_bad_share,
        statistics: &report.statistics,
        build: &report.build,
        distributions: &report.distributions,
        vocabulary: &report.vocabulary,
        duplicates: &report.duplicates,
        findings,
        documents: &documents,
    });
    files::write_text(path, &page)?;
    note(format!("page: {} ({} documents)", foreign::path(path), documents.len()));
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
    let _ = writeln!(text, "trained     {}", report.trained.words());
    let _ = writeln!(text, "{}", report.statistics);
    let named = report.vocabulary.iter().map(|row| format!("{} {:.1} %", row.size, 100.0 * row.share));
    let _ = writeln!(text, "vocabulary  {}", named.collect::<Vec<_>>().join("  "));
    let duplicates = &report.duplicates;
    if duplicates.documents > 0 {
        let _ = writeln!(text, "duplicates  {} documents are the same as another", duplicates.documents);
    }
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
