//! Which rows of a batch are computed and trained. Integers on the host, before anything is computed.
//!
//! Row `(a, 0)`, of every token `a`, reads the target's features of token `a` and the embedding of token `a + 1`. Rows
//! `(a, d)` behind it read the mask instead and stand at position `a + d`. Row `(a, d)` is compared with what the target
//! predicts from token `a + 1 + d`: prediction `d` of row `a` in the words of [`supervision`], which says where it may be
//! trained. It sees the rows `(b, 0)` of its document up to its anchor, and those of its own anchor up to itself.
//!
//! Of the anchors that may be trained at a depth, a share that falls with the depth is, drawn for each document by itself
//! (COD sampling): those that were trained at the depth before come first, so that the rows of an anchor are a *chain*
//! without gaps. What a document has is a rounded-up part of its anchors, so that short answers keep their last depths.
//!
//! ```text
//! token       u0  u1  a2  a3  a4  e5        u: prompt, a: answer, e: end of turn
//! supervised   .   .   x   x   x   x
//! (a, 0)           x   x   x                predict a3, a4, e5
//! (a, 1)           x   x                    predict a4, e5
//! (a, 2)           x                        predicts e5
//! ```
//!
//! Chains lie in memory in one of two ways, which attention decides ([`Layout`]).
//!
//! Shape legend: `T` tokens of the packed batch, `R` rows of all chains, `M` trained rows, `A` chains of a group.

use std::ops::Range;

use tch::{Device, Tensor};

use super::config::PeagleConfig;
use crate::data::PackedBatch;
use crate::device;
use crate::draft::StepKey;
use crate::draft::eagle3::steps::{Pool, document_ends, places};
use crate::draft::supervision::{self, MaskAlignment};
use crate::error::{Error, Result};
use crate::nn::merged_attention::{Run, Runs};

/// Tells the draws of anchors from others.
const ANCHORS: u64 = 0x636f_6420;

/// How the rows of chains lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Chains of one length together, each with its rows in order: all rows of a chain see the same shared keys in one run,
    /// and own keys need not be copied. On the CPU, where a run costs little.
    Chains,
    /// Rows of one depth together, by anchor: runs of a depth are rows of documents, which a GPU takes in one call.
    Depths,
}

impl Layout {
    /// What suits a device.
    pub fn of(device: Device) -> Self {
        if device.is_cuda() { Self::Depths } else { Self::Chains }
    }
}

/// A row behind an anchor or an anchor's own, and the token from which the target predicts what it should, where it is
/// trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Row of the batch that the chain starts from.
    pub anchor: i64,
    /// Rows between the anchor's own and this one.
    pub depth: usize,
    /// Token of the batch.
    pub teacher: Option<i64>,
}

/// Rows of chains whose attention is one call.
#[derive(Debug)]
pub enum Group<R> {
    /// `A` chains of `length` rows each.
    Chains {
        /// Rows of a chain.
        length: i64,
        /// What each row sees of the shared keys, for each window of the layers.
        runs: Vec<R>,
    },
    /// The rows of a depth.
    Depth {
        /// Places of their chains' last rows among those of the depth before, as `(start, length)` of the pool or on the
        /// device; nothing at depth 1.
        kept: Kept,
        /// What each row sees of the shared keys, for each window of the layers.
        runs: Vec<R>,
    },
}

/// See [`Group::Depth`].
#[derive(Debug)]
pub enum Kept {
    /// Nothing is before.
    Nothing,
    /// Numbers of the pool.
    Pooled(i64, i64),
    /// `[n]` on the device.
    Rows(Tensor),
}

/// The rows of a batch on the host.
#[derive(Debug)]
pub struct ChainPlan {
    /// Trained rows of each depth.
    pub trained: Vec<usize>,
    pool: Pool,
    tokens: (i64, i64),
    positions: (i64, i64),
    first: [(i64, i64); 2],
    chains: [(i64, i64); 2],
    anchors: (i64, i64),
    teachers: Vec<i64>,
    windows: Vec<Option<i64>>,
    context: Vec<Vec<Run>>,
    first_runs: Vec<Vec<Run>>,
    groups: Vec<(i64, Group<Vec<Run>>)>,
}

/// The same on the device. Tensors are int64.
#[derive(Debug)]
pub struct Chains {
    /// `[T]` token whose embedding the row of each token reads.
    pub tokens: Tensor,
    /// `[T]` position of each token's row.
    pub positions: Tensor,
    /// `[M0]` tokens whose own rows are trained, and their positions.
    pub first: Tensor,
    /// `[M0]`
    pub first_positions: Tensor,
    /// `[R]` positions of the rows of chains.
    pub chain_positions: Tensor,
    /// `[M - M0]` places of the trained ones among them, by depth.
    pub chain_trained: Tensor,
    /// `[M]` anchor of each trained row, by depth.
    pub anchors: Tensor,
    /// `M` tokens from which the target predicts what each trained row should; `T` where there is none.
    pub teachers: Vec<i64>,
    /// Trained rows of each depth.
    pub trained: Vec<usize>,
    /// Rows of every token, for each window.
    pub context: Vec<Runs>,
    /// Rows of [`Chains::first`], for each window.
    pub first_runs: Vec<Runs>,
    /// Rows of chains: how many, and how they attend.
    pub groups: Vec<(i64, Group<Runs>)>,
    /// Windows of the layers that differ; see [`Chains::window`].
    windows: Vec<Option<i64>>,
}

impl ChainPlan {
    /// Draws the rows of a batch; `windows` are those of the draft's layers.
    pub fn sampled(batch: &PackedBatch, key: StepKey, config: &PeagleConfig, shape: Shape<'_>) -> Result<Self> {
        let depths: Vec<Vec<i64>> =
            (0..config.num_depths).map(|depth| supervision::rows(batch, depth, MaskAlignment::Exact)).collect();
        let mut rows = Vec::new();
        let mut start = 0;
        for (document, &length) in batch.documents.iter().zip(&batch.lengths) {
            let draws = key.draws(document, ANCHORS);
            let own = start..start + length;
            // What chance knows a row by does not depend on where its document lies.
            let mut kept: Vec<i64> = within(&depths[0], &own).iter().map(|row| row - start).collect();
            for (depth, all) in depths.iter().enumerate() {
                let all = within(all, &own);
                if depth > 0 {
                    let count = (all.len() as f64 * config.ratio(depth)).ceil() as usize;
                    kept.retain(|&row| all.binary_search(&(row + start)).is_ok());
                    kept = draws.choose(&kept, count);
                }
                let row = |&row: &i64| {
                    let anchor = row + start;
                    Row { anchor, depth, teacher: Some(anchor + 1 + depth as i64) }
                };
                rows.extend(kept.iter().map(row));
            }
            start += length;
        }
        Self::of_rows(batch, &rows, config.num_depths, shape)
    }

    /// A plan of given rows. Those of every token itself are computed anyway; behind an anchor there may be no gap.
    pub fn of_rows(batch: &PackedBatch, rows: &[Row], depths: usize, shape: Shape<'_>) -> Result<Self> {
        let starts = document_starts(batch);
        let ends = document_ends(batch);
        let tokens = batch.ids.len() as i64;
        // By depth, and by anchor within one.
        let mut rows = rows.to_vec();
        rows.sort_by_key(|row| (row.depth, row.anchor));
        let lengths = chain_lengths(&rows, tokens, depths)?;
        let mut windows = shape.windows.to_vec();
        windows.sort_unstable();
        windows.dedup();
        let runs = |rows: &[(i64, usize)]| -> Vec<Vec<Run>> {
            windows.iter().map(|&window| runs_of(rows, &starts, window)).collect()
        };

        let mut pool = Pool::default();
        let token = |row: i64| if row + 1 < ends[row as usize] { batch.ids[row as usize + 1] } else { 0 };
        let position = |anchor: i64, depth: usize| batch.positions[anchor as usize] + depth as i64;
        let all: Vec<(i64, usize)> = (0..tokens).map(|row| (row, 0)).collect();
        let trained: Vec<Row> = rows.iter().filter(|row| row.teacher.is_some()).copied().collect();
        let first: Vec<(i64, usize)> = trained.iter().filter(|row| row.depth == 0).map(|row| (row.anchor, 0)).collect();

        let (order, groups) = lay_out(&lengths, shape.layout, &runs, &mut pool);
        let mut place_of: Vec<(i64, usize, i64)> =
            order.iter().zip(0..).map(|(&(anchor, depth), place)| (anchor, depth, place)).collect();
        place_of.sort_unstable();
        let place = |row: &Row| {
            let found = place_of.binary_search_by_key(&(row.anchor, row.depth), |&(anchor, depth, _)| (anchor, depth));
            found.map_or(0, |found| place_of[found].2)
        };
        let mut counts = vec![0; depths];
        trained.iter().for_each(|row| counts[row.depth] += 1);
        Ok(Self {
            trained: counts,
            tokens: pool.add((0..tokens).map(token)),
            positions: pool.add((0..tokens).map(|row| position(row, 0))),
            first: [
                pool.add(first.iter().map(|(row, _)| *row)),
                pool.add(first.iter().map(|(row, _)| position(*row, 0))),
            ],
            chains: [
                pool.add(order.iter().map(|&(anchor, depth)| position(anchor, depth))),
                pool.add(trained.iter().filter(|row| row.depth > 0).map(place)),
            ],
            anchors: pool.add(trained.iter().map(|row| row.anchor)),
            teachers: trained.iter().filter_map(|row| row.teacher).collect(),
            context: runs(&all),
            first_runs: runs(&first),
            groups,
            windows,
            pool,
        })
    }

    /// The rows on the device.
    pub fn upload(&self, device: Device) -> Result<Chains> {
        let numbers = device::upload(&self.pool.numbers, device)?;
        let get = |(start, length): (i64, i64)| numbers.narrow(0, start, length);
        let (_, keys) = self.tokens;
        let on_device = |runs: &[Vec<Run>]| -> Result<Vec<Runs>> {
            runs.iter().map(|runs| Runs::new(runs.clone(), keys, device)).collect()
        };
        let group = |group: &Group<Vec<Run>>| {
            Ok::<_, Error>(match group {
                Group::Chains { length, runs } => Group::Chains { length: *length, runs: on_device(runs)? },
                Group::Depth { kept, runs } => {
                    let kept = match kept {
                        Kept::Pooled(start, length) => Kept::Rows(get((*start, *length))),
                        _ => Kept::Nothing,
                    };
                    Group::Depth { kept, runs: on_device(runs)? }
                }
            })
        };
        let groups = self.groups.iter().map(|(rows, of)| Ok((*rows, group(of)?))).collect::<Result<_>>()?;
        Ok(Chains {
            tokens: get(self.tokens),
            positions: get(self.positions),
            first: get(self.first[0]),
            first_positions: get(self.first[1]),
            chain_positions: get(self.chains[0]),
            chain_trained: get(self.chains[1]),
            anchors: get(self.anchors),
            teachers: self.teachers.clone(),
            trained: self.trained.clone(),
            context: on_device(&self.context)?,
            first_runs: on_device(&self.first_runs)?,
            groups,
            windows: self.windows.clone(),
        })
    }
}

impl Chains {
    /// Which of the runs are those of a window.
    pub fn window(&self, window: Option<i64>) -> usize {
        self.windows.iter().position(|known| *known == window).unwrap_or(0)
    }

    /// Rows of all chains, `R`.
    pub fn rows(&self) -> i64 {
        self.groups.iter().map(|(rows, _)| rows).sum()
    }
}

/// What a plan has to know of the draft.
#[derive(Debug, Clone, Copy)]
pub struct Shape<'a> {
    /// Windows of its layers.
    pub windows: &'a [Option<i64>],
    /// How rows shall lie.
    pub layout: Layout,
}

/// The part of an ascending list that is within a range.
fn within<'a>(rows: &'a [i64], range: &Range<i64>) -> &'a [i64] {
    &rows[rows.partition_point(|row| *row < range.start)..rows.partition_point(|row| *row < range.end)]
}

/// For each row, where its document begins.
fn document_starts(batch: &PackedBatch) -> Vec<i64> {
    let mut starts = Vec::with_capacity(batch.ids.len());
    for &length in &batch.lengths {
        let start = starts.len();
        starts.resize(start + length as usize, start as i64);
    }
    starts
}

/// Anchors that have rows behind their own, ascending, and how many; refuses gaps.
fn chain_lengths(rows: &[Row], tokens: i64, depths: usize) -> Result<Vec<(i64, usize)>> {
    let mut deeper: Vec<(i64, usize)> =
        rows.iter().filter(|row| row.depth > 0).map(|row| (row.anchor, row.depth)).collect();
    deeper.sort_unstable();
    let mut lengths: Vec<(i64, usize)> = Vec::new();
    let outside = rows.iter().find(|row| !(0..tokens).contains(&row.anchor) || row.depth >= depths);
    if let Some(row) = outside {
        return Err(Error::Failed(format!("P-EAGLE: {row:?} is none of {tokens} tokens and {depths} depths")));
    }
    for (anchor, depth) in deeper {
        match lengths.last_mut() {
            Some((last, length)) if *last == anchor && depth == *length + 1 => *length = depth,
            Some((last, _)) if *last == anchor => return Err(gap(anchor, depth)),
            _ if depth == 1 => lengths.push((anchor, 1)),
            _ => return Err(gap(anchor, depth)),
        }
    }
    Ok(lengths)
}

fn gap(anchor: i64, depth: usize) -> Error {
    Error::Failed(format!("P-EAGLE: anchor {anchor} has a row of depth {depth} and not every one before it, once each"))
}

/// Rows `(anchor, depth)` of chains as they lie in memory, and the groups they make, with the rows of each.
type LaidOut = (Vec<(i64, usize)>, Vec<(i64, Group<Vec<Run>>)>);

/// The runs of rows, for each window.
type Seen<'a> = dyn Fn(&[(i64, usize)]) -> Vec<Vec<Run>> + 'a;

/// Puts the rows behind anchors in order; `lengths` says how many there are behind each.
fn lay_out(lengths: &[(i64, usize)], layout: Layout, runs: &Seen<'_>, pool: &mut Pool) -> LaidOut {
    let (mut order, mut groups) = (Vec::new(), Vec::new());
    let anchors = |wanted: &dyn Fn(usize) -> bool| -> Vec<i64> {
        lengths.iter().filter(|(_, length)| wanted(*length)).map(|(anchor, _)| *anchor).collect()
    };
    let longest = lengths.iter().map(|(_, length)| *length).max().unwrap_or(0);
    for number in 1..=longest {
        let (rows, group): (Vec<(i64, usize)>, _) = match layout {
            Layout::Chains => {
                let chain = |anchor: &i64| {
                    let anchor = *anchor;
                    (1..=number).map(move |depth| (anchor, depth))
                };
                let rows: Vec<_> = anchors(&|length| length == number).iter().flat_map(chain).collect();
                let runs = runs(&rows);
                (rows, Group::Chains { length: number as i64, runs })
            }
            Layout::Depths => {
                let own = anchors(&|length| length >= number);
                let kept = match number {
                    1 => Kept::Nothing,
                    _ => {
                        let before = anchors(&|length| length + 1 >= number);
                        let (start, length) = pool.add(places(&own, &before).into_iter());
                        Kept::Pooled(start, length)
                    }
                };
                let rows: Vec<_> = own.into_iter().map(|anchor| (anchor, number)).collect();
                let runs = runs(&rows);
                (rows, Group::Depth { kept, runs })
            }
        };
        if !rows.is_empty() {
            groups.push((rows.len() as i64, group));
            order.extend(rows);
        }
    }
    (order, groups)
}

/// What consecutive queries, rows `(anchor, depth)`, see of the rows of all tokens, in as few runs as there can be.
fn runs_of(rows: &[(i64, usize)], starts: &[i64], window: Option<i64>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (query, &(anchor, depth)) in (0i64..).zip(rows) {
        let start = starts[anchor as usize];
        let first = window.map_or(start, |window| start.max(anchor + depth as i64 + 1 - window));
        let keys = first.min(anchor + 1)..anchor + 1;
        if let Some(run) = runs.last_mut() {
            let alone = run.queries.end - run.queries.start == 1;
            let next = run.keys.start == keys.start && run.keys.end + 1 == keys.end;
            if next && run.causal && !run.keys.is_empty() {
                (run.queries.end, run.keys.end) = (query + 1, keys.end);
                continue;
            }
            if run.keys == keys && (alone || !run.causal) {
                (run.queries.end, run.causal) = (query + 1, false);
                continue;
            }
        }
        let causal = !keys.is_empty();
        runs.push(Run { queries: query..query + 1, keys, causal });
    }
    runs
}

#[cfg(test)]
mod tests;
