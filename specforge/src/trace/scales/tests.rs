use std::fmt::Write;
use std::path::Path;

use super::*;
use crate::decode::scales::fault::{self, ScaleFault};
use crate::decode::scales::tiny::{Models, models};
use crate::decode::scales::{Gamma, Plan, Rule, ScaleDecoder, ScaleRequest, ScaleSampling};
use crate::trace::compare::Verdict;
use crate::trace::file::ModelName;
use crate::trace::finding::Side;

/// Records a decode of three images, two of them together.
fn trace(
    models: &Models,
    path: &Path,
    (draft, plan): (Option<usize>, Plan),
    sampling: ScaleSampling,
    fault: Option<ScaleFault>,
) -> ScaleTrace {
    let name = ModelName { path: "somewhere".into(), identity: None };
    let header = ScaleHeader {
        target: name.clone(),
        vae: name.clone(),
        draft: draft.map(|_| name),
        dtype: "float64".to_owned(),
        device: "cpu".to_owned(),
        sampling,
        plan: plan.to_string(),
        is_exact: plan.is_lossless(),
        patch_nums: models.target.config().patch_nums.clone(),
        vocabulary: models.target.config().vocab_size,
    };
    let mut recorder = ScaleRecorder::create(path, header).unwrap();
    let draft = draft.map(|draft| (&models.drafts[draft], plan));
    let mut decoder = ScaleDecoder::new(&models.target, &models.quantizer, draft, sampling).unwrap();
    fault::with(fault, || {
        for (labels, images) in [(&[3i64, 7][..], &[0u64, 1][..]), (&[10], &[2])] {
            recorder.images(labels, images).unwrap();
            let request = ScaleRequest { labels, images };
            decoder.decode_seen(request, &mut |seen| recorder.scale(seen)).unwrap();
        }
    });
    recorder.finish().unwrap();
    assert!(ScaleTrace::is_one(path));
    ScaleTrace::read(path).unwrap()
}

fn judge(models: &Models) -> ScaleJudge<'_> {
    ScaleJudge { target: &models.target, quantizer: &models.quantizer }
}

fn plan(gamma: usize, bonus: bool) -> Plan {
    Plan::Speculate { gamma: Gamma::Fixed(gamma), bonus, rule: Rule::Exact }
}

fn sampling() -> ScaleSampling {
    ScaleSampling { cfg: 1.5, top_k: 20, top_p: 0.95, temperature: 0.9, seed: 3 }
}

#[test]
fn sound_decodes_are_equal() {
    let models = models();
    let folder = tempfile::tempdir().unwrap();
    let alone = trace(&models, &folder.path().join("a"), (None, Plan::exact()), sampling(), None);
    for draft in 0..3 {
        for gamma in [0, 1, 3] {
            let with = trace(&models, &folder.path().join("b"), (Some(draft), plan(gamma, true)), sampling(), None);
            for judge in [None, Some(judge(&models))] {
                let comparison = compare(&alone, &with, judge.as_ref()).unwrap();
                assert_eq!(comparison.verdict, Verdict::Equal, "{}", text(&comparison));
                assert_eq!((comparison.images, comparison.scales), (3, 12));
            }
        }
    }
}

/// Each mistake, the draft and plan that show it, and what the first finding calls it.
const FAULTS: [(ScaleFault, usize, (usize, bool), ScaleKind); 7] = [
    (ScaleFault::OwnTokens, 1, (2, false), ScaleKind::OwnTokens),
    (ScaleFault::PrefixOffset, 0, (1, true), ScaleKind::PrefixOffset),
    (ScaleFault::AddedTwice, 2, (2, true), ScaleKind::Sum),
    (ScaleFault::CacheReset, 0, (1, true), ScaleKind::CacheLength),
    (ScaleFault::MaskWithoutPrefix, 0, (1, true), ScaleKind::Prefix),
    (ScaleFault::RelativeWeight, 0, (1, true), ScaleKind::GuidanceWeight),
    (ScaleFault::RejectedKept, 0, (2, true), ScaleKind::BehindRejected),
];

#[test]
fn every_seeded_fault_is_found_named_and_blamed() {
    let models = models();
    let folder = tempfile::tempdir().unwrap();
    let mut wrong = String::new();
    for (fault, draft, (gamma, bonus), kind) in FAULTS {
        let record = |name: &str, fault| {
            trace(&models, &folder.path().join(name), (Some(draft), plan(gamma, bonus)), sampling(), fault)
        };
        let (a, b) = (record("a", None), record("b", Some(fault)));
        let comparison = compare(&a, &b, Some(&judge(&models))).unwrap();
        let first = comparison.findings.iter().find(|finding| finding.side == Some(Side::B));
        if first.map(|finding| finding.kind) != Some(kind) || comparison.verdict != Verdict::BWrong {
            let _ = writeln!(wrong, "{fault:?}:\n{}", text(&comparison));
        }
        let turned = compare(&b, &a, Some(&judge(&models))).unwrap();
        if turned.verdict != Verdict::AWrong {
            let _ = writeln!(wrong, "{fault:?}: not A's the other way round");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn other_tokens_are_judged() {
    let models = models();
    let folder = tempfile::tempdir().unwrap();
    let a = trace(&models, &folder.path().join("a"), (None, Plan::exact()), sampling(), None);
    let path = folder.path().join("b");
    let _ = trace(&models, &path, (None, Plan::exact()), sampling(), None);
    // A token of the last scale of the last image, changed in the file.
    let whole = std::fs::read_to_string(&path).unwrap();
    let mut lines: Vec<serde_json::Value> = whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let place = lines.len() - 2;
    let token = lines[place]["map"][0][5].as_i64().unwrap();
    let other = (token + 1) % 32;
    lines[place]["map"][0][5] = other.into();
    lines[place]["best"][0][5] = other.into();
    let changed: String = lines.iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(&path, changed).unwrap();
    let b = ScaleTrace::read(&path).unwrap();
    let unjudged = compare(&a, &b, None).unwrap();
    assert_eq!(unjudged.verdict, Verdict::Undecided);
    let judged = compare(&a, &b, Some(&judge(&models))).unwrap();
    assert_eq!(judged.verdict, Verdict::BWrong, "{}", text(&judged));
    let parting = &judged.divergences[0];
    assert_eq!((parting.image, parting.scale, parting.position), (2, 3, 5));
    assert_eq!((parting.a.token, parting.b.token, parting.reference.unwrap().0), (token, other, token));
    let kind = judged.findings.iter().find(|finding| finding.side == Some(Side::B)).unwrap().kind;
    assert!(matches!(kind, ScaleKind::WrongChoice | ScaleKind::Sum));
}

#[test]
fn files_that_are_no_whole_trace_are_refused() {
    let models = models();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let _ = trace(&models, &path, (None, Plan::exact()), sampling(), None);
    let whole = std::fs::read_to_string(&path).unwrap();
    let refused = |text: &str, word: &str| {
        std::fs::write(&path, text).unwrap();
        let problem = ScaleTrace::read(&path).unwrap_err();
        assert!(problem.to_string().contains(word) && problem.exit_code() == 2, "{problem}");
    };
    let lines: Vec<&str> = whole.lines().collect();
    refused("", "is empty");
    refused(&lines[..lines.len() - 1].join("\n"), "not written to its end");
    refused(&whole.replacen("\"format\":1", "\"format\":9", 1), "format 9");
    refused(&format!("{whole}{}\n", lines[2]), "behind the last record");
    refused(&[lines[0], lines[2]].join("\n"), "a scale of no images");
    refused(&whole.replacen("\"vocabulary\":32", "\"vocabulary\":2", 1), "expected tokens from 0 to 1");
    refused(&whole.replacen("\"patch_nums\":[1,", "\"patch_nums\":[2,", 1), "4 positions each");
    refused(&[lines[0], "{}"].join("\n"), "a:2:");
}
