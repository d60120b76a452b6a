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
mod tests {
    use super::super::build::tests::{TINY, tiny_tokenizer};
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
                          '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' \
                          }}{% endif %}";
    /// Thoughts are kept only after the last user message, as in Qwen3.
    const REWRITING: &str = "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set \
         ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n\
         {%- if m.role == 'assistant' and loop.index0 > ns.last %}\n\
         {{- '\n<think>\n' + m.reasoning_content | default('') + '\n</think>\n' }}{% endif %}\n\
         {{- '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\
         {{- '\n' }}{% endif %}";

    fn talk(messages: &[(&str, &str)]) -> Conversation {
        let messages = messages.iter().map(|(role, content)| Message::new(*role, *content)).collect();
        Conversation { id: "c".to_owned(), messages, tools: None, template_arguments: Default::default() }
    }

    /// Trained runs of every document, as text.
    fn trained(
        template: &str,
        conversation: &Conversation,
        supervise: Supervise,
    ) -> Result<(Vec<Vec<String>>, Method)> {
        let tokenizer = tiny_tokenizer(template);
        let (documents, method) = render_supervised(&tokenizer, conversation, supervise)?;
        let mut all = Vec::new();
        for Rendered { text, spans, .. } in documents {
            let encoded = tokenizer.encode_with_offsets(&text)?;
            let mask = token_mask(&tokenizer, &text, &encoded, &spans);
            let mut runs = Vec::new();
            for (flag, range) in super::super::stats::mask_runs(&mask) {
                if flag {
                    runs.push(tokenizer.decode(&encoded.ids[range], false)?);
                }
            }
            all.push(runs);
        }
        Ok((all, method))
    }

    #[test]
    fn the_end_of_turn_is_trained_and_what_follows_it_is_not() {
        let dialogue = talk(&[
            ("system", "be kind"),
            ("user", "hi"),
            ("assistant", "  ho ho\n"),
            ("user", "hu"),
            ("assistant", "há 😀"),
        ]);
        let (runs, method) = trained(CHATML, &dialogue, Supervise::Assistant).unwrap();
        assert_eq!(method, Method::RenderBoundaries);
        assert_eq!(runs, [["  ho ho\n<|im_end|>", "há 😀<|im_end|>"]]);
        let (runs, _) = trained(CHATML, &dialogue, Supervise::LastTurn).unwrap();
        assert_eq!(runs, [["há 😀<|im_end|>"]]);
        let (runs, _) = trained(CHATML, &dialogue, Supervise::All).unwrap();
        assert!(runs[0][0].starts_with("<|im_start|>system") && runs[0][0].ends_with("<|im_end|>\n"), "{runs:?}");
    }

    #[test]
    fn templates_that_trim_content_keep_exact_spans() {
        let trimming = CHATML.replace("message['content']", "message['content'] | trim");
        let dialogue = talk(&[("user", " hi "), ("assistant", " \n ho \n "), ("user", "hu"), ("assistant", "")]);
        let (runs, method) = trained(&trimming, &dialogue, Supervise::Assistant).unwrap();
        assert_eq!((runs, method), (vec![vec!["ho<|im_end|>".into(), "<|im_end|>".into()]], Method::RenderBoundaries));
    }

    #[test]
    fn messages_that_answer_nobody_are_context() {
        let dialogue = talk(&[("assistant", "welcome"), ("user", "hi"), ("assistant", "ho"), ("user", "bye")]);
        assert_eq!(trained(CHATML, &dialogue, Supervise::Assistant).unwrap().0, [["ho<|im_end|>"]]);
        for silent in [talk(&[]), talk(&[("user", "hi")]), talk(&[("system", "s"), ("assistant", "a")])] {
            assert!(trained(CHATML, &silent, Supervise::Assistant).unwrap().0.is_empty());
        }
    }

    #[test]
    fn rewritten_history_becomes_one_document_per_turn() {
        let mut dialogue = talk(&[("user", "hi"), ("assistant", "ho"), ("user", "hu"), ("assistant", "ha")]);
        dialogue.messages[1].extra.insert("reasoning_content".to_owned(), "hm".into());
        let (runs, method) = trained(REWRITING, &dialogue, Supervise::Assistant).unwrap();
        assert_eq!(method, Method::FanOut);
        assert_eq!(runs, [["<think>\nhm\n</think>\n\nho<|im_end|>"], ["<think>\n\n</think>\n\nha<|im_end|>"]]);
        let (runs, method) = trained(REWRITING, &dialogue, Supervise::LastTurn).unwrap();
        assert_eq!((runs.len(), method), (1, Method::RenderBoundaries));
    }

    #[test]
    fn generation_blocks_decide_where_boundaries_cannot() {
        let marking = REWRITING.replace(
            "{{- '\n' + m.content + '<|im_end|>\n' }}",
            "\n{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n",
        );
        let dialogue = talk(&[("user", "hi"), ("assistant", "ho"), ("user", "hu"), ("assistant", "ha")]);
        let (runs, method) = trained(&marking, &dialogue, Supervise::LastTurn).unwrap();
        assert_eq!(method, Method::RenderBoundaries);
        assert_eq!(runs[0].len(), 1);
        let only_assistant = marking.replace(
            "{% generation %}{{ m.content }}{% endgeneration %}",
            "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}\
             {% endif %}",
        );
        let (runs, method) = trained(&only_assistant, &dialogue, Supervise::Assistant).unwrap();
        assert_eq!(method, Method::GenerationBlocks);
        assert_eq!(runs, [["ho<|im_end|>", "ha<|im_end|>"]]);
    }

    #[test]
    fn a_turn_that_does_not_fit_is_refused_by_name() {
        let thinking = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if \
                        add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}";
        let thinking = thinking.replace("}}<|im_end|>\n", "}}<|im_end|>{{ '\n' }}");
        let dialogue = talk(&[("user", "hi"), ("assistant", "ho")]);
        let message = trained(&thinking, &dialogue, Supervise::Assistant).unwrap_err().to_string();
        assert!(message.starts_with("assistant turn 1 (message 2): the chat template rewrites it"), "{message}");
        assert!(message.contains("<think>") && message.contains("ho"), "{message}");
        let strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}x";
        let message =
            trained(strict, &talk(&[("system", "s"), ("user", "u"), ("assistant", "a")]), Supervise::Assistant);
        assert_eq!(message.unwrap_err().to_string(), "the chat template refuses it: user first");
    }

    /// One pass must find what two renderings for each turn find, or give way to them.
    #[test]
    fn one_pass_finds_what_many_renderings_find() {
        let bodies = [
            "{{ m.role }}:{{ m.content }}<|im_end|>",
            "{{ loop.index }}{{ m.content }}{% if loop.first %}F{% endif %}<|im_end|>",
            "{{ m.content }}{% if not loop.last %},{% endif %}",
            "{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content }}<|im_end|>",
            "{{ m.content }}{% if loop.index == messages | length %}!{% endif %}",
            "{{ m.content }}{{ loop.nextitem.role if loop.nextitem is defined }}",
            "{{ m.content }}{% if m == messages[-1] %}!{% endif %}",
            "{{ m.content }}{% for x in messages[1:] %}{{ loop.length }}{% endfor %}",
            "{{ m.content }}{{ messages[0].role }}{{ messages[3].role if messages[3] is defined }}",
            "{% if add_generation_prompt %}+{% endif %}{{ m.content }}",
            "{% if loop.index > 3 %}{% break %}{% endif %}{{ m.content }}",
            "{{ j() }}{{ m.content }}",
            "{{ m.content }}{{ all | length }}",
            "{% set all = m.content %}{{ all }}",
            "{% macro f() %}{{ messages | length }}{% endmacro %}{{ f() }}{{ m.content }}",
            "{{ m.content }}{{ loop }}",
        ];
        let loops = [
            ("", "messages", ""),
            ("{% set all = messages %}", "all", ""),
            ("{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}", "messages", ""),
            ("{% set rest = messages[1:] if messages[0].role == 'system' else messages %}", "rest", ""),
            ("", "messages | reverse", ""),
            (
                "",
                "messages",
                "{% if messages[-1].role == 'user' and add_generation_prompt %}<u>{% elif add_generation_prompt %}<x>{% endif %}",
            ),
            ("", "messages", "{% for m in messages %}{{ m.role[0] if add_generation_prompt }}{% endfor %}"),
            ("{% for m in messages %}{{ m.role[0] }}{% endfor %}", "messages", "{{ ns.n }}{% set ns.n = 70 %}"),
            ("{% set c = cycler('a', 'b') %}", "messages", "{{ c.next() }}{{ '<g>' if add_generation_prompt }}"),
            ("{% set all = messages %}", "messages", "{{ '<g>' if add_generation_prompt }}{{ all | length }}"),
            ("{% set all = messages %}", "messages", "{% for m in all[1:] %}{{ m.role[0] }}{% endfor %}"),
            ("", "messages", "{{ '<g>' ~ messages | length if add_generation_prompt }}"),
        ];
        let conversations = [
            talk(&[
                ("system", "s"),
                ("user", "a"),
                ("assistant", "b"),
                ("user", "c"),
                ("assistant", "d"),
                ("user", "e"),
            ]),
            talk(&[
                ("user", "a"),
                ("assistant", "b"),
                ("assistant", "bb"),
                ("user", "c"),
                ("tool", "t"),
                ("assistant", "d"),
            ]),
        ];
        let (mut in_one_pass, mut all) = (0, 0);
        for (before, over, behind) in loops {
            for body in bodies {
                let text = format!(
                    "{{% set ns = namespace(n=0) %}}{{% set j = joiner() %}}{before}{{% for m in {over} %}}{body}{{% endfor %}}{behind}"
                );
                let text = if body.contains("j()") { text } else { text.replace("{% set j = joiner() %}", "") };
                let tokenizer = tiny_tokenizer(&text);
                for conversation in &conversations {
                    let prepared = tokenizer.prepare(&conversation.messages, None).unwrap();
                    let turns = replies(&conversation.messages);
                    let count = turns.last().unwrap() + 1;
                    let Ok((text, spans)) = boundaries(&prepared, &conversation.messages, &turns, count) else {
                        continue;
                    };
                    assert_eq!(text, prepared.render(count, false).unwrap(), "{text}");
                    in_one_pass += usize::from(prepared.renderings() == 2);
                    all += 1;
                    assert_eq!(spans, boundary_spans(&prepared, &conversation.messages, &turns, &text), "{text}");
                }
            }
        }
        assert!(in_one_pass > 50 && in_one_pass < all, "{in_one_pass} of {all}");
    }

    #[test]
    fn a_long_conversation_is_rendered_once() {
        let turns: Vec<(&str, &str)> = [("user", "hi"), ("assistant", "ho")].into_iter().cycle().take(600).collect();
        let dialogue = talk(&turns);
        let tokenizer = tiny_tokenizer(CHATML);
        let prepared = tokenizer.prepare(&dialogue.messages, None).unwrap();
        let (_, spans) = boundaries(&prepared, &dialogue.messages, &replies(&dialogue.messages), 600).unwrap();
        assert_eq!((spans.unwrap().len(), prepared.renderings()), (300, 1));
    }

    #[test]
    fn supervision_ends_at_the_first_token_that_stops_the_model() {
        let dialogue = talk(&[("user", "hi"), ("assistant", "ho"), ("user", "hu"), ("assistant", "ha")]);
        for behind in ["<|endoftext|>", "\n<|endoftext|>", "<s></s>\n<|im_end|>"] {
            let template = CHATML.replace("'<|im_end|>' + '\n'", &format!("'<|im_end|>{behind}'"));
            let (runs, _) = trained(&template, &dialogue, Supervise::Assistant).unwrap();
            assert_eq!(runs, [["ho<|im_end|>", "ha<|im_end|>"]], "{behind:?}");
        }
        // What the content itself holds is not its end.
        let dialogue = talk(&[("user", "hi"), ("assistant", "a<|im_end|>b")]);
        assert_eq!(trained(CHATML, &dialogue, Supervise::Assistant).unwrap().0, [["a<|im_end|>b<|im_end|>"]]);
    }

    #[test]
    fn a_turn_that_the_template_cuts_is_refused() {
        let cutting = CHATML.replace("message['content'] +", "message['content'].split('</think>')[-1].strip() +");
        let message = trained(
            &cutting,
            &talk(&[("user", "hi"), ("assistant", "<think>\nhm hm\n</think>\nho")]),
            Supervise::Assistant,
        );
        let message = message.unwrap_err().to_string();
        assert!(
            message.starts_with("assistant turn 1 (message 2): the chat template leaves out a part of its `content`"),
            "{message}"
        );
        assert!(message.contains("hm hm") && message.contains("--chat-template"), "{message}");
        let mut dialogue = talk(&[("user", "hi"), ("assistant", "ho"), ("user", "hu"), ("assistant", "ha")]);
        dialogue.messages[1].extra.insert("reasoning_content".to_owned(), "because".into());
        let message = trained(CHATML, &dialogue, Supervise::Assistant).unwrap_err().to_string();
        assert!(message.contains("`reasoning_content`: \"because\""), "{message}");
        // Only turns that are trained must be whole.
        assert!(trained(CHATML, &dialogue, Supervise::LastTurn).is_ok());
        assert!(trained(CHATML, &dialogue, Supervise::All).is_ok());
    }

    /// As the templates of R1's distillations: the prompt opens a thought, finished turns drop it.
    #[test]
    fn what_is_said_behind_an_open_thought_is_trained_as_it_was_said() {
        let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>' }}\
                        {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}";
        let said = [
            ("user", "hi"),
            ("assistant", "hm\n</think>\n\nho"),
            ("user", "hu"),
            ("assistant", "<think>\nha\n</think>\n\nhe"),
        ];
        let (runs, method) = trained(template, &talk(&said), Supervise::Assistant).unwrap();
        assert_eq!(method, Method::FanOut);
        assert_eq!(runs, [["hm\n</think>\n\nho<|im_end|>"], ["ha\n</think>\n\nhe<|im_end|>"]]);
        let message = trained(
            template,
            &talk(&said[..1].iter().copied().chain([("assistant", "ho")]).collect::<Vec<_>>()),
            Supervise::Assistant,
        );
        let message = message.unwrap_err().to_string();
        assert!(
            message.contains("the chat template rewrites it") && message.contains("--template-arguments"),
            "{message}"
        );
    }

    #[test]
    fn without_an_end_of_turn_token_the_whole_span_is_trained() {
        let bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}\
                    assistant:{% endif %}";
        let dialogue = talk(&[("user", "hi"), ("assistant", "ho"), ("user", "hu")]);
        assert_eq!(trained(bare, &dialogue, Supervise::Assistant).unwrap().0, [[" ho\n\n"]]);
        // The token that opens the next turn ends this one, as in GLM: tiny's end of sequence is <|im_end|>.
        let opening = "{% for m in messages %}{{ '<|im_end|>' if m.role == 'user' else '<|im_start|>' }}{{ m.content }}\
                       {% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}";
        let dialogue = talk(&[("user", "hi"), ("assistant", "ho"), ("user", "hu"), ("assistant", "ha")]);
        assert_eq!(trained(opening, &dialogue, Supervise::Assistant).unwrap().0, [["ho<|im_end|>", "ha"]]);
    }

    /// Offsets must cover the text byte by byte, or spans would be mapped wrongly.
    #[test]
    fn offsets_are_exact_bytes() {
        let tokenizer = ChatTokenizer::load(&TINY.join("tokenizer"), None).unwrap();
        for text in
            ["  leading  and   inner\n\n\n spaces \t ", "<|im_start|> é<|im_end|>\n  😀x", "中文 12 345", "a\u{301}"]
        {
            let encoded = tokenizer.encode_with_offsets(text).unwrap();
            let mut covered = 0;
            for (start, end) in encoded.offsets {
                assert!(start <= covered && end > start, "{text:?}: {start}..{end} after {covered}");
                covered = end;
            }
            assert_eq!(covered, text.len(), "{text:?}");
            assert_eq!(tokenizer.decode(&encoded.ids, false).unwrap(), text);
        }
    }

    #[test]
    fn a_token_that_straddles_the_start_is_not_trained() {
        let tokenizer = ChatTokenizer::load(&TINY.join("tokenizer"), None).unwrap();
        let text = "ab ab";
        let encoded = Encoded { ids: vec![5, 6], offsets: vec![(0, 3), (3, 5)] };
        let mask = |start: usize| {
            let spans = [Span { range: start..5, end: SpanEnd::EndOfTurn { after: start } }];
            token_mask(&tokenizer, text, &encoded, &spans)
        };
        assert_eq!((mask(0), mask(2), mask(3), mask(4)), (vec![1, 1], vec![0, 1], vec![0, 1], vec![0, 0]));
    }
}
