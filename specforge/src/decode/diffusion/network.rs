//! Passes of a masked diffusion model over texts side by side: whole texts, or a view of each at its absolute positions, with
//! what stands outside the view in a cache.
//!
//! Shape legend: `R` rows of a pass (texts, and with guidance the same texts without their prompts behind them), `W` positions
//! of a view, `L` tokens of a block, otherwise as in `nn`.

use tch::{Device, Kind, Tensor};

use crate::device;
use crate::error::{Error, Result};
use crate::models::{InStretches, MaskedDiffusion, Stretch, TargetModel};
use crate::nn::{AttentionMask, KvCache};

/// A prompt and behind it its answer, whose unknown tokens are masks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    /// Token ids.
    pub ids: Vec<i64>,
    /// Tokens of the prompt.
    pub prompt: usize,
}

/// The texts of a pass.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// Texts, at least one.
    pub texts: &'a [&'a Text],
    /// Whether each is there a second time with its prompt masked, all those behind all others: for guidance.
    pub guided: bool,
}

impl Rows<'_> {
    /// `R`
    pub fn count(&self) -> i64 {
        (self.texts.len() * if self.guided { 2 } else { 1 }) as i64
    }

    /// Each text, and whether its prompt is masked.
    fn each(&self) -> impl Iterator<Item = (&Text, bool)> {
        let sides: &[bool] = if self.guided { &[false, true] } else { &[false] };
        sides.iter().flat_map(|&masked| self.texts.iter().map(move |text| (*text, masked)))
    }

    /// Tokens of each row, `[R]`.
    fn lengths(&self) -> Vec<i64> {
        self.each().map(|(text, _)| text.ids.len() as i64).collect()
    }
}

/// Where a view of each row begins, the same for a text and its double: absolute positions, and how many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// First position of each row's view, `[R]`.
    pub origin: Vec<i64>,
    /// `W`
    pub width: i64,
}

impl View {
    /// Views of texts, doubled for guidance where rows are.
    pub fn new(rows: &Rows<'_>, origin: &[i64], width: i64) -> Self {
        let times = if rows.guided { 2 } else { 1 };
        Self { origin: origin.repeat(times), width }
    }

    /// Absolute positions, `[R, W]`.
    pub fn positions(&self, device: Device) -> Tensor {
        let origin = device::send(&Tensor::from_slice(&self.origin), device).unsqueeze(1);
        origin + Tensor::arange(self.width, (Kind::Int64, device)).unsqueeze(0)
    }
}

/// A masked diffusion model whose layers can be run some at a time.
#[derive(Clone, Copy)]
pub struct Network<'a> {
    model: &'a dyn TargetModel,
    layers: &'a dyn InStretches,
    diffusion: MaskedDiffusion,
}

impl<'a> Network<'a> {
    /// Refuses a model of another kind.
    pub fn of(model: &'a dyn TargetModel) -> Result<Self> {
        let diffusion = model.info().diffusion;
        match (diffusion, model.in_stretches()) {
            (Some(diffusion), Some(layers)) => Ok(Self { model, layers, diffusion }),
            _ => Err(Error::Failed("the model is causal: it does not fill masked tokens in".to_owned())),
        }
    }

    /// What makes it one of masked diffusion.
    pub fn diffusion(&self) -> MaskedDiffusion {
        self.diffusion
    }

    /// How many positions before a token the row stands that says what the token is: 0 or 1.
    pub fn shift(&self) -> i64 {
        i64::from(self.diffusion.shift)
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.model.info().num_layers()
    }

    /// Longest text.
    pub fn longest(&self) -> i64 {
        self.model.info().max_position_embeddings
    }

    /// Where inputs are read and logits come.
    pub fn device(&self) -> Device {
        self.model.device()
    }

    /// An empty cache for a pass of so many rows of texts of up to so many tokens.
    pub fn new_cache(&self, rows: i64, longest: i64) -> KvCache {
        // Padding of an overwriting pass takes one slot more.
        self.model.new_cache(rows, longest + 1)
    }

    /// Ids of a view, `[R, W]`; mask tokens behind the end of a text.
    pub fn ids(&self, rows: &Rows<'_>, view: &View) -> Tensor {
        let mask = self.diffusion.mask;
        let mut ids = Vec::with_capacity((rows.count() * view.width) as usize);
        for ((text, is_masked), &origin) in rows.each().zip(&view.origin) {
            let hidden = |at: usize| is_masked && at < text.prompt;
            let at = (origin..origin + view.width).map(|at| at as usize);
            ids.extend(at.map(|at| text.ids.get(at).copied().filter(|_| !hidden(at)).unwrap_or(mask)));
        }
        device::send(&Tensor::from_slice(&ids), self.device()).view([-1, view.width])
    }

    /// Takes whole texts through all layers, into an empty cache where there is one, and gives what the last layer makes of a
    /// view of them, `[R, W, H]`. `see` is told what each layer makes of the view, by the layer's number, before the last
    /// norm.
    pub fn whole(
        &self,
        rows: &Rows<'_>,
        view: &View,
        mut cache: Option<&mut KvCache>,
        see: &mut dyn FnMut(usize, Tensor),
    ) -> Result<Tensor> {
        let lengths = rows.lengths();
        let all = View { origin: vec![0; lengths.len()], width: lengths.iter().copied().max().unwrap_or(0) };
        let hidden = self.layers.embed(&self.ids(rows, &all))?; // [R, T, H]
        let positions = all.positions(self.device());
        let mask = AttentionMask::Whole(lengths.clone());
        let stretch = Stretch { layers: 0..self.layers(), hidden: &hidden, positions: &positions, mask: &mask };
        let places = view.positions(self.device()).unsqueeze(2); // [R, W, 1]
        let of_view = |hidden: &Tensor| {
            let hidden = device::moved(hidden, self.device());
            hidden.gather(1, &places.expand([-1, -1, hidden.size()[2]], false), false) // [R, W, H]
        };
        let see = &mut |state: usize, hidden: &Tensor| {
            if state > 0 {
                see(state - 1, of_view(hidden))
            }
        };
        let last = self.layers.run(&stretch, cache.as_deref_mut(), see)?;
        if let Some(cache) = cache {
            cache.advance(&lengths);
        }
        Ok(of_view(&last))
    }

    /// Takes a view through all layers, with keys and values of all else from the cache; those of the view are written over.
    /// `[R, W, H]`
    pub fn view(&self, rows: &Rows<'_>, view: &View, cache: &mut KvCache) -> Result<Tensor> {
        let hidden = self.layers.embed(&self.ids(rows, view))?; // [R, W, H]
        let positions = view.positions(self.device());
        self.some((0, self.layers()), &hidden, (&positions, &positions), cache, &mut |_, _| {})
    }

    /// Takes states `[R, W, H]` of some positions `[R, W]` through the layers `first .. end`, whose keys and values go to these
    /// slots `[R, W]`: the positions, or behind everything for padding. `see` is told what each layer gives, by its number.
    pub fn some(
        &self,
        (first, end): (usize, usize),
        hidden: &Tensor,
        (positions, slots): (&Tensor, &Tensor),
        cache: &mut KvCache,
        see: &mut dyn FnMut(usize, Tensor),
    ) -> Result<Tensor> {
        cache.overwrite(slots);
        let mask = AttentionMask::Whole(cache.lengths().to_vec());
        let stretch = Stretch { layers: first..end, hidden, positions, mask: &mask };
        let see = &mut |state: usize, hidden: &Tensor| {
            if state > first {
                see(state - 1, device::moved(hidden, self.device()));
            }
        };
        self.layers.run(&stretch, Some(cache), see)
    }

    /// Embeddings of ids `[R, W]`.
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        self.layers.embed(ids)
    }

    /// Logits of what the last layer gives, `[.., H]` to `[.., V]`.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        self.layers.logits(hidden)
    }
}

/// Logits of texts with and without their prompts, `[2B, L, V]`, as one: `without + (scale + 1) (with - without)`, `[B, L, V]`.
/// Classifier-free guidance as ML-GSAI/LLaDA's `generate.py` (commit b7e6c3565f194352da44b38dd12b6970597309f3) has it.
pub fn guided(logits: &Tensor, scale: f64) -> Tensor {
    let half = logits.size()[0] / 2;
    let (with, without) = (logits.narrow(0, 0, half), logits.narrow(0, half, half));
    (with - &without) * (scale + 1.0) + without
}
