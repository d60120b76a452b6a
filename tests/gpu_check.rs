//! `specforge gpu-check` from outside: what it prints, what it writes, and that its checks ran.

use serde_json::Value;

use crate::fixture::{json_of, output_of, specforge, stderr_of};

#[test]
fn the_cpu_passes_against_itself_and_the_file_is_what_was_printed() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = folder.path().join("results/check.json");
    let arguments = ["gpu-check", "--quick", "--device", "cpu", "--json", "--out", file.to_str().unwrap()];
    let report = json_of(&mut specforge(&arguments));
    let written: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(report, written);

    assert_eq!((&report["device"], &report["card"], &report["quick"]), (&"cpu".into(), &Value::Null, &true.into()));
    assert_eq!(report["passed"], true);
    assert_eq!(report["versions"]["specforge"], env!("CARGO_PKG_VERSION"));
    assert!(report["date"].as_str().unwrap().ends_with('Z'));
    let parity = report["parity"].as_array().unwrap();
    for part in [
        "hidden states",
        "logits",
        "ragged cache",
        "attention, first step: output",
        "own keys: gradients",
        "EAGLE-3: loss",
        "EAGLE-3: gradients",
        "loss",
        "gradients",
        "AdamW",
        "NaN",
        "checkpoint",
        "sampling",
    ] {
        for kind in ["float32", "bfloat16"] {
            let ran = |row: &&Value| row["check"].as_str().unwrap().contains(part) && row["kind"] == kind;
            assert!(parity.iter().any(|row| ran(&row)), "{part} in {kind}");
        }
    }
    let kernels = report["kernels"]["checks"].as_array().unwrap();
    for loss in ["one label a row", "cross-entropy", "KL", "reverse KL", "total variation", "LK alpha", "LK lambda"] {
        for part in ["values", "gradients"] {
            let ran = |row: &&Value| {
                let check = row["check"].as_str().unwrap();
                check.starts_with(loss) && check.ends_with(part) && row["passed"] == true
            };
            assert!(kernels.iter().filter(ran).count() >= 3, "{loss}: {kernels:?}");
        }
    }
    let repeated = report["repeat"]["checks"].as_array().unwrap();
    for draft in ["own projections", "shared projection", "EAGLE-3"] {
        let ran = |row: &Value| row["check"] == format!("{draft}: training twice") && row["passed"] == true;
        assert_eq!(repeated.iter().filter(|row| ran(row)).count(), 2, "{draft}: {repeated:?}");
    }
    assert!(report["repeat"]["state"].as_str().unwrap().starts_with("cpu"));
    assert_eq!(report["process_group"]["backend"], "Gloo");
    let checks = report["process_group"]["checks"].as_array().unwrap();
    let parts = [
        "all-reduce",
        "broadcast",
        "all-gather",
        "reduce-scatter",
        "reducer",
        "barrier",
        "projections: training",
        "EAGLE-3: training",
    ];
    for part in parts {
        let ran = |row: &Value| row["check"].as_str().unwrap().contains(part) && row["passed"] == true;
        assert!(checks.iter().any(ran), "{part}: {checks:?}");
    }
    assert!(report["ceilings"]["bfloat16_rate"].as_f64().unwrap() > 0.0);
    let training = report["training"].as_array().unwrap();
    let names =
        ["medusa 5x1 own", "medusa 5x1 shared", "eagle3 3 recomputed", "eagle3 3 one graph", "peagle 4", "dflash"];
    assert_eq!(training.iter().map(|run| &run["name"]).collect::<Vec<_>>(), names);
    for run in training {
        assert!(run["result"]["tokens_per_second"].as_f64().unwrap() > 0.0, "{run}");
        assert_eq!(run["problem"], Value::Null);
    }
}

#[test]
fn a_card_that_is_not_there_is_a_usage_error() {
    let output = output_of(&mut specforge(&["gpu-check", "--quick", "--device", "cuda:99"]));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr_of(&output).contains("--device cuda:99"), "{output:?}");
}
