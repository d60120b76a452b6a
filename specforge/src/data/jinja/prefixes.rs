//! One rendering that gives those of its beginnings too.
//!
//! To find what each message adds, a conversation is needed as rendered up to every message: with one rendering for each
//! that is work with the square of the length. Most templates walk through the messages once, in a loop of their own, and
//! look only at the message they are at. Then the rendering of the first messages is what stood there when the loop had
//! passed them, followed by what comes behind the loop: this part is run for each beginning, with names and namespaces put
//! back afterwards.
//!
//! A template that looks ahead (`loop.last`, `messages|length`, `messages[-1]`, another loop before) is noticed when it
//! does, and gives nothing here. So is whatever else a beginning could see: `add_generation_prompt` before the loop's end,
//! a loop that is left, objects that change and cannot be put back.

use std::rc::Rc;
use std::sync::Arc;

use super::limits::Outcome;
use super::machine::{Flow, Machine};
use super::syntax::{Constant, Expression, For, Kind, Link, Statement};
use super::value::{Items, Value};
use super::watch::Beginning;

/// What `loop` says about the messages that were passed.
const BACKWARD: [&str; 8] = ["index", "index0", "first", "previtem", "depth", "depth0", "cycle", "changed"];
/// Tests that answer the same for every beginning.
const SAME_FOR_ALL: [&str; 8] = ["defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number"];

fn is_over_messages(value: &Value) -> bool {
    matches!(value, Value::Loop(one) if one.over_messages)
}

impl Machine<'_> {
    /// Runs a template while watching it.
    pub(super) fn run_watched(&mut self) -> Outcome<()> {
        let template = self.template;
        for (index, statement) in template.body.iter().enumerate() {
            self.line = statement.line;
            if let (Kind::For(definition), Some(watch)) = (&statement.kind, &self.watch)
                && !watch.passed
                && !watch.differs
            {
                let over = self.evaluate_alias(&definition.over)?;
                let offset = self.watch.as_ref().and_then(|watch| watch.offset(&over));
                match offset {
                    Some(offset) => self.main_loop(definition, &over, offset, &template.body[index + 1..])?,
                    None => self.for_loop(definition, &over, 0, 0)?,
                }
                continue;
            }
            self.run(std::slice::from_ref(statement))?;
        }
        Ok(())
    }

    fn main_loop(&mut self, definition: &Arc<For>, over: &Value, offset: usize, behind: &[Statement]) -> Outcome<()> {
        let too_few = self.watch.as_ref().is_some_and(|watch| watch.fewest() <= offset);
        if too_few || definition.test.is_some() || definition.recursive || !definition.otherwise.is_empty() {
            self.differs();
            return self.for_loop(definition, over, 0, 0);
        }
        let state = self.loop_over(definition, super::compare::items(over, self.limits)?, 0, 0, true);
        let name: Arc<str> = Arc::from("loop");
        let mut next = 0;
        for (index, item) in state.items.iter().enumerate() {
            if self.iterate(&state, &name, index, item)? == Flow::Break {
                self.differs();
                break;
            }
            while let Some(watch) = self.watch.as_ref().filter(|watch| !watch.differs)
                && let Some(&(count, prompt)) = watch.wanted.get(next)
                && count == offset + index + 1
            {
                let beginning = self.beginning(count, prompt, behind)?;
                if let Some(watch) = &mut self.watch {
                    watch.found.push(beginning);
                }
                next += 1;
            }
        }
        if let Some(watch) = &mut self.watch {
            watch.passed = true;
        }
        Ok(())
    }

    /// Runs what stands behind the loop as if the conversation ended here, and puts everything back.
    fn beginning(&mut self, count: usize, prompt: bool, behind: &[Statement]) -> Outcome<Beginning> {
        let messages = match self.watch.as_ref().and_then(|watch| watch.lists.first()) {
            Some((all, _)) if behind.iter().any(|statement| !matches!(statement.kind, Kind::Text(_))) => all.clone(),
            _ => Rc::new(Items::default()),
        };
        let (names, scopes, closures) = (self.scopes[0].names.clone(), self.scopes.len(), self.closures);
        let spaces = self.namespace_values();
        let shared = self.out.len();
        self.ending = Some((messages, count, prompt));
        let done = self.run(behind);
        self.ending = None;
        let behind = self.out.split_off(shared);
        self.scopes.truncate(scopes);
        (self.scopes[0].names, self.closures) = (names, closures);
        self.put_back(spaces);
        if done.is_err() {
            // A beginning that the template refuses is no fault of the whole.
            self.differs();
        }
        Ok(Beginning { shared, behind })
    }

    /// Notes that a beginning would be rendered differently.
    pub(super) fn differs(&mut self) {
        if let Some(watch) = &mut self.watch {
            watch.differs = true;
        }
    }

    /// Whether what is seen now could differ for a beginning.
    fn is_watching(&self) -> bool {
        self.watch.as_ref().is_some_and(|watch| !watch.differs && (!watch.passed || self.ending.is_some()))
    }

    /// Looks at a name that is used for more than what [`Machine::glance`] allows.
    pub(super) fn notice(&mut self, name: &str, value: &Value) {
        if !self.is_watching() {
            return;
        }
        let is_prompt = name == "add_generation_prompt" && self.ending.is_none();
        let is_list = self.watch.as_ref().is_some_and(|watch| watch.offset(value).is_some());
        if is_prompt || is_list || is_over_messages(value) {
            self.differs();
        }
    }

    /// Looks at a name and what is done with it: some uses are the same for every beginning. True if this is one.
    pub(super) fn glance(&mut self, value: &Value, links: &[Link]) -> bool {
        let (Some(watch), Some(first)) = (&self.watch, links.first()) else { return false };
        if is_over_messages(value) {
            return matches!(first, Link::Attribute(name) if BACKWARD.contains(&&**name));
        }
        let Some(offset) = watch.offset(value) else { return false };
        match first {
            Link::Item(Expression::Constant(Constant::Int(index))) => {
                usize::try_from(*index).is_ok_and(|index| index.saturating_add(offset) < watch.fewest())
            }
            Link::Test(name, ..) => SAME_FOR_ALL.contains(&&**name),
            _ => false,
        }
    }

    /// Evaluates what only gives a list another name.
    pub(super) fn evaluate_alias(&mut self, expression: &Expression) -> Outcome<Value> {
        match expression {
            Expression::Name(name) if self.watch.is_some() => {
                let value = self.lookup(name);
                let is_list = self.watch.as_ref().is_some_and(|watch| watch.offset(&value).is_some());
                if !is_list || self.ending.is_some() {
                    self.notice(name, &value);
                }
                Ok(value)
            }
            Expression::Chain(first, links) if self.watch.is_some() && self.ending.is_none() => {
                // A list that is cut from a watched one is watched too.
                if let (Expression::Name(name), [Link::Slice(bounds)]) = (&**first, &links[..])
                    && let Some(more) = head_cut(bounds)
                {
                    let value = self.lookup(name);
                    let cut = self.follow(value.clone(), links)?;
                    if let (Some(watch), Value::List(items)) = (&mut self.watch, &cut)
                        && let Some(offset) = watch.offset(&value)
                    {
                        watch.lists.push((items.clone(), offset + more));
                    }
                    return Ok(cut);
                }
                self.evaluate(expression)
            }
            Expression::Condition(condition) if self.watch.is_some() => {
                let test = self.evaluate(&condition.test)?;
                match (super::compare::is_true(&test), &condition.no) {
                    (true, _) => self.evaluate_alias(&condition.yes),
                    (false, Some(no)) => self.evaluate_alias(no),
                    (false, None) => self.evaluate(expression),
                }
            }
            _ => self.evaluate(expression),
        }
    }
}

/// How many first items `[n:]` cuts off; None for other cuts.
fn head_cut(bounds: &[Option<Expression>; 3]) -> Option<usize> {
    match bounds {
        [None, None, None] => Some(0),
        [Some(Expression::Constant(Constant::Int(count))), None, None] => usize::try_from(*count).ok(),
        _ => None,
    }
}
