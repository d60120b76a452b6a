//! The page that a run leaves: what of it the metrics do not hold.

use serde_json::Value;

use super::super::signals;
use crate::checkpoint::Versions;
use crate::data::{ChatTokenizer, TextStream};
use crate::decode::engine::Decoded;
use crate::error::Result;
use crate::html::short;
use crate::tracking::page::{RunPage, SampleText};
use crate::train::TrainReport;

/// Answers on the page, and characters of a prompt before each.
const SAMPLES: usize = 3;
const PROMPT: usize = 300;

/// The page of a run that ended so, whose last decode gave `samples`.
pub(super) fn of<'a>(
    report: &TrainReport,
    configuration: &Value,
    versions: &Versions,
    samples: &'a [SampleText],
) -> RunPage<'a> {
    let text = |pointer: &str| configuration.pointer(pointer).and_then(Value::as_str).unwrap_or("-");
    let mut figures = Vec::new();
    let mut figure = |value: String, what: &str| figures.push((value, what.to_owned()));
    for (name, what) in [
        ("acceptance_length", "tokens a verification, held out"),
        ("simulated_acceptance_length", "simulated, held out"),
        ("expected_scales", "scales in a row, held out"),
        ("loss", "held-out loss"),
    ] {
        if let Some(&value) = report.end.get(name) {
            figure(short(value), what);
        }
    }
    figure(format!("{} of {}", report.steps, report.total_steps), "steps");
    figure(format!("{:.0}", report.tokens_per_second), "tokens a second in training");
    figure(format!("{:.1}", report.seconds / 60.0), "minutes, the last part of the run");
    if let Some(signal) = report.stopped_by {
        figure(signals::name(signal), "stopped it");
    }
    RunPage {
        title: format!("{} for {}", text("/draft/algorithm"), text("/target/path")),
        figures,
        samples,
        versions: vec![
            ("specforge".to_owned(), versions.specforge.clone()),
            ("libtorch".to_owned(), versions.libtorch.clone()),
        ],
        configuration: configuration.clone(),
    }
}

/// The first answers as text, with what the draft had guessed of them. `prompts` by the answers' tags.
pub(super) fn samples(answers: &[Decoded], prompts: &[Vec<u32>], tokenizer: &ChatTokenizer) -> Result<Vec<SampleText>> {
    answers.iter().take(SAMPLES).map(|answer| sample(answer, prompts, tokenizer)).collect()
}

fn sample(answer: &Decoded, prompts: &[Vec<u32>], tokenizer: &ChatTokenizer) -> Result<SampleText> {
    let prompt = usize::try_from(answer.tag).ok().and_then(|place| prompts.get(place));
    let prompt = prompt.map_or(Ok(String::new()), |tokens| tokenizer.decode(tokens, false))?;
    let first = prompt.char_indices().rev().nth(PROMPT - 1).map_or(0, |(place, _)| place);
    let mut stream = TextStream::new(tokenizer);
    let mut pieces: Vec<(String, bool)> = Vec::new();
    let mut add = |text: String, guessed: bool| match pieces.last_mut() {
        Some((last, was)) if *was == guessed => last.push_str(&text),
        _ if text.is_empty() => {}
        _ => pieces.push((text, guessed)),
    };
    for (&token, guessed) in answer.text_tokens().iter().zip(guessed(answer)) {
        add(stream.push(token)?, guessed);
    }
    add(stream.finish()?, false);
    Ok(SampleText { prompt: prompt[first..].to_owned(), pieces })
}

/// Whether each token had been guessed: of a round's tokens those before its last.
fn guessed(answer: &Decoded) -> impl Iterator<Item = bool> + '_ {
    let of_rounds = answer.rounds.iter().flat_map(|round| (0..round.tokens).map(|place| place < round.accepted));
    std::iter::once(false).chain(of_rounds) // the first comes from the prompt's own pass
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::Finish;
    use crate::decode::engine::RoundOutcome;

    #[test]
    fn guesses_are_the_tokens_of_a_round_before_the_targets_own() {
        let round = |tokens, accepted| RoundOutcome { guesses: 3, depth: 3, tokens, accepted };
        let answer = Decoded {
            tag: 0,
            tokens: (0..7).collect(),
            finish: Finish::Length,
            rounds: vec![round(3, 2), round(1, 0), round(2, 2)],
        };
        let want = [false, true, true, false, false, true, true];
        assert_eq!(guessed(&answer).collect::<Vec<_>>(), want);
    }
}
