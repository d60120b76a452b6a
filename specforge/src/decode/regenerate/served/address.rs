//! Where servers are, and what is spoken there.

use std::fmt;
use std::str::FromStr;

use crate::serving;

/// What a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// OpenAI's protocol and nothing else.
    OpenAi,
    /// vLLM's, with its own parameters and token ids.
    Vllm,
    /// The same of SGLang.
    Sglang,
}

impl Dialect {
    const ALL: [Dialect; 3] = [Dialect::OpenAi, Dialect::Vllm, Dialect::Sglang];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Dialect::OpenAi => "openai",
            Dialect::Vllm => "vllm",
            Dialect::Sglang => "sglang",
        }
    }

    /// The environment variable that holds the key of its servers, where nothing else is said.
    pub fn key_variable(self) -> &'static str {
        match self {
            Dialect::OpenAi => "OPENAI_API_KEY",
            Dialect::Vllm => "VLLM_API_KEY",
            Dialect::Sglang => "SGLANG_API_KEY",
        }
    }
}

/// Servers of one kind: `vllm:http://host:8000,http://other:8000`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses {
    /// What is spoken there.
    pub dialect: Dialect,
    /// Where, without a slash or `/v1` at the end.
    pub urls: Vec<String>,
}

impl FromStr for Addresses {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = "expected openai:URL, vllm:URL or sglang:URL, such as vllm:http://127.0.0.1:8000";
        let known = Dialect::ALL.into_iter().find_map(|dialect| {
            let rest = text.strip_prefix(dialect.name())?.strip_prefix(':')?;
            Some((dialect, rest))
        });
        let (dialect, list) = known.ok_or_else(|| format!("{expected}, got `{text}`"))?;
        let urls = list.split(',').map(|url| serving::url(url.trim(), expected)).collect::<Result<_, _>>()?;
        Ok(Self { dialect, urls })
    }
}

/// One server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) dialect: Dialect,
    pub(super) url: String,
}

impl fmt::Display for Address {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}:{}", self.dialect.name(), self.url)
    }
}

/// Every server once.
pub(super) fn each(lists: &[Addresses]) -> Vec<Address> {
    let mut all: Vec<Address> = Vec::new();
    for Addresses { dialect, urls } in lists {
        for url in urls {
            let address = Address { dialect: *dialect, url: url.clone() };
            if !all.contains(&address) {
                all.push(address);
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_servers_are_read_and_what_is_none_is_refused() {
        let read = |text: &str| text.parse::<Addresses>();
        let two = read("vllm:http://a:8000/v1, http://b:8000/").unwrap();
        assert_eq!(
            two,
            Addresses { dialect: Dialect::Vllm, urls: vec!["http://a:8000".into(), "http://b:8000".into()] }
        );
        let again = read("vllm:http://b:8000").unwrap();
        let other = read("openai:http://b:8000").unwrap();
        let names: Vec<String> = each(&[two, again, other]).iter().map(Address::to_string).collect();
        assert_eq!(names, ["vllm:http://a:8000", "vllm:http://b:8000", "openai:http://b:8000"]);
        for (wrong, word) in [
            ("http://a:8000", "expected openai:URL"),
            ("tgi:http://a", "expected openai:URL"),
            ("vllm:http://a,", "expected openai:URL"),
            ("openai:http://me:secret@a", "belong into the environment"),
        ] {
            let problem = read(wrong).unwrap_err();
            assert!(problem.contains(word), "{wrong}: {problem}");
        }
    }
}
