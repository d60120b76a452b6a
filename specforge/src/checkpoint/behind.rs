//! Checkpoints that are written while training goes on.
//!
//! What is saved is copied into the host's memory at once; a thread makes files of it. One save is on its way at most: the
//! next one, whoever asks what is best so far, and the end of the run wait for it. What went wrong is reported by whoever
//! waits or looks next. A process that is killed meanwhile leaves what a killed save always leaves: the checkpoints before.

use std::any::Any;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use tch::{Device, Tensor};

use super::manifest::Manifest;
use super::store::{CheckpointStore, Saved};
use crate::error::{Error, Result, foreign};
use crate::progress;

/// Saves into a store, behind the work.
#[derive(Debug)]
pub struct Saver {
    store: Arc<CheckpointStore>,
    behind: Behind<Saved>,
}

impl Saver {
    /// Saves into this store.
    pub fn new(store: CheckpointStore) -> Self {
        Self { store: Arc::new(store), behind: Behind::new("checkpoint") }
    }

    /// The store. A save on its way is not in it yet.
    pub fn store(&self) -> &CheckpointStore {
        &self.store
    }

    /// Begins to save what the tensors hold now; they may change as soon as this returns. Waits for the save before, and
    /// returns its warnings.
    pub fn begin(&mut self, manifest: Manifest, model: Tensors, optimizer: Tensors) -> Result<Vec<String>> {
        let warnings = self.finish()?;
        let (model, optimizer) = (model.on_host()?, optimizer.on_host()?);
        let store = Arc::clone(&self.store);
        self.behind.begin(move || store.save(manifest, &model, &optimizer))?;
        Ok(warnings)
    }

    /// The warnings of a save that has come to its end since somebody looked. Does not wait.
    pub fn look(&mut self) -> Result<Vec<String>> {
        Ok(self.behind.look()?.map(|saved| saved.warnings).unwrap_or_default())
    }

    /// Waits until what was begun is on disk, and returns the warnings.
    pub fn finish(&mut self) -> Result<Vec<String>> {
        Ok(self.behind.finish()?.map(|saved| saved.warnings).unwrap_or_default())
    }
}

/// Named tensors to save.
#[derive(Debug)]
pub enum Tensors {
    /// Those that training changes: they are copied.
    Live(Vec<(String, Tensor)>),
    /// Copies in the host's memory that nobody else has.
    Copies(Vec<(String, Tensor)>),
}

impl Tensors {
    fn on_host(self) -> Result<Vec<(String, Tensor)>> {
        match self {
            Tensors::Copies(tensors) => Ok(tensors),
            Tensors::Live(tensors) => {
                let copy = |(name, tensor): (String, Tensor)| {
                    let values = tensor.f_detach()?.f_to_device_(Device::Cpu, tensor.kind(), false, true)?;
                    Ok::<_, Error>((name, values.f_contiguous()?))
                };
                tensors.into_iter().map(copy).collect()
            }
        }
    }
}

/// One piece of work at a time on a thread of its own. Dropped, it waits.
#[derive(Debug)]
struct Behind<T> {
    name: &'static str,
    running: Option<JoinHandle<Result<T>>>,
}

impl<T: Send + 'static> Behind<T> {
    fn new(name: &'static str) -> Self {
        Self { name, running: None }
    }

    /// Begins `work`. The piece before must have been waited for.
    fn begin(&mut self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<()> {
        let thread = Builder::new().name(self.name.to_owned()).spawn(work);
        self.running = Some(thread.map_err(|error| Error::Failed(format!("cannot start a thread: {error}")))?);
        Ok(())
    }

    /// What came of a piece that has come to its end.
    fn look(&mut self) -> Result<Option<T>> {
        match self.running.as_ref().is_some_and(JoinHandle::is_finished) {
            true => self.finish(),
            false => Ok(None),
        }
    }

    /// Waits for the piece, where there is one.
    fn finish(&mut self) -> Result<Option<T>> {
        let Some(running) = self.running.take() else { return Ok(None) };
        let ended = running.join();
        let failed = |payload: Box<dyn Any + Send>| {
            let text = foreign::panic_text(&*payload);
            Err(Error::Failed(format!("the thread `{}` failed: {text}", self.name)))
        };
        ended.unwrap_or_else(failed).map(Some)
    }
}

impl<T> Drop for Behind<T> {
    fn drop(&mut self) {
        // Something else has gone wrong: that is the error, and this is said beside it.
        if let Some(Ok(Err(error))) = self.running.take().map(JoinHandle::join) {
            progress::say(&format!("warning: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::mpsc;

    use tch::Kind;

    use super::super::manifest::read;
    use super::super::retention::RetentionConfig;
    use super::*;

    /// Work goes on while a piece is under way, the next piece waits for it, and so does dropping.
    #[test]
    fn one_piece_is_under_way_while_others_work() {
        let (release, held) = mpsc::channel::<()>();
        let (sender, events) = mpsc::channel();
        let mut behind = Behind::new("test");
        let say = sender.clone();
        behind
            .begin(move || {
                // Never released if whoever began it waited for its end.
                held.recv().unwrap();
                say.send("first piece").unwrap();
                Ok(1)
            })
            .unwrap();
        assert_eq!(behind.look().unwrap(), None);
        sender.send("work").unwrap();
        release.send(()).unwrap();
        assert_eq!(behind.finish().unwrap(), Some(1));
        behind
            .begin(move || {
                sender.send("second piece").unwrap();
                Ok(2)
            })
            .unwrap();
        drop(behind);
        assert_eq!(events.iter().collect::<Vec<_>>(), ["work", "first piece", "second piece"]);
    }

    #[test]
    fn what_went_wrong_is_reported_once_by_whoever_comes_next() {
        let mut behind = Behind::<()>::new("test");
        behind.begin(|| Err(Error::Failed("the disk is full".to_owned()))).unwrap();
        assert!(behind.finish().unwrap_err().to_string().contains("the disk is full"));
        assert_eq!(behind.finish().unwrap(), None);
        behind.begin(|| panic!("a mistake")).unwrap();
        assert!(behind.finish().unwrap_err().to_string().contains("the thread `test` failed: a mistake"));
    }

    fn saver(root: &Path) -> Saver {
        Saver::new(CheckpointStore::open(root, RetentionConfig::default()).unwrap())
    }

    fn named(value: &Tensor) -> Tensors {
        Tensors::Live(vec![("a".to_owned(), value.shallow_clone())])
    }

    /// What is written is what the tensors held when the save began.
    #[test]
    fn a_save_is_a_picture_of_its_moment() {
        let folder = tempfile::tempdir().unwrap();
        let mut saver = saver(folder.path());
        let mut value = Tensor::zeros([1000, 3], (Kind::Float, Device::Cpu)).transpose(0, 1);
        for step in 1..=3 {
            let _ = value.fill_(step as f64);
            saver.begin(Manifest { step, ..Manifest::default() }, named(&value), named(&value)).unwrap();
            let _ = value.fill_(-1.0);
        }
        assert_eq!(saver.finish().unwrap(), Vec::<String>::new());
        for step in 1..=3 {
            let saved = read(&saver.store().folder_of(step)).unwrap();
            for folder in [saved.model, saved.optimizer] {
                let values = folder.load("a", Kind::Float, Device::Cpu).unwrap();
                assert_eq!(values, Tensor::full([3, 1000], step as f64, (Kind::Float, Device::Cpu)));
            }
        }
    }

    /// A save that fails is an error of the next one, and the checkpoint before is good.
    #[test]
    fn a_failed_save_is_an_error_with_its_path() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("run");
        let mut saver = saver(&root);
        let value = Tensor::zeros([2], (Kind::Float, Device::Cpu));
        let begin = |saver: &mut Saver, step| {
            saver.begin(Manifest { step, ..Manifest::default() }, named(&value), named(&value))
        };
        begin(&mut saver, 1).unwrap();
        saver.finish().unwrap();
        // The folder is gone and a file stands in its place.
        std::fs::rename(&root, folder.path().join("moved")).unwrap();
        std::fs::write(&root, "a file").unwrap();
        begin(&mut saver, 2).unwrap();
        let error = begin(&mut saver, 3).unwrap_err().to_string();
        assert!(error.contains(&root.display().to_string()), "{error}");
        read(&folder.path().join("moved/step-00000001")).unwrap();
    }
}
