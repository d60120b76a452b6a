//! A mixture of experts: every token passes through a few of many MLPs, chosen by a router (Shazeer et al. 2017,
//! <https://arxiv.org/abs/1701.06538>).
//!
//! Tokens are sorted by expert, so that each expert takes all of its tokens in one product, and no loop runs over tokens.
//! What comes back is put into the order of the tokens again and summed there: a token's sum does not depend on its
//! neighbours.
//!
//! Legend beside that of `nn`: `R` tokens, `E` experts, `k` experts of a token.

use tch::{Device, Kind, Tensor};

use super::decoder_layer::FeedForward;
use super::linear::Linear;

/// How a router's scores become weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// A softmax over all experts, of which the largest `k` are taken as they are.
    OfAll,
    /// The softmax over the `k` chosen alone: the same numbers, divided by their sum.
    OfChosen,
}

/// Chooses experts.
#[derive(Debug)]
pub struct Router {
    /// `[E, H]`
    pub projection: Linear,
    /// `k`
    pub chosen: i64,
    /// How scores become weights.
    pub scoring: Scoring,
}

impl Router {
    /// Weights and experts of tokens `[R, H]`, `[R, k]` each.
    fn choose(&self, tokens: &Tensor) -> (Tensor, Tensor) {
        let scores = self.projection.forward(tokens); // [R, E]
        let wide = if scores.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        match self.scoring {
            Scoring::OfAll => scores.softmax(-1, wide).topk(self.chosen, -1, true, true),
            Scoring::OfChosen => {
                let (largest, experts) = scores.topk(self.chosen, -1, true, true);
                (largest.softmax(-1, wide), experts)
            }
        }
    }
}

/// An MLP that all tokens pass through beside their experts.
pub struct SharedExpert {
    /// The MLP.
    pub mlp: Box<dyn FeedForward>,
    /// `[1, H]`: the sigmoid of its product multiplies what the MLP gives.
    pub gate: Linear,
}

/// A mixture of experts.
pub struct Experts {
    /// Chooses among them.
    pub router: Router,
    /// Each of them.
    pub experts: Vec<Box<dyn FeedForward>>,
    /// What all tokens pass through as well.
    pub shared: Option<SharedExpert>,
}

impl Experts {
    /// What the chosen experts make of tokens `[R, H]`, summed by their weights, `[R, H]`.
    fn chosen(&self, tokens: &Tensor) -> Tensor {
        let (weights, chosen) = self.router.choose(tokens);
        let (rows, width) = tokens.size2().expect("tokens are [R, H]");
        let times = self.router.chosen;
        // 1. Sort by expert.
        let chosen = chosen.reshape([-1]); // [R k]
        let order = chosen.argsort_stable(true, 0, false); // [R k]
        let counts = chosen.bincount(None::<&Tensor>, self.experts.len() as i64).to_device(Device::Cpu);
        let counts = Vec::<i64>::try_from(counts).expect("bincount gives whole numbers");
        let sorted = tokens.index_select(0, &order.floor_divide_scalar(times)); // [R k, H]
        // 2. One product for each expert.
        let mut start = 0;
        let mut fed = Vec::new();
        for (expert, &count) in self.experts.iter().zip(&counts).filter(|(_, count)| **count > 0) {
            fed.push(expert.forward(&sorted.narrow(0, start, count)));
            start += count;
        }
        let fed = Tensor::cat(&fed, 0); // [R k, H]
        // 3. Back into the order of the tokens, and sum.
        let places = Tensor::arange(rows * times, (Kind::Int64, tokens.device()));
        let back = Tensor::empty_like(&order).scatter(0, &order, &places);
        let fed = fed.index_select(0, &back).view([rows, times, width]); // [R, k, H]
        weights.to_kind(fed.kind()).unsqueeze(1).bmm(&fed).squeeze_dim(1) // [R, H]
    }
}

impl FeedForward for Experts {
    fn forward(&self, input: &Tensor) -> Tensor {
        let size = input.size();
        let tokens = input.reshape([-1, size[size.len() - 1]]); // [R, H]
        if tokens.size()[0] == 0 {
            return input.zeros_like();
        }
        let mut fed = self.chosen(&tokens);
        if let Some(SharedExpert { mlp, gate }) = &self.shared {
            let share = gate.forward(&tokens).sigmoid(); // [R, 1]
            fed += share * mlp.forward(&tokens);
        }
        fed.view(size.as_slice())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::drawn;

    const OPTIONS: (Kind, Device) = (Kind::Double, Device::Cpu);

    /// Multiplies with a matrix.
    struct Matrix(Tensor);

    impl FeedForward for Matrix {
        fn forward(&self, input: &Tensor) -> Tensor {
            input.matmul(&self.0)
        }
    }

    fn linear(rows: i64) -> Linear {
        Linear { weight: drawn::randn([rows, 5], OPTIONS), bias: None }
    }

    fn mixture(scoring: Scoring, shared: bool) -> Experts {
        let matrix = || Box::new(Matrix(drawn::randn([5, 5], OPTIONS))) as Box<dyn FeedForward>;
        let shared = shared.then(|| SharedExpert { mlp: matrix(), gate: linear(1) });
        let router = Router { projection: linear(7), chosen: 3, scoring };
        Experts { router, experts: (0..7).map(|_| matrix()).collect(), shared }
    }

    /// Token by token and expert by expert.
    fn written_out(mixture: &Experts, token: &Tensor) -> Tensor {
        let numbers = |tensor: Tensor| Vec::<f64>::try_from(tensor.flatten(0, -1)).unwrap();
        let scores = numbers(mixture.router.projection.forward(token));
        let mut best: Vec<usize> = (0..7).collect();
        best.sort_by(|&left, &right| scores[right].total_cmp(&scores[left]));
        best.truncate(3);
        let among: Vec<usize> = match mixture.router.scoring {
            Scoring::OfAll => (0..7).collect(),
            Scoring::OfChosen => best.clone(),
        };
        let sum: f64 = among.iter().map(|&expert| scores[expert].exp()).sum();
        let mut output = token.zeros_like();
        for expert in best {
            output += mixture.experts[expert].forward(token) * (scores[expert].exp() / sum);
        }
        if let Some(shared) = &mixture.shared {
            let gate = numbers(shared.gate.forward(token))[0];
            output += shared.mlp.forward(token) / (1.0 + (-gate).exp());
        }
        output
    }

    #[test]
    fn every_token_passes_through_its_own_experts() {
        drawn::seed(7);
        for (scoring, shared) in [(Scoring::OfAll, false), (Scoring::OfChosen, false), (Scoring::OfAll, true)] {
            let mixture = mixture(scoring, shared);
            let input = drawn::randn([2, 6, 5], OPTIONS);
            let output = mixture.forward(&input);
            assert_eq!(output.size(), [2, 6, 5]);
            let (tokens, output) = (input.view([12, 5]), output.view([12, 5]));
            for token in 0..12 {
                let want = written_out(&mixture, &tokens.narrow(0, token, 1));
                let difference = (output.narrow(0, token, 1) - want).abs().max().double_value(&[]);
                assert!(difference < 1e-12, "{scoring:?} {shared} {token}: {difference:e}");
            }
            assert_eq!(mixture.forward(&input.narrow(1, 0, 0)).size(), [2, 0, 5]);
        }
    }
}
