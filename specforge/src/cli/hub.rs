//! Names of a hub where paths could stand: fetched before anything is opened, the same commit for every process of a run.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::note;
use crate::config::RunConfig;
use crate::decode::drafter::open::PROMPT_LOOKUP;
use crate::dist::{Meeting, SharedWork};
use crate::error::{Error, Result};
use crate::hub::{self, Name, Wanted};

/// The key of a draft that a run starts from.
const START: &str = "init_from";

/// Somewhere that a name may stand. What was fetched stands there afterwards as a path.
pub(super) enum Place<'a> {
    /// A model.
    Model(&'a mut PathBuf, Wanted),
    /// Who guesses: a draft, or no path at all.
    Drafter(&'a mut String),
    /// The draft that a run starts from. Where it is not needed any more, it need not be there.
    Start(&'a mut Value, bool),
    /// A file of data.
    Data(&'a mut PathBuf),
}

impl Place<'_> {
    /// What stands there.
    fn text(&self) -> Option<PathBuf> {
        match self {
            Place::Model(path, _) | Place::Data(path) => Some((*path).clone()),
            Place::Drafter(text) => Some(&**text).filter(|text| *text != PROMPT_LOOKUP).map(PathBuf::from),
            Place::Start(value, _) => value.as_str().map(PathBuf::from),
        }
    }

    /// What it means on a hub; nothing where it is a path of this machine.
    fn remote(&self) -> Result<Option<Name>> {
        match (self.text(), self) {
            (None, _) => Ok(None),
            (Some(text), Place::Data(_)) => hub::remote_data(&text),
            (Some(text), _) => hub::remote_model(&text),
        }
    }

    /// Whether it could mean something on a hub, wherever this is read.
    fn has_form_of_a_name(&self) -> Result<bool> {
        let Some(text) = self.text() else { return Ok(false) };
        let text = text.to_string_lossy();
        match self {
            Place::Data(_) => Ok(Name::data(&text)?.is_some()),
            _ => Ok(Name::model(&text)?.is_some()),
        }
    }

    /// Fetches what a name means, and puts the path in its place.
    fn fetch(&mut self, name: &Name) -> Result<()> {
        let wanted = match self {
            Place::Model(_, wanted) => Some(*wanted),
            Place::Drafter(_) | Place::Start(..) => Some(Wanted::Draft),
            Place::Data(_) => None,
        };
        let path = match hub::look_up(name, wanted) {
            Ok(path) => path,
            Err(error) if matches!(self, Place::Start(_, true)) => {
                note(format!("warning: {}: {error}; this run has its draft already", crate::export::START_KEY));
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        match self {
            Place::Model(place, _) | Place::Data(place) => **place = path,
            Place::Drafter(place) => **place = utf8(&path)?,
            Place::Start(place, _) => **place = Value::from(utf8(&path)?),
        }
        Ok(())
    }
}

fn utf8(path: &Path) -> Result<String> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| Error::bad_file(path, "has a name that is not UTF-8").with_hint("set HF_HOME to another folder"))
}

/// Fetches everything that is named as on a hub. The first process asks what a name means now; the others fetch that commit,
/// into the same cache or one of their own.
pub(super) fn fetch(mut places: Vec<Place<'_>>, meeting: Option<&Meeting>) -> Result<()> {
    let mut any = false;
    for place in &places {
        any |= place.has_form_of_a_name()?;
    }
    if !any {
        return Ok(());
    }
    let work = SharedWork::of(meeting, "hub");
    let commits = work.from_first("fetching from the hub", || {
        let mut commits = Vec::new();
        for place in &mut places {
            let name = place.remote()?;
            if let Some(name) = &name {
                place.fetch(name)?;
            }
            let found = place.text().and_then(|path| hub::named(&path));
            commits.push(found.and_then(|name| name.revision));
        }
        Ok(json!(commits).to_string().into_bytes())
    })?;
    if work.is_first() {
        return Ok(());
    }
    let commits: Vec<Option<String>> = serde_json::from_slice(&commits)
        .map_err(|error| Error::Failed(format!("what the first process found on the hub cannot be read: {error}")))?;
    for (place, commit) in places.iter_mut().zip(commits) {
        if let Some(name) = place.remote()? {
            let name = commit.map_or_else(|| name.clone(), |commit| name.at(&commit));
            place.fetch(&name)?;
        }
    }
    Ok(())
}

/// What a command reads of what a configuration names.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reads {
    /// Files of the target.
    pub(super) target: Wanted,
    /// The files of data.
    pub(super) data: bool,
    /// The draft that a run starts from; `Some(true)` where it need not be there any more.
    pub(super) start: Option<bool>,
}

/// Fetches what a configuration names.
pub(super) fn fetch_for(config: &mut RunConfig, reads: Reads, meeting: Option<&Meeting>) -> Result<()> {
    let mut places = vec![Place::Model(&mut config.target.path, reads.target)];
    // A plan may be made of the configuration alone.
    if reads.target == Wanted::Description && config.target.config.is_some() {
        places.clear();
    }
    if let (Some(spare), Some(value)) = (reads.start, config.draft.get_mut(START)) {
        places.push(Place::Start(value, spare));
    }
    if reads.data {
        places.extend(config.data.train.iter_mut().chain(&mut config.data.eval).map(Place::Data));
    }
    fetch(places, meeting)
}

/// A configuration as it is written down: with the names that its paths were fetched by, as of their commits.
pub(super) fn recorded(config: &RunConfig) -> Value {
    let mut value = json!(config);
    let name = |value: &mut Value| {
        if let Some(name) = value.as_str().and_then(|path| hub::named(Path::new(path))) {
            *value = Value::from(name.to_string());
        }
    };
    name(&mut value["target"]["path"]);
    if let Some(start) = value["draft"].get_mut(START) {
        name(start);
    }
    for key in ["train", "eval"] {
        value["data"][key].as_array_mut().into_iter().flatten().for_each(name);
    }
    value
}

/// The path of a target that a run wrote down. A name that was written down bears its commit; anything else was a path.
pub(super) fn recorded_target(text: &str) -> (PathBuf, Option<String>) {
    let name = Name::model(text).ok().flatten().filter(|name| name.commit().is_some());
    let Some(name) = name else { return (PathBuf::from(text), None) };
    let path = hub::look_up(&name, Some(Wanted::Target)).unwrap_or_else(|error| {
        note(format!("warning: {error}"));
        PathBuf::from(text)
    });
    (path, Some(name.repo))
}
