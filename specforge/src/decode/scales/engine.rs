//! Decoding images scale by scale: with the target alone, with a draft, or handed over from the target to a smaller model.

use std::time::Instant;

use tch::Tensor;

use super::committed::Committed;
#[cfg(test)]
use super::fault::{self, ScaleFault};
use super::fit::{fits_draft, fits_quantizer};
use super::pace::{Gamma, Pace};
use super::plan::Plan;
use super::reader::Reader;
use super::record::{Decoded, Round, ScaleRecord, Seconds, Source};
use super::rule::{Rule, Said, Verdict, judge};
use super::sampling::{ScaleSampling, choice_from};
use crate::error::{Error, Result};
use crate::models::var::Var;
use crate::models::vqvae::quantizer::Quantizer;

/// Images that are decoded together.
#[derive(Debug, Clone, Copy)]
pub struct ScaleRequest<'a> {
    /// Label of each image; the null label stands for none.
    pub labels: &'a [i64],
    /// Number of each image, which keys its noise: an image does not depend on those beside it.
    pub images: &'a [u64],
}

/// A scale at the moment it is decided.
#[derive(Debug)]
pub struct ScaleSeen<'a> {
    /// What is known of it.
    pub record: &'a ScaleRecord,
    /// Its map, `[B, p * p]`.
    pub map: &'a Tensor,
    /// What was drafted, where something was.
    pub drafted: Option<&'a Tensor>,
    /// Logits of the model that decided, guidance mixed in, `[B, p * p, V]`.
    pub logits: &'a Tensor,
    /// Everything up to it.
    pub state: &'a Committed,
}

/// Called with every scale that is decided, in order.
pub type Seen<'a> = dyn FnMut(&ScaleSeen<'_>) -> Result<()> + 'a;

/// Decodes images. What it measures outlives a request; nothing else does.
#[derive(Debug)]
pub struct ScaleDecoder<'a> {
    target: &'a Var,
    quantizer: &'a Quantizer,
    draft: Option<(&'a Var, Plan)>,
    sampling: ScaleSampling,
    pace: Pace,
}

impl<'a> ScaleDecoder<'a> {
    /// A decoder of these models. Refuses a quantiser or a draft of other scales, codes or labels than the target's.
    pub fn new(
        target: &'a Var,
        quantizer: &'a Quantizer,
        draft: Option<(&'a Var, Plan)>,
        sampling: ScaleSampling,
    ) -> Result<Self> {
        sampling.check().map_err(Error::Usage)?;
        fits_quantizer(target, quantizer)?;
        if let Some((draft, plan)) = &draft {
            fits_draft(target, draft)?;
            match plan {
                Plan::Speculate { rule, .. } => rule.check().map_err(Error::Usage)?,
                Plan::HandOver(scales) if *scales > target.config().scales() => {
                    let most = target.config().scales();
                    return Err(Error::Usage(format!("hand-over: expected at most {most} scales, got {scales}")));
                }
                Plan::HandOver(_) => {}
            }
        }
        Ok(Self { target, quantizer, draft, sampling, pace: Pace::default() })
    }

    /// Decodes images.
    pub fn decode(&mut self, request: ScaleRequest<'_>) -> Result<Decoded> {
        self.decode_seen(request, &mut |_| Ok(()))
    }

    /// The same; `see` is shown every scale that is decided.
    pub fn decode_seen(&mut self, request: ScaleRequest<'_>, see: &mut Seen<'_>) -> Result<Decoded> {
        let _no_grad = tch::no_grad_guard();
        let draft = self.draft;
        let mut run = self.run(request, see)?;
        match draft {
            None => run.alone(run.sides.len())?,
            Some((_, Plan::HandOver(scales))) => {
                run.alone(scales)?;
                run.refined()?;
            }
            Some((_, Plan::Speculate { gamma, bonus, rule })) => {
                while run.committed.scales() < run.sides.len() {
                    let gamma = match gamma {
                        Gamma::Fixed(gamma) => gamma,
                        Gamma::Auto => run.pace.choose(run.committed.scales(), &run.sides, run.rows(), bonus),
                    };
                    run.round(gamma, bonus, rule)?;
                }
            }
        }
        let lossless = draft.is_none_or(|(_, plan)| plan.is_lossless());
        Ok(run.decoded(lossless))
    }

    /// Decodes with the target alone and noise that is given for each scale: Gumbel noise `[B, p * p, V]` beside filtered
    /// logits, whatever the temperature.
    pub fn decode_from(&mut self, request: ScaleRequest<'_>, gumbel: &[Tensor], see: &mut Seen<'_>) -> Result<Decoded> {
        let _no_grad = tch::no_grad_guard();
        let mut run = self.run(request, see)?;
        for noise in gumbel.iter().take(run.sides.len()) {
            let said = run.target_reads(run.committed.scales() + 1)?;
            let said = run.filtered(said.into_iter().next().ok_or_else(nothing_read)?);
            if noise.size() != said.filtered.size() {
                let (want, got) = (said.filtered.size(), noise.size());
                return Err(Error::Failed(format!("noise: expected {want:?}, got {got:?}")));
            }
            let map = choice_from(&said.filtered, noise);
            run.commit(map, Source::Target, (&said, None))?;
        }
        Ok(run.decoded(true))
    }

    fn run<'r>(&'r mut self, request: ScaleRequest<'r>, see: &'r mut Seen<'_>) -> Result<Run<'r>>
    where
        'a: 'r,
    {
        let ScaleRequest { labels, images } = request;
        if labels.is_empty() || labels.len() != images.len() {
            let (labels, images) = (labels.len(), images.len());
            return Err(Error::Failed(format!(
                "expected a label and a number for each image, got {labels} and {images}"
            )));
        }
        let null = self.target.config().null_label();
        if let Some(label) = labels.iter().find(|label| !(0..=null).contains(*label)) {
            return Err(Error::Usage(format!("label: expected from 0 to {}, got {label}", null - 1)));
        }
        let sampling = self.sampling;
        let draft = match self.draft {
            Some((draft, _)) => Some(Reader::new("draft", draft, labels, sampling)?),
            None => None,
        };
        let config = self.target.config();
        Ok(Run {
            target: Reader::new("target", self.target, labels, sampling)?,
            draft,
            quantizer: self.quantizer,
            sampling,
            images,
            sides: (0..config.scales()).map(|scale| config.tokens(scale)).collect(),
            committed: Committed::nothing(self.quantizer, labels.len() as i64),
            pace: &mut self.pace,
            rounds: Vec::new(),
            scales: Vec::new(),
            calls: Calls::default(),
            seconds: Seconds::default(),
            see,
            started: Instant::now(),
        })
    }
}

/// Passes and tokens of an image that were run.
#[derive(Debug, Default)]
struct Calls {
    target: (usize, i64),
    draft: (usize, i64),
}

/// One decode: what is committed, and what is counted on the way.
struct Run<'r> {
    target: Reader<'r>,
    draft: Option<Reader<'r>>,
    quantizer: &'r Quantizer,
    sampling: ScaleSampling,
    images: &'r [u64],
    /// Tokens of each scale.
    sides: Vec<i64>,
    committed: Committed,
    pace: &'r mut Pace,
    rounds: Vec<Round>,
    scales: Vec<ScaleRecord>,
    calls: Calls,
    seconds: Seconds,
    see: &'r mut Seen<'r>,
    started: Instant,
}

/// A scale that a draft chose: its map, what the draft said of it, and everything up to it if it stands.
struct Drafted {
    said: Said,
    map: Tensor,
    state: Committed,
}

/// What a pass gives of a scale: logits of its images, `[B, p * p, V]`, and the weight of guidance in them.
type Read = (Tensor, f64);

/// Why a scale is committed: the word of the model that decided, and of a draft how many positions agreed, and its map.
type Why<'a> = (&'a Said, Option<(i64, &'a Tensor)>);

impl Run<'_> {
    fn rows(&self) -> i64 {
        self.images.len() as i64
    }

    /// Decodes with the target alone, up to a scale.
    fn alone(&mut self, end: usize) -> Result<()> {
        while self.committed.scales() < end {
            let scale = self.committed.scales();
            for read in self.target_reads(scale + 1)? {
                let said = self.filtered(read);
                let map = self.choice(&said, scale)?;
                self.commit(map, Source::Target, (&said, None))?;
            }
        }
        Ok(())
    }

    /// Decodes what is left with the smaller model alone. It reads all that the target decided in its first pass.
    fn refined(&mut self) -> Result<()> {
        while self.committed.scales() < self.sides.len() {
            let scale = self.committed.scales();
            let state = self.committed.clone();
            let said = self.draft_reads(&state, scale + 1)?;
            let map = self.choice(&said, scale)?;
            self.commit(map, Source::Refiner, (&said, None))?;
        }
        Ok(())
    }

    /// Drafts up to `gamma` scales, lets the target look at them, and commits at least one scale.
    fn round(&mut self, gamma: usize, bonus: bool, rule: Rule) -> Result<()> {
        let (start, all) = (self.committed.scales(), self.sides.len());
        let gamma = gamma.min(all - start);
        let drafted = self.drafted(gamma)?;
        // Without a draft the target reads the next scale as it would alone.
        let end = (start + gamma + usize::from(bonus || gamma == 0)).min(all);
        let begun = self.calls.target.1;
        let ahead = drafted.last().map_or_else(|| self.committed.clone(), |last| last.state.clone());
        #[cfg(test)]
        let ahead = match fault::active(ScaleFault::OwnTokens) {
            true => ahead.of_own_tokens(self.quantizer, start),
            false => ahead,
        };
        let read = self.target_reads_of(&ahead, end)?;
        let mut round = Round {
            start,
            drafted: gamma,
            accepted: 0,
            committed: 0,
            target_tokens: self.calls.target.1 - begun,
            drafted_maps: drafted.iter().map(|scale| scale.map.shallow_clone()).collect(),
        };
        for (place, read) in read.into_iter().enumerate() {
            // Filters cost a sort of every row: scales behind one that falls are not looked at.
            let said = self.filtered(read);
            let scale = start + place;
            let Some(Drafted { said: guess, map, state }) = drafted.get(place) else {
                // Everything before it stands, so the target read what it would read alone.
                let map = self.choice(&said, scale)?;
                let source = if gamma == 0 { Source::Target } else { Source::Bonus };
                self.commit(map, source, (&said, None))?;
                break;
            };
            let begun = Instant::now();
            let verdict = judge(rule, &self.sampling, (scale, self.images), &said, (guess, map))?;
            self.seconds.choosing += begun.elapsed().as_secs_f64();
            let Verdict { map: decided, is_kept, agreed } = verdict;
            #[cfg(test)]
            let state = &match fault::active(ScaleFault::AddedTwice) {
                true => state.added_again(self.quantizer)?,
                false => state.clone(),
            };
            self.pace.judged(scale, is_kept, agreed, self.rows() * self.sides[scale]);
            match is_kept {
                // What the draft went on from is what is committed now: the same values, already summed.
                true => self.commit_as(state.clone(), Source::Accepted, (&said, Some((agreed, map))))?,
                false => self.commit(decided, Source::Correction, (&said, Some((agreed, map))))?,
            }
            #[cfg(test)]
            let is_kept = is_kept || fault::active(ScaleFault::RejectedKept);
            if !is_kept {
                break;
            }
            round.accepted += 1;
        }
        round.committed = self.committed.scales() - start;
        self.rounds.push(round);
        // Keys and values of a scale depend on what the scales before it add up to, and not on its own map: those of a
        // corrected scale still hold, and those behind it do not.
        self.target.forget_behind(self.committed.scales());
        if let Some(draft) = &mut self.draft {
            draft.forget_behind(self.committed.scales());
        }
        #[cfg(test)]
        self.assert_caches();
        Ok(())
    }

    /// Both caches are those of the committed scales, and the target's is of all of them.
    #[cfg(test)]
    fn assert_caches(&self) {
        if fault::is_sound() {
            assert_eq!(self.target.cache().scales(), self.committed.scales());
            self.target.assert_fresh(&self.committed);
            self.draft.iter().for_each(|draft| draft.assert_fresh(&self.committed));
        }
    }

    /// Lets the draft choose the next `gamma` scales, on a state of its own.
    fn drafted(&mut self, gamma: usize) -> Result<Vec<Drafted>> {
        let mut state = self.committed.clone();
        let mut drafted = Vec::with_capacity(gamma);
        for _ in 0..gamma {
            let scale = state.scales();
            let said = self.draft_reads(&state, scale + 1)?;
            let map = self.choice(&said, scale)?;
            state = self.summed(&state, map.shallow_clone())?;
            drafted.push(Drafted { said, map, state: state.clone() });
        }
        Ok(drafted)
    }

    /// The target's word on the scales before `end` that it has not read, from what is committed.
    fn target_reads(&mut self, end: usize) -> Result<Vec<Read>> {
        let state = self.committed.clone();
        self.target_reads_of(&state, end)
    }

    /// The same from another state.
    fn target_reads_of(&mut self, state: &Committed, end: usize) -> Result<Vec<Read>> {
        let (begun, tokens) = (Instant::now(), self.target.tokens_to(end));
        let read = self.target.read(state, end)?;
        let seconds = begun.elapsed().as_secs_f64();
        self.pace.target_took(tokens, seconds);
        self.seconds.target += seconds;
        self.calls.target.0 += 1;
        self.calls.target.1 += tokens;
        Ok(read)
    }

    /// The draft's word on the last scale before `end`. It reads what it has not read of those before in the same pass.
    fn draft_reads(&mut self, state: &Committed, end: usize) -> Result<Said> {
        let draft = self.draft.as_mut().ok_or_else(|| Error::Failed("there is no draft".to_owned()))?;
        let (begun, tokens) = (Instant::now(), draft.tokens_to(end));
        let read = draft.read(state, end)?.pop().ok_or_else(nothing_read)?;
        let seconds = begun.elapsed().as_secs_f64();
        self.pace.draft_took(tokens, seconds);
        self.seconds.draft += seconds;
        self.calls.draft.0 += 1;
        self.calls.draft.1 += tokens;
        Ok(self.filtered(read))
    }

    /// What a model said of a scale, with what is ruled out.
    fn filtered(&mut self, read: Read) -> Said {
        let begun = Instant::now();
        let said = Said::new(&self.sampling, read);
        self.seconds.choosing += begun.elapsed().as_secs_f64();
        said
    }

    fn choice(&mut self, said: &Said, scale: usize) -> Result<Tensor> {
        let begun = Instant::now();
        let map = self.sampling.choice(&said.filtered, scale, self.images)?;
        self.seconds.choosing += begun.elapsed().as_secs_f64();
        Ok(map)
    }

    fn summed(&mut self, state: &Committed, map: Tensor) -> Result<Committed> {
        let begun = Instant::now();
        let next = state.with(self.quantizer, map)?;
        self.seconds.quantizer += begun.elapsed().as_secs_f64();
        Ok(next)
    }

    /// Commits a map of the next scale.
    fn commit(&mut self, map: Tensor, source: Source, why: Why<'_>) -> Result<()> {
        let state = self.committed.clone();
        let next = self.summed(&state, map)?;
        self.commit_as(next, source, why)
    }

    /// Commits one more scale, the last one of a state.
    fn commit_as(&mut self, next: Committed, source: Source, (said, guess): Why<'_>) -> Result<()> {
        let scale = self.committed.scales();
        let tokens = self.sides.get(scale).copied().unwrap_or_default();
        let record = ScaleRecord {
            scale,
            tokens,
            source,
            round: self.rounds.len(),
            target_cache: self.target.cache().tokens(),
            cfg_weight: said.weight,
            agreed: guess.map(|(agreed, _)| agreed),
            positions: self.rows() * tokens,
        };
        self.committed = next;
        if let Some(map) = self.committed.maps().last() {
            let drafted = guess.map(|(_, map)| map);
            let seen = ScaleSeen { record: &record, map, drafted, logits: &said.mixed, state: &self.committed };
            (self.see)(&seen)?;
        }
        self.scales.push(record);
        Ok(())
    }

    fn decoded(self, lossless: bool) -> Decoded {
        Decoded {
            committed: self.committed,
            rounds: self.rounds,
            scales: self.scales,
            target_calls: self.calls.target.0,
            target_tokens: self.calls.target.1,
            draft_calls: self.calls.draft.0,
            draft_tokens: self.calls.draft.1,
            seconds: Seconds { total: self.started.elapsed().as_secs_f64(), ..self.seconds },
            lossless,
        }
    }
}

fn nothing_read() -> Error {
    Error::Failed("a pass gave no logits".to_owned())
}
