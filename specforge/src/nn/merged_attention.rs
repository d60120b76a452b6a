//! Attention on keys that all queries of a document share, plus a few keys that belong to one query alone, or to a few.
//!
//! EAGLE-3's training-time test (Li et al. 2025, <https://arxiv.org/abs/2503.01840>) asks for it: at step `k` a row sees
//! the keys of step 0 up to its own place, and one key of its own for every later step. The shared keys go through
//! libtorch's memory-saving kernel, the own ones are a small product, and both softmaxes become one by their
//! log-sum-exp; no matrix of scores is kept. The backward pass gives the kernel the *merged* output and log-sum-exp, from
//! which it finds each weight under the common denominator.
//!
//! On a GPU, all causal runs go through one call of a kernel for documents of several lengths ([`Runs`]): the rows of a
//! document from its first query on are its queries, those that nobody asked for zero. On the CPU, where a call costs
//! nothing beside its work, the kernel runs once for each run.
//!
//! Shape legend: `R` queries, `S` shared keys, `I` own keys of a query, `b` queries that share a set of own keys, `N` heads,
//! `G` key/value heads, `D` head size.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::device;
use crate::error::{Error, Result};
use crate::shim;

/// Consecutive queries that see one stretch of the shared keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The queries.
    pub queries: Range<i64>,
    /// The keys they see; none at all is allowed.
    pub keys: Range<i64>,
    /// The last query sees all of the keys, and each query before it one less. Otherwise every query sees all.
    pub causal: bool,
}

/// All runs of an attention, checked, with what a GPU needs to take them in one call.
#[derive(Debug)]
pub struct Runs {
    runs: Vec<Run>,
    queries: i64,
    keys: i64,
    packed: Option<Packed>,
}

/// See `csrc/attention.cpp`.
#[derive(Debug)]
struct Packed {
    /// Row of each query, place of its log-sum-exp (int64 `[R]`), where each document's rows and its keys begin (int32).
    places: [Tensor; 4],
    /// Rows, and the most rows and keys of a document.
    sizes: [i64; 3],
}

/// The same on the host: numbers that travel to the device as one list.
struct Plan {
    slots: Vec<i64>,
    sums: Vec<i64>,
    queries: Vec<i64>,
    keys: Vec<i64>,
    sizes: [i64; 3],
}

impl Runs {
    /// Runs that take all queries in their order, without a gap, and lie within `keys` shared keys.
    pub fn new(runs: Vec<Run>, keys: i64, device: Device) -> Result<Self> {
        let mut next = 0;
        for run in &runs {
            let (count, seen) = (run.queries.end - run.queries.start, run.keys.end - run.keys.start);
            let within = count > 0 && run.keys.start >= 0 && seen >= if run.causal { count } else { 0 };
            if run.queries.start != next || !within || run.keys.end > keys {
                let problem = format!("merged attention: {run:?} does not fit {keys} keys after query {next}");
                return Err(Error::Failed(problem));
            }
            next += count;
        }
        let plan = if device.is_cuda() { Plan::new(&runs, keys) } else { None };
        let packed = plan.map(|plan| plan.upload(device)).transpose()?;
        Ok(Self { runs, queries: next, keys, packed })
    }

    /// The runs.
    pub fn list(&self) -> &[Run] {
        &self.runs
    }
}

impl Plan {
    /// Documents, as far as runs say where they begin: a stretch of keys from the first key of some runs to that of the
    /// next ones. `None` where runs are no rows of documents.
    fn new(runs: &[Run], keys: i64) -> Option<Self> {
        let mut plan =
            Self { slots: Vec::new(), sums: Vec::new(), queries: Vec::new(), keys: Vec::new(), sizes: [0; 3] };
        // Documents as (first key, first row that is a query).
        let mut documents: Vec<(i64, i64)> = Vec::new();
        let mut end = 0;
        for run in runs {
            let first_row = run.keys.end - (run.queries.end - run.queries.start);
            let same = documents.last().is_some_and(|(start, _)| *start == run.keys.start);
            if !run.causal || first_row < end || (!same && run.keys.start < end) {
                return None;
            }
            if !same {
                if documents.is_empty() && run.keys.start > 0 {
                    documents.push((0, run.keys.start - 1)); // keys that nobody sees: one row that nobody asked for
                }
                documents.push((run.keys.start, first_row));
            }
            end = run.keys.end;
        }
        let ends: Vec<i64> = documents.iter().skip(1).map(|(start, _)| *start).chain([keys]).collect();
        let mut rows = 0;
        for ((start, first_row), end) in documents.iter().zip(&ends) {
            plan.queries.push(rows);
            plan.keys.push(*start);
            rows += end - first_row;
            plan.sizes = [rows, plan.sizes[1].max(end - first_row), plan.sizes[2].max(end - start)];
        }
        plan.queries.push(rows);
        plan.keys.push(keys);
        let padded = (plan.sizes[1] + 31) / 32 * 32;
        let mut document = 0;
        for run in runs {
            while documents[document].0 != run.keys.start {
                document += 1;
            }
            let count = run.queries.end - run.queries.start;
            let offset = run.keys.end - count - documents[document].1;
            plan.slots.extend((offset..offset + count).map(|place| plan.queries[document] + place));
            plan.sums.extend((offset..offset + count).map(|place| document as i64 * padded + place));
        }
        (!runs.is_empty()).then_some(plan)
    }

    fn upload(self, device: Device) -> Result<Packed> {
        let lists = [self.slots, self.sums, self.queries, self.keys];
        let numbers = device::upload(&lists.concat(), device)?;
        let mut start = 0;
        let mut part = |list: &Vec<i64>| {
            start += list.len() as i64;
            numbers.narrow(0, start - list.len() as i64, list.len() as i64)
        };
        let [slots, sums, queries, keys] = lists.each_ref().map(&mut part);
        let places = [slots, sums, queries.f_to_kind(Kind::Int)?, keys.f_to_kind(Kind::Int)?];
        Ok(Packed { places, sizes: self.sizes })
    }
}

/// Keys and values of queries' own, `[R / b, I, G, D]` each, where `I` may be 0.
#[derive(Debug, Clone, Copy)]
pub struct Own<'a> {
    /// Keys.
    pub key: &'a Tensor,
    /// Values.
    pub value: &'a Tensor,
    /// `b`: consecutive queries that share a set.
    pub queries_per_own: i64,
    /// `[I, I]` booleans: which own keys query `i` of a set does not see; `I` is `b` then. Or `b` is 1, and the heads of a
    /// group are `I` queries one behind the other ([`fold`]).
    pub hidden: Option<&'a Tensor>,
}

/// Attention of `query [R, N, D]` on `key, value [S, G, D]` and on own keys. Returns `[R, N, D]`, with gradients for all
/// five. A query that sees no key at all becomes zero.
pub fn merged_attention(query: &Tensor, [key, value]: [&Tensor; 2], own: Own<'_>, runs: &Runs) -> Result<Tensor> {
    let (queries, heads, dim) = query.size3()?;
    let (keys, groups, _) = key.size3()?;
    let count = own.key.size().get(1).copied().unwrap_or(-1);
    let sets = if own.queries_per_own > 0 { queries / own.queries_per_own } else { -1 };
    let shapes = [(key, vec![keys, groups, dim]), (value, vec![keys, groups, dim])];
    let own_shapes = [own.key, own.value].map(|tensor| (tensor, vec![sets, count, groups, dim]));
    for (tensor, want) in shapes.iter().chain(&own_shapes) {
        if tensor.size() != *want || heads % groups != 0 {
            let got = tensor.size();
            return Err(Error::Failed(format!("merged attention of {heads} heads: expected {want:?}, got {got:?}")));
        }
    }
    if (runs.queries, runs.keys) != (queries, keys) || sets * own.queries_per_own != queries {
        return Err(Error::Failed(format!(
            "merged attention: the runs hold {} queries of {queries} and {} keys of {keys}, {} queries share their own",
            runs.queries, runs.keys, own.queries_per_own
        )));
    }
    let folded = own.queries_per_own == 1 && count > 0 && heads / groups % count == 0;
    if let Some(hidden) = own.hidden
        && (hidden.size() != [count, count] || (count != own.queries_per_own && !folded))
    {
        let (got, sharing) = (hidden.size(), own.queries_per_own);
        let problem = format!("merged attention: {got:?} hides own keys where {sharing} queries share {count}");
        return Err(Error::Failed(problem));
    }
    if queries == 0 {
        return Ok(query.shallow_clone());
    }
    let number = |run: &Run| {
        let (Range { start: first, end }, keys) = (run.queries.clone(), run.keys.clone());
        [first, end - first, keys.start, keys.end - keys.start, i64::from(run.causal)]
    };
    let numbers: Vec<i64> = runs.runs.iter().flat_map(number).collect();
    // float64 has no kernel for documents; its checks go run by run.
    let packed = runs.packed.as_ref().filter(|_| query.kind() != Kind::Double);
    let packed = packed.map(|packed| (packed.places.each_ref(), &packed.sizes));
    shim::merged_attention(
        [query, key, value, own.key, own.value],
        own.hidden,
        &numbers,
        packed,
        (dim as f64).powf(-0.5),
    )
}

/// Queries that see the same shared keys, `size` one behind the other, as one query of so many more heads: `[R, N, D]` to
/// `[R / size, N * size, D]`. The heads of a group stay together. A GPU then takes them all in one call, as rows of documents.
pub fn fold(query: &Tensor, groups: i64, size: i64) -> Result<Tensor> {
    let (_, heads, dim) = query.size3()?;
    let apart = query.view([-1, size, groups, heads / groups, dim]); // [R / size, size, G, r, D]
    Ok(apart.transpose(1, 2).reshape([-1, heads * size, dim]))
}

/// The way back: `[R / size, N * size, D]` to `[R, N, D]`.
pub fn unfold(folded: &Tensor, groups: i64, size: i64) -> Result<Tensor> {
    let (_, heads, dim) = folded.size3()?;
    let apart = folded.view([-1, groups, size, heads / groups / size, dim]); // [R / size, G, size, r, D]
    Ok(apart.transpose(1, 2).reshape([-1, heads / size, dim]))
}

/// Hides from query `i` of `size` the own keys behind it, for [`Own::hidden`]: `[size, size]` booleans.
pub fn causal(size: i64, device: Device) -> Result<Tensor> {
    Ok(Tensor::f_ones([size, size], (Kind::Bool, device))?.f_triu(1)?)
}

/// No own keys: `[R, 0, G, D]` beside `key [S, G, D]`.
pub fn no_own_keys(rows: i64, key: &Tensor) -> Result<Tensor> {
    let (_, groups, dim) = key.size3()?;
    Ok(Tensor::f_empty([rows, 0, groups, dim], (key.kind(), key.device()))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::drawn;

    fn random(shape: &[i64], kind: Kind) -> Tensor {
        drawn::randn(shape, (kind, Device::Cpu)).set_requires_grad(true)
    }

    /// The same as one softmax over a masked matrix of all scores. Every query has own keys here.
    /// With `causal`, query `i` of as many as there are own keys sees those up to `i`.
    fn written_out(query: &Tensor, shared: [&Tensor; 2], own: [&Tensor; 2], runs: &[Run], causal: bool) -> Tensor {
        let (queries, heads, dim) = query.size3().unwrap();
        let (keys, groups, _) = shared[0].size3().unwrap();
        let times = heads / groups;
        let mut visible = vec![false; (queries * keys) as usize];
        for run in runs {
            for query in run.queries.clone() {
                let last = if run.causal { run.keys.end - (run.queries.end - 1 - query) } else { run.keys.end };
                (run.keys.start..last).for_each(|key| visible[(query * keys + key) as usize] = true);
            }
        }
        let hidden = Tensor::from_slice(&visible).view([queries, 1, keys]).logical_not();
        let [key, value] = shared.map(|tensor| tensor.repeat_interleave_self_int(times, 1, None)); // [S, N, D]
        let [own_key, own_value] = own.map(|tensor| tensor.repeat_interleave_self_int(times, 2, None)); // [R, I, N, D]
        let scores = query.transpose(0, 1).matmul(&key.permute([1, 2, 0])).transpose(0, 1); // [R, N, S]
        let scores = scores.masked_fill(&hidden, f64::NEG_INFINITY);
        let own_scores = (query.unsqueeze(1) * &own_key).sum_dim_intlist(-1, false, query.kind()).transpose(1, 2);
        let count = own_scores.size()[2];
        let place = |query: i64, own: i64| causal && own > query % count;
        let later: Vec<bool> = (0..queries).flat_map(|query| (0..count).map(move |own| place(query, own))).collect();
        let later = Tensor::from_slice(&later).view([queries, 1, count]);
        let own_scores = own_scores.masked_fill(&later, f64::NEG_INFINITY);
        let all = Tensor::cat(&[scores, own_scores], 2) / (dim as f64).sqrt(); // [R, N, S + I]
        let weights = all.softmax(-1, query.kind());
        let from_shared = weights.narrow(2, 0, keys).transpose(0, 1).matmul(&value.transpose(0, 1)).transpose(0, 1);
        let own_weights = weights.narrow(2, keys, own_key.size()[1]).transpose(1, 2).unsqueeze(-1); // [R, I, N, 1]
        from_shared + (own_weights * own_value).sum_dim_intlist(1, false, query.kind())
    }

    const RUNS: [Run; 4] = [
        Run { queries: 0..3, keys: 0..3, causal: true },
        Run { queries: 3..4, keys: 0..6, causal: true },
        Run { queries: 4..8, keys: 7..13, causal: true },
        Run { queries: 8..9, keys: 13..14, causal: true },
    ];

    fn checked(runs: &[Run], keys: i64) -> Runs {
        Runs::new(runs.to_vec(), keys, Device::Cpu).unwrap()
    }

    /// Outputs and gradients of all inputs equal those of the written-out softmax, whose own keys are given to each query.
    fn compare(inputs: &[Tensor; 5], queries_per_own: i64, runs: &[Run], tolerance: f64, label: &str) {
        compare_with(inputs, (queries_per_own, false), runs, tolerance, label);
    }

    fn compare_with(
        inputs: &[Tensor; 5],
        (queries_per_own, causal): (i64, bool),
        runs: &[Run],
        tolerance: f64,
        label: &str,
    ) {
        let [query, key, value, own_key, own_value] = inputs;
        let kind = query.kind();
        let scaled = query * 3.0;
        let slope = drawn::randn(query.size(), (kind, Device::Cpu));
        let each = [own_key, own_value].map(|own| own.repeat_interleave_self_int(queries_per_own, 0, None));
        let want = written_out(&scaled, [key, value], each.each_ref(), runs, causal);
        let hidden = causal.then(|| super::causal(own_key.size()[1], Device::Cpu).unwrap());
        let own = Own { key: own_key, value: own_value, queries_per_own, hidden: hidden.as_ref() };
        let got = merged_attention(&scaled, [key, value], own, &checked(runs, key.size()[0])).unwrap();
        let near = |left: &Tensor, right: &Tensor| (left - right).abs().max().double_value(&[]) < tolerance;
        assert!(near(&got, &want), "{label}");
        let wanted: Vec<&Tensor> = inputs.iter().filter(|tensor| tensor.numel() > 0).collect();
        let gradients = |output: Tensor| Tensor::run_backward(&[(output * &slope).sum(kind)], &wanted, true, false);
        for (index, (got, want)) in gradients(got).iter().zip(gradients(want)).enumerate() {
            assert!(near(got, &want), "{label} gradient {index}");
        }
    }

    /// Outputs and all five gradients, with scores so large that a wrong denominator would show.
    #[test]
    fn equals_one_softmax_over_all_keys() {
        drawn::seed(5);
        for (kind, tolerance) in [(Kind::Double, 1e-11), (Kind::Float, 2e-4)] {
            for own in [0, 1, 3] {
                let inputs = [
                    random(&[9, 6, 8], kind),
                    random(&[15, 2, 8], kind),
                    random(&[15, 2, 8], kind),
                    random(&[9, own, 2, 8], kind),
                    random(&[9, own, 2, 8], kind),
                ];
                compare(&inputs, 1, &RUNS, tolerance, &format!("{kind:?} {own}"));
            }
        }
    }

    /// Blocks of 16 queries that all see the keys before their anchor, the first block none, and share 16 keys of their
    /// own.
    #[test]
    fn blocks_that_share_own_keys_equal_one_softmax() {
        drawn::seed(6);
        let anchors = [0, 3, 4, 11];
        let block = |(index, &anchor): (usize, &i64)| {
            let first = 16 * index as i64;
            // The last block stands in a document of its own.
            Run { queries: first..first + 16, keys: if anchor == 11 { 7 } else { 0 }..anchor, causal: false }
        };
        let runs: Vec<Run> = anchors.iter().enumerate().map(block).collect();
        for (kind, tolerance) in [(Kind::Double, 1e-11), (Kind::Float, 2e-4)] {
            let inputs = [
                random(&[64, 6, 8], kind),
                random(&[12, 2, 8], kind),
                random(&[12, 2, 8], kind),
                random(&[4, 16, 2, 8], kind),
                random(&[4, 16, 2, 8], kind),
            ];
            compare(&inputs, 16, &runs, tolerance, &format!("{kind:?}"));
            compare_with(&inputs, (16, true), &runs, tolerance, &format!("{kind:?}, causal"));
            // The same with the queries of a block as heads of one.
            for causal in [false, true] {
                let hidden = causal.then(|| super::causal(16, Device::Cpu).unwrap());
                let [query, key, value, own_key, own_value] = &inputs;
                let scaled = query * 3.0;
                let want = {
                    let own = Own { key: own_key, value: own_value, queries_per_own: 16, hidden: hidden.as_ref() };
                    merged_attention(&scaled, [key, value], own, &checked(&runs, 12)).unwrap()
                };
                let one = |run: &Run| Run { queries: run.queries.start / 16..run.queries.end / 16, ..run.clone() };
                let folded: Vec<Run> = runs.iter().map(one).collect();
                let own = Own { key: own_key, value: own_value, queries_per_own: 1, hidden: hidden.as_ref() };
                let got = merged_attention(&fold(&scaled, 2, 16).unwrap(), [key, value], own, &checked(&folded, 12));
                let got = unfold(&got.unwrap(), 2, 16).unwrap();
                assert!((&got - &want).abs().max().double_value(&[]) < tolerance, "{kind:?}, folded");
                let slope = drawn::randn(got.size(), (kind, Device::Cpu));
                let gradients = |output: Tensor| {
                    Tensor::run_backward(&[(output * &slope).sum(kind)], &inputs.each_ref(), true, false)
                };
                for (got, want) in gradients(got).iter().zip(gradients(want)) {
                    assert!((got - want).abs().max().double_value(&[]) < tolerance, "{kind:?}, folded gradients");
                }
            }
            // Groups that are no runs: two sets to a block.
            let inputs = [0, 1, 2].map(|index: usize| inputs[index].shallow_clone());
            let own = || random(&[8, 3, 2, 8], kind);
            let [query, key, value] = inputs;
            compare(&[query, key, value, own(), own()], 8, &runs, tolerance, &format!("{kind:?}, two sets"));
        }
    }

    /// Where each query stands in one call over all documents: `rows` as (document, offset from its first row).
    #[test]
    fn runs_of_documents_become_one_call() {
        let plan = Plan::new(&RUNS, 15).unwrap();
        // Rows 0 ..= 6 of the first document, whose end nobody else names, 9 ..= 12 of the second, 13 and 14 of the third.
        assert_eq!(plan.keys, [0, 7, 13, 15]);
        assert_eq!(plan.queries, [0, 7, 11, 13]);
        assert_eq!(plan.slots, [0, 1, 2, 5, 7, 8, 9, 10, 11]);
        assert_eq!(plan.sums, [0, 1, 2, 5, 32, 33, 34, 35, 64]);
        assert_eq!(plan.sizes, [13, 7, 7]);
        // Keys before the first run are a document with one row.
        let late = Plan::new(&[Run { queries: 0..2, keys: 4..9, causal: true }], 9).unwrap();
        assert_eq!((late.keys, late.queries, late.slots), (vec![0, 4, 9], vec![0, 1, 3], vec![1, 2]));
        let refused = [
            vec![Run { queries: 0..2, keys: 0..3, causal: false }],
            vec![Run { queries: 0..2, keys: 0..3, causal: true }, Run { queries: 2..3, keys: 0..2, causal: true }],
            vec![Run { queries: 0..2, keys: 0..3, causal: true }, Run { queries: 2..3, keys: 2..5, causal: true }],
        ];
        assert!(refused.iter().all(|runs| Plan::new(runs, 9).is_none()));
    }

    /// In bfloat16, scores of own keys keep their digits until after the softmax, as those of shared keys and those of
    /// decoding do: at a score of 44, one rounding would move a weight by a tenth.
    #[test]
    fn large_scores_of_own_keys_are_not_rounded() {
        drawn::seed(7);
        const SCORES: [[f64; 4]; 3] = [[7.0, 6.4, 6.9, 5.8], [20.0, 19.3, 18.9, 20.2], [44.0, 43.1, 43.7, 44.3]];
        for kind in [Kind::BFloat16, Kind::Half] {
            for scores in SCORES {
                let (heads, dim) = (4, 64);
                let narrow = |tensor: Tensor| tensor.to_kind(kind).set_requires_grad(true);
                let options = (Kind::Double, Device::Cpu);
                let query = drawn::randn([9, heads, dim], options) * 3.0;
                // Along the query, so that every score is what it should be, and apart in what is across it.
                let along = &query / query.square().sum_dim_intlist(-1, true, Kind::Double) * (dim as f64).sqrt();
                let own_key = scores.map(|score| {
                    let random = drawn::randn([9, heads, dim], options) * 2.0;
                    let share = (&random * &query).sum_dim_intlist(-1, true, Kind::Double) / (dim as f64).sqrt();
                    &along * score + random - &along * share
                });
                let shared = |size: f64| narrow(drawn::randn([15, heads, dim], options) * size);
                let inputs = [
                    narrow(query),
                    shared(0.3),
                    shared(1.0),
                    narrow(Tensor::stack(&own_key, 1)), // [R, I, N, D]
                    narrow(drawn::randn([9, 4, heads, dim], options)),
                ];
                let slope = drawn::randn([9, heads, dim], options).to_kind(kind);
                let run = |inputs: &[Tensor; 5], attend: &dyn Fn(&[Tensor; 5]) -> Tensor| {
                    let output = attend(inputs);
                    let sum = (&output * slope.to_kind(output.kind())).sum(Kind::Float);
                    let gradients = Tensor::run_backward(&[sum], &inputs.each_ref(), false, false);
                    std::iter::once(output)
                        .chain(gradients)
                        .map(|tensor| tensor.to_kind(Kind::Double))
                        .collect::<Vec<_>>()
                };
                let wide = inputs.each_ref().map(|input| input.detach().to_kind(Kind::Double).set_requires_grad(true));
                let want = run(&wide, &|[query, key, value, own_key, own_value]| {
                    written_out(query, [key, value], [own_key, own_value], &RUNS, false)
                });
                let got = run(&inputs, &|[query, key, value, own_key, own_value]| {
                    let own = Own { key: own_key, value: own_value, queries_per_own: 1, hidden: None };
                    merged_attention(query, [key, value], own, &checked(&RUNS, 15)).unwrap()
                });
                // A few roundings of the inputs' own size.
                let limit = if kind == Kind::Half { 2e-3 } else { 1e-2 };
                for (index, (got, want)) in got.iter().zip(&want).enumerate() {
                    if kind == Kind::Half && want.abs().max().double_value(&[]) < 1e-4 {
                        continue; // of shared keys that own ones leave nothing to: below what float16 has digits for
                    }
                    let off = (got - want).norm().double_value(&[]) / want.norm().double_value(&[]);
                    println!("{kind:?}, {scores:?}: {index} off by {off:.1e}");
                    assert!(off < limit, "{kind:?}, {scores:?}: {index} off by {off:.1e}");
                }
            }
        }
    }

    #[test]
    fn runs_that_do_not_fit_are_refused() {
        let (query, key) = (random(&[9, 6, 8], Kind::Float), random(&[14, 2, 8], Kind::Float));
        let none = no_own_keys(9, &key).unwrap();
        let own = Own { key: &none, value: &none, queries_per_own: 1, hidden: None };
        let attend = |runs: &[Run]| merged_attention(&query, [&key, &key], own, &checked(runs, 14));
        assert!(attend(&RUNS).is_ok());
        assert!(attend(&RUNS[..3]).is_err());
        assert!(merged_attention(&query, [&key, &none], own, &checked(&RUNS, 14)).is_err());
        assert!(merged_attention(&query, [&key, &key], own, &checked(&RUNS, 15)).is_err());
        for queries_per_own in [0, -1, 2, 9] {
            let own = Own { queries_per_own, ..own };
            assert!(merged_attention(&query, [&key, &key], own, &checked(&RUNS, 14)).is_err());
        }
        let late = |keys: Range<i64>| {
            let mut runs = RUNS.to_vec();
            runs[3].keys = keys;
            Runs::new(runs, 14, Device::Cpu)
        };
        assert!(late(13..15).is_err() && late(13..13).is_err() && late(-1..13).is_err() && late(13..14).is_ok());
    }
}
