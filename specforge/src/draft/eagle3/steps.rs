//! Which rows run in which step of the training-time test. Integers on the host, before anything is computed.
//!
//! Row `t` holds the target's features of token `t`; at step `k` it reads the embedding of token `t + 1 + k`, stands at
//! position `t + k`, and is compared with what the target predicts from token `t + 1 + k`. A row is computed at step `k`
//! only if it is trained at that step or at a later one. Which rows go on may be drawn ([`trained`]): a later step has
//! nothing of other rows but what they are at step 0.
//!
//! Attention works on *runs*: consecutive rows of one document. A run sees the keys of its document before it whole, and
//! its own keys causally.
//!
//! Shape legend: `T` tokens of the packed batch, `R` rows of a step, `M` trained rows of a step.

use tch::{Device, Tensor};

use crate::data::PackedBatch;
use crate::device;
use crate::draft::StepKey;
use crate::draft::supervision::{self, MaskAlignment};
use crate::error::Result;
use crate::nn::merged_attention::{Run, Runs};

/// Tells the draws of how far rows go from all others of a document.
const DEPTH: u64 = 1;

/// The rows of one step, on the device. All tensors are int64.
#[derive(Debug)]
pub struct Step {
    /// `[R]` rows of the batch, ascending.
    pub rows: Tensor,
    /// `[R]` their places among the previous step's rows; at step 0 the rows themselves.
    pub kept: Tensor,
    /// `[R]` token whose embedding a row reads.
    pub tokens: Tensor,
    /// `[R]` rotary position.
    pub positions: Tensor,
    /// `[M]` places of the trained rows among the rows.
    pub trained: Tensor,
    /// `[M]` rows of the batch that are trained.
    pub trained_rows: Tensor,
    /// Number of rows, `R`.
    pub len: i64,
    /// Token from which the target predicts what each trained row should; `T` where there is none.
    pub teachers: Vec<i64>,
    /// The rows as runs.
    pub runs: Runs,
}

/// All steps of a batch.
#[derive(Debug)]
pub struct Steps {
    /// `[T]` token whose embedding each row of the batch reads at step 0: keys are needed of every row.
    pub tokens: Tensor,
    /// `[T]` rotary position of each row of the batch at step 0.
    pub positions: Tensor,
    /// Every row of the batch, as runs.
    pub runs: Runs,
    /// The steps that have rows.
    pub steps: Vec<Step>,
}

/// The steps of a batch on the host.
#[derive(Debug)]
pub struct StepPlan {
    pool: Pool,
    /// Places in the pool.
    tokens: (i64, i64),
    positions: (i64, i64),
    runs: Vec<Run>,
    steps: Vec<PlannedStep>,
}

/// A step whose numbers are in the pool, in the order of [`Step`].
#[derive(Debug)]
struct PlannedStep {
    places: [(i64, i64); 6],
    teachers: Vec<i64>,
    runs: Vec<Run>,
}

/// Rows of a step and their places.
struct HostStep {
    rows: Vec<i64>,
    kept: Vec<i64>,
    trained: Vec<i64>,
    trained_rows: Vec<i64>,
}

impl Steps {
    /// Plans `count` steps on a batch.
    pub fn new(batch: &PackedBatch, count: usize, alignment: MaskAlignment, device: Device) -> Result<Self> {
        StepPlan::new(batch, &trained(batch, count, alignment, (1.0, StepKey::EVALUATION))).upload(device)
    }
}

/// Rows that are trained at each of `count` steps. With a share below 1, a row is trained at step `k` with the chance
/// `share^k`: what it draws for this optimizer step decides how far it goes. An evaluation has all of them.
pub fn trained(
    batch: &PackedBatch,
    count: usize,
    alignment: MaskAlignment,
    (share, key): (f64, StepKey),
) -> Vec<Vec<i64>> {
    let mut steps: Vec<Vec<i64>> = (0..count).map(|k| supervision::rows(batch, k, alignment)).collect();
    if share < 1.0 && key != StepKey::EVALUATION {
        let mut drawn = Vec::with_capacity(batch.ids.len());
        for (document, &length) in batch.documents.iter().zip(&batch.lengths) {
            let draws = key.draws(document, DEPTH);
            drawn.extend((0..length as u64).map(|row| draws.uniform(row, 0)));
        }
        for (k, rows) in (0..).zip(&mut steps) {
            let chance = share.powi(k);
            rows.retain(|&row| drawn[row as usize] < chance);
        }
    }
    steps
}

impl StepPlan {
    /// Plans steps on a batch, of which these rows are trained.
    pub fn new(batch: &PackedBatch, trained: &[Vec<i64>]) -> Self {
        let ends = document_ends(batch);
        let host = host_steps(trained);
        let token = |row: i64, k: usize| {
            let token = row + 1 + k as i64;
            if token < ends[row as usize] { batch.ids[token as usize] } else { 0 }
        };
        let position = |row: i64, k: usize| batch.positions[row as usize] + k as i64;
        let all: Vec<i64> = (0..batch.ids.len() as i64).collect();

        // One copy to the device for all of them.
        let mut pool = Pool::default();
        let tokens = pool.add(all.iter().map(|&row| token(row, 0)));
        let positions = pool.add(all.iter().map(|&row| position(row, 0)));
        let mut steps = Vec::new();
        for (k, step) in host.iter().enumerate() {
            let places = [
                pool.add(step.rows.iter().copied()),
                pool.add(step.kept.iter().copied()),
                pool.add(step.rows.iter().map(|&row| token(row, k))),
                pool.add(step.rows.iter().map(|&row| position(row, k))),
                pool.add(step.trained.iter().copied()),
                pool.add(step.trained_rows.iter().copied()),
            ];
            let teacher = |&row: &i64| {
                let token = row + 1 + k as i64;
                if token < ends[row as usize] { token } else { batch.ids.len() as i64 }
            };
            let teachers = step.trained_rows.iter().map(teacher).collect();
            steps.push(PlannedStep { places, teachers, runs: runs(&step.rows, batch) });
        }
        Self { pool, tokens, positions, runs: runs(&all, batch), steps }
    }

    /// The steps on the device.
    pub fn upload(&self, device: Device) -> Result<Steps> {
        let numbers = device::upload(&self.pool.numbers, device)?;
        let get = |(start, length): (i64, i64)| numbers.narrow(0, start, length);
        let (_, keys) = self.tokens;
        let on_device = |runs: &[Run]| Runs::new(runs.to_vec(), keys, device);
        let step = |PlannedStep { places, teachers, runs }: &PlannedStep| {
            let [rows, kept, tokens, positions, trained, trained_rows] = places.map(get);
            let (len, teachers, runs) = (places[0].1, teachers.clone(), on_device(runs)?);
            Ok(Step { rows, kept, tokens, positions, trained, trained_rows, len, teachers, runs })
        };
        let steps = self.steps.iter().map(step).collect::<Result<_>>()?;
        Ok(Steps { tokens: get(self.tokens), positions: get(self.positions), runs: on_device(&self.runs)?, steps })
    }
}

/// Numbers that travel to the device together.
#[derive(Debug, Default)]
pub(in crate::draft) struct Pool {
    pub(in crate::draft) numbers: Vec<i64>,
}

impl Pool {
    /// Adds a list and returns its start and length.
    pub(in crate::draft) fn add(&mut self, numbers: impl Iterator<Item = i64>) -> (i64, i64) {
        let start = self.numbers.len();
        self.numbers.extend(numbers);
        (start as i64, (self.numbers.len() - start) as i64)
    }
}

/// For each row, where its document ends.
pub(in crate::draft) fn document_ends(batch: &PackedBatch) -> Vec<i64> {
    let mut ends = Vec::with_capacity(batch.ids.len());
    for &length in &batch.lengths {
        let end = ends.len() as i64 + length;
        ends.resize(end as usize, end);
    }
    ends
}

/// Rows of each step from the rows that are trained in each; steps that train nothing any more are left out.
fn host_steps(trained: &[Vec<i64>]) -> Vec<HostStep> {
    let mut needed: Vec<i64> = Vec::new();
    let mut steps = Vec::new();
    for rows in trained.iter().rev() {
        needed = union(&needed, rows);
        if needed.is_empty() {
            continue;
        }
        steps.push(HostStep {
            rows: needed.clone(),
            kept: needed.clone(),
            trained: places(rows, &needed),
            trained_rows: rows.clone(),
        });
    }
    steps.reverse();
    for k in 1..steps.len() {
        steps[k].kept = places(&steps[k].rows, &steps[k - 1].rows);
    }
    steps
}

/// Union of two ascending lists.
fn union(left: &[i64], right: &[i64]) -> Vec<i64> {
    let mut all: Vec<i64> = left.iter().chain(right).copied().collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Where each of `rows` stands in `among`; both ascend.
pub(in crate::draft) fn places(rows: &[i64], among: &[i64]) -> Vec<i64> {
    let mut place = 0;
    rows.iter()
        .map(|row| {
            while among[place] < *row {
                place += 1;
            }
            place as i64
        })
        .collect()
}

/// Consecutive rows of one document.
pub(in crate::draft) fn runs(rows: &[i64], batch: &PackedBatch) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut documents = batch.lengths.iter();
    let (mut start, mut end) = (0, 0);
    for (place, &row) in rows.iter().enumerate() {
        let new_document = row >= end;
        while row >= end {
            start = end;
            end += documents.next().copied().unwrap_or(i64::MAX / 2);
        }
        let place = place as i64;
        match runs.last_mut() {
            Some(run) if !new_document && run.keys.end == row => {
                (run.queries.end, run.keys.end) = (place + 1, row + 1);
            }
            _ => runs.push(Run { queries: place..place + 1, keys: start..row + 1, causal: true }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::DocumentRef;

    fn batch(marks: &[&str]) -> PackedBatch {
        let joined = marks.concat();
        PackedBatch {
            ids: (0..joined.len() as i64).map(|token| 100 + token).collect(),
            positions: marks.iter().flat_map(|marks| 0..marks.len() as i64).collect(),
            supervised: joined.chars().map(|mark| mark == 'x').collect(),
            lengths: marks.iter().map(|marks| marks.len() as i64).collect(),
            documents: (0..).zip(marks).map(|(number, marks)| DocumentRef::new(*marks, number)).collect(),
        }
    }

    fn numbers(tensor: &Tensor) -> Vec<i64> {
        Vec::try_from(tensor).unwrap()
    }

    #[test]
    fn the_rows_of_two_packed_documents() {
        // Document a: tokens 0..6, b: 6..11.
        let plan = Steps::new(&batch(&["..xxxx", ".xxx."]), 7, MaskAlignment::Exact, Device::Cpu).unwrap();
        assert_eq!(numbers(&plan.tokens), [101, 102, 103, 104, 105, 0, 107, 108, 109, 110, 0]);
        assert_eq!(numbers(&plan.positions), [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]);
        assert_eq!(plan.steps.len(), 3); // nothing is trained from step 3 on
        let [first, second, third] = &plan.steps[..] else { panic!() };
        assert_eq!(numbers(&first.rows), [1, 2, 3, 6, 7]);
        assert_eq!(first.teachers, [2, 3, 4, 7, 8]);
        assert_eq!(numbers(&second.rows), [1, 2, 6]);
        assert_eq!(numbers(&second.kept), [0, 1, 3]);
        assert_eq!(numbers(&second.tokens), [103, 104, 108]);
        assert_eq!(numbers(&second.positions), [2, 3, 1]);
        assert_eq!(second.teachers, [3, 4, 8]);
        assert_eq!(numbers(&third.rows), [1]);
        let run = |queries, keys| Run { queries, keys, causal: true };
        assert_eq!(first.runs.list(), [run(0..3, 0..4), run(3..5, 6..8)]);
        assert_eq!(plan.runs.list(), [run(0..6, 0..6), run(6..11, 6..11)]);
    }

    #[test]
    fn a_share_of_the_rows_goes_on_and_the_same_ones_wherever_they_are() {
        let marks = "x".repeat(600);
        let both = batch(&[&marks, &marks]);
        let key = StepKey { seed: 3, step: 5, total: 9 };
        let drawn = |batch: &PackedBatch, key| trained(batch, 4, MaskAlignment::Label, (0.5, key));
        let steps = drawn(&both, key);
        let all = trained(&both, 4, MaskAlignment::Label, (1.0, key));
        assert_eq!(steps[0], all[0]);
        assert!(steps.windows(2).all(|pair| pair[1].iter().all(|row| pair[0].contains(row))), "who stops stays away");
        for (k, (some, all)) in (0..).zip(steps.iter().zip(&all)) {
            let share = some.len() as f64 / all.len() as f64;
            assert!((share - 0.5f64.powi(k)).abs() < 0.04, "step {k}: {share}");
        }
        // The second document by itself draws what it drew behind the first, another optimizer step draws anew.
        let mut alone = batch(&[&marks]);
        alone.documents = vec![both.documents[1].clone()];
        let behind = |rows: &[i64]| rows.iter().map(|row| row - 600).filter(|row| *row >= 0).collect::<Vec<i64>>();
        assert!(drawn(&alone, key).iter().zip(&steps).all(|(one, two)| *one == behind(two)));
        assert_ne!(drawn(&both, StepKey { step: 6, ..key })[1], steps[1]);
        assert_eq!(drawn(&both, StepKey::EVALUATION), all);
    }

    /// A row is computed as long as a later step trains it, and a teacher past the document's end is none.
    #[test]
    fn rows_of_parity_alignments_wait_for_later_steps() {
        let plan = Steps::new(&batch(&["x..x"]), 4, MaskAlignment::Official, Device::Cpu).unwrap();
        let rows: Vec<Vec<i64>> = plan.steps.iter().map(|step| numbers(&step.rows)).collect();
        assert_eq!(rows, [vec![0, 1, 2, 3], vec![0, 1, 2], vec![0, 1], vec![0]]);
        let trained: Vec<Vec<i64>> = plan.steps.iter().map(|step| numbers(&step.trained_rows)).collect();
        assert_eq!(trained, [vec![0, 3], vec![2], vec![1], vec![0]]);
        assert_eq!(plan.steps[0].teachers, [1, 4]);
        assert_eq!(numbers(&plan.steps[1].trained), [2]);
    }
}
