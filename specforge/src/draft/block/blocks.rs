//! Which blocks of a batch are trained, and what their rows see. Integers on the host, before anything is computed.
//!
//! ```text
//! token       u0  u1  a2  a3  a4  a5  e6  u7        u: prompt, a: answer, e: end of turn
//! supervised   .   .   x   x   x   x   x   .
//! block at a3              a3  __  __  __           B = 4: the anchor and three masked rows
//! sees         C   C   C                            features of the tokens before the anchor
//! fill-in                      a4  a5  e6           what the rows predict, layout by layout
//! shift                    a4  a5  e6  (u7)         the last one is not supervised
//! ```
//!
//! An anchor is the last committed token while decoding, and that is always one the target chose: it is supervised, and so
//! is the token behind it. Anchors are picked by the plan's key for chance, document by document. A slot is trained where
//! its token and all before it behind the anchor are supervised ([`BlockMask::Exact`]); a block with no such slot is never
//! picked, so no row is computed for nothing.
//!
//! Shape legend: `n` blocks, `B` rows of a block, `S` slots, `P` context rows, `R = n * B` block rows.

use std::ops::Range;
use std::rc::Rc;

use tch::{Device, Tensor};

use super::backbone::{BlockRows, Seen};
use super::config::{BlockLayer, BlockMask, BlockShape};
use super::losses;
use crate::data::PackedBatch;
use crate::device;
use crate::draft::StepKey;
use crate::error::Result;
use crate::nn::merged_attention::{Run, Runs};
use crate::vocab::VocabMap;

/// How the window of a layer lies over the context of a block.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Windows {
    /// It moves with the row, as every engine serves it.
    #[default]
    ByRow,
    /// All rows of a block see one token more than the window before the anchor: speculators 0.9.0, for its goldens.
    ByBlock,
}

/// Tells the draws of anchors from a draft's other draws.
const ANCHORS: u64 = 0x616e_6368;

/// One block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Number of its document in the batch.
    pub document: usize,
    /// Rows of the batch before the anchor that are in its document.
    pub context: Range<i64>,
    /// Place of the anchor in its document.
    pub position: i64,
    /// `B + 1` tokens of the document from the anchor on, 0 past its end.
    pub tokens: Vec<i64>,
    /// The token before the anchor; the anchor where there is none.
    pub before: i64,
    /// `S`: whether each slot is trained.
    pub supervised: Vec<bool>,
    /// `S`: the row of the batch from which the target predicts each slot's token. Anything where it is not trained.
    pub teachers: Vec<i64>,
}

/// The blocks of a batch on the host.
#[derive(Debug, Default)]
pub struct BlockPlan {
    /// The blocks, those of a document together, by anchor.
    pub blocks: Vec<Block>,
    /// How windows lie.
    pub windows: Windows,
    /// Take the rows of a block as heads of one row wherever they can be, not on a GPU alone: for tests.
    pub fold: bool,
}

/// The blocks of a batch on the device. All tensors are int64.
#[derive(Debug)]
pub struct Blocks {
    /// `[P]` rows of the batch that some block sees.
    pub context: Tensor,
    /// `[P]` their places in their documents.
    pub context_positions: Tensor,
    /// What the backbone reads.
    pub rows: BlockRows,
    /// `[n, B + 1]`
    pub tokens: Tensor,
    /// `[n]`
    pub before: Tensor,
    /// `[n, S]` booleans.
    pub supervised: Tensor,
    /// `[n, S]` rows of the batch, 0 where nothing is trained.
    pub teachers: Tensor,
    /// `[n]` place of the row before the anchor among the context rows, `P` where there is none.
    pub last_seen: Tensor,
    /// `[n]` see [`super::losses::document_shares`].
    pub document_shares: Tensor,
}

impl BlockPlan {
    /// Picks at most `most` anchors of each document of a batch.
    pub fn pick(batch: &PackedBatch, shape: &BlockShape, mask: BlockMask, most: usize, key: StepKey) -> Self {
        let mut plan = Self::default();
        let mut start = 0;
        for (number, &length) in batch.lengths.iter().enumerate() {
            let document = Document { batch, number, rows: start..start + length };
            let eligible = document.anchors();
            let draws = key.draws(&batch.documents[number], ANCHORS);
            let blocks = draws.choose(&eligible, most).into_iter().map(|anchor| document.block(anchor, shape, mask));
            plan.blocks.extend(blocks);
            start += length;
        }
        plan
    }

    /// Leaves out slots whose tokens the draft cannot name, and what is behind them in a block, as far as `mask` asks; then
    /// blocks of which nothing is left.
    pub fn keep_nameable(&mut self, map: &VocabMap, mask: BlockMask) {
        for block in &mut self.blocks {
            let mut open = true;
            for (mark, token) in block.supervised.iter_mut().zip(&block.tokens[1..]) {
                let named = map.draft_id(*token).is_some();
                open &= named;
                *mark &= if mask == BlockMask::Exact { open } else { named };
            }
        }
        self.blocks.retain(|block| block.supervised.contains(&true));
    }

    /// What each block trains.
    pub fn supervised(&self) -> Vec<Vec<bool>> {
        self.blocks.iter().map(|block| block.supervised.clone()).collect()
    }

    /// The blocks on the device.
    pub fn upload(&self, shape: &BlockShape, device: Device) -> Result<Blocks> {
        let (size, slots, count) = (shape.block_size, shape.slots(), self.blocks.len() as i64);
        let seen = self.seen();
        // Where each document's context begins among the context rows.
        let mut numbers: Vec<i64> = Vec::new();
        let mut places: Vec<(i64, i64)> = Vec::new();
        let mut add = |list: &mut dyn Iterator<Item = i64>| {
            let start = numbers.len();
            numbers.extend(list);
            places.push((start as i64, (numbers.len() - start) as i64));
        };
        let own = |block: &Block| {
            let (rows, first) = &seen[Self::document_of(block, &seen)];
            block.context.end - rows.start + first
        };
        let total: i64 = seen.iter().map(|(rows, _)| rows.end - rows.start).sum();
        add(&mut seen.iter().flat_map(|(rows, _)| rows.clone()));
        add(&mut seen.iter().flat_map(|(rows, _)| 0..rows.end - rows.start));
        add(&mut self.blocks.iter().flat_map(|block| {
            std::iter::once(block.tokens[0]).chain(std::iter::repeat_n(shape.mask_token_id, size as usize - 1))
        }));
        add(&mut self.blocks.iter().flat_map(|block| block.position..block.position + size));
        add(&mut self.blocks.iter().flat_map(|block| block.tokens.iter().copied()));
        add(&mut self.blocks.iter().map(|block| block.before));
        add(&mut self.blocks.iter().flat_map(|block| block.supervised.iter().map(|&mark| i64::from(mark))));
        add(&mut self.blocks.iter().flat_map(|block| {
            block.supervised.iter().zip(&block.teachers).map(|(&mark, &row)| if mark { row } else { 0 })
        }));
        add(&mut self.blocks.iter().map(|block| if block.position > 0 { own(block) - 1 } else { total }));
        // One copy to the device for all of them.
        let numbers = device::upload(&numbers, device)?;
        let mut lists = places.into_iter().map(|(start, length)| numbers.narrow(0, start, length));
        let mut next = || lists.next().unwrap_or_else(|| Tensor::zeros([0], (tch::Kind::Int64, device)));
        let (context, context_positions) = (next(), next());
        let (row_tokens, positions) = (next(), next());
        let tokens = next().view([count, size + 1]);
        let before = next();
        let supervised = next().view([count, slots]).to_kind(tch::Kind::Bool);
        let teachers = next().view([count, slots]);
        let last_seen = next();
        let documents: Vec<usize> = self.blocks.iter().map(|block| block.document).collect();
        let shares = losses::document_shares(&documents, &self.supervised());
        let document_shares = device::send(&Tensor::from_slice(&shares), device);
        let runs = self.runs(shape, &seen, total, device)?;
        let hidden = shape.layers.iter().map(|layer| self.hidden(*layer, size, device)).collect::<Result<_>>()?;
        let rows = BlockRows { tokens: row_tokens, positions, runs, hidden };
        Ok(Blocks {
            context,
            context_positions,
            rows,
            tokens,
            before,
            supervised,
            teachers,
            last_seen,
            document_shares,
        })
    }

    /// Which rows of its own block a row does not see in a layer; `None` where it sees all.
    fn hidden(&self, layer: BlockLayer, size: i64, device: Device) -> Result<Option<Tensor>> {
        let window = layer.window.filter(|_| self.windows == Windows::ByRow).unwrap_or(size);
        if !layer.causal && window >= size {
            return Ok(None);
        }
        let sees = |row: i64, key: i64| (key - row).abs() < window && (key <= row || !layer.causal);
        let hidden: Vec<bool> = (0..size).flat_map(|row| (0..size).map(move |key| !sees(row, key))).collect();
        Ok(Some(device::send(&Tensor::from_slice(&hidden).view([size, size]), device)))
    }

    /// For each document that has blocks: the rows that they see, and where those begin among all context rows.
    fn seen(&self) -> Vec<(Range<i64>, i64)> {
        let (mut seen, mut first) = (Vec::new(), 0);
        for blocks in self.blocks.chunk_by(|one, other| one.document == other.document) {
            let start = blocks[0].context.start;
            let end = blocks.iter().map(|block| block.context.end).max().unwrap_or(start);
            seen.push((start..end, first));
            first += end - start;
        }
        seen
    }

    /// Place of a block's document among those that have blocks.
    fn document_of(block: &Block, seen: &[(Range<i64>, i64)]) -> usize {
        seen.partition_point(|(rows, _)| rows.start < block.context.start).min(seen.len() - 1)
    }

    /// For each layer, the context that each row sees, in places among the context rows.
    fn runs(&self, shape: &BlockShape, seen: &[(Range<i64>, i64)], total: i64, device: Device) -> Result<Vec<Seen>> {
        let mut made: Vec<(Option<i64>, Seen)> = Vec::new();
        let of_layer = |BlockLayer { window, .. }: &BlockLayer| {
            if let Some((_, seen)) = made.iter().find(|(other, _)| other == window) {
                return Ok(seen.clone());
            }
            let mut runs: Vec<Run> = Vec::new();
            for (number, block) in self.blocks.iter().enumerate() {
                let (rows, first) = &seen[Self::document_of(block, seen)];
                let (start, end) = (*first, block.context.end - rows.start + first);
                let queries = number as i64 * shape.block_size;
                // The first token that row `j` sees, as the distance from the document's own first.
                let hidden = |row: i64| match (window, self.windows) {
                    (None, _) => 0,
                    (Some(window), Windows::ByRow) => (block.position + row - (window - 1)).clamp(0, block.position),
                    (Some(window), Windows::ByBlock) => (block.position - window).max(0),
                };
                for row in 0..shape.block_size {
                    let keys = start + hidden(row)..end;
                    let query = queries + row;
                    match runs.last_mut() {
                        Some(run) if row > 0 && run.keys == keys => run.queries.end = query + 1,
                        _ => runs.push(Run { queries: query..query + 1, keys, causal: false }),
                    }
                }
            }
            // On a GPU a run is a launch; runs of blocks go through one call for all of them. A row of theirs needs a key.
            let even = runs.len() == self.blocks.len() && runs.iter().all(|run| !run.keys.is_empty());
            let seen = if even && (device.is_cuda() || self.fold) {
                let of_block = |(block, run): (i64, Run)| Run { queries: block..block + 1, causal: true, ..run };
                let folded = (0..).zip(runs).map(of_block).collect();
                Seen::Blocks(Rc::new(Runs::new(folded, total, device)?))
            } else {
                Seen::Rows(Rc::new(Runs::new(runs, total, device)?))
            };
            made.push((*window, seen.clone()));
            Ok(seen)
        };
        shape.layers.iter().map(of_layer).collect()
    }
}

/// A document of a batch.
struct Document<'a> {
    batch: &'a PackedBatch,
    number: usize,
    /// Its rows in the batch.
    rows: Range<i64>,
}

impl Document<'_> {
    fn supervised(&self, place: i64) -> bool {
        let row = self.rows.start + place;
        row < self.rows.end && self.batch.supervised[row as usize]
    }

    /// Places that may be anchors: the token there and the one behind it are supervised.
    fn anchors(&self) -> Vec<i64> {
        let length = self.rows.end - self.rows.start;
        (0..length).filter(|&place| self.supervised(place) && self.supervised(place + 1)).collect()
    }

    fn block(&self, anchor: i64, shape: &BlockShape, mask: BlockMask) -> Block {
        let token = |place: i64| {
            let row = self.rows.start + place;
            if row < self.rows.end { self.batch.ids[row as usize] } else { 0 }
        };
        let mut open = true;
        let slots = 1..=shape.slots();
        let supervised = slots.clone().map(|slot| {
            let own = self.supervised(anchor + slot);
            open &= own;
            if mask == BlockMask::Exact { open } else { own }
        });
        let row = self.rows.start + anchor;
        Block {
            document: self.number,
            context: self.rows.start..row,
            position: anchor,
            tokens: (0..=shape.block_size).map(|place| token(anchor + place)).collect(),
            before: token((anchor - 1).max(0)),
            supervised: supervised.collect(),
            teachers: slots.map(|slot| row + slot - 1).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::DocumentRef;
    use crate::draft::block::config::{BlockConfig, Layout};
    use crate::models::TargetInfo;

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

    fn shape(layout: Layout, window: Option<i64>) -> BlockShape {
        let config = BlockConfig {
            block_size: 4,
            num_layers: 2,
            layout: Some(layout),
            mask_token_id: Some(9),
            ..BlockConfig::default()
        };
        let mut shape = config.shape(&TargetInfo::of(8, 10, 6, 64)).unwrap();
        shape.layers[0].window = window;
        shape
    }

    const KEY: StepKey = StepKey { seed: 1, step: 2, total: 3 };

    #[test]
    fn the_documented_example() {
        let batch = batch(&["xx", "..xxxxx."]);
        let fill_in = BlockPlan::pick(&batch, &shape(Layout::FillIn, None), BlockMask::Exact, 9, KEY);
        let anchors: Vec<i64> = fill_in.blocks.iter().map(|block| block.position).collect();
        assert_eq!(anchors, [0, 2, 3, 4, 5]);
        let block = &fill_in.blocks[2];
        assert_eq!((block.document, block.context.clone(), block.before), (1, 2..5, 104));
        assert_eq!(block.tokens, [105, 106, 107, 108, 109]);
        assert_eq!(block.supervised, [true, true, true]);
        assert_eq!(block.teachers, [5, 6, 7]);
        let shift = BlockPlan::pick(&batch, &shape(Layout::Shift, None), BlockMask::Exact, 9, KEY);
        assert_eq!(shift.blocks[2].supervised, [true, true, true, false]);
        assert_eq!(shift.blocks[2].teachers, [5, 6, 7, 8]);
        // The first block of a document has its anchor alone.
        assert_eq!((fill_in.blocks[0].before, fill_in.blocks[0].context.clone()), (100, 0..0));
    }

    #[test]
    fn a_gap_ends_a_block_unless_labels_alone_decide() {
        let batch = batch(&["xx.xx"]);
        let of = |mask| BlockPlan::pick(&batch, &shape(Layout::FillIn, None), mask, 9, KEY).blocks[0].clone();
        assert_eq!(of(BlockMask::Exact).supervised, [true, false, false]);
        assert_eq!(of(BlockMask::Label).supervised, [true, false, true]);
    }

    /// Context rows are those that somebody sees, once for all blocks of a document, and a window moves with the row.
    #[test]
    fn runs_point_into_the_context_that_is_seen() {
        let batch = batch(&["....", "..xxxxx.", "xxx"]);
        let shape = shape(Layout::FillIn, Some(4));
        let plan = BlockPlan::pick(&batch, &shape, BlockMask::Exact, 9, KEY);
        let blocks = plan.upload(&shape, Device::Cpu).unwrap();
        let numbers = |tensor: &Tensor| Vec::<i64>::try_from(tensor.flatten(0, -1)).unwrap();
        // Anchors at 2 .. 5 of the second document see its first five tokens, the third document's see one.
        assert_eq!(numbers(&blocks.context), [4, 5, 6, 7, 8, 12]);
        assert_eq!(numbers(&blocks.context_positions), [0, 1, 2, 3, 4, 0]);
        assert_eq!(numbers(&blocks.last_seen), [1, 2, 3, 4, 6, 5]);
        let run = |queries, keys| Run { queries, keys, causal: false };
        // Anchor 5 with a window of 4: its row sees 2 3 4 before it, the next 3 4, ...
        let runs = |layer: usize| match &blocks.rows.runs[layer] {
            Seen::Rows(runs) | Seen::Blocks(runs) => runs.list().to_vec(),
        };
        let windowed = runs(0);
        assert_eq!(
            windowed[windowed.len() - 7..windowed.len() - 3],
            [run(12..13, 2..5), run(13..14, 3..5), run(14..15, 4..5), run(15..16, 5..5),]
        );
        assert_eq!(runs(1)[3..], [run(12..16, 0..5), run(16..20, 5..5), run(20..24, 5..6)]);
        assert_eq!(numbers(&blocks.rows.tokens)[12..16], [109, 9, 9, 9]);
        assert_eq!(numbers(&blocks.rows.positions)[12..16], [5, 6, 7, 8]);
    }
}
