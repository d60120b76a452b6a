//! Strict reading of configuration: an unknown key is an error that proposes the nearest known one.
//!
//! JSON from elsewhere is read strictly in another sense: a key that stands twice is found, where readers keep the last
//! one without a word, and a value of the wrong type is named by its key.

use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeOwned, DeserializeSeed, MapAccess, SeqAccess, Visitor};
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
                // serde names the unknown field as the last part of the path, but not within an enumeration with a tag.
                let named = key == field || key.ends_with(&format!(".{field}"));
                let key = if named { key.clone() } else { format!("{key}.{field}") };
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

/// Reads a variant without fields of an enumeration with a tag, for `deserialize_with`: where serde passes over whatever
/// stands beside the tag, this refuses it.
pub fn nothing<'de, D: serde::Deserializer<'de>>(reader: D) -> Result<(), D::Error> {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Nothing {}
    serde::Deserialize::deserialize(reader).map(|Nothing {}| ())
}

/// Deserialises a file of JSON from elsewhere; the problem names the key.
pub fn from_json<T: DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    if let Some(key) = repeated_key(text) {
        return Err(format!("names `{key}` twice"));
    }
    let mut reader = serde_json::Deserializer::from_slice(text);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        match path.as_str() {
            "." | "?" | "" => error.inner().to_string(),
            path => format!("`{path}`: {}", error.inner()),
        }
    })?;
    reader.end().map_err(|error| error.to_string())?;
    Ok(value)
}

/// The first key that an object names twice, anywhere in a text of JSON. Nothing is said of a text that is none.
pub fn repeated_key(text: &[u8]) -> Option<String> {
    let mut found = None;
    // What is wrong otherwise is for the reader that wants the values.
    let _ = Keys { found: &mut found }.deserialize(&mut serde_json::Deserializer::from_slice(text));
    found
}

/// The first tensor that the header of a safetensors file names twice, whatever else is wrong with it. Its own reader keeps
/// the last of two.
pub fn repeated_tensor(file: &[u8]) -> Option<String> {
    let length = u64::from_le_bytes(file.first_chunk().copied()?);
    let end = usize::try_from(length).ok()?.checked_add(8)?;
    repeated_key(file.get(8..end)?)
}

/// Walks a value and notes the first repeated key.
struct Keys<'a> {
    found: &'a mut Option<String>,
}

impl<'de> DeserializeSeed<'de> for Keys<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Keys<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if self.found.is_none() && seen.contains(&key) {
                *self.found = Some(key.clone());
            }
            seen.insert(key);
            map.next_value_seed(Keys { found: &mut *self.found })?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(Keys { found: &mut *self.found })?.is_some() {}
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
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
    fn keys_that_stand_twice_are_found_wherever_they_are() {
        for (text, want) in [
            (r#"{"a": 1, "b": {"a": 2, "c": [1, {"a": null}]}}"#, None),
            (r#"{"a": 1, "b": 2, "a": 3}"#, Some("a")),
            (r#"{"b": {"x": [{"y": 1}, {"y": 1, "y": true}]}}"#, Some("y")),
            (r#"{"a": 1.5, "\u0061": "twice in another spelling"}"#, Some("a")),
            (r#"{"a": 1, "a": "#, Some("a")),
            ("no JSON", None),
        ] {
            assert_eq!(repeated_key(text.as_bytes()).as_deref(), want, "{text}");
        }
        let problem = |text: &str| from_json::<Inner>(text.as_bytes()).unwrap_err();
        assert_eq!(problem(r#"{"learning_rate": 1, "learning_rate": 2}"#), "names `learning_rate` twice");
        assert!(problem(r#"{"learning_rate": []}"#).starts_with("`learning_rate`: invalid type: sequence"));
        assert!(problem(r#"{"learning_rate": 1} 2"#).contains("trailing characters"));
        assert!(problem(r#"{"learning_rate": 1"#).contains("EOF"));
    }

    #[test]
    fn a_wrong_type_says_expected_and_got() {
        let error = from_value::<Outer>(&json!({"optim": {"learning_rate": "fast"}}), "").unwrap_err();
        let want = "configuration: `optim.learning_rate`: invalid type: string \"fast\", expected f64";
        assert_eq!(error.to_string(), want);
    }
}
