//! A draft that nobody would serve, with everything that is hard to train exactly: rows that chance picks, noise on what it
//! reads, weights that decay in a block, a learning rate of its own for one parameter, and a tensor of the target's that it
//! trains as its own.
//!
//! Of each document, a few rows are *anchors*. From the target's last hidden state `x` of token `t`, an anchor guesses a
//! block of tokens: guess `j` (from 0) is token `t + 2 + j`, from `x + SiLU(W_j x + b_j)` and the projection, which begins
//! as the target's `lm_head.weight`. In training, `x` is `x` plus uniform noise.
//!
//! Shape legend: `T` tokens of a packed batch, `A` anchors, `R` anchors whose guess `j` is trained, `H` hidden size, `V`
//! vocabulary.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use specforge::data::PackedBatch;
use specforge::decode::drafter::{self, Asked, Context, Drafter, DrafterKind, Guesser, Joining, Progress, Trees};
use specforge::decode::policy::Proposal;
use specforge::draft::loss::{self, Hard, Projection, RowLosses, Rows, Scale};
use specforge::draft::supervision::{MaskAlignment, trained_rows};
use specforge::draft::{
    self, Algorithm, DraftContext, DraftModel, DraftSize, Footprint, Gradients, Parameter, RowPlan, Samples, StepKey,
    Tally,
};
use specforge::error::{Error, Result};
use specforge::export::{self, Beginning, ExportReport, Format, START_KEY, Source};
use specforge::features::FeatureBatch;
use specforge::models::TargetInfo;
use specforge::nn::{Head, noise};
use specforge::tree::TokenTree;
use specforge::weights::{self, WeightsFolder};
use specforge::{files, strict};
use tch::{Device, Kind, Tensor};

/// Adds the draft, its drafter and its format.
pub fn register() {
    draft::add_algorithm(&ALGORITHM).unwrap();
    drafter::add_drafter(&DRAFTER).unwrap();
    export::add_format(&FORMAT).unwrap();
}

const NAME: &str = "anchors";

static ALGORITHM: Algorithm = Algorithm {
    name: NAME,
    summary: "sampled anchors that each guess a block (for tests)",
    selection_metric: "simulated_acceptance_length",
    figures: |section| {
        let config = Config::read(section)?;
        let own = ["loss".to_owned(), ALGORITHM.selection_metric.to_owned()];
        Ok(own.into_iter().chain(metric_names(config.block)).collect())
    },
    free_on_resume: &[],
    follows_length: |section| Config::read(section).is_ok_and(|config| config.fading),
    pictures: false,
    resolve: |section| Ok(json!(Config::read(section)?)),
    size: |section, target| {
        let config = Config::read(section)?;
        let (hidden, vocabulary) = (target.hidden_size as u64, target.vocab_size as u64);
        let block = config.block as u64;
        let trainable = block * (hidden * hidden + hidden) + vocabulary * hidden;
        let row_multiply_adds = block * 3 * (hidden * hidden + vocabulary * hidden);
        Ok(DraftSize { trainable, frozen: 0, captured: 1, row_multiply_adds })
    },
    capture: |_, target| Ok(vec![target.num_layers()]),
    footprint: |_, _, _| Ok(Footprint::default()),
    samples: |_| Samples::default(),
    work: |_, _, _, _| Err(Error::Failed("nobody times anchors".to_owned())),
    build: |section, context| Ok(Box::new(Anchors::new(Config::read(section)?, context)?)),
};

/// The `draft` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Config {
    algorithm: String,
    /// Most anchors of a document.
    anchors: usize,
    /// Guesses of an anchor.
    block: usize,
    /// Guess `j` counts `decay^j`.
    decay: f64,
    /// Largest noise on a feature.
    noise: f64,
    /// Whether the noise goes down to nothing over the run.
    fading: bool,
    /// Multiplies the learning rate of the projection.
    projection_rate: f64,
    init_from: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        let algorithm = NAME.to_owned();
        let (anchors, block, decay, noise) = (3, 3, 0.7, 0.1);
        Self { algorithm, anchors, block, decay, noise, fading: false, projection_rate: 0.25, init_from: None }
    }
}

impl Config {
    fn read(section: &Value) -> Result<Self> {
        let config: Self = strict::from_value(section, "draft")?;
        match config.block {
            1..=16 => Ok(config),
            other => Err(Error::config("draft.block", format!("expected 1 to 16, got {other}"))),
        }
    }
}

/// What chance is asked for.
const PICK: u64 = 0;
const NOISE: u64 = 1;

/// Averages kept for every guess of a block.
const METRICS: [&str; 3] = ["loss", "top1", "chain"];

fn metric_names(block: usize) -> Vec<String> {
    (1..=block).flat_map(|guess| METRICS.map(|metric| format!("guess{guess}/{metric}"))).collect()
}

/// Name of the target's tensor that is trained here.
const PROJECTION: &str = "lm_head.weight";

struct Anchors {
    config: Config,
    target: TargetInfo,
    /// Of every guess, weight and bias; the projection is the last.
    parameters: Vec<Parameter>,
    rows_per_chunk: i64,
}

/// The plan of a batch.
struct Plan {
    /// `[A]` rows of the batch.
    anchors: Vec<i64>,
    /// `[A, H]` what is added to their features in training.
    noise: Vec<f64>,
    /// For each guess, the places of its rows among the anchors, and their labels: `[R]` each.
    guesses: Vec<(Vec<i64>, Vec<i64>)>,
}

impl Anchors {
    fn new(config: Config, context: &DraftContext<'_>) -> Result<Self> {
        let TargetInfo { hidden_size, vocab_size, .. } = context.target;
        let mut parameters = Vec::new();
        for guess in 0..config.block {
            let weight = noise::normal(&[hidden_size, hidden_size], 0.05, context.seed, guess as u64);
            let weight = weight.f_to_kind(context.kind)?.f_to_device(context.device)?;
            let bias = Tensor::f_zeros([hidden_size], (context.kind, context.device))?;
            parameters.push(Parameter::new(format!("blocks.{guess}.weight"), weight));
            parameters.push(Parameter::new(format!("blocks.{guess}.bias"), bias));
        }
        let projection = context.target_parameter(PROJECTION, &[vocab_size, hidden_size])?;
        parameters.push(projection.with_rate(config.projection_rate));
        let rows_per_chunk = loss::chunk_rows(context.chunk_bytes, vocab_size);
        Ok(Self { config, target: context.target.clone(), parameters, rows_per_chunk })
    }

    /// Adds a document's share to a plan: its supervised rows, chance, and what of each block is trained.
    fn plan_document(&self, document: &PackedBatch, start: i64, key: StepKey, plan: &mut Plan) {
        let all: Vec<_> =
            (0..self.config.block).map(|guess| trained_rows(document, guess, MaskAlignment::Exact)).collect();
        let picked = key.draws(&document.documents[0], PICK).choose(&all[0].rows, self.config.anchors);
        let first = plan.anchors.len() as i64;
        for (trained, (places, labels)) in all.iter().zip(&mut plan.guesses) {
            let rows: HashSet<i64> = picked.iter().copied().collect();
            let chosen = trained.rows.iter().zip(&trained.labels).filter(|(row, _)| rows.contains(row));
            for (row, label) in chosen {
                places.push(first + picked.iter().position(|anchor| anchor == row).unwrap() as i64);
                labels.push(*label);
            }
        }
        let noise = key.draws(&document.documents[0], NOISE);
        let size = self.config.noise * if self.config.fading { 1.0 - key.progress() } else { 1.0 };
        for &row in &picked {
            let values = (0..self.target.hidden_size).map(|column| noise.uniform(row as u64, column as u64));
            plan.noise.extend(values.map(|value| size * (2.0 * value - 1.0)));
        }
        plan.anchors.extend(picked.iter().map(|row| start + row));
    }

    /// Weight of guess `j` of a block.
    fn weight(&self, guess: usize) -> f64 {
        self.config.decay.powi(guess as i32)
    }

    /// One pass over all blocks; gradients are added, and features are noisy, where there is a buffer.
    fn run(
        &self,
        features: &FeatureBatch,
        plan: &RowPlan,
        global_counts: &[f64],
        mut gradients: Option<&mut Gradients<'_>>,
    ) -> Result<Tally> {
        let Plan { anchors, noise, guesses } = plan.own::<Plan>()?;
        let (kind, device) = (self.parameters[0].value.kind(), features.hidden[0].device());
        let upload = |numbers: &[i64]| Tensor::from_slice(numbers).to_device(device);
        let mut states = features.hidden[0].index_select(0, &upload(anchors)).to_kind(kind); // [A, H]
        if gradients.is_some() {
            let noise = Tensor::from_slice(noise).view([anchors.len() as i64, self.target.hidden_size]);
            states += noise.to_kind(kind).to_device(device);
        }
        let mut objective = Tensor::zeros([], (Kind::Double, device));
        let (mut sums, mut counts): (Vec<Tensor>, Vec<f64>) = (Vec::new(), Vec::new());
        let mut chain = Tensor::ones([anchors.len() as i64], (Kind::Bool, device));
        for (guess, (places, labels)) in guesses.iter().enumerate() {
            let (places, labels) = (upload(places), upload(labels));
            let scale = 1.0 / global_counts[0].max(f64::MIN_POSITIVE);
            let input = states.index_select(0, &places); // [R, H]
            let losses = self.guess(guess, &input, &labels, scale, gradients.as_deref_mut())?;
            objective += &losses.objective * scale;
            let hits = chain.index_select(0, &places).logical_and(&losses.top1);
            chain = chain.zeros_like().index_copy(0, &places, &hits);
            let count = |hits: &Tensor| hits.sum(Kind::Double);
            sums.extend([losses.sum.shallow_clone(), count(&losses.top1), count(&hits)]);
            counts.extend([labels.size()[0] as f64; METRICS.len()]);
        }
        if let Some(gradients) = gradients {
            gradients.complete(self.parameters.len() - 1)?;
        }
        Ok(Tally { objective, sums: Tensor::stack(&sums, 0), counts })
    }

    /// Losses of one guess on `input [R, H]`.
    fn guess(
        &self,
        guess: usize,
        input: &Tensor,
        labels: &Tensor,
        scale: f64,
        gradients: Option<&mut Gradients<'_>>,
    ) -> Result<RowLosses> {
        let (first, last) = (2 * guess, self.parameters.len() - 1);
        let head = Head::plain(self.parameters[last].value.shallow_clone());
        let block = [&self.parameters[first].value, &self.parameters[first + 1].value];
        // A guess counts less the deeper it stands in its block.
        let weights = labels.ones_like().to_kind(Kind::Double) * self.weight(guess); // [R]
        let rows = Rows { input, targets: Hard(labels), weights: Some(&weights) };
        let Some(gradients) = gradients else {
            let _guard = tch::no_grad_guard();
            let mut projection = Projection { head: &head, gradient: None };
            let rows = Rows { input: &behind(input, block), ..rows };
            return loss::cross_entropy(rows, &mut projection, None, self.rows_per_chunk);
        };
        let output = behind(input, block); // [R, H]
        let mut projection = Projection { head: &head, gradient: Some(gradients.total(last)) };
        let scale = Some(Scale { factor: scale, lift: 1.0 });
        let rows = Rows { input: &output.detach(), ..rows };
        let losses = loss::cross_entropy(rows, &mut projection, scale, self.rows_per_chunk)?;
        if let Some(slope) = losses.input_gradient.as_ref().filter(|slope| slope.numel() > 0) {
            let surrogate = (&output * slope).sum(output.kind());
            let fresh = Tensor::f_run_backward(&[surrogate], &block, false, false)?;
            (first..).zip(fresh).try_for_each(|(index, gradient)| gradients.add(index, &gradient, 1.0))?;
        }
        (first..first + 2).try_for_each(|index| gradients.complete(index))?;
        Ok(losses)
    }
}

/// What the projection reads for a guess from states `[R, H]`.
fn behind(states: &Tensor, [weight, bias]: [&Tensor; 2]) -> Tensor {
    states + states.linear(weight, Some(bias)).silu()
}

impl DraftModel for Anchors {
    fn algorithm(&self) -> &'static Algorithm {
        &ALGORITHM
    }

    fn capture(&self) -> Vec<usize> {
        vec![self.target.num_layers()]
    }

    fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    fn metrics(&self) -> Vec<String> {
        metric_names(self.config.block)
    }

    fn summary(&self, averages: &[f64]) -> Vec<(String, f64)> {
        let chains = averages.chunks(METRICS.len()).map(|guess| guess[2]);
        vec![(ALGORITHM.selection_metric.to_owned(), 1.0 + chains.sum::<f64>())]
    }

    fn plan(&self, batch: &PackedBatch, key: StepKey) -> Result<RowPlan> {
        let empty = vec![(Vec::new(), Vec::new()); self.config.block];
        let mut plan = Plan { anchors: Vec::new(), noise: Vec::new(), guesses: empty };
        let mut start = 0;
        for document in batch.each() {
            self.plan_document(&document, start, key, &mut plan);
            start += document.ids.len() as i64;
        }
        // One term, divided by the sum of the rows' weights.
        let rows = plan.guesses.iter().enumerate().map(|(guess, (rows, _))| self.weight(guess) * rows.len() as f64);
        Ok(RowPlan::new(vec![rows.sum()], plan))
    }

    fn accumulate(
        &self,
        features: &FeatureBatch,
        plan: &RowPlan,
        global_counts: &[f64],
        gradients: &mut Gradients<'_>,
    ) -> Result<Tally> {
        self.run(features, plan, global_counts, Some(gradients))
    }

    fn evaluate(&self, features: &FeatureBatch, plan: &RowPlan, global_counts: &[f64]) -> Result<Tally> {
        self.run(features, plan, global_counts, None)
    }

    fn description(&self) -> Value {
        json!({"draft": self.config})
    }
}

static DRAFTER: DrafterKind = DrafterKind {
    algorithm: NAME,
    formats: &[NAME],
    from_checkpoint: |trained, asked| {
        guesser(Config::read(&trained.description["draft"])?.block, trained.tensors, asked)
    },
    from_export: |folder, asked| {
        let (config, tensors) = read(folder)?;
        guesser(config.block, &tensors, asked)
    },
    default_tree: "block",
    trees: Trees::Own,
};

/// Guesses one block behind everything committed.
struct BlockDrafter {
    /// Weight and bias of every guess, in the target's element type and on its device.
    blocks: Vec<[Tensor; 2]>,
    projection: Tensor,
    layer: usize,
    /// For each row, the target's last state of the token before the root, `[H]`.
    states: Vec<Tensor>,
}

fn guesser<'a>(block: usize, tensors: &[(String, Tensor)], asked: Asked<'a, '_>) -> Result<Guesser<'a>> {
    if asked.tree != DRAFTER.default_tree {
        return Err(Error::Usage(format!("--tree: expected {}, got `{}`", DRAFTER.default_tree, asked.tree)));
    }
    let find = |name: String| {
        let found = tensors.iter().find(|(other, _)| *other == name).map(|(_, tensor)| tensor.detach());
        let found = found.ok_or_else(|| Error::Failed(format!("the draft holds no tensor `{name}`")))?;
        Ok::<_, Error>(found.f_to_device(asked.target.device())?.f_to_kind(asked.target.kind())?)
    };
    let pair = |guess| Ok([find(format!("blocks.{guess}.weight"))?, find(format!("blocks.{guess}.bias"))?]);
    let drafter = BlockDrafter {
        blocks: (0..block).map(pair).collect::<Result<_>>()?,
        projection: find(format!("target.{PROJECTION}"))?,
        layer: asked.target.info().num_layers(),
        states: Vec::new(),
    };
    Ok(Guesser { drafter: Box::new(drafter), tree: format!("block of {block}"), notes: Vec::new(), method: None })
}

/// The last of a row's features, a tensor of its own: `[H]`.
fn last_state(features: &[Tensor]) -> Tensor {
    features[0].get(features[0].size()[0] - 1).copy()
}

impl Drafter for BlockDrafter {
    fn capture(&self) -> Vec<usize> {
        vec![self.layer]
    }

    fn join(&mut self, rows: &[Joining<'_>]) -> Result<()> {
        self.states.extend(rows.iter().map(|row| last_state(&row.features)));
        Ok(())
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        let states = Tensor::f_stack(&self.states, 0)?; // [B, H]
        let guesses = self.blocks.iter().map(|[weight, bias]| {
            let logits = behind(&states, [weight, bias]).linear(&self.projection, None::<&Tensor>); // [B, V]
            Ok(Vec::<i64>::try_from(logits.argmax(-1, false))?)
        });
        let guesses: Vec<Vec<i64>> = guesses.collect::<Result<_>>()?;
        let proposals = rows.iter().enumerate().map(|(row, context)| {
            let root = context.tokens.last().copied().unwrap_or_default();
            let tokens: Vec<u32> = guesses.iter().take(context.depth).map(|guess| guess[row] as u32).collect();
            Proposal::picked(TokenTree::chain(root, &tokens), vec![0.0; tokens.len() + 1])
        });
        Ok(proposals.collect())
    }

    fn commit(&mut self, rows: &[Progress<'_>]) -> Result<()> {
        self.states = rows.iter().map(|row| last_state(&row.features)).collect();
        Ok(())
    }

    fn retain(&mut self, rows: &[usize]) {
        self.states = rows.iter().map(|&row| self.states[row].shallow_clone()).collect();
    }
}

const WEIGHTS_FILE: &str = "anchors.safetensors";

/// A folder of `config.json` and the tensors, those of the target under the target's own names.
static FORMAT: Format = Format {
    name: NAME,
    summary: "what only tests read",
    files: &["config.json", WEIGHTS_FILE],
    is_file: None,
    recognise: |config| config.get("anchors_block").is_some(),
    write: |source: &Source, out| {
        let block = &source.description["draft"]["block"];
        let own = source.tensors.iter().filter(|(name, _)| Parameter::target_name(name).is_none());
        let own = own.map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
        let theirs = source.of_target().map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone()));
        weights::write_tensors(&out.join(WEIGHTS_FILE), &own.chain(theirs).collect::<Vec<_>>(), &[])?;
        files::write_json(&out.join("config.json"), &json!({"anchors_block": block, "target": source.target}))
    },
    check: |folder, _| {
        let (_, tensors) = read(folder)?;
        Ok(ExportReport {
            path: folder.to_path_buf(),
            format: NAME.to_owned(),
            tensors: tensors.len(),
            parameters: tensors.iter().map(|(_, tensor)| tensor.numel() as u64).sum(),
            dtype: "float32".to_owned(),
            resolved: Vec::new(),
            engines: Vec::new(),
            warnings: Vec::new(),
        })
    },
    start_from: Some(|folder, beginning: &Beginning<'_>| {
        let (_, tensors) = read(folder)?;
        let _guard = tch::no_grad_guard();
        for parameter in beginning.draft.parameters() {
            let found =
                tensors.iter().find(|(name, value)| *name == parameter.name && value.size() == parameter.value.size());
            let (_, value) = found.ok_or_else(|| {
                Error::config(START_KEY, format!("{} has no fitting `{}`", folder.display(), parameter.name))
            })?;
            parameter.value.shallow_clone().f_copy_(value)?;
        }
        Ok(vec!["these are anchors".to_owned()])
    }),
};

/// The configuration and the tensors of an exported folder, under the names of training.
fn read(folder: &Path) -> Result<(Config, Vec<(String, Tensor)>)> {
    let path = folder.join("config.json");
    let text = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let values: Value = strict::from_json(&text).map_err(|problem| Error::bad_file(&path, problem))?;
    let block = values["anchors_block"].as_u64().unwrap_or_default() as usize;
    let weights = WeightsFolder::open(&folder.join(WEIGHTS_FILE))?;
    let mut tensors = Vec::new();
    for stored in weights.names() {
        let name = if stored == PROJECTION { format!("target.{stored}") } else { stored.to_owned() };
        tensors.push((name, weights.load(stored, Kind::Float, Device::Cpu)?));
    }
    if tensors.len() != 2 * block + 1 {
        let problem = format!("expected {} tensors for a block of {block}, got {}", 2 * block + 1, tensors.len());
        return Err(Error::bad_file(folder.join(WEIGHTS_FILE), problem));
    }
    Ok((Config { block, ..Config::default() }, tensors))
}
