//! Starting the processes of a run, and ending them: `specforge launch`.
//!
//! Every machine has one launcher. It starts copies of this program, tells each its place through the environment as
//! torchrun does, passes on what they print, and ends with the first thing that went wrong. The launcher of machine 0
//! serves the store through which ranks and launchers find each other.
//!
//! - One process fails: all stop within seconds, on every machine.
//! - The launcher dies: so do its processes, by the hand of the kernel.
//! - A signal is handed on once, and the processes may take their time to save.

use std::path::PathBuf;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

mod board;
mod crew;
mod failure;
mod nodes;
mod relay;

use board::{RHYTHM, Rhythm};
use crew::{Crew, Orders};
use failure::Failure;
use nodes::Nodes;

pub use failure::leave;
pub use relay::Sink;

use crate::error::{Error, Result};

/// Between two looks at the processes.
const LOOK: Duration = Duration::from_millis(20);

/// The machines of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machines {
    /// How many there are.
    pub count: usize,
    /// Number of this one, from 0.
    pub own: usize,
    /// Address of machine 0.
    pub address: String,
    /// Port on which machine 0 serves the store; 0 for any, where there is one machine.
    pub port: u16,
}

/// What to start.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Processes on this machine.
    pub processes: usize,
    /// Where they run.
    pub machines: Machines,
    /// How often all processes are started again after a failure.
    pub max_restarts: u64,
    /// Where lines of processes go.
    pub sink: Sink,
    /// Whether rank 0 draws on the terminal itself.
    pub first_rank_draws: bool,
}

impl Launch {
    /// Starts everything and returns when all processes, of all machines, have ended well, or with the first failure.
    /// `signal` is the number of a signal that asks to stop, once there is one. Processes die with the calling thread.
    pub fn run(&self, signal: &AtomicI32) -> Result<()> {
        self.run_with(signal, RHYTHM)
    }

    fn run_with(&self, signal: &AtomicI32, rhythm: Rhythm) -> Result<()> {
        let (processes, max_restarts) = (self.processes, self.max_restarts);
        let nodes = Nodes::join(&self.machines, processes, max_restarts, rhythm, signal, &self.sink)?;
        let mut attempt = 0;
        loop {
            let failure = self.attempt(&nodes, attempt, signal, rhythm);
            let interrupted = signal.load(Ordering::Relaxed) != 0;
            let decision = nodes.settle(attempt, failure, interrupted);
            match decision.failure {
                None => return Ok(()),
                Some(failure) if decision.restart => {
                    attempt += 1;
                    let reason = failure.into_error();
                    self.sink.say(&format!("restart {attempt} of {max_restarts} after: {reason}"));
                }
                Some(failure) => return Err(failure.into_error()),
            }
        }
    }

    /// Runs all processes of this machine once, to their end, and returns the first failure.
    fn attempt(&self, nodes: &Nodes, attempt: u64, signal: &AtomicI32, rhythm: Rhythm) -> Option<Failure> {
        let orders = Orders {
            program: self.program.clone(),
            arguments: self.arguments.clone(),
            first_rank: nodes.first_rank,
            local_world_size: self.processes,
            world_size: nodes.world_size,
            node: self.machines.own,
            nodes: self.machines.count,
            master_address: nodes.master_address.clone(),
            master_port: nodes.master_port,
            attempt,
            max_restarts: self.max_restarts,
            sink: self.sink.clone(),
            first_rank_draws: self.first_rank_draws,
        };
        let own = |error: Error| Failure {
            hint: error.hint(),
            code: error.exit_code(),
            ..Failure::new(format!("the launcher of node {}", self.machines.own), error.to_string())
        };
        let ended = Crew::start(&orders).and_then(|mut crew| {
            watch(&mut crew, nodes, attempt, signal, rhythm.grace)?;
            crew.finish_output();
            Ok(crew.first_failure())
        });
        ended.unwrap_or_else(|error| {
            nodes.note_cause(attempt);
            nodes.stop_all(attempt);
            Some(own(error))
        })
    }
}

/// Watches over processes until all have ended, and sees to it that they do when one has failed, here or elsewhere.
fn watch(crew: &mut Crew, nodes: &Nodes, attempt: u64, signal: &AtomicI32, grace: Duration) -> Result<()> {
    let mut handed_on = false;
    let mut cause_noted = false;
    let mut stopping: Option<Instant> = None;
    while !crew.reap()? {
        let failure = crew.first_failure();
        if !cause_noted && failure.as_ref().is_some_and(|failure| !failure.is_echo) {
            cause_noted = true;
            nodes.note_cause(attempt);
        }
        if stopping.is_none() && (failure.is_some() || nodes.must_stop(attempt)) {
            stopping = Some(Instant::now());
            nodes.stop_all(attempt);
        }
        // They cannot save without the one that failed; those that notice end by themselves and say why.
        if stopping.is_some_and(|since| since.elapsed() > grace) {
            crew.signal(Signal::KILL);
        }
        let number = signal.load(Ordering::Relaxed);
        if let (false, Some(asked)) = (handed_on, Signal::from_named_raw(number)) {
            handed_on = true;
            crew.signal(asked);
        }
        thread::sleep(LOOK);
    }
    if let Some(failure) = crew.first_failure() {
        if !cause_noted && !failure.is_echo {
            nodes.note_cause(attempt);
        }
        nodes.stop_all(attempt);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
