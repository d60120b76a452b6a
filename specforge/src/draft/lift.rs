//! By how much gradients of 16 bits are made larger between a batch's losses and the float32 totals.
//!
//! A row's factor in the objective is its term's weight over the trained rows of the whole optimizer step: 1e-5 and less.
//! bfloat16 has the exponents of float32 and does not mind. float16 ends at 6e-8, so that most of what such a factor
//! multiplies would be rounded to nothing, the slopes of attention first of all. All factors of a batch are therefore
//! multiplied by a power of two, the *lift*, before anything is rounded to 16 bits, and whoever adds a gradient to a
//! float32 total divides by it again. Both are exact: in float32 and bfloat16 the result is the same to the bit, and the
//! ranks and micro-batches of a step may lift differently.
//!
//! float16 also ends at 65504, which decides how far. What a row has of its own stands near its factor, but the gradient
//! of a parameter is a sum over all rows of the batch, in float16 as well. Factors of 1 on average are best for the rows;
//! in batches of more than [`SUM`] rows their sum is held there instead. A parameter then overflows only where the rows
//! agree on a slope of 16 and more, some hundred times what a norm of 1 over a whole draft leaves for its largest element,
//! and the rows still have a factor of 0.1 in a batch of 40 000: thousands of times what float16 would need. A term with
//! few rows in the step gives each of them a factor far above the average; that one may be [`MOST`].

use tch::Kind;

/// What the factors of a batch's rows add up to at most, after the lift.
const SUM: f64 = 4096.0;
/// The largest factor of a row after the lift.
const MOST: f64 = 256.0;

/// A power of two for rows with these factors, as (factor, rows) of each loss term; 1 where `kind` has 32 bits or more.
pub(super) fn lift(kind: Kind, terms: impl Iterator<Item = (f64, usize)>) -> f64 {
    if !matches!(kind, Kind::Half | Kind::BFloat16) {
        return 1.0;
    }
    let (mut rows, mut sum, mut most) = (0.0, 0.0, 0f64);
    for (factor, count) in terms.filter(|(factor, count)| *factor > 0.0 && *count > 0) {
        rows += count as f64;
        sum += factor * count as f64;
        most = most.max(factor);
    }
    let wanted = (SUM.min(rows) / sum).min(MOST / most);
    // Without rows there is nothing to lift. The limits are float32's own: the inverse has to fit too.
    if wanted.is_finite() && wanted > 0.0 { wanted.log2().floor().clamp(-100.0, 100.0).exp2() } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(terms: &[(f64, usize)]) -> f64 {
        lift(Kind::Half, terms.iter().copied())
    }

    #[test]
    fn factors_are_lifted_to_one_and_their_sum_stays_in_reach() {
        for (count, rows) in [(1.0, 1), (7.0, 7), (300.0, 300), (1e5, 3000), (1e6, 40_000), (1e6, 12), (1e9, 100_000)] {
            let terms: Vec<(f64, usize)> = (0..7).map(|step| (0.8f64.powi(step) / count, rows / 7 + 1)).collect();
            let lift = of(&terms);
            assert_eq!(lift.log2().fract(), 0.0);
            let sum: f64 = terms.iter().map(|(factor, rows)| lift * factor * *rows as f64).sum();
            let all = terms.iter().map(|(_, rows)| *rows as f64).sum::<f64>();
            assert!(sum <= all.min(SUM) && sum > all.min(SUM) / 2.0, "{count} {rows}: {sum}");
        }
    }

    #[test]
    fn weights_and_counts_of_any_size_end_in_range() {
        // One row of the last step in the whole batch: it must not carry everything.
        let lift_of_few = of(&[(1e-5, 5000), (0.26, 1)]);
        assert!(lift_of_few * 0.26 <= MOST && lift_of_few * 1e-5 > 1e-3, "{lift_of_few}");
        // Too large is as bad as too small.
        assert!(of(&[(1e6, 100)]) * 1e6 <= MOST);
        assert!(of(&[(1e-30, 10)]).is_finite() && of(&[(1e-300, 10)]) <= 2f64.powi(100));
        for nothing in [&[][..], &[(0.0, 5)], &[(0.5, 0)], &[(f64::INFINITY, 3)], &[(f64::NAN, 3)]] {
            assert_eq!(of(nothing), 1.0, "{nothing:?}");
        }
    }

    #[test]
    fn wide_types_stay_as_they_are() {
        for kind in [Kind::Float, Kind::Double] {
            assert_eq!(lift(kind, [(1e-6, 100)].into_iter()), 1.0);
        }
        assert_eq!(lift(Kind::BFloat16, [(1e-6, 100)].into_iter()), of(&[(1e-6, 100)]));
    }
}
