//! A model folder: config.json, the index, the weights. What is read answers a prompt.
#![no_main]

fn read() -> specforge::error::Result<()> {
    let prompt = ["--prompt", "why", "--max-new-tokens", "2", "--device", "cpu"];
    specforge_fuzz::specforge(&[&["generate", "--json", "--target", "model"], &prompt[..]].concat())
}

specforge_fuzz::target!(&["model/config.json", "model/model.safetensors.index.json", "model/model.safetensors"], read);
