//! `y = x W^T + b`.

use tch::{Device, Kind, Tensor};

use super::mixed_precision::MixedPrecision;
use crate::error::Result;
use crate::shim;

/// Most rows of the kernel for few.
const FEW: i64 = 32;

/// A linear layer in PyTorch's layout.
#[derive(Debug)]
pub struct Linear {
    /// `[out, in]`
    pub weight: Tensor,
    /// `[out]`
    pub bias: Option<Tensor>,
}

impl Linear {
    /// Both tensors, for [`linear_each`].
    pub fn parts(&self) -> (&Tensor, Option<&Tensor>) {
        (&self.weight, self.bias.as_ref())
    }

    /// `[.., in]` to `[.., out]`.
    pub fn forward(&self, input: &Tensor) -> Tensor {
        linear(input, &self.weight, self.bias.as_ref())
    }
}

/// `input [.., in]` times the transpose of `weight [out, in]`, plus `bias [out]`.
///
/// float32 rows on the CPU are multiplied by oneDNN, forwards and backwards, but for the few of a round of decoding, which
/// have a kernel of their own (`csrc/few_rows.cpp`); everything else is libtorch's `linear`. A weight may be [`compact`].
pub fn linear(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    if are_few(input, weight, bias) {
        let [product] = made(shim::few_rows_linear(&input.contiguous(), [weight]));
        return with_bias(product, bias);
    }
    if is_on_cpu(input, Kind::Float) && is_on_cpu(weight, Kind::BFloat16) {
        return linear(input, &weight.to_kind(Kind::Float), bias);
    }
    let floats = [Some(input), Some(weight), bias].into_iter().flatten().all(|tensor| is_on_cpu(tensor, Kind::Float));
    if !floats || input.numel() == 0 || weight.dim() != 2 {
        return input.linear(weight, bias);
    }
    match learns(input, weight, bias) {
        false => made(shim::onednn_linear(input, weight, bias)),
        true => with_bias(made(trained_rows(input, weight)), bias),
    }
}

/// The products of several layers that read the same rows, where few together: threads meet once for all of them.
pub fn linear_each<const N: usize>(input: &Tensor, layers: [(&Tensor, Option<&Tensor>); N]) -> [Tensor; N] {
    if !layers.iter().all(|(weight, bias)| are_few(input, weight, *bias)) {
        return layers.map(|(weight, bias)| linear(input, weight, bias));
    }
    let products = made(shim::few_rows_linear(&input.contiguous(), layers.map(|(weight, _)| weight)));
    let mut biases = layers.into_iter().map(|(_, bias)| bias);
    products.map(|product| with_bias(product, biases.next().flatten()))
}

fn is_on_cpu(tensor: &Tensor, kind: Kind) -> bool {
    tensor.device() == Device::Cpu && tensor.kind() == kind
}

fn learns(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> bool {
    [Some(input), Some(weight), bias].into_iter().flatten().any(Tensor::requires_grad)
}

/// Whether the kernel for few rows makes this product.
fn are_few(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> bool {
    let [_, width] = <[i64; 2]>::try_from(weight.size()).unwrap_or([0, 1]);
    let rows = input.numel() as i64 / width.max(1);
    let kinds = is_on_cpu(input, Kind::Float)
        && (is_on_cpu(weight, Kind::Float) || is_on_cpu(weight, Kind::BFloat16))
        && bias.is_none_or(|bias| is_on_cpu(bias, Kind::Float));
    kinds && (1..=FEW).contains(&rows) && !learns(input, weight, bias) && weight.is_contiguous() && shim::few_rows_pay()
}

fn with_bias(product: Tensor, bias: Option<&Tensor>) -> Tensor {
    match bias {
        Some(bias) => product + bias,
        None => product,
    }
}

/// `silu(gate) * up`, `[R, in]` both, times the transpose of `down [out, in]`. With gradients, gate and up alone are kept of the
/// wide rows; `down` may be [`compact`] without.
pub fn gated_linear(gate: &Tensor, up: &Tensor, down: &Tensor) -> Result<Tensor> {
    match [gate, up, down].into_iter().any(Tensor::requires_grad) {
        true => shim::gated_linear(gate, up, down, MixedPrecision::now().forward),
        false => Ok(linear(&(gate.silu() * up), down, None)),
    }
}

/// What decoding reads of a float32 weight `[out, in]`: bfloat16 where that holds every number exactly, as it does those of an
/// exported draft, and the few rows of a round read it where it lies. Products are the same to the last bit, and the weight
/// comes from memory in half the time.
pub fn compact(weight: Tensor) -> Result<Tensor> {
    let suits = weight.device() == Device::Cpu && weight.kind() == Kind::Float && weight.dim() == 2;
    if !(suits && shim::few_rows_pay()) || weight.requires_grad() {
        return Ok(weight);
    }
    let narrow = weight.f_to_kind(Kind::BFloat16)?;
    Ok(if narrow.f_to_kind(Kind::Float)?.f_equal(&weight)? { narrow.contiguous() } else { weight })
}

/// `input [R, in]` times the transpose of `weight [out, in]`, with gradients, and in mixed precision where that is on.
pub fn trained_linear(input: &Tensor, weight: &Tensor) -> Result<Tensor> {
    shim::trained_linear(input, weight, MixedPrecision::now())
}

/// `total += scale * left right`, in place, for the gradient of a weight; needs a `no_grad` scope. In mixed precision where that
/// is on.
pub fn add_product(total: &mut Tensor, left: &Tensor, right: &Tensor, scale: f64) -> Result<()> {
    if !(MixedPrecision::now().forward && is_on_cpu(left, Kind::Float) && is_on_cpu(right, Kind::Float)) {
        return shim::add_product(total, left, right, scale);
    }
    let _ = total.f_add_(&trained_linear(left, &right.f_mul_scalar(scale)?.f_transpose(0, 1)?)?)?;
    Ok(())
}

/// `input [.., in]` with a graph.
fn trained_rows(input: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let mut shape = input.size();
    let width = shape.pop().unwrap_or(1);
    shape.push(weight.size()[0]);
    Ok(trained_linear(&input.f_reshape([-1, width])?, weight)?.f_reshape(shape)?)
}

/// The product. Shapes that do not fit are a mistake in the program, as everywhere in libtorch's own operators.
fn made<T>(product: Result<T>) -> T {
    product.unwrap_or_else(|error| panic!("linear: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::drawn::Drawn;

    #[test]
    fn every_path_equals_the_product_written_out() {
        let drawn = Drawn::of(3);
        let random = |shape: &[i64], kind: Kind| drawn.normal(shape).to_kind(kind);
        for kind in [Kind::Float, Kind::Double] {
            for shape in [vec![5], vec![1, 5], vec![7, 5], vec![2, 3, 5], vec![0, 5]] {
                let (input, weight, bias) = (random(&shape, kind), random(&[4, 5], kind), random(&[4], kind));
                let product = input.matmul(&weight.transpose(0, 1));
                for (bias, want) in [(None, product.shallow_clone()), (Some(&bias), &product + &bias)] {
                    let got = linear(&input, &weight, bias);
                    assert_eq!(got.size(), want.size());
                    assert!(got.allclose(&want, 1e-5, 1e-5, false), "{shape:?} {kind:?}");
                }
            }
        }
    }

    #[test]
    fn the_few_rows_of_a_tree_equal_the_product_in_double() {
        let drawn = Drawn::of(5);
        let random = |shape: &[i64]| drawn.normal(shape).to_kind(Kind::Float);
        for rows in [1, 2, 3, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33] {
            for (out, width) in [(24, 576), (7, 33), (9, 1), (300, 130), (13, 200)] {
                let (input, weight) = (random(&[1, rows, width]), random(&[out, width]));
                let bias = random(&[out]);
                let [x, w, b] = [&input, &weight, &bias].map(|tensor| tensor.to_kind(Kind::Double));
                let got = linear(&input, &weight, Some(&bias)).to_kind(Kind::Double);
                assert_eq!(got.size(), [1, rows, out]);
                // Rounding grows with the sizes of what is added, not with the sum, in whichever order a processor adds.
                let error = (got - x.linear(&w, Some(&b))).abs();
                let bound = x.abs().linear(&w.abs(), Some(b.abs())) * (4.0 * f64::from(f32::EPSILON));
                assert!(bool::try_from(error.le_tensor(&bound).all()).unwrap(), "{rows} rows, {out} x {width}");
            }
        }
    }

    /// Outputs that end within a block, weights of both kinds, biases or none; and more rows than are few.
    #[test]
    fn products_of_the_same_rows_are_those_of_each() {
        let drawn = Drawn::of(11);
        let random = |shape: &[i64]| drawn.normal(shape).to_kind(Kind::Float);
        for rows in [1, 5, 13, 16, 20, 32, 33] {
            let (input, bias) = (random(&[1, rows, 66]), random(&[31]));
            let [first, second] = [random(&[31, 66]), random(&[100, 66])];
            let third = compact(random(&[9, 66]).to_kind(Kind::BFloat16).to_kind(Kind::Float)).unwrap();
            let layers = [(&first, Some(&bias)), (&second, None), (&third, None)];
            let each = layers.map(|(weight, bias)| linear(&input, weight, bias));
            assert_eq!(linear_each(&input, layers), each, "{rows} rows");
        }
    }

    #[test]
    fn a_compact_weight_gives_the_same_bits() {
        let drawn = Drawn::of(7);
        let exact = drawn.normal(&[40, 150]).to_kind(Kind::BFloat16).to_kind(Kind::Float);
        let bias = drawn.normal(&[40]).to_kind(Kind::Float);
        let narrow = compact(exact.shallow_clone()).unwrap();
        if !shim::few_rows_pay() {
            return assert_eq!(narrow.kind(), Kind::Float);
        }
        assert_eq!(narrow.kind(), Kind::BFloat16);
        for rows in [0, 1, 2, 8, 9, 16, 17, 25, 33, 70] {
            let input = drawn.normal(&[rows, 150]).to_kind(Kind::Float);
            for bias in [None, Some(&bias)] {
                let [got, want] = [&narrow, &exact].map(|weight| linear(&input, weight, bias));
                assert_eq!(got, want, "{rows} rows");
            }
        }
        // A slope of what it multiplies.
        let input = drawn.normal(&[3, 150]).to_kind(Kind::Float).set_requires_grad(true);
        linear(&input, &narrow, None).sum(Kind::Float).backward();
        assert!(input.grad().allclose(&exact.sum_dim_intlist(0, false, None), 1e-4, 1e-4, false));
        // Numbers that bfloat16 cannot hold stay, and so does what is trained.
        let odd = drawn.normal(&[4, 4]).to_kind(Kind::Float);
        assert_eq!(compact(odd).unwrap().kind(), Kind::Float);
        assert_eq!(compact(exact.set_requires_grad(true)).unwrap().kind(), Kind::Float);
    }

    #[test]
    fn strided_inputs_and_weights_are_understood() {
        let drawn = Drawn::of(4);
        let input = drawn.normal(&[6, 10]).to_kind(Kind::Float).narrow(1, 2, 5);
        let weight = drawn.normal(&[5, 8]).to_kind(Kind::Float).transpose(0, 1).narrow(0, 1, 4);
        let want = input.contiguous().matmul(&weight.contiguous().transpose(0, 1));
        assert!(linear(&input, &weight, None).allclose(&want, 1e-5, 1e-5, false));
    }

    #[test]
    fn a_gradient_that_is_asked_for_is_computed() {
        let drawn = Drawn::of(6);
        let all = [vec![2, 3, 5], vec![4, 5], vec![4]].map(|shape| drawn.normal(&shape));
        let [exact, slopes] = [Kind::Double, Kind::Float].map(|kind| {
            let [input, weight, bias] =
                all.each_ref().map(|tensor| tensor.to_kind(kind).copy().set_requires_grad(true));
            let outputs = linear(&input, &weight, Some(&bias));
            assert_eq!(outputs.size(), [2, 3, 4]);
            outputs.square().sum(kind).backward();
            [input.grad(), weight.grad(), bias.grad()]
        });
        let product = all[0].matmul(&all[1].transpose(0, 1)) + &all[2];
        let slope = product * 2.0; // [2, 3, 4]
        let flat = slope.flatten(0, 1);
        let want = [
            slope.matmul(&all[1]),
            flat.transpose(0, 1).matmul(&all[0].flatten(0, 1)),
            flat.sum_dim_intlist([0].as_slice(), false, Kind::Double),
        ];
        for (got, want) in exact.iter().chain(&slopes).zip(want.iter().cycle()) {
            assert!(got.to_kind(Kind::Double).allclose(want, 1e-5, 1e-5, false), "{got} {want}");
        }
    }

    /// One function for float32, operators for float64; gates so far from zero that their exponential is no number.
    #[test]
    fn a_gated_product_has_the_gradients_of_its_operators() {
        let drawn = Drawn::of(13);
        let [gate, up, down, slope] =
            [[9, 37], [9, 37], [5, 37], [9, 5]].map(|shape: [i64; 2]| drawn.normal(&shape) * 1.5);
        let _ = gate.get(0).narrow(0, 0, 10).fill_(-150.0);
        let _ = gate.get(0).narrow(0, 10, 10).fill_(150.0);
        let [want, got] = [Kind::Double, Kind::Float].map(|kind| {
            let [gate, up, down] =
                [&gate, &up, &down].map(|tensor| tensor.to_kind(kind).copy().set_requires_grad(true));
            let rows = shim::gated_linear(&gate, &up, &down, false).unwrap();
            (&rows * slope.to_kind(kind)).sum(kind).backward();
            [rows, gate.grad(), up.grad(), down.grad()].map(|tensor| tensor.to_kind(Kind::Double))
        });
        for (got, want) in got.iter().zip(&want) {
            assert!(got.allclose(want, 1e-5, 1e-4, false), "{got} {want}");
        }
        let [few, up, down] = [&gate.narrow(0, 0, 2), &up, &down].map(|tensor| tensor.to_kind(Kind::Float));
        assert!(shim::gated_linear(&few, &up, &down, false).unwrap_err().to_string().contains("expected"));
    }

    #[test]
    #[should_panic(expected = "linear")]
    fn shapes_that_do_not_fit_are_named() {
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        let _ = linear(&zeros(&[3, 6]), &zeros(&[4, 5]), None);
    }
}
