//! A vocabulary projection: what a model makes of its last hidden state.
//!
//! Most models give `h W^T`. Some add a bias, some scale the result (Granite, Cohere, MiniCPM), some bend it softly into a
//! range (Gemma 2): `logits = cap tanh((scale (h W^T + b)) / cap)`. Who works with logits asks a [`Head`] and never its
//! matrix alone.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::linear::linear;
use super::mixed_precision::MixedPrecision;
use crate::error::{Error, Result};

/// A vocabulary projection with all that stands between a hidden state and the logits.
#[derive(Debug)]
pub struct Head {
    /// `[V, H]`
    pub weight: Tensor,
    /// `[V]`, added to the product.
    pub bias: Option<Tensor>,
    /// Multiplies product and bias; 1 for most.
    pub scale: f64,
    /// `c` of `c tanh(x / c)`, which bends the scaled logits into the range from `-c` to `c`.
    pub softcap: Option<f64>,
}

impl Head {
    /// A head that is its matrix `[V, H]` and nothing else.
    pub fn plain(weight: Tensor) -> Self {
        Self { weight, bias: None, scale: 1.0, softcap: None }
    }

    /// Whether logits are the product with the matrix.
    pub fn is_plain(&self) -> bool {
        self.bias.is_none() && self.scale == 1.0 && self.softcap.is_none()
    }

    /// Logits of hidden states `[.., H]`: `[.., V]`, in their element type.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        // Rounded, likely tokens would tie, and their probabilities move by percents.
        let _exact = MixedPrecision::backward_alone();
        match self.softcap.is_none() && self.scale == 1.0 {
            true => linear(hidden, &self.weight, self.bias.as_ref()),
            false => self.finish(linear(hidden, &self.weight, None)),
        }
    }

    /// Logits from the product with the matrix, `[.., V]` of any element type. A plain head hands it back.
    pub fn finish(&self, product: Tensor) -> Tensor {
        let product = match &self.bias {
            Some(bias) => &product + bias.to_kind(product.kind()),
            None => product,
        };
        let scaled = if self.scale == 1.0 { product } else { product * self.scale };
        match self.softcap {
            Some(cap) => (scaled / cap).tanh() * cap,
            None => scaled,
        }
    }

    /// What a slope of `logits` is multiplied with to become one of the product: of the shape of the logits or a scalar;
    /// `None` for one.
    pub fn derivative(&self, logits: &Tensor) -> Option<Tensor> {
        match self.softcap {
            Some(cap) => Some(((logits / cap).square().neg() + 1.0) * self.scale),
            None if self.scale == 1.0 => None,
            None => Some(Tensor::full([], self.scale, (logits.kind(), logits.device()))),
        }
    }

    /// The same head; nothing is copied.
    pub fn share(&self) -> Self {
        let bias = self.bias.as_ref().map(Tensor::shallow_clone);
        Self { weight: self.weight.shallow_clone(), bias, scale: self.scale, softcap: self.softcap }
    }

    /// The rows of an int64 tensor of token ids `[R]`, as a head of their own.
    pub fn rows(&self, ids: &Tensor) -> Result<Self> {
        let bias = self.bias.as_ref().map(|bias| bias.f_index_select(0, ids)).transpose()?;
        Ok(Self { weight: self.weight.f_index_select(0, ids)?, bias, scale: self.scale, softcap: self.softcap })
    }

    /// The rows `start .. start + count`; nothing is copied.
    pub fn narrow(&self, start: i64, count: i64) -> Result<Self> {
        let bias = self.bias.as_ref().map(|bias| bias.f_narrow(0, start, count)).transpose()?;
        Ok(Self { weight: self.weight.f_narrow(0, start, count)?, bias, scale: self.scale, softcap: self.softcap })
    }

    /// The same in an element type and on a device, without a graph; what has both is shared.
    pub fn to(&self, kind: Kind, device: Device) -> Result<Self> {
        let moved = |tensor: &Tensor| Ok::<_, Error>(tensor.f_to_device(device)?.f_to_kind(kind)?.detach());
        let bias = self.bias.as_ref().map(moved).transpose()?;
        Ok(Self { weight: moved(&self.weight)?, bias, scale: self.scale, softcap: self.softcap })
    }

    /// The matrix that a trained projection without bias and cap starts from: this one with its scale, `[V, H]`, in memory
    /// of its own. A cap does not change which token is likeliest, and what a bias says is learned.
    pub fn start(&self) -> Tensor {
        if self.scale == 1.0 { self.weight.detach().copy() } else { self.weight.detach() * self.scale }
    }

    /// Element type.
    pub fn kind(&self) -> Kind {
        self.weight.kind()
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        self.weight.device()
    }

    /// `V`
    pub fn vocab_size(&self) -> i64 {
        self.weight.size()[0]
    }

    /// What it does beside the product.
    pub fn form(&self) -> HeadForm {
        HeadForm { bias: self.bias.is_some(), scale: self.scale, softcap: self.softcap }
    }
}

/// What a head does beside the product with its matrix: known from a configuration alone.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadForm {
    /// Whether a bias is added.
    pub bias: bool,
    /// See [`Head::scale`].
    pub scale: f64,
    /// See [`Head::softcap`].
    pub softcap: Option<f64>,
}

impl HeadForm {
    /// The product alone.
    pub const PLAIN: Self = Self { bias: false, scale: 1.0, softcap: None };

    /// What there is beside the product, in words: `a bias and a soft cap of 30`. Empty for a plain head.
    pub fn words(&self) -> String {
        let parts = [
            self.bias.then(|| "a bias".to_owned()),
            (self.scale != 1.0).then(|| format!("a scale of {}", self.scale)),
            self.softcap.map(|cap| format!("a soft cap of {cap}")),
        ];
        parts.into_iter().flatten().collect::<Vec<_>>().join(" and ")
    }
}

impl Default for HeadForm {
    fn default() -> Self {
        Self::PLAIN
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::drawn;

    const OPTIONS: (Kind, Device) = (Kind::Double, Device::Cpu);

    fn heads() -> Vec<Head> {
        let mut heads = Vec::new();
        for bias in [false, true] {
            for scale in [1.0, 0.25] {
                for softcap in [None, Some(1.5)] {
                    let bias = bias.then(|| drawn::randn([7], OPTIONS));
                    heads.push(Head { weight: drawn::randn([7, 5], OPTIONS), bias, scale, softcap });
                }
            }
        }
        heads
    }

    #[test]
    fn logits_are_the_formula_written_out() {
        drawn::seed(1);
        let hidden = drawn::randn([2, 3, 5], OPTIONS);
        for head in heads() {
            let got = head.logits(&hidden);
            for (row, token) in [(0, 0), (4, 6), (5, 2)] {
                let state = Vec::<f64>::try_from(hidden.view([6, 5]).get(row)).unwrap();
                let weight = Vec::<f64>::try_from(head.weight.get(token)).unwrap();
                let product: f64 = state.iter().zip(&weight).map(|(left, right)| left * right).sum();
                let bias = head.bias.as_ref().map_or(0.0, |bias| bias.double_value(&[token]));
                let scaled = (product + bias) * head.scale;
                let want = head.softcap.map_or(scaled, |cap| cap * (scaled / cap).tanh());
                let got = got.view([6, 7]).double_value(&[row, token]);
                assert!((got - want).abs() < 1e-12, "{:?}: {got} and not {want}", head.form());
            }
        }
    }

    #[test]
    fn the_derivative_is_autograds() {
        drawn::seed(2);
        for head in heads() {
            let product = drawn::randn([4, 7], OPTIONS).set_requires_grad(true);
            let slope = drawn::randn([4, 7], OPTIONS);
            let logits = head.finish(product.shallow_clone());
            (&logits * &slope).sum(Kind::Double).backward();
            let got = match head.derivative(&logits.detach()) {
                Some(derivative) => slope * derivative,
                None => slope,
            };
            assert!(got.allclose(&product.grad(), 1e-12, 1e-12, false), "{:?}", head.form());
        }
    }

    #[test]
    fn some_rows_are_a_head_of_their_own() {
        drawn::seed(3);
        let (hidden, ids) = (drawn::randn([3, 5], OPTIONS), Tensor::from_slice(&[6i64, 0, 3]));
        for head in heads() {
            let all = head.logits(&hidden);
            assert!(head.rows(&ids).unwrap().logits(&hidden).allclose(&all.index_select(1, &ids), 1e-12, 1e-12, false));
            let few = head.narrow(2, 4).unwrap().logits(&hidden);
            assert!(few.allclose(&all.narrow(1, 2, 4), 1e-12, 1e-12, false));
            assert!(head.rows(&Tensor::from_slice(&[7i64])).is_err());
            let moved = head.to(Kind::Float, Device::Cpu).unwrap();
            assert_eq!((moved.kind(), moved.form()), (Kind::Float, head.form()));
        }
    }

    #[test]
    fn a_form_says_what_it_is() {
        assert_eq!(HeadForm::PLAIN.words(), "");
        let form = HeadForm { bias: true, scale: 0.5, softcap: Some(30.0) };
        assert_eq!(form.words(), "a bias and a scale of 0.5 and a soft cap of 30");
        assert!(!Head::plain(Tensor::zeros([2, 2], OPTIONS)).form().bias);
    }
}
