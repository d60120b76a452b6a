//! Jinja2 as chat templates use it: the language, Python's values and how they print, and limits.
//!
//! A template is written against Jinja2 in transformers' sandbox (`trim_blocks`, `lstrip_blocks`, loop controls, immutable
//! values); one character of difference is another prompt. So nothing here is chosen: what is not the same is an error.
//!
//! `lexer` and `parser` make a tree (`syntax`) of the text; `machine`, `statements` and `expressions` run it; the other files
//! are Python: `value`, `compare`, `operate`, `access`, `print`, `format`, methods, filters, tests.

use std::collections::HashMap;
use std::sync::Arc;

mod access;
mod arguments;
mod checks;
mod compare;
mod day;
mod expressions;
mod filters;
mod format;
mod grammar;
mod json;
mod lexer;
mod limits;
mod machine;
mod methods;
mod number;
mod operate;
mod paragraphs;
mod parser;
mod prefixes;
mod print;
mod sequences;
mod statements;
mod syntax;
mod value;
mod watch;
mod words;

pub(super) use day::Day;
pub(super) use limits::{Fault, Limits, Outcome};
pub(super) use syntax::Template;
pub(super) use value::Value;
pub(super) use watch::Beginning;

/// What a template is given, by name.
pub(super) type Context = HashMap<Arc<str>, Value>;

/// Reads a template.
pub(super) fn compile(source: &str) -> Outcome<Template> {
    parser::parse(source, |name, is_test| if is_test { checks::is_known(name) } else { filters::is_known(name) })
}

/// `json.dumps` of a value: in ASCII, as the strings are that services give.
pub(super) fn dumps(value: &serde_json::Value) -> Outcome<String> {
    let given = arguments::Given { positional: vec![Value::Bool(true)], ..arguments::Given::default() };
    let limits = Limits::new(0);
    print::text_of(&json::tojson(&Value::from_json(value)?, &given, &limits)?, &limits)
}

/// What went wrong, and on which line.
type Located = (Box<Fault>, usize);

/// Renders a template. `marks` are written around `{% generation %}` blocks. A failure comes with its line.
pub(super) fn render(
    template: &Template,
    context: &Context,
    marks: Option<(&str, &str)>,
    limits: &Limits,
    day: Day,
) -> Result<String, Located> {
    let mut machine = machine::Machine::new(template, context, limits, marks, day);
    match machine.run(&template.body) {
        Ok(_) => Ok(std::mem::take(&mut machine.out)),
        Err(fault) => Err((fault, machine.line)),
    }
}

/// Renders a template without marks, and what it makes of beginnings of `messages`: `wanted` says how many messages, in
/// ascending order, and whether with a generation prompt. None for the beginnings if the template looks ahead.
pub(super) fn render_with_beginnings(
    template: &Template,
    context: &Context,
    wanted: Vec<(usize, bool)>,
    limits: &Limits,
    day: Day,
) -> Result<(String, Option<Vec<Beginning>>), Located> {
    let mut machine = machine::Machine::new(template, context, limits, None, day);
    let count = wanted.len();
    machine.watch = context.get("messages").map(|messages| watch::Watch::new(messages, wanted));
    match machine.run_watched() {
        Ok(()) => {
            let found = machine.watch.take().filter(|watch| !watch.differs && watch.found.len() == count);
            Ok((std::mem::take(&mut machine.out), found.map(|watch| watch.found)))
        }
        Err(fault) => Err((fault, machine.line)),
    }
}

#[cfg(test)]
mod tests;
