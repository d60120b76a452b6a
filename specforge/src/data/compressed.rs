//! Text that was compressed with gzip or zstd, in one piece or in several.

use std::io::{Read, Write};
use std::path::Path;

use flate2::read::MultiGzDecoder;

use super::content::{Content, Unpacked};
use crate::error::{Error, Result};

const GZIP: &[u8] = b"\x1f\x8b";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
/// How a zstd frame begins that is passed over, its first byte left out: some programs write an index into one.
const ZSTD_SKIPPED: &[u8] = b"\x2a\x4d\x18";

/// Unpacks what is compressed, by its first bytes; everything else is given back as it is.
pub(super) fn unpack(path: &Path, content: Content) -> Result<Content> {
    let is_skipped =
        content.first().is_some_and(|first| first & 0xf0 == 0x50) && content[1..].starts_with(ZSTD_SKIPPED);
    if content.starts_with(GZIP) {
        return read(path, "gzip", MultiGzDecoder::new(&*content));
    }
    if content.starts_with(ZSTD) || is_skipped {
        let decoder = zstd::Decoder::new(&*content).map_err(Error::io("unpack", path))?;
        return read(path, "zstd", decoder);
    }
    Ok(content)
}

fn read(path: &Path, format: &str, mut decoder: impl Read) -> Result<Content> {
    let mut unpacked = Unpacked::new();
    let mut piece = vec![0; 1 << 18];
    loop {
        let count = decoder.read(&mut piece).map_err(|error| {
            let length = unpacked.length();
            let problem =
                format!("is compressed with {format} and damaged behind {length} bytes of its content: {error}");
            Error::bad_file(path, problem).with_hint("fetch or make the file again")
        })?;
        if count == 0 {
            return unpacked.finish(path);
        }
        unpacked.write_all(&piece[..count]).map_err(Error::io("unpack", path))?;
    }
}

#[cfg(test)]
mod tests {
    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd_of(text: &[u8]) -> Vec<u8> {
        zstd::encode_all(text, 1).unwrap()
    }

    fn unpacked(bytes: Vec<u8>) -> Result<Vec<u8>> {
        unpack(Path::new("a.jsonl"), Content::Owned(bytes)).map(|content| content.to_vec())
    }

    #[test]
    fn pieces_are_joined() {
        for pack in [gzip, zstd_of] {
            assert_eq!(unpacked(pack(b"one\ntwo\n")).unwrap(), b"one\ntwo\n");
            assert_eq!(unpacked([pack(b"one\n"), pack(b"two\n")].concat()).unwrap(), b"one\ntwo\n");
            assert_eq!(unpacked(pack(b"")).unwrap(), b"");
        }
        let skipped = [&b"\x53\x2a\x4d\x18\x04\0\0\0abcd"[..], &zstd_of(b"one")].concat();
        assert_eq!(unpacked(skipped).unwrap(), b"one");
        assert_eq!(unpacked(b"{}".to_vec()).unwrap(), b"{}");
        assert_eq!(unpacked(Vec::new()).unwrap(), b"");
    }

    #[test]
    fn what_is_large_leaves_memory() {
        let text = b"0123456789abcdef".repeat((super::super::content::tests_limit() >> 4) + 1);
        let content = unpack(Path::new("a"), Content::Owned(zstd_of(&text))).unwrap();
        assert!(matches!(content, Content::Mapped(_)) && *content == *text);
    }

    #[test]
    fn what_is_damaged_is_refused() {
        for (pack, name) in [(gzip as fn(&[u8]) -> Vec<u8>, "gzip"), (zstd_of, "zstd")] {
            let text: Vec<u8> = (0..100_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
            let whole = pack(&text);
            let error = unpacked(whole[..whole.len() / 2].to_vec()).unwrap_err().to_string();
            assert!(error.contains(&format!("a.jsonl: is compressed with {name} and damaged behind")), "{error}");
            let mut flipped = whole.clone();
            flipped[whole.len() / 2] ^= 0xff;
            assert!(unpacked(flipped).map_or(true, |bytes| bytes != text));
        }
        // gzip knows the sum of its content, and is asked for it.
        let mut wrong = gzip(b"one");
        let sum = wrong.len() - 8;
        wrong[sum] ^= 1;
        assert!(unpacked(wrong).is_err());
    }
}
