//! `specforge generate`

use std::borrow::Cow;
use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::decoding::{DecodingArgs, Models};
use super::diffusion::{self, DiffusionArgs};
use super::edge::{EdgeArgs, EdgeSession};
use super::{Output, hub, note};
use crate::data::{ChatTokenizer, Message, TextStream};
use crate::decode::engine::{Clock, Decoded};
use crate::decode::event::{Committed, Listener, Round, Source, Started};
use crate::decode::{Engine, Finish, Request};
use crate::error::{Error, Result, foreign};
use crate::models;
use crate::stop::{Answer as Answered, Stop};
use crate::trace::Recorder;

#[derive(Debug, Clone, Args)]
pub(super) struct GenerateArgs {
    #[command(flatten)]
    decoding: DecodingArgs,
    /// What the user says, rendered by the model's chat template.
    #[arg(long, value_name = "TEXT", required_unless_present = "chat", conflicts_with = "chat")]
    prompt: Option<String>,
    /// Take the prompt as it is, without the chat template.
    #[arg(long, requires = "prompt")]
    raw: bool,
    /// Talk: a line of standard input is one turn, until it ends.
    #[arg(long)]
    chat: bool,
    /// Record every committed position in a file for `specforge compare`.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    #[command(flatten)]
    diffusion: DiffusionArgs,
    #[command(flatten)]
    edge: EdgeArgs,
}

/// What one answer was, in numbers.
#[derive(Debug, Serialize)]
struct Summary {
    tokens: usize,
    rounds: usize,
    /// Tokens a verification.
    acceptance_length: f64,
    tokens_per_second: f64,
    prefill_seconds: f64,
    decode_seconds: f64,
    draft_share: f64,
    verify_share: f64,
    overhead_share: f64,
    lossless: bool,
    settings: Value,
}

#[derive(Debug, Serialize)]
struct Answer {
    token_ids: Vec<u32>,
    text: String,
    finish: Finish,
    summary: Summary,
}

pub(super) fn run(args: &GenerateArgs, stop: &Stop, output: &Output) -> Result<()> {
    let args = &mut args.clone();
    hub::fetch(args.decoding.places(), None)?;
    let args = &*args;
    if args.edge.cloud.is_some() {
        return on_the_edge(args, stop, output);
    }
    if models::read_info(&args.decoding.target)?.diffusion.is_some() {
        return fill_in(args, output);
    }
    args.diffusion.refuse()?;
    let models = args.decoding.models()?;
    let opened = args.decoding.draft(&models)?;
    opened.notes.iter().for_each(|line| note(format!("warning: {line}")));
    let settings = args.decoding.settings(&models, &opened, 1)?;
    let lossless = args.decoding.policy()?.is_lossless();
    let mut recorder = match &args.trace {
        Some(path) => Some(Recorder::create(path, args.decoding.header(&models, &opened, 1)?)?),
        None => None,
    };
    let mut engine = Engine::new(models.target.as_ref(), opened.drafter, args.decoding.engine(&models, 1)?)?;
    if let Some(budget) = args.decoding.budget()? {
        engine = engine.with_budget(budget)?;
    }
    let mut session = Session { models: &models, args, output, settings, lossless, turn: 0 };
    let mut answer = |ids| session.answer(&mut engine, ids, recorder.as_mut());
    answer_all(args, &models.tokenizer, &mut answer)?;
    match recorder {
        Some(recorder) => recorder.finish(),
        None => Ok(()),
    }
}

/// Answers with a target of masked diffusion.
fn fill_in(args: &GenerateArgs, output: &Output) -> Result<()> {
    let models = args.decoding.diffusion_models()?;
    let mut session = diffusion::Session::open(&models, &args.diffusion, &args.decoding, args.trace.as_deref())?;
    let mut turn = 0;
    answer_all(args, &models.tokenizer, &mut |ids| {
        turn += 1;
        session.answer(ids, turn - 1, output)
    })?;
    session.finish()
}

/// The same with the target on another machine.
fn on_the_edge(args: &GenerateArgs, stop: &Stop, output: &Output) -> Result<()> {
    if args.trace.is_some() {
        return Err(Error::Usage(
            "--trace: the target's rows stay in the cloud; record a decode beside the target".to_owned(),
        ));
    }
    let models = args.decoding.models_elsewhere()?;
    stop.set_answer(Answered::Finish("stopping: the cloud is told"));
    let mut session = EdgeSession::new(&models, &args.decoding, &args.edge, (output, stop))?;
    answer_all(args, &models.tokenizer, &mut |ids| session.answer(ids))
}

fn render(tokenizer: &ChatTokenizer, messages: &[Message]) -> Result<Vec<u32>> {
    tokenizer.encode(&tokenizer.render(messages, None, true)?)
}

/// Answers the prompt, or turns until standard input ends.
fn answer_all(
    args: &GenerateArgs,
    tokenizer: &ChatTokenizer,
    answer: &mut dyn FnMut(Vec<u32>) -> Result<String>,
) -> Result<()> {
    if let Some(prompt) = &args.prompt {
        let ids = match args.raw {
            true => tokenizer.encode(prompt)?,
            false => render(tokenizer, &[Message::new("user", prompt)])?,
        };
        return answer(ids).map(|_| ());
    }
    let mut messages: Vec<Message> = Vec::new();
    let stdin = std::io::stdin();
    loop {
        if stdin.is_terminal() {
            let _ = write!(std::io::stderr(), "> ").and_then(|()| std::io::stderr().flush());
        }
        let mut line = String::new();
        if stdin.lock().read_line(&mut line).map_err(Error::io("read", "standard input"))? == 0 {
            return Ok(());
        }
        if line.trim().is_empty() {
            continue;
        }
        messages.push(Message::new("user", line.trim()));
        let text = answer(render(tokenizer, &messages)?)?;
        messages.push(Message::new("assistant", text));
    }
}

struct Session<'a> {
    models: &'a Models,
    args: &'a GenerateArgs,
    output: &'a Output,
    settings: Value,
    lossless: bool,
    turn: u64,
}

impl Session<'_> {
    /// Answers one prompt and returns the text.
    fn answer(&mut self, engine: &mut Engine<'_>, prompt: Vec<u32>, recorder: Option<&mut Recorder>) -> Result<String> {
        let before = engine.clock();
        engine.submit(Request {
            tag: self.turn,
            prompt,
            max_new_tokens: self.args.decoding.max_new_tokens,
            key: self.turn,
        })?;
        self.turn += 1;
        let terminal = std::io::stdout().is_terminal();
        let coloured = terminal && std::env::var_os("NO_COLOR").is_none();
        let stream = TextStream::new(&self.models.tokenizer);
        let mut printer =
            Printer { stream, text: String::new(), shown: !self.output.json, terminal, coloured, recorder };
        let mut decoded = None;
        while engine.pending() > 0 {
            for left in engine.step(&mut printer)? {
                decoded = Some(left.decoded?);
            }
        }
        let decoded = decoded.ok_or_else(|| Error::Failed("the engine gave no answer".to_owned()))?;
        let rest = printer.stream.finish()?;
        printer.print(&rest, Source::Bonus)?;
        let text = std::mem::take(&mut printer.text);
        drop(printer);
        let summary = self.summary(&decoded, &before, &engine.clock());
        if !self.output.json {
            self.output.write("\n");
            note(line(&summary));
        }
        let answer = Answer { token_ids: decoded.tokens, text, finish: decoded.finish, summary };
        if self.output.json {
            self.output.result(&answer, String::new);
        }
        Ok(answer.text)
    }

    fn summary(&self, decoded: &Decoded, before: &Clock, after: &Clock) -> Summary {
        let rounds = decoded.rounds.len();
        let (draft, verify) = (after.draft - before.draft, after.verify - before.verify);
        let overhead = after.overhead - before.overhead;
        let decode_seconds = (draft + verify + overhead).as_secs_f64();
        let over = |value: f64, by: f64| if by > 0.0 { value / by } else { 0.0 };
        let behind_first = (decoded.tokens.len() - 1) as f64;
        Summary {
            tokens: decoded.tokens.len(),
            rounds,
            acceptance_length: over(behind_first, rounds as f64),
            tokens_per_second: over(behind_first, decode_seconds),
            prefill_seconds: (after.prefill - before.prefill).as_secs_f64(),
            decode_seconds,
            draft_share: over(draft.as_secs_f64(), decode_seconds),
            verify_share: over(verify.as_secs_f64(), decode_seconds),
            overhead_share: over(overhead.as_secs_f64(), decode_seconds),
            lossless: self.lossless,
            settings: self.settings.clone(),
        }
    }
}

fn line(summary: &Summary) -> String {
    let percent = |share: f64| format!("{:.0} %", 100.0 * share);
    format!(
        "{} tokens in {} verifications: tau {:.2}, {:.1} tokens/s (draft {}, verify {}, the rest {}), prompt {:.2} s, {}",
        summary.tokens,
        summary.rounds,
        summary.acceptance_length,
        summary.tokens_per_second,
        percent(summary.draft_share),
        percent(summary.verify_share),
        percent(summary.overhead_share),
        summary.prefill_seconds,
        if summary.lossless { "lossless" } else { "LOSSY" },
    )
}

/// Prints text as it is committed, and hands everything on to the recorder.
struct Printer<'a> {
    stream: TextStream<'a>,
    text: String,
    shown: bool,
    /// A terminal is not told what it would obey; everything else gets the text as it is.
    terminal: bool,
    coloured: bool,
    recorder: Option<&'a mut Recorder>,
}

impl Printer<'_> {
    fn print(&mut self, text: &str, source: Source) -> Result<()> {
        self.text.push_str(text);
        if !self.shown || text.is_empty() {
            return Ok(());
        }
        let text = if self.terminal { foreign::block(text) } else { Cow::Borrowed(text) };
        let mut stdout = std::io::stdout();
        let written = match self.coloured && source == Source::Accepted {
            true => write!(stdout, "\x1b[32m{text}\x1b[0m"),
            false => write!(stdout, "{text}"),
        };
        match written.and_then(|()| stdout.flush()) {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                Err(Error::io("write", "standard output")(error))
            }
            _ => Ok(()),
        }
    }
}

impl Listener for Printer<'_> {
    fn wants_rows(&self) -> bool {
        self.recorder.is_some()
    }

    fn started(&mut self, event: &Started<'_>) -> Result<()> {
        self.recorder.as_mut().map_or(Ok(()), |recorder| recorder.started(event))
    }

    fn ended(&mut self, tag: u64, finish: Option<Finish>) -> Result<()> {
        self.recorder.as_mut().map_or(Ok(()), |recorder| recorder.ended(tag, finish))
    }

    fn round(&mut self, event: &Round<'_>) -> Result<()> {
        self.recorder.as_mut().map_or(Ok(()), |recorder| recorder.round(event))
    }

    fn committed(&mut self, event: &Committed<'_>) -> Result<()> {
        if let Some(recorder) = self.recorder.as_mut() {
            recorder.committed(event)?;
        }
        let text = self.stream.push(event.token)?;
        self.print(&text, event.source)
    }
}
