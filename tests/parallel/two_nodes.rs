//! Two nodes: two network namespaces of this machine, joined by a cable of software. Needs root, and says so where it
//! cannot have it.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{assert_same_run, eagle3, launched, workspace};
use crate::fixture::Workspace;
use crate::processes::{PATIENCE, end_of};

/// Two namespaces that see each other at 10.77.0.1 and 10.77.0.2, and nothing else. They vanish with the value.
struct Nodes {
    names: [String; 2],
}

fn ip(arguments: &[&str]) -> bool {
    let status = Command::new("ip").args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

impl Nodes {
    /// Nothing where the machine does not allow it.
    fn new(tag: &str) -> Option<Self> {
        let id = std::process::id();
        let nodes = Self { names: ["a", "b"].map(|node| format!("specforge-{tag}-{id}-{node}")) };
        let [a, b] = &nodes.names;
        let (left, right) = (format!("sf{tag}{id}a"), format!("sf{tag}{id}b"));
        let made = ip(&["netns", "add", a])
            && ip(&["netns", "add", b])
            && ip(&["link", "add", &left, "netns", a, "type", "veth", "peer", "name", &right, "netns", b])
            && ip(&["-n", a, "link", "set", &left, "name", "cable"])
            && ip(&["-n", b, "link", "set", &right, "name", "cable"])
            && nodes.names.iter().zip(["10.77.0.1/24", "10.77.0.2/24"]).all(|(node, address)| {
                ip(&["-n", node, "addr", "add", address, "dev", "cable"])
                    && ip(&["-n", node, "link", "set", "lo", "up"])
                    && ip(&["-n", node, "link", "set", "cable", "up"])
            });
        made.then_some(nodes)
    }

    fn cable(&self, state: &str) {
        assert!(ip(&["-n", &self.names[1], "link", "set", "cable", state]));
    }

    /// Starts `specforge launch` on both nodes.
    fn launch(&self, workspace: &Workspace, out: &str, arguments: &[&str]) -> [Child; 2] {
        [0, 1].map(|node| {
            let rank = node.to_string();
            let launcher = ["--nproc-per-node", "1", "--nnodes", "2", "--node-rank", &rank];
            let master = ["--master-addr", "10.77.0.1", "--master-port", "29517"];
            let inner = launched(workspace, &[&launcher[..], &master].concat(), out, arguments);
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &self.names[node]]).arg(inner.get_program()).args(inner.get_args());
            for (key, value) in inner.get_envs() {
                match value {
                    Some(value) => command.env(key, value),
                    None => command.env_remove(key),
                };
            }
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            command.current_dir(env!("CARGO_TARGET_TMPDIR")).spawn().unwrap()
        })
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for name in &self.names {
            ip(&["netns", "del", name]);
        }
    }
}

/// Exit code, stdout and stderr of both nodes, which must end.
fn ends(nodes: [Child; 2]) -> [(Option<i32>, String, String); 2] {
    nodes.map(|child| {
        let output = end_of(child);
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    })
}

#[test]
fn two_nodes_train_as_one_and_a_cut_cable_costs_nothing_that_was_saved() {
    let Some(nodes) = Nodes::new("t") else {
        println!("SKIPPED: two nodes need `ip netns`, and root: this machine does not allow it");
        return;
    };
    let mut workspace = workspace(eagle3());
    workspace.train("alone", &[]);
    let [first, second] = ends(nodes.launch(&workspace, "run", &[]));
    assert_eq!((first.0, second.0), (Some(0), Some(0)), "{}\n{}", first.2, second.2);
    let report: Value = serde_json::from_str(&first.1).unwrap();
    assert_eq!(report["steps"], 6);
    assert_eq!(second.1, "", "only rank 0 prints results");
    assert_same_run(&workspace, "run", "alone", 6);

    // A long run whose cable is cut: both nodes notice and end, and what was saved is good for the rest.
    workspace.set("train.eval_every", 0);
    workspace.set("train.max_steps", 100_000).set("train.save_every", 10);
    workspace.set("optim.schedule", json!({"kind": "constant", "warmup_steps": 3}));
    let mut running = nodes.launch(&workspace, "cut", &["--set", "parallel.timeout_seconds=4"]);
    let saved = workspace.path("cut/step-00000010");
    let started = Instant::now();
    while !saved.exists() && running.iter_mut().all(|node| node.try_wait().unwrap().is_none()) {
        assert!(started.elapsed() < PATIENCE, "nothing is saved");
        sleep(Duration::from_millis(20));
    }
    nodes.cable("down");
    let cut = Instant::now();
    let [first, second] = ends(running);
    println!("both nodes ended {:?} after the cut", cut.elapsed());
    assert!(first.0 != Some(0) && second.0 != Some(0), "{}\n{}", first.2, second.2);
    for (_, _, message) in [&first, &second] {
        assert!(message.contains("error: "), "{message}");
        assert!(!message.contains("panicked") && !message.contains("internal error"), "{message}");
    }
    nodes.cable("up");
    let newest = fs::read_dir(workspace.path("cut")).unwrap().flatten();
    let newest =
        newest.filter_map(|entry| entry.file_name().to_str()?.strip_prefix("step-")?.parse::<u64>().ok()).max();
    let end = newest.unwrap() + 5;
    let arguments = ["--resume", "--set", &format!("train.max_steps={end}")];
    let [first, second] = ends(nodes.launch(&workspace, "cut", &arguments));
    assert_eq!((first.0, second.0), (Some(0), Some(0)), "{}\n{}", first.2, second.2);
    let length = format!("train.max_steps={end}");
    workspace.train("alone-long", &["--set", &length]);
    let folder = |run: &str| workspace.path(run).join(format!("step-{end:08}"));
    let (parameters, _) = super::differences(&folder("cut"), &folder("alone-long"));
    println!("{end} steps over a cut: parameters within {parameters:e}");
    assert!(parameters <= 1e-4, "{parameters:e}");
}
