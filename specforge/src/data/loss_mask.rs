//! Which tokens are trained: spans from render boundaries, then a mask over tokens.
//!
//! What an assistant message adds is the text between two renderings: the conversation before it with a generation
//! prompt, and the conversation up to it.
//!
//! ```text
//! messages[..i], generation prompt   <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n
//! messages[..=i]                     <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n
//! trained                                                                                   ho<|im_end|>
//! ```
//!
//! This holds when the first begins the second and the second begins the whole. A template that rewrites history (Qwen3
//! drops the thoughts of earlier turns) breaks it. Then its own `{% generation %}` blocks decide, and without those the
//! conversation becomes one document per turn, each as the model would see it when it speaks. What fits neither is
//! refused with the turn that does not fit.
//!
//! From text to tokens: the whole text is encoded once, and a token is trained if it starts inside a span. The
//! tokenizer is asked for byte offsets without its post-processor, so they are exact: they cover every byte in order.
//! A token that straddles the start of a span is not trained: when decoding, it would be part of the prompt.

use std::ops::Range;

use super::Supervise;
use super::chat_template::Prepared;
use super::conversation::{Conversation, Message};
use super::jinja::Beginning;
use super::marks::Finish;
use super::said;
use super::tokenizer::{ChatTokenizer, Encoded};
use crate::error::{Error, Result};

/// A trained part of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Bytes of the text.
    pub range: Range<usize>,
    /// Where it may end earlier.
    pub end: SpanEnd,
}

/// Where the trained part of a span ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpanEnd {
    /// Where the span ends.
    Exact,
    /// At the first token behind this byte that ends a sequence: there the model stops, whatever the template writes
    /// after it. Without one at the last special token behind this byte, without that where the span ends.
    EndOfTurn {
        /// One past the last byte of the message's content.
        after: usize,
    },
    /// At the first token that ends a sequence and that only special tokens and white space follow, else at the last
    /// special token that only white space follows, else where the span ends.
    BeforeWhiteSpace,
    /// Where the span ends, without a token that reaches beyond: the answer was cut off, and what follows was not said.
    Cut,
}

/// A text with its trained parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// What is encoded.
    pub text: String,
    /// Trained parts, in order, without overlap.
    pub spans: Vec<Span>,
    /// Which of several documents of one conversation this is: the assistant's turn, counted from 1.
    pub turn: Option<usize>,
}

/// How the trained parts of a conversation were found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Each rendering begins the next.
    RenderBoundaries,
    /// The template rewrites history and marks what is generated.
    GenerationBlocks,
    /// The template rewrites history: one document for each turn.
    FanOut,
}

/// Renders a conversation and finds its trained parts. No documents: nobody speaks who is trained on.
/// An error is the reason why this conversation cannot be used.
pub fn render_supervised(
    tokenizer: &ChatTokenizer,
    conversation: &Conversation,
    supervise: Supervise,
) -> Result<(Vec<Rendered>, Method)> {
    let messages = &conversation.messages;
    let prepared = tokenizer.prepare_conversation(conversation)?;
    if supervise == Supervise::All {
        let text = prepared.render(messages.len(), false)?;
        let spans = vec![Span { range: 0..text.len(), end: SpanEnd::Exact }];
        return Ok((vec![Rendered { text, spans, turn: None }], Method::RenderBoundaries));
    }
    let turns = trained_turns(messages, supervise);
    let Some(&last) = turns.last() else {
        return Ok((Vec::new(), Method::RenderBoundaries));
    };
    // What follows the last trained message adds nothing to train, and can make a template rewrite what precedes.
    let count = last + 1;
    let (text, spans) = boundaries(&prepared, messages, &turns, count)?;
    if let Some(spans) = spans {
        for (&index, span) in turns.iter().zip(&spans) {
            complete(messages, index, said::missing(&messages[index], &text[span.range.clone()]))?;
        }
        return Ok((vec![Rendered { text, spans, turn: None }], Method::RenderBoundaries));
    }
    // Blocks do not say which message they are of: marks of single messages need a document for each turn.
    let marks = messages[..count].iter().any(|message| message.marks.leave_something_out());
    let marked = if marks { None } else { prepared.render_marked(count)? };
    if let Some((text, mut ranges)) = marked.filter(|(_, ranges)| !ranges.is_empty()) {
        for &index in &turns {
            complete(messages, index, said::missing_content(&messages[index], &text))?;
        }
        if supervise == Supervise::LastTurn {
            ranges.drain(..ranges.len() - 1);
        }
        let spans = ranges.into_iter().map(|range| Span { range, end: SpanEnd::BeforeWhiteSpace }).collect();
        return Ok((vec![Rendered { text, spans, turn: None }], Method::GenerationBlocks));
    }
    let documents =
        turns.iter().map(|&index| one_turn(tokenizer, &prepared, messages, index)).collect::<Result<_>>()?;
    Ok((documents, Method::FanOut))
}

/// Indices of the messages that are trained.
pub(super) fn trained_turns(messages: &[Message], supervise: Supervise) -> Vec<usize> {
    let mut turns = replies(messages);
    if supervise == Supervise::LastTurn {
        turns.drain(..turns.len().saturating_sub(1));
    }
    turns.retain(|&index| messages[index].marks.train != Some(false));
    turns
}

/// Indices of assistant messages that answer somebody. One that only a system message precedes was written, not
/// generated.
fn replies(messages: &[Message]) -> Vec<usize> {
    let speaks = |message: &Message| !matches!(message.role.as_str(), "system" | "developer" | "assistant");
    let Some(first) = messages.iter().position(speaks) else {
        return Vec::new();
    };
    (first..messages.len()).filter(|&index| messages[index].is_assistant()).collect()
}

/// The rendering of the first `count` messages and the span of every turn, or None if the template rewrites history.
fn boundaries(
    prepared: &Prepared<'_>,
    messages: &[Message],
    turns: &[usize],
    count: usize,
) -> Result<(String, Option<Vec<Span>>)> {
    let pair = |&index: &usize| [(index, true), (index + 1, false)];
    let wanted = turns.iter().flat_map(pair).filter(|&(end, _)| end < count).collect();
    let (text, beginnings) = prepared.render_with_beginnings(count, wanted)?;
    let Some(beginnings) = beginnings else {
        let spans = boundary_spans(prepared, messages, turns, &text);
        return Ok((text, spans));
    };
    // Lengths of the renderings, where they begin the whole.
    let mut ends = beginnings.iter().map(|Beginning { shared, behind }| {
        text.get(*shared..).filter(|rest| rest.starts_with(behind.as_str())).map(|_| shared + behind.len())
    });
    let mut spans: Vec<Span> = Vec::with_capacity(turns.len());
    for &index in turns {
        let before = ends.next().flatten();
        let through = if index + 1 < count { ends.next().flatten() } else { Some(text.len()) };
        let (Some(before), Some(through)) = (before, through) else { return Ok((text, None)) };
        if through < before || spans.last().is_some_and(|previous| previous.range.end > before) {
            return Ok((text, None));
        }
        spans.push(turn_span(&messages[index], &text, before..through));
    }
    Ok((text, Some(spans)))
}

/// The same with two renderings for each turn, for templates that look ahead.
fn boundary_spans(prepared: &Prepared<'_>, messages: &[Message], turns: &[usize], full: &str) -> Option<Vec<Span>> {
    let mut spans: Vec<Span> = Vec::with_capacity(turns.len());
    for &index in turns {
        // A template may refuse a part of a conversation that it accepts as a whole.
        let before = prepared.render(index, true).ok()?;
        let shorter;
        let through = if Some(&index) == turns.last() {
            full
        } else {
            shorter = prepared.render(index + 1, false).ok()?;
            &shorter
        };
        let follows_previous = spans.last().is_none_or(|previous| previous.range.end <= before.len());
        if !through.starts_with(&before) || !full.starts_with(through) || !follows_previous {
            return None;
        }
        spans.push(turn_span(&messages[index], full, before.len()..through.len()));
    }
    Some(spans)
}

/// Refuses a turn whose document does not hold what the assistant said: the target would be trained to say something
/// else in its place.
fn complete(messages: &[Message], index: usize, missing: Option<(String, String)>) -> Result<()> {
    match missing {
        None => Ok(()),
        Some((key, words)) => Err(at_turn(
            messages,
            index,
            &format!(
                "the chat template leaves out a part of its `{key}`: {words:?} does not stand in the text; {REMEDY}, or take it out of the record"
            ),
        )),
    }
}

/// What can make a template and its data agree.
const REMEDY: &str = "template arguments (--template-arguments, data.template_arguments) or another template \
                      (--chat-template, data.chat_template) can make them agree";

fn at_turn(messages: &[Message], index: usize, problem: &str) -> Error {
    let turn = messages[..=index].iter().filter(|message| message.is_assistant()).count();
    Error::Failed(format!("assistant turn {turn} (message {}): {problem}", index + 1))
}

/// A document that ends with one turn and trains only it.
fn one_turn(
    tokenizer: &ChatTokenizer,
    prepared: &Prepared<'_>,
    messages: &[Message],
    index: usize,
) -> Result<Rendered> {
    let message = &messages[index];
    let turn = messages[..=index].iter().filter(|message| message.is_assistant()).count();
    let place = |error: Error| match error {
        Error::Failed(problem) => at_turn(messages, index, &problem),
        fatal => fatal,
    };
    let before = prepared.render(index, true).map_err(place)?;
    let text = prepared.render(index + 1, false).map_err(place)?;
    let missing = text.strip_prefix(before.as_str()).map(|said| said::missing(message, said));
    if missing == Some(None) {
        let span = turn_span(message, &text, before.len()..text.len());
        return Ok(Rendered { text, spans: vec![span], turn: Some(turn) });
    }
    if let Some(spoken) = spoken_turn(tokenizer, prepared, message, (index, &before, &text)) {
        return Ok(Rendered { turn: Some(turn), ..spoken });
    }
    complete(messages, index, missing.flatten())?;
    Err(at_turn(
        messages,
        index,
        &format!(
            "the chat template rewrites it: the model is given {}, but the finished turn reads {}; {REMEDY}",
            around_difference(&before, &text),
            around_difference(&text, &before),
        ),
    ))
}

/// A turn as the target says it: its prompt, which opens a thought, and behind it what was said, to the end of turn. The
/// templates of R1's distillations drop that thought from finished turns, so no rendering holds the two together.
fn spoken_turn(
    tokenizer: &ChatTokenizer,
    prepared: &Prepared<'_>,
    message: &Message,
    (index, before, finished): (usize, &str, &str),
) -> Option<Rendered> {
    let history = prepared.render(index, false).ok()?;
    let spoken = said::behind_an_open_thought(message, before.strip_prefix(history.as_str())?)?;
    let ending = match said::ending(message, finished) {
        Some(ending) => ending,
        None => tokenizer.eos_token()?,
    };
    let text = format!("{before}{}{ending}", spoken.trim_end());
    let span = turn_span(message, &text, before.len()..text.len());
    let after = before.len() + spoken.trim_end().len();
    Some(Rendered { text, spans: vec![Span { end: SpanEnd::EndOfTurn { after }, ..span }], turn: None })
}

fn turn_span(message: &Message, text: &str, range: Range<usize>) -> Span {
    let content = message.content.as_deref().unwrap_or_default().trim();
    let after = match text[range.clone()].rfind(content) {
        Some(at) if !content.is_empty() => range.start + at + content.len(),
        _ => range.start,
    };
    if message.marks.finish == Some(Finish::Length) {
        return Span { range: range.start..after, end: SpanEnd::Cut };
    }
    Span { range, end: SpanEnd::EndOfTurn { after } }
}

/// A few characters of `text` around the first that differs from `other`, quoted.
fn around_difference(text: &str, other: &str) -> String {
    let same = text.chars().zip(other.chars()).take_while(|(one, two)| one == two).count();
    let excerpt: String = text.chars().skip(same.saturating_sub(20)).take(50).collect();
    format!("…{excerpt:?}")
}

/// One byte for each token: 1 if it is trained.
pub fn token_mask(tokenizer: &ChatTokenizer, text: &str, encoded: &Encoded, spans: &[Span]) -> Vec<u8> {
    let Encoded { ids, offsets } = encoded;
    let mut mask = vec![0; ids.len()];
    let mut token = 0;
    for Span { range, end } in spans {
        while token < ids.len() && offsets[token].0 < range.start {
            token += 1;
        }
        let first = token;
        while token < ids.len() && offsets[token].0 < range.end {
            token += 1;
        }
        let ends = |at: usize| tokenizer.eos_token_ids().contains(&ids[at]);
        let special =
            |from: usize| (first..token).rev().find(|&at| offsets[at].0 >= from && tokenizer.is_special(ids[at]));
        let end_of_turn = match *end {
            SpanEnd::Exact => None,
            SpanEnd::Cut => {
                while token > first && offsets[token - 1].1 > range.end {
                    token -= 1;
                }
                None
            }
            SpanEnd::EndOfTurn { after } => {
                (first..token).find(|&at| offsets[at].0 >= after && ends(at)).or_else(|| special(after))
            }
            SpanEnd::BeforeWhiteSpace => special(range.start)
                .filter(|&at| text[offsets[at].1.min(range.end)..range.end].trim().is_empty())
                .map(|last| {
                    let is_tail = |at: &usize| {
                        let (start, end) = offsets[*at];
                        tokenizer.is_special(ids[*at]) || text[start..end.max(start)].trim().is_empty()
                    };
                    let tail = (first..=last).rev().take_while(is_tail);
                    tail.filter(|&at| ends(at)).last().unwrap_or(last)
                }),
        };
        let stop = match end_of_turn {
            Some(at) => at + 1,
            // Some families end a turn with the token that opens the next one; it is what the model must say.
            None if !matches!(end, SpanEnd::Exact | SpanEnd::Cut) && token < ids.len() && ends(token) => token + 1,
            None => token,
        };
        mask[first..stop].fill(1);
    }
    mask
}

#[cfg(test)]
#[path = "loss_mask_tests.rs"]
mod tests;
