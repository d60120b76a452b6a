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
use super::marks::Finish;
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
    /// At the last special token that starts at this byte or later: the end of turn. Template text after it is not the
    /// model's. Without such a token, where the span ends.
    EndOfTurn {
        /// One past the last byte of the message's content.
        after: usize,
    },
    /// At the last special token that only white space follows, else where the span ends.
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
    let text = prepared.render(count, false)?;
    if let Some(spans) = boundary_spans(&prepared, messages, &turns, &text) {
        return Ok((vec![Rendered { text, spans, turn: None }], Method::RenderBoundaries));
    }
    // Blocks do not say which message they are of: marks of single messages need a document for each turn.
    let marks = messages[..count].iter().any(|message| message.marks.leave_something_out());
    let marked = if marks { None } else { prepared.render_marked(count)? };
    if let Some((text, mut ranges)) = marked.filter(|(_, ranges)| !ranges.is_empty()) {
        if supervise == Supervise::LastTurn {
            ranges.drain(..ranges.len() - 1);
        }
        let spans = ranges.into_iter().map(|range| Span { range, end: SpanEnd::BeforeWhiteSpace }).collect();
        return Ok((vec![Rendered { text, spans, turn: None }], Method::GenerationBlocks));
    }
    let documents = turns.iter().map(|&index| one_turn(&prepared, messages, index)).collect::<Result<_>>()?;
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

/// The span of every turn, or None if the template rewrites history.
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

/// A document that ends with one turn and trains only it.
fn one_turn(prepared: &Prepared<'_>, messages: &[Message], index: usize) -> Result<Rendered> {
    let turn = messages[..=index].iter().filter(|message| message.is_assistant()).count();
    let place = |problem: String| Error::Failed(format!("assistant turn {turn} (message {}): {problem}", index + 1));
    let before = prepared.render(index, true).map_err(|error| place(error.to_string()))?;
    let text = prepared.render(index + 1, false).map_err(|error| place(error.to_string()))?;
    if !text.starts_with(&before) {
        return Err(place(format!(
            "the chat template rewrites it: the model is given {}, but the finished turn reads {}; \
             data.template_arguments or data.chat_template can make them agree",
            around_difference(&before, &text),
            around_difference(&text, &before),
        )));
    }
    let span = turn_span(&messages[index], &text, before.len()..text.len());
    Ok(Rendered { text, spans: vec![span], turn: Some(turn) })
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
            SpanEnd::EndOfTurn { after } => special(after),
            SpanEnd::BeforeWhiteSpace => {
                special(range.start).filter(|&at| text[offsets[at].1.min(range.end)..range.end].trim().is_empty())
            }
        };
        let stop = match end_of_turn {
            Some(at) => at + 1,
            // Some families end a turn with the token that opens the next one; it is what the model must say.
            None if !matches!(end, SpanEnd::Exact | SpanEnd::Cut)
                && token < ids.len()
                && tokenizer.eos_token_ids().contains(&ids[token]) =>
            {
                token + 1
            }
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
