//! An EAGLE-3 draft as llama.cpp loads it: one GGUF file of the architecture `eagle3`, with the target's tokenizer.
//!
//! Names and order are those of llama.cpp's own converter (`conversion/llama.py`), so that its file and this one are the
//! same but for `general.name` and what it makes of a model card. Rows of q and k stand in llama.cpp's order, whose rotary
//! turns neighbouring channels; `d2t` holds the target's ids themselves.
//!
//! Shape legend: `H` hidden size, `TH` the target's, `V` vocabulary, `DV` the draft's own, `D` width of a head.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::quantized::gguf_file::Value as GgufValue;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::{D2T, T2D, config, targets, trained_tensor};
use crate::draft::eagle3::Eagle3Shape;
use crate::error::{Error, Result};
use crate::export::{Engine, Source};
use crate::files;
use crate::gguf::write::{self, Numbers, WrittenTensor};
use crate::gguf::{Dimensions, GgufFile, Metadata, Rope, packed, row_in_halves, vocabulary};
use crate::nn::{RopeConfig, RopeScaling};
use crate::progress;
use crate::vocab::VocabMap;

/// What `general.architecture` says.
const ARCHITECTURE: &str = "eagle3";
/// Layers that llama.cpp captures, no more and no fewer.
const CAPTURED: usize = 3;
/// Divisors of the rotary frequencies.
const FACTORS: &str = "rope_freqs.weight";
/// Version of the block formats.
const QUANTISATION_VERSION: u32 = 2;

const Q_PROJ: &str = "midlayer.self_attn.q_proj.weight";
const K_PROJ: &str = "midlayer.self_attn.k_proj.weight";

/// Names of tensors in training and in the file.
const NAMES: [(&str, &str); 15] = [
    ("embed_tokens.weight", "token_embd.weight"),
    ("fc.weight", "fc.weight"),
    ("input_norm.weight", "enc.output_norm.weight"),
    ("midlayer.hidden_norm.weight", "blk.0.attn_norm_2.weight"),
    ("midlayer.input_layernorm.weight", "blk.0.attn_norm.weight"),
    (Q_PROJ, "blk.0.attn_q.weight"),
    (K_PROJ, "blk.0.attn_k.weight"),
    ("midlayer.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
    ("midlayer.self_attn.o_proj.weight", "blk.0.attn_output.weight"),
    ("midlayer.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
    ("midlayer.mlp.gate_proj.weight", "blk.0.ffn_gate.weight"),
    ("midlayer.mlp.up_proj.weight", "blk.0.ffn_up.weight"),
    ("midlayer.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
    ("norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];

/// The name in the file of a tensor of training.
pub(super) fn stored_name(trained: &str) -> &str {
    NAMES.iter().find(|(name, _)| *name == trained).map_or(trained, |(_, stored)| stored)
}

fn trained_name(stored: &str) -> &str {
    NAMES.iter().find(|(_, name)| *name == stored).map_or(stored, |(name, _)| name)
}

/// Whether a file is a GGUF file and not one of an ordinary model; whether of a draft, its reader says.
pub(super) fn is_draft(path: &Path) -> bool {
    packed::is_packed(path) && GgufFile::open(path).map_or(true, |file| file.metadata().architecture() != "llama")
}

// -- writing ---------------------------------------------------------------------------------------------------------

/// Writes a draft, with the tokenizer of the target that it was trained for.
pub(super) fn write(source: &Source, out: &Path) -> Result<()> {
    let shape = Eagle3Shape::from_description(&source.description).map_err(|problem| {
        Error::Failed(format!("llama.cpp knows EAGLE-3 drafts, and the checkpoint is none of one: {problem}"))
    })?;
    let problems = inexpressible(&shape);
    if !problems.is_empty() {
        return Err(Error::Failed(format!("a GGUF file cannot say what this draft is: {}", problems.join("; "))));
    }
    // The file does not name its target's class: it is said here or never.
    let target = config::Target::read(Some(&source.target));
    if let Some(problem) = targets::refusal(Engine::LlamaCpp, target.as_ref()) {
        progress::say(&format!("warning: {} {problem}", Engine::LlamaCpp.name()));
    }
    let tokenizer = vocabulary::of(&source.target)?;
    let size = tokenizer.iter().find_map(|(key, value)| match value {
        GgufValue::Array(tokens) if key == "tokenizer.ggml.tokens" => Some(tokens.len() as i64),
        _ => None,
    });
    if size != Some(shape.vocab_size) {
        let (want, got) = (shape.vocab_size, size.unwrap_or(0));
        let problem = format!("the draft was trained for a target of {want} tokens, its tokenizer has {got}");
        return Err(Error::bad_file(&source.target, problem));
    }
    let asked = asked(source, &shape)?;
    let mut tensors = Vec::new();
    if let Some(factors) = llama3_factors(&shape.layer.rope) {
        tensors.push(numbers(FACTORS, &[factors.len()], &factors, asked)?);
    }
    let mut names: Vec<(String, Vec<i64>)> = shape.tensors();
    names.sort();
    for (name, want) in names {
        let value = trained_tensor(source, &name, &want)?;
        let value = value.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
        let mut values = Vec::<f32>::try_from(value.f_contiguous()?.f_view([-1])?)?;
        let sizes: Vec<usize> = want.iter().map(|&size| size as usize).collect();
        if [Q_PROJ, K_PROJ].contains(&name.as_str()) {
            values = in_neighbours(&values, sizes[1], shape.layer.head_dim as usize);
        }
        tensors.push(numbers(stored_name(&name), &sizes, &values, asked)?);
    }
    if shape.draft_vocab_size < shape.vocab_size {
        let offsets = Vec::<i64>::try_from(trained_tensor(source, D2T, &[shape.draft_vocab_size])?)?;
        let ids = offsets.iter().zip(0..).map(|(offset, draft)| offset + draft).collect::<Vec<i64>>();
        tensors.push(WrittenTensor::whole_numbers(D2T, &ids));
    }
    let mut metadata = header(&shape, source, asked)?;
    metadata.extend(tokenizer);
    files::write_file(out, |writer| write::write(writer, &metadata, &tensors))
}

/// What a draft has that the format and llama.cpp's network have not.
pub(super) fn inexpressible(shape: &Eagle3Shape) -> Vec<String> {
    let mut problems = Vec::new();
    if shape.fc_norm {
        problems.push("it norms each captured layer by itself (`fc_norm`)".to_owned());
    }
    if !shape.norm_output {
        problems.push("it was trained with `norm_output: false`, llama.cpp norms before the projection".to_owned());
    }
    if shape.norm_feedback {
        problems.push("its next feature is the normed output (`norm_feedback`), llama.cpp's is not".to_owned());
    }
    if shape.capture.len() != CAPTURED {
        problems.push(format!("it reads {} captured layers, llama.cpp {CAPTURED}", shape.capture.len()));
    }
    if shape.num_layers != 1 {
        problems.push(format!("it has {} layers, llama.cpp's one", shape.num_layers));
    }
    let last = shape.num_target_layers;
    if last > 0 && shape.capture.contains(&last) {
        problems.push(format!("it reads the last, normed output of the target (index {last})"));
    }
    match shape.layer.rope.scaling {
        RopeScaling::Default | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => {}
        RopeScaling::Dynamic { .. } => problems.push("its rotary embedding stretches with the length".to_owned()),
        RopeScaling::Yarn { .. } => {
            problems
                .push("its rotary embedding is YaRN, whose factors llama.cpp computes in a way of its own".to_owned());
        }
    }
    problems
}

/// How matrices are stored: as asked, or as the checkpoint has them.
fn asked(source: &Source, shape: &Eagle3Shape) -> Result<Numbers> {
    if source.q8_0 {
        return Ok(Numbers::Q8_0);
    }
    let kind = match source.kind {
        Some(kind) => kind,
        None => trained_tensor(source, "fc.weight", &fc_shape(shape))?.kind(),
    };
    Ok(match kind {
        Kind::BFloat16 => Numbers::Bf16,
        Kind::Half => Numbers::F16,
        _ => Numbers::F32,
    })
}

fn fc_shape(shape: &Eagle3Shape) -> [i64; 2] {
    [shape.hidden_size, shape.target_hidden_size * shape.capture.len() as i64]
}

fn numbers(name: &str, shape: &[usize], values: &[f32], asked: Numbers) -> Result<WrittenTensor> {
    WrittenTensor::numbers(name, shape, values, asked).map_err(Error::Failed)
}

/// Rows of heads in llama.cpp's order.
fn in_neighbours(values: &[f32], columns: usize, head_rows: usize) -> Vec<f32> {
    let rows = (0..values.len() / columns).map(|row| row_in_halves(row, head_rows));
    rows.flat_map(|row| &values[row * columns..][..columns]).copied().collect()
}

/// Everything but the tokenizer.
fn header(shape: &Eagle3Shape, source: &Source, asked: Numbers) -> Result<Vec<(String, GgufValue)>> {
    let Eagle3Shape { layer, .. } = shape;
    let too_large = |name: &str, number: i64| {
        u32::try_from(number).map(GgufValue::U32).map_err(|_| Error::Failed(format!("`{name}`: {number} is too large")))
    };
    let number = |name: &str, number: i64| Ok::<_, Error>((format!("{ARCHITECTURE}.{name}"), too_large(name, number)?));
    let key = |name: &str, value: GgufValue| (format!("{ARCHITECTURE}.{name}"), value);
    let general = |name: &str, value: GgufValue| (format!("general.{name}"), value);
    let text = |text: &str| GgufValue::String(text.to_owned());
    let name = source.target_words();
    let name = name.rsplit('/').next().unwrap_or_default().trim_end_matches(".gguf");
    let target = config::Target::read(Some(&source.target)).and_then(|target| target.max_position_embeddings);
    let mut entries = vec![
        general("architecture", text(ARCHITECTURE)),
        key(
            "target_layers",
            GgufValue::Array(shape.capture.iter().map(|&layer| GgufValue::I32(layer as i32)).collect()),
        ),
        number("target_hidden_size", shape.target_hidden_size)?,
        key("norm_before_residual", GgufValue::Bool(shape.norm_before_residual)),
        key("norm_before_fc", GgufValue::Bool(shape.norm_before_fc)),
        general("type", text("model")),
        general("name", text(&format!("{name} EAGLE-3 draft"))),
        number("block_count", 1)?,
        number("context_length", target.unwrap_or(0).max(shape.max_position_embeddings))?,
        number("embedding_length", shape.hidden_size)?,
        number("feed_forward_length", layer.intermediate_size)?,
        number("attention.head_count", layer.num_attention_heads)?,
        number("attention.head_count_kv", layer.num_key_value_heads)?,
    ];
    if let RopeScaling::Linear { factor } = layer.rope.scaling {
        entries.push(key("rope.scaling.type", text("linear")));
        entries.push(key("rope.scaling.factor", GgufValue::F32(factor as f32)));
    }
    entries.extend([
        key("rope.freq_base", GgufValue::F32(layer.rope.theta as f32)),
        key("attention.layer_norm_rms_epsilon", GgufValue::F32(layer.rms_norm_eps as f32)),
        number("attention.key_length", layer.head_dim)?,
        number("attention.value_length", layer.head_dim)?,
        general("file_type", GgufValue::U32(file_type(asked))),
        number("vocab_size", shape.vocab_size)?,
        number("rope.dimension_count", layer.head_dim)?,
        general("quantization_version", GgufValue::U32(QUANTISATION_VERSION)),
    ]);
    Ok(entries)
}

/// llama.cpp's number for what most tensors are.
fn file_type(asked: Numbers) -> u32 {
    match asked {
        Numbers::F32 => 0,
        Numbers::F16 => 1,
        Numbers::Q8_0 => 7,
        Numbers::Bf16 => 32,
    }
}

/// What Llama 3 divides each frequency by, `[D / 2]`, in the arithmetic of llama.cpp's converter: float32 throughout.
fn llama3_factors(rope: &RopeConfig) -> Option<Vec<f32>> {
    let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings: original } =
        rope.scaling
    else {
        return None;
    };
    let one = |pair: i64| {
        let exponent = (2 * pair) as f32 / rope.head_dim as f32;
        let frequency = 1.0 / (rope.theta as f32).powf(exponent);
        let wavelength = std::f32::consts::TAU * (1.0 / frequency);
        if f64::from(wavelength) < original / high_freq_factor {
            1.0
        } else if f64::from(wavelength) > original / low_freq_factor {
            factor as f32
        } else {
            let place = (original as f32) * (1.0 / wavelength) - low_freq_factor as f32;
            let smooth = place / (high_freq_factor - low_freq_factor) as f32;
            1.0 / ((1.0 - smooth) / factor as f32 + smooth)
        }
    };
    Some((0..rope.head_dim / 2).map(one).collect())
}

// -- reading ---------------------------------------------------------------------------------------------------------

/// A draft read from a file.
pub(super) struct Draft {
    /// What config.json of the layout `eagle3` would say.
    pub(super) values: Value,
    /// By the names of training, in float32, and the vocabulary's two tables.
    pub(super) tensors: BTreeMap<String, Tensor>,
    /// Names in the file.
    pub(super) stored: Vec<String>,
}

/// Reads a draft whole.
pub(super) fn read(path: &Path) -> Result<Draft> {
    let file = GgufFile::open(path)?;
    let metadata = file.metadata();
    let sizes = file.dimensions(ARCHITECTURE)?;
    let rope = file.rope(&sizes)?;
    let ids = if file.contains(D2T) { Some(file.whole_numbers(D2T)?) } else { None };
    let values = values(&file, &sizes, &rope, ids.as_ref().map_or(sizes.vocab, Vec::len))?;
    let (mut tensors, mut stored) = (BTreeMap::new(), Vec::new());
    for (name, shape, _) in file.tensors().filter(|(name, ..)| ![D2T, FACTORS].contains(name)) {
        let mut numbers = file.numbers(name)?;
        let trained = trained_name(name);
        if [Q_PROJ, K_PROJ].contains(&trained) {
            let &[rows, columns] = shape else {
                return Err(metadata.bad(format!("`{name}`: expected a matrix, got {shape:?}")));
            };
            if columns == 0 || !rows.is_multiple_of(sizes.head_dim) {
                let problem = format!("`{name}`: expected rows of heads of {}, got {shape:?}", sizes.head_dim);
                return Err(metadata.bad(problem));
            }
            numbers = in_halves(&numbers, columns, sizes.head_dim);
        }
        let shape: Vec<i64> = shape.iter().map(|&size| size as i64).collect();
        tensors.insert(trained.to_owned(), Tensor::f_from_slice(&numbers)?.f_view(shape.as_slice())?);
        stored.push(name.to_owned());
    }
    if let Some(ids) = ids {
        let map = VocabMap::new(ids, sizes.vocab as i64)
            .map_err(|error| metadata.bad(format!("`{D2T}`: {error}")))
            .map_err(|error| error.with_hint("d2t holds the target's ids themselves in GGUF files"))?;
        tensors.insert(D2T.to_owned(), Tensor::f_from_slice(&map.d2t())?);
        tensors.insert(T2D.to_owned(), Tensor::f_from_slice(&map.t2d())?);
        stored.push(D2T.to_owned());
    }
    Ok(Draft { values, tensors, stored })
}

/// Rows of heads in Hugging Face's order.
fn in_halves(values: &[f32], columns: usize, head_rows: usize) -> Vec<f32> {
    let mut ordered = vec![0.0; values.len()];
    for (row, values) in values.chunks_exact(columns).enumerate() {
        ordered[row_in_halves(row, head_rows) * columns..][..columns].copy_from_slice(values);
    }
    ordered
}

/// The configuration of the draft, with the keys of both engines' captured layers.
fn values(file: &GgufFile, sizes: &Dimensions, rope: &Rope, draft_vocab_size: usize) -> Result<Value> {
    let metadata = file.metadata();
    if sizes.layers != 1 {
        let problem = format!("`{}`: expected 1, got {}", metadata.key("block_count"), sizes.layers);
        return Err(metadata.bad(problem));
    }
    let key = metadata.key("target_layers");
    let captured = metadata.need(&key, Metadata::wholes)?;
    if captured.len() != CAPTURED {
        return Err(metadata.bad(format!("`{key}`: expected {CAPTURED} layers, got {captured:?}")));
    }
    let outputs: Option<Vec<i64>> = captured.iter().map(|&layer| i64::try_from(layer).ok()?.checked_sub(1)).collect();
    let outputs = outputs.ok_or_else(|| metadata.bad(format!("`{key}`: expected layers, got {captured:?}")))?;
    let target_hidden = metadata.need(&metadata.key("target_hidden_size"), Metadata::whole)?;
    let flag = |name: &str| Ok::<_, Error>(metadata.flag(&metadata.key(name))?.unwrap_or(false));
    if !file.contains(stored_name("lm_head.weight")) {
        let problem = "holds no `output.weight`: it takes the target's projection, which no draft here does";
        return Err(metadata.bad(problem));
    }
    Ok(json!({
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.groups,
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": sizes.context,
        "hidden_act": "silu",
        "rms_norm_eps": file.epsilon()?,
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "draft_vocab_size": draft_vocab_size,
        "target_hidden_size": target_hidden,
        "eagle_aux_hidden_state_layer_ids": captured,
        "eagle_config": {"use_aux_hidden_state": true, "eagle_aux_hidden_state_layer_ids": outputs},
        "fc_norm": false,
        "norm_before_fc": flag("norm_before_fc")?,
        "norm_before_residual": flag("norm_before_residual")?,
    }))
}
