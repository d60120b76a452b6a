//! Names of parameters with stars in them.

/// Whether a pattern names a parameter; `*` stands for anything.
pub(super) fn names(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else {
        return false;
    };
    let mut last = None;
    for part in parts {
        // Everything between two stars at its first place; what follows the last star must end the name.
        if let Some(middle) = last.replace(part) {
            let Some(place) = rest.find(middle) else { return false };
            rest = &rest[place + middle.len()..];
        }
    }
    last.map_or(rest.is_empty(), |end| rest.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::names;

    #[test]
    fn a_pattern_names_what_fits_between_its_stars() {
        for (pattern, name) in [
            ("lm_head.weight", "lm_head.weight"),
            ("*", "any"),
            ("lm_head.*", "lm_head.weight"),
            ("*.bias", "0.1.linear.bias"),
            ("*norm*", "midlayer.hidden_norm.weight"),
            ("0.*.linear.*", "0.12.linear.weight"),
            ("a*a", "aba"),
        ] {
            assert!(names(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in
            [("lm_head", "lm_head.weight"), ("head.*", "lm_head.weight"), ("*.bias", "bias.x"), ("a*a", "a"), ("", "a")]
        {
            assert!(!names(pattern, name), "{pattern} {name}");
        }
    }
}
