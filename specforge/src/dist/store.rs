//! A table of bytes that every process of a run sees: `c10d::TCPStore`.

use std::ffi::{CString, c_void};
use std::net::TcpListener;
use std::os::fd::IntoRawFd;
use std::time::Duration;

use super::c10d::{self, CStore};
use crate::error::{Error, Result};
use crate::shim::checked;

/// A connection to the table. One connection serves one call at a time.
#[derive(Debug)]
pub struct Store {
    raw: *mut CStore,
}

// SAFETY: libtorch guards every connection by a lock of its own.
unsafe impl Send for Store {}
// SAFETY: as above.
unsafe impl Sync for Store {}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: made by the shim, and freed once.
        unsafe { c10d::specforge_store_free(self.raw) }
    }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::Failed(format!("`{text}` holds a zero byte")))
}

pub(super) fn milliseconds(timeout: Duration) -> i64 {
    i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX)
}

impl Store {
    /// Serves a table on a socket that listens already, in this process, and connects to it at `host`.
    pub fn host(host: &str, listener: TcpListener, timeout: Duration) -> Result<Self> {
        let port = listener.local_addr().map_err(|error| Error::Failed(format!("the store's socket: {error}")))?.port();
        let (host, listener) = (c_string(host)?, listener.into_raw_fd());
        let mut raw = std::ptr::null_mut();
        // SAFETY: the socket is handed over; text and place outlive the call.
        checked(|error, size| unsafe {
            c10d::specforge_store_host(host.as_ptr(), port, listener, milliseconds(timeout), &raw mut raw, error, size)
        })?;
        Ok(Self { raw })
    }

    /// Connects to a table that another process serves, trying again until `timeout`. It is also the time that
    /// [`Store::get`] waits for a key.
    pub fn connect(host: &str, port: u16, timeout: Duration) -> Result<Self> {
        let c_host = c_string(host)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: text and place outlive the call.
        checked(|error, size| unsafe {
            c10d::specforge_store_connect(c_host.as_ptr(), port, milliseconds(timeout), &raw mut raw, error, size)
        })
        .map_err(|error| Error::Failed(format!("cannot reach the store at {host}:{port}: {error}")))?;
        Ok(Self { raw })
    }

    /// The same table, with `prefix` before every key.
    pub fn prefixed(&self, prefix: &str) -> Result<Self> {
        let prefix = c_string(prefix)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: a live store; text and place outlive the call.
        checked(|error, size| unsafe {
            c10d::specforge_store_prefixed(self.raw, prefix.as_ptr(), &raw mut raw, error, size)
        })?;
        Ok(Self { raw })
    }

    /// A connection of its own to the same table: a wait on one does not hold up the other.
    pub fn another(&self) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: a live store; the place outlives the call.
        checked(|error, size| unsafe { c10d::specforge_store_clone(self.raw, &raw mut raw, error, size) })?;
        Ok(Self { raw })
    }

    /// Writes a value.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        let key = c_string(key)?;
        // SAFETY: a live store; key and value outlive the call.
        checked(|error, size| unsafe {
            c10d::specforge_store_set(self.raw, key.as_ptr(), value.as_ptr(), value.len(), error, size)
        })
    }

    /// Reads a value, waiting for it up to the store's timeout.
    pub fn get(&self, key: &str) -> Result<Vec<u8>> {
        extern "C" fn receive(context: *mut c_void, value: *const u8, length: usize) {
            // SAFETY: the context is the vector below; the shim passes `length` readable bytes, perhaps none.
            unsafe {
                if length > 0 {
                    (*context.cast::<Vec<u8>>()).extend_from_slice(std::slice::from_raw_parts(value, length));
                }
            }
        }
        let key = c_string(key)?;
        let mut value: Vec<u8> = Vec::new();
        // SAFETY: a live store; the vector outlives the call, which fills it at most once.
        checked(|error, size| unsafe {
            let context = (&raw mut value).cast::<c_void>();
            c10d::specforge_store_get(self.raw, key.as_ptr(), receive, context, error, size)
        })?;
        Ok(value)
    }

    /// Reads a value if it is there, without waiting.
    pub fn try_get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let c_key = c_string(key)?;
        let mut present = false;
        // SAFETY: a live store; key and place outlive the call.
        checked(|error, size| unsafe {
            c10d::specforge_store_check(self.raw, c_key.as_ptr(), &raw mut present, error, size)
        })?;
        if present { self.get(key).map(Some) } else { Ok(None) }
    }

    /// Adds to a number, which starts at 0, and returns the sum.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64> {
        let key = c_string(key)?;
        let mut total = 0;
        // SAFETY: a live store; key and place outlive the call.
        checked(|error, size| unsafe {
            c10d::specforge_store_add(self.raw, key.as_ptr(), amount, &raw mut total, error, size)
        })?;
        Ok(total)
    }

    /// Writes a value unless another process was first; whether this one was. Not to be mixed with [`Store::set`].
    pub fn set_first(&self, key: &str, value: &[u8]) -> Result<bool> {
        let first = self.add(&format!("{key}/claims"), 1)? == 1;
        if first {
            self.set(key, value)?;
        }
        Ok(first)
    }

    pub(super) fn raw(&self) -> *const CStore {
        self.raw
    }
}
