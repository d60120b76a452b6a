//! From a template's text to tokens, with Jinja2's rules for white space: `trim_blocks` and `lstrip_blocks` are on, as
//! transformers sets them.

use super::limits::{Outcome, fail};

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Token {
    /// Text between tags.
    Data(String),
    VariableBegin,
    VariableEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    Text(String),
    Int(i128),
    Float(f64),
    Sign(&'static str),
    End,
}

impl Token {
    /// As a message names it.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Data(_) => "text".to_owned(),
            Self::VariableBegin => "`{{`".to_owned(),
            Self::VariableEnd => "`}}`".to_owned(),
            Self::BlockBegin => "`{%`".to_owned(),
            Self::BlockEnd => "`%}`".to_owned(),
            Self::Name(name) => format!("`{name}`"),
            Self::Text(text) => format!("{text:?}"),
            Self::Int(number) => format!("`{number}`"),
            Self::Float(number) => format!("`{number}`"),
            Self::Sign(sign) => format!("`{sign}`"),
            Self::End => "the end of the template".to_owned(),
        }
    }
}

/// Longest first.
const SIGNS: [&str; 26] = [
    "**", "//", "==", "!=", "<=", ">=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<", "=", ".",
    ":", "|", ",", ";",
];

/// White space as Python's regular expressions see it.
pub(super) fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

/// Line ends become `\n`, and one at the end of the template goes.
pub(super) fn normalise(source: &str) -> String {
    let mut text = source.replace("\r\n", "\n").replace('\r', "\n");
    if text.ends_with('\n') {
        text.pop();
    }
    text
}

/// Tokens with their lines.
pub(super) fn tokens(source: &str) -> Outcome<Vec<(Token, usize)>> {
    let text = normalise(source);
    let mut lexer = Lexer { text: &text, at: 0, line: 1, counted: 0, line_starts: true, out: Vec::new() };
    lexer.run()?;
    lexer.push(Token::End);
    Ok(lexer.out)
}

struct Lexer<'a> {
    text: &'a str,
    at: usize,
    line: usize,
    /// Up to where lines are counted.
    counted: usize,
    /// Whether the last tag took the end of its line with it.
    line_starts: bool,
    out: Vec<(Token, usize)>,
}

impl<'a> Lexer<'a> {
    fn push(&mut self, token: Token) {
        let end = self.at.min(self.text.len());
        if end > self.counted {
            self.line += self.text[self.counted..end].matches('\n').count();
            self.counted = end;
        }
        self.out.push((token, self.line));
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn fail<T>(&mut self, problem: &str) -> Outcome<T> {
        self.push(Token::End);
        fail(format!("line {}: {problem}", self.line))
    }

    fn skip_space(&mut self) {
        self.at = self.text.len() - self.rest().trim_start_matches(is_space).len();
    }

    fn run(&mut self) -> Outcome<()> {
        while self.at < self.text.len() {
            let Some(found) = next_tag(self.rest()) else {
                self.push(Token::Data(self.rest().to_owned()));
                self.at = self.text.len();
                break;
            };
            let before = &self.rest()[..found];
            let opening = self.rest().as_bytes()[found + 1];
            let mut start = self.at + found + 2;
            let sign = self.text[start..].chars().next().filter(|sign| matches!(sign, '-' | '+'));
            start += usize::from(sign.is_some());
            let data = self.strip(before, sign, opening != b'{').to_owned();
            if !data.is_empty() {
                self.push(Token::Data(data));
            }
            self.at = start;
            self.line_starts = false;
            match opening {
                b'{' => {
                    self.push(Token::VariableBegin);
                    self.tag("}}", Token::VariableEnd)?;
                }
                b'#' => self.comment()?,
                _ => match raw_begin(self.rest()) {
                    Some(length) => {
                        self.at += length;
                        self.line_starts = self.text[..self.at].ends_with('\n');
                        self.raw()?;
                    }
                    None => {
                        self.push(Token::BlockBegin);
                        self.tag("%}", Token::BlockEnd)?;
                    }
                },
            }
        }
        Ok(())
    }

    /// Text before a tag, without the white space that the tag takes away.
    fn strip(&self, before: &'a str, sign: Option<char>, is_block: bool) -> &'a str {
        if sign == Some('-') {
            return before.trim_end_matches(is_space);
        }
        let line = before.rfind('\n').map_or(0, |at| at + 1);
        if sign.is_none() && is_block && (line > 0 || self.line_starts) && before[line..].chars().all(is_space) {
            return &before[..line];
        }
        before
    }

    /// The end of a block or comment, if it stands here: its length with what it takes away behind it.
    fn block_end(&self, mark: &str) -> Option<usize> {
        let rest = self.rest();
        if let Some(behind) = rest.strip_prefix('-').and_then(|rest| rest.strip_prefix(mark)) {
            return Some(rest.len() - behind.trim_start_matches(is_space).len());
        }
        if rest.strip_prefix('+').is_some_and(|rest| rest.starts_with(mark)) {
            return Some(1 + mark.len());
        }
        let behind = rest.strip_prefix(mark)?;
        Some(mark.len() + usize::from(behind.starts_with('\n')))
    }

    fn comment(&mut self) -> Outcome<()> {
        let Some(found) = self.rest().find("#}") else {
            return self.fail("a comment has no end");
        };
        let signed = found > 0 && matches!(self.rest().as_bytes()[found - 1], b'-' | b'+');
        self.at += found - usize::from(signed);
        self.at += self.block_end("#}").unwrap_or(2);
        self.line_starts = self.text[..self.at].ends_with('\n');
        Ok(())
    }

    /// The inside of `{% raw %}`.
    fn raw(&mut self) -> Outcome<()> {
        let from = self.at;
        let mut search = from;
        while let Some(found) = self.text[search..].find("{%") {
            let tag = search + found;
            let inside = &self.text[tag + 2..];
            let sign = inside.chars().next().filter(|sign| matches!(sign, '-' | '+'));
            let name = inside[usize::from(sign.is_some())..].trim_start_matches(is_space);
            if let Some(end) = name.strip_prefix("endraw") {
                self.at = self.text.len() - end.trim_start_matches(is_space).len();
                if let Some(length) = self.block_end("%}") {
                    let data = self.strip(&self.text[from..tag], sign, true).to_owned();
                    self.push(Token::Data(data));
                    self.at += length;
                    self.line_starts = self.text[..self.at].ends_with('\n');
                    return Ok(());
                }
            }
            search = tag + 2;
        }
        self.fail("`raw` has no `endraw`")
    }

    /// The inside of a tag and its end.
    fn tag(&mut self, end: &'static str, closing: Token) -> Outcome<()> {
        let mut open: Vec<char> = Vec::new();
        loop {
            if open.is_empty() {
                let length = if end == "%}" {
                    self.block_end(end)
                } else if self.rest().starts_with("-}}") {
                    Some(self.rest().len() - self.rest()[3..].trim_start_matches(is_space).len())
                } else {
                    self.rest().starts_with(end).then_some(2)
                };
                if let Some(length) = length {
                    self.push(closing);
                    self.at += length;
                    self.line_starts = self.text[..self.at].ends_with('\n');
                    return Ok(());
                }
            }
            let Some(first) = self.rest().chars().next() else {
                return self.fail(&format!("a tag has no end: expected `{end}`"));
            };
            if is_space(first) {
                self.skip_space();
            } else if first.is_ascii_digit() {
                self.number()?;
            } else if first == '_' || first.is_alphanumeric() {
                let length = self.rest().find(|letter: char| letter != '_' && !letter.is_alphanumeric());
                let name = self.rest()[..length.unwrap_or(self.rest().len())].to_owned();
                self.push(Token::Name(name.clone()));
                self.at += name.len();
            } else if matches!(first, '\'' | '"') {
                self.string(first)?;
            } else if let Some(sign) = SIGNS.into_iter().find(|sign| self.rest().starts_with(*sign)) {
                match first {
                    '(' | '[' | '{' => open.push(first),
                    ')' | ']' | '}' => {
                        let fits =
                            matches!((open.pop(), first), (Some('('), ')') | (Some('['), ']') | (Some('{'), '}'));
                        if !fits {
                            return self.fail(&format!("unexpected `{first}`"));
                        }
                    }
                    _ => {}
                }
                self.push(Token::Sign(sign));
                self.at += sign.len();
            } else {
                return self.fail(&format!("unexpected character `{first}`"));
            }
        }
    }

    fn number(&mut self) -> Outcome<()> {
        let rest = self.rest();
        let behind_dot = self.text[..self.at].ends_with('.');
        if let Some(length) = float_length(rest).filter(|_| !behind_dot) {
            let number = rest[..length].replace('_', "").parse();
            let Ok(number) = number else { return self.fail("a number cannot be read") };
            self.push(Token::Float(number));
            self.at += length;
            return Ok(());
        }
        let lower = rest.get(..2).unwrap_or(rest).to_ascii_lowercase();
        let radix = match lower.as_str() {
            "0b" => 2,
            "0o" => 8,
            "0x" => 16,
            _ => 10,
        };
        let (prefix, digits) = match radix {
            10 => (
                0,
                digits_length(rest, |digit| if rest.starts_with('0') { digit == '0' } else { digit.is_ascii_digit() }),
            ),
            _ => {
                let body = &rest[2..];
                let first = usize::from(body.starts_with('_'));
                (2, digits_length(&body[first..], |digit| digit.is_digit(radix)) + first)
            }
        };
        // `0x` without digits is a zero and a name.
        let (radix, length) = if prefix > 0 && digits == 0 { (10, 1) } else { (radix, prefix + digits) };
        let text = rest[if length > prefix { prefix } else { 0 }..length].replace('_', "");
        match i128::from_str_radix(&text, radix) {
            Ok(number) => self.push(Token::Int(number)),
            Err(_) => return self.fail(&format!("the number `{}` is too large", &rest[..length.min(60)])),
        }
        self.at += length;
        Ok(())
    }

    fn string(&mut self, quote: char) -> Outcome<()> {
        let inside = &self.rest()[1..];
        let mut escaped = false;
        let end = inside.char_indices().find(|&(_, letter)| {
            let ends = letter == quote && !escaped;
            escaped = letter == '\\' && !escaped;
            ends
        });
        let Some((end, _)) = end else { return self.fail("a string has no end") };
        match unescape(&inside[..end]) {
            Ok(text) => self.push(Token::Text(text)),
            Err(problem) => return self.fail(&problem),
        }
        self.at += end + 2;
        Ok(())
    }
}

/// Where the next `{{`, `{%` or `{#` stands.
fn next_tag(text: &str) -> Option<usize> {
    text.as_bytes().windows(2).position(|pair| pair[0] == b'{' && matches!(pair[1], b'{' | b'%' | b'#'))
}

/// Length of the rest of `{% raw %}` behind its opening.
fn raw_begin(text: &str) -> Option<usize> {
    let behind = text.trim_start_matches(is_space).strip_prefix("raw")?.trim_start_matches(is_space);
    let rest = match behind.strip_prefix("-%}") {
        Some(rest) => rest.trim_start_matches(is_space),
        None => behind.strip_prefix("%}")?,
    };
    Some(text.len() - rest.len())
}

/// Length of digits with single underscores between them.
fn digits_length(text: &str, is_digit: impl Fn(char) -> bool) -> usize {
    let bytes = text.as_bytes();
    let digit = |at: usize| bytes.get(at).is_some_and(|byte| is_digit(char::from(*byte)));
    let mut length = usize::from(digit(0));
    while length > 0 {
        match () {
            () if digit(length) => length += 1,
            () if bytes.get(length) == Some(&b'_') && digit(length + 1) => length += 2,
            () => break,
        }
    }
    length
}

/// Length of a number with a fraction or an exponent.
fn float_length(text: &str) -> Option<usize> {
    let digits = |from: usize| digits_length(text.get(from..).unwrap_or_default(), |digit| digit.is_ascii_digit());
    let whole = digits(0);
    let bytes = text.as_bytes();
    let mut length = whole;
    if bytes.get(length) == Some(&b'.') && digits(length + 1) > 0 {
        length += 1 + digits(length + 1);
    }
    if matches!(bytes.get(length), Some(b'e' | b'E')) {
        let sign = usize::from(matches!(bytes.get(length + 1), Some(b'+' | b'-')));
        let exponent = digits(length + 1 + sign);
        if exponent > 0 {
            length += 1 + sign + exponent;
        }
    }
    (length > whole && whole > 0).then_some(length)
}

/// Python's escapes.
fn unescape(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let mut letters = rest[at + 1..].chars();
        let Some(letter) = letters.next() else { break };
        rest = letters.as_str();
        let mut code = |digits: usize, radix: u32| {
            let cut = rest.get(..digits).filter(|cut| cut.chars().all(|digit| digit.is_digit(radix)));
            let cut = cut.ok_or_else(|| format!("a string holds `\\{letter}` without {digits} digits behind it"))?;
            rest = &rest[digits..];
            let code = u32::from_str_radix(cut, radix).map_err(|error| error.to_string())?;
            char::from_u32(code).ok_or_else(|| format!("a string holds `\\{letter}{cut}`, which is no character"))
        };
        match letter {
            '\n' => {}
            '\\' | '\'' | '"' => out.push(letter),
            'a' => out.push('\u{7}'),
            'b' => out.push('\u{8}'),
            'f' => out.push('\u{c}'),
            'n' => out.push('\n'),
            'r' => out.push('\r'),
            't' => out.push('\t'),
            'v' => out.push('\u{b}'),
            'x' => out.push(code(2, 16)?),
            'u' => out.push(code(4, 16)?),
            'U' => out.push(code(8, 16)?),
            'N' => {
                let (name, behind) = rest
                    .strip_prefix('{')
                    .and_then(|rest| rest.split_once('}'))
                    .ok_or("a string holds `\\N` without a name in braces")?;
                let known = NAMED.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
                out.push(
                    known
                        .ok_or_else(|| format!("the character name `{name}` is not known; write `\\u` and its code"))?
                        .1,
                );
                rest = behind;
            }
            '0'..='7' => {
                let more = rest.bytes().take(2).take_while(|digit| (b'0'..=b'7').contains(digit)).count();
                let digits = format!("{letter}{}", &rest[..more]);
                let code = u32::from_str_radix(&digits, 8).map_err(|error| error.to_string())?;
                out.extend(char::from_u32(code));
                rest = &rest[more..];
            }
            other => out.extend(['\\', other]),
        }
    }
    out.push_str(rest);
    Ok(out)
}

/// The character names that have been seen in templates.
const NAMED: [(&str, char); 8] = [
    ("BULLET", '•'),
    ("EM DASH", '—'),
    ("EN DASH", '–'),
    ("HORIZONTAL ELLIPSIS", '…'),
    ("NO-BREAK SPACE", '\u{a0}'),
    ("ZERO WIDTH SPACE", '\u{200b}'),
    ("LOWER ONE EIGHTH BLOCK", '▁'),
    ("FULLWIDTH VERTICAL LINE", '｜'),
];
