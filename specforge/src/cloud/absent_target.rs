//! A target that is elsewhere, as a draft on the edge sees it: what it is, and the two tables on either side of its layers
//! where they are there.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use crate::decode::drafter::open::{PROMPT_LOOKUP, is_model};
use crate::error::{Error, Result};
use crate::models::{ForwardInput, ForwardOutput, TargetInfo, TargetModel, TargetTables, load_tables_alone, read_info};
use crate::nn::{Embedding, Head, KvCache};

/// What is known of a target without running it.
#[derive(Debug)]
pub struct AbsentTarget {
    tables: TargetTables,
    options: (Kind, Device),
}

impl AbsentTarget {
    /// Reads what a draft needs of a target's folder: config.json alone for one that is a model of its own, or that looks
    /// guesses up; embedding and head as well for any other.
    pub fn read(folder: &Path, draft: Option<&str>, (kind, device): (Kind, Device)) -> Result<Self> {
        let reads_tables = draft.is_some_and(|draft| draft != PROMPT_LOOKUP && !is_model(Path::new(draft)));
        let tables = match reads_tables {
            true => load_tables_alone(folder, kind, device)?,
            false => {
                let nothing = || Tensor::zeros([0, 0], (kind, device));
                let (embedding, head) = (Embedding::plain(nothing()), Head::plain(nothing()));
                TargetTables { info: read_info(folder)?, embedding, head }
            }
        };
        Ok(Self { tables, options: (kind, device) })
    }
}

impl TargetModel for AbsentTarget {
    fn info(&self) -> &TargetInfo {
        &self.tables.info
    }

    fn new_cache(&self, rows: i64, capacity: i64) -> KvCache {
        KvCache::new(&[], rows, capacity, self.options)
    }

    fn forward(&self, _input: &ForwardInput<'_>, _cache: Option<&mut KvCache>) -> Result<ForwardOutput> {
        Err(Error::Failed("the target runs in the cloud and cannot be run here".to_owned()))
    }

    fn embedding(&self) -> &Embedding {
        &self.tables.embedding
    }

    fn head(&self) -> &Head {
        &self.tables.head
    }

    fn kind(&self) -> Kind {
        self.options.0
    }

    fn device(&self) -> Device {
        self.options.1
    }
}
