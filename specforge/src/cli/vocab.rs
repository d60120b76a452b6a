//! `specforge vocab`

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::hub::{self, Reads};
use super::template::TemplateArgs;
use super::{Output, note, numbers, train};
use crate::config::RunConfig;
use crate::data;
use crate::draft::vocabulary::{Corpus, Made};
use crate::error::{Error, Result, foreign};
use crate::hub::Wanted;
use crate::plan;
use crate::vocab::Coverage;

#[derive(Debug, Args)]
pub(super) struct VocabArgs {
    /// Configuration file of the run; its target's tokenizer and its training documents are used, no weights.
    #[arg(long)]
    config: PathBuf,
    /// Override one value, as `section.key=value`. May be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    template: TemplateArgs,
    /// Tokens the draft shall be able to name.
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = numbers::at_least(1i64))]
    draft_vocab_size: i64,
    /// File to write, for `draft.vocab_map`.
    #[arg(long)]
    out: PathBuf,
}

#[derive(Serialize)]
struct Report {
    path: PathBuf,
    target_vocab_size: i64,
    draft_vocab_size: i64,
    /// Trained tokens that were counted.
    supervised_tokens: u64,
    /// Different tokens among them.
    distinct_tokens: usize,
    /// Ends of turns and special tokens, always in the map.
    forced: usize,
    /// Tokens in the map that were neither forced nor seen.
    filled: usize,
    coverage: f64,
    table: Vec<Coverage>,
    /// Hash of the map itself.
    hash: String,
}

pub(super) fn run(args: &VocabArgs, output: &Output) -> Result<()> {
    let mut config = RunConfig::load(&args.config, &args.set)?;
    args.template.apply(&mut config.data)?;
    config.data.check()?;
    hub::fetch_for(&mut config, Reads { target: Wanted::Description, data: true, start: None }, None)?;
    let target_size = plan::target_info(&config)?.vocab_size;
    let tokenizer = config.data.tokenizer(&config.target.path)?;
    train::fits_vocabulary(&tokenizer, target_size, &config.target.path)?;
    let cache = train::tokens(&config, &config.data.train, &tokenizer)?;
    // As a run of this configuration splits them: what is held out must not choose.
    let documents = match config.data.eval.is_empty() {
        true => data::split(&cache, config.data.eval_fraction).0,
        false => (0..cache.len()).collect(),
    };
    let corpus = Corpus { cache: &cache, documents: &documents, tokenizer: &tokenizer, target_size };
    let counts = corpus.counts()?;
    let made = corpus
        .make(&counts, args.draft_vocab_size)
        .map_err(|problem| Error::Usage(format!("--draft-vocab-size: {problem}")))?;
    if counts.iter().all(|&count| count == 0) {
        note("warning: no token is trained in these documents; the map holds the lowest ids");
    }
    made.file.write(&args.out)?;
    let report = report(args, &counts, made);
    output.result(&report, || text(&report));
    Ok(())
}

fn report(args: &VocabArgs, counts: &[u64], made: Made) -> Report {
    let map = &made.file.map;
    Report {
        path: args.out.clone(),
        target_vocab_size: map.target_size(),
        draft_vocab_size: map.draft_size(),
        supervised_tokens: counts.iter().sum(),
        distinct_tokens: counts.iter().filter(|&&count| count > 0).count(),
        forced: made.forced,
        filled: made.filled,
        coverage: made.coverage,
        table: made.table,
        hash: map.hash(),
    }
}

fn text(report: &Report) -> String {
    let mut text = format!(
        "{} supervised tokens, {} different ones, of {} tokens of the target\n\n{:>8}  {:>9}\n",
        report.supervised_tokens, report.distinct_tokens, report.target_vocab_size, "size", "coverage"
    );
    for row in &report.table {
        let chosen = if row.size as i64 == report.draft_vocab_size { "  <- chosen" } else { "" };
        let _ = writeln!(text, "{:>8}  {:>7.2} %{chosen}", row.size, 100.0 * row.share);
    }
    let _ = write!(
        text,
        "\n{}: {} tokens, {} of them ends of turns and special tokens, {} never seen",
        foreign::path(&report.path),
        report.draft_vocab_size,
        report.forced,
        report.filled
    );
    text
}
