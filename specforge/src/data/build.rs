//! Turns files into a token cache: in parallel, in order, and only if no cache of the same content exists.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::cache::{CacheWriter, TokenCache, VERSION};
use super::conversation::{self, Conversation, Parsed, Rejections, Sample, parse_record, record_name};
use super::loss_mask::{Method, Rendered, Span, SpanEnd, render_supervised, token_mask};
use super::marks::{Finish, PassedOver, PassedOverCounts};
use super::mask::{Mask, Role};
use super::parts;
use super::reader::{Record, SourceFile};
use super::recorded::{self, Ids, Recorded, Vocabulary};
use super::report::BuildReport;
use super::sample::Origin;
use super::tokenizer::{ChatTokenizer, hex};
use super::{DataConfig, Supervise, TooLong};
use crate::error::{Error, Result};
use crate::files::{self, Digests, Maker};

/// Records that are tokenised between two writes.
const CHUNK: usize = 1024;
/// More reasons than these are counted, not kept.
const REASONS_KEPT: usize = 100;

/// What became of one record.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) documents: Vec<Tokenised>,
    method: Option<Method>,
    pub(super) ids: Option<Ids>,
    cut_answers: usize,
    pub(super) passed_over: PassedOver,
    /// Which roles of [`Role::ALL`] speak in it.
    roles: [bool; Role::ALL.len()],
    pub(super) without_supervision: usize,
    pub(super) truncated: usize,
    pub(super) too_long: usize,
}

#[derive(Debug)]
pub(super) struct Tokenised {
    id: String,
    origin: Origin,
    tokens: Vec<u32>,
    supervised: Vec<u8>,
}

impl Outcome {
    /// Notes who speaks, and a wish of the file that the configuration does not share.
    fn note_role(&mut self, message: &super::Message, mask: &Mask) {
        if let Some(role) = Role::ALL.iter().position(|role| role.name() == message.role) {
            self.roles[role] = true;
        }
        let role = &message.role;
        if message.marks.train == Some(true) && !message.is_assistant() && !mask.trains(role) {
            self.passed_over.push(format!("the wish to train a message of role {role} (data.mask.roles)"));
        }
    }

    /// Adds a document, cut to the longest length, if something of it is trained.
    fn add(&mut self, config: &DataConfig, mut document: Tokenised) {
        let trains = |document: &Tokenised| document.supervised.contains(&1);
        if trains(&document) && document.tokens.len() > config.max_length {
            if config.too_long == TooLong::Drop {
                self.too_long += 1;
                return;
            }
            self.truncated += 1;
            document.tokens.truncate(config.max_length);
            document.supervised.truncate(config.max_length);
        }
        match trains(&document) {
            true => self.documents.push(document),
            false => self.without_supervision += 1,
        }
    }
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
            let opened = TokenCache::open(&cache_path, &key).and_then(|(cache, report)| {
                cache.check_ids(tokenizer.id_limit())?;
                Ok((cache, report))
            });
            match opened {
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
    hash.update(format!("{:?} {:?} {:?}", config.supervise, config.mask, config.too_long));
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
    let mut passed_over = PassedOverCounts::default();
    let mut roles = [false; Role::ALL.len()];
    let vocabulary = Vocabulary::default();
    let outcomes_of = |chunk: &[(&SourceFile, &Record)]| -> Vec<Result<Outcome>> {
        // What ends the build may take its time over every record: the others need not find out.
        let ended = AtomicBool::new(false);
        let outcomes = chunk.par_iter().map(|(source, record)| {
            if ended.load(Ordering::Relaxed) {
                return Err(Error::Failed("not looked at".to_owned()));
            }
            let outcome = tokenise_record(source, record, (tokenizer, &vocabulary), config);
            ended.fetch_or(matches!(&outcome, Err(error) if !matches!(error, Error::Failed(_))), Ordering::Relaxed);
            outcome
        });
        outcomes.collect()
    };
    let mut keep = |chunk: &[(&SourceFile, &Record)], outcomes: Vec<Result<Outcome>>| {
        for ((source, record), outcome) in chunk.iter().zip(outcomes) {
            match outcome {
                Ok(mut outcome) => {
                    passed_over.add(source.path(), std::mem::take(&mut outcome.passed_over));
                    roles.iter_mut().zip(outcome.roles).for_each(|(seen, here)| *seen |= here);
                    take(outcome, writer, &mut report)?;
                }
                Err(Error::Failed(problem)) => rejections.push(source.path(), record.line, problem),
                Err(fatal) => return Err(fatal),
            }
        }
        Ok(())
    };
    let mut chunks = records.chunks(CHUNK).map(|chunk| (chunk, outcomes_of(chunk)));
    let (mut ready, mut done) = (chunks.next(), 0);
    while let Some((chunk, outcomes)) = ready {
        progress(done, total as u64);
        done += chunk.len() as u64;
        // The next records are tokenised while these are written.
        let (next, kept) = rayon::join(|| chunks.next(), || keep(chunk, outcomes));
        kept?;
        ready = next;
    }
    progress(total as u64, total as u64);
    report.warnings = passed_over.warnings();
    let unseen = Role::ALL.iter().zip(roles).filter(|(role, seen)| config.mask.roles.contains(role) && !seen);
    if !config.mask.is_default() {
        report.warnings.extend(unseen.map(|(role, _)| {
            format!("data.mask.roles names {}, and no conversation that can be used has a message of it", role.name())
        }));
    }
    if report.foreign_token_ids > 0 {
        report.warnings.push(format!(
            "{} conversations have token ids of another tokenizer: their text is trained, as any other's. What this target \
             says itself is learned better; `specforge regen` asks it",
            report.foreign_token_ids
        ));
    }
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
    let recorded = outcome.ids == Some(Ids::Own);
    let several = recorded && outcome.documents.len() > 1;
    report.fanned_out += usize::from(outcome.method == Some(Method::FanOut) || several);
    report.from_token_ids += usize::from(recorded);
    report.foreign_token_ids += usize::from(outcome.ids == Some(Ids::Foreign));
    report.cut_answers += outcome.cut_answers;
    report.by_generation_blocks += usize::from(outcome.method == Some(Method::GenerationBlocks));
    for Tokenised { id, origin, tokens, supervised } in outcome.documents {
        writer.add(&id, origin, &tokens, &supervised)?;
    }
    Ok(())
}

/// Tokenises one record. [`Error::Failed`] is a reason to leave this record out; every other error ends the build.
fn tokenise_record(
    source: &SourceFile,
    record: &Record,
    asked: (&ChatTokenizer, &Vocabulary),
    config: &DataConfig,
) -> Result<Outcome> {
    let name = || record_name(source.path(), record.line);
    let parsed = parse_record(source.record(record), name).map_err(Error::Failed)?;
    tokenise_parsed(parsed, asked, config)
}

/// The same for a record that was read.
pub(super) fn tokenise_parsed(
    Parsed { sample, train, passed_over }: Parsed,
    (tokenizer, vocabulary): (&ChatTokenizer, &Vocabulary),
    config: &DataConfig,
) -> Result<Outcome> {
    let mut outcome = Outcome { passed_over, ..Outcome::default() };
    if !train {
        outcome.without_supervision = 1;
        return Ok(outcome);
    }
    let origin = sample.origin();
    refuse_choice(&sample, &config.mask).map_err(Error::Failed)?;
    if let Sample::Conversation(conversation) = &sample {
        for message in &conversation.messages {
            outcome.note_role(message, &config.mask);
        }
        let cut = |message: &&super::Message| message.marks.finish == Some(Finish::Length);
        outcome.cut_answers = conversation.messages.iter().filter(cut).count();
        outcome.ids = Some(vocabulary.ids_of(tokenizer, conversation));
    }
    let (rendered, method) = match &sample {
        Sample::Conversation(talk) if outcome.ids == Some(Ids::Own) => {
            let documents = recorded::documents(tokenizer, talk, config.supervise, &config.mask)?;
            outcome.without_supervision = usize::from(documents.is_empty());
            let several = documents.len() > 1;
            for Recorded { tokens, supervised, turn } in documents {
                let id = if several { format!("{}#{turn}", talk.id) } else { talk.id.clone() };
                outcome.add(config, Tokenised { id, origin, tokens, supervised });
            }
            return Ok(outcome);
        }
        Sample::Conversation(conversation) => {
            refuse_marks(conversation, config.supervise).map_err(Error::Failed)?;
            let (rendered, method) = render_supervised(tokenizer, conversation, config.supervise, &config.mask)?;
            (rendered, Some(method))
        }
        Sample::Tokens { id, tokens, supervised, vocabulary_hash } => {
            if let Some(&token) = tokens.iter().find(|&&token| token as usize >= tokenizer.id_limit()) {
                let limit = tokenizer.id_limit();
                return Err(Error::Failed(format!("`input_ids` name token {token}, but the model has {limit} tokens")));
            }
            if vocabulary_hash.as_ref().is_some_and(|hash| !vocabulary.is_own(tokenizer, hash)) {
                return Err(Error::Failed("its `input_ids` are of another tokenizer's vocabulary".to_owned()));
            }
            let supervised = supervised_tokens(supervised, config.supervise);
            let document = Tokenised { id: id.clone(), origin, tokens: tokens.clone(), supervised };
            outcome.add(config, document);
            return Ok(outcome);
        }
        Sample::Text { text, .. } => (vec![whole_text(text.clone(), 0)], None),
        Sample::Completion { prompt, completion, finish, .. } => {
            let cut = *finish == Some(Finish::Length);
            outcome.cut_answers = usize::from(cut);
            let whole = match cut {
                true => whole_text(format!("{prompt}{completion}"), prompt.len()),
                false => completed(tokenizer, prompt, completion)?,
            };
            let kept = kept_of_completion(whole, (prompt, completion), cut, &config.mask);
            (vec![kept.map_err(Error::Failed)?], None)
        }
    };
    outcome.method = method;
    if rendered.is_empty() {
        outcome.without_supervision = 1;
    }
    for part in rendered {
        let id = match part.turn {
            Some(turn) => format!("{}#{turn}", sample.id()),
            None => sample.id().to_owned(),
        };
        add_document(&mut outcome, tokenizer, config, id, origin, &part)?;
    }
    Ok(outcome)
}

/// Which tokens of a document in tokens are trained: those that are marked, of these the last run alone, or all.
fn supervised_tokens(marked: &[u8], supervise: Supervise) -> Vec<u8> {
    match supervise {
        Supervise::Assistant => marked.to_vec(),
        Supervise::All => vec![1; marked.len()],
        Supervise::LastTurn => {
            let end = marked.iter().rposition(|&mark| mark == 1).map_or(0, |last| last + 1);
            let start = marked[..end].iter().rposition(|&mark| mark == 0).map_or(0, |before| before + 1);
            (0..marked.len()).map(|place| u8::from((start..end).contains(&place))).collect()
        }
    }
}

/// Where every token is trained, nothing of a message can be left out.
fn refuse_marks(conversation: &Conversation, supervise: Supervise) -> Result<(), String> {
    let leaves_out = |message: &super::Message| message.is_assistant() && message.marks.leave_something_out();
    let Some(index) = conversation.messages.iter().position(leaves_out) else {
        return Ok(());
    };
    match (supervise, conversation.messages[index].marks.train) {
        (Supervise::All, Some(false)) => {
            Err(format!("message {} is not to be trained, but data.supervise = all trains every token", index + 1))
        }
        (Supervise::All, _) => Err(format!(
            "message {} is cut off, but data.supervise = all would train the end of its turn too",
            index + 1
        )),
        _ => Ok(()),
    }
}

/// Refuses what a choice of roles or parts says nothing about.
fn refuse_choice(sample: &Sample, mask: &Mask) -> Result<(), String> {
    let what = match sample {
        _ if mask.is_default() => return Ok(()),
        Sample::Conversation(_) => return Ok(()),
        Sample::Completion { .. } if mask.trains_assistant() => return Ok(()),
        Sample::Completion { .. } => "a prompt with its completion is what the assistant says",
        Sample::Text { .. } => "preformatted text has no roles and no parts",
        Sample::Tokens { .. } => "`input_ids` have no roles and no parts",
    };
    Err(format!("{what}, but data.mask chooses {}; write it as `messages`, or leave data.mask out", mask.words()))
}

/// The completion without the parts that are not trained.
fn kept_of_completion(
    whole: Rendered,
    (prompt, completion): (&str, &str),
    cut: bool,
    mask: &Mask,
) -> Result<Rendered, String> {
    if mask.takes_whole_turns() {
        return Ok(whole);
    }
    let mut message = super::Message::new("assistant", completion);
    message.marks.finish = cut.then_some(Finish::Length);
    let found = parts::of_answer(&message, completion, prompt.len(), 0, mask)?;
    let mut spans = Vec::new();
    for span in &whole.spans {
        spans.extend(parts::keep(&whole.text, span, &found, mask)?);
    }
    Ok(Rendered { spans, ..whole })
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
    origin: Origin,
    part: &Rendered,
) -> Result<()> {
    let encoded = tokenizer.encode_with_offsets(&part.text)?;
    let supervised = token_mask(tokenizer, &part.text, &encoded, &part.spans);
    let tokens = encoded.ids;
    if let Some(&token) = tokens.iter().find(|&&token| token as usize >= tokenizer.id_limit()) {
        let (limit, text) = (tokenizer.id_limit(), tokenizer.decode(&[token], false)?);
        let problem = format!("makes token {token} ({text:?}) of document `{id}`, but the model has {limit} tokens");
        return Err(Error::bad_file(tokenizer.folder().join("tokenizer.json"), problem)
            .with_hint("take tokenizer and model from the same folder, or resize the model's embedding"));
    }
    outcome.add(config, Tokenised { id, origin, tokens, supervised });
    Ok(())
}

#[cfg(test)]
#[path = "build_tests.rs"]
pub(super) mod tests;
