//! A whole store, open: every shard mapped and checked, and an index from a document's tokens to its rows.
//!
//! Checksums are verified on opening and not when a shard is first used. That reads the store once, at the speed of the
//! disk, before a run that reads it in every epoch; in return a damaged store is refused before the first step and not
//! in the middle of the night. Checksums of files that nobody touched since are noted: the processes of a machine share
//! the reading, and later starts are spared it.

use std::hash::{DefaultHasher, Hasher};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::element::Element;
use super::manifest::StoreManifest;
use super::shard::Shard;
use crate::error::{Error, Result};
use crate::files::Digests;

/// An open store.
#[derive(Debug)]
pub struct Store {
    manifest: StoreManifest,
    shards: Vec<Shard>,
    /// Hash of a document's ids, its shard, its number there; sorted.
    index: Vec<(u64, u32, u32)>,
}

impl Store {
    /// Opens a store all of whose shards are sound. `progress` is told how many bytes are checked, and of how many.
    pub fn open(folder: &Path, digests: &Digests, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Self> {
        let (store, damaged) = Self::open_sound(folder, StoreManifest::read(folder)?, digests, progress);
        match damaged.into_iter().next() {
            None => Ok(store),
            Some((file, problem)) => Err(Error::bad_file(folder, format!("shard {file} cannot be used: {problem}"))
                .with_hint("run the same `specforge capture` again: it replaces such shards and keeps the others")),
        }
    }

    /// Opens those shards of a store that are sound, and says by file name what is wrong with the others. They are not
    /// in the manifest of the result.
    pub fn open_sound(
        folder: &Path,
        mut manifest: StoreManifest,
        digests: &Digests,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> (Self, Vec<(String, String)>) {
        let (total, done) = (manifest.bytes(), AtomicU64::new(0));
        let open = |entry| {
            let opened = Shard::open(folder, &manifest, entry, digests).map(|shard| (entry.clone(), shard));
            progress(done.fetch_add(entry.bytes, Ordering::Relaxed) + entry.bytes, total);
            opened.map_err(|problem| (entry.file.clone(), problem))
        };
        let opened: Vec<Result<_, _>> = manifest.shards.par_iter().map(open).collect();
        let (mut shards, mut entries, mut damaged) = (Vec::new(), Vec::new(), Vec::new());
        for result in opened {
            match result {
                Ok((entry, shard)) => {
                    entries.push(entry);
                    shards.push(shard);
                }
                Err(problem) => damaged.push(problem),
            }
        }
        manifest.shards = entries;
        let places = |(number, shard): (usize, &Shard)| {
            let place = |document| (hash(shard.id_bytes(document)), number as u32, document as u32);
            (0..shard.len()).map(place).collect::<Vec<_>>()
        };
        let mut index: Vec<_> = shards.par_iter().enumerate().flat_map_iter(places).collect();
        index.sort_unstable();
        (Self { manifest, shards, index }, damaged)
    }

    /// What the store says about itself.
    pub fn manifest(&self) -> &StoreManifest {
        &self.manifest
    }

    /// Its shards.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Shard and rows of the document with these tokens.
    pub fn find(&self, ids: &[i64]) -> Option<(usize, Range<usize>)> {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let wanted = hash(&bytes);
        let first = self.index.partition_point(|(hash, ..)| *hash < wanted);
        let same = self.index[first..].iter().take_while(|(hash, ..)| *hash == wanted);
        // Equal hashes make it likely, equal tokens certain.
        same.map(|&(_, shard, document)| (shard as usize, document as usize))
            .find(|&(shard, document)| self.shards[shard].id_bytes(document) == bytes)
            .map(|(shard, document)| (shard, self.shards[shard].rows_of(document)))
    }

    /// States of one layer (its place in the manifest's list) at these rows of these shards, one after the other:
    /// `[T, H]` on the CPU, in bfloat16 for a bfloat16 store, else in float32.
    pub fn gather(&self, layer: usize, places: &[(usize, Range<usize>)]) -> Result<Tensor> {
        let rows: usize = places.iter().map(|(_, rows)| rows.len()).sum();
        let kind = if self.manifest.element == Element::Bfloat16 { Kind::BFloat16 } else { Kind::Float };
        let width = self.manifest.hidden_size;
        let states = Tensor::f_empty([rows as i64, width], (kind, Device::Cpu))?;
        let length = rows * width as usize * kind.elt_size_in_bytes();
        if length == 0 {
            return Ok(states);
        }
        places.iter().for_each(|(shard, rows)| self.shards[*shard].advise(layer, rows));
        // SAFETY: the tensor is contiguous, ours alone, in host memory, and of this length.
        let mut memory = unsafe { std::slice::from_raw_parts_mut(states.data_ptr().cast::<u8>(), length) };
        for (shard, rows) in places {
            let (piece, rest) = memory.split_at_mut(rows.len() * width as usize * kind.elt_size_in_bytes());
            self.shards[*shard].read(layer, rows.clone(), piece);
            memory = rest;
        }
        Ok(states)
    }
}

/// A hash that only this process sees.
fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}
