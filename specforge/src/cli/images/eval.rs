//! `specforge images eval`

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use tch::Tensor;

use super::super::{LazyProgress, Output, numbers};
use super::{GammaArg, RuleArg, SamplingArgs, free_folder, load, vae_of};
use crate::data::GreyImages;
use crate::decode::scales::{Plan, Rule};
use crate::device;
use crate::error::{Error, Result};
use crate::eval::pictures::{Measured, PictureEval, Report, html};
use crate::files::{self, png::Pixels};
use crate::html::short;
use crate::models::vqvae;

/// Files of an output folder: report, page, and a sheet of the target's images above those with the draft.
const REPORT: &str = "report.json";
const PAGE: &str = "report.html";
const SHEET: &str = "contact-sheet.png";
/// Images of each way of decoding on the sheet.
const SHOWN: i64 = 20;

/// Measures a draft by decoding images with it and without it.
#[derive(Debug, Clone, Args)]
pub(super) struct EvalArgs {
    /// Folder of a VAR model, with its image tokenizer in the folder `vae` unless --vae names it.
    #[arg(long, value_name = "DIR")]
    target: PathBuf,
    /// A smaller VAR model of the same image tokenizer, which drafts scales.
    #[arg(long, value_name = "DIR")]
    draft: PathBuf,
    /// Folder or file of the image tokenizer.
    #[arg(long, value_name = "DIR")]
    vae: Option<PathBuf>,
    /// How many images are decoded in each way; labels take turns.
    #[arg(long, default_value_t = 100, value_name = "N", allow_hyphen_values = true, value_parser = numbers::at_least(2usize))]
    images: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// How many scales are drafted before the target looks: a number, or auto, which measures what pays.
    #[arg(long, default_value = "auto", value_name = "N|auto")]
    gamma: GammaArg,
    /// Further rules to decode with beside exact ones: see `images generate --rule`.
    #[arg(long, value_delimiter = ',', value_name = "RULES")]
    rules: Vec<RuleArg>,
    /// Real pictures, a table as `images train-vqvae` reads it: decoded ones are compared with the last of them.
    #[arg(long, value_name = "FILE")]
    real: Option<PathBuf>,
    /// Folder to write; it must not be there, or be empty.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
}

pub(super) fn run(args: &EvalArgs, output: &Output) -> Result<()> {
    let sampling = args.sampling.sampling()?;
    free_folder(&args.out)?;
    let place = device::choose(&args.device)?;
    let (target, draft) = (load(&args.target, place)?, load(&args.draft, place)?);
    let vae = vae_of(args.vae.as_deref(), &args.target)?;
    let tokenizer = vqvae::load(&vae, Some(&target.config().patch_nums), target.kind(), target.device())?;
    let real = args.real.as_deref().map(GreyImages::read).transpose()?;
    let labels: Vec<i64> = (0..target.config().num_classes.max(1)).cycle().take(args.images).collect();
    let plans = plans(args, target.config().scales());
    let eval = PictureEval {
        target: &target,
        draft: &draft,
        tokenizer: &tokenizer,
        sampling,
        labels: &labels,
        plans: &plans,
        real: real.as_ref(),
    };
    let settings = json!({
        "target": args.target,
        "draft": args.draft,
        "vae": vae,
        "sampling": sampling,
        "patch_nums": target.config().patch_nums,
        "device": device::name(target.device()),
        "threads": tch::get_num_threads(),
        "real": args.real,
    });
    let staged = files::StagedDir::new(&args.out)?;
    let progress = LazyProgress::new("images", "images");
    let Measured { report, pictures } = eval.run(settings, &|done| progress.set(done as u64, args.images as u64))?;
    write(staged.path(), &report, &pictures)?;
    staged.commit()?;
    progress.finish(&format!("written to {}", args.out.display()));
    output.result(&report, || text(&report));
    match report.is_sound() {
        true => Ok(()),
        false => Err(Error::Failed(html::sound(&report).1)),
    }
}

/// Exact decoding with the number of scales that was asked for, with every fixed number as well where that is left to the
/// clock, and the further rules, which draft all scales where it is: what pays says nothing about what they keep.
fn plans(args: &EvalArgs, scales: usize) -> Vec<Plan> {
    use crate::decode::scales::Gamma;
    let exact = |gamma| Plan::Speculate { gamma, bonus: true, rule: Rule::Exact };
    let mut plans = vec![exact(args.gamma.0)];
    let further = match args.gamma.0 {
        Gamma::Auto => {
            plans.extend([1, 2, scales].map(|gamma| exact(Gamma::Fixed(gamma))));
            Gamma::Fixed(scales)
        }
        fixed => fixed,
    };
    plans.extend(args.rules.iter().map(|rule| rule.plan(further, true)));
    plans
}

/// Writes report, page and sheets into a folder.
fn write(folder: &Path, report: &Report, pictures: &[Tensor]) -> Result<()> {
    let first = |all: &Tensor| Ok::<_, Error>(all.f_narrow(0, 0, SHOWN.min(all.size()[0]))?);
    let shown = pictures.iter().map(first).collect::<Result<Vec<_>>>()?;
    let sheet = |images: &Tensor| Pixels::sheet(images, SHOWN)?.to_png().map_err(Error::io("compress", folder));
    let sheets = shown.iter().map(sheet).collect::<Result<Vec<_>>>()?;
    let both: Vec<&Tensor> = shown.iter().take(2).collect();
    Pixels::sheet(&Tensor::f_cat(&both, 0)?, SHOWN)?.write(&folder.join(SHEET))?;
    files::write_text(&folder.join(PAGE), &html::page(report, &sheets))?;
    files::write_json(&folder.join(REPORT), report)
}

fn text(report: &Report) -> String {
    let mut text = format!(
        "{} images of {} scales and {} codes\n{:<40} {:>7} {:>8} {:>8} {:>7} {:>9} {:>7} {:>8}\n",
        report.pictures,
        report.scales,
        report.codes,
        "",
        "passes",
        "codes",
        "seconds",
        "faster",
        "equal",
        "PSNR",
        "Frechet"
    );
    for row in std::iter::once(&report.alone).chain(&report.drafted) {
        let _ = writeln!(
            text,
            "{:<40} {:>7.2} {:>8.1} {:>8.2} {:>7.2} {:>9} {:>7} {:>8}",
            row.plan,
            report.calls(row),
            row.target_tokens as f64 / report.pictures.max(1) as f64,
            row.seconds.total,
            row.speedup,
            row.identical,
            row.psnr.map_or("-".to_owned(), |psnr| format!("{psnr:.1}")),
            short(row.frechet),
        );
    }
    for scale in report.drafted.iter().rfind(|row| row.exact).map(|row| &row.agreement).into_iter().flatten() {
        if scale.drafted > 0 {
            let _ = writeln!(
                text,
                "scale {}: {} of {} drafts kept, {:.1} % of codes agree",
                scale.scale,
                scale.kept,
                scale.drafted,
                100.0 * scale.agreed as f64 / scale.positions.max(1) as f64
            );
        }
    }
    let floor = &report.floor;
    let _ = writeln!(
        text,
        "at most {:.2} times as fast with a perfect draft that costs nothing, {:.2} with this one's passes",
        floor.most_without_draft, floor.most_with_draft
    );
    let _ = write!(text, "{}", html::sound(report).1);
    text
}
