//! A comparison for readers.

use std::fmt::Write;

use super::compare::{Difference, DiffusionComparison};
use super::judge::Left;
use crate::error::foreign;
use crate::trace::finding::Side;

/// Findings written out; the JSON has all.
const SHOWN: usize = 12;

/// The comparison in lines. `word` gives a token's text, where a tokenizer is there.
pub fn text(comparison: &DiffusionComparison, word: &dyn Fn(u32) -> Option<String>) -> String {
    let mut out = String::new();
    let sides = ["A", "B"].into_iter().zip(&comparison.settings);
    for ((name, settings), (skipped, rows)) in sides.zip(&comparison.rows_skipped) {
        let _ = write!(out, "{name}: {}", foreign::one_line(settings));
        let _ = match rows {
            0 => writeln!(out),
            _ => writeln!(out, "; {skipped} of {rows} rows skipped"),
        };
    }
    let _ = writeln!(
        out,
        "{} texts, {} passes up to the first other token, numbers differ by at most {:.3e} (allowed: {:e}){}",
        comparison.texts,
        comparison.passes,
        comparison.max_difference.0,
        comparison.tolerance.rows,
        if comparison.judged { "; judged by passes without a cache" } else { "; not judged: name --target" }
    );
    let both = [("first difference", &comparison.differences), ("first other token", &comparison.parted)];
    for (name, differences) in both {
        let Some(first) = differences.first() else { continue };
        difference(&mut out, name, first, word);
        if differences.len() > 1 {
            let _ = writeln!(out, "  and {} further texts", differences.len() - 1);
        }
    }
    if comparison.judged {
        for (name, left) in ["A", "B"].into_iter().zip(&comparison.left) {
            path(&mut out, name, left, word);
        }
    }
    findings(&mut out, comparison);
    let _ = writeln!(out, "verdict: {}", comparison.verdict.words());
    out
}

fn named(token: i64, word: &dyn Fn(u32) -> Option<String>) -> String {
    match u32::try_from(token).ok().and_then(word) {
        Some(text) => format!("{token} {text:?}"),
        None => token.to_string(),
    }
}

fn difference(out: &mut String, name: &str, first: &Difference, word: &dyn Fn(u32) -> Option<String>) {
    let Difference { text, block, step, field, position, a, b } = first;
    let at = position.map_or_else(String::new, |position| format!(", position {position}"));
    let _ = writeln!(out, "{name}: text {text}, block {block}, pass {step}, `{field}`{at}");
    for (name, value) in [("A", a), ("B", b)] {
        let shown = match value.as_i64().filter(|_| ["after", "before", "token"].contains(field)) {
            Some(token) => named(token, word),
            None => value.to_string(),
        };
        let _ = writeln!(out, "  {name}: {}", foreign::one_line(&shown));
    }
}

fn path(out: &mut String, name: &str, left: &[Left], word: &dyn Fn(u32) -> Option<String>) {
    let Some(first) = left.first() else {
        let _ = writeln!(out, "{name} stays on the path of the exact decoder");
        return;
    };
    let Left { text, block, step, transferred, exact, position, difference } = first;
    let _ = write!(
        out,
        "{name} leaves the path of the exact decoder: text {text}, block {block}, pass {step}, numbers off by {:.3e}",
        difference.0
    );
    let _ = match position {
        Some((recorded, wanted)) => writeln!(
            out,
            "\n  position {}: recorded {} ({:.4}), without a cache {} ({:.4})",
            recorded.position,
            foreign::one_line(&named(recorded.token, word)),
            recorded.confidence.0,
            foreign::one_line(&named(wanted.token, word)),
            wanted.confidence.0
        ),
        None => writeln!(out, ": {transferred:?} became known, {exact:?} without a cache"),
    };
    if left.len() > 1 {
        let _ = writeln!(out, "  and {} further texts", left.len() - 1);
    }
}

fn findings(out: &mut String, comparison: &DiffusionComparison) {
    if !comparison.findings.is_empty() {
        let _ = writeln!(out, "findings:");
    }
    for finding in comparison.findings.iter().take(SHOWN) {
        let side = match finding.side {
            Some(Side::A) => "A",
            Some(Side::B) => "B",
            None => "-",
        };
        let (kind, text, block, step) = (finding.kind.name(), finding.text, finding.block, finding.step);
        let words = foreign::one_line(&finding.words);
        let _ = writeln!(out, "  {side} {kind}, text {text}, block {block}, pass {step}: {words}");
    }
    if comparison.findings.len() > SHOWN {
        let _ = writeln!(out, "  and {} more", comparison.findings.len() - SHOWN);
    }
}
