//! Group normalisation (Wu and He 2018, <https://arxiv.org/abs/1803.08494>).

use tch::Tensor;

use crate::error::Result;

/// Every image's channels in groups, each with mean 0 and variance 1 over its channels and pixels, then times `weight` plus
/// `bias` by channel.
#[derive(Debug)]
pub struct GroupNorm {
    /// `[C]`
    pub weight: Tensor,
    /// `[C]`
    pub bias: Tensor,
    /// Number of groups; divides `C`.
    pub groups: i64,
    /// Added to the variance.
    pub epsilon: f64,
}

impl GroupNorm {
    /// `[B, C, h, w]` to the same shape. An image of other channels is an error.
    pub fn forward(&self, image: &Tensor) -> Result<Tensor> {
        Ok(image.f_group_norm(self.groups, Some(&self.weight), Some(&self.bias), self.epsilon, true)?)
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::nn::drawn;

    #[test]
    fn groups_are_normed_apart() {
        drawn::seed(2);
        let options = (Kind::Double, Device::Cpu);
        let image = drawn::randn([2, 4, 3, 5], options);
        let (weight, bias) = (drawn::randn([4], options), drawn::randn([4], options));
        let norm = GroupNorm { weight: weight.copy(), bias: bias.copy(), groups: 2, epsilon: 1e-3 };
        let group = image.narrow(0, 1, 1).narrow(1, 2, 2);
        let (mean, variance) = (group.mean(Kind::Double), group.var(false));
        let want = (group - mean) / (variance + 1e-3).sqrt();
        let want = want * weight.narrow(0, 2, 2).view([1, 2, 1, 1]) + bias.narrow(0, 2, 2).view([1, 2, 1, 1]);
        let got = norm.forward(&image).unwrap().narrow(0, 1, 1).narrow(1, 2, 2);
        assert!(got.allclose(&want, 1e-9, 1e-9, false));
        assert!(norm.forward(&image.narrow(1, 0, 3)).is_err());
    }
}
