//! Reads `vocab_mapping.pt`, as SpecForge writes it: what `torch.save` makes of `{"d2t": int64, "t2d": bool}`.

use std::path::Path;

use crate::error::{Error, Result};
pub(super) use crate::files::torch_file::MAGIC;
use crate::files::torch_file::TorchFile;

/// Most elements of a tensor: far more than any vocabulary has.
const MOST_ELEMENTS: u64 = 1 << 24;

/// The two tables of a file.
pub(super) fn read(path: &Path) -> Result<(Vec<i64>, Vec<bool>)> {
    let refuse = |problem: String| {
        Error::bad_file(path, problem).with_hint(
            "expected what torch.save writes of {\"d2t\": int64 tensor, \"t2d\": bool tensor}; make a new map with \
             `specforge vocab`",
        )
    };
    let mut file = TorchFile::open(path).map_err(refuse)?;
    let d2t = elements(&mut file, "d2t", "LongStorage", 8).map_err(refuse)?;
    let t2d = elements(&mut file, "t2d", "BoolStorage", 1).map_err(refuse)?;
    let d2t = d2t.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes));
    if let Some(place) = t2d.iter().position(|byte| *byte > 1) {
        return Err(refuse(format!("`t2d[{place}]` is neither true nor false")));
    }
    Ok((d2t.collect(), t2d.iter().map(|byte| *byte == 1).collect()))
}

/// The bytes of a tensor with one axis.
fn elements(file: &mut TorchFile, name: &str, storage: &str, width: u64) -> Result<Vec<u8>, String> {
    let header = file.header(name).ok_or_else(|| format!("holds no tensor `{name}`"))?;
    if header.storage != storage {
        return Err(format!("`{name}`: expected elements of {storage}, got {}", header.storage));
    }
    if header.shape.len() != 1 {
        return Err(format!("`{name}`: expected one axis, got shape {:?}", header.shape));
    }
    file.elements(name, width, MOST_ELEMENTS)
}
