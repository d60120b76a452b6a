//! Models and data from a hub on this machine, which behaves well or badly.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use super::fixture::{self, Workspace, conversations, json_of, output_of, stderr_of, write_model};
use super::processes::end_of;

mod server;

use server::{Fault, Repo, Server, etag};

const NAME: &str = "models/org/tiny";

/// A hub with the model `org/tiny`, and an empty cache.
struct Hub {
    server: Server,
    folder: TempDir,
    repo: Repo,
}

impl Hub {
    fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let model = folder.path().join("model");
        write_model(&model, &serde_json::json!({}));
        for name in ["README.md", "pytorch_model.bin", "onnx/model.onnx", "model.q8.gguf"] {
            let path = model.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("nobody needs {name}")).unwrap();
        }
        fs::write(folder.path().join("data.jsonl"), conversations(8)).unwrap();
        let server = Server::new();
        let repo = Repo::of_folder(&model, 'a');
        server.put(NAME, repo.clone());
        Self { server, folder, repo }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn cache(&self) -> PathBuf {
        self.path("home/hub")
    }

    /// Files of the model in the cache.
    fn model(&self) -> PathBuf {
        self.cache().join("models--org--tiny")
    }

    fn snapshot(&self) -> PathBuf {
        self.model().join("snapshots").join(&self.repo.commit)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = fixture::specforge(arguments);
        command
            .current_dir(self.folder.path())
            .env("HF_HOME", self.path("home"))
            .env("HF_ENDPOINT", self.server.endpoint())
            .env("HF_HUB_OFFLINE", "0")
            .env("NO_PROXY", "127.0.0.1");
        for name in
            ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_DOWNLOAD_TIMEOUT"]
        {
            command.env_remove(name);
        }
        command
    }

    /// A command that needs configuration and tokenizer.
    fn inspect(&self, target: &str) -> Command {
        self.command(&["inspect", "--json", "--target", target, "--data", "data.jsonl", "--show", "0"])
    }

    /// A command that needs the weights, too.
    fn generate(&self, target: &str) -> Command {
        let arguments = ["generate", "--json", "--target", target, "--prompt", "the river", "--max-new-tokens", "2"];
        self.command(&[&arguments[..], &["--device", "cpu"]].concat())
    }

    fn refusal(&self, command: &mut Command) -> String {
        let output = output_of(command);
        assert!(!output.status.success(), "{}", stderr_of(&output));
        stderr_of(&output)
    }

    /// Requests for the content of a file, as method, range and whether elsewhere.
    fn asked_for(&self, file: &str) -> Vec<(String, Option<String>, bool)> {
        let requests = self.server.take_requests();
        let of_file = requests.into_iter().filter(|request| request.path.ends_with(file) && request.method == "GET");
        of_file.map(|request| (request.method, request.headers.get("range").cloned(), request.elsewhere)).collect()
    }

    /// The cached file of this name is that of the hub, by way of a relative link.
    fn assert_whole(&self, file: &str) {
        let (path, content) = (self.snapshot().join(file), &self.repo.files[file]);
        assert!(fs::read(&path).unwrap() == *content, "{file} has another content");
        let blob = etag(content, file.ends_with(".safetensors"));
        assert_eq!(fs::read_link(&path).unwrap(), Path::new("../../blobs").join(blob));
    }

    /// No content that is not whole, and none that is wrong.
    fn assert_clean(&self) {
        for (path, content) in fixture::contents(&self.model().join("blobs")) {
            let name = path.to_string_lossy().into_owned();
            assert!(
                [true, false].iter().any(|&large| etag(&content, large) == name),
                "{name} is not what it is called"
            );
        }
    }
}

#[test]
fn only_what_is_needed_comes_once_and_lies_where_others_look_for_it() {
    let hub = Hub::new();
    json_of(&mut hub.inspect("org/tiny"));
    let names = || {
        let mut names: Vec<String> = fs::read_dir(hub.snapshot())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(), ["config.json", "tokenizer.json", "tokenizer_config.json"]);
    let answer = json_of(&mut hub.generate("org/tiny"));
    assert_eq!(names(), ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]);
    names().iter().for_each(|file| hub.assert_whole(file));
    assert_eq!(fs::read_to_string(hub.model().join("refs/main")).unwrap(), hub.repo.commit);
    assert_eq!(answer["summary"]["settings"]["target"], format!("org/tiny@{}", hub.repo.commit));
    // The same as from the folder.
    let local = json_of(&mut hub.generate("./model"));
    assert_eq!(answer["token_ids"], local["token_ids"]);
    // Now everything is there: the hub is asked what the name means, and nothing else.
    hub.server.take_requests();
    json_of(&mut hub.generate("org/tiny"));
    let requests = hub.server.take_requests();
    assert!(requests.len() == 1 && requests[0].path.starts_with("/api/models/org/tiny/revision/main"), "{requests:?}");
    // Nobody is asked where nobody may be, nor where the hub is gone.
    let offline = json_of(hub.generate("org/tiny").env("HF_HUB_OFFLINE", "1"));
    assert_eq!(offline["token_ids"], local["token_ids"]);
    assert!(hub.server.take_requests().is_empty());
    let output = output_of(hub.generate("org/tiny").env("HF_ENDPOINT", "http://127.0.0.1:9"));
    let said = stderr_of(&output);
    assert!(output.status.success() && said.contains("using what the cache holds of org/tiny@aaaa"), "{said}");
}

#[test]
fn a_revision_means_its_commit_and_a_local_folder_goes_first() {
    let hub = Hub::new();
    json_of(&mut hub.inspect("org/tiny@v1"));
    assert_eq!(fs::read_to_string(hub.model().join("refs/v1")).unwrap(), hub.repo.commit);
    assert!(!hub.model().join("refs/main").exists());
    json_of(&mut hub.inspect(&format!("org/tiny@{}", hub.repo.commit)));
    json_of(&mut hub.inspect("hf://org/tiny@refs/pr/1"));
    assert_eq!(fs::read_to_string(hub.model().join("refs/refs/pr/1")).unwrap(), hub.repo.commit);
    let error = hub.refusal(&mut hub.inspect("org/tiny@v2"));
    assert!(
        error.contains("org/tiny@v2: has no revision `v2`") && error.contains("hint: look at the branches"),
        "{error}"
    );
    // A folder called like the organisation is one of the user's.
    hub.server.take_requests();
    write_model(&hub.path("org/tiny"), &serde_json::json!({}));
    json_of(&mut hub.inspect("org/tiny"));
    let error = hub.refusal(&mut hub.inspect("org/other"));
    assert!(error.contains("org/other"), "{error}");
    assert!(hub.server.take_requests().is_empty());
    json_of(&mut hub.inspect("hf://org/tiny"));
    assert_eq!(hub.server.take_requests().len(), 1);
}

#[test]
fn a_connection_that_breaks_goes_on_where_it_broke() {
    let hub = Hub::new();
    let length = hub.repo.files["model.safetensors"].len();
    for at in [length / 3, 10] {
        hub.server.fail("GET model.safetensors", Fault::Drop(at));
    }
    let output = output_of(&mut hub.generate("org/tiny"));
    assert!(output.status.success(), "{}", stderr_of(&output));
    assert!(stderr_of(&output).contains("trying again"), "{}", stderr_of(&output));
    hub.assert_whole("model.safetensors");
    let ranges: Vec<_> = hub.asked_for("model.safetensors").into_iter().filter(|(.., elsewhere)| *elsewhere).collect();
    let range = |from: usize| Some(format!("bytes={from}-"));
    let ranges: Vec<_> = ranges.into_iter().map(|(_, range, _)| range).collect();
    assert_eq!(ranges, [None, range(length / 3), range(length / 3 + 10)]);
    hub.assert_clean();
}

#[test]
fn what_a_killed_process_left_is_gone_on_from_and_rubbish_is_not() {
    let hub = Hub::new();
    json_of(&mut hub.inspect("org/tiny"));
    let content = &hub.repo.files["model.safetensors"];
    let part = hub.model().join("blobs").join(etag(content, true) + ".incomplete");
    fs::write(&part, &content[..1000]).unwrap();
    json_of(&mut hub.generate("org/tiny"));
    let asked = hub.asked_for("model.safetensors");
    assert!(asked.iter().all(|(_, range, _)| range.as_deref() == Some("bytes=1000-")), "{asked:?}");
    hub.assert_whole("model.safetensors");
    // A part of something else: it is found out at the end, and everything comes once more.
    for rubbish in [vec![7; 1000], vec![7; content.len()], vec![7; content.len() + 1]] {
        fs::remove_file(hub.model().join("blobs").join(etag(content, true))).unwrap();
        fs::write(&part, rubbish).unwrap();
        json_of(&mut hub.generate("org/tiny"));
        hub.assert_whole("model.safetensors");
    }
    // A server that knows no ranges sends everything.
    fs::remove_file(hub.model().join("blobs").join(etag(content, true))).unwrap();
    fs::write(&part, &content[..1000]).unwrap();
    hub.server.fail("GET model.safetensors", Fault::Whole);
    json_of(&mut hub.generate("org/tiny"));
    hub.assert_whole("model.safetensors");
    hub.assert_clean();
}

#[test]
fn wrong_content_is_refused_and_nothing_of_it_is_kept() {
    let hub = Hub::new();
    for (file, fault, words) in [
        ("model.safetensors", Fault::Flip, "`model.safetensors` has a wrong hash: expected"),
        ("tokenizer.json", Fault::Flip, "`tokenizer.json` has a wrong hash: expected"),
        ("model.safetensors", Fault::Longer(3), "`model.safetensors` has a wrong length:"),
        ("config.json", Fault::Longer(1), "`config.json` has a wrong length:"),
    ] {
        hub.server.fail(&format!("GET {file}"), fault);
        let error = hub.refusal(&mut hub.generate("org/tiny"));
        assert!(error.contains(words) && error.contains("hint: nothing of it was kept"), "{error}");
        assert!(!hub.snapshot().join(file).exists() && !hub.model().join("refs/main").exists());
        hub.assert_clean();
        let _ = fs::remove_dir_all(hub.model());
    }
    json_of(&mut hub.generate("org/tiny"));
}

#[test]
fn who_may_not_is_told_what_to_do() {
    let hub = Hub::new();
    let gated: &[_] = &[("X-Error-Code", "GatedRepo"), ("X-Error-Message", "Access to model org/tiny is restricted.")];
    for (fault, words, hint) in [
        (Fault::Status(401, &[]), "HTTP 401: there is no such repository, or it is not public", "HF_TOKEN"),
        (
            Fault::Status(403, gated),
            "HTTP 403: access has to be granted: Access to model org/tiny is restricted.",
            "HF_TOKEN",
        ),
        (Fault::Status(403, &[]), "HTTP 403: reading it is not allowed", "HF_TOKEN"),
        (Fault::Status(404, &[]), "HTTP 404: there is no such repository", "./FOLDER"),
    ] {
        hub.server.fail("GET revision/main", fault);
        let error = hub.refusal(&mut hub.inspect("org/tiny"));
        assert!(error.contains(&format!("error: org/tiny: {words}")), "{error}");
        assert!(error.lines().any(|line| line.starts_with("hint:") && line.contains(hint)), "{error}");
    }
    let error = hub.refusal(&mut hub.inspect("org/absent"));
    assert!(error.contains("org/absent: HTTP 404: there is no such repository"), "{error}");
    // With a token; it is for the hub alone.
    hub.server.demand_token("hf_right");
    let error = hub.refusal(hub.inspect("org/tiny").env("HF_TOKEN", "hf_wrong"));
    assert!(error.contains("HTTP 401: the token was refused") && !error.contains("hf_wrong"), "{error}");
    hub.server.take_requests();
    json_of(hub.generate("org/tiny").env("HF_TOKEN", "hf_right"));
    let requests = hub.server.take_requests();
    let (there, here): (Vec<_>, Vec<_>) = requests.iter().partition(|request| request.elsewhere);
    assert!(!there.is_empty() && there.iter().all(|request| !request.headers.contains_key("authorization")));
    assert!(here.iter().all(|request| request.headers["authorization"] == "Bearer hf_right"));
    // As `hf auth login` leaves it.
    fs::write(hub.path("home/token"), "hf_right\n").unwrap();
    json_of(&mut hub.inspect("org/tiny"));
}

#[test]
fn a_busy_server_is_left_alone_as_long_as_it_asks() {
    let hub = Hub::new();
    hub.server.fail("GET revision/main", Fault::Status(429, &[("Retry-After", "1")]));
    hub.server.fail("HEAD config.json", Fault::Status(429, &[("RateLimit", "\"api\";r=0;t=0")]));
    hub.server.fail("GET tokenizer.json", Fault::Status(429, &[]));
    let output = output_of(&mut hub.inspect("org/tiny"));
    let said = stderr_of(&output);
    assert!(output.status.success() && said.contains("asked to wait 1 s; trying again in 1.0 s"), "{said}");
    // Nobody waits for a day.
    hub.server.fail("GET revision/v1", Fault::Status(429, &[("Retry-After", "86400")]));
    let error = hub.refusal(&mut hub.inspect("org/tiny@v1"));
    assert!(
        error.contains("too many requests; asked to wait 86400 s") && error.contains("hint: try again later"),
        "{error}"
    );
}

#[test]
fn a_broken_server_is_tried_again_and_given_up() {
    let hub = Hub::new();
    hub.server.fail("GET revision/main", Fault::Status(500, &[]));
    hub.server.fail("HEAD config.json", Fault::Status(502, &[]));
    hub.server.fail("GET config.json", Fault::Status(503, &[]));
    json_of(&mut hub.inspect("org/tiny"));
    for _ in 0..5 {
        hub.server.fail("GET revision/v1", Fault::Status(503, &[]));
    }
    let error = hub.refusal(&mut hub.inspect("org/tiny@v1"));
    assert!(error.contains("error: org/tiny@v1: HTTP 503: the hub has a fault of its own"), "{error}");
    assert_eq!(error.matches("trying again").count(), 4, "{error}");
}

#[test]
fn a_slow_server_is_waited_for_and_a_silent_one_is_not() {
    let hub = Hub::new();
    let length = hub.repo.files["model.safetensors"].len();
    hub.server.fail("GET model.safetensors", Fault::Slow(length / 20 + 1, Duration::from_millis(100)));
    json_of(hub.generate("org/tiny").env("HF_HUB_DOWNLOAD_TIMEOUT", "60"));
    hub.assert_whole("model.safetensors");
    fs::remove_dir_all(hub.model()).unwrap();
    hub.server.take_requests();
    hub.server.fail("GET model.safetensors", Fault::Stall(500));
    json_of(hub.generate("org/tiny").env("HF_HUB_DOWNLOAD_TIMEOUT", "1"));
    hub.assert_whole("model.safetensors");
    let asked = hub.asked_for("model.safetensors");
    assert!(asked.iter().any(|(_, range, _)| range.as_deref() == Some("bytes=500-")), "{asked:?}");
}

#[test]
fn without_a_network_it_is_said_what_is_missing_and_where() {
    let hub = Hub::new();
    let offline = |target: &str| hub.refusal(hub.generate(target).env("HF_HUB_OFFLINE", "1"));
    let error = offline("org/tiny");
    let place = hub.model().join("refs/main");
    let words = format!(
        "org/tiny: HF_HUB_OFFLINE is set, and the cache does not know revision `main`: looked for {}",
        place.display()
    );
    assert!(error.contains(&words) && error.contains("hint: fetch it where there is a network"), "{error}");
    json_of(&mut hub.inspect("org/tiny"));
    let error = offline("org/tiny");
    assert!(
        error.contains("holds no weights as safetensors") && error.contains(hub.snapshot().to_str().unwrap()),
        "{error}"
    );
    json_of(hub.inspect("org/tiny").env("HF_HUB_OFFLINE", "1"));
}

#[test]
fn shards_are_those_that_the_index_names() {
    let hub = Hub::new();
    let mut repo = hub.repo.clone();
    let whole = repo.files.remove("model.safetensors").unwrap();
    let shard = "model-00001-of-00001.safetensors";
    let names = fixture::tensors_of(&hub.path("model")).into_iter().map(|(name, _)| (name, Value::from(shard)));
    let index = serde_json::json!({"metadata": {}, "weight_map": names.collect::<serde_json::Map<_, _>>()});
    repo.files.insert("model.safetensors.index.json".to_owned(), index.to_string().into_bytes());
    repo.files.insert(shard.to_owned(), whole.clone());
    repo.files.insert("model-00002-of-00002.safetensors".to_owned(), b"of another time".to_vec());
    hub.server.put(NAME, repo);
    json_of(&mut hub.generate("org/tiny"));
    assert!(fs::read(hub.snapshot().join(shard)).unwrap() == whole);
    assert!(!hub.snapshot().join("model-00002-of-00002.safetensors").exists());
    // A shard that is gone is missed, and comes again.
    fs::remove_file(hub.model().join("blobs").join(etag(&whole, true))).unwrap();
    let error = hub.refusal(hub.generate("org/tiny").env("HF_HUB_OFFLINE", "1"));
    assert!(error.contains(&format!("lacks `{shard}`, which its index names")), "{error}");
    json_of(&mut hub.generate("org/tiny"));
}

#[test]
fn several_processes_fetch_a_file_once() {
    let hub = Hub::new();
    let length = hub.repo.files["model.safetensors"].len();
    hub.server.fail("GET model.safetensors", Fault::Slow(length / 10 + 1, Duration::from_millis(100)));
    let children: Vec<_> = (0..3).map(|_| hub.generate("org/tiny").spawn().unwrap()).collect();
    let outputs: Vec<Output> = children.into_iter().map(end_of).collect();
    for output in outputs {
        assert!(output.status.success(), "{}", stderr_of(&output));
    }
    assert_eq!(hub.asked_for("model.safetensors").iter().filter(|(.., elsewhere)| *elsewhere).count(), 1);
    hub.assert_clean();
}

#[test]
fn a_gguf_file_is_fetched_by_its_name_alone() {
    let hub = Hub::new();
    let path = hub.path("tiny.gguf");
    fixture::write_gguf(&path);
    let mut repo = hub.repo.clone();
    repo.files.insert("tiny.gguf".to_owned(), fs::read(&path).unwrap());
    hub.server.put(NAME, repo);
    json_of(&mut hub.generate("org/tiny/tiny.gguf"));
    let names: Vec<_> = fs::read_dir(hub.snapshot()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["tiny.gguf"]);
    json_of(hub.generate("org/tiny/tiny.gguf").env("HF_HUB_OFFLINE", "1"));
    let error = hub.refusal(&mut hub.generate("org/tiny/absent.gguf"));
    assert!(error.contains("has no file `absent.gguf` at revision `main`"), "{error}");
}

/// A run is written down with what its names meant, and goes on with that.
#[test]
fn a_run_names_the_commit_it_was_trained_on() {
    let hub = Hub::new();
    let files = [("train.jsonl".to_owned(), conversations(60).into_bytes())].into();
    hub.server.put("datasets/org/talk", Repo { commit: "d".repeat(40), files });
    let mut workspace = Workspace::new();
    let data = "hf://datasets/org/talk/train.jsonl";
    // Rates that do not depend on how long the run is.
    workspace.set("optim.schedule", serde_json::json!({"kind": "constant"}));
    workspace.set("target.path", "org/tiny").set("data.train", vec![data]);
    let on_hub = |mut command: Command| {
        let from = hub.command(&[]);
        command.envs(from.get_envs().filter_map(|(key, value)| Some((key, value?)))).current_dir(hub.folder.path());
        command
    };
    json_of(&mut on_hub(workspace.train_command("run", &[])));
    let config: Value = serde_json::from_slice(&fs::read(workspace.path("run/config.json")).unwrap()).unwrap();
    assert_eq!(config["target"]["path"], format!("org/tiny@{}", "a".repeat(40)));
    assert_eq!(config["data"]["train"][0], format!("hf://datasets/org/talk@{}/train.jsonl", "d".repeat(40)));
    // The hub goes on, the run as it was written down does not.
    let mut later = hub.repo.clone();
    later.commit = "b".repeat(40);
    hub.server.put(NAME, later);
    let written = workspace.path("run/config.json");
    let mut again =
        hub.command(&["train", "--json", "--device", "cpu", "--resume", "--set", "train.max_steps=6", "--config"]);
    json_of(again.arg(written));
    assert!(!hub.model().join("snapshots").join("b".repeat(40)).exists());
    // An export finds the target by what the run wrote, and calls it by its name.
    let (run, out) = (workspace.path("run"), workspace.path("export"));
    let mut export = hub.command(&["export", "--checkpoint", run.to_str().unwrap(), "--out", out.to_str().unwrap()]);
    let output = output_of(export.env("HF_HUB_OFFLINE", "1"));
    assert!(output.status.success(), "{}", stderr_of(&output));
    let config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["base_model_name_or_path"], "org/tiny");
}

#[test]
fn a_draft_may_be_named_too() {
    let hub = Hub::new();
    // A smaller model with the same tokenizer is a draft.
    let folder = hub.path("small");
    write_model(&folder, &serde_json::json!({"num_hidden_layers": 1}));
    hub.server.put("models/org/small", Repo::of_folder(&folder, 'c'));
    let answer = json_of(hub.generate("org/tiny").args(["--draft", "org/small"]));
    assert_eq!(answer["summary"]["settings"]["draft"], format!("org/small@{}", "c".repeat(40)));
    let local = json_of(hub.generate("./model").args(["--draft", "./small"]));
    assert_eq!(answer["token_ids"], local["token_ids"]);
}

/// Files of data sets, in every form.
#[test]
fn data_is_fetched_by_its_address() {
    let hub = Hub::new();
    let files = [("data/train.jsonl".to_owned(), conversations(8).into_bytes())].into();
    hub.server.put("datasets/org/talk", Repo { commit: "d".repeat(40), files });
    let inspect = |data: &str| {
        let arguments = ["inspect", "--json", "--target", "./model", "--show", "0", "--data", data];
        hub.command(&arguments)
    };
    let address = "hf://datasets/org/talk@main/data/train.jsonl";
    let there = json_of(&mut inspect(address));
    assert_eq!(there["statistics"], json_of(&mut inspect("data.jsonl"))["statistics"]);
    let path = hub.cache().join("datasets--org--talk/snapshots").join("d".repeat(40)).join("data/train.jsonl");
    assert!(fs::read_link(&path).unwrap().starts_with("../../../blobs"), "{}", path.display());
    json_of(inspect(address).env("HF_HUB_OFFLINE", "1"));
    let error = hub.refusal(&mut inspect("hf://datasets/org/talk/data/absent.jsonl"));
    assert!(error.contains("has no file `data/absent.jsonl` at revision `main`"), "{error}");
    let error = hub.refusal(&mut inspect("hf://datasets/org/talk"));
    assert!(error.contains("names no file of a data set: expected hf://datasets/ORG/NAME/FILE"), "{error}");
    hub.server.take_requests();
    let pinned = format!("hf://datasets/org/talk@{}/data/train.jsonl", "d".repeat(40));
    json_of(&mut inspect(&pinned));
    assert!(hub.server.take_requests().is_empty(), "what a commit holds is for ever");
}

/// As huggingface_hub 2.4 leaves a cache: content shared between repositories, notes of files that are not there, a tree.
#[test]
fn what_pythons_client_fetched_is_used_as_it_is() {
    let hub = Hub::new();
    let put = |path: PathBuf, content: &[u8]| {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    };
    put(hub.cache().join("CACHEDIR.TAG"), b"Signature: 8a477f597d28d172789f06886806bc55");
    put(hub.model().join("refs/main"), hub.repo.commit.as_bytes());
    put(hub.model().join(".no_exist").join(&hub.repo.commit).join("added_tokens.json"), b"");
    put(hub.model().join("trees").join(format!("{}.json", hub.repo.commit)), b"{}");
    fs::create_dir_all(hub.snapshot()).unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        let (content, large) = (&hub.repo.files[file], file == "model.safetensors");
        let name = etag(content, large);
        let blob = hub.model().join("blobs").join(&name);
        if large {
            put(hub.cache().join("blobs/ab").join("c".repeat(64)), content);
            std::os::unix::fs::symlink(format!("../../blobs/ab/{}", "c".repeat(64)), &blob).unwrap();
        } else {
            put(blob, content);
        }
        std::os::unix::fs::symlink(format!("../../blobs/{name}"), hub.snapshot().join(file)).unwrap();
    }
    let before = fixture::contents(&hub.cache());
    let answer = json_of(hub.generate("org/tiny").env("HF_HUB_OFFLINE", "1"));
    assert_eq!(answer["token_ids"], json_of(&mut hub.generate("./model"))["token_ids"]);
    json_of(&mut hub.generate("org/tiny"));
    assert!(fixture::contents(&hub.cache()) == before, "nothing was missing");
    assert!(hub.asked_for("model.safetensors").is_empty());
    // The same folder, named by its path.
    let home = hub.path("elsewhere");
    json_of(hub.generate(hub.snapshot().to_str().unwrap()).env("HF_HOME", home));
}
