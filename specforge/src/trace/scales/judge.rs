//! The target's own word on a trace of scales: one pass over the committed maps, every scale read from those before it.

use tch::{Kind, Tensor};

use super::file::{ImagesTrace, ScaleHeader, ScaleLine, ScaleTrace};
use super::finding::{ScaleFinding, ScaleKind};
use super::recorder::{Digest, lengths, two_best};
use crate::decode::Tolerance;
use crate::decode::scales::{Committed, Source};
use crate::error::{Error, Result};
use crate::models::var::{Conditions, ScaleCache, ScaleInput, Var};
use crate::models::vqvae::Quantizer;
use crate::trace::finding::Side;
use crate::trace::metrics::Real;

/// Who is asked.
#[derive(Debug, Clone, Copy)]
pub struct ScaleJudge<'a> {
    /// The target of a trace.
    pub target: &'a Var,
    /// Its image tokenizer's quantiser.
    pub quantizer: &'a Quantizer,
}

/// What the target chooses at one position behind the committed maps before its scale.
#[derive(Debug, Clone, Copy)]
pub struct Chosen {
    /// The token.
    pub token: i64,
    /// Distance of the two largest scores.
    pub margin: f64,
}

/// Images of a trace as the target reads them.
struct Reading<'a> {
    judge: ScaleJudge<'a>,
    header: &'a ScaleHeader,
    batch: &'a ImagesTrace,
    conditions: Conditions,
    /// What was committed, scale by scale: the state before each scale, and the last one.
    states: Vec<Committed>,
}

impl ScaleJudge<'_> {
    /// The first thing wrong with the logits, sums or choices of each of a trace's batches.
    pub fn check(&self, trace: &ScaleTrace, side: Side) -> Result<Vec<ScaleFinding>> {
        let mut findings = Vec::new();
        for batch in &trace.batches {
            if let Some(finding) = Reading::new(*self, &trace.header, batch)?.first_wrong()? {
                findings.push(ScaleFinding { side: Some(side), ..finding });
            }
        }
        Ok(findings)
    }

    /// What the target chooses at a position of a scale behind what a trace committed before the scale.
    pub fn chosen(
        &self,
        trace: &ScaleTrace,
        (batch, row): (usize, usize),
        (scale, position): (usize, usize),
    ) -> Result<Option<Chosen>> {
        let Some(batch) = trace.batches.get(batch) else { return Ok(None) };
        let reading = Reading::new(*self, &trace.header, batch)?;
        if reading.states.len() <= scale {
            return Ok(None);
        }
        let logits = reading.logits(scale + 1)?.pop().ok_or_else(nothing)?;
        let sampling = &trace.header.sampling;
        let scores = sampling.scores(&sampling.filtered(&logits), scale, &batch.images.images)?; // [B, T, V]
        let (best, tokens) = two_best(&scores.f_select(0, row as i64)?.f_select(0, position as i64)?)?;
        let margin = if best.size() == [2] { best.double_value(&[0]) - best.double_value(&[1]) } else { f64::INFINITY };
        Ok(Some(Chosen { token: tokens.int64_value(&[0]), margin }))
    }
}

impl<'a> Reading<'a> {
    fn new(judge: ScaleJudge<'a>, header: &'a ScaleHeader, batch: &'a ImagesTrace) -> Result<Self> {
        let config = judge.target.config();
        if config.patch_nums != header.patch_nums || config.vocab_size != header.vocabulary {
            return Err(Error::config("target", "the trace is of a model of other scales or tokens"));
        }
        let mut labels = batch.images.labels.clone();
        if header.sampling.is_guided() {
            labels.extend(batch.images.labels.iter().map(|_| config.null_label()));
        }
        let conditions = judge.target.conditions(&Tensor::from_slice(&labels))?;
        let mut states = vec![Committed::nothing(judge.quantizer, batch.images.images.len() as i64)];
        for (scale, line) in batch.scales.iter().enumerate() {
            // What stands behind a gap was read from something that is not known.
            let Some(last) = states.last().filter(|_| line.scale.scale == scale) else { break };
            let next = last.with(judge.quantizer, tensor(&line.map)?.to_device(judge.target.device()))?;
            states.push(next);
        }
        Ok(Self { judge, header, batch, conditions, states })
    }

    /// Logits of the images, guidance mixed in, of the scales before `end`, from the committed maps.
    fn logits(&self, end: usize) -> Result<Vec<Tensor>> {
        self.pass(&ScaleCache::new(), self.inputs(), end, 0)
    }

    /// Maps that the scales from 1 on are read from.
    fn inputs(&self) -> Vec<Tensor> {
        let all = self.states.last().map(Committed::inputs).unwrap_or_default();
        all.iter().map(Tensor::shallow_clone).collect()
    }

    fn pass(&self, cache: &ScaleCache, maps: Vec<Tensor>, end: usize, begin: usize) -> Result<Vec<Tensor>> {
        let double = |map: &Tensor| match self.header.sampling.is_guided() {
            true => Tensor::cat(&[map, map], 0),
            false => map.shallow_clone(),
        };
        let maps: Vec<Tensor> = maps.iter().map(double).collect();
        let input = |scale: usize| match scale.checked_sub(1) {
            None => Some(ScaleInput::Start),
            Some(place) => maps.get(place).map(ScaleInput::Map),
        };
        let inputs: Vec<ScaleInput<'_>> = (begin..end).map_while(input).collect();
        let (logits, _) = self.judge.target.step(&self.conditions, cache, &inputs)?;
        let scales = self.header.patch_nums.len();
        let sampling = &self.header.sampling;
        let mixed = logits.iter().enumerate();
        Ok(mixed.map(|(place, logits)| sampling.mixed(logits, sampling.weight(begin + place, scales))).collect())
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::of(&self.header.dtype)
    }

    fn first_wrong(&self) -> Result<Option<ScaleFinding>> {
        let known = self.states.len() - 1;
        if known == 0 {
            return Ok(None);
        }
        let logits = self.logits(known)?;
        for (scale, (line, logits)) in self.batch.scales.iter().zip(&logits).enumerate() {
            let finding = |kind: ScaleKind, row: usize, position: Option<usize>, text: String| ScaleFinding {
                kind,
                side: None,
                image: self.batch.images.images.get(row).copied().unwrap_or_default(),
                scale,
                position,
                text,
            };
            if line.scale.source != Source::Refiner {
                if let Some((row, position, difference)) = self.apart(line, logits, 0)? {
                    let kind = self.named(scale, line)?;
                    let text =
                        format!("position {position}: the logits differ from those of the target by {difference:.3e}");
                    return Ok(Some(finding(kind, row, Some(position), text)));
                }
                if let Some((row, position, token)) = self.unchosen(scale, line, logits)? {
                    let text = format!("position {position}: the target chooses {token}");
                    return Ok(Some(finding(ScaleKind::WrongChoice, row, Some(position), text)));
                }
            }
            let Some(state) = self.states.get(scale + 1) else { break };
            let want = lengths(state.f_hat())?;
            let wrong = line.sum.iter().zip(&want).position(|(got, want)| {
                let most = self.tolerance().rows * want.abs().max(1.0);
                apart(got.0, *want, most)
            });
            if let Some(row) = wrong {
                let got = line.sum.get(row).map_or(f64::NAN, |sum| sum.0);
                let text = format!("the sum of the maps has length {}, what is committed {got}", want[row]);
                return Ok(Some(finding(ScaleKind::Sum, row, None, text)));
            }
        }
        Ok(None)
    }

    /// The first position whose recorded digest is not that of `logits [B, T, V]`, these `offset` positions further on: row,
    /// position and difference.
    fn apart(&self, line: &ScaleLine, logits: &Tensor, offset: usize) -> Result<Option<(usize, usize, f64)>> {
        let Digest { largest, logsumexp } = Digest::of(logits)?;
        let both = [(largest, &line.largest), (logsumexp, &line.logsumexp)];
        for (want, got) in &both {
            let want = Vec::<Vec<f64>>::try_from(want.to_device(tch::Device::Cpu))?;
            for (row, (got, want)) in got.iter().zip(&want).enumerate() {
                for (position, (Real(got), want)) in got.iter().zip(want.iter().skip(offset)).enumerate() {
                    if apart(*got, *want, self.tolerance().rows * want.abs().max(1.0)) {
                        return Ok(Some((row, position, (got - want).abs())));
                    }
                }
            }
        }
        Ok(None)
    }

    /// A position whose token the target does not choose, by more than rounding: row, position, and what it chooses.
    fn unchosen(&self, scale: usize, line: &ScaleLine, logits: &Tensor) -> Result<Option<(usize, usize, i64)>> {
        if !self.header.is_exact {
            return Ok(None);
        }
        let sampling = &self.header.sampling;
        let scores = sampling.scores(&sampling.filtered(logits), scale, &self.batch.images.images)?; // [B, T, V]
        let map = tensor(&line.map)?.to_device(scores.device()).unsqueeze(-1);
        let (best, tokens) = scores.max_dim(-1, true); // [B, T, 1] each
        let behind = (best - scores.gather(-1, &map, false)).gt(self.tolerance().near_tie).squeeze_dim(-1);
        let wrong = behind.nonzero(); // [n, 2]
        if wrong.size()[0] == 0 {
            return Ok(None);
        }
        let (row, position) = (wrong.int64_value(&[0, 0]), wrong.int64_value(&[0, 1]));
        Ok(Some((row as usize, position as usize, tokens.int64_value(&[row, position, 0]))))
    }

    /// Which of the mistakes that are known gives the recorded logits of a scale.
    fn named(&self, scale: usize, line: &ScaleLine) -> Result<ScaleKind> {
        let fits = |logits: &Tensor, offset: usize| Ok::<_, Error>(self.apart(line, logits, offset)?.is_none());
        let own = line.drafted.as_ref().unwrap_or(&line.map);
        if let Some(wrong) = self.own_tokens(scale, own)?
            && let Some(logits) = self.pass(&ScaleCache::new(), wrong, scale + 1, 0)?.last()
            && fits(logits, 0)?
        {
            return Ok(ScaleKind::OwnTokens);
        }
        // The scales that were decided in one pass with this one begin here.
        let begin = self.batch.scales.iter().take(scale).filter(|other| other.scale.round != line.scale.round).count();
        if begin == 0 {
            return Ok(ScaleKind::Logits);
        }
        let (_, before) = self.judge.target.step(&self.conditions, &ScaleCache::new(), &self.doubled(begin).each())?;
        if let Some(logits) = self.pass(&before.forgotten(), self.inputs(), scale + 1, begin)?.last()
            && fits(logits, 0)?
        {
            return Ok(ScaleKind::Prefix);
        }
        let offset: i64 = self.header.patch_nums.iter().take(begin).map(|side| side * side).sum();
        let (offset, tokens) = (usize::try_from(offset).unwrap_or(usize::MAX), line.map.first().map_or(0, Vec::len));
        if offset < tokens
            && let Some(logits) = self.logits(scale + 1)?.last()
            && fits(logits, offset)?
        {
            return Ok(ScaleKind::PrefixOffset);
        }
        Ok(ScaleKind::Logits)
    }

    /// Maps that scales are read from, where one of them is read from its own tokens; nothing for the first scale.
    fn own_tokens(&self, scale: usize, tokens: &[Vec<i64>]) -> Result<Option<Vec<Tensor>>> {
        let mut maps = self.inputs();
        let Some(input) = scale.checked_sub(1).and_then(|place| maps.get_mut(place)) else { return Ok(None) };
        let table = self.judge.quantizer.embedding();
        let codes = Tensor::f_embedding(table, &tensor(tokens)?.to_device(table.device()), -1, false, false)?; // [B, T, Z]
        let wrong = codes.transpose(1, 2).f_reshape(input.size())?;
        *input = wrong;
        Ok(Some(maps))
    }

    /// The committed maps as rows of the target read them, up to a scale.
    fn doubled(&self, end: usize) -> Doubled {
        let guided = self.header.sampling.is_guided();
        let inputs = self.inputs();
        let double = |map: &Tensor| if guided { Tensor::cat(&[map, map], 0) } else { map.shallow_clone() };
        Doubled(inputs.iter().take(end.saturating_sub(1)).map(double).collect())
    }
}

/// Maps of scales from 1 on.
struct Doubled(Vec<Tensor>);

impl Doubled {
    fn each(&self) -> Vec<ScaleInput<'_>> {
        std::iter::once(ScaleInput::Start).chain(self.0.iter().map(ScaleInput::Map)).collect()
    }
}

/// Whether two numbers are further apart than that; NaN is apart from everything.
fn apart(one: f64, other: f64, most: f64) -> bool {
    let difference = (one - other).abs();
    difference.is_nan() || difference > most
}

/// Rows of whole numbers as a tensor `[B, T]`.
fn tensor(rows: &[Vec<i64>]) -> Result<Tensor> {
    let width = rows.first().map_or(0, Vec::len) as i64;
    Ok(Tensor::from_slice(&rows.concat()).f_view([rows.len() as i64, width])?.f_to_kind(Kind::Int64)?)
}

fn nothing() -> Error {
    Error::Failed("a pass gave no logits".to_owned())
}
