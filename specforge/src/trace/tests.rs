//! Traces of real decodes of a tiny target with a tiny draft: sound ones compare as equal, and every seeded fault is
//! found, named and blamed on the right run.

use std::path::{Path, PathBuf};

use super::*;
use crate::decode::drafter::{Drafter, Plain};
use crate::decode::engine::{Engine, EngineOptions};
use crate::decode::fault::{self, Fault};
use crate::decode::policy::Policy;
use crate::decode::{Request, tiny};
use crate::models::TargetModel;
use crate::models::llama::LlamaTarget;
use crate::nn::Processors;
use crate::nn::noise::keyed_stream;

mod draft;
mod faults;
mod files;

use draft::{FORKED, Shape, Small};

/// How a test decodes.
#[derive(Clone)]
struct Decode<'a> {
    target: &'a LlamaTarget,
    draft: Option<(&'a LlamaTarget, Shape)>,
    processors: Processors,
    max_rows: usize,
    stop_tokens: Vec<u32>,
    requests: Vec<Request>,
}

fn requests(count: u64) -> Vec<Request> {
    let mut next = keyed_stream(5, 1);
    let mut request = |tag: u64| {
        let prompt = (0..2 + next() % 7).map(|_| (next() % 64) as u32).collect();
        Request { tag, prompt, max_new_tokens: 14, key: tag * 1000 }
    };
    (0..count).map(&mut request).collect()
}

/// A target, and a draft that is the target with some noise.
fn models() -> (LlamaTarget, LlamaTarget) {
    // Peaky, so that a draft is often right; token 0 is a frequent answer.
    let peaky = |name: &str, tensor: tch::Tensor| {
        if name == "lm_head.weight" {
            tensor.get(0).copy_(&(tensor.get(0) * 1.6));
            return tensor * 1.5;
        }
        tensor
    };
    let mut stream = 100;
    let stream = std::cell::RefCell::new(&mut stream);
    let noisy = |name: &str, tensor: tch::Tensor| {
        let mut stream = stream.borrow_mut();
        **stream += 1;
        let noise = crate::nn::noise::normal(&tensor.size(), 0.03, 9, **stream).to_kind(tch::Kind::Double);
        peaky(name, tensor) + noise
    };
    (tiny::target_with(1, &peaky), tiny::target_with(1, &noisy))
}

impl<'a> Decode<'a> {
    fn drafter(&self) -> Box<dyn Drafter + 'a> {
        match self.draft {
            Some((model, shape)) => Box::new(Small::new(model, self.target, shape)),
            None => Box::new(Plain),
        }
    }

    fn header(&self) -> Header {
        let (drafter, tree) = match self.draft {
            Some((_, shape)) => ("small model", format!("{shape:?}")),
            None => ("none", "root".to_owned()),
        };
        Header {
            target: ModelName { path: PathBuf::from("tiny"), identity: None },
            draft: None,
            dtype: "float64".to_owned(),
            device: "cpu".to_owned(),
            vocabulary: self.target.info().vocab_size as usize,
            settings: Settings {
                drafter: drafter.to_owned(),
                tree,
                processors: self.processors,
                policy: Policy::Keyed { seed: 3 },
                stop_tokens: self.stop_tokens.clone(),
                max_new_tokens: 14,
                max_rows: self.max_rows,
            },
        }
    }

    /// Decodes into a file and reads it.
    fn trace(&self, path: &Path, with: Option<Fault>) -> Trace {
        let options = EngineOptions {
            processors: self.processors,
            policy: Policy::Keyed { seed: 3 },
            stop_tokens: self.stop_tokens.clone(),
            max_rows: self.max_rows,
        };
        let mut recorder = Recorder::create(path, self.header()).unwrap();
        fault::with(with, || {
            let mut engine = Engine::new(self.target, self.drafter(), options).unwrap();
            self.requests.iter().for_each(|request| engine.submit(request.clone()).unwrap());
            engine.run(&mut recorder).unwrap();
        });
        recorder.finish().unwrap();
        Trace::read(path).unwrap()
    }

    fn compare(&self, a: &Trace, b: &Trace) -> Comparison {
        let new = || Ok(self.drafter());
        compare(a, b, Some(&Judge { target: self.target, drafter: Some(&new) })).unwrap()
    }
}

fn decode<'a>(models: &'a (LlamaTarget, LlamaTarget), shape: Shape) -> Decode<'a> {
    Decode {
        target: &models.0,
        draft: Some((&models.1, shape)),
        processors: Processors::default(),
        max_rows: 1,
        stop_tokens: vec![7, 8],
        requests: requests(6),
    }
}

#[test]
fn sound_decodes_with_different_trees_are_equal() {
    let models = models();
    let folder = tempfile::tempdir().unwrap();
    for (temperature, repetition_penalty) in [(0.0, 1.0), (1.0, 1.3)] {
        let processors = Processors { temperature, repetition_penalty, top_k: 20, top_p: 0.9 };
        let forked = Decode { processors, ..decode(&models, FORKED) };
        let a = forked.trace(&folder.path().join("a"), None);
        let chain = Decode { max_rows: 3, processors, ..decode(&models, &[(0, 0), (1, 0), (2, 0)]) };
        let plain = Decode { draft: None, ..chain.clone() };
        for (name, other) in [("chain", chain), ("plain", plain), ("again", forked.clone())] {
            let b = other.trace(&folder.path().join(name), None);
            let comparison = forked.compare(&a, &b);
            assert_eq!(comparison.verdict, Verdict::Equal, "{name}: {:?}", comparison.findings);
            assert!(comparison.positions > 30, "{} positions", comparison.positions);
            assert!(comparison.max_difference.0 < 1e-12, "{:?}", comparison.max_difference);
            assert_eq!(compare(&a, &b, None).unwrap().verdict, Verdict::Equal);
        }
        let accepted = a.requests.iter().flat_map(|request| &request.tokens);
        let accepted = accepted.filter(|token| token.source == crate::decode::event::Source::Accepted);
        let forks = accepted.filter(|token| token.slot > 1).count();
        assert!(forks > 3 || temperature > 0.0, "{forks} forks: a draft that takes no forks shows little");
    }
}

#[test]
fn a_near_tie_is_nobodys_fault() {
    // Two tokens share their row of the head but for a hair: rounding decides between them.
    let tied = |offset: f64| {
        tiny::target_with(1, &|name, tensor| {
            if name == "lm_head.weight" {
                tensor.get(20).copy_(&(tensor.get(0) * (1.0 + offset) * 3.0));
                tensor.get(0).copy_(&(tensor.get(0) * 3.0));
            }
            tensor
        })
    };
    let folder = tempfile::tempdir().unwrap();
    for (hair, verdict) in [(1e-12, Verdict::NearTie), (1e-3, Verdict::BWrong)] {
        let (left, right) = (tied(-hair), tied(hair));
        let of = |target| Decode {
            target,
            draft: None,
            processors: Processors::default(),
            max_rows: 2,
            stop_tokens: vec![],
            requests: requests(6),
        };
        let a = of(&left).trace(&folder.path().join("a"), None);
        let b = of(&right).trace(&folder.path().join("b"), None);
        let comparison = of(&left).compare(&a, &b);
        assert_eq!(comparison.verdict, verdict, "{:?}", comparison.findings);
        assert!(!comparison.divergences.is_empty());
        let first = &comparison.divergences[0];
        assert_eq!(first.verdict, verdict);
        assert_eq!((first.a.token.min(first.b.token), first.a.token.max(first.b.token)), (0, 20));
        if verdict == Verdict::NearTie {
            // The rows themselves say as much, without the target.
            assert_eq!(compare(&a, &b, None).unwrap().verdict, Verdict::NearTie);
            let text = text::text(&comparison, &|token| Some(format!("w{token}")));
            assert!(text.contains("\"w20\"") && text.ends_with("verdict: near tie\n"), "{text}");
        }
    }
}
