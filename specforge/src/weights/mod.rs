//! Files that hold tensors: reading Hugging Face folders, writing without ever leaving half a file.

pub mod content;
pub mod folder;
pub mod gguf;
pub mod shared;
pub mod writer;

pub use folder::WeightsFolder;
pub use shared::SharedCopies;
pub use writer::{write_bytes, write_tensors};
