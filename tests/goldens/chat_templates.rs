//! Chat templates as transformers renders them: text, token ids, what is refused, and what the assistant says.
//!
//! Token ids need the tokenizers, which are large: `SPECFORGE_TOKENIZERS=DIR` names the folder that holds
//! `<name>/tokenizer.json`. Without it the text and the spans alone are compared.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use specforge::data::loss_mask::{Method, render_supervised, token_mask};
use specforge::data::{ChatTokenizer, Conversation, Mask, Message, Supervise, mask_runs};

#[derive(Deserialize)]
struct Golden {
    name: String,
    chat_template: String,
    special_tokens: Map<String, Value>,
    strftime_now: String,
    cases: Vec<Case>,
}

/// Spans are of code points, `[start, end)`.
#[derive(Deserialize)]
struct Case {
    id: String,
    messages: Vec<Map<String, Value>>,
    tools: Option<Value>,
    template_kwargs: Option<Map<String, Value>>,
    rendered: Option<String>,
    error: Option<Refusal>,
    rendered_generation_prompt: Option<String>,
    error_generation_prompt: Option<Refusal>,
    token_ids: Option<Vec<u32>>,
    token_ids_generation_prompt: Option<Vec<u32>>,
    assistant_spans_per_turn: Option<Vec<Option<(usize, usize)>>>,
    assistant_spans: Option<Vec<(usize, usize)>>,
    assistant_token_ranges: Option<Vec<(usize, usize)>>,
    straddling_tokens: Option<usize>,
    hf_generation_spans: Option<Vec<(usize, usize)>>,
}

#[derive(Deserialize)]
struct Refusal {
    kind: String,
}

/// How many of each were compared.
#[derive(Default)]
struct Compared {
    texts: usize,
    refusals: usize,
    ids: usize,
    spans: usize,
    masks: usize,
    fanned_out: usize,
}

pub(super) fn check(path: &Path) -> Result<String, String> {
    let (_, Compared { texts, refusals, ids, spans, masks, fanned_out }) = compare(path)?;
    let ids = match masks + ids {
        0 => "token ids skipped: set SPECFORGE_TOKENIZERS".to_owned(),
        _ => format!("{ids} lists of token ids, {masks} masks"),
    };
    Ok(format!("{texts} texts, {refusals} refusals, {spans} conversations' spans, {fanned_out} turn by turn, {ids}"))
}

/// Everything that a file holds against what this program makes of it.
fn compare(path: &Path) -> Result<(Golden, Compared), String> {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    let golden: Golden = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let real = std::env::var_os("SPECFORGE_TOKENIZERS").map(|all| Path::new(&all).join(&golden.name));
    let real = real.map(|folder| folder.join("tokenizer.json")).filter(|file| file.is_file());
    let tokenizer = tokenizer(&golden, real.as_deref(), folder.path()).map_err(|error| error.to_string())?;
    let (mut compared, mut problems) = (Compared::default(), Vec::new());
    for case in &golden.cases {
        if let Err(problem) = check_case(&tokenizer, case, real.is_some(), &mut compared) {
            problems.push(format!("{}: {problem}", case.id));
        }
    }
    if !problems.is_empty() {
        return Err(problems.join("\n    "));
    }
    Ok((golden, compared))
}

/// The table of docs/data.md: what was compared of each template, all of it equal.
fn table(folder: &Path) -> String {
    let mut rows = vec![
        "| template | texts | refusals | spans of the assistant | how they are found | documents |".to_owned(),
        "| --- | --- | --- | --- | --- | --- |".to_owned(),
    ];
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    paths.sort();
    for path in paths {
        let (golden, compared) = compare(&path).unwrap();
        let is_marked = ["generation %}", "generation -%}"].iter().any(|mark| golden.chat_template.contains(mark));
        let how = if is_marked { "its own marks" } else { "where rendering goes on" };
        let documents = match compared.fanned_out {
            0 => "one a conversation".to_owned(),
            count => format!("one a turn in {count}, whose earlier turns it changes"),
        };
        let Compared { texts, refusals, spans, .. } = compared;
        rows.push(format!("| `{}` | {texts} | {refusals} | {spans} | {how} | {documents} |", golden.name));
    }
    rows.join("\n") + "\n"
}

/// `INSTA_UPDATE=always` writes the table anew, as it does snapshots.
#[test]
fn the_documentation_has_the_table_of_templates() {
    const MARKS: [&str; 2] = ["<!-- templates: written by a test -->\n", "<!-- end of templates -->\n"];
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let shared = root.join("../shared/goldens/templates");
    if !shared.is_dir() {
        eprintln!("SKIPPED the table of templates: the reference renderings are not here");
        return;
    }
    let path = root.join("docs/data.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(MARKS[0]).unwrap();
    let (got, after) = rest.split_once(MARKS[1]).unwrap();
    let want = table(&shared);
    if std::env::var("INSTA_UPDATE").is_ok_and(|update| update == "always") {
        std::fs::write(&path, [before, MARKS[0], &want, MARKS[1], after].concat()).unwrap();
        return;
    }
    assert!(got == want, "docs/data.md: expected\n{want}");
}

/// A model folder with the template, and with the real tokenizer or one that only knows its special tokens.
fn tokenizer(golden: &Golden, real: Option<&Path>, folder: &Path) -> Result<ChatTokenizer, Box<dyn std::error::Error>> {
    let file = folder.join("tokenizer.json");
    match real {
        Some(real) => drop(std::fs::copy(real, &file)?),
        None => {
            let texts = golden.special_tokens.values().filter_map(Value::as_str);
            let added: Vec<Value> = (1..)
                .zip(texts.collect::<std::collections::BTreeSet<_>>())
                .map(|(id, text)| {
                    json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                           "normalized": false, "special": true})
                })
                .collect();
            let model = json!({"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"});
            std::fs::write(&file, json!({"version": "1.0", "added_tokens": added, "model": model}).to_string())?;
        }
    }
    let mut config = golden.special_tokens.clone();
    config.insert("chat_template".to_owned(), golden.chat_template.as_str().into());
    std::fs::write(folder.join("tokenizer_config.json"), Value::Object(config).to_string())?;
    let day = golden.strftime_now.get(..10).unwrap_or_default();
    let arguments = Map::from_iter([("strftime_now".to_owned(), day.into())]);
    Ok(ChatTokenizer::load(folder, None)?.with_template_arguments(arguments))
}

fn check_case(tokenizer: &ChatTokenizer, case: &Case, real: bool, compared: &mut Compared) -> Result<(), String> {
    let conversation = Conversation {
        id: case.id.clone(),
        messages: case.messages.iter().map(message).collect::<Result<_, _>>()?,
        tools: case.tools.clone(),
        template_arguments: case.template_kwargs.clone().unwrap_or_default(),
    };
    let prepared = tokenizer.prepare_conversation(&conversation).map_err(|error| error.to_string())?;
    let count = conversation.messages.len();
    for (prompt, want, ids, refusal) in [
        (false, &case.rendered, &case.token_ids, &case.error),
        (true, &case.rendered_generation_prompt, &case.token_ids_generation_prompt, &case.error_generation_prompt),
    ] {
        let got = prepared.render(count, prompt);
        match (want, got) {
            (Some(want), Ok(got)) => {
                if *want != got {
                    return Err(format!("generation prompt {prompt}: {}", difference(want, &got)));
                }
                compared.texts += 1;
                if let Some(ids) = ids.as_ref().filter(|_| real) {
                    let got = tokenizer.encode(&got).map_err(|error| error.to_string())?;
                    if *ids != got {
                        let same = ids.iter().zip(&got).take_while(|(want, got)| want == got).count();
                        return Err(format!("generation prompt {prompt}: token {same} of {} differs", ids.len()));
                    }
                    compared.ids += 1;
                }
            }
            (Some(_), Err(error)) => return Err(format!("generation prompt {prompt}: refused: {error}")),
            (None, Ok(_)) if refusal.as_ref().is_some_and(|refusal| refusal.kind == "raise_exception") => {
                return Err(format!("generation prompt {prompt}: rendered, where the template refuses"));
            }
            (None, Ok(_)) => (),
            (None, Err(_)) => compared.refusals += 1,
        }
    }
    let Some(rendered) = &case.rendered else { return Ok(()) };
    check_spans(tokenizer, &conversation, case, rendered, real, compared)
}

fn check_spans(
    tokenizer: &ChatTokenizer,
    conversation: &Conversation,
    case: &Case,
    rendered: &str,
    real: bool,
    compared: &mut Compared,
) -> Result<(), String> {
    let found = render_supervised(tokenizer, conversation, Supervise::Assistant, &Mask::default());
    // Thoughts that a template leaves out are refused. Without them it writes the same text.
    let found = found.or_else(|error| {
        match render_supervised(tokenizer, &unthinking(conversation), Supervise::Assistant, &Mask::default()) {
            Ok(found) if error.to_string().contains("leaves out a part") => Ok(found),
            _ => Err(error),
        }
    });
    let (documents, method) = match found {
        Ok(found) => found,
        // A conversation whose turns cannot be told from its text is refused.
        Err(_) if case.assistant_spans.is_none() => return Ok(()),
        Err(error) => return Err(format!("spans: {error}")),
    };
    let bytes = |(start, end): (usize, usize)| {
        let byte = |point: usize| rendered.char_indices().nth(point).map_or(rendered.len(), |(byte, _)| byte);
        byte(start)..byte(end)
    };
    let want = match method {
        Method::RenderBoundaries => &case.assistant_spans,
        Method::GenerationBlocks => &case.hf_generation_spans,
        Method::FanOut => {
            // The document of the last turn is the conversation as it was rendered, where nothing follows it.
            let (Some(last), Some(Some(want))) =
                (documents.last(), case.assistant_spans_per_turn.as_ref().and_then(|turns| turns.last()))
            else {
                return Ok(());
            };
            let (want, start) = (bytes(*want), last.spans[0].range.start);
            if conversation.messages.last().is_some_and(Message::is_assistant) && start != want.start {
                return Err(format!("the last turn begins at byte {start}, expected {}", want.start));
            }
            compared.fanned_out += 1;
            return Ok(());
        }
    };
    let ([document], Some(want)) = (documents.as_slice(), want) else { return Ok(()) };
    if !rendered.starts_with(&document.text) {
        return Err(format!("the document is another text: {}", difference(rendered, &document.text)));
    }
    if document.spans.len() != want.len() {
        return Err(format!("{} turns are trained, expected {}", document.spans.len(), want.len()));
    }
    for (span, want) in document.spans.iter().zip(want) {
        let (got, want) = (&span.range, bytes(*want));
        // Behind the end of turn a template may write more, which the mask leaves out.
        if got.start != want.start || got.end < want.end {
            return Err(format!("bytes {got:?} are trained, expected {want:?}"));
        }
    }
    compared.spans += 1;
    let Some(ranges) = case.assistant_token_ranges.as_ref().filter(|_| real && method == Method::RenderBoundaries)
    else {
        return Ok(());
    };
    let encoded = tokenizer.encode_with_offsets(&document.text).map_err(|error| error.to_string())?;
    let mask = token_mask(tokenizer, &document.text, &encoded, &document.spans);
    let trained = mask_runs(&mask).into_iter().filter(|(trained, _)| *trained).map(|(_, run)| (run.start, run.end));
    let trained: Vec<(usize, usize)> = trained.collect();
    if case.straddling_tokens == Some(0) && trained != *ranges {
        return Err(format!("tokens {trained:?} are trained, expected {ranges:?}"));
    }
    compared.masks += 1;
    Ok(())
}

/// The same without thoughts.
fn unthinking(conversation: &Conversation) -> Conversation {
    let mut conversation = conversation.clone();
    for message in &mut conversation.messages {
        message.extra.retain(|key, _| !matches!(key.as_str(), "reasoning_content" | "thinking"));
    }
    conversation
}

/// A message as it is written: nothing is read into it.
fn message(written: &Map<String, Value>) -> Result<Message, String> {
    let mut extra = written.clone();
    let role = extra.remove("role").and_then(|role| role.as_str().map(str::to_owned)).ok_or("a message has no role")?;
    let content = match extra.remove("content") {
        Some(Value::String(text)) => Some(text),
        None | Some(Value::Null) => None,
        Some(other) => return Err(format!("content that is no text: {other}")),
    };
    let mut message = Message::new(role, content.clone().unwrap_or_default());
    message.content = content;
    message.extra = extra;
    Ok(message)
}

fn difference(want: &str, got: &str) -> String {
    let same = want.chars().zip(got.chars()).take_while(|(want, got)| want == got).count();
    let around = |text: &str| text.chars().skip(same.saturating_sub(20)).take(60).collect::<String>();
    format!("expected …{:?}, got …{:?}", around(want), around(got))
}
