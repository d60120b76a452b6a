//! The processes of one machine: starting them, watching them end, and never leaving one behind.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getpid, getppid, kill_process_group, set_parent_process_death_signal};
use tempfile::TempDir;

use super::failure::{ERROR_FILE, Failure};
use super::relay::{Relay, Sink};
use crate::error::{Error, Result};

/// Errno of a process that is not there.
const NO_SUCH_PROCESS: i32 = 3;
/// Output that is still on its way when a process has ended.
const LAST_LINES: Duration = Duration::from_secs(2);

/// What the processes of one machine are to run, and where they stand in the run.
#[derive(Debug, Clone)]
pub(super) struct Orders {
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<String>,
    /// Rank of this machine's first process.
    pub(super) first_rank: usize,
    /// Processes of this machine, and of all.
    pub(super) local_world_size: usize,
    pub(super) world_size: usize,
    /// Number of this machine, and how many there are.
    pub(super) node: usize,
    pub(super) nodes: usize,
    pub(super) master_address: String,
    pub(super) master_port: u16,
    pub(super) attempt: u64,
    pub(super) max_restarts: u64,
    pub(super) sink: Sink,
    /// Whether rank 0 draws on the terminal itself.
    pub(super) first_rank_draws: bool,
}

impl Orders {
    /// The variables by which a process finds its place: those of torchrun.
    fn environment(&self, local_rank: usize) -> Vec<(&'static str, String)> {
        let mut variables = vec![
            ("RANK", (self.first_rank + local_rank).to_string()),
            ("LOCAL_RANK", local_rank.to_string()),
            ("GROUP_RANK", self.node.to_string()),
            ("WORLD_SIZE", self.world_size.to_string()),
            ("LOCAL_WORLD_SIZE", self.local_world_size.to_string()),
            ("MASTER_ADDR", self.master_address.clone()),
            ("MASTER_PORT", self.master_port.to_string()),
            ("TORCHELASTIC_USE_AGENT_STORE", "True".to_owned()),
            ("TORCHELASTIC_RESTART_COUNT", self.attempt.to_string()),
            ("TORCHELASTIC_MAX_RESTARTS", self.max_restarts.to_string()),
        ];
        if std::env::var_os("TORCH_CPP_LOG_LEVEL").is_none() {
            // libtorch warns of every address that has no name.
            variables.push(("TORCH_CPP_LOG_LEVEL", "ERROR".to_owned()));
        }
        if std::env::var_os("OMP_NUM_THREADS").is_none() {
            let cores = thread::available_parallelism().map_or(1, usize::from);
            variables.push(("OMP_NUM_THREADS", (cores / self.local_world_size).max(1).to_string()));
        }
        variables
    }

    /// What messages call a process.
    fn name(&self, rank: usize, process: u32) -> String {
        match self.nodes {
            1 => format!("rank {rank} (pid {process})"),
            _ => format!("rank {rank} (pid {process} on node {})", self.node),
        }
    }
}

struct Worker {
    child: Child,
    name: String,
    error_file: PathBuf,
    relays: Vec<Relay>,
    status: Option<ExitStatus>,
    /// Whether it was killed from here, which makes its end no failure of its own.
    killed: bool,
    failure: Option<Failure>,
}

/// The processes. Dropped, it kills what is left of them.
pub(super) struct Crew {
    workers: Vec<Worker>,
    /// Holds the error files.
    folder: TempDir,
}

impl Crew {
    /// Starts all processes. They die with the thread that called this: it must be the one that waits for them.
    pub(super) fn start(orders: &Orders) -> Result<Self> {
        let temporary = std::env::temp_dir();
        let folder = tempfile::Builder::new().prefix("specforge-launch-").tempdir();
        let folder = folder.map_err(Error::io("create a folder in", &temporary))?;
        let mut crew = Self { workers: Vec::new(), folder };
        for local_rank in 0..orders.local_world_size {
            let worker = crew.start_one(orders, local_rank)?;
            crew.workers.push(worker);
        }
        Ok(crew)
    }

    fn start_one(&self, orders: &Orders, local_rank: usize) -> Result<Worker> {
        let rank = orders.first_rank + local_rank;
        let error_file = self.folder.path().join(format!("rank-{rank}.json"));
        let mut command = Command::new(&orders.program);
        command.args(&orders.arguments).envs(orders.environment(local_rank)).env(ERROR_FILE, &error_file);
        command.stdin(Stdio::null());
        // The first rank's results are the run's; nobody else's may get between them.
        command.stdout(if rank == 0 { Stdio::inherit() } else { Stdio::piped() });
        command.stderr(if rank == 0 && orders.first_rank_draws { Stdio::inherit() } else { Stdio::piped() });
        // A signal from the keyboard goes to the launcher alone, which hands it on.
        command.process_group(0);
        let launcher = getpid();
        // SAFETY: two system calls, and nothing that takes memory or a lock.
        unsafe {
            command.pre_exec(move || {
                set_parent_process_death_signal(Some(Signal::KILL))?;
                // The launcher may have died before that.
                match getppid() == Some(launcher) {
                    true => Ok(()),
                    false => Err(std::io::Error::from_raw_os_error(NO_SUCH_PROCESS)),
                }
            });
        }
        let mut child = command.spawn().map_err(Error::io("start", &orders.program))?;
        let prefix = || format!("[rank {rank}] ");
        let mut relays = Vec::new();
        if let Some(stream) = child.stdout.take() {
            relays.push(Relay::start(stream, prefix(), orders.sink.clone()));
        }
        if let Some(stream) = child.stderr.take() {
            relays.push(Relay::start(stream, prefix(), orders.sink.clone()));
        }
        let name = orders.name(rank, child.id());
        Ok(Worker { child, name, error_file, relays, status: None, killed: false, failure: None })
    }

    /// Notes which processes have ended. Whether all have.
    pub(super) fn reap(&mut self) -> Result<bool> {
        for worker in self.workers.iter_mut().filter(|worker| worker.status.is_none()) {
            let status = worker.child.try_wait();
            worker.status = status.map_err(|error| Error::Failed(format!("waiting for {}: {error}", worker.name)))?;
            if let Some(status) = worker.status {
                let failure = Failure::of_process(worker.name.clone(), status, &worker.error_file);
                // What it said before it was killed still counts.
                worker.failure = failure.filter(|_| !worker.killed || worker.error_file.exists());
            }
        }
        Ok(self.workers.iter().all(|worker| worker.status.is_some()))
    }

    /// The first failure so far: the reason for the others.
    pub(super) fn first_failure(&self) -> Option<Failure> {
        let failures = self.workers.iter().filter_map(|worker| worker.failure.as_ref());
        failures.min_by_key(|failure| failure.order()).cloned()
    }

    /// Sends a signal to every process that has not ended.
    pub(super) fn signal(&mut self, signal: Signal) {
        for worker in self.workers.iter_mut().filter(|worker| worker.status.is_none()) {
            worker.killed |= signal == Signal::KILL;
            if let Some(group) = i32::try_from(worker.child.id()).ok().and_then(Pid::from_raw) {
                // It may have ended meanwhile.
                let _ = kill_process_group(group, signal);
            }
        }
    }

    /// Waits until everything that the processes printed has been passed on.
    pub(super) fn finish_output(&self) {
        let deadline = Instant::now() + LAST_LINES;
        self.workers.iter().flat_map(|worker| &worker.relays).for_each(|relay| relay.finish(deadline));
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        for worker in self.workers.iter_mut().filter(|worker| worker.status.is_none()) {
            let _ = worker.child.wait();
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::relay::tests::Page;
    use super::*;

    /// Processes of one machine that run a shell script.
    pub(in super::super) fn orders(script: &str, processes: usize, sink: Sink) -> Orders {
        Orders {
            program: "/bin/sh".into(),
            arguments: vec!["-c".to_owned(), script.to_owned()],
            first_rank: 0,
            local_world_size: processes,
            world_size: processes,
            node: 0,
            nodes: 1,
            master_address: "127.0.0.1".to_owned(),
            master_port: 29_500,
            attempt: 0,
            max_restarts: 0,
            sink,
            first_rank_draws: false,
        }
    }

    fn wait(crew: &mut Crew) {
        let started = Instant::now();
        while !crew.reap().unwrap() {
            assert!(started.elapsed() < Duration::from_secs(20), "the processes hang");
            thread::sleep(Duration::from_millis(5));
        }
        crew.finish_output();
    }

    #[test]
    fn processes_learn_their_place_and_their_lines_say_whose_they_are() {
        let page = Page::default();
        let script = "printf '%s ' $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $GROUP_RANK \
                      $MASTER_ADDR:$MASTER_PORT $TORCHELASTIC_USE_AGENT_STORE $TORCHELASTIC_RESTART_COUNT >&2; \
                      test -n \"$OMP_NUM_THREADS\" && printf end >&2";
        let mut orders = orders(script, 2, page.sink());
        (orders.first_rank, orders.world_size, orders.node, orders.attempt) = (3, 6, 1, 4);
        let mut crew = Crew::start(&orders).unwrap();
        wait(&mut crew);
        assert_eq!(crew.first_failure(), None);
        let text = page.text();
        let mut lines: Vec<&str> = text.lines().collect();
        lines.sort_unstable();
        let want = ["[rank 3] 3/6 0/2 1 127.0.0.1:29500 True 4 end", "[rank 4] 4/6 1/2 1 127.0.0.1:29500 True 4 end"];
        assert_eq!(lines, want);
    }

    #[test]
    fn what_other_ranks_print_as_results_goes_where_progress_goes() {
        let page = Page::default();
        let mut crew = Crew::start(&orders("test $RANK = 0 || echo result of $RANK", 2, page.sink())).unwrap();
        wait(&mut crew);
        assert_eq!(page.text(), "[rank 1] result of 1\n");
    }

    #[test]
    fn cores_are_shared_out() {
        let orders = orders("", 1000, Page::default().sink());
        let variables = orders.environment(0);
        let threads = variables.iter().find(|(name, _)| *name == "OMP_NUM_THREADS").map(|(_, value)| value.as_str());
        match std::env::var_os("OMP_NUM_THREADS") {
            Some(_) => assert_eq!(threads, None),
            None => assert_eq!(threads, Some("1")),
        }
    }

    #[test]
    fn the_first_failure_is_the_one_with_a_reason_of_its_own() {
        let page = Page::default();
        // Rank 0 ends first, but only because rank 1 did.
        let echo = r#"{"message":{"message":"","extraInfo":{"specforge":{"who":"","message":"peer","hint":null,
                       "code":1,"is_echo":true,"milliseconds":5}}}}"#;
        let script = format!(
            "test $RANK = 0 && {{ echo '{echo}' > $TORCHELASTIC_ERROR_FILE; exit 1; }}; sleep 0.3; kill -SEGV $$"
        );
        let mut crew = Crew::start(&orders(&script, 2, page.sink())).unwrap();
        let pid = crew.workers[1].child.id();
        wait(&mut crew);
        let failure = crew.first_failure().unwrap();
        assert_eq!((failure.who, failure.message), (format!("rank 1 (pid {pid})"), "ended by SIGSEGV".to_owned()));
    }

    #[test]
    fn who_was_killed_from_here_has_not_failed() {
        let mut crew = Crew::start(&orders("sleep 60", 2, Page::default().sink())).unwrap();
        crew.signal(Signal::KILL);
        wait(&mut crew);
        assert_eq!(crew.first_failure(), None);
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let mut orders = orders("", 1, Page::default().sink());
        orders.program = "/nowhere/specforge".into();
        let error = Crew::start(&orders).err().unwrap().to_string();
        assert!(error.starts_with("cannot start /nowhere/specforge: No such file"), "{error}");
    }
}
