//! Losses of block drafters on given logits: those of vllm-project/speculators 0.9.0, and from papers and recipes D-PARD,
//! DPALA, accept-until-fail, the first-error focal term, LK losses on hard labels, a confidence head's and a selector's.
//!
//! File layout: `in.*` logits of the draft and the target, `[n, B, V]`, tokens, mask and sequence of each block; `sp.*` and
//! `own.*` losses of a row (`elem`), averages, weights and gradients. Row 0 of a block is the anchor's and predicts nothing:
//! the layout is ours with `B - 1` slots.

use std::path::Path;

use serde_json::{Value, json};
use specforge::draft::block::chunk::{Chunk, Denominator, Term};
use specforge::draft::block::config::{BlockConfig, BlockShape};
use specforge::draft::block::losses::{
    Compound, Denominators, FirstErrorFocal, Labels, LkLambda, Objective, RowLoss, Rows, SelectorObjective, Weighting,
    confidence, credit, document_shares,
};
use specforge::models::TargetInfo;
use specforge::nn::Head;
use tch::{Device, Kind, Tensor};

use super::{Golden, compare};

const TOLERANCE: f64 = 1e-5;

/// Settings of a file.
struct Params {
    alpha: f64,
    gamma: f64,
    base_weight: f64,
    lambda: LkLambda,
}

impl Params {
    fn read(golden: &Golden) -> Result<Self, String> {
        let params: Value = serde_json::from_str(golden.text("params")?).map_err(text)?;
        let number = |key: &str| params[key].as_f64().ok_or_else(|| format!("`params` lack `{key}`"));
        let lambda = LkLambda { scale: number("kl_scale")?, decay: number("kl_decay")? };
        Ok(Self { alpha: number("alpha")?, gamma: number("gamma")?, base_weight: number("base_weight")?, lambda })
    }

    fn fixed(&self) -> Weighting {
        Weighting::Fixed { gamma: self.gamma }
    }

    fn d_pard(&self) -> Weighting {
        Weighting::DPard { alpha: self.alpha }
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// The blocks of a file.
struct Case<'a> {
    golden: &'a Golden,
    params: Params,
    shape: BlockShape,
    head: Head,
    /// `[n][S]`
    supervised: Vec<Vec<bool>>,
    shares: Vec<f64>,
    compared: std::cell::Cell<usize>,
}

/// Some blocks of a file: first and number.
type Blocks = (i64, i64);

impl<'a> Case<'a> {
    fn open(golden: &'a Golden) -> Result<Self, String> {
        let logits = golden.tensor("in.logits")?; // [n, B, V]
        let [blocks, rows, vocabulary] = logits.size()[..] else {
            return Err(format!("in.logits: expected three axes, got {:?}", logits.size()));
        };
        let whole = BlockConfig { mask_token_id: Some(0), head_dim: Some(2), ..BlockConfig::default() };
        let config = BlockConfig { num_layers: 1, block_size: rows, ..whole };
        let shape = config.shape(&TargetInfo::of(vocabulary, vocabulary, 4, 64)).map_err(text)?;
        let mask = golden.integers("in.mask")?;
        let supervised: Vec<Vec<bool>> =
            mask.chunks(rows as usize).map(|row| row[1..].iter().map(|&m| m != 0).collect()).collect();
        if mask.chunks(rows as usize).any(|row| row[0] != 0) || supervised.len() != blocks as usize {
            return Err("in.mask: expected a row for each block, and nothing of the anchor's".to_owned());
        }
        let documents: Vec<usize> = golden.integers("in.sequence")?.iter().map(|&number| number as usize).collect();
        let shares = document_shares(&documents, &supervised);
        let head = Head::plain(Tensor::eye(vocabulary, (Kind::Float, Device::Cpu)));
        Ok(Self {
            golden,
            params: Params::read(golden)?,
            shape,
            head,
            supervised,
            shares,
            compared: Default::default(),
        })
    }

    fn blocks(&self) -> i64 {
        self.supervised.len() as i64
    }

    fn supervised(&self) -> Tensor {
        let marks: Vec<bool> = self.supervised.concat();
        Tensor::from_slice(&marks).view([self.blocks(), -1])
    }

    /// Rows of the slots of a tensor `[n, B, ..]`.
    fn slots(&self, name: &str) -> Result<Tensor, String> {
        let values = self.golden.tensor(name)?;
        Ok(values.narrow(1, 1, values.size()[1] - 1))
    }

    fn chunk(&self, (first, count): Blocks) -> Result<Chunk<'_>, String> {
        let some = |tensor: Tensor| tensor.narrow(0, first, count);
        let supervised = some(self.supervised());
        let places = supervised.flatten(0, 1).nonzero().squeeze_dim(1);
        let tokens = some(self.golden.tensor("in.tokens")?);
        let teacher = some(self.slots("in.target_logits")?).flatten(0, 1).index_select(0, &places);
        Ok(Chunk {
            shape: &self.shape,
            hidden: Tensor::zeros([count, self.shape.block_size, 1], (Kind::Float, Device::Cpu)),
            context: None,
            before: tokens.select(1, 0),
            tokens: Tensor::cat(&[&tokens, &tokens.narrow(1, 0, 1)], 1),
            supervised,
            places,
            teacher: Some(teacher),
            head: &self.head,
            embedding: &self.head.weight,
            document_shares: some(Tensor::from_slice(&self.shares)),
            vocabulary: None,
            progress: 0.0,
            whole: None,
        })
    }

    /// What `terms` make of the whole and of pieces of two blocks: a loss and its gradient for `leaf`, `[n, B, ..]`. A term
    /// comes with what divides it where that is planned.
    fn run(
        &self,
        leaf: &str,
        terms: impl Fn(&Chunk<'_>, &Tensor, Blocks) -> specforge::error::Result<Vec<(Term, f64)>>,
    ) -> Result<Vec<(Tensor, Tensor)>, String> {
        let whole = vec![(0, self.blocks())];
        let pieces = (0..self.blocks()).step_by(2).map(|first| (first, 2.min(self.blocks() - first))).collect();
        [whole, pieces]
            .into_iter()
            .map(|chunks: Vec<Blocks>| {
                let leaf = self.golden.tensor(leaf)?.set_requires_grad(true);
                let mut sums: Vec<(Tensor, Tensor)> = Vec::new();
                for blocks in chunks {
                    let chunk = self.chunk(blocks)?;
                    let rows = leaf.narrow(0, blocks.0, blocks.1);
                    let rows = chunk.pick(&rows.narrow(1, 1, rows.size()[1] - 1));
                    for (index, (term, planned)) in terms(&chunk, &rows, blocks).map_err(text)?.into_iter().enumerate()
                    {
                        let (sum, count) = (term.sum * term.factor, term.denominator);
                        match (count, sums.get_mut(index)) {
                            (Denominator::Planned(_), Some((total, _))) => *total += sum,
                            (Denominator::Planned(_), None) => sums.push((sum, Tensor::from(planned))),
                            (Denominator::Measured(count), Some((total, counts))) => {
                                *total += sum;
                                *counts += count;
                            }
                            (Denominator::Measured(count), None) => sums.push((sum, count.copy())),
                        }
                    }
                }
                let zero = Tensor::from(0.0f64);
                let loss = sums.iter().fold(zero, |loss, (sum, count)| loss + sum / count.clamp_min(1e-12));
                let gradient = Tensor::run_backward(&[&loss], &[&leaf], false, false).remove(0);
                Ok((loss.detach(), gradient))
            })
            .collect()
    }

    /// Compares a loss and its gradient, where the file has one.
    fn check(
        &self,
        leaf: &str,
        value: &str,
        gradient: &str,
        terms: impl Fn(&Chunk<'_>, &Tensor, Blocks) -> specforge::error::Result<Vec<(Term, f64)>>,
    ) -> Result<(), String> {
        for (loss, slope) in self.run(leaf, terms)? {
            self.compare(value, &loss)?;
            if self.golden.has(gradient) {
                self.compare(gradient, &slope)?;
            }
        }
        Ok(())
    }

    fn check_objective(&self, value: &str, gradient: &str, objective: &Objective) -> Result<(), String> {
        let planned = objective.count(&self.supervised);
        let mean = self.mean_truth(objective)?;
        self.check("in.logits", value, gradient, |chunk, logits, _| {
            let rows = objective.rows(chunk, logits)?;
            let weights = objective.weights(chunk, &rows)?;
            Ok(vec![(objective.weighted(chunk, &rows, weights, Some(&mean))?.0, planned)])
        })
    }

    /// Mean of q(y) over everything supervised.
    fn mean_truth(&self, objective: &Objective) -> Result<Tensor, String> {
        let chunk = self.chunk((0, self.blocks()))?;
        let logits = chunk.pick(&self.slots("in.logits")?);
        Ok(objective.rows(&chunk, &logits).map_err(text)?.truth().mean(Kind::Float))
    }

    fn compare(&self, name: &str, got: &Tensor) -> Result<(), String> {
        let want = self.golden.tensor(name)?;
        self.compared.set(self.compared.get() + 1);
        let largest = if want.numel() == 0 { 0.0 } else { want.abs().max().double_value(&[]) };
        let scale = largest.max(1.0);
        let flat = |tensor: &Tensor| tensor.to_kind(Kind::Double).reshape([-1]);
        compare(name, &flat(got), &flat(&want), TOLERANCE * scale).map(|_| ())
    }
}

fn objective(
    loss: impl Into<Value>,
    labels: Labels,
    weights: Weighting,
    denominators: Denominators,
) -> Result<Objective, String> {
    let loss = serde_json::from_value::<Compound>(loss.into()).map_err(text)?;
    Objective::new(loss, labels, weights, denominators).map_err(text)
}

/// Checks one file.
pub fn check(path: &Path) -> Result<String, String> {
    check_golden(&Golden::open(path)?)
}

fn check_golden(golden: &Golden) -> Result<String, String> {
    let case = Case::open(golden)?;
    check_rows(&case)?;
    check_speculators(&case)?;
    check_d_pard(&case)?;
    check_until_fail(&case)?;
    check_hard_labels(&case)?;
    check_confidence(&case)?;
    check_selector(&case)?;
    Ok(format!("{} blocks whole and in pieces, {} tensors compared", case.blocks(), case.compared.get()))
}

/// Losses of every row, supervised or not.
fn check_rows(case: &Case<'_>) -> Result<(), String> {
    let flat = |name: &str| Ok::<_, String>(case.golden.tensor(name)?.flatten(0, 1));
    let (logits, teacher) = (flat("in.logits")?, flat("in.target_logits")?);
    let rows = Rows::new(&logits, Some(&teacher), &teacher.argmax(-1, false)).map_err(text)?;
    for name in case.golden.names_after("sp.elem.") {
        let loss = RowLoss::named(name).ok_or_else(|| format!("sp.elem.{name}: no such loss"))?;
        case.compare(&format!("sp.elem.{name}"), &rows.values(loss, None).map_err(text)?)?;
    }
    case.compare("own.elem.renyi_half", &rows.values(RowLoss::Renyi, None).map_err(text)?)?;
    case.compare("own.elem.overlap", &rows.acceptance().ok_or("no acceptance")?)
}

/// Averages of speculators: fixed decay or D-PACE, over the number of supervised rows.
fn check_speculators(case: &Case<'_>) -> Result<(), String> {
    let compound: Value = serde_json::from_str(case.golden.text("compound")?).map_err(text)?;
    for name in case.golden.names_after("sp.loss.") {
        let (loss, weights) = match name {
            "dpace" => (json!("ce"), Weighting::DPace { alpha: case.params.alpha, part: Default::default() }),
            "compound" => (compound.clone(), case.params.fixed()),
            name => (json!(name), case.params.fixed()),
        };
        let objective = objective(loss, Labels::Teacher, weights, Denominators::Rows)?;
        case.check_objective(&format!("sp.loss.{name}"), &format!("sp.grad.{name}"), &objective)?;
        if name == "dpace" {
            let chunk = case.chunk((0, case.blocks()))?;
            let rows = objective.rows(&chunk, &chunk.pick(&case.slots("in.logits")?)).map_err(text)?;
            let weights = objective.weights(&chunk, &rows).map_err(text)?;
            case.compare("sp.dpace_weights", &weights.constant_pad_nd([1, 0]))?;
        }
    }
    Ok(())
}

/// D-PARD and DPALA with their four denominators.
fn check_d_pard(case: &Case<'_>) -> Result<(), String> {
    let denominators = [
        ("per_block", Denominators::Blocks),
        ("per_position", Denominators::Rows),
        ("per_sequence", Denominators::Documents),
        ("sequence_anchor", Denominators::SequenceAnchor),
    ];
    for (family, loss) in [("dpard", "renyi"), ("dpala", "log_overlap")] {
        for (name, denominators) in denominators {
            let objective = objective(loss, Labels::Data, case.params.d_pard(), denominators)?;
            case.check_objective(&format!("own.{family}.{name}"), &format!("own.grad.{family}.{name}"), &objective)?;
            let chunk = case.chunk((0, case.blocks()))?;
            let rows = objective.rows(&chunk, &chunk.pick(&case.slots("in.logits")?)).map_err(text)?;
            let weights = objective.weights(&chunk, &rows).map_err(text)?;
            case.compare("own.dpard.credit", &weights.constant_pad_nd([1, 0]))?;
        }
    }
    Ok(())
}

/// Accept-until-fail, alone and on Domino's two branches, and the first-error focal term.
fn check_until_fail(case: &Case<'_>) -> Result<(), String> {
    let data = |weights| objective("ce", Labels::Data, weights, Denominators::Weights);
    let until_fail = data(Weighting::Auf { gamma: None })?;
    case.check_objective("own.auf.loss", "own.grad.auf.loss", &until_fail)?;
    let decayed = data(Weighting::Auf { gamma: Some(case.params.gamma) })?;
    case.check_objective("own.auf.loss_decay", "own.grad.auf.loss_decay", &decayed)?;

    // Which rows count, and the first errors among them: row numbers, -1 where there is none.
    let chunk = case.chunk((0, case.blocks()))?;
    let logits = chunk.pick(&case.slots("in.logits")?);
    let shifted = &logits + chunk.pick(&case.slots("in.shift")?);
    let first_errors = |logits: &Tensor, labels: Labels| {
        let objective = Objective { labels, ..until_fail.clone() };
        let rows = objective.rows(&chunk, logits).map_err(text)?;
        let hits = chunk.spread(&rows.hits().to_kind(Kind::Float), 1.0).gt(0.5);
        let marks = credit::first_error(&hits, &chunk.supervised).to_kind(Kind::Int64);
        let none = marks.sum_dim_intlist([1i64].as_slice(), false, Kind::Int64).eq(0);
        let places = marks.argmax(1, false) + 1;
        let weights = objective.weights(&chunk, &rows).map_err(text)?;
        Ok::<_, String>((places.where_self(&none.logical_not(), &places.full_like(-1)), weights))
    };
    let (errors, support) = first_errors(&logits, Labels::Data)?;
    case.compare("own.auf.first_error", &errors)?;
    case.compare("own.auf.support", &support.constant_pad_nd([1, 0]))?;
    let (_, support) = first_errors(&shifted, Labels::Data)?;
    case.compare("own.auf.support_final", &support.constant_pad_nd([1, 0]))?;
    case.compare("own.focal.first_error", &first_errors(&logits, Labels::Teacher)?.0)?;

    // Domino: the base's logits, and the final ones.
    let even = data(Weighting::Even)?;
    let planned = even.count(&case.supervised);
    let shift = case.slots("in.shift")?;
    for name in case.golden.names_after("own.auf.domino_") {
        let what = format!("own.auf.domino_{name}");
        case.check("in.logits", &what, &format!("own.grad.auf.domino_{name}"), |chunk, logits, (first, count)| {
            let shifted = logits + chunk.pick(&shift.narrow(0, first, count));
            let (base, last) = (even.rows(chunk, logits)?, even.rows(chunk, &shifted)?);
            // Who learns until the first error, and whose error that is.
            let (of_base, of_last) = match name {
                "full" => ((&even, &base), (&even, &last)),
                "base_only" => ((&until_fail, &base), (&even, &last)),
                "shared" => ((&until_fail, &last), (&until_fail, &last)),
                "final_only" => ((&even, &base), (&until_fail, &last)),
                _ => return Err(specforge::error::Error::Failed(format!("{name}: unknown"))),
            };
            let part = |rows: &Rows, (objective, judge): (&Objective, &Rows), factor: f64| {
                let weights = objective.weights(chunk, judge)?;
                let (term, _) = objective.weighted(chunk, rows, weights, None)?;
                Ok::<_, specforge::error::Error>((Term { factor, ..term }, planned))
            };
            let share = case.params.base_weight;
            Ok(vec![part(&base, of_base, share)?, part(&last, of_last, 1.0 - share)?])
        })?;
    }

    let focal = FirstErrorFocal { alpha: 1.0, gamma: Some(case.params.gamma), labels: Some(Labels::Teacher) };
    case.check("in.logits", "own.focal.loss", "own.grad.focal.loss", |chunk, logits, _| {
        Ok(vec![(even.focal(&focal, chunk, logits)?, 0.0)])
    })
}

/// LK losses on the tokens of the text.
fn check_hard_labels(case: &Case<'_>) -> Result<(), String> {
    let LkLambda { scale, decay } = case.params.lambda;
    let losses = [
        ("alpha_loss", json!("lk_alpha")),
        ("tv_loss", json!("lk_tv")),
        ("lambda_loss", json!({"lk_lambda": {"scale": scale, "decay": decay}})),
    ];
    for (name, loss) in losses {
        let objective = objective(loss, Labels::Data, case.params.fixed(), Denominators::Weights)?;
        case.check_objective(&format!("own.lk_hard.{name}"), &format!("own.grad.lk_hard.{name}"), &objective)?;
        let mean = case.mean_truth(&objective)?;
        case.compare("own.lk_hard.lambda", &((mean * -decay).exp() * scale))?;
    }
    Ok(())
}

fn check_confidence(case: &Case<'_>) -> Result<(), String> {
    let fixed = objective("tv", Labels::Data, case.params.fixed(), Denominators::Weights)?;
    let planned = fixed.count(&case.supervised);
    let logits = case.slots("in.logits")?;
    case.check(
        "in.confidence_logits",
        "own.confidence.loss",
        "own.grad.confidence.loss",
        |chunk, own, (first, count)| {
            let rows = fixed.rows(chunk, &chunk.pick(&logits.narrow(0, first, count)))?;
            let weights = fixed.weights(chunk, &rows)?;
            let acceptance = rows.acceptance().unwrap_or_else(|| own.zeros_like());
            Ok(vec![(fixed.weigh(chunk, &confidence(own, &acceptance), &weights), planned)])
        },
    )
}

fn check_selector(case: &Case<'_>) -> Result<(), String> {
    let variants = [
        ("sp", SelectorObjective::Speculators, Denominators::Rows),
        ("mo", SelectorObjective::Modelopt, Denominators::Weights),
        ("na", SelectorObjective::Automodel, Denominators::Weights),
        ("sf", SelectorObjective::Specforge, Denominators::Weights),
    ];
    let logits = case.slots("in.logits")?;
    for (name, selector, denominators) in variants {
        let base = objective("ce", Labels::Data, case.params.fixed(), denominators)?;
        let planned = base.count(&case.supervised);
        let (value, gradient) = (format!("own.selector.{name}"), format!("own.grad.selector.{name}"));
        case.check("in.candidate_scores", &value, &gradient, |chunk, scores, (first, count)| {
            let logits = chunk.pick(&logits.narrow(0, first, count));
            let weights = base.weights(chunk, &base.rows(chunk, &logits)?)?;
            let (_, candidates) = logits.topk(scores.size()[1], -1, true, true);
            let gold = selector.gold(chunk, &candidates)?;
            Ok(vec![(selector.term(&base, chunk, scores, &gold, &weights), planned)])
        })?;
    }
    Ok(())
}

/// Every output of a file is asked for by some check, which fails where it differs.
#[test]
fn a_spoilt_loss_file_fails() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/goldens/losses.safetensors");
    let golden = Golden::open(&path).unwrap();
    check_golden(&golden).unwrap();
    for prefix in ["sp.", "own."] {
        for rest in golden.names_after(prefix) {
            let name = format!("{prefix}{rest}");
            let value = golden.tensor(&name).unwrap();
            let other = if value.kind() == Kind::Int64 { value + 1 } else { value + 1e-3 };
            let problem = check_golden(&golden.again().with_tensor(&name, other)).unwrap_err();
            assert!(problem.contains(&name), "{name} spoilt, and the check says {problem}");
        }
    }
}
