//! Arrows between rooms run down: a file uses only layers below its own. `lib.rs` is the drawing, this holds it. Inside a
//! room, no two files use each other, not even by way of a third.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

fn source_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Room to layer, from the `// L3: ...` comments and `pub mod` lines of lib.rs.
fn layers() -> BTreeMap<String, usize> {
    let text = fs::read_to_string(source_folder().join("lib.rs")).unwrap();
    let mut layer = None;
    let mut rooms = BTreeMap::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("// L") {
            let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
            layer = Some(digits.parse::<usize>().unwrap());
        } else if let Some(room) = line.strip_prefix("pub mod ") {
            rooms
                .insert(room.trim_end_matches(';').to_owned(), layer.expect("a layer comment stands above every room"));
        }
    }
    rooms
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| match path.is_dir() {
            true => rust_files(&path),
            false if path.extension().is_some_and(|extension| extension == "rs") => vec![path],
            false => vec![],
        })
        .collect()
}

/// Every `crate::ROOM` that a text mentions outside comments.
fn uses(text: &str) -> Vec<String> {
    let code: String = text.lines().map(|line| line.split("//").next().unwrap_or_default().to_owned() + "\n").collect();
    code.split("crate::")
        .skip(1)
        .map(|rest| rest.chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect())
        .collect()
}

fn upward_arrows(folder: &Path, layers: &BTreeMap<String, usize>) -> Vec<String> {
    let mut wrong = Vec::new();
    for path in rust_files(folder) {
        let relative = path.strip_prefix(folder).unwrap();
        let room =
            relative.components().next().unwrap().as_os_str().to_string_lossy().trim_end_matches(".rs").to_owned();
        if room == "lib" || room == "main" {
            continue;
        }
        let own = layers.get(&room).unwrap_or_else(|| panic!("{room} is not in lib.rs"));
        for used in uses(&fs::read_to_string(&path).unwrap()) {
            if used == room {
                continue;
            }
            match layers.get(&used) {
                Some(layer) if layer < own => {}
                // The lowest layer has no rooms: its files serve each other.
                Some(0) if *own == 0 => {}
                Some(layer) => wrong.push(format!("{} (L{own}) uses {used} (L{layer})", relative.display())),
                None => wrong.push(format!("{} uses `crate::{used}`: name one room in each `use`", relative.display())),
            }
        }
    }
    wrong
}

#[test]
fn arrows_between_rooms_run_down() {
    let wrong = upward_arrows(&source_folder(), &layers());
    assert!(wrong.is_empty(), "arrows that run up or sideways:\n{}", wrong.join("\n"));
}

#[test]
fn an_upward_arrow_is_found() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("low")).unwrap();
    fs::write(folder.path().join("low/inner.rs"), "use crate::error::Error; // crate::high\nuse crate::high::Thing;")
        .unwrap();
    let layers = BTreeMap::from([("error".to_owned(), 0), ("low".to_owned(), 1), ("high".to_owned(), 2)]);
    assert_eq!(upward_arrows(folder.path(), &layers), ["low/inner.rs (L1) uses high (L2)"]);
}

/// First names behind every `super::` of a file, its tests left out: `super::{a::B, c}` gives `a` and `c`.
fn siblings_used(text: &str) -> BTreeSet<String> {
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    let code: String = code.lines().map(|line| line.split("//").next().unwrap_or_default()).collect();
    let first_name = |path: &str| -> String {
        path.trim().chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect()
    };
    let mut names = BTreeSet::new();
    for rest in code.split("super::").skip(1) {
        let Some(list) = rest.strip_prefix('{') else {
            names.insert(first_name(rest));
            continue;
        };
        let (mut depth, mut part) = (1, String::new());
        for letter in list.chars() {
            match letter {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            match letter {
                ',' if depth == 1 => drop(names.insert(first_name(&std::mem::take(&mut part)))),
                _ if depth == 0 => break,
                _ => part.push(letter),
            }
        }
        names.insert(first_name(&part));
    }
    names
}

/// Files of one folder that can be reached from themselves.
fn circles(folder: &Path) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut folders = BTreeSet::from([folder.to_path_buf()]);
    folders.extend(rust_files(folder).iter().filter_map(|path| Some(path.parent()?.to_path_buf())));
    for folder in folders {
        let mut arrows: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for path in fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            if path.extension().is_some_and(|extension| extension == "rs") && name != "mod" {
                arrows.insert(name, siblings_used(&fs::read_to_string(&path).unwrap()));
            }
        }
        for start in arrows.keys() {
            let (mut reached, mut open) = (BTreeSet::new(), vec![start]);
            while let Some(file) = open.pop() {
                open.extend(arrows.get(file).into_iter().flatten().filter(|next| reached.insert(*next)));
            }
            if reached.contains(start) {
                wrong.push(format!("{}/{start}.rs", folder.display()));
            }
        }
    }
    wrong
}

#[test]
fn files_of_a_room_do_not_use_each_other_in_circles() {
    let wrong = circles(&source_folder());
    assert!(wrong.is_empty(), "files that reach themselves through `super::`:\n{}", wrong.join("\n"));
}

#[test]
fn a_circle_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write("a.rs", "use super::{Thing,\n b::{C, D},\n};\n#[cfg(test)]\nmod tests { use super::a; }");
    write("b.rs", "fn f() { super::c::g() }");
    write("c.rs", "// super::a\nuse super::d;");
    write("d.rs", "");
    assert_eq!(circles(folder.path()), Vec::<String>::new());
    write("d.rs", "use super::a::E;");
    assert_eq!(circles(folder.path()).len(), 4);
}

/// Where a family of models may be named: in its own files, in the table, and where a format of somebody else's has the
/// name in a file.
const FAMILY_NAMED: [&str; 8] = [
    "models/mod.rs",
    "gguf",
    "export/eagle3",
    "export/block",
    "export/peagle.rs",
    "draft/peagle/config.rs",
    "cli/bench_shapes.rs",
    // Its phi are convolutions.
    "models/vqvae",
];

/// Files of families.
const FAMILIES: [&str; 12] = [
    "models/llama",
    "models/mistral",
    "models/mixtral",
    "models/qwen",
    "models/gemma",
    "models/smollm",
    "models/olmo",
    "models/granite",
    "models/gpt_oss",
    "models/phi",
    "models/llada",
    "models/dream",
];

/// Lines of code, tests and comments left out, that name a family.
fn lines_with_a_family(folder: &Path) -> Vec<String> {
    let mut wrong = Vec::new();
    for path in rust_files(folder) {
        let relative = path.strip_prefix(folder).unwrap().display().to_string();
        // Files that are compiled for tests alone.
        let tests = ["tests.rs", "tests/", "lossless", "tiny.rs", "heads_for_tests.rs"];
        if FAMILY_NAMED.iter().chain(&FAMILIES).any(|place| relative.starts_with(place))
            || tests.iter().any(|name| relative.contains(name))
        {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        for line in code.lines().map(|line| line.split("//").next().unwrap_or_default()) {
            // A variant of the rotary embedding that many families use is called after one.
            let line = line.to_lowercase().replace("llama3", "");
            // So are an engine and its server.
            let line = line.replace("llama.cpp", "").replace("llama-server", "").replace("llamacpp", "");
            // Letters before a name make it another word, such as "graphic".
            let names =
                |name: &str| line.match_indices(name).any(|(start, _)| !line[..start].ends_with(char::is_alphabetic));
            // A line of the table, and of the list of what it uses.
            let is_name = |word: &str| word.chars().all(|letter| letter.is_alphanumeric() || letter == '_');
            let is_list = line.split(',').all(|word| is_name(word.trim()));
            let is_listed = relative == "models/family.rs" && (line.contains("family,") || is_list);
            let is_named = FAMILIES.iter().any(|file| names(file.trim_start_matches("models/")));
            if is_named && !is_listed {
                wrong.push(format!("{relative}: {}", line.trim()));
            }
        }
    }
    wrong
}

#[test]
fn no_family_of_models_is_named_outside_its_own_file() {
    let wrong = lines_with_a_family(&source_folder());
    assert!(wrong.is_empty(), "go through `models::TargetConfig` and the table of families:\n{}", wrong.join("\n"));
}

#[test]
fn a_named_family_is_found() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("models/llama")).unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write("models/llama/config.rs", "struct LlamaConfig;");
    write("plan.rs", "// Llama\nlet rope = RopeScaling::Llama3;\n#[cfg(test)]\nmod tests { use LlamaConfig; }");
    assert_eq!(lines_with_a_family(folder.path()), Vec::<String>::new());
    write("plan.rs", "use crate::models::LlamaConfig;");
    assert_eq!(lines_with_a_family(folder.path()), ["plan.rs: use crate::models::llamaconfig;"]);
}

/// Code of a file: no comments, nothing that only tests have.
fn code(path: &Path) -> String {
    if path.file_name().is_some_and(|name| name == "tests.rs") {
        return String::new();
    }
    let text = fs::read_to_string(path).unwrap();
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    code.lines().map(|line| line.split("//").next().unwrap_or_default().to_owned() + "\n").collect()
}

/// What serves every draft knows none by name: the loop, what starts it, what opens drafters, and what checks a device.
#[test]
fn what_serves_every_draft_names_no_algorithm() {
    let mut files: Vec<PathBuf> =
        ["train", "cli/train", "eval"].iter().flat_map(|room| rust_files(&source_folder().join(room))).collect();
    files.extend(
        ["decode/drafter/open.rs", "decode/drafter/kind.rs", "plan.rs", "config.rs"]
            .map(|file| source_folder().join(file)),
    );
    assert!(files.len() > 30 && files.iter().all(|file| file.is_file()));
    for path in files {
        let text = code(&path).to_lowercase();
        for algorithm in specforge::draft::ALGORITHMS {
            assert!(!text.contains(algorithm.name), "{} names {}", path.display(), algorithm.name);
        }
    }
}
