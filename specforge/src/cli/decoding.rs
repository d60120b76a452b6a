//! What `generate` and `eval` share: the models, the tree, and how tokens are chosen.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde_json::{Value, json};
use tch::Kind;

use super::devices::{self, DeviceArgs, Devices};
use super::hub::Place;
use super::numbers;
use super::template::TemplateArgs;
use crate::cloud::AbsentTarget;
use crate::config::Dtype;
use crate::data::ChatTokenizer;
use crate::decode::diffusion::{Network, Options};
use crate::decode::drafter::{DraftSampling, Opened, open};
use crate::decode::{EngineOptions, Policy, VerifyBudget};
use crate::dist::Placement;
use crate::error::{Error, Result};
use crate::hub::{self, Wanted};
use crate::models::TargetModel;
use crate::nn::Processors;
use crate::trace::diffusion::DiffusionHeader;
use crate::trace::{Header, ModelName, Settings};

#[derive(Debug, Clone, Args)]
pub(super) struct DecodingArgs {
    /// Model folder, a GGUF file of one, or a name on a hub: ORG/NAME[@REVISION].
    #[arg(long)]
    pub(super) target: PathBuf,
    #[command(flatten)]
    template: TemplateArgs,
    /// Who guesses: an exported draft, a run's output folder or checkpoint, a smaller model with the same tokenizer, a
    /// GGUF file or the name on a hub of either, or `prompt-lookup`. `eval` takes several and puts them side by side.
    #[arg(long, value_name = "DIR")]
    draft: Vec<String>,
    /// Which guesses are tried: chain:N, dynamic:depth=D,top_k=K,nodes=N[,min_probability=P], a shipped Medusa tree by
    /// its name, or a file that `specforge tree` or `specforge tune` wrote; with +lookup[:KEYS] behind it, guesses that stood in the
    /// text before join those of the draft. For prompt-lookup: depth=D,nodes=N[,match=M].
    #[arg(long)]
    tree: Vec<String>,
    /// Most tokens of an answer.
    #[arg(long, default_value_t = 256, allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    pub(super) max_new_tokens: usize,
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0, allow_hyphen_values = true, value_parser = numbers::any)]
    temperature: f64,
    /// Only this many of the likeliest tokens; 0 is all.
    #[arg(long, default_value_t = 0, allow_hyphen_values = true, value_parser = numbers::at_least(0usize))]
    top_k: usize,
    /// Only the likeliest tokens that together have this probability.
    #[arg(long, default_value_t = 1.0, allow_hyphen_values = true, value_parser = numbers::any)]
    top_p: f64,
    /// Above 1 makes tokens that are already there less likely.
    #[arg(long, default_value_t = 1.0, allow_hyphen_values = true, value_parser = numbers::any)]
    repetition_penalty: f64,
    /// Seed of sampling; 0 where it is not given.
    #[arg(long, allow_hyphen_values = true, value_parser = numbers::at_least(0u64))]
    seed: Option<u64>,
    /// How guesses are accepted: keyed (the target's own choice, token for token), maximal (classic rejection, lossless
    /// in distribution), typical[:EPSILON,ALPHA] (Medusa's, lossy).
    #[arg(long, default_value = "keyed")]
    policy: String,
    /// Verify only as many drafted tokens as are worth it, by the sts.json and sps.json of a folder that `specforge eval
    /// --calibrate` or SGLang's own tools wrote. For drafts that say how sure they are.
    #[arg(long, value_name = "DIR")]
    verify_budget: Option<PathBuf>,
    /// Element type of target and draft: float32, bfloat16 or float16. Without it float32 on the CPU, and that of the target's files on
    /// CUDA.
    #[arg(long)]
    dtype: Option<Dtype>,
    #[command(flatten)]
    devices: DeviceArgs,
}

/// Everything loaded.
pub(super) struct Models {
    pub(super) target: Box<dyn TargetModel>,
    pub(super) tokenizer: Arc<ChatTokenizer>,
    dtype: Dtype,
}

/// Loads a target of a folder.
type Load = fn(&Devices, &Path, Kind) -> Result<Box<dyn TargetModel>>;

impl DecodingArgs {
    /// Where names of a hub may stand.
    pub(super) fn places(&mut self) -> Vec<Place<'_>> {
        let drafts = self.draft.iter_mut().map(Place::Drafter);
        std::iter::once(Place::Model(&mut self.target, Wanted::Target)).chain(drafts).collect()
    }

    /// The same for each of several drafts alone. One tree is that of all of them, several are theirs in order.
    pub(super) fn each(&self) -> Result<Vec<Self>> {
        let (drafts, trees) = (self.draft.len(), self.tree.len());
        if drafts < 2 {
            return Ok(vec![self.clone()]);
        }
        if trees > 1 && trees != drafts {
            let problem = format!("--tree: expected one for all of the {drafts} drafts or one for each, got {trees}");
            return Err(Error::Usage(problem));
        }
        let tree = |place: usize| self.tree.get(place).or(self.tree.first()).cloned().into_iter().collect();
        let alone =
            |(place, draft): (usize, &String)| Self { draft: vec![draft.clone()], tree: tree(place), ..self.clone() };
        Ok(self.draft.iter().enumerate().map(alone).collect())
    }

    /// The draft, where there is one.
    pub(super) fn draft_name(&self) -> Result<Option<&str>> {
        only("--draft", &self.draft)
    }

    /// Loads target and tokenizer.
    pub(super) fn models(&self) -> Result<Models> {
        self.models_on(&self.devices.alone()?)
    }

    /// The same for one of several processes.
    pub(super) fn models_of(&self, placement: Option<&Placement>) -> Result<Models> {
        self.models_on(&self.devices.choose(&[], placement)?)
    }

    /// Loads a target of masked diffusion, which is decoded in another way, and its tokenizer.
    pub(super) fn diffusion_models(&self) -> Result<Models> {
        self.refuse_causal_options()?;
        self.models_by(&self.devices.alone()?, Devices::load_diffusion)
    }

    /// Refuses what a target of masked diffusion has not.
    fn refuse_causal_options(&self) -> Result<()> {
        let flags = [
            ("--draft", !self.draft.is_empty()),
            ("--tree", !self.tree.is_empty()),
            ("--top-k", self.top_k != 0),
            ("--top-p", self.top_p != 1.0),
            ("--repetition-penalty", self.repetition_penalty != 1.0),
            ("--policy", self.policy != "keyed"),
            ("--verify-budget", self.verify_budget.is_some()),
        ];
        match flags.into_iter().find(|(_, given)| *given) {
            None => Ok(()),
            Some((flag, _)) => Err(Error::Usage(format!(
                "{flag}: the target is a masked diffusion model, which has --block-length, --steps, --quota, --threshold, \
                 --factor, --cache, --token-skip, --cfg, --remasking, --exact-parallel, --temperature and --seed"
            ))),
        }
    }

    fn models_on(&self, devices: &Devices) -> Result<Models> {
        self.models_by(devices, Devices::load)
    }

    fn models_by(&self, devices: &Devices, load: Load) -> Result<Models> {
        self.check()?;
        let tokenizer = Arc::new(self.template.tokenizer(&self.target)?);
        let dtype = Dtype::of_target(self.dtype, &self.target, devices.home)?;
        let target = load(devices, &self.target, dtype.kind())?;
        super::train::fits_vocabulary(&tokenizer, target.info().vocab_size, &self.target)?;
        Ok(Models { target, tokenizer, dtype })
    }

    /// Loads what a draft needs of a target that runs elsewhere.
    pub(super) fn models_elsewhere(&self) -> Result<Models> {
        self.check()?;
        if self.verify_budget.is_some() {
            return Err(Error::Usage(
                "--verify-budget: it goes by this machine's target; with --cloud there is none".to_owned(),
            ));
        }
        let home = self.devices.alone()?.home;
        let tokenizer = Arc::new(self.template.tokenizer(&self.target)?);
        let dtype = Dtype::of_target(self.dtype, &self.target, home)?;
        let target = AbsentTarget::read(&self.target, self.draft_name()?, (dtype.kind(), home))?;
        super::train::fits_vocabulary(&tokenizer, target.info().vocab_size, &self.target)?;
        Ok(Models { target: Box::new(target), tokenizer, dtype })
    }

    /// Opens the draft.
    pub(super) fn draft<'a>(&self, models: &'a Models) -> Result<Opened<'a>> {
        self.draft_that(models, DraftSampling::for_policy(self.policy()?, self.processors()?.temperature))
    }

    /// Opens the draft for requests of which each has a temperature of its own.
    pub(super) fn draft_for_any_request<'a>(&self, models: &'a Models) -> Result<Opened<'a>> {
        self.draft_that(models, DraftSampling::for_any_request(self.policy()?, self.processors()?.temperature))
    }

    /// Nothing that guesses.
    pub(super) fn no_draft<'a>(&self, models: &'a Models) -> Result<Opened<'a>> {
        let sampling = DraftSampling::for_policy(self.policy()?, self.processors()?.temperature);
        open(None, None, (models.target.as_ref(), &self.target), sampling)
    }

    /// Refuses what is wrong whatever the models are.
    fn check(&self) -> Result<()> {
        self.processors()?;
        self.policy()?;
        self.draft_name()?;
        only("--tree", &self.tree).map(drop)
    }

    fn draft_that<'a>(&self, models: &'a Models, sampling: DraftSampling) -> Result<Opened<'a>> {
        open(self.draft_name()?, only("--tree", &self.tree)?, (models.target.as_ref(), &self.target), sampling)
    }

    pub(super) fn processors(&self) -> Result<Processors> {
        let processors = Processors {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            repetition_penalty: self.repetition_penalty,
        };
        processors.check().map_err(|problem| Error::Usage(format!("--{}", problem.replacen('_', "-", 1))))?;
        Ok(processors)
    }

    pub(super) fn policy(&self) -> Result<Policy> {
        let seed = self.seed.unwrap_or(0);
        let refuse = || {
            let got = &self.policy;
            Err(Error::Usage(format!(
                "--policy: expected keyed, maximal, typical, typical:EPSILON,ALPHA, rank:K or entropy:NATS, got `{got}`"
            )))
        };
        match self.policy.as_str() {
            "keyed" => Ok(Policy::Keyed { seed }),
            "maximal" => Ok(Policy::Maximal { seed }),
            // The defaults of the reference's call sites.
            "typical" => Ok(Policy::Typical { epsilon: 0.09, alpha: 0.3 }),
            other => match other.split_once(':') {
                Some(("typical", numbers)) => match numbers.split_once(',').map(|(e, a)| (e.parse(), a.parse())) {
                    Some((Ok(epsilon), Ok(alpha))) if (0.0..=1.0).contains(&epsilon) && alpha >= 0.0 => {
                        Ok(Policy::Typical { epsilon, alpha })
                    }
                    _ => refuse(),
                },
                Some(("rank", k)) => match k.parse() {
                    Ok(k) if k > 0 => Ok(Policy::Rank { k, seed }),
                    _ => refuse(),
                },
                Some(("entropy", most)) => match most.parse() {
                    Ok(most) if most >= 0.0 => Ok(Policy::Entropy { most, seed }),
                    _ => refuse(),
                },
                _ => refuse(),
            },
        }
    }

    /// The part of the settings that says what runs, and where.
    pub(super) fn place(&self, models: &Models) -> Value {
        json!({
            "target": hub::recorded(&self.target),
            "seed": self.seed.unwrap_or_default(),
            "dtype": models.dtype,
            "device": devices::of_target(models.target.as_ref()),
            "threads": tch::get_num_threads(),
        })
    }

    /// The seed of sampling that was given.
    pub(super) fn seed(&self) -> Option<u64> {
        self.seed
    }

    /// How many drafted tokens are verified, where that was asked for.
    pub(super) fn budget(&self) -> Result<Option<VerifyBudget>> {
        self.verify_budget.as_deref().map(VerifyBudget::read).transpose()
    }

    /// How the engine decodes.
    pub(super) fn engine(&self, models: &Models, max_rows: usize) -> Result<EngineOptions> {
        Ok(EngineOptions {
            processors: self.processors()?,
            policy: self.policy()?,
            stop_tokens: models.tokenizer.eos_token_ids().to_vec(),
            max_rows,
        })
    }

    /// Head of a trace of this decode.
    pub(super) fn header(&self, models: &Models, opened: &Opened<'_>, max_rows: usize) -> Result<Header> {
        let EngineOptions { processors, policy, stop_tokens, max_rows } = self.engine(models, max_rows)?;
        let folder = opened.folder.as_deref();
        Ok(Header {
            target: ModelName::target(&self.target)?,
            draft: folder.map(ModelName::draft).transpose()?,
            dtype: models.dtype.name().to_owned(),
            device: devices::of_target(models.target.as_ref()),
            vocabulary: models.target.info().vocab_size as usize,
            settings: Settings {
                drafter: opened.method.clone(),
                tree: opened.tree.clone(),
                processors,
                policy,
                stop_tokens,
                max_new_tokens: self.max_new_tokens,
                max_rows,
            },
        })
    }

    /// Head of a trace of a decode with a masked diffusion model.
    pub(super) fn diffusion_header(
        &self,
        models: &Models,
        (network, options): (&Network<'_>, &Options),
        seed: u64,
    ) -> Result<DiffusionHeader> {
        Ok(DiffusionHeader {
            target: ModelName::target(&self.target)?,
            dtype: models.dtype.name().to_owned(),
            device: devices::of_target(models.target.as_ref()),
            vocabulary: models.target.info().vocab_size,
            mask: network.diffusion().mask,
            shift: usize::try_from(network.shift()).unwrap_or(0),
            seed,
            options: options.clone(),
        })
    }

    /// What decides the output, as it was parsed.
    pub(super) fn settings(&self, models: &Models, opened: &Opened<'_>, max_rows: usize) -> Result<Value> {
        let mut settings = json!({
            "target": hub::recorded(&self.target),
            "draft": hub::recorded(Path::new(self.draft_name()?.unwrap_or("none"))),
            "method": opened.method,
            "tree": opened.tree,
            "policy": self.policy()?.to_string(),
            "processors": self.processors()?,
            "seed": self.seed.unwrap_or(0),
            "max_new_tokens": self.max_new_tokens,
            "rows": max_rows,
            "dtype": models.dtype,
            "device": devices::of_target(models.target.as_ref()),
            "threads": tch::get_num_threads(),
        });
        if let Some(folder) = &self.verify_budget {
            settings["verify_budget"] = json!(folder);
        }
        Ok(settings)
    }
}

/// The only one of what a flag was given.
fn only<'a>(flag: &str, given: &'a [String]) -> Result<Option<&'a str>> {
    match given {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        several => {
            let count = several.len();
            Err(Error::Usage(format!(
                "{flag}: expected one, got {count}; `specforge eval` takes several drafts side by side"
            )))
        }
    }
}
