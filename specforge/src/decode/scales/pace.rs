//! How many scales are worth drafting: from what passes have cost and how often the draft was right.

use serde::{Deserialize, Serialize};

/// How many scales are drafted before the target looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gamma {
    /// Always so many, as far as there are scales.
    Fixed(usize),
    /// As many as save the most time, by what was measured; none where nothing saves any.
    Auto,
}

/// How much a measurement counts beside the next one: old ones fade.
const FADING: f64 = 0.95;
/// Measured scales that the guess of a token's agreement is worth, before a scale was drafted often.
const GUESS: f64 = 2.0;
/// Right and all tokens of the first guess: nine of ten.
const FIRST_GUESS: (f64, f64) = (9.0, 10.0);

/// What passes cost: seconds of a pass as a line over its tokens, by least squares.
#[derive(Debug, Clone, Copy, Default)]
struct Line {
    count: f64,
    tokens: f64,
    seconds: f64,
    squares: f64,
    products: f64,
}

impl Line {
    fn add(&mut self, tokens: i64, seconds: f64) {
        let x = tokens as f64;
        for (sum, term) in [
            (&mut self.count, 1.0),
            (&mut self.tokens, x),
            (&mut self.seconds, seconds),
            (&mut self.squares, x * x),
            (&mut self.products, x * seconds),
        ] {
            *sum = *sum * FADING + term;
        }
    }

    /// Seconds of a pass; nothing before the first measurement. Neither part of the line is below 0: passes of equal tokens,
    /// or chance, say nothing else.
    fn seconds(&self, tokens: i64) -> Option<f64> {
        if self.count == 0.0 {
            return None;
        }
        let spread = self.count * self.squares - self.tokens * self.tokens;
        let slope = match spread > 1e-9 * self.count * self.squares {
            true => ((self.count * self.products - self.tokens * self.seconds) / spread).max(0.0),
            false => 0.0,
        };
        let base = (self.seconds - slope * self.tokens) / self.count;
        match base >= 0.0 {
            true => Some(base + slope * tokens as f64),
            // Through the origin.
            false => Some(self.seconds / self.tokens * tokens as f64),
        }
    }
}

/// What was measured so far. It outlives an image.
#[derive(Debug, Clone, Default)]
pub struct Pace {
    target: Line,
    draft: Line,
    /// Of each scale, how often it was drafted and how often kept.
    kept: Vec<(f64, f64)>,
    /// Drafted and right positions.
    positions: (f64, f64),
}

impl Pace {
    /// Notes a pass of the target over tokens.
    pub fn target_took(&mut self, tokens: i64, seconds: f64) {
        self.target.add(tokens, seconds);
    }

    /// Notes a pass of the draft over tokens.
    pub fn draft_took(&mut self, tokens: i64, seconds: f64) {
        self.draft.add(tokens, seconds);
    }

    /// Notes what became of a drafted scale whose predecessors all stood.
    pub fn judged(&mut self, scale: usize, is_kept: bool, agreed: i64, positions: i64) {
        if self.kept.len() <= scale {
            self.kept.resize(scale + 1, (0.0, 0.0));
        }
        if let Some((drafted, kept)) = self.kept.get_mut(scale) {
            *drafted += 1.0;
            *kept += f64::from(u8::from(is_kept));
        }
        self.positions.0 += positions as f64;
        self.positions.1 += agreed as f64;
    }

    /// Chance that a drafted scale of so many positions stands.
    fn chance(&self, scale: usize, positions: i64) -> f64 {
        let (drafted, kept) = self.kept.get(scale).copied().unwrap_or_default();
        let (right, all) = FIRST_GUESS;
        let token = (self.positions.1 + right) / (self.positions.0 + all);
        (kept + GUESS * token.powf(positions as f64)) / (drafted + GUESS)
    }

    /// How many of the scales from `begin` on to draft. `tokens` are the positions of all scales of an image, `rows` how many
    /// images there are: all of them must agree. With a bonus the target also reads the scale behind the drafted ones.
    ///
    /// A round is worth the target's passes that it saves, and costs its own; the most that is left decides, and none is
    /// drafted where nothing is left.
    pub fn choose(&self, begin: usize, tokens: &[i64], rows: i64, bonus: bool) -> usize {
        let left = tokens.get(begin..).unwrap_or_default();
        let plain = |tokens: i64| self.target.seconds(tokens);
        let (Some(_), Some(_)) = (plain(1), self.draft.seconds(1)) else {
            // Nothing is known of one of them: a scale is drafted to find out.
            return 1.min(left.len());
        };
        let mut best = (0, 0.0);
        for gamma in 1..=left.len() {
            let end = (gamma + usize::from(bonus)).min(left.len());
            let drafts: f64 = left[..gamma].iter().filter_map(|&tokens| self.draft.seconds(tokens)).sum();
            let cost = drafts + plain(left[..end].iter().sum()).unwrap_or_default();
            let (mut worth, mut reached) = (0.0, 1.0);
            for (place, &tokens) in left[..end].iter().enumerate() {
                worth += reached * plain(tokens).unwrap_or_default();
                reached *= self.chance(begin + place, rows * tokens);
            }
            if worth - cost > best.1 {
                best = (gamma, worth - cost);
            }
        }
        best.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENS: [i64; 5] = [1, 4, 9, 16, 25];

    /// A pass costs `base` and so much a token; the draft a tenth of it.
    fn pace(base: f64, token: f64, right: impl Fn(usize) -> bool) -> Pace {
        let mut pace = Pace::default();
        for _ in 0..20 {
            for (scale, tokens) in TOKENS.into_iter().enumerate() {
                pace.target_took(tokens, base + token * tokens as f64);
                pace.draft_took(tokens, 0.1 * (base + token * tokens as f64));
                let agreed = if right(scale) { tokens } else { 0 };
                pace.judged(scale, right(scale), agreed, tokens);
            }
        }
        pace
    }

    #[test]
    fn costs_are_a_line() {
        let mut line = Line::default();
        assert_eq!(line.seconds(3), None);
        line.add(4, 0.5);
        assert_eq!(line.seconds(100), Some(0.5));
        for tokens in [1, 4, 9, 16] {
            line.add(tokens, 0.3 + 0.05 * tokens as f64);
        }
        assert!((line.seconds(30).unwrap() - 1.8).abs() < 1e-9);
        let mut falling = Line::default();
        [(1, 2.0), (10, 1.0)].iter().for_each(|&(tokens, seconds)| falling.add(tokens, seconds));
        assert!(falling.seconds(100).unwrap() > 0.9);
    }

    #[test]
    fn a_draft_that_is_right_drafts_as_far_as_it_is() {
        let always = pace(1.0, 0.0, |_| true);
        assert_eq!(always.choose(0, &TOKENS, 1, true), 4, "the bonus is the fifth");
        assert_eq!(always.choose(0, &TOKENS, 1, false), 5);
        assert_eq!(always.choose(3, &TOKENS, 1, true), 1);
        let small = pace(1.0, 0.0, |scale| scale < 2);
        assert_eq!(small.choose(0, &TOKENS, 1, true), 2);
        assert_eq!(small.choose(2, &TOKENS, 1, true), 0);
    }

    #[test]
    fn where_drafting_does_not_pay_it_stops() {
        assert_eq!(pace(1.0, 0.0, |_| false).choose(0, &TOKENS, 1, true), 0);
        // Passes cost their tokens alone: nothing is saved by joining them.
        assert_eq!(pace(0.0, 1.0, |_| true).choose(0, &TOKENS, 1, true), 0);
        let fresh = Pace::default();
        assert_eq!((fresh.choose(0, &TOKENS, 1, true), fresh.choose(5, &TOKENS, 1, true)), (1, 0));
    }
}
