//! What a run reads is known by content: files may move, and none may change.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use specforge::weights;

use crate::fixture::{
    Workspace, contents, conversations, json_of, model_config, model_tensors, output_of, specforge, stderr_of,
};

const HALF: u64 = 3;
const WHOLE: u64 = 6;

/// A run of six steps that can stop after three.
fn workspace(draft: Value) -> Workspace {
    let mut workspace = Workspace::new();
    workspace.configuration["draft"] = draft;
    workspace.set("train.max_steps", WHOLE).set("optim.schedule", json!({"kind": "constant", "warmup_steps": 1}));
    workspace
}

fn medusa() -> Value {
    json!({"algorithm": "medusa", "num_heads": 2})
}

fn eagle3() -> Value {
    json!({"algorithm": "eagle3", "capture": [0, 1], "ttt_steps": 2, "recompute": true})
}

fn first_half(workspace: &Workspace, run: &str) {
    workspace.train(run, &["--set", &format!("train.max_steps={HALF}")]);
}

fn step_of(workspace: &Workspace, run: &str, step: u64) -> std::path::PathBuf {
    workspace.path(run).join(format!("step-{step:08}"))
}

#[track_caller]
fn assert_same_bytes(workspace: &Workspace, run: &str, reference: &str) {
    for name in ["model.safetensors", "optimizer.safetensors"] {
        let read = |run: &str| fs::read(step_of(workspace, run, WHOLE).join(name)).unwrap();
        assert!(read(run) == read(reference), "{run}: {name} differs");
    }
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

fn capture(workspace: &Workspace, store: &str, element: &str) {
    let mut command = specforge(&["capture", "--json", "--dtype", element, "--device", "cpu", "--config"]);
    json_of(command.arg(workspace.config()).arg("--out").arg(workspace.path(store)));
}

/// Model, data, template and output move, and what decides about memory and speed changes: the end is the same.
#[test]
fn files_may_move_and_memory_may_be_saved() {
    let mut workspace = workspace(eagle3());
    workspace.set("draft.draft_vocab_size", 300);
    let template = workspace.path("template.jinja");
    let own: Value = serde_json::from_slice(&fs::read(workspace.path("model/tokenizer_config.json")).unwrap()).unwrap();
    fs::write(&template, own["chat_template"].as_str().unwrap()).unwrap();
    fs::write(workspace.path("held-out.jsonl"), conversations(3)).unwrap();
    workspace.set("data.chat_template", template.display().to_string());
    workspace.set("data.eval", json!([workspace.path("held-out.jsonl")]));
    workspace.train("undisturbed", &[]);
    first_half(&workspace, "run");

    for (from, to) in
        [("model", "moved"), ("conversations.jsonl", "renamed.jsonl"), ("held-out.jsonl", "x"), ("template.jinja", "y")]
    {
        fs::rename(workspace.path(from), workspace.path(to)).unwrap();
    }
    workspace.set("target.path", workspace.path("moved").display().to_string());
    workspace.set("data.train", json!([workspace.path("renamed.jsonl")]));
    workspace.set("data.eval", json!([workspace.path("x")]));
    workspace.set("data.chat_template", workspace.path("y").display().to_string());
    workspace.set("data.max_bad_share", 0.5).set("train.chunk_mib", 2).set("draft.recompute", false);
    workspace.set("target.keep_hidden_states", true).set("target.keep_hidden_mib", 1);
    let report = workspace.train("run", &["--resume"]);
    assert_eq!(report["steps"], WHOLE);
    for name in ["model.safetensors", "optimizer.safetensors"] {
        let tensors = |run: &str| crate::fixture::tensors_of(&step_of(&workspace, run, WHOLE).join(name));
        for ((name, left), (_, right)) in tensors("run").iter().zip(&tensors("undisturbed")) {
            let difference = crate::fixture::largest_difference(left, right);
            assert!(difference < 1e-6, "{name}: {difference:e}"); // pieces of other sizes are summed in another order
        }
    }
}

#[test]
fn a_target_and_data_in_another_place_are_the_same() {
    let mut workspace = workspace(medusa());
    workspace.train("undisturbed", &[]);
    first_half(&workspace, "run");
    // The same data in two files, and the weights in two shards.
    let text = fs::read_to_string(workspace.path("conversations.jsonl")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    fs::write(workspace.path("one.jsonl"), lines[..20].join("\n")).unwrap();
    fs::write(workspace.path("two.jsonl"), lines[20..].join("\n")).unwrap();
    workspace.set("data.train", json!([workspace.path("one.jsonl"), workspace.path("two.jsonl")]));
    let mut map = serde_json::Map::new();
    for (number, part) in model_tensors(&model_config(&json!({}))).chunks(7).enumerate() {
        let file = format!("part-{number}.safetensors");
        part.iter().for_each(|(name, _)| drop(map.insert(name.clone(), json!(file))));
        weights::write_tensors(&workspace.path("model").join(&file), part, &[]).unwrap();
    }
    fs::write(workspace.path("model/model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
    fs::remove_file(workspace.path("model/model.safetensors")).unwrap();
    workspace.train("run", &["--resume"]);
    assert_same_bytes(&workspace, "run", "undisturbed");
}

/// Exact states are the target's own: a run may move between the two.
#[test]
fn a_run_may_go_on_from_a_store_that_holds_the_states_to_the_bit() {
    let workspace = workspace(medusa());
    workspace.train("undisturbed", &[]);
    first_half(&workspace, "online");
    first_half(&workspace, "rounded");
    capture(&workspace, "store", "float32");
    capture(&workspace, "bfloat16", "bfloat16");
    let from = |store: &str| format!("target.feature_store={}", workspace.path(store).display());
    workspace.train("online", &["--resume", "--set", &from("store")]);
    assert_same_bytes(&workspace, "online", "undisturbed");
    let max = format!("train.max_steps={HALF}");
    workspace.train("offline", &["--set", &from("store"), "--set", &max]);
    workspace.train("offline", &["--resume"]);
    assert_same_bytes(&workspace, "offline", "undisturbed");

    let refused = output_of(&mut workspace.train_command("rounded", &["--resume", "--set", &from("bfloat16")]));
    let message = stderr_of(&refused);
    assert_eq!(refused.status.code(), Some(2), "{message}");
    assert!(
        message.contains("the hidden states changed") && message.contains("was computed by the target"),
        "{message}"
    );

    // A store in another folder, with more in it.
    workspace.train("stored", &["--set", &from("bfloat16"), "--set", &max]);
    fs::rename(workspace.path("bfloat16"), workspace.path("moved")).unwrap();
    let text = fs::read_to_string(workspace.path("conversations.jsonl")).unwrap();
    fs::write(workspace.path("conversations.jsonl"), conversations(80)).unwrap();
    capture(&workspace, "moved", "bfloat16");
    fs::write(workspace.path("conversations.jsonl"), text).unwrap();
    let from = format!("target.feature_store={}", workspace.path("moved").display());
    assert_eq!(workspace.train("stored", &["--resume", "--set", &from])["steps"], WHOLE);
}

/// Everything that a run reads, changed under its name: refused by name with what was and what is, and nothing is touched.
#[test]
fn nothing_that_a_run_reads_may_change() {
    type Spoil = fn(&Workspace);
    let cases: [(&str, Spoil, &str); 9] = [
        ("other weights", |workspace| other_weights(workspace, None), "the target's weights changed"),
        (
            "one number of one layer",
            |workspace| other_weights(workspace, Some("model.layers.1.mlp.down_proj.weight")),
            "the target's weights changed",
        ),
        (
            "another epsilon",
            |workspace| edit(&workspace.path("model/config.json"), |value| value["rms_norm_eps"] = json!(1e-3)),
            "the target's config.json changed",
        ),
        (
            "another tokenizer",
            |workspace| {
                let path = workspace.path("model/tokenizer.json");
                edit(&path, |value| value["added_tokens"][0]["single_word"] = json!(true));
            },
            "the tokenizer changed",
        ),
        (
            "another template",
            |workspace| {
                edit(&workspace.path("model/tokenizer_config.json"), |value| {
                    value["chat_template"] = json!(format!("{{# new #}}{}", value["chat_template"].as_str().unwrap()));
                });
            },
            "the chat template changed",
        ),
        (
            "another end of a turn",
            |workspace| fs::write(workspace.path("model/generation_config.json"), r#"{"eos_token_id": [5]}"#).unwrap(),
            "the special tokens changed",
        ),
        (
            "other data",
            |workspace| fs::write(workspace.path("conversations.jsonl"), conversations(59)).unwrap(),
            "the data changed",
        ),
        (
            "other held-out data",
            |workspace| fs::write(workspace.path("held-out.jsonl"), conversations(4)).unwrap(),
            "the held-out data changed",
        ),
        (
            "another starting draft",
            |workspace| {
                let path = workspace.path("start/model.safetensors");
                let mut tensors = crate::fixture::tensors_of(&path);
                drop(tensors[0].1.fill_(0.25));
                weights::write_tensors(&path, &tensors, &[]).unwrap();
            },
            "the starting draft changed",
        ),
    ];
    let mut first = Workspace::with_model(&eight_layers());
    first.configuration["draft"] = json!({"algorithm": "eagle3", "ttt_steps": 2});
    first.set("train.max_steps", WHOLE).set("optim.schedule", json!({"kind": "constant", "warmup_steps": 1}));
    fs::write(first.path("held-out.jsonl"), conversations(3)).unwrap();
    first.set("data.eval", json!([first.path("held-out.jsonl")]));
    first.train("before", &["--set", "train.max_steps=1"]);
    let mut export = specforge(&["export", "--json", "--format", "eagle3", "--checkpoint"]);
    json_of(export.arg(first.path("before")).arg("--out").arg(first.path("start")));
    first.set("draft.init_from", first.path("start").display().to_string());
    first_half(&first, "run");
    let whole: Vec<_> = ["model", "start", "conversations.jsonl", "held-out.jsonl"]
        .iter()
        .flat_map(|name| match first.path(name).is_dir() {
            true => contents(&first.path(name))
                .into_iter()
                .map(|(path, bytes)| (Path::new(name).join(path), bytes))
                .collect(),
            false => vec![(Path::new(name).to_path_buf(), fs::read(first.path(name)).unwrap())],
        })
        .collect();
    let run = contents(&first.path("run"));
    let mut wrong = Vec::new();
    for (name, spoil, expected) in cases {
        spoil(&first);
        let output = output_of(&mut first.train_command("run", &["--resume"]));
        let message = stderr_of(&output);
        let sound = output.status.code() == Some(2)
            && [expected, "run/step-00000003: ", ": was ", ", is ", "\nhint: restore the files of"]
                .iter()
                .all(|words| message.contains(words));
        if !sound || contents(&first.path("run")) != run {
            wrong.push(format!("-- {name}: {} {expected}\n{message}", output.status));
        }
        let _ = fs::remove_file(first.path("model/generation_config.json"));
        whole.iter().for_each(|(path, bytes)| fs::write(first.path("").join(path), bytes).unwrap());
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // As it was, it goes on; without its starting draft too, which it does not need any more.
    fs::remove_dir_all(first.path("start")).unwrap();
    let output = output_of(&mut first.train_command("run", &["--resume"]));
    assert!(output.status.success() && stderr_of(&output).contains("start is gone"), "{}", stderr_of(&output));
}

/// A draft of its own reads three layers of a target like this.
fn eight_layers() -> Value {
    json!({"num_hidden_layers": 8})
}

/// Other weights of the same sizes; `None` changes every tensor, a name one number in the middle of that one.
fn other_weights(workspace: &Workspace, name: Option<&str>) {
    let mut tensors = model_tensors(&model_config(&eight_layers()));
    for (found, tensor) in &mut tensors {
        match name {
            None => drop(tensor.g_mul_scalar_(1.5)),
            Some(name) if name == found => {
                let flat = tensor.view([-1]);
                drop(flat.get(flat.size()[0] / 2).fill_(0.5));
            }
            Some(_) => {}
        }
    }
    weights::write_tensors(&workspace.path("model/model.safetensors"), &tensors, &[]).unwrap();
}

/// A store whose target was another one, or whose bytes are others, is none of this run.
#[test]
fn a_store_may_not_change_under_its_name() {
    let mut workspace = workspace(medusa());
    capture(&workspace, "store", "bfloat16");
    workspace.set("target.feature_store", workspace.path("store").display().to_string());
    first_half(&workspace, "run");
    // The same documents, captured in another element type.
    fs::remove_dir_all(workspace.path("store")).unwrap();
    capture(&workspace, "store", "float8");
    let output = output_of(&mut workspace.train_command("run", &["--resume"]));
    let message = stderr_of(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("the hidden states changed since this checkpoint: was stored, "), "{message}");
}

/// A checkpoint of a version that named its data alone is gone on from, with a warning.
#[test]
fn an_older_checkpoint_is_compared_as_far_as_it_goes() {
    let workspace = workspace(medusa());
    workspace.train("undisturbed", &[]);
    first_half(&workspace, "run");
    let manifest = step_of(&workspace, "run", HALF).join("manifest.json");
    edit(&manifest, |value| drop(value.as_object_mut().unwrap().remove("inputs").unwrap()));
    // Where the target lies is all that is known of it.
    fs::create_dir(workspace.path("copy")).unwrap();
    for (path, bytes) in contents(&workspace.path("model")) {
        fs::write(workspace.path("copy").join(path), bytes).unwrap();
    }
    let elsewhere = format!("target.path={}", workspace.path("copy").display());
    let output = output_of(&mut workspace.train_command("run", &["--resume", "--set", &elsewhere]));
    assert!(stderr_of(&output).contains("`target.path`: the checkpoint was trained with"), "{}", stderr_of(&output));
    let text = fs::read_to_string(workspace.path("conversations.jsonl")).unwrap();
    fs::write(workspace.path("conversations.jsonl"), conversations(50)).unwrap();
    let output = output_of(&mut workspace.train_command("run", &["--resume"]));
    assert!(stderr_of(&output).contains("the data changed since this checkpoint"), "{}", stderr_of(&output));
    fs::write(workspace.path("conversations.jsonl"), text).unwrap();
    let output = output_of(&mut workspace.train_command("run", &["--resume"]));
    let message = stderr_of(&output);
    assert!(output.status.success() && message.contains("warning: ") && message.contains("not compared"), "{message}");
    assert_same_bytes(&workspace, "run", "undisturbed");
}
