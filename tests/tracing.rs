//! `specforge compare` on traces of real files: different trees are equal, and a changed trace is called wrong.

use std::fs;
use std::path::Path;

use specforge::decode::Request;
use specforge::decode::drafter::{Drafter, Plain, PromptLookup};
use specforge::decode::engine::{Engine, EngineOptions};
use specforge::decode::policy::Policy;
use specforge::models::load_target;
use specforge::nn::Processors;
use specforge::trace::{Header, ModelName, Recorder, Settings};
use tch::{Device, Kind};

use super::fixture::{json_of, output_of, specforge, stderr_of, write_model};

fn record(folder: &Path, out: &Path, drafter: Box<dyn Drafter>, (name, max_rows): (&str, usize)) {
    let target = load_target(folder, Kind::Float, Device::Cpu).unwrap();
    let options = EngineOptions {
        processors: Processors::at_temperature(0.7),
        policy: Policy::Keyed { seed: 1 },
        stop_tokens: vec![],
        max_rows,
    };
    let header = Header {
        target: ModelName::target(folder).unwrap(),
        draft: None,
        dtype: "float32".to_owned(),
        device: "cpu".to_owned(),
        vocabulary: target.info().vocab_size as usize,
        settings: Settings {
            drafter: name.to_owned(),
            tree: "10 nodes".to_owned(),
            processors: options.processors,
            policy: options.policy,
            stop_tokens: vec![],
            max_new_tokens: 30,
            max_rows,
        },
    };
    let mut recorder = Recorder::create(out, header).unwrap();
    let mut engine = Engine::new(target.as_ref(), drafter, options).unwrap();
    for tag in 0..3 {
        let prompt = (0..20 + tag as u32).map(|place| 3 + place % (3 + tag as u32)).collect();
        engine.submit(Request { tag, prompt, max_new_tokens: 30, key: tag }).unwrap();
    }
    engine.run(&mut recorder).unwrap();
    recorder.finish().unwrap();
}

#[test]
fn two_trees_are_equal_and_a_changed_trace_is_wrong() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = folder.path().join("model");
    write_model(&model, &serde_json::json!({}));
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (a, b, target) = (path("a.trace"), path("b.trace"), path("model"));
    record(&model, Path::new(&a), Box::new(Plain), ("plain", 1));
    let lookup = PromptLookup { longest_match: 2, shortest_match: 1, depth: 4, nodes: 10 };
    record(&model, Path::new(&b), Box::new(lookup), ("prompt-lookup", 3));

    let report = json_of(&mut specforge(&["compare", &a, &b, "--target", &target, "--json"]));
    assert_eq!((&report["verdict"], &report["findings"]), (&"equal".into(), &serde_json::json!([])), "{report}");
    assert_eq!((report["requests"].as_u64(), report["positions"].as_u64()), (Some(3), Some(90)));
    assert!(report["max_difference"].as_f64().unwrap() < 1e-5);
    let label = report["b"]["settings"].as_str().unwrap();
    assert_eq!(label, "prompt-lookup, 10 nodes, temperature 0.7, keyed noise, seed 1, 3 rows");

    // Another token in the middle of the second: what follows is still there.
    let text = fs::read_to_string(&b).unwrap();
    let lines: Vec<String> = text
        .lines()
        .map(|line| match serde_json::from_str::<serde_json::Value>(line).unwrap() {
            mut record if record["record"] == "token" && record["tag"] == 1 && record["position"] == 30 => {
                record["token"] = ((record["token"].as_u64().unwrap() + 1) % 400).into();
                record.to_string()
            }
            _ => line.to_owned(),
        })
        .collect();
    fs::write(&b, lines.join("\n") + "\n").unwrap();
    let output = output_of(&mut specforge(&["compare", &a, &b, "--target", &target]));
    let report = String::from_utf8(output.stdout.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{report}");
    assert!(report.contains("first divergence: request 1, position 30\n  A: token "), "{report}");
    assert!(report.contains("without a cache: token ") && report.ends_with("verdict: B is wrong\n"), "{report}");
    assert_eq!(stderr_of(&output), "error: the traces differ: B is wrong\n");
    // The rows of both are there and sound: the row of the second does not choose its token, whoever is asked.
    let report = output_of(&mut specforge(&["compare", &a, &b]));
    assert_eq!(report.status.code(), Some(1));

    // Another model is no judge.
    let other = folder.path().join("other");
    write_model(&other, &serde_json::json!({"num_hidden_layers": 1}));
    let output = output_of(&mut specforge(&["compare", &a, &b, "--target", &other.to_string_lossy()]));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr_of(&output).contains("is not the target of"), "{}", stderr_of(&output));
    let output = output_of(&mut specforge(&["compare", &path("model/config.json"), &b]));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr_of(&output).contains("config.json: is not a trace\nhint: "), "{}", stderr_of(&output));
}
