//! What a training run is made of: tokens, the draft's vocabulary, the target.

use std::path::{Path, PathBuf};

use tch::Device;

use super::super::devices::Devices;
use super::super::{LazyProgress, note};
use crate::config::RunConfig;
use crate::data::{BuildReport, ChatTokenizer, TokenCache};
use crate::draft;
use crate::draft::vocabulary::{Corpus, Vocabulary, VocabularyKeys};
use crate::error::{Error, Result};
use crate::features::store::Share;
use crate::features::{FeatureSource, OnlineFeatures, RememberedFeatures, StoredFeatures};
use crate::files::Digests;
use crate::memory;
use crate::models::{self, Loading, SharedTarget, TargetIdentity, TargetTables};
use crate::plan;
use crate::weights::{SharedCopies, WeightsFolder};

/// The draft's own vocabulary, where the configuration asks for one.
pub(super) fn vocabulary(
    config: &RunConfig,
    tokenizer: &ChatTokenizer,
    cache: &TokenCache,
    documents: &[usize],
) -> Result<Option<Vocabulary>> {
    if VocabularyKeys::read(&config.draft)? == VocabularyKeys::default() {
        return Ok(None);
    }
    // Tables of this size are made: it must be the weights' own.
    models::check(&config.target.path)?;
    let target_size = plan::target_info(config)?.vocab_size;
    fits_vocabulary(tokenizer, target_size, &config.target.path)?;
    let corpus = Corpus { cache, documents, tokenizer, target_size };
    let vocabulary = draft::vocabulary::prepare(&config.draft, &corpus)?;
    if let Some(Vocabulary { file, coverage, warnings, .. }) = &vocabulary {
        warnings.iter().for_each(|warning| note(format!("warning: {warning}")));
        let (draft, share) = (file.map.draft_size(), 100.0 * coverage);
        note(format!("draft vocabulary: {draft} of {target_size} tokens, {share:.2} % of the supervised ones"));
    }
    Ok(vocabulary)
}

/// Refuses a tokenizer with more tokens than the model.
pub(in crate::cli) fn fits_vocabulary(tokenizer: &ChatTokenizer, target_size: i64, model: &Path) -> Result<()> {
    match tokenizer.vocab_size() as i64 {
        known if known > target_size => {
            Err(Error::bad_file(model, format!("the tokenizer has {known} tokens, the model {target_size}")))
        }
        _ => Ok(()),
    }
}

/// Where hidden states come from.
pub(super) enum Source {
    Computed(Box<dyn FeatureSource>),
    Remembered(RememberedFeatures<Box<dyn FeatureSource>>),
    Stored(Box<StoredFeatures>),
}

impl Source {
    /// States that are computed here, kept where the configuration says so.
    pub(super) fn computed(
        source: Box<dyn FeatureSource>,
        config: &RunConfig,
        home: Device,
        ranks_here: usize,
    ) -> Self {
        match config.target.keep_hidden_states {
            true => Source::Remembered(RememberedFeatures::new(source, home, kept_bytes(config, ranks_here))),
            false => Source::Computed(source),
        }
    }

    pub(super) fn as_dyn(&self) -> &dyn FeatureSource {
        match self {
            Source::Computed(source) => source.as_ref(),
            Source::Remembered(source) => source,
            Source::Stored(source) => source.as_ref(),
        }
    }
}

/// What a run has of its target.
pub(super) struct Target {
    /// What the draft takes from it.
    pub(super) tables: TargetTables,
    /// Where its hidden states come from.
    pub(super) source: Source,
    /// The target itself, where it was loaded.
    pub(super) model: Option<SharedTarget>,
    /// The files that a draft may begin with tensors of.
    pub(super) weights: WeightsFolder,
}

/// Loads the target that `identity` was read of. With a store, the layers are loaded only to decode with. On the CPU, the
/// processes of this machine share the weights, and
/// each of them checks its share of a store.
pub(super) fn target(
    config: &RunConfig,
    devices: &Devices,
    local: Share,
    tokenizer: &ChatTokenizer,
    identity: &TargetIdentity,
) -> Result<Target> {
    let (path, kind) = (&config.target.path, config.target.element_type().kind());
    let progress = LazyProgress::new("convert the target", "MiB");
    let copies = SharedCopies {
        folder: &config.data.cache_dir,
        progress: &|done, total| converted(&progress, done, total),
        note: &|line| note(line),
    };
    let loading = Loading { copies: (local.of > 1).then_some(copies), ..devices.loading(kind) };
    if let Some(folder) = &config.target.feature_store {
        let decodes = config.eval.every > 0;
        if !decodes && !devices.layers.is_empty() {
            note("warning: target.devices is of no use here: the store stands for the target's layers");
        }
        let model: Option<SharedTarget> =
            if decodes { Some(models::load_target_with(path, &loading)?.into()) } else { None };
        let tables = match &model {
            Some(model) => TargetTables::of(&*model.in_use()),
            None => models::load_tables_with(path, &loading)?,
        };
        let digests = Digests::in_cache(&config.data.cache_dir);
        let progress = check_progress("check the store");
        let stored =
            StoredFeatures::open(folder, identity, &tables, tokenizer.fingerprint(), &digests, local, &progress)?;
        let weights = models::open_weights(path)?;
        return Ok(Target { tables, source: Source::Stored(Box::new(stored)), model, weights });
    }
    let model = SharedTarget::from(models::load_target_with(path, &loading)?);
    let tables = TargetTables::of(&*model.in_use());
    let online = Box::new(OnlineFeatures::new(model.clone()));
    let source = Source::computed(online, config, devices.home, local.of);
    Ok(Target { tables, source, model: Some(model), weights: models::open_weights(path)? })
}

/// Loads the target that a configuration names; on the CPU, the `local_world_size` processes of this machine share the
/// weights.
pub(in crate::cli) fn load_shared(
    config: &RunConfig,
    devices: &Devices,
    local_world_size: usize,
) -> Result<Box<dyn models::TargetModel>> {
    let progress = LazyProgress::new("convert the target", "MiB");
    let copies = SharedCopies {
        folder: &config.data.cache_dir,
        progress: &|done, total| converted(&progress, done, total),
        note: &|line| note(line),
    };
    let (kind, copies) = (config.target.element_type().kind(), (local_world_size > 1).then_some(copies));
    models::load_target_with(&config.target.path, &Loading { copies, ..devices.loading(kind) })
}

/// Says how many bytes of a target are converted.
fn converted(progress: &LazyProgress, done: u64, total: u64) {
    match done < total {
        true => progress.set(done >> 20, total >> 20),
        false => progress.finish("done"),
    }
}

/// Most bytes of hidden states that this process keeps.
pub(super) fn kept_bytes(config: &RunConfig, local_world_size: usize) -> u64 {
    /// Training needs memory too, and so does whoever else is on the machine.
    const SHARE_OF_FREE: u64 = 2;
    match (config.target.keep_hidden_mib, memory::available()) {
        (Some(mebibytes), _) => mebibytes.saturating_mul(1 << 20),
        (None, Some(free)) => free / SHARE_OF_FREE / local_world_size.max(1) as u64,
        (None, None) => u64::MAX,
    }
}

/// Says that a rank cannot keep all the states it would, once.
pub(super) fn say_what_is_kept(wanted: u64, limit: u64) {
    if wanted > limit {
        let share = 100.0 * limit as f64 / wanted as f64;
        let (wanted, limit) = (wanted >> 20, limit >> 20);
        note(format!(
            "target.keep_hidden_states: all states of a rank take {wanted} MiB, {limit} MiB may be kept: {share:.0} % of the \
             tokens are computed once, the others in every epoch (target.keep_hidden_mib sets the limit)"
        ));
    }
}

/// Says how much of something large is read.
pub(in crate::cli) fn check_progress(label: &'static str) -> impl Fn(u64, u64) + Sync {
    /// Less is read before anybody asks.
    const WORTH_SAYING: u64 = 4 << 30;
    let progress = std::sync::OnceLock::new();
    move |done, total| {
        if total > WORTH_SAYING {
            let unit = "MiB";
            let bar = progress.get_or_init(|| crate::progress::Progress::new(label, total >> 20, unit));
            bar.set(done >> 20, "");
        }
    }
}

/// Opens or builds the token cache of some files and says what was dropped.
pub(in crate::cli) fn tokens(config: &RunConfig, files: &[PathBuf], tokenizer: &ChatTokenizer) -> Result<TokenCache> {
    let progress = LazyProgress::new("tokenise", "conversations");
    let report = |done, total| progress.set(done, total);
    let (cache, report) = TokenCache::build_or_open(files, tokenizer, &config.data, &report)?;
    progress.finish(&data_line(&cache, &report));
    report.note.iter().for_each(|line| note(format!("warning: {line}")));
    report.warnings.iter().for_each(|line| note(format!("warning: {line}")));
    report.rejected.iter().for_each(|line| note(format!("warning: skipped {line}")));
    Ok(cache)
}

/// Tokens of the longest document.
pub(super) fn longest(cache: &TokenCache) -> i64 {
    (0..cache.len()).map(|index| cache.length(index)).max().unwrap_or(0) as i64
}

/// Refuses documents that are longer than what the target was made for.
pub(in crate::cli) fn fits_context(cache: &TokenCache, context: i64) -> Result<()> {
    let longest = longest(cache);
    if longest <= context {
        return Ok(());
    }
    let problem = format!("a document has {longest} tokens, the target reads at most {context}");
    Err(Error::config("data.max_length", problem).with_hint(format!("set data.max_length to {context} or less")))
}

pub(super) fn data_line(cache: &TokenCache, report: &BuildReport) -> String {
    let supervised = 100.0 * cache.supervised_tokens() as f64 / cache.total_tokens().max(1) as f64;
    format!(
        "{} documents, {} tokens, {supervised:.1} % supervised, {} without supervision dropped{}",
        cache.len(),
        cache.total_tokens(),
        report.without_supervision,
        if report.from_cache { " (from the cache)" } else { "" }
    )
}
