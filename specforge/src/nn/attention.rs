//! Scaled dot-product attention with grouped key/value heads.

use tch::Tensor;

use super::mask::PreparedMask;

/// Attention of `query [B, N, T, D]` on `key, value [B, G, S, D]`; `G` divides `N`. Returns `[B, N, T, D]`.
pub fn attention(query: &Tensor, key: &Tensor, value: &Tensor, mask: &PreparedMask) -> Tensor {
    let (rows, heads, tokens, dim) = query.size4().expect("query is [B, N, T, D]");
    let groups = key.size()[1];
    // One new token: the heads of a group act as queries of one head, and no key is read twice.
    if tokens == 1 && heads != groups {
        let grouped = query.view([rows, groups, heads / groups, dim]); // [B, G, N/G, D]
        return kernel(&grouped, key, value, mask).reshape([rows, heads, 1, dim]);
    }
    // The kernels for GPUs want a key for every query head, the one for CPUs finds a group's key itself.
    let times = if query.device().is_cuda() { heads / groups } else { 1 };
    let (key, value) = (repeat_heads(key, times), repeat_heads(value, times)); // [B, G or N, S, D]
    let PreparedMask::Slices(lengths) = mask else {
        return kernel(query, &key, &value, mask);
    };
    let mut start = 0;
    let slices: Vec<Tensor> = lengths
        .iter()
        .map(|&length| {
            let slice = |tensor: &Tensor| tensor.narrow(2, start, length);
            let output = kernel(&slice(query), &slice(&key), &slice(&value), &PreparedMask::Causal);
            start += length;
            output
        })
        .collect();
    Tensor::cat(&slices, 2) // [B, N, T, D]
}

fn kernel(query: &Tensor, key: &Tensor, value: &Tensor, mask: &PreparedMask) -> Tensor {
    let (dense, causal) = match mask {
        PreparedMask::Full => (None, false),
        PreparedMask::Causal => (None, true),
        PreparedMask::Dense(mask) => (Some(mask), false),
        PreparedMask::Slices(_) => unreachable!("slices are taken apart by the caller"),
    };
    let grouped = query.size()[1] != key.size()[1];
    Tensor::scaled_dot_product_attention(query, key, value, dense, 0.0, causal, None, grouped)
}

/// `[B, G, S, D]` to `[B, G * times, S, D]`: head `g` serves queries `g * times ..`.
fn repeat_heads(tensor: &Tensor, times: i64) -> Tensor {
    if times == 1 {
        return tensor.shallow_clone();
    }
    let (rows, groups, slots, dim) = tensor.size4().expect("keys are [B, G, S, D]");
    tensor.unsqueeze(2).expand([rows, groups, times, slots, dim], false).reshape([rows, groups * times, slots, dim])
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::nn::AttentionMask;

    fn random(shape: [i64; 4]) -> Tensor {
        Tensor::randn(shape, (Kind::Double, Device::Cpu))
    }

    /// Softmax attention written out, with repeated heads.
    fn reference(query: &Tensor, key: &Tensor, value: &Tensor, visible: &Tensor) -> Tensor {
        let times = query.size()[1] / key.size()[1];
        let (key, value) =
            (key.repeat_interleave_self_int(times, 1, None), value.repeat_interleave_self_int(times, 1, None));
        let scores = query.matmul(&key.transpose(2, 3)) / (query.size()[3] as f64).sqrt();
        scores.masked_fill(&visible.logical_not(), f64::NEG_INFINITY).softmax(-1, Kind::Double).matmul(&value)
    }

    #[test]
    fn every_form_of_mask_equals_the_written_out_softmax() {
        tch::manual_seed(1);
        let (key, value) = (random([2, 2, 7, 4]), random([2, 2, 7, 4]));
        for (tokens, past) in [(1, [6, 6]), (1, [6, 3]), (3, [4, 2]), (7, [0, 0])] {
            let query = random([2, 6, tokens, 4]);
            let slots = past.iter().max().unwrap() + tokens;
            let (key, value) = (key.narrow(2, 0, slots), value.narrow(2, 0, slots));
            let slot = Tensor::arange(slots, (Kind::Int64, Device::Cpu));
            let limit = Tensor::arange(tokens, (Kind::Int64, Device::Cpu)).view([1, 1, -1, 1])
                + Tensor::from_slice(&past).view([2, 1, 1, 1]);
            let want = reference(&query, &key, &value, &slot.le_tensor(&limit));
            let got = attention(&query, &key, &value, &AttentionMask::Causal.prepare(&past, tokens, Device::Cpu));
            assert!((got - want).abs().max().double_value(&[]) < 1e-12, "tokens {tokens} past {past:?}");
        }
    }

    #[test]
    fn documents_do_not_see_each_other() {
        tch::manual_seed(2);
        let [query, key, value] = [6, 2, 2].map(|heads| random([1, heads, 5, 4]));
        let mask = AttentionMask::Documents(vec![2, 3]).prepare(&[0], 5, Device::Cpu);
        let packed = attention(&query, &key, &value, &mask);
        let mut start = 0;
        for length in [2, 3] {
            let alone = |tensor: &Tensor| tensor.narrow(2, start, length);
            let want = attention(&alone(&query), &alone(&key), &alone(&value), &PreparedMask::Causal);
            assert!(packed.narrow(2, start, length).equal(&want));
            start += length;
        }
    }
}
