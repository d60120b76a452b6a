//! Jinja2's grammar of expressions and of what may be assigned to.

use std::sync::Arc;

use super::lexer::Token;
use super::limits::Outcome;
use super::parser::{DEEPEST, Parser};
use super::syntax::{Arguments, Comparison, Condition, Constant, Expression, Link, Operator, Target};

impl Parser {
    pub(super) fn plain_name(&mut self) -> Outcome<Arc<str>> {
        let name = self.expect_name()?;
        if is_literal(&name) {
            return self.fail(format!("cannot assign to `{name}`"));
        }
        Ok(name)
    }

    pub(super) fn target(&mut self, ends: &[&str], with_namespace: bool) -> Outcome<Target> {
        self.targets((ends, false), with_namespace)
    }

    fn targets(&mut self, until: (&[&str], bool), with_namespace: bool) -> Outcome<Target> {
        self.one_or_tuple(until, "a name", |parser| parser.simple_target(with_namespace), Target::Tuple)
    }

    fn simple_target(&mut self, with_namespace: bool) -> Outcome<Target> {
        if self.skip_sign("(") {
            let inner = self.deeper(|parser| parser.targets((&[], true), with_namespace))?;
            self.expect_sign(")")?;
            return Ok(inner);
        }
        let name = self.plain_name()?;
        if self.all_loops > 0 && &*name == "loop" {
            return self.fail("cannot assign to `loop` inside a loop");
        }
        if with_namespace && self.skip_sign(".") {
            return Ok(Target::Attribute(name, self.expect_name()?));
        }
        Ok(Target::Name(name))
    }

    /// One of something, or several with commas between them, which are a `tuple`. Nothing at all is one of none where that
    /// is allowed.
    fn one_or_tuple<T>(
        &mut self,
        (ends, may_be_empty): (&[&str], bool),
        wanted: &str,
        parse: impl Fn(&mut Self) -> Outcome<T>,
        tuple: impl Fn(Vec<T>) -> T,
    ) -> Outcome<T> {
        let mut parts = Vec::new();
        let mut is_tuple = false;
        loop {
            if !parts.is_empty() {
                self.expect_sign(",")?;
            }
            if self.is_tuple_end(ends) {
                break;
            }
            parts.push(parse(self)?);
            if !self.is_sign(",") {
                break;
            }
            is_tuple = true;
        }
        if !is_tuple {
            if let Some(only) = parts.pop() {
                return Ok(only);
            }
            if !may_be_empty {
                return self.fail(format!("expected {wanted}, got {}", self.current().describe()));
            }
        }
        Ok(tuple(parts))
    }

    fn is_tuple_end(&self, ends: &[&str]) -> bool {
        matches!(self.current(), Token::VariableEnd | Token::BlockEnd | Token::Sign(")"))
            || ends.iter().any(|end| self.is_name(end))
    }

    /// One expression, or several with commas between them.
    pub(super) fn tuple(&mut self, with_condition: bool, ends: &[&str], may_be_empty: bool) -> Outcome<Expression> {
        let parse = |parser: &mut Self| match with_condition {
            true => parser.expression(),
            false => parser.deeper(Self::or),
        };
        self.one_or_tuple((ends, may_be_empty), "an expression", parse, Expression::Tuple)
    }

    pub(super) fn expression(&mut self) -> Outcome<Expression> {
        self.deeper(Self::conditional)
    }

    fn conditional(&mut self) -> Outcome<Expression> {
        let unknown = self.unknown.len();
        let mut expression = self.or()?;
        let depth = self.depth;
        while self.skip_name("if") {
            // What stands in a condition fails only if it runs.
            self.unknown.truncate(unknown);
            self.depth += 1;
            if self.depth >= DEEPEST {
                return self.fail(format!("is nested more than {DEEPEST} levels deep"));
            }
            let (test, no) = self.with_softness(true, |parser| {
                let test = parser.or()?;
                let no = if parser.skip_name("else") { Some(parser.expression()?) } else { None };
                Ok((test, no))
            })?;
            expression = Expression::Condition(Box::new(Condition { test, yes: expression, no }));
        }
        self.depth = depth;
        Ok(expression)
    }

    fn or(&mut self) -> Outcome<Expression> {
        let mut parts = vec![self.and()?];
        while self.skip_name("or") {
            parts.push(self.and()?);
        }
        Ok(only(parts, Expression::Or))
    }

    fn and(&mut self) -> Outcome<Expression> {
        let mut parts = vec![self.not()?];
        while self.skip_name("and") {
            parts.push(self.not()?);
        }
        Ok(only(parts, Expression::And))
    }

    fn not(&mut self) -> Outcome<Expression> {
        if self.skip_name("not") {
            return Ok(Expression::Not(Box::new(self.deeper(Self::not)?)));
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Outcome<Expression> {
        let first = self.sum()?;
        let mut rest = Vec::new();
        loop {
            let operator = match self.current() {
                Token::Sign("==") => Comparison::Equal,
                Token::Sign("!=") => Comparison::NotEqual,
                Token::Sign("<") => Comparison::Less,
                Token::Sign("<=") => Comparison::LessOrEqual,
                Token::Sign(">") => Comparison::Greater,
                Token::Sign(">=") => Comparison::GreaterOrEqual,
                Token::Name(name) if name == "in" => Comparison::In,
                Token::Name(name)
                    if name == "not"
                        && matches!(self.tokens.get(self.at + 1), Some((Token::Name(next), _)) if next == "in") =>
                {
                    self.at += 1;
                    Comparison::NotIn
                }
                _ => break,
            };
            self.at += 1;
            rest.push((operator, self.sum()?));
        }
        Ok(if rest.is_empty() { first } else { Expression::Comparison(Box::new(first), rest) })
    }

    fn sum(&mut self) -> Outcome<Expression> {
        self.binary(Self::concatenation, |sign| match sign {
            "+" => Some(Operator::Add),
            "-" => Some(Operator::Subtract),
            _ => None,
        })
    }

    fn concatenation(&mut self) -> Outcome<Expression> {
        let mut parts = vec![self.product()?];
        while self.skip_sign("~") {
            parts.push(self.product()?);
        }
        Ok(only(parts, Expression::Concatenation))
    }

    fn product(&mut self) -> Outcome<Expression> {
        self.binary(Self::power, |sign| match sign {
            "*" => Some(Operator::Multiply),
            "/" => Some(Operator::Divide),
            "//" => Some(Operator::FloorDivide),
            "%" => Some(Operator::Modulo),
            _ => None,
        })
    }

    fn power(&mut self) -> Outcome<Expression> {
        self.binary(|parser| parser.unary(true), |sign| (sign == "**").then_some(Operator::Power))
    }

    fn binary(
        &mut self,
        operand: impl Fn(&mut Self) -> Outcome<Expression>,
        operator: impl Fn(&str) -> Option<Operator>,
    ) -> Outcome<Expression> {
        let first = operand(self)?;
        let mut rest = Vec::new();
        while let Token::Sign(sign) = self.current()
            && let Some(operator) = operator(sign)
        {
            self.at += 1;
            rest.push((operator, operand(self)?));
        }
        Ok(if rest.is_empty() { first } else { Expression::Binary(Box::new(first), rest) })
    }

    fn unary(&mut self, with_filters: bool) -> Outcome<Expression> {
        let first = if self.skip_sign("-") {
            Expression::Negative(Box::new(self.deeper(|parser| parser.unary(false))?))
        } else if self.skip_sign("+") {
            Expression::Positive(Box::new(self.deeper(|parser| parser.unary(false))?))
        } else {
            self.primary()?
        };
        let mut links = Vec::new();
        self.postfix(&mut links)?;
        if with_filters {
            loop {
                if self.is_sign("|") {
                    links.extend(self.filters(false)?);
                } else if self.is_name("is") {
                    self.at += 1;
                    links.push(self.test()?);
                } else if self.is_sign("(") {
                    links.push(Link::Call(self.arguments()?));
                } else {
                    break;
                }
            }
        }
        Ok(chain(first, links))
    }

    fn primary(&mut self) -> Outcome<Expression> {
        let token = self.next();
        Ok(match token {
            Token::Name(name) => match name.as_str() {
                "true" | "True" => Expression::Constant(Constant::Bool(true)),
                "false" | "False" => Expression::Constant(Constant::Bool(false)),
                "none" | "None" => Expression::Constant(Constant::None),
                _ => {
                    for mentions in &mut self.macros {
                        mentions.rest |= name == "varargs";
                        mentions.named_rest |= name == "kwargs";
                        mentions.caller |= name == "caller";
                    }
                    Expression::Name(Arc::from(name))
                }
            },
            Token::Text(mut text) => {
                while let Token::Text(more) = self.current() {
                    text.push_str(more);
                    self.at += 1;
                }
                Expression::Constant(Constant::Text(Arc::from(text)))
            }
            Token::Int(number) => Expression::Constant(Constant::Int(number)),
            Token::Float(number) => Expression::Constant(Constant::Float(number)),
            Token::Sign("(") => {
                let inner = self.deeper(|parser| parser.tuple(true, &[], true))?;
                self.expect_sign(")")?;
                inner
            }
            Token::Sign("[") => Expression::List(self.deeper(|parser| parser.listed("]", Self::expression))?),
            Token::Sign("{") => {
                let pair = |parser: &mut Self| {
                    let key = parser.expression()?;
                    parser.expect_sign(":")?;
                    Ok((key, parser.expression()?))
                };
                Expression::Dict(self.deeper(|parser| parser.listed("}", pair))?)
            }
            other => {
                self.at -= 1;
                return self.fail(format!("unexpected {}", other.describe()));
            }
        })
    }

    /// Parts with commas between them, up to a sign. The last may have a comma too.
    fn listed<T>(&mut self, end: &str, parse: impl Fn(&mut Self) -> Outcome<T>) -> Outcome<Vec<T>> {
        let mut parts = Vec::new();
        while !self.is_sign(end) {
            if !parts.is_empty() {
                self.expect_sign(",")?;
            }
            if self.is_sign(end) {
                break;
            }
            parts.push(parse(self)?);
        }
        self.expect_sign(end)?;
        Ok(parts)
    }

    fn postfix(&mut self, links: &mut Vec<Link>) -> Outcome<()> {
        loop {
            if self.skip_sign(".") {
                match self.next() {
                    Token::Name(name) => links.push(Link::Attribute(Arc::from(name))),
                    Token::Int(number) => links.push(Link::Item(Expression::Constant(Constant::Int(number)))),
                    other => {
                        self.at -= 1;
                        return self.fail(format!("expected a name or a number, got {}", other.describe()));
                    }
                }
            } else if self.skip_sign("[") {
                links.push(self.deeper(Self::subscript)?);
            } else if self.is_sign("(") {
                links.push(Link::Call(self.arguments()?));
            } else {
                return Ok(());
            }
        }
    }

    fn subscript(&mut self) -> Outcome<Link> {
        let mut parts = Vec::new();
        loop {
            if !parts.is_empty() {
                self.expect_sign(",")?;
            }
            parts.push(self.subscript_part()?);
            if self.is_sign("]") {
                break;
            }
        }
        self.expect_sign("]")?;
        if parts.len() == 1 {
            return Ok(parts.remove(0));
        }
        let items = parts.into_iter().map(|part| match part {
            Link::Item(item) => Ok(item),
            _ => self.fail("several slices in one pair of brackets are not supported"),
        });
        Ok(Link::Item(Expression::Tuple(items.collect::<Outcome<Vec<_>>>()?)))
    }

    fn subscript_part(&mut self) -> Outcome<Link> {
        let is_end = |parser: &Self| matches!(parser.current(), Token::Sign("]" | "," | ":"));
        let mut bounds = [None, None, None];
        if !self.is_sign(":") {
            let first = self.expression()?;
            if !self.is_sign(":") {
                return Ok(Link::Item(first));
            }
            bounds[0] = Some(first);
        }
        self.expect_sign(":")?;
        if !is_end(self) {
            bounds[1] = Some(self.expression()?);
        }
        if self.skip_sign(":") && !matches!(self.current(), Token::Sign("]" | ",")) {
            bounds[2] = Some(self.expression()?);
        }
        Ok(Link::Slice(Box::new(bounds)))
    }

    fn arguments(&mut self) -> Outcome<Arguments> {
        self.deeper(|parser| {
            parser.expect_sign("(")?;
            let mut arguments = Arguments::default();
            let mut first = true;
            while !parser.is_sign(")") {
                if !first {
                    parser.expect_sign(",")?;
                    if parser.is_sign(")") {
                        break;
                    }
                }
                first = false;
                parser.argument(&mut arguments)?;
            }
            parser.expect_sign(")")?;
            Ok(arguments)
        })
    }

    fn argument(&mut self, arguments: &mut Arguments) -> Outcome<()> {
        if self.skip_sign("*") {
            if arguments.more.is_some() || arguments.more_named.is_some() {
                return self.fail("`*` is there twice or behind `**`");
            }
            arguments.more = Some(Box::new(self.expression()?));
            return Ok(());
        }
        if self.skip_sign("**") {
            if arguments.more_named.is_some() {
                return self.fail("`**` is there twice");
            }
            arguments.more_named = Some(Box::new(self.expression()?));
            return Ok(());
        }
        if let (Token::Name(name), Some((Token::Sign("="), _))) = (self.current(), self.tokens.get(self.at + 1)) {
            let name: Arc<str> = Arc::from(name.as_str());
            if arguments.more_named.is_some() || arguments.named.iter().any(|(own, _)| *own == name) {
                return self.fail(format!("the argument `{name}` is there twice or behind `**`"));
            }
            self.at += 2;
            arguments.named.push((name, self.expression()?));
            return Ok(());
        }
        if arguments.more.is_some() || arguments.more_named.is_some() || !arguments.named.is_empty() {
            return self.fail("an argument without a name follows one with a name");
        }
        arguments.positional.push(self.expression()?);
        Ok(())
    }

    fn dotted_name(&mut self) -> Outcome<Arc<str>> {
        let mut name = self.expect_name()?.to_string();
        while self.skip_sign(".") {
            name.push('.');
            name.push_str(&self.expect_name()?);
        }
        Ok(Arc::from(name))
    }

    fn check_known(&mut self, name: &str, is_test: bool) {
        if !self.is_soft && !(self.known)(name, is_test) {
            let kind = if is_test { "test" } else { "filter" };
            self.unknown.push(format!("line {}: there is no {kind} `{name}`", self.line()));
        }
    }

    /// `| name(...)`, as many as there are. `first` is the name of a filter block, which has no sign before it.
    pub(super) fn filters(&mut self, mut first: bool) -> Outcome<Vec<Link>> {
        let mut links = Vec::new();
        while first || self.skip_sign("|") {
            first = false;
            let name = self.dotted_name()?;
            self.check_known(&name, false);
            let arguments = if self.is_sign("(") { self.arguments()? } else { Arguments::default() };
            links.push(Link::Filter(name, arguments));
        }
        Ok(links)
    }

    fn test(&mut self) -> Outcome<Link> {
        let is_negated = self.skip_name("not");
        let name = self.dotted_name()?;
        self.check_known(&name, true);
        let starts_argument = match self.current() {
            Token::Name(name) => !matches!(name.as_str(), "else" | "or" | "and"),
            Token::Text(_) | Token::Int(_) | Token::Float(_) | Token::Sign("[" | "{") => true,
            _ => false,
        };
        let arguments = if self.is_sign("(") {
            self.arguments()?
        } else if starts_argument {
            if self.is_name("is") {
                return self.fail("tests cannot be chained with `is`");
            }
            let first = self.deeper(Self::primary)?;
            let mut links = Vec::new();
            self.postfix(&mut links)?;
            Arguments { positional: vec![chain(first, links)], ..Arguments::default() }
        } else {
            Arguments::default()
        };
        Ok(Link::Test(name, arguments, is_negated))
    }
}

fn is_literal(name: &str) -> bool {
    matches!(name, "true" | "True" | "false" | "False" | "none" | "None")
}

fn chain(first: Expression, links: Vec<Link>) -> Expression {
    if links.is_empty() { first } else { Expression::Chain(Box::new(first), links) }
}

/// The only part, or all of them together.
fn only(mut parts: Vec<Expression>, together: fn(Vec<Expression>) -> Expression) -> Expression {
    if parts.len() == 1 { parts.remove(0) } else { together(parts) }
}
