//! Fills a store: which documents are missing, what they will take, and the loop that writes them shard by shard.
//!
//! A store that is there already is continued: documents of its whole shards are left alone, everything else is
//! captured. Which documents share a shard depends on their order and on what is whole alone, so that a capture that was
//! killed ends with the very bytes of one that was not.
//!
//! The target computes a pack while a thread (`writing`) encodes and writes those before it.

use std::collections::HashSet;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::element::Element;
use super::manifest::{MANIFEST_FILE, StoreManifest};
use super::reader::Store;
use super::shard;
use super::writing::{Failed, Writing};
use crate::data::{self, PackedBatch, TokenCache};
use crate::error::{Error, Result};
use crate::features::FeatureSource;
use crate::files::{self, Digests};
use crate::nn::Head;

const LOCK_FILE: &str = ".lock";
/// Beginnings of the names of unfinished files: ours, and those of the safetensors crate.
const PARTIAL_PREFIXES: [&str; 2] = [".partial-", ".tmp"];
/// Size of a shard where nobody asks for another: a kill costs at most this much, and a store of terabytes stays at some
/// ten thousand files.
const SHARD_BYTES: usize = 256 << 20;
/// Speed is measured for this long, or for this many tokens.
const MEASURE: (Duration, usize) = (Duration::from_secs(1), 2048);

/// Tokens of a shard where nobody asks for another number.
pub fn default_shard_tokens(element: Element, layers: usize, hidden_size: i64) -> usize {
    let token = layers * element.state_bytes(hidden_size as usize);
    (SHARD_BYTES / token / 1024 * 1024).max(1024)
}

/// What a capture is going to do.
#[derive(Debug, Clone, Serialize)]
pub struct Overview {
    /// Documents of all data files; equal ones count once.
    pub documents: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Documents among them that the store holds already.
    pub documents_before: u64,
    /// Tokens of those.
    pub tokens_before: u64,
    /// Shards to write.
    pub shards: u64,
    /// Bytes of the store in the end, about.
    pub bytes: u64,
    /// Bytes still to be written, about.
    pub bytes_to_write: u64,
}

/// What a capture did.
#[derive(Debug, Clone, Serialize)]
pub struct CaptureReport {
    /// The store's folder.
    pub out: PathBuf,
    /// Documents in it.
    pub documents: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Bytes of its shards.
    pub bytes: u64,
    /// Number of its shards.
    pub shards: usize,
    /// Captured states.
    pub layers: Vec<usize>,
    /// Element type.
    pub element: Element,
    /// Tokens that passed through the target in this run, those of an unfinished shard included.
    pub tokens_captured: u64,
    /// Wall time of this run.
    pub seconds: f64,
    /// Whether everything that was asked for is there.
    pub complete: bool,
}

/// One document: which cache, and which of its documents.
type Place = (usize, usize);

/// A capture that has looked at what is there and has written nothing yet.
pub struct Capture<'a> {
    folder: PathBuf,
    caches: &'a [&'a TokenCache],
    /// With the shards that are whole.
    manifest: StoreManifest,
    /// The manifest as it lies in the folder.
    existing: Option<StoreManifest>,
    /// Documents of each shard to write.
    groups: Vec<Vec<Place>>,
    overview: Overview,
    /// Shards that will be replaced: file name and problem.
    damaged: Vec<(String, String)>,
}

impl<'a> Capture<'a> {
    /// Compares what is asked for with what is there. `wanted` lists no shards. `progress` is told how many bytes of an
    /// existing store are checked, and of how many.
    pub fn prepare(
        folder: &Path,
        wanted: StoreManifest,
        caches: &'a [&'a TokenCache],
        digests: &Digests,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Self> {
        let existing = read_existing(folder)?;
        let (store, damaged) = match &existing {
            None => (None, Vec::new()),
            Some(existing) => {
                let differences = wanted.differences(existing);
                if !differences.is_empty() {
                    let problem = format!("holds another store:\n  {}", differences.join("\n  "));
                    return Err(Error::bad_file(folder, problem)
                        .with_hint("capture into another folder, or ask for what this one holds"));
                }
                let (store, damaged) = Store::open_sound(folder, existing.clone(), digests, progress);
                (Some(store), damaged)
            }
        };
        let mut manifest = wanted;
        if let Some(store) = &store {
            // The folder may have been moved since; the first name stays, and with it every byte of the manifest.
            manifest.target.path.clone_from(&store.manifest().target.path);
            // One of an older version does not know the whole content, and keeps its bytes.
            manifest.target.content.clone_from(&store.manifest().target.content);
            manifest.data.clone_from(&store.manifest().data);
            manifest.shards.clone_from(&store.manifest().shards);
        }
        for hash in caches.iter().map(|cache| cache.content_hash()) {
            if !manifest.data.iter().any(|known| known == hash) {
                manifest.data.push(hash.to_owned());
            }
        }

        let mut overview = Overview {
            documents: 0,
            tokens: 0,
            documents_before: 0,
            tokens_before: 0,
            shards: 0,
            bytes: manifest.bytes(),
            bytes_to_write: 0,
        };
        let mut groups = Groups { limit: manifest.shard_tokens, done: Vec::new(), open: Vec::new(), tokens: 0 };
        let mut seen: HashSet<&[u32]> = HashSet::new();
        for (number, cache) in caches.iter().enumerate() {
            for index in 0..cache.len() {
                let tokens = cache.document(index).tokens;
                if !seen.insert(tokens) {
                    continue;
                }
                overview.documents += 1;
                overview.tokens += tokens.len() as u64;
                let ids: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
                if store.as_ref().is_some_and(|store| store.find(&ids).is_some()) {
                    overview.documents_before += 1;
                    overview.tokens_before += tokens.len() as u64;
                    // What stands between two whole shards was a shard of its own.
                    groups.close();
                } else {
                    groups.add((number, index), tokens.len());
                }
            }
        }
        groups.close();
        let groups = groups.done;
        overview.shards = groups.len() as u64;
        for group in &groups {
            let tokens = group.iter().map(|&(cache, index)| caches[cache].length(index)).sum();
            overview.bytes_to_write += shard::planned_bytes(&manifest, group.len(), tokens);
        }
        overview.bytes += overview.bytes_to_write;
        Ok(Self { folder: folder.to_path_buf(), caches, manifest, existing, groups, overview, damaged })
    }

    /// What there is to do.
    pub fn overview(&self) -> &Overview {
        &self.overview
    }

    /// Shards that are there and cannot be used: file name and problem. They are captured again.
    pub fn damaged(&self) -> &[(String, String)] {
        &self.damaged
    }

    /// Tokens a second, from a short run over the first documents. What it computes is thrown away.
    pub fn measure(&self, source: &dyn FeatureSource, pack_tokens: usize) -> Result<f64> {
        let mut batches = self.groups.iter().flat_map(|group| self.batches(group, pack_tokens));
        // The first pass pays for threads, workspaces and the weights' way into memory.
        let Some(first) = batches.next() else { return Ok(f64::INFINITY) };
        let first = Arc::new(first);
        source.features(Arc::clone(&first), &self.manifest.layers)?;
        let (mut tokens, started) = (0, Instant::now());
        for batch in std::iter::once(first).chain(batches.map(Arc::new)) {
            tokens += batch.ids.len();
            source.features(batch, &self.manifest.layers)?;
            if started.elapsed() >= MEASURE.0 || tokens >= MEASURE.1 {
                break;
            }
        }
        Ok(tokens as f64 / started.elapsed().as_secs_f64())
    }

    /// Captures what is missing. `pack_tokens` is how many tokens pass through the target at once, at most; `stop` ends
    /// the run after the pack at hand; `progress` is told how many tokens are done, those of earlier runs included.
    pub fn run(
        mut self,
        source: &dyn FeatureSource,
        head: &Head,
        pack_tokens: usize,
        stop: &AtomicBool,
        progress: &dyn Fn(u64),
    ) -> Result<CaptureReport> {
        let started = Instant::now();
        files::create_dir_all(&self.folder)?;
        let _lock = take_lock(&self.folder)?;
        // Between the first look and the lock, another capture may have come and gone.
        if read_existing(&self.folder)? != self.existing {
            return Err(Error::bad_file(&self.folder, "was changed by another capture in the meantime")
                .with_hint("run the same command again"));
        }
        clear_leftovers(&self.folder)?;
        if self.existing.as_ref() != Some(&self.manifest) {
            self.manifest.write(&self.folder)?;
        }
        let groups = std::mem::take(&mut self.groups);
        let (captured, written) = thread::scope(|scope| {
            let writing = Writing::start(scope, &self.folder, self.manifest.clone(), head)?;
            let captured = self.compute(&groups, source, pack_tokens, stop, progress, &writing);
            // What the thread met comes first: it may be why nothing more could be handed over.
            let written = writing.finish()?;
            Ok::<_, Error>((captured?, written))
        })?;
        self.manifest = written;
        let (captured, complete) = captured;
        Ok(CaptureReport {
            documents: self.manifest.documents(),
            tokens: self.manifest.tokens(),
            bytes: self.manifest.bytes(),
            shards: self.manifest.shards.len(),
            layers: self.manifest.layers.clone(),
            element: self.manifest.element,
            tokens_captured: captured,
            seconds: started.elapsed().as_secs_f64(),
            complete,
            out: self.folder,
        })
    }

    /// Computes the shards and hands them over. Returns the tokens of those that were handed over whole, and whether that
    /// is all of them.
    fn compute(
        &self,
        groups: &[Vec<Place>],
        source: &dyn FeatureSource,
        pack_tokens: usize,
        stop: &AtomicBool,
        progress: &dyn Fn(u64),
        writing: &Writing<'_>,
    ) -> Result<(u64, bool)> {
        let mut captured = 0;
        for group in groups {
            let before = self.overview.tokens_before + captured;
            let done = |tokens: u64| progress(before + tokens);
            match self.compute_shard(group, source, pack_tokens, stop, &done, writing)? {
                Some(Ok(tokens)) => captured += tokens,
                None | Some(Err(Failed)) => return Ok((captured, false)),
            }
        }
        Ok((captured, true))
    }

    /// One shard. `None` if the run was asked to stop: the shard is dropped then.
    fn compute_shard(
        &self,
        group: &[Place],
        source: &dyn FeatureSource,
        pack_tokens: usize,
        stop: &AtomicBool,
        progress: &dyn Fn(u64),
        writing: &Writing<'_>,
    ) -> Result<Option<Result<u64, Failed>>> {
        let lengths = group.iter().map(|&(cache, index)| self.caches[cache].length(index)).collect();
        if writing.begin(lengths).is_err() {
            return Ok(Some(Err(Failed)));
        }
        let begin = |batch: PackedBatch| source.begin(Arc::new(batch), &self.manifest.layers);
        let mut batches = self.batches(group, pack_tokens);
        let (mut tokens, mut coming) = (0, batches.next().map(begin));
        while let Some(pack) = coming.take() {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            coming = batches.next().map(begin);
            let pack = pack.wait()?;
            tokens += pack.batch.ids.len() as u64;
            if writing.add(pack).is_err() {
                return Ok(Some(Err(Failed)));
            }
            progress(tokens);
        }
        Ok(Some(writing.end().map(|()| tokens)))
    }

    /// Documents in packs of at most so many tokens, or of one document.
    fn batches<'b>(&'b self, group: &'b [Place], pack_tokens: usize) -> impl Iterator<Item = PackedBatch> + 'b {
        let mut rest = group;
        std::iter::from_fn(move || {
            let &(cache, _) = rest.first()?;
            let mut tokens = 0;
            let fits = |&&(other, index): &&Place| {
                tokens += self.caches[cache].length(index);
                other == cache && tokens <= pack_tokens
            };
            let count = rest.iter().take_while(fits).count().max(1);
            let (pack, after) = rest.split_at(count);
            rest = after;
            let documents: Vec<usize> = pack.iter().map(|&(_, index)| index).collect();
            Some(data::assemble(self.caches[cache], &documents))
        })
    }
}

/// Documents on their way into shards.
struct Groups {
    limit: usize,
    done: Vec<Vec<Place>>,
    open: Vec<Place>,
    tokens: usize,
}

impl Groups {
    fn add(&mut self, place: Place, tokens: usize) {
        if self.tokens + tokens > self.limit {
            self.close();
        }
        self.open.push(place);
        self.tokens += tokens;
    }

    fn close(&mut self) {
        self.tokens = 0;
        if !self.open.is_empty() {
            self.done.push(std::mem::take(&mut self.open));
        }
    }
}

/// The manifest of a folder that holds a store. `None` where a new one may begin: nothing is there, or nothing but what
/// a capture leaves that was killed before its first step.
fn read_existing(folder: &Path) -> Result<Option<StoreManifest>> {
    if !folder.exists() {
        return Ok(None);
    }
    if folder.join(MANIFEST_FILE).exists() {
        return StoreManifest::read(folder).map(Some);
    }
    for entry in fs::read_dir(folder).map_err(Error::io("read folder", folder))? {
        let name = entry.map_err(Error::io("read folder", folder))?.file_name().to_string_lossy().into_owned();
        if name != LOCK_FILE && !is_unfinished(&name) {
            let problem = format!("holds `{name}` and no {MANIFEST_FILE}: it is another thing's folder");
            return Err(Error::bad_file(folder, problem).with_hint("name an empty or a new folder"));
        }
    }
    Ok(None)
}

fn is_unfinished(name: &str) -> bool {
    PARTIAL_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// Held until dropped, or until the process dies in whatever way.
fn take_lock(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK_FILE);
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(Error::io("create", &path))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(Error::bad_file(folder, "another capture is writing here")
            .with_hint("wait for it to end, or choose another folder")),
        // Some network file systems know no locks; then the user's care has to do.
        Err(TryLockError::Error(_)) | Ok(()) => Ok(file),
    }
}

/// Removes what a killed capture was writing.
fn clear_leftovers(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("read folder", folder))? {
        let path = entry.map_err(Error::io("read folder", folder))?.path();
        if path.file_name().is_some_and(|name| is_unfinished(&name.to_string_lossy())) {
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}
