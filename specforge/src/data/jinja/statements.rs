//! What statements do.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::compare::{is_true, items};
use super::limits::{Outcome, fail};
use super::machine::{Flow, Machine};
use super::print::write_text;
use super::syntax::{Expression, For, Kind, Link, Macro, Statement, Target};
use super::value::{Closure, Loop, Value};

impl Machine<'_> {
    /// Runs statements until one leaves the loop around them.
    pub(super) fn run(&mut self, body: &[Statement]) -> Outcome<Flow> {
        for statement in body {
            self.line = statement.line;
            let flow = self.statement(&statement.kind)?;
            if flow != Flow::Next {
                return Ok(flow);
            }
        }
        Ok(Flow::Next)
    }

    fn statement(&mut self, kind: &Kind) -> Outcome<Flow> {
        self.limits.step(1)?;
        match kind {
            Kind::Text(text) => {
                self.limits.room(text.len())?;
                self.out.push_str(text);
            }
            Kind::Output(expression) => {
                let value = self.evaluate(expression)?;
                self.write(&value)?;
            }
            Kind::If(branches, otherwise) => return self.branch(branches, otherwise),
            Kind::Set(target, expression) => {
                let value = match target {
                    Target::Name(_) => self.evaluate_alias(expression)?,
                    _ => self.evaluate(expression)?,
                };
                self.assign(target, value)?;
            }
            Kind::For(definition) => {
                let over = self.evaluate(&definition.over)?;
                self.for_loop(definition, &over, 0, self.scope)?;
            }
            Kind::SetBlock(target, links, body) => {
                let text = self.captured_body(body)?;
                let value = self.follow(Value::text(text), links)?;
                self.assign(target, value)?;
            }
            Kind::With(values, body) => {
                let parts = values.iter().map(|(_, value)| self.evaluate(value)).collect::<Outcome<Vec<_>>>()?;
                return self.scoped(self.scope, Vec::new(), |machine| {
                    for ((target, _), value) in values.iter().zip(parts) {
                        machine.assign(target, value)?;
                    }
                    machine.run(body)
                });
            }
            Kind::Macro(definition) => {
                let value = self.closure(definition);
                if let Some(name) = &definition.name {
                    self.set(name, value);
                }
            }
            Kind::Call(call, definition) => self.call_block(call, definition)?,
            Kind::Filter(links, body) => {
                let text = self.captured_body(body)?;
                let value = self.follow(Value::text(text), links)?;
                self.write(&value)?;
            }
            Kind::Block(block) => {
                let parent = if block.scoped { self.scope } else { 0 };
                self.scoped(parent, Vec::new(), |machine| machine.run(&block.body))?;
            }
            Kind::Scope(body) => return self.scoped(self.scope, Vec::new(), |machine| machine.run(body)),
            Kind::Generation(body) => {
                if let Some((open, _)) = self.marks {
                    self.out.push_str(open);
                }
                self.scoped(self.scope, Vec::new(), |machine| machine.run(body))?;
                if let Some((_, close)) = self.marks {
                    self.out.push_str(close);
                }
            }
            Kind::Break => return Ok(Flow::Break),
            Kind::Continue => return Ok(Flow::Continue),
            Kind::Load(what) => return fail(format!("`{what}` is not supported: a chat template stands alone")),
        }
        Ok(Flow::Next)
    }

    fn write(&mut self, value: &Value) -> Outcome<()> {
        let mut out = std::mem::take(&mut self.out);
        let done = write_text(value, self.limits, &mut out);
        self.out = out;
        done
    }

    fn branch(&mut self, branches: &[(Expression, Vec<Statement>)], otherwise: &[Statement]) -> Outcome<Flow> {
        for (test, body) in branches {
            if is_true(&self.evaluate(test)?) {
                return self.run(body);
            }
        }
        self.run(otherwise)
    }

    fn captured_body(&mut self, body: &[Statement]) -> Outcome<String> {
        let scope = self.scope;
        self.captured(|machine| machine.scoped(scope, Vec::new(), |machine| machine.run(body)))
    }

    fn closure(&mut self, definition: &Arc<Macro>) -> Value {
        self.closures += 1;
        Value::Macro(Rc::new(Closure { definition: definition.clone(), scope: self.scope }))
    }

    fn call_block(&mut self, call: &Expression, definition: &Arc<Macro>) -> Outcome<()> {
        let Expression::Chain(first, links) = call else { return fail("expected a call") };
        let Some((Link::Call(arguments), before)) = links.split_last() else { return fail("expected a call") };
        let callee = self.evaluate(first)?;
        let callee = self.follow(callee, before)?;
        let mut given = self.given(arguments)?;
        let caller = self.closure(definition);
        given.named.push((Arc::from("caller"), caller));
        let value = self.call(&callee, given)?;
        self.write(&value)
    }

    /// Runs a loop. `scope` is the one it was written in.
    pub(super) fn for_loop(&mut self, definition: &Arc<For>, over: &Value, depth: usize, scope: usize) -> Outcome<()> {
        let mut all = items(over, self.limits)?;
        if let Some(test) = &definition.test {
            let mut kept = Vec::with_capacity(all.len());
            for one in all {
                let passes = self.scoped(scope, Vec::new(), |machine| {
                    machine.assign(&definition.target, one.clone())?;
                    Ok(is_true(&machine.evaluate(test)?))
                })?;
                if passes {
                    kept.push(one);
                }
            }
            all = kept;
        }
        let state = self.loop_over(definition, all, depth, scope, false);
        let name: Arc<str> = Arc::from("loop");
        let mut completed = false;
        for (index, item) in state.items.iter().enumerate() {
            let flow = self.iterate(&state, &name, index, item)?;
            match flow {
                Flow::Next => completed = true,
                Flow::Continue => {}
                Flow::Break => break,
            }
        }
        // Jinja2 takes the other branch too when every round was cut short.
        if !completed && !definition.otherwise.is_empty() {
            self.scoped(scope, Vec::new(), |machine| machine.run(&definition.otherwise))?;
        }
        Ok(())
    }

    pub(super) fn loop_over(
        &self,
        definition: &Arc<For>,
        items: Vec<Value>,
        depth: usize,
        scope: usize,
        over_messages: bool,
    ) -> Rc<Loop> {
        let (index, changed) = (Cell::new(0), RefCell::new(None));
        Rc::new(Loop { items, index, depth, changed, definition: definition.clone(), scope, over_messages })
    }

    /// One round of a loop.
    pub(super) fn iterate(&mut self, state: &Rc<Loop>, name: &Arc<str>, index: usize, item: &Value) -> Outcome<Flow> {
        state.index.set(index);
        let names = vec![(name.clone(), Value::Loop(state.clone()))];
        self.scoped(state.scope, names, |machine| {
            machine.assign(&state.definition.target, item.clone())?;
            machine.run(&state.definition.body)
        })
    }

    /// `loop(...)` inside a recursive loop.
    pub(super) fn recurse(&mut self, one: &Rc<Loop>, over: &Value) -> Outcome<Value> {
        if !one.definition.recursive {
            return fail("TypeError: The loop must have the 'recursive' marker to be called recursively.");
        }
        let text = self.captured(|machine| machine.for_loop(&one.definition, over, one.depth + 1, one.scope))?;
        Ok(Value::text(text))
    }
}
