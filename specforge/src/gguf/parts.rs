//! A model in one GGUF file, or in several that belong together: `NAME-00001-of-00003.gguf` and so on, the first of them
//! with the metadata.

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

#[cfg(test)]
mod tests {
    use std::fs;

    use candle_core::quantized::gguf_file::Value as GgufValue;

    use super::super::synthetic::{Synthetic, SyntheticTensor};
    use super::super::{ImportOptions, import, packed};
    use super::*;

    /// Cuts a file into parts, as `llama-gguf-split` does.
    fn parts(file: &Synthetic, folder: &Path, count: usize) -> Vec<PathBuf> {
        let tensors = file.tensors.chunks(file.tensors.len().div_ceil(count));
        let part = |(number, tensors): (usize, &[SyntheticTensor])| {
            let mut part = Synthetic { tensors: tensors.to_vec(), ..file.clone() };
            if number > 0 {
                part.metadata.clear();
            }
            part.set("split.no", GgufValue::U32(number as u32));
            part.set("split.count", GgufValue::U32(count as u32));
            part.set("split.tensors.count", GgufValue::I32(file.tensors.len() as i32));
            let path = folder.join(format!("model-{:05}-of-{count:05}.gguf", number + 1));
            fs::write(&path, part.bytes()).unwrap();
            path
        };
        tensors.enumerate().map(part).collect()
    }

    #[test]
    fn parts_of_a_split_file_are_read_together() {
        let folder = tempfile::tempdir().unwrap();
        let file = Synthetic::plain();
        let want = folder.path().join("want");
        let quietly = |source: &Path, out: &Path| import(source, out, &ImportOptions::default(), &|_, _| {});
        quietly(&file.write(folder.path()), &want).unwrap();
        let paths = parts(&file, folder.path(), 3);
        let out = folder.path().join("out");
        quietly(&paths[0], &out).unwrap();
        for name in ["model.safetensors", "config.json", "tokenizer.json"] {
            assert_eq!(fs::read(out.join(name)).unwrap(), fs::read(want.join(name)).unwrap(), "{name}");
        }
        let refused = |path: &Path, part: &str| {
            let error = quietly(path, &folder.path().join("none")).unwrap_err().to_string();
            assert!(error.contains(part), "no `{part}` in {error}");
            assert!(!folder.path().join("none").exists());
        };
        refused(&paths[1], "is part 2 of 3 of a split GGUF file; expected the first, `NAME-00001-of-00003.gguf`");
        let error = packed::read_file(&paths[0], "config.json").unwrap_err().to_string();
        assert!(error.contains("is the first of 3 parts"), "{error}");
        fs::copy(&paths[0], folder.path().join("renamed.gguf")).unwrap();
        refused(&folder.path().join("renamed.gguf"), "expected the first");
        let third = fs::read(&paths[2]).unwrap();
        fs::copy(&paths[1], &paths[2]).unwrap();
        refused(&paths[0], "model-00003-of-00003.gguf: expected part 3 of 3, got 2 of 3");
        fs::write(&paths[2], &third[..third.len() - 200]).unwrap();
        refused(&paths[0], "model-00003-of-00003.gguf");
        fs::remove_file(&paths[2]).unwrap();
        refused(&paths[0], "model-00003-of-00003.gguf: is not there: part 3 of 3");
    }
}
