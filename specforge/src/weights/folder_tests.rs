use super::*;
use crate::weights::write_tensors;

fn numbers(shape: &[i64], kind: Kind) -> Tensor {
    let count: i64 = shape.iter().product();
    (Tensor::arange(count, (Kind::Float, Device::Cpu)) / 8 - 3).to_kind(kind).view(shape)
}

fn write(path: &Path, tensors: &[(&str, Tensor)]) {
    let tensors: Vec<_> = tensors.iter().map(|(name, value)| ((*name).to_owned(), value.shallow_clone())).collect();
    write_tensors(path, &tensors, &[]).unwrap();
}

/// Two shards and their index.
fn sharded() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let shard = |number: u32| folder.path().join(format!("model-0000{number}-of-00002.safetensors"));
    write(&shard(1), &[("a", numbers(&[2, 3], Kind::Float)), ("b", numbers(&[4], Kind::BFloat16))]);
    write(&shard(2), &[("c", numbers(&[3, 1, 2], Kind::Half))]);
    let index = r#"{"metadata": {"total_size": 44}, "weight_map": {"a": "model-00001-of-00002.safetensors",
        "b": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"}}"#;
    std::fs::write(folder.path().join(SHARD_INDEX), index).unwrap();
    folder
}

#[track_caller]
fn assert_refused(path: &Path, words: &[&str]) {
    let error = WeightsFolder::open(path).unwrap_err();
    let text = format!("{error} (hint: {})", error.hint().unwrap_or_default());
    assert!(words.iter().all(|word| text.contains(word)), "{text}");
    assert_eq!(error.exit_code(), 2);
}

#[test]
fn every_tensor_of_every_shard_is_found_and_converted() {
    let folder = sharded();
    let weights = WeightsFolder::open(folder.path()).unwrap();
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(weights.shape("c"), Some([3, 1, 2].as_slice()));
    assert_eq!(weights.kind("b"), Some(Kind::BFloat16));
    for (name, shape) in [("a", [2i64, 3].as_slice()), ("b", &[4]), ("c", &[3, 1, 2])] {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double] {
            let got = weights.load(name, kind, Device::Cpu).unwrap();
            assert_eq!(got.kind(), kind);
            assert!(got.equal(&numbers(shape, kind)), "{name} as {kind:?}"); // these numbers are exact in every type
        }
    }
}

#[test]
fn tensors_outlive_the_folder() {
    let folder = sharded();
    let tensor = WeightsFolder::open(folder.path()).unwrap().load("a", Kind::Float, Device::Cpu).unwrap();
    drop(folder);
    assert!(tensor.equal(&numbers(&[2, 3], Kind::Float)));
}

/// More than one piece, the last one short.
#[test]
fn a_large_tensor_is_converted_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(SINGLE_FILE);
    let count = (2 * PIECE_BYTES / 2 + 77) as i64;
    let want = Tensor::arange(count, (Kind::Int64, Device::Cpu)).remainder(251).to_kind(Kind::BFloat16);
    write(&path, &[("w", want.shallow_clone())]);
    let got = WeightsFolder::open(&path).unwrap().load("w", Kind::Float, Device::Cpu).unwrap();
    assert!(got.equal(&want.to_kind(Kind::Float)));
}

/// Old writers did not pad the header, so elements may lie across their alignment.
#[test]
fn elements_that_lie_askew_and_empty_tensors_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(SINGLE_FILE);
    let mut header = r#"{"e":{"dtype":"F32","shape":[0,2],"data_offsets":[0,0]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#
        .to_owned();
    while header.len() % 4 != 1 {
        header.push(' ');
    }
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend([1.5f32, -2.0].iter().flat_map(|value| value.to_le_bytes()));
    std::fs::write(&path, bytes).unwrap();
    let weights = WeightsFolder::open(folder.path()).unwrap();
    for kind in [Kind::Float, Kind::Half] {
        let got = weights.load("w", kind, Device::Cpu).unwrap();
        assert!(got.equal(&Tensor::from_slice(&[1.5f32, -2.0]).to_kind(kind)));
        assert_eq!(weights.load("e", kind, Device::Cpu).unwrap().size(), [0, 2]);
    }
}

#[test]
fn folders_without_weights_say_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    assert_refused(&folder.path().join("absent"), &["absent", "no such folder", "name a folder"]);
    assert_refused(folder.path(), &["neither model.safetensors nor model.safetensors.index.json", "import"]);
}

#[test]
fn broken_shard_sets_are_named() {
    let folder = sharded();
    let (index, second) = (folder.path().join(SHARD_INDEX), folder.path().join("model-00002-of-00002.safetensors"));
    let whole = std::fs::read_to_string(&index).unwrap();
    std::fs::write(&index, whole.replace(r#""c":"#, r#""absent": "model-00002-of-00002.safetensors", "c":"#)).unwrap();
    assert_refused(
        folder.path(),
        &["index.json", "`absent`", "model-00002-of-00002.safetensors, which does not hold it"],
    );
    let unlisted = [("u", numbers(&[1], Kind::Float)), ("c", numbers(&[1], Kind::Float))];
    std::fs::write(&index, &whole).unwrap();
    write(&second, &unlisted);
    let first = folder.path().join("model-00001-of-00002.safetensors");
    let sound = std::fs::read(&first).unwrap();
    write(
        &first,
        &[("a", numbers(&[1], Kind::Float)), ("b", numbers(&[1], Kind::Float)), ("u", numbers(&[1], Kind::Float))],
    );
    assert_refused(folder.path(), &["model-00002", "`u` is also in another shard"]);
    std::fs::write(&first, sound).unwrap();
    std::fs::remove_file(&second).unwrap();
    assert_refused(folder.path(), &["model-00002-of-00002.safetensors", "not there", "fetch the missing shard"]);
    std::fs::write(&index, &whole[..whole.len() - 9]).unwrap();
    assert_refused(folder.path(), &["index.json", "line"]);
    std::fs::write(&index, "{}").unwrap();
    assert_refused(folder.path(), &["index.json", "weight_map"]);
}

#[test]
fn damaged_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(SINGLE_FILE);
    write(&path, &[("w", numbers(&[64], Kind::Float))]);
    let whole = std::fs::read(&path).unwrap();
    let longer = [whole.clone(), vec![0; 3]].concat();
    let huge_header = [&u64::MAX.to_le_bytes(), &whole[8..]].concat();
    let not_json = [&whole[..8], b"[", &whole[9..]].concat();
    let pieces = [&whole[..0], &whole[..5], &whole[..20], &whole[..whole.len() - 1]];
    for bytes in pieces.into_iter().chain([longer.as_slice(), &huge_header, &not_json]) {
        std::fs::write(&path, bytes).unwrap();
        assert_refused(folder.path(), &["model.safetensors", "not a whole safetensors file", "truncated or damaged"]);
    }
    std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    assert_refused(folder.path(), &[&format!("another length than its {} bytes", whole.len() - 1)]);
}

#[test]
fn tensors_that_do_not_fit_are_listed_with_expected_and_got() {
    let folder = sharded();
    let weights = WeightsFolder::open(folder.path()).unwrap();
    let expected = [("a", vec![2, 3]), ("b", vec![5]), ("d", vec![7])];
    let expected = expected.map(|(name, shape)| (name.to_owned(), shape));
    let text = weights.check(&expected, |_| false).unwrap_err().to_string();
    for line in ["missing (1):\n    d [7]", "surplus (1):\n    c [3, 1, 2]", "b: expected [5], got [4]"] {
        assert!(text.contains(line), "{text}");
    }
    assert!(!weights.check(&expected, |name| name == "c").unwrap_err().to_string().contains("surplus"));
    assert!(weights.load("d", Kind::Float, Device::Cpu).unwrap_err().to_string().contains("missing (1):\n    d"));
    let fitting = [("a", vec![2, 3]), ("b", vec![4]), ("c", vec![3, 1, 2])];
    weights.check(&fitting.map(|(name, shape)| (name.to_owned(), shape)), |_| false).unwrap();
}

#[test]
fn an_index_decides_where_a_tensor_is_read() {
    let folder = sharded();
    let (index, second) = (folder.path().join(SHARD_INDEX), folder.path().join("model-00002-of-00002.safetensors"));
    // The second shard holds a stale `a` of another shape, and a tensor that the index does not know.
    write(
        &second,
        &[("a", numbers(&[7], Kind::Half)), ("c", numbers(&[3, 1, 2], Kind::Half)), ("u", numbers(&[1], Kind::Half))],
    );
    let weights = WeightsFolder::open(folder.path()).unwrap();
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b", "c", "u"]);
    assert!(weights.load("a", Kind::Float, Device::Cpu).unwrap().equal(&numbers(&[2, 3], Kind::Float)));
    assert!(weights.file_of("a").ends_with("model-00001-of-00002.safetensors"));
    // Rotary buffers may be listed and absent.
    let whole = std::fs::read_to_string(&index).unwrap();
    let buffer = r#""x.rotary_emb.inv_freq": "model-00002-of-00002.safetensors", "c":"#;
    std::fs::write(&index, whole.replace(r#""c":"#, buffer)).unwrap();
    WeightsFolder::open(folder.path()).unwrap();
    for (change, words) in [
        (r#""a": "../model-00001-of-00002.safetensors", "c":"#, ["names `a` twice", ""]),
        (r#""d": "../elsewhere.safetensors", "c":"#, ["`d` is in `../elsewhere.safetensors`", "of this folder"]),
        (r#""d": "/etc/passwd", "c":"#, ["`d` is in `/etc/passwd`", "of this folder"]),
        (r#""d": "", "c":"#, ["`d` is in ``", "of this folder"]),
        (r#""d": 3, "c":"#, ["`weight_map.d`", "expected a string"]),
    ] {
        std::fs::write(&index, whole.replace(r#""c":"#, change)).unwrap();
        assert_refused(folder.path(), &words);
    }
    std::fs::write(&index, r#"{"weight_map": {}}"#).unwrap();
    assert_refused(folder.path(), &["`weight_map`: expected at least one tensor"]);
    std::fs::write(&index, &whole).unwrap();
    write(&folder.path().join(SINGLE_FILE), &[("a", numbers(&[2, 3], Kind::Float))]);
    assert_refused(folder.path(), &["holds model.safetensors and an index of other files", "not meant"]);
}

/// A file with this header and so many bytes of data.
fn write_raw(path: &Path, header: &str, data: &[u8]) {
    std::fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()).unwrap();
}

#[test]
fn headers_that_contradict_themselves_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(SINGLE_FILE);
    for (header, word) in [
        (
            r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
            "twice",
        ),
        (
            r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
            "names `w` twice",
        ),
        (
            r#"{"e":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
            "impossible shape",
        ),
        (
            r#"{"e":{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[0,0]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
            "impossible shape",
        ),
        (
            r#"{"e":{"dtype":"F32","shape":[0,1099511627776,1099511627776],"data_offsets":[0,0]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
            "impossible shape",
        ),
        (r#"{"w":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}"#, "overflow"),
        (r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}}"#, "invalid"),
        (r#"{"w":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#, "JSON"),
    ] {
        write_raw(&path, header, &[0; 8]);
        assert_refused(folder.path(), &["is not a whole safetensors file", word]);
    }
    for (dtype, width) in [("F8_E4M3", 1), ("F8_E5M2", 1)] {
        let header = format!(r#"{{"w":{{"dtype":"{dtype}","shape":[8],"data_offsets":[0,{}]}}}}"#, 8 * width);
        write_raw(&path, &header, &[0; 8]);
        assert_refused(folder.path(), &["holds quantised weights", "`w`", dtype, "original model"]);
    }
}

#[test]
fn what_is_no_number_is_refused_by_tensor_and_element() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(SINGLE_FILE);
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double] {
        for (value, name) in [(f64::NAN, "NaN"), (f64::INFINITY, "inf"), (f64::NEG_INFINITY, "-inf")] {
            let sick = numbers(&[40], Kind::Double);
            let _ = sick.get(33).fill_(value);
            write(&path, &[("sound", numbers(&[40], kind)), ("w", sick.to_kind(kind))]);
            let weights = WeightsFolder::open(&path).unwrap();
            for wanted in [Kind::Float, Kind::BFloat16, Kind::Double] {
                let error = weights.load("w", wanted, Device::Cpu).unwrap_err();
                let want = format!("model.safetensors: `w`: expected finite numbers, element 33 is {name}");
                assert!(error.to_string().ends_with(&want), "{error}");
                drop(weights.load("sound", wanted, Device::Cpu).unwrap());
            }
        }
    }
    // Finite as stored, and not as it is wanted.
    write(&path, &[("w", Tensor::from_slice(&[1f32, 70_000.0]))]);
    let weights = WeightsFolder::open(&path).unwrap();
    let error = weights.load("w", Kind::Half, Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("`w` holds numbers that are too large for Half"), "{error}");
    drop(weights.load("w", Kind::BFloat16, Device::Cpu).unwrap());
    write_raw(&path, r#"{"b":{"dtype":"BOOL","shape":[3],"data_offsets":[0,3]}}"#, &[0, 1, 2]);
    let error = WeightsFolder::open(&path).unwrap().load("b", Kind::Bool, Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("`b`: element 2 is neither true nor false"), "{error}");
}

#[test]
fn quantised_tensors_are_told_by_name_and_by_type() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(SINGLE_FILE);
    let expected = [("w".to_owned(), vec![4])];
    let problem = |tensors: &[(&str, Tensor)]| {
        write(&path, tensors);
        WeightsFolder::open(folder.path()).unwrap().check_numbers(&expected).map_err(|error| error.to_string())
    };
    let plain = || numbers(&[4], Kind::Float);
    problem(&[("w", plain()), ("ids", numbers(&[4], Kind::Int64))]).unwrap();
    for kind in [Kind::Int8, Kind::Uint8, Kind::Int, Kind::Int64, Kind::Bool] {
        let error = problem(&[("w", plain().abs().to_kind(kind))]).unwrap_err();
        assert!(error.contains(&format!("`w`: expected floating-point numbers, got {kind:?}")), "{error}");
    }
    let error = problem(&[("w", plain()), ("x.qweight", plain().to_kind(Kind::Int))]).unwrap_err();
    assert!(error.contains("model.safetensors: holds quantised weights (GPTQ or AWQ), such as `x.qweight`"), "{error}");
}

#[test]
fn content_is_compared_whatever_its_type() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(SINGLE_FILE);
    // More than one piece; the difference lies in the last one.
    let count = PIECE_BYTES as i64 / 8 + 5;
    let long = numbers(&[count], Kind::Double).remainder(100);
    let other = long.copy();
    let _ = other.get(count - 1).fill_(0.5);
    write(
        &path,
        &[
            ("a", long.to_kind(Kind::Float)),
            ("b", long.shallow_clone()),
            ("c", other.to_kind(Kind::Float)),
            ("d", long.view([1, -1])),
            ("e", long.to_kind(Kind::Float)),
        ],
    );
    let weights = WeightsFolder::open(&path).unwrap();
    for (left, right, same) in [("a", "b", true), ("a", "e", true), ("a", "c", false), ("b", "d", false)] {
        assert_eq!(weights.same_content(left, right).unwrap(), same, "{left} {right}");
    }
    assert!(weights.same_content("a", "absent").is_err());
}
