//! Cross-entropy of many rows against a large vocabulary, chunk by chunk.
//!
//! A chunk computes logits, loss, hits and gradients in one go and forgets everything but sums and the gradient of its
//! input rows, so nothing of size rows x vocabulary outlives its chunk. The gradient is the closed form
//! `softmax - onehot`, so no autograd graph of the logits exists either.
//!
//! Shape legend: `R` rows, `C` rows of a chunk, `H` hidden size, `V` vocabulary.

use tch::{Kind, Tensor};

/// A vocabulary projection and where its gradient goes.
#[derive(Debug)]
pub struct Projection<'a> {
    /// `[V, H]`
    pub weight: &'a Tensor,
    /// `[V, H]` float32 accumulator; `None` for a frozen projection.
    pub gradient: Option<&'a mut Tensor>,
}

/// What is left of the rows after the last chunk.
#[derive(Debug)]
pub struct RowLosses {
    /// Sum of the rows' losses, a float64 scalar.
    pub sum: Tensor,
    /// `[R]` booleans: the label is the most likely token. Ties count as misses.
    pub top1: Tensor,
    /// `[R]` booleans: the label is among the five most likely tokens. Ties count as misses.
    pub top5: Tensor,
    /// `[R, H]` gradient with respect to the input, where it was asked for.
    pub input_gradient: Option<Tensor>,
}

/// Rows of a chunk whose float32 logits take at most `bytes`.
pub fn chunk_rows(bytes: usize, vocabulary: i64) -> i64 {
    (bytes as i64 / (vocabulary * 4)).max(1)
}

/// Cross-entropy of `input [R, H]` projected by `projection` against `labels [R]`. With `scale`, gradients of
/// `scale * sum of losses` are computed as well.
pub fn cross_entropy(
    input: &Tensor,
    labels: &Tensor,
    projection: &mut Projection<'_>,
    scale: Option<f64>,
    rows_per_chunk: i64,
) -> RowLosses {
    let _guard = tch::no_grad_guard();
    let rows = labels.size()[0];
    let mut sum = Tensor::zeros([], (Kind::Double, input.device()));
    let (mut top1, mut top5, mut gradients) = (Vec::new(), Vec::new(), Vec::new());
    let room = Room::new(input, projection.weight, rows_per_chunk.min(rows));
    let mut start = 0;
    while start < rows {
        let count = rows_per_chunk.min(rows - start);
        let chunk = input.narrow(0, start, count); // [C, H]
        let label = labels.narrow(0, start, count).unsqueeze(1); // [C, 1]
        start += count;

        let Room { logits, wide_logits, log_probabilities } = room.of(count); // [C, V]
        let _ = chunk.linear_out(&logits, projection.weight, None::<&Tensor>);
        if wide_logits.kind() != logits.kind() {
            wide_logits.shallow_clone().copy_(&logits);
        }
        let _ = wide_logits.log_softmax_int_out(&log_probabilities, -1, None::<Kind>);
        let at_label = log_probabilities.gather(1, &label, false); // [C, 1]
        sum -= at_label.sum(Kind::Double);
        // How many tokens are at least as likely as the label, itself included. NaN gives 0, which is no hit.
        let _ = log_probabilities.ge_tensor_out(&wide_logits, &at_label);
        let rank = wide_logits.sum_dim_intlist(-1, false, None::<Kind>); // [C]
        top1.push(rank.eq(1));
        top5.push(rank.ge(1).logical_and(&rank.le(5)));

        if let Some(scale) = scale {
            let mut slope = log_probabilities.shallow_clone().exp_(); // [C, V]: softmax
            let _ = slope.scatter_add_(1, &label, &at_label.full_like(-1.0));
            let _ = slope.g_mul_scalar_(scale);
            let slope = match slope.kind() == logits.kind() {
                true => slope,
                false => {
                    logits.shallow_clone().copy_(&slope);
                    logits
                }
            };
            gradients.push(slope.matmul(projection.weight)); // [C, H]
            if let Some(total) = projection.gradient.as_deref_mut() {
                add_outer(total, &slope, &chunk);
            }
        }
    }
    let join = |parts: Vec<Tensor>, kind: Kind| match parts.is_empty() {
        true => Tensor::zeros([0], (kind, input.device())),
        false => Tensor::cat(&parts, 0),
    };
    let input_gradient = scale.map(|_| match gradients.is_empty() {
        true => input.zeros_like(),
        false => Tensor::cat(&gradients, 0), // [R, H]
    });
    RowLosses { sum, top1: join(top1, Kind::Bool), top5: join(top5, Kind::Bool), input_gradient }
}

/// Memory that every chunk uses again. A fresh tensor for each would leave gaps in the heap of the C library, which
/// then grows with the number of chunks after all.
struct Room {
    logits: Tensor,
    /// float32 at least; the memory of `logits` itself where they are that already.
    wide_logits: Tensor,
    log_probabilities: Tensor,
}

impl Room {
    fn new(input: &Tensor, weight: &Tensor, rows: i64) -> Self {
        let shape = [rows, weight.size()[0]];
        let wide = if input.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let logits = Tensor::empty(shape, (input.kind(), input.device()));
        let wide_logits = if wide == input.kind() { logits.shallow_clone() } else { logits.empty_like().to_kind(wide) };
        let log_probabilities = wide_logits.empty_like();
        Self { logits, wide_logits, log_probabilities }
    }

    /// The part that a chunk of `count` rows uses.
    fn of(&self, count: i64) -> Self {
        let part = |tensor: &Tensor| tensor.narrow(0, 0, count);
        let (logits, wide_logits) = (part(&self.logits), part(&self.wide_logits));
        Self { logits, wide_logits, log_probabilities: part(&self.log_probabilities) }
    }
}

/// `total += slope^T input`, in place where the element types allow it.
fn add_outer(total: &mut Tensor, slope: &Tensor, input: &Tensor) {
    let transposed = slope.transpose(0, 1); // [V, C]
    if total.kind() == input.kind() {
        let _ = total.addmm_(&transposed, input);
    } else {
        *total += transposed.matmul(input);
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// Loss and gradients equal autograd's for every chunk size, in float64.
    #[test]
    fn chunks_equal_autograd() {
        tch::manual_seed(3);
        let options = (Kind::Double, Device::Cpu);
        let input = Tensor::randn([7, 5], options).set_requires_grad(true);
        let weight = Tensor::randn([11, 5], options).set_requires_grad(true);
        let labels = Tensor::from_slice(&[3i64, 0, 10, 3, 7, 1, 2]);
        let loss = input.linear(&weight, None::<&Tensor>).cross_entropy_loss::<Tensor>(
            &labels,
            None,
            tch::Reduction::Sum,
            -100,
            0.0,
        );
        (&loss * 0.3).backward();
        for rows_per_chunk in [1, 2, 3, 7, 50] {
            let mut gradient = Tensor::zeros([11, 5], options);
            let mut projection = Projection { weight: &weight, gradient: Some(&mut gradient) };
            let losses = cross_entropy(&input.detach(), &labels, &mut projection, Some(0.3), rows_per_chunk);
            let difference = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
            assert!(difference(&losses.sum, &loss) < 1e-12);
            assert!(difference(&losses.input_gradient.unwrap(), &input.grad()) < 1e-12);
            assert!(difference(&gradient, &weight.grad()) < 1e-12);
        }
    }

    #[test]
    fn hits_count_ranks_and_ties_are_misses() {
        let weight = Tensor::eye(7, (Kind::Float, Device::Cpu));
        let input = Tensor::from_slice2(&[[7f32, 6., 5., 4., 3., 2., 1.]; 7]);
        let labels = Tensor::arange(7, (Kind::Int64, Device::Cpu));
        let hits = |input: &Tensor| {
            let losses = cross_entropy(input, &labels, &mut Projection { weight: &weight, gradient: None }, None, 3);
            [losses.top1, losses.top5]
                .map(|hits| Vec::<bool>::try_from(hits).unwrap().iter().filter(|&&hit| hit).count())
        };
        assert_eq!(hits(&input), [1, 5]);
        assert_eq!(hits(&input.zeros_like()), [0, 0]);
        assert_eq!(hits(&(input * f64::NAN)), [0, 0]);
    }
}
