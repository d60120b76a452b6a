//! A chat template, and what it makes of a conversation with thoughts and tools.
#![no_main]

use std::path::Path;

use specforge::data::ChatTokenizer;
use specforge::data::conversation::{Sample, parse_sample};
use specforge::error::Result;

const CONVERSATION: &[u8] = br#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a", "reasoning_content": "r", "tool_calls": [{"type": "function", "function":
    {"name": "f", "arguments": "{\\"x\\": [1, 2.5, null, true]}"}}]}, {"role": "tool", "content": "t", "name": "f"},
    {"role": "user", "content": "v"}, {"role": "assistant", "content": "b"}], "tools": [{"type": "function"}]}"#;

fn read() -> Result<()> {
    let template = Path::new("template.jinja");
    let tokenizer = ChatTokenizer::load(Path::new("model"), Some(template))?;
    let Ok(Sample::Conversation(conversation)) = parse_sample(CONVERSATION, || "c".to_owned()) else { return Ok(()) };
    let prepared = tokenizer.prepare(&conversation.messages, conversation.tools.as_ref())?;
    for count in 1..=conversation.messages.len() {
        prepared.render(count, count % 2 == 0)?;
    }
    prepared.render_marked(conversation.messages.len())?;
    tokenizer.encode(&prepared.render(conversation.messages.len(), true)?).map(drop)
}

specforge_fuzz::target!(&["template.jinja"], read);
