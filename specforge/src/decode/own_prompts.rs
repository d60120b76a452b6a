//! Prompts that a target writes itself, for training data where there are no questions at hand.
//!
//! Xu et al. 2024, Magpie, <https://arxiv.org/abs/2406.08464>: a chat model that is given its template up to where a user
//! begins to speak goes on as a user would. What it says to the end of that turn is a prompt, of the kinds that the model was
//! tuned on; [`super::regenerate`] has it answered.
//!
//! Every try is sampled with noise of its own, keyed by the seed and its number, and what is kept stands in the order of the
//! tries. So a longer list of prompts begins with a shorter one of the same seed, whatever the batch (up to near ties, which
//! rounding decides).

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;
use serde_json::json;

use super::drafter::Plain;
use super::event::Silent;
use super::{Engine, EngineOptions, Finish, Policy, Request};
use crate::data::ChatTokenizer;
use crate::data::conversation::Message;
use crate::error::{Error, Result};
use crate::files::StagedFile;
use crate::models::TargetModel;
use crate::nn::Processors;

/// Tries for every prompt that is wanted; a target that needs more does not write prompts.
const MOST_TRIES: usize = 8;

/// Stands for what the user says when a template is looked at.
const WORDS: &str = "SPECFORGE-USER-WORDS";

/// How many prompts, and how they are sampled.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnPromptOptions {
    /// Prompts to write.
    pub count: usize,
    /// Most tokens of one. What is longer is thrown away.
    pub max_new_tokens: usize,
    /// Tries that run together.
    pub max_rows: usize,
    /// How tokens are chosen; not greedily.
    pub processors: Processors,
    /// Key of the sampling noise.
    pub seed: u64,
}

/// How a template lets a user speak.
#[derive(Debug, Clone, PartialEq)]
pub struct UserTurn {
    /// Token ids of everything before the user's words.
    pub opening: Vec<u32>,
    /// The text behind them, up to where the assistant begins to speak.
    pub closing: String,
}

impl UserTurn {
    /// The first turn of a conversation that may have a system message.
    pub fn of(tokenizer: &ChatTokenizer, system: Option<&str>) -> Result<Self> {
        let messages: Vec<Message> =
            system.map(|text| Message::new("system", text)).into_iter().chain([Message::new("user", WORDS)]).collect();
        let text = tokenizer.render(&messages, None, true)?;
        let Some((before, behind)) = text.split_once(WORDS) else {
            return Err(Error::bad_file(tokenizer.folder(), "its chat template does not show what a user says"));
        };
        Ok(Self { opening: tokenizer.encode(before)?, closing: behind.trim().to_owned() })
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct OwnPrompts {
    /// Each with the number of its try.
    #[serde(skip)]
    pub prompts: Vec<(usize, String)>,
    /// Tries, those behind the last prompt left out.
    pub tried: usize,
    /// Tries that reached the token limit.
    pub unfinished: usize,
    /// Tries without words, or with special tokens among them.
    pub unusable: usize,
    /// Tries that said what one before them had.
    pub repeated: usize,
    /// Tokens sampled.
    pub new_tokens: u64,
    /// Tokens sampled a second.
    pub tokens_per_second: f64,
    /// Whether it was asked to stop before all were there.
    pub interrupted: bool,
}

impl OwnPrompts {
    /// What is wrong where a target did not write as many as were wanted, though nobody stopped it.
    pub fn shortfall(&self, options: &OwnPromptOptions) -> Option<Error> {
        let Self { prompts, tried, unfinished, unusable, repeated, .. } = self;
        let problem = format!(
            "expected {} prompts, got {} in {tried} tries: {unfinished} were longer than {} tokens, {unusable} had no words or \
             special tokens among them, {repeated} repeated others",
            options.count,
            prompts.len(),
            options.max_new_tokens
        );
        let hint = "allow longer prompts, or a higher temperature; a base model does not write prompts";
        (!self.interrupted && prompts.len() < options.count).then(|| Error::Failed(problem).with_hint(hint))
    }

    /// Writes a row for each, as [`super::regenerate`] reads them.
    pub fn write(&self, mut file: StagedFile, system: Option<&str>, seed: u64) -> Result<()> {
        for (index, text) in &self.prompts {
            let user = json!({"role": "user", "content": text});
            let messages: Vec<_> =
                system.map(|text| json!({"role": "system", "content": text})).into_iter().chain([user]).collect();
            let row = json!({"id": format!("own-{seed}-{index:06}"), "messages": messages});
            file.write(format!("{row}\n").as_bytes())?;
        }
        file.commit()
    }
}

/// Begins the file before anything is sampled, so that a folder that cannot be written costs nothing. One that is there is
/// not touched.
pub fn begin(out: &Path) -> Result<StagedFile> {
    match out.exists() {
        true => Err(Error::bad_file(out, "is there already").with_hint("choose another --out, or move it away")),
        false => StagedFile::new(out),
    }
}

/// What a try said, and whether it can be asked.
enum Try {
    Prompt(String),
    Unfinished,
    Unusable,
}

/// Samples prompts. `text` gives the words of tokens, or nothing where a special token is among them. `progress` hears how many
/// there are, and tokens a second.
pub fn write_prompts(
    options: &OwnPromptOptions,
    target: &dyn TargetModel,
    turn: &UserTurn,
    stop_tokens: &[u32],
    text: &dyn Fn(&[u32]) -> Result<Option<String>>,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(usize, f64),
) -> Result<OwnPrompts> {
    let engine_options = EngineOptions {
        processors: options.processors,
        policy: Policy::Keyed { seed: options.seed },
        stop_tokens: stop_tokens.to_vec(),
        max_rows: options.max_rows,
    };
    let mut engine = Engine::new(target, Box::new(Plain), engine_options)?;
    let (mut found, mut said) = (OwnPrompts::default(), HashSet::new());
    // Tries that ended before one with a lower number did.
    let mut waiting: BTreeMap<usize, Try> = BTreeMap::new();
    let (mut begun, most) = (0, options.count.saturating_mul(MOST_TRIES));
    while found.prompts.len() < options.count {
        if stop.load(Ordering::Relaxed) {
            found.interrupted = true;
            break;
        }
        while engine.pending() < options.max_rows && begun < most {
            let (prompt, max_new_tokens) = (turn.opening.clone(), options.max_new_tokens);
            engine.submit(Request { tag: begun as u64, prompt, max_new_tokens, key: begun as u64 })?;
            begun += 1;
        }
        if engine.pending() == 0 {
            break;
        }
        for left in engine.step(&mut Silent)? {
            let decoded = left.decoded?;
            let words = text(decoded.text_tokens())?;
            let cut = words.as_deref().and_then(|words| cut_at(words, &turn.closing));
            let outcome = match (cut.or(words.as_deref()), decoded.finish) {
                (_, Finish::Length) if cut.is_none() => Try::Unfinished,
                (Some(words), _) => usable(words),
                (None, _) => Try::Unusable,
            };
            waiting.insert(left.tag as usize, outcome);
        }
        while let Some(outcome) = waiting.remove(&found.tried) {
            found.tried += 1;
            match outcome {
                Try::Unfinished => found.unfinished += 1,
                Try::Unusable => found.unusable += 1,
                Try::Prompt(words) if !said.insert(words.to_lowercase()) => found.repeated += 1,
                Try::Prompt(words) => found.prompts.push((found.tried - 1, words)),
            }
            if found.prompts.len() == options.count {
                break;
            }
        }
        progress(found.prompts.len(), engine.throughput().tokens_per_second());
    }
    let throughput = engine.throughput();
    found.new_tokens = throughput.new_tokens;
    found.tokens_per_second = throughput.tokens_per_second();
    Ok(found)
}

/// The words before the end of a turn that is no token of its own.
fn cut_at<'a>(words: &'a str, closing: &str) -> Option<&'a str> {
    (!closing.is_empty()).then(|| words.split_once(closing)).flatten().map(|(before, _)| before)
}

fn usable(words: &str) -> Try {
    match words.trim() {
        "" => Try::Unusable,
        words => Try::Prompt(words.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::tiny;

    fn options(count: usize, max_rows: usize) -> OwnPromptOptions {
        OwnPromptOptions { count, max_new_tokens: 8, max_rows, processors: Processors::at_temperature(1.0), seed: 5 }
    }

    /// Letters, of which 63 and 7 end a turn and 60 is special.
    fn text(tokens: &[u32]) -> Result<Option<String>> {
        let letters = tokens.iter().map(|&token| char::from(b'A' + token as u8));
        Ok((!tokens.contains(&60)).then(|| letters.collect()))
    }

    fn written(options: &OwnPromptOptions) -> Result<OwnPrompts> {
        let turn = UserTurn { opening: vec![1, 2, 3], closing: "QQ".to_owned() };
        let (target, stop) = (tiny::target(2), AtomicBool::new(false));
        write_prompts(options, &target, &turn, &[63, 7, 9, 20, 33], &text, &stop, &mut |_, _| {})
    }

    #[test]
    fn a_longer_list_begins_with_a_shorter_one_whatever_the_batch() {
        let long = written(&options(12, 5)).unwrap();
        assert_eq!(long.prompts.len(), 12);
        assert_eq!(long.tried, 12 + long.unfinished + long.unusable + long.repeated);
        assert!(long.unfinished > 0, "{long:?}");
        let numbers: Vec<usize> = long.prompts.iter().map(|(number, _)| *number).collect();
        assert!(numbers.is_sorted() && numbers.last() == Some(&(long.tried - 1)), "{numbers:?}");
        for rows in [1, 3] {
            assert_eq!(written(&options(7, rows)).unwrap().prompts, long.prompts[..7]);
        }
        let words: HashSet<&String> = long.prompts.iter().map(|(_, words)| words).collect();
        assert_eq!(words.len(), 12, "no prompt stands there twice");
        assert_ne!(written(&OwnPromptOptions { seed: 6, ..options(7, 3) }).unwrap().prompts, long.prompts[..7]);
    }

    #[test]
    fn what_cannot_be_a_prompt_is_none() {
        assert_eq!(cut_at("Why? USER: more", "USER:"), Some("Why? "));
        assert_eq!((cut_at("Why?", "USER:"), cut_at("Why?", "")), (None, None));
        assert!(matches!(usable(" \n"), Try::Unusable));
        // Nothing ends within a token.
        let hard = OwnPromptOptions { max_new_tokens: 1, ..options(40, 8) };
        let few = written(&hard).unwrap();
        let error = few.shortfall(&hard).unwrap().to_string();
        assert!(few.tried == 320 && error.contains("expected 40 prompts, got"), "{error}");
        assert!(written(&options(3, 2)).unwrap().shortfall(&options(3, 2)).is_none());
    }
}
