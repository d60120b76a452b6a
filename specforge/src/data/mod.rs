//! From files of conversations to rows of token ids with a loss mask.
//!
//! `reader` finds the records of a file (`compressed` unpacks it, `parquet` makes lines of rows, `content` holds the bytes),
//! `conversation` gives them meaning (a `sample`), `chat_template` renders them with the tokenizer's own template, `loss_mask`
//! says which tokens are trained, by choice (`mask`, `parts`), `build` does that in parallel and
//! `cache` keeps the result in one memory-mapped file. `marks` are what a record says about being trained, and `recorded`
//! makes documents of answers whose token ids are known. `pack` fills batches, `stats` describes what came out, `counts`
//! says how often each token is trained. `validate` finds every `fault` of a file, and `look` shows all of that on a page.
//! `grey_images` is apart from all of it: pictures for image models, as numbers from 0 to 255.
//!
//! This room ends at token ids and masks: it knows no model, no tensor and no hidden state.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

mod added_tokens;
pub mod build;
pub mod cache;
pub mod chat_template;
mod compressed;
mod content;
pub mod conversation;
pub mod counts;
mod fault;
pub mod grey_images;
pub mod held_out;
mod jinja;
pub mod look;
pub mod loss_mask;
pub mod marks;
mod mask;
pub mod pack;
mod parquet;
mod parts;
pub mod reader;
pub mod recorded;
pub mod report;
mod said;
pub mod sample;
mod spans;
pub mod stats;
pub mod text_stream;
pub mod tokenizer;
mod validate;

pub use cache::{Document, NewDocuments, TokenCache, is_trained, split};
pub use conversation::{Conversation, Message, Rejections, Sample};
pub use counts::{all_supervised_counts, supervised_counts};
pub use fault::{Fault, FaultKind};
pub use grey_images::GreyImages;
pub use held_out::{by_content, first_tokens};
pub use marks::{Finish, Marks};
pub use mask::{Mask, Role};
pub use pack::{DocumentRef, PackedBatch, assemble, pack};
pub use report::BuildReport;
pub use stats::{Statistics, document_for_terminal, document_runs, document_text, mask_runs};
pub use text_stream::TextStream;
pub use tokenizer::{ChatTokenizer, TokenizerParts};
pub use validate::{Finding, Group, Validation, validate};

/// Where training text comes from and how it becomes tokens.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Files to train on: JSONL, JSON or Parquet, plain or compressed with gzip or zstd.
    pub train: Vec<PathBuf>,
    /// Files to evaluate on. Empty: a part of the training files is set aside.
    pub eval: Vec<PathBuf>,
    /// That part, where `eval` is empty. A conversation is chosen by a hash of its content.
    pub eval_fraction: f64,
    /// Longest document, in tokens.
    pub max_length: usize,
    /// Which messages are trained on.
    pub supervise: Supervise,
    /// Whose messages are trained, and which parts of what the assistant says.
    pub mask: Mask,
    /// Largest share of conversations that may be unusable before the run is refused.
    pub max_bad_share: f64,
    /// Folder for tokenised data.
    pub cache_dir: PathBuf,
    /// A Jinja file that replaces the model's own chat template.
    pub chat_template: Option<PathBuf>,
    /// Values the template is given besides the conversation, such as `enable_thinking = false`.
    pub template_arguments: Map<String, Value>,
    /// What happens to documents above `max_length`.
    pub too_long: TooLong,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            train: Vec::new(),
            eval: Vec::new(),
            eval_fraction: 0.05,
            max_length: 2048,
            supervise: Supervise::Assistant,
            mask: Mask::default(),
            max_bad_share: 0.01,
            cache_dir: PathBuf::from(".cache/tokens"),
            chat_template: None,
            template_arguments: Map::new(),
            too_long: TooLong::Truncate,
        }
    }
}

impl DataConfig {
    /// Refuses values that cannot be meant.
    pub fn check(&self) -> Result<()> {
        if !(0.0..1.0).contains(&self.eval_fraction) {
            let problem = format!("expected a share from 0 to below 1, got {}", self.eval_fraction);
            return Err(Error::config("data.eval_fraction", problem));
        }
        if !(0.0..=1.0).contains(&self.max_bad_share) {
            let problem = format!("expected a share from 0 to 1, got {}", self.max_bad_share);
            return Err(Error::config("data.max_bad_share", problem));
        }
        if self.max_length < 2 {
            let problem = format!("expected at least 2 tokens, got {}", self.max_length);
            return Err(Error::config("data.max_length", problem));
        }
        self.mask.check()?;
        if self.supervise == Supervise::All && !self.mask.is_default() {
            let problem = format!("chooses {}, but data.supervise = all trains every token", self.mask.words());
            return Err(Error::config("data.mask", problem).with_hint("leave one of them out"));
        }
        Ok(())
    }

    /// The tokenizer of a model folder, with this configuration's template and template arguments.
    pub fn tokenizer(&self, model_dir: &Path) -> Result<ChatTokenizer> {
        let tokenizer = ChatTokenizer::load(model_dir, self.chat_template.as_deref())?;
        Ok(tokenizer.with_template_arguments(self.template_arguments.clone()))
    }
}

/// Which tokens of a conversation are trained on.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Supervise {
    /// What the assistant says, with its end of turn. An assistant message that no other speaker precedes is context.
    /// Of other roles that the mask names, what they say.
    Assistant,
    /// The last message of those.
    LastTurn,
    /// Every token.
    All,
}

/// What happens to documents above the longest length.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum TooLong {
    /// Keep the head.
    Truncate,
    /// Leave them out.
    Drop,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_is_strict_and_checked() {
        let config: DataConfig = serde_json::from_str(r#"{"train": ["a.jsonl"], "supervise": "last_turn"}"#).unwrap();
        assert_eq!((config.supervise, config.max_length), (Supervise::LastTurn, 2048));
        config.check().unwrap();
        assert!(serde_json::from_str::<DataConfig>(r#"{"trian": []}"#).is_err());
        for bad in [r#"{"eval_fraction": 1.0}"#, r#"{"max_bad_share": -0.1}"#, r#"{"max_length": 1}"#] {
            let config: DataConfig = serde_json::from_str(bad).unwrap();
            assert!(config.check().unwrap_err().to_string().contains("data."), "{bad}");
        }
    }
}
