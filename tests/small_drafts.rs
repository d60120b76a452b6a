//! Drafts in training on a target, in this process.

use std::collections::HashMap;

use serde_json::json;
use specforge::draft::{DraftContext, DraftModel};
use specforge::models::TargetModel;
use specforge::models::llama::{LlamaConfig, LlamaTarget};
use specforge::nn::noise;
use tch::Kind;

use crate::fixture::{model_config, model_tensors};

/// What a draft of a target is built on: the target's own vocabulary, element type and device, and chunks that hold
/// everything. A test changes what it is about.
pub fn context(target: &dyn TargetModel) -> DraftContext<'_> {
    DraftContext {
        target: target.info().clone(),
        embedding: target.embedding(),
        head: target.head(),
        vocabulary: None,
        weights: None,
        kind: target.kind(),
        device: target.device(),
        seed: 0,
        chunk_bytes: 1 << 24,
    }
}

/// The target of the tests' folders, without a folder.
pub fn target(kind: Kind) -> LlamaTarget {
    let config = model_config(&json!({}));
    let tensors: HashMap<_, _> = model_tensors(&config).into_iter().collect();
    let mut tensor = |name: &str, _: &[i64]| Ok(tensors[name].to_kind(kind));
    LlamaTarget::build(LlamaConfig::from_value(&config).unwrap(), &mut tensor).unwrap()
}

/// Moves every parameter away from its start, where heads are the target's own.
pub fn disturb(draft: &dyn DraftModel) {
    let _guard = tch::no_grad_guard();
    for (stream, parameter) in draft.parameters().iter().enumerate() {
        let change = noise::normal(&parameter.value.size(), 0.05, 3, stream as u64);
        drop(parameter.value.shallow_clone().g_add_(&change.to_kind(parameter.value.kind())));
    }
}
