//! What expressions evaluate to, and what calls do.

use std::rc::Rc;
use std::sync::Arc;

use super::access::{attribute, item, slice};
use super::arguments::Given;
use super::checks;
use super::compare::{contains, equal, is_true, items, order, undefined};
use super::filters;
use super::limits::{Fault, Outcome, fail};
use super::machine::Machine;
use super::methods;
use super::operate::{binary, signed};
use super::print::{text_of, write_text};
use super::syntax::{Arguments, Comparison, Expression, Link, Operator};
use super::value::{Closure, Dict, Function, Range, Value};

/// Longest range: the sandbox's own limit.
const LONGEST_RANGE: usize = 100_000;

impl Machine<'_> {
    pub(super) fn evaluate(&mut self, expression: &Expression) -> Outcome<Value> {
        self.limits.step(1)?;
        match expression {
            Expression::Constant(constant) => Ok(Value::from(constant)),
            Expression::Name(name) => {
                let value = self.lookup(name);
                if self.watch.is_some() {
                    self.notice(name, &value);
                }
                Ok(value)
            }
            Expression::Chain(first, links) => self.chain(first, links),
            Expression::Binary(first, rest) => self.binaries(first, rest),
            Expression::Comparison(first, rest) => self.compared(first, rest),
            Expression::Not(inner) => Ok(Value::Bool(!is_true(&self.evaluate(inner)?))),
            Expression::And(parts) | Expression::Or(parts) => {
                self.logical(parts, matches!(expression, Expression::And(_)))
            }
            Expression::Condition(condition) => {
                let test = self.evaluate(&condition.test)?;
                match (is_true(&test), &condition.no) {
                    (true, _) => self.evaluate(&condition.yes),
                    (false, Some(no)) => self.evaluate(no),
                    (false, None) => Ok(Value::undefined("the condition is false and there is no `else`")),
                }
            }
            Expression::Concatenation(parts) => self.concatenated(parts),
            Expression::Tuple(parts) => Value::tuple(self.all(parts)?),
            Expression::List(parts) => Value::list(self.all(parts)?),
            Expression::Dict(pairs) => self.dict(pairs),
            Expression::Negative(inner) => signed(&self.evaluate(inner)?, true),
            Expression::Positive(inner) => signed(&self.evaluate(inner)?, false),
        }
    }

    fn all(&mut self, parts: &[Expression]) -> Outcome<Vec<Value>> {
        self.limits.room(std::mem::size_of_val(parts))?;
        parts.iter().map(|part| self.evaluate(part)).collect()
    }

    fn dict(&mut self, pairs: &[(Expression, Expression)]) -> Outcome<Value> {
        let mut dict = Dict::default();
        self.limits.room(std::mem::size_of_val(pairs))?;
        for (key, value) in pairs {
            let (key, value) = (self.evaluate(key)?, self.evaluate(value)?);
            dict.insert(key, value)?;
        }
        Ok(Value::Dict(Rc::new(dict)))
    }

    fn logical(&mut self, parts: &[Expression], is_and: bool) -> Outcome<Value> {
        let mut value = Value::None;
        for part in parts {
            value = self.evaluate(part)?;
            if is_true(&value) != is_and {
                break;
            }
        }
        Ok(value)
    }

    fn concatenated(&mut self, parts: &[Expression]) -> Outcome<Value> {
        let mut out = String::new();
        for part in parts {
            let value = self.evaluate(part)?;
            write_text(&value, self.limits, &mut out)?;
        }
        self.limits.room(out.len())?;
        Ok(Value::text(out))
    }

    fn binaries(&mut self, first: &Expression, rest: &[(Operator, Expression)]) -> Outcome<Value> {
        let mut value = self.evaluate(first)?;
        for (index, (operator, operand)) in rest.iter().enumerate() {
            // Jinja2 writes a negative constant into Python code as it is, and there `-2 ** x` is `-(2 ** x)`.
            let is_bare =
                index == 0 && *operator == Operator::Power && is_negative_constant(first) && !is_constant(operand);
            let operand = self.evaluate(operand)?;
            value = match is_bare {
                true => signed(&binary(*operator, &signed(&value, true)?, &operand, self.limits)?, true)?,
                false => binary(*operator, &value, &operand, self.limits)?,
            };
        }
        Ok(value)
    }

    fn compared(&mut self, first: &Expression, rest: &[(Comparison, Expression)]) -> Outcome<Value> {
        let mut one = self.evaluate(first)?;
        for (comparison, operand) in rest {
            let two = self.evaluate(operand)?;
            let limits = self.limits;
            let holds = match comparison {
                Comparison::Equal => equal(&one, &two, limits)?,
                Comparison::NotEqual => !equal(&one, &two, limits)?,
                Comparison::Less => order(&one, &two, limits)?.is_some_and(std::cmp::Ordering::is_lt),
                Comparison::LessOrEqual => order(&one, &two, limits)?.is_some_and(std::cmp::Ordering::is_le),
                Comparison::Greater => order(&one, &two, limits)?.is_some_and(std::cmp::Ordering::is_gt),
                Comparison::GreaterOrEqual => order(&one, &two, limits)?.is_some_and(std::cmp::Ordering::is_ge),
                Comparison::In => contains(&two, &one, limits)?,
                Comparison::NotIn => !contains(&two, &one, limits)?,
            };
            if !holds {
                return Ok(Value::Bool(false));
            }
            one = two;
        }
        Ok(Value::Bool(true))
    }

    fn chain(&mut self, first: &Expression, links: &[Link]) -> Outcome<Value> {
        if let (Some(_), Expression::Name(name)) = (&self.watch, first) {
            let value = self.lookup(name);
            if !self.glance(&value, links) {
                self.notice(name, &value);
            }
            return self.follow(value, links);
        }
        let value = self.evaluate(first)?;
        if let (Some((Link::Slice(bounds), rest)), true) = (links.split_first(), is_constant(first))
            && bounds.iter().flatten().all(is_constant)
        {
            // Jinja2 cuts constants when it compiles, and takes a cut that cannot be made for nothing.
            let cut = match self.link(value, &links[0]) {
                Err(fault) if fault.text().starts_with("TypeError") => Value::undefined(fault.text()),
                other => other?,
            };
            return self.follow(cut, rest);
        }
        self.follow(value, links)
    }

    /// What attributes, items, calls, filters and tests make of a value, one after the other.
    pub(super) fn follow(&mut self, mut value: Value, links: &[Link]) -> Outcome<Value> {
        for link in links {
            value = self.link(value, link)?;
        }
        Ok(value)
    }

    fn link(&mut self, value: Value, link: &Link) -> Outcome<Value> {
        self.limits.step(1)?;
        match link {
            Link::Attribute(name) => match &value {
                Value::Template => Ok(self.block_named(name)),
                _ => attribute(&value, name, self.limits),
            },
            Link::Item(key) => {
                let key = self.evaluate(key)?;
                match (&value, key.as_text()) {
                    (Value::Template, Some(name)) => Ok(self.block_named(name)),
                    _ => item(&value, &key, self.limits),
                }
            }
            Link::Slice(bounds) => {
                let mut values = [Value::None, Value::None, Value::None];
                for (slot, bound) in values.iter_mut().zip(bounds.iter()) {
                    if let Some(bound) = bound {
                        *slot = self.evaluate(bound)?;
                    }
                }
                slice(&value, &values, self.limits)
            }
            Link::Call(arguments) => {
                let given = self.given(arguments)?;
                self.call(&value, given)
            }
            Link::Filter(name, arguments) => {
                let given = self.given(arguments)?;
                filters::apply(name, &value, &given, self.limits)
            }
            Link::Test(name, arguments, is_negated) => {
                let given = self.given(arguments)?;
                let holds = checks::check(name, &value, &given, filters::is_known, self.limits)?;
                Ok(Value::Bool(holds != *is_negated))
            }
        }
    }

    fn block_named(&self, name: &str) -> Value {
        let found = self.template.blocks.iter().find(|block| &*block.name == name);
        found.map_or_else(
            || Value::undefined(format!("there is no block '{name}'")),
            |block| Value::Block(block.clone()),
        )
    }

    pub(super) fn given(&mut self, arguments: &Arguments) -> Outcome<Given> {
        let mut given = Given::default();
        for argument in &arguments.positional {
            given.positional.push(self.evaluate(argument)?);
        }
        if let Some(more) = &arguments.more {
            let more = self.evaluate(more)?;
            given.positional.extend(items(&more, self.limits)?);
        }
        for (name, argument) in &arguments.named {
            let value = self.evaluate(argument)?;
            given.named.push((name.clone(), value));
        }
        if let Some(more) = &arguments.more_named {
            let Value::Dict(dict) = self.evaluate(more)? else {
                return fail("TypeError: the argument after ** must be a mapping");
            };
            for (key, value) in &dict.entries {
                let Some(name) = key.as_text() else { return fail("TypeError: keywords must be strings") };
                if given.named.iter().any(|(own, _)| &**own == name) {
                    return fail(format!("TypeError: got multiple values for keyword argument '{name}'"));
                }
                given.named.push((Arc::from(name), value.clone()));
            }
        }
        Ok(given)
    }

    /// Calls a value.
    pub(super) fn call(&mut self, callee: &Value, given: Given) -> Outcome<Value> {
        self.limits.step(1)?;
        self.limits.stack()?;
        match callee {
            Value::Method(method) => methods::call(&method.0, &method.1, &given, self.limits),
            Value::Macro(closure) => self.call_macro(closure, given),
            Value::Function(function) => self.call_function(*function, given),
            Value::Loop(one) => {
                let over = given.bind("loop", &["iterable"], 1)?.value(0);
                self.recurse(one, &over)
            }
            Value::Joiner(joiner) => {
                given.bind("joiner", &[], 0)?;
                Ok(if joiner.used.replace(true) { joiner.separator.clone() } else { Value::text("") })
            }
            Value::Block(block) => {
                given.bind("block", &[], 0)?;
                let block = block.clone();
                let text =
                    self.captured(|machine| machine.scoped(0, Vec::new(), |machine| machine.run(&block.body)))?;
                Ok(Value::text(text))
            }
            Value::Undefined(words) => undefined(words),
            other => fail(format!("TypeError: '{}' object is not callable", other.type_name())),
        }
    }

    fn call_macro(&mut self, closure: &Rc<Closure>, mut given: Given) -> Outcome<Value> {
        let definition = closure.definition.clone();
        let shown = definition.name.as_deref().unwrap_or("caller");
        let count = definition.parameters.len();
        let mut rest = given.positional.split_off(given.positional.len().min(count)).into_iter().collect::<Vec<_>>();
        let mut positional = given.positional.drain(..).collect::<Vec<_>>().into_iter();
        let mut names: Vec<(Arc<str>, Option<Value>)> = Vec::with_capacity(count + 3);
        for (name, _) in &definition.parameters {
            let value = positional.next().or_else(|| given.take_named(name));
            names.push((name.clone(), value));
        }
        let caller = if definition.takes_caller { given.take_named("caller") } else { None };
        if definition.takes_caller {
            let value = caller.unwrap_or_else(|| Value::undefined("No caller defined"));
            names.push((Arc::from("caller"), Some(value)));
        }
        if definition.takes_named_rest {
            let pairs = given.named.drain(..).map(|(name, value)| (Value::Text(name), value));
            names.push((Arc::from("kwargs"), Some(Value::Dict(Rc::new(Dict::from_pairs(pairs)?)))));
        } else if let Some((name, _)) = given.named.first() {
            return fail(format!("TypeError: macro '{shown}' takes no keyword argument '{name}'"));
        }
        if definition.takes_rest {
            names.push((Arc::from("varargs"), Some(Value::tuple(std::mem::take(&mut rest))?)));
        } else if !rest.is_empty() {
            return fail(format!("TypeError: macro '{shown}' takes not more than {count} argument(s)"));
        }
        let line = self.line;
        let text = self.captured(|machine| {
            machine.scoped(closure.scope, Vec::new(), |machine| {
                for (index, (name, value)) in names.into_iter().enumerate() {
                    let value = match (value, definition.parameters.get(index)) {
                        (Some(value), _) => value,
                        (None, Some((_, Some(default)))) => machine.evaluate(default)?,
                        (None, _) => Value::undefined(format!("parameter '{name}' was not provided")),
                    };
                    machine.set(&name, value);
                }
                machine.run(&definition.body)
            })
        })?;
        self.line = line;
        Ok(Value::text(text))
    }

    fn call_function(&mut self, function: Function, given: Given) -> Outcome<Value> {
        match function {
            Function::Range => {
                let bound = given.bind_positional("range", &["start", "stop", "step"], 1)?;
                let (start, stop) =
                    if bound.get(1).is_some() { (bound.int(0, 0)?, bound.int(1, 0)?) } else { (0, bound.int(0, 0)?) };
                let step = bound.int(2, 1)?;
                if step == 0 {
                    return fail("ValueError: range() arg 3 must not be zero");
                }
                let large = |number: i128| number.unsigned_abs() > 1 << 100;
                let range = Range { start, stop, step };
                if large(start) || large(stop) || large(step) || range.len() > LONGEST_RANGE {
                    return fail(format!(
                        "OverflowError: Range too big. The sandbox blocks ranges larger than {LONGEST_RANGE}"
                    ));
                }
                Ok(Value::Range(range))
            }
            Function::Dict => Ok(Value::Dict(Rc::new(self.dict_of(given)?))),
            Function::Namespace => {
                let dict = self.dict_of(given)?;
                let mut values = Vec::new();
                for (key, value) in dict.entries {
                    let Some(name) = key.as_text() else { return fail("namespace: names must be texts") };
                    values.push((Arc::from(name), value));
                }
                Ok(self.new_namespace(values))
            }
            Function::Cycler => {
                if given.positional.is_empty() || !given.named.is_empty() {
                    return fail("RuntimeError: at least one item has to be provided");
                }
                Value::cycler(given.positional)
            }
            Function::Joiner => {
                let separator = given.bind("joiner", &["sep"], 0)?.get(0).cloned();
                let separator = separator.unwrap_or_else(|| Value::text(", "));
                Value::joiner(separator)
            }
            Function::Lipsum => fail("`lipsum` is not supported: it prints another text every time"),
            Function::RaiseException => {
                let message = given.bind("raise_exception", &["message"], 1)?.value(0);
                Err(Box::new(Fault::Raised(text_of(&message, self.limits)?)))
            }
            Function::StrftimeNow => {
                let bound = given.bind("strftime_now", &["format"], 1)?;
                Ok(Value::text(self.day.format(bound.text(0)?)?))
            }
        }
    }

    fn dict_of(&mut self, given: Given) -> Outcome<Dict> {
        let mut dict = Dict::default();
        if given.positional.len() > 1 {
            return fail(format!("TypeError: dict expected at most 1 argument, got {}", given.positional.len()));
        }
        match given.positional.first() {
            None => {}
            Some(Value::Dict(from)) => {
                self.limits.room(from.entries.len() * size_of::<Value>())?;
                for (key, value) in &from.entries {
                    dict.insert(key.clone(), value.clone())?;
                }
            }
            Some(other) => {
                for pair in items(other, self.limits)? {
                    match items(&pair, self.limits)?.as_slice() {
                        [key, value] => dict.insert(key.clone(), value.clone())?,
                        _ => return fail("ValueError: dictionary update sequence element has no length 2"),
                    }
                }
            }
        }
        for (name, value) in given.named {
            dict.insert(Value::Text(name), value)?;
        }
        Ok(dict)
    }
}

/// Whether an expression is made of literals only.
fn is_constant(expression: &Expression) -> bool {
    match expression {
        Expression::Constant(_) => true,
        Expression::List(parts) | Expression::Tuple(parts) => parts.iter().all(is_constant),
        Expression::Dict(pairs) => pairs.iter().all(|(key, value)| is_constant(key) && is_constant(value)),
        Expression::Negative(inner) => is_constant(inner),
        _ => false,
    }
}

fn is_negative_constant(expression: &Expression) -> bool {
    matches!(expression, Expression::Negative(inner) if matches!(**inner, Expression::Constant(_)))
}
