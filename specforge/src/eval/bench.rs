//! Speed of a target: prefill, greedy decode and the verification of draft trees, timed apart. Decoding is that of the
//! engine, without a draft.
//!
//! Prompts are made of numbers, so that another program can time the same work without a tokenizer
//! (`benchmarks/target_vs_transformers`): token `t` of row `b` is `(7919 b + 104729 t + 17) mod V`.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Instant;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::decode::drafter::Plain;
use crate::decode::event::Silent;
use crate::decode::{Engine, EngineOptions, Policy, Request, engine};
use crate::error::{Error, Result};
use crate::models::{ForwardInput, Loading, LogitRows, Spread, TargetModel, load_target_with};
use crate::nn::{AttentionMask, KvCache, Processors};
use crate::tree::TokenTree;

/// What to time.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// Folder of the model.
    pub target: PathBuf,
    /// Prefills to time.
    pub prefill: Vec<PrefillShape>,
    /// Greedy decodes to time.
    pub decode: Vec<DecodeShape>,
    /// Verifications to time.
    pub verify: Vec<VerifyShape>,
    /// Timed runs of each shape, after one that is not timed.
    pub repeat: u32,
    /// Threads of libtorch; all cores where it is not given.
    pub threads: Option<i32>,
    /// Element type of the model.
    pub kind: Kind,
    /// Where to run.
    pub device: Device,
    /// Devices of the layers, where there are several.
    pub layers: Spread,
}

/// `RxT`: rows and tokens of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PrefillShape {
    /// Rows of the batch.
    pub rows: i64,
    /// Tokens of each row.
    pub tokens: i64,
}

/// `RxTxN`: rows, tokens of each prompt, new tokens of each row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct DecodeShape {
    /// Rows of the batch.
    pub rows: i64,
    /// Tokens of each prompt.
    pub prompt: i64,
    /// New tokens of each row: one forward pass each.
    pub new: i64,
}

/// `RxCxN`: rows, tokens cached of each, nodes of each row's draft tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct VerifyShape {
    /// Rows of the batch.
    pub rows: i64,
    /// Tokens that each row's cache holds.
    pub context: i64,
    /// Nodes of each tree, the root included.
    pub nodes: i64,
}

impl FromStr for VerifyShape {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let [rows, context, nodes] = parse_sizes(text, "ROWSxCONTEXTxNODES, such as 1x256x16")?;
        Ok(Self { rows, context, nodes })
    }
}

impl FromStr for PrefillShape {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let [rows, tokens] = parse_sizes(text, "ROWSxTOKENS, such as 8x128")?;
        Ok(Self { rows, tokens })
    }
}

impl FromStr for DecodeShape {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let [rows, prompt, new] = parse_sizes(text, "ROWSxPROMPTxNEW, such as 8x64x32")?;
        Ok(Self { rows, prompt, new })
    }
}

pub(super) fn parse_sizes<const COUNT: usize>(text: &str, expected: &str) -> Result<[i64; COUNT], String> {
    // Up to 32 bits, so that products stay within 64.
    let size = |part: &str| part.parse::<i32>().ok().filter(|&size| size > 0).map(i64::from);
    let sizes: Option<Vec<i64>> = text.split('x').map(size).collect();
    sizes.and_then(|sizes| sizes.try_into().ok()).ok_or_else(|| format!("expected {expected}, got `{text}`"))
}

/// What was measured.
#[derive(Debug, Serialize)]
pub struct BenchReport {
    /// Folder of the model.
    pub target: PathBuf,
    /// Threads of libtorch.
    pub threads: i32,
    /// Seconds to load the model. Mapped weights are read when they are first used, not here.
    pub load_seconds: f64,
    /// Most memory the process has held, mapped pages included, where the system tells it.
    pub peak_memory_bytes: Option<u64>,
    /// One entry for each prefill shape.
    pub prefill: Vec<Timing<PrefillShape>>,
    /// One entry for each decode shape.
    pub decode: Vec<Timing<DecodeShape>>,
    /// One entry for each verify shape.
    pub verify: Vec<VerifyTiming>,
}

/// What verifying a tree costs beside a plain step, timed in turns.
#[derive(Debug, Serialize)]
pub struct VerifyTiming {
    /// The shape.
    #[serde(flatten)]
    pub shape: VerifyShape,
    /// Seconds of every pass over the trees.
    pub seconds: Vec<f64>,
    /// Seconds of every pass over one token a row, on the same caches.
    pub one_token_seconds: Vec<f64>,
    /// Median of one over median of the other.
    pub ratio: f64,
}

/// Timed runs of one shape.
#[derive(Debug, Serialize)]
pub struct Timing<Shape> {
    /// The shape.
    #[serde(flatten)]
    pub shape: Shape,
    /// Seconds of every run; of decoding without its prefill.
    pub seconds: Vec<f64>,
    /// Tokens per second of the median run, all rows together.
    pub tokens_per_second: f64,
    /// The tokens chosen in the last run, row by row: after a prefill one, after decoding the new ones.
    pub chosen: Vec<Vec<i64>>,
}

/// Loads the target and times every shape.
pub fn run(options: &BenchOptions) -> Result<BenchReport> {
    if options.prefill.is_empty() && options.decode.is_empty() && options.verify.is_empty() {
        return Err(Error::Usage("nothing to time: give --prefill RxT, --decode RxTxN or --verify RxCxN".to_owned()));
    }
    if let Some(threads) = options.threads {
        tch::set_num_threads(threads);
    }
    let start = Instant::now();
    let BenchOptions { kind, device, layers, .. } = options;
    let loading = Loading { kind: *kind, device: *device, layers: Some(layers), copies: None };
    let target = load_target_with(&options.target, &loading)?;
    let load_seconds = start.elapsed().as_secs_f64();
    let target = target.as_ref();
    check_context(options, target.info().max_position_embeddings)?;
    let prefill = options.prefill.iter().map(|&shape| {
        let run = || Ok(prefill(target, shape)?.timed(shape.rows));
        measure(shape, shape.rows * shape.tokens, options.repeat, run)
    });
    let prefill = prefill.collect::<Result<_>>()?;
    let decode = options.decode.iter().map(|&shape| {
        // The context's end leaves no room for a token behind the last one.
        let new = shape.new.min(target.info().max_position_embeddings - shape.prompt - 1);
        measure(shape, shape.rows * new, options.repeat, || decode(target, shape))
    });
    let decode = decode.collect::<Result<_>>()?;
    let verify = options.verify.iter().map(|&shape| verify(target, shape, options.repeat)).collect::<Result<_>>()?;
    let threads = tch::get_num_threads();
    let peak_memory_bytes = peak_memory_bytes();
    Ok(BenchReport {
        target: options.target.clone(),
        threads,
        load_seconds,
        peak_memory_bytes,
        prefill,
        decode,
        verify,
    })
}

/// Refuses rows that are longer than what the target was made for.
fn check_context(options: &BenchOptions, context: i64) -> Result<()> {
    let prefills = options.prefill.iter().map(|shape| ("prefill", shape.tokens));
    // A single token behind the prompt's own needs room for both.
    let decodes = options.decode.iter().map(|shape| ("decode", shape.prompt + shape.new.max(2)));
    let verified = options.verify.iter().map(|shape| ("verify", shape.context + shape.nodes));
    match prefills.chain(decodes).chain(verified).find(|(_, tokens)| *tokens > context) {
        Some((flag, tokens)) => {
            let problem =
                format!("--{flag}: expected rows of at most {context} tokens, the target's context, got {tokens}");
            Err(Error::Usage(problem))
        }
        None => Ok(()),
    }
}

/// `VmHWM` of this process.
pub(super) fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// One untimed run, then `repeat` timed ones. `run` returns its seconds and its tokens, row by row.
fn measure<Shape>(
    shape: Shape,
    tokens: i64,
    repeat: u32,
    run: impl Fn() -> Result<(f64, Vec<Vec<i64>>)>,
) -> Result<Timing<Shape>> {
    let (_, mut chosen) = run()?;
    let mut seconds = Vec::with_capacity(repeat as usize);
    for _ in 0..repeat {
        let (elapsed, tokens) = run()?;
        seconds.push(elapsed);
        chosen = tokens;
    }
    let tokens_per_second = tokens as f64 / median(&seconds);
    Ok(Timing { shape, seconds, tokens_per_second, chosen })
}

pub(super) fn median(seconds: &[f64]) -> f64 {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Times trees and single tokens in turns, `repeat` times ten each after one that is not timed. Trees are complete binary
/// ones: what a pass costs depends on the number of nodes alone.
pub(super) fn verify(target: &dyn TargetModel, shape: VerifyShape, repeat: u32) -> Result<VerifyTiming> {
    const PASSES: u32 = 10;
    let VerifyShape { rows, context, nodes } = shape;
    let Prefilled { mut cache, .. } = prefill(target, PrefillShape { rows, tokens: context })?;
    let mut tree = TokenTree::root(17);
    for node in 1..nodes as u32 {
        tree.push((node as usize - 1) / 2, node);
    }
    let mut pass = |tree: &TokenTree| {
        let start = Instant::now();
        let trees = vec![tree; rows as usize];
        let count = tree.len() as i64;
        let row: Vec<i64> = tree.tokens().iter().map(|&id| i64::from(id)).collect();
        let depths: Vec<i64> = tree.topology().depths().iter().map(|&depth| context + depth as i64).collect();
        let every_row =
            |values: &[i64]| Tensor::from_slice(values).to_device(target.device()).expand([rows, count], false);
        let mask = match count {
            1 => AttentionMask::Causal,
            _ => engine::tree_mask(&trees, tree.len(), cache.lengths(), target.device()),
        };
        let (ids, positions) = (every_row(&row), every_row(&depths)); // [B, T]
        let input =
            ForwardInput { ids: &ids, positions: &positions, mask: &mask, capture: &[], logits: LogitRows::All };
        let output = target.forward(&input, Some(&mut cache))?;
        let logits = output.logits.ok_or_else(|| Error::Failed("the target gave no logits".to_owned()))?;
        let _ = logits.argmax(-1, false).to_device(Device::Cpu); // waits for the device
        Ok::<f64, Error>(start.elapsed().as_secs_f64())
    };
    let root = TokenTree::root(17);
    pass(&root)?;
    pass(&tree)?;
    let (mut seconds, mut one_token_seconds) = (Vec::new(), Vec::new());
    for _ in 0..repeat * PASSES {
        one_token_seconds.push(pass(&root)?);
        seconds.push(pass(&tree)?);
    }
    let ratio = median(&seconds) / median(&one_token_seconds);
    Ok(VerifyTiming { shape, seconds, one_token_seconds, ratio })
}

/// A batch after its prefill.
struct Prefilled {
    seconds: f64,
    cache: KvCache,
    /// `[B]` on the target's device
    next: Tensor,
}

impl Prefilled {
    fn timed(self, rows: i64) -> (f64, Vec<Vec<i64>>) {
        (self.seconds, split_rows(&self.next.view([rows, 1])))
    }
}

/// Token `t` of row `b` is `(ROW b + TOKEN t + FIRST) mod V`.
const ROW: i64 = 7919;
const TOKEN: i64 = 104_729;
const FIRST: i64 = 17;

fn prefill(target: &dyn TargetModel, shape: PrefillShape) -> Result<Prefilled> {
    let PrefillShape { rows, tokens } = shape;
    let options = (Kind::Int64, target.device());
    let (row, token) = (Tensor::arange(rows, options).unsqueeze(1), Tensor::arange(tokens, options));
    let ids: Tensor = (row * ROW + token * TOKEN + FIRST).remainder(target.info().vocab_size); // [B, T]
    let start = Instant::now();
    let positions = Tensor::arange(tokens, options).expand([rows, tokens], false);
    let last = Tensor::arange(rows, options) * tokens + (tokens - 1); // [B]
    let mut cache = target.new_cache(rows, tokens);
    let next = next_tokens(target, &ids, &positions, &last, &mut cache)?;
    let _ = next.to_device(Device::Cpu); // waits for the device
    Ok(Prefilled { seconds: start.elapsed().as_secs_f64(), cache, next })
}

/// One pass of `ids [B, T]`; the most likely token after the rows of `last`, `[B]`.
fn next_tokens(
    target: &dyn TargetModel,
    ids: &Tensor,
    positions: &Tensor,
    last: &Tensor,
    cache: &mut KvCache,
) -> Result<Tensor> {
    let (rows, tokens) = ids.size2()?;
    let logits = LogitRows::Rows(last);
    let input = ForwardInput { ids, positions, mask: &AttentionMask::Causal, capture: &[], logits };
    let output = target.forward(&input, Some(cache))?;
    cache.advance(&vec![tokens; rows as usize]);
    let logits = output.logits.ok_or_else(|| Error::Failed("the target gave no logits".to_owned()))?;
    Ok(logits.argmax(-1, false))
}

/// Greedy decoding of all rows together; the first token of each comes from its prompt and is not timed.
fn decode(target: &dyn TargetModel, shape: DecodeShape) -> Result<(f64, Vec<Vec<i64>>)> {
    let DecodeShape { rows, prompt, new } = shape;
    let (processors, policy) = (Processors::default(), Policy::Keyed { seed: 0 });
    let options = EngineOptions { processors, policy, stop_tokens: Vec::new(), max_rows: rows as usize };
    let mut engine = Engine::new(target, Box::new(Plain), options)?;
    let vocabulary = target.info().vocab_size;
    for row in 0..rows {
        let token = |place: i64| (row * ROW + place * TOKEN + FIRST).rem_euclid(vocabulary) as u32;
        let (prompt, max_new_tokens) = ((0..prompt).map(token).collect(), new as usize + 1);
        engine.submit(Request { tag: row as u64, prompt, max_new_tokens, key: 0 })?;
    }
    let mut chosen = Vec::with_capacity(rows as usize);
    for left in engine.run(&mut Silent)? {
        chosen.push(left.decoded?.tokens.iter().skip(1).map(|&token| i64::from(token)).collect());
    }
    Ok((engine.clock().decode().as_secs_f64(), chosen))
}

fn split_rows(tokens: &Tensor) -> Vec<Vec<i64>> {
    (0..tokens.size()[0]).map(|row| tokens.get(row).iter::<i64>().into_iter().flatten().collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_read_and_wrong_ones_named() {
        assert_eq!("8x128".parse(), Ok(PrefillShape { rows: 8, tokens: 128 }));
        assert_eq!("1x64x32".parse(), Ok(DecodeShape { rows: 1, prompt: 64, new: 32 }));
        for wrong in ["", "8", "8x", "0x4", "-1x4", "8x4x2", "8 x 4", "axb", "1x9999999999"] {
            let problem = wrong.parse::<PrefillShape>().unwrap_err();
            assert!(problem.contains("expected ROWSxTOKENS") && problem.contains(&format!("`{wrong}`")), "{problem}");
        }
        assert!("8x4".parse::<DecodeShape>().is_err());
    }

    #[test]
    fn the_system_tells_the_peak_memory() {
        assert!(peak_memory_bytes().unwrap() > 1 << 20);
    }
}
