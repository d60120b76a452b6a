//! Writes libtorch's folder into the run path of the fuzz targets, as specforge's own build script does for its binary:
//! link arguments of a dependency do not reach the final binary.

use std::env;
use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // The tests' fixture, which is compiled into the library here, names cargo's variables of a test.
    println!("cargo:rustc-env=CARGO_TARGET_TMPDIR=/tmp");
    println!("cargo:rustc-env=CARGO_BIN_EXE_specforge=specforge");
    println!("cargo:rustc-env=CARGO_BIN_EXE_specforge-plugins=specforge-plugins");
    let libraries = env::var_os("DEP_TCH_LIBTORCH_LIB").expect("torch-sys names the folder of libtorch");
    let libraries = PathBuf::from(libraries);
    let is_openmp = |name: &std::ffi::OsString| name.to_string_lossy().starts_with("libgomp");
    let names = std::fs::read_dir(&libraries).into_iter().flatten().flatten().map(|entry| entry.file_name());
    if let Some(openmp) = names.into_iter().find(is_openmp) {
        println!("cargo:rustc-link-arg={}", libraries.join(openmp).display());
    }
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", libraries.display());
}
