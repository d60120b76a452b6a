//! What a file of answers was made with: written beside it, and compared before a run goes on.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::{OnLength, RegenOptions};
use crate::data::tokenizer::hex;
use crate::error::{Error, Result};
use crate::files;
use crate::gguf::packed;
use crate::hub;
use crate::nn::Processors;

/// Version of the record's own layout.
const FORMAT: u32 = 2;

/// Everything the answers depend on, and where they came from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct RunRecord {
    format: u32,
    /// Version of this program when the file was begun. Another version may go on.
    specforge: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    target: Option<PathBuf>,
    /// Who answered when the file was begun, where servers did.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    servers: Vec<String>,
    prompts: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_rows: Option<usize>,
    /// Who guessed when the file was begun. It changes no answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    draft: Option<String>,
    /// Must be the same for a run that goes on.
    same: Map<String, Value>,
}

impl RunRecord {
    /// That of a run whose target runs in this program.
    pub(super) fn new(options: &RegenOptions, kind: tch::Kind, tokenizer_fingerprint: &str) -> Result<Self> {
        let Processors { temperature, top_k, top_p, repetition_penalty } = options.processors;
        let same = json!({
            "target_fingerprint": target_fingerprint(&options.target)?,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "element_type": element_type(kind),
            "max_new_tokens": options.max_new_tokens,
            "max_prompt_tokens": options.max_prompt_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "on_length": options.on_length,
            // Where nothing is sampled it decides nothing.
            "seed": (temperature > 0.0).then_some(options.seed),
        });
        let begun = Self {
            target: Some(hub::recorded(&options.target)),
            max_rows: Some(options.max_rows),
            draft: options.draft.as_ref().map(|draft| hub::recorded(Path::new(draft)).to_string_lossy().into_owned()),
            ..Self::of(&options.prompts, same)
        };
        Ok(begun)
    }

    /// That of a run whose answers come from `servers`, with what must be the same.
    pub(super) fn served(servers: Vec<String>, target: Option<PathBuf>, prompts: &Path, same: Value) -> Self {
        Self { servers, target, ..Self::of(prompts, same) }
    }

    fn of(prompts: &Path, same: Value) -> Self {
        let same = match same {
            Value::Object(same) => same,
            _ => Map::new(),
        };
        Self {
            format: FORMAT,
            specforge: env!("CARGO_PKG_VERSION").to_owned(),
            target: None,
            servers: Vec::new(),
            prompts: hub::recorded(prompts),
            max_rows: None,
            draft: None,
            same,
        }
    }

    /// What becomes of a row with an answer that was cut off.
    pub(super) fn on_length(&self) -> Result<OnLength> {
        let rule = self.same.get("on_length").cloned().unwrap_or(Value::Null);
        serde_json::from_value(rule).map_err(|error| Error::Failed(format!("on_length: {error}")))
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
        let keys: BTreeSet<&String> = self.same.keys().chain(other.same.keys()).collect();
        let of = |record: &Self, key: &String| record.same.get(key).cloned().unwrap_or(Value::Null);
        keys.into_iter()
            .map(|key| (key.clone(), of(self, key), of(other, key)))
            .filter(|(_, own, other)| own != other)
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
