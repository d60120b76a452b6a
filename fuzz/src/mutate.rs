//! Changes of an input that leave its form: JSON stays JSON, a safetensors header keeps its length.
//!
//! Half of all changes are libFuzzer's own, of bytes; the others replace, remove, repeat or nest one value of the first
//! piece of JSON there is, by values that programs stumble over.

use serde_json::{Value, json};

/// The name of a file and the bytes that stand in its place.
pub fn split(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = data.iter().position(|&byte| byte == b'\n')?;
    Some((&data[..end], &data[end + 1..]))
}

/// Changes an input in place and returns its new size.
pub fn mutate(data: &mut [u8], size: usize, max_size: usize, seed: u32) -> usize {
    let mut random = Random(u64::from(seed) | 1 << 40);
    let Some(start) = split(&data[..size]).map(|(name, _)| name.len() + 1) else {
        return libfuzzer_sys::fuzzer_mutate(data, size, max_size);
    };
    if random.below(2) == 0 {
        if let Some(changed) = change(&data[start..size], &mut random) {
            if start + changed.len() <= max_size {
                data[start..start + changed.len()].copy_from_slice(&changed);
                return start + changed.len();
            }
        }
    }
    start + libfuzzer_sys::fuzzer_mutate(&mut data[start..], size - start, max_size - start)
}

/// Bytes with one value of their JSON changed: the whole, a line, or the header of a safetensors file.
fn change(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    if let Ok(value) = serde_json::from_slice(bytes) {
        return Some(changed(value, random));
    }
    if let Some((length, rest)) = bytes.split_first_chunk::<8>() {
        let length = usize::try_from(u64::from_le_bytes(*length)).ok().filter(|&length| length <= rest.len());
        let header = length.and_then(|length| Some((length, serde_json::from_slice(&rest[..length]).ok()?)));
        if let Some((length, value)) = header {
            let header = changed(value, random);
            return Some([&(header.len() as u64).to_le_bytes(), &header[..], &rest[length..]].concat());
        }
    }
    let mut lines: Vec<&[u8]> = bytes.split(|&byte| byte == b'\n').collect();
    let at = random.below(lines.len());
    let line = changed(serde_json::from_slice(lines[at]).ok()?, random);
    lines[at] = &line;
    Some(lines.join(&b'\n'))
}

fn changed(mut value: Value, random: &mut Random) -> Vec<u8> {
    for _ in 0..=random.below(3) {
        let count = count(&value);
        let place = nth(&mut value, &mut random.below(count));
        if let Some(place) = place {
            change_one(place, random);
        }
    }
    value.to_string().into_bytes()
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(count).sum(),
        Value::Object(members) => members.values().map(count).sum(),
        _ => 0,
    }
}

/// The value that `left` others stand before.
fn nth<'a>(value: &'a mut Value, left: &mut usize) -> Option<&'a mut Value> {
    if *left == 0 {
        return Some(value);
    }
    *left -= 1;
    match value {
        Value::Array(list) => list.iter_mut().find_map(|inner| nth(inner, left)),
        Value::Object(members) => members.values_mut().find_map(|inner| nth(inner, left)),
        _ => None,
    }
}

fn change_one(value: &mut Value, random: &mut Random) {
    match (random.below(4), &mut *value) {
        (0, Value::Array(list)) if !list.is_empty() => {
            let at = random.below(list.len());
            match random.below(3) {
                0 => drop(list.remove(at)),
                1 => list.push(list[at].clone()),
                _ => (0..random.below(2000)).for_each(|_| list.push(list[at].clone())),
            }
        }
        (0, Value::Object(members)) if !members.is_empty() => {
            let key = members.keys().nth(random.below(members.len())).cloned().unwrap_or_default();
            let member = members.remove(&key).unwrap_or_default();
            if random.below(2) == 0 {
                let names = ["\u{1b}[31mred", "two\nlines", "", "__metadata__", "a.b", "\u{202e}", "../up"];
                members.insert(names[random.below(names.len())].to_owned(), member);
            }
        }
        (1, Value::Number(number)) => {
            let number = number.as_i64().unwrap_or(1);
            let near = [-1, 1].map(|step: i64| number.wrapping_add(step));
            let near = [near[0], near[1], number.wrapping_neg(), number.wrapping_mul(2), number << 20, number / 2];
            *value = json!(near[random.below(near.len())]);
        }
        (1, Value::String(text)) => match random.below(4) {
            0 => text.push('\u{1b}'),
            1 => *text = text.repeat(1 + random.below(50)),
            2 => text.clear(),
            _ => text.insert_str(0, "\u{0}\n"),
        },
        _ => {
            *value = match random.below(16) {
                0 => json!(null),
                1 => json!(-1),
                2 => json!(0),
                3 => json!(u64::MAX),
                4 => json!(i64::MIN),
                5 => json!(1u64 << 32),
                6 => json!(1u64 << 62),
                7 => json!(1e308),
                8 => json!(1e-320),
                9 => json!(""),
                10 => json!("x".repeat(1 << random.below(14))),
                11 => json!([]),
                12 => json!({}),
                13 => json!(true),
                14 => (0..random.below(120)).fold(value.clone(), |inner, _| json!([inner])),
                _ => (0..random.below(120)).fold(value.clone(), |inner, _| json!({"content": inner})),
            }
        }
    }
}

/// SplitMix64: the same seed makes the same change, so that a finding can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % limit.max(1) as u64) as usize
    }
}
