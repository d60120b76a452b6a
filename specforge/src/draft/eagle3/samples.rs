//! EAGLE-3 on a device: what is compared and timed, and what a step computes.

use serde_json::{Value, json};
use tch::Kind;

use super::config::{Eagle3Config, Eagle3Shape};
use super::steps::trained;
use crate::data::PackedBatch;
use crate::draft::StepKey;
use crate::draft::distillation::{self, memory};
use crate::draft::samples::{Compared, SampleSize, Samples, Timed, Work};
use crate::error::Result;
use crate::models::TargetInfo;

/// A draft with the target's vocabulary and one with its own, and both ways to keep the graph.
pub(super) fn samples(size: SampleSize) -> Samples {
    let full = Eagle3Config { draft_vocab_size: Some(32_000), ttt_steps: 7, ..Eagle3Config::default() };
    let config = match size {
        SampleSize::Full => full,
        SampleSize::Small => {
            Eagle3Config { draft_vocab_size: Some(100), ttt_steps: 3, capture: Some(vec![0, 1, 2]), ..full }
        }
    };
    let timed = |recompute: bool| {
        let name = format!("eagle3 {} {}", config.ttt_steps, if recompute { "recomputed" } else { "one graph" });
        vec![Timed { name, section: json!(Eagle3Config { recompute, ..config.clone() }) }]
    };
    let whole = json!({"algorithm": "eagle3", "capture": [0, 1, 2], "ttt_steps": 4});
    let own = json!({
        "algorithm": "eagle3", "capture": [0, 1, 2], "ttt_steps": 7, "draft_vocab_size": 120, "loss": "lk_lambda",
        "recompute": false,
    });
    Samples {
        compared: vec![
            Compared { label: "EAGLE-3", kinds: &[Kind::Float, Kind::BFloat16], section: whole },
            Compared { label: "EAGLE-3, own vocabulary", kinds: &[Kind::Float], section: own },
        ],
        timed: vec![timed(true), timed(false)],
    }
}

/// A step on documents.
pub(super) fn work(section: &Value, target: &TargetInfo, batch: &PackedBatch, chunk_bytes: usize) -> Result<Work> {
    let config = Eagle3Config::read(section)?;
    let shape = config.shape(target)?;
    let key = StepKey { seed: 1, step: 0, total: 1 };
    let steps = trained(batch, config.ttt_steps, config.mask, (config.step_share, key));
    Ok(Work {
        rows: steps.iter().map(|rows| rows.len() as u64).sum(),
        chunk_rows: distillation::positions_per_chunk(
            chunk_bytes,
            config.ttt_steps,
            shape.vocab_size,
            shape.draft_vocab_size,
        ),
        operations: operations(&shape, &steps, batch),
        remembered: memory::operations(&steps, [shape.vocab_size, shape.draft_vocab_size], shape.target_hidden_size),
    })
}

/// Forward and backward pass on the rows of each step, for a mask that trains no row at a step that it did not train
/// before, and the teacher's projection of every target position that a row learns from.
fn operations(shape: &Eagle3Shape, steps: &[Vec<i64>], batch: &PackedBatch) -> u64 {
    let all = batch.ids.len() as u64;
    let trained: u64 = steps.iter().map(|rows| rows.len() as u64).sum();
    let later = trained - steps[0].len() as u64;
    // The input of the first layer's projections is half embedding, whose gradient nobody wants if it is frozen.
    let frozen = shape.hidden_size == shape.target_hidden_size;
    let last_layer = format!("{}.", Eagle3Shape::layer_prefix(shape.num_layers - 1));
    let first_layer = format!("{}.", Eagle3Shape::layer_prefix(0));
    let products = shape.tensors().into_iter().filter(|(name, size)| size.len() == 2 && !name.contains("embed_tokens"));
    let weights: u64 = products
        .map(|(name, size)| {
            let size = (size[0] * size[1]) as u64;
            let keys = name.contains("k_proj") || name.contains("v_proj");
            let rows = match name.as_str() {
                "fc.weight" => return all * 2 * size, // nobody wants the gradient of captured states either
                "lm_head.weight" => trained,
                // Step 0 gives keys of every row, and layers above one need all of its rows.
                name if keys || !name.starts_with(&last_layer) => all + later,
                _ => trained,
            };
            let half = frozen && name.starts_with(&first_layer) && (keys || name.contains("q_proj"));
            rows * if half { 5 * size / 2 } else { 3 * size }
        })
        .sum();
    // A row sees its document up to itself, and one key for every step since. Six products of every pair: scores and
    // values forward; gradients of weights, values, queries and keys back.
    let pair = 6 * (shape.layer.num_attention_heads * shape.layer.head_dim) as u64;
    let seen = |rows: &[i64], k: u64| rows.iter().map(|&row| batch.positions[row as usize] as u64 + 1 + k).sum::<u64>();
    let pairs: u64 = steps.iter().zip(0..).map(|(rows, k)| seen(rows, k)).sum();
    let whole: Vec<i64> = (0..batch.ids.len() as i64).collect();
    let below = pairs - seen(&steps[0], 0) + seen(&whole, 0);
    let attention = pair * (pairs + (shape.num_layers as u64 - 1) * below);
    let teacher = memory::taught(steps) * (shape.vocab_size * shape.target_hidden_size) as u64;
    2 * (weights + attention + teacher)
}
