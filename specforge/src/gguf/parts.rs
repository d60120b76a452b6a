//! A model in one GGUF file, or in several that belong together: `NAME-00001-of-00003.gguf` and so on, the first of them with
//! the metadata.

use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::Value;

use super::header::{self, Content};
use super::metadata::Metadata;
use super::source;
use crate::error::{Error, Result};

const COUNT: &str = "split.count";
const NUMBER: &str = "split.no";
const TENSORS: &str = "split.tensors.count";
const HINT: &str = "join the parts: `llama-gguf-split --merge` with the first part and a new name";

/// More parts than anybody has.
const MOST: u64 = 1 << 12;

/// Reads the headers of a file and of those that belong to it. Tensors say which of the files they lie in.
pub(super) fn read(path: &Path, mut file: File) -> Result<(Content, Vec<(PathBuf, File)>)> {
    let first = Metadata::new(path.to_path_buf(), header::read(path, &mut file)?);
    let count = first.whole(COUNT)?.unwrap_or(1);
    let mut files = vec![(path.to_path_buf(), file)];
    if count <= 1 {
        return Ok((first.content, files));
    }
    let number = first.whole(NUMBER)?.unwrap_or(0).saturating_add(1);
    let is_part = format!("is part {number} of {count} of a split GGUF file");
    let stem = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(&ending(1, count)));
    let (1, Some(stem), true) = (number, stem, count <= MOST) else {
        let problem = format!("{is_part}; expected the first, `NAME{}`", ending(1, count));
        return Err(first.bad(problem).with_hint(HINT));
    };
    let told = first.whole(TENSORS)?;
    let Metadata { mut content, .. } = first;
    for number in 2..=count {
        let path = path.with_file_name(format!("{stem}{}", ending(number, count)));
        if !path.exists() {
            return Err(Error::bad_file(&path, format!("is not there: part {number} of {count}")).with_hint(HINT));
        }
        let mut file = source::open_plain(&path)?;
        let part = Metadata::new(path.clone(), header::read(&path, &mut file)?);
        let (own, of) = (part.whole(NUMBER)?.map(|number| number.saturating_add(1)), part.whole(COUNT)?);
        if (own, of) != (Some(number), Some(count)) {
            let shown = |number: Option<u64>| number.map_or_else(|| "nothing".to_owned(), |number| number.to_string());
            let problem = format!("expected part {number} of {count}, got {} of {}", shown(own), shown(of));
            return Err(part.bad(problem));
        }
        for (name, mut tensor) in part.content.tensors {
            tensor.part = files.len();
            if content.tensors.insert(name.clone(), tensor).is_some() {
                return Err(Error::bad_file(&path, format!("tensor `{name}` is also in another part")));
            }
        }
        files.push((path, file));
    }
    let have = content.tensors.len() as u64;
    if let Some(want) = told.filter(|&want| want != have) {
        return Err(Error::bad_file(path, format!("`{TENSORS}` is {want}, but its parts hold {have} tensors")));
    }
    content.metadata.insert(COUNT.to_owned(), Value::U16(1));
    Ok((content, files))
}

/// How the name of a part ends.
fn ending(number: u64, count: u64) -> String {
    format!("-{number:05}-of-{count:05}.gguf")
}
