//! What the name of a pre-tokenizer stands for.
//!
//! A GGUF file names the rule by which text is cut into words before byte-level BPE, and leaves the rule itself to the
//! reader. This table gives each name the rule of the Hugging Face tokenizer that llama.cpp derives the name from
//! (`convert_hf_to_gguf_update.py`). A wrong rule yields other tokens without any error, so an unknown name is refused.

use serde_json::{Value, json};

use super::metadata::Metadata;
use crate::error::Result;

pub(super) const KEY: &str = "tokenizer.ggml.pre";

/// How one kind of byte-level BPE treats text.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    pub(super) normalizer: Value,
    pub(super) pre_tokenizer: Value,
    /// Whether a word that is a token is taken whole.
    pub(super) ignore_merges: bool,
    /// Whether texts begin with the bos token where the file does not say.
    pub(super) add_bos: bool,
}

const KNOWN: &str = "smollm, starcoder, refact, codeshell, gpt-2, default, phi-2, llama-bpe, llama3, llama-v3, smaug-bpe, \
                     qwen2, deepseek-r1-qwen, tekken";

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The rule with this name.
pub(super) fn by_name(metadata: &Metadata, name: &str) -> Result<PreTokenizer> {
    rule(name).ok_or_else(|| {
        metadata
            .bad(format!("`{KEY}`: the pre-tokenizer `{name}` is not known; expected one of {KNOWN}"))
            .with_hint("use the model's Hugging Face folder, which carries the tokenizer itself")
    })
}

/// Names that rules are written under, of those that share one.
const WRITTEN: [&str; 6] = ["smollm", "gpt-2", "llama-bpe", "smaug-bpe", "qwen2", "tekken"];

/// The name of the rule that a tokenizer.json has, where it has one. `ignore_merges` says whether a word that is a token is
/// taken whole.
pub(super) fn name_of(normalizer: &Value, pre_tokenizer: &Value, ignore_merges: bool) -> Option<&'static str> {
    let normalizer = essential(normalizer);
    let empty = normalizer.get("normalizers").and_then(Value::as_array).is_some_and(Vec::is_empty);
    let normalizer = if empty { Value::Null } else { normalizer };
    let pre_tokenizer = essential(pre_tokenizer);
    WRITTEN.into_iter().find(|name| {
        rule(name).is_some_and(|rule| {
            let same = essential(&rule.normalizer) == normalizer && essential(&rule.pre_tokenizer) == pre_tokenizer;
            same && rule.ignore_merges == ignore_merges
        })
    })
}

/// A part of a tokenizer without what changes no tokens, and with what older files leave out.
fn essential(part: &Value) -> Value {
    match part {
        Value::Object(entries) => {
            let kept = entries.iter().filter(|(key, _)| *key != "trim_offsets");
            let mut kept: serde_json::Map<String, Value> =
                kept.map(|(key, value)| (key.clone(), essential(value))).collect();
            if entries.get("type").is_some_and(|kind| kind == "ByteLevel") {
                kept.entry("use_regex").or_insert(Value::Bool(true));
            }
            Value::Object(kept)
        }
        Value::Array(parts) => parts.iter().map(essential).collect(),
        other => other.clone(),
    }
}

fn rule(name: &str) -> Option<PreTokenizer> {
    let plain =
        |pre_tokenizer| PreTokenizer { normalizer: Value::Null, pre_tokenizer, ignore_merges: false, add_bos: false };
    Some(match name {
        "smollm" | "starcoder" | "refact" | "codeshell" => {
            let digits = json!({ "type": "Digits", "individual_digits": true });
            plain(sequence([digits, byte_level(true)]))
        }
        "gpt-2" | "default" | "phi-2" => plain(byte_level(true)),
        "llama-bpe" | "llama3" | "llama-v3" => {
            PreTokenizer { ignore_merges: true, add_bos: true, ..plain(split(LLAMA3)) }
        }
        "smaug-bpe" => plain(split(LLAMA3)),
        "qwen2" | "deepseek-r1-qwen" => PreTokenizer { normalizer: json!({ "type": "NFC" }), ..plain(split(QWEN2)) },
        "tekken" => PreTokenizer { ignore_merges: true, add_bos: true, ..plain(split(TEKKEN)) },
        _ => return None,
    })
}

/// Turns the byte alphabet back into text.
pub(super) fn byte_level_decoder() -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true })
}

fn byte_level(use_regex: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
}

fn split(pattern: &str) -> Value {
    let cut = json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
    sequence([cut, byte_level(false)])
}

fn sequence(steps: [Value; 2]) -> Value {
    json!({ "type": "Sequence", "pretokenizers": steps })
}
