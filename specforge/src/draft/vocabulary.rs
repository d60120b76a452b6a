//! The vocabulary of a draft that names fewer tokens than its target: where it comes from, and what a checkpoint keeps.
//!
//! Two keys of every `draft` section decide, whatever the algorithm: `vocab_map` names a file, `draft_vocab_size` alone
//! lets the run choose the commonest tokens of its own training documents. Without either the draft names every token.
//!
//! Shape legend: `V` vocabulary of the target, `DV` of the draft.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::data::{ChatTokenizer, TokenCache, supervised_counts};
use crate::error::{Error, Result};
use crate::nn::Head;
use crate::strict;
use crate::vocab::{self, Coverage, Record, VocabFile, VocabMap, Wanted};

/// The key of the number of tokens, for messages.
pub const SIZE_KEY: &str = "draft.draft_vocab_size";

/// The two keys, read from a `draft` section of any algorithm.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct VocabularyKeys {
    /// File of a map.
    pub vocab_map: Option<PathBuf>,
    /// `DV`
    pub draft_vocab_size: Option<i64>,
}

impl VocabularyKeys {
    /// Reads and checks the keys, and passes over all others.
    pub fn read(section: &Value) -> Result<Self> {
        let keys: Self = strict::from_value(section, "draft")?;
        match keys.draft_vocab_size {
            Some(size) if size < 1 => Err(Error::config(SIZE_KEY, format!("expected at least 1, got {size}"))),
            _ => Ok(keys),
        }
    }

    /// `DV` for a target of `target_size` tokens, before any data is read; `V` if nothing is said.
    pub fn draft_size(&self, target_size: i64) -> Result<i64> {
        match (self.draft_vocab_size, &self.vocab_map) {
            (Some(size), _) if size < 1 => Err(Error::config(SIZE_KEY, format!("expected at least 1, got {size}"))),
            (Some(size), _) if size > target_size => {
                Err(Error::config(SIZE_KEY, format!("expected at most the target's {target_size} tokens, got {size}")))
            }
            (Some(size), _) => Ok(size),
            (None, Some(path)) => Ok(VocabFile::read(path)?.map.draft_size()),
            (None, None) => Ok(target_size),
        }
    }
}

/// `DV` of a `draft` section; see [`VocabularyKeys::draft_size`].
pub fn draft_size(section: &Value, target_size: i64) -> Result<i64> {
    VocabularyKeys::read(section)?.draft_size(target_size)
}

/// A `draft` section with `draft_vocab_size` taken from the map's file, where only the file is named.
pub fn with_size(section: &Value, target_size: i64) -> Result<Value> {
    let keys = VocabularyKeys::read(section)?;
    let mut section = section.clone();
    if keys.vocab_map.is_some() && keys.draft_vocab_size.is_none() {
        section["draft_vocab_size"] = draft_size(&section, target_size)?.into();
    }
    Ok(section)
}

/// Documents whose trained tokens decide, and whose ids they are.
#[derive(Debug, Clone, Copy)]
pub struct Corpus<'a> {
    /// The tokens.
    pub cache: &'a TokenCache,
    /// Documents of the cache that are trained on.
    pub documents: &'a [usize],
    /// What the ids mean, and which of them are special.
    pub tokenizer: &'a ChatTokenizer,
    /// `V`
    pub target_size: i64,
}

/// A map that was made of a corpus, and what was seen on the way.
#[derive(Debug, Clone)]
pub struct Made {
    /// The map with its record.
    pub file: VocabFile,
    /// Ends of turns and special tokens, which are always in it.
    pub forced: usize,
    /// Tokens that are in it without being forced or seen.
    pub filled: usize,
    /// Share of the trained tokens that the draft can name.
    pub coverage: f64,
    /// What maps of other sizes would cover.
    pub table: Vec<Coverage>,
}

impl Corpus<'_> {
    /// How often each token of the target is trained, `[V]`.
    pub fn counts(&self) -> Result<Vec<u64>> {
        supervised_counts(self.cache, self.documents, self.target_size as usize)
    }

    /// Chooses `size` tokens by their counts.
    pub fn make(&self, counts: &[u64], size: i64) -> Result<Made, String> {
        let forced: Vec<i64> = self.tokenizer.special_token_ids().into_iter().map(i64::from).collect();
        let choice = vocab::choose(counts, usize::try_from(size).unwrap_or(0), &forced)?;
        let table = vocab::coverage_table(counts, &forced, choice.map.target_ids().len())?;
        let record =
            Record::new(&choice.map, &self.tokenizer.vocabulary_hash(), self.cache.content_hash(), choice.coverage);
        let file = VocabFile { map: choice.map, record: Some(record) };
        Ok(Made { file, forced: choice.forced, filled: choice.filled, coverage: choice.coverage, table })
    }
}

/// The smaller vocabulary of a run's draft.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    /// The map with its record.
    pub file: VocabFile,
    /// Share of the run's own trained tokens that the draft can name.
    pub coverage: f64,
    /// Whether the run chose the tokens itself, and should keep them.
    pub made: bool,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// The vocabulary that a `draft` section asks for: read and checked, or made of the training documents. `None` where the
/// draft names every token.
pub fn prepare(section: &Value, corpus: &Corpus<'_>) -> Result<Option<Vocabulary>> {
    let keys = VocabularyKeys::read(section)?;
    match (&keys.vocab_map, keys.draft_vocab_size) {
        (Some(path), asked) => {
            let (file, warnings) = load(path, asked, corpus)?;
            let coverage = vocab::coverage(&corpus.counts()?, &file.map);
            Ok(Some(Vocabulary { file, coverage, made: false, warnings }))
        }
        // Every token, which needs no map.
        (None, Some(size)) if size == corpus.target_size => Ok(None),
        (None, Some(size)) => {
            let counts = corpus.counts()?;
            let made = corpus.make(&counts, size).map_err(|problem| Error::config(SIZE_KEY, problem))?;
            Ok(Some(Vocabulary { file: made.file, coverage: made.coverage, made: true, warnings: Vec::new() }))
        }
        (None, None) => Ok(None),
    }
}

fn load(path: &Path, asked: Option<i64>, corpus: &Corpus<'_>) -> Result<(VocabFile, Vec<String>)> {
    let file = VocabFile::read(path)?;
    let wanted = Wanted {
        tokenizer_hash: &corpus.tokenizer.vocabulary_hash(),
        corpus_hash: corpus.cache.content_hash(),
        target_size: corpus.target_size,
        draft_size: asked,
    };
    let mut warnings = file.check(path, &wanted)?;
    let is_missing = |id: &u32| file.map.draft_id(i64::from(*id)).is_none();
    if corpus.tokenizer.eos_token_ids().iter().any(is_missing) {
        warnings.push(format!("{} leaves out a token that ends a turn: the draft cannot propose it", path.display()));
    }
    Ok((file, warnings))
}

/// Names of the tables in checkpoints and exports.
const TABLES: [&str; 2] = ["d2t", "t2d"];

/// A map as tensors that a checkpoint keeps: `d2t [DV]` int64 offsets and `t2d [V]` bool.
pub fn buffers(map: &VocabMap) -> Vec<(String, Tensor)> {
    let tables = [Tensor::from_slice(&map.d2t()), Tensor::from_slice(&map.t2d())];
    TABLES.into_iter().map(str::to_owned).zip(tables).collect()
}

/// The map among the tensors of a checkpoint, where there is one.
pub fn from_tensors(tensors: &[(String, Tensor)]) -> Result<Option<VocabMap>> {
    let find = |wanted: &str| tensors.iter().find(|(name, _)| name == wanted).map(|(_, tensor)| tensor);
    let (Some(d2t), Some(t2d)) = (find(TABLES[0]), find(TABLES[1])) else {
        return Ok(None);
    };
    let wrong = |problem: String| Error::Failed(format!("the checkpoint's vocabulary tables: {problem}"));
    if d2t.kind() != Kind::Int64 || t2d.kind() != Kind::Bool || d2t.dim() != 1 || t2d.dim() != 1 {
        let problem = format!("expected int64 and bool with one axis, got {:?} and {:?}", d2t.kind(), t2d.kind());
        return Err(wrong(problem));
    }
    let (d2t, t2d) = (d2t.f_to_device(Device::Cpu)?, t2d.f_to_device(Device::Cpu)?);
    VocabMap::from_tables(&Vec::<i64>::try_from(d2t)?, &Vec::<bool>::try_from(t2d)?).map(Some).map_err(wrong)
}

/// The target's rows that a draft's vocabulary names: a head of `DV` tokens of one of `V`.
pub fn gather_rows(head: &Head, map: &VocabMap) -> Result<Head> {
    if head.weight.size().first() != Some(&map.target_size()) {
        let (want, got) = (map.target_size(), head.weight.size());
        return Err(Error::Failed(format!(
            "the vocabulary map is of a target with {want} tokens, its head is {got:?}"
        )));
    }
    head.rows(&Tensor::from_slice(map.target_ids()).f_to_device(head.device())?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::ALGORITHMS;
    use super::*;

    #[test]
    fn every_algorithm_takes_the_two_keys() {
        for algorithm in ALGORITHMS {
            let section = json!({"algorithm": algorithm.name, "vocab_map": "map.safetensors", "draft_vocab_size": 80});
            let resolved = match (algorithm.resolve)(&section) {
                Ok(resolved) => resolved,
                // Some draft from the whole vocabulary, and say so by the key.
                Err(error) => {
                    assert!(
                        ["dflash2", "lilicorr", "domino", "next_scale", "masked_diffusion"].contains(&algorithm.name),
                        "{}: {error}",
                        algorithm.name
                    );
                    assert!(error.to_string().contains("draft.vocab_map"), "{error}");
                    continue;
                }
            };
            let keys = VocabularyKeys { vocab_map: Some("map.safetensors".into()), draft_vocab_size: Some(80) };
            assert_eq!(VocabularyKeys::read(&resolved).unwrap(), keys, "{}", algorithm.name);
            let none = (algorithm.resolve)(&json!({"algorithm": algorithm.name})).unwrap();
            assert_eq!(VocabularyKeys::read(&none).unwrap(), VocabularyKeys::default(), "{}", algorithm.name);
        }
    }

    #[test]
    fn the_size_is_known_before_any_data_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("map.safetensors");
        VocabFile { map: VocabMap::new(vec![0, 4, 5], 10).unwrap(), record: None }.write(&path).unwrap();
        assert_eq!(draft_size(&json!({}), 10).unwrap(), 10);
        assert_eq!(draft_size(&json!({"draft_vocab_size": 7}), 10).unwrap(), 7);
        assert_eq!(draft_size(&json!({"vocab_map": path}), 10).unwrap(), 3);
        let section = json!({"vocab_map": path, "num_heads": 2});
        assert_eq!(with_size(&section, 10).unwrap()["draft_vocab_size"], 3);
        for section in [json!({"num_heads": 2}), json!({"vocab_map": "/nowhere", "draft_vocab_size": 7})] {
            assert_eq!(with_size(&section, 10).unwrap(), section);
        }
        for (section, expected) in [
            (
                json!({"draft_vocab_size": 11}),
                "`draft.draft_vocab_size`: expected at most the target's 10 tokens, got 11",
            ),
            (json!({"draft_vocab_size": 0}), "`draft.draft_vocab_size`: expected at least 1, got 0"),
            (json!({"draft_vocab_size": "many"}), "`draft.draft_vocab_size`: invalid type"),
            (json!({"vocab_map": "/nowhere"}), "cannot read /nowhere"),
        ] {
            let error = draft_size(&section, 10).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn tables_become_tensors_and_back() {
        let map = VocabMap::new(vec![0, 4, 5], 8).unwrap();
        let mut tensors = buffers(&map);
        assert_eq!(from_tensors(&tensors).unwrap(), Some(map.clone()));
        assert_eq!(from_tensors(&tensors[..1]).unwrap(), None);
        let head = Tensor::arange(16, (Kind::Float, Device::Cpu)).view([8, 2]);
        let rows = gather_rows(&Head::plain(head), &map).unwrap().weight;
        assert_eq!(Vec::<f32>::try_from(rows.reshape([-1])).unwrap(), [0., 1., 8., 9., 10., 11.]);
        drop(tensors[1].1.logical_not_());
        assert!(from_tensors(&tensors).unwrap_err().to_string().contains("disagree"));
        tensors[1].1 = tensors[1].1.to_kind(Kind::Uint8);
        assert!(from_tensors(&tensors).unwrap_err().to_string().contains("expected int64 and bool"));
    }
}
