//! Stores whose checksums hold and whose hidden states are not the target's.

use std::fs;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};
use serde_json::json;
use specforge::features::store::float8;
use specforge::models::TargetIdentity;
use specforge::weights::{self, writer::TensorBytes};

use super::{ELEMENTS, capture, edit_json, files_of, offline, refused};
use crate::fixture::{Workspace, json_of, model_config, model_tensors};

/// A tensor of a shard: name, type, shape, bytes.
type Held = (String, Dtype, Vec<usize>, Vec<u8>);

/// Changes a shard and makes length and checksum fit again.
fn tamper(store: &Path, edit: impl FnOnce(&mut Vec<Held>)) {
    let path = store.join("shard-00001.safetensors");
    let bytes = fs::read(&path).unwrap();
    let mut tensors: Vec<Held> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, view)| (name.to_owned(), view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        .collect();
    edit(&mut tensors);
    let tensors: Vec<(String, TensorBytes<'_>)> = tensors
        .into_iter()
        .map(|(name, dtype, shape, bytes)| (name, TensorBytes { dtype, shape, bytes: bytes.into() }))
        .collect();
    weights::write_bytes(&path, &tensors, &[]).unwrap();
    let bytes = fs::read(&path).unwrap();
    edit_json(&store.join("store.json"), |value| {
        let entry = &mut value["shards"][1];
        assert_eq!(entry["file"], "shard-00001.safetensors");
        entry["bytes"] = json!(bytes.len());
        entry["crc32c"] = json!(crc32c::crc32c(&bytes));
    });
}

fn named<'a>(tensors: &'a mut [Held], name: &str) -> &'a mut Held {
    tensors.iter_mut().find(|(other, ..)| other == name).unwrap_or_else(|| panic!("no `{name}`"))
}

/// Bytes of states and scales of a layer.
fn states(tensors: &mut [Held], layer: usize) -> Vec<Vec<u8>> {
    let names = [format!("hidden.{layer}"), format!("hidden.{layer}.scale")];
    let bytes = |name: &String| tensors.iter().find(|(other, ..)| other == name).map(|held| held.3.clone());
    names.iter().filter_map(bytes).collect()
}

fn set_states(tensors: &mut [Held], layer: usize, bytes: Vec<Vec<u8>>) {
    for (name, bytes) in ["", ".scale"].into_iter().zip(bytes) {
        named(tensors, &format!("hidden.{layer}{name}")).3 = bytes;
    }
}

/// Notes the norms that the states have now, as a writer would that was given these states.
fn note_norms(tensors: &mut [Held]) {
    let rows = named(tensors, "probes.rows").3.as_chunks().0.iter().map(|&row| i64::from_le_bytes(row) as usize);
    let rows: Vec<usize> = rows.collect();
    let count = named(tensors, "ids").2[0];
    let columns: Vec<Vec<f32>> = (0..3)
        .map(|layer| {
            let held = states(tensors, layer);
            let dtype = named(tensors, &format!("hidden.{layer}")).1;
            let width = held[0].len() / count * 8 / dtype.bitsize();
            let values: Vec<f32> = match dtype {
                Dtype::F32 => held[0].as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
                // bfloat16 is the upper half of float32.
                Dtype::BF16 => {
                    held[0].as_chunks().0.iter().map(|&[low, high]| f32::from_le_bytes([0, 0, low, high])).collect()
                }
                _ => {
                    let scales: Vec<f32> =
                        held[1].as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
                    let mut values = vec![0.0; held[0].len()];
                    float8::decode(&held[0], &scales, width, &mut values);
                    values
                }
            };
            let norm = |row: &usize| {
                values[row * width..(row + 1) * width].iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt()
            };
            rows.iter().map(|row| norm(row) as f32).collect()
        })
        .collect();
    let norms = (0..rows.len()).flat_map(|row| columns.iter().map(move |column| column[row]));
    named(tensors, "probes.norms").3 = norms.flat_map(f32::to_le_bytes).collect();
}

/// What is noted of the whole vocabulary is believed where the head says the same of the rows that it is asked about.
#[test]
fn a_whole_vocabulary_that_the_target_does_not_say_is_refused() {
    type Edit = fn(&mut Vec<Held>);
    let cases: [(&str, Edit, &str); 5] = [
        (
            "sums of the row beside",
            |tensors| named(tensors, "whole_vocabulary.log_sum_exp").3.rotate_left(4),
            "log-sum-exp of all its logits",
        ),
        (
            "sums of another target",
            |tensors| {
                let sums = &mut named(tensors, "whole_vocabulary.log_sum_exp").3;
                let (words, _) = sums.as_chunks_mut();
                words.iter_mut().for_each(|word| *word = (f32::from_le_bytes(*word) + 1.0).to_le_bytes());
            },
            "log-sum-exp of all its logits",
        ),
        (
            "another likeliest token",
            |tensors| {
                let ids = &mut named(tensors, "whole_vocabulary.top1").3;
                let (words, _) = ids.as_chunks_mut();
                words.iter_mut().for_each(|word| *word = ((i64::from_le_bytes(*word) + 1) % 200).to_le_bytes());
            },
            "likeliest of all tokens",
        ),
        (
            "no token",
            |tensors| named(tensors, "whole_vocabulary.top1").3[..8].copy_from_slice(&(-1i64).to_le_bytes()),
            "`whole_vocabulary.top1`: expected tokens from 0",
        ),
        (
            "no number",
            |tensors| named(tensors, "whole_vocabulary.log_sum_exp").3[..4].copy_from_slice(&f32::NAN.to_le_bytes()),
            "`whole_vocabulary.log_sum_exp`: expected finite numbers",
        ),
    ];
    let workspace = Workspace::new();
    capture(&workspace, "store", &["--shard-tokens", "500", "--whole-vocabulary"]);
    let store = workspace.path("store");
    let whole = files_of(&store);
    for (name, edit, expected) in cases {
        tamper(&store, edit);
        let message = refused(&mut offline(&workspace, "run", "store"), 2, &["shard-00001.safetensors", expected]);
        println!("{name}: {}", message.lines().find(|line| line.starts_with("error: ")).unwrap());
        whole.iter().for_each(|(name, bytes)| fs::write(store.join(name), bytes).unwrap());
    }
    json_of(&mut offline(&workspace, "run", "store"));
    // A head in bfloat16 says something else: it is neither judged by what was noted nor trained on it.
    json_of(offline(&workspace, "narrow", "store").args(["--set", "target.dtype=bfloat16"]));
}

/// Checksums hold in all of these: what is wrong is what was written.
#[test]
fn states_that_are_not_the_targets_are_refused() {
    type Edit = fn(&mut Vec<Held>);
    let cases: [(&str, Edit, &str); 7] = [
        (
            "another layer as the final one",
            |tensors| {
                let other = states(tensors, 1);
                set_states(tensors, 2, other);
            },
            "norm of hidden state 2",
        ),
        (
            "layers exchanged",
            |tensors| {
                let (zero, one) = (states(tensors, 0), states(tensors, 1));
                set_states(tensors, 0, one);
                set_states(tensors, 1, zero);
            },
            "norm of hidden state 0",
        ),
        (
            "rows shifted by one",
            |tensors| {
                let mut shifted = states(tensors, 2);
                let rows = named(tensors, "ids").2[0];
                for bytes in &mut shifted {
                    let stride = bytes.len() / rows;
                    bytes.rotate_left(stride);
                }
                set_states(tensors, 2, shifted);
            },
            "hidden state",
        ),
        (
            "another layer as the final one, noted as such",
            |tensors| {
                let other = states(tensors, 1);
                set_states(tensors, 2, other);
                note_norms(tensors);
            },
            "bound",
        ),
        (
            "rows shifted by one, noted as such",
            |tensors| {
                let mut shifted = states(tensors, 2);
                let rows = named(tensors, "ids").2[0];
                for bytes in &mut shifted {
                    let stride = bytes.len() / rows;
                    bytes.rotate_left(stride);
                }
                set_states(tensors, 2, shifted);
                note_norms(tensors);
            },
            "bound",
        ),
        (
            "a flipped bit",
            |tensors| {
                let row = i64::from_le_bytes(*named(tensors, "probes.rows").3.first_chunk().unwrap()) as usize;
                let (_, _, shape, bytes) = named(tensors, "hidden.2");
                let stride = bytes.len() / shape[0];
                // The highest bit but the sign of the last number of that row: the exponent's.
                bytes[(row + 1) * stride - 1] ^= 0x40;
            },
            "norm of hidden state 2",
        ),
        (
            "every sign turned in the final states",
            |tensors| {
                let (_, dtype, _, bytes) = named(tensors, "hidden.2");
                let width = dtype.bitsize() / 8;
                bytes.iter_mut().skip(width - 1).step_by(width).for_each(|byte| *byte ^= 0x80);
            },
            "bound",
        ),
    ];
    let workspace = Workspace::new();
    for element in ELEMENTS {
        let arguments = ["--dtype", element, "--layers", "0,1", "--shard-tokens", "500"];
        capture(&workspace, element, &arguments);
        let store = workspace.path(element);
        let whole = files_of(&store);
        for (name, edit, expected) in &cases {
            tamper(&store, edit);
            println!("{element}: {name}");
            let words = ["shard-00001.safetensors: row ", "of document", expected, "expected", "capture again"];
            let message = refused(&mut offline(&workspace, "run", element), 2, &words);
            println!("{}", message.lines().find(|line| line.starts_with("error: ")).unwrap());
            whole.iter().for_each(|(name, bytes)| fs::write(store.join(name), bytes).unwrap());
        }
        // Without probes, with easier ones, with ids of no token.
        for (name, words) in [("probes.rows", "`probes.rows`"), ("ids", "`ids`"), ("offsets", "`offsets`")] {
            tamper(&store, |tensors| named(tensors, name).3[8..16].copy_from_slice(&5_000i64.to_le_bytes()));
            refused(&mut offline(&workspace, "run", element), 2, &["shard-00001.safetensors", words]);
            whole.iter().for_each(|(name, bytes)| fs::write(store.join(name), bytes).unwrap());
        }
        json_of(&mut offline(&workspace, &format!("run-{element}"), element));
    }
    assert!(!workspace.path("run/config.json").exists(), "a refused run wrote its configuration");

    // A model of the same shape and other weights, whose identity somebody wrote into the manifest.
    let mut tensors = model_tensors(&model_config(&json!({})));
    tensors.iter_mut().for_each(|(_, tensor)| *tensor = tensor.flip([0]));
    weights::write_tensors(&workspace.path("model/model.safetensors"), &tensors, &[]).unwrap();
    let identity = TargetIdentity::read(&workspace.path("model")).unwrap();
    for element in ELEMENTS {
        let words = ["was captured from", "the weights of", "embedding or head of"];
        refused(&mut offline(&workspace, "run", element), 2, &words);
        edit_json(&workspace.path(element).join("store.json"), |value| value["target"] = json!(identity));
        let words = ["shard-00000.safetensors: row ", "not the hidden states that this target computes"];
        refused(&mut offline(&workspace, "run", element), 2, &words);
    }
}
