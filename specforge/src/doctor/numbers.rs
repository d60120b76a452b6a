//! Whether the tensors hold numbers: none that are infinite or none at all, and none that are all zero.

use tch::Kind;

use super::case::Case;
use super::finding::Findings;
use crate::error::Result;

/// See the file's own words.
pub fn look(case: &Case<'_>, found: &mut Findings) -> Result<()> {
    let mut seen = 0;
    for (name, tensor) in case.folder.floats() {
        seen += 1;
        let wrong = tensor.f_isfinite()?.f_logical_not()?.f_sum(Kind::Int64)?.int64_value(&[]);
        if wrong > 0 {
            found.fault(
                format!("`{name}`: {wrong} of {} numbers are infinite or none", tensor.numel()),
                "export the checkpoint again; where it holds them too, go back to an older one",
            );
        } else if tensor.numel() > 0 && !bool::try_from(tensor.f_ne(0.0)?.f_any()?)? {
            found.fault(
                format!(
                    "`{name}` {:?} is zero everywhere: nobody trained it, or a tool wrote room without values",
                    tensor.size()
                ),
                "export the checkpoint again; where it is zero there too, that part was never trained",
            );
        }
    }
    if found.is_sound() && seen > 0 {
        found.ok(format!("all numbers of {seen} tensors are finite, no tensor is zero"));
    }
    Ok(())
}
