//! vLLM's own way to give hidden states: the method `extract_hidden_states` keeps the states of chosen layers beside the
//! tokens, and `ExampleHiddenStatesConnector` writes them to a file for each request (vLLM 0.32, `vllm/distributed/kv_transfer/
//! kv_connector/v1/example_hidden_states_connector.py`).
//!
//! The answer names the file. While the engine is writing, it holds a lock on `FILE.lock`. Both are removed once the states
//! are here: what is removed has been seen to be the answer to the question that was asked.
//!
//! Layer `k` of the server is what layer `k` reads, and the number of layers is the state before the final norm.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tch::Tensor;

use super::server::Server;
use crate::features::states_file::{self, StatesFile};
use crate::serving::{self, Trouble};

/// Longest answer: it repeats the prompt's ids.
const BYTES_A_TOKEN: u64 = 32;
const MOST_BYTES: u64 = 1 << 20;
/// Pauses between looks at a file that is being written.
const FIRST_LOOK: Duration = Duration::from_millis(1);
const LONGEST_LOOK: Duration = Duration::from_millis(50);

/// The states of one document, `[T, H]` for each layer of the server.
pub(super) fn states(server: &Server, ids: &[i64]) -> Result<Vec<Tensor>, Trouble> {
    const PATH: &str = "/v1/completions";
    let question = json!({
        "model": server.model, "prompt": ids, "max_tokens": 1, "temperature": 0, "return_token_ids": true,
    });
    let deadline = Instant::now() + server.timeout;
    let bytes = server.http.post(PATH, &question, MOST_BYTES + BYTES_A_TOKEN * ids.len() as u64)?;
    let answer = serving::json(PATH, &bytes)?;
    if let Some(read) = answer.pointer("/choices/0/prompt_token_ids").and_then(Value::as_array)
        && !read.iter().map(Value::as_i64).eq(ids.iter().copied().map(Some))
    {
        return Err(Trouble::Final(format!("read {} other tokens than the {} it was given", read.len(), ids.len())));
    }
    let named = answer.pointer("/kv_transfer_params/hidden_states_path").and_then(Value::as_str);
    let Some(named) = named else {
        return Err(Trouble::Final(
            "the answer names no hidden_states_path: start the server with --speculative-config and --kv-transfer-config as \
             docs/capture.md says"
                .to_owned(),
        ));
    };
    let path = here(server, Path::new(named))?;
    if path.parent().is_some_and(|folder| !folder.is_dir()) {
        let path = path.display();
        return Err(Trouble::Final(format!(
            "{path}: there is no such folder here: name where this machine sees the server's shared_storage_path \
             (--states-folder)"
        )));
    }
    wait_until_written(&path, deadline)?;
    let wrong = |problem: String| Trouble::answer(format!("{}: {problem}", path.display()));
    let file = StatesFile::open(&path).map_err(wrong)?;
    let written = file.ids().map_err(wrong)?;
    if written != ids {
        return Err(wrong(format!("holds {} tokens that are not the {} asked for", written.len(), ids.len())));
    }
    let states = file.states().map_err(wrong)?;
    let rows = states.first().map_or(0, |states| states.size()[0]);
    if rows != ids.len() as i64 || states.iter().any(|states| states.size()[1] != server.width) {
        let shape = [rows, states.len() as i64, states.first().map_or(0, |states| states.size()[1])];
        let want = format!("[{}, layers, {}]", ids.len(), server.width);
        return Err(wrong(format!("`hidden_states`: expected {want}, got {shape:?}")));
    }
    // It is ours and in memory. A file that stays is in nobody's way but the disk's.
    let _ = fs::remove_file(&path);
    let _ = fs::remove_file(lock_of(&path));
    Ok(states)
}

/// Where this machine sees a file of the server's.
fn here(server: &Server, named: &Path) -> Result<PathBuf, Trouble> {
    match (&server.states_folder, named.file_name()) {
        (Some(folder), Some(name)) => Ok(folder.join(name)),
        (None, Some(_)) => Ok(named.to_path_buf()),
        (_, None) => Err(Trouble::answer(format!("hidden_states_path `{}` names no file", named.display()))),
    }
}

fn lock_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    PathBuf::from(name)
}

/// Waits until the engine has let go of a file and the file is whole.
fn wait_until_written(path: &Path, deadline: Instant) -> Result<(), Trouble> {
    let lock = lock_of(path);
    let mut look = FIRST_LOOK;
    loop {
        let is_held = match File::open(&lock) {
            // A file system without locks says nothing, and then the length has to.
            Ok(file) => matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)),
            Err(_) => false,
        };
        if !is_held && states_file::is_whole(path) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let problem = match (path.exists(), is_held) {
                (true, true) => "is still being written",
                (true, false) => "is no whole safetensors file",
                (false, _) => "is not there: is its folder the server's shared_storage_path (--states-folder)?",
            };
            return Err(Trouble::answer(format!("{}: {problem}", path.display())));
        }
        std::thread::sleep(look);
        look = (look * 2).min(LONGEST_LOOK);
    }
}
