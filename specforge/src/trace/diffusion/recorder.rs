//! Writes a trace while a masked diffusion model decodes. Nothing appears under the trace's name before
//! [`DiffusionRecorder::finish`].

use std::path::Path;

use super::file::{Candidate, DiffusionHeader, FORMAT, Record, StepLine, TextLine};
use super::placed::Placed;
use crate::decode::diffusion::{Prompt, Step, Watcher};
use crate::error::{Error, Result};
use crate::trace::lines::{Close, LineWriter};
use crate::trace::metrics::Real;

/// Records every pass of a decoder.
#[derive(Debug)]
pub struct DiffusionRecorder {
    lines: LineWriter,
    mask: i64,
    /// Tokens of an answer, and of a block.
    sizes: (usize, usize),
    /// Every text so far as it is now.
    texts: Vec<Vec<i64>>,
    /// Number of the first text of the decode that goes on.
    first: usize,
}

impl DiffusionRecorder {
    /// Starts a trace.
    pub fn create(path: &Path, header: DiffusionHeader) -> Result<Self> {
        let (mask, sizes) = (header.mask, (header.options.length, header.options.block));
        let lines = LineWriter::create(path, FORMAT, header)?;
        Ok(Self { lines, mask, sizes, texts: Vec::new(), first: 0 })
    }

    /// Prompts that are answered together from now on.
    pub fn texts(&mut self, prompts: &[Prompt]) -> Result<()> {
        self.first = self.texts.len();
        for Prompt { tokens, key } in prompts {
            let text = TextLine { text: self.texts.len(), key: *key, prompt: tokens.clone() };
            self.lines.record(&Record::Text(text))?;
            let mut ids: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
            ids.resize(ids.len() + self.sizes.0, self.mask);
            self.texts.push(ids);
        }
        Ok(())
    }

    /// Gives the trace its name.
    pub fn finish(self) -> Result<()> {
        self.lines.close(|records| Close { records })
    }

    fn line(&mut self, step: &Step, ids: &[i64]) -> Option<StepLine> {
        let (text, block) = (self.first + step.text, step.start..step.start + self.sizes.1);
        let known = self.texts.get_mut(text)?;
        let before = known.get(block.clone())?.to_vec();
        let after = ids.get(block)?.to_vec();
        *known = ids.to_vec();
        let rows = step.rows.as_ref()?;
        let numbers = step.tokens.iter().zip(&step.confidence).zip(rows.logit.iter().zip(&rows.logsumexp));
        let candidates = step.candidates.iter().zip(numbers).map(|(&position, ((&token, &sure), (&logit, &sum)))| {
            Candidate { position, token, confidence: Real(sure), logit: Real(logit), logsumexp: Real(sum) }
        });
        let view = step.view;
        // By row, where the decoder has them by layer.
        let by_row = |cosines: &Vec<Vec<f64>>| {
            let row = |row: usize| cosines.iter().filter_map(|layer| layer.get(row).copied().map(Real)).collect();
            Placed::new(view.0, (0..view.1).map(row).collect())
        };
        Some(StepLine {
            text,
            block: step.block,
            step: step.step,
            before: Placed::new(step.start, before),
            logits: step.logits,
            view,
            cache: step.cache,
            compared: step.compared,
            similarity: step.cosines.as_ref().map(by_row),
            active: step.active.clone().map(|active| Placed::new(view.0, active)),
            turned: step.turned.clone(),
            candidates: candidates.collect(),
            quota: step.quota,
            transferred: step.transferred.clone(),
            masks_left: after.iter().filter(|&&token| token == self.mask).count(),
            after: Placed::new(step.start, after),
            line: 0,
        })
    }
}

impl Watcher for DiffusionRecorder {
    fn wants_rows(&self) -> bool {
        true
    }

    fn step(&mut self, step: &Step, ids: &[i64]) -> Result<()> {
        let line = self.line(step, ids);
        let line =
            line.ok_or_else(|| Error::Failed("a trace was told of a pass over a text it does not know".to_owned()))?;
        self.lines.record(&Record::Step(Box::new(line)))
    }
}
