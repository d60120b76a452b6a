//! What an evaluation asks: the question files of EAGLE and Spec-Bench (`turns`), plain prompts, conversations.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::data::conversation::{
    Conversation, Message, Rejections, Sample, parse_sample, record_name, template_arguments,
};
use crate::data::reader::SourceFile;
use crate::error::{Error, Result};

/// One conversation to hold: the user's turns, each asked once the one before it is answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// Its own id, or file and line.
    pub id: String,
    /// Name of the file it is from, with its category where the file has several.
    pub dataset: String,
    /// What stands before the first turn, such as a system message.
    pub before: Vec<Message>,
    /// What the user says, in order.
    pub turns: Vec<String>,
    /// Tools the assistant may call.
    pub tools: Option<Value>,
    /// Values that the record gives its template.
    pub template_arguments: Map<String, Value>,
}

/// Reads files of questions, the first `limit` of each. Lines that cannot be used are an error that names them.
pub fn read(paths: &[PathBuf], limit: Option<usize>) -> Result<Vec<Question>> {
    let mut questions = Vec::new();
    for path in paths {
        let source = SourceFile::open(path)?;
        let mut rejections = Rejections { total: source.records().len(), ..Rejections::default() };
        let mut found: Vec<(Question, String)> = Vec::new();
        for record in source.records().iter().take(limit.unwrap_or(usize::MAX)) {
            match parse(source.record(record), path, record.line) {
                Ok(question) => found.push(question),
                Err(problem) => rejections.push(path, record.line, problem),
            }
        }
        rejections.check(0.0)?;
        if found.is_empty() {
            return Err(Error::bad_file(path, "holds no questions")
                .with_hint(r#"write one {"turns": ["..."]}, {"prompt": "..."} or {"messages": [...]} a line"#));
        }
        let categories: BTreeSet<&String> = found.iter().map(|(_, category)| category).collect();
        let several = categories.len() > 1;
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        questions.extend(found.into_iter().map(|(question, category)| {
            let dataset = if several { format!("{stem}/{category}") } else { stem.clone() };
            Question { dataset, ..question }
        }));
    }
    Ok(questions)
}

/// A question and its category.
fn parse(bytes: &[u8], path: &Path, line: usize) -> Result<(Question, String), String> {
    let fallback = || record_name(path, line);
    let value: Value = serde_json::from_slice(bytes).unwrap_or(Value::Null);
    let text = |key: &str| value.get(key).and_then(Value::as_str);
    let category = text("category").unwrap_or("other").to_owned();
    // A prompt alone, and GSM8K's own files, are no training samples but are questions.
    let alone = text("prompt").filter(|_| value.get("completion").is_none()).or_else(|| text("question"));
    let question = |id, before, turns| Question {
        id,
        dataset: String::new(),
        before,
        turns,
        tools: None,
        template_arguments: Map::new(),
    };
    if let (Some(prompt), false) = (alone, value.get("messages").is_some()) {
        let id = value.get("id").or_else(|| value.get("question_id")).map_or_else(fallback, |id| match id {
            Value::String(id) => id.clone(),
            other => other.to_string(),
        });
        let template_arguments =
            template_arguments(value.get("chat_template_kwargs").filter(|value| !value.is_null()))?;
        let question = question(id, Vec::new(), vec![prompt.to_owned()]);
        return Ok((Question { template_arguments, ..question }, category));
    }
    match parse_sample(bytes, fallback)? {
        Sample::Conversation(Conversation { id, messages, tools, template_arguments }) => {
            let (user, others): (Vec<_>, Vec<_>) = messages.into_iter().partition(|message| message.role == "user");
            let turns: Vec<String> = user.into_iter().filter_map(|message| message.content).collect();
            let before = others.into_iter().filter(|message| ["system", "developer"].contains(&message.role.as_str()));
            match turns.is_empty() {
                true => Err("holds nothing that the user says".to_owned()),
                false => {
                    let question = question(id, before.collect(), turns);
                    Ok((Question { tools, template_arguments, ..question }, category))
                }
            }
        }
        Sample::Completion { id, prompt, .. } => Ok((question(id, Vec::new(), vec![prompt]), category)),
        Sample::Text { .. } => Err("expected `turns`, `prompt` or `messages`, got `text`".to_owned()),
        Sample::Tokens { .. } => Err("expected `turns`, `prompt` or `messages`, got `input_ids`".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(lines: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bench.jsonl");
        std::fs::write(&path, lines).unwrap();
        (folder, path)
    }

    #[test]
    fn the_usual_formats_are_read() {
        let (_folder, path) = write(concat!(
            "{\"question_id\": 81, \"category\": \"writing\", \"turns\": [\"One?\", \"Two?\"], \"reference\": []}\n",
            "{\"question_id\": 400, \"category\": \"qa\", \"turns\": [\"Three?\"]}\n",
            "{\"prompt\": \"Four?\", \"category\": \"qa\"}\n",
            "{\"question\": \"Five?\", \"answer\": \"5\"}\n",
            "{\"messages\": [{\"role\": \"system\", \"content\": \"Be brief.\"}, {\"role\": \"user\", \"content\": \"Six?\"}, ",
            "{\"role\": \"assistant\", \"content\": \"6\"}, {\"role\": \"user\", \"content\": \"Seven?\"}], ",
            "\"chat_template_kwargs\": {\"thinking\": false}, \"tools\": [{\"name\": \"f\"}]}\n",
        ));
        let questions = read(std::slice::from_ref(&path), None).unwrap();
        let shown: Vec<(&str, &str, Vec<&str>)> = questions
            .iter()
            .map(|one| (one.id.as_str(), one.dataset.as_str(), one.turns.iter().map(String::as_str).collect()))
            .collect();
        assert_eq!(
            shown,
            [
                ("81", "bench/writing", vec!["One?", "Two?"]),
                ("400", "bench/qa", vec!["Three?"]),
                ("bench.jsonl:3", "bench/qa", vec!["Four?"]),
                ("bench.jsonl:4", "bench/other", vec!["Five?"]),
                ("bench.jsonl:5", "bench/other", vec!["Six?", "Seven?"]),
            ]
        );
        assert_eq!(questions[4].before, [Message::new("system", "Be brief.")]);
        assert_eq!(questions[4].template_arguments["thinking"], false);
        assert!(questions[4].tools.is_some() && questions[3].tools.is_none());
        assert_eq!(read(&[path], Some(1)).unwrap()[0].dataset, "bench");
    }

    #[test]
    fn what_is_no_question_is_named() {
        let (_folder, path) = write("{\"prompt\": \"Fine?\"}\n{\"text\": \"no\"}\n{\"turns\": []}\n");
        let message = read(&[path], None).unwrap_err().to_string();
        assert!(message.contains("bench.jsonl:2") && message.contains("bench.jsonl:3"), "{message}");
    }
}
