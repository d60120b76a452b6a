use specforge_hot::rows::normalise;
use tch::{Device, Kind};

use super::many_rows::Node;
use super::*;
use crate::nn::noise::keyed_stream;

const EVERYTHING: Limits<'static> = Limits { tokens: usize::MAX, stop: &[] };

/// Rows of a tree, written out.
struct Written(Vec<Vec<f64>>);

impl Rows for Written {
    fn row(&mut self, path: &[usize]) -> Result<Vec<f64>> {
        Ok(self.0[path[path.len() - 1]].clone())
    }

    fn greedy(&mut self, path: &[usize]) -> Result<u32> {
        Ok(argmax(&self.row(path)?) as u32)
    }
}

/// A tree of three tokens: 1 behind the root with 0 and 2 behind it, and 0 behind the root.
fn tree() -> TokenTree {
    let mut tree = TokenTree::root(2);
    let one = tree.push(0, 1);
    tree.push(one, 0);
    tree.push(one, 2);
    tree.push(0, 0);
    tree
}

fn one_hot(token: usize) -> Vec<f64> {
    let mut row = vec![0.0; 3];
    row[token] = 5.0;
    row
}

fn decide(policy: Policy, greedy: bool, rows: &[Vec<f64>], limits: Limits<'_>) -> Verdict {
    let proposal = Proposal::picked(tree(), vec![0.0; 5]);
    verify(policy, greedy, &proposal, (10, 0), limits, &mut Written(rows.to_vec())).unwrap()
}

#[test]
fn a_greedy_walk_follows_the_targets_own_choices() {
    let keyed = Policy::Keyed { seed: 0 };
    let rows = |choices: [usize; 5]| choices.map(one_hot).to_vec();
    let verdict = decide(keyed, true, &rows([1, 2, 0, 1, 0]), EVERYTHING);
    assert_eq!((verdict.path, verdict.tokens), (vec![0, 1, 3], vec![1, 2, 1]));
    assert_eq!(verdict.sources, [Source::Accepted, Source::Accepted, Source::Bonus]);
    // Token 0 is a token like any other: node 4 guessed it, and nothing stands for an empty place.
    let verdict = decide(keyed, true, &rows([0, 2, 0, 1, 0]), EVERYTHING);
    assert_eq!((verdict.path, verdict.tokens), (vec![0, 4], vec![0, 0]));
    let verdict = decide(keyed, true, &rows([2, 2, 0, 1, 0]), EVERYTHING);
    assert_eq!((verdict.path, verdict.tokens, verdict.sources), (vec![0], vec![2], vec![Source::Correction]));
}

#[test]
fn a_walk_ends_at_a_stop_token_and_at_the_limit() {
    let rows = [1, 2, 0, 1, 0].map(one_hot);
    let stopped = decide(Policy::Keyed { seed: 0 }, true, &rows, Limits { tokens: 9, stop: &[1] });
    assert_eq!((stopped.path, stopped.tokens), (vec![0], vec![1]));
    let limited = decide(Policy::Keyed { seed: 0 }, true, &rows, Limits { tokens: 2, stop: &[] });
    assert_eq!((limited.path, limited.tokens), (vec![0, 1], vec![1, 2]));
    let typical = Policy::Typical { epsilon: 0.09, alpha: 0.3 };
    let stopped = decide(typical, false, &rows, Limits { tokens: 9, stop: &[2] });
    assert_eq!((stopped.path, stopped.tokens), (vec![0, 1], vec![1, 2]));
}

#[test]
fn keyed_choices_depend_on_the_position_alone() {
    let mut next = keyed_stream(3, 1);
    let mut row = || (0..3).map(|_| (next() % 100) as f64 / 25.0).collect::<Vec<f64>>();
    for seed in 0..50 {
        let rows: Vec<Vec<f64>> = (0..5).map(|_| row()).collect();
        let verdict = decide(Policy::Keyed { seed }, false, &rows, EVERYTHING);
        for (offset, (&node, &token)) in verdict.path.iter().zip(&verdict.tokens).enumerate() {
            assert_eq!(token, keyed_choice(seed, 10 + offset, &rows[node]));
        }
    }
}

/// Takes every way that chance can, one after the other, and remembers how likely it was.
#[derive(Default)]
struct EveryWay {
    /// Choices of this way, and how many there were at each.
    taken: Vec<(usize, usize)>,
    place: usize,
    probability: f64,
}

impl EveryWay {
    fn choose(&mut self, probabilities: &[f64]) -> usize {
        if self.place == self.taken.len() {
            self.taken.push((0, probabilities.len()));
        }
        let choice = self.taken[self.place].0;
        self.place += 1;
        self.probability *= probabilities[choice];
        choice
    }

    /// Goes on to the next way; false after the last.
    fn next(&mut self) -> bool {
        while let Some((choice, count)) = self.taken.pop() {
            if choice + 1 < count {
                self.taken.push((choice + 1, count));
                return true;
            }
        }
        false
    }
}

impl Chance for EveryWay {
    fn happens(&mut self, probability: f64) -> bool {
        self.choose(&[probability, 1.0 - probability]) == 0
    }

    fn draw(&mut self, probabilities: &[f64]) -> usize {
        self.choose(probabilities)
    }
}

/// Exact distribution of what `run` returns over all its chances.
fn law(run: &dyn Fn(&mut EveryWay) -> u32) -> Vec<f64> {
    let (mut law, mut ways) = (vec![0.0; 5], EveryWay::default());
    loop {
        (ways.place, ways.probability) = (0, 1.0);
        let token = run(&mut ways);
        law[token as usize] += ways.probability;
        if !ways.next() {
            return law;
        }
    }
}

fn assert_close(got: &[f64], want: &[f64], what: &str) {
    let most = got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, f64::max);
    assert!(most < 1e-12, "{what}: off by {most:e}: {got:?} {want:?}");
}

fn distributions(count: usize) -> Vec<[Vec<f64>; 2]> {
    let mut next = keyed_stream(8, 2);
    let mut one = |sharp: i32| {
        let weights: Vec<f64> = (0..5).map(|_| ((next() % 1000) as f64 / 1000.0).powi(sharp)).collect();
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|weight| weight / sum).collect::<Vec<f64>>()
    };
    let mut pairs: Vec<[Vec<f64>; 2]> = (0..count).map(|at| [one(1 + at as i32 % 4), one(1 + at as i32 % 3)]).collect();
    // Tokens that one of the two never gives, and the two alike.
    pairs.push([vec![0.5, 0.5, 0.0, 0.0, 0.0], vec![0.0, 0.0, 0.2, 0.3, 0.5]]);
    pairs.push([vec![0.1, 0.2, 0.3, 0.4, 0.0], vec![0.1, 0.2, 0.3, 0.4, 0.0]]);
    pairs.push([vec![0.0, 0.0, 1.0, 0.0, 0.0], vec![0.2; 5]]);
    pairs
}

#[test]
fn picked_guesses_leave_the_targets_distribution() {
    for (at, [target, _]) in distributions(20).into_iter().enumerate() {
        for guesses in [&[][..], &[3], &[1, 0], &[4, 2, 0], &[0, 1, 2, 3, 4]] {
            let law = law(&|ways| couple(target.clone(), guesses, None, ways).unwrap());
            assert_close(&law, &target, &format!("distribution {at}, guesses {guesses:?}"));
        }
    }
}

#[test]
fn drawn_guesses_leave_the_targets_distribution() {
    for (at, [target, draft]) in distributions(12).into_iter().enumerate() {
        for count in 1..=3 {
            let law = law(&|ways| {
                // Draw guesses one after the other without putting back, as a draft does.
                let (mut guesses, mut rest) = (Vec::new(), draft.clone());
                for _ in 0..count.min(draft.iter().filter(|&&q| q > 0.0).count()) {
                    let guess = ways.draw(&rest);
                    guesses.push(guess as u32);
                    rest[guess] = 0.0;
                    normalise(&mut rest);
                }
                couple(target.clone(), &guesses, Some(&draft), ways).unwrap()
            });
            assert_close(&law, &target, &format!("distributions {at}, {count} guesses"));
        }
    }
}

/// The test above can fail: a coupling that forgets to take a failed guess out of the draft is found.
#[test]
fn a_wrong_coupling_has_another_law() {
    let [target, draft] = distributions(1).remove(0);
    let wrong = law(&|ways| {
        let (mut rest, first) = (draft.clone(), ways.draw(&draft));
        rest[first] = 0.0;
        normalise(&mut rest);
        let second = ways.draw(&rest);
        // Both tried against the first distribution.
        let [mut left, _] = [target.clone(), draft.clone()];
        for guess in [first, second] {
            if draft[guess] > 0.0 && ways.happens((left[guess] / draft[guess]).min(1.0)) {
                return guess as u32;
            }
            left.iter_mut().zip(&draft).for_each(|(p, q)| *p = (*p - q).max(0.0));
            normalise(&mut left);
        }
        ways.draw(&left) as u32
    });
    let most = wrong.iter().zip(&target).map(|(got, want)| (got - want).abs()).fold(0.0, f64::max);
    assert!(most > 1e-3, "only {most}");
}

#[test]
fn keyed_chances_follow_the_targets_distribution() {
    let row: Vec<f64> = [0.1f64, 0.2, 0.3, 0.05, 0.35].iter().map(|p| p.ln()).collect();
    let mut tree = TokenTree::root(0);
    tree.push(0, 4);
    tree.push(0, 1);
    let (draws, mut seen) = (20_000u64, [0.0; 5]);
    for seed in 0..draws {
        let proposal = Proposal::picked(tree.clone(), vec![0.0; 3]);
        let mut rows = Written(vec![row.clone(); 3]);
        let verdict = verify(Policy::Maximal { seed }, false, &proposal, (7, 0), EVERYTHING, &mut rows).unwrap();
        seen[verdict.tokens[0] as usize] += 1.0;
    }
    let want = softmax(&row);
    let chi_square: f64 =
        seen.iter().zip(want).map(|(seen, p)| (seen - p * draws as f64).powi(2) / (p * draws as f64)).sum();
    // 99.9 % quantile of four degrees of freedom.
    assert!(chi_square < 18.5, "chi square {chi_square}");
}

/// Nodes of every kind at once choose what each chooses alone: picked and drawn guesses, none, some that were offered with
/// probability zero, distributions that agree, tokens that are ruled out.
#[test]
fn many_nodes_are_coupled_as_each_alone() {
    const SIZE: usize = 9;
    let mut next = keyed_stream(8, 4);
    let mut random = || (next() >> 11) as f64 * 2f64.powi(-53);
    let (mut rows, mut guesses, mut drafts) = (Vec::new(), Vec::new(), Vec::new());
    for node in 0..240usize {
        let mut row: Vec<f64> = (0..SIZE).map(|_| 4.0 * random()).collect();
        row[node % SIZE] = f64::NEG_INFINITY;
        let mut draft: Vec<f64> = (0..SIZE).map(|_| random()).collect();
        draft[(node + 2) % SIZE] = 0.0;
        normalise(&mut draft);
        if node % 7 == 0 {
            draft = softmax(&row);
        }
        let mut tokens: Vec<u32> = (0..SIZE as u32).collect();
        tokens.sort_by(|a, b| draft[*b as usize].total_cmp(&draft[*a as usize]));
        tokens.rotate_left(node % 3);
        tokens.truncate(node % 5);
        drafts.push((node % 2 == 0).then(|| Rc::new(Tensor::from_slice(&draft))));
        rows.push(row);
        guesses.push(tokens);
    }
    let place = |node: usize| (5u64, 100 + node as u64);
    let nodes: Vec<Node<'_>> = (0..rows.len())
        .map(|node| Node { place: place(node), guesses: guesses[node].clone(), drawn_from: drafts[node].as_ref() })
        .collect();
    let table = Tensor::from_slice(&rows.concat()).view([-1, SIZE as i64]);
    let got: Vec<i64> = Vec::try_from(many_rows::couple(&table, &nodes).unwrap()).unwrap();
    let mut seen = [0; 2];
    for (node, &got) in got.iter().enumerate() {
        let (seed, position) = place(node);
        let mut chance = KeyedChance { seed, position, taken: 0 };
        let draft = drafts[node].as_ref().map(|draft| Vec::<f64>::try_from(&**draft).unwrap());
        let want = couple(softmax(&rows[node]), &guesses[node], draft.as_deref(), &mut chance).unwrap();
        assert_eq!(got, i64::from(want), "node {node}: {:?} {:?} {draft:?}", rows[node], guesses[node]);
        seen[usize::from(guesses[node].contains(&want))] += 1;
    }
    assert!(seen.iter().all(|&count| count > 30), "{seen:?}");
    let broken = Tensor::full([1, SIZE as i64], f64::NAN, (Kind::Double, Device::Cpu));
    assert_eq!(many_rows::couple(&broken, &nodes[..1]).unwrap().int64_value(&[0]), -1);
}

/// The tree above with rows that choose 1, then neither guess behind it.
fn gate(policy: Policy, entropies: [f64; 5]) -> Verdict {
    // Behind token 1: 1 itself is likeliest, then 2, then 0.
    let rows = [one_hot(1), vec![1.0, 3.0, 2.0], one_hot(0), one_hot(0), one_hot(0)];
    let proposal = Proposal::picked(tree(), vec![0.0; 5]).with_entropies(Some(entropies.to_vec()));
    verify(policy, true, &proposal, (10, 0), EVERYTHING, &mut Written(rows.to_vec())).unwrap()
}

#[test]
fn gates_keep_what_the_target_would_not_choose_and_say_so() {
    const UNSURE: [f64; 5] = [9.0; 5];
    let rank = |k| gate(Policy::Rank { k, seed: 0 }, UNSURE);
    // The likeliest alone is what the target chooses anyway.
    let strict = rank(1);
    assert_eq!((&strict.path[..], &strict.tokens[..]), (&[0, 1][..], &[1, 1][..]));
    assert_eq!((&strict.sources[..], strict.unverified.len()), (&[Source::Accepted, Source::Correction][..], 0));
    // Token 2 is the second: node 3 stays, and the target goes on behind it.
    let second = rank(2);
    assert_eq!((&second.path[..], &second.tokens[..]), (&[0, 1, 3][..], &[1, 2, 0][..]));
    assert_eq!(
        (&second.sources[..], &second.unverified[..]),
        (&[Source::Accepted, Source::Accepted, Source::Bonus][..], &[1][..])
    );
    // With three to choose from the first guess in order stays.
    assert_eq!(rank(3).tokens, [1, 0, 0]);
    let entropy = |most, entropies| gate(Policy::Entropy { most, seed: 0 }, entropies);
    assert_eq!(entropy(0.5, UNSURE), strict);
    assert_eq!(entropy(0.5, [9.0, 9.0, 9.0, 0.5, 9.0]), second);
    // The target's own choice comes first, whatever the draft is sure of.
    assert_eq!(entropy(0.5, [0.0, 9.0, 9.0, 9.0, 0.0]), strict);
    let silent = Proposal::picked(tree(), vec![0.0; 5]);
    let (policy, mut rows) = (Policy::Entropy { most: 1.0, seed: 0 }, Written(vec![one_hot(1); 5]));
    let error = verify(policy, true, &silent, (10, 0), EVERYTHING, &mut rows).unwrap_err();
    assert!(error.to_string().contains("does not say how sure it is"), "{error}");
    assert!(!policy.is_lossless() && !Policy::Rank { k: 2, seed: 0 }.is_lossless());
}

/// Under noise the target's own choice is that of `keyed`.
#[test]
fn a_gate_that_lets_nothing_pass_is_the_lossless_policy() {
    let mut next = keyed_stream(4, 2);
    for seed in 0..200 {
        let rows: Vec<Vec<f64>> = (0..5).map(|_| (0..3).map(|_| (next() % 5) as f64).collect()).collect();
        let proposal = Proposal::picked(tree(), vec![0.0; 5]).with_entropies(Some(vec![1.0; 5]));
        let decide =
            |policy| verify(policy, false, &proposal, (10, 3), EVERYTHING, &mut Written(rows.clone())).unwrap();
        assert_eq!(decide(Policy::Entropy { most: 0.9, seed }), decide(Policy::Keyed { seed }));
        let ranked = decide(Policy::Rank { k: 2, seed });
        let longer = ranked.tokens.len() >= decide(Policy::Keyed { seed }).tokens.len();
        assert!(longer || !ranked.unverified.is_empty());
    }
}
