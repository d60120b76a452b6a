//! Medusa's losses and gradients against FasterDecoding/Medusa `e2a5d20` (Medusa-1: plain sum of the heads) and the
//! axolotl fork `76bc572` (Medusa-2: the target's own loss plus 0.2 x 0.8^(k+1) x head k).
//!
//! File layout: `l.*` hidden states, labels (-100: not trained), logits and losses; `w.*` weights; `g.*` gradients of
//! the Medusa-1 loss.

use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use specforge::data::{DocumentRef, PackedBatch};
use specforge::draft::loss::{Hard, Projection, Rows, cross_entropy};
use specforge::draft::medusa::{Medusa, MedusaConfig};
use specforge::draft::{DraftContext, DraftModel, Gradients};
use specforge::features::FeatureBatch;
use specforge::models::TargetInfo;
use specforge::nn::{Embedding, Head};
use specforge::weights::WeightsFolder;
use tch::{Device, Kind, Tensor};

use crate::fixture::STEP;

const TOLERANCE: f64 = 1e-5;

/// Checks one file and says what was compared.
pub fn check(path: &Path) -> Result<String, String> {
    let file = WeightsFolder::open(path).map_err(|error| error.to_string())?;
    let get = |name: &str| {
        let kind = file.kind(name).ok_or(format!("`{name}` is not in the file"))?;
        file.load(name, kind, Device::Cpu).map_err(|error| error.to_string())
    };
    let logits = get("l.medusa_logits")?; // [K, B, T, V]
    let [num_heads, rows, tokens, vocabulary] = <[i64; 4]>::try_from(logits.size())
        .map_err(|shape| format!("medusa_logits: expected four axes, got {shape:?}"))?;
    let num_layers = (0..).take_while(|layer| file.contains(&format!("w.0.{layer}.linear.weight"))).count();
    let hidden_states = get("l.hidden")?; // [B, T, H]
    let hidden_size = hidden_states.size()[2];
    let labels = get("l.labels")?; // [B, T]

    let labels_flat: Vec<i64> =
        Vec::try_from(labels.reshape([-1])).map_err(|error: tch::TchError| error.to_string())?;
    let batch = PackedBatch {
        ids: labels_flat.iter().map(|&label| label.max(0)).collect(),
        positions: (0..rows).flat_map(|_| 0..tokens).collect(),
        supervised: labels_flat.iter().map(|&label| label >= 0).collect(),
        lengths: vec![tokens; rows as usize],
        documents: (0..rows).map(|row| DocumentRef::new(format!("row {row}"), row as u64)).collect(),
    };
    let build = |weights: &[f64]| {
        let target = TargetInfo::of(hidden_size, vocabulary, 1, tokens);
        let head = Tensor::zeros([vocabulary, hidden_size], (Kind::Float, Device::Cpu));
        let config = MedusaConfig::read(&json!({
            "num_heads": num_heads, "num_layers": num_layers, "loss_weights": weights, "mask": "label",
        }));
        // Chunks of five rows, so that the file is passed through several.
        let chunk_bytes = 5 * 4 * vocabulary as usize;
        let context = DraftContext {
            target,
            embedding: &Embedding::plain(head.shallow_clone()),
            head: &Head::plain(head),
            vocabulary: None,
            weights: None,
            kind: Kind::Float,
            device: Device::Cpu,
            seed: 0,
            chunk_bytes,
        };
        let draft = config.and_then(|config| Medusa::new(config, &context)).map_err(|error| error.to_string())?;
        for parameter in draft.parameters() {
            let _guard = tch::no_grad_guard();
            parameter.value.shallow_clone().copy_(&get(&format!("w.{}", parameter.name))?);
        }
        Ok::<_, String>(draft)
    };
    let features = FeatureBatch::new(Arc::new(batch.clone()), vec![hidden_states.reshape([-1, hidden_size])]);

    // Medusa-1: logits row by row, losses head by head, every gradient.
    let draft = build(&vec![1.0; num_heads as usize])?;
    for head in 0..num_heads {
        let got = draft.compute_logits(head as usize, &features.hidden[0]).view([rows, tokens, vocabulary]);
        near(&format!("logits of head {head}"), &got, &logits.get(head))?;
    }
    let plan = draft.plan(&batch, STEP).map_err(|error| error.to_string())?;
    let counts = &plan.counts;
    let zeros = |parameter: &specforge::draft::Parameter| parameter.value.zeros_like().detach();
    let mut gradients: Vec<Tensor> = draft.parameters().iter().map(zeros).collect();
    let tally = draft
        .accumulate(&features, &plan, counts, &mut Gradients::new(&mut gradients))
        .map_err(|error| error.to_string())?;
    near("medusa1_loss", &tally.objective, &get("l.medusa1_loss")?.squeeze())?;
    let per_head = get("l.medusa1_per_head")?;
    for head in 0..num_heads {
        let sum = tally.sums.get(head * tally.sums.size()[0] / num_heads);
        near(&format!("loss of head {head}"), &(sum / counts[head as usize]), &per_head.get(head))?;
    }
    for (parameter, gradient) in draft.parameters().iter().zip(&gradients) {
        near(&format!("gradient of {}", parameter.name), gradient, &get(&format!("g.{}", parameter.name))?)?;
    }

    // Medusa-2: the target's own loss, and the heads decayed from one step further on.
    let weights: Vec<f64> = (1..=num_heads as i32).map(|power| 0.2 * 0.8f64.powi(power)).collect();
    let tally = build(&weights)?.evaluate(&features, &plan, counts).map_err(|error| error.to_string())?;
    let (own_rows, own_labels) = next_token_rows(&labels_flat, tokens as usize);
    let base = get("l.base_logits")?.reshape([-1, vocabulary]).index_select(0, &Tensor::from_slice(&own_rows));
    let identity = Head::plain(Tensor::eye(vocabulary, (Kind::Float, Device::Cpu)));
    let mut projection = Projection { head: &identity, gradient: None };
    let rows = Rows { input: &base, targets: Hard(&Tensor::from_slice(&own_labels)), weights: None };
    let own = cross_entropy(rows, &mut projection, None, 5).map_err(|error| error.to_string())?;
    near("medusa2_loss", &(tally.objective + own.sum / own_rows.len() as f64), &get("l.medusa2_loss")?.squeeze())?;
    let (trees, verifications) = super::medusa_trees::check_buffers(&super::Golden::open(path)?)?;
    Ok(format!(
        "{trees} trees, {verifications} verifications, {num_heads} heads of {num_layers} blocks: logits, losses, {} gradients",
        gradients.len()
    ))
}

/// Rows whose next token is trained, with that token.
fn next_token_rows(labels: &[i64], tokens: usize) -> (Vec<i64>, Vec<i64>) {
    let inside = |row: &usize| row % tokens + 1 < tokens && labels[row + 1] >= 0;
    (0..labels.len()).filter(inside).map(|row| (row as i64, labels[row + 1])).unzip()
}

fn near(what: &str, got: &Tensor, want: &Tensor) -> Result<(), String> {
    let difference = (got.to_kind(Kind::Double) - want.to_kind(Kind::Double)).abs().max().double_value(&[]);
    // A comparison with NaN is false, and then this fails as it should.
    if difference <= TOLERANCE { Ok(()) } else { Err(format!("{what}: largest difference {difference:e}")) }
}
