//! A mapped file that becomes shorter while it is read: the system ends a process that touches what is gone. This lets it
//! say before which file it was.

use std::fs;
use std::path::PathBuf;

use signal_hook::consts::SIGBUS;
use signal_hook::low_level;

use crate::error::{Error, Result};

/// Smallest page there is. The last page of a mapping is there as long as the file reaches into it.
const PAGE: u64 = 4096;

/// From now on a process that touches what is gone of a mapped file reports that and ends with the error's exit code.
pub fn on_shrunk(report: impl Fn(&Error) + Send + Sync + 'static) -> Result<()> {
    let action = move || {
        let error = match shrunk().as_slice() {
            [] => Error::Failed("a mapped file cannot be read any more; its disk may have failed".to_owned()),
            [path, ..] => Error::bad_file(path, "became shorter while it was read")
                .with_hint("run again when nothing writes to it, or fetch it again"),
        };
        report(&error);
        low_level::exit(i32::from(error.exit_code()));
    };
    // SAFETY: the signal is raised by reads of mapped memory, where this program holds no lock of the allocator or of
    // stderr, so that the action may use both. Sent by hand it may do harm, to a process that ends in any case.
    unsafe { low_level::register(SIGBUS, action) }
        .map(drop)
        .map_err(|error| Error::Failed(format!("cannot watch signal {SIGBUS}: {error}")))
}

/// Mapped files that end before their mappings.
fn shrunk() -> Vec<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    maps.lines().filter_map(ends_early).collect()
}

/// The file of a line such as `7f01-7f02 r--s 00001000 08:01 1234   /a/file`, shared and too short for its mapping.
fn ends_early(line: &str) -> Option<PathBuf> {
    let hex = |digits: &str| u64::from_str_radix(digits, 16).ok();
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    // A library is mapped for this process alone, with holes where it ends.
    fields.next().filter(|kind| kind.ends_with('s'))?;
    let offset = hex(fields.next()?)?;
    let path = PathBuf::from(&line[line.find(" /")? + 1..]);
    let last_page = offset + hex(end)?.checked_sub(hex(start)?)?.saturating_sub(PAGE);
    (fs::metadata(&path).ok()?.len() <= last_page).then_some(path)
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::{env, hint};

    use memmap2::Mmap;

    use super::*;

    const CHILD: &str = "SPECFORGE_TEST_SHRINKS";

    /// The test runs itself in a process of its own, which must end.
    #[test]
    fn a_file_that_shrinks_is_named() {
        if let Some(path) = env::var_os(CHILD) {
            on_shrunk(|error| eprintln!("error: {error}")).unwrap();
            let file = fs::File::options().read(true).write(true).open(path).unwrap();
            // SAFETY: what is done to the file is what this is about.
            let map = unsafe { Mmap::map(&file) }.unwrap();
            assert_eq!(shrunk(), Vec::<PathBuf>::new());
            file.set_len(5000).unwrap();
            hint::black_box(map.iter().map(|&byte| u64::from(byte)).sum::<u64>());
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a file");
        fs::write(&path, vec![1; 20_000]).unwrap();
        let own = "files::shrunk::tests::a_file_that_shrinks_is_named";
        let mut child = Command::new(env::current_exe().unwrap());
        let output = child.args(["--exact", own, "--nocapture"]).env(CHILD, &path).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(message.contains(&format!("error: {}: became shorter", path.display())), "{message}");
        assert_eq!(output.status.code(), Some(2), "{message}");
    }
}
