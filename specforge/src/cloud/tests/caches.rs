//! After every round both caches hold what a fresh prefill of the tokens they are said to hold gives: content, not length.

use std::cell::RefCell;
use std::rc::Rc;

use super::drafts::model_drafter;
use super::*;
use crate::decode::drafter::{DraftSampling, DynamicTree, ModelDrafter};
use crate::decode::tiny;
use crate::models::{ForwardInput, LogitRows};
use crate::nn::{AttentionMask, KvCache};
use tch::Tensor;

/// What a model keeps of these tokens.
fn fresh(model: &dyn TargetModel, tokens: &[u32]) -> KvCache {
    let _guard = tch::no_grad_guard();
    let held = tokens.len() as i64;
    let mut cache = model.new_cache(1, held);
    let ids: Vec<i64> = tokens.iter().map(|&id| i64::from(id)).collect();
    let ids = Tensor::from_slice(&ids).unsqueeze(0);
    let positions = Tensor::arange(held, (Kind::Int64, Device::Cpu)).unsqueeze(0);
    let mask = &AttentionMask::Causal;
    let input = ForwardInput { ids: &ids, positions: &positions, mask, capture: &[], logits: LogitRows::None };
    model.forward(&input, Some(&mut cache)).unwrap();
    cache.advance(&[held]);
    cache
}

/// The first tokens of a cache's row are those of a fresh prefill.
fn assert_holds((cache, row): (&KvCache, usize), model: &dyn TargetModel, tokens: &[u32]) {
    let want = fresh(model, tokens);
    for layer in 0..cache.layers() {
        for (got, want) in cache.contents(layer, row).iter().zip(want.contents(layer, 0)) {
            let held = got.narrow(1, 0, tokens.len() as i64);
            assert!((held - want).abs().max().double_value(&[]) < 1e-12, "layer {layer}, {} tokens", tokens.len());
        }
    }
}

/// A drafter that is looked at whenever it guesses.
struct Looked {
    inner: Rc<RefCell<ModelDrafter<'static>>>,
    model: LlamaTarget,
    looks: Rc<RefCell<u64>>,
}

impl Drafter for Looked {
    fn join(&mut self, rows: &[Joining<'_>]) -> Result<()> {
        self.inner.borrow_mut().join(rows)
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        let known = self.inner.borrow().cache_lengths()[0];
        assert!(known < rows[0].tokens.len() as i64);
        if known > 0 {
            let inner = self.inner.borrow();
            assert_holds((inner.cache().unwrap(), 0), &self.model, &rows[0].tokens[..known as usize]);
        }
        *self.looks.borrow_mut() += 1;
        let proposals = self.inner.borrow_mut().propose(rows)?;
        let inner = self.inner.borrow();
        // Everything but the next root, and whatever was guessed behind it.
        assert_eq!(inner.cache_lengths()[0], rows[0].tokens.len() as i64 - 1);
        assert_holds((inner.cache().unwrap(), 0), &self.model, rows[0].tokens);
        Ok(proposals)
    }

    fn commit(&mut self, rows: &[Progress<'_>]) -> Result<()> {
        self.inner.borrow_mut().commit(rows)
    }

    fn retain(&mut self, rows: &[usize]) {
        self.inner.borrow_mut().retain(rows);
    }

    fn can_rewind(&self) -> bool {
        true
    }

    fn rewind(&mut self, lengths: &[usize]) -> Result<()> {
        self.inner.borrow_mut().rewind(lengths)
    }
}

/// A network whose cloud is looked at whenever the edge speaks.
struct Watching<'n, 't> {
    network: &'n mut Network<'t>,
    looks: u64,
}

impl Watching<'_, '_> {
    fn look(&mut self) {
        let cloud = &self.network.cloud;
        for session in cloud.sessions.values() {
            let tokens = session.sequence.tokens();
            let held = &tokens[..tokens.len() - 1];
            let (cache, row) = cloud.rows.row(&session.sequence).unwrap();
            assert_eq!(cache.lengths()[row], held.len() as i64);
            assert_holds((cache, row), self.network.target, held);
            self.looks += 1;
        }
    }
}

impl Link for Watching<'_, '_> {
    fn connect(&mut self) -> Result<(), String> {
        self.network.connect()
    }

    fn send(&mut self, message: EdgeMessage) -> Result<(), String> {
        self.look();
        self.network.send(message)
    }

    fn receive(&mut self, patience: Duration) -> Received {
        let received = self.network.receive(patience);
        self.look();
        received
    }

    fn pause(&mut self, time: Duration) {
        self.network.pause(time);
    }

    fn now(&self) -> Duration {
        self.network.now
    }
}

#[test]
fn after_every_round_both_caches_are_those_of_a_fresh_prefill() {
    let target = tiny::target(1);
    let half = |name: &str, tensor: Tensor| match name {
        "model.layers.1.mlp.down_proj.weight" => tensor * 0.5,
        _ => tensor,
    };
    let trees = [DynamicTree::chain(3), DynamicTree { depth: 3, top_k: 3, nodes: 8, min_probability: 0.0 }];
    let looks = Rc::new(RefCell::new(0));
    let mut cloud_looks = 0;
    for seed in 0..24u64 {
        let temperature = (seed % 2) as f64;
        let asked = Asked { prompt: vec![1 + seed as u32, 2, 30], max_new_tokens: 14, temperature, key: seed };
        let want = asked.alone(&target);
        let sampling = DraftSampling::for_policy(asked.choice().policy, temperature);
        let inner = Rc::new(RefCell::new(model_drafter(&target, trees[(seed / 2 % 2) as usize], sampling)));
        let drafter = Looked { inner, model: tiny::target_with(1, &half), looks: Rc::clone(&looks) };
        let rates = match seed % 3 {
            0 => Rates::default(),
            1 => Rates { lost: 100, doubled: 200, late: 200, ..Rates::default() },
            _ => Rates { cut: 100, cloud_killed: 40, ..Rates::default() },
        };
        let progress_after = (seed % 4 == 0).then_some(100 * MS);
        let mut network = Network::new(&target, CloudSettings { progress_after, ..settings() }, rates, seed);
        let mut edge = Edge::new(asked.request(1, seed % 8 != 0), Box::new(drafter));
        let mut watching = Watching { network: &mut network, looks: 0 };
        drive(&mut edge, &mut watching, &waits(), &|| false, &mut |_| Ok(())).unwrap();
        cloud_looks += watching.looks;
        assert_eq!((edge.answer(), edge.finish()), (&want.0[..], Some(want.1)), "schedule {seed}");
        assert!(edge.drafting().told().len() >= asked.prompt.len());
    }
    assert!(*looks.borrow() > 100 && cloud_looks > 200, "{} looks at the draft, {cloud_looks}", looks.borrow());
}
