//! Small valid files of every kind this program reads of models and drafts, each changed in every way a stranger or a
//! broken disk might: numbers that are none, too large or negative, keys that are gone or stand twice, files that end
//! early. Whatever comes of it is success or one error that names the file.
//!
//! The mutants run in a process of their own whose memory is limited: a count that is believed before it is compared with
//! its file asks for more than there is, and that process dies. One process for all of them, because starting one takes
//! longer than reading a hundred mutants.

use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Map, Value, json};
use specforge::checkpoint::{self, CheckpointStore, Manifest, RetentionConfig};
use specforge::data::ChatTokenizer;
use specforge::decode::drafter::{DraftSampling, choices, open};
use specforge::error::{Error, Result};
use specforge::export;
use specforge::features::store::manifest::{FORMAT_VERSION, LAYER_CONVENTION};
use specforge::features::store::shard::{ShardWriter, file_name};
use specforge::features::store::{Element, Share, Store, StoreManifest};
use specforge::files::Digests;
use specforge::gguf::{ImportOptions, import};
use specforge::models::{TargetIdentity, TargetModel, load_target};
use specforge::nn::{Head, noise};
use specforge::vocab::VocabFile;
use specforge::weights::{self};
use tch::{Device, Kind, Tensor};

use crate::eagle3_exports::{self, LAYERS};
use crate::fixture::{TOKENIZER_SIZE, output_of, stderr_of, write_gguf, write_model};

/// Address space of the process, in KiB: libtorch and its threads take about half of it.
const MEMORY_KIB: u64 = 4 << 20;
/// A mutant that is read for ever is ended: all of them take seconds, and more where much else runs.
const LONGEST_SECONDS: u64 = 600;
/// Longest message that is one.
const LONGEST_MESSAGE: usize = 4000;

/// One kind of file: where it lies, and what reads it.
struct Subject<'a> {
    name: &'static str,
    file: PathBuf,
    /// Parts of the message that name the file: its path, or that of its folder.
    named: PathBuf,
    kind: Kinds,
    read: Box<dyn Fn() -> Result<()> + 'a>,
}

/// How a file is changed.
enum Kinds {
    /// JSON as a whole.
    Json,
    /// The JSON header of a safetensors file.
    Header,
    /// Numbers anywhere in these first bytes.
    Bytes(usize),
}

/// What a number, a text or a part may become.
fn replacements() -> Vec<Value> {
    vec![
        json!(0),
        json!(-1),
        json!(1),
        json!(1u64 << 31),
        json!(1u64 << 62),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(0.5),
        json!(1e308),
        json!("NaN"),
        json!("x".repeat(3000)),
        json!("../../../etc/passwd"),
        Value::Null,
        json!([]),
        json!({}),
        json!(true),
        json!([[[[]]]]),
    ]
}

/// Every place in a value, as a path of keys; of lists the first two elements.
fn places(value: &Value, at: &mut Vec<String>, into: &mut Vec<Vec<String>>) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), value)).collect(),
        Value::Array(list) => {
            list.iter().take(2).enumerate().map(|(index, value)| (index.to_string(), value)).collect()
        }
        _ => Vec::new(),
    };
    for (key, child) in children {
        at.push(key);
        into.push(at.clone());
        places(child, at, into);
        at.pop();
    }
}

fn place<'a>(value: &'a mut Value, path: &[String]) -> &'a mut Value {
    path.iter().fold(value, |value, key| match value {
        Value::Array(list) => &mut list[key.parse::<usize>().unwrap()],
        other => &mut other[key.as_str()],
    })
}

/// All mutants of a text of JSON, with a name each.
fn json_mutants(text: &str, wanted: &dyn Fn(&[String]) -> bool) -> Vec<(String, String)> {
    let value: Value = serde_json::from_str(text).unwrap();
    let mut all = Vec::new();
    let mut paths = Vec::new();
    places(&value, &mut Vec::new(), &mut paths);
    for path in paths.iter().filter(|path| wanted(path)) {
        let name = path.join(".");
        for replacement in replacements() {
            let mut mutant = value.clone();
            *place(&mut mutant, path) = replacement.clone();
            let shown: String = replacement.to_string().chars().take(24).collect();
            all.push((format!("{name} = {shown}"), mutant.to_string()));
        }
        let (last, before) = path.split_last().unwrap();
        let mut mutant = value.clone();
        if let Value::Object(map) = place(&mut mutant, before) {
            let removed: Option<Value> = map.remove(last);
            all.push((format!("{name} removed"), mutant.to_string()));
            // The key a second time, with another value.
            let mut twice = value.clone();
            let key = format!("{last}\u{1}");
            if let Value::Object(map) = place(&mut twice, before) {
                map.insert(key.clone(), removed.unwrap_or(Value::Null));
            }
            let quoted = serde_json::to_string(&key).unwrap();
            let text = twice.to_string().replace(&quoted, &serde_json::to_string(last).unwrap());
            all.push((format!("{name} twice"), text));
        }
    }
    for end in [0, 1, text.len() / 3, text.len() / 2, text.len() - 1] {
        all.push((format!("cut off at {end}"), text[..end].to_owned()));
    }
    for (name, text) in [
        ("no JSON", "not JSON at all".to_owned()),
        ("another value", "3".to_owned()),
        ("a list", "[]".to_owned()),
        ("more behind it", format!("{text} {{}}")),
        ("deep nesting", "[".repeat(5000)),
        ("NaN", text.replacen(": ", ": NaN ", 1).replacen(":1", ":NaN", 1)),
    ] {
        all.push((name.to_owned(), text));
    }
    all
}

/// All mutants of a file.
fn mutants(subject: &Subject<'_>, sound: &[u8]) -> Vec<(String, Vec<u8>)> {
    match subject.kind {
        Kinds::Json => {
            let text = std::str::from_utf8(sound).unwrap();
            json_mutants(text, &|_| true).into_iter().map(|(name, text)| (name, text.into_bytes())).collect()
        }
        Kinds::Header => {
            let length = u64::from_le_bytes(sound[..8].try_into().unwrap()) as usize;
            let (header, data) = (std::str::from_utf8(&sound[8..8 + length]).unwrap(), &sound[8 + length..]);
            let names: Map<String, Value> = serde_json::from_str(header).unwrap();
            let chosen: Vec<&String> = names.keys().take(3).chain(names.keys().rev().take(1)).collect();
            let wanted = |path: &[String]| chosen.contains(&&path[0]);
            let file = |header: &str| [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat();
            let mut all: Vec<(String, Vec<u8>)> =
                json_mutants(header, &wanted).into_iter().map(|(name, text)| (name, file(&text))).collect();
            for length in [0, 1, length as u64 + 1, 1 << 31, 1 << 62, u64::MAX] {
                all.push((format!("a header of {length} bytes"), [&length.to_le_bytes(), &sound[8..]].concat()));
            }
            all.extend(truncated(sound));
            all.push(("bytes behind it".to_owned(), [sound, &[0; 3]].concat()));
            all
        }
        Kinds::Bytes(most) => {
            let mut all: Vec<(String, Vec<u8>)> = truncated(sound);
            for offset in (0..most.min(sound.len() - 8)).step_by(3) {
                for number in [0, 1, 1 << 31, 1 << 62, u64::MAX] {
                    let mut mutant = sound.to_vec();
                    mutant[offset..offset + 8].copy_from_slice(&u64::to_le_bytes(number));
                    all.push((format!("{number:x} at byte {offset}"), mutant));
                }
            }
            all
        }
    }
}

fn truncated(sound: &[u8]) -> Vec<(String, Vec<u8>)> {
    let ends = [0, 1, 7, 8, 9, sound.len() / 4, sound.len() / 2, sound.len() - 1];
    ends.into_iter().map(|end| (format!("cut off at byte {end}"), sound[..end].to_vec())).collect()
}

/// What is wrong with how a mutant was taken.
fn problem(subject: &Subject<'_>) -> Option<String> {
    let outcome = panic::catch_unwind(AssertUnwindSafe(|| (subject.read)()));
    let error = match outcome {
        Ok(Ok(())) => return None,
        Ok(Err(error)) => error,
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("something");
            return Some(format!("panicked: {}", text.lines().next().unwrap_or_default()));
        }
    };
    let text = error.to_string();
    let named = subject.named.to_str().unwrap();
    // Lists of tensors, and of what each engine cannot do, have lines of their own.
    let is_list = matches!(error, Error::Tensors { .. }) || text.contains("cannot be served as it was trained");
    let lines = if is_list { 40 } else { 1 };
    let start: String = text.chars().take(300).collect();
    match () {
        () if text.len() > LONGEST_MESSAGE => Some(format!("{} bytes of message: {start}", text.len())),
        () if text.lines().count() > lines => Some(format!("several lines: {start}")),
        () if !text.contains(named) => Some(format!("does not name the file: {start}")),
        () if matches!(error, Error::Torch(_) | Error::Internal { .. }) => Some(format!("not our words: {start}")),
        () => None,
    }
}

/// A store of one shard with two documents.
fn write_store(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    let mut manifest = StoreManifest {
        format_version: FORMAT_VERSION,
        target: TargetIdentity {
            path: "target".into(),
            content: None,
            config: "c".to_owned(),
            tensors: "t".to_owned(),
            samples: "s".to_owned(),
            tables: "e".to_owned(),
        },
        target_dtype: "float32".to_owned(),
        hidden_size: 4,
        vocab_size: 10,
        num_layers: 2,
        tokenizer: "x".to_owned(),
        data: vec!["d".to_owned()],
        layers: vec![1, 2],
        layer_convention: LAYER_CONVENTION.to_owned(),
        element: Element::Float32,
        whole_vocabulary: false,
        shard_tokens: 100,
        origin: None,
        shards: Vec::new(),
    };
    let states = |stream| noise::normal(&[9, 4], 1.0, 1, stream);
    let mut writer = ShardWriter::new(&manifest, &[4, 5]);
    writer.add(&[1, 2, 3, 4, 5, 6, 7, 8, 9], &[states(1), states(2)]).unwrap();
    let entry = writer.write(folder, file_name(0), &Head::plain(noise::normal(&[10, 4], 1.0, 1, 3))).unwrap();
    manifest.shards.push(entry);
    manifest.write(folder).unwrap();
}

/// A Medusa checkpoint's description, and its tensors.
fn medusa_source() -> (Value, Vec<(String, Tensor)>) {
    let description = json!({
        "draft": {"algorithm": "medusa", "num_heads": 2, "num_layers": 1},
        "hidden_size": 32, "vocab_size": TOKENIZER_SIZE, "draft_vocab_size": TOKENIZER_SIZE, "num_target_layers": LAYERS,
    });
    let shapes = |head: i64| {
        [
            (format!("{head}.0.linear.weight"), vec![32, 32]),
            (format!("{head}.0.linear.bias"), vec![32]),
            (format!("{head}.1.weight"), vec![TOKENIZER_SIZE, 32]),
        ]
    };
    let tensors =
        (0..2).flat_map(shapes).zip(0..).map(|((name, shape), stream)| (name, noise::normal(&shape, 0.2, 2, stream)));
    (description, tensors.collect())
}

fn save_checkpoint(root: &Path, draft: Value, tensors: &[(String, Tensor)]) -> PathBuf {
    let store = CheckpointStore::open(root, RetentionConfig::default()).unwrap();
    let manifest = Manifest { step: 3, configuration: json!({"train": {"epochs": 2}}), draft, ..Manifest::default() };
    store.save(manifest, tensors, &[("step".to_owned(), Tensor::from(3f64))]).unwrap().path
}

/// Everything that is read, in folders below `root`.
fn subjects<'a>(root: &Path, target: &'a dyn TargetModel, target_path: &'a Path) -> Vec<Subject<'a>> {
    let mut all: Vec<Subject<'a>> = Vec::new();
    let mut add = |name, file: PathBuf, named: PathBuf, kind, read: Box<dyn Fn() -> Result<()> + 'a>| {
        all.push(Subject { name, file, named, kind, read });
    };

    // A model folder: configuration, weights, index, tokenizer.
    let model = root.join("model");
    write_model(&model, &json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}));
    for name in ["config.json", "model.safetensors"] {
        let (folder, kind) = (model.clone(), if name == "config.json" { Kinds::Json } else { Kinds::Header });
        let read = move || load_target(&folder, Kind::Float, Device::Cpu).map(drop);
        add("model", model.join(name), model.clone(), kind, Box::new(read));
    }
    let sharded = root.join("sharded");
    write_model(&sharded, &json!({}));
    fs::rename(sharded.join("model.safetensors"), sharded.join("model-00001-of-00001.safetensors")).unwrap();
    let names = weights::WeightsFolder::open(&sharded.join("model-00001-of-00001.safetensors")).unwrap();
    let map: Map<String, Value> =
        names.names().map(|name| (name.to_owned(), json!("model-00001-of-00001.safetensors"))).collect();
    let index = sharded.join("model.safetensors.index.json");
    fs::write(&index, json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string()).unwrap();
    let folder = sharded.clone();
    let read = move || load_target(&folder, Kind::Float, Device::Cpu).map(drop);
    add("index", index, sharded, Kinds::Json, Box::new(read));
    let tokens = root.join("tokens");
    write_model(&tokens, &json!({}));
    let more = [
        ("generation_config.json", json!({"eos_token_id": [2, 3]})),
        (
            "special_tokens_map.json",
            json!({"eos_token": {"content": "<|end|>"}, "additional_special_tokens": ["<|a|>"]}),
        ),
        ("added_tokens.json", json!({})),
        (
            "tokenizer_config.json",
            json!({"eos_token": "<|end|>", "own_token": "<|own|>", "added_tokens_decoder": {TOKENIZER_SIZE.to_string(): {
                "content": "<|end|>", "lstrip": false, "normalized": false, "rstrip": false, "single_word": false,
                "special": true}}, "extra_special_tokens": ["<|b|>"]}),
        ),
    ];
    let config = crate::fixture::model_config(&json!({"vocab_size": TOKENIZER_SIZE + 20}));
    fs::write(tokens.join("config.json"), config.to_string()).unwrap();
    for (name, value) in more {
        fs::write(tokens.join(name), value.to_string()).unwrap();
        let folder = tokens.clone();
        let read = move || ChatTokenizer::load(&folder, None).map(drop);
        add("tokenizer", tokens.join(name), tokens.clone(), Kinds::Json, Box::new(read));
    }

    // Drafts: exports of three layouts, read as an engine's files and opened to decode with.
    let sampling = DraftSampling::Greedy;
    let decode = move |folder: &Path| open::open(folder.to_str(), None, (target, target_path), sampling).map(drop);
    let eagle3 = eagle3_exports::source(&eagle3_exports::shape(), target_path, Kind::Float);
    for format in ["eagle3", "speculators"] {
        let out = root.join(format);
        export::export(&eagle3, format, &out, None).unwrap();
        for (name, kind) in [("config.json", Kinds::Json), ("model.safetensors", Kinds::Header)] {
            let folder = out.clone();
            let read = move || {
                export::eagle3::read(&folder, Some(LAYERS))?;
                export::check(&folder)?;
                decode(&folder)
            };
            add(format, out.join(name), out.clone(), kind, Box::new(read));
        }
    }
    let file = root.join("draft.gguf");
    export::export(&eagle3, "gguf", &file, None).unwrap();
    let path = file.clone();
    let read = move || {
        export::eagle3::read(&path, Some(LAYERS))?;
        export::check(&path)?;
        decode(&path)
    };
    add("GGUF draft", file.clone(), file, Kinds::Bytes(900), Box::new(read));
    let (description, tensors) = medusa_source();
    let source = export::Source {
        description: description.clone(),
        tensors: tensors.iter().map(|(name, value)| (name.clone(), value.shallow_clone())).collect(),
        target: target_path.to_path_buf(),
        target_name: None,
        kind: None,
        q8_0: false,
    };
    for (format, file) in [("medusa", "medusa_lm_head.safetensors"), ("medusa-vllm", "model.safetensors")] {
        let out = root.join(format);
        export::export(&source, format, &out, None).unwrap();
        for (name, kind) in [("config.json", Kinds::Json), (file, Kinds::Header)] {
            let folder = out.clone();
            let read = move || {
                export::medusa::read(&folder)?;
                decode(&folder)
            };
            add(format, out.join(name), out.clone(), kind, Box::new(read));
        }
    }

    // Checkpoints of both algorithms.
    let drafts =
        [("medusa checkpoint", description, tensors), ("eagle3 checkpoint", eagle3.description, eagle3.tensors)];
    for (name, draft, tensors) in drafts {
        let path = save_checkpoint(&root.join(name), draft, &tensors);
        let folder = path.clone();
        let read = move || {
            checkpoint::find(&folder)?.tensors()?;
            decode(&folder)
        };
        add(name, path.join("manifest.json"), path.clone(), Kinds::Json, Box::new(read));
    }

    // A vocabulary map, a tree, a store, a GGUF file.
    let map = root.join("map.safetensors");
    VocabFile { map: eagle3_exports::map(12), record: None }.write(&map).unwrap();
    let path = map.clone();
    add("vocabulary map", map.clone(), map, Kinds::Header, Box::new(move || VocabFile::read(&path).map(drop)));
    let tree = root.join("tree.json");
    fs::write(&tree, r#"{"choices": [[0], [1], [0, 0], [0, 1, 2], [0, 1]]}"#).unwrap();
    let path = tree.clone();
    add("tree", tree.clone(), tree, Kinds::Json, Box::new(move || choices::parse(path.to_str().unwrap()).map(drop)));
    let store = root.join("store");
    write_store(&store);
    let folder = store.clone();
    let read = move || Store::open(&folder, &Digests::unnoted(), Share::WHOLE, &|_, _| {}).map(drop);
    add("store", store.join("store.json"), store, Kinds::Json, Box::new(read));
    let gguf = root.join("model.gguf");
    write_gguf(&gguf);
    let (path, out) = (gguf.clone(), root.join("imported"));
    let read = move || {
        let _ = fs::remove_dir_all(&out);
        import(&path, &out, &ImportOptions::default(), &|_, _| {}).map(drop)
    };
    add("GGUF", gguf.clone(), gguf.clone(), Kinds::Bytes(900), Box::new(read));
    let (path, file) = (root.join("target.gguf"), root.join("target.gguf"));
    fs::copy(&gguf, &path).unwrap();
    let read = move || {
        ChatTokenizer::load(&path, None)?;
        load_target(&path, Kind::Float, Device::Cpu).map(drop)
    };
    add("GGUF target", file.clone(), file, Kinds::Bytes(300), Box::new(read));
    all
}

/// Reads every mutant; run by [`no_mutant_does_harm`] alone, under its limits.
#[test]
#[ignore = "run by another test, under a limit of memory"]
fn worker() {
    panic::set_hook(Box::new(|_| {}));
    let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let target_path = root.path().join("target");
    write_model(&target_path, &json!({"num_hidden_layers": LAYERS, "max_position_embeddings": 256}));
    let target = load_target(&target_path, Kind::Float, Device::Cpu).unwrap();
    let (mut count, mut wrong) = (0, 0);
    for subject in subjects(root.path(), target.as_ref(), &target_path) {
        let sound = fs::read(&subject.file).unwrap();
        if let Err(error) = (subject.read)() {
            println!("MUTANT {} as it is\nWRONG {error}", subject.name);
            continue;
        }
        for (name, bytes) in mutants(&subject, &sound) {
            // Said before, so that a process that dies has named what killed it.
            println!("MUTANT {}, {}: {name}", subject.name, subject.file.file_name().unwrap().display());
            fs::write(&subject.file, bytes).unwrap();
            count += 1;
            if let Some(problem) = problem(&subject) {
                wrong += 1;
                println!("WRONG {problem}");
            }
        }
        fs::write(&subject.file, sound).unwrap();
    }
    println!("DONE {count} mutants, {wrong} wrong");
}

#[test]
fn no_mutant_does_harm() {
    let mut worker = Command::new("bash");
    let script = format!("ulimit -v {MEMORY_KIB}; exec timeout -s KILL {LONGEST_SECONDS} \"$@\"");
    worker.args(["-c", &script, "limited"]).arg(std::env::current_exe().unwrap());
    worker.args(["bad_input::mutants::worker", "--exact", "--ignored", "--nocapture", "--test-threads", "1"]);
    worker.env("OMP_NUM_THREADS", "1").env("OMP_WAIT_POLICY", "passive").env("RAYON_NUM_THREADS", "2");
    worker.env_remove("RUST_BACKTRACE").stdin(Stdio::null());
    let output = output_of(&mut worker);
    let text = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<&str> = text.lines().collect();
    let wrong: Vec<String> = (1..lines.len())
        .filter(|&index| lines[index].starts_with("WRONG "))
        .map(|index| format!("{}\n    {}", lines[index - 1], lines[index]))
        .collect();
    let last = lines.iter().rev().find(|line| line.contains("MUTANT ")).copied().unwrap_or("none");
    let done = lines.iter().any(|line| line.starts_with("DONE "));
    assert!(done, "the process ended ({}) at: {last}\n{}", output.status, stderr_of(&output));
    assert!(wrong.is_empty(), "{} mutants are taken wrongly:\n{}", wrong.len(), wrong.join("\n"));
    assert!(output.status.success(), "{}", output.status);
}
