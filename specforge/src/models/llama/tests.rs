//! What must hold of every forward pass, on a tiny random model: caches, batches, packs and trees change nothing.

use serde_json::Value;

use super::*;
use crate::models::LogitRows;
use crate::models::decoder::files;
use crate::models::decoder::names::HEAD;
use crate::nn::{AttentionMask, noise};
use crate::weights::WeightsFolder;
use tch::Tensor;

const VOCABULARY: i64 = 50;

fn config() -> LlamaConfig {
    let text = r#"{"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50, "max_position_embeddings": 64}"#;
    serde_json::from_str(text).unwrap()
}

fn target(kind: Kind) -> LlamaTarget {
    let mut stream = 0;
    let mut tensor = |name: &str, shape: &[i64]| {
        stream += 1;
        let norm = if name.contains("norm") { 1.0 } else { 0.0 };
        let deviation = if shape.len() == 1 { 0.1 } else { 1.0 / (shape[1] as f64).sqrt() };
        Ok((noise::normal(shape, deviation, 5, stream) + norm).to_kind(kind))
    };
    LlamaTarget::build(config(), &mut tensor).unwrap()
}

fn tokens(count: usize, seed: u64) -> Vec<i64> {
    let mut next = noise::keyed_stream(seed, 9);
    (0..count).map(|_| (next() % VOCABULARY as u64) as i64).collect()
}

/// Logits of every token, `[B, T, V]`, of rows that begin at these positions.
fn logits(
    target: &LlamaTarget,
    rows: &[&[i64]],
    starts: &[i64],
    mask: &AttentionMask,
    cache: Option<&mut KvCache>,
) -> Tensor {
    let (count, length) = (rows.len() as i64, rows[0].len() as i64);
    let ids = Tensor::from_slice(&rows.concat()).view([count, length]);
    let positions = Tensor::from_slice(starts).unsqueeze(1) + Tensor::arange(length, (Kind::Int64, Device::Cpu));
    let input = ForwardInput { ids: &ids, positions: &positions, mask, capture: &[], logits: LogitRows::All };
    target.forward(&input, cache).unwrap().logits.unwrap().view([count, length, VOCABULARY])
}

/// Logits of one row from position 0, `[T, V]`.
fn alone(target: &LlamaTarget, row: &[i64]) -> Tensor {
    logits(target, &[row], &[0], &AttentionMask::Causal, None).get(0)
}

/// A cache after a prefill of rows from position 0, of which `keep` tokens are kept.
fn prefilled(target: &LlamaTarget, rows: &[&[i64]], keep: &[i64], capacity: i64) -> KvCache {
    let mut cache = target.new_cache(rows.len() as i64, capacity);
    let _ = logits(target, rows, &vec![0; rows.len()], &AttentionMask::Causal, Some(&mut cache));
    cache.advance(keep);
    cache
}

#[track_caller]
fn assert_close(got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.size(), want.size());
    let difference = (got - want).abs().max().double_value(&[]);
    assert!(difference <= tolerance, "differs by {difference:e}"); // NaN fails as well
}

const TYPES: [(Kind, f64); 2] = [(Kind::Float, 1e-5), (Kind::Double, 1e-12)];

#[test]
fn cached_pieces_equal_the_whole() {
    for (kind, tolerance) in TYPES {
        let (target, ids) = (target(kind), tokens(12, 1));
        let want = alone(&target, &ids);
        for piece in [1, 3, 12] {
            let mut cache = target.new_cache(1, 2); // has to grow
            let pieces = ids.chunks(piece).map(|new| {
                let starts = [cache.len()];
                let got = logits(&target, &[new], &starts, &AttentionMask::Causal, Some(&mut cache));
                cache.advance(&[new.len() as i64]);
                got.get(0)
            });
            let pieces: Vec<Tensor> = pieces.collect();
            assert_close(&Tensor::cat(&pieces, 0), &want, tolerance);
        }
    }
}

/// Rows of different lengths, padded on the right for the prefill, then four tokens each.
#[test]
fn a_ragged_batch_equals_its_rows_alone() {
    for (kind, tolerance) in TYPES {
        let target = target(kind);
        let lengths = [7, 3, 5];
        let rows: Vec<Vec<i64>> = (0..3).map(|row| tokens(lengths[row] + 4, row as u64)).collect();
        let padded: Vec<Vec<i64>> =
            (0..3).map(|row| [&rows[row][..lengths[row]], &vec![0; 7 - lengths[row]]].concat()).collect();
        let padded: Vec<&[i64]> = padded.iter().map(Vec::as_slice).collect();
        let want: Vec<Tensor> = rows.iter().map(|row| alone(&target, row)).collect();

        let mut cache = target.new_cache(3, 16);
        let prefill = logits(&target, &padded, &[0; 3], &AttentionMask::Causal, Some(&mut cache));
        for (row, &length) in lengths.iter().enumerate() {
            let length = length as i64;
            assert_close(&prefill.get(row as i64).narrow(0, 0, length), &want[row].narrow(0, 0, length), tolerance);
        }
        cache.advance(&lengths.map(|length| length as i64));
        // One token, then three at once.
        for (from, count) in [(0, 1), (1, 3)] {
            let new: Vec<&[i64]> = (0..3).map(|row| &rows[row][lengths[row] + from..][..count]).collect();
            let starts = cache.lengths().to_vec();
            let got = logits(&target, &new, &starts, &AttentionMask::Causal, Some(&mut cache));
            for row in 0..3 {
                let want = want[row].narrow(0, starts[row], count as i64);
                assert_close(&got.get(row as i64), &want, tolerance);
            }
            cache.advance(&[count as i64; 3]);
        }
    }
}

/// Logits of documents in one pack, each from position 0.
fn packed(target: &LlamaTarget, documents: &[Vec<i64>]) -> Tensor {
    let ids = Tensor::from_slice(&documents.concat()).unsqueeze(0);
    let positions: Vec<i64> = documents.iter().flat_map(|document| 0..document.len() as i64).collect();
    let positions = Tensor::from_slice(&positions).unsqueeze(0);
    let mask = AttentionMask::Documents(documents.iter().map(|document| document.len() as i64).collect());
    let input = ForwardInput { ids: &ids, positions: &positions, mask: &mask, capture: &[], logits: LogitRows::All };
    target.forward(&input, None).unwrap().logits.unwrap()
}

#[test]
fn packed_documents_equal_the_documents_alone() {
    for (kind, tolerance) in TYPES {
        let target = target(kind);
        let documents = [tokens(5, 1), tokens(1, 2), tokens(8, 3)];
        let want: Vec<Tensor> = documents.iter().map(|document| alone(&target, document)).collect();
        assert_close(&packed(&target, &documents), &Tensor::cat(&want, 0), tolerance);
    }
}

#[test]
fn a_document_does_not_change_its_neighbours_by_a_bit() {
    let target = target(Kind::Float);
    let [first, second, third] = [tokens(5, 1), tokens(6, 2), tokens(4, 3)];
    let before = packed(&target, &[first.clone(), second, third.clone()]);
    let after = packed(&target, &[first, tokens(6, 99), third]);
    assert!(before.narrow(0, 0, 5).equal(&after.narrow(0, 0, 5)));
    assert!(!before.narrow(0, 5, 6).equal(&after.narrow(0, 5, 6)));
    assert!(before.narrow(0, 11, 4).equal(&after.narrow(0, 11, 4)));
}

#[test]
fn after_truncation_a_pass_equals_one_on_a_fresh_cache() {
    let (target, ids) = (target(Kind::Float), tokens(7, 1));
    let causal = AttentionMask::Causal;
    let start = || prefilled(&target, &[&ids[..5]], &[5], 16);
    let want = logits(&target, &[&ids[5..]], &[5], &causal, Some(&mut start()));
    let mut cache = start();
    let _ = logits(&target, &[&tokens(6, 77)], &[5], &causal, Some(&mut cache));
    cache.advance(&[6]);
    cache.truncate(&[5]);
    assert!(logits(&target, &[&ids[5..]], &[5], &causal, Some(&mut cache)).equal(&want));
}

/// A mask multiplies hidden values with zero, and zero times NaN is NaN.
#[test]
fn nan_behind_a_row_never_leaks() {
    let target = target(Kind::Float);
    let (long, short) = (tokens(9, 1), tokens(9, 2));
    let poison = |cache: &mut KvCache| {
        for layer in 0..3 {
            let nan = Tensor::full([2, 2, 5, 8], f64::NAN, (Kind::Float, Device::Cpu));
            let _ = cache.write(layer, &nan, &nan);
        }
    };
    let start = || prefilled(&target, &[&long[..6], &short[..6]], &[6, 2], 32);
    let finish = |mut cache: KvCache| {
        let starts = cache.lengths().to_vec();
        assert_eq!(starts, [6, 2]);
        logits(&target, &[&long[6..8], &short[2..4]], &starts, &AttentionMask::Causal, Some(&mut cache))
    };
    let want = finish(start());
    assert!(want.isfinite().all().int64_value(&[]) == 1);

    let mut never_kept = start();
    poison(&mut never_kept);
    let mut kept_and_truncated = start();
    poison(&mut kept_and_truncated);
    kept_and_truncated.advance(&[5, 3]);
    kept_and_truncated.truncate(&[6, 2]);
    let mut kept_in_part = start();
    poison(&mut kept_in_part);
    kept_in_part.advance(&[0, 0]);
    let mut written_and_truncated = start();
    poison(&mut written_and_truncated);
    written_and_truncated.truncate(&[6, 2]);
    let mut grown = start();
    poison(&mut grown);
    grown.append_rows(target.new_cache(1, 100));
    grown.select_rows(&[0, 1]);
    for cache in [never_kept, kept_and_truncated, kept_in_part, written_and_truncated, grown] {
        assert!(finish(cache).equal(&want));
    }
}

#[test]
fn rows_can_leave_and_join_a_batch() {
    let target = target(Kind::Double);
    let rows: Vec<Vec<i64>> = (0..4).map(|row| tokens(8, row)).collect();
    let want: Vec<Tensor> = rows.iter().map(|row| alone(&target, row)).collect();
    let prefix: Vec<&[i64]> = rows[..3].iter().map(|row| &row[..6]).collect();
    let mut cache = prefilled(&target, &prefix, &[6, 4, 5], 4);
    cache.select_rows(&[2, 0]);
    cache.append_rows(prefilled(&target, &[&rows[3][..3]], &[3], 90));
    assert_eq!((cache.lengths(), cache.rows(), cache.len()), ([5, 6, 3].as_slice(), 3, 6));
    let new = [&rows[2][5..7], &rows[0][6..8], &rows[3][3..5]];
    let got = logits(&target, &new, &[5, 6, 3], &AttentionMask::Causal, Some(&mut cache));
    for (index, (row, from)) in [(2, 5), (0, 6), (3, 3)].into_iter().enumerate() {
        assert_close(&got.get(index as i64), &want[row as usize].narrow(0, from, 2), 1e-12);
    }
}

/// A tree `a -> (b -> d, c)` behind a cached prefix: each node equals the end of its own path.
#[test]
fn tree_nodes_equal_their_paths() {
    let (target, prefix) = (target(Kind::Double), tokens(5, 1));
    let nodes = [11, 12, 13, 14];
    let parents = [None, Some(0), Some(0), Some(1)];
    let mut cache = prefilled(&target, &[&prefix], &[5], 16);
    let path = |node: usize| std::iter::successors(Some(node), |&node| parents[node]).collect::<Vec<_>>();
    let mut visible = vec![false; 4 * 9];
    for node in 0..4 {
        (0..5).chain(path(node).iter().map(|ancestor| 5 + ancestor)).for_each(|slot| visible[node * 9 + slot] = true);
    }
    let mask = AttentionMask::Visible(Tensor::from_slice(&visible).view([1, 4, 9]));
    let positions: Vec<i64> = (0..4).map(|node| 4 + path(node).len() as i64).collect();
    let input = ForwardInput {
        ids: &Tensor::from_slice(&nodes).unsqueeze(0),
        positions: &Tensor::from_slice(&positions).unsqueeze(0),
        mask: &mask,
        capture: &[],
        logits: LogitRows::All,
    };
    let got = target.forward(&input, Some(&mut cache)).unwrap().logits.unwrap();
    for node in 0..4 {
        let mut line = prefix.clone();
        line.extend(path(node).iter().rev().map(|&ancestor| nodes[ancestor]));
        assert_close(&got.get(node as i64), &alone(&target, &line).get(-1), 1e-12);
    }
}

#[test]
fn states_and_logits_come_as_asked_for() {
    let target = target(Kind::Float);
    let ids = Tensor::from_slice(&tokens(8, 1)).view([2, 4]);
    let positions = Tensor::arange(4, (Kind::Int64, Device::Cpu)).expand([2, 4], false);
    let chosen = Tensor::from_slice(&[6i64, 1, 6]);
    let run = |capture: &[usize], logits| {
        let input = ForwardInput { ids: &ids, positions: &positions, mask: &AttentionMask::Causal, capture, logits };
        target.forward(&input, None).unwrap()
    };
    let all = run(&[0, 1, 2, 3], LogitRows::All);
    let want = all.logits.unwrap();
    assert_eq!(want.size(), [8, VOCABULARY]);
    assert!(all.hidden[0].equal(&target.embedding().look_up(&ids).unwrap()));
    assert_close(&target.head().logits(&all.hidden[3].view([8, -1])), &want, 1e-6);

    for capture in [[3, 0, 1].as_slice(), &[2, 1, 2], &[]] {
        let some = run(capture, LogitRows::Rows(&chosen));
        assert_close(&some.logits.unwrap(), &want.index_select(0, &chosen), 1e-6);
        assert_eq!(some.hidden.len(), capture.len());
        for (&index, hidden) in capture.iter().zip(&some.hidden) {
            assert!(hidden.equal(&all.hidden[index]), "hidden state {index}");
        }
        assert!(run(capture, LogitRows::None).logits.is_none());
    }
}

#[test]
fn wrong_inputs_are_errors() {
    let target = target(Kind::Float);
    let ids = Tensor::from_slice(&tokens(6, 1)).view([1, 6]);
    let positions = Tensor::arange(6, (Kind::Int64, Device::Cpu)).view([1, 6]);
    let causal = AttentionMask::Causal;
    let fail = |ids: &Tensor, positions: &Tensor, mask: &AttentionMask, capture: &[usize], rows: i64| {
        let input = ForwardInput { ids, positions, mask, capture, logits: LogitRows::None };
        target.forward(&input, Some(&mut target.new_cache(rows, 8))).unwrap_err().to_string()
    };
    assert!(fail(&ids, &positions, &causal, &[4], 1).contains("hidden state 4 was asked for; this model has 0 to 3"));
    assert!(fail(&ids, &positions.narrow(1, 0, 5), &causal, &[], 1).contains("positions"));
    assert!(fail(&ids, &positions, &causal, &[], 2).contains("2 rows"));
    assert!(fail(&ids, &positions, &AttentionMask::Documents(vec![2, 3]), &[], 1).contains("5 tokens"));
    assert!(fail(&(&ids + VOCABULARY), &positions, &causal, &[], 1).contains("libtorch"));
}

#[test]
fn configurations_that_cannot_be_run_are_named() {
    let check = |key: &str, value: Value| {
        let mut config = serde_json::to_value(config()).unwrap();
        config[key] = value;
        serde_json::from_value::<LlamaConfig>(config).unwrap().check().unwrap_err()
    };
    for (key, value) in [
        ("hidden_size", 0.into()),
        ("num_attention_heads", 0.into()),
        ("num_key_value_heads", 0.into()),
        ("num_key_value_heads", 4.into()),
        ("head_dim", 7.into()),
        ("head_dim", (-2).into()),
        ("num_hidden_layers", u64::MAX.into()),
        ("vocab_size", i64::MAX.into()),
        ("vocab_size", i64::from(i32::MAX).into()),
        ("max_position_embeddings", i64::MAX.into()),
        ("rms_norm_eps", (-1e-5).into()),
        ("rms_norm_eps", 1e308.into()),
        ("rope_theta", 0.into()),
        ("hidden_act", "gelu".into()),
    ] {
        let problem = check(key, value);
        assert!(problem.contains(&format!("`{key}`")), "{problem}");
    }
    for (scaling, word) in [
        (r#"{"rope_type": "longrope"}"#, "longrope"),
        (r#"{"rope_type": "linear"}"#, "factor"),
        (r#"{"rope_type": "dynamic", "factor": 0}"#, "factor"),
        (r#"{"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}"#, "low_freq_factor"),
        (r#"{"rope_type": "default", "partial_rotary_factor": 0.5}"#, "partial_rotary_factor"),
        (r#"{"rope_type": "yarn", "factor": 2.0, "attention_factor": 1e308}"#, "no finite frequencies"),
        (
            r#"{"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": -3}"#,
            "original_max_position_embeddings",
        ),
    ] {
        for key in ["rope_scaling", "rope_parameters"] {
            let problem = check(key, serde_json::from_str(scaling).unwrap());
            assert!(problem.contains(word), "{problem}");
        }
    }
}

/// Files may hold a tied head and old rotary buffers; anything else must fit, and is listed where it does not.
#[test]
fn weights_of_a_folder_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    type Tensors = Vec<(String, Tensor)>;
    let open = |tied: bool, change: &dyn Fn(&mut Tensors)| {
        let config = LlamaConfig { tie_word_embeddings: tied, ..config() };
        let filled = |(name, shape): (String, Vec<i64>)| (name, Tensor::ones(shape, (Kind::Float, Device::Cpu)));
        let mut tensors: Tensors = config.tensors().into_iter().map(filled).collect();
        change(&mut tensors);
        crate::weights::write_tensors(&folder.path().join("model.safetensors"), &tensors, &[]).unwrap();
        let mut json = serde_json::to_value(&config).unwrap();
        json["model_type"] = "llama".into();
        std::fs::write(folder.path().join("config.json"), json.to_string()).unwrap();
        super::super::load_target(folder.path(), Kind::Float, Device::Cpu)
            .map(|_| ())
            .map_err(|error| error.to_string())
    };
    let ones = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
    open(false, &|_| {}).unwrap();
    open(true, &|tensors| {
        tensors.push(("lm_head.weight".to_owned(), ones(&[50, 24])));
        tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), ones(&[4])));
    })
    .unwrap();
    let problem = open(false, &|tensors| {
        tensors.retain(|(name, _)| name != "lm_head.weight" && name != "model.layers.1.mlp.up_proj.weight");
        tensors.push(("model.layers.0.mlp.up_proj.bias".to_owned(), ones(&[40])));
        tensors[0].1 = ones(&[51, 24]);
    })
    .unwrap_err();
    for line in [
        "missing (2):\n    model.layers.1.mlp.up_proj.weight [40, 24]\n    lm_head.weight [50, 24]",
        "surplus (1):\n    model.layers.0.mlp.up_proj.bias [40]",
        "wrong shape (1):\n    model.embed_tokens.weight: expected [50, 24], got [51, 24]",
    ] {
        assert!(problem.contains(line), "{problem}");
    }
}

type NamedTensors = Vec<(String, Tensor)>;

/// A folder of the small configuration with these tensors, opened as the loaders do it: whether the head is the embedding,
/// and what is to be said.
fn fitted(tied: bool, change: &dyn Fn(&mut NamedTensors)) -> Result<(bool, Vec<String>)> {
    let folder = tempfile::tempdir().unwrap();
    let config = LlamaConfig { tie_word_embeddings: tied, ..config() };
    let filled =
        |(stream, (name, shape)): (usize, (String, Vec<i64>))| (name, noise::normal(&shape, 1.0, 3, stream as u64));
    let mut tensors: Vec<(String, Tensor)> = config.tensors().into_iter().enumerate().map(filled).collect();
    change(&mut tensors);
    crate::weights::write_tensors(&folder.path().join("model.safetensors"), &tensors, &[]).unwrap();
    let weights = WeightsFolder::open(folder.path())?;
    let design = config.design().map_err(Error::Failed)?;
    files::check(&design, &weights)?;
    let (tied, warnings) = files::fit(&design, &weights)?;
    let config = LlamaConfig { tie_word_embeddings: tied, ..config };
    let built = LlamaTarget::build(config.clone(), &mut |name, _| weights.load(name, Kind::Float, Device::Cpu))?;
    let is_embedding = built.head().weight.equal(&built.embedding().table);
    assert_eq!(config.tie_word_embeddings, is_embedding);
    Ok((is_embedding, warnings))
}

/// What a file holds counts, not what config.json says of it, and not a name.
#[test]
fn a_head_that_is_not_the_embedding_is_used_and_said() {
    let with_head = |value: Tensor| {
        move |tensors: &mut Vec<(String, Tensor)>| tensors.push((HEAD.to_owned(), value.shallow_clone()))
    };
    assert_eq!(fitted(true, &|_| {}).unwrap(), (true, Vec::new()));
    // An equal head, also in another element type, is none.
    let equal = |tensors: &mut Vec<(String, Tensor)>| tensors.push((HEAD.to_owned(), tensors[0].1.copy()));
    assert_eq!(fitted(true, &equal).unwrap(), (true, Vec::new()));
    let wider =
        |tensors: &mut Vec<(String, Tensor)>| tensors.push((HEAD.to_owned(), tensors[0].1.to_kind(Kind::Double)));
    assert_eq!(fitted(true, &wider).unwrap(), (true, Vec::new()));
    // One number is enough.
    let other = |tensors: &mut Vec<(String, Tensor)>| {
        let head = tensors[0].1.copy();
        let _ = head.get(49).get(23).fill_(7.0);
        tensors.push((HEAD.to_owned(), head));
    };
    let (tied, warnings) = fitted(true, &other).unwrap();
    assert!(!tied && warnings.len() == 1, "{warnings:?}");
    assert!(
        warnings[0]
            .contains("config.json says that the head is the embedding, but `lm_head.weight` holds other numbers")
    );
    // And it must be a head of this model.
    let short = fitted(true, &with_head(Tensor::ones([49, 24], (Kind::Float, Device::Cpu)))).unwrap_err().to_string();
    assert!(short.contains("lm_head.weight: expected [50, 24], got [49, 24]"), "{short}");
    let codes = fitted(true, &with_head(Tensor::ones([50, 24], (Kind::Int8, Device::Cpu)))).unwrap_err().to_string();
    assert!(codes.contains("`lm_head.weight`: expected floating-point numbers, got Int8"), "{codes}");
}

#[test]
fn rotary_buffers_are_compared_with_the_configuration() {
    let name = "model.layers.0.self_attn.rotary_emb.inv_freq";
    let with = |value: Tensor| {
        move |tensors: &mut Vec<(String, Tensor)>| tensors.push((name.to_owned(), value.shallow_clone()))
    };
    let right = config().rope().unwrap().frequencies();
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
        assert_eq!(fitted(false, &with(right.to_kind(kind))).unwrap().1, Vec::<String>::new(), "{kind:?}");
    }
    for wrong in [&right * 1.5, right.narrow(0, 0, 3), right.shallow_clone() * f64::NAN] {
        let warnings = fitted(false, &with(wrong)).unwrap().1;
        assert!(
            warnings.len() == 1 && warnings[0].contains(&format!("`{name}` holds other frequencies")),
            "{warnings:?}"
        );
    }
}
