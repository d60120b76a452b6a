//! Tests of the room as a whole, on files: parity with transformers, and caches in every state.

use std::fs;
use std::sync::LazyLock;

use serde_json::{Value, json};

use super::super::conversation::{Conversation, parse_sample};
use super::super::stats::{Statistics, document_text};
use super::super::{Document, DocumentRef, Mask, Message, Supervise, assemble, pack, split};
use super::*;

/// Made by scripts/golden/chat_templates.py.
pub(in crate::data) static TINY: LazyLock<PathBuf> =
    LazyLock::new(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/templates"));

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}{% \
                      if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}";

/// The tiny tokenizer with another template.
pub(in crate::data) fn tiny_tokenizer(template: &str) -> ChatTokenizer {
    with_config(&TINY.join("tokenizer"), json!({"chat_template": template}), json!({}))
}

/// A model folder's tokenizer under another tokenizer_config.json and config.json.
fn with_config(folder: &Path, changes: Value, model: Value) -> ChatTokenizer {
    let copy = tempfile::tempdir().unwrap();
    fs::copy(folder.join("tokenizer.json"), copy.path().join("tokenizer.json")).unwrap();
    let text = fs::read_to_string(folder.join("tokenizer_config.json")).unwrap();
    let mut config: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
    config.extend(changes.as_object().unwrap().clone());
    fs::write(copy.path().join("tokenizer_config.json"), Value::Object(config).to_string()).unwrap();
    fs::write(copy.path().join("config.json"), model.to_string()).unwrap();
    ChatTokenizer::load(copy.path(), None).unwrap()
}

/// Renders, encodes and masks every case of a golden file as transformers did.
fn check_golden(path: &Path) -> usize {
    let golden: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let folder = path.parent().unwrap().join(golden["tokenizer"].as_str().unwrap());
    let changes = json!({"chat_template": golden["template"], "eos_token": golden["eos_token"]});
    let tokenizer = with_config(&folder, changes, json!({}));
    let cases = golden["cases"].as_array().unwrap();
    for (number, case) in cases.iter().enumerate() {
        let place = format!("{} case {number}", path.display());
        let record = json!({"messages": case["messages"], "tools": case["tools"]}).to_string();
        let Ok(Sample::Conversation(Conversation { messages, tools, id, .. })) =
            parse_sample(record.as_bytes(), || place.clone())
        else {
            panic!("{place}");
        };
        let render = |prompt| tokenizer.render(&messages, tools.as_ref(), prompt).unwrap();
        assert_eq!(render(false), case["text"].as_str().unwrap(), "{place}");
        assert_eq!(render(true), case["prompt"].as_str().unwrap(), "{place}");
        let conversation = Conversation {
            id,
            messages: messages.clone(),
            tools: tools.clone(),
            template_arguments: Default::default(),
        };
        let (documents, _) =
            render_supervised(&tokenizer, &conversation, Supervise::Assistant, &Mask::default()).unwrap();
        let want = case["documents"].as_array().unwrap();
        assert_eq!(documents.len(), want.len(), "{place}");
        for (document, want) in documents.iter().zip(want) {
            assert_eq!(document.text, want["text"].as_str().unwrap(), "{place}");
            let encoded = tokenizer.encode_with_offsets(&document.text).unwrap();
            assert_eq!(json!(encoded.ids), want["ids"], "{place}");
            assert_eq!(tokenizer.encode(&document.text).unwrap(), encoded.ids, "{place}");
            let mask = token_mask(&tokenizer, &document.text, &encoded, &document.spans);
            assert_eq!(json!(mask), want["mask"], "{place}");
        }
    }
    cases.len()
}

#[test]
fn parity_with_transformers() {
    let mut files = 0;
    for entry in fs::read_dir(&*TINY).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|end| end == "json") {
            assert!(check_golden(&path) > 0);
            files += 1;
        }
    }
    assert!(files >= 6, "{files}");
}

#[test]
fn a_real_model_folder() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.models/SmolLM2-135M-Instruct");
    if !folder.is_dir() {
        eprintln!("SKIPPED: {} is not there; scripts/setup fetches it", folder.display());
        return;
    }
    let tokenizer = ChatTokenizer::load(&folder, None).unwrap();
    assert_eq!(
        (tokenizer.vocab_size(), tokenizer.eos_token_ids(), tokenizer.eos_token()),
        (49152, &[2][..], Some("<|im_end|>"))
    );
    let messages = [Message::new("user", "Hello world, it's 12345 café 你好"), Message::new("assistant", "Hi!")];
    let text = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
                <|im_start|>user\nHello world, it's 12345 café 你好<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n";
    assert_eq!(tokenizer.render(&messages, None, false).unwrap(), text);
    let ids = tokenizer.encode(text).unwrap();
    assert_eq!(ids[..4], [1, 9690, 198, 2683]);
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    let conversation = Conversation {
        id: String::new(),
        messages: messages.to_vec(),
        tools: None,
        template_arguments: Default::default(),
    };
    let (documents, _) = render_supervised(&tokenizer, &conversation, Supervise::Assistant, &Mask::default()).unwrap();
    let encoded = tokenizer.encode_with_offsets(text).unwrap();
    let mask = token_mask(&tokenizer, text, &encoded, &documents[0].spans);
    let trained: Vec<u32> = encoded.ids.iter().zip(mask).filter(|(_, flag)| *flag == 1).map(|(id, _)| *id).collect();
    assert_eq!(tokenizer.decode(&trained, false).unwrap(), "Hi!<|im_end|>");
}

/// A folder with a configuration whose cache lies in it.
struct Workshop {
    folder: tempfile::TempDir,
    config: DataConfig,
    tokenizer: ChatTokenizer,
}

impl Workshop {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = DataConfig { cache_dir: folder.path().join("cache"), ..DataConfig::default() };
        Self { folder, config, tokenizer: tiny_tokenizer(CHATML) }
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    fn build(&self, paths: &[PathBuf]) -> Result<(TokenCache, BuildReport)> {
        TokenCache::build_or_open(paths, &self.tokenizer, &self.config, &|_, _| {})
    }
}

fn line(id: &str, answer: &str) -> String {
    let messages = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]);
    format!("{}\n", json!({"id": id, "messages": messages}))
}

fn trained_text(workshop: &Workshop, cache: &TokenCache, index: usize) -> String {
    let document = cache.document(index);
    let marked = document_text(&workshop.tokenizer, &document, false).unwrap();
    marked.split_once('⟦').unwrap().1.split_once('⟧').unwrap().0.to_owned()
}

#[test]
fn another_mask_is_another_cache_and_a_role_that_nobody_has_is_named() {
    let mut workshop = Workshop::new();
    let lines = [
        line("a", "<think>\nhm\n</think>\n\nho"),
        json!({"id": "b", "prompt": "p ", "completion": "<think>hm</think>ho"}).to_string() + "\n",
        json!({"id": "t", "text": "ho"}).to_string() + "\n",
        json!({"id": "i", "input_ids": [5, 6], "loss_mask": [0, 1]}).to_string() + "\n",
    ];
    let paths = [workshop.write("a.jsonl", &lines.concat())];
    workshop.config.max_bad_share = 0.9;
    let (whole, report) = workshop.build(&paths).unwrap();
    assert_eq!((whole.len(), report.warnings.len()), (4, 0));
    assert_eq!(trained_text(&workshop, &whole, 0), "<think>\nhm\n</think>\n\nho<|im_end|>");
    assert_eq!(trained_text(&workshop, &whole, 1), "<think>hm</think>ho<|im_end|>");
    workshop.config.mask = Mask { reasoning: false, ..Mask::default() };
    let (words, report) = workshop.build(&paths).unwrap();
    assert!(!report.from_cache);
    assert_eq!([0, 1].map(|index| trained_text(&workshop, &words, index)), ["ho<|im_end|>", "ho<|im_end|>"]);
    assert_eq!((words.len(), report.rejected_count), (2, 2));
    assert!(report.rejected[0].contains("preformatted text has no roles and no parts, but data.mask chooses"));
    assert!(report.rejected[1].contains("`input_ids` have no roles"));
    assert!(workshop.build(&paths).unwrap().1.from_cache);
    workshop.config.mask.roles = vec![Role::Assistant, Role::Tool];
    let (_, report) = workshop.build(&paths).unwrap();
    assert_eq!(
        report.warnings,
        ["data.mask.roles names tool, and no conversation that can be used has a message of it"]
    );
    // What every token is trained of leaves nothing to choose.
    workshop.config.supervise = Supervise::All;
    let message = workshop.build(&paths).unwrap_err().to_string();
    assert!(
        message.contains("`data.mask`: chooses assistant, tool, without reasoning, but data.supervise = all"),
        "{message}"
    );
}

#[test]
fn a_wish_to_train_somebody_else_is_heard_or_named() {
    let mut workshop = Workshop::new();
    let messages = json!([{"role": "user", "content": "hi", "train": true}, {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "hu", "weight": 0}, {"role": "assistant", "content": "ha"}]);
    let paths = [workshop.write("a.jsonl", &json!({"messages": messages}).to_string())];
    let (cache, report) = workshop.build(&paths).unwrap();
    assert_eq!(trained_text(&workshop, &cache, 0), "ho<|im_end|>");
    assert!(report.warnings[0].contains("the wish to train a message of role user (data.mask.roles) (1 records)"));
    workshop.config.mask.roles = vec![Role::User];
    let (cache, report) = workshop.build(&paths).unwrap();
    let marked = document_text(&workshop.tokenizer, &cache.document(0), false).unwrap();
    assert_eq!((marked.matches('⟦').count(), report.warnings.len()), (1, 0));
    assert!(marked.contains("user\n⟦hi⟧<|im_end|>"), "{marked}");
}

#[test]
fn documents_in_tokens_are_taken_as_they_are_or_refused() {
    let mut workshop = Workshop::new();
    let hash = recorded::vocabulary_hash(&workshop.tokenizer);
    let limit = workshop.tokenizer.id_limit();
    let lines = [
        json!({"id": "a", "input_ids": [5, 6, 7, 8, 9], "loss_mask": [0, 1, 0, 1, 1], "vocabulary_hash": hash}),
        json!({"input_ids": [5, 6, 7], "loss_mask": [false, true, true]}),
        json!({"id": "not trained", "input_ids": [5, 6], "loss_mask": [0, 0]}),
        json!({"id": "left out", "input_ids": [5, 6], "loss_mask": [0, 1], "train": false}),
        json!({"id": "other", "input_ids": [5, 6], "loss_mask": [0, 1], "vocabulary_hash": "0123456789abcdef"}),
        json!({"id": "large", "input_ids": [5, limit], "loss_mask": [0, 1]}),
        json!({"id": "short", "input_ids": [5, 6], "loss_mask": [1]}),
        json!({"id": "text", "input_ids": [5, -6], "loss_mask": [0, 1]}),
        json!({"id": "three", "input_ids": [5, 6], "loss_mask": [0, 2]}),
    ];
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let paths = [workshop.write("tokens.jsonl", &text)];
    workshop.config.max_bad_share = 0.9;
    let documents = |workshop: &Workshop| {
        let (cache, report) = workshop.build(&paths).unwrap();
        let of = |index| {
            let Document { id, tokens, supervised } = cache.document(index);
            (id.to_owned(), tokens.to_vec(), supervised.to_vec())
        };
        ((0..cache.len()).map(of).collect::<Vec<_>>(), report)
    };
    let (found, report) = documents(&workshop);
    let want = |first: [u8; 5], second: [u8; 3]| {
        vec![
            ("a".to_owned(), vec![5, 6, 7, 8, 9], first.to_vec()),
            ("tokens.jsonl:2".to_owned(), vec![5, 6, 7], second.to_vec()),
        ]
    };
    assert_eq!(found, want([0, 1, 0, 1, 1], [0, 1, 1]));
    assert_eq!((report.without_supervision, report.rejected_count), (2, 5));
    let reasons = report.rejected.join("\n");
    for reason in [
        "tokens.jsonl:5: its `input_ids` are of another tokenizer's vocabulary",
        "but the model has",
        "`loss_mask`: expected a mark for each of 2 `input_ids`, got 1",
        "`input_ids[1]`: expected a token id, got -6",
        "`loss_mask[1]`: expected 0 or 1, got 2",
    ] {
        assert!(reasons.contains(reason), "no `{reason}` in:\n{reasons}");
    }
    workshop.config.supervise = Supervise::LastTurn;
    assert_eq!(documents(&workshop).0, want([0, 0, 0, 1, 1], [0, 1, 1]));
    workshop.config.supervise = Supervise::All;
    assert_eq!(documents(&workshop).0[..2], want([1; 5], [1; 3])[..2]);
}

#[test]
fn build_then_open_then_rebuild_what_is_damaged() {
    let workshop = Workshop::new();
    let many: String = (0..3000).map(|n| line(&format!("c{n}"), &format!("answer {n}"))).collect();
    let paths = [workshop.write("a.jsonl", &many)];
    let seen = std::cell::RefCell::new(Vec::new());
    let (cache, report) = TokenCache::build_or_open(&paths, &workshop.tokenizer, &workshop.config, &|done, total| {
        seen.borrow_mut().push((done, total));
    })
    .unwrap();
    assert_eq!(*seen.borrow(), [(0, 3000), (1024, 3000), (2048, 3000), (3000, 3000)]);
    assert_eq!((cache.len(), report.documents, report.from_cache, report.note.clone()), (3000, 3000, false, None));
    assert_eq!(
        (cache.document(2999).id, trained_text(&workshop, &cache, 2999)),
        ("c2999", "answer 2999<|im_end|>".to_owned())
    );
    assert_eq!((cache.find("c17"), cache.find("c")), (vec![17], vec![]));
    let statistics = Statistics::of(&cache, 0..cache.len());
    assert_eq!((statistics.tokens, statistics.supervised), (cache.total_tokens(), cache.supervised_tokens()));
    assert!(statistics.to_string().contains("3000 documents"), "{statistics}");

    let (again, report) = workshop.build(&paths).unwrap();
    assert!(report.from_cache);
    assert_eq!(again.content_hash(), cache.content_hash());
    let (whole, file) = (fs::read(cache.path()).unwrap(), cache.path().to_path_buf());
    let hash = cache.content_hash().to_owned();
    drop((cache, again));
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        bytes
    };
    let damaged = [
        (whole[..whole.len() - 5].to_vec(), "bytes, got"),
        (whole[..100].to_vec(), "no token cache"),
        (Vec::new(), ""),
        (b"something else entirely".repeat(20), "no token cache"),
        (flipped(9), "expected version"),
        (flipped(20), "header's checksum"),
        (flipped(300), "checksum does not hold"),
        (flipped(whole.len() - 1), "checksum does not hold"),
    ];
    for (bytes, problem) in damaged {
        // A mapped file is never written to: another file takes its name.
        files::write_file(&file, |out| out.write_all(&bytes)).unwrap();
        let (cache, report) = workshop.build(&paths).unwrap();
        let note = report.note.unwrap();
        assert!(!report.from_cache && note.contains(problem) && note.ends_with("built again"), "{problem}: {note}");
        assert_eq!(cache.content_hash(), hash);
    }
}

#[test]
fn everything_that_matters_makes_another_cache() {
    let mut workshop = Workshop::new();
    let paths = [workshop.write("a.jsonl", &line("a", "one"))];
    let mut seen = std::collections::HashSet::new();
    let mut expect_new = |workshop: &Workshop, paths: &[PathBuf]| {
        let (cache, report) = workshop.build(paths).unwrap();
        assert!(!report.from_cache && seen.insert(cache.path().to_path_buf()));
    };
    expect_new(&workshop, &paths);
    expect_new(&workshop, &[paths[0].clone(), paths[0].clone()]);
    workshop.config.max_length = 100;
    expect_new(&workshop, &paths);
    workshop.config.supervise = Supervise::All;
    expect_new(&workshop, &paths);
    workshop.config.too_long = TooLong::Drop;
    expect_new(&workshop, &paths);
    let arguments = json!({"enable_thinking": false}).as_object().unwrap().clone();
    workshop.tokenizer = tiny_tokenizer(CHATML).with_template_arguments(arguments);
    expect_new(&workshop, &paths);
    workshop.tokenizer = tiny_tokenizer(&CHATML.replace("m.content", "m.content | trim"));
    expect_new(&workshop, &paths);
    fs::write(&paths[0], line("b", "one")).unwrap();
    expect_new(&workshop, &paths);
    workshop.config.max_bad_share = 0.5;
    assert!(workshop.build(&paths).unwrap().1.from_cache);
}

#[test]
fn bad_records_are_skipped_up_to_a_share() {
    let mut workshop = Workshop::new();
    let broken = "{\"messages\": [\n";
    let content = format!("\u{feff}{}\r\n{broken}{}{{\"id\": 3}}\n", line("a", "one"), line("b", "two"));
    let paths = [workshop.write("mixed.json", &content)];
    let message = workshop.build(&paths).unwrap_err().to_string();
    assert!(message.contains("2 of 4 records (50.0 %)") && message.contains("mixed.json:3: is not JSON"), "{message}");
    workshop.config.max_bad_share = 0.5;
    let (cache, report) = workshop.build(&paths).unwrap();
    assert_eq!((cache.len(), report.rejected_count, report.conversations), (2, 2, 4));
    assert!(report.rejected[1].contains("mixed.json:5: expected `messages`"), "{:?}", report.rejected);
    workshop.config.max_bad_share = 0.01;
    let message = workshop.build(&paths).unwrap_err().to_string();
    assert!(message.contains("2 of 4 records (50.0 %)"), "{message}");
}

#[test]
fn what_trains_nothing_is_dropped_and_counted() {
    let mut workshop = Workshop::new();
    let silent = r#"[{"messages": [{"role": "user", "content": "x"}]}, {"messages": []}, {"text": ""}]"#;
    let paths = [workshop.write("silent.json", silent)];
    let error = workshop.build(&paths).unwrap_err();
    assert!(error.to_string().contains("no document to train on is left of 3 records"), "{error}");
    assert!(error.to_string().contains("3 without supervised tokens"), "{error}");
    let empty = [workshop.write("empty.jsonl", "\n")];
    assert!(workshop.build(&empty).unwrap_err().to_string().contains("left of 0 records"));
    assert!(workshop.build(&[]).unwrap_err().to_string().contains("names no file"));

    let long_answer = "word ".repeat(200);
    let late = json!({"messages": [{"role": "user", "content": long_answer}, {"role": "assistant", "content": "x"}]});
    let content = format!("{}{}{late}\n", line("short", "one"), line("long", &long_answer));
    let paths = [workshop.write("long.jsonl", &content)];
    workshop.config.max_length = 40;
    let (cache, report) = workshop.build(&paths).unwrap();
    assert_eq!((cache.len(), report.truncated, report.without_supervision, report.too_long), (2, 2, 1, 0));
    assert_eq!((cache.length(1), cache.document(1).supervised[39]), (40, 1));
    workshop.config.too_long = TooLong::Drop;
    let (cache, report) = workshop.build(&paths).unwrap();
    assert_eq!((cache.len(), report.truncated, report.too_long), (1, 0, 2));
}

#[test]
fn preformatted_text_is_taken_as_it_is() {
    let workshop = Workshop::new();
    let content = "{\"text\": \"<s>all of it</s>\"}\n{\"prompt\": \"2+2=\", \"completion\": \"4\"}\n\
                   {\"prompt\": \"a\", \"completion\": \"b<|im_end|>\"}\n\
                   {\"prompt\": \"a\", \"completion\": \"cut\", \"finish_reason\": \"length\"}\n";
    let paths = [workshop.write("text.jsonl", content)];
    let (cache, _) = workshop.build(&paths).unwrap();
    let texts: Vec<String> =
        (0..4).map(|index| document_text(&workshop.tokenizer, &cache.document(index), false).unwrap()).collect();
    assert_eq!(texts, ["⟦<s>all of it</s>⟧", "2+2=⟦4<|im_end|>⟧", "a⟦b<|im_end|>⟧", "a⟦cut⟧"]);
    assert_eq!(cache.document(0).id, "text.jsonl:1");
}

#[test]
fn fatal_problems_name_their_cause() {
    let mut workshop = Workshop::new();
    let paths = [workshop.write("a.jsonl", &line("a", "one"))];
    workshop.tokenizer = with_config(&TINY.join("tokenizer"), json!({"chat_template": null}), json!({}));
    let error = workshop.build(&paths).unwrap_err();
    assert!(error.to_string().contains("has no chat template") && error.hint().unwrap().contains("data.chat_template"));
    workshop.tokenizer =
        with_config(&TINY.join("tokenizer"), json!({}), json!({"vocab_size": 30, "eos_token_id": [2, 9]}));
    assert_eq!(workshop.tokenizer.eos_token_ids(), [2, 9]);
    let message = workshop.build(&paths).unwrap_err().to_string();
    assert!(message.contains("of document `a`, but the model has 30 tokens"), "{message}");
    let message = ChatTokenizer::load(workshop.folder.path(), None).unwrap_err().to_string();
    assert!(message.contains("tokenizer.json: is not there"), "{message}");
    workshop.config.cache_dir = workshop.write("file", "x");
    workshop.tokenizer = tiny_tokenizer(CHATML);
    assert!(matches!(workshop.build(&paths).unwrap_err(), Error::Io { .. }));
}

#[test]
fn the_split_ignores_order_and_company() {
    let workshop = Workshop::new();
    let lines: Vec<String> = (0..400).map(|n| line(&format!("c{n}"), &format!("answer {n}"))).collect();
    let names = |content: String| {
        let paths = [workshop.write("split.jsonl", &content)];
        let (cache, _) = workshop.build(&paths).unwrap();
        let (train, eval) = split(&cache, 0.25);
        assert_eq!(train.len() + eval.len(), cache.len());
        let mut names: Vec<String> = eval.into_iter().map(|index| cache.document(index).id.to_owned()).collect();
        names.sort();
        names
    };
    let all = names(lines.concat());
    assert!((60..140).contains(&all.len()), "{}", all.len());
    assert_eq!(names(lines.iter().rev().cloned().collect()), all);
    let half = names(lines[..200].concat());
    assert!(half.iter().all(|name| all.contains(name)) && !half.is_empty());
    let (cache, _) = workshop.build(&[workshop.write("one.jsonl", &lines[0])]).unwrap();
    assert_eq!(split(&cache, 0.0), (vec![0], vec![]));
}

#[test]
fn answers_to_one_prompt_are_on_one_side_and_those_of_a_task_are_not() {
    let workshop = Workshop::new();
    let asked = |prompt: &str, answer: usize| {
        let messages = json!([{"role": "user", "content": prompt}, {"role": "assistant", "content": format!("{answer}")},
                              {"role": "user", "content": format!("what of {answer}?")}, {"role": "assistant", "content": "b"}]);
        format!("{}\n", json!({"id": format!("{prompt} {answer}"), "messages": messages}))
    };
    let completed = |answer: usize| {
        let record = json!({"id": format!("completion {answer}"), "prompt": "2+2=", "completion": format!("{answer}")});
        format!("{record}\n")
    };
    let held_out = |lines: &[String]| {
        let (cache, _) = workshop.build(&[workshop.write("asked.jsonl", &lines.concat())]).unwrap();
        let names = split(&cache, 0.5).1.into_iter().map(|index| cache.document(index).id.to_owned());
        names.collect::<std::collections::BTreeSet<String>>()
    };
    let prompts =
        |answers: usize| (0..40).flat_map(move |n| (0..answers).map(move |answer| asked(&format!("q{n}"), answer)));
    let one = held_out(&prompts(1).collect::<Vec<_>>());
    assert!((10..30).contains(&one.len()), "{one:?}");
    // Further answers go where the first one is; a task's are divided.
    let several = prompts(3).chain((0..3).map(completed)).chain((0..100).map(|answer| asked("task", answer)));
    let several = held_out(&several.collect::<Vec<_>>());
    for n in 0..40 {
        let held = [0, 1, 2].map(|answer| several.contains(&format!("q{n} {answer}")));
        assert_eq!(held, [one.contains(&format!("q{n} 0")); 3], "answers to q{n}");
    }
    let count = |start: &str| several.iter().filter(|name| name.starts_with(start)).count();
    assert!([0, 3].contains(&count("completion")) && (30..70).contains(&count("task")), "{several:?}");
    // What every conversation begins with tells none from another.
    let few: Vec<String> = (0..60).map(|answer| asked("few", answer)).collect();
    assert!((15..45).contains(&held_out(&few).len()));
}

#[test]
fn turns_of_one_conversation_stay_on_one_side_and_batches_keep_boundaries() {
    let mut workshop = Workshop::new();
    // Earlier answers are shortened, so that each turn becomes a document.
    workshop.tokenizer = tiny_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.content if loop.last or m.role == 'user' else '' }}<|im_end|>{% endfor %}\
         {% if add_generation_prompt %}<|im_start|>{% endif %}",
    );
    let turns = json!([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
                       {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]);
    let paths = [workshop.write("a.json", &json!({"id": "x", "conversations": turns}).to_string())];
    let (cache, report) = workshop.build(&paths).unwrap();
    assert_eq!((cache.len(), report.fanned_out, report.conversations), (2, 1, 1));
    assert_eq!((cache.document(0).id, cache.document(1).id, cache.find("x")), ("x#1", "x#2", vec![0, 1]));
    assert_eq!(cache.conversation_key(0), cache.conversation_key(1));
    let lengths = [cache.length(1), cache.length(0)];
    let batches = pack(&lengths, &[1, 0], 100).unwrap();
    assert_eq!(batches, [[1, 0]]);
    let batch = assemble(&cache, &batches[0]);
    assert_eq!(batch.lengths, [lengths[0] as i64, lengths[1] as i64]);
    assert_eq!(batch.documents, [DocumentRef::new("x#2", 1), DocumentRef::new("x#1", 0)]);
    let positions: Vec<i64> = (0..batch.lengths[0]).chain(0..batch.lengths[1]).collect();
    assert_eq!(batch.positions, positions);
    let trained: Vec<u32> =
        batch.ids.iter().zip(&batch.supervised).filter(|(_, flag)| **flag).map(|(id, _)| *id as u32).collect();
    assert_eq!(workshop.tokenizer.decode(&trained, false).unwrap(), "d<|im_end|>b<|im_end|>");
}

#[test]
fn the_cache_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<TokenCache>();
    shared::<ChatTokenizer>();
}

/// What the file says about training, in every spelling, and which text is trained.
#[test]
fn marks_of_messages_and_records_decide_what_is_trained() {
    let workshop = Workshop::new();
    let talk = |marks: Value, record: Value| {
        let mut bad = json!({"role": "assistant", "content": "BAD"});
        bad.as_object_mut().unwrap().extend(marks.as_object().unwrap().clone());
        let mut whole = json!({"messages": [{"role": "user", "content": "a"}, bad,
            {"role": "user", "content": "b"}, {"role": "assistant", "content": "GOOD"}]});
        whole.as_object_mut().unwrap().extend(record.as_object().unwrap().clone());
        whole
    };
    let trained = |record: &Value| -> Vec<Vec<String>> {
        let path = workshop.write("marks.jsonl", &format!("{record}\n{}", line("other", "x")));
        let (cache, _) = workshop.build(&[path]).unwrap();
        let document = |index| {
            let runs = super::super::document_runs(&workshop.tokenizer, &cache.document(index)).unwrap();
            runs.into_iter().filter(|(flag, _)| *flag).map(|(_, text)| text).collect()
        };
        (0..cache.len()).map(document).collect()
    };
    for marks in [json!({"weight": 0}), json!({"train": false}), json!({"loss_mask": 0}), json!({"loss": false})] {
        assert_eq!(trained(&talk(marks, json!({})))[0], ["GOOD<|im_end|>"]);
    }
    assert_eq!(trained(&talk(json!({"weight": 1}), json!({})))[0], ["BAD<|im_end|>", "GOOD<|im_end|>"]);
    assert_eq!(trained(&talk(json!({}), json!({"loss_mask": [0, 0, 0, 1]})))[0], ["GOOD<|im_end|>"]);
    assert_eq!(trained(&talk(json!({}), json!({"weight": 0}))), [["x<|im_end|>"]]);
    // A cut answer has no end of turn, wherever the file says so.
    for (marks, record) in [
        (json!({"finish": "length"}), json!({})),
        (json!({"finish_reason": "length"}), json!({})),
        (json!({}), json!({"finish": ["length", "stop"]})),
    ] {
        assert_eq!(trained(&talk(marks, record))[0], ["BAD", "GOOD<|im_end|>"]);
    }
    let prompt = json!({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "shot"},
        {"role": "user", "content": "b"}], "completion": [{"role": "assistant", "content": "GOOD"}]});
    assert_eq!(trained(&prompt)[0], ["GOOD<|im_end|>"]);
}

#[test]
fn a_cut_answer_is_trained_without_the_token_that_reaches_beyond_it() {
    let tokenizer = tiny_tokenizer(CHATML);
    let encoded = super::super::tokenizer::Encoded { ids: vec![5, 6, 7], offsets: vec![(0, 3), (3, 6), (6, 8)] };
    let mask = |end: usize| {
        let spans = [Span { range: 0..end, end: SpanEnd::Cut }];
        token_mask(&tokenizer, "ab cd ef", &encoded, &spans)
    };
    assert_eq!((mask(2), mask(3), mask(5), mask(8)), (vec![0, 0, 0], vec![1, 0, 0], vec![1, 0, 0], vec![1, 1, 1]));
}

#[test]
fn keys_that_look_decisive_are_named_once_a_file() {
    let mut workshop = Workshop::new();
    let odd = |id: &str| {
        let messages = json!([{"role": "user", "content": "hi"},
            {"role": "assistant", "content": "ho", "loss_multiplier": 2}]);
        format!("{}\n", json!({"id": id, "source": "x", "messages": messages, "text": "y", "quality_weight": 0.5}))
    };
    let paths = [workshop.write("odd.jsonl", &(odd("a") + &odd("b"))), workshop.write("fine.jsonl", &line("c", "x"))];
    for from_cache in [false, true] {
        let (_, report) = workshop.build(&paths).unwrap();
        assert_eq!((report.from_cache, report.warnings.len()), (from_cache, 1));
        let warning = &report.warnings[0];
        assert!(warning.contains("odd.jsonl: not understood, and passed over: "), "{warning}");
        for key in ["`loss_multiplier` in messages", "`quality_weight`", "`text` beside a conversation"] {
            assert!(warning.contains(&format!("{key} (2 records)")), "{warning}");
        }
    }
    workshop.config.supervise = Supervise::All;
    let marked = json!({"messages": [{"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho", "weight": 0}]});
    let path = workshop.write("all.jsonl", &format!("{marked}\n"));
    let message = workshop.build(&[path]).unwrap_err().to_string();
    assert!(message.contains("message 2 is not to be trained, but data.supervise = all"), "{message}");
}

#[test]
fn marks_are_honoured_where_a_template_rewrites_history_and_marks_its_own() {
    let mut workshop = Workshop::new();
    workshop.tokenizer = tiny_tokenizer(
        "{% for m in messages %}<|im_start|>{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}\
         {{ m.content if loop.last else '~' + m.content }}{% endgeneration %}{% endif %}<|im_end|>{% endfor %}\
         {% if add_generation_prompt %}<|im_start|>{% endif %}",
    );
    let record = |marks: Value| {
        let mut first = json!({"role": "assistant", "content": "ho"});
        first.as_object_mut().unwrap().extend(marks.as_object().unwrap().clone());
        let user = |content: &str| json!({"role": "user", "content": content});
        json!({"messages": [user("a"), first, user("b"), {"role": "assistant", "content": "ha"}]})
    };
    for (marks, documents, method, text) in [
        (json!({}), 1, 1, "~ho<|im_end|>"),
        (json!({"finish": "length"}), 2, 0, "ho"),
        (json!({"weight": 0}), 1, 0, "ha<|im_end|>"),
    ] {
        let path = workshop.write("blocks.jsonl", &format!("{}\n", record(marks)));
        let (cache, report) = workshop.build(&[path]).unwrap();
        assert_eq!((cache.len(), report.by_generation_blocks), (documents, method), "{text}");
        assert_eq!(trained_text(&workshop, &cache, 0), text);
    }
}

#[test]
fn a_record_gives_its_template_arguments() {
    let mut workshop = Workshop::new();
    workshop.tokenizer = tiny_tokenizer(&format!("{{{{ 'on ' if thinking is true else 'off ' }}}}{CHATML}"));
    let record = |kwargs: Value| {
        let messages = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]);
        format!("{}\n", json!({"messages": messages, "chat_template_kwargs": kwargs}))
    };
    let paths = [workshop.write("kwargs.jsonl", &(record(json!({"thinking": true})) + &record(json!(null))))];
    let (cache, report) = workshop.build(&paths).unwrap();
    let text = |index| document_text(&workshop.tokenizer, &cache.document(index), false).unwrap();
    assert!(text(0).starts_with("on <|im_start|>") && text(1).starts_with("off <|im_start|>"));
    assert!(report.warnings.is_empty());
    drop((cache, report));
    // The record's own word is the last.
    let arguments = json!({"thinking": true}).as_object().unwrap().clone();
    workshop.tokenizer = tiny_tokenizer(&format!("{{{{ 'on ' if thinking is true else 'off ' }}}}{CHATML}"))
        .with_template_arguments(arguments);
    let paths = [workshop.write("off.jsonl", &(record(json!({"thinking": false})) + &record(json!({}))))];
    let (cache, _) = workshop.build(&paths).unwrap();
    let text = |index| document_text(&workshop.tokenizer, &cache.document(index), false).unwrap();
    assert!(text(0).starts_with("off <|im_start|>") && text(1).starts_with("on <|im_start|>"));
}

#[test]
fn answers_with_token_ids_take_their_own_way_into_the_cache() {
    let mut workshop = Workshop::new();
    workshop.tokenizer = tiny_tokenizer(&CHATML.replace("assistant{{ '\n' }}", "assistant\n<think>{{ '\n' }}"));
    let ids = workshop.tokenizer.encode("ho ho").unwrap();
    let record = |content: &str| {
        json!({"id": "a", "messages": [{"role": "user", "content": "hi"},
            {"role": "assistant", "content": content, "token_ids": ids, "finish": "length"}]})
    };
    let paths = [workshop.write("ids.jsonl", &format!("{}\n", record("ho ho")))];
    let (cache, report) = workshop.build(&paths).unwrap();
    assert_eq!((report.from_token_ids, report.cut_answers, cache.len(), cache.document(0).id), (1, 1, 1, "a"));
    let text = document_text(&workshop.tokenizer, &cache.document(0), false).unwrap();
    assert!(text.ends_with("assistant\n<think>\n⟦ho ho⟧"), "{text}");
    workshop.config.max_length = cache.length(0) - 1;
    drop(cache);
    let (cache, report) = workshop.build(&paths).unwrap();
    assert_eq!((report.truncated, cache.length(0)), (1, workshop.config.max_length));
    workshop.config.max_length = 2048;
    // Ids of another vocabulary say nothing here; that the answer was cut off still holds.
    let mut foreign = record("ha");
    foreign["messages"][1]["vocabulary_hash"] = "0123456789abcdef".into();
    drop(cache);
    let other = tiny_tokenizer(CHATML);
    let own = std::mem::replace(&mut workshop.tokenizer, other);
    let (cache, report) = workshop.build(&[workshop.write("foreign.jsonl", &format!("{foreign}\n"))]).unwrap();
    assert_eq!((report.from_token_ids, report.foreign_token_ids, report.cut_answers), (0, 1, 1));
    assert!(report.warnings[0].contains("1 conversations have token ids of another tokenizer"), "{report:?}");
    assert_eq!(trained_text(&workshop, &cache, 0), "ha");
    workshop.tokenizer = own;
    let paths = [workshop.write("edited.jsonl", &format!("{}\n", record("ha")))];
    let message = workshop.build(&paths).unwrap_err().to_string();
    assert!(message.contains("edited.jsonl:1: message 2: `content` is not what `token_ids` spell"), "{message}");
}
