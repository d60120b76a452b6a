//! What a verify budget rests on, measured by decoding: how often confidences come true, and what steps cost here.
//!
//! A draft that says how sure it is decodes without a budget, so that every chain is verified to its end. Of each
//! verification the raw confidences and the number of accepted guesses are noted; temperatures are fitted to them. Then the
//! target's pass is timed on this machine for every number of tokens a round can have, beside what a round of the same
//! decode spent on everything else. Both are written as the files that SGLang reads, and `--verify-budget` too.
//!
//! Rounds here pad each request to the longest chain of the batch; an engine that packs them pays for the tokens alone. Its
//! own table is the better one there, temperatures hold everywhere.

use std::collections::HashMap;
use std::path::Path;

use serde::Serialize;
use tch::Tensor;

use super::bench::{self, VerifyShape};
use crate::data::Finish;
use crate::decode::engine::Clock;
use crate::decode::event::{Committed, Listener, Round, Source, Started};
use crate::decode::verify_budget::{Calibration, SPS_FILE, STS_FILE, StepCosts, StepTable, sts};
use crate::error::Result;
use crate::models::TargetModel;

/// A chain under verification.
#[derive(Debug)]
struct Chain {
    confidence: Vec<f32>,
    accepted: usize,
    /// Whether the last token that was committed is a guess.
    ends_accepted: bool,
}

/// What was heard of a decode.
#[derive(Debug, Default)]
pub struct Heard {
    slots: usize,
    /// Raw confidences, `slots` for each chain.
    raw: Vec<f32>,
    /// Guesses accepted of each chain.
    accepted: Vec<usize>,
    passes: u64,
    rounds: u64,
    /// Tokens before the verifications, all together.
    context: u64,
}

/// Notes confidences and what became of the guesses, and hands everything on.
pub struct ConfidenceLog<'a> {
    inner: &'a mut dyn Listener,
    open: HashMap<u64, Chain>,
    heard: Heard,
    /// Whether the last event was a round: those of one pass come together.
    in_pass: bool,
}

impl<'a> ConfidenceLog<'a> {
    /// Notes chains of exactly `slots` guesses. Shorter ones end with the request's own limit: they say nothing of the slots
    /// that they lack.
    pub fn new(inner: &'a mut dyn Listener, slots: usize) -> Self {
        Self { inner, open: HashMap::new(), heard: Heard { slots, ..Heard::default() }, in_pass: false }
    }

    /// What was heard; rounds that have not ended are forgotten.
    pub fn finish(self) -> Heard {
        self.heard
    }

    fn settle(&mut self, tag: u64, request_ended: bool) {
        let Some(chain) = self.open.remove(&tag) else { return };
        // A stop token that was guessed ends the walk, and nobody knows what the target thinks of the guesses behind it.
        if request_ended && chain.ends_accepted && chain.accepted < self.heard.slots {
            return;
        }
        self.heard.raw.extend(chain.confidence);
        self.heard.accepted.push(chain.accepted);
    }
}

impl Listener for ConfidenceLog<'_> {
    fn wants_rows(&self) -> bool {
        self.inner.wants_rows()
    }

    fn started(&mut self, event: &Started<'_>) -> Result<()> {
        self.in_pass = false;
        self.inner.started(event)
    }

    fn ended(&mut self, tag: u64, finish: Option<Finish>) -> Result<()> {
        self.in_pass = false;
        match finish {
            Some(_) => self.settle(tag, true),
            None => drop(self.open.remove(&tag)),
        }
        self.inner.ended(tag, finish)
    }

    fn round(&mut self, event: &Round<'_>) -> Result<()> {
        self.settle(event.tag, false);
        self.heard.passes += u64::from(!std::mem::replace(&mut self.in_pass, true));
        self.heard.rounds += 1;
        self.heard.context += event.committed as u64;
        if let Some(confidence) = event.confidence.filter(|known| known.len() == self.heard.slots && !known.is_empty())
        {
            let chain = Chain { confidence: confidence.to_vec(), accepted: 0, ends_accepted: false };
            self.open.insert(event.tag, chain);
        }
        self.inner.round(event)
    }

    fn committed(&mut self, event: &Committed<'_>) -> Result<()> {
        self.in_pass = false;
        if let Some(chain) = self.open.get_mut(&event.tag) {
            chain.ends_accepted = event.source == Source::Accepted;
            chain.accepted += usize::from(chain.ends_accepted);
        }
        self.inner.committed(event)
    }
}

impl Heard {
    /// Verified chains that were noted.
    pub fn samples(&self) -> usize {
        self.accepted.len()
    }

    /// Fits temperatures to what was noted.
    pub fn fit(&self, dataset: &str) -> Result<Calibration> {
        let shape = [self.samples() as i64, self.slots as i64];
        let marks: Vec<f32> = (self.accepted.iter())
            .flat_map(|&accepted| (0..self.slots).map(move |slot| f32::from(u8::from(slot < accepted))))
            .collect();
        let tensor = |values: &[f32]| Tensor::f_from_slice(values)?.f_view(shape); // [n, g]
        sts::fit(&tensor(&self.raw)?, &tensor(&marks)?, dataset)
    }

    /// Seconds of a pass that are not the target's own.
    fn beside(&self, clock: Clock) -> f64 {
        (clock.draft + clock.overhead).as_secs_f64() / self.passes.max(1) as f64
    }

    /// Tokens before an average verification.
    fn context(&self) -> i64 {
        (self.context / self.rounds.max(1)) as i64
    }
}

/// Temperatures and step costs, and how they were measured.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// Temperatures, with their calibration errors.
    #[serde(flatten)]
    pub calibration: Calibration,
    /// Steps a second.
    pub steps: StepTable,
    /// Tokens in the cache of each request while passes were timed.
    pub context: i64,
    /// Seconds of a step beside the target's pass.
    pub seconds_beside_pass: f64,
}

impl Measured {
    /// Writes both files into a folder.
    pub fn write(&self, folder: &Path) -> Result<()> {
        self.calibration.write(&folder.join(STS_FILE))?;
        StepCosts::Table(self.steps.clone()).write(&folder.join(SPS_FILE))
    }

    /// A table for people.
    pub fn text(&self) -> String {
        let Calibration { temperatures, num_samples, ece_before, ece_after, .. } = &self.calibration;
        let mut lines = vec![
            format!("calibration by {num_samples} verified chains:"),
            format!("{:>4}  {:>11}  {:>10}  {:>9}", "slot", "temperature", "ECE before", "ECE after"),
        ];
        for (slot, ((temperature, before), after)) in (1..).zip(temperatures.iter().zip(ece_before).zip(ece_after)) {
            lines.push(format!("{slot:>4}  {temperature:>11.3}  {before:>10.4}  {after:>9.4}"));
        }
        let Self { steps, context, seconds_beside_pass, .. } = self;
        let beside = 1e3 * seconds_beside_pass;
        lines.push(format!("steps behind {context} tokens, {beside:.2} ms of each beside the target's pass:"));
        lines.push(format!("{:>6}  {:>9}", "tokens", "steps/s"));
        for (tokens, rate) in steps.sample_batch_tokens.iter().zip(&steps.sample_steps_per_sec) {
            lines.push(format!("{tokens:>6}  {rate:>9.2}"));
        }
        lines.join("\n")
    }
}

/// Fits temperatures to what was heard, and times the target's pass with up to `rows` requests. `clock` is the time that the
/// decode took; each pass is timed `repeat` times ten.
pub fn measure(
    target: &dyn TargetModel,
    heard: &Heard,
    clock: Clock,
    rows: usize,
    dataset: &str,
    repeat: u32,
) -> Result<Measured> {
    let calibration = heard.fit(dataset)?;
    let nodes = heard.slots as i64 + 1;
    let most = target.info().max_position_embeddings - nodes;
    let (context, seconds_beside_pass) = (heard.context().min(most).max(1), heard.beside(clock));
    let (mut sample_batch_tokens, mut sample_steps_per_sec) = (Vec::new(), Vec::new());
    for (rows, nodes) in probes(rows.max(1) as i64, nodes) {
        let timing = bench::verify(target, VerifyShape { rows, context, nodes }, repeat)?;
        sample_batch_tokens.push((rows * nodes) as u64);
        sample_steps_per_sec.push(1.0 / (bench::median(&timing.seconds) + seconds_beside_pass));
    }
    let max_batch_tokens = sample_batch_tokens.last().copied().unwrap_or(1);
    let steps = StepTable { sample_batch_tokens, sample_steps_per_sec, max_batch_tokens };
    Ok(Measured { calibration, steps, context, seconds_beside_pass })
}

/// Rows and tokens of each that are timed: every length of one request's chain, then of twice as many requests each time, up
/// to `rows`, those with more tokens than were timed before. Ascending by tokens in all.
fn probes(rows: i64, nodes: i64) -> Vec<(i64, i64)> {
    let doubled = std::iter::successors(Some(1), |&count| (count < rows).then(|| (2 * count).min(rows)));
    let mut probes: Vec<(i64, i64)> = Vec::new();
    for count in doubled {
        let most = probes.last().map_or(0, |(rows, nodes)| rows * nodes);
        probes.extend((1..=nodes).map(|nodes| (count, nodes)).filter(|(rows, nodes)| rows * nodes > most));
    }
    probes
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::decode::confident::Confident;
    use crate::decode::drafter::Plain;
    use crate::decode::event::Silent;
    use crate::decode::verify_budget::VerifyBudget;
    use crate::decode::{Drafter, Engine, EngineOptions, Policy, Request, tiny};
    use crate::nn::Processors;

    #[test]
    fn probes_ascend_from_one_token_to_the_largest_round() {
        assert_eq!(probes(1, 4), [(1, 1), (1, 2), (1, 3), (1, 4)]);
        assert_eq!(probes(2, 3), [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3)]);
        for (rows, nodes) in [(1, 1), (3, 5), (8, 8), (5, 2)] {
            let tokens: Vec<i64> = probes(rows, nodes).into_iter().map(|(rows, nodes)| rows * nodes).collect();
            assert!(tokens.is_sorted_by(|a, b| a < b), "{tokens:?}");
            assert_eq!((tokens[0], tokens[tokens.len() - 1]), (1, rows * nodes));
        }
    }

    /// Decodes, fits, times, writes, reads, and decodes with the budget: the same text, fewer guesses.
    #[test]
    fn a_decode_is_calibrated_and_then_cut() {
        let truth = [1.0, 4.0, 0.5];
        let target = tiny::target(1);
        let requests = || {
            let request = |tag: u64| {
                let prompt = vec![(tag % 60) as u32, (tag / 60) as u32 + 10, 5];
                Request { tag, prompt, max_new_tokens: 40, key: tag }
            };
            (0..240).map(request)
        };
        let options = EngineOptions {
            processors: Processors::at_temperature(1.0),
            policy: Policy::Keyed { seed: 3 },
            stop_tokens: vec![7],
            max_rows: 16,
        };
        let engine = |drafter: Box<dyn Drafter>| {
            let mut engine = Engine::new(&target, drafter, options.clone()).unwrap();
            requests().for_each(|request| engine.submit(request).unwrap());
            engine
        };
        let texts = |engine: &mut Engine<'_>, listener: &mut dyn Listener| -> Vec<Vec<u32>> {
            engine.run(listener).unwrap().into_iter().map(|left| left.decoded.unwrap().tokens).collect()
        };
        let plain = texts(&mut engine(Box::new(Plain)), &mut Silent);
        let answers: HashMap<_, _> = requests().map(|request| request.prompt).zip(plain.clone()).collect();
        let drafter = || Box::new(Confident::new(answers.clone(), &truth, 2));

        let (mut whole, mut silent) = (engine(drafter()), Silent);
        let mut log = ConfidenceLog::new(&mut silent, 3);
        assert_eq!(texts(&mut whole, &mut log), plain);
        let heard = log.finish();
        assert_eq!((heard.passes, heard.rounds), (whole.throughput().passes, whole.throughput().rounds));
        assert!(heard.samples() as u64 > heard.rounds / 2 && (heard.samples() as u64) < heard.rounds);

        let measured = measure(&target, &heard, whole.clock(), 4, "made up", 1).unwrap();
        let calibration = &measured.calibration;
        assert_eq!((calibration.num_samples, calibration.dataset.as_str()), (heard.samples() as u64, "made up"));
        for (got, want) in calibration.temperatures.iter().zip(truth) {
            assert!((want / 1.8..want * 1.8).contains(got), "{:?}", calibration.temperatures);
        }
        let [before, after] = [&calibration.ece_before, &calibration.ece_after].map(|all| all.iter().sum::<f64>());
        assert!(after < before, "{before} and {after}");
        assert_eq!(measured.steps.sample_batch_tokens, [1, 2, 3, 4, 6, 8, 12, 16]);
        assert!(measured.context > 3 && measured.seconds_beside_pass > 0.0);
        let text = measured.text();
        assert!(text.contains("ECE before") && text.lines().count() == 5 + 3 + 7, "{text}");

        let folder = tempfile::tempdir().unwrap();
        measured.write(folder.path()).unwrap();
        let read = VerifyBudget::read(folder.path()).unwrap();
        assert_eq!(texts(&mut engine(drafter()).with_budget(read).unwrap(), &mut Silent), plain);
    }

    #[test]
    fn nothing_heard_is_nothing_to_calibrate_with() {
        let mut silent = Silent;
        let heard = ConfidenceLog::new(&mut silent, 3).finish();
        let target = tiny::target(1);
        let error = measure(&target, &heard, Clock::default(), 1, "", 1).err().unwrap();
        assert!(error.to_string().contains("no verified chain"), "{error}");
    }
}
