//! How threads that have nothing to do wait, so that a process beside another costs its share and no more.
//!
//! libtorch computes on libgomp's threads. Between two pieces of work they wait by spinning, for up to 300 000 rounds:
//! milliseconds in which a core that another process needs does nothing. Two trainings on one machine then took ten to
//! thirty times as long as one, where two are their share. So the program watches whether somebody wants its cores
//! (`neighbours`), and its threads spin only while nobody does.
//!
//! Where the kernel does not say who waits for cores, threads spin for `SPIN_COUNT` rounds and then sleep: enough for
//! the gap between most operators. libgomp reads that from its environment while it is loaded, so `main` comes too late,
//! and setting the variable for child processes alone would leave out the program itself. [`sleep_soon`] is called by the
//! loader before any library starts, and runs the same program once more with the variable set.
//!
//! Whoever sets `GOMP_SPINCOUNT` or `OMP_WAIT_POLICY` has decided: neither is done then.

use std::env;
use std::ffi::{CStr, c_char, c_int};
use std::ptr;

mod neighbours;

/// Rounds that an idle thread of libgomp spins before it sleeps, where nobody watches.
const SPIN_COUNT: &CStr = c"GOMP_SPINCOUNT=1000";

/// Variables that say how threads wait. Whoever sets one has decided.
const SETTINGS: [&str; 2] = ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"];

/// Where the kernel says how long this process waited for cores.
const WAITED: &CStr = c"/proc/self/schedstat";

/// Arguments after which nothing is computed: they are answered at once.
const ANSWERED_AT_ONCE: [&[u8]; 4] = [b"--help", b"-h", b"--version", b"-V"];

/// More variables than these are not copied; the threads then wait as libgomp likes it.
const MOST_VARIABLES: usize = 4096;
const LONGEST_PATH: usize = 4096;

/// `R_OK` of the C library.
const READABLE: c_int = 4;

unsafe extern "C" {
    fn specforge_compute_alone();
    fn access(path: *const c_char, mode: c_int) -> c_int;
    fn execve(path: *const c_char, arguments: *const *const c_char, variables: *const *const c_char) -> c_int;
    fn readlink(path: *const c_char, buffer: *mut c_char, size: usize) -> isize;
}

/// Where neighbours cannot be seen, starts the program again with `SPIN_COUNT` in its environment, unless that says
/// already how threads wait. Returns where nothing has to be done, or where it cannot be done: then everything works as
/// before, only not as fast beside others.
///
/// For the section `.preinit_array` of a program, whose functions run before the start of every library, the C
/// library's included: nothing here may allocate.
///
/// # Safety
/// Both pointers are arrays of C strings that end with a null pointer, as a loader passes them.
pub unsafe extern "C" fn sleep_soon(_count: c_int, arguments: *const *const c_char, environment: *const *const c_char) {
    // SAFETY: as this function's caller promises; the copies are as long as is checked, and end with null.
    unsafe {
        if are_neighbours_seen() {
            return;
        }
        if entries(arguments).skip(1).any(|argument| ANSWERED_AT_ONCE.contains(&argument.to_bytes())) {
            return;
        }
        let mut variables = [ptr::null(); MOST_VARIABLES + 2];
        let mut count = 0;
        for variable in entries(environment) {
            if SETTINGS.iter().any(|name| is_of(variable, name)) || count == MOST_VARIABLES {
                return;
            }
            variables[count] = variable.as_ptr();
            count += 1;
        }
        variables[count] = SPIN_COUNT.as_ptr();
        // The file's own name, so that the process is not called `exe` in lists of processes.
        let link = c"/proc/self/exe".as_ptr();
        let mut path = [0; LONGEST_PATH];
        if readlink(link, path.as_mut_ptr(), LONGEST_PATH - 1) > 0 {
            execve(path.as_ptr(), arguments, variables.as_ptr());
        }
        execve(link, arguments, variables.as_ptr());
    }
}

/// Lets threads sleep while somebody else wants their cores, for as long as the process lives.
pub fn watch_neighbours() {
    if is_watched() {
        neighbours::watch();
    }
}

/// What the calling thread computes from now on is computed by it alone, and not by threads of its own beside those of the
/// main thread: with more threads than there are processors, libgomp lets none of them spin.
pub fn compute_alone() {
    // The first question makes libtorch set this thread's number, and the next line the last word.
    tch::get_num_threads();
    // SAFETY: takes nothing and sets a number of the calling thread.
    unsafe { specforge_compute_alone() }
}

/// Whether threads wait as `neighbours` says.
fn is_watched() -> bool {
    SETTINGS.iter().all(|name| env::var_os(name).is_none()) && are_neighbours_seen()
}

fn are_neighbours_seen() -> bool {
    // SAFETY: a C string, of which the system reads a name.
    unsafe { access(WAITED.as_ptr(), READABLE) == 0 }
}

/// How idle threads wait, for people.
pub fn waiting() -> String {
    let value = |name: &str| env::var(name).ok();
    match (value("GOMP_SPINCOUNT"), value("OMP_WAIT_POLICY")) {
        (Some(rounds), _) => format!("sleep after {rounds} rounds of spinning (GOMP_SPINCOUNT)"),
        (None, Some(policy)) => format!("wait as OMP_WAIT_POLICY={policy} says"),
        (None, None) if is_watched() => {
            "spin while nobody else wants their cores, and sleep while somebody does".to_owned()
        }
        (None, None) => "spin for milliseconds: slow beside other work".to_owned(),
    }
}

/// Whether a `NAME=VALUE` of the environment is this variable's.
fn is_of(variable: &CStr, name: &str) -> bool {
    variable.to_bytes().strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&b'='))
}

/// The strings of an array that ends with null.
///
/// # Safety
/// It is such an array, and lives as long as what is returned.
unsafe fn entries<'a>(array: *const *const c_char) -> impl Iterator<Item = &'a CStr> {
    // SAFETY: as the caller promises: every step reads one entry, and none behind the null.
    let pointers = (0..).map(move |index| unsafe { *array.add(index) });
    pointers.take_while(|pointer| !pointer.is_null()).map(|pointer| unsafe { CStr::from_ptr(pointer) })
}
