//! Files with faults of every kind.

use std::fs;

use super::super::build::tests::tiny_tokenizer;
use super::super::mask::{Mask, Role};
use super::*;

const STRICT: &str = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}\
                      {{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
                      {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn kinds(groups: &[Group]) -> Vec<(&str, usize)> {
    groups.iter().map(|group| (group.kind.as_str(), group.count)).collect()
}

#[test]
fn every_fault_of_every_record_is_found_by_kind_and_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let good = r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}"#;
    let mut lines: Vec<Vec<u8>> = [
        good,
        // Two messages are wrong, and the tools, and the arguments: four faults of one record.
        r#"{"messages": [{"role": "martian", "content": "x"}, {"role": "user", "content": 3}], "tools": 3,
            "chat_template_kwargs": 4}"#,
        r#"{"messages": [{"role": "user", "content": "hi"}"#,
        "",
        r#"{"instruction": "i", "output": "o"}"#,
        r#"{"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}"#,
        r#"{"input_ids": [1, 2], "loss_mask": [1]}"#,
        r#"{"messages": "x"}"#,
        good,
        r#"{"id": "s", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "ho"}], "quality_weight": 3}"#,
        r#"{"messages": [{"role": "user", "content": "alone"}]}"#,
    ]
    .iter()
    .map(|line| line.replace('\n', " ").into_bytes())
    .collect();
    lines.push(b"{\"text\": \"\xff\"}".to_vec());
    fs::write(path("a.jsonl"), lines.join(&b'\n')).unwrap();
    fs::write(path("b.gz"), b"\x1f\x8b\x08").unwrap();
    fs::write(path("c.json"), "[\n{\"text\": \"x\"},\n{\"text\": ").unwrap();
    fs::write(path("d.jsonl"), "\n").unwrap();
    let paths = ["a.jsonl", "b.gz", "c.json", "d.jsonl", "gone.jsonl"].map(path);
    let look = |tokenizer: Option<&ChatTokenizer>, config: &DataConfig| {
        validate(&paths, tokenizer, config, 2, &|_, _| {}).unwrap()
    };
    let found = look(None, &DataConfig::default());
    let without_target = [
        ("file", 3),
        ("encoding", 1),
        ("json", 1),
        ("format", 1),
        ("messages", 1),
        ("role", 1),
        ("content", 1),
        ("tools", 1),
        ("training", 1),
        ("template_arguments", 1),
        ("tokens", 1),
    ];
    assert_eq!(kinds(&found.faults), without_target);
    assert_eq!((found.files, found.records, found.faulty, found.fault_count), (5, 11, 10, 13));
    assert_eq!(kinds(&found.warnings), [("passed_over", 1), ("untrained", 1), ("duplicate", 1), ("empty", 1)]);
    let line = |kind: &str| {
        let group = found.faults.iter().chain(&found.warnings).find(|group| group.kind == kind).unwrap();
        (group.examples[0].line, group.examples[0].problem.clone())
    };
    assert_eq!(line("json").0, Some(3));
    assert_eq!(line("role"), (Some(2), line("role").1));
    assert!(line("role").1.starts_with("message 1: unknown role `martian`"));
    assert_eq!(line("tokens").0, Some(7));
    assert!(line("duplicate").0 == Some(9) && line("duplicate").1.ends_with("a.jsonl:1"));
    assert!(
        line("file").0.is_none() && line("file").1.starts_with("is compressed with gzip and damaged behind 0 bytes")
    );
    // No more examples than asked for; all are counted.
    assert_eq!(found.faults[0].examples.len(), 2);
    assert_eq!((found.faults[0].examples[1].line, found.faults[0].count), (Some(3), 3));

    let tokenizer = tiny_tokenizer(STRICT);
    let found = look(Some(&tokenizer), &DataConfig { max_length: 12, ..DataConfig::default() });
    assert_eq!(kinds(&found.faults)[..11], without_target);
    assert_eq!(kinds(&found.faults)[11..], [("rendering", 1)]);
    assert_eq!(found.faults[11].examples[0].problem, "the chat template refuses it: no system here");
    assert_eq!((found.faults[11].examples[0].line, found.faulty), (Some(10), 11));
    let warnings = kinds(&found.warnings);
    // What is trained of the good ones stands behind the longest length.
    assert!(warnings.contains(&("long", 2)) && warnings.contains(&("untrained", 3)), "{warnings:?}");
    // What the mask chooses counts.
    let mask = Mask { roles: vec![Role::User], ..Mask::default() };
    let found = look(Some(&tokenizer), &DataConfig { mask, ..DataConfig::default() });
    assert!(!kinds(&found.warnings).iter().any(|(kind, _)| *kind == "untrained"), "{:?}", found.warnings);
}

#[test]
fn hostile_files_are_looked_at_without_a_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hostile");
    let deep = "[".repeat(100_000);
    let wide = format!("{{\"messages\": [{}]}}", vec!["{\"role\": \"user\", \"content\": 1}"; 5000].join(","));
    for content in [
        deep.as_bytes(),
        b"\xef\xbb\xbf",
        b"{}\n{}{}\n[]\n[[]]\n[{}]\nnull\n\"x\"\n{\"messages\": [[]]}",
        b"\x00\x00\n\xff\xfe\n{\"messages\": null}\n{\"turns\": [1]}",
        b"{\"input_ids\": [99999999999999999999], \"loss_mask\": [1e400]}",
        b"{\"messages\": [{\"role\": \"assistant\", \"tool_calls\": [1, {\"function\": 3}, {\"function\": {\"name\": 3}}]}]}",
        wide.as_bytes(),
    ] {
        fs::write(&path, content).unwrap();
        let tokenizer = tiny_tokenizer(STRICT);
        for tokenizer in [None, Some(&tokenizer)] {
            let mask = Mask { tool_calls: false, reasoning: false, ..Mask::default() };
            let config = DataConfig { mask, ..DataConfig::default() };
            let found = validate(std::slice::from_ref(&path), tokenizer, &config, 3, &|_, _| {}).unwrap();
            assert!(found.faults.iter().all(|group| group.examples.len() <= 3));
        }
    }
    // Every message of the last is a fault.
    let found = validate(&[path], None, &DataConfig::default(), 3, &|_, _| {}).unwrap();
    assert_eq!((found.faulty, found.fault_count, found.faults[0].count), (1, 5000, 5000));
}
