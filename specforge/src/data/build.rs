//! Turns files into a token cache: in parallel, in order, and only if no cache of the same content exists.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::cache::{CacheWriter, TokenCache, VERSION};
use super::conversation::{self, Rejections, Sample, parse_sample, record_name};
use super::loss_mask::{Method, Rendered, Span, SpanEnd, render_supervised, token_mask};
use super::reader::{Record, SourceFile};
use super::report::BuildReport;
use super::tokenizer::{ChatTokenizer, hex};
use super::{DataConfig, TooLong};
use crate::error::{Error, Result};
use crate::files::{self, Digests, Maker};

/// Records that are tokenised between two writes.
const CHUNK: usize = 1024;
/// More reasons than these are counted, not kept.
const REASONS_KEPT: usize = 100;

/// What became of one record.
#[derive(Debug, Default)]
struct Outcome {
    documents: Vec<Tokenised>,
    method: Option<Method>,
    without_supervision: usize,
    truncated: usize,
    too_long: usize,
}

#[derive(Debug)]
struct Tokenised {
    id: String,
    conversation: u64,
    tokens: Vec<u32>,
    supervised: Vec<u8>,
}

impl TokenCache {
    /// Opens the cache of these files, tokenizer and settings, or makes it first. Of several processes one makes it, and
    /// the others wait as long as that takes. `progress` is told how many records are done, and of how many.
    pub fn build_or_open(
        paths: &[PathBuf],
        tokenizer: &ChatTokenizer,
        config: &DataConfig,
        progress: &dyn Fn(u64, u64),
    ) -> Result<(TokenCache, BuildReport)> {
        config.check()?;
        if paths.is_empty() {
            return Err(Error::config("data.train", "names no file").with_hint("list JSONL or JSON files to read"));
        }
        let inputs: Vec<Result<Input<'_>>> = paths.par_iter().map(|path| Input::new(path, &config.cache_dir)).collect();
        let inputs = inputs.into_iter().collect::<Result<Vec<_>>>()?; // the first error, whichever came first
        let key = cache_key(&inputs, tokenizer, config);
        let cache_path = config.cache_dir.join(format!("{}.tokens", &hex(&key)[..24]));
        let mut note = None;
        let reopen = || {
            if !cache_path.is_file() {
                return Ok(None);
            }
            match TokenCache::open(&cache_path, &key) {
                Ok((cache, mut report)) => {
                    check_share(&report, paths, config)?;
                    report.from_cache = true;
                    Ok(Some((cache, report)))
                }
                Err(problem) => {
                    note = Some(format!("{}: {problem}; built again", cache_path.display()));
                    Ok(None)
                }
            }
        };
        let make = |maker: &Maker<'_>| {
            maker.write(|temporary| {
                let mut writer = CacheWriter::create(temporary, &cache_path, key)?;
                let progress = |done, total| maker.report(done, total);
                let sources = inputs.iter().map(Input::source).collect::<Result<Vec<_>>>()?;
                let report = tokenise(&sources, tokenizer, config, &mut writer, &progress)?;
                writer.finish(&report)
            })?;
            TokenCache::open(&cache_path, &key).map_err(|problem| Error::bad_file(&cache_path, problem))
        };
        // Whether the data is good enough is everybody's own wish.
        let terms = format!("max_bad_share {}", config.max_bad_share);
        let (cache, mut report) = files::open_or_make(&cache_path, &terms, progress, reopen, make)?;
        report.note = note.filter(|_| !report.from_cache);
        Ok((cache, report))
    }
}

/// A file and its digest. It is opened only where its digest is not noted, or where it has to be tokenised.
struct Input<'a> {
    path: &'a Path,
    digest: String,
    opened: OnceCell<SourceFile>,
}

impl<'a> Input<'a> {
    fn new(path: &'a Path, cache: &Path) -> Result<Self> {
        let opened = OnceCell::new();
        let digest = Digests::in_cache(cache).of(path, "sha256", || {
            let source = SourceFile::open(path)?;
            let digest = hex(&Sha256::digest(source.bytes()));
            // What was digested is what is tokenised: a pipe can be read only once.
            let _ = opened.set(source);
            Ok(digest)
        })?;
        Ok(Self { path, digest, opened })
    }

    fn source(&self) -> Result<&SourceFile> {
        if let Some(source) = self.opened.get() {
            return Ok(source);
        }
        let source = SourceFile::open(self.path)?;
        Ok(self.opened.get_or_init(|| source))
    }
}

/// A hash of everything that decides what the cache holds.
fn cache_key(inputs: &[Input<'_>], tokenizer: &ChatTokenizer, config: &DataConfig) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(VERSION.to_le_bytes());
    hash.update(tokenizer.fingerprint());
    hash.update((tokenizer.id_limit() as u64).to_le_bytes());
    hash.update((config.max_length as u64).to_le_bytes());
    hash.update(format!("{:?} {:?}", config.supervise, config.too_long));
    for input in inputs {
        hash.update(&input.digest);
        // Records without a name are called after their file.
        hash.update(Sha256::digest(record_name(input.path, 0)));
    }
    hash.finalize().into()
}

/// The share of a report that was made under another limit.
fn check_share(report: &BuildReport, paths: &[PathBuf], config: &DataConfig) -> Result<()> {
    let path = paths.first().map_or(Path::new(""), PathBuf::as_path);
    let counts = (report.rejected_count, report.conversations);
    conversation::check_share(path, counts, report.rejected.iter().cloned(), config.max_bad_share)
}

fn tokenise(
    sources: &[&SourceFile],
    tokenizer: &ChatTokenizer,
    config: &DataConfig,
    writer: &mut CacheWriter<'_>,
    progress: &dyn Fn(u64, u64),
) -> Result<BuildReport> {
    let records: Vec<(&SourceFile, &Record)> =
        sources.iter().flat_map(|&source| source.records().iter().map(move |record| (source, record))).collect();
    let total = records.len();
    let mut report = BuildReport { conversations: total, ..BuildReport::default() };
    let mut rejections = Rejections { total, ..Rejections::default() };
    for (done, chunk) in records.chunks(CHUNK).enumerate() {
        progress((done * CHUNK) as u64, total as u64);
        let outcomes: Vec<Result<Outcome>> =
            chunk.par_iter().map(|(source, record)| tokenise_record(source, record, tokenizer, config)).collect();
        for ((source, record), outcome) in chunk.iter().zip(outcomes) {
            match outcome {
                Ok(outcome) => take(outcome, writer, &mut report)?,
                Err(Error::Failed(problem)) => rejections.push(source.path(), record.line, problem),
                Err(fatal) => return Err(fatal),
            }
        }
    }
    progress(total as u64, total as u64);
    rejections.check(config.max_bad_share)?;
    report.rejected_count = rejections.errors.len();
    report.rejected = rejections.errors.iter().take(REASONS_KEPT).map(Error::to_string).collect();
    let (documents, tokens, supervised) = writer.counts();
    (report.documents, report.tokens, report.supervised_tokens) = (documents as usize, tokens, supervised);
    if documents == 0 {
        let BuildReport { rejected_count, without_supervision, too_long, .. } = report;
        let path = sources.first().map_or(Path::new(""), |source| source.path());
        let problem = format!(
            "no document to train on is left of {total} records: {rejected_count} cannot be used, \
             {without_supervision} without supervised tokens, {too_long} too long"
        );
        return Err(Error::bad_file(path, problem).with_hint("look at the file with `specforge inspect`"));
    }
    Ok(report)
}

fn take(outcome: Outcome, writer: &mut CacheWriter<'_>, report: &mut BuildReport) -> Result<()> {
    report.without_supervision += outcome.without_supervision;
    report.truncated += outcome.truncated;
    report.too_long += outcome.too_long;
    report.fanned_out += usize::from(outcome.method == Some(Method::FanOut));
    report.by_generation_blocks += usize::from(outcome.method == Some(Method::GenerationBlocks));
    for Tokenised { id, conversation, tokens, supervised } in outcome.documents {
        writer.add(&id, conversation, &tokens, &supervised)?;
    }
    Ok(())
}

/// Tokenises one record. [`Error::Failed`] is a reason to leave this record out; every other error ends the build.
fn tokenise_record(
    source: &SourceFile,
    record: &Record,
    tokenizer: &ChatTokenizer,
    config: &DataConfig,
) -> Result<Outcome> {
    let name = || record_name(source.path(), record.line);
    let sample = parse_sample(source.record(record), name).map_err(Error::Failed)?;
    let conversation = sample.content_key();
    let (rendered, method) = match &sample {
        Sample::Conversation(conversation) => {
            let (rendered, method) = render_supervised(tokenizer, conversation, config.supervise)?;
            (rendered, Some(method))
        }
        Sample::Text { text, .. } => (vec![whole_text(text.clone(), 0)], None),
        Sample::Completion { prompt, completion, .. } => (vec![completed(tokenizer, prompt, completion)?], None),
    };
    let mut outcome = Outcome { method, ..Outcome::default() };
    if rendered.is_empty() {
        outcome.without_supervision = 1;
    }
    for part in rendered {
        let id = match part.turn {
            Some(turn) => format!("{}#{turn}", sample.id()),
            None => sample.id().to_owned(),
        };
        add_document(&mut outcome, tokenizer, config, id, conversation, &part)?;
    }
    Ok(outcome)
}

fn whole_text(text: String, supervised_from: usize) -> Rendered {
    let span = Span { range: supervised_from..text.len(), end: SpanEnd::Exact };
    Rendered { text, spans: vec![span], turn: None }
}

/// A prompt with its completion and an end of sequence.
fn completed(tokenizer: &ChatTokenizer, prompt: &str, completion: &str) -> Result<Rendered> {
    let eos = tokenizer.eos_token().ok_or_else(|| {
        Error::bad_file(tokenizer.folder().join("tokenizer_config.json"), "names no eos_token to end completions with")
    })?;
    let end = if completion.trim_end().ends_with(eos) { "" } else { eos };
    Ok(whole_text(format!("{prompt}{completion}{end}"), prompt.len()))
}

fn add_document(
    outcome: &mut Outcome,
    tokenizer: &ChatTokenizer,
    config: &DataConfig,
    id: String,
    conversation: u64,
    part: &Rendered,
) -> Result<()> {
    let encoded = tokenizer.encode_with_offsets(&part.text)?;
    let mut supervised = token_mask(tokenizer, &part.text, &encoded, &part.spans);
    let mut tokens = encoded.ids;
    if let Some(&token) = tokens.iter().find(|&&token| token as usize >= tokenizer.id_limit()) {
        let (limit, text) = (tokenizer.id_limit(), tokenizer.decode(&[token], false)?);
        let problem = format!("makes token {token} ({text:?}) of document `{id}`, but the model has {limit} tokens");
        return Err(Error::bad_file(tokenizer.folder().join("tokenizer.json"), problem)
            .with_hint("take tokenizer and model from the same folder, or resize the model's embedding"));
    }
    if !supervised.contains(&1) {
        outcome.without_supervision += 1;
        return Ok(());
    }
    if tokens.len() > config.max_length {
        if config.too_long == TooLong::Drop {
            outcome.too_long += 1;
            return Ok(());
        }
        outcome.truncated += 1;
        tokens.truncate(config.max_length);
        supervised.truncate(config.max_length);
        if !supervised.contains(&1) {
            outcome.without_supervision += 1;
            return Ok(());
        }
    }
    outcome.documents.push(Tokenised { id, conversation, tokens, supervised });
    Ok(())
}

#[cfg(test)]
#[path = "build_tests.rs"]
pub(super) mod tests;
