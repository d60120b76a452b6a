//! Conversations, prompts and questions: records are found, understood, rendered and tokenised.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use specforge::data::{self, ChatTokenizer, DataConfig, Statistics, TokenCache};
use specforge::decode::regenerate::prompts::Prompts;
use specforge::error::Result;
use specforge::eval::acceptance::questions;

static TOKENIZER: LazyLock<ChatTokenizer> =
    LazyLock::new(|| ChatTokenizer::load(Path::new("model"), None).expect("a sound tokenizer"));

fn read() -> Result<()> {
    let path = Path::new("conversations.jsonl");
    let prompts = Prompts::read(path, 1.0);
    let questions = questions::read(&[path.into(), "questions.jsonl".into()], None);
    let cache_dir = Path::new(specforge_fuzz::SCRATCH).join("cache");
    let config = DataConfig { cache_dir, max_bad_share: 1.0, max_length: 64, ..DataConfig::default() };
    let (cache, _) = TokenCache::build_or_open(&[path.into()], &TOKENIZER, &config, &|_, _| {})?;
    for index in 0..cache.len() {
        data::document_text(&TOKENIZER, &cache.document(index), false)?;
        cache.find(cache.document(index).id);
    }
    let _ = Statistics::of(&cache, 0..cache.len()).to_string();
    prompts.and(questions.map(drop))
}

specforge_fuzz::target!(&["conversations.jsonl", "questions.jsonl"], read);
