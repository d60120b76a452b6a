//! SGLang's own way to give hidden states (0.5.23, `python/sglang/srt/managers/scheduler_components/`): numbers in the answer
//! of `/generate`, a list for each token.
//!
//! With `--enable-return-hidden-states` they are the final states, behind the last norm. With
//! `--enable-return-aux-hidden-states` they are those of chosen layers instead, side by side, low layers first: id `k` of
//! `--return-aux-hidden-state-layer-ids` is the output of layer `k`, which layer `k + 1` reads. The last layer's is not among
//! those that can be chosen, so that a document needs a server of each kind.
//!
//! What the server has in its prefix cache it does not compute, and does not give: `--disable-radix-cache`. Of a prompt that
//! it computes in chunks it gives the first one: `--chunked-prefill-size -1`.

use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};
use serde_json::json;
use tch::{Kind, Tensor};

use super::server::Server;
use super::{Part, Shape};
use crate::serving::{Http, Trouble};

const PATH: &str = "/generate";
/// Digits of a number, its point, sign, exponent and comma.
const BYTES_A_NUMBER: u64 = 28;
const MOST_BYTES: u64 = 1 << 20;

/// What a server gives, by the width of what it says of two tokens.
pub(super) fn part(http: &Http, shape: Shape) -> Result<Part, Trouble> {
    let rows = ask(http, &[1, 2], shape.width * (shape.layers.max(1) as i64))?;
    let width = rows.width()? as i64;
    let others = shape.layers as i64 - 1;
    match width {
        width if width == shape.width => Ok(Part::Final),
        width if width == others * shape.width => Ok(Part::Others),
        width => Err(Trouble::Final(format!(
            "gives {width} numbers a token; expected {} (the final state) or {} ({others} others), as --layers names them",
            shape.width,
            others * shape.width
        ))),
    }
}

/// The states of one document that the server gives, `[T, H]` each, float32.
pub(super) fn states(server: &Server, ids: &[i64]) -> Result<Vec<Tensor>, Trouble> {
    // Twice as many layers as anybody captures.
    let rows = ask(&server.http, ids, server.width * 16)?;
    let (count, width) = (rows.lengths.len(), rows.width()?);
    if count != ids.len() {
        let hint = match count < ids.len() {
            true => {
                "; it leaves out what it has cached and what it computes in later chunks: start the server with \
                 --disable-radix-cache --chunked-prefill-size -1"
            }
            false => "",
        };
        return Err(Trouble::answer(format!("expected states of {} tokens, got {count}{hint}", ids.len())));
    }
    if width == 0 || width as i64 % server.width != 0 {
        return Err(Trouble::answer(format!("expected a multiple of {} numbers a token, got {width}", server.width)));
    }
    let layers = width as i64 / server.width;
    let failed = |error: tch::TchError| Trouble::Final(error.to_string());
    let whole = Tensor::f_from_slice(&rows.values).map_err(failed)?;
    let whole = whole.f_view([count as i64, layers, server.width]).map_err(failed)?; // [T, L, H]
    debug_assert_eq!(whole.kind(), Kind::Float);
    (0..layers).map(|layer| whole.f_select(1, layer).map_err(failed)).collect()
}

fn ask(http: &Http, ids: &[i64], most_width: i64) -> Result<Rows, Trouble> {
    let question = json!({
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_hidden_states": true,
    });
    let most = MOST_BYTES + BYTES_A_NUMBER * (ids.len() as u64 + 2) * most_width.unsigned_abs();
    let bytes = http.post(PATH, &question, most)?;
    let answer: Answer = serde_json::from_slice(&bytes)
        .map_err(|error| Trouble::answer(format!("{PATH}: the answer is not what is expected: {error}")))?;
    let without = "the answer has no meta_info.hidden_states: start the server with --enable-return-hidden-states";
    answer.meta_info.hidden_states.ok_or_else(|| Trouble::Final(without.to_owned()))
}

#[derive(Deserialize)]
struct Answer {
    meta_info: MetaInfo,
}

#[derive(Deserialize)]
struct MetaInfo {
    #[serde(default)]
    hidden_states: Option<Rows>,
}

/// Lists of numbers, however deep they stand in other lists: every chunk of a prompt is a list of its own.
#[derive(Default)]
struct Rows {
    values: Vec<f32>,
    lengths: Vec<usize>,
}

impl Rows {
    fn width(&self) -> Result<usize, Trouble> {
        let width = self.lengths.first().copied().unwrap_or(0);
        match self.lengths.iter().find(|&&length| length != width) {
            None => Ok(width),
            Some(other) => Err(Trouble::answer(format!("its rows have {width} and {other} numbers"))),
        }
    }
}

impl<'de> Deserialize<'de> for Rows {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut rows = Rows::default();
        deserializer.deserialize_seq(Nest(&mut rows))?;
        Ok(rows)
    }
}

/// A list or a number within [`Rows`].
struct Nest<'a>(&'a mut Rows);

impl Nest<'_> {
    fn number(self, value: f64) -> bool {
        self.0.values.push(value as f32);
        true
    }
}

impl<'de> serde::de::DeserializeSeed<'de> for Nest<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// Whether it was a number.
impl<'de> Visitor<'de> for Nest<'_> {
    type Value = bool;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("lists of numbers")
    }

    fn visit_f64<E>(self, value: f64) -> Result<bool, E> {
        Ok(self.number(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<bool, E> {
        Ok(self.number(value as f64))
    }

    fn visit_u64<E>(self, value: u64) -> Result<bool, E> {
        Ok(self.number(value as f64))
    }

    /// What is no number in JSON.
    fn visit_unit<E>(self) -> Result<bool, E> {
        Ok(self.number(f64::NAN))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<bool, A::Error> {
        let mut numbers = 0;
        while let Some(is_number) = list.next_element_seed(Nest(&mut *self.0))? {
            numbers += usize::from(is_number);
        }
        if numbers > 0 {
            self.0.lengths.push(numbers);
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_of_a_prompt_are_joined_and_uneven_rows_refused() {
        let read = |text: &str| serde_json::from_str::<Rows>(text).unwrap();
        let rows = read("[[[1, 2.5], [3, -4e-1]], [[5, null]]]");
        assert_eq!((rows.lengths.as_slice(), rows.width().unwrap()), (&[2, 2, 2][..], 2));
        assert_eq!(rows.values[..5], [1.0, 2.5, 3.0, -0.4, 5.0]);
        assert!(rows.values[5].is_nan());
        assert!(read("[[[1, 2], [3]]]").width().is_err());
        assert!(serde_json::from_str::<Rows>("[[[\"1\"]]]").is_err());
        let answer: Answer = serde_json::from_str("{\"text\": \"a\", \"meta_info\": {\"id\": \"x\"}}").unwrap();
        assert!(answer.meta_info.hidden_states.is_none());
    }
}
