//! NCCL's process group: a shared library that is opened where libtorch has its CUDA half.
//!
//! The program links libtorch_cpu alone, and this library needs libtorch_cuda. It is built with the feature `cuda` and
//! looked for beside the program first, then where the build put it.

use std::env;
use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW, Symbol};

use super::c10d::{AddNccl, NcclBuild};
use crate::device::{self, loading_failure};
use crate::shim;

/// File name of the library.
pub const LIBRARY: &str = "libspecforge_nccl.so";

/// The opened library.
#[derive(Debug)]
pub(super) struct Nccl {
    pub(super) add: AddNccl,
    description: String,
}

/// Where NCCL's process group was found and what it was built for, or why it cannot be used. Says nothing about GPUs.
pub fn library() -> Result<&'static str, &'static str> {
    opened().map(|nccl| nccl.description.as_str())
}

/// Opens the library once.
pub(super) fn opened() -> Result<&'static Nccl, &'static str> {
    static OPENED: OnceLock<Result<Nccl, String>> = OnceLock::new();
    OPENED.get_or_init(|| open(&find()?)).as_ref().map_err(String::as_str)
}

fn find() -> Result<PathBuf, String> {
    let beside = env::current_exe().ok().and_then(|program| Some(program.parent()?.join(LIBRARY)));
    let built = option_env!("SPECFORGE_NCCL_LIBRARY").map(PathBuf::from);
    let Some(built) = built else {
        return beside.filter(|path| path.exists()).ok_or_else(|| {
            "the program was built without it; `scripts/setup --nccl` and `cargo build --features cuda` build it"
                .to_owned()
        });
    };
    let places: Vec<PathBuf> = beside.into_iter().chain([built]).collect();
    places.iter().find(|path| path.exists()).cloned().ok_or_else(|| {
        let places: Vec<String> = places.iter().map(|path| path.display().to_string()).collect();
        format!("neither {} exists; `cargo build --features cuda` makes it", places.join(" nor "))
    })
}

fn open(path: &Path) -> Result<Nccl, String> {
    device::cuda_library().map_err(str::to_owned)?;
    // SAFETY: our own library, without initialisers of its own; the signatures are those of csrc/nccl.cpp.
    unsafe {
        let library = Library::open(Some(path), RTLD_NOW | RTLD_LOCAL).map_err(loading_failure)?;
        let build: Symbol<NcclBuild> = library.get(b"specforge_nccl_build").map_err(loading_failure)?;
        let build = CStr::from_ptr(build()).to_string_lossy().into_owned();
        let wanted = format!("specforge {}, libtorch {}, ", env!("CARGO_PKG_VERSION"), shim::libtorch_version());
        if !build.starts_with(&wanted) {
            let path = path.display();
            return Err(format!(
                "{path} was built for {build}; expected {wanted}...: put the two of one build together"
            ));
        }
        let add = *library.get::<AddNccl>(b"specforge_group_add_nccl").map_err(loading_failure)?;
        std::mem::forget(library); // kept for the life of the process
        Ok(Nccl { add, description: format!("{} ({build})", path.display()) })
    }
}
