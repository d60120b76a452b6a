//! What holds of the built-in families holds of one that differs in everything its shapes allow: `plugins/windowed.rs`.

use specforge::models::{self, ForwardInput, LayerKind, LogitRows};
use specforge::nn::AttentionMask;
use tch::{Device, Kind, Tensor};

use crate::plugins::windowed::{self, model};
use crate::target_rules::{self, VOCABULARY, alone, near, tokens};
use crate::{fixture, plugins};

#[test]
fn the_window_and_everything_else_matter() {
    let target = model(VOCABULARY, Kind::Double);
    let text = tokens(12, 1);
    let want = alone(target.as_ref(), &text);
    assert!(want.abs().max().double_value(&[]) < 9.0);
    // A layer without a window still sees the first token from the last.
    let mut other = text.clone();
    other[0] = (other[0] + 1) % VOCABULARY;
    assert!((alone(target.as_ref(), &other) - &want).get(11).abs().max().double_value(&[]) > 1e-9);
}

#[test]
fn packs_caches_and_trees_change_nothing() {
    let target = model(VOCABULARY, Kind::Double);
    target_rules::a_pack_equals_its_documents_alone(target.as_ref());
    target_rules::cached_pieces_equal_the_texts_alone(target.as_ref());
    target_rules::every_node_of_a_tree_equals_its_path(target.as_ref());
}

#[test]
fn every_draft_is_lossless() {
    let [target, twin] = [(); 2].map(|()| model(VOCABULARY, Kind::Double));
    target_rules::every_draft_is_lossless(target.as_ref(), twin);
}

/// A family that a program adds to the table is loaded, checked and planned with like the one that is built in.
#[test]
fn an_added_family_is_one_like_any_other() {
    plugins::register();
    assert!(models::families().iter().any(|family| family.model_type == windowed::FAMILY.model_type));
    let taken = models::add_family(&windowed::FAMILY).unwrap_err().to_string();
    assert!(taken.contains("`windowed`"), "{taken}");
    let folder = tempfile::tempdir().unwrap();
    windowed::write(folder.path(), VOCABULARY);
    models::check(folder.path()).unwrap();
    let info = models::read_info(folder.path()).unwrap();
    assert_eq!(info.layers, [LayerKind::Window(4), LayerKind::Full, LayerKind::Window(4), LayerKind::Full]);
    let whole = models::load_target(folder.path(), Kind::Double, Device::Cpu).unwrap();
    let tables = models::load_tables(folder.path(), Kind::Double, Device::Cpu).unwrap();
    assert!(*whole.info() == info && tables.info == info);

    // What the tables say is what the model says: the embeddings first, and the head of the last state.
    let ids = Tensor::from_slice(&tokens(10, 1)).unsqueeze(0);
    let positions = Tensor::arange(10, (Kind::Int64, Device::Cpu)).unsqueeze(0);
    let (mask, capture) = (AttentionMask::Causal, [4, 0]);
    let input =
        ForwardInput { ids: &ids, positions: &positions, mask: &mask, capture: &capture, logits: LogitRows::All };
    let output = whole.forward(&input, None).unwrap();
    near(&tables.head.logits(&output.hidden[0].squeeze_dim(0)), &output.logits.unwrap());
    near(&tables.embedding.look_up(&ids).unwrap(), &output.hidden[1]);
    let head = models::load_head(folder.path()).unwrap();
    assert_eq!((head.kind(), head.form()), (Kind::Float, info.head));

    let path = folder.path().join("model.safetensors");
    let mut tensors = fixture::tensors_of(&path);
    tensors.retain(|(name, _)| name != "layers.2.sinks");
    specforge::weights::write_tensors(&path, &tensors, &[]).unwrap();
    let missing = models::check(folder.path()).unwrap_err().to_string();
    assert!(missing.contains("layers.2.sinks [6]"), "{missing}");
}
