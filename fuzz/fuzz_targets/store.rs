//! A store of hidden states: its manifest, and a shard whose checksum is put right so that it is looked into.
#![no_main]

use std::path::Path;

use serde_json::{Value, json};
use specforge::error::Result;
use specforge::files::Digests;
use specforge::features::store::manifest::StoreManifest;
use specforge::features::store::reader::{Share, Store};

fn read() -> Result<()> {
    let (path, folder) = (Path::new("store/store.json"), Path::new("store"));
    let before = std::fs::read(path).unwrap_or_default();
    let shard = std::fs::read("store/shard-00000.safetensors").unwrap_or_default();
    if let Ok(mut manifest) = serde_json::from_slice::<Value>(&before) {
        if let Some(entry) = manifest.pointer_mut("/shards/0").filter(|entry| entry.is_object()) {
            entry["bytes"] = json!(shard.len());
            entry["crc32c"] = json!(crc32c::crc32c(&shard));
        }
        let _ = std::fs::write(path, manifest.to_string());
    }
    let outcome = gather(folder);
    let planned =
        specforge_fuzz::specforge(&["train", "--plan", "--config", "run.json", "--set", "target.feature_store=store"]);
    let _ = std::fs::write(path, before);
    outcome.and(planned)
}

fn gather(folder: &Path) -> Result<()> {
    let manifest = StoreManifest::read(folder)?;
    let _ = manifest.differences(&manifest);
    let store = Store::open(folder, &Digests::unnoted(), Share::WHOLE, &|_, _| {})?;
    for (number, shard) in store.shards().iter().enumerate() {
        for document in 0..shard.len() {
            let ids: Vec<i64> =
                shard.id_bytes(document).as_chunks().0.iter().map(|&id| i64::from_le_bytes(id)).collect();
            store.find(&ids);
            for layer in 0..manifest.layers.len() {
                let _ = store.gather(layer, &[(number, shard.rows_of(document))])?;
            }
        }
    }
    Ok(())
}

specforge_fuzz::target!(&["store/store.json", "store/shard-00000.safetensors"], read);
