//! Answers of a stopped `regen` and the record beside them, gone on with.
#![no_main]

use std::fs;
use std::path::Path;

const FILES: [&str; 2] = ["answers.jsonl", "answers.jsonl.run.json"];

fn read() -> specforge::error::Result<()> {
    let scratch = Path::new(specforge_fuzz::SCRATCH);
    let _ = fs::create_dir_all(scratch);
    for name in FILES {
        let _ = fs::copy(name, scratch.join(name));
    }
    let files = ["--prompts", "conversations.jsonl", "--out", "scratch/answers.jsonl", "--max-new-tokens", "4"];
    specforge_fuzz::specforge(&[&["regen", "--target", "model", "--device", "cpu"], &files[..]].concat())
}

specforge_fuzz::target!(&FILES, read);
