//! The backward pass of the training-time test, one step at a time: a step is computed again when its gradient is due.
//!
//! The forward pass keeps of each step what the next one reads: its output and its rows' own keys. Going back, a step runs
//! once more with a graph, receives the gradients of its output, of its keys and of its trained rows, and hands on those
//! of its inputs. So the graph of one step exists at a time, for a third more work in the layers; the vocabulary
//! projection, which is half of a step, is not run again.
//!
//! Shape legend: `T` tokens of the batch, `R` rows of a step, `M` trained rows of a step, `H` hidden size.

use tch::Tensor;

use super::layers::{LayerKeys, Network, no_own_keys};
use super::steps::Steps;
use crate::draft::Gradients;
use crate::error::Result;

/// What a forward pass leaves for the backward pass. Nothing here has a graph.
#[derive(Debug)]
pub struct Tape {
    /// Output of each step, `[R, H]`.
    outputs: Vec<Tensor>,
    /// Own keys of each step's rows, after the step.
    own: Vec<LayerKeys>,
    /// Keys of step 0.
    shared: LayerKeys,
}

impl Tape {
    /// Runs all steps from the captured features. Returns what the vocabulary projection reads too, `[M, H]` a step.
    pub fn record(network: &Network, plan: &Steps, captured: &[Tensor]) -> Result<(Self, Vec<Tensor>)> {
        let _guard = tch::no_grad_guard();
        let mut tape = Self { outputs: Vec::new(), own: Vec::new(), shared: Vec::new() };
        let mut rows = Vec::new();
        for (k, step) in plan.steps.iter().enumerate() {
            let (output, own) = if k == 0 {
                let (output, shared) = network.first_step(plan, step, &network.project_hidden_states(captured)?)?;
                tape.shared = shared;
                (output, no_own_keys(step, &tape.shared)?)
            } else {
                network.later_step(step, &tape.outputs[k - 1], &tape.shared, &tape.own[k - 1])?
            };
            rows.push(network.trained_rows(step, &output));
            tape.outputs.push(output);
            tape.own.push(own);
        }
        Ok((tape, rows))
    }

    /// Adds the gradients of `parameters`, the first of the draft's, to `gradients`, given those of each step's trained rows,
    /// `slopes`, which are `lift` times as large as they should be.
    pub fn backward(
        mut self,
        network: &Network,
        plan: &Steps,
        captured: &[Tensor],
        slopes: &[Tensor],
        parameters: &[&Tensor],
        (lift, gradients): (f64, &mut Gradients<'_>),
    ) -> Result<()> {
        let shared = leaves(&self.shared);
        let mut of_shared: Vec<Tensor> = flat(&shared).iter().map(|keys| keys.zeros_like()).collect();
        // Gradients of a step's output and of its rows' own keys, from the step after it.
        let mut of_outputs: Vec<Tensor> = Vec::new();
        for (k, step) in plan.steps.iter().enumerate().rev() {
            self.outputs.truncate(k);
            self.own.truncate(k);
            let (inputs, outputs, rows) = if k == 0 {
                let features = network.project_hidden_states(captured)?; // [T, H]
                let (output, keys) = network.first_step(plan, step, &features)?;
                let rows = network.trained_rows(step, &output);
                // Step 0's rows have no own keys, and what later steps want of the shared ones is known now.
                of_outputs.resize_with(1, || output.detach().zeros_like());
                of_outputs.append(&mut of_shared);
                (Vec::new(), joined(output, &keys), rows)
            } else {
                let previous = self.outputs[k - 1].detach().set_requires_grad(true);
                let own = leaves(&self.own[k - 1]);
                let (output, longer) = network.later_step(step, &previous, &shared, &own)?;
                let rows = network.trained_rows(step, &output);
                let inputs = joined(previous, &own).into_iter().chain(flat(&shared)).collect();
                (inputs, joined(output, &longer), rows)
            };
            // One scalar whose gradients are the wanted ones.
            let mut surrogate = (rows * &slopes[k]).sum(slopes[k].kind());
            for (output, slope) in outputs.iter().zip(&of_outputs) {
                surrogate += (output * slope).sum(slope.kind());
            }
            let wanted: Vec<&Tensor> = parameters.iter().copied().chain(&inputs).collect();
            let mut fresh = Tensor::f_run_backward(&[surrogate], &wanted, false, false)?;
            let mut of_inputs = fresh.split_off(parameters.len());
            // A step does not read every parameter, and step 1 finds no own keys.
            for (index, gradient) in fresh.into_iter().enumerate().filter(|(_, fresh)| fresh.defined()) {
                gradients.add(index, &gradient, lift)?;
            }
            let later = of_inputs.split_off(inputs.len() - of_shared.len());
            for (total, gradient) in of_shared.iter_mut().zip(later) {
                *total += gradient;
            }
            let inputs = inputs.iter().map(|input| input.detach());
            let defined = |(slope, input): (Tensor, Tensor)| if slope.defined() { slope } else { input.zeros_like() };
            of_outputs = of_inputs.into_iter().zip(inputs).map(defined).collect();
        }
        Ok(())
    }
}

/// Copies without a graph that take gradients.
fn leaves(keys: &LayerKeys) -> LayerKeys {
    keys.iter().map(|[key, value]| [key, value].map(|tensor| tensor.detach().set_requires_grad(true))).collect()
}

fn flat(keys: &LayerKeys) -> Vec<Tensor> {
    keys.iter().flatten().map(Tensor::shallow_clone).collect()
}

fn joined(output: Tensor, keys: &LayerKeys) -> Vec<Tensor> {
    std::iter::once(output).chain(flat(keys)).collect()
}
