//! The fields of a request's JSON object, read one by one: a field that is wrong is named, `null` counts as not said, and
//! what nobody asks for is passed over, as servers do.

use serde_json::{Map, Value};

use super::refusal::Refusal;

/// The fields of one object.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a> {
    object: &'a Map<String, Value>,
    /// Stands before every name in messages: empty, or the path of an inner object with a dot.
    path: &'a str,
}

/// What a value is, for messages. The value itself may be long.
fn kind_of(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

impl<'a> Fields<'a> {
    /// The fields of a request.
    pub fn of(object: &'a Map<String, Value>) -> Self {
        Self { object, path: "" }
    }

    /// The fields of an object within, whose path ends with a dot.
    pub fn within(object: &'a Map<String, Value>, path: &'a str) -> Self {
        Self { object, path }
    }

    /// A field's name as messages give it.
    pub fn name(&self, key: &str) -> String {
        format!("{}{key}", self.path)
    }

    /// What a field says, if anything.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// A refusal of what a field says.
    pub fn wrong(&self, key: &str, expected: &str, got: &Value) -> Refusal {
        Refusal::field(&self.name(key), format!("expected {expected}, got {}", kind_of(got)))
    }

    fn read<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Refusal> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.wrong(key, expected, value))
    }

    /// A string.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>, Refusal> {
        self.read(key, "a string", Value::as_str)
    }

    /// true or false; what is not said is false.
    pub fn flag(&self, key: &str) -> Result<bool, Refusal> {
        Ok(self.read(key, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    /// A number.
    pub fn number(&self, key: &str) -> Result<Option<f64>, Refusal> {
        self.read(key, "a number", Value::as_f64)
    }

    /// A whole number within limits. 3.0 is one.
    pub fn whole(&self, key: &str, (least, most): (i64, i64)) -> Result<Option<i64>, Refusal> {
        let expected = format!("a whole number from {least} to {most}");
        self.read(key, &expected, |value| whole(value).filter(|number| (least..=most).contains(number)))
    }

    /// An object.
    pub fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>, Refusal> {
        self.read(key, "an object", Value::as_object)
    }

    /// Refuses a field that would change the answer and is not understood here, unless it says what is done in any case.
    pub fn refuse(&self, key: &str, harmless: impl FnOnce(&Value) -> bool) -> Result<(), Refusal> {
        match self.get(key) {
            Some(value) if !harmless(value) => Err(Refusal::field(&self.name(key), "is not supported by this server")),
            _ => Ok(()),
        }
    }
}

/// A whole number, also where it is written with a fraction of zero.
pub fn whole(value: &Value) -> Option<i64> {
    let as_float = || value.as_f64().filter(|number| number.fract() == 0.0 && number.abs() < 9e15);
    value.as_i64().or_else(|| as_float().map(|number| number as i64))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_wrong_is_named_and_null_is_nothing() {
        let value = json!({"a": "x", "b": 3.0, "c": null, "d": [1], "e": 2.5, "f": 0});
        let fields = Fields::of(value.as_object().unwrap());
        assert_eq!(fields.text("a"), Ok(Some("x")));
        assert_eq!(fields.whole("b", (1, 3)), Ok(Some(3)));
        assert_eq!((fields.number("c"), fields.text("c"), fields.flag("c")), (Ok(None), Ok(None), Ok(false)));
        assert_eq!(fields.number("e"), Ok(Some(2.5)));
        for (refused, message) in [
            (fields.text("b").unwrap_err(), "`b`: expected a string, got 3.0"),
            (fields.whole("b", (4, 9)).unwrap_err(), "`b`: expected a whole number from 4 to 9, got 3.0"),
            (fields.whole("e", (0, 9)).unwrap_err(), "`e`: expected a whole number from 0 to 9, got 2.5"),
            (fields.object("d").unwrap_err(), "`d`: expected an object, got a list"),
            (fields.flag("f").unwrap_err(), "`f`: expected true or false, got 0"),
            (fields.refuse("a", |_| false).unwrap_err(), "`a`: is not supported by this server"),
        ] {
            assert_eq!((refused.status, refused.message.as_str()), (400, message));
            assert_eq!(refused.param.unwrap(), message[1..2]);
        }
        let inner = Fields::within(value.as_object().unwrap(), "outer.");
        assert_eq!(inner.flag("d").unwrap_err().param.unwrap(), "outer.d");
        assert_eq!(inner.refuse("f", |value| *value == json!(0)), Ok(()));
    }
}
