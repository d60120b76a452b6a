//! `specforge images`

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Instant;

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::{LazyProgress, Output, note, numbers};
use crate::decode::scales::{
    Decoded, Gamma, Plan, Rule, ScaleDecoder, ScaleRecord, ScaleRequest, ScaleSampling, Seconds, Source,
};
use crate::device;
use crate::error::{Error, Result, foreign};
use crate::files::{self, png::Pixels};
use crate::models::var::{Var, VarConfig, load_var};
use crate::models::vqvae;
use crate::stop::Stop;
use crate::trace::ModelName;
use crate::trace::scales::{ScaleHeader, ScaleRecorder};

mod eval;
mod train_vqvae;

use eval::EvalArgs;
use train_vqvae::TrainVqvaeArgs;

/// File name of the report in an output folder.
const REPORT: &str = "images.json";
/// File name of the contact sheet there.
const SHEET: &str = "contact-sheet.png";
/// Images in a row of it.
const COLUMNS: i64 = 8;

/// Next-scale image models: VAR and its image tokenizer.
#[derive(Debug, Clone, Args)]
pub(super) struct ImagesArgs {
    #[command(subcommand)]
    command: ImagesCommand,
}

#[derive(Debug, Clone, Subcommand)]
enum ImagesCommand {
    /// Decode images of labels, with or without a draft.
    Generate(Box<GenerateArgs>),
    /// Measure a draft by decoding images with it and without it.
    Eval(Box<EvalArgs>),
    /// Train the image tokenizer of such a model on small grey pictures.
    TrainVqvae(TrainVqvaeArgs),
}

#[derive(Debug, Clone, Args)]
struct GenerateArgs {
    /// Folder of a VAR model: model.safetensors or a .pth with the original names, and perhaps config.json. Or the file of
    /// weights itself.
    #[arg(long, value_name = "DIR")]
    target: PathBuf,
    /// Folder or file of its image tokenizer, a VQVAE. Without it the folder `vae` in the target's.
    #[arg(long, value_name = "DIR")]
    vae: Option<PathBuf>,
    /// A smaller VAR model of the same image tokenizer, which drafts scales.
    #[arg(long, value_name = "DIR")]
    draft: Option<PathBuf>,
    /// Label of each image, a number; `none` is an image without one.
    #[arg(long, required = true, value_delimiter = ',', value_name = "LABELS", allow_hyphen_values = true)]
    labels: Vec<Label>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// How many scales are drafted before the target looks: a number, or auto, which measures what pays.
    #[arg(long, default_value = "auto", requires = "draft", value_name = "N|auto")]
    gamma: GammaArg,
    /// Do not let the target decide the scale behind drafted ones that were all kept.
    #[arg(long, requires = "draft")]
    no_bonus: bool,
    /// When a drafted scale is kept: exact (the target's own images), maximal (lossless in distribution), or one of the lossy
    /// rules match-rate:SHARE, top-k:K, divergence:NATS. hand-over:N lets the target decode N scales and the draft all others,
    /// unseen (CoDe, lossy).
    #[arg(long, default_value = "exact", requires = "draft", value_name = "RULE")]
    rule: RuleArg,
    /// Images decoded at once. A drafted scale is kept where all of them agree. 1 with a draft and 8 without one.
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    max_rows: Option<usize>,
    /// Folder to write; it must not be there, or be empty.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Record every committed scale in a file for `specforge compare`.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
}

/// How tokens are drawn.
#[derive(Debug, Clone, Args)]
struct SamplingArgs {
    /// Seed of sampling: the noise of an image depends on it and on the image's number alone.
    #[arg(long, default_value_t = 0, allow_hyphen_values = true, value_parser = numbers::at_least(0u64))]
    seed: u64,
    /// Strength of guidance at the last scale; 0 is none.
    #[arg(long, default_value_t = 1.5, allow_hyphen_values = true, value_parser = numbers::any)]
    cfg: f64,
    /// Only this many of the likeliest tokens; 0 is all.
    #[arg(long, default_value_t = 900, allow_hyphen_values = true, value_parser = numbers::at_least(0usize))]
    top_k: usize,
    /// Only the likeliest tokens that together have this probability; 0 is all.
    #[arg(long, default_value_t = 0.96, allow_hyphen_values = true, value_parser = numbers::any)]
    top_p: f64,
    /// 0 is greedy.
    #[arg(long, default_value_t = 1.0, allow_hyphen_values = true, value_parser = numbers::any)]
    temperature: f64,
}

impl SamplingArgs {
    fn sampling(&self) -> Result<ScaleSampling> {
        let Self { seed, cfg, top_k, top_p, temperature } = *self;
        let sampling = ScaleSampling { cfg, top_k, top_p, temperature, seed };
        sampling.check().map_err(|problem| Error::Usage(format!("--{}", problem.replacen('_', "-", 1))))?;
        Ok(sampling)
    }
}

/// Value of `--labels`: nothing is an image without a label.
#[derive(Debug, Clone, Copy)]
struct Label(Option<i64>);

impl FromStr for Label {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("none", _) => Ok(Self(None)),
            (_, Ok(label)) => Ok(Self(Some(label))),
            _ => Err("expected a whole number or none".to_owned()),
        }
    }
}

/// Value of `--gamma`.
#[derive(Debug, Clone, Copy)]
struct GammaArg(Gamma);

impl FromStr for GammaArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("auto", _) => Ok(Self(Gamma::Auto)),
            (_, Ok(count)) => Ok(Self(Gamma::Fixed(count))),
            _ => Err("expected a whole number or auto".to_owned()),
        }
    }
}

/// Value of `--rule`.
#[derive(Debug, Clone, Copy)]
enum RuleArg {
    Keep(Rule),
    HandOver(usize),
}

impl RuleArg {
    fn plan(self, gamma: Gamma, bonus: bool) -> Plan {
        match self {
            Self::Keep(rule) => Plan::Speculate { gamma, bonus, rule },
            Self::HandOver(scales) => Plan::HandOver(scales),
        }
    }
}

impl FromStr for RuleArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse().map_err(|_| "expected a number behind the colon".to_owned());
        let whole = |text: &str| text.parse().map_err(|_| "expected a whole number behind the colon".to_owned());
        let rule = match text.split_once(':') {
            None if text == "exact" => Rule::Exact,
            None if text == "maximal" => Rule::Maximal,
            Some(("match-rate", share)) => Rule::MatchRate(number(share)?),
            Some(("top-k", count)) => Rule::TopK(whole(count)?),
            Some(("divergence", most)) => Rule::Divergence(number(most)?),
            Some(("hand-over", scales)) => return Ok(Self::HandOver(whole(scales)?)),
            _ => {
                let all = "exact, maximal, match-rate:SHARE, top-k:K, divergence:NATS or hand-over:N";
                return Err(format!("expected {all}"));
            }
        };
        rule.check().map(|()| Self::Keep(rule))
    }
}

/// One image of the report.
#[derive(Serialize)]
struct Image {
    /// Its number, which keys its noise.
    number: u64,
    /// Nothing for an image without one.
    label: Option<i64>,
    /// File in the folder.
    file: String,
    /// Of each scale the tokens, row by row.
    maps: Vec<Vec<i64>>,
}

/// What is printed, and what the folder's report holds.
#[derive(Serialize)]
struct Report {
    settings: serde_json::Value,
    lossless: bool,
    /// Passes of the target; of several images at once one.
    target_calls: usize,
    /// Tokens of an image in them, summed over images; guidance reads them twice.
    target_tokens: i64,
    draft_calls: usize,
    draft_tokens: i64,
    /// Scales that were decided, summed over what was decoded at once: passes of the target alone.
    scales: usize,
    /// Tokens of all images.
    tokens: i64,
    seconds: Parts,
    /// By scale.
    agreement: Vec<Agreement>,
    images: Vec<Image>,
    /// The contact sheet in the folder.
    sheet: String,
}

/// Wall time by part, in seconds.
#[derive(Serialize)]
struct Parts {
    #[serde(flatten)]
    decoding: Seconds,
    /// From maps to pixels.
    pixels: f64,
}

/// How often the draft was right about a scale.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Agreement {
    scale: usize,
    /// How often it was drafted behind scales that all stood.
    drafted: usize,
    kept: usize,
    /// Positions of these drafts, and how many the rule agreed with.
    positions: i64,
    agreed: i64,
}

pub(super) fn run(args: &ImagesArgs, stop: &Stop, output: &Output) -> Result<()> {
    match &args.command {
        ImagesCommand::Generate(args) => generate(args, output),
        ImagesCommand::Eval(args) => eval::run(args, output),
        ImagesCommand::TrainVqvae(args) => train_vqvae::run(args, stop, output),
    }
}

fn generate(args: &GenerateArgs, output: &Output) -> Result<()> {
    let sampling = args.sampling.sampling()?;
    free_folder(&args.out)?;
    let place = device::choose(&args.device)?;
    let target = load(&args.target, place)?;
    let labels = labels(&args.labels, target.config())?;
    let vae = vae_of(args.vae.as_deref(), &args.target)?;
    let tokenizer = vqvae::load(&vae, Some(&target.config().patch_nums), target.kind(), target.device())?;
    let draft = args.draft.as_deref().map(|path| load(path, place)).transpose()?;
    let plan = args.rule.plan(args.gamma.0, !args.no_bonus);
    let rows = args.max_rows.unwrap_or(if draft.is_some() { 1 } else { 8 });
    let with = draft.as_ref().map(|draft| (draft, plan));
    let mut decoder = ScaleDecoder::new(&target, tokenizer.quantizer(), with, sampling)?;
    let mut recorder = match &args.trace {
        None => None,
        Some(path) => {
            let header = ScaleHeader {
                target: ModelName::draft(&args.target)?,
                vae: ModelName::draft(&vae)?,
                draft: args.draft.as_deref().map(ModelName::draft).transpose()?,
                dtype: if target.kind() == Kind::Double { "float64" } else { "float32" }.to_owned(),
                device: device::name(place),
                sampling,
                plan: draft.as_ref().map_or_else(|| "target alone".to_owned(), |_| plan.to_string()),
                is_exact: draft.is_none() || matches!(plan, Plan::Speculate { rule: Rule::Exact, .. }),
                patch_nums: target.config().patch_nums.clone(),
                vocabulary: target.config().vocab_size,
            };
            Some(ScaleRecorder::create(path, header)?)
        }
    };
    let staged = files::StagedDir::new(&args.out)?;
    let mut report = Report {
        settings: settings(args, &sampling, draft.is_some().then_some(plan), rows, &target),
        lossless: draft.is_none() || plan.is_lossless(),
        target_calls: 0,
        target_tokens: 0,
        draft_calls: 0,
        draft_tokens: 0,
        scales: 0,
        tokens: 0,
        seconds: Parts { decoding: Seconds::default(), pixels: 0.0 },
        agreement: (0..target.config().scales()).map(|scale| Agreement { scale, ..Agreement::default() }).collect(),
        images: Vec::new(),
        sheet: SHEET.to_owned(),
    };
    let progress = LazyProgress::new("images", "images");
    let images: Vec<u64> = (0..labels.len() as u64).collect();
    let mut pictures = Vec::new();
    for (labels, images) in labels.chunks(rows).zip(images.chunks(rows)) {
        if let Some(recorder) = &mut recorder {
            recorder.images(labels, images)?;
        }
        let request = ScaleRequest { labels, images };
        let decoded = decoder.decode_seen(request, &mut |seen| match &mut recorder {
            Some(recorder) => recorder.scale(seen),
            None => Ok(()),
        })?;
        let begun = Instant::now();
        let pixels = tokenizer.image01(decoded.committed.f_hat())?; // [B, 3, h, w]
        report.seconds.pixels += begun.elapsed().as_secs_f64();
        report.add(&decoded, (labels, images), target.config())?;
        pictures.push(pixels);
        progress.set(report.images.len() as u64, args.labels.len() as u64);
    }
    write_pictures(staged.path(), &report, &pictures)?;
    files::write_json(&staged.path().join(REPORT), &report)?;
    staged.commit()?;
    if let Some(recorder) = recorder {
        recorder.finish()?;
    }
    progress.finish(&format!("written to {}", args.out.display()));
    output.result(&report, || text(&report));
    Ok(())
}

/// Loads a model, and says what of its files was passed over.
fn load(path: &Path, place: Device) -> Result<Var> {
    let loaded = load_var(path, place)?;
    if !loaded.strange.is_empty() {
        let keys = loaded.strange.join("`, `");
        note(format!("warning: {}: passed over what is not known: `{keys}`", path.display()));
    }
    Ok(loaded.model)
}

/// Refuses a folder that holds something: what is written takes its place.
fn free_folder(out: &Path) -> Result<()> {
    let holds = match std::fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) => return Err(Error::io("look into", out)(error)),
    };
    match holds {
        false => Ok(()),
        true => {
            Err(Error::bad_file(out, "is there and not empty").with_hint("name another folder, or remove this one"))
        }
    }
}

/// Where the image tokenizer of a target lies: where it was said, or beside the target.
pub(in crate::cli) fn vae_of(named: Option<&Path>, target: &Path) -> Result<PathBuf> {
    let beside = target.join("vae");
    match named {
        Some(path) => Ok(path.to_path_buf()),
        None if beside.is_dir() => Ok(beside),
        None => Err(Error::Usage(format!(
            "--vae: expected the target's image tokenizer, a VQVAE; without it, it is looked for in {}",
            beside.display()
        ))),
    }
}

/// Labels as the model knows them.
fn labels(labels: &[Label], config: &VarConfig) -> Result<Vec<i64>> {
    let last = config.num_classes - 1;
    let known = |label: &Label| match label.0 {
        None => Ok(config.null_label()),
        Some(label) if (0..=last).contains(&label) => Ok(label),
        Some(label) => Err(Error::Usage(format!("--labels: expected numbers from 0 to {last}, or none, got {label}"))),
    };
    labels.iter().map(known).collect()
}

/// What decides the output, as it was understood.
fn settings(
    args: &GenerateArgs,
    sampling: &ScaleSampling,
    plan: Option<Plan>,
    rows: usize,
    target: &Var,
) -> serde_json::Value {
    json!({
        "target": args.target,
        "vae": args.vae,
        "draft": args.draft,
        "plan": plan.map(|plan| plan.to_string()),
        "sampling": sampling,
        "rows": rows,
        "patch_nums": target.config().patch_nums,
        "device": device::name(target.device()),
        "threads": tch::get_num_threads(),
    })
}

impl Report {
    /// Adds images that were decoded together.
    fn add(&mut self, decoded: &Decoded, (labels, images): (&[i64], &[u64]), config: &VarConfig) -> Result<()> {
        let count = images.len() as i64;
        self.target_calls += decoded.target_calls;
        self.target_tokens += count * decoded.target_tokens;
        self.draft_calls += decoded.draft_calls;
        self.draft_tokens += count * decoded.draft_tokens;
        self.scales += decoded.scales.len();
        self.tokens += count * config.length();
        self.seconds.decoding.add(&decoded.seconds);
        for ScaleRecord { scale, source, agreed, positions, .. } in &decoded.scales {
            if let (Some(row), Some(agreed)) = (self.agreement.get_mut(*scale), agreed) {
                row.drafted += 1;
                row.kept += usize::from(*source == Source::Accepted);
                row.positions += positions;
                row.agreed += agreed;
            }
        }
        let maps: Vec<Vec<Vec<i64>>> =
            decoded.committed.maps().iter().map(|map| Ok(Vec::<Vec<i64>>::try_from(map)?)).collect::<Result<_>>()?;
        for (row, (&label, &number)) in labels.iter().zip(images).enumerate() {
            self.images.push(Image {
                number,
                label: Some(label).filter(|label| *label != config.null_label()),
                file: format!("image-{number:04}.png"),
                maps: maps.iter().filter_map(|map| map.get(row).cloned()).collect(),
            });
        }
        Ok(())
    }
}

/// Writes a file for each image, and all of them on one sheet. `pictures` are those of the report, `[B, 3, h, w]` each, in order.
fn write_pictures(folder: &Path, report: &Report, pictures: &[Tensor]) -> Result<()> {
    let all = Tensor::f_cat(pictures, 0)?; // [all, 3, h, w]
    for (place, image) in report.images.iter().enumerate() {
        Pixels::of(&all.f_select(0, place as i64)?)?.write(&folder.join(&image.file))?;
    }
    Pixels::sheet(&all, COLUMNS)?.write(&folder.join(SHEET))
}

fn text(report: &Report) -> String {
    let Parts { decoding: seconds, pixels } = &report.seconds;
    let mut text = format!(
        "{} images, {} tokens: {} passes of the target over {} tokens for {} scales, {} of the draft; {}\n",
        report.images.len(),
        report.tokens,
        report.target_calls,
        report.target_tokens,
        report.scales,
        report.draft_calls,
        if report.lossless { "lossless" } else { "LOSSY" },
    );
    let other = (seconds.total - seconds.target - seconds.draft - seconds.choosing - seconds.quantizer).max(0.0);
    let _ = writeln!(
        text,
        "{:.2} s: target {:.2}, draft {:.2}, choosing {:.2}, quantiser {:.2}, the rest {other:.2}; pixels {pixels:.2} s",
        seconds.total, seconds.target, seconds.draft, seconds.choosing, seconds.quantizer
    );
    for row in report.agreement.iter().filter(|row| row.drafted > 0) {
        let _ = writeln!(
            text,
            "scale {}: {} of {} drafts kept, {:.1} % of tokens agree",
            row.scale,
            row.kept,
            row.drafted,
            100.0 * row.agreed as f64 / row.positions.max(1) as f64
        );
    }
    foreign::block(&text).into_owned()
}
