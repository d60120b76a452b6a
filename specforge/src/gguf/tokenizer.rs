//! `tokenizer.json` and its two companions from GGUF metadata.
//!
//! Two kinds exist in the Llama family. Byte-level BPE (`gpt2`) carries its merges, but of its pre-tokenizer only the
//! name; SentencePiece BPE (`llama`) carries scores, from which merges are made as `transformers` makes them: every
//! split of a token into two tokens, best score first.

use std::collections::{HashMap, HashSet};
use std::str::FromStr;

use serde_json::{Map, Value, json};

use super::config::SpecialIds;
use super::metadata::Metadata;
use super::pre_tokenizer::{self, PreTokenizer};
use crate::error::{Result, foreign};

const MODEL: &str = "tokenizer.ggml.model";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const TEMPLATE: &str = "tokenizer.chat_template";

const TYPE_UNKNOWN: u64 = 2;
const TYPE_CONTROL: u64 = 3;
const TYPE_USER_DEFINED: u64 = 4;
const TYPE_BYTE: u64 = 6;

/// Bytes of a token. Merges are looked for at every place of one, each by both halves.
const LONGEST_TOKEN: usize = 1024;

/// SentencePiece's stand-in for a space.
const SPACE: &str = "\u{2581}";

/// The three files of a tokenizer.
#[derive(Debug)]
pub(super) struct TokenizerFiles {
    pub(super) tokenizer: Value,
    pub(super) config: Value,
    pub(super) special_tokens_map: Value,
    /// What kind it is: `gpt2/smollm`, `llama`.
    pub(super) kind: String,
    pub(super) has_chat_template: bool,
}

/// Whether the file holds a SentencePiece vocabulary; any other than the two known kinds is refused.
pub(super) fn is_sentencepiece(metadata: &Metadata) -> Result<bool> {
    match metadata.need(MODEL, Metadata::text)? {
        "gpt2" => Ok(false),
        "llama" => Ok(true),
        other => Err(metadata.bad(format!("`{MODEL}`: expected gpt2 or llama, got `{other}`"))),
    }
}

/// Makes the files, and checks that `tokenizer.json` loads.
pub(super) fn read(metadata: &Metadata, ids: &SpecialIds, context: usize) -> Result<TokenizerFiles> {
    let vocabulary = Vocabulary::read(metadata)?;
    let sentencepiece = is_sentencepiece(metadata)?;
    let (parts, kind) = match sentencepiece {
        true => (sentencepiece_parts(metadata, &vocabulary, ids)?, "llama".to_owned()),
        false => {
            let name = metadata.need(pre_tokenizer::KEY, Metadata::text)?;
            (byte_level_parts(metadata, &vocabulary, pre_tokenizer::by_name(metadata, name)?)?, format!("gpt2/{name}"))
        }
    };
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": post_processor(metadata, &vocabulary, ids, parts.add_bos)?,
        "decoder": parts.decoder,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": parts.unk_token,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": sentencepiece,
            "byte_fallback": sentencepiece,
            "ignore_merges": parts.ignore_merges,
            "vocab": vocabulary.json(),
            "merges": parts.merges,
        },
    });
    foreign::answer(|| tokenizers::Tokenizer::from_str(&tokenizer.to_string()))
        .map_err(|error| metadata.bad(format!("the tokenizer cannot be used: {error}")))?;
    let roles = vocabulary.roles(ids);
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": parts.add_prefix_space,
    });
    let template = metadata.text(TEMPLATE)?;
    if let Some(entries) = config.as_object_mut() {
        entries.extend(roles.clone());
        entries.insert("clean_up_tokenization_spaces".to_owned(), false.into());
        entries.insert("model_max_length".to_owned(), context.into());
        entries.extend(template.map(|template| ("chat_template".to_owned(), template.into())));
    }
    Ok(TokenizerFiles {
        tokenizer,
        config,
        special_tokens_map: Value::Object(roles),
        kind,
        has_chat_template: template.is_some(),
    })
}

/// What differs between the two kinds.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    merges: Value,
    unk_token: Option<String>,
    ignore_merges: bool,
    add_bos: bool,
    add_prefix_space: bool,
}

struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    types: Vec<u64>,
    ids: HashMap<&'a str, usize>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a Metadata) -> Result<Self> {
        let tokens = metadata.need(TOKENS, Metadata::texts)?;
        let types = metadata.need(TYPES, Metadata::wholes)?;
        if types.len() != tokens.len() {
            let (want, got) = (tokens.len(), types.len());
            return Err(metadata.bad(format!("`{TYPES}`: expected {want} elements, one a token, got {got}")));
        }
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            if token.len() > LONGEST_TOKEN {
                let problem =
                    format!("`{TOKENS}`: token {id} has {} bytes; expected at most {LONGEST_TOKEN}", token.len());
                return Err(metadata.bad(problem));
            }
            if let Some(first) = ids.insert(*token, id) {
                return Err(metadata.bad(format!("`{TOKENS}`: {token:?} stands twice, as {first} and as {id}")));
            }
        }
        Ok(Self { tokens, types, ids })
    }

    fn of_type(&self, wanted: u64) -> impl Iterator<Item = (usize, &'a str)> {
        let typed = self.types.iter().zip(&self.tokens).enumerate();
        typed.filter(move |(_, (kind, _))| **kind == wanted).map(|(id, (_, token))| (id, *token))
    }

    fn json(&self) -> Value {
        let entries = self.tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), id.into()));
        Value::Object(entries.collect())
    }

    /// Tokens that are cut out of the text before anything else: control tokens, then those the user added.
    fn added_tokens(&self) -> Vec<Value> {
        let control = self.of_type(TYPE_CONTROL).map(|(id, token)| (id, token, true));
        let unknown = self.of_type(TYPE_UNKNOWN).map(|(id, token)| (id, token, true));
        let user_defined = self.of_type(TYPE_USER_DEFINED).map(|(id, token)| (id, token, false));
        let mut all: Vec<_> = control.chain(unknown).chain(user_defined).collect();
        all.sort_by_key(|(id, ..)| *id);
        let entry = |(id, content, special): (usize, &str, bool)| {
            json!({
                "id": id,
                "content": content,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": special,
            })
        };
        all.into_iter().map(entry).collect()
    }

    /// The tokens with a role, by the name of the role.
    fn roles(&self, ids: &SpecialIds) -> Map<String, Value> {
        let roles = [("bos_token", ids.bos), ("eos_token", ids.eos), ("pad_token", ids.pad), ("unk_token", ids.unk)];
        let present = roles.into_iter().filter_map(|(role, id)| Some((role, self.token(id)?)));
        present.map(|(role, token)| (role.to_owned(), token.into())).collect()
    }

    fn token(&self, id: Option<u64>) -> Option<&'a str> {
        self.tokens.get(usize::try_from(id?).ok()?).copied()
    }
}

fn byte_level_parts(metadata: &Metadata, vocabulary: &Vocabulary<'_>, pre: PreTokenizer) -> Result<Parts> {
    if metadata.flag("tokenizer.ggml.add_space_prefix")? == Some(true) {
        return Err(metadata.bad("`tokenizer.ggml.add_space_prefix` is not supported for the tokenizer `gpt2`"));
    }
    let merges = metadata.need(MERGES, Metadata::texts)?;
    check_merges(metadata, vocabulary, &merges)?;
    Ok(Parts {
        normalizer: pre.normalizer,
        pre_tokenizer: pre.pre_tokenizer,
        decoder: pre_tokenizer::byte_level_decoder(),
        merges: merges.into(),
        unk_token: None,
        ignore_merges: pre.ignore_merges,
        add_bos: pre.add_bos,
        add_prefix_space: false,
    })
}

fn sentencepiece_parts(metadata: &Metadata, vocabulary: &Vocabulary<'_>, ids: &SpecialIds) -> Result<Parts> {
    if metadata.flag("tokenizer.ggml.remove_extra_whitespaces")? == Some(true) {
        return Err(metadata.bad("`tokenizer.ggml.remove_extra_whitespaces` is not supported"));
    }
    let merges = match metadata.texts(MERGES)? {
        Some(merges) => {
            check_merges(metadata, vocabulary, &merges)?;
            merges.into()
        }
        None => merges_by_score(metadata, vocabulary)?,
    };
    let prefix = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = |from: &str, to: &str| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
    let mut normalizers = vec![replace(" ", SPACE)];
    let mut decoders = vec![replace(SPACE, " "), json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
    if prefix {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": SPACE }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    Ok(Parts {
        normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
        pre_tokenizer: Value::Null,
        decoder: json!({ "type": "Sequence", "decoders": decoders }),
        merges,
        unk_token: vocabulary.token(ids.unk).map(str::to_owned),
        ignore_merges: false,
        add_bos: true,
        add_prefix_space: prefix,
    })
}

/// Every merge is of two tokens into one.
fn check_merges(metadata: &Metadata, vocabulary: &Vocabulary<'_>, merges: &[&str]) -> Result<()> {
    for (index, merge) in merges.iter().enumerate() {
        let bad = |problem: String| metadata.bad(format!("`{MERGES}`, merge {}: {problem}", index + 1));
        let Some((left, right)) = merge.split_once(' ').filter(|(_, right)| !right.contains(' ')) else {
            return Err(bad(format!("expected two tokens with a space between, got {merge:?}")));
        };
        for token in [left, right, &format!("{left}{right}")] {
            if !vocabulary.ids.contains_key(token) {
                return Err(bad(format!("{token:?} is no token")));
            }
        }
    }
    Ok(())
}

/// Merges made from scores: see the head of this file. Equal scores fall to the longer left half, then the longer
/// right half, then the order of the vocabulary.
fn merges_by_score(metadata: &Metadata, vocabulary: &Vocabulary<'_>) -> Result<Value> {
    let scores = metadata.need(SCORES, Metadata::numbers)?;
    if scores.len() != vocabulary.tokens.len() {
        let (want, got) = (vocabulary.tokens.len(), scores.len());
        return Err(metadata.bad(format!("`{SCORES}`: expected {want} elements, one a token, got {got}")));
    }
    // Tokens that text never merges into: they are cut out before, or stand for what cannot be written.
    let apart = [TYPE_UNKNOWN, TYPE_CONTROL, TYPE_USER_DEFINED, TYPE_BYTE];
    let skipped: HashSet<usize> = apart.iter().flat_map(|kind| vocabulary.of_type(*kind)).map(|(id, _)| id).collect();
    let mut merges = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if skipped.contains(&id) {
            continue;
        }
        let mut splits = Vec::new();
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            let (Some(&left_id), Some(&right_id)) = (vocabulary.ids.get(left), vocabulary.ids.get(right)) else {
                continue;
            };
            if !skipped.contains(&left_id) && !skipped.contains(&right_id) {
                splits.push((left_id, right_id, left, right));
            }
        }
        splits.sort_by_key(|(left_id, right_id, ..)| (*left_id, *right_id));
        let length = |text: &str| text.chars().count();
        merges
            .extend(splits.into_iter().map(|(.., left, right)| (scores[id], length(left), length(right), left, right)));
    }
    merges.sort_by(|one, other| {
        other.0.total_cmp(&one.0).then(other.1.cmp(&one.1)).then(other.2.cmp(&one.2)) // stable
    });
    Ok(merges.into_iter().map(|(.., left, right)| json!([left, right])).collect())
}

/// Adds the tokens that every text begins and ends with, where the file asks for them.
fn post_processor(
    metadata: &Metadata,
    vocabulary: &Vocabulary<'_>,
    ids: &SpecialIds,
    add_bos_by_default: bool,
) -> Result<Value> {
    let add_bos = metadata.flag("tokenizer.ggml.add_bos_token")?;
    let wanted = [
        ("bos", add_bos.unwrap_or(add_bos_by_default), ids.bos),
        ("eos", metadata.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false), ids.eos),
    ];
    let mut edges = [None, None];
    for (edge, (name, add, id)) in edges.iter_mut().zip(wanted) {
        if add {
            let Some(token) = vocabulary.token(id) else {
                let problem =
                    format!("the tokenizer adds a token `{name}`, but `tokenizer.ggml.{name}_token_id` is missing");
                return Err(metadata.bad(problem));
            };
            *edge = Some((token, id));
        }
    }
    let [first, last] = edges;
    if first.is_none() && last.is_none() {
        return Ok(Value::Null);
    }
    let around = |sequence: &str, kind: u64| {
        let special = |(token, _): (&str, Option<u64>)| json!({ "SpecialToken": { "id": token, "type_id": kind } });
        let text = json!({ "Sequence": { "id": sequence, "type_id": kind } });
        first.map(special).into_iter().chain([text]).chain(last.map(special)).collect::<Vec<_>>()
    };
    let special = [first, last].into_iter().flatten();
    let special = special.map(|(token, id)| (token.to_owned(), json!({ "id": token, "ids": [id], "tokens": [token] })));
    let pair = [around("A", 0), around("B", 1)].concat();
    Ok(json!({
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": pair,
        "special_tokens": Value::Object(special.collect()),
    }))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::quantized::gguf_file::Value as GgufValue;
    use tokenizers::Tokenizer;

    use super::super::synthetic::{Synthetic, noise, strings};
    use super::super::{ImportOptions, import};
    use super::*;

    fn imported(file: &Synthetic) -> Result<(Tokenizer, Value)> {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        import(&file.write(folder.path()), &out, &ImportOptions::default(), &|_, _| {})?;
        let config = std::fs::read(out.join("tokenizer_config.json")).unwrap();
        Ok((Tokenizer::from_file(out.join("tokenizer.json")).unwrap(), serde_json::from_slice(&config).unwrap()))
    }

    fn tokens(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
        tokenizer.encode(text, true).unwrap().get_tokens().to_vec()
    }

    #[test]
    fn byte_level_text_comes_back_and_special_tokens_are_cut_out() {
        let mut file = Synthetic::plain();
        let template = "{{ messages }}";
        file.set(TEMPLATE, GgufValue::String(template.to_owned()));
        let (tokenizer, config) = imported(&file).unwrap();
        assert_eq!(config["chat_template"], json!(template));
        assert_eq!(config["bos_token"], json!("<|begin|>"));
        let text = "<|begin|>he she\t12 é\u{1F600}<tool>\n";
        let got = tokens(&tokenizer, text);
        assert_eq!(&got[..5], ["<|begin|>", "he", "Ġ", "s", "he"]);
        assert!(got.contains(&"<tool>".to_owned()));
        let ids = tokenizer.encode(text, true).unwrap().get_ids().to_vec();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text.replace("<|begin|>", ""));
    }

    #[test]
    fn every_pre_tokenizer_loads_and_cuts_numbers_its_own_way() {
        let cases = [("smollm", 1), ("llama-bpe", 3), ("qwen2", 1), ("gpt-2", 9), ("tekken", 1), ("smaug-bpe", 3)];
        for (name, digits) in cases {
            let mut file = Synthetic::plain();
            file.set(pre_tokenizer::KEY, GgufValue::String(name.to_owned()));
            let (tokenizer, _) = imported(&file).unwrap();
            let mut text = tokenizers::PreTokenizedString::from("a 123456789");
            tokenizers::PreTokenizer::pre_tokenize(tokenizer.get_pre_tokenizer().unwrap(), &mut text).unwrap();
            let splits = text.get_splits(tokenizers::OffsetReferential::Original, tokenizers::OffsetType::Byte);
            let longest = splits.iter().map(|(split, ..)| split.chars().filter(char::is_ascii_digit).count()).max();
            assert_eq!(longest, Some(digits), "{name}");
            let adds_bos = ["llama-bpe", "tekken"].contains(&name);
            assert_eq!(tokens(&tokenizer, "s")[0] == "<|begin|>", adds_bos, "{name}");
        }
    }

    #[test]
    fn the_file_decides_about_first_and_last_token() {
        let mut file = Synthetic::plain();
        file.set("tokenizer.ggml.add_bos_token", GgufValue::Bool(true));
        file.set("tokenizer.ggml.add_eos_token", GgufValue::Bool(true));
        let (tokenizer, _) = imported(&file).unwrap();
        assert_eq!(tokens(&tokenizer, "he"), ["<|begin|>", "he", "<|end|>"]);
        let pair = tokenizer.encode(("h", "s"), true).unwrap();
        assert_eq!(pair.get_tokens(), ["<|begin|>", "h", "<|end|>", "<|begin|>", "s", "<|end|>"]);
        file.remove("tokenizer.ggml.bos_token_id");
        let error = imported(&file).unwrap_err().to_string();
        assert!(error.contains("`tokenizer.ggml.bos_token_id` is missing"), "{error}");
    }

    /// A SentencePiece vocabulary built like Llama 2's, of pieces made from noise; also the pieces with their scores.
    fn sentencepiece() -> (Synthetic, Vec<(String, f32)>) {
        let mut pieces = vec![("<unk>".to_owned(), 0.0, 2), ("<s>".to_owned(), 0.0, 3), ("</s>".to_owned(), 0.0, 3)];
        pieces.extend((0..=255).map(|byte| (format!("<0x{byte:02X}>"), 0.0, 6)));
        let letters = ["a", "b", "c", SPACE];
        let mut words: Vec<String> = Vec::new();
        for round in 0..400u64 {
            let length = 2 + (noise(round, 0).abs() * 4.0) as u64;
            let letter = |at| letters[(noise(round, at + 1).abs() * 4.0) as usize % 4];
            let word: String = (0..length).map(letter).collect();
            if !words.contains(&word) && words.len() < 59 {
                words.push(word);
            }
        }
        pieces.extend(words.iter().enumerate().map(|(rank, word)| (word.clone(), -(rank as f32), 1)));
        pieces.extend(letters.iter().enumerate().map(|(rank, letter)| ((*letter).to_owned(), -100.0 - rank as f32, 1)));
        let mut file = Synthetic::plain();
        let texts: Vec<&str> = pieces.iter().map(|(text, ..)| text.as_str()).collect();
        file.set(TOKENS, strings(&texts));
        file.set(SCORES, GgufValue::Array(pieces.iter().map(|(_, score, _)| GgufValue::F32(*score)).collect()));
        file.set(TYPES, GgufValue::Array(pieces.iter().map(|(.., kind)| GgufValue::I32(*kind)).collect()));
        file.set(MODEL, GgufValue::String("llama".to_owned()));
        for key in [MERGES, pre_tokenizer::KEY, "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"] {
            file.remove(key);
        }
        for name in ["token_embd.weight", "output.weight"] {
            let tensor = file.tensor(name);
            tensor.shape[0] = pieces.len() as u64;
            tensor.data.resize(pieces.len() * 256 * 4, 0);
        }
        (file, pieces.into_iter().filter(|(.., kind)| *kind == 1).map(|(text, score, _)| (text, score)).collect())
    }

    /// llama.cpp's own way: again and again the best-scored pair of neighbours that is a piece, leftmost first.
    fn by_score(text: &str, pieces: &[(String, f32)]) -> Vec<String> {
        let scores: HashMap<&str, f32> = pieces.iter().map(|(text, score)| (text.as_str(), *score)).collect();
        let mut symbols: Vec<String> = text.chars().map(String::from).collect();
        loop {
            let mut best: Option<(f32, usize)> = None;
            for at in 1..symbols.len() {
                let joined = format!("{}{}", symbols[at - 1], symbols[at]);
                if let Some(&score) = scores.get(joined.as_str())
                    && best.is_none_or(|(other, _)| score > other)
                {
                    best = Some((score, at));
                }
            }
            let Some((_, at)) = best else { return symbols };
            let right = symbols.remove(at);
            symbols[at - 1].push_str(&right);
        }
    }

    #[test]
    fn merges_made_from_scores_cut_like_sentencepiece() {
        let (file, pieces) = sentencepiece();
        let (tokenizer, config) = imported(&file).unwrap();
        assert_eq!(config["unk_token"], json!("<unk>"));
        let mut merged = 0;
        for round in 0..300u64 {
            let letter = |at: u64| ["a", "b", "c", " "][(noise(round + 1000, at).abs() * 4.0) as usize % 4];
            let text: String = (0..24).map(letter).collect();
            let want = by_score(&format!(" {text}").replace(' ', SPACE), &pieces);
            merged += 25 - want.len();
            let got = tokens(&tokenizer, &text);
            assert_eq!(got[0], "<s>");
            assert_eq!(got[1..], want, "{text:?}");
            let ids = tokenizer.encode(text.as_str(), true).unwrap().get_ids().to_vec();
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        }
        assert!(merged > 1000, "the vocabulary hardly merges: {merged}");
        assert_eq!(tokens(&tokenizer, "é")[2..], ["<0xC3>", "<0xA9>"]);
    }

    #[test]
    fn sentencepiece_files_say_whether_a_space_comes_first() {
        let (mut file, _) = sentencepiece();
        file.set("tokenizer.ggml.add_space_prefix", GgufValue::Bool(false));
        file.set("tokenizer.ggml.add_bos_token", GgufValue::Bool(false));
        let (tokenizer, _) = imported(&file).unwrap();
        let text = " b";
        let ids = tokenizer.encode(text, true).unwrap().get_ids().to_vec();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        assert_eq!(tokens(&tokenizer, "\n"), ["<0x0A>"]);
        file.remove(SCORES);
        assert!(imported(&file).unwrap_err().to_string().contains("`tokenizer.ggml.scores` is missing"));
        let (mut file, _) = sentencepiece();
        file.set("tokenizer.ggml.remove_extra_whitespaces", GgufValue::Bool(true));
        assert!(imported(&file).unwrap_err().to_string().contains("remove_extra_whitespaces"));
    }
}
