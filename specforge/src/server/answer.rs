//! One answer as it grows: tokens become text, text is searched for stop strings, and what is certain goes out.
//!
//! All of it depends on the answer's own tokens one after the other, not on how many a verification yields at once. So an
//! answer is cut at the same place with and without a draft, and a stream says what a whole answer says.

use std::collections::VecDeque;

use tch::{Device, Kind, Tensor};

use super::job::{Chance, Chances, Counts, Piece, Told};
use super::stops::Stops;
use crate::data::{ChatTokenizer, TextStream};
use crate::error::Result;

/// An answer that is being made.
pub struct Answer<'a> {
    text: TextStream<'a>,
    stops: Stops,
    /// Tokens that begin in text which is not certain yet.
    waiting: VecDeque<Told>,
    /// Characters that tokens have spelled.
    spelled: usize,
    /// Characters that went out.
    sent: usize,
    /// Whether a stop string was found: nothing behind it counts.
    stopped: bool,
    /// What it took so far.
    pub counts: Counts,
}

impl<'a> Answer<'a> {
    /// An answer without tokens.
    pub fn new(tokenizer: &'a ChatTokenizer, stop: Vec<String>) -> Self {
        Self {
            text: TextStream::new(tokenizer),
            stops: Stops::new(stop),
            waiting: VecDeque::new(),
            spelled: 0,
            sent: 0,
            stopped: false,
            counts: Counts::default(),
        }
    }

    /// Whether a stop string has ended it.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Takes a token, and gives what is certain now.
    pub fn push(&mut self, id: u32, chances: Option<Chances>) -> Result<Piece> {
        if self.stopped {
            return Ok(Piece::default());
        }
        self.counts.tokens += 1;
        self.waiting.push_back(Told { id, offset: self.spelled, chances });
        let text = self.text.push(id)?;
        self.spelled += text.chars().count();
        let (text, stopped) = self.stops.push(&text);
        self.stopped = stopped;
        Ok(self.send(text))
    }

    /// Takes the token that ends it, which says nothing.
    pub fn push_end(&mut self) {
        self.counts.tokens += u64::from(!self.stopped);
    }

    /// What is left, where no token follows.
    pub fn finish(&mut self) -> Result<Piece> {
        if self.stopped {
            return Ok(Piece::default());
        }
        let rest = self.text.finish()?;
        let (mut text, stopped) = self.stops.push(&rest);
        self.stopped = stopped;
        if !stopped {
            text.push_str(&self.stops.finish());
            let mut piece = self.send(text);
            // Tokens that spell nothing come last.
            piece.tokens.extend(self.waiting.drain(..));
            return Ok(piece);
        }
        Ok(self.send(text))
    }

    /// Text that goes out, with the tokens that begin in it.
    fn send(&mut self, text: String) -> Piece {
        self.sent += text.chars().count();
        let begun = self.waiting.iter().take_while(|told| told.offset < self.sent).count();
        Piece { text, tokens: self.waiting.drain(..begun).collect() }
    }
}

/// What a row of logits `[V]`, as the target gave it, says about the token chosen from it and the `count` likeliest ones.
pub fn chances(tokenizer: &ChatTokenizer, row: &Tensor, id: u32, count: usize) -> Result<Chances> {
    let row = row.f_to_device(Device::Cpu)?.f_log_softmax(-1, Kind::Double)?; // [V]
    let chance = |id: u32, logprob: f64| Ok(Chance { text: tokenizer.decode(&[id], false)?, logprob });
    let own = chance(id, row.f_double_value(&[i64::from(id)])?)?;
    let count = (count as i64).min(row.size()[0]);
    let (values, ids) = row.f_topk(count, -1, true, true)?; // [count] each
    let (values, ids) = (Vec::<f64>::try_from(values)?, Vec::<i64>::try_from(ids)?);
    let top = ids.into_iter().zip(values).map(|(id, logprob)| chance(id as u32, logprob)).collect::<Result<_>>()?;
    Ok(Chances { own, top })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn tokenizer() -> ChatTokenizer {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/templates/tokenizer");
        ChatTokenizer::load(&folder, None).unwrap()
    }

    /// All pieces of an answer: its text, the ids told with it, and whether it was stopped.
    fn run(tokenizer: &ChatTokenizer, ids: &[u32], stop: &[&str]) -> (String, Vec<u32>, bool, u64) {
        let mut answer = Answer::new(tokenizer, stop.iter().map(|&stop| stop.to_owned()).collect());
        let mut whole = Piece::default();
        let mut add = |piece: Piece| {
            whole.text.push_str(&piece.text);
            whole.tokens.extend(piece.tokens);
        };
        ids.iter().for_each(|&id| add(answer.push(id, None).unwrap()));
        add(answer.finish().unwrap());
        (whole.text, whole.tokens.iter().map(|told| told.id).collect(), answer.is_stopped(), answer.counts.tokens)
    }

    #[test]
    fn the_pieces_of_an_answer_are_the_answer() {
        let tokenizer = tokenizer();
        let text = "Köln, 東京 and \u{1F980}: one, two.";
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(run(&tokenizer, &ids, &[]), (text.to_owned(), ids.clone(), false, ids.len() as u64));
        // A stop string that never comes holds nothing back for ever.
        assert_eq!(run(&tokenizer, &ids, &["two.!"]).0, text);
    }

    #[test]
    fn nothing_from_a_stop_string_on_is_told() {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode("one, two, three, four").unwrap();
        let (text, told, stopped, counted) = run(&tokenizer, &ids, &["o, thr"]);
        assert_eq!((text.as_str(), stopped), ("one, tw", true));
        // The token that completes the stop string was generated; those behind it do not count.
        assert!(told.len() < counted as usize && counted < ids.len() as u64, "{told:?}, {counted} of {ids:?}");
        assert_eq!(told, ids[..told.len()]);
        assert!(tokenizer.decode(&told, true).unwrap().starts_with("one, tw"));
    }

    #[test]
    fn chances_are_the_targets_own_distribution() {
        let tokenizer = tokenizer();
        let row = Tensor::from_slice(&[0.0f32, 1.0, 3.0, 2.0]);
        let chances = chances(&tokenizer, &row, 1, 2).unwrap();
        let all = [0.0f64, 1.0, 3.0, 2.0].map(f64::exp).iter().sum::<f64>().ln();
        assert!((chances.own.logprob - (1.0 - all)).abs() < 1e-12);
        let top: Vec<f64> = chances.top.iter().map(|chance| chance.logprob + all).collect();
        assert!((top[0] - 3.0).abs() < 1e-12 && (top[1] - 2.0).abs() < 1e-12 && top.len() == 2, "{top:?}");
        assert_eq!(chances.own.text, tokenizer.decode(&[1], false).unwrap());
    }
}
