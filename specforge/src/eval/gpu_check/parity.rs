//! Whether a device computes what the CPU computes: the same programs on both, in float32 and bfloat16, against the
//! CPU's float32.

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::attention;
use super::programs::{self, Place, Results, Weights};
use crate::draft::Compared;
use crate::error::Result;
use crate::nn::{noise, sampling::Sampling};

/// Largest difference in float32, as a share of the largest value. Orders of summation differ, arithmetic does not.
pub const FLOAT32_LIMIT: f64 = 1e-4;
/// Distance in bfloat16, as a share of the length of what was expected: a few roundings of 2^-9 after one another.
pub const BFLOAT16_LIMIT: f64 = 3e-2;

/// One thing that was compared.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// What.
    pub check: String,
    /// Element type on the device.
    pub kind: &'static str,
    /// How far from the CPU's float32; for checks that must be exact, how many values differ.
    pub error: f64,
    /// Largest error that passes.
    pub limit: f64,
    /// Whether it did. NaN never passes.
    pub passed: bool,
}

impl Comparison {
    pub(super) fn new(check: String, kind: Kind, error: f64, limit: f64) -> Self {
        let kind = if kind == Kind::BFloat16 { "bfloat16" } else { "float32" };
        Self { check, kind, error, limit, passed: error <= limit }
    }
}

/// Runs everything on `device` and compares.
pub fn check(device: Device) -> Result<Vec<Comparison>> {
    check_with(device, &programs::random_weights)
}

/// The same with weights of the caller on the device; the CPU keeps the usual ones.
fn check_with(device: Device, weights: Weights<'_>) -> Result<Vec<Comparison>> {
    let usual: Weights<'_> = &programs::random_weights;
    let host = Place { device: Device::Cpu, kind: Kind::Float };
    let mut comparisons = Vec::new();
    for (label, config) in programs::targets()? {
        let want = programs::forward(&config, usual, host)?;
        for kind in [Kind::Float, Kind::BFloat16] {
            let got = programs::forward(&config, weights, Place { device, kind })?;
            comparisons.extend(compare(label, kind, &got, &want));
        }
    }
    for shape in &attention::SHAPES {
        let want = attention::run(shape, host)?;
        for kind in [Kind::Float, Kind::BFloat16] {
            comparisons.extend(compare(shape.label, kind, &attention::run(shape, Place { device, kind })?, &want));
        }
    }
    let (_, config) = programs::targets()?.swap_remove(0);
    for Compared { label, kinds, section } in programs::drafts() {
        let want = programs::loss(&config, &section, usual, host)?;
        for &kind in kinds {
            let mut got = programs::loss(&config, &section, weights, Place { device, kind })?;
            if kind == Kind::BFloat16 {
                got.retain(|(name, _)| name != "hits"); // rounding decides ties
            }
            comparisons.extend(compare(label, kind, &got, &want));
        }
    }
    let want = programs::optimizer(usual, host)?;
    for kind in [Kind::Float, Kind::BFloat16] {
        let place = Place { device, kind };
        comparisons.extend(compare("AdamW", kind, &programs::optimizer(weights, place)?, &want));
        let exact = |check: &str, different: usize| Comparison::new(check.to_owned(), kind, different as f64, 0.0);
        comparisons.push(exact("AdamW: a step with NaN changes nothing", programs::nan_guard(weights, place)?));
        comparisons.push(exact("checkpoint: saved here, read on the CPU", programs::checkpoint(weights, place)?));
        comparisons.push(exact("sampling: tokens of keyed noise", sampled(place)?));
    }
    Ok(comparisons)
}

/// How many tokens a device samples differently from the same logits.
fn sampled(place: Place) -> Result<usize> {
    let logits = noise::normal(&[64, 307], 2.0, 5, 5).f_to_kind(place.kind)?;
    let keys: Vec<(u64, u64)> = (0..64).map(|row| (row / 8, row % 8)).collect();
    let there = logits.f_to_device(place.device)?;
    let differ = |sampling: Sampling| {
        let choose = |logits| sampling.choose(logits, &keys, |_| Vec::new());
        let pairs = choose(&logits).into_iter().zip(choose(&there));
        pairs.filter(|(here, there)| here != there).count()
    };
    Ok(differ(Sampling::greedy()) + differ(Sampling::keyed(0.8, 13)))
}

/// Compares results by name; each gets the error of its worst tensor.
fn compare(label: &str, kind: Kind, got: &Results, want: &Results) -> Vec<Comparison> {
    let (limit, error): (f64, fn(&Tensor, &Tensor) -> f64) = match kind {
        Kind::BFloat16 => (BFLOAT16_LIMIT, distance),
        _ => (FLOAT32_LIMIT, largest_difference),
    };
    let row = |(name, got): &(String, Vec<Tensor>)| {
        let want = want.iter().find(|(wanted, _)| wanted == name).map_or(&[][..], |(_, want)| want);
        let errors = got.iter().zip(want).map(|(got, want)| match got.size() == want.size() {
            true => error(got, want),
            false => f64::INFINITY,
        });
        let whole = got.len() == want.len() && !want.is_empty();
        Comparison::new(format!("{label}: {name}"), kind, worst(errors, whole), limit)
    };
    got.iter().map(row).collect()
}

/// The largest error; NaN if one is NaN, infinity if something is missing.
fn worst(errors: impl Iterator<Item = f64>, whole: bool) -> f64 {
    let start = if whole { 0.0 } else { f64::INFINITY };
    errors.fold(start, |worst: f64, error| if worst.is_nan() || error.is_nan() { f64::NAN } else { worst.max(error) })
}

/// As a share of the largest value.
pub(super) fn largest_difference(got: &Tensor, want: &Tensor) -> f64 {
    let largest = want.abs().max().double_value(&[]).max(f64::MIN_POSITIVE);
    (got - want).abs().max().double_value(&[]) / largest
}

/// Of the difference, as a share of the length.
pub(super) fn distance(got: &Tensor, want: &Tensor) -> f64 {
    let length = want.norm().double_value(&[]).max(f64::MIN_POSITIVE);
    (got - want).norm().double_value(&[]) / length
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(comparisons: &[Comparison]) -> Vec<&str> {
        comparisons.iter().filter(|row| !row.passed).map(|row| row.check.as_str()).collect()
    }

    #[test]
    fn the_cpu_agrees_with_itself() {
        let comparisons = check(Device::Cpu).unwrap();
        assert_eq!(failed(&comparisons), Vec::<&str>::new(), "{comparisons:#?}");
        // float32 is the very same arithmetic; bfloat16 is not, and near its limit nothing would be left to notice.
        let (float32, bfloat16): (Vec<_>, Vec<_>) = comparisons.iter().partition(|row| row.kind == "float32");
        assert!(float32.iter().all(|row| row.error == 0.0), "{float32:#?}");
        let rounded = |row: &&&Comparison| row.limit > 0.0 && row.check != "AdamW: moments";
        assert!(bfloat16.iter().filter(rounded).all(|row| row.error > 1e-5 && row.error < 0.02), "{bfloat16:#?}");
    }

    /// One element of one weight is off, and everything behind it is reported.
    #[test]
    fn a_wrong_weight_is_noticed() {
        let off = |wrong: &'static str, by: f64| {
            move |name: &str, shape: &[i64]| {
                let values = programs::random_weights(name, shape);
                if name == wrong {
                    let mut element = values.view([-1]).get(3);
                    let _ = element.g_add_scalar_(by);
                }
                values
            }
        };
        let comparisons = check_with(Device::Cpu, &off("model.layers.1.mlp.down_proj.weight", 0.05)).unwrap();
        let failed_here = failed(&comparisons);
        for check in ["grouped heads: logits, ragged cache", "biases: hidden states, 40 documents"] {
            assert!(failed_here.contains(&check), "{check} {failed_here:?}");
        }
        assert!(failed_here.contains(&"own projections: gradients"), "{failed_here:?}");
        let comparisons = check_with(Device::Cpu, &off("draft.1.0.linear.bias", 0.5)).unwrap();
        let failed_here = failed(&comparisons);
        assert!(failed_here.contains(&"own projections: loss"), "{failed_here:?}");
        assert!(failed_here.iter().all(|check| check.contains("projection")), "{failed_here:?}");
        let comparisons = check_with(Device::Cpu, &off("draft.midlayer.self_attn.k_proj.weight", 0.5)).unwrap();
        let failed_here = failed(&comparisons);
        for check in ["EAGLE-3: loss", "EAGLE-3: gradients", "EAGLE-3, own vocabulary: gradients"] {
            assert!(failed_here.contains(&check), "{check} {failed_here:?}");
        }
        // P-EAGLE has tensors of that name too.
        assert!(failed_here.iter().all(|check| check.contains("EAGLE")), "{failed_here:?}");
    }

    #[test]
    fn nan_missing_and_misshapen_results_fail() {
        let tensor = |values: &[f64]| Tensor::from_slice(values);
        let results = |values: Vec<Tensor>| vec![("x".to_owned(), values)];
        let want = results(vec![tensor(&[1.0, 2.0]), tensor(&[3.0])]);
        for (values, passes) in [
            (vec![tensor(&[1.0, 2.0]), tensor(&[3.0])], true),
            (vec![tensor(&[1.0, f64::NAN]), tensor(&[3.0])], false),
            (vec![tensor(&[f64::NAN, 2.0]), tensor(&[9.0])], false),
            (vec![tensor(&[1.0, 2.0])], false),
            (vec![tensor(&[1.0]), tensor(&[3.0])], false),
        ] {
            for kind in [Kind::Float, Kind::BFloat16] {
                assert_eq!(
                    compare("t", kind, &results(values.iter().map(Tensor::copy).collect()), &want)[0].passed,
                    passes
                );
            }
        }
        assert!(!compare("t", Kind::Float, &want, &vec![])[0].passed);
    }
}
