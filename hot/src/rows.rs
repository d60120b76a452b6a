//! Rows of a vocabulary: logits and probabilities in float64.

/// Divides every number.
pub fn divide(row: &mut [f64], divisor: f64) {
    row.iter_mut().for_each(|value| *value /= divisor);
}

/// Makes all but the `count` largest minus infinity; equals of the least of them stay.
pub fn keep_largest(row: &mut [f64], count: usize) {
    if count == 0 || count >= row.len() {
        return;
    }
    let mut sorted = row.to_vec();
    let (_, &mut least, _) = sorted.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a));
    row.iter_mut().filter(|value| **value < least).for_each(|value| *value = f64::NEG_INFINITY);
}

/// Makes minus infinity what is not needed for the largest probabilities to reach `top_p`. The most likely always stays.
pub fn keep_nucleus(row: &mut [f64], top_p: f64) {
    let probabilities = softmax(row);
    let mut order: Vec<usize> = (0..row.len()).filter(|&token| probabilities[token] > 0.0).collect();
    // Equal probabilities keep their order: the result depends on the row alone.
    order.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]));
    let mut before = 0.0;
    for (place, &token) in order.iter().enumerate() {
        if place > 0 && before >= top_p {
            row[token] = f64::NEG_INFINITY;
        }
        before += probabilities[token];
    }
}

/// Probabilities of a row. A row of nothing but minus infinity is uniform.
pub fn softmax(row: &[f64]) -> Vec<f64> {
    let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exponents: Vec<f64> = row.iter().map(|&logit| if logit == most { 1.0 } else { (logit - most).exp() }).collect();
    let sum: f64 = exponents.iter().sum();
    exponents.into_iter().map(|exponent| exponent / sum).collect()
}

/// The first of the largest values.
pub fn argmax(row: &[f64]) -> usize {
    let mut best = 0;
    for (token, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = token;
        }
    }
    best
}

/// `max(left - right, 0)` in place of `left`, unless that is nothing at all. Says whether it was done.
pub fn subtract(left: &mut [f64], right: &[f64]) -> bool {
    // Written only where something is left: the row is needed otherwise.
    if !left.iter().zip(right).any(|(left, right)| left - right > 0.0) {
        return false;
    }
    left.iter_mut().zip(right).for_each(|(left, right)| *left = (*left - right).max(0.0));
    true
}

/// Divides by the sum, where there is one.
pub fn normalise(weights: &mut [f64]) {
    let sum: f64 = weights.iter().sum();
    if sum > 0.0 {
        divide(weights, sum);
    }
}

/// The index at which a running sum of weights passes a share (0 to 1) of their sum; the last that has one for want of such.
pub fn pass_at(weights: &[f64], share: f64) -> usize {
    let mut left = share * weights.iter().sum::<f64>();
    let mut last = 0;
    for (index, &weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
        last = index;
        left -= weight;
        if left < 0.0 {
            break;
        }
    }
    last
}
