//! Pictures as documents of a training run: a label, then the codes of all scales.
//!
//! A file is small grey pictures with labels ([`GreyImages`]), which the image tokenizer encodes, or the report of
//! `images generate`, whose maps are documents as they are: pictures that a target made itself. Codes are computed on the CPU,
//! a fixed number of pictures at a time, and kept in a token cache.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};
use tch::Tensor;

use super::pixels;
use crate::data::{BuildReport, DataConfig, GreyImages, NewDocuments, TokenCache};
use crate::error::{Error, Result};
use crate::models::vqvae::Vqvae;
use crate::strict;

/// Pictures that are encoded at once.
const ENCODED_AT_ONCE: usize = 64;
/// Rises with every change of what documents are made of pictures.
const VERSION: u32 = 1;

/// One picture of a report of `images generate`.
#[derive(Debug, Clone, Deserialize)]
struct Decoded {
    /// Nothing for a picture without one.
    label: Option<i64>,
    /// Of each scale the codes, row by row.
    maps: Vec<Vec<i64>>,
}

enum Content {
    Grey(GreyImages),
    Decoded(Vec<Decoded>),
}

struct File {
    path: PathBuf,
    content: Content,
    digest: [u8; 32],
}

/// The pictures of some files, before they are encoded.
pub struct Pictures {
    files: Vec<File>,
}

/// What codes and labels have to be.
#[derive(Debug, Clone, Copy)]
pub struct Codes<'a> {
    /// Side of each scale's map.
    pub patch_nums: &'a [i64],
    /// Codes of the codebook.
    pub vocab_size: i64,
    /// Labels; this number stands for none.
    pub num_classes: i64,
}

impl Codes<'_> {
    fn sizes(&self) -> impl Iterator<Item = i64> + '_ {
        self.patch_nums.iter().map(|side| side * side)
    }

    /// Tokens of a document.
    pub fn length(&self) -> usize {
        1 + self.sizes().sum::<i64>() as usize
    }

    fn label(&self, label: Option<i64>) -> Result<u32, String> {
        match label {
            None => Ok(self.num_classes as u32),
            Some(label) if (0..self.num_classes).contains(&label) => Ok(label as u32),
            Some(label) => Err(format!("label: expected a number from 0 to {}, got {label}", self.num_classes - 1)),
        }
    }

    /// A document of maps, `[p * p]` each.
    fn document(&self, label: Option<i64>, maps: &[Vec<i64>]) -> Result<Vec<u32>, String> {
        let mut tokens = vec![self.label(label)?];
        if maps.len() != self.patch_nums.len() {
            let (scales, got) = (self.patch_nums.len(), maps.len());
            return Err(format!("expected maps of {scales} scales, got {got}: another image tokenizer made them"));
        }
        for (scale, (size, map)) in self.sizes().zip(maps).enumerate() {
            if map.len() as i64 != size {
                return Err(format!("scale {scale}: expected {size} codes, got {}", map.len()));
            }
            for &code in map {
                if !(0..self.vocab_size).contains(&code) {
                    let last = self.vocab_size - 1;
                    return Err(format!("scale {scale}: expected codes from 0 to {last}, got {code}"));
                }
                tokens.push(code as u32);
            }
        }
        Ok(tokens)
    }
}

impl Pictures {
    /// Reads files.
    pub fn read(paths: &[PathBuf]) -> Result<Self> {
        if paths.is_empty() {
            let hint = "list tables of grey pictures, or reports of `images generate`";
            return Err(Error::config("data.train", "names no file").with_hint(hint));
        }
        Ok(Self { files: paths.iter().map(|path| File::read(path)).collect::<Result<_>>()? })
    }

    /// For each picture a hash of it: what decides whether it is held out, and where it stands among those that are.
    pub fn origins(&self) -> Vec<u64> {
        self.files.iter().flat_map(File::origins).collect()
    }

    /// The documents, from the cache or encoded now by the tokenizer that `load` gives. `tokenizer` is its digest.
    pub fn documents(
        &self,
        codes: Codes<'_>,
        (tokenizer, load): (&str, &dyn Fn() -> Result<Vqvae>),
        config: &DataConfig,
        progress: &dyn Fn(u64, u64),
    ) -> Result<(TokenCache, BuildReport)> {
        let length = codes.length();
        if length > config.max_length {
            let problem = format!("a picture has {length} tokens and cannot be cut, got {}", config.max_length);
            return Err(Error::config("data.max_length", problem));
        }
        let mut hash = Sha256::new();
        hash.update(format!("pictures {VERSION} {tokenizer} {codes:?}"));
        for file in &self.files {
            hash.update(file.digest);
            hash.update(file.name());
        }
        // Before anything is encoded, and whether or not it was encoded before.
        self.files.iter().try_for_each(|file| file.check(codes))?;
        let total = self.files.iter().map(File::len).sum();
        TokenCache::open_or_fill(&config.cache_dir, hash.finalize().into(), progress, |documents| {
            let mut done = 0;
            for file in &self.files {
                file.add(codes, load, documents, &mut |more| {
                    done += more;
                    (done, total)
                })?;
            }
            Ok(())
        })
    }
}

impl File {
    fn read(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|extension| extension == "json") {
            return Self::decoded(path);
        }
        let images = GreyImages::read(path)?;
        let digest = Sha256::digest(images.digest()).into();
        Ok(Self { path: path.to_path_buf(), content: Content::Grey(images), digest })
    }

    fn decoded(path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Report {
            images: Vec<Decoded>,
        }
        let text = std::fs::read(path).map_err(Error::io("read", path))?;
        let hint = "expected images.json, the report of `specforge images generate`";
        let report: Report =
            strict::from_json(&text).map_err(|problem| Error::bad_file(path, problem).with_hint(hint))?;
        if report.images.is_empty() {
            return Err(Error::bad_file(path, "holds no images").with_hint(hint));
        }
        Ok(Self {
            path: path.to_path_buf(),
            content: Content::Decoded(report.images),
            digest: Sha256::digest(&text).into(),
        })
    }

    fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn len(&self) -> usize {
        match &self.content {
            Content::Grey(images) => images.len(),
            Content::Decoded(images) => images.len(),
        }
    }

    fn origins(&self) -> Vec<u64> {
        match &self.content {
            Content::Grey(images) => {
                let origin = |(index, label): (usize, &i64)| origin(&[images.image(index), &label.to_le_bytes()]);
                images.labels().iter().enumerate().map(origin).collect()
            }
            Content::Decoded(images) => images.iter().map(Decoded::origin).collect(),
        }
    }

    /// Refuses labels and codes that cannot be, with their place.
    fn check(&self, codes: Codes<'_>) -> Result<()> {
        match &self.content {
            Content::Grey(images) => images.labels().iter().enumerate().try_for_each(|(index, &label)| {
                let refuse = |problem| Error::BadLine { path: self.path.clone(), line: index + 1, problem };
                codes.label(Some(label)).map(drop).map_err(refuse)
            }),
            Content::Decoded(images) => images.iter().enumerate().try_for_each(|(index, image)| {
                let refuse = |problem| Error::bad_file(&self.path, format!("image {index}: {problem}"));
                codes.document(image.label, &image.maps).map(drop).map_err(refuse)
            }),
        }
    }

    /// Adds every picture as a document. `report` counts those that are done.
    fn add(
        &self,
        codes: Codes<'_>,
        load: &dyn Fn() -> Result<Vqvae>,
        documents: &mut NewDocuments<'_, '_>,
        report: &mut dyn FnMut(usize) -> (usize, usize),
    ) -> Result<()> {
        let name = self.name();
        let origins = self.origins();
        let supervised: Vec<u8> = (0..codes.length()).map(|place| u8::from(place > 0)).collect();
        let add = |index: usize, tokens: &[u32], documents: &mut NewDocuments<'_, '_>| {
            let origin = origins.get(index).copied().unwrap_or_default();
            documents.add(&format!("{name}:{}", index + 1), origin, tokens, &supervised)
        };
        match &self.content {
            Content::Decoded(images) => {
                for (index, image) in images.iter().enumerate() {
                    let tokens = codes.document(image.label, &image.maps).map_err(Error::Failed)?;
                    add(index, &tokens, documents)?;
                }
            }
            Content::Grey(images) => {
                let tokenizer = load()?;
                let all: Vec<usize> = (0..images.len()).collect();
                for chunk in all.chunks(ENCODED_AT_ONCE) {
                    let rows = encode(&tokenizer, images, chunk)?;
                    for (&index, maps) in chunk.iter().zip(&rows) {
                        let label = images.labels().get(index).copied();
                        add(index, &codes.document(label, maps).map_err(Error::Failed)?, documents)?;
                    }
                    let (done, total) = report(chunk.len());
                    documents.report(done, total);
                }
                return Ok(());
            }
        }
        let (done, total) = report(self.len());
        documents.report(done, total);
        Ok(())
    }
}

/// Of each picture the maps.
fn encode(tokenizer: &Vqvae, images: &GreyImages, which: &[usize]) -> Result<Vec<Vec<Vec<i64>>>> {
    let _no_grad = tch::no_grad_guard();
    let pixels = pixels(images, which, tokenizer.config().pixels())?;
    let maps = tokenizer.encode(&pixels)?.indices; // [B, p * p] each
    let maps = maps.iter().map(|map: &Tensor| Ok(Vec::<Vec<i64>>::try_from(map)?)).collect::<Result<Vec<_>>>()?;
    let picture = |row: usize| maps.iter().filter_map(|map| map.get(row).cloned()).collect();
    Ok((0..which.len()).map(picture).collect())
}

impl Decoded {
    fn origin(&self) -> u64 {
        let codes: Vec<u8> = self.maps.iter().flatten().flat_map(|code| code.to_le_bytes()).collect();
        origin(&[&self.label.unwrap_or(-1).to_le_bytes(), &codes])
    }
}

fn origin(parts: &[&[u8]]) -> u64 {
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    let digest: [u8; 32] = hash.finalize().into();
    digest.iter().take(8).fold(0, |number, &byte| number << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::vqvae;

    const CODES: Codes<'_> = Codes { patch_nums: &[1, 2, 4], vocab_size: 16, num_classes: 3 };

    fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn grey(labels: &[i64]) -> String {
        let line = |(row, label): (usize, &i64)| {
            let pixels: Vec<String> = (0..64).map(|place| ((place * 37 + row * 91) % 256).to_string()).collect();
            format!("{},{label}\n", pixels.join(","))
        };
        labels.iter().enumerate().map(line).collect()
    }

    fn decoded(label: &str, first: i64, last: usize) -> String {
        let map = |size: usize| vec![2; size];
        let maps = serde_json::json!([[first], map(4), map(last)]);
        format!(
            r#"{{"settings": {{}}, "images": [{{"number": 0, "label": {label}, "file": "x.png", "maps": {maps}}}]}}"#
        )
    }

    fn documents(paths: &[PathBuf], folder: &Path, codes: Codes<'_>) -> Result<(TokenCache, BuildReport)> {
        let config = DataConfig { cache_dir: folder.join("cache"), ..DataConfig::default() };
        let load = || Ok(vqvae::tiny());
        Pictures::read(paths)?.documents(codes, ("digest", &load), &config, &|_, _| ())
    }

    #[test]
    fn a_document_is_a_label_and_the_codes_of_all_scales() {
        let folder = tempfile::tempdir().unwrap();
        let paths = [
            write(folder.path(), "grey.csv", &grey(&[2, 0])),
            write(folder.path(), "images.json", &decoded("null", 7, 16)),
        ];
        let (cache, report) = documents(&paths, folder.path(), CODES).unwrap();
        assert_eq!((cache.len(), report.from_cache, report.documents), (3, false, 3));
        let first = cache.document(0);
        assert_eq!((first.id, first.tokens.len(), first.tokens[0]), ("grey.csv:1", 22, 2));
        assert_eq!((first.supervised[0], &first.supervised[1..3]), (0, &[1, 1][..]));
        let pixels = pixels(&GreyImages::read(&paths[0]).unwrap(), &[0, 1], 8).unwrap();
        let maps = tch::no_grad(|| vqvae::tiny().encode(&pixels)).unwrap().indices;
        assert_eq!(i64::from(cache.document(1).tokens[6 + 3]), maps[2].int64_value(&[1, 3]));
        let made = cache.document(2);
        assert_eq!((made.id, &made.tokens[..3]), ("images.json:1", &[3, 7, 2][..]));
        assert_eq!(cache.conversation_key(0), Pictures::read(&paths).unwrap().origins()[0]);
        assert!(documents(&paths, folder.path(), CODES).unwrap().1.from_cache);
        // Another number of labels is another meaning of none.
        assert!(!documents(&paths, folder.path(), Codes { num_classes: 4, ..CODES }).unwrap().1.from_cache);
    }

    #[test]
    fn what_cannot_be_is_named_with_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let said = |name: &str, text: &str| {
            documents(&[write(folder.path(), name, text)], folder.path(), CODES).unwrap_err().to_string()
        };
        assert!(said("a.csv", &grey(&[1, 3])).contains("a.csv:2: label: expected a number from 0 to 2"));
        assert!(said("a.json", &decoded("4", 7, 16)).contains("image 0: label: expected a number from 0 to 2, got 4"));
        assert!(said("a.json", &decoded("-1", 7, 16)).contains("got -1"));
        assert!(said("a.json", &decoded("1", 16, 16)).contains("scale 0: expected codes from 0 to 15, got 16"));
        assert!(said("a.json", &decoded("1", 7, 9)).contains("scale 2: expected 16 codes, got 9"));
        assert!(
            said("a.json", r#"{"images": [{"label": 1, "maps": [[1]]}]}"#).contains("expected maps of 3 scales, got 1")
        );
        assert!(said("a.json", r#"{"images": []}"#).contains("holds no images"));
        assert!(said("a.json", "{").contains("a.json"));
        assert!(Pictures::read(&[]).err().unwrap().to_string().contains("data.train"));
        let config = DataConfig { max_length: 21, ..DataConfig::default() };
        let pictures = Pictures::read(&[write(folder.path(), "b.csv", &grey(&[1]))]).unwrap();
        let error = pictures.documents(CODES, ("", &|| Ok(vqvae::tiny())), &config, &|_, _| ()).unwrap_err();
        assert!(error.to_string().contains("data.max_length"));
    }
}
