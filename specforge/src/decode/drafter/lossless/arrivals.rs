//! Requests that arrive while others are in the middle of their rounds: whoever is there, each gets what it gets alone, and
//! after every round all caches are those of a fresh prefill.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use super::super::medusa::heads_for_tests;
use super::*;
use crate::tree::ChoiceTree;

/// A drafter that is looked at while it works.
struct Watched<D>(Rc<RefCell<D>>);

impl<D: Drafter> Drafter for Watched<D> {
    fn capture(&self) -> Vec<usize> {
        self.0.borrow().capture()
    }

    fn join(&mut self, rows: &[Joining<'_>]) -> Result<()> {
        self.0.borrow_mut().join(rows)
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        self.0.borrow_mut().propose(rows)
    }

    fn commit(&mut self, rows: &[Progress<'_>]) -> Result<()> {
        self.0.borrow_mut().commit(rows)
    }

    fn retain(&mut self, rows: &[usize]) {
        self.0.borrow_mut().retain(rows);
    }

    fn cache_lengths(&self) -> Vec<i64> {
        self.0.borrow().cache_lengths()
    }
}

fn arriving() -> Vec<Request> {
    let mut next = noise::keyed_stream(7, 1);
    let request = |tag: u64| {
        let length = 1 + next() % 9 * (tag % 3);
        let prompt = (0..length).map(|_| (next() % 64) as u32).collect();
        Request { tag, prompt, max_new_tokens: 4 + next() as usize % 11, key: tag * 1000 }
    };
    (0..6).map(request).collect()
}

/// Who is submitted before which step: all at once, one by one, in bursts, the last ones first.
fn schedules() -> [Vec<(usize, usize)>; 4] {
    [
        (0..6).map(|tag| (0, tag)).collect(),
        (0..6).map(|tag| (tag, tag)).collect(),
        vec![(0, 4), (1, 1), (1, 3), (4, 0), (4, 5), (5, 2)],
        (0..6).map(|place| (2 * place, 5 - place)).collect(),
    ]
}

/// Looks at a drafter, a row and its tokens.
pub(super) type Look<'a, D> = &'a dyn Fn(&D, usize, &[u32]);

/// Decodes with a drafter, and looks at all caches after every step where that is asked for.
fn decode<D: Drafter>(
    target: &LlamaTarget,
    drafter: D,
    options: &EngineOptions,
    schedule: &[(usize, usize)],
    look: Option<Look<'_, D>>,
) -> Vec<Decoded> {
    let shared = Rc::new(RefCell::new(drafter));
    let mut engine = Engine::new(target, Box::new(Watched(Rc::clone(&shared))), options.clone()).unwrap();
    let requests = arriving();
    let mut done = BTreeMap::new();
    let mut to_come = schedule.iter().peekable();
    for step in 0.. {
        while let Some(&(_, tag)) = to_come.next_if(|(at, _)| *at <= step) {
            engine.submit(requests[tag].clone()).unwrap();
        }
        for left in engine.step(&mut Silent).unwrap() {
            assert!(done.insert(left.tag, left.decoded.unwrap()).is_none(), "answered twice");
        }
        assert!(engine.running().count() <= options.max_rows && step < 200);
        for (row, (_, tokens)) in engine.running().enumerate().filter(|_| look.is_some()) {
            let (cache, held) = (engine.cache().unwrap(), &tokens[..tokens.len() - 1]);
            assert_eq!(cache.lengths()[row], held.len() as i64);
            equals_fresh(cache, row, prefilled(target, held, &[]).0, &format!("target, step {step}, row {row}"));
            look.iter().for_each(|look| look(&shared.borrow(), row, tokens));
        }
        if done.len() == requests.len() {
            break;
        }
    }
    done.into_values().collect()
}

/// Every schedule, every number of rows, both ways to choose, against each request alone and without a draft.
pub(super) fn everywhere<D: Drafter>(
    target: &LlamaTarget,
    new: &dyn Fn(DraftSampling) -> D,
    look: Option<Look<'_, D>>,
) {
    let mut guessed = 0;
    for temperature in [0.0, 1.0] {
        let keyed = |rows| options(Policy::Keyed { seed: SEED }, temperature, rows);
        let alone = texts(&decode(target, Plain, &keyed(1), &schedules()[0], None));
        for rows in 1..=4 {
            for (index, schedule) in schedules().iter().enumerate() {
                // A look at everything takes its time: every second decode.
                let look = look.filter(|_| (rows + index) % 2 == 0);
                let decoded = decode(target, new(sampling(temperature)), &keyed(rows), schedule, look);
                assert_eq!(texts(&decoded), alone, "temperature {temperature}, {rows} rows, schedule {index}");
                guessed += accepted(&decoded);
            }
        }
    }
    assert!(guessed > 0, "no guess was right");
}

#[test]
fn with_an_eagle3_draft() {
    let target = target(4, 6.0, Kind::Double);
    let capture = vec![0, 1, 2];
    let look = |drafter: &Eagle3Drafter, row: usize, tokens: &[u32]| {
        let mut fresh = eagle3(&target, 1, true, SMALL, sampling(1.0));
        let (_, features) = prefilled(&target, &tokens[..tokens.len() - 1], &capture);
        fresh.join(&[Joining { tokens, features }]).unwrap();
        let (running, fresh) = (drafter.rows.as_ref().unwrap(), fresh.rows.unwrap());
        near(
            [running.last.get(row as i64), running.last.get(row as i64)],
            [fresh.last.get(0), fresh.last.get(0)],
            "last",
        );
        equals_fresh(&running.cache, row, fresh.cache, &format!("draft, row {row}"));
    };
    everywhere(&target, &|sampling| eagle3(&target, 1, true, SMALL, sampling), Some(&look));
}

#[test]
fn with_a_peagle_draft() {
    let target = target(4, 6.0, Kind::Double);
    let capture = vec![0, 1, 2];
    let look = |drafter: &PeagleDrafter, row: usize, tokens: &[u32]| {
        let mut fresh = peagle(&target, 2, SMALL, sampling(1.0));
        let (_, features) = prefilled(&target, &tokens[..tokens.len() - 1], &capture);
        fresh.join(&[Joining { tokens, features }]).unwrap();
        let (running, fresh) = (drafter.rows.as_ref().unwrap(), fresh.rows.unwrap());
        let [got, want] = [running.outputs.get(row as i64), fresh.outputs.get(0)];
        near([got.shallow_clone(), got], [want.shallow_clone(), want], "outputs");
        equals_fresh(&running.cache, row, fresh.cache, &format!("draft, row {row}"));
    };
    everywhere(&target, &|sampling| peagle(&target, 2, SMALL, sampling), Some(&look));
}

#[test]
fn with_a_draft_model() {
    let target = target(4, 6.0, Kind::Double);
    let small = || tiny::target_with(4, &|name, tensor| if name == "lm_head.weight" { tensor * 5.0 } else { tensor });
    let own = small();
    let look = |drafter: &ModelDrafter<'_>, row: usize, tokens: &[u32]| {
        let running = drafter.rows.as_ref().unwrap();
        assert_eq!(running.cache.lengths()[row], running.known[row]);
        equals_fresh(&running.cache, row, prefilled(&own, tokens, &[]).0, &format!("draft, row {row}"));
    };
    everywhere(&target, &|sampling| model(small(), &target, SMALL, sampling), Some(&look));
}

#[test]
fn with_medusa_heads() {
    let target = heads_for_tests::target();
    let tree =
        ChoiceTree::from_choices(&[vec![0], vec![1], vec![0, 0], vec![0, 1], vec![1, 0], vec![0, 0, 0]]).unwrap();
    let new = |sampling| MedusaDrafter::new(heads_for_tests::good(&target, 3, 0.3), &tree, sampling);
    let look = |_: &MedusaDrafter, _: usize, _: &[u32]| {};
    everywhere(&target, &new, Some(&look));
}

#[test]
fn with_a_draft_beside_a_lookup() {
    let target = target(4, 6.0, Kind::Double);
    let tree = DynamicTree { depth: 3, top_k: 2, nodes: 6, min_probability: 0.0 };
    let new = |sampling| super::with_lookup(&target, tree, sampling);
    let look = |_: &WithLookup<'_>, _: usize, _: &[u32]| {};
    everywhere(&target, &new, Some(&look));
}

#[test]
fn with_prompt_lookup() {
    let target = target(4, 6.0, Kind::Double);
    let new = |_: DraftSampling| PromptLookup { longest_match: 2, shortest_match: 1, depth: 3, nodes: 6 };
    let look = |_: &PromptLookup, _: usize, _: &[u32]| {};
    everywhere(&target, &new, Some(&look));
}
