//! Whether the target's chat template renders, and is the one of the training: a draft that learned answers behind one
//! header guesses badly behind another.

use super::case::Case;
use super::finding::Findings;
use super::folder::words;
use crate::checkpoint::inputs;
use crate::data::{ChatTokenizer, Message};
use crate::error::Result;

/// See the file's own words.
pub fn look(case: &Case<'_>, found: &mut Findings) -> Result<()> {
    // A tokenizer that cannot be read is another check's business.
    let Ok(tokenizer) = &case.target.tokenizer else { return Ok(()) };
    let Some(own) = &tokenizer.parts().template else {
        found.warning("the target has no chat template", "prompts must be formatted as the training data was");
        return Ok(());
    };
    match rendered(tokenizer) {
        Ok(0) => found.fault("the target's chat template renders to nothing", "restore the target's template"),
        Ok(tokens) => found.ok(format!("renders a question to {tokens} tokens")),
        Err(problem) => {
            found.fault(
                format!("the target's chat template does not render a question: {problem}"),
                "restore the target's template",
            );
        }
    }
    let then = case.origin.as_ref().and_then(|origin| origin.inputs.get(inputs::TEMPLATE.name));
    if then.is_some_and(|then| then != own) {
        found.fault(
            "the target's chat template is another than the one the draft was trained behind",
            "serve with the template of the training (thinking or not is part of it), or train the draft again",
        );
    }
    let beside = ChatTokenizer::load(&case.folder.path, None).ok().and_then(|other| other.parts().template.clone());
    if beside.is_some_and(|beside| beside != *own) {
        found.fault(
            "the chat template beside the draft is another than the target's",
            "train and serve with one template",
        );
    }
    Ok(())
}

/// Tokens of a question, ready to be answered.
fn rendered(tokenizer: &ChatTokenizer) -> Result<usize, String> {
    let question = [Message::new("user", "How are you?")];
    let text = tokenizer.render(&question, None, true).map_err(|error| words(&error))?;
    tokenizer.encode(&text).map(|ids| ids.len()).map_err(|error| words(&error))
}
