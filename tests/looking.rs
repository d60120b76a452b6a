//! Looking at data before training: `validate`, and the page of `inspect` in a browser.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fixture::{Workspace, conversations, json_of, output_of, specforge, stderr_of};
use crate::processes::PATIENCE;

/// A page must show this and obey none of it.
const HOSTILE: &str =
    "</script><script>document.title='obeyed'</script><img src=x onerror=\"document.title='obeyed'\">'\"&amp;";

fn validate(workspace: &Workspace, arguments: &[&str]) -> Command {
    let mut command = specforge(&["validate"]);
    command.arg(workspace.path("conversations.jsonl")).args(arguments);
    command
}

#[test]
fn validate_says_what_is_wrong_and_exits_with_one() {
    let workspace = Workspace::new();
    let output = output_of(&mut validate(&workspace, &[]));
    assert_eq!(output.status.code(), Some(0), "{}", stderr_of(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("0 of them unusable, 0 faults"));

    let good = conversations(20);
    let spoilt = good.replacen('\n', "\nnot json\n{\"messages\": [{\"role\": \"martian\", \"content\": 3}]}\n", 1);
    fs::write(workspace.path("conversations.jsonl"), &spoilt).unwrap();
    let model = workspace.path("model");
    let output = output_of(&mut validate(&workspace, &["--target", model.to_str().unwrap()]));
    assert_eq!(output.status.code(), Some(1), "{}", stderr_of(&output));
    let said = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(said.contains("fault: not JSON: 1") && said.contains("conversations.jsonl:2: is not JSON"), "{said}");
    assert!(said.contains("fault: roles: 1") && said.contains(":3: message 1: unknown role `martian`"), "{said}");
    assert!(stderr_of(&output).contains("2 faults in 2 records or files"), "{}", stderr_of(&output));
    let output = output_of(&mut validate(&workspace, &["--json", "--examples", "0"]));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["faulty"], &report["fault_count"]), (&json!(2), &json!(2)));
    assert_eq!(report["faults"][0]["examples"], json!([]));

    let refused: [(&[&str], &str); 5] = [
        (&["--mask-reasoning", "false"], "name one with --target"),
        (&["--supervise", "last_turn"], "name one with --target"),
        (&["--max-length", "3"], "--target"),
        (&["--mask-roles", "martian"], "martian"),
        (&["--target", model.to_str().unwrap(), "--supervise", "all", "--mask-roles", "tool"], "data.supervise = all"),
    ];
    for (arguments, expected) in refused {
        let output = output_of(&mut validate(&workspace, arguments));
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(stderr_of(&output).contains(expected), "{}", stderr_of(&output));
    }
}

/// A workspace whose conversations are `good` ones, one said twice, one that a browser must not obey, one with a broken
/// line behind it; and the page of it.
fn page_of(good: usize) -> (Workspace, PathBuf, Value) {
    let workspace = Workspace::new();
    let talk = |id: &str, content: &str| {
        let messages = json!([{"role": "system", "content": "s"}, {"role": "user", "content": content},
            {"role": "assistant", "content": format!("hello {content}")}]);
        format!("{}\n", json!({"id": id, "messages": messages}))
    };
    let mut lines = conversations(good);
    lines.push_str(&talk(HOSTILE, HOSTILE));
    lines.push_str(&talk("once", "zebra zebra"));
    lines.push_str(&talk("again", "zebra zebra"));
    lines.push_str("broken\n");
    fs::write(workspace.path("conversations.jsonl"), lines).unwrap();
    let page = workspace.path("page.html");
    let mut command = specforge(&["inspect", "--json", "--show", "0", "--target"]);
    command.arg(workspace.path("model")).arg("--data").arg(workspace.path("conversations.jsonl"));
    command.args(["--mask-roles", "assistant,system", "--html"]).arg(&page).current_dir(workspace.path(""));
    let report = json_of(&mut command);
    (workspace, page, report)
}

#[test]
fn the_page_and_the_figures_say_the_same() {
    let (_workspace, page, report) = page_of(30);
    let text = fs::read_to_string(&page).unwrap();
    assert_eq!(report["statistics"]["documents"], json!(33));
    assert_eq!(text.matches("<article").count(), 33);
    assert_eq!(report["duplicates"]["documents"], json!(1));
    assert_eq!(report["duplicates"]["most"][0]["ids"], json!(["once", "again"]));
    assert_eq!(report["findings"]["faults"][0]["kind"], "json");
    assert_eq!(report["findings"]["faults"][0]["examples"][0]["line"], json!(34));
    assert_eq!(report["trained"]["mask"]["roles"], json!(["assistant", "system"]));
    let bars = |name: &str| -> u64 {
        let bars = report["distributions"][name].as_array().unwrap();
        bars.iter().map(|bar| bar["documents"].as_u64().unwrap()).sum()
    };
    assert_eq!((bars("lengths"), bars("coverage")), (33, 33));
    let vocabulary = report["vocabulary"].as_array().unwrap();
    assert_eq!(vocabulary.last().unwrap()["share"], json!(1.0));
    assert!(
        text.contains("cannot be used. A training refuses more than"),
        "the broken line is more than one in a hundred"
    );
    assert_eq!(text.matches("<script>").count(), 1);
    assert!(!text.contains("<img") && text.contains("&lt;/script&gt;"));
}

/// Chromium, where this machine has it.
fn browser() -> Option<PathBuf> {
    let named = std::env::var_os("CHROMIUM").map(PathBuf::from);
    let folders: Vec<PathBuf> = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect();
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let found = || {
        names.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name))).find(|path| path.is_file())
    };
    named.or_else(found)
}

/// The page as a browser sees it when its script has run, and what the browser has to complain about.
fn seen(browser: &Path, page: &Path, filters: &str) -> (String, String) {
    let profile = tempfile::tempdir().unwrap();
    let (dom, said) = (profile.path().join("dom"), profile.path().join("said"));
    let mut child = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-dev-shm-usage", "--enable-logging=stderr", "--dump-dom"])
        .arg(format!("--user-data-dir={}", profile.path().join("profile").display()))
        .arg(format!("file://{}#{filters}", page.display()))
        .stdin(Stdio::null())
        .stdout(fs::File::create(&dom).unwrap())
        .stderr(fs::File::create(&said).unwrap())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > PATIENCE {
            child.kill().unwrap();
        }
        sleep(Duration::from_millis(50));
    }
    let read = |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned();
    let complaints = read(&said).lines().filter(|line| line.contains("CONSOLE")).collect::<Vec<_>>().join("\n");
    (read(&dom), complaints)
}

#[test]
fn filters_work_in_a_browser() {
    let Some(browser) = browser() else {
        eprintln!("SKIPPED: no Chromium in PATH or CHROMIUM");
        return;
    };
    let (_workspace, page, _) = page_of(30);
    for (filters, shown) in [
        ("", "33 of 33 shown"),
        ("search=zebra", "2 of 33 shown"),
        ("search=ZEBRA&order=longest", "2 of 33 shown"),
        ("role=system", "3 of 33 shown"),
        ("role=tool", "33 of 33 shown"), // nobody has it, so there is no box for it
        ("role=system&search=%3Cimg", "1 of 33 shown"),
        ("length-to=1", "0 of 33 shown"),
        ("coverage-from=99.9", "0 of 33 shown"),
    ] {
        let (dom, complaints) = seen(&browser, &page, filters);
        assert_eq!(complaints, "", "{filters}");
        assert!(
            dom.contains(&format!("polite\">{shown}<")),
            "{filters}: {}",
            dom.split("polite").nth(1).unwrap_or(&dom)
        );
        let hidden = dom.matches("<article ").count()
            - dom
                .split("<article ")
                .skip(1)
                .filter(|one| {
                    let head = one.split('>').next().unwrap();
                    head.contains("hidden")
                })
                .count();
        assert_eq!(format!("{hidden} of 33 shown"), shown, "{filters}");
        assert!(!dom.contains("<title>obeyed"), "{filters}");
    }
}
