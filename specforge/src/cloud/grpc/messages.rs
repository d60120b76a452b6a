//! `proto/cloud.proto` in Rust: the same messages with the same fields, types and numbers, which a test compares. What they
//! mean is in `protocol`.
//!
//! Written by hand, so that building needs neither protoc nor a generator's dependencies.

// A field is named and numbered as in the file; a sentence for each would say the name again.
#![allow(missing_docs)]

use prost::{Enumeration, Message, Oneof};

/// Where a message belongs.
#[derive(Clone, PartialEq, Message)]
pub struct Address {
    #[prost(fixed64, tag = "1")]
    pub session_high: u64,
    #[prost(fixed64, tag = "2")]
    pub session_low: u64,
    #[prost(uint64, tag = "3")]
    pub epoch: u64,
}

/// What the edge says.
#[derive(Clone, PartialEq, Message)]
pub struct EdgeMessage {
    #[prost(oneof = "edge_message::Message", tags = "1, 2, 3, 4, 5")]
    pub message: Option<edge_message::Message>,
}

/// Alternatives of [`EdgeMessage`].
pub mod edge_message {
    use super::Oneof;

    /// One of them.
    #[derive(Clone, PartialEq, Oneof)]
    pub enum Message {
        #[prost(message, tag = "1")]
        Open(super::Open),
        #[prost(message, tag = "2")]
        Draft(super::Draft),
        #[prost(message, tag = "3")]
        Resume(super::Resume),
        #[prost(message, tag = "4")]
        Cancel(super::Address),
        #[prost(message, tag = "5")]
        Close(super::Address),
    }
}

/// What the cloud says.
#[derive(Clone, PartialEq, Message)]
pub struct CloudMessage {
    #[prost(oneof = "cloud_message::Message", tags = "1, 2, 3, 4")]
    pub message: Option<cloud_message::Message>,
}

/// Alternatives of [`CloudMessage`].
pub mod cloud_message {
    use super::Oneof;

    /// One of them.
    #[derive(Clone, PartialEq, Oneof)]
    pub enum Message {
        #[prost(message, tag = "1")]
        Opened(super::Opened),
        #[prost(message, tag = "2")]
        Verdict(super::Verdict),
        #[prost(message, tag = "3")]
        Synced(super::Synced),
        #[prost(message, tag = "4")]
        Error(super::Refusal),
    }
}

/// A request.
#[derive(Clone, PartialEq, Message)]
pub struct Open {
    #[prost(uint32, tag = "1")]
    pub version: u32,
    #[prost(uint64, tag = "2")]
    pub attempt: u64,
    #[prost(fixed64, tag = "3")]
    pub edge: u64,
    #[prost(string, tag = "4")]
    pub tokenizer_hash: String,
    #[prost(uint32, tag = "5")]
    pub vocab_size: u32,
    #[prost(uint32, repeated, tag = "6")]
    pub prompt: Vec<u32>,
    #[prost(uint32, repeated, tag = "7")]
    pub tail: Vec<u32>,
    #[prost(message, optional, tag = "8")]
    pub choice: Option<Choice>,
    #[prost(uint32, tag = "9")]
    pub max_new_tokens: u32,
    #[prost(message, optional, tag = "10")]
    pub features: Option<Wanted>,
}

/// How the target chooses.
#[derive(Clone, PartialEq, Message)]
pub struct Choice {
    #[prost(double, tag = "1")]
    pub temperature: f64,
    #[prost(uint64, tag = "2")]
    pub top_k: u64,
    #[prost(double, tag = "3")]
    pub top_p: f64,
    #[prost(double, tag = "4")]
    pub repetition_penalty: f64,
    #[prost(uint64, tag = "5")]
    pub key: u64,
    #[prost(oneof = "choice::Policy", tags = "6, 7, 8, 9, 10")]
    pub policy: Option<choice::Policy>,
}

/// Alternatives of [`Choice`].
pub mod choice {
    use super::Oneof;

    /// One of them.
    #[derive(Clone, PartialEq, Oneof)]
    pub enum Policy {
        #[prost(message, tag = "6")]
        Keyed(super::Keyed),
        #[prost(message, tag = "7")]
        Maximal(super::Maximal),
        #[prost(message, tag = "8")]
        Typical(super::Typical),
        #[prost(message, tag = "9")]
        Rank(super::Rank),
        #[prost(message, tag = "10")]
        Entropy(super::Entropy),
    }
}

/// The target's own choice.
#[derive(Clone, PartialEq, Message)]
pub struct Keyed {
    #[prost(uint64, tag = "1")]
    pub seed: u64,
}

/// Classic rejection.
#[derive(Clone, PartialEq, Message)]
pub struct Maximal {
    #[prost(uint64, tag = "1")]
    pub seed: u64,
}

/// What is plausible enough.
#[derive(Clone, PartialEq, Message)]
pub struct Typical {
    #[prost(double, tag = "1")]
    pub epsilon: f64,
    #[prost(double, tag = "2")]
    pub alpha: f64,
}

/// What is among the target's likeliest.
#[derive(Clone, PartialEq, Message)]
pub struct Rank {
    #[prost(uint64, tag = "1")]
    pub k: u64,
    #[prost(uint64, tag = "2")]
    pub seed: u64,
}

/// What the draft is sure of.
#[derive(Clone, PartialEq, Message)]
pub struct Entropy {
    #[prost(double, tag = "1")]
    pub most: f64,
    #[prost(uint64, tag = "2")]
    pub seed: u64,
}

/// How hidden states travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum Encoding {
    Unspecified = 0,
    Float32 = 1,
    Bfloat16 = 2,
    Int8 = 3,
}

/// Hidden states that a draft reads.
#[derive(Clone, PartialEq, Message)]
pub struct Wanted {
    #[prost(uint32, repeated, tag = "1")]
    pub layers: Vec<u32>,
    #[prost(enumeration = "Encoding", tag = "2")]
    pub encoding: i32,
}

/// Hidden states.
#[derive(Clone, PartialEq, Message)]
pub struct Features {
    #[prost(enumeration = "Encoding", tag = "1")]
    pub encoding: i32,
    #[prost(uint32, tag = "2")]
    pub layers: u32,
    #[prost(uint32, tag = "3")]
    pub tokens: u32,
    #[prost(uint32, tag = "4")]
    pub width: u32,
    #[prost(bytes = "vec", tag = "5")]
    pub values: Vec<u8>,
    #[prost(float, repeated, tag = "6")]
    pub scales: Vec<f32>,
}

/// What a cloud allows.
#[derive(Clone, PartialEq, Message)]
pub struct Limits {
    #[prost(uint32, tag = "1")]
    pub max_nodes: u32,
    #[prost(uint32, tag = "2")]
    pub max_tokens: u32,
    #[prost(uint64, tag = "3")]
    pub lease_milliseconds: u64,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum Finish {
    None = 0,
    Stop = 1,
    Length = 2,
}

/// A session that has begun.
#[derive(Clone, PartialEq, Message)]
pub struct Opened {
    #[prost(message, optional, tag = "1")]
    pub address: Option<Address>,
    #[prost(uint64, tag = "2")]
    pub attempt: u64,
    #[prost(uint32, repeated, tag = "3")]
    pub tokens: Vec<u32>,
    #[prost(fixed64, tag = "4")]
    pub digest: u64,
    #[prost(enumeration = "Finish", tag = "5")]
    pub finish: i32,
    #[prost(message, optional, tag = "6")]
    pub limits: Option<Limits>,
    #[prost(bool, tag = "7")]
    pub lossless: bool,
    #[prost(message, optional, tag = "8")]
    pub features: Option<Features>,
}

/// Guesses.
#[derive(Clone, PartialEq, Message)]
pub struct Draft {
    #[prost(message, optional, tag = "1")]
    pub address: Option<Address>,
    #[prost(uint64, tag = "2")]
    pub round: u64,
    #[prost(uint64, tag = "3")]
    pub base_length: u64,
    #[prost(fixed64, tag = "4")]
    pub base_digest: u64,
    #[prost(uint32, repeated, tag = "5")]
    pub parents: Vec<u32>,
    #[prost(uint32, repeated, tag = "6")]
    pub tokens: Vec<u32>,
    #[prost(uint32, repeated, tag = "7")]
    pub sure: Vec<u32>,
}

/// What the target made of a draft.
#[derive(Clone, PartialEq, Message)]
pub struct Verdict {
    #[prost(message, optional, tag = "1")]
    pub address: Option<Address>,
    #[prost(uint64, tag = "2")]
    pub round: u64,
    #[prost(uint64, tag = "3")]
    pub base_length: u64,
    #[prost(uint32, repeated, tag = "4")]
    pub tokens: Vec<u32>,
    #[prost(uint32, repeated, tag = "5")]
    pub path: Vec<u32>,
    #[prost(fixed64, tag = "6")]
    pub digest: u64,
    #[prost(enumeration = "Finish", tag = "7")]
    pub finish: i32,
    #[prost(message, optional, tag = "8")]
    pub features: Option<Features>,
    #[prost(uint32, repeated, tag = "9")]
    pub unverified: Vec<u32>,
}

/// A wish to go on.
#[derive(Clone, PartialEq, Message)]
pub struct Resume {
    #[prost(message, optional, tag = "1")]
    pub address: Option<Address>,
    #[prost(fixed64, tag = "2")]
    pub edge: u64,
    #[prost(uint64, tag = "3")]
    pub committed_length: u64,
    #[prost(fixed64, tag = "4")]
    pub digest: u64,
}

/// A session that goes on.
#[derive(Clone, PartialEq, Message)]
pub struct Synced {
    #[prost(message, optional, tag = "1")]
    pub address: Option<Address>,
    #[prost(uint64, tag = "2")]
    pub round: u64,
    #[prost(uint64, tag = "3")]
    pub committed_length: u64,
    #[prost(fixed64, tag = "4")]
    pub digest: u64,
    #[prost(message, repeated, tag = "5")]
    pub missed: Vec<Verdict>,
}

/// Why something is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum Code {
    Unspecified = 0,
    Version = 1,
    Tokenizer = 2,
    Request = 3,
    Policy = 4,
    Busy = 5,
    UnknownSession = 6,
    TakenOver = 7,
    StaleBase = 8,
    TooFarBehind = 9,
    Diverged = 10,
    RoundReused = 11,
    InFlight = 12,
    BadTree = 13,
    Target = 14,
}

/// Something that is refused.
#[derive(Clone, PartialEq, Message)]
pub struct Refusal {
    #[prost(message, optional, tag = "1")]
    pub address: Option<Address>,
    #[prost(enumeration = "Code", tag = "2")]
    pub code: i32,
    #[prost(string, tag = "3")]
    pub message: String,
    #[prost(uint64, tag = "4")]
    pub of: u64,
    #[prost(uint64, tag = "5")]
    pub committed_length: u64,
    #[prost(message, repeated, tag = "6")]
    pub missed: Vec<Verdict>,
    #[prost(bool, tag = "7")]
    pub retryable: bool,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    /// Lines of a text from its first brace on, without comments, as words.
    fn words(line: &str) -> Vec<&str> {
        let line = line.split("//").next().unwrap_or_default();
        line.split([' ', '=', ';', ',', '(', ')', '"', ':', '#', '[', ']']).filter(|word| !word.is_empty()).collect()
    }

    /// `MESSAGE FIELD NUMBER` of every field of the file, and `ENUM VALUE NUMBER`.
    fn of_the_file(text: &str) -> BTreeSet<String> {
        let (mut message, mut found) = ("", BTreeSet::new());
        for line in text.lines() {
            match words(line)[..] {
                ["message" | "enum", name, "{"] => message = name,
                [.., name, number] if !message.is_empty() && number.parse::<u32>().is_ok() => {
                    let prefix = format!("{}_", message.to_uppercase());
                    let name = name.trim_start_matches(&prefix).to_lowercase().replace('_', "");
                    found.insert(format!("{message} {name} {number}"));
                }
                _ => {}
            }
        }
        found
    }

    /// The same of this file.
    fn of_the_code(text: &str) -> BTreeSet<String> {
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let (mut message, mut number, mut found) = (String::new(), None, BTreeSet::new());
        for line in code.lines() {
            let words = words(line);
            match words[..] {
                ["pub", "struct", name, "{"] => message = name.to_owned(),
                ["pub", "enum", "Message" | "Policy", "{"] => {} // alternatives of the message before
                ["pub", "enum", name, "{"] => message = name.to_owned(),
                ["prost", .., "tag", tag] => number = Some(tag.to_owned()),
                ["pub", name, ..] | [name, "super", ..] if number.is_some() => {
                    let name = name.to_lowercase().replace('_', "");
                    found.insert(format!("{message} {name} {}", number.take().unwrap_or_default()));
                }
                [name, value] if value.parse::<u32>().is_ok() => {
                    found.insert(format!("{message} {} {value}", name.to_lowercase()));
                }
                _ => {}
            }
        }
        found
    }

    #[test]
    fn the_file_and_the_code_have_the_same_fields_and_numbers() {
        let file = of_the_file(include_str!("../../../proto/cloud.proto"));
        let code = of_the_code(include_str!("messages.rs"));
        assert!(file.len() > 100, "{}", file.len());
        let only =
            |left: &BTreeSet<String>, right: &BTreeSet<String>| left.difference(right).cloned().collect::<Vec<_>>();
        assert_eq!((only(&file, &code), only(&code, &file)), (vec![], vec![]));
    }
}
