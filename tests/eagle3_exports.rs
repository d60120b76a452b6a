//! EAGLE-3 exports: the same bytes after export, import and export; names and shapes by the engines' own rules; a clear
//! refusal of every damage and of what an engine cannot serve; and training that starts from a published draft.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};
use specforge::draft::eagle3::Eagle3Shape;
use specforge::export::eagle3::{Imported, read};
use specforge::export::{Engine, ExportReport, Source, check, check_for, export};
use specforge::models::LayerShape;
use specforge::nn::{RopeConfig, RopeScaling, noise};
use specforge::vocab::VocabMap;
use specforge::weights;
use tch::{Kind, Tensor};

use crate::fixture::{
    TOKENIZER_SIZE, Workspace, contents, json_of, litter, output_of, specforge, stderr_of, tensors_of, write_model,
};

const LAYERS: usize = 8;
const DRAFT_VOCABULARY: i64 = 40;

/// A folder with a target of eight layers, where exports go too.
fn workspace() -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let target = folder.path().join("target");
    write_model(&target, &json!({"num_hidden_layers": LAYERS, "max_position_embeddings": 256}));
    (folder, target)
}

fn shape() -> Eagle3Shape {
    let rope = RopeConfig { theta: 10_000.0, head_dim: 6, max_position_embeddings: 64, scaling: RopeScaling::Default };
    Eagle3Shape {
        hidden_size: 32,
        target_hidden_size: 32,
        num_target_layers: LAYERS,
        vocab_size: TOKENIZER_SIZE,
        draft_vocab_size: DRAFT_VOCABULARY,
        num_layers: 1,
        max_position_embeddings: 64,
        layer: LayerShape {
            intermediate_size: 48,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 6,
            rms_norm_eps: 1e-5,
            rope,
        },
        capture: vec![2, 4, 5],
        fc_norm: false,
        norm_before_fc: false,
        norm_before_residual: false,
        norm_output: true,
        norm_feedback: false,
    }
}

fn map(size: i64) -> VocabMap {
    VocabMap::new((0..size).map(|id| id * 7 + id % 3).collect(), TOKENIZER_SIZE).unwrap()
}

fn source(shape: &Eagle3Shape, target: &Path, kind: Kind) -> Source {
    let named = shape.tensors().into_iter().enumerate();
    let mut tensors: Vec<(String, Tensor)> =
        named.map(|(stream, (name, size))| (name, noise::normal(&size, 0.5, 3, stream as u64).to_kind(kind))).collect();
    if shape.draft_vocab_size < shape.vocab_size {
        let map = map(shape.draft_vocab_size);
        tensors.push(("d2t".to_owned(), Tensor::from_slice(&map.d2t())));
        tensors.push(("t2d".to_owned(), Tensor::from_slice(&map.t2d())));
    }
    Source { description: json!({"draft": {}, "shape": shape}), tensors, target: target.to_path_buf(), kind: None }
}

/// Shapes with every combination of flags, and the other choices spread over them.
fn shapes() -> Vec<Eagle3Shape> {
    let scalings = [
        RopeScaling::Default,
        RopeScaling::Linear { factor: 2.5 },
        RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64.0,
        },
        RopeScaling::Yarn {
            factor: 4.0,
            attention_factor: 1.25,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_max_position_embeddings: 64.0,
            truncate: false,
        },
    ];
    (0..32)
        .map(|bits: usize| {
            let on = |bit: usize| bits >> bit & 1 == 1;
            let mut shape = Eagle3Shape {
                fc_norm: on(0),
                norm_before_fc: on(1),
                norm_before_residual: on(2),
                norm_feedback: on(3),
                num_layers: 1 + bits % 3,
                target_hidden_size: if on(4) { 32 } else { 48 },
                ..shape()
            };
            if bits % 5 == 0 {
                shape.draft_vocab_size = shape.vocab_size;
            }
            if bits % 7 == 3 {
                shape.capture = vec![1, 3, 5, 7];
            }
            shape.layer.rope.theta = [10_000.0, 500_000.0, 1234.5][bits % 3];
            shape.layer.rope.scaling = scalings[bits % 4];
            shape
        })
        .collect()
}

/// Another target for drafts whose target is wider.
fn target_of(shape: &Eagle3Shape, folder: &Path) -> std::path::PathBuf {
    let target = folder.join(format!("target-{}", shape.target_hidden_size));
    if !target.exists() {
        let width = shape.target_hidden_size;
        write_model(&target, &json!({"num_hidden_layers": LAYERS, "hidden_size": width}));
    }
    target
}

#[test]
fn export_import_export_is_the_identity() {
    let (folder, _) = workspace();
    for (number, shape) in shapes().into_iter().enumerate() {
        let kind = if number % 2 == 0 { Kind::Float } else { Kind::BFloat16 };
        let target = target_of(&shape, folder.path());
        let source = source(&shape, &target, kind);
        for format in ["eagle3", "speculators"] {
            if format == "speculators" && shape.fc_norm && shape.norm_before_fc {
                let error = export(&source, format, &folder.path().join("never"), None).unwrap_err().to_string();
                assert!(error.contains("use --format eagle3"), "{error}");
                continue;
            }
            let [first, second] =
                ["first", "second"].map(|name| folder.path().join(format!("{name}-{format}-{number}")));
            let report = export(&source, format, &first, None).unwrap();
            assert_eq!(report.warnings, Vec::<String>::new());
            let Imported { shape: read_shape, alternative, tensors, vocabulary, .. } = read(&first, None).unwrap();
            assert_eq!(read_shape, shape, "{format}");
            assert_eq!(alternative, None);
            let is_small = shape.draft_vocab_size < shape.vocab_size;
            assert_eq!(vocabulary, is_small.then(|| map(shape.draft_vocab_size)));
            let mut again = Source { tensors, ..self::source(&read_shape, &target, kind) };
            for (name, tensor) in &again.tensors {
                let (_, want) = source.tensors.iter().find(|(other, _)| other == name).unwrap();
                assert!(tensor.kind() == kind && tensor.equal(want), "{name}");
            }
            if let Some(map) = vocabulary {
                again.tensors.push(("d2t".to_owned(), Tensor::from_slice(&map.d2t())));
                again.tensors.push(("t2d".to_owned(), Tensor::from_slice(&map.t2d())));
            }
            export(&again, format, &second, None).unwrap();
            assert!(contents(&first) == contents(&second), "{format}: {read_shape:?}");
        }
    }
    assert_eq!(litter(folder.path()), Vec::<std::path::PathBuf>::new());
}

// -- the engines' loaders ----------------------------------------------------------------------------------------------

/// Parameters of SGLang's `LlamaForCausalLMEagle3` or vLLM's `Eagle3LlamaForCausalLM`, and which must be loaded.
fn engine_parameters(engine: Engine, config: &Value, target_vocabulary: i64) -> BTreeMap<String, (Vec<i64>, bool)> {
    let number = |key: &str| config[key].as_i64().unwrap();
    let flag = |key: &str| config.get(key).and_then(Value::as_bool).unwrap_or(false);
    let hidden = number("hidden_size");
    let target = config.get("target_hidden_size").map_or(hidden, |width| width.as_i64().unwrap());
    let count = number("num_aux_hidden_states");
    let (heads, groups, dim) = (number("num_attention_heads"), number("num_key_value_heads"), number("head_dim"));
    let width = number("intermediate_size");
    let mut found = BTreeMap::new();
    let mut add = |name: String, shape: Vec<i64>, needed: bool| drop(found.insert(name, (shape, needed)));
    add("model.embed_tokens.weight".into(), vec![number("vocab_size"), hidden], target != hidden);
    add("model.fc.weight".into(), vec![hidden, target * count], true);
    add("model.norm.weight".into(), vec![hidden], true);
    add("lm_head.weight".into(), vec![number("draft_vocab_size"), hidden], true);
    if flag("norm_before_fc") {
        add("model.input_norm.weight".into(), vec![target * count], true);
    }
    if flag("fc_norm") {
        (0..count).for_each(|index| add(format!("model.fc_norm.{index}.weight"), vec![target], true));
    }
    if engine == Engine::Vllm && number("draft_vocab_size") != target_vocabulary {
        add("draft_id_to_target_id".into(), vec![number("draft_vocab_size")], true);
    }
    for layer in 0..number("num_hidden_layers") {
        let input = if layer == 0 { 2 * hidden } else { hidden };
        // SGLang norms later layers by hidden_norm, vLLM by input_layernorm; both have both.
        let read = |norm: &str| layer == 0 || (norm == "hidden_norm") == (engine == Engine::Sglang);
        let mut add =
            |name: &str, shape: &[i64], needed| add(format!("model.layers.{layer}.{name}"), shape.to_vec(), needed);
        for norm in ["hidden_norm", "input_layernorm"] {
            add(&format!("{norm}.weight"), &[hidden], read(norm));
        }
        add("post_attention_layernorm.weight", &[hidden], true);
        add("self_attn.qkv_proj.weight", &[(heads + 2 * groups) * dim, input], true);
        add("self_attn.o_proj.weight", &[hidden, heads * dim], true);
        add("mlp.gate_up_proj.weight", &[2 * width, hidden], true);
        add("mlp.down_proj.weight", &[hidden, width], true);
    }
    found
}

/// The parameter that an engine loads a tensor into, from the renamings of its `load_weights`; nothing if it skips it.
fn loaded_into(engine: Engine, name: &str) -> Option<String> {
    if name.contains("t2d") || (engine == Engine::Sglang && name.contains("d2t")) {
        return None;
    }
    let mut name = name.replace("midlayer", "layers.0");
    if name.contains("d2t") {
        return Some(name.replace("d2t", "draft_id_to_target_id"));
    }
    for part in [".q_proj", ".k_proj", ".v_proj"] {
        name = name.replace(part, ".qkv_proj");
    }
    for part in [".gate_proj", ".up_proj"] {
        name = name.replace(part, ".gate_up_proj");
    }
    Some(if name.contains("lm_head") { name } else { format!("model.{name}") })
}

/// A speculators configuration as vLLM flattens it.
fn flattened(config: &Value) -> Value {
    let Some(layer) = config.get("transformer_layer_config") else { return config.clone() };
    let mut flat = layer.clone();
    for key in ["draft_vocab_size", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"] {
        flat[key] = config[key].clone();
    }
    flat["eagle_aux_hidden_state_layer_ids"] = config["eagle_aux_hidden_state_layer_ids"].clone();
    if !config["target_hidden_size"].is_null() {
        flat["target_hidden_size"] = config["target_hidden_size"].clone();
    }
    flat
}

#[test]
fn every_tensor_has_its_place_in_the_engines() {
    let (folder, _) = workspace();
    for (number, shape) in shapes().into_iter().enumerate() {
        let target = target_of(&shape, folder.path());
        for (format, engine) in [("eagle3", Engine::Sglang), ("eagle3", Engine::Vllm), ("speculators", Engine::Vllm)] {
            if format == "speculators" && shape.fc_norm && shape.norm_before_fc {
                continue;
            }
            let out = folder.path().join(format!("{format}-{}-{number}", engine.name()));
            export(&source(&shape, &target, Kind::Float), format, &out, None).unwrap();
            let config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
            let parameters = engine_parameters(engine, &flattened(&config), shape.vocab_size);
            let mut sizes: BTreeMap<String, Vec<i64>> = BTreeMap::new();
            for (name, tensor) in tensors_of(&out) {
                let Some(place) = loaded_into(engine, &name) else { continue };
                assert!(parameters.contains_key(&place), "{engine:?} {format}: {name} -> {place}");
                // Parts of one parameter are stacked along the first axis.
                sizes.entry(place).and_modify(|size| size[0] += tensor.size()[0]).or_insert_with(|| tensor.size());
            }
            for (name, (want, needed)) in &parameters {
                match sizes.get(name) {
                    Some(got) => assert_eq!(got, want, "{engine:?} {format}: {name}"),
                    None => assert!(!needed, "{engine:?} {format}: nothing is loaded into {name}"),
                }
            }
        }
    }
}

fn engine_of(report: &ExportReport, engine: Engine) -> (String, String) {
    let known = report.engines.iter().find(|known| known.engine == engine).unwrap();
    (known.resolved.join("\n"), known.problems.join("\n"))
}

#[test]
fn each_engine_resolves_the_layers_the_draft_was_trained_on() {
    let (folder, target) = workspace();
    let out = folder.path().join("out");
    let report = export(&source(&shape(), &target, Kind::BFloat16), "eagle3", &out, None).unwrap();
    let config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["eagle_aux_hidden_state_layer_ids"], json!([2, 4, 5]));
    assert_eq!(config["eagle_config"]["eagle_aux_hidden_state_layer_ids"], json!([1, 3, 4]));
    // The target's length, not that of training: vLLM sizes its tables by it.
    assert_eq!(config["max_position_embeddings"], 256);
    assert_eq!(config["torch_dtype"], "bfloat16");
    assert!(config.get("norm_output").is_none() && config.get("target_hidden_size").is_none());
    for engine in Engine::ALL {
        let (resolved, problems) = engine_of(&report, engine);
        assert_eq!(problems, "", "{engine:?}");
        for part in ["[2, 4, 5]", "base 10000", "40 of 454 tokens", "un-normed output", "the target's"] {
            assert!(resolved.contains(part), "{engine:?}: no `{part}` in {resolved}");
        }
    }
}

#[test]
fn an_engine_is_not_given_what_it_cannot_serve() {
    let (folder, target) = workspace();
    type Case = (fn(&mut Eagle3Shape), &'static str, Option<&'static str>, Option<&'static str>);
    let cases: &[Case] = &[
        (|shape| shape.norm_before_residual = true, "eagle3", Some("has no `norm_before_residual`"), None),
        (|_| (), "speculators", Some("does not read the speculators format"), None),
        (|shape| shape.capture = vec![0, 4, 5], "eagle3", None, None),
        (|shape| shape.capture = vec![3], "eagle3", Some("skips `fc`"), None),
        (
            |shape| shape.capture = vec![2, 4, 8],
            "eagle3",
            Some("cannot capture the last, normed output"),
            Some("cannot capture the last, normed output"),
        ),
        (
            |shape| shape.layer.rope.scaling = RopeScaling::Dynamic { factor: 2.0 },
            "eagle3",
            Some("dynamic rotary"),
            Some("dynamic rotary"),
        ),
    ];
    for (number, (change, format, sglang, vllm)) in cases.iter().enumerate() {
        let mut shape = shape();
        change(&mut shape);
        let source = source(&shape, &target, Kind::Float);
        for (engine, problem) in [(Engine::Sglang, sglang), (Engine::Vllm, vllm)] {
            let out = folder.path().join(format!("{number}-{}", engine.name()));
            match problem {
                Some(problem) => {
                    let error = export(&source, format, &out, Some(engine)).unwrap_err().to_string();
                    assert!(error.contains(problem) && error.contains(engine.name()), "{error}");
                    assert!(!out.exists());
                }
                None => drop(export(&source, format, &out, Some(engine)).unwrap()),
            }
        }
        let out = folder.path().join(format!("{number}-any"));
        assert_eq!(export(&source, format, &out, None).is_ok(), sglang.is_none() || vllm.is_none());
    }
    let bare = Eagle3Shape { norm_output: false, ..shape() };
    let error = export(&source(&bare, &target, Kind::Float), "eagle3", &folder.path().join("bare"), None).unwrap_err();
    assert!(error.to_string().contains("every engine norms before the projection"), "{error}");
}

// -- other people's folders --------------------------------------------------------------------------------------------

fn change_config(folder: &Path, change: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let before = config.clone();
    change(&mut config);
    assert!(config != before);
    fs::write(path, config.to_string()).unwrap();
}

fn remove(config: &mut Value, keys: &[&str]) {
    let object = config.as_object_mut().unwrap();
    keys.iter().for_each(|key| assert!(object.shift_remove(*key).is_some(), "{key}"));
}

fn change_tensors(folder: &Path, change: impl FnOnce(&mut Vec<(String, Tensor)>)) {
    let path = folder.join("model.safetensors");
    let mut tensors = tensors_of(&path);
    change(&mut tensors);
    weights::write_tensors(&path, &tensors, &[]).unwrap();
}

const OWN_KEYS: &[&str] = &["specforge", "base_model_name_or_path"];

/// No keys for layers or base: the default layers of the target, and base 10000 whatever the target's is.
#[test]
fn safeailabs_folders_are_read() {
    let (folder, target) = workspace();
    let out = folder.path().join("out");
    export(&source(&shape(), &target, Kind::Half), "eagle3", &out, None).unwrap();
    change_config(&out, |config| {
        remove(config, OWN_KEYS);
        remove(config, &["rope_theta", "rope_parameters", "head_dim", "num_aux_hidden_states"]);
        remove(config, &["eagle_aux_hidden_state_layer_ids", "eagle_config", "fc_norm", "norm_before_fc"]);
        config["max_position_embeddings"] = json!(64);
        config["num_attention_heads"] = json!(4);
    });
    // Heads are as wide as the hidden size says.
    change_tensors(&out, |tensors| {
        for (name, tensor) in tensors.iter_mut().filter(|(name, _)| name.contains("self_attn")) {
            let shape = match name.as_str() {
                "midlayer.self_attn.o_proj.weight" => [32, 32],
                "midlayer.self_attn.q_proj.weight" => [32, 64],
                _ => [16, 64],
            };
            *tensor = Tensor::ones(shape, (Kind::Half, tch::Device::Cpu));
        }
    });
    let imported = read(&out, Some(LAYERS)).unwrap();
    assert_eq!((imported.shape.capture, imported.shape.layer.rope.theta), (vec![2, 4, 5], 10_000.0));
    assert_eq!(imported.shape.layer.head_dim, 8);
    assert_eq!((imported.shape.norm_output, imported.shape.norm_feedback), (true, false));
    let error = read(&out, None).unwrap_err().to_string();
    assert!(error.contains("number of the target's layers is not known"), "{error}");

    // The same in SafeAILab's own kind of file.
    let pickled = out.join("pytorch_model.bin");
    write_torch_file(&pickled, &tensors_of(&out));
    fs::remove_file(out.join("model.safetensors")).unwrap();
    let again = read(&out, Some(LAYERS)).unwrap();
    assert_eq!(again.vocabulary, Some(map(DRAFT_VOCABULARY)));
    assert_eq!(again.tensors.len(), imported.tensors.len());
    for ((name, got), (_, want)) in again.tensors.iter().zip(&imported.tensors) {
        assert!(got.kind() == Kind::Half && got.equal(want), "{name}");
    }
    let bytes = fs::read(&pickled).unwrap();
    for length in [0, 10, bytes.len() / 2, bytes.len() - 10] {
        fs::write(&pickled, &bytes[..length]).unwrap();
        let error = read(&out, Some(LAYERS)).unwrap_err();
        assert!(error.to_string().contains("pytorch_model.bin") && error.exit_code() == 2, "{error}");
    }
}

/// What `torch.save` writes of a table of tensors.
fn write_torch_file(path: &Path, tensors: &[(String, Tensor)]) {
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

/// Output ids alone, embeddings that are not needed, a `norm_output` of two meanings.
#[test]
fn specforges_folders_are_read_and_what_vllm_would_make_of_them_is_told() {
    let (folder, target) = workspace();
    let out = folder.path().join("out");
    export(&source(&shape(), &target, Kind::BFloat16), "eagle3", &out, None).unwrap();
    change_config(&out, |config| {
        remove(config, OWN_KEYS);
        remove(config, &["eagle_aux_hidden_state_layer_ids"]);
        config["norm_output"] = json!(true);
    });
    change_tensors(&out, |tensors| {
        let embedding = Tensor::zeros([TOKENIZER_SIZE, 32], (Kind::BFloat16, tch::Device::Cpu));
        tensors.push(("embed_tokens.weight".to_owned(), embedding));
    });
    let imported = read(&out, Some(LAYERS)).unwrap();
    assert_eq!(imported.shape.capture, [2, 4, 5]);
    let alternative = imported.alternative.unwrap();
    assert!(imported.shape.norm_feedback && !alternative.norm_feedback && alternative.norm_output);
    assert!(imported.warnings[0].contains("`embed_tokens.weight` is not used"), "{:?}", imported.warnings);
    let report = check(&out).unwrap();
    assert_eq!(engine_of(&report, Engine::Sglang).1, "");
    assert!(
        engine_of(&report, Engine::Vllm)
            .1
            .contains("captures what layers [1, 3, 4] read, the draft was trained on [2, 4, 5]")
    );
    let error = check_for(&out, Some(Engine::Vllm)).unwrap_err().to_string();
    assert!(error.contains("vllm: captures what layers [1, 3, 4]"), "{error}");
}

/// What is changed in a sound export, and what the refusal must say.
type Damage = (&'static str, fn(&Path), &'static [&'static str]);

fn tensor<'a>(tensors: &'a mut [(String, Tensor)], wanted: &str) -> &'a mut Tensor {
    &mut tensors.iter_mut().find(|(name, _)| name == wanted).unwrap().1
}

const DAMAGES: &[Damage] = &[
    (
        "a missing tensor",
        |folder| change_tensors(folder, |tensors| tensors.retain(|(name, _)| name != "midlayer.hidden_norm.weight")),
        &["missing (1)", "midlayer.hidden_norm.weight [32]"],
    ),
    (
        "a missing map",
        |folder| change_tensors(folder, |tensors| tensors.retain(|(name, _)| name != "d2t" && name != "t2d")),
        &["missing (2)", "d2t [40]", "t2d [454]"],
    ),
    (
        "a surplus tensor",
        |folder| {
            let extra = ("mask_hidden".to_owned(), Tensor::zeros([1, 1, 96], (Kind::Float, tch::Device::Cpu)));
            change_tensors(folder, |tensors| tensors.push(extra));
        },
        &["surplus (1)", "mask_hidden [1, 1, 96]"],
    ),
    (
        "another shape",
        |folder| {
            change_tensors(folder, |tensors| {
                let tensor = tensor(tensors, "fc.weight");
                *tensor = tensor.narrow(1, 0, 64).contiguous();
            })
        },
        &["wrong shape (1)", "fc.weight: expected [32, 96], got [32, 64]"],
    ),
    (
        "one tensor twice",
        |folder| {
            let extra =
                ("layers.0.hidden_norm.weight".to_owned(), Tensor::zeros([32], (Kind::Float, tch::Device::Cpu)));
            change_tensors(folder, |tensors| tensors.push(extra));
        },
        &["`midlayer.hidden_norm.weight` under two names"],
    ),
    (
        "mixed types",
        |folder| {
            change_tensors(folder, |tensors| {
                *tensor(tensors, "norm.weight") = tensor(tensors, "norm.weight").to_kind(Kind::Half)
            })
        },
        &["one floating-point type", "Half in `norm.weight`"],
    ),
    (
        "ids where offsets belong",
        |folder| {
            change_tensors(folder, |tensors| {
                let d2t = tensor(tensors, "d2t");
                *d2t = d2t.shallow_clone() + Tensor::arange(40, (Kind::Int64, tch::Device::Cpu)) * 20;
            })
        },
        &["`d2t`", "expected ascending, distinct token ids from 0 to 453", "hint: d2t holds what is added"],
    ),
    (
        "a map that disagrees with itself",
        |folder| change_tensors(folder, |tensors| drop(tensor(tensors, "t2d").get(8).fill_(0))),
        &["`t2d[8]`: `d2t` says true, got false"],
    ),
    (
        "a map of another type",
        |folder| change_tensors(folder, |tensors| *tensor(tensors, "d2t") = tensor(tensors, "d2t").to_kind(Kind::Int)),
        &["`d2t`: expected elements of Int64, got Int"],
    ),
    (
        "a mask of another type",
        |folder| {
            change_tensors(folder, |tensors| *tensor(tensors, "t2d") = tensor(tensors, "t2d").to_kind(Kind::Uint8))
        },
        &["`t2d`: expected elements of Bool, got Uint8"],
    ),
    (
        "two conventions that disagree",
        |folder| {
            change_config(folder, |config| {
                config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = json!([2, 4, 5]);
            })
        },
        &["names what layers [2, 4, 5] read", "[3, 5, 6]"],
    ),
    (
        "layers out of order",
        |folder| {
            change_config(folder, |config| {
                config["eagle_aux_hidden_state_layer_ids"] = json!([5, 4, 2]);
                config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = json!([4, 3, 1]);
            })
        },
        &["expected layers up to 8, low to high, got [5, 4, 2]"],
    ),
    (
        "another number of layers",
        |folder| change_config(folder, |config| config["num_aux_hidden_states"] = json!(4)),
        &["`num_aux_hidden_states`: expected 3"],
    ),
    (
        "two rotary embeddings",
        |folder| change_config(folder, |config| config["rope_parameters"]["rope_theta"] = json!(500000.0)),
        &["`rope_parameters` says", "500000", "`rope_theta` and `rope_scaling`"],
    ),
    (
        "norms that are not there",
        |folder| change_config(folder, |config| config["fc_norm"] = json!(true)),
        &["missing (3)", "fc_norm.0.weight [32]"],
    ),
    (
        "another vocabulary",
        |folder| change_config(folder, |config| config["draft_vocab_size"] = json!(41)),
        &["lm_head.weight: expected [41, 32], got [40, 32]"],
    ),
    (
        "a vocabulary larger than the target's",
        |folder| change_config(folder, |config| config["draft_vocab_size"] = json!(500)),
        &["`draft_vocab_size`: expected 1 to `vocab_size`, which is 454, got 500"],
    ),
    (
        "another head size",
        |folder| change_config(folder, |config| config["head_dim"] = json!(8)),
        &["q_proj.weight: expected [32, 64], got [24, 64]"],
    ),
    (
        "more draft layers",
        |folder| change_config(folder, |config| config["num_hidden_layers"] = json!(2)),
        &["missing", "layers.1."],
    ),
    (
        "another target",
        |folder| change_config(folder, |config| config["specforge"]["num_target_layers"] = json!(12)),
        &["number of layers: the target has 8, the draft was made for 12"],
    ),
    (
        "biases",
        |folder| change_config(folder, |config| config["attention_bias"] = json!(true)),
        &["`attention_bias`: expected false"],
    ),
    (
        "a short context and a projection that is not used",
        |folder| {
            change_config(folder, |config| {
                config["max_position_embeddings"] = json!(64);
                config["tie_word_embeddings"] = json!(true);
            })
        },
        &["cannot be served", "sglang: replaces the projection", "vllm: sizes its rotary tables"],
    ),
    (
        "a number that is none",
        |folder| change_config(folder, |config| config["hidden_size"] = json!("32")),
        &["config.json", "expected i64"],
    ),
    (
        "a file cut off",
        |folder| {
            let file = fs::File::options().write(true).open(folder.join("model.safetensors")).unwrap();
            file.set_len(file.metadata().unwrap().len() - 10).unwrap();
        },
        &["is not a whole safetensors file"],
    ),
];

#[test]
fn every_damage_is_refused_by_name() {
    let (folder, target) = workspace();
    let sound = folder.path().join("sound");
    export(&source(&shape(), &target, Kind::Float), "eagle3", &sound, None).unwrap();
    for (number, (name, damage, expected)) in DAMAGES.iter().enumerate() {
        let damaged = folder.path().join(number.to_string());
        fs::create_dir(&damaged).unwrap();
        contents(&sound).into_iter().for_each(|(path, bytes)| fs::write(damaged.join(path), bytes).unwrap());
        damage(&damaged);
        let output = output_of(specforge(&["export", "--json", "--check"]).arg(&damaged));
        let message = stderr_of(&output);
        assert_eq!(output.status.code(), Some(2), "{name}: {message}");
        assert_eq!(output.stdout, b"", "{name}");
        assert!(message.starts_with(&format!("error: {}", damaged.display())), "{name}: {message}");
        expected.iter().for_each(|part| assert!(message.contains(part), "{name}: no `{part}` in: {message}"));
    }
    // And the sound one is still found sound.
    check(&sound).unwrap();
}

// -- training ----------------------------------------------------------------------------------------------------------

/// Where one run ended another begins, through each format; and a draft of another kind is refused with its keys.
#[test]
fn training_starts_from_an_export() {
    let mut workspace = Workspace::with_model(&json!({"num_hidden_layers": LAYERS}));
    workspace.configuration["draft"] = json!({"algorithm": "eagle3", "ttt_steps": 2, "draft_vocab_size": 100});
    let first = workspace.train("first", &[]);
    for format in ["eagle3", "speculators"] {
        let out = workspace.path(format);
        let mut command = specforge(&["export", "--json", "--format", format, "--engine", "vllm", "--checkpoint"]);
        let report = json_of(command.arg(workspace.path("first")).arg("--out").arg(&out));
        assert_eq!(report["engines"][1]["problems"], json!([]), "{report}");
        let init = format!("draft.init_from={}", out.display());
        let second = workspace.train(&format!("second-{format}"), &["--set", &init, "--set", "train.max_steps=1"]);
        assert!(first["end"] != first["start"]);
        assert_eq!(second["start"], first["end"], "{format}");
        // The vocabulary can be taken from the folder too; a resumed run does not start again.
        let map = format!("draft.vocab_map={}", out.join("model.safetensors").display());
        workspace.train(&format!("third-{format}"), &["--set", &init, "--set", &map, "--set", "train.max_steps=1"]);
        let more = ["--set", &init, "--set", "train.max_steps=2", "--resume"];
        assert_ne!(workspace.train(&format!("second-{format}"), &more)["end"], second["end"]);

        let mut command = workspace.train_command("other", &["--set", &init, "--set", "draft.capture=[1,4,6]"]);
        let output = output_of(command.args(["--set", "draft.draft_vocab_size=99"]));
        let message = stderr_of(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        for part in [
            "`draft.init_from`",
            "captured layers: [2, 4, 5] there, [1, 4, 6] here (draft.capture)",
            "draft_vocab_size: 100 there, 99 here",
            "vocabulary map: 100 there, 99 here (draft.vocab_map=",
        ] {
            assert!(message.contains(part), "no `{part}` in {message}");
        }
    }
}
