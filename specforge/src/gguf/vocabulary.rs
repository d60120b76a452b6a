//! The tokenizer of a model as metadata of a GGUF file: that of a GGUF file as it stands there, that of a Hugging Face
//! folder as llama.cpp's converter writes it.
//!
//! Reference: `conversion/base.py` (`get_vocab_base`) and `gguf-py/gguf/vocab.py` (`SpecialVocab`) of llama.cpp.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::quantized::gguf_file::Value as GgufValue;
use serde_json::{Map, Value};

use super::file::GgufFile;
use super::{packed, pre_tokenizer};
use crate::error::{Error, Result};
use crate::strict;

const PREFIX: &str = "tokenizer.";

/// The keys in the order of llama.cpp's converter; others stand behind them.
const ORDER: [&str; 23] = [
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.seperator_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.cls_token_id",
    "tokenizer.ggml.mask_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_sep_token",
    "tokenizer.ggml.remove_extra_whitespaces",
    "tokenizer.ggml.precompiled_charsmap",
    "tokenizer.chat_templates",
    "tokenizer.chat_template",
];

const TYPE_NORMAL: i32 = 1;
const TYPE_CONTROL: i32 = 3;
const TYPE_USER_DEFINED: i32 = 4;
const TYPE_UNUSED: i32 = 5;

/// The converter's rule: files of this many tokens begin no text with a token.
const NO_BOS_SIZE: usize = 49152;

/// Roles of tokens: the name in Hugging Face's files, and in a GGUF key.
const ROLES: [(&str, &str); 7] = [
    ("bos", "bos"),
    ("eos", "eos"),
    ("unk", "unknown"),
    ("sep", "seperator"),
    ("pad", "padding"),
    ("cls", "cls"),
    ("mask", "mask"),
];

/// Keys and values of the tokenizer of a target, a folder or a GGUF file.
pub fn of(target: &Path) -> Result<Vec<(String, GgufValue)>> {
    let mut entries = match packed::is_packed(target) {
        true => copied(target)?,
        false => Folder::read(target)?.entries()?,
    };
    let place = |key: &str| ORDER.iter().position(|known| *known == key).unwrap_or(ORDER.len());
    entries.sort_by(|(one, _), (other, _)| (place(one), one).cmp(&(place(other), other)));
    Ok(entries)
}

fn copied(target: &Path) -> Result<Vec<(String, GgufValue)>> {
    let file = GgufFile::open(target)?;
    let keys = file.metadata().content.metadata.iter();
    let of_tokenizer = keys.filter(|(key, _)| key.starts_with(PREFIX));
    Ok(of_tokenizer.map(|(key, value)| (key.clone(), value.clone())).collect())
}

/// The files that say what a tokenizer is.
struct Folder<'a> {
    path: &'a Path,
    tokenizer: Map<String, Value>,
    tokenizer_config: Map<String, Value>,
    config: Map<String, Value>,
}

impl<'a> Folder<'a> {
    fn read(path: &'a Path) -> Result<Self> {
        let file = |name: &str| match packed::read_file(path, name)? {
            None => Ok(Map::new()),
            Some(text) => strict::from_json(&text).map_err(|problem| Error::bad_file(path.join(name), problem)),
        };
        let tokenizer: Map<String, Value> = file("tokenizer.json")?;
        if tokenizer.is_empty() {
            let error = Error::bad_file(path.join("tokenizer.json"), "is not there");
            return Err(error.with_hint("a GGUF file carries the target's tokenizer: the target's folder is needed"));
        }
        let other_kind = path.join("tokenizer.model").is_file();
        let folder =
            Self { path, tokenizer, tokenizer_config: file("tokenizer_config.json")?, config: file("config.json")? };
        let kind = folder.model("type").and_then(Value::as_str).unwrap_or("none");
        let by_bytes = folder.model("byte_fallback") == Some(&Value::Bool(true));
        if other_kind || kind != "BPE" || by_bytes {
            let what = if other_kind || by_bytes { "SentencePiece" } else { kind };
            let problem = format!("expected byte-level BPE, got {what}: only that is written from a folder");
            return Err(folder.bad(problem).with_hint(HINT));
        }
        Ok(folder)
    }

    fn bad(&self, problem: impl Into<String>) -> Error {
        Error::bad_file(self.path.join("tokenizer.json"), problem)
    }

    fn model(&self, key: &str) -> Option<&Value> {
        self.tokenizer.get("model")?.get(key)
    }

    fn entries(&self) -> Result<Vec<(String, GgufValue)>> {
        let added = self.added_tokens()?;
        let (tokens, types) = self.tokens(&added)?;
        let text = |text: &str| GgufValue::String(text.to_owned());
        let list = |texts: Vec<String>| GgufValue::Array(texts.into_iter().map(GgufValue::String).collect());
        let mut entries = vec![
            ("ggml.model".to_owned(), text("gpt2")),
            ("ggml.pre".to_owned(), text(self.pre_tokenizer()?)),
            ("ggml.tokens".to_owned(), list(tokens)),
            ("ggml.token_type".to_owned(), GgufValue::Array(types.into_iter().map(GgufValue::I32).collect())),
            ("ggml.merges".to_owned(), list(self.merges()?)),
        ];
        if let Some(Value::Bool(prefix)) = self.tokenizer_config.get("add_prefix_space") {
            entries.push(("ggml.add_space_prefix".to_owned(), GgufValue::Bool(*prefix)));
        }
        for (role, id) in self.roles(&added)? {
            entries.push((format!("ggml.{role}_token_id"), GgufValue::U32(id)));
        }
        for (edge, adds) in self.edges() {
            entries.push((format!("ggml.add_{edge}_token"), GgufValue::Bool(adds)));
        }
        entries.extend(self.templates()?);
        Ok(entries.into_iter().map(|(key, value)| (format!("{PREFIX}{key}"), value)).collect())
    }

    /// Tokens beside the model's vocabulary, by their ids: text, and whether they are special.
    fn added_tokens(&self) -> Result<BTreeMap<u64, (String, bool)>> {
        let mut added = BTreeMap::new();
        for token in self.tokenizer.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
            let (id, content) = (token.get("id").and_then(Value::as_u64), token.get("content").and_then(Value::as_str));
            let (Some(id), Some(content)) = (id, content) else {
                return Err(self.bad(format!("`added_tokens`: expected id and content, got {token}")));
            };
            let special = token.get("special").and_then(Value::as_bool).unwrap_or(false);
            added.insert(id, (content.to_owned(), special));
        }
        // Fine-tuning tools leave their tokens there and nowhere else.
        let decoder = self.tokenizer_config.get("added_tokens_decoder").and_then(Value::as_object);
        for (id, token) in decoder.into_iter().flatten() {
            if let (Ok(id), Some(content)) = (id.parse::<u64>(), token.get("content").and_then(Value::as_str)) {
                let special = token.get("special").and_then(Value::as_bool).unwrap_or(false);
                added.entry(id).or_insert((content.to_owned(), special));
            }
        }
        Ok(added)
    }

    /// Every token by its id, and what kind it is. Ids without one are held free by names of their own.
    fn tokens(&self, added: &BTreeMap<u64, (String, bool)>) -> Result<(Vec<String>, Vec<i32>)> {
        let Some(vocabulary) = self.model("vocab").and_then(Value::as_object) else {
            return Err(self.bad("`model.vocab`: expected an object"));
        };
        let mut by_id: HashMap<u64, &str> = HashMap::with_capacity(vocabulary.len());
        for (token, id) in vocabulary {
            let Some(id) = id.as_u64() else {
                return Err(self.bad(format!("`model.vocab`: the id of `{token}`: expected a whole number, got {id}")));
            };
            by_id.insert(id, token);
        }
        let largest = by_id.keys().chain(added.keys()).max().map_or(0, |largest| largest.saturating_add(1));
        let size = match self.config.get("vocab_size").and_then(Value::as_u64) {
            Some(size) if size < largest => {
                return Err(self.bad(format!("holds the id {}; config.json says {size} tokens", largest - 1)));
            }
            Some(size) => size,
            None => largest,
        };
        if size > MOST_TOKENS {
            return Err(self.bad(format!("holds the id {}; expected ids below {MOST_TOKENS}", size - 1)));
        }
        let (mut tokens, mut types) = (Vec::new(), Vec::new());
        for id in 0..size {
            let (token, kind) = match (added.get(&id), by_id.get(&id)) {
                (Some((token, special)), _) if *special || looks_special(token) => (token.clone(), TYPE_CONTROL),
                (Some((token, _)), _) => (token.replace('\u{2581}', " "), TYPE_USER_DEFINED),
                (None, Some(token)) => ((*token).to_owned(), TYPE_NORMAL),
                (None, None) => (format!("[PAD{id}]"), TYPE_UNUSED),
            };
            tokens.push(token);
            types.push(kind);
        }
        Ok((tokens, types))
    }

    fn pre_tokenizer(&self) -> Result<&'static str> {
        let part = |key: &str| self.tokenizer.get(key).unwrap_or(&Value::Null);
        let ignores_merges = self.model("ignore_merges") == Some(&Value::Bool(true));
        pre_tokenizer::name_of(part("normalizer"), part("pre_tokenizer"), ignores_merges).ok_or_else(|| {
            let problem = "`pre_tokenizer`: its rule has no name in GGUF files that is known here";
            self.bad(problem).with_hint(HINT)
        })
    }

    /// Pairs as texts. A space inside a token is written as the byte alphabet has it.
    fn merges(&self) -> Result<Vec<String>> {
        let merges = self.model("merges").and_then(Value::as_array).into_iter().flatten();
        let spaced = |part: &str| part.replace(' ', "\u{120}");
        let text = |merge: &Value| match merge {
            Value::String(text) => Some(text.clone()),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(left), Value::String(right)] => Some(format!("{} {}", spaced(left), spaced(right))),
                _ => None,
            },
            _ => None,
        };
        merges
            .map(|merge| {
                text(merge).ok_or_else(|| self.bad(format!("`model.merges`: expected two tokens, got {merge}")))
            })
            .collect()
    }

    /// Ids of the tokens with a role: by the text that tokenizer_config.json names, else the id of config.json.
    fn roles(&self, added: &BTreeMap<u64, (String, bool)>) -> Result<Vec<(&'static str, u32)>> {
        let mut found = Vec::new();
        for (role, name) in ROLES {
            let by_text = self
                .text_of(role)
                .and_then(|text| added.iter().find(|(_, (content, _))| content == text).map(|(id, _)| *id));
            let by_id = || self.config.get(&format!("{role}_token_id")).and_then(Value::as_u64);
            if let Some(id) = by_text.or_else(by_id) {
                let id = u32::try_from(id).map_err(|_| self.bad(format!("`{role}_token`: its id is {id}")))?;
                found.push((name, id));
            }
        }
        Ok(found)
    }

    /// The text of the token with a role.
    fn text_of(&self, role: &str) -> Option<&str> {
        let token = self.tokenizer_config.get(&format!("{role}_token"))?;
        token.as_str().or_else(|| token.get("content")?.as_str())
    }

    /// Whether texts begin and end with a token, and have one between two, as far as the files say so: the post-processor,
    /// else keys of tokenizer_config.json.
    fn edges(&self) -> BTreeMap<&'static str, bool> {
        let mut edges = BTreeMap::new();
        let processor = self.tokenizer.get("post_processor").unwrap_or(&Value::Null);
        let several = processor.get("processors").and_then(Value::as_array);
        let all = several.map_or_else(|| vec![processor], |several| several.iter().collect());
        for processor in all {
            match processor.get("type").and_then(Value::as_str) {
                Some("ByteLevel") => {
                    edges.entry("bos").or_insert(false);
                    edges.entry("eos").or_insert(false);
                    continue;
                }
                Some("TemplateProcessing") => {}
                _ => continue,
            }
            let steps = |key: &str| processor.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            let special = |step: &Value| step.pointer("/SpecialToken/id").and_then(Value::as_str).map(str::to_owned);
            let (single, pair) = (steps("single"), steps("pair"));
            let (mut first, mut last) = (None, None);
            if single.len() > 1 {
                first = single.first().and_then(special);
                last = single.last().and_then(special);
            }
            if let Some(first) = first.as_deref() {
                edges.insert("bos", [self.text_of("bos"), self.text_of("cls")].contains(&Some(first)));
            }
            if let Some(last) = last.as_deref() {
                edges.insert("eos", self.text_of("eos").or(self.text_of("sep")) == Some(last));
            }
            // What is left between the two texts of a pair.
            let start = usize::from(first.is_some() && pair.first().and_then(special) == first);
            let end = pair.len().saturating_sub(usize::from(last.is_some() && pair.last().and_then(special) == last));
            let between = pair.get(start + 1..end.saturating_sub(1)).unwrap_or(&[]);
            if let Some(step) = between.first() {
                let closes = |token: &Option<String>| {
                    token.is_some() && [self.text_of("sep"), self.text_of("eos")].contains(&token.as_deref())
                };
                let second = between.get(1).and_then(special).filter(|_| between.len() == 2);
                edges.insert("sep", (closes(&special(step)) && last.is_none()) || closes(&second));
            }
        }
        for (edge, key) in [("bos", "add_bos_token"), ("eos", "add_eos_token"), ("sep", "add_sep_token")] {
            if let Some(Value::Bool(adds)) = self.tokenizer_config.get(key) {
                edges.entry(edge).or_insert(*adds);
            }
        }
        if self.config.get("vocab_size").and_then(Value::as_u64) == Some(NO_BOS_SIZE as u64) {
            edges.insert("bos", false);
        }
        edges
    }

    /// The chat template, or several with names.
    fn templates(&self) -> Result<Vec<(String, GgufValue)>> {
        let own = |name: &str| packed::read_file(self.path, name);
        let readable = |name: &str, text: Vec<u8>| {
            String::from_utf8(text).map_err(|_| Error::bad_file(self.path.join(name), "is not valid UTF-8"))
        };
        let text = |text: &str| GgufValue::String(text.to_owned());
        let one = |template: &str| vec![("chat_template".to_owned(), text(template))];
        match self.tokenizer_config.get("chat_template") {
            Some(Value::String(template)) => return Ok(one(template)),
            Some(Value::Array(named)) => {
                let (mut entries, mut names) = (Vec::new(), Vec::new());
                for choice in named {
                    let part = |key: &str| choice.get(key).and_then(Value::as_str);
                    let (Some(name), Some(template)) = (part("name"), part("template")) else { continue };
                    let plain = |letter: char| if letter.is_ascii_alphanumeric() { letter } else { '_' };
                    let name: String = name.chars().map(plain).collect();
                    if name == "default" {
                        entries.extend(one(template));
                    } else {
                        entries.push((format!("chat_template.{name}"), text(template)));
                        names.push(GgufValue::String(name));
                    }
                }
                if !names.is_empty() {
                    entries.push(("chat_templates".to_owned(), GgufValue::Array(names)));
                }
                return Ok(entries);
            }
            _ => {}
        }
        if let Some(template) = own("chat_template.jinja")? {
            return Ok(one(&readable("chat_template.jinja", template)?));
        }
        let Some(object) = own("chat_template.json")? else { return Ok(Vec::new()) };
        let object: Value = strict::from_json(&object)
            .map_err(|problem| Error::bad_file(self.path.join("chat_template.json"), problem))?;
        Ok(object.get("chat_template").and_then(Value::as_str).map(one).unwrap_or_default())
    }
}

/// Ids lie below this, far beyond any vocabulary.
const MOST_TOKENS: u64 = 1 << 22;

/// What to do about a tokenizer that cannot be written.
const HINT: &str = "train with the target as a GGUF file, whose tokenizer is taken as it stands, or export eagle3 and use \
                    llama.cpp's convert_hf_to_gguf.py";

/// Tokens that models mark as ordinary ones and mean otherwise.
fn looks_special(token: &str) -> bool {
    let within = |open: &str, close: &str| token.starts_with(open) && token.ends_with(close);
    ["<pad>", "<mask>", "<2mass>", "[@BOS@]"].contains(&token)
        || within("<|", "|>")
        || within("<\u{ff5c}", "\u{ff5c}>")
        || within("<unused", ">")
}
