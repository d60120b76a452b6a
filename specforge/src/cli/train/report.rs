//! What a training run says at its end.

use std::collections::BTreeMap;

use super::super::signals;
use crate::error::foreign;
use crate::train::TrainReport;

pub(super) fn text(report: &TrainReport) -> String {
    let mut lines = Vec::new();
    if let Some(signal) = report.stopped_by {
        lines.push(format!("stopped by {} after step {}; continue with --resume", signals::name(signal), report.steps));
    }
    if !report.end.is_empty() {
        lines.extend(held_out(report));
        lines.push(format!("always guessing the commonest token: {:.4}", report.commonest_token_share));
    }
    lines.push(format!(
        "{} of {} steps, {} tokens, {:.0} tokens/s in training",
        report.steps, report.total_steps, report.tokens, report.tokens_per_second
    ));
    if report.skipped_steps > 0 {
        lines.push(format!("{} steps changed nothing: a loss or a gradient was not finite", report.skipped_steps));
    }
    let parts = Some(report.time.listed()).filter(|parts| !parts.is_empty());
    let parts = parts.map_or(String::new(), |parts| format!(": {parts}"));
    lines.push(format!("{:.1} seconds{parts}", report.seconds));
    lines.push(format!("checkpoint: {}", foreign::path(&report.checkpoint)));
    lines.join("\n")
}

/// Held-out figures before and after: single ones a line each, those of a part of the draft (`step1/accuracy`) as a table.
fn held_out(report: &TrainReport) -> Vec<String> {
    let before = |name: &str| report.start.get(name).map_or("-".to_owned(), |value| format!("{value:.4}"));
    let single = report.end.iter().filter(|(name, _)| !name.contains('/'));
    let width = single.clone().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut lines = vec![format!("{:<width$}  {:>9}  {:>9}", "held out", "untrained", "trained")];
    lines.extend(single.map(|(name, end)| format!("{name:<width$}  {:>9}  {end:>9.4}", before(name))));
    let parts = || report.end.iter().filter_map(|(name, end)| Some((name.split_once('/')?, end)));
    let mut columns: Vec<&str> = parts().map(|((_, column), _)| column).collect();
    columns.sort_unstable();
    columns.dedup();
    let mut rows: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for ((row, column), end) in parts() {
        let cells = rows.entry(row).or_insert_with(|| vec!["-".to_owned(); columns.len()]);
        if let Ok(place) = columns.binary_search(&column) {
            cells[place] = format!("{} -> {end:.4}", before(&format!("{row}/{column}")));
        }
    }
    let line = |name: &str, cells: &[String]| {
        let cells: String = cells.iter().map(|cell| format!("  {cell:>18}")).collect();
        format!("{name:<8}{cells}")
    };
    if !rows.is_empty() {
        lines.push(line("", &columns.iter().map(|&column| column.to_owned()).collect::<Vec<_>>()));
    }
    lines.extend(rows.iter().map(|(row, cells)| line(row, cells)));
    lines
}
