//! The decoder of one or several texts, a pass for each step.

use tch::{Device, Tensor};

use super::choice::Draws;
use super::exact;
#[cfg(test)]
use super::fault::{self, DiffusionFault};
use super::network::{Network, Rows, Text, View, guided};
use super::options::{Cache, Options};
use super::report::{CacheSeen, Step, Watcher, Work};
use super::state::{BlockState, Stepped, TokenSkip};
use super::steps::State;
use crate::data::Finish;
use crate::error::{Error, Result};
use crate::nn::KvCache;

/// A prompt to answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Key of its noise, added to the seed.
    pub key: u64,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The answer up to its first stop token, that one included.
    pub tokens: Vec<u32>,
    /// Why it ends there.
    pub finish: Finish,
    /// Prompt and answer, with what stands behind a stop token in its block; blocks behind that one are masks still.
    pub text: Text,
    /// What it took.
    pub work: Work,
}

/// A decoder of one model.
pub struct Decoder<'a> {
    network: Network<'a>,
    options: Options,
}

/// What is kept between the passes over a block.
enum Memory {
    None,
    Kept(BlockCache),
    Skipping(BlockCache, BlockState),
}

/// Keys and values of one block's passes, and what is told of them.
struct BlockCache {
    kept: KvCache,
    seen: CacheSeen,
}

impl BlockCache {
    /// What the next pass writes to.
    fn written(&mut self) -> &mut KvCache {
        self.seen.passes += 1;
        &mut self.kept
    }
}

impl<'a> Decoder<'a> {
    /// Refuses options that mean nothing.
    pub fn new(network: Network<'a>, options: Options) -> Result<Self> {
        options.check(&network).map_err(|problem| Error::Usage(format!("--{problem}")))?;
        Ok(Self { network, options })
    }

    /// How it decodes.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Answers prompts side by side, which may be of different lengths. Each answer is the one it would be alone.
    pub fn decode(&self, prompts: &[Prompt], draws: &mut dyn Draws, watcher: &mut dyn Watcher) -> Result<Vec<Answer>> {
        let mut states = prompts
            .iter()
            .enumerate()
            .map(|(number, prompt)| self.begin(number, prompt))
            .collect::<Result<Vec<_>>>()?;
        let mut work = vec![Work::none(self.network.layers()); states.len()];
        match self.options.parallel {
            Some(parallel) => {
                for (state, work) in states.iter_mut().zip(&mut work) {
                    exact::decode((&self.network, &self.options), parallel, state, work, (draws, watcher))?;
                }
            }
            None => {
                let mut caches = 0;
                for _ in 0..self.options.length / self.options.block {
                    self.block((&mut states, &mut work), &mut caches, draws, watcher)?;
                }
            }
        }
        states.into_iter().zip(work).map(|(state, work)| self.answer(state, work)).collect()
    }

    /// A prompt with its masks behind it.
    fn begin(&self, number: usize, prompt: &Prompt) -> Result<State> {
        let mask = self.network.diffusion().mask;
        let (count, longest) = (prompt.tokens.len() + self.options.length, self.network.longest());
        if count as i64 > longest {
            return Err(Error::Failed(format!(
                "the prompt has {} tokens and the answer {}, the model's context {longest}: shorten one of them",
                prompt.tokens.len(),
                self.options.length
            )));
        }
        if prompt.tokens.is_empty() && self.network.shift() > 0 {
            return Err(Error::Failed("the prompt is empty: this model says what stands behind a token".to_owned()));
        }
        if prompt.tokens.iter().any(|&token| i64::from(token) == mask) {
            return Err(Error::Failed(format!(
                "the prompt holds the mask token {mask}, which stands for unknown tokens"
            )));
        }
        let mut ids: Vec<i64> = prompt.tokens.iter().map(|&token| i64::from(token)).collect();
        ids.resize(count, mask);
        let text = Text { ids, prompt: prompt.tokens.len() };
        Ok(State { text, number, key: prompt.key, block: 0, step: 0 })
    }

    fn answer(&self, state: State, work: Work) -> Result<Answer> {
        let text = state.text;
        let known = text.ids[text.prompt..].iter().take_while(|&&token| token != self.network.diffusion().mask);
        let mut tokens = Vec::new();
        let mut finish = Finish::Length;
        for &token in known {
            let token = u32::try_from(token).map_err(|_| Error::Failed(format!("token {token} is out of range")))?;
            tokens.push(token);
            if self.options.stop_tokens.contains(&token) {
                finish = Finish::Stop;
                break;
            }
        }
        Ok(Answer { tokens, finish, text, work })
    }

    /// Makes the next block of every text known. `caches` counts those of the decode.
    fn block(
        &self,
        (states, work): (&mut [State], &mut [Work]),
        caches: &mut u64,
        draws: &mut dyn Draws,
        watcher: &mut dyn Watcher,
    ) -> Result<()> {
        let mut live: Vec<usize> = (0..states.len()).filter(|&text| !states[text].is_done(&self.options)).collect();
        let Some(&first) = live.first() else { return Ok(()) };
        let block = states[first].block;
        let mut memory = None;
        while !live.is_empty() {
            let (logits, seen) = self.pass((states, work), &live, &mut memory, caches)?; // [B, L, V]
            for (row, &text) in live.iter().enumerate() {
                let state = &mut states[text];
                let logits = (&logits.get(row as i64), watcher.wants_rows());
                let mut step = state.advance(logits, &self.network, &self.options, draws)?;
                seen.tell(row, &mut step)?;
                #[cfg(test)]
                if fault::active(DiffusionFault::StepBudget) && state.step >= 2 {
                    (state.block, state.step) = (state.block + 1, 0);
                }
                work[text].steps += 1;
                watcher.step(&step, &state.text.ids)?;
            }
            // Texts whose block is known wait for the others without a place in their passes.
            let kept: Vec<usize> = (0..live.len()).filter(|&row| states[live[row]].block == block).collect();
            if kept.len() < live.len() {
                if let Some(memory) = &mut memory {
                    self.select(memory, live.len(), &kept);
                }
                live = kept.into_iter().map(|row| live[row]).collect();
            }
        }
        Ok(())
    }

    fn select(&self, memory: &mut Memory, before: usize, kept: &[usize]) {
        let mut rows: Vec<i64> = kept.iter().map(|&row| row as i64).collect();
        if self.is_guided() {
            rows.extend(kept.iter().map(|&row| (before + row) as i64));
        }
        match memory {
            Memory::None => {}
            Memory::Kept(cache) => cache.kept.select_rows(&rows),
            Memory::Skipping(cache, state) => {
                cache.kept.select_rows(&rows);
                state.select_rows(&rows);
            }
        }
    }

    fn is_guided(&self) -> bool {
        self.options.guidance > 0.0
    }

    /// A pass over texts of which each is at the same block: logits of their blocks, `[B, L, V]`.
    fn pass(
        &self,
        (states, work): (&[State], &mut [Work]),
        live: &[usize],
        memory: &mut Option<Memory>,
        caches: &mut u64,
    ) -> Result<(Tensor, Seen)> {
        let Self { network, options } = self;
        let texts: Vec<&Text> = live.iter().map(|&text| &states[text].text).collect();
        let rows = Rows { texts: &texts, guided: self.is_guided() };
        let (shift, block) = (network.shift(), options.block as i64);
        let origin: Vec<i64> = live.iter().map(|&text| states[text].start(options) as i64 - shift).collect();
        let sides = if rows.guided { 2 } else { 1 };
        let of_block = |last: &Tensor| network.logits(&last.narrow(1, 0, block));
        let view = View::new(&rows, &origin, block + shift);
        let mut seen = Seen { views: Vec::new(), skipped: None, cache: None };
        let logits = match memory {
            None => {
                for (&text, whole) in live.iter().zip(&texts) {
                    work[text].pass(sides * whole.ids.len());
                    work[text].whole_passes += 1;
                    seen.views.push((0, whole.ids.len()));
                }
                let (logits, kept) = self.first(&rows, view, of_block, caches)?;
                // Without a cache every pass is a first one.
                *memory = Some(kept).filter(|kept| !matches!(kept, Memory::None));
                logits
            }
            Some(Memory::None) => return Err(Error::Failed("a pass over a view needs a cache".to_owned())),
            Some(Memory::Kept(cache)) => {
                let width = match options.cache {
                    Cache::Prefix => texts[0].ids.len() as i64 - origin[0],
                    Cache::Dual | Cache::None => block + shift,
                };
                for (&text, &origin) in live.iter().zip(&origin) {
                    work[text].pass(sides * width as usize);
                    seen.views.push((origin as usize, width as usize));
                }
                of_block(&network.view(&rows, &View::new(&rows, &origin, width), cache.written())?)
            }
            Some(Memory::Skipping(cache, state)) => {
                let skip =
                    options.skip.ok_or_else(|| Error::Failed("a state is kept that nobody asked for".to_owned()))?;
                #[cfg(test)]
                if fault::active(DiffusionFault::SharedCache) {
                    let further = fault::further_on(&texts, network.diffusion().mask);
                    let texts: Vec<&Text> = further.iter().collect();
                    let _ = network.view(&Rows { texts: &texts, ..rows }, &view, cache.written())?;
                }
                let stepped = state.step(network, &rows, &skip, cache.written())?;
                let active = stepped.active.to_device(Device::Cpu);
                for (row, (&text, &origin)) in live.iter().zip(&origin).enumerate() {
                    let width = (block + shift) as usize;
                    let ran: i64 = (0..sides)
                        .map(|side| {
                            active
                                .get((side * live.len() + row) as i64)
                                .to_kind(tch::Kind::Int64)
                                .sum(tch::Kind::Int64)
                                .int64_value(&[])
                        })
                        .sum();
                    work[text].skipping((sides * width, ran as usize), skip.layer);
                    seen.views.push((origin as usize, width));
                }
                let cosines = stepped.cosines.to_device(Device::Cpu);
                seen.skipped = Some(Stepped { active, cosines, ..stepped });
                state.logits().shallow_clone()
            }
        }; // [R, L, V]
        seen.cache = match memory {
            Some(Memory::Kept(cache) | Memory::Skipping(cache, _)) => Some(cache.seen),
            Some(Memory::None) | None => None,
        };
        let logits = if rows.guided { guided(&logits, options.guidance) } else { logits };
        Ok((logits, seen))
    }

    /// A block's first pass, and what later ones need of it.
    fn first(
        &self,
        rows: &Rows<'_>,
        view: View,
        of_block: impl Fn(&Tensor) -> Tensor,
        caches: &mut u64,
    ) -> Result<(Tensor, Memory)> {
        let network = &self.network;
        let longest = rows.texts.iter().map(|text| text.ids.len() as i64).max().unwrap_or(0);
        let mut new = || {
            *caches += 1;
            let seen = CacheSeen { number: *caches - 1, passes: 0 };
            BlockCache { kept: network.new_cache(rows.count(), longest), seen }
        };
        match (self.options.cache, self.options.skip) {
            (Cache::None, _) => Ok((of_block(&network.whole(rows, &view, None, &mut |_, _| {})?), Memory::None)),
            (Cache::Prefix | Cache::Dual, None) => {
                let mut cache = new();
                let last = network.whole(rows, &view, Some(cache.written()), &mut |_, _| {})?;
                Ok((of_block(&last), Memory::Kept(cache)))
            }
            (Cache::Prefix | Cache::Dual, Some(TokenSkip { .. })) => {
                let mut cache = new();
                let state = BlockState::whole(network, rows, view, self.options.block as i64, cache.written())?;
                Ok((state.logits().shallow_clone(), Memory::Skipping(cache, state)))
            }
        }
    }
}

/// What a pass ran on.
struct Seen {
    /// Absolute positions of each text: the first, and how many.
    views: Vec<(usize, usize)>,
    /// Where rows may leave later layers out, what became of them; its tensors are on the CPU.
    skipped: Option<Stepped>,
    /// What the pass left.
    cache: Option<CacheSeen>,
}

impl Seen {
    /// Adds what is known of one text's row.
    fn tell(&self, row: usize, step: &mut Step) -> Result<()> {
        step.view = self.views[row];
        step.cache = self.cache;
        let Some(Stepped { active, cosines, compared, turned }) = &self.skipped else { return Ok(()) };
        step.active = Some(Vec::try_from(active.get(row as i64))?);
        let cosines = cosines.get(row as i64); // [k, W]
        step.cosines = Some(Vec::try_from(cosines)?);
        let [before, now] = compared;
        step.compared = Some((before[row] as usize, now[row] as usize));
        step.turned = Some(turned[row].clone());
        Ok(())
    }
}
