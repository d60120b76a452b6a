//! Medusa on a device: what is compared and timed, and what a step computes.

use serde_json::{Value, json};
use tch::Kind;

use super::{HeadProjection, MedusaConfig};
use crate::data::PackedBatch;
use crate::draft::samples::{Compared, SampleSize, Samples, Timed, Work};
use crate::draft::{loss, supervision, vocabulary};
use crate::error::Result;
use crate::models::TargetInfo;

/// Heads with projections of their own, as many as there is memory for, and heads that share the target's.
pub(super) fn samples(_: SampleSize) -> Samples {
    const BOTH: &[Kind] = &[Kind::Float, Kind::BFloat16];
    const MOST_HEADS: usize = 5;
    let compared = |label, section| Compared { label, kinds: BOTH, section };
    let timed = |num_heads: usize, projection: HeadProjection| {
        let config = MedusaConfig { num_heads, projection, ..MedusaConfig::default() };
        let word = json!(projection);
        let name = format!("medusa {num_heads}x{} {}", config.num_layers, word.as_str().unwrap_or_default());
        Timed { name, section: json!(config) }
    };
    let own = json!({"algorithm": "medusa", "num_heads": 2, "num_layers": 2, "projection": "own"});
    let shared =
        json!({"algorithm": "medusa", "num_heads": 3, "num_layers": 2, "share_layers": true, "projection": "shared"});
    Samples {
        compared: vec![compared("own projections", own), compared("shared projection", shared)],
        timed: vec![
            (1..=MOST_HEADS).rev().map(|heads| timed(heads, HeadProjection::Own)).collect(),
            vec![timed(MOST_HEADS, HeadProjection::Shared)],
        ],
    }
}

/// A step on documents.
pub(super) fn work(section: &Value, target: &TargetInfo, batch: &PackedBatch, chunk_bytes: usize) -> Result<Work> {
    let config = MedusaConfig::read(section)?;
    let tokens = vocabulary::draft_size(section, target.vocab_size)?;
    let rows = (0..config.num_heads).map(|head| supervision::rows(batch, head, config.mask).len() as u64).sum::<u64>();
    let (hidden, vocabulary) = (target.hidden_size as u64, tokens as u64);
    // A block: forward, gradient of the weight, and gradient of the input, which the first block has no use for.
    let blocks = (3 * config.num_layers as u64 - 1) * hidden * hidden;
    let passes = if config.projection == HeadProjection::Own { 3 } else { 2 };
    let operations = 2 * rows * (blocks + passes * vocabulary * hidden);
    Ok(Work { rows, chunk_rows: loss::chunk_rows(chunk_bytes, tokens), operations, remembered: 0 })
}
