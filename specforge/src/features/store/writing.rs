//! The thread that writes the shards of a capture: it fetches states from the device, encodes them, and puts whole shards
//! on disk, while the target computes the next pack. Whoever hands them over asks now and then which are written.
//!
//! A few packs may wait; then the target does. Shards that were handed over whole are written whatever happens to later
//! ones, and one that was not is dropped.

use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread::{Builder, Scope, ScopedJoinHandle};

use tch::{Kind, Tensor};

use super::manifest::{ShardEntry, StoreManifest};
use super::shard::ShardWriter;
use crate::data::PackedBatch;
use crate::error::{Error, Result};
use crate::features::{FeatureBatch, worker};
use crate::nn::Head;

/// Packs that wait for the thread, beside the one it is at. Each holds its states on the device.
const WAITING: usize = 2;

/// What the thread is told, in this order for each shard.
enum Order {
    /// A shard of documents of these lengths begins, in a file of this name.
    Begin(Vec<usize>, String),
    /// Its next documents.
    Pack(FeatureBatch),
    /// It has all of them.
    End,
}

/// The thread, as whoever computes states sees it.
pub(super) struct Writing<'scope> {
    orders: SyncSender<Order>,
    entries: Receiver<ShardEntry>,
    thread: ScopedJoinHandle<'scope, Result<()>>,
}

/// The thread has failed; [`Writing::finish`] says why.
#[derive(Debug, Clone, Copy)]
pub(super) struct Failed;

impl<'scope> Writing<'scope> {
    /// Starts the thread, which writes shards as `manifest` says into `folder`. `head` answers the probes.
    pub(super) fn start<'env>(
        scope: &'scope Scope<'scope, 'env>,
        folder: &'env Path,
        manifest: &'env StoreManifest,
        head: &Head,
    ) -> Result<Self> {
        let (orders, taken) = mpsc::sync_channel(WAITING);
        let (written, entries) = mpsc::channel();
        let head = head.share();
        let write = move || write(&taken, &written, folder, manifest, &head);
        let thread = Builder::new().name("shards".to_owned()).spawn_scoped(scope, write);
        let thread = thread.map_err(|error| Error::Failed(format!("cannot start a thread: {error}")))?;
        Ok(Self { orders, entries, thread })
    }

    /// Begins a shard of documents of these lengths, in a file of this name.
    pub(super) fn begin(&self, lengths: Vec<usize>, file: String) -> Result<(), Failed> {
        self.tell(Order::Begin(lengths, file))
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

    /// Shards that are on disk since this was last asked.
    pub(super) fn written(&self) -> Vec<ShardEntry> {
        self.entries.try_iter().collect()
    }

    /// Waits until everything is on disk: the shards that are there and were not asked for, and what went wrong, if anything.
    pub(super) fn finish(self) -> (Vec<ShardEntry>, Result<()>) {
        drop(self.orders);
        let outcome =
            self.thread.join().unwrap_or_else(|payload| Err(worker::panicked("writing shards", payload.as_ref())));
        (self.entries.try_iter().collect(), outcome)
    }
}

fn write(
    orders: &Receiver<Order>,
    written: &Sender<ShardEntry>,
    folder: &Path,
    manifest: &StoreManifest,
    head: &Head,
) -> Result<()> {
    while let Ok(order) = orders.recv() {
        // Packs and ends come behind a beginning, within `one`.
        let Order::Begin(lengths, file) = order else { continue };
        let Some(writer) = one(orders, ShardWriter::new(manifest, &lengths), manifest)? else { break };
        // Whoever is gone does not want to know.
        let _ = written.send(writer.write(folder, file, head)?);
    }
    Ok(())
}

/// One shard. Nothing where the rest of it never came.
fn one<'a>(
    orders: &Receiver<Order>,
    mut writer: ShardWriter<'a>,
    manifest: &StoreManifest,
) -> Result<Option<ShardWriter<'a>>> {
    loop {
        match orders.recv() {
            Ok(Order::Pack(FeatureBatch { batch, hidden, .. })) => {
                for (&layer, states) in manifest.layers.iter().zip(&hidden) {
                    refuse_non_finite(manifest, layer, &batch, states)?;
                }
                writer.add(&batch.ids, &hidden)?;
            }
            Ok(Order::End) => return Ok(Some(writer)),
            Ok(Order::Begin(..)) | Err(_) => return Ok(None),
        }
    }
}

/// Refuses states of a layer, `[T, H]`, that no draft could be trained on.
pub(super) fn refuse_non_finite(
    manifest: &StoreManifest,
    layer: usize,
    batch: &PackedBatch,
    states: &Tensor,
) -> Result<()> {
    // The sum of absolute values is finite only if all are, and rarely is it not when they are.
    if states.f_abs()?.f_sum(Kind::Double)?.f_double_value(&[])?.is_finite() {
        return Ok(());
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
    Ok(())
}
