//! What a user writes to mean something on a hub: `org/name`, `org/name@revision`, `hf://datasets/org/name/file`.

use std::fmt;
use std::path::Path;

use crate::error::{Error, Result};

/// How an address begins that can mean nothing but a hub.
const SCHEME: &str = "hf://";
/// The revision where none is named.
const DEFAULT_REVISION: &str = "main";

/// Kinds of repositories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Weights, tokenizer and configuration.
    Model,
    /// Files of data.
    Dataset,
}

/// A repository at a revision, and maybe one of its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    /// What it holds.
    pub kind: Kind,
    /// `org/name`.
    pub repo: String,
    /// Branch, tag or commit; the default branch where none is named.
    pub revision: Option<String>,
    /// A file below its root.
    pub file: Option<String>,
    /// Whether it was written as an address, which no local path goes before.
    pub is_address: bool,
}

impl Name {
    /// The model that a text names, if it has the form of a name: `org/name[@revision]`, with a GGUF file behind it where
    /// that is meant. Whether there is such a model is another question. An address that names no model is refused.
    pub fn model(text: &str) -> Result<Option<Self>> {
        let (address, rest) = match text.strip_prefix(SCHEME) {
            Some(rest) => (true, rest.strip_prefix("models/").unwrap_or(rest)),
            None => (false, text),
        };
        let name = parse(rest, Kind::Model, address)
            .filter(|name| !name.repo.starts_with("datasets/") && !name.repo.starts_with("spaces/"))
            .filter(|name| name.file.as_ref().is_none_or(|file| file.to_ascii_lowercase().ends_with(".gguf")));
        match name {
            None if address => Err(Error::Usage(format!(
                "`{text}` names no model: expected hf://ORG/NAME, hf://ORG/NAME@REVISION or hf://ORG/NAME/FILE.gguf"
            ))),
            name => Ok(name),
        }
    }

    /// The file of data that a text names, if it is an address.
    pub fn data(text: &str) -> Result<Option<Self>> {
        let Some(rest) = text.strip_prefix(SCHEME) else { return Ok(None) };
        let named = rest.strip_prefix("datasets/").and_then(|rest| parse(rest, Kind::Dataset, true));
        match named {
            Some(name) if name.file.as_ref().is_some_and(|file| file.contains(['*', '?'])) => {
                Err(Error::Usage(format!("`{text}` holds a pattern: name the files one by one")))
            }
            Some(name) if name.file.is_some() => Ok(Some(name)),
            _ => Err(Error::Usage(format!(
                "`{text}` names no file of a data set: expected hf://datasets/ORG/NAME/FILE or \
                 hf://datasets/ORG/NAME@REVISION/FILE"
            ))),
        }
    }

    /// The revision to ask for.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(DEFAULT_REVISION)
    }

    /// The commit, where the revision is one: forty hexadecimal digits.
    pub fn commit(&self) -> Option<&str> {
        self.revision.as_deref().filter(|revision| is_commit(revision))
    }

    /// The same thing as of one commit, so that it means the same for ever.
    pub fn at(&self, commit: &str) -> Self {
        Self { revision: Some(commit.to_owned()), ..self.clone() }
    }

    /// Whether a path is there, or is clearly meant, so that nobody is asked: local files go before a hub's. A folder called
    /// like the organisation is one of the user's own.
    pub fn is_local(&self, text: &str) -> bool {
        let organisation = self.repo.split('/').next().unwrap_or_default();
        !self.is_address && (Path::new(text).exists() || Path::new(organisation).is_dir())
    }
}

impl fmt::Display for Name {
    /// What [`Name::model`] or [`Name::data`] reads back.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Dataset => formatter.write_str("hf://datasets/")?,
            Kind::Model if self.is_address => formatter.write_str(SCHEME)?,
            Kind::Model => {}
        }
        formatter.write_str(&self.repo)?;
        if let Some(revision) = &self.revision {
            write!(formatter, "@{}", revision.replace('/', "%2F"))?;
        }
        match &self.file {
            Some(file) => write!(formatter, "/{file}"),
            None => Ok(()),
        }
    }
}

/// Whether a revision is a commit.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// `org/name[@revision][/file]`
fn parse(text: &str, kind: Kind, is_address: bool) -> Option<Name> {
    let (organisation, rest) = text.split_once('/')?;
    let end = rest.find(['@', '/']).unwrap_or(rest.len());
    let (name, rest) = rest.split_at(end);
    let (revision, file) = match rest.strip_prefix('@') {
        None => (None, rest.strip_prefix('/')),
        Some(rest) => {
            // References hold slashes; everybody else's are written as %2F.
            let parts = if rest.starts_with("refs/") { 3 } else { 1 };
            let end = rest.match_indices('/').nth(parts - 1).map_or(rest.len(), |(at, _)| at);
            let (revision, rest) = rest.split_at(end);
            let revision = match revision {
                "~parquet" => "refs/convert/parquet".to_owned(),
                other => other.replace("%2F", "/").replace("%2f", "/"),
            };
            (Some(revision), rest.strip_prefix('/'))
        }
    };
    let sound = is_part(organisation)
        && is_part(name)
        && revision.as_deref().is_none_or(is_revision)
        && file.is_none_or(is_file);
    sound.then(|| Name {
        kind,
        repo: format!("{organisation}/{name}"),
        revision,
        file: file.map(str::to_owned),
        is_address,
    })
}

/// One half of a repository's name, as hubs allow it.
fn is_part(text: &str) -> bool {
    let allowed = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '.');
    let edges = [text.chars().next(), text.chars().next_back()];
    (1..=96).contains(&text.len())
        && text.chars().all(allowed)
        && edges.iter().flatten().all(|letter| !matches!(letter, '-' | '.'))
        && !text.contains("--")
        && !text.contains("..")
}

fn is_revision(text: &str) -> bool {
    let allowed = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '.' | '/' | '+');
    !text.is_empty() && text.chars().all(allowed) && text.split('/').all(|part| !part.is_empty() && part != "..")
}

/// Whether a file's name stays below the folder it is put in.
pub(super) fn is_file(text: &str) -> bool {
    let is_plain = |part: &str| !matches!(part, "" | "." | "..");
    text.len() <= 1024 && text.split('/').all(is_plain) && !text.contains(['\\', '\0', '\n', '\r'])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(text: &str) -> Option<(String, Option<String>, Option<String>)> {
        Name::model(text).unwrap().map(|name| (name.repo, name.revision, name.file))
    }

    #[test]
    fn a_model_is_an_organisation_and_a_name() {
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(model("HuggingFaceTB/SmolLM2-135M"), Some(("HuggingFaceTB/SmolLM2-135M".to_owned(), None, None)));
        assert_eq!(model("a/b.c@v1.0"), Some(("a/b.c".to_owned(), some("v1.0"), None)));
        assert_eq!(model("a/b@refs/pr/3"), Some(("a/b".to_owned(), some("refs/pr/3"), None)));
        assert_eq!(model("a/b@feature%2Fx"), Some(("a/b".to_owned(), some("feature/x"), None)));
        assert_eq!(model("a/b/q8_0.gguf"), Some(("a/b".to_owned(), None, some("q8_0.gguf"))));
        assert_eq!(model("hf://a/b@main/sub/q.GGUF"), Some(("a/b".to_owned(), some("main"), some("sub/q.GGUF"))));
        assert_eq!(model("hf://models/a/b"), Some(("a/b".to_owned(), None, None)));
        for path in [
            "a",
            "/a/b",
            "./a/b",
            "../a",
            "a/../b",
            "a/b/c",
            "a/b/",
            "a//b",
            "prompt-lookup",
            "a/b@",
            "a/b@x/y",
            "a b/c",
            "a/b@../x",
            "~/x",
            "",
            "a/.b",
            "a/b--c",
            "a/b/../c.gguf",
        ] {
            assert_eq!(model(path), None, "{path}");
        }
        for address in ["hf://a", "hf://", "hf://datasets/a", "hf://datasets/a/b", "hf://a/b/c.json"] {
            assert!(Name::model(address).unwrap_err().to_string().contains("names no model"), "{address}");
        }
    }

    #[test]
    fn data_is_a_file_of_a_data_set() {
        let name = Name::data("hf://datasets/a/b@~parquet/default/train/0000.parquet").unwrap().unwrap();
        assert_eq!((name.kind, name.repo.as_str(), name.revision()), (Kind::Dataset, "a/b", "refs/convert/parquet"));
        assert_eq!(name.file.as_deref(), Some("default/train/0000.parquet"));
        assert_eq!(Name::data("data/a.jsonl").unwrap(), None);
        for bad in ["hf://a/b/c.jsonl", "hf://datasets/a/b", "hf://datasets/b.jsonl", "hf://datasets/a/b/../c"] {
            assert!(Name::data(bad).unwrap_err().to_string().contains("expected hf://datasets/ORG"), "{bad}");
        }
        assert!(Name::data("hf://datasets/a/b/*.parquet").unwrap_err().to_string().contains("one by one"));
    }

    #[test]
    fn a_name_is_written_as_it_is_read() {
        for text in ["a/b", "a/b@v1", "hf://a/b@v1", "a/b@refs%2Fpr%2F3", "a/b@v1/x.gguf"] {
            let name = Name::model(text).unwrap().unwrap();
            assert_eq!(name.to_string(), text);
        }
        let text = "hf://datasets/a/b@main/train/x.jsonl";
        let name = Name::data(text).unwrap().unwrap();
        assert_eq!(name.to_string(), text);
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let pinned = Name::model("a/b").unwrap().unwrap().at(commit);
        assert_eq!((pinned.commit(), pinned.to_string()), (Some(commit), format!("a/b@{commit}")));
        assert_eq!(Name::model("a/b@main").unwrap().unwrap().commit(), None);
    }

    #[test]
    fn local_paths_go_first() {
        let name = Name::model("src/nothing-here").unwrap().unwrap();
        assert!(name.is_local("src/nothing-here"), "a folder src is here");
        assert!(!Name::model("no-such-organisation/x").unwrap().unwrap().is_local("no-such-organisation/x"));
        assert!(!Name::model("hf://src/x").unwrap().unwrap().is_local("hf://src/x"));
    }
}
