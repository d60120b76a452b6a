//! A comparison for readers.

use std::fmt::Write;

use super::compare::{Choice, Comparison, Divergence};
use super::finding::Side;
use super::metrics::Real;
use crate::error::foreign;

/// Findings written out; the JSON has all.
const SHOWN: usize = 12;

/// The comparison in lines. `word` gives a token's text, where a tokenizer is there.
pub fn text(comparison: &Comparison, word: &dyn Fn(u32) -> Option<String>) -> String {
    let mut out = String::new();
    for (name, label) in [("A", &comparison.a), ("B", &comparison.b)] {
        let _ = writeln!(
            out,
            "{name}: {} ({}; {})",
            foreign::path(&label.path),
            foreign::one_line(&label.settings),
            foreign::name(&label.machine)
        );
    }
    let _ = writeln!(
        out,
        "{} requests, {} positions, rows differ by at most {} (allowed: {:e}){}",
        comparison.requests,
        comparison.positions,
        number(comparison.max_difference),
        comparison.tolerance.rows,
        if comparison.judged { "; judged by passes without a cache" } else { "; not judged: name --target" }
    );
    for note in &comparison.notes {
        let _ = writeln!(out, "note: {}", foreign::one_line(note));
    }
    if let Some(divergence) = comparison.divergences.first() {
        part(&mut out, divergence, word);
        if comparison.divergences.len() > 1 {
            let _ = writeln!(out, "{} requests part in all", comparison.divergences.len());
        }
    }
    if !comparison.findings.is_empty() {
        let _ = writeln!(out, "findings:");
    }
    for finding in comparison.findings.iter().take(SHOWN) {
        let side = match finding.side {
            Some(Side::A) => "A",
            Some(Side::B) => "B",
            None => "-",
        };
        let line = finding.line.map_or_else(String::new, |line| format!(" (line {line})"));
        let (tag, position, kind) = (finding.tag, finding.position, finding.kind.name());
        let _ = writeln!(
            out,
            "  {side} {kind}, request {tag}, position {position}{line}: {}",
            foreign::one_line(&finding.text)
        );
    }
    if comparison.findings.len() > SHOWN {
        let _ = writeln!(out, "  and {} more", comparison.findings.len() - SHOWN);
    }
    let _ = writeln!(out, "verdict: {}", comparison.verdict.words());
    out
}

fn part(out: &mut String, divergence: &Divergence, word: &dyn Fn(u32) -> Option<String>) {
    let named = |token: u32| match word(token) {
        Some(text) => format!("{token} {text:?}"),
        None => token.to_string(),
    };
    let top = |top: &[(u32, Real)]| {
        let entries = top.iter().take(5).map(|(token, logit)| format!("{} {}", named(*token), number(*logit)));
        entries.collect::<Vec<_>>().join(", ")
    };
    let _ = writeln!(out, "first divergence: request {}, position {}", divergence.tag, divergence.position);
    for (name, choice) in [("A", &divergence.a), ("B", &divergence.b)] {
        let Choice { source, round, slot, depth, cache_length, margin, .. } = choice;
        let source = format!("{source:?}").to_lowercase();
        let _ = writeln!(
            out,
            "  {name}: token {}, {source}, round {round}, slot {slot}, depth {depth}, cache {cache_length}, margin {}",
            named(choice.token),
            number(*margin)
        );
        let _ = writeln!(out, "     {}", top(&choice.top));
    }
    if let Some(reference) = &divergence.reference {
        let choice = reference.token.map_or_else(|| "left to chance".to_owned(), named);
        let _ = writeln!(out, "  without a cache: token {choice}, margin {}", number(reference.margin));
        let _ = writeln!(out, "     {}", top(&reference.top));
    }
    let difference = &divergence.difference;
    let _ = writeln!(
        out,
        "  rows: max {} (token {}), MSE {}, cosine {}, KL {}; here {}",
        number(difference.max),
        named(difference.token),
        number(difference.mse),
        number(difference.cosine),
        number(difference.kl),
        divergence.verdict.words()
    );
}

fn number(real: Real) -> String {
    let value = real.0;
    match value.abs() {
        size if size == 0.0 || (1e-3..1e5).contains(&size) => format!("{value:.4}"),
        _ => format!("{value:.3e}"),
    }
}
