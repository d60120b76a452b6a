//! When a drafted scale is kept, and what stands in its place where it is not. Every rule decides a whole scale at once.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::sampling::ScaleSampling;
use crate::error::Result;
use crate::nn::noise;

/// First noise domain of the chances by which [`Rule::Maximal`] keeps tokens, one a scale.
const CHANCES: u64 = 96;
/// First noise domain of what [`Rule::Maximal`] puts in the place of others, one a scale.
const REPLACEMENTS: u64 = 128;

/// When a drafted scale is kept.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// Where it is what the target chooses with the same noise: maps are those of the target alone, to the token.
    #[default]
    Exact,
    /// Where no position is rejected, each with its own chance `1 - p / q`; rejected ones are drawn anew from what the draft
    /// had too little of. Maps follow the target's distribution, and are others than those of the target alone.
    Maximal,
    /// Where at least this share of positions is what the target chooses (SDVAR's rule, at 0.5). Lossy.
    MatchRate(f64),
    /// Where every token is among so many of the target's most likely ones. Lossy.
    TopK(usize),
    /// Where the draft's distribution, before filters and at temperature 1, is at most so far from the target's: mean over
    /// positions of `KL(target, draft)`, in nats. Lossy.
    Divergence(f64),
}

impl Rule {
    /// Whether what is decoded is the target's: its own maps, or its own distribution.
    pub fn is_lossless(self) -> bool {
        matches!(self, Rule::Exact | Rule::Maximal)
    }

    /// Refuses values that mean nothing.
    pub fn check(self) -> Result<(), String> {
        match self {
            Rule::MatchRate(share) if !(0.0..=1.0).contains(&share) => {
                Err(format!("match rate: expected from 0 to 1, got {share}"))
            }
            Rule::TopK(0) => Err("top-k: expected 1 or more, got 0".to_owned()),
            Rule::Divergence(most) if !(most.is_finite() && most >= 0.0) => {
                Err(format!("divergence: expected 0 or more, got {most}"))
            }
            _ => Ok(()),
        }
    }
}

/// What a model says of a scale.
#[derive(Debug)]
pub(super) struct Said {
    /// Logits with guidance, `[B, T, V]`.
    pub(super) mixed: Tensor,
    /// The same with what is ruled out.
    pub(super) filtered: Tensor,
    /// Weight that guidance had.
    pub(super) weight: f64,
}

impl Said {
    pub(super) fn new(sampling: &ScaleSampling, (mixed, weight): (Tensor, f64)) -> Self {
        let filtered = sampling.filtered(&mixed);
        Self { mixed, filtered, weight }
    }
}

/// What becomes of a drafted scale.
#[derive(Debug)]
pub(super) struct Verdict {
    /// The map that is committed, `[B, T]`.
    pub(super) map: Tensor,
    /// Whether it is the draft's, so that the scales drafted behind it may stand.
    pub(super) is_kept: bool,
    /// Positions where the rule agrees with the draft, of `B * T`.
    pub(super) agreed: i64,
}

/// Judges the map `[B, T]` that a draft chose from what it said. `images` key the noise.
pub(super) fn judge(
    rule: Rule,
    sampling: &ScaleSampling,
    (scale, images): (usize, &[u64]),
    target: &Said,
    (draft, drafted): (&Said, &Tensor),
) -> Result<Verdict> {
    if rule == Rule::Maximal {
        return maximal(sampling, (scale, images), target, (draft, drafted));
    }
    let own = sampling.choice(&target.filtered, scale, images)?; // [B, T]
    let agreed = i64::try_from(own.f_eq_tensor(drafted)?.f_sum(Kind::Int64)?)?;
    let positions = own.numel() as i64;
    let is_kept = match rule {
        Rule::Exact | Rule::Maximal => agreed == positions,
        Rule::MatchRate(share) => agreed as f64 >= share * positions as f64,
        Rule::TopK(count) => {
            let logit = target.mixed.f_gather(-1, &drafted.unsqueeze(-1), false)?; // [B, T, 1]
            let above = target.mixed.f_gt_tensor(&logit)?.f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Int64)?;
            bool::try_from(above.f_lt(count as i64)?.f_all()?)?
        }
        Rule::Divergence(most) => divergence(target, draft)? <= most,
    };
    Ok(Verdict { map: if is_kept { drafted.shallow_clone() } else { own }, is_kept, agreed })
}

/// Mean over positions of `KL(target, draft)` in nats.
fn divergence(target: &Said, draft: &Said) -> Result<f64> {
    let [target, draft] = [target, draft].map(|said| said.mixed.log_softmax(-1, Kind::Double));
    let each = (target.exp() * (&target - draft)).f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Double)?;
    Ok(f64::try_from(each.f_mean(Kind::Double)?)?)
}

/// Speculative sampling of every position by itself (Leviathan et al., arXiv 2211.17192, section 2.3): positions of a scale
/// are independent given the scales before it.
fn maximal(
    sampling: &ScaleSampling,
    (scale, images): (usize, &[u64]),
    target: &Said,
    (draft, drafted): (&Said, &Tensor),
) -> Result<Verdict> {
    let (rows, tokens) = drafted.size2()?;
    let positions = rows * tokens;
    let flat = |said: &Said| sampling.probabilities(&said.filtered).reshape([positions, -1]); // [R, V]
    let (wanted, had) = (flat(target), flat(draft));
    let chosen = drafted.reshape([positions, 1]); // [R, 1]
    let places = sampling.places(images, tokens);
    let keys = noise::position_keys(CHANCES + scale as u64, &places, drafted.device());
    let chances = noise::uniforms(&keys, &keys.zeros_like()); // [R]
    let of = |probabilities: &Tensor| probabilities.f_gather(-1, &chosen, false).map(|one| one.squeeze_dim(1));
    let kept = (chances * of(&had)?).f_lt_tensor(&of(&wanted)?)?; // [R]: u < p / q
    let agreed = i64::try_from(kept.f_sum(Kind::Int64)?)?;
    if agreed == positions {
        return Ok(Verdict { map: drafted.shallow_clone(), is_kept: true, agreed });
    }
    let ids = Tensor::arange(wanted.size2()?.1, (Kind::Int64, drafted.device()));
    let rest = (wanted - had).clamp_min(0.0).log(); // [R, V]; its sum does not matter for a draw
    let anew = (rest + noise::gumbel_rows(REPLACEMENTS + scale as u64, &places, &ids)).argmax(-1, false);
    let map = chosen.squeeze_dim(1).where_self(&kept, &anew).view([rows, tokens]);
    Ok(Verdict { map, is_kept: false, agreed })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(sampling: &ScaleSampling, logits: &[f64], rows: i64) -> Said {
        Said::new(sampling, (Tensor::from_slice(logits).view([1, 1, -1]).repeat([1, rows, 1]), 0.0))
    }

    #[test]
    fn lossy_rules_keep_what_they_say() {
        let sampling = ScaleSampling::default();
        let logits = |favourites: [usize; 4]| {
            let rows: Vec<f64> = favourites
                .iter()
                .flat_map(|&best| (0..3).map(move |token| if token == best { 2.0 } else { -(token as f64) }))
                .collect();
            Said::new(&sampling, (Tensor::from_slice(&rows).view([1, 4, 3]), 0.0))
        };
        let (target, draft) = (logits([0, 1, 2, 0]), logits([0, 1, 2, 1]));
        let drafted = Tensor::from_slice(&[0i64, 1, 2, 1]).view([1, 4]);
        let verdict = |rule| judge(rule, &sampling, (1, &[0]), &target, (&draft, &drafted)).unwrap();
        let kept = |rule| verdict(rule).is_kept;
        assert_eq!([0.75, 0.76].map(|share| kept(Rule::MatchRate(share))), [true, false]);
        assert_eq!([1, 2].map(|count| kept(Rule::TopK(count))), [false, true]);
        assert_eq!([0.1, 5.0].map(|most| kept(Rule::Divergence(most))), [false, true]);
        let exact = verdict(Rule::Exact);
        assert!(!exact.is_kept && exact.agreed == 3);
        assert_eq!(Vec::<i64>::try_from(exact.map.flatten(0, -1)).unwrap(), [0, 1, 2, 0]);
        assert!(verdict(Rule::MatchRate(0.5)).map.equal(&drafted));
    }

    /// Whatever the draft's distribution is, positions follow the target's: chi-square over many of them.
    #[test]
    fn maximal_coupling_follows_the_target() {
        let sampling = ScaleSampling { temperature: 1.0, seed: 11, ..ScaleSampling::default() };
        let rows = 1000;
        let target = said(&sampling, &[0.0, 1.0, 0.5, -1.0, 2.0], rows);
        let draft = said(&sampling, &[1.5, 0.0, 0.5, 0.0, 0.3], rows);
        let mut counts = [0.0; 5];
        let (mut kept, images) = (0, 20u64);
        for image in 0..images {
            let drafted = sampling.choice(&draft.filtered, 3, &[image]).unwrap();
            let verdict = judge(Rule::Maximal, &sampling, (3, &[image]), &target, (&draft, &drafted)).unwrap();
            kept += verdict.agreed;
            for token in Vec::<i64>::try_from(verdict.map.flatten(0, -1)).unwrap() {
                counts[token as usize] += 1.0;
            }
        }
        let of = |said: &Said| Vec::<f64>::try_from(sampling.probabilities(&said.filtered).get(0).get(0)).unwrap();
        let (want, had) = (of(&target), of(&draft));
        let all = (rows as u64 * images) as f64;
        let chi_square: f64 =
            counts.iter().zip(&want).map(|(count, share)| (count - share * all).powi(2) / (share * all)).sum();
        assert!(chi_square < 18.5, "{chi_square}: 18.5 is one in a thousand for 4 degrees of freedom");
        // Positions are kept as often as the two distributions overlap.
        let overlap: f64 = want.iter().zip(&had).map(|(one, other)| one.min(*other)).sum();
        assert!((kept as f64 / all - overlap).abs() < 0.015, "{} of {overlap}", kept as f64 / all);
    }

    #[test]
    fn maximal_coupling_at_temperature_0_is_exact() {
        let sampling = ScaleSampling::default();
        let (target, draft) = (said(&sampling, &[0.0, 1.0, 2.0], 4), said(&sampling, &[0.0, 2.0, 1.0], 4));
        for (token, kept) in [(1, false), (2, true)] {
            let drafted = Tensor::full([1, 4], token, (Kind::Int64, tch::Device::Cpu));
            let said = if kept { &target } else { &draft };
            let verdict = judge(Rule::Maximal, &sampling, (0, &[0]), &target, (said, &drafted)).unwrap();
            assert_eq!(verdict.is_kept, kept);
            assert_eq!(Vec::<i64>::try_from(verdict.map.flatten(0, -1)).unwrap(), [2, 2, 2, 2]);
        }
    }

    #[test]
    fn values_that_mean_nothing_are_refused() {
        for (rule, word) in
            [(Rule::MatchRate(1.5), "match rate"), (Rule::TopK(0), "top-k"), (Rule::Divergence(f64::NAN), "divergence")]
        {
            assert!(rule.check().unwrap_err().starts_with(word));
            assert!(!rule.is_lossless());
        }
        assert!(Rule::Exact.is_lossless() && Rule::Maximal.is_lossless());
    }
}
