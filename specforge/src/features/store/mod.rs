//! The feature store: hidden states of documents on disk, captured once, read by any draft and any vocabulary.
//!
//! ```text
//! store/
//!   store.json                target, tokenizer, layers, element type, and the shards with their checksums
//!   shard-00000.safetensors   ids [T]  offsets [D + 1]  hidden.{layer} [T, H]  hidden.{layer}.scale [T]  probes.*
//!                             whole_vocabulary.top1 [T]  whole_vocabulary.log_sum_exp [T]
//!   shard-00001.safetensors   ...
//!   .lock                     held by the capture that writes here
//! ```
//!
//! A shard holds the tokens of its documents one after the other: document `d` has rows `offsets[d] .. offsets[d + 1]`.
//! There is no padding, no loss mask and no logits: masks belong to the run that trains, and logits are the final state
//! times the target's head. Files are ordinary safetensors, so that any engine can write a store and Python can read one.
//!
//! `element` and `float8` say how a number is stored, `manifest` what `store.json` says, `shard` writes and maps one
//! file, `probe` notes what a head says of some rows, `whole` two numbers of all of them where they are wanted, `reader`
//! opens a whole store, `verify` asks a head about it,
//! `capture` says what is missing, `filling` captures it, with several processes or one, `streaming` does it with one layer of
//! the target at a time, and `writing` is the thread that does the writing meanwhile.
//!
//! Shape legend: `T` tokens of a shard, `D` its documents, `P` its probes, `L` captured layers, `H` hidden size, `V`
//! vocabulary.

pub mod capture;
pub mod element;
pub mod filling;
pub mod float8;
pub mod manifest;
pub mod probe;
pub mod reader;
pub mod shard;
pub mod streaming;
pub mod verify;
mod whole;
mod writing;

pub use capture::{Capture, CaptureReport, Overview};
pub use element::Element;
pub use filling::Going;
pub use manifest::{LAYER_CONVENTION, MANIFEST_FILE, ShardEntry, StoreManifest};
pub use reader::{Share, Store};
pub use streaming::{StreamPlan, Windows};
