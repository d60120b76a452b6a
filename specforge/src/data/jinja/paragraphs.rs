//! Filters that lay text out: `wordwrap`, `truncate`, `striptags`.

use std::sync::Arc;

use super::arguments::Given;
use super::compare::{length, undefined};
use super::lexer::is_space;
use super::limits::{Limits, Outcome, fail};
use super::print::text_of;
use super::value::Value;
use super::words::lines;

/// `value | name(...)`.
pub(super) fn apply(name: &str, value: &Value, given: &Given, limits: &Limits) -> Outcome<Value> {
    match name {
        "wordwrap" => word_wrap(value, given, limits),
        "truncate" => truncate(value, given, limits),
        _ => {
            given.bind(name, &[], 0)?;
            Ok(Value::text(strip_tags(&text_of(value, limits)?)))
        }
    }
}

fn own_text<'a>(name: &str, value: &'a Value) -> Outcome<&'a str> {
    match value {
        Value::Undefined(words) => undefined(words),
        other => match other.as_text() {
            Some(text) => Ok(text),
            None => fail(format!("TypeError: {name}: expected str, got '{}'", value.type_name())),
        },
    }
}

fn truncate(value: &Value, given: &Given, limits: &Limits) -> Outcome<Value> {
    let bound = given.bind("truncate", &["length", "killwords", "end", "leeway"], 0)?;
    let end = if bound.get(2).is_some() { bound.text(2)? } else { "..." };
    let (longest, end_length) = (bound.int(0, 255)?, end.chars().count() as i128);
    let leeway = if bound.some(3).is_some() { bound.int(3, 5)? } else { 5 };
    if longest < end_length || leeway < 0 {
        return fail(format!("truncate: expected a length of at least {end_length} and no negative leeway"));
    }
    if length(value)? as i128 <= longest.saturating_add(leeway) {
        return Ok(value.clone());
    }
    let text = own_text("truncate", value)?;
    limits.room(text.len())?;
    let cut: String = text.chars().take((longest - end_length) as usize).collect();
    let kept = if bound.is_true(1, false) { &cut[..] } else { cut.rsplit_once(' ').map_or(&cut[..], |(kept, _)| kept) };
    let out = format!("{kept}{end}");
    Ok(if matches!(value, Value::Markup(_)) { Value::Markup(Arc::from(out)) } else { Value::text(out) })
}

/// `markupsafe`'s `striptags`: comments and tags go, white space becomes single spaces, entities become characters.
fn strip_tags(text: &str) -> String {
    let without = |text: String, open: &str, close: &str| {
        let (mut out, mut rest) = (String::new(), &text[..]);
        while let Some(start) = rest.find(open) {
            let Some(end) = rest[start..].find(close) else { break };
            out.push_str(&rest[..start]);
            rest = &rest[start + end + close.len()..];
        }
        out + rest
    };
    let text = without(without(text.to_owned(), "<!--", "-->"), "<", ">");
    let words: Vec<&str> = text.split(is_space).filter(|word| !word.is_empty()).collect();
    words
        .join(" ")
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&#39;", "'")
        .replace("&#34;", "\"")
        .replace("&quot;", "\"")
        .replace("&amp;", "&")
}

fn word_wrap(value: &Value, given: &Given, limits: &Limits) -> Outcome<Value> {
    let parameters = ["width", "break_long_words", "wrapstring", "break_on_hyphens"];
    let bound = given.bind("wordwrap", &parameters, 0)?;
    let text = own_text("wordwrap", value)?;
    let Some(width) = usize::try_from(bound.int(0, 79)?).ok().filter(|width| *width > 0) else {
        return fail("wordwrap: expected a width of at least 1");
    };
    let (break_words, hyphens) = (bound.is_true(1, true), bound.is_true(3, true));
    let between = if bound.some(2).is_some() { bound.text(2)? } else { "\n" };
    limits.room(text.len().saturating_mul(between.len() + 1))?;
    let lines = lines(text, false).into_iter().map(|line| wrap(line, width, break_words, hyphens).join(between));
    Ok(Value::text(lines.collect::<Vec<_>>().join(between)))
}

/// Words and the white space between them, cut behind hyphens inside words.
fn pieces(line: &str, hyphens: bool) -> Vec<String> {
    let is_gap = |letter: char| matches!(letter, ' ' | '\t' | '\n' | '\u{b}' | '\u{c}' | '\r');
    let mut out: Vec<String> = Vec::new();
    let letters: Vec<char> = line.chars().collect();
    let mut current = String::new();
    let is_letter = |at: usize| letters.get(at).is_some_and(|letter| letter.is_alphabetic() || *letter == '_');
    for (at, &letter) in letters.iter().enumerate() {
        if current.chars().next_back().is_some_and(|last| is_gap(last) != is_gap(letter)) {
            out.push(std::mem::take(&mut current));
        }
        current.push(letter);
        let joins = letter == '-'
            && at >= 2
            && is_letter(at - 1)
            && (is_letter(at - 2) || letters[at - 2].is_numeric() || letters[at - 2] == '-')
            && is_letter(at + 1)
            && (is_letter(at + 2)
                || letters.get(at + 2) == Some(&'-')
                || (at >= 2 && is_letter(at - 2) && is_letter(at + 2)));
        if hyphens && joins {
            out.push(std::mem::take(&mut current));
        }
    }
    if !current.is_empty() {
        out.push(current);
    }
    out
}

/// `textwrap.wrap` without changes to white space inside lines.
fn wrap(line: &str, width: usize, break_words: bool, hyphens: bool) -> Vec<String> {
    let length = |text: &str| text.chars().count();
    let is_blank = |text: &str| text.chars().all(is_space);
    let mut rest: std::collections::VecDeque<String> = pieces(line, hyphens).into();
    let mut out: Vec<String> = Vec::new();
    while !rest.is_empty() {
        if !out.is_empty() && rest.front().is_some_and(|piece| is_blank(piece)) {
            rest.pop_front();
        }
        let (mut current, mut used) = (Vec::new(), 0);
        while let Some(piece) = rest.front()
            && used + length(piece) <= width
        {
            used += length(piece);
            current.extend(rest.pop_front());
        }
        if let Some(piece) = rest.front().filter(|piece| length(piece) > width).cloned() {
            if break_words {
                let mut cut = width.saturating_sub(used).max(usize::from(width == 0));
                if hyphens && length(&piece) > cut {
                    let head: Vec<char> = piece.chars().take(cut).collect();
                    if let Some(at) = head.iter().rposition(|letter| *letter == '-')
                        && at > 0
                        && head[..at].iter().any(|letter| *letter != '-')
                    {
                        cut = at + 1;
                    }
                }
                let head: String = piece.chars().take(cut).collect();
                rest[0] = piece.chars().skip(cut).collect();
                current.push(head);
            } else if current.is_empty() {
                current.extend(rest.pop_front());
            }
        }
        if current.last().is_some_and(|piece| is_blank(piece)) {
            current.pop();
        }
        if !current.is_empty() {
            out.push(current.concat());
        }
    }
    out
}
