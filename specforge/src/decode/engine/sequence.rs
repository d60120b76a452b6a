//! One request on the target alone, with a cache of its own, whose guesses come from elsewhere and whenever they come.
//!
//! The engine's rows go on together; a sequence waits for its trees. What is committed, and what the cache holds of it, is
//! decided as in the engine: of `n` committed tokens the cache holds the first `n - 1`, and `tokens` is the only place that
//! knows the last one. A pass that fails leaves the sequence as it was.

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
    passes: Passes,
    cache: KvCache,
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

impl Sequence {
    /// Runs a prompt and chooses the first token behind it. `max_rows` of the options plays no part.
    pub fn start(
        target: &dyn TargetModel,
        request: Request,
        options: EngineOptions,
        capture: Vec<usize>,
    ) -> Result<(Self, Step)> {
        let _guard = tch::no_grad_guard();
        request.check(target)?;
        options.processors.check().map_err(Error::Usage)?;
        let Request { prompt, max_new_tokens, key, .. } = request;
        let context = target.info().max_position_embeddings as usize;
        let (prompt_length, limit) = (prompt.len(), max_new_tokens.min(context.saturating_sub(prompt.len())));
        let cache = target.new_cache(1, prompt_length as i64);
        let passes = Passes::default();
        let mut sequence = Self { options, key, tokens: prompt, prompt_length, limit, capture, passes, cache };
        let (output, hidden) = sequence.run_prompt(target)?;
        let tree = TokenTree::root(sequence.last());
        let verdict = sequence.decide(&tree, &output)?;
        sequence.tokens.extend(&verdict.tokens);
        let features = hidden.iter().map(|layer| layer.get(0)).collect(); // [P, H] each
        Ok((sequence, Step { verdict, features }))
    }

    /// Verifies a tree behind the last committed token, which is its root. What is deeper than the sequence may still grow
    /// must not be in it; see [`Sequence::left`].
    pub fn verify(&mut self, target: &dyn TargetModel, tree: &TokenTree) -> Result<Step> {
        let _guard = tch::no_grad_guard();
        self.fits(target, tree)?;
        let lengths = self.cache.lengths().to_vec();
        let proposal = [Proposal::picked(tree.clone(), Vec::new())];
        let (ids, positions) = trees::inputs(&proposal, tree.len(), &lengths);
        let mask = trees::mask(&proposal, tree.len(), &lengths, target.device());
        let output = self.forward(target, (&ids, &positions), &mask, LogitRows::All)?;
        let verdict = self.decide(tree, &output)?;
        // From here on nothing fails: the cache keeps the path, and the list of tokens says what it is.
        let path: Vec<i64> = verdict.path.iter().map(|&node| node as i64).collect();
        let index = device::send(&Tensor::from_slice(&path), target.device());
        let features = output.hidden.iter().map(|layer| layer.get(0).index_select(0, &index)).collect(); // [new, H]
        self.cache.keep(&[path]);
        self.tokens.extend(&verdict.tokens);
        Ok(Step { verdict, features })
    }

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
    fn run_prompt(&mut self, target: &dyn TargetModel) -> Result<(ForwardOutput, Vec<Tensor>)> {
        let (length, mut pieces) = (self.tokens.len(), Vec::new());
        let mut output = ForwardOutput { hidden: Vec::new(), logits: None };
        for piece in self.passes.pieces(length) {
            let ids: Vec<i64> = self.tokens[piece.clone()].iter().map(|&id| i64::from(id)).collect();
            let positions: Vec<i64> = piece.clone().map(|place| place as i64).collect();
            let end = device::upload(&[piece.len() as i64 - 1], target.device())?; // [1]
            let wanted = if piece.end == length { LogitRows::Rows(&end) } else { LogitRows::None };
            output = self.forward(target, (&ids, &positions), &AttentionMask::Causal, wanted)?;
            self.cache.advance(&[piece.len() as i64]);
            pieces.push(std::mem::take(&mut output.hidden));
        }
        let whole = |layer: usize| Tensor::f_cat(&pieces.iter().map(|piece| &piece[layer]).collect::<Vec<_>>(), 1);
        let hidden = (0..self.capture.len()).map(whole).collect::<Result<Vec<_>, _>>()?;
        Ok((output, hidden))
    }

    fn forward(
        &mut self,
        target: &dyn TargetModel,
        (ids, positions): (&[i64], &[i64]),
        mask: &AttentionMask,
        logits: LogitRows<'_>,
    ) -> Result<ForwardOutput> {
        // One copy to the device for both.
        let both = Tensor::from_slice(&[ids, positions].concat()).view([2, 1, -1]);
        let both = device::send(&both, target.device()); // [2, 1, T]
        let input = ForwardInput { ids: &both.get(0), positions: &both.get(1), mask, capture: &self.capture, logits };
        target.forward(&input, Some(&mut self.cache))
    }

    /// What the target makes of a tree, whose rows of logits are those of a pass.
    fn decide(&self, tree: &TokenTree, output: &ForwardOutput) -> Result<Verdict> {
        let EngineOptions { processors, policy, stop_tokens, .. } = &self.options;
        let logits = logits(output)?;
        let limits = Limits { tokens: self.left(), stop: stop_tokens };
        let chosen = self.chosen_at_once(tree, logits)?;
        let mut rows = TargetRows::new(logits, 0, &self.tokens, chosen.as_deref(), processors);
        rows.tree = Some(tree);
        match rows.chosen_at_once() {
            true => policy::walk(tree, limits, &mut |path| rows.chosen(path)),
            false => {
                let proposal = Proposal::picked(tree.clone(), Vec::new());
                let place = (self.tokens.len(), self.key);
                policy::verify(*policy, processors.is_greedy(), &proposal, place, limits, &mut rows)
            }
        }
    }

    /// What the target chooses behind every node, where one copy from the device can say it.
    fn chosen_at_once(&self, tree: &TokenTree, logits: &Tensor) -> Result<Option<Vec<i64>>> {
        let EngineOptions { processors, policy, .. } = &self.options;
        match policy {
            Policy::Typical { .. } => Ok(None),
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

    /// The cache: one row.
    pub fn cache(&self) -> &KvCache {
        &self.cache
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
                let (mut sequence, step) =
                    Sequence::start(&target, request(tag), options(temperature), vec![1]).unwrap();
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
                    let step = sequence.verify(&target, &tree).unwrap();
                    assert_eq!(step.features[0].size()[0] as usize, step.verdict.tokens.len());
                    assert_eq!(sequence.cache().lengths(), [sequence.tokens().len() as i64 - 1]);
                }
                assert_eq!(sequence.tokens()[PROMPT.len()..], want.tokens);
                assert_eq!(sequence.finish(), Some(want.finish));
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_and_changes_nothing() {
        let target = tiny::target(1);
        let endless = EngineOptions { stop_tokens: Vec::new(), ..options(0.0) };
        let (mut sequence, _) = Sequence::start(&target, request(0), endless, Vec::new()).unwrap();
        let before = sequence.tokens().to_vec();
        let root = sequence.last();
        for (tree, problem) in [
            (TokenTree::root(root + 1), "does not begin with"),
            (TokenTree::chain(root, &[64]), "vocabulary has 64"),
            (TokenTree::chain(root, &[1; 19]), "19 deep"),
        ] {
            let error = sequence.verify(&target, &tree).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
            assert_eq!((sequence.tokens(), sequence.cache().lengths()[0]), (&before[..], before.len() as i64 - 1));
        }
    }
}
