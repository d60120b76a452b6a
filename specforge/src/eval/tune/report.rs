//! What tuning found, as tables for people.

use super::{Batch, Choice, Table, Tuned, WithLookup};

/// Sizes that a table shows; the file has all of them.
const SHOWN: usize = 10;

/// Everything about one draft.
pub fn text(name: &str, tuned: &Tuned) -> String {
    let Tuned { method, answers, tokens, acceptance, costs, candidates, batches, .. } = tuned;
    let mut lines =
        vec![format!("{name} ({method}), {candidates} trees tried on {answers} answers of {tokens} tokens")];
    let shares: Vec<String> = acceptance.iter().map(|share| format!("{share:.3}")).collect();
    lines.push(format!("right at depth 1, 2, ... or deeper, anywhere: {}", shares.join(" ")));
    lines.push(String::new());
    lines.extend(table("verification, ms by tokens of each request's tree:", &costs.verify));
    for (place, draft) in costs.draft.iter().enumerate() {
        let what = if place == 0 { "drafting, ms by depth:" } else { "drafting with branches, ms by depth:" };
        lines.extend(table(what, draft));
    }
    lines.push(String::new());
    lines.push(format!(
        "{:>8}  {:>9}  {:>10}  {:>8}  {:>8}  {:>9}  {:>8}  tree",
        "together", "tau, pred", "tokens/s", "speed-up", "tau, dec", "tokens/s", "speed-up"
    ));
    lines.extend(batches.iter().flat_map(rows));
    lines.extend(batches.iter().map(verdict));
    lines.join("\n")
}

/// A table of times in milliseconds, a line for every number of requests.
fn table(what: &str, table: &Table) -> Vec<String> {
    let count = table.sizes.len();
    // Evenly spread, the ends included.
    let shown: Vec<usize> = match count <= SHOWN {
        true => (0..count).collect(),
        false => (0..SHOWN).map(|place| place * (count - 1) / (SHOWN - 1)).collect(),
    };
    let sizes: String = shown.iter().map(|&at| format!("{:>8}", table.sizes[at])).collect();
    let mut lines = vec![what.to_owned(), format!("{:>8}{sizes}", "together")];
    for (rows, seconds) in table.rows.iter().zip(&table.seconds) {
        let times: String = shown.iter().map(|&at| format!("{:>8.2}", 1e3 * seconds[at])).collect();
        lines.push(format!("{rows:>8}{times}"));
    }
    lines
}

/// Longest text of a tree in a table; the file has it whole.
const TREE: usize = 60;

/// A tree's text, shortened to fit.
pub fn short_tree(choice: &Choice) -> String {
    match choice.tree.len() > TREE {
        true => format!("{} guesses, {} deep, of ranks below {}", choice.guesses, choice.depth, choice.top_k),
        false => choice.tree.clone(),
    }
}

/// The fastest tree of a batch, as short.
pub fn short_fastest(batch: &Batch) -> String {
    let beside = batch.with_lookup.as_ref().filter(|beside| beside.tree == batch.fastest().0);
    format!("{}{}", short_tree(&batch.best), beside.map(short_lookup).unwrap_or_default())
}

/// The lookup beside a tree, with the limit on the guesses of both where there is one.
fn short_lookup(beside: &WithLookup) -> String {
    match beside.tree.rsplit_once(",most=") {
        Some((_, most)) => format!("+lookup:most={most}"),
        None => "+lookup".to_owned(),
    }
}

/// A line for the best tree, and one for the same with a lookup, of which nothing was predicted.
fn rows(batch: &Batch) -> Vec<String> {
    let Batch { rows, best, tested, with_lookup, .. } = batch;
    let mut lines = vec![format!(
        "{rows:>8}  {:>9.3}  {:>10.2}  {:>7.2}x  {:>8.3}  {:>9.2}  {:>7.2}x  {}",
        best.tokens_per_round,
        best.tokens_per_second,
        best.speedup,
        tested.tokens_per_round,
        tested.tokens_per_second,
        tested.speedup,
        short_tree(best),
    )];
    lines.extend(with_lookup.iter().map(|beside| {
        let tested = &beside.tested;
        format!(
            "{rows:>8}  {:>9}  {:>10}  {:>8}  {:>8.3}  {:>9.2}  {:>7.2}x  {}{}",
            "-",
            "-",
            "-",
            tested.tokens_per_round,
            tested.tokens_per_second,
            tested.speedup,
            short_tree(best),
            short_lookup(beside),
        )
    }));
    lines
}

/// What follows for a batch, in a line.
pub fn verdict(batch: &Batch) -> String {
    let Batch { rows, best, tested, with_lookup, .. } = batch;
    let together = if *rows == 1 { "one request alone".to_owned() } else { format!("{rows} requests together") };
    let mut line = match (best.speedup > 1.0, tested.speedup > 1.0) {
        (false, false) => {
            let measured = tested.speedup;
            format!("{together}: plain decoding is faster; the best tree was {measured:.2} x")
        }
        (true, true) => format!("{together}: {:.2} x, as predicted within {:.0} %", tested.speedup, off(batch)),
        (foreseen, _) => {
            let first = if foreseen { "plain decoding was faster" } else { "the tree was faster" };
            let (predicted, measured) = (best.speedup, tested.speedup);
            format!(
                "{together}: {first}, {measured:.2} x where {predicted:.2} x was predicted; the two are too close to tell, or the \
                 machine was busy: tune again"
            )
        }
    };
    if let Some(beside) = with_lookup.as_ref().filter(|beside| beside.tested.speedup > tested.speedup) {
        line += &format!("; {:.2} x with a lookup beside the draft", beside.tested.speedup);
    }
    let faults: usize = batch.decodes().map(|one| one.faults).sum();
    if faults > 0 {
        line += &format!("; {faults} ANSWERS ARE WRONG");
    }
    line
}

/// How far the measured speed-up is from the predicted one, in per cent.
fn off(batch: &Batch) -> f64 {
    100.0 * (batch.tested.speedup / batch.best.speedup.max(f64::MIN_POSITIVE) - 1.0).abs()
}
