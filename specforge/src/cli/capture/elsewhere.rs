//! `specforge capture --import` and `--from`: states that somebody else computed.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::super::{note, numbers};
use crate::config::RunConfig;
use crate::data::recorded::vocabulary_hash;
use crate::data::{ChatTokenizer, DataConfig, PackedBatch};
use crate::dist::SharedWork;
use crate::error::{Error, Result, foreign};
use crate::features::imported::ForeignFiles;
use crate::features::served::{Asking, Engine, ServerAddress};
use crate::features::store::{Capture, CaptureReport, Going};
use crate::features::{FeatureSource, ImportedFeatures, Pending, Recognition, ServedFeatures};
use crate::files;
use crate::progress::Progress;

/// Documents pass one by one: each is asked for, found and judged alone.
const ONE_DOCUMENT: usize = 1;

#[derive(Debug, Args)]
pub(super) struct ElsewhereArgs {
    /// Ask a serving engine for the states instead of running the target: vllm:URL or sglang:URL, such as
    /// vllm:http://127.0.0.1:8000. May be given several times. docs/capture.md says how to start one; of the target's folder
    /// only head, last norm and embedding are loaded.
    #[arg(long, value_name = "ENGINE:URL", conflicts_with = "stream_layers")]
    from: Vec<ServerAddress>,
    /// Documents that are on their way to one server at once.
    #[arg(long, default_value_t = 8, requires = "from", allow_hyphen_values = true,
          value_parser = numbers::at_least(1usize))]
    in_flight: usize,
    /// How often a document is asked for before the capture ends; between two attempts it waits, longer each time, up to half
    /// a minute.
    #[arg(long, default_value_t = 10, requires = "from", allow_hyphen_values = true,
          value_parser = numbers::at_least(1u32))]
    attempts: u32,
    /// Seconds that one answer may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, requires = "from", allow_hyphen_values = true,
          value_parser = numbers::at_least(1u64))]
    answer_timeout: u64,
    /// Where this machine sees the folder that vLLM writes states to (shared_storage_path), if it has another path here.
    #[arg(long, value_name = "DIR", requires = "from")]
    states_folder: Option<PathBuf>,
    /// Take the states from what other trainers wrote: SpecForge's *.ckpt, speculators' hs_*.safetensors and data_*.pt, and
    /// its data set of marks. Files, or folders of them. Nothing of a file is run.
    #[arg(long, value_name = "PATH", num_args = 1.., conflicts_with_all = ["from", "stream_layers"])]
    import: Vec<PathBuf>,
    /// With --import: write the documents of these files, tokens and marks, to this JSONL file, and capture those instead of
    /// data.train. The file is what a run then names as data.train.
    #[arg(long, value_name = "FILE", requires = "import")]
    documents: Option<PathBuf>,
}

impl ElsewhereArgs {
    /// Who computed the states, for the manifest.
    pub(super) fn origin(&self) -> Result<Option<String>> {
        if !self.import.is_empty() {
            return Ok(Some("files".to_owned()));
        }
        let Some(first) = self.from.first() else { return Ok(None) };
        match self.from.iter().find(|server| server.engine != first.engine) {
            None => Ok(Some(first.engine.name().to_owned())),
            Some(other) => Err(Error::Usage(format!(
                "--from: one engine computes a store, whose last bits are its own: {first} and {other} are two"
            ))),
        }
    }

    /// The files to import, opened.
    pub(super) fn files(&self) -> Result<Option<ForeignFiles>> {
        if self.import.is_empty() {
            return Ok(None);
        }
        let progress = OnceLock::new();
        let files = ForeignFiles::open(&self.import, &|done, total| {
            progress.get_or_init(|| Progress::new("open", total, "files")).set(done, "");
        })?;
        let (documents, others) = (files.documents().len(), files.passed_over());
        note(format!("import     {documents} files with states, {others} others passed over"));
        Ok(Some(files))
    }

    /// Writes the documents of the files, if that was asked for, and makes them the data.
    pub(super) fn write_documents(
        &self,
        files: &ForeignFiles,
        tokenizer: &ChatTokenizer,
        data: &mut DataConfig,
        work: &SharedWork<'_>,
    ) -> Result<()> {
        let Some(path) = &self.documents else { return Ok(()) };
        work.from_first("the documents", || {
            let text = documents_text(files, tokenizer)?;
            match std::fs::read(path) {
                Ok(there) if there == text => {}
                Ok(_) => {
                    return Err(Error::bad_file(path, "is there and holds something else")
                        .with_hint("name a new file; nothing was changed"));
                }
                Err(_) => files::write_file(path, |out| out.write_all(&text))?,
            }
            Ok(Vec::new())
        })?;
        data.train = vec![path.clone()];
        data.eval.clear();
        Ok(())
    }

    /// Captures what is missing. Gives the report, on the first process, and how many rows the head knew.
    pub(super) fn run(
        &self,
        files: Option<ForeignFiles>,
        capture: &Capture<'_>,
        config: &RunConfig,
        going: &Going<'_>,
        begin: &dyn Fn(),
    ) -> Result<(Option<CaptureReport>, usize)> {
        let kind = config.target.element_type().kind();
        let recognition = Recognition::open(&config.target.path, kind, capture.layers())?;
        let head = recognition.head().share();
        let captured = |source: &dyn FeatureSource| {
            begin();
            capture.run(source, &head, ONE_DOCUMENT, going)
        };
        if capture.missing().next().is_none() {
            return Ok((captured(&NobodyIsAsked)?, 0));
        }
        let (report, rows) = match files {
            Some(files) => {
                let source = ImportedFeatures::new(files, config.data.max_length, recognition)?;
                self.refuse_absent(&source, capture)?;
                (captured(&source)?, source.rows_judged())
            }
            None => {
                let source = ServedFeatures::open(&self.from, &self.asking(), key, recognition)?;
                (captured(&source)?, source.rows_judged())
            }
        };
        if rows == 0 {
            note("warning: there were too few rows to ask the target's head whether these are its states");
        }
        Ok((report, rows))
    }

    fn asking(&self) -> Asking {
        Asking {
            in_flight: self.in_flight,
            attempts: self.attempts,
            timeout: Duration::from_secs(self.answer_timeout),
            states_folder: self.states_folder.clone(),
            ..Asking::default()
        }
    }

    /// Refuses, before anything is written, files that lack documents of the run.
    fn refuse_absent(&self, source: &ImportedFeatures, capture: &Capture<'_>) -> Result<()> {
        let (mut absent, mut total) = (Vec::new(), 0);
        for (name, tokens) in capture.missing() {
            total += 1;
            let ids: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
            if source.find(&ids).is_none() {
                absent.push(name);
            }
        }
        let Some(first) = absent.first() else { return Ok(()) };
        let path = self.import.first().map_or(Path::new(""), PathBuf::as_path);
        let problem = format!(
            "lacks {} of the {total} documents of data.train and data.eval, among them `{}`: no file has these very tokens",
            absent.len(),
            foreign::name(first)
        );
        Err(Error::bad_file(path, problem).with_hint(
            "--documents FILE.jsonl captures the documents that the files hold, and writes what data.train then names; or use \
             the conversations, template and data.max_length that the files were made with",
        ))
    }
}

/// The key of an engine's servers.
fn key(engine: Engine) -> Option<String> {
    std::env::var(engine.key_variable()).ok().filter(|key| !key.is_empty())
}

/// A line for each document: its name, tokens and marks.
fn documents_text(files: &ForeignFiles, tokenizer: &ChatTokenizer) -> Result<Vec<u8>> {
    let hash = vocabulary_hash(tokenizer);
    let mut text = Vec::new();
    for document in files.documents() {
        let Some(supervised) = &document.supervised else {
            return Err(Error::bad_file(&document.path, "does not say which tokens are trained").with_hint(
                "name the folder of its data set (*.arrow) in --import, too; or leave out --documents, and name the \
                     conversations in data.train",
            ));
        };
        let marks: Vec<u8> = supervised[..document.length].iter().map(|&mark| u8::from(mark)).collect();
        let line = json!({
            "id": short_name(&document.path),
            "input_ids": document.tokens[..document.length],
            "loss_mask": marks,
            "vocabulary_hash": hash,
        });
        writeln!(text, "{line}").map_err(|error| Error::Failed(error.to_string()))?;
    }
    Ok(text)
}

/// Folder and name of a file.
fn short_name(path: &Path) -> String {
    let names: Vec<_> = path.components().rev().take(2).map(|part| part.as_os_str().to_string_lossy()).collect();
    names.into_iter().rev().collect::<Vec<_>>().join("/")
}

/// The source of a capture that lacks nothing.
struct NobodyIsAsked;

impl FeatureSource for NobodyIsAsked {
    fn begin(&self, _: Arc<PackedBatch>, _: &[usize]) -> Pending<'_> {
        Pending::later(|| Err(Error::Failed("states of a document were asked for that is there already".to_owned())))
    }
}
