//! What is wrong with a record, by kind.

/// What kind of thing is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultKind {
    /// The file cannot be read, or its records cannot be told apart.
    File,
    /// Bytes that are no text.
    Encoding,
    /// Text that is no JSON.
    Json,
    /// JSON that is none of the known records.
    Format,
    /// A list of messages that is none, or contradicts another.
    Messages,
    /// A message without a known role.
    Role,
    /// A message without content, or with content that is no text.
    Content,
    /// Calls of tools, or the tools themselves.
    Tools,
    /// What is said about training: weights, ends of answers, wishes that contradict each other.
    Training,
    /// Arguments of the chat template.
    TemplateArguments,
    /// A document in tokens.
    Tokens,
    /// A record that the target's tokenizer, its chat template or the chosen mask has no document for.
    Rendering,
}

impl FaultKind {
    /// For programs.
    pub fn name(self) -> &'static str {
        match self {
            FaultKind::File => "file",
            FaultKind::Encoding => "encoding",
            FaultKind::Json => "json",
            FaultKind::Format => "format",
            FaultKind::Messages => "messages",
            FaultKind::Role => "role",
            FaultKind::Content => "content",
            FaultKind::Tools => "tools",
            FaultKind::Training => "training",
            FaultKind::TemplateArguments => "template_arguments",
            FaultKind::Tokens => "tokens",
            FaultKind::Rendering => "rendering",
        }
    }

    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            FaultKind::File => "files that cannot be read",
            FaultKind::Encoding => "not UTF-8",
            FaultKind::Json => "not JSON",
            FaultKind::Format => "not a known record",
            FaultKind::Messages => "messages",
            FaultKind::Role => "roles",
            FaultKind::Content => "content",
            FaultKind::Tools => "tools and their calls",
            FaultKind::Training => "marks about training",
            FaultKind::TemplateArguments => "template arguments",
            FaultKind::Tokens => "token ids",
            FaultKind::Rendering => "template, tokenizer and mask",
        }
    }
}

/// One thing that is wrong, with what was expected and what was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Its kind.
    pub kind: FaultKind,
    /// In words.
    pub problem: String,
}

impl Fault {
    pub(super) fn new(kind: FaultKind, problem: impl Into<String>) -> Self {
        Self { kind, problem: problem.into() }
    }

    /// Makes a fault of this kind of words.
    pub(super) fn of(kind: FaultKind) -> impl Fn(String) -> Fault {
        move |problem| Fault { kind, problem }
    }

    /// The same with its place before it.
    pub(super) fn at(self, place: &str) -> Self {
        Self { problem: format!("{place}: {}", self.problem), ..self }
    }
}

impl From<Fault> for Vec<Fault> {
    fn from(fault: Fault) -> Self {
        vec![fault]
    }
}
