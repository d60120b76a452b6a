//! Acceptance measured by decoding: a draft's real acceptance length and speed, and proof that nothing is lost.
//!
//! Every question is answered twice by the same engine, without a draft and with it, in turns of a few questions, so that
//! a machine that becomes slower does so for both. Where the policy is lossless the two must agree token for token;
//! where they do not, a third forward pass without a cache says whether the two tokens were as good as equal.
//!
//! Several processes share the groups of questions. What is asked together is the same however many there are, so that
//! answers and counts are too; each group's times are those of the process that answered it, on both sides.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::data::{ChatTokenizer, Message};
use crate::decode::drafter::Plain;
use crate::decode::engine::{Clock, Decoded, Engine, EngineOptions};
use crate::decode::event::{Listener, Silent};
use crate::decode::{Drafter, Finish, Policy, Request, Tolerance, VerifyBudget};
use crate::dist::SharedWork;
use crate::error::{Error, Result};
use crate::models::{ForwardInput, LogitRows, TargetModel};
use crate::nn::{AttentionMask, noise};

pub mod beside;
pub mod html;
pub mod in_training;
pub mod questions;
pub mod report;

pub use questions::Question;
pub use report::AcceptanceReport;

/// How an evaluation runs.
#[derive(Debug, Clone)]
pub struct AcceptanceOptions {
    /// How both sides decode.
    pub engine: EngineOptions,
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
    /// Whether to answer without the draft too.
    pub baseline: bool,
    /// What the side with the draft verifies, where that is not every guess.
    pub budget: Option<VerifyBudget>,
}

/// Whom an evaluation asks.
pub struct Contestants<'a> {
    /// The target.
    pub target: &'a dyn TargetModel,
    /// Its tokenizer.
    pub tokenizer: &'a ChatTokenizer,
    /// The draft.
    pub drafter: Box<dyn Drafter + 'a>,
}

/// One answered turn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answered {
    /// Question, by its place.
    pub question: usize,
    /// Turn of the question.
    pub turn: usize,
    /// Tokens of the prompt.
    pub prompt: Vec<u32>,
    /// What came of it.
    pub decoded: Decoded,
}

/// One side's answers to a group of questions, and what they cost.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Side {
    /// In the order of questions and turns.
    pub answers: Vec<Answered>,
    /// Time.
    pub clock: Clock,
}

/// What was measured on a group of questions of one data set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// The data set.
    pub dataset: String,
    /// With the draft.
    pub drafted: Side,
    /// Without it, where that was asked for.
    pub plain: Option<Side>,
}

/// Two answers that part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Divergence {
    /// Id of the question.
    pub question: String,
    /// Turn, from 1.
    pub turn: usize,
    /// Absolute position of the first token that differs.
    pub position: usize,
    /// Tokens there, without and with the draft; none where that answer had ended.
    pub tokens: [Option<u32>; 2],
    /// How far a fresh forward pass puts the two apart, in logits over temperature (noise included); none where one is
    /// missing.
    pub margin: Option<f64>,
    /// Whether that is within the rounding of the element type.
    pub near_tie: bool,
}

/// What all processes measured.
#[derive(Debug)]
pub struct Measured {
    /// In the order of the questions.
    pub groups: Vec<Group>,
    /// The same.
    pub divergences: Vec<Divergence>,
    /// Processes that took part.
    pub processes: usize,
    /// Wall time from the first question to the last answer, the slowest process's included.
    pub seconds: f64,
}

impl Measured {
    /// Time that the side with the draft took.
    pub fn clock(&self) -> Clock {
        self.groups.iter().map(|group| group.drafted.clock).fold(Clock::default(), |sum, one| Clock {
            prefill: sum.prefill + one.prefill,
            draft: sum.draft + one.draft,
            verify: sum.verify + one.verify,
            overhead: sum.overhead + one.overhead,
        })
    }
}

/// Answers all questions, together with the other processes of `work`; the first of them is given the result. `progress`
/// hears how many questions are done by all; `listener` hears of the drafted side of this process.
pub fn measure(
    contestants: Contestants<'_>,
    questions: &[Question],
    options: &AcceptanceOptions,
    work: &SharedWork<'_>,
    listener: &mut dyn Listener,
    progress: &dyn Fn(usize),
) -> Result<Option<Measured>> {
    let Contestants { target, tokenizer, drafter } = contestants;
    let mut drafted = Engine::new(target, drafter, options.engine.clone())?;
    if let Some(budget) = &options.budget {
        drafted = drafted.with_budget(budget.clone())?;
    }
    let mut plain = Engine::new(target, Box::new(Plain), options.engine.clone())?;
    warm_up(&mut plain, tokenizer, questions, options)?;
    warm_up(&mut drafted, tokenizer, questions, options)?;
    let asked_together = groups(questions, options.engine.max_rows);
    let began = Instant::now();
    let mut pieces: BTreeMap<usize, Piece> = BTreeMap::new();
    let mut take = |text: Vec<u8>| {
        let foreign = |problem: String| Error::Failed(format!("what another process measured: {problem}"));
        let piece: Piece = serde_json::from_slice(&text).map_err(|error| foreign(error.to_string()))?;
        let number = piece.number;
        if pieces.insert(number, piece).is_some() || number >= asked_together.len() {
            return Err(foreign(format!("group {number} of {}", asked_together.len())));
        }
        progress(pieces.keys().map(|&number| asked_together[number].len()).sum());
        Ok(())
    };
    loop {
        work.received()?.into_iter().try_for_each(&mut take)?;
        let number = work.claim()?;
        let Some(range) = asked_together.get(number) else { break };
        let asked: Vec<usize> = range.clone().collect();
        let without = match options.baseline {
            true => Some(answer(&mut plain, tokenizer, questions, &asked, options, &mut Silent)?),
            false => None,
        };
        let with = answer(&mut drafted, tokenizer, questions, &asked, options, listener)?;
        let mut divergences = Vec::new();
        if let Some(without) = without.as_ref().filter(|_| exact(&options.engine)) {
            for (left, right) in without.answers.iter().zip(&with.answers) {
                divergences.extend(compare(target, &questions[left.question].id, &options.engine, left, right)?);
            }
        }
        let group = Group { dataset: questions[range.start].dataset.clone(), drafted: with, plain: without };
        let text = serde_json::to_vec(&Piece { number, group, divergences });
        work.hand_in(text.map_err(|error| Error::Failed(format!("writing what was measured: {error}")))?)?;
    }
    work.finish(&mut take)?;
    if !work.is_first() {
        return Ok(None);
    }
    let (processes, seconds) = (work.world_size(), began.elapsed().as_secs_f64());
    let (mut groups, mut divergences) = (Vec::new(), Vec::new());
    for piece in pieces.into_values() {
        groups.push(piece.group);
        divergences.extend(piece.divergences);
    }
    Ok(Some(Measured { groups, divergences, processes, seconds }))
}

/// What one group of questions gave.
#[derive(Serialize, Deserialize)]
struct Piece {
    number: usize,
    group: Group,
    divergences: Vec<Divergence>,
}

/// Questions that are asked together: of one data set, and as many as run together.
fn groups(questions: &[Question], max_rows: usize) -> Vec<Range<usize>> {
    let mut groups = Vec::new();
    let mut first = 0;
    while first < questions.len() {
        let dataset = &questions[first].dataset;
        let same = questions[first..].iter().take(max_rows.max(1));
        let end = first + same.take_while(|question| question.dataset == *dataset).count();
        groups.push(first..end);
        first = end;
    }
    groups
}

/// Whether both sides must give the same tokens: every policy is greedy at temperature 0 but the lossy one.
pub fn exact(options: &EngineOptions) -> bool {
    match options.policy {
        Policy::Keyed { .. } => true,
        Policy::Maximal { .. } => options.processors.is_greedy(),
        Policy::Typical { .. } | Policy::Rank { .. } | Policy::Entropy { .. } => false,
    }
}

/// A few tokens, so that neither side pays for first times.
fn warm_up(
    engine: &mut Engine<'_>,
    tokenizer: &ChatTokenizer,
    questions: &[Question],
    options: &AcceptanceOptions,
) -> Result<()> {
    let few = AcceptanceOptions { max_new_tokens: options.max_new_tokens.min(8), ..options.clone() };
    let Some(question) = questions.first() else { return Ok(()) };
    let once = Question { turns: question.turns[..1].to_vec(), ..question.clone() };
    answer(engine, tokenizer, &[once], &[0], &few, &mut Silent).map(|_| ())
}

/// Key of the noise of an answer: it depends on its question alone, not on who else runs.
pub(super) fn key(question: usize, turn: usize) -> u64 {
    noise::keyed_bits(0, 1 << 8, question as u64, turn as u64)
}

/// A conversation of a question so far, as a prompt.
pub(super) fn encode(tokenizer: &ChatTokenizer, question: &Question, messages: &[Message]) -> Result<Vec<u32>> {
    let prepared = tokenizer.prepare(messages, question.tools.as_ref())?;
    tokenizer.encode(&prepared.with_arguments(&question.template_arguments)?.render(messages.len(), true)?)
}

/// Answers some questions, turn by turn.
fn answer(
    engine: &mut Engine<'_>,
    tokenizer: &ChatTokenizer,
    questions: &[Question],
    asked: &[usize],
    options: &AcceptanceOptions,
    listener: &mut dyn Listener,
) -> Result<Side> {
    /// Turns of a question, at most.
    const TURNS: u64 = 1 << 16;
    let before = engine.clock();
    let mut conversations: HashMap<usize, Vec<Message>> = HashMap::new();
    let mut prompts: HashMap<u64, Vec<u32>> = HashMap::new();
    let mut submit = |engine: &mut Engine<'_>, question: usize, turn: usize, messages: &mut Vec<Message>| {
        messages.push(Message::new("user", questions[question].turns[turn].as_str()));
        let prompt = encode(tokenizer, &questions[question], messages)?;
        let tag = question as u64 * TURNS + turn as u64;
        prompts.insert(tag, prompt.clone());
        let key = key(question, turn);
        let name = &questions[question].id;
        engine
            .submit(Request { tag, prompt, max_new_tokens: options.max_new_tokens, key })
            .map_err(|error| Error::Failed(format!("question {name}, turn {}: {error}", turn + 1)))
    };
    for &question in asked {
        let messages = conversations.entry(question).or_insert_with(|| questions[question].before.clone());
        submit(engine, question, 0, messages)?;
    }
    let mut answers = Vec::new();
    while engine.pending() > 0 {
        for left in engine.step(listener)? {
            let (question, turn) = ((left.tag / TURNS) as usize, (left.tag % TURNS) as usize);
            let decoded = left.decoded.map_err(|error| {
                Error::Failed(format!("question {}, turn {}: {error}", questions[question].id, turn + 1))
            })?;
            if let Some(messages) =
                conversations.get_mut(&question).filter(|_| turn + 1 < questions[question].turns.len())
            {
                // Everything it said but the end of its turn, as `regen` goes on.
                let said = decoded.tokens.len() - usize::from(decoded.finish == Finish::Stop);
                messages.push(Message::new("assistant", tokenizer.decode(&decoded.tokens[..said], false)?));
                submit(engine, question, turn + 1, messages)?;
            }
            answers.push((left.tag, question, turn, decoded));
        }
    }
    answers.sort_by_key(|(tag, ..)| *tag);
    let answers = answers.into_iter().map(|(tag, question, turn, decoded)| {
        let prompt = prompts.remove(&tag).unwrap_or_default();
        Answered { question, turn, prompt, decoded }
    });
    let answers = answers.collect();
    let after = engine.clock();
    let clock = Clock {
        prefill: after.prefill - before.prefill,
        draft: after.draft - before.draft,
        verify: after.verify - before.verify,
        overhead: after.overhead - before.overhead,
    };
    Ok(Side { answers, clock })
}

/// Where two answers to one prompt part. Answers to different prompts are not compared: an earlier turn has parted.
pub(super) fn compare(
    target: &dyn TargetModel,
    question: &str,
    options: &EngineOptions,
    plain: &Answered,
    drafted: &Answered,
) -> Result<Option<Divergence>> {
    if plain.prompt != drafted.prompt || plain.decoded.tokens == drafted.decoded.tokens {
        return Ok(None);
    }
    let (left, right) = (&plain.decoded.tokens, &drafted.decoded.tokens);
    let at = left.iter().zip(right).take_while(|(left, right)| left == right).count();
    let tokens = [left.get(at).copied(), right.get(at).copied()];
    let margin = match tokens {
        [Some(left_token), Some(right_token)] => {
            let committed: Vec<u32> = plain.prompt.iter().chain(&left[..at]).copied().collect();
            let row = fresh_scores(target, &committed, options, key(plain.question, plain.turn))?;
            Some((row[left_token as usize] - row[right_token as usize]).abs())
        }
        _ => None,
    };
    let near_tie = margin.is_some_and(|margin| margin <= Tolerance::of_kind(target.kind()).near_tie);
    let position = plain.prompt.len() + at;
    Ok(Some(Divergence { question: question.to_owned(), turn: plain.turn + 1, position, tokens, margin, near_tie }))
}

/// What the target's choice behind `committed` is the largest of, from a forward pass without a cache: `[V]`.
fn fresh_scores(target: &dyn TargetModel, committed: &[u32], options: &EngineOptions, key: u64) -> Result<Vec<f64>> {
    let count = committed.len() as i64;
    let ids: Vec<i64> = committed.iter().map(|&id| i64::from(id)).collect();
    let device = target.device();
    let ids = Tensor::from_slice(&ids).unsqueeze(0).to_device(device); // [1, T]
    let positions = Tensor::arange(count, (Kind::Int64, device)).unsqueeze(0);
    let last = Tensor::from_slice(&[count - 1]).to_device(device);
    let (mask, logits) = (&AttentionMask::Causal, LogitRows::Rows(&last));
    let input = ForwardInput { ids: &ids, positions: &positions, mask, capture: &[], logits };
    let output = target.forward(&input, None)?;
    let row = output.logits.ok_or_else(|| Error::Failed("the target returned no logits".to_owned()))?;
    let mut row: Vec<f64> = Vec::try_from(row.get(0).to_device(Device::Cpu).to_kind(Kind::Double))?;
    options.processors.apply(&mut row, committed.iter().copied());
    if let (Policy::Keyed { seed }, false) = (options.policy, options.processors.is_greedy()) {
        for (token, score) in row.iter_mut().enumerate() {
            *score += noise::keyed_gumbel(seed.wrapping_add(key), noise::TEXT, count as u64, token as u64);
        }
    }
    Ok(row)
}
