//! Sound files of every kind, made by the program itself from a small random model.

use std::fs;
use std::io::Write;
use std::path::Path;

use serde_json::json;

use crate::{fixture, specforge};

/// Names a folder to copy from, which the first target that runs fills.
const KEPT: &str = "SPECFORGE_FUZZ_SOUND";
const COMPLETE: &str = "complete";

/// Fills an empty folder.
pub(crate) fn fill(folder: &Path) {
    let kept = std::env::var_os(KEPT).map(std::path::PathBuf::from);
    match kept.filter(|kept| kept.is_dir()) {
        None => make(folder),
        Some(kept) if kept.join(COMPLETE).exists() => copy(&kept, folder),
        Some(kept) => {
            make(folder);
            copy(folder, &kept);
            fs::write(kept.join(COMPLETE), "").expect("a mark");
        }
    }
}

fn copy(from: &Path, to: &Path) {
    for (path, bytes) in fixture::contents(from) {
        let path = to.join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, bytes).expect("room for a file");
    }
}

fn make(folder: &Path) {
    std::env::set_current_dir(folder).expect("the new folder");
    fixture::write_model(Path::new("model"), &json!({"vocab_size": fixture::TOKENIZER_SIZE, "eos_token_id": [2]}));
    write("model/generation_config.json", r#"{"eos_token_id": [1, 2], "bos_token_id": 1}"#);
    write("model/special_tokens_map.json", r#"{"bos_token": {"content": "<|im_start|>"}, "pad_token": "<|im_end|>"}"#);
    write("model/model.safetensors.index.json", &index("model/model.safetensors"));
    fixture::write_gguf(Path::new("model.gguf"));
    write_wheel("model.whl", "model.gguf");
    let own = fs::read("model/tokenizer_config.json").expect("a configuration of the tokenizer");
    let own: serde_json::Value = serde_json::from_slice(&own).expect("JSON");
    write("chat_template.json", &json!({"chat_template": own["chat_template"]}).to_string());
    write("template.jinja", own["chat_template"].as_str().expect("a template"));
    write("conversations.jsonl", &fixture::conversations(6));
    write("questions.jsonl", "{\"question_id\": 1, \"category\": \"a\", \"turns\": [\"why\", \"and then\"]}\n");
    write("tree.json", "[[0], [1], [0, 0]]");
    write("tree.txt", "chain:2");
    write("sets.txt", "train.max_steps=2\noptim.schedule.kind=linear\n");
    write("run.json", &configuration().to_string());
    let run = |arguments: &[&str]| specforge(arguments).unwrap_or_else(|error| panic!("{arguments:?}: {error}"));
    run(&["train", "--config", "run.json", "--device", "cpu"]);
    let eagle3 = [r#"draft={"algorithm": "eagle3", "capture": [0, 1]}"#, "train.output_dir=run-eagle3"];
    run(&["train", "--config", "run.json", "--device", "cpu", "--set", eagle3[0], "--set", eagle3[1]]);
    for (checkpoint, format) in
        [("run", "medusa"), ("run", "medusa-vllm"), ("run-eagle3", "eagle3"), ("run-eagle3", "speculators")]
    {
        run(&["export", "--checkpoint", checkpoint, "--format", format, "--out", format]);
    }
    run(&["vocab", "--config", "run.json", "--draft-vocab-size", "300", "--out", "map.safetensors"]);
    let torch_map = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/vocab/vocab_mapping.pt");
    fs::copy(torch_map, "vocab_mapping.pt").expect("a map of SpecForge");
    run(&["capture", "--config", "run.json", "--out", "store", "--device", "cpu"]);
    for name in ["a.trace", "b.trace"] {
        let prompt = ["--prompt", "why", "--max-new-tokens", "4", "--trace", name];
        run(&[&["generate", "--json", "--target", "model", "--draft", "medusa", "--device", "cpu"], &prompt[..]]
            .concat());
    }
    // As SafeAILab publishes its drafts; the map alone, which the reader of such files looks at first.
    fs::create_dir("pickled").expect("a folder");
    fs::copy("eagle3/config.json", "pickled/config.json").expect("a configuration");
    fs::copy("vocab_mapping.pt", "pickled/pytorch_model.bin").expect("a map");
    let answers = ["--out", "answers.jsonl", "--max-new-tokens", "4", "--device", "cpu"];
    run(&[&["regen", "--target", "model", "--prompts", "conversations.jsonl"], &answers[..]].concat());
}

fn write(name: &str, text: &str) {
    fs::write(name, text).expect("room for a file");
}

fn write_wheel(name: &str, gguf: &str) {
    let mut wheel = zip::ZipWriter::new(fs::File::create(name).expect("room for a file"));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    wheel.start_file("package/model.gguf", stored).expect("room for a file");
    wheel.write_all(&fs::read(gguf).expect("a GGUF file")).expect("room for a file");
    wheel.finish().expect("a whole wheel");
}

/// An index, as for a model in several files.
fn index(weights: &str) -> String {
    let names = fixture::tensors_of(Path::new(weights)).into_iter().map(|(name, _)| (name, json!("model.safetensors")));
    json!({"metadata": {}, "weight_map": names.collect::<serde_json::Map<_, _>>()}).to_string()
}

fn configuration() -> serde_json::Value {
    json!({
        "target": {"path": "model"},
        "draft": {"algorithm": "medusa", "num_heads": 2},
        "data": {"train": ["conversations.jsonl"], "eval_fraction": 0.0, "max_length": 64, "cache_dir": "cache"},
        "optim": {"learning_rate": 1e-3},
        "train": {
            "output_dir": "run", "epochs": 1, "max_steps": 1, "batch_tokens": 64, "micro_batch_tokens": 64,
            "eval_every": 0, "chunk_mib": 1
        },
    })
}
