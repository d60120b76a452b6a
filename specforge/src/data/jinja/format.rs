//! `str % values` and `str.format`.

use super::access::{attribute, item};
use super::compare::undefined;
use super::limits::{Limits, Outcome, fail};
use super::number::{float_text, general, scientific, truncate};
use super::print::{repr, text_of};
use super::value::Value;

/// What stands between `%` or `:` and the letter of the kind.
#[derive(Debug, Default, Clone)]
struct Layout {
    fill: Option<char>,
    align: Option<char>,
    sign: Option<char>,
    no_negative_zero: bool,
    alternate: bool,
    zero: bool,
    width: usize,
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

/// Widths and precisions that can be meant.
const WIDEST: usize = 1 << 16;

fn checked_width(number: i128) -> Outcome<usize> {
    match usize::try_from(number) {
        Ok(width) if width <= WIDEST => Ok(width),
        _ => fail(format!("a width of {number} is not supported")),
    }
}

/// Reads digits.
fn digits(rest: &mut &str) -> Outcome<Option<usize>> {
    let length = rest.bytes().take_while(u8::is_ascii_digit).count();
    let (number, behind) = rest.split_at(length);
    *rest = behind;
    if number.is_empty() {
        return Ok(None);
    }
    match number.parse::<i128>() {
        Ok(number) => checked_width(number).map(Some),
        Err(_) => fail(format!("a width of {number} is not supported")),
    }
}

fn take(rest: &mut &str, wanted: impl Fn(char) -> bool) -> Option<char> {
    let first = rest.chars().next().filter(|first| wanted(*first))?;
    *rest = &rest[first.len_utf8()..];
    Some(first)
}

/// `pattern % values`.
pub(super) fn percent(pattern: &str, values: &Value, limits: &Limits) -> Outcome<String> {
    let positional: Vec<Value> = match values {
        Value::Tuple(items) => items.items.clone(),
        other => vec![other.clone()],
    };
    let (mut next, mut by_name) = (0, false);
    let mut out = String::new();
    let mut rest = pattern;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let mut layout = Layout::default();
        let mut named = None;
        if let Some(inside) = rest.strip_prefix('(') {
            let Some((name, behind)) = inside.split_once(')') else { return fail("incomplete format key") };
            let Value::Dict(dict) = values else { return fail("TypeError: format requires a mapping") };
            named = match dict.get_text(name) {
                Some(value) => Some(value.clone()),
                None => return fail(format!("KeyError: {name:?}")),
            };
            rest = behind;
            by_name = true;
        }
        while let Some(flag) = take(&mut rest, |flag| "#0- +".contains(flag)) {
            match flag {
                '#' => layout.alternate = true,
                '0' => layout.zero = true,
                '-' => layout.align = Some('<'),
                '+' => layout.sign = Some('+'),
                _ => layout.sign = layout.sign.or(Some(' ')),
            }
        }
        let mut argument = || match positional.get(next) {
            Some(value) => {
                next += 1;
                Ok(value.clone())
            }
            None => fail("TypeError: not enough arguments for format string"),
        };
        if take(&mut rest, |star| star == '*').is_some() {
            let Some(width) = argument()?.as_int() else { return fail("TypeError: * wants int") };
            layout.align = if width < 0 { Some('<') } else { layout.align };
            layout.width = checked_width(width.saturating_abs())?;
        } else {
            layout.width = digits(&mut rest)?.unwrap_or(0);
        }
        if take(&mut rest, |dot| dot == '.').is_some() {
            layout.precision = Some(if take(&mut rest, |star| star == '*').is_some() {
                let Some(precision) = argument()?.as_int() else { return fail("TypeError: * wants int") };
                checked_width(precision.max(0))?
            } else {
                digits(&mut rest)?.unwrap_or(0)
            });
        }
        while take(&mut rest, |size| "hlL".contains(size)).is_some() {}
        let Some(kind) = take(&mut rest, |_| true) else { return fail("ValueError: incomplete format") };
        if kind == '%' && (layout.width > 0 || layout.precision.is_some() || named.is_some()) {
            return fail("ValueError: unsupported format character '%'");
        }
        if kind == '%' {
            out.push('%');
            continue;
        }
        let value = match named {
            Some(value) => value,
            None => argument()?,
        };
        out.push_str(&percent_value(&value, kind, layout, limits)?);
        limits.room(out.len() / 16)?;
    }
    out.push_str(rest);
    let takes_rest = by_name
        || matches!(values, Value::Dict(_) | Value::List(_) | Value::Range(_) | Value::Bytes(_) | Value::Undefined(_));
    if next < positional.len() && !takes_rest {
        return fail("TypeError: not all arguments converted during string formatting");
    }
    limits.room(out.len())?;
    Ok(out)
}

fn percent_value(value: &Value, kind: char, mut layout: Layout, limits: &Limits) -> Outcome<String> {
    let is_left = layout.align == Some('<');
    let text = match kind {
        's' | 'r' | 'a' => {
            let mut text = String::new();
            match kind {
                's' => text = text_of(value, limits)?,
                _ => repr(value, limits, &mut text)?,
            }
            if kind == 'a' {
                text = text.chars().map(ascii_only).collect();
            }
            if let Some(longest) = layout.precision {
                text = text.chars().take(longest).collect();
            }
            return Ok(pad(&text, ' ', if is_left { '<' } else { '>' }, layout.width));
        }
        'c' => {
            let letter = match value {
                Value::Text(text) | Value::Markup(text) if text.chars().count() == 1 => text.to_string(),
                Value::Int(code) => match u32::try_from(*code).ok().and_then(char::from_u32) {
                    Some(letter) => letter.to_string(),
                    None => return fail("OverflowError: %c arg not in range(0x110000)"),
                },
                _ => return fail("TypeError: %c requires int or char"),
            };
            return Ok(pad(&letter, ' ', if is_left { '<' } else { '>' }, layout.width));
        }
        'd' | 'i' | 'u' | 'x' | 'X' | 'o' => {
            let number = match value {
                Value::Float(number) if matches!(kind, 'd' | 'i' | 'u') => truncate(*number)?,
                Value::Undefined(words) => return undefined(words),
                _ => match value.as_int() {
                    Some(number) => number,
                    None => {
                        return fail(format!(
                            "TypeError: %{kind} format: a number is required, not {}",
                            value.type_name()
                        ));
                    }
                },
            };
            let base = match kind {
                'x' => 'x',
                'X' => 'X',
                'o' => 'o',
                _ => 'd',
            };
            let digits = int_digits(number.unsigned_abs(), base);
            let digits = format!("{digits:0>width$}", width = layout.precision.unwrap_or(0));
            let prefix = if layout.alternate { int_prefix(base) } else { "" };
            (number < 0, format!("{prefix}{digits}"), prefix.len())
        }
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
            let number = match value {
                Value::Undefined(words) => return undefined(words),
                _ => match value.as_float() {
                    Some(number) => number,
                    None => return fail(format!("TypeError: must be real number, not {}", value.type_name())),
                },
            };
            let digits = float_digits(number.abs(), kind, layout.precision.unwrap_or(6), layout.alternate);
            layout.zero &= number.is_finite();
            (number.is_sign_negative() && !number.is_nan(), digits, 0)
        }
        other => return fail(format!("ValueError: unsupported format character '{other}'")),
    };
    let (is_negative, digits, prefix) = text;
    let sign = match (is_negative, layout.sign) {
        (true, _) => "-",
        (false, Some('+')) => "+",
        (false, Some(_)) => " ",
        (false, None) => "",
    };
    if layout.zero && !is_left {
        let width = layout.width.saturating_sub(sign.len() + prefix);
        return Ok(format!("{sign}{}{:0>width$}", &digits[..prefix], &digits[prefix..]));
    }
    Ok(pad(&format!("{sign}{digits}"), ' ', if is_left { '<' } else { '>' }, layout.width))
}

fn ascii_only(letter: char) -> String {
    match u32::from(letter) {
        ..=0x7f => letter.to_string(),
        code @ ..=0xff => format!("\\x{code:02x}"),
        code @ ..=0xffff => format!("\\u{code:04x}"),
        code => format!("\\U{code:08x}"),
    }
}

fn int_digits(number: u128, base: char) -> String {
    match base {
        'x' => format!("{number:x}"),
        'X' => format!("{number:X}"),
        'o' => format!("{number:o}"),
        'b' => format!("{number:b}"),
        _ => number.to_string(),
    }
}

fn int_prefix(base: char) -> &'static str {
    match base {
        'x' => "0x",
        'X' => "0X",
        'o' => "0o",
        'b' => "0b",
        _ => "",
    }
}

/// A float that is not negative.
fn float_digits(number: f64, kind: char, precision: usize, alternate: bool) -> String {
    let text = match kind.to_ascii_lowercase() {
        'e' => scientific(number, precision),
        'g' => general(number, precision, alternate),
        _ if !number.is_finite() => float_text(number),
        _ => format!("{number:.precision$}"),
    };
    let text = if alternate && precision == 0 && kind.eq_ignore_ascii_case(&'f') { format!("{text}.") } else { text };
    if kind.is_ascii_uppercase() { text.to_uppercase() } else { text }
}

/// Pads to a width in characters.
pub(super) fn pad(text: &str, fill: char, align: char, width: usize) -> String {
    let missing = width.saturating_sub(text.chars().count());
    let left = match align {
        '<' => 0,
        '^' => missing / 2,
        _ => missing,
    };
    let mut out = String::with_capacity(text.len() + missing * fill.len_utf8());
    out.extend(std::iter::repeat_n(fill, left));
    out.push_str(text);
    out.extend(std::iter::repeat_n(fill, missing - left));
    out
}

/// `pattern.format(*positional, **named)`.
pub(super) fn format(
    pattern: &str,
    positional: &[Value],
    named: &[(std::sync::Arc<str>, Value)],
    limits: &Limits,
) -> Outcome<String> {
    let mut fields = Fields { positional, named, next: 0, manual: false, limits };
    let out = fields.format(pattern, 2)?;
    limits.room(out.len())?;
    Ok(out)
}

struct Fields<'a> {
    positional: &'a [Value],
    named: &'a [(std::sync::Arc<str>, Value)],
    next: usize,
    /// Whether fields are numbered by hand.
    manual: bool,
    limits: &'a Limits,
}

impl Fields<'_> {
    fn format(&mut self, pattern: &str, levels: usize) -> Outcome<String> {
        if levels == 0 {
            return fail("ValueError: Max string recursion exceeded");
        }
        let mut out = String::new();
        let mut rest = pattern;
        while let Some(at) = rest.find(['{', '}']) {
            out.push_str(&rest[..at]);
            let brace = rest.as_bytes()[at];
            rest = &rest[at + 1..];
            if rest.as_bytes().first() == Some(&brace) {
                out.push(char::from(brace));
                rest = &rest[1..];
                continue;
            }
            if brace == b'}' {
                return fail("ValueError: Single '}' encountered in format string");
            }
            let mut open = 1;
            let end = rest.char_indices().find(|&(_, letter)| {
                open += i32::from(letter == '{') - i32::from(letter == '}');
                open == 0
            });
            let Some((end, _)) = end else { return fail("ValueError: expected '}' before end of string") };
            out.push_str(&self.field(&rest[..end], levels)?);
            self.limits.room(out.len() / 16)?;
            rest = &rest[end + 1..];
        }
        out.push_str(rest);
        Ok(out)
    }

    fn field(&mut self, field: &str, levels: usize) -> Outcome<String> {
        let name_end = field.find(['!', ':']).unwrap_or(field.len());
        // A bracket may hold the signs that end a name.
        let name_end = match field.find('[') {
            Some(open) if open < name_end => {
                let close = field[open..].rfind(']').map_or(open, |at| open + at);
                field[close..].find(['!', ':']).map_or(field.len(), |at| close + at)
            }
            _ => name_end,
        };
        let (name, mut rest) = field.split_at(name_end);
        let mut value = self.lookup(name)?;
        if let Some(behind) = rest.strip_prefix('!') {
            let kind = behind.chars().next();
            rest = &behind[kind.map_or(0, char::len_utf8)..];
            let mut text = String::new();
            match kind {
                Some('s') => text = text_of(&value, self.limits)?,
                Some('r') => repr(&value, self.limits, &mut text)?,
                Some('a') => {
                    repr(&value, self.limits, &mut text)?;
                    text = text.chars().map(ascii_only).collect();
                }
                _ => return fail("ValueError: Unknown conversion specifier"),
            }
            value = Value::text(text);
        }
        let layout = match rest.strip_prefix(':') {
            Some(layout) => self.format(layout, levels - 1)?,
            None if rest.is_empty() => String::new(),
            None => return fail("ValueError: expected ':' after conversion specifier"),
        };
        format_value(&value, &layout, self.limits)
    }

    fn lookup(&mut self, name: &str) -> Outcome<Value> {
        let first_end = name.find(['.', '[']).unwrap_or(name.len());
        let (first, mut rest) = name.split_at(first_end);
        let by_index = |index: usize| match self.positional.get(index) {
            Some(value) => Ok(value.clone()),
            None => fail("IndexError: Replacement index out of range for positional args tuple"),
        };
        let mut value = if first.is_empty() {
            if !rest.is_empty() {
                return fail("KeyError: ''");
            }
            if self.manual {
                return fail("ValueError: cannot switch from manual field specification to automatic field numbering");
            }
            self.next += 1;
            by_index(self.next - 1)?
        } else if let Ok(index) = first.parse::<usize>() {
            if self.next > 0 {
                return fail("ValueError: cannot switch from automatic field numbering to manual field specification");
            }
            self.manual = true;
            by_index(index)?
        } else {
            match self.named.iter().find(|(own, _)| &**own == first) {
                Some((_, value)) => value.clone(),
                None => return fail(format!("KeyError: {first:?}")),
            }
        };
        while !rest.is_empty() {
            if let Some(inside) = rest.strip_prefix('[') {
                let Some((key, behind)) = inside.split_once(']') else {
                    return fail("ValueError: Missing ']' in format string");
                };
                let key = key.parse::<i128>().map_or_else(|_| Value::text(key), Value::Int);
                value = item(&value, &key, self.limits)?;
                rest = behind;
            } else {
                let Some(behind) = rest.strip_prefix('.') else {
                    return fail("ValueError: Only '.' or '[' may follow ']' in format field specifier");
                };
                let end = behind.find(['.', '[']).unwrap_or(behind.len());
                value = attribute(&value, &behind[..end], self.limits)?;
                rest = &behind[end..];
            }
        }
        Ok(value)
    }
}

fn parse_layout(text: &str) -> Outcome<Layout> {
    let mut layout = Layout::default();
    let mut rest = text;
    let mut letters = rest.chars();
    let (first, second) = (letters.next(), letters.next());
    let is_align = |letter: Option<char>| letter.is_some_and(|letter| "<>=^".contains(letter));
    if is_align(second) {
        (layout.fill, layout.align) = (first, second);
        rest = letters.as_str();
    } else if is_align(first) {
        layout.align = take(&mut rest, |_| true);
    }
    layout.sign = take(&mut rest, |sign| "+- ".contains(sign));
    layout.no_negative_zero = take(&mut rest, |flag| flag == 'z').is_some();
    layout.alternate = take(&mut rest, |flag| flag == '#').is_some();
    layout.zero = take(&mut rest, |flag| flag == '0').is_some();
    layout.width = digits(&mut rest)?.unwrap_or(0);
    layout.grouping = take(&mut rest, |sign| ",_".contains(sign));
    if take(&mut rest, |dot| dot == '.').is_some() {
        match digits(&mut rest)? {
            Some(precision) => layout.precision = Some(precision),
            None => return fail("ValueError: Format specifier missing precision"),
        }
    }
    layout.kind = take(&mut rest, |_| true);
    if !rest.is_empty() {
        return fail(format!("ValueError: Invalid format specifier '{text}'"));
    }
    Ok(layout)
}

/// `format(value, layout)`.
fn format_value(value: &Value, text: &str, limits: &Limits) -> Outcome<String> {
    if text.is_empty() {
        return text_of(value, limits);
    }
    let layout = parse_layout(text)?;
    if layout.no_negative_zero && !matches!(value, Value::Float(_)) {
        return fail("ValueError: Negative zero coercion (z) not allowed");
    }
    let wrong = |kind: char| {
        fail(format!("ValueError: Unknown format code '{kind}' for object of type '{}'", value.type_name()))
    };
    match value {
        Value::Text(own) | Value::Markup(own) => {
            if let Some(kind) = layout.kind.filter(|kind| *kind != 's') {
                return wrong(kind);
            }
            if layout.sign.is_some() || layout.alternate || layout.grouping.is_some() || layout.align == Some('=') {
                return fail("ValueError: this is not allowed in a string format specifier");
            }
            let cut: String = own.chars().take(layout.precision.unwrap_or(usize::MAX)).collect();
            let fill = layout.fill.unwrap_or(if layout.zero { '0' } else { ' ' });
            Ok(pad(&cut, fill, layout.align.unwrap_or('<'), layout.width))
        }
        Value::Int(_) | Value::Bool(_) | Value::Float(_) => format_number(value, layout, wrong),
        other => fail(format!("TypeError: unsupported format string passed to {}.__format__", other.type_name())),
    }
}

fn format_number(value: &Value, layout: Layout, wrong: impl Fn(char) -> Outcome<String>) -> Outcome<String> {
    let kind = layout.kind;
    let whole = value.as_int().filter(|_| !kind.is_some_and(|kind| "eEfFgG%".contains(kind)));
    let (is_negative, prefix, mut digits, is_finite) = if let Some(number) = whole {
        if layout.precision.is_some() {
            return fail("ValueError: Precision not allowed in integer format specifier");
        }
        let base = match kind {
            None | Some('d' | 'n') => 'd',
            Some(base @ ('x' | 'X' | 'o' | 'b')) => base,
            Some('c') => {
                let letter = u32::try_from(number).ok().and_then(char::from_u32).map(String::from).unwrap_or_default();
                return Ok(pad(&letter, layout.fill.unwrap_or(' '), layout.align.unwrap_or('<'), layout.width));
            }
            Some(other) => return wrong(other),
        };
        let prefix = if layout.alternate { int_prefix(base) } else { "" };
        (number < 0, prefix, int_digits(number.unsigned_abs(), base), true)
    } else {
        let number = value.as_float().unwrap_or_default();
        let is_negative = number.is_sign_negative() && !number.is_nan();
        let size = number.abs();
        let text = match (kind, layout.precision) {
            (None, None) => float_text(size),
            (None, Some(precision)) => {
                let text = general(size, precision, false);
                // Like `repr`, this keeps one digit behind the point, and turns to exponents one digit earlier.
                let exponent = format!("{size:.*e}", precision.max(1) - 1);
                let exponent: i32 =
                    exponent.split_once('e').and_then(|(_, exponent)| exponent.parse().ok()).unwrap_or(0);
                match () {
                    () if !size.is_finite() || text.contains('e') => text,
                    () if exponent >= precision.max(1) as i32 - 1 => {
                        let text = scientific(size, precision.max(1) - 1);
                        match text.split_once('e') {
                            Some((mantissa, exponent)) if mantissa.contains('.') => {
                                format!("{}e{exponent}", mantissa.trim_end_matches('0').trim_end_matches('.'))
                            }
                            _ => text,
                        }
                    }
                    () if !text.contains('.') => format!("{text}.0"),
                    () => text,
                }
            }
            (Some('%'), precision) => {
                format!("{}%", float_digits(size * 100.0, 'f', precision.unwrap_or(6), layout.alternate))
            }
            (Some('n'), precision) => float_digits(size, 'g', precision.unwrap_or(6), layout.alternate),
            (Some(kind), precision) if "eEfFgG".contains(kind) => {
                float_digits(size, kind, precision.unwrap_or(6), layout.alternate)
            }
            (Some(other), _) => return wrong(other),
        };
        (is_negative, "", text, number.is_finite())
    };
    let sign = match (is_negative, layout.sign) {
        (true, _) => "-",
        (false, Some('+')) => "+",
        (false, Some(' ')) => " ",
        _ => "",
    };
    let align = layout.align.unwrap_or(if layout.zero { '=' } else { '>' });
    let fill = layout.fill.unwrap_or(if layout.zero { '0' } else { ' ' });
    let room = layout.width.saturating_sub(sign.len() + prefix.len());
    if let Some(mark) = layout.grouping.filter(|_| is_finite) {
        let every = if prefix.is_empty() && kind.is_none_or(|kind| !"xXob".contains(kind)) { 3 } else { 4 };
        let pads = if align == '=' && fill == '0' { room } else { 0 };
        digits = grouped(&digits, mark, every, pads);
    }
    if align == '=' {
        return Ok(format!("{sign}{prefix}{}", pad(&digits, fill, '>', room)));
    }
    Ok(pad(&format!("{sign}{prefix}{digits}"), fill, align, layout.width))
}

/// Digits in groups, with zeros in front up to a width.
fn grouped(text: &str, mark: char, every: usize, width: usize) -> String {
    let whole_end = text.find(|letter: char| !letter.is_ascii_hexdigit()).unwrap_or(text.len());
    let whole_end = text.find(['.', 'e', '%']).filter(|_| every == 3).unwrap_or(whole_end).min(text.len());
    let (whole, rest) = text.split_at(whole_end);
    let mut digits: Vec<char> = whole.chars().collect();
    let length = |count: usize| count + (count.max(1) - 1) / every + rest.len();
    while length(digits.len()) < width {
        digits.insert(0, '0');
    }
    let mut out = String::new();
    for (index, digit) in digits.iter().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(every) {
            out.push(mark);
        }
        out.push(*digit);
    }
    out + rest
}
