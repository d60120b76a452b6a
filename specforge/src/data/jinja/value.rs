//! Python's values, as far as templates meet them.
//!
//! Lists and dictionaries never change: transformers renders in a sandbox that forbids it. What can change are
//! namespaces, loops, cyclers, joiners, and iterators that are used up.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use super::limits::{Outcome, fail};
use super::syntax::{Block, Constant, For, Macro};

#[derive(Debug, Clone)]
pub(in crate::data) enum Value {
    /// What a name or attribute that is not there gives, with the words for whoever uses it.
    Undefined(Rc<str>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(Arc<str>),
    /// Text that is marked as safe: what is added to it is escaped.
    Markup(Arc<str>),
    Bytes(Rc<[u8]>),
    List(Rc<Items>),
    Tuple(Rc<Items>),
    Dict(Rc<Dict>),
    Range(Range),
    View(View, Rc<Dict>),
    /// An iterator: it can be walked through once.
    Stream(Rc<Stream>),
    Namespace(Rc<Namespace>),
    Macro(Rc<Closure>),
    Loop(Rc<Loop>),
    Cycler(Rc<Cycler>),
    Joiner(Rc<Joiner>),
    Function(Function),
    /// A method of a value.
    Method(Rc<(Value, Arc<str>)>),
    /// `self`
    Template,
    Block(Arc<Block>),
}

/// Lists in lists, at most. JSON goes to 128.
const DEEPEST: usize = 200;

/// What a list or tuple holds.
#[derive(Debug, Default)]
pub(in crate::data) struct Items {
    pub items: Vec<Value>,
    /// What `groupby` gives: pairs whose parts are called `grouper` and `list`.
    pub group: bool,
    depth: usize,
}

#[derive(Debug, Default)]
pub(in crate::data) struct Dict {
    pub entries: Vec<(Value, Value)>,
    texts: HashMap<Arc<str>, usize>,
    depth: usize,
}

/// Above this many entries text keys are looked up by hash.
const LINEAR: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::data) struct Range {
    pub start: i128,
    pub stop: i128,
    pub step: i128,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::data) enum View {
    Keys,
    Values,
    Items,
}

#[derive(Debug)]
pub(in crate::data) struct Stream {
    pub items: RefCell<VecDeque<Value>>,
    pub kind: &'static str,
    depth: usize,
}

#[derive(Debug, Default)]
pub(in crate::data) struct Namespace {
    pub values: RefCell<Vec<(Arc<str>, Value)>>,
}

/// A macro, and the scope it was written in.
#[derive(Debug)]
pub(in crate::data) struct Closure {
    pub definition: Arc<Macro>,
    pub scope: usize,
}

#[derive(Debug)]
pub(in crate::data) struct Loop {
    pub items: Vec<Value>,
    pub index: Cell<usize>,
    pub depth: usize,
    pub changed: RefCell<Option<Vec<Value>>>,
    pub definition: Arc<For>,
    pub scope: usize,
    /// Whether it walks through the conversation itself.
    pub over_messages: bool,
}

#[derive(Debug)]
pub(in crate::data) struct Cycler {
    pub items: Vec<Value>,
    pub at: Cell<usize>,
}

#[derive(Debug)]
pub(in crate::data) struct Joiner {
    pub separator: Value,
    pub used: Cell<bool>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::data) enum Function {
    Range,
    Dict,
    Cycler,
    Joiner,
    Namespace,
    Lipsum,
    RaiseException,
    StrftimeNow,
}

impl Value {
    pub(super) fn text(text: impl AsRef<str>) -> Self {
        Self::Text(Arc::from(text.as_ref()))
    }

    /// Not there, with the words for whoever uses it.
    pub(super) fn undefined(words: impl AsRef<str>) -> Self {
        Self::Undefined(Rc::from(words.as_ref()))
    }

    pub(in crate::data) fn list(items: Vec<Value>) -> Outcome<Self> {
        Ok(Self::List(Rc::new(Items::new(items, false)?)))
    }

    pub(super) fn tuple(items: Vec<Value>) -> Outcome<Self> {
        Ok(Self::Tuple(Rc::new(Items::new(items, false)?)))
    }

    pub(super) fn group(key: Value, items: Vec<Value>) -> Outcome<Self> {
        Ok(Self::Tuple(Rc::new(Items::new(vec![key, Self::list(items)?], true)?)))
    }

    /// An iterator; `kind` is what Python calls it.
    pub(super) fn stream(kind: &'static str, items: Vec<Value>) -> Outcome<Self> {
        let depth = deepest(items.iter())?;
        Ok(Self::Stream(Rc::new(Stream { items: RefCell::new(items.into()), kind, depth })))
    }

    pub(super) fn cycler(items: Vec<Value>) -> Outcome<Self> {
        deepest(items.iter())?;
        Ok(Self::Cycler(Rc::new(Cycler { items, at: Cell::new(0) })))
    }

    pub(super) fn joiner(separator: Value) -> Outcome<Self> {
        deepest([&separator].into_iter())?;
        Ok(Self::Joiner(Rc::new(Joiner { separator, used: Cell::new(false) })))
    }

    pub(super) fn is_undefined(&self) -> bool {
        matches!(self, Self::Undefined(_))
    }

    pub(super) fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) | Self::Markup(text) => Some(text),
            _ => None,
        }
    }

    /// A whole number; truth values count.
    pub(super) fn as_int(&self) -> Option<i128> {
        match self {
            Self::Int(number) => Some(*number),
            Self::Bool(yes) => Some(i128::from(*yes)),
            _ => None,
        }
    }

    pub(super) fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(number) => Some(*number),
            _ => self.as_int().map(|number| number as f64),
        }
    }

    /// Whether looking at it changes it: an iterator, or a list that holds one.
    pub(super) fn changes(&self) -> bool {
        match self {
            Self::Stream(_) | Self::Cycler(_) | Self::Joiner(_) => true,
            Self::List(items) | Self::Tuple(items) => items.items.iter().any(|item| matches!(item, Self::Stream(_))),
            _ => false,
        }
    }

    fn depth(&self) -> usize {
        match self {
            Self::List(items) | Self::Tuple(items) => items.depth,
            Self::Dict(dict) | Self::View(_, dict) => dict.depth,
            Self::Stream(stream) => stream.depth,
            Self::Method(method) => method.0.depth() + 1,
            Self::Loop(one) => one.items.iter().map(Self::depth).max().unwrap_or(0) + 1,
            Self::Cycler(one) => one.items.iter().map(Self::depth).max().unwrap_or(0) + 1,
            Self::Joiner(one) => one.separator.depth() + 1,
            _ => 0,
        }
    }

    /// What Python calls the type.
    pub(super) fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Text(_) => "str",
            Self::Markup(_) => "Markup",
            Self::Bytes(_) => "bytes",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Dict(_) => "dict",
            Self::Range(_) => "range",
            Self::View(View::Keys, _) => "dict_keys",
            Self::View(View::Values, _) => "dict_values",
            Self::View(View::Items, _) => "dict_items",
            Self::Stream(stream) => stream.kind,
            Self::Namespace(_) => "Namespace",
            Self::Macro(_) => "Macro",
            Self::Loop(_) => "LoopContext",
            Self::Cycler(_) => "Cycler",
            Self::Joiner(_) => "Joiner",
            Self::Function(_) => "function",
            Self::Method(_) => "builtin_function_or_method",
            Self::Template => "TemplateReference",
            Self::Block(_) => "BlockReference",
        }
    }

    /// From JSON, as `json.loads` gives it.
    pub(in crate::data) fn from_json(json: &serde_json::Value) -> Outcome<Self> {
        Ok(match json {
            serde_json::Value::Null => Self::None,
            serde_json::Value::Bool(yes) => Self::Bool(*yes),
            serde_json::Value::Number(number) => match (number.as_i128(), number.as_f64()) {
                (Some(whole), _) => Self::Int(whole),
                (None, Some(float)) => Self::Float(float),
                (None, None) => return fail(format!("the number {number} is not supported")),
            },
            serde_json::Value::String(text) => Self::text(text),
            serde_json::Value::Array(list) => {
                Self::list(list.iter().map(Self::from_json).collect::<Outcome<Vec<_>>>()?)?
            }
            serde_json::Value::Object(object) => {
                let mut dict = Dict::default();
                for (key, value) in object {
                    dict.insert(Self::text(key), Self::from_json(value)?)?;
                }
                Self::Dict(Rc::new(dict))
            }
        })
    }
}

impl From<&Constant> for Value {
    fn from(constant: &Constant) -> Self {
        match constant {
            Constant::None => Self::None,
            Constant::Bool(yes) => Self::Bool(*yes),
            Constant::Int(number) => Self::Int(*number),
            Constant::Float(number) => Self::Float(*number),
            Constant::Text(text) => Self::Text(text.clone()),
        }
    }
}

fn deepest<'a>(items: impl Iterator<Item = &'a Value>) -> Outcome<usize> {
    let depth = items.map(Value::depth).max().unwrap_or(0) + 1;
    if depth > DEEPEST {
        return fail(format!("a list or dictionary is nested more than {DEEPEST} levels deep"));
    }
    Ok(depth)
}

impl Items {
    fn new(items: Vec<Value>, group: bool) -> Outcome<Self> {
        let depth = deepest(items.iter())?;
        Ok(Self { items, group, depth })
    }
}

impl Dict {
    /// From pairs; the last of equal keys wins and stands where the first stood.
    pub(super) fn from_pairs(pairs: impl IntoIterator<Item = (Value, Value)>) -> Outcome<Self> {
        let mut dict = Self::default();
        for (key, value) in pairs {
            dict.insert(key, value)?;
        }
        Ok(dict)
    }

    pub(super) fn insert(&mut self, key: Value, value: Value) -> Outcome<()> {
        self.depth = self.depth.max(deepest([&key, &value].into_iter())?);
        match self.position(&key)? {
            Some(at) => self.entries[at].1 = value,
            None => {
                if let Some(text) = key.as_text() {
                    self.texts.insert(Arc::from(text), self.entries.len());
                }
                self.entries.push((key, value));
            }
        }
        Ok(())
    }

    pub(super) fn get(&self, key: &Value) -> Outcome<Option<&Value>> {
        Ok(self.position(key)?.map(|at| &self.entries[at].1))
    }

    pub(super) fn get_text(&self, key: &str) -> Option<&Value> {
        if self.entries.len() > LINEAR {
            return self.texts.get(key).map(|at| &self.entries[*at].1);
        }
        self.entries.iter().find(|(own, _)| own.as_text() == Some(key)).map(|(_, value)| value)
    }

    fn position(&self, key: &Value) -> Outcome<Option<usize>> {
        if let Some(text) = key.as_text() {
            return Ok(self.texts.get(text).copied());
        }
        if !is_hashable(key) {
            return fail(format!("TypeError: unhashable type: '{}'", key.type_name()));
        }
        Ok(self.entries.iter().position(|(own, _)| same_key(own, key)))
    }
}

/// Whether Python takes it as a key.
pub(super) fn is_hashable(value: &Value) -> bool {
    match value {
        Value::List(_) | Value::Dict(_) | Value::View(..) => false,
        Value::Tuple(items) => items.items.iter().all(is_hashable),
        _ => true,
    }
}

/// Equality of hashable values.
fn same_key(one: &Value, two: &Value) -> bool {
    match (one, two) {
        (Value::None, Value::None) | (Value::Undefined(_), Value::Undefined(_)) => true,
        (Value::Tuple(one), Value::Tuple(two)) => {
            one.items.len() == two.items.len() && one.items.iter().zip(&two.items).all(|(one, two)| same_key(one, two))
        }
        (Value::Range(one), Value::Range(two)) => one == two,
        _ => match (one.as_text(), two.as_text()) {
            (Some(one), Some(two)) => one == two,
            (None, None) => match (one.as_int(), two.as_int()) {
                (Some(one), Some(two)) => one == two,
                _ => one.as_float().is_some_and(|one| two.as_float() == Some(one)),
            },
            _ => false,
        },
    }
}

impl Range {
    pub(super) fn len(self) -> usize {
        let count = if self.step > 0 {
            (self.stop - self.start + self.step - 1).div_euclid(self.step)
        } else {
            (self.start - self.stop - self.step - 1).div_euclid(-self.step)
        };
        count.max(0) as usize
    }

    pub(super) fn at(self, index: usize) -> Value {
        Value::Int(self.start + self.step * index as i128)
    }
}
