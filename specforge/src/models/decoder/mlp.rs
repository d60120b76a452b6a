//! MLPs of decoder layers: which tensors they have, and what they become.

use std::fmt::Debug;
use std::rc::Rc;

use super::names::{GetPart, Shapes, linear};
use crate::error::Result;
use crate::models::keys::Keys;
use crate::models::limits;
use crate::nn::{Activation, Experts, FeedForward, GateUp, GatedMlp, Router, Scoring, SharedExpert};

/// An MLP of a layer, as a configuration says it.
pub trait MlpDesign: Debug {
    /// Its tensors behind the layer's prefix, with their shapes.
    fn tensors(&self) -> Shapes;
    /// Numbers that a token becomes between the projections, over all experts it passes through.
    fn a_token(&self) -> i64;
    /// Weights that a token does not meet.
    fn idle(&self) -> u64 {
        0
    }
    /// The MLP, from its tensors.
    fn build(&self, get: &mut GetPart<'_>) -> Result<Box<dyn FeedForward>>;
}

/// A gated MLP.
#[derive(Debug, Clone)]
pub struct GatedDesign {
    /// What stands before the names of its tensors, such as `mlp`.
    pub prefix: String,
    /// Names of the gate, of what it multiplies, and of the projection back.
    pub names: [&'static str; 3],
    /// Whether the first two are one matrix, of the first one's name.
    pub joined: bool,
    /// `H`
    pub hidden: i64,
    /// Width between the projections.
    pub width: i64,
    /// What is applied to the gate.
    pub activation: Activation,
    /// Whether all projections have biases.
    pub bias: bool,
}

impl GatedDesign {
    /// The usual one, as `hidden_act` or another key says its activation.
    pub fn new(hidden: i64, width: i64, activation: Activation) -> Self {
        Self {
            prefix: "mlp".to_owned(),
            names: ["gate_proj", "up_proj", "down_proj"],
            joined: false,
            hidden,
            width,
            activation,
            bias: false,
        }
    }

    /// The usual one with the usual keys: `intermediate_size`, and an activation of this key.
    pub fn read(keys: &Keys<'_>, hidden: i64, key: &str, silent: &'static str) -> Result<Self, String> {
        let width = keys.whole("intermediate_size")?;
        limits::within(&[("intermediate_size", width, limits::WIDEST)])?;
        Ok(Self::new(hidden, width, activation(keys, key, silent)?))
    }
}

/// An activation of a key.
pub fn activation(keys: &Keys<'_>, key: &str, silent: &'static str) -> Result<Activation, String> {
    Activation::named(keys.word_or(key, silent)?).map_err(|problem| format!("`{key}`: {problem}"))
}

impl MlpDesign for GatedDesign {
    fn tensors(&self) -> Shapes {
        let (prefix, [gate, up, down]) = (&self.prefix, self.names);
        let matrices = match self.joined {
            true => vec![(gate, 2 * self.width, self.hidden), (down, self.hidden, self.width)],
            false => {
                vec![(gate, self.width, self.hidden), (up, self.width, self.hidden), (down, self.hidden, self.width)]
            }
        };
        let mut tensors = Vec::new();
        for (name, out, input) in matrices {
            tensors.push((format!("{prefix}.{name}.weight"), vec![out, input]));
            if self.bias {
                tensors.push((format!("{prefix}.{name}.bias"), vec![out]));
            }
        }
        tensors
    }

    fn a_token(&self) -> i64 {
        self.width
    }

    fn build(&self, get: &mut GetPart<'_>) -> Result<Box<dyn FeedForward>> {
        let mut projection = |name: &str| linear(&format!("{}.{name}", self.prefix), self.bias, get);
        let [gate, up, down] = self.names;
        let into = match self.joined {
            true => GateUp::Joined(projection(gate)?),
            false => GateUp::Apart { gate: projection(gate)?, up: projection(up)? },
        };
        Ok(Box::new(GatedMlp { projection: into, down: projection(down)?, activation: self.activation }))
    }
}

/// A mixture of experts, each with tensors of its own.
#[derive(Debug, Clone)]
pub struct ExpertsDesign {
    /// Name of the router behind the layer's prefix.
    pub router: String,
    /// What stands before the number of an expert.
    pub prefix: String,
    /// One expert; its prefix is not looked at.
    pub expert: GatedDesign,
    /// `E` and `k`
    pub counts: ExpertCounts,
    /// How scores become weights.
    pub scoring: Scoring,
    /// An MLP beside them, and the name of its gate.
    pub shared: Option<(GatedDesign, String)>,
}

/// How many experts there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertCounts {
    /// `E`
    pub all: i64,
    /// `k`
    pub chosen: i64,
}

impl ExpertCounts {
    /// Refuses counts that no model of so many layers has.
    pub fn check(self, key: &str, layers: usize) -> Result<Self, String> {
        let most = limits::MOST_EXPERTS.min(limits::MOST_EXPERTS_OF_A_MODEL / limits::signed(layers).max(1)).max(1);
        limits::within(&[(key, self.all, most), ("num_experts_per_tok", self.chosen, self.all)])?;
        Ok(self)
    }
}

impl ExpertsDesign {
    fn expert(&self, number: i64) -> GatedDesign {
        GatedDesign { prefix: format!("{}.{number}", self.prefix), ..self.expert.clone() }
    }

    fn router_of(&self, get: &mut GetPart<'_>) -> Result<Router> {
        let projection = linear(&self.router, false, get)?;
        Ok(Router { projection, chosen: self.counts.chosen, scoring: self.scoring })
    }
}

impl MlpDesign for ExpertsDesign {
    fn tensors(&self) -> Shapes {
        let mut tensors = vec![(format!("{}.weight", self.router), vec![self.counts.all, self.expert.hidden])];
        tensors.extend((0..self.counts.all).flat_map(|number| self.expert(number).tensors()));
        if let Some((shared, gate)) = &self.shared {
            tensors.extend(shared.tensors());
            tensors.push((format!("{gate}.weight"), vec![1, shared.hidden]));
        }
        tensors
    }

    fn a_token(&self) -> i64 {
        self.counts.chosen * self.expert.width + self.shared.as_ref().map_or(0, |(shared, _)| shared.width)
    }

    fn idle(&self) -> u64 {
        let one: i64 = self.expert.tensors().iter().map(|(_, shape)| shape.iter().product::<i64>()).sum();
        (self.counts.all - self.counts.chosen) as u64 * one as u64
    }

    fn build(&self, get: &mut GetPart<'_>) -> Result<Box<dyn FeedForward>> {
        let router = self.router_of(get)?;
        let experts = (0..self.counts.all).map(|number| self.expert(number).build(get)).collect::<Result<_>>()?;
        let shared = match &self.shared {
            Some((mlp, gate)) => Some(SharedExpert { mlp: mlp.build(get)?, gate: linear(gate, false, get)? }),
            None => None,
        };
        Ok(Box::new(Experts { router, experts, shared }))
    }
}

/// Which layers have experts where some have one MLP: every `step`-th, but for those named.
pub fn of_layers(
    layers: usize,
    (step, plain): (i64, &[i64]),
    dense: Rc<dyn MlpDesign>,
    experts: Rc<dyn MlpDesign>,
) -> Vec<Rc<dyn MlpDesign>> {
    let is_sparse = |layer: i64| !plain.contains(&layer) && (layer + 1) % step.max(1) == 0;
    let design = |layer| if is_sparse(layer) { Rc::clone(&experts) } else { Rc::clone(&dense) };
    (0..limits::signed(layers)).map(design).collect()
}
