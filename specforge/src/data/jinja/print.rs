//! `str()` and `repr()`: what `{{ value }}` prints, and how a value stands inside a list.

use super::limits::{Limits, Outcome};
use super::number::float_text;
use super::value::{Function, Items, Value, View};

/// `str(value)`.
pub(in crate::data) fn text_of(value: &Value, limits: &Limits) -> Outcome<String> {
    let mut out = String::new();
    write_text(value, limits, &mut out)?;
    Ok(out)
}

/// Appends `str(value)`.
pub(super) fn write_text(value: &Value, limits: &Limits, out: &mut String) -> Outcome<()> {
    match value {
        Value::Undefined(_) => {}
        Value::Text(text) | Value::Markup(text) => {
            limits.room(text.len())?;
            out.push_str(text);
        }
        Value::Cycler(_) | Value::Joiner(_) => repr(value, limits, out)?,
        other => repr(other, limits, out)?,
    }
    Ok(())
}

/// Appends `repr(value)`.
pub(super) fn repr(value: &Value, limits: &Limits, out: &mut String) -> Outcome<()> {
    limits.step(1)?;
    limits.stack()?;
    match value {
        Value::Undefined(_) => out.push_str("Undefined"),
        Value::None => out.push_str("None"),
        Value::Bool(yes) => out.push_str(if *yes { "True" } else { "False" }),
        Value::Int(number) => out.push_str(&number.to_string()),
        Value::Float(number) => out.push_str(&float_text(*number)),
        Value::Text(text) => {
            limits.room(text.len())?;
            repr_text(text, out);
        }
        Value::Markup(text) => {
            limits.room(text.len())?;
            out.push_str("Markup(");
            repr_text(text, out);
            out.push(')');
        }
        Value::Bytes(bytes) => {
            out.push('b');
            let quote = if bytes.contains(&b'\'') && !bytes.contains(&b'"') { '"' } else { '\'' };
            out.push(quote);
            bytes.iter().for_each(|byte| repr_byte(*byte, quote, out));
            out.push(quote);
        }
        Value::List(items) => listed(items, ('[', ']'), limits, out)?,
        Value::Tuple(items) => {
            listed(items, ('(', ')'), limits, out)?;
            if items.items.len() == 1 {
                out.pop();
                out.push_str(",)");
            }
        }
        Value::Dict(dict) => pairs(dict.entries.iter().map(|(key, value)| (key, value)), limits, out)?,
        Value::Range(range) => {
            out.push_str(&format!("range({}, {}", range.start, range.stop));
            if range.step != 1 {
                out.push_str(&format!(", {}", range.step));
            }
            out.push(')');
        }
        Value::View(kind, dict) => {
            out.push_str(value.type_name());
            out.push_str("([");
            for (index, (key, value)) in dict.entries.iter().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                match kind {
                    View::Keys => repr(key, limits, out)?,
                    View::Values => repr(value, limits, out)?,
                    View::Items => {
                        out.push('(');
                        repr(key, limits, out)?;
                        out.push_str(", ");
                        repr(value, limits, out)?;
                        out.push(')');
                    }
                }
            }
            out.push_str("])");
        }
        Value::Namespace(namespace) => {
            out.push_str("<Namespace ");
            let values = namespace.values.borrow().clone();
            let keys: Vec<Value> = values.iter().map(|(name, _)| Value::Text(name.clone())).collect();
            pairs(keys.iter().zip(values.iter().map(|(_, value)| value)), limits, out)?;
            out.push('>');
        }
        Value::Loop(one) => out.push_str(&format!("<LoopContext {}/{}>", one.index.get() + 1, one.items.len())),
        Value::Macro(closure) => match &closure.definition.name {
            Some(name) => {
                out.push_str("<Macro ");
                repr_text(name, out);
                out.push('>');
            }
            None => out.push_str("<Macro anonymous>"),
        },
        Value::Function(function) => out.push_str(match function {
            Function::Range => "<class 'range'>",
            Function::Dict => "<class 'dict'>",
            Function::Cycler => "<class 'jinja2.utils.Cycler'>",
            Function::Joiner => "<class 'jinja2.utils.Joiner'>",
            Function::Namespace => "<class 'jinja2.utils.Namespace'>",
            _ => "<function object>",
        }),
        Value::Template => out.push_str("<TemplateReference None>"),
        // Python prints an address here, another one at every run.
        other => out.push_str(&format!("<{} object>", other.type_name())),
    }
    Ok(())
}

fn listed(items: &Items, brackets: (char, char), limits: &Limits, out: &mut String) -> Outcome<()> {
    out.push(brackets.0);
    for (index, item) in items.items.iter().enumerate() {
        out.push_str(if index > 0 { ", " } else { "" });
        repr(item, limits, out)?;
    }
    out.push(brackets.1);
    Ok(())
}

fn pairs<'a>(pairs: impl Iterator<Item = (&'a Value, &'a Value)>, limits: &Limits, out: &mut String) -> Outcome<()> {
    out.push('{');
    for (index, (key, value)) in pairs.enumerate() {
        out.push_str(if index > 0 { ", " } else { "" });
        repr(key, limits, out)?;
        out.push_str(": ");
        repr(value, limits, out)?;
    }
    out.push('}');
    Ok(())
}

/// `repr` of a text.
pub(super) fn repr_text(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            same if same == quote => out.extend(['\\', quote]),
            plain if is_printable(plain) => out.push(plain),
            other => match u32::from(other) {
                code @ ..=0xff => out.push_str(&format!("\\x{code:02x}")),
                code @ ..=0xffff => out.push_str(&format!("\\u{code:04x}")),
                code => out.push_str(&format!("\\U{code:08x}")),
            },
        }
    }
    out.push(quote);
}

fn repr_byte(byte: u8, quote: char, out: &mut String) {
    match char::from(byte) {
        '\\' => out.push_str("\\\\"),
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        same if same == quote => out.extend(['\\', quote]),
        plain @ ' '..='~' => out.push(plain),
        _ => out.push_str(&format!("\\x{byte:02x}")),
    }
}

/// `str.isprintable` of one character: no control, format, private, unassigned or separating character but the space.
pub(super) fn is_printable(character: char) -> bool {
    let code = u32::from(character);
    if character == ' ' {
        return true;
    }
    let hidden = character.is_control()
        || character.is_whitespace()
        || matches!(code,
            0xad | 0x600..=0x605 | 0x61c | 0x6dd | 0x70f | 0x890..=0x891 | 0x8e2 | 0x180e | 0x200b..=0x200f
            | 0x2028..=0x202e | 0x2060..=0x206f | 0xd800..=0xf8ff | 0xfeff | 0xfff0..=0xfffb | 0xfffe..=0xffff
            | 0x110bd | 0x110cd | 0x13430..=0x1343f | 0x1bca0..=0x1bca3 | 0x1d173..=0x1d17a
            | 0xe0000..=0x0010_ffff);
    !hidden || (0xe0100..=0xe01ef).contains(&code)
}
