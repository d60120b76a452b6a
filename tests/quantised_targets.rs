//! Targets whose weights are float8 or MXFP4 with scales: the same model as one whose files hold the numbers they stand for.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use specforge::models::{ForwardInput, LogitRows, load_target};
use specforge::nn::AttentionMask;
use specforge::weights::write_tensors;
use tch::{Device, Kind, Tensor};

use crate::fixture::{Workspace, json_of, model_config, model_tensors, output_of, specforge, stderr_of};

/// Sizes that blocks of 128 do not divide, and groups of 32 do.
fn changes() -> Value {
    json!({"hidden_size": 160, "intermediate_size": 192, "head_dim": 40, "max_position_embeddings": 128})
}

/// A weight of the layers as it is stored, and the numbers it stands for.
type Quantise = fn(&str, &Tensor) -> (Vec<(String, Tensor)>, Tensor);

fn float8(value: &Tensor, scale: &Tensor) -> Tensor {
    (value / scale).clamp(-448.0, 448.0).to_kind(Kind::Float8e4m3fn)
}

fn by_tensor(name: &str, value: &Tensor) -> (Vec<(String, Tensor)>, Tensor) {
    let scale = value.abs().max() / 448.0;
    let stored = float8(value, &scale);
    let numbers = stored.to_kind(Kind::Float) * &scale;
    (vec![(name.to_owned(), stored), (format!("{name}_scale"), scale.view([1]))], numbers)
}

fn by_row(name: &str, value: &Tensor) -> (Vec<(String, Tensor)>, Tensor) {
    let scale = (value.abs().amax([1], true) / 448.0).to_kind(Kind::BFloat16); // [out, 1]
    let stored = float8(value, &scale.to_kind(Kind::Float));
    let numbers = stored.to_kind(Kind::Float) * scale.to_kind(Kind::Float);
    let mut tensors = vec![(name.to_owned(), stored), (format!("{name}_scale"), scale)];
    // A scale of activations, which is passed over.
    tensors.push((name.replace("weight", "input_scale"), Tensor::from_slice(&[0.5f32])));
    (tensors, numbers)
}

fn by_block(name: &str, value: &Tensor) -> (Vec<(String, Tensor)>, Tensor) {
    let (rows, columns) = value.size2().unwrap();
    let (down, across) = ((rows + 127) / 128, (columns + 127) / 128);
    let scale = Tensor::zeros([down, across], (Kind::Float, Device::Cpu));
    let (stored, numbers) = (value.zeros_like().to_kind(Kind::Float8e4m3fn), value.zeros_like());
    for i in 0..down {
        for j in 0..across {
            let cut = |tensor: &Tensor| {
                let tensor = tensor.narrow(0, i * 128, (rows - i * 128).min(128));
                tensor.narrow(1, j * 128, (columns - j * 128).min(128))
            };
            let own = cut(value).abs().max() / 448.0;
            let short = float8(&cut(value), &own);
            cut(&stored).copy_(&short);
            cut(&numbers).copy_(&(short.to_kind(Kind::Float) * &own));
            scale.get(i).get(j).copy_(&own);
        }
    }
    (vec![(name.to_owned(), stored), (format!("{name}_scale_inv"), scale)], numbers)
}

/// Two numbers a byte, `X_packed` and `X_scale`, and the numbers.
pub fn mxfp4(name: &str, value: &Tensor) -> (Vec<(String, Tensor)>, Tensor) {
    let (rows, columns) = value.size2().unwrap();
    let table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let values = Vec::<f32>::try_from(value.reshape([-1])).unwrap();
    let (mut bytes, mut exponents, mut numbers) = (Vec::new(), Vec::new(), Vec::new());
    for group in values.chunks(32) {
        let most = group.iter().fold(0f32, |most, value| most.max(value.abs())).max(1e-20);
        let exponent = most.log2().floor() as i32 - 2;
        let scale = 2f32.powi(exponent);
        let codes: Vec<u8> = group
            .iter()
            .map(|value| {
                let far = |code: &usize| (table[*code] - value.abs() / scale).abs();
                let code = (0..8).min_by(|left, right| far(left).total_cmp(&far(right))).unwrap() as u8;
                code | u8::from(*value < 0.0) << 3
            })
            .collect();
        numbers.extend(codes.iter().map(|code| {
            let size = table[(code & 7) as usize] * scale;
            if code & 8 == 0 { size } else { -size }
        }));
        bytes.extend(codes.chunks(2).map(|pair| pair[0] | pair[1] << 4));
        exponents.push((exponent + 127) as u8);
    }
    let packed = Tensor::from_slice(&bytes).view([rows, columns / 2]);
    let scales = Tensor::from_slice(&exponents).view([rows, columns / 32]);
    let tensors = vec![(format!("{name}_packed"), packed), (format!("{name}_scale"), scales)];
    (tensors, Tensor::from_slice(&numbers).view([rows, columns]))
}

/// Two model folders: one quantised, one with the numbers it stands for.
fn folders(workspace: &Workspace, name: &str, section: &Value, quantise: Quantise) -> [PathBuf; 2] {
    let config = model_config(&changes());
    let (mut stored, mut plain) = (Vec::new(), Vec::new());
    for (name, value) in model_tensors(&config) {
        if name.contains("_proj") {
            let (tensors, numbers) = quantise(&name, &value);
            stored.extend(tensors);
            plain.push((name, numbers));
        } else {
            stored.push((name.clone(), value.shallow_clone()));
            plain.push((name, value));
        }
    }
    let write = |folder: PathBuf, config: Value, tensors: &[(String, Tensor)]| {
        fs::create_dir_all(&folder).unwrap();
        for file in fs::read_dir(workspace.path("model")).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), folder.join(file.file_name())).unwrap();
        }
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        write_tensors(&folder.join("model.safetensors"), tensors, &[]).unwrap();
        folder
    };
    let mut quantised = config.clone();
    quantised["quantization_config"] = section.clone();
    [
        write(workspace.path(&format!("{name}-quantised")), quantised, &stored),
        write(workspace.path(&format!("{name}-plain")), config, &plain),
    ]
}

fn logits(folder: &Path, kind: Kind) -> Tensor {
    let target = load_target(folder, kind, Device::Cpu).unwrap();
    let ids = (Tensor::arange(24, (Kind::Int64, Device::Cpu)) * 17).view([1, 24]);
    let positions = Tensor::arange(24, (Kind::Int64, Device::Cpu)).view([1, 24]);
    let input = ForwardInput {
        ids: &ids,
        positions: &positions,
        mask: &AttentionMask::Causal,
        capture: &[],
        logits: LogitRows::All,
    };
    target.forward(&input, None).unwrap().logits.unwrap()
}

#[test]
fn a_quantised_target_is_the_one_its_numbers_say() {
    let mut workspace = Workspace::new();
    let kinds: [(&str, Value, Quantise); 4] = [
        ("tensor", json!({"quant_method": "fp8", "activation_scheme": "static"}), by_tensor),
        ("row", json!({"quant_method": "compressed-tensors", "format": "float-quantized"}), by_row),
        ("block", json!({"quant_method": "fp8", "weight_block_size": [128, 128]}), by_block),
        ("mxfp4", json!({"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}), mxfp4),
    ];
    for (name, section, quantise) in kinds {
        let [quantised, plain] = folders(&workspace, name, &section, quantise);
        for kind in [Kind::Float, Kind::BFloat16] {
            assert!(logits(&quantised, kind).equal(&logits(&plain, kind)), "{name}, {kind:?}");
        }
        // The whole program takes it, says so, and trains as on the plain one.
        let mut reports = Vec::new();
        for folder in [&quantised, &plain] {
            workspace.set("target.path", folder.display().to_string());
            let run = format!("run-{name}-{}", reports.len());
            let output = output_of(&mut workspace.train_command(&run, &[]));
            assert!(output.status.success(), "{name}: {}", stderr_of(&output));
            assert_eq!(stderr_of(&output).contains("the weights are quantised ("), folder == &quantised, "{name}");
            let report: Value = serde_json::from_slice(&output.stdout).unwrap();
            reports.push(report["end"]["loss"].as_f64().unwrap());
        }
        assert_eq!(reports[0].to_bits(), reports[1].to_bits(), "{name}");
        let said = |folder: &Path| {
            let mut generate =
                specforge(&["generate", "--json", "--max-new-tokens", "12", "--prompt", "a bird", "--target"]);
            json_of(generate.arg(folder))["token_ids"].clone()
        };
        assert_eq!(said(&quantised), said(&plain), "{name}");
    }
}

#[test]
fn scales_that_do_not_fit_are_named() {
    let workspace = Workspace::new();
    let section = json!({"quant_method": "fp8"});
    let wrong: [(&str, Quantise, &str); 3] = [
        (
            "shape",
            |name, value| {
                let (mut tensors, numbers) = by_tensor(name, value);
                tensors[1].1 = Tensor::ones([3, 5], (Kind::Float, Device::Cpu));
                (tensors, numbers)
            },
            "weight_scale` [3, 5] fits no weights of shape",
        ),
        (
            "none",
            |name, value| {
                let (mut tensors, numbers) = by_tensor(name, value);
                tensors.truncate(1);
                (tensors, numbers)
            },
            "is of type F8_E4M3, and no scale lies beside it",
        ),
        (
            "nan",
            |name, value| {
                let (mut tensors, numbers) = by_tensor(name, value);
                tensors[1].1 = Tensor::from_slice(&[f32::MAX]);
                (tensors, numbers)
            },
            "expected finite numbers",
        ),
    ];
    for (name, quantise, words) in wrong {
        let [quantised, _] = folders(&workspace, name, &section, quantise);
        let error = load_target(&quantised, Kind::Float, Device::Cpu).err().unwrap().to_string();
        assert!(error.contains(words), "{name}: {error}");
    }
}
