//! `value.name`, `value[key]` and `value[start:stop:step]`.

use std::sync::Arc;

use super::compare::{length, undefined};
use super::limits::{Limits, Outcome, fail};
use super::print::repr;
use super::value::{Dict, Range, Value, View};

const TEXT_METHODS: &[&str] = &[
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "maketrans",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "translate",
    "upper",
    "zfill",
];
/// Those that would change the value are not there: the sandbox hides them.
const DICT_METHODS: &[&str] = &["copy", "fromkeys", "get", "items", "keys", "values"];
const LIST_METHODS: &[&str] = &["copy", "count", "index"];
const TUPLE_METHODS: &[&str] = &["count", "index"];
const INT_METHODS: &[&str] = &["as_integer_ratio", "bit_count", "bit_length", "conjugate", "is_integer"];
const FLOAT_METHODS: &[&str] = &["as_integer_ratio", "conjugate", "is_integer"];
const LOOP_METHODS: &[&str] = &["changed", "cycle"];
const CYCLER_METHODS: &[&str] = &["next", "reset"];

fn methods(value: &Value) -> &'static [&'static str] {
    match value {
        Value::Text(_) | Value::Markup(_) => TEXT_METHODS,
        Value::Bytes(_) => &["decode"],
        Value::Dict(_) => DICT_METHODS,
        Value::List(_) => LIST_METHODS,
        Value::Tuple(_) | Value::Range(_) => TUPLE_METHODS,
        Value::Int(_) | Value::Bool(_) => INT_METHODS,
        Value::Float(_) => FLOAT_METHODS,
        Value::Loop(_) => LOOP_METHODS,
        Value::Cycler(_) => CYCLER_METHODS,
        _ => &[],
    }
}

/// What a Python object has under a name, without looking at its items.
pub(super) fn python_attribute(value: &Value, name: &str) -> Outcome<Option<Value>> {
    if methods(value).contains(&name) {
        return Ok(Some(Value::Method(std::rc::Rc::new((value.clone(), Arc::from(name))))));
    }
    Ok(match value {
        Value::Int(_) | Value::Bool(_) | Value::Float(_) => match name {
            "real" => Some(value.as_int().map_or_else(|| value.clone(), Value::Int)),
            "imag" => Some(if matches!(value, Value::Float(_)) { Value::Float(0.0) } else { Value::Int(0) }),
            "numerator" => value.as_int().map(Value::Int),
            "denominator" => value.as_int().map(|_| Value::Int(1)),
            _ => None,
        },
        Value::Tuple(items) if items.group => match name {
            "grouper" => items.items.first().cloned(),
            "list" => items.items.get(1).cloned(),
            _ => None,
        },
        Value::Range(Range { start, stop, step }) => match name {
            "start" => Some(Value::Int(*start)),
            "stop" => Some(Value::Int(*stop)),
            "step" => Some(Value::Int(*step)),
            _ => None,
        },
        Value::Namespace(namespace) => {
            namespace.values.borrow().iter().find(|(own, _)| &**own == name).map(|(_, value)| value.clone())
        }
        Value::Macro(closure) => {
            let definition = &closure.definition;
            match name {
                "name" => Some(definition.name.as_ref().map_or(Value::None, |name| Value::Text(name.clone()))),
                "arguments" => {
                    let names = definition.parameters.iter().map(|(name, _)| Value::Text(name.clone()));
                    Some(Value::tuple(names.collect())?)
                }
                "catch_kwargs" => Some(Value::Bool(definition.takes_named_rest)),
                "catch_varargs" => Some(Value::Bool(definition.takes_rest)),
                "caller" => Some(Value::Bool(definition.takes_caller)),
                _ => None,
            }
        }
        Value::Loop(one) => {
            let (index, count) = (one.index.get(), one.items.len());
            let number = |number: usize| Some(Value::Int(number as i128));
            match name {
                "index" => number(index + 1),
                "index0" => number(index),
                "revindex" => number(count - index),
                "revindex0" => number(count - index - 1),
                "length" => number(count),
                "depth" => number(one.depth + 1),
                "depth0" => number(one.depth),
                "first" => Some(Value::Bool(index == 0)),
                "last" => Some(Value::Bool(index + 1 == count)),
                "previtem" => Some(match index.checked_sub(1) {
                    Some(before) => one.items[before].clone(),
                    None => Value::undefined("there is no previous item"),
                }),
                "nextitem" => {
                    Some(one.items.get(index + 1).cloned().unwrap_or_else(|| Value::undefined("there is no next item")))
                }
                _ => None,
            }
        }
        Value::Cycler(cycler) => match name {
            "current" => cycler.items.get(cycler.at.get()).cloned(),
            "items" => Some(Value::tuple(cycler.items.clone())?),
            "pos" => Some(Value::Int(cycler.at.get() as i128)),
            _ => None,
        },
        Value::Joiner(joiner) => match name {
            "sep" => Some(joiner.separator.clone()),
            "used" => Some(Value::Bool(joiner.used.get())),
            _ => None,
        },
        _ => None,
    })
}

/// `value.name`: an attribute, else an item, else undefined.
pub(super) fn attribute(value: &Value, name: &str, limits: &Limits) -> Outcome<Value> {
    if let Value::Undefined(words) = value {
        return undefined(words);
    }
    if let Some(found) = python_attribute(value, name)? {
        return Ok(found);
    }
    if let Value::Dict(dict) = value
        && let Some(found) = dict.get_text(name)
    {
        return Ok(found.clone());
    }
    missing(value, &Value::text(name), limits)
}

/// `value[key]`: an item, else an attribute, else undefined.
pub(super) fn item(value: &Value, key: &Value, limits: &Limits) -> Outcome<Value> {
    let found = match value {
        Value::Undefined(words) => return undefined(words),
        Value::Dict(dict) if super::value::is_hashable(key) => dict.get(key)?.cloned(),
        _ => match key.as_int() {
            Some(index) => at(value, index, limits)?,
            None => None,
        },
    };
    if let Some(found) = found {
        return Ok(found);
    }
    if let Some(name) = key.as_text()
        && let Some(found) = python_attribute(value, name)?
    {
        return Ok(found);
    }
    missing(value, key, limits)
}

fn missing(value: &Value, key: &Value, limits: &Limits) -> Outcome<Value> {
    let mut words = format!("'{} object' has no ", value.type_name());
    words.push_str(if key.as_text().is_some() { "attribute " } else { "element " });
    if matches!(key, Value::Text(text) if text.len() > 200) {
        words.push_str("of this name");
    } else {
        repr(key, limits, &mut words)?;
    }
    Ok(Value::undefined(words))
}

fn at(value: &Value, index: i128, limits: &Limits) -> Outcome<Option<Value>> {
    let position = |length: usize| {
        let index = if index < 0 { index + length as i128 } else { index };
        usize::try_from(index).ok().filter(|index| *index < length)
    };
    Ok(match value {
        Value::List(items) | Value::Tuple(items) => position(items.items.len()).map(|at| items.items[at].clone()),
        Value::Text(text) | Value::Markup(text) => {
            limits.step(text.len() / 16)?;
            let letter = match index < 0 {
                false => usize::try_from(index).ok().and_then(|at| text.chars().nth(at)),
                true => usize::try_from(-(index + 1)).ok().and_then(|at| text.chars().nth_back(at)),
            };
            letter.map(|letter| Value::text(letter.encode_utf8(&mut [0; 4])))
        }
        Value::Bytes(bytes) => position(bytes.len()).map(|at| Value::Int(i128::from(bytes[at]))),
        Value::Range(range) => position(range.len()).map(|at| range.at(at)),
        _ => None,
    })
}

/// `value[start:stop:step]`.
pub(super) fn slice(value: &Value, bounds: &[Value; 3], limits: &Limits) -> Outcome<Value> {
    if let Value::Undefined(words) = value {
        return undefined(words);
    }
    let count = match value {
        Value::List(_) | Value::Tuple(_) | Value::Text(_) | Value::Markup(_) | Value::Bytes(_) | Value::Range(_) => {
            length(value)?
        }
        other => return fail(format!("TypeError: '{}' object cannot be sliced", other.type_name())),
    };
    let bound = |value: &Value| match (value, value.as_int()) {
        (Value::None, _) => Ok(None),
        (_, Some(number)) => Ok(Some(number)),
        _ => fail("TypeError: slice indices must be integers or None or have an __index__ method"),
    };
    let (start, stop, step) = (bound(&bounds[0])?, bound(&bounds[1])?, bound(&bounds[2])?.unwrap_or(1));
    if step == 0 {
        return fail("ValueError: slice step cannot be zero");
    }
    let (low, high) = if step > 0 { (0, count as i128) } else { (-1, count as i128 - 1) };
    let clamp = |number: Option<i128>, absent: i128| match number {
        None => absent,
        Some(number) if number < 0 => number.saturating_add(count as i128).clamp(low, high),
        Some(number) => number.clamp(low, high),
    };
    let (start, stop) =
        if step > 0 { (clamp(start, low), clamp(stop, high)) } else { (clamp(start, high), clamp(stop, low)) };
    let step = step.clamp(-(count as i128) - 1, count as i128 + 1);
    let wanted = Range { start, stop, step };
    limits.step(wanted.len() + count / 16)?;
    let indices = (0..wanted.len()).map(|index| (start + step * index as i128) as usize);
    Ok(match value {
        Value::List(items) => {
            limits.room(wanted.len() * size_of::<Value>())?;
            Value::list(indices.map(|at| items.items[at].clone()).collect())?
        }
        Value::Tuple(items) => {
            limits.room(wanted.len() * size_of::<Value>())?;
            Value::tuple(indices.map(|at| items.items[at].clone()).collect())?
        }
        Value::Text(text) | Value::Markup(text) => {
            limits.room(text.len())?;
            let cut: String = if step == 1 {
                text.chars().skip(start as usize).take(wanted.len()).collect()
            } else {
                let letters: Vec<char> = text.chars().collect();
                indices.map(|at| letters[at]).collect()
            };
            if matches!(value, Value::Text(_)) { Value::text(cut) } else { Value::Markup(Arc::from(cut)) }
        }
        Value::Bytes(bytes) => Value::Bytes(indices.map(|at| bytes[at]).collect()),
        Value::Range(range) => Value::Range(Range {
            start: range.start + range.step * start,
            stop: range.start + range.step * stop,
            step: range.step * step,
        }),
        _ => Value::None,
    })
}

/// The entries of a dictionary as lists of pairs see them.
pub(super) fn view(dict: &std::rc::Rc<Dict>, kind: View) -> Value {
    Value::View(kind, dict.clone())
}
