//! Tiny random LLaDA models by Fast-dLLM's and ML-GSAI's programs: passes with and without caches, whole decodes pass by pass,
//! and token skip by a second implementation of the corrected rule.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};
use specforge::decode::diffusion::{
    BlockState, Cache, Decoder, Draw, Draws, Network, Options, Prompt, Remasking, Rows, Rule, Step, Text, TokenSkip,
    View, Watcher,
};
use specforge::error::{Error, Result as OwnResult};
use specforge::models::{InStretches, Loading, Stretch, TargetModel, load_diffusion};
use specforge::nn::{AttentionMask, KvCache, Rope, RopeConfig, RopeScaling};
use specforge::weights::write_tensors;
use tch::{Device, Kind, Tensor};

use super::Golden;

/// Of logits, states, keys and values: such a share of the largest number, which counts as 1 at least.
const TOLERANCE: f64 = 2e-5;
/// Of logits by a cache that nothing has changed.
const UNCHANGED: f64 = 1e-5;
/// Of cosines and confidences.
const COSINES: f64 = 1e-6;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// What the files say of themselves.
#[derive(Debug, Deserialize)]
struct Config {
    #[serde(default)]
    block_length: usize,
    #[serde(default)]
    gen_length: usize,
    mask_id: i64,
    n_heads: i64,
    d_model: i64,
    n_layers: usize,
    rope_theta: f64,
    #[serde(default)]
    cases: serde_json::Map<String, Value>,
    #[serde(default)]
    runs: serde_json::Map<String, Value>,
    #[serde(default)]
    decode: serde_json::Map<String, Value>,
}

struct Case {
    golden: Golden,
    config: Config,
    model: Box<dyn TargetModel>,
}

impl Case {
    fn open(path: &Path) -> Result<Self, String> {
        let golden = Golden::open(path)?;
        let values: Value = serde_json::from_str(golden.text("config")?).map_err(text)?;
        let folder = tempfile::tempdir().map_err(text)?;
        let mut own = json!({"model_type": "llada", "mask_token_id": values["mask_id"]});
        for key in [
            "d_model",
            "n_heads",
            "n_kv_heads",
            "n_layers",
            "mlp_hidden_size",
            "vocab_size",
            "embedding_size",
            "max_sequence_length",
            "rms_norm_eps",
            "rope_theta",
            "weight_tying",
            "include_qkv_bias",
        ] {
            own[key] = values.get(key).ok_or_else(|| format!("the configuration lacks `{key}`"))?.clone();
        }
        own["activation_type"] = values["activation"].clone();
        std::fs::write(folder.path().join("config.json"), own.to_string()).map_err(text)?;
        let weights = golden.names_after("w.").map(|name| Ok((name.to_owned(), golden.tensor(&format!("w.{name}"))?)));
        let weights = weights.collect::<Result<Vec<_>, String>>()?;
        write_tensors(&folder.path().join("model.safetensors"), &weights, &[]).map_err(text)?;
        let loading = Loading { kind: Kind::Float, device: Device::Cpu, layers: None, copies: None };
        let model = load_diffusion(folder.path(), &loading).map_err(text)?;
        Ok(Self { config: serde_json::from_value(values).map_err(text)?, golden, model })
    }

    fn network(&self) -> Result<Network<'_>, String> {
        Network::of(self.model.as_ref()).map_err(text)
    }

    fn layers(&self) -> Result<&dyn InStretches, String> {
        self.model.in_stretches().ok_or_else(|| "the model does not run in stretches".to_owned())
    }

    fn tensor(&self, name: &str) -> Result<Tensor, String> {
        self.golden.tensor(name)
    }

    /// The first position of the file's block and the one behind its last.
    fn block(&self) -> Result<(i64, i64), String> {
        let block = self.golden.integers("in.block")?;
        Ok((block[0], block[1]))
    }

    /// Keys before they turn, `[B, G, S, D]`, as they are cached here.
    fn turned(&self, keys: &Tensor) -> Tensor {
        let head_dim = self.config.d_model / self.config.n_heads;
        let rope = RopeConfig {
            theta: self.config.rope_theta,
            head_dim,
            max_position_embeddings: 256,
            scaling: RopeScaling::Default,
        };
        let positions = Tensor::arange(keys.size()[2], (Kind::Int64, Device::Cpu)).unsqueeze(0);
        Rope::new(rope, Device::Cpu).tables(&positions, Kind::Float).rotate(keys)
    }
}

/// Refuses what differs by more than this share of the largest number.
fn near(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) -> Result<f64, String> {
    let got = got.reshape(want.size());
    let largest = want.abs().max().double_value(&[]).max(1.0);
    let difference = (got.to_kind(Kind::Double) - want.to_kind(Kind::Double)).abs().max().double_value(&[]);
    match difference <= tolerance * largest {
        true => Ok(difference),
        false => Err(format!("{what}: differs by {difference:.3e} of {largest:.3e}, tolerance {tolerance:.0e}")),
    }
}

/// A text of a tensor `[1, T]` or `[T]`, all of which is prompt: nothing looks at where it ends.
fn text_of(ids: &Tensor) -> Result<Text, String> {
    let ids = Vec::<i64>::try_from(ids.flatten(0, -1)).map_err(text)?;
    Ok(Text { prompt: ids.len(), ids })
}

// ---- passes ------------------------------------------------------------------------------------------------------------

/// `llada_forward_*`
pub fn check_forward(path: &Path) -> Result<String, String> {
    let case = Case::open(path)?;
    let (layers, depth) = (case.layers()?, case.config.n_layers);
    let ids = case.tensor("in.x")?;
    let (rows, tokens) = ids.size2().map_err(text)?;
    // 1. The whole texts: every state, keys, values, logits.
    let mut cache = case.model.new_cache(rows, tokens);
    let mut states = Vec::new();
    let last = whole(layers, depth, &ids, &mut cache, &mut |hidden| states.push(hidden.shallow_clone()))?;
    let mut largest = 0.0f64;
    for (index, state) in states.iter().enumerate().take(depth) {
        let name = format!("mid.full.hidden.{index}");
        largest = largest.max(near(&name, state, &case.tensor(&name)?, TOLERANCE)?);
    }
    near("mid.full.last_block_out", &last, &case.tensor("mid.full.last_block_out")?, TOLERANCE)?;
    let logits = layers.logits(&last);
    largest = largest.max(near("out.full.logits", &logits, &case.tensor("out.full.logits")?, TOLERANCE)?);
    check_cache(&case, &cache, "mid.full", 0..rows)?;
    // 2. The first text with its block, and all behind it, from a cache.
    let (start, end) = case.block()?;
    let only_first = || -> Result<KvCache, String> {
        let mut cache = case.model.new_cache(1, tokens);
        drop(whole(layers, depth, &ids.narrow(0, 0, 1), &mut cache, &mut |_| {})?);
        Ok(cache)
    };
    let network = case.network()?;
    let view = |ids: &Tensor, range: (i64, i64), cache: &mut KvCache| -> Result<Tensor, String> {
        let one = text_of(ids)?;
        let texts = [&one];
        let rows = Rows { texts: &texts, guided: false };
        let view = View::new(&rows, &[range.0], range.1 - range.0);
        Ok(network.logits(&network.view(&rows, &view, cache).map_err(text)?))
    };
    let first = ids.narrow(0, 0, 1);
    let full = logits.narrow(0, 0, 1);
    for (name, range) in [("dual", (start, end)), ("prefix", (start, tokens))] {
        let got = view(&first, range, &mut only_first()?)?;
        let want = full.narrow(1, range.0, range.1 - range.0);
        near(&format!("{name}: a cache that nothing has changed"), &got, &want, UNCHANGED)?;
        let golden = format!("out.{name}_unchanged.logits");
        largest = largest.max(near(&golden, &got, &case.tensor(&golden)?, TOLERANCE)?);
    }
    // 3. Two changed texts in a row on one cache.
    let mut cache = only_first()?;
    for step in [1, 2] {
        let changed = case.tensor(&format!("in.x_changed{step}"))?;
        let got = view(&changed, (start, end), &mut cache)?;
        let golden = format!("out.dual_changed{step}.logits");
        largest = largest.max(near(&golden, &got, &case.tensor(&golden)?, TOLERANCE)?);
        if step == 1 {
            check_cache(&case, &cache, "mid.dual_changed1", 0..1)?;
        }
    }
    let changed = case.tensor("in.x_changed2")?;
    let got = view(&changed, (start, tokens), &mut only_first()?)?;
    largest = largest.max(near("prefix_changed2", &got, &case.tensor("out.prefix_changed2.logits")?, TOLERANCE)?);
    let mut cache = case.model.new_cache(1, tokens);
    let exact = layers.logits(&whole(layers, depth, &changed, &mut cache, &mut |_| {})?);
    near("full_changed2", &exact, &case.tensor("out.full_changed2.logits")?, TOLERANCE)?;
    Ok(format!("largest difference {largest:.1e}"))
}

/// Takes whole texts through all layers.
fn whole(
    layers: &dyn InStretches,
    depth: usize,
    ids: &Tensor,
    cache: &mut KvCache,
    see: &mut dyn FnMut(&Tensor),
) -> Result<Tensor, String> {
    let (rows, tokens) = ids.size2().map_err(text)?;
    let positions = Tensor::arange(tokens, (Kind::Int64, Device::Cpu)).expand([rows, tokens], false);
    let hidden = layers.embed(ids).map_err(text)?;
    let mask = AttentionMask::Whole(vec![tokens; rows as usize]);
    let stretch = Stretch { layers: 0..depth, hidden: &hidden, positions: &positions, mask: &mask };
    let last = layers.run(&stretch, Some(&mut *cache), &mut |_, hidden| see(hidden)).map_err(text)?;
    cache.advance(&vec![tokens; rows as usize]);
    Ok(last)
}

/// Keys and values of every layer.
fn check_cache(case: &Case, cache: &KvCache, prefix: &str, rows: std::ops::Range<i64>) -> Result<(), String> {
    for layer in 0..case.config.n_layers {
        let (keys, values) = (format!("{prefix}.k_prerope.{layer}"), format!("{prefix}.v.{layer}"));
        let want = [case.turned(&case.tensor(&keys)?), case.tensor(&values)?];
        for row in rows.clone() {
            for (got, (name, want)) in
                cache.contents(layer, row as usize).iter().zip([&keys, &values].iter().zip(&want))
            {
                near(name, got, &want.get(row), TOLERANCE)?;
            }
        }
    }
    Ok(())
}

// ---- whole decodes -----------------------------------------------------------------------------------------------------

/// `llada_generate_*`
pub fn check_generate(path: &Path) -> Result<String, String> {
    let case = Case::open(path)?;
    let mut passes = 0;
    for (name, settings) in &case.config.cases {
        passes += check_decode(&case, name, settings).map_err(|problem| format!("{name}: {problem}"))?;
    }
    match case.config.cases.is_empty() {
        true => Err("the configuration has no `cases`".to_owned()),
        false => Ok(format!("{} decodes, {passes} passes", case.config.cases.len())),
    }
}

/// One decode, and how many passes it took.
fn check_decode(case: &Case, name: &str, settings: &Value) -> Result<usize, String> {
    let Config { block_length, gen_length, .. } = case.config;
    let number = |key: &str| settings.get(key).and_then(Value::as_f64);
    let mode = settings["mode"].as_str().ok_or("`mode` is no word")?;
    let steps = number("steps").ok_or("`steps` is no number")? as usize;
    let rule = match number("threshold") {
        Some(threshold) => Rule::Threshold(threshold),
        None => Rule::Quota { steps: steps / (gen_length / block_length) },
    };
    let is_random = case.golden.has(&format!("in.{name}.r.0"));
    let options = Options {
        rule,
        remasking: if is_random { Remasking::Random } else { Remasking::Confidence },
        temperature: number("temperature").unwrap_or(0.0),
        guidance: number("cfg_scale").unwrap_or(0.0),
        cache: match mode {
            "prefix" => Cache::Prefix,
            "dual" => Cache::Dual,
            "none" | "ML-GSAI generate" => Cache::None,
            other => return Err(format!("`mode`: {other} is not known")),
        },
        ..Options::plain(gen_length, block_length)
    };
    let prompt = case.golden.integers("in.prompt")?.iter().map(|&token| token as u32).collect();
    let decoder = Decoder::new(case.network()?, options).map_err(text)?;
    let mut rows = Useful::of(case, name)?;
    let mut recorder = Record::default();
    let answers = decoder.decode(&[Prompt { tokens: prompt, key: 0 }], &mut rows, &mut recorder).map_err(text)?;
    let useful = rows.rows.len();
    if recorder.steps.len() != useful || answers[0].work.evaluations != useful {
        let got = (recorder.steps.len(), answers[0].work.evaluations);
        return Err(format!("expected {useful} passes, got {got:?} steps and passes"));
    }
    for ((step, after), &row) in recorder.steps.iter().zip(&rows.rows) {
        check_row(case, name, row, step, after).map_err(|problem| format!("row {row}: {problem}"))?;
    }
    equal("x_final", &answers[0].text.ids, &case.golden.integers(&format!("out.{name}.x_final"))?)?;
    Ok(useful)
}

fn equal<T: PartialEq + std::fmt::Debug>(what: &str, got: &T, want: &T) -> Result<(), String> {
    match got == want {
        true => Ok(()),
        false => Err(format!("{what}: expected {want:?}, got {got:?}")),
    }
}

/// One row of a golden against the pass that it is of.
fn check_row(case: &Case, name: &str, row: i64, step: &Step, after: &[i64]) -> Result<(), String> {
    let of = |what: &str| case.tensor(&format!("out.{name}.{what}")).map(|all| all.get(row));
    let places = |mask: Tensor| -> Result<Vec<usize>, String> {
        let seen = Vec::<bool>::try_from(mask).map_err(text)?;
        Ok(seen.iter().enumerate().filter(|(_, seen)| **seen).map(|(at, _)| at).collect())
    };
    equal("x_after", &after.to_vec(), &Vec::<i64>::try_from(of("x_after")?).map_err(text)?)?;
    if !case.golden.has(&format!("out.{name}.mask")) {
        return Ok(());
    }
    equal("mask", &step.candidates, &places(of("mask")?)?)?;
    equal("transfer", &step.transferred, &places(of("transfer")?)?)?;
    let view = Vec::<i64>::try_from(of("view_offset_len")?).map_err(text)?;
    equal("view_offset_len", &(step.view.0 as i64, step.view.1 as i64), &(view[0], view[1]))?;
    let quota = of("quota")?.int64_value(&[]);
    equal("quota", &step.quota.map_or(-1, |quota| quota as i64), &quota)?;
    let confidence = Vec::<f64>::try_from(of("confidence")?).map_err(text)?;
    for (&at, &got) in step.candidates.iter().zip(&step.confidence) {
        let want = confidence[at];
        if got.is_nan() || (got - want).abs() > TOLERANCE {
            return Err(format!("confidence at {at}: expected {want}, got {got}"));
        }
    }
    Ok(())
}

/// The rows of a golden that had candidates, and the draws that were made for them. The reference makes a wasted pass where
/// a block's first one left no mask.
struct Useful<'a> {
    case: &'a Case,
    name: &'a str,
    rows: Vec<i64>,
    next: usize,
}

impl<'a> Useful<'a> {
    fn of(case: &'a Case, name: &'a str) -> Result<Self, String> {
        let count = case.tensor(&format!("out.{name}.x_after"))?.size()[0];
        let mask = format!("out.{name}.mask");
        let mut rows: Vec<i64> = (0..count).collect();
        if case.golden.has(&mask) {
            let any = case.tensor(&mask)?.any_dim(1, false);
            rows.retain(|&row| any.int64_value(&[row]) == 1);
            let useful = case.tensor(&format!("out.{name}.nfe_useful"))?.int64_value(&[]);
            equal("nfe_useful", &(rows.len() as i64), &useful)?;
        }
        Ok(Self { case, name, rows, next: 0 })
    }

    /// The next row that something is drawn for.
    fn row(&mut self) -> OwnResult<i64> {
        let row = self.rows.get(self.next).copied();
        self.next += 1;
        row.ok_or_else(|| Error::Failed("more passes than the golden has".to_owned()))
    }
}

impl Draws for Useful<'_> {
    fn gumbel(&mut self, _: Draw, positions: &[i64], _: i64, _: Device) -> OwnResult<Tensor> {
        let row = self.row()?;
        let of = |what: &str| self.case.tensor(&format!("in.{}.{what}.{row}", self.name)).map_err(Error::Failed);
        let drawn = Vec::<i64>::try_from(of("rows")?)?;
        // Positions of the text, or of the slice that the pass ran on.
        let offset = self.case.tensor(&format!("out.{}.view_offset_len", self.name)).map_err(Error::Failed)?;
        let offset = offset.int64_value(&[row, 0]);
        let is_view = drawn.iter().map(|at| at + offset).eq(positions.iter().copied());
        if drawn != positions && !is_view {
            return Err(Error::Failed(format!("row {row} was drawn for {drawn:?}, not for {positions:?}")));
        }
        Ok(of("u")?.log().neg().log().neg())
    }

    fn order(&mut self, _: Draw, positions: &[i64]) -> OwnResult<Vec<f64>> {
        let row = self.row()?;
        let of = |name: String| self.case.tensor(&name).map_err(Error::Failed);
        let drawn =
            Vec::<f64>::try_from(of(format!("in.{}.r.{row}", self.name))?.to_kind(Kind::Double).flatten(0, -1))?;
        let offset = of(format!("out.{}.view_offset_len", self.name))?.int64_value(&[row, 0]);
        let at = |&position: &i64| drawn.get((position - offset) as usize).copied();
        let all: Option<Vec<f64>> = positions.iter().map(at).collect();
        all.ok_or_else(|| Error::Failed(format!("row {row} was drawn for {} positions from {offset}", drawn.len())))
    }
}

/// Every step, with the text behind it.
#[derive(Default)]
struct Record {
    steps: Vec<(Step, Vec<i64>)>,
}

impl Watcher for Record {
    fn step(&mut self, step: &Step, ids: &[i64]) -> OwnResult<()> {
        self.steps.push((step.clone(), ids.to_vec()));
        Ok(())
    }
}

// ---- token skip --------------------------------------------------------------------------------------------------------

#[derive(Debug, Deserialize)]
struct SkipSettings {
    skip_layer_k: usize,
    skip_threshold: f64,
    skip_outlier: f64,
    force_full_every: usize,
    confidence_threshold: Option<f64>,
    steps_per_block: Option<usize>,
}

impl SkipSettings {
    fn of(settings: &Value) -> Result<Self, String> {
        serde_json::from_value(settings.clone()).map_err(text)
    }

    fn skip(&self) -> TokenSkip {
        TokenSkip {
            layer: self.skip_layer_k,
            threshold: self.skip_threshold,
            outlier: self.skip_outlier,
            refresh: self.force_full_every,
        }
    }
}

/// `llada_tokenskip_*`
pub fn check_tokenskip(path: &Path) -> Result<String, String> {
    let case = Case::open(path)?;
    let mut largest = 0.0f64;
    for (name, settings) in &case.config.runs {
        let settings = SkipSettings::of(settings)?;
        let got = check_run(&case, name, &settings).map_err(|problem| format!("run {name}: {problem}"))?;
        largest = largest.max(got);
    }
    for (name, settings) in &case.config.decode {
        let settings = SkipSettings::of(settings)?;
        check_skipping_decode(&case, name, &settings).map_err(|problem| format!("decode {name}: {problem}"))?;
    }
    let (runs, decodes) = (case.config.runs.len(), case.config.decode.len());
    match runs > 0 && decodes > 0 {
        true => Ok(format!("{runs} runs, {decodes} decodes, largest difference {largest:.1e}")),
        false => Err("the configuration lacks `runs` or `decode`".to_owned()),
    }
}

/// Passes over given texts.
fn check_run(case: &Case, name: &str, settings: &SkipSettings) -> Result<f64, String> {
    let network = case.network()?;
    let (start, end) = case.block()?;
    let all = case.tensor("in.x_steps")?;
    let (count, tokens) = all.size2().map_err(text)?;
    let texts: Vec<Text> = (0..count).map(|step| text_of(&all.get(step))).collect::<Result<_, _>>()?;
    let mut cache = network.new_cache(1, tokens);
    let rows = |step: i64| [&texts[step as usize]];
    let first = rows(0);
    let first = Rows { texts: &first, guided: false };
    let view = View::new(&first, &[start], end - start);
    let mut state = BlockState::whole(&network, &first, view, end - start, &mut cache).map_err(text)?;
    let full = case.tensor("mid.full.logits")?.narrow(0, start, end - start);
    let mut largest = near("mid.full.logits", &state.logits().get(0), &full, TOLERANCE)?;
    for step in 1..count {
        let of = |what: &str| case.tensor(what).map(|all| all.get(step - 1));
        let texts = rows(step);
        let rows = Rows { texts: &texts, guided: false };
        let before = state.logits().copy();
        let got = state.step(&network, &rows, &settings.skip(), &mut cache).map_err(text)?;
        let at = |problem: String| format!("step {step}: {problem}");
        let want = of(&format!("out.{name}.active"))?;
        if !got.active.get(0).equal(&want) {
            return Err(at(format!("active: expected {want:?}, got {:?}", got.active.get(0))));
        }
        near("cos", &got.cosines.get(0), &of(&format!("out.{name}.cos"))?, COSINES).map_err(at)?;
        let difference = near("logits", &state.logits().get(0), &of(&format!("out.{name}.logits"))?, TOLERANCE);
        largest = largest.max(difference.map_err(at)?);
        let states = of(&format!("mid.{name}.hidden"))?;
        for (layer, got) in state.outputs().layers().iter().enumerate() {
            near(&format!("hidden of layer {layer}"), &got.get(0), &states.get(layer as i64), TOLERANCE).map_err(at)?;
        }
        // A row that was skipped keeps its logits to the last bit.
        let skipped = got.active.get(0).logical_not().nonzero().squeeze_dim(1);
        let [before, now] = [&before, state.logits()].map(|logits| logits.get(0).index_select(0, &skipped));
        equal("logits of skipped rows", &before.equal(&now), &true).map_err(at)?;
        let upstream = format!("out.upstream_dual.logits.{step}");
        if name == "thr1" && case.golden.has(&upstream) {
            near(&upstream, &state.logits().get(0), &case.tensor(&upstream)?, TOLERANCE).map_err(at)?;
        }
    }
    let keys = case.turned(&case.tensor(&format!("mid.{name}.k_prerope_final"))?);
    let values = case.tensor(&format!("mid.{name}.v_final"))?;
    for layer in 0..case.config.n_layers {
        for (got, want) in cache.contents(layer, 0).iter().zip([&keys, &values]) {
            near(&format!("cache of layer {layer}"), got, &want.get(layer as i64), TOLERANCE)?;
        }
    }
    Ok(largest)
}

/// A whole decode with a dual cache whose passes may skip rows.
fn check_skipping_decode(case: &Case, name: &str, settings: &SkipSettings) -> Result<(), String> {
    let Config { block_length, gen_length, mask_id, .. } = case.config;
    let before = case.tensor(&format!("out.decode_{name}.x_before"))?;
    let start = Vec::<i64>::try_from(before.get(0)).map_err(text)?;
    let prompt: Vec<u32> = start.iter().take_while(|&&id| id != mask_id).map(|&id| id as u32).collect();
    let rule = match (settings.confidence_threshold, settings.steps_per_block) {
        (Some(threshold), None) => Rule::Threshold(threshold),
        (None, Some(steps)) => Rule::Quota { steps },
        both => return Err(format!("expected a threshold or a number of steps, got {both:?}")),
    };
    let options =
        Options { rule, cache: Cache::Dual, skip: Some(settings.skip()), ..Options::plain(gen_length, block_length) };
    let decoder = Decoder::new(case.network()?, options).map_err(text)?;
    let mut record = Record::default();
    let mut draws = specforge::decode::diffusion::Keyed { seed: 0 };
    let answers = decoder.decode(&[Prompt { tokens: prompt, key: 0 }], &mut draws, &mut record).map_err(text)?;
    equal("passes", &(record.steps.len() as i64), &before.size()[0])?;
    let of = |what: &str| case.tensor(&format!("out.decode_{name}.{what}"));
    let (mut computed, mut rows) = (0, 0);
    for (row, (step, after)) in record.steps.iter().enumerate() {
        let at = |problem: String| format!("row {row}: {problem}");
        let row = row as i64;
        let want = Vec::<i64>::try_from(of("block_t")?.get(row)).map_err(text)?;
        equal("block_t", &vec![step.block as i64, step.step as i64], &want).map_err(at)?;
        equal("x_after", after, &Vec::<i64>::try_from(of("x_after")?.get(row)).map_err(text)?).map_err(at)?;
        let active = Vec::<bool>::try_from(of("active")?.get(row)).map_err(text)?;
        let got = step.active.clone().unwrap_or_else(|| vec![true; block_length]);
        equal("active", &got, &active).map_err(at)?;
        if let Some(cosines) = &step.cosines {
            near("cos", &Tensor::from_slice2(cosines), &of("cos")?.get(row), COSINES).map_err(at)?;
            computed += active.iter().filter(|active| **active).count();
            rows += block_length;
        } else {
            computed += start.len();
            rows += start.len();
        }
    }
    equal("x_final", &answers[0].text.ids, &case.golden.integers(&format!("out.decode_{name}.x_final"))?)?;
    let work = &answers[0].work;
    let last = case.config.n_layers - 1;
    equal("rows of the last layer", &work.rows_computed[last], &(computed as u64))?;
    equal("rows skipped", &work.rows_skipped[last], &((rows - computed) as u64))
}
