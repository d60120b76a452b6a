//! Writes a trace of scales while images are decoded. Nothing appears under the trace's name before [`ScaleRecorder::finish`].

use std::path::Path;

use tch::{Kind, Tensor};

use super::file::{FORMAT, ImagesRecord, Record, ScaleHeader, ScaleLine};
use crate::decode::scales::{ScaleSampling, ScaleSeen};
use crate::error::Result;
use crate::trace::lines::{Close, LineWriter};
use crate::trace::metrics::Real;

/// Records every scale that a decoder commits.
#[derive(Debug)]
pub struct ScaleRecorder {
    lines: LineWriter,
    sampling: ScaleSampling,
    images: Vec<u64>,
}

impl ScaleRecorder {
    /// Starts a trace.
    pub fn create(path: &Path, header: ScaleHeader) -> Result<Self> {
        let sampling = header.sampling;
        Ok(Self { lines: LineWriter::create(path, FORMAT, header)?, sampling, images: Vec::new() })
    }

    /// Images that are decoded together from now on.
    pub fn images(&mut self, labels: &[i64], images: &[u64]) -> Result<()> {
        self.images = images.to_vec();
        self.lines.record(&Record::Images(ImagesRecord { labels: labels.to_vec(), images: images.to_vec() }))
    }

    /// A scale of theirs.
    pub fn scale(&mut self, seen: &ScaleSeen<'_>) -> Result<()> {
        let filtered = self.sampling.filtered(seen.logits);
        let scores = self.sampling.scores(&filtered, seen.record.scale, &self.images)?; // [B, T, V]
        let (best, tokens) = two_best(&scores)?; // [B, T, 2] each, or one
        let margin = match best.size().last() {
            Some(2) => best.select(-1, 0) - best.select(-1, 1),
            _ => best.select(-1, 0).full_like(f64::INFINITY),
        };
        let digest = Digest::of(seen.logits)?;
        self.lines.record(&Record::Scale(Box::new(ScaleLine {
            scale: seen.record.clone(),
            map: whole(seen.map)?,
            drafted: seen.drafted.map(whole).transpose()?,
            best: whole(&tokens.select(-1, 0))?,
            margin: real(&margin)?,
            largest: real(&digest.largest)?,
            logsumexp: real(&digest.logsumexp)?,
            sum: lengths(seen.state.f_hat())?.into_iter().map(Real).collect(),
            line: 0,
        })))
    }

    /// Gives the trace its name.
    pub fn finish(self) -> Result<()> {
        self.lines.close(|records| Close { records })
    }
}

/// What is recorded of logits `[B, T, V]`: `[B, T]` float64 each.
#[derive(Debug)]
pub(super) struct Digest {
    pub(super) largest: Tensor,
    pub(super) logsumexp: Tensor,
}

impl Digest {
    pub(super) fn of(logits: &Tensor) -> Result<Self> {
        let wide = logits.f_to_kind(Kind::Double)?;
        let largest = wide.f_amax([-1i64].as_slice(), false)?;
        Ok(Self { largest, logsumexp: wide.f_logsumexp([-1i64].as_slice(), false)? })
    }
}

/// The two largest scores of every position with their tokens, `[B, T, 2]` each; one where there is one token.
pub(super) fn two_best(scores: &Tensor) -> Result<(Tensor, Tensor)> {
    let count = scores.size().last().copied().unwrap_or(0).min(2);
    Ok(scores.f_topk(count, -1, true, true)?)
}

/// Euclidean length of each image's sum `[B, Z, P, P]`.
pub(super) fn lengths(f_hat: &Tensor) -> Result<Vec<f64>> {
    let flat = f_hat.f_to_kind(Kind::Double)?.f_flatten(1, -1)?;
    Ok(Vec::try_from(flat.f_norm_scalaropt_dim(2.0, [1i64].as_slice(), false)?)?)
}

fn whole(map: &Tensor) -> Result<Vec<Vec<i64>>> {
    Ok(Vec::try_from(map.f_to_device(tch::Device::Cpu)?)?)
}

fn real(numbers: &Tensor) -> Result<Vec<Vec<Real>>> {
    let rows = Vec::<Vec<f64>>::try_from(numbers.f_to_device(tch::Device::Cpu)?)?;
    Ok(rows.into_iter().map(|row| row.into_iter().map(Real).collect()).collect())
}
