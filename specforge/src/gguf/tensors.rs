//! The tensors of a Llama GGUF: what they are called there and in Hugging Face folders, and their conversion.
//!
//! llama.cpp keeps the rows of q and k in another order, because its rotary turns neighbouring channels where Hugging
//! Face's turns the two halves of a head. Row `2 i + s` of a head there is row `s * D/2 + i` here.
//!
//! A tensor is read, dequantised and rounded piece by piece while the file is being written, so memory holds one output
//! tensor and a few pieces, however large the model is.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::tensor::{self, Dtype, TensorInfo, View};

use super::ImportDtype;
use super::dimensions::Dimensions;
use super::ggml_types::{self, ElementType};
use super::metadata::Metadata;
use crate::error::{Error, Result, TensorMismatch, foreign};
use crate::files;

/// Divisors of Llama 3's rotary frequencies. Not a weight: they become `rope_scaling`.
pub(super) const FACTORS: &str = "rope_freqs.weight";
/// A safetensors header ends at a multiple of this.
const HEADER_ALIGNMENT: usize = 8;
/// Elements that are converted at a time.
const PIECE: usize = 1 << 20;

/// One tensor to convert.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// Its name in the GGUF file.
    pub(super) source: String,
    /// Its name in Hugging Face folders.
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) kind: GgmlDType,
    /// Which of the model's files it lies in.
    part: usize,
    /// Where its data starts in the file.
    start: u64,
    /// Rows of a head, where they are to be put in Hugging Face's order.
    head_rows: Option<usize>,
}

/// Everything there is to convert.
#[derive(Debug)]
pub(super) struct Plans {
    pub(super) tensors: Vec<Plan>,
    pub(super) tied: bool,
    pub(super) attention_bias: bool,
    pub(super) mlp_bias: bool,
    factors: Option<Plan>,
}

impl Plan {
    pub(super) fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Plans {
    /// Matches the tensors of the file with those of the network.
    pub(super) fn new(metadata: &Metadata, sizes: &Dimensions) -> Result<Self> {
        let infos = &metadata.content.tensors;
        // Before a list of what every layer should have is made.
        if sizes.layers > infos.len() {
            let (layers, tensors) = (sizes.layers, infos.len());
            let problem =
                format!("`{}` is {layers}, but there are only {tensors} tensors", metadata.key("block_count"));
            return Err(metadata.bad(problem));
        }
        let has = |names: &[&str]| infos.keys().any(|name| names.iter().any(|end| name.ends_with(end)));
        let attention_bias = has(&["attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias"]);
        let mlp_bias = has(&["ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"]);
        let tied = !infos.contains_key("output.weight");
        let mut mismatch = TensorMismatch::default();
        let mut expected = BTreeMap::new();
        for plan in expected_tensors(sizes, attention_bias, mlp_bias, tied) {
            expected.insert(plan.source.clone(), plan);
        }
        let mut plans = Self { tensors: Vec::new(), tied, attention_bias, mlp_bias, factors: None };
        for (name, info) in infos {
            let Some(mut plan) = expected.remove(name) else {
                mismatch.surplus.push(name.clone());
                continue;
            };
            if info.shape != plan.shape {
                mismatch.misshaped.push((name.clone(), signed(&plan.shape), signed(&info.shape)));
            }
            let ElementType::Numbers(kind) = info.kind else {
                let problem = format!("tensor `{name}`: {}", ggml_types::unreadable(info.kind.name()));
                return Err(metadata.bad(problem).with_hint(ggml_types::HINT));
            };
            plan.kind = kind;
            (plan.part, plan.start) = (info.part, info.start);
            if name == FACTORS {
                plans.factors = Some(plan);
            } else {
                plans.tensors.push(plan);
            }
        }
        mismatch.missing = expected.into_keys().filter(|name| name != FACTORS).collect();
        if !mismatch.is_empty() {
            return Err(Error::Tensors { path: metadata.path.clone(), mismatch });
        }
        plans.tensors.sort_by(|left, right| left.name.cmp(&right.name));
        Ok(plans)
    }

    /// The values of `rope_freqs.weight`, where the file has it.
    pub(super) fn rope_factors(&self, parts: &[(PathBuf, File)]) -> Result<Option<Vec<f32>>> {
        self.factors.as_ref().map(|plan| dequantise(parts, plan, 0, plan.elements())).transpose()
    }
}

/// Writes `target`, converting as it goes. `progress` is told the bytes done and the bytes in all.
pub(super) fn write(
    target: &Path,
    parts: &[(PathBuf, File)],
    plans: &Plans,
    dtype: ImportDtype,
    progress: &dyn Fn(u64, u64),
) -> Result<()> {
    let total = plans.tensors.iter().map(|plan| (plan.elements() * dtype.bytes()) as u64).sum();
    let job = Job { parts, dtype, progress, total, done: RefCell::new(0), failure: RefCell::new(None) };
    progress(0, total);
    let views = plans.tensors.iter().map(|plan| (plan.name.as_str(), Converted { plan, job: &job }));
    files::write_through(target, |temporary| {
        let header = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let written = safetensors::serialize_to_file(views, Some(header), temporary);
        if let Some(failure) = job.failure.take() {
            return Err(failure);
        }
        written.map_err(|error| match error {
            safetensors::SafeTensorError::IoError(source) => Error::io("write", target)(source),
            other => Error::bad_file(target, format!("cannot be written: {other}")),
        })
    })
}

/// Writes the same tensors, in the same layout, to a file in memory; errors speak of `path`.
pub(super) fn write_to_memory(
    memory: &File,
    path: &Path,
    parts: &[(PathBuf, File)],
    plans: &Plans,
    dtype: ImportDtype,
    progress: &dyn Fn(u64, u64),
) -> Result<()> {
    let failed = |problem: String| Error::bad_file(path, format!("its weights cannot be laid out: {problem}"));
    let mut end = 0;
    let infos = plans.tensors.iter().map(|plan| {
        let start = end;
        end += plan.elements() * dtype.bytes();
        let (dtype, shape) = (dtype.safetensors(), plan.shape.clone());
        (plan.name.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) })
    });
    let infos = infos.collect();
    let header = tensor::Metadata::new(None, infos).map_err(|error| failed(error.to_string()))?;
    let mut header = serde_json::to_vec(&header).map_err(|error| failed(error.to_string()))?;
    header.resize(header.len().next_multiple_of(HEADER_ALIGNMENT), b' ');
    let mut out = memory;
    let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(Error::io("keep in memory what is in", path));
    put(&(header.len() as u64).to_le_bytes())?;
    put(&header)?;
    let (mut done, total) = (0, end as u64);
    for plan in &plans.tensors {
        progress(done, total);
        let bytes = convert(parts, plan, dtype)?;
        put(&bytes)?;
        done += bytes.len() as u64;
    }
    progress(done, total);
    Ok(())
}

/// The tensors of a Llama of these sizes, with what only the file knows left blank.
fn expected_tensors(sizes: &Dimensions, attention_bias: bool, mlp_bias: bool, tied: bool) -> Vec<Plan> {
    let Dimensions { layers, hidden, intermediate, heads, groups, head_dim, vocab, .. } = *sizes;
    let (query, key) = (heads * head_dim, groups * head_dim);
    let mut plans = Vec::new();
    let mut add = |source: String, name: String, shape: &[usize], by_heads: bool| {
        let head_rows = by_heads.then_some(head_dim);
        plans.push(Plan { source, name, shape: shape.to_vec(), kind: GgmlDType::F32, part: 0, start: 0, head_rows });
    };
    add("token_embd.weight".into(), "model.embed_tokens.weight".into(), &[vocab, hidden], false);
    add("output_norm.weight".into(), "model.norm.weight".into(), &[hidden], false);
    add(FACTORS.into(), FACTORS.into(), &[head_dim / 2], false);
    if !tied {
        add("output.weight".into(), "lm_head.weight".into(), &[vocab, hidden], false);
    }
    let projections = [
        ("attn_q", "self_attn.q_proj", [query, hidden], true, attention_bias),
        ("attn_k", "self_attn.k_proj", [key, hidden], true, attention_bias),
        ("attn_v", "self_attn.v_proj", [key, hidden], false, attention_bias),
        ("attn_output", "self_attn.o_proj", [hidden, query], false, attention_bias),
        ("ffn_gate", "mlp.gate_proj", [intermediate, hidden], false, mlp_bias),
        ("ffn_up", "mlp.up_proj", [intermediate, hidden], false, mlp_bias),
        ("ffn_down", "mlp.down_proj", [hidden, intermediate], false, mlp_bias),
    ];
    for layer in 0..layers {
        let from = |part: &str| format!("blk.{layer}.{part}");
        let to = |part: &str| format!("model.layers.{layer}.{part}");
        add(from("attn_norm.weight"), to("input_layernorm.weight"), &[hidden], false);
        add(from("ffn_norm.weight"), to("post_attention_layernorm.weight"), &[hidden], false);
        for (source, name, shape, by_heads, bias) in projections {
            add(from(&format!("{source}.weight")), to(&format!("{name}.weight")), &shape, by_heads);
            if bias {
                add(from(&format!("{source}.bias")), to(&format!("{name}.bias")), &shape[..1], by_heads);
            }
        }
    }
    plans
}

fn signed(shape: &[usize]) -> Vec<i64> {
    shape.iter().map(|&size| size as i64).collect()
}

struct Job<'a> {
    parts: &'a [(PathBuf, File)],
    dtype: ImportDtype,
    progress: &'a dyn Fn(u64, u64),
    total: u64,
    done: RefCell<u64>,
    /// The writer takes bytes, not errors: what goes wrong is kept here and told when it returns.
    failure: RefCell<Option<Error>>,
}

struct Converted<'a> {
    plan: &'a Plan,
    job: &'a Job<'a>,
}

impl View for Converted<'_> {
    fn dtype(&self) -> Dtype {
        self.job.dtype.safetensors()
    }
    fn shape(&self) -> &[usize] {
        &self.plan.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        let job = self.job;
        if job.failure.borrow().is_some() {
            return Cow::Borrowed(&[]);
        }
        match convert(job.parts, self.plan, job.dtype) {
            Ok(bytes) => {
                let mut done = job.done.borrow_mut();
                *done += bytes.len() as u64;
                (job.progress)(*done, job.total);
                Cow::Owned(bytes)
            }
            Err(error) => {
                *job.failure.borrow_mut() = Some(error);
                Cow::Borrowed(&[])
            }
        }
    }
    fn data_len(&self) -> usize {
        self.plan.elements() * self.job.dtype.bytes()
    }
}

/// The bytes of one tensor in Hugging Face's order.
fn convert(parts: &[(PathBuf, File)], plan: &Plan, dtype: ImportDtype) -> Result<Vec<u8>> {
    // One-dimensional tensors are small, and blocks may run across their elements: one piece, rows of one element.
    let (rows, columns) = match plan.shape.as_slice() {
        [_, columns] => {
            let step = plan.head_rows.unwrap_or(1);
            ((PIECE / columns / step).max(1) * step, *columns)
        }
        _ => (plan.elements(), 1),
    };
    let width = columns * dtype.bytes();
    let mut output = vec![0; plan.elements() * dtype.bytes()];
    output.par_chunks_mut(rows * width).enumerate().try_for_each(|(piece, output)| {
        let first = piece * rows * columns;
        let values = dequantise(parts, plan, first, output.len() / dtype.bytes())?;
        for (row, values) in values.chunks_exact(columns).enumerate() {
            let row = plan.head_rows.map_or(row, |head_rows| row_in_halves(row, head_rows));
            if !encode(values, dtype, &mut output[row * width..(row + 1) * width]) {
                return Err(unrepresentable(&parts[plan.part].0, plan, values, dtype));
            }
        }
        Ok(())
    })?;
    Ok(output)
}

/// Where Hugging Face has the row that llama.cpp has at `row`, of heads of so many rows.
pub fn row_in_halves(row: usize, head_rows: usize) -> usize {
    let (head, channel) = (row / head_rows, row % head_rows);
    head * head_rows + (channel % 2) * (head_rows / 2) + channel / 2
}

/// Rounds to nearest even. False if a value is infinite or not a number, or becomes so.
fn encode(values: &[f32], dtype: ImportDtype, output: &mut [u8]) -> bool {
    let mut finite = true;
    match dtype {
        ImportDtype::F32 => {
            for (value, bytes) in values.iter().zip(output.chunks_exact_mut(4)) {
                finite &= value.is_finite();
                bytes.copy_from_slice(&value.to_le_bytes());
            }
        }
        ImportDtype::Bf16 => {
            for (value, bytes) in values.iter().zip(output.chunks_exact_mut(2)) {
                let value = bf16::from_f32(*value);
                finite &= value.is_finite();
                bytes.copy_from_slice(&value.to_le_bytes());
            }
        }
        ImportDtype::F16 => {
            for (value, bytes) in values.iter().zip(output.chunks_exact_mut(2)) {
                let value = f16::from_f32(*value);
                finite &= value.is_finite();
                bytes.copy_from_slice(&value.to_le_bytes());
            }
        }
    }
    finite
}

fn unrepresentable(path: &Path, plan: &Plan, values: &[f32], dtype: ImportDtype) -> Error {
    let name = &plan.source;
    match values.iter().find(|value| !value.is_finite()) {
        Some(value) => Error::bad_file(path, format!("tensor `{name}` holds {value}; the model is damaged")),
        None => {
            let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            Error::bad_file(path, format!("tensor `{name}` holds values up to {largest}, too large for {dtype}"))
                .with_hint("import as bf16 or f32")
        }
    }
}

/// `count` elements from element `first`, in float32. Both are multiples of the block size, and `count` is not 0.
fn dequantise(parts: &[(PathBuf, File)], plan: &Plan, first: usize, count: usize) -> Result<Vec<f32>> {
    let start = plan.start + (first / plan.kind.block_size() * plan.kind.type_size()) as u64;
    let (path, file) = &parts[plan.part];
    decode((path, file), &plan.source, plan.kind, start, count)
}

/// `count` elements of a tensor in float32, a multiple of the block size and not 0; `start` is a place in the file.
pub(super) fn decode(
    (path, file): (&Path, &File),
    name: &str,
    kind: GgmlDType,
    start: u64,
    count: usize,
) -> Result<Vec<f32>> {
    let mut bytes = vec![0; count / kind.block_size() * kind.type_size()];
    file.read_exact_at(&mut bytes, start).map_err(Error::io("read", path))?;
    let values = foreign::answer(|| {
        let storage = QStorage::from_data(Cow::Borrowed(&bytes), &Device::Cpu, kind)?;
        QTensor::new(storage, count)?.dequantize(&Device::Cpu)?.to_vec1()
    });
    values.map_err(|error| {
        let kind = ggml_types::name(kind);
        Error::bad_file(path, format!("tensor `{name}` cannot be read as {kind}: {error}"))
    })
}
