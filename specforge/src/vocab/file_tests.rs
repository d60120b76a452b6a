//! Maps on disk: written and read back, files of PyTorch, and every way in which a file can be wrong.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use zip::write::SimpleFileOptions;

use super::*;

fn map() -> VocabMap {
    VocabMap::new(vec![1, 3, 9, 14], 16).unwrap()
}

fn sample() -> VocabFile {
    let record = Record::new(&map(), &"a1b2".repeat(16), &"c3d4".repeat(16), 0.123456789012345);
    VocabFile { map: map(), record: Some(record) }
}

fn torch_fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/vocab/vocab_mapping.pt")
}

/// Message and hint of a refused file, which must be named.
fn refusal(path: &Path) -> String {
    let error = VocabFile::read(path).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    assert!(error.to_string().starts_with(&path.display().to_string()), "{error}");
    format!("{error} -- {}", error.hint().unwrap_or_default())
}

#[test]
fn a_map_is_read_back_and_equal_maps_are_equal_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new/vocab.safetensors");
    sample().write(&path).unwrap();
    assert_eq!(VocabFile::read(&path).unwrap(), sample());
    let first = fs::read(&path).unwrap();
    sample().write(&path).unwrap();
    assert_eq!(fs::read(&path).unwrap(), first);
    let bare = VocabFile { record: None, ..sample() };
    bare.write(&path).unwrap();
    assert_eq!(VocabFile::read(&path).unwrap(), bare);
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
}

#[test]
fn only_maps_are_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("thesis.txt");
    fs::write(&path, "years of work").unwrap();
    for path in [path.as_path(), folder.path()] {
        let error = sample().write(path).unwrap_err();
        assert!(error.to_string().contains("is there and is no vocabulary map"), "{error}");
    }
    assert_eq!(fs::read_to_string(&path).unwrap(), "years of work");
}

#[test]
fn a_map_is_checked_against_the_run() {
    let (file, path) = (sample(), Path::new("map.safetensors"));
    let record = file.record.clone().unwrap();
    let sound = Wanted {
        tokenizer_hash: &record.tokenizer_hash,
        corpus_hash: &record.corpus_hash,
        target_size: 16,
        draft_size: None,
    };
    assert!(file.check(path, &sound).unwrap().is_empty());
    assert!(file.check(path, &Wanted { draft_size: Some(4), ..sound }).unwrap().is_empty());
    let refused = |wanted: Wanted<'_>| file.check(path, &wanted).unwrap_err().to_string();
    let problem = refused(Wanted { target_size: 17, ..sound });
    assert_eq!(problem, "map.safetensors: maps a target of 16 tokens, this target has 17");
    let problem = refused(Wanted { draft_size: Some(5), ..sound });
    assert_eq!(problem, "map.safetensors: holds 4 tokens, draft.draft_vocab_size asks for 5");
    let problem = refused(Wanted { tokenizer_hash: "0123456789abcdef", ..sound });
    let expected = "was made with another tokenizer: its hash is a1b2a1b2a1b2, this one's 0123456789ab";
    assert_eq!(problem, format!("map.safetensors: {expected}"));
    // Other data is no reason to refuse, but to say so.
    let warnings = file.check(path, &Wanted { corpus_hash: "other", ..sound }).unwrap();
    assert!(warnings.len() == 1 && warnings[0].contains("counted on other data"), "{warnings:?}");
    // Without a record there is nothing to compare but sizes.
    let bare = VocabFile { record: None, ..sample() };
    let warnings = bare.check(path, &Wanted { tokenizer_hash: "other", ..sound }).unwrap();
    assert!(warnings.len() == 1 && warnings[0].contains("which tokenizer"), "{warnings:?}");
    assert!(bare.check(path, &Wanted { target_size: 15, ..sound }).is_err());
}

/// A safetensors file of any tables under any record.
fn safetensors_of(path: &Path, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)], record: Option<&str>) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let view = TensorView::new(*dtype, shape.clone(), bytes).unwrap();
        ((*name).to_owned(), view)
    });
    let metadata = record.map(|text| HashMap::from([(RECORD_KEY.to_owned(), text.to_owned())]));
    fs::write(path, safetensors::serialize(views, metadata).unwrap()).unwrap();
}

fn offsets(offsets: &[i64]) -> Vec<u8> {
    offsets.iter().flat_map(|offset| offset.to_le_bytes()).collect()
}

fn marks(ids: &[usize]) -> Vec<u8> {
    (0..16).map(|id| u8::from(ids.contains(&id))).collect()
}

#[test]
fn safetensors_files_that_are_no_map_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("map.safetensors");
    let d2t = ("d2t", Dtype::I64, vec![4], offsets(&[1, 2, 7, 11]));
    let t2d = ("t2d", Dtype::BOOL, vec![16], marks(&[1, 3, 9, 14]));
    let narrow = [1, 2, 7, 11].iter().flat_map(|offset: &i32| offset.to_le_bytes()).collect();
    let record = serde_json::to_value(sample().record).unwrap();
    let with = |key: &str, value: serde_json::Value| {
        let mut record = record.clone();
        record[key] = value;
        record.to_string()
    };
    let both = vec![d2t.clone(), t2d.clone()];
    let cases = [
        (vec![t2d.clone()], None, "holds no tensor `d2t`, only: t2d"),
        (vec![d2t.clone()], None, "holds no tensor `t2d`"),
        (vec![("d2t", Dtype::I32, vec![4], narrow), t2d.clone()], None, "`d2t`: expected I64 with one axis, got I32"),
        (
            vec![d2t.clone(), ("t2d", Dtype::U8, vec![16], marks(&[1]))],
            None,
            "`t2d`: expected BOOL with one axis, got U8",
        ),
        (
            vec![("d2t", Dtype::I64, vec![2, 2], offsets(&[1, 2, 7, 11])), t2d.clone()],
            None,
            "`d2t`: expected I64 with one axis, got I64 of shape [2, 2]",
        ),
        (vec![d2t.clone(), ("t2d", Dtype::BOOL, vec![16], vec![2; 16])], None, "`t2d[0]` is neither true nor false"),
        (vec![d2t.clone(), ("t2d", Dtype::BOOL, vec![16], marks(&[1, 3, 9, 13]))], None, "`t2d[14]` is false"),
        (
            vec![d2t.clone(), ("t2d", Dtype::BOOL, vec![16], marks(&[0, 1, 3, 9, 14]))],
            None,
            "names 5 tokens, `d2t` has 4",
        ),
        (both.clone(), Some("{".to_owned()), "specforge.vocab_map: EOF"),
        (both.clone(), Some(with("format_version", 2.into())), "expected format_version 1, got 2"),
        (both.clone(), Some(with("draft_vocab_size", 5.into())), "`draft_vocab_size` is 5, but the tables say 4"),
        (both.clone(), Some(with("target_vocab_size", 15.into())), "`target_vocab_size` is 15, but the tables say 16"),
        (both.clone(), Some(with("surprise", 1.into())), "unknown field `surprise`"),
    ];
    for (tensors, record, expected) in cases {
        safetensors_of(&path, &tensors, record.as_deref());
        let message = refusal(&path);
        assert!(message.contains(expected) && message.contains("specforge vocab"), "{expected}: {message}");
    }
    // Tables beside other tensors, as in an exported draft.
    let other = ("norm.weight", Dtype::F32, vec![1], vec![0; 4]);
    safetensors_of(&path, &[other, d2t, t2d], None);
    assert_eq!(VocabFile::read(&path).unwrap().map, map());

    sample().write(&path).unwrap();
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(refusal(&path).contains("is no vocabulary map"));
    }
    assert!(refusal(folder.path()).contains("is no file"));
    let absent = VocabFile::read(&folder.path().join("absent")).unwrap_err();
    assert!(absent.to_string().contains("No such file"), "{absent}");
}

#[test]
fn the_file_that_pytorch_writes_is_read() {
    assert_eq!(VocabFile::read(&torch_fixture()).unwrap(), VocabFile { map: map(), record: None });
}

/// No prefix of a torch file, and no file with one bit turned, does anything but give the same tables or a refusal.
#[test]
fn damaged_torch_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("map.pt");
    let whole = fs::read(torch_fixture()).unwrap();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        refusal(&path);
    }
    for place in 0..whole.len() {
        for bit in [0, 3, 7] {
            let mut damaged = whole.clone();
            damaged[place] ^= 1 << bit;
            fs::write(&path, &damaged).unwrap();
            match VocabFile::read(&path) {
                Ok(file) => assert_eq!(file.map, map(), "byte {place}, bit {bit}"),
                Err(error) => assert_eq!(error.exit_code(), 2, "byte {place}, bit {bit}: {error}"),
            }
        }
    }
}

/// Name and content of a file in an archive.
type Entry<'a> = (&'a str, &'a [u8]);

/// A torch file by hand: a program, and entries beside it.
fn torch_file(path: &Path, program: &[u8], entries: &[Entry<'_>]) {
    let mut zip = zip::ZipWriter::new(fs::File::create(path).unwrap());
    let options = SimpleFileOptions::default();
    for (name, bytes) in [("data.pkl", program)].iter().chain(entries) {
        zip.start_file(format!("archive/{name}"), options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
}

fn unicode(text: &str) -> Vec<u8> {
    [b"X".as_slice(), &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

/// Instructions that leave a tensor: storage type, key, offset, shape and stride.
fn tensor(storage: &str, key: &str, offset: u8, shape: &[u8], stride: u8) -> Vec<u8> {
    let global = format!("ctorch\n{storage}\n").into_bytes();
    let rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec();
    let sizes = |sizes: Vec<u8>| {
        [b"(".to_vec(), sizes.into_iter().flat_map(|size| [b'K', size]).collect(), b"t".to_vec()].concat()
    };
    [
        rebuild,
        unicode("storage"),
        global,
        unicode(key),
        unicode("cpu"),
        vec![b'K', 16, b't', b'Q', b'K', offset],
        sizes(shape.to_vec()),
        sizes(vec![stride; shape.len()]),
        b"\x89ccollections\nOrderedDict\n)RtR".to_vec(),
    ]
    .concat()
}

/// A program that ends with a table of these tensors.
fn table(tensors: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let pairs: Vec<u8> = tensors.iter().flat_map(|(name, tensor)| [unicode(name), tensor.clone()].concat()).collect();
    [b"\x80\x02}(".to_vec(), pairs, b"u.".to_vec()].concat()
}

#[test]
fn torch_files_that_are_no_map_are_refused_and_nothing_is_run() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("map.pt");
    let d2t = || tensor("LongStorage", "0", 0, &[4], 1);
    let t2d = || tensor("BoolStorage", "1", 0, &[16], 1);
    let (long, bools) = (offsets(&[1, 2, 7, 11]), marks(&[1, 3, 9, 14]));
    let sound: [Entry<'_>; 2] = [("data/0", &long), ("data/1", &bools)];
    torch_file(&path, &table(&[("d2t", d2t()), ("t2d", t2d())]), &sound);
    assert_eq!(VocabFile::read(&path).unwrap().map, map());

    // A tensor that looks into the middle of a larger storage.
    let larger = offsets(&[99, 1, 2, 7, 11, 99]);
    let inner = tensor("LongStorage", "0", 1, &[4], 1);
    torch_file(&path, &table(&[("d2t", inner), ("t2d", t2d())]), &[("data/0", &larger), ("data/1", &bools)]);
    assert_eq!(VocabFile::read(&path).unwrap().map, map());

    let whole = |d2t: Vec<u8>, t2d: Vec<u8>| table(&[("d2t", d2t), ("t2d", t2d)]);
    // Doubles a tuple a hundred times: 2^100 values, were they copied.
    let doubling = [b"\x80\x02)q\x00".to_vec(), b"h\x00h\x00\x86q\x00".repeat(100), b".".to_vec()].concat();
    let nested = [b"\x80\x02)".to_vec(), b"\x85".repeat(60_000), b".".to_vec()].concat();
    let long_program = [b"\x80\x02".to_vec(), b"N".repeat(1 << 20), b".".to_vec()].concat();
    let programs: [(Vec<u8>, &str); 20] = [
        (table(&[("d2t", d2t())]), "holds no tensor `t2d`"),
        (table(&[]), "holds no tensor `d2t`"),
        (b"\x80\x02N.".to_vec(), "expected a table of tensors by name"),
        (b"\x80\x02".to_vec(), "ends in the middle"),
        (b".".to_vec(), "takes a value where there is none"),
        (b"\x80\x02cos\nsystem\nX\x04\0\0\0exit\x85R.".to_vec(), "calls `os.system`"),
        (b"\x80\x02cbuiltins\neval\n)\x81.".to_vec(), "has the instruction 0x81"),
        (b"\x80\x02h\x07.".to_vec(), "asks for value 7, which it never kept"),
        (b"\x80\x02q\x07.".to_vec(), "remembers a value where there is none"),
        (b"\x80\x02\x8a\xff".to_vec(), "has an integer of 255 bytes"),
        (b"\x80\x02X\xff\xff\xff\xff.".to_vec(), "ends in the middle"),
        (b"\x80\x02Nt.".to_vec(), "misses a mark"),
        (b"\x80\x02}(Nu.".to_vec(), "a key without a value"),
        (doubling, "nests tuples more than 8 deep"),
        (nested, "nests tuples more than 8 deep"),
        (long_program, "expected at most 1048576 bytes"),
        (
            whole(tensor("IntStorage", "0", 0, &[4], 1), t2d()),
            "`d2t`: expected elements of LongStorage, got IntStorage",
        ),
        (whole(d2t(), tensor("ByteStorage", "1", 0, &[16], 1)), "`t2d`: expected elements of BoolStorage"),
        (whole(tensor("LongStorage", "0", 0, &[2, 2], 1), t2d()), "`d2t`: expected one axis, got shape [2, 2]"),
        (whole(tensor("LongStorage", "0", 0, &[4], 2), t2d()), "do not lie side by side"),
    ];
    for (program, expected) in &programs {
        torch_file(&path, program, &sound);
        let message = refusal(&path);
        assert!(message.contains(expected) && message.contains("torch.save"), "{expected}: {message}");
    }

    let program = whole(d2t(), t2d());
    let entries: [(&[Entry<'_>], &str); 6] = [
        (&[("data/0", &long)], "`archive/data/1`"),
        (&[("data/0", &long[..31]), ("data/1", &bools)], "`d2t`: expected 32 bytes, got 31"),
        (&[("data/0", &long), ("data/1", &[7; 16])], "`t2d[0]` is neither true nor false"),
        (&[("data/0", &long), ("data/1", &[0; 16])], "`t2d[1]` is false"),
        (&[("data/0", &long), ("data/1", &bools), ("byteorder", b"big")], "big-endian"),
        (&[("data/0", &long), ("data/1", &bools), ("more/data.pkl", b"")], "expected one `data.pkl` inside, found 2"),
    ];
    for (entries, expected) in entries {
        torch_file(&path, &program, entries);
        let message = refusal(&path);
        assert!(message.contains(expected), "{expected}: {message}");
    }
    // The format before PyTorch 1.6 is a bare pickle.
    fs::write(&path, b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.").unwrap();
    assert!(refusal(&path).contains("PyTorch 1.6 or later"));
}
