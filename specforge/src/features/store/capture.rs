//! What a capture is going to do: which documents are missing, which shards they make, and what they will take. `filling`
//! and `streaming` do it.
//!
//! A store that is there already is continued: documents of its whole shards are left alone, everything else is
//! captured. Which documents share a shard depends on their order and on what is whole alone, so that a capture that was
//! killed ends with the very bytes of one that was not.

use std::collections::HashSet;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::element::Element;
use super::manifest::{MANIFEST_FILE, StoreManifest};
use super::reader::Store;
use super::shard;
use crate::data::{self, PackedBatch, TokenCache};
use crate::dist::SharedWork;
use crate::error::{Error, Result};
use crate::features::FeatureSource;
use crate::files::Digests;

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
    /// Processes that took part.
    pub processes: usize,
}

/// One document: which cache, and which of its documents.
type Place = (usize, usize);

/// A shard to write.
#[derive(Debug)]
pub(super) struct Group {
    documents: Vec<Place>,
    /// Name of its file.
    pub(super) file: String,
}

/// What becomes of a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Fate {
    /// It is captured.
    Missing = 0,
    /// A whole shard has it.
    Stored = 1,
    /// One before it is the same.
    Repeated = 2,
}

impl Fate {
    fn read(byte: u8) -> Option<Self> {
        [Fate::Missing, Fate::Stored, Fate::Repeated].into_iter().find(|fate| *fate as u8 == byte)
    }
}

/// A capture that has looked at what is there and has written nothing yet.
pub struct Capture<'a> {
    pub(super) folder: PathBuf,
    caches: &'a [&'a TokenCache],
    /// With the shards that are whole.
    pub(super) manifest: StoreManifest,
    /// The manifest as it lies in the folder.
    pub(super) existing: Option<StoreManifest>,
    /// Shards to write.
    pub(super) groups: Vec<Group>,
    /// Of every document of every cache.
    fates: Vec<Fate>,
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

        let mut seen: HashSet<&[u32]> = HashSet::new();
        let mut fates = Vec::new();
        for tokens in documents(caches) {
            let ids = || tokens.iter().map(|&token| i64::from(token)).collect::<Vec<i64>>();
            let is_stored = || store.as_ref().is_some_and(|store| store.find(&ids()).is_some());
            fates.push(match seen.insert(tokens) {
                false => Fate::Repeated,
                true if is_stored() => Fate::Stored,
                true => Fate::Missing,
            });
        }
        Ok(Self::of(folder, caches, manifest, existing, fates, damaged))
    }

    /// The same for several processes: the first looks at the folder, and tells the others what it found.
    pub fn prepare_together(
        folder: &Path,
        wanted: StoreManifest,
        caches: &'a [&'a TokenCache],
        digests: &Digests,
        progress: &(dyn Fn(u64, u64) + Sync),
        work: &SharedWork<'_>,
    ) -> Result<Self> {
        let mut own = None;
        let found = work.from_first("a look at the store", || {
            let capture = Self::prepare(folder, wanted.clone(), caches, digests, progress)?;
            let found = capture.to_text();
            own = Some(capture);
            found
        })?;
        own.map_or_else(|| Self::from_text(folder, &wanted, caches, &found, work.rank()), Ok)
    }

    /// What the first process found: the manifest with its length before it, and the fate of each document.
    fn to_text(&self) -> Result<Vec<u8>> {
        let manifest = serde_json::to_vec(&self.manifest).map_err(|error| Error::Failed(error.to_string()))?;
        let fates = self.fates.iter().map(|&fate| fate as u8);
        Ok((manifest.len() as u64).to_le_bytes().into_iter().chain(manifest).chain(fates).collect())
    }

    /// The same on another process, which must mean the same documents, target and options.
    fn from_text(
        folder: &Path,
        wanted: &StoreManifest,
        caches: &'a [&'a TokenCache],
        text: &[u8],
        rank: usize,
    ) -> Result<Self> {
        let broken = || Error::Failed("what rank 0 found in the store's folder is cut off".to_owned());
        let (length, rest) = text.split_first_chunk().ok_or_else(broken)?;
        let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| broken())?;
        let (manifest, fates) = rest.split_at_checked(length).ok_or_else(broken)?;
        let manifest: StoreManifest =
            serde_json::from_slice(manifest).map_err(|error| Error::Failed(format!("rank 0's store: {error}")))?;
        let fates: Vec<Fate> = fates.iter().filter_map(|&fate| Fate::read(fate)).collect();
        let mut differences = wanted.differences(&manifest);
        let is_known = |cache: &&TokenCache| manifest.data.iter().any(|known| known == cache.content_hash());
        if fates.len() != documents(caches).count() || !caches.iter().all(is_known) {
            differences.push("data: other documents".to_owned());
        }
        if !differences.is_empty() {
            let lines = differences.join("\n  ");
            return Err(Error::Usage(format!(
                "rank {rank} was started on something else than rank 0:\n  {lines}\nstart every rank with the same program, \
                 configuration and data"
            )));
        }
        Ok(Self::of(folder, caches, manifest, None, fates, Vec::new()))
    }

    /// Which shards follow from what is missing.
    fn of(
        folder: &Path,
        caches: &'a [&'a TokenCache],
        manifest: StoreManifest,
        existing: Option<StoreManifest>,
        fates: Vec<Fate>,
        damaged: Vec<(String, String)>,
    ) -> Self {
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
        let places =
            caches.iter().enumerate().flat_map(|(number, cache)| (0..cache.len()).map(move |index| (number, index)));
        for ((number, index), fate) in places.zip(&fates) {
            let tokens = caches[number].length(index);
            if *fate == Fate::Repeated {
                continue;
            }
            overview.documents += 1;
            overview.tokens += tokens as u64;
            if *fate == Fate::Stored {
                overview.documents_before += 1;
                overview.tokens_before += tokens as u64;
                // What stands between two whole shards was a shard of its own.
                groups.close();
            } else {
                groups.add((number, index), tokens);
            }
        }
        groups.close();
        let taken: HashSet<&str> = manifest.shards.iter().map(|shard| shard.file.as_str()).collect();
        let free = (0..).map(shard::file_name).filter(|name| !taken.contains(name.as_str()));
        let groups: Vec<Group> =
            groups.done.into_iter().zip(free).map(|(documents, file)| Group { documents, file }).collect();
        overview.shards = groups.len() as u64;
        let mut capture =
            Self { folder: folder.to_path_buf(), caches, manifest, existing, groups, fates, overview, damaged };
        let planned = |group: &Group| {
            shard::planned_bytes(&capture.manifest, group.documents.len(), capture.lengths(group).iter().sum())
        };
        let to_write: u64 = capture.groups.iter().map(planned).sum();
        capture.overview.bytes_to_write = to_write;
        capture.overview.bytes += to_write;
        capture
    }

    /// Tokens of each document of a shard.
    pub(super) fn lengths(&self, group: &Group) -> Vec<usize> {
        group.documents.iter().map(|&(cache, index)| self.caches[cache].length(index)).collect()
    }

    /// Tokens of a shard, by its number.
    pub(super) fn tokens(&self, group: usize) -> usize {
        self.lengths(&self.groups[group]).iter().sum()
    }

    /// What there is to do.
    pub fn overview(&self) -> &Overview {
        &self.overview
    }

    /// States that the store holds, ascending.
    pub fn layers(&self) -> &[usize] {
        &self.manifest.layers
    }

    /// Name and tokens of every document that is still to be captured, in order.
    pub fn missing(&self) -> impl Iterator<Item = (&str, &[u32])> {
        let places = self.groups.iter().flat_map(|group| &group.documents);
        places.map(|&(cache, index)| {
            let document = self.caches[cache].document(index);
            (document.id, document.tokens)
        })
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

    /// Documents in packs of at most so many tokens, or of one document.
    pub(super) fn batches<'b>(
        &'b self,
        group: &'b Group,
        pack_tokens: usize,
    ) -> impl Iterator<Item = PackedBatch> + 'b {
        let mut rest = group.documents.as_slice();
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

/// Tokens of every document of every cache, in order.
fn documents<'a>(caches: &'a [&'a TokenCache]) -> impl Iterator<Item = &'a [u32]> {
    caches.iter().flat_map(|cache| (0..cache.len()).map(move |index| cache.document(index).tokens))
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
pub(super) fn read_existing(folder: &Path) -> Result<Option<StoreManifest>> {
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
pub(super) fn take_lock(folder: &Path) -> Result<File> {
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
pub(super) fn clear_leftovers(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("read folder", folder))? {
        let path = entry.map_err(Error::io("read folder", folder))?.path();
        if path.file_name().is_some_and(|name| is_unfinished(&name.to_string_lossy())) {
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}
