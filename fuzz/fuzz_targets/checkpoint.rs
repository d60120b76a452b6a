//! A checkpoint: its manifest, and files whose digests are put right so that they are looked into.
#![no_main]

use std::path::Path;

use serde_json::{Value, json};
use specforge::checkpoint::FileDigest;
use specforge::error::Result;

const FOLDER: &str = "run/step-00000001";

fn read() -> Result<()> {
    let path = Path::new(FOLDER).join("manifest.json");
    let before = std::fs::read(&path).unwrap_or_default();
    if let Ok(mut manifest) = serde_json::from_slice::<Value>(&before) {
        for name in ["model.safetensors", "optimizer.safetensors"] {
            if let (Some(place), Ok(digest)) =
                (manifest.pointer_mut(&format!("/files/{name}")), FileDigest::of(&Path::new(FOLDER).join(name)))
            {
                *place = json!(digest);
            }
        }
        let _ = std::fs::write(&path, manifest.to_string());
    }
    let outcome = specforge_fuzz::all(&[
        &["export", "--checkpoint", "run", "--out", "scratch/export", "--json"],
        &["train", "--config", "run.json", "--set", "train.output_dir=run", "--plan"],
    ]);
    let prompt = ["--draft", "run", "--prompt", "why", "--max-new-tokens", "2", "--device", "cpu"];
    let decoded = specforge_fuzz::specforge(&[&["generate", "--json", "--target", "model"], &prompt[..]].concat());
    let _ = std::fs::write(&path, before);
    outcome.and(decoded)
}

specforge_fuzz::target!(
    &[
        "run/step-00000001/manifest.json",
        "run/step-00000001/model.safetensors",
        "run/step-00000001/optimizer.safetensors",
    ],
    read
);
