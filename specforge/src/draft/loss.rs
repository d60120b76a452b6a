//! Cross-entropy of many rows against a large vocabulary, chunk by chunk.
//!
//! A chunk computes logits, loss, hits and gradients in one go and forgets everything but sums and the gradient of its
//! input rows, so nothing of size rows x vocabulary outlives its chunk. The gradient is the closed form
//! `softmax - onehot`, so no autograd graph of the logits exists either. It is kept unscaled: the scale enters as the
//! factor of a matrix product, which is free, where scaling `[C, V]` would be a pass over memory.
//!
//! Rows may count differently. Weights that follow from the draft's own probabilities take two calls: one without a scale,
//! whose losses say what the draft gave each label, and one with the weights. A weight reaches the gradients through the
//! rows of `H` numbers, never as a pass over `[C, V]`.
//!
//! Shape legend: `R` rows, `C` rows of a chunk, `H` hidden size, `V` vocabulary.

use tch::{Kind, Tensor};

use super::row_losses::RowByRow;
use crate::error::Result;
use crate::nn::{Head, add_product, linear, trained_linear};

/// A vocabulary projection and where its gradient goes.
#[derive(Debug)]
pub struct Projection<'a> {
    /// Its matrix is `[V, H]`.
    pub head: &'a Head,
    /// `[V, H]` float32 accumulator of the matrix; `None` for a frozen projection.
    pub gradient: Option<&'a mut Tensor>,
}

/// Rows, what they learn from ([`Hard`], or [`super::distillation::Soft`]), and what each of them counts.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a, Targets> {
    /// `[R, H]` what the projection reads.
    pub input: &'a Tensor,
    /// What the rows learn from.
    pub targets: Targets,
    /// `[R]` factor of each row's loss, without a gradient of its own; `None` where all are 1. A row of weight 0 still
    /// counts in what is not an objective: its loss and its hits are there.
    pub weights: Option<&'a Tensor>,
}

/// One token for each row: `[R]` int64 labels.
#[derive(Debug, Clone, Copy)]
pub struct Hard<'a>(pub &'a Tensor);

/// What gradients are of.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    /// Factor of the sum of weighted losses in the objective.
    pub factor: f64,
    /// The gradient of the input is multiplied by this power of two before it is rounded; see `draft::lift`.
    pub lift: f64,
}

/// What is left of the rows after the last chunk.
#[derive(Debug)]
pub struct RowLosses {
    /// Sum of the rows' losses, a float64 scalar.
    pub sum: Tensor,
    /// Sum of the rows' weighted losses, a float64 scalar: the objective without its factor.
    pub objective: Tensor,
    /// `[R]` losses without weights: the negative logarithm of the draft's probability of each label.
    pub losses: Tensor,
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

/// Cross-entropy of the rows against their labels. With `scale`, gradients of `factor * sum of weighted losses` are
/// computed as well; without, values alone.
pub fn cross_entropy(
    rows: Rows<'_, Hard<'_>>,
    projection: &mut Projection<'_>,
    scale: Option<Scale>,
    rows_per_chunk: i64,
) -> Result<RowLosses> {
    let _guard = tch::no_grad_guard();
    let (input, Hard(labels)) = (rows.input, rows.targets);
    let count = labels.size()[0];
    // A trained weight asks for gradients; the products here are not autograd's business.
    let head = projection.head;
    let weight = head.weight.detach();
    let wide = if input.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    // One piece of memory for the log-probabilities of every chunk, where libtorch's operators compute them. A fresh one
    // for each would leave gaps in the heap of the C library, which would then grow with the number of chunks after all.
    let way = match RowByRow::of(wide, input.device()) {
        Some(rows) => Way::Rows(rows),
        None => {
            let shape = [rows_per_chunk.min(count), weight.size()[0]];
            Way::Operators(Tensor::f_empty(shape, (wide, input.device()))?)
        }
    };
    let losses = Tensor::f_zeros([count], (wide, input.device()))?; // [R]
    let ranks = losses.f_zeros_like()?; // [R]
    let weights = rows.weights.map(|weights| weights.detach().to_kind(wide)); // [R]
    let mut gradients = Vec::new();
    let mut start = 0;
    while start < count {
        let length = rows_per_chunk.min(count - start);
        let part = |tensor: &Tensor| tensor.narrow(0, start, length);
        let (chunk, label) = (part(input), part(labels)); // [C, H], [C]
        let logits = head.finish(project(&chunk, &weight)?); // [C, V]
        // The logits' memory is taken for their ranks, or their slope, below.
        let bend = scale.and_then(|_| head.derivative(&logits));
        let own = Outcome { losses: part(&losses), ranks: part(&ranks), slope: scale.map(|_| chunk.kind()) };
        if let Some(slope) = own.of(logits, &label, &way)? {
            let slope = bend.map_or_else(|| slope.shallow_clone(), |bend| &slope * bend.to_kind(chunk.kind())); // [C, V]
            let factors = weights.as_ref().map(|weights| part(weights).unsqueeze(1).to_kind(chunk.kind())); // [C, 1]
            let weighted =
                |rows: Tensor| factors.as_ref().map_or_else(|| rows.shallow_clone(), |factors| &rows * factors);
            gradients.push(weighted(trained_linear(&slope, &weight.transpose(0, 1))?)); // [C, H]
            if let (Some(total), Some(scale)) = (projection.gradient.as_deref_mut(), scale) {
                add_product(total, &slope.transpose(0, 1), &weighted(chunk), scale.factor)?;
            }
        }
        start += length;
    }
    let input_gradient = scale.map(|scale| match gradients.is_empty() {
        true => input.zeros_like(),
        false => Tensor::cat(&gradients, 0) * (scale.factor * scale.lift), // [R, H]
    });
    let sum = losses.sum(Kind::Double);
    let objective = weights.map_or_else(|| sum.shallow_clone(), |weights| (&losses * weights).sum(Kind::Double));
    // NaN has rank 0, which is no hit.
    let (top1, top5) = (ranks.eq(1), ranks.ge(1).logical_and(&ranks.le(5)));
    Ok(RowLosses { sum, objective, losses, top1, top5, input_gradient })
}

/// How a chunk's values are computed.
enum Way {
    /// Row by row.
    Rows(RowByRow),
    /// By libtorch's operators, with room for the log-probabilities of the largest chunk.
    Operators(Tensor),
}

/// Where a chunk's values go.
struct Outcome {
    /// `[C]`
    losses: Tensor,
    /// `[C]` how many tokens are at least as likely as the label, itself included; 0 for NaN.
    ranks: Tensor,
    /// Element type of the slope, where one is wanted.
    slope: Option<Kind>,
}

impl Outcome {
    /// Losses and ranks of a chunk's logits `[C, V]`, which are lost, and `softmax - onehot` where it is wanted.
    fn of(self, mut logits: Tensor, labels: &Tensor, way: &Way) -> Result<Option<Tensor>> {
        let room = match way {
            Way::Rows(rows) => return rows.hard(logits, labels, [&self.losses, &self.ranks], self.slope),
            Way::Operators(room) => room.narrow(0, 0, labels.size()[0]),
        };
        let label = labels.unsqueeze(1); // [C, 1]
        let _ = logits.f_log_softmax_int_out(&room, -1, room.kind())?;
        let own_logit = logits.f_gather(1, &label, false)?; // [C, 1]
        let at_label = room.f_gather(1, &label, false)?; // [C, 1]
        let Self { mut losses, mut ranks, slope: wanted } = self;
        losses.f_copy_(&at_label.f_neg()?.squeeze_dim(1))?;
        // Ones and zeros of a float type, in place: integers would be summed from a copy twice as large as the logits.
        let rank = logits.f_ge_tensor_(&own_logit)?.sum_dim_intlist(-1, false, room.kind()); // [C]
        ranks.f_copy_(&rank)?;
        wanted.map(|kind| slope(room, &label, &at_label, kind)).transpose()
    }
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
    use crate::nn::drawn;

    /// Loss and gradients equal autograd's for every chunk size, in float64.
    #[test]
    fn chunks_equal_autograd() {
        drawn::seed(3);
        let options = (Kind::Double, Device::Cpu);
        let input = drawn::randn([7, 5], options).set_requires_grad(true);
        let weight = drawn::randn([11, 5], options).set_requires_grad(true);
        let plain = Head::plain(weight.shallow_clone());
        let bent = Head { bias: Some(drawn::randn([11], options)), scale: 0.7, softcap: Some(2.0), ..plain.share() };
        let labels = Tensor::from_slice(&[3i64, 0, 10, 3, 7, 1, 2]);
        for head in [plain, bent] {
            let loss = head.logits(&input).cross_entropy_loss::<Tensor>(&labels, None, tch::Reduction::Sum, -100, 0.0);
            let wanted = Tensor::run_backward(&[&loss * 0.3], &[&input, &weight], false, false);
            for rows_per_chunk in [1, 2, 3, 7, 50] {
                let mut gradient = Tensor::zeros([11, 5], options);
                let mut projection = Projection { head: &head, gradient: Some(&mut gradient) };
                let scale = Some(Scale { factor: 0.3, lift: 1.0 });
                let rows = Rows { input: &input.detach(), targets: Hard(&labels), weights: None };
                let losses = cross_entropy(rows, &mut projection, scale, rows_per_chunk).unwrap();
                let difference = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
                assert!(difference(&losses.sum, &loss) < 1e-12);
                assert!(difference(&losses.input_gradient.unwrap(), &wanted[0]) < 1e-12, "{:?}", head.form());
                assert!(difference(&gradient, &wanted[1]) < 1e-12, "{:?}", head.form());
            }
        }
    }

    /// Rows that count differently, by weights that a first call without gradients says, equal autograd's; so do losses
    /// row by row.
    #[test]
    fn weights_of_rows_equal_autograd() {
        drawn::seed(4);
        let options = (Kind::Double, Device::Cpu);
        let input = drawn::randn([7, 5], options).set_requires_grad(true);
        let weight = drawn::randn([11, 5], options).set_requires_grad(true);
        let labels = Tensor::from_slice(&[3i64, 0, 10, 3, 7, 1, 2]);
        let log_probabilities = input.linear(&weight, None::<&Tensor>).log_softmax(-1, Kind::Double);
        let each = -log_probabilities.gather(1, &labels.unsqueeze(1), false).squeeze_dim(1); // [R]
        let mut gradient = Tensor::zeros([11, 5], options);
        let head = Head::plain(weight.shallow_clone());
        let mut projection = Projection { head: &head, gradient: Some(&mut gradient) };
        let detached = input.detach();
        let rows = Rows { input: &detached, targets: Hard(&labels), weights: None };
        let values = cross_entropy(rows, &mut projection, None, 2).unwrap();
        // A row counts as much as the draft is sure of its label; one of them not at all.
        let weights = (-&values.losses).exp() * Tensor::from_slice(&[1.0, 2.0, 0.0, 1.0, 0.5, 1.0, 3.0]);
        ((&each * &weights).sum(Kind::Double) * 0.3).backward();
        let rows = Rows { weights: Some(&weights), ..rows };
        let scale = Some(Scale { factor: 0.3, lift: 4.0 });
        let losses = cross_entropy(rows, &mut projection, scale, 3).unwrap();
        let difference = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
        assert!(difference(&losses.losses, &each) < 1e-12 && difference(&losses.losses, &values.losses) < 1e-12);
        assert!(difference(&losses.objective, &(&each * &weights).sum(Kind::Double)) < 1e-12);
        assert!(difference(&losses.sum, &each.sum(Kind::Double)) < 1e-12);
        assert!(difference(&(losses.input_gradient.unwrap() / 4.0), &input.grad()) < 1e-12);
        assert!(difference(&gradient, &weight.grad()) < 1e-12);
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
                Rows { input: &input.to_kind(kind), targets: Hard(&labels), weights: None },
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

    /// Row by row or by operators, in sizes that fill no vector and some, labels first and last, with logits so large that
    /// only differences of them have exponentials, and one that is none.
    #[test]
    fn row_by_row_equals_operators() {
        drawn::seed(8);
        for (vocabulary, size) in [(3, 1.0), (16, 4.0), (37, 30.0), (2600, 5.0)] {
            let logits = drawn::randn([9, vocabulary], (Kind::Float, Device::Cpu)) * size + 200.0;
            let _ = logits.narrow(0, 4, 1).fill_(2.5); // all alike
            let _ = logits.narrow(0, 5, 1).narrow(1, 1, 1).fill_(f64::NAN);
            let _ = logits.narrow(0, 6, 1).narrow(1, 1, 1).fill_(f64::NEG_INFINITY);
            let labels = Tensor::from_slice(&[0, vocabulary - 1, 1, 2, 0, 2, 0, vocabulary - 2, vocabulary / 2]);
            let outcome = |way: &Way| {
                let values = || Tensor::zeros([9], (Kind::Float, Device::Cpu));
                let [losses, ranks] = [values(), values()];
                let into =
                    Outcome { losses: losses.shallow_clone(), ranks: ranks.shallow_clone(), slope: Some(Kind::Float) };
                let slope = into.of(logits.copy(), &labels, way).unwrap().unwrap();
                [losses, ranks, slope]
            };
            let [got, want] = [outcome(&Way::Rows(RowByRow::Cpu)), outcome(&Way::Operators(logits.zeros_like()))];
            for (index, (got, want)) in got.iter().zip(&want).enumerate() {
                let (got, want) = (got.nan_to_num(7.0, 0.0, 0.0), want.nan_to_num(7.0, 0.0, 0.0));
                let off = ((&got - &want).abs() - want.abs() * 2e-5).max().double_value(&[]);
                assert!(off < 1e-6, "{vocabulary} tokens, result {index}: off by {off:e}");
            }
        }
        let (logits, values) =
            (Tensor::zeros([2, 5], (Kind::Float, Device::Cpu)), Tensor::zeros([2], (Kind::Float, Device::Cpu)));
        for label in [-1i64, 5] {
            let labels = Tensor::from_slice(&[0, label]);
            let error = crate::shim::hard_losses([&logits, &labels, &values, &values], true).unwrap_err().to_string();
            assert!(error.contains(&label.to_string()), "{error}");
        }
    }

    #[test]
    fn hits_count_ranks_and_ties_are_misses() {
        let head = Head::plain(Tensor::eye(7, (Kind::Float, Device::Cpu)));
        let input = Tensor::from_slice2(&[[7f32, 6., 5., 4., 3., 2., 1.]; 7]);
        let labels = Tensor::arange(7, (Kind::Int64, Device::Cpu));
        let hits = |input: &Tensor| {
            let rows = Rows { input, targets: Hard(&labels), weights: None };
            let losses = cross_entropy(rows, &mut Projection { head: &head, gradient: None }, None, 3).unwrap();
            [losses.top1, losses.top5]
                .map(|hits| Vec::<bool>::try_from(hits).unwrap().iter().filter(|&&hit| hit).count())
        };
        assert_eq!(hits(&input), [1, 5]);
        assert_eq!(hits(&input.zeros_like()), [0, 0]);
        assert_eq!(hits(&(input * f64::NAN)), [0, 0]);
    }
}
