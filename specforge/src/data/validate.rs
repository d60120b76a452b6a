//! Looks at every record of some files and says everything that is wrong with them, by kind.
//!
//! Records are read as for training. With a tokenizer they are rendered, masked and tokenised too, and nothing is kept.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Serialize;

use super::DataConfig;
use super::build::tokenise_parsed;
use super::conversation::{Parsed, Sample, parse_checked, record_name};
use super::fault::{Fault, FaultKind};
use super::reader::{Record, SourceFile};
use super::recorded::{Ids, Vocabulary};
use super::tokenizer::ChatTokenizer;
use crate::error::{Error, Result, foreign};

/// Records that are looked at together.
const CHUNK: usize = 1024;

/// What was found in some files.
#[derive(Debug, Clone, Serialize)]
pub struct Validation {
    /// Files that were named.
    pub files: usize,
    /// Records of those that could be read.
    pub records: usize,
    /// Records and files with at least one fault.
    pub faulty: usize,
    /// All faults; a record may have several.
    pub fault_count: usize,
    /// The faults by kind, in the order of the kinds.
    pub faults: Vec<Group>,
    /// What is no fault and may not be meant.
    pub warnings: Vec<Group>,
}

/// Findings of one kind.
#[derive(Debug, Clone, Serialize)]
pub struct Group {
    /// Its name, for programs.
    pub kind: String,
    /// In words.
    pub title: String,
    /// How many there are.
    pub count: usize,
    /// The first of them.
    pub examples: Vec<Finding>,
}

/// One finding.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// The file.
    pub path: PathBuf,
    /// Line on which the record begins, from 1; none where the whole file is meant.
    pub line: Option<usize>,
    /// What is wrong, with expected and got.
    pub problem: String,
}

/// Findings by their kind: a place in an order, a name and words.
#[derive(Default)]
struct Groups {
    groups: BTreeMap<(u8, &'static str), Group>,
    kept: usize,
}

impl Groups {
    fn add(&mut self, (order, kind, title): (u8, &'static str, &str), finding: impl FnOnce() -> Finding) {
        let group = self.groups.entry((order, kind)).or_insert_with(|| Group {
            kind: kind.to_owned(),
            title: title.to_owned(),
            count: 0,
            examples: Vec::new(),
        });
        group.count += 1;
        if group.examples.len() < self.kept {
            group.examples.push(finding());
        }
    }

    fn fault(&mut self, path: &Path, line: Option<usize>, Fault { kind, problem }: Fault) {
        self.add((kind as u8, kind.name(), kind.words()), || Finding { path: path.to_path_buf(), line, problem });
    }

    fn list(self) -> Vec<Group> {
        self.groups.into_values().collect()
    }
}

const PASSED_OVER: (u8, &str, &str) = (0, "passed_over", "keys that are not understood and passed over");
const UNTRAINED: (u8, &str, &str) = (1, "untrained", "nothing is trained");
const LONG: (u8, &str, &str) = (2, "long", "longer than the longest document");
const FOREIGN_IDS: (u8, &str, &str) = (3, "foreign_token_ids", "token ids of another tokenizer: the text is trained");
const DUPLICATE: (u8, &str, &str) = (4, "duplicate", "said before, word for word");
const EMPTY: (u8, &str, &str) = (5, "empty", "files without a record");

/// What one record is.
struct Looked {
    faults: Vec<Fault>,
    /// Kind and words.
    warnings: Vec<((u8, &'static str, &'static str), String)>,
    content: Option<u64>,
}

/// Looks at all records. `examples` of each kind are kept. `progress` is told how many records of a file are done, and of
/// how many. What is wrong with tokenizer or template itself is an error.
pub fn validate(
    paths: &[PathBuf],
    tokenizer: Option<&ChatTokenizer>,
    config: &DataConfig,
    examples: usize,
    progress: &dyn Fn(u64, u64),
) -> Result<Validation> {
    config.check()?;
    let groups = || Groups { kept: examples, ..Groups::default() };
    let (mut faults, mut warnings) = (groups(), groups());
    let (mut records, mut faulty, mut fault_count) = (0, 0, 0);
    let vocabulary = Vocabulary::default();
    let mut said: HashMap<u64, (PathBuf, usize)> = HashMap::new();
    for path in paths {
        let source = match SourceFile::open(path) {
            Ok(source) => source,
            Err(error) => {
                let (line, fault) = of_file(&error);
                faults.fault(path, line, fault);
                (faulty, fault_count) = (faulty + 1, fault_count + 1);
                continue;
            }
        };
        let all = source.records();
        records += all.len();
        if all.is_empty() {
            warnings.add(EMPTY, || Finding { path: path.clone(), line: None, problem: "holds no record".to_owned() });
        }
        for (done, chunk) in all.chunks(CHUNK).enumerate() {
            progress((done * CHUNK) as u64, all.len() as u64);
            let looked = chunk.par_iter().map(|record| look(&source, record, tokenizer.zip(Some(&vocabulary)), config));
            let looked: Vec<Result<Looked>> = looked.collect();
            for (record, looked) in chunk.iter().zip(looked) {
                let Looked { faults: found, warnings: doubtful, content } = looked?;
                faulty += usize::from(!found.is_empty());
                fault_count += found.len();
                found.into_iter().for_each(|fault| faults.fault(path, Some(record.line), fault));
                let mut warn = |kind, problem| {
                    warnings.add(kind, || Finding { path: path.clone(), line: Some(record.line), problem });
                };
                doubtful.into_iter().for_each(|(kind, problem)| warn(kind, problem));
                let Some(content) = content else { continue };
                match said.get(&content) {
                    Some((path, line)) => {
                        warn(DUPLICATE, format!("is the same as {}:{line}", foreign::path(path)));
                    }
                    None => drop(said.insert(content, (path.clone(), record.line))),
                }
            }
        }
        progress(all.len() as u64, all.len() as u64);
    }
    let (faults, warnings) = (faults.list(), warnings.list());
    Ok(Validation { files: paths.len(), records, faulty, fault_count, faults, warnings })
}

/// A file that cannot be read, as a fault with its line.
fn of_file(error: &Error) -> (Option<usize>, Fault) {
    let fault = |problem: String| Fault { kind: FaultKind::File, problem };
    match error {
        Error::BadLine { line, problem, .. } => (Some(*line), fault(problem.clone())),
        Error::BadFile { problem, hint, .. } => {
            let hint = hint.as_deref().map(|hint| format!("; {hint}")).unwrap_or_default();
            (None, fault(format!("{problem}{hint}")))
        }
        Error::Io { action, source, .. } => (None, fault(format!("cannot {action} it: {source}"))),
        other => (None, fault(other.to_string())),
    }
}

fn look(
    source: &SourceFile,
    record: &Record,
    asked: Option<(&ChatTokenizer, &Vocabulary)>,
    config: &DataConfig,
) -> Result<Looked> {
    let mut looked = Looked { faults: Vec::new(), warnings: Vec::new(), content: None };
    let parsed = match parse_checked(source.record(record), || record_name(source.path(), record.line)) {
        Ok(parsed) => parsed,
        Err(faults) => return Ok(Looked { faults, ..looked }),
    };
    looked.content = Some(parsed.sample.content_key());
    looked.warnings.extend(parsed.passed_over.iter().map(|key| (PASSED_OVER, key.clone())));
    let Some(asked) = asked else {
        if let Some(reason) = trains_nothing(&parsed) {
            looked.warnings.push((UNTRAINED, reason.to_owned()));
        }
        return Ok(looked);
    };
    let known = parsed.passed_over.len();
    let outcome = match tokenise_parsed(parsed, asked, config) {
        Ok(outcome) => outcome,
        Err(Error::Failed(problem)) => {
            looked.faults.push(Fault { kind: FaultKind::Rendering, problem });
            return Ok(looked);
        }
        Err(fatal) => return Err(fatal),
    };
    looked.warnings.extend(outcome.passed_over.into_iter().skip(known).map(|key| (PASSED_OVER, key)));
    if outcome.ids == Some(Ids::Foreign) {
        looked.warnings.push((FOREIGN_IDS, "its `token_ids` are of another vocabulary".to_owned()));
    }
    let longer = outcome.truncated + outcome.too_long;
    if longer > 0 {
        looked.warnings.push((LONG, format!("has more than {} tokens", config.max_length)));
    }
    if outcome.documents.is_empty() && outcome.without_supervision > 0 {
        let cut = if longer > 0 {
            "what is trained stands behind the longest length"
        } else {
            "nobody speaks who is trained"
        };
        looked.warnings.push((UNTRAINED, cut.to_owned()));
    }
    Ok(looked)
}

/// Why nothing of a record can be trained, whatever the template.
fn trains_nothing(Parsed { sample, train, .. }: &Parsed) -> Option<&'static str> {
    match sample {
        _ if !train => Some("says itself that it is not to be trained"),
        Sample::Conversation(conversation) if conversation.messages.is_empty() => Some("has no message"),
        Sample::Conversation(conversation) if !conversation.messages.iter().any(|message| message.is_assistant()) => {
            Some("the assistant does not speak")
        }
        Sample::Tokens { supervised, .. } if !supervised.contains(&1) => Some("its `loss_mask` is 0 everywhere"),
        _ => None,
    }
}

#[cfg(test)]
#[path = "validate_tests.rs"]
mod tests;
