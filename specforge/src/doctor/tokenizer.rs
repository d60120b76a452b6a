//! Whether the draft was trained on the tokens that the target reads.

use super::case::Case;
use super::finding::Findings;
use super::folder::words;
use crate::checkpoint::inputs;
use crate::data::ChatTokenizer;
use crate::error::Result;

/// See the file's own words.
pub fn look(case: &Case<'_>, found: &mut Findings) -> Result<()> {
    let tokenizer = match &case.target.tokenizer {
        Ok(tokenizer) => tokenizer,
        Err(problem) => {
            found.fault(format!("the target's tokenizer cannot be read: {problem}"), "fetch the target's files again");
            return Ok(());
        }
    };
    let (tokens, rows) = (tokenizer.vocab_size() as i64, case.target.model.info().vocab_size);
    if tokens > rows {
        found.fault(
            format!("the target's tokenizer has {tokens} tokens, its embedding {rows} rows"),
            "use the tokenizer that the model was published with",
        );
    }
    let beside = case.folder.path.join("tokenizer.json");
    if beside.is_file() {
        match ChatTokenizer::load(&case.folder.path, None) {
            Ok(own) if own.vocabulary_hash() == tokenizer.vocabulary_hash() => {
                found.ok("the draft's copy is the target's")
            }
            Ok(_) => found.fault(
                "the tokenizer.json beside the draft is another than the target's: its ids mean other tokens",
                "train the draft on the target's tokenizer; if the copy alone is wrong, remove it",
            ),
            Err(error) => found.warning(
                format!("the tokenizer.json beside the draft cannot be read: {}", words(&error)),
                "remove it: engines read the target's",
            ),
        }
    }
    let trained = case.origin.as_ref().map(|origin| &origin.inputs);
    let then = |input: inputs::Input| trained.and_then(|inputs| inputs.get(input.name));
    match then(inputs::TOKENIZER) {
        Some(then) if *then == tokenizer.parts().tokenizer => found.ok("tokenizer.json is the one it was trained on"),
        Some(_) => found.fault(
            "the target's tokenizer.json is another than the one the draft was trained on",
            "serve the draft beside the files it was trained on, or train it again on these",
        ),
        None => {}
    }
    if then(inputs::SPECIAL_TOKENS).is_some_and(|then| *then != tokenizer.parts().special_tokens) {
        found.fault(
            format!(
                "special tokens or ends of turns are others than in training; they are {:?} now",
                tokenizer.eos_token_ids()
            ),
            "restore the target's tokenizer_config.json and generation_config.json",
        );
    }
    if found.is_sound() && then(inputs::TOKENIZER).is_none() {
        found.ok(format!("{tokens} tokens; nothing says which tokenizer the draft was trained on"));
    }
    Ok(())
}
