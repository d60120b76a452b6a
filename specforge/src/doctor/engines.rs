//! What serving engines make of the folder, by the rules of their own loaders.

use super::case::Case;
use super::finding::Findings;
use crate::error::Result;
use crate::export::EngineReport;

/// See the file's own words.
pub fn look(case: &Case<'_>, found: &mut Findings) -> Result<()> {
    let Ok(report) = &case.folder.loads else { return Ok(()) };
    let asked: Vec<&EngineReport> =
        report.engines.iter().filter(|known| case.engine.is_none_or(|engine| engine == known.engine)).collect();
    if let Some(engine) = case.engine.filter(|_| asked.is_empty()) {
        let text = format!("{} does not serve the {} layout", engine.name(), report.format);
        found.fault(text, "docs/engines.md says which engine serves which layout");
    }
    let unserved = !asked.is_empty() && asked.iter().all(|known| !known.problems.is_empty());
    for known in asked {
        let name = known.engine.name();
        if known.problems.is_empty() && known.unserved.is_none() {
            found.ok(format!("{name} serves it"));
        }
        if let Some(problem) = &known.unserved {
            let (text, advice) =
                (format!("{name} {problem}"), "another engine, or another version of it, may: docs/engines.md");
            match case.engine.is_some() {
                true => found.fault(text, advice),
                false => found.warning(text, advice),
            }
        }
        for problem in &known.problems {
            let (text, advice) = (format!("{name} {problem}"), "see `specforge export --engine` and docs/engines.md");
            match unserved {
                true => found.fault(text, advice),
                false => found.warning(text, advice),
            }
        }
    }
    Ok(())
}
