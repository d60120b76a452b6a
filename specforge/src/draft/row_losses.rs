//! Losses over a vocabulary, row by row: who computes them, and what is handed over. On the CPU that is
//! `csrc/vocabulary_loss.cpp`, on CUDA `csrc/vocabulary_loss.cu`; both take float32 and read a chunk's logits a few times
//! where libtorch's operators do so twenty times. float64, where exact tests run, is left to the operators, and so is a
//! CUDA device without kernels.
//!
//! Shape legend: `m` rows of a chunk, `u` its target positions, `V` vocabulary of the target, `DV` of the draft.

use tch::{Device, Kind, Tensor};

use super::objective::{DraftVocabulary, Objective};
use crate::cuda_kernels::{self, Argument, Kernel, Kernels};
use crate::error::Result;
use crate::shim;

/// Who computes losses row by row.
#[derive(Debug, Clone, Copy)]
pub(super) enum RowByRow {
    /// The processor.
    Cpu,
    /// Kernels of a CUDA device.
    Cuda(&'static Kernels),
}

/// A slope's element type as the kernels count them.
fn form(kind: Kind) -> i32 {
    match kind {
        Kind::BFloat16 => 1,
        Kind::Half => 2,
        _ => 0,
    }
}

/// Numbers as the kernels take them.
fn contiguous(values: Tensor) -> Result<Tensor> {
    Ok(values.f_to_kind(Kind::Float)?.f_contiguous()?)
}

/// Where a slope of float32 logits goes: a matrix of its own in 16 bits, else their own memory.
fn slope_of(logits: &Tensor, kind: Kind) -> Result<Tensor> {
    match form(kind) {
        0 => Ok(logits.shallow_clone()),
        _ => Ok(Tensor::f_empty(logits.size(), (kind, logits.device()))?),
    }
}

impl RowByRow {
    /// For logits of a type on a device; `None` where operators have to do.
    pub(super) fn of(kind: Kind, device: Device) -> Option<Self> {
        match device {
            _ if kind != Kind::Float => None,
            Device::Cpu => Some(Self::Cpu),
            _ => cuda_kernels::on(device).map(Self::Cuda),
        }
    }

    /// Losses and ranks `[m]` of logits `[m, V]`, whose memory is taken, with labels `[m]`; and `softmax - onehot` where it
    /// is wanted.
    pub(super) fn hard(
        self,
        logits: Tensor,
        labels: &Tensor,
        [losses, ranks]: [&Tensor; 2],
        slope: Option<Kind>,
    ) -> Result<Option<Tensor>> {
        let kernels = match self {
            Self::Cpu => {
                shim::hard_losses([&logits, labels, losses, ranks], slope.is_some())?;
                return Ok(slope.map(|kind| logits.to_kind(kind)));
            }
            Self::Cuda(kernels) => kernels,
        };
        let (rows, size) = logits.size2()?;
        let logits = logits.f_contiguous()?;
        let labels = labels.f_contiguous()?;
        let slopes = slope.map(|kind| slope_of(&logits, kind)).transpose()?;
        let arguments = [
            Argument::Numbers(&logits, Kind::Float, rows * size),
            Argument::Size(size),
            Argument::Numbers(&labels, Kind::Int64, rows),
            Argument::Numbers(losses, Kind::Float, rows),
            Argument::Numbers(ranks, Kind::Float, rows),
            slopes.as_ref().map_or(Argument::Nothing, |to| Argument::Numbers(to, to.kind(), rows * size)),
            Argument::Choice(slope.map_or(0, form)),
        ];
        kernels.launch(Kernel::HardRows, rows, &arguments)?;
        Ok(slopes)
    }

    /// What a target predicts, from its logits `[u, V]` in float32. Takes their memory.
    pub(super) fn teacher(
        self,
        logits: Tensor,
        vocabulary: Option<&DraftVocabulary>,
        with_entropy: bool,
    ) -> Result<Predictions> {
        let (positions, size) = logits.size2()?;
        let own = vocabulary.map_or(size, |vocabulary| vocabulary.target_ids.size()[0]);
        let room = |shape: &[i64], kind| Tensor::f_empty(shape, (kind, logits.device()));
        let column = |kind| room(&[positions], kind);
        let kernels = match self {
            Self::Cpu => {
                let rows = [
                    room(&[positions, own], Kind::Float)?,
                    room(&[positions, own], Kind::Float)?,
                    column(Kind::Float)?,
                    column(Kind::Float)?,
                    column(Kind::Int64)?,
                ];
                let tables = vocabulary.map(|vocabulary| [&vocabulary.target_ids, &vocabulary.draft_ids]);
                shim::teacher_rows(&logits, tables, rows.each_ref(), with_entropy)?;
                return Ok(Predictions::Cpu(rows));
            }
            Self::Cuda(kernels) => kernels,
        };
        let logits = logits.f_contiguous()?;
        let reachable = match vocabulary {
            Some(_) => room(&[positions, own], Kind::Float)?,
            None => logits.shallow_clone(),
        };
        let numbers = [column(Kind::Float)?, column(Kind::Float)?, column(Kind::Float)?, column(Kind::Float)?];
        let top = column(Kind::Int64)?;
        let [most, log_sum, log_mass, entropy] =
            numbers.each_ref().map(|of| Argument::Numbers(of, Kind::Float, positions));
        let table = |pick: fn(&DraftVocabulary) -> &Tensor, count| {
            vocabulary.map_or(Argument::Nothing, |vocabulary| Argument::Numbers(pick(vocabulary), Kind::Int64, count))
        };
        let arguments = [
            Argument::Numbers(&logits, Kind::Float, positions * size),
            Argument::Size(size),
            table(|vocabulary| &vocabulary.target_ids, own),
            table(|vocabulary| &vocabulary.draft_ids, size),
            Argument::Size(own),
            Argument::Numbers(&reachable, Kind::Float, positions * own),
            most,
            log_sum,
            log_mass,
            entropy,
            Argument::Numbers(&top, Kind::Int64, positions),
        ];
        kernels.launch(Kernel::TeacherRows, positions, &arguments)?;
        Ok(Predictions::Cuda { kernels, reachable, numbers, top })
    }
}

/// What a target predicts at some positions, as those who compute row by row leave it for themselves.
pub(super) enum Predictions {
    /// log p_S, p_S `[u, DV]`, log mass, sum of p_S log p_S, likeliest `[u]`.
    Cpu([Tensor; 5]),
    /// Those of a device.
    Cuda {
        kernels: &'static Kernels,
        /// `[u, DV]` logits of what the draft can reach.
        reachable: Tensor,
        /// `[u]` each: the largest of them, the logarithm of the sum of exponentials below it, log mass, sum of p_S log p_S.
        numbers: [Tensor; 4],
        /// `[u]` the likeliest token as a draft id, or -1.
        top: Tensor,
    },
}

/// Factor of each row, `[m]`, and the two numbers of [`super::objective::Weighting::parity`].
pub(super) type Factors = (Option<Tensor>, Option<[Tensor; 2]>);

impl Predictions {
    /// What took the whole vocabulary, `[u]` each: the likeliest tokens as draft ids or -1, and the logarithm of the sum of
    /// exponentials. `first` are the logits of the draft's first token, `[u]`, which the CPU leaves as they are.
    pub(super) fn of_whole_vocabulary(&self, first: &Tensor) -> (Tensor, Tensor) {
        let (likeliest, log_mass) = match self {
            Self::Cpu([_, _, log_mass, _, likeliest]) => (likeliest, log_mass),
            Self::Cuda { numbers: [_, _, log_mass, _], top, .. } => (top, log_mass),
        };
        (likeliest.shallow_clone(), self.log_sum_exp(first) - log_mass)
    }

    /// The same predictions where the whole vocabulary says this of each position. `first` as before.
    pub(super) fn within(mut self, first: &Tensor, (likeliest, log_sum_exp): (Tensor, Tensor)) -> Self {
        let mass = self.log_sum_exp(first) - log_sum_exp;
        let (own_likeliest, log_mass) = match &mut self {
            Self::Cpu([_, _, log_mass, _, likeliest]) => (likeliest, log_mass),
            Self::Cuda { numbers: [_, _, log_mass, _], top, .. } => (top, log_mass),
        };
        (*own_likeliest, *log_mass) = (likeliest, mass);
        self
    }

    /// Logarithm of the sum of exponentials of the draft's tokens, `[u]`.
    fn log_sum_exp(&self, first: &Tensor) -> Tensor {
        match self {
            Self::Cpu([log_reachable, ..]) => first - log_reachable.select(1, 0),
            Self::Cuda { numbers: [most, log_sum, ..], .. } => most + log_sum,
        }
    }

    /// Losses, acceptance, hits and covered rows `[m]` of logits `[m, DV]`, whose memory is taken, go `into` their places.
    /// With weights, gives the sum of weighted losses and its gradient with respect to the logits, in the wanted type where
    /// that costs nothing.
    pub(super) fn score(
        &self,
        logits: Tensor,
        own: &Tensor,
        objective: Objective,
        (weights, parity): Factors,
        into: [Tensor; 4],
        slope: Kind,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let weighted = Tensor::f_zeros(own.size(), (Kind::Double, own.device()))?; // [m]
        let [losses, acceptance, hits, covered] = into.each_ref();
        let weights = weights.map(contiguous).transpose()?;
        let parity = match parity {
            Some([factors, means]) => Some([contiguous(factors)?, contiguous(means)?]),
            None => None,
        };
        let (loss, lambda) = (objective.loss, objective.lambda);
        let slopes = match self {
            Self::Cpu(rows) => {
                shim::soft_losses(
                    [&logits, own],
                    rows.each_ref(),
                    (loss as i64, lambda),
                    weights.as_ref(),
                    parity.as_ref().map(<[Tensor; 2]>::each_ref),
                    [losses, acceptance, hits, covered, &weighted],
                )?;
                weights.is_some().then_some(logits)
            }
            Self::Cuda { kernels, reachable, numbers, top } => {
                let (rows, size) = logits.size2()?;
                let positions = reachable.size()[0];
                let (logits, own) = (logits.f_contiguous()?, own.f_contiguous()?);
                let slopes = weights.as_ref().map(|_| slope_of(&logits, slope)).transpose()?;
                let [most, log_sum, log_mass, entropy] =
                    numbers.each_ref().map(|of| Argument::Numbers(of, Kind::Float, positions));
                let arguments = [
                    Argument::Numbers(&logits, Kind::Float, rows * size),
                    Argument::Size(size),
                    Argument::Numbers(&own, Kind::Int64, rows),
                    Argument::Size(positions),
                    Argument::Numbers(reachable, Kind::Float, positions * size),
                    most,
                    log_sum,
                    log_mass,
                    entropy,
                    Argument::Numbers(top, Kind::Int64, positions),
                    Argument::Choice(loss as i32),
                    Argument::Constant(lambda.0 as f32),
                    Argument::Constant(lambda.1 as f32),
                    factors(weights.as_ref(), rows),
                    factors(parity.as_ref().map(|[weights, _]| weights), rows),
                    factors(parity.as_ref().map(|[_, means]| means), rows),
                    Argument::Numbers(losses, Kind::Float, rows),
                    Argument::Numbers(acceptance, Kind::Float, rows),
                    Argument::Numbers(hits, Kind::Bool, rows),
                    Argument::Numbers(covered, Kind::Bool, rows),
                    Argument::Numbers(&weighted, Kind::Double, rows),
                    slopes.as_ref().map_or(Argument::Nothing, |to| Argument::Numbers(to, to.kind(), rows * size)),
                    Argument::Choice(form(slope)),
                ];
                kernels.launch(Kernel::SoftRows, rows, &arguments)?;
                slopes
            }
        };
        Ok((slopes.is_some().then(|| weighted.sum(Kind::Double)), slopes))
    }
}

/// A number of each row, where there is one.
fn factors(values: Option<&Tensor>, rows: i64) -> Argument<'_> {
    values.map_or(Argument::Nothing, |values| Argument::Numbers(values, Kind::Float, rows))
}
