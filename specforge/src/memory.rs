//! The memory of the process: every allocation, libtorch's included, is served by mimalloc.
//!
//! The C library gives a large piece back to the system the moment it is freed, and a training step takes and frees
//! dozens of them: a fifth of its time on a CPU went into pages that the kernel had to find and clear again. mimalloc
//! keeps what was freed for a while. Its functions replace `malloc` and its family for the whole process.

use libmimalloc_sys::{mi_option_set_default, mi_option_t};
use mimalloc::MiMalloc;

#[global_allocator]
static MEMORY: MiMalloc = MiMalloc;

/// Options of mimalloc 2's header (`mi_option_purge_delay`, `mi_option_arena_eager_commit`) that its crate does not name.
const PURGE_DELAY: mi_option_t = 15;
const ARENA_EAGER_COMMIT: mi_option_t = 4;

/// Milliseconds that freed memory is kept for the next step; the largest pieces stay ten times as long.
const KEPT_FOR: i64 = 1000;

/// Keeps freed memory long enough for a step to find what the one before it left, and takes none before it is needed:
/// otherwise loading a target peaks at 1.25 times its weights instead of 1.03. To be called before there are threads;
/// mimalloc's own environment variables win.
pub fn keep_freed() {
    // SAFETY: sets numbers that no other thread reads yet.
    unsafe {
        mi_option_set_default(PURGE_DELAY, KEPT_FOR);
        mi_option_set_default(ARENA_EAGER_COMMIT, 0);
    }
}

/// A large page of most processors.
#[cfg(target_os = "linux")]
const LARGE_PAGE: usize = 1 << 21;

/// Asks for large pages under a piece that is about to be written for the first time and read again and again, as weights are:
/// decoding reads all of them for every token, and finds them a tenth sooner where the processor has fewer pages to look up
/// (see `docs/decisions.md`). Neighbours on the same pages belong to the same process. A system that has none gives what it has.
pub fn prefer_large_pages(start: *const u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    if bytes >= LARGE_PAGE / 2 {
        let first = start.expose_provenance() / LARGE_PAGE * LARGE_PAGE;
        let behind = (start.addr() + bytes).next_multiple_of(LARGE_PAGE);
        let first = std::ptr::with_exposed_provenance_mut::<std::ffi::c_void>(first);
        // SAFETY: this advice changes the size of pages, never what they hold; it is refused where there are none.
        let _ = unsafe { rustix::mm::madvise(first, behind - first.addr(), rustix::mm::Advice::LinuxHugepage) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, bytes);
}

/// Bytes that the system could still give out: what is free or only holds copies of files, within the limit of the group
/// of processes that this one belongs to. Nothing where the system does not say.
pub fn available() -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(name).ok();
    let of_system = meminfo(&read("/proc/meminfo")?, "MemAvailable")?;
    let of_group = |name: &str| read(&format!("/sys/fs/cgroup/memory.{name}"));
    let group = of_group("max").zip(of_group("current")).zip(of_group("stat"));
    let left = group.and_then(|((most, taken), figures)| left_to_group(&most, &taken, &figures));
    Some(left.map_or(of_system, |left| left.min(of_system)))
}

/// What is left to a group of processes with a limit, by the files of its control group. Copies of files count as taken
/// there, though the system gives them up.
fn left_to_group(most: &str, taken: &str, figures: &str) -> Option<u64> {
    let most: u64 = most.trim().parse().ok()?; // `max` is no limit
    let taken: u64 = taken.trim().parse().ok()?;
    let figure = |name: &str| {
        let line = figures.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|number| number.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    let copies = figure("inactive_file").saturating_add(figure("active_file"));
    Some(most.saturating_sub(taken.saturating_sub(copies)))
}

/// A line of /proc/meminfo, in bytes.
fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use libmimalloc_sys::{mi_is_in_heap_region, mi_option_get};
    use tch::{Device, Kind, Tensor};

    use super::*;

    /// Numbers of libtorch's tensors lie in mimalloc's memory, and the options are those that are meant: their values
    /// before are the defaults of the header.
    #[test]
    fn libtorch_takes_its_memory_from_mimalloc() {
        let tensor = Tensor::zeros([1 << 20], (Kind::Float, Device::Cpu));
        let on_the_stack = 0u8;
        // SAFETY: asks whose memory an address is.
        let is_ours = |address| unsafe { mi_is_in_heap_region(address) };
        assert!(is_ours(tensor.data_ptr().cast_const()));
        assert!(!is_ours((&raw const on_the_stack).cast()));
        // SAFETY: reads numbers.
        let options = || unsafe { [mi_option_get(PURGE_DELAY), mi_option_get(ARENA_EAGER_COMMIT)] };
        assert_eq!(options(), [10, 2]);
        keep_freed();
        assert_eq!(options(), [KEPT_FOR, 0]);
    }

    /// The system notes the wish (`hg`), where it has large pages at all; the piece and what lies beside it are as before.
    #[test]
    fn large_pages_are_asked_for_and_change_no_numbers() {
        let numbers: Vec<u64> = (0..1 << 20).collect();
        let part = &numbers[1000..];
        prefer_large_pages(part.as_ptr().cast(), size_of_val(part));
        assert!(numbers.iter().zip(0..).all(|(&got, want)| got == want));
        if std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            let flags = flags_of(part.as_ptr().addr() + size_of_val(part) / 2);
            assert!(flags.as_deref().is_none_or(|flags| flags.contains(" hg")), "{flags:?}");
        }
    }

    /// What the kernel says of the mapping that an address lies in.
    fn flags_of(address: usize) -> Option<String> {
        let text = std::fs::read_to_string("/proc/self/smaps").ok()?;
        let holds = |line: &str| {
            let (first, behind) = line.split(' ').next()?.split_once('-')?;
            let [first, behind] = [first, behind].map(|number| usize::from_str_radix(number, 16).ok());
            Some((first?..behind?).contains(&address))
        };
        let mut lines = text.lines().skip_while(|line| !holds(line).unwrap_or(false));
        lines.find_map(|line| Some(line.strip_prefix("VmFlags:")?.to_owned()))
    }

    #[test]
    fn the_system_says_what_is_available() {
        let text = "MemTotal:       24689764 kB\nMemFree:         1 kB\nMemAvailable:   21031236 kB\n";
        assert_eq!(meminfo(text, "MemAvailable"), Some(21_031_236 * 1024));
        assert_eq!(meminfo(text, "Mem"), None);
        assert!(available().is_none_or(|bytes| bytes > 0));
        let figures = "anon 700\nfile 250\ninactive_file 200\nactive_file 50\n";
        assert_eq!(left_to_group("1000\n", "950\n", figures), Some(300));
        assert_eq!(left_to_group("max\n", "950\n", figures), None);
        assert_eq!(left_to_group("900\n", "950\n", ""), Some(0));
    }
}
