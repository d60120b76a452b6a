//! Whether the tensors are those of the architecture, by name and shape.

use tch::Tensor;

use super::Eagle3;
use crate::doctor::case::Case;
use crate::doctor::finding::Findings;
use crate::error::Result;

const AGAIN: &str = "export the checkpoint again";
/// Tensors that a draft may have beside those that are trained.
const BESIDE: [&str; 3] = ["d2t", "t2d", "embed_tokens.weight"];

/// See the file's own words.
pub fn look(case: &Case<'_>, found: &mut Findings) -> Result<()> {
    let Some(own) = &case.eagle3 else { return Ok(()) };
    let shape = match (own.meant(), &own.shape) {
        (Some(shape), _) => shape,
        (None, Err(problem)) => {
            found.fault(format!("no architecture follows from config.json: {problem}"), "mend the key that is named");
            return Ok(());
        }
        (None, Ok(_)) => return Ok(()),
    };
    let tensors = &case.folder.tensors;
    let wanted = shape.tensors();
    for (name, want) in &wanted {
        match tensors.get(name).map(Tensor::size) {
            None => found.fault(format!("`{name}` {want:?} is missing: an engine leaves it as it was made"), AGAIN),
            Some(got) if got == *want => {}
            Some(got) if got.iter().rev().eq(want) => {
                found.fault(format!("`{name}` is transposed: expected {want:?}, got {got:?}"), AGAIN);
            }
            Some(got) => found.fault(format!("`{name}`: expected {want:?}, got {got:?}"), AGAIN),
        }
    }
    // Twins of norms, which one engine reads, are part of the layout.
    let is_twin = |name: &str| name.ends_with(".hidden_norm.weight");
    for (name, tensor) in tensors {
        let known = BESIDE.contains(&name.as_str()) || is_twin(name) || wanted.iter().any(|(other, _)| other == name);
        if !known {
            found.warning(
                format!(
                    "`{name}` {:?} belongs to nothing: an engine passes over it or refuses the file",
                    tensor.size()
                ),
                "write the key of config.json that asks for it, or leave it out",
            );
        }
    }
    if found.is_sound() {
        found.ok(format!("all {} tensors of the architecture are there, in their shapes", wanted.len()));
    }
    Ok(())
}

/// Rows of a projection of heads `[heads * D, in]` in the other order of a rotary embedding: neighbours that turn together
/// to halves that do, or the way back.
pub fn other_order(rows: &Tensor, head_dim: i64, to_halves: bool) -> Tensor {
    let (input, heads) = (rows.size()[1], rows.size()[0] / head_dim.max(1));
    let split = if to_halves { [heads, head_dim / 2, 2, input] } else { [heads, 2, head_dim / 2, input] };
    rows.view(split).transpose(1, 2).contiguous().view([heads * head_dim, input])
}

/// Says whether a tensor is the trained one with the rows of its heads in another order.
pub fn permuted(own: &Eagle3, name: &str, got: &Tensor, want: &Tensor) -> Option<String> {
    let head_dim = own.meant()?.layer.head_dim;
    let is_turned = ["q_proj.weight", "k_proj.weight"].iter().any(|end| name.ends_with(end));
    let fits = got.dim() == 2 && got.size() == want.size() && head_dim > 0 && got.size()[0] % head_dim == 0;
    let other = || [true, false].iter().any(|&to_halves| got.equal(&other_order(want, head_dim, to_halves)));
    (is_turned && fits && other()).then(|| {
        "is the one that was trained with the rows of each head in another order: as for rotary embeddings that turn \
         neighbours; engines turn halves"
            .to_owned()
    })
}
