//! Whether what the file says the assistant said stands in the rendered text, and what the target says itself where a
//! template cannot render it.

use super::conversation::Message;

/// Signs that templates cut content at and write anew.
const THOUGHT_SIGNS: [&str; 2] = ["<think>", "</think>"];

/// The part of a message that its rendering leaves out: the key it stands under and its first words. White space does not
/// count, nor do the signs around thoughts, which templates write anew.
pub(super) fn missing(message: &Message, rendered: &str) -> Option<(String, String)> {
    // Templates for tools print the call and, many of them, nothing that was said beside it.
    if message.extra.get("tool_calls").and_then(|calls| calls.as_array()).is_some_and(|calls| !calls.is_empty()) {
        return None;
    }
    let rendered = squeezed(rendered);
    let content = message.content.as_deref().unwrap_or_default();
    if let Some(part) = missing_part(content, &rendered) {
        return Some(("content".to_owned(), part));
    }
    for key in ["reasoning_content", "reasoning", "thinking"] {
        if let Some(part) = message.extra.get(key).and_then(|value| missing_part(value.as_str()?, &rendered)) {
            return Some((key.to_owned(), part));
        }
    }
    None
}

/// Like [`missing`], for content alone: a template that marks itself what is generated decides about the rest.
pub(super) fn missing_content(message: &Message, rendered: &str) -> Option<(String, String)> {
    let spoken = Message { extra: serde_json::Map::new(), ..message.clone() };
    if message.extra.contains_key("tool_calls") { None } else { missing(&spoken, rendered) }
}

/// The first piece between thought signs that does not follow the pieces before it.
fn missing_part(text: &str, rendered: &str) -> Option<String> {
    let mut pieces = vec![text];
    for sign in THOUGHT_SIGNS {
        pieces = pieces.into_iter().flat_map(|piece| piece.split(sign)).collect();
    }
    let mut rest = rendered;
    for piece in pieces {
        let wanted = squeezed(piece);
        match rest.find(&wanted) {
            Some(at) => rest = &rest[at + wanted.len()..],
            None => {
                let words: String = piece.trim().chars().take(40).collect();
                return Some(words);
            }
        }
    }
    None
}

fn squeezed(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_whitespace()).collect()
}

/// What the target says behind a prompt that opens a thought, where the finished turn does not show it: the content as it
/// is, without the opening that stands in the prompt already. `opened` is what the generation prompt adds. None where the
/// content is not of this kind.
pub(super) fn behind_an_open_thought<'a>(message: &'a Message, opened: &str) -> Option<&'a str> {
    let [open, close] = THOUGHT_SIGNS;
    let is_open = opened.rfind(open).is_some_and(|at| !opened[at..].contains(close));
    let content = message.content.as_deref()?;
    if !is_open || !content.contains(close) {
        return None;
    }
    let Some(behind) = content.trim_start().strip_prefix(open) else { return Some(content) };
    // White space behind the opening stands in the prompt too.
    let tail = &opened[opened.rfind(open)? + open.len()..];
    Some(behind.strip_prefix(tail).unwrap_or_else(|| behind.trim_start()))
}

/// What a finished turn ends with: the text behind the last words of its content.
pub(super) fn ending<'a>(message: &Message, finished: &'a str) -> Option<&'a str> {
    let content = message.content.as_deref()?;
    let last = content.rsplit(THOUGHT_SIGNS[1]).next()?.trim();
    if last.is_empty() {
        return None;
    }
    finished.rfind(last).map(|at| &finished[at + last.len()..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_and_thought_signs_do_not_count() {
        let message = Message::new("assistant", "<think>\n one two\n</think>\n\nthree  four ");
        for whole in ["<think>\none two\n</think>\nthree four<e>", "[onetwo]three\n\nfour", "one two|three four"] {
            assert_eq!(missing(&message, whole), None, "{whole}");
        }
        for (part, words) in [("three four", "one two"), ("<think>\none two\n</think>", "three  four"), ("", "one two")]
        {
            assert_eq!(missing(&message, part), Some(("content".to_owned(), words.to_owned())), "{part}");
        }
        let mut message = Message::new("assistant", "ho");
        message.extra.insert("reasoning_content".to_owned(), "because".into());
        assert_eq!(missing(&message, "ho<e>"), Some(("reasoning_content".to_owned(), "because".to_owned())));
        assert_eq!((missing(&message, "because ho"), missing_content(&message, "ho<e>")), (None, None));
    }

    #[test]
    fn a_thought_that_the_prompt_opens_is_not_opened_twice() {
        let spoken = |content: &str, opened: &str| {
            behind_an_open_thought(&Message::new("assistant", content), opened).map(str::to_owned)
        };
        assert_eq!(spoken("<think>\nhm\n</think>\n\nho", "<a><think>\n").as_deref(), Some("hm\n</think>\n\nho"));
        assert_eq!(spoken("hm\n</think>\n\nho", "<a><think>\n").as_deref(), Some("hm\n</think>\n\nho"));
        assert_eq!(spoken("ho", "<a><think>\n"), None);
        assert_eq!(spoken("hm</think>ho", "<a>"), None);
        assert_eq!(spoken("hm</think>ho", "<a><think>\n\n</think>\n\n"), None);
        assert_eq!(ending(&Message::new("assistant", "hm</think>\n\nho "), "<a>ho<e>\n"), Some("<e>\n"));
    }
}
