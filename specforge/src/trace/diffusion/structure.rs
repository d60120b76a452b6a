//! What is wrong inside one trace of a masked diffusion model, without asking anybody: the decoder's own rules, applied to what is
//! recorded, must give what is recorded.

use super::file::{Candidate, DiffusionHeader, DiffusionTrace, StepLine, TextTrace};
use super::finding::{DiffusionFinding, DiffusionKind};
use super::placed::Placed;
use crate::decode::diffusion::{Cache, Remasking, TokenSkip};
use crate::trace::finding::Side;
use crate::trace::metrics::Real;

/// How far recorded sums in float64 may be from what they are computed from here, in another order.
const ROUNDING: f64 = 1e-9;

/// Everything wrong with a trace, in the order of its texts and passes.
pub fn check(trace: &DiffusionTrace, side: Side) -> Vec<DiffusionFinding> {
    let of_text = |text| Walk::new(&trace.header, text, side).run();
    trace.texts.iter().flat_map(of_text).collect()
}

/// A text as its passes make it.
struct Walk<'a> {
    header: &'a DiffusionHeader,
    text: &'a TextTrace,
    side: Side,
    /// Prompt and answer so far.
    ids: Vec<i64>,
    /// The pass before, of the same block.
    before: Option<&'a StepLine>,
    /// Number of the cache of the block before.
    cache: Option<u64>,
    findings: Vec<DiffusionFinding>,
}

impl<'a> Walk<'a> {
    fn new(header: &'a DiffusionHeader, text: &'a TextTrace, side: Side) -> Self {
        let mut ids: Vec<i64> = text.text.prompt.iter().map(|&token| i64::from(token)).collect();
        ids.resize(ids.len() + header.options.length, header.mask);
        Self { header, text, side, ids, before: None, cache: None, findings: Vec::new() }
    }

    fn run(mut self) -> Vec<DiffusionFinding> {
        let (mut block, mut step) = (0, 0);
        for line in &self.text.steps {
            self.order(line, (block, step));
            if line.step == 0 {
                self.cache = self.before.and_then(|before| before.cache).map(|cache| cache.number).or(self.cache);
                self.before = None;
            }
            self.tokens(line);
            self.passes(line);
            self.skips(line);
            self.rows(line);
            self.transfers(line);
            self.before = Some(line);
            (block, step) = if line.masks_left == 0 { (line.block + 1, 0) } else { (line.block, line.step + 1) };
        }
        if step > 0 {
            let left = self.before.map_or(0, |line| line.masks_left);
            let words = format!("the text ends with {left} masks in the block");
            self.find(DiffusionKind::MasksLeft, (block, step - 1), None, words);
        }
        self.findings
    }

    fn find(
        &mut self,
        kind: DiffusionKind,
        (block, step): (usize, usize),
        position: Option<usize>,
        words: impl Into<String>,
    ) {
        let (side, text) = (Some(self.side), self.text.text.text);
        self.findings.push(DiffusionFinding { kind, side, text, block, step, position, words: words.into() });
    }

    /// Passes follow each other, and a block begins where the one before it is known.
    fn order(&mut self, line: &StepLine, (block, step): (usize, usize)) {
        let here = (line.block, line.step);
        if here == (block, step) {
            return;
        }
        if step > 0 && here == (block + 1, 0) {
            let left = self.before.map_or(0, |line| line.masks_left);
            let words = format!("block {} begins, and {left} masks are left in this one", block + 1);
            self.find(DiffusionKind::MasksLeft, (block, step - 1), None, words);
            return;
        }
        let words = format!("pass {} of block {} follows; expected pass {step} of block {block}", here.1, here.0);
        self.find(DiffusionKind::MissingStep, here, None, words);
    }

    /// What is known stays, and what becomes known is told.
    fn tokens(&mut self, line: &StepLine) {
        let (here, mask) = ((line.block, line.step), self.header.mask);
        let (start, count) = line.before.place();
        let known = Placed::new(start, self.ids.get(start..start + count).unwrap_or_default().to_vec());
        let changed = known.beside(&line.before).ok().and_then(|mut pairs| pairs.find(|(_, was, is)| was != is));
        if let Some((position, was, is)) = changed {
            let words = format!("position {position} was {was} behind the pass before, and is {is}");
            self.find(DiffusionKind::KnownChanged, here, Some(position), words);
        }
        let masked = line.before.each().filter(|(_, token)| **token == mask).map(|(position, _)| position);
        if !masked.eq(line.candidates.iter().map(|candidate| candidate.position)) {
            let words = format!("{} candidates are not the masked positions of the block", line.candidates.len());
            self.find(DiffusionKind::Candidates, here, None, words);
        }
        let expected = |position: usize, was: i64| match line.candidate(position) {
            Some(candidate) if line.transferred.contains(&position) => candidate.token,
            _ => was,
        };
        let pairs = line.before.beside(&line.after).into_iter().flatten();
        let wrong = pairs.map(|(position, &was, &is)| (position, expected(position, was), is));
        if let Some((position, expected, is)) = wrong.into_iter().find(|(_, expected, is)| expected != is) {
            let words = format!("position {position} is {is} behind the pass; what is told makes it {expected}");
            self.find(DiffusionKind::KnownChanged, here, Some(position), words);
        }
        for (position, &token) in line.after.each() {
            if let Some(known) = self.ids.get_mut(position) {
                *known = token;
            }
        }
    }

    /// Positions that a pass runs on, and keys and values that it reads.
    fn passes(&mut self, line: &StepLine) {
        let (here, options) = ((line.block, line.step), &self.header.options);
        let origin = line.before.place().0.saturating_sub(self.header.shift);
        let view = match options.cache {
            _ if line.step == 0 => (0, self.ids.len()),
            Cache::None => (0, self.ids.len()),
            Cache::Prefix => (origin, self.ids.len() - origin),
            Cache::Dual => (origin, options.block + self.header.shift),
        };
        let words = |(first, count): (usize, usize)| format!("{count} rows from position {first}");
        if line.view != view {
            let words = format!("the pass ran on {}; its cache leaves it {}", words(line.view), words(view));
            self.find(DiffusionKind::View, here, None, words);
        }
        let passes = line.step as u64 + 1;
        let problem = match (options.cache, line.cache) {
            (Cache::None, None) => None,
            (Cache::None, Some(_)) => Some("the pass left a cache, and none was asked for".to_owned()),
            (_, None) => Some("the pass left no cache".to_owned()),
            (_, Some(cache)) if cache.passes != passes => {
                let others = cache.passes.saturating_sub(passes);
                Some(format!("{} passes have written to the cache, {others} of them of another decode", cache.passes))
            }
            (_, Some(cache)) => match self.before.and_then(|before| before.cache) {
                Some(before) if before.number != cache.number => {
                    Some(format!("the cache is number {}, that of the pass before {}", cache.number, before.number))
                }
                None if line.step == 0 && self.cache == Some(cache.number) => {
                    Some(format!("the cache, number {}, is that of the block before", cache.number))
                }
                _ => None,
            },
        };
        if let Some(problem) = problem {
            self.find(DiffusionKind::CacheIdentity, here, None, problem);
        }
    }

    /// What is compared, which rows are skipped, and where those stand that are not.
    fn skips(&mut self, line: &StepLine) {
        let here = (line.block, line.step);
        let (Some(skip), Some(similarity), Some(active)) = (self.header.options.skip, &line.similarity, &line.active)
        else {
            return;
        };
        if let Some((before, now)) = line.compared.filter(|(before, now)| before != now) {
            let words = format!("states from position {before} on were compared with those from {now} on");
            self.find(DiffusionKind::OtherOrigin, here, None, words);
        }
        let stands = active.each().filter(|(_, active)| **active).map(|(position, _)| position as i64);
        let stands: Vec<i64> = stands.collect();
        let turned = line.turned.as_deref().unwrap_or_default();
        if stands != turned {
            let wrong = stands.iter().zip(turned).find(|(stands, turned)| stands != turned);
            let (position, words) = match wrong {
                Some((stands, turned)) => (
                    usize::try_from(*stands).ok(),
                    format!("the row of position {stands} was turned as one of position {turned}"),
                ),
                None => (None, format!("{} rows were turned of those that ran", turned.len())),
            };
            self.find(DiffusionKind::Positions, here, position, words);
        }
        if is_narrow(similarity) {
            let words = "every cosine is a number of bfloat16, which has none between 0.996 and 1";
            self.find(DiffusionKind::SimilarityPrecision, here, None, words);
        }
        let Ok(rows) = similarity.beside(active) else {
            self.find(DiffusionKind::View, here, None, "cosines and skipped rows are of other positions");
            return;
        };
        for (position, cosines, active) in rows {
            let Some(skips) = self.skips_row(&skip, line.step, position, cosines) else { continue };
            if skips == *active {
                let is = if *active { "ran all layers" } else { "was skipped" };
                let mean = mean(cosines);
                let words =
                    format!("position {position} {is}; its cosines, {mean:.6} on average, say otherwise: {skip}");
                self.find(DiffusionKind::SkipRule, here, Some(position), words);
                break;
            }
        }
    }

    /// Whether the rule skips a row; nothing where rounding decides.
    fn skips_row(&self, skip: &TokenSkip, step: usize, position: usize, cosines: &[Real]) -> Option<bool> {
        let before = self.before?;
        let was_skipped = before.active.as_ref().and_then(|active| active.at(position)) == Some(&false);
        if skip.forces(step) || was_skipped || before.transferred.contains(&position) {
            return Some(false);
        }
        let least = cosines.iter().map(|cosine| cosine.0).fold(f64::INFINITY, f64::min);
        let mean = mean(cosines);
        let is_close = |one: f64, other: f64| (one - other).abs() <= ROUNDING;
        // No rounding is needed for a threshold of 1, which nothing is above.
        if (is_close(mean, skip.threshold) && skip.threshold < 1.0) || is_close(least, skip.outlier) {
            return None;
        }
        Some(mean > skip.threshold && skip.threshold < 1.0 && least >= skip.outlier)
    }

    /// Rows of logits: they are whole, and those of skipped rows are what they were.
    fn rows(&mut self, line: &StepLine) {
        let (here, options) = ((line.block, line.step), &self.header.options);
        let is_whole = |candidate: &&Candidate| {
            let Candidate { confidence, logit, logsumexp, .. } = candidate;
            (confidence.0 - (logit.0 - logsumexp.0).exp()).abs() <= ROUNDING.max(1e-12)
        };
        let partial = line.candidates.iter().find(|candidate| !is_whole(candidate));
        if let (Remasking::Confidence, Some(Candidate { position, confidence, logit, logsumexp, .. })) =
            (options.remasking, partial)
        {
            let whole = (logit.0 - logsumexp.0).exp();
            let words =
                format!("position {position}: logits of the row give {whole:.6}, the model said {:.6}", confidence.0);
            self.find(DiffusionKind::PartialRow, here, Some(*position), words);
        }
        let (Some(active), Some(before)) = (&line.active, self.before) else { return };
        if options.guidance > 0.0 {
            // The rows without the prompt may have run.
            return;
        }
        let skipped = active.each().filter(|(_, active)| !**active).map(|(position, _)| position + self.header.shift);
        let pair = |position| Some((before.candidate(position)?, line.candidate(position)?));
        // In a random order, what the rule goes by is drawn anew.
        let of = |candidate: &Candidate| (candidate.token, candidate.logit, candidate.logsumexp);
        let changed = skipped.filter_map(pair).find(|(was, is)| of(was) != of(is));
        if let Some((was, is)) = changed {
            let words = format!(
                "the row that decides position {} was skipped, and its logits changed: token {} by {:.6} was token {} by {:.6}",
                is.position, is.token, is.confidence.0, was.token, was.confidence.0
            );
            self.find(DiffusionKind::SkippedChanged, here, Some(is.position), words);
        }
    }

    /// The rule, applied to what is recorded, chooses what is recorded.
    fn transfers(&mut self, line: &StepLine) {
        let rule = &self.header.options.rule;
        let confidence: Vec<f64> = line.candidates.iter().map(|candidate| candidate.confidence.0).collect();
        let quota = rule.quota(self.header.options.block, line.step);
        let chosen = rule.select(&confidence, quota);
        let chosen: Vec<usize> =
            chosen.iter().filter_map(|&place| line.candidates.get(place)).map(|at| at.position).collect();
        if chosen != line.transferred {
            let words = format!("positions {:?} became known; the rule {rule} chooses {chosen:?}", line.transferred);
            self.find(DiffusionKind::TransferRule, (line.block, line.step), None, words);
        }
    }
}

fn mean(cosines: &[Real]) -> f64 {
    cosines.iter().map(|cosine| cosine.0).sum::<f64>() / cosines.len().max(1) as f64
}

/// Whether every cosine is a number of bfloat16, and enough of them are telling: 1 is one in any type.
fn is_narrow(similarity: &Placed<Vec<Real>>) -> bool {
    let telling =
        similarity.each().flat_map(|(_, cosines)| cosines).map(|cosine| cosine.0).filter(|cosine| *cosine != 1.0);
    let narrow: Vec<bool> = telling.map(|cosine| half::bf16::from_f64(cosine).to_f64() == cosine).collect();
    narrow.len() >= 4 && narrow.iter().all(|narrow| *narrow)
}
