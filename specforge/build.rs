//! Compiles the C++ shim and writes libtorch's folder into the run path of every binary of this crate.
//!
//! Link arguments of a dependency do not reach the final binary, so the run path is set here. With the feature `cuda`,
//! NCCL's process group becomes a shared library, which the program opens on machines that have libtorch's CUDA half.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

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

/// Links NCCL's process group into a library beside this build's other products. What it takes from libtorch and CUDA is
/// looked up when it is opened, so neither has to be here.
fn build_nccl(include: &Path) {
    let headers = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.headers/cuda");
    println!("cargo:rerun-if-changed={}", headers.join("nccl.h").display());
    assert!(
        headers.join("nccl.h").exists(),
        "the feature `cuda` needs NCCL's and CUDA's headers, and {} does not hold them: run scripts/setup --nccl",
        headers.display()
    );
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(1).warnings(false);
    build.include(&headers).include(include).include(include.join("torch/csrc/api/include"));
    // Only where NVIDIA's own headers of these names are missing: they come in packages of hundreds of MB.
    build.flag("-idirafter").flag("csrc/cuda_names");
    build.define("SPECFORGE_VERSION", concat!("\"", env!("CARGO_PKG_VERSION"), "\""));
    let objects = build.file("csrc/nccl.cpp").compile_intermediates();
    let folder = PathBuf::from(env::var_os("OUT_DIR").expect("cargo names the folder for products"));
    let library = folder.join("libspecforge_nccl.so");
    let mut link: Command = build.get_compiler().to_command();
    link.arg("-shared").args(objects).arg("-o").arg(&library);
    let status = link.status().expect("the compiler that made the objects also links");
    assert!(status.success(), "linking {} failed: {status}", library.display());
    println!("cargo:rustc-env=SPECFORGE_NCCL_LIBRARY={}", library.display());
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
    build(&["csrc/shim.cpp", "csrc/autograd.cpp", "csrc/attention.cpp", "csrc/streams.cpp"], 1)
        .compile("specforge_shim");
    // The distributed engine, whose declarations need Gloo's headers.
    let mut engine = cc::Build::new();
    engine.cpp(true).std("c++17").opt_level(1).warnings(false);
    engine.include(&include).include(include.join("torch/csrc/api/include")).include(gloo_headers());
    engine.file("csrc/c10d.cpp").compile("specforge_c10d");
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        build_nccl(&include);
    }
    // Kernels, which are nothing without their optimisation. Their threads are those of libtorch's own OpenMP library: a
    // second one would keep threads of its own, that wait by spinning.
    let files =
        ["few_queries", "few_rows", "crowd", "layer_parts", "vocabulary_loss"].map(|name| format!("csrc/{name}.cpp"));
    let mut kernels = build(&files.each_ref().map(String::as_str), 3);
    // Vectors are passed between functions of one file alone.
    kernels.flag_if_supported("-Wno-psabi");
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
