//! Hidden states that somebody else computed: they are made what the target of the run would give, and refused where its
//! head does not know them.
//!
//! What comes from elsewhere is a list of states for each document, low layers first, the final one last. Two things are
//! not said anywhere and are found out:
//!
//! - *Whether the final state is normed.* A state that the target's final norm made has, divided by that norm's weights,
//!   the root mean square 1; one before the norm has not. SpecForge writes the former, vLLM and speculators the latter, which
//!   is normed here.
//! - *Whether it is the target's at all.* Of some rows the head is asked how likely the token is that really follows, and how
//!   likely the one that follows another row. States of another model, of another layer or of the row beside know no
//!   difference. Nor does a target that was never trained, whose states cannot be told from anybody's.
//!
//! State 0 is compared with the embedding. What lies between is counted and no more: the numbers of these layers are those
//! that the user gives.
//!
//! Shape legend: see [`super::store`].

use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::store::probe;
use crate::error::{Error, Result, foreign};
use crate::models::parts::{LoadedPart, Part, Passing};
use crate::models::{self, LayerWise, TargetInfo};
use crate::nn::{AttentionMask, Embedding, Head};

/// How far a root mean square may be from 1. Half of bfloat16's last digit is 0.002, and errors of many numbers cancel.
const NORM_TOLERANCE: f64 = 0.03;
/// How far an embedding may be from the target's, relative: some engines round.
const EMBEDDING_TOLERANCE: f64 = 0.02;
/// Rows of a document that the head is asked about.
const ROWS_OF_DOCUMENT: usize = 4;
/// Rows that are judged together: soon, and then more of them.
const ROWS_JUDGED: [usize; 3] = [32, 128, 256];
/// Documents that are believed between two looks, once the head has agreed.
const DOCUMENTS_BELIEVED: usize = 256;
/// By how many standard errors the head must prefer the tokens that really follow.
const DEVIATIONS: f64 = 3.0;

/// Whether final states arrive before or behind the target's last norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Final {
    Normed,
    BeforeNorm,
}

/// Rows that wait for the head's judgement.
#[derive(Default)]
struct Sample {
    /// `[.., H]` float32 each.
    states: Vec<Tensor>,
    /// The token that follows each row.
    next: Vec<i64>,
    /// The token of each row.
    own: Vec<i64>,
}

/// What is known of a target whose states come from elsewhere: its head, its last norm, its embedding. No layer is loaded.
pub struct Recognition {
    info: TargetInfo,
    /// Layers that the store wants, ascending, the final one last.
    wanted: Vec<usize>,
    kind: Kind,
    head: Head,
    norm: Box<dyn LoadedPart>,
    /// `[H]` float32
    norm_weight: Tensor,
    embedding: Option<Embedding>,
    final_state: Option<Final>,
    sample: Sample,
    /// Judgements so far, and documents until the next sample.
    judged: usize,
    believed: usize,
}

impl Recognition {
    /// Reads head, norm and, where state 0 is wanted, the embedding of a target's folder, for states of these layers
    /// (ascending, the final one last) that are to become `kind`.
    pub fn open(path: &Path, kind: Kind, wanted: &[usize]) -> Result<Self> {
        let target = LayerWise::open(path, kind, Device::Cpu)?;
        let info = target.info().clone();
        let norm = target.load(Part::Norm)?;
        let ones = Tensor::f_ones([1, 1, info.hidden_size], (kind, Device::Cpu))?;
        let norm_weight = through(norm.as_ref(), &ones)?.f_flatten(0, -1)?.f_to_kind(Kind::Float)?; // [H]
        let embedding = match wanted.contains(&0) {
            true => Some(models::load_tables(path, kind, Device::Cpu)?.embedding),
            false => None,
        };
        let head = target.head()?;
        let (sample, final_state) = (Sample::default(), None);
        let wanted = wanted.to_vec();
        Ok(Self { info, wanted, kind, head, norm, norm_weight, embedding, final_state, sample, judged: 0, believed: 0 })
    }

    /// The target's head.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// What the target is.
    pub fn info(&self) -> &TargetInfo {
        &self.info
    }

    /// Layers that documents come with, low to high. Where only the final state is wanted, others may come before it.
    pub fn wanted(&self) -> &[usize] {
        &self.wanted
    }

    /// Rows whose loss the head was asked for and agreed on.
    pub fn rows_judged(&self) -> usize {
        self.judged
    }

    /// The states of one document as the store wants them, `[T, H]` for each layer, from what `origin` gave of it.
    pub fn take(&mut self, origin: &str, document: &str, ids: &[i64], states: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let refuse = |problem: String| {
            let document = foreign::name(document);
            Error::Failed(format!("{}: document `{document}`: {problem}", foreign::one_line(origin)))
        };
        let chosen = self.choose(ids.len(), states).map_err(refuse)?;
        let Some((last, others)) = chosen.split_last() else { return Err(refuse("has no states".to_owned())) };
        for (layer, states) in self.wanted.iter().zip(&chosen) {
            if !states.f_abs()?.f_sum(Kind::Double)?.f_double_value(&[])?.is_finite() {
                return Err(refuse(format!("hidden state {layer} is not finite")));
            }
        }
        let mut taken = others.iter().map(|states| Ok(states.f_to_kind(self.kind)?)).collect::<Result<Vec<_>>>()?;
        if let (Some(embedding), Some(&0), Some(first)) = (&self.embedding, self.wanted.first(), taken.first()) {
            let difference = relative_difference(first, &embedding.look_up(&Tensor::from_slice(ids))?)?;
            if difference > EMBEDDING_TOLERANCE {
                return Err(refuse(format!(
                    "hidden state 0 is not the embedding of its tokens: relative difference {difference:.3}"
                )));
            }
        }
        let is = self.kind_of_final(last)?.map_err(refuse)?;
        if let Some(before) = self.final_state.filter(|&before| before != is) {
            return Err(refuse(format!("its final state is {is:?}, that of the documents before was {before:?}")));
        }
        self.final_state = Some(is);
        let last = last.f_to_kind(self.kind)?;
        let last = match is {
            Final::Normed => last,
            Final::BeforeNorm => through(self.norm.as_ref(), &last.f_unsqueeze(0)?)?.f_squeeze_dim(0)?, // [T, H]
        };
        self.note(ids, &last)?;
        taken.push(last);
        self.judge()?.map_err(refuse)?;
        Ok(taken)
    }

    /// Those of the given states that are wanted.
    fn choose(&self, tokens: usize, mut states: Vec<Tensor>) -> Result<Vec<Tensor>, String> {
        if self.wanted.len() == 1 {
            states.drain(..states.len().saturating_sub(1));
        }
        if states.len() != self.wanted.len() {
            let (want, got) = (&self.wanted, states.len());
            return Err(format!("expected {} hidden states ({want:?}, as --layers names them), got {got}", want.len()));
        }
        let shape = [tokens as i64, self.info.hidden_size];
        match self.wanted.iter().zip(&states).find(|(_, states)| states.size() != shape) {
            Some((layer, states)) => {
                Err(format!("hidden state {layer}: expected shape {shape:?}, got {:?}", states.size()))
            }
            None => Ok(states),
        }
    }

    /// Whether final states `[T, H]` went through the target's last norm.
    fn kind_of_final(&self, states: &Tensor) -> Result<Result<Final, String>> {
        let used = self.norm_weight.f_ne(0)?;
        let weight = self.norm_weight.f_masked_select(&used)?; // [used]
        let columns = used.f_nonzero()?.f_flatten(0, -1)?;
        let directions = states.f_to_kind(Kind::Float)?.f_index_select(1, &columns)? / weight; // [T, used]
        let squares = directions.f_square()?.f_mean_dim([1].as_slice(), false, Kind::Float)?; // [T]
        let off: Vec<f64> = probe::doubles(&(squares.f_sqrt()? - 1.0).f_abs()?)?;
        let normed = off.iter().filter(|&&off| off < NORM_TOLERANCE).count();
        Ok(match normed {
            normed if normed == off.len() => Ok(Final::Normed),
            // A row may have that size by chance.
            normed if normed * 8 <= off.len() => Ok(Final::BeforeNorm),
            normed => Err(format!(
                "{normed} of {} rows of its final state look as if they came out of the target's last norm, the others not: \
                 these are not states of one layer of this target",
                off.len()
            )),
        })
    }

    /// Keeps some rows of a document for the head.
    fn note(&mut self, ids: &[i64], last: &Tensor) -> Result<()> {
        if self.believed > 0 {
            self.believed -= 1;
            return Ok(());
        }
        let candidates = ids.len().saturating_sub(1);
        let count = ROWS_OF_DOCUMENT.min(candidates);
        let rows: Vec<usize> = (0..count).map(|index| (2 * index + 1) * candidates / (2 * count)).collect();
        let indices: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        self.sample.states.push(last.f_index_select(0, &Tensor::from_slice(&indices))?.f_to_kind(Kind::Float)?);
        self.sample.next.extend(rows.iter().map(|&row| ids[row + 1]));
        self.sample.own.extend(rows.iter().map(|&row| ids[row]));
        Ok(())
    }

    /// Asks the head, once enough rows wait.
    fn judge(&mut self) -> Result<Result<(), String>> {
        let goal = ROWS_JUDGED.iter().find(|&&rows| rows > self.judged).or(ROWS_JUDGED.last());
        let rows = self.sample.next.len();
        if goal.is_none_or(|&goal| rows < goal) {
            return Ok(Ok(()));
        }
        let Sample { states, next, own } = std::mem::take(&mut self.sample);
        let states = Tensor::f_cat(&states, 0)?; // [R, H]
        // Texts of one template have the same tokens at the same places: what follows elsewhere is another token.
        let elsewhere = |row: usize| {
            let mut tokens = (0..rows).map(|step| next[(row + rows / 2 + step) % rows]);
            tokens.find(|&token| token != next[row]).unwrap_or(next[row])
        };
        let others: Vec<i64> = (0..rows).map(elsewhere).collect();
        let losses = |tokens: &[i64]| Ok::<_, Error>(probe::ask(&states, tokens, &self.head, false)?.next_loss);
        let (true_losses, other_losses) = (losses(&next)?, losses(&others)?);
        let (gain, error) = gain(&true_losses, &other_losses);
        if gain <= DEVIATIONS * error || !gain.is_finite() {
            let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
            let (real, other) = (mean(&true_losses), mean(&other_losses));
            let own_losses = losses(&own)?;
            let (own_gain, own_error) = self::gain(&own_losses, &other_losses);
            let shifted = match own_gain > DEVIATIONS * own_error {
                true => "; it finds the rows' own tokens likely, as if the states belonged to the rows before",
                false => "",
            };
            return Ok(Err(format!(
                "the target's head does not know these states: over {rows} rows its mean loss is {real:.3} on the token that \
                 follows and {other:.3} on one that follows elsewhere{shifted}. They are another model's, another layer's, or \
                 of other rows; a target that was never trained cannot be told from another"
            )));
        }
        self.judged += rows;
        if self.judged >= ROWS_JUDGED.iter().sum() {
            self.believed = DOCUMENTS_BELIEVED;
        }
        Ok(Ok(()))
    }
}

/// By how much the first losses are smaller, on average, and the standard error of that.
fn gain(losses: &[f64], others: &[f64]) -> (f64, f64) {
    let count = losses.len() as f64;
    let gains: Vec<f64> = losses.iter().zip(others).map(|(loss, other)| other - loss).collect();
    let mean = gains.iter().sum::<f64>() / count;
    let variance = gains.iter().map(|gain| (gain - mean).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
    (mean, (variance / count).sqrt())
}

/// What comes out of a part that looks at no positions: `[1, T, H]`.
fn through(part: &dyn LoadedPart, hidden: &Tensor) -> Result<Tensor> {
    let tokens = hidden.size()[1];
    let none = Tensor::f_zeros([1, tokens], (Kind::Int64, Device::Cpu))?;
    let mask = AttentionMask::Documents(vec![tokens]);
    part.forward(&Passing { ids: &none, positions: &none, mask: &mask, hidden: Some(hidden) })
}

/// Norm of a difference, relative to the norm of what was expected.
fn relative_difference(got: &Tensor, want: &Tensor) -> Result<f64> {
    let (got, want) = (got.f_to_kind(Kind::Double)?, want.f_to_kind(Kind::Double)?);
    let norm = |tensor: &Tensor| Ok::<_, Error>(tensor.f_square()?.f_sum(Kind::Double)?.f_double_value(&[])?.sqrt());
    Ok(norm(&(got - &want))? / norm(&want)?.max(f64::MIN_POSITIVE))
}
