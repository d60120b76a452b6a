//! Tokens that other files than tokenizer.json name: what fine-tuning tools and older exports leave behind.
//!
//! They are added as Hugging Face transformers 5.8.1 does it (`tokenization_utils_base.py`,
//! `tokenization_utils_tokenizers.py`): first those of `added_tokens_decoder` in tokenizer_config.json by their ids, or
//! without that key those of added_tokens.json; then the tokens with a role; then the further special ones. Whoever is new
//! gets the next free id.
//!
//! Different from there: a file that names an id must be right about it, and no id may lie beyond the model's vocabulary.
//! There, a token silently gets another id than its file says, and the model another row than it was trained on.

use std::collections::HashSet;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer};

use crate::error::{Error, Result};
use crate::gguf::packed;
use crate::strict;

/// Roles that every tokenizer may have, in the order in which their tokens are added.
pub(super) const ROLES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

const DECODER: &str = "added_tokens_decoder";
const EXTRA: &str = "extra_special_tokens";
/// The older name of the same.
const ADDITIONAL: &str = "additional_special_tokens";

/// Ids of tokenizer.json lie below this, far beyond any vocabulary: the library counts on from the largest.
const MOST_IDS: u32 = 1 << 28;

/// One of the files.
#[derive(Debug)]
struct File {
    path: PathBuf,
    keys: Map<String, Value>,
}

/// The files beside tokenizer.json that name tokens; without keys where one is not there.
#[derive(Debug)]
pub(super) struct TokenFiles {
    /// tokenizer_config.json
    config: File,
    /// special_tokens_map.json
    roles: File,
    /// added_tokens.json
    added: File,
}

/// A token as a file names it.
#[derive(Debug, Clone)]
struct Named {
    token: AddedToken,
    /// The id, where the file says one.
    id: Option<u32>,
    file: PathBuf,
    key: String,
}

impl Named {
    fn wrong(&self, problem: &str) -> Error {
        let content: String = self.token.content.escape_debug().take(60).collect();
        Error::bad_file(&self.file, format!("`{}`: the token `{content}` {problem}", self.key))
            .with_hint("use the tokenizer's files that belong to the model, or correct this one")
    }
}

/// An object from a JSON file of a model; empty if the file is not there.
pub(super) fn read_object(model: &Path, name: &str) -> Result<Map<String, Value>> {
    let Some(text) = packed::read_file(model, name)? else {
        return Ok(Map::new());
    };
    strict::from_json(&text).map_err(|problem| Error::bad_file(model.join(name), problem))
}

impl TokenFiles {
    /// Reads the files of a model folder.
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let file = |name: &str| Ok::<_, Error>(File { keys: read_object(folder, name)?, path: folder.join(name) });
        let (config, roles, added) =
            (file("tokenizer_config.json")?, file("special_tokens_map.json")?, file("added_tokens.json")?);
        Ok(Self { config, roles, added })
    }

    /// The keys of tokenizer_config.json.
    pub(super) fn config(&self) -> &Map<String, Value> {
        &self.config.keys
    }

    /// Texts of the tokens with a role, by its name.
    pub(super) fn special_tokens(&self) -> Map<String, Value> {
        let text = |value: &Value| value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned);
        let of_role = |role: &str| self.in_order().into_iter().find_map(|file| file.keys.get(role).and_then(text));
        ROLES.into_iter().filter_map(|role| Some((role.to_owned(), Value::from(of_role(role)?)))).collect()
    }

    /// Where a role's token is looked for. A tokenizer_config.json that lists the added tokens knows the roles too; beside
    /// older ones, special_tokens_map.json counts first.
    fn in_order(&self) -> Vec<&File> {
        match self.config.keys.contains_key(DECODER) {
            true => vec![&self.config],
            false => vec![&self.roles, &self.config],
        }
    }

    /// Adds the tokens that `tokenizer` lacks, or has otherwise than the files say. Every id must lie below `limit`, the
    /// model's vocabulary. Returns the tokens that were added, by id.
    pub(super) fn complete(&self, tokenizer: &mut Tokenizer, limit: Option<usize>) -> Result<Vec<(u32, AddedToken)>> {
        let by_id = self.by_id()?;
        let with_roles = self.with_roles(&by_id)?;
        let further = self.further()?;

        let known = tokenizer.get_added_tokens_decoder();
        let largest = known.keys().chain(tokenizer.get_vocab(false).values()).copied().max().unwrap_or(0);
        if largest >= MOST_IDS {
            let problem = format!("tokenizer.json holds the id {largest}; expected ids below {MOST_IDS}");
            return Err(Error::bad_file(self.config.path.with_file_name("tokenizer.json"), problem));
        }
        let roles: HashSet<&str> = with_roles.iter().map(|named| named.token.content.as_str()).collect();
        let mut to_add: Vec<Named> =
            by_id.iter().filter(|named| !known.values().any(|token| *token == named.token)).cloned().collect();
        let of_known = known.values().map(|token| token.content.clone());
        let mut contents: HashSet<String> =
            of_known.chain(to_add.iter().map(|named| named.token.content.clone())).collect();
        for named in with_roles.iter().chain(&further) {
            if contents.insert(named.token.content.clone()) {
                to_add.push(named.clone());
            }
        }
        for named in &mut to_add {
            named.token.special |= roles.contains(named.token.content.as_str());
        }
        let tokens: Vec<AddedToken> = to_add.iter().map(|named| named.token.clone()).collect();
        if let Some(first) = to_add.first() {
            // The library panics over some tokens.
            let added = panic::catch_unwind(AssertUnwindSafe(|| tokenizer.add_tokens(tokens)));
            match added {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(first.wrong(&format!("and those behind it cannot be added: {error}"))),
                Err(_) => return Err(first.wrong("or one behind it cannot be added")),
            }
        }
        for named in by_id.iter().chain(&with_roles).chain(&further) {
            let id = tokenizer.token_to_id(&named.token.content);
            let Some(id) = id else { return Err(named.wrong("cannot be added")) };
            if let Some(said) = named.id.filter(|said| *said != id) {
                return Err(named.wrong(&format!("is said to be {said}, but the tokenizer has it as {id}")));
            }
            if let Some(limit) = limit.filter(|limit| id as usize >= *limit) {
                return Err(named.wrong(&format!("has the id {id}, the model has {limit} tokens")));
            }
        }
        let id = |named: Named| Some((tokenizer.token_to_id(&named.token.content)?, named.token));
        Ok(to_add.into_iter().filter_map(id).collect())
    }

    /// The tokens whose ids a file says, in the order of their ids.
    fn by_id(&self) -> Result<Vec<Named>> {
        let mut all = match self.config.keys.get(DECODER) {
            Some(Value::Object(decoder)) => {
                let one = |(id, value): (&String, &Value)| {
                    let (file, key) = (self.config.path.clone(), format!("{DECODER}.{}", brief(id)));
                    let id = id.parse().map_err(|_| Error::bad_file(&file, format!("`{key}`: expected a token id")))?;
                    Ok(Named { token: added_token(&file, &key, value, false)?, id: Some(id), file, key })
                };
                decoder.iter().map(one).collect::<Result<Vec<_>>>()?
            }
            Some(Value::Null) => Vec::new(),
            Some(_) => {
                let problem = format!("`{DECODER}`: expected an object of tokens by their ids");
                return Err(Error::bad_file(&self.config.path, problem));
            }
            None => {
                let texts = self.special_tokens();
                // The list of special_tokens_map.json is looked at when these are added already.
                let further =
                    self.further()?.into_iter().filter(|named| named.file != self.roles.path || named.key == EXTRA);
                let further: HashSet<String> = further.map(|named| named.token.content).collect();
                let is_special =
                    |content: &str| texts.values().any(|text| text == content) || further.contains(content);
                let one = |(content, value): (&String, &Value)| {
                    let (file, key) = (self.added.path.clone(), brief(content));
                    let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
                    let id =
                        id.ok_or_else(|| Error::bad_file(&file, format!("`{key}`: expected a token id, got {value}")));
                    Ok(Named { token: AddedToken::from(content, is_special(content)), id: Some(id?), file, key })
                };
                self.added.keys.iter().map(one).collect::<Result<Vec<_>>>()?
            }
        };
        all.sort_by_key(|named| named.id);
        match all.windows(2).find(|pair| pair[0].id == pair[1].id) {
            Some(pair) => Err(pair[1].wrong(&format!("has the id of `{}`", brief(&pair[0].token.content)))),
            None => Ok(all),
        }
    }

    /// The tokens with a role, then those with a role that this tokenizer alone has.
    fn with_roles(&self, by_id: &[Named]) -> Result<Vec<Named>> {
        let mut all = Vec::new();
        for role in ROLES {
            let found = self
                .in_order()
                .into_iter()
                .find_map(|file| file.keys.get(role).filter(|value| !value.is_null()).map(|value| (&file.path, value)));
            let Some((path, value)) = found else { continue };
            let mut named = named(path, role, value)?;
            // A list with ids knows more of a token than its role does.
            if let Some(known) = by_id.iter().find(|known| known.token.content == named.token.content) {
                named.token = known.token.clone();
            }
            all.push(named);
        }
        for file in self.in_order().into_iter().rev() {
            for (role, value) in &file.keys {
                let is_own = role.ends_with("_token") && !ROLES.contains(&role.as_str());
                let is_token = value.is_string() || value.get("content").is_some_and(Value::is_string);
                if is_own && is_token {
                    all.push(named(&file.path, role, value)?);
                }
            }
            // By name, where it is no list.
            if let Some(Value::Object(by_name)) = file.keys.get(EXTRA) {
                for (name, value) in by_name {
                    all.push(named(&file.path, &format!("{EXTRA}.{}", brief(name)), value)?);
                }
            }
        }
        Ok(all)
    }

    /// Where special tokens without a role are listed. The older key counts where there is no newer one.
    fn lists(&self) -> Vec<(&File, &'static str)> {
        let has = |file: &File, key: &str| file.keys.get(key).is_some_and(|value| !value.is_null());
        let of = |file: &File| [EXTRA, ADDITIONAL].into_iter().find(|key| has(file, key));
        let mut lists: Vec<_> = of(&self.config).map(|key| (&self.config, key)).into_iter().collect();
        if self.config.keys.contains_key(DECODER) {
            return lists;
        }
        if let Some(key) = of(&self.roles).filter(|key| *key == EXTRA || lists.is_empty()) {
            lists.push((&self.roles, key));
        }
        lists
    }

    /// Special tokens without a role.
    fn further(&self) -> Result<Vec<Named>> {
        let mut all = Vec::new();
        for (file, key) in self.lists() {
            match file.keys.get(key) {
                Some(Value::Array(list)) => {
                    for value in list {
                        all.push(named(&file.path, key, value)?);
                    }
                }
                // Those that have names are roles.
                None | Some(Value::Object(_)) => {}
                Some(_) => return Err(Error::bad_file(&file.path, format!("`{key}`: expected a list of tokens"))),
            }
        }
        Ok(all)
    }
}

/// A special token by its text, or with all that is to be said of it.
fn named(file: &Path, key: &str, value: &Value) -> Result<Named> {
    let token = match value {
        Value::String(content) => AddedToken::from(content, true),
        value => added_token(file, key, value, true)?,
    };
    Ok(Named { token, id: None, file: file.to_path_buf(), key: key.to_owned() })
}

/// A token from an object such as `{"content": "<|end|>", "special": true}`.
fn added_token(file: &Path, key: &str, value: &Value, special: bool) -> Result<AddedToken> {
    let wrong = |name: &str, want: &str| Error::bad_file(file, format!("`{key}`: `{name}`: expected {want}"));
    let content = value.get("content").and_then(Value::as_str).filter(|content| !content.is_empty());
    let content = content.ok_or_else(|| wrong("content", "the text of a token"))?;
    let flag = |name: &str| match value.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(_) => Err(wrong(name, "true or false")),
    };
    let mut token = AddedToken::from(content, special || flag("special")?.unwrap_or(false));
    token.normalized = flag("normalized")?.unwrap_or(token.normalized);
    token.lstrip = flag("lstrip")?.unwrap_or(false);
    token.rstrip = flag("rstrip")?.unwrap_or(false);
    token.single_word = flag("single_word")?.unwrap_or(false);
    Ok(token)
}

/// The beginning of a key that a stranger wrote.
fn brief(text: &str) -> String {
    text.escape_debug().take(60).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::data::ChatTokenizer;

    /// Tokens of the tokenizer in tests/data.
    const SIZE: usize = 454;

    /// A model folder of `SIZE + 10` tokens with these files beside its tokenizer.json.
    fn folder(files: &[(&str, Value)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/templates/tokenizer/tokenizer.json");
        std::fs::copy(source, folder.path().join("tokenizer.json")).unwrap();
        let write = |name: &str, value: &Value| std::fs::write(folder.path().join(name), value.to_string()).unwrap();
        write("config.json", &json!({"vocab_size": SIZE + 10}));
        files.iter().for_each(|(name, value)| write(name, value));
        folder
    }

    fn entry(content: &str) -> Value {
        json!({"content": content, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true})
    }

    /// Ids of `<|go|>`, `<|stop|>`, and of a text with both in it.
    fn ids(files: &[(&str, Value)]) -> Result<(u32, u32, usize)> {
        let folder = folder(files);
        let tokenizer = ChatTokenizer::load(folder.path(), None)?;
        let id = |token: &str| tokenizer.token_to_id(token).unwrap();
        let text = tokenizer.encode("<|go|>a<|stop|>")?;
        assert_eq!(text[0], id("<|go|>"));
        assert_eq!(*text.last().unwrap(), id("<|stop|>"));
        Ok((id("<|go|>"), id("<|stop|>"), text.len()))
    }

    /// The four ways of the files, and the ids that transformers 5.8.1 gives.
    #[test]
    fn tokens_of_every_file_are_one_token_each() {
        let (go, stop) = (SIZE as u32, SIZE as u32 + 1);
        let config = "tokenizer_config.json";
        let by_id = json!({go.to_string(): entry("<|go|>"), stop.to_string(): entry("<|stop|>")});
        for (files, want) in [
            (vec![(config, json!({"added_tokens_decoder": by_id, "eos_token": "<|stop|>"}))], (go, stop)),
            // Tokens with a role come before the others.
            (vec![(config, json!({"extra_special_tokens": ["<|go|>"], "eos_token": "<|stop|>"}))], (stop, go)),
            (
                vec![(config, json!({"additional_special_tokens": ["<|go|>", "<|stop|>"], "eos_token": "<|stop|>"}))],
                (stop, go),
            ),
            (
                vec![(config, json!({"extra_special_tokens": {"go_token": "<|go|>"}, "eos_token": entry("<|stop|>")}))],
                (stop, go),
            ),
            (vec![(config, json!({"go_token": "<|go|>", "eos_token": "<|stop|>"}))], (stop, go)),
            (
                vec![
                    (config, json!({"eos_token": "<|stop|>"})),
                    ("added_tokens.json", json!({"<|go|>": go, "<|stop|>": stop})),
                ],
                (go, stop),
            ),
            (
                vec![(
                    "special_tokens_map.json",
                    json!({"eos_token": entry("<|stop|>"), "additional_special_tokens": ["<|go|>"]}),
                )],
                (stop, go),
            ),
        ] {
            assert_eq!(ids(&files).unwrap(), (want.0, want.1, 3), "{files:?}");
        }
        // The list of tokenizer_config.json makes the older files be passed over.
        let files = [
            (config, json!({"added_tokens_decoder": by_id})),
            ("added_tokens.json", json!({"<|go|>": 3})),
            ("special_tokens_map.json", json!({"eos_token": "<|other|>"})),
        ];
        assert_eq!(ids(&files).unwrap(), (go, stop, 3));
        let folder = folder(&files);
        let tokenizer = ChatTokenizer::load(folder.path(), None).unwrap();
        assert_eq!(tokenizer.token_to_id("<|other|>"), None);
        assert!(tokenizer.is_special(go) && tokenizer.is_special(stop));
        // What is added decides about tokens, so it is part of the fingerprint.
        let plain = self::folder(&[]);
        let plain = ChatTokenizer::load(plain.path(), None).unwrap();
        assert_ne!(plain.fingerprint(), tokenizer.fingerprint());
        assert_eq!(plain.vocab_size(), SIZE);
        assert_eq!(tokenizer.vocab_size(), SIZE + 2);
    }

    #[test]
    fn files_that_are_wrong_about_a_token_are_refused_by_name() {
        let config = "tokenizer_config.json";
        let next = (SIZE + 1).to_string();
        for (files, words) in [
            // An id that is not the next one, and one that is another token's.
            (
                vec![(config, json!({"added_tokens_decoder": {&next: entry("<|go|>")}}))],
                vec![config, "`<|go|>` is said to be 455, but the tokenizer has it as 454"],
            ),
            (
                vec![(config, json!({"added_tokens_decoder": {"3": entry("<|go|>")}}))],
                vec!["`added_tokens_decoder.3`", "<|go|>"],
            ),
            (
                vec![("added_tokens.json", json!({"<|go|>": 4611686018427387904u64}))],
                vec!["added_tokens.json", "expected a token id"],
            ),
            (
                vec![("added_tokens.json", json!({"<|go|>": 454, "<|stop|>": 454}))],
                vec!["added_tokens.json", "has the id of"],
            ),
            (
                vec![(config, json!({"added_tokens_decoder": {"x": entry("<|go|>")}}))],
                vec!["`added_tokens_decoder.x`: expected a token id"],
            ),
            (
                vec![(config, json!({"added_tokens_decoder": {"454": {"id": 3}}}))],
                vec!["`content`: expected the text of a token"],
            ),
            (
                vec![(config, json!({"added_tokens_decoder": {"454": {"content": "a", "special": 1}}}))],
                vec!["`special`: expected true or false"],
            ),
            (vec![(config, json!({"added_tokens_decoder": []}))], vec!["`added_tokens_decoder`: expected an object"]),
            (
                vec![(config, json!({"extra_special_tokens": "<|go|>"}))],
                vec!["`extra_special_tokens`: expected a list"],
            ),
            // Beyond the model.
            (
                vec![("config.json", json!({"vocab_size": SIZE})), (config, json!({"eos_token": "<|stop|>"}))],
                vec!["`eos_token`: the token `<|stop|>` has the id 454, the model has 454 tokens"],
            ),
            (
                vec![("config.json", json!({"vocab_size": SIZE, "eos_token_id": SIZE}))],
                vec!["config.json", "`eos_token_id`: 454 is no token of a model with 454 tokens"],
            ),
            (
                vec![("generation_config.json", json!({"eos_token_id": [1, 460]}))],
                vec!["generation_config.json", "`eos_token_id`: 460 is no token of tokenizer.json"],
            ),
            (
                vec![("generation_config.json", json!({"eos_token_id": -1}))],
                vec!["`eos_token_id`: expected a token id or a list of them, got -1"],
            ),
            (vec![("config.json", json!({"vocab_size": "many"}))], vec!["config.json", "`vocab_size`"]),
        ] {
            let folder = folder(&files);
            let error = ChatTokenizer::load(folder.path(), None).unwrap_err();
            let text = error.to_string();
            words.iter().for_each(|word| assert!(text.contains(word), "no `{word}` in {text}"));
            assert_eq!(error.exit_code(), 2);
        }
    }
}
