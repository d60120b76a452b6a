//! The configuration of a run with what is set on the command line, as far as `--plan` looks.
#![no_main]

fn read() -> specforge::error::Result<()> {
    let sets = std::fs::read_to_string("sets.txt").unwrap_or_default();
    let sets = sets.lines().take(20).flat_map(|line| ["--set", line]);
    let arguments: Vec<&str> = ["train", "--plan", "--config", "run.json"].into_iter().chain(sets).collect();
    specforge_fuzz::specforge(&arguments)
}

specforge_fuzz::target!(&["run.json", "sets.txt"], read);
