//! The model's own word on a trace: from each recorded state a pass over the whole text, and the step that the decoder without a
//! cache takes.

use serde::Serialize;

use super::file::{Candidate, DiffusionTrace, StepLine, TextTrace};
use super::finding::{DiffusionFinding, DiffusionKind};
use crate::decode::Tolerance;
use crate::decode::diffusion::{Keyed, Network, Step, Text, step_from};
use crate::error::{Error, Result};
use crate::trace::finding::Side;
use crate::trace::metrics::{Real, worst};

/// Who is asked.
#[derive(Clone, Copy)]
pub struct DiffusionJudge<'a> {
    /// The model of a trace.
    pub network: Network<'a>,
}

/// Where a text leaves the path of the exact decoder for the first time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Left {
    /// Number of the text.
    pub text: usize,
    /// Block of the answer, from 0.
    pub block: usize,
    /// Pass over it, from 0.
    pub step: usize,
    /// Absolute positions that became known.
    pub transferred: Vec<usize>,
    /// Those that the exact decoder makes known there.
    pub exact: Vec<usize>,
    /// The first position where the two part: what was recorded of it, and what a pass without a cache gives.
    pub position: Option<(Candidate, Candidate)>,
    /// Largest difference of a recorded probability from the pass without a cache.
    pub difference: Real,
}

/// What the model says of a trace.
#[derive(Debug, Clone, Default)]
pub struct Judged {
    /// Faults.
    pub findings: Vec<DiffusionFinding>,
    /// Where each text that leaves the exact path does so; rounding is no reason.
    pub left: Vec<Left>,
}

/// What a pass without a cache says of a recorded one.
struct Compared {
    exact: Vec<Candidate>,
    transferred: Vec<usize>,
    /// Largest difference of a logarithm of a sum.
    sums: f64,
    /// Largest difference of one of these or of a probability.
    difference: f64,
}

impl DiffusionJudge<'_> {
    /// Follows every text of a trace as far as it stays on the exact path.
    pub fn check(&self, trace: &DiffusionTrace, side: Side) -> Result<Judged> {
        let (header, network) = (&trace.header, &self.network);
        if header.mask != network.diffusion().mask || header.shift as i64 != network.shift() {
            return Err(Error::bad_file(&trace.path, "is of a model with another mask token"));
        }
        let mut judged = Judged::default();
        for text in &trace.texts {
            self.text(trace, text, side, &mut judged)?;
        }
        Ok(judged)
    }

    fn text(&self, trace: &DiffusionTrace, text: &TextTrace, side: Side, judged: &mut Judged) -> Result<()> {
        let tolerance = Tolerance::of(&trace.header.dtype).rows;
        let prompt = text.text.prompt.len();
        let mut ids: Vec<i64> = text.text.prompt.iter().map(|&token| i64::from(token)).collect();
        ids.resize(prompt + trace.header.options.length, trace.header.mask);
        for line in &text.steps {
            let compared = self.ask(trace, (&ids, prompt), text.text.key, line)?;
            let is_whole = line.view == (0, ids.len());
            let is_apart = |difference: f64| difference.is_nan() || difference > tolerance;
            if is_whole && is_apart(compared.sums) {
                let words = format!("the pass differs from one without a cache by {:.3e}", compared.sums);
                judged.findings.push(finding(DiffusionKind::WholePass, side, line, None, words));
            }
            // Where every number is that of the exact decoder up to rounding, another token is a near tie.
            if let Some(left) = compared.left(line).filter(|left| is_apart(left.difference.0)) {
                if is_whole {
                    let words = format!("{:?} became known, {:?} without a cache", left.transferred, left.exact);
                    let position = left.position.map(|(recorded, _)| recorded.position);
                    judged.findings.push(finding(DiffusionKind::LeftExactPath, side, line, position, words));
                }
                judged.left.push(left);
                return Ok(());
            }
            for (position, &token) in line.after.each() {
                if let Some(known) = ids.get_mut(position) {
                    *known = token;
                }
            }
        }
        Ok(())
    }

    /// What a pass without a cache makes of a recorded state.
    fn ask(
        &self,
        trace: &DiffusionTrace,
        (ids, prompt): (&[i64], usize),
        key: u64,
        line: &StepLine,
    ) -> Result<Compared> {
        let (network, header) = (&self.network, &trace.header);
        let text = Text { ids: ids.to_vec(), prompt };
        let mut draws = Keyed { seed: header.seed };
        let step: Step = step_from((network, &header.options), &text, (line.block, line.step), key, &mut draws)?;
        let (logit, sums) = step.rows.map(|rows| (rows.logit, rows.logsumexp)).unwrap_or_default();
        let numbers = step.tokens.iter().zip(&step.confidence).zip(logit.iter().zip(&sums));
        let exact = step.candidates.iter().zip(numbers).map(|(&position, ((&token, &sure), (&logit, &sum)))| {
            Candidate { position, token, confidence: Real(sure), logit: Real(logit), logsumexp: Real(sum) }
        });
        let exact: Vec<Candidate> = exact.collect();
        let apart = |of: fn(&Candidate) -> Real| {
            line.candidates.iter().zip(&exact).map(|(one, other)| (of(one).0 - of(other).0).abs()).fold(0.0, worst)
        };
        let sums = apart(|candidate| candidate.logsumexp);
        let difference = worst(sums, apart(|candidate| candidate.confidence));
        Ok(Compared { exact, transferred: step.transferred, sums, difference })
    }
}

impl Compared {
    /// Where a recorded pass leaves the exact path, where it does.
    fn left(&self, line: &StepLine) -> Option<Left> {
        let token = |candidates: &[Candidate], position: usize| {
            candidates.iter().find(|candidate| candidate.position == position).copied()
        };
        let known = |candidates: &[Candidate], transferred: &[usize], position: usize| {
            transferred.contains(&position).then(|| token(candidates, position).map(|candidate| candidate.token))
        };
        let both = |position: &&usize| {
            known(&line.candidates, &line.transferred, **position) != known(&self.exact, &self.transferred, **position)
        };
        let mut positions: Vec<usize> = line.transferred.iter().chain(&self.transferred).copied().collect();
        positions.sort_unstable();
        let position = *positions.iter().find(both)?;
        Some(Left {
            text: line.text,
            block: line.block,
            step: line.step,
            transferred: line.transferred.clone(),
            exact: self.transferred.clone(),
            position: token(&line.candidates, position).zip(token(&self.exact, position)),
            difference: Real(self.difference),
        })
    }
}

fn finding(
    kind: DiffusionKind,
    side: Side,
    line: &StepLine,
    position: Option<usize>,
    words: String,
) -> DiffusionFinding {
    let &StepLine { text, block, step, .. } = line;
    DiffusionFinding { kind, side: Some(side), text, block, step, position, words }
}
