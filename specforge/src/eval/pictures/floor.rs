//! What speculation over scales could save at most: the target reads the same codes in fewer passes, so that it saves what a
//! pass costs beside its codes, and no more than leaves one pass over all of them.

use std::time::Instant;

use serde::Serialize;
use tch::{Kind, Tensor};

use crate::error::Result;
use crate::models::var::{ScaleCache, ScaleInput, Var};
use crate::models::vqvae::Quantizer;

/// Passes of each kind that are timed; their median counts.
const REPEATS: usize = 15;

/// Measured passes of one picture, in milliseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Floor {
    /// The target's pass over each scale, behind a cache.
    pub target_scales_ms: Vec<f64>,
    /// The target's pass over all scales at once.
    pub target_whole_ms: f64,
    /// The draft's pass over each scale.
    pub draft_scales_ms: Vec<f64>,
    /// The most that a perfect draft gains which costs nothing: all passes of the target over one pass.
    pub most_without_draft: f64,
    /// The same with the draft's own passes.
    pub most_with_draft: f64,
}

impl Floor {
    /// Times passes over the maps `[1, p * p]` of a picture of this label; with guidance both halves are read, as in decoding.
    pub fn measure(
        (target, draft): (&Var, &Var),
        quantizer: &Quantizer,
        maps: &[Tensor],
        label: i64,
        guided: bool,
    ) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let inputs = inputs(quantizer, maps, if guided { 2 } else { 1 })?;
        let (target_scales_ms, target_whole_ms) = passes(target, &inputs, label, guided)?;
        let (draft_scales_ms, _) = passes(draft, &inputs, label, guided)?;
        let (alone, drafted): (f64, f64) = (target_scales_ms.iter().sum(), draft_scales_ms.iter().sum());
        Ok(Self {
            most_without_draft: alone / target_whole_ms,
            most_with_draft: alone / (target_whole_ms + drafted),
            target_scales_ms,
            target_whole_ms,
            draft_scales_ms,
        })
    }
}

/// What models read for every scale but the first, `[rows, Z, p, p]` each.
fn inputs(quantizer: &Quantizer, maps: &[Tensor], rows: i64) -> Result<Vec<Tensor>> {
    let mut f_hat = quantizer.empty(1);
    let mut inputs = Vec::new();
    for (scale, map) in maps.iter().enumerate().take(maps.len().saturating_sub(1)) {
        f_hat = quantizer.add_scale(&f_hat, scale, map)?;
        inputs.push(quantizer.next_input(&f_hat, scale)?.f_repeat([rows, 1, 1, 1])?);
    }
    Ok(inputs)
}

/// Milliseconds of a pass over each scale, and of one over all.
fn passes(model: &Var, inputs: &[Tensor], label: i64, guided: bool) -> Result<(Vec<f64>, f64)> {
    let labels = match guided {
        true => vec![label, model.config().null_label()],
        false => vec![label],
    };
    let labels = Tensor::from_slice(&labels).to_device(model.device()).to_kind(Kind::Int64);
    let conditions = model.conditions(&labels)?;
    let all: Vec<ScaleInput<'_>> =
        std::iter::once(ScaleInput::Start).chain(inputs.iter().map(ScaleInput::Map)).collect();
    let mut cache = ScaleCache::new();
    let mut scales = Vec::new();
    for input in &all {
        scales.push(median(|| model.step(&conditions, &cache, &[*input]).map(drop))?);
        cache = model.step(&conditions, &cache, &[*input])?.1;
    }
    let whole = median(|| model.step(&conditions, &ScaleCache::new(), &all).map(drop))?;
    Ok((scales, whole))
}

fn median(mut pass: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut times = Vec::new();
    for _ in 0..REPEATS {
        let begun = Instant::now();
        pass()?;
        times.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(times.get(REPEATS / 2).copied().unwrap_or_default())
}
