//! Kernels of our own on a CUDA device. Their source (`csrc/vocabulary_loss.cu`) is compiled when the first is wanted, for
//! the card that is there, and put into libtorch's queue of work.
//!
//! NVIDIA's run-time compiler and driver are opened by their names, as libtorch's CUDA half is: the one comes with it, the
//! other with the card. Building the program needs neither, and no header of CUDA. Where something is missing, whoever asks
//! for kernels gets none, the reason is said once, and libtorch's operators do the work.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::fs;
use std::path::PathBuf;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use tch::{Device, Kind, Tensor};

use crate::device::{self, CudaState, loading_failure};
use crate::error::{Error, Result};
use crate::progress;
use crate::streams::Stream;

/// Losses over a vocabulary, row by row.
pub const SOURCE: &str = include_str!("../csrc/vocabulary_loss.cu");
/// Threads of a block; `BLOCK` in the source.
const THREADS: c_uint = 512;
/// `CUdevice_attribute` numbers of cuda.h.
const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;

/// A kernel of [`SOURCE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kernel {
    /// Cross-entropy with one label a row.
    HardRows,
    /// What a target predicts at a position.
    TeacherRows,
    /// A loss against that.
    SoftRows,
}

impl Kernel {
    const ALL: [Self; 3] = [Self::HardRows, Self::TeacherRows, Self::SoftRows];

    /// What it is called in the source.
    fn name(self) -> &'static CStr {
        match self {
            Self::HardRows => c"hard_rows",
            Self::TeacherRows => c"teacher_rows",
            Self::SoftRows => c"soft_rows",
        }
    }
}

/// What a kernel is called with, in its order.
#[derive(Debug, Clone, Copy)]
pub enum Argument<'a> {
    /// Numbers of a type and so many, on the kernel's own device and contiguous.
    Numbers(&'a Tensor, Kind, i64),
    /// No numbers.
    Nothing,
    /// A size.
    Size(i64),
    /// One of several.
    Choice(i32),
    /// A float32 constant.
    Constant(f32),
}

// ---- the compiler ---------------------------------------------------------------------------------------------------

/// NVIDIA's run-time compiler. Needs no card.
pub struct Compiler {
    library: Library,
    place: String,
}

impl std::fmt::Debug for Compiler {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Compiler {{ place: {:?} }}", self.place)
    }
}

type Program = *mut c_void;
type SizeOf = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type TextOf = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

impl Compiler {
    /// Opens it: beside libtorch, where the system looks, or where libtorch's own library of that use finds it.
    pub fn open() -> Result<Self, String> {
        let names = ["libnvrtc.so.13", "libnvrtc.so.12"];
        let beside = device::libtorch_folder();
        let in_folder = |name: &str| beside.as_ref().map(|folder| folder.join(name)).filter(|path| path.exists());
        let mut places: Vec<PathBuf> = names.iter().filter_map(|name| in_folder(name)).collect();
        places.extend(names.map(PathBuf::from));
        places.extend(in_folder("libcaffe2_nvrtc.so"));
        let mut reason = String::new();
        for place in places {
            // SAFETY: NVIDIA's library, or libtorch's that links it: neither does anything when it is opened.
            let opened = unsafe { Library::open(Some(&place), RTLD_NOW | RTLD_LOCAL) };
            match opened {
                Ok(library) => {
                    open_builtins();
                    return Ok(Self { library, place: place.display().to_string() });
                }
                Err(error) if reason.is_empty() => reason = loading_failure(error),
                Err(_) => {}
            }
        }
        Err(format!("NVIDIA's run-time compiler does not open: {reason}"))
    }

    /// A function of the library.
    ///
    /// # Safety
    /// `F` has to be the function's type in nvrtc.h.
    unsafe fn function<F: Copy>(&self, name: &CStr) -> Result<F, String> {
        // SAFETY: the caller's promise.
        let found = unsafe { self.library.get::<F>(name.to_bytes_with_nul()) };
        found.map(|function| *function).map_err(loading_failure)
    }

    /// Newest architecture that it compiles for and a card of this capability (`90` for 9.0) runs, and whether it is the
    /// card's own.
    fn architecture(&self, capability: c_int) -> Result<(c_int, bool), String> {
        // SAFETY: signatures of nvrtc.h; the list is as long as the library says.
        let known = unsafe {
            let count: unsafe extern "C" fn(*mut c_int) -> c_int = self.function(c"nvrtcGetNumSupportedArchs")?;
            let list: unsafe extern "C" fn(*mut c_int) -> c_int = self.function(c"nvrtcGetSupportedArchs")?;
            let mut number = 0;
            answered("nvrtcGetNumSupportedArchs", count(&raw mut number))?;
            let mut known = vec![0; usize::try_from(number).unwrap_or(0)];
            answered("nvrtcGetSupportedArchs", list(known.as_mut_ptr()))?;
            known
        };
        let newest = known.iter().copied().filter(|&one| one <= capability).max();
        newest
            .map(|newest| (newest, newest == capability))
            .ok_or_else(|| format!("{} compiles for {known:?}, and the card is of capability {capability}", self.place))
    }

    /// Compiles [`SOURCE`] for cards of a capability: what a driver loads, and the architecture's name.
    pub fn compile(&self, capability: c_int) -> Result<(Vec<u8>, String), String> {
        let (architecture, own) = self.architecture(capability)?;
        // A program for the card itself runs with every driver of the compiler's generation; one that the driver finishes
        // runs on cards that the compiler does not know.
        let name = format!("{}_{architecture}", if own { "sm" } else { "compute" });
        let (source, option) = (c_string(SOURCE)?, c_string(&format!("--gpu-architecture={name}"))?);
        let options = [option.as_ptr(), c"--std=c++17".as_ptr()];
        // SAFETY: signatures of nvrtc.h; texts end with zero and outlive their calls, and buffers have the sizes that the
        // library asked for.
        unsafe {
            type Create = unsafe extern "C" fn(
                *mut Program,
                *const c_char,
                *const c_char,
                c_int,
                *const *const c_char,
                *const *const c_char,
            ) -> c_int;
            let create: Create = self.function(c"nvrtcCreateProgram")?;
            let compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int =
                self.function(c"nvrtcCompileProgram")?;
            let destroy: unsafe extern "C" fn(*mut Program) -> c_int = self.function(c"nvrtcDestroyProgram")?;
            let text = |size: &CStr, text: &CStr, program: Program| -> Result<Vec<u8>, String> {
                let (size_of, text_of): (SizeOf, TextOf) = (self.function(size)?, self.function(text)?);
                let mut bytes = 0;
                answered("nvrtc's size of a result", size_of(program, &raw mut bytes))?;
                let mut result = vec![0u8; bytes];
                answered("nvrtc's result", text_of(program, result.as_mut_ptr().cast()))?;
                Ok(result)
            };
            let mut program: Program = ptr::null_mut();
            let file = c"vocabulary_loss.cu";
            answered(
                "nvrtcCreateProgram",
                create(&raw mut program, source.as_ptr(), file.as_ptr(), 0, ptr::null(), ptr::null()),
            )?;
            let made = match compile(program, options.len() as c_int, options.as_ptr()) {
                0 if own => text(c"nvrtcGetCUBINSize", c"nvrtcGetCUBIN", program),
                0 => text(c"nvrtcGetPTXSize", c"nvrtcGetPTX", program),
                code => {
                    let log = text(c"nvrtcGetProgramLogSize", c"nvrtcGetProgramLog", program)?;
                    let log = String::from_utf8_lossy(&log);
                    Err(format!("nvrtcCompileProgram gave {code}: {}", log.trim_end_matches('\0').trim()))
                }
            };
            destroy(&raw mut program);
            Ok((made?, name))
        }
    }
}

/// Opens the library that the compiler's own functions are in, which lies beside it: it opens that by its bare name, and
/// finds it if it is there already. A compiler without it says so when it is used.
fn open_builtins() {
    let beside = device::folder_of("/libnvrtc.so");
    let entries = beside.and_then(|folder| fs::read_dir(folder).ok()).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("libnvrtc-builtins.so")) {
        // SAFETY: data of NVIDIA's compiler.
        let opened = unsafe { Library::open(Some(entry.path()), RTLD_NOW | RTLD_LOCAL) };
        if let Ok(library) = opened {
            std::mem::forget(library); // for the life of the process
        }
    }
}

fn c_string(text: &str) -> Result<CString, String> {
    CString::new(text).map_err(|error| error.to_string())
}

fn answered(name: &str, code: c_int) -> Result<(), String> {
    if code == 0 { Ok(()) } else { Err(format!("{name} gave {code}")) }
}

// ---- the driver -----------------------------------------------------------------------------------------------------

type Handle = *mut c_void;
type Launch = unsafe extern "C" fn(
    Handle,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    Handle,
    *mut *mut c_void,
    *mut *mut c_void,
) -> c_int;

/// The kernels on one device.
pub struct Kernels {
    device: Device,
    /// `sm_90`, or `compute_90` where the driver finishes it.
    architecture: String,
    context: Handle,
    functions: BTreeMap<Kernel, Handle>,
    push: unsafe extern "C" fn(Handle) -> c_int,
    pop: unsafe extern "C" fn(*mut Handle) -> c_int,
    launch: Launch,
}

// SAFETY: the driver's handles belong to no thread, and its functions may be called by all of them.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Kernels {{ device: {:?}, architecture: {:?} }}", self.device, self.architecture)
    }
}

/// The kernels of a device, compiled when they are first asked for. `None` on the CPU, and where there are none: the reason
/// is said once.
pub fn on(device: Device) -> Option<&'static Kernels> {
    state(device).ok()
}

/// What became of them: for which architecture they were compiled, or why there are none.
pub fn describe(device: Device) -> Result<String, String> {
    state(device).map(|kernels| format!("compiled for {}", kernels.architecture))
}

fn state(device: Device) -> Result<&'static Kernels, String> {
    static MADE: Mutex<BTreeMap<usize, Result<&'static Kernels, String>>> = Mutex::new(BTreeMap::new());
    let Device::Cuda(index) = device else { return Err("the CPU has none".to_owned()) };
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    let make = || {
        let kernels = Kernels::new(index).map(|kernels| &*Box::leak(Box::new(kernels))); // for the life of the process
        kernels.inspect_err(|reason| {
            progress::say(&format!("note: losses take libtorch's operators, which are slower: {reason}"));
        })
    };
    made.entry(index).or_insert_with(make).clone()
}

impl Kernels {
    fn new(index: usize) -> Result<Self, String> {
        if !matches!(device::cuda(), CudaState::Usable(count) if index < *count) {
            return Err(format!("there is no CUDA device {index}"));
        }
        let compiler = Compiler::open()?;
        // SAFETY: signatures are those of cuda.h; every pointer is to a local that outlives its call.
        unsafe {
            let driver = Library::open(Some("libcuda.so.1"), RTLD_NOW | RTLD_LOCAL).map_err(loading_failure)?;
            macro_rules! function {
                ($name:literal, $type:ty) => {
                    *driver.get::<$type>(concat!($name, "\0").as_bytes()).map_err(loading_failure)?
                };
            }
            let start = function!("cuInit", unsafe extern "C" fn(c_uint) -> c_int);
            let get_device = function!("cuDeviceGet", unsafe extern "C" fn(*mut c_int, c_int) -> c_int);
            let attribute = function!("cuDeviceGetAttribute", unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int);
            let retain = function!("cuDevicePrimaryCtxRetain", unsafe extern "C" fn(*mut Handle, c_int) -> c_int);
            let push = function!("cuCtxPushCurrent_v2", unsafe extern "C" fn(Handle) -> c_int);
            let pop = function!("cuCtxPopCurrent_v2", unsafe extern "C" fn(*mut Handle) -> c_int);
            let load = function!("cuModuleLoadData", unsafe extern "C" fn(*mut Handle, *const c_void) -> c_int);
            let find =
                function!("cuModuleGetFunction", unsafe extern "C" fn(*mut Handle, Handle, *const c_char) -> c_int);
            let launch = function!("cuLaunchKernel", Launch);

            let (mut number, mut major, mut minor) = (0, 0, 0);
            answered("cuInit", start(0))?;
            answered("cuDeviceGet", get_device(&raw mut number, index as c_int))?;
            answered("cuDeviceGetAttribute", attribute(&raw mut major, CAPABILITY_MAJOR, number))?;
            answered("cuDeviceGetAttribute", attribute(&raw mut minor, CAPABILITY_MINOR, number))?;
            let (program, architecture) = compiler.compile(10 * major + minor)?;
            // The context that libtorch works in. It is kept: libtorch keeps it too.
            let (mut context, mut module) = (ptr::null_mut(), ptr::null_mut());
            answered("cuDevicePrimaryCtxRetain", retain(&raw mut context, number))?;
            answered("cuCtxPushCurrent", push(context))?;
            let loaded = answered("cuModuleLoadData", load(&raw mut module, program.as_ptr().cast()));
            let functions = loaded.and_then(|()| {
                let found = Kernel::ALL.into_iter().map(|kernel| {
                    let mut function = ptr::null_mut();
                    answered("cuModuleGetFunction", find(&raw mut function, module, kernel.name().as_ptr()))?;
                    Ok((kernel, function))
                });
                found.collect::<Result<BTreeMap<_, _>, String>>()
            });
            answered("cuCtxPopCurrent", pop(&raw mut context))?;
            // The context that was popped is the one that was pushed.
            let functions = functions?;
            std::mem::forget(driver); // for the life of the process
            Ok(Self { device: Device::Cuda(index), architecture, context, functions, push, pop, launch })
        }
    }

    /// Asks for a kernel with a block for each of `rows`, behind what this thread asked of the device before. Nobody waits.
    pub fn launch(&self, kernel: Kernel, rows: i64, arguments: &[Argument<'_>]) -> Result<()> {
        let name = kernel.name().to_string_lossy();
        let wrong = |problem: String| Error::Failed(format!("kernel {name}: {problem}"));
        if rows == 0 {
            return Ok(());
        }
        let blocks = c_uint::try_from(rows).ok().filter(|&blocks| blocks <= c_uint::MAX / 2);
        let blocks = blocks.ok_or_else(|| wrong(format!("{rows} rows are more than a device takes")))?;
        let mut values = Vec::with_capacity(arguments.len());
        for (index, argument) in arguments.iter().enumerate() {
            values.push(match argument {
                Argument::Numbers(tensor, kind, count) => {
                    let sound = tensor.device() == self.device
                        && tensor.is_contiguous()
                        && tensor.kind() == *kind
                        && tensor.numel() as i64 == *count;
                    if !sound {
                        let (size, got, place) = (tensor.size(), tensor.kind(), tensor.device());
                        return Err(wrong(format!(
                            "argument {index}: expected {count} contiguous numbers of {kind:?} on {:?}, got {size:?} of \
                             {got:?} on {place:?}",
                            self.device
                        )));
                    }
                    tensor.data_ptr() as u64
                }
                Argument::Nothing => 0,
                Argument::Size(size) => *size as u64,
                // Read from the first bytes of the eight, which are the low ones.
                Argument::Choice(choice) => u64::from(choice.cast_unsigned()),
                Argument::Constant(constant) => u64::from(constant.to_bits()),
            });
        }
        let mut places: Vec<*mut c_void> = values.iter_mut().map(|value| ptr::from_mut(value).cast()).collect();
        let stream = Stream::current(self.device)?.map(Stream::handle).transpose()?.unwrap_or(ptr::null_mut());
        let answered = |call: &str, code| answered(call, code).map_err(wrong);
        // SAFETY: the arguments are those of the source's signature, in number, order and size, whose tensors live in the
        // device's memory and are as large as the kernel takes them for; the driver copies them before it returns.
        unsafe {
            answered("cuCtxPushCurrent", (self.push)(self.context))?;
            let function = self.functions.get(&kernel).copied().unwrap_or(ptr::null_mut());
            let none = ptr::null_mut();
            let code = (self.launch)(function, blocks, 1, 1, THREADS, 1, 1, 0, stream, places.as_mut_ptr(), none);
            let mut popped = ptr::null_mut();
            answered("cuCtxPopCurrent", (self.pop)(&raw mut popped))?;
            answered("cuLaunchKernel", code)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With NVIDIA's own compiler, which needs no card: what it says of a mistake is an error with its text, and our source
    /// has none, for the cards that train and for one that it does not know yet.
    #[test]
    fn the_source_compiles_for_real_cards() {
        let compiler = match Compiler::open() {
            Ok(compiler) => compiler,
            Err(reason) => {
                eprintln!("SKIPPED: {reason}");
                return;
            }
        };
        for (capability, want) in [(80, "sm_80"), (90, "sm_90"), (999, "compute_")] {
            let (program, architecture) = compiler.compile(capability).unwrap();
            assert!(architecture.starts_with(want), "{architecture}");
            let text = String::from_utf8_lossy(&program);
            for kernel in Kernel::ALL {
                assert!(text.contains(&*kernel.name().to_string_lossy()), "{kernel:?} for {architecture}");
            }
        }
        let error = compiler.compile(10).unwrap_err();
        assert!(error.contains("capability 10"), "{error}");
    }

    #[test]
    fn a_device_without_them_says_why() {
        assert!(on(Device::Cpu).is_none());
        assert!(describe(Device::Cpu).unwrap_err().contains("CPU"));
        assert!(describe(Device::Cuda(1 << 20)).unwrap_err().contains("no CUDA device"));
    }
}
