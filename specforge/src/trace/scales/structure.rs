//! What is wrong inside one trace of scales, without asking anybody.

use super::file::{ImagesTrace, ScaleTrace};
use super::finding::{ScaleFinding, ScaleKind};
use crate::decode::scales::{ScaleRecord, Source};
use crate::trace::finding::Side;

/// Everything wrong with a trace, in the order of its images.
pub fn check(trace: &ScaleTrace, side: Side) -> Vec<ScaleFinding> {
    trace.batches.iter().flat_map(|batch| of_images(trace, batch, side)).collect()
}

fn of_images(trace: &ScaleTrace, batch: &ImagesTrace, side: Side) -> Vec<ScaleFinding> {
    let header = &trace.header;
    let first = batch.images.images.first().copied().unwrap_or_default();
    let finding = |kind: ScaleKind, scale: usize, text: String| ScaleFinding {
        kind,
        side: Some(side),
        image: first,
        scale,
        position: None,
        text,
    };
    let scales = header.patch_nums.len();
    let end_of = |scale: usize| header.patch_nums.iter().take(scale + 1).map(|side| side * side).sum::<i64>();
    let mut findings = Vec::new();
    let (mut expected, mut before): (usize, Option<&ScaleRecord>) = (0, None);
    for line in &batch.scales {
        let record = &line.scale;
        let scale = record.scale;
        if scale > expected {
            let text = format!("scale {scale} follows: {expected} is missing");
            findings.push(finding(ScaleKind::MissingScale, expected, text));
        } else if scale < expected {
            findings.push(finding(ScaleKind::DuplicateScale, scale, format!("scale {scale} is there twice")));
        }
        expected = scale + 1;
        if let Some(before) =
            before.filter(|before| before.round == record.round && before.source == Source::Correction)
        {
            let text = format!(
                "round {}: the draft of scale {} was not kept, and scale {scale} stands behind it",
                record.round, before.scale
            );
            findings.push(finding(ScaleKind::BehindRejected, scale, text));
        }
        before = Some(record);
        // The pass that decided this scale read it, and perhaps others behind it.
        let (held, want) = (record.target_cache, end_of(scale));
        let whole = (scale..scales).any(|last| end_of(last) == held);
        if record.source != Source::Refiner && !whole {
            let text = format!("the target held {held} tokens; scale {scale} and all before it are {want}");
            findings.push(finding(ScaleKind::CacheLength, scale, text));
        }
        let weight = header.sampling.weight(scale, scales);
        if (record.cfg_weight - weight).abs() > 1e-12 * weight.abs().max(1.0) {
            let text = format!("guidance has the weight {}; that of scale {scale} is {weight}", record.cfg_weight);
            findings.push(finding(ScaleKind::GuidanceWeight, scale, text));
        }
        for ((map, best), &image) in line.map.iter().zip(&line.best).zip(&batch.images.images) {
            let wrong = map.iter().zip(best).enumerate().find(|(_, (token, best))| token != best);
            if let (true, Some((position, (token, best)))) = (header.is_exact, wrong) {
                let text = format!("position {position} has token {token}; its logits and noise choose {best}");
                let wrong = finding(ScaleKind::WrongChoice, scale, text);
                findings.push(ScaleFinding { image, position: Some(position), ..wrong });
            }
        }
    }
    if expected < scales {
        let text = format!("ends before scale {expected}; there are {scales}");
        findings.push(finding(ScaleKind::MissingScale, expected, text));
    }
    findings
}
