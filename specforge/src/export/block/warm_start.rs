//! Starts a drafter from a published one.

use std::path::Path;

use tch::Tensor;

use super::drafter::Drafter;
use super::head::Head;
use super::read::{Imported, read};
use crate::draft::block::config::{BlockShape, Layout as Rows};
use crate::error::{Error, Result};
use crate::export::eagle3::is_other_embedding;
use crate::export::{Beginning, START_KEY};
use crate::vocab::VocabMap;

/// Copies the values of the drafter in a folder into one in training, whose `description` is that of a checkpoint.
/// Everything that decides what the values mean must be the same in both; the error names what is not, and the key.
pub(super) fn start_from(path: &Path, beginning: &Beginning<'_>) -> Result<Vec<String>> {
    let Beginning { draft, vocabulary, embedding } = *beginning;
    let own = Drafter::described(&draft.description())
        .map_err(|problem| Error::config(START_KEY, format!("this draft is no block drafter: {problem}")))?;
    let layers = Some(own.shape.num_target_layers).filter(|layers| *layers > 0);
    let imported = read(path, layers)?;
    let mut wrong = differences(&imported, &own);
    if imported.vocabulary.as_ref() != vocabulary {
        let tokens = |map: Option<&VocabMap>| map.map_or(own.shape.vocab_size, VocabMap::draft_size);
        let (theirs, ours) = (tokens(imported.vocabulary.as_ref()), tokens(vocabulary));
        let what = if theirs == ours { "of other tokens".to_owned() } else { format!("{theirs} there, {ours} here") };
        wrong.push(format!("vocabulary map: {what} (draft.vocab_map={}/model.safetensors)", path.display()));
    }
    if !wrong.is_empty() {
        let problem = format!("{} is another draft than the one configured:\n  {}", path.display(), wrong.join("\n  "));
        return Err(Error::config(START_KEY, problem).with_hint("set these keys"));
    }
    let _no_grad = tch::no_grad_guard();
    for parameter in draft.parameters() {
        let found = imported.tensors.iter().find(|(name, _)| *name == parameter.name);
        let (_, value) = found.filter(|(_, value)| value.size() == parameter.value.size()).ok_or_else(|| {
            Error::bad_file(path, format!("holds no tensor `{}` of shape {:?}", parameter.name, parameter.value.size()))
        })?;
        parameter.value.shallow_clone().f_copy_(value)?;
    }
    let mut notes = imported.notes;
    let differs = |own: &Option<Tensor>| own.as_ref().map_or(Ok(false), |own| is_other_embedding(own, embedding));
    if differs(&imported.embedding)? {
        notes.push(
            "warning: it has an embedding that is not the target's; the draft is trained on the target's".to_owned(),
        );
    }
    if imported.lm_head.is_some() && imported.vocabulary.is_none() {
        notes.push("it has a vocabulary projection; the draft is trained with the target's".to_owned());
    }
    Ok(notes)
}

/// What two drafters do not share, with the keys that set it.
fn differences(theirs: &Imported, ours: &Drafter) -> Vec<String> {
    let mut found = Vec::new();
    let mut compare = |what: &str, key: &str, theirs: String, ours: String| {
        if theirs != ours {
            found.push(format!("{what}: {theirs} there, {ours} here ({key})"));
        }
    };
    let (left, right) = (&theirs.shape, &ours.shape);
    compare("kind", "draft.algorithm", theirs.method.name().to_owned(), ours.method.name().to_owned());
    let numbers = |shape: &BlockShape| {
        [
            shape.hidden_size,
            shape.vocab_size,
            shape.layers.len() as i64,
            shape.block_size,
            shape.mask_token_id,
            shape.layer.intermediate_size,
            shape.layer.num_attention_heads,
            shape.layer.num_key_value_heads,
            shape.layer.head_dim,
        ]
    };
    let names = [
        ("hidden_size", "the target's"),
        ("vocab_size", "the target's"),
        ("num_hidden_layers", "draft.num_layers"),
        ("block_size", "draft.block_size"),
        ("mask_token_id", "draft.mask_token_id"),
        ("intermediate_size", "draft.intermediate_size"),
        ("num_attention_heads", "draft.num_attention_heads"),
        ("num_key_value_heads", "draft.num_key_value_heads"),
        ("head_dim", "draft.head_dim"),
    ];
    for ((what, key), (theirs, ours)) in names.into_iter().zip(numbers(left).into_iter().zip(numbers(right))) {
        compare(what, key, theirs.to_string(), ours.to_string());
    }
    let rows = |shape: &BlockShape| if shape.layout == Rows::Shift { "shift" } else { "fill_in" }.to_owned();
    compare("layout", "draft.layout", rows(left), rows(right));
    let ids = |shape: &BlockShape| format!("{:?}", shape.target_layer_ids);
    compare("target_layer_ids", "draft.target_layer_ids", ids(left), ids(right));
    let windows =
        |shape: &BlockShape| format!("{:?}", shape.layers.iter().map(|layer| layer.window).collect::<Vec<_>>());
    compare("windows", "draft.layer_types, draft.sliding_window", windows(left), windows(right));
    let causal =
        |shape: &BlockShape| format!("{:?}", shape.layers.iter().map(|layer| layer.causal).collect::<Vec<_>>());
    compare("causal", "draft.is_causal", causal(left), causal(right));
    compare("convolutions", "draft.conv", format!("{:?}", left.conv), format!("{:?}", right.conv));
    let own_row = |shape: &BlockShape| shape.mask_embedding.to_string();
    compare("mask_embedding", "draft.mask_embedding", own_row(left), own_row(right));
    let scale = |shape: &BlockShape| shape.input_embedding_scale.to_string();
    compare("input_embedding_scale", "draft.head", scale(left), scale(right));
    let (one, other) = (&left.layer, &right.layer);
    compare("rms_norm_eps", "draft.rms_norm_eps", one.rms_norm_eps.to_string(), other.rms_norm_eps.to_string());
    compare("rope_theta", "the target's", one.rope.theta.to_string(), other.rope.theta.to_string());
    compare("rope_scaling", "the target's", format!("{:?}", one.rope.scaling), format!("{:?}", other.rope.scaling));
    // Whatever kinds they are: keys of another kind's head would say nothing.
    if theirs.method == ours.method
        && let Ok(head) = Head::of_training(theirs.method, &theirs.head)
    {
        let (theirs, ours) = (head.training_keys(), ours.head.training_keys());
        // Compared above, and what only decoding looks at.
        let left_out = ["input_embedding_scale", "xpress_num_passes", "xpress_topc"];
        for (key, value) in ours.iter().filter(|(key, _)| !left_out.contains(&key.as_str())) {
            let got = theirs.get(key).map_or("nothing".to_owned(), |value| value.to_string());
            compare(key, &format!("draft.head.{key}"), got, value.to_string());
        }
    }
    found
}
