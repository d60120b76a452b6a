//! Trains a VQVAE on pictures: reconstruction and the quantiser's loss, no discriminator.
//!
//! The objective is `mse + l1 * |difference| + quantiser loss` over the pixels of a batch, with the quantiser's loss and its
//! straight-through gradient as in the reference (`VectorQuantizer2.forward`, FoundationVision/VAR at
//! 78b95394fc5896192e3a003e4b295f8ea743c48f; what VAR's own VQVAE was trained with is not published). Codes that nothing
//! uses are put where the batch has patches (random restarts, Dhariwal et al. 2020, <https://arxiv.org/abs/2005.00341>,
//! appendix B): without that, most of a codebook is never learned.
//!
//! ```text
//! OUT/checkpoints/step-.../   as of every run: manifest.json, model.safetensors, optimizer.safetensors
//! OUT/metrics.jsonl, OUT/tensorboard/
//! OUT/model/                  config.json and model.safetensors, when the run is over
//! ```
//!
//! What a step computes follows from seed, step and images alone, so a run in parts is a run in one, to the bit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::pixels;
use crate::checkpoint::{self, Checkpoint, CheckpointStore, Manifest, OpenWindow, RetentionConfig, Versions};
use crate::data::GreyImages;
use crate::dist::ProcessGroup;
use crate::error::{Error, Result};
use crate::models::vqvae::{self, Reconstruction, Vqvae, VqvaeConfig, files::COUNTERS};
use crate::nn::noise;
use crate::optim::{OptimConfig, Optimizer, ParameterSlot};
use crate::progress::Progress;
use crate::stop::{Answer, Stop};
use crate::strict;
use crate::tracking::Tracker;

/// Noise streams of this file's draws, behind those of initial values.
const ORDER: u64 = 1 << 32;
const RESTARTS: u64 = 1 << 33;
/// The tensor of the codebook.
const CODEBOOK: &str = "quantize.embedding.weight";
/// A code is restarted that is used this much less often than the mean.
const DEAD_SHARE: f64 = 0.03;
/// Images that are evaluated at once.
const EVALUATED_AT_ONCE: usize = 64;
/// Folder of checkpoints, and that of the finished model.
const CHECKPOINTS: &str = "checkpoints";
const MODEL: &str = "model";

/// Settings of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenizerTraining {
    /// Optimizer steps.
    pub steps: u64,
    /// Images of a step.
    pub batch_images: usize,
    /// Images at the end of the file that are not trained on.
    pub held_out: usize,
    /// Weight of the absolute difference beside the squared one.
    pub l1: f64,
    /// Steps between restarts of codes that nothing uses; 0 never does, after those before the first step.
    pub restart_every: u64,
    /// The share of the run after which no code is restarted.
    pub restart_until: f64,
    /// Seed of initial values, order and restarts.
    pub seed: u64,
    /// Steps between log lines.
    pub log_every: u64,
    /// Steps between evaluations on the images held out; 0 evaluates at the end only.
    pub eval_every: u64,
    /// Steps between checkpoints; 0 saves at the end only.
    pub save_every: u64,
    /// The optimizer, without groups.
    pub optim: OptimConfig,
}

impl Default for TokenizerTraining {
    fn default() -> Self {
        Self {
            steps: 2000,
            batch_images: 32,
            held_out: 500,
            l1: 0.2,
            restart_every: 50,
            restart_until: 0.7,
            seed: 42,
            log_every: 50,
            eval_every: 500,
            save_every: 500,
            optim: OptimConfig::default(),
        }
    }
}

impl TokenizerTraining {
    /// Refuses what no run over so many images can be.
    pub fn validate(&self, images: usize) -> Result<()> {
        for (key, value) in
            [("steps", self.steps), ("batch_images", self.batch_images as u64), ("log_every", self.log_every)]
        {
            if value == 0 {
                return Err(Error::config(key, "expected at least 1, got 0"));
            }
        }
        let trained = images.saturating_sub(self.held_out);
        if trained < self.batch_images {
            let problem = format!(
                "expected at most the {trained} images that are trained on ({images}, {} held out), got {}",
                self.held_out, self.batch_images
            );
            return Err(Error::config("batch_images", problem));
        }
        if !(self.l1.is_finite() && self.l1 >= 0.0) {
            return Err(Error::config("l1", format!("expected a number of at least 0, got {}", self.l1)));
        }
        if !(0.0..=1.0).contains(&self.restart_until) {
            return Err(Error::config("restart_until", format!("expected from 0 to 1, got {}", self.restart_until)));
        }
        if !self.optim.groups.is_empty() {
            return Err(Error::config("optim.groups", "a tokenizer's parameters have no groups"));
        }
        for (key, is_set) in [("muon", self.optim.muon.is_some()), ("average", self.optim.average.is_some())] {
            if is_set {
                return Err(Error::config(
                    format!("optim.{key}"),
                    "a tokenizer is trained by AdamW alone, without averages",
                ));
            }
        }
        self.optim.validate()?;
        self.optim.schedule.check_length(self.steps)
    }
}

/// Reads a run's file: an object with the sections `train` ([`TokenizerTraining`]; every key may be left out) and `model`, the
/// config.json of the VQVAE to make.
pub fn read_configuration(path: &Path) -> Result<(TokenizerTraining, VqvaeConfig)> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sections {
        #[serde(default)]
        train: serde_json::Map<String, serde_json::Value>,
        model: serde_json::Value,
    }
    let refuse = |problem: String| Error::bad_file(path, problem);
    let text = std::fs::read(path).map_err(Error::io("read", path))?;
    let sections: Sections = strict::from_json(&text).map_err(refuse)?;
    let training = strict::from_value(&sections.train.into(), "train")?;
    let (model, strange) = VqvaeConfig::read(&sections.model).map_err(|problem| refuse(format!("model: {problem}")))?;
    match strange.first() {
        None => Ok((training, model)),
        Some(key) => Err(Error::config(format!("model.{key}"), "unknown key")),
    }
}

/// What a run works with.
#[derive(Debug)]
pub struct TokenizerRun<'a> {
    /// Settings.
    pub config: &'a TokenizerTraining,
    /// The model to make.
    pub model: &'a VqvaeConfig,
    /// The pictures, the last ones held out.
    pub images: &'a GreyImages,
    /// Where everything goes.
    pub folder: &'a Path,
    /// Whether to go on from the newest checkpoint of the folder; else whatever lies there is refused.
    pub resume: bool,
    /// Where it is computed.
    pub device: Device,
    /// Whether the run is to stop.
    pub stop: &'a Stop,
}

/// What a run came to.
#[derive(Debug, Clone, Serialize)]
pub struct TokenizerReport {
    /// Steps of the whole run so far.
    pub steps: u64,
    /// Figures of the last evaluation: `mse`, `l1`, `psnr` in decibels, `quantizer_loss`, `used_codes` as a share.
    pub figures: BTreeMap<String, f64>,
    /// The finished model; nothing where a signal came first.
    pub model: Option<PathBuf>,
    /// The signal that ended it.
    pub stopped_by: Option<i32>,
    /// Seconds of this part of the run.
    pub seconds: f64,
}

impl TokenizerRun<'_> {
    /// Trains to the end, or to a signal, which leaves a checkpoint.
    pub fn train(&self) -> Result<TokenizerReport> {
        let started = Instant::now();
        self.config.validate(self.images.len())?;
        let store = CheckpointStore::open(&self.folder.join(CHECKPOINTS), RetentionConfig::default())?;
        let found = store.latest()?.0;
        let checkpoint = match (&found, self.resume) {
            (Some(path), true) => Some(checkpoint::read(path)?),
            (Some(path), false) => {
                return Err(Error::bad_file(path, "a run has saved checkpoints here")
                    .with_hint("go on from it (resume), or choose another folder"));
            }
            (None, _) => None,
        };
        let mut state = State::new(self, checkpoint.as_ref())?;
        let mut tracker = Tracker::open(self.folder, checkpoint.as_ref().map(|found| found.manifest.step))?;
        self.stop.set_answer(Answer::Finish("stopping after this step; a checkpoint is written"));
        let progress = Progress::resumed("train tokenizer", self.config.steps, "steps", state.step);
        let mut figures = checkpoint.map(|found| found.manifest.metrics).unwrap_or_default();
        let mut saved = state.step;
        while state.step < self.config.steps && self.stop.asked() == 0 {
            state.advance()?;
            let (step, last) = (state.step, state.step == self.config.steps);
            let due = |every: u64| last || every > 0 && step.is_multiple_of(every);
            if due(self.config.log_every) {
                let line = state.take_line();
                let shown: Vec<String> = line.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
                progress.println(&format!("step {step}: {}", shown.join(", ")));
                tracker.log(step, &prefixed("train", &line))?;
            }
            if due(self.config.eval_every) {
                figures = state.evaluate()?;
                let line: Vec<(String, f64)> = figures.clone().into_iter().collect();
                tracker.log(step, &prefixed("eval", &line))?;
            }
            if due(self.config.save_every) {
                tracker.flush()?;
                state.save(&store, &figures)?;
                saved = step;
            }
            progress.set(step, "");
        }
        tracker.flush()?;
        let stopped_by = (state.step < self.config.steps).then(|| self.stop.asked());
        if saved != state.step {
            state.save(&store, &figures)?;
        }
        let mut model = None;
        if stopped_by.is_none() {
            let folder = self.folder.join(MODEL);
            vqvae::write(&folder, self.model, &state.tensors())?;
            model = Some(folder);
        }
        progress.finish(if stopped_by.is_some() { "stopped, everything is saved" } else { "done" });
        Ok(TokenizerReport { steps: state.step, figures, model, stopped_by, seconds: started.elapsed().as_secs_f64() })
    }
}

/// Names behind a prefix, as the tracker has them.
fn prefixed(prefix: &str, line: &[(String, f64)]) -> Vec<(String, f64)> {
    line.iter().map(|(name, value)| (format!("{prefix}/{name}"), *value)).collect()
}

/// Names of the sums between two log lines.
const SUMS: [&str; 5] = ["loss", "mse", "l1", "quantizer_loss", "gradient_norm"];

/// A run between two steps.
struct State<'a> {
    run: &'a TokenizerRun<'a>,
    model: Vqvae,
    optimizer: Optimizer<'static>,
    /// How often each code is used at each scale, averaged over the last steps: `[S, V]` float32.
    used: Tensor,
    step: u64,
    /// Steps and [`SUMS`] since the last log line.
    window: (u64, [f64; 5]),
}

impl<'a> State<'a> {
    fn new(run: &'a TokenizerRun<'a>, checkpoint: Option<&Checkpoint>) -> Result<Self> {
        let device = run.device;
        let shapes = Vqvae::tensors(run.model)?;
        let counters = (COUNTERS.to_owned(), vec![run.model.quantizer.scales() as i64, run.model.quantizer.vocab_size]);
        let mut values = BTreeMap::new();
        let mut used = Tensor::zeros(counters.1.as_slice(), (Kind::Float, device));
        match checkpoint {
            None => values.extend(Vqvae::initial(run.model, run.config.seed)?),
            Some(checkpoint) => {
                checkpoint.same_configuration(&run.configuration(), &FREE)?;
                checkpoint.same_data(&run.data_hashes())?;
                checkpoint.same_tensors(&shapes, &[counters])?;
                for (name, value) in checkpoint.tensors()? {
                    // A copy: what was loaded lies in the file.
                    values.insert(name, value.copy());
                }
                used = values.remove(COUNTERS).unwrap_or(used).to_device(device);
            }
        }
        let mut slots = Vec::new();
        let model = Vqvae::build(run.model.clone(), &mut |name, _| {
            let value = values.remove(name).ok_or_else(|| Error::Failed(format!("`{name}` has no initial value")))?;
            let value = value.f_to_device(device)?.f_contiguous()?.set_requires_grad(true);
            slots.push(ParameterSlot::new(name, value.shallow_clone()));
            Ok(value)
        })?;
        let mut optimizer = Optimizer::new(slots, &run.config.optim, ProcessGroup::SINGLE, false)?;
        let mut state = match checkpoint {
            None => Self { run, model, optimizer, used, step: 0, window: (0, [0.0; 5]) },
            Some(checkpoint) => {
                optimizer.load_state(Some(&checkpoint.optimizer))?;
                let manifest = &checkpoint.manifest;
                if manifest.step > run.config.steps {
                    let problem = format!("the checkpoint is of step {}, got {}", manifest.step, run.config.steps);
                    return Err(Error::config("steps", problem));
                }
                let open = manifest.window.first();
                let mut sums = [0.0; 5];
                let kept = open.map(|open| open.sums.as_slice()).unwrap_or_default();
                for (sum, kept) in sums.iter_mut().zip(kept) {
                    *sum = kept.unwrap_or(f64::NAN);
                }
                Self {
                    run,
                    model,
                    optimizer,
                    used,
                    step: manifest.step,
                    window: (open.map_or(0, |open| open.steps), sums),
                }
            }
        };
        if checkpoint.is_none() {
            // Every code is where some patch of the first images is.
            let image = state.batch()?;
            let first = tch::no_grad(|| state.model.reconstruct(&image))?;
            state.restart(&first)?;
        }
        Ok(state)
    }

    /// The images of the step that comes next: `[B, 3, h, w]`.
    fn batch(&self) -> Result<Tensor> {
        let TokenizerTraining { batch_images, held_out, seed, .. } = *self.run.config;
        let trained = self.run.images.len().saturating_sub(held_out);
        let batches = (trained / batch_images.max(1)).max(1) as u64;
        let (epoch, place) = (self.step / batches, (self.step % batches) as usize);
        let order = noise::permutation(trained, seed, ORDER + epoch);
        let which: Vec<usize> = order.into_iter().skip(place * batch_images).take(batch_images).collect();
        Ok(pixels(self.run.images, &which, self.run.model.pixels())?.to_device(self.run.device))
    }

    /// One step.
    fn advance(&mut self) -> Result<()> {
        let config = self.run.config;
        let image = self.batch()?;
        let made = self.model.reconstruct(&image)?;
        let mse = made.image.f_mse_loss(&image, tch::Reduction::Mean)?;
        let l1 = made.image.f_l1_loss(&image, tch::Reduction::Mean)?;
        let loss = &mse + &l1 * config.l1 + &made.quantizer_loss;
        let values: Vec<Tensor> = self.optimizer.slots().map(|slot| slot.value.shallow_clone()).collect();
        let gradients = Tensor::f_run_backward(&[&loss], &values, false, false)?;
        // A convolution that no scale uses has no gradient.
        let gradients: Vec<Tensor> = gradients
            .into_iter()
            .zip(&values)
            .map(|(gradient, value)| if gradient.defined() { gradient } else { value.zeros_like() })
            .collect();
        let schedule = &config.optim.schedule;
        let rate = schedule.learning_rate(config.optim.learning_rate, self.step, schedule.horizon(config.steps));
        let report = self.optimizer.step(&gradients, rate, config.optim.max_gradient_norm, &loss)?;
        if let Some(bad) = self.optimizer.non_finite()?.fatal {
            let batch = format!("{} images", config.batch_images);
            return Err(Error::NonFinite { step: bad.step, what: bad.what.to_owned(), batch });
        }
        let numbers = [&loss, &mse, &l1, &made.quantizer_loss, &report.gradient_norm];
        self.window.0 += 1;
        for (sum, number) in self.window.1.iter_mut().zip(numbers) {
            *sum += number.double_value(&[]);
        }
        self.count(&made)?;
        self.step += 1;
        let ends = (config.steps as f64 * config.restart_until) as u64;
        if config.restart_every > 0 && self.step.is_multiple_of(config.restart_every) && self.step <= ends {
            self.restart(&made)?;
        }
        Ok(())
    }

    /// Notes which codes a batch used. The average forgets as fast as the reference's.
    fn count(&mut self, made: &Reconstruction) -> Result<()> {
        let codes = self.run.model.quantizer.vocab_size;
        let hits: Vec<Tensor> = made
            .indices
            .iter()
            .map(|map| map.flatten(0, -1).bincount(None::<Tensor>, codes).to_kind(Kind::Float))
            .collect();
        let hits = Tensor::f_stack(&hits, 0)?; // [S, V]
        let keep = match self.step {
            0 => 0.0,
            1..100 => 0.9,
            _ => 0.99,
        };
        self.used = &self.used * keep + hits * (1.0 - keep);
        Ok(())
    }

    /// Puts the codes that nothing uses where patches of this batch are.
    fn restart(&mut self, made: &Reconstruction) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let patches = Tensor::f_cat(&made.looked_up, 0)?; // [N, C]
        let (rows, scales) =
            (patches.size().first().copied().unwrap_or(0), self.used.size().first().copied().unwrap_or(1));
        let fair = rows as f64 / self.run.model.quantizer.vocab_size as f64;
        let by_code = self.used.sum_dim_intlist([0i64].as_slice(), false, Kind::Float); // [V]
        let dead = by_code.lt(fair * DEAD_SHARE).nonzero().view([-1]);
        let count = dead.numel();
        if count == 0 || rows == 0 {
            return Ok(());
        }
        let chosen = noise::permutation(rows as usize, self.run.config.seed, RESTARTS + self.step);
        let chosen: Vec<i64> = chosen.iter().cycle().take(count).map(|&row| row as i64).collect();
        let chosen = patches.f_index_select(0, &Tensor::from_slice(&chosen).to_device(patches.device()))?;
        let codebook = self.optimizer.slots().find(|slot| slot.name == CODEBOOK);
        let codebook = codebook.ok_or_else(|| Error::Failed(format!("`{CODEBOOK}` is not trained")))?;
        let _ = codebook.value.detach().f_index_copy_(0, &dead, &chosen)?;
        // Not dead again at once.
        let _ = self.used.f_index_fill_(1, &dead, fair / scales as f64)?;
        Ok(())
    }

    /// Means since the last line.
    fn take_line(&mut self) -> Vec<(String, f64)> {
        let (steps, sums) = std::mem::take(&mut self.window);
        SUMS.iter().zip(sums).map(|(name, sum)| ((*name).to_owned(), sum / steps.max(1) as f64)).collect()
    }

    /// Figures over the images held out; none where none are.
    fn evaluate(&self) -> Result<BTreeMap<String, f64>> {
        let _no_grad = tch::no_grad_guard();
        let count = self.run.images.len();
        let which: Vec<usize> = (count.saturating_sub(self.run.config.held_out)..count).collect();
        let (mut sums, mut used) = ([0.0; 3], std::collections::HashSet::new());
        for batch in which.chunks(EVALUATED_AT_ONCE) {
            let image = pixels(self.run.images, batch, self.run.model.pixels())?.to_device(self.run.device);
            let made = self.model.reconstruct(&image)?;
            let shown = made.image.clamp(-1.0, 1.0);
            let [mse, l1] = [
                shown.f_mse_loss(&image, tch::Reduction::Mean)?.double_value(&[]),
                shown.f_l1_loss(&image, tch::Reduction::Mean)?.double_value(&[]),
            ];
            for (sum, mean) in sums.iter_mut().zip([mse, l1, made.quantizer_loss.double_value(&[])]) {
                *sum += mean * batch.len() as f64;
            }
            for map in made.indices {
                used.extend(Vec::<i64>::try_from(map.flatten(0, -1))?);
            }
        }
        if which.is_empty() {
            return Ok(BTreeMap::new());
        }
        let [mse, l1, quantizer_loss] = sums.map(|sum| sum / which.len() as f64);
        // Pixels are 2 apart at most.
        let psnr = 10.0 * (4.0 / mse.max(f64::MIN_POSITIVE)).log10();
        let used_codes = used.len() as f64 / self.run.model.quantizer.vocab_size as f64;
        let figures =
            [("mse", mse), ("l1", l1), ("quantizer_loss", quantizer_loss), ("psnr", psnr), ("used_codes", used_codes)];
        Ok(figures.map(|(name, value)| (name.to_owned(), value)).into())
    }

    /// Parameters, and how often codes are used.
    fn tensors(&self) -> Vec<(String, Tensor)> {
        let parameters = self.optimizer.slots().map(|slot| (slot.name.clone(), slot.value.detach()));
        parameters.chain([(COUNTERS.to_owned(), self.used.shallow_clone())]).collect()
    }

    fn save(&self, store: &CheckpointStore, figures: &BTreeMap<String, f64>) -> Result<()> {
        let config = self.run.config;
        let batches =
            (self.run.images.len().saturating_sub(config.held_out) / config.batch_images.max(1)).max(1) as u64;
        let codes: i64 = self.run.model.quantizer.patch_nums.iter().map(|patches| patches * patches).sum();
        let (steps, sums) = self.window;
        let open = OpenWindow {
            steps,
            sums: sums.map(|sum| sum.is_finite().then_some(sum)).to_vec(),
            ..OpenWindow::default()
        };
        let manifest = Manifest {
            step: self.step,
            epoch: self.step / batches,
            position: self.step % batches,
            // A tokenizer's tokens are codes.
            tokens_seen: self.step * config.batch_images as u64 * codes as u64,
            configuration: self.run.configuration(),
            draft: self.run.model.values(),
            versions: Versions::current(),
            data_hashes: self.run.data_hashes(),
            metrics: figures.clone(),
            window: if steps > 0 { vec![open] } else { Vec::new() },
            ..Manifest::default()
        };
        store.save(manifest, &self.tensors(), &self.optimizer.state()?)?;
        Ok(())
    }
}

/// Settings that change no update: a resumed run may have others.
const FREE: [&str; 3] = ["train.log_every", "train.eval_every", "train.save_every"];

impl TokenizerRun<'_> {
    fn configuration(&self) -> serde_json::Value {
        json!({"train": self.config, "model": self.model.values()})
    }

    fn data_hashes(&self) -> BTreeMap<String, String> {
        BTreeMap::from([("images".to_owned(), self.images.digest())])
    }
}

#[cfg(test)]
mod tests {
    use super::super::pixels::test_images;
    use super::*;

    /// Squares of four sizes in two places: 8 pixels each way.
    fn images() -> GreyImages {
        let mut text = String::new();
        for number in 0..40usize {
            let (size, place) = (1 + number % 4, number / 4 % 2 * 3);
            for pixel in 0..64usize {
                let inside = |at: usize| (place..place + size).contains(&at);
                text += if inside(pixel / 8) && inside(pixel % 8) { "255," } else { "0," };
            }
            text += &format!("{}\n", number % 4);
        }
        test_images(&text)
    }

    fn model() -> VqvaeConfig {
        let values = json!({
            "vocab_size": 16, "z_channels": 4, "ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "patch_nums": [1, 2, 4],
            "share_quant_resi": 4, "groupnorm_groups": 4
        });
        VqvaeConfig::read(&values).unwrap().0
    }

    fn settings(steps: u64) -> TokenizerTraining {
        let optim = OptimConfig { learning_rate: 3e-3, ..OptimConfig::default() };
        TokenizerTraining {
            steps,
            batch_images: 8,
            held_out: 8,
            restart_every: 4,
            log_every: 5,
            eval_every: 0,
            save_every: 3,
            optim,
            ..TokenizerTraining::default()
        }
    }

    fn train(config: &TokenizerTraining, folder: &Path, resume: bool, stop: &Stop) -> Result<TokenizerReport> {
        let (images, model) = (images(), model());
        TokenizerRun { config, model: &model, images: &images, folder, resume, device: Device::Cpu, stop }.train()
    }

    #[test]
    fn reconstruction_is_learned_and_the_model_loads() {
        let folder = tempfile::tempdir().unwrap();
        let report = train(&settings(60), folder.path(), false, &Stop::default()).unwrap();
        let lines = std::fs::read_to_string(folder.path().join("metrics.jsonl")).unwrap();
        let mse: Vec<f64> = lines
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["train/mse"].as_f64())
            .collect();
        assert!(mse.len() == 12 && mse[11] < mse[0] / 4.0, "{mse:?}");
        assert!(report.figures["psnr"] > 10.0 && report.figures["used_codes"] > 0.2, "{:?}", report.figures);
        let loaded = vqvae::load(report.model.as_deref().unwrap(), None, Kind::Float, Device::Cpu).unwrap();
        assert_eq!(loaded.config(), &model());
        let image = pixels(&images(), &[39], 8).unwrap();
        let made = loaded.decode(&loaded.encode(&image).unwrap().f_hat[2]).unwrap();
        assert!((made - image).square().mean(Kind::Double).double_value(&[]) < 0.5);
    }

    #[test]
    fn a_run_in_parts_is_a_run_in_one() {
        let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let config = settings(10);
        train(&config, whole.path(), false, &Stop::default()).unwrap();
        // As if killed behind step 6, within a log line.
        let stopped = Stop::default();
        let (images, model) = (images(), model());
        let run = TokenizerRun {
            config: &config,
            model: &model,
            images: &images,
            folder: parts.path(),
            resume: false,
            device: Device::Cpu,
            stop: &stopped,
        };
        let store = CheckpointStore::open(&parts.path().join(CHECKPOINTS), RetentionConfig::default()).unwrap();
        let mut state = State::new(&run, None).unwrap();
        (0..6).for_each(|_| state.advance().unwrap());
        state.save(&store, &BTreeMap::new()).unwrap();
        drop(store);
        let error = train(&config, parts.path(), false, &Stop::default()).unwrap_err().to_string();
        assert!(error.contains("a run has saved checkpoints here"), "{error}");
        train(&config, parts.path(), true, &Stop::default()).unwrap();
        let read = |folder: &Path| std::fs::read(folder.join("model/model.safetensors")).unwrap();
        assert!(read(whole.path()) == read(parts.path()));
        // Another length has other learning rates.
        let error = train(&settings(12), parts.path(), true, &Stop::default()).unwrap_err().to_string();
        assert!(error.contains("train.steps"), "{error}");
    }

    #[test]
    fn a_signal_ends_a_run_without_a_model() {
        let folder = tempfile::tempdir().unwrap();
        let stop = Stop::default();
        stop.ask(15);
        let report = train(&settings(10), folder.path(), false, &stop).unwrap();
        assert_eq!((report.steps, report.stopped_by, report.model), (0, Some(15), None));
        let report = train(&settings(10), folder.path(), true, &Stop::default()).unwrap();
        assert_eq!((report.steps, report.stopped_by), (10, None));
    }

    #[test]
    fn a_file_of_settings_is_read_strictly() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.json");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            read_configuration(&path)
        };
        let text =
            json!({"train": {"steps": 7, "optim": {"learning_rate": 0.5}}, "model": model().values()}).to_string();
        let (training, config) = read(&text).unwrap();
        assert_eq!((training.steps, training.optim.learning_rate, config), (7, 0.5, model()));
        let said = |text: &str| read(text).unwrap_err().to_string();
        assert!(said(&text.replace("steps", "stepps")).contains("train.stepps"));
        assert!(said(&text.replace("ch_mult", "chmult")).contains("model.chmult"));
        assert!(said(&text.replace("\"train\"", "\"draft\"")).contains("draft"));
        assert!(said(r#"{"train": {}}"#).contains("model"));
        assert!(said(r#"{"train": {}, "train": {}}"#).contains("twice"));
        // The example for digits of 28 pixels.
        let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/images/digits-vqvae.json");
        let (training, config) = read_configuration(&example).unwrap();
        training.validate(5000).unwrap();
        assert_eq!(config.pixels(), 32);
    }

    #[test]
    fn settings_that_cannot_be_are_named() {
        let said = |config: TokenizerTraining| config.validate(40).unwrap_err().to_string();
        assert!(said(TokenizerTraining { steps: 0, ..settings(1) }).contains("`steps`"));
        assert!(
            said(TokenizerTraining { batch_images: 33, ..settings(1) }).contains("the 32 images that are trained on")
        );
        assert!(said(TokenizerTraining { held_out: 60, ..settings(1) }).contains("the 0 images"));
        assert!(said(TokenizerTraining { l1: f64::NAN, ..settings(1) }).contains("`l1`"));
        assert!(said(TokenizerTraining { restart_until: 2.0, ..settings(1) }).contains("`restart_until`"));
    }
}
