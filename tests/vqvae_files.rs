//! A VQVAE's files: as this program writes them, as the reference's `torch.save` does, and as they should not be.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use specforge::models::vqvae::{self, Vqvae, VqvaeConfig};
use specforge::nn::noise;
use specforge::weights::writer::host_bytes;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

const COUNTERS: &str = "quantize.ema_vocab_hit_SV";

fn values() -> Value {
    json!({
        "model_type": "vqvae", "vocab_size": 16, "z_channels": 4, "ch": 4, "ch_mult": [1, 2], "num_res_blocks": 1,
        "patch_nums": [1, 2, 4], "share_quant_resi": 2, "groupnorm_groups": 2
    })
}

fn config() -> VqvaeConfig {
    VqvaeConfig::read(&values()).unwrap().0
}

fn tensors() -> Vec<(String, Tensor)> {
    let mut tensors = Vqvae::initial(&config(), 3).unwrap();
    tensors.push((COUNTERS.to_owned(), Tensor::zeros([3, 16], (Kind::Float, Device::Cpu))));
    tensors
}

/// A folder with the model; `change` may do something to its tensors before they are written.
fn folder(change: impl FnOnce(&mut Vec<(String, Tensor)>)) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut tensors = tensors();
    change(&mut tensors);
    vqvae::write(folder.path(), &config(), &tensors).unwrap();
    folder
}

fn load(path: &Path) -> specforge::error::Result<Vqvae> {
    vqvae::load(path, None, Kind::Float, Device::Cpu)
}

#[track_caller]
fn assert_refused(path: &Path, words: &[&str]) {
    let error = load(path).unwrap_err();
    let text = format!("{error} (hint: {})", error.hint().unwrap_or_default());
    assert!(words.iter().all(|word| text.contains(word)), "{text}");
    assert_eq!(error.exit_code(), 2, "{text}");
}

fn image() -> Tensor {
    noise::normal(&[1, 3, 8, 8], 0.5, 9, 9)
}

fn set_config(folder: &Path, key: &str, value: Option<Value>) {
    let path = folder.join("config.json");
    let mut values: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    match value {
        Some(value) => values[key] = value,
        None => drop(values.as_object_mut().unwrap().remove(key)),
    }
    fs::write(&path, values.to_string()).unwrap();
}

/// What `torch.save(model.state_dict())` writes: an `OrderedDict` of tensors that has the versions of layers as an attribute.
fn write_state_dict(path: &Path, tensors: &[(String, Tensor)], method: zip::CompressionMethod) {
    let text = |text: &str| [b"X".as_slice(), &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    let number = |number: i64| [b"J".as_slice(), &(number as i32).to_le_bytes()].concat();
    let tuple = |numbers: Vec<i64>| {
        let numbers: Vec<u8> = numbers.into_iter().flat_map(number).collect();
        [b"(".to_vec(), numbers, b"t".to_vec()].concat()
    };
    let mut zip = zip::ZipWriter::new(fs::File::create(path).unwrap());
    let options = zip::write::SimpleFileOptions::default().compression_method(method);
    let mut program = b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01(".to_vec();
    for (key, (name, tensor)) in tensors.iter().enumerate() {
        program.extend(text(name));
        program.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        program.extend(
            [text("storage"), b"ctorch\nFloatStorage\n".to_vec(), text(&key.to_string()), text("cpu")].concat(),
        );
        program.extend([number(tensor.numel() as i64), b"tQ".to_vec(), number(0)].concat());
        program.extend([tuple(tensor.size()), tuple(tensor.stride())].concat());
        program.extend(b"\x89h\x00)RtR");
        zip.start_file(format!("vae/data/{key}"), options).unwrap();
        zip.write_all(host_bytes(tensor)).unwrap();
    }
    program.extend(b"u}");
    program.extend([text("_metadata"), b"h\x00)R(".to_vec(), text(""), b"}".to_vec(), text("version")].concat());
    // {"": {"version": 1}}, which becomes the attribute.
    program.extend(b"K\x01susb.");
    for (name, bytes) in [("data.pkl", &program[..]), ("byteorder", &b"little"[..]), ("version", &b"3\n"[..])] {
        zip.start_file(format!("vae/{name}"), options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
}

/// Such a file in a folder with a configuration.
fn state_dict(tensors: &[(String, Tensor)]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vae.pth");
    write_state_dict(&path, tensors, zip::CompressionMethod::Stored);
    fs::write(folder.path().join("vae.json"), json!({"patch_nums": [1, 2, 4], "groupnorm_groups": 2}).to_string())
        .unwrap();
    (folder, path)
}

#[test]
fn what_is_written_is_read() {
    let folder = folder(|_| ());
    let loaded = load(folder.path()).unwrap();
    assert_eq!(loaded.config(), &config());
    let mut tensors = tensors();
    let made = Vqvae::build(config(), &mut |name, _| {
        let place = tensors.iter().position(|(known, _)| known == name).unwrap();
        Ok(tensors.swap_remove(place).1)
    });
    let (got, want) = (loaded.features(&image()).unwrap(), made.unwrap().features(&image()).unwrap());
    assert!(got.equal(&want));
}

#[test]
fn a_state_dict_is_the_same_model_and_shapes_say_what_no_configuration_does() {
    let (_folder, path) = state_dict(&tensors());
    let from_torch = load(&path).unwrap();
    assert_eq!(from_torch.config(), &config());
    let safe = folder(|_| ());
    let want = load(safe.path()).unwrap().features(&image()).unwrap();
    assert!(from_torch.features(&image()).unwrap().equal(&want));
    // A folder of one such file, and one of two.
    let other = tempfile::tempdir().unwrap();
    fs::copy(&path, other.path().join("a.pth")).unwrap();
    fs::write(other.path().join("config.json"), values().to_string()).unwrap();
    assert!(load(other.path()).unwrap().features(&image()).unwrap().equal(&want));
    fs::copy(&path, other.path().join("b.pth")).unwrap();
    assert_refused(other.path(), &["several files of weights: a.pth, b.pth", "name the file"]);
}

#[test]
fn scales_that_nothing_says_are_asked_for() {
    let (folder, path) = state_dict(&tensors());
    fs::write(folder.path().join("vae.json"), r#"{"groupnorm_groups": 2}"#).unwrap();
    assert_refused(&path, &["`patch_nums` is missing", "config.json"]);
    let told = vqvae::load(&path, Some(&[1, 2, 4]), Kind::Float, Device::Cpu).unwrap();
    assert_eq!(told.config(), &config());
    let error = vqvae::load(&path, Some(&[1, 4]), Kind::Float, Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("expected 3 scales") && error.contains(COUNTERS), "{error}");
}

#[test]
fn damaged_state_dicts_are_refused() {
    let (folder, path) = state_dict(&tensors());
    let whole = fs::read(&path).unwrap();
    // Anywhere in the numbers: their checksum tells.
    let mut damaged = whole.clone();
    damaged[200] ^= 1;
    fs::write(&path, &damaged).unwrap();
    assert_refused(&path, &["vae/data/", "torch.save"]);
    for length in [0, 3, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        assert_refused(&path, &["torch"]);
    }
    write_state_dict(&path, &tensors(), zip::CompressionMethod::Deflated);
    assert_refused(&path, &["is compressed"]);
    let mut tensors = tensors();
    let turned = tensors.iter_mut().find(|(name, _)| name == "quant_conv.weight").unwrap();
    turned.1 = turned.1.transpose(0, 1);
    write_state_dict(&path, &tensors, zip::CompressionMethod::Stored);
    assert_refused(&path, &["quant_conv.weight", "side by side"]);
    drop(folder);
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let without = folder(|tensors| tensors.retain(|(name, _)| name != "decoder.mid.attn_1.qkv.bias"));
    assert_refused(without.path(), &["missing (1)", "decoder.mid.attn_1.qkv.bias [24]"]);
    let strange = folder(|tensors| tensors.push(("decoder.extra".to_owned(), image())));
    assert_refused(strange.path(), &["surplus (1)", "decoder.extra"]);
    let another = folder(|tensors| {
        tensors.iter_mut().for_each(|(name, value)| {
            if name == "quant_conv.bias" {
                *value = Tensor::zeros([5], (Kind::Float, Device::Cpu));
            }
        })
    });
    assert_refused(another.path(), &["wrong shape", "quant_conv.bias: expected [4], got [5]"]);
    let nan = folder(|tensors| {
        tensors.iter_mut().for_each(|(name, value)| {
            if name == "decoder.conv_out.bias" {
                *value = Tensor::from_slice(&[0.0f32, f32::NAN, 0.0]);
            }
        })
    });
    assert_refused(nan.path(), &["decoder.conv_out.bias", "finite", "element 1"]);
    let integers = folder(|tensors| {
        tensors.iter_mut().for_each(|(name, value)| {
            if name == "quantize.embedding.weight" {
                *value = value.to_kind(Kind::Int64);
            }
        })
    });
    assert_refused(integers.path(), &["quantize.embedding.weight", "floating-point"]);
    let cut = folder(|_| ());
    let file = cut.path().join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 4]).unwrap();
    assert_refused(cut.path(), &["not a whole safetensors file"]);
}

#[test]
fn a_configuration_of_another_model_is_refused() {
    for (key, value, words) in [
        ("vocab_size", json!(32), ["`vocab_size`: the configuration says 32", "16"]),
        ("ch_mult", json!([1, 4]), ["`ch_mult`: the configuration says [1,4]", "[1,2]"]),
        ("share_quant_resi", json!(4), ["`share_quant_resi`: the configuration says 4", "2"]),
        ("patch_nums", json!([1, 4]), ["`patch_nums`: expected 3 scales", "got 2"]),
        ("groupnorm_groups", json!(32), ["`groupnorm_groups`", "4 channels"]),
        ("model_type", json!("llama"), ["`model_type`: expected `vqvae`", "llama"]),
        ("using_znorm", json!(true), ["`using_znorm`", "config.json"]),
    ] {
        let folder = folder(|_| ());
        set_config(folder.path(), key, Some(value));
        assert_refused(folder.path(), &words);
    }
    // What is left out follows from the weights, or is the reference's default.
    let folder = folder(|_| ());
    ["vocab_size", "ch", "ch_mult", "share_quant_resi", "num_res_blocks", "beta"]
        .iter()
        .for_each(|key| set_config(folder.path(), key, None));
    assert_eq!(load(folder.path()).unwrap().config(), &config());
    fs::write(folder.path().join("config.json"), "[1]").unwrap();
    assert_refused(folder.path(), &["expected an object"]);
    fs::write(folder.path().join("config.json"), r#"{"ch": 4, "ch": 4}"#).unwrap();
    assert_refused(folder.path(), &["names `ch` twice"]);
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    assert_refused(folder.path(), &["neither model.safetensors nor a file of torch.save"]);
    assert_refused(&folder.path().join("absent"), &["no such folder"]);
}
