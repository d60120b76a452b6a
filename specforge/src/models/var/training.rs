//! What training a transformer takes beside its forward pass: where its parameters begin, and what is minimised.

use tch::{Device, Kind, Reduction, Tensor};

use super::config::VarConfig;
use crate::error::{Error, Result};
use crate::nn::noise;

/// What the head's weights are multiplied with at first.
const HEAD: f64 = 0.02;
/// What scales and shifts of the adaptive norms are multiplied with at first.
const ADAPTIVE: f64 = 0.5;
/// What their gammas are multiplied with: blocks begin as next to nothing.
const GAMMA: f64 = 1e-5;
/// Temperature of a head at first.
const TEMPERATURE: f64 = 4.0;

/// Parameters of a model that was never trained, under their original names and in float32, from keyed noise (`init_weights`,
/// FoundationVision/VAR @78b9539, `models/var.py:236-286`; its normal distribution is cut at two, far outside what is drawn).
pub fn fresh(config: &VarConfig, seed: u64) -> Vec<(String, Tensor)> {
    let deviation = (1.0 / config.embed_dim as f64 / 3.0).sqrt();
    let tensor = |(number, (name, shape)): (usize, (String, Vec<i64>))| {
        let drawn = |deviation: f64| noise::normal(&shape, deviation, seed, number as u64 + 1);
        let value = if name.ends_with("bias") {
            Tensor::zeros(&shape, (Kind::Float, Device::Cpu))
        } else if name.ends_with("scale_mul_1H11") {
            Tensor::full(&shape, TEMPERATURE.ln(), (Kind::Float, Device::Cpu))
        } else if name == "head.weight" {
            drawn(deviation * HEAD)
        } else if name.ends_with("ada_gss") {
            gammas_first(&drawn((config.embed_dim as f64).powf(-0.5)), 2, 2)
        } else if name.ends_with("proj.weight") || name.ends_with("fc2.weight") {
            drawn(deviation / (2.0 * config.depth as f64).sqrt())
        } else if name.starts_with("blocks.") && name.ends_with("ada_lin.1.weight") {
            gammas_first(&drawn(deviation), 0, 2 * config.embed_dim)
        } else if name.starts_with("head_nm.") {
            drawn(deviation * ADAPTIVE)
        } else {
            drawn(deviation)
        };
        (name, value)
    };
    config.tensors().into_iter().enumerate().map(tensor).collect()
}

/// Numbers of adaptive norms, of which the first so many along an axis are gammas.
fn gammas_first(drawn: &Tensor, axis: i64, gammas: i64) -> Tensor {
    let size = drawn.size()[axis as usize];
    let (first, rest) = (drawn.narrow(axis, 0, gammas) * GAMMA, drawn.narrow(axis, gammas, size - gammas) * ADAPTIVE);
    Tensor::cat(&[first, rest], axis)
}

/// Weight of each token's loss, `[L]` float64, from one for each scale; they sum to 1.
///
/// Exact speculation keeps whole scales alone, so a position of a small scale that is first in line is worth more than one of a
/// large scale that is seldom reached.
pub fn token_weights(config: &VarConfig, by_scale: &[f64]) -> Result<Tensor> {
    let fits = by_scale.len() == config.scales() && by_scale.iter().all(|weight| weight.is_finite() && *weight >= 0.0);
    let each: Vec<f64> = config.levels().iter().filter_map(|&level| by_scale.get(level as usize)).copied().collect();
    let sum: f64 = each.iter().sum();
    if !fits || sum <= 0.0 {
        let scales = config.scales();
        return Err(Error::config(
            "draft.scale_weights",
            format!("expected {scales} numbers of at least 0, got {by_scale:?}"),
        ));
    }
    Ok(Tensor::from_slice(&each) / sum)
}

/// Cross-entropy of logits `[B, L, V]` and true tokens `[B, L]`, of each token: `[B, L]`.
pub fn cross_entropies(logits: &Tensor, tokens: &Tensor) -> Result<Tensor> {
    let (_, _, vocabulary) = logits.size3()?;
    let (rows, labels) = (logits.f_reshape([-1, vocabulary])?, tokens.f_reshape([-1])?);
    let each = rows.f_cross_entropy_loss(&labels, None::<&Tensor>, Reduction::None, -100, 0.0)?;
    Ok(each.f_view_as(tokens)?)
}

/// `KL(target, draft)` in nats of logits `[B, L, V]` of both, of each token: `[B, L]`. Gradients reach the draft alone.
pub fn divergences(draft: &Tensor, target: &Tensor) -> Result<Tensor> {
    let target = target.detach().log_softmax(-1, draft.kind());
    let draft = draft.f_log_softmax(-1, draft.kind())?;
    Ok((target.exp() * (&target - draft)).f_sum_dim_intlist([-1i64].as_slice(), false, target.kind())?)
}

/// Mean over images of the weighted sum over tokens: `each [B, L]`, `weights [L]`.
pub fn weighted(each: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let weights = weights.to_device(each.device()).to_kind(each.kind());
    Ok((each * weights).f_sum_dim_intlist([1i64].as_slice(), false, each.kind())?.f_mean(None::<Kind>)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::var::{Var, tiny};

    #[test]
    fn a_fresh_model_is_that_of_the_reference() {
        for shared_aln in [false, true] {
            let config = VarConfig { embed_dim: 64, shared_aln, ..tiny::config() };
            let tensors = fresh(&config, 3);
            assert!(tensors.iter().map(|(name, _)| name).eq(config.tensors().iter().map(|(name, _)| name)));
            let of = |name: &str| tensors.iter().find(|(known, _)| known == name).map(|(_, tensor)| tensor);
            let deviation = |tensor: &Tensor| tensor.std(true).double_value(&[]);
            let base = (1.0f64 / 64.0 / 3.0).sqrt();
            for (name, want) in [
                ("blocks.0.ffn.fc1.weight", base),
                ("blocks.1.ffn.fc2.weight", base / 2.0),
                ("head.weight", base * 0.02),
            ] {
                let got = deviation(of(name).unwrap());
                assert!((got / want - 1.0).abs() < 0.05, "{name}: {got}, {want}");
            }
            let (name, axis, gammas) =
                if shared_aln { ("blocks.0.ada_gss", 2, 2) } else { ("blocks.0.ada_lin.1.weight", 0, 128) };
            let adaptive = of(name).unwrap();
            assert!(deviation(&adaptive.narrow(axis, 0, gammas)) < 1e-5);
            assert!(deviation(&adaptive.narrow(axis, gammas, 1)) > 1e-3);
            assert_eq!(of("blocks.1.attn.q_bias").unwrap().abs().max().double_value(&[]), 0.0);
            let scale = of("blocks.1.attn.scale_mul_1H11").unwrap().double_value(&[0, 0, 0, 0]);
            assert!((scale - 4f64.ln()).abs() < 1e-6);
        }
    }

    #[test]
    fn losses_are_weighted_by_scale() {
        let config = tiny::config();
        let weights = token_weights(&config, &[4.0, 1.0, 0.0]).unwrap();
        assert_eq!(Vec::<f64>::try_from(weights.narrow(0, 0, 6)).unwrap(), [0.5, 0.125, 0.125, 0.125, 0.125, 0.0]);
        for wrong in [&[1.0, 1.0][..], &[0.0, 0.0, 0.0], &[1.0, f64::NAN, 1.0], &[1.0, -1.0, 1.0]] {
            assert!(token_weights(&config, wrong).is_err());
        }
        let random = |stream| noise::normal(&[2, 14, 5], 1.0, 1, stream).to_kind(Kind::Double);
        let (draft, target) = (random(1), random(2));
        let tokens = Tensor::ones([2, 14], (Kind::Int64, Device::Cpu));
        let entropy = -draft.log_softmax(-1, Kind::Double).select(2, 1); // [2, 14]
        let want = (entropy.select(1, 0) * 0.5
            + entropy.narrow(1, 1, 4).sum_dim_intlist([1i64].as_slice(), false, Kind::Double) * 0.125)
            .mean(Kind::Double);
        let got = weighted(&cross_entropies(&draft, &tokens).unwrap(), &weights).unwrap();
        assert!((got - want).abs().double_value(&[]) < 1e-12);
        let diverges =
            |draft: &Tensor| weighted(&divergences(draft, &target).unwrap(), &weights).unwrap().double_value(&[]);
        assert!(diverges(&target).abs() < 1e-12 && diverges(&draft) > 0.1);
    }

    /// A draft that follows its target's distribution agrees with it more and more often.
    #[test]
    fn a_draft_learns_from_its_target() {
        let config = tiny::config();
        let target = tiny::model(&config, 3);
        let mut leaves = Vec::new();
        let smaller = VarConfig { depth: 1, ..config.clone() };
        let values = fresh(&smaller, 4);
        let draft = Var::build(smaller, &mut |name, _| {
            let (_, value) = values.iter().find(|(known, _)| known == name).unwrap();
            let leaf = value.to_kind(Kind::Double).set_requires_grad(true);
            leaves.push(leaf.shallow_clone());
            Ok(leaf)
        });
        let draft = draft.unwrap();
        let labels = Tensor::from_slice(&[1i64, 2, 3, 4, 5, 6]);
        let inputs = noise::normal(&[6, 13, 8], 1.0, 5, 5).to_kind(Kind::Double);
        let wanted = tch::no_grad(|| target.forward(&labels, &inputs)).unwrap();
        let weights = token_weights(&config, &[1.0, 1.0, 1.0]).unwrap();
        let agreement = |logits: &Tensor| {
            logits
                .argmax(-1, false)
                .eq_tensor(&wanted.argmax(-1, false))
                .to_kind(Kind::Double)
                .mean(Kind::Double)
                .double_value(&[])
        };
        let (mut first, mut last) = (None, (0.0, 0.0));
        for _ in 0..60 {
            let logits = draft.forward(&labels, &inputs).unwrap();
            let loss = weighted(&divergences(&logits, &wanted).unwrap(), &weights).unwrap();
            last = (loss.double_value(&[]), agreement(&logits));
            first.get_or_insert(last);
            loss.backward();
            tch::no_grad(|| {
                for leaf in &mut leaves {
                    let mut gradient = leaf.grad();
                    let norm = gradient.norm().double_value(&[]).max(1e-6);
                    let _ = leaf.f_sub_(&(&gradient * (0.3 / norm.max(1.0)))).unwrap();
                    let _ = gradient.zero_();
                }
            });
        }
        let first = first.unwrap();
        assert!(last.0 < 0.7 * first.0 && last.1 > first.1, "{first:?} {last:?}");
    }
}
