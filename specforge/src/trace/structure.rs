//! What is wrong inside one trace, without asking anybody: every record must follow from those before it.

use std::collections::HashSet;

use super::file::{RequestTrace, RoundRecord, Settings, TokenRecord, Trace};
use super::finding::{Finding, Kind, Side};
use crate::decode::Finish;
use crate::decode::event::Source;
use crate::decode::policy::{Policy, keyed_choice};
use crate::error::Result;
use crate::nn::processors::argmax;

/// Everything wrong with a trace, in the order of its requests.
pub fn check(trace: &Trace, side: Side) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for request in &trace.requests {
        let mut checker = Checker { trace, request, side, findings: Vec::new() };
        checker.positions();
        request.rounds.iter().for_each(|round| checker.tree(round));
        checker.draft_cache();
        checker.tokens()?;
        findings.extend(checker.findings);
    }
    Ok(findings)
}

struct Checker<'a> {
    trace: &'a Trace,
    request: &'a RequestTrace,
    side: Side,
    findings: Vec<Finding>,
}

impl Checker<'_> {
    fn find(&mut self, kind: Kind, position: usize, line: usize, text: String) {
        let tag = self.request.prompt.tag;
        self.findings.push(Finding { kind, side: Some(self.side), tag, position, line: Some(line), text });
    }

    /// Positions follow each other, and nothing follows the end.
    fn positions(&mut self) {
        let settings = &self.trace.header.settings;
        let (begin, limit) = (self.request.prompt.tokens.len(), self.request.prompt.limit);
        let mut expected = begin;
        let mut stopped = false;
        for token in &self.request.tokens {
            let (position, line) = (token.position, token.line);
            if position > expected {
                let text = format!("position {position} follows {}: {expected} is missing", expected - 1);
                self.find(Kind::MissingPosition, expected, line, text);
            } else if position < expected {
                self.find(Kind::DuplicatePosition, position, line, format!("position {position} is there twice"));
                continue;
            }
            if stopped {
                self.find(Kind::AfterEnd, position, line, "stands behind a stop token".to_owned());
            }
            if position >= begin + limit {
                self.find(Kind::AfterEnd, position, line, format!("stands behind the limit of {limit} new tokens"));
            }
            stopped |= settings.stop_tokens.contains(&token.token);
            expected = position + 1;
        }
        let last = self.request.tokens.last().map_or(0, |token| token.line);
        let text = match self.request.end.as_ref().map(|end| end.finish) {
            None => "has no end",
            Some(Some(Finish::Stop)) if !stopped => "ended with a stop token that is not there",
            Some(Some(Finish::Length)) if stopped => "ended for its length, with a stop token",
            Some(Some(Finish::Length)) if expected < begin + limit => "ended for its length before its limit",
            Some(_) => return,
        };
        self.find(Kind::WrongEnd, expected, last, format!("request {} {text}", self.request.prompt.tag));
    }

    /// A tree is one, and begins with the last committed token.
    fn tree(&mut self, round: &RoundRecord) {
        let (position, line) = (round.committed, round.line);
        let number = round.round;
        for node in 1..round.parents.len() {
            let parent = round.parents[node];
            if parent >= node {
                let text =
                    format!("round {number}: the parent of node {node} is {parent}, which does not stand before it");
                self.find(Kind::Orphan, position, line, text);
            }
        }
        let mut siblings = HashSet::new();
        for node in 1..round.parents.len() {
            if !siblings.insert((round.parents[node], round.tokens[node])) {
                let (token, parent) = (round.tokens[node], round.parents[node]);
                let text = format!("round {number}: token {token} is guessed twice behind node {parent}");
                self.find(Kind::DuplicateSibling, position, line, text);
            }
        }
        let before = self.request.before(position);
        if before.len() == position && before.last() != Some(&round.tokens[0]) {
            let (got, want) = (round.tokens[0], before[position - 1]);
            let text = format!("round {number}: the tree begins with token {got}; the last committed one is {want}");
            self.find(Kind::WrongRoot, position, line, text);
        }
        if round.target_cache != position as i64 - 1 {
            let (held, want) = (round.target_cache, position - 1);
            let text = format!(
                "round {number}: the target's cache holds {held} tokens; of {position} committed ones it should hold {want}"
            );
            self.find(Kind::CacheLength, position, line, text);
        }
    }

    /// A draft's cache lags behind what is committed by the same number in every round: by the last token, or by none
    /// where it is run while drafting.
    fn draft_cache(&mut self) {
        let lag = |round: &RoundRecord| round.committed as i64 - round.draft_cache;
        let request = self.request;
        if request.rounds.iter().all(|round| round.draft_cache == 0) {
            return;
        }
        let first = request.rounds.first().map_or(1, lag);
        let expected = if (0..=1).contains(&first) { first } else { 1 };
        for round in request.rounds.iter().filter(|round| lag(round) != expected) {
            let (held, want) = (round.draft_cache, round.committed as i64 - expected);
            let text = format!("round {}: the draft's cache holds {held} tokens; it should hold {want}", round.round);
            self.find(Kind::DraftCacheLength, round.committed, round.line, text);
        }
    }

    fn tokens(&mut self) -> Result<()> {
        let mut before: Option<&TokenRecord> = None;
        let request = self.request;
        for (index, token) in request.tokens.iter().enumerate() {
            let last_of_round = request.tokens.get(index + 1).is_none_or(|next| next.round != token.round);
            match token.round {
                0 => self.prefill(token),
                _ => self.place(token, before.filter(|before| before.round == token.round), last_of_round),
            }
            self.choice(token, last_of_round)?;
            before = Some(token);
        }
        Ok(())
    }

    fn prefill(&mut self, token: &TokenRecord) {
        let length = self.request.prompt.tokens.len();
        let (position, line) = (token.position, token.line);
        if token.source != Source::Prefill || position != length {
            let text = format!("a prefill gives position {length}; recorded are {:?} and {position}", token.source);
            self.find(Kind::WrongSource, position, line, text);
        }
        if token.slot + 1 != length {
            let text =
                format!("was chosen from the row of prompt token {}; the last one is {}", token.slot, length - 1);
            self.find(Kind::WrongPlace, position, line, text);
        }
        if token.cache_length != 0 {
            let text = format!("the target's cache held {} tokens before the prompt", token.cache_length);
            self.find(Kind::CacheLength, position, line, text);
        }
    }

    /// A token's place in its round's tree, and where it says it comes from.
    fn place(&mut self, token: &TokenRecord, before: Option<&TokenRecord>, last_of_round: bool) {
        let (position, line, slot) = (token.position, token.line, token.slot);
        let Some(round) = self.request.round(token.round) else {
            self.find(Kind::WrongPlace, position, line, format!("round {} is not there", token.round));
            return;
        };
        let Some(depths) = round.depths() else { return };
        if slot >= depths.len() {
            let text = format!("slot {slot} is not in the tree of round {}, which has {}", token.round, depths.len());
            self.find(Kind::WrongPlace, position, line, text);
            return;
        }
        let want = (round.parents[slot], depths[slot]);
        if (token.parent_slot, token.depth) != want {
            let (parent, depth) = (token.parent_slot, token.depth);
            let text = format!("slot {slot} has parent {} and depth {}, not {parent} and {depth}", want.0, want.1);
            self.find(Kind::WrongPlace, position, line, text);
        }
        if token.cache_length != round.target_cache {
            let (got, want) = (token.cache_length, round.target_cache);
            let text = format!("the target's cache held {got} tokens, and {want} when the round began");
            self.find(Kind::CacheLength, position, line, text);
        }
        let (follows, text) = match before {
            None => (slot == 0 && position == round.committed, "a round begins at the root".to_owned()),
            Some(before) => (
                slot != 0 && round.parents[slot] == before.slot && round.tokens[slot] == before.token,
                format!("token {} behind slot {} was committed before it", before.token, before.slot),
            ),
        };
        if token.source == Source::Accepted
            && !last_of_round
            && !round.children(slot).any(|child| round.tokens[child] == token.token)
        {
            let text = format!("token {} is recorded as accepted behind slot {slot}; no node guesses it", token.token);
            self.find(Kind::WrongPath, position, line, text);
            return;
        }
        // A gap in the record is told as such.
        let gap = before.is_some_and(|before| before.position + 1 != position);
        if !follows && !gap {
            let guess = round.tokens[slot];
            let text = format!("slot {slot} (token {guess} behind slot {}) is not on the path: {text}", want.0);
            self.find(Kind::WrongPath, position, line, text);
        }
        let child = round.children(slot).any(|child| round.tokens[child] == token.token);
        let expected = match (child, round.children(slot).next().is_some()) {
            (true, _) => Source::Accepted,
            (false, true) => Source::Correction,
            (false, false) => Source::Bonus,
        };
        // Typical acceptance may choose a guess that it had found implausible.
        let lossy = !self.trace.header.settings.policy.is_lossless() && last_of_round;
        if token.source != expected && !lossy {
            let text = format!("is recorded as {:?}; its tree makes it {expected:?}", token.source);
            self.find(Kind::WrongSource, position, line, text);
        }
    }

    /// The recorded row must choose the recorded token.
    fn choice(&mut self, token: &TokenRecord, last_of_round: bool) -> Result<()> {
        let (position, line) = (token.position, token.line);
        let settings = &self.trace.header.settings;
        let raw = self.trace.row(token)?;
        if let Some(name) = stored_narrower(&raw, &self.trace.header.dtype) {
            let text = format!("every logit fits into {name}; the target gives {}", self.trace.header.dtype);
            self.find(Kind::StoragePrecision, position, line, text);
        }
        let before = self.request.before(position);
        if before.len() != position {
            return Ok(());
        }
        let key = self.request.prompt.key;
        let round = self.request.round(token.round);
        let committed = round.map_or(position, |round| round.committed.min(position));
        if !settings.policy.is_lossless() && !last_of_round {
            return Ok(());
        }
        let chosen = |context: &[u32], noise| choice_of(settings, key, &raw, context, noise, token.token);
        let Some(choice) = chosen(&before, position).filter(|&choice| choice != token.token) else { return Ok(()) };
        let sampled = matches!(settings.policy, Policy::Keyed { .. }) && !settings.processors.is_greedy();
        let noise = [committed + token.slot, committed, position - 1, position + 1, token.slot];
        let noise = noise.into_iter().find(|&noise| sampled && chosen(&before, noise) == Some(token.token));
        let guessed =
            round.is_some_and(|round| round.children(token.slot).any(|child| round.tokens[child] == token.token));
        let said = format!("the row recorded for slot {} chooses token {choice}, not {}", token.slot, token.token);
        let (kind, text) = if let Some(noise) = noise {
            (Kind::NoisePosition, format!("{said}; with the noise of position {noise} it would"))
        } else if committed < position && chosen(&before[..committed], position) == Some(token.token) {
            (Kind::ProcessorContext, format!("{said}; processors that do not know of the path would"))
        } else if guessed && token.source == Source::Accepted {
            (Kind::UnchosenAccepted, format!("{said}, a guess that was accepted all the same"))
        } else {
            (Kind::WrongChoice, said)
        };
        self.find(kind, position, line, text);
        Ok(())
    }
}

/// What a row chooses behind a context with the noise of a position, where its settings alone decide. Of equal logits
/// any is the largest, the `preferred` one too.
pub(super) fn choice_of(
    settings: &Settings,
    key: u64,
    raw: &[f64],
    context: &[u32],
    noise: usize,
    preferred: u32,
) -> Option<u32> {
    let mut row = raw.to_vec();
    settings.processors.apply(&mut row, context.iter().copied());
    match settings.policy {
        Policy::Keyed { seed } if !settings.processors.is_greedy() => {
            Some(keyed_choice(seed.wrapping_add(key), noise, &row))
        }
        Policy::Maximal { .. } if !settings.processors.is_greedy() => None,
        _ if row.get(preferred as usize) == row.get(argmax(&row)) => Some(preferred),
        _ => Some(argmax(&row) as u32),
    }
}

/// The narrower type that every logit of a row fits into, where the target's own is wider.
fn stored_narrower(row: &[f64], dtype: &str) -> Option<&'static str> {
    let fits = |name: &'static str, narrow: fn(f64) -> f64| {
        // A few small whole numbers fit anywhere.
        let telling = row.iter().filter(|logit| logit.is_finite() && logit.fract() != 0.0).count() >= 16;
        (telling && row.iter().all(|&logit| narrow(logit) == logit)).then_some(name)
    };
    match dtype {
        "float32" | "float64" => fits("float16", |logit| half::f16::from_f64(logit).to_f64())
            .or_else(|| fits("bfloat16", |logit| half::bf16::from_f64(logit).to_f64()))
            .or_else(|| fits("float32", |logit| f64::from(logit as f32)).filter(|_| dtype == "float64")),
        _ => None,
    }
}
