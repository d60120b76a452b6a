//! The report as one HTML file, pictures included.

use std::fmt::Write;

use super::{Floor, Report, Row};
use crate::html::{Bar, bars, begin, escape, figures, picture, section, short};

/// The whole page. `sheets` are PNG files: the pictures of the target alone, then those of each way of decoding, in order.
pub fn page(report: &Report, sheets: &[Vec<u8>]) -> String {
    let plain = |key: &str| report.settings.get(key).and_then(|value| value.as_str()).unwrap_or("-");
    let mut page = begin(&format!("Pictures of {} with {}", plain("target"), plain("draft")));
    figures(&mut page, &top(report));
    let (wrong, said) = sound(report);
    let _ = write!(page, "<p{}>{}</p>", if wrong { " class=\"bad\"" } else { "" }, escape(&said));

    section(&mut page, "Pictures", "The first ones, with the same labels and the same noise in every row.");
    let rows = std::iter::once(&report.alone).chain(&report.drafted);
    // Exact ones are equal: one of them is enough, unless something is wrong.
    let is_shown = |place: usize, row: &Row| place < 2 || !row.exact || !report.is_sound();
    for (_, (row, sheet)) in rows.zip(sheets).enumerate().filter(|(place, (row, _))| is_shown(*place, row)) {
        let _ = write!(page, "<p>{}<br>", escape(&row.plan));
        picture(&mut page, sheet, &row.plan);
        page.push_str("</p>");
    }
    section(&mut page, "What it took", "All pictures of the run, each decoded in every way before the next one.");
    table(&mut page, report);
    // Of exact decoding the one that drafts most says what the others do.
    let last_exact = report.drafted.iter().rposition(|row| row.exact);
    for (_, row) in report.drafted.iter().enumerate().filter(|(place, row)| !row.exact || Some(*place) == last_exact) {
        agreement(&mut page, row);
    }
    section(
        &mut page,
        "What can be gained",
        "Speculation over scales lets the target read the same codes in fewer passes. One pass over all of them is the least there \
         is: it bounds the gain of a perfect draft that costs nothing, and with the draft's own passes that of this one. Median \
         passes of one picture on this machine, in this run.",
    );
    floor(&mut page, &report.floor);
    section(&mut page, "Settings", "");
    let settings = serde_json::to_string_pretty(&report.settings).unwrap_or_default();
    let _ = write!(page, "<pre>{}</pre></html>", escape(&settings));
    page
}

/// The figures that matter: of exact decoding the fewest passes, and the best time.
fn top(report: &Report) -> Vec<(String, String)> {
    let mut top = Vec::new();
    let exact = || report.drafted.iter().filter(|row| row.exact);
    if let Some(row) = exact().min_by_key(|row| row.target_calls) {
        let calls = format!("{} \u{2192} {:.2}", report.scales, report.calls(row));
        top.push((calls, format!("passes of the target a picture, exact ({})", row.plan)));
        top.push((format!("{} of {}", row.identical, report.pictures), "pictures equal, code by code".to_owned()));
    }
    if let Some(row) = exact().max_by(|one, other| one.speedup.total_cmp(&other.speedup)) {
        top.push((format!("{:.2}\u{d7}", row.speedup), format!("as fast, exact ({})", row.plan)));
    }
    top.push((format!("{:.2}\u{d7}", report.floor.most_without_draft), "possible with a perfect draft".to_owned()));
    top
}

/// Whether something is wrong, and what is to be said.
pub fn sound(report: &Report) -> (bool, String) {
    match report.is_sound() {
        true => (false, "Every picture of exact decoding is the target's own, code by code.".to_owned()),
        false => (true, "NOT EQUAL: exact decoding gave other pictures than the target alone.".to_owned()),
    }
}

fn table(page: &mut String, report: &Report) {
    page.push_str(
        "<table><tr><th>decoding<th>passes of the target<th>codes in them<th>passes of the draft<th>seconds<th>speed-up\
         <th>equal<th>PSNR, dB<th>Fr\u{e9}chet<th>to real</tr>",
    );
    for row in std::iter::once(&report.alone).chain(&report.drafted) {
        let psnr = row.psnr.map_or("equal".to_owned(), |psnr| format!("{psnr:.1}"));
        let _ = write!(
            page,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{:.2}<td>{:.2}<td>{} of {}<td>{psnr}<td>{}<td>{}</tr>",
            escape(&row.plan),
            row.target_calls,
            row.target_tokens,
            row.draft_calls,
            row.seconds.total,
            row.speedup,
            row.identical,
            report.pictures,
            short(row.frechet),
            row.frechet_to_real.map_or("-".to_owned(), short),
        );
    }
    page.push_str(
        "</table><p class=\"quiet\">PSNR: to the target's own pictures. Fr\u{e9}chet: distance of the encoder's mean features, to those \
         of the target alone and of real pictures; no FID, and of worth only within this table.</p>",
    );
}

fn agreement(page: &mut String, row: &Row) {
    let drafted: Vec<_> = row.agreement.iter().filter(|scale| scale.drafted > 0).collect();
    if drafted.is_empty() {
        return;
    }
    section(
        page,
        &format!("Agreement by scale: {}", row.plan),
        "Drafted scales that were kept, behind scales that all stood, and codes in them that the rule agreed with.",
    );
    let bar = |scale: &&super::Agreement| Bar {
        label: format!("scale {}, {} codes", scale.scale, scale.codes),
        value: scale.kept as f64 / scale.drafted as f64,
        shown: format!(
            "{} of {} kept, {:.1} % of codes",
            scale.kept,
            scale.drafted,
            100.0 * scale.agreed as f64 / scale.positions.max(1) as f64
        ),
    };
    // Room for what stands behind a full bar.
    bars(page, drafted.iter().map(bar), 1.3);
}

fn floor(page: &mut String, floor: &Floor) {
    let list = |passes: &[f64]| passes.iter().map(|ms| format!("{ms:.2}")).collect::<Vec<_>>().join(", ");
    let sum = |passes: &[f64]| passes.iter().sum::<f64>();
    let _ = write!(
        page,
        "<table><tr><th>passes<th>milliseconds by scale<th>sum</tr><tr><td>target, scale by scale<td>{}<td>{:.2}</tr>\
         <tr><td>target, all scales at once<td>-<td>{:.2}</tr><tr><td>draft, scale by scale<td>{}<td>{:.2}</tr></table>\
         <p>At most {:.2}\u{d7} with a perfect draft that costs nothing, {:.2}\u{d7} with the passes of this one.</p>",
        list(&floor.target_scales_ms),
        sum(&floor.target_scales_ms),
        floor.target_whole_ms,
        list(&floor.draft_scales_ms),
        sum(&floor.draft_scales_ms),
        floor.most_without_draft,
        floor.most_with_draft,
    );
}
