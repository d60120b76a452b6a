//! A small random transformer for tests.

use tch::Kind;

use super::{Var, VarConfig};
use crate::nn::noise;

/// Three scales, two blocks, 32 tokens.
pub(crate) fn config() -> VarConfig {
    VarConfig {
        depth: 2,
        embed_dim: 16,
        num_heads: 2,
        mlp_hidden: 64,
        patch_nums: vec![1, 2, 3],
        vocab_size: 32,
        z_channels: 8,
        num_classes: 10,
        shared_aln: false,
        attn_l2_norm: true,
        norm_eps: 1e-6,
    }
}

/// A model of random numbers in float64, so that no shape of a pass flips a choice.
pub(crate) fn model(config: &VarConfig, seed: u64) -> Var {
    let mut stream = 0;
    let build = Var::build(config.clone(), &mut |_, shape| {
        stream += 1;
        Ok(noise::normal(shape, 0.3, seed, stream).to_kind(Kind::Double))
    });
    build.unwrap()
}
