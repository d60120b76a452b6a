//! Traces of tiny models that decode: sound ones compare as they should, and every mistake of the published notebook is found, named
//! and blamed.

use std::fmt::Write;
use std::path::Path;

use tch::{Device, Kind};

use super::*;
use crate::data::{ChatTokenizer, Message};
use crate::decode::diffusion::fault::{self, DiffusionFault};
use crate::decode::diffusion::tiny::{both, model, prompt};
use crate::decode::diffusion::{Cache, Decoder, Guess, Keyed, Network, Options, Parallel, Prompt, Rule, TokenSkip};
use crate::models::{self, TargetModel};
use crate::trace::compare::Verdict;
use crate::trace::file::ModelName;
use crate::trace::finding::Side;

/// Records a decode of three texts.
fn trace(model: &dyn TargetModel, path: &Path, options: &Options, fault: Option<DiffusionFault>) -> DiffusionTrace {
    record(model, path, (&[prompt(5, 1), prompt(8, 2), prompt(6, 3)], options), fault)
}

/// Records a decode, the first two texts together.
fn record(
    model: &dyn TargetModel,
    path: &Path,
    (prompts, options): (&[Prompt], &Options),
    fault: Option<DiffusionFault>,
) -> DiffusionTrace {
    let network = Network::of(model).unwrap();
    let header = DiffusionHeader {
        target: ModelName { path: "somewhere".into(), identity: None },
        dtype: if model.kind() == Kind::Double { "float64" } else { "float32" }.to_owned(),
        device: "cpu".to_owned(),
        vocabulary: model.info().vocab_size,
        mask: network.diffusion().mask,
        shift: network.shift() as usize,
        seed: 7,
        options: options.clone(),
    };
    let mut recorder = DiffusionRecorder::create(path, header).unwrap();
    let decoder = Decoder::new(network, options.clone()).unwrap();
    fault::with(fault, || {
        for prompts in prompts.chunks(2) {
            recorder.texts(prompts).unwrap();
            decoder.decode(prompts, &mut Keyed { seed: 7 }, &mut recorder).unwrap();
        }
    });
    recorder.finish().unwrap();
    assert!(DiffusionTrace::is_one(path));
    DiffusionTrace::read(path).unwrap()
}

fn judge(model: &dyn TargetModel) -> DiffusionJudge<'_> {
    DiffusionJudge { network: Network::of(model).unwrap() }
}

fn words(comparison: &DiffusionComparison) -> String {
    text(comparison, &|_| None)
}

fn plain() -> Options {
    Options { rule: Rule::Quota { steps: 4 }, ..Options::plain(12, 4) }
}

/// Skips many rows.
fn skipping(threshold: f64) -> Options {
    let skip = TokenSkip { layer: 2, threshold, outlier: -1.0, refresh: 0 };
    Options { cache: Cache::Dual, skip: Some(skip), ..plain() }
}

#[test]
fn sound_decodes_have_no_findings_and_exact_ones_are_equal() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for model in both() {
        let model = model.as_ref();
        let judge = judge(model);
        for (temperature, guidance) in [(0.0, 0.0), (0.8, 0.0), (0.0, 0.6)] {
            let exact = Options { temperature, guidance, rule: Rule::Threshold(0.2), ..plain() };
            let a = trace(model, &path("a"), &exact, None);
            let parallel = Some(Parallel { states: 3, guess: Guess::Order });
            let b = trace(model, &path("b"), &Options { parallel, ..exact.clone() }, None);
            let comparison = compare(&a, &b, Some(&judge)).unwrap();
            assert_eq!(comparison.verdict, Verdict::Equal, "{}", words(&comparison));
            assert!(comparison.left.iter().all(Vec::is_empty) && comparison.texts == 3, "{}", words(&comparison));
        }
        for cache in [Cache::Prefix, Cache::Dual] {
            let b = trace(model, &path("b"), &Options { cache, ..plain() }, None);
            let comparison = compare(&b, &b, Some(&judge)).unwrap();
            assert_eq!(comparison.verdict, Verdict::Equal, "{}", words(&comparison));
        }
        for threshold in [-1.0, 0.3] {
            for (temperature, guidance) in [(0.0, 0.0), (0.8, 0.0), (0.0, 0.6)] {
                let options = Options { temperature, guidance, ..skipping(threshold) };
                let b = trace(model, &path("b"), &options, None);
                let comparison = compare(&b, &b, None).unwrap();
                assert_eq!(comparison.verdict, Verdict::Equal, "{}", words(&comparison));
                assert!(comparison.rows_skipped[0].0 > 0, "{}", words(&comparison));
            }
        }
    }
}

/// An approximate decode leaves the exact path behind a pass over the whole text, and is told so; the exact one stays on it.
#[test]
fn who_left_the_exact_path_is_judged() {
    let model = model(false, 3);
    let folder = tempfile::tempdir().unwrap();
    let a = trace(model.as_ref(), &folder.path().join("a"), &plain(), None);
    let b = trace(model.as_ref(), &folder.path().join("b"), &Options { cache: Cache::Dual, ..plain() }, None);
    let unjudged = compare(&a, &b, None).unwrap();
    assert_eq!(unjudged.verdict, Verdict::Undecided, "{}", words(&unjudged));
    let judged = compare(&a, &b, Some(&judge(model.as_ref()))).unwrap();
    assert_eq!(judged.verdict, Verdict::BWrong, "{}", words(&judged));
    assert!(judged.left[0].is_empty() && judged.findings.iter().all(|finding| finding.side.is_none()));
    let (left, parted) = (&judged.left[1][0], &judged.parted[0]);
    assert_eq!((left.text, left.block, left.step), (parted.text, parted.block, parted.step));
    assert!(left.step > 0, "the first pass over a block is exact");
    // Numbers differ before tokens do.
    let first = &judged.differences[0];
    assert!((first.block, first.step) <= (parted.block, parted.step) && first.field != "after");
    let said = words(&judged);
    for part in ["first difference: text 0", "first other token", "A stays on", "B leaves the path"] {
        assert!(said.contains(part), "{said}");
    }
}

/// Each mistake, what it is in words, and what the first finding calls it.
const FAULTS: [(DiffusionFault, &str, DiffusionKind); 8] = [
    (
        DiffusionFault::OtherOrigin,
        "row j of a block is compared with position j of the whole text (B1)",
        DiffusionKind::OtherOrigin,
    ),
    (DiffusionFault::LocalPositions, "heads are turned by positions within the block (B2)", DiffusionKind::Positions),
    (
        DiffusionFault::EarlyLogits,
        "a skipped row gets the logits of its early state (B3)",
        DiffusionKind::SkippedChanged,
    ),
    (DiffusionFault::NarrowCosines, "cosines are computed in bfloat16 (B4)", DiffusionKind::SimilarityPrecision),
    (DiffusionFault::OtherThreshold, "the threshold is another one than the label says (B5)", DiffusionKind::SkipRule),
    (DiffusionFault::FirstLogitsOnly, "only the first logits of a row are compared (B6)", DiffusionKind::PartialRow),
    (DiffusionFault::SharedCache, "two decodes write to one cache (B7)", DiffusionKind::CacheIdentity),
    (DiffusionFault::StepBudget, "a block ends after a fixed number of passes (B8)", DiffusionKind::MasksLeft),
];

#[test]
fn every_mistake_of_the_notebook_is_found_named_and_blamed() {
    let folder = tempfile::tempdir().unwrap();
    let (mut wrong, mut rows) =
        (String::new(), String::from("| seeded fault | first finding | verdict |\n|---|---|---|\n"));
    for (place, model) in both().iter().enumerate() {
        for (fault, name, kind) in FAULTS {
            // A threshold of 1 skips nothing, whatever the model is; one of -1 everything that may be.
            let threshold = if fault == DiffusionFault::OtherThreshold { 1.0 } else { -1.0 };
            let record =
                |name: &str, fault| trace(model.as_ref(), &folder.path().join(name), &skipping(threshold), fault);
            let (a, b) = (record("a", None), record("b", Some(fault)));
            let comparison = compare(&a, &b, Some(&judge(model.as_ref()))).unwrap();
            let first = comparison.findings.iter().find(|finding| finding.side == Some(Side::B));
            if first.map(|finding| finding.kind) != Some(kind) || comparison.verdict != Verdict::BWrong {
                let _ = writeln!(wrong, "{fault:?}:\n{}", words(&comparison));
            }
            let turned = compare(&b, &a, Some(&judge(model.as_ref()))).unwrap();
            if turned.verdict != Verdict::AWrong {
                let _ = writeln!(wrong, "{fault:?}: not A's the other way round\n{}", words(&turned));
            }
            if place == 0 {
                let _ = writeln!(rows, "| {name} | `{}` | {} |", kind.name(), comparison.verdict.words());
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/tracing.md");
    let page = std::fs::read_to_string(path).unwrap();
    assert!(page.contains(&rows), "docs/tracing.md should have this table:\n{rows}");
}

/// Traces of other blocks or other prompts have no pass in common, and are told so instead of being compared row by row.
#[test]
fn other_origins_are_refused() {
    let model = model(false, 3);
    let folder = tempfile::tempdir().unwrap();
    let a = trace(model.as_ref(), &folder.path().join("a"), &skipping(0.5), None);
    let longer = Options { block: 6, rule: Rule::Quota { steps: 6 }, ..skipping(0.5) };
    let b = trace(model.as_ref(), &folder.path().join("b"), &longer, None);
    let comparison = compare(&a, &b, None).unwrap();
    let first = &comparison.findings[0];
    assert_eq!((first.kind, comparison.verdict), (DiffusionKind::OtherText, Verdict::Undecided));
    assert!(first.words.contains("different positions") && first.words.contains("4 rows from position 5"), "{first:?}");
    assert_eq!(comparison.passes, 0);
}

#[test]
fn files_that_are_no_whole_trace_are_refused() {
    let model = model(true, 3);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let _ = trace(model.as_ref(), &path, &skipping(0.5), None);
    let whole = std::fs::read_to_string(&path).unwrap();
    let refused = |text: &str, word: &str| {
        std::fs::write(&path, text).unwrap();
        let problem = DiffusionTrace::read(&path).unwrap_err();
        assert!(problem.to_string().contains(word) && problem.exit_code() == 2, "{problem}");
    };
    let lines: Vec<&str> = whole.lines().collect();
    refused("", "is empty");
    refused(&lines[..lines.len() - 1].join("\n"), "not written to its end");
    refused(&whole.replacen("\"format\":1", "\"format\":9", 1), "format 9");
    refused(&format!("{whole}{}\n", lines[2]), "behind the last record");
    refused(&[lines[0], lines[3]].join("\n"), "there is none");
    refused(&whole.replacen("\"vocabulary\":40", "\"vocabulary\":2", 1), "expected tokens from 0 to 1");
    refused(&whole.replacen("\"block\":4", "\"block\":5", 1), "in blocks");
    refused(&whole.replacen("\"length\":12", "\"length\":12000000000", 1), "expected an answer");
    refused(&whole.replacen("\"before\":{\"origin\":5", "\"before\":{\"origin\":6", 1), "from position 5");
    refused(&[lines[0], "{}"].join("\n"), "a:2:");
}

/// Two thresholds with a rule, compared: the notebook's question. With its own rule a row is compared with another position of
/// the text, so that neither decode says anything about thresholds; with the corrected one they are compared.
fn question(
    (model, judged): (&dyn TargetModel, bool),
    folder: &Path,
    (prompts, options): (&[Prompt], &dyn Fn(f64) -> Options),
    fault: Option<DiffusionFault>,
) -> DiffusionComparison {
    let record = |name: &str, threshold| record(model, &folder.join(name), (prompts, &options(threshold)), fault);
    let (a, b) = (record("one.trace", 1.0), record("below.trace", 0.9999));
    compare(&a, &b, judged.then(|| judge(model)).as_ref()).unwrap()
}

#[test]
fn the_notebooks_question_has_an_answer() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(false, 3);
    let prompts = [prompt(5, 1), prompt(8, 2)];
    let ask = |fault| question((model.as_ref(), true), folder.path(), (&prompts, &skipping), fault);
    let faulty = ask(Some(DiffusionFault::OtherOrigin));
    assert_eq!(faulty.verdict, Verdict::BothWrong, "{}", words(&faulty));
    for side in [Side::A, Side::B] {
        let first = faulty.findings.iter().find(|finding| finding.side == Some(side)).unwrap();
        assert_eq!((first.kind, first.block, first.step), (DiffusionKind::OtherOrigin, 0, 1));
    }
    let corrected = ask(None);
    assert!(corrected.findings.iter().all(|finding| finding.side.is_none()), "{}", words(&corrected));
    assert_eq!(corrected.rows_skipped[0].0, 0);
}

/// The same on a real model, for docs/token-skip.md: `SPECFORGE_DIFFUSION_MODEL` names its folder.
#[test]
fn the_notebooks_question_on_a_real_model() {
    let Some(path) = std::env::var_os("SPECFORGE_DIFFUSION_MODEL") else {
        println!("skipped: SPECFORGE_DIFFUSION_MODEL names no model");
        return;
    };
    let path = Path::new(&path);
    let loading = models::Loading { kind: Kind::Float, device: Device::Cpu, layers: None, copies: None };
    let model = models::load_diffusion(path, &loading).unwrap();
    let tokenizer = ChatTokenizer::load(path, None).unwrap();
    let said = tokenizer.render(&[Message::new("user", "Who is Newton, physics?")], None, true).unwrap();
    let prompts = [Prompt { tokens: tokenizer.encode(&said).unwrap(), key: 0 }];
    let layer = 18 * model.info().num_layers() / 32;
    let options = |threshold: f64| Options {
        rule: Rule::Quota { steps: 8 },
        cache: Cache::Dual,
        skip: Some(TokenSkip { layer, threshold, outlier: 0.7, refresh: 0 }),
        stop_tokens: tokenizer.eos_token_ids().to_vec(),
        ..Options::plain(128, 32)
    };
    let folder = tempfile::tempdir().unwrap();
    for fault in [Some(DiffusionFault::OtherOrigin), None] {
        let comparison = question((model.as_ref(), fault.is_none()), folder.path(), (&prompts, &options), fault);
        println!("{fault:?}\n{}", text(&comparison, &|token| tokenizer.decode(&[token], false).ok()));
    }
}
