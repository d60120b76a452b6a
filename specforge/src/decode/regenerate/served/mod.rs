//! Answers of servers that speak OpenAI's protocol: every model that vLLM, SGLang or anybody else serves can answer prompts.
//!
//! `chat` says how a turn is asked and what an answer means, `fleet` who is asked; [`crate::serving`] keeps a bounded number
//! of turns on their way to each server and asks again where something went wrong. Files, rows and their order are those of
//! the other way to answer (see [`super`]): a row is asked turn by turn, each with the server's own answers before it, and
//! written whole once its last turn is answered.
//!
//! What a server gives is kept as it is: words, thoughts (`reasoning_content`), calls of tools, token ids. An answer that calls
//! tools ends its conversation, since nobody here runs them. Where one answer of a conversation came without ids, none of its
//! answers keeps them: training takes a conversation's tokens or its text.
//!
//! With a tokenizer at hand every row is read as training will read it before it is written: a server that renders another
//! prompt than the template here, or gives tokens of another vocabulary, is found at the first rows.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::answer_file::calls_tools;
use super::books::{Asked, Books, Outcome, Tally};
use super::dialogue::Dialogue;
use super::prompts::Prompts;
use super::run_record::RunRecord;
use super::{OnLength, Progress, check_processors};
use crate::data::conversation::{Sample, parse_sample};
use crate::data::marks::Finish;
use crate::data::recorded;
use crate::data::tokenizer::ChatTokenizer;
use crate::error::{Error, Result, foreign};
use crate::nn::Processors;
use crate::serving::{Cause, Failure, Outcome as Returned, Pool, Retries};

mod address;
mod chat;
mod fleet;

pub use address::{Addresses, Dialect};
pub use chat::Sampling;
use chat::{Answer, Turn};
use fleet::{Server, Servers};

/// How often progress is told and a wish to stop is heard where nothing arrives.
const LOOK: Duration = Duration::from_millis(100);
/// Rows that servers in trouble may cost one after the other, with no answer in between, before the run ends. They are
/// tried again by the next one, as all others that are left.
const ROWS_LOST: usize = 3;
/// Rows that may be no data to train on before the first that is.
const ROWS_UNFIT: usize = 3;

/// What to answer, who is asked, and how.
#[derive(Debug, Clone)]
pub struct ServedOptions {
    /// Who answers.
    pub servers: Vec<Addresses>,
    /// What the servers call the model; asked of them where it is not given.
    pub model: Option<String>,
    /// The environment variable that holds the key, in place of [`Dialect::key_variable`].
    pub key_variable: Option<String>,
    /// Turns on their way to one server at once.
    pub in_flight: usize,
    /// How long one answer may take.
    pub timeout: Duration,
    /// How often one turn is asked.
    pub retries: Retries,
    /// File of conversations to answer.
    pub prompts: PathBuf,
    /// File of answered conversations.
    pub out: PathBuf,
    /// Most tokens of one answer.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Values every template is given; those of a row replace them.
    pub template_arguments: Map<String, Value>,
    /// What becomes of a row with an answer that was cut off.
    pub on_length: OnLength,
    /// Seed of sampling; every turn has its own, made of this one and the row's id.
    pub seed: u64,
    /// Largest share of unusable rows before the run is refused.
    pub max_bad_share: f64,
    /// Whether to start over: an older `out` is kept under a name ending in `.bak`.
    pub restart: bool,
}

impl ServedOptions {
    /// Refuses values that cannot be meant.
    pub fn check(&self) -> Result<()> {
        check_processors(&self.sampling.over(Processors::default()))?;
        for Addresses { dialect, .. } in &self.servers {
            self.sampling.check(*dialect).map_err(|problem| Error::Usage(format!("--from: {problem}")))?;
            if *dialect == Dialect::OpenAi && !self.template_arguments.is_empty() {
                let problem =
                    "--template-arguments: OpenAI's protocol has no place for them; name the engine, as vllm:URL";
                return Err(Error::Usage(problem.to_owned()));
            }
        }
        let same = |path: &PathBuf| path.canonicalize().ok();
        if same(&self.out).is_some_and(|out| Some(out) == same(&self.prompts)) {
            let problem = format!("expected another file than the prompts, got {}", self.out.display());
            return Err(Error::config("out", problem));
        }
        Ok(())
    }

    /// The servers, with the keys that the environment holds.
    fn connect(&self, environment: &dyn Fn(&str) -> Option<String>) -> Vec<Server> {
        address::each(&self.servers)
            .into_iter()
            .map(|address| {
                let variable = self.key_variable.as_deref().unwrap_or(address.dialect.key_variable());
                let key = environment(variable).filter(|key| !key.is_empty());
                Server::new(address, (variable, key.as_deref()), self.timeout, self.in_flight)
            })
            .collect()
    }

    /// What must be the same for a run that goes on. Who answers may change, as long as it is the same model.
    fn same(&self, model: &str, tokenizer: Option<&ChatTokenizer>) -> Value {
        let Sampling { temperature, top_k, top_p, repetition_penalty } = self.sampling;
        json!({
            "served_model": model,
            "tokenizer_fingerprint": tokenizer.map(|tokenizer| tokenizer.fingerprint().to_owned()),
            "template_arguments": self.template_arguments,
            "max_new_tokens": self.max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "on_length": self.on_length,
            "seed": (!self.sampling.is_greedy()).then_some(self.seed),
        })
    }
}

/// What a run did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ServedReport {
    /// Where the answers are.
    pub out: PathBuf,
    /// What the servers call the model.
    pub model: String,
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
    /// What is to be known and stopped nothing.
    pub warnings: Vec<String>,
    /// Where failed rows and skipped lines are listed, if there are any.
    pub errors: Option<PathBuf>,
    /// Whether rows are left that were not tried. The same command goes on.
    pub interrupted: bool,
    /// Why the run ended before its time, where it did so by itself.
    pub ended_by: Option<String>,
    /// Answers that came in this run, those of rows that failed later included.
    pub answers: usize,
    /// Answers that ended by themselves.
    pub stopped: usize,
    /// Answers that called tools, and ended their conversation.
    pub called_tools: usize,
    /// Answers whose token ids were given.
    pub with_token_ids: usize,
    /// Rows left out because an answer was cut off, those of earlier runs included.
    pub dropped: usize,
    /// How tokens were to be chosen; what is null was the server's own choice.
    pub sampling: Sampling,
    /// Prompt tokens processed, as the servers count them.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub new_tokens: u64,
    /// Tokens generated a second, by the clock on the wall.
    pub tokens_per_second: f64,
    /// Wall time of this run.
    pub seconds: f64,
    /// What each server did.
    pub servers: Vec<ServerReport>,
}

/// What one server did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServerReport {
    /// Who.
    pub server: String,
    /// Answers it gave.
    pub answers: usize,
    /// Tokens in them.
    pub new_tokens: u64,
}

/// Answers every prompt that is not answered yet by asking servers. With a tokenizer, rows are held to what training will
/// read. `environment` gives a variable of the environment. Stops early, with everything finished so far on disk, once `stop`
/// is set; turns on their way are asked again by the next run.
pub fn run(
    options: &ServedOptions,
    tokenizer: Option<&ChatTokenizer>,
    environment: &dyn Fn(&str) -> Option<String>,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(Progress),
) -> Result<ServedReport> {
    let start = Instant::now();
    options.check()?;
    let prompts = Prompts::read(&options.prompts, options.max_bad_share)?;
    let list = options.connect(environment);
    let names: Vec<String> = list.iter().map(|server| server.address.to_string()).collect();
    let (servers, mut warnings) = Servers::open(list, options.model.as_deref(), options.retries)?;
    let model = servers.model.clone();
    let target = tokenizer.map(|tokenizer| tokenizer.folder().to_path_buf());
    let record = RunRecord::served(names.clone(), target, &options.prompts, options.same(&model, tokenizer));
    let (mut books, open) = Books::open(&options.out, options.restart, &prompts, &record)?;
    warnings.extend(prompts.passed_over.warnings());

    let pool = Pool::start(Arc::new(servers), options.retries, options.in_flight)?;
    let (answer, arrives) = mpsc::channel();
    let mut job = Job::new(options, &prompts, tokenizer, &names, (&pool, answer));
    let (total, mut open) = (prompts.rows.len(), open.into_iter());
    let began = Instant::now();
    let told = |books: &Books<'_>, tally: &Tally| Progress {
        done: books.done(),
        failed: books.failed,
        total,
        tokens: tally.new_tokens,
        tokens_per_second: tally.new_tokens as f64 / began.elapsed().as_secs_f64().max(1e-9),
    };
    while !stop.load(Ordering::Relaxed) && job.ended_by.is_none() {
        // Twice as many as are on their way: no server waits for this loop.
        while job.running.len() < 2 * pool.in_flight()
            && let Some(row) = open.next()
        {
            let outcome = job.proceed(row, Dialogue::new(&prompts.rows[row]));
            outcome?.map_or(Ok(()), |outcome| books.enter(outcome))?;
        }
        if job.running.is_empty() {
            break;
        }
        match arrives.recv_timeout(LOOK) {
            Ok(returned) => job.receive(returned)?.map_or(Ok(()), |outcome| books.enter(outcome))?,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::Failed("the threads that ask servers are gone".to_owned()));
            }
        }
        progress(told(&books, &job.tally));
    }
    // What has arrived already is not asked again.
    while job.ended_by.is_none()
        && let Ok(returned) = arrives.try_recv()
    {
        job.receive(returned)?.map_or(Ok(()), |outcome| books.enter(outcome))?;
    }
    let Job { tally, counts, ended_by, called_tools, with_token_ids, .. } = job;
    if tally.turns > 0 && with_token_ids == 0 {
        warnings.push(
            "no server gave token ids: training will tokenise the text again; vLLM and SGLang give them if they are named as \
             vllm:URL or sglang:URL and are not too old"
                .to_owned(),
        );
    }
    let Books { answered_before, answered, failed, dropped, .. } = books;
    let (interrupted, errors) = books.close()?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(ServedReport {
        out: options.out.clone(),
        model,
        rows: total,
        answered_before,
        answered,
        failed,
        skipped: prompts.bad_lines.iter().map(Error::to_string).collect(),
        warnings,
        errors,
        interrupted,
        ended_by,
        answers: tally.turns,
        stopped: tally.stopped,
        called_tools,
        with_token_ids,
        dropped,
        sampling: options.sampling,
        prompt_tokens: tally.prompt_tokens,
        new_tokens: tally.new_tokens,
        tokens_per_second: tally.new_tokens as f64 / began.elapsed().as_secs_f64().max(1e-9),
        seconds,
        servers: counts,
    })
}

/// The state of a run between answers.
struct Job<'a> {
    options: &'a ServedOptions,
    prompts: &'a Prompts,
    tokenizer: Option<&'a ChatTokenizer>,
    vocabulary_hash: Option<String>,
    pool: &'a Pool<Servers>,
    answer: Sender<Returned<Servers>>,
    /// As long as this is there, answers are wanted.
    wanted: Arc<()>,
    /// Rows that have begun.
    running: HashMap<usize, Dialogue>,
    tally: Tally,
    counts: Vec<ServerReport>,
    called_tools: usize,
    with_token_ids: usize,
    /// Rows that servers in trouble cost since the last answer.
    lost: usize,
    /// Rows that are no data to train on; and whether there was one that is.
    unfit: usize,
    fits: bool,
    ended_by: Option<String>,
}

impl<'a> Job<'a> {
    fn new(
        options: &'a ServedOptions,
        prompts: &'a Prompts,
        tokenizer: Option<&'a ChatTokenizer>,
        names: &[String],
        (pool, answer): (&'a Pool<Servers>, Sender<Returned<Servers>>),
    ) -> Self {
        let counts = names.iter().map(|name| ServerReport { server: name.clone(), answers: 0, new_tokens: 0 });
        Self {
            options,
            prompts,
            tokenizer,
            vocabulary_hash: tokenizer.map(recorded::vocabulary_hash),
            pool,
            answer,
            wanted: Arc::new(()),
            running: HashMap::new(),
            tally: Tally::default(),
            counts: counts.collect(),
            called_tools: 0,
            with_token_ids: 0,
            lost: 0,
            unfit: 0,
            fits: false,
            ended_by: None,
        }
    }

    /// Asks the next question of a row. Where none is left, what became of the row.
    fn proceed(&mut self, row: usize, mut dialogue: Dialogue) -> Result<Option<Outcome>> {
        if !dialogue.ask() {
            return self.finish(row, dialogue).map(Some);
        }
        let prompt = &self.prompts.rows[row];
        let mut template_arguments = self.options.template_arguments.clone();
        template_arguments.extend(prompt.template_arguments.clone());
        let turn = Turn {
            row,
            messages: dialogue.messages.clone(),
            tools: prompt.tools.clone(),
            template_arguments,
            max_new_tokens: self.options.max_new_tokens,
            sampling: self.options.sampling,
            seed: seed(self.options.seed, &prompt.id, dialogue.turns),
        };
        match dialogue.turns {
            0 => self.pool.ask([turn], &self.answer, &self.wanted),
            // What was begun is ended first; its prefix may still be in the server's cache.
            _ => self.pool.ask_first(turn, &self.answer, &self.wanted),
        }
        self.running.insert(row, dialogue);
        Ok(None)
    }

    /// Takes what came back of a turn. Where that is the row's end, what became of the row.
    fn receive(&mut self, returned: Returned<Servers>) -> Result<Option<Outcome>> {
        let Returned { question: Turn { row, .. }, server, attempts, result } = returned;
        let Some(dialogue) = self.running.remove(&row) else {
            return Err(Error::Failed(format!("row {row} was answered without being asked")));
        };
        match result {
            Ok(answer) => self.go_on(row, dialogue, server, answer),
            Err(failure) => Ok(self.fail(row, &dialogue, (server, attempts), failure)),
        }
    }

    fn go_on(&mut self, row: usize, mut dialogue: Dialogue, server: usize, answer: Answer) -> Result<Option<Outcome>> {
        self.lost = 0;
        let finish = answer.finish();
        self.counts[server].answers += 1;
        self.counts[server].new_tokens += answer.new_tokens;
        self.tally.turns += 1;
        self.tally.prompt_tokens += answer.prompt_tokens;
        self.tally.new_tokens += answer.new_tokens;
        self.tally.stopped += usize::from(finish == Some(Finish::Stop));
        let mut message = answer.message;
        self.with_token_ids += usize::from(message.marks.token_ids.is_some());
        if message.marks.token_ids.is_some() {
            message.marks.vocabulary_hash.clone_from(&self.vocabulary_hash);
        }
        let cut = finish == Some(Finish::Length);
        if cut && self.options.on_length == OnLength::Drop {
            return Ok(Some(Outcome::Cut { row, turn: dialogue.turns + 1 }));
        }
        if (cut && self.options.on_length == OnLength::Stop) || calls_tools(&message) {
            self.called_tools += usize::from(calls_tools(&message));
            dialogue.rest.clear();
        }
        dialogue.messages.push(message);
        dialogue.turns += 1;
        self.proceed(row, dialogue)
    }

    /// The line of a row whose turns are answered, if it is one to train on.
    fn finish(&mut self, row: usize, mut dialogue: Dialogue) -> Result<Outcome> {
        let mut answers = dialogue.messages.iter().filter(|message| message.is_assistant());
        if answers.any(|message| message.marks.token_ids.is_none()) {
            for message in &mut dialogue.messages {
                let marks = &mut message.marks;
                (marks.token_ids, marks.prompt_hash, marks.vocabulary_hash) = (None, None, None);
            }
        }
        let line = self.prompts.rows[row].answered(&dialogue.messages)?;
        let Some(tokenizer) = self.tokenizer else { return Ok(Outcome::Answered { row, line }) };
        match check(tokenizer, &line) {
            Ok(()) => {
                self.fits = true;
                Ok(Outcome::Answered { row, line })
            }
            Err(problem) => {
                let error = format!("what came back is no data to train on: {problem}");
                self.unfit += 1;
                if !self.fits && self.unfit >= ROWS_UNFIT {
                    let hint =
                        "does the server go by another chat template, template arguments or model than --target?";
                    self.ended_by = Some(format!("of the first {} rows, {error}; {hint}", self.unfit));
                }
                Ok(Outcome::Failed { row, turn: dialogue.turns, error, asked: None })
            }
        }
    }

    /// Gives a row up, or the run, where no row is to blame.
    fn fail(
        &mut self,
        row: usize,
        dialogue: &Dialogue,
        (server, attempts): (usize, u32),
        failure: Failure,
    ) -> Option<Outcome> {
        let Failure { problem, cause } = failure;
        let server = self.counts[server].server.clone();
        match cause {
            Cause::Refused => {
                self.ended_by = Some(format!("{server}: {problem}"));
                return None;
            }
            Cause::Servers => {
                self.lost += 1;
                if self.lost >= ROWS_LOST {
                    self.ended_by = Some(format!(
                        "no server answers: {ROWS_LOST} rows one after the other were asked in vain, the last one {attempts} \
                         times, at the end {server}: {problem}"
                    ));
                    return None;
                }
            }
            Cause::Question | Cause::Answers => {}
        }
        let error = foreign::one_line(&problem);
        Some(Outcome::Failed { row, turn: dialogue.turns + 1, error, asked: Some(Asked { attempts, server }) })
    }
}

/// Reads a row as training will read it.
fn check(tokenizer: &ChatTokenizer, line: &str) -> Result<(), String> {
    let Sample::Conversation(conversation) = parse_sample(line.as_bytes(), String::new)? else {
        return Err("it is no conversation".to_owned());
    };
    recorded::check(tokenizer, &conversation).map_err(|error| error.to_string())
}

/// A turn's own seed, the same whatever stands before its row in the file: 31 bits, which every server takes.
fn seed(seed: u64, id: &str, turn: usize) -> u32 {
    let digest = Sha256::digest(format!("{seed}\n{turn}\n{id}").as_bytes());
    u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]) >> 1
}
