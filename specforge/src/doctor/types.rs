//! Element types: one in the whole file, the one that config.json says, and one that holds the numbers.

use serde_json::Value;
use tch::{Kind, Tensor};

use super::case::Case;
use super::finding::Findings;
use crate::error::Result;
use crate::export;

/// The largest float16.
const MOST_HALF: f64 = 65504.0;
/// Numbers above this share of it are near enough to its end to be looked at.
const NEAR: f64 = 0.9;

/// See the file's own words.
pub fn look(case: &Case<'_>, found: &mut Findings) -> Result<()> {
    let floats = || case.folder.floats();
    let Some((first, kind)) = floats().next().map(|(name, tensor)| (name, tensor.kind())) else { return Ok(()) };
    let name = export::medusa::dtype(kind);
    if let Some((other, tensor)) = floats().find(|(_, tensor)| tensor.kind() != kind) {
        found.fault(
            format!("`{first}` is {name}, `{other}` {}: engines want one type", export::medusa::dtype(tensor.kind())),
            "export the checkpoint again with --dtype",
        );
    }
    let is_short = |tensor: &Tensor| tensor.is_floating_point() && tensor.kind().elt_size_in_bytes() == 1;
    if let Some((name, tensor)) = case.folder.tensors.iter().find(|(_, tensor)| is_short(tensor)) {
        found.fault(
            format!(
                "`{name}` is quantised ({:?}): the engines take drafts in float32, bfloat16 or float16",
                tensor.kind()
            ),
            "export the checkpoint again with --dtype",
        );
    }
    let said = ["torch_dtype", "dtype"].iter().find_map(|key| case.folder.config.get(*key).and_then(Value::as_str));
    if let Some(said) = said.filter(|said| said.strip_prefix("torch.").unwrap_or(said) != name) {
        found.warning(
            format!("config.json says {said}, the tensors are {name}"),
            "write the tensors' type into config.json: engines round to what it says",
        );
    }
    if kind == Kind::Half {
        for (name, tensor) in floats() {
            let most = tensor.to_kind(Kind::Double).abs().nan_to_num(f64::INFINITY, None, None).max();
            let most = if tensor.numel() == 0 { 0.0 } else { most.double_value(&[]) };
            let trained = case.origin.as_ref().and_then(|origin| origin.tensor(name));
            let was = trained.map(|tensor| tensor.to_kind(Kind::Double).abs().max().double_value(&[]));
            if !most.is_finite() || most >= MOST_HALF || was.is_some_and(|was| was > MOST_HALF) {
                let was = was.map_or(String::new(), |was| format!("; in training the largest was {was:.3e}"));
                found.fault(
                    format!("`{name}` is beyond float16, which ends at {MOST_HALF}{was}"),
                    "export with --dtype bfloat16 or float32",
                );
            } else if most > NEAR * MOST_HALF {
                found.warning(
                    format!("`{name}` goes up to {most:.0}, float16 ends at {MOST_HALF}"),
                    "export with --dtype bfloat16 or float32",
                );
            }
        }
    }
    if found.is_sound() {
        found.ok(format!("{name} throughout"));
    }
    Ok(())
}
