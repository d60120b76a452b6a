//! Where this process stands among those of its run, as launchers tell through the environment.
//!
//! torchrun's variables come first (`specforge launch` sets the same ones, so does Kubernetes' training operator), then
//! those that Slurm's `srun` sets for every task of a step. Without either, a process is on its own.

use crate::error::{Error, Result};

/// A process's place in its run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// Number among all processes, from 0.
    pub rank: usize,
    /// How many processes there are.
    pub world_size: usize,
    /// Number among the processes of this machine, from 0.
    pub local_rank: usize,
    /// How many processes this machine has.
    pub local_world_size: usize,
    /// Where the store is.
    pub master_address: String,
    /// Its port.
    pub master_port: u16,
    /// Whether the launcher serves the store; rank 0 does otherwise.
    pub store_is_served: bool,
    /// How often the launcher has started these processes again.
    pub attempt: u64,
}

/// Processes of a run, far more than anybody has: lists are made of their number.
const MOST_PROCESSES: usize = 1 << 20;

/// Ports that a Slurm job's number is mapped to, where none is set: below the range that systems hand out themselves.
const SLURM_PORTS: std::ops::Range<u64> = 20_000..30_000;

impl Placement {
    /// Reads the environment of this process. Nothing where no launcher speaks.
    pub fn from_environment() -> Result<Option<Self>> {
        Self::read(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn read(variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let placement = if variable("RANK").is_some() || variable("WORLD_SIZE").is_some() {
            Self::of_torchrun(variable)?
        } else if variable("SLURM_STEP_ID").is_some() && variable("SLURM_STEP_NUM_TASKS").is_some() {
            // A batch script that calls no srun has neither: it is a process on its own.
            Self::of_slurm(variable)?
        } else {
            return Ok(None);
        };
        let below = |name: &str, value: usize, limit_name: &str, limit: usize| match value < limit {
            true => Ok(()),
            false => Err(Error::Usage(format!("{name} is {value}, expected less than {limit_name}, which is {limit}"))),
        };
        if let Some(size) =
            [placement.world_size, placement.local_world_size].into_iter().find(|&size| size > MOST_PROCESSES)
        {
            return Err(Error::Usage(format!("a run of {size} processes: expected at most {MOST_PROCESSES}")));
        }
        below("RANK", placement.rank, "WORLD_SIZE", placement.world_size)?;
        below("LOCAL_RANK", placement.local_rank, "LOCAL_WORLD_SIZE", placement.local_world_size)?;
        Ok(Some(placement))
    }

    fn of_torchrun(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let needed = |name: &str| {
            variable(name).ok_or_else(|| {
                Error::Usage(format!(
                    "{name} is not set, though RANK or WORLD_SIZE is: expected RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT \
                     together, as torchrun and `specforge launch` set them"
                ))
            })
        };
        let (rank, world_size) = (number("RANK", &needed("RANK")?)?, number("WORLD_SIZE", &needed("WORLD_SIZE")?)?);
        let optional = |name: &str| variable(name).map(|text| number(name, &text)).transpose();
        // Without a word about machines, all processes are taken to be on this one.
        Ok(Self {
            rank,
            world_size,
            local_rank: optional("LOCAL_RANK")?.unwrap_or(rank),
            local_world_size: optional("LOCAL_WORLD_SIZE")?.unwrap_or(world_size),
            master_address: needed("MASTER_ADDR")?,
            master_port: port("MASTER_PORT", &needed("MASTER_PORT")?)?,
            store_is_served: variable("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|text| text == "True"),
            attempt: optional("TORCHELASTIC_RESTART_COUNT")?.unwrap_or(0) as u64,
        })
    }

    fn of_slurm(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let needed = |name: &str| {
            variable(name)
                .ok_or_else(|| Error::Usage(format!("{name} is not set, though this is a step of Slurm's srun")))
        };
        let of = |name: &str| number(name, &needed(name)?);
        let node = of("SLURM_NODEID")?;
        let tasks = needed("SLURM_STEP_TASKS_PER_NODE")?;
        let local_world_size = tasks_of_node(&tasks, node).ok_or_else(|| {
            Error::Usage(format!("SLURM_STEP_TASKS_PER_NODE is `{tasks}`, which says nothing of node {node}"))
        })?;
        let master_address = match variable("MASTER_ADDR") {
            Some(address) => address,
            None => {
                let list = needed("SLURM_STEP_NODELIST")?;
                first_host(&list).ok_or_else(|| {
                    Error::Usage(format!(
                        "SLURM_STEP_NODELIST is `{list}`, whose first host cannot be read; set MASTER_ADDR"
                    ))
                })?
            }
        };
        let master_port = match variable("MASTER_PORT") {
            Some(text) => port("MASTER_PORT", &text)?,
            None => {
                // Steps of one job may run side by side.
                let mixed = (of("SLURM_JOB_ID")? as u64).wrapping_mul(31).wrapping_add(of("SLURM_STEP_ID")? as u64);
                (SLURM_PORTS.start + mixed % (SLURM_PORTS.end - SLURM_PORTS.start)) as u16
            }
        };
        Ok(Self {
            rank: of("SLURM_PROCID")?,
            world_size: of("SLURM_STEP_NUM_TASKS")?,
            local_rank: of("SLURM_LOCALID")?,
            local_world_size,
            master_address,
            master_port,
            store_is_served: false,
            attempt: variable("SLURM_RESTART_COUNT")
                .map(|text| number("SLURM_RESTART_COUNT", &text))
                .transpose()?
                .unwrap_or(0) as u64,
        })
    }
}

fn number(name: &str, text: &str) -> Result<usize> {
    text.parse().map_err(|_| Error::Usage(format!("{name}: expected a number, got `{text}`")))
}

fn port(name: &str, text: &str) -> Result<u16> {
    text.parse().map_err(|_| Error::Usage(format!("{name}: expected a port between 0 and 65535, got `{text}`")))
}

/// Tasks of a node from `2(x3),1`: three nodes of two tasks, one of one.
fn tasks_of_node(tasks: &str, node: usize) -> Option<usize> {
    let mut nodes = 0usize;
    for group in tasks.split(',') {
        let (count, times) = match group.split_once("(x") {
            Some((count, times)) => (count, times.strip_suffix(')')?.parse().ok()?),
            None => (group, 1),
        };
        nodes = nodes.saturating_add(times);
        if node < nodes {
            return count.parse().ok();
        }
    }
    None
}

/// First host of `gpu[003-007,9],login1`: `gpu003`.
fn first_host(list: &str) -> Option<String> {
    let first = |text: &str| text.split([',', '-']).next().filter(|text| !text.is_empty()).map(str::to_owned);
    match list.split_once('[') {
        // A bracket of a later host does not count.
        Some((prefix, rest)) if !prefix.contains(',') => {
            let (numbers, after) = rest.split_once(']')?;
            let suffix = after.split(',').next().unwrap_or_default();
            // A second bracket belongs to the same host: rack[1-2]node[1-4].
            match suffix.contains('[') {
                true => first_host(&format!("{prefix}{}{after}", first(numbers)?)),
                false => Some(format!("{prefix}{}{suffix}", first(numbers)?)),
            }
        }
        _ => list.split(',').next().filter(|host| !host.is_empty()).map(str::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Placement>> {
        Placement::read(&|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    const TORCHRUN: [(&str, &str); 8] = [
        ("RANK", "5"),
        ("WORLD_SIZE", "8"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "4"),
        ("MASTER_ADDR", "10.0.0.1"),
        ("MASTER_PORT", "29500"),
        ("TORCHELASTIC_USE_AGENT_STORE", "True"),
        ("TORCHELASTIC_RESTART_COUNT", "2"),
    ];

    #[test]
    fn torchruns_variables_are_read() {
        let want = Placement {
            rank: 5,
            world_size: 8,
            local_rank: 1,
            local_world_size: 4,
            master_address: "10.0.0.1".to_owned(),
            master_port: 29500,
            store_is_served: true,
            attempt: 2,
        };
        assert_eq!(read(&TORCHRUN).unwrap(), Some(want));
        assert_eq!(read(&[("PATH", "/bin")]).unwrap(), None);
        let least = [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "::1"), ("MASTER_PORT", "1")];
        let least = read(&least).unwrap().unwrap();
        assert_eq!((least.local_rank, least.local_world_size, least.store_is_served, least.attempt), (1, 2, false, 0));
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let with = |name: &str, value: &str| {
            let mut variables = TORCHRUN.to_vec();
            variables.retain(|(known, _)| *known != name);
            if !value.is_empty() {
                variables.push((name, value));
            }
            read(&variables.iter().map(|(name, value)| (*name, *value)).collect::<Vec<_>>()).unwrap_err().to_string()
        };
        assert!(with("WORLD_SIZE", "").starts_with("WORLD_SIZE is not set"));
        assert!(with("RANK", "").starts_with("RANK is not set"));
        assert!(with("MASTER_PORT", "").starts_with("MASTER_PORT is not set"));
        assert_eq!(with("RANK", "x"), "RANK: expected a number, got `x`");
        assert_eq!(with("RANK", "8"), "RANK is 8, expected less than WORLD_SIZE, which is 8");
        assert_eq!(with("LOCAL_RANK", "4"), "LOCAL_RANK is 4, expected less than LOCAL_WORLD_SIZE, which is 4");
        assert_eq!(with("MASTER_PORT", "70000"), "MASTER_PORT: expected a port between 0 and 65535, got `70000`");
    }

    #[test]
    fn a_step_of_slurm_is_read_and_a_batch_script_is_alone() {
        let step = [
            ("SLURM_JOB_ID", "4711"),
            ("SLURM_STEP_ID", "2"),
            ("SLURM_STEP_NUM_TASKS", "5"),
            ("SLURM_STEP_TASKS_PER_NODE", "2(x2),1"),
            ("SLURM_STEP_NODELIST", "gpu[003-004,9]"),
            ("SLURM_PROCID", "4"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_NODEID", "2"),
        ];
        let placement = read(&step).unwrap().unwrap();
        assert_eq!((placement.rank, placement.world_size), (4, 5));
        assert_eq!((placement.local_rank, placement.local_world_size), (0, 1));
        assert_eq!(placement.master_address, "gpu003");
        assert_eq!(u64::from(placement.master_port), 20_000 + (4711 * 31 + 2) % 10_000);
        assert!(!placement.store_is_served);
        let chosen = [&step[..], &[("MASTER_ADDR", "here"), ("MASTER_PORT", "77")]].concat();
        let chosen = read(&chosen).unwrap().unwrap();
        assert_eq!((chosen.master_address.as_str(), chosen.master_port), ("here", 77));
        // What sbatch sets for the script itself.
        assert_eq!(read(&[("SLURM_JOB_ID", "1"), ("SLURM_NTASKS", "4"), ("SLURM_PROCID", "0")]).unwrap(), None);
        assert!(read(&step[..7]).unwrap_err().to_string().starts_with("SLURM_NODEID is not set"));
    }

    #[test]
    fn lists_of_hosts_and_tasks() {
        for (list, host) in [
            ("vm", "vm"),
            ("a,b", "a"),
            ("gpu[003-007,9],x1", "gpu003"),
            ("x1,gpu[1-2]", "x1"),
            ("n[7]-ib", "n7-ib"),
            ("rack[1-2]node[04-05],z", "rack1node04"),
        ] {
            assert_eq!(first_host(list).as_deref(), Some(host), "{list}");
        }
        for broken in ["", "n[", "n[]"] {
            assert_eq!(first_host(broken), None, "{broken}");
        }
        let tasks = |node| tasks_of_node("2(x3),1,4(x2)", node);
        assert_eq!([0, 2, 3, 4, 5, 6].map(tasks), [Some(2), Some(2), Some(1), Some(4), Some(4), None]);
        assert_eq!(tasks_of_node("2(x", 0), None);
    }
}
