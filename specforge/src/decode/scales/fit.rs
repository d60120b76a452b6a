//! Whether models belong together.

use crate::error::{Error, Result};
use crate::models::var::Var;
use crate::models::vqvae::quantizer::Quantizer;

/// Refuses a quantiser that is not the one a transformer was trained with.
pub(super) fn fits_quantizer(target: &Var, quantizer: &Quantizer) -> Result<()> {
    let (model, codes) = (target.config(), quantizer.config());
    for (key, want, got) in
        [("vocab_size", model.vocab_size, codes.vocab_size), ("z_channels", model.z_channels, codes.z_channels)]
    {
        if want != got {
            return Err(Error::config(key, format!("the target has {want}, the image tokenizer {got}"))
                .with_hint("name the image tokenizer that the target was trained with, by --vae"));
        }
    }
    if model.patch_nums != codes.patch_nums {
        let (want, got) = (&model.patch_nums, &codes.patch_nums);
        return Err(Error::config("patch_nums", format!("the target has {want:?}, the image tokenizer {got:?}"))
            .with_hint("name the image tokenizer that the target was trained with, by --vae"));
    }
    match target.kind() == quantizer.kind() {
        true => Ok(()),
        false => Err(Error::config(
            "vae",
            format!("the target is {:?}, the image tokenizer {:?}", target.kind(), quantizer.kind()),
        )),
    }
}

/// Refuses a draft that speaks of other scales, codes or labels than its target.
pub(super) fn fits_draft(target: &Var, draft: &Var) -> Result<()> {
    let (want, got) = (target.config(), draft.config());
    for (key, want, got) in [
        ("vocab_size", want.vocab_size, got.vocab_size),
        ("z_channels", want.z_channels, got.z_channels),
        ("num_classes", want.num_classes, got.num_classes),
    ] {
        if want != got {
            return Err(Error::config(key, format!("the target has {want}, the draft {got}"))
                .with_hint("a draft has the image tokenizer and the labels of its target"));
        }
    }
    if want.patch_nums != got.patch_nums {
        let (want, got) = (&want.patch_nums, &got.patch_nums);
        return Err(Error::config("patch_nums", format!("the target has {want:?}, the draft {got:?}"))
            .with_hint("a draft has the scales of its target"));
    }
    match target.kind() == draft.kind() {
        true => Ok(()),
        false => {
            let (want, got) = (target.kind(), draft.kind());
            Err(Error::config("draft", format!("the target is {want:?}, the draft {got:?}")))
        }
    }
}
