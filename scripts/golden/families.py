#!/usr/bin/env python3
"""Makes folders family_<case>: tiny random models of every family, and what transformers computes with them.

    pip install torch==2.11.0 transformers==5.8.1 safetensors
    python scripts/golden/families.py OUT_DIR [CASE ...]
    python scripts/golden/families.py tests/data/goldens SMALL

The second makes those that are committed, of fewer numbers. Each folder holds config.json and model.safetensors as `save_pretrained` writes them, `config_v4.json` (the same in the
spelling of transformers 4), and golden.safetensors: `in.input_ids` [2, T] with `in.lengths` (row 1 is padded on the right),
`out.hidden.<k>` by transformers' `hidden_states` index, `out.logits`, `out.cached_logits` (a prefill, then 5 steps of one
token), and `out.row1.logits` and `out.row1.cached_logits` of row 1 alone. Everything is float32 on the CPU, with
transformers' own attention; what lies behind a row's end is zero. `tests/goldens/families.rs` checks such folders:

    SPECFORGE_GOLDENS=OUT_DIR ./scripts/test goldens
"""

import copy
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

STEPS = 5
PLAIN = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=96, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.25,
)
# What the committed cases have less of, and which they are.
SMALL = dict(
    hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=32,
)
COMMITTED = ["gemma2_caps", "gemma3_pattern", "phi3_longrope_long", "qwen2_moe", "gpt_oss", "olmo3_windows"]
YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=32)
SHORT, LONG = [1.0, 1.1, 1.3, 1.4], [2.0, 2.5, 3.0, 5.0]


def rope(**keys):
    return dict(rope_parameters=dict(dict(rope_type="default", rope_theta=500.0), **keys))


def longrope(original):
    return dict(
        original_max_position_embeddings=original,
        rope_parameters=dict(rope_type="longrope", rope_theta=500.0, short_factor=SHORT, long_factor=LONG),
    )


# Name: class of the model, what differs from PLAIN, tokens of both rows.
CASES = {
    "llama_mqa_tied": ("Llama", dict(num_key_value_heads=1, tie_word_embeddings=True), (20, 15)),
    "llama_linear": ("Llama", rope(rope_type="linear", factor=3.0), (20, 15)),
    "llama_dynamic": ("Llama", rope(rope_type="dynamic", factor=2.0), (20, 15)),
    "llama_dynamic_over": ("Llama", dict(max_position_embeddings=16, **rope(rope_type="dynamic", factor=2.0)), (30, 24)),
    "llama_yarn": ("Llama", dict(rope_parameters=dict(YARN, beta_fast=20.0, beta_slow=2.0)), (40, 33)),
    "llama_yarn_factor": ("Llama", dict(rope_parameters=dict(YARN, attention_factor=1.3)), (40, 33)),
    "llama_biases": ("Llama", dict(attention_bias=True, mlp_bias=True), (20, 15)),
    "mistral_no_window": ("Mistral", dict(sliding_window=None, head_dim=12), (20, 15)),
    "qwen2_sliding_yarn": (
        "Qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1, rope_parameters=YARN), (40, 33)),
    "qwen3_sliding": ("Qwen3", dict(head_dim=12, use_sliding_window=True, sliding_window=5, max_window_layers=2), (24, 19)),
    "phi3_longrope_short": ("Phi3", longrope(64), (30, 25)),
    "phi3_longrope_long": ("Phi3", longrope(16), (30, 25)),
    "smollm3_windows": ("SmolLM3", dict(use_sliding_window=True, sliding_window=6, no_rope_layers=[0, 1, 0]), (24, 19)),
    "olmo3_windows": ("Olmo3", dict(layer_types=["sliding_attention", "full_attention"], num_hidden_layers=2,
                                    sliding_window=6), (24, 19)),
    "olmo3": ("Olmo3", dict(num_hidden_layers=5, sliding_window=6), (24, 19)),
    "granite": (
        "Granite",
        dict(embedding_multiplier=6.0, logits_scaling=3.0, residual_multiplier=0.4, attention_multiplier=0.2),
        (24, 19)),
    "gemma": ("Gemma", dict(head_dim=12), (24, 19)),
    "gemma2_caps": (
        "Gemma2",
        dict(head_dim=12, sliding_window=6, query_pre_attn_scalar=20, attn_logit_softcapping=4.0,
             final_logit_softcapping=5.0),
        (24, 19)),
    "gemma2_no_caps": (
        "Gemma2",
        dict(head_dim=12, sliding_window=6, query_pre_attn_scalar=20, attn_logit_softcapping=None,
             final_logit_softcapping=None),
        (24, 19)),
    "gemma3_capped": (
        "Gemma3",
        dict(head_dim=12, num_hidden_layers=7, sliding_window=6, query_pre_attn_scalar=20, final_logit_softcapping=5.0),
        (24, 19)),
    "gemma3_pattern": (
        "Gemma3", dict(head_dim=12, num_hidden_layers=4, sliding_window=6, sliding_window_pattern=2), (24, 19)),
    "mixtral": ("Mixtral", dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=7), (24, 19)),
    "qwen2_moe": (
        "Qwen2Moe",
        dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24,
             mlp_only_layers=[1]),
        (24, 19)),
    "qwen2_moe_windows": (
        "Qwen2Moe",
        dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24,
             norm_topk_prob=True, use_sliding_window=True, sliding_window=6, max_window_layers=2),
        (24, 19)),
    "qwen3_moe": (
        "Qwen3Moe",
        dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=2, head_dim=12,
             use_sliding_window=True, sliding_window=6),
        (24, 19)),
    "gpt_oss": (
        "GptOss",
        dict(head_dim=12, intermediate_size=24, num_local_experts=5, num_experts_per_tok=2, sliding_window=6,
             rope_parameters=dict(YARN, truncate=False)),
        (24, 19)),
}


def text_class(name):
    config = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    return getattr(transformers, config), getattr(transformers, f"{name}ForCausalLM")


def randomise(model):
    """Norms that are not all one, sinks and biases that are not zero."""
    generator = torch.Generator().manual_seed(3)
    for name, value in model.named_parameters():
        if value.dim() == 1:
            value.data += 0.3 * torch.randn(value.shape, generator=generator)


def older(config, has_types=False):
    """config.json in the spelling of version 4, without `layer_types` where they follow from the class."""
    config = copy.deepcopy(config)
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.51.3"
    parameters = config.pop("rope_parameters")
    if "full_attention" in parameters:
        config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
    config["rope_theta"] = parameters.pop("rope_theta")
    if "partial_rotary_factor" in parameters:
        config["partial_rotary_factor"] = parameters.pop("partial_rotary_factor")
    config["rope_scaling"] = None if parameters["rope_type"] == "default" else parameters
    if parameters["rope_type"] in ("linear", "longrope"):
        parameters["type"] = parameters.pop("rope_type")
    if not has_types:
        config.pop("layer_types", None)
    return config


def logits_of(model, ids, mask, **keys):
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **keys)


def cached(new_model, ids, mask):
    """Logits of the last tokens, each in a pass of its own."""
    model, tokens = new_model(), ids.shape[1]
    start = tokens - STEPS
    output = model(input_ids=ids[:, :start], attention_mask=mask[:, :start], use_cache=True)
    steps = []
    for at in range(start, tokens):
        position = torch.full((ids.shape[0], 1), at)
        output = model(
            input_ids=ids[:, at:at + 1], attention_mask=mask[:, :at + 1], position_ids=position,
            past_key_values=output.past_key_values, use_cache=True)
        steps.append(output.logits)
    return torch.cat(steps, 1)


def main(out, names):
    small = SMALL if names == ["SMALL"] else {}
    names = COMMITTED if small else names
    for name, (kind, changes, (whole, short)) in CASES.items():
        if names and name not in names:
            continue
        folder = out / f"family_{name}"
        config_class, model_class = text_class(kind)
        torch.manual_seed(1)
        keys = dict(PLAIN, **changes) | small
        model = model_class(config_class(**keys, attn_implementation="eager")).eval()
        randomise(model)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config_v4.json").write_text(json.dumps(older(config, "layer_types" in changes), indent=2) + "\n")

        def new_model():
            return model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

        ids = torch.randint(3, keys["vocab_size"], (2, whole))
        ids[1, short:] = 0
        mask = torch.ones_like(ids)
        mask[1, short:] = 0
        positions = torch.arange(whole).expand(2, -1)
        with torch.no_grad():
            output = logits_of(new_model(), ids, mask, position_ids=positions, output_hidden_states=True)
            tensors = {f"out.hidden.{index}": state.clone() for index, state in enumerate(output.hidden_states)}
            tensors["out.logits"] = output.logits
            for tensor in tensors.values():
                tensor[1, short:] = 0
            tensors["out.cached_logits"] = cached(new_model, ids, mask)
            tensors["out.cached_logits"][1, max(short - (whole - STEPS), 0):] = 0
            alone = ids[1:, :short]
            tensors["out.row1.logits"] = logits_of(new_model(), alone, torch.ones_like(alone)).logits
            tensors["out.row1.cached_logits"] = cached(new_model, alone, torch.ones_like(alone))
        tensors["in.input_ids"], tensors["in.lengths"] = ids, torch.tensor([whole, short])
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "golden.safetensors",
                  metadata={"source": f"transformers {transformers.__version__}, torch {torch.__version__}"})
        print(f"{folder}: logits' deviation {tensors['out.logits'].std():.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
