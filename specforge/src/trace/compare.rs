//! Aligns two traces by request and absolute position, and says where they part and which of them is wrong.
//!
//! Rows of a sound decode differ by rounding: kernels add in another order for another number of tokens. How far is
//! [`Tolerance`]'s. Two tokens may change places where their scores are that close: a near tie, and nobody's fault.
//! Everything else is somebody's.

use serde::Serialize;

use super::file::{RequestTrace, Settings, TokenRecord, Trace};
use super::finding::{Finding, Kind, Side};
use super::judge::Judge;
use super::metrics::{self, Difference, Real};
use super::structure::{self, choice_of};
use crate::decode::Tolerance;
use crate::decode::event::Source;
use crate::error::{Error, Result};

/// What came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Same tokens, same rows, nothing wrong inside.
    Equal,
    /// Tokens differ where the target itself is undecided up to rounding.
    NearTie,
    /// The first trace is wrong.
    AWrong,
    /// The second trace is wrong.
    BWrong,
    /// Both are.
    BothWrong,
    /// They differ, and nothing says which is wrong.
    Undecided,
}

impl Verdict {
    /// Whether both traces are as good as each other.
    pub fn is_sound(self) -> bool {
        matches!(self, Verdict::Equal | Verdict::NearTie)
    }

    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Verdict::Equal => "equal",
            Verdict::NearTie => "near tie",
            Verdict::AWrong => "A is wrong",
            Verdict::BWrong => "B is wrong",
            Verdict::BothWrong => "both are wrong",
            Verdict::Undecided => "they differ; undecided which is wrong",
        }
    }
}

/// One side of a divergence.
#[derive(Debug, Clone, Serialize)]
pub struct Choice {
    /// The token.
    pub token: u32,
    /// The largest logits.
    pub top: Vec<(u32, Real)>,
    /// Distance of the two largest.
    pub margin: Real,
    /// Where the token comes from.
    pub source: Source,
    /// Verification.
    pub round: u64,
    /// Node.
    pub slot: usize,
    /// Its depth.
    pub depth: usize,
    /// Tokens in the target's cache before the pass.
    pub cache_length: i64,
}

/// The target's own opinion of a position.
#[derive(Debug, Clone, Serialize)]
pub struct Reference {
    /// What it chooses, where its settings alone decide.
    pub token: Option<u32>,
    /// The largest logits.
    pub top: Vec<(u32, Real)>,
    /// Distance of the two largest.
    pub margin: Real,
}

/// Where a request's tokens part for the first time.
#[derive(Debug, Clone, Serialize)]
pub struct Divergence {
    /// Tag of the request.
    pub tag: u64,
    /// Absolute position.
    pub position: usize,
    /// The first trace's choice.
    pub a: Choice,
    /// The second's.
    pub b: Choice,
    /// How far the two rows are apart.
    pub difference: Difference,
    /// What a pass without a cache gives.
    pub reference: Option<Reference>,
    /// Who is wrong here.
    pub verdict: Verdict,
}

/// What was compared.
#[derive(Debug, Clone, Serialize)]
pub struct Label {
    /// The file.
    pub path: std::path::PathBuf,
    /// How was decoded.
    pub settings: String,
    /// Element type and device.
    pub machine: String,
}

/// The outcome.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// Who is wrong.
    pub verdict: Verdict,
    /// The first trace.
    pub a: Label,
    /// The second.
    pub b: Label,
    /// What to know when reading this.
    pub notes: Vec<String>,
    /// Requests in both.
    pub requests: usize,
    /// Positions whose rows were compared, whole.
    pub positions: usize,
    /// Largest difference of any logit at them.
    pub max_difference: Real,
    /// How far rows and tokens may be apart.
    pub tolerance: Tolerance,
    /// Whether the target was asked.
    pub judged: bool,
    /// Where requests part, one for each that does.
    pub divergences: Vec<Divergence>,
    /// Everything wrong, first things first.
    pub findings: Vec<Finding>,
}

/// Compares two traces.
pub fn compare(a: &Trace, b: &Trace, judge: Option<&Judge<'_>>) -> Result<Comparison> {
    if a.header.vocabulary != b.header.vocabulary {
        let (left, right) = (a.header.vocabulary, b.header.vocabulary);
        return Err(Error::Usage(format!("the traces are of other targets: {left} logits a row, and {right}")));
    }
    let tolerance = Tolerance::of(&a.header.dtype).or(Tolerance::of(&b.header.dtype));
    let mut run = Run { a, b, judge, tolerance, positions: 0, max: 0.0, divergences: vec![], findings: vec![] };
    run.findings.extend(structure::check(a, Side::A)?);
    run.findings.extend(structure::check(b, Side::B)?);
    let mut requests = 0;
    for request in &a.requests {
        match b.request(request.prompt.tag) {
            Some(other) if other.prompt.tokens == request.prompt.tokens => {
                requests += 1;
                run.request(request, other)?;
            }
            other => {
                let is = if other.is_some() { "has another prompt in B" } else { "is not in B" };
                run.find(Kind::OtherRequest, None, (request, 0), is.to_owned());
            }
        }
    }
    for request in b.requests.iter().filter(|request| a.request(request.prompt.tag).is_none()) {
        run.find(Kind::OtherRequest, None, (request, 0), "is not in A".to_owned());
    }
    run.draft()?;
    let place = |finding: &Finding| {
        let tag = |request: &RequestTrace| request.prompt.tag == finding.tag;
        (a.requests.iter().position(tag), finding.position, finding.kind)
    };
    run.findings.sort_by_key(place);
    let label = |trace: &Trace| Label {
        path: trace.path.clone(),
        settings: trace.header.settings.label(),
        machine: format!("{}, {}", trace.header.dtype, trace.header.device),
    };
    Ok(Comparison {
        verdict: verdict(&run.findings),
        a: label(a),
        b: label(b),
        notes: notes(a, b),
        requests,
        positions: run.positions,
        max_difference: Real(run.max),
        tolerance,
        judged: judge.is_some(),
        divergences: run.divergences,
        findings: run.findings,
    })
}

fn verdict(findings: &[Finding]) -> Verdict {
    let blamed = |side| findings.iter().any(|finding| finding.side == Some(side));
    match (blamed(Side::A), blamed(Side::B)) {
        (true, true) => Verdict::BothWrong,
        (true, false) => Verdict::AWrong,
        (false, true) => Verdict::BWrong,
        _ if findings.is_empty() => Verdict::Equal,
        _ if findings.iter().all(|finding| finding.kind == Kind::NearTie) => Verdict::NearTie,
        _ => Verdict::Undecided,
    }
}

/// Where the two were not asked for the same thing.
fn notes(a: &Trace, b: &Trace) -> Vec<String> {
    let (left, right) = (&a.header, &b.header);
    let mut notes = Vec::new();
    let mut note = |differs: bool, text: &str| {
        if differs {
            notes.push(text.to_owned());
        }
    };
    note(left.target.identity != right.target.identity, "the targets are not the same model");
    note(left.dtype != right.dtype, "the targets ran in different element types");
    let (left, right) = (&left.settings, &right.settings);
    note(left.processors != right.processors, "processors differ: the texts may, too");
    note(left.policy != right.policy, "policies or seeds differ: the texts may, too");
    note(left.stop_tokens != right.stop_tokens, "stop tokens differ");
    let greedy = left.processors.is_greedy() && left.policy.is_lossless();
    let keyed = |settings: &Settings| matches!(settings.policy, crate::decode::policy::Policy::Keyed { .. });
    note(!greedy && !keyed(left), "under this policy the text depends on the draft: other tokens are no fault");
    notes
}

pub(super) struct Run<'a, 'j> {
    pub(super) a: &'a Trace,
    pub(super) b: &'a Trace,
    pub(super) judge: Option<&'a Judge<'j>>,
    tolerance: Tolerance,
    positions: usize,
    max: f64,
    divergences: Vec<Divergence>,
    findings: Vec<Finding>,
}

impl Run<'_, '_> {
    pub(super) fn find(
        &mut self,
        kind: Kind,
        side: Option<Side>,
        (request, position): (&RequestTrace, usize),
        text: String,
    ) {
        self.findings.push(Finding { kind, side, tag: request.prompt.tag, position, line: None, text });
    }

    /// Aligns one request.
    fn request(&mut self, a: &RequestTrace, b: &RequestTrace) -> Result<()> {
        let begin = a.prompt.tokens.len();
        let at = |request: &RequestTrace, position| request.tokens.iter().position(|token| token.position == position);
        let mut common = Vec::new();
        let mut parts = None;
        for position in begin.. {
            let (Some(left), Some(right)) = (at(a, position), at(b, position)) else { break };
            common.push((&a.tokens[left], &b.tokens[right]));
            if a.tokens[left].token != b.tokens[right].token {
                parts = Some(position);
                break;
            }
        }
        let end = begin + common.len();
        if parts.is_none() && a.prompt.limit == b.prompt.limit && at(a, end).is_some() != at(b, end).is_some() {
            let shorter = if at(a, end).is_none() { "A" } else { "B" };
            let text = format!("{shorter} has no token here, and the other has");
            self.find(Kind::MissingPosition, None, (a, end), text);
        }
        let reference = match self.judge {
            Some(judge) if !common.is_empty() => judge.rows(&a.before(end - 1), begin - 1)?,
            _ => Vec::new(),
        };
        let mut told = [false; 3];
        for (index, &(left, right)) in common.iter().enumerate() {
            let (left_row, right_row) = (self.a.row(left)?, self.b.row(right)?);
            let difference = metrics::difference(&left_row, &right_row);
            self.positions += 1;
            self.max = self.max.max(difference.max.0);
            let reference = reference.get(index).map(Vec::as_slice);
            let sides = [(Side::A, a, left, &left_row), (Side::B, b, right, &right_row)];
            for (side, request, token, row) in sides {
                if let Some(reference) = reference.filter(|_| !told[side as usize]) {
                    told[side as usize] = self.against_reference(side, request, token, row, reference)?;
                }
            }
            if difference.max.0 > self.tolerance.rows && !told.contains(&true) {
                let text = format!(
                    "rows differ by up to {:.3e} (token {}), allowed is {:.1e}",
                    difference.max.0, difference.token, self.tolerance.rows
                );
                told[2] = true;
                self.find(Kind::Logits, None, (a, left.position), text);
            }
            if left.token != right.token {
                self.part((a, left, &left_row), (b, right, &right_row), difference, reference)?;
            }
        }
        Ok(())
    }

    /// Holds a recorded row against the target's own; says whether they differ.
    fn against_reference(
        &mut self,
        side: Side,
        request: &RequestTrace,
        token: &TokenRecord,
        row: &[f64],
        reference: &[f64],
    ) -> Result<bool> {
        let difference = metrics::difference(reference, row);
        let position = token.position;
        let before = request.before(position);
        let Some(judge) = self.judge else { return Ok(false) };
        if difference.max.0 <= self.tolerance.rows {
            self.name_row(judge, side, request, token, &before)?;
            return Ok(false);
        }
        let apart = format!("the row is off by up to {:.3e} (token {})", difference.max.0, difference.token);
        let round = request.round(token.round).filter(|round| round.committed <= before.len() && round.committed > 0);
        // A row that was rounded when it was recorded is named by what is wrong inside the trace.
        let rounded = self.findings.iter().any(|finding| {
            let here = (finding.tag, finding.position) == (token.tag, position);
            finding.side == Some(side) && here && finding.kind == Kind::StoragePrecision
        });
        let (kind, text) = match round {
            _ if rounded => (Kind::Logits, "it was rounded when it was recorded".to_owned()),
            None => (Kind::Prefill, "the prompt's last row is not the target's".to_owned()),
            Some(round) => {
                match judge.explain(&before[..round.committed], round, token.slot, row, self.tolerance.rows)? {
                    Some(named) => named,
                    None => return Ok(false),
                }
            }
        };
        self.find(kind, Some(side), (request, position), format!("{apart}: {text}"));
        Ok(true)
    }

    /// Where a sound row does not choose its token, says which node's row does.
    fn name_row(
        &mut self,
        judge: &Judge<'_>,
        side: Side,
        request: &RequestTrace,
        token: &TokenRecord,
        before: &[u32],
    ) -> Result<()> {
        let here = |finding: &Finding| {
            let place = (finding.side, finding.tag, finding.position);
            finding.kind == Kind::WrongChoice && place == (Some(side), token.tag, token.position)
        };
        let Some(index) = self.findings.iter().position(here) else { return Ok(()) };
        let Some(round) = request.round(token.round) else { return Ok(()) };
        let settings = &self.trace(side).header.settings;
        let key = request.prompt.key;
        let chooses =
            |row: &[f64]| choice_of(settings, key, row, before, token.position, token.token) == Some(token.token);
        let committed = &before[..round.committed.min(before.len())];
        if let Some(slot) = judge.slot_that(committed, round, &chooses)? {
            let finding = &mut self.findings[index];
            finding.kind = Kind::WrongRow;
            finding.text += &format!("; the row of slot {slot} would");
        }
        Ok(())
    }

    fn trace(&self, side: Side) -> &Trace {
        match side {
            Side::A => self.a,
            Side::B => self.b,
        }
    }

    /// The first position where tokens differ.
    fn part(
        &mut self,
        (a, left, left_row): (&RequestTrace, &TokenRecord, &[f64]),
        (b, right, right_row): (&RequestTrace, &TokenRecord, &[f64]),
        difference: Difference,
        reference: Option<&[f64]>,
    ) -> Result<()> {
        let position = left.position;
        let before = a.before(position);
        let choice = |token: &TokenRecord, row: &[f64]| Choice {
            token: token.token,
            top: token.top.clone(),
            margin: Real(metrics::margin(row)),
            source: token.source,
            round: token.round,
            slot: token.slot,
            depth: token.depth,
            cache_length: token.cache_length,
        };
        // Without the target, each row must at least allow the other's choice.
        let (for_a, for_b) = (reference.unwrap_or(left_row), reference.unwrap_or(right_row));
        let opinion = |trace: &Trace, key, row: &[f64], token: u32| {
            plausible(&trace.header.settings, key, row, &before, (position, token), self.tolerance.near_tie)
        };
        let a_right = opinion(self.a, a.prompt.key, for_a, left.token);
        let b_right = opinion(self.b, b.prompt.key, for_b, right.token);
        let same = |x: &Trace, y: &Trace| {
            let (x, y) = (&x.header.settings, &y.header.settings);
            x.processors == y.processors && x.policy == y.policy
        };
        let decided =
            choice_of(&self.a.header.settings, a.prompt.key, left_row, &before, position, left.token).is_some();
        let both = [(left.token, for_b, self.b), (right.token, for_a, self.a)];
        let tie = same(self.a, self.b)
            && a.prompt.key == b.prompt.key
            && decided
            && both.iter().all(|(token, row, trace)| opinion(trace, a.prompt.key, row, *token));
        let verdict = match (a_right, b_right) {
            _ if reference.is_none() && !tie => Verdict::Undecided,
            (true, true) if tie => Verdict::NearTie,
            (true, true) => Verdict::Undecided,
            (true, false) => Verdict::BWrong,
            (false, true) => Verdict::AWrong,
            (false, false) => Verdict::BothWrong,
        };
        let text = format!("A has token {}, B has token {}", left.token, right.token);
        let blamed: &[Option<Side>] = match verdict {
            Verdict::AWrong => &[Some(Side::A)],
            Verdict::BWrong => &[Some(Side::B)],
            Verdict::BothWrong => &[Some(Side::A), Some(Side::B)],
            _ => &[None],
        };
        let kind = if verdict == Verdict::NearTie { Kind::NearTie } else { Kind::Token };
        blamed.iter().for_each(|&side| self.find(kind, side, (a, position), text.clone()));
        let reference = reference.map(|row| Reference {
            token: choice_of(&self.a.header.settings, a.prompt.key, row, &before, position, left.token),
            top: metrics::top(row, left.top.len()),
            margin: Real(metrics::margin(row)),
        });
        let (tag, a, b) = (a.prompt.tag, choice(left, left_row), choice(right, right_row));
        self.divergences.push(Divergence { tag, position, a, b, difference, reference, verdict });
        Ok(())
    }
}

/// Whether a row allows a token, when it and the row's own choice are moved towards each other by half of `bound` each.
/// That is right for every processor: a token may come into the nucleus, and another may leave it.
fn plausible(
    settings: &Settings,
    key: u64,
    row: &[f64],
    context: &[u32],
    (position, token): (usize, u32),
    bound: f64,
) -> bool {
    let Some(own) = choice_of(settings, key, row, context, position, token) else {
        // Chance decides: the token must be possible.
        let mut row = row.to_vec();
        settings.processors.apply(&mut row, context.iter().copied());
        return row.get(token as usize).is_some_and(|&logit| logit > f64::NEG_INFINITY);
    };
    if own == token || !settings.policy.is_lossless() {
        return true;
    }
    let mut moved = row.to_vec();
    let Some(logit) = moved.get_mut(token as usize) else { return false };
    *logit += bound / 2.0;
    moved[own as usize] -= bound / 2.0;
    choice_of(settings, key, &moved, context, position, token) == Some(token)
}
