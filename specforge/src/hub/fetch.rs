//! From a name to a path: asks the hub what the name means now, and fetches what the cache lacks.

use std::cell::{Cell, OnceCell};
use std::fs;
use std::path::{Path, PathBuf};

use super::Wanted;
use super::cache::RepoCache;
use super::choice::{self, Needed};
use super::client::{ATTEMPTS, Client, Metadata, Trouble};
use super::name::Name;
use super::settings::Settings;
use super::transfer::{self, Wish};
use crate::error::{Error, Result};
use crate::files;
use crate::progress::{self, Progress};

/// Attempts to ask, where the cache has an answer already.
const FEW_ATTEMPTS: u32 = 2;
/// What to do where nobody may be asked.
const OFFLINE_HINT: &str = "fetch it where there is a network: run this once without HF_HUB_OFFLINE, or `hf download`; HF_HOME says where the \
     cache is";

/// A name that was looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Folder of the files, or the file.
    pub path: PathBuf,
    /// The name as of the commit that these are of.
    pub name: Name,
}

/// The folder of a model, or its GGUF file, with everything in it that `wanted` needs.
pub(super) fn model(name: &Name, wanted: Wanted) -> Result<Found> {
    let settings = Settings::from_environment()?;
    if let Some(file) = &name.file {
        return single(&settings, name, file);
    }
    let cache = RepoCache::new(&settings.cache, name);
    let cached = cached_model(&cache, name, wanted);
    if settings.offline {
        return cached.map_err(|problem| {
            Error::hub(name, format!("HF_HUB_OFFLINE is set, and {problem}")).with_hint(OFFLINE_HINT)
        });
    }
    let client = Client::new(&settings, name);
    let attempts = if cached.is_ok() { FEW_ATTEMPTS } else { ATTEMPTS };
    let listing = match (client.listing(attempts), cached) {
        (Ok(listing), _) => listing,
        (Err(trouble), Ok(found)) if suffices(name, &trouble) => return Ok(instead(name, trouble, found)),
        (Err(trouble), _) => return Err(trouble.last(name)),
    };
    let needed = choice::needed(&listing.files, wanted).map_err(|problem| Error::hub(name, problem))?;
    let Needed { mut described, index, mut weights } = needed;
    let folder = cache.snapshot(&listing.commit);
    let store = Store { client: &client, cache: &cache, settings: &settings, name };
    if let Some(index) = index {
        store.all(&listing.commit, std::slice::from_ref(&index))?;
        weights.extend(choice::shards(&folder.join(&index))?);
    }
    described.append(&mut weights);
    store.all(&listing.commit, &described)?;
    cache.note_commit(name.revision(), &listing.commit)?;
    Ok(Found { path: folder, name: name.at(&listing.commit) })
}

/// One file of a repository.
pub(super) fn data(name: &Name) -> Result<Found> {
    let settings = Settings::from_environment()?;
    match &name.file {
        Some(file) => single(&settings, name, file),
        None => Err(Error::hub(name, "names no file")),
    }
}

fn single(settings: &Settings, name: &Name, file: &str) -> Result<Found> {
    let cache = RepoCache::new(&settings.cache, name);
    let cached = cached_file(&cache, name, file);
    match (&cached, name.commit()) {
        // Content of a commit is for ever.
        (Ok(found), Some(_)) => return Ok(found.clone()),
        (_, _) if settings.offline => {
            return cached.map_err(|problem| {
                Error::hub(name, format!("HF_HUB_OFFLINE is set, and {problem}")).with_hint(OFFLINE_HINT)
            });
        }
        _ => {}
    }
    let client = Client::new(settings, name);
    let metadata = match (client.metadata(name.revision(), file), cached) {
        (Ok(metadata), _) => metadata,
        (Err(trouble), Ok(found)) if suffices(name, &trouble) => return Ok(instead(name, trouble, found)),
        (Err(trouble), _) => return Err(trouble.last(name)),
    };
    let commit = match (&metadata.commit, name.commit()) {
        (Some(commit), _) => commit.clone(),
        (None, Some(commit)) => commit.to_owned(),
        (None, None) => client.listing(ATTEMPTS).map_err(|trouble| trouble.last(name))?.commit,
    };
    let store = Store { client: &client, cache: &cache, settings, name };
    store.these(&commit, &[(file.to_owned(), metadata)])?;
    cache.note_commit(name.revision(), &commit)?;
    Ok(Found { path: cache.snapshot(&commit).join(file), name: name.at(&commit) })
}

/// Whether what the cache holds will do where the hub was of no help: a commit's content is for ever, and a branch is what it
/// was where the hub cannot be reached.
fn suffices(name: &Name, trouble: &Trouble) -> bool {
    name.commit().is_some() || matches!(trouble, Trouble::Passing { .. })
}

/// Says that the cache is used, and why.
fn instead(name: &Name, trouble: Trouble, found: Found) -> Found {
    progress::say(&format!("warning: {}; using what the cache holds of {}", trouble.last(name), found.name));
    found
}

/// What the cache holds of a model, if that is enough; else what is missing, and where it was looked for.
fn cached_model(cache: &RepoCache, name: &Name, wanted: Wanted) -> Result<Found, String> {
    let commit = cached_commit(cache, name)?;
    let folder = cache.snapshot(&commit);
    let files = names_in(&folder);
    let where_to = || format!("what the cache has in {}", folder.display());
    let needed = choice::needed(&files, wanted).map_err(|problem| format!("{} {problem}", where_to()))?;
    let shards = match &needed.index {
        Some(index) => choice::shards(&folder.join(index)).map_err(|error| error.to_string())?,
        None => Vec::new(),
    };
    match shards.iter().find(|shard| !folder.join(shard).exists()) {
        Some(shard) => Err(format!("{} lacks `{shard}`, which its index names", where_to())),
        None => Ok(Found { path: folder, name: name.at(&commit) }),
    }
}

fn cached_file(cache: &RepoCache, name: &Name, file: &str) -> Result<Found, String> {
    let commit = cached_commit(cache, name)?;
    let path = cache.snapshot(&commit).join(file);
    match path.exists() {
        true => Ok(Found { path, name: name.at(&commit) }),
        false => Err(format!("`{file}` is not in the cache: looked for {}", path.display())),
    }
}

fn cached_commit(cache: &RepoCache, name: &Name) -> Result<String, String> {
    let revision = name.revision();
    cache.commit(revision).ok_or_else(|| {
        format!("the cache does not know revision `{revision}`: looked for {}", cache.ref_path(revision).display())
    })
}

/// Files of a folder that are there with their content.
fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().is_file())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// What files of one repository are fetched with.
struct Store<'a> {
    client: &'a Client<'a>,
    cache: &'a RepoCache,
    settings: &'a Settings,
    name: &'a Name,
}

impl Store<'_> {
    /// Fetches files of a commit that its folder lacks.
    fn all(&self, commit: &str, files: &[String]) -> Result<()> {
        let folder = self.cache.snapshot(commit);
        let absent: Vec<&String> = files.iter().filter(|file| !folder.join(file).exists()).collect();
        let known = |file: &&String| {
            let metadata = self.client.metadata(commit, file).map_err(|trouble| trouble.last(self.name))?;
            Ok(((*file).clone(), metadata))
        };
        let absent = absent.iter().map(known).collect::<Result<Vec<_>>>()?;
        self.these(commit, &absent)
    }

    /// Fetches files of which the server said what they are.
    fn these(&self, commit: &str, files: &[(String, Metadata)]) -> Result<()> {
        let size = |metadata: &Metadata| metadata.size.unwrap_or(0);
        let absent = |(_, metadata): &&(String, Metadata)| !self.cache.blob(&metadata.etag).exists();
        let total: u64 = files.iter().filter(absent).map(|(_, metadata)| size(metadata)).sum();
        self.enough_space(total)?;
        let label = format!("fetch {}", self.name);
        let (bar, done) = (OnceCell::new(), Cell::new(0));
        let mut last = "";
        for (file, metadata) in files {
            let is_absent = !self.cache.blob(&metadata.etag).exists();
            let progress = |bytes: u64| {
                let (now, unit) = unit(total);
                // What an earlier process fetched says nothing about the speed of this one.
                let bar =
                    bar.get_or_init(|| Progress::resumed(&label, total >> now, unit, (done.get() + bytes) >> now));
                bar.set((done.get() + bytes) >> now, file);
            };
            let url = self.client.file_url(commit, file);
            let wish = Wish { file, url, metadata };
            transfer::fetch(self.client, self.cache, &wish, &progress).map_err(|trouble| trouble.last(self.name))?;
            self.cache.link(commit, file, &metadata.etag)?;
            if is_absent {
                done.set(done.get() + size(metadata));
            }
            last = file;
        }
        if let Some(bar) = bar.get() {
            bar.set(total >> unit(total).0, last);
            bar.finish("done");
        }
        Ok(())
    }

    fn enough_space(&self, needed: u64) -> Result<()> {
        let free = files::free_bytes(&self.settings.cache)?;
        if needed <= free {
            return Ok(());
        }
        let mebibytes = |bytes: u64| bytes.div_ceil(1 << 20);
        let (needed, free, cache) = (mebibytes(needed), mebibytes(free), self.settings.cache.display());
        let problem = format!("needs {needed} MiB more, and only {free} MiB are free at {cache}");
        Err(Error::hub(self.name, problem).with_hint("free some space, or set HF_HOME to another disk"))
    }
}

/// What progress is counted in: a power of two and its name.
fn unit(total: u64) -> (u32, &'static str) {
    if total < 10 << 20 { (10, "KiB") } else { (20, "MiB") }
}
