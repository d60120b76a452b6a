//! Truth, equality, order, length, membership, and walking through values.

use std::cmp::Ordering;

use super::limits::{Limits, Outcome, fail};
use super::value::{Items, Value, View, is_hashable};

/// Fails as an undefined value does when it is used.
pub(super) fn undefined<T>(words: &str) -> Outcome<T> {
    fail(format!("undefined value: {words}"))
}

/// `bool(value)`.
pub(super) fn is_true(value: &Value) -> bool {
    match value {
        Value::Undefined(_) | Value::None => false,
        Value::Bool(yes) => *yes,
        Value::Int(number) => *number != 0,
        Value::Float(number) => *number != 0.0,
        Value::Text(text) | Value::Markup(text) => !text.is_empty(),
        Value::Bytes(bytes) => !bytes.is_empty(),
        Value::List(items) | Value::Tuple(items) => !items.items.is_empty(),
        Value::Dict(dict) | Value::View(_, dict) => !dict.entries.is_empty(),
        Value::Range(range) => range.len() > 0,
        _ => true,
    }
}

/// `a == b`.
pub(super) fn equal(one: &Value, two: &Value, limits: &Limits) -> Outcome<bool> {
    limits.step(1)?;
    limits.stack()?;
    if let (Some(one), Some(two)) = (one.as_text(), two.as_text()) {
        limits.step(one.len().min(two.len()) / 64)?;
        return Ok(one == two);
    }
    if let (Some(one), Some(two)) = (one.as_int(), two.as_int()) {
        return Ok(one == two);
    }
    if let (Some(one), Some(two)) = (one.as_float(), two.as_float()) {
        return Ok(one == two);
    }
    Ok(match (one, two) {
        (Value::Undefined(_), Value::Undefined(_)) | (Value::None, Value::None) => true,
        (Value::Bytes(one), Value::Bytes(two)) => one == two,
        (Value::List(one), Value::List(two)) | (Value::Tuple(one), Value::Tuple(two)) => equal_items(one, two, limits)?,
        (Value::Dict(one), Value::Dict(two)) => {
            if one.entries.len() != two.entries.len() {
                return Ok(false);
            }
            for (key, value) in &one.entries {
                match two.get(key)? {
                    Some(other) if equal(value, other, limits)? => {}
                    _ => return Ok(false),
                }
            }
            true
        }
        (Value::Range(one), Value::Range(two)) => {
            one.len() == two.len()
                && (one.len() == 0 || (one.start == two.start && (one.len() == 1 || one.step == two.step)))
        }
        (Value::View(View::Values, _), _) | (_, Value::View(View::Values, _)) => same(one, two),
        (Value::View(..), Value::View(..)) => {
            let (one, two) = (items(one, limits)?, items(two, limits)?);
            one.len() == two.len() && contains_all(&one, &two, limits)?
        }
        _ => same(one, two),
    })
}

fn contains_all(all: &[Value], some: &[Value], limits: &Limits) -> Outcome<bool> {
    for item in some {
        if !is_among(item, all, limits)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn is_among(item: &Value, all: &[Value], limits: &Limits) -> Outcome<bool> {
    for other in all {
        if equal(item, other, limits)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn equal_items(one: &Items, two: &Items, limits: &Limits) -> Outcome<bool> {
    if one.items.len() != two.items.len() {
        return Ok(false);
    }
    for (one, two) in one.items.iter().zip(&two.items) {
        if !equal(one, two, limits)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// `a is b`, where Python answers the same at every run.
pub(super) fn same(one: &Value, two: &Value) -> bool {
    use std::ptr::addr_eq;
    use std::rc::Rc;
    match (one, two) {
        (Value::None, Value::None) => true,
        (Value::Bool(one), Value::Bool(two)) => one == two,
        (Value::Int(one), Value::Int(two)) => one == two,
        (Value::Float(one), Value::Float(two)) => one == two,
        (Value::Text(one), Value::Text(two)) => one == two,
        (Value::List(one), Value::List(two)) => Rc::ptr_eq(one, two),
        (Value::Tuple(one), Value::Tuple(two)) => {
            Rc::ptr_eq(one, two) || (one.items.is_empty() && two.items.is_empty())
        }
        (Value::Dict(one), Value::Dict(two)) => Rc::ptr_eq(one, two),
        (Value::Namespace(one), Value::Namespace(two)) => Rc::ptr_eq(one, two),
        (Value::Macro(one), Value::Macro(two)) => Rc::ptr_eq(one, two),
        (Value::Loop(one), Value::Loop(two)) => Rc::ptr_eq(one, two),
        (Value::Stream(one), Value::Stream(two)) => Rc::ptr_eq(one, two),
        (Value::Function(one), Value::Function(two)) => one == two,
        (Value::Undefined(one), Value::Undefined(two)) => addr_eq(Rc::as_ptr(one), Rc::as_ptr(two)),
        _ => false,
    }
}

/// `a < b`, `a > b` and so on; None where neither holds (not a number).
pub(super) fn order(one: &Value, two: &Value, limits: &Limits) -> Outcome<Option<Ordering>> {
    limits.step(1)?;
    limits.stack()?;
    if let (Some(one), Some(two)) = (one.as_text(), two.as_text()) {
        limits.step(one.len().min(two.len()) / 64)?;
        return Ok(Some(one.cmp(two)));
    }
    if let (Some(one), Some(two)) = (one.as_int(), two.as_int()) {
        return Ok(Some(one.cmp(&two)));
    }
    if let (Some(one), Some(two)) = (one.as_float(), two.as_float()) {
        return Ok(one.partial_cmp(&two));
    }
    match (one, two) {
        (Value::Undefined(words), _) | (_, Value::Undefined(words)) => undefined(words),
        (Value::List(one), Value::List(two)) | (Value::Tuple(one), Value::Tuple(two)) => {
            for (one, two) in one.items.iter().zip(&two.items) {
                if !equal(one, two, limits)? {
                    return order(one, two, limits);
                }
            }
            Ok(Some(one.items.len().cmp(&two.items.len())))
        }
        (Value::Bytes(one), Value::Bytes(two)) => Ok(Some(one.cmp(two))),
        _ => fail(format!("TypeError: '{}' and '{}' have no order", one.type_name(), two.type_name())),
    }
}

/// `len(value)`.
pub(super) fn length(value: &Value) -> Outcome<usize> {
    Ok(match value {
        Value::Undefined(_) => 0,
        Value::Text(text) | Value::Markup(text) => text.chars().count(),
        Value::Bytes(bytes) => bytes.len(),
        Value::List(items) | Value::Tuple(items) => items.items.len(),
        Value::Dict(dict) | Value::View(_, dict) => dict.entries.len(),
        Value::Range(range) => range.len(),
        Value::Loop(one) => one.items.len(),
        other => return fail(format!("TypeError: object of type '{}' has no len()", other.type_name())),
    })
}

/// Whether `iter(value)` works.
pub(super) fn is_iterable(value: &Value) -> bool {
    matches!(
        value,
        Value::Undefined(_)
            | Value::Text(_)
            | Value::Markup(_)
            | Value::Bytes(_)
            | Value::List(_)
            | Value::Tuple(_)
            | Value::Dict(_)
            | Value::Range(_)
            | Value::View(..)
            | Value::Stream(_)
            | Value::Loop(_)
    )
}

/// What walking through a value gives. An iterator is used up.
pub(super) fn items(value: &Value, limits: &Limits) -> Outcome<Vec<Value>> {
    let out: Vec<Value> = match value {
        Value::Undefined(_) => Vec::new(),
        Value::Text(text) | Value::Markup(text) => {
            limits.room(text.len().saturating_mul(size_of::<Value>()))?;
            let mut buffer = [0; 4];
            text.chars().map(|letter| Value::text(letter.encode_utf8(&mut buffer))).collect()
        }
        Value::Bytes(bytes) => bytes.iter().map(|byte| Value::Int(i128::from(*byte))).collect(),
        Value::List(items) | Value::Tuple(items) => items.items.clone(),
        Value::Dict(dict) | Value::View(View::Keys, dict) => dict.entries.iter().map(|(key, _)| key.clone()).collect(),
        Value::View(View::Values, dict) => dict.entries.iter().map(|(_, value)| value.clone()).collect(),
        Value::View(View::Items, dict) => {
            let pair = |(key, value): &(Value, Value)| Value::tuple(vec![key.clone(), value.clone()]);
            dict.entries.iter().map(pair).collect::<Outcome<_>>()?
        }
        Value::Range(range) => (0..range.len()).map(|index| range.at(index)).collect(),
        Value::Stream(stream) => stream.items.borrow_mut().drain(..).collect(),
        Value::Loop(one) => one.items.iter().skip(one.index.get() + 1).cloned().collect(),
        other => return fail(format!("TypeError: '{}' object is not iterable", other.type_name())),
    };
    limits.room(out.len() * size_of::<Value>())?;
    limits.step(out.len())?;
    Ok(out)
}

/// `item in all`.
pub(super) fn contains(all: &Value, item: &Value, limits: &Limits) -> Outcome<bool> {
    match all {
        Value::Text(text) | Value::Markup(text) => match item.as_text() {
            Some(part) => {
                limits.step(text.len() / 16)?;
                Ok(text.contains(part))
            }
            None => fail(format!("TypeError: 'in <string>' requires string as left operand, not {}", item.type_name())),
        },
        Value::Dict(dict) | Value::View(View::Keys, dict) => {
            if !is_hashable(item) {
                return fail(format!("TypeError: unhashable type: '{}'", item.type_name()));
            }
            Ok(dict.get(item)?.is_some())
        }
        Value::List(list) | Value::Tuple(list) => is_among(item, &list.items, limits),
        Value::Namespace(_) => fail("TypeError: argument of type 'Namespace' is not iterable"),
        other => is_among(item, &items(other, limits)?, limits),
    }
}

/// Sorts, keeping the order of equal items. `key` gives what is compared.
pub(super) fn sort(
    values: Vec<Value>,
    keys: Vec<Value>,
    reverse: bool,
    limits: &Limits,
) -> Outcome<Vec<(Value, Value)>> {
    let mut pairs: Vec<(Value, Value)> = keys.into_iter().zip(values).collect();
    // A comparison can fail, which the standard sort has no word for.
    let mut width = 1;
    while width < pairs.len() {
        let mut merged = Vec::with_capacity(pairs.len());
        for part in pairs.chunks(width * 2) {
            let (mut left, mut right) = part.split_at(width.min(part.len()));
            while let (Some(one), Some(two)) = (left.first(), right.first()) {
                let wanted = if reverse { Ordering::Greater } else { Ordering::Less };
                let takes_right = order(&two.0, &one.0, limits)? == Some(wanted);
                let source = if takes_right { &mut right } else { &mut left };
                merged.push(source[0].clone());
                *source = &source[1..];
            }
            merged.extend_from_slice(left);
            merged.extend_from_slice(right);
        }
        pairs = merged;
        width *= 2;
    }
    Ok(pairs)
}
