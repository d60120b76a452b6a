//! metrics.jsonl of a run that goes on, and its TensorBoard folder.
#![no_main]

use std::path::Path;

fn read() -> specforge::error::Result<()> {
    let scratch = Path::new(specforge_fuzz::SCRATCH);
    let _ = std::fs::create_dir_all(scratch);
    let _ = std::fs::copy("run/metrics.jsonl", scratch.join("metrics.jsonl"));
    let mut tracker = specforge::tracking::Tracker::open(scratch, Some(1))?;
    tracker.log(2, &[("train/loss".to_owned(), 1.0)])
}

specforge_fuzz::target!(&["run/metrics.jsonl"], read);
