//! Shapes of training steps whose speed others have published, so that a run on the same card compares directly.
//!
//! A shape is a configuration without a model, and documents. Published numbers count *useful* tokens, those that are not
//! padding; nothing is padded here, so all of `bench-train`'s are.
//!
//! | name | published, on one H200 in bfloat16 | where |
//! | --- | --- | --- |
//! | `eagle3-2048` | 53.4k tokens/s, 76.7 ms, 9.2 GiB | SpecForge, `eagle3-sequence-packing.md` |
//! | `dflash-2048` | 39.9k tokens/s (DFlash2 40.9k), 8.3 GiB (9.4) | SpecForge, `dflash-sequence-packing.md` |
//! | `dflash-2048-128` | 131k tokens/s (DFlash2 130k) | the same |
//! | `dflash-2560` | 36.4k tokens/s of each of two cards (DFlash2 40.0k, DSpark 19.8k), compiled and with CUDA graphs | SpecForge, `torchtitan-h200.md` |
//!
//! Which share of a document is supervised they do not say; here nearly all of it is. Neither is the number of captured
//! layers of the made-up targets; here it is the default. Another head of the family is `--set draft.algorithm=dflash2`.

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::eval::bench_train::BatchShape;

/// A named shape.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// What it is called.
    pub name: &'static str,
    /// What it is, in a few words.
    pub summary: &'static str,
    target: fn() -> Value,
    draft: fn() -> Value,
    lengths: &'static [i64],
    /// Share of each document that is supervised.
    pub supervised: f64,
}

/// Nearly all of a document.
const ALL: f64 = 0.99;

/// Every shape.
pub const SHAPES: &[Shape] = &[
    Shape {
        name: "eagle3-2048",
        summary: "EAGLE-3, hidden 2048, vocabulary 32000, 7 steps",
        target: small_llama,
        draft: || json!({"algorithm": "eagle3", "ttt_steps": 7}),
        lengths: &[1024; 4],
        supervised: ALL,
    },
    Shape {
        name: "dflash-2048",
        summary: "DFlash, 2 layers, hidden 2048, vocabulary 32000, 512 anchors, documents of 128 to 2048",
        target: small_llama,
        draft: || dflash(2, 512),
        lengths: &[128, 256, 512, 2048],
        supervised: ALL,
    },
    Shape {
        name: "dflash-2048-128",
        summary: "the same with 128 anchors and documents of 1024",
        target: small_llama,
        draft: || dflash(2, 128),
        lengths: &[1024; 4],
        supervised: ALL,
    },
    Shape {
        name: "dflash-2560",
        summary: "DFlash, 5 layers, hidden 2560, vocabulary 151936, 512 anchors, documents of 4096: Qwen3-4B",
        target: qwen3_4b,
        draft: || dflash(5, 512),
        lengths: &[4096; 4],
        supervised: ALL,
    },
    Shape {
        name: "dflash-small",
        summary: "DFlash, 2 layers, hidden 256, vocabulary 4096, 32 anchors: for a processor",
        target: || llama([256, 688, 8, 4, 4, 4096]),
        draft: || json!({"algorithm": "dflash", "num_layers": 2, "block_size": 8, "num_anchors": 32, "mask_token_id": 4095}),
        lengths: &[128; 2],
        supervised: 0.5,
    },
];

/// Hidden size, width of the MLP, layers, heads of queries and of keys, vocabulary.
fn llama([hidden, width, layers, heads, groups, vocabulary]: [i64; 6]) -> Value {
    json!({
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocabulary,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
    })
}

fn small_llama() -> Value {
    llama([2048, 8192, 16, 16, 4, 32000])
}

fn qwen3_4b() -> Value {
    json!({
        "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": true,
    })
}

fn dflash(layers: i64, anchors: i64) -> Value {
    json!({"algorithm": "dflash", "num_layers": layers, "block_size": 16, "num_anchors": anchors, "mask_token_id": 0})
}

impl Shape {
    /// The shape of this name.
    pub fn find(name: &str) -> Result<&'static Self> {
        SHAPES.iter().find(|shape| shape.name == name).ok_or_else(|| {
            let known: Vec<String> = SHAPES.iter().map(|shape| format!("{} ({})", shape.name, shape.summary)).collect();
            Error::Usage(format!("--shape: expected one of {}, got `{name}`", known.join("; ")))
        })
    }

    /// Its configuration, in the element type that it is published in on a GPU, and in float32 on a processor.
    pub fn configuration(&self, on_gpu: bool) -> Value {
        let dtype = if on_gpu { "bfloat16" } else { "float32" };
        json!({
            "target": {"path": ".models/none", "dtype": dtype, "config": (self.target)()},
            "draft": (self.draft)(),
            "data": {"train": []},
        })
    }

    /// Its documents.
    pub fn batch(&self) -> BatchShape {
        BatchShape { lengths: self.lengths.to_vec() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RunConfig;
    use crate::draft;
    use crate::plan;

    #[test]
    fn every_shape_is_a_draft_that_can_be_built_with_any_head_of_its_family() {
        for shape in SHAPES {
            let heads: &[&str] = match shape.name.starts_with("dflash") {
                true => &["dflash", "dflash2", "dspark", "lilicorr", "domino", "xpress"],
                false => &["eagle3"],
            };
            for head in heads {
                let set = [format!("draft.algorithm={head}")];
                let config = RunConfig::with(shape.configuration(true), &set).unwrap();
                let target = plan::target_info(&config).unwrap();
                let size = (draft::algorithm(&config.draft).unwrap().size)(&config.draft, &target).unwrap();
                assert!(size.trainable > 0, "{head}");
            }
            assert_eq!(Shape::find(shape.name).unwrap().batch().tokens(), shape.lengths.iter().sum::<i64>());
        }
        assert!(Shape::find("x").unwrap_err().to_string().contains("dflash-2560"));
        let batch: BatchShape = "128,256".parse().unwrap();
        assert_eq!(batch.lengths, [128, 256]);
        assert!("128,0".parse::<BatchShape>().is_err() && "2x".parse::<BatchShape>().is_err());
    }
}
