//! Scaled dot-product attention with grouped key/value heads, and what some families change about it.

use tch::{Device, Kind, Tensor};

use super::mask::{DenseMask, PreparedMask, Slices};
use crate::shim;

/// What a family changes about attention. The default changes nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    /// Multiplies the scores; `1 / sqrt(D)` where it is not given.
    pub scale: Option<f64>,
    /// `c` of `c tanh(x / c)`, which bends the scaled scores into the range from `-c` to `c`.
    pub softcap: Option<f64>,
    /// `[N]`: a score of each head that takes part in the softmax and has no value. A query may so look at nothing.
    pub sinks: Option<&'a Tensor>,
}

/// Scores that are written out at once, where no kernel does it: 256 MiB in float32.
const SCORES: i64 = 1 << 26;

/// Attention of `query [B, N, T, D]` on `key [B, G, S, D]` and `value [B, G, S, E]`; `G` divides `N`. Returns
/// `[B, N, T, E]`.
pub fn attention(query: &Tensor, key: &Tensor, value: &Tensor, mask: &PreparedMask, options: &Options<'_>) -> Tensor {
    let slice = |tensor: &Tensor, start: i64, count: i64| tensor.narrow(2, start, count);
    let sliced = |lengths: &[i64], key: &Tensor, value: &Tensor, seen: &dyn Fn(i64) -> Seen<'static>| {
        let mut start = 0;
        let slices: Vec<Tensor> = lengths
            .iter()
            .map(|&length| {
                let [query, key, value] = [query, key, value].map(|tensor| slice(tensor, start, length));
                start += length;
                piece(&query, &key, &value, &seen(length), options)
            })
            .collect();
        Tensor::cat(&slices, 2) // [B, N, T, E]
    };
    match mask {
        PreparedMask::Full => piece(query, key, value, &Seen::Full, options),
        PreparedMask::Causal => piece(query, key, value, &Seen::Causal, options),
        PreparedMask::Dense(mask) => piece(query, key, value, &Seen::Dense(mask), options),
        PreparedMask::Recent(count) => {
            let slots = key.size()[2];
            let (start, count) = ((slots - count).max(0), slots.min(*count));
            piece(query, &slice(key, start, count), &slice(value, start, count), &Seen::Full, options)
        }
        PreparedMask::Slices(slices) => {
            if let Some(output) = packed(query, key, value, slices, options) {
                return output;
            }
            // Keys for every head are made once for all slices, where a kernel wants them.
            let (key, value) = (for_every_head(query, key), for_every_head(query, value));
            sliced(&slices.lengths, &key, &value, &|_| Seen::Causal)
        }
        PreparedMask::Windowed { lengths, window, band } => {
            sliced(lengths, key, value, &|length| match length <= *window {
                true => Seen::Causal,
                false => Seen::Band(band.narrow(0, 0, length).narrow(1, 0, length).view([1, 1, length, length])),
            })
        }
    }
}

/// All documents of a pack in one call of a GPU's kernel, where there is one for them: not for float64, for values of another
/// size than keys, or for scores that are bent.
fn packed(query: &Tensor, key: &Tensor, value: &Tensor, slices: &Slices, options: &Options<'_>) -> Option<Tensor> {
    let bounds = slices.bounds.as_ref()?;
    let plain = options.softcap.is_none() && options.sinks.is_none();
    if !plain || query.kind() == Kind::Double || key.size() != value.size() {
        return None;
    }
    let tokens = |tensor: &Tensor| tensor.squeeze_dim(0).transpose(0, 1); // [T, N or G, D]
    let dim = query.size().last().copied().unwrap_or(1) as f64;
    let longest = slices.lengths.iter().copied().max().unwrap_or(0);
    let all = [query, key, value].map(tokens);
    let output = shim::packed_attention(all.each_ref(), bounds, longest, options.scale.unwrap_or(dim.powf(-0.5)));
    // Panics as tch's operators do.
    Some(output.expect("a pack is one row of documents").transpose(0, 1).unsqueeze(0)) // [1, N, T, D]
}

/// What one call of a kernel sees.
enum Seen<'a> {
    Full,
    Causal,
    Dense(&'a DenseMask),
    /// `[1, 1, T, T]`
    Band(Tensor),
}

impl Seen<'_> {
    /// Booleans for queries of `tokens` tokens, `[B or 1, 1, T, S]`; `None` where nothing is hidden.
    fn booleans(&self, tokens: i64, like: &Tensor) -> Option<Tensor> {
        match self {
            Seen::Full => None,
            Seen::Causal => {
                Some(Tensor::ones([tokens, tokens], (Kind::Bool, like.device())).tril(0).view([1, 1, tokens, tokens]))
            }
            Seen::Dense(mask) => Some(mask.visible.shallow_clone()),
            Seen::Band(mask) => Some(mask.shallow_clone()),
        }
    }
}

fn piece(query: &Tensor, key: &Tensor, value: &Tensor, seen: &Seen<'_>, options: &Options<'_>) -> Tensor {
    if options.softcap.is_some() || options.sinks.is_some() {
        return written_out(query, key, value, seen, options);
    }
    let (rows, heads, tokens, dim) = query.size4().expect("query is [B, N, T, D]");
    let groups = key.size()[1];
    let times = heads / groups;
    if let Some(output) = few(query, key, value, seen, options) {
        return output;
    }
    // The heads of a group act as further queries of one head, so that no key is read twice: for one new token always, and
    // for the nodes of a tree on GPUs, whose kernels want a key for every head. From an empty cache the kernel's own causal
    // order is worth more than a copy of the new keys.
    let folds = times > 1 && (tokens == 1 || (query.device().is_cuda() && !matches!(seen, Seen::Causal)));
    if folds {
        let folded = query.reshape([rows, groups, times * tokens, dim]); // [B, G, r T, D]
        let mask = match seen {
            // One token's mask is that of all its heads.
            Seen::Dense(mask) if tokens == 1 => Some(mask.visible.shallow_clone()),
            Seen::Dense(mask) => Some(mask.folded(times)),
            Seen::Band(mask) => Some(mask.repeat([1, 1, times, 1])),
            Seen::Full | Seen::Causal => None,
        };
        return kernel(&folded, key, value, mask.as_ref(), false, options).reshape([rows, heads, tokens, -1]);
    }
    let (key, value) = (for_every_head(query, key), for_every_head(query, value));
    let mask = match seen {
        Seen::Dense(mask) => Some(&mask.visible),
        Seen::Band(mask) => Some(mask),
        Seen::Full | Seen::Causal => None,
    };
    kernel(query, &key, &value, mask, matches!(seen, Seen::Causal), options)
}

/// New tokens of one pass, at most, that have a kernel of their own.
const FEW: i64 = 32;

/// A few new tokens on cached keys in float32 on the CPU, where nothing asks for a gradient (`csrc/few_queries.cpp`).
fn few(query: &Tensor, key: &Tensor, value: &Tensor, seen: &Seen<'_>, options: &Options<'_>) -> Option<Tensor> {
    let (_, _, tokens, dim) = query.size4().ok()?;
    let plain = |tensor: &&Tensor| {
        let size = tensor.size();
        tensor.device() == Device::Cpu
            && tensor.kind() == Kind::Float
            && !tensor.requires_grad()
            && size[3] % 32 == 0
            && tensor.stride()[3] == 1
    };
    let mask = match seen {
        Seen::Full => None,
        Seen::Dense(mask) => Some(&mask.visible).filter(|mask| mask.stride()[3] == 1),
        Seen::Causal | Seen::Band(_) => return None,
    };
    let fits = mask.is_some() || matches!(seen, Seen::Full);
    let pays = (1..=FEW).contains(&tokens) && fits && shim::few_rows_pay();
    if !pays || ![query, key, value].iter().all(plain) {
        return None;
    }
    let scale = options.scale.unwrap_or_else(|| (dim as f64).powf(-0.5));
    // Panics as tch's operators do.
    Some(shim::few_queries_attention(query, key, value, mask, scale).expect("tensors that were just looked at"))
}

fn kernel(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    mask: Option<&Tensor>,
    causal: bool,
    options: &Options<'_>,
) -> Tensor {
    let grouped = query.size()[1] != key.size()[1];
    Tensor::scaled_dot_product_attention(query, key, value, mask, 0.0, causal, options.scale, grouped)
}

/// Softmax attention written out in float32 at least, some queries at a time: what no kernel of libtorch does.
fn written_out(query: &Tensor, key: &Tensor, value: &Tensor, seen: &Seen<'_>, options: &Options<'_>) -> Tensor {
    let (rows, heads, tokens, dim) = query.size4().expect("query is [B, N, T, D]");
    let (groups, slots) = (key.size()[1], key.size()[2]);
    let times = heads / groups;
    let wide = if query.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let scale = options.scale.unwrap_or_else(|| (dim as f64).sqrt().recip());
    let sinks = options.sinks.map(|sinks| sinks.to_kind(wide).view([1, groups, times, 1, 1])); // [1, G, r, 1, 1]
    let hidden = seen.booleans(tokens, query).map(|seen| seen.logical_not().unsqueeze(2)); // [B or 1, 1, 1, T, S]
    let keys = key.transpose(2, 3); // [B, G, D, S]
    let most = (SCORES / (rows * heads * slots).max(1)).max(1);
    let mut outputs = Vec::new();
    let mut start = 0;
    while start < tokens {
        let count = most.min(tokens - start);
        let some = query.narrow(2, start, count).reshape([rows, groups, times * count, dim]); // [B, G, r t, D]
        let scores = some.matmul(&keys).view([rows, groups, times, count, slots]).to_kind(wide) * scale;
        let bent = match options.softcap {
            Some(cap) => (scores / cap).tanh() * cap,
            None => scores,
        };
        let scores = match &hidden {
            Some(hidden) => bent.masked_fill(&hidden.narrow(3, start, count), f64::NEG_INFINITY),
            None => bent,
        }; // [B, G, r, t, S]
        let weights = match &sinks {
            None => scores.softmax(-1, wide),
            Some(sinks) => {
                let largest = scores.amax([-1i64].as_slice(), true).maximum(sinks); // [B, G, r, t, 1]
                let shares = (scores - &largest).exp();
                let sum = shares.sum_dim_intlist([-1i64].as_slice(), true, wide) + (sinks - largest).exp();
                shares / sum
            }
        };
        let weights = weights.to_kind(value.kind()).view([rows, groups, times * count, slots]);
        outputs.push(weights.matmul(value).view([rows, heads, count, -1])); // [B, N, t, E]
        start += count;
    }
    Tensor::cat(&outputs, 2) // [B, N, T, E]
}

/// `[B, G, S, D]` to `[B, N, S, D]` for GPUs, whose kernels want a key for every query head; the one for CPUs finds a group's
/// key itself.
fn for_every_head(query: &Tensor, keys: &Tensor) -> Tensor {
    let (rows, groups, slots, dim) = keys.size4().expect("keys are [B, G, S, D]");
    let times = if query.device().is_cuda() { query.size()[1] / groups } else { 1 };
    if times == 1 {
        return keys.shallow_clone();
    }
    keys.unsqueeze(2).expand([rows, groups, times, slots, dim], false).reshape([rows, groups * times, slots, dim])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::AttentionMask;
    use crate::nn::drawn;
    use crate::nn::mask::{Masks, TreeMask};

    const PLAIN: Options<'_> = Options { scale: None, softcap: None, sinks: None };

    fn random(shape: [i64; 4]) -> Tensor {
        drawn::randn(shape, (Kind::Double, Device::Cpu))
    }

    /// Softmax attention written out head by head: each query, one after the other.
    fn reference(query: &Tensor, key: &Tensor, value: &Tensor, visible: &Tensor, options: &Options<'_>) -> Tensor {
        let (rows, heads, tokens, dim) = query.size4().unwrap();
        let times = heads / key.size()[1];
        let output = Tensor::zeros([rows, heads, tokens, value.size()[3]], (Kind::Double, Device::Cpu));
        let visible = visible.expand([rows, 1, tokens, key.size()[2]], false);
        for (row, head, token) in
            (0..rows).flat_map(|row| (0..heads).flat_map(move |head| (0..tokens).map(move |token| (row, head, token))))
        {
            let seen = visible.get(row).get(0).get(token).nonzero().squeeze_dim(1);
            let keys = key.get(row).get(head / times).index_select(0, &seen);
            let values = value.get(row).get(head / times).index_select(0, &seen);
            let scores = keys.mv(&query.get(row).get(head).get(token));
            let scores = Vec::<f64>::try_from(scores).unwrap();
            let bend = |score: f64| {
                let scaled = score * options.scale.unwrap_or(1.0 / (dim as f64).sqrt());
                options.softcap.map_or(scaled, |cap| cap * (scaled / cap).tanh()).exp()
            };
            let shares: Vec<f64> = scores.into_iter().map(bend).collect();
            let sink = options.sinks.map_or(0.0, |sinks| sinks.double_value(&[head]).exp());
            let sum: f64 = shares.iter().sum::<f64>() + sink;
            let weights = Tensor::from_slice(&shares) / sum;
            output.get(row).get(head).get(token).copy_(&weights.unsqueeze(0).matmul(&values).squeeze_dim(0));
        }
        output
    }

    #[track_caller]
    fn near(got: &Tensor, want: &Tensor, what: &str) {
        assert_eq!(got.size(), want.size(), "{what}");
        let difference = (got - want).abs().max().double_value(&[]);
        assert!(difference < 1e-12, "{what}: {difference:e}"); // NaN fails as well
    }

    /// Every combination of what families change.
    fn options(sinks: &Tensor) -> Vec<Options<'_>> {
        let mut all = Vec::new();
        for scale in [None, Some(0.3)] {
            for softcap in [None, Some(0.8)] {
                for sinks in [None, Some(sinks)] {
                    all.push(Options { scale, softcap, sinks });
                }
            }
        }
        all
    }

    #[test]
    fn every_form_of_mask_and_every_option_equals_the_written_out_softmax() {
        drawn::seed(1);
        let causal = AttentionMask::Causal;
        let (key, value) = (random([2, 2, 7, 4]), random([2, 2, 7, 5]));
        let sinks = drawn::randn([6], (Kind::Double, Device::Cpu));
        for (tokens, past) in [(1, [6, 6]), (1, [6, 3]), (3, [4, 2]), (7, [0, 0])] {
            let query = random([2, 6, tokens, 4]);
            let slots = past.iter().max().unwrap() + tokens;
            let (key, value) = (key.narrow(2, 0, slots), value.narrow(2, 0, slots));
            let slot = Tensor::arange(slots, (Kind::Int64, Device::Cpu));
            let limit = Tensor::arange(tokens, (Kind::Int64, Device::Cpu)).view([1, 1, -1, 1])
                + Tensor::from_slice(&past).view([2, 1, 1, 1]);
            let positions = limit.view([2, tokens]);
            for window in [None, Some(1), Some(2), Some(4)] {
                let seen = slot.le_tensor(&limit);
                let seen =
                    window.map_or(seen.shallow_clone(), |window| seen.logical_and(&slot.gt_tensor(&(&limit - window))));
                for options in options(&sinks) {
                    let want = reference(&query, &key, &value, &seen, &options);
                    let mut masks = Masks::behind(&causal, &positions, &past, None);
                    let got = attention(&query, &key, &value, masks.of(window), &options);
                    near(&got, &want, &format!("tokens {tokens} past {past:?} window {window:?} {options:?}"));
                }
            }
        }
    }

    #[test]
    fn documents_do_not_see_each_other() {
        drawn::seed(2);
        let [query, key, value] = [6, 2, 2].map(|heads| random([1, heads, 13, 4]));
        let sinks = drawn::randn([6], (Kind::Double, Device::Cpu));
        let positions = Tensor::from_slice(&[0i64, 1, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]).unsqueeze(0);
        let mask = AttentionMask::Documents(vec![2, 4, 7]);
        for window in [None, Some(3)] {
            for options in options(&sinks) {
                let mut masks = Masks::new(&mask, &positions);
                let packed = attention(&query, &key, &value, masks.of(window), &options);
                let mut start = 0;
                for length in [2, 4, 7] {
                    let alone = |tensor: &Tensor| tensor.narrow(2, start, length);
                    let positions = Tensor::arange(length, (Kind::Int64, Device::Cpu)).unsqueeze(0);
                    let causal = AttentionMask::Causal;
                    let mut masks = Masks::new(&causal, &positions);
                    let want = attention(&alone(&query), &alone(&key), &alone(&value), masks.of(window), &options);
                    near(&packed.narrow(2, start, length), &want, &format!("window {window:?} {options:?}"));
                    start += length;
                }
            }
        }
    }

    #[test]
    fn trees_of_ragged_rows_are_seen_through_windows() {
        drawn::seed(3);
        // Behind 3 and 1 committed tokens: a root, two children, a child of the second.
        let (query, key, value) = (random([2, 4, 4, 4]), random([2, 2, 7, 4]), random([2, 2, 7, 4]));
        let sinks = drawn::randn([4], (Kind::Double, Device::Cpu));
        let (base, parents, depths) = ([3i64, 1], [0usize, 0, 0, 2], [0i64, 1, 1, 2]);
        let sees = |node: usize, other: usize| {
            let mut line = std::iter::successors(Some(node), |&at| (at != 0).then(|| parents[at]));
            line.any(|at| at == other)
        };
        let seen: Vec<bool> = (0..2).flat_map(|_| (0..16).map(|place| sees(place / 4, place % 4))).collect();
        let mask =
            AttentionMask::Tree(TreeMask { base: base.to_vec(), seen: Tensor::from_slice(&seen).view([2, 4, 4]) });
        let queries: Vec<i64> = base.iter().flat_map(|base| depths.map(|depth| base + depth)).collect();
        let queries = Tensor::from_slice(&queries).view([2, 4]);
        let mut keys = [[99i64; 7]; 2];
        for (line, &base) in keys.iter_mut().zip(&base) {
            (0..base).for_each(|slot| line[slot as usize] = slot);
            (0..4).for_each(|node| line[base as usize + node] = base + depths[node]);
        }
        for window in [None, Some(1), Some(2), Some(3)] {
            let mut visible = Vec::new();
            for (row, &base) in base.iter().enumerate() {
                for (node, depth) in depths.iter().enumerate() {
                    for slot in 0..7 {
                        let there = slot < base || (slot < base + 4 && sees(node, (slot - base) as usize));
                        let near = window.is_none_or(|w| base + depth - keys[row][slot as usize] < w);
                        visible.push(there && near);
                    }
                }
            }
            let visible = Tensor::from_slice(&visible).view([2, 1, 4, 7]);
            for options in options(&sinks) {
                let mut masks = Masks::behind(&mask, &queries, &base, Some(Tensor::from_slice2(&keys)));
                let got = attention(&query, &key, &value, masks.of(window), &options);
                near(&got, &reference(&query, &key, &value, &visible, &options), &format!("{window:?} {options:?}"));
            }
        }
    }

    /// In float32 on the CPU, where a kernel of our own takes the few tokens of a round: rows of unequal length, nodes of a
    /// tree, nothing hidden, a query that sees nothing, and caches that are cut out of longer ones.
    #[test]
    fn few_tokens_equal_the_written_out_softmax_whatever_lies_in_hidden_slots() {
        drawn::seed(6);
        for (rows, heads, groups, tokens, slots, dim, width) in
            [(2, 6, 2, 1, 37, 64, 64), (1, 4, 4, 1, 5, 32, 96), (3, 8, 2, 7, 33, 64, 32), (2, 3, 1, 32, 50, 128, 128)]
        {
            let query = random([rows, heads, tokens, dim]);
            let (key, value) = (random([rows, groups, slots + 9, dim]), random([rows, groups, slots + 9, width]));
            let (key, value) = (key.narrow(2, 3, slots), value.narrow(2, 3, slots));
            // The first slot is seen by all; the last two by nobody.
            let seen = drawn::randn([rows, 1, tokens, slots], (Kind::Float, Device::Cpu)).gt(-0.25);
            let _ = seen.narrow(3, 0, 1).fill_(1);
            let _ = seen.narrow(3, slots - 2, 2).fill_(0);
            let everything = seen.ones_like();
            let (key_of_hidden, value_of_hidden) = (key.copy(), value.copy());
            for tensor in [&key_of_hidden, &value_of_hidden] {
                let _ = tensor.narrow(2, slots - 2, 2).fill_(f64::NAN);
            }
            let float = |tensor: &Tensor| tensor.to_kind(Kind::Float);
            for options in [PLAIN, Options { scale: Some(0.3), ..PLAIN }] {
                for (what, seen, visible, key, value) in [
                    ("full", Seen::Full, &everything, &key, &value),
                    ("dense", Seen::Dense(&DenseMask::new(seen.copy())), &seen, &key_of_hidden, &value_of_hidden),
                ] {
                    let want = reference(&query, key, value, visible, &options);
                    let got = few(&float(&query), &float(key), &float(value), &seen, &options).unwrap();
                    let difference = (got.to_kind(Kind::Double) - &want).abs().max().double_value(&[]);
                    assert!(difference < 3e-6, "{what}, {tokens} tokens on {slots}: {difference:e}");
                }
            }
            let _ = seen.narrow(0, 0, 1).narrow(2, 0, 1).fill_(0);
            let blind = DenseMask::new(seen);
            let blind = few(&float(&query), &float(&key), &float(&value), &Seen::Dense(&blind), &PLAIN).unwrap();
            let nothing = blind.narrow(0, 0, 1).narrow(2, 0, 1).abs().max().double_value(&[]);
            assert_eq!(nothing, 0.0);
        }
    }

    /// As on a GPU: the heads of a group as further queries, under a mask that is repeated for each.
    #[test]
    fn folded_heads_are_heads() {
        drawn::seed(4);
        let (query, key, value) = (random([2, 6, 3, 4]), random([2, 2, 5, 4]), random([2, 2, 5, 4]));
        let prepared = AttentionMask::Causal.prepare(&[2, 1], 3, Device::Cpu);
        let want = attention(&query, &key, &value, &prepared, &PLAIN);
        let PreparedMask::Dense(mask) = &prepared else { panic!() };
        let folded = query.reshape([2, 2, 9, 4]);
        let got = kernel(&folded, &key, &value, Some(&mask.folded(3)), false, &PLAIN).reshape([2, 6, 3, 4]);
        near(&got, &want, "folded");
        assert_eq!(mask.folded(3).data_ptr(), mask.folded(3).data_ptr());
    }
}
