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
//! Where a part of a turn is not trained, or somebody else is, `parts` finds the places.
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
use super::mask::Mask;
use super::parts;
use super::said;
pub use super::spans::{Rendered, Span, SpanEnd};
use super::tokenizer::{ChatTokenizer, Encoded};
use crate::error::{Error, Result};

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
    mask: &Mask,
) -> Result<(Vec<Rendered>, Method)> {
    let messages = &conversation.messages;
    let prepared = tokenizer.prepare_conversation(conversation)?;
    if supervise == Supervise::All {
        let text = prepared.render(messages.len(), false)?;
        let spans = vec![Span { range: 0..text.len(), end: SpanEnd::Exact }];
        return Ok((vec![Rendered { text, spans, turn: None }], Method::RenderBoundaries));
    }
    let trained = trained_messages(messages, supervise, mask);
    let Some(&last) = trained.last() else {
        return Ok((Vec::new(), Method::RenderBoundaries));
    };
    let (turns, others): (Vec<usize>, Vec<usize>) =
        trained.iter().copied().partition(|&index| messages[index].is_assistant());
    let chosen = Chosen { tokenizer, conversation, mask };
    // What follows the last trained message adds nothing to train, and can make a template rewrite what precedes.
    let count = last + 1;
    let (text, spans) = boundaries(&prepared, messages, &turns, count)?;
    if let Some(spans) = spans {
        for (&index, span) in turns.iter().zip(&spans) {
            complete(messages, index, said::missing(&messages[index], &text[span.range.clone()]))?;
        }
        let spans = chosen.spans(&text, spans, (&turns, &others), count)?;
        return Ok((vec![Rendered { text, spans, turn: None }], Method::RenderBoundaries));
    }
    // Blocks do not say which message they are of: marks of single messages need a document for each turn.
    let marks = |message: &Message| message.is_assistant() && message.marks.leave_something_out();
    let marked = if messages[..count].iter().any(marks) { None } else { prepared.render_marked(count)? };
    if let Some((text, mut ranges)) = marked.filter(|(_, ranges)| !ranges.is_empty()) {
        for &index in &turns {
            complete(messages, index, said::missing_content(&messages[index], &text))?;
        }
        if supervise == Supervise::LastTurn {
            ranges.drain(..ranges.len() - 1);
        }
        let spans = ranges.into_iter().map(|range| Span { range, end: SpanEnd::BeforeWhiteSpace }).collect();
        let speakers: Vec<usize> = (0..count).filter(|&index| messages[index].is_assistant()).collect();
        let spans = chosen.spans(&text, spans, (&speakers, &others), count)?;
        return Ok((vec![Rendered { text, spans, turn: None }], Method::GenerationBlocks));
    }
    let mut documents = Vec::with_capacity(turns.len() + 1);
    let mut from = 0;
    for &index in &turns {
        // What others say is trained once: where it is the newest.
        let heard = within(&others, from..index);
        documents.push(one_turn(&chosen, &prepared, index, heard)?);
        from = index;
    }
    let unheard = within(&others, from..count);
    if let Some(&newest) = unheard.last() {
        let text = prepared.render(newest + 1, false)?;
        let spans = chosen.spans(&text, Vec::new(), (&[], unheard), newest + 1)?;
        documents.push(Rendered { text, spans, turn: Some(speeches(messages, newest) + 1) });
    }
    Ok((documents, Method::FanOut))
}

/// A conversation, and what of it is trained.
struct Chosen<'a> {
    tokenizer: &'a ChatTokenizer,
    conversation: &'a Conversation,
    mask: &'a Mask,
}

impl Chosen<'_> {
    /// The spans of turns without the parts that are not trained, and what others say; `text` is the rendering of the
    /// first `count` messages, and holds all of them.
    fn spans(
        &self,
        text: &str,
        turns: Vec<Span>,
        (speakers, others): (&[usize], &[usize]),
        count: usize,
    ) -> Result<Vec<Span>> {
        let cut = !self.mask.takes_whole_turns();
        let mut wanted: Vec<usize> = if cut { speakers.to_vec() } else { Vec::new() };
        wanted.extend(others);
        wanted.sort_unstable();
        let found = parts::find(self.tokenizer, self.conversation, &wanted, self.mask, (count, false, text))?;
        self.chosen(text, turns, found)
    }

    fn chosen(&self, text: &str, turns: Vec<Span>, found: Vec<parts::Part>) -> Result<Vec<Span>> {
        let messages = &self.conversation.messages;
        let mut spans = parts::words_of_others(&found, messages);
        if self.mask.takes_whole_turns() {
            spans.extend(turns);
        } else {
            for span in &turns {
                let kept = parts::keep(text, span, &found, self.mask);
                spans.extend(kept.map_err(|problem| self.place(&found, span, &problem))?);
            }
        }
        spans.sort_by_key(|span| span.range.start);
        Ok(spans)
    }

    fn place(&self, found: &[parts::Part], span: &Span, problem: &str) -> Error {
        match found.iter().find(|part| span.range.contains(&part.range.start)) {
            Some(part) => at_turn(&self.conversation.messages, part.message, problem),
            None => Error::Failed(problem.to_owned()),
        }
    }
}

/// Those of some ascending indices that lie in a range.
fn within(indices: &[usize], range: Range<usize>) -> &[usize] {
    let at = |bound: usize| indices.partition_point(|&index| index < bound);
    &indices[at(range.start)..at(range.end)]
}

/// Indices of the messages that are trained: of the assistant those that answer somebody, of others all.
pub(super) fn trained_messages(messages: &[Message], supervise: Supervise, mask: &Mask) -> Vec<usize> {
    let mut turns = if mask.trains_assistant() { replies(messages) } else { Vec::new() };
    let others =
        messages.iter().enumerate().filter(|(_, message)| !message.is_assistant() && mask.trains(&message.role));
    turns.extend(others.map(|(index, _)| index));
    turns.sort_unstable();
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
        let spans = boundary_spans(prepared, messages, turns, (count, &text));
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
fn boundary_spans(
    prepared: &Prepared<'_>,
    messages: &[Message],
    turns: &[usize],
    (count, full): (usize, &str),
) -> Option<Vec<Span>> {
    let mut spans: Vec<Span> = Vec::with_capacity(turns.len());
    for &index in turns {
        // A template may refuse a part of a conversation that it accepts as a whole.
        let before = prepared.render(index, true).ok()?;
        let shorter;
        let through = if index + 1 == count {
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
    let turn = speeches(messages, index);
    Error::Failed(format!("assistant turn {turn} (message {}): {problem}", index + 1))
}

/// How often the assistant speaks up to a message.
fn speeches(messages: &[Message], index: usize) -> usize {
    messages[..=index].iter().filter(|message| message.is_assistant()).count()
}

/// A document that ends with one turn and trains only it, and of `others` what they say.
fn one_turn(chosen: &Chosen<'_>, prepared: &Prepared<'_>, index: usize, others: &[usize]) -> Result<Rendered> {
    let messages = &chosen.conversation.messages;
    let message = &messages[index];
    let turn = speeches(messages, index);
    let place = |error: Error| match error {
        Error::Failed(problem) => at_turn(messages, index, &problem),
        fatal => fatal,
    };
    let before = prepared.render(index, true).map_err(place)?;
    let text = prepared.render(index + 1, false).map_err(place)?;
    let missing = text.strip_prefix(before.as_str()).map(|said| said::missing(message, said));
    if missing == Some(None) {
        let span = turn_span(message, &text, before.len()..text.len());
        let spans = chosen.spans(&text, vec![span], (&[index], others), index + 1)?;
        return Ok(Rendered { text, spans, turn: Some(turn) });
    }
    if let Some((text, span, after)) = spoken_turn(chosen.tokenizer, prepared, message, (index, &before, &text)) {
        let Chosen { tokenizer, conversation, mask } = chosen;
        let mut found = parts::find(tokenizer, conversation, others, mask, (index, true, &before))?;
        let own = parts::of_answer(message, &text[before.len()..after], before.len(), index, mask);
        found.extend(own.map_err(|problem| at_turn(messages, index, &problem))?);
        let spans = chosen.chosen(&text, vec![span], found)?;
        return Ok(Rendered { text, spans, turn: Some(turn) });
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
/// templates of R1's distillations drop that thought from finished turns, so no rendering holds the two together. With the
/// text its span, and where what was said ends.
fn spoken_turn(
    tokenizer: &ChatTokenizer,
    prepared: &Prepared<'_>,
    message: &Message,
    (index, before, finished): (usize, &str, &str),
) -> Option<(String, Span, usize)> {
    let history = prepared.render(index, false).ok()?;
    let spoken = said::behind_an_open_thought(message, before.strip_prefix(history.as_str())?)?;
    let ending = match said::ending(message, finished) {
        Some(ending) => ending,
        None => tokenizer.eos_token()?,
    };
    let text = format!("{before}{}{ending}", spoken.trim_end());
    let span = turn_span(message, &text, before.len()..text.len());
    let after = before.len() + spoken.trim_end().len();
    Some((text, Span { end: SpanEnd::EndOfTurn { after }, ..span }, after))
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
