//! Loss of many rows against the target's distribution, chunk by chunk.
//!
//! Rows that learn from the same target position stand together, so that the target's full vocabulary is computed once
//! for all steps that need it. A chunk computes the teacher, the draft's logits, loss, hits, acceptance and gradients in
//! one go and forgets everything: nothing of size rows x vocabulary outlives it.
//!
//! With `z` the target's logits, `S` the draft's vocabulary, `q` the draft's distribution on `S`:
//! `p = softmax(z)` is the target's own distribution, `p_S = softmax(z on S)` the one a draft can reach, and
//! `alpha = sum over S of min(p, q)` the probability that a sampled token of the draft is accepted.
//!
//! | loss | value | source |
//! |---|---|---|
//! | `cross_entropy` | `- sum p_S log q` | SafeAILab/EAGLE `cb7e084`, SpecForge `a6b6b02` |
//! | `kl` | `sum p_S (log p_S - log q)`: the same gradient, 0 at best | vllm-project/speculators `c05b95b` |
//! | `reverse_kl` | `sum q (log q - log p_S)` | the same |
//! | `total_variation` | `1 - alpha`, the total variation distance of `p` and `q` | the same, on `p_S` |
//! | `lk_alpha` | `- log alpha` | SpecForge `core/lk_loss.py` |
//! | `lk_lambda` | `w cross_entropy + (1 - w) (1 - alpha)`, `w = lk_scale exp(-lk_decay alpha)` held fixed | the same |
//!
//! A row whose most likely target token is outside `S` carries no loss, and counts as a miss. [`compound`] does the same for
//! any other loss.
//!
//! Shape legend: `M` rows, `U` target positions, `m`, `u` those of a chunk, `H` hidden size of the draft, `TH` of the
//! target, `V` vocabulary of the target, `DV` of the draft.

use tch::{Device, Kind, Tensor};

use super::loss::{Projection, Rows, project};
pub use super::objective::{DistillationLoss, DraftVocabulary, Objective, Weighting};
use super::row_losses::RowByRow;
use crate::device;
use crate::error::Result;
use crate::nn::{Head, add_product, trained_linear};

pub mod compound;
pub mod memory;

pub use compound::{CompoundObjective, distill_compound};
pub use memory::{Remembered, TeacherMemory};

/// What rows learn from.
#[derive(Debug)]
pub struct Teacher<'a> {
    /// `[U, TH]` normed hidden states of the target.
    pub hidden: &'a Tensor,
    /// Its vocabulary projection, whose matrix is `[V, TH]`.
    pub head: &'a Head,
    /// `[DV]` the target id of each draft id, and `[V]` the draft id of each target id or -1; `None` for the target's
    /// whole vocabulary.
    pub vocabulary: Option<&'a DraftVocabulary>,
}

/// Which target position each row learns from, in an order that brings rows of one position together. Made on the host.
#[derive(Debug)]
pub struct Order {
    /// `[M]` places of the rows, by position.
    permutation: Tensor,
    /// `[M]` where each row went.
    inverse: Tensor,
    /// `[U']` the positions that are used, ascending.
    positions: Tensor,
    /// `[M]` place of each sorted row's position among them.
    teachers: Tensor,
    /// Rows of each used position.
    counts: Vec<i64>,
}

impl Order {
    /// Sorts rows by `positions`, the target position of each.
    pub fn new(positions: &[i64], device: Device) -> Result<Self> {
        let mut permutation: Vec<usize> = (0..positions.len()).collect();
        permutation.sort_by_key(|&row| positions[row]); // stable: equal positions keep their order
        let (mut used, mut counts): (Vec<i64>, Vec<i64>) = (Vec::new(), Vec::new());
        let mut numbers = vec![0; 3 * positions.len()];
        for (place, &row) in permutation.iter().enumerate() {
            if used.last() != Some(&positions[row]) {
                used.push(positions[row]);
                counts.push(0);
            }
            let last = used.len() - 1;
            counts[last] += 1;
            numbers[place] = row as i64;
            numbers[positions.len() + row] = place as i64;
            numbers[2 * positions.len() + place] = last as i64;
        }
        numbers.extend(&used);
        let numbers = device::upload(&numbers, device)?;
        let rows = positions.len() as i64;
        let part = |index: i64| numbers.narrow(0, index * rows, rows);
        let positions = numbers.narrow(0, 3 * rows, used.len() as i64);
        Ok(Self { permutation: part(0), inverse: part(1), positions, teachers: part(2), counts })
    }

    /// Consecutive positions with their rows, as (first position, positions, first row, rows).
    fn chunks(&self, positions_per_chunk: i64) -> Vec<[i64; 4]> {
        let (mut position, mut row) = (0, 0);
        let chunks = self.counts.chunks(positions_per_chunk.max(1) as usize).map(|counts| {
            let (positions, rows) = (counts.len() as i64, counts.iter().sum());
            let chunk = [position, positions, row, rows];
            position += positions;
            row += rows;
            chunk
        });
        chunks.collect()
    }
}

/// What rows learn from when they learn from distributions.
#[derive(Debug, Clone, Copy)]
pub struct Soft<'a> {
    /// The target position of each row.
    pub order: &'a Order,
    /// The distributions at those positions.
    pub teacher: &'a Teacher<'a>,
    /// What of them need not be made again.
    pub remembered: Option<&'a Remembered<'a>>,
}

/// What is left of the rows after the last chunk, in the rows' own order.
#[derive(Debug)]
pub struct RowOutcomes {
    /// `[M]` float losses, 0 for rows without a loss.
    pub losses: Tensor,
    /// `[M]` booleans: the draft's most likely token is the target's. Ties count as misses.
    pub hits: Tensor,
    /// `[M]` acceptance, `alpha`.
    pub acceptance: Tensor,
    /// `[M]` booleans: the target's most likely token is in the draft's vocabulary.
    pub covered: Tensor,
    /// Sum of weighted losses, a float64 scalar.
    pub objective: Tensor,
    /// `[M, H]` gradient of the objective, times the lift, where it was asked for.
    pub input_gradient: Option<Tensor>,
}

/// Target positions of a chunk whose logits, with those of `steps` rows each, take at most `bytes`.
pub fn positions_per_chunk(bytes: usize, steps: usize, vocabulary: i64, draft_vocabulary: i64) -> i64 {
    (bytes as i64 / (4 * (vocabulary + 2 * steps as i64 * draft_vocabulary))).max(1)
}

/// Loss, metrics and gradients of rows.
///
/// Without a weighting, only values are computed: losses, hits and acceptance of each row, from which weights of a second
/// call may follow. The projection's gradient is added to where it has a place for one.
pub fn distill(
    rows: Rows<'_, Soft<'_>>,
    projection: &mut Projection<'_>,
    objective: Objective,
    weighting: Option<&Weighting>,
) -> Result<RowOutcomes> {
    let _guard = tch::no_grad_guard();
    let (input, Soft { order, teacher, remembered }) = (rows.input, rows.targets);
    let head = projection.head;
    let weight = head.weight.detach(); // [DV, H]
    let sorted = input.index_select(0, &order.permutation); // [M, H]
    let arrange = |values: &Tensor| values.index_select(0, &order.permutation);
    let lift = weighting.map_or(1.0, |weighting| weighting.lift);
    let weights = weighting.map(|_| match rows.weights {
        Some(weights) => arrange(&weights.detach()) * lift,
        None => Tensor::full([input.size()[0]], lift, (wide(input.kind()), input.device())),
    }); // [M]
    let parity = weighting.and_then(|weighting| weighting.parity.as_ref());
    let parity = parity.map(|[factors, means]| [arrange(factors) * lift, arrange(means)]);
    let kind = wide(input.kind());
    // Room for what stays, made first: between the large pieces of two chunks it would keep the heap from closing.
    let count = input.size()[0];
    let room = |kind: Kind| Tensor::f_zeros([count], (kind, input.device()));
    let (losses, acceptance, hits, covered) = (room(kind)?, room(kind)?, room(Kind::Bool)?, room(Kind::Bool)?); // [M]
    let gradient = weights.as_ref().map(|_| sorted.f_zeros_like()).transpose()?; // [M, H]
    let row_by_row = RowByRow::of(kind, input.device());
    let with_entropy = objective.loss == DistillationLoss::Kl;
    let mut sum = Tensor::zeros([], (Kind::Double, input.device()));
    for [first_position, positions, first_row, length] in order.chunks(objective.positions_per_chunk) {
        let taught = order.positions.narrow(0, first_position, positions); // [u]
        let rows_of = |values: &Tensor| values.narrow(0, first_row, length);
        let chunk = rows_of(&sorted); // [m, H]
        let own = rows_of(&order.teachers) - first_position; // [m]
        let logits = head.finish(project(&chunk, &weight)?); // [m, DV]
        // The logits' memory may be taken for their slope below.
        let bend = weights.as_ref().and_then(|_| head.derivative(&logits));
        let weights = weights.as_ref().map(rows_of); // [m]
        let parity = parity.as_ref().map(|values| [0, 1].map(|at| rows_of(&values[at])));
        let into = [&losses, &acceptance, &hits, &covered].map(rows_of);
        let (part_sum, slope) = if let Some(row_by_row) = row_by_row {
            let target = match remembered {
                Some(remembered) => {
                    let hidden = teacher.hidden.f_index_select(0, &taught)?; // [u, TH]
                    remembered.predictions(row_by_row, &hidden, (first_position, positions), with_entropy)?
                }
                None => row_by_row.teacher(teacher.logits(&taught)?, teacher.vocabulary, with_entropy)?,
            };
            // What bends the slope is multiplied before anything is rounded.
            let slope_kind = if bend.is_some() { kind } else { chunk.kind() };
            target.score(logits, &own, objective, (weights, parity), into, slope_kind)?
        } else {
            let target = TargetChunk::new(teacher.logits(&taught)?, teacher.vocabulary);
            let part = Chunk::new(&logits, &target, &own, objective);
            for (place, values) in into.iter().zip([&part.losses, &part.acceptance, &part.hits, &part.covered]) {
                place.shallow_clone().f_copy_(values)?;
            }
            match &weights {
                None => (None, None),
                Some(weights) => {
                    let (sum, slope) = part.weighted(&target, &own, objective, weights, parity);
                    (Some(sum), Some(slope))
                }
            }
        };
        let (Some(part_sum), Some(slope), Some(gradient)) = (part_sum, slope, &gradient) else { continue };
        sum += part_sum;
        let slope = bend.map_or_else(|| slope.shallow_clone(), |bend| &slope * bend);
        let slope = slope.to_kind(chunk.kind()); // [m, DV]
        rows_of(gradient).f_copy_(&trained_linear(&slope, &weight.transpose(0, 1))?)?;
        if let Some(total) = projection.gradient.as_deref_mut() {
            add_product(total, &slope.transpose(0, 1), &chunk, lift.recip())?;
        }
    }
    let arranged = |values: Tensor| values.index_select(0, &order.inverse);
    let losses = arranged(losses);
    let objective = match (weighting, rows.weights) {
        (Some(_), _) => sum / lift,
        (None, Some(weights)) => (&losses * weights).sum(Kind::Double),
        (None, None) => losses.sum(Kind::Double),
    };
    Ok(RowOutcomes {
        losses,
        hits: arranged(hits),
        acceptance: arranged(acceptance),
        covered: arranged(covered),
        objective,
        input_gradient: gradient.map(arranged),
    })
}

/// The element type of sums: float64 stays float64, for exact tests.
fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

/// The target's predictions at some positions. What rows of one position need alike is made once, for the position.
struct TargetChunk {
    /// `[u, DV]` logarithm of `p_S`.
    log_reachable: Tensor,
    /// `[u, DV]` `p_S`.
    reachable: Tensor,
    /// `[u, 1]` logarithm of the target's own probability of `S`: `log p = log p_S + log_mass`.
    log_mass: Tensor,
    /// `[u]` the most likely token as a draft id, -1 where the draft cannot name it.
    top: Tensor,
}

impl Teacher<'_> {
    /// Logits at some positions, `[u, V]`, in float32 at least.
    fn logits(&self, positions: &Tensor) -> Result<Tensor> {
        let product = project(&self.hidden.index_select(0, positions), &self.head.weight)?; // [u, V]
        let logits = self.head.finish(product);
        Ok(logits.to_kind(wide(logits.kind())))
    }
}

impl TargetChunk {
    fn new(logits: Tensor, vocabulary: Option<&DraftVocabulary>) -> Self {
        let top = logits.argmax(-1, false); // [u]
        let all = logits.logsumexp([-1], true); // [u, 1]
        let Some(vocabulary) = vocabulary else {
            let (log_mass, log_reachable) = (all.zeros_like(), logits - all);
            return Self { reachable: log_reachable.exp(), log_reachable, log_mass, top };
        };
        let mut reachable = logits.index_select(1, &vocabulary.target_ids); // [u, DV]
        let own = reachable.logsumexp([-1], true); // [u, 1]
        let log_mass = &own - all;
        let top = vocabulary.draft_ids.index_select(0, &top);
        let log_reachable = reachable.g_sub_(&own);
        Self { reachable: log_reachable.exp(), log_reachable, log_mass, top }
    }
}

/// Rows of a chunk: their values, `[m]` each, and what the gradient is made of. Every line with `[m, DV]` is a pass over the
/// chunk's largest memory, so there are as few as operators allow.
struct Chunk {
    losses: Tensor,
    hits: Tensor,
    acceptance: Tensor,
    covered: Tensor,
    /// `[m, DV]` log q
    log_draft: Tensor,
    /// `[m, DV]` q
    draft: Tensor,
    /// `[m, DV]` p_S
    target: Tensor,
    /// `[m]` cross-entropy
    cross_entropy: Tensor,
}

impl Chunk {
    /// Values of the rows. `own [m]` says which of the target's positions each row learns from.
    fn new(logits: &Tensor, target: &TargetChunk, own: &Tensor, objective: Objective) -> Self {
        let kind = wide(logits.kind());
        let logits = logits.to_kind(kind);
        let top = target.top.index_select(0, own).unsqueeze(1); // [m, 1]
        let covered = top.ge(0).squeeze_dim(1); // [m]
        let own_logit = logits.gather(1, &top.clamp_min(0), false); // [m, 1]
        let rank = logits.ge_tensor(&own_logit).sum_dim_intlist([-1i64].as_slice(), false, Kind::Float); // [m]
        let hits = rank.eq(1.0).logical_and(&covered);
        let log_draft = logits.log_softmax(-1, kind); // [m, DV]
        let draft = log_draft.exp(); // [m, DV]
        let own_target = target.reachable.index_select(0, own); // [m, DV]
        let sum = |values: Tensor| values.sum_dim_intlist([-1i64].as_slice(), false, kind); // [m]
        let reached = (&target.reachable * target.log_mass.exp()).index_select(0, own); // [m, DV] p on S
        let acceptance = sum(reached.minimum(&draft)); // [m]
        // Sums of products without the products.
        let dot = |left: &Tensor, right: &Tensor| left.unsqueeze(1).bmm(&right.unsqueeze(2)).view([-1]); // [m]
        let cross_entropy = -dot(&own_target, &log_draft);
        let losses = match objective.loss {
            DistillationLoss::CrossEntropy => cross_entropy.shallow_clone(),
            DistillationLoss::Kl => &cross_entropy + dot(&target.reachable, &target.log_reachable).index_select(0, own),
            DistillationLoss::ReverseKl => dot(&draft, &(&log_draft - target.log_reachable.index_select(0, own))),
            DistillationLoss::TotalVariation => 1.0 - &acceptance,
            DistillationLoss::LkAlpha => -acceptance.log(),
            DistillationLoss::LkLambda => {
                let share = lambda_share(objective, &acceptance);
                &share * &cross_entropy + (1.0 - &share) * (1.0 - &acceptance)
            }
        };
        // No acceptance at all has no logarithm, and a row without a loss must not spread what it has instead.
        let kept = match objective.loss {
            DistillationLoss::LkAlpha => covered.logical_and(&acceptance.gt(0.0)),
            _ => covered.shallow_clone(),
        };
        let losses = losses.where_self(&kept, &losses.zeros_like());
        Self { losses, hits, acceptance, covered, log_draft, draft, target: own_target, cross_entropy }
    }

    /// Sum of the weighted losses, and its gradient with respect to the logits, `[m, DV]`. Takes the memory of the rows.
    fn weighted(
        mut self,
        target: &TargetChunk,
        own: &Tensor,
        objective: Objective,
        weights: &Tensor,
        parity: Option<[Tensor; 2]>,
    ) -> (Tensor, Tensor) {
        let covered = self.covered.to_kind(self.draft.kind());
        let weights = weights * &covered; // [m]
        let column = |values: &Tensor| values.unsqueeze(1); // [m, 1]
        let log_target = || target.log_reachable.index_select(0, own); // [m, DV]
        let (log_draft, draft) = (&self.log_draft, &self.draft);
        // Gradient of alpha: q_j (m_j - sum of m q), where m_j says that q_j is the smaller one.
        let of_acceptance = |factor: &Tensor| {
            let log_mass = target.log_mass.index_select(0, own);
            let smaller = draft * log_draft.lt_tensor(&(log_target() + log_mass)); // [m, DV]
            let sum = smaller.sum_dim_intlist([-1i64].as_slice(), true, draft.kind()); // [m, 1]
            (smaller - draft * sum).g_mul_(&column(factor))
        };
        let of_cross_entropy = |factor: &Tensor| (draft - &self.target).g_mul_(&column(factor));
        let weighted_sum = |values: &Tensor| (values * &weights).sum(Kind::Double);
        match (objective.loss, parity) {
            (DistillationLoss::CrossEntropy | DistillationLoss::Kl, _) => {
                let sum = weighted_sum(&self.losses);
                (sum, self.draft.g_sub_(&self.target).g_mul_(&weights.unsqueeze(1)))
            }
            (DistillationLoss::ReverseKl, _) => {
                let slope = draft * (log_draft - log_target() - column(&self.losses)) * column(&weights);
                (weighted_sum(&self.losses), slope)
            }
            (DistillationLoss::TotalVariation, _) => (weighted_sum(&self.losses), of_acceptance(&-&weights)),
            (DistillationLoss::LkAlpha, parity) => {
                let weights = parity.map_or(weights.shallow_clone(), |[weights, _]| weights * &covered);
                let factor = -(&weights / &self.acceptance).nan_to_num(0.0, 0.0, 0.0);
                let sum = (&self.losses * &weights).sum(Kind::Double);
                (sum, of_acceptance(&factor))
            }
            (DistillationLoss::LkLambda, None) => {
                let share = lambda_share(objective, &self.acceptance);
                let slope = of_cross_entropy(&(&weights * &share)) - of_acceptance(&(&weights * (1.0 - &share)));
                (weighted_sum(&self.losses), slope)
            }
            (DistillationLoss::LkLambda, Some([own_weights, acceptance])) => {
                let share = lambda_share(objective, &acceptance);
                let (left, right) = (&weights * &share, own_weights * (1.0 - &share) * &covered);
                let sum: Tensor = &left * &self.cross_entropy + &right * (1.0 - &self.acceptance);
                (sum.sum(Kind::Double), of_cross_entropy(&left) - of_acceptance(&right))
            }
        }
    }
}

/// Weight of the cross-entropy in `lk_lambda`.
fn lambda_share(objective: Objective, acceptance: &Tensor) -> Tensor {
    let (scale, decay) = objective.lambda;
    (acceptance * -decay).exp() * scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::drawn;
    use crate::vocab::VocabMap;

    /// Every loss, with a smaller vocabulary and without, with weights and divided as SpecForge does: row by row in float32
    /// as by operators in float64.
    #[test]
    fn row_by_row_equals_operators() {
        drawn::seed(12);
        let options = (Kind::Double, Device::Cpu);
        let positions = [4i64, 0, 2, 2, 4, 4, 1, 0, 5, 2, 3];
        let (rows, size, hidden) = (positions.len() as i64, 71, 7);
        let random = |shape: &[i64], size: f64| (drawn::randn(shape, options) * size).to_kind(Kind::Float);
        let (states, head) = (random(&[6, 9], 1.5), random(&[size, 9], 1.0));
        // Position 5 is sure of one token, as far as float32 goes.
        states.narrow(0, 5, 1).copy_(&(head.narrow(0, 3, 1) * 40.0));
        let map = VocabMap::new((0..size).step_by(2).collect(), size).unwrap();
        let map = DraftVocabulary::new(&map, Device::Cpu).unwrap();
        let order = Order::new(&positions, Device::Cpu).unwrap();
        let spread = |stream: i64| Tensor::arange(rows, options) * 0.1 + stream;
        let losses = [
            DistillationLoss::CrossEntropy,
            DistillationLoss::Kl,
            DistillationLoss::ReverseKl,
            DistillationLoss::TotalVariation,
            DistillationLoss::LkAlpha,
            DistillationLoss::LkLambda,
        ];
        for (vocabulary, parity, loss) in [None, Some(&map)]
            .into_iter()
            .flat_map(|map| [false, true].map(|parity| (map, parity)))
            .flat_map(|(map, parity)| losses.map(|loss| (map, parity, loss)))
        {
            let draft_size = vocabulary.map_or(size, |_| (size + 1) / 2);
            let (input, weight) = (random(&[rows, hidden], 1.0), random(&[draft_size, hidden], 1.0));
            let outcomes = |kind: Kind, weighting: bool| {
                let cast = |tensor: &Tensor| tensor.to_kind(kind);
                let (states, input) = (cast(&states), cast(&input));
                let [head, draft_head] = [&head, &weight].map(|weight| Head::plain(cast(weight)));
                let teacher = Teacher { hidden: &states, head: &head, vocabulary };
                let weights = cast(&spread(1));
                let parity = parity.then(|| [cast(&spread(2)), cast(&(spread(0) * 0.5))]);
                let mut total = Tensor::zeros([draft_size, hidden], (kind, Device::Cpu));
                let mut projection = Projection { head: &draft_head, gradient: Some(&mut total) };
                let rows = Rows {
                    input: &input,
                    targets: Soft { order: &order, teacher: &teacher, remembered: None },
                    weights: Some(&weights),
                };
                let objective = Objective { loss, lambda: (0.9, 2.0), positions_per_chunk: 2 };
                let weighting = weighting.then_some(Weighting { parity, lift: 4.0 });
                let outcomes = distill(rows, &mut projection, objective, weighting.as_ref()).unwrap();
                let RowOutcomes { losses, hits, acceptance, covered, objective, input_gradient } = outcomes;
                let all = [losses, hits, acceptance, covered, objective, total].into_iter().chain(input_gradient);
                all.map(|tensor| tensor.to_kind(Kind::Double)).collect::<Vec<_>>()
            };
            for weighting in [false, true] {
                let (got, want) = (outcomes(Kind::Float, weighting), outcomes(Kind::Double, weighting));
                assert_eq!((got.len(), want.len()), (6 + usize::from(weighting), 6 + usize::from(weighting)));
                for (index, (got, want)) in got.iter().zip(&want).enumerate() {
                    let size = want.abs().max().double_value(&[]).max(1.0);
                    let off = (got - want).abs().max().double_value(&[]) / size;
                    let mapped = vocabulary.is_some();
                    assert!(off < 2e-5, "{loss:?}, smaller {mapped}, {parity}, {weighting}: {index} off by {off:e}");
                }
            }
        }
    }
}
