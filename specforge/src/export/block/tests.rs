//! Names that trainers and converters use, and the file of the mask's row.

use serde_json::json;
use tch::{Kind, Tensor};

use super::head::Head;
use super::mask;
use super::method::Method;
use super::tensors::{MASK_EMBEDDING, Named, Spelling, meaning, needed};
use crate::draft::block::backbone;
use crate::draft::block::config::{BlockConfig, Convolution};
use crate::draft::block::heads::HEADS;
use crate::models::TargetInfo;

/// What engines load is what training makes, for every head that there is.
#[test]
fn every_trained_tensor_has_its_place_in_a_folder() {
    let target = TargetInfo::of(32, 100, 8, 64);
    for (kind, conv) in HEADS.iter().flat_map(|kind| [(kind, false), (kind, true)]) {
        let section = json!({"algorithm": kind.name, "mask_token_id": 7, "block_size": 4, "mask_embedding": true});
        let mut config = BlockConfig::read(&section).unwrap();
        config.conv = conv.then_some(Convolution { kernel_size: 2, group_size: 8 });
        let shape = config.shape(&target).unwrap();
        let mut trained = backbone::tensors(&shape);
        trained.extend((kind.tensors)(&config, &shape).unwrap());
        let mut trained: Vec<_> = trained.into_iter().map(|spec| (spec.name, spec.shape)).collect();
        // A head that no engine knows has no export.
        let Some(method) = Method::named(kind.name) else { continue };
        let head = Head::of_training(method, &config.head).unwrap();
        let mut loaded = needed(&shape, &head);
        loaded.push((MASK_EMBEDDING.to_owned(), vec![32]));
        trained.sort();
        loaded.sort();
        assert_eq!(trained, loaded, "{}", kind.name);
    }
}

#[test]
fn names_of_trainers_are_those_of_engines() {
    let cases = [
        (Method::Dflash, "fc.weight", "fc.weight", &[][..]),
        (Method::Dflash, "model.norm.weight", "norm.weight", &[Spelling::Prefixed]),
        (Method::Dflash, "encoder.output_norm_enc.weight", "hidden_norm.weight", &[Spelling::Encoder]),
        (
            Method::Dflash2,
            "candidate_selector.predecessor_codebook.weight",
            "candidate_selector.predecessor_codebook",
            &[Spelling::Codebook],
        ),
        (
            Method::Dflash2,
            "candidate_selector.hidden_projection.weight",
            "candidate_selector.hidden_projection.weight",
            &[],
        ),
        (Method::Lilicorr, "lilicorr.feature_mlp.0.bias", "lilicorr.feature_norm.bias", &[Spelling::NumberedParts]),
        (
            Method::Lilicorr,
            "lilicorr.feature_mlp.1.weight",
            "lilicorr.feature_mlp.up_proj.weight",
            &[Spelling::NumberedParts],
        ),
        (
            Method::Lilicorr,
            "model.lilicorr.layers.1.mlp.2.bias",
            "lilicorr.layers.1.mlp.down_proj.bias",
            &[Spelling::Prefixed, Spelling::NumberedParts],
        ),
        // The backbone's own MLP has no numbers, and a layer's attention keeps its names.
        (Method::Lilicorr, "layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight", &[]),
        (Method::Lilicorr, "lilicorr.layers.0.attn.in_proj_bias", "lilicorr.layers.0.attn.in_proj_bias", &[]),
        (Method::Dspark, "markov_w1.weight", "markov_head.markov_w1.weight", &[Spelling::FlatMarkov]),
        (Method::Dspark, "confidence_proj.bias", "confidence_head.proj.bias", &[Spelling::FlatMarkov]),
        (Method::Dspark, "layers.0.mlp.gate_proj.weight", "layers.0.mlp.gate_proj.weight", &[]),
        (Method::Xpress, "refiner_head.mix_l", "xpress_head.mix.L", &[Spelling::Refiner]),
        (Method::Xpress, "refiner_head.down_h.weight", "xpress_head.down_h.weight", &[Spelling::Refiner]),
    ];
    for (method, stored, engines, spellings) in cases {
        assert_eq!(meaning(method, stored), (Named::Tensor(engines.to_owned()), spellings.to_vec()), "{stored}");
    }
    for name in ["model.rotary_emb.inv_freq", "verifier_lm_head.weight"] {
        assert_eq!(meaning(Method::Dflash, name).0, Named::Unused, "{name}");
    }
}

#[test]
fn the_masks_row_comes_back_in_its_type() {
    let folder = tempfile::tempdir().unwrap();
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        let path = folder.path().join(format!("{kind:?}.pt"));
        let row = Tensor::from_slice(&[0.5f32, -1.25, 3.0]).to_kind(kind);
        mask::write(&path, 151_669, &row).unwrap();
        let read = mask::read(&path).unwrap();
        assert_eq!(read.token, Some(151_669));
        assert!(read.row.kind() == kind && read.row.equal(&row));
    }
    let path = folder.path().join("infinite.pt");
    mask::write(&path, 1, &Tensor::from_slice(&[f32::INFINITY])).unwrap();
    assert!(mask::read(&path).unwrap_err().to_string().contains("finite"));
}
