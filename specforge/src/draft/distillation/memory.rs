//! What a target says of a position whatever the draft, remembered from one epoch to the next.
//!
//! A draft with a vocabulary of its own learns from the target's logits of that part, and from two numbers that take the
//! whole vocabulary: the likeliest token of all, and the logarithm of the sum of exponentials. With 4096 of SmolLM2's 49152
//! tokens those two are a sixth of the operations of an EAGLE-3 step, and they never change.
//!
//! Where a store notes them, they are read. Else they are made document by document, from the first supervised token on, so
//! that neighbours in a batch change no bit: a resumed run has to make them again, and makes the same. On the CPU alone: on a GPU, beside the far larger layers of its
//! drafts, they are a few hundredths, and to look them up would wait for the device.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tch::{Device, Kind, Tensor};

use super::{Order, Teacher, wide};
use crate::draft::loss::project;
use crate::draft::objective::DraftVocabulary;
use crate::draft::row_losses::{Predictions, RowByRow};
use crate::error::Result;
use crate::features::{FeatureBatch, WholeVocabulary};
use crate::nn::Head;

/// Most positions that are kept, of 8 bytes each. Those of later documents are made every time.
const MOST_POSITIONS: usize = 1 << 25;

/// Two numbers of each position of the documents that were met.
#[derive(Debug)]
pub struct TeacherMemory {
    /// The target's head, of the draft's tokens alone.
    head: Head,
    /// Draft id of each token of the target, or -1.
    draft_ids: Vec<i64>,
    /// The target's id of the draft's first token.
    first: i64,
    /// Positions whose logits of the whole vocabulary are made at a time.
    positions_per_chunk: i64,
    documents: Mutex<Documents>,
}

#[derive(Debug, Default)]
struct Documents {
    known: HashMap<u64, Arc<[Summary]>>,
    /// Of all of them.
    positions: usize,
}

/// What the whole vocabulary says of a position.
#[derive(Debug, Clone, Copy)]
struct Summary {
    /// The likeliest token as a draft id, or -1.
    likeliest: i32,
    /// Logarithm of the sum of exponentials of all logits.
    log_sum_exp: f32,
}

/// What is known of the positions of an [`Order`].
#[derive(Debug)]
pub struct Remembered<'a> {
    head: &'a Head,
    /// `[U']` the likeliest token as a draft id, or -1.
    likeliest: Tensor,
    /// `[U']` logarithm of the sum of exponentials of all logits.
    log_sum_exp: Tensor,
}

impl TeacherMemory {
    /// For drafts of this type; `None` where nothing is to be remembered.
    pub fn new(
        head: &Head,
        vocabulary: Option<&DraftVocabulary>,
        kind: Kind,
        positions_per_chunk: i64,
    ) -> Result<Option<Self>> {
        match vocabulary {
            Some(vocabulary) if head.weight.device() == Device::Cpu && wide(kind) == Kind::Float => Ok(Some(Self {
                head: head.rows(&vocabulary.target_ids)?,
                draft_ids: Vec::try_from(&vocabulary.draft_ids)?,
                first: vocabulary.target_ids.f_int64_value(&[0])?,
                positions_per_chunk: positions_per_chunk.max(1),
                documents: Mutex::default(),
            })),
            _ => Ok(None),
        }
    }

    /// The numbers of the positions of an order, which are tokens of the batch or, last, the state of nothing behind them.
    pub fn recall(&self, features: &FeatureBatch, order: &Order, teacher: &Teacher<'_>) -> Result<Remembered<'_>> {
        let positions = Vec::<i64>::try_from(&order.positions)?;
        let batch = features.batch.as_ref();
        let (mut found, mut rest, mut start) = (Vec::with_capacity(positions.len()), positions.as_slice(), 0);
        for &length in &batch.lengths {
            let end = start + length;
            let (own, behind) = rest.split_at(rest.partition_point(|&position| position < end));
            if let Some(noted) = &features.whole_vocabulary {
                found.extend(own.iter().map(|&position| self.noted(noted, position as usize)));
            } else if let Some(&first) = own.first() {
                let from = first_taught(&batch.supervised, start, end);
                let from = if first < from { start } else { from };
                let mut key = DefaultHasher::new();
                (&batch.ids[start as usize..end as usize], from - start).hash(&mut key);
                let summaries = self.document(key, (from, end), teacher)?;
                found.extend(own.iter().map(|position| summaries[(position - from) as usize]));
            }
            (rest, start) = (behind, end);
        }
        if !rest.is_empty() {
            let nothing = self.document(DefaultHasher::new(), (start, start + 1), teacher)?;
            found.extend(rest.iter().map(|_| nothing[0]));
        }
        let likeliest: Vec<i64> = found.iter().map(|summary| i64::from(summary.likeliest)).collect();
        let log_sum_exp: Vec<f32> = found.iter().map(|summary| summary.log_sum_exp).collect();
        let (likeliest, log_sum_exp) = (Tensor::f_from_slice(&likeliest)?, Tensor::f_from_slice(&log_sum_exp)?);
        Ok(Remembered { head: &self.head, likeliest, log_sum_exp })
    }

    /// What a store notes of a position of the batch.
    fn noted(&self, noted: &WholeVocabulary, position: usize) -> Summary {
        let likeliest = self.draft_ids[noted.likeliest[position] as usize] as i32;
        Summary { likeliest, log_sum_exp: noted.log_sum_exp[position] }
    }

    /// Those of a document's positions `from .. end` of a batch. `key` has hashed its tokens; its last state, which depends
    /// on all before it, tells apart what other targets or captures say of the same ones.
    fn document(
        &self,
        mut key: DefaultHasher,
        (from, end): (i64, i64),
        teacher: &Teacher<'_>,
    ) -> Result<Arc<[Summary]>> {
        let last = Vec::<f32>::try_from(teacher.hidden.f_get(end - 1)?.f_to_kind(Kind::Float)?)?;
        last.iter().for_each(|number| number.to_bits().hash(&mut key));
        let key = key.finish();
        if let Some(known) = self.documents().known.get(&key) {
            return Ok(Arc::clone(known));
        }
        let mut made = Vec::with_capacity((end - from) as usize);
        for first in (from..end).step_by(self.positions_per_chunk as usize) {
            let behind = end.min(first + self.positions_per_chunk);
            let positions = Tensor::f_arange_start(first, behind, (Kind::Int64, Device::Cpu))?;
            let logits = teacher.logits(&positions)?; // [u, V]
            let first = logits.f_select(1, self.first)?; // [u]
            let predictions = RowByRow::Cpu.teacher(logits, teacher.vocabulary, false)?;
            let (likeliest, log_sum_exp) = predictions.of_whole_vocabulary(&first);
            let both = Vec::<i64>::try_from(likeliest)?.into_iter().zip(Vec::<f32>::try_from(log_sum_exp)?);
            made.extend(both.map(|(likeliest, log_sum_exp)| Summary { likeliest: likeliest as i32, log_sum_exp }));
        }
        let made: Arc<[Summary]> = made.into();
        let mut documents = self.documents();
        if documents.positions + made.len() <= MOST_POSITIONS
            && documents.known.insert(key, Arc::clone(&made)).is_none()
        {
            documents.positions += made.len();
        }
        Ok(made)
    }

    fn documents(&self) -> MutexGuard<'_, Documents> {
        self.documents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The first position of a document that a row may learn from, whatever is drawn: some alignments begin a token or two
/// before the first supervised one.
fn first_taught(supervised: &[bool], start: i64, end: i64) -> i64 {
    let own = &supervised[start as usize..end as usize];
    start + own.iter().position(|&trained| trained).map_or(0, |first| first.saturating_sub(2) as i64)
}

/// Positions of the target that the rows of each step learn from.
pub fn taught(steps: &[Vec<i64>]) -> u64 {
    let positions = steps.iter().zip(0..).flat_map(|(rows, k)| rows.iter().map(move |row| row + 1 + k));
    positions.collect::<HashSet<i64>>().len() as u64
}

/// Floating-point operations of a step that a memory saves from the second time on: of a target of `whole` tokens, `own` of
/// which the draft has, with states of this width.
pub fn operations(steps: &[Vec<i64>], [whole, own]: [i64; 2], width: i64) -> u64 {
    2 * taught(steps) * ((whole - own) * width) as u64
}

impl Remembered<'_> {
    /// What the target predicts at the positions `first .. first + count` of the order. `hidden` are their states, `[u, TH]`.
    pub(super) fn predictions(
        &self,
        row_by_row: RowByRow,
        hidden: &Tensor,
        (first, count): (i64, i64),
        with_entropy: bool,
    ) -> Result<Predictions> {
        let logits = self.head.finish(project(hidden, &self.head.weight)?).f_to_kind(Kind::Float)?; // [u, DV]
        let first_logit = logits.f_select(1, 0)?; // [u]
        let own = row_by_row.teacher(logits, None, with_entropy)?;
        let of = |values: &Tensor| values.narrow(0, first, count);
        Ok(own.within(&first_logit, (of(&self.likeliest), of(&self.log_sum_exp))))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DistillationLoss, Objective, Soft, Weighting, distill};
    use super::*;
    use crate::data::{DocumentRef, PackedBatch};
    use crate::draft::loss::{Projection, Rows};
    use crate::nn::drawn;
    use crate::vocab::VocabMap;

    const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn batch(documents: &[&[i64]]) -> PackedBatch {
        let mut batch = PackedBatch::default();
        for ids in documents {
            batch.ids.extend(*ids);
            batch.positions.extend(0..ids.len() as i64);
            batch.supervised.extend((0..ids.len()).map(|place| place > 2));
            batch.lengths.push(ids.len() as i64);
            batch.documents.push(DocumentRef::new("any", 0));
        }
        batch
    }

    /// Losses, hits, acceptance and gradients are those of the whole vocabulary, when a document comes first, again, and
    /// beside others; every number remembered is made once.
    #[test]
    fn what_is_remembered_changes_nothing() {
        drawn::seed(31);
        let (size, width) = (97, 8);
        let bias = Some(drawn::randn([size], OPTIONS));
        let head = Head { weight: drawn::randn([size, width], OPTIONS), bias, scale: 0.7, softcap: Some(9.0) };
        let map = VocabMap::new((0..size).step_by(3).collect(), size).unwrap();
        let map = DraftVocabulary::new(&map, Device::Cpu).unwrap();
        let draft_size = map.target_ids.size()[0];
        let draft_head = Head::plain(drawn::randn([draft_size, width], OPTIONS));
        let memory = TeacherMemory::new(&head, Some(&map), Kind::Float, 3).unwrap().unwrap();
        let states = [drawn::randn([9, width], OPTIONS), drawn::randn([6, width], OPTIONS)];
        let nothing = Tensor::zeros([1, width], OPTIONS);
        let ids: [&[i64]; 2] = [&[5, 6, 7, 8, 9, 10, 11, 12, 13], &[5, 6, 7, 8, 9, 10]];
        let all = |first: usize, second: usize| Tensor::cat(&[&states[first], &states[second], &nothing], 0);
        for (batch, states, positions, known) in [
            (batch(&ids[..1]), Tensor::cat(&[&states[0], &nothing], 0), vec![3, 4, 8, 4, 9], 2),
            (batch(&ids), all(0, 1), vec![5, 12, 11, 5, 15, 2, 14], 3),
            (batch(&[ids[1], ids[0]]), all(1, 0), vec![3, 14, 13, 7, 15], 3),
            // A position before all that are taught: the whole document.
            (batch(&[ids[1], ids[0]]), all(1, 0), vec![0, 14], 4),
            // The same tokens, other states.
            (batch(&ids[..1]), Tensor::cat(&[&states[0] * 2.0, nothing.shallow_clone()], 0), vec![3, 4], 5),
        ] {
            let order = Order::new(&positions, Device::Cpu).unwrap();
            let teacher = Teacher { hidden: &states, head: &head, vocabulary: Some(&map) };
            let features = FeatureBatch::new(Arc::new(batch), Vec::new());
            let remembered = memory.recall(&features, &order, &teacher).unwrap();
            assert_eq!(memory.documents().known.len(), known);
            // As a store notes it, of which a memory keeps nothing but what is said of nothing.
            let logits = head.logits(&states);
            let noted = FeatureBatch {
                whole_vocabulary: Some(WholeVocabulary {
                    likeliest: Vec::try_from(logits.argmax(1, false)).unwrap(),
                    log_sum_exp: Vec::try_from(logits.logsumexp([1].as_slice(), false)).unwrap(),
                }),
                ..features
            };
            let reader = TeacherMemory::new(&head, Some(&map), Kind::Float, 3).unwrap().unwrap();
            let read = reader.recall(&noted, &order, &teacher).unwrap();
            assert!(reader.documents().known.len() <= 1);
            let input = drawn::randn([positions.len() as i64, width], OPTIONS);
            for loss in [DistillationLoss::CrossEntropy, DistillationLoss::Kl, DistillationLoss::LkLambda] {
                let outcome = |remembered: Option<&Remembered<'_>>| {
                    let targets = Soft { order: &order, teacher: &teacher, remembered };
                    let rows = Rows { input: &input, targets, weights: None };
                    let mut total = Tensor::zeros([draft_size, width], OPTIONS);
                    let mut projection = Projection { head: &draft_head, gradient: Some(&mut total) };
                    let objective = Objective { loss, lambda: (0.9, 2.0), positions_per_chunk: 2 };
                    let weighting = Weighting { parity: None, lift: 1.0 };
                    let outcomes = distill(rows, &mut projection, objective, Some(&weighting)).unwrap();
                    assert!(outcomes.covered.any().int64_value(&[]) == 1 || positions.len() < 3);
                    let gradient = outcomes.input_gradient.unwrap();
                    [outcomes.losses, outcomes.hits, outcomes.acceptance, outcomes.covered, gradient, total]
                        .map(|values| values.to_kind(Kind::Double))
                };
                for from in [&remembered, &read] {
                    for (got, want) in outcome(Some(from)).iter().zip(&outcome(None)) {
                        let off = (got - want).abs().max().double_value(&[]);
                        assert!(off < 1e-5, "{loss:?}, {positions:?}: off by {off}");
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_is_remembered_where_the_draft_has_every_token_or_is_exact() {
        let head = Head::plain(Tensor::zeros([4, 2], OPTIONS));
        let map = DraftVocabulary::new(&VocabMap::new(vec![0, 2], 4).unwrap(), Device::Cpu).unwrap();
        assert!(TeacherMemory::new(&head, None, Kind::Float, 3).unwrap().is_none());
        assert!(TeacherMemory::new(&head, Some(&map), Kind::Double, 3).unwrap().is_none());
        assert!(TeacherMemory::new(&head, Some(&map), Kind::BFloat16, 3).unwrap().is_some());
    }
}
