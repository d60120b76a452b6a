//! What comes from elsewhere, on its way to a terminal: text of files and names, and panics of libraries.
//!
//! A name in a file may hold whatever it likes: line ends that would forge a message of this program's, sequences that
//! steer the terminal, or a megabyte. Shown, all of it is one line of bounded length.

use std::any::Any;
use std::borrow::Cow;
use std::fmt::Display;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;

/// Longest name or text shown of a file, in characters; what is longer is shown without its middle.
const LONGEST_NAME: usize = 200;
/// Longest line of a message.
const LONGEST_LINE: usize = 1000;
/// Most lines of a message.
const MOST_LINES: usize = 40;
/// How the second and later lines of this program's own messages begin. A line end before anything else is foreign.
const INDENT: &str = "  ";

/// A message: control characters, and line ends that are none of ours, as escapes; long quotes and lines without their
/// middle.
pub fn message(text: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    for piece in text.trim_end().split('\n') {
        match lines.last_mut() {
            Some(line) if !piece.starts_with(INDENT) => {
                line.push('\n');
                line.push_str(piece);
            }
            _ => lines.push(piece.to_owned()),
        }
    }
    let more = lines.len().saturating_sub(MOST_LINES);
    let mut shown: Vec<String> = lines.iter().take(MOST_LINES).map(|line| one_line(line)).collect();
    if more > 0 {
        shown.push(format!("{INDENT}and {more} more lines"));
    }
    shown.join("\n")
}

/// The same for a message that has one line.
pub fn one_line(text: &str) -> String {
    shorten(&escaped(&shorten_quotes(text.trim_end())), LONGEST_LINE).into_owned()
}

/// A name, as it is shown in a table or a message.
pub fn name(text: &str) -> String {
    shorten(&escaped(text), LONGEST_NAME).into_owned()
}

/// A path, in full.
pub fn path(path: &Path) -> String {
    escaped(&path.to_string_lossy()).into_owned()
}

/// Text of many lines, such as a document: its line ends and tabs stay.
pub fn block(text: &str) -> Cow<'_, str> {
    escape_where(text, |letter| is_harmful(letter) && !matches!(letter, '\n' | '\t'))
}

/// The first of some names, and how many more there are.
pub fn listed<T: AsRef<str>>(names: impl IntoIterator<Item = T>, most: usize) -> String {
    let mut names = names.into_iter();
    let mut text = names.by_ref().take(most).map(|one| name(one.as_ref())).collect::<Vec<_>>().join(", ");
    match names.count() {
        0 => {}
        more => text.push_str(&format!(" and {more} more")),
    }
    text
}

/// What a library answers, or the words of its panic. Some panic over files that contradict themselves.
pub fn library<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    panic::catch_unwind(AssertUnwindSafe(call)).map_err(|payload| one_line(panic_text(payload.as_ref())))
}

/// The same for a call that may fail: its error or its panic, in words.
pub fn answer<T, E: Display>(call: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    library(call).and_then(|answer| answer.map_err(|error| error.to_string()))
}

/// What a panic said.
pub fn panic_text(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("unknown")
}

/// Whether a terminal would obey it: control characters, line ends of every kind, and signs that turn the direction of
/// writing.
fn is_harmful(letter: char) -> bool {
    letter.is_control()
        || matches!(letter, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn escaped(text: &str) -> Cow<'_, str> {
    escape_where(text, is_harmful)
}

fn escape_where(text: &str, harmful: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&harmful) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for letter in text.chars() {
        match harmful(letter) {
            true => out.extend(letter.escape_default()),
            false => out.push(letter),
        }
    }
    Cow::Owned(out)
}

/// Without its middle where it has more letters than that.
fn shorten(text: &str, most: usize) -> Cow<'_, str> {
    // As many letters as bytes at most.
    if text.len() <= most || text.chars().count() <= most {
        return Cow::Borrowed(text);
    }
    let behind = most / 3;
    let cut = |count: usize| text.char_indices().nth(count).map_or(text.len(), |(at, _)| at);
    let (head, tail) = (cut(most - behind - 1), text.char_indices().nth_back(behind - 1).map_or(0, |(at, _)| at));
    Cow::Owned(format!("{}…{}", &text[..head], &text[tail..]))
}

/// Shortens what stands between quotes, paths aside.
fn shorten_quotes(text: &str) -> Cow<'_, str> {
    if text.len() <= LONGEST_NAME {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find(['`', '"']) {
        let (before, quoted) = rest.split_at(start);
        let quote = &quoted[..1];
        out.push_str(before);
        out.push_str(quote);
        rest = &quoted[1..];
        let Some(end) = closing(rest, quote) else { break };
        let inner = &rest[..end];
        match inner.starts_with(['/', '.']) {
            true => out.push_str(inner),
            false => out.push_str(&shorten(inner, LONGEST_NAME)),
        }
        out.push_str(quote);
        rest = &rest[end + 1..];
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// Where a quote ends; quotation marks behind a backslash belong to the text.
fn closing(text: &str, quote: &str) -> Option<usize> {
    let mut backslash = false;
    text.bytes().position(|byte| {
        let found = byte == quote.as_bytes()[0] && !backslash;
        backslash = quote == "\"" && byte == b'\\' && !backslash;
        found
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown_as_what_it_is() {
        let forged = "a\u{1b}[2J\r\nerror: b\u{7}\t\u{202e}\u{9b}c";
        let shown = "a\\u{1b}[2J\\r\\nerror: b\\u{7}\\t\\u{202e}\\u{9b}c";
        assert_eq!(message(forged), shown);
        assert_eq!(name(forged), shown);
        assert_eq!(path(Path::new(forged)), shown);
        assert_eq!(message(shown), shown);
        assert_eq!(block("a\n\tb\u{1b}[31m\r"), "a\n\tb\\u{1b}[31m\\r");
        assert_eq!(message("ünïcode 中文 👩‍👩‍👧"), "ünïcode 中文 👩‍👩‍👧");
    }

    #[test]
    fn our_own_lines_stay_lines() {
        let own = "the tensors do not fit:\n  missing (1):\n    a [2]";
        assert_eq!(message(own), own);
        assert_eq!(one_line(own), own.replace('\n', "\\n"));
        assert_eq!(message("cannot\nerror: be\n  left\n"), "cannot\\nerror: be\n  left");
        let many = (0..60).fold("list:".to_owned(), |text, line| text + &format!("\n  {line}"));
        assert!(message(&many).ends_with("\n  38\n  and 21 more lines"), "{}", message(&many));
    }

    #[test]
    fn long_text_loses_its_middle() {
        let long = "ä".repeat(5000);
        assert_eq!(name(&long).chars().count(), LONGEST_NAME);
        assert!(name(&long).contains('…'));
        assert_eq!(name(&"x".repeat(LONGEST_NAME)), "x".repeat(LONGEST_NAME));
        let shown = message(&format!("key `{long}`: expected \"{long}\\\"{long}\", got `b`"));
        assert!(shown.chars().count() < 450 && shown.ends_with(", got `b`"), "{shown}");
        let quoted_path = format!("`/{}` is not there", "d/".repeat(200));
        assert_eq!(message(&quoted_path), quoted_path);
        assert_eq!(message(&"word ".repeat(5000)).chars().count(), LONGEST_LINE);
        assert_eq!(path(Path::new(&"p/".repeat(2000))).len(), 4000);
        assert_eq!(message(&format!("an open quote: `{long}")).chars().count(), LONGEST_LINE);
    }

    #[test]
    fn lists_end_with_a_count() {
        assert_eq!(listed(["a\n", "b"], 3), "a\\n, b");
        assert_eq!(listed((0..9).map(|name| name.to_string()), 2), "0, 1 and 7 more");
    }

    #[test]
    fn a_panic_of_a_library_is_an_answer() {
        assert_eq!(library(|| 7), Ok(7));
        assert_eq!(library(|| -> u8 { panic!("no\nway") }), Err("no\\nway".to_owned()));
        assert_eq!(answer(|| "x".parse::<u8>()), Err("invalid digit found in string".to_owned()));
        assert_eq!(answer(|| -> Result<u8, String> { panic!("no") }), Err("no".to_owned()));
    }
}
