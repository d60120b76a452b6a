//! The report as one HTML file that needs nothing else: figures, and bars drawn as SVG.

use std::fmt::Write;

use super::report::{self, AcceptanceReport, Part};

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24;\
background:#fff}h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}td,th{padding:.2rem .8rem;\
text-align:right;border-bottom:1px solid #d8dee4}td:first-child,th:first-child{text-align:left}.figures{display:flex;gap:2rem;\
flex-wrap:wrap}.figure b{display:block;font-size:1.8rem}svg text{font:12px system-ui,sans-serif;fill:#1b1f24}\
.a{fill:#3b6fb6}pre{background:#f3f5f7;padding:.8rem;overflow-x:auto}.bad{color:#b42318}\
@media(prefers-color-scheme:dark){body{background:#14171a;color:#e6e9ec}svg text{fill:#e6e9ec}pre{background:#20252a}\
td,th{border-color:#343a40}}";

/// One bar: its label, its value, and what stands behind it.
struct Bar {
    label: String,
    value: f64,
    shown: String,
}

/// The whole page.
pub fn page(report: &AcceptanceReport) -> String {
    let mut page = String::new();
    let title = |key: &str| escape(report.settings.get(key).and_then(|value| value.as_str()).unwrap_or("-"));
    let all = &report.all;
    // Writing to a string cannot fail.
    let _ = write!(
        page,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>Acceptance of {draft}</title><style>{STYLE}</style><h1>Acceptance of {draft}</h1>\
         <p>target {target}, tree {tree}, policy {policy}</p><div class=\"figures\">",
        draft = title("draft"),
        target = title("target"),
        tree = title("tree"),
        policy = title("policy"),
    );
    let mut figure = |value: String, what: &str| {
        let _ = write!(page, "<div class=\"figure\"><b>{value}</b>{what}</div>");
    };
    figure(format!("{:.2}", all.acceptance.acceptance_length), "tokens a verification");
    figure(format!("{:.1}", all.drafted.tokens_per_second), "tokens a second");
    if let (Some(plain), Some(speedup)) = (all.plain, all.speedup) {
        figure(format!("{:.1}", plain.tokens_per_second), "without the draft");
        figure(format!("{speedup:.2}&times;"), "as fast");
    }
    let wrong = if report.lossless.faults > 0 { " class=\"bad\"" } else { "" };
    let _ = write!(page, "</div><p{wrong}>{}</p>", escape(&report::lossless(&report.lossless)));

    section(&mut page, "Guesses accepted at each depth", "Share of the verifications whose tree is that deep.");
    bars(
        &mut page,
        report.per_depth.iter().zip(1..).map(|(&share, depth)| percent(format!("depth {depth}"), share)),
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
    bars(&mut page, parts.into_iter().map(|(name, share)| percent(name.to_owned(), share)), 1.0);
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

fn section(page: &mut String, title: &str, what: &str) {
    let _ = write!(page, "<h2>{title}</h2><p>{what}</p>");
}

fn percent(label: String, share: f64) -> Bar {
    Bar { label, value: share, shown: format!("{:.1} %", 100.0 * share) }
}

/// Horizontal bars up to `most`.
fn bars(page: &mut String, bars: impl Iterator<Item = Bar>, most: f64) {
    const LABEL: f64 = 160.0;
    const BAR: f64 = 420.0;
    const LINE: f64 = 24.0;
    let bars: Vec<Bar> = bars.collect();
    let _ = write!(
        page,
        "<svg width=\"{:.0}\" height=\"{:.0}\" role=\"img\">",
        LABEL + BAR + 90.0,
        LINE * bars.len() as f64 + 4.0
    );
    for (place, bar) in bars.iter().enumerate() {
        let top = LINE * place as f64;
        let width = if most > 0.0 { BAR * (bar.value / most).clamp(0.0, 1.0) } else { 0.0 };
        let _ = write!(
            page,
            "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\">{}</text><rect class=\"a\" x=\"{LABEL:.0}\" y=\"{:.0}\" \
             width=\"{width:.1}\" height=\"16\"/><text x=\"{:.0}\" y=\"{:.0}\">{}</text>",
            LABEL - 8.0,
            top + 15.0,
            escape(&bar.label),
            top + 3.0,
            LABEL + width + 6.0,
            top + 15.0,
            escape(&bar.shown),
        );
    }
    page.push_str("</svg>");
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

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
