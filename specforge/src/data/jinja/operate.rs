//! Arithmetic, and what its signs mean for texts and lists.

use std::sync::Arc;

use super::compare::undefined;
use super::format;
use super::limits::{Limits, Outcome, fail};
use super::number::{divide_floats, divide_ints};
use super::print::text_of;
use super::syntax::Operator;
use super::value::{Items, Value};

fn sign(operator: Operator) -> &'static str {
    match operator {
        Operator::Add => "+",
        Operator::Subtract => "-",
        Operator::Multiply => "*",
        Operator::Divide => "/",
        Operator::FloorDivide => "//",
        Operator::Modulo => "%",
        Operator::Power => "**",
    }
}

/// `<`, `>`, `&` and quotes as entities.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('>', "&gt;").replace('<', "&lt;").replace('\'', "&#39;").replace('"', "&#34;")
}

/// Text as it stands inside markup.
pub(super) fn escaped(value: &Value, limits: &Limits) -> Outcome<String> {
    match value {
        Value::Markup(text) => Ok(text.to_string()),
        other => {
            let text = escape(&text_of(other, limits)?);
            limits.room(text.len())?;
            Ok(text)
        }
    }
}

/// Values as they are put into a pattern that is markup.
pub(super) fn escaped_inside(value: &Value, limits: &Limits) -> Outcome<Value> {
    Ok(match value {
        Value::Text(_) => Value::Markup(Arc::from(escaped(value, limits)?)),
        Value::Tuple(items) => {
            Value::tuple(items.items.iter().map(|item| escaped_inside(item, limits)).collect::<Outcome<_>>()?)?
        }
        other => other.clone(),
    })
}

/// `one operator two`.
pub(super) fn binary(operator: Operator, one: &Value, two: &Value, limits: &Limits) -> Outcome<Value> {
    limits.step(1)?;
    if let (Operator::Modulo, Some(pattern)) = (operator, one.as_text()) {
        if let Value::Markup(_) = one {
            let text = format::percent(pattern, &escaped_inside(two, limits)?, limits)?;
            return Ok(Value::Markup(Arc::from(text)));
        }
        let text = format::percent(pattern, two, limits)?;
        return Ok(Value::text(text));
    }
    if let Value::Undefined(words) = one {
        return undefined(words);
    }
    if let Value::Undefined(words) = two {
        return undefined(words);
    }
    if let (Some(one), Some(two)) = (one.as_int(), two.as_int()) {
        return ints(operator, one, two);
    }
    if let (Some(one), Some(two)) = (one.as_float(), two.as_float()) {
        return floats(operator, one, two);
    }
    match (operator, one, two) {
        (Operator::Add, Value::Markup(_), other) | (Operator::Add, other, Value::Markup(_))
            if other.as_text().is_some() =>
        {
            let text = escaped(one, limits)? + &escaped(two, limits)?;
            limits.room(text.len())?;
            Ok(Value::Markup(Arc::from(text)))
        }
        (Operator::Add, Value::Text(one), Value::Text(two)) => {
            limits.room(one.len() + two.len())?;
            Ok(Value::text([&**one, &**two].concat()))
        }
        (Operator::Add, Value::List(one), Value::List(two)) => Value::list(joined(one, two, limits)?),
        (Operator::Add, Value::Tuple(one), Value::Tuple(two)) => Value::tuple(joined(one, two, limits)?),
        (Operator::Multiply, _, _) => match (repeated(one, two, limits)?, repeated(two, one, limits)?) {
            (Some(value), _) | (None, Some(value)) => Ok(value),
            (None, None) => wrong(operator, one, two),
        },
        _ => wrong(operator, one, two),
    }
}

fn wrong(operator: Operator, one: &Value, two: &Value) -> Outcome<Value> {
    fail(format!(
        "TypeError: unsupported operand type(s) for {}: '{}' and '{}'",
        sign(operator),
        one.type_name(),
        two.type_name()
    ))
}

fn joined(one: &Items, two: &Items, limits: &Limits) -> Outcome<Vec<Value>> {
    limits.room((one.items.len() + two.items.len()) * size_of::<Value>())?;
    Ok(one.items.iter().chain(&two.items).cloned().collect())
}

/// `value * count` of a text or list.
fn repeated(value: &Value, count: &Value, limits: &Limits) -> Outcome<Option<Value>> {
    let Some(count) = count.as_int() else { return Ok(None) };
    let count = usize::try_from(count.max(0)).unwrap_or(usize::MAX);
    Ok(Some(match value {
        Value::Text(text) | Value::Markup(text) => {
            limits.room(text.len().saturating_mul(count))?;
            let text = if text.is_empty() { String::new() } else { text.repeat(count) };
            if matches!(value, Value::Text(_)) { Value::text(text) } else { Value::Markup(Arc::from(text)) }
        }
        Value::List(items) | Value::Tuple(items) => {
            limits.room(items.items.len().saturating_mul(count).saturating_mul(size_of::<Value>()))?;
            let items = if items.items.is_empty() {
                Vec::new()
            } else {
                std::iter::repeat_n(&items.items, count).flatten().cloned().collect()
            };
            if matches!(value, Value::List(_)) { Value::list(items)? } else { Value::tuple(items)? }
        }
        _ => return Ok(None),
    }))
}

fn ints(operator: Operator, one: i128, two: i128) -> Outcome<Value> {
    let whole = match operator {
        Operator::Add => one.checked_add(two),
        Operator::Subtract => one.checked_sub(two),
        Operator::Multiply => one.checked_mul(two),
        Operator::FloorDivide => Some(divide_ints(one, two)?.0),
        Operator::Modulo => Some(divide_ints(one, two)?.1),
        Operator::Divide => {
            if two == 0 {
                return fail("ZeroDivisionError: division by zero");
            }
            return Ok(Value::Float(one as f64 / two as f64));
        }
        Operator::Power if two < 0 => return floats(operator, one as f64, two as f64),
        Operator::Power => match u32::try_from(two) {
            Ok(power) => one.checked_pow(power),
            Err(_) if matches!(one, 0 | 1) => Some(one),
            Err(_) if one == -1 => Some(if two % 2 == 0 { 1 } else { -1 }),
            Err(_) => None,
        },
    };
    match whole {
        Some(number) => Ok(Value::Int(number)),
        None => fail("a whole number is too large: more than 127 bits are not supported"),
    }
}

fn floats(operator: Operator, one: f64, two: f64) -> Outcome<Value> {
    Ok(Value::Float(match operator {
        Operator::Add => one + two,
        Operator::Subtract => one - two,
        Operator::Multiply => one * two,
        Operator::Divide if two == 0.0 => return fail("ZeroDivisionError: float division by zero"),
        Operator::Divide => one / two,
        Operator::FloorDivide => divide_floats(one, two)?.0,
        Operator::Modulo => divide_floats(one, two)?.1,
        Operator::Power if one == 0.0 && two < 0.0 => {
            return fail("ZeroDivisionError: 0.0 cannot be raised to a negative power");
        }
        Operator::Power if one < 0.0 && two.fract() != 0.0 && two.is_finite() => {
            return fail("complex numbers are not supported");
        }
        Operator::Power => {
            let power = one.powf(two);
            if power.is_infinite() && one.is_finite() && two.is_finite() {
                return fail("OverflowError: Numerical result out of range");
            }
            power
        }
    }))
}

/// `-value` and `+value`.
pub(super) fn signed(value: &Value, negative: bool) -> Outcome<Value> {
    if let Value::Undefined(words) = value {
        return undefined(words);
    }
    match (value.as_int(), value) {
        (Some(number), _) => match if negative { number.checked_neg() } else { Some(number) } {
            Some(number) => Ok(Value::Int(number)),
            None => fail("a whole number is too large"),
        },
        (None, Value::Float(number)) => Ok(Value::Float(if negative { -number } else { *number })),
        _ => fail(format!("TypeError: bad operand type for unary -: '{}'", value.type_name())),
    }
}
