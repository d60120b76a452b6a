//! Answers of servers: whatever servers do, every row is there once with its own answers, or its failure says why.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use specforge::decode::regenerate::OnLength;
use specforge::decode::regenerate::served::{self, Sampling, ServedOptions, ServedReport};
use specforge::serving::Retries;

use crate::fixture::{json_of, output_of, specforge, stderr_of};
use crate::http_server::{Reply, Server};
use crate::processes::wait_for;

mod tokens;

/// A folder with prompts, and how servers are asked.
struct Bench {
    folder: tempfile::TempDir,
    options: ServedOptions,
}

/// Conversations of one, two and three questions.
fn prompts(rows: usize) -> String {
    let row = |row: usize| {
        let turns: Vec<String> = (0..1 + row % 3).map(|turn| format!("question {turn} of {row}")).collect();
        format!("{}\n", json!({"id": format!("r{row}"), "turns": turns, "topic": row}))
    };
    (0..rows).map(row).collect()
}

/// What a sound server says to the last of some messages.
fn expected(messages: &[Value]) -> String {
    let before = messages.iter().filter(|message| message["role"] == "assistant").count();
    format!("answer {before} to {}", messages[messages.len() - 1]["content"].as_str().unwrap())
}

fn models() -> Reply {
    Reply::json(&json!({"object": "list", "data": [{"id": "the-target"}]}))
}

/// An answer with these keys in its choice.
fn choice(message: Value, more: Value) -> Value {
    let mut choice = json!({"index": 0, "message": message, "finish_reason": "stop"});
    choice.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json!({"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 3}})
}

/// The sound answer to a question. Its history must be what a sound server said.
fn sound(question: &Value) -> Value {
    let messages = question["messages"].as_array().unwrap();
    for (place, message) in messages.iter().enumerate().filter(|(_, message)| message["role"] == "assistant") {
        assert_eq!(message["content"], expected(&messages[..place]), "a history that nobody said");
    }
    choice(json!({"role": "assistant", "content": expected(messages)}), json!({}))
}

/// A server that says what `reply` makes of a question and how often that was asked before.
fn server(reply: impl Fn(&Value, usize) -> Reply + Send + Sync + 'static) -> Server {
    let asked: Mutex<HashMap<String, usize>> = Mutex::default();
    Server::start(move |path, question| match path {
        "/v1/models" => models(),
        "/v1/chat/completions" => {
            let times = {
                let mut asked = asked.lock().unwrap();
                let times = asked.entry(question["messages"].to_string()).or_default();
                *times += 1;
                *times - 1
            };
            reply(question, times)
        }
        other => panic!("nobody asks for {other}"),
    })
}

impl Bench {
    fn new(prompts: &str) -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::write(folder.path().join("prompts.jsonl"), prompts).unwrap();
        let options = ServedOptions {
            servers: Vec::new(),
            model: None,
            key_variable: None,
            in_flight: 4,
            timeout: Duration::from_secs(120),
            retries: Retries {
                attempts: 8,
                first_pause: Duration::from_millis(1),
                longest_pause: Duration::from_millis(5),
            },
            prompts: folder.path().join("prompts.jsonl"),
            out: folder.path().join("out.jsonl"),
            max_new_tokens: 16,
            sampling: Sampling::default(),
            template_arguments: Map::new(),
            on_length: OnLength::Keep,
            seed: 7,
            max_bad_share: 0.0,
            restart: false,
        };
        Self { folder, options }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn ask(&mut self, servers: &[&Server]) -> &mut Self {
        let addresses = servers.iter().map(|server| server.address("vllm").parse().unwrap());
        self.options.servers = addresses.collect();
        self
    }

    fn run(&self) -> Result<ServedReport, String> {
        let key = |_: &str| Some("a key".to_owned());
        served::run(&self.options, None, &key, &AtomicBool::new(false), &mut |_| {}).map_err(|error| error.to_string())
    }

    fn lines(&self, name: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(name)).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Every row once, in the order of the prompts, with the sound answer to each turn.
    fn assert_all_answered(&self, rows: usize) {
        let lines = self.lines("out.jsonl");
        assert_eq!(lines.len(), rows);
        for (row, line) in lines.iter().enumerate() {
            assert_eq!((&line["id"], &line["topic"]), (&json!(format!("r{row}")), &json!(row)));
            let messages = line["messages"].as_array().unwrap();
            assert_eq!(messages.len(), 2 * (1 + row % 3), "{line}");
            for (place, message) in messages.iter().enumerate() {
                match place % 2 {
                    0 => assert_eq!(message["content"], format!("question {} of {row}", place / 2)),
                    _ => {
                        assert_eq!(message["content"], expected(&messages[..place]));
                        assert_eq!((&message["role"], &message["finish"]), (&json!("assistant"), &json!("stop")));
                    }
                }
            }
        }
        assert!(!self.path("out.jsonl.errors.jsonl").exists());
    }

    /// The program against these servers.
    fn program(&self, arguments: &[&str]) -> Command {
        let mut command = specforge(&["regen", "--json", "--out"]);
        command.arg(self.path("out.jsonl")).arg("--prompts").arg(self.path("prompts.jsonl")).args(arguments);
        for variable in ["VLLM_API_KEY", "SGLANG_API_KEY", "OPENAI_API_KEY"] {
            command.env_remove(variable);
        }
        command
    }
}

/// Each turn is refused once, in one of nine ways, and then answered.
#[test]
fn a_server_that_misbehaves_costs_time_and_nothing_else() {
    let rows = 45;
    let mut bench = Bench::new(&prompts(rows));
    let misbehaviour = Arc::new(AtomicUsize::new(0));
    let well: Arc<Mutex<HashMap<String, usize>>> = Arc::default();
    let (kinds, answered) = (Arc::clone(&misbehaviour), Arc::clone(&well));
    let server = server(move |question, times| {
        assert_eq!((&question["model"], &question["max_tokens"]), (&json!("the-target"), &json!(16)));
        assert!(question["seed"].is_u64() && question.get("temperature").is_none(), "{question}");
        let kind = if times == 0 { kinds.fetch_add(1, Ordering::SeqCst) % 10 } else { 9 };
        match kind {
            0 => Reply::Hangup,
            1 => Reply::status(429, &[("Retry-After", "0")], r#"{"error": {"message": "too many"}}"#),
            2 => Reply::status(500, &[], "oh"),
            3 => Reply::status(503, &[], "overloaded"),
            4 => Reply::Cut(sound(question).to_string()),
            5 => Reply::status(200, &[], "{\"choices\": [{"),
            6 => Reply::json(&json!({"choices": []})),
            7 => Reply::json(&choice(json!({"content": "half"}), json!({"finish_reason": null}))),
            8 => Reply::json(&choice(json!({"content": ["no", "text"]}), json!({}))),
            _ => {
                *answered.lock().unwrap().entry(question["messages"].to_string()).or_default() += 1;
                Reply::json(&sound(question))
            }
        }
    });
    let report = bench.ask(&[&server]).run().unwrap();
    bench.assert_all_answered(rows);
    let turns = (0..rows).map(|row| 1 + row % 3).sum::<usize>();
    assert_eq!((report.rows, report.answered, report.failed, report.answers), (rows, rows, 0, turns));
    assert_eq!((report.new_tokens, report.prompt_tokens), (3 * turns as u64, 5 * turns as u64));
    assert!(!report.interrupted && report.ended_by.is_none() && report.errors.is_none());
    assert!(report.warnings.iter().any(|line| line.contains("no server gave token ids")), "{:?}", report.warnings);
    // Nothing lost, nothing twice, and every kind was seen.
    assert_eq!(misbehaviour.load(Ordering::SeqCst), turns);
    let well = well.lock().unwrap();
    assert!(well.len() == turns && well.values().all(|&times| times == 1));
    assert!(server.most_at_once() <= 4, "{} questions at once", server.most_at_once());
    assert!(server.requests().iter().all(|(_, authorization)| authorization.as_deref() == Some("Bearer a key")));
    // All done: nothing is asked.
    let before = server.requests().len();
    let again = bench.run().unwrap();
    assert_eq!((again.answered_before, again.answered), (rows, 0));
    assert_eq!(server.requests().len(), before + 1);
}

#[test]
fn an_answer_that_never_comes_is_asked_for_again() {
    let mut bench = Bench::new(&prompts(3));
    let server = server(|question, times| match times {
        0 => Reply::Never,
        _ => Reply::json(&sound(question)),
    });
    // On a machine that is busy enough more answers come too late than this one.
    bench.options.timeout = Duration::from_millis(500);
    bench.options.retries.attempts = 100;
    bench.ask(&[&server]).run().unwrap();
    bench.assert_all_answered(3);
}

#[test]
fn a_server_is_left_alone_as_long_as_it_asks_for() {
    // A date counts from the server's own clock, which need not be this machine's.
    let dated = [("Date", "Sun, 06 Nov 1994 08:49:37 GMT"), ("Retry-After", "Sun, 06 Nov 1994 08:49:38 GMT")];
    for headers in [&[("Retry-After", "1")][..], &dated] {
        let mut bench = Bench::new(&prompts(8));
        let refused: Arc<Mutex<Option<Instant>>> = Arc::default();
        let early = Arc::new(AtomicUsize::new(0));
        let (when, asked_early) = (Arc::clone(&refused), Arc::clone(&early));
        bench.options.in_flight = 1;
        let headers = headers.to_vec();
        let server = server(move |question, _| {
            let mut when = when.lock().unwrap();
            match *when {
                None => {
                    *when = Some(Instant::now());
                    Reply::status(429, &headers, "")
                }
                Some(refused) => {
                    asked_early.fetch_add(usize::from(refused.elapsed() < Duration::from_secs(1)), Ordering::SeqCst);
                    Reply::json(&sound(question))
                }
            }
        });
        bench.ask(&[&server]).run().unwrap();
        bench.assert_all_answered(8);
        assert_eq!(early.load(Ordering::SeqCst), 0);
    }
}

/// Too much to do is no failure of a row, however often it is said.
#[test]
fn a_server_with_a_limit_costs_no_row() {
    let rows = 24;
    let mut bench = Bench::new(&prompts(rows));
    let count = AtomicUsize::new(0);
    let server = server(move |question, _| match count.fetch_add(1, Ordering::SeqCst) % 3 {
        0 => Reply::json(&sound(question)),
        _ => Reply::status(429, &[], "slow down"),
    });
    bench.options.retries.attempts = 4;
    let report = bench.ask(&[&server]).run().unwrap();
    assert_eq!(report.failed, 0);
    bench.assert_all_answered(rows);
}

#[test]
fn a_run_without_a_server_ends_and_the_next_one_goes_on() {
    let rows = 30;
    let mut bench = Bench::new(&prompts(rows));
    let count = Arc::new(AtomicUsize::new(0));
    let served = Arc::clone(&count);
    // Nine answers, and then nothing but trouble.
    let ailing = server(move |question, _| match served.fetch_add(1, Ordering::SeqCst) {
        0..9 => Reply::json(&sound(question)),
        _ => Reply::status(503, &[], "loading \u{1b}[2J"),
    });
    bench.options.retries.attempts = 3;
    let report = bench.ask(&[&ailing]).run().unwrap();
    let problem = report.ended_by.unwrap();
    assert!(
        problem.contains("no server answers: 3 rows one after the other") && problem.contains("HTTP 503"),
        "{problem}"
    );
    assert!(!problem.contains('\u{1b}'), "{problem}");
    let kept = bench.lines("out.jsonl").len();
    assert!(report.interrupted && kept == report.answered && kept < rows);
    // Two were given up before it was clear whose fault it is.
    let listed = bench.lines("out.jsonl.errors.jsonl");
    assert_eq!((listed.len(), report.failed), (2, 2));
    assert_eq!((&listed[0]["attempts"], &listed[0]["server"]), (&json!(3), &json!(ailing.address("vllm"))));

    let well = server(|question, _| Reply::json(&sound(question)));
    let report = bench.ask(&[&well]).run().unwrap();
    assert_eq!((report.answered_before, report.answered), (kept, rows - kept));
    bench.assert_all_answered(rows);
}

/// One of three is dead, one is slow: it answers nothing before the fast one has done half of all.
#[test]
fn servers_share_the_rows_by_what_each_can_do() {
    let rows = 40;
    let turns = (0..rows).map(|row| 1 + row % 3).sum::<usize>();
    let mut bench = Bench::new(&prompts(rows));
    // Questions that the slow one has, and answers of the fast one, which waits for the first of those.
    let gate: Arc<(Mutex<(usize, usize)>, Condvar)> = Arc::default();
    let wait = |gate: &(Mutex<(usize, usize)>, Condvar), step: (usize, usize), least: (usize, usize)| {
        let mut counts = gate.0.lock().unwrap();
        *counts = (counts.0 + step.0, counts.1 + step.1);
        gate.1.notify_all();
        drop(gate.1.wait_while(counts, |counts| counts.0 < least.0 || counts.1 < least.1).unwrap());
    };
    let (of_fast, of_slow) = (Arc::clone(&gate), Arc::clone(&gate));
    let fast = server(move |question, _| {
        wait(&of_fast, (0, 1), (1, 0));
        Reply::json(&sound(question))
    });
    let slow = server(move |question, _| {
        wait(&of_slow, (1, 0), (0, turns / 2));
        Reply::json(&sound(question))
    });
    let dead = Server::start(|_, _| Reply::Hangup);
    bench.options.in_flight = 2;
    let report = bench.ask(&[&dead, &slow, &fast]).run().unwrap();
    bench.assert_all_answered(rows);
    let answers: Vec<usize> = report.servers.iter().map(|server| server.answers).collect();
    assert_eq!((answers[0], answers.iter().sum::<usize>()), (0, turns));
    assert!(answers[1] > 0 && answers[2] >= turns / 2, "{answers:?}");
    let dead = dead.address("vllm");
    let told = |line: &String| line.starts_with(&dead) && line.contains("the others go on without it");
    assert!(report.warnings.iter().any(told), "{:?}", report.warnings);
}

/// Rows that a server refuses or answers with nothing are listed with their reason, and tried again by the next run.
#[test]
fn rows_without_answer_are_listed_with_reason_and_tried_again() {
    let mut bench = Bench::new(&prompts(6));
    let wrong = |row: &str| format!("question 0 of {row}");
    let today = server(move |question, _| {
        let messages = question["messages"].as_array().unwrap();
        let last = messages[messages.len() - 1]["content"].as_str().unwrap();
        let is = |row: &str| last == wrong(row);
        match () {
            () if is("0") => Reply::status(400, &[], r#"{"error": {"message": "longer than the model's context"}}"#),
            () if is("1") => Reply::json(&choice(json!({"content": "x"}), json!({"finish_reason": "content_filter"}))),
            () if is("2") => Reply::json(&choice(json!({"content": ""}), json!({}))),
            () if is("3") => Reply::json(&json!({"choices": []})),
            () if last == "question 1 of 4" => Reply::json(&choice(json!({"refusal": "never"}), json!({}))),
            () => Reply::json(&sound(question)),
        }
    });
    let report = bench.ask(&[&today]).run().unwrap();
    assert_eq!((report.answered, report.failed, report.interrupted), (1, 5, false));
    let mut listed = bench.lines("out.jsonl.errors.jsonl");
    listed.sort_by_key(|entry| entry["id"].to_string());
    for (entry, (id, turn, attempts, reason)) in listed.iter().zip([
        ("r0", 1, 1, "HTTP 400: longer than the model's context"),
        ("r1", 1, 1, "content_filter"),
        ("r2", 1, 1, "the answer is empty"),
        ("r3", 1, 8, "the answer has no choices"),
        ("r4", 2, 1, "refused to answer: never"),
    ]) {
        assert_eq!((&entry["id"], &entry["turn"], &entry["attempts"]), (&json!(id), &json!(turn), &json!(attempts)));
        assert!(entry["error"].as_str().unwrap().contains(reason), "{entry}");
        assert!(entry["server"].as_str().unwrap().starts_with("vllm:http://127.0.0.1:"), "{entry}");
    }
    let well = server(|question, _| Reply::json(&sound(question)));
    assert_eq!(bench.ask(&[&well]).run().unwrap().answered, 5);
    bench.assert_all_answered(6);
}

/// Thoughts, calls of tools and tokens are kept; thoughts and tools go to the server.
#[test]
fn whatever_an_answer_holds_is_kept_and_sent_back() {
    let tools = json!([{"type": "function", "function": {"name": "look", "parameters": {}}}]);
    let row = json!({"id": "a", "tools": tools, "chat_template_kwargs": {"enable_thinking": true}, "turns": ["one", "two", "three"]});
    let mut bench = Bench::new(&format!("{row}\n"));
    let sent = Arc::new(Mutex::new(Vec::new()));
    let questions = Arc::clone(&sent);
    let call =
        json!([{"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{\"at\":  \"it\"}"}}]);
    let calls = call.clone();
    let server = server(move |question, _| {
        questions.lock().unwrap().push(question.clone());
        match question["messages"].as_array().unwrap().len() {
            1 => {
                let mut answer = choice(json!({"content": "first", "reasoning": "hm"}), json!({"token_ids": [1, 2]}));
                answer["prompt_token_ids"] = json!([9]);
                Reply::json(&answer)
            }
            3 => Reply::json(&choice(
                json!({"content": null, "tool_calls": calls}),
                json!({"finish_reason": "tool_calls", "token_ids": [3], "prompt_token_ids": [9, 8]}),
            )),
            _ => panic!("nobody knows what the tool found"),
        }
    });
    bench.options.sampling = Sampling { temperature: Some(0.5), top_k: Some(9), ..Sampling::default() };
    let report = bench.ask(&[&server]).run().unwrap();
    assert_eq!((report.answered, report.called_tools, report.with_token_ids), (1, 1, 2));
    assert!(report.warnings.is_empty(), "{:?}", report.warnings);
    let line = bench.lines("out.jsonl").remove(0);
    let messages = line["messages"].as_array().unwrap();
    assert_eq!((messages.len(), &line["tools"]), (4, &tools));
    assert_eq!((&messages[1]["content"], &messages[1]["reasoning_content"]), (&json!("first"), &json!("hm")));
    assert_eq!((&messages[1]["token_ids"], &messages[3]["token_ids"]), (&json!([1, 2]), &json!([3])));
    assert!(messages[1]["prompt_hash"].is_string() && messages[1]["prompt_hash"] != messages[3]["prompt_hash"]);
    assert_eq!((&messages[3]["content"], &messages[3]["tool_calls"]), (&Value::Null, &call));
    assert_eq!(messages[3]["finish"], "stop");
    let sent = sent.lock().unwrap();
    assert_eq!((&sent[0]["tools"], &sent[0]["chat_template_kwargs"]["enable_thinking"]), (&tools, &json!(true)));
    assert_eq!((&sent[0]["temperature"], &sent[0]["top_k"]), (&json!(0.5), &json!(9)));
    assert_eq!(sent[0]["return_token_ids"], true);
    assert_ne!(sent[0]["seed"], sent[1]["seed"], "a seed a turn");
    assert_eq!(
        (&sent[1]["messages"][1]["content"], &sent[1]["messages"][1]["reasoning"]),
        (&json!("first"), &json!("hm"))
    );
    // A row that ended at its tool is known as answered.
    assert_eq!(bench.run().unwrap().answered_before, 1);
}

/// Where one answer came without ids, the conversation is trained as text.
#[test]
fn ids_are_kept_of_whole_conversations() {
    let mut bench = Bench::new(&prompts(2));
    let server = server(|question, _| {
        let mut answer = sound(question);
        if question["messages"].as_array().unwrap().len() == 1 {
            answer["choices"][0]["token_ids"] = json!([1, 2]);
            answer["prompt_token_ids"] = json!([1]);
        }
        Reply::json(&answer)
    });
    assert_eq!(bench.ask(&[&server]).run().unwrap().with_token_ids, 2);
    bench.assert_all_answered(2);
    let lines = bench.lines("out.jsonl");
    assert_eq!(lines[0]["messages"][1]["token_ids"], json!([1, 2]));
    assert!(
        lines[1].to_string().find("token_ids").or(lines[1].to_string().find("prompt_hash")).is_none(),
        "{}",
        lines[1]
    );
}

#[test]
fn a_cut_answer_is_kept_or_ends_its_conversation_or_drops_its_row() {
    let server = server(|question, _| {
        let mut answer = sound(question);
        let cut = question["messages"].to_string().contains("question 0 of 1")
            || question["messages"].to_string().contains("of 2");
        answer["choices"][0]["finish_reason"] = if cut { "length" } else { "stop" }.into();
        Reply::json(&answer)
    });
    let run = |on_length| {
        let mut bench = Bench::new(&prompts(3));
        bench.options.on_length = on_length;
        let report = bench.ask(&[&server]).run().unwrap();
        assert_eq!(bench.run().unwrap().answers, 0, "the next run knows them");
        (report.answered, report.dropped, bench)
    };
    let finishes = |line: &Value| -> Vec<String> {
        let answers = line["messages"].as_array().unwrap().iter().filter_map(|message| message["finish"].as_str());
        answers.map(str::to_owned).collect()
    };
    let (answered, _, bench) = run(OnLength::Keep);
    assert_eq!(answered, 3);
    assert_eq!(finishes(&bench.lines("out.jsonl")[2]), ["length", "length", "length"]);
    let (answered, _, bench) = run(OnLength::Stop);
    assert_eq!((answered, finishes(&bench.lines("out.jsonl")[2])), (3, vec!["length".to_owned()]));
    let (answered, dropped, bench) = run(OnLength::Drop);
    assert_eq!((answered, dropped, bench.lines("out.jsonl.cut.jsonl").len()), (1, 2, 2));
}

/// Killed at any moment, whatever was written stays, and is not asked for again.
#[test]
fn a_killed_run_goes_on_where_it_was() {
    let rows = 30;
    let bench = Bench::new(&prompts(rows));
    let count = Arc::new(AtomicUsize::new(0));
    let served = Arc::clone(&count);
    let stuck = server(move |question, _| match served.fetch_add(1, Ordering::SeqCst) {
        0..20 => Reply::json(&sound(question)),
        _ => Reply::Never,
    });
    let address = stuck.address("vllm");
    let command = |address: &str| bench.program(&["--from", address, "--concurrency", "4", "--retries", "3"]);
    let mut child = command(&address).spawn().unwrap();
    assert!(wait_for(&mut child, || bench.lines_so_far() >= 5));
    child.kill().unwrap();
    child.wait().unwrap();
    // A line that the kill tore.
    let mut text = fs::read_to_string(bench.path("out.jsonl")).unwrap();
    let kept: Vec<String> = text.lines().map(str::to_owned).collect();
    text.push_str(r#"{"id":"r2","mess"#);
    fs::write(bench.path("out.jsonl"), text).unwrap();
    // The order of the prompts is nobody's business.
    let reversed: Vec<String> = prompts(rows).lines().rev().map(|line| format!("{line}\n")).collect();
    fs::write(bench.path("prompts.jsonl"), reversed.concat()).unwrap();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let questions = Arc::clone(&asked);
    let well = server(move |question, _| {
        questions.lock().unwrap().push(question["messages"].to_string());
        Reply::json(&sound(question))
    });
    let report = json_of(&mut command(&well.address("vllm")));
    assert_eq!(report["answered_before"], kept.len());
    assert_eq!(report["answered"], rows - kept.len());
    let kept_rows: Vec<Value> = kept.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    for row in &kept_rows {
        let question = row["messages"][0]["content"].as_str().unwrap();
        assert!(!asked.lock().unwrap().iter().any(|asked| asked.contains(&format!("{question}\""))), "{question}");
    }
    fs::write(bench.path("prompts.jsonl"), prompts(rows)).unwrap();
    json_of(&mut command(&well.address("vllm")));
    bench.assert_all_answered(rows);
}

impl Bench {
    fn lines_so_far(&self) -> usize {
        fs::read_to_string(self.path("out.jsonl")).map_or(0, |text| text.matches('\n').count())
    }
}

/// What a run depends on stays as it was begun; who answers may change.
#[test]
fn other_settings_are_another_file() {
    let mut bench = Bench::new(&prompts(4));
    let well = server(|question, _| Reply::json(&sound(question)));
    bench.ask(&[&well]).run().unwrap();
    let other = server(|question, _| Reply::json(&sound(question)));
    assert_eq!(bench.ask(&[&other]).run().unwrap().answered_before, 4);
    let before = bench.options.clone();
    let warm = Sampling { temperature: Some(0.3), ..Sampling::default() };
    for (options, key) in [
        (ServedOptions { sampling: warm, ..before.clone() }, "temperature: null then, 0.3 now"),
        (ServedOptions { max_new_tokens: 3, ..before.clone() }, "max_new_tokens: 16 then, 3 now"),
        (ServedOptions { seed: 1, ..before.clone() }, "seed: 7 then, 1 now"),
        (ServedOptions { on_length: OnLength::Stop, ..before.clone() }, "on_length: \"keep\" then"),
    ] {
        bench.options = options;
        let problem = bench.run().unwrap_err();
        assert!(problem.contains("begun with other options") && problem.contains(key), "{problem}");
    }
    bench.options = before;
    let renamed = Server::start(|_, _| Reply::json(&json!({"data": [{"id": "another"}]})));
    let problem = bench.ask(&[&renamed]).run().unwrap_err();
    assert!(problem.contains("served_model: \"the-target\" then, \"another\" now"), "{problem}");
    // Before anything is asked, servers must serve one model, and one that is named.
    let problem = bench.ask(&[&well, &renamed]).run().unwrap_err();
    assert!(problem.contains("serves `another`, another serves `the-target`"), "{problem}");
    bench.options.model = Some("a-typo".to_owned());
    let problem = bench.ask(&[&well]).run().unwrap_err();
    assert!(problem.contains("--model") && problem.contains("serves `the-target` and not `a-typo`"), "{problem}");
    bench.options.model = None;
    let two = Server::start(|_, _| Reply::json(&json!({"data": [{"id": "a"}, {"id": "b"}]})));
    let problem = bench.ask(&[&two]).run().unwrap_err();
    assert!(problem.contains("serves `a`, `b`; say which of them answers"), "{problem}");
}

/// Errors of a whole run come at once, in plain words, and without a key.
#[test]
fn what_no_row_is_to_blame_for_ends_the_run_at_once() {
    let bench = Bench::new(&prompts(5));
    let refused = |arguments: &[&str], environment: &[(&str, &str)]| {
        let mut command = bench.program(arguments);
        command.envs(environment.iter().copied());
        let output = output_of(&mut command);
        assert!(!output.status.success());
        let all = format!("{}{}", String::from_utf8_lossy(&output.stdout), stderr_of(&output));
        assert!(environment.is_empty() || !all.contains("s3cret"), "{all}");
        all
    };
    let guarded = Server::start(|_, _| Reply::status(401, &[], r#"{"error": {"message": "no such key: s3cret"}}"#));
    let from = guarded.address("vllm");
    let problem = refused(&["--from", &from], &[]);
    assert!(
        problem.contains("HTTP 401") && problem.contains("the environment variable VLLM_API_KEY holds no key"),
        "{problem}"
    );
    let problem = refused(&["--from", &from], &[("VLLM_API_KEY", "s3cret")]);
    assert!(
        problem.contains("no such key: ***") && problem.contains("is the key in VLLM_API_KEY the server's?"),
        "{problem}"
    );
    let problem = refused(&["--from", &from, "--api-key-env", "MINE"], &[("MINE", "s3cret")]);
    assert!(problem.contains("is the key in MINE the server's?"), "{problem}");
    assert_eq!(guarded.requests().last().unwrap().1.as_deref(), Some("Bearer s3cret"));
    let problem = refused(&["--from", &from, "--api-key-env", "MINE"], &[]);
    assert!(problem.contains("the environment variable MINE holds no key"), "{problem}");
    let asked = guarded.requests().len();
    assert_eq!(asked, 3, "no second question");

    // It says what it serves, and knows no such model when it is asked.
    let amnesic = Server::start(|path, _| match path {
        "/v1/models" => Reply::status(404, &[], "no such path"),
        _ => Reply::status(404, &[], r#"{"error": {"message": "The model `m` does not exist."}}"#),
    });
    let problem = refused(&["--from", &amnesic.address("openai"), "--model", "m"], &[]);
    assert!(problem.contains("HTTP 404: The model `m` does not exist."), "{problem}");
    assert!(!bench.path("out.jsonl.errors.jsonl").exists(), "rows are not to blame");
    let problem = refused(&["--from", &amnesic.address("openai")], &[]);
    assert!(problem.contains("/v1/models: HTTP 404: no such path"), "{problem}");

    let gone = Server::start(|_, _| Reply::Hangup).address("vllm");
    let problem = refused(&["--from", &gone, "--retries", "1"], &[]);
    assert!(problem.contains(&gone) && problem.contains("(asked 2 times)"), "{problem}");
    for (arguments, words) in [
        (&["--from", "vllm:http://a,ftp://b"][..], "expected openai:URL, vllm:URL or sglang:URL"),
        (&["--from", "openai:http://127.0.0.1:1", "--top-k", "4"], "OpenAI's protocol has no `top_k`"),
        (
            &["--from", "vllm:http://127.0.0.1:1", "--temperature=-1"],
            "expected 0 (greedy) or a positive number, got -1",
        ),
        (&["--from", "vllm:http://127.0.0.1:1", "--draft", "prompt-lookup"], "cannot be used with"),
        (&["--model", "m"], "--from"),
        (&[], "--target"),
    ] {
        let problem = refused(arguments, &[]);
        assert!(problem.contains(words), "{arguments:?}: {problem}");
    }
}

#[test]
fn a_dry_run_counts_and_changes_nothing() {
    let bench = Bench::new(&format!("{}{{\"broken\"\n", prompts(9)));
    let server = server(|question, _| Reply::json(&sound(question)));
    let address = server.address("vllm");
    let dry = |more: &[&str]| {
        let arguments = ["--from", &address, "--dry-run", "--max-bad-share", "0.5", "--max-new-tokens", "10"];
        json_of(&mut bench.program(&[&arguments[..], more].concat()))
    };
    let estimate = dry(&[]);
    assert_eq!((&estimate["rows"], &estimate["done"], &estimate["unusable"]), (&json!(9), &json!(0), &json!(1)));
    assert_eq!((&estimate["turns"], &estimate["most_new_tokens"]), (&json!(18), &json!(180)));
    assert_eq!((&estimate["counted"], &estimate["measured"]), (&json!(false), &Value::Null));
    assert!(estimate["prompt_tokens"].as_u64().unwrap() > 0 && server.requests().is_empty());
    let left = || fs::read_dir(bench.path("")).unwrap().count();
    assert_eq!(left(), 1, "nothing beside the prompts");
    let measured = dry(&["--measure", "3"]);
    let measured = &measured["measured"];
    // Rows 0, 3 and 6 have a turn each.
    assert_eq!((&measured["rows"], &measured["answers"], &measured["new_tokens"]), (&json!(3), &json!(3), &json!(54)));
    assert!(measured["seconds"].as_f64().unwrap() > 0.0);
    assert_eq!(left(), 1);
    // What is done is not counted.
    let text = prompts(9);
    fs::write(bench.path("some.jsonl"), text.lines().take(3).collect::<Vec<_>>().join("\n")).unwrap();
    let mut some = specforge(&["regen", "--json", "--from", &address, "--out"]);
    json_of(some.arg(bench.path("out.jsonl")).arg("--prompts").arg(bench.path("some.jsonl")));
    let estimate = dry(&[]);
    assert_eq!((&estimate["done"], &estimate["turns"]), (&json!(3), &json!(12)));
}
