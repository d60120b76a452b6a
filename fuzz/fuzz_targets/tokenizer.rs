//! tokenizer.json, and texts and ids that go through it.
#![no_main]

use std::path::Path;

use specforge::data::{ChatTokenizer, TextStream};
use specforge::error::Result;

const TEXTS: [&str; 5] =
    ["", "Hello, world 12 345 <|im_start|>", "  a\n\n\tb ", "\u{0}\u{fffd}\u{1f600} \u{301}中文", "ǅ ß İ ﬁ"];

fn read() -> Result<()> {
    let tokenizer = ChatTokenizer::load(Path::new("model"), None)?;
    let _ = (tokenizer.vocabulary_hash(), tokenizer.special_token_ids(), tokenizer.token_to_id("a"));
    for text in TEXTS {
        let ids = tokenizer.encode(text)?;
        tokenizer.encode_with_offsets(text)?;
        tokenizer.decode(&ids, true)?;
    }
    let mut stream = TextStream::new(&tokenizer);
    for id in (0..600).chain([u32::MAX]) {
        tokenizer.decode(&[id], false)?;
        stream.push(id)?;
    }
    stream.finish().map(drop)
}

specforge_fuzz::target!(&["model/tokenizer.json"], read);
