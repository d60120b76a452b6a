//! Draft trees: a file of paths, and what `--tree` takes, for every kind of draft.
#![no_main]

fn read() -> specforge::error::Result<()> {
    let text = std::fs::read_to_string("tree.txt").unwrap_or_default();
    let mut outcome = Ok(());
    for (draft, tree) in [("medusa", "tree.json"), ("medusa", &*text), ("eagle3", &*text), ("prompt-lookup", &*text)] {
        let tree = ["--draft", draft, "--tree", tree, "--prompt", "why why why", "--max-new-tokens", "3"];
        let model = ["generate", "--json", "--target", "model", "--device", "cpu"];
        outcome = outcome.and(specforge_fuzz::specforge(&[&model[..], &tree].concat()));
    }
    outcome
}

specforge_fuzz::target!(&["tree.json", "tree.txt"], read);
