//! What an evaluation of ways to decode found, in numbers.

use std::fmt::Write;

use serde::Serialize;
use serde_json::Value;

use super::{Answered, Measured, Mode};
use crate::error::foreign;

/// Figures of one way.
#[derive(Debug, Clone, Serialize)]
pub struct Way {
    /// In a word or two.
    pub name: String,
    /// Everything that decides the figures, as it was parsed.
    pub settings: Value,
    /// Whether every token is the one that passes over whole texts alone give.
    pub lossless: bool,
    /// Tokens of all answers.
    pub tokens: usize,
    /// Passes.
    pub evaluations: usize,
    /// Those over whole texts.
    pub whole_passes: usize,
    /// Tokens for each pass.
    pub tokens_per_evaluation: f64,
    /// Positions that all layers computed, and those that they left out.
    pub rows: (u64, u64),
    /// Wall time.
    pub seconds: f64,
    /// Tokens a second.
    pub tokens_per_second: f64,
    /// How many times as many as the first way.
    pub speedup: f64,
    /// Share of positions with the token of the first way's answer.
    pub agreement: f64,
    /// Answers that are the first way's, token for token.
    pub same_answers: usize,
    /// Mean estimated log-likelihood of an answer's token, in nats.
    pub log_likelihood: Option<f64>,
}

/// The whole report.
#[derive(Debug, Clone, Serialize)]
pub struct InfillingReport {
    /// What all ways have in common.
    pub settings: Value,
    /// Answers of each way.
    pub answers: usize,
    /// Masked copies by which likelihoods were estimated.
    pub likelihood_samples: usize,
    /// The ways, the one that the others are compared with first.
    pub ways: Vec<Way>,
    /// Every answer.
    pub questions: Vec<Answered>,
}

impl InfillingReport {
    /// Adds everything up.
    pub fn new(settings: Value, modes: &[Mode], samples: usize, questions: Vec<Answered>) -> Self {
        let mut ways: Vec<Way> = Vec::with_capacity(modes.len());
        for (place, mode) in modes.iter().enumerate() {
            let answers = questions.iter().filter_map(|answered| answered.answers.get(place)).collect::<Vec<_>>();
            let mut way = way(mode, &answers);
            way.speedup = ways.first().map_or(1.0, |first| way.tokens_per_second / first.tokens_per_second);
            ways.push(way);
        }
        Self { settings, answers: questions.len(), likelihood_samples: samples, ways, questions }
    }
}

fn way(mode: &Mode, answers: &[&Measured]) -> Way {
    let sum = |of: fn(&Measured) -> usize| answers.iter().map(|answer| of(answer)).sum::<usize>();
    let rows = |of: fn(&Measured) -> &Vec<u64>| answers.iter().flat_map(|answer| of(answer)).sum::<u64>();
    let (tokens, evaluations) = (sum(|answer| answer.tokens.len()), sum(|answer| answer.work.evaluations));
    let seconds: f64 = answers.iter().map(|answer| answer.seconds).sum();
    let (same, all) = (sum(|answer| answer.agreement.0), sum(|answer| answer.agreement.1));
    // A long answer counts as much as it has tokens.
    let likely =
        answers.iter().map(|answer| Some(answer.log_likelihood? * answer.tokens.len() as f64)).sum::<Option<f64>>();
    Way {
        name: mode.name.clone(),
        settings: mode.options.settings(),
        lossless: mode.options.is_lossless(),
        tokens,
        evaluations,
        whole_passes: sum(|answer| answer.work.whole_passes),
        tokens_per_evaluation: tokens as f64 / evaluations.max(1) as f64,
        rows: (rows(|answer| &answer.work.rows_computed), rows(|answer| &answer.work.rows_skipped)),
        seconds,
        tokens_per_second: tokens as f64 / seconds.max(f64::MIN_POSITIVE),
        speedup: 1.0,
        agreement: same as f64 / all.max(1) as f64,
        same_answers: answers.iter().filter(|answer| answer.agreement.0 == answer.agreement.1).count(),
        log_likelihood: likely.map(|sum| sum / tokens.max(1) as f64),
    }
}

/// The report as a table.
pub fn text(report: &InfillingReport) -> String {
    let mut out = String::from(
        "| way | lossless | tokens | evaluations | tokens each | rows computed | tokens/s | against the first | agreement | same \
         answers | log-likelihood |\n|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    let first = report.ways.first().map_or(0, |way| way.rows.0).max(1) as f64;
    for way in &report.ways {
        let likely = way.log_likelihood.map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"));
        let lossless = if way.lossless { "yes" } else { "no" };
        let _ = writeln!(
            out,
            "| {} | {lossless} | {} | {} | {:.2} | {:.0} % | {:.1} | {:.2} x | {:.1} % | {} of {} | {likely} |",
            foreign::one_line(&way.name),
            way.tokens,
            way.evaluations,
            way.tokens_per_evaluation,
            100.0 * way.rows.0 as f64 / first,
            way.tokens_per_second,
            way.speedup,
            100.0 * way.agreement,
            way.same_answers,
            report.answers,
        );
    }
    out
}
