//! What chat templates expect of Python: `json.dumps`, `str()` of lists and dictionaries, `str.strip()`, `strftime`.
//!
//! Templates are written against Jinja2 and print values its way; one character of difference is another prompt.

use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Error, ErrorKind, State, Value};

/// The `tojson` filter of transformers: `json.dumps(value, ensure_ascii=False, indent=None, separators=None,
/// sort_keys=False)`.
pub(super) fn tojson(value: &Value, ensure_ascii: Option<bool>, kwargs: Kwargs) -> Result<Value, Error> {
    let invalid = |text: String| Error::new(ErrorKind::InvalidOperation, text);
    if value.is_undefined() {
        return Err(invalid("tojson: the value is undefined".to_owned()));
    }
    let indent = match kwargs.get::<Option<Value>>("indent")?.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => Some(match (indent.as_str(), indent.as_usize()) {
            (Some(text), _) => text.to_owned(),
            (None, Some(width)) if width <= WIDEST_INDENT => " ".repeat(width),
            _ => return Err(invalid(format!("tojson: indent = {indent} is not supported"))),
        }),
    };
    let separators = match kwargs.get::<Option<Value>>("separators")?.filter(|pair| !pair.is_none()) {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some(pair) => (pair.get_item_by_index(0)?.to_string(), pair.get_item_by_index(1)?.to_string()),
    };
    let style = JsonStyle {
        ensure_ascii: match kwargs.get::<Option<bool>>("ensure_ascii")? {
            Some(yes) => yes,
            None => ensure_ascii.unwrap_or(false),
        },
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        separators,
    };
    kwargs.assert_all_used()?;
    let value = serde_json::to_value(value).map_err(|error| invalid(format!("tojson: {error}")))?;
    let mut out = String::new();
    style.write(&value, 0, &mut out);
    Ok(Value::from(out))
}

/// Spaces that a template may indent by. Without a limit, one number in a template takes all memory.
const WIDEST_INDENT: usize = 64;

/// Name under which minijinja's own `indent` filter is kept.
pub(super) const PLAIN_INDENT: &str = "__indent";

/// The `indent` filter, for widths that can be meant.
pub(super) fn indent(state: &mut State, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let args = args.into_values();
    let (positional, kwargs): (&[Value], Kwargs) = from_args(&args)?;
    let width = positional.get(1).cloned().or(kwargs.get::<Option<Value>>("width")?);
    if let Some(width) = width.filter(|width| width.as_usize().is_some_and(|width| width > WIDEST_INDENT)) {
        let text = format!("indent: a width of {width} is not supported");
        return Err(Error::new(ErrorKind::InvalidOperation, text));
    }
    state.apply_filter(PLAIN_INDENT, &args)
}

struct JsonStyle {
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    separators: (String, String),
}

impl JsonStyle {
    fn write(&self, value: &serde_json::Value, depth: usize, out: &mut String) {
        match value {
            serde_json::Value::Null => out.push_str("null"),
            serde_json::Value::Bool(yes) => out.push_str(if *yes { "true" } else { "false" }),
            serde_json::Value::Number(number) => match number.as_f64() {
                Some(float) if number.is_f64() => out.push_str(&float_text(float)),
                _ => out.push_str(&number.to_string()),
            },
            serde_json::Value::String(text) => self.write_string(text, out),
            serde_json::Value::Array(list) if list.is_empty() => out.push_str("[]"),
            serde_json::Value::Object(object) if object.is_empty() => out.push_str("{}"),
            serde_json::Value::Array(list) => {
                out.push('[');
                for (index, item) in list.iter().enumerate() {
                    self.start_item(index, depth, out);
                    self.write(item, depth + 1, out);
                }
                self.end_items(depth, out);
                out.push(']');
            }
            serde_json::Value::Object(object) => {
                let mut members: Vec<_> = object.iter().collect();
                if self.sort_keys {
                    members.sort_by_key(|(key, _)| *key);
                }
                out.push('{');
                for (index, (key, item)) in members.into_iter().enumerate() {
                    self.start_item(index, depth, out);
                    self.write_string(key, out);
                    out.push_str(&self.separators.1);
                    self.write(item, depth + 1, out);
                }
                self.end_items(depth, out);
                out.push('}');
            }
        }
    }

    fn start_item(&self, index: usize, depth: usize, out: &mut String) {
        if index > 0 {
            out.push_str(&self.separators.0);
        }
        self.end_items(depth + 1, out);
    }

    fn end_items(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    }

    fn write_string(&self, text: &str, out: &mut String) {
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

/// `repr(float)`.
fn float_text(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    // Rust changes to exponents at the same sizes, but writes them without sign and padding.
    let text = format!("{value:?}");
    match text.split_once('e') {
        None => text,
        Some((mantissa, exponent)) => {
            let (sign, digits) = exponent.strip_prefix('-').map_or(('+', exponent), |digits| ('-', digits));
            format!("{}e{sign}{digits:0>2}", mantissa.strip_suffix(".0").unwrap_or(mantissa))
        }
    }
}

/// `str(value)`: what `{{ value }}` prints.
pub(super) fn text_of(value: &Value) -> String {
    match value.kind() {
        ValueKind::Seq | ValueKind::Map => repr(value),
        ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(float) => float_text(float),
            Err(_) => value.to_string(),
        },
        _ => value.to_string(),
    }
}

fn repr(value: &Value) -> String {
    let items = || value.try_iter().into_iter().flatten();
    match value.kind() {
        ValueKind::String => repr_string(value.as_str().unwrap_or_default()),
        ValueKind::Seq => format!("[{}]", items().map(|item| repr(&item)).collect::<Vec<_>>().join(", ")),
        ValueKind::Map => {
            let member = |key: Value| {
                let item = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", repr(&key), repr(&item))
            };
            format!("{{{}}}", items().map(member).collect::<Vec<_>>().join(", "))
        }
        _ => text_of(value),
    }
}

fn repr_string(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            same if same == quote => out.extend(['\\', quote]),
            control if control < ' ' || ('\u{7f}'..='\u{a0}').contains(&control) => {
                out.push_str(&format!("\\x{:02x}", u32::from(control)));
            }
            plain => out.push(plain),
        }
    }
    out.push(quote);
    out
}

/// Whether `str.strip()` removes a character: Unicode white space and the four ASCII separators.
fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

/// Methods of Python's built-in types.
pub(super) fn unknown_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), method, args) {
        (Some(text), "strip", []) => Ok(Value::from(text.trim_matches(is_space))),
        (Some(text), "lstrip", []) => Ok(Value::from(text.trim_start_matches(is_space))),
        (Some(text), "rstrip", []) => Ok(Value::from(text.trim_end_matches(is_space))),
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// The `iterable` test. `None` is not; minijinja says it is.
pub(super) fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// The `sequence` test: whatever has a length and items, so strings and dictionaries too.
pub(super) fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map)
}

/// The `trim` filter.
pub(super) fn trim(value: &Value, characters: Option<String>) -> String {
    let text = text_of(value);
    match characters {
        Some(characters) => text.trim_matches(|character| characters.contains(character)).to_owned(),
        None => text.trim_matches(is_space).to_owned(),
    }
}

/// A day, for templates that print the date.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Day {
    pub year: i64,
    pub month: usize,
    pub day: i64,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl Day {
    /// Days since Sunday.
    fn weekday(self) -> usize {
        // Sakamoto's method.
        const SHIFT: [i64; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
        let year = if self.month < 3 { self.year - 1 } else { self.year };
        let sum = year + year / 4 - year / 100 + year / 400 + SHIFT[self.month - 1] + self.day;
        sum.rem_euclid(7) as usize
    }

    /// `strftime` at midnight.
    pub(super) fn format(self, pattern: &str) -> Result<String, Error> {
        let mut out = String::new();
        let mut characters = pattern.chars();
        while let Some(character) = characters.next() {
            if character != '%' {
                out.push(character);
                continue;
            }
            let (month, weekday) = (MONTHS[self.month - 1], WEEKDAYS[self.weekday()]);
            let mut code = characters.next();
            let unpadded = code == Some('-');
            if unpadded {
                code = characters.next();
            }
            let number = |value: i64| if unpadded { value.to_string() } else { format!("{value:02}") };
            match code {
                Some('Y') => out.push_str(&self.year.to_string()),
                Some('y') => out.push_str(&number(self.year % 100)),
                Some('m') => out.push_str(&number(self.month as i64)),
                Some('d') => out.push_str(&number(self.day)),
                Some('e') => out.push_str(&format!("{:2}", self.day)),
                Some('B') => out.push_str(month),
                Some('b' | 'h') => out.push_str(&month[..3]),
                Some('A') => out.push_str(weekday),
                Some('a') => out.push_str(&weekday[..3]),
                Some('H' | 'M' | 'S') => out.push_str(&number(0)),
                Some('I') => out.push_str("12"),
                Some('p') => out.push_str("AM"),
                Some('F') => out.push_str(&self.format("%Y-%m-%d")?),
                Some('T') => out.push_str("00:00:00"),
                Some('Z') => out.push_str("UTC"),
                Some('%') => out.push('%'),
                other => {
                    let code = other.map_or_else(String::new, String::from);
                    let text = format!("strftime_now: `%{code}` in `{pattern}` is not supported");
                    return Err(Error::new(ErrorKind::InvalidOperation, text));
                }
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str) -> String {
        let value: serde_json::Value = serde_json::from_str(
            r#"{"z": "<a href='x'>é\"\n\u0001😀</a>", "a": [1, 2.5, 1e20, 1e-7, true, null], "e": {}, "l": []}"#,
        )
        .unwrap();
        let mut environment = minijinja::Environment::new();
        environment.add_filter("tojson", tojson);
        environment.set_unknown_method_callback(unknown_method);
        environment.set_formatter(|out, _, value| Ok(out.write_str(&text_of(value))?));
        environment.render_str(template, minijinja::context! { v => minijinja::value::Serde(&value) }).unwrap()
    }

    /// Every expected text was printed by CPython 3.
    #[test]
    fn tojson_is_json_dumps() {
        let plain = "{\"z\": \"<a href='x'>é\\\"\\n\\u0001😀</a>\", \"a\": [1, 2.5, 1e+20, 1e-07, true, null], \
                     \"e\": {}, \"l\": []}";
        assert_eq!(render("{{ v | tojson }}"), plain);
        assert_eq!(render("{{ v.z[:1] | tojson }}"), "\"<\"");
        assert_eq!(render("{{ 'é😀' | tojson(ensure_ascii=true) }}"), "\"\\u00e9\\ud83d\\ude00\"");
        assert_eq!(
            render("{{ {'b': [1], 'a': {}} | tojson(indent=2) }}"),
            "{\n  \"b\": [\n    1\n  ],\n  \"a\": {}\n}"
        );
        let compact = "{{ {'b': [1, 2], 'a': 1} | tojson(separators=(',', ':'), sort_keys=true) }}";
        assert_eq!(render(compact), "{\"a\":1,\"b\":[1,2]}");
    }

    #[test]
    fn values_print_as_in_python() {
        assert_eq!(render("{{ v.a }}"), "[1, 2.5, 1e+20, 1e-07, True, None]");
        assert_eq!(render("{{ {'k': \"it's\", 'q': 'a\"\\n'} }}"), "{'k': \"it's\", 'q': 'a\"\\n'}");
        assert_eq!(render("{{ 3.0 }} {{ true }} {{ none }} {{ missing }}."), "3.0 True None .");
        assert_eq!(render("[{{ ' \\x0b \\u001f a\\u00a0'.strip() }}]"), "[a]");
    }

    #[test]
    fn dates() {
        let day = Day { year: 2024, month: 7, day: 26 };
        assert_eq!(day.format("%d %b %Y").unwrap(), "26 Jul 2024");
        assert_eq!(day.format("%A, %B %-d, %y %%").unwrap(), "Friday, July 26, 24 %");
        assert_eq!(Day { year: 2000, month: 2, day: 29 }.format("%a %F").unwrap(), "Tue 2000-02-29");
        assert!(day.format("%Q").is_err());
    }
}
