//! Files that serving engines load, and the checks that they will.
//!
//! A format is a file here and a line in [`FORMATS`]. Reading back is part of a format: `export --check` parses what
//! was written with the same rules an engine applies, and a test compares the logits.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::draft::{DraftModel, Parameter};
use crate::error::{Error, Result};
use crate::files::{self, StagedDir};
use crate::strict;
use crate::table::Table;
use crate::vocab::VocabMap;

pub mod block;
pub mod eagle3;
pub mod masked_diffusion;
pub mod medusa;
pub mod next_scale;
pub mod peagle;

/// A serving engine whose rules are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// SGLang 0.5.
    Sglang,
    /// vLLM 0.33.
    Vllm,
    /// llama.cpp b11434: a GGUF file as it is, a folder after its converter.
    #[serde(rename = "llama.cpp")]
    LlamaCpp,
}

impl Source {
    /// Tensors that stand for the target's own, under the target's names: an export that replaces them writes these.
    pub fn of_target(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().filter_map(|(name, tensor)| Some((Parameter::target_name(name)?, tensor)))
    }

    /// The target as files name it: as it was asked for, else the absolute path of its folder or file, since an engine is started
    /// from anywhere. What is not here stays as the configuration names it.
    pub fn target_words(&self) -> String {
        let absolute = || self.target.exists().then(|| std::path::absolute(&self.target).ok()).flatten();
        let words = || absolute().unwrap_or_else(|| self.target.clone()).to_string_lossy().into_owned();
        self.target_name.clone().unwrap_or_else(words)
    }
}

impl Engine {
    /// Every engine.
    pub const ALL: [Engine; 3] = [Engine::Sglang, Engine::Vllm, Engine::LlamaCpp];

    /// Value of `--engine`.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Sglang => "sglang",
            Engine::Vllm => "vllm",
            Engine::LlamaCpp => "llama.cpp",
        }
    }
}

impl std::str::FromStr for Engine {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|engine| engine.name() == text);
        found.ok_or_else(|| format!("expected sglang, vllm or llama.cpp, got `{text}`"))
    }
}

/// What one engine makes of a folder.
#[derive(Debug, Clone, Serialize)]
pub struct EngineReport {
    /// The engine.
    pub engine: Engine,
    /// What it will do, one line each.
    pub resolved: Vec<String>,
    /// Why it cannot serve this draft as it was trained; nothing where it can.
    pub problems: Vec<String>,
    /// Why it serves no draft of this kind beside this target, whatever the files hold; nothing where it does, or the target
    /// is not known.
    pub unserved: Option<String>,
    /// Whether it loads the files as they are, and does not need them converted.
    pub direct: bool,
}

/// Something to export: the values of a trained draft and what rebuilds it.
#[derive(Debug)]
pub struct Source {
    /// `DraftModel::description` of the checkpoint.
    pub description: Value,
    /// Trained tensors in parameter order.
    pub tensors: Vec<(String, Tensor)>,
    /// The target the draft was trained for, as the configuration names it.
    pub target: PathBuf,
    /// What files call the target instead, such as its name on a hub.
    pub target_name: Option<String>,
    /// Element type to write; the stored one where none is given.
    pub kind: Option<Kind>,
    /// Whether matrices are quantised to 8 bits instead, with a factor for every 32 numbers, which GGUF files alone can hold.
    pub q8_0: bool,
}

/// What a written or checked folder holds.
#[derive(Debug, Clone, Serialize)]
pub struct ExportReport {
    /// The folder.
    pub path: PathBuf,
    /// Name in [`FORMATS`].
    pub format: String,
    /// Number of tensors.
    pub tensors: usize,
    /// Number of parameters.
    pub parameters: u64,
    /// Element type.
    pub dtype: String,
    /// What an engine will make of it, one line each.
    pub resolved: Vec<String>,
    /// The same for each engine, where their rules differ.
    pub engines: Vec<EngineReport>,
    /// What a user should know before serving it.
    pub warnings: Vec<String>,
}

/// One row of the table of formats.
pub struct Format {
    /// Value of `--format`.
    pub name: &'static str,
    /// One line for help texts.
    pub summary: &'static str,
    /// Names of the files it writes.
    pub files: &'static [&'static str],
    /// For a format that is one file and no folder: whether a file is of it.
    pub is_file: Option<fn(&Path) -> bool>,
    /// Whether a folder's config.json is of this format.
    pub recognise: fn(&Value) -> bool,
    /// Writes the files into an empty folder, or the one file.
    pub write: fn(&Source, &Path) -> Result<()>,
    /// Reads the files back and checks names, shapes, types and configuration.
    pub check: fn(&Path, &Value) -> Result<ExportReport>,
    /// Copies the values of a folder into a draft in training; see [`start_from`]. Nothing where that cannot be done.
    pub start_from: Option<StartFrom>,
}

/// Copies the values of a folder into a draft in training, and says what a user should know.
pub type StartFrom = fn(&Path, &Beginning<'_>) -> Result<Vec<String>>;

/// A draft in training that begins with published values, and what it stands on.
pub struct Beginning<'a> {
    /// The draft.
    pub draft: &'a dyn DraftModel,
    /// Its own vocabulary, where it is smaller than the target's.
    pub vocabulary: Option<&'a VocabMap>,
    /// The target's token embedding, `[V, H]`.
    pub embedding: &'a Tensor,
}

/// Copies the values of the draft in a folder into a draft in training. Everything that decides what the values mean must
/// be the same in both: the error of the folder's format names what is not, and the key. Returns what a user should know.
pub fn start_from(path: &Path, beginning: &Beginning<'_>) -> Result<Vec<String>> {
    let (format, _) = recognised(path)?;
    let start = format.start_from.ok_or_else(|| {
        let problem = format!("{} is of the format `{}`, which no draft can start from", path.display(), format.name);
        Error::config(START_KEY, problem)
    })?;
    start(path, beginning)
}

/// The key that names the folder which a draft starts from.
pub const START_KEY: &str = "draft.init_from";

/// The formats that this program is built with; see [`formats`].
pub const FORMATS: &[Format] = &[
    medusa::ORIGINAL,
    medusa::VLLM,
    eagle3::RAW,
    eagle3::SPECULATORS,
    eagle3::GGUF,
    peagle::FORMAT,
    block::ZLAB,
    block::SPECULATORS,
    next_scale::FORMAT,
    masked_diffusion::FORMAT,
];

static TABLE: Table<Format> = Table::new("the format", |row| row.name, FORMATS);

/// Every format that can be written: those of [`FORMATS`], and those that were added.
pub fn formats() -> Vec<&'static Format> {
    TABLE.rows()
}

/// Adds a format of a program around this library, before anything else is done. Refuses a name that is taken.
pub fn add_format(row: &'static Format) -> Result<()> {
    TABLE.add(row)
}

/// The format that a folder's config.json shows.
pub fn format_of(config: &Value) -> Option<&'static Format> {
    formats().into_iter().find(|format| (format.recognise)(config))
}

/// The format of a path, and the config.json of a folder.
fn recognised(path: &Path) -> Result<(&'static Format, Value)> {
    if let Some(format) = file_format_of(path) {
        return Ok((format, Value::Null));
    }
    if path.is_file() {
        let problem = format!("is no draft of a known format; known: {}", TABLE.names());
        return Err(Error::bad_file(path, problem));
    }
    let config = config(path)?;
    Ok((format_of(&config).ok_or_else(|| unknown(path))?, config))
}

/// The format of a draft that is one file; nothing for a folder, or for a file of another kind.
pub fn file_format_of(path: &Path) -> Option<&'static Format> {
    if !path.is_file() {
        return None;
    }
    formats().into_iter().find(|format| format.is_file.is_some_and(|is_file| is_file(path)))
}

/// Writes a folder, or a file, whole or not at all, then checks it, for one engine or for any.
pub fn export(source: &Source, format: &str, out: &Path, engine: Option<Engine>) -> Result<ExportReport> {
    let unknown = || Error::Usage(format!("--format: expected one of {}, got `{format}`", TABLE.names()));
    let format = TABLE.find(format).ok_or_else(unknown)?;
    if format.is_file.is_some() {
        return export_file(source, format, out, engine);
    }
    if source.q8_0 {
        let problem = format!("--dtype q8_0: files of the format {} cannot hold it, GGUF files can", format.name);
        return Err(Error::Usage(problem));
    }
    check_target(format, out)?;
    let staged = StagedDir::new(out)?;
    (format.write)(source, staged.path())?;
    let report = (format.check)(staged.path(), &config(staged.path())?)?;
    servable(&ExportReport { path: out.to_path_buf(), ..report }, engine)?;
    staged.commit()?;
    check_for(out, engine)
}

fn export_file(source: &Source, format: &Format, out: &Path, engine: Option<Engine>) -> Result<ExportReport> {
    let hint = "choose a new file; nothing was changed";
    if out.is_dir() {
        let problem = format!("expected a file to write to, found a folder: the format {} is one file", format.name);
        return Err(Error::bad_file(out, problem).with_hint(format!("name a file, such as draft.{}", format.name)));
    }
    if !out.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(format.name)) {
        let problem = format!("expected a name that ends in .{}: the format {} is one file", format.name, format.name);
        return Err(Error::bad_file(out, problem).with_hint(hint));
    }
    if out.exists() && (format.check)(out, &Value::Null).is_err() {
        return Err(Error::bad_file(out, format!("is a file that is no {} export", format.name)).with_hint(hint));
    }
    files::write_through(out, |temporary| {
        (format.write)(source, temporary)?;
        let report = (format.check)(temporary, &Value::Null).map_err(|error| at(error, out))?;
        servable(&ExportReport { path: out.to_path_buf(), ..report }, engine)
    })?;
    check_for(out, engine)
}

/// An error over a file that will have another name.
fn at(error: Error, path: &Path) -> Error {
    match error {
        Error::BadFile { problem, hint, .. } => Error::BadFile { path: path.to_path_buf(), problem, hint },
        Error::Tensors { mismatch, .. } => Error::Tensors { path: path.to_path_buf(), mismatch },
        other => other,
    }
}

/// The command line's record of how a folder came about.
pub const RECORD_FILE: &str = "specforge.json";

/// Nothing of the user's is replaced but an older export of the same format.
fn check_target(format: &Format, out: &Path) -> Result<()> {
    let refuse =
        |problem: String| Err(Error::bad_file(out, problem).with_hint("choose a new folder; nothing was changed"));
    if !out.exists() {
        return Ok(());
    }
    if !out.is_dir() {
        return refuse("expected a folder to write to, found a file".to_owned());
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(out).map_err(Error::io("read folder", out))? {
        names.push(entry.map_err(Error::io("read folder", out))?.file_name());
    }
    let foreign = names.iter().find(|name| **name != *RECORD_FILE && !format.files.iter().any(|file| **name == **file));
    match foreign {
        Some(name) => refuse(format!("holds files that are no {} export: {}", format.name, name.to_string_lossy())),
        None if names.is_empty() || config(out).is_ok_and(|config| (format.recognise)(&config)) => Ok(()),
        None => refuse(format!("holds files that are no {} export", format.name)),
    }
}

/// Checks a folder against the format its config.json shows, or a file.
pub fn check(path: &Path) -> Result<ExportReport> {
    check_for(path, None)
}

/// The same, and that this engine can serve it. Without one, a folder is refused where no engine can.
pub fn check_for(path: &Path, engine: Option<Engine>) -> Result<ExportReport> {
    let (format, config) = recognised(path)?;
    let report = (format.check)(path, &config)?;
    servable(&report, engine)?;
    Ok(report)
}

fn unknown(path: &Path) -> Error {
    Error::bad_file(path.join("config.json"), format!("is of no known format; known: {}", TABLE.names()))
}

fn servable(report: &ExportReport, engine: Option<Engine>) -> Result<()> {
    let known = &report.engines;
    if let (Some(engine), true) = (engine, known.is_empty()) {
        let problem =
            format!("--engine {}: what engines make of {} files is not known here", engine.name(), report.format);
        return Err(Error::Usage(problem));
    }
    // Who asks for no engine wants the files served as they are.
    let is_asked = |known: &&EngineReport| engine.map_or(known.direct, |one| one == known.engine);
    let asked: Vec<&EngineReport> = known.iter().filter(is_asked).collect();
    // What an engine makes of the target is no fault of the files: it counts for who asks for that engine.
    let of_target = |known: &EngineReport| known.unserved.clone().filter(|_| engine.is_some());
    if asked.is_empty() || asked.iter().any(|known| known.problems.is_empty() && of_target(known).is_none()) {
        return Ok(());
    }
    let mut problem = "cannot be served as it was trained".to_owned();
    for known in asked {
        known
            .problems
            .iter()
            .chain(&of_target(known))
            .for_each(|line| problem += &format!("\n  {}: {line}", known.engine.name()));
    }
    Err(Error::bad_file(&report.path, problem))
}

fn config(path: &Path) -> Result<Value> {
    let path = path.join("config.json");
    let text = std::fs::read(&path).map_err(Error::io("read", &path))?;
    strict::from_json(&text).map_err(|problem| Error::bad_file(&path, format!("not valid JSON: {problem}")))
}
