//! Reads hidden states from a feature store, so that training needs the target's two tables and none of its layers.
//!
//! A document is found by its tokens: neither the order of files nor packing nor what else the store holds matters, and
//! a document that was tokenised in another way is not found rather than trained on wrongly.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::store::{Element, Store, StoreManifest, manifest, verify};
use super::{FeatureBatch, FeatureSource};
use crate::data::{PackedBatch, TokenCache};
use crate::error::{Error, Result};
use crate::files::{Digests, hexadecimal};
use crate::models::{Dimensions, TargetIdentity, TargetTables};

/// A feature source that runs nothing.
#[derive(Debug)]
pub struct StoredFeatures {
    folder: PathBuf,
    store: Store,
    kind: Kind,
    device: Device,
}

impl StoredFeatures {
    /// Opens a store for this target and tokenizer, and refuses it if it is another's. Every checksum is verified that is
    /// not noted, and the target's head is asked about a sample of rows. `progress` is told how many bytes are checked, and of how many.
    pub fn open(
        folder: &Path,
        target: &TargetIdentity,
        tables: &TargetTables,
        tokenizer: &str,
        digests: &Digests,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Self> {
        let manifest = StoreManifest::read(folder)?;
        let mut differences: Vec<String> = Vec::new();
        for what in target.differences(&manifest.target) {
            differences.push(format!("{what} of {} are not those it was captured from", target.path.display()));
        }
        let Dimensions { hidden_size, vocab_size, num_layers, .. } = tables.dimensions;
        let sizes = [
            ("hidden size", hidden_size, manifest.hidden_size),
            ("vocabulary", vocab_size, manifest.vocab_size),
            ("number of layers", num_layers as i64, manifest.num_layers as i64),
        ];
        for (name, want, got) in sizes.into_iter().filter(|(_, want, got)| want != got) {
            differences.push(format!("{name}: expected {want}, got {got}"));
        }
        if manifest.tokenizer != tokenizer {
            differences.push("its documents were made by another tokenizer or chat template".to_owned());
        }
        if !differences.is_empty() {
            let captured_from = manifest.target.path.display();
            let problem = format!("was captured from {captured_from}:\n  {}", differences.join("\n  "));
            return Err(Error::bad_file(folder, problem)
                .with_hint("capture a store of this target, or correct target.path and target.feature_store"));
        }
        let store = Store::open(folder, digests, progress)?;
        verify::verify(&store, &tables.head)?;
        let (kind, device) = (tables.head.kind(), tables.head.device());
        Ok(Self { folder: folder.to_path_buf(), store, kind, device })
    }

    /// The open store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Refuses, before anything is trained, a store that lacks states or documents that a run will ask for.
    pub fn require(&self, capture: &[usize], splits: &[(&TokenCache, &[usize])]) -> Result<()> {
        self.layers(capture)?;
        let mut missing: Vec<&str> = Vec::new();
        let mut total = 0;
        for (cache, documents) in splits {
            for document in documents.iter().map(|&index| cache.document(index)) {
                total += 1;
                let ids: Vec<i64> = document.tokens.iter().map(|&token| i64::from(token)).collect();
                if self.store.find(&ids).is_none() {
                    missing.push(document.id);
                }
            }
        }
        match missing.first() {
            None => Ok(()),
            Some(first) => {
                let count = missing.len();
                let problem = format!("lacks {count} of the {total} documents of this run, among them `{first}`");
                Err(self.incomplete(problem))
            }
        }
    }

    /// A digest of the shards that hold these documents. Shards that were added since do not change it.
    pub fn digest(&self, splits: &[(&TokenCache, &[usize])]) -> String {
        let ids = |cache: &TokenCache, index| -> Vec<i64> {
            cache.document(index).tokens.iter().map(|&token| i64::from(token)).collect()
        };
        let documents = splits.iter().flat_map(|(cache, documents)| documents.iter().map(|&index| ids(cache, index)));
        let used: BTreeSet<usize> = documents.filter_map(|ids| self.store.find(&ids)).map(|(shard, _)| shard).collect();
        let manifest = self.store.manifest();
        let entries = used.into_iter().map(|shard| &manifest.shards[shard]);
        let mut shards: Vec<String> = entries.map(|entry| format!("{} {:08x}\n", entry.bytes, entry.crc32c)).collect();
        shards.sort_unstable();
        hexadecimal(&Sha256::digest(shards.concat()))
    }

    /// Whether the store holds, to the bit, what a target of this element type computes. `dtype` is the type's name.
    pub fn is_exact(&self, dtype: &str) -> bool {
        let StoreManifest { element, target_dtype, .. } = self.store.manifest();
        let keeps = match element {
            Element::Float32 => true,
            Element::Bfloat16 => self.kind == Kind::BFloat16,
            Element::Float8 => false,
        };
        keeps && target_dtype == dtype
    }

    /// Places of captured states in the store's list.
    fn layers(&self, capture: &[usize]) -> Result<Vec<usize>> {
        let held = &self.store.manifest().layers;
        let place = |index: &usize| held.iter().position(|layer| layer == index);
        capture.iter().map(|index| place(index).ok_or(index)).collect::<Result<_, _>>().map_err(|index| {
            let (asked, held) = (manifest::listed(capture), manifest::listed(held));
            let problem = format!("lacks hidden state {index}: the draft asks for {asked}, the store has {held}");
            Error::bad_file(&self.folder, problem)
                .with_hint(format!("capture into another folder with --layers {asked}"))
        })
    }

    fn incomplete(&self, problem: String) -> Error {
        Error::bad_file(&self.folder, problem)
            .with_hint("run `specforge capture` with this configuration again: it adds what is missing")
    }
}

impl FeatureSource for StoredFeatures {
    fn features<'a>(&self, batch: &'a PackedBatch, capture: &[usize]) -> Result<FeatureBatch<'a>> {
        let layers = self.layers(capture)?;
        let mut places = Vec::with_capacity(batch.lengths.len());
        let mut start = 0;
        for (&length, name) in batch.lengths.iter().zip(&batch.documents) {
            let ids = &batch.ids[start..start + length as usize];
            start += length as usize;
            let place = self.store.find(ids);
            places.push(place.ok_or_else(|| self.incomplete(format!("lacks the document `{name}`")))?);
        }
        let states = |layer| {
            let states = self.store.gather(layer, &places)?; // [T, H], on the host
            // Moved as stored, widened there: fewer bytes travel.
            Ok::<Tensor, Error>(states.f_to_device(self.device)?.f_to_kind(self.kind)?)
        };
        let hidden = layers.into_iter().map(states).collect::<Result<_>>()?;
        Ok(FeatureBatch { batch, hidden })
    }
}
