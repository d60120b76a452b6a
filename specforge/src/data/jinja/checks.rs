//! Jinja2's tests: what may stand behind `is`.

use super::arguments::Given;
use super::compare::{contains, equal, is_iterable, order, same, undefined};
use super::limits::{Limits, Outcome, fail};
use super::operate::binary;
use super::print::text_of;
use super::syntax::Operator;
use super::value::Value;
use std::cmp::Ordering;

const NAMES: &[&str] = &[
    "!=",
    "<",
    "<=",
    "==",
    ">",
    ">=",
    "boolean",
    "callable",
    "defined",
    "divisibleby",
    "eq",
    "equalto",
    "escaped",
    "even",
    "false",
    "filter",
    "float",
    "ge",
    "greaterthan",
    "gt",
    "in",
    "integer",
    "iterable",
    "le",
    "lessthan",
    "lower",
    "lt",
    "mapping",
    "ne",
    "none",
    "number",
    "odd",
    "sameas",
    "sequence",
    "string",
    "test",
    "true",
    "undefined",
    "upper",
];

/// Whether there is a test of this name.
pub(super) fn is_known(name: &str) -> bool {
    NAMES.contains(&name)
}

/// `value is name(...)`. `is_filter` says which filters there are.
pub(super) fn check(
    name: &str,
    value: &Value,
    given: &Given,
    is_filter: fn(&str) -> bool,
    limits: &Limits,
) -> Outcome<bool> {
    limits.step(1)?;
    let other = || -> Outcome<Value> { Ok(given.bind(name, &["other"], 1)?.value(0)) };
    let compared =
        |wanted: fn(Ordering) -> bool| -> Outcome<bool> { Ok(order(value, &other()?, limits)?.is_some_and(wanted)) };
    Ok(match name {
        "==" | "eq" | "equalto" => equal(value, &other()?, limits)?,
        "!=" | "ne" => !equal(value, &other()?, limits)?,
        "<" | "lt" | "lessthan" => compared(Ordering::is_lt)?,
        "<=" | "le" => compared(Ordering::is_le)?,
        ">" | "gt" | "greaterthan" => compared(Ordering::is_gt)?,
        ">=" | "ge" => compared(Ordering::is_ge)?,
        "in" => contains(&other()?, value, limits)?,
        "sameas" => same(value, &other()?),
        "divisibleby" => {
            let rest = binary(Operator::Modulo, value, &other()?, limits)?;
            equal(&rest, &Value::Int(0), limits)?
        }
        _ => {
            given.bind(name, &[], 0)?;
            simple(name, value, is_filter, limits)?
        }
    })
}

fn simple(name: &str, value: &Value, is_filter: fn(&str) -> bool, limits: &Limits) -> Outcome<bool> {
    Ok(match name {
        "defined" => !value.is_undefined(),
        "undefined" => value.is_undefined(),
        "none" => matches!(value, Value::None),
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "boolean" => matches!(value, Value::Bool(_)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => matches!(value, Value::Int(_) | Value::Float(_) | Value::Bool(_)),
        "string" => value.as_text().is_some(),
        "mapping" => matches!(value, Value::Dict(_)),
        "iterable" => is_iterable(value),
        "sequence" => matches!(
            value,
            Value::Undefined(_)
                | Value::Text(_)
                | Value::Markup(_)
                | Value::Bytes(_)
                | Value::List(_)
                | Value::Tuple(_)
                | Value::Dict(_)
                | Value::Range(_)
        ),
        // An undefined value has the method too.
        "callable" => matches!(
            value,
            Value::Macro(_)
                | Value::Function(_)
                | Value::Method(_)
                | Value::Block(_)
                | Value::Joiner(_)
                | Value::Loop(_)
                | Value::Undefined(_)
        ),
        "escaped" => matches!(value, Value::Markup(_)),
        "odd" | "even" => match (value, value.as_int(), value.as_float()) {
            (Value::Undefined(words), _, _) => return undefined(words),
            (_, Some(number), _) => (number.rem_euclid(2) == 1) == (name == "odd"),
            (_, None, Some(number)) => number.rem_euclid(2.0) == f64::from(u8::from(name == "odd")),
            _ => return fail(format!("TypeError: {name}: expected a number")),
        },
        "lower" | "upper" => {
            let text = text_of(value, limits)?;
            let cased = text.chars().any(|letter| letter.is_lowercase() || letter.is_uppercase());
            cased && !text.chars().any(if name == "lower" { char::is_uppercase } else { char::is_lowercase })
        }
        "filter" | "test" => {
            let Some(wanted) = value.as_text() else {
                // Any hashable value may be asked for.
                return if super::value::is_hashable(value) { Ok(false) } else { fail("TypeError: unhashable type") };
            };
            if name == "filter" { is_filter(wanted) } else { is_known(wanted) }
        }
        _ => return fail(format!("there is no test `{name}`")),
    })
}
