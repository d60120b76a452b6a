//! Which layers see through a window, as configurations say it.

use serde_json::Value;

use crate::models::keys::Keys;

/// Window of each layer: by `layer_types` where a configuration has them, else by a family's own rule.
pub fn read(
    keys: &Keys<'_>,
    layers: usize,
    window: Option<i64>,
    has_window: impl Fn(usize) -> bool,
) -> Result<Vec<Option<i64>>, String> {
    let Some(types) = keys.filled("layer_types") else {
        return Ok((0..layers).map(|layer| window.filter(|_| has_window(layer))).collect());
    };
    let names = types.as_array().filter(|types| types.len() == layers);
    let names = names.ok_or_else(|| format!("`layer_types`: expected a list of {layers} words, one for each layer"))?;
    let of = |name: &Value| match name.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") => match window {
            Some(window) => Ok(Some(window)),
            None => Err("`sliding_window`: expected a number, for layers of `sliding_attention`".to_owned()),
        },
        _ => Err(format!("`layer_types`: expected full_attention or sliding_attention, got {name}")),
    };
    names.iter().map(of).collect()
}

/// Width of the windows: `sliding_window`, unless `use_sliding_window` is there to say that there are none.
pub fn width(keys: &Keys<'_>, silent: Option<i64>, has_switch: bool) -> Result<Option<i64>, String> {
    let window = keys.maybe_whole("sliding_window", silent)?;
    match has_switch && !keys.flag_or("use_sliding_window", false)? {
        true => Ok(None),
        false => Ok(window),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn types_go_before_the_rule() {
        let read = |values: Value| super::read(&Keys::new(&values), 3, Some(4), |layer| layer > 0);
        assert_eq!(read(json!({})), Ok(vec![None, Some(4), Some(4)]));
        let types = json!({"layer_types": ["sliding_attention", "full_attention", "full_attention"]});
        assert_eq!(read(types), Ok(vec![Some(4), None, None]));
        assert!(read(json!({"layer_types": ["full_attention"]})).unwrap_err().contains("list of 3"));
        let chunked = json!({"layer_types": ["chunked_attention", "full_attention", "full_attention"]});
        assert!(read(chunked).unwrap_err().contains("chunked_attention"));
    }

    #[test]
    fn a_switch_turns_windows_off() {
        let width = |values: Value, switch| super::width(&Keys::new(&values), Some(9), switch);
        assert_eq!(width(json!({}), false), Ok(Some(9)));
        assert_eq!(width(json!({"sliding_window": null}), false), Ok(None));
        assert_eq!(width(json!({"sliding_window": 5}), true), Ok(None));
        assert_eq!(width(json!({"sliding_window": 5, "use_sliding_window": true}), true), Ok(Some(5)));
    }
}
