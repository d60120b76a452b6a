//! Whether losses row by row, which on a GPU are kernels of our own, are those of libtorch's operators: every loss, with a
//! smaller vocabulary and without, values alone and gradients.
//!
//! The operators compute in float64 on the same device, so that what differs is the kernels' rounding. In 16 bits, whose
//! slopes the kernels round themselves, the CPU's row by row is the measure.

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::parity::{Comparison, distance, largest_difference};
use super::programs::{Place, all_on_host};
use crate::cuda_kernels;
use crate::draft::distillation::{
    DistillationLoss, DraftVocabulary, Objective, Order, RowOutcomes, Soft, Teacher, Weighting, distill,
};
use crate::draft::loss::{Hard, Projection, RowLosses, Rows, Scale, cross_entropy};
use crate::error::Result;
use crate::nn::{Head, noise};
use crate::vocab::VocabMap;

/// Largest difference in float32, as a share of the largest value.
pub const FLOAT32_LIMIT: f64 = 1e-5;
/// Distance in 16 bits, as a share of the length: slopes and products that were rounded to the other side.
const SIXTEEN_BITS_LIMIT: f64 = 2e-3;

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KernelCheck {
    /// For which architecture the kernels were compiled, or why there are none.
    pub state: String,
    /// The kernels against the operators, or what stands in for them.
    pub checks: Vec<Comparison>,
}

/// All losses, in the order of their enum.
const LOSSES: [(DistillationLoss, &str); 6] = [
    (DistillationLoss::CrossEntropy, "cross-entropy"),
    (DistillationLoss::Kl, "KL"),
    (DistillationLoss::ReverseKl, "reverse KL"),
    (DistillationLoss::TotalVariation, "total variation"),
    (DistillationLoss::LkAlpha, "LK alpha"),
    (DistillationLoss::LkLambda, "LK lambda"),
];

/// Sizes of the vocabularies, the target's and the draft's: no multiple of a warp or a block, and larger than a block.
const SMALL: (i64, i64) = (1201, 607);
const LARGE: (i64, i64) = (128_003, 32_001);
/// Rows by the target position that each learns from.
const POSITIONS: [i64; 14] = [4, 0, 2, 2, 4, 4, 1, 0, 5, 2, 3, 6, 6, 1];
/// A position, and a row, whose numbers are none where a check asks for it.
const NO_POSITION: i64 = 6;
const NO_ROW: i64 = 9;
const HIDDEN: i64 = 24;

/// Compares on a device; `quick` takes the small vocabularies.
pub fn check(device: Device, quick: bool) -> Result<KernelCheck> {
    let state = match cuda_kernels::describe(device) {
        Ok(compiled) => compiled,
        Err(_) if device == Device::Cpu => "the CPU's own, in C++".to_owned(),
        Err(reason) => format!("none, so that these are libtorch's operators: {reason}"),
    };
    let sizes = if quick { SMALL } else { LARGE };
    let mut checks = hard(device, sizes)?;
    for (loss, name) in LOSSES {
        for (smaller, of) in [(false, ""), (true, ", smaller vocabulary")] {
            let case = Case { loss, sizes, smaller, parity: false };
            checks.extend(compare(&format!("{name}{of}"), device, &|place, none| case.run(place, none))?);
        }
    }
    for (loss, name) in &LOSSES[4..] {
        let case = Case { loss: *loss, sizes, smaller: true, parity: true };
        let name = format!("{name}, smaller vocabulary, divided as SpecForge does");
        checks.extend(compare(&name, device, &|place, none| case.run(place, none))?);
    }
    Ok(KernelCheck { state, checks })
}

/// Random numbers with no more digits than bfloat16 has, in the type of a place.
fn random(shape: &[i64], size: f64, stream: u64, place: Place) -> Result<Tensor> {
    let values = noise::normal(shape, size, 33, stream).f_to_kind(Kind::BFloat16)?;
    Ok(values.f_to_kind(place.kind)?.f_to_device(place.device)?)
}

/// One line for each group of results: values, and gradients where there are some. In 16 bits, gradients alone.
fn lines(name: &str, kind: Kind, [got, want]: [&[Vec<Tensor>; 2]; 2]) -> Vec<Comparison> {
    let (limit, error): (f64, fn(&Tensor, &Tensor) -> f64) = match kind {
        Kind::Float => (FLOAT32_LIMIT, largest_difference),
        _ => (SIXTEEN_BITS_LIMIT, distance),
    };
    let mut lines = Vec::new();
    for (index, part) in ["values", "gradients"].iter().enumerate() {
        // NaN is a result like any other, and has to be where it is expected.
        let worst = got[index].iter().zip(&want[index]).map(|(got, want)| {
            let misplaced = got.isnan().ne_tensor(&want.isnan()).any().int64_value(&[]) != 0;
            let filled = |values: &Tensor| values.nan_to_num(0.0, f64::INFINITY, f64::NEG_INFINITY);
            if misplaced { f64::INFINITY } else { error(&filled(got), &filled(want)) }
        });
        let worst = worst.fold(0.0, |worst: f64, error| if error <= worst { worst } else { error });
        let whole = got[index].len() == want[index].len() && !got[index].is_empty();
        let worst = if whole { worst } else { f64::INFINITY };
        let check = format!("{name}: {part}");
        lines.push(Comparison { kind: kind_name(kind), ..Comparison::new(check, kind, worst, limit) });
    }
    lines
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    }
}

/// What kinds are compared on a device, and where their measure is computed.
fn kinds(device: Device) -> [(Kind, Place); 3] {
    let measure = |kind: Kind, device: Device| Place { device, kind };
    [
        (Kind::Float, measure(Kind::Double, device)),
        (Kind::BFloat16, measure(Kind::BFloat16, Device::Cpu)),
        (Kind::Half, measure(Kind::Half, Device::Cpu)),
    ]
}

/// Runs something on a device and where it is measured, with numbers alone and with some that are none.
fn compare(
    name: &str,
    device: Device,
    run: &dyn Fn(Place, bool) -> Result<[Vec<Tensor>; 2]>,
) -> Result<Vec<Comparison>> {
    let mut checks = Vec::new();
    for (kind, measure) in kinds(device) {
        for (with_none, more) in [(false, ""), (true, ", with NaN")] {
            let [got, want] = [run(Place { device, kind }, with_none)?, run(measure, with_none)?];
            // What is no number in a loss is refused by that; its gradient is anything.
            let parts = if with_none { 1 } else { 2 };
            checks.extend(lines(&format!("{name}{more}"), kind, [&got, &want]).into_iter().take(parts));
        }
    }
    Ok(checks)
}

/// Cross-entropy with labels, first and last tokens among them.
fn hard(device: Device, (size, _): (i64, i64)) -> Result<Vec<Comparison>> {
    let rows = POSITIONS.len() as i64;
    let run = |place: Place, with_none: bool| -> Result<[Vec<Tensor>; 2]> {
        let input = random(&[rows, HIDDEN], 1.0, 1, place)?;
        if with_none {
            let _ = input.f_narrow(0, NO_ROW, 1)?.f_fill_(f64::NAN)?;
        }
        let head = Head::plain(random(&[size, HIDDEN], 0.7, 2, place)?);
        let labels: Vec<i64> = (0..rows).map(|row| row * (size - 1) / (rows - 1)).collect();
        let labels = Tensor::from_slice(&labels).f_to_device(place.device)?;
        let weights = random(&[rows], 1.0, 3, place)?;
        let wide = if place.kind == Kind::Double { Kind::Double } else { Kind::Float };
        let mut total = Tensor::f_zeros([size, HIDDEN], (wide, place.device))?;
        let mut projection = Projection { head: &head, gradient: Some(&mut total) };
        let rows = Rows { input: &input, targets: Hard(&labels), weights: Some(&weights) };
        let scale = Some(Scale { factor: 0.3, lift: 4.0 });
        let losses = cross_entropy(rows, &mut projection, scale, 5)?;
        let RowLosses { sum, objective, losses, top1, top5, input_gradient } = losses;
        // One row that is none is in every element of the projection's gradient.
        let total = (!with_none).then_some(total);
        let gradients: Vec<Tensor> = input_gradient.into_iter().chain(total).collect();
        Ok([all_on_host(&[losses, top1, top5, sum, objective])?, all_on_host(&gradients)?])
    };
    compare("one label a row", device, &run)
}

/// One way to learn from a distribution.
struct Case {
    loss: DistillationLoss,
    sizes: (i64, i64),
    /// Whether the draft's vocabulary is smaller: some positions then have no likeliest token in it.
    smaller: bool,
    parity: bool,
}

impl Case {
    /// Values of all rows, with weights and without, and gradients.
    fn run(&self, place: Place, with_none: bool) -> Result<[Vec<Tensor>; 2]> {
        let (size, own) = self.sizes;
        let own = if self.smaller { own } else { size };
        let map = VocabMap::new((0..own).map(|token| token * (size - 1) / (own - 1)).collect(), size)?;
        let map = DraftVocabulary::new(&map, place.device)?;
        let positions = POSITIONS.iter().max().map_or(0, |most| most + 1);
        let target_head = Head::plain(random(&[size, HIDDEN], 1.0, 4, place)?);
        let states = random(&[positions, HIDDEN], 0.7, 5, place)?;
        // Sure of one token as far as float32 goes.
        states.f_narrow(0, 5, 1)?.f_copy_(&(target_head.weight.f_narrow(0, 3, 1)? * 40.0))?;
        let teacher = Teacher { hidden: &states, head: &target_head, vocabulary: self.smaller.then_some(&map) };
        let order = Order::new(&POSITIONS, place.device)?;
        let rows = POSITIONS.len() as i64;
        let input = random(&[rows, HIDDEN], 0.7, 6, place)?;
        if with_none {
            let _ = states.f_narrow(0, NO_POSITION, 1)?.f_fill_(f64::NAN)?;
            let _ = input.f_narrow(0, NO_ROW, 1)?.f_fill_(f64::NAN)?;
        }
        let head = Head::plain(random(&[own, HIDDEN], 0.7, 7, place)?);
        let wide = if place.kind == Kind::Double { Kind::Double } else { Kind::Float };
        let spread = |first: f64| {
            let values = Tensor::f_arange(rows, (wide, place.device))?;
            Ok::<_, crate::error::Error>(values * 0.1 + first)
        };
        let weights = spread(0.5)?;
        let parity = match self.parity {
            true => Some([spread(1.0)?, spread(0.0)? * 0.5]),
            false => None,
        };
        let mut total = Tensor::f_zeros([own, HIDDEN], (wide, place.device))?;
        let rows = Rows {
            input: &input,
            targets: Soft { order: &order, teacher: &teacher, remembered: None },
            weights: Some(&weights),
        };
        let objective = Objective { loss: self.loss, lambda: (0.9, 2.0), positions_per_chunk: 3 };
        let mut values = Vec::new();
        let mut gradients = Vec::new();
        for weighting in [None, Some(Weighting { parity, lift: 4.0 })] {
            let mut projection = Projection { head: &head, gradient: Some(&mut total) };
            let outcomes = distill(rows, &mut projection, objective, weighting.as_ref())?;
            let RowOutcomes { losses, hits, acceptance, covered, objective, input_gradient } = outcomes;
            values.extend([losses, hits, acceptance, covered, objective]);
            gradients.extend(input_gradient);
        }
        if !with_none {
            gradients.push(total);
        }
        Ok([all_on_host(&values)?, all_on_host(&gradients)?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_agrees_with_the_operators_and_a_wrong_number_does_not() {
        let check = check(Device::Cpu, true).unwrap();
        let failed: Vec<_> = check.checks.iter().filter(|row| !row.passed).collect();
        assert!(failed.is_empty() && check.checks.len() == 3 * 3 * 15, "{failed:#?}");
        let tensor = |values: &[f64]| Tensor::from_slice(values);
        let want = [vec![tensor(&[1.0, f64::NAN])], vec![tensor(&[2.0])]];
        for (values, passes) in [
            ([1.0, f64::NAN], true),
            ([1.0 + 2e-5, f64::NAN], false),
            ([1.0, 0.0], false),
            ([f64::NAN, f64::NAN], false),
        ] {
            let got = [vec![tensor(&values)], vec![tensor(&[2.0])]];
            assert_eq!(lines("t", Kind::Float, [&got, &want])[0].passed, passes, "{values:?}");
        }
        assert!(!lines("t", Kind::Float, [&[vec![], vec![]], &want])[0].passed);
    }
}
