//! A target that knows its conversations, and its hidden states document by document: what other programs would write.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Value, json};
use specforge::data::{DataConfig, TokenCache, assemble};
use specforge::features::{FeatureSource, OnlineFeatures};
use specforge::models::parts::{Part, Passing};
use specforge::models::{self, LayerWise};
use specforge::nn::AttentionMask;
use specforge::weights::{self, WeightsFolder};
use tch::{Device, Kind, Tensor};

use super::files_of;
use crate::fixture::Workspace;

/// States that the runs of these tests want: the embedding, what layer 1 reads, the final one.
pub(super) const LAYERS: [usize; 3] = [0, 1, 2];

/// One document with everything that other programs write of it.
pub(super) struct Known {
    pub(super) ids: Vec<i64>,
    pub(super) marks: Vec<bool>,
    /// `[T, H]` of each of [`LAYERS`], the last one normed.
    pub(super) states: Vec<Tensor>,
    /// The last one before the norm.
    pub(super) before_norm: Tensor,
}

/// The documents of a workspace.
fn cache(workspace: &Workspace) -> TokenCache {
    let config: DataConfig = serde_json::from_value(workspace.configuration["data"].clone()).unwrap();
    let tokenizer = config.tokenizer(&workspace.path("model")).unwrap();
    TokenCache::build_or_open(&config.train, &tokenizer, &config, &|_, _| ()).unwrap().0
}

/// A workspace that trains EAGLE-3, with a target whose head knows which token follows which in the conversations: the states
/// of a target that knows nothing cannot be told from anybody's.
pub(super) fn taught() -> Workspace {
    let mut workspace = Workspace::new();
    workspace.configuration["draft"] = json!({"algorithm": "eagle3", "capture": [0, 1], "ttt_steps": 2});
    // Nothing is cut, so that documents end as their template ends them.
    workspace.set("data.max_length", 120);
    let path = workspace.path("model/model.safetensors");
    let folder = WeightsFolder::open(&path).unwrap();
    let mut tensors: Vec<(String, Tensor)> = folder
        .names()
        .map(|name| (name.to_owned(), folder.load(name, Kind::Float, Device::Cpu).unwrap().copy()))
        .collect();
    let embedding = tensors.iter().find(|(name, _)| name == "model.embed_tokens.weight").unwrap().1.shallow_clone();
    let directions = &embedding / embedding.norm_scalaropt_dim(2, [1].as_slice(), true); // [V, H]
    let size = embedding.size()[0];
    let follows = Tensor::zeros([size, size], (Kind::Float, Device::Cpu)); // [next, own]
    let cache = cache(&workspace);
    for document in (0..cache.len()).map(|index| cache.document(index)) {
        for pair in document.tokens.windows(2) {
            drop(follows.get(i64::from(pair[1])).get(i64::from(pair[0])).g_add_scalar_(1.0));
        }
    }
    let share = &follows / follows.sum_dim_intlist([0].as_slice(), true, Kind::Float).clamp_min(1.0);
    let head = share.matmul(&directions) * 3.0; // [V, H]
    for (name, tensor) in &mut tensors {
        if name == "lm_head.weight" {
            *tensor = head.shallow_clone();
        } else if name.contains("proj") {
            *tensor = &*tensor * 0.1;
        }
    }
    drop(folder);
    weights::write_tensors(&path, &tensors, &[]).unwrap();
    workspace
}

/// The documents of a workspace with the states of its target, computed here.
pub(super) fn known(workspace: &Workspace) -> Vec<Known> {
    let path = workspace.path("model");
    let cache = cache(workspace);
    let target = models::load_target(&path, Kind::Float, Device::Cpu).unwrap();
    let source = OnlineFeatures::new(target);
    let parts = LayerWise::open(&path, Kind::Float, Device::Cpu).unwrap();
    let one = |index: usize| {
        let batch = Arc::new(assemble(&cache, &[index]));
        let states = source.features(Arc::clone(&batch), &LAYERS).unwrap().hidden;
        let row = |values: &[i64]| Tensor::from_slice(values).unsqueeze(0);
        let (ids, positions) = (row(&batch.ids), row(&batch.positions));
        let mask = AttentionMask::Documents(batch.lengths.clone());
        let mut hidden = None;
        for part in Part::all(parts.info().num_layers()).filter(|part| *part != Part::Norm) {
            let passing = Passing { ids: &ids, positions: &positions, mask: &mask, hidden: hidden.as_ref() };
            hidden = Some(parts.load(part).unwrap().forward(&passing).unwrap());
        }
        let before_norm = hidden.unwrap().squeeze_dim(0);
        Known { ids: batch.ids.clone(), marks: batch.supervised.clone(), states, before_norm }
    };
    (0..cache.len()).map(one).collect()
}

impl Known {
    /// `[T, L, H]`, the last state before the norm: vLLM's and speculators' layout.
    pub(super) fn stacked(&self) -> Tensor {
        Tensor::stack(&[&self.states[0], &self.states[1], &self.before_norm], 1)
    }

    /// Side by side, `[T, nH]`: SpecForge's and SGLang's layout of all states but the final one.
    pub(super) fn others(&self) -> Tensor {
        Tensor::cat(&[&self.states[0], &self.states[1]], 1)
    }
}

/// Holds one store to another: every shard has the same tensors, as far as products of other shapes round.
#[track_caller]
pub(super) fn assert_same_shards(workspace: &Workspace, got: &str, want: &str) {
    let shards = |store: &str| -> Vec<PathBuf> {
        let files = files_of(&workspace.path(store)).into_iter().map(|(path, _)| path);
        files.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors")).collect()
    };
    let names = (shards(got), shards(want));
    assert!(!names.1.is_empty());
    assert_eq!(names.0, names.1);
    for name in names.0 {
        let [got, want] = [got, want].map(|store| {
            let mut tensors = Tensor::read_safetensors(workspace.path(store).join(&name)).unwrap();
            tensors.sort_by(|(one, _), (other, _)| one.cmp(other));
            tensors
        });
        assert_eq!(got.len(), want.len(), "{name:?}");
        for ((got_name, got), (want_name, want)) in got.iter().zip(&want) {
            assert_eq!((got_name, got.size(), got.kind()), (want_name, want.size(), want.kind()), "{name:?}");
            let [got, want] = [got, want].map(|tensor| tensor.to_kind(Kind::Double));
            let furthest = ((&got - &want).abs() / (want.abs() + 1.0)).max().double_value(&[]);
            assert!(furthest < 1e-5, "{name:?}: `{got_name}` differs by {furthest:e}");
        }
    }
}

/// Holds the figures of one run to those of another, as far as stores that were rounded otherwise allow.
#[track_caller]
pub(super) fn assert_same_runs(got: &Value, want: &Value) {
    for figures in ["start", "end"] {
        let (got, want) = (got[figures].as_object().unwrap(), want[figures].as_object().unwrap());
        assert!(want.len() > 3 && want.keys().eq(got.keys()), "{want:?} {got:?}");
        for (name, want) in want {
            let (got, want) = (got[name].as_f64().unwrap(), want.as_f64().unwrap());
            assert!((got - want).abs() < 1e-4 * (1.0 + want.abs()), "{figures}, {name}: {got} and {want}");
        }
    }
}
