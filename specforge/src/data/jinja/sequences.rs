//! Filters that walk through a list.

use std::sync::Arc;

use super::access::item;
use super::arguments::Given;
use super::compare::{is_true, items, order, sort, undefined};
use super::limits::{Limits, Outcome, fail};
use super::operate::binary;
use super::print::write_text;
use super::syntax::Operator;
use super::value::{Value, is_hashable};

/// What `map` and `select` call: all filters, all tests.
pub(super) struct Callbacks {
    pub filter: fn(&str, &Value, &Given, &Limits) -> Outcome<Value>,
    pub test: fn(&str, &Value, &Given, &Limits) -> Outcome<bool>,
}

/// `value | name(...)`; None if the filter is of another kind.
pub(super) fn apply(
    name: &str,
    value: &Value,
    given: &Given,
    callbacks: &Callbacks,
    limits: &Limits,
) -> Outcome<Option<Value>> {
    let done = match name {
        "list" => {
            given.bind(name, &[], 0)?;
            Value::list(items(value, limits)?)?
        }
        "first" | "last" | "random" => {
            given.bind(name, &[], 0)?;
            if name != "first" && matches!(value, Value::Stream(_)) {
                return fail(format!("TypeError: '{}' object is not a sequence", value.type_name()));
            }
            if let (Value::Stream(stream), "first") = (value, name) {
                let first = stream.items.borrow_mut().pop_front();
                return Ok(Some(first.unwrap_or_else(|| Value::undefined("No first item, sequence was empty."))));
            }
            let all = items(value, limits)?;
            // The same data must give the same tokens tomorrow: what is drawn at random is the first.
            let found = if name == "last" { all.last() } else { all.first() };
            found.cloned().unwrap_or_else(|| Value::undefined(format!("No {name} item, sequence was empty.")))
        }
        "reverse" => {
            given.bind(name, &[], 0)?;
            match value.as_text() {
                Some(text) => {
                    limits.room(text.len())?;
                    Value::text(text.chars().rev().collect::<String>())
                }
                None => {
                    let mut all = items(value, limits)?;
                    all.reverse();
                    match value {
                        Value::Stream(_) => Value::list(all)?,
                        _ => Value::stream("list_reverseiterator", all)?,
                    }
                }
            }
        }
        "join" => join(value, given, limits)?,
        "sum" => {
            let bound = given.bind(name, &["attribute", "start"], 0)?;
            let mut sum = bound.get(1).cloned().unwrap_or(Value::Int(0));
            if sum.as_text().is_some() {
                return fail("TypeError: sum() can't sum strings [use ''.join(seq) instead]");
            }
            for one in keys(&items(value, limits)?, bound.some(0), None, false, limits)? {
                sum = binary(Operator::Add, &sum, &one, limits)?;
            }
            sum
        }
        "min" | "max" => {
            let bound = given.bind(name, &["case_sensitive", "attribute"], 0)?;
            let all = items(value, limits)?;
            let keys = keys(&all, bound.some(1), None, !bound.is_true(0, false), limits)?;
            let Some(mut best) = keys.first().map(|_| 0) else {
                return Ok(Some(Value::undefined("No aggregated item, sequence was empty.")));
            };
            for at in 1..keys.len() {
                let (one, two) = if name == "min" { (&keys[at], &keys[best]) } else { (&keys[best], &keys[at]) };
                if order(one, two, limits)? == Some(std::cmp::Ordering::Less) {
                    best = at;
                }
            }
            all[best].clone()
        }
        "sort" => {
            let bound = given.bind(name, &["reverse", "case_sensitive", "attribute"], 0)?;
            let all = items(value, limits)?;
            let keys = sort_keys(&all, bound.some(2), !bound.is_true(1, false), limits)?;
            let sorted = sort(all, keys, bound.is_true(0, false), limits)?;
            Value::list(sorted.into_iter().map(|(_, value)| value).collect())?
        }
        "unique" => {
            let bound = given.bind(name, &["case_sensitive", "attribute"], 0)?;
            let all = items(value, limits)?;
            let keys = keys(&all, bound.some(1), None, !bound.is_true(0, false), limits)?;
            let (mut seen, mut out) = (super::value::Dict::default(), Vec::new());
            for (key, one) in keys.into_iter().zip(all) {
                if !is_hashable(&key) {
                    return fail(format!("TypeError: unhashable type: '{}'", key.type_name()));
                }
                if key.as_text().is_none() {
                    limits.step(seen.entries.len())?;
                }
                if seen.get(&key)?.is_none() {
                    seen.insert(key, Value::None)?;
                    out.push(one);
                }
            }
            Value::stream("generator", out)?
        }
        "dictsort" => dict_sort(value, given, limits)?,
        "items" => {
            given.bind(name, &[], 0)?;
            match value {
                Value::Undefined(_) => Value::stream("generator", Vec::new())?,
                Value::Dict(dict) => {
                    let pairs = items(&super::access::view(dict, super::value::View::Items), limits)?;
                    Value::stream("generator", pairs)?
                }
                _ => return fail("TypeError: Can only get item pairs from a mapping."),
            }
        }
        "batch" | "slice" => chunks(name, value, given, limits)?,
        "groupby" => group_by(value, given, limits)?,
        "map" => map(value, given, callbacks, limits)?,
        "select" | "reject" | "selectattr" | "rejectattr" => select(name, value, given, callbacks, limits)?,
        _ => return Ok(None),
    };
    Ok(Some(done))
}

/// `a.b.0` of a value, as `attribute=` names it.
fn path(value: &Value, attribute: &Value, default: Option<&Value>, limits: &Limits) -> Outcome<Value> {
    limits.step(1)?;
    let mut found = value.clone();
    let one = |found: &Value, part: &Value| -> Outcome<Value> {
        let next = item(found, part, limits)?;
        Ok(match default {
            Some(default) if next.is_undefined() => default.clone(),
            _ => next,
        })
    };
    match attribute.as_text() {
        None => one(&found, attribute),
        Some(text) => {
            for part in text.split('.') {
                let is_number = !part.is_empty() && part.bytes().all(|digit| digit.is_ascii_digit());
                let part = match part.parse::<i128>() {
                    Ok(index) if is_number => Value::Int(index),
                    _ => Value::text(part),
                };
                found = one(&found, &part)?;
            }
            Ok(found)
        }
    }
}

fn without_case(value: Value, limits: &Limits) -> Outcome<Value> {
    match value.as_text() {
        Some(text) => {
            limits.room(text.len())?;
            Ok(Value::text(text.to_lowercase()))
        }
        None => Ok(value),
    }
}

/// What each value is compared by.
fn keys(
    all: &[Value],
    attribute: Option<&Value>,
    default: Option<&Value>,
    ignore_case: bool,
    limits: &Limits,
) -> Outcome<Vec<Value>> {
    let key = |value: &Value| {
        let key = match attribute {
            Some(attribute) => path(value, attribute, default, limits)?,
            None => value.clone(),
        };
        if ignore_case { without_case(key, limits) } else { Ok(key) }
    };
    all.iter().map(key).collect()
}

/// Like [`keys`], for attributes with commas between them. Each key is a list: lists have an order where their items are
/// equal, even if these have none.
fn sort_keys(all: &[Value], attribute: Option<&Value>, ignore_case: bool, limits: &Limits) -> Outcome<Vec<Value>> {
    let parts: Vec<Option<Value>> = match attribute {
        Some(attribute) => match attribute.as_text() {
            Some(text) => text.split(',').map(|part| Some(Value::text(part))).collect(),
            None => vec![Some(attribute.clone())],
        },
        None => vec![None],
    };
    let columns = parts.iter().map(|part| keys(all, part.as_ref(), None, ignore_case, limits));
    let columns = columns.collect::<Outcome<Vec<_>>>()?;
    (0..all.len()).map(|row| Value::list(columns.iter().map(|column| column[row].clone()).collect())).collect()
}

fn join(value: &Value, given: &Given, limits: &Limits) -> Outcome<Value> {
    let bound = given.bind("join", &["d", "attribute"], 0)?;
    let between = bound.printed(0, "", limits)?;
    let all = keys(&items(value, limits)?, bound.some(1), None, false, limits)?;
    limits.room(between.len().saturating_mul(all.len()))?;
    let mut out = String::new();
    for (index, part) in all.iter().enumerate() {
        if index > 0 {
            out.push_str(&between);
        }
        write_text(part, limits, &mut out)?;
    }
    limits.room(out.len())?;
    Ok(Value::text(out))
}

fn dict_sort(value: &Value, given: &Given, limits: &Limits) -> Outcome<Value> {
    let bound = given.bind("dictsort", &["case_sensitive", "by", "reverse"], 0)?;
    let by_value = match if bound.get(1).is_some() { bound.text(1)? } else { "key" } {
        "key" => false,
        "value" => true,
        _ => return fail("dictsort: you can only sort by either \"key\" or \"value\""),
    };
    let dict = match value {
        Value::Dict(dict) => dict,
        Value::Undefined(words) => return undefined(words),
        other => return fail(format!("dictsort: expected a mapping, got '{}'", other.type_name())),
    };
    let pairs = items(&super::access::view(dict, super::value::View::Items), limits)?;
    let by = dict.entries.iter().map(|(key, value)| if by_value { value } else { key }).cloned().collect::<Vec<_>>();
    let keys = keys(&by, None, None, !bound.is_true(0, false), limits)?;
    let sorted = sort(pairs, keys, bound.is_true(2, false), limits)?;
    Value::list(sorted.into_iter().map(|(_, pair)| pair).collect())
}

fn chunks(name: &str, value: &Value, given: &Given, limits: &Limits) -> Outcome<Value> {
    let bound = given.bind(name, &["count", "fill_with"], 1)?;
    let all = items(value, limits)?;
    let fill = bound.some(1);
    let Some(count) = usize::try_from(bound.int(0, 0)?).ok().filter(|count| *count > 0) else {
        return fail(format!("{name}: expected a count of at least 1"));
    };
    limits.room(count.saturating_mul(size_of::<Value>()))?;
    limits.step(count)?;
    let mut out = Vec::new();
    if name == "batch" {
        for part in all.chunks(count) {
            let mut part = part.to_vec();
            if let Some(fill) = fill {
                part.resize(count, fill.clone());
            }
            out.push(Value::list(part)?);
        }
    } else {
        let (each, more) = (all.len() / count, all.len() % count);
        let mut start = 0;
        for index in 0..count {
            let end = start + each + usize::from(index < more);
            let mut part = all[start..end].to_vec();
            if index >= more
                && let Some(fill) = fill
            {
                part.push(fill.clone());
            }
            out.push(Value::list(part)?);
            start = end;
        }
    }
    Value::stream("generator", out)
}

fn group_by(value: &Value, given: &Given, limits: &Limits) -> Outcome<Value> {
    let bound = given.bind("groupby", &["attribute", "default", "case_sensitive"], 1)?;
    let (attribute, default) = (bound.value(0), bound.some(1));
    let ignore_case = !bound.is_true(2, false);
    let all = items(value, limits)?;
    let keys = keys(&all, Some(&attribute), default, ignore_case, limits)?;
    let sorted = sort(all, keys, false, limits)?;
    let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
    for (key, value) in sorted {
        match groups.last_mut() {
            Some((last, members)) if super::compare::equal(last, &key, limits)? => members.push(value),
            _ => groups.push((key, vec![value])),
        }
    }
    let group = |(key, members): (Value, Vec<Value>)| {
        // The first member's own spelling stands for the group.
        let key = if ignore_case { path(&members[0], &attribute, default, limits)? } else { key };
        Value::group(key, members)
    };
    Value::list(groups.into_iter().map(group).collect::<Outcome<_>>()?)
}

fn map(value: &Value, given: &Given, callbacks: &Callbacks, limits: &Limits) -> Outcome<Value> {
    // What is empty or nothing is not looked at any closer.
    if !is_true(value) {
        return Value::stream("generator", Vec::new());
    }
    let all = items(value, limits)?;
    let mut given = given.clone();
    if given.positional.is_empty() {
        let Some(attribute) = given.take_named("attribute") else {
            return fail("map requires a filter argument");
        };
        let default = given.take_named("default").filter(|default| !matches!(default, Value::None));
        if let Some((name, _)) = given.named.first() {
            return fail(format!("map: unexpected keyword argument '{name}'"));
        }
        return Value::stream("generator", keys(&all, Some(&attribute), default.as_ref(), false, limits)?);
    }
    let name = given.positional.remove(0);
    let Some(name) = name.as_text() else { return fail("map: the name of a filter must be a text") };
    let mapped = all.iter().map(|one| (callbacks.filter)(name, one, &given, limits));
    Value::stream("generator", mapped.collect::<Outcome<_>>()?)
}

fn select(name: &str, value: &Value, given: &Given, callbacks: &Callbacks, limits: &Limits) -> Outcome<Value> {
    if !is_true(value) {
        return Value::stream("generator", Vec::new());
    }
    let mut given = given.clone();
    let attribute = match name.ends_with("attr") {
        true if given.positional.is_empty() => return fail(format!("{name}: missing parameter for attribute name")),
        true => Some(given.positional.remove(0)),
        false => None,
    };
    let test: Option<Arc<str>> = if given.positional.is_empty() {
        None
    } else {
        match given.positional.remove(0).as_text() {
            Some(test) => Some(Arc::from(test)),
            None => return fail(format!("{name}: the name of a test must be a text")),
        }
    };
    let wanted = name.starts_with("select");
    let mut out = Vec::new();
    for one in items(value, limits)? {
        let subject = match &attribute {
            Some(attribute) => path(&one, attribute, None, limits)?,
            None => one.clone(),
        };
        let passes = match &test {
            Some(test) => (callbacks.test)(test, &subject, &given, limits)?,
            None => is_true(&subject),
        };
        if passes == wanted {
            out.push(one);
        }
    }
    Value::stream("generator", out)
}
