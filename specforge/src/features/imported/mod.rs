//! Hidden states that other trainers wrote to disk, document by document, as a feature source: a capture reads them once into
//! a store and needs them no more.
//!
//! `file` knows the layouts, `arrow` the data sets in which speculators keeps its marks. All files are opened once, for their tokens; a document of the run is found by its own. Files
//! that were cut at a length serve a run that cuts at the same or a shorter one: states of a prefix are a prefix of the
//! states. What comes out goes through [`Recognition`].

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use tch::Tensor;

use self::file::ForeignFile;
use super::{FeatureBatch, FeatureSource, Pending, Recognition};
use crate::data::PackedBatch;
use crate::error::{Error, Result};

mod arrow;
mod file;

/// Deepest folder that is looked into.
const MOST_DEPTH: usize = 16;

/// One document of a file, without its states.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignDocument {
    /// The file.
    pub path: PathBuf,
    /// Token ids, with what may be padding behind them.
    pub tokens: Vec<i64>,
    /// Whether each token is trained, where the file says it.
    pub supervised: Option<Vec<bool>>,
    /// Tokens before what looks like padding.
    pub length: usize,
}

impl ForeignDocument {
    /// Where the document may end: before the padding, before one token that may be some, at the end of the file.
    fn ends(&self) -> impl Iterator<Item = usize> {
        let all = self.tokens.len();
        let one_less = self.supervised.as_ref().is_some_and(|marks| marks.last() == Some(&false));
        [Some(self.length), one_less.then(|| all - 1), Some(all)].into_iter().flatten()
    }
}

/// The files of some folders.
#[derive(Debug)]
pub struct ForeignFiles {
    /// In the order of their names.
    documents: Vec<ForeignDocument>,
    /// Files beside them that hold no states.
    passed_over: usize,
    /// Number of states that each holds.
    layers: usize,
}

impl ForeignFiles {
    /// Opens files, and all files of folders whose names are those that trainers give. Data sets among them (`*.arrow`) say
    /// which tokens are trained where the files with states do not. `progress` is told how many are read, and of how many.
    pub fn open(paths: &[PathBuf], progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Self> {
        let (mut found, mut passed_over) = (Vec::new(), 0);
        for path in paths {
            match path.is_dir() {
                true => look_into(path, 0, &mut found, &mut passed_over)?,
                false => found.push(path.clone()),
            }
        }
        found.sort();
        found.dedup();
        let (sets, found): (Vec<PathBuf>, Vec<PathBuf>) = found.into_iter().partition(|path| arrow::is_named_so(path));
        let marks = marks(&sets)?;
        let Some(first) = found.first().cloned() else {
            let path = paths.first().map_or(Path::new(""), PathBuf::as_path);
            return Err(Error::bad_file(path, "holds no files of hidden states")
                .with_hint("expected SpecForge's *.ckpt, or speculators' hs_*.safetensors or data_*.pt"));
        };
        let (total, done) = (found.len() as u64, std::sync::atomic::AtomicU64::new(0));
        let read = |path: PathBuf| {
            let read = ForeignFile::open(&path).and_then(|mut file| {
                let (tokens, supervised) = file.tokens()?;
                let length = file::unpadded(&tokens, supervised.as_deref());
                let document = ForeignDocument { path: path.clone(), tokens, supervised, length };
                Ok((document, file.layers()?))
            });
            progress(done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1, total);
            read.map_err(|problem| Error::bad_file(&path, problem).with_hint(HINT))
        };
        let read: Vec<(ForeignDocument, usize)> = found.into_par_iter().map(read).collect::<Result<_>>()?;
        let layers = read.first().map_or(0, |&(_, layers)| layers);
        if let Some((other, got)) = read.iter().find(|(_, got)| *got != layers) {
            let problem = format!("holds {got} hidden states of each token, {} holds {layers}", first.display());
            return Err(Error::bad_file(&other.path, problem).with_hint("import what was written together"));
        }
        let mut documents: Vec<ForeignDocument> = read.into_iter().map(|(document, _)| document).collect();
        for document in documents.iter_mut().filter(|document| document.supervised.is_none()) {
            document.supervised = marks.get(&document.tokens).cloned();
        }
        Ok(Self { documents, passed_over, layers })
    }

    /// Documents, in the order of their files' names.
    pub fn documents(&self) -> &[ForeignDocument] {
        &self.documents
    }

    /// Files of the folders that hold no states.
    pub fn passed_over(&self) -> usize {
        self.passed_over
    }

    /// Number of hidden states of each token, the final one among them.
    pub fn layers(&self) -> usize {
        self.layers
    }
}

const HINT: &str = "expected what SpecForge's prepare_hidden_states.py, or speculators' data generation writes; leave the file \
                    out if it is something else";

/// Which tokens are trained, by the tokens, from data sets.
fn marks(sets: &[PathBuf]) -> Result<HashMap<Vec<i64>, Vec<bool>>> {
    let mut marks = HashMap::new();
    for path in sets {
        let rows = arrow::rows(path).map_err(|problem| Error::bad_file(path, problem))?;
        marks.extend(rows.into_iter().filter(|(ids, marks)| ids.len() == marks.len()));
    }
    Ok(marks)
}

/// All files below a folder whose names say that they hold states.
fn look_into(folder: &Path, depth: usize, found: &mut Vec<PathBuf>, passed_over: &mut usize) -> Result<()> {
    if depth > MOST_DEPTH {
        return Err(Error::bad_file(folder, format!("lies more than {MOST_DEPTH} folders deep")));
    }
    for entry in fs::read_dir(folder).map_err(Error::io("read folder", folder))? {
        let path = entry.map_err(Error::io("read folder", folder))?.path();
        match path.is_dir() {
            true => look_into(&path, depth + 1, found, passed_over)?,
            false if ForeignFile::is_named_so(&path) || arrow::is_named_so(&path) => found.push(path),
            false => *passed_over += 1,
        }
    }
    Ok(())
}

/// A feature source that reads such files.
pub struct ImportedFeatures {
    files: ForeignFiles,
    /// Documents by a hash of their first tokens, as many as a document of the run has at most.
    index: HashMap<u64, Vec<usize>>,
    recognition: RefCell<Recognition>,
}

impl ImportedFeatures {
    /// A source for a run whose documents have at most `longest` tokens.
    pub fn new(files: ForeignFiles, longest: usize, recognition: Recognition) -> Result<Self> {
        let wanted = recognition.wanted();
        if files.layers != wanted.len() && wanted.len() > 1 {
            let path = files.documents.first().map_or(Path::new(""), |document| &document.path);
            let (got, want) = (files.layers, wanted.len());
            let problem = format!(
                "holds {got} hidden states of each token, the final one among them; expected {want}: {wanted:?}, as --layers or \
                 the draft names them"
            );
            return Err(
                Error::bad_file(path, problem).with_hint("name the layers of these files by --layers, low to high")
            );
        }
        let mut index: HashMap<u64, Vec<usize>> = HashMap::new();
        for (place, document) in files.documents.iter().enumerate() {
            for end in document.ends() {
                let places = index.entry(hash(&document.tokens[..end.min(longest)])).or_default();
                if places.last() != Some(&place) {
                    places.push(place);
                }
            }
        }
        Ok(Self { files, index, recognition: RefCell::new(recognition) })
    }

    /// The file that has these tokens.
    pub fn find(&self, ids: &[i64]) -> Option<&Path> {
        let places = self.index.get(&hash(ids))?;
        let documents = places.iter().map(|&place| &self.files.documents[place]);
        // Whatever follows, the states of these tokens are theirs.
        documents.into_iter().find(|document| document.tokens.starts_with(ids)).map(|document| document.path.as_path())
    }

    /// Rows on which the target's head agreed.
    pub fn rows_judged(&self) -> usize {
        self.recognition.borrow().rows_judged()
    }

    fn read(&self, batch: Arc<PackedBatch>, layers: usize) -> Result<FeatureBatch> {
        let mut parts: Vec<Vec<Tensor>> = (0..layers).map(|_| Vec::new()).collect();
        for document in batch.each() {
            let name = document.documents.first().map_or("", |document| &document.name);
            let path = self.find(&document.ids);
            let path = path.ok_or_else(|| Error::Failed(format!("no file holds the document `{name}`")))?;
            let wrong = |problem: String| Error::bad_file(path, problem).with_hint(HINT);
            let states = ForeignFile::open(path).and_then(|mut file| file.states()).map_err(wrong)?;
            let length = document.ids.len() as i64;
            if let Some(short) = states.iter().find(|states| states.size()[0] < length) {
                let problem = format!("holds states of {} tokens, and has {length} of them", short.size()[0]);
                return Err(wrong(problem));
            }
            let states = states.iter().map(|states| Ok(states.f_narrow(0, 0, length)?)).collect::<Result<Vec<_>>>()?;
            let origin = path.display().to_string();
            let states = self.recognition.borrow_mut().take(&origin, name, &document.ids, states)?;
            parts.iter_mut().zip(states).for_each(|(part, states)| part.push(states));
        }
        let hidden = parts.iter().map(|part| Ok(Tensor::f_cat(part, 0)?)).collect::<Result<_>>()?; // [T, H]
        Ok(FeatureBatch::new(batch, hidden))
    }
}

impl FeatureSource for ImportedFeatures {
    fn begin(&self, batch: Arc<PackedBatch>, capture: &[usize]) -> Pending<'_> {
        let layers = capture.len();
        Pending::later(move || self.read(batch, layers))
    }
}

fn hash(ids: &[i64]) -> u64 {
    let mut hasher = DefaultHasher::new();
    ids.iter().for_each(|id| hasher.write_i64(*id));
    hasher.finish()
}
