//! The backbone of every block drafter: a few layers that read the target's features and a block of masked rows.
//!
//! DFlash (<https://arxiv.org/abs/2602.06036>), PyPI `dflash` 0.1.0 (z-lab): Qwen3's layer, except that keys and values of
//! the text before a block come from the target's features, projected once (`fc`, `hidden_norm`) and read by every layer
//! as they are, while a block's own rows are normed as usual. The convolutions are those of DFlash2 (the same package).
//!
//! Rows of a batch's blocks are packed one block after the other. A row sees the context before its block's anchor, in a
//! layer with a window the last tokens of it, and the rows of its own block: all, or in a causal layer those up to itself.
//! Where the context begins and ends for each row is said by runs (`blocks`).
//!
//! Shape legend: `P` context rows, `R` block rows, `n` blocks of `B` rows each, `H` hidden size, `N` heads, `G` key/value
//! heads, `D` head size, `L` layers, `F` captured layers, `c` taps, `g` groups of channels.

use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::config::{BlockLayer, BlockShape, Convolution};
use super::heads::{Start, TensorSpec, Tensors};
use crate::device;
use crate::error::{Error, Result};
use crate::nn::merged_attention::{self, Own, Runs, merged_attention};
use crate::nn::rope::RopeTables;
use crate::nn::{
    AttentionMask, KvCache, LayerCache, Options, PreparedMask, RmsNorm, Rope, attention, gated_linear, linear,
    linear_each,
};

/// Deviation of random initial values, as Hugging Face's `initializer_range`.
const DEVIATION: f64 = 0.02;

/// Name of the row that stands for what is to be drafted, where it is trained and not the target's.
pub const MASK_EMBEDDING: &str = "mask_embedding";

/// Tensors of a backbone in creation order.
pub fn tensors(shape: &BlockShape) -> Vec<TensorSpec> {
    let (hidden, layer) = (shape.hidden_size, &shape.layer);
    let dim = layer.head_dim;
    let (queries, keys) = (layer.num_attention_heads * dim, layer.num_key_value_heads * dim);
    let matrix = |name: String, rows, columns| TensorSpec::new(name, &[rows, columns], Start::Normal(DEVIATION));
    let norm = |name: String, size| TensorSpec::new(name, &[size], Start::Ones);
    let captured = shape.target_layer_ids.len() as i64;
    let mut all = vec![matrix("fc.weight".to_owned(), hidden, captured * hidden)];
    all.push(norm("hidden_norm.weight".to_owned(), hidden));
    for index in 0..shape.layers.len() {
        let at = |name: &str| format!("layers.{index}.{name}");
        all.push(norm(at("input_layernorm.weight"), hidden));
        all.extend(shape.conv.iter().flat_map(|conv| convolution(conv, hidden, &at("attention_conv"))));
        all.extend([
            matrix(at("self_attn.q_proj.weight"), queries, hidden),
            matrix(at("self_attn.k_proj.weight"), keys, hidden),
            matrix(at("self_attn.v_proj.weight"), keys, hidden),
            matrix(at("self_attn.o_proj.weight"), hidden, queries),
            norm(at("self_attn.q_norm.weight"), dim),
            norm(at("self_attn.k_norm.weight"), dim),
            norm(at("post_attention_layernorm.weight"), hidden),
        ]);
        all.extend(shape.conv.iter().flat_map(|conv| convolution(conv, hidden, &at("mlp_conv"))));
        all.extend([
            matrix(at("mlp.gate_proj.weight"), layer.intermediate_size, hidden),
            matrix(at("mlp.up_proj.weight"), layer.intermediate_size, hidden),
            matrix(at("mlp.down_proj.weight"), hidden, layer.intermediate_size),
        ]);
    }
    all.push(norm("norm.weight".to_owned(), hidden));
    if shape.mask_embedding {
        all.push(TensorSpec::new(MASK_EMBEDDING, &[hidden], Start::Normal(DEVIATION)));
    }
    all
}

/// Those of one convolution, which begins as the identity.
fn convolution(conv: &Convolution, hidden: i64, prefix: &str) -> [TensorSpec; 2] {
    let coefficients = 2 * conv.kernel_size * (hidden / conv.group_size);
    [
        TensorSpec::new(format!("{prefix}.base_kernel"), &[2, conv.kernel_size, hidden], Start::FirstTap),
        TensorSpec::new(format!("{prefix}.kernel_projection.weight"), &[coefficients, hidden], Start::Zeros),
    ]
}

/// A backbone's weights, by what they do. They share their memory with the trained parameters.
#[derive(Debug)]
pub struct Backbone {
    fc: Tensor,
    hidden_norm: RmsNorm,
    layers: Vec<Layer>,
    norm: RmsNorm,
    mask_embedding: Option<Tensor>,
    rope: Rope,
    shape: BlockShape,
}

#[derive(Debug)]
struct Layer {
    input_norm: RmsNorm,
    attention_conv: Option<Conv>,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    query_norm: RmsNorm,
    key_norm: RmsNorm,
    post_attention_norm: RmsNorm,
    mlp_conv: Option<Conv>,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

/// Keys and values of each layer, `[P, G, D]`.
pub type LayerKeys = Vec<[Tensor; 2]>;

/// Rows of blocks in a training batch.
#[derive(Debug)]
pub struct BlockRows {
    /// `[R]` tokens, the mask token among them.
    pub tokens: Tensor,
    /// `[R]` places in their documents.
    pub positions: Tensor,
    /// For each layer of the backbone, which context each row sees.
    pub runs: Vec<Seen>,
    /// For each layer, which rows of its own block a row does not see: `[B, B]` booleans, where it does not see all.
    pub hidden: Vec<Option<Tensor>>,
}

/// The context that the rows of blocks see in a layer.
#[derive(Debug, Clone)]
pub enum Seen {
    /// Row by row: runs of rows that see the same.
    Rows(Rc<Runs>),
    /// All rows of a block see the same: runs of blocks, for a GPU ([`merged_attention::fold`]).
    Blocks(Rc<Runs>),
}

impl Backbone {
    /// The backbone over tensors that are found by name.
    pub fn new(shape: &BlockShape, find: Tensors<'_>, device: Device) -> Result<Self> {
        let epsilon = shape.layer.rms_norm_eps;
        let norm = |name: &str| Ok::<_, Error>(RmsNorm { weight: find(&format!("{name}.weight"))?, epsilon });
        let layer = |index: usize| {
            let at = |name: &str| format!("layers.{index}.{name}");
            let matrix = |name: &str| find(&format!("layers.{index}.{name}.weight"));
            let conv = |name: &str| shape.conv.map(|conv| Conv::new(conv, &at(name), find)).transpose();
            Ok::<_, Error>(Layer {
                input_norm: norm(&at("input_layernorm"))?,
                attention_conv: conv("attention_conv")?,
                query: matrix("self_attn.q_proj")?,
                key: matrix("self_attn.k_proj")?,
                value: matrix("self_attn.v_proj")?,
                output: matrix("self_attn.o_proj")?,
                query_norm: norm(&at("self_attn.q_norm"))?,
                key_norm: norm(&at("self_attn.k_norm"))?,
                post_attention_norm: norm(&at("post_attention_layernorm"))?,
                mlp_conv: conv("mlp_conv")?,
                gate: matrix("mlp.gate_proj")?,
                up: matrix("mlp.up_proj")?,
                down: matrix("mlp.down_proj")?,
            })
        };
        Ok(Self {
            fc: find("fc.weight")?,
            hidden_norm: norm("hidden_norm")?,
            layers: (0..shape.layers.len()).map(layer).collect::<Result<_>>()?,
            norm: norm("norm")?,
            mask_embedding: shape.mask_embedding.then(|| find(MASK_EMBEDDING)).transpose()?,
            rope: Rope::new(shape.layer.rope, device),
            shape: shape.clone(),
        })
    }

    /// What the backbone looks like.
    pub fn shape(&self) -> &BlockShape {
        &self.shape
    }

    /// Element type of what it computes; weights may be [`compact`](crate::nn::compact).
    pub fn kind(&self) -> Kind {
        self.norm.weight.kind()
    }

    /// Captured features, `[P, H]` each, as every layer reads them: `[P, H]`.
    pub fn project_features(&self, captured: &[Tensor]) -> Result<Tensor> {
        let parts: Vec<Tensor> = captured.iter().map(|part| part.to_kind(self.kind())).collect();
        let wide = Tensor::f_cat(&parts, 1)?; // [P, F * H]
        Ok(self.hidden_norm.forward(&linear(&wide, &self.fc, None)))
    }

    /// Keys and values of context rows `[P, H]` at `positions [P]`, for each layer.
    pub fn context_keys(&self, context: &Tensor, positions: &Tensor) -> Result<LayerKeys> {
        let rope = self.rope_tables(positions);
        self.layers.iter().map(|layer| self.keys(layer, context, &rope, None)).collect()
    }

    /// What block rows read: the target's embedding `[V, H]` of their tokens, and of the mask token the draft's own row
    /// where it has one. `[.., H]`
    pub fn embed(&self, embedding: &Tensor, tokens: &Tensor) -> Result<Tensor> {
        let rows = embedding.f_index_select(0, &tokens.flatten(0, -1))?.to_kind(self.kind());
        let scale = self.shape.input_embedding_scale;
        let rows = if scale == 1.0 { rows } else { rows * scale };
        let mut shape = tokens.size();
        shape.push(self.shape.hidden_size);
        let rows = rows.view(shape.as_slice());
        Ok(match &self.mask_embedding {
            None => rows,
            Some(own) => own.where_self(&tokens.eq(self.shape.mask_token_id).unsqueeze(-1), &rows),
        })
    }

    /// Blocks of a batch behind contexts that all blocks of a document share, `[R, H]`; `embedding [V, H]` is the target's.
    pub fn forward(&self, embedding: &Tensor, blocks: &BlockRows, context: &LayerKeys) -> Result<Tensor> {
        let size = self.shape.block_size;
        let rope = self.rope_tables(&blocks.positions);
        // Before the first layer all masks are alike, so it projects one of them; a convolution mixes them with the anchor.
        let mut alike = self.shape.conv.is_none().then_some(Alike { block_size: size });
        let mut hidden = match &alike {
            Some(alike) => self.embed(embedding, &alike.tokens(&blocks.tokens))?, // [n + 1, H]
            None => self.embed(embedding, &blocks.tokens)?,                       // [R, H]
        };
        for (index, layer) in self.layers.iter().enumerate() {
            let attend = |query: Tensor, [key, value]: [Tensor; 2]| {
                let [key, value] = [key, value].map(|own| own.unflatten(0, [-1, size])); // [n, B, G, D]
                let hidden = blocks.hidden[index].as_ref();
                let own = Own { key: &key, value: &value, queries_per_own: size, hidden };
                let seen = [&context[index][0], &context[index][1]];
                match &blocks.runs[index] {
                    Seen::Rows(runs) => merged_attention(&query, seen, own, runs), // [R, N, D]
                    Seen::Blocks(runs) => {
                        let groups = self.shape.layer.num_key_value_heads;
                        let folded = merged_attention::fold(&query, groups, size)?; // [n, N * B, D]
                        let own = Own { queries_per_own: 1, ..own };
                        merged_attention::unfold(&merged_attention(&folded, seen, own, runs)?, groups, size)
                    }
                }
            };
            hidden = self.layer(layer, &hidden, alike.take(), &rope, attend)?;
        }
        Ok(self.norm.forward(&hidden)) // [R, H]
    }

    /// An empty cache of context keys for so many rows.
    pub fn new_cache(&self, rows: i64, capacity: i64) -> KvCache {
        let layer = LayerCache::full(self.shape.layer.num_key_value_heads, self.shape.layer.head_dim);
        let layers: Vec<LayerCache> = self.layers.iter().map(|_| layer.clone()).collect();
        KvCache::new(&layers, rows, capacity, (self.kind(), self.fc.device()))
    }

    /// Writes the keys of new context, `[b, T, H]` padded on the right, behind those that each of `b` cached texts has; its
    /// true lengths are `counts`.
    pub fn extend_cache(&self, context: &Tensor, counts: &[i64], cache: &mut KvCache) -> Result<()> {
        let (_, tokens, _) = context.size3()?;
        let places = Tensor::arange(tokens, (Kind::Int64, context.device())).unsqueeze(0); // [1, T]
        let lengths = device::send(&Tensor::from_slice(cache.lengths()).unsqueeze(1), context.device()); // [b, 1]
        let rope = self.rope_tables(&(places + lengths).flatten(0, 1));
        let flat = context.flatten(0, 1); // [b * T, H]
        for (index, layer) in self.layers.iter().enumerate() {
            let [key, value] = self.keys(layer, &flat, &rope, None)?;
            let _ = cache.write(index, &of_texts(&key, cache.rows()), &of_texts(&value, cache.rows()));
        }
        cache.advance(counts);
        Ok(())
    }

    /// One block behind each cached text, `[b, B, H]` to `[b, B, H]`: its first row stands at the text's length. The cache
    /// is left as it was.
    pub fn forward_cached(&self, rows: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let (texts, size, _) = rows.size3()?;
        let device = rows.device();
        let base = cache.lengths().to_vec();
        let lengths = device::send(&Tensor::from_slice(&base).unsqueeze(1), device); // [b, 1]
        let positions = Tensor::arange(size, (Kind::Int64, device)).unsqueeze(0) + &lengths; // [b, B]
        let rope = self.rope_tables(&positions.flatten(0, 1));
        let mut masks: Vec<(BlockLayer, PreparedMask)> = Vec::new();
        let mut hidden = rows.flatten(0, 1); // [b * B, H]
        for (index, layer) in self.layers.iter().enumerate() {
            let seen = self.shape.layers[index];
            let place = masks.iter().position(|(made, _)| *made == seen).unwrap_or_else(|| {
                let visible = visible(&base, &positions, seen);
                masks.push((seen, AttentionMask::Visible(visible).prepare(&base, size, device)));
                masks.len() - 1
            });
            let attend = |query: Tensor, [key, value]: [Tensor; 2]| {
                let (keys, values) = cache.write(index, &of_texts(&key, texts), &of_texts(&value, texts)); // [b, G, S, D]
                let query = of_texts(&query, texts); // [b, N, B, D]
                let attended = attention(&query, &keys, &values, &masks[place].1, &Options::default());
                Ok(attended.transpose(1, 2).flatten(0, 1)) // [b * B, N, D]
            };
            hidden = self.layer(layer, &hidden, None, &rope, attend)?;
        }
        cache.truncate(&base);
        Ok(self.norm.forward(&hidden).view([texts, size, -1]))
    }

    /// One layer on block rows, `[R, H]` or those that are not alike; `attend` mixes rotated queries `[R, N, D]` with keys and
    /// values `[R, G, D]` of the same rows and whatever it has beside them.
    fn layer(
        &self,
        layer: &Layer,
        rows: &Tensor,
        alike: Option<Alike>,
        rope: &RopeTables,
        attend: impl FnOnce(Tensor, [Tensor; 2]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let normed = layer.input_norm.forward(rows); // as rows
        let conv = Around::new(layer.attention_conv.as_ref(), &normed, self.shape.block_size)?;
        let input = conv.before(&normed);
        let query = self.heads(&linear(&input, &layer.query, None));
        let query = rotated(&query, &layer.query_norm, rope, alike)?; // [R, N, D]
        let keys = self.keys(layer, &input, rope, alike)?;
        let attended = attend(query, keys)?.flatten(1, 2); // [R, N * D]
        let rows = spread(rows, alike)? + conv.after(&linear(&attended, &layer.output, None)); // [R, H]
        let normed = layer.post_attention_norm.forward(&rows);
        let conv = Around::new(layer.mlp_conv.as_ref(), &normed, self.shape.block_size)?;
        let input = conv.before(&normed);
        let [gate, up] = linear_each(&input, [(&layer.gate, None), (&layer.up, None)]);
        Ok(rows + conv.after(&gated_linear(&gate, &up, &layer.down)?)) // [R, H]
    }

    /// Rotated keys, and values, of rows `[R, H]` or those that are not alike: `[R, G, D]` each.
    fn keys(&self, layer: &Layer, rows: &Tensor, rope: &RopeTables, alike: Option<Alike>) -> Result<[Tensor; 2]> {
        let [key, value] = linear_each(rows, [(&layer.key, None), (&layer.value, None)]).map(|rows| self.heads(&rows));
        Ok([rotated(&key, &layer.key_norm, rope, alike)?, spread(&value, alike)?])
    }

    /// `[R, heads * D]` to `[R, heads, D]`
    fn heads(&self, projected: &Tensor) -> Tensor {
        projected.view([projected.size()[0], -1, self.shape.layer.head_dim])
    }

    /// Tables for `positions [R]`.
    fn rope_tables(&self, positions: &Tensor) -> RopeTables {
        self.rope.tables(&positions.unsqueeze(1), self.kind()) // [R, 1, 1, D]
    }
}

/// Rows of blocks of which all but the first of each are the same: `[n + 1, ..]` stands for `[R, ..]`, the first rows of the
/// blocks before the one that fills the rest of each.
#[derive(Debug, Clone, Copy)]
struct Alike {
    block_size: i64,
}

impl Alike {
    /// Of tokens `[R]`.
    fn tokens(self, tokens: &Tensor) -> Tensor {
        let blocks = tokens.view([-1, self.block_size]); // [n, B]
        Tensor::cat(&[blocks.select(1, 0), blocks.narrow(0, 0, 1).select(1, 1)], 0) // [n + 1]
    }
}

/// Rows `[n + 1, ..]`, as far as they are alike, as `[R, ..]`.
fn spread(rows: &Tensor, alike: Option<Alike>) -> Result<Tensor> {
    let Some(Alike { block_size }) = alike else { return Ok(rows.shallow_clone()) };
    let blocks = rows.size()[0] - 1;
    let mut shape = vec![blocks, block_size - 1];
    shape.extend(&rows.size()[1..]);
    let first = rows.narrow(0, 0, blocks).unsqueeze(1); // [n, 1, ..]
    let others = rows.narrow(0, blocks, 1).unsqueeze(1).f_expand(&shape, false)?; // [n, B - 1, ..]
    Ok(Tensor::f_cat(&[first, others], 1)?.flatten(0, 1))
}

/// Heads `[.., heads, D]` normed and rotated, `[R, heads, D]`.
fn rotated(heads: &Tensor, norm: &RmsNorm, rope: &RopeTables, alike: Option<Alike>) -> Result<Tensor> {
    Ok(match alike {
        None => rope.rotate_rows(heads, Some(norm)),
        Some(_) => rope.rotate_rows(&spread(&norm.forward(heads), alike)?, None),
    })
}

/// `[b * T, heads, D]` to `[b, heads, T, D]`
fn of_texts(heads: &Tensor, texts: i64) -> Tensor {
    heads.unflatten(0, [texts, -1]).transpose(1, 2).contiguous()
}

/// What rows of blocks at `positions [b, B]` see of cached texts of these lengths and of their own block, which stands
/// behind them: `[b, B, S]` booleans.
fn visible(lengths: &[i64], positions: &Tensor, layer: BlockLayer) -> Tensor {
    let size = positions.size()[1];
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let slots = Tensor::arange(longest + size, (Kind::Int64, positions.device())).view([1, 1, -1]); // [1, 1, S]
    let end =
        if layer.causal { positions.unsqueeze(-1) + 1 } else { positions.narrow(1, size - 1, 1).unsqueeze(-1) + 1 };
    let visible = slots.lt_tensor(&end); // [b, B or 1, S]
    let visible = match layer.window {
        None => visible,
        // A window reaches as far forward as back where nothing is causal; a block that is shorter does not notice.
        Some(window) => {
            let away = positions.unsqueeze(-1) - &slots; // [b, B, S]
            visible.logical_and(&away.abs().lt(window))
        }
    };
    visible.expand([-1, size, -1], false)
}

/// A convolution within blocks whose coefficients follow from what a sublayer reads.
#[derive(Debug)]
struct Conv {
    /// `[2, c, H]`: of what the sublayer reads, and of what it gives.
    base: Tensor,
    /// `[2 * c * g, H]`
    projection: Tensor,
    conv: Convolution,
}

impl Conv {
    fn new(conv: Convolution, prefix: &str, find: Tensors<'_>) -> Result<Self> {
        let base = find(&format!("{prefix}.base_kernel"))?;
        Ok(Self { base, projection: find(&format!("{prefix}.kernel_projection.weight"))?, conv })
    }
}

/// The convolutions around one sublayer, for the rows that it reads; nothing where there are none.
struct Around<'a> {
    made: Option<(&'a Conv, Tensor)>,
    block_size: i64,
}

impl<'a> Around<'a> {
    /// Coefficients from the normed input, `[R, H]`.
    fn new(conv: Option<&'a Conv>, input: &Tensor, block_size: i64) -> Result<Self> {
        let made = match conv {
            None => None,
            Some(conv) => {
                let taps = conv.conv.kernel_size;
                let own = linear(input, &conv.projection, None).view([-1, block_size, 2, taps, own_groups(conv)]);
                Some((conv, own)) // [n, B, 2, c, g]
            }
        };
        Ok(Self { made, block_size })
    }

    fn before(&self, rows: &Tensor) -> Tensor {
        self.mix(rows, 0)
    }

    fn after(&self, rows: &Tensor) -> Tensor {
        self.mix(rows, 1)
    }

    /// Rows `[R, H]` as sums of themselves and the rows before them in their block.
    fn mix(&self, rows: &Tensor, side: i64) -> Tensor {
        let Some((conv, own)) = &self.made else { return rows.shallow_clone() };
        let groups = own_groups(conv);
        let blocks = rows.view([-1, self.block_size, groups, conv.conv.group_size]); // [n, B, g, H / g]
        let mut sum: Option<Tensor> = None;
        for tap in 0..conv.conv.kernel_size.min(self.block_size) {
            let base = conv.base.select(0, side).select(0, tap).view([groups, -1]); // [g, H / g]
            let coefficients = base + own.select(2, side).select(2, tap).unsqueeze(-1); // [n, B, g, H / g]
            // Nothing of another block: zeros stand before its first row.
            let shifted = blocks.narrow(1, 0, self.block_size - tap).constant_pad_nd([0, 0, 0, 0, tap, 0]);
            let part = coefficients * shifted;
            sum = Some(sum.map_or_else(|| part.shallow_clone(), |sum| sum + &part));
        }
        sum.map_or_else(|| rows.shallow_clone(), |sum| sum.view_as(rows))
    }
}

fn own_groups(conv: &Conv) -> i64 {
    conv.base.size()[2] / conv.conv.group_size
}
