//! What the layers of a model keep of past tokens, as a value: nothing else knows how many tokens a row holds.
//!
//! Layers are of two kinds. Attention keeps keys and values: slot `s` of row `b` holds the key of the row's token `s`; slots
//! at or behind the row's length hold nothing, whatever lies there. A pass erases what it is about to show of them to a
//! longer row's sake: a mask takes a hidden slot's weight to zero, but zero times NaN is NaN. Recurrent layers and
//! convolutions keep a state, one for each row: during a pass there is one behind every new token, and the last kept
//! token's stays.
//!
//! A forward pass writes the new keys and states of every layer; the caller then moves the lengths once: with
//! [`KvCache::advance`] by the first tokens of the pass, with [`KvCache::keep`] by any of them.
//!
//! Rows come and go in place. Of the rows that stay when others leave only those that change their place are copied, and
//! the room of those that left takes the next ones in.

use tch::{Device, Kind, Tensor};

use super::mask::{AttentionMask, Masks};
use crate::device;

/// What one layer of a model keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerCache {
    /// Keys and values.
    Attention {
        /// `G`
        groups: i64,
        /// `D` of the keys.
        key_dim: i64,
        /// `D` of the values.
        value_dim: i64,
        /// Tokens that a query sees, itself included; `None` for all.
        window: Option<i64>,
    },
    /// A state of this shape for each row.
    State {
        /// Without rows and tokens.
        shape: Vec<i64>,
    },
}

impl LayerCache {
    /// Attention on everything before, with keys and values of one size.
    pub fn full(groups: i64, head_dim: i64) -> Self {
        Self::Attention { groups, key_dim: head_dim, value_dim: head_dim, window: None }
    }
}

/// What one layer keeps of the `B` rows there are, with room for more behind them, `R` in all.
#[derive(Debug)]
enum Layer {
    /// `[R, G, capacity, D]` each.
    Attention { key: Tensor, value: Tensor },
    /// Behind the row's last token, `[R, ..]`, and behind each of the pass at hand, `[B, T, ..]`.
    State { held: Tensor, pass: Option<Tensor> },
}

/// Tokens written behind the lengths and not yet kept.
#[derive(Debug)]
struct Pass {
    tokens: i64,
    /// Where each row's tokens go, `[B, 1, T, 1]`; `None` where all rows have one length.
    slots: Option<Tensor>,
    /// Whether no layer has written yet.
    is_new: bool,
}

/// Keys, values and states of all layers.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<Layer>,
    lengths: Vec<i64>,
    capacity: i64,
    device: Device,
    /// Positions of all slots, `[R, capacity]`, where a layer has a window.
    positions: Option<Tensor>,
    /// Where the slots of each row, and of the room behind the rows, are zero from on: `R` numbers.
    clean_from: Vec<i64>,
    pass: Option<Pass>,
}

/// Capacity grows in steps of this many slots, at least by half.
const GROWTH: i64 = 64;

impl KvCache {
    /// An empty cache for `rows` sequences, with room for `capacity` tokens each before it has to grow.
    pub fn new(layers: &[LayerCache], rows: i64, capacity: i64, (kind, device): (Kind, Device)) -> Self {
        // Zeros, not uninitialised memory: a hidden slot has weight zero, and zero times NaN is NaN.
        let empty = |size: &[i64]| Tensor::zeros(size, (kind, device));
        let has_windows = layers.iter().any(|layer| matches!(layer, LayerCache::Attention { window: Some(_), .. }));
        let layers = layers.iter().map(|layer| match layer {
            LayerCache::Attention { groups, key_dim, value_dim, .. } => Layer::Attention {
                key: empty(&[rows, *groups, capacity, *key_dim]),
                value: empty(&[rows, *groups, capacity, *value_dim]),
            },
            LayerCache::State { shape } => {
                Layer::State { held: empty(&[&[rows][..], shape.as_slice()].concat()), pass: None }
            }
        });
        let positions = has_windows.then(|| Tensor::zeros([rows, capacity], (Kind::Int64, device)));
        let (lengths, clean_from) = (vec![0; rows as usize], vec![0; rows as usize]);
        Self { layers: layers.collect(), lengths, capacity, device, positions, clean_from, pass: None }
    }

    /// Number of tokens of every row.
    pub fn lengths(&self) -> &[i64] {
        &self.lengths
    }

    /// Number of tokens of the longest row.
    pub fn len(&self) -> i64 {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    /// Whether no row holds a token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of rows.
    pub fn rows(&self) -> i64 {
        self.lengths.len() as i64
    }

    /// Begins a pass over new tokens at `positions [B, T]`, and gives its masks.
    pub fn masks<'a>(&mut self, mask: &'a AttentionMask, positions: &'a Tensor) -> Masks<'a> {
        let tokens = positions.size()[1];
        self.begin_pass(tokens);
        let end = self.len() + tokens;
        let keys = self.positions.as_ref().map(|kept| {
            let kept = kept.narrow(0, 0, self.rows());
            match self.pass.as_ref().and_then(|pass| pass.slots.as_ref()) {
                Some(slots) => drop(kept.shallow_clone().scatter_(1, &slots.view([-1, tokens]), positions)),
                None => kept.narrow(1, self.lengths[0], tokens).copy_(positions),
            }
            kept.narrow(1, 0, end) // [B, S]
        });
        Masks::behind(mask, positions, &self.lengths, keys)
    }

    /// Writes `key, value [B, G, T, D]` of one layer behind every row's length and returns the layer's keys and values
    /// up to the longest row's end, `[B, G, S, D]`. Lengths do not move. Where nobody asked for the masks of the pass, it
    /// begins with layer 0.
    pub fn write(&mut self, layer: usize, key: &Tensor, value: &Tensor) -> (Tensor, Tensor) {
        let tokens = key.size()[2];
        self.enter(layer, tokens);
        let slots = self.pass.as_ref().and_then(|pass| pass.slots.as_ref());
        let Layer::Attention { key: keys, value: values } = &self.layers[layer] else {
            panic!("layer {layer} keeps a state, no keys");
        };
        for (store, new) in [(keys, key), (values, value)] {
            match slots {
                Some(slots) => drop(store.shallow_clone().scatter_(2, &slots.expand_as(new), new)),
                None => store.narrow(0, 0, self.rows()).narrow(2, self.lengths[0], tokens).copy_(new),
            }
        }
        let (rows, end) = (self.rows(), self.len() + tokens);
        let shown = |store: &Tensor| store.narrow(0, 0, rows).narrow(2, 0, end);
        (shown(keys), shown(values))
    }

    /// State of one layer behind the last token of every row, `[B, ..]`; zeros where a row holds none.
    pub fn state(&self, layer: usize) -> Tensor {
        let Layer::State { held, .. } = &self.layers[layer] else { panic!("layer {layer} keeps keys, no state") };
        held.narrow(0, 0, self.rows())
    }

    /// Notes the states of one layer behind each new token, `[B, T, ..]`: behind a node of a tree, that of the path to it.
    pub fn write_states(&mut self, layer: usize, states: &Tensor) {
        self.enter(layer, states.size()[1]);
        let Layer::State { pass, .. } = &mut self.layers[layer] else { panic!("layer {layer} keeps keys, no state") };
        *pass = Some(states.shallow_clone());
    }

    fn enter(&mut self, layer: usize, tokens: i64) {
        if layer == 0 && !self.pass.as_ref().is_some_and(|pass| pass.is_new && pass.tokens == tokens) {
            self.begin_pass(tokens);
        }
        let pass = self.pass.as_mut().filter(|pass| pass.tokens == tokens);
        pass.expect("a pass writes the same number of tokens to every layer, from layer 0 on").is_new = false;
    }

    fn begin_pass(&mut self, tokens: i64) {
        self.end_pass();
        let end = self.len() + tokens;
        self.reserve(end);
        // A shorter row's slots between its own end and the longest one's will be seen, with weight zero.
        let own_ends: Vec<i64> = self.lengths.iter().map(|length| length + tokens).collect();
        let dirty: Vec<i64> = own_ends.iter().zip(&self.clean_from).map(|(_, &dirty)| dirty.min(end)).collect();
        self.erase(&own_ends, &dirty);
        for ((clean, own), dirty) in self.clean_from.iter_mut().zip(&own_ends).zip(&dirty) {
            *clean = if *clean > *dirty { *clean } else { *own };
        }
        let ragged = self.lengths.iter().any(|&length| length != self.lengths[0]);
        let slots = ragged.then(|| {
            let first = device::send(&Tensor::from_slice(&self.lengths), self.device).view([-1, 1, 1, 1]);
            first + Tensor::arange(tokens, (Kind::Int64, self.device)).view([1, 1, -1, 1]) // [B, 1, T, 1]
        });
        self.pass = Some(Pass { tokens, slots, is_new: true });
    }

    /// Forgets what was written and not kept.
    fn end_pass(&mut self) {
        self.pass = None;
        for layer in &mut self.layers {
            if let Layer::State { pass, .. } = layer {
                *pass = None;
            }
        }
    }

    /// Moves every row's length by its own number of tokens, after all layers were written. Rows of a padded prefill
    /// move by their true length.
    pub fn advance(&mut self, tokens: &[i64]) {
        assert_eq!(tokens.len(), self.lengths.len(), "one count for each row");
        let written = self.pass.as_ref().map_or(0, |pass| pass.tokens);
        assert!(tokens.iter().all(|&count| count <= written), "advancing by {tokens:?} tokens, {written} were written");
        self.hold(&tokens.iter().map(|count| count - 1).collect::<Vec<_>>());
        self.end_pass();
        self.lengths.iter_mut().zip(tokens).for_each(|(length, &count)| *length += count);
    }

    /// Takes over the state behind one token of the pass in each row; a row with -1 keeps the state it has.
    fn hold(&mut self, last: &[i64]) {
        let device = self.device;
        for layer in &mut self.layers {
            let Layer::State { held, pass: Some(pass) } = layer else { continue };
            let index = |values: Vec<i64>| device::send(&Tensor::from_slice(&values), device);
            let rows = last.len() as i64;
            let mut held = held.narrow(0, 0, rows);
            // All that a row may end with, one behind the other: the state before the pass, and those behind its tokens.
            let all = Tensor::cat(&[&held.unsqueeze(1), &*pass], 1); // [B, 1 + T, ..]
            let width = all.size()[1];
            let places = (0..rows).zip(last).map(|(row, last)| row * width + 1 + last).collect();
            held.copy_(&all.flatten(0, 1).index_select(0, &index(places)));
        }
    }

    /// Keeps those tokens of the pass that stand at the named places, ascending, and closes the gaps between them: what
    /// is left of a draft tree is one path.
    pub fn keep(&mut self, places: &[Vec<i64>]) {
        assert_eq!(places.len(), self.lengths.len(), "one list of places for each row");
        let written = self.pass.as_ref().map_or(0, |pass| pass.tokens);
        for row in places {
            let ascending = row.windows(2).all(|pair| pair[0] < pair[1]);
            let inside = row.iter().all(|place| (0..written).contains(place));
            assert!(ascending && inside, "keeping {row:?} of {written} tokens");
        }
        self.close_gaps(&self.lengths, places);
        self.hold(&places.iter().map(|row| row.last().copied().unwrap_or(-1)).collect::<Vec<_>>());
        self.end_pass();
        self.lengths.iter_mut().zip(places).for_each(|(length, row)| *length += row.len() as i64);
    }

    /// Forgets each row's tokens from `base` on, but for those that stand at the named places behind it, ascending, and
    /// closes the gaps between them: as [`KvCache::keep`], where a tree was written in several passes. States of tokens
    /// before the last are not there any more: a cache with layers of those cannot go back.
    pub fn keep_behind(&mut self, base: &[i64], places: &[Vec<i64>]) {
        let rows = self.lengths.len();
        assert!(base.len() == rows && places.len() == rows, "one length and one list of places for each row");
        self.end_pass();
        for ((row, base), length) in places.iter().zip(base).zip(&self.lengths) {
            let ascending = row.windows(2).all(|pair| pair[0] < pair[1]);
            let inside = base <= length && row.iter().all(|place| (0..length - base).contains(place));
            assert!(ascending && inside, "keeping {row:?} behind {base} of {length} tokens");
        }
        self.close_gaps(base, places);
        let kept: Vec<i64> = base.iter().zip(places).map(|(base, row)| base + row.len() as i64).collect();
        self.go_back(kept);
    }

    /// Moves what stands at the places behind `base` to `base` and on.
    fn close_gaps(&self, base: &[i64], places: &[Vec<i64>]) {
        let in_place = |row: &Vec<i64>| row.iter().zip(0..).all(|(&place, index)| place == index);
        if places.iter().all(in_place) {
            return;
        }
        let most = places.iter().map(Vec::len).max().unwrap_or(0) as i64;
        let slots = |slot: &dyn Fn(&Vec<i64>, i64) -> i64| {
            let rows = places.iter().zip(base);
            let slots: Vec<i64> = rows
                .flat_map(|(row, base)| (0..most).map(move |index| (row, base, index)))
                .map(|(row, base, index)| base + slot(row, index))
                .collect();
            device::send(&Tensor::from_slice(&slots).view([-1, 1, most, 1]), self.device) // [B, 1, K, 1]
        };
        // Places that a shorter list lacks move onto themselves.
        let from = slots(&|row, index| row.get(index as usize).copied().unwrap_or(index));
        let to = slots(&|_, index| index);
        for store in self.stores() {
            let [_, groups, _, dim] = <[i64; 4]>::try_from(store.size()).expect("stores are [R, G, C, D]");
            let shape = [self.rows(), groups, most, dim];
            // Gathered into memory of its own first: the places may overlap.
            let kept = store.gather(2, &from.expand(shape, false), false); // [B, G, K, D]
            let _ = store.shallow_clone().scatter_(2, &to.expand(shape, false), &kept);
        }
        if let Some(positions) = &self.positions {
            let (from, to) = (from.view([-1, most]), to.view([-1, most])); // [B, K]
            let kept = positions.gather(1, &from, false);
            let _ = positions.shallow_clone().scatter_(1, &to, &kept);
        }
    }

    /// Forgets the tokens of each row from `lengths` on. A row never grows this way.
    pub fn truncate(&mut self, lengths: &[i64]) {
        assert_eq!(lengths.len(), self.lengths.len(), "one length for each row");
        self.end_pass();
        self.go_back(lengths.to_vec());
    }

    fn go_back(&mut self, lengths: Vec<i64>) {
        let ends = std::mem::replace(&mut self.lengths, lengths);
        let grown = self.lengths.iter().zip(&ends).find(|(keep, end)| keep > end);
        assert!(grown.is_none(), "truncating {ends:?} tokens to {:?} would show slots that hold nothing", self.lengths);
        let has_states = self.layers.iter().any(|layer| matches!(layer, Layer::State { .. }));
        assert!(!has_states || self.lengths == ends, "states of tokens before the last are not kept");
    }

    /// Keys and values that one row of one layer holds, `[G, len, D]` each.
    pub fn contents(&self, layer: usize, row: usize) -> [Tensor; 2] {
        let Layer::Attention { key, value } = &self.layers[layer] else {
            panic!("layer {layer} keeps a state, no keys");
        };
        [key, value].map(|store| store.select(0, row as i64).narrow(1, 0, self.lengths[row]))
    }

    /// Positions of the tokens that one row holds, `[len]`, where a layer has a window.
    pub fn positions(&self, row: usize) -> Option<Tensor> {
        Some(self.positions.as_ref()?.select(0, row as i64).narrow(0, 0, self.lengths[row]))
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Keys and values of all layers that have some.
    fn stores(&self) -> impl Iterator<Item = &Tensor> {
        self.layers.iter().flat_map(|layer| match layer {
            Layer::Attention { key, value } => vec![key, value],
            Layer::State { .. } => Vec::new(),
        })
    }

    /// Writes NaN wherever nothing is held, as a test of those who read.
    #[cfg(test)]
    pub(crate) fn poison(&mut self) {
        self.end_pass();
        let capacity = self.capacity;
        for (row, &length) in self.lengths.iter().enumerate() {
            for store in self.stores() {
                let _ = store.select(0, row as i64).narrow(1, length, capacity - length).fill_(f64::NAN);
            }
        }
        self.clean_from.fill(capacity);
    }

    /// Says that rows hold other numbers of tokens, as a seeded fault.
    #[cfg(test)]
    pub(crate) fn pretend(&mut self, lengths: &[i64]) {
        self.end_pass();
        self.reserve(lengths.iter().copied().max().unwrap_or(0));
        self.lengths = lengths.to_vec();
    }

    /// Copies a row's slots `from` over its slots `to`, as a seeded fault.
    #[cfg(test)]
    pub(crate) fn rearrange(&mut self, row: usize, from: &[i64], to: &[i64]) {
        for store in self.stores() {
            rearrange(store, row, from, to);
        }
    }

    /// The same for values alone.
    #[cfg(test)]
    pub(crate) fn rearrange_values(&mut self, row: usize, from: &[i64], to: &[i64]) {
        for value in self.stores().skip(1).step_by(2) {
            rearrange(value, row, from, to);
        }
    }

    /// Writes zeros into each row's slots `from .. to`.
    fn erase(&mut self, from: &[i64], to: &[i64]) {
        let spans = || from.iter().zip(to).filter(|(from, to)| from < to);
        let (Some(first), Some(last)) = (spans().map(|span| *span.0).min(), spans().map(|span| *span.1).max()) else {
            return;
        };
        let column = |values: &[i64]| device::send(&Tensor::from_slice(values), self.device).view([-1, 1, 1, 1]);
        let slot = Tensor::arange_start(first, last, (Kind::Int64, self.device)).view([1, 1, -1, 1]);
        let erased = slot.ge_tensor(&column(from)).logical_and(&slot.lt_tensor(&column(to))); // [B, 1, n, 1]
        for store in self.stores() {
            let _ = store.narrow(0, 0, self.rows()).narrow(2, first, last - first).masked_fill_(&erased, 0.0);
        }
    }

    /// Keeps the rows named, in that order. Rows that keep their place are not touched.
    pub fn select_rows(&mut self, rows: &[i64]) {
        assert!(rows.len() <= self.lengths.len(), "{} rows cannot be chosen from {}", rows.len(), self.lengths.len());
        self.end_pass();
        let moved: Vec<(i64, i64)> = rows.iter().copied().zip(0..).filter(|(from, to)| from != to).collect();
        if !moved.is_empty() {
            self.move_rows(&moved);
        }
        let before = (self.lengths.clone(), self.clean_from.clone());
        self.lengths = rows.iter().map(|&row| before.0[row as usize]).collect();
        for &(from, to) in &moved {
            // What the row held before and the new one does not reach is still there.
            let clean_from = &mut self.clean_from[to as usize];
            *clean_from = before.1[to as usize].max(before.1[from as usize]);
        }
        self.settle(moved.iter().map(|&(_, to)| to as usize));
    }

    /// Copies rows over others, `(from, to)`.
    fn move_rows(&self, moved: &[(i64, i64)]) {
        let used = moved.iter().map(|&(from, _)| self.lengths[from as usize]).max().unwrap_or(0);
        let overwritten = |from: i64| moved.iter().any(|&(_, to)| to == from);
        let overlap = moved.iter().any(|&(from, _)| overwritten(from));
        let index = overlap.then(|| {
            let (from, to): (Vec<i64>, Vec<i64>) = moved.iter().copied().unzip();
            [from, to].map(|rows| device::send(&Tensor::from_slice(&rows), self.device))
        });
        for mut held in self.held(0, self.room(), used) {
            match &index {
                // Gathered into memory of its own first.
                Some([from, to]) => drop(held.index_copy_(0, to, &held.index_select(0, from))),
                None => moved.iter().for_each(|&(from, to)| held.get(to).copy_(&held.get(from))),
            }
        }
    }

    /// All that `count` rows from `first` on hold in their first `used` slots: keys, values, positions and states.
    fn held(&self, first: i64, count: i64, used: i64) -> Vec<Tensor> {
        let mut held: Vec<Tensor> = self.stores().map(|store| store.narrow(2, 0, used)).collect();
        held.extend(self.positions.as_ref().map(|positions| positions.narrow(1, 0, used)));
        held.extend(self.layers.iter().filter_map(|layer| match layer {
            Layer::State { held, .. } => Some(held.shallow_clone()),
            Layer::Attention { .. } => None,
        }));
        held.iter().map(|tensor| tensor.narrow(0, first, count)).collect()
    }

    /// Adds the rows of another cache behind these.
    pub fn append_rows(&mut self, other: KvCache) {
        self.end_pass();
        let (first, more, longest) = (self.rows(), other.rows(), other.len());
        self.reserve(longest);
        if first + more > self.room() {
            // By half, so that a batch that grows row by row is not copied for each of them.
            self.reserve_rows((first + more).max(first + first / 2));
        }
        for (mut mine, theirs) in self.held(first, more, longest).into_iter().zip(other.held(0, more, longest)) {
            mine.copy_(&theirs);
        }
        self.lengths.extend(&other.lengths);
        let new = first as usize..(first + more) as usize;
        self.clean_from[new.clone()].iter_mut().for_each(|clean_from| *clean_from = longest.max(*clean_from));
        self.settle(new);
    }

    /// Makes room for so many rows: those that join later need no copy of the others.
    pub fn reserve_rows(&mut self, rows: i64) {
        if rows <= self.room() {
            return;
        }
        let held = self.rows();
        let larger = |tensor: &Tensor| {
            let mut size = tensor.size();
            size[0] = rows;
            let larger = Tensor::zeros(&size, (tensor.kind(), tensor.device()));
            larger.narrow(0, 0, held).copy_(&tensor.narrow(0, 0, held));
            larger
        };
        for layer in &mut self.layers {
            match layer {
                Layer::Attention { key, value } => (*key, *value) = (larger(key), larger(value)),
                Layer::State { held, .. } => *held = larger(held),
            }
        }
        self.positions = self.positions.as_ref().map(larger);
        self.clean_from.truncate(held as usize);
        self.clean_from.resize(rows as usize, 0);
    }

    /// Writes zeros behind what rows that have just come hold: once, rather than in every pass that shows more of it. A
    /// few slots that the next pass erases in any case wait for it.
    fn settle(&mut self, rows: impl Iterator<Item = usize>) {
        let longest = self.len();
        for row in rows {
            let (length, dirty) = (self.lengths[row], self.clean_from[row]);
            if dirty <= longest {
                continue;
            }
            for store in self.stores() {
                let _ = store.get(row as i64).narrow(1, length, dirty - length).zero_();
            }
            self.clean_from[row] = length;
        }
    }

    /// Rows there is room for.
    fn room(&self) -> i64 {
        self.clean_from.len() as i64
    }

    fn reserve(&mut self, slots: i64) {
        if slots > self.capacity {
            let more = (slots - self.capacity).max(self.capacity / 2).max(GROWTH);
            self.grow_to(self.capacity + more);
        }
    }

    fn grow_to(&mut self, capacity: i64) {
        let more = capacity - self.capacity;
        let grown = |tensor: &Tensor, axis: usize| {
            let mut size = tensor.size();
            size[axis] = more;
            Tensor::cat(&[tensor, &Tensor::zeros(&size, (tensor.kind(), tensor.device()))], axis as i64)
        };
        for layer in &mut self.layers {
            if let Layer::Attention { key, value } = layer {
                (*key, *value) = (grown(key, 2), grown(value, 2));
            }
        }
        self.positions = self.positions.as_ref().map(|positions| grown(positions, 1));
        self.capacity = capacity;
    }
}

#[cfg(test)]
fn rearrange(store: &Tensor, row: usize, from: &[i64], to: &[i64]) {
    let mut row = store.select(0, row as i64); // [G, C, D]
    let moved = row.index_select(1, &Tensor::from_slice(from));
    let _ = row.index_copy_(1, &Tensor::from_slice(to), &moved);
}

#[cfg(test)]
mod tests;
