//! VAR's transformer against FoundationVision/VAR @78b9539: training's forward pass, the cache, one training step, greedy and
//! sampled decoding, and the filters of its sampler.
//!
//! File layout of `var_*`: `w.*` weights under the original names, the quantiser's among them; `in.label [B]`, `in.idx.S`
//! maps that the passes are fed, `in.noise_RUN.S` exponential noise of a sampled run; `mid.*` what passes compute on the way;
//! `out.forward.*`, `out.cached.*`, `out.train.*`, `out.greedy_*`, `out.sample_*` what is compared. Metadata: `config`.

use std::path::Path;

use serde_json::{Value, json};
use specforge::decode::scales::{Decoded, ScaleDecoder, ScaleRequest, ScaleSampling};
use specforge::models::var::{ScaleCache, ScaleInput, Var, VarConfig, config_of, var_of};
use specforge::models::vqvae::{PhiSharing, Quantizer, QuantizerConfig};
use specforge::weights::WeightsFolder;
use tch::{Device, Kind, Reduction, Tensor};

use super::Golden;

/// What of a file's weights is the image tokenizer's.
const TOKENIZER: [&str; 5] = ["quantize.", "encoder.", "decoder.", "quant_conv.", "post_quant_conv."];

/// Checks one file and says what was compared.
pub fn check(path: &Path) -> Result<String, String> {
    let file = VarFile::open(path)?;
    let model = file.model("w.", &file.config)?;
    let quantizer = file.quantizer()?;
    let scales = model.config().scales();
    let maps = file.maps("in.idx", scales)?;
    let inputs = quantizer.idx_to_var_input(&maps).map_err(text)?;
    near("mid.x_BLCv_wo_first_l", &inputs, &file.golden, 1e-5)?;
    forward(&file, &model, &inputs)?;
    cached(&file, &model, &quantizer, &maps)?;
    let parameters = trained(&file, &inputs, &maps)?;
    let greedy = greedy(&file, &model, &quantizer)?;
    let sampled = sampled(&file, &model, &quantizer)?;
    Ok(format!(
        "{scales} scales, {} blocks: forward, cache, {parameters} gradients, {greedy} greedy and {sampled} sampled decodes",
        model.config().depth
    ))
}

/// Checks a file of filtered logits.
pub fn check_filter(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let config: Value = serde_json::from_str(golden.text("config")?).map_err(text)?;
    let cases = config["cases"].as_array().ok_or("`config.cases`: expected a list")?;
    let mut ties = 0;
    for (number, case) in cases.iter().enumerate() {
        let sampling = sampling_of(case)?;
        let filtered = sampling.filtered(&golden.tensor("in.logits")?);
        same(&format!("out.kept.{number}"), &filtered.isfinite(), &golden)?;
        near(&format!("out.probs.{number}"), &filtered.softmax(-1, Kind::Float), &golden, 1e-6)?;
        let name = format!("out.kept_ties.{number}");
        if golden.has(&name) {
            same(&name, &sampling.filtered(&golden.tensor("in.logits_ties")?).isfinite(), &golden)?;
            ties += 1;
        }
    }
    Ok(format!("{} filters, {ties} of them with ties", cases.len()))
}

/// A file with its configuration.
pub struct VarFile {
    pub golden: Golden,
    pub config: Value,
    weights: WeightsFolder,
}

impl VarFile {
    pub fn open(path: &Path) -> Result<Self, String> {
        let golden = Golden::open(path)?;
        let config = serde_json::from_str(golden.text("config")?).map_err(text)?;
        Ok(Self { golden, config, weights: WeightsFolder::open(path).map_err(text)? })
    }

    /// A model under a prefix. `sizes` has the keys that this model has for itself.
    pub fn model(&self, prefix: &str, sizes: &Value) -> Result<Var, String> {
        let weights = self.weights_of(prefix)?;
        var_of(&weights, self.config_of(&weights, sizes)?, Device::Cpu).map_err(text)
    }

    /// The first blocks of the model under a prefix, with its head.
    pub fn truncated(&self, prefix: &str, sizes: &Value, blocks: i64) -> Result<Var, String> {
        let weights = self.weights_of(prefix)?;
        let config = self.config_of(&weights, sizes)?;
        let mut get = |name: &str, _: &[i64]| weights.load(name, Kind::Float, Device::Cpu);
        Var::truncated(&config, blocks, &mut get).map_err(text)
    }

    fn weights_of(&self, prefix: &str) -> Result<WeightsFolder, String> {
        let all = WeightsFolder::open(self.weights.path()).map_err(text)?;
        let own = |name: &str| !TOKENIZER.iter().any(|part| name.starts_with(part));
        Ok(all.renamed(|name| name.strip_prefix(prefix).filter(|name| own(name)).map(str::to_owned)))
    }

    fn config_of(&self, weights: &WeightsFolder, sizes: &Value) -> Result<VarConfig, String> {
        const KEYS: [&str; 11] = [
            "depth",
            "embed_dim",
            "num_heads",
            "mlp_ratio",
            "patch_nums",
            "vocab_size",
            "z_channels",
            "num_classes",
            "shared_aln",
            "attn_l2_norm",
            "norm_eps",
        ];
        let mut values = json!({});
        for key in KEYS {
            if let Some(value) = sizes.get(key).or_else(|| self.config.get(key)) {
                values[key] = value.clone();
            }
        }
        let (config, strange) = config_of(weights, Some(&values))?;
        match strange.is_empty() {
            true => Ok(config),
            false => Err(format!("keys that nobody read: {strange:?}")),
        }
    }

    /// The quantiser.
    pub fn quantizer(&self) -> Result<Quantizer, String> {
        let whole = |key: &str| self.config[key].as_i64().ok_or(format!("`config.{key}`: expected a number"));
        let patch_nums: Vec<i64> = serde_json::from_value(self.config["patch_nums"].clone()).map_err(text)?;
        let sharing = match whole("share_quant_resi")? {
            0 => PhiSharing::Own(patch_nums.len()),
            1 => PhiSharing::One,
            several => PhiSharing::Several(several as usize),
        };
        let config = QuantizerConfig {
            vocab_size: whole("vocab_size")?,
            z_channels: whole("z_channels")?,
            patch_nums,
            sharing,
            quant_resi: self.config["quant_resi"].as_f64().unwrap_or(0.5),
        };
        let mut get = |name: &str, _: &[i64]| self.weights.load(&format!("w.{name}"), Kind::Float, Device::Cpu);
        Quantizer::build(config, "quantize.", &mut get).map_err(text)
    }

    /// The map of every scale.
    pub fn maps(&self, prefix: &str, scales: usize) -> Result<Vec<Tensor>, String> {
        (0..scales).map(|scale| self.golden.tensor(&format!("{prefix}.{scale}"))).collect()
    }

    /// The labels of the first `images`, or of all.
    pub fn labels(&self, images: Option<usize>) -> Result<Vec<i64>, String> {
        let mut labels = self.golden.integers("in.label")?;
        labels.truncate(images.unwrap_or(labels.len()));
        Ok(labels)
    }
}

fn forward(file: &VarFile, model: &Var, inputs: &Tensor) -> Result<(), String> {
    let golden = &file.golden;
    let labels = golden.tensor("in.label")?;
    let conditions = model.conditions(&labels).map_err(text)?;
    let flat = |tensor: &Tensor| tensor.view([tensor.size()[0], -1]);
    let named = |name: &str, got: &Tensor| match golden.has(name) {
        true => near(name, got, golden, 5e-5),
        false => Ok(()),
    };
    if let Some(shared) = conditions.shared().filter(|_| golden.has("mid.shared_ada_lin")) {
        named("mid.shared_ada_lin", &shared.view(golden.tensor("mid.shared_ada_lin")?.size().as_slice()))?;
    }
    let mut problem = Ok(());
    let mut see = |steps: &specforge::models::var::BlockSteps| {
        let name = |part: &str| format!("mid.block.{}.{part}", steps.block);
        let parts = [
            ("in", &steps.input),
            ("attn_proj_out", &steps.attention),
            ("ffn_out", &steps.feed_forward),
            ("out", &steps.output),
        ];
        if problem.is_ok() {
            problem = parts.into_iter().try_for_each(|(part, got)| named(&name(part), got));
        }
        if let (true, None, Some(six)) = (problem.is_ok(), conditions.shared(), conditions.block(steps.block)) {
            problem = named(&name("ada_lin"), &flat(six));
        }
    };
    let logits = model.forward_seen(&labels, inputs, &mut see).map_err(text)?;
    problem?;
    near("out.forward.logits_cond", &logits, golden, 5e-5)?;
    let logits = model.forward(&labels.full_like(model.config().null_label()), inputs).map_err(text)?;
    near("out.forward.logits_uncond", &logits, golden, 5e-5)
}

/// Scale by scale behind a cache, and all scales in one pass.
fn cached(file: &VarFile, model: &Var, quantizer: &Quantizer, maps: &[Tensor]) -> Result<(), String> {
    let golden = &file.golden;
    let labels = golden.tensor("in.label")?;
    let rows = Tensor::cat(&[&labels, &labels.full_like(model.config().null_label())], 0); // [2 B]
    let conditions = model.conditions(&rows).map_err(text)?;
    let cfg = cfgs(file)?.last().copied().unwrap_or(0.0);
    let sampling = ScaleSampling { cfg, ..ScaleSampling::default() };
    let mut f_hat = quantizer.empty(labels.size()[0]);
    let mut read: Vec<Tensor> = Vec::new();
    let mut cache = ScaleCache::new();
    for (scale, map) in maps.iter().enumerate() {
        let input = read.last().map_or(ScaleInput::Start, ScaleInput::Map);
        let (logits, next) = model.step(&conditions, &cache, &[input]).map_err(text)?;
        cache = next;
        near(&format!("out.cached.logits_cond_uncond.{scale}"), &logits[0], golden, 5e-5)?;
        let mixed = sampling.mixed(&logits[0], sampling.weight(scale, maps.len()));
        near(&format!("out.cached.logits_mixed.{scale}"), &mixed, golden, 5e-5)?;
        f_hat = quantizer.add_scale(&f_hat, scale, map).map_err(text)?;
        near(&format!("out.cached.f_hat.{scale}"), &f_hat, golden, 1e-5)?;
        if scale + 1 < maps.len() {
            let next = quantizer.next_input(&f_hat, scale).map_err(text)?;
            read.push(Tensor::cat(&[&next, &next], 0));
        }
    }
    let inputs: Vec<ScaleInput<'_>> =
        std::iter::once(ScaleInput::Start).chain(read.iter().map(ScaleInput::Map)).collect();
    let (logits, whole) = model.step(&conditions, &ScaleCache::new(), &inputs).map_err(text)?;
    for (scale, logits) in logits.iter().enumerate() {
        near(&format!("out.cached.logits_cond_uncond.{scale}"), logits, golden, 5e-5)?;
    }
    for cache in [&cache, &whole] {
        for block in 0..model.config().depth as usize {
            let (key, value) = cache.layer(block).ok_or("a block has no cache")?;
            near(&format!("mid.cached.k.{block}"), key, golden, 5e-5)?;
            near(&format!("mid.cached.v.{block}"), value, golden, 5e-5)?;
        }
    }
    Ok(())
}

/// Loss and gradients of one training step; returns how many parameters were compared.
fn trained(file: &VarFile, inputs: &Tensor, maps: &[Tensor]) -> Result<usize, String> {
    let golden = &file.golden;
    let weights = file.weights_of("w.")?;
    let config = file.config_of(&weights, &file.config)?;
    let mut leaves: Vec<(String, Tensor)> = Vec::new();
    let mut get = |name: &str, _: &[i64]| {
        let leaf = weights.load(name, Kind::Float, Device::Cpu)?.copy().set_requires_grad(true);
        leaves.push((name.to_owned(), leaf.shallow_clone()));
        Ok(leaf)
    };
    let model = Var::build(config, &mut get).map_err(text)?;
    let logits = model.forward(&golden.tensor("in.label")?, inputs).map_err(text)?; // [B, L, V]
    let truth = Tensor::cat(maps, 1); // [B, L]
    let (flat, targets) = (logits.view([-1, model.config().vocab_size]), truth.view([-1]));
    let each = flat.cross_entropy_loss(&targets, None::<&Tensor>, Reduction::None, -100, 0.0);
    near("out.train.loss_BL", &each.view_as(&truth), golden, 1e-5)?;
    let loss = each.mean(Kind::Float);
    near("out.train.loss", &loss, golden, 1e-5)?;
    loss.backward();
    let mut compared = 0;
    for (name, leaf) in &leaves {
        let gradient = leaf.grad();
        if !gradient.defined() {
            return Err(format!("{name}: has no gradient"));
        }
        let want = golden.tensor(&format!("out.train.grad_norm.{name}"))?;
        relative(&format!("grad_norm.{name}"), &gradient.to_kind(Kind::Double).norm(), &want)?;
        let name = format!("out.train.grad.{name}");
        if golden.has(&name) {
            relative(&name, &gradient, &golden.tensor(&name)?)?;
        }
        compared += 1;
    }
    let wanted = golden.names_after("out.train.grad_norm.").count();
    match wanted == compared {
        true => Ok(compared),
        false => Err(format!("the file has gradients of {wanted} parameters, the model has {compared}")),
    }
}

fn greedy(file: &VarFile, model: &Var, quantizer: &Quantizer) -> Result<usize, String> {
    let cfgs = cfgs(file)?;
    let labels = file.labels(None)?;
    for cfg in &cfgs {
        let sampling = ScaleSampling { cfg: *cfg, ..ScaleSampling::default() };
        decoded(file, model, quantizer, (&format!("out.greedy_cfg{cfg}"), sampling), &labels, None)?;
    }
    let sampling = ScaleSampling { cfg: cfgs.last().copied().unwrap_or(0.0), ..ScaleSampling::default() };
    let none = vec![model.config().null_label(); labels.len()];
    decoded(file, model, quantizer, ("out.greedy_uncond_label", sampling), &none, None)?;
    Ok(cfgs.len() + 1)
}

fn sampled(file: &VarFile, model: &Var, quantizer: &Quantizer) -> Result<usize, String> {
    let runs = file.config["sample_runs"].as_object().ok_or("`config.sample_runs`: expected an object")?;
    for (run, settings) in runs {
        let sampling = sampling_of(settings)?;
        let exponential = file.maps(&format!("in.noise_{run}"), model.config().scales())?;
        // The largest p / e is the largest ln p - ln e.
        let gumbel: Vec<Tensor> = exponential.iter().map(|noise| -noise.to_kind(Kind::Double).log()).collect();
        let name = format!("out.sample_{run}");
        decoded(file, model, quantizer, (&name, sampling), &file.labels(None)?, Some(&gumbel))?;
    }
    Ok(runs.len())
}

/// Decodes with the target alone and compares every scale.
pub fn decoded(
    file: &VarFile,
    model: &Var,
    quantizer: &Quantizer,
    (name, sampling): (&str, ScaleSampling),
    labels: &[i64],
    gumbel: Option<&[Tensor]>,
) -> Result<Decoded, String> {
    let golden = &file.golden;
    let images: Vec<u64> = (0..labels.len() as u64).collect();
    let mut decoder = ScaleDecoder::new(model, quantizer, None, sampling).map_err(text)?;
    let mut logits = Vec::new();
    let mut see = |seen: &specforge::decode::scales::ScaleSeen<'_>| {
        logits.push(seen.logits.copy());
        Ok(())
    };
    let request = ScaleRequest { labels, images: &images };
    let decoded = match gumbel {
        None => decoder.decode_seen(request, &mut see),
        Some(gumbel) => decoder.decode_from(request, gumbel, &mut see),
    };
    let decoded = decoded.map_err(text)?;
    let state = &decoded.committed;
    let named = |part: &str, scale: usize| Some(format!("{name}.{part}.{scale}")).filter(|name| golden.has(name));
    let mut f_hat = quantizer.empty(labels.len() as i64);
    for (scale, map) in state.maps().iter().enumerate() {
        if let Some(name) = named("logits_mixed", scale) {
            near(&name, &logits[scale], golden, 5e-5)?;
        }
        if let Some(name) = named("kept", scale) {
            same(&name, &sampling.filtered(&logits[scale]).isfinite(), golden)?;
        }
        same(&format!("{name}.idx.{scale}"), map, golden)?;
        f_hat = quantizer.add_scale(&f_hat, scale, map).map_err(text)?;
        if let Some(name) = named("f_hat", scale) {
            near(&name, &f_hat, golden, 1e-5)?;
        }
        if let (Some(name), Some(next)) = (named("next_map", scale), state.inputs().get(scale)) {
            near(&name, next, golden, 1e-5)?;
        }
    }
    match state.f_hat().equal(&f_hat) {
        true => Ok(decoded),
        false => Err(format!("{name}: what is committed is not the sum of its maps")),
    }
}

fn cfgs(file: &VarFile) -> Result<Vec<f64>, String> {
    serde_json::from_value(file.config["cfgs"].clone()).map_err(|error| format!("`config.cfgs`: {error}"))
}

/// The settings of a run; what it does not say changes nothing.
pub fn sampling_of(settings: &Value) -> Result<ScaleSampling, String> {
    let number = |key: &str| settings[key].as_f64().unwrap_or(0.0);
    let sampling = ScaleSampling {
        cfg: number("cfg"),
        top_k: settings["top_k"].as_u64().unwrap_or(0) as usize,
        top_p: number("top_p"),
        temperature: number("temperature"),
        seed: settings["seed"].as_u64().unwrap_or(0),
    };
    sampling.check().map(|()| sampling)
}

/// Compares with a tensor of the file: no number differs by more than `tolerance` times the larger of 1 and the largest
/// number.
pub fn near(name: &str, got: &Tensor, golden: &Golden, tolerance: f64) -> Result<(), String> {
    let want = golden.tensor(name)?.to_kind(Kind::Double);
    if got.size() != want.size() {
        return Err(format!("{name}: expected shape {:?}, got {:?}", want.size(), got.size()));
    }
    let largest = want.abs().max().double_value(&[]).max(1.0);
    let difference = (got.to_kind(Kind::Double) - want).abs().max().double_value(&[]);
    match difference <= tolerance * largest {
        true => Ok(()),
        false => Err(format!("{name}: differs by {difference:.3e}, tolerance {:.1e}", tolerance * largest)),
    }
}

/// Gradients: within 1e-4 of the largest number.
fn relative(name: &str, got: &Tensor, want: &Tensor) -> Result<(), String> {
    let want = want.to_kind(Kind::Double);
    let largest = want.abs().max().double_value(&[]).max(1e-6);
    let difference = (got.detach().to_kind(Kind::Double) - want).abs().max().double_value(&[]);
    match difference <= 1e-4 * largest {
        true => Ok(()),
        false => Err(format!("{name}: differs by {difference:.3e}, the largest is {largest:.3e}")),
    }
}

/// Compares whole numbers or truths with a tensor of the file.
pub fn same(name: &str, got: &Tensor, golden: &Golden) -> Result<(), String> {
    let want = golden.tensor(name)?;
    if got.size() != want.size() {
        return Err(format!("{name}: expected shape {:?}, got {:?}", want.size(), got.size()));
    }
    let wrong = got.not_equal_tensor(&want).sum(Kind::Int64).int64_value(&[]);
    match wrong {
        0 => Ok(()),
        _ => Err(format!("{name}: {wrong} of {} differ", want.numel())),
    }
}

pub fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
