//! Whether the states of a store are those of a target: its head is asked about the probes again.
//!
//! Norms must come out as they were. How far logits may be off is known: a number in bfloat16 or float8 differs by a
//! relative error that is spread evenly, independent of the others. A logit `h . w` then differs by noise of deviation
//! `error * sqrt(sum h^2 w^2)`, and neither log-sum-exp nor loss by more than the largest of those. Six deviations are
//! allowed.
//!
//! Shape legend: see [`super`].

use tch::Kind;

use super::element::Element;
use super::probe::{Probes, ask, doubles, norms};
use super::reader::{Share, Store};
use crate::error::{Error, Result};
use crate::features::WholeVocabulary;
use crate::nn::Head;

/// Probes that are asked in one pass over the head.
const PROBES_PER_PASS: usize = 1024;
/// Deviations of rounding noise that are allowed.
const DEVIATIONS: f64 = 6.0;
/// Relative difference of logits that devices and thread counts cause.
const SLACK: f64 = 1e-3;
/// Relative difference of norms: they are made in float64 from the very numbers that are stored, and noted in float32.
const NORM_SLACK: f64 = 1e-6;

/// Largest relative error of a head's numbers in this element type, against the type it was probed in.
fn head_error(kind: Kind) -> f64 {
    match kind {
        Kind::BFloat16 => Element::Bfloat16.relative_error(),
        Kind::Half => 1.0 / 2048.0,
        _ => 0.0,
    }
}

/// Asks a head about the probes of every shard of a share, and refuses a store whose states are not its own.
pub fn verify(store: &Store, head: &Head, share: Share) -> Result<()> {
    let element = store.manifest().element;
    // An even spread from -e to e has the deviation e / sqrt(3).
    let error = element.relative_error().hypot(head_error(head.kind())) / 3f64.sqrt();
    let layers = store.manifest().layers.len();
    let held = store.shards();
    let probes: Vec<(usize, usize)> = (0..held.len())
        .filter(|shard| share.has(*shard))
        .flat_map(|shard| (0..held[shard].probes().rows.len()).map(move |probe| (shard, probe)))
        .collect();
    for pass in probes.chunks(PROBES_PER_PASS) {
        let row = |&(shard, probe): &(usize, usize)| held[shard].probes().rows[probe] as usize;
        let next: Vec<i64> = pass.iter().map(|place| held[place.0].next_token(row(place))).collect();
        let rows: Vec<_> = pass.iter().map(|place| (place.0, row(place)..row(place) + 1)).collect();
        let states = (0..layers).map(|layer| store.gather(layer, &rows)).collect::<Result<Vec<_>>>()?; // [P, H]
        let norms: Vec<Vec<f64>> = states.iter().map(|states| doubles(&norms(states)?)).collect::<Result<_>>()?;
        let answers = ask(&states[layers - 1], &next, head, error > 0.0)?;
        for (index, &(shard, probe)) in pass.iter().enumerate() {
            let noise = DEVIATIONS * error * answers.spread.get(index).copied().unwrap_or(0.0);
            let norms: Vec<f64> = norms.iter().map(|norms| norms[index]).collect();
            // A narrower head says something else, and is not told what was noted.
            let noted = if head.kind() == Kind::Float { store.whole_vocabulary(&rows[index..=index]) } else { None };
            let now = Now {
                margin: answers.margin[index],
                norms,
                top1: answers.top1[index],
                log_sum_exp: answers.log_sum_exp[index],
                next_loss: answers.next_loss[index],
                noise,
            };
            let difference = difference(held[shard].probes(), probe, &store.manifest().layers, &now)
                .or_else(|| noted.and_then(|noted| noted_difference(&noted, &now)));
            if let Some(difference) = difference {
                let row = row(&(shard, probe));
                let document = held[shard].document_of(row);
                let place = row - held[shard].rows_of(document).start;
                let problem = format!(
                    "row {place} of document {document} (row {row} of the file): {difference}; these are not the \
                     hidden states that this target computes"
                );
                return Err(Error::bad_file(held[shard].path(), problem)
                    .with_hint("capture again, into another folder, from the target that is trained for"));
            }
        }
    }
    Ok(())
}

/// What one probe gives now.
struct Now {
    norms: Vec<f64>,
    top1: i64,
    margin: f64,
    log_sum_exp: f64,
    next_loss: f64,
    /// By how much rounding may have moved a logit.
    noise: f64,
}

/// The first figure of a probe that is further off than it may be: name, expected and got.
fn difference(probes: &Probes, probe: usize, layers: &[usize], now: &Now) -> Option<String> {
    for ((layer, got), want) in layers.iter().zip(&now.norms).zip(&probes.norms[probe * layers.len()..]) {
        let want = f64::from(*want);
        if !within(*got, want, want * NORM_SLACK) {
            return Some(format!("norm of hidden state {layer}: expected {want:.5}, got {got:.5}"));
        }
    }
    let bound = |size: f64| now.noise + SLACK * size.abs().max(1.0);
    let (want, got) = (f64::from(probes.log_sum_exp[probe]), now.log_sum_exp);
    let sum_bound = bound(want);
    if !within(got, want, sum_bound) {
        return Some(format!("log-sum-exp of its logits (bound {sum_bound:.2e}): expected {want:.4}, got {got:.4}"));
    }
    // Two logits took part.
    let (want, got) = (f64::from(probes.next_loss[probe]), now.next_loss);
    let loss_bound = 2.0 * bound(want).max(sum_bound);
    if !within(got, want, loss_bound) {
        let what = format!("loss on the token that follows (bound {loss_bound:.2e})");
        return Some(format!("{what}: expected {want:.4}, got {got:.4}"));
    }
    let clear = f64::from(probes.margin[probe]) > 2.0 * sum_bound;
    let (want, got) = (probes.top1[probe], now.top1);
    (clear && got != want).then(|| format!("likeliest token: expected {want}, got {got}"))
}

/// What a store notes of all tokens behind a probed row, if it is not what the head says of the state as it is stored.
fn noted_difference(noted: &WholeVocabulary, now: &Now) -> Option<String> {
    let (want, got) = (f64::from(*noted.log_sum_exp.first()?), now.log_sum_exp);
    // Both are of the same state: how it was stored plays no part.
    let bound = SLACK * want.abs().max(1.0);
    if !within(got, want, bound) {
        return Some(format!("log-sum-exp of all its logits (bound {bound:.2e}): expected {want:.4}, got {got:.4}"));
    }
    let (want, got) = (*noted.likeliest.first()?, now.top1);
    (now.margin > 2.0 * bound && got != want).then(|| format!("likeliest of all tokens: expected {want}, got {got}"))
}

/// NaN is not within any bound.
fn within(got: f64, want: f64, bound: f64) -> bool {
    (got - want).abs() <= bound
}
