//! EAGLE-3 exports: the same bytes after export, import and export; names and shapes by the engines' own rules; a clear
//! refusal of what an engine cannot serve; and training that starts from a published draft.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use specforge::draft::eagle3::Eagle3Shape;
use specforge::export::eagle3::{Imported, read};
use specforge::export::{Engine, ExportReport, Source, export};
use specforge::models::LayerShape;
use specforge::nn::{RopeConfig, RopeScaling, noise};
use specforge::vocab::VocabMap;
use tch::{Kind, Tensor};

use crate::fixture::{
    TOKENIZER_SIZE, Workspace, contents, json_of, litter, output_of, specforge, stderr_of, tensors_of, write_model,
};

/// Layers of the target.
pub const LAYERS: usize = 8;
/// Tokens of the draft's vocabulary.
pub const DRAFT_VOCABULARY: i64 = 40;

/// A folder with a target of eight layers, where exports go too.
pub fn workspace() -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let target = folder.path().join("target");
    write_model(&target, &json!({"num_hidden_layers": LAYERS, "max_position_embeddings": 256}));
    (folder, target)
}

/// A draft for it.
pub fn shape() -> Eagle3Shape {
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
        head_norms: false,
    }
}

/// A vocabulary of this many tokens.
pub fn map(size: i64) -> VocabMap {
    VocabMap::new((0..size).map(|id| id * 7 + id % 3).collect(), TOKENIZER_SIZE).unwrap()
}

/// Random values for a draft.
pub fn source(shape: &Eagle3Shape, target: &Path, kind: Kind) -> Source {
    let named = shape.tensors().into_iter().enumerate();
    let mut tensors: Vec<(String, Tensor)> =
        named.map(|(stream, (name, size))| (name, noise::normal(&size, 0.5, 3, stream as u64).to_kind(kind))).collect();
    if shape.draft_vocab_size < shape.vocab_size {
        let map = map(shape.draft_vocab_size);
        tensors.push(("d2t".to_owned(), Tensor::from_slice(&map.d2t())));
        tensors.push(("t2d".to_owned(), Tensor::from_slice(&map.t2d())));
    }
    Source {
        description: json!({"draft": {"algorithm": "eagle3"}, "shape": shape}),
        tensors,
        target: target.to_path_buf(),
        target_name: None,
        kind: None,
        q8_0: false,
    }
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
            if bits.is_multiple_of(5) {
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

/// What an engine resolves, and what is wrong for it.
pub fn engine_of(report: &ExportReport, engine: Engine) -> (String, String) {
    let known = report.engines.iter().find(|known| known.engine == engine).unwrap();
    (known.resolved.join("\n"), known.problems.join("\n"))
}

/// vLLM loads the target that a speculators folder names, from wherever it is started.
#[test]
fn both_layouts_name_the_target_by_its_absolute_path_or_as_asked() {
    let (folder, target) = workspace();
    let here = std::env::current_dir().unwrap();
    let up: std::path::PathBuf = here.ancestors().skip(1).map(|_| "..").collect();
    let relative = up.join(target.strip_prefix("/").unwrap());
    assert!(relative.is_relative() && relative.join("config.json").is_file());
    for (format, key) in
        [("eagle3", "/base_model_name_or_path"), ("speculators", "/speculators_config/verifier/name_or_path")]
    {
        for name in [None, Some("someone/model".to_owned())] {
            let out = folder.path().join(format!("{format}-{}", name.is_some()));
            let source = Source { target_name: name.clone(), ..source(&shape(), &relative, Kind::Float) };
            let report = export(&source, format, &out, None).unwrap();
            let config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
            let got = Path::new(config.pointer(key).unwrap().as_str().unwrap());
            match name {
                Some(name) => assert_eq!(got, Path::new(&name), "{format}"),
                None => {
                    assert!(got.is_absolute(), "{format}: {}", got.display());
                    assert_eq!(got.canonicalize().unwrap(), target.canonicalize().unwrap(), "{format}");
                    assert_eq!(report.warnings, Vec::<String>::new(), "{format}");
                }
            }
            // Taken from the target in either case.
            let length = config.pointer("/max_position_embeddings");
            let length = length.or(config.pointer("/transformer_layer_config/max_position_embeddings"));
            assert_eq!(length, Some(&json!(256)), "{format}");
        }
    }
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
