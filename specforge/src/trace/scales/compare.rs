//! Aligns two traces of scales by image, scale and position, and says where they part and which of them is wrong.

use std::fmt::Write;

use serde::Serialize;

use super::file::{ScaleLine, ScaleTrace};
use super::finding::{ScaleFinding, ScaleKind};
use super::judge::ScaleJudge;
use super::structure;
use crate::decode::Tolerance;
use crate::decode::scales::Source;
use crate::error::Result;
use crate::trace::compare::Verdict;
use crate::trace::finding::Side;
use crate::trace::metrics::{Real, worst};

/// One side of a divergence.
#[derive(Debug, Clone, Serialize)]
pub struct ScaleChoice {
    /// The token.
    pub token: i64,
    /// Distance of the two largest scores.
    pub margin: Real,
    /// Who decided the scale.
    pub source: Source,
    /// In which round.
    pub round: usize,
}

/// Where an image's maps part for the first time.
#[derive(Debug, Clone, Serialize)]
pub struct ScaleDivergence {
    /// Number of the image.
    pub image: u64,
    /// Scale, from 0.
    pub scale: usize,
    /// Position in it, row by row.
    pub position: usize,
    /// The first trace's choice.
    pub a: ScaleChoice,
    /// The second's.
    pub b: ScaleChoice,
    /// What the target chooses there, where it was asked, and by how much.
    pub reference: Option<(i64, Real)>,
}

/// The outcome.
#[derive(Debug, Clone, Serialize)]
pub struct ScaleComparison {
    /// Who is wrong.
    pub verdict: Verdict,
    /// How each trace was decoded, in words.
    pub settings: [String; 2],
    /// Images in both.
    pub images: usize,
    /// Scales of them that were compared, each up to the first difference.
    pub scales: usize,
    /// Largest difference of digests of logits there.
    pub max_difference: Real,
    /// How far logits and tokens may be apart.
    pub tolerance: Tolerance,
    /// Whether the target was asked.
    pub judged: bool,
    /// Where images part, one for each that does.
    pub divergences: Vec<ScaleDivergence>,
    /// Everything wrong, first things first.
    pub findings: Vec<ScaleFinding>,
}

/// Compares two traces; a judge says who is wrong.
pub fn compare(a: &ScaleTrace, b: &ScaleTrace, judge: Option<&ScaleJudge<'_>>) -> Result<ScaleComparison> {
    let tolerance = Tolerance::of(&a.header.dtype).or(Tolerance::of(&b.header.dtype));
    let mut findings = structure::check(a, Side::A);
    findings.extend(structure::check(b, Side::B));
    if let Some(judge) = judge {
        findings.extend(judge.check(a, Side::A)?);
        findings.extend(judge.check(b, Side::B)?);
    }
    let mut comparison = ScaleComparison {
        verdict: Verdict::Equal,
        settings: [settings(a), settings(b)],
        images: 0,
        scales: 0,
        max_difference: Real(0.0),
        tolerance,
        judged: judge.is_some(),
        divergences: Vec::new(),
        findings,
    };
    if a.header.sampling != b.header.sampling || a.header.patch_nums != b.header.patch_nums {
        let text = format!("the traces are of other settings: {} and {}", settings(a), settings(b));
        comparison.push(ScaleKind::OtherImages, 0, 0, None, text);
    }
    for (place, row, number) in images_of(a) {
        let Some((other, other_row, _)) = images_of(b).find(|(.., other)| *other == number) else {
            comparison.push(ScaleKind::OtherImages, number, 0, None, "is in the first trace alone".to_owned());
            continue;
        };
        let label = |trace: &ScaleTrace, place: usize, row: usize| trace.batches[place].images.labels[row];
        if label(a, place, row) != label(b, other, other_row) {
            comparison.push(
                ScaleKind::OtherImages,
                number,
                0,
                None,
                "has another label in the second trace".to_owned(),
            );
            continue;
        }
        comparison.images += 1;
        comparison.image(number, (a, place, row), (b, other, other_row), judge)?;
    }
    for (.., number) in images_of(b).filter(|(.., number)| !images_of(a).any(|(.., other)| other == *number)) {
        comparison.push(ScaleKind::OtherImages, number, 0, None, "is in the second trace alone".to_owned());
    }
    comparison.findings.sort_by_key(|finding| (finding.image, finding.scale, finding.kind));
    comparison.verdict = comparison.verdict();
    Ok(comparison)
}

/// Place of the batch, row in it, and number of every image of a trace.
fn images_of(trace: &ScaleTrace) -> impl Iterator<Item = (usize, usize, u64)> + '_ {
    trace.batches.iter().enumerate().flat_map(|(place, batch)| {
        batch.images.images.iter().enumerate().map(move |(row, &number)| (place, row, number))
    })
}

fn settings(trace: &ScaleTrace) -> String {
    let header = &trace.header;
    let sampling = &header.sampling;
    format!(
        "{}, cfg {}, top-k {}, top-p {}, temperature {}, seed {}, {} on {}",
        header.plan,
        sampling.cfg,
        sampling.top_k,
        sampling.top_p,
        sampling.temperature,
        sampling.seed,
        header.dtype,
        header.device
    )
}

impl ScaleComparison {
    fn push(&mut self, kind: ScaleKind, image: u64, scale: usize, position: Option<usize>, text: String) {
        self.findings.push(ScaleFinding { kind, side: None, image, scale, position, text });
    }

    /// Compares one image of both, up to the first scale where its maps differ.
    fn image(
        &mut self,
        number: u64,
        (a, place, row): (&ScaleTrace, usize, usize),
        (b, other, other_row): (&ScaleTrace, usize, usize),
        judge: Option<&ScaleJudge<'_>>,
    ) -> Result<()> {
        for (one, two) in a.batches[place].scales.iter().zip(&b.batches[other].scales) {
            let scale = one.scale.scale;
            if scale != two.scale.scale {
                return Ok(());
            }
            self.scales += 1;
            let both = [(&one.largest, &two.largest), (&one.logsumexp, &two.logsumexp)];
            let pairs = both.iter().flat_map(|(left, right)| left[row].iter().zip(&right[other_row]));
            let difference = pairs.map(|(left, right)| (left.0 - right.0).abs()).fold(0.0, worst);
            self.max_difference = Real(worst(self.max_difference.0, difference));
            let is_apart = difference.is_nan() || difference > self.tolerance.rows;
            if is_apart && [one, two].iter().all(|line| line.scale.source != Source::Refiner) {
                let text = format!("logits differ by {difference:.3e}");
                self.push(ScaleKind::Logits, number, scale, None, text);
            }
            let differs = |(left, right): (&i64, &i64)| left != right;
            let Some(position) = one.map[row].iter().zip(&two.map[other_row]).position(differs) else { continue };
            let choice = |line: &ScaleLine, row: usize| ScaleChoice {
                token: line.map[row][position],
                margin: line.margin[row][position],
                source: line.scale.source,
                round: line.scale.round,
            };
            let (left, right) = (choice(one, row), choice(two, other_row));
            let is_close = left.margin.0.min(right.margin.0) <= self.tolerance.near_tie;
            let kind = if is_close { ScaleKind::NearTie } else { ScaleKind::Token };
            let text = format!("position {position}: tokens {} and {}", left.token, right.token);
            self.push(kind, number, scale, Some(position), text);
            let reference = match judge {
                Some(judge) => judge.chosen(a, (place, row), (scale, position))?,
                None => None,
            };
            let reference = reference.map(|chosen| (chosen.token, Real(chosen.margin)));
            self.divergences.push(ScaleDivergence { image: number, scale, position, a: left, b: right, reference });
            return Ok(());
        }
        Ok(())
    }

    fn verdict(&self) -> Verdict {
        let blamed = |side: Side| self.findings.iter().any(|finding| finding.side == Some(side));
        let parted =
            |kind: ScaleKind| self.findings.iter().any(|finding| finding.side.is_none() && finding.kind == kind);
        match (blamed(Side::A), blamed(Side::B)) {
            (true, true) => Verdict::BothWrong,
            (true, false) => Verdict::AWrong,
            (false, true) => Verdict::BWrong,
            _ if [ScaleKind::Token, ScaleKind::Logits, ScaleKind::OtherImages].into_iter().any(parted) => {
                Verdict::Undecided
            }
            _ if parted(ScaleKind::NearTie) => Verdict::NearTie,
            _ => Verdict::Equal,
        }
    }
}

/// The outcome in words.
pub fn text(comparison: &ScaleComparison) -> String {
    let mut text = format!("{}\n", comparison.verdict.words());
    for (name, settings) in ["A", "B"].iter().zip(&comparison.settings) {
        let _ = writeln!(text, "{name}: {settings}");
    }
    let _ = writeln!(
        text,
        "{} images, {} scales alike up to the first difference; logits differ by at most {:.3e}{}",
        comparison.images,
        comparison.scales,
        comparison.max_difference.0,
        if comparison.judged { "" } else { "; the target was not asked" }
    );
    for parting in &comparison.divergences {
        let ScaleDivergence { image, scale, position, a, b, reference } = parting;
        let _ = write!(
            text,
            "image {image}, scale {scale}, position {position}: A {} ({:?}, by {:.3e}), B {} ({:?}, by {:.3e})",
            a.token, a.source, a.margin.0, b.token, b.source, b.margin.0
        );
        let _ = match reference {
            Some((token, margin)) => writeln!(text, "; the target chooses {token}, by {:.3e}", margin.0),
            None => writeln!(text),
        };
    }
    for finding in &comparison.findings {
        let side = match finding.side {
            Some(Side::A) => "A, ",
            Some(Side::B) => "B, ",
            None => "",
        };
        let (kind, image, scale) = (finding.kind.name(), finding.image, finding.scale);
        let _ = writeln!(text, "{kind}: {side}image {image}, scale {scale}: {}", finding.text);
    }
    text
}
