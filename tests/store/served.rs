//! States from serving engines: whatever servers do, every document arrives once and is what the target computes, or the
//! capture says which one did not and why.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use specforge::data::{DocumentRef, PackedBatch};
use specforge::features::served::{Asking, ServerAddress};
use specforge::features::{FeatureSource, Recognition, ServedFeatures};
use specforge::weights;
use tch::{Kind, Tensor};

use super::elsewhere::{Known, LAYERS, assert_same_runs, assert_same_shards, known, taught};
use super::{capture, capture_command, offline, refused};
use crate::fixture::{Workspace, json_of};
use crate::http_server::{Reply, Server};

const FLOAT32: [&str; 4] = ["--dtype", "float32", "--shard-tokens", "500"];

/// What an engine that works answers with.
struct Engine {
    /// States of each document, `[T, L, H]` or `[T, nH]`.
    states: Mutex<HashMap<Vec<i64>, Tensor>>,
    /// Where vLLM writes.
    folder: PathBuf,
    /// How often each document was answered well.
    answered: Mutex<HashMap<Vec<i64>, usize>>,
    written: Mutex<usize>,
}

impl Engine {
    fn new(workspace: &Workspace, documents: &[Known], states: fn(&Known) -> Tensor) -> Arc<Self> {
        let folder = workspace.path("states");
        fs::create_dir_all(&folder).unwrap();
        let states = documents.iter().map(|known| (known.ids.clone(), states(known))).collect();
        let states = Mutex::new(states);
        Arc::new(Self { states, folder, answered: Mutex::default(), written: Mutex::default() })
    }

    fn find(&self, ids: &[i64]) -> Option<Tensor> {
        self.states.lock().unwrap().get(ids).map(Tensor::shallow_clone)
    }

    fn states_of(&self, ids: &[i64]) -> Tensor {
        self.find(ids).unwrap()
    }

    fn well_answered(&self, ids: &[i64]) {
        *self.answered.lock().unwrap().entry(ids.to_vec()).or_default() += 1;
    }

    /// Writes a file as vLLM does, and answers with its path.
    fn vllm(&self, ids: &[i64], states: &Tensor) -> Value {
        let number = {
            let mut written = self.written.lock().unwrap();
            *written += 1;
            *written
        };
        let path = self.folder.join(format!("cmpl-{number}.safetensors"));
        let tensors =
            [("hidden_states".to_owned(), states.contiguous()), ("token_ids".to_owned(), Tensor::from_slice(ids))];
        weights::write_tensors(&path, &tensors, &[]).unwrap();
        fs::write(lock_of(&path), "").unwrap();
        json!({
            "choices": [{"text": " a", "prompt_token_ids": ids}],
            "kv_transfer_params": {"hidden_states_path": path},
        })
    }

    fn left(&self) -> Vec<PathBuf> {
        fs::read_dir(&self.folder).unwrap().map(|entry| entry.unwrap().path()).collect()
    }
}

fn lock_of(path: &Path) -> PathBuf {
    PathBuf::from(format!("{}.lock", path.display()))
}

/// SGLang's answer: a list for each token.
fn sglang(states: &Tensor) -> Value {
    let rows: Vec<Vec<f32>> = (0..states.size()[0]).map(|row| Vec::try_from(states.get(row)).unwrap()).collect();
    json!({"text": " a", "meta_info": {"prompt_tokens": rows.len(), "hidden_states": [rows]}})
}

fn models() -> Value {
    json!({"object": "list", "data": [{"id": "the-target", "max_model_len": 4096}]})
}

fn ids_of(question: &Value, key: &str) -> Vec<i64> {
    question[key].as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
}

/// A server that works.
fn sound_vllm(engine: &Arc<Engine>) -> Server {
    let engine = Arc::clone(engine);
    Server::start(move |path, question| match path {
        "/v1/models" => Reply::json(&models()),
        _ => {
            let ids = ids_of(question, "prompt");
            engine.well_answered(&ids);
            Reply::json(&engine.vllm(&ids, &engine.states_of(&ids)))
        }
    })
}

/// Servers are asked again soon.
fn impatient() -> Asking {
    Asking {
        in_flight: 4,
        attempts: 6,
        timeout: Duration::from_secs(20),
        first_pause: Duration::from_millis(1),
        longest_pause: Duration::from_millis(5),
        states_folder: None,
    }
}

fn open(workspace: &Workspace, servers: &[&str], asking: &Asking) -> Result<ServedFeatures, String> {
    let servers: Vec<ServerAddress> = servers.iter().map(|server| server.parse().unwrap()).collect();
    let recognition = Recognition::open(&workspace.path("model"), Kind::Float, &LAYERS).unwrap();
    ServedFeatures::open(&servers, asking, |_| Some("a key".to_owned()), recognition).map_err(|error| error.to_string())
}

/// Asks for all documents at once, and holds what comes to what the target computes.
fn ask_for_all(source: &ServedFeatures, documents: &[Known]) -> Result<(), String> {
    let batch = |(number, known): (usize, &Known)| PackedBatch {
        ids: known.ids.clone(),
        positions: (0..known.ids.len() as i64).collect(),
        supervised: known.marks.clone(),
        lengths: vec![known.ids.len() as i64],
        documents: vec![DocumentRef::new(format!("c{number}"), number as u64)],
    };
    let begun: Vec<_> =
        documents.iter().enumerate().map(|document| source.begin(Arc::new(batch(document)), &LAYERS)).collect();
    for (pending, known) in begun.into_iter().zip(documents) {
        let features = pending.wait().map_err(|error| error.to_string())?;
        assert_eq!(features.batch.ids, known.ids);
        assert_eq!(features.hidden.len(), LAYERS.len());
        for (got, want) in features.hidden.iter().zip(&known.states) {
            assert!(got.equal(want), "states of another document or layer");
        }
    }
    Ok(())
}

/// Each document is refused once, in one of nine ways, and then answered.
#[test]
fn a_server_that_misbehaves_costs_time_and_nothing_else() {
    let workspace = taught();
    let documents = known(&workspace);
    let engine = Engine::new(&workspace, &documents, Known::stacked);
    let numbers: HashMap<Vec<i64>, usize> =
        documents.iter().enumerate().map(|(number, known)| (known.ids.clone(), number)).collect();
    let asked: Arc<Mutex<HashMap<Vec<i64>, usize>>> = Arc::default();
    let server = {
        let (engine, asked) = (Arc::clone(&engine), Arc::clone(&asked));
        Server::start(move |path, question| {
            if path == "/v1/models" {
                return Reply::json(&models());
            }
            let ids = ids_of(question, "prompt");
            assert_eq!((&question["model"], &question["max_tokens"]), (&json!("the-target"), &json!(1)));
            let time = {
                let mut asked = asked.lock().unwrap();
                let times = asked.entry(ids.clone()).or_default();
                *times += 1;
                *times
            };
            let states = &engine.states_of(&ids);
            let (rows, width) = (states.size()[0], states.size()[2]);
            let misbehaviour = if time == 1 { numbers[&ids] % 10 } else { 9 };
            match misbehaviour {
                0 => Reply::Hangup,
                1 => Reply::status(429, &[("Retry-After", "0")], r#"{"error": {"message": "too many"}}"#),
                2 => Reply::status(503, &[], "overloaded"),
                3 => {
                    let mut answer = engine.vllm(&ids[1..], &states.narrow(0, 1, rows - 1));
                    answer["choices"][0]["prompt_token_ids"] = json!(ids);
                    Reply::json(&answer)
                }
                4 => Reply::json(&engine.vllm(&ids, &states.narrow(0, 1, rows - 1))),
                5 => Reply::json(&engine.vllm(&ids, &states.narrow(2, 0, width - 1))),
                6 => Reply::Cut(engine.vllm(&ids, states).to_string()),
                7 => Reply::status(200, &[], "this is no JSON"),
                // It is still writing when it answers.
                8 => {
                    engine.well_answered(&ids);
                    let answer = engine.vllm(&ids, states);
                    let path = PathBuf::from(answer["kv_transfer_params"]["hidden_states_path"].as_str().unwrap());
                    let held = fs::File::open(lock_of(&path)).unwrap();
                    held.lock().unwrap();
                    let whole = fs::read(&path).unwrap();
                    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
                    std::thread::spawn(move || {
                        std::thread::sleep(Duration::from_millis(20));
                        fs::write(&path, whole).unwrap();
                        drop(held);
                    });
                    Reply::json(&answer)
                }
                _ => {
                    engine.well_answered(&ids);
                    Reply::json(&engine.vllm(&ids, states))
                }
            }
        })
    };
    let source = open(&workspace, &[&server.address("vllm")], &impatient()).unwrap();
    ask_for_all(&source, &documents).unwrap();
    // Nothing lost, nothing twice.
    let answered = engine.answered.lock().unwrap();
    assert_eq!(answered.len(), documents.len());
    assert!(answered.values().all(|&times| times == 1), "{:?}", answered.values());
    for (number, known) in documents.iter().enumerate() {
        let times = if number % 10 < 8 { 2 } else { 1 };
        assert_eq!(asked.lock().unwrap()[&known.ids], times, "document {number}");
    }
    assert!(server.most_at_once() <= 4, "{} requests at once", server.most_at_once());
    assert!(server.requests().iter().all(|(_, authorization)| authorization.as_deref() == Some("Bearer a key")));
    // What was taken is gone; what was wrong stays to be looked at.
    let wrong = documents.iter().enumerate().filter(|(number, _)| (3..=6).contains(&(number % 10))).count();
    assert_eq!(engine.left().len(), 2 * wrong);
}

#[test]
fn the_servers_that_work_do_the_work_of_those_that_do_not() {
    let workspace = taught();
    let documents = known(&workspace);
    let engine = Engine::new(&workspace, &documents, Known::stacked);
    let sound = sound_vllm(&engine);
    let dying = Server::start(|path, _| match path {
        "/v1/models" => Reply::json(&models()),
        _ => Reply::Hangup,
    });
    let servers = [dying.address("vllm"), sound.address("vllm")];
    let servers: Vec<&str> = servers.iter().map(String::as_str).collect();
    // Were the one that works not preferred, some document would be out of attempts.
    let asking = Asking { attempts: 4, ..impatient() };
    let source = open(&workspace, &servers, &asking).unwrap();
    assert_eq!(source.ahead(), 8);
    ask_for_all(&source, &documents).unwrap();
    assert!(engine.answered.lock().unwrap().values().all(|&times| times == 1));
}

#[test]
fn what_cannot_be_had_is_named_with_its_reason() {
    let workspace = taught();
    let documents = known(&workspace);
    let engine = Engine::new(&workspace, &documents, Known::stacked);
    let ask = |reply: fn() -> Reply, asking: &Asking| {
        let server = Server::start(move |path, _| if path == "/v1/models" { Reply::json(&models()) } else { reply() });
        let source = open(&workspace, &[&server.address("vllm")], asking).unwrap();
        (ask_for_all(&source, &documents[..1]).unwrap_err(), server.requests().len() - 1)
    };
    let (problem, times) = ask(|| Reply::status(503, &[], "loading \u{1b}[2J"), &impatient());
    assert!(problem.contains("document `c0` (") && problem.contains("asked 6 times without an answer"), "{problem}");
    assert!(
        problem.contains("HTTP 503: loading \\u{1b}[2J") && problem.starts_with("vllm:http://127.0.0.1:"),
        "{problem}"
    );
    assert_eq!(times, 6);
    // What will not become better is not asked again.
    let too_long =
        || Reply::status(400, &[], r#"{"error": {"message": "longer than the maximum model length of 16"}}"#);
    let (problem, times) = ask(too_long, &impatient());
    assert!(problem.contains("HTTP 400: longer than the maximum model length of 16"), "{problem}");
    assert_eq!(times, 1);
    let (problem, times) = ask(|| Reply::json(&json!({"choices": [{"text": "a"}]})), &impatient());
    assert!(problem.contains("names no hidden_states_path") && problem.contains("--kv-transfer-config"), "{problem}");
    assert_eq!(times, 1);
    let elsewhere =
        || Reply::json(&json!({"kv_transfer_params": {"hidden_states_path": "/no/such/folder/a.safetensors"}}));
    let (problem, _) = ask(elsewhere, &impatient());
    assert!(problem.contains("/no/such/folder/a.safetensors: there is no such folder here"), "{problem}");
    // An answer that does not come. The question what is served has an answer, however busy the machine is.
    let slow = Asking { timeout: Duration::from_millis(200), attempts: 2, ..impatient() };
    let server = Server::start(|path, _| if path == "/v1/models" { Reply::json(&models()) } else { Reply::Never });
    let source = (0..100).find_map(|_| open(&workspace, &[&server.address("vllm")], &slow).ok()).unwrap();
    let problem = ask_for_all(&source, &documents[..1]).unwrap_err();
    assert!(problem.contains("asked 2 times") && problem.contains("timeout"), "{problem}");
    // Nobody there, and somebody who is something else.
    let gone = Server::start(|_, _| Reply::Hangup).address("vllm");
    let problem = open(&workspace, &[&gone], &impatient()).err().unwrap();
    assert!(problem.starts_with(&gone) && problem.contains("does not say what it serves (asked 6 times)"), "{problem}");
    let other = Server::start(|_, _| Reply::status(404, &[], "<html>"));
    let problem = open(&workspace, &[&other.address("vllm")], &impatient()).err().unwrap();
    assert!(problem.contains("(asked 1 times): /v1/models: HTTP 404: <html>"), "{problem}");
    // Where this machine sees the folder under another path.
    let moved = Arc::clone(&engine);
    let server = Server::start(move |path, question| match path {
        "/v1/models" => Reply::json(&models()),
        _ => {
            let ids = ids_of(question, "prompt");
            let mut answer = moved.vllm(&ids, &moved.states_of(&ids));
            let name = PathBuf::from(answer["kv_transfer_params"]["hidden_states_path"].as_str().unwrap());
            let there = Path::new("/in/a/container").join(name.file_name().unwrap());
            answer["kv_transfer_params"]["hidden_states_path"] = json!(there);
            Reply::json(&answer)
        }
    });
    let asking = Asking { states_folder: Some(engine.folder.clone()), ..impatient() };
    ask_for_all(&open(&workspace, &[&server.address("vllm")], &asking).unwrap(), &documents).unwrap();
}

#[test]
fn sglang_servers_give_the_final_state_and_the_others_apart() {
    let workspace = taught();
    let documents = known(&workspace);
    let serve = |states: fn(&Known) -> Tensor| {
        let engine = Engine::new(&workspace, &documents, states);
        let asked: Mutex<HashMap<Vec<i64>, usize>> = Mutex::default();
        Server::start(move |path, question| {
            if path == "/v1/models" {
                return Reply::json(&models());
            }
            assert_eq!((path, &question["return_hidden_states"]), ("/generate", &json!(true)));
            let ids = ids_of(question, "input_ids");
            let Some(states) = engine.find(&ids) else {
                // It is asked what it gives.
                let any = engine.states.lock().unwrap().values().next().unwrap().narrow(0, 0, 2);
                return Reply::json(&sglang(&any));
            };
            let mut asked = asked.lock().unwrap();
            let times = asked.entry(ids.clone()).or_default();
            *times += 1;
            // Every third document comes without a cached prefix first.
            let cached = i64::from(ids.len().is_multiple_of(3) && *times == 1);
            Reply::json(&sglang(&states.narrow(0, cached, ids.len() as i64 - cached)))
        })
    };
    let final_states = serve(|known| known.states[2].shallow_clone());
    let other_states = serve(Known::others);
    let (last, others) = (final_states.address("sglang"), other_states.address("sglang"));
    let source = open(&workspace, &[&last, &others], &impatient()).unwrap();
    ask_for_all(&source, &documents).unwrap();
    let problem = open(&workspace, &[&others], &impatient()).err().unwrap();
    assert!(problem.contains("--enable-return-hidden-states alone") && problem.contains("--from"), "{problem}");
    let problem = open(&workspace, &[&last], &impatient()).err().unwrap();
    assert!(problem.contains("--enable-return-aux-hidden-states"), "{problem}");
    let odd = serve(|known| Tensor::cat(&[known.others(), known.others()], 1));
    let problem = open(&workspace, &[&last, &odd.address("sglang")], &impatient()).err().unwrap();
    assert!(problem.contains("gives 128 numbers a token; expected 32 (the final state) or 64"), "{problem}");
    let plain = Server::start(|path, _| match path {
        "/v1/models" => Reply::json(&models()),
        _ => Reply::json(&json!({"text": "", "meta_info": {"prompt_tokens": 2}})),
    });
    let problem = open(&workspace, &[&plain.address("sglang")], &impatient()).err().unwrap();
    assert!(problem.contains("has no meta_info.hidden_states"), "{problem}");
}

/// Through the program: the store is the own capture's, a stopped capture goes on where it was, and a run cannot tell.
#[test]
fn a_served_store_is_the_own_one_and_is_continued() {
    let workspace = taught();
    let documents = known(&workspace);
    capture(&workspace, "own", &FLOAT32);
    let engine = Engine::new(&workspace, &documents, Known::stacked);
    // One document in the last third cannot be had today.
    let refused_ids = documents[documents.len() * 4 / 5].ids.clone();
    let today = {
        let engine = Arc::clone(&engine);
        Server::start(move |path, question| {
            if path == "/v1/models" {
                return Reply::json(&models());
            }
            let ids = ids_of(question, "prompt");
            if ids == refused_ids {
                return Reply::status(400, &[], "{\"detail\": \"not today\"}");
            }
            engine.well_answered(&ids);
            Reply::json(&engine.vllm(&ids, &engine.states_of(&ids)))
        })
    };
    let command = |server: &Server| {
        let address = server.address("vllm");
        capture_command(&workspace, "served", &[&FLOAT32[..], &["--in-flight", "3", "--from", &address]].concat())
    };
    let message = refused(&mut command(&today), 1, &["HTTP 400: not today", "document `c"]);
    assert!(!message.contains("asked"), "{message}");
    let manifest = |store: &str| -> Value {
        serde_json::from_slice(&fs::read(workspace.path(store).join("store.json")).unwrap()).unwrap()
    };
    let whole: Vec<Value> = manifest("served")["shards"].as_array().unwrap().clone();
    assert!(!whole.is_empty(), "nothing was kept");
    let kept: u64 = whole.iter().map(|shard| shard["documents"].as_u64().unwrap()).sum();

    let tomorrow = sound_vllm(&engine);
    let report = json_of(&mut command(&tomorrow));
    assert_eq!((&report["complete"], &report["documents"]), (&json!(true), &json!(documents.len())));
    assert_same_shards(&workspace, "served", "own");
    assert_eq!(manifest("served")["origin"], "vllm");
    // What was there was not asked for again.
    let asked = tomorrow.requests().iter().filter(|(path, _)| path == "/v1/completions").count() as u64;
    assert_eq!(asked, documents.len() as u64 - kept);
    drop(tomorrow);
    // A store that lacks nothing needs no server.
    assert_eq!(json_of(&mut command(&today))["tokens_captured"], 0);
    let run = |run: &str, store: &str| json_of(&mut offline(&workspace, run, store));
    let (own, served) = (run("run-own", "own"), run("run-served", "served"));
    assert_same_runs(&served, &own);
}
