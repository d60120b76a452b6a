//! Losses of a row: the draft's distribution `q` against the target's, `p`, or against one right token `y`.
//!
//! | name | value | source |
//! | --- | --- | --- |
//! | `ce`, `lk_alpha` | `-log q(y)` | `lk_alpha` is the name in SpecForge and ModelOpt |
//! | `soft_ce` | `-sum p log q` | ModelOpt's self-distillation |
//! | `kl` (`kl_div`) | `sum p log(p / q)`: the gradient of `soft_ce`, and 0 at best | speculators 0.9.0 |
//! | `reverse_kl` (`rkl`) | `sum q log(q / p)` | speculators |
//! | `jsd` | `KL(p, m) / 2 + KL(q, m) / 2`, `m = (p + q) / 2` | speculators |
//! | `tv` | `1 - a`, with the acceptance `a = sum min(p, q)` | speculators |
//! | `l1` | `sum abs(p - q) = 2 tv` | DeepSpec `afdfa7c`, SpecForge |
//! | `nla` | `-log max(a, 1e-5)` | speculators |
//! | `log_overlap` | `-log a` without a floor: DPALA | SpecForge's recipes |
//! | `renyi` | `-2 log sum sqrt(p q)`: D-PARD | SpecForge's recipes |
//! | `lk_hybrid` | `l kl + (1 - l) tv`, `l = exp(-3 a)` of each row | speculators |
//! | `lk_tv` | `1 - q(y)` | ModelOpt |
//! | `lk_lambda` | `l ce + (1 - l)(1 - q(y))`, `l = scale exp(-decay mean q(y))`, one for all rows | ModelOpt |
//!
//! Where `p` and `q` are equal at a token, the sum of minima has a corner there. Both `minimum` and `abs` take the middle of
//! its slopes, so that gradients vanish where the whole distributions are equal. What underflows stays finite: sums that a
//! logarithm follows are taken in the logarithmic domain, and a token to which the target gives no chance at all (a logit
//! of -inf) counts as one of `exp(-1000)`, without which `reverse_kl` would be infinite.

use std::cell::OnceCell;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::shim;

/// The least logarithm of a target's probability. Far below what float32 can hold of the probability itself.
const LEAST_LOG: f64 = -1e3;

/// The least acceptance of `nla`.
const LEAST_ACCEPTANCE: f64 = 1e-5;

/// The decay of `lk_hybrid`.
const HYBRID_DECAY: f64 = 3.0;

/// A loss of a row; see the table of this module.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)]
pub enum RowLoss {
    Ce,
    SoftCe,
    Kl,
    ReverseKl,
    Jsd,
    Tv,
    L1,
    Nla,
    LkHybrid,
    LkAlpha,
    LkTv,
    LkLambda(LkLambda),
    Renyi,
    LogOverlap,
}

/// How `lk_lambda` shares a row between cross-entropy and `1 - q(y)`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LkLambda {
    /// Share of the cross-entropy where `q(y)` is 0.
    pub scale: f64,
    /// How fast it falls with the mean of `q(y)`.
    pub decay: f64,
}

impl Default for LkLambda {
    fn default() -> Self {
        Self { scale: 1.0, decay: 1.0 }
    }
}

impl RowLoss {
    /// Every loss by its name.
    pub const NAMES: &[(&str, Self)] = &[
        ("ce", Self::Ce),
        ("soft_ce", Self::SoftCe),
        ("kl", Self::Kl),
        ("reverse_kl", Self::ReverseKl),
        ("jsd", Self::Jsd),
        ("tv", Self::Tv),
        ("l1", Self::L1),
        ("nla", Self::Nla),
        ("lk_hybrid", Self::LkHybrid),
        ("lk_alpha", Self::LkAlpha),
        ("lk_tv", Self::LkTv),
        ("lk_lambda", Self::LkLambda(LkLambda { scale: 1.0, decay: 1.0 })),
        ("renyi", Self::Renyi),
        ("log_overlap", Self::LogOverlap),
    ];

    /// What speculators calls some of them.
    const ALIASES: &[(&str, Self)] = &[("kl_div", Self::Kl), ("rkl", Self::ReverseKl)];

    /// The loss of a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::NAMES.iter().chain(Self::ALIASES).find(|(known, _)| *known == name).map(|(_, loss)| *loss)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        let same = |loss: &Self| std::mem::discriminant(loss) == std::mem::discriminant(&self);
        Self::NAMES.iter().find(|(_, loss)| same(loss)).map_or("", |(name, _)| name)
    }

    /// Whether it compares with the target's distribution.
    pub fn wants_teacher(self) -> bool {
        match self {
            Self::Ce | Self::LkAlpha | Self::LkTv | Self::LkLambda(_) => false,
            Self::SoftCe | Self::Kl | Self::ReverseKl | Self::Jsd | Self::Tv | Self::L1 => true,
            Self::Nla | Self::LkHybrid | Self::Renyi | Self::LogOverlap => true,
        }
    }
}

/// Rows of a chunk with what losses have in common, each computed once and when it is first asked for.
#[derive(Debug)]
pub struct Rows {
    /// `[C]` the right tokens.
    pub labels: Tensor,
    /// `[C, DV]` with a graph.
    logits: Tensor,
    /// `[C, DV]` log q, with a graph.
    log_draft: OnceCell<Tensor>,
    /// `[C, DV]` q, with a graph.
    draft: OnceCell<Tensor>,
    /// `[C, DV]` log p and p.
    teacher: Option<[Tensor; 2]>,
    /// `[C]` log q(y), with a graph.
    log_truth: Tensor,
    /// `[C]` sum of min(p, q), with a graph.
    overlap: OnceCell<Tensor>,
    /// `[C]` whether the likeliest token is the right one.
    hits: OnceCell<Tensor>,
}

impl Rows {
    /// Rows of the draft's logits `[C, DV]` with right tokens `[C]`, and what the target predicts there, `[C, DV]`, over the
    /// draft's vocabulary.
    pub fn new(logits: &Tensor, teacher: Option<&Tensor>, labels: &Tensor) -> Result<Self> {
        let size = logits.size();
        let [rows, _] = size[..] else {
            return Err(Error::Failed(format!("a loss: expected logits of rows x tokens, got shape {size:?}")));
        };
        if labels.size() != [rows] {
            let problem = format!("a loss: expected {rows} labels, one for each row, got shape {:?}", labels.size());
            return Err(Error::Failed(problem));
        }
        let teacher = match teacher {
            Some(teacher) if teacher.size() != size => {
                let got = teacher.size();
                let problem =
                    format!("a loss: expected the target's logits in the draft's shape {size:?}, got {got:?}");
                return Err(Error::Failed(problem));
            }
            Some(teacher) => Some(tch::no_grad(|| {
                let mut log = teacher.detach().to_kind(logits.kind()).log_softmax(-1, logits.kind());
                let log = log.clamp_min_(LEAST_LOG);
                let probabilities = log.exp();
                [log, probabilities]
            })),
            None => None,
        };
        let (log_draft, hits) = (OnceCell::new(), OnceCell::new());
        // Where nothing asks for the whole distribution, a row's logits are read once, and its slope written once.
        let log_truth = if teacher.is_none() && logits.kind() == Kind::Float && logits.device() == Device::Cpu {
            let ranks = Tensor::f_empty([rows], (Kind::Float, Device::Cpu))?;
            let losses = shim::cross_entropy_rows(logits, labels, &ranks)?;
            hits.get_or_init(|| ranks.eq(1));
            -losses // [C]
        } else {
            let log_draft = log_draft.get_or_init(|| logits.log_softmax(-1, logits.kind())); // [C, DV]
            log_draft.gather(1, &labels.unsqueeze(1), false).squeeze_dim(1) // [C]
        };
        Ok(Self {
            labels: labels.shallow_clone(),
            logits: logits.shallow_clone(),
            log_draft,
            draft: OnceCell::new(),
            teacher,
            log_truth,
            overlap: OnceCell::new(),
            hits,
        })
    }

    /// `[C, DV]` log q, with a graph.
    fn log_draft(&self) -> &Tensor {
        self.log_draft.get_or_init(|| self.logits.log_softmax(-1, self.logits.kind()))
    }

    /// `[C, DV]` q, with a graph.
    fn draft(&self) -> &Tensor {
        self.draft.get_or_init(|| self.log_draft().exp())
    }

    /// `[C, DV]` log p and p.
    fn teacher(&self, what: &str) -> Result<[&Tensor; 2]> {
        match &self.teacher {
            Some([log, probabilities]) => Ok([log, probabilities]),
            None => Err(Error::Failed(format!(
                "`{what}` compares with the target's distribution, and the target's states are not here"
            ))),
        }
    }

    /// `[C]` sum of min(p, q), with a graph.
    fn overlap(&self, what: &str) -> Result<&Tensor> {
        let [_, teacher] = self.teacher(what)?;
        Ok(self.overlap.get_or_init(|| over_vocabulary(&self.draft().minimum(teacher))))
    }

    /// `[C]` log q(y) without a graph.
    pub fn log_truth(&self) -> Tensor {
        self.log_truth.detach()
    }

    /// `[C]` q(y) without a graph.
    pub fn truth(&self) -> Tensor {
        self.log_truth().exp()
    }

    /// `[C]` booleans: the likeliest token is the right one.
    pub fn hits(&self) -> &Tensor {
        self.hits.get_or_init(|| self.log_draft().detach().argmax(-1, false).eq_tensor(&self.labels))
    }

    /// `[C]` the probability that a token sampled from the draft is accepted, without a graph, where there is a teacher.
    pub fn acceptance(&self) -> Option<Tensor> {
        let [_, teacher] = self.teacher.as_ref()?;
        let overlap = match self.overlap.get() {
            Some(overlap) => overlap.detach(),
            None => tch::no_grad(|| over_vocabulary(&self.draft().minimum(teacher))),
        };
        Some(overlap.clamp_max(1.0))
    }

    /// `[C]` values of a loss, with a graph. `mean_truth` is the mean of q(y) that `lk_lambda` goes by, a scalar; without it,
    /// that of these rows.
    pub fn values(&self, loss: RowLoss, mean_truth: Option<&Tensor>) -> Result<Tensor> {
        let name = loss.name();
        let dot = |left: &Tensor, right: &Tensor| over_vocabulary(&(left * right));
        Ok(match loss {
            RowLoss::Ce | RowLoss::LkAlpha => -&self.log_truth,
            RowLoss::LkTv => 1.0 - self.log_truth.exp(),
            RowLoss::LkLambda(LkLambda { scale, decay }) => {
                let mean = match mean_truth {
                    Some(mean) => mean.detach().to_kind(self.log_truth.kind()),
                    None => self.truth().mean(self.log_truth.kind()),
                };
                let share: Tensor = (mean * -decay).exp() * scale;
                &share * -&self.log_truth + (1.0 - &share) * (1.0 - self.log_truth.exp())
            }
            RowLoss::SoftCe => -dot(self.teacher(name)?[1], self.log_draft()),
            RowLoss::Kl => {
                let [log_teacher, teacher] = self.teacher(name)?;
                dot(teacher, &(log_teacher - self.log_draft()))
            }
            RowLoss::ReverseKl => dot(self.draft(), &(self.log_draft() - self.teacher(name)?[0])),
            RowLoss::Jsd => {
                let ([log_teacher, teacher], log_draft) = (self.teacher(name)?, self.log_draft());
                let log_middle = log_draft.logaddexp(log_teacher) - std::f64::consts::LN_2;
                let both = dot(teacher, &(log_teacher - &log_middle)) + dot(self.draft(), &(log_draft - &log_middle));
                both * 0.5
            }
            RowLoss::L1 => over_vocabulary(&(self.draft() - self.teacher(name)?[1]).abs()),
            RowLoss::Tv => self.values(RowLoss::L1, None)? * 0.5,
            RowLoss::Nla => -self.overlap(name)?.clamp_min(LEAST_ACCEPTANCE).log(),
            RowLoss::LkHybrid => {
                let share = (self.overlap(name)?.detach() * -HYBRID_DECAY).exp();
                &share * self.values(RowLoss::Kl, None)? + (1.0 - &share) * self.values(RowLoss::Tv, None)?
            }
            RowLoss::Renyi => {
                ((self.log_draft() + self.teacher(name)?[0]) * 0.5).logsumexp([-1i64].as_slice(), false) * -2.0
            }
            RowLoss::LogOverlap => {
                -self.log_draft().minimum(self.teacher(name)?[0]).logsumexp([-1i64].as_slice(), false)
            }
        })
    }
}

/// Sums of the last dimension.
fn over_vocabulary(values: &Tensor) -> Tensor {
    values.sum_dim_intlist([-1i64].as_slice(), false, None::<Kind>)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::drawn::Drawn;

    /// Losses, hits and the gradient of their weighted sum, `[C]`, `[C]` and `[C, DV]`.
    fn learned(logits: &Tensor, labels: &Tensor, loss: RowLoss) -> [Tensor; 3] {
        let leaf = logits.detach().set_requires_grad(true);
        // As a head's product may lie.
        let rows = Rows::new(&leaf.transpose(0, 1), None, labels).unwrap();
        let values = rows.values(loss, None).unwrap();
        let weights = Tensor::arange(labels.size()[0], (values.kind(), values.device())) - 1.5;
        let gradient = Tensor::run_backward(&[(&values * weights).sum(Kind::Double)], &[&leaf], false, false).remove(0);
        [values.detach(), rows.hits().shallow_clone(), gradient]
    }

    #[test]
    fn rows_that_learn_one_token_learn_what_operators_make_of_it() {
        let drawn = Drawn::of(7);
        // Vectors of eight or sixteen numbers, and a rest; a row that is sure, right and wrong.
        let logits = drawn.normal(&[77, 6]) * 3.0;
        let labels = drawn.below(77, &[6]);
        let (right, wrong) = (labels.int64_value(&[0]), (labels.int64_value(&[1]) + 1) % 77);
        for (token, row) in [(right, 0), (wrong, 1)] {
            let _ = logits.get(token).get(row).fill_(40.0);
        }
        for loss in [RowLoss::Ce, RowLoss::LkTv, RowLoss::LkLambda(LkLambda::default())] {
            let [exact, exact_hits, exact_gradient] = learned(&logits, &labels, loss);
            let [values, hits, gradient] = learned(&logits.to_kind(Kind::Float), &labels, loss);
            assert!(values.to_kind(Kind::Double).allclose(&exact, 1e-5, 1e-6, false), "{loss:?}: {values} {exact}");
            assert!(gradient.to_kind(Kind::Double).allclose(&exact_gradient, 1e-5, 1e-6, false), "{loss:?}");
            assert!(hits.equal(&exact_hits), "{loss:?}");
            assert!(bool::try_from(hits.get(0)).unwrap() && !bool::try_from(hits.get(1)).unwrap());
        }
        // Numbers that are none stay so; tokens that do not exist are said not to.
        let logits = Tensor::full([1, 20], f64::NAN, (Kind::Float, Device::Cpu));
        let rows = Rows::new(&logits, None, &Tensor::from_slice(&[3i64])).unwrap();
        assert!(rows.log_truth().double_value(&[0]).is_nan());
        let error = Rows::new(&logits, None, &Tensor::from_slice(&[20i64])).unwrap_err().to_string();
        assert!(error.contains("label 20 is not below 20"), "{error}");
    }
}
