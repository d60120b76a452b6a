//! What carries messages, and the loop that drives an edge over it.

use std::time::Duration;

use super::edge::{Edge, State};
use super::protocol::{CloudMessage, EdgeMessage};
use crate::error::Result;

/// What came of waiting.
#[derive(Debug)]
pub enum Received {
    /// A message.
    Message(CloudMessage),
    /// Nothing in time.
    Nothing,
    /// The connection is gone, for this reason.
    Closed(String),
}

/// A way to the cloud: one connection at a time.
pub trait Link {
    /// Connects, anew where there was a connection. Refuses with the reason in words.
    fn connect(&mut self) -> Result<(), String>;
    /// Sends a message on its way; whether it arrives is not known.
    fn send(&mut self, message: EdgeMessage) -> Result<(), String>;
    /// Waits for a message.
    fn receive(&mut self, patience: Duration) -> Received;
    /// Waits.
    fn pause(&mut self, time: Duration);
    /// The time since some beginning.
    fn now(&self) -> Duration;
}

/// How long a driver waits.
#[derive(Debug, Clone, Copy)]
pub struct Waits {
    /// For an answer, before the connection counts as lost.
    pub answer: Duration,
    /// Before the first attempt to connect again; each further one waits twice as long.
    pub first_pause: Duration,
    /// At most between two attempts.
    pub longest_pause: Duration,
}

impl Default for Waits {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(60),
            first_pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(5),
        }
    }
}

impl Waits {
    fn pause(&self, troubles: u32) -> Duration {
        let doubled = self.first_pause.saturating_mul(1 << troubles.saturating_sub(1).min(16));
        doubled.min(self.longest_pause)
    }
}

/// How often somebody who waits looks whether it is still worth it.
const LOOK: Duration = Duration::from_millis(200);

/// Waits for an answer, as long as nobody wants to stop.
fn wait(link: &mut dyn Link, waits: &Waits, stopped: &dyn Fn() -> bool) -> Received {
    let mut left = waits.answer;
    loop {
        let received = link.receive(left.min(LOOK));
        left = left.saturating_sub(LOOK);
        if !matches!(received, Received::Nothing) || left.is_zero() || stopped() {
            return received;
        }
    }
}

/// Runs an edge until its answer has ended. `heard` is told of every new token and may end it with an error; `stopped` is
/// asked between two messages.
pub fn drive(
    edge: &mut Edge<'_>,
    link: &mut dyn Link,
    waits: &Waits,
    stopped: &dyn Fn() -> bool,
    heard: &mut dyn FnMut(&[u32]) -> Result<()>,
) -> Result<()> {
    let mut told = edge.answer().len();
    loop {
        if stopped() {
            if let Some(message) = edge.cancel() {
                // Without it the lease ends the session.
                let _ = link.send(message);
            }
            return Ok(());
        }
        if edge.state() == State::Offline {
            let (troubles, _) = edge.troubles();
            if troubles > 0 {
                link.pause(waits.pause(troubles));
            }
            match link.connect() {
                Ok(()) => edge.connected(),
                Err(why) => {
                    edge.disconnected(&why)?;
                    continue;
                }
            }
        }
        if let (troubles, true) = edge.troubles() {
            link.pause(waits.pause(troubles));
        }
        loop {
            let begun = link.now();
            let Some(message) = edge.next_message()? else { break };
            if matches!(message, EdgeMessage::Draft(_)) {
                edge.drafted(begun, link.now());
            }
            if let Err(why) = link.send(message) {
                edge.disconnected(&why)?;
            }
        }
        match edge.state() {
            State::Done => return Ok(()),
            State::Offline => continue,
            _ => {}
        }
        edge.go_ahead()?;
        match wait(link, waits, stopped) {
            Received::Message(message) => {
                edge.at(link.now());
                edge.received(message)?;
            }
            Received::Nothing if stopped() => {}
            Received::Nothing => edge.disconnected("there was no answer in time")?,
            Received::Closed(why) => edge.disconnected(&why)?,
        }
        let answer = edge.answer();
        if told < answer.len() {
            heard(&answer[told..])?;
            told = answer.len();
        }
    }
}
