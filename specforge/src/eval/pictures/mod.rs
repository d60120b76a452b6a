//! What a draft is worth to a next-scale target: pictures decoded without it, with it, and with it under rules that are not
//! lossless, one after the other in the same run; whether the lossless ones are equal, what it saved, and how far the others
//! are from the target's own.

use serde::Serialize;
use serde_json::Value;
use tch::Tensor;

use crate::data::GreyImages;
use crate::decode::scales::{
    Decoded, Plan, Rule, ScaleDecoder, ScaleRecord, ScaleRequest, ScaleSampling, Seconds, Source,
};
use crate::error::{Error, Result};
use crate::images;
use crate::models::var::Var;
use crate::models::vqvae::Vqvae;

pub mod distance;
pub mod floor;
pub mod html;

pub use floor::Floor;

/// What is measured.
#[derive(Debug)]
pub struct PictureEval<'a> {
    /// The target.
    pub target: &'a Var,
    /// The draft.
    pub draft: &'a Var,
    /// The image tokenizer of both.
    pub tokenizer: &'a Vqvae,
    /// How codes are drawn.
    pub sampling: ScaleSampling,
    /// Label of each picture; its number keys its noise.
    pub labels: &'a [i64],
    /// How the draft is used, one after the other.
    pub plans: &'a [Plan],
    /// Real pictures, for the distance between them and decoded ones.
    pub real: Option<&'a GreyImages>,
}

/// How often the draft was right about a scale.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Agreement {
    /// Its number.
    pub scale: usize,
    /// Codes of it.
    pub codes: i64,
    /// How often it was drafted behind scales that all stood.
    pub drafted: usize,
    /// How often it was kept.
    pub kept: usize,
    /// Positions of these drafts.
    pub positions: i64,
    /// Those that the rule agreed with.
    pub agreed: i64,
}

/// One way of decoding.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// What it is.
    pub plan: String,
    /// Whether the pictures are the target's, or follow its distribution.
    pub lossless: bool,
    /// Whether they must be the target's own, code by code.
    pub exact: bool,
    /// Passes of the target, over all pictures.
    pub target_calls: usize,
    /// Codes of pictures in them.
    pub target_tokens: i64,
    /// Passes of the draft.
    pub draft_calls: usize,
    /// Codes of pictures in them.
    pub draft_tokens: i64,
    /// Wall time by part.
    pub seconds: Seconds,
    /// Wall time of the target alone over this one's.
    pub speedup: f64,
    /// Pictures whose codes are those of the target alone.
    pub identical: usize,
    /// Peak signal-to-noise ratio to the pictures of the target alone; nothing where all are equal.
    pub psnr: Option<f64>,
    /// Fréchet distance in the encoder's features to the pictures of the target alone.
    pub frechet: f64,
    /// The same to real pictures.
    pub frechet_to_real: Option<f64>,
    /// By scale.
    pub agreement: Vec<Agreement>,
}

/// Everything.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What decides the output, as it was understood.
    pub settings: Value,
    /// How many pictures.
    pub pictures: usize,
    /// Scales of a picture: passes that the target makes alone.
    pub scales: usize,
    /// Codes of a picture.
    pub codes: i64,
    /// The target alone, with its cache.
    pub alone: Row,
    /// With the draft.
    pub drafted: Vec<Row>,
    /// What could be gained at most.
    pub floor: Floor,
}

impl Report {
    /// Whether every way of decoding that promises the target's own pictures kept the promise.
    pub fn is_sound(&self) -> bool {
        self.drafted.iter().filter(|row| row.exact).all(|row| row.identical == self.pictures)
    }

    /// Passes of the target for a picture.
    pub fn calls(&self, row: &Row) -> f64 {
        row.target_calls as f64 / self.pictures.max(1) as f64
    }
}

/// The report, and pictures `[B, 3, h, w]` of pixels from 0 to 1: those of the target alone, then those of each plan.
#[derive(Debug)]
pub struct Measured {
    /// The report.
    pub report: Report,
    /// Pictures by way of decoding.
    pub pictures: Vec<Tensor>,
}

/// Sums of one way of decoding.
struct Sums {
    row: Row,
    maps: Vec<Vec<Tensor>>,
    pixels: Vec<Tensor>,
}

impl PictureEval<'_> {
    /// Decodes everything. Each picture is decoded in all ways before the next one, so that a machine's mood is shared.
    /// `progress` is told how many pictures are done.
    pub fn run(&self, settings: Value, progress: &dyn Fn(usize)) -> Result<Measured> {
        if self.labels.len() < 2 {
            return Err(Error::Usage(format!("expected at least 2 pictures, got {}", self.labels.len())));
        }
        let quantizer = self.tokenizer.quantizer();
        let with = |plan: Option<Plan>| {
            ScaleDecoder::new(self.target, quantizer, plan.map(|plan| (self.draft, plan)), self.sampling)
        };
        let plans: Vec<Option<Plan>> = std::iter::once(None).chain(self.plans.iter().copied().map(Some)).collect();
        let mut decoders = plans.iter().map(|plan| with(*plan)).collect::<Result<Vec<_>>>()?;
        let mut sums: Vec<Sums> = plans.iter().map(|plan| self.sums(*plan)).collect();
        // Nobody's first picture pays for what is made once.
        let warm = ScaleRequest { labels: &self.labels[..1], images: &[u64::MAX] };
        decoders.iter_mut().try_for_each(|decoder| decoder.decode(warm).map(drop))?;
        for (number, label) in self.labels.iter().enumerate() {
            let request = ScaleRequest { labels: &[*label], images: &[number as u64] };
            for (decoder, sums) in decoders.iter_mut().zip(&mut sums) {
                let decoded = decoder.decode(request)?;
                sums.pixels.push(self.tokenizer.image01(decoded.committed.f_hat())?);
                sums.row.add(&decoded);
                sums.maps.push(decoded.committed.maps().iter().map(Tensor::shallow_clone).collect());
            }
            progress(number + 1);
        }
        self.report(settings, sums)
    }

    fn sums(&self, plan: Option<Plan>) -> Sums {
        let config = self.target.config();
        let agreement = |scale| Agreement { scale, codes: config.tokens(scale), ..Agreement::default() };
        let row = Row {
            plan: plan.map_or_else(|| "target alone".to_owned(), |plan| plan.to_string()),
            lossless: plan.is_none_or(|plan| plan.is_lossless()),
            exact: matches!(plan, None | Some(Plan::Speculate { rule: Rule::Exact, .. })),
            target_calls: 0,
            target_tokens: 0,
            draft_calls: 0,
            draft_tokens: 0,
            seconds: Seconds::default(),
            speedup: 1.0,
            identical: 0,
            psnr: None,
            frechet: 0.0,
            frechet_to_real: None,
            agreement: (0..config.scales()).map(agreement).collect(),
        };
        Sums { row, maps: Vec::new(), pixels: Vec::new() }
    }

    fn report(&self, settings: Value, sums: Vec<Sums>) -> Result<Measured> {
        let real = self.real.map(|real| self.real_features(real)).transpose()?;
        let pictures: Vec<Tensor> =
            sums.iter().map(|sums| Ok(Tensor::f_cat(&sums.pixels, 0)?)).collect::<Result<_>>()?;
        let mut own = None;
        let mut rows = Vec::new();
        let first = sums.first().map(|sums| (sums.row.seconds.total, &sums.maps)).ok_or_else(nothing)?;
        for (Sums { row, maps, .. }, pixels) in sums.iter().zip(&pictures) {
            let features = distance::features(self.tokenizer, pixels)?;
            let (own_pixels, own_features) = own.get_or_insert_with(|| (pixels, features.shallow_clone()));
            let same = |(one, other): &(&Vec<Tensor>, &Vec<Tensor>)| {
                one.iter().zip(other.iter()).all(|(one, other)| one.equal(other))
            };
            rows.push(Row {
                speedup: first.0 / row.seconds.total,
                identical: maps.iter().zip(first.1).filter(same).count(),
                psnr: distance::psnr(own_pixels, pixels)?,
                frechet: distance::frechet(own_features, &features)?,
                frechet_to_real: real.as_ref().map(|real| distance::frechet(real, &features)).transpose()?,
                ..row.clone()
            });
        }
        let (label, maps) = (self.labels.first().copied(), first.1.first());
        let (Some(label), Some(maps)) = (label, maps) else { return Err(nothing()) };
        let quantizer = self.tokenizer.quantizer();
        let floor = Floor::measure((self.target, self.draft), quantizer, maps, label, self.sampling.cfg > 0.0)?;
        let alone = rows.remove(0);
        let config = self.target.config();
        let report = Report {
            settings,
            pictures: self.labels.len(),
            scales: config.scales(),
            codes: config.length(),
            alone,
            drafted: rows,
            floor,
        };
        Ok(Measured { report, pictures })
    }

    /// Features of as many real pictures as were decoded, from the end of the file: those that are held out where the image
    /// tokenizer was trained on it.
    fn real_features(&self, real: &GreyImages) -> Result<Tensor> {
        let count = real.len().min(self.labels.len());
        let which: Vec<usize> = (real.len() - count..real.len()).collect();
        let pixels = images::pixels(real, &which, self.tokenizer.config().pixels())? * 0.5 + 0.5;
        distance::features(self.tokenizer, &pixels)
    }
}

fn nothing() -> Error {
    Error::Failed("nothing was decoded".to_owned())
}

impl Row {
    /// Adds a picture.
    fn add(&mut self, decoded: &Decoded) {
        self.target_calls += decoded.target_calls;
        self.target_tokens += decoded.target_tokens;
        self.draft_calls += decoded.draft_calls;
        self.draft_tokens += decoded.draft_tokens;
        self.seconds.add(&decoded.seconds);
        for ScaleRecord { scale, source, agreed, positions, .. } in &decoded.scales {
            if let (Some(row), Some(agreed)) = (self.agreement.get_mut(*scale), agreed) {
                row.drafted += 1;
                row.kept += usize::from(*source == Source::Accepted);
                row.positions += positions;
                row.agreed += agreed;
            }
        }
    }
}
