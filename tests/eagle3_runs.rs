//! Whole EAGLE-3 runs through the program: what is learned, what is exported, and how much memory a step takes.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::fixture::{Workspace, conversations, json_of, output_of, specforge, stderr_of, tensors_of};

fn workspace() -> Workspace {
    let mut workspace = Workspace::new();
    workspace.configuration["draft"] =
        json!({"algorithm": "eagle3", "capture": [0, 1], "draft_vocab_size": 200, "ttt_steps": 7});
    workspace
}

/// A draft that has seen one conversation often enough names every token of it, at every step.
#[test]
fn one_conversation_is_learned_by_heart() {
    let mut workspace = workspace();
    fs::write(workspace.path("one.jsonl"), conversations(1)).unwrap();
    let one = json!([workspace.path("one.jsonl")]);
    workspace.set("data.train", one.clone()).set("data.eval", one);
    workspace.set("draft.draft_vocab_size", Value::Null).set("draft.lm_head", "random");
    workspace.set("train.max_steps", 1500).set("train.log_every", 50).set("optim.learning_rate", 5e-3);
    let report = workspace.train("run", &[]);
    for step in 1..=7 {
        let accuracy = |when: &str| report[when][format!("step{step}/accuracy")].as_f64().unwrap();
        assert!(accuracy("start") < 0.5, "step {step} knew it already");
        assert_eq!(accuracy("end"), 1.0, "step {step} of {report}");
    }
    assert_eq!(report["end"]["step7/chain"], 1.0);
}

/// Exported files start the next run where the last one ended.
#[test]
fn a_run_starts_from_an_exported_draft() {
    let mut workspace = workspace();
    workspace.set("train.max_steps", 12);
    let first = workspace.train("first", &[]);
    let run = workspace.path("first");
    let folder = workspace.path("exported");
    let mut export = specforge(&["export", "--json", "--format", "eagle3", "--checkpoint"]);
    let report = json_of(export.arg(&run).arg("--out").arg(&folder));
    assert_eq!(report["format"], "eagle3");
    let from = format!("draft.init_from={}", folder.display());
    let map = format!("draft.vocab_map={}", run.join("vocab.safetensors").display());
    let second = workspace.train("second", &["--set", &from, "--set", &map, "--set", "train.max_steps=1"]);
    assert_eq!(second["start"], first["end"]);
    assert_ne!(second["start"], first["start"]);
}

/// A draft that starts from the target's last layer is that layer on the side of the feature.
#[test]
fn a_run_starts_from_a_layer_of_the_target() {
    let mut workspace = workspace();
    workspace.set("train.max_steps", 1).set("optim.learning_rate", 1e-30).set("draft.layer_from", 1);
    let report = workspace.train("run", &[]);
    let all = |path: std::path::PathBuf| tensors_of(&path).into_iter().collect::<std::collections::HashMap<_, _>>();
    let draft = all(workspace.path("run/step-00000001/model.safetensors"));
    let target = all(workspace.path("model/model.safetensors"));
    let of_target = |part: &str| &target[&format!("model.layers.1.{part}.weight")];
    let own = |part: &str| &draft[&format!("midlayer.{part}.weight")];
    for part in ["self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] {
        assert!(own(part).equal(of_target(part)), "{part}");
    }
    assert!(
        own("hidden_norm").equal(of_target("input_layernorm")) && !own("input_layernorm").equal(own("hidden_norm"))
    );
    for part in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] {
        let halves = own(part).chunk(2, 1);
        assert!(halves[0].abs().max().double_value(&[]) < 1e-20, "{part} is blind to the embedding");
        assert!(halves[1].equal(of_target(part)), "{part}");
    }
    // The last captured state goes through as it is, beside a little noise.
    let noise = &draft["fc.weight"].chunk(2, 1)[1] - Tensor::eye(32, (Kind::Float, Device::Cpu));
    assert!(noise.abs().max().double_value(&[]) < 0.2);

    // What was drawn at random elsewhere is what it is without a layer.
    workspace.set("draft.layer_from", Value::Null);
    let random = workspace.train("random", &[]);
    assert_ne!(random["start"], report["start"]);
    let random = all(workspace.path("random/step-00000001/model.safetensors"));
    assert!(random["fc.weight"].chunk(2, 1)[0].equal(&draft["fc.weight"].chunk(2, 1)[0]));

    let refused = |value: &str| stderr_of(&output_of(&mut workspace.train_command("no", &["--set", value])));
    let deep = refused("draft.layer_from=2");
    assert!(deep.contains("`draft.layer_from`") && deep.contains("expected a layer below 2"), "{deep}");
}

/// Memory of a step at 1024 tokens, nearly all of them trained, a vocabulary of 32000, the draft's of 8000, 7 steps.
#[test]
fn a_step_takes_less_memory_than_a_dense_one() {
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/../benchmarks/eagle3-step.json");
    let mut command: Command = specforge(&["bench-train", "--json", "--repeat", "1", "--device", "cpu"]);
    let report = json_of(command.args(["--config", config, "--batch", "1x1024", "--supervised", "0.99"]));
    let bytes = |key: &str| report[key].as_u64().unwrap();
    let taken = bytes("peak_memory_bytes") - bytes("memory_before_bytes");
    let own = std::env::current_exe().unwrap();
    let name = "eagle3_runs::a_dense_step_in_a_process_of_its_own";
    let output = Command::new(own).args(["--exact", name, "--nocapture"]).env(DENSE, "1").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let dense: u64 = text.lines().find_map(|line| line.strip_prefix("dense bytes ")?.parse().ok()).unwrap();
    println!("a step takes {} MiB, a dense one {} MiB", taken >> 20, dense >> 20);
    // A third, with a margin for what the allocator keeps.
    assert!(5 * taken <= 2 * dense, "{taken} {dense}");
}

/// Asks this process to take a dense step and say how much memory it needed.
const DENSE: &str = "SPECFORGE_TEST_DENSE_STEP";

/// One step as the references do it: every row at every step, whole matrices of scores, logits of all rows, autograd.
#[test]
fn a_dense_step_in_a_process_of_its_own() {
    if std::env::var_os(DENSE).is_none() {
        return;
    }
    let peak = || {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() << 10
    };
    let (rows, hidden, width, heads, vocabulary, draft_vocabulary) = (1024, 512, 1376, 8, 32000, 8000);
    let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 0.02;
    let trained = |shape: &[i64]| random(shape).set_requires_grad(true);
    let (head, last) = (random(&[vocabulary, hidden]), random(&[rows, hidden]));
    let (captured, embedded) = (random(&[rows, 3 * hidden]), random(&[rows, hidden]));
    let projections: Vec<Tensor> = (0..3).map(|_| trained(&[hidden, 2 * hidden])).collect();
    let (fc, output) = (trained(&[hidden, 3 * hidden]), trained(&[hidden, hidden]));
    let (gate, up, down) = (trained(&[width, hidden]), trained(&[width, hidden]), trained(&[hidden, width]));
    let draft_head = trained(&[draft_vocabulary, hidden]);
    let before = peak();

    let apply = |input: &Tensor, weight: &Tensor| input.linear(weight, None::<&Tensor>);
    let norm = |input: &Tensor| input / (input.square().mean_dim(-1, true, Kind::Float) + 1e-5).sqrt();
    let logits = apply(&last, &head); // [T, V]
    let _top = logits.argmax(-1, false);
    let teacher = logits.narrow(1, 0, draft_vocabulary).softmax(-1, Kind::Float); // [T, DV]
    let blind = Tensor::ones([rows, rows], (Kind::Bool, Device::Cpu)).triu(1);
    let mut feature = apply(&captured, &fc);
    let mut keys: Vec<[Tensor; 2]> = Vec::new();
    let mut loss = Tensor::zeros([], (Kind::Float, Device::Cpu));
    for _ in 0..7 {
        let input = Tensor::cat(&[norm(&embedded), norm(&feature)], 1);
        let project = |weight| apply(&input, weight).view([rows, heads, -1]).transpose(0, 1); // [N, T, D]
        let query = project(&projections[0]) / 8.0;
        keys.push([project(&projections[1]), project(&projections[2])]);
        let scores = query.matmul(&keys[0][0].transpose(1, 2)).masked_fill(&blind, f64::NEG_INFINITY); // [N, T, T]
        let own = |[key, _]: &[Tensor; 2]| (&query * key).sum_dim_intlist([-1i64].as_slice(), true, Kind::Float);
        let scores: Vec<Tensor> = [scores].into_iter().chain(keys[1..].iter().map(own)).collect();
        let shares = Tensor::cat(&scores, 2).softmax(-1, Kind::Float); // [N, T, T + k]
        let mut mixed = shares.narrow(2, 0, rows).matmul(&keys[0][1]);
        for (index, [_, value]) in keys[1..].iter().enumerate() {
            mixed += shares.narrow(2, rows + index as i64, 1) * value;
        }
        let after: Tensor = &feature + apply(&mixed.transpose(0, 1).reshape([rows, hidden]), &output);
        let normed = norm(&after);
        let gated = apply(&normed, &gate).silu() * apply(&normed, &up);
        feature = after + apply(&gated, &down);
        let log_draft = apply(&norm(&feature), &draft_head).log_softmax(-1, Kind::Float); // [T, DV]
        loss += (&teacher * log_draft).sum(Kind::Float) / -(rows as f64);
    }
    loss.backward();
    assert!(draft_head.grad().abs().max().double_value(&[]) > 0.0);
    println!("dense bytes {}", peak() - before);
}
