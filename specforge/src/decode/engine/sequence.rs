//! Requests on the target alone, whose guesses come from elsewhere and whenever they come.
//!
//! The engine's rows go on together; a sequence waits for its trees, and whichever have one are verified in one pass. What is
//! committed, and what the cache holds of it, is decided as in the engine: of `n` committed tokens the cache holds the first
//! `n - 1`, and `tokens` is the only place that knows the last one. A pass that fails leaves its sequences as they were.

use tch::{Device, Tensor};

use super::target_rows::TargetRows;
use super::{EngineOptions, Request, logits, trees};
use crate::data::Finish;
use crate::decode::drafter::last;
use crate::decode::policy::{self, Limits, Policy, Proposal, Verdict};
use crate::decode::prefill::Passes;
use crate::device;
use crate::error::{Error, Result};
use crate::models::{ForwardInput, ForwardOutput, LogitRows, TargetModel};
use crate::nn::noise::Place;
use crate::nn::sampling::{self, Sampling};
use crate::nn::{AttentionMask, KvCache};
use crate::tree::TokenTree;

/// A request that is decoded tree by tree.
#[derive(Debug)]
pub struct Sequence {
    options: EngineOptions,
    key: u64,
    /// Everything committed, the prompt first.
    tokens: Vec<u32>,
    prompt_length: usize,
    /// New tokens it may have, the context's end considered.
    limit: usize,
    /// Hidden states that are wanted of every token, by Hugging Face's index.
    capture: Vec<usize>,
    /// Its row among those of all sequences.
    name: RowName,
}

/// What one pass made of a sequence.
#[derive(Debug)]
pub struct Step {
    /// What was committed, and from which nodes of the tree. Of the prompt's pass: one token, of node 0.
    pub verdict: Verdict,
    /// For each captured layer, the features of the tokens that were run and stay, `[new, H]`: of the last committed before
    /// the pass, and of the new ones but the last; of the prompt's pass, those of the prompt.
    pub features: Vec<Tensor>,
}

/// Names a sequence's row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RowName(u64);

/// What the target keeps of all sequences: a row of one cache for each.
///
/// Those that are verified together stand in front for their pass, and the others are out of its sight. Who is verified with
/// the same neighbours time and again is never moved.
#[derive(Debug, Default)]
pub struct SequenceRows {
    /// Whose each row is.
    names: Vec<RowName>,
    cache: Option<KvCache>,
    passes: Passes,
    /// Sequences that there ever were.
    named: u64,
}

/// What has room for more than so many times what it holds gives it back.
const SPARE: i64 = 4;

impl SequenceRows {
    /// Runs a prompt and chooses the first token behind it. `max_rows` of the options plays no part.
    pub fn start(
        &mut self,
        target: &dyn TargetModel,
        request: Request,
        options: EngineOptions,
        capture: Vec<usize>,
    ) -> Result<(Sequence, Step)> {
        let _guard = tch::no_grad_guard();
        request.check(target)?;
        options.processors.check().map_err(Error::Usage)?;
        let Request { prompt, max_new_tokens, key, .. } = request;
        let context = target.info().max_position_embeddings as usize;
        let (prompt_length, limit) = (prompt.len(), max_new_tokens.min(context.saturating_sub(prompt.len())));
        let (mut cache, name) = (target.new_cache(1, prompt_length as i64), RowName(self.named));
        let mut sequence = Sequence { options, key, tokens: prompt, prompt_length, limit, capture, name };
        let (output, hidden) = sequence.run_prompt(target, &self.passes, &mut cache)?;
        let nothing = Proposal::nothing(sequence.last());
        let verdict = sequence.decide(&nothing, logits(&output)?, 0)?;
        sequence.tokens.extend(&verdict.tokens);
        let features = hidden.iter().map(|layer| layer.get(0)).collect(); // [P, H] each
        match &mut self.cache {
            Some(rows) => rows.append_rows(cache),
            none => *none = Some(cache),
        }
        self.names.push(name);
        self.named += 1;
        Ok((sequence, Step { verdict, features }))
    }

    /// Verifies guesses of each of these sequences behind its last committed token, which is their tree's root, in one pass of
    /// the target. What is deeper than a sequence may still grow must not be in its tree; see [`Sequence::left`]. What does
    /// not fit is refused, and the others run without it.
    pub fn verify(&mut self, target: &dyn TargetModel, wanted: &mut [(&mut Sequence, Proposal)]) -> Vec<Result<Step>> {
        let _guard = tch::no_grad_guard();
        let mut steps: Vec<Option<Result<Step>>> = Vec::new();
        let mut fitting: Vec<&mut (&mut Sequence, Proposal)> = Vec::new();
        for pair in wanted {
            match pair.0.fits(target, &pair.1.tree) {
                Ok(()) => {
                    steps.push(None);
                    fitting.push(pair);
                }
                Err(problem) => steps.push(Some(Err(problem))),
            }
        }
        let made = self.pass(target, &mut fitting).unwrap_or_else(|error| {
            let problem = error.to_string();
            fitting.iter().map(|_| Err(Error::Failed(problem.clone()))).collect()
        });
        let mut made = made.into_iter();
        steps.into_iter().map(|step| step.or_else(|| made.next()).unwrap_or_else(|| Err(nothing_came()))).collect()
    }

    /// One pass over trees that fit.
    fn pass(
        &mut self,
        target: &dyn TargetModel,
        wanted: &mut [&mut (&mut Sequence, Proposal)],
    ) -> Result<Vec<Result<Step>>> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        self.bring_forward(&wanted.iter().map(|pair| pair.0.name).collect::<Vec<_>>())?;
        // Row by row, as they stand now.
        let place = |name: RowName| self.names.iter().position(|own| *own == name);
        let mut order: Vec<usize> = (0..wanted.len()).collect();
        order.sort_by_key(|&index| place(wanted[index].0.name));
        let Some(cache) = &mut self.cache else { return Err(nothing_came()) };
        let hidden_rows = cache.hide_behind(wanted.len() as i64);
        let outcome = run(target, cache, wanted, &order);
        if outcome.is_err() {
            let lengths = cache.lengths().to_vec();
            cache.truncate(&lengths);
        }
        cache.show(hidden_rows);
        outcome
    }

    /// Moves the rows named to the front, if they are not there.
    fn bring_forward(&mut self, names: &[RowName]) -> Result<()> {
        let (mut order, mut behind): (Vec<usize>, usize) = ((0..self.names.len()).collect(), names.len());
        let is_wanted = |row: usize| names.contains(&self.names[row]);
        if names.iter().any(|name| !self.names.contains(name)) {
            return Err(Error::Failed("a sequence that was let go of cannot be verified".to_owned()));
        }
        for front in 0..names.len() {
            if is_wanted(front) {
                continue;
            }
            while !is_wanted(behind) {
                behind += 1;
            }
            order.swap(front, behind);
            behind += 1;
        }
        self.arrange(&order);
        Ok(())
    }

    /// Keeps the rows named, in that order.
    fn arrange(&mut self, order: &[usize]) {
        self.names = order.iter().map(|&row| self.names[row]).collect();
        match &mut self.cache {
            Some(cache) if !order.is_empty() => {
                cache.select_rows(&order.iter().map(|&row| row as i64).collect::<Vec<_>>());
                if cache.capacity() > SPARE * cache.len().max(1) || cache.room() > SPARE * cache.rows() {
                    cache.shrink();
                }
            }
            cache => *cache = None,
        }
    }

    /// Lets go of a sequence's row.
    pub fn remove(&mut self, sequence: &Sequence) {
        let gone: Vec<bool> = self.names.iter().map(|name| *name == sequence.name).collect();
        if gone.contains(&true) {
            self.arrange(&super::rows::staying(&gone));
        }
    }

    /// The cache of all rows, and which of them is a sequence's.
    pub fn row(&self, sequence: &Sequence) -> Option<(&KvCache, usize)> {
        self.cache.as_ref().zip(self.names.iter().position(|name| *name == sequence.name))
    }

    /// Bytes of the cache.
    pub fn bytes(&self) -> u64 {
        self.cache.as_ref().map_or(0, KvCache::bytes)
    }
}

fn nothing_came() -> Error {
    Error::Failed("nothing came of a pass of the target".to_owned())
}

/// One pass over trees whose rows are all that the cache shows; `order` says whose tree each row's is.
fn run(
    target: &dyn TargetModel,
    cache: &mut KvCache,
    wanted: &mut [&mut (&mut Sequence, Proposal)],
    order: &[usize],
) -> Result<Vec<Result<Step>>> {
    let lengths = cache.lengths().to_vec();
    let proposals: Vec<Proposal> = order.iter().map(|&index| wanted[index].1.clone()).collect();
    let nodes = proposals.iter().map(|proposal| proposal.tree.len()).max().unwrap_or(1);
    let (ids, positions) = trees::inputs(&proposals, nodes, &lengths);
    let mask = trees::mask(&proposals, nodes, &lengths, target.device());
    let mut capture: Vec<usize> = wanted.iter().flat_map(|pair| pair.0.capture.iter().copied()).collect();
    capture.sort_unstable();
    capture.dedup();
    let output = forward(target, cache, (&ids, &positions), (&mask, &capture), LogitRows::All)?;
    let logits = logits(&output)?; // [B * T, V]
    let mut steps: Vec<Option<Result<Step>>> = wanted.iter().map(|_| None).collect();
    let mut paths = vec![Vec::new(); order.len()];
    for (row, &index) in order.iter().enumerate() {
        let (sequence, proposal) = &mut *wanted[index];
        let step = sequence.decide(proposal, logits, row * nodes).map(|verdict| {
            let path: Vec<i64> = verdict.path.iter().map(|&node| node as i64).collect();
            let kept = device::send(&Tensor::from_slice(&path), target.device());
            let own = sequence.capture.iter().filter_map(|layer| capture.binary_search(layer).ok());
            let features = own.map(|layer| output.hidden[layer].get(row as i64).index_select(0, &kept)); // [new, H]
            let step = Step { features: features.collect(), verdict };
            paths[row] = path;
            step
        });
        steps[index] = Some(step);
    }
    // From here on nothing fails: the cache keeps the paths, and the lists of tokens say what they are.
    cache.keep(&paths);
    let steps: Vec<Result<Step>> = steps.into_iter().map(|step| step.unwrap_or_else(|| Err(nothing_came()))).collect();
    for (pair, step) in wanted.iter_mut().zip(&steps) {
        if let Ok(step) = step {
            pair.0.tokens.extend(&step.verdict.tokens);
        }
    }
    Ok(steps)
}

/// One pass over ids and positions of all rows that the cache shows; the caller moves its lengths.
fn forward(
    target: &dyn TargetModel,
    cache: &mut KvCache,
    (ids, positions): (&[i64], &[i64]),
    (mask, capture): (&AttentionMask, &[usize]),
    logits: LogitRows<'_>,
) -> Result<ForwardOutput> {
    // One copy to the device for both.
    let both = Tensor::from_slice(&[ids, positions].concat()).view([2, cache.rows(), -1]);
    let both = device::send(&both, target.device()); // [2, B, T]
    let input = ForwardInput { ids: &both.get(0), positions: &both.get(1), mask, capture, logits };
    target.forward(&input, Some(cache))
}

impl Sequence {
    fn fits(&self, target: &dyn TargetModel, tree: &TokenTree) -> Result<()> {
        let (deepest, left) = (tree.topology().depth(), self.left());
        if self.finish().is_some() {
            return Err(Error::Failed("the sequence has ended: there is nothing to verify behind its end".to_owned()));
        }
        if tree.tokens().first() != Some(&self.last()) {
            return Err(Error::Failed("a draft tree does not begin with the last committed token".to_owned()));
        }
        if deepest >= left {
            let problem = format!("a draft tree is {deepest} deep where {left} more tokens are wanted");
            return Err(Error::Failed(problem));
        }
        let vocabulary = target.info().vocab_size;
        match tree.tokens().iter().find(|&&token| i64::from(token) >= vocabulary) {
            Some(token) => {
                Err(Error::Failed(format!("the draft guessed token {token}; the target's vocabulary has {vocabulary}")))
            }
            None => Ok(()),
        }
    }

    /// The target over the prompt, in as many passes as it takes: logits behind its end, `[1, V]`, and the captured states
    /// of all its tokens, `[1, P, H]` each.
    fn run_prompt(
        &self,
        target: &dyn TargetModel,
        passes: &Passes,
        cache: &mut KvCache,
    ) -> Result<(ForwardOutput, Vec<Tensor>)> {
        let (length, mut pieces) = (self.tokens.len(), Vec::new());
        let mut output = ForwardOutput { hidden: Vec::new(), logits: None };
        let seen = (&AttentionMask::Causal, self.capture.as_slice());
        for piece in passes.pieces(length) {
            let ids: Vec<i64> = self.tokens[piece.clone()].iter().map(|&id| i64::from(id)).collect();
            let positions: Vec<i64> = piece.clone().map(|place| place as i64).collect();
            let end = device::upload(&[piece.len() as i64 - 1], target.device())?; // [1]
            let wanted = if piece.end == length { LogitRows::Rows(&end) } else { LogitRows::None };
            output = forward(target, cache, (&ids, &positions), seen, wanted)?;
            cache.advance(&[piece.len() as i64]);
            pieces.push(std::mem::take(&mut output.hidden));
        }
        let whole = |layer: usize| Tensor::f_cat(&pieces.iter().map(|piece| &piece[layer]).collect::<Vec<_>>(), 1);
        let hidden = (0..self.capture.len()).map(whole).collect::<Result<Vec<_>, _>>()?;
        Ok((output, hidden))
    }

    /// What the target makes of a tree, whose rows of logits are those of a pass from `first` on.
    fn decide(&self, proposal: &Proposal, logits: &Tensor, first: usize) -> Result<Verdict> {
        let EngineOptions { processors, policy, stop_tokens, .. } = &self.options;
        let tree = &proposal.tree;
        let limits = Limits { tokens: self.left(), stop: stop_tokens };
        let own = logits.narrow(0, first as i64, tree.len() as i64);
        let chosen = self.chosen_at_once(tree, &own)?;
        let mut rows = TargetRows::new(&own, 0, &self.tokens, chosen.as_deref(), processors);
        rows.tree = Some(tree);
        match rows.chosen_at_once() {
            true => policy::walk(tree, limits, &mut |path| rows.chosen(path)),
            false => {
                let place = (self.tokens.len(), self.key);
                policy::verify(*policy, processors.is_greedy(), proposal, place, limits, &mut rows)
            }
        }
    }

    /// What the target chooses behind every node, where one copy from the device can say it.
    fn chosen_at_once(&self, tree: &TokenTree, logits: &Tensor) -> Result<Option<Vec<i64>>> {
        let EngineOptions { processors, policy, .. } = &self.options;
        match policy {
            Policy::Typical { .. } | Policy::Rank { .. } | Policy::Entropy { .. } => Ok(None),
            _ if processors.leaves_the_greedy_choice() => {
                let keys = vec![(0, 0); tree.len()];
                Ok(Some(Sampling::greedy().choose(logits, &keys, |_| Vec::new())))
            }
            Policy::Keyed { seed }
                if logits.device() != Device::Cpu && !processors.is_greedy() && processors.depend_on_rows_alone() =>
            {
                let seed = seed.wrapping_add(self.key);
                let place = |&depth: &usize| (seed, (self.tokens.len() + depth) as u64);
                let places: Vec<Place> = tree.topology().depths().iter().map(place).collect();
                Ok(Some(Vec::try_from(sampling::keyed_choices(processors, logits, &places))?))
            }
            _ => Ok(None),
        }
    }

    /// Everything committed, the prompt first.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The last committed token, the root of the next tree.
    pub fn last(&self) -> u32 {
        last(&self.tokens)
    }

    /// Tokens of the prompt.
    pub fn prompt_length(&self) -> usize {
        self.prompt_length
    }

    /// New tokens it may still have.
    pub fn left(&self) -> usize {
        (self.prompt_length + self.limit).saturating_sub(self.tokens.len())
    }

    /// Most tokens it will ever hold, the prompt included.
    pub fn longest(&self) -> usize {
        self.prompt_length + self.limit
    }

    /// Why it goes on no further, if it does not.
    pub fn finish(&self) -> Option<Finish> {
        if self.tokens.len() > self.prompt_length && self.options.stop_tokens.contains(&self.last()) {
            return Some(Finish::Stop);
        }
        (self.left() == 0).then_some(Finish::Length)
    }

    /// Whether its output is the target's own.
    pub fn is_lossless(&self) -> bool {
        self.options.policy.is_lossless()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Decoded, Engine};
    use super::*;
    use crate::decode::drafter::Plain;
    use crate::decode::event::Silent;
    use crate::decode::tiny;
    use crate::nn::Processors;
    use crate::nn::noise::keyed_stream;

    const PROMPT: [u32; 5] = [3, 60, 12, 9, 1];

    fn guessed(tree: TokenTree) -> Proposal {
        Proposal::picked(tree, Vec::new())
    }

    fn options(temperature: f64) -> EngineOptions {
        let processors = Processors::at_temperature(temperature);
        EngineOptions { processors, policy: Policy::Keyed { seed: 3 }, stop_tokens: vec![7, 8], max_rows: 1 }
    }

    fn request(tag: u64) -> Request {
        Request { tag, prompt: PROMPT.to_vec(), max_new_tokens: 20, key: tag }
    }

    fn alone(target: &dyn TargetModel, options: EngineOptions, request: Request) -> Decoded {
        let mut engine = Engine::new(target, Box::new(Plain), options).unwrap();
        engine.submit(request).unwrap();
        engine.run(&mut Silent).unwrap().remove(0).decoded.unwrap()
    }

    #[test]
    fn a_sequence_gives_what_the_engine_gives_whatever_is_guessed() {
        let target = tiny::target(1);
        for temperature in [0.0, 1.0] {
            for tag in 0..6 {
                let want = alone(&target, options(temperature), request(tag));
                let mut next = keyed_stream(tag, 7);
                let mut rows = SequenceRows::default();
                let (mut sequence, step) = rows.start(&target, request(tag), options(temperature), vec![1]).unwrap();
                assert_eq!(step.features[0].size(), [PROMPT.len() as i64, 32]);
                while sequence.finish().is_none() {
                    // Right guesses and wrong ones, in a tree.
                    let done = sequence.tokens().len() - PROMPT.len();
                    let mut tree = TokenTree::root(sequence.last());
                    let mut node = 0;
                    for depth in 0..(next() % 4).min(sequence.left() as u64 - 1) as usize {
                        tree.push(node, (next() % 64) as u32);
                        node = tree.push(node, want.tokens.get(done + depth).copied().unwrap_or(0));
                    }
                    let step = rows.verify(&target, &mut [(&mut sequence, guessed(tree))]).remove(0).unwrap();
                    assert_eq!(step.features[0].size()[0] as usize, step.verdict.tokens.len());
                    assert_eq!(rows.row(&sequence).unwrap().0.lengths(), [sequence.tokens().len() as i64 - 1]);
                }
                assert_eq!(sequence.tokens()[PROMPT.len()..], want.tokens);
                assert_eq!(sequence.finish(), Some(want.finish));
            }
        }
    }

    /// Sequences of unlike prompts, lengths, sampling and layers, some of them let go of in the middle; whichever have a tree
    /// in a round are verified together.
    #[test]
    fn whoever_is_verified_together_gets_what_each_gets_alone() {
        let target = tiny::target(1);
        let asked = |tag: u64| Request { prompt: PROMPT[..1 + tag as usize % 5].to_vec(), ..request(tag) };
        let own = |tag: u64| options((tag % 2) as f64);
        let mut next = keyed_stream(5, 9);
        let (mut rows, mut running) = (SequenceRows::default(), Vec::new());
        let (mut together, mut ended) = (0, 0);
        for tag in 0..40 {
            let layers: Vec<usize> = [vec![], vec![1], vec![2, 1]][tag as usize % 3].clone();
            let (sequence, step) = rows.start(&target, asked(tag), own(tag), layers.clone()).unwrap();
            assert_eq!(step.features.len(), layers.len());
            running.push((sequence, alone(&target, own(tag), asked(tag)), layers));
            for _ in 0..next() % 4 {
                let mut wanted: Vec<(&mut Sequence, Proposal)> = Vec::new();
                let mut sizes = Vec::new();
                for (sequence, want, layers) in &mut running {
                    if next().is_multiple_of(3) || sequence.finish().is_some() {
                        continue;
                    }
                    let done = sequence.tokens().len() - sequence.prompt_length();
                    let depth = (next() % 5).min(sequence.left() as u64 - 1) as usize;
                    let mut guesses = want.tokens[done..(done + depth).min(want.tokens.len())].to_vec();
                    if next().is_multiple_of(3) {
                        guesses.iter_mut().skip(1).for_each(|guess| *guess = (*guess + 1) % 64);
                    }
                    let tree = TokenTree::chain(sequence.last(), &guesses);
                    sizes.push(layers.len());
                    wanted.push((sequence, guessed(tree)));
                }
                together = together.max(wanted.len());
                for (step, size) in rows.verify(&target, &mut wanted).into_iter().zip(sizes) {
                    let step = step.unwrap();
                    assert_eq!(step.features.len(), size);
                    let count = step.verdict.tokens.len() as i64;
                    assert!(step.features.iter().all(|layer| layer.size() == [count, 32]));
                }
                let is_over = |sequence: &Sequence| sequence.finish().is_some();
                for (sequence, want, _) in &running {
                    let (cache, row) = rows.row(sequence).unwrap();
                    assert_eq!(cache.lengths()[row], sequence.tokens().len() as i64 - 1);
                    let got = &sequence.tokens()[sequence.prompt_length()..];
                    assert_eq!(got, &want.tokens[..got.len()], "a sequence of {} tokens", want.tokens.len());
                    if is_over(sequence) || next().is_multiple_of(9) {
                        ended += usize::from(is_over(sequence));
                        rows.remove(sequence);
                    }
                }
                running.retain(|(sequence, ..)| rows.row(sequence).is_some());
            }
        }
        assert!(together > 3 && ended > 8, "{together} together, {ended} to their end");
        running.iter().for_each(|(sequence, ..)| rows.remove(sequence));
        assert_eq!(rows.bytes(), 0);
    }

    #[test]
    fn what_does_not_fit_is_refused_and_changes_nothing() {
        let target = tiny::target(1);
        let endless = EngineOptions { stop_tokens: Vec::new(), ..options(0.0) };
        let mut rows = SequenceRows::default();
        let (mut sequence, _) = rows.start(&target, request(0), endless, Vec::new()).unwrap();
        let before = sequence.tokens().to_vec();
        let root = sequence.last();
        for (tree, problem) in [
            (TokenTree::root(root + 1), "does not begin with"),
            (TokenTree::chain(root, &[64]), "vocabulary has 64"),
            (TokenTree::chain(root, &[1; 19]), "19 deep"),
        ] {
            let error = rows.verify(&target, &mut [(&mut sequence, guessed(tree))]).remove(0).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
            let held = rows.row(&sequence).unwrap().0.lengths()[0];
            assert_eq!((sequence.tokens(), held), (&before[..], before.len() as i64 - 1));
        }
    }
}
