//! Jinja2's filters: those of one value, and the way to the others.

use std::rc::Rc;
use std::sync::Arc;

use super::access::python_attribute;
use super::arguments::Given;
use super::checks;
use super::compare::{is_true, length, undefined};
use super::format::percent;
use super::json::tojson;
use super::lexer::is_space;
use super::limits::{Limits, Outcome, fail};
use super::number::{parse_float, parse_int, round_float, round_int, truncate};
use super::operate::{escape, escaped};
use super::paragraphs;
use super::print::{repr, text_of};
use super::sequences::{self, Callbacks};
use super::value::{Dict, Value};
use super::words::{capitalize, center, lines, replace, strip};

const NAMES: &[&str] = &[
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "filesizeformat",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "pprint",
    "random",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "striptags",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "urlencode",
    "urlize",
    "wordcount",
    "wordwrap",
    "xmlattr",
];

/// Whether there is a filter of this name.
pub(super) fn is_known(name: &str) -> bool {
    NAMES.contains(&name)
}

/// `value | name(...)`.
pub(super) fn apply(name: &str, value: &Value, given: &Given, limits: &Limits) -> Outcome<Value> {
    limits.step(1)?;
    limits.stack()?;
    let callbacks = Callbacks {
        filter: apply,
        test: |name, value, given, limits| checks::check(name, value, given, is_known, limits),
    };
    if let Some(done) = sequences::apply(name, value, given, &callbacks, limits)? {
        return Ok(done);
    }
    if let Some(done) = text_filter(name, value, given, limits)? {
        return Ok(done);
    }
    match name {
        "abs" => {
            given.bind(name, &[], 0)?;
            match (value, value.as_int()) {
                (Value::Undefined(words), _) => undefined(words),
                (_, Some(number)) => Ok(Value::Int(number.saturating_abs())),
                (Value::Float(number), _) => Ok(Value::Float(number.abs())),
                _ => fail(format!("TypeError: bad operand type for abs(): '{}'", value.type_name())),
            }
        }
        "attr" => {
            let bound = given.bind(name, &["name"], 1)?;
            let attribute = text_of(&bound.value(0), limits)?;
            if let Value::Undefined(words) = value {
                return undefined(words);
            }
            let missing = || Value::undefined(format!("'{} object' has no attribute '{attribute}'", value.type_name()));
            Ok(python_attribute(value, &attribute)?.unwrap_or_else(missing))
        }
        "default" | "d" => {
            let bound = given.bind(name, &["default_value", "boolean"], 0)?;
            let takes = value.is_undefined() || (bound.is_true(1, false) && !is_true(value));
            Ok(if takes { bound.get(0).cloned().unwrap_or_else(|| Value::text("")) } else { value.clone() })
        }
        "int" => {
            let bound = given.bind(name, &["default", "base"], 0)?;
            let default = || Ok(bound.get(0).cloned().unwrap_or(Value::Int(0)));
            let base = bound.int(1, 10)?;
            let whole = match value {
                Value::Undefined(words) => return undefined(words),
                Value::Text(text) | Value::Markup(text) => {
                    let read = u32::try_from(base).ok().and_then(|base| parse_int(text, base));
                    read.map(Ok).or_else(|| parse_float(text).filter(|number| number.is_finite()).map(truncate))
                }
                Value::Float(number) => number.is_finite().then(|| truncate(*number)),
                other => other.as_int().map(Ok),
            };
            match whole {
                Some(number) => Ok(Value::Int(number?)),
                None => default(),
            }
        }
        "float" => {
            let bound = given.bind(name, &["default"], 0)?;
            let read = match value {
                Value::Undefined(words) => return undefined(words),
                Value::Text(text) | Value::Markup(text) => parse_float(text),
                other => other.as_float(),
            };
            Ok(read.map_or_else(|| bound.get(0).cloned().unwrap_or(Value::Float(0.0)), Value::Float))
        }
        "round" => round(value, given),
        "filesizeformat" => file_size(value, given, limits),
        "length" | "count" => {
            given.bind(name, &[], 0)?;
            Ok(Value::Int(length(value)? as i128))
        }
        "tojson" => tojson(value, given, limits),
        "urlencode" => url_encode(value, given, limits),
        "xmlattr" => xml_attributes(value, given, limits),
        "pprint" => {
            given.bind(name, &[], 0)?;
            let mut text = String::new();
            repr(&sorted_dicts(value, limits)?, limits, &mut text)?;
            if text.chars().count() > 80 {
                return fail("pprint: values that take more than one line are not supported");
            }
            Ok(Value::text(text))
        }
        "urlize" => fail("the filter `urlize` is not supported"),
        _ => fail(format!("there is no filter `{name}`")),
    }
}

/// Filters that see their value as text.
fn text_filter(name: &str, value: &Value, given: &Given, limits: &Limits) -> Outcome<Option<Value>> {
    let soft = || -> Outcome<(String, bool)> { Ok((text_of(value, limits)?, matches!(value, Value::Markup(_)))) };
    let made = |(text, is_markup): (String, bool)| -> Outcome<Option<Value>> {
        limits.room(text.len())?;
        Ok(Some(if is_markup { Value::Markup(Arc::from(text)) } else { Value::text(text) }))
    };
    let changed = |change: &dyn Fn(&str) -> String| -> Outcome<Option<Value>> {
        given.bind(name, &[], 0)?;
        let (text, is_markup) = soft()?;
        made((change(&text), is_markup))
    };
    match name {
        "upper" => changed(&|text| text.to_uppercase()),
        "lower" => changed(&|text| text.to_lowercase()),
        "capitalize" => changed(&capitalize),
        "title" => changed(&title),
        "string" => changed(&str::to_owned),
        "trim" => {
            let bound = given.bind(name, &["chars"], 0)?;
            let (text, is_markup) = soft()?;
            let set = if bound.some(0).is_some() { Some(bound.text(0)?) } else { None };
            made((strip(&text, set, true, true).to_owned(), is_markup))
        }
        "center" => {
            let width = given.bind(name, &["width"], 0)?.int(0, 80)?;
            let width = usize::try_from(width.max(0)).unwrap_or(usize::MAX);
            limits.room(width)?;
            let (text, is_markup) = soft()?;
            made((center(&text, ' ', width), is_markup))
        }
        "replace" => {
            let bound = given.bind(name, &["old", "new", "count"], 2)?;
            let count = if bound.some(2).is_some() { bound.int(2, -1)? } else { -1 };
            let (old, new) = (bound.printed(0, "", limits)?, bound.printed(1, "", limits)?);
            made((replace(&soft()?.0, &old, &new, count, limits)?, false))
        }
        "format" => {
            if !given.positional.is_empty() && !given.named.is_empty() {
                return fail("format: positional and named arguments cannot be mixed");
            }
            let values = if given.named.is_empty() {
                Value::tuple(given.positional.clone())?
            } else {
                let pairs = given.named.iter().map(|(name, value)| (Value::Text(name.clone()), value.clone()));
                Value::Dict(Rc::new(Dict::from_pairs(pairs)?))
            };
            let (text, is_markup) = soft()?;
            made((percent(&text, &values, limits)?, is_markup))
        }
        "indent" => indent(value, given, limits).map(Some),
        "wordcount" => {
            given.bind(name, &[], 0)?;
            let is_word = |letter: char| letter == '_' || letter.is_alphanumeric();
            let count = soft()?.0.split(|letter| !is_word(letter)).filter(|word| !word.is_empty()).count();
            Ok(Some(Value::Int(count as i128)))
        }
        "wordwrap" | "truncate" | "striptags" => paragraphs::apply(name, value, given, limits).map(Some),
        "escape" | "e" => {
            given.bind(name, &[], 0)?;
            made((escaped(value, limits)?, true))
        }
        "forceescape" => {
            changed(&escape).map(|text| text.map(|text| Value::Markup(Arc::from(text.as_text().unwrap_or_default()))))
        }
        "safe" => {
            given.bind(name, &[], 0)?;
            made((soft()?.0, true))
        }
        _ => Ok(None),
    }
}

/// The `title` filter: words start behind white space, hyphens and opening brackets.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut starts = true;
    for letter in text.chars() {
        let parts = is_space(letter) || "-({[<".contains(letter);
        match starts && !parts {
            true => out.extend(letter.to_uppercase()),
            false => out.extend(letter.to_lowercase()),
        }
        starts = parts;
    }
    out
}

fn indent(value: &Value, given: &Given, limits: &Limits) -> Outcome<Value> {
    let bound = given.bind("indent", &["width", "first", "blank"], 0)?;
    let text = match value {
        Value::Undefined(words) => return undefined(words),
        other => match other.as_text() {
            Some(text) => text,
            None => return fail(format!("TypeError: indent: expected str, got '{}'", value.type_name())),
        },
    };
    let margin = match bound.get(0) {
        Some(width) if width.as_text().is_some() => bound.text(0)?.to_owned(),
        _ => {
            let width = usize::try_from(bound.int(0, 4)?.max(0)).unwrap_or(usize::MAX);
            limits.room(width)?;
            " ".repeat(width)
        }
    };
    let ended = format!("{text}\n");
    let lines = lines(&ended, false);
    limits.room(lines.len().saturating_mul(margin.len()).saturating_add(text.len()))?;
    let (first, blank) = (bound.is_true(1, false), bound.is_true(2, false));
    let mut out = String::with_capacity(text.len());
    for (index, line) in lines.iter().enumerate() {
        if index > 0 {
            out.push('\n');
        }
        if if index == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(&margin);
        }
        out.push_str(line);
    }
    Ok(if matches!(value, Value::Markup(_)) { Value::Markup(Arc::from(out)) } else { Value::text(out) })
}

fn round(value: &Value, given: &Given) -> Outcome<Value> {
    let bound = given.bind("round", &["precision", "method"], 0)?;
    let digits = bound.int(0, 0)?;
    let method = if bound.get(1).is_some() { bound.text(1)? } else { "common" };
    if !matches!(method, "common" | "ceil" | "floor") {
        return fail("round: the method must be common, ceil or floor");
    }
    if let Value::Undefined(words) = value {
        return undefined(words);
    }
    let Some(number) = value.as_float() else {
        return fail(format!("TypeError: type {} doesn't define __round__ method", value.type_name()));
    };
    if method == "common" {
        return Ok(match value.as_int() {
            Some(whole) => Value::Int(round_int(whole, digits)?),
            None => Value::Float(round_float(number, digits)),
        });
    }
    let unit = 10_f64.powi(digits.clamp(-400, 400) as i32);
    let scaled = number * unit;
    let whole = if method == "ceil" { scaled.ceil() } else { scaled.floor() };
    Ok(Value::Float((whole + 0.0) / unit))
}

fn file_size(value: &Value, given: &Given, limits: &Limits) -> Outcome<Value> {
    let bound = given.bind("filesizeformat", &["binary"], 0)?;
    let bytes = match value {
        Value::Undefined(words) => return undefined(words),
        Value::Text(text) | Value::Markup(text) => parse_float(text),
        other => other.as_float(),
    };
    let Some(bytes) = bytes else {
        return fail(format!("filesizeformat: expected a number, got {}", text_of(value, limits)?));
    };
    let binary = bound.is_true(0, false);
    let base = if binary { 1024.0_f64 } else { 1000.0 };
    if bytes == 1.0 {
        return Ok(Value::text("1 Byte"));
    }
    if bytes < base {
        return Ok(Value::text(format!("{} Bytes", truncate(bytes)?)));
    }
    let prefixes = ["k", "M", "G", "T", "P", "E", "Z", "Y"];
    let at = (0..prefixes.len()).find(|at| bytes < base.powi(*at as i32 + 2)).unwrap_or(prefixes.len() - 1);
    let size = base * bytes / base.powi(at as i32 + 2);
    let prefix = if binary { format!("{}i", prefixes[at].to_uppercase()) } else { prefixes[at].to_owned() };
    Ok(Value::text(format!("{size:.1} {prefix}B")))
}

fn quoted(text: &str, plus: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => out.push(char::from(byte)),
            b'/' if !plus => out.push('/'),
            b' ' if plus => out.push('+'),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

fn url_encode(value: &Value, given: &Given, limits: &Limits) -> Outcome<Value> {
    given.bind("urlencode", &[], 0)?;
    let pairs: Vec<(Value, Value)> = match value {
        Value::Dict(dict) => dict.entries.clone(),
        Value::Text(_) | Value::Markup(_) | Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) => {
            return Ok(Value::text(quoted(&text_of(value, limits)?, false)));
        }
        other => {
            let mut pairs = Vec::new();
            for pair in super::compare::items(other, limits)? {
                match super::compare::items(&pair, limits)?.as_slice() {
                    [key, value] => pairs.push((key.clone(), value.clone())),
                    _ => return fail("ValueError: urlencode: expected pairs"),
                }
            }
            pairs
        }
    };
    let mut parts = Vec::with_capacity(pairs.len());
    for (key, value) in pairs {
        parts.push(format!("{}={}", quoted(&text_of(&key, limits)?, true), quoted(&text_of(&value, limits)?, true)));
    }
    Ok(Value::text(parts.join("&")))
}

fn xml_attributes(value: &Value, given: &Given, limits: &Limits) -> Outcome<Value> {
    let bound = given.bind("xmlattr", &["autospace"], 0)?;
    let Value::Dict(dict) = value else {
        return fail(format!("xmlattr: expected a mapping, got '{}'", value.type_name()));
    };
    let mut parts = Vec::new();
    for (key, value) in &dict.entries {
        if matches!(value, Value::None | Value::Undefined(_)) {
            continue;
        }
        match key.as_text() {
            Some(name) if !name.contains(|letter: char| is_space(letter) || "/>=".contains(letter)) => {}
            _ => return fail("xmlattr: a key is no name of an attribute"),
        }
        parts.push(format!("{}=\"{}\"", escaped(key, limits)?, escaped(value, limits)?));
    }
    let text = parts.join(" ");
    Ok(Value::text(if bound.is_true(0, true) && !text.is_empty() { format!(" {text}") } else { text }))
}

/// Dictionaries inside a value in the order of their keys, as `pprint` writes them.
fn sorted_dicts(value: &Value, limits: &Limits) -> Outcome<Value> {
    limits.step(1)?;
    limits.stack()?;
    match value {
        Value::List(list) => {
            Value::list(list.items.iter().map(|item| sorted_dicts(item, limits)).collect::<Outcome<_>>()?)
        }
        Value::Dict(dict) => {
            let mut entries = dict.entries.clone();
            if entries.iter().all(|(key, _)| key.as_text().is_some()) {
                entries.sort_by(|one, two| one.0.as_text().cmp(&two.0.as_text()));
            }
            let entries = entries.into_iter().map(|(key, value)| Ok((key, sorted_dicts(&value, limits)?)));
            Ok(Value::Dict(Rc::new(Dict::from_pairs(entries.collect::<Outcome<Vec<_>>>()?)?)))
        }
        other => Ok(other.clone()),
    }
}
