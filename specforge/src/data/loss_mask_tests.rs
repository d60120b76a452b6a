//! Spans and masks over small templates.

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
fn trained(template: &str, conversation: &Conversation, supervise: Supervise) -> Result<(Vec<Vec<String>>, Method)> {
    let tokenizer = tiny_tokenizer(template);
    let (documents, method) = render_supervised(&tokenizer, conversation, supervise, &Mask::default())?;
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
    let message = trained(strict, &talk(&[("system", "s"), ("user", "u"), ("assistant", "a")]), Supervise::Assistant);
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
        talk(&[("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]),
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
                assert_eq!(spans, boundary_spans(&prepared, &conversation.messages, &turns, (count, &text)), "{text}");
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
    assert!(message.contains("the chat template rewrites it") && message.contains("--template-arguments"), "{message}");
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
