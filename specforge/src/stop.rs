//! The wish to stop, as long work sees it. Whoever hears signals sets it; loops look at it between two pieces of work, and
//! say beforehand what stopping there will mean, so that the person who asked can be told at once.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::progress;

/// What a first signal leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Nobody looks at the wish here and nothing would be lost: the process ends at once, saying this.
    EndNow(&'static str),
    /// The work looks and ends well, which this announces; nothing is said where it is empty.
    Finish(&'static str),
}

/// Whether work was asked to stop, and what happens then.
#[derive(Debug)]
pub struct Stop {
    arrived: Arc<AtomicBool>,
    number: Arc<AtomicI32>,
    answer: Mutex<Answer>,
    is_announced: AtomicBool,
}

impl Default for Stop {
    fn default() -> Self {
        let answer = Mutex::new(Answer::EndNow("stopping: nothing to save"));
        Self { arrived: Arc::default(), number: Arc::default(), answer, is_announced: AtomicBool::new(false) }
    }
}

impl Stop {
    /// Whether a signal arrived.
    pub fn arrived(&self) -> &Arc<AtomicBool> {
        &self.arrived
    }

    /// Its number; 0 while none did.
    pub fn number(&self) -> &Arc<AtomicI32> {
        &self.number
    }

    /// Asks the work to stop, as signal `number` does.
    pub fn ask(&self, number: i32) {
        self.number.store(number, Ordering::Relaxed);
        self.arrived.store(true, Ordering::Relaxed);
    }

    /// The signal that asked to stop; 0 while none did.
    pub fn asked(&self) -> i32 {
        self.number.load(Ordering::Relaxed)
    }

    /// From now on a first signal is answered so.
    pub fn set_answer(&self, answer: Answer) {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = answer;
    }

    /// What a first signal leads to.
    pub fn answer(&self) -> Answer {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what stopping leads to, once however often this is called, and returns it.
    pub fn announce(&self) -> Answer {
        let answer = self.answer();
        let (Answer::EndNow(line) | Answer::Finish(line)) = answer;
        if !line.is_empty() && !self.is_announced.swap(true, Ordering::Relaxed) {
            progress::say(line);
        }
        answer
    }
}
