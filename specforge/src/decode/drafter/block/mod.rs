//! Block drafters at work: one pass of the backbone gives all rows of a block, and a head walks over them.
//!
//! Of `n` committed tokens the cache holds the context keys of the first `n - 1`, made of the target's features; the last
//! committed token is the anchor, whose own feature does not exist yet. A block's rows see that cache and each other, and
//! their keys are forgotten: nothing is left of a block that was rejected. After a round, the features of what was committed
//! are projected and their keys written behind.
//!
//! A tree grows over the slots of the block (`dynamic_tree`): level `d` holds guesses of slot `d`, and what a slot's logits
//! are behind a path is the head's business (`walks`). A chain is a tree of one guess a level.
//!
//! Shape legend: `b` texts, `B` rows of a block, `S` slots, `T` guesses of a level, `H` hidden size, `V` vocabulary of the
//! target, `DV` of the draft.

use std::path::Path;

use serde_json::json;
use tch::{Kind, Tensor};

use super::dynamic_tree::{DynamicTree, Expand, Names, grow};
use super::{
    Asked, Branch, Context, DraftSampling, Drafter, DrafterKind, Guesser, Joining, Progress, Trained, Trees, tree_text,
};
use crate::decode::policy::Proposal;
use crate::decode::prefill::Passes;
use crate::device;
use crate::draft::block::backbone::Backbone;
use crate::draft::block::{BlockConfig, BlockShape};
use crate::error::{Error, Result};
use crate::export::{self, block::Imported};
use crate::models::TargetModel;
use crate::nn::{Head, KvCache, compact};
use crate::vocab::VocabMap;

mod walks;

use walks::{Drafted, HeadAtWork, Walk};

/// The row of the table of drafters for a head.
pub const fn kind(algorithm: &'static str) -> DrafterKind {
    DrafterKind {
        algorithm,
        formats: &[export::block::ZLAB.name, export::block::SPECULATORS.name],
        from_checkpoint,
        from_export,
        default_tree: WHOLE_CHAIN,
        trees: Trees::Dynamic,
    }
}

/// A chain of one guess of every slot.
const WHOLE_CHAIN: &str = "chain";

fn from_checkpoint<'a>(trained: &Trained<'_>, asked: Asked<'a, '_>) -> Result<Guesser<'a>> {
    let config = BlockConfig::read(&trained.description["draft"])?;
    let shape = BlockShape::from_description(trained.description)
        .map_err(|problem| Error::Failed(format!("the checkpoint is none of a block drafter: {problem}")))?;
    let tensors = trained.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
    let vocabulary = trained.vocabulary.clone();
    guesser(BlockParts { config, shape, tensors, vocabulary, own_tables: OwnTables::default() }, asked, Vec::new())
}

fn from_export<'a>(folder: &Path, asked: Asked<'a, '_>) -> Result<Guesser<'a>> {
    let Imported { method, shape, head, tensors, vocabulary, lm_head, embedding, mut notes } =
        export::block::read(folder, Some(asked.target.info().num_layers()))?;
    let config = BlockConfig::read(&json!({
        "algorithm": method.name(),
        "num_layers": shape.layers.len(),
        "block_size": shape.block_size,
        "layout": shape.layout,
        "head": head,
    }))?;
    let mut own_tables = OwnTables::default();
    if let Some(own) = lm_head
        && (vocabulary.is_some() || export::eagle3::is_other_embedding(&own, &asked.target.head().weight)?)
    {
        if vocabulary.is_none() {
            notes.push(
                "the draft has a vocabulary projection that is not the target's: the draft's own is used".to_owned(),
            );
        }
        own_tables.head = Some(own);
    }
    if let Some(own) = embedding
        && export::eagle3::is_other_embedding(&own, &asked.target.embedding().table)?
    {
        notes.push("the draft has an embedding that is not the target's: the draft's own is used".to_owned());
        own_tables.embedding = Some(own);
    }
    guesser(BlockParts { config, shape, tensors, vocabulary, own_tables }, asked, notes)
}

fn guesser<'a>(parts: BlockParts, asked: Asked<'a, '_>, mut notes: Vec<String>) -> Result<Guesser<'a>> {
    let asked_for = match asked.tree {
        WHOLE_CHAIN => None,
        named => Some(tree_text::dynamic(named)?),
    };
    let method = parts.config.kind().name;
    let mut drafter = BlockDrafter::new(parts, asked.target, DynamicTree::chain(1), asked.sampling)?;
    let most = drafter.most_drafts();
    let whole = (DynamicTree::chain(most), format!("chain:{most}"));
    let (tree, text) = match asked_for {
        None => whole,
        Some((tree, text)) if tree.depth <= most => (tree, text),
        Some((tree, text)) => {
            notes.push(format!(
                "the tree is {} deep and a block gives {most} tokens: deeper guesses are left out",
                tree.depth
            ));
            if tree.top_k == 1 { whole } else { (DynamicTree { depth: most, ..tree }, text) }
        }
    };
    drafter.tree = tree;
    Ok(Guesser { drafter: Box::new(drafter), tree: text, notes, method: Some(method) })
}

/// What a block drafter is made of.
#[derive(Debug)]
pub struct BlockParts {
    /// Its configuration: which head, and the head's keys.
    pub config: BlockConfig,
    /// Its architecture.
    pub shape: BlockShape,
    /// Tensors under the names of training.
    pub tensors: Vec<(String, Tensor)>,
    /// Its own vocabulary, where it is smaller than the target's.
    pub vocabulary: Option<VocabMap>,
    /// Tables of its own, where they are not the target's.
    pub own_tables: OwnTables,
}

/// Tables that a published draft brings along.
#[derive(Debug, Default)]
pub struct OwnTables {
    /// `[V, H]`
    pub embedding: Option<Tensor>,
    /// `[DV, H]`
    pub head: Option<Tensor>,
}

/// Drafts whole blocks.
pub struct BlockDrafter {
    backbone: Backbone,
    head: Box<dyn HeadAtWork>,
    /// `[V, H]`
    embedding: Tensor,
    /// `[DV, H]`
    vocabulary_head: Head,
    /// `[DV]` the target's numbers of the draft's tokens, where they differ.
    target_ids: Option<Tensor>,
    capture: Vec<usize>,
    names: Names,
    tree: DynamicTree,
    sampling: DraftSampling,
    /// How prompts are cut.
    passes: Passes,
    rows: Option<Rows>,
}

/// What is kept of the running texts.
struct Rows {
    cache: KvCache,
    /// `[b, H]` what the backbone reads of the token before the anchor.
    last_seen: Tensor,
}

impl BlockDrafter {
    /// A drafter for a target. The draft takes the target's element type and device; tensors that have both are shared. A
    /// tree that is deeper than a block is cut.
    pub fn new(
        parts: BlockParts,
        target: &dyn TargetModel,
        tree: DynamicTree,
        sampling: DraftSampling,
    ) -> Result<Self> {
        let BlockParts { config, shape, tensors, vocabulary, own_tables } = parts;
        let dimensions = target.info();
        for (what, own, theirs) in [
            ("tokens", shape.vocab_size, dimensions.vocab_size),
            ("hidden values", shape.hidden_size, dimensions.hidden_size),
            ("layers", shape.num_target_layers as i64, dimensions.num_layers() as i64),
        ] {
            if own != theirs {
                let problem =
                    format!("the draft is for another target: for one of {own} {what}, this one has {theirs}");
                return Err(Error::Failed(problem));
            }
        }
        let (kind, device) = (target.kind(), target.device());
        let find = |name: &str| {
            let found = tensors.iter().find(|(other, _)| other == name).map(|(_, tensor)| tensor.detach());
            let found = found.ok_or_else(|| Error::Failed(format!("the draft holds no tensor `{name}`")))?;
            Ok(found.f_to_device(device)?.f_to_kind(kind)?)
        };
        for spec in crate::draft::block::tensors(&config, &shape)? {
            let got = find(&spec.name)?.size();
            if got != spec.shape {
                return Err(Error::Failed(format!("tensor `{}`: expected {:?}, got {got:?}", spec.name, spec.shape)));
            }
        }
        let target_ids = vocabulary.as_ref().map(|map| device::upload(map.target_ids(), device)).transpose()?;
        let own = |table: &Tensor| Ok::<_, Error>(table.f_to_device(device)?.f_to_kind(kind)?);
        let vocabulary_head = match (&own_tables.head, &target_ids) {
            (Some(own_head), _) => Head::plain(own(own_head)?),
            (None, Some(ids)) => target.head().rows(ids)?,
            (None, None) => target.head().share(),
        };
        let embedding = match &own_tables.embedding {
            Some(table) => own(table)?,
            None => target.embedding().table.shallow_clone(),
        };
        let own_ids = vocabulary.map(|map| map.target_ids().to_vec());
        tree.check()?;
        let head = walks::open(&config, &shape, &find)?;
        let most = head.most_drafts().unwrap_or(shape.slots()) as usize;
        Ok(Self {
            backbone: Backbone::new(&shape, &|name| compact(find(name)?), device)?,
            head,
            embedding,
            vocabulary_head,
            target_ids,
            capture: shape.capture(),
            names: Names::new(shape.vocab_size, own_ids),
            // There is nothing behind the last slot.
            tree: DynamicTree { depth: tree.depth.min(most), ..tree },
            sampling,
            passes: Passes::default(),
            rows: None,
        })
    }

    /// Most tokens that a block gives.
    pub fn most_drafts(&self) -> usize {
        self.head.most_drafts().unwrap_or(self.backbone.shape().slots()) as usize
    }

    /// Context keys of the running texts.
    pub fn cache(&self) -> Option<&KvCache> {
        self.rows.as_ref().map(|rows| &rows.cache)
    }

    /// `[b, H]` what the backbone reads of the tokens before the anchors.
    #[cfg(test)]
    pub(crate) fn last_seen(&self) -> Option<&Tensor> {
        self.rows.as_ref().map(|rows| &rows.last_seen)
    }

    /// The cache, and nothing else of it.
    #[cfg(test)]
    pub(crate) fn into_cache(self) -> Option<KvCache> {
        self.rows.map(|rows| rows.cache)
    }

    /// Spoils what the cache has beyond its texts.
    #[cfg(test)]
    pub(crate) fn poison(&mut self) {
        self.rows.iter_mut().for_each(|rows| rows.cache.poison());
    }

    /// The same with prompts cut otherwise.
    #[cfg(test)]
    pub(crate) fn with_passes(self, passes: Passes) -> Self {
        Self { passes, ..self }
    }

    /// Writes the keys of new context, of different lengths, and returns what the backbone reads of each text's last token,
    /// `[b, H]`.
    fn extend(&self, cache: &mut KvCache, features: &[Vec<Tensor>], counts: &[i64]) -> Result<Tensor> {
        for (row, &count) in features.iter().zip(counts) {
            let sizes: Vec<Vec<i64>> = row.iter().map(Tensor::size).collect();
            if sizes.len() != self.capture.len() || count < 1 || sizes.iter().any(|size| size[0] != count) {
                let wanted = self.capture.len();
                let problem = format!("features for {count} tokens of {wanted} layers were expected, got {sizes:?}");
                return Err(Error::Failed(problem));
            }
        }
        let device = self.embedding.device();
        let captured: Vec<Tensor> = (0..self.capture.len())
            .map(|layer| {
                let parts: Vec<&Tensor> = features.iter().map(|row| &row[layer]).collect();
                Tensor::cat(&parts, 0).to_device(device) // [all, H]
            })
            .collect();
        let context = self.backbone.project_features(&captured)?; // [all, H]
        let ends: Vec<i64> = counts
            .iter()
            .scan(0, |end, count| {
                *end += count;
                Some(*end - 1)
            })
            .collect();
        let last = context.index_select(0, &device::upload(&ends, device)?); // [b, H]
        let parts = context.split_with_sizes(counts, 0);
        // Padding is on the right, and the cache does not keep it.
        self.backbone.extend_cache(&Tensor::pad_sequence(&parts, true, 0.0, "right"), counts, cache)?;
        Ok(last)
    }
}

impl Drafter for BlockDrafter {
    fn capture(&self) -> Vec<usize> {
        self.capture.clone()
    }

    fn join(&mut self, rows: &[Joining<'_>]) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let _guard = tch::no_grad_guard();
        let lengths: Vec<usize> = rows.iter().map(|row| row.tokens.len() - 1).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut cache = self.backbone.new_cache(rows.len() as i64, longest as i64);
        let mut last_seen = None;
        for piece in self.passes.pieces(longest) {
            // A prompt of more than one piece is alone; of a group every prompt is in its one piece.
            let count = |length: &usize| piece.end.min(*length) as i64 - piece.start as i64;
            let counts: Vec<i64> = lengths.iter().map(count).collect();
            let part = |(row, &count): (&Joining<'_>, &i64)| {
                row.features.iter().map(|layer| layer.narrow(0, piece.start as i64, count)).collect()
            };
            let features: Vec<Vec<Tensor>> = rows.iter().zip(&counts).map(part).collect();
            last_seen = Some(self.extend(&mut cache, &features, &counts)?);
        }
        let last_seen =
            last_seen.ok_or_else(|| Error::Failed("the engine handed the draft an empty prompt".to_owned()))?;
        self.rows = Some(match self.rows.take() {
            None => Rows { cache, last_seen },
            Some(mut running) => {
                running.cache.append_rows(cache);
                Rows { cache: running.cache, last_seen: Tensor::cat(&[running.last_seen, last_seen], 0) }
            }
        });
        Ok(())
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        let _guard = tch::no_grad_guard();
        let confident = self.confident_drafts();
        let Some(running) = self.rows.as_mut().filter(|running| running.cache.rows() == rows.len() as i64) else {
            return Err(Error::Failed(format!("the draft does not know the {} rows it shall guess for", rows.len())));
        };
        let depth = rows.iter().map(|row| row.depth).max().unwrap_or(0).min(self.tree.depth) as i64;
        if depth == 0 {
            return Ok(rows.iter().map(|row| Proposal::nothing(super::last(row.tokens))).collect());
        }
        let shape = self.backbone.shape();
        let device = self.embedding.device();
        let last = |back: usize| -> Vec<i64> {
            rows.iter().map(|row| i64::from(row.tokens[row.tokens.len().saturating_sub(back).max(1) - 1])).collect()
        };
        let anchors = device::upload(&last(0), device)?; // [b]
        let before = device::upload(&last(1), device)?; // [b]
        let masks = Tensor::full([rows.len() as i64, shape.block_size - 1], shape.mask_token_id, (Kind::Int64, device));
        let tokens = Tensor::cat(&[anchors.unsqueeze(1), masks], 1); // [b, B]
        let block = self.backbone.embed(&self.embedding, &tokens)?; // [b, B, H]
        let hidden = self.backbone.forward_cached(&block, &mut running.cache)?; // [b, B, H]
        let drafted = Drafted {
            hidden: &hidden,
            first_row: shape.first_row(),
            slots: depth,
            anchors: &anchors,
            before: &before,
            last_seen: &running.last_seen,
            embedding: &self.embedding,
            head: &self.vocabulary_head,
            target_ids: self.target_ids.as_ref(),
        };
        let walk = self.head.walk(&drafted)?;
        let texts = rows.len() as i64;
        let mut pass = Pass { walk, slot: 0, texts, width: 1, anchors: &anchors, confidence: Vec::new() };
        let proposals = grow(&self.tree, self.sampling, &self.names, rows, &mut pass)?;
        match confident {
            0 => Ok(proposals),
            _ => pass.with_confidence(proposals),
        }
    }

    fn commit(&mut self, rows: &[Progress<'_>]) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let Some(mut running) = self.rows.take().filter(|running| running.cache.rows() == rows.len() as i64) else {
            return Err(Error::Failed(format!("the draft does not know the {} rows that went on", rows.len())));
        };
        let counts: Vec<i64> = rows.iter().map(|row| row.new as i64).collect();
        let features: Vec<Vec<Tensor>> =
            rows.iter().map(|row| row.features.iter().map(Tensor::shallow_clone).collect()).collect();
        running.last_seen = self.extend(&mut running.cache, &features, &counts)?;
        self.rows = Some(running);
        Ok(())
    }

    fn retain(&mut self, rows: &[usize]) {
        let kept: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        self.rows = self.rows.take().filter(|_| !kept.is_empty()).map(|mut running| {
            running.cache.select_rows(&kept);
            let index = device::send(&Tensor::from_slice(&kept), running.last_seen.device());
            Rows { last_seen: running.last_seen.index_select(0, &index), cache: running.cache }
        });
    }

    fn confident_drafts(&self) -> usize {
        // A node of a tree would need one behind each of its paths.
        if self.head.has_confidence() && self.tree.top_k == 1 { self.tree.depth } else { 0 }
    }

    fn cache_lengths(&self) -> Vec<i64> {
        self.cache().map_or_else(Vec::new, |cache| cache.lengths().to_vec())
    }
}

/// A tree on its way over the slots of a block.
struct Pass<'a> {
    walk: Box<dyn Walk + 'a>,
    slot: i64,
    /// `b`
    texts: i64,
    /// Guesses of the level before, `T`.
    width: i64,
    anchors: &'a Tensor,
    /// `[m]` of each step, where the head has an opinion.
    confidence: Vec<Tensor>,
}

impl Pass<'_> {
    /// Chains with what the head thinks of each of their guesses.
    fn with_confidence(self, proposals: Vec<Proposal>) -> Result<Vec<Proposal>> {
        let slots = self.confidence.len();
        let all = Tensor::f_stack(&self.confidence, 1)?.to_kind(Kind::Float).flatten(0, 1); // [b * S]
        let all = Vec::<f32>::try_from(all)?;
        let of_row = |(row, proposal): (usize, Proposal)| {
            let guesses = proposal.tree.len() - 1;
            proposal.with_confidence(all[row * slots..row * slots + guesses].to_vec())
        };
        Ok(proposals.into_iter().enumerate().map(of_row).collect())
    }
}

impl Expand for Pass<'_> {
    fn start(&mut self) -> Result<Tensor> {
        let texts = Tensor::arange(self.texts, (Kind::Int64, self.anchors.device()));
        let logits = self.walk.step(0, &texts, &texts, self.anchors)?; // [b, DV]
        self.confidence.extend(self.walk.confidence());
        Ok(logits)
    }

    fn expand(&mut self, frontier: &[Vec<Branch>]) -> Result<Tensor> {
        let width = frontier.iter().map(Vec::len).max().unwrap_or(0) as i64;
        let mut numbers: Vec<i64> = Vec::new();
        let place =
            |place: i64, row: &Vec<Branch>| row.get(place as usize).copied().unwrap_or(Branch { token: 0, parent: 0 });
        let each = || (0..).zip(frontier).flat_map(|(text, row)| (0..width).map(move |at| (text, place(at, row))));
        numbers.extend(each().map(|(text, _)| text));
        numbers.extend(each().map(|(text, branch)| text * self.width + branch.parent as i64));
        numbers.extend(each().map(|(_, branch)| i64::from(branch.token)));
        let numbers = device::upload(&numbers, self.anchors.device())?;
        let part = |index: i64| numbers.narrow(0, index * self.texts * width, self.texts * width);
        self.slot += 1;
        self.width = width;
        let logits = self.walk.step(self.slot, &part(0), &part(1), &part(2))?; // [b * T, DV]
        self.confidence.extend(self.walk.confidence());
        Ok(logits.unflatten(0, [self.texts, width]))
    }
}
