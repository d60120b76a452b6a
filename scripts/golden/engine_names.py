#!/usr/bin/env python3
"""Checks an exported EAGLE-3 folder against the loaders in the engines' own wheels.

    pip download --no-deps sglang==0.5.23 vllm==0.33.0 -d wheels
    scripts/golden/engine_names.py FOLDER wheels/sglang-*.whl wheels/vllm-*.whl

The wheels are read, never installed or imported: the renamings come out of the syntax tree of `load_weights`, the
parameters out of the assignments of the model's constructors. A tensor that lands nowhere, a parameter that nothing is
loaded into, and a literal that is not where it was expected all end with exit code 1.
"""

import ast
import json
import struct
import sys
import zipfile
from pathlib import Path

LOADERS = {
    "sglang": "sglang/srt/models/llama_eagle3.py",
    "vllm": "vllm/model_executor/models/llama_eagle3.py",
}


def fail(message):
    sys.exit(f"error: {message}")


def read_folder(folder):
    config = json.loads((folder / "config.json").read_text())
    with open(folder / "model.safetensors", "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return config, sorted(name for name in header if name != "__metadata__")


def read_loader(wheel):
    with zipfile.ZipFile(wheel) as archive:
        for engine, path in LOADERS.items():
            if path in archive.namelist():
                return engine, ast.parse(archive.read(path).decode())
    fail(f"{wheel}: holds none of {', '.join(LOADERS.values())}")


def literals(tree, name):
    """Values of every assignment or keyword argument of this name that is a literal."""
    found = []
    for node in ast.walk(tree):
        value = None
        if isinstance(node, ast.Assign) and any(getattr(target, "id", None) == name for target in node.targets):
            value = node.value
        elif isinstance(node, ast.keyword) and node.arg == name:
            value = node.value
        if value is not None:
            try:
                found.append(ast.literal_eval(value))
            except ValueError:
                pass
    return found


def renamings(engine, tree):
    """Pairs of what is replaced in a name, whole tensors that are renamed, and tensors that are skipped."""
    if engine == "sglang":
        legacy, stacked = literals(tree, "legacy_name_map"), literals(tree, "stacked_params_mapping")
        if not legacy or not stacked:
            fail("sglang: the tables of load_weights are not where they were")
        parts = [(shard, parameter) for parameter, shard, _ in stacked[0]]
        return list(legacy[0].items()) + parts, {}, ["d2t", "t2d"]
    replaced, stacked = literals(tree, "orig_to_new_substr"), literals(tree, "orig_to_new_stacked")
    # Another table of that name says with None what a folder may lack.
    replaced = [table for table in replaced if None not in table.values()]
    if not replaced or not stacked:
        fail("vllm: the tables of WeightsMapper are not where they were")
    parts = [(shard, parameter) for shard, (parameter, _) in stacked[0].items()]
    return list(replaced[0].items()) + parts, {"d2t": "draft_id_to_target_id"}, ["t2d"]


def attributes(tree):
    """Names that constructors assign to `self` or to what `self` holds."""
    found = set()
    for node in ast.walk(tree):
        targets = getattr(node, "targets", []) or [getattr(node, "target", None)]
        found.update(target.attr for target in targets if isinstance(target, ast.Attribute))
    return found


def flattened(config):
    """A speculators configuration as vLLM sees it."""
    if "transformer_layer_config" not in config:
        return config
    keys = ["draft_vocab_size", "norm_before_fc", "fc_norm", "target_hidden_size"]
    return {**config["transformer_layer_config"], **{key: config[key] for key in keys if config.get(key) is not None}}


def parameters(engine, config):
    """Every parameter that must be loaded, and the attribute of the loader's source that holds it."""
    needed = {"model.fc.weight": "fc", "model.norm.weight": "norm", "lm_head.weight": "lm_head"}
    if config.get("norm_before_fc"):
        needed["model.input_norm.weight"] = "input_norm"
    if config.get("fc_norm"):
        needed.update({f"model.fc_norm.{index}.weight": "fc_norm" for index in range(config["num_aux_hidden_states"])})
    if config.get("target_hidden_size", config["hidden_size"]) != config["hidden_size"]:
        needed["model.embed_tokens.weight"] = "embed_tokens"
    if engine == "vllm" and config["draft_vocab_size"] != config["vocab_size"]:
        needed["draft_id_to_target_id"] = "draft_id_to_target_id"
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        # Of the two norms, later layers read one: SGLang hidden_norm, vLLM input_layernorm.
        norms = ["input_layernorm", "hidden_norm"] if layer == 0 else ["hidden_norm" if engine == "sglang" else "input_layernorm"]
        for name in norms + ["post_attention_layernorm"]:
            needed[f"{prefix}.{name}.weight"] = "hidden_norm" if name == "hidden_norm" else None
        for name in ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]:
            needed[f"{prefix}.{name}.weight"] = "qkv_proj" if name.endswith("qkv_proj") else None
    optional = {f"model.layers.{layer}.{name}.weight" for layer in range(config["num_hidden_layers"])
                for name in ["input_layernorm", "hidden_norm"]}
    return needed, optional


def check(folder, wheel):
    config, names = read_folder(folder)
    engine, tree = read_loader(wheel)
    if engine == "sglang" and "speculators_model_type" in config:
        return f"{engine}: does not read the speculators format"
    config = flattened(config)
    replaced, renamed, skipped = renamings(engine, tree)
    needed, optional = parameters(engine, config)
    known = attributes(tree)
    for attribute in filter(None, needed.values()):
        if attribute not in known:
            fail(f"{engine}: the loader has no attribute `{attribute}` any more")
    loaded = set()
    for name in names:
        if any(part in name for part in skipped):
            continue
        place = name
        for old, new in replaced:
            place = place.replace(old, new)
        for old, new in renamed.items():
            place = place.replace(old, new)
        if place not in needed and place not in optional:
            place = f"model.{place}"
        if place not in needed and place not in optional:
            fail(f"{folder}: {engine} has no place for `{name}`")
        loaded.add(place)
    absent = sorted(set(needed) - loaded)
    if absent:
        fail(f"{folder}: {engine} loads nothing into {', '.join(absent)}")
    return f"{engine}: {len(names)} tensors, {len(loaded)} parameters, every one in its place"


if __name__ == "__main__":
    if len(sys.argv) < 3:
        fail("expected a folder and one or more wheels")
    for wheel in sys.argv[2:]:
        print(check(Path(sys.argv[1]), wheel))
