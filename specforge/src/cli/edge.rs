//! `generate` with the target on another machine.

use std::borrow::Cow;
use std::io::IsTerminal;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use super::decoding::{DecodingArgs, Models};
use super::{Output, note};
use crate::cloud::features::Encoding;
use crate::cloud::grpc::{GrpcLink, Place};
use crate::cloud::protocol::Choice;
use crate::cloud::transport::{Waits, drive};
use crate::cloud::{Ahead, Edge, EdgeRequest, Pace};
use crate::data::{Finish, TextStream};
use crate::decode::Drafter;
use crate::decode::drafter::Opened;
use crate::decode::engine::RoundOutcome;
use crate::error::{Error, Result, foreign};
use crate::stop::Stop;

/// Attempts in a row without a token before the cloud counts as gone.
const PATIENCE: u32 = 8;

#[derive(Debug, Clone, Args)]
pub(super) struct EdgeArgs {
    /// Verify in the cloud: https://HOST:PORT, or http://HOST:PORT on this machine. Of --target only the tokenizer is read
    /// here, and for a trained draft its embedding and head.
    #[arg(long, value_name = "URL")]
    pub(super) cloud: Option<String>,
    /// PEM file of the authority that the cloud's certificate is of.
    #[arg(long, value_name = "FILE", requires = "cloud")]
    cloud_ca: Option<PathBuf>,
    /// PEM file of this machine's own certificate, where the cloud asks for one.
    #[arg(long, value_name = "FILE", requires_all = ["cloud", "cloud_key"])]
    cloud_cert: Option<PathBuf>,
    /// PEM file of its key.
    #[arg(long, value_name = "FILE", requires_all = ["cloud", "cloud_cert"])]
    cloud_key: Option<PathBuf>,
    /// How hidden states travel that the draft reads: float32, bfloat16, or int8 with a scale for every token.
    #[arg(long, value_name = "TYPE", default_value = "bfloat16", requires = "cloud", value_parser = encoding)]
    cloud_features: Encoding,
    /// Do not guess on while a verdict travels.
    #[arg(long, requires = "cloud")]
    no_guessing_ahead: bool,
    /// Send every guess of the draft, in place of as many as pay by the times measured on the way.
    #[arg(long, requires = "cloud")]
    all_guesses: bool,
}

fn encoding(text: &str) -> Result<Encoding, String> {
    match text {
        "float32" => Ok(Encoding::Float32),
        "bfloat16" => Ok(Encoding::Bfloat16),
        "int8" => Ok(Encoding::Int8),
        _ => Err("expected float32, bfloat16 or int8".to_owned()),
    }
}

/// What one answer was, in numbers.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    pub(super) tokens: usize,
    pub(super) rounds: usize,
    /// Guesses a verification.
    pub(super) guesses: f64,
    /// Tokens a verification.
    acceptance_length: f64,
    tokens_per_second: f64,
    pub(super) seconds: f64,
    /// Trees guessed ahead that were sent, and those that were not.
    pub(super) sent_ahead: u64,
    dropped_ahead: u64,
    sessions_opened: u64,
    sessions_resumed: u64,
    lossless: bool,
    settings: Value,
}

#[derive(Debug, Serialize)]
pub(super) struct Answer {
    pub(super) token_ids: Vec<u32>,
    pub(super) text: String,
    finish: Finish,
    /// Places of tokens that a lossy policy kept though the target chose others.
    unverified: Vec<usize>,
    pub(super) summary: Summary,
}

/// Answers prompts with a draft that is here and a target that is not.
pub(super) struct EdgeSession<'a> {
    models: &'a Models,
    decoding: &'a DecodingArgs,
    args: &'a EdgeArgs,
    output: &'a Output,
    stop: &'a Stop,
    settings: Value,
    link: GrpcLink,
    /// Between two answers.
    drafter: Option<Box<dyn Drafter + 'a>>,
    pace: Option<Pace>,
    turn: u64,
}

impl<'a> EdgeSession<'a> {
    /// Opens the draft; nothing is connected yet.
    pub(super) fn new(
        models: &'a Models,
        decoding: &'a DecodingArgs,
        args: &'a EdgeArgs,
        (output, stop): (&'a Output, &'a Stop),
    ) -> Result<Self> {
        let opened = decoding.draft(models)?;
        opened.notes.iter().for_each(|line| note(format!("warning: {line}")));
        Self::of(models, decoding, args, (output, stop), opened)
    }

    /// The same without a draft: the target says one token a message.
    pub(super) fn without_guesses(
        models: &'a Models,
        decoding: &'a DecodingArgs,
        args: &'a EdgeArgs,
        (output, stop): (&'a Output, &'a Stop),
    ) -> Result<Self> {
        let opened = decoding.no_draft(models)?;
        Self::of(models, decoding, args, (output, stop), opened)
    }

    fn of(
        models: &'a Models,
        decoding: &'a DecodingArgs,
        args: &'a EdgeArgs,
        (output, stop): (&'a Output, &'a Stop),
        opened: Opened<'a>,
    ) -> Result<Self> {
        let address = args.cloud.clone().unwrap_or_default();
        let identity = args.cloud_cert.clone().zip(args.cloud_key.clone());
        let link = GrpcLink::new(&Place { address: address.clone(), authority: args.cloud_ca.clone(), identity })?;
        let mut settings = decoding.settings(models, &opened, 1)?;
        settings["cloud"] = json!(address);
        settings["features"] = json!(args.cloud_features);
        settings["guessing_ahead"] = json!(!args.no_guessing_ahead);
        settings["all_guesses"] = json!(args.all_guesses);
        let (drafter, pace) = (Some(opened.drafter), (!args.all_guesses).then(Pace::default));
        Ok(Self { models, decoding, args, output, stop, settings, link, drafter, pace, turn: 0 })
    }

    /// Answers one prompt, shows the answer as it comes, and returns the text.
    pub(super) fn answer(&mut self, prompt: Vec<u32>) -> Result<String> {
        let output = self.output;
        // A terminal is not told what it would obey; everything else gets the text as it is.
        let terminal = std::io::stdout().is_terminal();
        let answer = self.ask(prompt, &mut |fresh: &str| {
            if !output.json && !fresh.is_empty() {
                output.write(&if terminal { foreign::block(fresh) } else { Cow::Borrowed(fresh) });
            }
        })?;
        if output.json {
            output.result(&answer, String::new);
        } else {
            output.write("\n");
            note(line(&answer.summary));
        }
        Ok(answer.text)
    }

    /// What decides its answers, for reports.
    pub(super) fn settings(&self) -> &Value {
        &self.settings
    }

    /// Answers one prompt; `heard` is told of the text as it comes.
    pub(super) fn ask(&mut self, prompt: Vec<u32>, heard: &mut dyn FnMut(&str)) -> Result<Answer> {
        let target = &self.models.target;
        let request = EdgeRequest {
            prompt,
            max_new_tokens: self.decoding.max_new_tokens,
            choice: Choice { processors: self.decoding.processors()?, policy: self.decoding.policy()?, key: self.turn },
            tokenizer_hash: self.models.tokenizer.vocabulary_hash(),
            vocab_size: u32::try_from(target.info().vocab_size).unwrap_or(u32::MAX),
            encoding: self.args.cloud_features,
            options: (target.kind(), target.device()),
            ahead: !self.args.no_guessing_ahead,
            pace: self.pace.clone(),
            patience: PATIENCE,
            edge: edge_name(),
        };
        self.turn += 1;
        let drafter = self.drafter.take().ok_or_else(|| Error::Failed("the draft is in use".to_owned()))?;
        let mut edge = Edge::new(request, drafter);
        let mut stream = TextStream::new(&self.models.tokenizer);
        let (mut text, start) = (String::new(), std::time::Instant::now());
        let mut show = |fresh: &str| {
            text.push_str(fresh);
            heard(fresh);
        };
        drive(&mut edge, &mut self.link, &Waits::default(), &|| self.stop.asked() != 0, &mut |tokens| {
            for &token in tokens {
                show(&stream.push(token)?);
            }
            Ok(())
        })?;
        show(&stream.finish()?);
        let seconds = start.elapsed().as_secs_f64();
        let Some(finish) = edge.finish() else {
            return Err(Error::Failed("stopped before the answer had ended".to_owned()));
        };
        let summary = self.summary(&edge, seconds);
        let (token_ids, unverified) = (edge.answer().to_vec(), edge.unverified().to_vec());
        self.pace = edge.pace().cloned();
        self.drafter = Some(edge.into_drafter());
        Ok(Answer { token_ids, text, finish, unverified, summary })
    }

    fn summary(&self, edge: &Edge<'_>, seconds: f64) -> Summary {
        let (rounds, Ahead { promoted, dropped }) = (edge.rounds(), edge.ahead());
        let verified: usize = rounds.iter().map(|round: &RoundOutcome| round.tokens).sum();
        let over = |value: f64, by: f64| if by > 0.0 { value / by } else { 0.0 };
        let (sessions_opened, sessions_resumed) = edge.sessions();
        Summary {
            tokens: edge.answer().len(),
            rounds: rounds.len(),
            guesses: over(rounds.iter().map(|round| round.guesses).sum::<usize>() as f64, rounds.len() as f64),
            acceptance_length: over(verified as f64, rounds.len() as f64),
            tokens_per_second: over(edge.answer().len() as f64, seconds),
            seconds,
            sent_ahead: promoted,
            dropped_ahead: dropped,
            sessions_opened,
            sessions_resumed,
            lossless: edge.is_lossless(),
            settings: self.settings.clone(),
        }
    }
}

/// Names this process to the cloud, as long as it runs.
fn edge_name() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id())
}

fn line(summary: &Summary) -> String {
    format!(
        "{} tokens in {} verifications: tau {:.2}, {:.1} tokens/s with prompt and network, {} of {} trees sent were guessed \
         ahead, {}",
        summary.tokens,
        summary.rounds,
        summary.acceptance_length,
        summary.tokens_per_second,
        summary.sent_ahead,
        summary.rounds,
        if summary.lossless { "lossless" } else { "LOSSY" },
    )
}
