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
//!
//! Layers may be on several devices, and each layer's part is where the layer is.

use tch::{Device, Kind, Tensor};

use super::mask::{AttentionMask, Masks};

mod shelf;

use shelf::{Layer, Shelf};

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

/// Tokens written behind the lengths and not yet kept, or over what is held.
#[derive(Debug)]
struct Pass {
    tokens: i64,
    /// How many of them can be kept: none that were written over others.
    keepable: i64,
    /// Slots of a row that the pass shows.
    end: i64,
    /// Whether no layer has written yet.
    is_new: bool,
}

/// Keys, values and states of all layers.
#[derive(Debug)]
pub struct KvCache {
    /// All layers in order, those on one device together.
    shelves: Vec<Shelf>,
    lengths: Vec<i64>,
    capacity: i64,
    /// Where the slots of each row, and of the room behind the rows, are zero from on: `R` numbers.
    clean_from: Vec<i64>,
    pass: Option<Pass>,
}

/// Lengths of rows that are out of sight; see [`KvCache::hide_behind`].
#[derive(Debug)]
#[must_use = "rows that are not shown again are lost"]
pub struct HiddenRows(Vec<i64>);

/// Capacity grows in steps of this many slots, at least by half.
const GROWTH: i64 = 64;

impl KvCache {
    /// An empty cache for `rows` sequences, with room for `capacity` tokens each before it has to grow.
    pub fn new(layers: &[LayerCache], rows: i64, capacity: i64, (kind, device): (Kind, Device)) -> Self {
        let devices = vec![device; layers.len()];
        Self::on(layers, &devices, (rows, capacity), kind)
    }

    /// The same for layers of which each has its device.
    pub fn on(layers: &[LayerCache], devices: &[Device], (rows, capacity): (i64, i64), kind: Kind) -> Self {
        assert_eq!(layers.len(), devices.len(), "one device for each layer");
        let (mut shelves, mut first) = (Vec::new(), 0);
        for run in devices.chunk_by(|one, other| one == other) {
            let layers: Vec<&LayerCache> = layers[first..first + run.len()].iter().collect();
            shelves.push(Shelf::new(&layers, first, (rows, capacity), (kind, run[0])));
            first += run.len();
        }
        let (lengths, clean_from) = (vec![0; rows as usize], vec![0; rows as usize]);
        Self { shelves, lengths, capacity, clean_from, pass: None }
    }

    /// Which shelf a layer is on.
    fn shelf(&self, layer: usize) -> usize {
        self.shelves.partition_point(|shelf| shelf.first <= layer).saturating_sub(1)
    }

    /// One layer's part.
    fn layer(&self, layer: usize) -> &Layer {
        let shelf = &self.shelves[self.shelf(layer)];
        &shelf.layers[layer - shelf.first]
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

    /// Begins a pass over new tokens at `positions [B, T]`, and gives the masks of the layers on their device. Where layers
    /// are on several devices, each is asked for before the first layer runs, with a mask and positions that are there.
    pub fn masks<'a>(&mut self, mask: &'a AttentionMask, positions: &'a Tensor) -> Masks<'a> {
        let (tokens, device) = (positions.size()[1], positions.device());
        if !self.is_begun(tokens) {
            self.begin_pass(tokens);
        }
        let (mut keys, end) = (None, self.pass.as_ref().map_or(0, |pass| pass.end));
        for shelf in self.shelves.iter().filter(|shelf| shelf.device == device) {
            keys = shelf.note_positions(positions, &self.lengths, end).or(keys); // [B, S]
        }
        Masks::behind(mask, positions, &self.lengths, keys)
    }

    /// Writes `key, value [B, G, T, D]` of one layer behind every row's length and returns the layer's keys and values
    /// up to the longest row's end, `[B, G, S, D]`. Lengths do not move. Where nobody asked for the masks of the pass, it
    /// begins with layer 0.
    pub fn write(&mut self, layer: usize, key: &Tensor, value: &Tensor) -> (Tensor, Tensor) {
        let tokens = key.size()[2];
        let end = self.enter(layer, tokens);
        self.shelves[self.shelf(layer)].write(layer, key, value, (&self.lengths, end))
    }

    /// Begins a pass whose tokens are written over others: token `t` of row `b` at slot `slots[b, t]`, `[B, T]` int64, which
    /// the row holds. Lengths stay, and every layer that the pass reaches sees what all rows hold. A token of padding goes to
    /// slot [`KvCache::len`], where nobody looks. Only for layers without windows and states.
    pub fn overwrite(&mut self, slots: &Tensor) {
        self.end_pass();
        let (tokens, end) = (slots.size()[1], self.len());
        self.reserve(end + 1);
        self.clean_from.iter_mut().for_each(|clean_from| *clean_from = (*clean_from).max(end + 1));
        self.shelves.iter_mut().for_each(|shelf| shelf.overwrite(slots));
        self.pass = Some(Pass { tokens, keepable: 0, end, is_new: true });
    }

    /// State of one layer behind the last token of every row, `[B, ..]`; zeros where a row holds none.
    pub fn state(&self, layer: usize) -> Tensor {
        let Layer::State { held, .. } = self.layer(layer) else { panic!("layer {layer} keeps keys, no state") };
        held.narrow(0, 0, self.rows())
    }

    /// Notes the states of one layer behind each new token, `[B, T, ..]`: behind a node of a tree, that of the path to it.
    pub fn write_states(&mut self, layer: usize, states: &Tensor) {
        let _ = self.enter(layer, states.size()[1]);
        let shelf = self.shelf(layer);
        let shelf = &mut self.shelves[shelf];
        let Layer::State { pass, .. } = &mut shelf.layers[layer - shelf.first] else {
            panic!("layer {layer} keeps keys, no state");
        };
        *pass = Some(states.shallow_clone());
    }

    /// Whether a pass of so many tokens has begun, and no layer has written yet.
    fn is_begun(&self, tokens: i64) -> bool {
        self.pass.as_ref().is_some_and(|pass| pass.is_new && pass.tokens == tokens)
    }

    /// Enters a layer in a pass, and says up to which slot it sees.
    fn enter(&mut self, layer: usize, tokens: i64) -> i64 {
        if layer == 0 && !self.is_begun(tokens) {
            self.begin_pass(tokens);
        }
        let pass = self.pass.as_mut().filter(|pass| pass.tokens == tokens);
        let pass = pass.expect("a pass writes the same number of tokens to every layer, from layer 0 on");
        pass.is_new = false;
        pass.end
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
        self.shelves.iter_mut().for_each(|shelf| shelf.begin_pass(&self.lengths, tokens));
        self.pass = Some(Pass { tokens, keepable: tokens, end, is_new: true });
    }

    /// Forgets what was written and not kept.
    fn end_pass(&mut self) {
        self.pass = None;
        self.shelves.iter_mut().for_each(Shelf::end_pass);
    }

    /// Moves every row's length by its own number of tokens, after all layers were written. Rows of a padded prefill
    /// move by their true length.
    pub fn advance(&mut self, tokens: &[i64]) {
        assert_eq!(tokens.len(), self.lengths.len(), "one count for each row");
        let written = self.pass.as_ref().map_or(0, |pass| pass.keepable);
        assert!(tokens.iter().all(|&count| count <= written), "advancing by {tokens:?} tokens, {written} were written");
        self.hold(&tokens.iter().map(|count| count - 1).collect::<Vec<_>>());
        self.end_pass();
        self.lengths.iter_mut().zip(tokens).for_each(|(length, &count)| *length += count);
    }

    /// Takes over the state behind one token of the pass in each row; a row with -1 keeps the state it has.
    fn hold(&mut self, last: &[i64]) {
        self.shelves.iter_mut().for_each(|shelf| shelf.hold(last));
    }

    /// Keeps those tokens of the pass that stand at the named places, ascending, and closes the gaps between them: what
    /// is left of a draft tree is one path.
    pub fn keep(&mut self, places: &[Vec<i64>]) {
        assert_eq!(places.len(), self.lengths.len(), "one list of places for each row");
        let written = self.pass.as_ref().map_or(0, |pass| pass.keepable);
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
        self.shelves.iter().for_each(|shelf| shelf.close_gaps(base, places, most));
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
        assert!(self.can_go_back() || self.lengths == ends, "states of tokens before the last are not kept");
    }

    /// Keys and values that one row of one layer holds, `[G, len, D]` each.
    pub fn contents(&self, layer: usize, row: usize) -> [Tensor; 2] {
        let Layer::Attention { key, value } = self.layer(layer) else {
            panic!("layer {layer} keeps a state, no keys");
        };
        [key, value].map(|store| store.select(0, row as i64).narrow(1, 0, self.lengths[row]))
    }

    /// Positions of the tokens that one row holds, `[len]`, where a layer has a window.
    pub fn positions(&self, row: usize) -> Option<Tensor> {
        let kept = self.shelves.iter().find_map(|shelf| shelf.positions.as_ref())?;
        Some(kept.select(0, row as i64).narrow(0, 0, self.lengths[row]))
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.shelves.iter().map(|shelf| shelf.layers.len()).sum()
    }

    /// Keys and values of all layers that have some.
    fn stores(&self) -> impl Iterator<Item = &Tensor> {
        self.shelves.iter().flat_map(Shelf::stores)
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
        self.shelves.iter().for_each(|shelf| shelf.erase((from, to), (first, last)));
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
        self.shelves.iter().for_each(|shelf| shelf.move_rows(moved, self.room(), used));
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
        for (mine, theirs) in self.shelves.iter().zip(&other.shelves) {
            for (mut mine, theirs) in mine.held(first, more, longest).into_iter().zip(theirs.held(0, more, longest)) {
                mine.copy_(&theirs);
            }
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
        self.shelves.iter_mut().for_each(|shelf| shelf.grow_rows(rows, held));
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

    /// This cache, of one row without tokens, with the first tokens that a row of another one of its kind holds. Only where
    /// [`KvCache::can_go_back`].
    pub fn with_row_of(mut self, other: &KvCache, row: i64, tokens: i64) -> Self {
        self.end_pass();
        self.reserve(tokens);
        for (mine, theirs) in self.shelves.iter().zip(&other.shelves) {
            for (mut mine, theirs) in mine.held(0, 1, tokens).into_iter().zip(theirs.held(row, 1, tokens)) {
                mine.copy_(&theirs);
            }
        }
        (self.lengths, self.clean_from[0]) = (vec![tokens], tokens);
        self
    }

    /// Whether rows can be taken back to fewer tokens: not where a layer keeps a state, which is there behind the last alone.
    pub fn can_go_back(&self) -> bool {
        let mut layers = self.shelves.iter().flat_map(|shelf| &shelf.layers);
        !layers.any(|layer| matches!(layer, Layer::State { .. }))
    }

    /// Hides all rows but the first: passes run over those alone, and the others hold what they hold. They are shown again
    /// before rows come or go.
    pub fn hide_behind(&mut self, rows: i64) -> HiddenRows {
        self.end_pass();
        HiddenRows(self.lengths.split_off(rows as usize))
    }

    /// Shows rows again that were hidden.
    pub fn show(&mut self, hidden: HiddenRows) {
        self.end_pass();
        self.lengths.extend(hidden.0);
    }

    /// Rows there is room for.
    pub fn room(&self) -> i64 {
        self.clean_from.len() as i64
    }

    /// Tokens that every row has room for.
    pub fn capacity(&self) -> i64 {
        self.capacity
    }

    /// Bytes of everything kept, the room behind it included.
    pub fn bytes(&self) -> u64 {
        let parts = self.shelves.iter().flat_map(|shelf| shelf.held(0, self.room(), self.capacity));
        parts.map(|part| (part.numel() * part.kind().elt_size_in_bytes()) as u64).sum()
    }

    /// Gives back the room behind the rows and behind the longest of them.
    pub fn shrink(&mut self) {
        self.end_pass();
        let (rows, slots) = (self.rows(), self.len());
        if rows == self.room() && slots == self.capacity {
            return;
        }
        self.shelves.iter_mut().for_each(|shelf| shelf.shrink(rows, slots));
        self.clean_from.truncate(rows as usize);
        self.clean_from.iter_mut().for_each(|clean_from| *clean_from = slots.min(*clean_from));
        self.capacity = slots;
    }

    fn reserve(&mut self, slots: i64) {
        if slots > self.capacity {
            let more = (slots - self.capacity).max(self.capacity / 2).max(GROWTH);
            self.grow_to(self.capacity + more);
        }
    }

    fn grow_to(&mut self, capacity: i64) {
        let more = capacity - self.capacity;
        self.shelves.iter_mut().for_each(|shelf| shelf.grow_slots(more));
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
