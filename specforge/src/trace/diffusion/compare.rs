//! Aligns two traces of a masked diffusion model by text, block and pass, and says which field differs first and which of them left
//! the path of the exact decoder.

use serde::Serialize;
use serde_json::{Value, json};

use super::file::{Candidate, DiffusionTrace, StepLine, TextTrace};
use super::finding::{DiffusionFinding, DiffusionKind};
use super::judge::{DiffusionJudge, Judged, Left};
use super::placed::{OtherPlaces, Placed};
use super::structure;
use crate::decode::Tolerance;
use crate::error::{Error, Result};
use crate::trace::compare::Verdict;
use crate::trace::finding::Side;
use crate::trace::metrics::{Real, worst};

/// Where two traces of one text differ for the first time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// Number of the text.
    pub text: usize,
    /// Block of the answer, from 0.
    pub block: usize,
    /// Pass over it, from 0.
    pub step: usize,
    /// Name of what differs, as in the file.
    pub field: &'static str,
    /// Absolute position, where it is one.
    pub position: Option<usize>,
    /// What the first trace has.
    pub a: Value,
    /// What the second has.
    pub b: Value,
}

/// The outcome.
#[derive(Debug, Clone, Serialize)]
pub struct DiffusionComparison {
    /// Who is wrong.
    pub verdict: Verdict,
    /// How each trace was decoded, in words.
    pub settings: [String; 2],
    /// Texts in both.
    pub texts: usize,
    /// Passes of them that were compared, each text up to the first pass behind which its tokens differ.
    pub passes: usize,
    /// Largest difference of a probability or of a logarithm of a sum there.
    pub max_difference: Real,
    /// Rows that the passes of each trace left out, and all that could have been.
    pub rows_skipped: [(usize, usize); 2],
    /// How far numbers may be apart.
    pub tolerance: Tolerance,
    /// Whether the model was asked.
    pub judged: bool,
    /// The first difference of each text that has one.
    pub differences: Vec<Difference>,
    /// The first pass of each text behind which tokens differ.
    pub parted: Vec<Difference>,
    /// Where texts of each trace left the path of the exact decoder, where the model was asked.
    pub left: [Vec<Left>; 2],
    /// Everything wrong, first things first.
    pub findings: Vec<DiffusionFinding>,
}

/// Compares two traces; a judge says who left the exact path.
pub fn compare(
    a: &DiffusionTrace,
    b: &DiffusionTrace,
    judge: Option<&DiffusionJudge<'_>>,
) -> Result<DiffusionComparison> {
    if (a.header.vocabulary, a.header.mask) != (b.header.vocabulary, b.header.mask) {
        let words = |trace: &DiffusionTrace| format!("{} tokens, mask {}", trace.header.vocabulary, trace.header.mask);
        return Err(Error::Usage(format!("the traces are of other models: {}, and {}", words(a), words(b))));
    }
    let tolerance = Tolerance::of(&a.header.dtype).or(Tolerance::of(&b.header.dtype));
    let mut findings = structure::check(a, Side::A);
    findings.extend(structure::check(b, Side::B));
    let mut left = [Vec::new(), Vec::new()];
    if let Some(judge) = judge {
        for ((trace, side), left) in [(a, Side::A), (b, Side::B)].into_iter().zip(&mut left) {
            let Judged { findings: more, left: path } = judge.check(trace, side)?;
            findings.extend(more);
            *left = path;
        }
    }
    let mut comparison = DiffusionComparison {
        verdict: Verdict::Equal,
        settings: [settings(a), settings(b)],
        texts: 0,
        passes: 0,
        max_difference: Real(0.0),
        rows_skipped: [a, b].map(rows_skipped),
        tolerance,
        judged: judge.is_some(),
        differences: Vec::new(),
        parted: Vec::new(),
        left,
        findings,
    };
    for number in 0..a.texts.len().max(b.texts.len()) {
        comparison.text(number, (a, b));
    }
    comparison.findings.sort_by_key(|finding| (finding.text, finding.block, finding.step, finding.kind));
    comparison.verdict = comparison.verdict();
    Ok(comparison)
}

fn settings(trace: &DiffusionTrace) -> String {
    let header = &trace.header;
    let options = &header.options;
    let mut words = format!("{}, blocks of {}, cache {}", options.rule, options.block, options.cache.name());
    if let Some(skip) = &options.skip {
        words += &format!(", token skip {skip}");
    }
    if let Some(parallel) = &options.parallel {
        words += &format!(", exact parallel {parallel}");
    }
    if options.temperature > 0.0 {
        words += &format!(", temperature {}, seed {}", options.temperature, header.seed);
    }
    if options.guidance > 0.0 {
        words += &format!(", cfg {}", options.guidance);
    }
    let exact = if options.is_lossless() { "exact" } else { "approximate" };
    format!("{words}, {exact}, {} on {}", header.dtype, header.device)
}

/// Rows of views that were left out, and all of those that could have been.
fn rows_skipped(trace: &DiffusionTrace) -> (usize, usize) {
    let rows = trace.texts.iter().flat_map(|text| &text.steps).filter_map(|line| line.active.as_ref());
    rows.flat_map(|rows| rows.each())
        .fold((0, 0), |(skipped, all), (_, active)| (skipped + usize::from(!active), all + 1))
}

impl DiffusionComparison {
    fn text(&mut self, number: usize, (a, b): (&DiffusionTrace, &DiffusionTrace)) {
        let (Some(one), Some(two)) = (a.texts.get(number), b.texts.get(number)) else {
            let which = if a.texts.len() > number { "first" } else { "second" };
            self.other(number, format!("is in the {which} trace alone"));
            return;
        };
        if one.text.prompt != two.text.prompt {
            self.other(number, "has another prompt in the second trace".to_owned());
            return;
        }
        self.texts += 1;
        let mut first: Option<Difference> = None;
        for (left, right) in one.steps.iter().zip(&two.steps) {
            let mut fields = Fields { tolerance: self.tolerance, most: 0.0, first: None };
            // Rows of other blocks stand elsewhere in the text: there is nothing to compare.
            let parted = match fields.compare((left, right), is_alike(a, b)) {
                Ok(parted) => parted,
                Err(places) => {
                    self.other(number, places.to_string());
                    return;
                }
            };
            self.passes += 1;
            self.max_difference = Real(worst(fields.most, self.max_difference.0));
            first = first.or(fields.first);
            if let Some(parted) = parted {
                // The same rule makes other tokens of the same numbers where two of them are equal up to rounding.
                let is_tie = fields.most <= self.tolerance.near_tie && is_of_one_rule(a, b);
                self.part(number, first, parted, (left, right, is_tie));
                return;
            }
        }
        self.end(number, first, (one, two));
    }

    fn other(&mut self, text: usize, words: String) {
        self.push(DiffusionKind::OtherText, (text, 0, 0), None, words);
    }

    fn push(
        &mut self,
        kind: DiffusionKind,
        (text, block, step): (usize, usize, usize),
        position: Option<usize>,
        words: String,
    ) {
        self.findings.push(DiffusionFinding { kind, side: None, text, block, step, position, words });
    }

    /// Notes a text whose tokens differ behind a pass.
    fn part(
        &mut self,
        text: usize,
        first: Option<Difference>,
        parted: Difference,
        (a, b, is_tie): (&StepLine, &StepLine, bool),
    ) {
        let position = parted.position;
        let of = |line: &StepLine| position.and_then(|position| line.candidate(position).copied());
        let sure = |candidate: Option<Candidate>| candidate.map_or(f64::NAN, |candidate| candidate.confidence.0);
        let (one, two) = (of(a), of(b));
        let kind = if is_tie { DiffusionKind::NearTie } else { DiffusionKind::Token };
        let words = format!("tokens {} and {}, {:.4} and {:.4} probable", parted.a, parted.b, sure(one), sure(two));
        self.push(kind, (text, parted.block, parted.step), position, words);
        self.differences.push(first.unwrap_or_else(|| parted.clone()));
        self.parted.push(parted);
    }

    /// Notes a text whose tokens are the same as far as both go.
    fn end(&mut self, text: usize, first: Option<Difference>, (one, two): (&TextTrace, &TextTrace)) {
        let lengths = [one, two].map(|text| text.steps.len());
        let shorter = lengths[0].min(lengths[1]);
        if lengths[0] != lengths[1] {
            let more = if lengths[0] > shorter { one } else { two };
            let line = &more.steps[shorter];
            let words = format!("{} and {} passes were recorded", lengths[0], lengths[1]);
            self.push(DiffusionKind::Difference, (text, line.block, line.step), None, words);
        }
        if let Some(first) = first {
            let words = format!("`{}` differs, and no token does", first.field);
            self.push(DiffusionKind::Difference, (text, first.block, first.step), first.position, words);
            self.differences.push(first);
        }
    }

    fn verdict(&self) -> Verdict {
        let blamed = |side: Side| self.findings.iter().any(|finding| finding.side == Some(side));
        let of = |a: bool, b: bool| match (a, b) {
            (true, true) => Some(Verdict::BothWrong),
            (true, false) => Some(Verdict::AWrong),
            (false, true) => Some(Verdict::BWrong),
            (false, false) => None,
        };
        let [a, b] = &self.left;
        let kinds = || self.findings.iter().map(|finding| finding.kind);
        match of(blamed(Side::A), blamed(Side::B)) {
            Some(verdict) => verdict,
            None if self.findings.is_empty() => Verdict::Equal,
            None if self.judged && !kinds().any(|kind| kind == DiffusionKind::OtherText) => {
                let near = if self.parted.is_empty() { Verdict::Equal } else { Verdict::NearTie };
                of(!a.is_empty(), !b.is_empty()).unwrap_or(near)
            }
            None if kinds().all(|kind| kind == DiffusionKind::NearTie) => Verdict::NearTie,
            None => Verdict::Undecided,
        }
    }
}

/// Whether both keep the same between passes, so that passes have the same shapes.
fn is_alike(a: &DiffusionTrace, b: &DiffusionTrace) -> bool {
    let (a, b) = (&a.header.options, &b.header.options);
    (a.cache, a.skip.is_some(), a.parallel.is_some()) == (b.cache, b.skip.is_some(), b.parallel.is_some())
}

/// Whether both make the same of the same numbers.
fn is_of_one_rule(a: &DiffusionTrace, b: &DiffusionTrace) -> bool {
    let of = |trace: &DiffusionTrace| {
        let options = &trace.header.options;
        (options.rule, options.remasking, options.temperature, options.guidance, trace.header.seed)
    };
    of(a) == of(b)
}

/// The fields of one pass, in the order in which a pass comes to them.
struct Fields {
    tolerance: Tolerance,
    most: f64,
    first: Option<Difference>,
}

impl Fields {
    /// Compares all fields; gives the difference of tokens behind the pass, where there is one. `is_alike` says whether the passes
    /// should have the same shapes.
    fn compare(&mut self, (a, b): (&StepLine, &StepLine), is_alike: bool) -> Result<Option<Difference>, OtherPlaces> {
        if (a.block, a.step) != (b.block, b.step) {
            self.differ((a, b), "step", None, (json!([a.block, a.step]), json!([b.block, b.step])));
        }
        let before: Vec<_> = a.before.beside(&b.before)?.filter(|(_, one, two)| one != two).collect();
        for (position, one, two) in before {
            self.differ((a, b), "before", Some(position), (json!(one), json!(two)));
        }
        if a.logits != b.logits {
            self.differ((a, b), "logits", None, (json!(a.logits), json!(b.logits)));
        }
        if is_alike {
            self.shapes(a, b);
        }
        self.skips(a, b)?;
        self.candidates(a, b);
        if a.transferred != b.transferred {
            self.differ((a, b), "transferred", None, (json!(a.transferred), json!(b.transferred)));
        }
        let mut parted = None;
        for (position, one, two) in a.after.beside(&b.after)?.filter(|(_, one, two)| one != two) {
            parted.get_or_insert_with(|| difference((a, b), "after", Some(position), (json!(one), json!(two))));
        }
        Ok(parted)
    }

    fn differ(
        &mut self,
        pair: (&StepLine, &StepLine),
        field: &'static str,
        position: Option<usize>,
        values: (Value, Value),
    ) {
        self.first.get_or_insert_with(|| difference(pair, field, position, values));
    }

    fn shapes(&mut self, a: &StepLine, b: &StepLine) {
        if a.view != b.view {
            self.differ((a, b), "view", None, (json!(a.view), json!(b.view)));
        }
        if a.cache != b.cache {
            self.differ((a, b), "cache", None, (json!(a.cache), json!(b.cache)));
        }
        if a.compared != b.compared {
            self.differ((a, b), "compared", None, (json!(a.compared), json!(b.compared)));
        }
    }

    /// What rows were compared by, and which were skipped, where both traces have it.
    fn skips(&mut self, a: &StepLine, b: &StepLine) -> Result<(), OtherPlaces> {
        if let (Some(one), Some(two)) = (&a.similarity, &b.similarity) {
            let tolerance = self.tolerance.rows;
            let apart = |one: &Vec<Real>, two: &Vec<Real>| {
                one.len() != two.len() || one.iter().zip(two).any(|(one, two)| is_apart(one.0, two.0, tolerance))
            };
            if let Some((position, one, two)) = one.beside(two)?.find(|(_, one, two)| apart(one, two)) {
                self.differ((a, b), "similarity", Some(position), (json!(one), json!(two)));
            }
        }
        if let (Some(one), Some(two)) = (&a.active, &b.active) {
            self.rows((a, b), "active", (one, two))?;
        }
        if a.turned.is_some() && b.turned.is_some() && a.turned != b.turned {
            self.differ((a, b), "turned", None, (json!(a.turned), json!(b.turned)));
        }
        Ok(())
    }

    fn rows(
        &mut self,
        pair: (&StepLine, &StepLine),
        field: &'static str,
        (one, two): (&Placed<bool>, &Placed<bool>),
    ) -> Result<(), OtherPlaces> {
        if let Some((position, one, two)) = one.beside(two)?.find(|(_, one, two)| one != two) {
            self.differ(pair, field, Some(position), (json!(one), json!(two)));
        }
        Ok(())
    }

    /// What the model has for each masked position.
    fn candidates(&mut self, a: &StepLine, b: &StepLine) {
        for one in &a.candidates {
            let position = Some(one.position);
            let Some(two) = b.candidate(one.position) else {
                self.differ((a, b), "candidates", position, (json!(one), Value::Null));
                continue;
            };
            for (field, one, two) in
                [("confidence", one.confidence, two.confidence), ("logsumexp", one.logsumexp, two.logsumexp)]
            {
                self.most = worst((one.0 - two.0).abs(), self.most);
                if is_apart(one.0, two.0, self.tolerance.rows) {
                    self.differ((a, b), field, position, (json!(one), json!(two)));
                }
            }
            if one.token != two.token {
                self.differ((a, b), "token", position, (json!(one.token), json!(two.token)));
            }
        }
        let more = b.candidates.iter().find(|two| a.candidate(two.position).is_none());
        if let Some(two) = more {
            self.differ((a, b), "candidates", Some(two.position), (Value::Null, json!(two)));
        }
    }
}

fn difference(
    (line, _): (&StepLine, &StepLine),
    field: &'static str,
    position: Option<usize>,
    (a, b): (Value, Value),
) -> Difference {
    Difference { text: line.text, block: line.block, step: line.step, field, position, a, b }
}

fn is_apart(one: f64, other: f64, most: f64) -> bool {
    let difference = (one - other).abs();
    difference.is_nan() || difference > most
}
