//! What a run would have to do, before it does anything.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::Serialize;

use super::answer_file::{beside, row_of};
use super::cut_file::CutFile;
use super::dialogue::Dialogue;
use super::prompts::{Prompt, Prompts, bad_line};
use super::{Chat, OnLength};
use crate::data::conversation::{Message, Sample, parse_sample};
use crate::data::tokenizer::ChatTokenizer;
use crate::error::{Error, Result};
use crate::files;

/// Rows whose prompts are tokenised; more are taken to be like these.
const ROWS_COUNTED: usize = 1000;
/// Bytes a token, where there is no tokenizer.
const BYTES_A_TOKEN: f64 = 4.0;

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Estimate {
    /// Usable rows of the prompts.
    pub rows: usize,
    /// Rows of which something became already.
    pub done: usize,
    /// Lines of the prompts that cannot be used.
    pub unusable: usize,
    /// Turns to answer.
    pub turns: usize,
    /// About how many tokens their prompts have together, without the answers that come to stand in them.
    pub prompt_tokens: u64,
    /// Whether a tokenizer counted those; else it is a quarter of the bytes.
    pub counted: bool,
    /// Tokens of the answers, if each is as long as it may be.
    pub most_new_tokens: u64,
    /// Tokens of an answer in the rows that are done, where they hold their ids.
    pub tokens_an_answer: Option<f64>,
    /// What some of the rows took, where they were tried.
    pub measured: Option<Measured>,
}

/// What some of the rows took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Measured {
    /// Rows tried.
    pub rows: usize,
    /// Answers in them.
    pub answers: usize,
    /// Tokens of an answer.
    pub tokens_an_answer: f64,
    /// Tokens generated a second, the time for prompts included.
    pub tokens_per_second: f64,
    /// Tokens that all answers will have, if the rest is like these.
    pub new_tokens: u64,
    /// Seconds that will take.
    pub seconds: f64,
}

/// Where prompts and answers are, and how long an answer may be.
#[derive(Debug, Clone, Copy)]
pub struct Look<'a> {
    /// File of conversations to answer.
    pub prompts: &'a Path,
    /// File of answered conversations, which need not be there.
    pub out: &'a Path,
    /// Largest share of unusable rows before the run is refused.
    pub max_bad_share: f64,
    /// What becomes of a row with an answer that was cut off.
    pub on_length: OnLength,
    /// Most tokens of one answer.
    pub max_new_tokens: usize,
}

/// Answers a file of prompts into another file, and says how many answers that were, their tokens, and tokens a second.
pub type Measure<'a> = &'a mut dyn FnMut(&Path, &Path) -> Result<(usize, u64, f64)>;

impl Look<'_> {
    /// What is to be done. Changes nothing. With `measure`, so many of the rows that are left are answered, in a folder
    /// that goes away.
    pub fn estimate(
        &self,
        tokenizer: Option<&ChatTokenizer>,
        measure: Option<(usize, Measure<'_>)>,
    ) -> Result<Estimate> {
        let prompts = Prompts::read(self.prompts, self.max_bad_share)?;
        let (mut estimate, open) = Estimate::of(&prompts, self, tokenizer)?;
        let Some((count, measure)) = measure.filter(|_| !open.is_empty()) else { return Ok(estimate) };
        let folder = tempfile::tempdir().map_err(Error::io("create a folder in", std::env::temp_dir()))?;
        let some = folder.path().join("prompts.jsonl");
        let rows = write_some(&prompts, &open, count, &some)?;
        let (answers, tokens, per_second) = measure(&some, &folder.path().join("answers.jsonl"))?;
        estimate.measured = Measured::of(rows, (answers, tokens), per_second, estimate.turns);
        Ok(estimate)
    }
}

impl Measured {
    /// What `turns` would take if they were like these.
    fn of(rows: usize, (answers, new_tokens): (usize, u64), tokens_per_second: f64, turns: usize) -> Option<Self> {
        let tokens_an_answer = new_tokens as f64 / answers as f64;
        let all = tokens_an_answer * turns as f64;
        let seconds = all / tokens_per_second;
        let new_tokens = all.round() as u64;
        seconds.is_finite().then_some(Self { rows, answers, tokens_an_answer, tokens_per_second, new_tokens, seconds })
    }
}

impl Estimate {
    /// Looks at prompts and at what earlier runs left in `out`. Changes nothing. The second value is the rows that are left.
    fn of(prompts: &Prompts, look: &Look<'_>, tokenizer: Option<&ChatTokenizer>) -> Result<(Self, Vec<usize>)> {
        let Look { out, on_length, max_new_tokens, .. } = *look;
        let mut done = vec![false; prompts.rows.len()];
        let (answers, tokens) = read_answers(out, prompts, on_length, &mut done)?;
        let (cut, ..) = CutFile::read(&beside(out, ".cut.jsonl"), prompts)?;
        cut.into_iter().for_each(|row| done[row] = true);
        let open: Vec<usize> = (0..done.len()).filter(|&row| !done[row]).collect();
        let turns = open.iter().map(|&row| turns(&prompts.rows[row])).sum();
        let step = open.len().div_ceil(ROWS_COUNTED).max(1);
        let counted: Vec<usize> = open.iter().copied().step_by(step).collect();
        let sizes: Vec<(f64, bool)> = counted.iter().map(|&row| prompt_tokens(&prompts.rows[row], tokenizer)).collect();
        let scale = open.len() as f64 / counted.len().max(1) as f64;
        let estimate = Self {
            rows: done.len(),
            done: done.len() - open.len(),
            unusable: prompts.bad_lines.len(),
            turns,
            prompt_tokens: (sizes.iter().map(|(size, _)| size).sum::<f64>() * scale).round() as u64,
            counted: sizes.iter().all(|(_, counted)| *counted),
            most_new_tokens: turns as u64 * max_new_tokens as u64,
            tokens_an_answer: (answers > 0).then(|| tokens as f64 / answers as f64),
            measured: None,
        };
        Ok((estimate, open))
    }
}

/// Writes some rows of the prompts, from all over them, to a file of their own. How many that were.
fn write_some(prompts: &Prompts, open: &[usize], count: usize, path: &Path) -> Result<usize> {
    let step = open.len().div_ceil(count.max(1)).max(1);
    let some: Vec<usize> = open.iter().copied().step_by(step).collect();
    let lines: Result<Vec<String>> =
        some.iter().map(|&row| prompts.rows[row].answered(&prompts.rows[row].messages)).collect();
    let text = lines?.join("\n") + "\n";
    files::write_file(path, |writer| writer.write_all(text.as_bytes()))?;
    Ok(some.len())
}

fn turns(prompt: &Prompt) -> usize {
    prompt.messages.iter().filter(|message| message.role == "user").count()
}

/// Tokens of a row's prompts, and whether they were counted.
fn prompt_tokens(prompt: &Prompt, tokenizer: Option<&ChatTokenizer>) -> (f64, bool) {
    let counted = tokenizer.and_then(|tokenizer| {
        let mut dialogue = Dialogue::new(prompt);
        let mut tokens = 0;
        while dialogue.ask() {
            let Prompt { tools, template_arguments, .. } = prompt;
            tokens += tokenizer.prompt(&dialogue.messages, tools.as_ref(), template_arguments).ok()?.len();
            // Some templates want the assistant to speak in between.
            dialogue.messages.push(Message::new("assistant", ""));
        }
        Some(tokens as f64)
    });
    match counted {
        Some(tokens) => (tokens, true),
        None => {
            let (mut so_far, mut all) = (0, 0);
            for message in &prompt.messages {
                so_far += message.content.as_ref().map_or(0, String::len);
                all += if message.role == "user" { so_far } else { 0 };
            }
            (all as f64 / BYTES_A_TOKEN, false)
        }
    }
}

/// Answers in a file, and tokens of those whose ids are known. Notes their rows.
fn read_answers(path: &Path, prompts: &Prompts, on_length: OnLength, done: &mut [bool]) -> Result<(usize, usize)> {
    if !path.is_file() {
        return Ok((0, 0));
    }
    let mut reader = BufReader::new(File::open(path).map_err(Error::io("open", path))?);
    let (mut bytes, mut number, mut answers, mut tokens) = (Vec::new(), 0, 0, 0);
    loop {
        bytes.clear();
        reader.read_until(b'\n', &mut bytes).map_err(Error::io("read", path))?;
        if bytes.last() != Some(&b'\n') {
            return Ok((answers, tokens));
        }
        number += 1;
        let row = row_of(&bytes, prompts, on_length).map_err(|problem| bad_line(path, number, problem))?;
        done[row] = true;
        if let Ok(Sample::Conversation(conversation)) = parse_sample(&bytes, String::new) {
            for ids in conversation.messages.iter().filter_map(|message| message.marks.token_ids.as_ref()) {
                answers += 1;
                tokens += ids.len();
            }
        }
    }
}
