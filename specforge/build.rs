//! Compiles the C++ shim and writes libtorch's folder into the run path of every binary of this crate.
//!
//! Link arguments of a dependency do not reach the final binary, so the run path is set here.

use std::env;
use std::path::{Path, PathBuf};

/// The folder that holds `gloo/`: what `scripts/setup` unpacked, unless `GLOO_INCLUDE` names another or the system has
/// one.
fn gloo_headers() -> PathBuf {
    println!("cargo:rerun-if-env-changed=GLOO_INCLUDE");
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.headers");
    println!("cargo:rerun-if-changed={}", unpacked.join("gloo/config.h").display());
    let named = env::var_os("GLOO_INCLUDE").map(PathBuf::from);
    let places =
        named.into_iter().chain([unpacked, PathBuf::from("/usr/include"), PathBuf::from("/usr/local/include")]);
    let found = places.into_iter().find(|place| place.join("gloo/config.h").exists());
    found.expect("Gloo's headers are not there: run scripts/setup, or set GLOO_INCLUDE to the folder that holds gloo/")
}

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    let library_dir = PathBuf::from(
        env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys names the folder of libtorch it was built with"),
    );
    let include = library_dir.with_file_name("include");
    let build = |files: &[&str], optimisation: u32| {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(optimisation).warnings(false);
        build.include(&include).include(include.join("torch/csrc/api/include")).files(files);
        build
    };
    // Calls into libtorch, which nothing makes faster here.
    build(&["csrc/shim.cpp", "csrc/autograd.cpp"], 1).compile("specforge_shim");
    // The distributed engine, whose declarations need Gloo's headers.
    let mut engine = cc::Build::new();
    engine.cpp(true).std("c++17").opt_level(1).warnings(false);
    engine.include(&include).include(include.join("torch/csrc/api/include")).include(gloo_headers());
    engine.file("csrc/c10d.cpp").compile("specforge_c10d");
    // A kernel, which is nothing without its optimisation. Its threads are those of libtorch's own OpenMP library: a
    // second one would keep threads of its own, that wait by spinning.
    let mut kernels = build(&["csrc/few_rows.cpp"], 3);
    let is_openmp = |name: &std::ffi::OsString| name.to_string_lossy().starts_with("libgomp");
    let entries = std::fs::read_dir(&library_dir).into_iter().flatten().flatten();
    let openmp = entries.map(|entry| entry.file_name()).find(is_openmp).map(|name| library_dir.join(name));
    if let Some(openmp) = openmp.filter(|_| kernels.get_compiler().is_like_gnu()) {
        kernels.flag("-fopenmp");
        println!("cargo:rustc-link-arg={}", openmp.display());
    }
    kernels.compile("specforge_kernels");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", library_dir.display());
}
