//! Where the parts of a message stand in a rendered text: its thought, its words, its calls of tools.
//!
//! Templates move, trim and wrap what a message says, and the same words may stand in a text twice. So the conversation
//! is rendered once more with marks around each part: private-use characters that no template looks at. Without the
//! marks the text must be the same to the byte, and each part must stand there once at most; else its place is not known,
//! and the record is refused.
//!
//! What a template writes between the parts goes with one of them:
//!
//! ```text
//! <think>\n  thought  \n</think>\n\n  words  \n<tool_call>\n{"name": "f", ...}\n</tool_call><|im_end|>
//! └── reasoning ───────────────────┘└ words ┘└ calls ──────────────────────────────────────────────┘
//! ```
//!
//! The end of a turn goes with the last part. A thought that a template opens and closes around nothing is a thought.

use std::ops::Range;

use super::chat_template::Prepared;
use super::conversation::{Conversation, Message};
use super::marks::Finish;
use super::mask::Mask;
use super::spans::{Span, SpanEnd};
use super::tokenizer::ChatTokenizer;
use crate::error::{Error, Result};

/// What a part is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Reasoning,
    Words,
    Calls,
}

/// A part of a message, and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) message: usize,
    pub(super) kind: Kind,
    /// Bytes of the rendered text, without the signs around.
    pub(super) range: Range<usize>,
    /// For a thought that its content only closes: the sign that must stand before it.
    opened_by: Option<&'static str>,
}

/// Signs that models and templates write around thoughts.
const THOUGHTS: [(&str, &str); 9] = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
];
/// Signs around calls of tools that stand in the words; some models close none.
const CALLS: [(&str, Option<&str>); 4] = [
    ("<tool_call>", Some("</tool_call>")),
    ("<function_call>", Some("</function_call>")),
    ("[TOOL_CALLS]", None),
    ("<|python_tag|>", None),
];
/// Keys of a message that hold its thought.
const REASONING_KEYS: [&str; 3] = ["reasoning_content", "reasoning", "thinking"];

const MARK_OPEN: char = '\u{f8c0}';
const MARK_CLOSE: char = '\u{f8c1}';
/// The first of sixteen digits.
const MARK_DIGIT: u32 = 0xf8b0;
/// Parts of a message, at most.
const MOST_PARTS: usize = 1 << 12;

/// A part of a string of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    kind: Kind,
    range: Range<usize>,
    opened_by: Option<&'static str>,
}

/// The parts of some messages in the rendering of the first `count`, which without marks is `text`. In the order of the
/// text. An error is the reason why the conversation cannot be used.
pub(super) fn find(
    tokenizer: &ChatTokenizer,
    conversation: &Conversation,
    wanted: &[usize],
    mask: &Mask,
    (count, prompt, text): (usize, bool, &str),
) -> Result<Vec<Part>> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    if text.contains([MARK_OPEN, MARK_CLOSE]) {
        return Err(Error::Failed("holds private-use characters that parts of messages are marked with".to_owned()));
    }
    let mut marked = conversation.clone();
    let mut pieces: Vec<(usize, Vec<Piece>)> = Vec::with_capacity(wanted.len());
    for &index in wanted {
        let marker = |piece: usize, end: usize| mark((index * MOST_PARTS + piece) * 2 + end);
        let found = mark_message(&mut marked.messages[index], mask, marker);
        pieces.push((index, found.map_err(|problem| at_message(&conversation.messages, index, &problem))?));
    }
    let prepared: Prepared<'_> = tokenizer.prepare_conversation(&marked)?;
    let unknown = |message: usize, problem: &str| at_message(&conversation.messages, message, problem);
    let (first, _) = pieces[0];
    let moved = "the chat template writes it otherwise when its parts are marked, so their places are not known";
    let with_marks = prepared.render(count, prompt).map_err(|error| match error {
        Error::Failed(_) => unknown(first, moved),
        fatal => fatal,
    })?;
    let Some((_, places)) = take_out(&with_marks).filter(|(plain, _)| plain == text) else {
        return Err(unknown(first, moved));
    };
    let mut parts = Vec::new();
    for (message, pieces) in &pieces {
        for (number, piece) in pieces.iter().enumerate() {
            let place = |end: usize| {
                let number = (message * MOST_PARTS + number) * 2 + end;
                let mut found = places.iter().filter(move |(mark, _)| *mark == number).map(|(_, at)| *at);
                (found.next(), found.next().is_some())
            };
            let range = match (place(0), place(1)) {
                // A template may leave a part out; whether it may is not decided here.
                ((None, _), (None, _)) => continue,
                ((Some(start), false), (Some(end), false)) if start <= end => start..end,
                _ => return Err(unknown(*message, "the chat template writes a part of it twice, or only half")),
            };
            parts.push(Part { message: *message, kind: piece.kind, range, opened_by: piece.opened_by });
        }
    }
    for (message, _) in &pieces {
        let said = &conversation.messages[*message];
        let has = |kind: Kind| parts.iter().any(|part| part.message == *message && part.kind == kind);
        if said.is_assistant() && !mask.tool_calls && calls_tools(said) && !has(Kind::Calls) {
            return Err(unknown(*message, "the names of the tools it calls do not stand in the rendered text"));
        }
        let speaks = said.content.as_deref().is_some_and(|content| !content.trim().is_empty());
        if !said.is_assistant() && speaks && !has(Kind::Words) {
            return Err(unknown(*message, "what it says does not stand in the rendered text"));
        }
    }
    parts.sort_by_key(|part| part.range.start);
    match parts.windows(2).find(|pair| pair[0].range.end > pair[1].range.start) {
        Some(pair) => Err(unknown(pair[1].message, "the chat template writes its parts one inside the other")),
        None => Ok(parts),
    }
}

/// The parts of an answer that stands in a text as it was said, from byte `start` on.
pub(super) fn of_answer(
    message: &Message,
    answer: &str,
    start: usize,
    index: usize,
    mask: &Mask,
) -> Result<Vec<Part>, String> {
    let cut = message.marks.finish == Some(Finish::Length);
    let pieces = pieces_of(answer, mask, cut)?.into_iter();
    let part = |Piece { kind, range, opened_by }: Piece| Part {
        message: index,
        kind,
        range: start + range.start..start + range.end,
        opened_by,
    };
    Ok(pieces.map(part).collect())
}

/// Refuses an answer as it was said whose thought or calls are known and do not stand in it between known signs.
pub(super) fn all_found(message: &Message, found: &[Part], mask: &Mask) -> Result<(), String> {
    let has = |kind: Kind| found.iter().any(|part| part.kind == kind);
    let mut thoughts = REASONING_KEYS.iter().filter_map(|key| message.extra.get(*key)?.as_str());
    if !mask.reasoning && thoughts.any(|thought| !thought.trim().is_empty()) && !has(Kind::Reasoning) {
        return Err("where its thought ends in its `token_ids` cannot be told".to_owned());
    }
    if !mask.tool_calls && calls_tools(message) && !has(Kind::Calls) {
        return Err("where its calls of tools begin in its `token_ids` cannot be told".to_owned());
    }
    Ok(())
}

/// What is left of a trained turn when the parts that are not trained are taken out. `parts` are those of the whole text.
pub(super) fn keep(text: &str, span: &Span, parts: &[Part], mask: &Mask) -> Result<Vec<Span>, String> {
    let Range { start, end } = span.range;
    let inside = parts.iter().filter(|part| part.range.start >= start && part.range.end <= end);
    let mut segments: Vec<(Kind, usize)> = Vec::new(); // kind, and where it ends
    let (mut at, mut last) = (start, None);
    for part in inside {
        let gap = &text[at..part.range.start];
        if let Some(sign) = part.opened_by
            && !(gap.contains(sign) || text[..part.range.start].trim_end().ends_with(sign))
        {
            return Err(format!(
                "it closes a thought that nothing opens: whether what stands before is a thought cannot be told; write \
                 `{sign}` before it, or the thought as `reasoning_content`"
            ));
        }
        let before = match (last, part.kind) {
            (None, Kind::Reasoning) => (Kind::Reasoning, 0),
            (None, _) => (Kind::Reasoning, closed_thought(&text[..start], gap).unwrap_or(0)),
            (Some(Kind::Reasoning), Kind::Reasoning) => (Kind::Reasoning, gap.len()),
            (Some(Kind::Reasoning), kind) => match (first_close(gap), kind) {
                (Some(length), _) => (Kind::Reasoning, length),
                (None, Kind::Words) => (Kind::Reasoning, gap.len()),
                (None, _) => {
                    let words: String = gap.chars().take(40).collect();
                    return Err(format!("what ends the thought and what begins the call cannot be told in {words:?}"));
                }
            },
            (Some(Kind::Calls), Kind::Reasoning) => {
                match THOUGHTS.iter().filter_map(|(open, _)| gap.find(open)).min() {
                    Some(length) => (Kind::Calls, length),
                    None => {
                        let words: String = gap.chars().take(40).collect();
                        return Err(format!(
                            "what ends the call and what begins the thought cannot be told in {words:?}"
                        ));
                    }
                }
            }
            (Some(Kind::Calls), _) => (Kind::Calls, gap.len()),
            (Some(Kind::Words), _) => (Kind::Words, 0),
        };
        segments.push((before.0, at + before.1));
        segments.push((part.kind, part.range.end));
        (at, last) = (part.range.end, Some(part.kind));
    }
    // The end of the turn.
    let gap = &text[at..end];
    match last {
        None => {
            segments.push((Kind::Reasoning, at + closed_thought(&text[..start], gap).unwrap_or(0)));
            segments.push((Kind::Words, end));
        }
        Some(Kind::Reasoning) => match first_close(gap) {
            Some(length) => segments.extend([(Kind::Reasoning, at + length), (Kind::Words, end)]),
            None => segments.push((Kind::Reasoning, end)),
        },
        Some(kind) => segments.push((kind, end)),
    }
    let kept = |kind: Kind| match kind {
        Kind::Reasoning => mask.reasoning,
        Kind::Words => true,
        Kind::Calls => mask.tool_calls,
    };
    let mut spans: Vec<Span> = Vec::new();
    let mut from = start;
    for (kind, to) in segments {
        if kept(kind) && to > from {
            match spans.last_mut().filter(|last| last.range.end == from) {
                Some(last) => last.range.end = to,
                None => spans.push(Span { range: from..to, end: SpanEnd::Cut }),
            }
        }
        from = to;
    }
    if let Some(last) = spans.last_mut().filter(|last| last.range.end == end) {
        last.end = match span.end {
            SpanEnd::EndOfTurn { after } => SpanEnd::EndOfTurn { after: after.max(last.range.start) },
            other => other,
        };
    }
    Ok(spans)
}

/// What a message of another than the assistant says, and nothing around it: the target says neither.
pub(super) fn words_of_others(parts: &[Part], messages: &[Message]) -> Vec<Span> {
    let others = parts.iter().filter(|part| !messages[part.message].is_assistant());
    others.map(|part| Span { range: part.range.clone(), end: SpanEnd::Cut }).collect()
}

/// Length of a thought around nothing that `gap` begins with or holds, with the white space behind it. The text before
/// may have opened it.
fn closed_thought(before: &str, gap: &str) -> Option<usize> {
    THOUGHTS.iter().find_map(|(open, close)| {
        let from = match gap.find(open) {
            Some(at) => at + open.len(),
            None if before.trim_end().ends_with(open) => 0,
            None => return None,
        };
        gap[from..].find(close).map(|at| with_white_space(gap, from + at + close.len()))
    })
}

/// Where the first sign that closes a thought ends, with the white space behind it.
fn first_close(gap: &str) -> Option<usize> {
    let ends = THOUGHTS.iter().filter_map(|(_, close)| gap.find(close).map(|at| at + close.len()));
    ends.min().map(|end| with_white_space(gap, end))
}

fn with_white_space(gap: &str, end: usize) -> usize {
    gap.len() - gap[end..].trim_start().len()
}

fn calls_tools(message: &Message) -> bool {
    message.extra.get("tool_calls").and_then(|calls| calls.as_array()).is_some_and(|calls| !calls.is_empty())
}

fn at_message(messages: &[Message], index: usize, problem: &str) -> Error {
    let role = &messages[index].role;
    Error::Failed(format!("message {} ({role}): {problem}", index + 1))
}

/// Puts marks around the parts of a message, and says what they are.
fn mark_message(
    message: &mut Message,
    mask: &Mask,
    marker: impl Fn(usize, usize) -> String,
) -> Result<Vec<Piece>, String> {
    let mut all: Vec<Piece> = Vec::new();
    let content = message.content.as_deref().unwrap_or_default();
    let mut pieces = match message.is_assistant() {
        true => pieces_of(content, mask, message.marks.finish == Some(Finish::Length))?,
        false => words(content, 0..content.len()).into_iter().collect(),
    };
    let wrap = |text: &str, pieces: &[Piece], first: usize| {
        let (mut marked, mut at) = (String::with_capacity(text.len() + 64 * pieces.len()), 0);
        for (number, Piece { range, .. }) in pieces.iter().enumerate() {
            marked.push_str(&text[at..range.start]);
            marked.push_str(&marker(first + number, 0));
            marked.push_str(&text[range.clone()]);
            marked.push_str(&marker(first + number, 1));
            at = range.end;
        }
        marked.push_str(&text[at..]);
        marked
    };
    if let Some(content) = &message.content {
        message.content = Some(wrap(content, &pieces, 0));
    }
    all.append(&mut pieces);
    if !message.is_assistant() {
        return Ok(all);
    }
    for key in REASONING_KEYS {
        let Some(serde_json::Value::String(thought)) = message.extra.get_mut(key) else { continue };
        let piece = words(thought, 0..thought.len()).map(|piece| Piece { kind: Kind::Reasoning, ..piece });
        let Some(piece) = piece else { continue };
        *thought = wrap(thought, std::slice::from_ref(&piece), all.len());
        all.push(piece);
    }
    let calls = message.extra.get_mut("tool_calls").and_then(|calls| calls.as_array_mut());
    for call in calls.into_iter().flatten() {
        let call = if call.get("function").is_some() { &mut call["function"] } else { call };
        let Some(serde_json::Value::String(name)) = call.get_mut("name") else { continue };
        let piece = Piece { kind: Kind::Calls, range: 0..name.len(), opened_by: None };
        *name = wrap(name, std::slice::from_ref(&piece), all.len());
        all.push(piece);
    }
    match all.len() {
        0..MOST_PARTS => Ok(all),
        count => Err(format!("has {count} parts, more than {MOST_PARTS}")),
    }
}

/// A range of a text as words, without the white space around; none if nothing else is there.
fn words(text: &str, range: Range<usize>) -> Option<Piece> {
    let said = &text[range.clone()];
    let start = range.start + said.len() - said.trim_start().len();
    let end = start + said.trim().len();
    (start < end).then_some(Piece { kind: Kind::Words, range: start..end, opened_by: None })
}

/// Thought, words and calls that stand in what an assistant says. `cut`: it was cut off, so that a sign may be open.
fn pieces_of(content: &str, mask: &Mask, cut: bool) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut from = 0;
    if !mask.reasoning
        && let Some((thought, end)) = leading_thought(content, cut)?
    {
        let range = thought.range;
        pieces.extend(words(content, range).map(|piece| Piece {
            kind: Kind::Reasoning,
            opened_by: thought.opened_by,
            ..piece
        }));
        from = end;
    }
    let mut calls = Vec::new();
    if !mask.tool_calls {
        calls = spelled_calls(content, from, cut)?;
    }
    for call in calls {
        pieces.extend(words(content, from..call.start));
        from = call.end;
        pieces.push(Piece { kind: Kind::Calls, range: call, opened_by: None });
    }
    pieces.extend(words(content, from..content.len()));
    Ok(pieces)
}

/// The thought that a content begins with, and where what follows it begins.
fn leading_thought(content: &str, cut: bool) -> Result<Option<(Piece, usize)>, String> {
    for (open, close) in THOUGHTS {
        let start = content.len() - content.trim_start().len();
        let begins = content[start..].starts_with(open);
        let first_close = content.find(close);
        // Between the parts of one message the signs of a channel mean something else.
        if !begins && open.starts_with("<|channel|>") {
            continue;
        }
        let (range, end, opened_by) = match (begins, first_close) {
            (true, Some(at)) => (start + open.len()..at, at + close.len(), None),
            (true, None) if cut => (start + open.len()..content.len(), content.len(), None),
            (true, None) => return Err(format!("its `content` opens a thought with `{open}` and does not close it")),
            (false, Some(at)) if !content[..at].contains(open) => (0..at, at + close.len(), Some(open)),
            (false, _) if content.contains(open) => {
                return Err(format!("`{open}` stands amid its `content`: whether it opens a thought cannot be told"));
            }
            (false, _) => continue,
        };
        if range.start > range.end || content[range.clone()].contains(open) || content[end..].contains(open) {
            return Err(format!("its `content` holds `{open}` again: where its thoughts end cannot be told"));
        }
        if content[end..].contains(close) {
            return Err(format!("its `content` holds `{close}` again: where its thought ends cannot be told"));
        }
        return Ok(Some((Piece { kind: Kind::Reasoning, range, opened_by }, end)));
    }
    Ok(None)
}

/// Calls that are written out in a content, with their signs.
fn spelled_calls(content: &str, from: usize, cut: bool) -> Result<Vec<Range<usize>>, String> {
    let (mut calls, mut at) = (Vec::new(), from);
    loop {
        let found =
            CALLS.iter().filter_map(|(open, close)| content[at..].find(open).map(|place| (place, *open, *close)));
        let Some((place, open, close)) = found.min_by_key(|(place, ..)| *place) else { return Ok(calls) };
        let start = at + place;
        let end = match close.map(|close| (close, content[start..].find(close))) {
            None => content.len(),
            Some((close, Some(length))) => start + length + close.len(),
            Some(_) if cut => content.len(),
            Some((close, None)) => return Err(format!("its `content` holds `{open}` and no `{close}` behind it")),
        };
        calls.push(start..end);
        at = end;
    }
}

/// A number as private-use characters.
fn mark(number: usize) -> String {
    let digit = |digit: char| char::from_u32(MARK_DIGIT + digit.to_digit(16).unwrap_or(0)).unwrap_or(MARK_OPEN);
    let digits = format!("{number:x}").chars().map(digit).collect::<String>();
    format!("{MARK_OPEN}{digits}{MARK_CLOSE}")
}

/// The text without marks, and each mark with its place. None if a mark is broken.
fn take_out(marked: &str) -> Option<(String, Vec<(usize, usize)>)> {
    let (mut text, mut places) = (String::with_capacity(marked.len()), Vec::new());
    let mut pieces = marked.split(MARK_OPEN);
    text.push_str(pieces.next()?);
    for piece in pieces {
        let (digits, behind) = piece.split_once(MARK_CLOSE)?;
        let value = |letter: char| u32::from(letter).checked_sub(MARK_DIGIT).filter(|digit| *digit < 16);
        let number = digits.chars().try_fold(0usize, |sum, letter| Some((sum << 4) | value(letter)? as usize))?;
        places.push((number, text.len()));
        text.push_str(behind);
    }
    Some((text, places))
}

#[cfg(test)]
#[path = "parts_tests.rs"]
mod tests;
