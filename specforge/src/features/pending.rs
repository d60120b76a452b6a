//! Features that were asked for and are not awaited yet.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use super::FeatureBatch;
use crate::error::{Error, Result};
use crate::streams::{Mark, Stream};

/// Features on their way. Dropped, they are not wanted any more.
pub struct Pending<'a>(State<'a>);

enum State<'a> {
    /// Made by whoever waits.
    Later(Box<dyn FnOnce() -> Result<FeatureBatch> + 'a>),
    /// Made by a thread.
    Begun(Begun),
}

/// What a thread is making.
pub(super) struct Begun {
    /// Where the answer arrives.
    pub(super) answer: Receiver<Result<Made>>,
    /// As long as this is there, somebody wants it.
    pub(super) wanted: Arc<()>,
    /// What the thread is called.
    pub(super) maker: &'static str,
}

/// What a thread made.
pub(super) struct Made {
    pub(super) features: FeatureBatch,
    /// When its device has it.
    pub(super) ready: Option<Mark>,
}

impl Made {
    /// The features, for this thread's stream of the device.
    fn taken(self) -> Result<FeatureBatch> {
        let Self { features, ready } = self;
        if let (Some(ready), Some(first)) = (ready, features.hidden.first())
            && let Some(stream) = Stream::current(first.device())?
        {
            stream.follow(&ready)?;
            features.hidden.iter().try_for_each(|states| stream.uses(states))?;
        }
        Ok(features)
    }
}

impl<'a> Pending<'a> {
    /// Features that `make` gives when they are awaited.
    pub fn later(make: impl FnOnce() -> Result<FeatureBatch> + 'a) -> Self {
        Self(State::Later(Box::new(make)))
    }

    /// Features that a thread makes.
    pub(super) fn begun(begun: Begun) -> Self {
        Self(State::Begun(begun))
    }

    /// Waits for them. Whatever went wrong since they were asked for is reported here, a panic of the thread included.
    pub fn wait(self) -> Result<FeatureBatch> {
        match self.0 {
            State::Later(make) => make(),
            State::Begun(Begun { answer, wanted, maker }) => {
                let answer = answer.recv();
                drop(wanted);
                answer
                    .unwrap_or_else(|_| Err(Error::Failed(format!("the thread `{maker}` is gone"))))
                    .and_then(Made::taken)
            }
        }
    }
}

impl fmt::Debug for Pending<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self.0 {
            State::Later(_) => "Pending(later)",
            State::Begun(_) => "Pending(begun)",
        })
    }
}
