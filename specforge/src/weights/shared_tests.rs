//! Copies that processes share: what is in them, when they are made again, what happens where none can be made, and that
//! real processes really hold them once.

use std::cell::RefCell;
use std::process::{Command, Stdio};

use tch::Tensor;

use super::*;
use crate::weights::write_tensors;

const NAMES: [&str; 2] = ["narrow", "wide"];

fn names() -> Vec<String> {
    NAMES.map(str::to_owned).to_vec()
}

/// A file of bfloat16 tensors; the wide one takes several pieces, and `shift` moves every element of both.
fn write_weights(path: &Path, shift: f64) {
    let tensors = [("narrow", vec![3, 5]), ("wide", vec![6000, 4001])].map(|(name, shape): (&str, Vec<i64>)| {
        let count = shape.iter().product::<i64>();
        let values = Tensor::arange(count, (Kind::Float, Device::Cpu)).remainder(1021.0) / 8.0 + shift;
        (name.to_owned(), values.to_kind(Kind::BFloat16).view(shape.as_slice()))
    });
    write_tensors(path, &tensors, &[]).unwrap();
}

/// Opens weights through copies in `folder`; returns them with what the user was told.
fn open(path: &Path, folder: &Path, kind: Kind) -> (WeightsFolder, Vec<String>) {
    let notes = RefCell::new(Vec::new());
    let note = |line: &str| notes.borrow_mut().push(line.to_owned());
    let copies = SharedCopies { folder, progress: &|done, total| assert!(done <= total), note: &note };
    let weights = copies.of(WeightsFolder::open(path).unwrap(), &names(), kind);
    (weights, notes.into_inner())
}

fn files_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_copy_holds_what_each_process_would_convert() {
    let folder = tempfile::tempdir().unwrap();
    let (path, copies) = (folder.path().join("model.safetensors"), folder.path().join("copies"));
    write_weights(&path, 0.0);
    let own = WeightsFolder::open(&path).unwrap();
    for kind in [Kind::Float, Kind::Half, Kind::Double] {
        let (shared, notes) = open(&path, &copies, kind);
        assert_eq!(notes, Vec::<String>::new());
        assert!(shared.path().starts_with(&copies));
        for name in NAMES {
            assert!(shared.shares_pages(name, kind) && !own.shares_pages(name, kind));
            let (got, want) =
                (shared.load(name, kind, Device::Cpu).unwrap(), own.load(name, kind, Device::Cpu).unwrap());
            assert!(got.equal(&want), "{name} as {kind:?}");
        }
    }
    assert_eq!(files_in(&copies).len(), 3);
}

#[test]
fn weights_that_share_their_pages_are_not_copied() {
    let folder = tempfile::tempdir().unwrap();
    let (path, copies) = (folder.path().join("model.safetensors"), folder.path().join("copies"));
    write_weights(&path, 0.0);
    let (weights, notes) = open(&path, &copies, Kind::BFloat16);
    assert_eq!((weights.path(), notes.len(), copies.exists()), (path.as_path(), 0, false));
}

#[test]
fn a_copy_is_made_once_and_again_when_the_weights_change_or_it_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let (path, copies) = (folder.path().join("model.safetensors"), folder.path().join("copies"));
    write_weights(&path, 0.0);
    let first = open(&path, &copies, Kind::Float).0.path().to_path_buf();
    let made = fs::metadata(&first).unwrap();
    assert_eq!(open(&path, &copies, Kind::Float).0.path(), first);
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(&first).unwrap().ino(), made.ino());

    let file = File::options().write(true).open(&first).unwrap();
    file.set_len(made.len() / 2).unwrap();
    assert_eq!(open(&path, &copies, Kind::Float).0.path(), first);
    assert_eq!(fs::metadata(&first).unwrap().len(), made.len());

    write_weights(&path, 4.0);
    let (changed, _) = open(&path, &copies, Kind::Float);
    assert_ne!(changed.path(), first);
    let want = WeightsFolder::open(&path).unwrap().load("wide", Kind::Float, Device::Cpu).unwrap();
    assert!(changed.load("wide", Kind::Float, Device::Cpu).unwrap().equal(&want));
    // What the weights were before is of no use to anybody.
    assert_eq!(files_in(&copies), [changed.path().file_name().unwrap().to_str().unwrap()]);
}

#[test]
fn where_no_copy_can_be_made_everybody_converts_and_is_told_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    write_weights(&path, 0.0);
    let blocked = folder.path().join("blocked");
    fs::write(&blocked, "no folder").unwrap();
    // /proc has no room, and takes no folders.
    for copies in [blocked.as_path(), Path::new("/proc")] {
        let (weights, notes) = open(&path, copies, Kind::Float);
        assert_eq!(weights.path(), path);
        assert_eq!(weights.load("narrow", Kind::Float, Device::Cpu).unwrap().size(), [3, 5]);
        let folder = copies.display().to_string();
        assert!(notes.len() == 1 && notes[0].contains("converts") && notes[0].contains(&folder), "{notes:?}");
    }
}

/// Environment of the process below: folder of the weights and of the copies, perhaps nothing.
const PROCESS: &str = "SPECFORGE_TEST_SHARED_WEIGHTS";

/// Not a test by itself: one of the processes of the test below. Prints how much memory the weights take of it, in KiB,
/// once all are there.
#[test]
#[ignore = "a process of the test below"]
fn a_process_that_holds_weights() {
    let Ok(folder) = std::env::var(PROCESS) else { return };
    let (path, copies) = (Path::new(&folder).join("model.safetensors"), Path::new(&folder).join("copies"));
    let before = share_of_memory();
    let weights = match copies.exists() {
        true => open(&path, &copies, Kind::Float).0,
        false => WeightsFolder::open(&path).unwrap(),
    };
    let tensors = NAMES.map(|name| weights.load(name, Kind::Float, Device::Cpu).unwrap());
    let sums = tensors.each_ref().map(|tensor| tensor.sum(Kind::Float).double_value(&[])); // touches every page
    println!("there {}", sums[1]);
    std::io::stdin().read_line(&mut String::new()).unwrap();
    println!("takes {}", share_of_memory() - before);
    std::io::stdin().read_line(&mut String::new()).unwrap();
    drop(tensors);
}

/// Proportional share of memory of this process in KiB: pages of its own, and its part of pages it shares.
fn share_of_memory() -> i64 {
    let text = fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}

/// Memory that the weights take of `count` processes together, in KiB.
fn memory_of(count: usize, folder: &Path) -> i64 {
    use std::io::{BufRead, BufReader};
    let test = "weights::shared::tests::a_process_that_holds_weights";
    let start = || {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--ignored", "--nocapture"]).env(PROCESS, folder);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let (input, lines) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()).lines());
        (child, input, lines)
    };
    let mut processes: Vec<_> = (0..count).map(|_| start()).collect();
    // A process that ends early closes its output, which ends the wait.
    let mut answers = |word: &str| -> Vec<f64> {
        let answer = processes.iter_mut().map(|(_, input, lines)| {
            let line = lines.map_while(Result::ok).find_map(|line| Some(line.split_once(word)?.1.trim().to_owned()));
            let number: f64 = line.expect("an answer").parse().unwrap();
            (input, number)
        });
        let (inputs, numbers): (Vec<_>, Vec<f64>) = answer.unzip();
        inputs.into_iter().for_each(|input| writeln!(input).unwrap());
        numbers
    };
    let sums = answers("there");
    assert!(sums.iter().all(|sum| *sum == sums[0]));
    let memory = answers("takes").iter().sum::<f64>() as i64;
    for (mut child, ..) in processes {
        assert!(child.wait().unwrap().success());
    }
    memory
}

#[test]
fn processes_together_take_the_memory_of_one() {
    let folder = tempfile::tempdir().unwrap();
    write_weights(&folder.path().join("model.safetensors"), 0.0);
    // Large beside what a process takes for its code and threads, of which it counts the pages that it touched first.
    let size = 4 * (3 * 5 + 6000 * 4001) / 1024;
    let own = memory_of(2, folder.path());
    fs::create_dir(folder.path().join("copies")).unwrap();
    // These make the copy first; the one that does keeps its workspace for a while.
    let shared = memory_of(3, folder.path());
    let alone = memory_of(1, folder.path());
    println!("weights of {size} KiB: two processes for themselves {own} KiB; shared: one {alone}, three {shared}");
    assert!(own > 2 * size - size / 4, "{own}");
    assert!((alone - size).abs() < size / 4, "{alone}");
    assert!(shared > size - size / 4 && shared < 2 * size - size / 4, "{shared}");
}
