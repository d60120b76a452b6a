//! Blocks drafted in inference, and whole generations: z-lab's `dflash` 0.1.0, DeepSpec, and the heads of SGLang and vLLM.
//!
//! The weights of a file are written as a published folder, which is read as any user's: so what a configuration says is
//! seen to arrive, too. `infer_*`: one block behind a prefix, then more committed tokens and a second block; context keys and
//! values of every layer, and the backbone's rows. `loop_*`: greedy generations with a target, token for token.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use specforge::decode::drafter::{Asked, DraftSampling, Guesser, drafters};
use specforge::decode::engine::{Engine, EngineOptions, Request};
use specforge::decode::policy::Policy;
use specforge::draft::block::backbone::Backbone;
use specforge::export;
use specforge::models::load_target;
use specforge::nn::Processors;
use specforge::weights;
use tch::{Device, Kind, Tensor};

use super::Golden;
use super::block_parts::near;
use super::block_training::{json_of, text};

/// What the configuration of a file's kind is called by engines.
fn architecture(kind: &str, config: &Value) -> &'static str {
    match kind {
        _ if !config["dflash_config"]["selector_rank"].is_null() => "DFlash2DraftModel",
        kind if kind.contains("dspark") => "Qwen3DSparkModel",
        kind if kind.contains("lilicorr") => "LiLiCorrDraftModel",
        kind if kind.contains("xpress") => "Qwen3XPressModel",
        _ => "DFlashDraftModel",
    }
}

/// Writes the draft of a file as a folder, for a target of so many layers.
pub fn folder(golden: &Golden, layers: usize) -> Result<tempfile::TempDir, String> {
    let folder = tempfile::tempdir().map_err(text)?;
    let mut config = json_of(golden, "config")?;
    config["architectures"] = json!([architecture(golden.text("kind")?, &config)]);
    config["model_type"] = json!("qwen3");
    config["num_target_layers"] = json!(layers);
    if config["dflash_config"]["projector_type"] == "domino" {
        for key in ["gru_hidden_dim", "emb_dim"] {
            config[key] = config["dflash_config"][key].clone();
        }
    }
    std::fs::write(folder.path().join("config.json"), config.to_string()).map_err(text)?;
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    for name in golden.names_after("w.").filter(|name| !name.starts_with("target")) {
        tensors.insert(name.to_owned(), golden.tensor(&format!("w.{name}"))?);
    }
    let tensors: Vec<(String, Tensor)> = tensors.into_iter().collect();
    weights::write_tensors(&folder.path().join("model.safetensors"), &tensors, &[]).map_err(text)?;
    Ok(folder)
}

/// The backbone of a file, and what it drafts in two steps.
pub struct Inference {
    /// Of each step: rows behind the last norm, `[B, H]`.
    pub hidden: Vec<Tensor>,
    /// Of each step: what the backbone reads of the token before the anchor, `[H]`.
    pub last_seen: Vec<Tensor>,
    /// Of each step: tokens up to the anchor.
    pub tokens: Vec<Vec<i64>>,
    /// `[V, H]`
    pub embedding: Tensor,
    /// `[V, H]`
    pub head: Tensor,
}

/// Runs the backbone of a file and compares rows and context.
pub fn backbone(golden: &Golden) -> Result<Inference, String> {
    let _guard = tch::no_grad_guard();
    let ids = json_of(golden, "config")?;
    let ids =
        [&ids["dflash_config"]["target_layer_ids"], &ids["target_layer_ids"]].into_iter().find_map(Value::as_array);
    let last = ids.ok_or("no target_layer_ids")?.iter().filter_map(Value::as_u64).max().ok_or("no layers")?;
    let folder = folder(golden, last as usize + 3)?;
    let imported = export::block::read(folder.path(), None).map_err(text)?;
    let find = |name: &str| {
        let found = imported.tensors.iter().find(|(other, _)| other == name).map(|(_, tensor)| tensor.shallow_clone());
        found.ok_or_else(|| specforge::error::Error::Failed(format!("no tensor {name}")))
    };
    let shape = imported.shape.clone();
    let backbone = Backbone::new(&shape, &find, Device::Cpu).map_err(text)?;
    let of_target = |own: &str, target: &str| match golden.has(target) {
        true => golden.tensor(target),
        false => golden.tensor(own),
    };
    let embedding = of_target("w.embed_tokens.weight", "w.target_embed.weight")?;
    let head = of_target("w.lm_head.weight", "w.target_head.weight")?;
    let mut cache = backbone.new_cache(1, 4);
    let mut tokens = golden.integers("in.tokens")?;
    let mut inference = Inference { hidden: Vec::new(), last_seen: Vec::new(), tokens: Vec::new(), embedding, head };
    for (step, features) in [(1, "in.features"), (2, "in.features_step2")] {
        if step == 2 {
            tokens.extend(golden.integers("in.tokens_step2")?);
        }
        let features = golden.tensor(features)?; // [P, nf * H]
        let captured = features.chunk(shape.target_layer_ids.len() as i64, 1);
        let context = backbone.project_features(&captured).map_err(text)?; // [P, H]
        backbone.extend_cache(&context.unsqueeze(0), &[context.size()[0]], &mut cache).map_err(text)?;
        if cache.lengths() != [tokens.len() as i64 - 1] {
            return Err(format!("step {step}: {:?} tokens of context behind {}", cache.lengths(), tokens.len()));
        }
        for layer in 0..shape.layers.len() {
            for (name, own) in ["k", "v"].iter().zip(cache.contents(layer, 0)) {
                let file = format!("mid.step{step}.ctx_{name}.{layer}");
                near(&file, &own, &golden.tensor(&file)?)?;
            }
        }
        let mut rows = vec![tokens[tokens.len() - 1]];
        rows.resize(shape.block_size as usize, shape.mask_token_id);
        let rows = backbone.embed(&inference.embedding, &Tensor::from_slice(&rows).unsqueeze(0)).map_err(text)?;
        let hidden = backbone.forward_cached(&rows, &mut cache).map_err(text)?.squeeze_dim(0); // [B, H]
        near(&format!("step {step}: rows"), &hidden, &golden.tensor(&format!("out.step{step}.hidden"))?)?;
        inference.hidden.push(hidden);
        inference.last_seen.push(context.get(context.size()[0] - 1));
        inference.tokens.push(tokens.clone());
    }
    Ok(inference)
}

/// Plain DFlash: rows, logits, tokens.
pub fn check_dflash(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let inference = backbone(&golden)?;
    for (step, hidden) in inference.hidden.iter().enumerate() {
        let file = |name: &str| golden.tensor(&format!("out.step{}.{name}", step + 1));
        let logits = hidden.narrow(0, 1, hidden.size()[0] - 1).matmul(&inference.head.transpose(0, 1));
        near("logits", &logits, &file("logits")?)?;
        if !logits.argmax(-1, false).equal(&file("tokens")?) {
            return Err(format!("step {}: other tokens", step + 1));
        }
    }
    Ok("two blocks: context, rows, logits, tokens".to_owned())
}

/// Whole greedy generations with a target of the file.
pub fn check_loop(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let target_folder = tempfile::tempdir().map_err(text)?;
    let mut config = json_of(&golden, "target_config")?;
    config["architectures"] = json!(["Qwen3ForCausalLM"]);
    config["model_type"] = json!("qwen3");
    std::fs::write(target_folder.path().join("config.json"), config.to_string()).map_err(text)?;
    let names: Vec<String> = golden.names_after("w.target.").map(str::to_owned).collect();
    let tensors = names.iter().map(|name| Ok((name.clone(), golden.tensor(&format!("w.target.{name}"))?)));
    let tensors: Vec<(String, Tensor)> = tensors.collect::<Result<_, String>>()?;
    weights::write_tensors(&target_folder.path().join("model.safetensors"), &tensors, &[]).map_err(text)?;
    let target = load_target(target_folder.path(), Kind::Float, Device::Cpu).map_err(text)?;

    let draft = folder(&golden, target.info().num_layers())?;
    let format = export::format_of(
        &serde_json::from_slice(&std::fs::read(draft.path().join("config.json")).map_err(text)?).map_err(text)?,
    );
    let format = format.ok_or("the folder has no known format")?;
    let kind = drafters().into_iter().find(|kind| kind.formats.contains(&format.name)).ok_or("no drafter")?;
    let asked = Asked { tree: kind.default_tree, target: target.as_ref(), sampling: DraftSampling::Greedy };
    let Guesser { drafter, .. } = (kind.from_export)(draft.path(), asked).map_err(text)?;
    let stop: Vec<u32> = serde_json::from_str(golden.text("stop_token_ids")?).map_err(text)?;
    let options = EngineOptions {
        processors: Processors::default(),
        policy: Policy::Keyed { seed: 0 },
        stop_tokens: stop,
        max_rows: 1,
    };
    let mut engine = Engine::new(target.as_ref(), drafter, options).map_err(text)?;
    let prompt: Vec<u32> = golden.integers("in.prompt")?.iter().map(|&token| token as u32).collect();
    let max_new_tokens = golden.text("max_new_tokens")?.parse().map_err(text)?;
    engine.submit(Request { tag: 0, prompt: prompt.clone(), max_new_tokens, key: 0 }).map_err(text)?;
    let left = engine.run(&mut specforge::decode::event::Silent).map_err(text)?;
    let decoded = left.into_iter().next().ok_or("nothing was decoded")?.decoded.map_err(text)?;
    let all: Vec<i64> = prompt.iter().chain(&decoded.tokens).map(|&token| i64::from(token)).collect();
    let want = golden.integers("out.tokens")?;
    if all != want {
        return Err(format!("tokens: expected {want:?}, got {all:?}"));
    }
    let lengths: Vec<i64> = decoded.rounds.iter().map(|round| round.tokens as i64).collect();
    let want = golden.integers("out.acceptance_lengths")?;
    if lengths != want {
        return Err(format!("acceptance lengths: expected {want:?}, got {lengths:?}"));
    }
    Ok(format!("{} tokens, {} rounds", all.len(), lengths.len()))
}

/// The backbone's part of a file, then a head's.
pub fn behind_backbone(path: &Path, head: fn(&Path) -> Result<String, String>) -> Result<String, String> {
    backbone(&Golden::open(path)?)?;
    Ok(format!("context and rows of two blocks; {}", head(path)?))
}
