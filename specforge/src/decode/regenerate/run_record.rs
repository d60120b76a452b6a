//! What a file of answers was made with: written beside it, and compared before a run goes on.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{OnLength, RegenOptions};
use crate::data::tokenizer::hex;
use crate::error::{Error, Result};
use crate::files;
use crate::gguf::packed;
use crate::nn::Processors;

/// Version of the record's own layout.
const FORMAT: u32 = 2;

/// Everything the answers depend on, and where they came from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct RunRecord {
    format: u32,
    /// Version of this program when the file was begun. Another version may go on.
    specforge: String,
    target: PathBuf,
    prompts: PathBuf,
    max_rows: usize,
    /// Who guessed when the file was begun. It changes no answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    draft: Option<String>,
    /// Must be the same for a run that goes on.
    same: Same,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Same {
    target_fingerprint: String,
    tokenizer_fingerprint: String,
    element_type: String,
    max_new_tokens: usize,
    max_prompt_tokens: Option<usize>,
    temperature: f64,
    top_k: usize,
    top_p: f64,
    repetition_penalty: f64,
    on_length: OnLength,
    /// `None` where nothing is sampled.
    seed: Option<u64>,
}

impl RunRecord {
    pub(super) fn new(options: &RegenOptions, kind: tch::Kind, tokenizer_fingerprint: String) -> Result<Self> {
        let Processors { temperature, top_k, top_p, repetition_penalty } = options.processors;
        Ok(Self {
            format: FORMAT,
            specforge: env!("CARGO_PKG_VERSION").to_owned(),
            target: options.target.clone(),
            prompts: options.prompts.clone(),
            max_rows: options.max_rows,
            draft: options.draft.clone(),
            same: Same {
                target_fingerprint: target_fingerprint(&options.target)?,
                tokenizer_fingerprint,
                element_type: element_type(kind),
                max_new_tokens: options.max_new_tokens,
                max_prompt_tokens: options.max_prompt_tokens,
                temperature,
                top_k,
                top_p,
                repetition_penalty,
                on_length: options.on_length,
                seed: (temperature > 0.0).then_some(options.seed),
            },
        })
    }

    pub(super) fn on_length(&self) -> OnLength {
        self.same.on_length
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        files::write_json(path, self)
    }

    /// Refuses a process that was started on something else than the first, whose record this is.
    pub(super) fn check_rank(&self, rank: usize, own: &Self) -> Result<()> {
        let Some((key, want, got)) = self.changes(own).into_iter().next() else { return Ok(()) };
        Err(Error::Usage(format!(
            "rank {rank} was started on something else than rank 0: {key}: expected {want}, got {got}; start every rank with \
             the same program, options and files"
        )))
    }

    /// What must be the same and is not: key, this one's value, the other's.
    fn changes(&self, other: &Self) -> Vec<(String, Value, Value)> {
        let fields = |same: &Same| match serde_json::to_value(same) {
            Ok(Value::Object(fields)) => fields,
            _ => serde_json::Map::new(),
        };
        let (own, other) = (fields(&self.same), fields(&other.same));
        let of_other = |key: &String| other.get(key).cloned().unwrap_or(Value::Null);
        own.into_iter()
            .map(|(key, value)| (of_other(&key), key, value))
            .filter(|(other, _, value)| other != value)
            .map(|(other, key, value)| (key, value, other))
            .collect()
    }

    /// Refuses to go on with other options than the file was begun with.
    pub(super) fn check_same(&self, path: &Path) -> Result<()> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let hint = "repeat the old options, or start over with --restart, which keeps the old answers as .bak";
        let foreign = |error| Error::bad_file(path, format!("is no record of a run: {error}")).with_hint(hint);
        let before: Value = serde_json::from_str(&text).map_err(foreign)?;
        // Another layout has other fields.
        if let Some(format) = before.get("format").filter(|format| **format != FORMAT) {
            let problem = format!("layout: expected {FORMAT}, got {format}: another version of the program began this");
            return Err(Error::bad_file(path, problem).with_hint(hint));
        }
        let before: Self = serde_json::from_value(before).map_err(foreign)?;
        let changed: Vec<String> = (before.changes(self).into_iter())
            .map(|(key, then, now)| format!("{key}: {then} then, {now} now"))
            .collect();
        if changed.is_empty() {
            return Ok(());
        }
        let problem = format!("the answers were begun with other options ({})", changed.join("; "));
        Err(Error::bad_file(path, problem).with_hint(hint))
    }
}

fn element_type(kind: tch::Kind) -> String {
    match kind {
        tch::Kind::Float => "float32".to_owned(),
        tch::Kind::Double => "float64".to_owned(),
        tch::Kind::Half => "float16".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    }
}

/// Bytes of each sample of a weights file.
const SAMPLE: u64 = 64 << 10;
/// Samples of a weights file, evenly spaced, the first and the last included.
const SAMPLES: u64 = 64;

/// Tells targets apart: a hash of config.json and of samples of every weights file. Reading all of a large model would
/// take minutes, and training changes every tensor: two models that agree in all samples are copies of one.
fn target_fingerprint(folder: &Path) -> Result<String> {
    let mut digest = Sha256::new();
    let config = packed::read_file(folder, "config.json")?;
    digest.update(config.ok_or_else(|| Error::bad_file(folder, "is not a model folder: config.json is not there"))?);
    let mut weights = Vec::new();
    if packed::is_packed(folder) {
        weights.push(folder.to_path_buf());
    } else {
        let entries = std::fs::read_dir(folder).map_err(Error::io("read", folder))?;
        let files = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
        weights.extend(files.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors")));
        weights.sort();
    }
    for path in weights {
        let file = File::open(&path).map_err(Error::io("open", &path))?;
        let length = file.metadata().map_err(Error::io("read", &path))?.len();
        digest.update(length.to_le_bytes());
        let mut sample = vec![0; SAMPLE.min(length) as usize];
        let room = length - sample.len() as u64;
        for index in 0..SAMPLES {
            let offset = (u128::from(room) * u128::from(index) / u128::from(SAMPLES - 1)) as u64;
            file.read_exact_at(&mut sample, offset).map_err(Error::io("read", &path))?;
            digest.update(&sample);
        }
    }
    Ok(hex(&digest.finalize()[..16]))
}
