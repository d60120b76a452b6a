//! Methods of Python's built-in types, and of Jinja2's own objects.

use std::rc::Rc;

use super::arguments::Given;
use super::compare::{equal, items, undefined};
use super::limits::{Limits, Outcome, fail};
use super::value::{Dict, Value, View, is_hashable};
use super::words;

/// Calls `value.name(...)`.
pub(super) fn call(value: &Value, name: &str, given: &Given, limits: &Limits) -> Outcome<Value> {
    limits.step(1)?;
    match value {
        Value::Text(_) | Value::Markup(_) => words::call(value, name, given, limits),
        Value::Bytes(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => Ok(Value::text(text)),
            Err(error) => fail(format!("UnicodeDecodeError: {error}")),
        },
        Value::Dict(dict) => dict_method(dict, name, given, limits),
        Value::List(list) | Value::Tuple(list) if name != "copy" => sequence_method(&list.items, name, given, limits),
        Value::Range(_) => sequence_method(&items(value, limits)?, name, given, limits),
        Value::List(_) => {
            given.bind_positional(name, &[], 0)?;
            Value::list(items(value, limits)?)
        }
        Value::Loop(one) => match name {
            "cycle" if given.positional.is_empty() => fail("TypeError: no items for cycling given"),
            "cycle" => Ok(given.positional[one.index.get() % given.positional.len()].clone()),
            _ => {
                let before = one.changed.borrow_mut().replace(given.positional.clone());
                let same = match before {
                    None => false,
                    Some(before) => {
                        before.len() == given.positional.len() && all_equal(&before, &given.positional, limits)?
                    }
                };
                Ok(Value::Bool(!same))
            }
        },
        Value::Cycler(cycler) => {
            given.bind_positional(name, &[], 0)?;
            if name == "reset" {
                cycler.at.set(0);
                return Ok(Value::None);
            }
            let now = cycler.items[cycler.at.get()].clone();
            cycler.at.set((cycler.at.get() + 1) % cycler.items.len());
            Ok(now)
        }
        Value::Int(_) | Value::Bool(_) | Value::Float(_) => number_method(value, name, given),
        Value::Undefined(words) => undefined(words),
        other => fail(format!("`{}.{name}` is not supported", other.type_name())),
    }
}

fn all_equal(one: &[Value], two: &[Value], limits: &Limits) -> Outcome<bool> {
    for (one, two) in one.iter().zip(two) {
        if !equal(one, two, limits)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn dict_method(dict: &Rc<Dict>, name: &str, given: &Given, limits: &Limits) -> Outcome<Value> {
    match name {
        "get" => {
            let bound = given.bind_positional(name, &["key", "default"], 1)?;
            let key = bound.value(0);
            if !is_hashable(&key) {
                return fail(format!("TypeError: unhashable type: '{}'", key.type_name()));
            }
            Ok(dict.get(&key)?.cloned().unwrap_or_else(|| bound.value(1)))
        }
        "fromkeys" => {
            let bound = given.bind_positional(name, &["iterable", "value"], 1)?;
            let keys = items(&bound.value(0), limits)?;
            let pairs = keys.into_iter().map(|key| (key, bound.value(1)));
            Ok(Value::Dict(Rc::new(Dict::from_pairs(pairs)?)))
        }
        _ => {
            given.bind_positional(name, &[], 0)?;
            Ok(match name {
                "items" => Value::View(View::Items, dict.clone()),
                "keys" => Value::View(View::Keys, dict.clone()),
                "values" => Value::View(View::Values, dict.clone()),
                _ => Value::Dict(dict.clone()),
            })
        }
    }
}

fn sequence_method(list: &[Value], name: &str, given: &Given, limits: &Limits) -> Outcome<Value> {
    let bound = given.bind_positional(name, &["value", "start", "stop"], 1)?;
    let wanted = bound.value(0);
    if name == "count" {
        let mut count = 0;
        for item in list {
            count += i128::from(equal(item, &wanted, limits)?);
        }
        return Ok(Value::Int(count));
    }
    let place = |at: usize, absent: usize| -> Outcome<usize> {
        let number = bound.int(at, absent as i128)?;
        let number = if number < 0 { number + list.len() as i128 } else { number };
        Ok(number.clamp(0, list.len() as i128) as usize)
    };
    let (start, stop): (usize, usize) = (place(1, 0)?, place(2, list.len())?);
    for (index, item) in list.iter().enumerate().take(stop).skip(start) {
        if equal(item, &wanted, limits)? {
            return Ok(Value::Int(index as i128));
        }
    }
    fail("ValueError: the value is not in the list")
}

fn number_method(value: &Value, name: &str, given: &Given) -> Outcome<Value> {
    given.bind_positional(name, &[], 0)?;
    let whole = value.as_int();
    Ok(match (name, whole, value.as_float()) {
        ("bit_length", Some(number), _) => Value::Int(i128::from(128 - number.unsigned_abs().leading_zeros())),
        ("bit_count", Some(number), _) => Value::Int(i128::from(number.unsigned_abs().count_ones())),
        ("conjugate", Some(number), _) => Value::Int(number),
        ("conjugate", None, _) => value.clone(),
        ("is_integer", Some(_), _) => Value::Bool(true),
        ("is_integer", None, Some(number)) => Value::Bool(number.is_finite() && number.fract() == 0.0),
        ("as_integer_ratio", Some(number), _) => Value::tuple(vec![Value::Int(number), Value::Int(1)])?,
        _ => return fail(format!("`{}.{name}` is not supported", value.type_name())),
    })
}
