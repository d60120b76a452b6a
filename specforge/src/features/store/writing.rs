//! The thread that writes the shards of a capture: it fetches states from the device, encodes them, and puts whole shards
//! on disk, while the target computes the next pack.
//!
//! A few packs may wait; then the target does. Shards that were handed over whole are written whatever happens to later
//! ones, and one that was not is dropped.

use std::path::Path;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{Builder, Scope, ScopedJoinHandle};

use tch::{Kind, Tensor};

use super::manifest::StoreManifest;
use super::shard::{self, ShardWriter};
use crate::data::PackedBatch;
use crate::error::{Error, Result};
use crate::features::{FeatureBatch, worker};
use crate::nn::Head;

/// Packs that wait for the thread, beside the one it is at. Each holds its states on the device.
const WAITING: usize = 2;

/// What the thread is told, in this order for each shard.
enum Order {
    /// A shard of documents of these lengths begins.
    Begin(Vec<usize>),
    /// Its next documents.
    Pack(FeatureBatch),
    /// It has all of them.
    End,
}

/// The thread, as whoever computes states sees it.
pub(super) struct Writing<'scope> {
    orders: SyncSender<Order>,
    thread: ScopedJoinHandle<'scope, Result<StoreManifest>>,
}

/// The thread has failed; [`Writing::finish`] says why.
#[derive(Debug, Clone, Copy)]
pub(super) struct Failed;

impl<'scope> Writing<'scope> {
    /// Starts the thread, which adds to the shards of `manifest` in `folder`. `head` answers the probes.
    pub(super) fn start<'env>(
        scope: &'scope Scope<'scope, 'env>,
        folder: &'env Path,
        manifest: StoreManifest,
        head: &Head,
    ) -> Result<Self> {
        let (orders, taken) = mpsc::sync_channel(WAITING);
        let head = head.share();
        let write = move || write(&taken, folder, manifest, &head);
        let thread = Builder::new().name("shards".to_owned()).spawn_scoped(scope, write);
        let thread = thread.map_err(|error| Error::Failed(format!("cannot start a thread: {error}")))?;
        Ok(Self { orders, thread })
    }

    /// Begins a shard of documents of these lengths.
    pub(super) fn begin(&self, lengths: Vec<usize>) -> Result<(), Failed> {
        self.tell(Order::Begin(lengths))
    }

    /// Adds its next documents. Waits where enough are waiting.
    pub(super) fn add(&self, pack: FeatureBatch) -> Result<(), Failed> {
        self.tell(Order::Pack(pack))
    }

    /// Ends the shard: from now on it is written whatever comes.
    pub(super) fn end(&self) -> Result<(), Failed> {
        self.tell(Order::End)
    }

    fn tell(&self, order: Order) -> Result<(), Failed> {
        self.orders.send(order).map_err(|_| Failed)
    }

    /// Waits until everything is on disk. The manifest names the whole shards.
    pub(super) fn finish(self) -> Result<StoreManifest> {
        drop(self.orders);
        self.thread.join().unwrap_or_else(|payload| Err(worker::panicked("writing shards", payload.as_ref())))
    }
}

fn write(orders: &Receiver<Order>, folder: &Path, mut manifest: StoreManifest, head: &Head) -> Result<StoreManifest> {
    while let Ok(order) = orders.recv() {
        // Packs and ends come behind a beginning, within `one`.
        if let Order::Begin(lengths) = order
            && !one(orders, &lengths, folder, &mut manifest, head)?
        {
            break;
        }
    }
    Ok(manifest)
}

/// One shard, and the manifest that names it. False where the rest of it never came.
fn one(
    orders: &Receiver<Order>,
    lengths: &[usize],
    folder: &Path,
    manifest: &mut StoreManifest,
    head: &Head,
) -> Result<bool> {
    let mut writer = ShardWriter::new(manifest, lengths);
    loop {
        match orders.recv() {
            Ok(Order::Pack(FeatureBatch { batch, hidden })) => {
                check_finite(manifest, &batch, &hidden)?;
                writer.add(&batch.ids, &hidden)?;
            }
            Ok(Order::End) => break,
            Ok(Order::Begin(_)) | Err(_) => return Ok(false),
        }
    }
    let taken = |name: &String| manifest.shards.iter().any(|shard| shard.file == *name);
    let name = (0..).map(shard::file_name).find(|name| !taken(name)).unwrap_or_default();
    let entry = writer.write(folder, name, head)?;
    manifest.shards.push(entry);
    manifest.shards.sort_by(|left, right| left.file.cmp(&right.file));
    manifest.write(folder)?;
    Ok(true)
}

/// Refuses states that no draft could be trained on.
fn check_finite(manifest: &StoreManifest, batch: &PackedBatch, hidden: &[Tensor]) -> Result<()> {
    for (layer, states) in manifest.layers.iter().zip(hidden) {
        // The sum of absolute values is finite only if all are, and rarely is it not when they are.
        if states.f_abs()?.f_sum(Kind::Double)?.f_double_value(&[])?.is_finite() {
            continue;
        }
        let mut start = 0;
        for (&length, name) in batch.lengths.iter().zip(&batch.documents) {
            if states.f_narrow(0, start, length)?.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
                return Err(Error::Failed(format!(
                    "hidden state {layer} of document `{name}` is not finite: the target cannot be captured in {}",
                    manifest.target_dtype
                )));
            }
            start += length;
        }
    }
    Ok(())
}
