//! EAGLE-3 against a plain dense implementation: every row, every step, one softmax over a masked matrix, autograd
//! throughout. Same loss and same gradients in float64, for random masks, packings, step counts, losses and shapes.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Value, json};
use specforge::data::{DocumentRef, PackedBatch};
use specforge::draft::eagle3::{Eagle3, Eagle3Config, Eagle3Shape};
use specforge::draft::{DraftContext, DraftModel, Gradients, Parameter, Tally};
use specforge::features::FeatureBatch;
use specforge::models::{LayerShape, TargetInfo};
use specforge::nn::{Embedding, Head, Rope, RopeConfig, RopeScaling, noise};
use specforge::vocab::VocabMap;
use tch::{Device, Kind, Tensor};

use crate::fixture::STEP;

const VOCABULARY: i64 = 23;
const HIDDEN: i64 = 12;
const OPTIONS: (Kind, Device) = (Kind::Double, Device::Cpu);
const METRICS: usize = 5;

/// A target of no layers: its embedding, its head, and features from a formula.
struct World {
    embedding: Embedding,
    head: Head,
    map: VocabMap,
}

impl World {
    fn new() -> Self {
        let table = |stream| noise::normal(&[VOCABULARY, HIDDEN], 1.0, 11, stream).to_kind(Kind::Double);
        let map = VocabMap::new(vec![0, 2, 3, 5, 8, 9, 11, 14, 15, 20, 22], VOCABULARY).unwrap();
        Self { embedding: Embedding::plain(table(0)), head: Head::plain(table(1)), map }
    }

    fn dimensions() -> TargetInfo {
        let rope = RopeConfig {
            theta: 100.0,
            head_dim: 6,
            max_position_embeddings: 64,
            scaling: RopeScaling::Linear { factor: 2.0 },
        };
        let layer = LayerShape {
            intermediate_size: 10,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 6,
            rms_norm_eps: 1e-5,
            rope,
        };
        TargetInfo { template: layer, ..TargetInfo::of(HIDDEN, VOCABULARY, 8, 64) }
    }

    /// A draft with parameters far from their start, so that no term is too small to matter.
    fn draft(&self, section: &Value, chunk_rows: usize) -> (Eagle3, Eagle3Config) {
        let config = Eagle3Config::read(section).unwrap();
        let context = DraftContext {
            target: Self::dimensions(),
            embedding: &self.embedding,
            head: &self.head,
            vocabulary: config.draft_vocab_size.map(|_| &self.map),
            weights: None,
            kind: Kind::Double,
            device: Device::Cpu,
            seed: 3,
            chunk_bytes: chunk_rows * 4 * VOCABULARY as usize,
        };
        let draft = Eagle3::new(config.clone(), &context).unwrap();
        for (index, parameter) in draft.parameters().iter().enumerate() {
            let _guard = tch::no_grad_guard();
            let fresh = noise::normal(&parameter.value.size(), 0.5, 17, index as u64).to_kind(Kind::Double);
            let fresh = if parameter.value.dim() == 1 { fresh + 1.0 } else { fresh };
            parameter.value.shallow_clone().copy_(&fresh);
        }
        (draft, config)
    }

    /// Captured states and the last one, of a batch.
    fn hidden(&self, rows: i64, seed: u64) -> Vec<Tensor> {
        (0..4).map(|index| noise::normal(&[rows, HIDDEN], 1.0, seed, index).to_kind(Kind::Double)).collect()
    }
}

/// Documents whose marks say which tokens are supervised.
fn batch(marks: &[String], seed: u64) -> PackedBatch {
    let joined = marks.concat();
    let mut random = noise::keyed_stream(seed, 1);
    PackedBatch {
        ids: joined.chars().map(|_| (random() % VOCABULARY as u64) as i64).collect(),
        positions: marks.iter().flat_map(|marks| 0..marks.len() as i64).collect(),
        supervised: joined.chars().map(|mark| mark == 'x').collect(),
        lengths: marks.iter().map(|marks| marks.len() as i64).collect(),
        documents: (0..marks.len()).map(|index| DocumentRef::new(format!("document {index}"), index as u64)).collect(),
    }
}

/// Random documents; about two thirds of the tokens are supervised.
fn random_marks(seed: u64) -> Vec<String> {
    let mut random = noise::keyed_stream(seed, 2);
    let documents = 1 + random() % 4;
    (0..documents)
        .map(|_| {
            let length = 1 + random() % 14;
            (0..length).map(|_| if random().is_multiple_of(3) { '.' } else { 'x' }).collect()
        })
        .collect()
}

fn rms(input: &Tensor, weight: &Tensor) -> Tensor {
    input / (input.square().mean_dim(-1, true, Kind::Double) + 1e-5).sqrt() * weight
}

/// `x` rotated by halves, `[T, N, D]`.
fn rotated(heads: Tensor, positions: &[i64]) -> Tensor {
    let rope = Rope::new(World::dimensions().template.rope, Device::Cpu);
    let positions = Tensor::from_slice(positions).unsqueeze(0);
    let tables = rope.tables(&positions, Kind::Double);
    tables.rotate(&heads.transpose(0, 1).unsqueeze(0)).squeeze_dim(0).transpose(0, 1)
}

/// What `shift` places further on in the same document, and `None` past its end.
fn further(batch: &PackedBatch, row: usize, shift: usize) -> Option<usize> {
    let mut end = 0;
    for &length in &batch.lengths {
        end += length as usize;
        if row < end {
            return (row + shift < end).then_some(row + shift);
        }
    }
    None
}

/// The objective and its gradients, written down as the formulas are.
fn dense(
    draft: &Eagle3,
    config: &Eagle3Config,
    world: &World,
    batch: &PackedBatch,
    hidden: &[Tensor],
) -> (Tensor, Vec<Tensor>) {
    let shape: Eagle3Shape = config.shape(&World::dimensions()).unwrap();
    let weights: HashMap<&str, &Tensor> =
        draft.parameters().iter().map(|parameter| (parameter.name.as_str(), &parameter.value)).collect();
    let get = |name: &str| weights[format!("{name}.weight").as_str()];
    let rows = batch.ids.len();
    let visible: Vec<bool> = (0..rows * rows)
        .map(|at| {
            let (query, key) = (at / rows, at % rows);
            key <= query && further(batch, key, query - key) == Some(query)
        })
        .collect();
    let blind = Tensor::from_slice(&visible).view([rows as i64, 1, rows as i64]).logical_not();

    let captured: Vec<Tensor> = hidden[..3]
        .iter()
        .enumerate()
        .map(|(index, part)| match shape.fc_norm {
            true => rms(part, get(&format!("fc_norm.{index}"))),
            false => part.shallow_clone(),
        })
        .collect();
    let mut wide = Tensor::cat(&captured, 1);
    if shape.norm_before_fc {
        wide = rms(&wide, get("input_norm"));
    }
    let mut feature = wide.matmul(&get("fc").tr());
    let (ids, head) = match config.draft_vocab_size {
        Some(_) => (world.map.target_ids().to_vec(), shape.draft_vocab_size),
        None => ((0..VOCABULARY).collect(), VOCABULARY),
    };
    assert_eq!(ids.len() as i64, head);
    let ids = Tensor::from_slice(&ids);
    let mut cached: Vec<Vec<[Tensor; 2]>> = (0..shape.num_layers).map(|_| Vec::new()).collect();
    let mut objective = Tensor::zeros([], OPTIONS);
    for (k, weight) in config.weights().into_iter().enumerate() {
        let tokens: Vec<i64> = (0..rows).map(|row| further(batch, row, 1 + k).map_or(0, |at| batch.ids[at])).collect();
        let positions: Vec<i64> = batch.positions.iter().map(|position| position + k as i64).collect();
        let embedded = world.embedding.table.index_select(0, &Tensor::from_slice(&tokens));
        let mut state = feature.shallow_clone();
        for (layer, cached) in cached.iter_mut().enumerate() {
            let prefix = Eagle3Shape::layer_prefix(layer);
            let at = |name: &str| get(&format!("{prefix}.{name}"));
            let (input, residual) = if layer == 0 {
                let normed = rms(&state, at("hidden_norm"));
                let input = Tensor::cat(&[&rms(&embedded, at("input_layernorm")), &normed], 1);
                (input, if shape.norm_before_residual { normed } else { state.shallow_clone() })
            } else {
                (rms(&state, at("input_layernorm")), state.shallow_clone())
            };
            let project = |name: &str| input.matmul(&at(name).tr()).view([rows as i64, -1, 6]);
            let repeat = |heads: Tensor| heads.repeat_interleave_self_int(2, 1, None); // [T, N, D]
            let query = rotated(project("self_attn.q_proj"), &positions);
            let key = repeat(rotated(project("self_attn.k_proj"), &positions));
            cached.push([key, repeat(project("self_attn.v_proj"))]);
            let [first_key, first_value] = &cached[0];
            let scores = query.transpose(0, 1).matmul(&first_key.permute([1, 2, 0])).transpose(0, 1); // [T, N, T]
            let mut scores = vec![scores.masked_fill(&blind, f64::NEG_INFINITY)];
            for [key, _] in &cached[1..] {
                scores.push((&query * key).sum_dim_intlist([-1i64].as_slice(), true, Kind::Double));
            }
            let shares = (Tensor::cat(&scores, 2) / 6f64.sqrt()).softmax(-1, Kind::Double);
            let from_first = shares.narrow(2, 0, rows as i64).transpose(0, 1).matmul(&first_value.transpose(0, 1));
            let mut mixed = from_first.transpose(0, 1);
            for (index, [_, value]) in cached[1..].iter().enumerate() {
                mixed += shares.narrow(2, (rows + index) as i64, 1) * value;
            }
            let joined = mixed.reshape([rows as i64, -1]).matmul(&at("self_attn.o_proj").tr());
            let after: Tensor = residual + joined;
            let normed = rms(&after, at("post_attention_layernorm"));
            let gated = normed.matmul(&at("mlp.gate_proj").tr()).silu() * normed.matmul(&at("mlp.up_proj").tr());
            state = after + gated.matmul(&at("mlp.down_proj").tr());
        }
        let read = if shape.norm_output { rms(&state, get("norm")) } else { state.shallow_clone() };
        let log_draft = read.matmul(&get("lm_head").tr()).log_softmax(-1, Kind::Double);
        feature = if shape.norm_feedback { rms(&state, get("norm")) } else { state };

        // Rows of the documented rule, one by one.
        let mut losses = Vec::new();
        let mut count = 0;
        for row in 0..rows {
            let trained =
                further(batch, row, 2 + k).is_some() && (row + 1..=row + 2 + k).all(|at| batch.supervised[at]);
            if !trained {
                continue;
            }
            count += 1;
            let logits =
                hidden[3].get((row + 1 + k) as i64).unsqueeze(0).matmul(&world.head.weight.tr()).squeeze_dim(0);
            let top = logits.argmax(-1, false).int64_value(&[]);
            if !Vec::<i64>::try_from(&ids).unwrap().contains(&top) {
                continue;
            }
            let own = logits.softmax(-1, Kind::Double).index_select(0, &ids);
            let reachable = logits.index_select(0, &ids).softmax(-1, Kind::Double);
            losses.push(loss_of(config, &own, &reachable, &log_draft.get(row as i64)));
        }
        if !losses.is_empty() {
            objective += Tensor::stack(&losses, 0).sum(Kind::Double) * (weight / f64::from(count));
        }
    }
    let inputs: Vec<&Tensor> = draft.parameters().iter().map(|parameter| &parameter.value).collect();
    if !objective.requires_grad() {
        return (objective, inputs.iter().map(|input| input.zeros_like()).collect());
    }
    let fresh = Tensor::f_run_backward(&[&objective], &inputs, false, false).unwrap();
    let gradients = fresh.into_iter().zip(inputs).map(|(fresh, input)| match fresh.defined() {
        true => fresh,
        false => input.zeros_like(),
    });
    (objective, gradients.collect())
}

fn loss_of(config: &Eagle3Config, own: &Tensor, reachable: &Tensor, log_draft: &Tensor) -> Tensor {
    let draft = log_draft.exp();
    let cross_entropy = -(reachable * log_draft).sum(Kind::Double);
    let acceptance = own.minimum(&draft).sum(Kind::Double);
    match serde_json::to_value(config.loss).unwrap().as_str().unwrap() {
        "cross_entropy" => cross_entropy,
        "kl" => cross_entropy + (reachable * reachable.log()).sum(Kind::Double),
        "reverse_kl" => (&draft * (log_draft - reachable.log())).sum(Kind::Double),
        // Half the sum of differences over the whole vocabulary; outside the draft's, it has no probability.
        "total_variation" => ((own - draft).abs().sum(Kind::Double) + 1.0 - own.sum(Kind::Double)) * 0.5,
        "lk_alpha" => -acceptance.log(),
        "lk_lambda" => {
            let share = (acceptance.detach() * -config.lk_decay).exp() * config.lk_scale;
            &share * cross_entropy + (1.0 - &share) * (1.0 - acceptance)
        }
        other => panic!("no formula for {other}"),
    }
}

/// Objective, metrics and gradients of the real one.
fn sparse(draft: &Eagle3, batch: &PackedBatch, hidden: &[Tensor]) -> (Tally, Vec<Tensor>) {
    let zeros = |parameter: &Parameter| parameter.value.zeros_like().detach();
    let mut gradients: Vec<Tensor> = draft.parameters().iter().map(zeros).collect();
    let features = FeatureBatch::new(Arc::new(batch.clone()), hidden.iter().map(Tensor::shallow_clone).collect());
    let plan = draft.plan(batch, STEP).unwrap();
    assert_eq!(plan.counts, draft.count(batch, STEP).unwrap());
    let tally = draft.accumulate(&features, &plan, &plan.counts, &mut Gradients::new(&mut gradients)).unwrap();
    (tally, gradients)
}

fn largest_difference(left: &Tensor, right: &Tensor) -> f64 {
    (left - right).abs().max().double_value(&[])
}

/// With one graph over all steps, and with steps computed again.
fn check(name: &str, section: &Value, marks: &[String], seed: u64) -> i64 {
    let with = |recompute: bool| {
        let mut section = section.clone();
        section["recompute"] = json!(recompute);
        check_once(&format!("{name}, recompute {recompute}"), &section, marks, seed)
    };
    with(false).min(with(true))
}

fn check_once(name: &str, section: &Value, marks: &[String], seed: u64) -> i64 {
    let world = World::new();
    let batch = batch(marks, seed);
    let hidden = world.hidden(batch.ids.len() as i64, seed);
    let (draft, config) = world.draft(section, 1 + seed as usize % 40);
    let (tally, gradients) = sparse(&draft, &batch, &hidden);
    let (objective, want) = dense(&draft, &config, &world, &batch, &hidden);
    let difference = largest_difference(&tally.objective, &objective);
    assert!(
        difference < 1e-12 * (1.0 + objective.double_value(&[]).abs()),
        "{name}, {marks:?}: loss off by {difference:e}"
    );
    for (parameter, (got, want)) in draft.parameters().iter().zip(gradients.iter().zip(&want)) {
        let difference = largest_difference(got, want);
        assert!(difference < 1e-6, "{name}, {marks:?}: gradient of {} off by {difference:e}", parameter.name);
    }
    want.iter().map(|gradient| i64::from(gradient.abs().max().double_value(&[]) > 1e-3)).sum()
}

fn shaped(extra: Value) -> Value {
    let mut config = json!({
        "hidden_size": HIDDEN, "intermediate_size": 10, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
        "num_hidden_layers": 1, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    });
    for (key, value) in extra.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

#[test]
fn equals_the_dense_implementation_on_random_batches() {
    let mut moved = 0;
    for seed in 0..24 {
        let steps = 1 + seed as usize % 7;
        let mut section = json!({"algorithm": "eagle3", "ttt_steps": steps});
        if seed % 2 == 0 {
            section["draft_vocab_size"] = json!(11);
        }
        moved += check("random batch", &section, &random_marks(seed), seed);
    }
    assert!(moved > 100, "only {moved} gradients were not almost zero");
}

#[test]
fn equals_the_dense_implementation_in_every_shape() {
    let marks = ["..xxxxxx..xxxx", "xxxxx", ".xxx", "...xxxxxxxxx"].map(str::to_owned);
    for (name, extra) in [
        ("EAGLE-3.1", json!({"fc_norm": true})),
        ("norm before fc", json!({"norm_before_fc": true})),
        ("norm before the residual", json!({"norm_before_residual": true})),
        ("no norm before the head", json!({"norm_output": false})),
        ("normed feedback", json!({"norm_feedback": true})),
        ("normed feedback, raw head", json!({"norm_feedback": true, "norm_output": false})),
        ("two layers", json!({"num_hidden_layers": 2})),
        ("three layers", json!({"num_hidden_layers": 3, "norm_before_residual": true})),
    ] {
        let section = json!({"algorithm": "eagle3", "ttt_steps": 4, "draft_vocab_size": 11, "config": shaped(extra)});
        let moved = check(name, &section, &marks, 5);
        assert!(moved > 11, "{name}: only {moved} gradients were not almost zero");
    }
}

#[test]
fn equals_the_dense_implementation_in_every_loss() {
    let marks = ["..xxxxxx..xxxx", "xxxxx", "...xxxxxxxxx"].map(str::to_owned);
    for loss in ["cross_entropy", "kl", "reverse_kl", "total_variation", "lk_alpha", "lk_lambda"] {
        for vocabulary in [json!(11), Value::Null] {
            let section = json!({
                "algorithm": "eagle3", "ttt_steps": 3, "draft_vocab_size": vocabulary, "loss": loss,
                "lk_decay": 3.0, "lk_scale": 0.9,
            });
            check(loss, &section, &marks, 6);
        }
    }
}

/// What document B holds changes nothing of document A: not its loss, not its gradient, not by one bit.
#[test]
fn packed_documents_never_touch() {
    let world = World::new();
    let section = json!({"algorithm": "eagle3", "ttt_steps": 5, "draft_vocab_size": 11});
    // Chunks of one position, so that B's rows share no product with A's.
    let (draft, _) = world.draft(&section, 1);
    let marks = ["..xxxxxxx", "xxxxxx", ".xxxxx"].map(str::to_owned);
    let packed = batch(&marks, 1);
    let hidden = world.hidden(packed.ids.len() as i64, 1);
    let mut other = packed.clone();
    let disturbed: Vec<Tensor> = hidden.iter().map(Tensor::copy).collect();
    for token in 9..15 {
        other.ids[token] = (other.ids[token] + 7) % VOCABULARY;
        disturbed.iter().for_each(|states| drop(states.get(token as i64).fill_(0.3 * token as f64)));
    }
    let outputs = |batch: &PackedBatch, hidden: &[Tensor]| {
        let plan = draft.steps(batch, Device::Cpu).unwrap();
        let projected = draft.network().project_hidden_states(&hidden[..3]).unwrap();
        draft.network().backbone(&plan, &projected).unwrap().into_iter().zip(plan.steps).collect::<Vec<_>>()
    };
    let mut untouched = 0;
    for ((left, step), (right, _)) in outputs(&packed, &hidden).iter().zip(outputs(&other, &disturbed)) {
        for (place, row) in Vec::<i64>::try_from(&step.rows).unwrap().into_iter().enumerate() {
            let same = left.get(place as i64).equal(&right.get(place as i64));
            assert_eq!(same, !(9..15).contains(&row), "row {row}");
            untouched += usize::from(same);
        }
    }
    assert!(untouched > 20);

    // Loss and gradient of A alone: B has nothing to say, whatever it holds.
    let silent = ["..xxxxxxx", "......", "......"].map(str::to_owned);
    let (mut quiet, mut noisy) = (batch(&silent, 1), batch(&silent, 1));
    quiet.ids = packed.ids.clone();
    noisy.ids = other.ids.clone();
    let (left, left_gradients) = sparse(&draft, &quiet, &hidden);
    let (right, right_gradients) = sparse(&draft, &noisy, &disturbed);
    assert!(left.objective.equal(&right.objective) && left.sums.equal(&right.sums));
    for (parameter, (left, right)) in draft.parameters().iter().zip(left_gradients.iter().zip(&right_gradients)) {
        assert!(left.equal(right), "gradient of {}", parameter.name);
    }
    assert!(left.objective.double_value(&[]) > 0.0);
}

/// A batch without a trained row is no special case for anyone.
#[test]
fn a_batch_without_supervision_gives_zeros() {
    let world = World::new();
    let (draft, _) = world.draft(&json!({"algorithm": "eagle3", "ttt_steps": 3, "draft_vocab_size": 11}), 4);
    let batch = batch(&["....".to_owned(), "..".to_owned(), "xx".to_owned()], 1);
    let (tally, gradients) = sparse(&draft, &batch, &world.hidden(8, 1));
    assert_eq!(tally.objective.double_value(&[]), 0.0);
    assert_eq!(tally.counts, vec![0.0; 3 * METRICS]);
    assert!(gradients.iter().all(|gradient| gradient.abs().max().double_value(&[]) == 0.0));
}
