//! Small random models of images for tests, in float64: no shape of a pass flips a choice there.

use tch::Kind;

use crate::models::var::{Var, VarConfig, tiny};
use crate::models::vqvae::{PhiSharing, Quantizer, QuantizerConfig};
use crate::nn::noise;

/// Four scales, 30 tokens.
pub(crate) fn config() -> VarConfig {
    VarConfig { patch_nums: vec![1, 2, 3, 4], ..tiny::config() }
}

/// The quantiser of a model.
pub(crate) fn quantizer(config: &VarConfig) -> Quantizer {
    let config = QuantizerConfig {
        vocab_size: config.vocab_size,
        z_channels: config.z_channels,
        patch_nums: config.patch_nums.clone(),
        sharing: PhiSharing::Several(4),
        quant_resi: 0.5,
    };
    let mut stream = 0;
    let build = Quantizer::build(config, "quantize.", &mut |_, shape| {
        stream += 1;
        Ok(noise::normal(shape, 0.5, 77, stream).to_kind(Kind::Double))
    });
    build.unwrap()
}

/// Target, and drafts that are seldom, often and always right.
pub(crate) struct Models {
    pub(crate) target: Var,
    pub(crate) drafts: Vec<Var>,
    pub(crate) quantizer: Quantizer,
}

/// The models.
pub(crate) fn models() -> Models {
    let config = config();
    let mut stream = 0;
    let near = Var::build(config.clone(), &mut |_, shape| {
        stream += 1;
        let noise = |seed, width| noise::normal(shape, width, seed, stream).to_kind(Kind::Double);
        Ok(noise(3, 0.3) + noise(4, 0.01))
    });
    let other = tiny::model(&VarConfig { depth: 1, embed_dim: 12, mlp_hidden: 20, ..config.clone() }, 9);
    let quantizer = quantizer(&config);
    Models { target: tiny::model(&config, 3), drafts: vec![other, near.unwrap(), tiny::model(&config, 3)], quantizer }
}
