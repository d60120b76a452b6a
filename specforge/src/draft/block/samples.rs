//! Block drafters on a device: what is compared and timed, and what a step computes.

use serde_json::{Value, json};
use tch::Kind;

use super::blocks::BlockPlan;
use super::config::BlockConfig;
use crate::data::PackedBatch;
use crate::draft::StepKey;
use crate::draft::samples::{Compared, Documents, Footprint, SampleSize, Samples, Timed, Work};
use crate::error::Result;
use crate::models::TargetInfo;

/// Plain DFlash stands for the family, which has one backbone.
pub(crate) fn samples(size: SampleSize) -> Samples {
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

/// What a micro-batch takes, and what a plan says of blocks.
pub(super) fn footprint(section: &Value, target: &TargetInfo, documents: Documents) -> Result<Footprint> {
    let config = BlockConfig::read(section)?;
    let shape = config.shape(target)?;
    let Documents { count, tokens, supervised } = documents;
    // The last token has nothing behind it.
    let eligible = (supervised * tokens.saturating_sub(1) as f64).ceil() as u64;
    let blocks = count * eligible.min(config.num_anchors as u64);
    let rows = blocks * shape.block_size as u64;
    let context = if blocks == 0 { 0 } else { count * tokens };
    let layers = shape.layers.len() as u64;
    let (hidden, dim) = (shape.hidden_size as u64, shape.layer.head_dim as u64);
    let queries = shape.layer.num_attention_heads as u64 * dim;
    let keys = shape.layer.num_key_value_heads as u64 * dim;
    // Inputs and outputs of norms, products, rotations and activations, each once; attention keeps no pair of rows.
    let of_row = 5 * hidden + 4 * queries + 4 * keys + 4 * shape.layer.intermediate_size as u64;
    let of_context = (shape.target_layer_ids.len() as u64 + 2) * hidden + layers * 4 * keys;
    let (size, anchors) = (shape.block_size, config.num_anchors);
    let lines = vec![
        ("layers", format!("{layers}, on outputs of target layers {:?}", shape.target_layer_ids)),
        ("block", format!("{size} rows, {} of them trained; mask token {}", shape.slots(), shape.mask_token_id)),
        ("anchors", format!("at most {anchors} a document")),
        ("micro-batch", format!("{blocks} blocks of {count} documents of {tokens} tokens: {rows} rows")),
    ];
    // In floating point: no product of sizes that pass the checks overflows.
    let numbers = (rows * layers) as f64 * of_row as f64 + context as f64 * of_context as f64;
    Ok(Footprint { rows: Some(rows), numbers: numbers.min(2f64.powi(56)) as u64, lines })
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
    Ok(Work {
        rows: trained,
        chunk_rows: (chunk_bytes as i64 / super::slot_bytes(&config, &shape)).max(1),
        operations: 2 * (numbers + attention + vocabulary),
        remembered: 0,
    })
}
