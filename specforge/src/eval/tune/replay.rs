//! Decoding once more on paper: the rounds that a tree would have made of answers that are there, and what they cost.

use serde::Serialize;

/// What one round is with one tree.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Levels that are drafted.
    pub levels: u16,
    /// Deepest guess.
    pub depth: u16,
    /// Tokens of the tree, the root included.
    pub nodes: u16,
    /// Guesses that come true.
    pub accepted: u16,
}

/// Outcomes behind every token of an answer but the last.
pub type Outcomes = Vec<Outcome>;

/// A decode on paper.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Replayed {
    /// Verifications, each request's counted.
    pub rounds: u64,
    /// Passes of the target.
    pub passes: u64,
    /// Tokens committed, without the first of each answer.
    pub tokens: u64,
    /// What it costs.
    pub seconds: f64,
}

impl Replayed {
    /// Tokens for each verification.
    pub fn tokens_per_round(&self) -> f64 {
        if self.rounds == 0 { 0.0 } else { self.tokens as f64 / self.rounds as f64 }
    }

    /// Tokens a second.
    pub fn tokens_per_second(&self) -> f64 {
        if self.seconds > 0.0 { self.tokens as f64 / self.seconds } else { 0.0 }
    }
}

/// Plain decoding of an answer of so many tokens.
pub fn plain(tokens: usize) -> Outcomes {
    vec![Outcome { nodes: 1, ..Outcome::default() }; tokens.saturating_sub(1)]
}

/// Decodes answers in the order of `queue`, by their places, `rows` at once: one that ends makes room for the next, as in the
/// engine. `cost` says what a round of so many rows, levels and nodes takes; the largest tree of a round decides.
pub fn replay(
    answers: &[Outcomes],
    queue: &[usize],
    rows: usize,
    cost: &dyn Fn(usize, usize, usize) -> f64,
) -> Replayed {
    let mut waiting = queue.iter().filter(|&&answer| !answers[answer].is_empty());
    // The answer of each row, and its place in it.
    let mut running: Vec<(usize, usize)> = Vec::new();
    let mut replayed = Replayed::default();
    loop {
        running.extend(waiting.by_ref().take(rows.max(1) - running.len()).map(|&answer| (answer, 0)));
        if running.is_empty() {
            return replayed;
        }
        let (mut levels, mut nodes) = (0, 1);
        for (answer, place) in &mut running {
            let Outcome { levels: own_levels, nodes: own_nodes, accepted, .. } = answers[*answer][*place];
            (levels, nodes) = (levels.max(own_levels as usize), nodes.max(own_nodes as usize));
            // The target's own token comes behind them, unless the answer is at its end.
            let tokens = (accepted as usize + 1).min(answers[*answer].len() - *place);
            *place += tokens;
            replayed.tokens += tokens as u64;
        }
        replayed.rounds += running.len() as u64;
        replayed.passes += 1;
        replayed.seconds += cost(running.len(), levels, nodes);
        running.retain(|&(answer, place)| place < answers[answer].len());
    }
}

/// The order in which prompts are decoded to fill `rows` rows: each of `count` in turn, in groups that are decoded to their
/// end, one after the other on either side. A group fills the rows twice at least.
pub fn groups(count: usize, rows: usize) -> Vec<Vec<usize>> {
    if count == 0 {
        return Vec::new();
    }
    let size = 2 * rows.max(1);
    let groups = count.div_ceil(size);
    (0..groups).map(|group| (0..size).map(|place| (group * size + place) % count).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcomes(accepted: &[u16]) -> Outcomes {
        accepted.iter().map(|&accepted| Outcome { levels: 2, depth: 2, nodes: 4, accepted }).collect()
    }

    #[test]
    fn rounds_go_on_where_the_last_one_ended() {
        // From the first token two guesses come true: the next round begins three tokens on.
        let answers = [outcomes(&[2, 0, 0, 1, 9, 0])];
        let replayed = replay(&answers, &[0], 1, &|rows, levels, nodes| (100 * rows + 10 * levels + nodes) as f64);
        // Tokens 3, then 2 behind a guess, then the last.
        assert_eq!((replayed.rounds, replayed.passes, replayed.tokens), (3, 3, 6));
        assert_eq!(replayed.seconds, 3.0 * 124.0);
        assert_eq!(replayed.tokens_per_round(), 2.0);
        // A guess behind the end is worth nothing.
        assert_eq!(replay(&[outcomes(&[5])], &[0], 1, &|_, _, _| 1.0).tokens, 1);
    }

    #[test]
    fn rows_are_filled_and_the_largest_tree_decides() {
        let mut answers = [plain(3), outcomes(&[0, 0, 0, 0]), plain(1)];
        answers[1][1].nodes = 9;
        let costs = std::cell::RefCell::new(Vec::new());
        let cost = |rows, levels, nodes| {
            costs.borrow_mut().push((rows, levels, nodes));
            1.0
        };
        let replayed = replay(&answers, &[0, 1, 2, 0], 2, &cost);
        assert_eq!(*costs.borrow(), [(2, 2, 4), (2, 2, 9), (2, 2, 4), (2, 2, 4)]);
        assert_eq!((replayed.rounds, replayed.tokens, replayed.seconds), (8, 8, 4.0));
        assert_eq!(replay(&[], &[], 2, &cost), Replayed::default());
    }

    #[test]
    fn every_prompt_is_decoded_and_rows_are_filled() {
        assert_eq!(groups(3, 1), [vec![0, 1], vec![2, 0]]);
        assert_eq!(groups(3, 4), [vec![0, 1, 2, 0, 1, 2, 0, 1]]);
        assert!(groups(0, 4).is_empty());
    }
}
