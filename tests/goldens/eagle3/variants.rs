//! Cases that SpecForge has and the committed files do not, made from a file whose numbers are known: another width of
//! the target, explicit positions, YaRN, a blended loss, fewer rows and steps. Each says the same in another way, so the
//! same numbers must come out; and where it says something else, others must.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Value, json};
use specforge::weights::writer::write_tensors;
use tch::Tensor;

use super::{Case, Golden, METRICS, TOLERANCE, check, compare, json_of, specforge_case};

/// A golden file taken apart.
struct Parts {
    tensors: BTreeMap<String, Tensor>,
    metadata: BTreeMap<String, String>,
    folder: tempfile::TempDir,
}

impl Parts {
    fn new() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/goldens/eagle3_small_vocab.safetensors");
        let golden = Golden::open(path.as_ref()).unwrap();
        let tensors = golden.names_after("").map(|name| (name.to_owned(), golden.tensor(name).unwrap())).collect();
        let keys = ["config", "rope_parameters", "model_over", "loss_weights", "ttt_length"];
        let metadata = keys.iter().map(|key| ((*key).to_owned(), golden.text(key).unwrap().to_owned())).collect();
        Self { tensors, metadata, folder: tempfile::tempdir().unwrap() }
    }

    fn change(&mut self, name: &str, change: impl Fn(&Tensor) -> Tensor) {
        let changed = change(&self.tensors[name]);
        self.tensors.insert(name.to_owned(), changed);
    }

    fn set(&mut self, key: &str, value: &Value) -> &mut Self {
        self.metadata.insert(key.to_owned(), value.to_string());
        self
    }

    fn set_rope(&mut self, rope: &Value) -> &mut Self {
        let mut config: Value = serde_json::from_str(&self.metadata["config"]).unwrap();
        config["rope_scaling"] = rope.clone();
        self.set("config", &config).set("rope_parameters", rope)
    }

    /// The file of all parts.
    fn written(&self) -> PathBuf {
        let path = self.folder.path().join("eagle3_variant.safetensors");
        let tensors: Vec<(String, Tensor)> =
            self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        let metadata: Vec<(&str, String)> =
            self.metadata.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        write_tensors(&path, &tensors, &metadata).unwrap();
        path
    }

    fn check(&self) -> Result<String, String> {
        check(&self.written())
    }
}

#[test]
fn the_parts_are_the_file() {
    assert!(Parts::new().check().unwrap().contains("7 steps"));
}

/// A target wider than the draft, whose further dimensions are zeros. The draft has an embedding of its own then.
#[test]
fn a_target_of_another_width() {
    let mut parts = Parts::new();
    let wider = |tensor: &Tensor, chunks: i64| {
        let last = tensor.dim() as i64 - 1;
        let pieces: Vec<Tensor> =
            tensor.chunk(chunks, last).iter().map(|piece| piece.constant_pad_nd([0, 16])).collect();
        Tensor::cat(&pieces, last)
    };
    for name in ["in.hidden_state", "w.fc.weight", "grad.fc.weight"] {
        parts.change(name, |tensor| wider(tensor, 3));
    }
    for name in ["in.target", "w.target_head.fc.weight"] {
        parts.change(name, |tensor| wider(tensor, 1));
    }
    assert_eq!(parts.tensors["in.target"].size()[2], 80);
    parts.check().unwrap();
    let case = specforge_case(&Golden::open(&parts.written()).unwrap()).unwrap();
    assert_eq!(case.hidden[0].size()[1], 80);
}

/// Positions of every row or of one for all, and a common shift, which a rotary embedding does not notice; a restart in
/// the middle of a row is another matter.
#[test]
fn explicit_positions() {
    let mut parts = Parts::new();
    let tokens = parts.tensors["in.input_ids"].size()[1];
    let once: Vec<i64> = (0..tokens).collect();
    let shifted: Vec<i64> = (0..tokens).chain(7..7 + tokens).collect();
    for (positions, rows) in [(once, 1), (shifted, 2)] {
        let positions = Tensor::from_slice(&positions).view([rows, tokens]);
        parts.tensors.insert("in.position_ids".to_owned(), positions);
        parts.check().unwrap();
    }
    let restarted: Vec<i64> = (0..tokens).map(|token| token % 10).collect();
    parts.tensors.insert("in.position_ids".to_owned(), Tensor::from_slice(&restarted));
    assert!(parts.check().unwrap_err().contains("of step 0"));
    parts.tensors.insert("in.position_ids".to_owned(), Tensor::from_slice(&restarted[1..]));
    assert!(parts.check().unwrap_err().contains("in.position_ids"));
}

/// YaRN with a factor of 1 is no change, in either place and under either name.
#[test]
fn yarn() {
    let rope = |factor: f64, name: &str| {
        json!({
            name: "yarn", "factor": factor, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 0.0, "rope_theta": 10000.0,
        })
    };
    let mut parts = Parts::new();
    for name in ["type", "rope_type"] {
        parts.set_rope(&rope(1.0, name)).check().unwrap();
    }
    assert!(parts.set_rope(&rope(4.0, "rope_type")).check().unwrap_err().contains("of step 0"));
    parts = Parts::new();
    assert!(parts.set("rope_parameters", &rope(4.0, "rope_type")).check().is_err(), "it was not read");

    // The scales count as SpecForge has them, also where Hugging Face would leave them out.
    let scaled = |scale: f64, all: f64| {
        let mut rope = rope(4.0, "rope_type");
        (rope["mscale"], rope["mscale_all_dim"]) = (json!(scale), json!(all));
        super::name_yarn_factor(rope.as_object_mut().unwrap());
        rope["attention_factor"].as_f64().unwrap()
    };
    let grown = |scale: f64| 1.0 + 0.1 * scale * 4f64.ln();
    for (scale, all, want) in [(1.0, 0.0, grown(1.0)), (0.7, 0.0, grown(0.7)), (0.7, 0.5, grown(0.7) / grown(0.5))] {
        assert!((scaled(scale, all) - want).abs() < 1e-12);
    }
}

/// Without decay, the blend is all cross-entropy.
#[test]
fn a_blend_that_is_the_plain_loss() {
    let mut parts = Parts::new();
    parts.set("model_over", &json!({"lk_loss_type": "lambda", "kl_decay": 0.0})).check().unwrap();
    let decayed = json!({"lk_loss_type": "lambda", "kl_decay": 3.0});
    assert!(parts.set("model_over", &decayed).check().unwrap_err().starts_with("loss"));
}

/// The rows of a batch one by one, three steps of seven: their sums are the batch's.
#[test]
fn one_row_and_three_steps() {
    let sums = |case: &Case| case.accumulate().unwrap().0.sums;
    let parts = Parts::new();
    let whole = specforge_case(&Golden::open(&parts.written()).unwrap()).unwrap();
    let want = sums(&whole).narrow(0, 0, 3 * METRICS as i64);
    let alone: Tensor = (0..2)
        .map(|row| {
            let mut parts = Parts::new();
            let inputs: Vec<String> = parts.tensors.keys().filter(|name| name.starts_with("in.")).cloned().collect();
            inputs.iter().for_each(|name| parts.change(name, |tensor| tensor.narrow(0, row, 1)));
            parts.set("ttt_length", &json!(3)).set("loss_weights", &json!([1.0, 0.8, 0.64]));
            let golden = Golden::open(&parts.written()).unwrap();
            let case = specforge_case(&golden).unwrap();
            assert_eq!((case.rows, case.steps), (1, 3));
            assert_eq!(json_of(&golden, "loss_weights").unwrap().as_array().unwrap().len(), 3);
            sums(&case)
        })
        .sum();
    compare("sums of three steps", &alone, &want, TOLERANCE).unwrap();
}
