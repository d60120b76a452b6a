//! Target folders that are not what they should be.

use std::fs;

use serde_json::json;
use specforge::weights;
use tch::{Device, Kind, Tensor};

use super::{Case, check, edit_json, train, train_with, truncate};
use crate::fixture::{Workspace, model_config, model_tensors};

fn edit_model(workspace: &Workspace, edit: impl FnOnce(&mut Vec<(String, Tensor)>)) {
    let mut tensors = model_tensors(&model_config(&json!({})));
    edit(&mut tensors);
    weights::write_tensors(&workspace.path("model/model.safetensors"), &tensors, &[]).unwrap();
}

#[test]
fn models() {
    check(&[
        Case {
            name: "no model folder",
            spoil: |workspace| {
                workspace.set("target.path", "/nowhere/model");
                train(workspace)
            },
            exit_code: 2,
            expected: &["/nowhere/model", "is not there"],
        },
        Case {
            name: "a file as model folder",
            spoil: |workspace| {
                let path = workspace.path("conversations.jsonl");
                workspace.set("target.path", json!(path));
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/conversations.jsonl", "is not there"],
        },
        Case {
            name: "no config.json",
            spoil: |workspace| {
                fs::remove_file(workspace.path("model/config.json")).unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model", "config.json is not there", "hint: "],
        },
        Case {
            name: "no model_type",
            spoil: |workspace| {
                edit_json(&workspace.path("model/config.json"), |config| {
                    config.as_object_mut().unwrap().remove("model_type");
                });
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/config.json", "missing field `model_type`"],
        },
        Case {
            name: "an unknown model_type",
            spoil: |workspace| {
                edit_json(&workspace.path("model/config.json"), |config| config["model_type"] = json!("mamba"));
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/config.json", "model_type `mamba` is not supported; supported: llama"],
        },
        Case {
            name: "config.json cut off",
            spoil: |workspace| {
                truncate(&workspace.path("model/config.json"), 5);
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/config.json", "EOF"],
        },
        Case {
            name: "heads that do not divide the hidden size",
            spoil: |workspace| {
                edit_json(&workspace.path("model/config.json"), |config| {
                    config["num_attention_heads"] = json!(6);
                    config["num_key_value_heads"] = json!(6);
                });
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/config.json", "`num_attention_heads`", "hidden_size", "32", "6"],
        },
        Case {
            name: "a model whose parameters cannot be counted",
            spoil: |workspace| {
                edit_json(&workspace.path("model/config.json"), |config| config["hidden_size"] = json!(2147483647));
                workspace.train_command("run", &["--plan"])
            },
            exit_code: 2,
            expected: &["{}/model/config.json", "`hidden_size`: expected a number from 1 to 1048576, got 2147483647"],
        },
        Case {
            name: "groups that do not divide the heads",
            spoil: |workspace| {
                edit_json(&workspace.path("model/config.json"), |config| config["num_key_value_heads"] = json!(3));
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/config.json", "`num_key_value_heads`: expected a divisor of the 4 heads, got 3"],
        },
        Case {
            name: "an unknown rotary variant",
            spoil: |workspace| {
                edit_json(&workspace.path("model/config.json"), |config| {
                    config["rope_scaling"] = json!({"rope_type": "spiral", "factor": 2.0});
                });
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/config.json", "`rope_type`: expected default, linear", "got spiral"],
        },
        Case {
            name: "no weights",
            spoil: |workspace| {
                fs::remove_file(workspace.path("model/model.safetensors")).unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model", "holds neither model.safetensors nor model.safetensors.index.json"],
        },
        Case {
            name: "truncated weights",
            spoil: |workspace| {
                truncate(&workspace.path("model/model.safetensors"), 100);
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/model.safetensors: is not a whole safetensors file", "hint: "],
        },
        Case {
            name: "weights cut off in their header",
            spoil: |workspace| {
                let path = workspace.path("model/model.safetensors");
                truncate(&path, fs::metadata(&path).unwrap().len() - 40);
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/model.safetensors: is not a whole safetensors file"],
        },
        Case {
            name: "empty weights",
            spoil: |workspace| {
                fs::write(workspace.path("model/model.safetensors"), "").unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/model.safetensors: is not a whole safetensors file"],
        },
        Case {
            name: "weights that are a pointer of a large-file store",
            spoil: |workspace| {
                let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
                fs::write(workspace.path("model/model.safetensors"), pointer).unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/model.safetensors: is not a whole safetensors file"],
        },
        Case {
            name: "a missing tensor",
            spoil: |workspace| {
                edit_model(workspace, |tensors| {
                    tensors.retain(|(name, _)| name != "model.layers.1.mlp.up_proj.weight")
                });
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model", "missing (1)", "model.layers.1.mlp.up_proj.weight [48, 32]"],
        },
        Case {
            name: "a surplus tensor",
            spoil: |workspace| {
                let bias = ("model.layers.0.self_attn.q_proj.bias", Tensor::zeros([32], (Kind::Float, Device::Cpu)));
                edit_model(workspace, |tensors| tensors.push((bias.0.to_owned(), bias.1)));
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model", "surplus (1)", "model.layers.0.self_attn.q_proj.bias [32]"],
        },
        Case {
            name: "a wrong shape",
            spoil: |workspace| {
                edit_model(workspace, |tensors| tensors[0].1 = tensors[0].1.narrow(0, 0, 400).contiguous());
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model", "wrong shape (1)", "model.embed_tokens.weight: expected [454, 32], got [400, 32]"],
        },
        Case {
            name: "a shard that is missing",
            spoil: |workspace| {
                fs::remove_file(workspace.path("model/model.safetensors")).unwrap();
                let index = json!({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}});
                fs::write(workspace.path("model/model.safetensors.index.json"), index.to_string()).unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &[
                "{}/model/model-00002-of-00002.safetensors: is named in model.safetensors.index.json but not there",
            ],
        },
        Case {
            name: "a vocabulary that no weights have, to choose tokens from",
            spoil: |workspace| {
                edit_json(&workspace.path("model/config.json"), |config| config["vocab_size"] = json!(4_000_000));
                train_with(workspace, "draft.draft_vocab_size=64")
            },
            exit_code: 2,
            expected: &["{}/model", "model.embed_tokens.weight: expected [4000000, 32], got [454, 32]"],
        },
        Case {
            name: "a vocabulary beyond all",
            spoil: |workspace| {
                edit_json(&workspace.path("model/config.json"), |config| config["vocab_size"] = json!(2147483647));
                train_with(workspace, "draft.draft_vocab_size=64")
            },
            exit_code: 2,
            expected: &["{}/model/config.json", "`vocab_size`: expected a number from 1 to 4194304, got 2147483647"],
        },
        Case {
            name: "a key of config.json that stands twice",
            spoil: |workspace| {
                let path = workspace.path("model/config.json");
                let text = fs::read_to_string(&path).unwrap().replacen('{', r#"{"hidden_size": 64, "#, 1);
                fs::write(&path, text).unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/config.json: names `hidden_size` twice"],
        },
        Case {
            name: "quantised weights, by the configuration",
            spoil: |workspace| {
                edit_json(&workspace.path("model/config.json"), |config| {
                    config["quantization_config"] = json!({"quant_method": "awq", "bits": 4});
                });
                train(workspace)
            },
            exit_code: 2,
            expected: &[
                "{}/model/config.json: the weights are quantised (`quantization_config`: awq, 4 bits)",
                "hint: name the folder",
            ],
        },
        Case {
            name: "quantised weights, by a file beside the configuration",
            spoil: |workspace| {
                fs::write(workspace.path("model/quantize_config.json"), "{}").unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/config.json: the weights are quantised: quantize_config.json lies beside it"],
        },
        Case {
            name: "bare integers for weights",
            spoil: |workspace| {
                edit_model(workspace, |tensors| tensors[3].1 = (&tensors[3].1 * 100).to_kind(Kind::Int8));
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/model.safetensors: `model.layers.0.", "expected floating-point numbers, got Int8"],
        },
        Case {
            name: "packed weights",
            spoil: |workspace| {
                edit_model(workspace, |tensors| {
                    tensors[3].0 = tensors[3].0.replace(".weight", ".qweight");
                    tensors[3].1 = tensors[3].1.to_kind(Kind::Int);
                });
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/model.safetensors: holds quantised weights (GPTQ or AWQ), such as `model.layers.0."],
        },
        Case {
            name: "a weight that is no number",
            spoil: |workspace| {
                edit_model(workspace, |tensors| {
                    let _ = tensors[0].1.get(453).get(31).fill_(f64::NAN);
                });
                train(workspace)
            },
            exit_code: 2,
            expected: &[
                "{}/model/model.safetensors: `model.embed_tokens.weight`: expected finite numbers, element 14527 is NaN",
            ],
        },
        Case {
            name: "two answers to which weights are meant",
            spoil: |workspace| {
                let index = json!({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}});
                fs::write(workspace.path("model/model.safetensors.index.json"), index.to_string()).unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model: holds model.safetensors and an index of other files", "hint: remove the weights"],
        },
        Case {
            name: "a token with a role that the model has no row for",
            spoil: |workspace| {
                edit_json(&workspace.path("model/tokenizer_config.json"), |config| {
                    config["mask_token"] = json!("<|mask|>")
                });
                train(workspace)
            },
            exit_code: 2,
            expected: &[
                "{}/model/tokenizer_config.json: `mask_token`: the token `<|mask|>` has the id 454, the model has 454",
            ],
        },
        Case {
            name: "a tokenizer larger than the model",
            spoil: |workspace| {
                let config = model_config(&json!({"vocab_size": 440}));
                fs::write(workspace.path("model/config.json"), config.to_string()).unwrap();
                weights::write_tensors(&workspace.path("model/model.safetensors"), &model_tensors(&config), &[])
                    .unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model", "440"],
        },
        Case {
            name: "no tokenizer",
            spoil: |workspace| {
                fs::remove_file(workspace.path("model/tokenizer.json")).unwrap();
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/tokenizer.json: is not there", "hint: "],
        },
        Case {
            name: "a broken tokenizer",
            spoil: |workspace| {
                truncate(&workspace.path("model/tokenizer.json"), 300);
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/tokenizer.json: is not a tokenizer this program can read"],
        },
        Case {
            name: "a tokenizer that contradicts itself",
            spoil: |workspace| {
                edit_json(&workspace.path("model/tokenizer.json"), |tokenizer| {
                    tokenizer["model"]["continuing_subword_prefix"] = json!("longer than any token");
                });
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/tokenizer.json: is not a tokenizer this program can read"],
        },
        Case {
            name: "no chat template",
            spoil: |workspace| {
                edit_json(&workspace.path("model/tokenizer_config.json"), |config| {
                    config.as_object_mut().unwrap().remove("chat_template");
                });
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model", "has no chat template", "hint: "],
        },
        Case {
            name: "a chat template that is no Jinja",
            spoil: |workspace| {
                edit_json(&workspace.path("model/tokenizer_config.json"), |config| {
                    config["chat_template"] = json!("{% for message in messages %}{{ message.content }}");
                });
                train(workspace)
            },
            exit_code: 2,
            expected: &["{}/model/tokenizer_config.json", "template"],
        },
    ]);
}
