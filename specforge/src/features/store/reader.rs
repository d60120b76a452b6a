//! A whole store, open: every shard mapped and checked, and an index from a document's tokens to its rows.
//!
//! Checksums are verified on opening and not when a shard is first used. That reads the store once, at the speed of the
//! disk, before a run that reads it in every epoch; in return a damaged store is refused before the first step and not
//! in the middle of the night. Checksums of files that nobody touched since are noted, and later starts are spared the
//! reading. The processes of a machine check a share each, and meet before the first step.

use std::hash::{DefaultHasher, Hasher};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::element::Element;
use super::manifest::{ShardEntry, StoreManifest};
use super::shard::Shard;
use crate::error::{Error, Result};
use crate::features::WholeVocabulary;
use crate::files::Digests;

/// What a process checks of a store that several open: every `of`-th shard from `rank` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Number of this process among them, from 0.
    pub rank: usize,
    /// How many processes there are.
    pub of: usize,
}

impl Share {
    /// Everything: that of a process alone.
    pub const WHOLE: Self = Self { rank: 0, of: 1 };

    /// Whether a shard belongs to it, by its place in the manifest.
    pub fn has(&self, shard: usize) -> bool {
        shard % self.of.max(1) == self.rank
    }
}

/// An open store.
#[derive(Debug)]
pub struct Store {
    manifest: StoreManifest,
    shards: Vec<Shard>,
    /// Hash of a document's ids, its shard, its number there; sorted.
    index: Vec<(u64, u32, u32)>,
}

impl Store {
    /// Opens a store all of whose shards are sound: checksums of this share of them are verified, and everything else of
    /// all. `progress` is told how many bytes are checked, and of how many.
    pub fn open(folder: &Path, digests: &Digests, share: Share, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Self> {
        let (store, damaged) = Self::open_share(folder, StoreManifest::read(folder)?, digests, share, progress);
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
        manifest: StoreManifest,
        digests: &Digests,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> (Self, Vec<(String, String)>) {
        Self::open_share(folder, manifest, digests, Share::WHOLE, progress)
    }

    fn open_share(
        folder: &Path,
        mut manifest: StoreManifest,
        digests: &Digests,
        share: Share,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> (Self, Vec<(String, String)>) {
        let own = manifest.shards.iter().enumerate().filter(|(number, _)| share.has(*number));
        let (total, done) = (own.map(|(_, entry)| entry.bytes).sum(), AtomicU64::new(0));
        let open = |(number, entry): (usize, &ShardEntry)| {
            let digests = Some(digests).filter(|_| share.has(number));
            let opened = Shard::open(folder, &manifest, entry, digests).map(|shard| (entry.clone(), shard));
            if digests.is_some() {
                progress(done.fetch_add(entry.bytes, Ordering::Relaxed) + entry.bytes, total);
            }
            opened.map_err(|problem| (entry.file.clone(), problem))
        };
        let opened: Vec<Result<_, _>> = manifest.shards.par_iter().enumerate().map(open).collect();
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
        let mut states = Tensor::f_empty([rows as i64, self.manifest.hidden_size], (self.kind(), Device::Cpu))?;
        self.gather_into(layer, places, &mut states)?;
        Ok(states)
    }

    /// What [`Store::gather`] gives, in a contiguous tensor of the CPU of the same type and shape that is there already.
    pub fn gather_into(&self, layer: usize, places: &[(usize, Range<usize>)], states: &mut Tensor) -> Result<()> {
        let rows: usize = places.iter().map(|(_, rows)| rows.len()).sum();
        let (kind, width) = (self.kind(), self.manifest.hidden_size);
        let (want, got) = ((kind, Device::Cpu, vec![rows as i64, width], true), states);
        if (got.kind(), got.device(), got.size(), got.is_contiguous()) != want {
            return Err(Error::Failed(format!("states of a store: expected memory of {want:?}, got {got:?}")));
        }
        let length = rows * width as usize * kind.elt_size_in_bytes();
        if length == 0 {
            return Ok(());
        }
        places.iter().for_each(|(shard, rows)| self.shards[*shard].advise(layer, rows));
        // SAFETY: the tensor is contiguous, borrowed by us alone, in host memory, and of this length.
        let mut memory = unsafe { std::slice::from_raw_parts_mut(got.data_ptr().cast::<u8>(), length) };
        for (shard, rows) in places {
            let (piece, rest) = memory.split_at_mut(rows.len() * width as usize * kind.elt_size_in_bytes());
            self.shards[*shard].read(layer, rows.clone(), piece);
            memory = rest;
        }
        Ok(())
    }

    /// What was noted of all tokens behind these rows, where the store notes it.
    pub fn whole_vocabulary(&self, places: &[(usize, Range<usize>)]) -> Option<WholeVocabulary> {
        self.manifest.whole_vocabulary.then(|| {
            let mut all = WholeVocabulary::default();
            places.iter().for_each(|(shard, rows)| self.shards[*shard].read_whole(rows, &mut all));
            all
        })
    }

    /// Element type of states that were read.
    pub fn kind(&self) -> Kind {
        if self.manifest.element == Element::Bfloat16 { Kind::BFloat16 } else { Kind::Float }
    }
}

/// A hash that only this process sees.
fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_all_of_it_and_no_shard_is_checked_twice() {
        for of in 1..6 {
            for shard in 0..20 {
                let owners = (0..of).filter(|&rank| Share { rank, of }.has(shard)).count();
                assert_eq!(owners, 1, "shard {shard} of {of} processes");
            }
        }
        assert!((0..20).all(|shard| Share::WHOLE.has(shard)));
    }
}
