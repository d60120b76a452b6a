//! What the layers on one device keep of past tokens. How many tokens each row holds is the cache's to say: lengths are
//! handed in. What the host says of rows and slots is sent once to each device, whatever the number of its layers.

use tch::{Device, Kind, Tensor};

use super::LayerCache;
use crate::device;

/// What one layer keeps of the `B` rows there are, with room for more behind them, `R` in all.
#[derive(Debug)]
pub(super) enum Layer {
    /// `[R, G, capacity, D]` each.
    Attention { key: Tensor, value: Tensor },
    /// Behind the row's last token, `[R, ..]`, and behind each of the pass at hand, `[B, T, ..]`.
    State { held: Tensor, pass: Option<Tensor> },
}

/// Layers that follow each other on one device.
#[derive(Debug)]
pub(super) struct Shelf {
    pub(super) device: Device,
    /// Number of the first layer.
    pub(super) first: usize,
    pub(super) layers: Vec<Layer>,
    /// Positions of all slots, `[R, capacity]`, where a layer has a window.
    pub(super) positions: Option<Tensor>,
    /// Where each row's tokens of the pass at hand go, `[B, 1, T, 1]`; `None` where all rows have one length.
    slots: Option<Tensor>,
}

impl Shelf {
    /// An empty one for these layers, of which the first has this number.
    pub(super) fn new(
        layers: &[&LayerCache],
        first: usize,
        (rows, capacity): (i64, i64),
        (kind, device): (Kind, Device),
    ) -> Self {
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
        Self { device, first, layers: layers.collect(), positions, slots: None }
    }

    /// Numbers of the host as a column `[n, 1, 1, 1]`.
    fn column(&self, values: &[i64]) -> Tensor {
        device::send(&Tensor::from_slice(values), self.device).view([-1, 1, 1, 1])
    }

    /// Begins a pass of so many new tokens behind `lengths`.
    pub(super) fn begin_pass(&mut self, lengths: &[i64], tokens: i64) {
        let ragged = lengths.iter().any(|&length| length != lengths[0]);
        self.slots = ragged.then(|| {
            self.column(lengths) + Tensor::arange(tokens, (Kind::Int64, self.device)).view([1, 1, -1, 1]) // [B, 1, T, 1]
        });
    }

    /// Begins a pass over tokens that go to these slots, `[B, T]`.
    pub(super) fn overwrite(&mut self, slots: &Tensor) {
        let [rows, tokens] = [slots.size()[0], slots.size()[1]];
        self.slots = Some(device::moved(slots, self.device).view([rows, 1, tokens, 1]));
    }

    /// Forgets what was written and not kept.
    pub(super) fn end_pass(&mut self) {
        self.slots = None;
        for layer in &mut self.layers {
            if let Layer::State { pass, .. } = layer {
                *pass = None;
            }
        }
    }

    /// Notes the positions `[B, T]` of the pass; those of all slots up to `end`, `[B, S]`, where a layer has a window.
    pub(super) fn note_positions(&self, new: &Tensor, lengths: &[i64], end: i64) -> Option<Tensor> {
        let (rows, tokens) = (lengths.len() as i64, new.size()[1]);
        let kept = self.positions.as_ref()?.narrow(0, 0, rows);
        match &self.slots {
            Some(slots) => drop(kept.shallow_clone().scatter_(1, &slots.view([-1, tokens]), new)),
            None => kept.narrow(1, lengths[0], tokens).copy_(new),
        }
        Some(kept.narrow(1, 0, end))
    }

    /// Writes `key, value [B, G, T, D]` of a layer behind `lengths`; its keys and values up to `end`, `[B, G, S, D]`.
    pub(super) fn write(
        &self,
        layer: usize,
        key: &Tensor,
        value: &Tensor,
        (lengths, end): (&[i64], i64),
    ) -> (Tensor, Tensor) {
        let Layer::Attention { key: keys, value: values } = &self.layers[layer - self.first] else {
            panic!("layer {layer} keeps a state, no keys");
        };
        let (rows, tokens) = (lengths.len() as i64, key.size()[2]);
        for (store, new) in [(keys, key), (values, value)] {
            match &self.slots {
                Some(slots) => drop(store.shallow_clone().scatter_(2, &slots.expand_as(new), new)),
                None => store.narrow(0, 0, rows).narrow(2, lengths[0], tokens).copy_(new),
            }
        }
        let shown = |store: &Tensor| store.narrow(0, 0, rows).narrow(2, 0, end);
        (shown(keys), shown(values))
    }

    /// Takes over the state behind one token of the pass in each row; a row with -1 keeps the state it has.
    pub(super) fn hold(&mut self, last: &[i64]) {
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

    /// Moves what stands at the `places` behind `base` to `base` and on; `most` is the longest list's length.
    pub(super) fn close_gaps(&self, base: &[i64], places: &[Vec<i64>], most: i64) {
        let rows = places.len() as i64;
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
            let shape = [rows, groups, most, dim];
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

    /// Keys and values of all layers that have some.
    pub(super) fn stores(&self) -> impl Iterator<Item = &Tensor> {
        self.layers.iter().flat_map(|layer| match layer {
            Layer::Attention { key, value } => vec![key, value],
            Layer::State { .. } => Vec::new(),
        })
    }

    /// Writes zeros into each row's slots `from .. to`, all of which are in `first .. last`.
    pub(super) fn erase(&self, (from, to): (&[i64], &[i64]), (first, last): (i64, i64)) {
        let slot = Tensor::arange_start(first, last, (Kind::Int64, self.device)).view([1, 1, -1, 1]);
        let erased = slot.ge_tensor(&self.column(from)).logical_and(&slot.lt_tensor(&self.column(to))); // [B, 1, n, 1]
        for store in self.stores() {
            let rows = store.narrow(0, 0, from.len() as i64);
            let _ = rows.narrow(2, first, last - first).masked_fill_(&erased, 0.0);
        }
    }

    /// Copies the first `used` slots of rows over others, `(from, to)`, of `room` rows.
    pub(super) fn move_rows(&self, moved: &[(i64, i64)], room: i64, used: i64) {
        let overwritten = |from: i64| moved.iter().any(|&(_, to)| to == from);
        let overlap = moved.iter().any(|&(from, _)| overwritten(from));
        let index = overlap.then(|| {
            let (from, to): (Vec<i64>, Vec<i64>) = moved.iter().copied().unzip();
            [from, to].map(|rows| device::send(&Tensor::from_slice(&rows), self.device))
        });
        for mut held in self.held(0, room, used) {
            match &index {
                // Gathered into memory of its own first.
                Some([from, to]) => drop(held.index_copy_(0, to, &held.index_select(0, from))),
                None => moved.iter().for_each(|&(from, to)| held.get(to).copy_(&held.get(from))),
            }
        }
    }

    /// All that `count` rows from `first` on hold in their first `used` slots: keys, values, positions and states.
    pub(super) fn held(&self, first: i64, count: i64, used: i64) -> Vec<Tensor> {
        let mut held: Vec<Tensor> = self.stores().map(|store| store.narrow(2, 0, used)).collect();
        held.extend(self.positions.as_ref().map(|positions| positions.narrow(1, 0, used)));
        held.extend(self.layers.iter().filter_map(|layer| match layer {
            Layer::State { held, .. } => Some(held.shallow_clone()),
            Layer::Attention { .. } => None,
        }));
        held.iter().map(|tensor| tensor.narrow(0, first, count)).collect()
    }

    /// Makes room for `rows` rows, of which the first `held` are kept.
    pub(super) fn grow_rows(&mut self, rows: i64, held: i64) {
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
    }

    /// Keeps the first rows and the first slots, in memory of their own.
    pub(super) fn shrink(&mut self, rows: i64, slots: i64) {
        let cut = |tensor: &Tensor, axis: Option<i64>| {
            let part = tensor.narrow(0, 0, rows);
            axis.map_or_else(|| part.copy(), |axis| part.narrow(axis, 0, slots).copy())
        };
        for layer in &mut self.layers {
            match layer {
                Layer::Attention { key, value } => (*key, *value) = (cut(key, Some(2)), cut(value, Some(2))),
                Layer::State { held, .. } => *held = cut(held, None),
            }
        }
        self.positions = self.positions.as_ref().map(|positions| cut(positions, Some(1)));
    }

    /// Makes room for so many more slots.
    pub(super) fn grow_slots(&mut self, more: i64) {
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
    }
}
