//! What a run reads, named by content: a run goes on with what it began with, wherever that lies by now.

use std::collections::BTreeMap;

use super::manifest::Checkpoint;
use crate::error::{Error, Result};

/// Digests of what a run reads, by the names below. What a run does without has no entry.
pub type Inputs = BTreeMap<String, String>;

/// One thing that a run reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Input {
    /// What messages and manifests call it.
    pub name: &'static str,
    /// The configuration keys that say where it lies.
    pub keys: &'static str,
}

/// tokenizer.json of the target.
pub const TOKENIZER: Input = Input { name: "tokenizer", keys: "target.path" };
/// Text of the chat template.
pub const TEMPLATE: Input = Input { name: "chat template", keys: "target.path or data.chat_template" };
/// Special tokens and the tokens that end a turn.
pub const SPECIAL_TOKENS: Input = Input { name: "special tokens", keys: "target.path" };
/// Tokens and masks of the training files, in order.
pub const DATA: Input = Input { name: "data", keys: "data.train" };
/// The same of files that are held out.
pub const HELD_OUT: Input = Input { name: "held-out data", keys: "data.eval" };
/// Which tokens the draft can name.
pub const VOCABULARY: Input = Input { name: "vocabulary map", keys: "draft.vocab_map" };
/// The draft that the run started from.
pub const STARTING_DRAFT: Input = Input { name: "starting draft", keys: "draft.init_from" };
/// config.json of the target.
pub const TARGET_CONFIG: Input = Input { name: "target's config.json", keys: "target.path" };
/// Every number of the target.
pub const TARGET_WEIGHTS: Input = Input { name: "target's weights", keys: "target.path" };
/// Where the target's hidden states come from.
pub const HIDDEN_STATES: Input = Input { name: "hidden states", keys: "target.path or target.feature_store" };

/// [`HIDDEN_STATES`] of a target that runs in the loop.
pub const COMPUTED: &str = "computed by the target";
/// How [`HIDDEN_STATES`] of a store begin that holds them to the bit.
const EXACT: &str = "stored exactly, ";

/// [`HIDDEN_STATES`] of a store. `exact` where they are the very bits that the target would compute.
pub fn stored(exact: bool, digest: &str) -> String {
    if exact { format!("{EXACT}{digest}") } else { format!("stored, {digest}") }
}

/// Whether two entries mean the same. Exact states are the computed ones.
fn same(then: Option<&String>, now: Option<&String>) -> bool {
    let swapped = |one: Option<&String>, other: Option<&String>| {
        one.is_some_and(|text| text == COMPUTED) && other.is_some_and(|text| text.starts_with(EXACT))
    };
    then == now || swapped(then, now) || swapped(now, then)
}

/// Digits of a digest that a message shows.
const SHOWN: usize = 16;

fn brief(text: Option<&String>) -> String {
    let is_digest = |word: &str| word.len() > SHOWN && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    let shorten = |word: &str| if is_digest(word) { word[..SHOWN].to_owned() } else { word.to_owned() };
    text.map_or("nothing".to_owned(), |text| text.split(' ').map(shorten).collect::<Vec<_>>().join(" "))
}

impl Checkpoint {
    /// Whether it says what the run read. Those of older versions name the data alone.
    pub fn names_inputs(&self) -> bool {
        !self.manifest.inputs.is_empty()
    }

    /// Refuses a resumed run that reads something else than before. Only these inputs are looked at; the others may not be
    /// known yet.
    pub fn same_inputs(&self, now: &Inputs, which: &[Input]) -> Result<()> {
        let then = &self.manifest.inputs;
        if !self.names_inputs() {
            return Ok(());
        }
        let pair = |input: &Input| (then.get(input.name), now.get(input.name));
        let changed: Vec<&Input> = which
            .iter()
            .filter(|input| {
                let (then, now) = pair(input);
                !same(then, now)
            })
            .collect();
        let Some((first, others)) = changed.split_first() else {
            return Ok(());
        };
        let digests = |input: &Input| {
            let (then, now) = pair(input);
            format!("was {}, is {}", brief(then), brief(now))
        };
        let mut problem = format!("the {} changed since this checkpoint: {}", first.name, digests(first));
        others.iter().for_each(|input| problem.push_str(&format!("; the {} too: {}", input.name, digests(input))));
        let mut keys: Vec<&str> = changed.iter().map(|input| input.keys).collect();
        keys.dedup();
        let hint = format!(
            "restore the files of {}, or start a new run in another train.output_dir; a moved or renamed file is no change",
            keys.join(", ")
        );
        Err(Error::bad_file(&self.path, problem).with_hint(hint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::manifest::{MODEL_FILE, Manifest};
    use crate::weights::{WeightsFolder, write_tensors};

    fn checkpoint(inputs: Inputs) -> Checkpoint {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(MODEL_FILE);
        write_tensors(&path, &[], &[]).unwrap();
        let open = || WeightsFolder::open(&path).unwrap();
        let manifest = Manifest { inputs, ..Manifest::default() };
        Checkpoint { path: "run/step-00000004".into(), manifest, model: open(), optimizer: open() }
    }

    fn inputs(values: &[(Input, &str)]) -> Inputs {
        values.iter().map(|(input, value)| (input.name.to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn what_changed_is_named_with_both_digests() {
        let (old, new) = ("ab".repeat(32), "cd".repeat(32));
        let then = checkpoint(inputs(&[(TOKENIZER, &old), (DATA, &old), (TARGET_WEIGHTS, &old)]));
        let same = inputs(&[(TOKENIZER, &old), (DATA, &old), (TARGET_WEIGHTS, &old)]);
        then.same_inputs(&same, &[TOKENIZER, DATA, TARGET_WEIGHTS, VOCABULARY]).unwrap();
        let now = inputs(&[(TOKENIZER, &new), (DATA, &new), (TARGET_WEIGHTS, &new), (VOCABULARY, &new)]);
        let error = then.same_inputs(&now, &[TARGET_WEIGHTS]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "run/step-00000004: the target's weights changed since this checkpoint: was abababababababab, is \
             cdcdcdcdcdcdcdcd"
        );
        assert!(error.hint().unwrap().contains("restore the files of target.path, or"));
        let error = then.same_inputs(&now, &[TOKENIZER, DATA]).unwrap_err().to_string();
        assert!(error.contains("the tokenizer changed") && error.contains("the data too: was"), "{error}");
        // Something that was not there, and something that is there no more.
        let error = then.same_inputs(&now, &[VOCABULARY]).unwrap_err().to_string();
        assert!(error.contains("was nothing, is cdcd"), "{error}");
        let error = then.same_inputs(&Inputs::new(), &[DATA]).unwrap_err().to_string();
        assert!(error.contains("was abababababababab, is nothing"), "{error}");
        // A checkpoint that names nothing is compared with nothing.
        checkpoint(Inputs::new()).same_inputs(&now, &[TOKENIZER, DATA]).unwrap();
    }

    #[test]
    fn states_may_move_between_the_target_and_a_store_that_holds_them_to_the_bit() {
        let (one, two) = ("ab".repeat(32), "cd".repeat(32));
        let allowed = |then: &str, now: &str| {
            let then = checkpoint(inputs(&[(HIDDEN_STATES, then)]));
            then.same_inputs(&inputs(&[(HIDDEN_STATES, now)]), &[HIDDEN_STATES]).is_ok()
        };
        assert!(allowed(COMPUTED, &stored(true, &one)) && allowed(&stored(true, &one), COMPUTED));
        assert!(allowed(&stored(false, &one), &stored(false, &one)));
        assert!(!allowed(COMPUTED, &stored(false, &one)) && !allowed(&stored(false, &one), COMPUTED));
        assert!(!allowed(&stored(true, &one), &stored(true, &two)));
        assert!(!allowed(&stored(true, &one), &stored(false, &one)));
    }
}
