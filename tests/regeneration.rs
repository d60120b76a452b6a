//! From prompts to training: what `regen` writes is what `inspect` and `train` take.

use std::fs;

use serde_json::{Value, json};

use crate::fixture::{Workspace, json_of, output_of, specforge, stderr_of};

/// A target that says many special tokens and no end of turn of its own before it is cut off, or the other way round.
struct Bench {
    workspace: Workspace,
}

impl Bench {
    fn new() -> Self {
        Self::on(Workspace::new())
    }

    fn on(workspace: Workspace) -> Self {
        let prompts: String = (0..6)
            .map(|row| {
                let turns = ["One.", "And then?", "Why?"];
                format!("{}\n", json!({"id": format!("p{row}"), "turns": &turns[..1 + row % 3]}))
            })
            .collect();
        fs::write(workspace.path("prompts.jsonl"), prompts).unwrap();
        Self { workspace }
    }

    /// Runs `regen` into a file of this name and returns its report and rows.
    fn regen(&self, out: &str, arguments: &[&str]) -> (Value, Vec<Value>) {
        let workspace = &self.workspace;
        let mut command = specforge(&["regen", "--json", "--max-new-tokens", "12", "--target"]);
        command.arg(workspace.path("model")).arg("--prompts").arg(workspace.path("prompts.jsonl"));
        let report = json_of(command.arg("--out").arg(workspace.path(out)).args(arguments));
        let text = fs::read_to_string(workspace.path(out)).unwrap();
        (report, text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    }

    fn inspect(&self, data: &str) -> Value {
        let mut command = specforge(&["inspect", "--json", "--show", "100", "--target"]);
        json_of(command.arg(self.workspace.path("model")).arg("--data").arg(self.workspace.path(data)))
    }
}

fn answers(rows: &[Value]) -> Vec<&Value> {
    let messages = rows.iter().flat_map(|row| row["messages"].as_array().unwrap());
    messages.filter(|message| message["role"] == "assistant").collect()
}

/// Drafts of every kind guess, and the files are the same to the byte.
#[test]
fn a_draft_changes_no_answer() {
    let bench = Bench::on(crate::decoding::workspace());
    let drafts =
        [("medusa-files", "mc_sim_7b_63"), ("eagle3", "chain:3"), ("small", "dynamic:depth=2,top_k=4,nodes=8")];
    let lookup = ("prompt-lookup", "depth=4,nodes=6,match=2");
    for (turn, sampling) in [&[][..], &["--temperature", "0.9", "--top-p", "0.95", "--seed", "3"]].iter().enumerate() {
        let (plain, _) = bench.regen(&format!("plain{turn}.jsonl"), sampling);
        let want = fs::read_to_string(bench.workspace.path(&format!("plain{turn}.jsonl"))).unwrap();
        assert_eq!((&plain["drafter"], &plain["acceptance_length"]), (&json!("none"), &json!(1.0)));
        for (draft, tree) in drafts.into_iter().chain([lookup]) {
            let out = format!("{draft}{turn}.jsonl");
            let folder = bench.workspace.path(draft);
            let draft = if folder.is_dir() { folder.to_str().unwrap() } else { draft };
            let more = ["--draft", draft, "--tree", tree, "--max-rows", "3"];
            let (report, _) = bench.regen(&out, &[sampling, &more[..]].concat());
            assert_eq!(fs::read_to_string(bench.workspace.path(&out)).unwrap(), want, "{draft}, {sampling:?}");
            assert!(report["drafter"] != "none" && report["acceptance_length"].as_f64().unwrap() >= 1.0, "{report}");
            assert_eq!(report["new_tokens"], plain["new_tokens"]);
        }
    }
    // A draft changes nothing that a run which goes on must repeat.
    let (again, _) = bench.regen("plain0.jsonl", &["--draft", "prompt-lookup"]);
    assert_eq!((&again["answered"], &again["answered_before"]), (&json!(0), &json!(6)));
    let mut alone = specforge(&["regen", "--tree", "chain:3", "--target"]);
    alone.arg(bench.workspace.path("model")).arg("--prompts").arg(bench.workspace.path("prompts.jsonl"));
    let refused = stderr_of(&output_of(alone.arg("--out").arg(bench.workspace.path("refused.jsonl"))));
    assert!(refused.contains("there is no --draft to guess with"), "{refused}");
    assert!(!bench.workspace.path("refused.jsonl").exists());
}

#[test]
fn what_the_target_said_is_trained_token_for_token() {
    let bench = Bench::new();
    let (report, rows) = bench.regen("answers.jsonl", &["--temperature", "1.5"]);
    let answers = answers(&rows);
    assert_eq!((report["answers"].as_u64().unwrap() as usize, rows.len()), (answers.len(), 6));
    let ids = |answer: &Value| answer["token_ids"].as_array().unwrap().len();
    assert!(answers.iter().all(|answer| ids(answer) > 0 && answer["prompt_hash"].is_string()));
    let cut = answers.iter().filter(|answer| answer["finish"] == "length").count();
    assert!(cut > 0 && answers.iter().filter(|answer| answer["finish"] == "length").all(|answer| ids(answer) == 12));

    let inspected = bench.inspect("answers.jsonl");
    let said: usize = answers.iter().map(|answer| ids(answer)).sum();
    assert_eq!(inspected["statistics"]["supervised"], json!(said), "every token of every answer, and no other");
    assert_eq!(inspected["build"]["from_token_ids"], 6);
    assert_eq!(inspected["build"]["cut_answers"], json!(cut));
    assert_eq!(inspected["build"]["rejected_count"], 0);

    // An edited answer is not what the target said.
    let edited: String = rows
        .iter()
        .map(|row| {
            let mut row = row.clone();
            let last = row["messages"].as_array().unwrap().len() - 1;
            row["messages"][last]["content"] = "Better.".into();
            format!("{row}\n")
        })
        .collect();
    fs::write(bench.workspace.path("edited.jsonl"), edited).unwrap();
    let mut command = specforge(&["inspect", "--target"]);
    let output =
        output_of(command.arg(bench.workspace.path("model")).arg("--data").arg(bench.workspace.path("edited.jsonl")));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr_of(&output).contains("`content` is not what `token_ids` spell"), "{}", stderr_of(&output));
}

#[test]
fn a_template_that_opens_thoughts_and_forgets_them_can_be_trained() {
    let bench = Bench::new();
    let template = "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user {{ m.content }}{% else %}\
                    <|im_start|>assistant {{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}\
                    {% if add_generation_prompt %}<|im_start|>assistant <think>{{ '\\n' }}{% endif %}";
    fs::write(bench.workspace.path("model/chat_template.jinja"), template).unwrap();
    let (_, rows) = bench.regen("answers.jsonl", &["--temperature", "1"]);
    let inspected = bench.inspect("answers.jsonl");
    let said: usize = answers(&rows).iter().map(|answer| answer["token_ids"].as_array().unwrap().len()).sum();
    assert_eq!(inspected["statistics"]["supervised"], json!(said));
    // Two rows of one turn, two of two, two of three: each turn is a document.
    assert_eq!(inspected["build"]["documents"], 12);
    let shown = inspected["shown"][0]["text"].as_str().unwrap();
    assert!(shown.contains("assistant <think>\n⟦"), "{shown}");
    // Another template is another prompt.
    fs::write(bench.workspace.path("model/chat_template.jinja"), template.replace("<think>", "<thought>")).unwrap();
    let mut command = specforge(&["inspect", "--target"]);
    let output =
        output_of(command.arg(bench.workspace.path("model")).arg("--data").arg(bench.workspace.path("answers.jsonl")));
    assert!(stderr_of(&output).contains("the prompt is not the one"), "{}", stderr_of(&output));
}

#[test]
fn a_target_is_sampled_as_its_generation_config_says_unless_told_otherwise() {
    let bench = Bench::new();
    let (greedy, first) = bench.regen("greedy.jsonl", &[]);
    assert_eq!(greedy["processors"]["temperature"], 0.0);
    let config = json!({"do_sample": true, "temperature": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2});
    let path = bench.workspace.path("model/generation_config.json");
    let mut whole: Value = fs::read_to_string(&path).map_or(json!({}), |text| serde_json::from_str(&text).unwrap());
    whole.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
    fs::write(&path, whole.to_string()).unwrap();
    let (sampled, other) = bench.regen("sampled.jsonl", &["--top-p", "0.8"]);
    let want = json!({"temperature": 0.9, "top_k": 7, "top_p": 0.8, "repetition_penalty": 1.2});
    assert_eq!(sampled["processors"], want);
    assert_ne!(first, other);
    let record: Value =
        serde_json::from_str(&fs::read_to_string(bench.workspace.path("sampled.jsonl.run.json")).unwrap()).unwrap();
    for key in ["temperature", "top_k", "top_p", "repetition_penalty"] {
        assert_eq!(record["same"][key], want[key], "{key}");
    }
    let (told, same) = bench.regen("told.jsonl", &["--temperature", "0", "--repetition-penalty", "1"]);
    assert_eq!((&told["processors"]["temperature"], same), (&json!(0.0), first));

    let mut command = specforge(&["regen", "--max-new-tokens", "2", "--seed", "5", "--target"]);
    command.arg(bench.workspace.path("model")).arg("--prompts").arg(bench.workspace.path("prompts.jsonl"));
    let text = stderr_of(&output_of(command.arg("--out").arg(bench.workspace.path("text.jsonl"))));
    assert!(text.contains("`min_p` = 0.1 is not supported"), "{text}");
    let words = "tokens are sampled: temperature 0.9, top-k 7, seed 5, repetition penalty 1.2";
    assert!(text.contains(words), "{text}");
}

/// The demo trains on what its target said: every answer has its tokens, and an end of turn only where there was one.
#[test]
fn the_demos_own_data_is_as_the_target_said_it() {
    for (file, rows, answers) in [("conversations", 420, 504), ("own-conversations", 1600, 1600)] {
        as_the_target_said_it(file, rows, answers);
    }
}

fn as_the_target_said_it(file: &str, row_count: usize, answer_count: usize) {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/data");
    let text = fs::read_to_string(folder.join(format!("{file}.jsonl"))).unwrap();
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let answers = answers(&rows);
    assert_eq!((rows.len(), answers.len()), (row_count, answer_count), "{file}");
    for answer in &answers {
        let ids: Vec<u64> = answer["token_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
        // 2 is SmolLM2's end of turn.
        match answer["finish"].as_str().unwrap() {
            "stop" => assert_eq!(ids.iter().position(|&id| id == 2), Some(ids.len() - 1), "{answer}"),
            _ => assert!(ids.len() == 128 && !ids.contains(&2), "{answer}"),
        }
        assert_eq!(answer["vocabulary_hash"], answers[0]["vocabulary_hash"]);
        assert!(answer["prompt_hash"].is_string());
    }
}

/// A model writes prompts, and `regen` answers them.
#[test]
fn a_target_writes_its_own_prompts() {
    let workspace = Workspace::new();
    // Random weights end a turn once in a while where many tokens end it.
    let ends: Vec<u32> = (60..90).collect();
    fs::write(workspace.path("model/generation_config.json"), json!({"eos_token_id": ends}).to_string()).unwrap();
    let write_up_to = |most: &str, out: &str, arguments: &[&str]| {
        let mut command = specforge(&["prompts", "--json", "--max-new-tokens", most, "--target"]);
        command.arg(workspace.path("model")).arg("--out").arg(workspace.path(out)).args(arguments);
        command
    };
    let write = |out: &str, arguments: &[&str]| write_up_to("24", out, arguments);
    let report = json_of(&mut write("few.jsonl", &["--count", "3", "--system", "Be brief."]));
    assert_eq!(report["prompts"], 3);
    let few = fs::read_to_string(workspace.path("few.jsonl")).unwrap();
    let rows: Vec<Value> = few.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for row in &rows {
        let [system, user] = &row["messages"].as_array().unwrap()[..] else { panic!("{row}") };
        assert_eq!((&system["content"], &user["role"]), (&json!("Be brief."), &json!("user")));
        assert!(
            !user["content"].as_str().unwrap().trim().is_empty() && row["id"].as_str().unwrap().starts_with("own-0-")
        );
    }
    json_of(&mut write("more.jsonl", &["--count", "5", "--system", "Be brief.", "--max-rows", "2"]));
    assert!(
        fs::read_to_string(workspace.path("more.jsonl")).unwrap().starts_with(&few),
        "a longer list begins with a shorter one"
    );

    let mut command = specforge(&["regen", "--json", "--max-new-tokens", "4", "--target"]);
    command.arg(workspace.path("model")).arg("--prompts").arg(workspace.path("few.jsonl"));
    assert_eq!(json_of(command.arg("--out").arg(workspace.path("answers.jsonl")))["answers"], 3);

    let refused = stderr_of(&output_of(&mut write("few.jsonl", &["--count", "1"])));
    assert!(
        refused.contains("few.jsonl: is there already") && refused.contains("hint: choose another --out"),
        "{refused}"
    );
    assert_eq!(fs::read_to_string(workspace.path("few.jsonl")).unwrap(), few);
    // Hardly a prompt is so short: what is there is written, and the exit code says that it is not all.
    let short = output_of(&mut write_up_to("2", "short.jsonl", &["--count", "30"]));
    let rows = fs::read_to_string(workspace.path("short.jsonl"))
        .unwrap_or_else(|_| panic!("{}", stderr_of(&short)))
        .lines()
        .count();
    assert!(short.status.code() != Some(0) && (1..30).contains(&rows), "{rows} {}", stderr_of(&short));
    assert!(
        stderr_of(&short).contains(&format!("expected 30 prompts, got {rows} in 240 tries")),
        "{}",
        stderr_of(&short)
    );
    let greedy = stderr_of(&output_of(&mut write("greedy.jsonl", &["--count", "1", "--temperature", "0"])));
    assert!(
        greedy.contains("--temperature: expected a number above 0") && !workspace.path("greedy.jsonl").exists(),
        "{greedy}"
    );
}
