//! Maps of a draft's own vocabulary, ours and SpecForge's.
#![no_main]

use std::path::Path;

use specforge::error::Result;
use specforge::vocab::VocabFile;

fn read() -> Result<()> {
    let ours = VocabFile::read(Path::new("map.safetensors")).map(|file| (file.map.d2t(), file.map.t2d()));
    let theirs = VocabFile::read(Path::new("vocab_mapping.pt")).map(|file| (file.map.d2t(), file.map.t2d()));
    let map = ["--set", "draft.vocab_map=map.safetensors"];
    let planned = specforge_fuzz::specforge(&[&["train", "--plan", "--config", "run.json"], &map[..]].concat());
    ours.and(theirs).map(drop).and(planned)
}

specforge_fuzz::target!(&["map.safetensors", "vocab_mapping.pt"], read);
