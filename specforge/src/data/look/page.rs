//! One HTML file with everything in it: no address is asked for anything, and a policy in its head forbids it. What comes
//! from data files is text and nothing else, whatever it holds.

use std::fmt::Write;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::super::report::BuildReport;
use super::super::stats::Statistics;
use super::super::validate::{Group, Validation};
use super::{Bar, Distributions, Duplicates, Named, Shown};
use crate::error::foreign;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Size of a chart, and the room for its axes.
const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 220.0;
const LEFT: f64 = 46.0;
const BELOW: f64 = 34.0;
const ABOVE: f64 = 14.0;
const RIGHT: f64 = 12.0;

/// Everything a page shows.
#[derive(Debug)]
pub struct Page<'a> {
    /// Where tokenizer and template come from.
    pub target: &'a Path,
    /// The files.
    pub files: &'a [std::path::PathBuf],
    /// What is trained, in words.
    pub trained: &'a str,
    /// Longest document, in tokens.
    pub max_length: usize,
    /// Share of unusable records that a training takes without being told.
    pub max_bad_share: f64,
    /// Figures of all documents.
    pub statistics: &'a Statistics,
    /// What was read and left out.
    pub build: &'a BuildReport,
    /// Histograms.
    pub distributions: &'a Distributions,
    /// What drafts of several sizes can name.
    pub vocabulary: &'a [Named],
    /// What is said twice.
    pub duplicates: &'a Duplicates,
    /// Faults and warnings.
    pub findings: &'a Validation,
    /// The sample.
    pub documents: &'a [Shown],
}

/// The whole page.
pub fn page(page: &Page<'_>) -> String {
    let mut out = String::with_capacity(1 << 16);
    let hash = base64(&Sha256::digest(SCRIPT));
    // Writing to a string cannot fail.
    let _ = write!(
        out,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src \
         'sha256-{hash}'\"><link rel=\"icon\" href=\"data:,\"><title>Training data: {title}</title><style>{STYLE}</style>\
         <h1>Training data as it will be trained</h1>",
        title = escape(&foreign::listed(page.files.iter().map(|path| foreign::path(path)), 2)),
    );
    let files = foreign::listed(page.files.iter().map(|path| foreign::path(path)), 12);
    let _ = write!(
        out,
        "<p class=\"dim\">{} &middot; tokenizer and template of <code>{}</code> &middot; trained: {} &middot; at most {} \
         tokens a document</p>",
        escape(&files),
        escape(&foreign::path(page.target)),
        escape(&foreign::name(page.trained)),
        page.max_length,
    );
    banner(&mut out, page);
    figures(&mut out, page);
    out.push_str(
        "<div class=\"charts\"><section class=\"chart\"><h2>Length</h2><p class=\"dim\">Documents by tokens.</p>",
    );
    histogram(&mut out, &page.distributions.lengths, &|value| grouped(value as u64), Some(page.max_length as f64));
    out.push_str("</section><section class=\"chart\"><h2>Mask coverage</h2><p class=\"dim\">Documents by the share of their tokens that is trained.</p>");
    histogram(&mut out, &page.distributions.coverage, &|value| format!("{:.0} %", 100.0 * value), None);
    out.push_str("</section><section class=\"chart\"><h2>Vocabulary coverage</h2><p class=\"dim\">Share of the trained tokens that a draft of so many tokens can name.</p>");
    curve(&mut out, page.vocabulary);
    out.push_str("</section><section class=\"chart\">");
    percentiles(&mut out, page.statistics);
    out.push_str("</section></div>");
    findings(&mut out, page.findings);
    duplicates(&mut out, page.duplicates);
    documents(&mut out, page);
    let _ = write!(out, "<script>{SCRIPT}</script></html>");
    out
}

fn banner(out: &mut String, page: &Page<'_>) {
    let (bad, all) = (page.build.rejected_count, page.build.conversations);
    let share = bad as f64 / all.max(1) as f64;
    if share > page.max_bad_share {
        let _ = write!(
            out,
            "<p class=\"banner\">{bad} of {all} records ({:.1} %) cannot be used. A training refuses more than {} %, unless \
             <code>data.max_bad_share</code> says otherwise.</p>",
            100.0 * share,
            100.0 * page.max_bad_share,
        );
    }
}

fn figures(out: &mut String, page: &Page<'_>) {
    let Page { statistics, build, duplicates, .. } = page;
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let figures = [
        (grouped(build.conversations as u64), "records".to_owned()),
        (grouped(statistics.documents as u64), "documents".to_owned()),
        (grouped(statistics.tokens), "tokens".to_owned()),
        (percent(statistics.coverage()), format!("trained: {} tokens", grouped(statistics.supervised))),
        (grouped(build.rejected_count as u64), "records that cannot be used".to_owned()),
        (grouped(build.truncated as u64), "documents cut to the longest length".to_owned()),
        (grouped(build.without_supervision as u64), "left out: nothing of them is trained".to_owned()),
        (grouped(duplicates.documents as u64), format!("duplicates ({})", percent(duplicates.share))),
    ];
    out.push_str("<div class=\"figures\">");
    for (value, what) in figures {
        let _ = write!(out, "<div class=\"figure\"><b>{}</b><span>{}</span></div>", escape(&value), escape(&what));
    }
    out.push_str("</div>");
}

/// Bars from left to right, with a line at a limit.
fn histogram(out: &mut String, bars: &[Bar], label: &dyn Fn(f64) -> String, limit: Option<f64>) {
    let (Some(first), Some(last)) = (bars.first(), bars.last()) else { return };
    let most = bars.iter().map(|bar| bar.documents).max().unwrap_or(0).max(1);
    let span = (last.to - first.from).max(f64::MIN_POSITIVE);
    let across = |value: f64| LEFT + (value - first.from) / span * (WIDTH - LEFT - RIGHT);
    let up = |count: f64| HEIGHT - BELOW - count / most as f64 * (HEIGHT - BELOW - ABOVE);
    open_chart(out, "Histogram");
    axis(out, &[0.0, 0.5, 1.0].map(|part| (up(part * most as f64), grouped((part * most as f64).round() as u64))));
    for bar in bars {
        let (left, right, top) = (across(bar.from), across(bar.to), up(bar.documents as f64));
        let _ = write!(
            out,
            "<rect class=\"bar\" x=\"{:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\"><title>{} to {}: {} documents</title></rect>",
            left + 0.5,
            (right - left - 1.0).max(0.5),
            HEIGHT - BELOW - top,
            escape(&label(bar.from)),
            escape(&label(bar.to)),
            grouped(bar.documents as u64),
        );
    }
    let steps = 4.min(bars.len());
    for step in 0..=steps {
        let value = match bars.get(step * bars.len() / steps) {
            Some(bar) => bar.from,
            None => last.to,
        };
        below(out, across(value), &label(value), step == 0, step == steps);
    }
    if let Some(limit) = limit.filter(|limit| (first.from..=last.to).contains(limit)) {
        let at = across(limit);
        let _ = write!(
            out,
            "<line class=\"limit\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{ABOVE:.1}\" y2=\"{:.1}\"><title>longest document: \
             {limit:.0}</title></line>",
            HEIGHT - BELOW
        );
    }
    out.push_str("</svg>");
}

/// What vocabularies of several sizes cover; sizes by their logarithm.
fn curve(out: &mut String, points: &[Named]) {
    let (Some(first), Some(last)) = (points.first(), points.last()) else {
        out.push_str("<p class=\"dim\">No token is trained.</p>");
        return;
    };
    let logarithm = |size: usize| (size.max(1) as f64).ln();
    let span = (logarithm(last.size) - logarithm(first.size)).max(f64::MIN_POSITIVE);
    let across = |size: usize| LEFT + (logarithm(size) - logarithm(first.size)) / span * (WIDTH - LEFT - RIGHT - 8.0);
    let floor = (points.iter().map(|point| point.share).fold(1.0, f64::min) * 10.0).floor() / 10.0;
    let floor = floor.min(0.9);
    let up = |share: f64| HEIGHT - BELOW - (share - floor) / (1.0 - floor) * (HEIGHT - BELOW - ABOVE);
    open_chart(out, "Vocabulary coverage");
    let steps = [floor, (floor + 1.0) / 2.0, 1.0];
    axis(out, &steps.map(|share| (up(share), format!("{:.0} %", 100.0 * share))));
    let line: Vec<String> =
        points.iter().map(|point| format!("{:.1},{:.1}", across(point.size), up(point.share))).collect();
    let base = HEIGHT - BELOW;
    let _ = write!(
        out,
        "<polygon class=\"area\" points=\"{:.1},{base:.1} {line} {:.1},{base:.1}\"/><polyline class=\"curve\" points=\"{line}\"/>",
        across(first.size),
        across(last.size),
        line = line.join(" "),
    );
    let mut labelled = f64::NEG_INFINITY;
    for (number, point) in points.iter().enumerate() {
        let (left, top) = (across(point.size), up(point.share));
        let _ = write!(
            out,
            "<circle class=\"dot\" cx=\"{left:.1}\" cy=\"{top:.1}\" r=\"3.5\"><title>{} tokens: {:.2} %</title></circle>",
            grouped(point.size as u64),
            100.0 * point.share,
        );
        let is_last = number + 1 == points.len();
        let room = left - labelled > 52.0 && (is_last || across(last.size) - left > 52.0);
        if room {
            below(out, left, &grouped(point.size as u64), number == 0, is_last);
            labelled = left;
        }
    }
    out.push_str("</svg>");
}

fn open_chart(out: &mut String, name: &str) {
    let _ = write!(out, "<svg viewBox=\"0 0 {WIDTH:.0} {HEIGHT:.0}\" role=\"img\" aria-label=\"{name}\">");
}

/// Lines across, with what they stand for.
fn axis(out: &mut String, lines: &[(f64, String)]) {
    for (at, label) in lines {
        let _ = write!(
            out,
            "<line class=\"axis\" x1=\"{LEFT:.0}\" x2=\"{:.0}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/><text x=\"{:.0}\" y=\"{:.1}\" \
             text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            escape(label),
        );
    }
}

fn below(out: &mut String, at: f64, label: &str, is_first: bool, is_last: bool) {
    let anchor = match (is_first, is_last) {
        (true, _) => "start",
        (_, true) => "end",
        _ => "middle",
    };
    let _ = write!(
        out,
        "<text x=\"{at:.1}\" y=\"{:.0}\" text-anchor=\"{anchor}\">{}</text>",
        HEIGHT - BELOW + 18.0,
        escape(label)
    );
}

fn percentiles(out: &mut String, statistics: &Statistics) {
    out.push_str(
        "<h2>Percentiles</h2><p class=\"dim\">So many percent of the documents have no more tokens.</p><table><tr><th>percent\
         <th class=\"number\">tokens<th class=\"number\">trained tokens</tr>",
    );
    let rows = statistics.length_percentiles.iter().zip(&statistics.supervised_percentiles);
    for ((percent, length), (_, trained)) in rows {
        let _ = write!(
            out,
            "<tr><td>{percent}<td class=\"number\">{}<td class=\"number\">{}</tr>",
            grouped(*length as u64),
            grouped(*trained as u64)
        );
    }
    let _ = write!(out, "<tr><td>longest<td class=\"number\">{}<td></tr></table>", grouped(statistics.longest as u64));
}

fn findings(out: &mut String, findings: &Validation) {
    out.push_str("<h2>Faults and warnings</h2>");
    let mut rows: Vec<(&Group, bool)> = findings.faults.iter().map(|group| (group, true)).collect();
    rows.extend(findings.warnings.iter().map(|group| (group, false)));
    if rows.is_empty() {
        out.push_str("<p class=\"dim\">None: every record can be used, and nothing of them is passed over.</p>");
        return;
    }
    rows.sort_by_key(|(group, _)| std::cmp::Reverse(group.count));
    out.push_str(
        "<p class=\"dim\">The most frequent first. A record with a fault is not trained.</p><table id=\"findings\"><tr><th>what\
         <th class=\"number\">how often<th>the first of them</tr>",
    );
    for (group, is_fault) in rows {
        let class = if is_fault { " class=\"fault\"" } else { "" };
        let kind = if is_fault { "fault: " } else { "" };
        let _ = write!(
            out,
            "<tr><td{class}>{kind}{}<td class=\"number\">{}<td><ul>",
            escape(&group.title),
            grouped(group.count as u64)
        );
        for finding in &group.examples {
            let line = finding.line.map(|line| format!(":{line}")).unwrap_or_default();
            let place = format!("{}{line}", foreign::path(&finding.path));
            let _ = write!(
                out,
                "<li><span class=\"mono\">{}</span> {}",
                escape(&place),
                escape(&foreign::one_line(&finding.problem))
            );
        }
        out.push_str("</ul></tr>");
    }
    out.push_str("</table>");
}

fn duplicates(out: &mut String, duplicates: &Duplicates) {
    out.push_str("<h2>Duplicates</h2>");
    if duplicates.documents == 0 {
        out.push_str("<p class=\"dim\">None: no document is the same as another.</p>");
        return;
    }
    let _ = write!(
        out,
        "<p class=\"dim\">{} documents ({:.1} %) are the same as another, word for word; {} different ones are there more than \
         once.</p><details><summary>the most frequent</summary><table><tr><th class=\"number\">times<th>the first<th>and \
         again</tr>",
        grouped(duplicates.documents as u64),
        100.0 * duplicates.share,
        grouped(duplicates.contents as u64),
    );
    for one in &duplicates.most {
        let _ = write!(
            out,
            "<tr><td class=\"number\">{}<td>{}<td>{}</tr>",
            one.count,
            escape(&foreign::name(&one.ids[0])),
            escape(&foreign::name(&one.ids[1])),
        );
    }
    out.push_str("</table></details>");
}

fn documents(out: &mut String, page: &Page<'_>) {
    let _ = write!(
        out,
        "<h2>Documents</h2><p class=\"dim key\">{} of {}, chosen by chance. <mark>Trained</mark> tokens are marked; all \
         others are context.</p>",
        grouped(page.documents.len() as u64),
        grouped(page.statistics.documents as u64),
    );
    let mut roles: Vec<&str> = page.documents.iter().flat_map(|one| one.roles.iter().map(String::as_str)).collect();
    roles.sort_unstable();
    roles.dedup();
    out.push_str(
        "<form id=\"filters\" class=\"filters\"><label>text <input type=\"search\" id=\"search\" autocomplete=\"off\"></label>\
         <label>tokens <input type=\"number\" id=\"length-from\" min=\"0\" placeholder=\"from\"> <input type=\"number\" \
         id=\"length-to\" min=\"0\" placeholder=\"to\" aria-label=\"most tokens\"></label><label>trained % <input \
         type=\"number\" id=\"coverage-from\" min=\"0\" max=\"100\" step=\"any\" placeholder=\"from\"> <input type=\"number\" \
         id=\"coverage-to\" min=\"0\" max=\"100\" step=\"any\" placeholder=\"to\" aria-label=\"most of it trained\"></label>",
    );
    out.push_str("<fieldset aria-label=\"speaks\">");
    for role in roles {
        let role = escape(&foreign::name(role));
        let _ = write!(out, "<label><input type=\"checkbox\" name=\"role\" value=\"{role}\">{role}</label>");
    }
    out.push_str(
        "</fieldset><label>order <select id=\"order\"><option value=\"file\">of the files<option value=\"longest\">longest \
         first<option value=\"shortest\">shortest first<option value=\"most\">most trained first<option value=\"least\">least \
         trained first</select></label><button type=\"reset\">clear</button><span id=\"shown\" aria-live=\"polite\"></span></form>\
         <div id=\"documents\">",
    );
    for (place, document) in page.documents.iter().enumerate() {
        article(out, place, document);
    }
    out.push_str("</div><p id=\"nothing\" hidden>No document fits.</p>");
}

fn article(out: &mut String, place: usize, document: &Shown) {
    let Shown { id, place: stands, roles, tokens, coverage, runs } = document;
    let _ = write!(
        out,
        "<article data-place=\"{place}\" data-length=\"{tokens}\" data-coverage=\"{coverage:.6}\" data-roles=\"{}\"><header>\
         <b>{}</b><span class=\"dim\">{} tokens</span><span class=\"dim\"><span class=\"meter\"><i style=\"width:{:.1}%\"></i>\
         </span> {:.1} % trained</span>",
        escape(&foreign::name(&roles.join(" "))),
        escape(&foreign::name(id)),
        grouped(*tokens as u64),
        100.0 * coverage,
        100.0 * coverage,
    );
    for role in roles {
        let _ = write!(out, "<span class=\"chip\">{}</span>", escape(&foreign::name(role)));
    }
    if let Some((path, line)) = stands {
        let _ = write!(out, "<span class=\"dim mono\">{}:{line}</span>", escape(&foreign::path(path)));
    }
    out.push_str("</header><pre>");
    // A line end right behind the opening would be taken for a part of the page.
    out.push('\n');
    for (trained, text) in runs {
        let text = foreign::block(text);
        let (open, close) = if *trained { ("<mark>", "</mark>") } else { ("", "") };
        let _ = write!(out, "{open}{}{close}", escape(&text));
    }
    out.push_str("</pre></article>");
}

/// Digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + text.len() / 8);
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            other => out.push(other),
        }
    }
    out
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |word, &byte| (word << 8) | u32::from(byte)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            match place <= chunk.len() {
                true => out.push(char::from(LETTERS[(word >> (18 - 6 * place)) as usize & 63])),
                false => out.push('='),
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    const HOSTILE: &str = "</script><script>alert(1)</script>\"'&<img src=x onerror=alert(2)>\u{202e}\u{1b}[31m";

    #[test]
    fn hostile_text_is_text_everywhere() {
        let path = PathBuf::from(HOSTILE);
        let finding = |problem: &str| super::super::super::validate::Finding {
            path: path.clone(),
            line: Some(3),
            problem: problem.to_owned(),
        };
        let group = |examples| Group { kind: "json".to_owned(), title: "not JSON".to_owned(), count: 2, examples };
        let findings = Validation {
            files: 1,
            records: 2,
            faulty: 1,
            fault_count: 1,
            faults: vec![group(vec![finding(HOSTILE)])],
            warnings: vec![group(vec![finding(HOSTILE)])],
        };
        let repeated = super::super::Repeated { count: 2, ids: [HOSTILE.to_owned(), HOSTILE.to_owned()] };
        let shown = Shown {
            id: HOSTILE.to_owned(),
            place: Some((path.clone(), 1)),
            roles: vec![HOSTILE.to_owned()],
            tokens: 1234,
            coverage: 0.25,
            runs: vec![(false, HOSTILE.to_owned()), (true, format!("{HOSTILE}\n second line"))],
        };
        let text = page(&Page {
            target: &path,
            files: std::slice::from_ref(&path),
            trained: HOSTILE,
            max_length: 100,
            max_bad_share: 0.01,
            statistics: &Statistics {
                documents: 1,
                tokens: 1234,
                supervised: 308,
                length_percentiles: vec![(5, 1234)],
                supervised_percentiles: vec![(5, 308)],
                longest: 1234,
            },
            build: &BuildReport { conversations: 2, rejected_count: 1, ..BuildReport::default() },
            distributions: &Distributions {
                lengths: vec![Bar { from: 0.0, to: 2000.0, documents: 1 }],
                coverage: vec![Bar { from: 0.0, to: 1.0, documents: 1 }],
            },
            vocabulary: &[Named { size: 1000, share: 0.9 }, Named { size: 49152, share: 1.0 }],
            duplicates: &Duplicates { documents: 1, share: 0.5, contents: 1, most: vec![repeated] },
            findings: &findings,
            documents: &[shown],
        });
        assert_eq!(text.matches("<script>").count(), 1);
        assert_eq!(text.matches("</script>").count(), 1);
        assert!(!text.contains("<img") && !text.contains('\u{202e}') && !text.contains('\u{1b}'), "{text}");
        assert!(!text.contains("\"'&<") && text.contains("&lt;/script&gt;&lt;script&gt;alert(1)"));
        assert!(text.contains("<mark>&lt;/script") && text.contains("1\u{202f}234"));
        assert!(text.contains("1 of 2 records (50.0 %) cannot be used"));
        assert!(!text.contains("=\"NaN") && !text.contains("=\"inf"));
        // No address but an empty icon.
        assert!(!text.contains("http:") && !text.contains("https:") && !text.contains("url("));
    }

    #[test]
    fn base64_as_everybody_writes_it() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1\u{202f}000", "1\u{202f}234\u{202f}567"]);
    }
}
