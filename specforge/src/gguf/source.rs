//! Opens what the user named: a GGUF file, or a Python wheel with one inside.

use std::fs::File;
use std::io::{BufReader, Read, Seek, copy};
use std::path::{Path, PathBuf};

use zip::ZipArchive;
use zip::result::ZipError;

use crate::error::{Error, Result, foreign};

/// An open GGUF file.
pub(super) struct Source {
    /// The file as it is named in messages; for a wheel, the wheel and the file inside.
    pub(super) path: PathBuf,
    pub(super) file: File,
}

/// Opens a plain file. A pipe would wait for a writer for ever.
pub(super) fn open_plain(path: &Path) -> Result<File> {
    if !std::fs::metadata(path).map_err(Error::io("open", path))?.is_file() {
        return Err(Error::bad_file(path, "expected a GGUF file, got a folder or a device"));
    }
    File::open(path).map_err(Error::io("open", path))
}

/// Opens a GGUF file. One inside a wheel is unpacked into a nameless file in `scratch`, which the system removes when
/// it is closed, however the program ends.
pub(super) fn open(path: &Path, scratch: &Path) -> Result<Source> {
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let mut magic = Vec::new();
    (&mut file).take(4).read_to_end(&mut magic).map_err(Error::io("read", path))?;
    file.rewind().map_err(Error::io("read", path))?;
    let is_zip = magic == b"PK\x03\x04" || magic == b"PK\x05\x06";
    if is_zip || path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("whl")) {
        return unpack(path, file, scratch);
    }
    Ok(Source { path: path.to_path_buf(), file })
}

fn unpack(path: &Path, file: File, scratch: &Path) -> Result<Source> {
    let broken = |error: ZipError| match error {
        ZipError::Io(source) if source.raw_os_error().is_some() => Error::io("read", path)(source),
        other => Error::bad_file(path, format!("is no readable wheel: {other}"))
            .with_hint("the file looks damaged; download it again"),
    };
    let archive = foreign::library(|| ZipArchive::new(BufReader::new(file)));
    let mut archive =
        archive.map_err(|words| Error::bad_file(path, format!("is no readable wheel: {words}")))?.map_err(broken)?;
    let names = archive.file_names().map(|name| name.map(|name| name.into_owned()));
    let mut names = names.collect::<Result<Vec<String>, ZipError>>().map_err(broken)?;
    names.retain(|name| name.to_ascii_lowercase().ends_with(".gguf"));
    let name = match names.as_slice() {
        [name] => name.clone(),
        [] => return Err(Error::bad_file(path, "expected a GGUF file inside the wheel, found none")),
        several => {
            let problem = format!("expected one GGUF file inside the wheel, found {}", foreign::listed(several, 8));
            return Err(Error::bad_file(path, problem).with_hint("unpack the wheel and name one of them"));
        }
    };
    let mut entry = archive.by_name(&name).map_err(broken)?;
    let mut unpacked = tempfile::tempfile_in(scratch).map_err(Error::io("create a file in", scratch))?;
    let size = entry.size();
    // One byte more than promised shows a lie without unpacking it all.
    let written = copy(&mut entry.by_ref().take(size.saturating_add(1)), &mut unpacked);
    let written = written.map_err(|error| match error.raw_os_error() {
        Some(_) => Error::io("unpack", path)(error),
        None => broken(ZipError::Io(error)),
    })?;
    if written != size {
        return Err(Error::bad_file(path, format!("{name}: expected {size} bytes, unpacked {written}")));
    }
    Ok(Source { path: path.join(&name), file: unpacked })
}
