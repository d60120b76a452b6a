//! Reads hidden states from a feature store, so that training needs the target's two tables and none of its layers.
//!
//! A document is found by its tokens: neither the order of files nor packing nor what else the store holds matters, and
//! a document that was tokenised in another way is not found rather than trained on wrongly.
//!
//! A thread reads: while the loop trains on one batch, it copies the states of the next from the mapped shards, and on to
//! the GPU where there is one.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::page_locked::Ring;
use super::store::{Element, Share, Store, StoreManifest, manifest, verify};
use super::worker::Worker;
use super::{FeatureBatch, FeatureSource, Pending};
use crate::data::{PackedBatch, TokenCache};
use crate::error::{Error, Result};
use crate::files::{Digests, hexadecimal};
use crate::models::{TargetIdentity, TargetInfo, TargetTables};

/// A feature source that runs nothing.
#[derive(Debug)]
pub struct StoredFeatures {
    shelves: Arc<Shelves>,
    worker: Worker,
}

/// The open store, and what its states become.
#[derive(Debug)]
struct Shelves {
    folder: PathBuf,
    store: Store,
    kind: Kind,
    device: Device,
    /// On the way to a GPU.
    ring: Mutex<Ring>,
}

impl StoredFeatures {
    /// Opens a store for this target and tokenizer, and refuses it if it is another's. Every checksum of a share is verified
    /// that is not noted, and the target's head is asked about a sample of its rows. Nobody may train before the processes
    /// of the other shares are through, too. `progress` is told how many bytes are checked, and of how many.
    pub fn open(
        folder: &Path,
        target: &TargetIdentity,
        tables: &TargetTables,
        tokenizer: &str,
        digests: &Digests,
        share: Share,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Self> {
        let manifest = StoreManifest::read(folder)?;
        let mut differences: Vec<String> = Vec::new();
        for what in target.differences(&manifest.target) {
            differences.push(format!("{what} of {} are not those it was captured from", target.path.display()));
        }
        let TargetInfo { hidden_size, vocab_size, .. } = tables.info;
        let sizes = [
            ("hidden size", hidden_size, manifest.hidden_size),
            ("vocabulary", vocab_size, manifest.vocab_size),
            ("number of layers", tables.info.num_layers() as i64, manifest.num_layers as i64),
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
        let store = Store::open(folder, digests, share, progress)?;
        verify::verify(&store, &tables.head, share)?;
        let (kind, device) = (tables.head.kind(), tables.head.device());
        let shelves =
            Shelves { folder: folder.to_path_buf(), store, kind, device, ring: Mutex::new(Ring::new(device)) };
        Ok(Self { shelves: Arc::new(shelves), worker: Worker::new("features", device) })
    }

    /// The open store.
    pub fn store(&self) -> &Store {
        &self.shelves.store
    }

    /// Refuses, before anything is trained, a store that lacks states or documents that a run will ask for.
    pub fn require(&self, capture: &[usize], splits: &[(&TokenCache, &[usize])]) -> Result<()> {
        self.shelves.layers(capture)?;
        let mut missing: Vec<&str> = Vec::new();
        let mut total = 0;
        for (cache, documents) in splits {
            for document in documents.iter().map(|&index| cache.document(index)) {
                total += 1;
                let ids: Vec<i64> = document.tokens.iter().map(|&token| i64::from(token)).collect();
                if self.store().find(&ids).is_none() {
                    missing.push(document.id);
                }
            }
        }
        match missing.first() {
            None => Ok(()),
            Some(first) => {
                let count = missing.len();
                let problem = format!("lacks {count} of the {total} documents of this run, among them `{first}`");
                Err(self.shelves.incomplete(problem))
            }
        }
    }

    /// A digest of the shards that hold these documents. Shards that were added since do not change it.
    pub fn digest(&self, splits: &[(&TokenCache, &[usize])]) -> String {
        let ids = |cache: &TokenCache, index| -> Vec<i64> {
            cache.document(index).tokens.iter().map(|&token| i64::from(token)).collect()
        };
        let documents = splits.iter().flat_map(|(cache, documents)| documents.iter().map(|&index| ids(cache, index)));
        let used: BTreeSet<usize> =
            documents.filter_map(|ids| self.store().find(&ids)).map(|(shard, _)| shard).collect();
        let manifest = self.store().manifest();
        let entries = used.into_iter().map(|shard| &manifest.shards[shard]);
        let mut shards: Vec<String> = entries.map(|entry| format!("{} {:08x}\n", entry.bytes, entry.crc32c)).collect();
        shards.sort_unstable();
        hexadecimal(&Sha256::digest(shards.concat()))
    }

    /// Whether the store holds, to the bit, what a target of this element type computes. `dtype` is the type's name.
    pub fn is_exact(&self, dtype: &str) -> bool {
        let StoreManifest { element, target_dtype, origin, .. } = self.store().manifest();
        let keeps = match element {
            Element::Float32 => true,
            Element::Bfloat16 => self.shelves.kind == Kind::BFloat16,
            Element::Float8 => false,
        };
        keeps && target_dtype == dtype && origin.is_none()
    }
}

impl Shelves {
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

    /// The states of a batch, on the device.
    fn read(&self, batch: Arc<PackedBatch>, capture: &[usize]) -> Result<FeatureBatch> {
        let layers = self.layers(capture)?;
        let mut places = Vec::with_capacity(batch.lengths.len());
        let mut start = 0;
        for (&length, name) in batch.lengths.iter().zip(&batch.documents) {
            let ids = &batch.ids[start..start + length as usize];
            start += length as usize;
            let place = self.store.find(ids);
            places.push(place.ok_or_else(|| self.incomplete(format!("lacks the document `{name}`")))?);
        }
        let hidden = match self.device {
            Device::Cpu => {
                let states = |&layer: &usize| {
                    let states = self.store.gather(layer, &places)?; // [T, H]
                    Ok::<_, Error>(states.f_to_kind(self.kind)?)
                };
                layers.iter().map(states).collect::<Result<_>>()?
            }
            _ => self.send(&layers, &places)?,
        };
        // Said in float32, and of use on a CPU alone.
        let is_noted = self.kind == Kind::Float && self.device == Device::Cpu;
        let whole_vocabulary = if is_noted { self.store.whole_vocabulary(&places) } else { None };
        Ok(FeatureBatch { batch, hidden, whole_vocabulary })
    }

    /// States at these places for each layer, on the GPU. Nothing waits for their way there but what the device does with
    /// them.
    fn send(&self, layers: &[usize], places: &[(usize, Range<usize>)]) -> Result<Vec<Tensor>> {
        let rows = places.iter().map(|(_, rows)| rows.len()).sum::<usize>() as i64;
        let (kind, width) = (self.store.kind(), self.store.manifest().hidden_size);
        let of_layer = rows * width * kind.elt_size_in_bytes() as i64;
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.with(layers.len() * of_layer as usize, |memory| {
            let sent = |(number, &layer): (usize, &usize)| {
                let here = memory.f_narrow(0, number as i64 * of_layer, of_layer)?.f_view_dtype(kind)?;
                let mut here = here.f_view([rows, width])?; // [T, H], on the host
                self.store.gather_into(layer, places, &mut here)?;
                // Moved as stored, widened there: fewer bytes travel.
                Ok::<_, Error>(here.f_to_device_(self.device, kind, true, false)?.f_to_kind(self.kind)?)
            };
            layers.iter().enumerate().map(sent).collect()
        })
    }
}

impl FeatureSource for StoredFeatures {
    fn begin(&self, batch: Arc<PackedBatch>, capture: &[usize]) -> Pending<'_> {
        let (shelves, capture) = (Arc::clone(&self.shelves), capture.to_vec());
        self.worker.begin(move || shelves.read(batch, &capture))
    }
}
