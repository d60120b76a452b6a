//! Masked diffusion models through the whole program: `generate` fills in, and everything that wants a causal model refuses.

use std::fs;
use std::process::Output;

use serde_json::{Value, json};
use specforge::models::{self, TargetConfig};
use specforge::weights::write_tensors;
use tch::{Device, Kind};

use crate::families;
use crate::fixture::{TOKENIZER_SIZE, Workspace, json_of, output_of, specforge, stderr_of};

/// A folder with a small model of a family whose mask token is behind the tokenizer's.
fn workspace(family: &str) -> Workspace {
    let workspace = Workspace::new();
    let mut config = families::config(family);
    config["vocab_size"] = (TOKENIZER_SIZE + 1).into();
    config["mask_token_id"] = TOKENIZER_SIZE.into();
    let model = workspace.path("model");
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    let shapes = TargetConfig::from_value(&config).unwrap().tensors().unwrap();
    let tensors: Vec<_> =
        shapes.into_iter().map(|(name, shape)| (name.clone(), families::random(&name, &shape))).collect();
    write_tensors(&model.join("model.safetensors"), &tensors, &[]).unwrap();
    workspace
}

fn generate(workspace: &Workspace, arguments: &[&str]) -> std::process::Command {
    let mut command = specforge(&["generate", "--device", "cpu", "--raw", "--prompt", "The sky is", "--target"]);
    command.arg(workspace.path("model")).args(arguments);
    command
}

fn answer(workspace: &Workspace, arguments: &[&str]) -> Value {
    let arguments = [&["--json", "--max-new-tokens", "24", "--block-length", "8"][..], arguments].concat();
    json_of(&mut generate(workspace, &arguments))
}

fn refused(output: &Output, words: &[&str]) {
    let problem = stderr_of(output);
    assert!(!output.status.success() && output.stdout.is_empty(), "{problem}");
    assert!(words.iter().all(|word| problem.contains(word)), "{problem}");
}

#[test]
fn answers_are_filled_in_and_summed_up() {
    for family in families::DIFFUSION {
        let workspace = workspace(family);
        let plain = answer(&workspace, &[]);
        let summary = &plain["summary"];
        assert_eq!(summary["lossless"], true, "{plain}");
        let tokens = plain["token_ids"].as_array().unwrap().len();
        assert!((1..=24).contains(&tokens) && summary["tokens"] == tokens, "{plain}");
        let (evaluations, steps) = (summary["evaluations"].as_u64().unwrap(), summary["steps"].as_u64().unwrap());
        assert!(evaluations == steps && evaluations % 8 == 0 && summary["whole_passes"] == evaluations, "{plain}");
        assert_eq!(summary["settings"]["rule"], "steps:8");
        // Exact parallel decoding: the same tokens, at every temperature.
        for temperature in ["0", "0.9"] {
            let of = |more: &[&str]| {
                answer(&workspace, &[&["--temperature", temperature, "--seed", "5"][..], more].concat())
            };
            let (want, got) = (of(&["--steps", "12"]), of(&["--steps", "12", "--exact-parallel", "states=4"]));
            assert_eq!((&got["token_ids"], &got["text"]), (&want["token_ids"], &want["text"]));
            assert_eq!(got["summary"]["lossless"], true);
            assert_eq!(got["summary"]["steps"], want["summary"]["steps"]);
        }
        // Approximate modes say so, and what they left out.
        let rule = "layer=1,threshold=-2,outlier=-2,refresh=0";
        let skipping =
            answer(&workspace, &["--cache", "dual", "--token-skip", rule, "--threshold", "0.9", "--cfg", "0.5"]);
        let summary = &skipping["summary"];
        assert_eq!((&summary["lossless"], &summary["settings"]["cache"]), (&json!(false), &json!("dual")));
        let skipped: Vec<u64> = serde_json::from_value(summary["rows_skipped"].clone()).unwrap();
        assert!(skipped[0] == 0 && skipped[1] > 0 && skipped[1] == skipped[2], "{skipping}");
        assert_eq!(answer(&workspace, &["--cache", "prefix", "--quota", "3"])["summary"]["lossless"], false);
        // The text of a terminal is that of the answer, and the sum is on stderr.
        let output = output_of(&mut generate(&workspace, &["--max-new-tokens", "24", "--block-length", "8"]));
        assert_eq!(
            String::from_utf8(output.stdout.clone()).unwrap().trim_end(),
            plain["text"].as_str().unwrap().trim_end()
        );
        assert!(stderr_of(&output).contains("evaluations") && stderr_of(&output).contains("lossless"));
    }
}

#[test]
fn what_another_kind_of_target_has_is_refused_with_what_this_one_has() {
    let (diffusion, causal) = (workspace("llada"), Workspace::new());
    let run = |workspace: &Workspace, arguments: &[&str]| output_of(&mut generate(workspace, arguments));
    for flags in [
        &["--draft", "prompt-lookup"][..],
        &["--top-k", "5"],
        &["--top-p", "0.9"],
        &["--policy", "maximal"],
        &["--repetition-penalty", "1.1"],
    ] {
        refused(&run(&diffusion, flags), &[flags[0], "masked diffusion", "--block-length"]);
    }
    for flags in
        [&["--block-length", "8"][..], &["--cache", "dual"], &["--cfg", "1"], &["--exact-parallel", "states=2"]]
    {
        refused(&run(&causal, flags), &[flags[0], "causal", "--draft"]);
    }
    // An evaluation too has no draft, no batches, and no options of the other kind.
    for (workspace, flags, word) in [
        (&diffusion, &["--draft", "prompt-lookup"][..], "--draft"),
        (&diffusion, &["--batch", "2"], "--batch"),
        (&diffusion, &["--no-baseline", "--cache", "none", "--cfg", "-1"], "--cfg"),
        (&causal, &["--cache", "dual"], "--cache"),
    ] {
        let mut eval = specforge(&["eval", "--device", "cpu", "--max-new-tokens", "8", "--target"]);
        eval.arg(workspace.path("model")).arg("--data").arg(workspace.path("conversations.jsonl"));
        refused(&output_of(eval.args(["--limit", "1"]).args(flags)), &[word]);
    }
    for (flags, word) in [
        (&["--block-length", "7"][..], "--block-length"),
        (&["--steps", "9"], "--steps"),
        (&["--threshold", "2"], "--threshold"),
        (&["--token-skip", "layer=1"], "--token-skip"),
        (&["--cache", "both"], "--cache"),
        (&["--threshold", "0.9", "--quota", "2"], "--quota"),
        (&["--block-length", "64", "--max-new-tokens", "64"], "context 64"),
    ] {
        refused(&run(&diffusion, flags), &[word]);
    }
}

/// Passes are recorded, and two records are compared and judged by the program.
#[test]
fn decodes_are_recorded_and_compared() {
    let workspace = workspace("llada");
    let target = workspace.path("model").display().to_string();
    let record = |name: &str, more: &[&str]| {
        let path = workspace.path(name).display().to_string();
        let summary = answer(&workspace, &[&["--trace", &path][..], more].concat());
        assert!(summary["summary"]["tokens"].as_u64() > Some(0), "{summary}");
        path
    };
    let rule = |threshold: &str| format!("layer=1,threshold={threshold},outlier=-1,refresh=0");
    let exact = record("exact.trace", &[]);
    let parallel = record("parallel.trace", &["--exact-parallel", "states=3"]);
    let plain = record("dual.trace", &["--cache", "dual"]);
    let never = record("never.trace", &["--cache", "dual", "--token-skip", &rule("1")]);
    let often = record("often.trace", &["--cache", "dual", "--token-skip", &rule("-1")]);
    let compare =
        |a: &str, b: &str| output_of(&mut specforge(&["compare", a, b, "--target", &target, "--device", "cpu"]));
    let said = |output: &Output| String::from_utf8(output.stdout.clone()).unwrap();
    let same = compare(&exact, &parallel);
    assert!(same.status.success() && said(&same).ends_with("verdict: equal\n"), "{}", said(&same));
    // The dual cache alone, and with a rule that never skips: the same numbers; it has no rows that could be skipped.
    let unskipped = compare(&plain, &never);
    assert!(unskipped.status.success(), "{}{}", said(&unskipped), stderr_of(&unskipped));
    let skipped = compare(&never, &often);
    assert_eq!(skipped.status.code(), Some(1), "{}", said(&skipped));
    for part in ["first difference: text 0, block 0, pass 1, `active`", "0 of ", "rows skipped", "the exact decoder"] {
        assert!(said(&skipped).contains(part), "{part}: {}", said(&skipped));
    }
    // A trace of another kind, and another model, are refused.
    let causal = Workspace::new();
    let other = causal.path("other.trace").display().to_string();
    let mut generate =
        specforge(&["generate", "--device", "cpu", "--raw", "--prompt", "The", "--trace", &other, "--target"]);
    json_of(generate.arg(causal.path("model")).args(["--json", "--max-new-tokens", "4"]));
    refused(&output_of(&mut specforge(&["compare", &exact, &other])), &["texts", "masked diffusion"]);
    let mut foreign = specforge(&["compare", &exact, &plain, "--target"]);
    refused(&output_of(foreign.arg(causal.path("model"))), &["is not the target of"]);
}

/// What a causal model becomes is trained, exported, decoded and measured in every way.
#[test]
fn a_causal_model_is_trained_exported_decoded_and_measured() {
    for (shift, start) in [(true, "target"), (false, "target"), (false, "nothing")] {
        let mut workspace = Workspace::with_model(&json!({"vocab_size": TOKENIZER_SIZE + 1}));
        workspace.configuration["draft"] = json!({
            "algorithm": "masked_diffusion", "mask_token_id": TOKENIZER_SIZE, "shift": shift, "start": start,
        });
        if start == "nothing" {
            workspace.set("draft.hidden_size", 48).set("draft.num_layers", 1).set("draft.intermediate_size", 40);
        }
        workspace.set("train.max_steps", 8).set("optim.learning_rate", 3e-3);
        let report = workspace.train("run", &[]);
        let bound = |when: &str| report[when]["bound"].as_f64().unwrap();
        assert!(bound("end") < bound("start"), "{report}");
        let model = workspace.path("exported");
        let mut export = specforge(&["export", "--json", "--format", "masked-diffusion", "--checkpoint"]);
        let exported = json_of(export.arg(workspace.path("run")).arg("--out").arg(&model));
        assert_eq!((&exported["format"], &exported["dtype"]), (&json!("masked-diffusion"), &json!("float32")));
        assert!(output_of(specforge(&["export", "--check"]).arg(&model)).status.success());
        // The numbers are the checkpoint's, under the family's own names.
        let loading = models::Loading { kind: Kind::Float, device: Device::Cpu, layers: None, copies: None };
        let loaded = models::load_diffusion(&model, &loading).unwrap();
        assert_eq!(loaded.info().diffusion, Some(models::MaskedDiffusion { mask: TOKENIZER_SIZE, shift }));
        let mut generate =
            specforge(&["generate", "--json", "--device", "cpu", "--prompt", "seven stones", "--target"]);
        let told = json_of(generate.arg(&model).args(["--max-new-tokens", "16", "--block-length", "8"]));
        assert!(told["summary"]["lossless"] == true && told["summary"]["tokens"].as_u64() > Some(0), "{told}");
        // Every way side by side.
        fs::write(workspace.path("questions.jsonl"), "{\"prompt\": \"seven stones\"}\n{\"prompt\": \"The sky\"}\n")
            .unwrap();
        let mut eval =
            specforge(&["eval", "--json", "--device", "cpu", "--max-new-tokens", "16", "--block-length", "8"]);
        eval.args(["--exact-parallel", "states=3", "--likelihood-samples", "2", "--target"]).arg(&model);
        let report = json_of(eval.arg("--data").arg(workspace.path("questions.jsonl")));
        let ways = report["ways"].as_array().unwrap();
        let names: Vec<&str> = ways.iter().map(|way| way["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["no cache", "no cache, exact parallel", "prefix cache", "dual cache"]);
        let lossless: Vec<bool> = ways.iter().map(|way| way["lossless"].as_bool().unwrap()).collect();
        assert_eq!(lossless, [true, true, false, false]);
        assert_eq!((&ways[1]["agreement"], &ways[1]["same_answers"]), (&json!(1.0), &json!(2)), "{report}");
        assert!(ways.iter().all(|way| way["log_likelihood"].as_f64().unwrap() < 0.0), "{report}");
    }
}

/// Nothing that wants a causal model loads one of masked diffusion: not its layers, its tables, or one layer at a time.
#[test]
fn what_needs_a_causal_model_names_the_family() {
    let mut workspace = workspace("llada");
    let model = workspace.path("model");
    let words = ["masked diffusion", "`llada`", "specforge generate"];
    let problems = [
        models::load_target(&model, Kind::Float, Device::Cpu).err(),
        models::load_tables(&model, Kind::Float, Device::Cpu).err(),
        models::LayerWise::open(&model, Kind::Float, Device::Cpu).err(),
    ];
    for problem in problems {
        let problem = problem.unwrap();
        let text = format!("{problem} {problem:?}");
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }
    workspace.set("train.max_steps", 2);
    refused(&output_of(&mut workspace.train_command("run", &[])), &words);
    refused(&output_of(&mut workspace.train_command("run", &["--plan"])), &words);
    // The other way round.
    let causal = Workspace::new();
    let loading = models::Loading { kind: Kind::Float, device: Device::Cpu, layers: None, copies: None };
    let problem = models::load_diffusion(&causal.path("model"), &loading).err().unwrap().to_string();
    assert!(problem.contains("causal model (`llama`)"), "{problem}");
}

/// Tied heads, files that say it otherwise than config.json, and tensors that are missing, all under the family's own names.
#[test]
fn files_are_read_by_the_familys_own_names() {
    let workspace = workspace("llada");
    let model = workspace.path("model");
    let tensors = || crate::fixture::tensors_of(&model.join("model.safetensors"));
    let all = tensors();
    let write = |keep: &dyn Fn(&str) -> bool| {
        let kept = all.iter().filter(|(name, _)| keep(name));
        let kept: Vec<_> = kept.map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        write_tensors(&model.join("model.safetensors"), &kept, &[]).unwrap();
    };
    let loading = models::Loading { kind: Kind::Float, device: Device::Cpu, layers: None, copies: None };
    write(&|name| !name.contains("blocks.1.ff_proj"));
    let problem = models::load_diffusion(&model, &loading).err().unwrap().to_string();
    assert!(problem.contains("model.transformer.blocks.1.ff_proj.weight"), "{problem}");
    write(&|name| name != "model.transformer.ff_out.weight");
    let mut config: Value = serde_json::from_slice(&fs::read(model.join("config.json")).unwrap()).unwrap();
    config["weight_tying"] = true.into();
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    let tied = models::load_diffusion(&model, &loading).unwrap();
    assert!(tied.head().weight.equal(&tied.embedding().table));
    // A head in the file counts, whatever config.json says.
    write(&|_| true);
    let own = models::load_diffusion(&model, &loading).unwrap();
    assert!(!own.head().weight.equal(&own.embedding().table));
}
