//! One file of a store: written from states in memory, and mapped to be read. Shape legend: see [`super`].

use std::borrow::Cow;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap};
use safetensors::{Dtype, SafeTensors};
use tch::{Device, Kind, Tensor};

use super::element::Element;
use super::float8;
use super::manifest::{ShardEntry, StoreManifest};
use super::probe::{self, Probes};
use super::whole;
use crate::error::{Error, Result};
use crate::features::WholeVocabulary;
use crate::files::Digests;
use crate::nn::Head;
use crate::strict;
use crate::weights::writer::{TensorBytes, host_bytes, write_bytes_seen};

// Numbers are used in the mapped bytes as they lie.
const _: () = assert!(cfg!(target_endian = "little"), "the feature store needs a little-endian machine");

const IDS: &str = "ids";
const OFFSETS: &str = "offsets";
const LIKELIEST: &str = "whole_vocabulary.top1";
const LOG_SUM_EXP: &str = "whole_vocabulary.log_sum_exp";

fn states_name(layer: usize) -> String {
    format!("hidden.{layer}")
}

fn scales_name(layer: usize) -> String {
    format!("hidden.{layer}.scale")
}

/// File name of a shard by its number.
pub fn file_name(number: usize) -> String {
    format!("shard-{number:05}.safetensors")
}

/// What one document adds to a file, and what the file has anyway; near enough to plan with.
pub fn planned_bytes(manifest: &StoreManifest, documents: usize, tokens: usize) -> u64 {
    let layers = manifest.layers.len();
    let whole = if manifest.whole_vocabulary { size_of::<i64>() + size_of::<f32>() } else { 0 };
    let token = size_of::<i64>() + layers * manifest.element.state_bytes(manifest.hidden_size as usize) + whole;
    let probes = probe::PROBES_PER_SHARD * (2 * size_of::<i64>() + (3 + layers) * size_of::<f32>());
    let header = 100 * (8 + 2 * layers);
    (tokens * token + (documents + 1) * size_of::<i64>() + probes + header) as u64
}

/// States of one layer, encoded.
#[derive(Default)]
struct Encoded {
    states: Vec<u8>,
    scales: Vec<f32>,
}

/// A shard in the making.
pub struct ShardWriter<'a> {
    manifest: &'a StoreManifest,
    ids: Vec<i64>,
    offsets: Vec<i64>,
    layers: Vec<Encoded>,
    /// Rows to probe, ascending, and their final states before encoding, `[.., H]` for each piece.
    probe_rows: Vec<usize>,
    probe_states: Vec<Tensor>,
}

impl<'a> ShardWriter<'a> {
    /// A shard for documents of these lengths.
    pub fn new(manifest: &'a StoreManifest, lengths: &[usize]) -> Self {
        let mut offsets = vec![0];
        offsets.extend(lengths.iter().scan(0, |end, &length| {
            *end += length as i64;
            Some(*end)
        }));
        let tokens: usize = lengths.iter().sum();
        let state_bytes = manifest.hidden_size as usize * manifest.element.bytes();
        let layer = |_| Encoded { states: Vec::with_capacity(tokens * state_bytes), scales: Vec::new() };
        let probe_rows = probe::rows(&offsets);
        Self {
            manifest,
            ids: Vec::with_capacity(tokens),
            offsets,
            layers: manifest.layers.iter().map(layer).collect(),
            probe_rows,
            probe_states: Vec::new(),
        }
    }

    /// Adds the next tokens with their states, one `[n, H]` for each layer.
    pub fn add(&mut self, ids: &[i64], states: &[Tensor]) -> Result<()> {
        self.add_ids(ids);
        states.iter().enumerate().try_for_each(|(layer, states)| self.add_states(layer, states))
    }

    /// Adds the next tokens; their states come with [`ShardWriter::add_states`], layer by layer.
    pub fn add_ids(&mut self, ids: &[i64]) {
        self.ids.extend(ids);
    }

    /// Adds the states of the next tokens of one layer, `[n, H]`. `layer` counts the store's.
    pub fn add_states(&mut self, layer: usize, states: &Tensor) -> Result<()> {
        let width = self.manifest.hidden_size as usize;
        let is_last = layer + 1 == self.layers.len();
        let encoded = &mut self.layers[layer];
        if is_last {
            let start = encoded.states.len() / (width * self.manifest.element.bytes());
            let end = start + states.size()[0] as usize;
            let rows = self.probe_rows.iter().filter(|row| (start..end).contains(row));
            let inside: Vec<i64> = rows.map(|&row| (row - start) as i64).collect();
            let last = states.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
            self.probe_states.push(last.f_index_select(0, &Tensor::from_slice(&inside))?);
        }
        let states = states.f_to_device(Device::Cpu)?.f_contiguous()?;
        match self.manifest.element {
            Element::Float32 => encoded.states.extend(host_bytes(&states.f_to_kind(Kind::Float)?)),
            Element::Bfloat16 => encoded.states.extend(host_bytes(&states.f_to_kind(Kind::BFloat16)?)),
            Element::Float8 => {
                let states = states.f_to_kind(Kind::Float)?;
                // SAFETY: every bit pattern is a float32.
                let (_, values, _) = unsafe { host_bytes(&states).align_to::<f32>() };
                float8::encode(values, width, &mut encoded.states, &mut encoded.scales);
            }
        }
        Ok(())
    }

    /// States of some rows as they are stored: `[P, H]`.
    fn stored(&self, encoded: &Encoded, rows: &[usize]) -> Result<Tensor> {
        let (count, width) = (rows.len(), self.manifest.hidden_size as usize);
        let stride = width * self.manifest.element.bytes();
        let of_row = |row: &usize| &encoded.states[row * stride..(row + 1) * stride];
        let bytes: Vec<u8> = rows.iter().flat_map(of_row).copied().collect();
        let shape = [count as i64, width as i64];
        Ok(match self.manifest.element {
            Element::Float32 => Tensor::f_from_data_size(&bytes, &shape, Kind::Float)?,
            Element::Bfloat16 => Tensor::f_from_data_size(&bytes, &shape, Kind::BFloat16)?,
            Element::Float8 => {
                let scales: Vec<f32> = rows.iter().map(|&row| encoded.scales[row]).collect();
                let mut values = vec![0.0; count * width];
                float8::decode(&bytes, &scales, width, &mut values);
                Tensor::f_from_slice(&values)?.f_view(shape)?
            }
        })
    }

    /// What the head says of the final states as they are stored.
    fn whole_vocabulary(&self, head: &Head) -> Result<WholeVocabulary> {
        let mut all = WholeVocabulary::default();
        if let Some(last) = self.layers.last().filter(|_| self.manifest.whole_vocabulary) {
            let rows: Vec<usize> = (0..self.ids.len()).collect();
            for rows in rows.chunks(whole::ROWS_PER_PASS) {
                all.ask(&self.stored(last, rows)?, head)?;
            }
        }
        Ok(all)
    }

    /// Writes the file. The head is asked about the final states as they were before they were encoded.
    pub fn write(self, folder: &Path, file: String, head: &Head) -> Result<ShardEntry> {
        let next: Vec<i64> = self.probe_rows.iter().map(|&row| self.ids[row + 1]).collect();
        let stored =
            self.layers.iter().map(|layer| self.stored(layer, &self.probe_rows)).collect::<Result<Vec<_>>>()?;
        let last = Tensor::f_cat(&self.probe_states, 0)?; // [P, H]
        let probes = Probes::make(&self.probe_rows, &last, &stored, &next, head)?;
        let whole = self.whole_vocabulary(head)?;

        let (tokens, width) = (self.ids.len(), self.manifest.hidden_size as usize);
        let mut tensors = vec![
            (IDS.to_owned(), numbers(Dtype::I64, vec![tokens], le_bytes(&self.ids, i64::to_le_bytes))),
            (
                OFFSETS.to_owned(),
                numbers(Dtype::I64, vec![self.offsets.len()], le_bytes(&self.offsets, i64::to_le_bytes)),
            ),
        ];
        for (&layer, encoded) in self.manifest.layers.iter().zip(self.layers) {
            let states = numbers(self.manifest.element.dtype(), vec![tokens, width], encoded.states);
            tensors.push((states_name(layer), states));
            if self.manifest.element.has_scales() {
                let scales = le_bytes(&encoded.scales, f32::to_le_bytes);
                tensors.push((scales_name(layer), numbers(Dtype::F32, vec![tokens], scales)));
            }
        }
        if self.manifest.whole_vocabulary {
            let likeliest = le_bytes(&whole.likeliest, i64::to_le_bytes);
            let log_sum_exp = le_bytes(&whole.log_sum_exp, f32::to_le_bytes);
            tensors.push((LIKELIEST.to_owned(), numbers(Dtype::I64, vec![tokens], likeliest)));
            tensors.push((LOG_SUM_EXP.to_owned(), numbers(Dtype::F32, vec![tokens], log_sum_exp)));
        }
        let count = probes.rows.len();
        for (name, values) in [("rows", &probes.rows), ("top1", &probes.top1)] {
            let values = le_bytes(values, i64::to_le_bytes);
            tensors.push((format!("probes.{name}"), numbers(Dtype::I64, vec![count], values)));
        }
        for (name, values) in probes.figures() {
            let shape = if name == "norms" { vec![count, self.manifest.layers.len()] } else { vec![count] };
            let values = le_bytes(values, f32::to_le_bytes);
            tensors.push((format!("probes.{name}"), numbers(Dtype::F32, shape, values)));
        }
        // One key of metadata only: several would stand in an order of their own in every run.
        let path = folder.join(&file);
        let (mut bytes, mut crc32c) = (0, 0);
        write_bytes_seen(&path, &tensors, &[], &mut |piece| {
            bytes += piece.len() as u64;
            crc32c = crc32c::crc32c_append(crc32c, piece);
        })?;
        Ok(ShardEntry { file, documents: (self.offsets.len() - 1) as u64, tokens: tokens as u64, bytes, crc32c })
    }
}

fn numbers(dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8>) -> TensorBytes<'static> {
    TensorBytes { dtype, shape, bytes: Cow::Owned(bytes) }
}

fn le_bytes<T: Copy, const N: usize>(values: &[T], to_bytes: fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&value| to_bytes(value)).collect()
}

fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    // SAFETY: shards are never changed, only replaced by a rename, which leaves mapped bytes as they are.
    unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))
}

/// A whole shard, memory-mapped.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    map: Mmap,
    element: Element,
    width: usize,
    ids: Range<usize>,
    offsets: Vec<i64>,
    /// Bytes of states and scales of each layer.
    layers: Vec<(Range<usize>, Range<usize>)>,
    /// Bytes of likeliest tokens and of sums, where they are noted.
    whole: Option<(Range<usize>, Range<usize>)>,
    probes: Probes,
}

impl Shard {
    /// Maps a shard and checks length, checksum, names, types, shapes, offsets and ids; without `digests` the checksum is
    /// somebody else's business. A problem is given in words.
    pub fn open(
        folder: &Path,
        manifest: &StoreManifest,
        entry: &ShardEntry,
        digests: Option<&Digests>,
    ) -> Result<Self, String> {
        let path = folder.join(&entry.file);
        let map = map(&path).map_err(|error| error.to_string())?;
        let named = |problem: String| format!("{}: {problem}", path.display());
        if map.len() as u64 != entry.bytes {
            return Err(named(format!("is truncated or longer: expected {} bytes, got {}", entry.bytes, map.len())));
        }
        if let Some(digests) = digests {
            let checksum = digests.of(&path, "crc32c", || Ok(format!("{:08x}", crc32c::crc32c(&map))));
            let checksum = checksum.map_err(|error| error.to_string())?;
            let expected = format!("{:08x}", entry.crc32c);
            if checksum != expected {
                return Err(named(format!("is damaged: expected CRC-32C {expected}, got {checksum}")));
            }
        }
        Self::from_map(path.clone(), map, manifest, entry).map_err(named)
    }

    fn from_map(path: PathBuf, map: Mmap, manifest: &StoreManifest, entry: &ShardEntry) -> Result<Self, String> {
        if let Some(name) = strict::repeated_tensor(&map) {
            return Err(format!("its header names `{name}` twice"));
        }
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|error| error.to_string())?;
        let find = |name: &str, dtype: Dtype, shape: &[usize]| {
            let info = metadata.info(name).ok_or_else(|| format!("has no tensor `{name}`"))?;
            if info.dtype != dtype || info.shape != shape {
                let (got, got_shape) = (info.dtype, &info.shape);
                return Err(format!("`{name}`: expected {dtype:?} {shape:?}, got {got:?} {got_shape:?}"));
            }
            let start = 8 + header;
            Ok(start + info.data_offsets.0..start + info.data_offsets.1)
        };
        let (tokens, width) = (entry.tokens as usize, manifest.hidden_size as usize);
        let offsets = i64s(&map[find(OFFSETS, Dtype::I64, &[entry.documents as usize + 1])?]);
        let rising = offsets.windows(2).all(|pair| pair[0] < pair[1]);
        if offsets.first() != Some(&0) || offsets.last() != Some(&(tokens as i64)) || !rising {
            return Err(format!("`{OFFSETS}` do not rise from 0 to {tokens}"));
        }
        let ids = find(IDS, Dtype::I64, &[tokens])?;
        if let Some(id) = i64s(&map[ids.clone()]).iter().find(|&&id| !(0..manifest.vocab_size).contains(&id)) {
            return Err(format!("`{IDS}`: expected numbers from 0 to below {}, got {id}", manifest.vocab_size));
        }
        let mut layers = Vec::new();
        for &layer in &manifest.layers {
            let states = find(&states_name(layer), manifest.element.dtype(), &[tokens, width])?;
            let scales = match manifest.element.has_scales() {
                true => find(&scales_name(layer), Dtype::F32, &[tokens])?,
                false => 0..0,
            };
            layers.push((states, scales));
        }
        let whole = match manifest.whole_vocabulary {
            true => Some((find(LIKELIEST, Dtype::I64, &[tokens])?, find(LOG_SUM_EXP, Dtype::F32, &[tokens])?)),
            false => None,
        };
        if let Some((likeliest, log_sum_exp)) = &whole {
            let is_token = |id: &i64| (0..manifest.vocab_size).contains(id);
            if let Some(id) = i64s(&map[likeliest.clone()]).into_iter().find(|id| !is_token(id)) {
                return Err(format!(
                    "`{LIKELIEST}`: expected tokens from 0 to below {}, got {id}",
                    manifest.vocab_size
                ));
            }
            if let Some(sum) = f32s(&map[log_sum_exp.clone()]).into_iter().find(|sum| !sum.is_finite()) {
                return Err(format!("`{LOG_SUM_EXP}`: expected finite numbers, got {sum}"));
            }
        }
        // Which rows are probed follows from the offsets, so that a file cannot choose easy ones, or none.
        let rows: Vec<i64> = probe::rows(&offsets).into_iter().map(|row| row as i64).collect();
        let count = rows.len();
        if i64s(&map[find("probes.rows", Dtype::I64, &[count])?]) != rows {
            return Err("`probes.rows` are not the rows that belong to these offsets".to_owned());
        }
        let top1 = i64s(&map[find("probes.top1", Dtype::I64, &[count])?]);
        let figure = |name: &str, shape: &[usize]| Ok::<_, String>(f32s(&map[find(name, Dtype::F32, shape)?]));
        let probes = Probes {
            rows,
            top1,
            margin: figure("probes.margin", &[count])?,
            log_sum_exp: figure("probes.log_sum_exp", &[count])?,
            next_loss: figure("probes.next_loss", &[count])?,
            norms: figure("probes.norms", &[count, manifest.layers.len()])?,
        };
        Ok(Self { path, map, element: manifest.element, width, ids, offsets, layers, whole, probes })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of documents.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What was noted about some rows when they were captured.
    pub fn probes(&self) -> &Probes {
        &self.probes
    }

    /// Rows of a document.
    pub fn rows_of(&self, document: usize) -> Range<usize> {
        self.offsets[document] as usize..self.offsets[document + 1] as usize
    }

    /// Document of a row.
    pub fn document_of(&self, row: usize) -> usize {
        self.offsets.partition_point(|&offset| offset as usize <= row) - 1
    }

    /// Token ids of a document as they lie in the file: eight little-endian bytes each.
    pub fn id_bytes(&self, document: usize) -> &[u8] {
        let rows = self.rows_of(document);
        &self.map[self.ids.start + 8 * rows.start..self.ids.start + 8 * rows.end]
    }

    /// The token after a row.
    pub fn next_token(&self, row: usize) -> i64 {
        i64s(&self.map[self.ids.start + 8 * (row + 1)..self.ids.start + 8 * (row + 2)])[0]
    }

    /// What was noted of all tokens behind some rows is added; nothing where nothing was noted.
    pub fn read_whole(&self, rows: &Range<usize>, into: &mut WholeVocabulary) {
        let Some((likeliest, log_sum_exp)) = &self.whole else { return };
        let of = |bytes: &Range<usize>, size: usize| {
            &self.map[bytes.start + size * rows.start..bytes.start + size * rows.end]
        };
        into.likeliest.extend(i64s(of(likeliest, 8)));
        into.log_sum_exp.extend(f32s(of(log_sum_exp, 4)));
    }

    /// Asks the system for the pages of some rows, so that it reads them while others are being copied.
    pub fn advise(&self, layer: usize, rows: &Range<usize>) {
        let (states, _) = &self.layers[layer];
        let stride = self.width * self.element.bytes();
        // Advice that is not taken costs nothing but time.
        let _ = self.map.advise_range(Advice::WillNeed, states.start + rows.start * stride, rows.len() * stride);
    }

    /// Copies states of some rows to memory: bfloat16 for a bfloat16 store, else float32. `layer` counts the store's.
    pub fn read(&self, layer: usize, rows: Range<usize>, memory: &mut [u8]) {
        let (states, scales) = &self.layers[layer];
        let stride = self.width * self.element.bytes();
        let bytes = &self.map[states.start + rows.start * stride..states.start + rows.end * stride];
        if self.element != Element::Float8 {
            memory.copy_from_slice(bytes);
            return;
        }
        let scales = f32s(&self.map[scales.start + 4 * rows.start..scales.start + 4 * rows.end]);
        // SAFETY: every bit pattern is a float32; memory of a float32 tensor is aligned.
        let (before, values, after) = unsafe { memory.align_to_mut::<f32>() };
        debug_assert!(before.is_empty() && after.is_empty());
        float8::decode(bytes, &scales, self.width, values);
    }
}

fn i64s(bytes: &[u8]) -> Vec<i64> {
    bytes.as_chunks().0.iter().map(|&chunk| i64::from_le_bytes(chunk)).collect()
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&chunk| f32::from_le_bytes(chunk)).collect()
}
