//! Fills a store, with several processes or one: each takes shards from the list of those that are missing, computes them
//! and writes their files; the first of them alone keeps the manifest and the lock.
//!
//! A shard's documents, its packs and its file's name follow from what was missing, not from who captures it. So the store
//! ends with the same bytes however many processes there are, and another number of them may go on with it.

use std::collections::VecDeque;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use super::capture::{Capture, CaptureReport, clear_leftovers, read_existing, take_lock};
use super::manifest::{ShardEntry, StoreManifest};
use super::writing::Writing;
use crate::data::PackedBatch;
use crate::dist::SharedWork;
use crate::error::{Error, Result};
use crate::features::{FeatureSource, Pending};
use crate::files;
use crate::nn::Head;

/// How a capture goes on: with whom, and whether at all.
pub struct Going<'a> {
    /// The list that shards are taken from.
    pub work: &'a SharedWork<'a>,
    /// Ends the run after the pack at hand, in every process.
    pub stop: &'a AtomicBool,
    /// Is told how many tokens are done by all processes, those of earlier runs included.
    pub progress: &'a dyn Fn(u64),
}

/// A capture that is under way.
pub(super) struct Filling<'a> {
    going: &'a Going<'a>,
    tokens_before: u64,
    /// Of the first process alone.
    keeper: Option<Keeper>,
}

/// The manifest, and the right to change it.
struct Keeper {
    folder: PathBuf,
    manifest: StoreManifest,
    /// Shards that are still missing.
    left: usize,
    _lock: File,
}

impl Capture<'_> {
    /// Captures what is missing. `pack_tokens` is how many tokens pass through the target at once, at most. The first
    /// process is given the report.
    pub fn run(
        &self,
        source: &dyn FeatureSource,
        head: &Head,
        pack_tokens: usize,
        going: &Going<'_>,
    ) -> Result<Option<CaptureReport>> {
        self.fill(going, |filling| {
            thread::scope(|scope| {
                let writing = Writing::start(scope, &self.folder, &self.manifest, head)?;
                let computed = self.compute(source, pack_tokens, &writing, filling);
                // What the thread met comes first: it may be why nothing more could be handed over.
                let (entries, written) = writing.finish();
                filling.hand_in(entries)?;
                written.and(computed)
            })
        })
    }

    /// What every way of capturing begins and ends with.
    pub(super) fn fill(
        &self,
        going: &Going<'_>,
        body: impl FnOnce(&mut Filling<'_>) -> Result<()>,
    ) -> Result<Option<CaptureReport>> {
        let started = Instant::now();
        let mut keeper = None;
        going.work.from_first("the store's folder", || {
            keeper = Some(Keeper::begin(self)?);
            Ok(Vec::new())
        })?;
        let tokens_before = self.overview().tokens_before;
        let mut filling = Filling { going, tokens_before, keeper };
        body(&mut filling)?;
        going.work.finish(&mut |entry| filling.keep(&entry))?;
        let tokens_captured = going.work.count(0)?;
        let Some(Keeper { folder, manifest, left, .. }) = filling.keeper else { return Ok(None) };
        Ok(Some(CaptureReport {
            out: folder,
            documents: manifest.documents(),
            tokens: manifest.tokens(),
            bytes: manifest.bytes(),
            shards: manifest.shards.len(),
            layers: manifest.layers,
            element: manifest.element,
            tokens_captured,
            seconds: started.elapsed().as_secs_f64(),
            complete: left == 0,
            processes: going.work.world_size(),
        }))
    }

    /// Computes shards and hands them to the thread, until there are no more or the run is asked to stop: the shard at hand
    /// is dropped then.
    fn compute(
        &self,
        source: &dyn FeatureSource,
        pack_tokens: usize,
        writing: &Writing<'_>,
        filling: &mut Filling<'_>,
    ) -> Result<()> {
        while let Some(piece) = filling.next(self.groups.len())? {
            let group = &self.groups[piece];
            if writing.begin(self.lengths(group), group.file.clone()).is_err() {
                return Ok(()); // the thread's own error says why
            }
            let begin = |batch: PackedBatch| source.begin(Arc::new(batch), &self.manifest.layers);
            let mut batches = self.batches(group, pack_tokens).map(begin);
            let mut coming: VecDeque<Pending<'_>> = batches.by_ref().take(source.ahead()).collect();
            while let Some(pack) = coming.pop_front() {
                if !filling.goes_on()? {
                    return Ok(());
                }
                coming.extend(batches.next());
                let pack = pack.wait()?;
                let tokens = pack.batch.ids.len() as u64;
                if writing.add(pack).is_err() {
                    return Ok(());
                }
                filling.passed(tokens)?;
                filling.hand_in(writing.written())?;
            }
            if writing.end().is_err() {
                return Ok(());
            }
        }
        Ok(())
    }
}

impl Filling<'_> {
    /// The number of the next piece of work, if there is one and the run goes on.
    pub(super) fn next(&mut self, pieces: usize) -> Result<Option<usize>> {
        if !self.goes_on()? {
            return Ok(None);
        }
        Ok(Some(self.going.work.claim()?).filter(|&piece| piece < pieces))
    }

    /// Whether no process was asked to stop.
    pub(super) fn goes_on(&self) -> Result<bool> {
        Ok(!self.going.work.is_stopped(self.going.stop.load(Ordering::Relaxed))?)
    }

    /// Whether this process was asked to stop; quicker than to ask them all.
    pub(super) fn is_stopped_here(&self) -> bool {
        self.going.stop.load(Ordering::Relaxed)
    }

    /// So many tokens have passed through the target.
    pub(super) fn passed(&self, tokens: u64) -> Result<()> {
        let all = self.going.work.count(tokens)?;
        (self.going.progress)(self.tokens_before + all);
        Ok(())
    }

    /// These shards are on disk. The first process names them in the manifest, and those that others wrote since.
    pub(super) fn hand_in(&mut self, entries: Vec<ShardEntry>) -> Result<()> {
        for entry in entries {
            let text = serde_json::to_vec(&entry).map_err(|error| Error::Failed(format!("naming a shard: {error}")))?;
            self.going.work.hand_in(text)?;
        }
        self.going.work.received()?.iter().try_for_each(|entry| self.keep(entry))
    }

    fn keep(&mut self, entry: &[u8]) -> Result<()> {
        let Some(keeper) = &mut self.keeper else { return Ok(()) };
        let entry = serde_json::from_slice(entry).map_err(|error| Error::Failed(format!("a shard's name: {error}")))?;
        keeper.enter(entry)
    }
}

impl Keeper {
    fn begin(capture: &Capture<'_>) -> Result<Self> {
        let Capture { folder, manifest, existing, groups, .. } = capture;
        files::create_dir_all(folder)?;
        let lock = take_lock(folder)?;
        // Between the first look and the lock, another capture may have come and gone.
        if read_existing(folder)? != *existing {
            return Err(Error::bad_file(folder, "was changed by another capture in the meantime")
                .with_hint("run the same command again"));
        }
        clear_leftovers(folder)?;
        if existing.as_ref() != Some(manifest) {
            manifest.write(folder)?;
        }
        Ok(Self { folder: folder.clone(), manifest: manifest.clone(), left: groups.len(), _lock: lock })
    }

    fn enter(&mut self, entry: ShardEntry) -> Result<()> {
        self.manifest.shards.push(entry);
        self.manifest.shards.sort_by(|left, right| left.file.cmp(&right.file));
        self.manifest.write(&self.folder)?;
        self.left -= 1;
        Ok(())
    }
}
