//! The writer of a folder of checkpoints: saves atomically, deletes old ones after the new one is on disk for good.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::Tensor;

use super::manifest::{FORMAT_VERSION, FileDigest, MANIFEST_FILE, MODEL_FILE, Manifest, OPTIMIZER_FILE};
use super::retention::RetentionConfig;
use super::scan::{Scan, entries, folder_name, scan, step_folders};
use crate::error::{Error, Result};
use crate::files::{self, StagedDir};
use crate::weights::writer::write_tensors_seen;

const BEST_FILE: &str = "best.json";
const LOCK_FILE: &str = ".lock";
/// Folders under construction or being deleted.
const PARTIAL_PREFIX: &str = ".partial-";
/// Folders of checkpoints that a run went back behind.
const ASIDE_PREFIX: &str = "set-aside-";
/// Where `files::StagedDir` holds a folder that is being replaced, under the name `old`.
const REPLACED_PREFIX: &str = ".replaced-";

/// What saving did.
#[derive(Debug)]
pub struct Saved {
    /// The new checkpoint's folder.
    pub path: PathBuf,
    /// What could not be tidied up; the checkpoint itself is safe.
    pub warnings: Vec<String>,
}

/// The one writer of a folder of checkpoints. With several processes, only the first opens it.
#[derive(Debug)]
pub struct CheckpointStore {
    root: PathBuf,
    retention: RetentionConfig,
    /// Holds the lock until dropped, or until the process dies in whatever way.
    _lock: File,
}

impl CheckpointStore {
    /// Opens or creates the folder, and clears away what a killed run left unfinished.
    pub fn open(root: &Path, retention: RetentionConfig) -> Result<Self> {
        files::create_dir_all(root)?;
        let lock = take_lock(root)?;
        clear_leftovers(root)?;
        Ok(Self { root: root.to_path_buf(), retention, _lock: lock })
    }

    /// Folder of the checkpoint of a step, whether it is there or not.
    pub fn folder_of(&self, step: u64) -> PathBuf {
        self.root.join(folder_name(step))
    }

    /// Saves a checkpoint under its step, replacing one of the same step, then deletes what need not stay.
    /// On an error the older checkpoints are as they were.
    pub fn save(
        &self,
        mut manifest: Manifest,
        model: &[(String, Tensor)],
        optimizer: &[(String, Tensor)],
    ) -> Result<Saved> {
        let path = self.folder_of(manifest.step);
        let staged = StagedDir::new(&path)?;
        manifest.format_version = FORMAT_VERSION;
        // JSON has no NaN: it would be written as `null` and make the manifest unreadable.
        manifest.metrics.retain(|_, value| value.is_finite());
        manifest.files.clear();
        for (name, tensors) in [(MODEL_FILE, model), (OPTIMIZER_FILE, optimizer)] {
            let file = staged.path().join(name);
            // The digest is made on the way: a large file is never read again for it.
            let (mut bytes, mut hasher) = (0, Sha256::new());
            write_tensors_seen(&file, tensors, &[], &mut |piece| {
                bytes += piece.len() as u64;
                hasher.update(piece);
            })?;
            let sha256 = files::hexadecimal(&hasher.finalize());
            manifest.files.insert(name.to_owned(), FileDigest { bytes, sha256 });
        }
        files::write_json(&staged.path().join(MANIFEST_FILE), &manifest)?;
        staged.commit()?;
        let warnings = self.tidy(&path).unwrap_or_else(|error| vec![error.to_string()]);
        Ok(Saved { path, warnings })
    }

    /// Whole checkpoints, and warnings about damaged ones.
    pub fn scan(&self) -> Result<Scan> {
        scan(&self.root)
    }

    /// The newest whole checkpoint, and warnings about damaged folders that were passed over.
    pub fn latest(&self) -> Result<(Option<PathBuf>, Vec<String>)> {
        let scan = self.scan()?;
        Ok((scan.latest().map(|found| found.path.clone()), scan.warnings))
    }

    /// The best whole checkpoint by the chosen metric.
    pub fn best(&self) -> Result<Option<PathBuf>> {
        let scan = self.scan()?;
        Ok(self.retention.best_of(&scan).map(|(found, _)| found.path.clone()))
    }

    /// Whether a checkpoint with these metrics would be better than every one that is there, by the chosen metric.
    pub fn is_record(&self, metrics: &BTreeMap<String, f64>) -> Result<bool> {
        let Some(&value) = self.retention.best_metric.as_ref().and_then(|metric| metrics.get(metric)) else {
            return Ok(false);
        };
        let record = self.retention.best_of(&self.scan()?).map(|(_, record)| record);
        Ok(value.is_finite() && self.retention.is_better(value, record))
    }

    /// Moves checkpoints of later steps out of the way, for a run that goes back to an earlier one and takes another way
    /// from there: into a folder of their own, with copies of the run's `files` as they are. Nothing where there are none.
    pub fn set_aside_after(&self, step: u64, files: &[&str]) -> Result<Option<PathBuf>> {
        let later: Vec<_> = step_folders(&self.root)?.into_iter().filter(|(later, _)| *later > step).collect();
        if later.is_empty() {
            return Ok(None);
        }
        let mut names = (1..).map(|number: u64| self.root.join(format!("{ASIDE_PREFIX}{number}")));
        let aside = names.find(|path| !path.exists()).unwrap_or_else(|| self.root.join(ASIDE_PREFIX));
        files::create_dir_all(&aside)?;
        for name in files.iter().filter(|name| self.root.join(name).is_file()) {
            let copy = aside.join(name);
            fs::copy(self.root.join(name), &copy).map_err(Error::io("write", &copy))?;
        }
        // The latest first: a kill on the way leaves a run that ended earlier.
        for (later, path) in later.into_iter().rev() {
            fs::rename(&path, aside.join(folder_name(later))).map_err(Error::io("move aside", &path))?;
        }
        self.point_at_best(&self.scan()?)?;
        Ok(Some(aside))
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Which checkpoints stay.
    pub fn retention(&self) -> &RetentionConfig {
        &self.retention
    }

    /// Updates the pointer to the best checkpoint and deletes those that need not stay.
    fn tidy(&self, just_saved: &Path) -> Result<Vec<String>> {
        let scan = self.scan()?;
        self.point_at_best(&scan)?;
        let best = self.retention.best_of(&scan).map(|(found, _)| found.path.as_path());
        let keep = if self.retention.keep_last == 0 { usize::MAX } else { self.retention.keep_last };
        let oldest_first = &scan.checkpoints[..scan.checkpoints.len().saturating_sub(keep)];
        let mut warnings = Vec::new();
        for found in oldest_first {
            let path = found.path.as_path();
            if path != just_saved && Some(path) != best {
                warnings.extend(self.remove(path).err().map(|error| error.to_string()));
            }
        }
        Ok(warnings)
    }

    fn point_at_best(&self, scan: &Scan) -> Result<()> {
        let path = self.root.join(BEST_FILE);
        let Some((found, value)) = self.retention.best_of(scan) else {
            return match fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", &path)(error)),
                _ => Ok(()),
            };
        };
        let pointer = BestPointer {
            folder: folder_name(found.manifest.step),
            step: found.manifest.step,
            metric: self.retention.best_metric.clone().unwrap_or_default(),
            value,
        };
        files::write_json(&path, &pointer)
    }

    /// Gives the folder a name that does not count before taking it apart, so that a kill leaves nothing half deleted.
    fn remove(&self, path: &Path) -> Result<()> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let doomed = self.root.join(format!("{PARTIAL_PREFIX}deleted-{name}"));
        remove_any(&doomed)?;
        fs::rename(path, &doomed).map_err(Error::io("move aside", path))?;
        remove_any(&doomed)
    }
}

/// Content of `best.json`.
#[derive(Debug, Serialize, Deserialize)]
struct BestPointer {
    folder: String,
    step: u64,
    metric: String,
    value: f64,
}

fn take_lock(root: &Path) -> Result<File> {
    let path = root.join(LOCK_FILE);
    let file =
        File::options().create(true).write(true).truncate(false).open(&path).map_err(Error::io("create", &path))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(Error::bad_file(root, "another run is saving its checkpoints here")
            .with_hint("wait for it to end, or choose another folder")),
        // Some network file systems know no locks; then the user's care has to do.
        Err(TryLockError::Error(_)) | Ok(()) => Ok(file),
    }
}

/// Clears what a killed run left: unfinished and half-deleted folders go; a whole checkpoint that was just being
/// replaced comes back.
fn clear_leftovers(root: &Path) -> Result<()> {
    for (name, path) in entries(root)? {
        if name.starts_with(PARTIAL_PREFIX) {
            remove_any(&path)?;
        } else if name.starts_with(REPLACED_PREFIX) {
            let old = path.join("old");
            if let Ok(manifest) = Manifest::open(&old) {
                let target = root.join(folder_name(manifest.step));
                if !target.exists() {
                    fs::rename(&old, &target).map_err(Error::io("rename to", &target))?;
                }
            }
            remove_any(&path)?;
        }
    }
    Ok(())
}

fn remove_any(path: &Path) -> Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::super::choice::Choice;
    use super::super::manifest::{Versions, read};
    use super::super::retention::Direction;
    use super::*;

    fn manifest(step: u64, score: f64) -> Manifest {
        Manifest {
            step,
            epoch: 1,
            position: 7,
            tokens_seen: 1 << 40,
            configuration: serde_json::json!({"optim": {"learning_rate": 1e-4}}),
            versions: Versions::current(),
            data_hashes: BTreeMap::from([("train".to_owned(), "abc".to_owned())]),
            metrics: BTreeMap::from([("score".to_owned(), score), ("broken".to_owned(), f64::NAN)]),
            draft: serde_json::json!({"seed": u64::MAX}),
            ..Manifest::default()
        }
    }

    fn tensors(value: f64) -> Vec<(String, Tensor)> {
        let full = |kind| Tensor::full([4, 4], value, (kind, Device::Cpu));
        vec![("a".to_owned(), full(Kind::Float)), ("b".to_owned(), full(Kind::BFloat16))]
    }

    fn by_score(keep_last: usize, best_is: Direction) -> RetentionConfig {
        RetentionConfig { keep_last, best_metric: Some("score".to_owned()), best_is }
    }

    fn save(store: &CheckpointStore, step: u64, score: f64) -> PathBuf {
        let saved = store.save(manifest(step, score), &tensors(step as f64), &tensors(-1.0)).unwrap();
        assert!(saved.warnings.is_empty(), "{:?}", saved.warnings);
        saved.path
    }

    fn names(root: &Path) -> Vec<String> {
        let mut names: Vec<String> = entries(root).unwrap().into_iter().map(|(name, _)| name).collect();
        names.sort();
        names
    }

    fn steps(store: &CheckpointStore) -> Vec<u64> {
        store.scan().unwrap().checkpoints.iter().map(|found| found.manifest.step).collect()
    }

    #[test]
    fn what_is_saved_is_read_back() {
        let root = tempfile::tempdir().unwrap();
        let store = CheckpointStore::open(root.path(), RetentionConfig::default()).unwrap();
        assert_eq!(store.latest().unwrap(), (None, vec![]));
        let path = save(&store, 40, 0.5);
        assert_eq!(path, root.path().join("step-00000040"));
        assert_eq!(names(&path), ["manifest.json", "model.safetensors", "optimizer.safetensors"]);
        let checkpoint = read(&path).unwrap();
        let mut expected = manifest(40, 0.5);
        expected.metrics.remove("broken");
        expected.format_version = FORMAT_VERSION;
        expected.files = checkpoint.manifest.files.clone();
        assert_eq!(checkpoint.manifest, expected);
        assert_eq!(checkpoint.model.load("b", Kind::Float, Device::Cpu).unwrap().double_value(&[3, 3]), 40.0);
        assert_eq!(checkpoint.optimizer.load("a", Kind::Float, Device::Cpu).unwrap().double_value(&[0, 0]), -1.0);
        assert_eq!(checkpoint.model.kind("b"), Some(Kind::BFloat16));
        assert_eq!(store.latest().unwrap(), (Some(path), vec![]));
        assert_eq!(store.best().unwrap(), None);
    }

    #[test]
    fn the_newest_and_the_best_stay() {
        for (direction, best) in [(Direction::Higher, 3), (Direction::Lower, 1)] {
            let root = tempfile::tempdir().unwrap();
            let store = CheckpointStore::open(root.path(), by_score(2, direction)).unwrap();
            for (step, score) in [(1, 0.1), (2, 0.5), (3, 0.9), (4, 0.9), (5, 0.4), (6, f64::NAN)] {
                save(&store, step, score);
                assert_eq!(*steps(&store).last().unwrap(), step);
            }
            assert_eq!(steps(&store), [best, 5, 6], "{direction:?}");
            assert_eq!(store.best().unwrap().unwrap(), store.folder_of(best));
            let text = fs::read_to_string(root.path().join(BEST_FILE)).unwrap();
            let pointer: BestPointer = serde_json::from_str(&text).unwrap();
            assert_eq!((pointer.step, pointer.folder), (best, folder_name(best)));
            let expected = [".lock".to_owned(), "best.json".to_owned()];
            assert_eq!(names(root.path())[..2], expected);
        }
    }

    #[test]
    fn retention_of_none_keeps_all_and_the_one_just_saved_always_stays() {
        let root = tempfile::tempdir().unwrap();
        let all = CheckpointStore::open(root.path(), by_score(0, Direction::Higher)).unwrap();
        for step in 1..=5 {
            save(&all, 10 * step, step as f64);
        }
        assert_eq!(steps(&all), [10, 20, 30, 40, 50]);
        drop(all);
        let one = CheckpointStore::open(root.path(), RetentionConfig { keep_last: 1, ..Default::default() }).unwrap();
        save(&one, 25, 0.0);
        assert_eq!(steps(&one), [25, 50]);
        assert!(!root.path().join(BEST_FILE).exists());
        assert_eq!(steps(&one), [25, 50]);
    }

    #[test]
    fn going_back_moves_what_came_later_out_of_the_way() {
        let root = tempfile::tempdir().unwrap();
        let store = CheckpointStore::open(root.path(), by_score(0, Direction::Higher)).unwrap();
        for step in 1..=4 {
            save(&store, 10 * step, step as f64);
        }
        fs::write(root.path().join("log"), "40 lines").unwrap();
        assert_eq!(store.set_aside_after(40, &["log"]).unwrap(), None);
        let aside = root.path().join("set-aside-1");
        assert_eq!(store.set_aside_after(20, &["log", "absent"]).unwrap(), Some(aside.clone()));
        assert_eq!(steps(&store), [10, 20]);
        // What was set aside is a folder of checkpoints like any other, and the best is one of those that are left.
        assert_eq!(names(&aside), ["log", "step-00000030", "step-00000040"]);
        assert_eq!(read(&scan(&aside).unwrap().latest().unwrap().path).unwrap().manifest.step, 40);
        assert!(fs::read_to_string(root.path().join(BEST_FILE)).unwrap().contains("step-00000020"));
        save(&store, 25, 0.0);
        assert_eq!(store.set_aside_after(10, &[]).unwrap(), Some(root.path().join("set-aside-2")));
        assert_eq!(steps(&store), [10]);
    }

    #[test]
    fn a_choice_is_found_or_told_what_there_is() {
        let root = tempfile::tempdir().unwrap();
        let store = CheckpointStore::open(root.path(), by_score(0, Direction::Higher)).unwrap();
        assert_eq!(store.choose(Choice::Newest).unwrap(), (None, vec![]));
        for choice in [Choice::Best, Choice::Step(3)] {
            assert!(store.choose(choice).unwrap_err().to_string().contains("there is none"));
        }
        for (step, score) in [(10, 1.0), (20, 5.0), (30, 2.0)] {
            save(&store, step, score);
        }
        let chosen = |choice| store.choose(choice).unwrap().0.unwrap();
        assert_eq!(chosen(Choice::Newest), store.folder_of(30));
        assert_eq!(chosen(Choice::Best), store.folder_of(20));
        assert_eq!(chosen(Choice::Step(10)), store.folder_of(10));
        let error = store.choose(Choice::Step(11)).unwrap_err().to_string();
        assert!(error.contains("no whole checkpoint of step 11: there are steps 10, 20, 30"), "{error}");
        // A damaged one is not there, and the message says why.
        fs::write(store.folder_of(20).join(MANIFEST_FILE), "{").unwrap();
        let error = store.choose(Choice::Step(20)).unwrap_err().to_string();
        assert!(error.contains("there are steps 10, 30;") && error.contains("passed over"), "{error}");
        assert_eq!(chosen(Choice::Best), store.folder_of(30));
    }

    #[test]
    fn leftovers_of_a_kill_are_cleared_and_never_chosen() {
        let root = tempfile::tempdir().unwrap();
        let store = CheckpointStore::open(root.path(), RetentionConfig::default()).unwrap();
        save(&store, 1, 0.0);
        drop(store);
        let partial = root.path().join(".partial-abc");
        fs::create_dir_all(&partial).unwrap();
        fs::write(partial.join(MODEL_FILE), "half").unwrap();
        fs::write(root.path().join(".partial-file"), "half").unwrap();
        // A kill between moving the old folder aside and naming the new one: the old one comes back.
        let aside = root.path().join(".replaced-abc");
        fs::create_dir_all(&aside).unwrap();
        fs::rename(root.path().join("step-00000001"), aside.join("old")).unwrap();
        let store = CheckpointStore::open(root.path(), RetentionConfig::default()).unwrap();
        assert_eq!(names(root.path()), [".lock", "step-00000001"]);
        read(&store.latest().unwrap().0.unwrap()).unwrap();
        drop(store);
        // A kill just after naming the new one: the old one goes.
        fs::create_dir_all(&aside).unwrap();
        copy_folder(&root.path().join("step-00000001"), &aside.join("old"));
        CheckpointStore::open(root.path(), RetentionConfig::default()).unwrap();
        assert_eq!(names(root.path()), [".lock", "step-00000001"]);
    }

    fn copy_folder(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for (name, path) in entries(from).unwrap() {
            fs::copy(path, to.join(name)).unwrap();
        }
    }

    #[test]
    fn damaged_folders_are_passed_over_with_a_warning() {
        type Damage = fn(&Path);
        let cases: [(&str, Damage); 6] = [
            ("manifest.json", |path| fs::remove_file(path.join(MANIFEST_FILE)).unwrap()),
            ("manifest.json", |path| fs::write(path.join(MANIFEST_FILE), "{\"format_version\": 1, \"st").unwrap()),
            ("expected format_version 1, got 2", |path| {
                fs::write(path.join(MANIFEST_FILE), "{\"format_version\": 2, \"new\": 0}").unwrap();
            }),
            ("expected", |path| {
                let model = path.join(MODEL_FILE);
                let length = fs::metadata(&model).unwrap().len();
                File::options().write(true).open(model).unwrap().set_len(length - 1).unwrap();
            }),
            ("optimizer.safetensors", |path| fs::remove_file(path.join(OPTIMIZER_FILE)).unwrap()),
            ("of step 1", |path| {
                fs::copy(path.with_file_name("step-00000001").join(MANIFEST_FILE), path.join(MANIFEST_FILE)).unwrap();
            }),
        ];
        for (expected, damage) in cases {
            let root = tempfile::tempdir().unwrap();
            let store = CheckpointStore::open(root.path(), RetentionConfig::default()).unwrap();
            let good = save(&store, 1, 0.0);
            let bad = save(&store, 2, 0.0);
            damage(&bad);
            let (latest, warnings) = store.latest().unwrap();
            assert_eq!(latest, Some(good), "{expected}");
            assert!(warnings.len() == 1 && warnings[0].contains(expected), "{expected}: {warnings:?}");
            assert!(warnings[0].contains("step-00000002"));
        }
    }

    #[test]
    fn a_changed_byte_is_found_on_reading() {
        let root = tempfile::tempdir().unwrap();
        let store = CheckpointStore::open(root.path(), RetentionConfig::default()).unwrap();
        for name in [MODEL_FILE, OPTIMIZER_FILE] {
            let path = save(&store, 3, 0.0);
            let file = path.join(name);
            let mut bytes = fs::read(&file).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(&file, bytes).unwrap();
            let error = read(&path).unwrap_err();
            assert!(error.to_string().contains(name) && error.to_string().contains("SHA-256"), "{error}");
            assert!(error.hint().unwrap().contains("older one"));
        }
        assert!(read(&root.path().join("step-00000009")).is_err());
    }

    #[test]
    fn saving_a_step_again_replaces_it() {
        let root = tempfile::tempdir().unwrap();
        let store = CheckpointStore::open(root.path(), by_score(1, Direction::Higher)).unwrap();
        save(&store, 5, 1.0);
        let digest = read(&store.folder_of(5)).unwrap().manifest.files;
        save(&store, 5, 2.0);
        let again = read(&store.folder_of(5)).unwrap().manifest;
        assert_eq!((again.files, again.metrics["score"]), (digest, 2.0));
        assert_eq!(names(root.path()), [".lock", "best.json", "step-00000005"]);
    }

    #[test]
    fn a_failed_save_keeps_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("checkpoints");
        let store = CheckpointStore::open(&root, RetentionConfig { keep_last: 1, ..Default::default() }).unwrap();
        save(&store, 1, 0.0);
        // The model is written already when the optimizer turns out to have a type without a place in the file.
        let complex = vec![("c".to_owned(), Tensor::zeros([2], (Kind::ComplexFloat, Device::Cpu)))];
        for step in [1, 2] {
            assert!(store.save(manifest(step, 0.0), &tensors(9.0), &complex).is_err());
            assert_eq!(names(&root), [".lock", "step-00000001"]);
            let model = read(&store.folder_of(1)).unwrap().model;
            assert_eq!(model.load("a", Kind::Float, Device::Cpu).unwrap().double_value(&[0, 0]), 1.0);
        }
        // The folder is gone and a file stands in its place.
        fs::rename(&root, folder.path().join("moved")).unwrap();
        fs::write(&root, "a file").unwrap();
        let error = store.save(manifest(2, 0.0), &tensors(9.0), &tensors(9.0)).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
        read(&folder.path().join("moved/step-00000001")).unwrap();
        drop(store);
        assert!(CheckpointStore::open(&root, RetentionConfig::default()).is_err());
    }

    #[test]
    fn a_second_writer_is_refused_and_a_reader_is_not() {
        let root = tempfile::tempdir().unwrap();
        let store = CheckpointStore::open(root.path(), RetentionConfig::default()).unwrap();
        save(&store, 1, 0.0);
        let error = CheckpointStore::open(root.path(), RetentionConfig::default()).unwrap_err();
        assert!(error.to_string().contains("another run"), "{error}");
        assert_eq!(scan(root.path()).unwrap().checkpoints.len(), 1);
        drop(store);
        CheckpointStore::open(root.path(), RetentionConfig::default()).unwrap();
        assert!(scan(&root.path().join("absent")).unwrap().checkpoints.is_empty());
    }
}
