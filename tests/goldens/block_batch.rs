//! The blocks of a training file: what heads see of them, and what they make of it.

use std::collections::HashMap;

use serde_json::{Map, Value, json};
use specforge::draft::block::chunk::{Chunk, Denominator};
use specforge::draft::block::config::{BlockConfig, BlockShape};
use specforge::draft::block::heads::HeadKind;
use specforge::draft::block::losses::document_shares;
use specforge::error::Error;
use specforge::nn::{Head, RmsNorm};
use tch::{Kind, Tensor};

use super::Golden;
use super::block_parts::{json_of, near, setting, stored_name, text, with_conv};

/// The real blocks of a file, `n` of them.
pub struct Blocks {
    /// `[n, B, H]` states behind the final norm.
    pub hidden: Tensor,
    /// `[n, H]` what the backbone reads of the token before the anchor.
    pub context: Tensor,
    /// `[n, B + 1]`
    pub tokens: Tensor,
    /// `[n]`
    pub before: Tensor,
    /// `[n][S]`
    pub supervised: Vec<Vec<bool>>,
    /// `[n, S, V]`
    pub teacher: Option<Tensor>,
    /// The target's vocabulary projection.
    pub projection: Head,
    /// The target's embedding.
    pub embedding: Tensor,
}

/// A term of the objective: factor, sum and what the sum is divided by.
pub type Part = (f64, f64, f64);

/// What a head makes of a batch.
pub struct Trained {
    /// The objective.
    pub loss: f64,
    /// Its terms.
    pub parts: Vec<Part>,
    /// Each metric's average.
    pub metrics: HashMap<String, f64>,
    /// Gradients of the head's tensors by their engines' names.
    pub gradients: Vec<(String, Tensor)>,
    /// How often the likeliest token of a supervised slot is right.
    hits: f64,
    /// Number of blocks of a chunk.
    pub piece: i64,
}

impl Blocks {
    /// Those of a packed file of speculators: `[1, T]`, with documents and padding.
    pub fn packed(golden: &Golden, shape: &BlockShape) -> Result<Self, String> {
        let (ids, documents) = (golden.integers("in.input_ids")?, golden.integers("in.document_ids")?);
        let real = golden.tensor("sample.valid")?.to_kind(Kind::Bool).nonzero().view([-1]);
        let anchors = numbers(&golden.tensor("sample.anchors")?.index_select(0, &real))?;
        let rows = |name: &str| {
            let values = golden.tensor(name)?.squeeze_dim(0);
            let values = values.unflatten(0, [-1, shape.block_size]); // [N, B, ..]
            Ok::<_, String>(values.index_select(0, &real))
        };
        let slots = |values: Tensor| values.narrow(1, shape.first_row(), shape.slots());
        let token = |place: i64| ids.get(place as usize).copied().unwrap_or(0);
        let tokens: Vec<i64> =
            anchors.iter().flat_map(|anchor| (0..=shape.block_size).map(move |row| token(anchor + row))).collect();
        let before = |&anchor: &i64| {
            let same = anchor > 0 && documents[anchor as usize - 1] == documents[anchor as usize];
            ids[(if same { anchor - 1 } else { anchor }) as usize]
        };
        let before: Vec<i64> = anchors.iter().map(before).collect();
        let supervised = numbers(&slots(rows("mid.loss_mask")?))?;
        let hidden = rows("mid.hidden")?;
        Ok(Self {
            context: hidden.select(1, 0).zeros_like(),
            hidden,
            tokens: Tensor::from_slice(&tokens).view([-1, shape.block_size + 1]),
            before: Tensor::from_slice(&before),
            supervised: supervised
                .chunks(shape.slots() as usize)
                .map(|row| row.iter().map(|&on| on != 0).collect())
                .collect(),
            teacher: Some(slots(rows("mid.target_logits")?)),
            projection: Head::plain(golden.tensor("w.lm_head.weight")?),
            embedding: golden.tensor("w.embed_tokens.weight")?,
        })
    }

    /// Those of a file of rows `[R, T]`, each a document of its own.
    pub fn unpacked(golden: &Golden, shape: &BlockShape) -> Result<Self, String> {
        let ids = golden.tensor("in.input_ids")?;
        let [rows, length] = ids.size()[..] else { return Err(format!("in.input_ids: got shape {:?}", ids.size())) };
        let (ids, mask) = (golden.integers("in.input_ids")?, golden.integers("in.loss_mask")?);
        let (anchors, keep) = (golden.integers("sample.anchors")?, golden.integers("sample.keep")?);
        let of_row = anchors.len() as i64 / rows;
        let real: Vec<i64> = (0..anchors.len() as i64).filter(|&block| keep[block as usize] != 0).collect();
        let places: Vec<(i64, i64)> = real.iter().map(|&block| (block / of_row, anchors[block as usize])).collect();
        let token = |row: i64, place: i64| if place < length { ids[(row * length + place) as usize] } else { 0 };
        let within = |row: i64, place: i64| place < length && mask[(row * length + place) as usize] != 0;
        let each = |&(row, anchor): &(i64, i64)| (0..=shape.block_size).map(move |j| (row, anchor + j));
        let tokens: Vec<i64> = places.iter().flat_map(each).map(|(row, place)| token(row, place)).collect();
        let before: Vec<i64> = places.iter().map(|&(row, anchor)| token(row, (anchor - 1).max(0))).collect();
        let slots =
            |(row, anchor): (i64, i64)| (1..=shape.slots()).map(move |slot| within(row, anchor + slot)).collect();
        let real = Tensor::from_slice(&real);
        let hidden = golden.tensor("mid.hidden")?.unflatten(1, [-1, shape.block_size]).flatten(0, 1);
        let hidden = hidden.index_select(0, &real); // [n, B, H]
        let teacher = match golden.has("in.target_logits") {
            true => {
                let logits = golden.tensor("in.target_logits")?.flatten(0, 1); // [R T, V]
                let places: Vec<i64> = places
                    .iter()
                    .flat_map(|&(row, anchor)| {
                        (0..shape.slots()).map(move |s| row * length + (anchor + s).min(length - 1))
                    })
                    .collect();
                Some(logits.index_select(0, &Tensor::from_slice(&places)).unflatten(0, [-1, shape.slots()]))
            }
            false => None,
        };
        // [n, H] of the feature before the anchor.
        let features = golden.tensor("in.hidden_states")?.flatten(0, 1);
        let index: Vec<i64> = places.iter().map(|&(row, anchor)| row * length + (anchor - 1).max(0)).collect();
        let there: Vec<f32> = places.iter().map(|&(_, anchor)| f32::from(u8::from(anchor > 0))).collect();
        let norm = RmsNorm { weight: golden.tensor("w.hidden_norm.weight")?, epsilon: shape.layer.rms_norm_eps };
        let features = features.index_select(0, &Tensor::from_slice(&index));
        let context = norm.forward(&features.linear(&golden.tensor("w.fc.weight")?, None::<&Tensor>));
        Ok(Self {
            hidden,
            context: context * Tensor::from_slice(&there).unsqueeze(1),
            tokens: Tensor::from_slice(&tokens).view([-1, shape.block_size + 1]),
            before: Tensor::from_slice(&before),
            supervised: places.into_iter().map(slots).collect(),
            teacher,
            projection: Head::plain(golden.tensor("w.target_head.weight")?),
            embedding: golden.tensor("w.target_embed.weight")?,
        })
    }

    /// Loss and gradients of the head of a kind, in chunks of `piece` blocks.
    pub fn train(
        &self,
        golden: &Golden,
        kind: &HeadKind,
        names: &[(&str, &str)],
        (config, shape): (&BlockConfig, &BlockShape),
        piece: i64,
    ) -> Result<Trained, String> {
        let mut leaves: Vec<(String, Tensor)> = Vec::new();
        for spec in (kind.tensors)(config, shape).map_err(text)? {
            let stored = golden.tensor(&format!("w.{}", stored_name(golden, names, &spec.name)))?;
            if stored.size() != spec.shape {
                return Err(format!("{}: expected shape {:?}, got {:?}", spec.name, stored.size(), spec.shape));
            }
            leaves.push((spec.name, stored.set_requires_grad(true)));
        }
        let find = |name: &str| {
            let found = leaves.iter().find(|(leaf, _)| leaf == name);
            found.map(|(_, leaf)| leaf.shallow_clone()).ok_or_else(|| Error::Failed(format!("no tensor `{name}`")))
        };
        let head = (kind.build)(config, shape, &find).map_err(text)?;
        let blocks = self.supervised.len() as i64;
        let (mut sums, mut metrics): (Vec<(f64, Tensor, Tensor)>, Vec<Tensor>) = (Vec::new(), Vec::new());
        let counts = head.counts(&self.supervised);
        for first in (0..blocks).step_by(piece as usize) {
            let chunk = self.chunk(shape, first, piece.min(blocks - first))?;
            let loss = head.loss(&chunk).map_err(text)?;
            for (index, term) in loss.terms.into_iter().enumerate() {
                match (term.denominator, sums.get_mut(index)) {
                    (Denominator::Planned(_), Some((_, sum, _))) => *sum += term.sum,
                    (Denominator::Measured(count), Some((_, sum, total))) => {
                        *sum += term.sum;
                        *total += count;
                    }
                    (Denominator::Planned(place), None) => {
                        sums.push((term.factor, term.sum, Tensor::from(counts[place])));
                    }
                    (Denominator::Measured(count), None) => sums.push((term.factor, term.sum, count.copy())),
                }
            }
            metrics = match metrics.is_empty() {
                true => loss.metrics,
                false => metrics.into_iter().zip(loss.metrics).map(|(sum, more)| sum + more).collect(),
            };
        }
        let loss = sums
            .iter()
            .fold(Tensor::from(0.0), |loss, (factor, sum, count)| loss + sum / count.clamp_min(1e-12) * *factor);
        let tensors: Vec<&Tensor> = leaves.iter().map(|(_, leaf)| leaf).collect();
        let gradients = Tensor::run_backward(&[&loss], &tensors, false, false);
        let number = |tensor: &Tensor| tensor.double_value(&[]);
        let of_metrics = head.metric_counts(&self.supervised);
        // Every slot's loss, accuracy and chain come first.
        let accurate = (0..shape.slots() as usize).map(|slot| 3 * slot + 1);
        let (right, all) =
            accurate.fold((0.0, 0.0), |(right, all), place| (right + number(&metrics[place]), all + of_metrics[place]));
        let averages = metrics.iter().zip(&of_metrics).map(|(sum, count)| number(sum) / count.max(1.0));
        Ok(Trained {
            loss: number(&loss),
            parts: sums.iter().map(|(factor, sum, count)| (*factor, number(sum), number(count))).collect(),
            metrics: (kind.metrics)(config).map_err(text)?.into_iter().zip(averages).collect(),
            gradients: leaves.iter().map(|(name, _)| name.clone()).zip(gradients).collect(),
            hits: right / all,
            piece,
        })
    }

    fn chunk<'a>(&'a self, shape: &'a BlockShape, first: i64, count: i64) -> Result<Chunk<'a>, String> {
        let some = |tensor: &Tensor| tensor.narrow(0, first, count);
        let supervised = some(&Tensor::from_slice(&self.supervised.concat()).view([-1, shape.slots()]));
        let places = supervised.flatten(0, 1).nonzero().view([-1]);
        let teacher = self.teacher.as_ref().map(|teacher| some(teacher).flatten(0, 1).index_select(0, &places));
        let shares = document_shares(&vec![0; self.supervised.len()], &self.supervised);
        Ok(Chunk {
            shape,
            hidden: some(&self.hidden),
            context: Some(some(&self.context)),
            tokens: some(&self.tokens),
            before: some(&self.before),
            supervised,
            places,
            teacher,
            head: &self.projection,
            embedding: &self.embedding,
            vocabulary: None,
            progress: 0.0,
            whole: None,
            document_shares: some(&Tensor::from_slice(&shares)),
        })
    }
}

impl Trained {
    /// The loss against a file's, and each gradient that the file has of the head's tensors.
    pub fn check(&self, golden: &Golden, names: &[(&str, &str)]) -> Result<f64, String> {
        let mut largest = self.near(golden, "out.loss", self.loss)?;
        for (name, gradient) in &self.gradients {
            let name = format!("grad.{}", stored_name(golden, names, name));
            largest =
                largest.max(near(&format!("{name} in chunks of {}", self.piece), gradient, &golden.tensor(&name)?)?);
        }
        Ok(largest)
    }

    /// A number of a file.
    pub fn near(&self, golden: &Golden, name: &str, got: f64) -> Result<f64, String> {
        near(&format!("{name} in chunks of {}", self.piece), &Tensor::from(got), &golden.tensor(name)?)
    }

    /// How often a supervised slot's token is right.
    pub fn hits(&self) -> f64 {
        self.hits
    }

    /// Sum over what divides it, of a term.
    pub fn part(&self, index: usize) -> f64 {
        let (_, sum, count) = self.parts[index];
        sum / count.max(1e-12)
    }
}

/// What speculators' call says of the objective, as keys of the `draft` section.
pub fn speculators(call: &Value) -> Map<String, Value> {
    let loss = call.get("loss_fn").cloned().unwrap_or_else(|| json!("kl_div"));
    // A compound stands there as a text.
    let loss = loss.as_str().and_then(|text| serde_json::from_str(text).ok()).unwrap_or(loss);
    let number = |key: &str, default: f64| call.get(key).and_then(Value::as_f64).unwrap_or(default);
    let weights = match call.get("per_position_loss_weight").and_then(Value::as_str) {
        Some("dpace") => json!({"name": "d_pace", "alpha": number("dpace_alpha", 0.5)}),
        _ => json!({"name": "fixed", "gamma": number("gamma", 4.0)}),
    };
    let labels = if call.get("ce_from_data") == Some(&json!(true)) { "data" } else { "teacher" };
    let Value::Object(section) = json!({"loss": loss, "labels": labels, "weights": weights, "denominators": "rows"})
    else {
        unreachable!("an object")
    };
    section
}

/// What ModelOpt's configuration says of the objective, as keys of the `draft` section.
pub fn modelopt(config: &Value) -> Map<String, Value> {
    let number = |key: &str, default: f64| config.get(key).and_then(Value::as_f64).unwrap_or(default);
    let distilled = config.get("dflash_self_logit_distillation").and_then(Value::as_bool).unwrap_or(true);
    let loss = match config.get("dflash_lk_loss_type").and_then(Value::as_str) {
        Some("tv") => json!("lk_tv"),
        Some("lambda") => {
            let (scale, decay) = (number("dflash_lk_ce_scale", 1.0), number("dflash_lk_ce_decay", 1.0));
            json!({"lk_lambda": {"factor": 1, "scale": scale, "decay": decay}})
        }
        _ if distilled => json!("soft_ce"),
        _ => json!("ce"),
    };
    let gamma = number("dflash_loss_decay_factor", 0.0);
    let weights = match config.get("dflash_loss_objective").and_then(Value::as_str) {
        Some("decay") if gamma > 0.0 => json!({"name": "fixed", "gamma": gamma}),
        Some("decay") => json!({"name": "even"}),
        _ => json!({"name": "d_pace", "alpha": number("dflash_dpace_alpha", 0.5)}),
    };
    let own = |key: &str| setting(config, "dflash_architecture_config", key).cloned();
    let layers = own("num_hidden_layers").and_then(|layers| layers.as_u64()).unwrap_or(5) as usize;
    let window = config.get("dflash_swa_window_size").filter(|window| !window.is_null()).cloned();
    let causal = config.get("dflash_draft_attention") == Some(&json!("causal"));
    let Value::Object(mut section) = json!({
        "num_layers": layers,
        "mask_token_id": config["dflash_mask_token_id"],
        "is_causal": causal,
        "loss": loss, "labels": "data", "weights": weights, "denominators": "weights", "mask": "label",
    }) else {
        unreachable!("an object")
    };
    if let Some(window) = window {
        section.insert("layer_types".to_owned(), json!(vec!["sliding_attention"; layers]));
        section.insert("sliding_window".to_owned(), window);
    }
    with_conv(config, "dflash_architecture_config", &mut section);
    section
}

/// Sizes of a ModelOpt file: its base model's, with what its draft has of its own.
pub fn modelopt_sizes(golden: &Golden) -> Result<(Value, i64, Value), String> {
    let config = json_of(golden, "config")?;
    let mut sizes = json_of(golden, "base_config")?;
    for key in ["rms_norm_eps", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"] {
        if let Some(own) = setting(&config, "dflash_architecture_config", key) {
            sizes[key] = own.clone();
        }
    }
    let block_size = config.get("dflash_block_size").and_then(Value::as_i64).ok_or("there is no block size")?;
    Ok((config, block_size, sizes))
}

/// Numbers of blocks of a chunk to try: all at once and, where losses of chunks add up, a few.
pub fn pieces(config: &BlockConfig) -> Vec<i64> {
    // `lk_lambda` shares rows by an average over what it is given.
    let adds_up = !config.loss.terms().iter().any(|(loss, _)| loss.name() == "lk_lambda");
    if adds_up { vec![i64::MAX, 2] } else { vec![i64::MAX] }
}

fn numbers(tensor: &Tensor) -> Result<Vec<i64>, String> {
    Vec::<i64>::try_from(tensor.to_kind(Kind::Int64).flatten(0, -1)).map_err(text)
}
