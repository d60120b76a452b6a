//! What the checks of block drafters' heads share: shapes, tensors and comparisons of a file.
//!
//! Files of one block (`infer_*`) hold for two steps what the backbone gives (`out.stepN.hidden`), so that a head is checked by
//! itself.

use serde_json::{Map, Value, json};
use specforge::draft::DraftModel;
use specforge::draft::block::{BlockConfig, BlockShape};
use specforge::error::Result as SpecResult;
use specforge::models::TargetInfo;
use tch::{Kind, Tensor};

use super::Golden;
use super::block_training::{Case, Step, text};

pub const TOLERANCE: f64 = 1e-5;

/// A number of a JSON object, or what stands for it.
pub fn number(config: &Value, key: &str, otherwise: f64) -> f64 {
    config.get(key).and_then(Value::as_f64).unwrap_or(otherwise)
}

/// Whether a JSON object says so.
pub fn flag(config: &Value, key: &str, otherwise: bool) -> bool {
    config.get(key).and_then(Value::as_bool).unwrap_or(otherwise)
}

/// A head's configuration and shape on a target of these sizes.
pub fn shape(
    algorithm: &str,
    rows: i64,
    shift: bool,
    sizes: (i64, i64),
    rest: Map<String, Value>,
) -> Result<(BlockConfig, BlockShape), String> {
    let mut section = rest;
    section.insert("algorithm".to_owned(), json!(algorithm));
    section.insert("block_size".to_owned(), json!(rows));
    section.insert("layout".to_owned(), json!(if shift { "shift" } else { "fill_in" }));
    section.insert("num_layers".to_owned(), json!(1));
    section.insert("target_layer_ids".to_owned(), json!([0]));
    section.insert("mask_token_id".to_owned(), json!(0));
    let config = BlockConfig::read(&Value::Object(section)).map_err(text)?;
    let shape = config.shape(&TargetInfo::of(sizes.0, sizes.1, 4, 256)).map_err(text)?;
    Ok((config, shape))
}

/// Finds the tensors `w.NAME` of a file.
pub fn weights(golden: &Golden) -> impl Fn(&str) -> SpecResult<Tensor> + '_ {
    |name| golden.tensor(&format!("w.{name}")).map_err(specforge::error::Error::Failed)
}

/// Largest difference over the largest value, at least 1; an error beyond the tolerance. NaN never passes.
pub fn near(what: &str, got: &Tensor, want: &Tensor) -> Result<f64, String> {
    if got.size() != want.size() {
        return Err(format!("{what}: expected shape {:?}, got {:?}", want.size(), got.size()));
    }
    if want.numel() == 0 {
        return Ok(0.0);
    }
    let (got, want) = (got.to_kind(Kind::Double), want.to_kind(Kind::Double));
    let scale = want.abs().max().double_value(&[]).max(1.0);
    let difference = (got - want).abs().max().double_value(&[]) / scale;
    if difference <= TOLERANCE { Ok(difference) } else { Err(format!("{what}: differs by {difference:.3e}")) }
}

/// Whether integers are equal.
pub fn same(what: &str, got: &Tensor, want: &Tensor) -> Result<(), String> {
    let integers = |tensor: &Tensor| Vec::<i64>::try_from(tensor.to_kind(Kind::Int64).flatten(0, -1)).map_err(text);
    let (got, want) = (integers(got)?, integers(want)?);
    if got == want { Ok(()) } else { Err(format!("{what}: expected {want:?}, got {got:?}")) }
}

/// Whether two numbers are as near as tensors must be.
pub fn close(what: &str, got: f64, want: f64) -> Result<f64, String> {
    near(what, &Tensor::from(got), &Tensor::from(want))
}

/// Sums and counts of a metric over all slots.
pub fn of_slots(case: &Case, step: &Step, metric: &str) -> (f64, f64) {
    let ending = format!("/{metric}");
    let names = case.draft.metrics();
    let places = (0..).zip(&names).filter(|(_, name)| name.ends_with(&ending)).map(|(place, _)| place);
    let sums = places.map(|place: usize| (step.tally.sums.double_value(&[place as i64]), step.tally.counts[place]));
    sums.fold((0.0, 0.0), |all, one| (all.0 + one.0, all.1 + one.1))
}

/// The mean over blocks of the slots before the first wrong one, and the target's own token; `of_blocks` is a metric that is
/// an average over blocks.
pub fn greedy_length(case: &Case, step: &Step, of_blocks: &str) -> Result<f64, String> {
    let place = case.draft.metrics().iter().position(|name| name == of_blocks);
    let place = place.ok_or_else(|| format!("no metric is called {of_blocks}"))?;
    Ok(1.0 + of_slots(case, step, "chain").0 / step.tally.counts[place])
}
