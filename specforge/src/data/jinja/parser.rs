//! From tokens to a tree: the parser, and Jinja2's grammar of statements.

use std::sync::Arc;

use super::lexer::{Token, tokens};
use super::limits::{Outcome, fail};
use super::syntax::{Block, Body, Constant, Expression, For, Kind, Link, Macro, Statement, Template};

/// Brackets in brackets and blocks in blocks, at most. Python's compiler stops near this too.
pub(super) const DEEPEST: usize = 80;

/// Says whether there is a filter, or with `true` a test, of this name.
pub(super) type Known = fn(&str, bool) -> bool;

/// Parses a template.
pub(super) fn parse(source: &str, known: Known) -> Outcome<Template> {
    let mut parser = Parser {
        tokens: tokens(source)?,
        at: 0,
        depth: 0,
        known,
        unknown: Vec::new(),
        is_soft: false,
        macros: Vec::new(),
        loops: 0,
        all_loops: 0,
        blocks: Vec::new(),
        has_generation: false,
    };
    let body = parser.body(&[])?;
    if let Some(problem) = parser.unknown.first() {
        return fail(problem.clone());
    }
    Ok(Template { body, blocks: parser.blocks, has_generation: parser.has_generation })
}

/// Which names a macro's body mentions.
#[derive(Default)]
pub(super) struct Mentions {
    pub rest: bool,
    pub named_rest: bool,
    pub caller: bool,
}

pub(super) struct Parser {
    pub tokens: Vec<(Token, usize)>,
    pub at: usize,
    pub depth: usize,
    pub known: Known,
    /// Filters and tests that are not there. Inside a branch that may never run they fail only if it does.
    pub unknown: Vec<String>,
    pub is_soft: bool,
    pub macros: Vec<Mentions>,
    pub loops: usize,
    /// Loops around, those outside of a macro too.
    pub all_loops: usize,
    pub blocks: Vec<Arc<Block>>,
    pub has_generation: bool,
}

impl Parser {
    pub(super) fn current(&self) -> &Token {
        &self.tokens[self.at.min(self.tokens.len() - 1)].0
    }

    pub(super) fn line(&self) -> usize {
        self.tokens[self.at.min(self.tokens.len() - 1)].1
    }

    pub(super) fn next(&mut self) -> Token {
        let token = self.current().clone();
        self.at += 1;
        token
    }

    pub(super) fn fail<T>(&self, problem: impl std::fmt::Display) -> Outcome<T> {
        fail(format!("line {}: {problem}", self.line()))
    }

    pub(super) fn is_sign(&self, sign: &str) -> bool {
        matches!(self.current(), Token::Sign(own) if *own == sign)
    }

    pub(super) fn is_name(&self, name: &str) -> bool {
        matches!(self.current(), Token::Name(own) if own == name)
    }

    pub(super) fn skip_sign(&mut self, sign: &str) -> bool {
        let is = self.is_sign(sign);
        self.at += usize::from(is);
        is
    }

    pub(super) fn skip_name(&mut self, name: &str) -> bool {
        let is = self.is_name(name);
        self.at += usize::from(is);
        is
    }

    pub(super) fn expect_sign(&mut self, sign: &str) -> Outcome<()> {
        if self.skip_sign(sign) {
            return Ok(());
        }
        self.fail(format!("expected `{sign}`, got {}", self.current().describe()))
    }

    pub(super) fn expect_name(&mut self) -> Outcome<Arc<str>> {
        match self.current() {
            Token::Name(name) => {
                let name = Arc::from(name.as_str());
                self.at += 1;
                Ok(name)
            }
            other => self.fail(format!("expected a name, got {}", other.describe())),
        }
    }

    pub(super) fn expect_block_end(&mut self) -> Outcome<()> {
        if *self.current() == Token::BlockEnd {
            self.at += 1;
            return Ok(());
        }
        self.fail(format!("expected `%}}`, got {}", self.current().describe()))
    }

    /// One level deeper.
    pub(super) fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        if self.depth >= DEEPEST {
            return self.fail(format!("is nested more than {DEEPEST} levels deep"));
        }
        self.depth += 1;
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    /// A part that may never run (`soft`), or one that is compiled in any case.
    pub(super) fn with_softness<T>(
        &mut self,
        is_soft: bool,
        parse: impl FnOnce(&mut Self) -> Outcome<T>,
    ) -> Outcome<T> {
        let before = std::mem::replace(&mut self.is_soft, is_soft);
        let parsed = parse(self);
        self.is_soft = before;
        parsed
    }

    // Statements

    /// Up to one of these names in a tag, which is left to the caller. Without names, to the end.
    pub(super) fn body(&mut self, ends: &[&str]) -> Outcome<Body> {
        self.deeper(|parser| parser.statements(ends))
    }

    pub(super) fn statements(&mut self, ends: &[&str]) -> Outcome<Body> {
        let mut body = Vec::new();
        loop {
            let line = self.line();
            match self.next() {
                Token::Data(text) => body.push(Statement { line, kind: Kind::Text(Arc::from(text)) }),
                Token::VariableBegin => {
                    let kind = Kind::Output(self.tuple(true, &[], false)?);
                    if self.next() != Token::VariableEnd {
                        self.at -= 1;
                        return self.fail(format!("expected `}}}}`, got {}", self.current().describe()));
                    }
                    body.push(Statement { line, kind });
                }
                Token::BlockBegin => {
                    if ends.iter().any(|end| self.is_name(end)) {
                        return Ok(body);
                    }
                    self.statement(&mut body)?;
                    self.expect_block_end()?;
                }
                _ if ends.is_empty() => return Ok(body),
                _ => return self.fail(format!("the template ends inside a block: expected `{}`", ends.join("` or `"))),
            }
        }
    }

    /// The body of a block whose tag ends here, and the name that ended it.
    pub(super) fn block_body(&mut self, ends: &[&str]) -> Outcome<(Body, Arc<str>)> {
        self.skip_sign(":");
        self.expect_block_end()?;
        let body = self.body(ends)?;
        Ok((body, self.expect_name()?))
    }

    /// A body that sees its own names only.
    pub(super) fn hard_body(&mut self, ends: &[&str]) -> Outcome<(Body, Arc<str>)> {
        self.with_softness(false, |parser| parser.block_body(ends))
    }

    /// A body that runs as a function of its own: no loop around it can be left from inside.
    pub(super) fn function_body(&mut self, end: &str) -> Outcome<(Body, Mentions)> {
        let loops = std::mem::take(&mut self.loops);
        self.macros.push(Mentions::default());
        let body = self.hard_body(&[end]);
        self.loops = loops;
        let mentions = self.macros.pop().unwrap_or_default();
        Ok((body?.0, mentions))
    }

    pub(super) fn statement(&mut self, body: &mut Body) -> Outcome<()> {
        let line = self.line();
        let name = match self.current() {
            Token::Name(name) => name.clone(),
            other => return self.fail(format!("expected the name of a tag, got {}", other.describe())),
        };
        self.at += 1;
        let kind = match name.as_str() {
            "for" => self.for_loop()?,
            "if" => self.condition_block()?,
            "set" => self.set()?,
            "with" => {
                let mut values = Vec::new();
                while *self.current() != Token::BlockEnd {
                    if !values.is_empty() {
                        self.expect_sign(",")?;
                    }
                    let target = self.target(&[], false)?;
                    self.expect_sign("=")?;
                    values.push((target, self.expression()?));
                }
                Kind::With(values, self.hard_body(&["endwith"])?.0)
            }
            "macro" => {
                let name = self.plain_name()?;
                let parameters = self.parameters()?;
                Kind::Macro(Arc::new(self.macro_body(Some(name), parameters, "endmacro")?))
            }
            "call" => {
                let parameters = if self.is_sign("(") { self.parameters()? } else { Vec::new() };
                let call = self.expression()?;
                if !matches!(&call, Expression::Chain(_, links) if matches!(links.last(), Some(Link::Call(_)))) {
                    return self.fail("expected a call");
                }
                Kind::Call(call, Arc::new(self.macro_body(None, parameters, "endcall")?))
            }
            "filter" => {
                let links = self.filters(true)?;
                Kind::Filter(links, self.hard_body(&["endfilter"])?.0)
            }
            "autoescape" => {
                match self.expression()? {
                    Expression::Constant(Constant::Bool(false)) => {}
                    _ => return self.fail("`autoescape` is not supported unless it is false"),
                }
                Kind::Scope(self.hard_body(&["endautoescape"])?.0)
            }
            "generation" => {
                self.has_generation = true;
                Kind::Generation(self.function_body("endgeneration")?.0)
            }
            "block" => self.block()?,
            "print" => {
                let mut first = true;
                while *self.current() != Token::BlockEnd {
                    if !first {
                        self.expect_sign(",")?;
                    }
                    first = false;
                    let kind = Kind::Output(self.expression()?);
                    body.push(Statement { line, kind });
                }
                return Ok(());
            }
            "break" | "continue" if self.loops == 0 => return self.fail(format!("`{name}` stands outside of a loop")),
            "break" => Kind::Break,
            "continue" => Kind::Continue,
            "include" | "import" | "extends" | "from" => {
                self.expression()?;
                while *self.current() != Token::BlockEnd && *self.current() != Token::End {
                    self.at += 1;
                }
                Kind::Load(match name.as_str() {
                    "include" => "include",
                    "extends" => "extends",
                    _ => "import",
                })
            }
            other => return self.fail(format!("unknown tag `{other}`")),
        };
        body.push(Statement { line, kind });
        Ok(())
    }

    pub(super) fn for_loop(&mut self) -> Outcome<Kind> {
        self.all_loops += 1;
        let parsed = self.whole_loop();
        self.all_loops -= 1;
        parsed
    }

    fn whole_loop(&mut self) -> Outcome<Kind> {
        let target = self.target(&["in"], false)?;
        if !self.skip_name("in") {
            return self.fail(format!("expected `in`, got {}", self.current().describe()));
        }
        let over = self.tuple(false, &["recursive"], false)?;
        let test = if self.skip_name("if") { Some(self.with_softness(false, Self::expression)?) } else { None };
        let recursive = self.skip_name("recursive");
        self.loops += 1;
        let parsed = self.hard_body(&["endfor", "else"]);
        self.loops -= 1;
        let (body, end) = parsed?;
        let otherwise = if &*end == "else" { self.hard_body(&["endfor"])?.0 } else { Vec::new() };
        Ok(Kind::For(Arc::new(For { target, over, test, recursive, body, otherwise })))
    }

    pub(super) fn condition_block(&mut self) -> Outcome<Kind> {
        self.with_softness(true, |parser| {
            let mut branches = Vec::new();
            loop {
                let test = parser.tuple(false, &[], false)?;
                let (body, end) = parser.block_body(&["elif", "else", "endif"])?;
                branches.push((test, body));
                match &*end {
                    "elif" => {}
                    "else" => return Ok(Kind::If(branches, parser.block_body(&["endif"])?.0)),
                    _ => return Ok(Kind::If(branches, Vec::new())),
                }
            }
        })
    }

    pub(super) fn set(&mut self) -> Outcome<Kind> {
        let target = self.target(&[], true)?;
        if self.skip_sign("=") {
            return Ok(Kind::Set(target, self.tuple(true, &[], false)?));
        }
        let links = self.filters(false)?;
        Ok(Kind::SetBlock(target, links, self.hard_body(&["endset"])?.0))
    }

    pub(super) fn block(&mut self) -> Outcome<Kind> {
        let name = self.expect_name()?;
        let scoped = self.skip_name("scoped");
        self.skip_name("required");
        if self.blocks.iter().any(|block| block.name == name) {
            return self.fail(format!("the block `{name}` is defined twice"));
        }
        let (body, _) = self.function_body("endblock")?;
        self.skip_name(&name);
        let block = Arc::new(Block { name, scoped, body });
        self.blocks.push(block.clone());
        Ok(Kind::Block(block))
    }

    pub(super) fn parameters(&mut self) -> Outcome<Vec<(Arc<str>, Option<Expression>)>> {
        self.expect_sign("(")?;
        let mut parameters: Vec<(Arc<str>, Option<Expression>)> = Vec::new();
        while !self.is_sign(")") {
            if !parameters.is_empty() {
                self.expect_sign(",")?;
            }
            let name = self.plain_name()?;
            if parameters.iter().any(|(own, _)| *own == name) {
                return self.fail(format!("the parameter `{name}` is there twice"));
            }
            let default = if self.skip_sign("=") {
                Some(self.expression()?)
            } else if parameters.iter().any(|(_, default)| default.is_some()) {
                return self.fail("a parameter without a default follows one with a default");
            } else {
                None
            };
            parameters.push((name, default));
        }
        self.expect_sign(")")?;
        Ok(parameters)
    }

    pub(super) fn macro_body(
        &mut self,
        name: Option<Arc<str>>,
        parameters: Vec<(Arc<str>, Option<Expression>)>,
        end: &str,
    ) -> Outcome<Macro> {
        let (body, mentions) = self.function_body(end)?;
        let is_parameter = |name: &str| parameters.iter().any(|(own, _)| &**own == name);
        let (takes_rest, takes_named_rest) =
            (mentions.rest && !is_parameter("varargs"), mentions.named_rest && !is_parameter("kwargs"));
        let takes_caller = mentions.caller && !is_parameter("caller");
        Ok(Macro { name, parameters, body, takes_rest, takes_named_rest, takes_caller })
    }
}
