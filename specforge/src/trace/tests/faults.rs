//! The table of seeded faults, and docs/tracing.md which shows it.

use std::fmt::Write;

use super::*;

/// Fault, what it is in words, and the kinds it may be named by: the first is what the first finding says.
const TABLE: [(Fault, &str, Kind); 28] = [
    (Fault::RowByDepth, "the row of node j is recorded for the j-th accepted token", Kind::WrongSlot),
    (Fault::NoRollback, "the target's cache keeps rejected guesses", Kind::CacheLength),
    (Fault::DoubleAdvance, "the cache counts one token too many after a round", Kind::CacheLength),
    (Fault::PromptTokenTwice, "the last prompt token is fed twice", Kind::CacheLength),
    (Fault::DroppedParent, "a node does not see its parent", Kind::Mask),
    (Fault::SeesSiblings, "a node sees its siblings", Kind::Mask),
    (Fault::PositionsWithoutDepth, "positions do not advance with depth", Kind::Positions),
    (Fault::PositionsShifted, "positions are off by one", Kind::Positions),
    (Fault::CorrectionTwice, "a correction is cached and fed again", Kind::CacheLength),
    (Fault::PendingOmitted, "the pending token is not kept in the cache", Kind::CacheLength),
    (
        Fault::CompactionOrder,
        "keys and values of the accepted path are stored in different orders",
        Kind::CacheContents,
    ),
    (Fault::CompactionByDepth, "the first nodes of the tree are kept, not the path", Kind::CacheContents),
    (Fault::CompactionOverlaps, "the accepted path overwrites itself when it is moved", Kind::CacheContents),
    (Fault::StopIgnored, "a stop token inside an accepted run does not end it", Kind::AfterEnd),
    (Fault::OneTooMany, "one guess too many is accepted", Kind::UnchosenAccepted),
    (Fault::NoiseBySlot, "noise is keyed by slot, not by position", Kind::NoisePosition),
    (Fault::ContextWithoutPath, "processors do not know of the tokens on the path", Kind::ProcessorContext),
    (Fault::RaggedLength, "a row of a batch uses another row's length", Kind::CacheContents),
    (Fault::PaddingMatches, "token 0 matches padding", Kind::WrongPath),
    (Fault::BonusFromParent, "the bonus token is chosen from another row", Kind::WrongRow),
    (Fault::RecordedHalf, "rows are recorded in float16", Kind::StoragePrecision),
    (Fault::SourceLabel, "a correction is recorded as accepted", Kind::WrongSource),
    (Fault::Untold, "a committed token is not recorded", Kind::MissingPosition),
    (Fault::DraftFeaturesShifted, "the draft reads features shifted by one", Kind::DraftScores),
    (Fault::DraftNotRolledBack, "the draft's cache is not rolled back", Kind::DraftCacheLength),
    (Fault::DraftStale, "the draft's cache holds guesses instead of what was committed", Kind::DraftTree),
    (Fault::DraftPositionsShifted, "the draft's positions are off by one", Kind::DraftTree),
    (Fault::DraftRowsMixed, "the draft's rows change places when one leaves", Kind::DraftCacheLength),
];

fn fitting<'a>(models: &'a (LlamaTarget, LlamaTarget), fault: Fault) -> Decode<'a> {
    let usual = decode(models, FORKED);
    match fault {
        Fault::NoiseBySlot => Decode { processors: Processors::at_temperature(1.0), ..usual },
        Fault::ContextWithoutPath => {
            Decode { processors: Processors { repetition_penalty: 3.0, ..Processors::default() }, ..usual }
        }
        Fault::RaggedLength | Fault::DraftRowsMixed => Decode { max_rows: 3, ..usual },
        Fault::PromptTokenTwice => Decode { max_rows: 1, ..usual },
        Fault::StopIgnored => {
            // A token that was accepted and had a successor in its round.
            let free = Decode { stop_tokens: vec![], ..usual };
            let folder = tempfile::tempdir().unwrap();
            let trace = free.trace(&folder.path().join("free"), None);
            let inner = trace.requests.iter().flat_map(|request| request.tokens.windows(2));
            let inner = inner.filter(|pair| pair[0].round == pair[1].round).map(|pair| pair[0].token);
            Decode { stop_tokens: inner.take(1).collect(), ..free }
        }
        _ => usual,
    }
}

#[test]
fn every_seeded_fault_is_found_named_and_blamed() {
    let models = models();
    let folder = tempfile::tempdir().unwrap();
    let mut rows = String::from("| seeded fault | first finding | verdict |\n|---|---|---|\n");
    let mut wrong = String::new();
    for (fault, words, kind) in TABLE {
        let decode = fitting(&models, fault);
        let a = decode.trace(&folder.path().join("a.trace"), None);
        let b = decode.trace(&folder.path().join("b.trace"), Some(fault));
        let comparison = decode.compare(&a, &b);
        let first = comparison.findings.iter().find(|finding| finding.side == Some(Side::B));
        let name = first.map_or_else(|| "nothing".to_owned(), |finding| finding.kind.name());
        println!("{fault:?} | {name} | {}", comparison.verdict.words());
        if first.map(|finding| finding.kind) != Some(kind) || comparison.verdict != Verdict::BWrong {
            let _ = writeln!(wrong, "{fault:?}: {name}, {}", comparison.verdict.words());
            for finding in comparison.findings.iter().take(4) {
                let _ = writeln!(wrong, "    {finding:?}");
            }
        }
        let _ = writeln!(rows, "| {words} | `{name}` | {} |", comparison.verdict.words());
        // The other way round the other run is to blame.
        if decode.compare(&b, &a).verdict != Verdict::AWrong {
            let _ = writeln!(wrong, "{fault:?}: not A's the other way round");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/tracing.md");
    let page = std::fs::read_to_string(path).unwrap();
    assert!(page.contains(&rows), "docs/tracing.md should have this table:\n{rows}");
}
