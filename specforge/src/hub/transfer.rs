//! One file's way into the cache: it goes on where it stopped, and counts only if length and hash are right.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest, Sha256};
use ureq::Body;
use ureq::http::Response;

use super::cache::RepoCache;
use super::client::{ATTEMPTS, Client, Metadata, Trouble};
use crate::error::{Error, Result};
use crate::files::{create_dir_all, hexadecimal};

/// Bytes read at once.
const PIECE: usize = 1 << 18;

/// A file to fetch.
pub(super) struct Wish<'a> {
    /// Its name in the repository.
    pub(super) file: &'a str,
    /// Where it is.
    pub(super) url: String,
    /// What the server says about it.
    pub(super) metadata: &'a Metadata,
}

/// Puts the content of a file into the cache, unless it is there. `progress` is told how many of its bytes are there.
pub(super) fn fetch(
    client: &Client<'_>,
    cache: &RepoCache,
    wish: &Wish<'_>,
    progress: &dyn Fn(u64),
) -> Result<(), Trouble> {
    let etag = &wish.metadata.etag;
    let (blob, part) = (cache.blob(etag), cache.part(etag));
    if blob.exists() {
        return Ok(());
    }
    create_dir_all(blob.parent().unwrap_or(&blob)).map_err(Trouble::Final)?;
    let _lock = cache.lock(etag).map_err(Trouble::Final)?;
    if blob.exists() {
        return Ok(());
    }
    // What an earlier process left may be anything: where the whole is wrong, it is fetched from its beginning once.
    let was_begun = fs::metadata(&part).is_ok_and(|metadata| metadata.len() > 0);
    let arrived = arrive(client, wish, &part, progress);
    let arrived = match arrived {
        Err(Trouble::Damaged(_)) if was_begun => arrive(client, wish, &part, progress),
        other => other,
    };
    arrived?;
    fs::rename(&part, &blob).map_err(|error| Trouble::Final(Error::io("rename to", &blob)(error)))
}

/// Brings a part to its end and compares it. What is wrong is removed; what is merely not whole stays for the next time.
fn arrive(client: &Client<'_>, wish: &Wish<'_>, part: &Path, progress: &dyn Fn(u64)) -> Result<(), Trouble> {
    let outcome = complete(client, wish, part, progress).and_then(|()| compare(client, wish, part));
    if let Err(Trouble::Damaged(_)) = &outcome {
        fs::remove_file(part).map_err(|error| Trouble::Final(Error::io("remove", part)(error)))?;
    }
    outcome
}

fn complete(client: &Client<'_>, wish: &Wish<'_>, part: &Path, progress: &dyn Fn(u64)) -> Result<(), Trouble> {
    let io = |action| move |error| Trouble::Final(Error::io(action, part)(error));
    let options = File::options().create(true).append(true).open(part);
    let mut file = options.map_err(io("create"))?;
    let mut failures = 0;
    loop {
        let mut before = file.metadata().map_err(io("look at"))?.len();
        if wish.metadata.size == Some(before) {
            break;
        }
        // Nobody knows where such a part would end.
        if wish.metadata.size.is_none_or(|size| size < before) {
            file.set_len(0).map_err(io("shorten"))?;
            before = 0;
        }
        match more(client, wish, &mut file, part, before, progress) {
            Ok(()) => break,
            Err(trouble) => {
                let after = file.metadata().map_err(io("look at"))?.len();
                // Only what can be gone on from is worth something.
                let is_further = after > before && wish.metadata.size.is_some();
                failures = if is_further { 1 } else { failures + 1 };
                trouble.wait(failures, ATTEMPTS)?;
            }
        }
    }
    file.sync_all().map_err(io("write"))
}

/// One request: everything from `have` bytes on.
fn more(
    client: &Client<'_>,
    wish: &Wish<'_>,
    file: &mut File,
    part: &Path,
    have: u64,
    progress: &dyn Fn(u64),
) -> Result<(), Trouble> {
    let io = |action| move |error| Trouble::Final(Error::io(action, part)(error));
    let name = wish.file;
    let response = client.get(&wish.url, Some(name), Some(have))?;
    let continues = response.status().as_u16() == 206;
    let mut length = 0;
    if continues && have > 0 {
        let (start, total) = range_of(&response)
            .ok_or_else(|| Trouble::passing(format!("`{name}`: the server does not say which part it sends")))?;
        if start != have {
            return Err(Trouble::passing(format!("`{name}`: asked for byte {have} on, got byte {start} on")));
        }
        expect(client, wish, total)?;
        length = have;
    } else {
        // The whole file, whatever was asked for.
        file.set_len(0).map_err(io("shorten"))?;
        expect(client, wish, content_length(&response))?;
    }
    let mut reader = response.into_body().into_reader();
    let mut piece = vec![0; PIECE];
    progress(length);
    loop {
        let count = match reader.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) => {
                return Err(Trouble::passing(format!("`{name}`: the connection broke after {length} bytes: {error}")));
            }
        };
        file.write_all(&piece[..count]).map_err(io("write"))?;
        length += count as u64;
        if wish.metadata.size.is_some_and(|size| length > size) {
            expect(client, wish, Some(length))?;
        }
        progress(length);
    }
    match wish.metadata.size {
        Some(size) if length < size => {
            Err(Trouble::passing(format!("`{name}`: the connection ended after {length} of {size} bytes")))
        }
        _ => Ok(()),
    }
}

/// Refuses another length than the announced one.
fn expect(client: &Client<'_>, wish: &Wish<'_>, length: Option<u64>) -> Result<(), Trouble> {
    match (wish.metadata.size, length) {
        (Some(size), Some(length)) if size != length => {
            let problem = format!("`{}` has a wrong length: {size} bytes were announced, {length} come", wish.file);
            Err(client.damaged(problem))
        }
        _ => Ok(()),
    }
}

fn content_length(response: &Response<Body>) -> Option<u64> {
    response.headers().get("content-length")?.to_str().ok()?.trim().parse().ok()
}

/// First byte and total length of `Content-Range: bytes 10-99/100`.
fn range_of(response: &Response<Body>) -> Option<(u64, Option<u64>)> {
    let text = response.headers().get("content-range")?.to_str().ok()?;
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split_once('-')?.0.trim().parse().ok()?, total.trim().parse().ok()))
}

/// Compares content with its name, which is a hash: SHA-256 of what large files hold, git's own of everything else. Other
/// names are no hashes.
fn compare(client: &Client<'_>, wish: &Wish<'_>, part: &Path) -> Result<(), Trouble> {
    let etag = &wish.metadata.etag;
    let io = |action| move |error| Trouble::Final(Error::io(action, part)(error));
    let is_hash = etag.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    let mut file = File::open(part).map_err(io("open"))?;
    let length = file.metadata().map_err(io("look at"))?.len();
    let found = match (is_hash, etag.len()) {
        (true, 64) => digest(Sha256::new(), &mut file),
        (true, 40) => digest(Sha1::new().chain_update(format!("blob {length}\0")), &mut file),
        _ => return Ok(()),
    };
    let found = found.map_err(io("read"))?;
    match found == *etag {
        true => Ok(()),
        false => {
            let problem = format!("`{}` has a wrong hash: expected {etag}, got {found}", wish.file);
            Err(client.damaged(problem))
        }
    }
}

fn digest<D: Digest>(mut hash: D, file: &mut File) -> std::io::Result<String> {
    let mut piece = vec![0; PIECE];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hexadecimal(&hash.finalize())),
            count => hash.update(&piece[..count]),
        }
    }
}
