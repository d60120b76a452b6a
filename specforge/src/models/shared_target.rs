//! A target that several threads have, and one at a time uses.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::TargetModel;

/// A handle to a target. Another handle is another name for the same weights.
#[derive(Clone)]
pub struct SharedTarget(Arc<Mutex<Box<dyn TargetModel>>>);

/// A target in use; others wait until this is dropped.
pub struct TargetInUse<'a>(MutexGuard<'a, Box<dyn TargetModel>>);

impl SharedTarget {
    /// Waits until nobody uses the target, and does so then.
    pub fn in_use(&self) -> TargetInUse<'_> {
        // A pass that failed half-way has changed nothing: models are immutable.
        TargetInUse(self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Deref for TargetInUse<'_> {
    type Target = dyn TargetModel;

    fn deref(&self) -> &Self::Target {
        &**self.0
    }
}

impl From<Box<dyn TargetModel>> for SharedTarget {
    fn from(target: Box<dyn TargetModel>) -> Self {
        Self(Arc::new(Mutex::new(target)))
    }
}

impl<T: TargetModel + 'static> From<T> for SharedTarget {
    fn from(target: T) -> Self {
        let target: Box<dyn TargetModel> = Box::new(target);
        target.into()
    }
}
