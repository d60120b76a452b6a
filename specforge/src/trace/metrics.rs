//! Numbers about rows of logits, in float64 whatever the rows were: sums over a vocabulary overflow half precision.
//!
//! Minus infinity rules a token out. Where both rows rule it out they agree; where one does, they differ by infinity.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number that may be infinite, which JSON has no word for: it is written as a string then.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Real(pub f64);

impl Serialize for Real {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            number if number.is_finite() => serializer.serialize_f64(number),
            number => serializer.serialize_str(&number.to_string()),
        }
    }
}

impl<'de> Deserialize<'de> for Real {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(f64),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Number(number) => Ok(Self(number)),
            Written::Text(text) => text.parse().map(Self).map_err(|_| {
                serde::de::Error::custom(format!("expected a number, \"inf\", \"-inf\" or \"NaN\", got {text:?}"))
            }),
        }
    }
}

/// The `count` largest logits, the first of equals first.
pub fn top(row: &[f64], count: usize) -> Vec<(u32, Real)> {
    let mut best: Vec<usize> = Vec::with_capacity(count + 1);
    for token in 0..row.len() {
        if best.len() < count || best.last().is_some_and(|&last| row[token] > row[last]) {
            let place = best.partition_point(|&other| row[other] >= row[token]);
            best.insert(place, token);
            best.truncate(count);
        }
    }
    best.into_iter().map(|token| (token as u32, Real(row[token]))).collect()
}

/// Distance of the two largest logits; infinite where there is one token.
pub fn margin(row: &[f64]) -> f64 {
    match top(row, 2)[..] {
        [(_, first), (_, second)] if first.0 == second.0 => 0.0,
        [(_, first), (_, second)] => first.0 - second.0,
        _ => f64::INFINITY,
    }
}

/// Logarithm of the sum of exponentials.
pub fn logsumexp(row: &[f64]) -> f64 {
    let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if most.is_infinite() {
        return most;
    }
    most + row.iter().map(|logit| (logit - most).exp()).sum::<f64>().ln()
}

/// Euclidean length of what is finite.
pub fn length(row: &[f64]) -> f64 {
    let scale = row.iter().filter(|logit| logit.is_finite()).fold(0.0, |most: f64, logit| most.max(logit.abs()));
    if scale == 0.0 {
        return 0.0;
    }
    scale * row.iter().filter(|logit| logit.is_finite()).map(|logit| (logit / scale).powi(2)).sum::<f64>().sqrt()
}

/// The larger of two differences; NaN is larger than all.
pub fn worst(one: f64, other: f64) -> f64 {
    if one.is_nan() || one > other { one } else { other }
}

/// How far two rows are apart.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Difference {
    /// Largest difference of a logit.
    pub max: Real,
    /// Where it is.
    pub token: u32,
    /// Mean of squared differences.
    pub mse: Real,
    /// Cosine of the two rows, over the tokens that both leave in.
    pub cosine: Real,
    /// Kullback-Leibler divergence of the second row's distribution from the first's.
    pub kl: Real,
}

/// Compares two rows of one length.
pub fn difference(a: &[f64], b: &[f64]) -> Difference {
    let (mut max, mut token, mut squares) = (0.0, 0, 0.0);
    let scale = length(a).max(length(b)).max(f64::MIN_POSITIVE);
    let (mut dot, mut a_length, mut b_length) = (0.0, 0.0, 0.0);
    let (a_sum, b_sum) = (logsumexp(a), logsumexp(b));
    let mut kl = 0.0;
    for (index, (&a, &b)) in a.iter().zip(b).enumerate() {
        let apart = if a == b { 0.0 } else { (a - b).abs() };
        if apart > max || apart.is_nan() {
            (max, token) = (apart, index as u32);
        }
        squares += apart * apart;
        if a.is_finite() && b.is_finite() {
            dot += (a / scale) * (b / scale);
            a_length += (a / scale).powi(2);
            b_length += (b / scale).powi(2);
        }
        let probability = (a - a_sum).exp();
        if probability > 0.0 {
            kl += probability * ((a - a_sum) - (b - b_sum));
        }
    }
    let lengths = a_length.sqrt() * b_length.sqrt();
    // Two rows of zeros point the same way.
    let cosine = if lengths > 0.0 { (dot / lengths).clamp(-1.0, 1.0) } else { 1.0 };
    let mse = squares / a.len().max(1) as f64;
    // Rounding takes a divergence of nothing below zero.
    Difference { max: Real(max), token, mse: Real(mse), cosine: Real(cosine), kl: Real(kl.max(0.0)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUT: f64 = f64::NEG_INFINITY;

    #[test]
    fn tokens_ruled_out_by_both_rows_contribute_nothing() {
        let same = difference(&[1.0, OUT, 3.0], &[1.0, OUT, 3.0]);
        assert_eq!((same.max.0, same.mse.0, same.kl.0), (0.0, 0.0, 0.0));
        assert!((same.cosine.0 - 1.0).abs() < 1e-15);
        let one = difference(&[1.0, 2.0], &[1.0, OUT]);
        assert_eq!((one.max.0, one.token, one.kl.0), (f64::INFINITY, 1, f64::INFINITY));
        assert!(!one.cosine.0.is_nan());
    }

    #[test]
    fn values_by_hand() {
        let got = difference(&[3.0f64.ln(), 0.0], &[0.0, 0.0]);
        // p = (3/4, 1/4), q = (1/2, 1/2)
        let kl = 0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln();
        assert!((got.kl.0 - kl).abs() < 1e-15);
        assert!((got.mse.0 - 3.0f64.ln().powi(2) / 2.0).abs() < 1e-15);
        let got = difference(&[3.0, 4.0], &[4.0, 3.0]);
        assert!((got.cosine.0 - 24.0 / 25.0).abs() < 1e-15);
        assert!((logsumexp(&[0.0, 0.0]) - 2.0f64.ln()).abs() < 1e-15);
        assert_eq!((length(&[3.0, 4.0, OUT]), margin(&[1.0, 4.0, 3.5])), (5.0, 0.5));
        assert_eq!((margin(&[OUT, OUT]), logsumexp(&[OUT, OUT])), (0.0, OUT));
    }

    #[test]
    fn rows_as_large_as_half_precision_allows_are_finite_numbers() {
        // In half precision the square of 300 is infinite already, and the cosine of two such rows is no number.
        let row: Vec<f64> = (0..70_000).map(|token| f64::from(token % 1000) * 65.0).collect();
        let other: Vec<f64> = row.iter().map(|logit| logit + 1.0).collect();
        let got = difference(&row, &other);
        assert!((got.mse.0 - 1.0).abs() < 1e-12 && got.cosine.0 > 0.999 && got.kl.0.abs() < 1e-6);
        for row in [vec![1e308, -1e308], vec![0.0, 0.0]] {
            let got = difference(&row, &row);
            assert!([got.max, got.mse, got.cosine, got.kl].iter().all(|number| number.0.is_finite()), "{got:?}");
        }
    }

    #[test]
    fn the_first_of_equals_comes_first() {
        let tokens = |row: &[f64], count| top(row, count).iter().map(|(token, _)| *token).collect::<Vec<_>>();
        assert_eq!(tokens(&[1.0, 3.0, 3.0, 2.0, OUT], 3), [1, 2, 3]);
        assert_eq!(tokens(&[OUT, OUT], 3), [0, 1]);
    }

    #[test]
    fn infinity_survives_a_file() {
        let text = serde_json::to_string(&[Real(0.1), Real(OUT), Real(f64::INFINITY)]).unwrap();
        assert_eq!(text, r#"[0.1,"-inf","inf"]"#);
        assert_eq!(serde_json::from_str::<Vec<Real>>(&text).unwrap(), [Real(0.1), Real(OUT), Real(f64::INFINITY)]);
        assert!(serde_json::from_str::<Real>("\"much\"").unwrap_err().to_string().contains("much"));
    }
}
