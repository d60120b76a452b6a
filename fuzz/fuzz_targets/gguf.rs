//! A GGUF file: header, metadata, tokenizer, tensors.
#![no_main]

fn read() -> specforge::error::Result<()> {
    specforge_fuzz::specforge(&["import", "model.gguf", "--out", "scratch/imported", "--json"])
}

specforge_fuzz::target!(&["model.gguf", "model.whl"], || {
    specforge_fuzz::specforge(&["import", "model.whl", "--out", "scratch/wheel", "--json"]).and(read())
});
