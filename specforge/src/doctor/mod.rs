//! What is wrong with a draft beside its target. A draft that trains well and guesses nothing where it is served mostly
//! broke a contract in silence: each part of that contract is a check here, one a file, and says what it found.
//!
//! Checks look at the folder as it lies there, against the target, against itself, and against the checkpoint it was written
//! from where that is known. Then a few prompts are decoded; where guesses are bad, the files are read in all the ways that
//! known mistakes read them, and the one that makes guesses right is named.

use std::path::PathBuf;

use serde::Serialize;

use crate::error::Result;

pub mod acceptance;
pub mod case;
pub mod eagle3;
pub mod engines;
pub mod files;
pub mod finding;
pub mod folder;
pub mod ids;
pub mod launch;
pub mod numbers;
pub mod origin;
pub mod report;
pub mod target;
pub mod template;
pub mod tokenizer;
pub mod training;
pub mod types;
pub mod values;

pub use acceptance::{Decoding, Measured};
pub use case::Case;
pub use finding::{Finding, Findings, Verdict};
pub use launch::{Launch, Prices};

/// A check of the files.
pub struct Check {
    /// Its name in reports.
    pub name: &'static str,
    /// Says what it finds; nothing where it does not apply.
    pub look: fn(&Case<'_>, &mut Findings) -> Result<()>,
}

/// Every check of the files, in the order of reports: what others build on comes first.
pub const CHECKS: &[Check] = &[
    Check { name: "files", look: files::look },
    Check { name: "tensors", look: eagle3::tensors::look },
    Check { name: "numbers", look: numbers::look },
    Check { name: "types", look: types::look },
    Check { name: "training", look: training::look },
    Check { name: "target", look: target::look },
    Check { name: "tokenizer", look: tokenizer::look },
    Check { name: "template", look: template::look },
    Check { name: "layers", look: eagle3::layers::look },
    Check { name: "rope", look: eagle3::rope::look },
    Check { name: "context", look: eagle3::context::look },
    Check { name: "vocabulary", look: eagle3::vocabulary::look },
    Check { name: "head", look: eagle3::head::look },
    Check { name: "norms", look: eagle3::norms::look },
    Check { name: "ids", look: ids::look },
    Check { name: "values", look: values::look },
    Check { name: "logits", look: eagle3::logits::look },
    Check { name: "engines", look: engines::look },
];

/// Name of the check that decodes.
pub const ACCEPTANCE: &str = "acceptance";

/// What a doctor says.
#[derive(Debug, Clone, Serialize)]
pub struct Diagnosis {
    /// The target.
    pub target: PathBuf,
    /// The draft.
    pub draft: PathBuf,
    /// The checkpoint it was compared with.
    pub checkpoint: Option<PathBuf>,
    /// A line or more for each check.
    pub findings: Vec<Finding>,
    /// What was decoded.
    pub acceptance: Option<Measured>,
    /// What the number of guesses follows from.
    pub prices: Option<Prices>,
    /// How engines are started.
    pub launch: Vec<Launch>,
    /// Findings that are faults.
    pub faults: usize,
}

/// Looks at everything: the files, and what they are worth where there is something to decode. `prices` are those of an
/// evaluation, where there was one.
pub fn examine(case: &Case<'_>, decoding: Option<&Decoding>, prices: Option<Prices>) -> Result<Diagnosis> {
    let mut findings = Vec::new();
    for check in CHECKS {
        let mut found = Findings::of(check.name);
        (check.look)(case, &mut found)?;
        findings.extend(found.into_list());
    }
    let mut acceptance = None;
    if let Some(decoding) = decoding {
        let mut found = Findings::of(ACCEPTANCE);
        let explain = |measured: &Measured| eagle3::hypotheses::explain(case, decoding, measured);
        acceptance = acceptance::look(case, decoding, explain, &mut found)?;
        findings.extend(found.into_list());
    }
    let prices = prices.or_else(|| acceptance.as_ref().map(Prices::of));
    let launch = prices.as_ref().map_or_else(Vec::new, |prices| launch::lines(case, prices.best().0));
    let faults = findings.iter().filter(|finding| finding.verdict == Verdict::Fault).count();
    let checkpoint = case.origin.as_ref().filter(|origin| origin.tensors.is_some());
    Ok(Diagnosis {
        target: case.target.path.to_path_buf(),
        draft: case.folder.path.clone(),
        checkpoint: checkpoint.map(|origin| origin.path.clone()),
        findings,
        acceptance,
        prices,
        launch,
        faults,
    })
}
