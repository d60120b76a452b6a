//! Rows against the target's distribution with any loss of [`super::super::losses`], by libtorch's autograd.
//!
//! The chunks are those of [`super::distill`], and so are the rules: rows of one target position stand together, and a row
//! whose right token the draft cannot name carries no loss. In a chunk, the graph reaches from the losses to the product
//! with the projection, a leaf; the two products behind it are made by hand, as there. Losses compare with the target's
//! distribution on the draft's vocabulary, `p_S`; the acceptance that is handed back is that of `p`.
//!
//! Shape legend: as [`super`].

use tch::{Kind, Tensor};

use super::{RowOutcomes, Soft, wide};
use crate::draft::loss::{Projection, Rows, project};
use crate::draft::losses::{self, Compound};
use crate::error::Result;
use crate::nn::{add_product, trained_linear};

/// What rows lose.
#[derive(Debug, Clone, Copy)]
pub struct CompoundObjective<'a> {
    /// Loss of a row.
    pub loss: &'a Compound,
    /// `[M]` the right tokens, as the target counts its vocabulary; without them, the target's most likely ones.
    pub tokens: Option<&'a Tensor>,
    /// Target positions of a chunk.
    pub positions_per_chunk: i64,
}

/// Loss, metrics and gradients of rows. With a lift, gradients are made, all of them larger by it (see `draft::lift`), and
/// the projection's is added to where it has a place for one. [`RowOutcomes::covered`] says which rows have a loss.
pub fn distill_compound(
    rows: Rows<'_, Soft<'_>>,
    projection: &mut Projection<'_>,
    objective: CompoundObjective<'_>,
    lift: Option<f64>,
) -> Result<RowOutcomes> {
    let (input, Soft { order, teacher, .. }) = (rows.input.detach(), rows.targets);
    let head = projection.head;
    let weight = head.weight.detach(); // [DV, H]
    let arrange = |values: &Tensor| values.detach().index_select(0, &order.permutation);
    let sorted = arrange(&input); // [M, H]
    let kind = wide(input.kind());
    let count = input.size()[0];
    let weights = match rows.weights {
        Some(weights) => arrange(weights),
        None => Tensor::f_ones([count], (kind, input.device()))?,
    }; // [M]
    let tokens = objective.tokens.map(arrange); // [M]
    let room = |kind: Kind| Tensor::f_zeros([count], (kind, input.device()));
    let (losses, acceptance, hits, covered) = (room(kind)?, room(kind)?, room(Kind::Bool)?, room(Kind::Bool)?); // [M]
    let gradient = lift.map(|_| sorted.f_zeros_like()).transpose()?; // [M, H]
    for [first_position, positions, first_row, length] in order.chunks(objective.positions_per_chunk) {
        let rows_of = |values: &Tensor| values.narrow(0, first_row, length);
        let own = rows_of(&order.teachers) - first_position; // [m]
        let chunk = rows_of(&sorted); // [m, H]
        let product = project(&chunk, &weight)?.detach().set_requires_grad(lift.is_some()); // [m, DV]
        let logits = head.finish(product.shallow_clone()); // [m, DV]
        let target =
            Target::new(&teacher.logits(&order.positions.narrow(0, first_position, positions))?, &own, teacher);
        let labels = match &tokens {
            None => target.likeliest.shallow_clone(),
            Some(tokens) => teacher.named(&rows_of(tokens)),
        }; // [m], -1 for what the draft cannot name
        let kept = labels.ge(0);
        let scored = losses::Rows::new(&logits, Some(&target.logits), &labels.clamp_min(0))?;
        let values = objective.loss.of_rows(&scored, None)?;
        let values = values.where_self(&kept, &values.zeros_like()); // [m]
        let (right, overlap) = tch::no_grad(|| target.compare(&logits.detach()));
        let own_losses = values.detach();
        for (place, values) in [(&losses, &own_losses), (&acceptance, &overlap), (&hits, &right), (&covered, &kept)] {
            rows_of(place).f_copy_(values)?;
        }
        let (Some(lift), Some(gradient)) = (lift, &gradient) else { continue };
        let sum = (values * rows_of(&weights) * lift).sum(kind);
        for slope in Tensor::f_run_backward(&[sum], &[&product], false, false)? {
            let slope = slope.to_kind(chunk.kind()); // [m, DV]
            rows_of(gradient).f_copy_(&trained_linear(&slope, &weight.transpose(0, 1))?)?;
            if let Some(total) = projection.gradient.as_deref_mut() {
                add_product(total, &slope.transpose(0, 1), &chunk, lift.recip())?;
            }
        }
    }
    let objective = (&losses * &weights).sum(Kind::Double);
    let arranged = |values: Tensor| values.index_select(0, &order.inverse);
    Ok(RowOutcomes {
        losses: arranged(losses),
        hits: arranged(hits),
        acceptance: arranged(acceptance),
        covered: arranged(covered),
        objective,
        input_gradient: gradient.map(arranged),
    })
}

impl super::Teacher<'_> {
    /// Tokens of the target's vocabulary, `[m]`, as the draft counts its own: -1 for what it cannot name.
    fn named(&self, tokens: &Tensor) -> Tensor {
        match self.vocabulary {
            None => tokens.shallow_clone(),
            Some(own) => own.draft_ids.index_select(0, tokens),
        }
    }
}

/// What the target predicts for the rows of a chunk.
struct Target {
    /// `[m, DV]` logits of the tokens that the draft can name.
    logits: Tensor,
    /// `[m, 1]` logarithm of the sum over the whole vocabulary.
    sum: Tensor,
    /// `[m]` the most likely token as a draft id, -1 where the draft cannot name it.
    likeliest: Tensor,
}

impl Target {
    /// Logits of positions, `[u, V]`, for the rows that learn from them, `own [m]`.
    fn new(logits: &Tensor, own: &Tensor, teacher: &super::Teacher<'_>) -> Self {
        let likeliest = teacher.named(&logits.argmax(-1, false)).index_select(0, own);
        let sum = logits.logsumexp([-1i64].as_slice(), true).index_select(0, own);
        let logits = match teacher.vocabulary {
            None => logits.index_select(0, own),
            Some(vocabulary) => logits.index_select(1, &vocabulary.target_ids).index_select(0, own),
        };
        Self { logits, sum, likeliest }
    }

    /// Whether the likeliest token of each row's logits `[m, DV]` is the target's, `[m]`, and its acceptance, `[m]`.
    fn compare(&self, logits: &Tensor) -> (Tensor, Tensor) {
        let kind = logits.kind();
        let own = logits.gather(1, &self.likeliest.clamp_min(0).unsqueeze(1), false); // [m, 1]
        let rank = logits.ge_tensor(&own).sum_dim_intlist([-1i64].as_slice(), false, Kind::Float); // [m]
        let right = rank.eq(1.0).logical_and(&self.likeliest.ge(0));
        let reached = (&self.logits - &self.sum).exp(); // [m, DV] p on S
        let overlap = logits.softmax(-1, kind).minimum(&reached).sum_dim_intlist([-1i64].as_slice(), false, kind);
        (right, overlap)
    }
}

#[cfg(test)]
mod tests;
