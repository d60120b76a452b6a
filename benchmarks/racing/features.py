"""This program's token cache and feature store, and SpecForge's offline files made of them. Runs with torch at hand."""

import json
import struct
from pathlib import Path


def documents(cache: Path) -> list[tuple[list[int], list[int]]]:
    """Token ids and loss masks of the one token cache in a folder; its layout is in specforge/src/data/cache.rs."""
    (path,) = cache.glob("*.tokens")
    content = path.read_bytes()
    count, _, _, index, _ = struct.unpack_from("<5Q", content, 80)
    found = []
    for number in range(count):
        offset, length = struct.unpack_from("<QI", content, index + 32 * number)
        masks = offset + 4 * length
        found.append((list(struct.unpack_from(f"<{length}I", content, offset)), list(content[masks : masks + length])))
    return found


def write(cache: Path, store: Path, layers: list[int], final: int, out: Path) -> int:
    """One file a document, as SpecForge's prepare_hidden_states.py writes them: states `[1, T, ...]`, ids and mask `[T]`."""
    import torch
    from safetensors import safe_open

    states = {}
    for entry in json.loads((store / "store.json").read_text())["shards"]:
        with safe_open(store / entry["file"], "pt") as shard:
            ids, offsets = shard.get_tensor("ids"), shard.get_tensor("offsets").tolist()
            hidden = {layer: shard.get_tensor(f"hidden.{layer}") for layer in [*layers, final]}
            for begin, end in zip(offsets, offsets[1:]):
                states[tuple(ids[begin:end].tolist())] = {layer: each[begin:end] for layer, each in hidden.items()}
    out.mkdir(parents=True)
    for number, (ids, mask) in enumerate(documents(cache)):
        of = states[tuple(ids)]
        torch.save({
            "input_ids": torch.tensor(ids), "loss_mask": torch.tensor(mask, dtype=torch.long),
            "hidden_state": of[final].unsqueeze(0).clone(),
            "aux_hidden_state": torch.cat([of[layer] for layer in layers], -1).unsqueeze(0),
        }, out / f"data_{number}.ckpt")
    return len(states)
