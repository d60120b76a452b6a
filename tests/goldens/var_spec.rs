//! Speculation over scales: maps that VAR decodes alone with keyed noise (FoundationVision/VAR @78b9539), and the rounds of a
//! loop written for the goldens.
//!
//! File layout: `w.*` the target and the quantiser, `draft.*` a draft; `in.label`; `out.RUN.idx.S`, `.f_hat` and, for one
//! image, `.logits_mixed.S`; `mid.RUN.DRAFT.g2b.roundR.draft_idx.S` drafted maps. Metadata `config`: `runs`, `rounds`,
//! `truncated_draft_blocks`.

use std::path::Path;

use serde_json::Value;
use specforge::decode::scales::{Decoded, Gamma, Plan, Rule, ScaleDecoder, ScaleRequest, ScaleSampling};
use specforge::models::var::Var;
use specforge::models::vqvae::Quantizer;
use specforge::nn::noise;
use tch::Tensor;

use super::var::{VarFile, decoded, near, same, sampling_of, text};

/// Least margin of rounds that are compared: below it, rounding decides.
const LEAST_MARGIN: f64 = 2e-4;

/// Target and drafts of a file.
struct Models {
    target: Var,
    drafts: Vec<(&'static str, Var)>,
    quantizer: Quantizer,
}

impl Models {
    fn speculated(
        &self,
        (name, gamma, bonus): (&str, usize, bool),
        sampling: ScaleSampling,
        labels: &[i64],
    ) -> Result<Decoded, String> {
        let draft = self.drafts.iter().find(|(known, _)| *known == name).map(|(_, draft)| draft);
        let draft = draft.ok_or_else(|| format!("draft `{name}` is not known"))?;
        let plan = Plan::Speculate { gamma: Gamma::Fixed(gamma), bonus, rule: Rule::Exact };
        let images: Vec<u64> = (0..labels.len() as u64).collect();
        ScaleDecoder::new(&self.target, &self.quantizer, Some((draft, plan)), sampling)
            .and_then(|mut decoder| decoder.decode(ScaleRequest { labels, images: &images }))
            .map_err(text)
    }
}

/// Checks one file and says what was compared.
pub fn check(path: &Path) -> Result<String, String> {
    let file = VarFile::open(path)?;
    let sizes = &file.config["target"];
    let blocks =
        file.config["truncated_draft_blocks"].as_i64().ok_or("`config.truncated_draft_blocks`: expected a number")?;
    let models = Models {
        target: file.model("w.", sizes)?,
        drafts: vec![
            ("draft", file.model("draft.", &file.config["draft"])?),
            ("trunc", file.truncated("w.", sizes, blocks)?),
            ("self", file.model("w.", sizes)?),
        ],
        quantizer: file.quantizer()?,
    };
    if file.golden.has("mid.noise_seed1_scale1_batch0") {
        let want = file.golden.tensor("mid.noise_seed1_scale1_batch0")?; // [T, V]
        let (tokens, vocabulary) = want.size2().map_err(text)?;
        // The second of the file's seeds.
        let seed = file.config["noise_seeds"][1].as_u64().ok_or("`config.noise_seeds`: expected two seeds")?;
        let rows: Vec<Tensor> = (0..tokens as u64).map(|place| noise::gumbel_row(seed, 2, place, vocabulary)).collect();
        near("mid.noise_seed1_scale1_batch0", &Tensor::stack(&rows, 0), &file.golden, 1e-12)?;
    }
    let runs = file.config["runs"].as_object().ok_or("`config.runs`: expected an object")?;
    for (run, settings) in runs {
        let images = settings["B"].as_u64().ok_or_else(|| format!("`config.runs.{run}.B`: expected a number"))?;
        let (sampling, labels) = (sampling_of(settings)?, file.labels(Some(images as usize))?);
        let alone =
            decoded(&file, &models.target, &models.quantizer, (&format!("out.{run}"), sampling), &labels, None)?;
        near(&format!("out.{run}.f_hat"), alone.committed.f_hat(), &file.golden, 1e-5)?;
        if images > 1 {
            for (name, _) in &models.drafts {
                for (gamma, bonus) in [(1, true), (2, false), (9, true)] {
                    let got = models.speculated((name, gamma, bonus), sampling, &labels)?;
                    maps(&file, run, &got)?;
                }
            }
        }
    }
    let (rounds, drafted) = rounds(&file, &models, runs)?;
    Ok(format!("{} runs alone, {rounds} with a draft round by round, {drafted} drafted maps", runs.len()))
}

/// Every speculative decode of one image: its maps, its rounds and, where they are there, drafted maps.
fn rounds(file: &VarFile, models: &Models, runs: &serde_json::Map<String, Value>) -> Result<(usize, usize), String> {
    let all = file.config["rounds"].as_object().ok_or("`config.rounds`: expected an object")?;
    let (mut compared, mut drafted) = (0, 0);
    for (name, entry) in all {
        let wrong = || format!("`config.rounds.{name}`: not understood");
        let parts: Vec<&str> = name.split('/').collect();
        let [run, draft, gamma, bonus] = parts[..] else { return Err(wrong()) };
        let gamma: usize = gamma.strip_prefix('g').and_then(|gamma| gamma.parse().ok()).ok_or_else(wrong)?;
        let bonus = bonus == "bonus1";
        let sampling = sampling_of(runs.get(run).ok_or_else(wrong)?)?;
        let got = models.speculated((draft, gamma, bonus), sampling, &file.labels(Some(1))?)?;
        maps(file, run, &got)?;
        if entry["margin"].as_f64().ok_or_else(wrong)? < LEAST_MARGIN {
            continue;
        }
        let want: Vec<[i64; 5]> = serde_json::from_value(entry["rounds"].clone()).map_err(text)?;
        let rows: Vec<[i64; 5]> = got
            .rounds
            .iter()
            .map(|round| {
                let counts = [round.start, round.drafted, round.accepted, round.committed].map(|count| count as i64);
                [counts[0], counts[1], counts[2], counts[3], round.target_tokens]
            })
            .collect();
        if rows != want {
            return Err(format!("{name}: expected rounds {want:?}, got {rows:?}"));
        }
        compared += 1;
        if gamma == 2 && bonus {
            drafted += drafted_maps(file, &format!("mid.{run}.{draft}.g2b.round"), &got)?;
        }
    }
    Ok((compared, drafted))
}

/// Compares every drafted map that the file has under a prefix.
fn drafted_maps(file: &VarFile, prefix: &str, got: &Decoded) -> Result<usize, String> {
    let mut compared = 0;
    for rest in file.golden.names_after(prefix) {
        let numbers: Option<(usize, usize)> =
            rest.split_once(".draft_idx.").and_then(|(round, scale)| Some((round.parse().ok()?, scale.parse().ok()?)));
        let name = format!("{prefix}{rest}");
        let (round, scale) = numbers.ok_or_else(|| format!("{name}: not understood"))?;
        let round = got.rounds.get(round).ok_or_else(|| format!("{name}: there is no such round"))?;
        let place = scale.checked_sub(round.start).and_then(|place| round.drafted_maps.get(place));
        same(&name, place.ok_or_else(|| format!("{name}: was not drafted"))?, &file.golden)?;
        compared += 1;
    }
    Ok(compared)
}

/// Compares decoded maps with those that the target decodes alone.
fn maps(file: &VarFile, run: &str, got: &Decoded) -> Result<(), String> {
    for (scale, map) in got.committed.maps().iter().enumerate() {
        same(&format!("out.{run}.idx.{scale}"), map, &file.golden)?;
    }
    near(&format!("out.{run}.f_hat"), got.committed.f_hat(), &file.golden, 1e-5)
}
