//! Methods of `str`.

use std::sync::Arc;

use super::arguments::{Bound, Given};
use super::compare::{items, length};
use super::format::{format, pad};
use super::lexer::is_space;
use super::limits::{Limits, Outcome, fail};
use super::operate::{escaped, escaped_inside};
use super::print::is_printable;
use super::value::{Dict, Value};

/// Calls a method of a text.
pub(super) fn call(value: &Value, name: &str, given: &Given, limits: &Limits) -> Outcome<Value> {
    let Some(text) = value.as_text() else { return fail("a text is expected") };
    limits.step(text.len() / 64)?;
    let is_markup = matches!(value, Value::Markup(_));
    let made = |text: String| -> Outcome<Value> {
        limits.room(text.len())?;
        Ok(if is_markup { Value::Markup(Arc::from(text)) } else { Value::text(text) })
    };
    let bind = |parameters: &[&str], required: usize| given.bind_positional(name, parameters, required);
    match name {
        "upper" | "lower" | "title" | "capitalize" | "swapcase" | "casefold" => {
            bind(&[], 0)?;
            made(match name {
                "upper" => text.to_uppercase(),
                "lower" => text.to_lowercase(),
                "title" => title(text),
                "capitalize" => capitalize(text),
                "casefold" => text.to_lowercase().replace('ß', "ss").replace('ς', "σ"),
                _ => text.chars().flat_map(swap_case).collect(),
            })
        }
        "strip" | "lstrip" | "rstrip" => {
            let bound = bind(&["chars"], 0)?;
            let set = match bound.some(0) {
                Some(_) => Some(bound.text(0)?),
                None => None,
            };
            made(strip(text, set, name != "rstrip", name != "lstrip").to_owned())
        }
        "split" | "rsplit" => {
            let bound = given.bind(name, &["sep", "maxsplit"], 0)?;
            let separator = match bound.some(0) {
                Some(_) => Some(bound.text(0)?),
                None => None,
            };
            let most = usize::try_from(bound.int(1, -1)?).unwrap_or(usize::MAX);
            let parts = split(text, separator, most, name == "rsplit")?;
            limits.room(parts.len() * size_of::<Value>() + text.len())?;
            Value::list(parts.into_iter().map(|part| made(part.to_owned())).collect::<Outcome<_>>()?)
        }
        "splitlines" => {
            let bound = given.bind(name, &["keepends"], 0)?;
            let lines = lines(text, bound.is_true(0, false));
            limits.room(lines.len() * size_of::<Value>() + text.len())?;
            Value::list(lines.into_iter().map(|part| made(part.to_owned())).collect::<Outcome<_>>()?)
        }
        "partition" | "rpartition" => {
            let bound = bind(&["sep"], 1)?;
            let separator = bound.text(0)?;
            if separator.is_empty() {
                return fail("ValueError: empty separator");
            }
            let cut = if name == "partition" { text.split_once(separator) } else { text.rsplit_once(separator) };
            let parts = match cut {
                Some((before, behind)) => [before, separator, behind],
                None if name == "partition" => [text, "", ""],
                None => ["", "", text],
            };
            Value::tuple(parts.into_iter().map(|part| made(part.to_owned())).collect::<Outcome<_>>()?)
        }
        "startswith" | "endswith" => {
            let bound = bind(&["prefix", "start", "end"], 1)?;
            let Some(window) = window(text, &bound)? else { return Ok(Value::Bool(false)) };
            let check = |part: &Value| match part.as_text() {
                Some(part) if name == "startswith" => Ok(window.1.starts_with(part)),
                Some(part) => Ok(window.1.ends_with(part)),
                None => fail(format!("TypeError: {name} first arg must be str or a tuple of str")),
            };
            match bound.value(0) {
                Value::Tuple(parts) => {
                    for part in &parts.items {
                        if check(part)? {
                            return Ok(Value::Bool(true));
                        }
                    }
                    Ok(Value::Bool(false))
                }
                part => Ok(Value::Bool(check(&part)?)),
            }
        }
        "find" | "rfind" | "index" | "rindex" | "count" => {
            let bound = bind(&["sub", "start", "end"], 1)?;
            let part = bound.text(0)?;
            let Some((start, window)) = window(text, &bound)? else {
                return if name.ends_with("index") {
                    fail("ValueError: substring not found")
                } else {
                    Ok(Value::Int(if name == "count" { 0 } else { -1 }))
                };
            };
            limits.step(window.len() / 16)?;
            if name == "count" {
                let count = if part.is_empty() { window.chars().count() + 1 } else { window.matches(part).count() };
                return Ok(Value::Int(count as i128));
            }
            let found = if name.starts_with('r') { window.rfind(part) } else { window.find(part) };
            match found {
                Some(at) => Ok(Value::Int((start + window[..at].chars().count()) as i128)),
                None if name.ends_with("index") => fail("ValueError: substring not found"),
                None => Ok(Value::Int(-1)),
            }
        }
        "replace" => {
            let bound = bind(&["old", "new", "count"], 2)?;
            made(replace(text, bound.text(0)?, bound.text(1)?, bound.int(2, -1)?, limits)?)
        }
        "removeprefix" => made(text.strip_prefix(bind(&["prefix"], 1)?.text(0)?).unwrap_or(text).to_owned()),
        "removesuffix" => made(text.strip_suffix(bind(&["suffix"], 1)?.text(0)?).unwrap_or(text).to_owned()),
        "join" => {
            let bound = bind(&["iterable"], 1)?;
            let parts = items(&bound.value(0), limits)?;
            join(value, &parts, limits)
        }
        "center" | "ljust" | "rjust" => {
            let bound = bind(&["width", "fillchar"], 1)?;
            let width = width(bound.int(0, 0)?, limits)?;
            let fill = match bound.get(1) {
                Some(_) => single(bound.text(1)?)?,
                None => ' ',
            };
            limits.room(width.saturating_mul(fill.len_utf8()))?;
            made(match name {
                "ljust" => pad(text, fill, '<', width),
                "rjust" => pad(text, fill, '>', width),
                _ => center(text, fill, width),
            })
        }
        "zfill" => {
            let width = width(bind(&["width"], 1)?.int(0, 0)?, limits)?;
            let sign = text.chars().next().filter(|sign| matches!(sign, '+' | '-'));
            let rest = &text[usize::from(sign.is_some())..];
            let padded = pad(rest, '0', '>', width.saturating_sub(usize::from(sign.is_some())));
            made(sign.map(String::from).unwrap_or_default() + &padded)
        }
        "expandtabs" => {
            let size = width(given.bind(name, &["tabsize"], 0)?.int(0, 8)?, limits)?;
            limits.room(text.matches('\t').count().saturating_mul(size))?;
            made(expand_tabs(text, size))
        }
        "format" if is_markup => {
            let positional = given.positional.iter().map(|value| escaped_inside(value, limits));
            let named = given.named.iter().map(|(name, value)| Ok((name.clone(), escaped_inside(value, limits)?)));
            let (positional, named) = (positional.collect::<Outcome<Vec<_>>>()?, named.collect::<Outcome<Vec<_>>>()?);
            made(format(text, &positional, &named, limits)?)
        }
        "format" => made(format(text, &given.positional, &given.named, limits)?),
        "format_map" => match bind(&["mapping"], 1)?.value(0) {
            Value::Dict(dict) => {
                let named: Vec<(Arc<str>, Value)> = dict
                    .entries
                    .iter()
                    .filter_map(|(key, value)| Some((Arc::from(key.as_text()?), value.clone())))
                    .collect();
                made(format(text, &[], &named, limits)?)
            }
            other => fail(format!("TypeError: format_map: expected a mapping, got '{}'", other.type_name())),
        },
        "encode" => {
            let bound = given.bind(name, &["encoding", "errors"], 0)?;
            let encoding = bound.printed(0, "utf-8", limits)?.to_lowercase().replace('_', "-");
            match encoding.as_str() {
                "utf-8" | "utf8" => Ok(Value::Bytes(text.as_bytes().into())),
                "ascii" if text.is_ascii() => Ok(Value::Bytes(text.as_bytes().into())),
                other => fail(format!("encode: the encoding {other} is not supported")),
            }
        }
        "maketrans" => maketrans(given),
        "translate" => {
            let Value::Dict(table) = bind(&["table"], 1)?.value(0) else {
                return fail("translate: expected a dictionary");
            };
            made(translate(text, &table)?)
        }
        _ => {
            bind(&[], 0)?;
            match is(text, name) {
                Some(yes) => Ok(Value::Bool(yes)),
                None => fail(format!("`str.{name}` is not supported")),
            }
        }
    }
}

fn single(text: &str) -> Outcome<char> {
    let mut letters = text.chars();
    match (letters.next(), letters.next()) {
        (Some(letter), None) => Ok(letter),
        _ => fail("TypeError: The fill character must be exactly one character long"),
    }
}

fn width(number: i128, limits: &Limits) -> Outcome<usize> {
    let width = usize::try_from(number.max(0)).unwrap_or(usize::MAX);
    limits.room(width)?;
    Ok(width)
}

/// `str.center`, which puts the odd space to the left of texts of odd length in odd widths only.
pub(super) fn center(text: &str, fill: char, width: usize) -> String {
    let length = text.chars().count();
    let missing = width.saturating_sub(length);
    let left = missing / 2 + (missing & width & 1);
    let mut out: String = std::iter::repeat_n(fill, left).collect();
    out.push_str(text);
    out.extend(std::iter::repeat_n(fill, missing - left));
    out
}

/// `str.strip` and its one-sided kin.
pub(super) fn strip<'a>(text: &'a str, set: Option<&str>, start: bool, end: bool) -> &'a str {
    let goes = |letter: char| set.map_or_else(|| is_space(letter), |set| set.contains(letter));
    let text = if start { text.trim_start_matches(goes) } else { text };
    if end { text.trim_end_matches(goes) } else { text }
}

/// `separator.join(parts)`.
pub(super) fn join(separator: &Value, parts: &[Value], limits: &Limits) -> Outcome<Value> {
    let is_markup = matches!(separator, Value::Markup(_));
    let between = separator.as_text().unwrap_or_default();
    let mut out = String::new();
    for (index, part) in parts.iter().enumerate() {
        let Some(text) = part.as_text() else {
            return fail(format!(
                "TypeError: sequence item {index}: expected str instance, {} found",
                part.type_name()
            ));
        };
        limits.room(text.len() + between.len())?;
        if index > 0 {
            out.push_str(between);
        }
        match is_markup {
            true => out.push_str(&escaped(part, limits)?),
            false => out.push_str(text),
        }
    }
    limits.room(out.len())?;
    Ok(if is_markup { Value::Markup(Arc::from(out)) } else { Value::text(out) })
}

/// `str.replace`; a negative count means all.
pub(super) fn replace(text: &str, old: &str, new: &str, count: i128, limits: &Limits) -> Outcome<String> {
    let most = usize::try_from(count).unwrap_or(usize::MAX);
    let found = if old.is_empty() { text.chars().count() + 1 } else { text.matches(old).count() }.min(most);
    limits.room(text.len().saturating_add(found.saturating_mul(new.len())))?;
    Ok(text.replacen(old, new, most))
}

/// `str.split` and `str.rsplit`.
fn split<'a>(text: &'a str, separator: Option<&str>, most: usize, from_right: bool) -> Outcome<Vec<&'a str>> {
    let mut parts: Vec<&str> = Vec::new();
    match separator {
        Some("") => return fail("ValueError: empty separator"),
        Some(separator) if from_right => {
            parts = text.rsplitn(most.saturating_add(1), separator).collect();
            parts.reverse();
        }
        Some(separator) => parts = text.splitn(most.saturating_add(1), separator).collect(),
        None if from_right => {
            let mut rest = text.trim_end_matches(is_space);
            while !rest.is_empty() && parts.len() < most {
                let start =
                    rest.rfind(is_space).map_or(0, |at| at + rest[at..].chars().next().map_or(1, char::len_utf8));
                parts.push(&rest[start..]);
                rest = rest[..start].trim_end_matches(is_space);
            }
            if !rest.is_empty() {
                parts.push(rest);
            }
            parts.reverse();
        }
        None => {
            let mut rest = text.trim_start_matches(is_space);
            while !rest.is_empty() && parts.len() < most {
                let end = rest.find(is_space).unwrap_or(rest.len());
                parts.push(&rest[..end]);
                rest = rest[end..].trim_start_matches(is_space);
            }
            if !rest.is_empty() {
                parts.push(rest);
            }
        }
    }
    Ok(parts)
}

/// `str.splitlines`.
pub(super) fn lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let is_end = |letter: char| {
        matches!(letter, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    let mut out = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(is_end).unwrap_or(rest.len());
        let sign = match rest[end..].starts_with("\r\n") {
            true => 2,
            false => rest[end..].chars().next().map_or(0, char::len_utf8),
        };
        out.push(&rest[..if keep_ends { end + sign } else { end }]);
        rest = &rest[end + sign..];
    }
    out
}

/// The part of a text between the arguments `start` and `end`, and where it starts. None if it starts behind the end.
fn window<'a>(text: &'a str, bound: &Bound) -> Outcome<Option<(usize, &'a str)>> {
    if bound.some(1).is_none() && bound.some(2).is_none() {
        return Ok(Some((0, text)));
    }
    let count = length(&Value::text(text))? as i128;
    let place = |at: usize, absent: i128| -> Outcome<i128> {
        match bound.some(at) {
            None => Ok(absent),
            Some(_) => {
                let number = bound.int(at, absent)?;
                Ok(if number < 0 { (number + count).max(0) } else { number })
            }
        }
    };
    let (start, end) = (place(1, 0)?, place(2, count)?.min(count));
    if start > count || start > end {
        return Ok(None);
    }
    let byte = |at: i128| text.char_indices().nth(at as usize).map_or(text.len(), |(byte, _)| byte);
    Ok(Some((start as usize, &text[byte(start)..byte(end)])))
}

fn title_case(letter: char) -> String {
    // The few letters with a title form of their own.
    match letter {
        'Ǆ' | 'ǆ' => "ǅ".to_owned(),
        'Ǉ' | 'ǉ' => "ǈ".to_owned(),
        'Ǌ' | 'ǌ' => "ǋ".to_owned(),
        'Ǳ' | 'ǳ' => "ǲ".to_owned(),
        other => {
            let upper: String = other.to_uppercase().collect();
            // Ligatures of Latin letters start with one capital.
            if upper.len() > 1 && upper.bytes().all(|letter| letter.is_ascii_alphabetic()) {
                upper[..1].to_owned() + &upper[1..].to_lowercase()
            } else {
                upper
            }
        }
    }
}

/// `str.title`.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for letter in text.chars() {
        match inside {
            true => out.extend(letter.to_lowercase()),
            false => out.push_str(&title_case(letter)),
        }
        inside = letter.is_lowercase() || letter.is_uppercase() || "ǅǈǋǲ".contains(letter);
    }
    out
}

/// `str.capitalize`.
pub(super) fn capitalize(text: &str) -> String {
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => title_case(first) + &letters.as_str().to_lowercase(),
        None => String::new(),
    }
}

fn swap_case(letter: char) -> Vec<char> {
    if letter.is_uppercase() { letter.to_lowercase().collect() } else { letter.to_uppercase().collect() }
}

fn expand_tabs(text: &str, size: usize) -> String {
    let (mut out, mut column) = (String::new(), 0);
    for letter in text.chars() {
        match letter {
            '\t' if size > 0 => {
                let fill = size - column % size;
                out.extend(std::iter::repeat_n(' ', fill));
                column += fill;
            }
            '\t' => {}
            '\n' | '\r' => {
                out.push(letter);
                column = 0;
            }
            other => {
                out.push(other);
                column += 1;
            }
        }
    }
    out
}

fn is_cased(letter: char) -> bool {
    letter.is_lowercase() || letter.is_uppercase()
}

/// `str.isalpha` and its kin.
fn is(text: &str, name: &str) -> Option<bool> {
    let all = |check: fn(char) -> bool| !text.is_empty() && text.chars().all(check);
    let is_decimal = |letter: char| {
        letter.is_ascii_digit()
            || (letter.is_numeric() && super::number::parse_int(letter.encode_utf8(&mut [0; 4]), 10).is_some())
    };
    Some(match name {
        "isalpha" => all(|letter| letter.is_alphabetic() && !letter.is_numeric()),
        "isalnum" => all(char::is_alphanumeric),
        "isascii" => text.is_ascii(),
        "isdecimal" => !text.is_empty() && text.chars().all(is_decimal),
        "isdigit" => {
            !text.is_empty()
                && text.chars().all(|letter| is_decimal(letter) || "²³¹⁰⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉①②③④⑤⑥⑦⑧⑨".contains(letter))
        }
        "isnumeric" => all(char::is_numeric),
        "isspace" => all(is_space),
        "isprintable" => text.chars().all(is_printable),
        "islower" => text.chars().any(is_cased) && !text.chars().any(char::is_uppercase),
        "isupper" => text.chars().any(is_cased) && !text.chars().any(char::is_lowercase),
        "isidentifier" => {
            let starts = text.starts_with(|first: char| first == '_' || (first.is_alphabetic() && !first.is_numeric()));
            starts && text.chars().all(|letter| letter == '_' || letter.is_alphanumeric())
        }
        "istitle" => {
            let (mut inside, mut any) = (false, false);
            for letter in text.chars() {
                let starts = letter.is_uppercase() || "ǅǈǋǲ".contains(letter);
                if starts && inside || letter.is_lowercase() && !inside {
                    return Some(false);
                }
                inside = starts || letter.is_lowercase();
                any |= inside;
            }
            any
        }
        _ => return None,
    })
}

/// `str.maketrans`.
fn maketrans(given: &Given) -> Outcome<Value> {
    let code = |letter: char| Value::Int(i128::from(u32::from(letter)));
    let bound = given.bind_positional("maketrans", &["x", "y", "z"], 1)?;
    let mut table = Dict::default();
    if let (Value::Dict(dict), None) = (bound.value(0), bound.get(1)) {
        for (key, value) in &dict.entries {
            let key = match key.as_text() {
                Some(text) => code(single(text)?),
                None => key.clone(),
            };
            table.insert(key, value.clone())?;
        }
        return Ok(Value::Dict(std::rc::Rc::new(table)));
    }
    let (from, to) = (bound.text(0)?, bound.text(1)?);
    if from.chars().count() != to.chars().count() {
        return fail("ValueError: the first two maketrans arguments must have equal length");
    }
    for (from, to) in from.chars().zip(to.chars()) {
        table.insert(code(from), code(to))?;
    }
    for gone in bound.text(2)?.chars() {
        table.insert(code(gone), Value::None)?;
    }
    Ok(Value::Dict(std::rc::Rc::new(table)))
}

fn translate(text: &str, table: &Dict) -> Outcome<String> {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match table.get(&Value::Int(i128::from(u32::from(letter))))? {
            None => out.push(letter),
            Some(Value::None) => {}
            Some(value) => match (value.as_text(), value.as_int()) {
                (Some(text), _) => out.push_str(text),
                (None, Some(code)) => out.extend(u32::try_from(code).ok().and_then(char::from_u32)),
                _ => return fail("TypeError: character mapping must return integer, None or str"),
            },
        }
    }
    Ok(out)
}
