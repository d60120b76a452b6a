//! The files once more: who speaks in each conversation, and where it stands.

use std::collections::HashMap;
use std::path::PathBuf;

use rayon::prelude::*;

use super::super::conversation::{Sample, parse_record, record_name};
use super::super::reader::SourceFile;
use crate::error::Result;

/// The first record of some content.
#[derive(Debug, Clone)]
pub struct First {
    /// Its file.
    pub path: PathBuf,
    /// The line it begins on.
    pub line: usize,
    /// Who speaks, in the order of their first words.
    pub roles: Vec<String>,
}

/// All records that can be read, by what they say.
#[derive(Debug, Default)]
pub struct Records {
    by_content: HashMap<u64, First>,
}

impl Records {
    /// Reads files. Records with faults are passed over: others speak of them.
    pub fn read(paths: &[PathBuf]) -> Result<Self> {
        let mut all = Self::default();
        for path in paths {
            let source = SourceFile::open(path)?;
            let read = source.records().par_iter().map(|record| {
                let parsed = parse_record(source.record(record), || record_name(path, record.line)).ok()?;
                Some((parsed.sample.content_key(), roles(&parsed.sample), record.line))
            });
            let read: Vec<_> = read.collect();
            for (content, roles, line) in read.into_iter().flatten() {
                all.by_content.entry(content).or_insert_with(|| First { path: path.clone(), line, roles });
            }
        }
        Ok(all)
    }

    /// The first record of this content.
    pub fn of(&self, content: u64) -> Option<&First> {
        self.by_content.get(&content)
    }
}

fn roles(sample: &Sample) -> Vec<String> {
    let names: Vec<&str> = match sample {
        Sample::Conversation(conversation) => {
            conversation.messages.iter().map(|message| message.role.as_str()).collect()
        }
        Sample::Text { .. } => vec!["text"],
        Sample::Completion { .. } => vec!["prompt", "completion"],
        Sample::Tokens { .. } => vec!["tokens"],
    };
    let mut roles: Vec<String> = Vec::new();
    for name in names {
        if !roles.iter().any(|known| known == name) {
            roles.push(name.to_owned());
        }
    }
    roles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_record_of_some_words_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        let line = |id: &str, said: &str| {
            let messages = format!(r#"{{"role": "user", "content": "{said}"}}, {{"role": "tool", "content": "1"}}"#);
            format!(r#"{{"id": "{id}", "messages": [{messages}]}}"#)
        };
        let lines = ["broken".to_owned(), line("a", "x"), line("b", "x"), r#"{"text": "y"}"#.to_owned()];
        std::fs::write(&path, lines.join("\n")).unwrap();
        let records = Records::read(&[path]).unwrap();
        let mut found: Vec<_> = records.by_content.values().map(|first| (first.line, first.roles.join(" "))).collect();
        found.sort();
        assert_eq!(found, [(2, "user tool".to_owned()), (4, "text".to_owned())]);
    }
}
