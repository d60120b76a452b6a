//! Writes GGUF files, version 3, as llama.cpp's own writer lays them out: metadata, names, and the data of each tensor at
//! a multiple of 32 bytes.
//!
//! Reference for the numbers: `gguf-py/gguf/quants.py` of llama.cpp, whose bytes these are.

use std::borrow::Cow;
use std::io::Write;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use half::{bf16, f16};
use rayon::prelude::*;

use super::ggml_types::{self, ElementType};

const ALIGNMENT: usize = 32;
const VERSION: u32 = 3;
/// Elements of a block of `Q8_0`, which share one factor.
const BLOCK: usize = 32;

/// How the numbers of matrices are stored. Vectors are float32 whatever is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Numbers {
    /// As they are.
    #[default]
    F32,
    /// Rounded to nearest even; numbers beyond 65504 have no place there.
    F16,
    /// Rounded to nearest even.
    Bf16,
    /// Eight bits each and a factor for every 32. Rows that do not divide into 32 are stored as [`Numbers::F16`].
    Q8_0,
}

/// One tensor.
#[derive(Debug)]
pub struct WrittenTensor {
    name: String,
    /// The last dimension is the innermost one.
    shape: Vec<usize>,
    kind: ElementType,
    bytes: Vec<u8>,
}

impl WrittenTensor {
    /// A tensor of numbers, row-major; the problem says which of them cannot be stored so.
    pub fn numbers(name: &str, shape: &[usize], values: &[f32], asked: Numbers) -> Result<Self, String> {
        let columns = shape.last().copied().unwrap_or(1);
        let stored = match asked {
            _ if shape.len() < 2 => Numbers::F32,
            Numbers::Q8_0 if !columns.is_multiple_of(BLOCK) => Numbers::F16,
            asked => asked,
        };
        // The largest number that is stored in float16: the value itself, or the factor of a block.
        let divisor = match stored {
            Numbers::F16 => Some(1.0),
            Numbers::Q8_0 => Some(127.0),
            Numbers::F32 | Numbers::Bf16 => None,
        };
        let overflows = |value: &&f32| divisor.is_some_and(|divisor| !f16::from_f32(**value / divisor).is_finite());
        if let Some(value) = values.iter().find(overflows) {
            return Err(format!("`{name}` holds {value}, too large for {stored:?}; write bfloat16 or float32"));
        }
        let bytes = match stored {
            Numbers::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Numbers::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
            Numbers::Bf16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
            Numbers::Q8_0 => {
                let blocks: Vec<[u8; BLOCK + 2]> = values.par_chunks_exact(BLOCK).map(block).collect();
                blocks.concat()
            }
        };
        let kind = ElementType::Numbers(match stored {
            Numbers::F32 => GgmlDType::F32,
            Numbers::F16 => GgmlDType::F16,
            Numbers::Bf16 => GgmlDType::BF16,
            Numbers::Q8_0 => GgmlDType::Q8_0,
        });
        Ok(Self { name: name.to_owned(), shape: shape.to_vec(), kind, bytes })
    }

    /// A list of whole numbers.
    pub fn whole_numbers(name: &str, values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name: name.to_owned(), shape: vec![values.len()], kind: ElementType::I64, bytes }
    }
}

/// Rounds half away from zero. A block of zeros has the factor 0.
fn block(values: &[f32]) -> [u8; BLOCK + 2] {
    let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let factor = largest / 127.0;
    let inverse = if factor == 0.0 { 0.0 } else { 1.0 / factor };
    let mut bytes = [0; BLOCK + 2];
    let (head, rest) = bytes.split_at_mut(2);
    head.copy_from_slice(&f16::from_f32(factor).to_le_bytes());
    for (byte, value) in rest.iter_mut().zip(values) {
        // Within -127 to 127, for the largest of them makes 127.
        *byte = (value * inverse).round() as i8 as u8;
    }
    bytes
}

/// Writes a file. Keys stand in the order given, and so do the tensors.
pub fn write(out: &mut dyn Write, metadata: &[(String, Value)], tensors: &[WrittenTensor]) -> std::io::Result<()> {
    let mut head = b"GGUF".to_vec();
    head.extend(VERSION.to_le_bytes());
    head.extend((tensors.len() as u64).to_le_bytes());
    head.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut head, key);
        head.extend(type_of(value).to_le_bytes());
        put(&mut head, value);
    }
    let mut offset = 0;
    for tensor in tensors {
        put_text(&mut head, &tensor.name);
        head.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|&size| head.extend((size as u64).to_le_bytes()));
        head.extend(ggml_types::id_of(tensor.kind).to_le_bytes());
        head.extend((offset as u64).to_le_bytes());
        offset += tensor.bytes.len().next_multiple_of(ALIGNMENT);
    }
    for bytes in [Cow::Owned(head)].into_iter().chain(tensors.iter().map(|tensor| Cow::Borrowed(&tensor.bytes[..]))) {
        out.write_all(&bytes)?;
        out.write_all(&[0; ALIGNMENT][..bytes.len().next_multiple_of(ALIGNMENT) - bytes.len()])?;
    }
    Ok(())
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(number) => out.extend(number.to_le_bytes()),
        Value::I8(number) => out.extend(number.to_le_bytes()),
        Value::U16(number) => out.extend(number.to_le_bytes()),
        Value::I16(number) => out.extend(number.to_le_bytes()),
        Value::U32(number) => out.extend(number.to_le_bytes()),
        Value::I32(number) => out.extend(number.to_le_bytes()),
        Value::U64(number) => out.extend(number.to_le_bytes()),
        Value::I64(number) => out.extend(number.to_le_bytes()),
        Value::F32(number) => out.extend(number.to_le_bytes()),
        Value::F64(number) => out.extend(number.to_le_bytes()),
        Value::Bool(flag) => out.push(u8::from(*flag)),
        Value::String(text) => put_text(out, text),
        Value::Array(elements) => {
            // An empty list is one of anything.
            out.extend(elements.first().map_or(4, type_of).to_le_bytes());
            out.extend((elements.len() as u64).to_le_bytes());
            elements.iter().for_each(|element| put(out, element));
        }
    }
}

fn type_of(value: &Value) -> u32 {
    match value {
        Value::U8(_) => 0,
        Value::I8(_) => 1,
        Value::U16(_) => 2,
        Value::I16(_) => 3,
        Value::U32(_) => 4,
        Value::I32(_) => 5,
        Value::F32(_) => 6,
        Value::Bool(_) => 7,
        Value::String(_) => 8,
        Value::Array(_) => 9,
        Value::U64(_) => 10,
        Value::I64(_) => 11,
        Value::F64(_) => 12,
    }
}
