//! Rounds that verify no more than is worth it: the same text, in fewer tokens.

use std::collections::HashMap;

use super::super::confident::Confident;
use super::super::drafter::{Context, Joining, Plain, Progress, PromptLookup, last};
use super::super::event::{Committed, Round, Silent};
use super::super::tiny;
use super::super::verify_budget::{Additive, Limits, StepCosts, StepTable};
use super::*;
use crate::data::Finish;
use crate::nn::noise::keyed_stream;
use crate::tree::TokenTree;

/// Temperatures of the slots; four tokens are drafted.
const TEMPERATURES: [f64; 4] = [1.0, 2.0, 3.0, 0.5];

fn requests() -> Vec<Request> {
    let mut next = keyed_stream(5, 2);
    let mut request = |tag: u64| {
        // No prompt begins another one.
        let prompt = (0..2 + tag % 5).map(|place| if place == 0 { tag as u32 + 9 } else { (next() % 64) as u32 });
        Request { tag, prompt: prompt.collect(), max_new_tokens: 8 + next() as usize % 25, key: tag * 1000 }
    };
    (0..9).map(&mut request).collect()
}

fn options(temperature: f64, max_rows: usize) -> EngineOptions {
    let processors = Processors::at_temperature(temperature);
    EngineOptions { processors, policy: Policy::Keyed { seed: 3 }, stop_tokens: vec![7, 8], max_rows }
}

/// Guesses that were verified in each round of the batch, request by request.
#[derive(Default)]
struct Verified(Vec<Vec<usize>>, bool);

impl Listener for Verified {
    fn round(&mut self, event: &Round<'_>) -> Result<()> {
        if !std::mem::replace(&mut self.1, true) {
            self.0.push(Vec::new());
        }
        let guesses = event.tree.len() - 1;
        assert_eq!(event.confidence.map_or(0, <[f32]>::len), guesses);
        self.0.last_mut().unwrap().push(guesses);
        Ok(())
    }

    fn committed(&mut self, _event: &Committed<'_>) -> Result<()> {
        self.1 = false;
        Ok(())
    }
}

type Text = (Vec<u32>, Finish);

fn decode(engine: Engine<'_>, listener: &mut dyn Listener) -> Vec<Text> {
    let mut engine = engine;
    requests().into_iter().for_each(|request| engine.submit(request).unwrap());
    let decoded = engine.run(listener).unwrap().into_iter().map(|left| left.decoded.unwrap());
    decoded.map(|decoded| (decoded.tokens, decoded.finish)).collect()
}

/// Each token more costs as much as a share of a step of one token.
fn priced(share: f64) -> StepCosts {
    StepCosts::Additive(Additive {
        bias_seconds: 1.0,
        bs_probes: vec![1],
        alpha_seconds: vec![0.0],
        m_probes: vec![1, 101],
        theta_seconds: vec![0.0, 100.0 * share],
    })
}

fn unmeasured() -> StepCosts {
    StepCosts::Table(StepTable { sample_batch_tokens: vec![1], sample_steps_per_sec: vec![1.0], max_batch_tokens: 45 })
}

fn budget(costs: StepCosts) -> VerifyBudget {
    VerifyBudget::new(TEMPERATURES.to_vec(), costs, Limits::default()).unwrap()
}

#[test]
fn every_budget_gives_what_plain_decoding_gives() {
    let target = tiny::target(1);
    for temperature in [0.0, 1.0] {
        let plain = Engine::new(&target, Box::new(Plain), options(temperature, 1)).unwrap();
        let plain = decode(plain, &mut Silent);
        assert!(plain.iter().any(|(_, finish)| *finish == Finish::Stop));
        assert!(plain.iter().any(|(_, finish)| *finish == Finish::Length));
        let prompts = requests().into_iter().map(|request| request.prompt);
        let answers: HashMap<_, _> = prompts.zip(plain.iter().map(|(tokens, _)| tokens.clone())).collect();
        for rows in [1, 4, 9] {
            let mut means = Vec::new();
            for costs in [None, Some(unmeasured()), Some(priced(0.02)), Some(priced(0.2)), Some(priced(50.0))] {
                let drafter = Box::new(Confident::new(answers.clone(), &TEMPERATURES, 8));
                let engine = Engine::new(&target, drafter, options(temperature, rows)).unwrap();
                let engine = match costs {
                    Some(costs) => engine.with_budget(budget(costs)).unwrap(),
                    None => engine,
                };
                let mut verified = Verified::default();
                assert_eq!(decode(engine, &mut verified), plain, "temperature {temperature}, {rows} rows");
                let all: Vec<usize> = verified.0.concat();
                assert!(verified.0.iter().all(|round| round.len() <= rows) && all.iter().all(|guesses| *guesses <= 4));
                means.push(all.iter().sum::<usize>() as f64 / all.len() as f64);
            }
            let [off, everything, cheap, dear, absurd] = means[..] else { unreachable!() };
            assert_eq!((off, absurd), (everything, 0.0), "{rows} rows");
            assert!(off > cheap && cheap > dear && dear > 0.0, "{rows} rows: {off}, {cheap}, {dear}");
        }
    }
}

#[test]
fn budgets_need_a_draft_that_says_how_sure_it_is() {
    let target = tiny::target(1);
    let engine = |drafter: Box<dyn Drafter>| Engine::new(&target, drafter, options(0.0, 2)).unwrap();
    let lookup = Box::new(PromptLookup { longest_match: 3, shortest_match: 1, depth: 4, nodes: 4 });
    let error = engine(lookup).with_budget(budget(unmeasured())).err().unwrap();
    assert!(error.to_string().contains("no confidence"), "{error}");
    let other = Box::new(Confident::new(HashMap::new(), &[1.0; 3], 1));
    let error = engine(other).with_budget(budget(unmeasured())).err().unwrap();
    assert!(error.to_string().contains("expected 3 temperatures") && error.to_string().contains("got 4"), "{error}");
}

/// Breaks its promise: a tree, or confidences for other guesses than there are.
struct Careless(Proposal);

impl Drafter for Careless {
    fn join(&mut self, _rows: &[Joining<'_>]) -> Result<()> {
        Ok(())
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        let at = |row: &Context<'_>| {
            let mut tree = TokenTree::root(last(row.tokens));
            let topology = self.0.tree.topology();
            (1..self.0.tree.len()).for_each(|node| {
                tree.push(topology.parents()[node], self.0.tree.tokens()[node]);
            });
            Proposal { tree, ..self.0.clone() }
        };
        Ok(rows.iter().map(at).collect())
    }

    fn commit(&mut self, _rows: &[Progress<'_>]) -> Result<()> {
        Ok(())
    }

    fn retain(&mut self, _rows: &[usize]) {}

    fn confident_drafts(&self) -> usize {
        4
    }
}

#[test]
fn confidences_must_fit_the_guesses() {
    let target = tiny::target(1);
    let chain = TokenTree::chain(0, &[1, 2]);
    let mut fork = TokenTree::chain(0, &[1]);
    fork.push(0, 2);
    let picked = |tree: TokenTree| Proposal::picked(tree, vec![0.0; 3]);
    for (proposal, problem) in [
        (picked(chain.clone()), "for each of 2 guesses, got 0"),
        (picked(chain).with_confidence(vec![1.0]), "for each of 2 guesses, got 1"),
        (picked(fork).with_confidence(vec![1.0; 2]), "tree of 2 guesses and depth 1"),
    ] {
        let engine = Engine::new(&target, Box::new(Careless(proposal)), options(0.0, 2)).unwrap();
        let mut engine = engine.with_budget(budget(unmeasured())).unwrap();
        requests().into_iter().take(2).for_each(|request| engine.submit(request).unwrap());
        let error = engine.run(&mut Silent).unwrap_err().to_string();
        assert!(error.contains(problem), "{error}");
    }
}
