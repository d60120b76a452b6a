//! How each engine is started with the draft, and with how many guesses: as many as acceptance by position and the measured
//! price of a guess make worth while.

use std::path::Path;

use serde::Serialize;
use serde_json::{Value, json};

use super::acceptance::Measured;
use super::case::Case;
use crate::error::{Error, Result};
use crate::eval::tune::{Batch, Choice, Tuned};
use crate::export::Engine;
use crate::strict;

/// Acceptance by position and prices, measured here or by `eval`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Prices {
    /// By position from 1: the share of verifications that accept so many guesses or more.
    pub per_position: Vec<f64>,
    /// Price of a guess in verifications.
    pub guess: f64,
    /// Where the figures come from.
    pub source: String,
}

impl Prices {
    /// Those of the decode just done.
    pub fn of(measured: &Measured) -> Self {
        let guess = measured.guess_seconds / measured.verify_seconds.max(f64::MIN_POSITIVE);
        Self { per_position: measured.per_position.clone(), guess, source: "the decode above".to_owned() }
    }

    /// Those of the report.json of an evaluation with a chain.
    pub fn of_report(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).map_err(Error::io("read", path))?;
        let report: Value = strict::from_json(&text).map_err(|problem| Error::bad_file(path, problem))?;
        let missing = |key: &str| {
            Error::bad_file(path, format!("`{key}` is missing or no number"))
                .with_hint("name the report.json that `specforge eval --out DIR --tree chain:N` wrote")
        };
        let number = |key: &str| report.pointer(key).and_then(Value::as_f64).ok_or_else(|| missing(key));
        let tree = report.pointer("/settings/tree").and_then(Value::as_str).unwrap_or_default();
        let depth =
            tree.strip_prefix("chain:").and_then(|depth| depth.parse::<f64>().ok()).filter(|depth| *depth >= 1.0);
        let Some(depth) = depth else {
            return Err(Error::bad_file(path, format!("is of the tree `{tree}`; engines guess in chains"))
                .with_hint("evaluate with --tree chain:N"));
        };
        let shares = report.get("per_depth").and_then(Value::as_array).ok_or_else(|| missing("per_depth"))?;
        let per_position = shares.iter().filter_map(Value::as_f64).collect();
        let (draft, verify) = (number("/drafted/draft_share")?, number("/drafted/verify_share")?);
        let rest = number("/drafted/overhead_share")?;
        let guess = draft / depth / (verify + rest).max(f64::MIN_POSITIVE);
        Ok(Self { per_position, guess, source: path.display().to_string() })
    }

    /// The number of guesses with the most tokens in a given time, and how many times those of plain decoding.
    pub fn best(&self) -> (usize, f64) {
        let mut best = (1, 0.0);
        let mut tokens = 1.0;
        for (guesses, share) in (1..).zip(&self.per_position) {
            tokens += share;
            let speed = tokens / (1.0 + self.guess * f64::from(guesses));
            if speed > best.1 {
                best = (guesses as usize, speed);
            }
        }
        best
    }
}

/// How one engine is started.
#[derive(Debug, Clone, Serialize)]
pub struct Launch {
    /// The engine.
    pub engine: &'static str,
    /// Command lines, to be given one after the other.
    pub commands: Vec<String>,
    /// What to know.
    pub note: Option<String>,
}

/// A command for each engine that takes drafts of this kind, for so many guesses.
pub fn lines(case: &Case<'_>, guesses: usize) -> Vec<Launch> {
    let (target, draft) =
        (quoted(&case.target.path.display().to_string()), quoted(&case.folder.path.display().to_string()));
    let path = case.folder.path.display().to_string();
    let vllm = |method: &str, note: Option<&str>| {
        let section = json!({"method": method, "model": path, "num_speculative_tokens": guesses}).to_string();
        let command = format!("vllm serve {target} --speculative-config {}", quoted(&section));
        Launch { engine: Engine::Vllm.name(), commands: vec![command], note: note.map(str::to_owned) }
    };
    let mut found = match (&case.eagle3, case.folder.format) {
        (Some(_), Some("speculators")) => {
            vec![vllm("eagle3", Some("give the method: without it vllm looks for it in the folder's name"))]
        }
        (Some(_), _) => vec![
            vllm("eagle3", None),
            Launch {
                engine: Engine::Sglang.name(),
                commands: vec![format!(
                    "python -m sglang.launch_server --model-path {target} --speculative-algorithm EAGLE3 \
                     --speculative-draft-model-path {draft} --speculative-num-steps {guesses} --speculative-eagle-topk 1 \
                     --speculative-num-draft-tokens {}",
                    guesses + 1
                )],
                note: None,
            },
        ],
        (None, Some("medusa" | "medusa-vllm")) => vec![vllm("medusa", Some("up to vllm 0.32"))],
        _ => Vec::new(),
    };
    if case.eagle3.is_some() {
        // This program writes a draft's file from its checkpoint; from a folder, llama.cpp's own converter does.
        let checkpoint = case.origin.as_ref().filter(|origin| origin.tensors.is_some());
        let written = match checkpoint.map(|origin| quoted(&origin.path.display().to_string())) {
            Some(checkpoint) => {
                format!("specforge export --checkpoint {checkpoint} --format gguf --out draft.gguf")
            }
            None => format!("python convert_hf_to_gguf.py {draft} --target-model-dir {target} --outfile draft.gguf"),
        };
        let is_file = case.target.path.is_file();
        let converted = (!is_file).then(|| format!("python convert_hf_to_gguf.py {target} --outfile target.gguf"));
        let model = if is_file { target } else { "target.gguf".to_owned() };
        let server = format!(
            "llama-server -m {model} -md draft.gguf --spec-type draft-eagle3 --spec-draft-n-max {guesses} \
             --spec-draft-p-min 0.0"
        );
        let commands = converted.into_iter().chain([written, server]).collect();
        found.push(Launch { engine: "llama.cpp", commands, note: None });
    }
    found.retain(|launch| case.engine.is_none_or(|engine| engine.name() == launch.engine));
    found
}

/// What one engine is told for a number of requests that run together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EngineFlags {
    /// The engine.
    pub engine: &'static str,
    /// Requests that run together.
    pub rows: usize,
    /// Flags, besides those that name the models; none where plain decoding is expected to be faster.
    pub flags: Option<String>,
    /// Expected times of plain decoding, by what rounds cost in this program.
    pub speedup: f64,
}

/// What engines call an algorithm: vLLM's method, SGLang's algorithm, llama.cpp's type.
struct Served {
    algorithm: &'static str,
    vllm: Option<&'static str>,
    sglang: Option<&'static str>,
    gguf: Option<&'static str>,
    /// Whether it drafts whole blocks: with fewer guesses than in training engines run a shorter block, which guesses
    /// something else.
    has_blocks: bool,
}

/// See docs/engines.md.
const SERVED: &[Served] = &[
    served("eagle3", Some("eagle3"), Some("EAGLE3"), Some("draft-eagle3"), false),
    served("peagle", Some("eagle3"), None, None, false),
    served("medusa", Some("medusa"), None, None, false),
    served("dflash", Some("dflash"), Some("DFLASH"), Some("draft-dflash"), true),
    served("dflash2", Some("dflash"), Some("DFLASH"), Some("draft-dflash"), true),
    served("dspark", Some("dspark"), Some("DSPARK"), Some("draft-dspark"), true),
    served("lilicorr", Some("dflash"), Some("DFLASH"), None, true),
    served("xpress", Some("dflash"), None, None, true),
    served("domino", None, Some("DFLASH"), None, true),
];

const fn served(
    algorithm: &'static str,
    vllm: Option<&'static str>,
    sglang: Option<&'static str>,
    gguf: Option<&'static str>,
    has_blocks: bool,
) -> Served {
    Served { algorithm, vllm, sglang, gguf, has_blocks }
}

/// The number of guesses and the tree for each engine that serves drafts of this kind, by what tuning predicts for a batch.
pub fn flags(tuned: &Tuned, batch: &Batch) -> Vec<EngineFlags> {
    let Some(served) = SERVED.iter().find(|served| served.algorithm == tuned.method) else { return Vec::new() };
    let whole = tuned.default_tree.strip_prefix("chain:").and_then(|length| length.parse::<usize>().ok());
    let chain = match served.has_blocks {
        true => batch.chains.iter().find(|chain| Some(chain.depth) == whole),
        false => batch.best_chain(),
    };
    let Some(chain) = chain else { return Vec::new() };
    let told = |engine, choice: &Choice, flags: String| EngineFlags {
        engine,
        rows: batch.rows,
        flags: (choice.speedup > 1.0).then_some(flags),
        speedup: choice.speedup,
    };
    let mut all = Vec::new();
    if let Some(method) = served.vllm {
        let section =
            format!(r#"{{"method": "{method}", "model": "DRAFT", "num_speculative_tokens": {}}}"#, chain.guesses);
        all.push(told(Engine::Vllm.name(), chain, format!("--speculative-config {}", quoted(&section))));
    }
    if let Some(algorithm) = served.sglang {
        // Blocks are drafted in chains there.
        let branched = batch.best_branched.as_ref().filter(|_| !served.has_blocks);
        let choice = branched.filter(|tree| tree.tokens_per_second > chain.tokens_per_second).unwrap_or(chain);
        let Choice { depth, top_k, guesses, .. } = choice;
        let shape = match served.has_blocks {
            true => String::new(),
            false => format!(" --speculative-num-steps {depth} --speculative-eagle-topk {top_k}"),
        };
        // The root is a draft token there; a block has it among its own.
        let tokens = guesses + 1;
        let flags = format!("--speculative-algorithm {algorithm}{shape} --speculative-num-draft-tokens {tokens}");
        all.push(told(Engine::Sglang.name(), choice, flags));
    }
    if let Some(kind) = served.gguf {
        let flags = format!("--spec-type {kind} --spec-draft-n-max {} --spec-draft-p-min 0.0", chain.guesses);
        all.push(told(Engine::LlamaCpp.name(), chain, flags));
    }
    all
}

/// The same for people.
pub fn flags_text(all: &[EngineFlags]) -> String {
    let mut lines = vec!["to start engines with, by what rounds cost here:".to_owned()];
    let mut sorted: Vec<&EngineFlags> = all.iter().collect();
    sorted.sort_by_key(|flags| flags.engine);
    for EngineFlags { engine, rows, flags, speedup } in sorted {
        let told = flags.as_deref().unwrap_or("no draft: plain decoding is expected to be faster");
        lines.push(format!("{engine:<9}  {rows:>3} together  {speedup:>5.2}x  {told}"));
    }
    lines.join("\n")
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "/._-=:,+".contains(letter);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prices(per_position: &[f64], guess: f64) -> Prices {
        Prices { per_position: per_position.to_vec(), guess, source: String::new() }
    }

    #[test]
    fn as_many_guesses_as_pay() {
        assert_eq!(prices(&[0.9, 0.8, 0.7], 0.0).best().0, 3);
        assert_eq!(prices(&[0.3, 0.1, 0.04], 0.1).best().0, 1);
        assert_eq!(prices(&[0.8, 0.6, 0.05], 0.1).best().0, 2);
        let (guesses, speed) = prices(&[0.5], 0.25).best();
        assert!(guesses == 1 && (speed - 1.2).abs() < 1e-12);
        assert_eq!(prices(&[], 0.1).best(), (1, 0.0));
    }

    #[test]
    fn words_reach_a_shell_whole() {
        assert_eq!(quoted("runs/a-1"), "runs/a-1");
        assert_eq!(quoted("it's {x}"), "'it'\\''s {x}'");
    }

    #[test]
    fn a_report_of_eval_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        let mut report = json!({
            "settings": {"tree": "chain:4"}, "per_depth": [0.5, 0.25],
            "drafted": {"draft_share": 0.2, "verify_share": 0.7, "overhead_share": 0.1},
        });
        std::fs::write(&path, report.to_string()).unwrap();
        let read = Prices::of_report(&path).unwrap();
        assert!(read.per_position == [0.5, 0.25] && (read.guess - 0.0625).abs() < 1e-12, "{read:?}");
        report["settings"]["tree"] = "dynamic:depth=3,top_k=2,nodes=6".into();
        std::fs::write(&path, report.to_string()).unwrap();
        assert!(Prices::of_report(&path).unwrap_err().to_string().contains("engines guess in chains"));
    }
}
