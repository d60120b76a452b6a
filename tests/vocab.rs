//! A draft's own vocabulary through the whole program: chosen, kept, checked, trained with, exported. And Medusa's
//! gradients with one against a plain computation on all tokens.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use serde_json::{Value, json};
use specforge::data::{DocumentRef, PackedBatch};
use specforge::draft::medusa::{Medusa, MedusaConfig};
use specforge::draft::supervision::{MaskAlignment, trained_rows};
use specforge::draft::{DraftContext, DraftModel, Gradients, Tally};
use specforge::export::medusa::read;
use specforge::features::{FeatureBatch, FeatureSource, OnlineFeatures};
use specforge::models::TargetModel;
use specforge::models::llama::LlamaTarget;
use specforge::nn::noise;
use specforge::vocab::{Record, VocabFile, VocabMap};
use specforge::weights;
use tch::{Device, Kind, Tensor};

use crate::fixture::{
    STEP, TOKENIZER_SIZE, Workspace, contents, conversations, json_of, largest_difference, litter, output_of,
    specforge, stderr_of, tensors_of,
};
use crate::small_drafts;

/// Tokens of the maps here.
const DRAFT_SIZE: i64 = 60;

fn vocab_command(workspace: &Workspace, size: i64, out: &Path) -> Command {
    let mut command = specforge(&["vocab", "--json", "--config"]);
    command.arg(workspace.config()).arg("--draft-vocab-size").arg(size.to_string()).arg("--out").arg(out);
    command
}

/// Makes a map through the program.
fn make(workspace: &Workspace, name: &str) -> VocabFile {
    let path = workspace.path(name);
    json_of(&mut vocab_command(workspace, DRAFT_SIZE, &path));
    VocabFile::read(&path).unwrap()
}

#[test]
fn a_map_is_chosen_from_the_training_documents() {
    let mut workspace = Workspace::new();
    let path = workspace.path("maps/a.safetensors");
    let report = json_of(&mut vocab_command(&workspace, DRAFT_SIZE, &path));
    let first = fs::read(&path).unwrap();
    let file = VocabFile::read(&path).unwrap();
    assert_eq!((file.map.draft_size(), file.map.target_size()), (DRAFT_SIZE, TOKENIZER_SIZE));
    assert_eq!(report["hash"], file.map.hash());
    assert_eq!(report["coverage"], file.record.as_ref().unwrap().coverage);
    let shares: Vec<f64> =
        report["table"].as_array().unwrap().iter().map(|row| row["share"].as_f64().unwrap()).collect();
    assert_eq!(shares.last(), Some(&1.0));
    assert!(report["coverage"].as_f64().unwrap() > 0.9 && report["filled"].as_u64().unwrap() < DRAFT_SIZE as u64);
    // Ends of turns and special tokens are in it; the smallest map is made of them alone.
    let forced = report["forced"].as_i64().unwrap();
    assert!(forced > 0);
    json_of(&mut vocab_command(&workspace, forced, &path));
    let smallest = VocabFile::read(&path).unwrap().map;
    assert!(smallest.target_ids().iter().all(|&id| file.map.draft_id(id).is_some()));
    let output = output_of(&mut vocab_command(&workspace, forced - 1, &path));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr_of(&output).contains(&format!("--draft-vocab-size: expected at least {forced} tokens")));
    assert_eq!(VocabFile::read(&path).unwrap().map, smallest);

    // The same data give the same bytes; documents that are held out do not choose.
    json_of(&mut vocab_command(&workspace, DRAFT_SIZE, &path));
    assert!(fs::read(&path).unwrap() == first);
    let all = json_of(&mut vocab_command(workspace.set("data.eval_fraction", 0.0), DRAFT_SIZE, &path));
    assert!(all["supervised_tokens"].as_u64() > report["supervised_tokens"].as_u64());

    // No weights are needed, and nothing foreign is replaced.
    workspace.set("data.eval_fraction", 0.1);
    fs::remove_file(workspace.path("model/model.safetensors")).unwrap();
    json_of(&mut vocab_command(&workspace, DRAFT_SIZE, &path));
    let foreign = workspace.path("conversations.jsonl");
    let output = output_of(&mut vocab_command(&workspace, DRAFT_SIZE, &foreign));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr_of(&output).contains("is there and is no vocabulary map"), "{}", stderr_of(&output));
    assert_eq!(fs::read_to_string(&foreign).unwrap(), conversations(60));
    assert_eq!(litter(&workspace.path("")), Vec::<std::path::PathBuf>::new());
}

/// Trains with a map at this path and returns the refusal.
fn refusal(workspace: &Workspace, path: &Path, more: &[&str]) -> String {
    let setting = format!("draft.vocab_map={}", path.display());
    let output = output_of(&mut workspace.train_command("refused", &[&["--set", &setting], more].concat()));
    let message = stderr_of(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(!workspace.path("refused/config.json").exists(), "{message}");
    message
}

#[test]
fn a_map_that_does_not_fit_is_refused() {
    let workspace = Workspace::new();
    let VocabFile { map, record } = make(&workspace, "map.safetensors");
    let path = workspace.path("other.safetensors");
    let write = |map: &VocabMap, change: &dyn Fn(&mut Record)| {
        let record = record.as_ref().unwrap();
        let mut record = Record::new(map, &record.tokenizer_hash, &record.corpus_hash, 0.5);
        change(&mut record);
        VocabFile { map: map.clone(), record: Some(record) }.write(&path).unwrap();
    };
    let larger = VocabMap::new(map.target_ids().to_vec(), TOKENIZER_SIZE + 10).unwrap();
    write(&larger, &|_| ());
    let message = refusal(&workspace, &path, &[]);
    assert!(message.contains("maps a target of 464 tokens, this target has 454"), "{message}");
    write(&map, &|record| record.tokenizer_hash = "0123456789abcdef".to_owned());
    let message = refusal(&workspace, &path, &[]);
    assert!(message.contains("was made with another tokenizer: its hash is 0123456789ab"), "{message}");
    write(&map, &|_| ());
    let message = refusal(&workspace, &path, &["--set", "draft.draft_vocab_size=61"]);
    assert!(message.contains("holds 60 tokens, draft.draft_vocab_size asks for 61"), "{message}");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    let message = refusal(&workspace, &path, &[]);
    assert!(message.contains("other.safetensors: is no vocabulary map"), "{message}");
    let message = refusal(&workspace, &workspace.path("nowhere"), &[]);
    assert!(message.contains("cannot read") && message.contains("nowhere"), "{message}");
    // SpecForge's file is read; this one is of a target of 16 tokens.
    let torch = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/vocab/vocab_mapping.pt");
    let message = refusal(&workspace, &torch, &[]);
    assert!(message.contains("maps a target of 16 tokens, this target has 454"), "{message}");

    // A size alone that cannot be.
    for (size, expected) in
        [("455", "expected 1 to 454 tokens"), ("0", "expected at least 1, got 0"), ("1", "at least")]
    {
        let setting = format!("draft.draft_vocab_size={size}");
        let output = output_of(&mut workspace.train_command("refused", &["--set", &setting]));
        let message = stderr_of(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains("`draft.draft_vocab_size`: ") && message.contains(expected), "{message}");
    }
}

#[test]
fn a_run_keeps_its_map_and_goes_on_with_no_other() {
    let mut workspace = Workspace::new();
    workspace.set("draft.draft_vocab_size", DRAFT_SIZE).set("train.save_every", 2);
    let file = make(&workspace, "map.safetensors");
    let plan = workspace.train("run", &["--plan"]);
    assert_eq!((&plan["draft_vocabulary"], &plan["target_vocabulary"]), (&json!(DRAFT_SIZE), &json!(TOKENIZER_SIZE)));
    assert_eq!(plan["trainable_parameters"], 3 * (32 * 32 + 32 + DRAFT_SIZE * 32));
    workspace.train("run", &[]);
    let (run, step) = (workspace.path("run"), workspace.path("run/step-00000004"));
    assert_eq!(VocabFile::read(&run.join("vocab.safetensors")).unwrap(), file);
    assert_eq!(VocabFile::read(&step.join("model.safetensors")).unwrap().map, file.map);
    let manifest: Value = serde_json::from_slice(&fs::read(step.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["data_hashes"]["vocabulary"], file.map.hash());

    // The chosen map, given as a file, makes the same run.
    let as_file = format!("draft.vocab_map={}", workspace.path("map.safetensors").display());
    workspace.train("file", &["--set", &as_file]);
    let model = |step: &Path| fs::read(step.join("model.safetensors")).unwrap();
    assert!(model(&workspace.path("file/step-00000004")) == model(&step));
    assert!(!workspace.path("file/vocab.safetensors").exists());
    // Where the file lies is no change, what it says is.
    fs::copy(workspace.path("map.safetensors"), workspace.path("moved.safetensors")).unwrap();
    let moved = format!("draft.vocab_map={}", workspace.path("moved.safetensors").display());
    workspace.train("file", &["--resume", "--set", &moved]);
    let mut ids = file.map.target_ids().to_vec();
    ids[DRAFT_SIZE as usize - 1] = (0..).find(|id| file.map.draft_id(*id).is_none()).unwrap();
    ids.sort_unstable();
    let other = VocabFile { map: VocabMap::new(ids, TOKENIZER_SIZE).unwrap(), ..file };
    other.write(&workspace.path("moved.safetensors")).unwrap();
    let output = output_of(&mut workspace.train_command("file", &["--resume", "--set", &moved]));
    assert_eq!(output.status.code(), Some(2));
    let message = stderr_of(&output);
    assert!(message.contains("the vocabulary map changed since this checkpoint: was ") && message.contains("hint: "));

    // Another corpus is a warning, not a refusal.
    fs::write(workspace.path("conversations.jsonl"), conversations(50)).unwrap();
    let output = output_of(&mut workspace.train_command("elsewhere", &["--set", &as_file]));
    assert!(output.status.success(), "{}", stderr_of(&output));
    assert!(stderr_of(&output).contains("warning: ") && stderr_of(&output).contains("was counted on other data"));
}

#[test]
fn resuming_with_a_chosen_map_is_bit_exact() {
    let mut workspace = Workspace::new();
    workspace.set("draft.draft_vocab_size", DRAFT_SIZE).set("train.max_steps", 6);
    workspace.set("optim.schedule", json!({"kind": "constant", "warmup_steps": 0}));
    workspace.train("whole", &[]);
    workspace.train("half", &["--set", "train.max_steps=3"]);
    workspace.train("half", &["--resume"]);
    let file = |run: &str, name: &str| fs::read(workspace.path(run).join("step-00000006").join(name)).unwrap();
    for name in ["model.safetensors", "optimizer.safetensors"] {
        assert!(file("whole", name) == file("half", name), "{name}");
    }
}

#[test]
fn every_algorithm_trains_with_a_map() {
    let mut workspace = Workspace::new();
    let path = workspace.path("map.safetensors");
    let map = make(&workspace, "map.safetensors").map;
    for section in
        [json!({"algorithm": "medusa", "projection": "shared"}), json!({"algorithm": "eagle3", "capture": [0, 1, 2]})]
    {
        let name = section["algorithm"].as_str().unwrap().to_owned();
        workspace.configuration["draft"] = section;
        workspace.set("draft.vocab_map", path.to_str().unwrap());
        let plan = workspace.train(&name, &["--plan"]);
        assert_eq!(plan["draft_vocabulary"], DRAFT_SIZE);
        let report = workspace.train(&name, &[]);
        assert!(report["end"]["loss"].as_f64().unwrap() < report["start"]["loss"].as_f64().unwrap(), "{name}");
        let model = workspace.path(&name).join("step-00000004/model.safetensors");
        assert_eq!(VocabFile::read(&model).unwrap().map, map, "{name}");
    }
}

fn export(workspace: &Workspace, run: &str, format: &str, out: &Path) -> Command {
    let mut command = specforge(&["export", "--json", "--format", format, "--checkpoint"]);
    command.arg(workspace.path(run)).arg("--out").arg(out);
    command
}

#[test]
fn an_export_carries_the_map_or_is_refused() {
    let mut workspace = Workspace::new();
    workspace.set("draft.draft_vocab_size", DRAFT_SIZE);
    let map = make(&workspace, "map.safetensors").map;
    let head = tensors_of(&workspace.path("model")).into_iter().find(|(name, _)| name == "lm_head.weight").unwrap().1;
    for projection in ["own", "shared"] {
        workspace.set("draft.projection", projection);
        workspace.train(projection, &[]);
        let out = workspace.path(&format!("{projection}-vllm"));
        let report = json_of(&mut export(&workspace, projection, "medusa-vllm", &out));
        assert_eq!(report["tensors"], 3 * 3 + 1);
        assert_eq!(report["parameters"], 3 * (32 * 32 + 32 + DRAFT_SIZE * 32));
        assert!(report["resolved"].to_string().contains("60 of the target's 454 tokens"), "{report}");
        let config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
        assert_eq!((&config["vocab_size"], &config["truncated_vocab_size"]), (&json!(454), &json!(60)));
        let heads = read(&out).unwrap();
        assert_eq!(heads.vocabulary.as_ref(), Some(&map));
        let trained = tensors_of(&workspace.path(projection).join("step-00000004/model.safetensors"));
        for (name, tensor) in &heads.tensors {
            let expected = match trained.iter().find(|(trained, _)| trained == name) {
                Some((_, trained)) => trained.shallow_clone(),
                None => head.index_select(0, &Tensor::from_slice(map.target_ids())),
            };
            assert!(tensor.equal(&expected), "{projection}: {name}");
        }
        let refused = workspace.path(&format!("{projection}-original"));
        let output = output_of(&mut export(&workspace, projection, "medusa", &refused));
        let message = stderr_of(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains("name 60 of 454 tokens") && message.contains("--format medusa-vllm"), "{message}");
        assert!(!refused.exists());
    }
}

/// What is done to the tensors or the config.json of a sound export, and what the refusal says.
type Damage = (fn(&mut Vec<(String, Tensor)>), Option<(&'static str, i64)>, &'static str);

fn token_map(tensors: &mut [(String, Tensor)]) -> &mut Tensor {
    &mut tensors.iter_mut().find(|(name, _)| name == "token_map").unwrap().1
}

#[test]
fn a_damaged_token_map_is_refused() {
    let mut workspace = Workspace::new();
    workspace.set("draft.draft_vocab_size", DRAFT_SIZE);
    workspace.train("run", &[]);
    let sound = workspace.path("sound");
    json_of(&mut export(&workspace, "run", "medusa-vllm", &sound));
    let damages: [Damage; 8] = [
        (|tensors| tensors.retain(|(name, _)| name != "token_map"), None, "expected a tensor `token_map`"),
        (|tensors| *token_map(tensors) = token_map(tensors).to_kind(Kind::Int), None, "`token_map`: expected int64"),
        (|tensors| *token_map(tensors) = token_map(tensors).flip([0]), None, "`token_map`: expected ascending"),
        (
            |tensors| *token_map(tensors) = token_map(tensors).narrow(0, 0, 59),
            None,
            "expected 60 ids, a row of the heads",
        ),
        (
            |tensors| *token_map(tensors) += 400,
            None,
            "`token_map`: expected ascending, distinct token ids from 0 to 453",
        ),
        (|_| (), Some(("truncated_vocab_size", 59)), "`truncated_vocab_size`: the tensors say 60, got 59"),
        (|_| (), Some(("vocab_size", 500)), "the target has 454, the heads have 500"),
        (|_| (), Some(("truncated_vocab_size", 454)), "`truncated_vocab_size`: the tensors say 60, got 454"),
    ];
    for (number, (damage, change, expected)) in damages.into_iter().enumerate() {
        let folder = workspace.path(&format!("damaged{number}"));
        fs::create_dir(&folder).unwrap();
        contents(&sound).into_iter().for_each(|(path, bytes)| fs::write(folder.join(path), bytes).unwrap());
        let mut tensors = tensors_of(&folder.join("model.safetensors"));
        damage(&mut tensors);
        weights::write_tensors(&folder.join("model.safetensors"), &tensors, &[]).unwrap();
        let mut config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        if let Some((key, value)) = change {
            config[key] = json!(value);
            fs::write(folder.join("config.json"), config.to_string()).unwrap();
        }
        let output = output_of(specforge(&["export", "--check"]).arg(&folder));
        let message = stderr_of(&output);
        assert_eq!(output.status.code(), Some(2), "{expected}: {message}");
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

/// Two heads with a map on a small target in float64, away from their start.
fn heads(projection: &str, map: Option<&VocabMap>) -> (Medusa, LlamaTarget) {
    let target = small_drafts::target(Kind::Double);
    let config =
        MedusaConfig::read(&json!({"num_heads": 3, "projection": projection, "loss_weights": [1.0, 0.5, 2.0]}));
    let chunk_bytes = 5 * 4 * DRAFT_SIZE as usize;
    let context = DraftContext { vocabulary: map, chunk_bytes, ..small_drafts::context(&target) };
    let draft = Medusa::new(config.unwrap(), &context).unwrap();
    small_drafts::disturb(&draft);
    (draft, target)
}

fn batch(length: usize) -> PackedBatch {
    let mut next = noise::keyed_stream(5, 0);
    PackedBatch {
        ids: (0..length).map(|_| (next() % TOKENIZER_SIZE as u64) as i64).collect(),
        positions: (0..length as i64).collect(),
        supervised: (0..length).map(|place| place > 3 && place % 17 != 0).collect(),
        lengths: vec![length as i64],
        documents: vec![DocumentRef::new("d", 0)],
    }
}

/// Loss, gradients and hits equal a plain computation: logits of all `V` tokens with those outside the map at minus
/// infinity, cross-entropy of the rows whose label is inside, divided by the number of all trained rows.
#[test]
fn gradients_equal_a_full_vocabulary_cut_to_the_map() {
    let map = VocabMap::new((0..TOKENIZER_SIZE).filter(|id| id % 3 != 1).collect(), TOKENIZER_SIZE).unwrap();
    let batch = batch(90);
    for projection in ["own", "shared"] {
        let (draft, target) = heads(projection, Some(&map));
        let source_head = target.head().weight.shallow_clone();
        let source = OnlineFeatures::new(target);
        let features: FeatureBatch = source.features(Arc::new(batch.clone()), &draft.capture()).unwrap();
        let plan = draft.plan(&batch, STEP).unwrap();
        let counts = &plan.counts;
        let zeros = |value: &Tensor| value.zeros_like().detach().set_requires_grad(false);
        let mut gradients: Vec<Tensor> = draft.parameters().iter().map(|parameter| zeros(&parameter.value)).collect();
        let tally: Tally = draft.accumulate(&features, &plan, counts, &mut Gradients::new(&mut gradients)).unwrap();

        let ids = Tensor::from_slice(map.target_ids());
        let outside = Tensor::from_slice(&map.t2d()).logical_not(); // [V]
        let mut objective = Tensor::zeros([], (Kind::Double, Device::Cpu));
        let mut chain = vec![true; batch.ids.len()];
        let (mut dropped, mut sums) = (0, Vec::new());
        for (head, weight) in [1.0, 0.5, 2.0].into_iter().enumerate() {
            let trained = trained_rows(&batch, head, MaskAlignment::Exact);
            assert_eq!(counts[head], trained.rows.len() as f64);
            let rows = features.hidden[0].index_select(0, &Tensor::from_slice(&trained.rows));
            let output = draft.backbone(head, &rows);
            let own = draft.parameters().iter().find(|parameter| parameter.name == format!("{head}.1.weight"));
            // Rows of the map's tokens where they are in the whole vocabulary; the others stay out of it.
            let weight_rows = own.map_or_else(|| source_head.index_select(0, &ids), |own| own.value.shallow_clone());
            let full = source_head.index_copy(0, &ids, &weight_rows); // [V, H]
            let logits = output.matmul(&full.transpose(0, 1)).masked_fill(&outside, f64::NEG_INFINITY); // [R, V]
            let log_probabilities = logits.log_softmax(-1, Kind::Double);
            let (mut loss, mut hits, mut chained) = (Tensor::zeros([], (Kind::Double, Device::Cpu)), 0.0, 0.0);
            let mut next = vec![false; batch.ids.len()];
            for (place, (&row, &label)) in trained.rows.iter().zip(&trained.labels).enumerate() {
                if map.draft_id(label).is_none() {
                    dropped += 1;
                    continue;
                }
                loss -= log_probabilities.get(place as i64).get(label);
                let hit = logits.get(place as i64).argmax(-1, false).int64_value(&[]) == label;
                hits += f64::from(u8::from(hit));
                next[row as usize] = hit && chain[row as usize];
                chained += f64::from(u8::from(next[row as usize]));
            }
            chain = next;
            sums.extend([(4 * head, loss.double_value(&[])), (4 * head + 1, hits), (4 * head + 3, chained)]);
            objective += loss * (weight / trained.rows.len() as f64);
        }
        assert!(dropped > 20, "{dropped}");
        let values: Vec<&Tensor> = draft.parameters().iter().map(|parameter| &parameter.value).collect();
        let expected = Tensor::f_run_backward(&[&objective], &values, false, false).unwrap();
        assert!((tally.objective.double_value(&[]) - objective.double_value(&[])).abs() < 1e-6);
        for (place, sum) in sums {
            assert!((tally.sums.double_value(&[place as i64]) - sum).abs() < 1e-9, "{projection}, {place}");
        }
        // An average is over all trained rows.
        assert_eq!(tally.counts, counts.iter().flat_map(|&count| [count; 4]).collect::<Vec<f64>>());
        for ((got, want), parameter) in gradients.iter().zip(&expected).zip(draft.parameters()) {
            assert!(want.abs().max().double_value(&[]) > 1e-6, "{projection}, {}", parameter.name);
            assert!(largest_difference(got, want) < 1e-10, "{projection}, {}", parameter.name);
        }
    }
}

/// A map of every token changes nothing, to the bit.
#[test]
fn a_map_of_all_tokens_changes_nothing() {
    let map = VocabMap::new((0..TOKENIZER_SIZE).collect(), TOKENIZER_SIZE).unwrap();
    let batch = batch(60);
    let outcome = |map: Option<&VocabMap>| {
        let (draft, target) = heads("own", map);
        let source = OnlineFeatures::new(target);
        let features = source.features(Arc::new(batch.clone()), &draft.capture()).unwrap();
        let zeros = |value: &Tensor| value.zeros_like().detach().set_requires_grad(false);
        let mut gradients: Vec<Tensor> = draft.parameters().iter().map(|parameter| zeros(&parameter.value)).collect();
        let plan = draft.plan(&batch, STEP).unwrap();
        let tally = draft.accumulate(&features, &plan, &plan.counts, &mut Gradients::new(&mut gradients)).unwrap();
        gradients.push(tally.sums);
        gradients
    };
    for (with, without) in outcome(Some(&map)).iter().zip(&outcome(None)) {
        assert!(with.equal(without));
    }
}

/// The token cache is shared with training: whatever `vocab` counted is what a run of the same configuration counts.
#[test]
fn text_for_people_marks_the_chosen_size() {
    let workspace = Workspace::new();
    let mut command = specforge(&["vocab", "--config"]);
    command.arg(workspace.config()).args(["--draft-vocab-size", "60", "--out"]).arg(workspace.path("map"));
    let output = output_of(&mut command);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("      60  ") && text.contains("<- chosen"), "{text}");
    assert!(text.contains("60 tokens, ") && text.contains("never seen"), "{text}");
}
