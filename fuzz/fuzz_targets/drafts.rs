//! Exported drafts of every layout: checked, and opened to decode with.
#![no_main]

use specforge_fuzz::specforge;

fn read() -> specforge::error::Result<()> {
    let mut outcome = Ok(());
    for draft in ["medusa", "medusa-vllm", "eagle3", "speculators", "pickled"] {
        outcome = outcome.and(specforge(&["export", "--json", "--check", draft]));
        let prompt = ["--draft", draft, "--prompt", "why", "--max-new-tokens", "2", "--device", "cpu"];
        outcome = outcome.and(specforge(&[&["generate", "--json", "--target", "model"], &prompt[..]].concat()));
    }
    outcome
}

specforge_fuzz::target!(
    &[
        "medusa/config.json",
        "medusa/medusa_lm_head.safetensors",
        "medusa-vllm/config.json",
        "medusa-vllm/model.safetensors",
        "eagle3/config.json",
        "eagle3/model.safetensors",
        "speculators/config.json",
        "speculators/model.safetensors",
        "pickled/config.json",
        "pickled/pytorch_model.bin",
    ],
    read
);
