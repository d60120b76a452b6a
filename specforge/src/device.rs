//! Devices: opening libtorch's CUDA half at start, choosing one, and saying why CUDA cannot be used.
//!
//! The binary links libtorch_cpu alone. When libtorch_cuda lies beside it, it is opened with its symbols global, and
//! one binary serves machines with and without a GPU.

use std::env;
use std::ffi::{CStr, c_char};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use serde::Serialize;
use tch::{Cuda, Device, Kind, Tensor};

use crate::error::{Error, Result};

/// Whether CUDA can be used, or why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CudaState {
    /// This many devices.
    Usable(usize),
    /// One line for people.
    Unusable(String),
}

/// Opens libtorch_cuda once and reports what came of it.
///
/// libtorch decides for good whether it has CUDA when it is first asked, so nothing may ask before this: not tch's
/// `Cuda`, and not libtorch's description of its build.
pub fn cuda() -> &'static CudaState {
    static STATE: OnceLock<CudaState> = OnceLock::new();
    STATE.get_or_init(|| match cuda_library() {
        Ok(()) if Cuda::is_available() => CudaState::Usable(Cuda::device_count() as usize),
        // SAFETY: a question without arguments.
        Ok(()) if unsafe { torch_sys::at_context_has_cudart() } => {
            CudaState::Unusable("libtorch has CUDA, but the driver shows no device".to_owned())
        }
        Ok(()) => CudaState::Unusable("libtorch was asked for CUDA before its CUDA half was opened".to_owned()),
        Err(reason) => CudaState::Unusable(reason.to_owned()),
    })
}

/// Opens libtorch_cuda, which a machine without a GPU can do too, or says why that is not possible. From then on
/// libraries find its symbols.
pub fn cuda_library() -> Result<(), &'static str> {
    static OPENED: OnceLock<Result<(), String>> = OnceLock::new();
    OPENED.get_or_init(open_cuda).as_ref().copied().map_err(String::as_str)
}

fn open_cuda() -> Result<(), String> {
    let folder = libtorch_folder().ok_or("libtorch_cpu.so is not among the loaded libraries")?;
    let library = folder.join("libtorch_cuda.so");
    if !library.exists() {
        return Err(format!(
            "{} holds libtorch for CPU only; `scripts/setup --cuda` fetches the other",
            folder.display()
        ));
    }
    // SAFETY: libtorch's own library; its initialisers register the CUDA backend and nothing else.
    let opened = unsafe { Library::open(Some(&library), RTLD_NOW | RTLD_GLOBAL) };
    std::mem::forget(opened.map_err(loading_failure)?); // kept for the life of the process
    Ok(())
}

/// What the system said about a library that it could not open, or a symbol that it could not find.
pub(crate) fn loading_failure(error: libloading::Error) -> String {
    std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// The NCCL version that libtorch's process groups would use, or why there is none.
pub fn nccl() -> Result<String, String> {
    if let CudaState::Unusable(_) = cuda() {
        return Err("CUDA is not usable".to_owned());
    }
    // SAFETY: a C function that writes one int.
    unsafe {
        let library = Library::open(Some("libnccl.so.2"), RTLD_NOW).map_err(loading_failure)?;
        let version: libloading::os::unix::Symbol<unsafe extern "C" fn(*mut i32) -> i32> =
            library.get(b"ncclGetVersion").map_err(loading_failure)?;
        let mut number = 0;
        if version(&mut number) != 0 {
            return Err("ncclGetVersion failed".to_owned());
        }
        std::mem::forget(library);
        Ok(format!("{}.{}.{}", number / 10_000, number / 100 % 100, number % 100))
    }
}

/// What the driver says about a CUDA device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CudaDevice {
    /// Such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Memory in bytes.
    pub memory_bytes: usize,
    /// Streaming multiprocessors.
    pub multiprocessors: i32,
    /// Compute capability, such as `9.0`.
    pub capability: String,
    /// CUDA version of the driver, such as `13.0`.
    pub driver: String,
}

/// Asks the driver about a device; numbers are those of `--device cuda:N`.
pub fn describe(index: usize) -> Result<CudaDevice> {
    if !matches!(cuda(), CudaState::Usable(count) if index < *count) {
        return Err(Error::Failed(format!("there is no CUDA device {index}")));
    }
    ask_driver(index).map_err(|error| Error::Failed(format!("asking the driver about CUDA device {index}: {error}")))
}

/// `CUdevice_attribute` numbers of cuda.h.
const MULTIPROCESSOR_COUNT: i32 = 16;
const CAPABILITY_MAJOR: i32 = 75;
const CAPABILITY_MINOR: i32 = 76;

fn ask_driver(index: usize) -> Result<CudaDevice, String> {
    type Function<'a, F> = libloading::os::unix::Symbol<F>;
    let text = loading_failure;
    let answered = |name: &str, code: i32| if code == 0 { Ok(()) } else { Err(format!("{name} gave {code}")) };
    // SAFETY: signatures are those of cuda.h; every pointer is to a local that outlives its call, and the name's buffer
    // has the length that is passed.
    unsafe {
        let driver = Library::open(Some("libcuda.so.1"), RTLD_NOW).map_err(text)?;
        let get_device: Function<'_, unsafe extern "C" fn(*mut i32, i32) -> i32> =
            driver.get(b"cuDeviceGet").map_err(text)?;
        let get_name: Function<'_, unsafe extern "C" fn(*mut c_char, i32, i32) -> i32> =
            driver.get(b"cuDeviceGetName").map_err(text)?;
        let get_memory: Function<'_, unsafe extern "C" fn(*mut usize, i32) -> i32> =
            driver.get(b"cuDeviceTotalMem_v2").map_err(text)?;
        let get_attribute: Function<'_, unsafe extern "C" fn(*mut i32, i32, i32) -> i32> =
            driver.get(b"cuDeviceGetAttribute").map_err(text)?;
        let get_version: Function<'_, unsafe extern "C" fn(*mut i32) -> i32> =
            driver.get(b"cuDriverGetVersion").map_err(text)?;
        let start: Function<'_, unsafe extern "C" fn(u32) -> i32> = driver.get(b"cuInit").map_err(text)?;

        let (mut device, mut name, mut memory_bytes, mut version) = (0, [0u8; 256], 0usize, 0);
        answered("cuInit", start(0))?;
        answered("cuDeviceGet", get_device(&raw mut device, index as i32))?;
        answered("cuDeviceGetName", get_name(name.as_mut_ptr().cast::<c_char>(), name.len() as i32, device))?;
        answered("cuDeviceTotalMem", get_memory(&raw mut memory_bytes, device))?;
        answered("cuDriverGetVersion", get_version(&raw mut version))?;
        let attribute = |attribute: i32| {
            let mut value = 0;
            answered("cuDeviceGetAttribute", get_attribute(&raw mut value, attribute, device)).map(|()| value)
        };
        let (major, minor) = (attribute(CAPABILITY_MAJOR)?, attribute(CAPABILITY_MINOR)?);
        let multiprocessors = attribute(MULTIPROCESSOR_COUNT)?;
        let name = CStr::from_bytes_until_nul(&name).map(CStr::to_string_lossy).unwrap_or_default().into_owned();
        std::mem::forget(driver); // the program's own; libtorch holds it anyway
        Ok(CudaDevice {
            name,
            memory_bytes,
            multiprocessors,
            capability: format!("{major}.{minor}"),
            driver: format!("{}.{}", version / 1000, version % 1000 / 10),
        })
    }
}

/// Waits until a device has done everything that was asked of it. Nothing to wait for on the CPU.
pub fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

/// Where cuBLAS reads, once and when it starts, how much memory it works in.
const CUBLAS_WORKSPACE: &str = "CUBLAS_WORKSPACE_CONFIG";
/// The settings with which products that run at once never share that memory: the order of their sums is then fixed.
const REPEATABLE_WORKSPACES: [&str; 2] = [":4096:8", ":16:8"];

/// Lets cuBLAS compute the same bits every time, unless the environment has a setting of its own. To be called before
/// anything else that starts a thread, or opens CUDA.
pub fn prepare_determinism() {
    if env::var_os(CUBLAS_WORKSPACE).is_none() {
        // SAFETY: no thread runs yet but the one that waits for signals, which does not look at the environment.
        unsafe { env::set_var(CUBLAS_WORKSPACE, REPEATABLE_WORKSPACES[0]) };
    }
}

/// Refuses a setting of the environment with which cuBLAS may give other bits every time. [`prepare_determinism`] comes
/// first.
pub fn check_determinism(device: Device) -> Result<()> {
    let setting = env::var(CUBLAS_WORKSPACE).unwrap_or_default();
    if matches!(device, Device::Cuda(_)) && !REPEATABLE_WORKSPACES.contains(&setting.as_str()) {
        let [first, second] = REPEATABLE_WORKSPACES;
        return Err(Error::config(
            "train.deterministic",
            format!(
                "the environment has {CUBLAS_WORKSPACE}={setting}, with which cuBLAS does not repeat itself to the bit"
            ),
        )
        .with_hint(format!("set it to {first} or {second}, or not at all: {first} is used then")));
    }
    Ok(())
}

/// Numbers of the host as an int64 tensor on a device, without waiting for what the device is doing.
pub fn upload(values: &[i64], device: Device) -> Result<Tensor> {
    Ok(page_locked(&Tensor::from_slice(values), device).f_to_device_(device, Kind::Int64, true, false)?)
}

/// A tensor of the host on a device, without waiting for what the device is doing. Panics as tch's operators do.
pub fn send(host: &Tensor, device: Device) -> Tensor {
    page_locked(host, device).to_device_(device, host.kind(), true, false)
}

/// A tensor of one GPU on another, without waiting for either: the copy takes its turn on both. One that is there already
/// is itself. Panics as tch's operators do.
pub fn moved(tensor: &Tensor, device: Device) -> Tensor {
    tensor.to_device_(device, tensor.kind(), true, false)
}

/// A tensor of the host in memory that the system never moves, for copies to and from this device: a copy from ordinary
/// host memory waits for the device, one from page-locked memory takes its turn.
pub fn page_locked(host: &Tensor, device: Device) -> Tensor {
    if device == Device::Cpu || host.numel() == 0 {
        return host.shallow_clone();
    }
    // A machine that gives out no page-locked memory pays with the wait.
    host.f_internal_pin_memory(device).unwrap_or_else(|_| host.shallow_clone())
}

/// The folder libtorch_cpu.so was loaded from.
pub fn libtorch_folder() -> Option<PathBuf> {
    folder_of("/libtorch_cpu.so")
}

/// The folder that a library was loaded from, whose name with the slash before it begins like this.
pub(crate) fn folder_of(library: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let mut paths = maps.lines().filter_map(|line| line.split_whitespace().nth(5));
    let path = paths.find(|path| path.rfind('/').is_some_and(|at| path[at..].starts_with(library)))?;
    Path::new(path).parent().map(Path::to_path_buf)
}

/// What [`choose`] calls a device: `cpu` or `cuda:N`.
pub fn name(device: Device) -> String {
    match device {
        Device::Cuda(number) => format!("cuda:{number}"),
        _ => "cpu".to_owned(),
    }
}

/// The same for several, with commas between them.
pub fn names(devices: &[Device]) -> String {
    devices.iter().map(|&device| name(device)).collect::<Vec<_>>().join(",")
}

/// Turns `auto`, `cpu`, `cuda` or `cuda:N` into a device. `auto` is CUDA when usable, else the CPU.
pub fn choose(name: &str) -> Result<Device> {
    let number = match name {
        "cpu" => return Ok(Device::Cpu),
        "auto" => {
            return Ok(match cuda() {
                CudaState::Usable(_) => Device::Cuda(0),
                CudaState::Unusable(_) => Device::Cpu,
            });
        }
        "cuda" => Some(0),
        other => other.strip_prefix("cuda:").and_then(|number| number.parse().ok()),
    };
    let number: usize =
        number.ok_or_else(|| Error::Usage(format!("--device: expected auto, cpu, cuda or cuda:N, got `{name}`")))?;
    match cuda() {
        CudaState::Usable(count) if number < *count => Ok(Device::Cuda(number)),
        CudaState::Usable(count) => {
            Err(Error::Usage(format!("--device {name}: this machine has {count} CUDA devices, numbered from 0")))
        }
        CudaState::Unusable(reason) => Err(Error::Usage(format!("--device {name}: CUDA is not usable: {reason}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_device_is_not_described() {
        assert!(describe(1 << 20).is_err());
        if let CudaState::Usable(_) = cuda() {
            let device = describe(0).unwrap();
            assert!(device.memory_bytes > 1 << 30 && device.multiprocessors > 0 && !device.name.is_empty());
        }
    }

    #[test]
    fn a_library_that_does_not_open_is_named() {
        // SAFETY: there is no such library.
        let error = unsafe { Library::open(Some("libspecforge_absent.so"), RTLD_NOW) }.unwrap_err();
        assert!(loading_failure(error).contains("libspecforge_absent.so"));
    }

    #[test]
    fn uploaded_numbers_arrive() {
        let mut devices = vec![Device::Cpu];
        if let CudaState::Usable(_) = cuda() {
            devices.push(Device::Cuda(0));
        }
        for device in devices {
            let tensor = upload(&[3, -1, i64::MAX], device).unwrap();
            assert_eq!(Vec::<i64>::try_from(tensor).unwrap(), [3, -1, i64::MAX]);
            assert_eq!(upload(&[], device).unwrap().size(), [0]);
        }
    }

    #[test]
    fn device_names() {
        assert_eq!(choose("cpu").unwrap(), Device::Cpu);
        assert_eq!((name(Device::Cpu), name(Device::Cuda(3))), ("cpu".to_owned(), "cuda:3".to_owned()));
        for name in ["gpu", "cuda:x", "cuda:99", ""] {
            let error = choose(name).unwrap_err();
            assert!(error.to_string().starts_with("--device"), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }
}
