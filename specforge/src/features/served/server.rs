//! A server that answers, and what is known of it.

use std::path::PathBuf;
use std::time::Duration;

use super::{Part, ServerAddress};
use crate::serving::Http;

/// What a server is asked with.
pub(super) struct Server {
    pub(super) address: ServerAddress,
    pub(super) http: Http,
    /// What the server calls its model.
    pub(super) model: String,
    /// What it gives.
    pub(super) part: Part,
    /// `H`
    pub(super) width: i64,
    pub(super) timeout: Duration,
    pub(super) states_folder: Option<PathBuf>,
}
