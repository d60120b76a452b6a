//! `specforge train`

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value;
use tch::Tensor;

use super::devices::{DeviceArgs, Devices};
use super::hub::{self, Reads};
use super::{Output, note, record, signals};
use crate::checkpoint::manifest::MANIFEST_FILE;
use crate::checkpoint::{self, Choice, Manifest, Versions};
use crate::config::RunConfig;
use crate::data::{self, TokenCache};
use crate::device;
use crate::dist::{Meeting, Placement, ProcessGroup};
use crate::draft::{self, DraftContext, DraftModel};
use crate::error::{Error, Result, foreign};
use crate::eval::acceptance::in_training::{self, Held, InTraining};
use crate::export;
use crate::features::store::Share;
use crate::files;
use crate::hub::{Wanted, recorded as name_of};
use crate::models::TargetModel;
use crate::nn::MixedPrecision;
use crate::plan::Plan;
use crate::progress;
use crate::shim;
use crate::stop::{Answer, Stop};
use crate::tracking::page::PAGE_FILE;
use crate::tracking::{self, METRICS_FILE};
use crate::train::{self, Provenance, Split, Trainer, TrainerParts};

mod content;
mod folder;
mod inputs;
mod material;
mod page;
mod report;

use content::Content;
use folder::{Resume, RunFolder};
use inputs::{Source, Target};
pub(super) use inputs::{check_progress, fits_context, fits_vocabulary, load_shared, tokens};
use material::Material;

#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    /// Configuration file.
    #[arg(long)]
    config: PathBuf,
    /// Override one value, as `section.key=value`. May be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print parameters, memory, tokens, steps and disk, and stop. Loads no weights.
    #[arg(long)]
    plan: bool,
    /// Go on from a checkpoint of the output folder: a step, `best`, or the newest. Later checkpoints are set aside.
    #[arg(long, value_name = "STEP", num_args = 0..=1, default_missing_value = "newest")]
    resume: Option<Choice>,
    #[command(flatten)]
    devices: DeviceArgs,
}

pub(super) fn run(args: &TrainArgs, stop: &Stop, output: &Output) -> Result<()> {
    stop.set_answer(Answer::EndNow("stopping: nothing to save yet"));
    let mut config = RunConfig::load(&args.config, &args.set)?;
    config.target.devices = args.devices.list(&config.target.devices);
    let placement = Placement::from_environment()?;
    if args.plan {
        hub::fetch_for(&mut config, Reads { target: Wanted::Description, data: true, start: None }, None)?;
        let devices = || args.devices.named(&config.target.devices, placement.as_ref());
        let config = config.planned(|| Ok(devices()?.home))?;
        let mut plan = Plan::new(&config, placement.as_ref().map_or(1, |placement| placement.world_size))?;
        if !config.target.devices.is_empty() {
            let Devices { home, layers } = devices()?;
            plan.spread(&config, &layers, home)?;
        }
        if placement.is_none_or(|placement| placement.rank == 0) {
            output.result(&plan, || plan.to_string());
        }
        return Ok(());
    }
    if config.train.deterministic {
        device::prepare_determinism();
    }
    let Some(placement) = placement else {
        return train(args, config, None, stop, output);
    };
    if placement.rank > 0 {
        progress::silence(); // rank 0 speaks for all
    }
    let meeting = Meeting::join(placement, config.parallel.timeout(), &|line| note(line))?;
    train(args, config, Some(&meeting), stop, output).map_err(|error| meeting.report(error))
}

/// Trains as one of the ranks that meet, or alone.
fn train(
    args: &TrainArgs,
    mut config: RunConfig,
    meeting: Option<&Meeting>,
    stop: &Stop,
    output: &Output,
) -> Result<()> {
    let placement = meeting.map(Meeting::placement);
    let is_first = placement.is_none_or(|placement| placement.rank == 0);
    let devices = args.devices.choose(&config.target.devices, placement)?;
    let device = devices.home;
    // A run that goes on has its draft.
    let goes_on = args.resume.is_some() || placement.is_some_and(|placement| placement.attempt > 0);
    hub::fetch_for(&mut config, Reads { target: Wanted::Target, data: true, start: Some(goes_on) }, meeting)?;
    let config = &config.on(device)?;
    if config.train.deterministic {
        device::check_determinism(device)?;
        shim::deterministic(true)?;
    }
    let algorithm = draft::algorithm(&config.draft)?;
    let resolved = hub::recorded(config);
    // One rank reads and writes the run's folder; what the others need of it comes from there.
    let folder = match is_first {
        true => Some(RunFolder::open(config, &resolved, algorithm, Resume::wanted(args.resume, placement))?),
        false => None,
    };
    let checkpoint = folder.as_ref().and_then(|folder| folder.checkpoint.as_ref());

    // Data: tokens first, so that mistakes in it show before any weight is loaded.
    config.data.check()?;
    let mut content = Content::new(config, checkpoint);
    let material = Material::open(config, algorithm)?;
    material.name(&mut content)?;
    let train_cache = material.tokens(config, &config.data.train)?;
    let eval_cache = match config.data.eval.is_empty() {
        true => None,
        false => Some(material.tokens(config, &config.data.eval)?),
    };
    let mut data_hashes = BTreeMap::from([("train".to_owned(), train_cache.content_hash().to_owned())]);
    if let Some(cache) = &eval_cache {
        data_hashes.insert("eval".to_owned(), cache.content_hash().to_owned());
    }
    let all = |cache: &TokenCache| (0..cache.len()).collect::<Vec<_>>();
    let (train_documents, eval_documents) = match &eval_cache {
        Some(cache) => (all(&train_cache), all(cache)),
        None => data::split(&train_cache, config.data.eval_fraction),
    };
    // An evaluation that reads a part of them reads the same part whatever their order.
    let eval_documents = data::by_content(eval_cache.as_ref().unwrap_or(&train_cache), eval_documents);
    let vocabulary = material.vocabulary(config, &train_cache, &train_documents)?;
    if let Some(vocabulary) = &vocabulary {
        data_hashes.insert("vocabulary".to_owned(), vocabulary.file.map.hash());
    }
    // Before anything in the output folder is touched.
    content.data(&train_cache, eval_cache.as_ref())?;
    content.vocabulary(vocabulary.as_ref().map(|vocabulary| &vocabulary.file.map))?;
    if is_first {
        content.starting_draft()?;
    }
    if let Some(checkpoint) = checkpoint {
        if !checkpoint.names_inputs() {
            checkpoint.same_data(&data_hashes)?;
        }
        let manifest = &checkpoint.manifest;
        let order = config.train.order(train_documents.iter().map(|&index| train_cache.length(index)).collect())?;
        let Manifest { step, epoch, position, tokens_seen, .. } = *manifest;
        let at = train::Place { step, epoch, batch: position, tokens: tokens_seen };
        train::is_on_the_way(&manifest.configuration, &order, &at)
            .map_err(|problem| Error::bad_file(checkpoint.path.join(MANIFEST_FILE), problem))?;
        train::same_learning_rates(&manifest.configuration, &config.train, &config.optim, &order, manifest.step)?;
        if (algorithm.follows_length)(&config.draft) && manifest.step > 0 {
            train::same_length(&manifest.configuration, &config.train, &config.optim, &order)?;
        }
    }

    // Target and draft.
    let kind = config.target.element_type().kind();
    let local = placement.map_or(Share::WHOLE, |placement| {
        let Placement { local_rank: rank, local_world_size: of, .. } = *placement;
        Share { rank, of }
    });
    note(format!("loading {} on {}", name_of(&config.target.path).display(), device::name(device)));
    let Target { tables, source, model, weights } = material.target(config, &devices, local, &mut content)?;
    let dimensions = &tables.info;
    for cache in [Some(&train_cache), eval_cache.as_ref()].into_iter().flatten() {
        inputs::fits_context(cache, dimensions.max_position_embeddings)?;
    }
    let context = DraftContext {
        target: dimensions.clone(),
        embedding: &tables.embedding,
        head: &tables.head,
        vocabulary: vocabulary.as_ref().map(|vocabulary| &vocabulary.file.map),
        weights: Some(&weights),
        kind,
        device,
        seed: config.train.seed,
        chunk_bytes: config.train.chunk_bytes(device),
    };
    let section = draft::vocabulary::with_size(&config.draft, dimensions.vocab_size)?;
    let draft = (algorithm.build)(&section, &context)?;
    // A resumed run has its values from the checkpoint, and other ranks have theirs from the first.
    if let (true, None, Some(from)) = (is_first, checkpoint, config.draft.get("init_from").and_then(Value::as_str)) {
        let DraftContext { vocabulary, embedding, .. } = context;
        let beginning = export::Beginning { draft: draft.as_ref(), vocabulary, embedding: &embedding.table };
        let notes = export::start_from(Path::new(from), &beginning)?;
        notes.iter().for_each(|line| note(format!("{from}: {line}")));
        note(format!("starting from the draft in {from}"));
    }
    for cache in [Some(&train_cache), eval_cache.as_ref()].into_iter().flatten() {
        draft.check_length(inputs::longest(cache))?;
    }
    if let Some(checkpoint) = checkpoint {
        let shape = |(name, tensor): (&str, &Tensor)| (name.to_owned(), tensor.size());
        let parameters: Vec<_> =
            draft.parameters().iter().map(|parameter| shape((&parameter.name, &parameter.value))).collect();
        let buffers: Vec<_> = draft.buffers().iter().map(|(name, tensor)| shape((name, tensor))).collect();
        checkpoint.same_tensors(&parameters, &buffers)?;
    }
    draft.contract().iter().for_each(|line| note(format!("contract: {line}")));
    if config.train.mixed_precision.is_some()
        && let Some(why) = draft.parameters().first().and_then(|first| MixedPrecision::obstacle(&first.value))
    {
        note(format!("train.mixed_precision is left out: {why}"));
    }
    let held_out = eval_cache.as_ref().unwrap_or(&train_cache);
    let evaluated = data::first_tokens(held_out, &eval_documents, config.eval.max_tokens);
    let states = match &source {
        Source::Stored(stored) => {
            let splits = [(&train_cache, train_documents.as_slice()), (held_out, evaluated)];
            stored.require(&draft.capture(), &splits)?;
            checkpoint::inputs::stored(stored.is_exact(config.target.element_type().name()), &stored.digest(&splits))
        }
        Source::Computed(_) | Source::Remembered(_) => checkpoint::inputs::COMPUTED.to_owned(),
    };
    content.states(states)?;
    if let Source::Remembered(kept) = &source {
        let length = |cache: &TokenCache, documents: &[usize]| {
            documents.iter().map(|&index| cache.length(index) as u64).sum::<u64>()
        };
        let tokens = length(&train_cache, &train_documents) + length(held_out, evaluated);
        let token = draft.capture().len() as u64 * dimensions.hidden_size as u64 * kind.elt_size_in_bytes() as u64;
        let ranks = placement.map_or(1, |placement| placement.world_size) as u64;
        inputs::say_what_is_kept(tokens.div_ceil(ranks) * token, kept.limit());
    }
    let run_inputs = content.inputs();

    let prompts = in_training::prompts(&config.eval, held_out, &eval_documents, dimensions.max_position_embeddings);
    if evaluated.len() < eval_documents.len() {
        let (some, all) = (evaluated.len(), eval_documents.len());
        note(format!("evaluations read {some} of {all} held-out documents; eval.max_tokens says how much"));
    }
    let eval_documents = evaluated.to_vec();
    // Everything that takes its time is done: from here on, ranks wait for each other in collectives.
    let group = match meeting {
        Some(meeting) => {
            meeting.wait_for_all("getting ready")?;
            meeting.group(device, config.parallel.timeout())?
        }
        None => ProcessGroup::single(),
    };
    let stop_tokens = material.stop_tokens();
    let decodes_with = model.as_ref().filter(|_| config.eval.every > 0);
    let last_answers = RefCell::new(Vec::new());
    let decoding = |draft: &dyn DraftModel| {
        let Some(model) = decodes_with else { return Ok(Some(BTreeMap::new())) };
        let target = model.in_use();
        let held = in_training::measure(&with(&*target, config, &prompts, stop_tokens, &group), draft, stop.number())?;
        Ok(held.map(|Held { figures, answers }| {
            last_answers.replace(answers);
            figures
        }))
    };
    if let Some(model) = decodes_with {
        if prompts.is_empty() {
            let problem = "there are no held-out documents with a prompt to decode";
            return Err(Error::config("eval.every", problem)
                .with_hint("set data.eval_fraction or data.eval, or eval.every to 0"));
        }
        // A tree that cannot be used is found before the first step.
        with(&*model.in_use(), config, &prompts, stop_tokens, &group).check(draft.as_ref())?;
    }
    let out = &config.train.output_dir;
    let (writer, checkpoint) = match folder.map(RunFolder::start_log).transpose()? {
        Some((writer, checkpoint)) => (Some(writer), checkpoint),
        None => (None, None),
    };
    let parts = TrainerParts {
        config: &config.train,
        optim: &config.optim,
        parallel: &config.parallel,
        group: &group,
        draft: draft.as_ref(),
        source: source.as_dyn(),
        train: Split { cache: &train_cache, documents: train_documents },
        eval: Split { cache: held_out, documents: eval_documents },
        writer,
        decoding: (config.eval.every, &decoding),
        provenance: Provenance {
            configuration: resolved.clone(),
            versions: Versions::current(),
            data_hashes,
            inputs: run_inputs,
        },
        stop,
    };
    let trainer = Trainer::new(parts, checkpoint.as_ref())?;
    // Nothing can be refused any more.
    if is_first {
        if let Some(made) = vocabulary.as_ref().filter(|vocabulary| vocabulary.made) {
            made.file.write(&out.join(VOCABULARY_FILE))?;
        }
        files::write_json(&out.join("config.json"), &resolved)?;
        record::write(&out.join(record::FILE_NAME), &resolved, group.world_size())?;
    }
    let report = trainer.run()?;
    if let (Some(signal), 0) = (report.stopped_by, report.steps) {
        signals::end_by(signal); // as before the loop: there is nothing to go on from
    }
    if is_first {
        files::write_json(&out.join("report.json"), &report)?;
        let samples = material.samples(&last_answers.borrow(), &prompts)?;
        let run = page::of(&report, &resolved, &Versions::current(), &samples);
        files::write_text(&out.join(PAGE_FILE), &tracking::page::page(&out.join(METRICS_FILE), &run)?)?;
        note(format!("report: {}", foreign::path(&out.join(PAGE_FILE))));
        output.result(&report, || report::text(&report));
    }
    Ok(())
}

/// What held-out prompts are decoded with.
fn with<'a>(
    target: &'a dyn TargetModel,
    config: &'a RunConfig,
    prompts: &'a [Vec<u32>],
    stop_tokens: &'a [u32],
    group: &'a ProcessGroup,
) -> InTraining<'a> {
    InTraining { config: &config.eval, target, prompts, stop_tokens, group }
}

/// The map that a run chose itself, in its output folder.
const VOCABULARY_FILE: &str = "vocab.safetensors";
