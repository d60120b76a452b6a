//! Probes: what the target's head says about some stored states, noted when they were captured and asked again before
//! they are trained on (`verify`).
//!
//! A checksum proves that bytes are those that were written. It does not prove that the right ones were: states of
//! another layer, of another model or of the row beside train a draft just as quietly. So a shard notes, for rows spread
//! over its documents, the norm of every captured state as it is stored, and what the head said of the final state before
//! it was encoded: its best token, the log-sum-exp of its logits, and its loss on the token that really follows.
//!
//! Shape legend: see [`super`].

use tch::{Kind, Tensor};

use crate::device;
use crate::error::Result;
use crate::nn::Head;

/// Rows that are probed in one shard.
pub const PROBES_PER_SHARD: usize = 32;
/// Rows of the head that are widened to float32 at once.
const HEAD_CHUNK: i64 = 8192;
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
    pub fn make(rows: &[usize], last: &Tensor, stored: &[Tensor], next: &[i64], head: &Head) -> Result<Self> {
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
pub(in crate::features) struct Answers {
    pub(super) top1: Vec<i64>,
    pub(super) margin: Vec<f64>,
    pub(super) log_sum_exp: Vec<f64>,
    pub(in crate::features) next_loss: Vec<f64>,
    /// `|scale| sqrt(sum h^2 w^2)`, the largest over the vocabulary; empty where it was not asked for. A soft cap makes no
    /// difference larger.
    pub(super) spread: Vec<f64>,
}

/// Logits of `states [P, H]` in float32, a chunk of the vocabulary at a time.
pub(in crate::features) fn ask(states: &Tensor, next: &[i64], head: &Head, spread: bool) -> Result<Answers> {
    let _guard = tch::no_grad_guard();
    let states = states.f_to_device(head.device())?.f_to_kind(Kind::Float)?; // [P, H]
    let vocabulary = head.vocab_size();
    let (mut best, mut tokens, mut sums, mut spreads) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for start in (0..vocabulary).step_by(HEAD_CHUNK as usize) {
        let count = HEAD_CHUNK.min(vocabulary - start);
        let part = head.narrow(start, count)?.to(Kind::Float, head.device())?;
        let table = &part.weight; // [C, H]
        let logits = part.finish(states.f_matmul(&table.f_transpose(0, 1)?)?); // [P, C]
        let (values, ids) = logits.f_topk(count.min(2), 1, true, true)?; // [P, 2]
        best.push(values);
        tokens.push(ids + start);
        sums.push(logits.f_logsumexp([1].as_slice(), false)?); // [P]
        if spread {
            let squares = states.f_square()?.f_matmul(&table.f_square()?.f_transpose(0, 1)?)?; // [P, C]
            spreads.push(squares.f_amax([1].as_slice(), false)?.f_sqrt()? * head.scale.abs()); // [P]
        }
    }
    let (best, tokens) = (Tensor::f_cat(&best, 1)?, Tensor::f_cat(&tokens, 1)?);
    let (values, places) = best.f_topk(best.size()[1].min(2), 1, true, true)?; // [P, 2]
    let top1 = tokens.f_gather(1, &places, false)?.f_select(1, 0)?; // [P]
    let margin = values.f_select(1, 0)? - values.f_select(1, -1)?; // [P]
    let log_sum_exp = Tensor::f_stack(&sums, 1)?.f_logsumexp([1].as_slice(), false)?; // [P]
    let next = device::upload(next, head.device())?;
    let rows = head.rows(&next)?.to(Kind::Float, head.device())?;
    let products = (&rows.weight * &states).f_sum_dim_intlist([1].as_slice(), false, Kind::Float)?; // [P]
    let next_loss = &log_sum_exp - rows.finish(products); // [P]
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

pub(in crate::features) fn doubles(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(Vec::try_from(tensor.f_to_kind(Kind::Double)?)?)
}

/// Norms of states `[P, H]`: `[P]` float32 on the CPU.
pub(super) fn norms(states: &Tensor) -> Result<Tensor> {
    let states = states.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Double)?;
    Ok(states.f_square()?.f_sum_dim_intlist([1].as_slice(), false, Kind::Double)?.f_sqrt()?.f_to_kind(Kind::Float)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::drawn;

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
        drawn::seed(4);
        let options = (Kind::Float, tch::Device::Cpu);
        let weight = drawn::randn([HEAD_CHUNK + 300, 8], options);
        let bias = Some(drawn::randn([HEAD_CHUNK + 300], options));
        let bent = Head { bias, scale: 0.5, softcap: Some(4.0), ..Head::plain(weight.shallow_clone()) };
        let states = drawn::randn([5, 8], options);
        let next = [0, 3, HEAD_CHUNK, HEAD_CHUNK + 299, 17];
        let near = |got: &[f64], want: Tensor| {
            let difference = (Tensor::from_slice(got) - want.flatten(0, -1)).abs().max().double_value(&[]);
            assert!(difference < 1e-5, "{difference}");
        };
        for head in [Head::plain(weight.shallow_clone()), bent] {
            let answers = ask(&states, &next, &head, true).unwrap();
            let logits = head.logits(&states).to_kind(Kind::Double);
            let losses =
                -logits.log_softmax(-1, Kind::Double).gather(1, &Tensor::from_slice(&next).unsqueeze(1), false);
            near(&answers.next_loss, losses);
            near(&answers.log_sum_exp, logits.logsumexp([-1].as_slice(), false));
            let (best, _) = logits.topk(2, 1, true, true);
            near(&answers.margin, best.select(1, 0) - best.select(1, 1));
            assert_eq!(answers.top1, Vec::<i64>::try_from(logits.argmax(1, false)).unwrap());
            let products = states.unsqueeze(1) * weight.unsqueeze(0); // [P, V, H]
            let spread = products.square().sum_dim_intlist([2].as_slice(), false, Kind::Double).sqrt() * head.scale;
            near(&answers.spread, spread.amax([1].as_slice(), false));
        }
    }
}
