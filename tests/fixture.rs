//! What the tests of the whole program stand on: a small random model in a real Hugging Face folder, conversations,
//! a configuration, and the program itself.

use std::fmt::Write;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use candle_core::quantized::gguf_file::{self, Value as GgufValue};
use candle_core::quantized::{GgmlDType, QTensor};
use serde_json::{Value, json};
use specforge::draft::StepKey;
use specforge::models::TargetConfig;
use specforge::nn::noise;
use specforge::weights::{self, WeightsFolder};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

/// Tokens of the tokenizer in tests/data, added ones included.
pub const TOKENIZER_SIZE: i64 = 454;

/// Where a batch stands that is looked at alone.
pub const STEP: StepKey = StepKey { seed: 3, step: 1, total: 8 };

/// A folder of its own with a model, conversations and a configuration. It vanishes with the value.
pub struct Workspace {
    folder: TempDir,
    /// The configuration that [`Workspace::config`] writes.
    pub configuration: Value,
    /// The program: one of [`specforge`] and [`plugins`].
    command: fn(&[&str]) -> Command,
}

impl Workspace {
    /// A model of hidden size 32 with the tokenizer's own vocabulary, and 60 conversations.
    pub fn new() -> Self {
        Self::with_model(&json!({}))
    }

    /// The same with other keys in the model's config.json.
    pub fn with_model(changes: &Value) -> Self {
        // Inside target/, so that what a killed test leaves behind is swept with it.
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        write_model(&folder.path().join("model"), changes);
        fs::write(folder.path().join("conversations.jsonl"), conversations(60)).unwrap();
        let path = |name: &str| folder.path().join(name);
        let configuration = json!({
            "target": {"path": path("model"), "dtype": "float32"},
            "draft": {"algorithm": "medusa", "num_heads": 3},
            "data": {
                "train": [path("conversations.jsonl")],
                "eval_fraction": 0.1,
                "max_length": 64,
                "cache_dir": path("cache"),
            },
            "optim": {"learning_rate": 1e-2, "schedule": {"kind": "cosine", "warmup_ratio": 0.1}},
            "train": {
                "output_dir": path("run"),
                "epochs": 1000,
                "max_steps": 4,
                "batch_tokens": 256,
                "micro_batch_tokens": 128,
                "log_every": 1,
                "eval_every": 0,
                "save_every": 0,
                "chunk_mib": 1,
            },
        });
        Self { folder, configuration, command: specforge }
    }

    /// For runs of what `tests/plugins` adds.
    pub fn with_plugins() -> Self {
        Self { command: plugins, ..Self::new() }
    }

    /// The program with arguments.
    pub fn program(&self, arguments: &[&str]) -> Command {
        (self.command)(arguments)
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Sets one value of the configuration by its dotted key.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut Self {
        let pointer = format!("/{}", key.replace('.', "/"));
        match self.configuration.pointer_mut(&pointer) {
            Some(place) => *place = value.into(),
            None => {
                let (section, name) = key.split_once('.').unwrap();
                self.configuration[section][name] = value.into();
            }
        }
        self
    }

    /// Writes the configuration and returns its path.
    pub fn config(&self) -> PathBuf {
        let path = self.path("run.json");
        fs::write(&path, serde_json::to_string_pretty(&self.configuration).unwrap()).unwrap();
        path
    }

    /// `specforge train` into the folder `out`, with further arguments.
    pub fn train_command(&self, out: &str, arguments: &[&str]) -> Command {
        let mut command = self.program(&["train", "--json", "--config"]);
        command.arg(self.config()).arg("--set").arg(format!("train.output_dir={}", self.path(out).display()));
        command.args(arguments);
        if !arguments.contains(&"--device") {
            command.args(["--device", "cpu"]);
        }
        command
    }

    /// Trains, demands success, and returns the report.
    pub fn train(&self, out: &str, arguments: &[&str]) -> Value {
        json_of(&mut self.train_command(out, arguments))
    }
}

/// The program with arguments, in an environment that is the same everywhere.
pub fn specforge(arguments: &[&str]) -> Command {
    program(env!("CARGO_BIN_EXE_specforge"), arguments)
}

/// The program that also knows what `tests/plugins` adds.
pub fn plugins(arguments: &[&str]) -> Command {
    program(env!("CARGO_BIN_EXE_specforge-plugins"), arguments)
}

fn program(path: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(path);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .current_dir(env!("CARGO_TARGET_TMPDIR"))
        .env_remove("COLUMNS")
        .env_remove("RUST_BACKTRACE")
        // No test asks a hub on the network; those of a hub name one on this machine.
        .env("HF_HUB_OFFLINE", "1")
        // Several tests run at once; waiting threads must not spin.
        .env("OMP_NUM_THREADS", "1")
        .env("OMP_WAIT_POLICY", "passive")
        .env("RAYON_NUM_THREADS", "2");
    command
}

/// Runs a command to its end.
pub fn output_of(command: &mut Command) -> Output {
    command.output().unwrap()
}

/// What a finished program wrote to stderr.
pub fn stderr_of(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Runs a command, demands success, and parses all of its stdout as JSON.
pub fn json_of(command: &mut Command) -> Value {
    let output = output_of(command);
    assert!(output.status.success(), "{}\n{}", output.status, stderr_of(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// config.json of the small model, with other values for some keys.
pub fn model_config(changes: &Value) -> Value {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": TOKENIZER_SIZE,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": false,
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// Random weights for a configuration, by name.
pub fn model_tensors(config: &Value) -> Vec<(String, Tensor)> {
    let config = TargetConfig::from_value(config).unwrap();
    let tensors = config.tensors().unwrap().into_iter().enumerate();
    tensors
        .map(|(stream, (name, shape))| {
            let random = noise::normal(&shape, 0.15, 7, stream as u64);
            let value = if name.ends_with("norm.weight") { random + 1.0 } else { random };
            (name, value)
        })
        .collect()
}

/// Writes a model folder with the tokenizer and chat template of tests/data.
pub fn write_model(folder: &Path, changes: &Value) {
    fs::create_dir_all(folder).unwrap();
    let config = model_config(changes);
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/templates/tokenizer");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(tokenizer.join(name), folder.join(name)).unwrap();
    }
    weights::write_tensors(&folder.join("model.safetensors"), &model_tensors(&config), &[]).unwrap();
}

/// Writes a GGUF file of a small Llama in float32, with a byte-level tokenizer and a chat template.
pub fn write_gguf(path: &Path) {
    let (hidden, width, heads, groups) = (32, 48, 4, 2);
    let text = |text: &str| GgufValue::String(text.to_owned());
    let number = |number: usize| GgufValue::U32(number as u32);
    let mut alphabet: Vec<char> = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let special = ["<|unknown|>", "<|begin|>", "<|im_end|>", "<|im_start|>"];
    let tokens: Vec<String> = special
        .map(str::to_owned)
        .into_iter()
        .chain(alphabet.into_iter().map(String::from))
        .chain(["he".to_owned()])
        .collect();
    let vocabulary = tokens.len();
    let kinds = (0..vocabulary).map(|token| GgufValue::I32(if token < special.len() { 3 } else { 1 })).collect();
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if \
                    add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let metadata = [
        ("general.architecture", text("llama")),
        ("llama.block_count", number(1)),
        ("llama.context_length", number(256)),
        ("llama.embedding_length", number(hidden)),
        ("llama.feed_forward_length", number(width)),
        ("llama.attention.head_count", number(heads)),
        ("llama.attention.head_count_kv", number(groups)),
        ("llama.attention.layer_norm_rms_epsilon", GgufValue::F32(1e-5)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("smollm")),
        ("tokenizer.ggml.tokens", GgufValue::Array(tokens.into_iter().map(GgufValue::String).collect())),
        ("tokenizer.ggml.token_type", GgufValue::Array(kinds)),
        ("tokenizer.ggml.merges", GgufValue::Array(vec![text("h e")])),
        ("tokenizer.ggml.bos_token_id", number(1)),
        ("tokenizer.ggml.eos_token_id", number(2)),
        ("tokenizer.chat_template", text(template)),
    ];
    let shared = hidden / heads * groups;
    let tensors = [
        ("token_embd.weight", vec![vocabulary, hidden]),
        ("output_norm.weight", vec![hidden]),
        ("blk.0.attn_q.weight", vec![hidden, hidden]),
        ("blk.0.attn_k.weight", vec![shared, hidden]),
        ("blk.0.attn_v.weight", vec![shared, hidden]),
        ("blk.0.attn_output.weight", vec![hidden, hidden]),
        ("blk.0.ffn_gate.weight", vec![width, hidden]),
        ("blk.0.ffn_up.weight", vec![width, hidden]),
        ("blk.0.ffn_down.weight", vec![hidden, width]),
        ("blk.0.attn_norm.weight", vec![hidden]),
        ("blk.0.ffn_norm.weight", vec![hidden]),
    ];
    let tensors: Vec<(&str, QTensor)> = tensors
        .into_iter()
        .map(|(name, shape)| {
            let values: Vec<f32> = (0..shape.iter().product()).map(|index: usize| (index as f32).sin() * 0.3).collect();
            let tensor = candle_core::Tensor::from_vec(values, shape, &candle_core::Device::Cpu).unwrap();
            (name, QTensor::quantize(&tensor, GgmlDType::F32).unwrap())
        })
        .collect();
    let metadata: Vec<(&str, &GgufValue)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    gguf_file::write(&mut fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

/// What `torch.save` writes of a table of tensors.
pub fn write_torch_file(path: &Path, tensors: &[(String, Tensor)]) {
    let mut archive = zip::ZipWriter::new(fs::File::create(path).unwrap());
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let text = |text: &str| [b"X".as_slice(), &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    let number = |number: i64| [b"J".as_slice(), &(number as i32).to_le_bytes()].concat();
    let tuple = |numbers: &[i64]| {
        [b"(".to_vec(), numbers.iter().flat_map(|&size| number(size)).collect(), b"t".to_vec()].concat()
    };
    let mut program = b"\x80\x02}(".to_vec();
    for (key, (name, tensor)) in tensors.iter().enumerate() {
        let storage = match tensor.kind() {
            Kind::Float => "Float",
            Kind::BFloat16 => "BFloat16",
            Kind::Half => "Half",
            Kind::Int64 => "Long",
            Kind::Bool => "Bool",
            other => panic!("{other:?}"),
        };
        program.extend(text(name));
        program.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        program.extend([text("storage"), format!("ctorch\n{storage}Storage\n").into_bytes()].concat());
        program.extend([text(&key.to_string()), text("cpu"), number(tensor.numel() as i64), b"tQ".to_vec()].concat());
        program.extend([number(0), tuple(&tensor.size()), tuple(&tensor.stride())].concat());
        program.extend(b"\x89ccollections\nOrderedDict\n)RtR");
        archive.start_file(format!("archive/data/{key}"), options).unwrap();
        archive.write_all(weights::writer::host_bytes(&tensor.contiguous())).unwrap();
    }
    program.extend(b"u.");
    archive.start_file("archive/data.pkl", options).unwrap();
    archive.write_all(&program).unwrap();
    archive.finish().unwrap();
}

/// `count` conversations of one to three turns, one a line; line `n` has the id `c<n>`.
pub fn conversations(count: usize) -> String {
    const WORDS: [&str; 16] = [
        "the", "river", "runs", "over", "seven", "stones", "and", "never", "asks", "why", "a", "cold", "bird", "sings",
        "at", "noon",
    ];
    let mut lines = String::new();
    for conversation in 0..count {
        let mut next = noise::keyed_stream(11, conversation as u64);
        let mut words = |most: u64| {
            let length = 2 + next() % most;
            (0..length).map(|_| WORDS[(next() % 16) as usize]).collect::<Vec<_>>().join(" ")
        };
        let turns = 1 + conversation % 3;
        let messages: Vec<Value> = (0..turns)
            .flat_map(|_| {
                let (question, answer) = (words(4), words(9));
                [json!({"role": "user", "content": question}), json!({"role": "assistant", "content": answer})]
            })
            .collect();
        writeln!(lines, "{}", json!({"id": format!("c{conversation}"), "messages": messages})).unwrap();
    }
    lines
}

/// Every tensor of a file or folder, in its own type, sorted by name.
pub fn tensors_of(path: &Path) -> Vec<(String, Tensor)> {
    let folder = WeightsFolder::open(path).unwrap();
    let kind = |name: &str| folder.kind(name).unwrap();
    folder
        .names()
        // Copied: the file may be changed while the tensors live.
        .map(|name| (name.to_owned(), folder.load(name, kind(name), Device::Cpu).unwrap().copy()))
        .collect()
}

/// Largest absolute difference, in float64. NaN where one of them has NaN.
pub fn largest_difference(left: &Tensor, right: &Tensor) -> f64 {
    assert_eq!(left.size(), right.size());
    (left.to_kind(Kind::Double) - right.to_kind(Kind::Double)).abs().max().double_value(&[])
}

/// Everything in a folder and below it: relative path and content, sorted. Lock files aside.
pub fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut waiting = vec![folder.to_path_buf()];
    while let Some(next) = waiting.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                waiting.push(path);
            } else if path.file_name().is_some_and(|name| name != ".lock") {
                found.push((path.strip_prefix(folder).unwrap().to_path_buf(), fs::read(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

/// Names that only unfinished work has, anywhere in a folder.
pub fn litter(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![folder.to_path_buf()];
    while let Some(next) = waiting.pop() {
        let Ok(entries) = fs::read_dir(&next) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if name.starts_with(".partial-") || name.starts_with(".tmp") || name.starts_with(".replaced-") {
                found.push(path);
            } else if path.is_dir() {
                waiting.push(path);
            }
        }
    }
    found
}
