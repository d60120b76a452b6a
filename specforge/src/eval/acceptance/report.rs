//! What an evaluation found, in numbers.
//!
//! Acceptance length is tokens committed for each verification of the target, the correction or bonus included; the
//! first token of an answer comes from the prompt's pass and belongs to no verification. Nothing behind a stop token is
//! counted, on either side.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::{Divergence, Group, Measured, Side};
use crate::decode::engine::{Clock, RoundOutcome};
use crate::error::foreign;
use crate::eval::calibration;

/// Contexts are grouped by these lower ends, in tokens.
const CONTEXTS: [usize; 7] = [0, 128, 256, 512, 1024, 2048, 4096];

/// Sums over verifications.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Acceptance {
    /// Verifications.
    pub rounds: usize,
    /// Tokens they committed.
    pub tokens: usize,
    /// Guesses they verified.
    pub guesses: usize,
    /// Guesses they accepted.
    pub accepted: usize,
    /// Tokens for each verification.
    pub acceptance_length: f64,
}

impl Acceptance {
    fn add(&mut self, round: &RoundOutcome) {
        self.rounds += 1;
        self.tokens += round.tokens;
        self.guesses += round.guesses;
        self.accepted += round.accepted;
        self.acceptance_length = self.tokens as f64 / self.rounds as f64;
    }
}

/// Speed of one side.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Speed {
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// Seconds spent on prompts.
    pub prefill_seconds: f64,
    /// Tokens behind the first of each answer.
    pub decode_tokens: usize,
    /// Seconds spent on them.
    pub decode_seconds: f64,
    /// Tokens a second while decoding.
    pub tokens_per_second: f64,
    /// Share of the decode time in the draft.
    pub draft_share: f64,
    /// Share in the target.
    pub verify_share: f64,
    /// Share in neither.
    pub overhead_share: f64,
}

/// Figures of a part of the questions.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Part {
    /// Answers.
    pub answers: usize,
    /// Acceptance.
    #[serde(flatten)]
    pub acceptance: Acceptance,
    /// Speed with the draft.
    pub drafted: Speed,
    /// Speed without it.
    pub plain: Option<Speed>,
    /// How many times faster decoding is with the draft.
    pub speedup: Option<f64>,
}

/// Whether anything was lost.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Losslessness {
    /// `exact`, `distribution` or `lossy`: what the policy promises.
    pub promise: &'static str,
    /// Answers that were compared token for token.
    pub compared: usize,
    /// Answers that differ.
    pub divergences: Vec<Divergence>,
    /// Of these, where a fresh forward pass has no tie: a fault.
    pub faults: usize,
}

/// The whole report.
#[derive(Debug, Clone, Serialize)]
pub struct AcceptanceReport {
    /// Everything that decides the figures, as it was parsed.
    pub settings: Value,
    /// All questions.
    #[serde(flatten)]
    pub all: Part,
    /// By depth from 1: how often a verification whose tree is that deep accepts that many guesses or more.
    pub per_depth: Vec<f64>,
    /// By number of accepted guesses from 0: verifications.
    pub accepted_lengths: Vec<usize>,
    /// By data set.
    pub datasets: BTreeMap<String, Part>,
    /// By tokens before a verification: the group's lower end, and its acceptance.
    pub contexts: Vec<(usize, Acceptance)>,
    /// Proof.
    pub lossless: Losslessness,
    /// Processes that shared the questions. Speeds are those of one of them: seconds of all are added up.
    pub processes: usize,
    /// Wall time of all questions on both sides; the slowest process decides.
    pub wall_seconds: f64,
    /// Temperatures and step costs, where they were measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<calibration::Measured>,
}

impl AcceptanceReport {
    /// Sums up what was measured.
    pub fn new(settings: Value, promise: &'static str, measured: Measured) -> Self {
        let Measured { groups, divergences, processes, seconds: wall_seconds } = measured;
        let mut datasets: BTreeMap<String, Vec<&Group>> = BTreeMap::new();
        groups.iter().for_each(|group| datasets.entry(group.dataset.clone()).or_default().push(group));
        let rounds = || {
            groups.iter().flat_map(|group| &group.drafted.answers).flat_map(|answer| {
                // The first token is committed before the first verification.
                let first = answer.prompt.len() + 1;
                answer.decoded.rounds.iter().scan(first, |context, round| {
                    let before = *context;
                    *context += round.tokens;
                    Some((before, *round))
                })
            })
        };
        let deepest = rounds().map(|(_, round)| round.depth).max().unwrap_or(0);
        let per_depth = (1..=deepest).map(|depth| {
            let tried = rounds().filter(|(_, round)| round.depth >= depth);
            let (tries, hits) = tried
                .fold((0, 0), |(tries, hits), (_, round)| (tries + 1, hits + usize::from(round.accepted >= depth)));
            hits as f64 / f64::from(tries.max(1))
        });
        let mut accepted_lengths = vec![0; deepest + 1];
        let mut contexts = vec![Acceptance::default(); CONTEXTS.len()];
        for (context, round) in rounds() {
            accepted_lengths[round.accepted.min(deepest)] += 1;
            let place = CONTEXTS.iter().rposition(|&start| context >= start).unwrap_or(0);
            contexts[place].add(&round);
        }
        let compared = match promise {
            "exact" => {
                groups.iter().filter(|group| group.plain.is_some()).map(|group| group.drafted.answers.len()).sum()
            }
            _ => 0,
        };
        let faults = divergences.iter().filter(|divergence| !divergence.near_tie).count();
        Self {
            settings,
            all: part(&groups.iter().collect::<Vec<_>>()),
            per_depth: per_depth.collect(),
            accepted_lengths,
            datasets: datasets.into_iter().map(|(name, groups)| (name, part(&groups))).collect(),
            contexts: CONTEXTS.into_iter().zip(contexts).filter(|(_, part)| part.rounds > 0).collect(),
            lossless: Losslessness { promise, compared, divergences, faults },
            processes,
            wall_seconds,
            calibration: None,
        }
    }
}

fn part(groups: &[&Group]) -> Part {
    let mut acceptance = Acceptance::default();
    let answers = || groups.iter().flat_map(|group| &group.drafted.answers);
    answers().flat_map(|answer| &answer.decoded.rounds).for_each(|round| acceptance.add(round));
    let drafted = speed(groups.iter().map(|group| &group.drafted));
    let plain: Option<Vec<&Side>> = groups.iter().map(|group| group.plain.as_ref()).collect();
    let plain = plain.filter(|sides| !sides.is_empty()).map(|sides| speed(sides.into_iter()));
    let speedup = plain.filter(|plain| plain.tokens_per_second > 0.0 && drafted.tokens_per_second > 0.0);
    let speedup = speedup.map(|plain| drafted.tokens_per_second / plain.tokens_per_second);
    Part { answers: answers().count(), acceptance, drafted, plain, speedup }
}

fn speed<'a>(sides: impl Iterator<Item = &'a Side>) -> Speed {
    let mut speed = Speed::default();
    let mut clock = Clock::default();
    for side in sides {
        speed.prompt_tokens += side.answers.iter().map(|answer| answer.prompt.len()).sum::<usize>();
        speed.decode_tokens += side.answers.iter().map(|answer| answer.decoded.tokens.len() - 1).sum::<usize>();
        clock.prefill += side.clock.prefill;
        clock.draft += side.clock.draft;
        clock.verify += side.clock.verify;
        clock.overhead += side.clock.overhead;
    }
    speed.prefill_seconds = clock.prefill.as_secs_f64();
    speed.decode_seconds = clock.decode().as_secs_f64();
    if speed.decode_seconds > 0.0 {
        speed.tokens_per_second = speed.decode_tokens as f64 / speed.decode_seconds;
        speed.draft_share = clock.draft.as_secs_f64() / speed.decode_seconds;
        speed.verify_share = clock.verify.as_secs_f64() / speed.decode_seconds;
        speed.overhead_share = clock.overhead.as_secs_f64() / speed.decode_seconds;
    }
    speed
}

/// A table for people.
pub fn text(report: &AcceptanceReport) -> String {
    let width =
        report.datasets.keys().map(|name| foreign::name(name).chars().count()).max().unwrap_or(0).max("all".len());
    let mut lines = vec![format!(
        "{:<width$}  {:>7}  {:>7}  {:>6}  {:>9}  {:>9}  {:>7}",
        "", "answers", "tokens", "tau", "tokens/s", "plain", "speedup"
    )];
    let all = [("all".to_owned(), &report.all)];
    let parts =
        report.datasets.iter().map(|(name, part)| (foreign::name(name), part)).filter(|_| report.datasets.len() > 1);
    for (name, part) in parts.chain(all) {
        let optional =
            |value: Option<f64>, unit: &str| value.map_or("-".to_owned(), |value| format!("{value:.2}{unit}"));
        lines.push(format!(
            "{name:<width$}  {:>7}  {:>7}  {:>6.3}  {:>9.2}  {:>9}  {:>7}",
            part.answers,
            part.acceptance.tokens,
            part.acceptance.acceptance_length,
            part.drafted.tokens_per_second,
            optional(part.plain.map(|plain| plain.tokens_per_second), ""),
            optional(part.speedup, "x"),
        ));
    }
    let shares: Vec<String> = report.per_depth.iter().map(|share| format!("{share:.3}")).collect();
    lines.push(format!("accepted at depth 1, 2, ... or deeper: {}", shares.join(" ")));
    let Speed { draft_share, verify_share, overhead_share, .. } = report.all.drafted;
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    lines.push(format!(
        "decode time: draft {}, verify {}, the rest {}",
        percent(draft_share),
        percent(verify_share),
        percent(overhead_share)
    ));
    if report.processes > 1 {
        let (processes, seconds) = (report.processes, report.wall_seconds);
        lines.push(format!("{processes} processes took {seconds:.1} s; speeds are those of one of them"));
    }
    lines.push(lossless(&report.lossless));
    lines.extend(report.calibration.as_ref().map(calibration::Measured::text));
    lines.join("\n")
}

/// One line on what was proved.
pub fn lossless(found: &Losslessness) -> String {
    let Losslessness { promise, compared, divergences, faults } = found;
    let ties = divergences.len() - faults;
    match *promise {
        "exact" if *compared == 0 => "lossless: not compared, plain decoding was left out".to_owned(),
        "exact" => {
            let equal = compared - divergences.len();
            let mut line = format!("lossless: {equal} of {compared} answers equal plain decoding token for token");
            if ties > 0 {
                line += &format!("; {ties} part at a near tie of the target's own logits");
            }
            if *faults > 0 {
                line += &format!("; {faults} ARE WRONG");
            }
            line
        }
        "distribution" => "lossless in distribution: tokens depend on the draft and were not compared".to_owned(),
        _ => "lossy: the policy keeps tokens that the target would not have chosen".to_owned(),
    }
}
