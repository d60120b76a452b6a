//! Files that other trainers wrote become the store that this program would have captured, or are refused.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use specforge::weights;
use tch::{Device, Kind, Tensor};

use super::elsewhere::{Known, assert_same_runs, assert_same_shards, known, taught};
use super::{capture, capture_command, offline, refused};
use crate::fixture::{Workspace, json_of, litter, write_torch_file};

const FLOAT32: [&str; 4] = ["--dtype", "float32", "--shard-tokens", "500"];

fn import(workspace: &Workspace, out: &str, files: &Path, arguments: &[&str]) -> Command {
    let files = files.to_str().unwrap();
    capture_command(workspace, out, &[&FLOAT32[..], &["--import", files], arguments].concat())
}

fn marks(known: &Known) -> Tensor {
    Tensor::from_slice(&known.marks.iter().map(|&mark| i64::from(mark)).collect::<Vec<i64>>())
}

/// What SpecForge keeps of a document for EAGLE-3.
fn specforge_tensors(known: &Known) -> Vec<(String, Tensor)> {
    [
        ("input_ids", Tensor::from_slice(&known.ids)),
        ("loss_mask", marks(known)),
        ("hidden_state", known.states[2].unsqueeze(0)),
        ("aux_hidden_state", known.others().unsqueeze(0)),
    ]
    .map(|(name, tensor)| (name.to_owned(), tensor.contiguous()))
    .into()
}

/// The same with padding behind, as it writes documents of a batch.
fn padded(tensors: Vec<(String, Tensor)>, rows: i64) -> Vec<(String, Tensor)> {
    let pad = |(name, tensor): (String, Tensor)| {
        let mut shape = tensor.size();
        let axis = if shape.len() == 1 { 0 } else { 1 };
        shape[axis] = rows;
        let behind = match name.as_str() {
            "input_ids" | "loss_mask" => Tensor::zeros(&shape, (Kind::Int64, Device::Cpu)),
            _ => Tensor::randn(&shape, (tensor.kind(), Device::Cpu)),
        };
        (name, Tensor::cat(&[tensor, behind], axis as i64))
    };
    tensors.into_iter().map(pad).collect()
}

/// Every third document with at least so much padding.
fn write_specforge(folder: &Path, documents: &[Known], padding: i64) {
    for (number, document) in documents.iter().enumerate() {
        let path = folder.join(format!("rows_{}-{}/data_{number}.ckpt", number / 20 * 20, number / 20 * 20 + 20));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let tensors = specforge_tensors(document);
        let tensors = if number % 3 == 1 { padded(tensors, padding + (number % 4) as i64) } else { tensors };
        write_torch_file(&path, &tensors);
        if number % 5 == 2 {
            let name = format!("{}.gz", path.display());
            let mut out = flate2::write::GzEncoder::new(fs::File::create(name).unwrap(), flate2::Compression::fast());
            out.write_all(&fs::read(&path).unwrap()).unwrap();
            out.finish().unwrap();
            fs::remove_file(&path).unwrap();
        }
    }
    fs::write(folder.join("vocab_mapping.pt"), "no states").unwrap();
}

fn write_states(path: &Path, ids: &[i64], states: &Tensor) {
    let tensors =
        [("hidden_states".to_owned(), states.contiguous()), ("token_ids".to_owned(), Tensor::from_slice(ids))];
    weights::write_tensors(path, &tensors, &[]).unwrap();
}

#[test]
fn files_of_every_layout_become_the_store_of_an_own_capture() {
    let workspace = taught();
    let documents = known(&workspace);
    capture(&workspace, "own", &FLOAT32);

    let specforge = workspace.path("specforge-files");
    write_specforge(&specforge, &documents, 1);
    let report = json_of(&mut import(&workspace, "from-specforge", &specforge, &[]));
    assert_eq!((&report["complete"], &report["documents"]), (&json!(true), &json!(documents.len())));
    assert!(report["rows_judged"].as_u64().unwrap() >= 32, "{report}");
    assert_same_shards(&workspace, "from-specforge", "own");
    let again = json_of(&mut import(&workspace, "from-specforge", &specforge, &[]));
    assert_eq!(again["tokens_captured"], 0);

    let speculators = workspace.path("speculators-files");
    fs::create_dir(&speculators).unwrap();
    for (number, document) in documents.iter().enumerate() {
        write_states(&speculators.join(format!("hs_{number}.safetensors")), &document.ids, &document.stacked());
    }
    json_of(&mut import(&workspace, "from-speculators", &speculators, &[]));
    assert_same_shards(&workspace, "from-speculators", "own");

    // A run that cuts its documents shorter reads the same files.
    let cut = ["--set", "data.max_length=40"];
    let report = json_of(&mut import(&workspace, "cut", &specforge, &cut));
    assert!(report["complete"] == true && report["tokens"].as_u64() < again["tokens"].as_u64(), "{report}");

    // A run cannot tell.
    let run = |run: &str, store: &str| json_of(&mut offline(&workspace, run, store));
    let (own, theirs) = (run("run-own", "own"), run("run-theirs", "from-specforge"));
    assert_same_runs(&theirs, &own);

    // The store says who computed it, and is not continued by anybody else.
    let manifest: Value =
        serde_json::from_slice(&fs::read(workspace.path("from-specforge/store.json")).unwrap()).unwrap();
    assert_eq!(manifest["origin"], "files");
    let words = ["holds another store", "states computed by: asked for this program, the store has files"];
    refused(&mut capture_command(&workspace, "from-specforge", &FLOAT32), 2, &words);
}

#[test]
fn documents_of_files_are_data_that_a_run_learns_from() {
    let mut workspace = taught();
    let documents = known(&workspace);
    let files = workspace.path("files");
    // One token more may be the document's own.
    write_specforge(&files, &documents, 2);
    // Other conversations than the files': the run's data are the files' own documents.
    let other = workspace.path("other.jsonl");
    fs::write(&other, crate::fixture::conversations(3).replace("river", "seven bird")).unwrap();
    workspace.set("data.train", json!([other]));
    let message = refused(&mut import(&workspace, "store", &files, &[]), 2, &["lacks", "of the", "no file has"]);
    assert!(message.contains("--documents FILE.jsonl"), "{message}");
    assert!(!workspace.path("store").exists());

    let path = workspace.path("documents.jsonl");
    let named = ["--documents", path.to_str().unwrap()];
    json_of(&mut import(&workspace, "store", &files, &named));
    let text = fs::read_to_string(&path).unwrap();
    let mut lines: Vec<(Value, Value)> = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .map(|line| (line["input_ids"].clone(), line["loss_mask"].clone()))
        .collect();
    let marks = |known: &Known| known.marks.iter().map(|&mark| u8::from(mark)).collect::<Vec<_>>();
    let mut want: Vec<(Value, Value)> = documents.iter().map(|known| (json!(known.ids), json!(marks(known)))).collect();
    for list in [&mut lines, &mut want] {
        list.sort_by_key(|(ids, _)| ids.to_string());
    }
    assert_eq!(lines, want);
    // Once more they are the same; another file's place is not taken.
    json_of(&mut import(&workspace, "store", &files, &named));
    let words = ["other.jsonl: is there and holds something else"];
    refused(&mut import(&workspace, "store", &files, &["--documents", other.to_str().unwrap()]), 2, &words);
    workspace.set("data.train", json!([path]));
    let report = json_of(&mut offline(&workspace, "run", "store"));
    assert!(report["end"]["loss"].as_f64().unwrap() < report["start"]["loss"].as_f64().unwrap());
}

#[test]
fn states_that_are_not_the_targets_are_refused() {
    let workspace = taught();
    let documents = known(&workspace);
    type Change = fn(&Known) -> Tensor;
    let cases: [(&str, Change, &[&str]); 5] = [
        (
            "shifted by a row",
            |known| Tensor::stack(&[&known.states[0], &known.states[1], &known.before_norm.roll([1], [0])], 1),
            &["the target's head does not know these states"],
        ),
        (
            "another layer's",
            |known| Tensor::stack(&[&known.states[0], &known.states[1], &known.states[0].roll([7], [1])], 1),
            &["the target's head does not know these states", "another layer's"],
        ),
        (
            "an embedding that is none",
            |known| Tensor::stack(&[&known.states[1], &known.states[1], &known.before_norm], 1) * 1.5,
            &["hidden state 0 is not the embedding of its tokens"],
        ),
        (
            "half of it normed",
            |known| {
                let rows = Tensor::arange(known.ids.len() as i64, (Kind::Int64, Device::Cpu)).remainder(2).eq(0);
                let last = known.states[2].where_self(&rows.unsqueeze(1), &known.before_norm);
                Tensor::stack(&[&known.states[0], &known.states[1], &last], 1)
            },
            &["rows of its final state look as if they came out of the target's last norm, the others not"],
        ),
        (
            "not finite",
            |known| {
                let stacked = known.stacked();
                drop(stacked.get(1).get(1).get(3).fill_(f64::NAN));
                stacked
            },
            &["hidden state 1 is not finite"],
        ),
    ];
    for (number, (name, change, words)) in cases.iter().enumerate() {
        let folder = workspace.path(&format!("files-{number}"));
        fs::create_dir(&folder).unwrap();
        for (number, document) in documents.iter().enumerate() {
            let path = folder.join(format!("hs_{number}.safetensors"));
            write_states(&path, &document.ids, &change(document));
        }
        let store = format!("store-{number}");
        let message = refused(&mut import(&workspace, &store, &folder, &[]), 1, words);
        assert!(message.contains("hs_") && message.contains("document `"), "{name}: {message}");
        assert_eq!(litter(&workspace.path(&store)), Vec::<PathBuf>::new());
    }
}

#[test]
fn files_that_are_something_else_are_refused_by_name() {
    let workspace = taught();
    let documents = known(&workspace);
    let folder = workspace.path("files");
    let attempt = |words: &[&str]| {
        let message = refused(&mut import(&workspace, "store", &folder, &[]), 2, words);
        assert!(!workspace.path("store").exists(), "{message}");
    };
    fs::create_dir(&folder).unwrap();
    attempt(&["holds no files of hidden states", "SpecForge's *.ckpt"]);
    let one = folder.join("data_0.ckpt");
    let without = |name: &str| {
        let mut tensors = specforge_tensors(&documents[0]);
        tensors.retain(|(other, _)| other != name);
        write_torch_file(&one, &tensors);
    };
    without("input_ids");
    attempt(&["data_0.ckpt: holds no tensor `input_ids`"]);
    without("aux_hidden_state");
    attempt(&["data_0.ckpt: holds no final state beside the others"]);
    let with = |name: &str, value: Tensor| {
        let mut tensors = specforge_tensors(&documents[0]);
        tensors.iter_mut().find(|(other, _)| other == name).unwrap().1 = value;
        write_torch_file(&one, &tensors);
    };
    with("loss_mask", Tensor::zeros([2], (Kind::Int64, Device::Cpu)));
    attempt(&["`loss_mask`: expected a mark for each of", "got 2"]);
    with("aux_hidden_state", Tensor::zeros([1, 5, 33], (Kind::Float, Device::Cpu)));
    attempt(&["`aux_hidden_state`: expected a multiple of 32 numbers, got 33"]);
    with("input_ids", Tensor::zeros([3], (Kind::Half, Device::Cpu)));
    attempt(&["`input_ids`: expected whole numbers, got HalfStorage"]);
    with("aux_hidden_state", Tensor::zeros([1, 5, 32], (Kind::Float, Device::Cpu)));
    attempt(&["holds 2 hidden states of each token", "expected 3: [0, 1, 2]", "--layers"]);
    // A program that is none.
    let mut zip = zip::ZipWriter::new(fs::File::create(&one).unwrap());
    zip.start_file("data_0/data.pkl", zip::write::SimpleFileOptions::default()).unwrap();
    zip.write_all(b"\x80\x02cos\nsystem\nX\x04\0\0\0exit\x85R.").unwrap();
    zip.finish().unwrap();
    attempt(&["calls `os.system`", "nothing of it was run"]);
    write_torch_file(&one, &specforge_tensors(&documents[0]));
    let whole = fs::read(&one).unwrap();
    fs::write(&one, &whole[..whole.len() / 2]).unwrap();
    attempt(&["data_0.ckpt: is no whole torch file"]);
    fs::remove_file(&one).unwrap();
    fs::write(folder.join("data_0.ckpt.gz"), [&b"\x1f\x8b"[..], &whole].concat()).unwrap();
    attempt(&["data_0.ckpt.gz: is no whole gzip file"]);
    fs::remove_file(folder.join("data_0.ckpt.gz")).unwrap();
    write_states(&folder.join("hs_0.safetensors"), &documents[0].ids, &documents[0].stacked());
    write_states(&folder.join("hs_1.safetensors"), &documents[1].ids, &documents[1].stacked().narrow(1, 0, 2));
    attempt(&["hs_1.safetensors: holds 2 hidden states of each token", "hs_0.safetensors holds 3"]);
    fs::remove_file(folder.join("hs_1.safetensors")).unwrap();
    let path = workspace.path("documents.jsonl");
    let named = ["--documents", path.to_str().unwrap()];
    let words = ["hs_0.safetensors: does not say which tokens are trained"];
    refused(&mut import(&workspace, "store", &folder, &named), 2, &words);
}
