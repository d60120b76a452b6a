//! Block drafters on a device: what is compared and timed, and what a step computes.

use serde_json::{Value, json};
use tch::Kind;

use super::blocks::BlockPlan;
use super::config::BlockConfig;
use super::losses::Labels;
use crate::data::PackedBatch;
use crate::draft::StepKey;
use crate::draft::samples::{Compared, SampleSize, Samples, Timed, Work};
use crate::error::Result;
use crate::models::TargetInfo;

/// Plain DFlash stands for the family, which has one backbone.
pub(super) fn samples(size: SampleSize) -> Samples {
    let _ = Labels::Data;
    let whole = json!({"algorithm": "dflash", "num_layers": 2, "block_size": 4, "num_anchors": 64, "mask_token_id": 1});
    let full =
        json!({"algorithm": "dflash", "num_layers": 5, "block_size": 16, "num_anchors": 512, "mask_token_id": 1});
    let timed = match size {
        SampleSize::Small => whole.clone(),
        SampleSize::Full => full,
    };
    Samples {
        compared: vec![Compared { label: "DFlash", kinds: &[Kind::Float, Kind::BFloat16], section: whole }],
        timed: vec![vec![Timed { name: "dflash".to_owned(), section: timed }]],
    }
}

/// A step on documents.
pub(super) fn work(section: &Value, target: &TargetInfo, batch: &PackedBatch, chunk_bytes: usize) -> Result<Work> {
    let config = BlockConfig::read(section)?;
    let shape = config.shape(target)?;
    let plan = BlockPlan::pick(batch, &shape, config.mask, config.num_anchors, StepKey::EVALUATION);
    let trained: u64 = plan.supervised().iter().flatten().filter(|mark| **mark).count() as u64;
    let rows = plan.blocks.len() as u64 * shape.block_size as u64;
    let context: u64 = plan
        .blocks
        .chunk_by(|one, other| one.document == other.document)
        .map(|blocks| blocks.iter().map(|block| block.position as u64).max().unwrap_or(0))
        .sum();
    let numbers: u64 = super::tensors(&config, &shape)?
        .iter()
        .filter(|spec| spec.shape.len() == 2)
        .map(|spec| {
            let size = spec.shape.iter().product::<i64>() as u64;
            match spec.name.as_str() {
                "fc.weight" => context * 2 * size, // nobody wants the gradient of captured states
                name if name.contains("k_proj") || name.contains("v_proj") => (rows + context) * 3 * size,
                _ => rows * 3 * size,
            }
        })
        .sum();
    // Six products of every pair of a row and what it sees; see `eagle3`.
    let pair = 6 * (shape.layer.num_attention_heads * shape.layer.head_dim) as u64;
    let seen = |block: &super::blocks::Block, window: Option<i64>| {
        let context = window.map_or(block.position, |window| block.position.min(window));
        (context + shape.block_size) as u64 * shape.block_size as u64
    };
    let attention: u64 =
        shape.layers.iter().flat_map(|layer| plan.blocks.iter().map(|block| pair * seen(block, layer.window))).sum();
    let head = (shape.draft_vocab_size * shape.hidden_size) as u64;
    let vocabulary = trained * head * (2 + u64::from(config.wants_teacher()));
    let of_slot = 4 * (shape.vocab_size + 6 * shape.draft_vocab_size);
    Ok(Work {
        rows: trained,
        chunk_rows: (chunk_bytes as i64 / of_slot).max(1),
        operations: 2 * (numbers + attention + vocabulary),
    })
}
