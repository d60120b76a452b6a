//! Whether the folder is what its config.json says: a known architecture, names as engines expect them, and a draft that
//! this program's own strict reader takes.

use serde_json::Value;

use super::case::Case;
use super::finding::Findings;
use crate::error::Result;
use crate::export;

/// See the file's own words.
pub fn look(case: &Case<'_>, found: &mut Findings) -> Result<()> {
    let folder = &case.folder;
    if folder.format.is_none() {
        let names = folder.config.get("architectures").unwrap_or(&Value::Null);
        match &case.eagle3 {
            Some(_) => found.fault(
                format!(
                    "`architectures` is {names}, which engines take for an ordinary model; the tensors are those of an \
                     EAGLE-3 draft, expected [\"{}\"]",
                    export::eagle3::ARCHITECTURE
                ),
                "write the expected name into config.json, or export the checkpoint again",
            ),
            None => found.fault(
                format!("config.json, `architectures` {names}, is of no known draft"),
                "name a folder that `specforge export` wrote, or a published draft of one of its formats",
            ),
        }
    }
    if let Some(problem) = &folder.unread {
        found.fault(problem, "fetch or write the weights again");
    }
    if let Some(name) = &folder.prefixed {
        found.fault(
            format!(
                "tensor names begin with `{}`, such as `{name}`; engines put that before names themselves",
                super::folder::PREFIX
            ),
            "rename the tensors, or export the checkpoint again",
        );
    }
    match &folder.loads {
        Ok(report) => {
            found.ok(format!("{} layout, {} tensors, {}", report.format, report.tensors, report.dtype));
            for warning in &report.warnings {
                found.warning(warning, "see `specforge export --check`");
            }
        }
        // What the words above say is not said again.
        Err(problem) if found.is_sound() => {
            found.fault(format!("cannot be loaded: {problem}"), "mend what the other lines name, or export it again");
        }
        Err(_) => {}
    }
    Ok(())
}
