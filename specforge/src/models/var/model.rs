//! The transformer: every scale at once for training, or further scales behind a cache.

use tch::{Device, IndexOp, Kind, Tensor};

use super::block::{Block, BlockSteps, norm, six};
use super::cache::ScaleCache;
use super::config::VarConfig;
use crate::error::{Error, Result};
use crate::models::family::GetTensor;
use crate::nn::{Embedding, Head, Linear};

/// What the input of a scale is: for the first one the label alone, for every other one the map of codebook channels
/// `[B, Z, p, p]` that the scales before it add up to, at the scale's own size.
///
/// A scale never sees its own tokens: they are what it predicts.
#[derive(Debug, Clone, Copy)]
pub enum ScaleInput<'a> {
    /// The first scale.
    Start,
    /// Any other one.
    Map(&'a Tensor),
}

/// What follows from the labels alone, computed once an image: the start of the sequence, and the numbers of every adaptive
/// norm.
#[derive(Debug)]
pub struct Conditions {
    /// Embedding of each label, `[B, C]`.
    label: Tensor,
    /// `[B, 1, 6, C]` for each block.
    blocks: Vec<Tensor>,
    /// The projection that the blocks share, `[B, 1, 6, C]`, where they do.
    shared: Option<Tensor>,
    /// Scale and shift of the norm before the head, `[B, 1, 2, C]`.
    head: Tensor,
}

impl Conditions {
    /// Rows `B`.
    pub fn rows(&self) -> i64 {
        self.label.size().first().copied().unwrap_or(0)
    }

    /// The numbers of a block's norms, `[B, 1, 6, C]`: gammas of attention and MLP, their scales, their shifts.
    pub fn block(&self, block: usize) -> Option<&Tensor> {
        self.blocks.get(block)
    }

    /// What all blocks share of them, `[B, 1, 6, C]`, where they do.
    pub fn shared(&self) -> Option<&Tensor> {
        self.shared.as_ref()
    }
}

/// A transformer that predicts the next scale of an image from those before (FoundationVision/VAR @78b9539,
/// `models/var.py`). Values in, values out: a pass changes neither the model nor the cache it is given.
#[derive(Debug)]
pub struct Var {
    config: VarConfig,
    classes: Embedding,
    /// `[1, F, C]`, of the first scale's tokens
    start: Tensor,
    /// `[1, L, C]`
    positions: Tensor,
    /// `[S, C]`, one row a scale
    levels: Embedding,
    /// Number of each token's scale, `[L]` int64.
    level_of: Tensor,
    word: Linear,
    shared: Option<Linear>,
    blocks: Vec<Block>,
    head_norm: Linear,
    head: Linear,
}

impl Var {
    /// Builds the model from a function that gives each tensor of [`VarConfig::tensors`].
    pub fn build(config: VarConfig, get: &mut GetTensor<'_>) -> Result<Self> {
        let VarConfig { embed_dim: width, vocab_size, z_channels, num_classes, .. } = config;
        let mut layer = |name: &str, out: i64, into: i64| {
            let weight = get(&format!("{name}.weight"), &[out, into])?;
            Ok::<_, Error>(Linear { weight, bias: Some(get(&format!("{name}.bias"), &[out])?) })
        };
        let word = layer("word_embed", width, z_channels)?;
        let shared = if config.shared_aln { Some(layer("shared_ada_lin.1", 6 * width, width)?) } else { None };
        let head_norm = layer("head_nm.ada_lin.1", 2 * width, width)?;
        let head = layer("head", vocab_size, width)?;
        let start = get("pos_start", &[1, config.tokens(0), width])?;
        Ok(Self {
            classes: Embedding::plain(get("class_emb.weight", &[num_classes + 1, width])?),
            positions: get("pos_1LC", &[1, config.length(), width])?,
            levels: Embedding::plain(get("lvl_embed.weight", &[config.scales() as i64, width])?),
            level_of: Tensor::from_slice(&config.levels()).to_device(start.device()),
            blocks: (0..config.depth).map(|block| Block::build(&config, block, get)).collect::<Result<_>>()?,
            start,
            word,
            shared,
            head_norm,
            head,
            config,
        })
    }

    /// What it is.
    pub fn config(&self) -> &VarConfig {
        &self.config
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        self.start.device()
    }

    /// Element type of the weights.
    pub fn kind(&self) -> Kind {
        self.start.kind()
    }

    /// The same model with its first blocks alone, and the head behind them; nothing is copied. A draft that costs nothing
    /// to train.
    pub fn truncated(config: &VarConfig, depth: i64, get: &mut GetTensor<'_>) -> Result<Self> {
        Self::build(VarConfig { depth: depth.clamp(1, config.depth), ..config.clone() }, get)
    }

    /// What follows from labels `[B]` int64, each from 0 to [`VarConfig::null_label`].
    pub fn conditions(&self, labels: &Tensor) -> Result<Conditions> {
        let label = self.classes.look_up(&labels.to_device(self.device()))?; // [B, C]
        let bent = label.silu();
        let shared = self.shared.as_ref().map(|projection| six(&projection.forward(&bent)));
        let blocks = self.blocks.iter().map(|block| block.modulation(&bent, shared.as_ref())).collect();
        let head = self.head_norm.forward(&bent).view([-1, 1, 2, self.config.embed_dim]);
        Ok(Conditions { label, blocks, shared, head })
    }

    /// Logits `[B, L, V]` of every token from the true ones before it: `inputs [B, L - F, Z]` are the maps of all scales but
    /// the first, in order, as the image tokenizer's `idx_to_var_input` gives them.
    pub fn forward(&self, labels: &Tensor, inputs: &Tensor) -> Result<Tensor> {
        self.forward_seen(labels, inputs, &mut |_| ())
    }

    /// The same; `see` is shown every block's steps.
    pub fn forward_seen(&self, labels: &Tensor, inputs: &Tensor, see: &mut dyn FnMut(&BlockSteps)) -> Result<Tensor> {
        Ok(self.head.forward(&self.states_seen(labels, inputs, see)?))
    }

    /// What the head reads for [`Var::forward`]: `[B, L, C]`, behind the last norm.
    pub fn states(&self, labels: &Tensor, inputs: &Tensor) -> Result<Tensor> {
        self.states_seen(labels, inputs, &mut |_| ())
    }

    /// The projection of states onto codes; nothing is copied.
    pub fn head(&self) -> Head {
        let bias = self.head.bias.as_ref().map(Tensor::shallow_clone);
        Head { bias, ..Head::plain(self.head.weight.shallow_clone()) }
    }

    fn states_seen(&self, labels: &Tensor, inputs: &Tensor, see: &mut dyn FnMut(&BlockSteps)) -> Result<Tensor> {
        let conditions = self.conditions(labels)?;
        let want = [conditions.rows(), self.config.length() - self.config.tokens(0), self.config.z_channels];
        if inputs.size() != want {
            return Err(Error::Failed(format!("inputs of the scales: expected {want:?}, got {:?}", inputs.size())));
        }
        let rest = self.word.forward(inputs); // [B, L - F, C]
        let states = Tensor::cat(&[self.first(&conditions), rest], 1) + self.places(0, self.config.scales())?;
        let (states, _) = self.through(states, &conditions, &ScaleCache::new(), self.config.scales(), see)?;
        Ok(self.normed(&states, &conditions))
    }

    /// Logits `[B, p * p, V]` of the scales that follow those of `cache`, one for each of `inputs`, in one pass, and the
    /// cache behind them. Where there are several, what a scale sees of the others are those before it.
    ///
    /// Keys and values of a scale depend on its input alone, not on the tokens that are chosen for it.
    pub fn step(
        &self,
        conditions: &Conditions,
        cache: &ScaleCache,
        inputs: &[ScaleInput<'_>],
    ) -> Result<(Vec<Tensor>, ScaleCache)> {
        let begin = cache.scales();
        let end = begin + inputs.len();
        if inputs.is_empty() || end > self.config.scales() {
            return Err(Error::Failed(format!(
                "expected inputs of 1 to {} scales behind {begin}, got {}",
                self.config.scales().saturating_sub(begin),
                inputs.len()
            )));
        }
        if let Some(rows) = cache.rows().filter(|&rows| rows != conditions.rows()) {
            return Err(Error::Failed(format!("the cache holds {rows} rows, the labels {}", conditions.rows())));
        }
        let embedded = inputs.iter().enumerate();
        let embedded = embedded.map(|(place, input)| self.embedded(begin + place, *input, conditions));
        let states = Tensor::cat(&embedded.collect::<Result<Vec<_>>>()?, 1) + self.places(begin, end)?; // [B, T, C]
        let (states, layers) = self.through(states, conditions, cache, end, &mut |_| ())?;
        let logits = self.logits(&states, conditions); // [B, T, V]
        let tokens: Vec<i64> = (begin..end).map(|scale| self.config.tokens(scale)).collect();
        Ok((logits.split_with_sizes(&tokens, 1), cache.with(layers, &tokens)))
    }

    /// Embeddings of the first scale's tokens, `[B, F, C]`, without their places.
    fn first(&self, conditions: &Conditions) -> Tensor {
        conditions.label.unsqueeze(1) + &self.start
    }

    /// Embeddings of a scale's input, `[B, p * p, C]`, without their places.
    fn embedded(&self, scale: usize, input: ScaleInput<'_>, conditions: &Conditions) -> Result<Tensor> {
        let side = self.config.patch_nums[scale];
        let want = [conditions.rows(), self.config.z_channels, side, side];
        match input {
            ScaleInput::Start if scale == 0 => Ok(self.first(conditions)),
            ScaleInput::Map(map) if scale > 0 && map.size() == want => {
                Ok(self.word.forward(&map.flatten(2, -1).transpose(1, 2))) // [B, p * p, C]
            }
            ScaleInput::Start => Err(Error::Failed(format!("scale {scale}: expected a map {want:?}, got the start"))),
            ScaleInput::Map(map) => {
                let want = if scale == 0 { "the start".to_owned() } else { format!("a map {want:?}") };
                Err(Error::Failed(format!("scale {scale}: expected {want}, got a map {:?}", map.size())))
            }
        }
    }

    /// Embeddings of the places of some scales' tokens, `[1, T, C]`: position and number of the scale.
    fn places(&self, begin: usize, end: usize) -> Result<Tensor> {
        let range = self.config.begin(begin)..self.config.begin(end);
        let levels = self.levels.look_up(&self.level_of.i(range.clone()))?; // [T, C]
        Ok(levels.unsqueeze(0) + self.positions.i((.., range, ..)))
    }

    /// Runs the blocks over the scales behind a cache, up to `end`: states `[B, T, C]`, and each block's keys and values.
    fn through(
        &self,
        states: Tensor,
        conditions: &Conditions,
        cache: &ScaleCache,
        end: usize,
        see: &mut dyn FnMut(&BlockSteps),
    ) -> Result<(Tensor, Vec<(Tensor, Tensor)>)> {
        // One scale sees everything before it and all of itself: nothing is hidden.
        let visible = (end - cache.scales() > 1).then(|| {
            let (begin, end) = (self.config.begin(cache.scales()), self.config.begin(end));
            // The keys that are there are the last ones before this pass.
            let of_keys = self.level_of.i(begin - cache.tokens()..end).unsqueeze(0); // [1, S]
            self.level_of.i(begin..end).unsqueeze(1).ge_tensor(&of_keys) // [T, S]
        });
        let (mut states, mut layers) = (states, Vec::new());
        for (number, (block, modulation)) in self.blocks.iter().zip(&conditions.blocks).enumerate() {
            let steps = block.forward(number, &states, modulation, cache.layer(number), visible.as_ref());
            see(&steps);
            states = steps.output;
            layers.push(steps.cache);
        }
        Ok((states, layers))
    }

    /// Logits `[B, T, V]` of states `[B, T, C]`.
    fn logits(&self, states: &Tensor, conditions: &Conditions) -> Tensor {
        self.head.forward(&self.normed(states, conditions))
    }

    /// States `[B, T, C]` behind the last norm.
    fn normed(&self, states: &Tensor, conditions: &Conditions) -> Tensor {
        let (scale, shift) = (conditions.head.i((.., .., 0)), conditions.head.i((.., .., 1))); // [B, 1, C] each
        norm(states, self.config.norm_eps) * (scale + 1.0) + shift
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::var::tiny;

    fn maps(config: &VarConfig, rows: i64) -> Vec<Tensor> {
        let side = |scale: usize| config.patch_nums[scale];
        (1..config.scales())
            .map(|scale| {
                let shape = [rows, config.z_channels, side(scale), side(scale)];
                crate::nn::noise::normal(&shape, 1.0, 5, scale as u64).to_kind(Kind::Double)
            })
            .collect()
    }

    fn inputs(maps: &[Tensor]) -> Vec<ScaleInput<'_>> {
        std::iter::once(ScaleInput::Start).chain(maps.iter().map(ScaleInput::Map)).collect()
    }

    /// Every way of cutting the scales into passes gives the logits of training, and the keys and values of one pass.
    #[test]
    fn passes_over_any_scales_equal_the_forward_pass_of_training() {
        for (shared, normed) in [(false, true), (true, true), (false, false)] {
            let config = VarConfig { shared_aln: shared, attn_l2_norm: normed, ..tiny::config() };
            let model = tiny::model(&config, 3);
            let labels = Tensor::from_slice(&[3i64, 10]);
            let maps = maps(&config, 2);
            let flat: Vec<Tensor> = maps.iter().map(|map| map.flatten(2, -1).transpose(1, 2)).collect();
            let want = model.forward(&labels, &Tensor::cat(&flat, 1)).unwrap();
            let conditions = model.conditions(&labels).unwrap();
            let whole = model.step(&conditions, &ScaleCache::new(), &inputs(&maps)).unwrap().1;
            for cut in [vec![1, 1, 1], vec![2, 1], vec![1, 2], vec![3]] {
                let (mut cache, mut got, mut begin) = (ScaleCache::new(), Vec::new(), 0);
                for count in cut {
                    let (logits, next) = model.step(&conditions, &cache, &inputs(&maps)[begin..begin + count]).unwrap();
                    (cache, begin) = (next, begin + count);
                    got.extend(logits);
                }
                assert!(Tensor::cat(&got, 1).allclose(&want, 0.0, 1e-10, false));
                assert_eq!((cache.scales(), cache.tokens()), (3, 14));
                for block in 0..2 {
                    let (got, want) = (cache.layer(block).unwrap(), whole.layer(block).unwrap());
                    assert!(got.0.allclose(want.0, 0.0, 1e-10, false) && got.1.allclose(want.1, 0.0, 1e-10, false));
                }
            }
        }
    }

    #[test]
    fn a_cache_is_a_value() {
        let model = tiny::model(&tiny::config(), 3);
        let conditions = model.conditions(&Tensor::from_slice(&[1i64])).unwrap();
        let maps = maps(model.config(), 1);
        let (_, one) = model.step(&conditions, &ScaleCache::new(), &inputs(&maps)[..1]).unwrap();
        let before = one.layer(0).unwrap().0.copy();
        let (_, three) = model.step(&conditions, &one, &inputs(&maps)[1..]).unwrap();
        assert_eq!((one.scales(), three.scales(), three.truncated(2).tokens()), (1, 3, 5));
        assert!(one.layer(0).unwrap().0.equal(&before));
        // Drafted and cut again, it is what it was.
        assert!(three.truncated(1).layer(0).unwrap().0.allclose(&before, 0.0, 1e-12, false));
        assert_eq!((three.truncated(0).rows(), three.truncated(9).scales()), (None, 3));
    }

    #[test]
    fn inputs_that_do_not_fit_are_refused() {
        let model = tiny::model(&tiny::config(), 3);
        let conditions = model.conditions(&Tensor::from_slice(&[1i64])).unwrap();
        let maps = maps(model.config(), 1);
        let empty = ScaleCache::new();
        let refused = |inputs: &[ScaleInput<'_>], cache: &ScaleCache, word: &str| {
            let problem = model.step(&conditions, cache, inputs).unwrap_err().to_string();
            assert!(problem.contains(word), "{problem}");
        };
        refused(&[], &empty, "inputs of 1 to 3 scales");
        refused(&[ScaleInput::Map(&maps[0])], &empty, "expected the start");
        refused(&[ScaleInput::Start, ScaleInput::Start], &empty, "expected a map [1, 8, 2, 2], got the start");
        refused(&[ScaleInput::Start, ScaleInput::Map(&maps[1])], &empty, "expected a map [1, 8, 2, 2]");
        let two = model.conditions(&Tensor::from_slice(&[1i64, 2])).unwrap();
        let (_, cache) = model.step(&two, &empty, &[ScaleInput::Start]).unwrap();
        refused(&[ScaleInput::Map(&maps[0])], &cache, "the cache holds 2 rows, the labels 1");
        assert!(model.conditions(&Tensor::from_slice(&[11i64])).is_err());
        assert!(
            model
                .forward(&Tensor::from_slice(&[1i64]), &Tensor::zeros([1, 14, 8], (Kind::Double, Device::Cpu)))
                .is_err()
        );
    }
}
