//! What a VQVAE is: the keys of its config.json, and what the shapes of its tensors say where there is none.
//!
//! Keys are called as the arguments of the reference's constructors (`models/{vqvae,quant,basic_vae}.py` of
//! FoundationVision/VAR at 78b95394fc5896192e3a003e4b295f8ea743c48f), and have their defaults. The reference itself stores no
//! configuration: `patch_nums` is its command line's `pn`, and its number of groups is a constant, here
//! `groupnorm_groups`.

use serde_json::{Map, Value, json};

use super::blocks::Norms;
use super::quantizer::{PhiSharing, QuantizerConfig};
use crate::models::keys::Keys;
use crate::models::limits;

/// `model_type` of config.json.
pub const MODEL_TYPE: &str = "vqvae";
/// The scales that VAR's models of 256 pixels are published with.
pub const PUBLISHED_PATCHES: [i64; 10] = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16];

/// Most levels of encoder and decoder; every one but the first halves the image.
const MOST_LEVELS: usize = 12;
/// Most pixels along a side.
const MOST_PIXELS: i64 = 1 << 14;
/// Most blocks of a level.
const MOST_BLOCKS: i64 = 64;
/// Largest kernel of the convolutions beside the quantiser.
const LARGEST_KERNEL: i64 = 15;

/// What a VQVAE is.
#[derive(Debug, Clone, PartialEq)]
pub struct VqvaeConfig {
    /// Codebook, scales and convolutions of the quantiser.
    pub quantizer: QuantizerConfig,
    /// Channels at full resolution.
    pub ch: i64,
    /// Channels of each level, in multiples of [`VqvaeConfig::ch`]; the last level is the lowest.
    pub ch_mult: Vec<i64>,
    /// Residual blocks of an encoder's level; a decoder's has one more.
    pub num_res_blocks: i64,
    /// Pixels along the kernel of the convolutions on both sides of the quantiser, odd.
    pub quant_conv_ks: i64,
    /// How channels are normed.
    pub norms: Norms,
    /// Weight of the commitment loss in training.
    pub beta: f64,
}

impl VqvaeConfig {
    /// Reads the values of a config.json, and lists the keys that were not understood.
    pub fn read(values: &Value) -> Result<(Self, Vec<String>), String> {
        let keys = Keys::new(values);
        match keys.word_or("model_type", MODEL_TYPE)? {
            MODEL_TYPE => {}
            other => return Err(format!("`model_type`: expected `{MODEL_TYPE}`, got `{other}`")),
        }
        let patch_nums = keys
            .whole_list("patch_nums")?
            .ok_or("missing field `patch_nums`: a list of the patches along each side, scale by scale")?;
        let sharing = match keys.whole_or("share_quant_resi", 4)? {
            0 => match keys.whole_or("default_qresi_counts", 0)? {
                0 => PhiSharing::Own(patch_nums.len()),
                count => PhiSharing::Own(count_of("default_qresi_counts", count)?),
            },
            1 => PhiSharing::One,
            count => PhiSharing::Several(count_of("share_quant_resi", count)?),
        };
        // Of no use where scales share convolutions, and no contradiction.
        keys.know(["default_qresi_counts"]);
        // Distances between directions in place of distances between points: nobody has published such a model.
        keys.only("using_znorm", &json!(false))?;
        keys.only("double_z", &json!(false))?;
        let config = Self {
            quantizer: QuantizerConfig {
                vocab_size: keys.whole("vocab_size")?,
                z_channels: keys.whole("z_channels")?,
                patch_nums,
                sharing,
                quant_resi: keys.number_or("quant_resi", 0.5)?,
            },
            ch: keys.whole("ch")?,
            ch_mult: keys.whole_list("ch_mult")?.unwrap_or_else(|| vec![1, 1, 2, 2, 4]),
            num_res_blocks: keys.whole_or("num_res_blocks", 2)?,
            quant_conv_ks: keys.whole_or("quant_conv_ks", 3)?,
            norms: Norms {
                groups: keys.whole_or("groupnorm_groups", 32)?,
                epsilon: keys.positive_or("groupnorm_eps", 1e-6)?,
            },
            beta: keys.positive_or("beta", 0.25)?,
        };
        config.check()?;
        Ok((config, keys.strange()))
    }

    /// Refuses what no model can be.
    pub fn check(&self) -> Result<(), String> {
        self.quantizer.check()?;
        limits::within(&[
            ("ch", self.ch, limits::MOST_HIDDEN),
            ("num_res_blocks", self.num_res_blocks, MOST_BLOCKS),
            ("quant_conv_ks", self.quant_conv_ks, LARGEST_KERNEL),
            ("groupnorm_groups", self.norms.groups, limits::WIDEST),
        ])?;
        if self.quant_conv_ks % 2 == 0 {
            return Err(format!("`quant_conv_ks`: expected an odd number, got {}", self.quant_conv_ks));
        }
        let levels = self.ch_mult.len();
        if !(1..=MOST_LEVELS).contains(&levels) {
            return Err(format!("`ch_mult`: expected from 1 to {MOST_LEVELS} levels, got {levels}"));
        }
        for &factor in &self.ch_mult {
            limits::within(&[("ch_mult", factor, limits::WIDEST / self.ch)])?;
        }
        let groups = self.norms.groups;
        let widths = std::iter::once(self.ch).chain(self.ch_mult.iter().map(|factor| self.ch * factor));
        if let Some(width) = { widths }.find(|width| width % groups != 0) {
            return Err(format!(
                "`groupnorm_groups`: expected a divisor of every level's channels, got {groups} for {width} channels"
            ));
        }
        limits::within(&[("patch_nums", self.pixels(), MOST_PIXELS)]).map_err(|_| {
            format!("`ch_mult`: images would be {} pixels wide, at most {MOST_PIXELS} are supported", self.pixels())
        })
    }

    /// Pixels along a side of a patch of the last scale: every level but the first halves the image.
    pub fn pixels_a_patch(&self) -> i64 {
        1 << self.ch_mult.len().saturating_sub(1).min(MOST_LEVELS)
    }

    /// Pixels along a side of an image.
    pub fn pixels(&self) -> i64 {
        self.quantizer.side() * self.pixels_a_patch()
    }

    /// The values of a config.json that [`VqvaeConfig::read`] reads as this.
    pub fn values(&self) -> Value {
        let (share, counts) = match self.quantizer.sharing {
            PhiSharing::One => (1, 0),
            PhiSharing::Several(count) => (limits::signed(count), 0),
            PhiSharing::Own(count) => (0, limits::signed(count)),
        };
        json!({
            "model_type": MODEL_TYPE,
            "vocab_size": self.quantizer.vocab_size,
            "z_channels": self.quantizer.z_channels,
            "ch": self.ch,
            "ch_mult": self.ch_mult,
            "num_res_blocks": self.num_res_blocks,
            "patch_nums": self.quantizer.patch_nums,
            "share_quant_resi": share,
            "default_qresi_counts": counts,
            "quant_resi": self.quantizer.quant_resi,
            "quant_conv_ks": self.quant_conv_ks,
            "groupnorm_groups": self.norms.groups,
            "groupnorm_eps": self.norms.epsilon,
            "beta": self.beta,
        })
    }
}

fn count_of(key: &str, value: i64) -> Result<usize, String> {
    usize::try_from(value).map_err(|_| format!("`{key}`: expected 0 or more, got {value}"))
}

/// What the shapes of a model's tensors say of its configuration, by key. What they do not say is left out.
pub fn inferred<'a>(shape: impl Fn(&str) -> Option<&'a [i64]>) -> Map<String, Value> {
    let mut values = Map::new();
    let size = |name: &str, axis: usize| shape(name).and_then(|sizes| sizes.get(axis).copied());
    let count = |most: usize, name: &dyn Fn(usize) -> String| {
        (0..most).take_while(|&number| shape(&name(number)).is_some()).count()
    };
    let mut put = |key: &str, value: Value| drop(values.insert(key.to_owned(), value));
    let codebook = "quantize.embedding.weight";
    size(codebook, 0).into_iter().for_each(|value| put("vocab_size", value.into()));
    size(codebook, 1).into_iter().for_each(|value| put("z_channels", value.into()));
    size("quant_conv.weight", 3).into_iter().for_each(|value| put("quant_conv_ks", value.into()));
    if let Some(ch) = size("encoder.conv_in.weight", 0).filter(|&ch| ch > 0) {
        put("ch", ch.into());
        let level = |number: usize| format!("encoder.down.{number}.block.0.conv1.weight");
        let widths: Vec<i64> = (0..=MOST_LEVELS).map_while(|number| size(&level(number), 0)).collect();
        // Others are refused when names and shapes are compared.
        if !widths.is_empty() && widths.iter().all(|width| width % ch == 0) {
            put("ch_mult", widths.iter().map(|width| width / ch).collect::<Vec<_>>().into());
        }
    }
    let blocks = count(MOST_BLOCKS as usize, &|block| format!("encoder.down.0.block.{block}.conv1.weight"));
    if blocks > 0 {
        put("num_res_blocks", blocks.into());
    }
    let own = count(1 << 10, &|index| format!("quantize.quant_resi.{index}.weight"));
    let several = count(1 << 10, &|index| format!("quantize.quant_resi.qresi_ls.{index}.weight"));
    match (shape("quantize.quant_resi.qresi.weight"), several, own) {
        (Some(_), ..) => put("share_quant_resi", 1.into()),
        (None, 2.., _) => put("share_quant_resi", several.into()),
        (None, _, 1..) => put("share_quant_resi", 0.into()),
        _ => {}
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values() -> Value {
        json!({"model_type": "vqvae", "vocab_size": 64, "z_channels": 8, "ch": 4, "ch_mult": [1, 2], "patch_nums": [1, 2],
            "groupnorm_groups": 2})
    }

    fn said(key: &str, value: Value) -> String {
        let mut values = values();
        values[key] = value;
        VqvaeConfig::read(&values).unwrap_err()
    }

    #[test]
    fn defaults_are_the_references_and_values_come_back() {
        let (config, strange) = VqvaeConfig::read(&values()).unwrap();
        assert!(strange.is_empty());
        assert_eq!(config.quantizer.sharing, PhiSharing::Several(4));
        assert_eq!((config.num_res_blocks, config.quant_conv_ks, config.beta), (2, 3, 0.25));
        assert_eq!((config.pixels_a_patch(), config.pixels()), (2, 4));
        for (share, counts) in [(0, 0), (0, 3), (1, 0), (2, 0)] {
            let mut values = values();
            values["share_quant_resi"] = share.into();
            values["default_qresi_counts"] = counts.into();
            let (config, _) = VqvaeConfig::read(&values).unwrap();
            assert_eq!(VqvaeConfig::read(&config.values()).unwrap(), (config, vec![]), "{share} {counts}");
        }
    }

    #[test]
    fn what_cannot_be_is_named() {
        assert!(said("groupnorm_groups", json!(32)).contains("got 32 for 4 channels"));
        assert!(said("ch_mult", json!([])).contains("`ch_mult`"));
        assert!(said("ch_mult", json!([1, -1])).contains("`ch_mult`"));
        assert!(said("ch", json!(0)).contains("`ch`: expected a number from 1"));
        assert!(said("ch", json!("x")).contains("`ch`: expected a whole number"));
        assert!(said("using_znorm", json!(true)).contains("using_znorm"));
        assert!(said("model_type", json!("var")).contains("expected `vqvae`, got `var`"));
        assert!(said("share_quant_resi", json!(-1)).contains("share_quant_resi"));
        assert!(said("patch_nums", json!(null)).contains("missing field `patch_nums`"));
        assert!(said("patch_nums", json!([3])).contains("patch_nums"));
        assert!(said("quant_conv_ks", json!(2)).contains("odd"));
        assert!(said("groupnorm_eps", json!(0.0)).contains("groupnorm_eps"));
        assert!(said("patch_nums", json!([1, 1i64 << 60])).contains("patch_nums"));
        let mut values = values();
        values["patchnums"] = json!([1]);
        assert_eq!(VqvaeConfig::read(&values).unwrap().1, ["patchnums"]);
    }
}
