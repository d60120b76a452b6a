//! Captures with a target of which one part at a time is loaded ([`LayerWise`]), so that it need not fit where it runs.
//!
//! Some shards are captured together: a window. All its documents pass through the embedding, then all through the first
//! layer, and so on; their hidden states wait in the host's memory meanwhile. Each window reads all weights once, so it
//! should be as large as that memory allows. What is computed, and every byte of the store, is that of a capture with the
//! whole target; a run that was stopped goes on with the windows that it did not end, in either way.

use std::ops::Range;

use serde::Serialize;
use tch::{Device, Tensor};

use super::capture::{Capture, CaptureReport};
use super::filling::{Filling, Going};
use super::manifest::ShardEntry;
use super::shard::ShardWriter;
use super::writing::refuse_non_finite;
use crate::data::PackedBatch;
use crate::device;
use crate::error::{Error, Result};
use crate::models::LayerWise;
use crate::models::parts::{LoadedPart, Part, Passing};
use crate::nn::AttentionMask;

/// How documents pass through a target in parts.
#[derive(Debug, Clone, Copy)]
pub struct Windows {
    /// Most tokens of a window; a larger shard has one of its own.
    pub tokens: usize,
    /// Most tokens that pass through a part at once; a longer document passes alone.
    pub pack_tokens: usize,
}

/// What such a capture will take.
#[derive(Debug, Clone, Serialize)]
pub struct StreamPlan {
    /// How often all weights are read.
    pub windows: usize,
    /// Tokens of the largest window.
    pub window_tokens: u64,
    /// Bytes of the target's files that one window reads.
    pub bytes_a_window: u64,
    /// Bytes that all of them read.
    pub bytes_read: u64,
    /// Bytes of all weights, if they were loaded.
    pub whole_target: u64,
    /// Peak memory where the target runs: its largest part and what one pack needs, estimated.
    pub peak_device: u64,
    /// Of these, the largest part.
    pub largest_part: u64,
    /// Peak memory of the host for the states of a window, on their way and encoded.
    pub peak_host: u64,
}

/// One pack of a window on its way.
struct Traveller {
    /// Its shard, counted in the window.
    shard: usize,
    batch: PackedBatch,
    mask: AttentionMask,
    /// `[1, T, H]` in the host's memory; nothing before the embedding.
    hidden: Option<Tensor>,
}

impl Traveller {
    /// Passes through a part: `[1, T, H]` where that runs.
    fn pass(&self, part: &dyn LoadedPart, device: Device) -> Result<Tensor> {
        let row = |values: &[i64]| Ok::<_, Error>(device::upload(values, device)?.unsqueeze(0)); // [1, T]
        let (ids, positions) = (row(&self.batch.ids)?, row(&self.batch.positions)?);
        let hidden = self.hidden.as_ref().map(|hidden| device::send(hidden, device));
        part.forward(&Passing { ids: &ids, positions: &positions, mask: &self.mask, hidden: hidden.as_ref() })
    }
}

impl Capture<'_> {
    /// Bytes of the host's memory that a token of a window takes.
    pub fn window_bytes_a_token(&self, target: &LayerWise) -> u64 {
        let width = self.manifest.hidden_size as usize;
        let travelling = width * target.kind().elt_size_in_bytes();
        let encoded = self.manifest.layers.len() * self.manifest.element.state_bytes(width);
        // Ids, positions and where documents begin, on the way and in the file.
        (travelling + encoded + 4 * size_of::<i64>()) as u64
    }

    /// What capturing in windows will take. Loads nothing.
    pub fn stream_plan(&self, target: &LayerWise, windows: Windows) -> StreamPlan {
        let tokens = |window: &Range<usize>| window.clone().map(|group| self.tokens(group) as u64).sum::<u64>();
        let all = self.windows(windows.tokens);
        let window_tokens = all.iter().map(tokens).max().unwrap_or(0);
        let info = target.info();
        let layers = info.layers.len();
        let parts: Vec<_> = Part::all(layers).map(|part| target.bytes(&target.names(part))).collect();
        let head = target.bytes(&target.head_names());
        let bytes_a_window = parts.iter().map(|part| part.stored).sum::<u64>() + head.stored;
        let largest_part = parts.iter().map(|part| part.loaded).max().unwrap_or(0).max(head.loaded);
        let tied = target.head_names() == target.names(Part::Embedding);
        let whole_target = parts.iter().map(|part| part.loaded).sum::<u64>() + if tied { 0 } else { head.loaded };
        // As the plan of a training run estimates a target's forward pass.
        let a_token = 8 * info.hidden_size + 3 * info.widest;
        let activations = windows.pack_tokens as u64 * a_token as u64 * target.kind().elt_size_in_bytes() as u64;
        StreamPlan {
            windows: all.len(),
            window_tokens,
            bytes_a_window,
            bytes_read: bytes_a_window * all.len() as u64,
            whole_target,
            peak_device: largest_part + activations,
            largest_part,
            peak_host: window_tokens * self.window_bytes_a_token(target),
        }
    }

    /// Captures what is missing, window by window. The first process is given the report.
    pub fn run_streamed(
        &self,
        target: &LayerWise,
        windows: Windows,
        going: &Going<'_>,
    ) -> Result<Option<CaptureReport>> {
        let all = self.windows(windows.tokens);
        self.fill(going, |filling| {
            while let Some(piece) = filling.next(all.len())? {
                let Some(entries) = self.window(target, all[piece].clone(), windows.pack_tokens, filling)? else {
                    break;
                };
                filling.hand_in(entries)?;
            }
            Ok(())
        })
    }

    /// Shards that are captured together.
    fn windows(&self, tokens: usize) -> Vec<Range<usize>> {
        let mut windows: Vec<Range<usize>> = Vec::new();
        let mut open = 0;
        for group in 0..self.groups.len() {
            let own = self.tokens(group);
            match windows.last_mut().filter(|_| open + own <= tokens) {
                Some(window) => {
                    window.end = group + 1;
                    open += own;
                }
                None => {
                    windows.push(group..group + 1);
                    open = own;
                }
            }
        }
        windows
    }

    /// One window; nothing if the run was asked to stop, and nothing is written then.
    fn window(
        &self,
        target: &LayerWise,
        groups: Range<usize>,
        pack_tokens: usize,
        filling: &mut Filling<'_>,
    ) -> Result<Option<Vec<ShardEntry>>> {
        let (device, layers) = (target.device(), target.info().layers.len());
        let mut writers = Vec::new();
        let mut travellers = Vec::new();
        for group in &self.groups[groups.clone()] {
            let mut writer = ShardWriter::new(&self.manifest, &self.lengths(group));
            for batch in self.batches(group, pack_tokens) {
                writer.add_ids(&batch.ids);
                let mut travel = |batch: PackedBatch| {
                    let mask = AttentionMask::Documents(batch.lengths.clone());
                    travellers.push(Traveller { shard: writers.len(), batch, mask, hidden: None });
                };
                // As features are computed online: on the CPU each document alone.
                match device {
                    Device::Cpu => batch.each().for_each(&mut travel),
                    _ => travel(batch),
                }
            }
            writers.push(writer);
        }
        let tokens: u64 = groups.clone().map(|group| self.tokens(group) as u64).sum();
        let parts: Vec<Part> = Part::all(layers).collect();
        for (done, &part) in parts.iter().enumerate() {
            if !filling.goes_on()? {
                return Ok(None);
            }
            let loaded = target.load(part)?;
            if let Some(&next) = parts.get(done + 1) {
                target.will_need(next);
            }
            let state = part.state(layers);
            let place = state.and_then(|state| self.manifest.layers.iter().position(|&layer| layer == state));
            for traveller in &mut travellers {
                if filling.is_stopped_here() {
                    return Ok(None);
                }
                let hidden = traveller.pass(loaded.as_ref(), device)?; // [1, T, H]
                if let Some(place) = place {
                    let states = hidden.f_squeeze_dim(0)?; // [T, H]
                    let layer = self.manifest.layers[place];
                    refuse_non_finite(&self.manifest, layer, &traveller.batch, &states)?;
                    writers[traveller.shard].add_states(place, &states)?;
                }
                traveller.hidden = Some(hidden.f_to_device(Device::Cpu)?);
            }
            drop(loaded);
            target.release(part);
            let share = |parts_done: usize| tokens * parts_done as u64 / parts.len() as u64;
            filling.passed(share(done + 1) - share(done))?;
        }
        if !filling.goes_on()? {
            return Ok(None);
        }
        drop(travellers);
        let head = target.head()?;
        let files = self.groups[groups].iter().map(|group| group.file.clone());
        let entries = writers.into_iter().zip(files).map(|(writer, file)| writer.write(&self.folder, file, &head));
        entries.collect::<Result<_>>().map(Some)
    }
}
