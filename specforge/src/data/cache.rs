//! Tokenised documents in one memory-mapped file.
//!
//! ```text
//! header   256 bytes: magic, version, checksum of the header, key, content hash, counts, offsets, checksum of the rest
//! body     per document: token ids (u32), one mask byte per token, zeros up to a multiple of 4
//! index    per document 40 bytes: offset, length, name's length and offset, hashes of its conversation and prompt
//! names    UTF-8, one after the other
//! report   JSON: what was read, left out and why
//! ```
//!
//! All numbers are little-endian. A file is opened only if both checksums, the key and every range hold; anything else is
//! built again.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::report::BuildReport;
use super::sample::Origin;
use super::tokenizer::hex;
use crate::error::{Error, Result};
use crate::files::{self, Maker};

// Token ids are used in the mapped bytes as they lie.
const _: () = assert!(cfg!(target_endian = "little"), "the token cache needs a little-endian machine");

const MAGIC: &[u8; 8] = b"SPECTOKS";
/// Rises with every change of this layout, and with every change of how documents are rendered, masked or cut.
pub(super) const VERSION: u32 = 3;
const HEADER_LENGTH: usize = 256;
const ENTRY_LENGTH: usize = 40;

/// One document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Document<'a> {
    /// Its name: the conversation's own, or file and line; `#n` after it is the n-th turn alone.
    pub id: &'a str,
    /// Token ids.
    pub tokens: &'a [u32],
    /// 1 for each token that is trained, 0 for the others.
    pub supervised: &'a [u8],
}

/// Tokenised documents, memory-mapped.
#[derive(Debug)]
pub struct TokenCache {
    map: Mmap,
    path: PathBuf,
    header: Header,
    content_hash: String,
}

#[derive(Debug, Clone, Default)]
struct Header {
    key: [u8; 32],
    content: [u8; 32],
    documents: u64,
    tokens: u64,
    supervised: u64,
    index_offset: u64,
    names_offset: u64,
    report_offset: u64,
    file_length: u64,
    checksum: u32,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    offset: u64,
    length: u32,
    name_length: u32,
    name_offset: u64,
    origin: Origin,
}

impl TokenCache {
    /// Number of documents.
    pub fn len(&self) -> usize {
        self.header.documents as usize
    }

    /// Whether there are none; a cache that was built has some.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A document. Panics if `index` is not below [`TokenCache::len`], as a slice does.
    pub fn document(&self, index: usize) -> Document<'_> {
        let entry = self.entry(index);
        let (start, length) = (entry.offset as usize, entry.length as usize);
        let masks = start + 4 * length;
        let name = self.header.names_offset as usize + entry.name_offset as usize;
        let id = std::str::from_utf8(&self.map[name..name + entry.name_length as usize]).unwrap_or_default();
        // SAFETY: every bit pattern is a u32.
        let (unaligned, tokens, rest) = unsafe { self.map[start..masks].align_to::<u32>() };
        debug_assert!(unaligned.is_empty() && rest.is_empty());
        Document { id, tokens, supervised: &self.map[masks..masks + length] }
    }

    /// Number of tokens of a document.
    pub fn length(&self, index: usize) -> usize {
        self.entry(index).length as usize
    }

    /// A hash of the conversation a document comes from: the same for all documents of one conversation.
    pub fn conversation_key(&self, index: usize) -> u64 {
        self.origin(index).conversation
    }

    /// What a document comes from.
    pub fn origin(&self, index: usize) -> Origin {
        self.entry(index).origin
    }

    /// All documents of this name, or all turns of the conversation of this name.
    pub fn find(&self, id: &str) -> Vec<usize> {
        let is_turn = |name: &str| name.strip_prefix(id).is_some_and(|rest| rest.starts_with('#'));
        let all = |wanted: &dyn Fn(&str) -> bool| {
            (0..self.len()).filter(|&index| wanted(self.document(index).id)).collect::<Vec<_>>()
        };
        let named = all(&|name| name == id);
        if named.is_empty() { all(&is_turn) } else { named }
    }

    /// SHA-256 of all documents with names and masks, as hexadecimal digits.
    pub fn content_hash(&self) -> &str {
        &self.content_hash
    }

    /// SHA-256 of tokens and masks of all documents in order, as hexadecimal digits. Unlike the content's hash it does not
    /// know names, which change with those of files.
    pub fn token_hash(&self) -> String {
        let document = |index| {
            let Document { tokens, supervised, .. } = self.document(index);
            let mut hash = Sha256::new();
            hash.update(self.conversation_key(index).to_le_bytes());
            hash.update((tokens.len() as u64).to_le_bytes());
            tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
            hash.update(supervised);
            hash.finalize()
        };
        let documents: Vec<_> = (0..self.len()).into_par_iter().map(document).collect();
        let mut hash = Sha256::new();
        documents.iter().for_each(|digest| hash.update(digest));
        hex(&hash.finalize())
    }

    /// Number of tokens of all documents.
    pub fn total_tokens(&self) -> u64 {
        self.header.tokens
    }

    /// Number of trained tokens of all documents.
    pub fn supervised_tokens(&self) -> u64 {
        self.header.supervised
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn entry(&self, index: usize) -> Entry {
        let start = self.header.index_offset as usize + index * ENTRY_LENGTH;
        Entry::from_bytes(&self.map[start..start + ENTRY_LENGTH])
    }

    /// Opens the cache of a key in a folder, or makes it of the documents that `fill` adds. Of several processes one makes
    /// it, and the others wait as long as that takes. `key` is a digest of everything that decides what it holds. For documents
    /// that are no conversations: those have [`TokenCache::build_or_open`].
    pub fn open_or_fill(
        folder: &Path,
        key: [u8; 32],
        progress: &dyn Fn(u64, u64),
        fill: impl FnOnce(&mut NewDocuments<'_, '_>) -> Result<()>,
    ) -> Result<(Self, BuildReport)> {
        let path = folder.join(format!("{}.tokens", &hex(&key)[..24]));
        let mut note = None;
        let reopen = || match path.is_file() {
            false => Ok(None),
            true => match Self::open(&path, &key) {
                Ok((cache, report)) => Ok(Some((cache, BuildReport { from_cache: true, ..report }))),
                Err(problem) => {
                    note = Some(format!("{}: {problem}; built again", path.display()));
                    Ok(None)
                }
            },
        };
        let make = |maker: &Maker<'_>| {
            maker.write(|temporary| {
                let mut documents = NewDocuments { writer: CacheWriter::create(temporary, &path, key)?, maker };
                fill(&mut documents)?;
                documents.finish()
            })?;
            Self::open(&path, &key).map_err(|problem| Error::bad_file(&path, problem))
        };
        let (cache, mut report) = files::open_or_make(&path, "", progress, reopen, make)?;
        report.note = note.filter(|_| !report.from_cache);
        Ok((cache, report))
    }

    /// Opens a file made for `key`, or says what is wrong with it.
    pub(super) fn open(path: &Path, key: &[u8; 32]) -> Result<(Self, BuildReport), String> {
        let file = File::open(path).map_err(|error| error.to_string())?;
        // SAFETY: the file is only ever replaced by a rename, so the mapped bytes stay.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| error.to_string())?;
        let header = Header::from_bytes(&map)?;
        if header.key != *key {
            return Err("it was made from other data".to_owned());
        }
        if header.file_length != map.len() as u64 {
            return Err(format!("expected {} bytes, got {}", header.file_length, map.len()));
        }
        if crc32c::crc32c(&map[HEADER_LENGTH..]) != header.checksum {
            return Err("its checksum does not hold".to_owned());
        }
        let content_hash = hex(&header.content);
        let cache = Self { map, path: path.to_path_buf(), header, content_hash };
        cache.check_ranges()?;
        cache.check_counts()?;
        let report = &cache.map[cache.header.report_offset as usize..];
        let report: BuildReport = serde_json::from_slice(report).map_err(|error| error.to_string())?;
        Ok((cache, report))
    }

    fn check_ranges(&self) -> Result<(), String> {
        let header = &self.header;
        let wrong = |what: &str| Err(format!("its {what} do not hold"));
        if header.index_offset < HEADER_LENGTH as u64 {
            return wrong("offsets");
        }
        let index_length = header.documents.checked_mul(ENTRY_LENGTH as u64);
        if index_length.and_then(|length| header.index_offset.checked_add(length)) != Some(header.names_offset)
            || header.names_offset > header.report_offset
            || header.report_offset > header.file_length
        {
            return wrong("offsets");
        }
        let mut position = HEADER_LENGTH as u64;
        for index in 0..self.len() {
            let Entry { offset, length, name_length, name_offset, .. } = self.entry(index);
            let name_end = name_offset.checked_add(u64::from(name_length));
            let names = header.report_offset - header.names_offset;
            if offset != position || name_end.is_none_or(|end| end > names) {
                return wrong("document offsets");
            }
            position += body_length(length);
            if position > header.index_offset {
                return wrong("document lengths");
            }
        }
        if position == header.index_offset { Ok(()) } else { wrong("lengths") }
    }

    /// Compares the counts of the header with what the documents hold.
    fn check_counts(&self) -> Result<(), String> {
        let of_document = |index: usize| {
            let document = self.document(index);
            let marks = document.supervised.iter().map(|mark| u64::from(*mark)).sum::<u64>();
            let is_sound = document.supervised.iter().all(|mark| *mark <= 1);
            is_sound.then_some((document.tokens.len() as u64, marks))
        };
        let sum = |one: (u64, u64), other: (u64, u64)| Some((one.0 + other.0, one.1 + other.1));
        let counts = (0..self.len()).into_par_iter().map(of_document).try_reduce(|| (0, 0), sum);
        match counts {
            Some(counts) if counts == (self.header.tokens, self.header.supervised) => Ok(()),
            Some(_) => Err("its counts do not hold".to_owned()),
            None => Err("its marks of trained tokens do not hold".to_owned()),
        }
    }

    /// Refuses tokens that a model of `limit` tokens does not have.
    pub(super) fn check_ids(&self, limit: usize) -> Result<(), String> {
        let beyond = |index: usize| {
            let document = self.document(index);
            let token = document.tokens.iter().find(|token| **token as usize >= limit)?;
            Some(format!("document `{}` holds token {token}, the model has {limit}", document.id))
        };
        (0..self.len()).into_par_iter().find_map_first(beyond).map_or(Ok(()), Err)
    }
}

/// Documents on their way into a cache.
pub struct NewDocuments<'a, 'm> {
    writer: CacheWriter<'a>,
    maker: &'a Maker<'m>,
}

impl NewDocuments<'_, '_> {
    /// Adds a document. `origin` is a hash of what it comes from: documents of one origin stay together where some are held
    /// out.
    pub fn add(&mut self, id: &str, origin: u64, tokens: &[u32], supervised: &[u8]) -> Result<()> {
        self.writer.add(id, origin, tokens, supervised)
    }

    /// Tells everybody who waits how much is done, and of how much.
    pub fn report(&self, done: usize, total: usize) {
        self.maker.report(done as u64, total as u64);
    }

    fn finish(self) -> Result<()> {
        let (documents, tokens, supervised_tokens) = self.writer.counts();
        let (conversations, documents) = (documents as usize, documents as usize);
        self.writer.finish(&BuildReport {
            conversations,
            documents,
            tokens,
            supervised_tokens,
            ..BuildReport::default()
        })
    }
}

/// Tokens, mask and padding of a document, in bytes.
fn body_length(length: u32) -> u64 {
    (5 * u64::from(length)).next_multiple_of(4)
}

/// Writes a cache document by document.
pub(super) struct CacheWriter<'a> {
    out: BufWriter<File>,
    path: &'a Path,
    position: u64,
    checksum: u32,
    content: Sha256,
    index: Vec<u8>,
    names: Vec<u8>,
    header: Header,
}

impl<'a> CacheWriter<'a> {
    /// Starts writing to `temporary`; errors speak of `path`.
    pub(super) fn create(temporary: &Path, path: &'a Path, key: [u8; 32]) -> Result<Self> {
        let mut out = BufWriter::with_capacity(1 << 20, File::create(temporary).map_err(Error::io("create", path))?);
        out.write_all(&[0; HEADER_LENGTH]).map_err(Error::io("write", path))?;
        let header = Header { key, ..Header::default() };
        let (index, names) = (Vec::new(), Vec::new());
        let position = HEADER_LENGTH as u64;
        Ok(Self { out, path, position, checksum: 0, content: Sha256::new(), index, names, header })
    }

    /// Adds a document.
    pub(super) fn add(&mut self, id: &str, origin: impl Into<Origin>, tokens: &[u32], supervised: &[u8]) -> Result<()> {
        debug_assert_eq!(tokens.len(), supervised.len());
        let entry = Entry {
            offset: self.position,
            length: u32::try_from(tokens.len()).map_err(|error| Error::Failed(error.to_string()))?,
            name_length: id.len() as u32,
            name_offset: self.names.len() as u64,
            origin: origin.into(),
        };
        let mut body: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        body.extend_from_slice(supervised);
        body.resize(body.len().next_multiple_of(4), 0);
        self.write(&body)?;
        self.content.update(entry.length.to_le_bytes());
        self.content.update(&body);
        self.content.update(entry.name_length.to_le_bytes());
        self.content.update(id);
        self.index.extend(entry.to_bytes());
        self.names.extend_from_slice(id.as_bytes());
        self.header.documents += 1;
        self.header.tokens += tokens.len() as u64;
        self.header.supervised += supervised.iter().map(|&flag| u64::from(flag)).sum::<u64>();
        Ok(())
    }

    /// Documents, tokens and trained tokens so far.
    pub(super) fn counts(&self) -> (u64, u64, u64) {
        (self.header.documents, self.header.tokens, self.header.supervised)
    }

    /// Writes what comes after the documents, and the header last.
    pub(super) fn finish(mut self, report: &BuildReport) -> Result<()> {
        let report = serde_json::to_vec(report).map_err(|error| Error::Failed(error.to_string()))?;
        let (index, names) = (std::mem::take(&mut self.index), std::mem::take(&mut self.names));
        self.header.index_offset = self.position;
        self.write(&index)?;
        self.header.names_offset = self.position;
        self.write(&names)?;
        self.header.report_offset = self.position;
        self.write(&report)?;
        self.header.file_length = self.position;
        self.header.checksum = self.checksum;
        self.header.content = self.content.clone().finalize().into();
        let header = self.header.to_bytes();
        let written = self.out.seek(SeekFrom::Start(0)).and_then(|_| self.out.write_all(&header));
        written.and_then(|()| self.out.flush()).map_err(Error::io("write", self.path))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(Error::io("write", self.path))?;
        self.checksum = crc32c::crc32c_append(self.checksum, bytes);
        self.position += bytes.len() as u64;
        Ok(())
    }
}

impl Entry {
    fn to_bytes(self) -> [u8; ENTRY_LENGTH] {
        let mut bytes = [0; ENTRY_LENGTH];
        bytes[..8].copy_from_slice(&self.offset.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.name_length.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.name_offset.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.origin.conversation.to_le_bytes());
        bytes[32..].copy_from_slice(&self.origin.prompt.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        Self {
            offset: read_u64(bytes, 0),
            length: read_u32(bytes, 8),
            name_length: read_u32(bytes, 12),
            name_offset: read_u64(bytes, 16),
            origin: Origin { conversation: read_u64(bytes, 24), prompt: read_u64(bytes, 32) },
        }
    }
}

impl Header {
    fn to_bytes(&self) -> [u8; HEADER_LENGTH] {
        let mut bytes = [0; HEADER_LENGTH];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..48].copy_from_slice(&self.key);
        bytes[48..80].copy_from_slice(&self.content);
        let numbers = [
            self.documents,
            self.tokens,
            self.supervised,
            self.index_offset,
            self.names_offset,
            self.report_offset,
            self.file_length,
            u64::from(self.checksum),
        ];
        for (slot, number) in bytes[80..144].chunks_exact_mut(8).zip(numbers) {
            slot.copy_from_slice(&number.to_le_bytes());
        }
        let checksum = crc32c::crc32c(&bytes[16..]);
        bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() < HEADER_LENGTH || bytes[..8] != *MAGIC {
            return Err("it is no token cache".to_owned());
        }
        let version = read_u32(bytes, 8);
        if version != VERSION {
            return Err(format!("expected version {VERSION}, got {version}"));
        }
        if crc32c::crc32c(&bytes[16..HEADER_LENGTH]) != read_u32(bytes, 12) {
            return Err("its header's checksum does not hold".to_owned());
        }
        let mut header = Self {
            documents: read_u64(bytes, 80),
            tokens: read_u64(bytes, 88),
            supervised: read_u64(bytes, 96),
            index_offset: read_u64(bytes, 104),
            names_offset: read_u64(bytes, 112),
            report_offset: read_u64(bytes, 120),
            file_length: read_u64(bytes, 128),
            checksum: read_u64(bytes, 136) as u32,
            ..Self::default()
        };
        header.key.copy_from_slice(&bytes[16..48]);
        header.content.copy_from_slice(&bytes[48..80]);
        Ok(header)
    }
}

fn read_u32(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

fn read_u64(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

/// Answers to one prompt that stay together where some documents are held out. A prompt of more, or of a quarter of all
/// conversations, is no question but a task: an instruction that thousands of records begin with.
const MOST_ANSWERS: usize = 64;

/// Indices to train on and indices to evaluate on. The hash of a conversation's prompt decides, so neither the order of
/// files nor what else they hold moves it, and all answers to one prompt and all documents of one conversation are on one
/// side. Conversations of a task ([`MOST_ANSWERS`]) go by a hash of their content.
pub fn split(cache: &TokenCache, eval_fraction: f64) -> (Vec<usize>, Vec<usize>) {
    let mut origins: Vec<Origin> = (0..cache.len()).map(|index| cache.origin(index)).collect();
    origins.sort_unstable();
    origins.dedup();
    let most = MOST_ANSWERS.min((origins.len() / 4).max(1));
    let answers = origins.chunk_by(|one, next| one.prompt == next.prompt);
    let tasks: HashSet<u64> = answers.filter(|some| some.len() > most).map(|many| many[0].prompt).collect();
    let key = |Origin { prompt, conversation }| if tasks.contains(&prompt) { conversation } else { prompt };
    (0..cache.len()).partition(|&index| is_trained(key(cache.origin(index)), eval_fraction))
}

/// Whether documents of this origin are trained on where such a share is held out.
pub fn is_trained(origin: u64, eval_fraction: f64) -> bool {
    (origin >> 11) as f64 / (1u64 << 53) as f64 >= eval_fraction
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cache of one document, opened again. Its checksums hold, whatever is in it.
    fn written(tokens: &[u32], marks: &[u8]) -> Result<TokenCache, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("one.tokens");
        let mut writer = CacheWriter::create(&path, &path, [7; 32]).unwrap();
        writer.add("one", 0, tokens, marks).unwrap();
        writer.finish(&BuildReport::default()).unwrap();
        TokenCache::open(&path, &[7; 32]).map(|(cache, _)| cache)
    }

    #[test]
    fn numbers_that_cannot_be_are_found_behind_sound_checksums() {
        let cache = written(&[1, 2, 9], &[0, 1, 1]).unwrap();
        cache.check_ids(10).unwrap();
        let problem = cache.check_ids(9).unwrap_err();
        assert_eq!(problem, "document `one` holds token 9, the model has 9");
        assert_eq!(written(&[1, 2, 9], &[0, 2, 1]).unwrap_err(), "its marks of trained tokens do not hold");
    }
}
