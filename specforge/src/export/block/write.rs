//! Writes a drafter, and refuses one that a layout cannot describe.

use std::path::Path;

use tch::{Kind, Tensor};

use super::drafter::Drafter;
use super::head::Head;
use super::method::{Layout, Method};
use super::tensors::{D2T, LM_HEAD, MASK_EMBEDDING, T2D, needed};
use super::{CONFIG_FILE, WEIGHTS_FILE, config, mask};
use crate::draft::block::config::Layout as Rows;
use crate::draft::{Parameter, vocabulary};
use crate::error::{Error, Result};
use crate::export::Source;
use crate::export::medusa::dtype;
use crate::files;
use crate::models;
use crate::weights::writer;

/// Writes a folder.
pub(super) fn write(source: &Source, out: &Path, layout: Layout) -> Result<()> {
    let drafter = Drafter::described(&source.description)
        .map_err(|problem| Error::Failed(format!("the checkpoint is not one of a block drafter: {problem}")))?;
    expressible(&drafter, layout).map_err(|problem| {
        Error::Failed(format!("{} in the format `{}`: {problem}", drafter.method.name(), super::format_name(layout)))
    })?;
    let kind = source.kind.unwrap_or(Kind::BFloat16);
    let (tensors, mask_row) = stored(source, &drafter, kind)?;
    let values = match layout {
        Layout::Zlab => config::zlab(&drafter, source, dtype(kind)),
        Layout::Speculators => config::speculators(&drafter, source, dtype(kind)),
    };
    writer::write_tensors(&out.join(WEIGHTS_FILE), &tensors, &[])?;
    if let Some(row) = mask_row {
        mask::write(&out.join(mask::FILE), drafter.shape.mask_token_id, &row)?;
    }
    files::write_json(&out.join(CONFIG_FILE), &values)
}

/// Refuses what a layout has no words for: a file would say something else than what was trained.
fn expressible(drafter: &Drafter, layout: Layout) -> Result<(), String> {
    let Drafter { method, shape, head } = drafter;
    let sliding = |window: &Option<i64>| window.is_some();
    let mut windows: Vec<i64> = shape.layers.iter().filter_map(|layer| layer.window).collect();
    windows.dedup();
    if windows.len() > 1 {
        return Err(format!("layers have windows of {windows:?}; `sliding_window` is one for all"));
    }
    if shape.layers.is_empty() {
        return Err("expected at least one layer".to_owned());
    }
    let by_type = shape.layers.iter().all(|layer| layer.causal == sliding(&layer.window));
    if config::one_causality(shape).is_none() && !by_type {
        return Err(
            "some layers are causal in the block and others not, and not the sliding ones alone: `is_causal` is one \
             for all, and without it sliding layers are causal and full ones not"
                .to_owned(),
        );
    }
    if !shape.target_layer_ids.windows(2).all(|pair| pair[0] < pair[1]) {
        let ids = &shape.target_layer_ids;
        return Err(format!("the target's layers {ids:?} do not ascend; engines hand them over low to high"));
    }
    if shape.layout == Rows::Shift && !matches!(method, Method::Dspark | Method::Domino) {
        return Err(
            "rows predict the token behind them (layout shift), for which engines have no key: they take row j for the \
             token in its place (vLLM refuses `sample_from_anchor`)"
                .to_owned(),
        );
    }
    if shape.draft_vocab_size < shape.vocab_size && !matches!(method, Method::Dflash | Method::Dspark) {
        let (has, all) = (shape.draft_vocab_size, shape.vocab_size);
        return Err(format!("the draft names {has} of {all} tokens; engines run this kind with all of them alone"));
    }
    if matches!(head, Head::Markov(keys) if keys.anchor_row_writes_state) && shape.layout == Rows::FillIn {
        return Err(
            "the anchor's row writes the recurrent state (`anchor_row_writes_state`); engines begin with the first draft"
                .to_owned(),
        );
    }
    match layout {
        Layout::Zlab => Ok(()),
        Layout::Speculators => expressible_there(drafter),
    }
}

/// What speculators' layout cannot say beside that.
fn expressible_there(drafter: &Drafter) -> Result<(), String> {
    let Drafter { method, shape, head, .. } = drafter;
    match method {
        Method::Lilicorr | Method::Domino => {
            return Err(format!("speculators has no {}; write --format {}", method.name(), super::ZLAB.name));
        }
        Method::Xpress => {
            return Err(format!("no engine loads speculators' xpress; write --format {}", super::ZLAB.name));
        }
        Method::Dflash | Method::Dflash2 | Method::Dspark => {}
    }
    match config::one_causality(shape) {
        None => {
            return Err(format!(
                "sliding layers are causal in the block and full ones are not: vLLM makes of \
                 `sliding_window_non_causal` one flag for all layers and would serve the full ones causal; write \
                 --format {}",
                super::ZLAB.name
            ));
        }
        Some(true) if shape.layers.iter().any(|layer| layer.window.is_none()) => {
            return Err("full layers are causal in the block; in speculators they never are".to_owned());
        }
        Some(_) => {}
    }
    if matches!(head, Head::Selector(keys) if keys.output_multiplier != 1.0 || keys.final_logit_softcapping.is_some()) {
        return Err("`output_multiplier` and `final_logit_softcapping` have no place there".to_owned());
    }
    if shape.input_embedding_scale != 1.0 {
        return Err("`input_embedding_scale` has no place there".to_owned());
    }
    if shape.conv.is_some() && *method != Method::Dflash2 {
        return Err("only dflash2 has convolutions there".to_owned());
    }
    Ok(())
}

/// Tensors by name, and the row of the mask where it has a file of its own.
type Stored = (Vec<(String, Tensor)>, Option<Tensor>);

/// What is written of a drafter, by the engines' names.
fn stored(source: &Source, drafter: &Drafter, kind: Kind) -> Result<Stored> {
    let shape = &drafter.shape;
    let find = |name: &str| source.tensors.iter().find(|(other, _)| other == name).map(|(_, tensor)| tensor);
    let failed = |problem: String| Error::Failed(format!("the checkpoint: {problem}"));
    let take = |name: &str, want: &[i64]| match find(name) {
        Some(tensor) if tensor.size() == want => Ok(tensor.f_to_kind(kind)?),
        Some(tensor) => Err(failed(format!("tensor `{name}`: expected shape {want:?}, got {:?}", tensor.size()))),
        None => Err(failed(format!("holds no tensor `{name}` of shape {want:?}"))),
    };
    let mut names = needed(shape, &drafter.head);
    names.sort();
    let mut tensors = Vec::new();
    for (name, want) in &names {
        tensors.push((name.clone(), take(name, want)?));
    }
    let mask_row = shape.mask_embedding.then(|| take(MASK_EMBEDDING, &[shape.hidden_size])).transpose()?;
    if shape.draft_vocab_size < shape.vocab_size {
        tensors.push((LM_HEAD.to_owned(), reduced_head(source, drafter)?.f_to_kind(kind)?));
        for name in [D2T, T2D] {
            let table = find(name).ok_or_else(|| failed(format!("holds no tensor `{name}`")))?;
            tensors.push((name.to_owned(), table.shallow_clone()));
        }
    }
    // Engines pass over what they do not know, or refuse it: nothing trained may be left behind unseen.
    let known = |name: &str| {
        names.iter().any(|(known, _)| known == name) || [MASK_EMBEDDING, D2T, T2D, LM_HEAD].contains(&name)
    };
    let left =
        source.tensors.iter().map(|(name, _)| name).find(|name| !known(name) && Parameter::target_name(name).is_none());
    match left {
        Some(name) => Err(failed(format!("tensor `{name}` has no place in a {} folder", drafter.method.name()))),
        None => Ok((tensors, mask_row)),
    }
}

/// The rows of the target's projection that a smaller vocabulary reads: engines want them in the file.
fn reduced_head(source: &Source, drafter: &Drafter) -> Result<Tensor> {
    if let Some((_, own)) = source.tensors.iter().find(|(name, _)| name == LM_HEAD) {
        return Ok(own.shallow_clone());
    }
    let head = models::load_head(&source.target)?;
    let (want, got) = (vec![drafter.shape.vocab_size, drafter.shape.hidden_size], head.weight.size());
    if want != got || !head.is_plain() {
        let problem = format!(
            "the target's head: expected a plain one of shape {want:?}, whose rows engines read from the draft's file; \
             got one of {got:?}{}",
            if head.is_plain() { "" } else { " with a bias, a scale or a cap" }
        );
        return Err(Error::bad_file(&source.target, problem));
    }
    match vocabulary::from_tensors(&source.tensors)? {
        Some(map) => Ok(vocabulary::gather_rows(&head, &map)?.start()),
        None => Ok(head.start()),
    }
}
