//! The model's own chat template, rendered as transformers renders it (`utils/chat_template_utils.py`, 5.8).
//!
//! `{% generation %}` blocks mark what the assistant says. Rendered plainly they print their body; rendered with marks,
//! the body stands between two sequences of private-use characters, which are taken out again and leave the spans behind.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value as Json};

use super::conversation::Message;
use super::jinja::{self, Beginning, Context, Day, Fault, Limits, Value};
use crate::error::{Error, Result, foreign};

/// `strftime_now` answers this day, the one Llama's templates fall back to: the same data must give the same tokens
/// tomorrow. A template argument called [`DAY_ARGUMENT`] names another.
const TEMPLATE_DAY: Day = Day { year: 2024, month: 7, day: 26 };

const DAY_ARGUMENT: &str = "strftime_now";

const OPEN_MARK: &str = "\u{f8d0}\u{f8f1}\u{f8d2}";
const CLOSE_MARK: &str = "\u{f8d3}\u{f8f4}\u{f8d5}";

/// The one most templates go by, and the one for conversations with tools.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// Where a template was found and what it says; several where the model has one for tools.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateSource {
    /// The file.
    pub path: PathBuf,
    /// Name and text.
    pub templates: BTreeMap<String, String>,
}

impl TemplateSource {
    /// Looks in a model folder, or takes the given file instead. None if the folder has no template.
    pub fn find(
        model_dir: &Path,
        replacement: Option<&Path>,
        tokenizer_config: &Map<String, Json>,
    ) -> Result<Option<Self>> {
        if let Some(path) = replacement {
            return Self::read(path).map(Some);
        }
        let own_file = model_dir.join("chat_template.jinja");
        if own_file.is_file() {
            let mut found = Self::read(&own_file)?;
            found.add_folder(&model_dir.join("additional_chat_templates"))?;
            return Ok(Some(found));
        }
        if let Some(value) = tokenizer_config.get("chat_template").filter(|value| !value.is_null()) {
            return Self::from_json(&model_dir.join("tokenizer_config.json"), value).map(Some);
        }
        let old_file = model_dir.join("chat_template.json");
        if old_file.is_file() { Self::read(&old_file).map(Some) } else { Ok(None) }
    }

    fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        // Written as JSON, the file is an object with the template in it.
        match serde_json::from_str::<Map<String, Json>>(&text) {
            Ok(object) if object.contains_key("chat_template") => Self::from_json(path, &object["chat_template"]),
            _ => Ok(Self { path: path.to_path_buf(), templates: BTreeMap::from([(DEFAULT.to_owned(), text)]) }),
        }
    }

    fn add_folder(&mut self, folder: &Path) -> Result<()> {
        if !folder.is_dir() {
            return Ok(());
        }
        for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
            let path = entry.map_err(Error::io("read", folder))?.path();
            if let (Some(name), Some("jinja")) = (path.file_stem(), path.extension().and_then(|end| end.to_str())) {
                let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
                self.templates.insert(name.to_string_lossy().into_owned(), text);
            }
        }
        Ok(())
    }

    /// A string, or a list of `{name, template}`.
    fn from_json(path: &Path, value: &Json) -> Result<Self> {
        let wrong = || Error::bad_file(path, "`chat_template`: expected a string or a list of {name, template}");
        let templates = match value {
            Json::String(text) => BTreeMap::from([(DEFAULT.to_owned(), text.clone())]),
            Json::Array(list) => {
                let pair = |entry: &Json| {
                    let (name, template) = (entry.get("name")?.as_str()?, entry.get("template")?.as_str()?);
                    Some((name.to_owned(), template.to_owned()))
                };
                list.iter().map(pair).collect::<Option<_>>().ok_or_else(wrong)?
            }
            _ => return Err(wrong()),
        };
        if !templates.contains_key(DEFAULT) {
            let names = foreign::listed(templates.keys(), 8);
            let problem = format!("`chat_template` lists [{names}], expected one called `{DEFAULT}`");
            return Err(
                Error::bad_file(path, problem).with_hint("name one file with --chat-template or data.chat_template")
            );
        }
        Ok(Self { path: path.to_path_buf(), templates })
    }
}

/// A compiled template.
#[derive(Debug)]
pub struct ChatTemplate {
    templates: BTreeMap<String, jinja::Template>,
    path: PathBuf,
    /// Special tokens by the names templates use, then the user's own arguments.
    globals: Map<String, Json>,
}

impl ChatTemplate {
    /// Compiles it. `special_tokens` are `bos_token`, `eos_token` and so on.
    pub fn new(source: &TemplateSource, special_tokens: Map<String, Json>) -> Result<Self> {
        let compile = |(name, text): (&String, &String)| match jinja::compile(text) {
            Ok(template) => Ok((name.clone(), template)),
            Err(fault) => {
                let problem = format!("the chat template `{name}` is not valid: {}", fault.text());
                Err(Error::bad_file(&source.path, problem)
                    .with_hint("correct it, or name another with --chat-template or data.chat_template"))
            }
        };
        let templates = source.templates.iter().map(compile).collect::<Result<_>>()?;
        Ok(Self { templates, path: source.path.clone(), globals: special_tokens })
    }

    /// Adds values every rendering is given.
    pub fn add_arguments(&mut self, arguments: &Map<String, Json>) {
        self.globals.extend(arguments.clone());
    }

    /// A conversation, ready to be rendered many times.
    pub fn prepare(&self, messages: &[Message], tools: Option<&Json>) -> Result<Prepared<'_>> {
        let value = |json: &Json| Value::from_json(json).map_err(|fault| self.failure(&fault, 0));
        let mut bytes = tools.map_or(0, size_of_json);
        let (mut list, mut as_text, mut calls) = (Vec::with_capacity(messages.len()), Vec::new(), false);
        for message in messages {
            let mut json = serde_json::to_value(message).map_err(|error| Error::Failed(error.to_string()))?;
            bytes += size_of_json(&json);
            list.push(value(&json)?);
            calls |= self.write_arguments(message, &mut json)?;
            as_text.push(json);
        }
        let (mut globals, mut day) = (Context::new(), TEMPLATE_DAY);
        for (key, json) in &self.globals {
            if key == DAY_ARGUMENT {
                day = day_of(json)?;
                continue;
            }
            bytes += size_of_json(json);
            globals.insert(Arc::from(key.as_str()), value(json)?);
        }
        globals.insert(Arc::from("tools"), tools.map_or(Ok(Value::None), value)?);
        globals.insert(Arc::from("documents"), Value::None);
        let has_tools = tools.is_some() && self.templates.contains_key(TOOL_USE);
        let name = if has_tools { TOOL_USE } else { DEFAULT };
        let Some(compiled) = self.templates.get(name) else {
            return Err(Error::bad_file(&self.path, format!("has no template `{name}`")));
        };
        let mut prepared =
            Prepared { template: self, compiled, messages: list, globals, day, bytes, renderings: Cell::new(0) };
        if calls && prepared.render(messages.len(), false).is_err() {
            // Some templates glue arguments into their text: these must be strings.
            let as_text = as_text.iter().map(value).collect::<Result<Vec<_>>>()?;
            let objects = std::mem::replace(&mut prepared.messages, as_text);
            if prepared.render(messages.len(), false).is_err() {
                prepared.messages = objects;
            }
        }
        prepared.renderings.set(0);
        Ok(prepared)
    }

    /// Turns the arguments of tool calls into strings of JSON: those of the file, else what `json.dumps` writes. Says
    /// whether there were any.
    fn write_arguments(&self, message: &Message, json: &mut Json) -> Result<bool> {
        let Some(Json::Array(calls)) = json.get_mut("tool_calls") else { return Ok(false) };
        let mut any = false;
        for (index, call) in calls.iter_mut().enumerate() {
            let call = if call.get("function").is_some() { &mut call["function"] } else { call };
            if let Some(arguments) = call.get_mut("arguments").filter(|arguments| arguments.is_object()) {
                let text = match message.written_arguments.get(index) {
                    Some(Some(written)) => written.clone(),
                    _ => jinja::dumps(arguments).map_err(|fault| self.failure(&fault, 0))?,
                };
                *arguments = Json::String(text);
                any = true;
            }
        }
        Ok(any)
    }

    /// The template's own words where it has some, else what went wrong and on which line. What takes too much ends the
    /// work: the next conversation would take it too.
    fn failure(&self, fault: &Fault, line: usize) -> Error {
        let place = if line > 0 { format!(" (line {line})") } else { String::new() };
        match fault {
            Fault::Raised(words) => {
                Error::Failed(format!("the chat template refuses it: {}", foreign::one_line(words)))
            }
            Fault::Failed(problem) => {
                Error::Failed(format!("the chat template of {} fails: {problem}{place}", self.path.display()))
            }
            Fault::Limit(problem) => {
                Error::bad_file(&self.path, format!("the chat template is not usable: {problem}{place}"))
                    .with_hint("correct it, or name another with --chat-template or data.chat_template")
            }
        }
    }
}

/// The day that a template argument names.
fn day_of(json: &Json) -> Result<Day> {
    json.as_str().and_then(Day::parse).ok_or_else(|| {
        let problem =
            format!("the template argument `{DAY_ARGUMENT}`: expected a day such as \"2024-07-26\", got {json}");
        Error::Failed(problem)
    })
}

/// About how many bytes a value takes when it is printed.
fn size_of_json(json: &Json) -> usize {
    match json {
        Json::String(text) => text.len() + 8,
        Json::Array(list) => list.iter().map(size_of_json).sum::<usize>() + 8,
        Json::Object(object) => object.iter().map(|(key, value)| key.len() + size_of_json(value)).sum::<usize>() + 8,
        _ => 8,
    }
}

/// A conversation and its template.
#[derive(Debug)]
pub struct Prepared<'a> {
    template: &'a ChatTemplate,
    compiled: &'a jinja::Template,
    messages: Vec<Value>,
    /// What every rendering is given besides the messages.
    globals: Context,
    day: Day,
    bytes: usize,
    renderings: Cell<usize>,
}

/// A rendered text and the byte ranges its template marks as generated.
pub type Marked = (String, Vec<Range<usize>>);

impl Prepared<'_> {
    /// The same, with values that only this conversation gives its template; they replace the others.
    pub fn with_arguments(mut self, arguments: &Map<String, Json>) -> Result<Self> {
        for (key, json) in arguments {
            if key == DAY_ARGUMENT {
                self.day = day_of(json)?;
                continue;
            }
            let value = Value::from_json(json).map_err(|fault| self.template.failure(&fault, 0))?;
            self.bytes += size_of_json(json);
            self.globals.insert(Arc::from(key.as_str()), value);
        }
        Ok(self)
    }

    /// Renders the first `count` messages.
    pub fn render(&self, count: usize, add_generation_prompt: bool) -> Result<String> {
        self.render_with(None, count, add_generation_prompt)
    }

    /// Renders the first `count` messages and says what the template's generation blocks enclose. None if it has no
    /// such blocks, or if marking them changes the text.
    pub fn render_marked(&self, count: usize) -> Result<Option<Marked>> {
        if !self.compiled.has_generation {
            return Ok(None);
        }
        let plain = self.render(count, false)?;
        if plain.contains(OPEN_MARK) || plain.contains(CLOSE_MARK) {
            return Ok(None);
        }
        let marked = self.render_with(Some((OPEN_MARK, CLOSE_MARK)), count, false)?;
        Ok(take_out_marks(&marked).filter(|(text, _)| *text == plain))
    }

    /// Renders the first `count` messages, and in the same pass beginnings of them: `wanted` says how many messages, in
    /// ascending order, and whether with a generation prompt. None for the beginnings if the template looks ahead.
    pub(super) fn render_with_beginnings(
        &self,
        count: usize,
        wanted: Vec<(usize, bool)>,
    ) -> Result<(String, Option<Vec<Beginning>>)> {
        let (context, limits) = self.context(count, false)?;
        let rendered = jinja::render_with_beginnings(self.compiled, &context, wanted, &limits, self.day);
        rendered.map_err(|(fault, line)| self.template.failure(&fault, line))
    }

    /// How many times the template ran from its start.
    #[cfg(test)]
    pub(super) fn renderings(&self) -> usize {
        self.renderings.get()
    }

    fn render_with(&self, marks: Option<(&str, &str)>, count: usize, add_generation_prompt: bool) -> Result<String> {
        let (context, limits) = self.context(count, add_generation_prompt)?;
        let rendered = jinja::render(self.compiled, &context, marks, &limits, self.day);
        rendered.map_err(|(fault, line)| self.template.failure(&fault, line))
    }

    fn context(&self, count: usize, add_generation_prompt: bool) -> Result<(Context, Limits)> {
        self.renderings.set(self.renderings.get() + 1);
        let mut context = self.globals.clone();
        let messages = self.messages[..count.min(self.messages.len())].to_vec();
        let messages = Value::list(messages).map_err(|fault| self.template.failure(&fault, 0))?;
        context.insert(Arc::from("messages"), messages);
        context.insert(Arc::from("add_generation_prompt"), Value::Bool(add_generation_prompt));
        Ok((context, Limits::new(self.bytes)))
    }
}

/// The text without marks, and what they enclosed. None if they do not pair up.
fn take_out_marks(marked: &str) -> Option<Marked> {
    let (mut text, mut spans) = (String::with_capacity(marked.len()), Vec::new());
    let mut pieces = marked.split(OPEN_MARK);
    text.push_str(pieces.next()?);
    for piece in pieces {
        let (inside, outside) = piece.split_once(CLOSE_MARK)?;
        spans.push(text.len()..text.len() + inside.len());
        text.push_str(inside);
        text.push_str(outside);
    }
    (!text.contains(CLOSE_MARK)).then_some((text, spans))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A template from its text, with `<s>` and `</s>` as special tokens.
    pub(in crate::data) fn template(text: &str) -> ChatTemplate {
        let templates = BTreeMap::from([(DEFAULT.to_owned(), text.to_owned())]);
        let source = TemplateSource { path: PathBuf::from("test.jinja"), templates };
        let special = Map::from_iter([("bos_token".to_owned(), "<s>".into()), ("eos_token".to_owned(), "</s>".into())]);
        ChatTemplate::new(&source, special).unwrap()
    }

    fn dialogue() -> Vec<Message> {
        vec![Message::new("user", "hi"), Message::new("assistant", "ho"), Message::new("user", "hu")]
    }

    #[test]
    fn white_space_special_tokens_and_loop_controls() {
        let text = "{{ bos_token }}\n{% for message in messages %}\n  {% if loop.index > 2 %}\n    {% break %}\n  \
                    {% endif %}\n{{ message.role }}: {{ message['content'] | trim }}\n{% endfor %}\n{% if \
                    add_generation_prompt %}>{% endif %}\n";
        let compiled = template(text);
        let prepared = compiled.prepare(&dialogue(), None).unwrap();
        assert_eq!(prepared.render(3, true).unwrap(), "<s>\nuser: hi\nassistant: ho\n>");
        assert_eq!(prepared.render(1, false).unwrap(), "<s>\nuser: hi\n");
    }

    #[test]
    fn refusals_are_told_in_the_templates_words() {
        let compiled =
            template("{% if messages | length > 1 %}{{ raise_exception('roles must alternate') }}{% endif %}");
        let prepared = compiled.prepare(&dialogue(), None).unwrap();
        assert!(prepared.render(1, false).is_ok());
        let message = prepared.render(2, false).unwrap_err().to_string();
        assert_eq!(message, "the chat template refuses it: roles must alternate");
        let compiled = template("{{ messages[0].missing.key }}");
        let message = compiled.prepare(&dialogue(), None).unwrap().render(1, false).unwrap_err().to_string();
        assert!(message.contains("test.jinja fails: undefined value"), "{message}");
        let source = TemplateSource {
            path: PathBuf::from("x.jinja"),
            templates: BTreeMap::from([(DEFAULT.to_owned(), "{% for %}".to_owned())]),
        };
        let message = ChatTemplate::new(&source, Map::new()).unwrap_err().to_string();
        assert!(message.contains("x.jinja: the chat template `default` is not valid"), "{message}");
    }

    #[test]
    fn generation_blocks_give_spans() {
        let text = "{%- for message in messages %}{{ message.role }}:\n{%- if message.role == 'assistant' %}\n\
                    {%- generation -%}\n  {{ message.content }}<e>\n  {%- endgeneration %}\n\
                    {% else %}{{ message.content }}{% endif %}\n{% endfor %}";
        let compiled = template(text);
        let prepared = compiled.prepare(&dialogue(), None).unwrap();
        let (text, spans) = prepared.render_marked(3).unwrap().unwrap();
        assert_eq!(text, prepared.render(3, false).unwrap());
        assert_eq!(text, "user:hiassistant:ho<e>user:hu");
        assert_eq!(spans.into_iter().map(|span| &text[span]).collect::<Vec<_>>(), ["ho<e>"]);
        let plain = template("{{ messages[0].content }}");
        assert!(plain.prepare(&dialogue(), None).unwrap().render_marked(1).unwrap().is_none());
    }

    #[test]
    fn generation_blocks_may_assign_to_a_namespace_outside() {
        let text = "{% set ns = namespace(n=0) %}{% for m in messages %}{% generation %}{% set ns.n = ns.n + 1 %}\
                    {{ loop.index }}{% endgeneration %}{% endfor %}{{ ns.n }}";
        let compiled = template(text);
        let (text, spans) = compiled.prepare(&dialogue(), None).unwrap().render_marked(3).unwrap().unwrap();
        assert_eq!((text.as_str(), spans), ("1233", vec![0..1, 1..2, 2..3]));
    }

    #[test]
    fn nothing_is_not_iterable() {
        let text = "{{ tools is iterable }} {{ 'a' is iterable }} {{ 'a' is sequence }} {{ 1 is sequence }} {{ x is iterable }}";
        assert_eq!(template(text).prepare(&[], None).unwrap().render(0, false).unwrap(), "False True True False True");
    }

    /// A template without end is no fault of one conversation: the error is fatal and names the file.
    #[test]
    fn a_template_without_end_is_refused_as_a_file() {
        let endless = template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}");
        let error = endless.prepare(&dialogue(), None).unwrap().render(1, false).unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains("test.jinja: the chat template is not usable: it does not come to an end"),
            "{message}"
        );
        assert!(!matches!(error, Error::Failed(_)) && error.hint().unwrap().contains("--chat-template"));
    }

    #[test]
    fn line_ends_become_line_feeds() {
        let render = |text: &str| template(text).prepare(&dialogue(), None).unwrap().render(3, false).unwrap();
        let text = "a\n{% for m in messages %}\n{{ m.role }}\n{% endfor %}\nb\n";
        let want = "a\nuser\nassistant\nuser\nb";
        assert_eq!(render(text), want);
        assert_eq!(render(&text.replace('\n', "\r\n")), want);
        assert_eq!(render(&text.replace('\n', "\r")), want);
    }

    #[test]
    fn arguments_are_objects_unless_the_template_takes_strings() {
        let call = |arguments: Json| {
            let mut message = Message::new("assistant", "");
            let call = serde_json::json!([{"function": {"name": "f", "arguments": arguments}}]);
            message.extra.insert("tool_calls".to_owned(), call);
            message
        };
        let render = |text: &str, message: &Message| {
            template(text).prepare(std::slice::from_ref(message), None).unwrap().render(1, false).unwrap()
        };
        let glued = "{{ 'f(' + messages[0].tool_calls[0].function.arguments + ')' }}";
        let listed = "{{ messages[0].tool_calls[0].function.arguments | tojson }}";
        let mut message = call(serde_json::json!({"a": 1, "é": [true]}));
        assert_eq!(render(glued, &message), r#"f({"a": 1, "\u00e9": [true]})"#);
        assert_eq!(render(listed, &message), r#"{"a": 1, "é": [true]}"#);
        message.written_arguments = vec![Some(r#"{"a":1,"é":[true]}"#.to_owned())];
        assert_eq!(render(glued, &message), r#"f({"a":1,"é":[true]})"#);
        assert_eq!(render(listed, &message), r#"{"a": 1, "é": [true]}"#);
        // A template that fails over both says what it says of objects.
        let prepared = template("{{ messages[0].tool_calls[0].function.arguments + 1 }}");
        let message = prepared.prepare(std::slice::from_ref(&message), None).unwrap().render(1, false).unwrap_err();
        assert!(message.to_string().contains("'dict' and 'int'"), "{message}");
    }

    #[test]
    fn conversations_with_tools_use_the_template_for_tools() {
        let list = serde_json::json!([
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "{{ tools | tojson }}"},
        ]);
        let source = TemplateSource::from_json(Path::new("c.json"), &list).unwrap();
        let compiled = ChatTemplate::new(&source, Map::new()).unwrap();
        assert_eq!(compiled.prepare(&[], None).unwrap().render(0, false).unwrap(), "plain");
        let tools = serde_json::json!([{"name": "<f>"}]);
        assert_eq!(compiled.prepare(&[], Some(&tools)).unwrap().render(0, false).unwrap(), r#"[{"name": "<f>"}]"#);
        let message = TemplateSource::from_json(Path::new("c.json"), &serde_json::json!([])).unwrap_err().to_string();
        assert!(message.contains("expected one called `default`"), "{message}");
    }

    #[test]
    fn templates_are_found_where_models_keep_them() {
        let folder = tempfile::tempdir().unwrap();
        let find = |config: Json| {
            let config = config.as_object().unwrap().clone();
            TemplateSource::find(folder.path(), None, &config).unwrap().map(|found| found.templates[DEFAULT].clone())
        };
        assert_eq!(find(serde_json::json!({})), None);
        std::fs::write(folder.path().join("chat_template.json"), r#"{"chat_template": "old"}"#).unwrap();
        assert_eq!(find(serde_json::json!({"chat_template": null})).as_deref(), Some("old"));
        assert_eq!(find(serde_json::json!({"chat_template": "config"})).as_deref(), Some("config"));
        std::fs::write(folder.path().join("chat_template.jinja"), "own").unwrap();
        assert_eq!(find(serde_json::json!({"chat_template": "config"})).as_deref(), Some("own"));
    }

    #[test]
    fn arguments_and_the_fixed_day_reach_the_template() {
        let mut compiled = template("{{ strftime_now('%d %b %Y') }} {{ enable_thinking }}");
        compiled.add_arguments(&Map::from_iter([("enable_thinking".to_owned(), false.into())]));
        assert_eq!(compiled.prepare(&[], None).unwrap().render(0, false).unwrap(), "26 Jul 2024 False");
        let day = |day: &str| Map::from_iter([(DAY_ARGUMENT.to_owned(), Json::from(day))]);
        compiled.add_arguments(&day("2025-03-04"));
        let prepared = compiled.prepare(&[], None).unwrap();
        assert_eq!(prepared.render(0, false).unwrap(), "04 Mar 2025 False");
        let prepared = prepared.with_arguments(&day("2025-12-31")).unwrap();
        assert_eq!(prepared.render(0, false).unwrap(), "31 Dec 2025 False");
        compiled.add_arguments(&day("today"));
        let problem = compiled.prepare(&[], None).unwrap_err().to_string();
        assert!(problem.contains("`strftime_now`: expected a day such as \"2024-07-26\", got \"today\""), "{problem}");
    }
}
