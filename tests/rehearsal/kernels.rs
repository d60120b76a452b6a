//! The program's own kernels on the rehearsed device: what they read and write of a matrix over the vocabulary, beside what
//! libtorch's operators do for the same losses, and what happens where they cannot be had. That their numbers are right is
//! `gpu-check`'s to say, which runs here too.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use libloading::os::unix::{Library, Symbol};
use serde_json::{Value, json};
use specforge::draft::distillation::{
    DistillationLoss, DraftVocabulary, Objective, Order, Soft, Teacher, Weighting, distill,
};
use specforge::draft::loss::{Hard, Projection, Rows, Scale, cross_entropy};
use specforge::nn::Head;
use specforge::vocab::VocabMap;
use tch::{Device, Kind, Tensor};

use super::{near, on_device, rehearsed};
use crate::fixture::{Workspace, output_of, stderr_of};

/// Asks this process, started with the stand-in, to count.
const COUNTED: &str = "SPECFORGE_TEST_PASSES";

/// Draft rows `m`, and the sizes of a target's vocabulary and a draft's: no product of two of them is that of two others.
const POSITIONS: [i64; 14] = [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1];
const SIZE: i64 = 1531;
const OWN: i64 = 509;

/// Passes over a matrix of `[m, DV]`, and launches.
struct Passes {
    matrix: f64,
    launches: i64,
}

/// What was counted since the last time. Of operators, every tensor of that many numbers that one of them reads or writes;
/// of the program's kernels, every number of their first argument, which has as many.
fn counted(matrix: i64) -> Passes {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = std::ffi::CString::new(file.path().to_str().unwrap()).unwrap();
    // SAFETY: the stand-in's own function, which reads a text that ends with zero.
    unsafe {
        let report: Symbol<unsafe extern "C" fn(*const std::ffi::c_char)> =
            Library::this().get(b"rehearsal_report").unwrap();
        report(path.as_ptr());
    }
    let counts: Value = serde_json::from_str(&fs::read_to_string(file.path()).unwrap()).unwrap();
    let of = |key: &str| serde_json::from_value::<BTreeMap<String, i64>>(counts[key].clone()).unwrap();
    let touched = of("touched").into_iter().filter_map(|(key, count)| {
        let (name, which) = key.rsplit_once('|').unwrap();
        match (name.starts_with("aten::"), which.parse::<i64>().unwrap()) {
            (true, numbers) => (numbers == matrix).then_some(count as f64),
            (false, argument) => (argument == 0 && name != "teacher_rows").then_some(count as f64 / matrix as f64),
        }
    });
    Passes { matrix: touched.sum(), launches: of("kernels").values().sum() }
}

#[test]
fn losses_read_a_vocabulary_a_few_times() {
    if std::env::var_os(COUNTED).is_some() {
        return;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "rehearsal::kernels::passes_in_a_process_of_its_own", "--nocapture"]).env(COUNTED, "1");
    let Some(command) = rehearsed(&mut command) else { return };
    let output = output_of(command);
    print!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}", stderr_of(&output));
}

#[test]
fn passes_in_a_process_of_its_own() {
    if std::env::var_os(COUNTED).is_none() {
        return;
    }
    let device = Device::Cuda(0);
    assert!(matches!(specforge::device::cuda(), specforge::device::CudaState::Usable(1)));
    tch::manual_seed(2);
    let rows = POSITIONS.len() as i64;
    let random = |shape: &[i64], kind| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind).to_device(device);
    let map = VocabMap::new((0..OWN).map(|token| token * 3).collect(), SIZE).unwrap();
    let map = DraftVocabulary::new(&map, device).unwrap();
    let order = Order::new(&POSITIONS, device).unwrap();
    // Losses, with operators and with kernels: float64 is the operators'.
    let soft = |loss: DistillationLoss, kind: Kind, weighted: bool| {
        let states = random(&[2, 8], kind);
        let (target, own) = (Head::plain(random(&[SIZE, 8], kind)), Head::plain(random(&[OWN, 8], kind)));
        let input = random(&[rows, 8], kind);
        let teacher = Teacher { hidden: &states, head: &target, vocabulary: Some(&map) };
        let rows =
            Rows { input: &input, targets: Soft { order: &order, teacher: &teacher, remembered: None }, weights: None };
        let objective = Objective { loss, lambda: (1.0, 3.0), positions_per_chunk: 9 };
        let weighting = weighted.then_some(Weighting { parity: None, lift: 1.0 });
        counted(1);
        distill(rows, &mut Projection { head: &own, gradient: None }, objective, weighting.as_ref()).unwrap();
        counted(POSITIONS.len() as i64 * OWN)
    };
    let hard = |kind: Kind, weighted: bool| {
        let (own, input) = (Head::plain(random(&[OWN, 8], kind)), random(&[rows, 8], kind));
        let labels = Tensor::arange(rows, (Kind::Int64, Device::Cpu)).to_device(device);
        let rows = Rows { input: &input, targets: Hard(&labels), weights: None };
        let scale = weighted.then_some(Scale { factor: 1.0, lift: 1.0 });
        counted(1);
        cross_entropy(rows, &mut Projection { head: &own, gradient: None }, scale, 99).unwrap();
        counted(POSITIONS.len() as i64 * OWN)
    };
    println!("| loss | passes by operators | by kernels | launches by operators | by kernels |\n|---|---|---|---|---|");
    let compared = |name: &str, most: f64, run: &dyn Fn(Kind) -> Passes| {
        let [operators, kernels] = [run(Kind::Double), run(Kind::Float)];
        println!(
            "| {name} | {:.0} | {:.0} | {} | {} |",
            operators.matrix, kernels.matrix, operators.launches, kernels.launches
        );
        assert!(kernels.matrix <= most, "{name}: {} passes", kernels.matrix);
        assert!(kernels.launches < operators.launches && kernels.matrix < operators.matrix, "{name}");
    };
    compared("one label a row, values", 1.0, &|kind| hard(kind, false));
    compared("one label a row, gradients", 3.0, &|kind| hard(kind, true));
    compared("values of any distribution loss", 2.0, &|kind| soft(DistillationLoss::LkLambda, kind, false));
    for (loss, name, most) in [
        (DistillationLoss::CrossEntropy, "cross_entropy", 3.0),
        (DistillationLoss::Kl, "kl", 3.0),
        (DistillationLoss::ReverseKl, "reverse_kl", 4.0),
        (DistillationLoss::TotalVariation, "total_variation", 4.0),
        (DistillationLoss::LkAlpha, "lk_alpha", 4.0),
        (DistillationLoss::LkLambda, "lk_lambda", 4.0),
    ] {
        compared(&format!("{name}, gradients"), most, &|kind| soft(loss, kind, true));
    }
}

/// A compiler that refuses is said once, and the operators give the same numbers.
#[test]
fn without_kernels_operators_do_the_work() {
    let mut workspace = Workspace::new();
    workspace.configuration["draft"] =
        json!({"algorithm": "eagle3", "draft_vocab_size": 200, "ttt_steps": 3, "capture": [0, 1]});
    let run = |out: &str, refused: bool| {
        let mut command = workspace.train_command(out, &["--device", "cuda"]);
        if refused {
            command.env("REHEARSAL_REFUSES_KERNELS", "1");
        }
        on_device(&mut command, &workspace)
    };
    let Some((got, with)) = run("with", false) else { return };
    let (want, without) = run("without", true).unwrap();
    near(&got["end"], &want["end"], 1e-4, "with kernels and without");
    let launched = |counts: &super::Counts| counts.kernels.get("soft_rows").copied().unwrap_or(0);
    assert!(launched(&with) > 0 && launched(&without) == 0);
    assert!(with.launches() < without.launches());

    let mut command = workspace.train_command("said", &["--device", "cuda"]);
    command.env("REHEARSAL_REFUSES_KERNELS", "1");
    let output = output_of(rehearsed(&mut command).unwrap());
    let said = stderr_of(&output);
    assert!(output.status.success(), "{said}");
    assert_eq!(said.matches("the rehearsal refuses").count(), 1, "{said}");
    assert!(said.contains("losses take libtorch's operators"), "{said}");
}
