//! Writes tiny GGUF files for the tests, sound ones and broken ones.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

pub(super) const LAYERS: usize = 2;
pub(super) const HIDDEN: usize = 256;
pub(super) const INTERMEDIATE: usize = 256;
pub(super) const HEADS: usize = 4;
pub(super) const GROUPS: usize = 2;
pub(super) const HEAD_DIM: usize = 64;

/// A GGUF file in the making: every part can be spoilt before it is written.
#[derive(Clone)]
pub(super) struct Synthetic {
    pub(super) version: u32,
    pub(super) metadata: Vec<(String, Value)>,
    pub(super) tensors: Vec<SyntheticTensor>,
    /// Counts claimed in the header, where they differ from the truth.
    pub(super) claimed_tensors: Option<u64>,
    pub(super) claimed_keys: Option<u64>,
}

#[derive(Clone)]
pub(super) struct SyntheticTensor {
    pub(super) name: String,
    pub(super) shape: Vec<u64>,
    pub(super) kind: u32,
    pub(super) data: Vec<u8>,
    /// Offset, where it differs from the truth.
    pub(super) offset: Option<u64>,
}

/// A counter hash: the same numbers in every run, looking random.
pub(super) fn noise(seed: u64, index: u64) -> f32 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index);
    for _ in 0..2 {
        state = (state ^ (state >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    }
    (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

/// The library's own encoding of noise in a type, and what it decodes to.
pub(super) fn encoded(seed: u64, shape: &[usize], kind: GgmlDType) -> (Vec<u8>, Vec<f32>) {
    let count: usize = shape.iter().product();
    let values: Vec<f32> = (0..count as u64).map(|index| noise(seed, index)).collect();
    let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    let quantised = QTensor::quantize(&tensor, kind).unwrap();
    let decoded = quantised.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    (quantised.data().unwrap().into_owned(), decoded)
}

pub(super) fn strings(items: &[&str]) -> Value {
    Value::Array(items.iter().map(|item| Value::String((*item).to_owned())).collect())
}

/// Tokens of the byte-level tokenizer: three control tokens, the 256 bytes, one merge, one user-defined token.
pub(super) fn byte_level_tokens() -> Vec<String> {
    let mut alphabet: Vec<char> = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut tokens: Vec<String> = ["<|unknown|>", "<|begin|>", "<|end|>"].map(str::to_owned).to_vec();
    tokens.extend(alphabet.into_iter().map(String::from));
    tokens.extend(["he", "Ġhe", "<tool>"].map(str::to_owned));
    tokens
}

impl Synthetic {
    /// A sound Llama with untied head, whose matrices have one type and whose norms are float32.
    pub(super) fn llama(kind: u32, library_kind: GgmlDType) -> Self {
        let tokens = byte_level_tokens();
        let vocab = tokens.len();
        let types = tokens.iter().map(|token| match token.as_str() {
            "<tool>" => 4,
            token if token.starts_with("<|") => 3,
            _ => 1,
        });
        let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
        let number = |value: usize| Value::U32(value as u32);
        let metadata = [
            ("general.architecture", Value::String("llama".to_owned())),
            ("llama.block_count", number(LAYERS)),
            ("llama.context_length", number(2048)),
            ("llama.embedding_length", number(HIDDEN)),
            ("llama.feed_forward_length", number(INTERMEDIATE)),
            ("llama.attention.head_count", number(HEADS)),
            ("llama.attention.head_count_kv", number(GROUPS)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("llama.rope.freq_base", Value::F32(500_000.0)),
            ("tokenizer.ggml.model", Value::String("gpt2".to_owned())),
            ("tokenizer.ggml.pre", Value::String("smollm".to_owned())),
            ("tokenizer.ggml.tokens", strings(&tokens)),
            ("tokenizer.ggml.token_type", Value::Array(types.map(Value::I32).collect())),
            ("tokenizer.ggml.merges", strings(&["h e", "Ġ he"])),
            ("tokenizer.ggml.bos_token_id", number(1)),
            ("tokenizer.ggml.eos_token_id", number(2)),
        ];
        let mut file = Self {
            version: 3,
            metadata: metadata.map(|(key, value)| (key.to_owned(), value)).to_vec(),
            tensors: Vec::new(),
            claimed_tensors: None,
            claimed_keys: None,
        };
        let mut add = |name: &str, shape: &[usize]| {
            let (id, library_kind) = if shape.len() == 1 { (0, GgmlDType::F32) } else { (kind, library_kind) };
            let (data, _) = encoded(seed_of(name), shape, library_kind);
            file.tensors.push(SyntheticTensor::new(name, shape, id, data));
        };
        add("token_embd.weight", &[vocab, HIDDEN]);
        add("output.weight", &[vocab, HIDDEN]);
        add("output_norm.weight", &[HIDDEN]);
        for layer in 0..LAYERS {
            for (part, shape) in layer_shapes() {
                add(&format!("blk.{layer}.{part}.weight"), &shape);
            }
        }
        file
    }

    /// A sound Llama in float32.
    pub(super) fn plain() -> Self {
        static PLAIN: LazyLock<Synthetic> = LazyLock::new(|| Synthetic::llama(0, GgmlDType::F32));
        PLAIN.clone()
    }

    pub(super) fn set(&mut self, key: &str, value: Value) {
        self.remove(key);
        self.metadata.push((key.to_owned(), value));
    }

    pub(super) fn remove(&mut self, key: &str) {
        self.metadata.retain(|(other, _)| other != key);
    }

    pub(super) fn tensor(&mut self, name: &str) -> &mut SyntheticTensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.claimed_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.claimed_keys.unwrap_or(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_string(&mut out, key);
            out.extend(type_id(value).to_le_bytes());
            put_value(&mut out, value);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            put_string(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|size| out.extend(size.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(offset).to_le_bytes());
            offset += (tensor.data.len() as u64).next_multiple_of(32);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        for tensor in &self.tensors {
            out.extend(&tensor.data);
            out.resize(out.len().next_multiple_of(32), 0);
        }
        out
    }

    pub(super) fn write(&self, folder: &Path) -> PathBuf {
        let path = folder.join("model.gguf");
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }
}

impl SyntheticTensor {
    pub(super) fn new(name: &str, shape: &[usize], kind: u32, data: Vec<u8>) -> Self {
        let shape = shape.iter().map(|&size| size as u64).collect();
        Self { name: name.to_owned(), shape, kind, data, offset: None }
    }

    pub(super) fn floats(name: &str, values: &[f32]) -> Self {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::new(name, &[values.len()], 0, data)
    }
}

/// Parts of a layer with their shapes.
pub(super) fn layer_shapes() -> [(&'static str, Vec<usize>); 9] {
    [
        ("attn_q", vec![HEADS * HEAD_DIM, HIDDEN]),
        ("attn_k", vec![GROUPS * HEAD_DIM, HIDDEN]),
        ("attn_v", vec![GROUPS * HEAD_DIM, HIDDEN]),
        ("attn_output", vec![HIDDEN, HEADS * HEAD_DIM]),
        ("ffn_gate", vec![INTERMEDIATE, HIDDEN]),
        ("ffn_up", vec![INTERMEDIATE, HIDDEN]),
        ("ffn_down", vec![HIDDEN, INTERMEDIATE]),
        ("attn_norm", vec![HIDDEN]),
        ("ffn_norm", vec![HIDDEN]),
    ]
}

/// Every tensor has its own noise.
pub(super) fn seed_of(name: &str) -> u64 {
    name.bytes().fold(7, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add(byte.into()))
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(number) => out.push(*number),
        Value::U32(number) => out.extend(number.to_le_bytes()),
        Value::I32(number) => out.extend(number.to_le_bytes()),
        Value::U64(number) => out.extend(number.to_le_bytes()),
        Value::F32(number) => out.extend(number.to_le_bytes()),
        Value::Bool(flag) => out.push(u8::from(*flag)),
        Value::String(text) => put_string(out, text),
        Value::Array(items) => {
            out.extend(items.first().map_or(4, type_id).to_le_bytes());
            out.extend((items.len() as u64).to_le_bytes());
            items.iter().for_each(|item| put_value(out, item));
        }
        other => panic!("the tests write no {other:?}"),
    }
}

fn type_id(value: &Value) -> u32 {
    match value {
        Value::U8(_) => 0,
        Value::U32(_) => 4,
        Value::I32(_) => 5,
        Value::F32(_) => 6,
        Value::Bool(_) => 7,
        Value::String(_) => 8,
        Value::Array(_) => 9,
        Value::U64(_) => 10,
        other => panic!("the tests write no {other:?}"),
    }
}
