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
//! Sampling is keyed by seed, row id and position, so an answer depends neither on the batch nor on when the run was
//! interrupted. The rounding of float32 and bfloat16 depends on the batch's shape: where two tokens are equally likely
//! to within that error, the choice between them may differ from run to run.

use std::collections::{HashMap, VecDeque};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::drafter::Opened;
use super::event::Silent;
use super::{Engine, EngineOptions, Finish, Left, Policy, Request};
use crate::data::Marks;
use crate::data::conversation::Message;
use crate::data::recorded::{self, prompt_hash};
use crate::data::tokenizer::ChatTokenizer;
use crate::error::{Error, Result};
use crate::models::TargetModel;
use crate::nn::Processors;

mod answer_file;
mod cut_file;
pub mod generation_config;
pub mod prompts;
mod run_record;

use answer_file::{AnswerFile, beside};
use cut_file::CutFile;
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
    /// Who guesses, as [`super::drafter::open`] takes it. The answers are the same with and without.
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
        let temperature = self.processors.temperature;
        if !temperature.is_finite() || temperature < 0.0 {
            let problem = format!("expected 0 (greedy) or a positive number, got {temperature}");
            return Err(Error::config("temperature", problem));
        }
        self.processors.check().map_err(|problem| match problem.split_once(": ") {
            Some((key, problem)) => Error::config(key, problem),
            None => Error::config("processors", problem),
        })?;
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

/// Answers every prompt that is not answered yet, with the guesses of `draft`: what `options` name, opened. Stops early, with
/// everything finished so far on disk, once `stop` is set.
pub fn run(
    options: &RegenOptions,
    target: &dyn TargetModel,
    tokenizer: &ChatTokenizer,
    draft: Opened<'_>,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(Progress),
) -> Result<RegenReport> {
    tokenizer.prepare(&[], None)?; // without a template no row could be asked
    if tokenizer.eos_token_ids().is_empty() {
        return Err(Error::bad_file(tokenizer.folder(), "names no end-of-sequence token: no answer would ever end")
            .with_hint("name `eos_token_id` in generation_config.json"));
    }
    run_chat(options, (target, draft), tokenizer, stop, progress)
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
    stop: &AtomicBool,
    progress: &mut dyn FnMut(Progress),
) -> Result<RegenReport> {
    let start = Instant::now();
    options.check()?;
    let prompts = Prompts::read(&options.prompts, options.max_bad_share)?;
    let record = RunRecord::new(options, target.kind(), chat.fingerprint())?;
    let answers = AnswerFile::open(&options.out, &prompts, &record, options.restart)?;
    let errors = ErrorFile::begin(beside(&options.out, ".errors.jsonl"), &prompts)?;
    let cut = CutFile::open(beside(&options.out, ".cut.jsonl"), &prompts)?;
    let mut engine = Engine::new(target, draft.drafter, options.engine(chat.stop_tokens()))?;
    let mut job = Job::new(options, chat, &prompts, answers, (errors, cut));
    let total = prompts.rows.len();
    while !stop.load(Ordering::Relaxed) {
        job.feed(&mut engine)?;
        if engine.pending() == 0 {
            break;
        }
        for left in engine.step(&mut Silent)? {
            job.receive(&mut engine, left)?;
        }
        let throughput = engine.throughput();
        let (done, failed) = (job.answered_before + job.answered + job.dropped, job.failed);
        let (tokens, tokens_per_second) = (throughput.new_tokens, throughput.tokens_per_second());
        progress(Progress { done, failed, total, tokens, tokens_per_second });
    }
    let interrupted = job.answered_before + job.answered + job.dropped + job.failed < total;
    if interrupted {
        job.answers.sync()?;
    } else {
        job.answers.sort()?;
    }
    let throughput = engine.throughput();
    Ok(RegenReport {
        out: options.out.clone(),
        rows: total,
        answered_before: job.answered_before,
        answered: job.answered,
        failed: job.failed,
        skipped: prompts.bad_lines.iter().map(Error::to_string).collect(),
        warnings: prompts.passed_over.warnings(),
        errors: job.errors.file.is_some().then_some(job.errors.path),
        interrupted,
        answers: job.turns,
        stopped: job.stopped,
        dropped: job.dropped,
        processors: options.processors,
        drafter: draft.method,
        acceptance_length: (job.rounds > 0).then(|| job.verified as f64 / job.rounds as f64),
        empty: job.empty,
        prompt_tokens: throughput.prompt_tokens,
        new_tokens: throughput.new_tokens,
        tokens_per_second: throughput.tokens_per_second(),
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// A row whose turns are being answered.
struct Dialogue {
    /// Said so far.
    messages: Vec<Message>,
    /// Not yet asked.
    rest: VecDeque<Message>,
    /// Hash of the prompt that is being answered.
    prompt_hash: String,
    /// Answers so far.
    turns: usize,
}

impl Dialogue {
    fn new(prompt: &Prompt) -> Self {
        let rest = prompt.messages.iter().cloned().collect();
        Self { messages: Vec::new(), rest, prompt_hash: String::new(), turns: 0 }
    }

    /// Says everything up to the next user message, it included. False where no user message is left.
    fn ask(&mut self) -> bool {
        while let Some(message) = self.rest.pop_front() {
            let question = message.role == "user";
            self.messages.push(message);
            if question {
                return true;
            }
        }
        false
    }
}

/// The state of a run between passes.
struct Job<'a> {
    options: &'a RegenOptions,
    chat: &'a dyn Chat,
    vocabulary_hash: String,
    prompts: &'a Prompts,
    answers: AnswerFile,
    errors: ErrorFile,
    cut: CutFile,
    /// Rows to answer that have not begun.
    open: VecDeque<usize>,
    /// Rows that have begun.
    running: HashMap<usize, Dialogue>,
    answered_before: usize,
    answered: usize,
    dropped: usize,
    failed: usize,
    turns: usize,
    stopped: usize,
    empty: usize,
    /// Verifications, and tokens that came of them.
    rounds: usize,
    verified: usize,
}

impl<'a> Job<'a> {
    fn new(
        options: &'a RegenOptions,
        chat: &'a dyn Chat,
        prompts: &'a Prompts,
        answers: AnswerFile,
        (errors, cut): (ErrorFile, CutFile),
    ) -> Self {
        let mut done = vec![false; prompts.rows.len()];
        answers.rows().for_each(|row| done[row] = true);
        let answered_before = done.iter().filter(|&&done| done).count();
        cut.rows().iter().for_each(|&row| done[row] = true);
        let open: VecDeque<usize> = (0..done.len()).filter(|&row| !done[row]).collect();
        let dropped = done.len() - open.len() - answered_before;
        let (answered, failed, turns, stopped, empty, rounds, verified) = (0, 0, 0, 0, 0, 0, 0);
        let running = HashMap::new();
        Self {
            options,
            chat,
            vocabulary_hash: chat.vocabulary_hash(),
            prompts,
            answers,
            errors,
            cut,
            open,
            running,
            answered_before,
            answered,
            dropped,
            failed,
            turns,
            stopped,
            empty,
            rounds,
            verified,
        }
    }

    /// Begins rows until as many wait as could run. More would hold their tokens in memory for nothing.
    fn feed(&mut self, engine: &mut Engine<'_>) -> Result<()> {
        while engine.waiting() < self.options.max_rows {
            let Some(row) = self.open.pop_front() else {
                return Ok(());
            };
            self.proceed(engine, row, Dialogue::new(&self.prompts.rows[row]))?;
        }
        Ok(())
    }

    /// Asks the next question of a row, or writes the row where none is left.
    fn proceed(&mut self, engine: &mut Engine<'_>, row: usize, mut dialogue: Dialogue) -> Result<()> {
        if !dialogue.ask() {
            let line = self.prompts.rows[row].answered(&dialogue.messages)?;
            self.answers.append(row, &line)?;
            self.answered += 1;
            return Ok(());
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
        self.turns += 1;
        self.rounds += answer.rounds.len();
        self.verified += answer.rounds.iter().map(|round| round.tokens).sum::<usize>();
        self.stopped += usize::from(answer.finish == Finish::Stop);
        self.empty += usize::from(text.trim().is_empty());
        let cut = answer.finish == Finish::Length;
        if cut && self.options.on_length == OnLength::Drop {
            let Prompt { id, line, .. } = &self.prompts.rows[row];
            self.dropped += 1;
            return self.cut.append(id, *line, turn + 1);
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
        self.failed += 1;
        let prompt = &self.prompts.rows[row];
        let (id, line, turn) = (&prompt.id, prompt.line, turn + 1);
        self.errors.append(&json!({"id": id, "line": line, "turn": turn, "error": error.to_string()}))
    }
}

/// Rows and lines without answer, with reasons. There is no file where there are none.
struct ErrorFile {
    path: PathBuf,
    file: Option<std::fs::File>,
}

impl ErrorFile {
    /// Replaces the file of an earlier run: its rows are tried again.
    fn begin(path: PathBuf, prompts: &Prompts) -> Result<Self> {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("replace", &path)(error));
            }
            _ => {}
        }
        let mut errors = Self { path, file: None };
        for error in &prompts.bad_lines {
            if let Error::BadLine { line, problem, .. } = error {
                errors.append(&json!({"line": line, "error": problem}))?;
            }
        }
        Ok(errors)
    }

    fn append(&mut self, value: &Value) -> Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(std::fs::File::create(&self.path).map_err(Error::io("create", &self.path))?),
        };
        file.write_all(format!("{value}\n").as_bytes()).map_err(Error::io("write", &self.path))
    }
}

/// A row's own key of the sampling noise: the same whatever stands before it in the file.
fn noise_key(id: &str) -> u64 {
    let digest = Sha256::digest(id.as_bytes());
    digest[..8].iter().fold(0, |key, &byte| (key << 8) | u64::from(byte))
}

#[cfg(test)]
mod tests;
