//! Mixed precision on the CPU: products of float32 matrices from bfloat16 factors.
//!
//! A processor with AVX512_BF16 or AMX multiplies bfloat16 two times and more as fast as float32. Numbers of 8 significant bits
//! are enough for activations and slopes, if sums are added up and weights kept in float32 (Micikevicius et al. 2018, "Mixed
//! Precision Training"; Kalamkar et al. 2019, "A Study of BFLOAT16 for Deep Learning Training").

use std::cell::Cell;
use std::marker::PhantomData;

use tch::{Device, Kind, Tensor};

use crate::shim::{self, Mixed};

thread_local! {
    static NOW: Cell<Mixed> = const { Cell::new(Mixed { forward: false, backward: false }) };
}

/// While it lives, what this thread multiplies with [`super::trained_linear`], [`super::gated_linear`] and
/// [`super::add_product`] in float32 on the CPU is in mixed precision, forwards and backwards.
#[derive(Debug)]
pub struct MixedPrecision {
    before: Mixed,
    /// Of one thread.
    stays: PhantomData<*const ()>,
}

impl MixedPrecision {
    /// Begins it, or keeps everything in float32.
    pub fn begin(wanted: bool) -> Self {
        Self::of(Mixed { forward: wanted, backward: wanted })
    }

    /// Leaves gradients as they are, and keeps outputs in float32.
    pub(super) fn backward_alone() -> Self {
        Self::of(Mixed { forward: false, ..NOW.get() })
    }

    fn of(mixed: Mixed) -> Self {
        Self { before: NOW.replace(mixed), stays: PhantomData }
    }

    /// Why it would be of no use for weights like this one on this machine.
    pub fn obstacle(weight: &Tensor) -> Option<&'static str> {
        match (weight.device(), weight.kind()) {
            (Device::Cpu, Kind::Float) if shim::bfloat16_pays() => None,
            (Device::Cpu, Kind::Float) => Some("this processor multiplies bfloat16 no faster than float32"),
            (Device::Cpu, _) => Some("the draft is not in float32"),
            _ => Some("it is for a CPU; on a GPU target.dtype = bfloat16 does the same"),
        }
    }

    pub(super) fn now() -> Mixed {
        NOW.get()
    }
}

impl Drop for MixedPrecision {
    fn drop(&mut self) {
        NOW.set(self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::super::drawn::Drawn;
    use super::super::{Head, add_product, gated_linear, trained_linear};
    use super::*;

    /// The product's and all gradients of `3 rows -> gate, up -> down`, with a slope that is no constant.
    fn layer(mixed: bool) -> Vec<Tensor> {
        let drawn = Drawn::of(5);
        let draw = |shape: &[i64]| drawn.normal(shape).to_kind(Kind::Float).set_requires_grad(true);
        let (input, gate, up, down) = (draw(&[70, 48]), draw(&[96, 48]), draw(&[96, 48]), draw(&[32, 96]));
        let slope = drawn.normal(&[70, 32]).to_kind(Kind::Float);
        let output = {
            let _guard = MixedPrecision::begin(mixed);
            let wide = [&gate, &up].map(|weight| trained_linear(&input, weight).unwrap());
            gated_linear(&wide[0], &wide[1], &down).unwrap()
        };
        // The way back remembers how its product was made.
        let gradients =
            Tensor::run_backward(&[(&output * slope).sum(Kind::Float)], &[&input, &gate, &up, &down], false, false);
        [output.detach()].into_iter().chain(gradients).collect()
    }

    fn distance(one: &Tensor, other: &Tensor) -> f64 {
        ((one - other).norm() / other.norm()).double_value(&[])
    }

    #[test]
    fn products_are_those_of_float32_but_for_rounding() {
        if let Some(why) = MixedPrecision::obstacle(&Tensor::zeros([1], (Kind::Float, Device::Cpu))) {
            eprintln!("SKIPPED mixed precision: {why}");
            return;
        }
        for (place, (mixed, exact)) in layer(true).iter().zip(&layer(false)).enumerate() {
            assert_eq!((mixed.kind(), mixed.size()), (Kind::Float, exact.size()));
            let distance = distance(mixed, exact);
            // Eight significant bits: 0.2 % of a number, of several roundings.
            assert!((1e-4..1e-2).contains(&distance), "{place}: {distance}");
        }
    }

    #[test]
    fn outside_of_it_nothing_is_rounded() {
        let before = layer(false);
        {
            let _outer = MixedPrecision::begin(true);
            let _inner = MixedPrecision::begin(false);
            assert_eq!(MixedPrecision::now(), Mixed::default());
        }
        assert_eq!(MixedPrecision::now(), Mixed::default());
        std::thread::scope(|scope| {
            let _guard = MixedPrecision::begin(true);
            scope.spawn(|| assert_eq!(MixedPrecision::now(), Mixed::default(), "another thread's"));
        });
        for (before, after) in before.iter().zip(&layer(false)) {
            assert!(before.equal(after));
        }
    }

    /// Logits are those of float32, their gradients are not.
    #[test]
    fn a_vocabularys_projection_is_mixed_on_the_way_back_alone() {
        let drawn = Drawn::of(7);
        let rows = drawn.normal(&[40, 48]).to_kind(Kind::Float).set_requires_grad(true);
        let head = Head::plain(drawn.normal(&[96, 48]).to_kind(Kind::Float));
        let slope = drawn.normal(&[40, 96]).to_kind(Kind::Float);
        let [exact, mixed] = [false, true].map(|wanted| {
            let _guard = MixedPrecision::begin(wanted && shim::bfloat16_pays());
            let logits = head.logits(&rows);
            let gradient = Tensor::run_backward(&[(&logits * &slope).sum(Kind::Float)], &[&rows], false, false);
            (logits.detach(), gradient.into_iter().next().unwrap())
        });
        assert!(mixed.0.equal(&exact.0));
        assert_eq!(shim::bfloat16_pays(), (1e-4..1e-2).contains(&distance(&mixed.1, &exact.1)));
    }

    #[test]
    fn sums_of_gradients_are_those_of_float32_but_for_rounding() {
        let drawn = Drawn::of(8);
        let [left, right] = [[24, 70], [70, 48]].map(|shape| drawn.normal(&shape).to_kind(Kind::Float));
        let start = drawn.normal(&[24, 48]).to_kind(Kind::Float);
        let [exact, mixed] = [false, true].map(|wanted| {
            let _guard = MixedPrecision::begin(wanted && shim::bfloat16_pays());
            let mut total = start.copy();
            tch::no_grad(|| add_product(&mut total, &left, &right, 0.25)).unwrap();
            total
        });
        assert!(exact.allclose(&(&start + left.matmul(&right) * 0.25), 1e-5, 1e-5, false));
        assert_eq!(shim::bfloat16_pays(), (1e-4..1e-2).contains(&distance(&mixed, &exact)));
    }

    #[test]
    fn what_is_not_float32_on_the_cpu_stays_as_it_is() {
        let _guard = MixedPrecision::begin(true);
        let drawn = Drawn::of(6);
        let (input, weight) = (drawn.normal(&[5, 8]), drawn.normal(&[4, 8]));
        assert!(trained_linear(&input, &weight).unwrap().allclose(
            &input.matmul(&weight.transpose(0, 1)),
            1e-12,
            1e-12,
            false
        ));
        assert!(MixedPrecision::obstacle(&weight).is_some_and(|why| why.contains("not in float32")));
        let none = Tensor::zeros([0, 8], (Kind::Float, Device::Cpu));
        assert_eq!(trained_linear(&none, &weight.to_kind(Kind::Float)).unwrap().size(), [0, 4]);
    }
}
