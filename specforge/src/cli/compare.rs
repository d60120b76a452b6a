//! `specforge compare`

use std::path::{Path, PathBuf};

use clap::Args;
use tch::Kind;

use super::devices::DeviceArgs;
use super::hub::{self, Place};
use super::{Output, note};
use crate::data::ChatTokenizer;
use crate::decode::diffusion::Network;
use crate::decode::drafter::{self, DraftSampling};
use crate::error::{Error, Result};
use crate::hub::Wanted;
use crate::models::var::load_var;
use crate::models::vqvae;
use crate::trace::compare::Verdict;
use crate::trace::diffusion::{DiffusionJudge, DiffusionTrace};
use crate::trace::judge::NewDrafter;
use crate::trace::scales::{self, ScaleJudge, ScaleTrace};
use crate::trace::{self, Judge, ModelName, Trace};

/// Says where two recorded decodes differ, and which of them is wrong.
///
/// Traces come from `--trace FILE` of generate, eval and images generate. Exit code 0: equal, or different only at near ties; 1: they
/// differ, or one is wrong; 2: a trace that cannot be read.
#[derive(Debug, Clone, Args)]
pub(super) struct CompareArgs {
    /// First trace.
    #[arg(value_name = "A.trace")]
    a: PathBuf,
    /// Second trace.
    #[arg(value_name = "B.trace")]
    b: PathBuf,
    /// Model folder, GGUF file or name on a hub of the target of both: it says who is wrong, by passes without a cache.
    #[arg(long, value_name = "DIR")]
    target: Option<PathBuf>,
    /// For traces of images, the target's image tokenizer. Without it the folder `vae` in the target's.
    #[arg(long, value_name = "DIR", requires = "target")]
    vae: Option<PathBuf>,
    #[command(flatten)]
    devices: DeviceArgs,
}

pub(super) fn run(args: &CompareArgs, output: &Output) -> Result<()> {
    let (kind, other) = (TraceOf::read(&args.a), TraceOf::read(&args.b));
    if kind != other {
        let (kind, other, first) = (kind.words(), other.words(), args.a.display());
        return Err(Error::bad_file(&args.b, format!("is a trace of {other}, and {first} one of {kind}")));
    }
    if kind == TraceOf::Images {
        return images(args, output);
    }
    if args.vae.is_some() {
        return Err(Error::Usage("--vae: these are no traces of images".to_owned()));
    }
    match kind {
        TraceOf::Diffusion => diffusion(args, output),
        _ => texts(args, output),
    }
}

/// What a trace is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TraceOf {
    Text,
    Images,
    Diffusion,
}

impl TraceOf {
    /// By a file's first line; a file that is no trace is refused where it is read whole.
    fn read(path: &Path) -> Self {
        match path {
            path if ScaleTrace::is_one(path) => Self::Images,
            path if DiffusionTrace::is_one(path) => Self::Diffusion,
            _ => Self::Text,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Text => "texts",
            Self::Images => "images",
            Self::Diffusion => "a masked diffusion model",
        }
    }
}

/// Compares traces of a causal model.
fn texts(args: &CompareArgs, output: &Output) -> Result<()> {
    let args = &mut args.clone();
    hub::fetch(args.target.iter_mut().map(|target| Place::Model(target, Wanted::Target)).collect(), None)?;
    let args = &*args;
    let (a, b) = (Trace::read(&args.a)?, Trace::read(&args.b)?);
    let target = match &args.target {
        None => None,
        Some(folder) => {
            same_target(folder, [(&a.path, &a.header.target), (&b.path, &b.header.target)])?;
            Some(args.devices.alone()?.load(folder, kind_of(&a.header.dtype))?)
        }
    };
    let folder = args.target.as_ref().unwrap_or(&a.header.target.path);
    let draft = draft_of(&a);
    let new = || {
        let settings = &a.header.settings;
        let sampling = DraftSampling::for_policy(settings.policy, settings.processors.temperature);
        let target = target.as_deref().ok_or_else(|| Error::Failed("there is no target to draft for".to_owned()))?;
        Ok(drafter::open(draft.as_deref(), Some(&settings.tree), (target, folder), sampling)?.drafter)
    };
    let new: NewDrafter<'_> = &new;
    let judge = target.as_deref().map(|target| Judge { target, drafter: draft.is_some().then_some(new) });
    let comparison = trace::compare(&a, &b, judge.as_ref())?;
    let tokenizer = ChatTokenizer::load(folder, None).ok();
    if tokenizer.is_none() && !output.json {
        note(format!("{}: no tokenizer there; tokens are shown as numbers", folder.display()));
    }
    let word = |token| tokenizer.as_ref().and_then(|tokenizer| tokenizer.decode(&[token], false).ok());
    output.result(&comparison, || trace::text::text(&comparison, &word));
    sound(comparison.verdict)
}

/// Refuses a folder that is not the target of traces.
fn same_target(folder: &Path, traces: [(&PathBuf, &ModelName); 2]) -> Result<()> {
    let identity = ModelName::target(folder)?.identity;
    match traces.into_iter().find(|(_, target)| target.identity != identity) {
        None => Ok(()),
        Some((trace, target)) => {
            let (trace, other) = (trace.display(), target.path.display());
            Err(Error::bad_file(folder, format!("is not the target of {trace}: {other}")))
        }
    }
}

/// The element type of a name in files.
fn kind_of(dtype: &str) -> Kind {
    match dtype {
        "bfloat16" => Kind::BFloat16,
        "float16" => Kind::Half,
        "float64" => Kind::Double,
        _ => Kind::Float,
    }
}

/// Compares traces of a masked diffusion model.
fn diffusion(args: &CompareArgs, output: &Output) -> Result<()> {
    let args = &mut args.clone();
    hub::fetch(args.target.iter_mut().map(|target| Place::Model(target, Wanted::Target)).collect(), None)?;
    let (a, b) = (DiffusionTrace::read(&args.a)?, DiffusionTrace::read(&args.b)?);
    let target = match &args.target {
        None => None,
        Some(folder) => {
            same_target(folder, [(&a.path, &a.header.target), (&b.path, &b.header.target)])?;
            Some(args.devices.alone()?.load_diffusion(folder, kind_of(&a.header.dtype))?)
        }
    };
    let judge = match &target {
        Some(target) => Some(DiffusionJudge { network: Network::of(target.as_ref())? }),
        None => None,
    };
    let comparison = trace::diffusion::compare(&a, &b, judge.as_ref())?;
    let folder = args.target.as_ref().unwrap_or(&a.header.target.path);
    let tokenizer = ChatTokenizer::load(folder, None).ok();
    let word = |token| tokenizer.as_ref().and_then(|tokenizer| tokenizer.decode(&[token], false).ok());
    output.result(&comparison, || trace::diffusion::text(&comparison, &word));
    sound(comparison.verdict)
}

/// Traces that are not as good as each other are a failure.
fn sound(verdict: Verdict) -> Result<()> {
    match verdict.is_sound() {
        true => Ok(()),
        false => Err(Error::Failed(format!("the traces differ: {}", verdict.words()))),
    }
}

/// Compares traces of images.
fn images(args: &CompareArgs, output: &Output) -> Result<()> {
    let (a, b) = (ScaleTrace::read(&args.a)?, ScaleTrace::read(&args.b)?);
    let models = match &args.target {
        None => None,
        Some(folder) => {
            let vae = super::images::vae_of(args.vae.as_deref(), folder)?;
            type Name = fn(&ScaleTrace) -> &ModelName;
            let names: [(&PathBuf, Name); 2] =
                [(folder, |trace| &trace.header.target), (&vae, |trace| &trace.header.vae)];
            for (path, name) in names {
                let identity = ModelName::draft(path)?.identity;
                if let Some(trace) = [&a, &b].into_iter().find(|trace| name(trace).identity != identity) {
                    let (file, other) = (trace.path.display(), &name(trace).path);
                    return Err(Error::bad_file(path, format!("is not the model of {file}: {}", other.display())));
                }
            }
            let target = load_var(folder, args.devices.alone()?.home)?.model;
            let patches = target.config().patch_nums.clone();
            let tokenizer = vqvae::load(&vae, Some(&patches), target.kind(), target.device())?;
            Some((target, tokenizer))
        }
    };
    let judge = models.as_ref().map(|(target, tokenizer)| ScaleJudge { target, quantizer: tokenizer.quantizer() });
    let comparison = scales::compare(&a, &b, judge.as_ref())?;
    output.result(&comparison, || scales::text(&comparison));
    sound(comparison.verdict)
}

/// What the first trace was drafted with, as `--draft` names it; nothing where it is not there as it was.
fn draft_of(trace: &Trace) -> Option<String> {
    match &trace.header.draft {
        None => (trace.header.settings.drafter == drafter::open::PROMPT_LOOKUP)
            .then(|| drafter::open::PROMPT_LOOKUP.to_owned()),
        Some(recorded) => {
            let now = ModelName::draft(&recorded.path).ok();
            let same = now.is_some_and(|now| now.identity == recorded.identity);
            if !same {
                note(format!(
                    "{}: the draft is not there as it was; who is wrong about guesses stays open",
                    recorded.path.display()
                ));
            }
            same.then(|| recorded.path.to_string_lossy().into_owned())
        }
    }
}
