//! Floating-point operations of a training step, as the mathematics has them: causal attention inside each document,
//! trained rows alone, nothing that is merely computed again. A multiply-add counts as two operations. What a draft
//! computes is its algorithm's to say.

use serde::Serialize;

use crate::error::Result;
use crate::models::TargetConfig;

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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::draft::{self, SampleSize, Work, supervision};
    use crate::eval::gpu_check::{TrainingSetup, programs};

    /// What an algorithm says of the documents of the quick setup.
    fn work(section: &Value) -> Work {
        let setup = TrainingSetup::quick().unwrap();
        let batch = programs::documents(&setup.lengths, 307, 0);
        (draft::algorithm(section).unwrap().work)(section, setup.target.info(), &batch, setup.chunk_bytes).unwrap()
    }

    #[test]
    fn counted_operations_equal_a_count_by_hand() {
        let setup = TrainingSetup::quick().unwrap();
        // H 96, width 168, 3 layers, N 4, G 2, D 32: q 128, k and v 64 each.
        let layer = 96 * 128 + 2 * 96 * 64 + 128 * 96 + 3 * 96 * 168;
        // Scores and weighted values of every visible pair, in four heads of 32.
        let pairs = 24 * 25 / 2 + 9 * 10 / 2 + 17 * 18 / 2 + 14 * 15 / 2;
        let target = 2 * 3 * (64 * layer + pairs * 2 * 4 * 32);
        assert_eq!(of_target(&setup.target, &setup.lengths).unwrap(), target);

        let batch = programs::documents(&setup.lengths, 307, 0);
        // Supervised from token 10 of 24, 4 of 9, 7 of 17, 6 of 14: 14, 5, 10 and 8 tokens. Prediction k needs k + 2
        // of them in a row, which each run of n has n - k - 1 times.
        let rows = [0, 1].map(|head| supervision::rows(&batch, head, supervision::MaskAlignment::Exact).len());
        assert_eq!(rows, [13 + 4 + 9 + 7, 12 + 3 + 8 + 6]);
        // Block: forward and weight gradient. Projection: forward, input gradient, weight gradient.
        let own = work(&json!({"algorithm": "medusa", "num_heads": 2}));
        assert_eq!((own.rows, own.operations), (62, 2 * 62 * (2 * 96 * 96 + 3 * 307 * 96)));
        let shared = json!({"algorithm": "medusa", "num_heads": 2, "num_layers": 2, "projection": "shared"});
        assert_eq!(work(&shared).operations, 2 * 62 * (5 * 96 * 96 + 2 * 307 * 96));
    }

    #[test]
    fn counted_operations_of_eagle3_equal_a_count_by_hand() {
        let section = json!({"algorithm": "eagle3", "capture": [0, 1, 2], "ttt_steps": 3, "draft_vocab_size": 100});
        let eagle3 = draft::algorithm(&section).unwrap();
        let quick = (eagle3.samples)(SampleSize::Small).timed.swap_remove(0).swap_remove(0).section;
        assert_eq!(work(&quick), work(&section));
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
        assert_eq!(work(&section).operations, want);

        // A second layer: all rows of the first at step 0, and the second's own products.
        let config = serde_json::json!({
            "hidden_size": 96, "intermediate_size": 168, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 307, "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
        });
        let mut deeper = section.clone();
        deeper["config"] = config;
        let added = 64 - first;
        let lower = added * (5 * 96 * 128 + 3 * (96 * 128 + 3 * 96 * 168));
        let upper = all * 3 * (2 * 96 * 128 + 3 * 96 * 168) + (64 + all - first) * 3 * 96 * 128;
        let documents = [24u64, 9, 17, 14].map(|length| length * (length + 1) / 2).iter().sum::<u64>();
        let seen: u64 = [(24, 10), (9, 4), (17, 7), (14, 6)]
            .iter()
            .map(|&(length, prompt)| (prompt - 1..=length - 3).map(|row: u64| row + 1).sum::<u64>())
            .sum();
        let attention = 6 * 128 * (pairs + documents - seen);
        assert_eq!(work(&deeper).operations, want + 2 * (lower + upper + attention));
    }
}
