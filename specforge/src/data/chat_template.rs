//! The model's own chat template, rendered as transformers renders it (`utils/chat_template_utils.py`, 5.8).
//!
//! `{% generation %}` blocks, with which a template marks what the assistant says, become filter blocks. Rendered plainly
//! they print their body; rendered with marks, the body stands between two sequences of private-use characters, which
//! are taken out again and leave the spans behind. (transformers uses a call block; minijinja's would not see a
//! namespace that the body only assigns to.)

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value};
use serde_json::{Map, Value as Json};

use super::conversation::Message;
use super::python::{self, Day};
use crate::error::{Error, Result, foreign};

/// `strftime_now` always answers this day, the one Llama's templates fall back to: the same data must give the same
/// tokens tomorrow.
const TEMPLATE_DAY: Day = Day { year: 2024, month: 7, day: 26 };

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
            return Err(Error::bad_file(path, problem).with_hint("name one file with data.chat_template"));
        }
        Ok(Self { path: path.to_path_buf(), templates })
    }
}

/// A compiled template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    path: PathBuf,
    /// Special tokens by the names templates use, then the user's own arguments.
    globals: Map<String, Json>,
}

impl ChatTemplate {
    /// Compiles it. `special_tokens` are `bos_token`, `eos_token` and so on.
    pub fn new(source: &TemplateSource, special_tokens: Map<String, Json>) -> Result<Self> {
        let mut environment = environment()?;
        for (name, text) in &source.templates {
            let compile = |environment: &mut Environment<'static>, name: String, text: String| {
                let refuse = |problem: String| {
                    Error::bad_file(&source.path, problem)
                        .with_hint("correct it, or name another with data.chat_template")
                };
                let compiled = foreign::library(|| environment.add_template_owned(name.clone(), text));
                let compiled =
                    compiled.map_err(|words| refuse(format!("the chat template `{name}` fails: {words}")))?;
                compiled.map_err(|error| refuse(format!("the chat template `{name}` is not valid: {error}")))
            };
            let (plain, blocks) = rewrite_generation_blocks(text, "__generation");
            compile(&mut environment, name.clone(), plain)?;
            if blocks > 0 {
                let (marked, _) = rewrite_generation_blocks(text, "__marked_generation");
                compile(&mut environment, marked_name(name), marked)?;
            }
        }
        Ok(Self { environment, path: source.path.clone(), globals: special_tokens })
    }

    /// Adds values every rendering is given.
    pub fn add_arguments(&mut self, arguments: &Map<String, Json>) {
        self.globals.extend(arguments.clone());
    }

    /// A conversation, ready to be rendered many times.
    pub fn prepare(&self, messages: &[Message], tools: Option<&Json>) -> Prepared<'_> {
        let messages = messages.iter().map(|message| Value::from(Serde(message))).collect();
        Prepared {
            template: self,
            messages,
            tools: tools.map_or_else(|| Value::from(()), |tools| Value::from(Serde(tools))),
            arguments: Map::new(),
        }
    }
}

/// A conversation and its template.
#[derive(Debug)]
pub struct Prepared<'a> {
    template: &'a ChatTemplate,
    messages: Vec<Value>,
    tools: Value,
    /// The conversation's own; they replace the globals.
    arguments: Map<String, Json>,
}

/// A rendered text and the byte ranges its template marks as generated.
pub type Marked = (String, Vec<Range<usize>>);

impl Prepared<'_> {
    /// The same, with values that only this conversation gives its template.
    pub fn with_arguments(mut self, arguments: &Map<String, Json>) -> Self {
        self.arguments.extend(arguments.clone());
        self
    }

    /// Renders the first `count` messages.
    pub fn render(&self, count: usize, add_generation_prompt: bool) -> Result<String> {
        self.render_with(self.name(), count, add_generation_prompt)
    }

    /// Renders the first `count` messages and says what the template's generation blocks enclose. None if it has no
    /// such blocks, or if marking them changes the text.
    pub fn render_marked(&self, count: usize) -> Result<Option<Marked>> {
        let marked_name = marked_name(self.name());
        if self.template.environment.get_template(&marked_name).is_err() {
            return Ok(None);
        }
        let plain = self.render(count, false)?;
        if plain.contains(OPEN_MARK) || plain.contains(CLOSE_MARK) {
            return Ok(None);
        }
        let marked = self.render_with(&marked_name, count, false)?;
        Ok(take_out_marks(&marked).filter(|(text, _)| *text == plain))
    }

    fn name(&self) -> &'static str {
        let for_tools = !self.tools.is_none() && self.template.environment.get_template(TOOL_USE).is_ok();
        if for_tools { TOOL_USE } else { DEFAULT }
    }

    fn render_with(&self, name: &str, count: usize, add_generation_prompt: bool) -> Result<String> {
        let mut context: BTreeMap<&str, Value> = BTreeMap::from([
            ("messages", Value::from(self.messages[..count.min(self.messages.len())].to_vec())),
            ("tools", self.tools.clone()),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ]);
        for (key, value) in self.template.globals.iter().chain(&self.arguments) {
            context.insert(key, Value::from(Serde(value)));
        }
        let environment = &self.template.environment;
        let render = || environment.get_template(name).and_then(|template| template.render(context));
        match foreign::library(render) {
            Ok(rendered) => rendered.map_err(|error| Error::Failed(self.refusal(&error))),
            Err(words) => {
                Err(Error::bad_file(&self.template.path, format!("the chat template cannot be used: {words}")))
            }
        }
    }

    /// The template's own words where it has some, else what went wrong and on which line.
    fn refusal(&self, error: &minijinja::Error) -> String {
        match (error.kind(), error.detail()) {
            (ErrorKind::InvalidOperation, Some(detail)) if detail.starts_with(RAISED) => {
                format!("the chat template refuses it: {}", foreign::one_line(detail.trim_start_matches(RAISED)))
            }
            _ => format!("the chat template of {} fails: {error}", self.template.path.display()),
        }
    }
}

/// Marks errors that the template itself raised.
const RAISED: &str = "raised: ";

fn environment() -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|error| Error::Failed(error.to_string()))?);
    // Plain text, whatever the template is called.
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_formatter(|out, _, value| Ok(out.write_str(&python::text_of(value))?));
    environment.set_unknown_method_callback(python::unknown_method);
    environment.add_filter("tojson", python::tojson);
    environment.add_filter("trim", python::trim);
    environment.add_filter(python::PLAIN_INDENT, minijinja::filters::indent);
    environment.add_filter("indent", python::indent);
    environment.add_filter("string", |value: &Value| python::text_of(value));
    environment.add_function("raise_exception", |message: &Value| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
    });
    environment.add_function("strftime_now", |pattern: &str| TEMPLATE_DAY.format(pattern));
    environment.add_test("iterable", python::is_iterable);
    environment.add_test("sequence", python::is_sequence);
    environment.add_filter("__generation", |body: String| body);
    environment.add_filter("__marked_generation", |body: String| format!("{OPEN_MARK}{body}{CLOSE_MARK}"));
    Ok(environment)
}

fn marked_name(name: &str) -> String {
    format!("{name} with marks")
}

/// Turns `{% generation %}` into the start of a filter block and `{% endgeneration %}` into its end, keeping the signs that
/// control white space. Also returns how many blocks there are.
fn rewrite_generation_blocks(template: &str, filter: &str) -> (String, usize) {
    let mut out = String::with_capacity(template.len());
    let (mut rest, mut blocks) = (template, 0);
    while let Some(start) = rest.find("{%") {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        // Behind the opening: the two may not share their percent sign.
        let Some(end) = rest[2..].find("%}").map(|end| end + 4) else { break };
        let tag = &rest[..end];
        let inner = &tag[2..end - 2];
        let before =
            inner.chars().next().filter(|sign| matches!(sign, '-' | '+')).map(String::from).unwrap_or_default();
        let after =
            inner.chars().next_back().filter(|sign| matches!(sign, '-' | '+')).map(String::from).unwrap_or_default();
        match inner.trim_matches(['-', '+']).trim() {
            "generation" => {
                blocks += 1;
                out.push_str(&format!("{{%{before} filter {filter} {after}%}}"));
            }
            "endgeneration" => out.push_str(&format!("{{%{before} endfilter {after}%}}")),
            _ => {
                // Only the opening is passed over: a string inside the tag may hold what looks like its end.
                out.push_str("{%");
                rest = &rest[2..];
                continue;
            }
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    (out, blocks)
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
        let prepared = compiled.prepare(&dialogue(), None);
        assert_eq!(prepared.render(3, true).unwrap(), "<s>\nuser: hi\nassistant: ho\n>");
        assert_eq!(prepared.render(1, false).unwrap(), "<s>\nuser: hi\n");
    }

    #[test]
    fn refusals_are_told_in_the_templates_words() {
        let compiled =
            template("{% if messages | length > 1 %}{{ raise_exception('roles must alternate') }}{% endif %}");
        let prepared = compiled.prepare(&dialogue(), None);
        assert!(prepared.render(1, false).is_ok());
        let message = prepared.render(2, false).unwrap_err().to_string();
        assert_eq!(message, "the chat template refuses it: roles must alternate");
        let compiled = template("{{ messages[0].missing.key }}");
        let message = compiled.prepare(&dialogue(), None).render(1, false).unwrap_err().to_string();
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
        let prepared = compiled.prepare(&dialogue(), None);
        let (text, spans) = prepared.render_marked(3).unwrap().unwrap();
        assert_eq!(text, prepared.render(3, false).unwrap());
        assert_eq!(text, "user:hiassistant:ho<e>user:hu");
        assert_eq!(spans.into_iter().map(|span| &text[span]).collect::<Vec<_>>(), ["ho<e>"]);
        let plain = template("{{ messages[0].content }}");
        assert!(plain.prepare(&dialogue(), None).render_marked(1).unwrap().is_none());
    }

    #[test]
    fn generation_blocks_may_assign_to_a_namespace_outside() {
        let text = "{% set ns = namespace(n=0) %}{% for m in messages %}{% generation %}{% set ns.n = ns.n + 1 %}\
                    {{ loop.index }}{% endgeneration %}{% endfor %}{{ ns.n }}";
        let compiled = template(text);
        let (text, spans) = compiled.prepare(&dialogue(), None).render_marked(3).unwrap().unwrap();
        assert_eq!((text.as_str(), spans), ("1233", vec![0..1, 1..2, 2..3]));
    }

    #[test]
    fn nothing_is_not_iterable() {
        let text = "{{ tools is iterable }} {{ 'a' is iterable }} {{ 'a' is sequence }} {{ 1 is sequence }} {{ x is iterable }}";
        assert_eq!(template(text).prepare(&[], None).render(0, false).unwrap(), "False True True False True");
    }

    #[test]
    fn only_generation_tags_are_rewritten() {
        let (text, blocks) =
            rewrite_generation_blocks("{{ '{%' }}{%+ generation -%}x{%endgeneration%}{% set a = 1 %}", "f");
        assert_eq!(text, "{{ '{%' }}{%+ filter f -%}x{% endfilter %}{% set a = 1 %}");
        assert_eq!(blocks, 1);
        for text in ["{% unclosed", "{%}", "{%-}", "{%%}", "{%-%}", "{{ x }}{%"] {
            assert_eq!(rewrite_generation_blocks(text, "f"), (text.to_owned(), 0));
        }
    }

    #[test]
    fn an_indent_takes_no_memory_that_nobody_can_mean() {
        let render = |text: &str| template(text).prepare(&[], None).render(0, false);
        assert_eq!(
            render("{{ 'a\nb' | indent(2) }} {{ 'a\nb' | indent(width=1, first=true) }}").unwrap(),
            "a\n  b  a\n b"
        );
        for text in ["{{ 'a' | indent(99999999999999) }}", "{{ 'a' | indent(width=99999999999999) }}"] {
            let message = render(text).unwrap_err().to_string();
            assert!(message.contains("indent: a width of 99999999999999 is not supported"), "{message}");
        }
    }

    #[test]
    fn conversations_with_tools_use_the_template_for_tools() {
        let list = serde_json::json!([
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "{{ tools | tojson }}"},
        ]);
        let source = TemplateSource::from_json(Path::new("c.json"), &list).unwrap();
        let compiled = ChatTemplate::new(&source, Map::new()).unwrap();
        assert_eq!(compiled.prepare(&[], None).render(0, false).unwrap(), "plain");
        let tools = serde_json::json!([{"name": "<f>"}]);
        assert_eq!(compiled.prepare(&[], Some(&tools)).render(0, false).unwrap(), r#"[{"name": "<f>"}]"#);
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
        assert_eq!(compiled.prepare(&[], None).render(0, false).unwrap(), "26 Jul 2024 False");
    }
}
