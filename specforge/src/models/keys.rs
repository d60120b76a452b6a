//! Reads the keys of a config.json and notes which were read: what nobody asked for is told to the user.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::Value;

/// Keys that many configurations have and that no number of a forward pass depends on.
const HARMLESS: [&str; 51] = [
    "_attn_implementation_autoset",
    "_name_or_path",
    "_sliding_window_pattern",
    "add_cross_attention",
    "architectures",
    "attention_dropout",
    "auto_map",
    "begin_suppress_tokens",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "do_sample",
    "dtype",
    "embd_pdrop",
    "eos_token_id",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "keys_to_ignore_at_inference",
    "label2id",
    "max_length",
    "max_new_tokens",
    "model_type",
    "num_beams",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "quantization_config",
    "repetition_penalty",
    "resid_pdrop",
    "return_dict",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "task_specific_params",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
];

/// The keys of a configuration. A key that is `null` says that there is nothing; one that is absent says nothing.
#[derive(Debug)]
pub struct Keys<'a> {
    values: &'a Value,
    read: RefCell<BTreeSet<String>>,
    strange: RefCell<Vec<String>>,
}

impl<'a> Keys<'a> {
    /// The keys of these values; none has been read.
    pub fn new(values: &'a Value) -> Self {
        Self { values, read: RefCell::default(), strange: RefCell::default() }
    }

    /// All values.
    pub fn values(&self) -> &'a Value {
        self.values
    }

    /// Notes keys as read.
    pub fn know<'k>(&self, keys: impl IntoIterator<Item = &'k str>) {
        self.read.borrow_mut().extend(keys.into_iter().map(str::to_owned));
    }

    /// Notes something that was not understood.
    pub fn wonder(&self, key: String) {
        self.strange.borrow_mut().push(key);
    }

    /// What nobody read or understood, with its place; what no number depends on is left out.
    pub fn strange(&self) -> Vec<String> {
        let read = self.read.borrow();
        let is_strange = |key: &&String| !read.contains(*key) && !HARMLESS.contains(&key.as_str());
        let keys = self.values.as_object().into_iter().flat_map(serde_json::Map::keys).filter(is_strange);
        keys.cloned().chain(self.strange.borrow().iter().cloned()).collect()
    }

    /// A value, whatever it is; `None` where the key is absent.
    pub fn any(&self, key: &str) -> Option<&'a Value> {
        self.know([key]);
        self.values.get(key)
    }

    /// A value that is there and not `null`.
    pub fn filled(&self, key: &str) -> Option<&'a Value> {
        self.any(key).filter(|value| !value.is_null())
    }

    /// A whole number that must be there.
    pub fn whole(&self, key: &str) -> Result<i64, String> {
        self.filled(key).map_or_else(|| Err(format!("missing field `{key}`")), |value| whole(key, value))
    }

    /// A whole number; another where the key is absent or `null`.
    pub fn whole_or(&self, key: &str, otherwise: i64) -> Result<i64, String> {
        self.filled(key).map_or(Ok(otherwise), |value| whole(key, value))
    }

    /// A whole number or nothing; `absent` where the key is absent, nothing where it is `null`.
    pub fn maybe_whole(&self, key: &str, absent: Option<i64>) -> Result<Option<i64>, String> {
        match self.any(key) {
            None => Ok(absent),
            Some(Value::Null) => Ok(None),
            Some(value) => whole(key, value).map(Some),
        }
    }

    /// A number; another where the key is absent or `null`.
    pub fn number_or(&self, key: &str, otherwise: f64) -> Result<f64, String> {
        self.filled(key).map_or(Ok(otherwise), |value| number(key, value))
    }

    /// A number or nothing; `absent` where the key is absent, nothing where it is `null`.
    pub fn maybe_number(&self, key: &str, absent: Option<f64>) -> Result<Option<f64>, String> {
        match self.any(key) {
            None => Ok(absent),
            Some(Value::Null) => Ok(None),
            Some(value) => number(key, value).map(Some),
        }
    }

    /// A number above 0; another where the key is absent or `null`.
    pub fn positive_or(&self, key: &str, otherwise: f64) -> Result<f64, String> {
        let value = self.number_or(key, otherwise)?;
        positive(key, value)
    }

    /// Yes or no; another where the key is absent or `null`.
    pub fn flag_or(&self, key: &str, otherwise: bool) -> Result<bool, String> {
        match self.filled(key) {
            None => Ok(otherwise),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(format!("`{key}`: expected true or false, got {value}")),
        }
    }

    /// A word; another where the key is absent or `null`.
    pub fn word_or(&self, key: &str, otherwise: &'a str) -> Result<&'a str, String> {
        match self.filled(key) {
            None => Ok(otherwise),
            Some(Value::String(word)) => Ok(word),
            Some(value) => Err(format!("`{key}`: expected a word, got {value}")),
        }
    }

    /// A list of whole numbers; `None` where the key is absent or `null`.
    pub fn whole_list(&self, key: &str) -> Result<Option<Vec<i64>>, String> {
        let Some(value) = self.filled(key) else { return Ok(None) };
        let list = value.as_array().ok_or_else(|| format!("`{key}`: expected a list of whole numbers, got {value}"))?;
        list.iter().map(|value| whole(key, value)).collect::<Result<_, _>>().map(Some)
    }

    /// Refuses a key that must be absent, `null`, `false` or one value: it would change what is computed.
    pub fn only(&self, key: &str, allowed: &Value) -> Result<(), String> {
        match self.filled(key) {
            None | Some(Value::Bool(false)) => Ok(()),
            Some(value) if value == allowed => Ok(()),
            Some(value) => Err(format!("`{key}`: only {allowed} is supported, got {value}")),
        }
    }
}

/// Refuses what is not above 0.
pub fn positive(key: &str, value: f64) -> Result<f64, String> {
    match value > 0.0 && value.is_finite() {
        true => Ok(value),
        false => Err(format!("`{key}`: expected a number above 0, got {value}")),
    }
}

fn whole(key: &str, value: &Value) -> Result<i64, String> {
    value.as_i64().ok_or_else(|| format!("`{key}`: expected a whole number, got {value}"))
}

fn number(key: &str, value: &Value) -> Result<f64, String> {
    value.as_f64().ok_or_else(|| format!("`{key}`: expected a number, got {value}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn absent_and_null_are_two_things() {
        let values = json!({"a": null, "b": 3, "c": 0.5, "d": "x"});
        let keys = Keys::new(&values);
        assert_eq!(keys.maybe_whole("a", Some(7)), Ok(None));
        assert_eq!(keys.maybe_whole("z", Some(7)), Ok(Some(7)));
        assert_eq!((keys.whole("b"), keys.whole_or("a", 2)), (Ok(3), Ok(2)));
        assert_eq!((keys.number_or("c", 1.0), keys.number_or("b", 1.0)), (Ok(0.5), Ok(3.0)));
        assert_eq!(keys.whole("a"), Err("missing field `a`".to_owned()));
        assert!(keys.whole("c").unwrap_err().contains("`c`: expected a whole number"));
        assert!(keys.flag_or("d", false).is_err() && keys.number_or("d", 0.0).is_err());
        assert!(keys.positive_or("z", -1.0).is_err() && keys.whole_list("b").is_err());
        assert!(keys.only("d", &json!("x")).is_ok() && keys.only("d", &json!("y")).is_err());
    }

    #[test]
    fn what_nobody_read_is_strange() {
        let values = json!({"hidden_size": 3, "architectures": [], "clip_qkv": 2.0, "known": 1});
        let keys = Keys::new(&values);
        let _ = keys.whole("hidden_size");
        keys.know(["known"]);
        keys.wonder("rope_scaling.odd".to_owned());
        assert_eq!(keys.strange(), ["clip_qkv", "rope_scaling.odd"]);
    }
}
