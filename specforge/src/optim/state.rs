//! The optimizer's state on its way to and from checkpoints, which hold whole tensors whatever wrote them.

use tch::{Device, Kind, Tensor};

use super::cut::Cut;
use super::optimizer::Optimizer;
use super::parameter::Part;
use crate::error::{Error, Result};
use crate::weights::WeightsFolder;

/// Where one tensor of a checkpoint lives here.
struct Place {
    /// Its name in the file.
    name: String,
    /// Shape of the whole.
    shape: Vec<i64>,
    /// Which elements of it this rank keeps.
    cut: Cut,
    /// Those elements, the live ones.
    part: Tensor,
}

impl Optimizer<'_> {
    /// Everything a resumed run needs beside the model's own values, as whole tensors.
    ///
    /// Without sharding these are the live tensors, not copies. With it, every rank must call this: the first one
    /// receives copies in host memory, gathered one tensor at a time, the others an empty list.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let _no_grad = tch::no_grad_guard();
        let mut state = Vec::new();
        for place in self.places() {
            let whole = place.cut.gathered(&place.part, self.group)?;
            if !self.sharded {
                state.push((place.name, whole));
            } else if self.group.is_first() {
                // A part that is not cut is the live tensor itself, and where that is the host's it has to be copied, too.
                let whole = whole.f_view(place.shape.as_slice())?;
                state.push((place.name, whole.f_to_device_(Device::Cpu, whole.kind(), false, true)?));
            }
        }
        Ok(state)
    }

    /// Whether [`Optimizer::state`] gives the live tensors, and not copies.
    pub fn state_is_live(&self) -> bool {
        !self.sharded
    }

    /// Takes over what [`Optimizer::state`] gave on any number of ranks, bit for bit. Masters reach the model; values whose
    /// masters are not in it have to be restored from the model's file.
    ///
    /// Every rank calls this. The first one reads `folder` and hands on one tensor at a time; the others need no folder.
    /// What the first one cannot read is an error on every rank. Names, shapes and types are checked before anything is
    /// changed.
    pub fn load_state(&mut self, folder: Option<&WeightsFolder>) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let places = self.places();
        let folder = folder.filter(|_| self.group.is_first());
        self.agree(if self.group.is_first() { check(folder, &places) } else { Ok(()) })?;
        for mut place in places {
            let whole = self.whole(folder, &place)?;
            place.part.f_copy_(&place.cut.part(&whole)?)?;
        }
        // Other values are left alone: the first rank may be the only one that has restored them yet.
        let mut mastered = self.parameters.iter_mut().filter(|parameter| parameter.saves_master());
        mastered.try_for_each(|parameter| parameter.publish(self.group))?;
        let _ = self.bad_count.f_zero_()?;
        let _ = self.bad_steps.f_zero_()?;
        self.attempted = self.steps_taken()?;
        Ok(())
    }

    /// Bytes of what a checkpoint holds of the parameters beside the model, on this rank.
    pub fn state_bytes(&self) -> usize {
        let places = self.places();
        let parts = places.iter().map(|place| place.part.numel() * place.part.kind().elt_size_in_bytes());
        parts.skip(1).sum() // the count of steps is no state of a parameter
    }

    /// Everything a checkpoint holds, in its order, the same on every rank.
    fn places(&self) -> Vec<Place> {
        let step = Place {
            name: "step".to_owned(),
            shape: Vec::new(),
            cut: Cut::new(1, 0, 1),
            part: self.step.shallow_clone(),
        };
        let of_parameters = self.parameters.iter().flat_map(|parameter| {
            parameter.state().into_iter().map(|(part, tensor): (Part, &Tensor)| Place {
                name: part.key(&parameter.slot.name),
                shape: parameter.slot.value.size(),
                cut: parameter.cut,
                part: tensor.shallow_clone(),
            })
        });
        std::iter::once(step).chain(of_parameters).collect()
    }

    /// One tensor of the first rank's folder, on every rank.
    fn whole(&self, folder: Option<&WeightsFolder>, place: &Place) -> Result<Tensor> {
        let (kind, device) = (place.part.kind(), place.part.device());
        let read = folder.map(|folder| read(folder, place)?.f_to_device(device).map_err(Error::from)).transpose();
        let read = self.agree(read)?;
        let whole = match read {
            Some(whole) => whole,
            None => Tensor::f_empty(&place.shape, (kind, device))?,
        };
        if whole.numel() > 0 {
            self.group.broadcast(&whole, 0)?;
        }
        Ok(whole)
    }

    /// What the first rank could do, or an error on every rank that says why not.
    fn agree<T>(&self, outcome: Result<T>) -> Result<T> {
        let problem = outcome.as_ref().err().map(Error::to_string).unwrap_or_default();
        let problem = self.group.broadcast_bytes(problem.as_bytes(), 0)?;
        if self.group.is_first() || problem.is_empty() {
            return outcome;
        }
        let problem = format!("the first rank failed: {}", String::from_utf8_lossy(&problem));
        Err(Error::Peer { rank: self.group.rank(), operation: "loading the optimizer's state", problem })
    }
}

/// Whether a folder holds these tensors and no others.
fn check(folder: Option<&WeightsFolder>, places: &[Place]) -> Result<()> {
    let Some(folder) = folder else {
        return Err(Error::Failed("optimizer: the first rank has no state to load".to_owned()));
    };
    let expected: Vec<(String, Vec<i64>)> =
        places.iter().map(|place| (place.name.clone(), place.shape.clone())).collect();
    folder.check(&expected, |_| false)?;
    match places.iter().find(|place| folder.kind(&place.name) != Some(place.part.kind())) {
        None => Ok(()),
        Some(place) => {
            let (name, expected, got) = (&place.name, place.part.kind(), folder.kind(&place.name));
            let got = got.map_or("none".to_owned(), |kind| format!("{kind:?}"));
            Err(Error::bad_file(folder.path(), format!("`{name}`: expected type {expected:?}, got {got}")))
        }
    }
}

/// A copy in host memory. [`WeightsFolder::load`] would keep a tensor of the stored type mapped for the life of the
/// process, and with it the disk space of a checkpoint deleted long ago.
fn read(folder: &WeightsFolder, place: &Place) -> Result<Tensor> {
    let kind: Kind = place.part.kind();
    if kind == Kind::Float {
        // By way of float64, which loses nothing and gives the file's pages back piece by piece.
        return Ok(folder.load(&place.name, Kind::Double, Device::Cpu)?.f_to_kind(kind)?);
    }
    let bytes = folder.bytes(&place.name).unwrap_or_default();
    Ok(Tensor::f_from_data_size(bytes, &place.shape, kind)?)
}
