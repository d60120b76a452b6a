//! Attention on keys that all queries of a document share, plus a few keys that belong to one query alone.
//!
//! EAGLE-3's training-time test (Li et al. 2025, <https://arxiv.org/abs/2503.01840>) asks for it: at step `k` a row sees
//! the keys of step 0 up to its own place, and one key of its own for every later step. The shared keys go through
//! libtorch's memory-saving kernel, the own ones are a small product, and both softmaxes become one by their
//! log-sum-exp; no matrix of scores is kept. The backward pass gives the kernel the *merged* output and log-sum-exp, from
//! which it finds each weight under the common denominator.
//!
//! Shape legend: `R` queries, `S` shared keys, `I` own keys of a query, `N` heads, `G` key/value heads, `D` head size.

use tch::Tensor;

use crate::error::{Error, Result};
use crate::shim;

/// Consecutive queries of one document: queries `first_query ..` stand at keys `first_key ..` and see the keys from
/// `document_start` up to their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First of the queries.
    pub first_query: i64,
    /// How many there are.
    pub count: i64,
    /// First key of the document.
    pub document_start: i64,
    /// Key of the first query.
    pub first_key: i64,
}

/// Attention of `query [R, N, D]` on `key, value [S, G, D]` and on `own_key, own_value [R, I, G, D]`, where `I` may be 0.
/// The runs take the queries in their order, without a gap. Returns `[R, N, D]`, with gradients for all five.
pub fn merged_attention(
    query: &Tensor,
    [key, value]: [&Tensor; 2],
    [own_key, own_value]: [&Tensor; 2],
    runs: &[Run],
) -> Result<Tensor> {
    let (queries, heads, dim) = query.size3()?;
    let (keys, groups, _) = key.size3()?;
    let own = own_key.size().get(1).copied().unwrap_or(-1);
    let shapes = [(key, vec![keys, groups, dim]), (value, vec![keys, groups, dim])];
    let own_shapes = [own_key, own_value].map(|tensor| (tensor, vec![queries, own, groups, dim]));
    for (tensor, want) in shapes.iter().chain(&own_shapes) {
        if tensor.size() != *want || heads % groups != 0 {
            let got = tensor.size();
            return Err(Error::Failed(format!("merged attention of {heads} heads: expected {want:?}, got {got:?}")));
        }
    }
    let mut next = 0;
    for run in runs {
        let within = run.count > 0 && 0 <= run.document_start && run.document_start <= run.first_key;
        if run.first_query != next || !within || run.first_key + run.count > keys {
            return Err(Error::Failed(format!(
                "merged attention: {run:?} does not fit {keys} keys after query {next}"
            )));
        }
        next += run.count;
    }
    if next != queries {
        return Err(Error::Failed(format!("merged attention: the runs hold {next} queries of {queries}")));
    }
    if queries == 0 {
        return Ok(query.shallow_clone());
    }
    let numbers: Vec<i64> =
        runs.iter().flat_map(|run| [run.first_query, run.count, run.document_start, run.first_key]).collect();
    shim::merged_attention([query, key, value, own_key, own_value], &numbers, (dim as f64).powf(-0.5))
}

/// No own keys: `[R, 0, G, D]` beside `key [S, G, D]`.
pub fn no_own_keys(rows: i64, key: &Tensor) -> Result<Tensor> {
    let (_, groups, dim) = key.size3()?;
    Ok(Tensor::f_empty([rows, 0, groups, dim], (key.kind(), key.device()))?)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn random(shape: &[i64], kind: Kind) -> Tensor {
        Tensor::randn(shape, (kind, Device::Cpu)).set_requires_grad(true)
    }

    /// The same as one softmax over a masked matrix of all scores.
    fn written_out(query: &Tensor, shared: [&Tensor; 2], own: [&Tensor; 2], runs: &[Run]) -> Tensor {
        let (queries, heads, dim) = query.size3().unwrap();
        let (keys, groups, _) = shared[0].size3().unwrap();
        let times = heads / groups;
        let mut visible = vec![false; (queries * keys) as usize];
        for run in runs {
            for offset in 0..run.count {
                for key in run.document_start..=run.first_key + offset {
                    visible[((run.first_query + offset) * keys + key) as usize] = true;
                }
            }
        }
        let hidden = Tensor::from_slice(&visible).view([queries, 1, keys]).logical_not();
        let [key, value] = shared.map(|tensor| tensor.repeat_interleave_self_int(times, 1, None)); // [S, N, D]
        let [own_key, own_value] = own.map(|tensor| tensor.repeat_interleave_self_int(times, 2, None)); // [R, I, N, D]
        let scores = query.transpose(0, 1).matmul(&key.permute([1, 2, 0])).transpose(0, 1); // [R, N, S]
        let scores = scores.masked_fill(&hidden, f64::NEG_INFINITY);
        let own_scores = (query.unsqueeze(1) * &own_key).sum_dim_intlist(-1, false, query.kind()).transpose(1, 2);
        let all = Tensor::cat(&[scores, own_scores], 2) / (dim as f64).sqrt(); // [R, N, S + I]
        let weights = all.softmax(-1, query.kind());
        let from_shared = weights.narrow(2, 0, keys).transpose(0, 1).matmul(&value.transpose(0, 1)).transpose(0, 1);
        let own_weights = weights.narrow(2, keys, own_key.size()[1]).transpose(1, 2).unsqueeze(-1); // [R, I, N, 1]
        from_shared + (own_weights * own_value).sum_dim_intlist(1, false, query.kind())
    }

    const RUNS: [Run; 4] = [
        Run { first_query: 0, count: 3, document_start: 0, first_key: 0 },
        Run { first_query: 3, count: 1, document_start: 0, first_key: 5 },
        Run { first_query: 4, count: 4, document_start: 7, first_key: 9 },
        Run { first_query: 8, count: 1, document_start: 13, first_key: 13 },
    ];

    /// Outputs and all five gradients, with scores so large that a wrong denominator would show.
    #[test]
    fn equals_one_softmax_over_all_keys() {
        tch::manual_seed(5);
        for (kind, tolerance) in [(Kind::Double, 1e-11), (Kind::Float, 2e-4)] {
            for own in [0, 1, 3] {
                let inputs = [
                    random(&[9, 6, 8], kind),
                    random(&[15, 2, 8], kind),
                    random(&[15, 2, 8], kind),
                    random(&[9, own, 2, 8], kind),
                    random(&[9, own, 2, 8], kind),
                ];
                let [query, key, value, own_key, own_value] = &inputs;
                let scaled = query * 3.0;
                let slope = Tensor::randn([9, 6, 8], (kind, Device::Cpu));
                let want = written_out(&scaled, [key, value], [own_key, own_value], &RUNS);
                let got = merged_attention(&scaled, [key, value], [own_key, own_value], &RUNS).unwrap();
                let near = |left: &Tensor, right: &Tensor| (left - right).abs().max().double_value(&[]) < tolerance;
                assert!(near(&got, &want), "{kind:?} {own}");
                let wanted: Vec<&Tensor> = inputs.iter().filter(|tensor| tensor.numel() > 0).collect();
                let gradients =
                    |output: Tensor| Tensor::run_backward(&[(output * &slope).sum(kind)], &wanted, true, false);
                for (index, (got, want)) in gradients(got).iter().zip(gradients(want)).enumerate() {
                    assert!(near(got, &want), "{kind:?} {own} gradient {index}");
                }
            }
        }
    }

    /// In bfloat16, scores of own keys keep their digits until after the softmax, as those of shared keys and those of
    /// decoding do: at a score of 44, one rounding would move a weight by a tenth.
    #[test]
    fn large_scores_of_own_keys_are_not_rounded() {
        tch::manual_seed(7);
        const SCORES: [[f64; 4]; 3] = [[7.0, 6.4, 6.9, 5.8], [20.0, 19.3, 18.9, 20.2], [44.0, 43.1, 43.7, 44.3]];
        for kind in [Kind::BFloat16, Kind::Half] {
            for scores in SCORES {
                let (heads, dim) = (4, 64);
                let narrow = |tensor: Tensor| tensor.to_kind(kind).set_requires_grad(true);
                let options = (Kind::Double, Device::Cpu);
                let query = Tensor::randn([9, heads, dim], options) * 3.0;
                // Along the query, so that every score is what it should be, and apart in what is across it.
                let along = &query / query.square().sum_dim_intlist(-1, true, Kind::Double) * (dim as f64).sqrt();
                let own_key = scores.map(|score| {
                    let random = Tensor::randn([9, heads, dim], options) * 2.0;
                    let share = (&random * &query).sum_dim_intlist(-1, true, Kind::Double) / (dim as f64).sqrt();
                    &along * score + random - &along * share
                });
                let shared = |size: f64| narrow(Tensor::randn([15, heads, dim], options) * size);
                let inputs = [
                    narrow(query),
                    shared(0.3),
                    shared(1.0),
                    narrow(Tensor::stack(&own_key, 1)), // [R, I, N, D]
                    narrow(Tensor::randn([9, 4, heads, dim], options)),
                ];
                let slope = Tensor::randn([9, heads, dim], options).to_kind(kind);
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
                    written_out(query, [key, value], [own_key, own_value], &RUNS)
                });
                let got = run(&inputs, &|[query, key, value, own_key, own_value]| {
                    merged_attention(query, [key, value], [own_key, own_value], &RUNS).unwrap()
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
        let attend = |runs: &[Run]| merged_attention(&query, [&key, &key], [&none, &none], runs);
        assert!(attend(&RUNS).is_ok());
        assert!(attend(&RUNS[..3]).is_err());
        let mut late = RUNS;
        late[3].first_key = 14;
        assert!(attend(&late).is_err());
        assert!(merged_attention(&query, [&key, &none], [&none, &none], &RUNS).is_err());
    }
}
