//! The report as one HTML file.

use std::fmt::Write;

use super::report::{self, AcceptanceReport, Part};
use crate::html::{Bar, bars, begin, escape, figures, section};

/// The whole page.
pub fn page(report: &AcceptanceReport) -> String {
    let plain = |key: &str| report.settings.get(key).and_then(|value| value.as_str()).unwrap_or("-");
    let all = &report.all;
    let mut page = begin(&format!("Acceptance of {}", plain("draft")));
    // Writing to a string cannot fail.
    let _ = write!(
        page,
        "<p>target {target}, tree {tree}, policy {policy}</p>",
        target = escape(plain("target")),
        tree = escape(plain("tree")),
        policy = escape(plain("policy")),
    );
    let mut shown = vec![
        (format!("{:.2}", all.acceptance.acceptance_length), "tokens a verification".to_owned()),
        (format!("{:.1}", all.drafted.tokens_per_second), "tokens a second".to_owned()),
    ];
    if let (Some(plain), Some(speedup)) = (all.plain, all.speedup) {
        shown.push((format!("{:.1}", plain.tokens_per_second), "without the draft".to_owned()));
        shown.push((format!("{speedup:.2}\u{d7}"), "as fast".to_owned()));
    }
    figures(&mut page, &shown);
    let wrong = if report.lossless.faults > 0 { " class=\"bad\"" } else { "" };
    let _ = write!(page, "<p{wrong}>{}</p>", escape(&report::lossless(&report.lossless)));

    section(&mut page, "Guesses accepted at each depth", "Share of the verifications whose tree is that deep.");
    bars(
        &mut page,
        report.per_depth.iter().zip(1..).map(|(&share, depth)| Bar::percent(format!("depth {depth}"), share)),
        1.0,
    );
    section(&mut page, "Accepted guesses of a verification", "How many verifications accepted so many guesses.");
    let most = report.accepted_lengths.iter().copied().max().unwrap_or(0) as f64;
    let count = |(&rounds, accepted): (&usize, usize)| Bar {
        label: format!("{accepted}"),
        value: rounds as f64,
        shown: rounds.to_string(),
    };
    bars(&mut page, report.accepted_lengths.iter().zip(0..).map(count), most);

    section(&mut page, "By data set", "Tokens a verification.");
    let length = |label: &str, value: f64| Bar { label: label.to_owned(), value, shown: format!("{value:.2}") };
    let of_part = |(name, part): (&String, &Part)| length(name, part.acceptance.acceptance_length);
    let longest = report.datasets.values().map(|part| part.acceptance.acceptance_length).fold(1.0, f64::max);
    bars(&mut page, report.datasets.iter().map(of_part), longest);
    table(&mut page, report);
    section(&mut page, "By context", "Tokens a verification, by how many tokens stood before it.");
    let longest = report.contexts.iter().map(|(_, part)| part.acceptance_length).fold(1.0, f64::max);
    let of_context =
        |(start, part): &(usize, report::Acceptance)| length(&format!("from {start}"), part.acceptance_length);
    bars(&mut page, report.contexts.iter().map(of_context), longest);

    section(&mut page, "Where the decode time went", "With the draft. Prompts are not part of it.");
    let shares = &all.drafted;
    let parts = [("draft", shares.draft_share), ("verify", shares.verify_share), ("the rest", shares.overhead_share)];
    bars(&mut page, parts.into_iter().map(|(name, share)| Bar::percent(name.to_owned(), share)), 1.0);
    let prefill = |what: &str, seconds: f64, tokens: usize| format!("{what} {seconds:.2} s for {tokens} prompt tokens");
    let _ = write!(page, "<p>Prompts: {}", prefill("with the draft", shares.prefill_seconds, shares.prompt_tokens));
    if let Some(plain) = all.plain {
        let _ = write!(page, "; {}", prefill("without it", plain.prefill_seconds, plain.prompt_tokens));
    }
    page.push_str("</p>");
    if !report.lossless.divergences.is_empty() {
        section(&mut page, "Answers that part", "Where, and how far a fresh forward pass puts the two tokens apart.");
        page.push_str("<pre>");
        for found in &report.lossless.divergences {
            let margin =
                found.margin.map_or("one answer is shorter".to_owned(), |margin| format!("margin {margin:.2e}"));
            let kind = if found.near_tie { "near tie" } else { "WRONG" };
            let line = format!("{} turn {} position {}: {margin}, {kind}", found.question, found.turn, found.position);
            let _ = writeln!(page, "{}", escape(&line));
        }
        page.push_str("</pre>");
    }
    section(&mut page, "Settings", "");
    let settings = serde_json::to_string_pretty(&report.settings).unwrap_or_default();
    let _ = write!(page, "<pre>{}</pre></html>", escape(&settings));
    page
}

fn table(page: &mut String, report: &AcceptanceReport) {
    page.push_str(
        "<table><tr><th>data set<th>answers<th>tokens<th>tokens a verification<th>tokens/s<th>without draft<th>speedup</tr>",
    );
    for (name, part) in &report.datasets {
        let optional = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2}"));
        let _ = write!(
            page,
            "<tr><td>{}<td>{}<td>{}<td>{:.3}<td>{:.2}<td>{}<td>{}</tr>",
            escape(name),
            part.answers,
            part.acceptance.tokens,
            part.acceptance.acceptance_length,
            part.drafted.tokens_per_second,
            optional(part.plain.map(|plain| plain.tokens_per_second)),
            optional(part.speedup),
        );
    }
    page.push_str("</table>");
}
