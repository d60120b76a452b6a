//! Domino: one block as SGLang 0.5.23 decodes it (`infer_domino*`), and training of SpecForge `a6b6b02` (`domino_*`).

use std::path::Path;

use serde_json::{Map, Value, json};
use specforge::draft::StepKey;
use specforge::draft::block::heads::domino::{Domino, DominoConfig};
use specforge::draft::block::heads::sequential::{Drafted, greedy, walk};
use tch::Tensor;

use super::Golden;
use super::block_heads::{close, flag, greedy_length, near, number, of_slots, same, shape, weights};
use super::block_training::{json_of, same_names, specforge, text};

/// Where the base logits' share is what the configuration says.
const BEGINNING: StepKey = StepKey { seed: 0, step: 0, total: 1 };

/// The keys of `draft.head` that a reference's configuration says.
fn head_keys(config: &Value) -> Map<String, Value> {
    let own = &config["dflash_config"];
    let names = ["gru_hidden_dim", "emb_dim", "pure_draft_prefix_len"];
    let given = names.iter().filter_map(|name| Some(((*name).to_owned(), own.get(*name)?.clone())));
    given.collect()
}

/// Tokens of the pool, which stand behind these words.
fn pool_size(golden: &Golden) -> Option<i64> {
    let words = golden.text("source").ok()?.split("candidate pool ").nth(1)?;
    words.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok()
}

/// Checks a file of two blocks.
pub fn check_block(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let config = json_of(&golden, "config")?;
    let head = golden.tensor("w.target_head.weight")?; // [V, H]
    let embedding = golden.tensor("w.target_embed.weight")?; // [V, H]
    let (mut worst, mut drafted) = (0.0f64, 0);
    for step in ["step1", "step2"] {
        let get = |name: &str| golden.tensor(&format!("out.{step}.{name}"));
        let hidden = get("hidden")?.unsqueeze(0); // [1, B, H]
        let rows = hidden.size()[1];
        let shift = flag(&config["dflash_config"], "shift_label", false);
        let section = json!({"head": head_keys(&config)}).as_object().cloned().unwrap_or_default();
        let sizes = (embedding.size()[1], embedding.size()[0]);
        let (config, shape) = shape("domino", rows, shift, sizes, section)?;
        let own = DominoConfig::read(&config).map_err(text)?;
        let domino = Domino::new(&own, &shape, &weights(&golden)).map_err(text)?;

        let drafts = rows - 1;
        let base = hidden.narrow(1, shape.first_row(), shape.slots()).linear(&head, None::<Tensor>); // [1, S, V]
        let want = get("base_logits")?;
        worst = worst.max(near(&format!("{step} base logits"), &base.get(0).narrow(0, 0, drafts), &want)?);
        let anchors = golden.tensor(if step == "step1" { "in.tokens" } else { "in.tokens_step2" })?;
        let anchors = anchors.narrow(0, anchors.size()[0] - 1, 1);
        let mut block = Drafted {
            hidden: &hidden,
            first_row: shape.first_row(),
            base: &base,
            anchors: &anchors,
            embedding: &embedding,
            tokens: None,
            pool: None,
        };
        let walked = walk(&domino, &block, drafts, &mut greedy).map_err(text)?;
        same(&format!("{step} tokens"), &walked.tokens, &get("tokens")?)?;
        let logits = Tensor::stack(&walked.logits, 1).squeeze_dim(0);
        let corrections = (&logits - base.get(0).narrow(0, 0, drafts)).narrow(0, 1, drafts - 1);
        worst = worst.max(near(&format!("{step} corrections"), &corrections, &get("corrections")?)?);

        block.pool = domino.pool(&base, pool_size(&golden).unwrap_or(rows - 1));
        let walked = walk(&domino, &block, drafts, &mut greedy).map_err(text)?;
        same(&format!("{step} tokens of a pool"), &walked.tokens, &get("tokens_pool")?)?;
        drafted += 2 * drafts;
    }
    Ok(format!("{drafted} tokens of two blocks, with and without a pool, corrections, {worst:.1e}"))
}

/// Checks a file of SpecForge's training.
pub fn check_specforge(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let (config, keywords) = (json_of(&golden, "config")?, json_of(&golden, "model_kw")?);
    let share = number(&json_of(&golden, "call_kw")?, "lambda_base", 0.0);
    let shift = flag(&keywords, "shift_label", flag(&config["dflash_config"], "shift_label", false));
    let mut head = head_keys(&config);
    head.entry("pure_draft_prefix_len").or_insert(json!(0));
    let case_of = |share: f64| {
        let mut head = head.clone();
        head.insert("base_weight".to_owned(), json!(share));
        let layout = if shift { "shift" } else { "fill_in" };
        specforge(&golden, "domino", json!({"layout": layout, "head": head}))
    };
    let case = case_of(share)?;
    let step = case.step_at(BEGINNING)?;
    step.check(&golden, &same_names)?;

    let want = |name: &str| Ok::<_, String>(golden.tensor(&format!("out.{name}"))?.double_value(&[]));
    let mut worst = 0.0f64;
    for (name, share) in [("final_loss", 0.0), ("base_loss", 1.0)] {
        let got = case_of(share)?.step_at(BEGINNING)?.tally.objective.double_value(&[]);
        worst = worst.max(close(name, got, want(name)?)?);
    }
    let (hits, rows) = of_slots(&case, &step, "accuracy");
    worst = worst.max(close("accuracy", hits / rows, want("accuracy")?)?);
    worst = worst.max(close("base_accuracy", case.average(&step, "base_accuracy")?, want("base_accuracy")?)?);
    // There a slot that is not supervised does not end a block, and here it does.
    let holes = |marks: &Vec<bool>| marks.windows(2).any(|pair| !pair[0] && pair[1]) || !marks[0];
    let mut lengths = 0;
    if !case.blocks.supervised().iter().any(holes) {
        let got =
            [greedy_length(&case, &step, "base_acceptance_length")?, case.average(&step, "base_acceptance_length")?];
        for (name, got) in ["accept_len", "base_accept_len"].into_iter().zip(got) {
            worst = worst.max(close(name, got, want(name)?)?);
            lengths += 1;
        }
    }
    Ok(format!("loss, {} gradients, {} figures, {worst:.1e}", step.gradients.len(), 4 + lengths))
}
