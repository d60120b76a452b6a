//! Strict reading of configuration: an unknown key is an error that proposes the nearest known one.

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Error, Result};

/// Deserialises a configuration section. `root` is the dotted key of the section, empty for a whole file.
pub fn from_value<T: DeserializeOwned>(value: &Value, root: &str) -> Result<T> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let inner = error.path().to_string();
        let key = match (root, inner.as_str()) {
            ("", path) => path.to_owned(),
            (root, ".") => root.to_owned(),
            (root, path) => format!("{root}.{path}"),
        };
        let message = error.inner().to_string();
        match unknown_field(&message) {
            Some((field, known)) => {
                // serde names the unknown field as the last part of the path.
                let problem = match nearest(field, &known) {
                    Some(near) => format!("unknown key; did you mean `{near}`?"),
                    None => "unknown key".to_owned(),
                };
                Error::config(key, problem).with_hint(format!("known keys here: {}", known.join(", ")))
            }
            None => Error::config(key, message),
        }
    })
}

/// Takes serde's message apart: "unknown field `x`, expected one of `a`, `b`".
fn unknown_field(message: &str) -> Option<(&str, Vec<&str>)> {
    let rest = message.strip_prefix("unknown field `")?;
    let (field, rest) = rest.split_once('`')?;
    let known = rest.split('`').skip(1).step_by(2).collect();
    Some((field, known))
}

/// The known name closest to `name`, if it is close at all.
pub fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let distance = |candidate: &str| strsim::damerau_levenshtein(name, candidate);
    let best = known.iter().min_by_key(|candidate| distance(candidate))?;
    let similar = distance(best) <= (name.len().max(best.len()) / 2).max(1);
    similar.then_some(best)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        #[allow(dead_code)]
        learning_rate: f64,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        #[allow(dead_code)]
        optim: Inner,
    }

    #[test]
    fn a_typo_is_named_with_its_path_and_the_nearest_key() {
        let error = from_value::<Outer>(&json!({"optim": {"learning_rte": 1}}), "").unwrap_err();
        assert_eq!(
            error.to_string(),
            "configuration: `optim.learning_rte`: unknown key; did you mean `learning_rate`?"
        );
        let error = from_value::<Inner>(&json!({"zzz": 1}), "optim").unwrap_err();
        assert_eq!(error.to_string(), "configuration: `optim.zzz`: unknown key");
        assert_eq!(error.hint().unwrap(), "known keys here: learning_rate");
    }

    #[test]
    fn a_wrong_type_says_expected_and_got() {
        let error = from_value::<Outer>(&json!({"optim": {"learning_rate": "fast"}}), "").unwrap_err();
        let want = "configuration: `optim.learning_rate`: invalid type: string \"fast\", expected f64";
        assert_eq!(error.to_string(), want);
    }
}
