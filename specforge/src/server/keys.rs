//! Keys that requests must show. Only their digests are kept, and digests are compared in constant time, so that how long a
//! refusal takes says nothing about a key.

use std::path::Path;

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::error::{Error, Result};

/// The keys that are let in; without any, everybody is.
#[derive(Clone, Default)]
pub struct Keys {
    digests: Vec<[u8; 32]>,
}

impl Keys {
    /// Reads a file with one key a line. Empty lines count for nothing.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let keys = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let digests: Vec<[u8; 32]> = keys.map(digest).collect();
        if digests.is_empty() {
            return Err(Error::bad_file(path, "expected one key a line, got none")
                .with_hint("write a key into it, such as the output of `openssl rand -hex 32`"));
        }
        Ok(Self { digests })
    }

    /// Whether a request is let in that shows this in `Authorization`.
    pub fn admit(&self, authorization: Option<&str>) -> bool {
        if self.digests.is_empty() {
            return true;
        }
        let scheme = |text: &&str| text.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case("bearer "));
        let Some(shown) = authorization.filter(scheme) else { return false };
        let shown = digest(shown[7..].trim());
        // Every key is compared, whichever was right.
        self.digests.iter().fold(0u8, |found, key| found | key.ct_eq(&shown).unwrap_u8()) == 1
    }
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_the_keys_is_needed_where_there_are_any() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        std::fs::write(&path, "first-key\n\n  second-key  \n").unwrap();
        let keys = Keys::read(&path).unwrap();
        for shown in ["Bearer first-key", "bearer second-key", "Bearer  second-key "] {
            assert!(keys.admit(Some(shown)), "{shown}");
        }
        for shown in ["Bearer", "Bearer ", "first-key", "Basic first-key", "Bearer first-ke", "Bearer first-key2", "é"]
        {
            assert!(!keys.admit(Some(shown)), "{shown}");
        }
        assert!(!keys.admit(None) && Keys::default().admit(None));
        std::fs::write(&path, " \n").unwrap();
        assert!(Keys::read(&path).err().unwrap().to_string().contains("expected one key a line"));
    }
}
