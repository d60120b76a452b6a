//! Conversations whose answers are known as token ids: what `specforge regen` writes.
//!
//! Text does not lead back to the tokens: a target says special tokens that a text may not show, and splits words as no
//! tokenizer would. Here a document is the prompt's tokens, rendered as they were when the target answered, and then the
//! answer's own. Exactly the answer is trained, with its end of turn where the target said one.
//!
//! The next turn joins the same document where its prompt begins with all of that. Where the template writes an answer
//! another way once it is history (R1 drops the thoughts), or the text splits into other tokens, it begins a document of
//! its own, as the target saw it.
//!
//! Ids are of one vocabulary. Beside another they mean nothing, and the text is trained like anybody's.

use std::sync::OnceLock;

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::Supervise;
use super::conversation::{Conversation, Message};
use super::loss_mask::{render_supervised, trained_messages};
use super::marks::Finish;
use super::mask::Mask;
use super::parts;
use super::spans::{Span, SpanEnd};
use super::tokenizer::{ChatTokenizer, hex};
use crate::error::{Error, Result};

/// Tokens, which of them are trained, and the assistant's turn it begins with, counted from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Recorded {
    pub(super) tokens: Vec<u32>,
    pub(super) supervised: Vec<u8>,
    pub(super) turn: usize,
}

/// Tells vocabularies apart; written beside an answer.
pub fn vocabulary_hash(tokenizer: &ChatTokenizer) -> String {
    tokenizer.vocabulary_hash().chars().take(16).collect()
}

/// Whose ids the answers of a conversation are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ids {
    /// It has none.
    None,
    /// The tokenizer's own.
    Own,
    /// Another tokenizer's.
    Foreign,
}

/// A vocabulary that is hashed when it is first asked for.
#[derive(Debug, Default)]
pub(super) struct Vocabulary(OnceLock<String>);

impl Vocabulary {
    /// Whether this hash is the tokenizer's own.
    pub(super) fn is_own(&self, tokenizer: &ChatTokenizer, hash: &str) -> bool {
        self.0.get_or_init(|| vocabulary_hash(tokenizer)) == hash
    }

    /// Whether answers of this conversation are known as ids, and of which vocabulary.
    pub(super) fn ids_of(&self, tokenizer: &ChatTokenizer, conversation: &Conversation) -> Ids {
        let mut answers = conversation.messages.iter().filter(|message| message.marks.token_ids.is_some()).peekable();
        if answers.peek().is_none() {
            return Ids::None;
        }
        let foreign = |message: &Message| {
            message.marks.vocabulary_hash.as_ref().is_some_and(|hash| !self.is_own(tokenizer, hash))
        };
        if answers.any(foreign) { Ids::Foreign } else { Ids::Own }
    }
}

/// Tells prompts apart by their tokens; written beside an answer, and compared before it is trained.
pub fn prompt_hash(tokens: &[u32]) -> String {
    let mut hash = Sha256::new();
    tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
    hex(&hash.finalize()[..8])
}

/// Refuses a conversation that training could not read: ids that are not what the message says, a prompt that is rendered
/// otherwise here, and where there are no ids, answers that the template does not show whole.
pub fn check(tokenizer: &ChatTokenizer, conversation: &Conversation) -> Result<()> {
    match Vocabulary::default().ids_of(tokenizer, conversation) {
        Ids::Own => documents(tokenizer, conversation, Supervise::Assistant, &Mask::default()).map(drop),
        Ids::None | Ids::Foreign => {
            render_supervised(tokenizer, conversation, Supervise::Assistant, &Mask::default()).map(drop)
        }
    }
}

/// The documents of a conversation. An error is the reason why it cannot be used.
pub(super) fn documents(
    tokenizer: &ChatTokenizer,
    conversation: &Conversation,
    supervise: Supervise,
    mask: &Mask,
) -> Result<Vec<Recorded>> {
    let messages = &conversation.messages;
    let trained = trained_messages(messages, supervise, mask);
    if let Some(&other) = trained.iter().find(|&&index| !messages[index].is_assistant()) {
        let role = &messages[other].role;
        return Err(Error::Failed(format!(
            "message {} ({role}) is to be trained, but beside answers that are known as `token_ids` only the assistant \
             is: take {role} out of data.mask.roles, or remove `token_ids` to train the text",
            other + 1
        )));
    }
    let prepared = tokenizer.prepare_conversation(conversation)?;
    let mut documents: Vec<Recorded> = Vec::new();
    for index in trained {
        let place = |problem: String| Error::Failed(format!("message {}: {problem}", index + 1));
        let ids = answer(tokenizer, &messages[index]).map_err(place)?;
        let text = prepared.render(index, true).map_err(|error| place(error.to_string()))?;
        let prompt = tokenizer.encode(&text)?;
        if messages[index].marks.prompt_hash.as_ref().is_some_and(|hash| *hash != prompt_hash(&prompt)) {
            return Err(place(
                "the prompt is not the one that `token_ids` were generated from: template, template arguments or an \
                 earlier message differ; use what `regen` used, run it again, or remove `token_ids` to train the text"
                    .to_owned(),
            ));
        }
        let context = u8::from(supervise == Supervise::All);
        match documents.last_mut().filter(|document| prompt.starts_with(&document.tokens)) {
            Some(document) => {
                document.supervised.resize(prompt.len(), context);
                document.tokens = prompt;
            }
            None => {
                let turn = messages[..=index].iter().filter(|message| message.is_assistant()).count();
                documents.push(Recorded { supervised: vec![context; prompt.len()], tokens: prompt, turn });
            }
        }
        if let Some(document) = documents.last_mut() {
            document.tokens.extend(ids);
            match mask.takes_whole_turns() || supervise == Supervise::All {
                true => document.supervised.resize(document.tokens.len(), 1),
                false => {
                    let kept = kept_tokens(tokenizer, (&messages[index], ids), (index, &text), mask);
                    document.supervised.extend(kept.map_err(place)?);
                }
            }
        }
    }
    Ok(documents)
}

/// Which tokens of an answer are trained, where a part of it is not. `prompt` is the text before it.
fn kept_tokens(
    tokenizer: &ChatTokenizer,
    (message, ids): (&Message, &[u32]),
    (index, prompt): (usize, &str),
    mask: &Mask,
) -> Result<Vec<u8>, String> {
    // What a serving engine took out of the content, the ids still say.
    let said = match ids.split_last() {
        Some((last, said)) if tokenizer.eos_token_ids().contains(last) => said,
        _ => ids,
    };
    let answer = &tokenizer.decode(said, false).map_err(|error| error.to_string())?;
    let found = parts::of_answer(message, answer, prompt.len(), index, mask)?;
    parts::all_found(message, &found, mask)?;
    // The token that ends the turn spells nothing here: one more byte stands for it.
    let text = format!("{prompt}{answer}\n");
    let whole = Span { range: prompt.len()..text.len(), end: SpanEnd::Exact };
    // Where a token begins in the answer. Bytes that are no character yet count when they are.
    let begins = |token: usize| -> Result<usize, String> {
        let before = tokenizer.decode(&ids[..token], false).map_err(|error| error.to_string())?;
        Ok(prompt.len() + before.trim_end_matches('\u{FFFD}').len().min(answer.len()))
    };
    // The first token for which `past` holds of where it begins.
    let first = |past: &dyn Fn(usize) -> bool| -> Result<usize, String> {
        let (mut low, mut high) = (0, ids.len());
        while low < high {
            let middle = low.midpoint(high);
            if past(begins(middle)?) { high = middle } else { low = middle + 1 }
        }
        Ok(low)
    };
    let mut kept = vec![0; ids.len()];
    for Span { range, .. } in parts::keep(&text, &whole, &found, mask)? {
        let from = first(&|begin| begin >= range.start)?;
        // The last token that does not reach beyond is the one before the last that begins at the end or before.
        let to = if range.end == text.len() { ids.len() } else { first(&|begin| begin > range.end)?.saturating_sub(1) };
        if from < to {
            kept[from..to].fill(1);
        }
    }
    Ok(kept)
}

/// The tokens of an answer, if they are what the message says.
fn answer<'a>(tokenizer: &ChatTokenizer, message: &'a Message) -> Result<&'a [u32], String> {
    let ids = message.marks.token_ids.as_deref().ok_or(
        "has no `token_ids`, and other answers of the conversation have; remove them everywhere to train the text",
    )?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= tokenizer.id_limit()) {
        return Err(format!("`token_ids` names token {id}, but the model has {} tokens", tokenizer.id_limit()));
    }
    let ends = |ids: &[u32]| ids.last().is_some_and(|id| tokenizer.eos_token_ids().contains(id));
    let said = match message.marks.finish {
        Some(Finish::Stop) if !ends(ids) => {
            return Err("`finish` says stop, but the last of `token_ids` does not end a turn of this model".to_owned());
        }
        Some(Finish::Length) => ids,
        _ if ends(ids) => &ids[..ids.len() - 1],
        _ => ids,
    };
    let decode = |plain: bool| tokenizer.decode(said, plain).map_err(|error| error.to_string());
    let text = decode(false)?;
    let content = message.content.as_deref().unwrap_or_default();
    if content != text && !is_served(message, &decode(true)?) {
        return Err(format!(
            "`content` is not what `token_ids` spell ({}): if the text was corrected on purpose, remove `token_ids`, \
             and the text is trained",
            first_difference(content, &text),
        ));
    }
    Ok(ids)
}

/// Whether a serving engine would make this message of a text: it leaves special tokens out, and takes thoughts and calls of
/// tools out of what is said, with white space around them.
fn is_served(message: &Message, text: &str) -> bool {
    let content = message.content.as_deref().unwrap_or_default().trim();
    let thoughts = message.extra.get("reasoning_content").and_then(Value::as_str).unwrap_or_default().trim();
    let calls = message.extra.get("tool_calls").and_then(Value::as_array).filter(|calls| !calls.is_empty());
    if thoughts.is_empty() && calls.is_none() {
        return content == text.trim();
    }
    // What is left of the text behind a part, where it holds the part.
    let behind = |text: &str, part: &str| text.find(part).map(|at| text[at + part.len()..].to_owned());
    let Some(rest) = behind(text, thoughts).and_then(|rest| behind(&rest, content)) else { return false };
    let mut names = calls.into_iter().flatten().filter_map(|call| call.pointer("/function/name")?.as_str());
    let all_named = names.all(|name| text.contains(name));
    // Without calls nothing stands behind what is said; behind thoughts alone the sign that ends them may.
    let rest = rest.trim();
    let is_sign = rest.starts_with('<') && rest.ends_with('>') && !rest.contains(char::is_whitespace);
    all_named && (calls.is_some() || rest.is_empty() || (content.is_empty() && is_sign))
}

/// A few characters of both around where they part.
fn first_difference(content: &str, spelled: &str) -> String {
    let same = content.chars().zip(spelled.chars()).take_while(|(one, two)| one == two).count();
    let around = |text: &str| text.chars().skip(same.saturating_sub(10)).take(30).collect::<String>();
    format!("…{:?} and …{:?}", around(content), around(spelled))
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::super::build::tests::tiny_tokenizer;
    use super::super::marks::Marks;
    use super::*;

    const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}{% \
                          if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}";
    /// As the R1 distillations do it: the prompt opens the thoughts, and history loses them.
    const DISTILLED: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}\
                             <|im_end|>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\
                             {{ '\n' }}{% endif %}";

    /// A conversation of questions and answers, each answer as these tokens, as `regen` would have written it.
    fn talk(tokenizer: &ChatTokenizer, turns: &[(&str, Vec<u32>)]) -> Conversation {
        let mut messages: Vec<Message> = Vec::new();
        for (question, ids) in turns {
            messages.push(Message::new("user", *question));
            let prompt = tokenizer.encode(&tokenizer.render(&messages, None, true).unwrap()).unwrap();
            let stop = ids.last().is_some_and(|id| tokenizer.eos_token_ids().contains(id));
            let text = tokenizer.decode(&ids[..ids.len() - usize::from(stop)], false).unwrap();
            let marks = Marks {
                train: None,
                finish: Some(if stop { Finish::Stop } else { Finish::Length }),
                token_ids: Some(ids.clone()),
                prompt_hash: Some(prompt_hash(&prompt)),
                vocabulary_hash: Some(vocabulary_hash(tokenizer)),
            };
            messages.push(Message { marks, ..Message::new("assistant", text) });
        }
        Conversation { id: "c".to_owned(), messages, tools: None, template_arguments: Map::new() }
    }

    /// Text before and text of every trained run.
    fn runs(tokenizer: &ChatTokenizer, document: &Recorded) -> Vec<(bool, String)> {
        let runs = super::super::stats::mask_runs(&document.supervised).into_iter();
        runs.map(|(flag, range)| (flag, tokenizer.decode(&document.tokens[range], false).unwrap())).collect()
    }

    #[test]
    fn exactly_the_ids_are_trained_and_no_end_of_turn_that_was_not_said() {
        let tokenizer = tiny_tokenizer(CHATML);
        let said = |text: &str| tokenizer.encode(text).unwrap();
        // Letter by letter, as no tokenizer would split it; with a special token inside; cut off.
        let spelled: Vec<u32> = ["h", "o", " ", "h", "o", "<|im_end|>"].iter().flat_map(|text| said(text)).collect();
        assert_ne!(spelled, said("ho ho<|im_end|>"));
        for (ids, text) in [
            (spelled.clone(), "ho ho<|im_end|>"),
            (said("see <|im_start|> here<|im_end|>"), "see <|im_start|> here<|im_end|>"),
            (said("and then the"), "and then the"),
        ] {
            let documents = documents(
                &tokenizer,
                &talk(&tokenizer, &[("hi", ids.clone())]),
                Supervise::Assistant,
                &Mask::default(),
            )
            .unwrap();
            assert_eq!(documents.len(), 1);
            let trained = &documents[0].tokens[documents[0].tokens.len() - ids.len()..];
            assert_eq!(trained, ids);
            let want =
                [(false, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n".into()), (true, text.to_owned())];
            assert_eq!(runs(&tokenizer, &documents[0]), want);
        }
        // The text of the first answer splits otherwise than it was said: what comes next was said behind the text.
        let two = talk(&tokenizer, &[("hi", spelled), ("hu", said("ha<|im_end|>"))]);
        let found = documents(&tokenizer, &two, Supervise::Assistant, &Mask::default()).unwrap();
        assert_eq!(found.iter().map(|document| document.turn).collect::<Vec<_>>(), [1, 2]);
        assert!(runs(&tokenizer, &found[1])[0].1.contains("ho ho<|im_end|>"));
    }

    #[test]
    fn turns_share_a_document_where_each_prompt_goes_on_from_the_answer_before() {
        let tokenizer = tiny_tokenizer(CHATML);
        let said = |text: &str| tokenizer.encode(text).unwrap();
        let turns = [("hi", said("ho<|im_end|>")), ("hu", said("cut")), ("he", said("ha<|im_end|>"))];
        let talk = talk(&tokenizer, &turns);
        let found = documents(&tokenizer, &talk, Supervise::Assistant, &Mask::default()).unwrap();
        assert_eq!(found.len(), 1);
        let trained = |document: &Recorded| -> Vec<String> {
            runs(&tokenizer, document).into_iter().filter(|(flag, _)| *flag).map(|(_, text)| text).collect()
        };
        assert_eq!(trained(&found[0]), ["ho<|im_end|>", "cut", "ha<|im_end|>"]);
        let last = documents(&tokenizer, &talk, Supervise::LastTurn, &Mask::default()).unwrap();
        assert_eq!((last.len(), trained(&last[0])), (1, vec!["ha<|im_end|>".to_owned()]));
        let mut marked = talk.clone();
        marked.messages[1].marks.train = Some(false);
        assert_eq!(
            trained(&documents(&tokenizer, &marked, Supervise::Assistant, &Mask::default()).unwrap()[0]),
            ["cut", "ha<|im_end|>"]
        );
        let all = documents(&tokenizer, &talk, Supervise::All, &Mask::default()).unwrap();
        assert!(all[0].supervised.iter().all(|&flag| flag == 1));
    }

    #[test]
    fn a_template_that_drops_thoughts_gives_one_document_a_turn() {
        let tokenizer = tiny_tokenizer(DISTILLED);
        let said = |text: &str| tokenizer.encode(text).unwrap();
        let turns = [("hi", said("hm</think>ho<|im_end|>")), ("hu", said("hm, well</think>ha<|im_end|>"))];
        let found = documents(&tokenizer, &talk(&tokenizer, &turns), Supervise::Assistant, &Mask::default()).unwrap();
        let texts: Vec<_> = found.iter().map(|document| runs(&tokenizer, document)).collect();
        assert_eq!(texts[0][1].1, "hm</think>ho<|im_end|>");
        assert!(texts[0][0].1.ends_with("<think>\n") && texts[1][0].1.contains("assistant\nho<|im_end|>"), "{texts:?}");
        assert_eq!((texts[1].len(), texts[1][1].1.as_str()), (2, "hm, well</think>ha<|im_end|>"));
    }

    #[test]
    fn parts_of_an_answer_in_ids_are_left_out_to_the_token() {
        let tokenizer = tiny_tokenizer(CHATML);
        // Letter by letter, the four bytes of a smiling face among them.
        let spelled = |text: &str| -> Vec<u32> {
            let letters = text.split_inclusive(|_: char| true).flat_map(|letter| tokenizer.encode(letter).unwrap());
            letters.chain(tokenizer.encode("<|im_end|>").unwrap()).collect()
        };
        let choice = |reasoning, tool_calls| Mask { reasoning, tool_calls, ..Mask::default() };
        let trained = |text: &str, mask: &Mask| -> Vec<String> {
            let talk = talk(&tokenizer, &[("hi", spelled(text))]);
            let documents = documents(&tokenizer, &talk, Supervise::Assistant, mask).unwrap();
            let runs = runs(&tokenizer, &documents[0]).into_iter();
            runs.filter(|(flag, _)| *flag).map(|(_, text)| text).collect()
        };
        let said = "<think>\nhm 😀\n</think>\n\n😀 ho\n<tool_call>{}</tool_call>";
        assert_eq!(trained(said, &choice(true, true)), [format!("{said}<|im_end|>")]);
        assert_eq!(trained(said, &choice(false, true)), ["😀 ho\n<tool_call>{}</tool_call><|im_end|>"]);
        assert_eq!(trained(said, &choice(true, false)), ["<think>\nhm 😀\n</think>\n\n😀 ho"]);
        assert_eq!(trained(said, &choice(false, false)), ["😀 ho"]);
        assert_eq!(trained("ho", &choice(false, false)), ["ho<|im_end|>"]);
        // A prompt that opens the thought.
        let tokenizer = tiny_tokenizer(DISTILLED);
        let said = tokenizer.encode("hm</think>ho<|im_end|>").unwrap();
        let found =
            documents(&tokenizer, &talk(&tokenizer, &[("hi", said)]), Supervise::Assistant, &choice(false, true));
        assert_eq!(runs(&tokenizer, &found.unwrap()[0]).last().unwrap(), &(true, "ho<|im_end|>".to_owned()));
        // Others cannot be trained beside ids.
        let talk = talk(&tokenizer, &[("hi", tokenizer.encode("a</think>ho<|im_end|>").unwrap())]);
        let users = Mask { roles: vec![super::super::Role::Assistant, super::super::Role::User], ..Mask::default() };
        let message = documents(&tokenizer, &talk, Supervise::Assistant, &users).unwrap_err().to_string();
        assert!(message.contains("message 1 (user)") && message.contains("data.mask.roles"), "{message}");
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let tokenizer = tiny_tokenizer(CHATML);
        let said = |text: &str| tokenizer.encode(text).unwrap();
        let good = talk(&tokenizer, &[("hi", said("ho<|im_end|>")), ("hu", said("ha<|im_end|>"))]);
        let refused = |spoil: &dyn Fn(&mut Conversation), reason: &str| {
            let mut spoilt = good.clone();
            spoil(&mut spoilt);
            let message =
                documents(&tokenizer, &spoilt, Supervise::Assistant, &Mask::default()).unwrap_err().to_string();
            assert!(message.contains(reason), "{message}");
        };
        refused(&|talk| talk.messages[1].content = Some("hoho".to_owned()), "message 2: `content` is not what");
        let of_server = |thoughts: &str, content: &str| {
            let mut parts = good.clone();
            parts.messages[1].content = Some(content.to_owned());
            parts.messages[1].extra.insert("reasoning_content".to_owned(), thoughts.into());
            // The template of this test shows no thoughts: the prompts behind are other ones.
            parts.messages.truncate(2);
            documents(&tokenizer, &parts, Supervise::Assistant, &Mask::default()).map_err(|error| error.to_string())
        };
        assert!(of_server("h", "o").is_ok() && of_server("ho", "").is_ok());
        for (thoughts, content) in [("o", "h"), ("h", "a"), ("x", "o"), ("", "h")] {
            let problem = of_server(thoughts, content).unwrap_err();
            assert!(problem.contains("message 2: `content` is not what"), "{thoughts}|{content}: {problem}");
        }
        refused(&|talk| talk.messages[0].content = Some("HI".to_owned()), "message 2: the prompt is not the one");
        refused(&|talk| talk.messages[3].marks.token_ids = None, "message 4: has no `token_ids`, and other answers");
        refused(&|talk| talk.messages[3].marks.token_ids = Some(vec![1 << 30]), "names token 1073741824");
        refused(&|talk| talk.messages[3].marks.token_ids = Some(said("ha")), "`finish` says stop, but");
        let other = tiny_tokenizer(&CHATML.replace("<|im_start|>{{ m.role }}", "{{ m.role }}:"));
        let message = documents(&other, &good, Supervise::Assistant, &Mask::default()).unwrap_err().to_string();
        assert!(message.contains("the prompt is not the one that `token_ids` were generated from"), "{message}");
        // A record of somebody else's engine: no prompt hash, no finish.
        let record = json!({"messages": [{"role": "user", "content": "hi"},
            {"role": "assistant", "content": "ho", "token_ids": said("ho<|im_end|>")}]});
        let sample = super::super::conversation::parse_sample(record.to_string().as_bytes(), String::new).unwrap();
        let super::super::Sample::Conversation(foreign) = sample else { panic!("a conversation") };
        assert_eq!(documents(&tokenizer, &foreign, Supervise::Assistant, &Mask::default()).unwrap().len(), 1);
    }
}
