//! How much an edge guesses: from what its rounds took, and from which guesses were kept.
//!
//! Guesses of a round are ranked by the draft's own score, the surest first. A round of the first `m` of them brings
//! `1 + p(1) + .. + p(m)` tokens, where `p(r)` is how often a guess of rank `r` was on the path that the target took, and
//! lasts as long as drafting as deep as they go, the way there and back, and the target's pass, which the edge sees as one
//! wait that grows with `m`. The `m` with the most tokens a second is taken; now and then everything is sent, so that what is
//! known of the others does not grow old. It decides how long an answer takes, never what it says.

use std::time::Duration;

use crate::decode::Proposal;
use crate::tree::TokenTree;

/// Weight that what was known keeps beside a new round: some fifty rounds count.
const KEPT: f64 = 0.98;
/// Rounds before anything is left out.
const FIRST: u64 = 6;
/// Every so many rounds nothing is left out.
const LOOK: u64 = 16;

/// A mean that forgets.
#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    sum: f64,
    weight: f64,
}

impl Mean {
    fn add(&mut self, value: f64) {
        *self = Self { sum: self.sum * KEPT + value, weight: self.weight * KEPT + 1.0 };
    }

    fn value(self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.sum / self.weight)
    }
}

/// What is known of rounds.
#[derive(Debug, Clone, Default)]
pub struct Pace {
    rounds: u64,
    /// How often a guess of each rank was kept, and how deep the guesses up to it go.
    ranks: Vec<(Mean, Mean)>,
    /// Seconds of drafting a level.
    level: Mean,
    /// Moments of guesses sent and seconds waited: both, products, squares of guesses.
    sent: Mean,
    waited: Mean,
    product: Mean,
    square: Mean,
}

/// Nodes of a proposal but the root, the surest first; a node stands behind its parent.
pub(super) fn ranked(proposal: &Proposal) -> Vec<usize> {
    let parents = proposal.tree.topology().parents();
    let mut sure = vec![f64::INFINITY; proposal.tree.len()];
    for node in 1..sure.len() {
        let own = proposal.scores.get(node).copied().filter(|score| !score.is_nan()).unwrap_or(f64::NEG_INFINITY);
        sure[node] = own.min(sure[parents[node]]);
    }
    let mut nodes: Vec<usize> = (1..sure.len()).collect();
    // Stable: of equal ones a parent comes first, since its number is lower.
    nodes.sort_by(|&one, &other| sure[other].total_cmp(&sure[one]));
    nodes
}

/// The `count` surest guesses of a proposal.
pub(super) fn surest(proposal: Proposal, count: usize) -> Proposal {
    if proposal.tree.len() <= count.saturating_add(1) {
        return proposal;
    }
    let mut kept = ranked(&proposal);
    kept.truncate(count);
    kept.sort_unstable();
    let (tree, parents) = (&proposal.tree, proposal.tree.topology().parents());
    let mut part = TokenTree::root(tree.tokens()[0]);
    let score = |node: usize| proposal.scores.get(node).copied().unwrap_or(0.0);
    let mut scores = vec![score(0)];
    for &node in &kept {
        // Parents are kept, and stand before their children.
        let parent = kept.binary_search(&parents[node]).map_or(0, |place| place + 1);
        part.push(parent, tree.tokens()[node]);
        scores.push(score(node));
    }
    let own = |entropies: Vec<f64>| std::iter::once(0).chain(kept).map(|node| entropies[node]).collect();
    Proposal::picked(part, scores).with_entropies(proposal.entropies.map(own))
}

impl Pace {
    /// Guesses of the next round, of at most so many: all of them while little is known.
    pub fn guesses(&self, most: usize) -> usize {
        if self.is_look() {
            return most;
        }
        let rate = |guesses: usize| self.tokens(guesses) / self.seconds(guesses).max(f64::MIN_POSITIVE);
        let known = most.min(self.ranks.len());
        // Of equal ones the fewest.
        (0..=known).fold(0, |best, guesses| if rate(guesses) > rate(best) { guesses } else { best })
    }

    /// How deep the first so many guesses go, as far as is known.
    pub fn depth(&self, guesses: usize) -> usize {
        let depth = |rank: usize| self.ranks.get(rank)?.1.value();
        if self.is_look() { usize::MAX } else { guesses.checked_sub(1).and_then(depth).unwrap_or(0.0).ceil() as usize }
    }

    fn is_look(&self) -> bool {
        self.rounds < FIRST || self.rounds.is_multiple_of(LOOK)
    }

    /// Tokens that a round of so many guesses brings.
    fn tokens(&self, guesses: usize) -> f64 {
        let kept = self.ranks.iter().take(guesses).filter_map(|(kept, _)| kept.value());
        1.0 + kept.sum::<f64>()
    }

    /// Seconds that it lasts.
    fn seconds(&self, guesses: usize) -> f64 {
        let depth = guesses.checked_sub(1).and_then(|rank| self.ranks.get(rank)?.1.value()).unwrap_or(0.0);
        depth * self.level.value().unwrap_or(0.0) + self.wait(guesses)
    }

    /// Seconds from sending so many guesses to their verdict: a line through what was seen, which does not fall.
    fn wait(&self, guesses: usize) -> f64 {
        let mean = |mean: Mean| mean.value().unwrap_or(0.0);
        let (sent, waited) = (mean(self.sent), mean(self.waited));
        let spread = mean(self.square) - sent * sent;
        let slope = if spread > 0.25 { (mean(self.product) - sent * waited) / spread } else { 0.0 };
        (waited + slope.max(0.0) * (guesses as f64 - sent)).max(0.0)
    }

    /// A round is over: the proposal, how many of its guesses were sent, which nodes of it were kept, and its times.
    pub fn round(&mut self, proposal: &Proposal, sent: usize, kept: &[usize], [drafting, waiting]: [Duration; 2]) {
        let (order, depths) = (ranked(proposal), proposal.tree.topology().depths());
        if self.ranks.len() < sent {
            self.ranks.resize(sent, (Mean::default(), Mean::default()));
        }
        let mut deepest = 0;
        for (rank, &node) in self.ranks.iter_mut().zip(&order[..sent.min(order.len())]) {
            deepest = deepest.max(depths[node]);
            rank.0.add(f64::from(u8::from(kept.contains(&node))));
            rank.1.add(deepest as f64);
        }
        if deepest > 0 {
            self.level.add(drafting.as_secs_f64() / proposal.tree.topology().depth().max(1) as f64);
        }
        let (sent, waited) = (sent as f64, waiting.as_secs_f64());
        self.sent.add(sent);
        self.waited.add(waited);
        self.product.add(sent * waited);
        self.square.add(sent * sent);
        self.rounds += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::noise::keyed_stream;

    fn chain(depth: usize) -> Proposal {
        let scores = (0..=depth).map(|node| -(node as f64)).collect();
        Proposal::picked(TokenTree::chain(0, &vec![1; depth]), scores)
    }

    /// A draft that is right four times of five, 8 guesses deep, and what it guesses in the end.
    fn settled(round_trip: u64, level: u64, node: u64) -> usize {
        let (mut pace, mut next) = (Pace::default(), keyed_stream(3, 1));
        let mut last = 0;
        for _ in 0..200 {
            let look = pace.is_look();
            let guesses = pace.guesses(8).min(8);
            let right = (0..guesses).take_while(|_| next() % 5 < 4).count();
            let times = [level * guesses as u64, round_trip + node * guesses as u64].map(Duration::from_micros);
            pace.round(&chain(guesses.max(1)), guesses, &(1..=right).collect::<Vec<_>>(), times);
            last = if look { last } else { guesses };
        }
        last
    }

    #[test]
    fn a_long_way_is_worth_many_guesses_and_a_short_one_few() {
        // 1 + 0.8 + 0.64 + ... tokens: with the way for nothing and a level as dear as half a pass, one or two guesses pay.
        assert!(settled(1_000, 500, 0) <= 3, "{}", settled(1_000, 500, 0));
        assert_eq!(settled(100_000, 500, 0), 8);
        // Guesses that are dear to verify are left out as well.
        assert!(settled(1_000, 0, 700) <= 3, "{}", settled(1_000, 0, 700));
    }

    #[test]
    fn surer_guesses_come_first_and_none_before_its_parent() {
        let mut tree = TokenTree::root(0);
        for (parent, token) in [(0, 1), (0, 2), (1, 3), (2, 4)] {
            tree.push(parent, token);
        }
        // Node 3 is said to be surer than its parent.
        let proposal = Proposal::picked(tree, vec![0.0, -2.0, -1.0, -0.5, -3.0]);
        assert_eq!(ranked(&proposal), [2, 1, 3, 4]);
        let part = surest(proposal.clone(), 3);
        assert_eq!((part.tree.tokens(), part.tree.topology().parents()), (&[0, 1, 2, 3][..], &[0, 0, 0, 1][..]));
        assert_eq!(surest(proposal.clone(), 1).tree.tokens(), [0, 2]);
        assert_eq!(surest(proposal, 9).tree.len(), 5);
    }

    #[test]
    fn everything_is_sent_while_little_is_known_and_now_and_then() {
        let mut pace = Pace::default();
        let mut all = 0;
        for _ in 0..64 {
            let guesses = pace.guesses(8);
            all += usize::from(guesses == 8);
            // Nothing is ever kept: not to guess is best.
            pace.round(&chain(8), guesses, &[], [8, 10].map(Duration::from_millis));
        }
        assert_eq!((all, pace.guesses(8)), (FIRST as usize + 3, 8));
    }
}
