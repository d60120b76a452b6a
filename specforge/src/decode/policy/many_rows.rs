//! Classic rejection at many nodes at once, where their rows are: the same chances and the same distributions as
//! [`super::couple`] one node after the other, but a device hears of all of them together, and one token a node comes back in
//! place of rows of a vocabulary.
//!
//! Shape legend: `R` nodes, `C` guesses of the node that has the most, `V` vocabulary.

use tch::{Kind, Tensor};

use super::{COUPLING, DrawnFrom};
use crate::device;
use crate::error::Result;
use crate::nn::noise::{self, Place};
use crate::nn::sampling::NO_NUMBERS;

/// A node and what is guessed behind it.
#[derive(Debug)]
pub struct Node<'a> {
    /// Seed and position of its chances.
    pub place: Place,
    /// Tokens of its children, in the order in which they are tried.
    pub guesses: Vec<u32>,
    /// What they were drawn from; `None` where they were picked.
    pub drawn_from: Option<&'a DrawnFrom>,
}

/// The tokens that are chosen behind nodes, from their processed `rows [R, V]` in float64: `[R]` int64, [`NO_NUMBERS`] where a
/// row holds NaN. Guesses are below `V`.
pub fn couple(rows: &Tensor, nodes: &[Node<'_>]) -> Result<Tensor> {
    let device = rows.device();
    let (count, size) = rows.size2()?;
    let mut target = rows.softmax(-1, Kind::Double); // [R, V]
    let broken = target.narrow(1, 0, 1).squeeze_dim(1).isnan(); // [R]
    let most = nodes.iter().map(|node| node.guesses.len()).max().unwrap_or(0);
    let slots = |node: &Node<'_>| {
        let guesses: Vec<i64> = node.guesses.iter().map(|&guess| i64::from(guess)).collect();
        guesses.into_iter().chain(std::iter::repeat(-1)).take(most).collect::<Vec<_>>()
    };
    let guesses = device::upload(&nodes.iter().flat_map(slots).collect::<Vec<_>>(), device)?.view([count, most as i64]);
    let drawn: Vec<i64> = nodes.iter().map(|node| i64::from(node.drawn_from.is_some())).collect();
    let drawn = device::upload(&drawn, device)?.to_kind(Kind::Bool); // [R]
    let nothing = Tensor::f_zeros([size], (Kind::Double, device))?;
    let origins: Vec<&Tensor> = nodes.iter().map(|node| node.drawn_from.map_or(&nothing, AsRef::as_ref)).collect();
    let mut draft = Tensor::f_stack(&origins, 0)?.f_to_device(device)?; // [R, V]

    let keys = noise::position_keys(COUPLING, &nodes.iter().map(|node| node.place).collect::<Vec<_>>(), device); // [R]
    let mut taken = keys.zeros_like(); // chances that were taken
    let mut chosen = keys.zeros_like();
    let mut done = drawn.zeros_like();
    let column = |values: &Tensor| values.unsqueeze(1);
    let normalised = |weights: Tensor, which: &Tensor| {
        let sum = weights.sum_dim_intlist([-1i64].as_slice(), false, Kind::Double); // [R]
        let divisor = sum.where_self(&which.logical_and(&sum.gt(0.0)), &sum.ones_like());
        weights / column(&divisor)
    };
    for slot in 0..most as i64 {
        let guess = guesses.select(1, slot); // [R]
        let tried = guess.ge(0).logical_and(&done.logical_not());
        let place = column(&guess.clamp_min(0)); // [R, 1]
        let at_guess = |weights: &Tensor| weights.gather(1, &place, false).squeeze_dim(1); // [R]
        let (wanted, offered) = (at_guess(&target), at_guess(&draft));
        // Where a guess was offered with probability zero, no chance is taken.
        let asked = tried.logical_and(&drawn.logical_not().logical_or(&offered.gt(0.0)));
        taken += asked.to_kind(Kind::Int64);
        let share = (&wanted / &offered).where_self(&drawn, &wanted);
        let accepted = asked.logical_and(&noise::uniforms(&keys, &taken).lt_tensor(&share));
        chosen = guess.where_self(&accepted, &chosen);
        done = done.logical_or(&accepted);
        // What is left of both distributions after a guess that failed.
        let failed = tried.logical_and(&accepted.logical_not());
        let (failed_draw, failed_pick) = (failed.logical_and(&drawn), failed.logical_and(&drawn.logical_not()));
        let left = (&target - &draft).clamp_min(0.0);
        let some = left.gt(0.0).any_dim(1, false).logical_and(&failed_draw);
        target = left.where_self(&column(&some), &target);
        let without = |weights: &Tensor, which: &Tensor| {
            let value = at_guess(weights);
            weights.scatter(1, &place, &column(&value.zeros_like().where_self(which, &value)))
        };
        target = normalised(without(&target, &failed_pick), &failed);
        draft = normalised(without(&draft, &failed_draw), &failed_draw);
    }
    // The others draw from what is left: the first token at which the running sum passes the chance.
    let chance =
        noise::uniforms(&keys, &(taken + 1i64)) * target.sum_dim_intlist([-1i64].as_slice(), false, Kind::Double);
    let passed = target.cumsum(-1, Kind::Double).le_tensor(&column(&chance)).sum_dim_intlist(
        [-1i64].as_slice(),
        false,
        Kind::Int64,
    );
    let tokens = Tensor::f_arange(size, (Kind::Int64, device))?;
    let last = (tokens * target.gt(0.0)).amax([-1i64].as_slice(), false); // [R]
    let chosen = chosen.where_self(&done, &passed.minimum(&last));
    Ok(chosen.masked_fill(&broken, NO_NUMBERS))
}
