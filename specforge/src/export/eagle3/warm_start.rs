//! Starts a draft from a published one.

use std::path::Path;

use super::read::{is_other_embedding, read};
use crate::draft::eagle3::Eagle3Shape;
use crate::error::{Error, Result};
use crate::export::{Beginning, START_KEY};
use crate::vocab::VocabMap;

/// Copies the values of the draft in a folder into a draft in training, whose `description` is that of a checkpoint.
/// Everything that decides what the values mean must be the same in both; the error names what is not, and the key.
/// Returns what a user should know.
pub fn start_from(path: &Path, beginning: &Beginning<'_>) -> Result<Vec<String>> {
    let Beginning { draft, vocabulary, embedding } = *beginning;
    let description = draft.description();
    let own = Eagle3Shape::from_description(&description)
        .map_err(|problem| Error::config(START_KEY, format!("this draft is no EAGLE-3 draft: {problem}")))?;
    let imported = read(path, Some(own.num_target_layers))?;
    let fits = |shape: &Eagle3Shape| differences(shape, &own).is_empty();
    let (shape, mut notes) = match &imported.alternative {
        Some(other) if !fits(&imported.shape) && fits(other) => (
            other,
            vec!["its `norm_output` is read as SpecForge's: whether the projection reads the normed output".to_owned()],
        ),
        _ => (&imported.shape, Vec::new()),
    };
    let mut wrong = differences(shape, &own);
    if imported.vocabulary.as_ref() != vocabulary {
        let tokens = |map: Option<&VocabMap>| map.map_or(own.vocab_size, VocabMap::draft_size);
        let (theirs, ours) = (tokens(imported.vocabulary.as_ref()), tokens(vocabulary));
        let folder = if path.is_dir() { path } else { Path::new("the imported folder") };
        let what = if theirs == ours { "of other tokens".to_owned() } else { format!("{theirs} there, {ours} here") };
        wrong.push(format!("vocabulary map: {what} (draft.vocab_map={}/model.safetensors)", folder.display()));
    }
    if !wrong.is_empty() {
        let problem = format!("{} is another draft than the one configured:\n  {}", path.display(), wrong.join("\n  "));
        let hint = match path.is_dir() {
            true => format!(
                "set these keys; draft.config={} takes the architecture from there",
                path.join("config.json").display()
            ),
            false => {
                "set these keys; `specforge import` makes a folder whose config.json draft.config can name".to_owned()
            }
        };
        return Err(Error::config(START_KEY, problem).with_hint(hint));
    }
    let _no_grad = tch::no_grad_guard();
    for parameter in draft.parameters() {
        let found = imported.tensors.iter().find(|(name, _)| *name == parameter.name);
        let (_, value) = found.filter(|(_, value)| value.size() == parameter.value.size()).ok_or_else(|| {
            Error::bad_file(path, format!("holds no tensor `{}` of shape {:?}", parameter.name, parameter.value.size()))
        })?;
        parameter.value.shallow_clone().f_copy_(value)?;
    }
    if let Some(own) = &imported.embedding
        && is_other_embedding(own, embedding)?
    {
        notes.push(
            "warning: it has an embedding that is not the target's; the draft is trained on the target's".to_owned(),
        );
    }
    notes.extend(imported.warnings);
    Ok(notes)
}

/// What two shapes do not share, with the keys that set it. Lengths aside: they do not change what a tensor means.
pub(in crate::export) fn differences(theirs: &Eagle3Shape, ours: &Eagle3Shape) -> Vec<String> {
    let mut found = Vec::new();
    let mut compare = |what: &str, key: &str, theirs: String, ours: String| {
        if theirs != ours {
            found.push(format!("{what}: {theirs} there, {ours} here ({key})"));
        }
    };
    let (left, right) = (&theirs.layer, &ours.layer);
    let numbers = [
        ("vocab_size", theirs.vocab_size, ours.vocab_size, "the target's"),
        ("target_hidden_size", theirs.target_hidden_size, ours.target_hidden_size, "the target's"),
        ("draft_vocab_size", theirs.draft_vocab_size, ours.draft_vocab_size, "draft.draft_vocab_size"),
        ("hidden_size", theirs.hidden_size, ours.hidden_size, "draft.config"),
        ("num_hidden_layers", theirs.num_layers as i64, ours.num_layers as i64, "draft.config"),
        ("intermediate_size", left.intermediate_size, right.intermediate_size, "draft.config"),
        ("num_attention_heads", left.num_attention_heads, right.num_attention_heads, "draft.config"),
        ("num_key_value_heads", left.num_key_value_heads, right.num_key_value_heads, "draft.config"),
        ("head_dim", left.head_dim, right.head_dim, "draft.config"),
    ];
    for (what, theirs, ours, key) in numbers {
        compare(what, key, theirs.to_string(), ours.to_string());
    }
    compare("captured layers", "draft.capture", format!("{:?}", theirs.capture), format!("{:?}", ours.capture));
    compare("rms_norm_eps", "draft.config", left.rms_norm_eps.to_string(), right.rms_norm_eps.to_string());
    compare("rope_theta", "draft.config", left.rope.theta.to_string(), right.rope.theta.to_string());
    compare("rope_scaling", "draft.config", format!("{:?}", left.rope.scaling), format!("{:?}", right.rope.scaling));
    let flags = [
        ("fc_norm", theirs.fc_norm, ours.fc_norm),
        ("norm_before_fc", theirs.norm_before_fc, ours.norm_before_fc),
        ("norm_before_residual", theirs.norm_before_residual, ours.norm_before_residual),
        ("norm_output", theirs.norm_output, ours.norm_output),
        ("norm_feedback", theirs.norm_feedback, ours.norm_feedback),
        ("norms of heads", theirs.head_norms, ours.head_norms),
    ];
    for (what, theirs, ours) in flags {
        compare(what, "draft.config", theirs.to_string(), ours.to_string());
    }
    found
}
