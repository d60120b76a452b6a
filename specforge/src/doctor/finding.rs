//! What a check says: what was found, whether it is a fault, and what to do.

use serde::Serialize;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// May be meant, and may cost acceptance.
    Warning,
    /// Engines cannot serve the draft as it was trained.
    Fault,
}

impl Verdict {
    /// The word of a report.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Fault => "FAULT",
        }
    }
}

/// One line of a report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Name of the check.
    pub check: &'static str,
    /// How bad it is.
    pub verdict: Verdict,
    /// What was found, with expected and got.
    pub found: String,
    /// What to do.
    pub advice: Option<String>,
}

/// What one check finds.
#[derive(Debug)]
pub struct Findings {
    check: &'static str,
    list: Vec<Finding>,
}

impl Findings {
    /// Nothing yet.
    pub fn of(check: &'static str) -> Self {
        Self { check, list: Vec::new() }
    }

    /// Something that is as it should be.
    pub fn ok(&mut self, found: impl Into<String>) {
        self.push(Verdict::Ok, found.into(), None);
    }

    /// Something that may be meant.
    pub fn warning(&mut self, found: impl Into<String>, advice: impl Into<String>) {
        self.push(Verdict::Warning, found.into(), Some(advice.into()));
    }

    /// Something that is wrong.
    pub fn fault(&mut self, found: impl Into<String>, advice: impl Into<String>) {
        self.push(Verdict::Fault, found.into(), Some(advice.into()));
    }

    fn push(&mut self, verdict: Verdict, found: String, advice: Option<String>) {
        self.list.push(Finding { check: self.check, verdict, found, advice });
    }

    /// Whether nothing worse than `ok` was found so far.
    pub fn is_sound(&self) -> bool {
        self.list.iter().all(|finding| finding.verdict == Verdict::Ok)
    }

    /// The lines, in order.
    pub fn into_list(self) -> Vec<Finding> {
        self.list
    }
}
