//! Drafts in GGUF files: the bytes of llama.cpp's own converter, the same numbers after the way there and back, refusals
//! with reasons, and training that starts from one.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use specforge::draft::eagle3::Eagle3Shape;
use specforge::export::eagle3::read;
use specforge::export::{Engine, Source, check_for, export};
use specforge::gguf::GgufFile;
use specforge::models::LayerShape;
use specforge::nn::{RopeConfig, RopeScaling};
use tch::{Kind, Tensor};

use crate::eagle3_exports::{engine_of, map, shape, source, workspace};
use crate::fixture::{
    TOKENIZER_SIZE, Workspace, contents, json_of, output_of, specforge, stderr_of, tensors_of, write_model,
};

/// Writes a draft to a file of this name beside its target.
fn written(source: &Source, folder: &Path, name: &str) -> std::path::PathBuf {
    let out = folder.join(name);
    export(source, "gguf", &out, None).unwrap();
    out
}

// -- llama.cpp's converter ---------------------------------------------------------------------------------------------

/// A GGUF file taken apart by a reader that shares nothing with the program's.
struct Parts<'a> {
    bytes: &'a [u8],
    place: usize,
}

/// Type and bytes of each key; type, shape with the innermost dimension first, and bytes of each tensor.
type Taken = (BTreeMap<String, (u32, Vec<u8>)>, BTreeMap<String, (u32, Vec<u64>, Vec<u8>)>);

impl Parts<'_> {
    fn number<const N: usize>(&mut self) -> [u8; N] {
        self.place += N;
        self.bytes[self.place - N..self.place].try_into().unwrap()
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.number())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.number())
    }

    fn text(&mut self) -> String {
        let length = self.u64() as usize;
        self.place += length;
        String::from_utf8(self.bytes[self.place - length..self.place].to_vec()).unwrap()
    }

    fn pass(&mut self, kind: u32) {
        match kind {
            8 => drop(self.text()),
            9 => {
                let inner = self.u32();
                (0..self.u64()).for_each(|_| self.pass(inner));
            }
            0 | 1 | 7 => self.place += 1,
            2 | 3 => self.place += 2,
            4..=6 => self.place += 4,
            10..=12 => self.place += 8,
            other => panic!("no value is of type {other}"),
        }
    }

    fn all(bytes: &[u8]) -> Taken {
        assert_eq!(&bytes[..8], b"GGUF\x03\0\0\0");
        let mut parts = Parts { bytes, place: 8 };
        let (tensors, keys) = (parts.u64(), parts.u64());
        let (mut values, mut infos) = (BTreeMap::new(), Vec::new());
        for _ in 0..keys {
            let (key, kind) = (parts.text(), parts.u32());
            let start = parts.place;
            parts.pass(kind);
            values.insert(key, (kind, bytes[start..parts.place].to_vec()));
        }
        for _ in 0..tensors {
            let name = parts.text();
            let rank = parts.u32();
            let shape: Vec<u64> = (0..rank).map(|_| parts.u64()).collect();
            infos.push((name, shape, parts.u32(), parts.u64()));
        }
        let data = parts.place.next_multiple_of(32);
        let tensors = infos.into_iter().map(|(name, shape, kind, offset)| {
            let elements: u64 = shape.iter().product();
            let length = match kind {
                0 => elements * 4,
                1 | 30 => elements * 2,
                8 => elements / 32 * 34,
                27 => elements * 8,
                other => panic!("no tensor is of type {other}"),
            };
            let start = data + offset as usize;
            (name, (kind, shape, bytes[start..start + length as usize].to_vec()))
        });
        (values, tensors.collect())
    }
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// The draft of `gguf_compare.py fixture`: numbers by a formula that float32 holds exactly.
fn by_formula(target: &Path) -> Source {
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192.0,
    };
    let rope = RopeConfig { theta: 500_000.0, head_dim: 6, max_position_embeddings: 256, scaling };
    let layer = LayerShape { rope, ..shape().layer };
    let shape = Eagle3Shape {
        hidden_size: 64,
        target_hidden_size: 64,
        max_position_embeddings: 256,
        layer,
        norm_before_fc: true,
        norm_before_residual: true,
        ..shape()
    };
    let mut names = shape.tensors();
    names.sort();
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    for (stream, (name, size)) in (0u64..).zip(names) {
        let number = |index: u64| {
            let state = index * 2_654_435_761 + stream * 40_503 + 1;
            ((state >> 7) % 65_536) as f32 / 32_768.0 - 1.0
        };
        let values: Vec<f32> = (0..size.iter().product::<i64>() as u64).map(number).collect();
        tensors.push((name, Tensor::from_slice(&values).view(size.as_slice())));
    }
    let map = map(shape.draft_vocab_size);
    tensors.push(("d2t".to_owned(), Tensor::from_slice(&map.d2t())));
    tensors.push(("t2d".to_owned(), Tensor::from_slice(&map.t2d())));
    let description = json!({"draft": {"algorithm": "eagle3"}, "shape": shape});
    Source { description, tensors, target: target.to_path_buf(), target_name: None, kind: None, q8_0: false }
}

/// Every key and every tensor, byte for byte, but for the file's name.
#[test]
fn the_file_is_that_of_llama_cpps_own_converter() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let target = folder.path().join("target");
    let changes = json!({"hidden_size": 64, "num_hidden_layers": 8, "bos_token_id": 1});
    write_model(&target, &changes);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/gguf/converted.json");
    let noted: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let kinds = [("float32", Some(Kind::Float)), ("float16", Some(Kind::Half)), ("bfloat16", Some(Kind::BFloat16))];
    for (dtype, kind) in kinds.into_iter().chain([("q8_0", None), ("llama3", None)]) {
        if dtype == "llama3" {
            // The same draft behind a tokenizer of another kind.
            let path = target.join("tokenizer.json");
            let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            let parts: Value = serde_json::from_str(noted["llama3_tokenizer"].as_str().unwrap()).unwrap();
            for (key, part) in parts.as_object().unwrap() {
                tokenizer[key] = part.clone();
            }
            tokenizer["model"]["ignore_merges"] = json!(true);
            fs::write(&path, tokenizer.to_string()).unwrap();
        }
        let source = Source { kind, q8_0: dtype == "q8_0", ..by_formula(&target) };
        let (keys, tensors) = Parts::all(&fs::read(written(&source, folder.path(), &format!("{dtype}.gguf"))).unwrap());
        let keys = keys.iter().filter(|(key, _)| *key != "general.name");
        let keys: BTreeMap<_, _> =
            keys.map(|(key, (kind, bytes))| (key.clone(), json!([kind, digest(bytes)]))).collect();
        let want = noted[dtype]["keys"].as_object().unwrap().iter();
        let want: BTreeMap<_, _> = want.map(|(key, value)| (key.clone(), json!([value[0], value[1]]))).collect();
        assert_eq!(keys, want, "{dtype}");
        let names = [(0, "F32"), (1, "F16"), (8, "Q8_0"), (27, "I64"), (30, "BF16")];
        let label = |kind: u32| names.iter().find(|(id, _)| *id == kind).unwrap().1;
        let tensors = tensors.iter();
        let tensors: BTreeMap<_, _> = tensors
            .map(|(name, (kind, shape, bytes))| (name.clone(), json!([label(*kind), shape, digest(bytes)])))
            .collect();
        let want: BTreeMap<String, Value> = serde_json::from_value(noted[dtype]["tensors"].clone()).unwrap();
        assert_eq!(tensors, want, "{dtype}");
    }
}

// -- there and back ----------------------------------------------------------------------------------------------------

/// Shapes that the format can hold: flags, another width, the whole vocabulary, rotary variants.
fn shapes() -> Vec<Eagle3Shape> {
    let with = |change: fn(&mut Eagle3Shape)| {
        let mut shape = shape();
        change(&mut shape);
        shape
    };
    vec![
        with(|_| ()),
        with(|shape| (shape.norm_before_fc, shape.norm_before_residual) = (true, true)),
        with(|shape| (shape.hidden_size, shape.capture) = (24, vec![0, 1, 7])),
        with(|shape| shape.draft_vocab_size = TOKENIZER_SIZE),
        with(|shape| shape.layer.rope.scaling = RopeScaling::Linear { factor: 2.5 }),
        with(|shape| {
            shape.layer.rope.theta = 500_000.0;
            shape.layer.rope.scaling = RopeScaling::Llama3 {
                factor: 32.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192.0,
            }
        }),
    ]
}

#[test]
fn a_draft_comes_back_bit_for_bit() {
    let (folder, target) = workspace();
    for (number, shape) in shapes().into_iter().enumerate() {
        let source = source(&shape, &target, Kind::Float);
        let file = written(&source, folder.path(), &format!("{number}.gguf"));
        let back = read(&file, None).unwrap();
        // The file does not say how many layers the target has, and gives the draft the target's length.
        let length = back.shape.max_position_embeddings;
        let mut want = Eagle3Shape { num_target_layers: 0, max_position_embeddings: length, ..shape.clone() };
        want.layer.rope.max_position_embeddings = length;
        assert_eq!((length, &back.shape), (256, &want));
        let narrow = shape.draft_vocab_size < shape.vocab_size;
        assert_eq!(back.vocabulary, narrow.then(|| map(shape.draft_vocab_size)));
        for (name, tensor) in &back.tensors {
            let (_, want) = source.tensors.iter().find(|(other, _)| other == name).unwrap();
            assert!(tensor.kind() == Kind::Float && tensor.equal(want), "{name} of {number}");
        }
        assert_eq!(back.tensors.len() + 2 * usize::from(narrow), source.tensors.len());

        // As a folder, through the program; and that folder is a draft like any other.
        let out = folder.path().join(format!("folder-{number}"));
        json_of(specforge(&["import", "--json"]).arg(&file).arg("--out").arg(&out));
        let again = tensors_of(&out);
        assert_eq!(again.len(), source.tensors.len());
        for (name, tensor) in again {
            let (_, want) = source.tensors.iter().find(|(other, _)| *other == name).unwrap();
            assert!(tensor.kind() == want.kind() && tensor.equal(want), "{name} of {number}");
        }
        check_for(&out, Some(Engine::Vllm)).unwrap();
    }
}

/// Fewer bits give nearly the same numbers, and rows that do not divide into blocks keep sixteen.
#[test]
fn narrow_types_hold_what_they_can() {
    let (folder, target) = workspace();
    let exact = source(&shape(), &target, Kind::Float);
    let cases = [(Some(Kind::Half), 1e-3), (Some(Kind::BFloat16), 8e-3), (None, 8e-3)];
    for (number, (kind, most)) in cases.into_iter().enumerate() {
        let source = Source { kind, q8_0: kind.is_none(), ..source(&shape(), &target, Kind::Float) };
        let file = written(&source, folder.path(), &format!("{number}.gguf"));
        for (name, tensor) in read(&file, None).unwrap().tensors {
            let (_, want) = exact.tensors.iter().find(|(other, _)| *other == name).unwrap();
            let error = (&tensor - want).abs().max().double_value(&[]) / want.abs().max().double_value(&[]);
            assert!(error <= most, "{name}: {error}");
            assert_eq!(error == 0.0, want.dim() == 1, "{name}: vectors stay float32, matrices do not");
        }
        let file = GgufFile::open(&file).unwrap();
        let kinds: BTreeMap<&str, &str> = file.tensors().map(|(name, _, kind)| (name, kind)).collect();
        let wide = ["F16", "BF16", "Q8_0"][number];
        assert_eq!((kinds["fc.weight"], kinds["output_norm.weight"], kinds["d2t"]), (wide, "F32", "I64"));
        // 48 and 24 columns.
        let odd = if number == 2 { "F16" } else { wide };
        assert_eq!((kinds["blk.0.ffn_down.weight"], kinds["blk.0.attn_output.weight"]), (odd, odd));
    }
    let large = Source { kind: Some(Kind::Half), ..source(&shape(), &target, Kind::Float) };
    let _ = large.tensors.iter().find(|(name, _)| name == "fc.weight").unwrap().1.get(0).fill_(70_000.0);
    let error = export(&large, "gguf", &folder.path().join("large.gguf"), None).unwrap_err().to_string();
    assert!(error.contains("`fc.weight` holds 70000, too large"), "{error}");
}

// -- refusals ----------------------------------------------------------------------------------------------------------

#[test]
fn what_the_format_cannot_say_is_refused_with_the_reason() {
    let (folder, target) = workspace();
    type Case = (fn(&mut Eagle3Shape), &'static str);
    let cases: [Case; 8] = [
        (|shape| shape.fc_norm = true, "`fc_norm`"),
        (|shape| shape.norm_output = false, "`norm_output: false`"),
        (|shape| shape.norm_feedback = true, "`norm_feedback`"),
        (|shape| shape.capture = vec![2, 4], "reads 2 captured layers, llama.cpp 3"),
        (|shape| shape.num_layers = 2, "has 2 layers, llama.cpp's one"),
        (|shape| shape.capture = vec![2, 4, 8], "the last, normed output of the target (index 8)"),
        (|shape| shape.layer.rope.scaling = RopeScaling::Dynamic { factor: 2.0 }, "stretches with the length"),
        (
            |shape| {
                shape.layer.rope.scaling = RopeScaling::Yarn {
                    factor: 4.0,
                    attention_factor: 1.25,
                    beta_fast: 32.0,
                    beta_slow: 1.0,
                    original_max_position_embeddings: 64.0,
                    truncate: false,
                }
            },
            "YaRN",
        ),
    ];
    let before = contents(folder.path());
    for (change, part) in cases {
        let mut shape = shape();
        change(&mut shape);
        let error = export(&source(&shape, &target, Kind::Float), "gguf", &folder.path().join("out.gguf"), None);
        let error = error.unwrap_err().to_string();
        assert!(error.contains(part), "no `{part}` in {error}");
    }
    let medusa =
        Source { description: json!({"draft": {"algorithm": "medusa"}}), ..source(&shape(), &target, Kind::Float) };
    let error = export(&medusa, "gguf", &folder.path().join("out.gguf"), None).unwrap_err().to_string();
    assert!(error.contains("llama.cpp knows EAGLE-3 drafts"), "{error}");

    // Where to: a file of that name, and nothing of the user's is replaced.
    let draft = || source(&shape(), &target, Kind::Float);
    let places =
        [("target", "found a folder"), ("out", "ends in .gguf"), ("target/config.gguf", "is a file that is no gguf")];
    fs::write(folder.path().join("target/config.gguf"), "diary").unwrap();
    for (place, part) in places {
        let error = export(&draft(), "gguf", &folder.path().join(place), None).unwrap_err().to_string();
        assert!(error.contains(part), "no `{part}` in {error}");
    }
    assert_eq!(fs::read_to_string(folder.path().join("target/config.gguf")).unwrap(), "diary");
    fs::remove_file(folder.path().join("target/config.gguf")).unwrap();
    // Another layout cannot hold blocks.
    let error = export(&Source { q8_0: true, ..draft() }, "eagle3", &folder.path().join("out"), None).unwrap_err();
    assert!(error.to_string().contains("--dtype q8_0"), "{error}");
    // A tokenizer that has no name there.
    let path = target.join("tokenizer.json");
    let sound = fs::read_to_string(&path).unwrap();
    fs::write(&path, sound.replace("\"individual_digits\":true", "\"individual_digits\":false")).unwrap();
    if fs::read_to_string(&path).unwrap() == sound {
        fs::write(&path, sound.replace("\"individual_digits\": true", "\"individual_digits\": false")).unwrap();
    }
    let error = export(&draft(), "gguf", &folder.path().join("out.gguf"), None).unwrap_err();
    assert!(error.to_string().contains("tokenizer.json: `pre_tokenizer`"), "{error}");
    fs::write(&path, sound).unwrap();
    assert_eq!(contents(folder.path()), before, "something was left behind");

    // An older export of the same kind is replaced.
    written(&draft(), folder.path(), "out.gguf");
    written(&draft(), folder.path(), "out.gguf");
}

#[test]
fn llama_cpps_rules_are_those_of_the_check() {
    let (folder, target) = workspace();
    let file = written(&source(&shape(), &target, Kind::Float), folder.path(), "draft.gguf");
    let report = check_for(&file, Some(Engine::LlamaCpp)).unwrap();
    assert_eq!((report.format.as_str(), report.tensors), ("gguf", 15));
    let (resolved, problems) = engine_of(&report, Engine::LlamaCpp);
    assert_eq!(problems, "");
    for part in ["[2, 4, 5]", "base 10000", "40 of 454 tokens", "--spec-type draft-eagle3"] {
        assert!(resolved.contains(part), "no `{part}` in {resolved}");
    }
    // The others do not read it.
    assert!(report.engines.iter().all(|known| known.engine == Engine::LlamaCpp));
    let error = check_for(&target, Some(Engine::LlamaCpp)).unwrap_err().to_string();
    assert!(error.contains("known format"), "{error}");

    // A folder needs llama.cpp's converter, and is judged by what that makes of it.
    let out = folder.path().join("folder");
    let bytes = |shape: &Eagle3Shape| {
        let _ = fs::remove_dir_all(&out);
        export(&source(shape, &target, Kind::Float), "eagle3", &out, None)
    };
    bytes(&shape()).unwrap();
    let report = check_for(&out, Some(Engine::LlamaCpp)).unwrap();
    assert!(engine_of(&report, Engine::LlamaCpp).0.contains("convert_hf_to_gguf.py"));
    bytes(&Eagle3Shape { fc_norm: true, ..shape() }).unwrap();
    let error = check_for(&out, Some(Engine::LlamaCpp)).unwrap_err().to_string();
    assert!(error.contains("llama.cpp: cannot be told what it is") && error.contains("`fc_norm`"), "{error}");
    // Nobody asks for llama.cpp: a folder that no engine loads as it is stays refused.
    let dynamic = |shape: &mut Eagle3Shape| shape.layer.rope.scaling = RopeScaling::Dynamic { factor: 2.0 };
    let mut shape = shape();
    dynamic(&mut shape);
    assert!(bytes(&shape).is_err());
}

/// A file that was spoilt is refused with the tensor or key, and never with a panic.
#[test]
fn damaged_drafts_are_refused() {
    let (folder, target) = workspace();
    let file = written(&source(&shape(), &target, Kind::Float), folder.path(), "draft.gguf");
    let sound = fs::read(&file).unwrap();
    let place = |text: &[u8]| sound.windows(text.len()).position(|window| window == text).unwrap();
    let refused = |change: &dyn Fn(&mut Vec<u8>), part: &str| {
        let mut bytes = sound.clone();
        change(&mut bytes);
        fs::write(&file, bytes).unwrap();
        let error = read(&file, None).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("draft.gguf"), "no `{part}` in {error}");
        check_for(&file, None).unwrap_err();
    };
    refused(&|bytes| bytes.truncate(bytes.len() - 100), "the file ends");
    // [4 type][4 type of elements][8 count][4 each]
    let layers = place(b"eagle3.target_layers") + 20 + 16;
    refused(&|bytes| bytes[layers..layers + 4].copy_from_slice(&(-1i32).to_le_bytes()), "`eagle3.target_layers`");
    refused(&|bytes| bytes[layers..layers + 4].copy_from_slice(&7i32.to_le_bytes()), "low to high");
    let blocks = place(b"eagle3.block_count") + 18 + 4;
    refused(&|bytes| bytes[blocks] = 2, "`eagle3.block_count`: expected 1, got 2");
    let name = place(b"output_norm.weight");
    refused(&|bytes| bytes[name] = b'O', "missing (1)");
    // The last tensor: ids, of which two are the same, or beyond the target's.
    let length = sound.len();
    refused(&|bytes| bytes.copy_within(length - 16..length - 8, length - 8), "`d2t`");
    refused(&|bytes| bytes[length - 1] = 0x7f, "`d2t`");
    let other = place(b"general.architecture") + 20 + 4 + 8;
    refused(&|bytes| bytes[other..other + 6].copy_from_slice(b"qwen33"), "expected the architecture `eagle3`");
}

// -- training ----------------------------------------------------------------------------------------------------------

#[test]
fn training_starts_from_a_gguf_file_and_decodes_with_it() {
    let mut workspace = Workspace::with_model(&json!({"num_hidden_layers": 8}));
    workspace.configuration["draft"] = json!({"algorithm": "eagle3", "ttt_steps": 2, "draft_vocab_size": 100});
    let first = workspace.train("first", &[]);
    let out = workspace.path("draft.gguf");
    let mut command = specforge(&["export", "--json", "--format", "gguf", "--engine", "llama.cpp", "--checkpoint"]);
    let report = json_of(command.arg(workspace.path("first")).arg("--out").arg(&out));
    assert_eq!((&report["format"], &report["engines"][0]["problems"]), (&json!("gguf"), &json!([])), "{report}");
    let checked = json_of(specforge(&["export", "--json", "--check"]).arg(&out));
    assert_eq!(checked["resolved"], report["resolved"]);

    let init = format!("draft.init_from={}", out.display());
    let second = workspace.train("second", &["--set", &init, "--set", "train.max_steps=1"]);
    assert_eq!(second["start"], first["end"]);
    let mut command = workspace.train_command("other", &["--set", &init, "--set", "draft.capture=[1,4,6]"]);
    let message = stderr_of(&output_of(&mut command));
    for part in ["`draft.init_from`", "captured layers: [2, 4, 5] there, [1, 4, 6] here (draft.capture)"] {
        assert!(message.contains(part), "no `{part}` in {message}");
    }

    // The same tokens and the same rounds as with the folder of the same draft.
    let folder = workspace.path("exported");
    let mut command = specforge(&["export", "--json", "--format", "eagle3", "--checkpoint"]);
    json_of(command.arg(workspace.path("first")).arg("--out").arg(&folder));
    let decoded = |draft: &Path| {
        let prompt = ["--prompt", "the river", "--max-new-tokens", "12", "--device", "cpu", "--json"];
        let mut command = specforge(&["generate", "--target"]);
        command.arg(workspace.path("model")).arg("--draft").arg(draft).args(prompt);
        let report = json_of(&mut command);
        assert!(!report["token_ids"].as_array().unwrap().is_empty(), "{report}");
        (report["token_ids"].clone(), report["summary"]["rounds"].clone())
    };
    assert_eq!(decoded(&out), decoded(&folder));
}
