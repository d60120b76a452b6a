//! Probes: what the target's head says about some stored states, noted when they were captured and asked again before
//! they are trained on.
//!
//! A checksum proves that bytes are those that were written. It does not prove that the right ones were: states of
//! another layer, of another model or of the row beside train a draft just as quietly. So a shard notes, for rows spread
//! over its documents, the norm of every captured state as it is stored, and what the head said of the final state before
//! it was encoded: its best token, the log-sum-exp of its logits, and its loss on the token that really follows.
//!
//! Norms must come out as they were. How far logits may be off is known: a number in bfloat16 or float8 differs by a relative error that is spread
//! evenly, independent of the others. A logit `h . w` then differs by noise of deviation `error * sqrt(sum h^2 w^2)`,
//! and neither log-sum-exp nor loss by more than the largest of those. Six deviations are allowed.
//!
//! Shape legend: see [`super`].

use tch::{Kind, Tensor};

use super::element::Element;
use super::reader::Store;
use crate::device;
use crate::error::{Error, Result};

/// Rows that are probed in one shard.
pub const PROBES_PER_SHARD: usize = 32;
/// Rows of the head that are widened to float32 at once.
const HEAD_CHUNK: i64 = 8192;
/// Probes that are asked in one pass over the head.
const PROBES_PER_PASS: usize = 1024;
/// Deviations of rounding noise that are allowed.
const DEVIATIONS: f64 = 6.0;
/// Relative difference of logits that devices and thread counts cause.
const SLACK: f64 = 1e-3;
/// Relative difference of norms: they are made in float64 from the very numbers that are stored, and noted in float32.
const NORM_SLACK: f64 = 1e-6;

/// Figures of some rows.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Probes {
    /// Rows of the shard, `[P]`.
    pub rows: Vec<i64>,
    /// The head's best token, `[P]`.
    pub top1: Vec<i64>,
    /// By how much it is better than the second, `[P]`.
    pub margin: Vec<f32>,
    /// Log-sum-exp of the logits, `[P]`.
    pub log_sum_exp: Vec<f32>,
    /// Negative log-likelihood of the token that follows, `[P]`.
    pub next_loss: Vec<f32>,
    /// Norm of each captured state as stored, `[P, L]`.
    pub norms: Vec<f32>,
}

impl Probes {
    /// Figures of rows with these final states `[P, H]`, these states as stored (`[P, H]` for each layer) and these next
    /// tokens.
    pub fn make(rows: &[usize], last: &Tensor, stored: &[Tensor], next: &[i64], head: &Tensor) -> Result<Self> {
        let rows = rows.iter().map(|&row| row as i64).collect();
        let answers = ask(last, next, head, false)?;
        let norms = stored.iter().map(norms).collect::<Result<Vec<_>>>()?;
        let norms = Vec::try_from(Tensor::f_stack(&norms, 1)?.f_flatten(0, -1)?)?; // [P, L]
        let narrow = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect();
        Ok(Self {
            rows,
            top1: answers.top1,
            margin: narrow(answers.margin),
            log_sum_exp: narrow(answers.log_sum_exp),
            next_loss: narrow(answers.next_loss),
            norms,
        })
    }

    /// Figures that are no integers, with their names.
    pub fn figures(&self) -> [(&'static str, &[f32]); 4] {
        [
            ("margin", &self.margin),
            ("log_sum_exp", &self.log_sum_exp),
            ("next_loss", &self.next_loss),
            ("norms", &self.norms),
        ]
    }
}

/// The rows that are probed in a shard with these offsets: spread evenly over all rows that a token follows.
pub fn rows(offsets: &[i64]) -> Vec<usize> {
    // Rows without the last of each document, numbered on.
    let starts: Vec<usize> = offsets.iter().enumerate().map(|(document, &offset)| offset as usize - document).collect();
    let candidates = starts.last().copied().unwrap_or(0);
    let count = PROBES_PER_SHARD.min(candidates);
    (0..count)
        .map(|index| {
            let number = (2 * index + 1) * candidates / (2 * count);
            let document = starts.partition_point(|&start| start <= number) - 1;
            number + document
        })
        .collect()
}

/// What a head says about states.
struct Answers {
    top1: Vec<i64>,
    margin: Vec<f64>,
    log_sum_exp: Vec<f64>,
    next_loss: Vec<f64>,
    /// `sqrt(sum h^2 w^2)`, the largest over the vocabulary; empty where it was not asked for.
    spread: Vec<f64>,
}

/// Logits of `states [P, H]` in float32, a chunk of the vocabulary at a time.
fn ask(states: &Tensor, next: &[i64], head: &Tensor, spread: bool) -> Result<Answers> {
    let _guard = tch::no_grad_guard();
    let states = states.f_to_device(head.device())?.f_to_kind(Kind::Float)?; // [P, H]
    let vocabulary = head.size()[0];
    let (mut best, mut tokens, mut sums, mut spreads) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for start in (0..vocabulary).step_by(HEAD_CHUNK as usize) {
        let count = HEAD_CHUNK.min(vocabulary - start);
        let table = head.f_narrow(0, start, count)?.f_to_kind(Kind::Float)?; // [C, H]
        let logits = states.f_matmul(&table.f_transpose(0, 1)?)?; // [P, C]
        let (values, ids) = logits.f_topk(count.min(2), 1, true, true)?; // [P, 2]
        best.push(values);
        tokens.push(ids + start);
        sums.push(logits.f_logsumexp([1].as_slice(), false)?); // [P]
        if spread {
            let squares = states.f_square()?.f_matmul(&table.f_square()?.f_transpose(0, 1)?)?; // [P, C]
            spreads.push(squares.f_amax([1].as_slice(), false)?.f_sqrt()?); // [P]
        }
    }
    let (best, tokens) = (Tensor::f_cat(&best, 1)?, Tensor::f_cat(&tokens, 1)?);
    let (values, places) = best.f_topk(best.size()[1].min(2), 1, true, true)?; // [P, 2]
    let top1 = tokens.f_gather(1, &places, false)?.f_select(1, 0)?; // [P]
    let margin = values.f_select(1, 0)? - values.f_select(1, -1)?; // [P]
    let log_sum_exp = Tensor::f_stack(&sums, 1)?.f_logsumexp([1].as_slice(), false)?; // [P]
    let next = device::upload(next, head.device())?;
    let rows = head.f_index_select(0, &next)?.f_to_kind(Kind::Float)?; // [P, H]
    let next_loss = &log_sum_exp - (rows * &states).f_sum_dim_intlist([1].as_slice(), false, Kind::Float)?; // [P]
    let spread = match spread {
        true => doubles(&Tensor::f_stack(&spreads, 1)?.f_amax([1].as_slice(), false)?)?,
        false => Vec::new(),
    };
    Ok(Answers {
        top1: Vec::try_from(top1)?,
        margin: doubles(&margin)?,
        log_sum_exp: doubles(&log_sum_exp)?,
        next_loss: doubles(&next_loss)?,
        spread,
    })
}

fn doubles(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(Vec::try_from(tensor.f_to_kind(Kind::Double)?)?)
}

/// Norms of states `[P, H]`: `[P]` float32 on the CPU.
fn norms(states: &Tensor) -> Result<Tensor> {
    let states = states.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Double)?;
    Ok(states.f_square()?.f_sum_dim_intlist([1].as_slice(), false, Kind::Double)?.f_sqrt()?.f_to_kind(Kind::Float)?)
}

/// Largest relative error of a head's numbers in this element type, against the type it was probed in.
fn head_error(kind: Kind) -> f64 {
    match kind {
        Kind::BFloat16 => Element::Bfloat16.relative_error(),
        Kind::Half => 1.0 / 2048.0,
        _ => 0.0,
    }
}

/// Asks a head about the probes of every shard, and refuses a store whose states are not its own.
pub fn verify(store: &Store, head: &Tensor) -> Result<()> {
    let element = store.manifest().element;
    // An even spread from -e to e has the deviation e / sqrt(3).
    let error = element.relative_error().hypot(head_error(head.kind())) / 3f64.sqrt();
    let layers = store.manifest().layers.len();
    let held = store.shards();
    let probes: Vec<(usize, usize)> = (0..held.len())
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
            let now = Now {
                norms,
                top1: answers.top1[index],
                log_sum_exp: answers.log_sum_exp[index],
                next_loss: answers.next_loss[index],
                noise,
            };
            if let Some(difference) = difference(held[shard].probes(), probe, &store.manifest().layers, &now) {
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

/// NaN is not within any bound.
fn within(got: f64, want: f64, bound: f64) -> bool {
    (got - want).abs() <= bound
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probed_rows_are_spread_and_followed_by_a_token_of_their_document() {
        // One token alone, two, many.
        let offsets = [0, 1, 3, 203, 204];
        let rows = rows(&offsets);
        assert_eq!(rows.len(), PROBES_PER_SHARD);
        assert!(rows.windows(2).all(|pair| pair[0] < pair[1] && pair[1] - pair[0] <= 8), "{rows:?}");
        assert!(rows.iter().all(|row| *row < 202 && ![0, 2].contains(row)), "{rows:?}");
        assert_eq!(super::rows(&[0, 1, 3, 4, 6]), [1, 4]);
        assert_eq!(super::rows(&[0, 1, 2]), Vec::<usize>::new());
        assert_eq!(super::rows(&[0]), Vec::<usize>::new());
    }

    #[test]
    fn a_head_is_asked_in_chunks_as_at_once() {
        tch::manual_seed(4);
        let options = (Kind::Float, tch::Device::Cpu);
        let head = Tensor::randn([HEAD_CHUNK + 300, 8], options);
        let states = Tensor::randn([5, 8], options);
        let next = [0, 3, HEAD_CHUNK, HEAD_CHUNK + 299, 17];
        let answers = ask(&states, &next, &head, true).unwrap();
        let logits = states.matmul(&head.transpose(0, 1)).to_kind(Kind::Double);
        let losses = -logits.log_softmax(-1, Kind::Double).gather(1, &Tensor::from_slice(&next).unsqueeze(1), false);
        let near = |got: &[f64], want: Tensor| {
            let difference = (Tensor::from_slice(got) - want.flatten(0, -1)).abs().max().double_value(&[]);
            assert!(difference < 1e-5, "{difference}");
        };
        near(&answers.next_loss, losses);
        near(&answers.log_sum_exp, logits.logsumexp([-1].as_slice(), false));
        let (best, _) = logits.topk(2, 1, true, true);
        near(&answers.margin, best.select(1, 0) - best.select(1, 1));
        assert_eq!(answers.top1, Vec::<i64>::try_from(logits.argmax(1, false)).unwrap());
        let products = states.unsqueeze(1) * head.unsqueeze(0); // [P, V, H]
        let spread = products.square().sum_dim_intlist([2].as_slice(), false, Kind::Double).sqrt();
        near(&answers.spread, spread.amax([1].as_slice(), false));
    }
}
