//! A model folder's tokenizer, with its chat template and its end-of-sequence tokens.
//!
//! Nothing is added to a text: whatever special tokens a sequence has are in the text, because the chat template or the
//! author of a preformatted file wrote them there.

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokenizers::{PostProcessorWrapper, Tokenizer};

use super::added_tokens::{TokenFiles, read_object};
use super::chat_template::{ChatTemplate, Prepared, TemplateSource};
use super::conversation::{Conversation, Message};
use crate::error::{Error, Result, foreign};
use crate::gguf::packed;

/// Token ids and where each lies in the text, in bytes. The several tokens of one character all lie where it does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// First byte and one past the last.
    pub offsets: Vec<(usize, usize)>,
}

/// Tokenizer, template and special tokens of a model folder.
#[derive(Debug)]
pub struct ChatTokenizer {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    folder: PathBuf,
    special_ids: HashSet<u32>,
    eos_ids: Vec<u32>,
    eos_text: Option<String>,
    vocab_size: usize,
    model_vocab_size: Option<usize>,
    fingerprint: String,
    parts: TokenizerParts,
}

/// Digests of what a tokenizer was made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizerParts {
    /// tokenizer.json
    pub tokenizer: String,
    /// Text of the chat template and of those it is chosen from; nothing where there is none.
    pub template: Option<String>,
    /// Special tokens by their role, and those that end a sequence.
    pub special_tokens: String,
}

impl ChatTokenizer {
    /// Loads `tokenizer.json`, `tokenizer_config.json` and the chat template of a model folder or a GGUF file.
    pub fn load(model_dir: &Path, template_override: Option<&Path>) -> Result<Self> {
        let path = model_dir.join("tokenizer.json");
        let Some(bytes) = packed::read_file(model_dir, "tokenizer.json")? else {
            let hint = match model_dir.join("snapshots").is_dir() {
                true => "this is a folder of the hub's cache: name one of those in `snapshots`",
                false => "name a Hugging Face folder with tokenizer.json; slow tokenizers must be converted first",
            };
            return Err(Error::bad_file(&path, "is not there").with_hint(hint));
        };
        let unreadable =
            |problem: String| Error::bad_file(&path, format!("is not a tokenizer this program can read: {problem}"));
        let tokenizer = foreign::library(|| parse(&bytes)).map_err(contradiction).and_then(|read| read);
        let mut tokenizer = tokenizer.map_err(unreadable)?;

        let model_config_path = model_dir.join("config.json");
        let model_config = read_object(model_dir, "config.json")?;
        let model_vocab_size = vocab_size(&model_config_path, &model_config)?;
        let files = TokenFiles::read(model_dir)?;
        let completed = files.complete(&mut tokenizer, model_vocab_size)?;
        let special_tokens = files.special_tokens();
        let source = TemplateSource::find(model_dir, template_override, files.config())?;
        let template = match &source {
            Some(source) => Some(ChatTemplate::new(source, special_tokens.clone())?),
            None => None,
        };
        let eos_text = special_tokens.get("eos_token").and_then(Value::as_str).map(str::to_owned);
        let generation_path = model_dir.join("generation_config.json");
        let generation_config = read_object(model_dir, "generation_config.json")?;
        let mut eos_ids = Vec::new();
        for (path, config) in [(&generation_path, &generation_config), (&model_config_path, &model_config)] {
            for id in token_ids(path, config, "eos_token_id")? {
                check_id(path, "eos_token_id", id, &tokenizer, model_vocab_size)?;
                eos_ids.push(id);
            }
        }
        eos_ids.extend(eos_text.as_deref().and_then(|text| tokenizer.token_to_id(text)));
        let mut seen = HashSet::new();
        eos_ids.retain(|id| seen.insert(*id));

        let added = tokenizer.get_added_tokens_decoder();
        let special_ids = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        let vocab_size = tokenizer.get_vocab(true).values().max().map_or(0, |largest| *largest as usize + 1);

        let templates: Vec<String> = source
            .iter()
            .flat_map(|source| &source.templates)
            .map(|(name, text)| format!("{}{}", hex(&Sha256::digest(name)), hex(&Sha256::digest(text))))
            .collect();
        let special = format!("{} {eos_ids:?}", Value::Object(special_tokens.clone()));
        let parts = TokenizerParts {
            tokenizer: hex(&Sha256::digest(&bytes)),
            template: source.is_some().then(|| hex(&Sha256::digest(templates.concat()))),
            special_tokens: hex(&Sha256::digest(special)),
        };
        let mut hash = Sha256::new();
        hash.update(Sha256::digest(&bytes));
        for (name, text) in source.iter().flat_map(|source| &source.templates) {
            hash.update(Sha256::digest(name));
            hash.update(Sha256::digest(text));
        }
        hash.update(Sha256::digest(Value::Object(special_tokens).to_string()));
        hash.update(Sha256::digest(format!("{eos_ids:?}")));
        // tokenizer.json alone says all of the others.
        if !completed.is_empty() {
            hash.update(Sha256::digest(format!("{completed:?}")));
        }
        Ok(Self {
            tokenizer,
            template,
            folder: model_dir.to_path_buf(),
            special_ids,
            eos_ids,
            eos_text,
            vocab_size,
            model_vocab_size,
            fingerprint: hex(&hash.finalize()),
            parts,
        })
    }

    /// The same, with values that every rendering of the template is given.
    pub fn with_template_arguments(mut self, arguments: Map<String, Value>) -> Self {
        if let Some(template) = self.template.as_mut().filter(|_| !arguments.is_empty()) {
            template.add_arguments(&arguments);
            let joined = format!("{}{}", self.fingerprint, Value::Object(arguments));
            self.fingerprint = hex(&Sha256::digest(joined));
        }
        self
    }

    /// Token ids of a text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.ask("encode a text", || self.tokenizer.encode_fast(text, false))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Token ids of a text, and where they lie in it.
    pub fn encode_with_offsets(&self, text: &str) -> Result<Encoded> {
        let encoding = self.ask("encode a text", || self.tokenizer.encode(text, false))?;
        Ok(Encoded { ids: encoding.get_ids().to_vec(), offsets: encoding.get_offsets().to_vec() })
    }

    /// Text of token ids.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.ask("decode tokens", || self.tokenizer.decode(ids, skip_special))
    }

    /// What the library answers. Where it panics, tokenizer.json is at fault, not the text: every text may meet it.
    fn ask<T>(&self, action: &str, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
        match foreign::library(call) {
            Ok(answer) => answer.map_err(|error| {
                Error::Failed(format!("the tokenizer of {} cannot {action}: {error}", self.folder.display()))
            }),
            Err(words) => {
                let problem = format!("cannot {action}: {}", contradiction(words));
                Err(Error::bad_file(self.folder.join("tokenizer.json"), problem)
                    .with_hint("use the tokenizer.json that the model was published with"))
            }
        }
    }

    /// The id of a token, by its text.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// The largest id of the tokenizer, added tokens included, plus one.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Every id must lie below this: the rows of the model's embedding where config.json names them.
    pub fn id_limit(&self) -> usize {
        self.model_vocab_size.unwrap_or(self.vocab_size)
    }

    /// Renders a conversation.
    pub fn render(&self, messages: &[Message], tools: Option<&Value>, add_generation_prompt: bool) -> Result<String> {
        self.prepare(messages, tools)?.render(messages.len(), add_generation_prompt)
    }

    /// A conversation, ready to be rendered many times.
    pub fn prepare(&self, messages: &[Message], tools: Option<&Value>) -> Result<Prepared<'_>> {
        let template = self.template.as_ref().ok_or_else(|| {
            Error::bad_file(&self.folder, "has no chat template, which conversations are rendered with")
                .with_hint("name a Jinja file with --chat-template or data.chat_template, or give preformatted `text`")
        })?;
        template.prepare(messages, tools)
    }

    /// The same, with the conversation's own template arguments.
    pub fn prepare_conversation(&self, conversation: &Conversation) -> Result<Prepared<'_>> {
        let Conversation { messages, tools, template_arguments, .. } = conversation;
        self.prepare(messages, tools.as_ref())?.with_arguments(template_arguments)
    }

    /// Tokens that end a sequence: those of generation_config.json, config.json and tokenizer_config.json.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// Text of the end-of-sequence token, where tokenizer_config.json names one.
    pub fn eos_token(&self) -> Option<&str> {
        self.eos_text.as_deref()
    }

    /// Whether a token is special or ends a sequence.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id) || self.eos_ids.contains(&id)
    }

    /// Ids of the special tokens and of those that end a sequence, ascending.
    pub fn special_token_ids(&self) -> Vec<u32> {
        let ids: BTreeSet<u32> = self.special_ids.iter().chain(&self.eos_ids).copied().collect();
        ids.into_iter().collect()
    }

    /// A hash of what each token id stands for, as hexadecimal digits. Templates and special roles do not enter it.
    pub fn vocabulary_hash(&self) -> String {
        let vocabulary = self.tokenizer.get_vocab(true);
        let mut tokens: Vec<(&u32, &String)> = vocabulary.iter().map(|(token, id)| (id, token)).collect();
        tokens.sort_unstable();
        let mut hash = Sha256::new();
        for (id, token) in tokens {
            hash.update(id.to_le_bytes());
            hash.update((token.len() as u64).to_le_bytes());
            hash.update(token);
        }
        hex(&hash.finalize())
    }

    /// A hash of everything that decides which tokens a conversation becomes.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Digests of what it was made of, one by one.
    pub fn parts(&self) -> &TokenizerParts {
        &self.parts
    }

    /// The model folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// Reads tokenizer.json, as a tokenizer that adds nothing, cuts nothing and fills nothing up.
fn parse(bytes: &[u8]) -> Result<Tokenizer, String> {
    let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|error| error.to_string())?;
    // Texts are whole already, and the byte-level post-processor would cut white space off the offsets.
    tokenizer.with_post_processor(None::<PostProcessorWrapper>);
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
    Ok(tokenizer)
}

/// What the words of a panic in the library mean: it takes for granted that the parts of a file fit each other.
fn contradiction(words: String) -> String {
    format!("its parts do not fit each other ({words})")
}

/// A key of config.json; models with several parts keep the language model's under `text_config`.
fn config_value<'a>(config: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    let own = config.get(key).filter(|value| !value.is_null());
    own.or_else(|| config.get("text_config")?.get(key).filter(|value| !value.is_null()))
}

/// The model's number of tokens, where config.json says it.
fn vocab_size(path: &Path, config: &Map<String, Value>) -> Result<Option<usize>> {
    let Some(value) = config_value(config, "vocab_size") else { return Ok(None) };
    let size = value.as_u64().filter(|size| (1..=u64::from(u32::MAX)).contains(size));
    let size = size.ok_or_else(|| {
        Error::bad_file(path, format!("`vocab_size`: expected a number from 1 to {}, got {value}", u32::MAX))
    });
    Ok(Some(size? as usize))
}

/// One id or a list of them.
fn token_ids(path: &Path, config: &Map<String, Value>, key: &str) -> Result<Vec<u32>> {
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| Error::bad_file(path, format!("`{key}`: expected a token id or a list of them, got {value}")))
    };
    match config_value(config, key) {
        Some(Value::Array(list)) => list.iter().map(id).collect(),
        Some(value) => Ok(vec![id(value)?]),
        None => Ok(Vec::new()),
    }
}

/// Refuses an id that stands for no token, or for none of the model's.
fn check_id(path: &Path, key: &str, id: u32, tokenizer: &Tokenizer, limit: Option<usize>) -> Result<()> {
    let problem = match (tokenizer.id_to_token(id), limit) {
        (_, Some(limit)) if id as usize >= limit => format!("`{key}`: {id} is no token of a model with {limit} tokens"),
        (None, _) => format!("`{key}`: {id} is no token of tokenizer.json"),
        (Some(_), _) => return Ok(()),
    };
    Err(Error::bad_file(path, problem).with_hint("correct the id, or use the tokenizer that belongs to the model"))
}

/// Bytes as lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
