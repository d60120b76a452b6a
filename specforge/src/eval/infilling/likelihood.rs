//! How likely a masked diffusion model finds a text: LLaDA's estimate (<https://arxiv.org/abs/2502.09992>, and
//! `get_log_likelihood.py` of ML-GSAI/LLaDA, commit b7e6c3565f194352da44b38dd12b6970597309f3). Of an answer of `L` tokens, `l`
//! are masked, `l` as likely 1 as `L`; `L / l` times the logarithm of the probabilities of the masked tokens is, on average over
//! `l` and over which ones they are, a lower bound of the logarithm of the answer's probability.
//!
//! The numbers of masked tokens are spread evenly over the samples, and which tokens are masked depends on the seed and the text's
//! key alone: two answers to one prompt are measured with the same masks.

use tch::{Device, Kind, Tensor};

use crate::decode::diffusion::{Network, Rows, Text, View};
use crate::device;
use crate::error::{Error, Result};
use crate::nn::noise;

/// Noise domain of which tokens are masked.
const DOMAIN: u64 = 67;

/// The bound of an answer behind its prompt, for each token of the answer, in nats. `text` is prompt and answer, with the tokens of
/// the prompt.
pub fn log_likelihood(
    network: &Network<'_>,
    (ids, prompt): (&[i64], usize),
    samples: usize,
    (seed, key): (u64, u64),
) -> Result<f64> {
    let length = ids.len().saturating_sub(prompt);
    if length == 0 || samples == 0 {
        return Err(Error::Failed("a likelihood: expected an answer and at least one sample of it".to_owned()));
    }
    let mut sum = 0.0;
    for sample in 0..samples {
        // From 1 to all of them, evenly over the samples.
        let count = 1 + (2 * sample + 1) * length / (2 * samples);
        let masked = choose(length, count.min(length), (seed.wrapping_add(key), sample as u64));
        sum += of_masked(network, (ids, prompt), &masked)? * length as f64 / masked.len() as f64;
    }
    Ok(sum / (samples * length) as f64)
}

/// `count` of the places of an answer, ascending.
fn choose(length: usize, count: usize, (seed, sample): (u64, u64)) -> Vec<usize> {
    let mut ranked: Vec<(u64, usize)> =
        (0..length).map(|place| (noise::keyed_bits(seed, DOMAIN, place as u64, sample), place)).collect();
    ranked.sort_unstable();
    let mut chosen: Vec<usize> = ranked.into_iter().take(count).map(|(_, place)| place).collect();
    chosen.sort_unstable();
    chosen
}

/// Sum of the logarithms of the probabilities of the true tokens at masked places of an answer.
fn of_masked(network: &Network<'_>, (ids, prompt): (&[i64], usize), masked: &[usize]) -> Result<f64> {
    let mut text = Text { ids: ids.to_vec(), prompt };
    masked.iter().for_each(|place| text.ids[prompt + place] = network.diffusion().mask);
    let texts = [&text];
    let rows = Rows { texts: &texts, guided: false };
    let view = View::new(&rows, &[0], ids.len() as i64);
    let last = network.whole(&rows, &view, None, &mut |_, _| {})?; // [1, T, H]
    let places: Vec<i64> = masked.iter().map(|&place| (prompt + place) as i64 - network.shift()).collect();
    let tokens: Vec<i64> = masked.iter().map(|&place| ids[prompt + place]).collect();
    let [places, tokens] = [places, tokens].map(|list| device::send(&Tensor::from_slice(&list), network.device()));
    let logits = network.logits(&last.squeeze_dim(0).index_select(0, &places)); // [n, V]
    let chosen = logits.log_softmax(-1, Kind::Double).gather(1, &tokens.unsqueeze(1), false);
    Ok(chosen.sum(Kind::Double).to_device(Device::Cpu).double_value(&[]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::diffusion::tiny::{MASK, both};

    /// Of an answer of one token there is one mask: the estimate is the probability itself.
    #[test]
    fn one_token_has_its_probability() {
        for model in both() {
            let network = Network::of(model.as_ref()).unwrap();
            let ids = [3, 7, 1, 9, 4];
            let got = log_likelihood(&network, (&ids, 4), 3, (1, 2)).unwrap();
            let text = Text { ids: vec![3, 7, 1, 9, MASK], prompt: 4 };
            let texts = [&text];
            let rows = Rows { texts: &texts, guided: false };
            let row = View::new(&rows, &[4 - network.shift()], 1);
            let last = network.whole(&rows, &row, None, &mut |_, _| {}).unwrap();
            let want = network.logits(&last).log_softmax(-1, Kind::Double).double_value(&[0, 0, 4]);
            assert!((got - want).abs() < 1e-12, "{got} {want}");
            // More tokens than one: a mean of sums of probabilities, the same every time, other ones with another key.
            let of = |key| log_likelihood(&network, (&ids, 1), 6, (1, key)).unwrap();
            assert!(of(1) == of(1) && of(1) != of(2) && of(1) < 0.0);
            assert!(log_likelihood(&network, (&ids, 5), 6, (1, 1)).is_err());
        }
    }

    #[test]
    fn as_many_are_chosen_as_were_asked_for() {
        for count in 1..=9 {
            let chosen = choose(9, count, (4, 5));
            assert!(chosen.len() == count && chosen.is_sorted() && chosen.iter().all(|place| *place < 9));
        }
        assert_ne!(choose(90, 9, (4, 5)), choose(90, 9, (4, 6)));
    }
}
