//! The `tojson` filter of transformers: `json.dumps(value, ensure_ascii=False, indent=None, separators=None,
//! sort_keys=False)`.

use super::arguments::Given;
use super::compare::{items, sort};
use super::limits::{Limits, Outcome, fail};
use super::number::float_text;
use super::value::{Dict, Value};

struct Style {
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    separators: (String, String),
}

/// Spaces that a template may indent by.
const WIDEST: i128 = 1 << 12;

/// `value | tojson(...)`.
pub(super) fn tojson(value: &Value, given: &Given, limits: &Limits) -> Outcome<Value> {
    let bound = given.bind("tojson", &["ensure_ascii", "indent", "separators", "sort_keys"], 0)?;
    let indent = match bound.some(1) {
        None => None,
        Some(indent) => Some(match (indent.as_text(), indent.as_int()) {
            (Some(text), _) => text.to_owned(),
            (None, Some(width)) if width <= WIDEST => " ".repeat(width.max(0) as usize),
            _ => return fail("tojson: this indent is not supported"),
        }),
    };
    let separators = match bound.some(2) {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some(pair) => match items(pair, limits)?.as_slice() {
            [one, two] => match (one.as_text(), two.as_text()) {
                (Some(one), Some(two)) => (one.to_owned(), two.to_owned()),
                _ => return fail("TypeError: tojson: separators must be texts"),
            },
            _ => return fail("ValueError: tojson: expected two separators"),
        },
    };
    let style = Style { ensure_ascii: bound.is_true(0, false), sort_keys: bound.is_true(3, false), indent, separators };
    let mut out = String::new();
    style.write(value, 0, limits, &mut out)?;
    limits.room(out.len())?;
    Ok(Value::text(out))
}

impl Style {
    fn write(&self, value: &Value, depth: usize, limits: &Limits, out: &mut String) -> Outcome<()> {
        limits.step(1)?;
        limits.stack()?;
        match value {
            Value::None => out.push_str("null"),
            Value::Bool(yes) => out.push_str(if *yes { "true" } else { "false" }),
            Value::Int(number) => out.push_str(&number.to_string()),
            Value::Float(number) if number.is_nan() => out.push_str("NaN"),
            Value::Float(number) if number.is_infinite() => {
                out.push_str(if *number > 0.0 { "Infinity" } else { "-Infinity" });
            }
            Value::Float(number) => out.push_str(&float_text(*number)),
            Value::Text(text) | Value::Markup(text) => {
                limits.room(text.len())?;
                self.write_text(text, out);
            }
            Value::List(list) | Value::Tuple(list) if list.items.is_empty() => out.push_str("[]"),
            Value::List(list) | Value::Tuple(list) => {
                out.push('[');
                for (index, item) in list.items.iter().enumerate() {
                    self.start_item(index, depth, limits, out)?;
                    self.write(item, depth + 1, limits, out)?;
                }
                self.end_items(depth, limits, out)?;
                out.push(']');
            }
            Value::Dict(dict) if dict.entries.is_empty() => out.push_str("{}"),
            Value::Dict(dict) => {
                out.push('{');
                for (index, (key, item)) in self.members(dict, limits)?.into_iter().enumerate() {
                    self.start_item(index, depth, limits, out)?;
                    match &key {
                        Value::Text(text) | Value::Markup(text) => self.write_text(text, out),
                        Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) => {
                            out.push('"');
                            self.write(&key, depth, limits, out)?;
                            out.push('"');
                        }
                        other => {
                            return fail(format!(
                                "TypeError: keys must be str, int, float, bool or None, not {}",
                                other.type_name()
                            ));
                        }
                    }
                    out.push_str(&self.separators.1);
                    self.write(&item, depth + 1, limits, out)?;
                }
                self.end_items(depth, limits, out)?;
                out.push('}');
            }
            other => {
                return fail(format!("TypeError: Object of type {} is not JSON serializable", other.type_name()));
            }
        }
        Ok(())
    }

    fn members(&self, dict: &Dict, limits: &Limits) -> Outcome<Vec<(Value, Value)>> {
        if !self.sort_keys {
            return Ok(dict.entries.clone());
        }
        let (keys, values) = dict.entries.iter().cloned().unzip();
        sort(values, keys, false, limits)
    }

    fn start_item(&self, index: usize, depth: usize, limits: &Limits, out: &mut String) -> Outcome<()> {
        if index > 0 {
            out.push_str(&self.separators.0);
        }
        self.end_items(depth + 1, limits, out)
    }

    fn end_items(&self, depth: usize, limits: &Limits, out: &mut String) -> Outcome<()> {
        if let Some(indent) = &self.indent {
            limits.room(indent.len() * depth)?;
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
        Ok(())
    }

    fn write_text(&self, text: &str, out: &mut String) {
        out.push('"');
        for character in text.chars() {
            match character {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                control if control < ' ' => out.push_str(&format!("\\u{:04x}", u32::from(control))),
                beyond if self.ensure_ascii && !beyond.is_ascii() => {
                    for unit in beyond.encode_utf16(&mut [0; 2]) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                plain => out.push(plain),
            }
        }
        out.push('"');
    }
}
