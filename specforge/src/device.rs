//! Devices: opening libtorch's CUDA half at start, choosing one, and saying why CUDA cannot be used.
//!
//! The binary links libtorch_cpu alone. When libtorch_cuda lies beside it, it is opened with its symbols global, and
//! one binary serves machines with and without a GPU.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tch::{Cuda, Device};

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
pub fn cuda() -> &'static CudaState {
    static STATE: OnceLock<CudaState> = OnceLock::new();
    STATE.get_or_init(|| match open_cuda() {
        Ok(()) if Cuda::is_available() => CudaState::Usable(Cuda::device_count() as usize),
        Ok(()) => CudaState::Unusable("libtorch has CUDA, but the driver shows no device".to_owned()),
        Err(reason) => CudaState::Unusable(reason),
    })
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
    std::mem::forget(opened.map_err(|error| error.to_string())?); // kept for the life of the process
    Ok(())
}

/// The NCCL version that libtorch's process groups would use, or why there is none.
pub fn nccl() -> Result<String, String> {
    if let CudaState::Unusable(_) = cuda() {
        return Err("CUDA is not usable".to_owned());
    }
    // SAFETY: a C function that writes one int.
    unsafe {
        let library = Library::open(Some("libnccl.so.2"), RTLD_NOW).map_err(|error| error.to_string())?;
        let version: libloading::os::unix::Symbol<unsafe extern "C" fn(*mut i32) -> i32> =
            library.get(b"ncclGetVersion").map_err(|error| error.to_string())?;
        let mut number = 0;
        if version(&mut number) != 0 {
            return Err("ncclGetVersion failed".to_owned());
        }
        std::mem::forget(library);
        Ok(format!("{}.{}.{}", number / 10_000, number / 100 % 100, number % 100))
    }
}

/// The folder libtorch_cpu.so was loaded from.
pub fn libtorch_folder() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let path = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .find(|path| path.ends_with("/libtorch_cpu.so"))?;
    Path::new(path).parent().map(Path::to_path_buf)
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
    fn device_names() {
        assert_eq!(choose("cpu").unwrap(), Device::Cpu);
        for name in ["gpu", "cuda:x", "cuda:99", ""] {
            let error = choose(name).unwrap_err();
            assert!(error.to_string().starts_with("--device"), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }
}
