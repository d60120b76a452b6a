//! Compiles the C++ shim and writes libtorch's folder into the run path of every binary of this crate.
//!
//! Link arguments of a dependency do not reach the final binary, so the run path is set here.

use std::env;
use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    let library_dir = PathBuf::from(
        env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys names the folder of libtorch it was built with"),
    );
    let include = library_dir.with_file_name("include");
    let compile = |files: &[&str], optimisation: u32, name: &str| {
        cc::Build::new()
            .cpp(true)
            .std("c++17")
            .opt_level(optimisation)
            .warnings(false)
            .include(&include)
            .include(include.join("torch/csrc/api/include"))
            .files(files)
            .compile(name);
    };
    // Calls into libtorch, which nothing makes faster here, and a kernel, which is nothing without its optimisation.
    compile(&["csrc/shim.cpp", "csrc/autograd.cpp"], 1, "specforge_shim");
    compile(&["csrc/few_rows.cpp"], 3, "specforge_kernels");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", library_dir.display());
}
