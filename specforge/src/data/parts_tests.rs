//! Chosen roles and parts over the templates of tests/data, with the trained texts written out by hand.

use serde_json::{Value, json};

use super::super::Supervise;
use super::super::build::tests::{TINY, tiny_tokenizer};
use super::super::conversation::{Sample, parse_sample};
use super::super::loss_mask::{Method, render_supervised, token_mask};
use super::super::mask::Role;
use super::super::stats::mask_runs;
use super::*;

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
                      {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// The template of a golden file.
fn golden(name: &str) -> ChatTokenizer {
    let text = std::fs::read_to_string(TINY.join(format!("{name}.json"))).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    tiny_tokenizer(golden["template"].as_str().unwrap())
}

fn conversation(messages: Value) -> Conversation {
    let record = json!({"messages": messages}).to_string();
    match parse_sample(record.as_bytes(), || "c".to_owned()).unwrap() {
        Sample::Conversation(conversation) => conversation,
        other => panic!("{other:?}"),
    }
}

fn choice(roles: &[Role], reasoning: bool, tool_calls: bool) -> Mask {
    Mask { roles: roles.to_vec(), reasoning, tool_calls }
}

const WITHOUT_THOUGHTS: (bool, bool) = (false, true);
const WITHOUT_CALLS: (bool, bool) = (true, false);
const WORDS: (bool, bool) = (false, false);

/// The trained runs of each document, as text.
fn trained(
    tokenizer: &ChatTokenizer,
    messages: Value,
    supervise: Supervise,
    mask: &Mask,
) -> Result<(Vec<Vec<String>>, Method), String> {
    let conversation = conversation(messages);
    let found = render_supervised(tokenizer, &conversation, supervise, mask).map_err(|error| error.to_string())?;
    let mut all = Vec::new();
    for document in found.0 {
        let encoded = tokenizer.encode_with_offsets(&document.text).unwrap();
        let mask = token_mask(tokenizer, &document.text, &encoded, &document.spans);
        let runs = mask_runs(&mask).into_iter().filter(|(flag, _)| *flag);
        all.push(runs.map(|(_, range)| tokenizer.decode(&encoded.ids[range], false).unwrap()).collect());
    }
    Ok((all, found.1))
}

/// What an assistant alone is trained on.
fn parts(tokenizer: &ChatTokenizer, messages: Value, (reasoning, calls): (bool, bool)) -> Vec<Vec<String>> {
    trained(tokenizer, messages, Supervise::Assistant, &choice(&[Role::Assistant], reasoning, calls)).unwrap().0
}

fn refused(tokenizer: &ChatTokenizer, messages: Value, (reasoning, calls): (bool, bool)) -> String {
    trained(tokenizer, messages, Supervise::Assistant, &choice(&[Role::Assistant], reasoning, calls)).unwrap_err()
}

fn weather() -> Value {
    let call =
        json!([{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}}]);
    json!([
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "content": "Let me look.", "reasoning_content": "Paris, then.", "tool_calls": call},
        {"role": "tool", "content": "18 degrees"},
        {"role": "assistant", "content": "It is 18 degrees.", "reasoning_content": "18 it is."},
    ])
}

#[test]
fn thoughts_and_calls_are_left_out_with_the_signs_around_them() {
    let tokenizer = golden("thinking_tools");
    let call = "\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\", \"days\": 2}}\n</tool_call><|im_end|>";
    let whole = [
        format!("<think>\nParis, then.\n</think>\n\nLet me look.{call}"),
        "<think>\n18 it is.\n</think>\n\nIt is 18 degrees.<|im_end|>".to_owned(),
    ];
    assert_eq!(parts(&tokenizer, weather(), (true, true)), std::slice::from_ref(&whole));
    let unthinking = [format!("Let me look.{call}"), "It is 18 degrees.<|im_end|>".to_owned()];
    assert_eq!(parts(&tokenizer, weather(), WITHOUT_THOUGHTS), [unthinking]);
    let thought = "<think>\nParis, then.\n</think>\n\nLet me look.".to_owned();
    assert_eq!(parts(&tokenizer, weather(), WITHOUT_CALLS), [[thought, whole[1].clone()]]);
    assert_eq!(parts(&tokenizer, weather(), WORDS), [["Let me look.", "It is 18 degrees.<|im_end|>"]]);
    // Nothing but a call, behind a thought or none.
    let mut silent = weather();
    silent[1]["content"] = json!("");
    assert_eq!(parts(&tokenizer, silent.clone(), WORDS), [["It is 18 degrees.<|im_end|>"]]);
    assert_eq!(parts(&tokenizer, silent.clone(), WITHOUT_THOUGHTS)[0][0], call[1..]);
    // White space behind a thought goes with it.
    assert_eq!(parts(&tokenizer, silent, WITHOUT_CALLS)[0][0], "<think>\nParis, then.\n</think>\n\n\n");
}

#[test]
fn thoughts_in_the_words_are_thoughts_and_so_are_empty_ones() {
    let tokenizer = golden("thinking");
    let said = |first: &str, second: &str| {
        json!([{"role": "user", "content": "add 1 and 2"}, {"role": "assistant", "content": first},
               {"role": "user", "content": "and 3?"}, {"role": "assistant", "content": second}])
    };
    // The history is rewritten: a document for each turn. The last has an empty thought of the template's own.
    let messages = said("<think>\none and two\n</think>\n\nIt is 3.", "It is 6.");
    let whole = parts(&tokenizer, messages.clone(), (true, true));
    assert_eq!(
        whole,
        [["<think>\none and two\n</think>\n\nIt is 3.<|im_end|>"], ["<think>\n\n</think>\n\nIt is 6.<|im_end|>"]]
    );
    assert_eq!(parts(&tokenizer, messages, WITHOUT_THOUGHTS), [["It is 3.<|im_end|>"], ["It is 6.<|im_end|>"]]);
    // A thought that the words only close, as R1 says it: the template writes what opens it.
    let messages = said("one and two\n</think>\n\nIt is 3.", "It is 6.");
    assert_eq!(parts(&tokenizer, messages, WITHOUT_THOUGHTS), [["It is 3.<|im_end|>"], ["It is 6.<|im_end|>"]]);
    // A template that leaves content as it is. The same words stand in thought and answer.
    let chatml = tiny_tokenizer(CHATML);
    let messages = said("<think>It is 3.</think>It is 3.", "<think>\nhm\n</think>\n");
    assert_eq!(parts(&chatml, messages, WITHOUT_THOUGHTS), [["It is 3.<|im_end|>", "<|im_end|>"]]);
}

#[test]
fn behind_a_prompt_that_opens_a_thought_the_answer_alone_is_left() {
    let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>' }}\
                    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}";
    let tokenizer = tiny_tokenizer(template);
    let messages = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hm\n</think>\n\nho"},
        {"role": "user", "content": "hu"}, {"role": "assistant", "content": "<think>\nha\n</think>\n\nhe"}]);
    let whole = parts(&tokenizer, messages.clone(), (true, true));
    assert_eq!(whole, [["hm\n</think>\n\nho<|im_end|>"], ["ha\n</think>\n\nhe<|im_end|>"]]);
    assert_eq!(parts(&tokenizer, messages.clone(), WITHOUT_THOUGHTS), [["ho<|im_end|>"], ["he<|im_end|>"]]);
    let both = choice(&[Role::User, Role::Assistant], false, true);
    let (runs, _) = trained(&tokenizer, messages, Supervise::Assistant, &both).unwrap();
    assert_eq!(runs, [["hi", "ho<|im_end|>"], ["hu", "he<|im_end|>"]]);
}

#[test]
fn generation_blocks_are_cut_too() {
    let tokenizer = golden("marked");
    let messages = json!([{"role": "user", "content": "add 1 and 2"}, {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": "and 3?"},
        {"role": "assistant", "content": "It is 6.", "reasoning_content": "three more"}]);
    let run = |roles: &[Role], reasoning: bool| {
        trained(&tokenizer, messages.clone(), Supervise::Assistant, &choice(roles, reasoning, true)).unwrap()
    };
    let assistant = [Role::Assistant];
    let whole =
        vec![vec!["It is 3.<|im_end|>".to_owned(), "<think>\nthree more\n</think>\nIt is 6.<|im_end|>".to_owned()]];
    assert_eq!(run(&assistant, true), (whole, Method::GenerationBlocks));
    let words = vec![vec!["It is 3.<|im_end|>".to_owned(), "It is 6.<|im_end|>".to_owned()]];
    assert_eq!(run(&assistant, false), (words, Method::GenerationBlocks));
    let (runs, method) = run(&[Role::User, Role::Assistant], false);
    assert_eq!(runs, [["add 1 and 2", "It is 3.<|im_end|>", "and 3?", "It is 6.<|im_end|>"]]);
    assert_eq!(method, Method::GenerationBlocks);
}

#[test]
fn thoughts_in_a_channel_of_their_own() {
    let harmony = "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|start|>assistant' }}{% if m.thinking %}\
                   {{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}{% endif %}\
                   {{ '<|channel|>final<|message|>' + m.content + '<|im_end|>' }}{% else %}\
                   {{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}\
                   {% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}";
    let tokenizer = tiny_tokenizer(harmony);
    let messages = json!([{"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho", "thinking": "hm"}, {"role": "user", "content": "hu"},
        {"role": "assistant", "content": "ha"}]);
    let last = "<|channel|>final<|message|>ha<|im_end|>";
    let first = "<|start|>assistant<|channel|>final<|message|>ho<|im_end|>";
    assert_eq!(parts(&tokenizer, messages, WITHOUT_THOUGHTS), [[first, last]]);
}

#[test]
fn calls_that_are_spelled_out_in_the_words() {
    let tokenizer = tiny_tokenizer(CHATML);
    let said = |content: &str| json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}]);
    let two = "One.\n<tool_call>\n{\"name\": \"f\"}\n</tool_call>\n<tool_call>{}</tool_call>\nTwo.";
    assert_eq!(parts(&tokenizer, said(two), WITHOUT_CALLS), [["One.", "Two.<|im_end|>"]]);
    let call = "<think>hm</think>\n\n<tool_call>{}</tool_call>";
    assert_eq!(parts(&tokenizer, said(call), WITHOUT_CALLS), [["<think>hm</think>"]]);
    assert!(parts(&tokenizer, said(call), WORDS)[0].is_empty());
    assert_eq!(parts(&tokenizer, said("[TOOL_CALLS] [{}]"), WITHOUT_THOUGHTS), [["[TOOL_CALLS] [{}]<|im_end|>"]]);
    assert!(parts(&tokenizer, said("[TOOL_CALLS] [{}]"), WITHOUT_CALLS)[0].is_empty());
}

#[test]
fn every_role_can_be_trained_and_marks_of_messages_count() {
    let tokenizer = golden("thinking");
    let mut messages = weather();
    messages.as_array_mut().unwrap().insert(0, json!({"role": "system", "content": " Be kind.\n"}));
    let run = |messages: &Value, roles: &[Role], supervise: Supervise| {
        trained(&tokenizer, messages.clone(), supervise, &choice(roles, true, true)).unwrap().0
    };
    let all = Supervise::Assistant;
    assert_eq!(run(&messages, &[Role::Tool], all), [["18 degrees"]]);
    assert_eq!(run(&messages, &[Role::System, Role::User], all), [["Be kind.", "Weather in Paris?"]]);
    let both = run(&messages, &[Role::Assistant, Role::Tool], all);
    assert_eq!((both[0].len(), both[0][1].as_str()), (3, "18 degrees"));
    assert_eq!(run(&messages, &[Role::Tool, Role::User], Supervise::LastTurn), [["18 degrees"]]);
    assert!(run(&messages, &[Role::Developer], all).is_empty());
    messages[3]["weight"] = json!(0);
    assert_eq!(run(&messages, &[Role::Tool, Role::User], all), [["Weather in Paris?"]]);
}

/// Where each turn is a document, what others say is trained in one of them, and in one behind them what comes last.
#[test]
fn what_others_say_is_trained_once() {
    let tokenizer = golden("thinking");
    let messages = json!([{"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "reasoning_content": "hm"}, {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four", "reasoning_content": "hm"}, {"role": "user", "content": "five"}]);
    let both = choice(&[Role::User, Role::Assistant], false, true);
    let (runs, method) = trained(&tokenizer, messages, Supervise::Assistant, &both).unwrap();
    assert_eq!(method, Method::FanOut);
    assert_eq!(runs, [vec!["one", "two<|im_end|>"], vec!["three", "four<|im_end|>"], vec!["five"]]);
}

#[test]
fn what_cannot_be_told_is_refused_with_its_place() {
    let chatml = tiny_tokenizer(CHATML);
    let said = |content: &str| json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}]);
    for (content, reason) in [
        ("hm</think>ho", "nothing opens"),
        ("ho <think>hm</think> ha", "amid"),
        ("<think>hm</think>ho<think>ha</think>", "again"),
        ("<think>hm</think>ho</think>", "again"),
        ("<think>hm", "does not close it"),
        ("\u{f8c0}ho", "private-use"),
    ] {
        let message = refused(&chatml, said(content), WITHOUT_THOUGHTS);
        assert!(message.contains(reason), "{content}: {message}");
        assert!(
            content.contains('\u{f8c0}') || message.contains("(message 2)") || message.starts_with("message 2 "),
            "{message}"
        );
        // Whoever trains the whole turn need not know.
        assert_eq!(parts(&chatml, said(content), (true, true)), [[format!("{content}<|im_end|>")]]);
    }
    assert!(refused(&chatml, said("<tool_call>{}"), WITHOUT_CALLS).contains("no `</tool_call>` behind it"));
    // Cut off amid a thought: all of it is thought.
    let mut cut = said("<think>hm");
    cut[1]["finish"] = json!("length");
    assert!(parts(&chatml, cut, WITHOUT_THOUGHTS)[0].is_empty());
    // A template that looks at what is marked, one that says it twice, and one that leaves out the name of a call.
    let prompt = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let template = |body: &str| tiny_tokenizer(&format!("{{% for m in messages %}}{body}{{% endfor %}}{prompt}"));
    let counting = template("{{ '<|im_start|>' + m.role + '\n' + m.content ~ m.content | length ~ '<|im_end|>' }}");
    assert!(refused(&counting, said("ho"), WITHOUT_THOUGHTS).contains("writes it otherwise when its parts are marked"));
    let twice = template("{{ '<|im_start|>' + m.role + '\n' + m.content + m.content + '<|im_end|>' }}");
    assert!(refused(&twice, said("ho"), WITHOUT_THOUGHTS).contains("writes a part of it twice"));
    let nameless = template("{{ '<|im_start|>' + m.role + '\n' + m.content ~ m.tool_calls | length ~ '<|im_end|>' }}");
    let mut call = said("ho");
    call[1]["tool_calls"] = json!([{"name": "f", "arguments": {}}]);
    assert!(refused(&nameless, call, WITHOUT_CALLS).contains("the names of the tools it calls do not stand"));
    let mute = template("{{ '<|im_start|>' + m.role + '\n' }}{{ m.content if m.role != 'tool' }}{{ '<|im_end|>' }}");
    let tool = json!([{"role": "user", "content": "hi"}, {"role": "tool", "content": "1"}]);
    let message = trained(&mute, tool, Supervise::Assistant, &choice(&[Role::Tool], true, true)).unwrap_err();
    assert_eq!(message, "message 2 (tool): what it says does not stand in the rendered text");
}
