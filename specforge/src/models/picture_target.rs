//! What a run on pictures is for: an image tokenizer, and the next-scale transformer on its codes where there is one.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tch::{Device, Kind};

use super::info::{ParameterCounts, Pictures, TargetInfo};
use super::var::{Var, VarConfig, load::read_config, load_var};
use super::vqvae::{self, Vqvae, VqvaeConfig};
use crate::error::{Error, Result};
use crate::files::{Digests, hexadecimal};
use crate::nn::HeadForm;
use crate::weights::{WeightsFolder, content, torch};

/// Name of the folder in a transformer's that holds its image tokenizer.
pub const TOKENIZER_FOLDER: &str = "vae";

/// The folders of such a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PictureTarget {
    /// The transformer; nothing for an image tokenizer alone, on whose codes one is trained from nothing.
    pub transformer: Option<PathBuf>,
    /// The image tokenizer.
    pub tokenizer: PathBuf,
}

impl PictureTarget {
    /// What a path holds: a transformer with its image tokenizer in the folder `vae`, else an image tokenizer.
    pub fn find(path: &Path) -> Result<Self> {
        if !path.exists() {
            let hint = "name the folder of an image tokenizer, or that of a transformer with one in its folder `vae`";
            return Err(Error::bad_file(path, "is not there").with_hint(hint));
        }
        let beside = path.join(TOKENIZER_FOLDER);
        Ok(match beside.is_dir() {
            true => Self { transformer: Some(path.to_path_buf()), tokenizer: beside },
            false => Self { transformer: None, tokenizer: path.to_path_buf() },
        })
    }

    /// What the target is, from configurations and headers alone. Refuses a transformer of another image tokenizer.
    pub fn info(&self) -> Result<TargetInfo> {
        let transformer = self.transformer.as_deref().map(read_config).transpose()?;
        let vqvae = self.tokenizer_config(transformer.as_ref())?;
        let quantizer = &vqvae.quantizer;
        let numbers = |shapes: &[(String, Vec<i64>)]| {
            shapes.iter().map(|(_, shape)| shape.iter().product::<i64>() as u64).sum::<u64>()
        };
        let mut pictures =
            Pictures { patch_nums: quantizer.patch_nums.clone(), z_channels: quantizer.z_channels, num_classes: None };
        let tables = numbers(&quantizer.tensors(""));
        let Some(config) = transformer else {
            let all = numbers(&Vqvae::tensors(&vqvae)?);
            let info = TargetInfo::of(quantizer.z_channels, quantizer.vocab_size, 0, pictures.codes() + 1);
            let parameters = ParameterCounts { all, tables, a_token: 0 };
            return Ok(TargetInfo { parameters, pictures: Some(pictures), ..info });
        };
        self.fits(&config, &vqvae)?;
        pictures.num_classes = Some(config.num_classes);
        let all = numbers(&config.tensors());
        let head = HeadForm { bias: true, ..HeadForm::PLAIN };
        let depth = config.depth as usize;
        let info = TargetInfo::of(config.embed_dim, config.vocab_size, depth, config.length() + 1);
        // Modulations of the norms depend on the label: they are no work of a token.
        let a_token = config.token_multiply_adds();
        let parameters = ParameterCounts { all, tables, a_token };
        Ok(TargetInfo { parameters, widest: config.mlp_hidden, head, pictures: Some(pictures), ..info })
    }

    /// Digests of everything the target is: the image tokenizer, and the transformer where there is one.
    pub fn digests(&self, noted: &Digests, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<(String, Option<String>)> {
        let of = |path: &Path| digest(path, noted, progress);
        Ok((of(&self.tokenizer)?, self.transformer.as_deref().map(of).transpose()?))
    }

    /// Opens the weights of the image tokenizer.
    pub fn open_tokenizer(&self) -> Result<WeightsFolder> {
        torch::open_either(&self.tokenizer)
    }

    /// Loads the image tokenizer in float32. `patch_nums` are those of [`PictureTarget::info`].
    pub fn load_tokenizer(&self, patch_nums: &[i64], device: Device) -> Result<Vqvae> {
        vqvae::load(&self.tokenizer, Some(patch_nums), Kind::Float, device)
    }

    /// Loads the transformer, where there is one.
    pub fn load_transformer(&self, device: Device) -> Result<Option<Var>> {
        self.transformer.as_deref().map(|path| Ok(load_var(path, device)?.model)).transpose()
    }

    fn tokenizer_config(&self, transformer: Option<&VarConfig>) -> Result<VqvaeConfig> {
        let patches = transformer.map(|config| config.patch_nums.as_slice());
        let (config, _) = vqvae::files::read_config(&self.tokenizer, &self.open_tokenizer()?, patches)?;
        Ok(config)
    }

    fn fits(&self, config: &VarConfig, vqvae: &VqvaeConfig) -> Result<()> {
        let quantizer = &vqvae.quantizer;
        let differs = |key: &str, transformer: String, tokenizer: String| {
            let problem =
                format!("`{key}`: the transformer of this image tokenizer has {transformer}, it has {tokenizer}");
            Err(Error::bad_file(&self.tokenizer, problem).with_hint("put the tokenizer it was trained with there"))
        };
        if config.patch_nums != quantizer.patch_nums {
            return differs("patch_nums", format!("{:?}", config.patch_nums), format!("{:?}", quantizer.patch_nums));
        }
        for (key, left, right) in [
            ("vocab_size", config.vocab_size, quantizer.vocab_size),
            ("z_channels", config.z_channels, quantizer.z_channels),
        ] {
            if left != right {
                return differs(key, left.to_string(), right.to_string());
            }
        }
        Ok(())
    }
}

/// A digest of all weights at a path, and of the configuration beside them.
fn digest(path: &Path, noted: &Digests, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(content::digest(&torch::open_either(path)?, noted, progress)?);
    let config = if path.is_dir() { path.join("config.json") } else { path.with_extension("json") };
    if config.is_file() {
        hash.update(std::fs::read(&config).map_err(Error::io("read", &config))?);
    }
    Ok(hexadecimal(&hash.finalize()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::files;
    use crate::models::var::tiny as tiny_var;
    use crate::models::vqvae::tiny as tiny_vqvae;
    use crate::nn::noise;
    use crate::weights::write_tensors;

    fn write_transformer(folder: &Path, config: &VarConfig) {
        let tensors = config.tensors().into_iter().zip(1..);
        let tensors: Vec<_> =
            tensors.map(|((name, shape), stream)| (name, noise::normal(&shape, 0.3, 3, stream))).collect();
        write_tensors(&folder.join("model.safetensors"), &tensors, &[]).unwrap();
        files::write_json(&folder.join("config.json"), &config.values()).unwrap();
    }

    fn write_tokenizer(folder: &Path) {
        let config = tiny_vqvae().config().clone();
        vqvae::write(folder, &config, &Vqvae::initial(&config, 1).unwrap()).unwrap();
    }

    #[test]
    fn a_tokenizer_alone_and_with_a_transformer() {
        let folder = tempfile::tempdir().unwrap();
        write_tokenizer(&folder.path().join(TOKENIZER_FOLDER));
        let alone = PictureTarget::find(&folder.path().join(TOKENIZER_FOLDER)).unwrap();
        let info = alone.info().unwrap();
        let pictures = info.pictures.as_ref().unwrap();
        assert_eq!((info.vocab_size, info.num_layers(), pictures.codes(), pictures.num_classes), (16, 0, 21, None));
        assert!(alone.load_transformer(Device::Cpu).unwrap().is_none());

        let config = VarConfig { patch_nums: vec![1, 2, 4], vocab_size: 16, z_channels: 4, ..tiny_var::config() };
        write_transformer(folder.path(), &config);
        let whole = PictureTarget::find(folder.path()).unwrap();
        let info = whole.info().unwrap();
        assert_eq!((info.hidden_size, info.num_layers(), info.pictures.unwrap().num_classes), (16, 2, Some(10)));
        assert_eq!(whole.load_transformer(Device::Cpu).unwrap().unwrap().config(), &config);
        for (changed, key) in [
            (VarConfig { vocab_size: 17, ..config.clone() }, "vocab_size"),
            (VarConfig { z_channels: 5, ..config.clone() }, "z_channels"),
            (VarConfig { patch_nums: vec![1, 3, 4], ..config.clone() }, "patch_nums"),
        ] {
            write_transformer(folder.path(), &changed);
            let said = whole.info().unwrap_err().to_string();
            assert!(said.contains(key), "{said}");
        }
        let absent = PictureTarget::find(&folder.path().join("nowhere")).unwrap_err();
        assert_eq!(absent.exit_code(), 2);
        assert_eq!(json!(config.values()["num_heads"]), 2);
    }
}
