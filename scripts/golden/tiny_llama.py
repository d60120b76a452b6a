#!/usr/bin/env python3
"""Makes tests/data/goldens/tiny_llama_<case>.safetensors: what transformers computes with tiny random Llama models.

    pip install torch==2.11.0 transformers==5.8.1 safetensors
    python scripts/golden/tiny_llama.py [OUT_DIR] [CASE ...]

Each file holds `w.*` (the weights under their Hugging Face names), `ids` and `positions` [B, T], `hidden.<k>` [B, T, H]
by transformers' `hidden_states` index, and `logits` [B, T, V]. The metadata hold `config` (config.json as a user would
have it), `source`, and for packed rows `documents` (their lengths). Everything is float32 on the CPU.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaForCausalLM

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 40,
    "tie_word_embeddings": False,
}
NEW = {"rope_theta": 1000.0}  # inside `rope_parameters`
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

# Name: keys of config.json, first position of each row, tokens of a row. `documents` packs them into one row instead.
CASES = {
    "gqa": dict(config={"rope_theta": 10000.0}, starts=[0, 7], tokens=12),
    "mha_no_groups_key": dict(config={"rope_theta": 500.0, "num_key_value_heads": None}, starts=[0], tokens=9),
    "head_dim": dict(config={"rope_theta": 10000.0, "head_dim": 10}, starts=[0, 3], tokens=9),
    "biases": dict(config={"rope_theta": 10000.0, "attention_bias": True, "mlp_bias": True}, starts=[0], tokens=9),
    "tied": dict(config={"rope_theta": 10000.0, "tie_word_embeddings": True}, starts=[0], tokens=9),
    "packed": dict(config={"rope_theta": 10000.0}, documents=[5, 1, 7]),
    "rope_parameters_default": dict(config={"rope_parameters": {"rope_type": "default", **NEW}}, starts=[5], tokens=9),
    "linear": dict(config={"rope_parameters": {"rope_type": "linear", "factor": 3.0, **NEW}}, starts=[2], tokens=20),
    "linear_old": dict(
        config={"rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 2.5}}, starts=[0], tokens=20
    ),
    "dynamic_short": dict(
        config={"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **NEW}}, starts=[0], tokens=20
    ),
    "dynamic_long": dict(
        config={"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **NEW}, "max_position_embeddings": 16},
        starts=[0], tokens=41,
    ),
    "dynamic_old_long": dict(
        config={"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 4.0},
                "max_position_embeddings": 16},
        starts=[0], tokens=33,
    ),
    "llama3": dict(
        config={"rope_parameters": {"rope_type": "llama3", **LLAMA3, **NEW}, "head_dim": 16}, starts=[0, 40], tokens=20
    ),
    "llama3_old": dict(
        config={"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}, "head_dim": 16},
        starts=[0], tokens=20,
    ),
    "yarn": dict(config={"rope_parameters": {**YARN, **NEW}, "head_dim": 16}, starts=[0], tokens=40),
    "yarn_old": dict(
        config={"rope_theta": 10000.0, "rope_scaling": {**YARN, "type": "yarn", "beta_fast": 8.0, "beta_slow": 2.0},
                "head_dim": 16},
        starts=[0], tokens=24,
    ),
    "yarn_attention_factor": dict(
        config={"rope_parameters": {**YARN, **NEW, "attention_factor": 1.25}, "head_dim": 16}, starts=[0], tokens=24
    ),
    "yarn_mscale": dict(
        config={"rope_parameters": {**YARN, **NEW, "mscale": 0.7, "mscale_all_dim": 1.3}, "head_dim": 16},
        starts=[0], tokens=24,
    ),
    "yarn_not_truncated": dict(
        config={"rope_parameters": {**YARN, **NEW, "truncate": False}, "head_dim": 16}, starts=[0], tokens=24
    ),
    "yarn_factor_from_lengths": dict(
        config={"rope_parameters": {**YARN, **NEW, "factor": None}, "head_dim": 16}, starts=[0], tokens=24
    ),
}


def build(config_json: dict, seed: int) -> LlamaForCausalLM:
    """A model with random weights, its configuration read from a file as a user's would be."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config_json))
        config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Large enough for uneven attention: a wrong rotation must show.
            spread = 0.2 if parameter.dim() == 1 else 1.0 / parameter.shape[-1] ** 0.5
            parameter.normal_(0.0, spread, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
    return model


def write(name: str, case: dict, seed: int, out: Path) -> None:
    config_json = {key: value for key, value in {**BASE, **case["config"]}.items() if value is not None}
    model = build(config_json, seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    metadata = {"source": f"transformers {transformers.__version__}, torch {torch.__version__}, seed {seed}"}
    if documents := case.get("documents"):
        positions = torch.cat([torch.arange(length) for length in documents])[None]
        metadata["documents"] = json.dumps(documents)
    else:
        positions = torch.stack([torch.arange(start, start + case["tokens"]) for start in case["starts"]])
    ids = torch.randint(BASE["vocab_size"], positions.shape, generator=generator)
    with torch.no_grad():
        # Without a mask and a cache, positions that start again are read as packed documents.
        output = model(input_ids=ids, position_ids=positions, output_hidden_states=True, use_cache=False)
    tensors = {"ids": ids, "positions": positions, "logits": output.logits}
    tensors |= {f"hidden.{index}": hidden for index, hidden in enumerate(output.hidden_states)}
    tensors |= {f"w.{key}": value for key, value in model.state_dict().items() if key in dict(model.named_parameters())}
    metadata["config"] = json.dumps(config_json)
    path = out / f"tiny_llama_{name}.safetensors"
    save_file({key: value.detach().clone().contiguous() for key, value in tensors.items()}, path, metadata)
    print(f"{path}  {path.stat().st_size} bytes")


def main() -> None:
    arguments = sys.argv[1:]
    out = Path(arguments[0]) if arguments else Path(__file__).parents[2] / "tests/data/goldens"
    out.mkdir(parents=True, exist_ok=True)
    for seed, (name, case) in enumerate(CASES.items()):
        if not arguments[1:] or name in arguments[1:]:
            write(name, case, seed, out)


if __name__ == "__main__":
    main()
