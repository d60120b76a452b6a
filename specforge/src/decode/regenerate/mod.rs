//! Lets a target answer prompts itself, so that drafts are trained on what the target really says.
//!
//! A row of the prompts is a conversation. Its assistant messages are dropped and generated again: every user message
//! is answered in turn, and each prompt holds the answers before it. A row without assistant messages thus asks its
//! user messages one after the other. Rows run together in a batch that stays full (see [`super::engine`]).
//!
//! Files, for `--out answers.jsonl`:
//! - `answers.jsonl`: one line a finished row: everything the prompt's row held, and `messages` with the answers. Beside
//!   the text of an answer stand `token_ids`, what the target really said with the stop token where it said one; `finish`,
//!   why it ended (`stop` or `length`); `prompt_hash` and `vocabulary_hash`, which name the prompt's tokens and what ids
//!   stand for. Training takes the ids (see
//!   [`crate::data::recorded`]); the text shows special tokens as well. While the run lasts rows stand in the order they
//!   finish; at the end in that of the prompts, so that a run that was killed and went on leaves the file of one that was
//!   not.
//! - `answers.jsonl.run.json`: what the answers depend on. A run only goes on with the same.
//! - `answers.jsonl.errors.jsonl`: rows without answer, each with the reason. The next run tries them again.
//! - `answers.jsonl.cut.jsonl`: rows left out because an answer reached the token limit, with [`OnLength::Drop`].
//!
//! Several processes take rows from one list ([`SharedWork`]); the first of them keeps all these files.
//!
//! Sampling is keyed by seed, row id and position, so an answer depends neither on the batch nor on when the run was
//! interrupted. The rounding of float32 and bfloat16 depends on the batch's shape: where two tokens are equally likely
//! to within that error, the choice between them may differ from run to run.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::drafter::Opened;
use super::event::Silent;
use super::{Engine, EngineOptions, Finish, Left, Policy, Request, Throughput};
use crate::data::Marks;
use crate::data::conversation::Message;
use crate::data::recorded::{self, prompt_hash};
use crate::data::tokenizer::ChatTokenizer;
use crate::dist::SharedWork;
use crate::error::{Error, Result};
use crate::models::TargetModel;
use crate::nn::Processors;

mod answer_file;
mod books;
mod cut_file;
mod dialogue;
mod estimate;
pub mod generation_config;
pub mod prompts;
mod run_record;
pub mod served;

use books::{Books, Outcome, Tally};
use dialogue::Dialogue;
pub use estimate::{Estimate, Look, Measure, Measured};
pub use generation_config::GenerationConfig;
use prompts::{Prompt, Prompts};
use run_record::RunRecord;

/// What becomes of a row when an answer reaches the token limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnLength {
    /// The answer stays as it is, and the conversation goes on behind it.
    Keep,
    /// The answer stays, and ends the conversation.
    Stop,
    /// The whole row is left out.
    Drop,
}

/// What to answer, and how.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RegenOptions {
    /// Folder of the target; its files identify it in the record of the run.
    pub target: PathBuf,
    /// File of conversations to answer.
    pub prompts: PathBuf,
    /// File of answered conversations.
    pub out: PathBuf,
    /// Most tokens of one answer.
    pub max_new_tokens: usize,
    /// Most tokens of a prompt, earlier answers included. Above it a row fails. `None`: the target's context.
    pub max_prompt_tokens: Option<usize>,
    /// Conversations that run together.
    pub max_rows: usize,
    /// How tokens are chosen; [`GenerationConfig`] has the target's own way.
    pub processors: Processors,
    /// Who guesses, as [`super::drafter::open()`] takes it. The answers are the same with and without.
    pub draft: Option<String>,
    /// Which guesses are tried; the draft's own default where nothing is said.
    pub tree: Option<String>,
    /// What becomes of a row with an answer that was cut off.
    pub on_length: OnLength,
    /// Key of the sampling noise.
    pub seed: u64,
    /// Largest share of unusable rows before the run is refused.
    pub max_bad_share: f64,
    /// Whether to start over: an older `out` is kept under a name ending in `.bak`.
    pub restart: bool,
}

impl Default for RegenOptions {
    fn default() -> Self {
        Self {
            target: PathBuf::new(),
            prompts: PathBuf::new(),
            out: PathBuf::new(),
            max_new_tokens: 512,
            max_prompt_tokens: None,
            max_rows: 32,
            processors: Processors::default(),
            draft: None,
            tree: None,
            on_length: OnLength::Keep,
            seed: 0,
            max_bad_share: 0.01,
            restart: false,
        }
    }
}

impl RegenOptions {
    /// Refuses values that cannot be meant.
    pub fn check(&self) -> Result<()> {
        for (key, value) in [("max_new_tokens", self.max_new_tokens), ("max_rows", self.max_rows)] {
            if value == 0 {
                return Err(Error::config(key, "expected at least 1, got 0"));
            }
        }
        check_processors(&self.processors)?;
        if !(0.0..=1.0).contains(&self.max_bad_share) {
            let problem = format!("expected a share from 0 to 1, got {}", self.max_bad_share);
            return Err(Error::config("max_bad_share", problem));
        }
        let same = |path: &Path| path.canonicalize().ok();
        if same(&self.out).is_some_and(|out| Some(out) == same(&self.prompts)) {
            let problem = format!("expected another file than the prompts, got {}", self.out.display());
            return Err(Error::config("out", problem));
        }
        Ok(())
    }

    /// How tokens are chosen: as the target itself chooses, so that no draft changes an answer.
    pub fn policy(&self) -> Policy {
        Policy::Keyed { seed: self.seed }
    }

    /// How the engine decodes, given the tokens that end an answer.
    fn engine(&self, stop_tokens: Vec<u32>) -> EngineOptions {
        EngineOptions { processors: self.processors, policy: self.policy(), stop_tokens, max_rows: self.max_rows }
    }
}

/// Refuses ways to choose tokens that cannot be meant.
fn check_processors(processors: &Processors) -> Result<()> {
    let temperature = processors.temperature;
    if !temperature.is_finite() || temperature < 0.0 {
        let problem = format!("expected 0 (greedy) or a positive number, got {temperature}");
        return Err(Error::config("temperature", problem));
    }
    processors.check().map_err(|problem| match problem.split_once(": ") {
        Some((key, problem)) => Error::config(key, problem),
        None => Error::config("processors", problem),
    })
}

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Rows answered, those of earlier runs included.
    pub done: usize,
    /// Rows that failed in this run.
    pub failed: usize,
    /// Rows of the prompts.
    pub total: usize,
    /// Tokens generated in this run.
    pub tokens: u64,
    /// Tokens generated a second in this run, the time for prompts included.
    pub tokens_per_second: f64,
}

/// What a run did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RegenReport {
    /// Where the answers are.
    pub out: PathBuf,
    /// Usable rows of the prompts.
    pub rows: usize,
    /// Rows that earlier runs had answered.
    pub answered_before: usize,
    /// Rows answered by this run.
    pub answered: usize,
    /// Rows that failed; see `errors`.
    pub failed: usize,
    /// Lines of the prompts that were skipped, with file, line and reason.
    pub skipped: Vec<String>,
    /// Keys of the prompts that were not understood, by file.
    pub warnings: Vec<String>,
    /// Where failed rows and skipped lines are listed, if there are any.
    pub errors: Option<PathBuf>,
    /// Whether the run was asked to stop before every row was tried. The same command goes on.
    pub interrupted: bool,
    /// Answers generated by this run; a row has one for each user message.
    pub answers: usize,
    /// Answers that ended with a stop token.
    pub stopped: usize,
    /// Rows left out because an answer was cut off, those of earlier runs included.
    pub dropped: usize,
    /// How tokens were chosen.
    pub processors: Processors,
    /// Who guessed: `none`, or the kind of the draft.
    pub drafter: String,
    /// Tokens a verification behind the first token of each answer; none where there was no verification.
    pub acceptance_length: Option<f64>,
    /// Answers without a visible character.
    pub empty: usize,
    /// Prompt tokens processed.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub new_tokens: u64,
    /// Tokens generated a second, the time for prompts included.
    pub tokens_per_second: f64,
    /// Wall time of this run.
    pub seconds: f64,
}

/// What regeneration needs of a tokenizer.
trait Chat {
    /// Token ids of what was said so far, up to where the assistant begins to speak.
    fn prompt(&self, messages: &[Message], tools: Option<&Value>, arguments: &Map<String, Value>) -> Result<Vec<u32>>;
    /// The text of an answer, special tokens included.
    fn text(&self, tokens: &[u32]) -> Result<String>;
    /// Tokens that end an answer.
    fn stop_tokens(&self) -> Vec<u32>;
    /// Tells tokenizers and templates apart.
    fn fingerprint(&self) -> String;
    /// Tells vocabularies apart.
    fn vocabulary_hash(&self) -> String;
}

/// Answers every prompt that is not answered yet, with the guesses of `draft`: what `options` name, opened; together with the
/// other processes of `work`, the first of which is given the report. Stops early, with everything finished so far on disk,
/// once `stop` is set in one of them.
pub fn run(
    options: &RegenOptions,
    target: &dyn TargetModel,
    tokenizer: &ChatTokenizer,
    draft: Opened<'_>,
    work: &SharedWork<'_>,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(Progress),
) -> Result<Option<RegenReport>> {
    tokenizer.prepare(&[], None)?; // without a template no row could be asked
    if tokenizer.eos_token_ids().is_empty() {
        return Err(Error::bad_file(tokenizer.folder(), "names no end-of-sequence token: no answer would ever end")
            .with_hint("name `eos_token_id` in generation_config.json"));
    }
    run_chat(options, (target, draft), tokenizer, work, stop, progress)
}

impl Chat for ChatTokenizer {
    fn prompt(&self, messages: &[Message], tools: Option<&Value>, arguments: &Map<String, Value>) -> Result<Vec<u32>> {
        self.encode(&self.prepare(messages, tools)?.with_arguments(arguments)?.render(messages.len(), true)?)
    }

    fn text(&self, tokens: &[u32]) -> Result<String> {
        self.decode(tokens, false)
    }

    fn stop_tokens(&self) -> Vec<u32> {
        self.eos_token_ids().to_vec()
    }

    fn fingerprint(&self) -> String {
        ChatTokenizer::fingerprint(self).to_owned()
    }

    fn vocabulary_hash(&self) -> String {
        recorded::vocabulary_hash(self)
    }
}

fn run_chat(
    options: &RegenOptions,
    (target, draft): (&dyn TargetModel, Opened<'_>),
    chat: &dyn Chat,
    work: &SharedWork<'_>,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(Progress),
) -> Result<Option<RegenReport>> {
    let start = Instant::now();
    options.check()?;
    let prompts = Prompts::read(&options.prompts, options.max_bad_share)?;
    let record = RunRecord::new(options, target.kind(), &chat.fingerprint())?;
    let mut books = None;
    let start_of_all = work.from_first("the answers that are there", || {
        let (opened, open) = Books::open(&options.out, options.restart, &prompts, &record)?;
        books = Some(opened);
        Start { record: record.clone(), prompts: prompts.digest(), open }.to_text()
    })?;
    let Start { record: of_first, prompts: digest, open } = Start::from_text(&start_of_all)?;
    of_first.check_rank(work.rank(), &record)?;
    if digest != prompts.digest() {
        let path = &options.prompts;
        return Err(Error::bad_file(path, format!("rank {} reads other prompts than rank 0", work.rank())));
    }

    let mut engine = Engine::new(target, draft.drafter, options.engine(chat.stop_tokens()))?;
    let mut job = Job::new(options, chat, &prompts, work, open);
    let (total, began) = (prompts.rows.len(), Instant::now());
    let mut counted = 0;
    while !work.is_stopped(stop.load(Ordering::Relaxed))? {
        job.feed(&mut engine)?;
        if engine.pending() == 0 {
            break;
        }
        for left in engine.step(&mut Silent)? {
            job.receive(&mut engine, left)?;
        }
        let throughput = engine.throughput();
        let tokens = work.count(throughput.new_tokens - counted)?;
        counted = throughput.new_tokens;
        let received = work.received()?;
        if let Some(books) = &mut books {
            received.iter().try_for_each(|outcome| books.enter_text(outcome))?;
            let tokens_per_second = together(work, tokens, &throughput, began);
            progress(Progress { done: books.done(), failed: books.failed, total, tokens, tokens_per_second });
        }
    }
    let throughput = engine.throughput();
    let Throughput { prompt_tokens, new_tokens, .. } = throughput;
    Outcome::Counted(Tally { prompt_tokens, new_tokens, ..job.tally }).hand_in(work)?;
    work.finish(&mut |outcome| match &mut books {
        None => Ok(()),
        Some(books) => {
            books.enter_text(&outcome)?;
            if work.world_size() > 1 {
                let tokens = work.count(0)?;
                let tokens_per_second = together(work, tokens, &throughput, began);
                progress(Progress { done: books.done(), failed: books.failed, total, tokens, tokens_per_second });
            }
            Ok(())
        }
    })?;
    let Some(books) = books else { return Ok(None) };
    let Books { answered_before, answered, failed, dropped, tally, .. } = books;
    let tokens_per_second = together(work, tally.new_tokens, &throughput, began);
    let (interrupted, errors) = books.close()?;
    Ok(Some(RegenReport {
        out: options.out.clone(),
        rows: total,
        answered_before,
        answered,
        failed,
        skipped: prompts.bad_lines.iter().map(Error::to_string).collect(),
        warnings: prompts.passed_over.warnings(),
        errors,
        interrupted,
        answers: tally.turns,
        stopped: tally.stopped,
        dropped,
        processors: options.processors,
        drafter: draft.method,
        acceptance_length: (tally.rounds > 0).then(|| tally.verified as f64 / tally.rounds as f64),
        empty: tally.empty,
        prompt_tokens: tally.prompt_tokens,
        new_tokens: tally.new_tokens,
        tokens_per_second,
        seconds: start.elapsed().as_secs_f64(),
    }))
}

/// Tokens a second: of a process on its own while it computed, of several by the clock on the wall.
fn together(work: &SharedWork<'_>, tokens: u64, own: &Throughput, began: Instant) -> f64 {
    match work.world_size() {
        1 => own.tokens_per_second(),
        _ => tokens as f64 / began.elapsed().as_secs_f64().max(1e-9),
    }
}

/// What the first process tells the others before they begin.
#[derive(Serialize, Deserialize)]
struct Start {
    /// What its answers depend on.
    record: RunRecord,
    /// Digest of its prompts.
    prompts: String,
    /// Rows to answer.
    open: Vec<usize>,
}

impl Start {
    fn to_text(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|error| Error::Failed(format!("writing the rows to answer: {error}")))
    }

    fn from_text(text: &[u8]) -> Result<Self> {
        serde_json::from_slice(text).map_err(|error| Error::Failed(format!("the rows to answer: {error}")))
    }
}

/// The state of a process between passes.
struct Job<'a> {
    options: &'a RegenOptions,
    chat: &'a dyn Chat,
    vocabulary_hash: String,
    prompts: &'a Prompts,
    work: &'a SharedWork<'a>,
    /// Rows to answer: pieces of the work.
    open: Vec<usize>,
    /// Rows that have begun here.
    running: HashMap<usize, Dialogue>,
    tally: Tally,
}

impl<'a> Job<'a> {
    fn new(
        options: &'a RegenOptions,
        chat: &'a dyn Chat,
        prompts: &'a Prompts,
        work: &'a SharedWork<'a>,
        open: Vec<usize>,
    ) -> Self {
        let vocabulary_hash = chat.vocabulary_hash();
        let (running, tally) = (HashMap::new(), Tally::default());
        Self { options, chat, vocabulary_hash, prompts, work, open, running, tally }
    }

    /// Begins rows until the batch is full. More would hold their tokens in memory for nothing, and keep them from processes
    /// that have nothing left to do.
    fn feed(&mut self, engine: &mut Engine<'_>) -> Result<()> {
        while engine.pending() < self.options.max_rows {
            let piece = self.work.claim()?;
            let Some(&row) = self.open.get(piece) else {
                return Ok(());
            };
            self.proceed(engine, row, Dialogue::new(&self.prompts.rows[row]))?;
        }
        Ok(())
    }

    /// Asks the next question of a row, or hands the row in where none is left.
    fn proceed(&mut self, engine: &mut Engine<'_>, row: usize, mut dialogue: Dialogue) -> Result<()> {
        if !dialogue.ask() {
            let line = self.prompts.rows[row].answered(&dialogue.messages)?;
            return Outcome::Answered { row, line }.hand_in(self.work);
        }
        let request = match self.request(row, &dialogue) {
            Ok(request) => request,
            Err(error) => return self.fail(row, dialogue.turns, &error),
        };
        dialogue.prompt_hash = prompt_hash(&request.prompt);
        let submitted = if dialogue.turns == 0 { engine.submit(request) } else { engine.submit_first(request) };
        match submitted {
            Ok(()) => {
                self.running.insert(row, dialogue);
                Ok(())
            }
            Err(error) => self.fail(row, dialogue.turns, &error),
        }
    }

    fn request(&self, row: usize, dialogue: &Dialogue) -> Result<Request> {
        let Prompt { tools, template_arguments, .. } = &self.prompts.rows[row];
        let prompt = self.chat.prompt(&dialogue.messages, tools.as_ref(), template_arguments)?;
        let limit = self.options.max_prompt_tokens.unwrap_or(usize::MAX);
        if prompt.len() > limit {
            let problem = format!("the prompt has {} tokens, more than max_prompt_tokens = {limit}", prompt.len());
            return Err(Error::Failed(problem));
        }
        let key = noise_key(&self.prompts.rows[row].id);
        Ok(Request { tag: row as u64, prompt, max_new_tokens: self.options.max_new_tokens, key })
    }

    fn receive(&mut self, engine: &mut Engine<'_>, left: Left) -> Result<()> {
        let row = left.tag as usize;
        let Some(mut dialogue) = self.running.remove(&row) else {
            return Err(Error::Failed(format!("row {row} was answered without being asked")));
        };
        let turn = dialogue.turns;
        let answer = match left.decoded {
            Ok(answer) => answer,
            Err(error) => return self.fail(row, turn, &error),
        };
        let text = match self.chat.text(answer.text_tokens()) {
            Ok(text) => text,
            Err(error) => return self.fail(row, turn, &error),
        };
        self.tally.turns += 1;
        self.tally.rounds += answer.rounds.len();
        self.tally.verified += answer.rounds.iter().map(|round| round.tokens).sum::<usize>();
        self.tally.stopped += usize::from(answer.finish == Finish::Stop);
        self.tally.empty += usize::from(text.trim().is_empty());
        let cut = answer.finish == Finish::Length;
        if cut && self.options.on_length == OnLength::Drop {
            return Outcome::Cut { row, turn: turn + 1 }.hand_in(self.work);
        }
        if cut && self.options.on_length == OnLength::Stop {
            dialogue.rest.clear();
        }
        let prompt_hash = Some(std::mem::take(&mut dialogue.prompt_hash));
        let marks = Marks {
            train: None,
            finish: Some(answer.finish),
            token_ids: Some(answer.tokens),
            prompt_hash,
            vocabulary_hash: Some(self.vocabulary_hash.clone()),
        };
        dialogue.messages.push(Message { marks, ..Message::new("assistant", text) });
        dialogue.turns += 1;
        self.proceed(engine, row, dialogue)
    }

    fn fail(&mut self, row: usize, turn: usize, error: &Error) -> Result<()> {
        Outcome::Failed { row, turn: turn + 1, error: error.to_string(), asked: None }.hand_in(self.work)
    }
}

/// A row's own key of the sampling noise: the same whatever stands before it in the file.
fn noise_key(id: &str) -> u64 {
    let digest = Sha256::digest(id.as_bytes());
    digest[..8].iter().fold(0, |key, &byte| (key << 8) | u64::from(byte))
}

#[cfg(test)]
mod tests;
