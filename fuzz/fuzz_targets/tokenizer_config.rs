//! What stands beside tokenizer.json: its configuration, special tokens, ends of sequences, templates in JSON.
#![no_main]

use std::path::Path;

use specforge::data::{ChatTokenizer, Message};
use specforge::error::Result;

fn read() -> Result<()> {
    let template = Path::new("chat_template.json");
    ChatTokenizer::load(Path::new("model"), Some(template))?;
    let tokenizer = ChatTokenizer::load(Path::new("model"), None)?;
    let _ = (tokenizer.special_token_ids(), tokenizer.id_limit(), tokenizer.eos_token());
    let text = tokenizer.render(&[Message::new("user", "u"), Message::new("assistant", "a")], None, true)?;
    tokenizer.encode(&text).map(drop)
}

specforge_fuzz::target!(
    &[
        "model/tokenizer_config.json",
        "model/special_tokens_map.json",
        "model/generation_config.json",
        "model/config.json",
        "chat_template.json",
    ],
    read
);
