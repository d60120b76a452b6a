use std::collections::HashMap;

use super::*;
use crate::nn::processors::softmax;

const OUT: f64 = f64::NEG_INFINITY;

/// Logits behind a path of guesses, of the row with a key.
type Logits = Box<dyn Fn(u64, &[u32]) -> Vec<f64>>;

/// A draft that is a table: logits behind every path of guesses, of one row for each key.
struct Table {
    logits: Logits,
    keys: Vec<u64>,
    /// Paths of the level before.
    paths: Vec<Vec<Vec<u32>>>,
    run: usize,
}

impl Table {
    fn new(keys: &[u64], logits: impl Fn(u64, &[u32]) -> Vec<f64> + 'static) -> Self {
        let paths = keys.iter().map(|_| vec![vec![]]).collect();
        Self { logits: Box::new(logits), keys: keys.to_vec(), paths, run: 0 }
    }

    fn rows(&self) -> Tensor {
        let width = self.paths.iter().map(Vec::len).max().unwrap();
        let size = (self.logits)(0, &[]).len();
        let mut values = Vec::new();
        for (paths, &key) in self.paths.iter().zip(&self.keys) {
            for place in 0..width {
                // Padding must not be looked at.
                values.extend(paths.get(place).map_or(vec![f64::NAN; size], |path| (self.logits)(key, path)));
            }
        }
        Tensor::from_slice(&values).view([self.keys.len() as i64, width as i64, size as i64])
    }
}

impl Expand for Table {
    fn start(&mut self) -> Result<Tensor> {
        Ok(self.rows().squeeze_dim(1))
    }

    fn expand(&mut self, frontier: &[Vec<Branch>]) -> Result<Tensor> {
        for (paths, branches) in self.paths.iter_mut().zip(frontier) {
            let next = branches.iter().map(|branch| {
                let mut path = paths[branch.parent].clone();
                path.push(branch.token);
                path
            });
            *paths = next.collect();
            self.run += branches.len();
        }
        Ok(self.rows())
    }
}

fn names(target_size: i64) -> Names {
    Names::new(target_size, None)
}

fn contexts<'a>(tokens: &'a [u32], keys: &[u64], depth: usize) -> Vec<Context<'a>> {
    keys.iter().map(|&key| Context { tokens, depth, key, temperature: 0.0 }).collect()
}

fn grown(tree: DynamicTree, draft: &mut Table, size: i64) -> Vec<Proposal> {
    tree.check().unwrap();
    let keys = draft.keys.clone();
    grow(&tree, DraftSampling::Greedy, &names(size), &contexts(&[3, 4], &keys, 100), draft).unwrap()
}

/// Random logits of a path.
fn dice(key: u64, path: &[u32], size: usize, scale: f64) -> Vec<f64> {
    let seed = path.iter().fold(key, |seed, &token| noise::keyed_bits(seed, 9, 0, u64::from(token)));
    (0..size as u64).map(|token| scale * noise::keyed_gumbel(seed, 10, 0, token)).collect()
}

fn log_softmax(row: &[f64]) -> Vec<f64> {
    softmax(row).into_iter().map(f64::ln).collect()
}

/// The reference's way, written out: everything is run, all children of a level are ranked, the best of all are kept.
fn written_out(tree: DynamicTree, size: usize, logits: &dyn Fn(&[u32]) -> Vec<f64>) -> Vec<(Vec<u32>, f64)> {
    let best = |row: &[f64]| {
        let mut order: Vec<usize> = (0..size).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        order.truncate(tree.top_k);
        order
    };
    let mut tried: Vec<(Vec<u32>, f64)> = Vec::new();
    let mut frontier: Vec<(Vec<u32>, f64)> = vec![(vec![], 0.0)];
    for _ in 0..tree.depth {
        let mut children = Vec::new();
        for (path, score) in &frontier {
            let row = log_softmax(&logits(path));
            for token in best(&row) {
                let mut child = path.clone();
                child.push(token as u32);
                children.push((child, score + row[token]));
            }
        }
        tried.extend(children.clone());
        children.sort_by(|a, b| b.1.total_cmp(&a.1));
        children.truncate(tree.top_k);
        frontier = children;
    }
    let mut order: Vec<usize> = (0..tried.len()).collect();
    order.sort_by(|&a, &b| tried[b].1.total_cmp(&tried[a].1).then(tried[a].0.len().cmp(&tried[b].0.len())));
    order.truncate(tree.nodes);
    order.sort_unstable();
    order.into_iter().map(|index| tried[index].clone()).collect()
}

fn paths(proposal: &Proposal) -> Vec<(Vec<u32>, f64)> {
    let topology = proposal.tree.topology();
    (1..proposal.tree.len())
        .map(|node| {
            let path = topology.path(node)[1..].iter().map(|&node| proposal.tree.tokens()[node]).collect();
            (path, proposal.scores[node])
        })
        .collect()
}

#[test]
fn the_best_of_everything_tried_are_kept() {
    let keys = [1, 2, 3];
    for (depth, top_k, nodes) in [(1, 1, 1), (4, 1, 4), (3, 3, 7), (5, 4, 25), (4, 12, 64), (6, 10, 128), (3, 2, 1000)]
    {
        let tree = DynamicTree { depth, top_k, nodes, min_probability: 0.0 };
        for scale in [0.3, 1.0, 4.0] {
            let mut draft = Table::new(&keys, move |key, path| dice(key, path, 12, scale));
            let proposals = grown(tree, &mut draft, 12);
            for (proposal, &key) in proposals.iter().zip(&keys) {
                let want = written_out(tree, 12, &|path| dice(key, path, 12, scale));
                let got = paths(proposal);
                let tokens = |paths: &[(Vec<u32>, f64)]| paths.iter().map(|(path, _)| path.clone()).collect::<Vec<_>>();
                assert_eq!(tokens(&got), tokens(&want), "{tree:?}, {scale}");
                assert!(got.iter().zip(&want).all(|(got, want)| (got.1 - want.1).abs() < 1e-12));
                assert_eq!((proposal.tree.tokens()[0], proposal.scores[0]), (4, 0.0));
            }
            // The reference runs the frontier of every level but the last.
            assert!(draft.run <= keys.len() * top_k * (depth - 1));
        }
    }
}

#[test]
fn equals_stay_behind_their_parents() {
    let cases = [
        ("alike", vec![0.25; 6], 9),
        ("certain", vec![0.0, OUT, OUT, OUT, OUT, OUT], 4),
        ("half", vec![OUT, 1.0, OUT, 1.0, OUT, 1.0], 9),
        ("nothing", vec![OUT; 6], 0),
        ("no number", vec![f64::NAN, 1.0, 2.0, 0.0, 0.0, 0.0], 0),
        ("negative zero", vec![-0.0, OUT, OUT, OUT, OUT, OUT], 4),
    ];
    for (name, row, guesses) in cases {
        let tree = DynamicTree { depth: 4, top_k: 3, nodes: 9, min_probability: 0.0 };
        let proposals = grown(tree, &mut Table::new(&[1], move |_, _| row.clone()), 6);
        assert_eq!(proposals[0].tree.len(), guesses + 1, "{name}");
        assert!(proposals[0].scores.iter().all(|score| score.is_finite() && !score.is_sign_negative() || *score < 0.0));
    }
}

#[test]
fn unlikely_guesses_are_left_out() {
    let row = vec![0.6f64.ln(), 0.3f64.ln(), 0.1f64.ln()];
    let tree = DynamicTree { depth: 4, top_k: 3, nodes: 40, min_probability: 0.15 };
    let proposals = grown(tree, &mut Table::new(&[1], move |_, _| row.clone()), 3);
    // 0.6, 0.3; 0.36, 0.18, 0.18; 0.216; nothing of 0.13
    let tokens: Vec<Vec<u32>> = paths(&proposals[0]).into_iter().map(|(path, _)| path).collect();
    assert_eq!(tokens, [vec![0], vec![1], vec![0, 0], vec![0, 1], vec![1, 0], vec![0, 0, 0]]);
}

#[test]
fn every_row_has_its_own_depth_and_names() {
    let names = Names::new(50, Some(vec![7, 20, 33, 49]));
    let tree = DynamicTree { depth: 3, top_k: 2, nodes: 6, min_probability: 0.0 };
    let tokens = [1];
    let rows: Vec<Context<'_>> =
        [0, 3, 1].map(|depth| Context { tokens: &tokens, depth, key: 0, temperature: 0.0 }).to_vec();
    let table = || Table::new(&[1, 2, 3], |_, _| vec![0.0, 3.0, 1.0, 2.0]);
    let proposals = grow(&tree, DraftSampling::Greedy, &names, &rows, &mut table()).unwrap();
    assert_eq!(proposals[0].tree.tokens(), [1]);
    assert_eq!(proposals[1].tree.topology().depth(), 3);
    assert_eq!(proposals[2].tree.tokens(), [1, 20, 49]);
    let wrong = Names::new(5, None);
    let error = grow(&tree, DraftSampling::Greedy, &wrong, &rows, &mut table()).unwrap_err();
    assert!(error.to_string().contains("4 logits"));
}

/// A chain drafted from the target's own logits with the target's noise is what the target chooses.
#[test]
fn known_noise_makes_a_perfect_draft_perfect() {
    let (temperature, seed, key) = (0.7, 11, 1000);
    let target = |path: &[u32]| dice(5, path, 30, 1.0);
    let committed = [3, 4, 9];
    let rows = [Context { tokens: &committed, depth: 100, key, temperature: 0.0 }];
    let sampling = DraftSampling::Keyed { temperature, seed };
    let mut draft = Table::new(&[key], move |_, path| target(path));
    let proposals = grow(&DynamicTree::chain(6), sampling, &names(30), &rows, &mut draft).unwrap();
    let mut path = Vec::new();
    for depth in 0..6 {
        let row: Vec<f64> = target(&path).into_iter().map(|logit| logit / temperature).collect();
        path.push(crate::decode::policy::keyed_choice(seed + key, committed.len() + depth, &row));
    }
    assert_eq!(proposals[0].tree.tokens()[1..], path);
}

/// How often each token is drawn first and second is what drawing without putting back says, and the shape never changes.
#[test]
fn drawn_guesses_follow_their_distribution() {
    let logits = [1.0, 0.0, -1.0, 0.5];
    let temperature = 0.8;
    let names = Names::new(9, Some(vec![1, 3, 5, 8]));
    let probabilities = softmax(&logits.map(|logit| logit / temperature));
    let tree = DynamicTree { depth: 3, top_k: 2, nodes: 5, min_probability: 0.0 };
    let mut counts: HashMap<(u32, u32), f64> = HashMap::new();
    let trials = 4000;
    for seed in 0..trials {
        let mut draft = Table::new(&[0], move |_, _| logits.to_vec());
        let rows = contexts(&[2], &[0], 100);
        let sampling = DraftSampling::Drawn { temperature, seed };
        let proposal = grow(&tree, sampling, &names, &rows, &mut draft).unwrap().remove(0);
        assert_eq!(proposal.tree.topology().parents(), [0, 0, 0, 1, 1, 2]);
        let expanded: Vec<bool> = proposal.drawn_from.iter().map(Option::is_some).collect();
        assert_eq!(expanded, [true, true, true, false, false, false]);
        let offered: Vec<f64> = Vec::try_from(&**proposal.drawn_from[2].as_ref().unwrap()).unwrap();
        assert!((offered.iter().sum::<f64>() - 1.0).abs() < 1e-12 && (offered[8] - probabilities[3]).abs() < 1e-12);
        let tokens = proposal.tree.tokens();
        *counts.entry((tokens[1], tokens[2])).or_default() += 1.0;
    }
    let place = |token: u32| [1, 3, 5, 8].iter().position(|&id| id == token).unwrap();
    let chi_square: f64 = counts
        .iter()
        .map(|(&(first, second), count)| {
            let (p, q) = (probabilities[place(first)], probabilities[place(second)]);
            let expected = trials as f64 * p * q / (1.0 - p);
            (count - expected).powi(2) / expected
        })
        .sum();
    assert_eq!(counts.len(), 12);
    assert!(chi_square < 31.3, "chi square {chi_square} of 11 degrees of freedom");
}

#[test]
fn options_that_mean_nothing_are_refused() {
    for (tree, key) in [
        (DynamicTree { depth: 0, ..DynamicTree::default() }, "depth"),
        (DynamicTree { top_k: 0, ..DynamicTree::default() }, "top_k"),
        (DynamicTree { nodes: 0, ..DynamicTree::default() }, "nodes"),
        (DynamicTree { min_probability: 1.0, ..DynamicTree::default() }, "min_probability"),
        (DynamicTree { min_probability: f64::NAN, ..DynamicTree::default() }, "min_probability"),
    ] {
        assert!(tree.check().unwrap_err().to_string().contains(key));
    }
    assert!(DraftSampling::Keyed { temperature: 0.0, seed: 1 }.check().is_err());
    assert!(DraftSampling::Drawn { temperature: f64::NAN, seed: 1 }.check().is_err());
    assert_eq!(DraftSampling::for_policy(crate::decode::Policy::Keyed { seed: 4 }, 0.0), DraftSampling::Greedy);
}
