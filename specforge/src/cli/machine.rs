//! `specforge doctor` without a draft: what this machine can do.

use serde::Serialize;
use serde_json::json;

use super::Output;
use crate::checkpoint::Versions;
use crate::device::{self, CudaState};
use crate::dist::nccl;
use crate::error::Result;
use crate::hub;
use crate::shim;
use crate::threads;

#[derive(Serialize)]
struct Report {
    versions: Versions,
    libtorch_folder: String,
    blas: String,
    cpu_threads: i32,
    idle_threads: String,
    devices: Vec<String>,
    cuda: String,
    nccl: String,
    nccl_process_group: String,
    build: String,
    hub: String,
}

pub(super) fn run(output: &Output) -> Result<()> {
    let (cuda, mut devices) = match device::cuda() {
        CudaState::Usable(count) => {
            (format!("usable, {count} devices"), (0..*count).map(|n| format!("cuda:{n}")).collect())
        }
        CudaState::Unusable(reason) => (format!("not usable: {reason}"), Vec::new()),
    };
    let build = shim::libtorch_build(); // only after CUDA was opened: see `device::cuda`
    devices.insert(0, "cpu".to_owned());
    let report = Report {
        versions: Versions::current(),
        libtorch_folder: device::libtorch_folder()
            .map_or_else(|| "unknown".to_owned(), |path| path.display().to_string()),
        blas: blas(&build),
        cpu_threads: tch::get_num_threads(),
        idle_threads: threads::waiting(),
        devices,
        cuda,
        nccl: match device::nccl() {
            Ok(version) => format!("usable, {version}"),
            Err(reason) => format!("not usable: {reason}"),
        },
        nccl_process_group: match nccl::library() {
            Ok(library) => format!("opened, {library}"),
            Err(reason) => format!("not usable: {reason}"),
        },
        build,
        hub: hub::describe(),
    };
    output.result(&report, || {
        let versions = json!(report.versions);
        let text = |key: &str| versions[key].as_str().unwrap_or("unknown").to_owned();
        let rows = [
            ("specforge", text("specforge")),
            ("libtorch", format!("{} in {}", text("libtorch"), report.libtorch_folder)),
            ("devices", report.devices.join(", ")),
            ("threads", format!("{}, which {} when idle", report.cpu_threads, report.idle_threads)),
            ("blas", report.blas.clone()),
            ("cuda", report.cuda.clone()),
            ("nccl", report.nccl.clone()),
            ("nccl group", report.nccl_process_group.clone()),
            ("hub", report.hub.clone()),
        ];
        rows.map(|(name, value)| format!("{name:<10} {value}")).join("\n")
    });
    Ok(())
}

/// The line of libtorch's build settings that names its matrix library.
fn blas(build: &str) -> String {
    let line = build
        .lines()
        .map(|line| line.trim().trim_start_matches("- "))
        .find(|line| line.contains("Math Kernel Library"));
    let setting = || build.split(", ").find_map(|part| part.trim().strip_prefix("BLAS_INFO="));
    line.or_else(setting).unwrap_or("unknown").to_owned()
}
