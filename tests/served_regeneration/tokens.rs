//! Token ids that servers give: training takes them as they are, and a server that means other ones is found.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use specforge::data::{ChatTokenizer, Message};
use specforge::decode::regenerate::served::{self, ServedReport};

use super::{Bench, choice, expected, prompts, server};
use crate::fixture::{Workspace, json_of, specforge};
use crate::http_server::{Reply, Server};

fn tokenizer(workspace: &Workspace) -> ChatTokenizer {
    ChatTokenizer::load(&workspace.path("model"), None).unwrap()
}

/// A server that renders and tokenises as the target's folder says, letter by letter: no tokenizer splits a text so.
fn spelling(folder: &Path) -> Server {
    let tokenizer = Arc::new(Mutex::new(ChatTokenizer::load(folder, None).unwrap()));
    server(move |question, _| {
        let tokenizer = tokenizer.lock().unwrap();
        let list = question["messages"].as_array().unwrap();
        let said =
            |message: &Value| Message::new(message["role"].as_str().unwrap(), message["content"].as_str().unwrap());
        let messages: Vec<Message> = list.iter().map(said).collect();
        let prompt = tokenizer.encode(&tokenizer.render(&messages, None, true).unwrap()).unwrap();
        let text = expected(list);
        let letters = text.chars().map(|letter| tokenizer.encode(&letter.to_string()).unwrap()[0]);
        let ids: Vec<u32> = letters.chain([tokenizer.eos_token_ids()[0]]).collect();
        let mut answer = choice(json!({"content": text}), json!({"token_ids": ids}));
        answer["prompt_token_ids"] = json!(prompt);
        answer["usage"] = json!({"prompt_tokens": prompt.len(), "completion_tokens": ids.len()});
        Reply::json(&answer)
    })
}

fn run(bench: &Bench, tokenizer: &ChatTokenizer) -> ServedReport {
    let stop = AtomicBool::new(false);
    served::run(&bench.options, Some(tokenizer), &|_| None, &stop, &mut |_| {}).unwrap()
}

#[test]
fn what_a_server_said_is_trained_token_for_token() {
    let workspace = Workspace::new();
    let mut bench = Bench::new(&prompts(6));
    let server = spelling(&workspace.path("model"));
    let report = run(bench.ask(&[&server]), &tokenizer(&workspace));
    assert_eq!((report.answered, report.failed, report.with_token_ids), (6, 0, 12));
    assert!(report.warnings.is_empty(), "{:?}", report.warnings);
    bench.assert_all_answered(6);
    let mut inspect = specforge(&["inspect", "--json", "--show", "100", "--target"]);
    let inspected = json_of(inspect.arg(workspace.path("model")).arg("--data").arg(bench.path("out.jsonl")));
    assert_eq!(inspected["build"]["from_token_ids"], 6);
    assert_eq!(inspected["build"]["rejected_count"], 0);
    assert_eq!(
        inspected["statistics"]["supervised"],
        json!(report.new_tokens),
        "every token of every answer, and no other"
    );
}

#[test]
fn a_server_with_another_template_is_found_at_the_first_rows() {
    let (workspace, other) = (Workspace::new(), Workspace::new());
    std::fs::write(
        other.path("model/chat_template.jinja"),
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}<|im_start|>assistant: ",
    )
    .unwrap();
    let mut bench = Bench::new(&prompts(40));
    bench.options.in_flight = 1;
    let server = spelling(&other.path("model"));
    let report = run(bench.ask(&[&server]), &tokenizer(&workspace));
    let problem = report.ended_by.clone().unwrap();
    assert!(problem.contains("of the first 3 rows") && problem.contains("the prompt is not the one"), "{problem}");
    assert!(problem.contains("does the server go by another chat template"), "{problem}");
    assert!(report.answered == 0 && report.failed == 3 && report.interrupted, "{report:?}");
}

/// A row that cannot be trained among others that can is listed; one whose ids spell another text, too.
#[test]
fn a_row_that_is_no_data_to_train_on_is_listed() {
    let workspace = Workspace::new();
    let mut bench = Bench::new(&prompts(6));
    let folder = workspace.path("model");
    let tokenizer = tokenizer(&workspace);
    let wrong = tokenizer.encode("something else").unwrap();
    let end = tokenizer.eos_token_ids()[0];
    let sound = Arc::new(spelling(&folder));
    let plain = Arc::clone(&sound);
    // Stands before the other one and changes a row's tokens.
    let server = server(move |question, _| {
        let url = format!("{}/v1/chat/completions", plain.url());
        let mut reply = ureq::post(&url).content_type("application/json").send(question.to_string()).unwrap();
        let mut answer: Value = serde_json::from_str(&reply.body_mut().read_to_string().unwrap()).unwrap();
        if question["messages"].to_string().contains("of 4") {
            answer["choices"][0]["token_ids"] = json!([&wrong[..], &[end]].concat());
        }
        Reply::json(&answer)
    });
    let report = run(bench.ask(&[&server]), &tokenizer);
    assert_eq!((report.answered, report.failed), (5, 1));
    let listed = bench.lines("out.jsonl.errors.jsonl");
    assert_eq!(listed[0]["id"], "r4");
    let error = listed[0]["error"].as_str().unwrap();
    assert!(
        error.contains("no data to train on") && error.contains("`content` is not what `token_ids` spell"),
        "{error}"
    );
}

/// With --target the program counts prompts with its tokenizer, samples as its file says, and refuses another folder later.
#[test]
fn the_target_folder_says_how_to_sample_and_holds_what_comes() {
    let workspace = Workspace::new();
    std::fs::write(
        workspace.path("model/generation_config.json"),
        json!({"do_sample": true, "temperature": 0.6, "top_p": 0.9}).to_string(),
    )
    .unwrap();
    let bench = Bench::new(&prompts(4));
    let server = spelling(&workspace.path("model"));
    let address = server.address("vllm");
    let target = workspace.path("model");
    let target = target.to_str().unwrap();
    let arguments = ["--from", &address, "--target", target, "--top-p", "0.8"];
    let estimate = json_of(&mut bench.program(&[&arguments[..], &["--dry-run"]].concat()));
    assert_eq!(estimate["counted"], true);
    let report = json_of(&mut bench.program(&arguments));
    let want = json!({"temperature": 0.6, "top_k": 0, "top_p": 0.8, "repetition_penalty": 1.0});
    assert_eq!((&report["sampling"], &report["answered"]), (&want, &json!(4)));
    let record: Value =
        serde_json::from_str(&std::fs::read_to_string(bench.path("out.jsonl.run.json")).unwrap()).unwrap();
    assert_eq!((&record["same"]["temperature"], &record["servers"]), (&json!(0.6), &json!([address])));
    assert_eq!(bench.lines("out.jsonl")[0]["messages"][1]["vocabulary_hash"].as_str().unwrap().len(), 16);
}
