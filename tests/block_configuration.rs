//! What the `draft` section of a block drafter refuses, with the key in every message.

use serde_json::{Value, json};
use specforge::draft;
use specforge::models::TargetInfo;

/// A section that is read, for a target of width 32 with 454 tokens and four layers.
fn section(algorithm: &str) -> Value {
    json!({"algorithm": algorithm, "num_layers": 2, "block_size": 4, "num_anchors": 8, "target_layer_ids": [0, 2],
        "mask_token_id": 1})
}

const EVERY: [&str; 6] = ["dflash", "dflash2", "dspark", "lilicorr", "domino", "xpress"];

/// Sets what stands at a dotted path.
fn set(section: &mut Value, key: &str, value: &Value) {
    let mut place = section;
    for part in key.split('.') {
        if !place.is_object() {
            *place = json!({});
        }
        place = &mut place[part];
    }
    *place = value.clone();
}

/// What is wrong with a section, as a run finds it before any weight is loaded.
fn refusal(section: &Value) -> Option<String> {
    let size = || {
        let algorithm = draft::algorithm(section)?;
        let resolved = (algorithm.resolve)(section)?;
        (algorithm.figures)(&resolved)?;
        (algorithm.size)(&resolved, &TargetInfo::of(32, 454, 4, 256))
    };
    size().err().map(|error| error.to_string())
}

#[track_caller]
fn refuses(algorithm: &str, changes: &[(&str, Value)], words: &[&str]) {
    let mut section = section(algorithm);
    changes.iter().for_each(|(key, value)| set(&mut section, key, value));
    let message = refusal(&section).unwrap_or_else(|| panic!("{algorithm}, {changes:?}: was read"));
    for word in words {
        assert!(message.contains(word), "{algorithm}, {changes:?}: expected `{word}`, got: {message}");
    }
}

#[test]
fn sections_of_every_head_are_read() {
    for algorithm in EVERY {
        assert_eq!(refusal(&section(algorithm)), None, "{algorithm}");
        // What is resolved is resolved to itself.
        let row = draft::algorithm(&section(algorithm)).unwrap();
        let once = (row.resolve)(&section(algorithm)).unwrap();
        assert_eq!((row.resolve)(&once).unwrap(), once, "{algorithm}");
    }
}

/// What all of them share.
#[test]
fn keys_of_the_family_are_checked() {
    let both = |kinds: [&str; 2]| json!(kinds);
    for algorithm in EVERY {
        for (key, value) in [
            ("num_layers", json!(0)),
            ("num_layers", json!(65)),
            ("num_layers", json!(-1)),
            ("num_layers", json!("two")),
            ("num_anchors", json!(0)),
            ("block_size", json!(1)),
            ("block_size", json!(257)),
            ("layout", json!("shifted")),
            ("target_layer_ids", json!([])),
            ("target_layer_ids", json!([0, 4])),
            ("target_layer_ids", json!([0, 3])),
            ("target_layer_ids", json!([-2])),
            ("mask_token_id", json!(454)),
            ("mask_token_id", json!(-1)),
            ("layer_types", json!(["full_attention"])),
            ("layer_types", both(["full_attention", "windowed"])),
            ("sliding_window", json!(8)),
            ("intermediate_size", json!(0)),
            ("num_attention_heads", json!(0)),
            ("num_key_value_heads", json!(3)),
            ("head_dim", json!(0)),
            ("rms_norm_eps", json!(-1)),
            ("mask", json!("none")),
            ("loss", json!("hinge")),
            ("loss", json!({"ce": 0})),
            ("loss", json!({"ce": -1})),
            ("labels", json!("target")),
            ("weights.name", json!("steep")),
            ("denominators", json!("tokens")),
            ("first_error_focal.alpha", json!(-1)),
            ("init_form", json!("x")),
            ("head.nothing", json!(1)),
        ] {
            let named = if key == "init_form" { "init_form" } else { key.split('.').next().unwrap() };
            refuses(algorithm, &[(key, value)], &[named]);
        }
        let sliding = both(["sliding_attention", "full_attention"]);
        refuses(algorithm, &[("layer_types", sliding.clone())], &["draft.sliding_window", "need a window"]);
        let narrow = [("layer_types", sliding), ("sliding_window", json!(0))];
        refuses(algorithm, &narrow, &["sliding_window", "at least 1"]);
        refuses(algorithm, &[("weights", json!({"name": "fixed", "gamma": 0}))], &["draft.weights.gamma"]);
        refuses(algorithm, &[("weights", json!({"name": "d_pace", "alpha": 2}))], &["draft.weights.alpha"]);
        refuses(algorithm, &[("weights", json!({"name": "even", "gamma": 2}))], &["draft.weights"]);
        let pard = [("weights", json!({"name": "d_pard"})), ("loss", json!("ce"))];
        refuses(algorithm, &pard, &["draft.weights", "d_pard"]);
        for conv in [json!({"kernel_size": 0, "group_size": 8}), json!({"kernel_size": 2, "group_size": 5})] {
            refuses(algorithm, &[("conv", conv)], &["convolution"]);
        }
        refuses(algorithm, &[("conv", json!({"kernel_size": 2}))], &["draft.conv", "group_size"]);
        let mut without = section(algorithm);
        without.as_object_mut().unwrap().remove("mask_token_id");
        assert!(refusal(&without).unwrap().contains("draft.mask_token_id"), "{algorithm}");
    }
    refuses("dflash", &[("draft_vocab_size", json!(0))], &["draft.draft_vocab_size"]);
    refuses("dflash", &[("draft_vocab_size", json!(455))], &["draft.draft_vocab_size", "454"]);
}

/// What each head has of its own.
#[test]
fn keys_of_heads_are_checked() {
    for (algorithm, key, value) in [
        ("dflash", "selector_rank", json!(4)),
        ("dflash2", "selector_rank", json!(0)),
        ("dflash2", "selector_top_k", json!(0)),
        ("dflash2", "selector_top_k", json!(455)),
        ("dspark", "markov_rank", json!(-1)),
        ("dspark", "markov_head_type", json!("lstm")),
        ("dspark", "confidence_weight", json!(-1)),
        ("dspark", "confidence_gamma", json!(0)),
        ("dspark", "anchor_row_writes_state", json!(true)),
        ("lilicorr", "lilicorr_candidate_topk", json!(455)),
        ("lilicorr", "lilicorr_num_heads", json!(7)),
        ("lilicorr", "penalty_weight", json!(-1)),
        ("domino", "gru_hidden_dim", json!(0)),
        ("domino", "emb_dim", json!(0)),
        ("domino", "pure_draft_prefix_len", json!(4)),
        ("domino", "base_weight", json!(1.5)),
        ("domino", "base_weight_until", json!(0)),
        ("domino", "support", json!("both")),
        ("xpress", "xpress_rank", json!(0)),
        ("xpress", "xpress_mlp_ratio", json!(0)),
        ("xpress", "xpress_topc", json!(-1)),
        ("xpress", "base_weight", json!(-0.5)),
        ("xpress", "consistency_weight", json!("much")),
    ] {
        refuses(algorithm, &[(&format!("head.{key}"), value)], &[&format!("draft.head.{key}")]);
    }
    // Those choose among tokens of the whole vocabulary.
    for algorithm in ["dflash2", "lilicorr", "domino"] {
        refuses(algorithm, &[("draft_vocab_size", json!(200))], &["draft.draft_vocab_size"]);
    }
    refuses("lilicorr", &[("layout", json!("shift"))], &["draft.layout"]);
}

/// What changes while a run goes on is tied to its length, and nothing else is.
#[test]
fn weights_that_move_with_the_run_keep_its_length() {
    let follows = |section: &Value| (draft::algorithm(section).unwrap().follows_length)(section);
    for algorithm in EVERY {
        assert_eq!(follows(&section(algorithm)), algorithm == "domino", "{algorithm}");
    }
    for key in ["selector_from", "selector_ramp"] {
        let mut moving = section("dflash2");
        set(&mut moving, &format!("head.{key}"), &json!(0.25));
        assert!(follows(&moving), "{key}");
    }
    let eagle3 = |until: f64| json!({"algorithm": "eagle3", "grow_until": until});
    assert!(!follows(&eagle3(0.0)) && follows(&eagle3(0.5)));
    assert!(refusal(&eagle3(1.5)).is_some_and(|message| message.contains("draft.grow_until")));
}
