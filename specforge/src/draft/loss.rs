//! Cross-entropy of many rows against a large vocabulary, chunk by chunk.
//!
//! A chunk computes logits, loss, hits and gradients in one go and forgets everything but sums and the gradient of its
//! input rows, so nothing of size rows x vocabulary outlives its chunk. The gradient is the closed form
//! `softmax - onehot`, so no autograd graph of the logits exists either. It is kept unscaled: the scale enters as the
//! factor of a matrix product, which is free, where scaling `[C, V]` would be a pass over memory.
//!
//! Shape legend: `R` rows, `C` rows of a chunk, `H` hidden size, `V` vocabulary.

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::nn::{Head, linear};
use crate::shim;

/// A vocabulary projection and where its gradient goes.
#[derive(Debug)]
pub struct Projection<'a> {
    /// Its matrix is `[V, H]`.
    pub head: &'a Head,
    /// `[V, H]` float32 accumulator of the matrix; `None` for a frozen projection.
    pub gradient: Option<&'a mut Tensor>,
}

/// What gradients are of.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    /// Factor of the sum of losses in the objective.
    pub factor: f64,
    /// The gradient of the input is multiplied by this power of two before it is rounded; see `draft::lift`.
    pub lift: f64,
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
    /// `[R, H]` gradient with respect to the input, times the lift, where it was asked for.
    pub input_gradient: Option<Tensor>,
}

/// Rows of a chunk whose float32 logits take at most `bytes`.
pub fn chunk_rows(bytes: usize, vocabulary: i64) -> i64 {
    (bytes as i64 / (vocabulary * 4)).max(1)
}

/// Cross-entropy of `input [R, H]` projected by `projection` against `labels [R]`. With `scale`, gradients of
/// `factor * sum of losses` are computed as well.
pub fn cross_entropy(
    input: &Tensor,
    labels: &Tensor,
    projection: &mut Projection<'_>,
    scale: Option<Scale>,
    rows_per_chunk: i64,
) -> Result<RowLosses> {
    let _guard = tch::no_grad_guard();
    let rows = labels.size()[0];
    let mut sum = Tensor::zeros([], (Kind::Double, input.device()));
    let (mut top1, mut top5, mut gradients) = (Vec::new(), Vec::new(), Vec::new());
    // A trained weight asks for gradients; the products here are not autograd's business.
    let head = projection.head;
    let weight = head.weight.detach();
    // One piece of memory for the log-probabilities of every chunk. A fresh one for each would leave gaps in the heap of
    // the C library, which would then grow with the number of chunks after all.
    let wide = if input.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let room = Tensor::f_empty([rows_per_chunk.min(rows), weight.size()[0]], (wide, input.device()))?;
    let mut start = 0;
    while start < rows {
        let count = rows_per_chunk.min(rows - start);
        let chunk = input.narrow(0, start, count); // [C, H]
        let label = labels.narrow(0, start, count).unsqueeze(1); // [C, 1]
        start += count;

        let mut logits = head.finish(project(&chunk, &weight)?); // [C, V]
        // The logits' memory is taken for their ranks below.
        let bend = scale.and_then(|_| head.derivative(&logits));
        let log_probabilities = room.narrow(0, 0, count); // [C, V]
        let _ = logits.f_log_softmax_int_out(&log_probabilities, -1, room.kind())?;
        let own_logit = logits.f_gather(1, &label, false)?; // [C, 1]
        let at_label = log_probabilities.f_gather(1, &label, false)?; // [C, 1]
        sum -= at_label.sum(Kind::Double);
        // How many tokens are at least as likely as the label, itself included. NaN gives 0, which is no hit. Ones and
        // zeros of a float type, in place: integers would be summed from a copy twice as large as the logits.
        let rank = logits.f_ge_tensor_(&own_logit)?.sum_dim_intlist(-1, false, Kind::Float); // [C]
        top1.push(rank.eq(1));
        top5.push(rank.ge(1).logical_and(&rank.le(5)));

        if let Some(scale) = scale {
            let slope = slope(log_probabilities, &label, &at_label, chunk.kind())?; // [C, V]
            let slope = bend.map_or(slope.shallow_clone(), |bend| slope * bend.to_kind(chunk.kind()));
            gradients.push(linear(&slope, &weight.transpose(0, 1), None)); // [C, H]
            if let Some(total) = projection.gradient.as_deref_mut() {
                shim::add_product(total, &slope.transpose(0, 1), &chunk, scale.factor)?;
            }
        }
    }
    let join = |parts: Vec<Tensor>, kind: Kind| match parts.is_empty() {
        true => Tensor::zeros([0], (kind, input.device())),
        false => Tensor::cat(&parts, 0),
    };
    let input_gradient = scale.map(|scale| match gradients.is_empty() {
        true => input.zeros_like(),
        false => Tensor::cat(&gradients, 0) * (scale.factor * scale.lift), // [R, H]
    });
    Ok(RowLosses { sum, top1: join(top1, Kind::Bool), top5: join(top5, Kind::Bool), input_gradient })
}

/// Rows of a 16-bit weight that the CPU widens at a time: all at once would take twice the weight's own memory.
const WIDENED: i64 = 4096;

/// Logits of a chunk, `[C, V]`, in float32 at least: in 16 bits, tokens that are not equally likely would tie. CUDA gives
/// them in one product, which costs no more than rounding them and converting them back.
pub(super) fn project(chunk: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if !matches!(chunk.kind(), Kind::BFloat16 | Kind::Half) {
        return Ok(linear(chunk, weight, None));
    }
    if chunk.device().is_cuda() {
        return Ok(chunk.f_mm_dtype(&weight.f_transpose(0, 1)?, Kind::Float)?);
    }
    let (rows, vocabulary) = (chunk.size()[0], weight.size()[0]);
    let logits = Tensor::f_empty([rows, vocabulary], (Kind::Float, chunk.device()))?;
    let chunk = chunk.f_to_kind(Kind::Float)?;
    for start in (0..vocabulary).step_by(WIDENED as usize) {
        let count = WIDENED.min(vocabulary - start);
        let wide = weight.f_narrow(0, start, count)?.f_to_kind(Kind::Float)?;
        logits.f_narrow(1, start, count)?.f_copy_(&linear(&chunk, &wide, None))?;
    }
    Ok(logits)
}

/// `softmax - onehot` in the element type of the model; takes the log-probabilities' memory where it can.
///
/// The label's own slope is `p - 1` before any rounding: a confident row's would be lost otherwise.
fn slope(mut log_probabilities: Tensor, label: &Tensor, at_label: &Tensor, kind: Kind) -> Result<Tensor> {
    let own = at_label.f_expm1()?.f_to_kind(kind)?; // [C, 1]
    let mut slope = if log_probabilities.kind() == kind {
        log_probabilities.f_exp_()?
    } else {
        let rounded = Tensor::f_empty(log_probabilities.size(), (kind, log_probabilities.device()))?;
        log_probabilities.f_exp_out(&rounded)?
    }; // [C, V]
    Ok(slope.f_scatter_(1, label, &own)?)
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
        let plain = Head::plain(weight.shallow_clone());
        let bent = Head { bias: Some(Tensor::randn([11], options)), scale: 0.7, softcap: Some(2.0), ..plain.share() };
        let labels = Tensor::from_slice(&[3i64, 0, 10, 3, 7, 1, 2]);
        for head in [plain, bent] {
            let loss = head.logits(&input).cross_entropy_loss::<Tensor>(&labels, None, tch::Reduction::Sum, -100, 0.0);
            let wanted = Tensor::run_backward(&[&loss * 0.3], &[&input, &weight], false, false);
            for rows_per_chunk in [1, 2, 3, 7, 50] {
                let mut gradient = Tensor::zeros([11, 5], options);
                let mut projection = Projection { head: &head, gradient: Some(&mut gradient) };
                let scale = Some(Scale { factor: 0.3, lift: 1.0 });
                let losses = cross_entropy(&input.detach(), &labels, &mut projection, scale, rows_per_chunk).unwrap();
                let difference = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
                assert!(difference(&losses.sum, &loss) < 1e-12);
                assert!(difference(&losses.input_gradient.unwrap(), &wanted[0]) < 1e-12, "{:?}", head.form());
                assert!(difference(&gradient, &wanted[1]) < 1e-12, "{:?}", head.form());
            }
        }
    }

    /// In bfloat16, gradients are those of float32 but for the rounding of their parts, also where the label is nearly
    /// certain and its slope is far smaller than bfloat16's steps below 1.
    #[test]
    fn sixteen_bits_keep_the_slope_of_a_certain_label() {
        let weight = Tensor::eye(4, (Kind::Float, Device::Cpu));
        let input = Tensor::from_slice2(&[[8f32, 0., 0., 0.], [0., 7., 0., 1.]]);
        let labels = Tensor::from_slice(&[0i64, 1]);
        let gradients = |kind: Kind| {
            let head = Head::plain(weight.to_kind(kind));
            let mut total = Tensor::zeros([4, 4], (Kind::Float, Device::Cpu));
            let mut projection = Projection { head: &head, gradient: Some(&mut total) };
            let losses = cross_entropy(
                &input.to_kind(kind),
                &labels,
                &mut projection,
                Some(Scale { factor: 0.1, lift: 1.0 }),
                1,
            )
            .unwrap();
            [total, losses.input_gradient.unwrap().to_kind(Kind::Float)]
        };
        for (got, want) in gradients(Kind::BFloat16).iter().zip(gradients(Kind::Float)) {
            assert!(want.abs().max().double_value(&[]) > 1e-4);
            assert!(((got - &want).abs() - want.abs() * 0.02).max().double_value(&[]) <= 0.0, "{got} {want}");
        }
    }

    #[test]
    fn hits_count_ranks_and_ties_are_misses() {
        let head = Head::plain(Tensor::eye(7, (Kind::Float, Device::Cpu)));
        let input = Tensor::from_slice2(&[[7f32, 6., 5., 4., 3., 2., 1.]; 7]);
        let labels = Tensor::arange(7, (Kind::Int64, Device::Cpu));
        let hits = |input: &Tensor| {
            let losses =
                cross_entropy(input, &labels, &mut Projection { head: &head, gradient: None }, None, 3).unwrap();
            [losses.top1, losses.top5]
                .map(|hits| Vec::<bool>::try_from(hits).unwrap().iter().filter(|&&hit| hit).count())
        };
        assert_eq!(hits(&input), [1, 5]);
        assert_eq!(hits(&input.zeros_like()), [0, 0]);
        assert_eq!(hits(&(input * f64::NAN)), [0, 0]);
    }
}
