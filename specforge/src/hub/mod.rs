//! Models and data that lie on a hub: named as `org/name[@revision]` where a folder could stand, and as
//! `hf://datasets/org/name[@revision]/file` where a file of data could.
//!
//! `name` reads what the user wrote, `settings` the environment, `choice` says which files are needed, `client` asks the
//! hub, `transfer` brings a file home, `cache` knows where it lies, and `fetch` puts these together. The cache is the one
//! that Python's client keeps; what lies there is used as it is. From here on a name is a path like any other: nobody
//! above knows of a hub, except to write down what a path was called: [`named`].
//!
//! A build without the feature `hub` reads names as before and refuses them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::error::Result;

#[cfg(feature = "hub")]
mod cache;
#[cfg(feature = "hub")]
mod choice;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod fetch;
mod name;
#[cfg(feature = "hub")]
mod settings;
#[cfg(feature = "hub")]
mod transfer;

pub use name::{Kind, Name};
#[cfg(feature = "hub")]
pub use settings::Settings;

/// What a model is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Configuration, tokenizer and chat template: no weights.
    Description,
    /// What a target is run with.
    Target,
    /// A draft, which may lie in other files than a whole model's weights.
    Draft,
}

/// Paths that were names when this process began, and what they are called as of their commit.
static NAMED: Mutex<BTreeMap<PathBuf, Name>> = Mutex::new(BTreeMap::new());

/// The folder of a model, or its GGUF file: what `text` says where it is a path, else that of the hub's model of this name,
/// fetched as far as `wanted` needs it.
pub fn model(text: &Path, wanted: Wanted) -> Result<PathBuf> {
    match remote_model(text)? {
        Some(name) => look_up(&name, Some(wanted)),
        None => Ok(text.to_path_buf()),
    }
}

/// A file of data: what `text` says where it is a path, else the hub's file of this address.
pub fn data(text: &Path) -> Result<PathBuf> {
    match remote_data(text)? {
        Some(name) => look_up(&name, None),
        None => Ok(text.to_path_buf()),
    }
}

/// The model that a text means on a hub; nothing where it means a path of this machine.
pub fn remote_model(text: &Path) -> Result<Option<Name>> {
    let Some(text) = text.to_str() else { return Ok(None) };
    Ok(Name::model(text)?.filter(|name| !name.is_local(text)))
}

/// The file that a text means on a hub; nothing where it means a path.
pub fn remote_data(text: &Path) -> Result<Option<Name>> {
    text.to_str().map_or(Ok(None), Name::data)
}

/// What a path was called as this process came to it by a name: the name as of its commit. It leads to the same files for
/// ever, here and elsewhere.
pub fn named(path: &Path) -> Option<Name> {
    NAMED.lock().unwrap_or_else(PoisonError::into_inner).get(path).cloned()
}

/// The same as text, and of any other path the path itself.
pub fn recorded(path: &Path) -> PathBuf {
    named(path).map_or_else(|| path.to_path_buf(), |name| name.to_string().into())
}

/// Where the files of a name lie, fetched as far as they are needed: those of a model, or the one file of data.
pub fn look_up(name: &Name, wanted: Option<Wanted>) -> Result<PathBuf> {
    let (path, name) = find(name, wanted)?;
    NAMED.lock().unwrap_or_else(PoisonError::into_inner).insert(path.clone(), name);
    Ok(path)
}

#[cfg(feature = "hub")]
fn find(name: &Name, wanted: Option<Wanted>) -> Result<(PathBuf, Name)> {
    let found = match wanted {
        Some(wanted) => fetch::model(name, wanted)?,
        None => fetch::data(name)?,
    };
    Ok((found.path, found.name))
}

#[cfg(not(feature = "hub"))]
fn find(name: &Name, _: Option<Wanted>) -> Result<(PathBuf, Name)> {
    Err(crate::error::Error::hub(
        name,
        "is no path here, and this build has no hub (it was made with --no-default-features)",
    )
    .with_hint("name a folder or a file of this machine"))
}

/// Where the hub's files are kept, and whether it is asked, for people.
pub fn describe() -> String {
    #[cfg(feature = "hub")]
    {
        match Settings::from_environment() {
            Ok(settings) => {
                let asks = if settings.offline { "offline" } else { settings.endpoint.as_str() };
                let token = if settings.token.is_some() { ", with a token" } else { "" };
                format!("{asks}{token}; cache {}", settings.cache.display())
            }
            Err(error) => format!("not usable: {error}"),
        }
    }
    #[cfg(not(feature = "hub"))]
    {
        "not in this build".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_paths() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path(), Path::new("./not/there"), Path::new("src"), Path::new("prompt-lookup")] {
            assert_eq!(model(path, Wanted::Target).unwrap(), path);
            assert_eq!(data(path).unwrap(), path);
            assert_eq!(recorded(path), path);
        }
        assert!(model(Path::new("hf://x"), Wanted::Target).is_err() && data(Path::new("hf://x")).is_err());
    }
}
