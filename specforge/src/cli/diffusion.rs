//! `specforge generate` for targets of masked diffusion: their options, and how an answer is told.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Instant;

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::decoding::{DecodingArgs, Models};
use super::{Output, note, numbers};
use crate::data::{Finish, TextStream};
use crate::decode::diffusion::{
    Cache, Decoder, Keyed, Network, Options, Parallel, Prompt, Remasking, Rule, Step, TokenSkip, Watcher, Work,
};
use crate::error::{Error, Result, foreign};
use crate::eval::infilling::Mode;
use crate::trace::diffusion::DiffusionRecorder;

/// Options of masked diffusion alone.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Masked diffusion models")]
pub(super) struct DiffusionArgs {
    /// Tokens of a block: blocks are filled in one behind the other. 32, or the whole answer where that is shorter.
    #[arg(long, value_name = "TOKENS", allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    block_length: Option<usize>,
    /// Passes for the whole answer: each makes its share of a block's tokens known. Without any rule, one token a pass.
    #[arg(long, allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    #[arg(conflicts_with_all = ["quota", "threshold", "factor"])]
    steps: Option<usize>,
    /// The same, as tokens a pass.
    #[arg(long, value_name = "TOKENS", allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    #[arg(conflicts_with_all = ["threshold", "factor"])]
    quota: Option<usize>,
    /// Instead, every token that is at least so probable becomes known, and the likeliest in any case.
    #[arg(long, value_name = "PROBABILITY", allow_hyphen_values = true, value_parser = numbers::any)]
    #[arg(conflicts_with = "factor")]
    threshold: Option<f64>,
    /// Instead, the longest run of the surest tokens whose n-th is at least 1 - FACTOR / (n + 1) probable.
    #[arg(long, allow_hyphen_values = true, value_parser = numbers::any)]
    factor: Option<f64>,
    /// What passes over a block take from its first pass: none, prefix (what stands before the block), dual (all around
    /// it). The latter two are approximate.
    #[arg(long, value_name = "CACHE")]
    cache: Option<Cache>,
    /// With the dual cache, leave later layers out for tokens whose states have hardly moved:
    /// layer=K[,threshold=T][,outlier=O][,refresh=N]. Approximate.
    #[arg(long, value_name = "RULE")]
    token_skip: Option<TokenSkip>,
    /// Strength of classifier-free guidance; 0 is none.
    #[arg(long, value_name = "SCALE", allow_hyphen_values = true, value_parser = numbers::any)]
    cfg: Option<f64>,
    /// Which tokens become known first: low-confidence (the surest; the rest stays masked) or random.
    #[arg(long, value_name = "ORDER", value_parser = ["low-confidence", "random"])]
    remasking: Option<String>,
    /// Without a cache, verify several guessed states in one pass: exactly the same tokens in fewer passes.
    /// states=N[,guess=cache|order].
    #[arg(long, value_name = "STATES")]
    exact_parallel: Option<Parallel>,
}

/// Blocks where nobody says otherwise: those of LLaDA's own examples.
const BLOCK: usize = 32;

impl DiffusionArgs {
    /// Flags that were given.
    fn given(&self) -> Vec<&'static str> {
        let flags = [
            ("--block-length", self.block_length.is_some()),
            ("--steps", self.steps.is_some()),
            ("--quota", self.quota.is_some()),
            ("--threshold", self.threshold.is_some()),
            ("--factor", self.factor.is_some()),
            ("--cache", self.cache.is_some()),
            ("--token-skip", self.token_skip.is_some()),
            ("--cfg", self.cfg.is_some()),
            ("--remasking", self.remasking.is_some()),
            ("--exact-parallel", self.exact_parallel.is_some()),
        ];
        flags.into_iter().filter(|(_, given)| *given).map(|(flag, _)| flag).collect()
    }

    /// Refuses what a causal target has not.
    pub(super) fn refuse(&self) -> Result<()> {
        match self.given().first() {
            None => Ok(()),
            Some(flag) => Err(Error::Usage(format!(
                "{flag}: the target is a causal model, which has --draft, --tree, --policy, --temperature, --top-k, --top-p \
                 and --repetition-penalty; this option is one of masked diffusion models"
            ))),
        }
    }

    /// The ways that an evaluation compares: without a cache first, unless `baseline` leaves that out, then those that were asked
    /// for, or else all that these options have.
    pub(super) fn modes(&self, decoding: &DecodingArgs, stop_tokens: &[u32], baseline: bool) -> Result<Vec<Mode>> {
        let asked = self.options(decoding, stop_tokens)?;
        let plain = Options { cache: Cache::None, skip: None, parallel: None, ..asked.clone() };
        let mode = |name: &str, options: Options| Mode { name: name.to_owned(), options };
        let mut modes = Vec::new();
        if baseline || self.cache == Some(Cache::None) {
            modes.push(mode("no cache", plain.clone()));
        }
        if asked.parallel.is_some() {
            modes.push(mode("no cache, exact parallel", Options { parallel: asked.parallel, ..plain.clone() }));
        }
        for cache in [Cache::Prefix, Cache::Dual] {
            if self.cache.is_none_or(|asked| asked == cache) {
                modes.push(mode(&format!("{} cache", cache.name()), Options { cache, ..plain.clone() }));
            }
        }
        if asked.skip.is_some() {
            modes.push(mode("dual cache, token skip", Options { cache: Cache::Dual, skip: asked.skip, ..plain }));
        }
        match modes.is_empty() {
            false => Ok(modes),
            true => Err(Error::Usage("--no-baseline: nothing else was asked for".to_owned())),
        }
    }

    /// How answers of so many tokens are decoded.
    fn options(&self, decoding: &DecodingArgs, stop_tokens: &[u32]) -> Result<Options> {
        let length = decoding.max_new_tokens;
        let block = self.block_length.unwrap_or(BLOCK.min(length));
        if !length.is_multiple_of(block) {
            return Err(Error::Usage(format!(
                "--block-length: expected a divisor of the answer's {length} tokens (--max-new-tokens), got {block}"
            )));
        }
        let blocks = length / block;
        let rule = match (self.steps, self.quota, self.threshold, self.factor) {
            (Some(steps), ..) if steps % blocks != 0 => {
                return Err(Error::Usage(format!("--steps: expected a multiple of the {blocks} blocks, got {steps}")));
            }
            (Some(steps), ..) => Rule::Quota { steps: steps / blocks },
            (_, Some(quota), ..) => Rule::Quota { steps: block.div_ceil(quota) },
            (_, _, Some(threshold), _) => Rule::Threshold(threshold),
            (_, _, _, Some(factor)) => Rule::Factor(factor),
            (None, None, None, None) => Rule::Quota { steps: block },
        };
        Ok(Options {
            length,
            block,
            rule,
            remasking: match self.remasking.as_deref() {
                Some("random") => Remasking::Random,
                _ => Remasking::Confidence,
            },
            temperature: decoding.processors()?.temperature,
            guidance: self.cfg.unwrap_or(0.0),
            cache: self.cache.unwrap_or_default(),
            skip: self.token_skip,
            parallel: self.exact_parallel,
            stop_tokens: stop_tokens.to_vec(),
        })
    }
}

/// What one answer was, in numbers.
#[derive(Debug, Serialize)]
struct Summary {
    tokens: usize,
    #[serde(flatten)]
    work: Work,
    /// Tokens of the answer for each pass.
    tokens_per_evaluation: f64,
    tokens_per_second: f64,
    seconds: f64,
    lossless: bool,
    settings: Value,
}

#[derive(Debug, Serialize)]
struct Told {
    token_ids: Vec<u32>,
    text: String,
    finish: Finish,
    summary: Summary,
}

/// A target of masked diffusion that answers.
pub(super) struct Session<'a> {
    models: &'a Models,
    decoder: Decoder<'a>,
    draws: Keyed,
    settings: Value,
    mask: i64,
    recorder: Option<DiffusionRecorder>,
}

impl<'a> Session<'a> {
    /// Refuses what makes no sense for the target. Passes are recorded in `trace`.
    pub(super) fn open(
        models: &'a Models,
        args: &DiffusionArgs,
        decoding: &DecodingArgs,
        trace: Option<&Path>,
    ) -> Result<Self> {
        let network = Network::of(models.target.as_ref())?;
        let options = args.options(decoding, models.tokenizer.eos_token_ids())?;
        let mut settings = decoding.place(models);
        if let (Some(settings), Value::Object(own)) = (settings.as_object_mut(), options.settings()) {
            settings.extend(own);
        }
        let mask = network.diffusion().mask;
        let draws = Keyed { seed: decoding.seed().unwrap_or(0) };
        let decoder = Decoder::new(network, options)?;
        let recorder = match trace {
            Some(path) => {
                let header = decoding.diffusion_header(models, (&network, decoder.options()), draws.seed)?;
                Some(DiffusionRecorder::create(path, header)?)
            }
            None => None,
        };
        Ok(Self { models, decoder, draws, settings, mask, recorder })
    }

    /// Gives the trace its name.
    pub(super) fn finish(self) -> Result<()> {
        self.recorder.map_or(Ok(()), DiffusionRecorder::finish)
    }

    /// Answers one prompt and returns the text.
    pub(super) fn answer(&mut self, prompt: Vec<u32>, turn: u64, output: &Output) -> Result<String> {
        let begun = Instant::now();
        let options = self.decoder.options();
        let mut printer = Printer {
            stream: TextStream::new(&self.models.tokenizer),
            text: String::new(),
            shown: !output.json,
            mask: self.mask,
            block: options.block,
            stop_tokens: options.stop_tokens.clone(),
            has_ended: false,
            recorder: self.recorder.as_mut(),
        };
        let prompts = [Prompt { tokens: prompt, key: turn }];
        if let Some(recorder) = printer.recorder.as_deref_mut() {
            recorder.texts(&prompts)?;
        }
        let answers = self.decoder.decode(&prompts, &mut self.draws, &mut printer)?;
        let answer =
            answers.into_iter().next().ok_or_else(|| Error::Failed("the decoder gave no answer".to_owned()))?;
        let rest = printer.stream.finish()?;
        printer.print(&rest)?;
        let text = printer.text;
        let seconds = begun.elapsed().as_secs_f64();
        let tokens = answer.tokens.len();
        let summary = Summary {
            tokens,
            tokens_per_evaluation: tokens as f64 / answer.work.evaluations.max(1) as f64,
            work: answer.work,
            tokens_per_second: tokens as f64 / seconds,
            seconds,
            lossless: self.decoder.options().is_lossless(),
            settings: self.settings.clone(),
        };
        if !output.json {
            output.write("\n");
            note(line(&summary));
        }
        let told = Told { token_ids: answer.tokens, text, finish: answer.finish, summary };
        if output.json {
            output.result(&told, String::new);
        }
        Ok(told.text)
    }
}

fn line(summary: &Summary) -> String {
    let Work { evaluations, whole_passes, steps, rows_computed, rows_skipped } = &summary.work;
    let (computed, skipped): (u64, u64) = (rows_computed.iter().sum(), rows_skipped.iter().sum());
    let skipped = match skipped {
        0 => String::new(),
        _ => format!(", {:.0} % of rows skipped", 100.0 * skipped as f64 / (computed + skipped) as f64),
    };
    format!(
        "{} tokens in {evaluations} evaluations ({whole_passes} of whole texts, {steps} steps): {:.2} tokens each, {:.1} \
         tokens/s{skipped}, {}",
        summary.tokens,
        summary.tokens_per_evaluation,
        summary.tokens_per_second,
        if summary.lossless { "lossless" } else { "APPROXIMATE" },
    )
}

/// Prints the text of each block once it is known, up to the first stop token, and hands everything on to the recorder.
struct Printer<'a> {
    stream: TextStream<'a>,
    text: String,
    shown: bool,
    mask: i64,
    block: usize,
    stop_tokens: Vec<u32>,
    has_ended: bool,
    recorder: Option<&'a mut DiffusionRecorder>,
}

impl Printer<'_> {
    fn print(&mut self, text: &str) -> Result<()> {
        self.text.push_str(text);
        if !self.shown || text.is_empty() {
            return Ok(());
        }
        let mut stdout = std::io::stdout();
        // A terminal is not told what it would obey; everything else gets the text as it is.
        let written = match stdout.is_terminal() {
            true => write!(stdout, "{}", foreign::block(text)),
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

impl Watcher for Printer<'_> {
    fn wants_rows(&self) -> bool {
        self.recorder.is_some()
    }

    fn step(&mut self, step: &Step, ids: &[i64]) -> Result<()> {
        if let Some(recorder) = self.recorder.as_deref_mut() {
            recorder.step(step, ids)?;
        }
        let Some(block) = ids.get(step.start..step.start + self.block) else { return Ok(()) };
        if block.contains(&self.mask) {
            return Ok(());
        }
        for token in block.iter().filter_map(|&token| u32::try_from(token).ok()) {
            if self.has_ended {
                return Ok(());
            }
            let text = self.stream.push(token)?;
            self.print(&text)?;
            self.has_ended = self.stop_tokens.contains(&token);
        }
        Ok(())
    }
}
