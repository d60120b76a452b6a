//! The attention of EAGLE-3's training-time test as a program of its own: on CUDA it goes through another kernel than on
//! the CPU, forward and backward, with a log-sum-exp that is put together by hand.
//!
//! Shape legend: `R` queries, `S` shared keys, `I` own keys of a query, `N` heads, `G` key/value heads, `D` head size.

use tch::{Kind, Tensor};

use super::programs::{Place, Results, all_on_host};
use crate::error::Result;
use crate::nn::merged_attention::{Own, Run, Runs, merged_attention};
use crate::nn::noise;

/// Sizes of one attention, and what its queries see.
#[derive(Debug)]
pub struct AttentionShape {
    /// What is special about it.
    pub label: &'static str,
    /// `N`
    heads: i64,
    /// `G`
    groups: i64,
    /// `D`
    head_dim: i64,
    /// `I`
    own: i64,
    /// Documents, and in each the first key and the length of every run of queries.
    documents: &'static [(i64, &'static [[i64; 2]])],
}

/// What EAGLE-3 asks for: a first step, later ones whose rows have keys of their own, and the ends of what kernels do in
/// blocks of 32, 64 and 128.
pub const SHAPES: [AttentionShape; 4] = [
    AttentionShape {
        label: "attention, first step",
        heads: 8,
        groups: 8,
        head_dim: 64,
        own: 0,
        documents: &[(70, &[[0, 70]]), (37, &[[12, 25]])],
    },
    AttentionShape {
        label: "attention, grouped heads and 3 own keys",
        heads: 8,
        groups: 2,
        head_dim: 128,
        own: 3,
        documents: &[(33, &[[4, 1], [9, 20]]), (1, &[[0, 1]]), (65, &[[1, 63]])],
    },
    AttentionShape {
        label: "attention, 400 keys and 6 own ones",
        heads: 4,
        groups: 1,
        head_dim: 32,
        own: 6,
        documents: &[(400, &[[3, 128], [140, 129], [300, 100]])],
    },
    AttentionShape {
        label: "attention, single queries",
        heads: 6,
        groups: 3,
        head_dim: 24,
        own: 1,
        documents: &[(20, &[[0, 1], [7, 1], [19, 1]]), (2, &[[1, 1]])],
    },
];

impl AttentionShape {
    /// Runs of queries, and how many queries and keys there are.
    fn runs(&self) -> (Vec<Run>, i64, i64) {
        let (mut runs, mut first_query, mut document_start) = (Vec::new(), 0, 0);
        for (length, pieces) in self.documents {
            for [first_key, count] in *pieces {
                let end = document_start + first_key + count;
                runs.push(Run { queries: first_query..first_query + count, keys: document_start..end, causal: true });
                first_query += count;
            }
            document_start += length;
        }
        (runs, first_query, document_start)
    }
}

/// Output and gradients of all inputs for a random slope.
pub fn run(shape: &AttentionShape, place: Place) -> Result<Results> {
    let (runs, queries, keys) = shape.runs();
    let AttentionShape { heads, groups, head_dim, own, .. } = *shape;
    let random = |shape: &[i64], stream: u64| {
        // No more digits than bfloat16 has, so that only arithmetic differs between element types.
        let values = noise::normal(shape, 1.0, 21, stream).f_to_kind(Kind::BFloat16)?;
        Ok::<_, crate::error::Error>(values.f_to_kind(place.kind)?.f_to_device(place.device)?)
    };
    let inputs = [
        random(&[queries, heads, head_dim], 0)?,
        random(&[keys, groups, head_dim], 1)?,
        random(&[keys, groups, head_dim], 2)?,
        random(&[queries, own, groups, head_dim], 3)?,
        random(&[queries, own, groups, head_dim], 4)?,
    ]
    .map(|input| input.set_requires_grad(true));
    let [query, key, value, own_key, own_value] = &inputs;
    let own = Own { key: own_key, value: own_value, queries_per_own: 1, hidden: None };
    let runs = Runs::new(runs, keys, place.device)?;
    let output = merged_attention(query, [key, value], own, &runs)?; // [R, N, D]
    let slope = random(&[queries, heads, head_dim], 5)?;
    let wanted: Vec<&Tensor> = inputs.iter().filter(|input| input.numel() > 0).collect();
    let gradients = Tensor::f_run_backward(&[(&output * slope).sum(Kind::Float)], &wanted, false, false)?;
    Ok(vec![("output".to_owned(), all_on_host([&output])?), ("gradients".to_owned(), all_on_host(&gradients)?)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_lie_in_their_documents() {
        let (runs, queries, keys) = SHAPES[1].runs();
        assert_eq!((queries, keys), (85, 99));
        assert_eq!(runs[3], Run { queries: 22..85, keys: 34..98, causal: true });
        for shape in &SHAPES {
            let (runs, ..) = shape.runs();
            let mut documents = shape.documents.iter().flat_map(|(length, pieces)| pieces.iter().map(move |_| length));
            for run in runs {
                let end = run.keys.start + documents.next().unwrap();
                assert!(run.keys.end <= end, "{} {run:?}", shape.label);
            }
        }
    }
}
