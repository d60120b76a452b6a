//! Floating-point operations of a training step, as the mathematics has them: causal attention inside each document,
//! trained rows alone, nothing that is merely computed again. A multiply-add counts as two operations.

use std::collections::HashSet;

use serde::Serialize;

use crate::data::PackedBatch;
use crate::draft::eagle3::{Eagle3Config, Eagle3Shape};
use crate::draft::medusa::{HeadProjection, MedusaConfig};
use crate::draft::supervision;
use crate::error::Result;
use crate::models::{TargetConfig, TargetInfo};

/// Floating-point operations of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Operations {
    /// Forward pass of the target, without its head.
    pub target: u64,
    /// Forward and backward pass of the draft.
    pub draft: u64,
}

/// Forward pass of the layers on packed documents, for a target of plain layers. The embedding is a look-up and the head
/// is not run.
pub fn of_target(config: &TargetConfig, lengths: &[i64]) -> Result<u64> {
    let matrices = config.tensors()?.into_iter().filter(|(name, shape)| name.contains(".layers.") && shape.len() == 2);
    let weights: i64 = matrices.map(|(_, shape)| shape.iter().product::<i64>()).sum();
    // Pairs of a query and a key it sees; each takes a score and a weighted value.
    let pairs: i64 = lengths.iter().map(|length| length * (length + 1) / 2).sum();
    let layer = config.info().draft_template();
    let attention = 2 * pairs * layer.num_attention_heads * layer.head_dim * config.info().num_layers() as i64;
    Ok(2 * (weights * lengths.iter().sum::<i64>() + attention) as u64)
}

/// Trained rows of every head or step.
pub fn trained_rows(batch: &PackedBatch, terms: usize, mask: supervision::MaskAlignment) -> Vec<u64> {
    (0..terms).map(|term| supervision::rows(batch, term, mask).len() as u64).collect()
}

/// Forward and backward pass of Medusa's heads on their rows.
pub fn of_medusa(config: &MedusaConfig, target: &TargetInfo, rows: &[u64]) -> u64 {
    let (hidden, vocabulary) = (target.hidden_size as u64, target.vocab_size as u64);
    // A block: forward, gradient of the weight, and gradient of the input, which the first block has no use for.
    let blocks = (3 * config.num_layers as u64 - 1) * hidden * hidden;
    let passes = if config.projection == HeadProjection::Own { 3 } else { 2 };
    2 * rows.iter().sum::<u64>() * (blocks + passes * vocabulary * hidden)
}

/// Forward and backward pass of EAGLE-3 on its rows, for a mask that trains no row at a step that it did not train
/// before, and the teacher's projection of every target position that a row learns from.
pub fn of_eagle3(config: &Eagle3Config, shape: &Eagle3Shape, batch: &PackedBatch) -> u64 {
    let steps: Vec<Vec<i64>> = (0..config.ttt_steps).map(|k| supervision::rows(batch, k, config.mask)).collect();
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
    let taught: HashSet<i64> =
        steps.iter().zip(0..).flat_map(|(rows, k)| rows.iter().map(move |row| row + 1 + k)).collect();
    let teacher = taught.len() as u64 * (shape.vocab_size * shape.target_hidden_size) as u64;
    2 * (weights + attention + teacher)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::gpu_check::{TrainingSetup, programs};

    #[test]
    fn counted_operations_equal_a_count_by_hand() {
        let setup = TrainingSetup::quick().unwrap();
        // H 96, width 168, 3 layers, N 4, G 2, D 32: q 128, k and v 64 each.
        let layer = 96 * 128 + 2 * 96 * 64 + 128 * 96 + 3 * 96 * 168;
        // Scores and weighted values of every visible pair, in four heads of 32.
        let pairs = 24 * 25 / 2 + 9 * 10 / 2 + 17 * 18 / 2 + 14 * 15 / 2;
        let target = 2 * 3 * (64 * layer + pairs * 2 * 4 * 32);
        assert_eq!(of_target(&setup.target, &setup.lengths).unwrap(), target);

        let config = MedusaConfig { num_heads: 2, ..MedusaConfig::default() };
        let batch = programs::documents(&setup.lengths, 307, 0);
        // Supervised from token 10 of 24, 4 of 9, 7 of 17, 6 of 14: 14, 5, 10 and 8 tokens. Prediction k needs k + 2
        // of them in a row, which each run of n has n - k - 1 times.
        let rows = trained_rows(&batch, 2, config.mask);
        assert_eq!(rows, [13 + 4 + 9 + 7, 12 + 3 + 8 + 6]);
        let dimensions = TargetInfo::of(96, 307, 3, 128);
        // Block: forward and weight gradient. Projection: forward, input gradient, weight gradient.
        let own = 2 * 62 * (2 * 96 * 96 + 3 * 307 * 96);
        assert_eq!(of_medusa(&config, &dimensions, &rows), own);
        let shared = MedusaConfig { projection: HeadProjection::Shared, num_layers: 2, ..config };
        let operations = 2 * 62 * (5 * 96 * 96 + 2 * 307 * 96);
        assert_eq!(of_medusa(&shared, &dimensions, &rows), operations);
    }

    #[test]
    fn counted_operations_of_eagle3_equal_a_count_by_hand() {
        let setup = TrainingSetup::quick().unwrap();
        let batch = programs::documents(&setup.lengths, 307, 0);
        let shape = setup.eagle3.shape(setup.target.info()).unwrap();
        // Rows of the steps: the runs of 14, 5, 10 and 8 supervised tokens without 1, 2 and 3 of each.
        let (first, all) = (33, 33 + 29 + 25);
        // fc of every token: forward and weight gradient of 288 x 96.
        let fc = 64 * 2 * 288 * 96;
        // Queries of rows, keys and values of every token and of later rows: forward and weight gradient with the 2H of
        // the input, input gradient with the feature's H.
        let projections = (all + 2 * (64 + all - first) / 2) * 5 * 96 * 128;
        let rest = all * 3 * (96 * 128 + 3 * 96 * 168 + 100 * 96);
        let mut pairs = 0;
        for (length, prompt) in [(24, 10), (9, 4), (17, 7), (14, 6)] {
            for step in 0..3 {
                pairs += (prompt - 1..=length - 3 - step).map(|row| row + 1 + step).sum::<u64>();
            }
        }
        // Every supervised token but the last of each document is one to predict from.
        let teacher = (13 + 4 + 9 + 7) * 307 * 96;
        let want = 2 * (fc + projections + rest + pairs * 6 * 128 + teacher);
        assert_eq!(of_eagle3(&setup.eagle3, &shape, &batch), want);

        // A second layer: all rows of the first at step 0, and the second's own products.
        let config = serde_json::json!({
            "hidden_size": 96, "intermediate_size": 168, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 307, "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
        });
        let deeper = Eagle3Config { config: Some(config), ..setup.eagle3.clone() };
        let shape = deeper.shape(setup.target.info()).unwrap();
        let added = 64 - first;
        let lower = added * (5 * 96 * 128 + 3 * (96 * 128 + 3 * 96 * 168));
        let upper = all * 3 * (2 * 96 * 128 + 3 * 96 * 168) + (64 + all - first) * 3 * 96 * 128;
        let documents = [24u64, 9, 17, 14].map(|length| length * (length + 1) / 2).iter().sum::<u64>();
        let seen: u64 = [(24, 10), (9, 4), (17, 7), (14, 6)]
            .iter()
            .map(|&(length, prompt)| (prompt - 1..=length - 3).map(|row: u64| row + 1).sum::<u64>())
            .sum();
        let attention = 6 * 128 * (pairs + documents - seen);
        assert_eq!(of_eagle3(&deeper, &shape, &batch), want + 2 * (lower + upper + attention));
    }
}
