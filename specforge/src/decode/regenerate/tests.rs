use std::fs;

use serde_json::json;

use super::super::drafter::{DraftSampling, Drafter, DynamicTree, ModelDrafter, Plain, PromptLookup, Trees};
use super::super::tiny;
use super::answer_file::AnswerFile;
use super::*;
use crate::models::llama::LlamaTarget;

/// Letters as tokens 0 to 55, one marker before each role, 63 at the end of a message.
struct Letters;

impl Chat for Letters {
    fn prompt(&self, messages: &[Message], _: Option<&Value>, _: &Map<String, Value>) -> Result<Vec<u32>> {
        let mut tokens = Vec::new();
        for message in messages {
            let content = message.content.as_deref().unwrap_or_default();
            tokens.push(match message.role.as_str() {
                "user" => 60,
                "assistant" => 61,
                _ => 62,
            });
            tokens.extend(content.bytes().map(|byte| u32::from(byte) % 56));
            tokens.push(63);
        }
        tokens.push(61);
        Ok(tokens)
    }

    fn text(&self, tokens: &[u32]) -> Result<String> {
        Ok(tokens.iter().filter(|&&token| token < 56).map(|&token| char::from(b'A' + token as u8)).collect())
    }

    fn stop_tokens(&self) -> Vec<u32> {
        vec![63, 7, 9]
    }

    fn fingerprint(&self) -> String {
        "letters".to_owned()
    }

    fn vocabulary_hash(&self) -> String {
        "a to z".to_owned()
    }
}

/// A drafter as it is opened.
fn of(drafter: Box<dyn Drafter + '_>) -> Opened<'_> {
    Opened {
        drafter,
        method: "some".to_owned(),
        tree: String::new(),
        trees: Trees::Own,
        folder: None,
        notes: Vec::new(),
    }
}

struct Bench {
    folder: tempfile::TempDir,
    target: LlamaTarget,
    options: RegenOptions,
}

const PROMPTS: &str = concat!(
    r#"{"id":"a","messages":[{"role":"user","content":"one"},{"role":"user","content":"two"}]}"#,
    "\n",
    r#"{"id":"b","messages":[{"role":"system","content":"s"},{"role":"user","content":"three four"}]}"#,
    "\n",
    r#"{"id":"c","messages":[{"role":"user","content":"5"},{"role":"assistant","content":"old"}]}"#,
    "\n",
    r#"{"id":"d","messages":[{"role":"user","content":"x"},{"role":"user","content":"y"},"#,
    r#"{"role":"user","content":"z"}]}"#,
    "\n",
);

impl Bench {
    fn new(prompts: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), "{}").unwrap();
        fs::write(folder.path().join("model.safetensors"), vec![1; 100]).unwrap();
        fs::write(folder.path().join("prompts.jsonl"), prompts).unwrap();
        let options = RegenOptions {
            target: folder.path().to_path_buf(),
            prompts: folder.path().join("prompts.jsonl"),
            out: folder.path().join("out.jsonl"),
            max_new_tokens: 6,
            max_rows: 2,
            processors: Processors::at_temperature(1.3),
            seed: 4,
            ..RegenOptions::default()
        };
        Self { folder, target: tiny::target(2), options }
    }

    fn run(&self) -> Result<RegenReport> {
        self.run_with(Box::new(Plain))
    }

    fn run_with<'a>(&'a self, drafter: Box<dyn Drafter + 'a>) -> Result<RegenReport> {
        let (work, stop) = (SharedWork::alone(), AtomicBool::new(false));
        let models = (&self.target as &dyn TargetModel, of(drafter));
        Ok(run_chat(&self.options, models, &Letters, &work, &stop, &mut |_| {})?.unwrap())
    }

    /// Runs and asks to stop after so many passes.
    fn run_passes(&self, passes: usize) -> RegenReport {
        let stop = AtomicBool::new(passes == 0);
        let mut left = passes;
        let mut progress = |_: Progress| {
            left -= 1;
            stop.store(left == 0, Ordering::Relaxed);
        };
        let models = (&self.target as &dyn TargetModel, of(Box::new(Plain)));
        run_chat(&self.options, models, &Letters, &SharedWork::alone(), &stop, &mut progress).unwrap().unwrap()
    }

    fn out(&self) -> String {
        fs::read_to_string(&self.options.out).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn answered(&self) -> Vec<Value> {
        self.out().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn forget(&self) {
        fs::remove_file(&self.options.out).unwrap();
    }
}

#[test]
fn every_turn_is_answered_alone_after_the_answers_before_it() {
    let bench = Bench::new(PROMPTS);
    let report = bench.run().unwrap();
    assert_eq!((report.rows, report.answered, report.answers, report.failed), (4, 4, 7, 0));
    assert_eq!(report.failed, 0);
    let rows = bench.answered();
    let roles = |row: &Value| -> String {
        let messages = row["messages"].as_array().unwrap();
        messages.iter().map(|message| &message["role"].as_str().unwrap()[..1]).collect()
    };
    assert_eq!(rows.iter().map(roles).collect::<Vec<_>>(), ["uaua", "sua", "ua", "uauaua"]);
    let (mut tokens, mut stopped) = (0, 0);
    for row in &rows {
        let messages: Vec<Message> = (row["messages"].as_array().unwrap().iter())
            .map(|message| Message::new(message["role"].as_str().unwrap(), message["content"].as_str().unwrap()))
            .collect();
        let answers = messages.iter().enumerate().filter(|(_, message)| message.is_assistant());
        for (index, message) in answers {
            let written = &row["messages"][index];
            let prompt = Letters.prompt(&messages[..index], None, &Map::new()).unwrap();
            assert_eq!(written["prompt_hash"], prompt_hash(&prompt));
            let key = noise_key(row["id"].as_str().unwrap());
            let alone = EngineOptions { max_rows: 1, ..bench.options.engine(Letters.stop_tokens()) };
            let mut engine = Engine::new(&bench.target, Box::new(Plain), alone).unwrap();
            engine.submit(Request { tag: 0, prompt, max_new_tokens: 6, key }).unwrap();
            let alone = engine.run(&mut Silent).unwrap().remove(0).decoded.unwrap();
            assert_eq!(message.content.as_deref().unwrap(), Letters.text(alone.text_tokens()).unwrap());
            assert_eq!(written["finish"], serde_json::to_value(alone.finish).unwrap());
            assert_eq!(written["token_ids"], json!(alone.tokens));
            tokens += alone.tokens.len() as u64;
            stopped += usize::from(alone.finish == Finish::Stop);
        }
    }
    assert_eq!((report.new_tokens, report.stopped), (tokens, stopped));
    assert!(0 < stopped && stopped < 7, "both ways to end are seen");
}

#[test]
fn neither_the_batch_nor_other_rows_change_an_answer_but_the_seed_does() {
    let mut bench = Bench::new(PROMPTS);
    bench.run().unwrap();
    let want = bench.out();
    for max_rows in [1, 3, 32] {
        bench.options.max_rows = max_rows;
        bench.forget();
        bench.run().unwrap();
        assert_eq!(bench.out(), want, "{max_rows} rows");
    }
    bench.forget();
    fs::write(&bench.options.prompts, PROMPTS.lines().nth(2).unwrap()).unwrap();
    bench.run().unwrap();
    assert_eq!(bench.out().trim_end(), want.lines().nth(2).unwrap());
    bench.forget();
    fs::write(&bench.options.prompts, PROMPTS).unwrap();
    bench.options.seed = 5;
    bench.run().unwrap();
    assert_ne!(bench.out(), want);
}

/// A draft changes when an answer comes, never what it is.
#[test]
fn a_draft_changes_no_answer() {
    let mut bench = Bench::new(PROMPTS);
    bench.options.max_new_tokens = 24;
    let penalised = Processors { repetition_penalty: 1.3, top_k: 30, ..Processors::at_temperature(0.9) };
    for processors in [Processors::default(), Processors::at_temperature(1.3), penalised] {
        bench.options.processors = processors;
        let plain = bench.run().unwrap();
        let want = bench.out();
        assert_eq!(plain.acceptance_length, Some(1.0));
        let sampling = DraftSampling::for_policy(bench.options.policy(), processors.temperature);
        for max_rows in [1, 3, 32] {
            bench.options.max_rows = max_rows;
            let tree = DynamicTree { depth: 3, top_k: 3, nodes: 8, min_probability: 0.0 };
            let model = |seed| {
                let draft = Box::new(tiny::target(seed));
                ModelDrafter::new(draft, bench.target.info(), tree, sampling).unwrap()
            };
            let lookup = PromptLookup { longest_match: 2, shortest_match: 1, depth: 3, nodes: 6 };
            let drafters: [Box<dyn Drafter>; 3] = [Box::new(model(2)), Box::new(model(5)), Box::new(lookup)];
            for (index, drafter) in drafters.into_iter().enumerate() {
                bench.forget();
                let report = bench.run_with(drafter).unwrap();
                assert_eq!(bench.out(), want, "draft {index}, {max_rows} rows, {processors:?}");
                let taken = report.acceptance_length.unwrap();
                assert!(taken >= [1.2, 1.0, 1.0][index], "draft {index}: {taken}");
            }
        }
        bench.forget();
    }
}

#[test]
fn a_run_that_is_stopped_anywhere_and_goes_on_leaves_the_same_file() {
    let bench = Bench::new(PROMPTS);
    bench.run().unwrap();
    let want = bench.out();
    for passes in 0.. {
        bench.forget();
        let first = bench.run_passes(passes);
        assert_eq!(bench.answered().len(), first.answered);
        if !first.interrupted {
            break;
        }
        let second = bench.run().unwrap();
        assert_eq!((second.answered_before, second.answered_before + second.answered), (first.answered, 4));
        assert_eq!(bench.out(), want, "stopped after {passes} passes");
        assert!(passes < 100);
    }
}

#[test]
fn a_file_cut_at_any_byte_keeps_its_whole_lines_and_is_completed_to_the_same_file() {
    let bench = Bench::new(PROMPTS);
    bench.run().unwrap();
    let want = bench.out();
    // The order rows finish in is not the order of the prompts: that is the file a kill leaves.
    let mut lines: Vec<&str> = want.split_inclusive('\n').collect();
    lines.rotate_left(1);
    let unsorted = lines.concat();
    let prompts = Prompts::read(&bench.options.prompts, 0.0).unwrap();
    let record = RunRecord::new(&bench.options, bench.target.kind(), &Letters.fingerprint()).unwrap();
    let mut whole_lines = 0;
    for cut in 0..=unsorted.len() {
        fs::write(&bench.options.out, &unsorted[..cut]).unwrap();
        let whole = unsorted[..cut].matches('\n').count();
        let answers = AnswerFile::open(&bench.options.out, &prompts, &record, false).unwrap();
        assert_eq!(answers.rows().collect::<Vec<_>>(), [1, 2, 3, 0][..whole], "cut at {cut}");
        drop(answers);
        assert_eq!(bench.out(), lines[..whole].concat(), "cut at {cut}");
        // The first bytes of each line, and the last before its end.
        if whole > whole_lines || cut == 1 || unsorted[cut..].starts_with("}\n") {
            fs::write(&bench.options.out, &unsorted[..cut]).unwrap();
            whole_lines = whole;
            let report = bench.run().unwrap();
            assert_eq!((report.answered_before, report.answered), (whole, 4 - whole), "cut at {cut}");
            assert_eq!(bench.out(), want, "cut at {cut}");
        }
    }
}

#[test]
fn other_options_are_refused_until_restarted_and_nothing_is_lost() {
    let mut bench = Bench::new(PROMPTS);
    bench.run().unwrap();
    let first = bench.out();
    bench.options.processors.temperature = 0.5;
    let error = bench.run().unwrap_err();
    assert!(error.to_string().contains("temperature: 1.3 then, 0.5 now"), "{error}");
    assert!(error.hint().unwrap().contains("--restart"));
    assert_eq!((bench.out(), error.exit_code()), (first.clone(), 2));
    fs::write(bench.path("model.safetensors"), vec![2; 100]).unwrap();
    assert!(bench.run().unwrap_err().to_string().contains("target_fingerprint"));

    bench.options.restart = true;
    assert_eq!(bench.run().unwrap().answered, 4);
    let second = bench.out();
    bench.run().unwrap();
    assert_eq!(fs::read_to_string(bench.path("out.jsonl.bak")).unwrap(), first);
    assert_eq!(fs::read_to_string(bench.path("out.jsonl.bak2")).unwrap(), second);
    assert!(bench.path("out.jsonl.bak2.run.json").exists());
    // What does not change an answer may change.
    (bench.options.restart, bench.options.max_rows) = (false, 7);
    assert_eq!(bench.run().unwrap().answered_before, 4);
}

#[test]
fn added_prompts_are_answered_and_changed_ones_are_refused() {
    let bench = Bench::new(PROMPTS);
    bench.run().unwrap();
    let before = bench.out();
    let added = r#"{"id":"0","messages":[{"role":"user","content":"new"}]}"#;
    fs::write(&bench.options.prompts, format!("{added}\n{PROMPTS}")).unwrap();
    assert_eq!(bench.run().unwrap().answered, 1);
    let after = bench.out();
    assert!(after.starts_with(r#"{"id":"0""#) && after.ends_with(&before), "{after}");
    for (prompts, problem) in [
        (PROMPTS.to_owned(), "out.jsonl:1: row `0` is not among the prompts"),
        (format!("{added}\n{PROMPTS}").replace("three", "3"), "out.jsonl:3: the prompt of row `b` has changed"),
    ] {
        fs::write(&bench.options.prompts, prompts).unwrap();
        let message = bench.run().unwrap_err().to_string();
        assert!(message.contains(problem), "{message}");
    }
    assert_eq!(bench.out(), after);
}

#[test]
fn damaged_foreign_and_busy_files_are_left_alone() {
    let bench = Bench::new(PROMPTS);
    bench.run().unwrap();
    let whole = bench.out();
    let twice = format!("{whole}{}\n", whole.lines().next().unwrap());
    for (text, problem) in [
        (whole.replacen(r#"{"id":"b""#, r#"{"id""#, 1), "out.jsonl:2: is not JSON"),
        (twice, "out.jsonl:5: row `a` is there twice, first on line 1"),
        (format!("{{\"text\":\"x\"}}\n{whole}"), "out.jsonl:1: expected a conversation"),
    ] {
        fs::write(&bench.options.out, &text).unwrap();
        let message = bench.run().unwrap_err().to_string();
        assert!(message.contains(problem), "{message}");
        assert_eq!(bench.out(), text);
    }
    fs::write(&bench.options.out, &whole).unwrap();
    let other = fs::File::open(&bench.options.out).unwrap();
    other.lock().unwrap();
    assert!(bench.run().unwrap_err().to_string().contains("another run"));
    drop(other);
    assert_eq!(bench.run().unwrap().answered_before, 4);
    let record = fs::read_to_string(bench.path("out.jsonl.run.json")).unwrap();
    fs::write(bench.path("out.jsonl.run.json"), r#"{"format": 1, "same": {"temperature": 0.0}}"#).unwrap();
    assert!(bench.run().unwrap_err().to_string().contains("layout: expected 2, got 1"));
    fs::write(bench.path("out.jsonl.run.json"), format!("{record}{record}")).unwrap();
    assert!(bench.run().unwrap_err().to_string().contains("is no record of a run"));
    fs::remove_file(bench.path("out.jsonl.run.json")).unwrap();
    assert!(bench.run().unwrap_err().to_string().contains("is there already"));
    assert_eq!(bench.out(), whole);
}

#[test]
fn failed_rows_are_listed_and_tried_again() {
    let mut bench = Bench::new("");
    let long = json!({"id": "long", "messages": [{"role": "user", "content": "x".repeat(tiny::CONTEXT)}]});
    // The second turn of this one does not fit.
    let turns = json!({"id": "turns", "messages": [
        {"role": "user", "content": "x"}, {"role": "user", "content": "x".repeat(tiny::CONTEXT - 9)}]});
    fs::write(&bench.options.prompts, format!("{long}\n{PROMPTS}{turns}\nbroken\n")).unwrap();
    bench.options.max_bad_share = 0.2;
    for before in [0, 4] {
        let report = bench.run().unwrap();
        assert_eq!((report.answered_before, report.answered + before, report.failed), (before, 4, 2));
        assert!(!report.interrupted);
        assert!(report.skipped[0].contains("prompts.jsonl:7: is not JSON"), "{:?}", report.skipped);
        let errors = fs::read_to_string(report.errors.unwrap()).unwrap();
        let errors: Vec<Value> = errors.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let listed = |index: usize| (&errors[index]["id"], &errors[index]["line"], &errors[index]["turn"]);
        assert_eq!(errors.len(), 3);
        assert_eq!(listed(0), (&Value::Null, &json!(7), &Value::Null));
        assert_eq!(listed(1), (&json!("long"), &json!(1), &json!(1)));
        assert_eq!(listed(2), (&json!("turns"), &json!(6), &json!(2)));
        assert!(errors[2]["error"].as_str().unwrap().contains("leaves no room"), "{errors:?}");
    }
    bench.options.max_prompt_tokens = Some(13);
    bench.options.restart = true;
    let report = bench.run().unwrap();
    assert_eq!((report.answered, report.failed), (1, 5));
    fs::write(&bench.options.prompts, PROMPTS.lines().nth(2).unwrap()).unwrap();
    bench.options.restart = false;
    let report = bench.run().unwrap();
    assert_eq!((report.failed, report.errors), (0, None));
    assert!(!bench.path("out.jsonl.errors.jsonl").exists());
}

#[test]
fn a_cut_answer_is_kept_or_ends_its_conversation_or_drops_its_row() {
    let mut bench = Bench::new(PROMPTS);
    bench.run().unwrap();
    let finishes = |row: &Value| -> Vec<bool> {
        let messages = row["messages"].as_array().unwrap().iter();
        messages.filter_map(|message| message.get("finish")).map(|finish| finish == "length").collect()
    };
    let kept = bench.answered();
    let cut_in_the_middle = |row: &&Value| finishes(row).iter().rev().skip(1).any(|&cut| cut);
    assert!(kept.iter().any(|row| cut_in_the_middle(&row)), "the rule is seen");

    bench.options.on_length = OnLength::Stop;
    assert!(bench.run().unwrap_err().to_string().contains("on_length"));
    bench.forget();
    bench.run().unwrap();
    let stopped = bench.out();
    for (row, kept) in bench.answered().iter().zip(&kept) {
        let (short, long) = (row["messages"].as_array().unwrap(), kept["messages"].as_array().unwrap());
        assert_eq!(short[..], long[..short.len()]);
        let first_cut = finishes(kept).iter().position(|&cut| cut).unwrap_or(finishes(kept).len() - 1);
        assert_eq!(finishes(row).len(), first_cut + 1);
    }
    // Rows that ended early are known as answered, whenever the run goes on.
    let unsorted: Vec<&str> = stopped.split_inclusive('\n').skip(1).collect();
    fs::write(&bench.options.out, unsorted.concat()).unwrap();
    assert_eq!(bench.run().unwrap().answered_before, 3);
    assert_eq!(bench.out(), stopped);

    bench.options.on_length = OnLength::Drop;
    bench.forget();
    let report = bench.run().unwrap();
    let whole: Vec<Value> = kept.into_iter().filter(|row| !finishes(row).contains(&true)).collect();
    assert!(report.dropped > 0 && !report.interrupted && bench.answered() == whole);
    let again = bench.run().unwrap();
    assert_eq!((again.dropped, again.new_tokens, again.answered), (report.dropped, 0, 0));
    bench.options.restart = true;
    assert_eq!(bench.run().unwrap().dropped, report.dropped);
    assert!(bench.path("out.jsonl.bak.cut.jsonl").exists());
}

#[test]
fn options_that_cannot_be_meant_are_refused() {
    let bench = Bench::new(PROMPTS);
    let good = || bench.options.clone();
    for (key, options) in [
        ("max_new_tokens", RegenOptions { max_new_tokens: 0, ..good() }),
        ("max_rows", RegenOptions { max_rows: 0, ..good() }),
        ("temperature", RegenOptions { processors: Processors::at_temperature(f64::NAN), ..good() }),
        ("temperature", RegenOptions { processors: Processors::at_temperature(-0.1), ..good() }),
        ("top_p", RegenOptions { processors: Processors { top_p: 0.0, ..Processors::default() }, ..good() }),
        ("max_bad_share", RegenOptions { max_bad_share: 2.0, ..good() }),
        ("out", RegenOptions { out: bench.options.prompts.clone(), ..good() }),
    ] {
        let message = options.check().unwrap_err().to_string();
        assert!(message.contains(&format!("`{key}`")), "{message}");
    }
}
