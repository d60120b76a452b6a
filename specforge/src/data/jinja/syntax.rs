//! A template as a tree.
//!
//! What is written in a row stays in a row: chains of operators, filters and branches are lists, so that the depth of the
//! tree is the depth of brackets and blocks, which the parser limits.

use std::sync::Arc;

/// A literal.
#[derive(Debug, Clone)]
pub(in crate::data) enum Constant {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(Arc<str>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::data) enum Operator {
    Add,
    Subtract,
    Multiply,
    Divide,
    FloorDivide,
    Modulo,
    Power,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::data) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    In,
    NotIn,
}

#[derive(Debug)]
pub(in crate::data) enum Expression {
    Constant(Constant),
    Name(Arc<str>),
    Tuple(Vec<Expression>),
    List(Vec<Expression>),
    Dict(Vec<(Expression, Expression)>),
    /// Something, and what follows it: attributes, items, calls, filters, tests.
    Chain(Box<Expression>, Vec<Link>),
    /// Operators of one rank, from left to right.
    Binary(Box<Expression>, Vec<(Operator, Expression)>),
    /// `~`
    Concatenation(Vec<Expression>),
    Comparison(Box<Expression>, Vec<(Comparison, Expression)>),
    And(Vec<Expression>),
    Or(Vec<Expression>),
    Not(Box<Expression>),
    Negative(Box<Expression>),
    Positive(Box<Expression>),
    Condition(Box<Condition>),
}

/// `yes if test else no`
#[derive(Debug)]
pub(in crate::data) struct Condition {
    pub test: Expression,
    pub yes: Expression,
    pub no: Option<Expression>,
}

#[derive(Debug)]
pub(in crate::data) enum Link {
    Attribute(Arc<str>),
    Item(Expression),
    Slice(Box<[Option<Expression>; 3]>),
    Call(Arguments),
    Filter(Arc<str>, Arguments),
    /// The last says whether `not` stands before it.
    Test(Arc<str>, Arguments, bool),
}

/// Arguments of a call, as written.
#[derive(Debug, Default)]
pub(in crate::data) struct Arguments {
    pub positional: Vec<Expression>,
    pub named: Vec<(Arc<str>, Expression)>,
    /// `*list`
    pub more: Option<Box<Expression>>,
    /// `**dict`
    pub more_named: Option<Box<Expression>>,
}

/// What is assigned to.
#[derive(Debug)]
pub(in crate::data) enum Target {
    Name(Arc<str>),
    Attribute(Arc<str>, Arc<str>),
    Tuple(Vec<Target>),
}

#[derive(Debug)]
pub(in crate::data) struct Statement {
    pub line: usize,
    pub kind: Kind,
}

pub(in crate::data) type Body = Vec<Statement>;

#[derive(Debug)]
pub(in crate::data) enum Kind {
    Text(Arc<str>),
    Output(Expression),
    For(Arc<For>),
    If(Vec<(Expression, Body)>, Body),
    Set(Target, Expression),
    SetBlock(Target, Vec<Link>, Body),
    With(Vec<(Target, Expression)>, Body),
    Macro(Arc<Macro>),
    /// What is called, and what it is given as `caller`.
    Call(Expression, Arc<Macro>),
    Filter(Vec<Link>, Body),
    Block(Arc<Block>),
    /// A block that only limits where its names are seen.
    Scope(Body),
    /// `{% generation %}` of transformers.
    Generation(Body),
    Break,
    Continue,
    /// `include`, `import`, `extends`: there is nothing that other templates could be loaded from.
    Load(&'static str),
}

#[derive(Debug)]
pub(in crate::data) struct For {
    pub target: Target,
    pub over: Expression,
    pub test: Option<Expression>,
    pub recursive: bool,
    pub body: Body,
    pub otherwise: Body,
}

#[derive(Debug)]
pub(in crate::data) struct Macro {
    pub name: Option<Arc<str>>,
    pub parameters: Vec<(Arc<str>, Option<Expression>)>,
    pub body: Body,
    /// Which of these its body mentions: only then it takes them.
    pub takes_rest: bool,
    pub takes_named_rest: bool,
    pub takes_caller: bool,
}

#[derive(Debug)]
pub(in crate::data) struct Block {
    pub name: Arc<str>,
    pub scoped: bool,
    pub body: Body,
}

/// A whole template.
#[derive(Debug)]
pub(in crate::data) struct Template {
    pub(super) body: Body,
    pub(super) blocks: Vec<Arc<Block>>,
    /// Whether a `{% generation %}` stands in it.
    pub(in crate::data) has_generation: bool,
}
