//! Whole launches of shell scripts: failures, restarts, signals, two machines.

use std::fs;
use std::net::TcpListener;

use super::relay::tests::Page;
use super::*;

const QUICK: Rhythm = Rhythm {
    tick: Duration::from_millis(10),
    silence: Duration::from_secs(10),
    grace: Duration::from_millis(500),
    settle: Duration::from_secs(2),
};

/// No launch of these tests may take longer.
const LIMIT: Duration = Duration::from_secs(20);

fn launch(script: &str, processes: usize, page: &Page) -> Launch {
    Launch {
        program: "/bin/sh".into(),
        arguments: vec!["-c".to_owned(), script.to_owned()],
        processes,
        machines: Machines { count: 1, own: 0, address: "127.0.0.1".to_owned(), port: 0 },
        max_restarts: 0,
        sink: page.sink(),
        first_rank_draws: false,
    }
}

/// Runs on a thread of its own, which must end. The processes die with it.
fn finish(launch: Launch, signal: i32) -> Result<()> {
    let started = Instant::now();
    let running = thread::spawn(move || launch.run_with(&AtomicI32::new(signal), QUICK));
    while !running.is_finished() {
        assert!(started.elapsed() < LIMIT, "the launcher hangs");
        thread::sleep(Duration::from_millis(5));
    }
    running.join().unwrap()
}

/// A shell line that leaves an error as this program does.
fn fails(message: &str, code: u8, is_echo: bool) -> String {
    format!(
        r#"echo '{{"message":{{"message":"","extraInfo":{{"specforge":{{"who":"","message":"{message}","hint":"a hint","code":{code},"is_echo":{is_echo},"milliseconds":'$(date +%s%3N)'}}}}}}}}' > $TORCHELASTIC_ERROR_FILE; exit {code}"#
    )
}

#[test]
fn all_end_well() {
    let page = Page::default();
    finish(launch("echo hello >&2", 3, &page), 0).unwrap();
    let text = page.text();
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["[rank 0] hello", "[rank 1] hello", "[rank 2] hello"]);
}

/// One has a reason, one notices, one hangs.
#[test]
fn one_failure_stops_all_and_is_the_one_that_is_shown() {
    let page = Page::default();
    let script = format!(
        "case $RANK in 0) sleep 0.2; {};; 1) sleep 0.1; {};; *) echo $$ >&2; trap '' TERM; sleep 600;; esac",
        fails("peer is gone", 1, true),
        fails("the disk is full", 7, false),
    );
    let started = Instant::now();
    let error = finish(launch(&script, 3, &page), 0).unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    let text = error.to_string();
    assert!(text.starts_with("rank 1 (pid ") && text.ends_with(") failed: the disk is full"), "{text}");
    assert_eq!((error.hint().as_deref(), error.exit_code()), (Some("a hint"), 7));
    let text = page.text();
    let pid = text.lines().find_map(|line| line.strip_prefix("[rank 2] ")).unwrap();
    assert!(!fs::exists(format!("/proc/{pid}")).unwrap(), "rank 2 runs on");
}

#[test]
fn a_process_that_a_signal_ends_has_failed() {
    let page = Page::default();
    let error = finish(launch("test $RANK = 1 && kill -ABRT $$; sleep 600", 2, &page), 0).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("rank 1 (pid ") && text.ends_with(") failed: ended by SIGABRT"), "{text}");
    assert_eq!(error.exit_code(), 1);
}

#[test]
fn all_processes_are_started_again() {
    let page = Page::default();
    let script = "echo attempt $TORCHELASTIC_RESTART_COUNT >&2; test $TORCHELASTIC_RESTART_COUNT = 2 && exit 0; \
                  test $RANK = 1 && exit 3; sleep 600";
    finish(Launch { max_restarts: 2, ..launch(script, 2, &page) }, 0).unwrap();
    let text = page.text();
    for attempt in 0..3 {
        assert_eq!(text.matches(&format!("] attempt {attempt}\n")).count(), 2, "{text}");
    }
    assert!(text.contains("restart 1 of 2 after: rank 1 (pid "), "{text}");
    assert!(text.contains(") failed: ended with exit code 3 and left no message\n"), "{text}");

    let page = Page::default();
    let error = finish(Launch { max_restarts: 1, ..launch(script, 2, &page) }, 0).unwrap_err();
    assert_eq!(error.exit_code(), 3);
    assert_eq!(page.text().matches("restart").count(), 1);
}

#[test]
fn bad_input_is_not_tried_again() {
    let page = Page::default();
    let error = finish(Launch { max_restarts: 5, ..launch("exit 2", 2, &page) }, 0).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert_eq!(page.text(), "");
}

#[test]
fn a_signal_is_handed_on_once_and_waited_for() {
    let page = Page::default();
    // A loop and not one long sleep: the shell looks at its traps between commands.
    let script = "trap 'echo saving >&2; sleep 1; echo saved >&2; exit 0' TERM; echo ready >&2; \
                  while true; do sleep 0.05; done";
    let launch = launch(script, 2, &page);
    let signal = std::sync::Arc::new(AtomicI32::new(0));
    let asked = std::sync::Arc::clone(&signal);
    let running = thread::spawn(move || launch.run_with(&asked, QUICK));
    let started = Instant::now();
    while page.text().matches("ready").count() < 2 {
        assert!(started.elapsed() < LIMIT, "the processes do not start");
        thread::sleep(Duration::from_millis(5));
    }
    signal.store(signal_hook::consts::SIGTERM, Ordering::Relaxed);
    while !running.is_finished() {
        assert!(started.elapsed() < LIMIT, "the launcher hangs");
        thread::sleep(Duration::from_millis(5));
    }
    running.join().unwrap().unwrap();
    for word in ["saving", "saved"] {
        assert_eq!(page.text().matches(word).count(), 2, "{}", page.text());
    }
}

/// The launchers of two machines, as two threads.
fn two_machines(script: &str, processes: [usize; 2], max_restarts: u64) -> [(Result<()>, String); 2] {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let running = [0, 1].map(|own| {
        let page = Page::default();
        let machines = Machines { count: 2, own, address: "127.0.0.1".to_owned(), port };
        let launch = Launch { machines, max_restarts, ..launch(script, processes[own], &page) };
        (thread::spawn(move || finish(launch, 0)), page)
    });
    running.map(|(launcher, page)| (launcher.join().unwrap(), page.text()))
}

#[test]
fn two_machines_count_their_ranks_together() {
    let [first, second] = two_machines("echo $RANK/$WORLD_SIZE >&2; test $RANK != 0 || sleep 0.5", [1, 2], 0);
    assert_eq!((first.0.is_ok(), second.0.is_ok()), (true, true));
    assert_eq!(first.1, "[rank 0] 0/3\n");
    let mut lines: Vec<&str> = second.1.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["[rank 1] 1/3", "[rank 2] 2/3"]);
}

#[test]
fn two_machines_stop_together_and_show_the_same_failure() {
    let script = format!("case $RANK in 2) {};; *) sleep 600;; esac", fails("no room", 4, false));
    let started = Instant::now();
    let outcomes = two_machines(&script, [2, 1], 0);
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
    for (outcome, _) in &outcomes {
        let error = outcome.as_ref().unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("rank 2 (pid ") && text.ends_with(" on node 1) failed: no room"), "{text}");
        assert_eq!(error.exit_code(), 4);
    }
}

#[test]
fn two_machines_start_again_together() {
    let script = "test $TORCHELASTIC_RESTART_COUNT = 1 && exit 0; test $RANK = 1 && exit 3; sleep 600";
    for (outcome, text) in two_machines(script, [1, 1], 1) {
        outcome.unwrap();
        assert!(text.contains("restart 1 of 1 after: rank 1 (pid "), "{text}");
    }
}
