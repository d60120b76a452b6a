//! Decoding with drafts of every kind on SmolLM2-135M-Instruct gives what plain decoding gives, where the model is there.

use std::collections::HashMap;
use std::path::Path;

use specforge::data::{ChatTokenizer, Message};
use specforge::decode::drafter::{self, DraftSampling, Drafter, DynamicTree, ModelDrafter, Plain, PromptLookup};
use specforge::decode::event::{Committed, Listener};
use specforge::decode::{Engine, EngineOptions, Policy, Request};
use specforge::draft::{self, DraftContext};
use specforge::models::{TargetModel, load_target};
use specforge::nn::Processors;
use tch::{Device, Kind, Tensor};

use crate::small_drafts;

const QUESTIONS: [&str; 2] = ["Name three rivers of Europe.", "Write one line about rain."];
const NEW_TOKENS: usize = 16;

#[derive(Default)]
struct Rows(HashMap<(u64, usize), Tensor>);

impl Listener for Rows {
    fn wants_rows(&self) -> bool {
        true
    }

    fn committed(&mut self, event: &Committed<'_>) -> specforge::error::Result<()> {
        self.0.insert((event.tag, event.position), event.row.unwrap().copy());
        Ok(())
    }
}

/// Tokens of both answers, and the row of every position.
fn decode<'a>(
    target: &'a dyn TargetModel,
    tokenizer: &ChatTokenizer,
    drafter: Box<dyn Drafter + 'a>,
    (temperature, max_rows): (f64, usize),
) -> (Vec<Vec<u32>>, Rows) {
    let options = EngineOptions {
        processors: Processors::at_temperature(temperature),
        policy: Policy::Keyed { seed: 11 },
        stop_tokens: tokenizer.eos_token_ids().to_vec(),
        max_rows,
    };
    let mut engine = Engine::new(target, drafter, options).unwrap();
    for (tag, question) in (0..).zip(QUESTIONS) {
        let text = tokenizer.render(&[Message::new("user", question)], None, true).unwrap();
        let prompt = tokenizer.encode(&text).unwrap();
        engine.submit(Request { tag, prompt, max_new_tokens: NEW_TOKENS, key: tag }).unwrap();
    }
    let mut rows = Rows::default();
    let left = engine.run(&mut rows).unwrap();
    (left.into_iter().map(|left| left.decoded.unwrap().tokens).collect(), rows)
}

#[test]
fn every_draft_is_lossless_on_a_real_model() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.models/SmolLM2-135M-Instruct");
    if !folder.join("model.safetensors").is_file() {
        eprintln!("SKIPPED: {} is not there; scripts/demo makes it", folder.display());
        return;
    }
    tch::set_num_threads(1);
    let target = load_target(&folder, Kind::Float, Device::Cpu).unwrap();
    let target = target.as_ref();
    let tokenizer = ChatTokenizer::load(&folder, None).unwrap();
    let context = DraftContext { seed: 1, ..small_drafts::context(target) };
    let build = |section: serde_json::Value| (draft::algorithm(&section).unwrap().build)(&section, &context).unwrap();
    // Untrained heads name the token that the target has just chosen, an untrained layer names anything.
    let medusa = build(serde_json::json!({"algorithm": "medusa", "projection": "shared"}));
    let eagle3 = build(serde_json::json!({"algorithm": "eagle3"}));
    let peagle = build(serde_json::json!({"algorithm": "peagle", "num_layers": 1, "mask_token_id": 16}));
    let twin = DynamicTree { depth: 3, top_k: 2, nodes: 5, min_probability: 0.0 };
    for temperature in [0.0, 1.0] {
        let sampling = DraftSampling::for_policy(Policy::Keyed { seed: 11 }, temperature);
        let trained = |draft: &dyn draft::DraftModel, tree: &str| {
            drafter::of_training(draft, Some(tree), target, sampling).unwrap().drafter
        };
        let (plain, want) = decode(target, &tokenizer, Box::new(Plain), (temperature, 1));
        let model = load_target(&folder, Kind::Float, Device::Cpu).unwrap();
        let drafters: [(&str, Box<dyn Drafter>); 5] = [
            ("medusa", trained(medusa.as_ref(), "mc_sim_7b_63")),
            ("eagle3", trained(eagle3.as_ref(), "dynamic:depth=3,top_k=4,nodes=16")),
            ("peagle", trained(peagle.as_ref(), "chain")),
            ("the target itself", Box::new(ModelDrafter::new(model, target.info(), twin, sampling).unwrap())),
            ("prompt lookup", Box::new(PromptLookup { longest_match: 2, shortest_match: 1, depth: 4, nodes: 8 })),
        ];
        for (name, drafter) in drafters {
            let (tokens, got) = decode(target, &tokenizer, drafter, (temperature, 2));
            assert_eq!(tokens, plain, "{name}, temperature {temperature}");
            for (place, row) in &got.0 {
                // Logits reach 30, and thirty layers add their roundings up: 1.1e-4 is the worst seen.
                let most = (row - &want.0[place]).abs().max().double_value(&[]);
                assert!(most < 5e-4, "{name}, temperature {temperature}, {place:?}: {most:e}");
            }
        }
    }
}
