//! What a VAR transformer is: its sizes, and the names and shapes of its tensors.
//!
//! The original checkpoints have no configuration beside them, so everything that shapes say is read from shapes; a config.json
//! adds what they do not say (heads where attention is not normed) and is held against them.

use serde_json::{Value, json};

use crate::models::family::Shapes;
use crate::models::keys::Keys;
use crate::models::limits;

/// Most positions along the side of a scale: keyed noise has 1024 places for each image.
pub const WIDEST_SCALE: i64 = 32;
/// Most scales of an image: each has a domain of keyed noise of its own, below that of other decoders.
pub const MOST_SCALES: usize = 32;

/// Keys of training that change nothing in a forward pass.
const OF_TRAINING: [&str; 9] = [
    "drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
    "cond_drop_rate",
    "flash_if_available",
    "fused_if_available",
    "init_adaln",
    "init_adaln_gamma",
    "init_head",
];

/// Sizes of a VAR transformer (FoundationVision/VAR @78b9539, `models/var.py:22-116`).
#[derive(Debug, Clone, PartialEq)]
pub struct VarConfig {
    /// Blocks.
    pub depth: i64,
    /// Width `C` of the hidden states.
    pub embed_dim: i64,
    /// Heads `N` of each block.
    pub num_heads: i64,
    /// Width of the MLPs.
    pub mlp_hidden: i64,
    /// Side of each scale's map, in positions: a scale of side `p` has `p * p` tokens.
    pub patch_nums: Vec<i64>,
    /// Tokens `V`: entries of the image tokenizer's codebook.
    pub vocab_size: i64,
    /// Channels `Z` of a codebook entry.
    pub z_channels: i64,
    /// Labels; one more, [`Self::null_label`], stands for none.
    pub num_classes: i64,
    /// Whether one projection of the label serves the adaptive norms of all blocks, each with an offset of its own.
    pub shared_aln: bool,
    /// Whether queries and keys are normed to length 1, with a trained temperature for each head.
    pub attn_l2_norm: bool,
    /// Epsilon of the norms.
    pub norm_eps: f64,
}

impl VarConfig {
    /// The configuration of tensors whose shapes `shape` gives, with what a config.json says, where there is one. `levels` is
    /// the file's `lvl_1L`, the number of the scale that each token belongs to. Returns the keys that nobody read as well.
    pub fn read(
        values: Option<&Value>,
        shape: &dyn Fn(&str) -> Option<Vec<i64>>,
        levels: Option<&[i64]>,
    ) -> Result<(Self, Vec<String>), String> {
        let silent = Value::Object(serde_json::Map::new());
        let keys = Keys::new(values.unwrap_or(&silent));
        keys.know(OF_TRAINING);
        let model_type = keys.word_or("model_type", "var")?;
        if model_type != "var" {
            return Err(format!("`model_type`: expected var, got {model_type}"));
        }
        let side = |name: &str, axis: usize| shape(name).and_then(|shape| shape.get(axis).copied());
        let size = |key: &str, found: Option<i64>, most: i64| -> Result<i64, String> {
            let stated = keys.maybe_whole(key, None)?;
            let size = agreed(key, stated, found)?;
            limits::within(&[(key, size, most)]).map(|()| size)
        };
        let has = |block: i64| shape(&format!("blocks.{block}.attn.mat_qkv.weight")).is_some();
        let blocks = (0..limits::MOST_LAYERS).take_while(|&block| has(block)).count() as i64;
        let depth = size("depth", Some(blocks).filter(|&blocks| blocks > 0), limits::MOST_LAYERS)?;
        let embed_dim = size("embed_dim", side("pos_start", 2), limits::MOST_HIDDEN)?;
        let flag = |key: &str, found: bool| match keys.filled(key) {
            Some(Value::Bool(stated)) if *stated != found && blocks > 0 => {
                Err(format!("`{key}`: config.json says {stated}, the tensors say {found}"))
            }
            Some(Value::Bool(stated)) => Ok(*stated),
            Some(other) => Err(format!("`{key}`: expected true or false, got {other}")),
            None => Ok(found),
        };
        let heads = side("blocks.0.attn.scale_mul_1H11", 1);
        let attn_l2_norm = flag("attn_l2_norm", heads.is_some())?;
        let shared_aln = flag("shared_aln", shape("shared_ada_lin.1.weight").is_some())?;
        let num_heads = size("num_heads", heads, limits::MOST_HEADS)?;
        if embed_dim % num_heads != 0 {
            return Err(format!("`num_heads`: expected a divisor of the width {embed_dim}, got {num_heads}"));
        }
        let config = Self {
            depth,
            embed_dim,
            num_heads,
            mlp_hidden: mlp_hidden(&keys, embed_dim, side("blocks.0.ffn.fc1.weight", 0))?,
            patch_nums: patch_nums(&keys, levels)?,
            vocab_size: size("vocab_size", side("head.weight", 0), limits::MOST_TOKENS)?,
            z_channels: size("z_channels", side("word_embed.weight", 1), limits::WIDEST)?,
            num_classes: size("num_classes", side("class_emb.weight", 0).map(|rows| rows - 1), limits::MOST_TOKENS)?,
            shared_aln,
            attn_l2_norm,
            norm_eps: keys.positive_or("norm_eps", 1e-6)?,
        };
        Ok((config, keys.strange()))
    }

    /// Multiply-adds of one token in a forward pass, attention between tokens and the modulations of the norms left out: the
    /// latter belong to the label.
    pub fn token_multiply_adds(&self) -> u64 {
        let width = self.embed_dim;
        let block = 4 * width * width + 2 * width * self.mlp_hidden;
        (self.depth * block + self.vocab_size * width + self.z_channels * width) as u64
    }

    /// The values of a config.json that [`VarConfig::read`] reads as this.
    pub fn values(&self) -> Value {
        json!({
            "model_type": "var",
            "depth": self.depth,
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_hidden as f64 / self.embed_dim as f64,
            "patch_nums": self.patch_nums,
            "vocab_size": self.vocab_size,
            "z_channels": self.z_channels,
            "num_classes": self.num_classes,
            "shared_aln": self.shared_aln,
            "attn_l2_norm": self.attn_l2_norm,
            "norm_eps": self.norm_eps,
        })
    }

    /// The label that stands for none: what the other half of guidance is given.
    pub fn null_label(&self) -> i64 {
        self.num_classes
    }

    /// Scales of an image.
    pub fn scales(&self) -> usize {
        self.patch_nums.len()
    }

    /// Tokens of a scale; 0 for one that there is not.
    pub fn tokens(&self, scale: usize) -> i64 {
        self.patch_nums.get(scale).map_or(0, |side| side * side)
    }

    /// Tokens of the scales before one.
    pub fn begin(&self, scale: usize) -> i64 {
        (0..scale).map(|scale| self.tokens(scale)).sum()
    }

    /// Tokens `L` of all scales.
    pub fn length(&self) -> i64 {
        self.begin(self.scales())
    }

    /// Channels of a head.
    pub fn head_dim(&self) -> i64 {
        self.embed_dim / self.num_heads
    }

    /// Number of the scale of each token, `[L]`: the buffer `lvl_1L`.
    pub fn levels(&self) -> Vec<i64> {
        (0..self.scales()).flat_map(|scale| (0..self.tokens(scale)).map(move |_| scale as i64)).collect()
    }

    /// The parameters under their original names.
    pub fn tensors(&self) -> Shapes {
        let Self { depth, embed_dim: width, num_heads, mlp_hidden, vocab_size, z_channels, num_classes, .. } = *self;
        let mut tensors: Vec<(String, Vec<i64>)> = [
            ("pos_start", vec![1, self.tokens(0), width]),
            ("pos_1LC", vec![1, self.length(), width]),
            ("word_embed.weight", vec![width, z_channels]),
            ("word_embed.bias", vec![width]),
            ("class_emb.weight", vec![num_classes + 1, width]),
            ("lvl_embed.weight", vec![self.scales() as i64, width]),
        ]
        .map(|(name, shape)| (name.to_owned(), shape))
        .to_vec();
        let mut add = |name: String, shape: &[i64]| tensors.push((name, shape.to_vec()));
        if self.shared_aln {
            add("shared_ada_lin.1.weight".to_owned(), &[6 * width, width]);
            add("shared_ada_lin.1.bias".to_owned(), &[6 * width]);
        }
        for block in 0..depth {
            let mut add = |name: &str, shape: &[i64]| add(format!("blocks.{block}.{name}"), shape);
            if self.attn_l2_norm {
                add("attn.scale_mul_1H11", &[1, num_heads, 1, 1]);
            }
            add("attn.q_bias", &[width]);
            add("attn.v_bias", &[width]);
            add("attn.mat_qkv.weight", &[3 * width, width]);
            add("attn.proj.weight", &[width, width]);
            add("attn.proj.bias", &[width]);
            add("ffn.fc1.weight", &[mlp_hidden, width]);
            add("ffn.fc1.bias", &[mlp_hidden]);
            add("ffn.fc2.weight", &[width, mlp_hidden]);
            add("ffn.fc2.bias", &[width]);
            match self.shared_aln {
                true => add("ada_gss", &[1, 1, 6, width]),
                false => {
                    add("ada_lin.1.weight", &[6 * width, width]);
                    add("ada_lin.1.bias", &[6 * width]);
                }
            }
        }
        add("head_nm.ada_lin.1.weight".to_owned(), &[2 * width, width]);
        add("head_nm.ada_lin.1.bias".to_owned(), &[2 * width]);
        add("head.weight".to_owned(), &[vocab_size, width]);
        add("head.bias".to_owned(), &[vocab_size]);
        tensors
    }
}

/// A number that config.json and the tensors agree on, where both say it.
fn agreed(key: &str, stated: Option<i64>, found: Option<i64>) -> Result<i64, String> {
    match (stated, found) {
        (Some(stated), Some(found)) if stated != found => {
            Err(format!("`{key}`: config.json says {stated}, the tensors say {found}"))
        }
        (Some(number), _) | (None, Some(number)) => Ok(number),
        (None, None) => Err(format!("`{key}`: neither config.json nor the tensors say it")),
    }
}

/// Width of the MLPs: `mlp_ratio` times that of the hidden states, rounded.
fn mlp_hidden(keys: &Keys<'_>, embed_dim: i64, found: Option<i64>) -> Result<i64, String> {
    let stated = match keys.filled("mlp_ratio") {
        None => None,
        Some(_) => Some((keys.positive_or("mlp_ratio", 4.0)? * embed_dim as f64).round() as i64),
    };
    let width = match (stated, found) {
        (Some(stated), Some(found)) if stated != found => {
            return Err(format!("`mlp_ratio`: config.json says MLPs of width {stated}, the tensors say {found}"));
        }
        (stated, found) => stated.or(found).unwrap_or(4 * embed_dim),
    };
    limits::within(&[("mlp_ratio", width, limits::WIDEST)]).map(|()| width)
}

/// Sides of the scales, from config.json and from the levels of tokens.
fn patch_nums(keys: &Keys<'_>, levels: Option<&[i64]>) -> Result<Vec<i64>, String> {
    let found = levels.map(sides_of).transpose()?;
    let sides = match (keys.whole_list("patch_nums")?, found) {
        (Some(stated), Some(found)) if stated != found => {
            return Err(format!("`patch_nums`: config.json says {stated:?}, `lvl_1L` of the tensors says {found:?}"));
        }
        (Some(sides), _) | (None, Some(sides)) => sides,
        (None, None) => return Err("`patch_nums`: neither config.json nor `lvl_1L` of the tensors says it".to_owned()),
    };
    check_sides(&sides).map(|()| sides)
}

/// Refuses scales that cannot be decoded.
fn check_sides(sides: &[i64]) -> Result<(), String> {
    if sides.is_empty() || sides.len() > MOST_SCALES {
        return Err(format!("`patch_nums`: expected 1 to {MOST_SCALES} scales, got {}", sides.len()));
    }
    if let Some(side) = sides.iter().find(|side| !(1..=WIDEST_SCALE).contains(*side)) {
        return Err(format!("`patch_nums`: expected sides from 1 to {WIDEST_SCALE}, got {side}"));
    }
    match sides.iter().max() == sides.last() {
        true => Ok(()),
        false => Err(format!("`patch_nums`: the last scale is that of the image, and none may be wider: {sides:?}")),
    }
}

/// Sides of the scales whose tokens have these levels.
fn sides_of(levels: &[i64]) -> Result<Vec<i64>, String> {
    let mut sides = Vec::new();
    for (number, run) in levels.chunk_by(|one, other| one == other).enumerate() {
        let side = run.len().isqrt();
        if run.first() != Some(&(number as i64)) || side * side != run.len() {
            return Err(format!(
                "`lvl_1L`: expected squares of scales 0, 1, 2 and so on, got {} tokens of level {:?} as number {number}",
                run.len(),
                run.first()
            ));
        }
        sides.push(side as i64);
    }
    Ok(sides)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::models::var::tiny;

    fn read_with(values: &Value, changed: &[(&str, &[i64])], levels: Option<&[i64]>) -> Result<VarConfig, String> {
        let tensors = tiny::config().tensors();
        let shape = |name: &str| {
            let change = changed.iter().find(|(changed, _)| *changed == name).map(|(_, shape)| shape.to_vec());
            change.or_else(|| tensors.iter().find(|(known, _)| known == name).map(|(_, shape)| shape.clone()))
        };
        VarConfig::read(Some(values), &shape, levels).map(|(config, _)| config)
    }

    #[test]
    fn shapes_alone_say_everything() {
        let config = tiny::config();
        assert_eq!(read_with(&json!({}), &[], Some(&config.levels())).unwrap(), config);
        assert_eq!((config.begin(2), config.length(), config.null_label()), (5, 14, 10));
    }

    #[test]
    fn what_config_and_tensors_disagree_about_is_named() {
        let levels = tiny::config().levels();
        for (values, key) in [
            (json!({"depth": 5}), "`depth`: config.json says 5, the tensors say 2"),
            (json!({"vocab_size": 63}), "`vocab_size`: config.json says 63, the tensors say 32"),
            (json!({"patch_nums": [1, 2, 4]}), "`patch_nums`: config.json says [1, 2, 4]"),
            (json!({"shared_aln": true}), "`shared_aln`: config.json says true"),
            (json!({"attn_l2_norm": false}), "`attn_l2_norm`: config.json says false"),
            (json!({"mlp_ratio": 3.0}), "`mlp_ratio`: config.json says MLPs of width 48"),
            (json!({"num_heads": 4}), "`num_heads`: config.json says 4, the tensors say 2"),
            (json!({"model_type": "llama"}), "`model_type`"),
            (json!({"norm_eps": 0}), "`norm_eps`"),
        ] {
            let problem = read_with(&values, &[], Some(&levels)).unwrap_err();
            assert!(problem.starts_with(key), "{problem}");
        }
    }

    #[test]
    fn scales_that_cannot_be_are_refused() {
        for (levels, word) in [
            (vec![0, 1, 1, 1], "squares"),
            (vec![1, 1, 1, 1], "squares"),
            (vec![], "1 to 32 scales"),
            (vec![0, 0, 0, 0, 1], "none may be wider"),
            (vec![0; 33 * 33], "sides from 1 to 32"),
        ] {
            let problem = read_with(&json!({}), &[], Some(&levels)).unwrap_err();
            assert!(problem.contains(word), "{problem}");
        }
        assert!(read_with(&json!({}), &[], None).unwrap_err().contains("neither"));
        assert!(
            read_with(&json!({"num_heads": 3}), &[("blocks.0.attn.scale_mul_1H11", &[1, 3, 1, 1])], Some(&[0]))
                .unwrap_err()
                .contains("divisor")
        );
    }

    #[test]
    fn keys_that_nobody_read_are_told() {
        let values = json!({"drop_path_rate": 0.1, "rope_theta": 3.0});
        let tensors = tiny::config().tensors();
        let shape = |name: &str| tensors.iter().find(|(known, _)| known == name).map(|(_, shape)| shape.clone());
        let (_, strange) = VarConfig::read(Some(&values), &shape, Some(&tiny::config().levels())).unwrap();
        assert_eq!(strange, ["rope_theta"]);
    }
}
