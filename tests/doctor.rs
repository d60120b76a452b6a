//! `specforge doctor` on a sound draft and on one copy for each known fault: each is named by the check whose business it is.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use specforge::doctor::{ACCEPTANCE, CHECKS, Case, Decoding, Diagnosis, Verdict, acceptance, examine};
use specforge::export::Engine;
use specforge::models::load_target;
use specforge::nn::noise;
use specforge::weights::write_tensors;
use tch::{Device, Kind, Tensor};

use crate::fixture::{Workspace, json_of, output_of, specforge, stderr_of, tensors_of};

const IDS: &str = "eagle_aux_hidden_state_layer_ids";

/// A target of eight layers whose rotary keys are none that anybody takes for granted, a draft that learned its answers,
/// and its exports.
fn workspace() -> Workspace {
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    });
    let mut workspace = Workspace::with_model(&json!({
        "num_hidden_layers": 8, "rope_theta": 50_000.0, "rope_scaling": scaling,
    }));
    let mut regen = specforge(&["regen", "--json", "--max-new-tokens", "24", "--device", "cpu", "--target"]);
    regen.arg(workspace.path("model")).arg("--prompts").arg(workspace.path("conversations.jsonl"));
    json_of(regen.arg("--out").arg(workspace.path("answers.jsonl")));
    let answers = workspace.path("answers.jsonl").display().to_string();
    workspace.set("data.train", json!([answers])).set("data.max_length", 128).set("train.max_steps", 60);
    workspace.configuration["draft"] =
        json!({"algorithm": "eagle3", "draft_vocab_size": 200, "ttt_steps": 2, "capture": [1, 4, 6]});
    workspace.train("run", &[]);
    for (format, dtype, out) in
        [("eagle3", "float32", "good"), ("eagle3", "bfloat16", "short"), ("speculators", "float32", "speculators")]
    {
        let mut export = specforge(&["export", "--json", "--format", format, "--dtype", dtype, "--checkpoint"]);
        json_of(export.arg(workspace.path("run")).arg("--out").arg(workspace.path(out)));
    }
    workspace
}

fn copy(from: &Path, to: &Path) -> PathBuf {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
    to.to_path_buf()
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

type Tensors = BTreeMap<String, Tensor>;

/// A copy of a draft's folder with something changed in it.
fn changed(workspace: &Workspace, from: &str, name: &str, change: fn(&mut Value, &mut Tensors)) -> PathBuf {
    let folder = copy(&workspace.path(from), &workspace.path(&format!("sick-{name}")));
    let (config, weights) = (folder.join("config.json"), folder.join("model.safetensors"));
    let mut values = json_file(&config);
    let mut tensors: Tensors = tensors_of(&weights).into_iter().collect();
    change(&mut values, &mut tensors);
    fs::write(config, values.to_string()).unwrap();
    write_tensors(&weights, &tensors.into_iter().collect::<Vec<_>>(), &[]).unwrap();
    folder
}

fn diagnose(target: &Path, draft: &Path, engine: Option<Engine>, decode: bool) -> Diagnosis {
    let model = load_target(target, Kind::Float, Device::Cpu).unwrap();
    let case = Case::open(draft, (target, model.as_ref()), None, engine).unwrap();
    let questions = acceptance::PROMPTS.map(|prompt| vec![specforge::data::Message::new("user", prompt)]);
    let decoding = decode.then(|| Decoding::of(case.target.tokenizer.as_ref().unwrap(), &questions, 32).unwrap());
    examine(&case, decoding.as_ref(), None).unwrap()
}

fn faults(diagnosis: &Diagnosis) -> Vec<String> {
    let faults = diagnosis.findings.iter().filter(|finding| finding.verdict == Verdict::Fault);
    faults.map(|finding| format!("{}: {}", finding.check, finding.found)).collect()
}

/// Demands that a check names the fault in these words.
fn demand(name: &str, diagnosis: &Diagnosis, check: &str, words: &str) {
    let named = diagnosis
        .findings
        .iter()
        .any(|finding| finding.verdict == Verdict::Fault && finding.check == check && finding.found.contains(words));
    assert!(named, "{name}: expected {check} to say `{words}`, got\n{}", faults(diagnosis).join("\n"));
}

/// Name, the check that names it, its words, and what is done to the files.
type Row = (&'static str, &'static str, &'static str, fn(&mut Value, &mut Tensors));

/// One whole matrix by another rule.
fn matrix(tensors: &mut Tensors, name: &str, change: impl Fn(&Tensor) -> Tensor) {
    let value = change(&tensors[name]).contiguous();
    tensors.insert(name.to_owned(), value);
}

/// Rows of heads of eight as for a rotary embedding that turns neighbours.
fn neighbours(rows: &Tensor) -> Tensor {
    let (count, input) = rows.size2().unwrap();
    rows.view([count / 8, 2, 4, input]).transpose(1, 2).contiguous().view([count, input])
}

const FAULTS: &[Row] = &[
    (
        "layers-as-outputs",
        "layers",
        "hands over what layers [0, 3, 5] read, the draft was trained on [1, 4, 6]",
        |c, _| {
            c[IDS] = json!([0, 3, 5]);
            c["eagle_config"][IDS] = json!([-1, 2, 4]);
        },
    ),
    ("layers-as-inputs", "layers", "sglang hands over what layers [2, 5, 7] read", |c, _| {
        c["eagle_config"][IDS] = json!([1, 4, 6]);
    }),
    ("layers-beyond", "layers", "vllm is asked for what layer 9 reads; the target has layers 0 to 7", |c, _| {
        c[IDS] = json!([1, 4, 9]);
    }),
    (
        "layers-dropped",
        "layers",
        "names no captured layers: engines take their default, what layers [2, 4, 5]",
        |c, _| {
            c.as_object_mut().unwrap().remove(IDS);
            c.as_object_mut().unwrap().remove("eagle_config");
        },
    ),
    ("architecture", "files", "engines take for an ordinary model", |c, _| {
        c["architectures"] = json!(["LlamaForCausalLM"]);
    }),
    ("prefix", "files", "tensor names begin with `model.`", |_, t| {
        *t = std::mem::take(t).into_iter().map(|(name, tensor)| (format!("model.{name}"), tensor)).collect();
    }),
    ("theta-dropped", "rope", "base 10000: the draft was trained with 50000", |c, _| {
        c.as_object_mut().unwrap().remove("rope_theta");
        c.as_object_mut().unwrap().remove("rope_parameters");
    }),
    ("theta-in-one-place", "rope", "`rope_theta` is 10000, `rope_parameters.rope_theta` 50000", |c, _| {
        c["rope_theta"] = json!(10_000.0);
    }),
    ("scaling-dropped", "rope", "scaling Default: the draft was trained with Llama3", |c, _| {
        c.as_object_mut().unwrap().remove("rope_scaling");
        c.as_object_mut().unwrap().remove("rope_parameters");
    }),
    ("partial", "rope", "`partial_rotary_factor` is 0.5", |c, _| c["partial_rotary_factor"] = json!(0.5)),
    ("length", "context", "is 64, the target reads 256", |c, _| c["max_position_embeddings"] = json!(64)),
    ("tied", "head", "`tie_word_embeddings` is true", |c, _| c["tie_word_embeddings"] = json!(true)),
    ("no-head", "head", "there is no `lm_head.weight`", |_, t| drop(t.remove("lm_head.weight"))),
    ("no-size", "head", "`draft_vocab_size` is missing", |c, _| {
        c.as_object_mut().unwrap().remove("draft_vocab_size");
    }),
    ("padded", "vocabulary", "`lm_head.weight` has 256 rows, config.json says 200", |_, t| {
        matrix(t, "lm_head.weight", |head| {
            Tensor::cat(&[head, &Tensor::ones([56, 32], (Kind::Float, Device::Cpu))], 0)
        });
    }),
    ("d2t-identity", "vocabulary", "`d2t` is zero everywhere", |_, t| matrix(t, "d2t", Tensor::zeros_like)),
    ("d2t-absolute", "vocabulary", "`d2t` holds the target's ids themselves", |_, t| {
        matrix(t, "d2t", |d2t| d2t + Tensor::arange(200, (Kind::Int64, Device::Cpu)));
    }),
    ("d2t-beyond", "vocabulary", "leads to token 1000", |_, t| {
        matrix(t, "d2t", |d2t| Tensor::cat(&[d2t.narrow(0, 0, 199), Tensor::from_slice(&[801i64])], 0));
    }),
    ("d2t-whole", "vocabulary", "but the draft names all 454 tokens", |c, _| c["draft_vocab_size"] = json!(454)),
    ("d2t-gone", "vocabulary", "has no `d2t`", |_, t| drop(t.remove("d2t"))),
    ("t2d-size", "vocabulary", "`t2d` has [440] entries", |_, t| matrix(t, "t2d", |t2d| t2d.narrow(0, 0, 440))),
    ("t2d-other", "vocabulary", "which `t2d` says the draft cannot name", |_, t| {
        matrix(t, "t2d", |t2d| t2d.roll([1], [0]));
    }),
    ("norm-missing", "tensors", "`midlayer.hidden_norm.weight` [32] is missing", |_, t| {
        drop(t.remove("midlayer.hidden_norm.weight"));
    }),
    ("transposed", "tensors", "`midlayer.self_attn.k_proj.weight` is transposed", |_, t| {
        matrix(t, "midlayer.self_attn.k_proj.weight", Tensor::tr);
    }),
    ("residual", "norms", "`norm_before_residual` is true: the draft was trained with false", |c, _| {
        c["norm_before_residual"] = json!(true);
    }),
    ("norm-flag", "norms", "`fc_norm` is true, but the tensors", |c, _| c["fc_norm"] = json!(true)),
    ("epsilon", "norms", "`rms_norm_eps` is 0.1", |c, _| c["rms_norm_eps"] = json!(0.1)),
    ("heads", "norms", "`num_attention_heads` is 2", |c, _| c["num_attention_heads"] = json!(2)),
    ("pad", "ids", "`pad_token_id` is 454", |c, _| c["pad_token_id"] = json!(454)),
    ("mask", "ids", "`dflash_config.mask_token_id` is -1", |c, _| c["dflash_config"] = json!({"mask_token_id": -1})),
    ("overflow", "types", "is beyond float16", |_, t| {
        matrix(t, "fc.weight", |fc| fc * 1e6);
        *t = std::mem::take(t)
            .into_iter()
            .map(|(name, value)| {
                let kind = if value.is_floating_point() { Kind::Half } else { value.kind() };
                (name, value.to_kind(kind))
            })
            .collect();
    }),
    ("two-types", "types", "engines want one type", |_, t| matrix(t, "fc.weight", |fc| fc.to_kind(Kind::BFloat16))),
    ("not-a-number", "numbers", "1 of 1024 numbers are infinite or none", |_, t| {
        matrix(t, "midlayer.self_attn.o_proj.weight", |o| {
            let flat = o.copy().view([-1]);
            drop(flat.get(7).fill_(f64::NAN));
            flat.view([32, 32])
        });
    }),
    ("zero", "numbers", "`midlayer.mlp.up_proj.weight` [48, 32] is zero everywhere", |_, t| {
        matrix(t, "midlayer.mlp.up_proj.weight", Tensor::zeros_like);
    }),
    ("untrained", "training", "7 of 7 matrices look untrained", |_, t| {
        let names: Vec<String> = t.keys().filter(|name| name.starts_with("midlayer.")).cloned().collect();
        for (stream, name) in names.iter().enumerate() {
            matrix(t, name, |old| match old.dim() {
                1 => old.ones_like(),
                _ => noise::normal(&old.size(), 0.02, 99, stream as u64),
            });
        }
    }),
    ("square", "values", "`midlayer.self_attn.o_proj.weight` is the transpose", |_, t| {
        matrix(t, "midlayer.self_attn.o_proj.weight", Tensor::tr);
    }),
    ("permuted", "values", "rows of each head in another order", |_, t| {
        matrix(t, "midlayer.self_attn.q_proj.weight", neighbours);
        matrix(t, "midlayer.self_attn.k_proj.weight", neighbours);
    }),
    ("another-number", "values", "`norm.weight` differs from the one that was trained in 1 of 32 numbers", |_, t| {
        matrix(t, "norm.weight", |norm| {
            let norm = norm.copy();
            drop(norm.get(3).fill_(5.0));
            norm
        });
    }),
    ("logits", "logits", "logits differ from those of the checkpoint", |c, _| c["rms_norm_eps"] = json!(0.1)),
];

#[test]
fn every_known_fault_is_named_by_its_check() {
    let workspace = workspace();
    let target = workspace.path("model");
    for good in ["good", "short", "speculators"] {
        let diagnosis = diagnose(&target, &workspace.path(good), None, false);
        assert_eq!(faults(&diagnosis), Vec::<String>::new(), "{good}");
        assert!(diagnosis.checkpoint.is_some() && diagnosis.findings.len() >= 18, "{good}");
    }
    // No check is without a fault that it alone names: one that is left out fails its row.
    const BELOW: [&str; 4] = ["target", "tokenizer", "template", "engines"];
    for check in CHECKS {
        assert!(FAULTS.iter().any(|row| row.1 == check.name) || BELOW.contains(&check.name), "{}", check.name);
    }
    for (name, check, words, change) in FAULTS {
        let sick = changed(&workspace, "good", name, *change);
        demand(name, &diagnose(&target, &sick, None, false), check, words);
    }

    // The target's own rows over the trained projection.
    let head = tensors_of(&target).into_iter().find(|(name, _)| name == "lm_head.weight").unwrap().1;
    let sick = changed(&workspace, "good", "head-of-target", |_, _| ());
    let mut tensors: Tensors = tensors_of(&sick).into_iter().collect();
    let ids = &tensors["d2t"] + Tensor::arange(200, (Kind::Int64, Device::Cpu));
    tensors.insert("lm_head.weight".to_owned(), head.index_select(0, &ids));
    write_tensors(&sick.join("model.safetensors"), &tensors.into_iter().collect::<Vec<_>>(), &[]).unwrap();
    let diagnosis = diagnose(&target, &sick, None, false);
    demand("head-of-target", &diagnosis, "head", "holds the target's own rows; what was trained is something else");

    // What an engine that was named cannot serve.
    let diagnosis = diagnose(&target, &workspace.path("speculators"), Some(Engine::Sglang), false);
    demand("engine", &diagnosis, "engines", "sglang does not read the speculators format");

    // Without the record, the files are compared with each other and with the target.
    let alone = copy(&workspace.path("good"), &workspace.path("alone"));
    fs::remove_file(alone.join("specforge.json")).unwrap();
    assert_eq!(faults(&diagnose(&target, &alone, None, false)), Vec::<String>::new());
    let (check, words) = ("layers", "the two keys disagree: vllm takes what layers [1, 4, 6] read, sglang [1, 4, 5]");
    let sick = changed(&workspace, "alone", "keys", |c, _| c["eagle_config"][IDS] = json!([0, 3, 4]));
    demand("keys", &diagnose(&target, &sick, None, false), check, words);

    // What a checkpoint leaves in the record is enough where it is gone.
    let moved = copy(&workspace.path("good"), &workspace.path("moved"));
    let record = fs::read_to_string(moved.join("specforge.json")).unwrap();
    fs::write(moved.join("specforge.json"), record.replace("/step-", "/gone-")).unwrap();
    let sick = changed(&workspace, "moved", "theta-and-no-checkpoint", |c, _| {
        c.as_object_mut().unwrap().remove("rope_theta");
        c.as_object_mut().unwrap().remove("rope_parameters");
    });
    demand("moved", &diagnose(&target, &sick, None, false), "rope", "base 10000: the draft was trained with 50000");
}

/// A copy of the target with one of its files changed.
fn other_target(workspace: &Workspace, name: &str, file: &str, change: impl Fn(String) -> String) -> PathBuf {
    let folder = copy(&workspace.path("model"), &workspace.path(&format!("target-{name}")));
    let text = fs::read_to_string(folder.join(file)).unwrap();
    fs::write(folder.join(file), change(text)).unwrap();
    folder
}

/// Mistakes that leave files readable and no record to hold them against, with the reading that undoes each. A random target
/// is too little to show smaller ones: docs/doctor.md has them on a real one.
const READINGS: &[Row] = &[
    ("order", ACCEPTANCE, "with embedding and feature in the other order", |_, t| {
        for name in ["q_proj", "k_proj", "v_proj"] {
            matrix(t, &format!("midlayer.self_attn.{name}.weight"), |wide| wide.roll([32], [1]));
        }
    }),
    ("square", ACCEPTANCE, "with square matrices transposed", |_, t| {
        matrix(t, "midlayer.self_attn.o_proj.weight", Tensor::tr);
    }),
];

#[test]
fn another_target_is_named_and_bad_guesses_are_explained() {
    let workspace = workspace();
    let (target, good) = (workspace.path("model"), workspace.path("good"));
    let template = |text: String, new: &str| {
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config["chat_template"] = json!(new);
        config.to_string()
    };
    let other = other_target(&workspace, "tokenizer", "tokenizer.json", |text| format!("{text}\n"));
    demand(
        "tokenizer",
        &diagnose(&other, &good, None, false),
        "tokenizer",
        "another than the one the draft was trained on",
    );
    let other = other_target(&workspace, "template", "tokenizer_config.json", |text| {
        template(text, "{% for m in messages %}{{ m.content }}{% endfor %}")
    });
    demand(
        "template",
        &diagnose(&other, &good, None, false),
        "template",
        "another than the one the draft was trained behind",
    );
    let other = other_target(&workspace, "broken", "tokenizer_config.json", |text| {
        template(text, "{{ raise_exception('not today') }}")
    });
    demand("broken", &diagnose(&other, &good, None, false), "template", "does not render a question");
    let other = copy(&target, &workspace.path("target-weights"));
    let mut tensors = tensors_of(&other);
    tensors[5].1 = &tensors[5].1 * 1.5;
    write_tensors(&other.join("model.safetensors"), &tensors, &[]).unwrap();
    demand("weights", &diagnose(&other, &good, None, false), "target", "weights are others");
    let beside = copy(&good, &workspace.path("beside"));
    let tokenizer = fs::read_to_string(target.join("tokenizer.json")).unwrap();
    fs::write(beside.join("tokenizer.json"), tokenizer.replace("<|im_start|>", "<|im_begin|>")).unwrap();
    demand("beside", &diagnose(&target, &beside, None, false), "tokenizer", "beside the draft is another");

    // A sound draft guesses well; each mistake that leaves the files readable is found by undoing it.
    let healthy = diagnose(&target, &good, None, true);
    assert_eq!(faults(&healthy), Vec::<String>::new());
    let length = healthy.acceptance.as_ref().unwrap().acceptance_length;
    assert!(length > 1.2 && !healthy.launch.is_empty(), "{length}");
    let alone = copy(&good, &workspace.path("alone"));
    fs::remove_file(alone.join("specforge.json")).unwrap();
    for (name, check, words, change) in READINGS {
        let sick = changed(&workspace, "alone", &format!("reads-{name}"), *change);
        demand(name, &diagnose(&target, &sick, None, true), check, words);
    }

    // A run is no draft.
    let output = output_of(specforge(&["doctor", "--target"]).arg(&target).arg("--draft").arg(workspace.path("run")));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr_of(&output).contains("specforge export"), "{}", stderr_of(&output));

    // The program says the same, and ends with 1.
    let program = |draft: &Path, more: &[&str]| {
        let mut command = specforge(&["doctor", "--device", "cpu", "--max-new-tokens", "16"]);
        command.arg("--target").arg(&target).arg("--draft").arg(draft).args(more);
        output_of(&mut command)
    };
    let sound = program(&good, &[]);
    let text = String::from_utf8(sound.stdout.clone()).unwrap();
    assert!(sound.status.success(), "{}\n{text}", stderr_of(&sound));
    for words in ["0 faults", "vllm serve", "sglang.launch_server", "llama-server", "bit for bit", "acceptance length"]
    {
        assert!(text.contains(words), "{words}: {text}");
    }
    let sick = changed(&workspace, "good", "program", |c, _| c["max_position_embeddings"] = json!(64));
    let output = program(&sick, &["--no-decode", "--json"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr_of(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["faults"], 1);
    let context = report["findings"].as_array().unwrap().iter().find(|finding| finding["check"] == "context").unwrap();
    assert!(context["verdict"] == "fault" && context["advice"].as_str().unwrap().contains("write 256"), "{context}");
}

#[test]
fn medusa_heads_are_looked_at_as_well() {
    let mut workspace = Workspace::with_model(&json!({"num_hidden_layers": 2}));
    workspace.configuration["draft"] = json!({"algorithm": "medusa", "num_heads": 3, "projection": "own"});
    workspace.set("train.max_steps", 20).train("run", &[]);
    let target = workspace.path("model");
    for format in ["medusa", "medusa-vllm"] {
        let mut export = specforge(&["export", "--json", "--format", format, "--checkpoint"]);
        json_of(export.arg(workspace.path("run")).arg("--out").arg(workspace.path(format)));
        let diagnosis = diagnose(&target, &workspace.path(format), None, true);
        // Of so few steps heads learn nothing, which is named.
        let others = faults(&diagnosis).into_iter().filter(|fault| !fault.starts_with(ACCEPTANCE));
        assert_eq!(others.collect::<Vec<_>>(), Vec::<String>::new(), "{format}");
        assert!(diagnosis.checkpoint.is_some(), "{format}");
        demand(format, &diagnosis, ACCEPTANCE, "hardly a guess is right");
        let launched = diagnosis.launch.iter().flat_map(|launch| &launch.commands).any(|line| line.contains("medusa"));
        assert!(launched, "{format}");
    }
    let rows: &[Row] = &[
        ("heads", "files", "cannot be loaded", |c, _| c["num_heads"] = json!(5)),
        ("no-number", "numbers", "infinite or none", |_, t| {
            matrix(t, "blocks.1.layers.0.weight", |block| {
                let block = block.copy();
                drop(block.get(0).get(0).fill_(f64::NAN));
                block
            });
        }),
        ("order", "values", "differs from the one that was trained", |_, t| {
            let names = ["lm_heads.0.weight", "lm_heads.1.weight"];
            let [first, second] = names.map(|name| t.remove(name).unwrap());
            t.insert(names[0].to_owned(), second);
            t.insert(names[1].to_owned(), first);
        }),
    ];
    for (name, check, words, change) in rows {
        let sick = changed(&workspace, "medusa-vllm", name, *change);
        demand(name, &diagnose(&target, &sick, None, false), check, words);
    }
    let folder = workspace.path("medusa-vllm");
    demand(
        "llama.cpp",
        &diagnose(&target, &folder, Some(Engine::LlamaCpp), false),
        "engines",
        "llama.cpp does not serve",
    );
}
