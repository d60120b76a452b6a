//! `eval` with the target on another machine.

use serde::Serialize;
use serde_json::Value;

use super::decoding::{DecodingArgs, Models};
use super::edge::{Answer, EdgeArgs, EdgeSession};
use super::{LazyProgress, Output};
use crate::data::Message;
use crate::error::{Error, Result};
use crate::eval::acceptance::Question;
use crate::stop::Stop;

/// All answers with one draft, in numbers.
#[derive(Debug, Default, Serialize)]
struct Side {
    tokens: usize,
    rounds: usize,
    /// Guesses a verification.
    guesses: f64,
    /// Tokens a verification.
    acceptance_length: f64,
    /// With prompts and the network.
    tokens_per_second: f64,
    /// Median over verifications of the whole time of an answer.
    seconds_per_round: f64,
    /// Share of trees that were guessed while a verdict travelled.
    guessed_ahead: f64,
}

impl Side {
    fn of(answers: &[Answer]) -> Self {
        let sum = |of: &dyn Fn(&Answer) -> f64| answers.iter().map(of).sum::<f64>();
        let over = |value: f64, by: f64| if by > 0.0 { value / by } else { 0.0 };
        let tokens = sum(&|answer| answer.summary.tokens as f64);
        let rounds = sum(&|answer| answer.summary.rounds as f64);
        let seconds = sum(&|answer| answer.summary.seconds);
        let mut each: Vec<f64> =
            answers.iter().map(|answer| over(answer.summary.seconds, answer.summary.rounds as f64)).collect();
        each.sort_by(f64::total_cmp);
        Self {
            tokens: tokens as usize,
            rounds: rounds as usize,
            guesses: over(sum(&|answer| answer.summary.guesses * answer.summary.rounds as f64), rounds),
            // The first token of an answer comes with its session.
            acceptance_length: over(tokens - answers.len() as f64, rounds),
            tokens_per_second: over(tokens, seconds),
            seconds_per_round: each.get(each.len() / 2).copied().unwrap_or(0.0),
            guessed_ahead: over(sum(&|answer| answer.summary.sent_ahead as f64), rounds),
        }
    }
}

/// What an evaluation over a network found.
#[derive(Debug, Serialize)]
struct CloudReport {
    settings: Value,
    answers: usize,
    draft: Side,
    /// Without guesses: one token for each way there and back.
    without: Option<Side>,
    speedup: Option<f64>,
    /// Answers that differ from those without guesses; none where they may.
    faults: Option<usize>,
    texts: Vec<String>,
}

/// Answers questions with a draft that is here and a target that is not, and once more without guesses.
pub(super) fn run(
    questions: &[Question],
    (decoding, edge): (&DecodingArgs, &EdgeArgs),
    baseline: bool,
    (output, stop): (&Output, &Stop),
) -> Result<()> {
    let models = decoding.models_elsewhere()?;
    let mut session = EdgeSession::new(&models, decoding, edge, (output, stop))?;
    let settings = session.settings().clone();
    let progress = LazyProgress::new("eval", "questions");
    let sides = 1 + u64::from(baseline);
    let all = sides * questions.len() as u64;
    progress.set(0, all);
    let mut done = 0;
    let mut answer_all = |session: &mut EdgeSession<'_>| -> Result<Vec<Answer>> {
        let mut answers = Vec::new();
        for question in questions {
            answers.extend(answers_to(question, &models, session)?);
            done += 1;
            progress.set(done, all);
        }
        Ok(answers)
    };
    let with = answer_all(&mut session)?;
    drop(session);
    let without = match baseline {
        true => Some(answer_all(&mut EdgeSession::without_guesses(&models, decoding, edge, (output, stop))?)?),
        false => None,
    };
    progress.finish("done");
    let differ = |without: &Vec<Answer>| with.iter().zip(without).filter(|(a, b)| a.token_ids != b.token_ids).count();
    let lossless = decoding.policy()?.is_lossless();
    let faults = without.as_ref().filter(|_| lossless).map(differ);
    let (draft, without) = (Side::of(&with), without.as_deref().map(Side::of));
    let speedup = without.as_ref().map(|without| draft.tokens_per_second / without.tokens_per_second);
    let texts = with.into_iter().map(|answer| answer.text).collect::<Vec<_>>();
    let report = CloudReport { settings, answers: texts.len(), draft, without, speedup, faults, texts };
    output.result(&report, || text(&report));
    match report.faults.unwrap_or(0) {
        0 => Ok(()),
        faults => Err(Error::Failed(format!("{faults} answers with the draft are not those of the target without it"))),
    }
}

/// The answers to a question's turns, each asked once the one before it is answered.
fn answers_to(question: &Question, models: &Models, session: &mut EdgeSession<'_>) -> Result<Vec<Answer>> {
    let (mut messages, mut answers) = (question.before.clone(), Vec::new());
    for (turn, said) in question.turns.iter().enumerate() {
        messages.push(Message::new("user", said.as_str()));
        let prepared = models.tokenizer.prepare(&messages, question.tools.as_ref())?;
        let prompt = prepared.with_arguments(&question.template_arguments)?.render(messages.len(), true)?;
        let answer = session.ask(models.tokenizer.encode(&prompt)?, &mut |_| ());
        let answer =
            answer.map_err(|error| Error::Failed(format!("question {}, turn {}: {error}", question.id, turn + 1)))?;
        messages.push(Message::new("assistant", answer.text.as_str()));
        answers.push(answer);
    }
    Ok(answers)
}

fn text(report: &CloudReport) -> String {
    let line = |name: &str, side: &Side| {
        format!(
            "{name:<16} {:>6} tokens {:>6} rounds   tau {:>5.2}   {:>5.1} guesses a round   {:>4.0} % guessed ahead   {:>7.1} tokens/s",
            side.tokens,
            side.rounds,
            side.acceptance_length,
            side.guesses,
            100.0 * side.guessed_ahead,
            side.tokens_per_second
        )
    };
    let mut lines = vec![line("with the draft", &report.draft)];
    if let Some(without) = &report.without {
        lines.push(line("without guesses", without));
    }
    if let Some(speedup) = report.speedup {
        lines.push(format!("speed-up {speedup:.2} x over one token for each way there and back"));
    }
    lines.push(match report.faults {
        Some(0) => format!("{} answers, each as without guesses", report.answers),
        Some(faults) => format!("{} answers, {faults} of them NOT as without guesses", report.answers),
        None => format!("{} answers, not compared", report.answers),
    });
    lines.join("\n")
}
