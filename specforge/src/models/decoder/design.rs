//! What a model of decoder layers is, as a family reads it from config.json: every number, every choice and the name of every
//! tensor. Tensors, parameters, layers and tables follow from it.

use std::collections::HashMap;
use std::fmt::Debug;
use std::rc::Rc;

use tch::{Kind, Tensor};

use super::mlp::MlpDesign;
use super::names::{EMBEDDING, GetPart, HEAD, NORM, Shapes, Spelling, linear, prefix};
use crate::error::Result;
use crate::models::keys::Keys;
use crate::models::rope_keys::RopeDesign;
use crate::models::{LayerKind, LayerShape, MaskedDiffusion, ParameterCounts, TargetInfo, limits};
use crate::nn::{DecoderLayer, HeadForm, HeadNorms, LayerNorms, QueryKeyValue, RmsNorm, SelfAttention};

/// Numbers that every family has.
#[derive(Debug, Clone, PartialEq)]
pub struct Sizes {
    /// `H`
    pub hidden_size: i64,
    /// `V`
    pub vocab_size: i64,
    /// Longest context.
    pub max_position_embeddings: i64,
    /// Number of layers.
    pub layers: usize,
    /// `N`
    pub heads: i64,
    /// `G`
    pub groups: i64,
    /// `D`
    pub head_dim: i64,
    /// Epsilon of the norms.
    pub epsilon: f64,
    /// Whether the head is the embedding.
    pub tied: bool,
}

/// What a family takes where a configuration is silent.
#[derive(Debug, Clone, Copy)]
pub struct Silent {
    /// `D`; `H / N` where there is none.
    pub head_dim: Option<i64>,
    /// Epsilon of the norms.
    pub epsilon: f64,
    /// Whether the head is the embedding.
    pub tied: bool,
}

impl Sizes {
    /// Reads and checks the usual keys.
    pub fn read(keys: &Keys<'_>, silent: Silent) -> Result<Self, String> {
        let hidden_size = keys.whole("hidden_size")?;
        let heads = keys.whole("num_attention_heads")?;
        let layers = keys.whole("num_hidden_layers")?;
        let given = keys.maybe_whole("head_dim", silent.head_dim)?;
        let sizes = Self {
            hidden_size,
            vocab_size: keys.whole("vocab_size")?,
            max_position_embeddings: keys.whole("max_position_embeddings")?,
            layers: usize::try_from(layers).unwrap_or(0),
            heads,
            groups: keys.whole_or("num_key_value_heads", heads)?,
            head_dim: given.unwrap_or(hidden_size / heads.max(1)),
            epsilon: keys.number_or("rms_norm_eps", silent.epsilon)?,
            tied: keys.flag_or("tie_word_embeddings", silent.tied)?,
        };
        sizes.check()?;
        if given.is_none() && hidden_size % heads != 0 {
            return Err(format!(
                "`num_attention_heads`: expected a divisor of hidden_size ({hidden_size}) where there is no `head_dim`, got {heads}"
            ));
        }
        Ok(sizes)
    }

    /// Refuses sizes that no model has.
    fn check(&self) -> Result<(), String> {
        limits::within(&[
            ("hidden_size", self.hidden_size, limits::MOST_HIDDEN),
            ("num_hidden_layers", limits::signed(self.layers), limits::MOST_LAYERS),
            ("num_attention_heads", self.heads, limits::MOST_HEADS),
            ("num_key_value_heads", self.groups, limits::MOST_HEADS),
            ("head_dim", self.head_dim, limits::WIDEST / self.heads.max(1)),
            ("vocab_size", self.vocab_size, limits::MOST_TOKENS),
            ("max_position_embeddings", self.max_position_embeddings, limits::LONGEST_CONTEXT),
        ])
    }

    /// Attention with these heads and nothing special.
    pub fn attention(&self) -> AttentionDesign {
        AttentionDesign {
            heads: self.heads,
            groups: self.groups,
            head_dim: self.head_dim,
            joined: false,
            bias: false,
            output_bias: false,
            norms: HeadNormDesign::None,
            scale: None,
            softcap: None,
            sinks: false,
        }
    }
}

/// How the weights of norms are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormWeights {
    /// As they are, multiplied after the rounding to the element type.
    Plain,
    /// As they are, multiplied before it.
    Wide,
    /// One less than they are, multiplied before it.
    LessOne,
}

impl NormWeights {
    /// The norm of a stored weight.
    pub fn norm(self, stored: Tensor, epsilon: f64) -> RmsNorm {
        let wide = |stored: Tensor| match stored.kind() {
            Kind::Double => stored,
            _ => stored.to_kind(Kind::Float),
        };
        let weight = match self {
            Self::Plain => stored,
            Self::Wide => wide(stored),
            Self::LessOne => wide(stored) + 1.0,
        };
        RmsNorm { weight, epsilon }
    }
}

/// Norms of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadNormDesign {
    /// There are none.
    None,
    /// Over each head.
    EachHead,
    /// Over all heads together.
    AllHeads,
}

/// Attention of a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionDesign {
    /// `N`
    pub heads: i64,
    /// `G`
    pub groups: i64,
    /// `D`
    pub head_dim: i64,
    /// Whether queries, keys and values come from one matrix.
    pub joined: bool,
    /// Whether those have biases.
    pub bias: bool,
    /// Whether the projection back has a bias.
    pub output_bias: bool,
    /// Norms of queries and keys.
    pub norms: HeadNormDesign,
    /// Multiplies the scores, where that is not `1 / sqrt(D)`.
    pub scale: Option<f64>,
    /// Soft cap of the scores.
    pub softcap: Option<f64>,
    /// Whether each head has a sink.
    pub sinks: bool,
}

impl AttentionDesign {
    /// Tensors behind the layer's prefix. `H` is the width of the hidden states.
    fn tensors(&self, hidden: i64) -> Shapes {
        let (query, group) = (self.heads * self.head_dim, self.groups * self.head_dim);
        let mut tensors = Vec::new();
        let mut linear = |name: &str, out: i64, input: i64, bias: bool| {
            tensors.push((format!("self_attn.{name}.weight"), vec![out, input]));
            if bias {
                tensors.push((format!("self_attn.{name}.bias"), vec![out]));
            }
        };
        if self.joined {
            linear("qkv_proj", query + 2 * group, hidden, self.bias);
        } else {
            linear("q_proj", query, hidden, self.bias);
            linear("k_proj", group, hidden, self.bias);
            linear("v_proj", group, hidden, self.bias);
        }
        linear("o_proj", hidden, query, self.output_bias);
        let mut vector = |name: &str, width: i64| tensors.push((format!("self_attn.{name}"), vec![width]));
        match self.norms {
            HeadNormDesign::None => {}
            HeadNormDesign::EachHead => {
                vector("q_norm.weight", self.head_dim);
                vector("k_norm.weight", self.head_dim);
            }
            HeadNormDesign::AllHeads => {
                vector("q_norm.weight", query);
                vector("k_norm.weight", group);
            }
        }
        if self.sinks {
            vector("sinks", self.heads);
        }
        tensors
    }

    fn build(&self, norm: &dyn Fn(Tensor) -> RmsNorm, get: &mut GetPart<'_>) -> Result<SelfAttention> {
        let mut projection = |name: &str, bias: bool| linear(&format!("self_attn.{name}"), bias, get);
        let input = match self.joined {
            true => QueryKeyValue::Joined(projection("qkv_proj", self.bias)?),
            false => QueryKeyValue::Apart {
                query: projection("q_proj", self.bias)?,
                key: projection("k_proj", self.bias)?,
                value: projection("v_proj", self.bias)?,
            },
        };
        let output = projection("o_proj", self.output_bias)?;
        let mut vector = |name: &str| get(&format!("self_attn.{name}"));
        let norms = match self.norms {
            HeadNormDesign::None => HeadNorms::None,
            HeadNormDesign::EachHead => {
                HeadNorms::EachHead { query: norm(vector("q_norm.weight")?), key: norm(vector("k_norm.weight")?) }
            }
            HeadNormDesign::AllHeads => {
                HeadNorms::AllHeads { query: norm(vector("q_norm.weight")?), key: norm(vector("k_norm.weight")?) }
            }
        };
        let sinks = if self.sinks { Some(vector("sinks")?) } else { None };
        let Self { heads, groups, head_dim, scale, softcap, .. } = *self;
        Ok(SelfAttention { projection: input, output, heads, groups, head_dim, norms, scale, softcap, sinks })
    }
}

/// Names of the norms around attention and MLP, where they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NormNames {
    /// Before attention.
    pub before_attention: Option<&'static str>,
    /// Behind attention.
    pub after_attention: Option<&'static str>,
    /// Before the MLP.
    pub before_mlp: Option<&'static str>,
    /// Behind the MLP.
    pub after_mlp: Option<&'static str>,
}

impl NormNames {
    /// Before each block, as in most families.
    pub const BEFORE: Self = Self {
        before_attention: Some("input_layernorm"),
        after_attention: None,
        before_mlp: Some("post_attention_layernorm"),
        after_mlp: None,
    };
    /// Behind each block.
    pub const BEHIND: Self = Self {
        before_attention: None,
        after_attention: Some("post_attention_layernorm"),
        before_mlp: None,
        after_mlp: Some("post_feedforward_layernorm"),
    };
    /// On both sides of each block.
    pub const AROUND: Self = Self {
        before_attention: Some("input_layernorm"),
        after_attention: Some("post_attention_layernorm"),
        before_mlp: Some("pre_feedforward_layernorm"),
        after_mlp: Some("post_feedforward_layernorm"),
    };

    fn all(&self) -> [Option<&'static str>; 4] {
        [self.before_attention, self.after_attention, self.before_mlp, self.after_mlp]
    }
}

/// A layer.
#[derive(Debug, Clone)]
pub struct LayerDesign {
    /// Its attention.
    pub attention: AttentionDesign,
    /// Its MLP.
    pub mlp: Rc<dyn MlpDesign>,
    /// Its norms.
    pub norms: NormNames,
    /// Multiplies what each block gives before it is added.
    pub residual_scale: f64,
    /// Tokens that it sees, the one that looks included; `None` for all.
    pub window: Option<i64>,
    /// Which of [`Design::ropes`] turns its heads; `None` where nothing turns.
    pub rope: Option<usize>,
}

impl LayerDesign {
    /// A layer that sees everything, with norms before its blocks and the first rotary embedding.
    pub fn new(attention: AttentionDesign, mlp: Rc<dyn MlpDesign>) -> Self {
        Self { attention, mlp, norms: NormNames::BEFORE, residual_scale: 1.0, window: None, rope: Some(0) }
    }

    /// Tensors behind the layer's prefix.
    fn tensors(&self, hidden: i64) -> Shapes {
        let norm = |name: &str| (format!("{name}.weight"), vec![hidden]);
        let norms = self.norms.all().into_iter().flatten().map(norm);
        self.attention.tensors(hidden).into_iter().chain(self.mlp.tensors()).chain(norms).collect()
    }

    fn build(&self, norm: &dyn Fn(Tensor) -> RmsNorm, get: &mut GetPart<'_>) -> Result<DecoderLayer> {
        let attention = self.attention.build(norm, get)?;
        let mlp = self.mlp.build(get)?;
        let mut named = |name: Option<&str>| {
            name.map(|name| get(&format!("{name}.weight"))).transpose().map(|stored| stored.map(norm))
        };
        let norms = LayerNorms {
            before_attention: named(self.norms.before_attention)?,
            after_attention: named(self.norms.after_attention)?,
            before_mlp: named(self.norms.before_mlp)?,
            after_mlp: named(self.norms.after_mlp)?,
        };
        let Self { residual_scale, window, rope, .. } = *self;
        Ok(DecoderLayer { attention, mlp, norms, residual_scale, window, rope })
    }
}

/// A model of decoder layers.
#[derive(Debug, Clone)]
pub struct Design {
    /// Its numbers.
    pub sizes: Sizes,
    /// Each layer in order.
    pub layers: Vec<LayerDesign>,
    /// Its rotary embeddings. Drafts take after the first.
    pub ropes: Vec<RopeDesign>,
    /// How the weights of its norms are stored.
    pub norm_weights: NormWeights,
    /// What rows of the embedding are multiplied with.
    pub embedding_scale: f64,
    /// Whether that is rounded to the element type of the weights.
    pub rounds_embedding_scale: bool,
    /// What the head does beside the product with its matrix.
    pub head: HeadForm,
    /// Width of the MLP of a draft whose configuration does not say it.
    pub draft_width: i64,
    /// How the family spells names; [`Design::tensors`] are in its own.
    pub spelling: Spelling,
    /// What it is beside its layers, where its tokens see those behind them.
    pub diffusion: Option<MaskedDiffusion>,
}

impl Design {
    /// A model of one kind of layer, with nothing special before and behind them.
    pub fn new(sizes: Sizes, layer: &LayerDesign, rope: RopeDesign) -> Self {
        Self {
            layers: vec![layer.clone(); sizes.layers],
            ropes: vec![rope],
            norm_weights: NormWeights::Plain,
            embedding_scale: 1.0,
            rounds_embedding_scale: false,
            head: HeadForm::PLAIN,
            draft_width: layer.mlp.a_token(),
            spelling: Spelling::USUAL,
            diffusion: None,
            sizes,
        }
    }

    /// Gives each layer a window or none.
    pub fn with_windows(mut self, windows: &[Option<i64>]) -> Self {
        self.layers.iter_mut().zip(windows).for_each(|(layer, window)| layer.window = *window);
        self
    }

    /// Refuses numbers that do not fit each other.
    pub fn check(&self) -> Result<(), String> {
        self.template().check()?;
        self.ropes.iter().try_for_each(RopeDesign::check)?;
        self.diffusion.iter().try_for_each(|diffusion| diffusion.check(self.sizes.vocab_size))?;
        match self.layers.iter().filter_map(|layer| layer.window).find(|window| *window < 1) {
            Some(window) => Err(format!("`sliding_window`: expected a number from 1, got {window}")),
            None => Ok(()),
        }
    }

    /// A plain layer of about this shape, see [`TargetInfo::draft_template`].
    fn template(&self) -> LayerShape {
        LayerShape {
            intermediate_size: self.draft_width,
            num_attention_heads: self.sizes.heads,
            num_key_value_heads: self.sizes.groups,
            head_dim: self.sizes.head_dim,
            rms_norm_eps: self.sizes.epsilon,
            rope: self.ropes[0].for_drafts(self.sizes.head_dim),
        }
    }

    /// What the rest of the program needs to know.
    pub fn info(&self) -> TargetInfo {
        let Sizes { hidden_size, vocab_size, max_position_embeddings, tied, .. } = self.sizes;
        let numbers = |(_, shape): &(String, Vec<i64>)| shape.iter().product::<i64>() as u64;
        let all: u64 = self.tensors().iter().map(numbers).sum();
        let tables = (if tied { 1 } else { 2 }) * (vocab_size * hidden_size) as u64;
        let idle: u64 = self.layers.iter().map(|layer| layer.mlp.idle()).sum();
        TargetInfo {
            hidden_size,
            vocab_size,
            layers: self.layers.iter().map(|layer| layer.window.map_or(LayerKind::Full, LayerKind::Window)).collect(),
            max_position_embeddings,
            parameters: ParameterCounts { all, tables, a_token: all - tables - idle },
            widest: self.layers.iter().map(|layer| layer.mlp.a_token()).max().unwrap_or(hidden_size),
            head: self.head,
            embedding_scale: self.embedding_scale,
            template: self.template(),
            diffusion: self.diffusion,
            pictures: None,
        }
    }

    /// Every tensor with its shape, under its Hugging Face name.
    pub fn tensors(&self) -> Shapes {
        let Sizes { hidden_size, vocab_size, tied, .. } = self.sizes;
        let usual = tensors(&self.layers, [vocab_size, hidden_size], tied);
        usual.into_iter().map(|(name, shape)| ((self.spelling.tensor)(&name), shape)).collect()
    }

    /// Builds one layer from a function that gives each of the model's tensors.
    pub fn build_layer(&self, index: usize, get: &mut GetPart<'_>) -> Result<DecoderLayer> {
        let prefix = prefix(index);
        self.layers[index].build(&|stored| self.norm(stored), &mut |name| get(&format!("{prefix}{name}")))
    }

    /// A norm from its stored weight.
    pub fn norm(&self, stored: Tensor) -> RmsNorm {
        self.norm_weights.norm(stored, self.sizes.epsilon)
    }

    /// Shapes by name.
    pub fn shapes(&self) -> HashMap<String, Vec<i64>> {
        self.tensors().into_iter().collect()
    }
}

/// Tensors of a model of these layers, with tables `[V, H]`.
pub fn tensors(layers: &[LayerDesign], table: [i64; 2], tied: bool) -> Shapes {
    let hidden = table[1];
    let mut tensors = vec![(EMBEDDING.to_owned(), table.to_vec())];
    for (index, layer) in layers.iter().enumerate() {
        let prefix = prefix(index);
        tensors.extend(layer.tensors(hidden).into_iter().map(|(name, shape)| (format!("{prefix}{name}"), shape)));
    }
    tensors.push((NORM.to_owned(), vec![hidden]));
    if !tied {
        tensors.push((HEAD.to_owned(), table.to_vec()));
    }
    tensors
}
