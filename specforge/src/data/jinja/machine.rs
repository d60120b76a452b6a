//! What a rendering consists of while it runs: names in scopes, output, limits.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use super::day::Day;
use super::limits::{Limits, Outcome, fail};
use super::syntax::{Target, Template};
use super::value::{Function, Items, Namespace, Value};
use super::watch::Watch;

/// Names that every template finds.
const FUNCTIONS: [(&str, Function); 8] = [
    ("range", Function::Range),
    ("dict", Function::Dict),
    ("cycler", Function::Cycler),
    ("joiner", Function::Joiner),
    ("namespace", Function::Namespace),
    ("lipsum", Function::Lipsum),
    ("raise_exception", Function::RaiseException),
    ("strftime_now", Function::StrftimeNow),
];

/// Names of one block, and the block around it.
#[derive(Debug, Default)]
pub(super) struct Scope {
    pub names: Vec<(Arc<str>, Value)>,
    pub parent: Option<usize>,
}

/// Whether a body was left early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Next,
    Break,
    Continue,
}

/// One rendering.
pub(super) struct Machine<'a> {
    pub template: &'a Template,
    pub context: &'a HashMap<Arc<str>, Value>,
    pub limits: &'a Limits,
    /// What stands around `{% generation %}` blocks.
    pub marks: Option<(&'a str, &'a str)>,
    pub day: Day,
    pub scopes: Vec<Scope>,
    pub scope: usize,
    /// How many macros were made: they keep the scope they were written in.
    pub closures: usize,
    pub out: String,
    /// Line of the statement that runs.
    pub line: usize,
    namespaces: Vec<Rc<Namespace>>,
    /// Where the renderings of beginnings are wanted too.
    pub watch: Option<Watch>,
    /// The conversation as if it ended after so many messages, and whether with a generation prompt.
    pub ending: Option<(Rc<Items>, usize, bool)>,
}

impl<'a> Machine<'a> {
    pub(super) fn new(
        template: &'a Template,
        context: &'a HashMap<Arc<str>, Value>,
        limits: &'a Limits,
        marks: Option<(&'a str, &'a str)>,
        day: Day,
    ) -> Self {
        Self {
            template,
            context,
            limits,
            marks,
            day,
            scopes: vec![Scope::default()],
            scope: 0,
            closures: 0,
            out: String::new(),
            line: 0,
            namespaces: Vec::new(),
            watch: None,
            ending: None,
        }
    }

    pub(super) fn lookup(&self, name: &str) -> Value {
        let mut at = Some(self.scope);
        while let Some(scope) = at.and_then(|at| self.scopes.get(at)) {
            if let Some((_, value)) = scope.names.iter().find(|(own, _)| &**own == name) {
                return value.clone();
            }
            at = scope.parent;
        }
        if let Some((messages, count, prompt)) = &self.ending {
            match name {
                "messages" => {
                    let items = messages.items.iter().take(*count).cloned().collect();
                    return Value::list(items).unwrap_or(Value::None);
                }
                "add_generation_prompt" => return Value::Bool(*prompt),
                _ => {}
            }
        }
        if let Some(value) = self.context.get(name) {
            return value.clone();
        }
        if name == "self" {
            return Value::Template;
        }
        match FUNCTIONS.iter().find(|(own, _)| *own == name) {
            Some((_, function)) => Value::Function(*function),
            None => Value::undefined(format!("'{name}' is undefined")),
        }
    }

    pub(super) fn set(&mut self, name: &Arc<str>, value: Value) {
        let names = &mut self.scopes[self.scope].names;
        match names.iter_mut().find(|(own, _)| own == name) {
            Some((_, own)) => *own = value,
            None => names.push((name.clone(), value)),
        }
    }

    /// Assigns to a name, an attribute of a namespace, or several of these.
    pub(super) fn assign(&mut self, target: &Target, value: Value) -> Outcome<()> {
        if let (Some(watch), true) = (&mut self.watch, value.changes()) {
            // What is used up cannot be put back.
            watch.differs = true;
        }
        match target {
            Target::Name(name) => self.set(name, value),
            Target::Attribute(name, attribute) => match self.lookup(name) {
                Value::Namespace(namespace) => {
                    let mut values = namespace.values.borrow_mut();
                    match values.iter_mut().find(|(own, _)| own == attribute) {
                        Some((_, own)) => *own = value,
                        None => values.push((attribute.clone(), value)),
                    }
                }
                _ => return fail("cannot assign attribute on non-namespace object"),
            },
            Target::Tuple(targets) => {
                let parts = super::compare::items(&value, self.limits)?;
                if parts.len() != targets.len() {
                    return fail(format!(
                        "ValueError: expected {} values to unpack, got {}",
                        targets.len(),
                        parts.len()
                    ));
                }
                for (target, part) in targets.iter().zip(parts) {
                    self.assign(target, part)?;
                }
            }
        }
        Ok(())
    }

    /// Runs something in a scope of its own inside `parent`.
    pub(super) fn scoped<T>(
        &mut self,
        parent: usize,
        names: Vec<(Arc<str>, Value)>,
        run: impl FnOnce(&mut Self) -> Outcome<T>,
    ) -> Outcome<T> {
        self.limits.step(1)?;
        self.limits.stack()?;
        let (before, closures, count) = (self.scope, self.closures, self.scopes.len());
        if count > 1 << 20 {
            self.limits.room(usize::MAX)?;
        }
        self.scopes.push(Scope { names, parent: Some(parent) });
        self.scope = count;
        let done = run(self);
        self.scope = before;
        // A macro that was made inside still needs these names.
        if self.closures == closures {
            self.scopes.truncate(count);
        }
        done
    }

    /// Runs something and gives what it wrote.
    pub(super) fn captured<T>(&mut self, run: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<String> {
        let before = std::mem::take(&mut self.out);
        let done = run(self);
        let text = std::mem::replace(&mut self.out, before);
        done?;
        Ok(text)
    }

    /// What all namespaces hold.
    pub(super) fn namespace_values(&self) -> Vec<Vec<(Arc<str>, Value)>> {
        self.namespaces.iter().map(|namespace| namespace.values.borrow().clone()).collect()
    }

    /// Undoes what was done since; namespaces that were made since are let go.
    pub(super) fn put_back(&mut self, values: Vec<Vec<(Arc<str>, Value)>>) {
        for namespace in self.namespaces.drain(values.len()..) {
            namespace.values.borrow_mut().clear();
        }
        for (namespace, values) in self.namespaces.iter().zip(values) {
            *namespace.values.borrow_mut() = values;
        }
    }

    pub(super) fn new_namespace(&mut self, values: Vec<(Arc<str>, Value)>) -> Value {
        let namespace = Rc::new(Namespace { values: values.into() });
        self.namespaces.push(namespace.clone());
        Value::Namespace(namespace)
    }
}

impl Drop for Machine<'_> {
    /// Namespaces may hold each other, in circles and in chains that are too long to be let go one inside the other.
    fn drop(&mut self) {
        for namespace in &self.namespaces {
            namespace.values.borrow_mut().clear();
        }
    }
}
