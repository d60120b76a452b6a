//! Keeps documents' hidden states in the host's memory, so that later epochs do not run the target again.
//!
//! Each document passes through the target alone, never in a pack: its states then depend on nothing but itself, and a
//! resumed run, which computes some of them anew, trains on the same bits. So does one that may not keep all of them:
//! those that find no room are computed each time.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;

use tch::{Device, Tensor};

use super::{FeatureBatch, FeatureSource, Pending};
use crate::data::PackedBatch;
use crate::device;
use crate::error::{Error, Result};

/// Page-locked memory is taken in pieces of this size.
const BLOCK_BYTES: usize = 64 << 20;

/// A feature source with a memory. Holds up to `tokens x captured states x hidden size` numbers for the life of the run.
pub struct RememberedFeatures<Source> {
    source: Source,
    /// Where states are wanted.
    device: Device,
    /// Most bytes that are kept.
    limit: u64,
    /// Captured states of each document, `[T, H]` on the host, by its tokens.
    documents: RefCell<HashMap<Vec<i64>, Vec<Tensor>>>,
    shelf: RefCell<Shelf>,
    held: Cell<u64>,
    computed: Cell<u64>,
}

impl<Source: FeatureSource> RememberedFeatures<Source> {
    /// Remembers up to `limit` bytes of what `source` gives on `device`.
    pub fn new(source: Source, device: Device, limit: u64) -> Self {
        let shelf = RefCell::new(Shelf { device, block: None });
        let (held, computed) = (Cell::new(0), Cell::new(0));
        Self { source, device, limit, documents: RefCell::default(), shelf, held, computed }
    }

    /// Most bytes that are kept.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes that are kept.
    pub fn held(&self) -> u64 {
        self.held.get()
    }

    /// How often a document was computed.
    pub fn computed(&self) -> u64 {
        self.computed.get()
    }

    /// States of one document that are kept, on the device.
    fn kept(&self, ids: &[i64]) -> Option<Result<Vec<Tensor>>> {
        let documents = self.documents.borrow();
        let states = documents.get(ids)?;
        Some(states.iter().map(|states| fetch(states, self.device)).collect())
    }

    /// States of one document, on the device: those that are kept, or those that were asked for.
    fn of(&self, Asked { ids, pending }: Asked<'_>) -> Result<Vec<Tensor>> {
        // They may have been kept since they were asked for.
        if let Some(states) = self.kept(&ids) {
            return states;
        }
        let Some(pending) = pending else {
            return Err(Error::Failed("states of a document that was kept are not there any more".to_owned()));
        };
        let states = pending.wait()?.hidden;
        self.computed.set(self.computed.get() + 1);
        let bytes: usize = states.iter().map(|states| states.numel() * states.kind().elt_size_in_bytes()).sum();
        if self.held.get().saturating_add(bytes as u64) <= self.limit {
            let mut shelf = self.shelf.borrow_mut();
            let kept = states.iter().map(|states| shelf.keep(states)).collect::<Result<_>>()?;
            self.documents.borrow_mut().insert(ids, kept);
            self.held.set(self.held.get() + bytes as u64);
        }
        Ok(states)
    }
}

/// A document and, where it was not kept when it was asked for, its states on their way.
struct Asked<'a> {
    ids: Vec<i64>,
    pending: Option<Pending<'a>>,
}

/// Kept states where they are wanted; from page-locked memory, that takes its turn and nobody waits.
fn fetch(states: &Tensor, device: Device) -> Result<Tensor> {
    match device {
        Device::Cpu => Ok(states.shallow_clone()),
        _ => Ok(states.f_to_device_(device, states.kind(), true, false)?),
    }
}

impl<Source: FeatureSource> FeatureSource for RememberedFeatures<Source> {
    fn begin(&self, batch: Arc<PackedBatch>, capture: &[usize]) -> Pending<'_> {
        let ask = |alone: PackedBatch| {
            let ids = alone.ids.clone();
            let is_kept = self.documents.borrow().contains_key(&ids);
            Asked { ids, pending: (!is_kept).then(|| self.source.begin(Arc::new(alone), capture)) }
        };
        let (asked, states): (Vec<Asked<'_>>, usize) = (batch.each().map(ask).collect(), capture.len());
        Pending::later(move || {
            let mut parts: Vec<Vec<Tensor>> = (0..states).map(|_| Vec::new()).collect();
            for document in asked {
                let states = self.of(document)?;
                parts.iter_mut().zip(states).for_each(|(part, states)| part.push(states));
            }
            let hidden = parts.iter().map(|part| Ok(Tensor::f_cat(part, 0)?)).collect::<Result<_>>()?; // [T, H]
            Ok(FeatureBatch::new(batch, hidden))
        })
    }

    fn remembers(&self) -> bool {
        true
    }
}

/// Where states lie: those of the CPU where they are, those of a GPU in page-locked blocks of the host. The system's own
/// pieces of such memory have sizes of powers of two, so that a document each would waste a third.
struct Shelf {
    device: Device,
    /// The newest block, `[rows, H]`, and how many of its rows are taken. Full ones belong to their documents.
    block: Option<(Tensor, i64)>,
}

impl Shelf {
    fn keep(&mut self, states: &Tensor) -> Result<Tensor> {
        match self.device {
            Device::Cpu => Ok(states.shallow_clone()),
            _ => self.put(states),
        }
    }

    /// Copies states, `[T, H]`, into a block.
    fn put(&mut self, states: &Tensor) -> Result<Tensor> {
        let (rows, width) = states.size2()?;
        let fits = self.block.as_ref().is_some_and(|(block, taken)| {
            let size = block.size();
            block.kind() == states.kind() && size[1] == width && taken + rows <= size[0]
        });
        if !fits {
            let row_bytes = (width as usize * states.kind().elt_size_in_bytes()).max(1);
            let most = ((BLOCK_BYTES / row_bytes) as i64).max(rows);
            let block = Tensor::f_empty([most, width], (states.kind(), Device::Cpu))?;
            self.block = Some((device::page_locked(&block, self.device), 0));
        }
        let Some((block, taken)) = &mut self.block else {
            return Ok(states.f_to_device(Device::Cpu)?);
        };
        let mut place = block.f_narrow(0, *taken, rows)?;
        place.f_copy_(states)?;
        *taken += rows;
        Ok(place)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tch::{Device, Kind};

    use super::*;
    use crate::data::DocumentRef;

    /// States that say which token they belong to and in which call they were made.
    struct Numbered(Cell<i64>);

    impl FeatureSource for Numbered {
        fn begin(&self, batch: Arc<PackedBatch>, capture: &[usize]) -> Pending<'_> {
            let capture = capture.to_vec();
            Pending::later(move || {
                self.0.set(self.0.get() + 1);
                let rows = batch.ids.len() as i64;
                let states = |&index: &usize| {
                    let column = |value: f64| Tensor::full([rows, 1], value, (Kind::Float, Device::Cpu));
                    let ids = Tensor::from_slice(&batch.ids).to_kind(Kind::Float).unsqueeze(1);
                    Tensor::cat(&[ids, column(index as f64), column(self.0.get() as f64)], 1)
                };
                let hidden = capture.iter().map(states).collect();
                Ok(FeatureBatch::new(batch, hidden))
            })
        }
    }

    fn pack(documents: &[&[i64]]) -> Arc<PackedBatch> {
        let ids = documents.concat();
        Arc::new(PackedBatch {
            positions: documents.iter().flat_map(|document| 0..document.len() as i64).collect(),
            supervised: vec![true; ids.len()],
            lengths: documents.iter().map(|document| document.len() as i64).collect(),
            documents: documents.iter().map(|document| DocumentRef::new(format!("{document:?}"), 0)).collect(),
            ids,
        })
    }

    #[test]
    fn each_document_is_computed_once_and_alone() {
        let source = RememberedFeatures::new(Numbered(Cell::new(0)), Device::Cpu, u64::MAX);
        let (a, b, c): (&[i64], &[i64], &[i64]) = (&[1, 2], &[3], &[4, 5, 6]);
        let rows = |batch: Arc<PackedBatch>| {
            let features = source.features(batch, &[7, 9]).unwrap();
            features
                .hidden
                .iter()
                .map(|states| Vec::<f32>::try_from(states.flatten(0, -1)).unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(rows(pack(&[a, b]))[0], [1., 7., 1., 2., 7., 1., 3., 7., 2.]);
        let later = rows(pack(&[b, c, a]));
        assert_eq!(later[0], [3., 7., 2., 4., 7., 3., 5., 7., 3., 6., 7., 3., 1., 7., 1., 2., 7., 1.]);
        assert_eq!(later[1][..3], [3., 9., 2.]);
        assert_eq!((source.source.0.get(), source.computed()), (3, 3));
        assert_eq!(source.held(), 6 * 2 * 3 * 4); // tokens, captured states, columns, bytes
    }

    /// A document that two batches on their way have in common is computed for the first of them alone.
    #[test]
    fn batches_on_their_way_share_what_is_kept_meanwhile() {
        let source = RememberedFeatures::new(Numbered(Cell::new(0)), Device::Cpu, u64::MAX);
        let (a, b): (&[i64], &[i64]) = (&[1, 2], &[3]);
        let (first, second) = (source.begin(pack(&[a]), &[7]), source.begin(pack(&[b, a]), &[7]));
        assert_eq!(source.computed(), 0);
        first.wait().unwrap();
        second.wait().unwrap();
        assert_eq!((source.computed(), source.held()), (2, 3 * 3 * 4));
    }

    /// What finds no room is computed each time, and everything else is not.
    #[test]
    fn no_more_is_kept_than_may_be() {
        let (a, b, c): (&[i64], &[i64], &[i64]) = (&[1, 2], &[3, 4, 5], &[6]);
        // Room for three tokens: the first and the last document.
        let source = RememberedFeatures::new(Numbered(Cell::new(0)), Device::Cpu, 3 * 3 * 4);
        for computed in [3, 4, 5] {
            source.features(pack(&[a, b, c]), &[7]).unwrap();
            assert_eq!((source.computed(), source.held()), (computed, 3 * 3 * 4));
        }
        let nothing = RememberedFeatures::new(Numbered(Cell::new(0)), Device::Cpu, 0);
        nothing.features(pack(&[a]), &[7]).unwrap();
        assert_eq!((nothing.computed(), nothing.held()), (1, 0));
    }

    #[test]
    fn blocks_hold_what_was_put_into_them() {
        let mut shelf = Shelf { device: Device::Cpu, block: None };
        let width = (BLOCK_BYTES / 4 / 10) as i64; // ten rows to a block
        let states = |rows: i64, value: f64| Tensor::full([rows, width], value, (Kind::Float, Device::Cpu));
        let sizes = [4, 5, 3, 12, 1];
        let kept: Vec<Tensor> =
            sizes.iter().zip(0..).map(|(&rows, value)| shelf.put(&states(rows, f64::from(value))).unwrap()).collect();
        for ((kept, rows), value) in kept.iter().zip(sizes).zip(0..) {
            assert!(kept.equal(&states(rows, f64::from(value))), "{value}");
        }
        let address = |index: usize| kept[index].data_ptr() as usize;
        assert_eq!(address(1) - address(0), 4 * width as usize * 4, "two documents share a block");
    }
}
