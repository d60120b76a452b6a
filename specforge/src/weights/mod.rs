//! Files that hold tensors: reading Hugging Face folders, writing without ever leaving half a file.

pub mod content;
mod finite;
pub mod folder;
mod index;
pub mod quantised;
mod scaled;
pub mod shared;
pub mod torch;
pub mod writer;

pub use folder::WeightsFolder;
pub use index::is_old_buffer;
pub use shared::SharedCopies;
pub use writer::{write_bytes, write_tensors};
