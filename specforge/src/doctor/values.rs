//! Whether every number is the one that was trained, rounded to the file's type: against the checkpoint, bit for bit.

use tch::{Kind, Tensor};

use super::case::Case;
use super::eagle3::tensors;
use super::finding::Findings;
use crate::error::Result;
use crate::export;

/// See the file's own words.
pub fn look(case: &Case<'_>, found: &mut Findings) -> Result<()> {
    let Some(origin) = case.origin.as_ref() else {
        found.ok("nothing says which checkpoint it was written from: not compared (--checkpoint names one)");
        return Ok(());
    };
    let Some(trained) = &origin.tensors else {
        found.ok(format!("the checkpoint {} is gone: not compared", origin.path.display()));
        return Ok(());
    };
    let stored: Vec<(String, Tensor)> = match &case.eagle3 {
        Some(_) => case.folder.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect(),
        None => export::medusa::read(&case.folder.path).map(|heads| heads.tensors).unwrap_or_default(),
    };
    let mut compared = 0;
    for (name, want) in trained {
        let Some((_, got)) = stored.iter().find(|(other, _)| other == name) else { continue };
        compared += 1;
        let rounded = want.f_to_kind(got.kind())?;
        if got.size() == rounded.size() && got.equal(&rounded) {
            continue;
        }
        let what = difference(got, &rounded, case, name)?;
        found.fault(format!("`{name}` {what}"), "export the checkpoint again");
    }
    if found.is_sound() && compared > 0 {
        found.ok(format!("{compared} tensors equal {} bit for bit", origin.path.display()));
    }
    Ok(())
}

/// How a tensor comes from the one that was trained.
fn difference(got: &Tensor, want: &Tensor, case: &Case<'_>, name: &str) -> Result<String> {
    if got.dim() == 2 && want.dim() == 2 && got.equal(&want.f_t_copy()?) {
        return Ok("is the transpose of the one that was trained".to_owned());
    }
    if got.size() != want.size() {
        return Ok(format!("is of shape {:?}, trained was {:?}", got.size(), want.size()));
    }
    if let Some(what) = case.eagle3.as_ref().and_then(|own| tensors::permuted(own, name, got, want)) {
        return Ok(what);
    }
    let differ = got.f_ne_tensor(want)?.f_sum(Kind::Int64)?.int64_value(&[]);
    let most = (got.to_kind(Kind::Double) - want.to_kind(Kind::Double)).abs().max().double_value(&[]);
    Ok(format!("differs from the one that was trained in {differ} of {} numbers, by up to {most:.3e}", got.numel()))
}
