//! Models of decoder layers: what most families are. A family reads its configuration into a [`Design`], and all the
//! rest follows from that: names of tensors, checks of files, the model, its layers one at a time.
//!
//! Shape legend: see `nn`.

use std::ops::Range;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::keys::Keys;
use super::rope_keys::RopeDesign;
use super::stretch::{InStretches, Stretch};
use super::{Family, ForwardInput, ForwardOutput, GetTensor, LogitRows, TargetInfo, TargetModel};
use crate::device;
use crate::error::{Error, Result};
use crate::nn::rope::RopeTables;
use crate::nn::{AttentionMask, DecoderLayer, Embedding, Head, HeadForm, KvCache, LayerCache, Masks, RmsNorm, Rope};
use crate::weights::WeightsFolder;

pub mod design;
pub mod files;
pub mod mlp;
pub mod names;
mod streamed;
pub mod windows;

pub use design::{AttentionDesign, Design, HeadNormDesign, LayerDesign, NormNames, NormWeights, Silent, Sizes};
pub use mlp::{ExpertCounts, ExpertsDesign, GatedDesign, MlpDesign};

use names::{EMBEDDING, HEAD, NORM};

/// A family whose models are decoder layers and nothing else.
pub trait DecoderFamily {
    /// Reads and checks a configuration. What is wrong is a problem in words that names the key.
    fn design(keys: &Keys<'_>) -> Result<Design, String>;
}

/// The row of the table of families.
pub const fn family<F: DecoderFamily>(model_type: &'static str) -> Family {
    Family {
        model_type,
        info: |values| Ok(read::<F>(values)?.info()),
        tensors: |values| Ok(read::<F>(values)?.tensors()),
        check: Some(|values, weights| files::check(&checked::<F>(values)?, weights)),
        correct: Some(correct::<F>),
        spreads: true,
        build: |values, _, tensor| Ok(Box::new(Decoder::build(&checked::<F>(values)?, tensor)?)),
        part: Some(|values, part, device, tensor| streamed::part(&checked::<F>(values)?, part, device, tensor)),
        tables: |values, tensor| tables(&checked::<F>(values)?, tensor),
        table_names: &[EMBEDDING, HEAD],
        text_defaults: None,
    }
}

fn read<F: DecoderFamily>(values: &Value) -> Result<Design, String> {
    let design = F::design(&Keys::new(values))?;
    design.check()?;
    Ok(design)
}

fn checked<F: DecoderFamily>(values: &Value) -> Result<Design> {
    read::<F>(values).map_err(Error::Failed)
}

/// Takes the head from the files, whatever config.json says of it, and says what was not understood.
fn correct<F: DecoderFamily>(mut values: Value, weights: &WeightsFolder) -> Result<(Value, Vec<String>)> {
    let keys = Keys::new(&values);
    let design = F::design(&keys).map_err(Error::Failed)?;
    let strange = keys.strange();
    let (tied, mut warnings) = files::fit(&design, weights)?;
    if !strange.is_empty() {
        let (folder, names) = (weights.path().display(), strange.join("`, `"));
        warnings.push(format!("{folder}: config.json: passed over what is not known to this family: `{names}`"));
    }
    values[design.spelling.tied] = tied.into();
    Ok((values, warnings))
}

fn tables(design: &Design, tensor: &mut GetTensor<'_>) -> Result<(Embedding, Head)> {
    let shape = [design.sizes.vocab_size, design.sizes.hidden_size];
    let table = tensor(&design.spelling.embedding(), &shape)?;
    let head = if design.sizes.tied { table.shallow_clone() } else { tensor(&design.spelling.head(), &shape)? };
    Ok((embedding(design, table), head_of(design, head)))
}

fn embedding(design: &Design, table: Tensor) -> Embedding {
    let scale = match design.rounds_embedding_scale {
        true => Tensor::from(design.embedding_scale as f32).to_kind(table.kind()).double_value(&[]),
        false => design.embedding_scale,
    };
    Embedding { table, scale }
}

fn head_of(design: &Design, weight: Tensor) -> Head {
    let HeadForm { scale, softcap, .. } = design.head;
    Head { weight, bias: None, scale, softcap }
}

/// A rotary embedding with its frequencies.
fn rope_of(design: &RopeDesign, device: Device) -> Rope {
    match design {
        RopeDesign::Plain(config) => Rope::new(*config, device),
        RopeDesign::Long(long) => Rope::of_lengths(long, device),
    }
}

/// A model with its weights.
pub struct Decoder {
    info: TargetInfo,
    embedding: Embedding,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    head: Head,
    stages: Vec<Stage>,
}

/// Layers that follow each other on one device, mostly all.
struct Stage {
    device: Device,
    layers: Range<usize>,
    /// The model's rotary embeddings.
    ropes: Vec<Rope>,
}

impl Decoder {
    /// Builds the model from a function that gives each tensor by name and shape.
    /// A layer runs where its tensors are.
    pub fn build(design: &Design, tensor: &mut GetTensor<'_>) -> Result<Self> {
        let shapes = design.shapes();
        let mut get = |name: &str| {
            let name = (design.spelling.tensor)(name);
            tensor(&name, &shapes[&name])
        };
        let table = get(EMBEDDING)?;
        let mut layers = Vec::with_capacity(design.layers.len());
        for index in 0..design.layers.len() {
            layers.push(design.build_layer(index, &mut get)?);
        }
        let norm = design.norm(get(NORM)?);
        let head = if design.sizes.tied { table.shallow_clone() } else { get(HEAD)? };
        let (embedding, head) = (embedding(design, table), head_of(design, head));
        let (mut stages, mut first) = (Vec::new(), 0);
        for run in layers.chunk_by(|one, next| one.device() == next.device()) {
            let (device, end) = (run[0].device(), first + run.len());
            let ropes = design.ropes.iter().map(|rope| rope_of(rope, device)).collect();
            stages.push(Stage { device, layers: first..end, ropes });
            first = end;
        }
        Ok(Self { info: design.info(), embedding, layers, norm, head, stages })
    }
}

impl Decoder {
    /// Refuses a mask of the other kind: a text of a causal model does not see what stands behind its tokens, one of a masked
    /// diffusion model sees all of it.
    fn sees(&self, mask: &AttentionMask) -> Result<()> {
        let is_whole = matches!(mask, AttentionMask::Whole(_));
        match (self.info.diffusion.is_some(), is_whole) {
            (true, false) => {
                Err(Error::Failed("a masked diffusion model sees whole texts: it has no causal pass".into()))
            }
            (false, true) => Err(Error::Failed("a causal model sees no text whole: it is no diffusion model".into())),
            _ => Ok(()),
        }
    }

    /// Takes hidden states through some layers. `see` is told what each of them reads, by its number, and in the end what
    /// came out; a state on another device than the embedding's is its affair.
    fn run(
        &self,
        stretch: &Stretch<'_>,
        mut cache: Option<&mut KvCache>,
        see: &mut dyn FnMut(usize, &Tensor),
    ) -> Tensor {
        let home = self.device();
        let stages: Vec<(&Stage, Range<usize>)> =
            self.stages.iter().map(|stage| (stage, stage.part(&stretch.layers))).collect();
        let stages: Vec<_> = stages.into_iter().filter(|(_, layers)| !layers.is_empty()).collect();
        // Masks and rotary tables are made once for each device.
        let away = |(stage, _): &(&Stage, Range<usize>)| {
            let to = stage.device;
            (to != home).then(|| (device::moved(stretch.positions, to), stretch.mask.on(to)))
        };
        let away: Vec<Option<(Tensor, AttentionMask)>> = stages.iter().map(away).collect();
        let mut places: Vec<(Masks<'_>, Vec<RopeTables>)> = Vec::with_capacity(away.len());
        for ((stage, _), away) in stages.iter().zip(&away) {
            let (positions, mask) =
                away.as_ref().map_or((stretch.positions, stretch.mask), |(there, mask)| (there, mask));
            let masks = match cache.as_deref_mut() {
                Some(cache) => cache.masks(mask, positions),
                None => Masks::new(mask, positions),
            };
            places.push((masks, stage.ropes.iter().map(|rope| rope.tables(positions, self.kind())).collect()));
        }
        let mut hidden = stretch.hidden.shallow_clone(); // [B, T, H]
        for ((stage, layers), (masks, ropes)) in stages.iter().zip(&mut places) {
            let from = hidden;
            hidden = device::moved(&from, stage.device);
            // What is looked at at a border crosses it once.
            see(layers.start, if from.device() == home { &from } else { &hidden });
            for (index, layer) in layers.clone().zip(&self.layers[layers.clone()]) {
                if index > layers.start {
                    see(index, &hidden);
                }
                let cache = cache.as_mut().map(|cache| (&mut **cache, index));
                let rope = layer.rope.map(|rope| &ropes[rope]);
                hidden = layer.forward(&hidden, rope, masks.of(layer.window), cache);
            }
        }
        hidden = device::moved(&hidden, home);
        see(stretch.layers.end, &hidden);
        hidden
    }
}

impl InStretches for Decoder {
    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        self.embedding.look_up(ids)
    }

    fn run(
        &self,
        stretch: &Stretch<'_>,
        cache: Option<&mut KvCache>,
        see: &mut dyn FnMut(usize, &Tensor),
    ) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        stretch.check(self.layers.len(), cache.as_deref())?;
        self.sees(stretch.mask)?;
        Ok(Decoder::run(self, stretch, cache, see))
    }

    fn normed(&self, ids: &Tensor, positions: &Tensor, mask: &AttentionMask) -> Result<Tensor> {
        let hidden = self.embedding.look_up(ids)?; // [B, T, H]
        let stretch = Stretch { layers: 0..self.layers.len(), hidden: &hidden, positions, mask };
        stretch.check(self.layers.len(), None)?;
        self.sees(mask)?;
        Ok(self.norm.forward(&Decoder::run(self, &stretch, None, &mut |_, _| {})))
    }

    fn logits(&self, hidden: &Tensor) -> Tensor {
        let _guard = tch::no_grad_guard();
        self.head.logits(&self.norm.forward(hidden))
    }
}

impl Stage {
    /// Its layers among these.
    fn part(&self, layers: &Range<usize>) -> Range<usize> {
        let start = self.layers.start.max(layers.start);
        start..self.layers.end.min(layers.end).max(start)
    }
}

impl TargetModel for Decoder {
    fn info(&self) -> &TargetInfo {
        &self.info
    }

    fn new_cache(&self, rows: i64, capacity: i64) -> KvCache {
        let layer = |layer: &DecoderLayer| LayerCache::Attention {
            groups: layer.attention.groups,
            key_dim: layer.attention.head_dim,
            value_dim: layer.attention.head_dim,
            window: layer.window,
        };
        let layers: Vec<LayerCache> = self.layers.iter().map(layer).collect();
        let devices: Vec<Device> =
            self.stages.iter().flat_map(|stage| vec![stage.device; stage.layers.len()]).collect();
        KvCache::on(&layers, &devices, (rows, capacity), self.kind())
    }

    fn forward(&self, input: &ForwardInput<'_>, cache: Option<&mut KvCache>) -> Result<ForwardOutput> {
        let _guard = tch::no_grad_guard();
        input.check(self.layers.len(), cache.as_deref())?;
        self.sees(input.mask)?;
        let (rows, tokens) = input.ids.size2()?;
        let (last, home) = (self.layers.len(), self.device());
        let mut captured: Vec<(usize, Tensor)> = Vec::new();
        let mut keep = |index: usize, hidden: &Tensor| {
            if input.capture.contains(&index) {
                captured.push((index, device::moved(hidden, home)));
            }
        };

        // A token id outside the vocabulary is an error of libtorch here, and the only one an input can cause from now on.
        let hidden = self.embedding.look_up(input.ids)?; // [B, T, H]
        let ForwardInput { positions, mask, .. } = *input;
        let all = Stretch { layers: 0..last, hidden: &hidden, positions, mask };
        // The last state is the normed one.
        let see = &mut |index: usize, hidden: &Tensor| {
            if index < last {
                keep(index, hidden)
            }
        };
        let mut hidden = self.run(&all, cache, see);
        // The final norm works row by row: where only some rows are projected, only those are normed.
        if input.capture.contains(&last) || matches!(input.logits, LogitRows::All) {
            hidden = self.norm.forward(&hidden);
            keep(last, &hidden);
            let logits = match input.logits {
                LogitRows::None => None,
                LogitRows::All => Some(hidden.view([rows * tokens, -1])),
                LogitRows::Rows(index) => Some(hidden.view([rows * tokens, -1]).index_select(0, index)),
            };
            return Ok(output(input, &captured, logits.map(|rows| self.head.logits(&rows))));
        }
        let logits = match input.logits {
            LogitRows::Rows(index) => {
                let chosen = hidden.view([rows * tokens, -1]).index_select(0, index); // [R, H]
                Some(self.head.logits(&self.norm.forward(&chosen))) // [R, V]
            }
            LogitRows::None | LogitRows::All => None,
        };
        Ok(output(input, &captured, logits))
    }

    fn embedding(&self) -> &Embedding {
        &self.embedding
    }

    fn head(&self) -> &Head {
        &self.head
    }

    fn kind(&self) -> Kind {
        self.embedding.kind()
    }

    fn device(&self) -> Device {
        self.embedding.device()
    }

    fn devices(&self) -> Vec<Device> {
        self.stages.iter().map(|stage| stage.device).collect()
    }

    fn in_stretches(&self) -> Option<&dyn InStretches> {
        Some(self)
    }
}

/// Puts captured states into the order they were asked for.
fn output(input: &ForwardInput<'_>, captured: &[(usize, Tensor)], logits: Option<Tensor>) -> ForwardOutput {
    let find = |index: &usize| captured.iter().find(|(at, _)| at == index).map(|(_, hidden)| hidden.shallow_clone());
    ForwardOutput { hidden: input.capture.iter().filter_map(find).collect(), logits }
}
