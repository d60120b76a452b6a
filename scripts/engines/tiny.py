"""A small random Llama in a Hugging Face folder, prompts for it, and configurations that train drafts in seconds.

Its tokenizer is of Llama 2's kind (bytes and single letters), which every converter reads without knowing the model.
Random layers change what the embedding says by about as much again: drafts have something to learn, and something to
miss.
"""

import json
import random
import string
import struct
from array import array
from pathlib import Path

SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}
LAYERS = 8
SPECIAL = ["<unk>", "<s>", "</s>"]
# Special tokens and bytes.
NEVER_SAID = len(SPECIAL) + 256
WORDS = ["the", "river", "runs", "over", "seven", "stones", "and", "never", "asks", "why", "a", "cold", "bird", "sings"]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tokens() -> list[str]:
    """The vocabulary: special tokens, bytes, letters, and pairs of letters."""
    letters = ["▁", *string.ascii_letters, *string.digits, *".,:;?!'-"]
    pairs = ["▁t", "th", "he", "in", "er", "▁a", "an", "re"]
    return [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *pairs]


def tokenizer() -> dict:
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
        "vocab": {token: index for index, token in enumerate(tokens())},
        "merges": [f"{pair[0]} {pair[1]}" for pair in tokens()[-8:]],
    }
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    unspace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": index, "content": token, **special} for index, token in enumerate(SPECIAL)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]},
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [unspace, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": model,
    }


def config(layers: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES, "num_hidden_layers": layers,
        "vocab_size": len(tokens()), "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
    }


def shapes(layers: int) -> dict[str, tuple[list[int], float]]:
    """Shape and spread of every tensor; norms have none."""
    hidden, width, head = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["head_dim"]
    queries, groups = SIZES["num_attention_heads"] * head, SIZES["num_key_value_heads"] * head
    found = {"model.embed_tokens.weight": ([len(tokens()), hidden], 1.0)}
    for layer in range(layers):
        parts = {
            "self_attn.q_proj": [queries, hidden], "self_attn.k_proj": [groups, hidden],
            "self_attn.v_proj": [groups, hidden], "self_attn.o_proj": [hidden, queries],
            "mlp.gate_proj": [width, hidden], "mlp.up_proj": [width, hidden], "mlp.down_proj": [hidden, width],
        }
        for name, shape in parts.items():
            found[f"model.layers.{layer}.{name}.weight"] = (shape, 0.06)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{name}.weight"] = ([hidden], 0.0)
    found["model.norm.weight"] = ([hidden], 0.0)
    found["lm_head.weight"] = ([len(tokens()), hidden], 0.3)
    return found


def write_model(folder: Path, layers: int = LAYERS) -> Path:
    """Writes the model, or its first layers between the same embedding and head: a draft of its own kind."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>",
    }
    files = {
        "config.json": config(layers), "tokenizer.json": tokenizer(),
        "tokenizer_config.json": {**words, "chat_template": TEMPLATE},
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    header, data = {}, bytearray()
    for name, (shape, spread) in shapes(layers).items():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        draw = random.Random(name).gauss
        values = array("f", (draw(0.0, spread) for _ in range(count)) if spread else (1.0 for _ in range(count)))
        if name == "lm_head.weight":
            # Never chosen: servers refuse answers that are no text, and an answer would end early.
            values[: shape[1] * NEVER_SAID] = array("f", [0.0]) * (shape[1] * NEVER_SAID)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + 4 * count]}
        data += values.tobytes()
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    return folder


def write_prompts(path: Path, count: int, seed: int) -> Path:
    """Questions of a few words, one a line: what `regen` answers and `eval` asks."""
    draw = random.Random(seed)
    lines = [
        json.dumps({"id": str(index), "messages": [{"role": "user", "content": " ".join(words)}]})
        for index in range(count)
        for words in [draw.choices(WORDS, k=draw.randint(2, 9))]
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def training(model: Path, data: Path, out: Path, draft: dict) -> dict:
    """A configuration that trains a draft for the small model."""
    return {
        "target": {"path": str(model), "dtype": "float32", "keep_hidden_states": True},
        "draft": draft,
        "data": {
            "train": [str(data)], "eval_fraction": 0.1, "max_length": 128, "cache_dir": str(out.parent / "tokens"),
        },
        "optim": {"learning_rate": 5e-3, "schedule": {"kind": "cosine", "warmup_ratio": 0.1}},
        "train": {
            "output_dir": str(out), "epochs": 1000, "max_steps": 120, "batch_tokens": 512, "micro_batch_tokens": 512,
            "log_every": 120, "eval_every": 0, "save_every": 0, "chunk_mib": 4,
        },
    }


# Every block has four guesses. The mask is a token that is never said.
BLOCK = {"num_layers": 2, "block_size": 5, "num_anchors": 64, "mask_token_id": 0, "target_layer_ids": [1, 3, 5]}
LILICORR = {
    "lilicorr_candidate_topk": 4, "lilicorr_hidden_size": 64, "lilicorr_num_heads": 2, "lilicorr_num_layers": 1,
    "lilicorr_factor_dim": 32,
}
DRAFTS = {
    "eagle3": {"algorithm": "eagle3", "draft_vocab_size": 56, "ttt_steps": 4, "recompute": False},
    "medusa": {"algorithm": "medusa", "num_heads": 3, "num_layers": 1, "projection": "own"},
    "dflash": BLOCK | {"algorithm": "dflash"},
    "dflash2": BLOCK | {"algorithm": "dflash2", "head": {"selector_rank": 16, "selector_top_k": 4}},
    "dspark": BLOCK | {"algorithm": "dspark", "block_size": 4, "head": {"markov_rank": 16}},
    "lilicorr": BLOCK | {"algorithm": "lilicorr", "head": LILICORR},
    "domino": BLOCK | {"algorithm": "domino", "head": {"gru_hidden_dim": 64, "emb_dim": 16}},
    "peagle": {"algorithm": "peagle", "num_layers": 1, "num_depths": 4, "mask_token_id": 0, "draft_vocab_size": 56},
}
