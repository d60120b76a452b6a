//! `mask_embedding.pt`: the row that stands for what is to be drafted, where a drafter has one of its own.
//!
//! vLLM 0.33 takes a tensor, or a table `{mask_token_id, embedding}`; SGLang 0.5.23 takes the table alone, which is
//! what `torch.save` makes of it. Nothing of a file is run: see [`crate::files::torch_file`].

use std::fs::File;
use std::io::Write;
use std::path::Path;

use tch::{Device, Kind, Tensor};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::error::{Error, Result};
use crate::files;
use crate::files::torch_file::TorchFile;
use crate::weights::writer;

/// The file's name.
pub(super) const FILE: &str = "mask_embedding.pt";

/// Most numbers of a row.
const MOST: u64 = 1 << 22;

/// What a file holds.
#[derive(Debug)]
pub(super) struct MaskRow {
    /// `[H]`
    pub(super) row: Tensor,
    /// The token that it stands for, where the file says it.
    pub(super) token: Option<i64>,
}

/// Reads a file.
pub(super) fn read(path: &Path) -> Result<MaskRow> {
    let refuse = |problem: String| {
        Error::bad_file(path, problem).with_hint(
            "expected what torch.save writes of a tensor, or of {\"mask_token_id\": int, \"embedding\": tensor}",
        )
    };
    let mut file = TorchFile::open(path).map_err(refuse)?;
    // A file of one tensor has no name for it.
    let names = ["embedding", ""];
    let name = names.into_iter().find(|name| file.header(name).is_some());
    let name = name.ok_or_else(|| refuse("holds no tensor `embedding`".to_owned()))?;
    if file.number("per_position").is_some_and(|number| number != 0) {
        return Err(refuse("`per_position`: one row for all places is supported alone".to_owned()));
    }
    let token = file.number("mask_token_id");
    let header = file.header(name).map(|header| (header.storage.to_owned(), header.shape.to_vec()));
    let (storage, shape) = header.ok_or_else(|| refuse("holds no tensor `embedding`".to_owned()))?;
    let (kind, width) = match storage.as_str() {
        "FloatStorage" => (Kind::Float, 4),
        "BFloat16Storage" => (Kind::BFloat16, 2),
        "HalfStorage" => (Kind::Half, 2),
        other => return Err(refuse(format!("`embedding`: expected floating-point numbers, got {other}"))),
    };
    let bytes = file.elements(name, width, MOST).map_err(refuse)?;
    let elements = i64::try_from(bytes.len() as u64 / width).unwrap_or(i64::MAX);
    if shape.iter().filter(|&&size| size != 1).count() > 1 {
        return Err(refuse(format!("`embedding`: expected one row, got shape {shape:?}")));
    }
    let row = Tensor::f_from_data_size(&bytes, &[elements], kind)?;
    if !bool::try_from(row.f_isfinite()?.f_all()?)? {
        return Err(refuse("`embedding`: expected finite numbers".to_owned()));
    }
    Ok(MaskRow { row, token })
}

/// Writes the table that both engines take.
pub(super) fn write(path: &Path, token: i64, row: &Tensor) -> Result<()> {
    let (storage, width) = match row.kind() {
        Kind::BFloat16 => ("BFloat16Storage", 2),
        Kind::Half => ("HalfStorage", 2),
        _ => ("FloatStorage", 4),
    };
    let kind = if width == 4 { Kind::Float } else { row.kind() };
    let row = row.f_to_kind(kind)?.f_contiguous()?.f_view([-1])?;
    let row = row.f_to_device(Device::Cpu)?;
    let bytes = writer::host_bytes(&row);
    let program = program(token, storage, row.numel() as u64);
    let failed = |error: String| Error::bad_file(path, format!("cannot be written: {error}"));
    files::write_through(path, |temporary| {
        let mut archive = ZipWriter::new(File::create(temporary).map_err(Error::io("create", temporary))?);
        let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        let entries: [(&str, &[u8]); 4] =
            [("data.pkl", &program), ("byteorder", b"little"), ("data/0", bytes), ("version", b"3\n")];
        for (name, content) in entries {
            archive.start_file(format!("mask_embedding/{name}"), stored).map_err(|error| failed(error.to_string()))?;
            archive.write_all(content).map_err(Error::io("write", temporary))?;
        }
        let file = archive.finish().map_err(|error| failed(error.to_string()))?;
        file.sync_all().map_err(Error::io("write", temporary))
    })
}

/// The pickle (protocol 2) of the table.
fn program(token: i64, storage: &str, elements: u64) -> Vec<u8> {
    let mut code = vec![0x80, 2, b'}', b'('];
    let text = |code: &mut Vec<u8>, text: &str| {
        code.push(b'X');
        code.extend((text.len() as u32).to_le_bytes());
        code.extend(text.as_bytes());
    };
    let number = |code: &mut Vec<u8>, number: i64| {
        code.push(b'J');
        code.extend((number as i32).to_le_bytes());
    };
    let global = |code: &mut Vec<u8>, module: &str, name: &str| {
        code.extend(format!("c{module}\n{name}\n").bytes());
    };
    text(&mut code, "mask_token_id");
    number(&mut code, token);
    text(&mut code, "embedding");
    global(&mut code, "torch._utils", "_rebuild_tensor_v2");
    code.extend(b"((");
    text(&mut code, "storage");
    global(&mut code, "torch", storage);
    text(&mut code, "0");
    text(&mut code, "cpu");
    number(&mut code, elements as i64);
    // The storage; then offset, shape, strides, whether there is a gradient, hooks.
    code.extend(b"tQ");
    number(&mut code, 0);
    number(&mut code, elements as i64);
    code.push(0x85);
    number(&mut code, 1);
    code.extend([0x85, 0x89]);
    global(&mut code, "collections", "OrderedDict");
    code.extend(b")Rt");
    code.extend(b"Ru.");
    code
}
