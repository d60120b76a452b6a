//! P-EAGLE on a device: what is compared and timed, and what a step computes.

use serde_json::{Value, json};
use tch::Kind;

use super::config::{EMBEDDING, PeagleConfig, PeagleShape};
use crate::data::PackedBatch;
use crate::draft::distillation::memory;
use crate::draft::eagle3::Eagle3Shape;
use crate::draft::samples::{Compared, SampleSize, Samples, Timed, Work};
use crate::draft::supervision;
use crate::error::Result;
use crate::models::TargetInfo;

/// A draft with the target's vocabulary and one with its own.
pub(super) fn samples(size: SampleSize) -> Samples {
    let (depths, timed) = match size {
        SampleSize::Full => (8, json!({"algorithm": "peagle", "draft_vocab_size": 32_000, "mask_token_id": 9})),
        SampleSize::Small => {
            let small = json!({
                "algorithm": "peagle", "capture": [0, 1, 2], "draft_vocab_size": 100, "num_depths": 4, "num_layers": 2,
                "mask_token_id": 9,
            });
            (4, small)
        }
    };
    let whole = json!({"algorithm": "peagle", "capture": [0, 1, 2], "num_layers": 2, "mask_token_id": 9});
    let own = json!({
        "algorithm": "peagle", "capture": [0, 1, 2], "num_layers": 1, "num_depths": 5, "draft_vocab_size": 120,
        "loss": "lk_lambda", "norm_before_fc": true, "norm_before_residual": false, "mask_token_id": 9,
    });
    Samples {
        compared: vec![
            Compared { label: "P-EAGLE", kinds: &[Kind::Float, Kind::BFloat16], section: whole },
            Compared { label: "P-EAGLE, own vocabulary", kinds: &[Kind::Float], section: own },
        ],
        timed: vec![vec![Timed { name: format!("peagle {depths}"), section: timed }]],
    }
}

/// A step on documents.
pub(super) fn work(section: &Value, target: &TargetInfo, batch: &PackedBatch, chunk_bytes: usize) -> Result<Work> {
    let config = PeagleConfig::read(section)?;
    let shape = config.shape(target)?;
    // As many rows of a depth as are drawn on average, the first of all: which ones they are matters little.
    let depths: Vec<Vec<i64>> = (0..config.num_depths)
        .map(|depth| {
            let mut rows = supervision::rows(batch, depth, supervision::MaskAlignment::Exact);
            let share = if depth == 0 { 1.0 } else { config.ratio(depth) };
            let count = (rows.len() as f64 * share).round() as usize;
            let all = rows.len();
            // Spread over the documents.
            let mut place = 0;
            rows.retain(|_| {
                place += 1;
                place * count / all.max(1) > (place - 1) * count / all.max(1)
            });
            rows
        })
        .collect();
    let size = &shape.network;
    Ok(Work {
        rows: depths.iter().map(|rows| rows.len() as u64).sum(),
        chunk_rows: config.loss.positions_per_chunk(chunk_bytes, config.num_depths, size, false),
        operations: operations(&shape, &depths, batch),
        remembered: match config.loss.compiled(size.draft_vocab_size != size.vocab_size) {
            Some(_) => memory::operations(&depths, [size.vocab_size, size.draft_vocab_size], size.target_hidden_size),
            None => 0,
        },
    })
}

/// Forward and backward pass on the rows of each depth, and the teacher's projection of every target position that a row
/// learns from.
fn operations(shape: &PeagleShape, depths: &[Vec<i64>], batch: &PackedBatch) -> u64 {
    let size = &shape.network;
    let all = batch.ids.len() as u64;
    let trained: u64 = depths.iter().map(|rows| rows.len() as u64).sum();
    let deeper = trained - depths[0].len() as u64;
    let (first_layer, last_layer) =
        (format!("{}.", Eagle3Shape::layer_prefix(0)), format!("{}.", Eagle3Shape::layer_prefix(size.num_layers - 1)));
    let products = shape.tensors().into_iter().filter(|(name, size)| size.len() == 2 && name != EMBEDDING);
    let weights: u64 = products
        .map(|(name, size)| {
            let size = (size[0] * size[1]) as u64;
            let keys = name.contains("k_proj") || name.contains("v_proj");
            // One row stands for all that read the mask.
            let masked = name.starts_with(&first_layer) && (keys || name.contains("q_proj"));
            let rows = match name.as_str() {
                "fc.weight" => return all * 2 * size, // nobody wants the gradient of captured states
                "lm_head.weight" => trained,
                name if keys || !name.starts_with(&last_layer) => all + if masked { 1 } else { deeper },
                _ if masked => depths[0].len() as u64 + 1,
                _ => trained,
            };
            rows * 3 * size
        })
        .sum();
    // Six products of every pair: scores and values forward; gradients of weights, values, queries and keys back.
    let pair = 6 * (size.layer.num_attention_heads * size.layer.head_dim) as u64;
    let seen =
        |rows: &[i64], depth: u64| rows.iter().map(|&row| batch.positions[row as usize] as u64 + 1 + depth).sum();
    let pairs: u64 = depths.iter().zip(0..).map(|(rows, depth)| -> u64 { seen(rows, depth) }).sum();
    let whole: Vec<i64> = (0..batch.ids.len() as i64).collect();
    let below = pairs + seen(&whole, 0) - seen(&depths[0], 0);
    let attention = pair * (pairs + (size.num_layers as u64 - 1) * below);
    let teacher = memory::taught(depths) * (size.vocab_size * size.target_hidden_size) as u64;
    2 * (weights + attention + teacher)
}
