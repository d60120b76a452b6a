//! Token skip: in a pass over a block, rows whose states have hardly moved since the pass before leave the later layers out.
//!
//! A row is compared by what the first `layer` layers make of it, which every row runs. A row that is skipped keeps what it
//! has of the layers behind: its states, its keys and values, its logits; it is computed in the next pass. The published
//! notebook this grew from compared rows of different positions, turned heads by positions within the block, and projected the
//! state of layer `layer` of a skipped row: here a state knows at which positions it is, only states of the same positions
//! are ever compared, and what a skipped row has is never recomputed from elsewhere.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

#[cfg(test)]
use super::fault::{self, DiffusionFault};
use super::network::{Network, Rows, View};
use crate::device;
use crate::error::{Error, Result};
use crate::nn::KvCache;

/// When a row leaves the later layers out.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenSkip {
    /// Layers that every row runs, and is compared by.
    pub layer: usize,
    /// The mean of a row's cosines must be more than this; 1 skips nothing.
    pub threshold: f64,
    /// None of them may be less than this.
    pub outlier: f64,
    /// Every so many passes over a block nothing is skipped; 0 for never.
    pub refresh: usize,
}

/// How texts say it.
const FORM: &str = "layer=K[,threshold=T][,outlier=O][,refresh=N]";

impl FromStr for TokenSkip {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut skip = Self { layer: 0, threshold: 0.95, outlier: 0.7, refresh: 3 };
        let mut seen: Vec<&str> = Vec::new();
        for part in text.split(',') {
            let refuse = || format!("expected {FORM}, got `{text}`");
            let (key, value) = part.split_once('=').ok_or_else(refuse)?;
            if seen.contains(&key) {
                return Err(format!("`{key}` is there twice in `{text}`"));
            }
            seen.push(key);
            let number = || value.parse::<f64>().ok().filter(|number| number.is_finite()).ok_or_else(refuse);
            match key {
                "layer" => skip.layer = value.parse().map_err(|_| refuse())?,
                "refresh" => skip.refresh = value.parse().map_err(|_| refuse())?,
                "threshold" => skip.threshold = number()?,
                "outlier" => skip.outlier = number()?,
                _ => return Err(refuse()),
            }
        }
        match seen.contains(&"layer") {
            true => Ok(skip),
            false => Err(format!("expected {FORM}, got `{text}`: `layer` is missing")),
        }
    }
}

impl fmt::Display for TokenSkip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layer, threshold, outlier, refresh } = self;
        write!(f, "layer={layer},threshold={threshold},outlier={outlier},refresh={refresh}")
    }
}

impl TokenSkip {
    /// Refuses a layer that the model has not.
    pub fn check(&self, layers: usize) -> Result<(), String> {
        match (1..layers).contains(&self.layer) {
            true => Ok(()),
            false => Err(format!(
                "layer: expected 1 to {} of the {layers} layers, got {}",
                layers.saturating_sub(1),
                self.layer
            )),
        }
    }

    /// Whether nothing is skipped in pass number `step` over a block, of which the first is over the whole text.
    pub fn forces(&self, step: usize) -> bool {
        self.refresh > 0 && step.is_multiple_of(self.refresh)
    }
}

/// What layers gave for a view. It owns the positions it is of: two of them meet in [`Outputs::similarity`] alone, which
/// refuses those of other positions, and nobody looks at a row by a number that counts from elsewhere.
#[derive(Debug)]
pub struct Outputs {
    view: View,
    /// Of each layer, `[R, W, H]`, before the last norm.
    layers: Vec<Tensor>,
}

impl Outputs {
    /// Cosines of what the first `count` layers gave with what they gave another time, `[R, k, W]`, in float64: bfloat16 has
    /// no number between 0.996 and 1. Rounding makes no cosine larger than 1.
    pub fn similarity(&self, other: &Self, count: usize) -> Result<Tensor> {
        if self.view != other.view {
            let of = |view: &View| format!("{} rows from {:?}", view.width, view.origin);
            let (mine, theirs) = (of(&self.view), of(&other.view));
            return Err(Error::Failed(format!("states of different positions cannot be compared: {mine}, {theirs}")));
        }
        Ok(self.cosines(other, count))
    }

    /// [`Outputs::similarity`] of the same positions.
    fn cosines(&self, other: &Self, count: usize) -> Tensor {
        let cosine = |(before, now): (&Tensor, &Tensor)| {
            let [before, now] = [before, now].map(|state| state.to_kind(Kind::Double));
            #[cfg(test)]
            if fault::active(DiffusionFault::NarrowCosines) {
                return fault::narrow_cosine(&before, &now);
            }
            let sum = |product: Tensor| product.sum_dim_intlist([-1i64].as_slice(), false, Kind::Double); // [R, W]
            let norms = sum(before.square()).sqrt() * sum(now.square()).sqrt();
            (sum(before * now) / norms).clamp_max(1.0)
        };
        let cosines: Vec<Tensor> = self.layers.iter().zip(&other.layers).take(count).map(cosine).collect();
        Tensor::stack(&cosines, 1) // [R, k, W]
    }

    /// Of each layer, `[R, W, H]`, before the last norm.
    pub fn layers(&self) -> &[Tensor] {
        &self.layers
    }
}

/// What the model made of a view in its last pass.
#[derive(Debug)]
pub struct BlockState {
    view: View,
    outputs: Outputs,
    /// Rows of the view that have logits, the first of it.
    block: i64,
    /// `[R, W]`
    ids: Tensor,
    /// `[R, L, V]`
    logits: Tensor,
    /// Which rows left the later layers out, `[R, W]` booleans.
    skipped: Tensor,
    /// Passes over the block so far; the one over the whole text is number 0.
    step: usize,
}

/// What happened in a pass.
#[derive(Debug)]
pub struct Stepped {
    /// Which rows ran all layers, `[R, W]` booleans.
    pub active: Tensor,
    /// Cosines of the first layers' outputs with those of the pass before, `[R, k, W]` float64.
    pub cosines: Tensor,
    /// First positions of the states that were compared, `[R]` each: those of the pass before, and those of this.
    pub compared: [Vec<i64>; 2],
    /// Positions by which the heads of the active rows were turned, of each row.
    pub turned: Vec<Vec<i64>>,
}

impl BlockState {
    /// Takes whole texts through the model into an empty cache, and keeps what it made of a view, whose first `block` rows get
    /// logits. This is the only place where something of a whole text becomes something of a view.
    pub fn whole(network: &Network<'_>, rows: &Rows<'_>, view: View, block: i64, cache: &mut KvCache) -> Result<Self> {
        let mut hidden = Vec::with_capacity(network.layers());
        let last = network.whole(rows, &view, Some(cache), &mut |_, state| hidden.push(state))?;
        let logits = network.logits(&last.narrow(1, 0, block));
        let ids = network.ids(rows, &view);
        let skipped = Tensor::zeros_like(&ids).to_kind(Kind::Bool);
        let outputs = Outputs { view: view.clone(), layers: hidden };
        #[cfg(test)]
        let outputs = match fault::active(DiffusionFault::OtherOrigin) {
            true => Self::from_the_start(network, rows, view.width)?,
            false => outputs,
        };
        Ok(Self { view, outputs, block, ids, logits, skipped, step: 0 })
    }

    /// Logits of the block, `[R, L, V]`.
    pub fn logits(&self) -> &Tensor {
        &self.logits
    }

    /// What each layer gave.
    pub fn outputs(&self) -> &Outputs {
        &self.outputs
    }

    /// The next pass over the view, whose texts may have changed there.
    pub fn step(
        &mut self,
        network: &Network<'_>,
        rows: &Rows<'_>,
        skip: &TokenSkip,
        cache: &mut KvCache,
    ) -> Result<Stepped> {
        let (device, layers) = (network.device(), network.layers());
        #[cfg(test)]
        let skip = &fault::seen(DiffusionFault::OtherThreshold, *skip, |skip| TokenSkip { threshold: -1.0, ..skip });
        let view = self.view.clone();
        let ids = network.ids(rows, &view);
        let positions = view.positions(device);
        // 1. The first layers, for every row.
        let mut outputs = Outputs { view, layers: Vec::with_capacity(layers) };
        let start = network.embed(&ids)?; // [R, W, H]
        let split = network.some((0, skip.layer), &start, (&positions, &positions), cache, &mut |_, state| {
            outputs.layers.push(state);
        })?;
        // 2. Which rows have hardly moved. NaN is not more than a threshold.
        let compared = [&self.outputs, &outputs].map(|outputs| outputs.view.origin.clone());
        #[cfg(not(test))]
        let cosines = self.outputs.similarity(&outputs, skip.layer)?; // [R, k, W]
        #[cfg(test)]
        let cosines = match fault::active(DiffusionFault::OtherOrigin) {
            true => self.outputs.cosines(&outputs, skip.layer),
            false => self.outputs.similarity(&outputs, skip.layer)?,
        };
        let step = self.step + 1;
        let stable = match skip.forces(step) {
            true => self.skipped.zeros_like(),
            false => {
                let near = cosines.amin([1i64].as_slice(), false).ge(skip.outlier);
                let mean = cosines.mean_dim([1i64].as_slice(), false, Kind::Double).gt(skip.threshold);
                let unchanged = ids.eq_tensor(&self.ids);
                near.logical_and(&mean).logical_and(&unchanged).logical_and(&self.skipped.logical_not())
            }
        }; // [R, W]
        let active = stable.logical_not();
        // 3. The later layers, for the others.
        let chosen = Chosen::of(&active);
        outputs.layers.extend(self.outputs.layers[skip.layer..].iter().map(Tensor::copy));
        let mut logits = self.logits.copy();
        #[cfg(test)]
        if fault::active(DiffusionFault::EarlyLogits) {
            let early = network.logits(&split.narrow(1, 0, self.block)); // [R, L, V]
            logits = early.where_self(&stable.narrow(1, 0, self.block).unsqueeze(2), &logits);
        }
        let mut turned = vec![Vec::new(); rows.count() as usize];
        if let Some(chosen) = &chosen {
            let some = chosen.gather(&split); // [R, A, H]
            let places = chosen.gather(&positions.unsqueeze(2)).squeeze_dim(2); // [R, A]
            let slots = places.where_self(&chosen.real, &Tensor::from(cache.len()).to_device(device));
            #[cfg(test)]
            let places = fault::seen(DiffusionFault::LocalPositions, places, |_| chosen.place.shallow_clone());
            turned = chosen.of_rows(&places)?;
            let last = network.some((skip.layer, layers), &some, (&places, &slots), cache, &mut |layer, state| {
                chosen.scatter(&mut outputs.layers[layer], &state);
            })?;
            chosen.project(&mut logits, self.block, &last, |rows| network.logits(rows));
        }
        (self.ids, self.outputs, self.logits, self.skipped, self.step) = (ids, outputs, logits, stable, step);
        Ok(Stepped { active, cosines, compared, turned })
    }

    /// What layers made of the first positions of whole texts, for a mistake that tests seed.
    #[cfg(test)]
    fn from_the_start(network: &Network<'_>, rows: &Rows<'_>, width: i64) -> Result<Outputs> {
        let view = View { origin: vec![0; rows.count() as usize], width };
        let mut layers = Vec::new();
        let _ = network.whole(rows, &view, None, &mut |_, state| layers.push(state))?;
        Ok(Outputs { view, layers })
    }

    /// Says which rows left the later layers out in the last pass, `[R, W]`, so that a test can choose who runs in the next.
    #[cfg(test)]
    pub(super) fn pretend_skipped(&mut self, skipped: &Tensor) {
        self.skipped = skipped.shallow_clone();
    }

    /// Keeps the rows named, in that order.
    pub fn select_rows(&mut self, rows: &[i64]) {
        let index = device::send(&Tensor::from_slice(rows), self.ids.device());
        let kept = |tensor: &Tensor| tensor.index_select(0, &index);
        let Outputs { view, layers } = &mut self.outputs;
        for view in [&mut self.view, view] {
            view.origin = rows.iter().map(|&row| view.origin[row as usize]).collect();
        }
        *layers = layers.iter().map(kept).collect();
        self.ids = kept(&self.ids);
        self.logits = kept(&self.logits);
        self.skipped = kept(&self.skipped);
    }
}

/// Rows of a view that run on, put together; a text with fewer of them than another is padded.
struct Chosen {
    /// Place of each in its view, `[R, A]` int64.
    place: Tensor,
    /// Which are no padding, `[R, A]` booleans.
    real: Tensor,
    /// Of those that are none, one behind the other: their place in `[R A]`, and in `[R W]`.
    from: Tensor,
    to: Tensor,
    width: i64,
}

impl Chosen {
    /// Those that `active [R, W]` names; nothing where it names none.
    fn of(active: &Tensor) -> Option<Self> {
        let (width, device) = (active.size()[1], active.device());
        let counts = active.sum_dim_intlist([1i64].as_slice(), false, Kind::Int64); // [R]
        let most = counts.max().int64_value(&[]);
        if most == 0 {
            return None;
        }
        // Chosen rows first, each group in its order.
        let order = active.logical_not().to_kind(Kind::Int64).argsort_stable(true, 1, false); // [R, W]
        let place = order.narrow(1, 0, most); // [R, A]
        let real = Tensor::arange(most, (Kind::Int64, device)).unsqueeze(0).lt_tensor(&counts.unsqueeze(1)); // [R, A]
        let first = Tensor::arange(active.size()[0], (Kind::Int64, device)).unsqueeze(1) * width; // [R, 1]
        let from = real.flatten(0, 1).nonzero().squeeze_dim(1);
        let to = (first + &place).flatten(0, 1).index_select(0, &from);
        Some(Self { place, real, from, to, width })
    }

    /// `[R, W, H]` to `[R, A, H]`
    fn gather(&self, states: &Tensor) -> Tensor {
        states.gather(1, &self.place.unsqueeze(2).expand([-1, -1, states.size()[2]], false), false)
    }

    /// What is no padding of `[R, A]` whole numbers, row by row.
    fn of_rows(&self, numbers: &Tensor) -> Result<Vec<Vec<i64>>> {
        let numbers = Vec::<Vec<i64>>::try_from(numbers.to_device(Device::Cpu))?;
        let real = Vec::<Vec<bool>>::try_from(self.real.to_device(Device::Cpu))?;
        let kept = |(numbers, real): (Vec<i64>, Vec<bool>)| {
            numbers.into_iter().zip(real).filter_map(|(number, real)| real.then_some(number)).collect()
        };
        Ok(numbers.into_iter().zip(real).map(kept).collect())
    }

    /// Puts `[R, A, H]` into the rows of `[R, W, H]` that they are of.
    fn scatter(&self, into: &mut Tensor, states: &Tensor) {
        let rows = states.flatten(0, 1).index_select(0, &self.from); // [n, H]
        let _ = into.flatten(0, 1).index_copy_(0, &self.to, &rows);
    }

    /// Puts logits of `[R, A, H]` into those of the first `block` rows of a view, `[R, L, V]`.
    fn project(&self, into: &mut Tensor, block: i64, states: &Tensor, logits: impl Fn(&Tensor) -> Tensor) {
        let place = self.to.remainder(self.width);
        let inside = place.lt(block).nonzero().squeeze_dim(1); // [m]
        if inside.numel() == 0 {
            return;
        }
        let [from, to, place] = [&self.from, &self.to, &place].map(|index| index.index_select(0, &inside));
        let rows = logits(&states.flatten(0, 1).index_select(0, &from)); // [m, V]
        let to = to.divide_scalar_mode(self.width, "floor") * block + place;
        let _ = into.flatten(0, 1).index_copy_(0, &to, &rows);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_reads_as_it_is_written() {
        let skip: TokenSkip = "layer=18,threshold=0.99,outlier=0.75,refresh=4".parse().unwrap();
        assert_eq!(skip, TokenSkip { layer: 18, threshold: 0.99, outlier: 0.75, refresh: 4 });
        assert_eq!(skip.to_string().parse(), Ok(skip));
        for text in ["", "layer", "threshold=1", "layer=1,layer=2", "layer=1,odd=2", "layer=-1", "layer=1,outlier=inf"]
        {
            let problem = text.parse::<TokenSkip>().unwrap_err();
            assert!(problem.contains(text), "{text}: {problem}");
        }
        assert!(skip.check(32).is_ok() && skip.check(18).is_err());
        assert!(TokenSkip { layer: 0, ..skip }.check(32).unwrap_err().contains("1 to 31"));
        assert!(skip.forces(4) && !skip.forces(5) && !TokenSkip { refresh: 0, ..skip }.forces(4));
    }
}
