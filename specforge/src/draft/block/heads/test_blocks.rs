//! Blocks of random numbers for tests of heads.

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::TensorSpec;
use super::sequential::{Drafted, SequentialHead, Walk, greedy, walk};
use crate::draft::block::chunk::Chunk;
use crate::draft::block::config::{BlockConfig, BlockShape};
use crate::error::{Error, Result};
use crate::models::TargetInfo;
use crate::nn::Head;
use crate::nn::drawn::Drawn;

const OPTIONS: (Kind, Device) = (Kind::Double, Device::Cpu);

/// `n`, `H`, `V`.
pub const SIZES: [i64; 3] = [3, 12, 17];

/// A configuration and shape for the sizes above.
pub fn configured(section: &Value) -> (BlockConfig, BlockShape) {
    let mut section = section.clone();
    for (key, value) in [("num_layers", 1.into()), ("target_layer_ids", vec![0].into()), ("mask_token_id", 0.into())] {
        section[key] = value;
    }
    let config = BlockConfig::read(&section).unwrap();
    let shape = config.shape(&TargetInfo::of(SIZES[1], SIZES[2], 4, 64)).unwrap();
    (config, shape)
}

/// Random tensors of these shapes, found by name.
pub fn tensors(specs: Vec<TensorSpec>, drawn: &Drawn) -> impl Fn(&str) -> Result<Tensor> {
    let made: Vec<_> = specs.into_iter().map(|spec| (spec.name, drawn.normal(&spec.shape))).collect();
    move |name| {
        let found = made.iter().find(|(own, _)| own == name).map(|(_, tensor)| tensor.shallow_clone());
        found.ok_or_else(|| Error::Failed(format!("no tensor is called {name}")))
    }
}

/// What a backbone could have given for a chunk.
pub struct Blocks {
    pub shape: BlockShape,
    /// `[n, B, H]`
    pub hidden: Tensor,
    pub head: Head,
    /// `[V, H]`
    pub embedding: Tensor,
    /// `[n]`
    pub anchors: Tensor,
}

impl Blocks {
    pub fn random(shape: &BlockShape, drawn: &Drawn) -> Self {
        let [blocks, hidden, vocabulary] = SIZES;
        Self {
            shape: shape.clone(),
            hidden: drawn.normal(&[blocks, shape.block_size, hidden]),
            head: Head::plain(drawn.normal(&[vocabulary, hidden])),
            embedding: drawn.normal(&[vocabulary, hidden]),
            anchors: drawn.below(vocabulary, &[blocks]),
        }
    }

    /// `[n, S, V]`
    pub fn base(&self) -> Tensor {
        self.head.logits(&self.hidden.narrow(1, self.shape.first_row(), self.shape.slots()))
    }

    /// The greedy walk, of as many tokens as there are.
    pub fn walk(&self, head: &dyn SequentialHead) -> Walk {
        let base = self.base();
        walk(head, &self.drafted(&base), head.drafts(), &mut greedy).unwrap()
    }

    pub fn drafted<'a>(&'a self, base: &'a Tensor) -> Drafted<'a> {
        let (hidden, anchors, embedding) = (&self.hidden, &self.anchors, &self.embedding);
        Drafted { hidden, first_row: self.shape.first_row(), base, anchors, embedding, tokens: None, pool: None }
    }

    /// The blocks in training, where the text behind an anchor is `tokens [n, ..]`, and all slots are supervised.
    pub fn chunk(&self, tokens: &Tensor) -> Chunk<'_> {
        let (blocks, slots) = (self.hidden.size()[0], self.shape.slots());
        let missing = self.shape.block_size - tokens.size()[1];
        let rest = Tensor::zeros([blocks, missing], (Kind::Int64, Device::Cpu));
        Chunk {
            shape: &self.shape,
            hidden: self.hidden.shallow_clone(),
            context: None,
            tokens: Tensor::cat(&[&self.anchors.unsqueeze(1), tokens, &rest], 1),
            before: self.anchors.shallow_clone(),
            supervised: Tensor::ones([blocks, slots], (Kind::Bool, Device::Cpu)),
            places: Tensor::arange(blocks * slots, (Kind::Int64, Device::Cpu)),
            teacher: Some(Tensor::randn([blocks * slots, self.embedding.size()[0]], OPTIONS)),
            head: &self.head,
            embedding: &self.embedding,
            vocabulary: None,
            document_shares: Tensor::ones([blocks], OPTIONS),
            progress: 0.0,
            whole: None,
        }
    }
}
