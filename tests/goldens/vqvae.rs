//! VAR's VQVAE against FoundationVision/VAR `78b9539`: encoder, quantiser, decoder, and one step of its training.
//!
//! File layout: `w.*` weights under the reference's names (`vqvae_ch32_hash_*` derive them from a hash instead), `in.image`
//! and `in.random_idx.S`; `mid.f` what is quantised, `out.idx.S` and `out.f_hat.S` by scale, `out.var_input`,
//! `out.image`; `out.random.*` the same from the random maps; `out.vq.*` the quantiser's loss and gradients.

use std::path::Path;

use serde_json::Value;
use specforge::models::vqvae::{PhiSharing, Vqvae, VqvaeConfig};
use specforge::nn::noise::{keyed_bits, uniform_of};
use tch::{Kind, Tensor};

use super::Golden;
use super::block_parts::{json_of, text};

const FEATURES: f64 = 2e-5;
const CODES: f64 = 1e-5;
const IMAGES: f64 = 2e-4;
const LOSS: f64 = 1e-5;
const GRADIENTS: f64 = 1e-4;

/// Noise domain of hashed weights.
const WEIGHTS: u64 = 200;

/// Floats differ by at most `tolerance` times the largest, or times 1 where that is larger; integers are equal.
pub fn near(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) -> Result<f64, String> {
    if got.size() != want.size() {
        return Err(format!("{what}: expected shape {:?}, got {:?}", want.size(), got.size()));
    }
    if want.kind() == Kind::Int64 {
        return if got.equal(want) { Ok(0.0) } else { Err(format!("{what}: expected {want}, got {got}")) };
    }
    let (got, want) = (got.to_kind(Kind::Double), want.to_kind(Kind::Double));
    let scale = want.abs().max().double_value(&[]).max(1.0);
    let difference = (got - want).abs().max().double_value(&[]) / scale;
    // A comparison with NaN is false, and then this fails as it should.
    match difference <= tolerance {
        true => Ok(difference),
        false => Err(format!("{what}: differs by {difference:.3e}, tolerance {tolerance:.1e}")),
    }
}

/// What the metadata say of a model.
pub fn config_of(golden: &Golden) -> Result<(VqvaeConfig, Value), String> {
    let values = json_of(golden, "config")?;
    let (config, _) = VqvaeConfig::read(&values)?;
    Ok((config, values))
}

/// Checks a file whose weights are in it.
pub fn check(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let (config, _) = config_of(&golden)?;
    let shapes = Vqvae::tensors(&config).map_err(text)?;
    let expected: Vec<&str> = shapes.iter().map(|(name, _)| name.as_str()).collect();
    let mut stored: Vec<&str> = golden.names_after("w.").filter(|name| !name.ends_with("ema_vocab_hit_SV")).collect();
    stored.sort_unstable();
    if stored != expected {
        return Err(format!("names of tensors: expected {stored:?}, got {expected:?}"));
    }
    let model = Vqvae::build(config, &mut |name, shape| {
        let tensor = golden.tensor(&format!("w.{name}")).map_err(specforge::error::Error::Failed)?;
        assert_eq!(tensor.size(), shape, "{name}");
        // The codebook's gradient is compared; the file's pages are not to be written to.
        Ok(if name == "quantize.embedding.weight" { tensor.copy().set_requires_grad(true) } else { tensor })
    });
    compare(&golden, &model.map_err(text)?)
}

/// Checks a file whose weights follow from its seed.
pub fn check_hashed(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let (config, values) = config_of(&golden)?;
    let seed: u64 = golden.text("seed")?.parse().map_err(text)?;
    let number = |key: &str| values[key].as_f64().ok_or_else(|| format!("`{key}` is no number"));
    let (gain, amplitude) = (number("weight_gain")?, number("embedding_amplitude")?);
    let names: Vec<String> = Vqvae::tensors(&config).map_err(text)?.into_iter().map(|(name, _)| name).collect();
    let listed = values["weight_names_sorted"].as_array().ok_or("`weight_names_sorted` is no list")?;
    if !listed.iter().filter_map(Value::as_str).eq(names.iter().map(String::as_str)) {
        return Err(format!("names of tensors: expected {listed:?}, got {names:?}"));
    }
    let probes = golden.tensor("mid.weight_probe_first_last")?;
    let mut wrong = Vec::new();
    let model = Vqvae::build(config, &mut |name, shape| {
        let place = names.iter().position(|known| known == name).expect("a name of the list");
        let fan_in: i64 = shape.iter().skip(1).product();
        let scale = gain / (fan_in as f64).sqrt();
        let values: Vec<f32> = (0..shape.iter().product::<i64>() as u64)
            .map(|element| {
                let s = 2.0 * uniform_of(keyed_bits(seed, WEIGHTS, place as u64, element)) - 1.0;
                let value = if name.ends_with("bias") {
                    0.1 * s
                } else if shape.len() == 1 {
                    1.0 + 0.2 * s
                } else if name == "quantize.embedding.weight" {
                    amplitude * s
                } else {
                    s * scale
                };
                value as f32
            })
            .collect();
        let probe = [0, 1].map(|column| probes.double_value(&[place as i64, column]) as f32);
        if [values[0], values[values.len() - 1]] != probe {
            wrong.push(name.to_owned());
        }
        let tensor = Tensor::from_slice(&values).view(shape);
        Ok(if name == "quantize.embedding.weight" { tensor.set_requires_grad(true) } else { tensor })
    });
    let model = model.map_err(text)?;
    if !wrong.is_empty() {
        return Err(format!("hashed weights: other first and last elements of {wrong:?}"));
    }
    compare(&golden, &model)
}

fn compare(golden: &Golden, model: &Vqvae) -> Result<String, String> {
    let (scales, mut steps) = (model.config().quantizer.scales(), 0);
    let want = |name: &str| golden.tensor(name);
    let mut problems = Vec::new();
    let mut largest = 0.0f64;
    let mut keep = |result: Result<f64, String>| match result {
        Ok(difference) => largest = largest.max(difference),
        Err(problem) => problems.push(problem),
    };

    // The encoder, step by step where the file has the steps.
    let mut seen = Vec::new();
    let f = model.features_seen(&want("in.image")?, &mut |name, value| {
        seen.push((format!("mid.encoder.{name}"), value.shallow_clone()));
    });
    keep(near("mid.f", &f.map_err(text)?, &want("mid.f")?, FEATURES));

    // The quantiser, from the reference's features.
    let f = want("mid.f")?;
    let encoded = model.quantizer().encode(&f).map_err(text)?;
    for scale in 0..scales {
        keep(near(&format!("idx.{scale}"), &encoded.indices[scale], &want(&format!("out.idx.{scale}"))?, 0.0));
        keep(near(&format!("f_hat.{scale}"), &encoded.f_hat[scale], &want(&format!("out.f_hat.{scale}"))?, CODES));
    }
    let whole = model.encode(&want("in.image")?).map_err(text)?;
    for (scale, map) in whole.indices.iter().enumerate() {
        keep(near(&format!("idx.{scale} of the image"), map, &want(&format!("out.idx.{scale}"))?, 0.0));
    }

    // Codes to inputs and pixels.
    let maps =
        |prefix: &str| (0..scales).map(|scale| want(&format!("{prefix}.{scale}"))).collect::<Result<Vec<_>, _>>();
    for (given, out) in [("out.idx", "out"), ("in.random_idx", "out.random")] {
        let maps = maps(given)?;
        let inputs = model.quantizer().idx_to_var_input(&maps).map_err(text)?;
        keep(near(&format!("{out}.var_input"), &inputs, &want(&format!("{out}.var_input"))?, CODES));
        let mut f_hat = model.quantizer().empty(maps[0].size()[0]);
        let mut start = 0;
        for (scale, map) in maps.iter().enumerate() {
            f_hat = model.quantizer().add_scale(&f_hat, scale, map).map_err(text)?;
            let name = format!("{out}.f_hat.{scale}");
            keep(near(&name, &f_hat, &want(&name)?, CODES));
            if scale + 1 < scales {
                let next = model.quantizer().next_input(&f_hat, scale).map_err(text)?;
                let next = next.flatten(2, 3).transpose(1, 2);
                let piece = inputs.narrow(1, start, next.size()[1]);
                keep(near(&format!("{out}: the input behind scale {scale}"), &next, &piece, 0.0));
                start += next.size()[1];
            }
            let partial = format!("{out}.image_upto.{scale}");
            if golden.has(&partial) {
                keep(near(&partial, &model.decode(&f_hat).map_err(text)?, &want(&partial)?, IMAGES));
            }
        }
        let image = format!("{out}.image");
        keep(near(&image, &model.decode(&f_hat).map_err(text)?, &want(&image)?, IMAGES));
    }

    // The decoder, step by step.
    let last = want(&format!("out.f_hat.{}", scales - 1))?;
    let decoded = model.decode_seen(&last, &mut |name, value| {
        let prefix = if name == "post_quant_conv" { "mid" } else { "mid.decoder" };
        seen.push((format!("{prefix}.{name}"), value.shallow_clone()));
    });
    let _ = decoded.map_err(text)?;
    for (name, value) in seen {
        if golden.has(&name) {
            steps += 1;
            let tolerance = if name.contains("encoder") { FEATURES } else { IMAGES };
            keep(near(&name, &value, &want(&name)?, tolerance));
        }
    }

    // One step of training.
    let f = f.copy().set_requires_grad(true);
    let quantized = model.quantizer().quantize(&f, model.config().beta).map_err(text)?;
    keep(near("vq.loss", &quantized.loss, &want("out.vq.loss")?, LOSS));
    keep(near("vq.f_hat", &quantized.f_hat, &want("out.vq.f_hat")?, CODES));
    let sum = (&quantized.f_hat * want("in.grad_f_hat")?).sum(Kind::Float) + &quantized.loss;
    sum.backward();
    keep(near("vq.grad_f", &f.grad(), &want("out.vq.grad_f")?, GRADIENTS));
    keep(near("vq.grad_embedding", &model.quantizer().embedding().grad(), &want("out.vq.grad_embedding")?, GRADIENTS));

    // What a file has and nobody compared would be passed over.
    let known = ["f_hat", "image", "idx", "var_input", "random", "vq", "image_upto", "idx_margin"];
    let strange: Vec<&str> = golden
        .names_after("out.")
        .filter(|name| !known.iter().any(|known| name.split('.').next() == Some(*known)))
        .collect();
    if !strange.is_empty() {
        problems.push(format!("not compared: {strange:?}"));
    }
    if !problems.is_empty() {
        return Err(problems.join("; "));
    }
    Ok(format!("{scales} scales, {steps} steps on the way, largest difference {largest:.1e}"))
}

/// Which convolution each scale uses, for every number of convolutions and scales in the file.
pub fn check_phi_index(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let mut compared = 0;
    for name in golden.names_after("out.phi_index.") {
        let number = |part: &str| part[1..].parse::<usize>().map_err(text);
        let (count, scales) = name.split_once('.').ok_or("expected K<k>.S<s>")?;
        let (count, scales) = (number(count)?, number(scales)?);
        let want = golden.integers(&format!("out.phi_index.{name}"))?;
        for sharing in [PhiSharing::Several(count), PhiSharing::Own(count)] {
            let got: Vec<i64> = (0..scales).map(|scale| sharing.index(scale, scales) as i64).collect();
            if got != want {
                return Err(format!("{name}: expected {want:?}, got {got:?}"));
            }
        }
        let ticks = Vec::<f64>::try_from(golden.tensor(&format!("out.ticks.K{count}"))?).map_err(text)?;
        if PhiSharing::Several(count).ticks() != ticks {
            return Err(format!("ticks of {count}: expected {ticks:?}, got {:?}", PhiSharing::Several(count).ticks()));
        }
        compared += 1;
    }
    match compared {
        0 => Err("holds no `out.phi_index.*`".to_owned()),
        compared => Ok(format!("{compared} tables")),
    }
}
