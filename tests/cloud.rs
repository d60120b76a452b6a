//! `specforge generate --cloud`: edge and cloud as processes of their own, over gRPC on loopback, through a network that is
//! cut, with either of them killed.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::decoding;
use crate::fixture::{Workspace, json_of, output_of, specforge, stderr_of, write_model};

/// A cloud in a process.
struct CloudProcess {
    child: Child,
    address: SocketAddr,
}

impl CloudProcess {
    /// With a certificate and its key, or in the clear.
    fn start(model: &Path, tls: &[&Path]) -> Self {
        let mut command = specforge(&["serve", "--device", "cpu", "--grpc", "127.0.0.1:0", "--target"]);
        command.arg(model);
        for (flag, file) in ["--grpc-cert", "--grpc-key"].iter().zip(tls) {
            command.arg(flag).arg(file);
        }
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut said = Vec::new();
        let address = loop {
            let Some(line) = lines.next() else { panic!("the cloud did not start: {said:?}") };
            said.push(line.unwrap());
            if let Some((_, address)) = said[said.len() - 1].split_once("://") {
                break address.parse().unwrap();
            }
        };
        // What it says later is read as well, so that it never waits for its reader.
        thread::spawn(move || lines.for_each(drop));
        Self { child, address }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for CloudProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn generate(workspace: &Workspace, target: &str, arguments: &[&str]) -> Command {
    let mut command = specforge(&["generate", "--device", "cpu", "--target"]);
    command.arg(workspace.path(target)).args(["--prompt", "the river runs over"]).args(arguments);
    command
}

fn answer(workspace: &Workspace, draft: &str, arguments: &[&str]) -> Value {
    let mut command = generate(workspace, "model", &["--json"]);
    let folder = workspace.path(draft);
    command.arg("--draft").arg(if folder.is_dir() { folder.as_os_str() } else { draft.as_ref() }).args(arguments);
    json_of(&mut command)
}

#[test]
fn every_draft_says_on_the_edge_what_the_target_says() {
    let workspace = decoding::workspace();
    let cloud = CloudProcess::start(&workspace.path("model"), &[]);
    let url = cloud.url();
    for sampling in
        [&["--max-new-tokens", "30"][..], &["--max-new-tokens", "30", "--temperature", "0.9", "--seed", "5"]]
    {
        let mut plain = generate(&workspace, "model", &["--json"]);
        let plain = json_of(plain.args(sampling));
        for (draft, tree, features) in [
            ("prompt-lookup", "depth=3,nodes=6", "bfloat16"),
            ("small", "chain:3", "bfloat16"),
            ("small", "dynamic:depth=3,top_k=3,nodes=9", "bfloat16"),
            ("medusa-files", "chain:2", "float32"),
            ("eagle3-files", "dynamic:depth=3,top_k=3,nodes=9", "int8"),
            ("eagle3", "chain:3", "bfloat16"),
        ] {
            let edge = ["--cloud", &url, "--tree", tree, "--cloud-features", features];
            let got = answer(&workspace, draft, &[sampling, &edge].concat());
            assert_eq!(got["token_ids"], plain["token_ids"], "{draft}, {tree}, {sampling:?}");
            assert_eq!((&got["text"], &got["finish"]), (&plain["text"], &plain["finish"]));
            let summary = &got["summary"];
            assert_eq!((&summary["lossless"], &summary["sessions_opened"]), (&json!(true), &json!(1)));
            assert!(summary["rounds"].as_u64().unwrap() > 0);
        }
    }
    // A draft that reads the same features guesses as it does beside its target.
    let local = answer(&workspace, "eagle3", &["--tree", "chain:3", "--max-new-tokens", "30"]);
    let far = ["--tree", "chain:3", "--max-new-tokens", "30", "--cloud", &url, "--cloud-features", "float32"];
    let all = answer(&workspace, "eagle3", &[&far[..], &["--all-guesses"]].concat());
    assert_eq!(all["summary"]["rounds"], local["summary"]["rounds"]);
    // What a lossy gate lets pass depends on the guesses.
    let gate = ["--policy", "rank:8", "--all-guesses"];
    let (here, there) = (
        answer(&workspace, "eagle3", &[&far[..4], &gate[..2]].concat()),
        answer(&workspace, "eagle3", &[&far[..], &gate].concat()),
    );
    assert_eq!((&here["token_ids"], &there["summary"]["lossless"]), (&there["token_ids"], &json!(false)));
    assert!(there["unverified"].as_array().is_some_and(|places| !places.is_empty()), "{there}");
    // An edge has tokenizer and tables of the target, and no layer of it.
    let written = json_of(
        specforge(&["import", "--json", "--tables"])
            .arg(workspace.path("model"))
            .arg("--out")
            .arg(workspace.path("tables")),
    );
    assert!(written["tensors"].as_array().is_some_and(|names| (1..=2).contains(&names.len())), "{written}");
    let mut bare = generate(&workspace, "tables", &["--json", "--draft"]);
    assert_eq!(json_of(bare.arg(workspace.path("eagle3")).args(far))["token_ids"], all["token_ids"]);
    let mut here = generate(&workspace, "tables", &[]);
    assert!(stderr_of(&output_of(&mut here)).contains("missing"));
    evaluation(&workspace, &url);
    talk(&workspace, &url);
}

/// Questions over the network, each answer as without guesses; what needs the target here is refused.
fn evaluation(workspace: &Workspace, url: &str) {
    let questions = workspace.path("questions.jsonl");
    let lines = [json!({"turns": ["the river", "and then"]}), json!({"prompt": "who sings"})];
    fs::write(&questions, lines.map(|line| line.to_string()).join("\n")).unwrap();
    let eval = |arguments: &[&str]| {
        let mut command = specforge(&["eval", "--device", "cpu", "--max-new-tokens", "10", "--target"]);
        command.arg(workspace.path("model")).args(["--draft"]).arg(workspace.path("eagle3")).arg("--data");
        command.arg(&questions).args(["--cloud", url]).args(arguments);
        command
    };
    let report = json_of(&mut eval(&["--json"]));
    assert_eq!((&report["answers"], &report["faults"]), (&json!(3), &json!(0)));
    assert_eq!(report["draft"]["tokens"], report["without"]["tokens"]);
    assert!(report["draft"]["acceptance_length"].as_f64().unwrap() >= 1.0 && report["without"]["guesses"] == 0.0);
    assert_eq!(report["texts"].as_array().unwrap().len(), 3);
    let wrong = output_of(&mut eval(&["--batch", "2"]));
    assert!(!wrong.status.success() && stderr_of(&wrong).contains("--batch: it needs the target"), "{wrong:?}");
}

/// Two turns of one talk: the draft goes from one answer to the next.
fn talk(workspace: &Workspace, url: &str) {
    let run = |arguments: &[&str]| {
        let mut command = specforge(&["generate", "--device", "cpu", "--chat", "--max-new-tokens", "12", "--target"]);
        command.arg(workspace.path("model")).arg("--draft").arg(workspace.path("small")).args(arguments);
        let mut child = command.stdin(std::process::Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"who is there\nand now\n").unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", stderr_of(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let far = run(&["--cloud", url]);
    assert!(far.lines().count() >= 2);
    assert_eq!(far, run(&[]));
}

/// A line between edge and cloud that is slow, and can be cut and led elsewhere.
#[derive(Clone)]
struct Line {
    address: SocketAddr,
    upstream: Arc<Mutex<SocketAddr>>,
    ends: Arc<Mutex<Vec<TcpStream>>>,
}

impl Line {
    fn to(cloud: SocketAddr, delay: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let line = Self { address, upstream: Arc::new(Mutex::new(cloud)), ends: Arc::default() };
        let own = line.clone();
        thread::spawn(move || {
            for near in listener.incoming() {
                let Ok(near) = near else { return };
                let upstream = *own.upstream.lock().unwrap();
                let Ok(far) = TcpStream::connect(upstream) else { continue };
                let both = [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)];
                for (mut from, mut to) in both {
                    to.set_nodelay(true).unwrap();
                    own.ends.lock().unwrap().push(from.try_clone().unwrap());
                    thread::spawn(move || {
                        let mut piece = [0; 65536];
                        while let Ok(count @ 1..) = from.read(&mut piece) {
                            thread::sleep(delay);
                            if to.write_all(&piece[..count]).is_err() {
                                break;
                            }
                        }
                        let _ = to.shutdown(Shutdown::Both);
                    });
                }
            }
        });
        line
    }

    fn cut(&self) {
        for end in self.ends.lock().unwrap().drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

/// An edge on its way, and the text it has said.
fn started(workspace: &Workspace, line: &Line, seed: &str) -> (Child, Arc<Mutex<Vec<u8>>>, thread::JoinHandle<()>) {
    let mut command = generate(workspace, "model", &["--max-new-tokens", "150", "--temperature", "1", "--seed", seed]);
    command.arg("--draft").arg(workspace.path("small")).args(["--cloud", &format!("http://{}", line.address)]);
    let mut child = command.spawn().unwrap();
    let (said, mut stdout) = (Arc::new(Mutex::new(Vec::new())), child.stdout.take().unwrap());
    let own = Arc::clone(&said);
    let reader = thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(count @ 1..) = stdout.read(&mut piece) {
            own.lock().unwrap().extend(&piece[..count]);
        }
    });
    (child, said, reader)
}

fn wait_for(said: &Mutex<Vec<u8>>, bytes: usize) {
    let start = Instant::now();
    while said.lock().unwrap().len() < bytes {
        assert!(start.elapsed() < Duration::from_secs(60), "the edge says nothing");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn cut_lines_and_killed_processes_change_no_answer() {
    let workspace = Workspace::new();
    write_model(&workspace.path("small"), &json!({"num_hidden_layers": 1}));
    // The first seed whose answer is long.
    let plain = |seed: &str| {
        let sampling = ["--max-new-tokens", "150", "--temperature", "1", "--seed", seed];
        output_of(&mut generate(&workspace, "model", &sampling))
    };
    let (seed, plain) = (0..20u32)
        .map(|seed| (seed.to_string(), plain(&seed.to_string())))
        .find(|(_, plain)| plain.stdout.len() > 200)
        .unwrap();
    let length = plain.stdout.len();
    let mut cloud = CloudProcess::start(&workspace.path("model"), &[]);
    let line = Line::to(cloud.address, Duration::from_millis(8));

    // The line is cut twice, and the cloud killed and started anew once.
    let (mut edge, said, reader) = started(&workspace, &line, &seed);
    for part in 1..=3 {
        wait_for(&said, part * length / 5);
        if part == 2 {
            cloud = CloudProcess::start(&workspace.path("model"), &[]);
            *line.upstream.lock().unwrap() = cloud.address;
        }
        line.cut();
    }
    let status = edge.wait().unwrap();
    reader.join().unwrap();
    let mut stderr = String::new();
    edge.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert!(status.success(), "{stderr}");
    assert!(stderr.contains("lossless"), "{stderr}");
    assert_eq!(String::from_utf8_lossy(&said.lock().unwrap()), String::from_utf8_lossy(&plain.stdout));

    // The edge is killed in the middle: the next one has the same answer from the same cloud.
    let (mut edge, said, reader) = started(&workspace, &line, &seed);
    wait_for(&said, length / 4);
    edge.kill().unwrap();
    edge.wait().unwrap();
    reader.join().unwrap();
    assert!(plain.stdout.starts_with(&said.lock().unwrap()));
    let (mut edge, said, reader) = started(&workspace, &line, &seed);
    assert!(edge.wait().unwrap().success());
    reader.join().unwrap();
    assert_eq!(*said.lock().unwrap(), plain.stdout);
    drop(cloud);
}

#[test]
fn what_cannot_work_is_said_at_once() {
    let workspace = Workspace::new();
    let cloud = CloudProcess::start(&workspace.path("model"), &[]);
    let url = cloud.url();
    let refused = |target: &str, arguments: &[&str]| {
        let output = output_of(&mut generate(&workspace, target, arguments));
        assert!(!output.status.success() && output.stdout.is_empty());
        stderr_of(&output)
    };
    // The same sizes, and two tokens that have changed places.
    write_model(&workspace.path("other"), &json!({}));
    let path = workspace.path("other").join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let names: Vec<String> = vocabulary.keys().filter(|name| name.len() == 1).take(2).cloned().collect();
    let ids = [vocabulary[&names[0]].clone(), vocabulary[&names[1]].clone()];
    vocabulary[&names[0]] = ids[1].clone();
    vocabulary[&names[1]] = ids[0].clone();
    fs::write(&path, tokenizer.to_string()).unwrap();
    let lookup = ["--draft", "prompt-lookup", "--cloud", &url];
    assert!(refused("other", &lookup).contains("another tokenizer"));
    let maximal = [&lookup[..], &["--policy", "maximal", "--temperature", "1"]].concat();
    assert!(refused("model", &maximal).contains("`keyed` is lossless"));
    let trace = workspace.path("trace");
    let traced = [&lookup[..], &["--trace", trace.to_str().unwrap()]].concat();
    assert!(refused("model", &traced).contains("--trace") && !trace.exists());
    assert!(refused("model", &["--draft", "prompt-lookup", "--cloud", "http://10.1.2.3:4"]).contains("in the clear"));
    assert!(refused("model", &["--draft", "prompt-lookup", "--cloud", "127.0.0.1:4"]).contains("expected https"));
    assert!(refused("model", &["--no-guessing-ahead"]).contains("--cloud"));
}

#[test]
fn certificates_are_checked() {
    let workspace = Workspace::new();
    let write = |name: &str, text: String| {
        fs::write(workspace.path(name), text).unwrap();
        workspace.path(name)
    };
    let authority = |name: &str| {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = parameters.self_signed(&key).unwrap();
        let path = write(name, certificate.pem());
        (path, rcgen::Issuer::new(parameters, key))
    };
    let ((own, issuer), (other, _)) = (authority("own.pem"), authority("other.pem"));
    let key = rcgen::KeyPair::generate().unwrap();
    let parameters = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let certificate = write("cloud.pem", parameters.signed_by(&key, &issuer).unwrap().pem());
    let key = write("cloud.key", key.serialize_pem());
    let cloud = CloudProcess::start(&workspace.path("model"), &[&certificate, &key]);
    let url = format!("https://localhost:{}", cloud.address.port());
    let tokens = ["--draft", "prompt-lookup", "--json", "--max-new-tokens", "8"];
    let edge = |authority: &Path| {
        let mut command = generate(&workspace, "model", &tokens);
        command.args(["--cloud", &url, "--cloud-ca"]).arg(authority);
        output_of(&mut command)
    };
    let good = edge(&own);
    assert!(good.status.success(), "{}", stderr_of(&good));
    let got: Value = serde_json::from_slice(&good.stdout).unwrap();
    assert_eq!(got["token_ids"], json_of(&mut generate(&workspace, "model", &tokens))["token_ids"]);
    let bad = edge(&other);
    let said = stderr_of(&bad);
    assert!(!bad.status.success() && said.contains("attempts"), "{said}");
    let missing = edge(&workspace.path("nothing.pem"));
    assert!(stderr_of(&missing).contains("nothing.pem"));
}
