//! `specforge launch`

use std::io::IsTerminal;

use clap::error::ErrorKind;
use clap::{Args, Parser};

use super::{Cli, Command, Output, signals};
use crate::device::{self, CudaState};
use crate::error::{Error, Result};
use crate::launch::{Launch, Machines, Sink};
use crate::stop::{Answer, Stop};

#[derive(Debug, Args)]
pub(super) struct LaunchArgs {
    /// Processes on this machine, or auto: one for each GPU, one without.
    #[arg(long, value_name = "N", value_parser = processes)]
    nproc_per_node: Processes,
    /// Machines of the run. Each runs this command, with a --node-rank of its own.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = positive)]
    nnodes: usize,
    /// Number of this machine, from 0.
    #[arg(long, value_name = "NUMBER")]
    node_rank: Option<usize>,
    /// Address of machine 0, as the others reach it.
    #[arg(long, value_name = "ADDRESS")]
    master_addr: Option<String>,
    /// A free port of machine 0.
    #[arg(long, value_name = "PORT")]
    master_port: Option<u16>,
    /// How often all processes are started again after one has failed.
    #[arg(long, value_name = "TIMES", default_value_t = 0)]
    max_restarts: u64,
    /// What each process runs: `train`, `capture`, `regen` or `eval`, with its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Debug, Clone, Copy)]
enum Processes {
    Auto,
    Number(usize),
}

/// Machines, and processes of a machine, far more than anybody has: lists are made of them.
const MOST: usize = 1 << 16;

fn positive(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| *number > 0);
    match number {
        Some(number) if number > MOST => Err(format!("expected a number from 1 to {MOST}")),
        number => number.ok_or_else(|| "expected a number from 1 on".to_owned()),
    }
}

fn processes(text: &str) -> Result<Processes, String> {
    match text {
        "auto" => Ok(Processes::Auto),
        _ => positive(text).map(Processes::Number).map_err(|problem| format!("{problem}, or auto")),
    }
}

pub(super) fn run(args: &LaunchArgs, stop: &Stop, output: &Output) -> Result<()> {
    // Mistakes are said once, not by every process.
    match Cli::try_parse_from(std::iter::once("specforge").chain(args.command.iter().map(String::as_str))) {
        Ok(Cli { command: Command::Train(_) | Command::Capture(_) | Command::Regen(_) | Command::Eval(_), .. }) => {}
        Ok(_) => {
            let problem = format!(
                "launch: `{}` runs as one process; `train`, `capture`, `regen` and `eval` can be launched",
                args.command[0]
            );
            return Err(Error::Usage(problem));
        }
        Err(help) if matches!(help.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            output.write(&help.to_string());
            return Ok(());
        }
        Err(error) => {
            let text = error.to_string();
            return Err(Error::Usage(text.strip_prefix("error: ").unwrap_or(&text).trim_end().to_owned()));
        }
    }
    let machines = machines(args)?;
    let processes = match args.nproc_per_node {
        Processes::Number(number) => number,
        Processes::Auto => match device::cuda() {
            CudaState::Usable(count) => *count,
            CudaState::Unusable(_) => 1,
        },
    };
    let program = std::env::current_exe()
        .map_err(|error| Error::Failed(format!("cannot find out where this program lies: {error}")))?;
    let mut arguments = args.command.clone();
    if output.json && !arguments.iter().any(|argument| argument == "--json") {
        arguments.push("--json".to_owned());
    }
    let is_terminal = std::io::stderr().is_terminal();
    let launch = Launch {
        program,
        arguments,
        processes,
        machines,
        max_restarts: args.max_restarts,
        sink: Sink::new(Box::new(std::io::stderr()), is_terminal),
        first_rank_draws: is_terminal,
    };
    // The processes are told, and rank 0 says what happens.
    stop.set_answer(Answer::Finish(""));
    match launch.run(stop.number()) {
        // Nothing was to be saved yet, so the signal ended the processes as it ends this one alone.
        Err(Error::Launched { signal: Some(signal), .. }) if signal == stop.asked() => signals::end_by(signal),
        outcome => outcome,
    }
}

fn machines(args: &LaunchArgs) -> Result<Machines> {
    let count = args.nnodes;
    let needed = |name: &str| Error::Usage(format!("{name} is missing: --nnodes {count} needs it on every machine"));
    if count == 1 {
        let own = args.node_rank.unwrap_or(0);
        in_range(own, count)?;
        let address = args.master_addr.clone().unwrap_or_else(|| "127.0.0.1".to_owned());
        return Ok(Machines { count, own, address, port: args.master_port.unwrap_or(0) });
    }
    let own = args.node_rank.ok_or_else(|| needed("--node-rank"))?;
    in_range(own, count)?;
    let address = args.master_addr.clone().ok_or_else(|| needed("--master-addr"))?;
    let port = args.master_port.filter(|port| *port > 0).ok_or_else(|| needed("--master-port"))?;
    Ok(Machines { count, own, address, port })
}

fn in_range(own: usize, count: usize) -> Result<()> {
    match own < count {
        true => Ok(()),
        false => Err(Error::Usage(format!("--node-rank: expected less than --nnodes, which is {count}, got {own}"))),
    }
}
