"""llama.cpp's server out of https://pypi.org/project/xllamacpp, which runs on any processor, with what the check asks of it.

    python3 llama_server.py '{"model": "target.gguf", "draft": "draft.gguf", "type": "draft-eagle3", "guesses": 3, ...}'

Its log says where it listens. Runs until it is ended.
"""

import json
import sys
import threading

import xllamacpp as llama

TYPES = {
    "draft-eagle3": llama.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3,
    "draft-dflash": llama.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_DFLASH,
    "draft-dspark": llama.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_DSPARK,
    "draft-simple": llama.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE,
    "ngram-simple": llama.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE,
}


def main() -> None:
    asked = json.loads(sys.argv[1])
    parameters = llama.CommonParams()
    parameters.model.path = asked["model"]
    rows = asked.get("rows", 1)
    parameters.n_parallel, parameters.n_ctx, parameters.n_gpu_layers = rows, 2048 * rows, 0
    parameters.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    draft = parameters.speculative.draft
    for one in (parameters, draft):
        one.cache_type_k = one.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    for cpu in (parameters.cpuparams, parameters.cpuparams_batch, draft.cpuparams, draft.cpuparams_batch):
        cpu.n_threads, cpu.poll = asked["threads"], 0
    parameters.verbosity, parameters.ui = 5, False
    parameters.cache_ram_mib = 0
    if asked["type"]:
        parameters.speculative.types = [TYPES[asked["type"]]]
    if asked["draft"]:
        draft.mparams.path = asked["draft"]
        draft.n_max, draft.p_min, draft.n_gpu_layers = asked["guesses"], 0.0, 0
    _server = llama.Server(parameters)
    threading.Event().wait()


if __name__ == "__main__":
    main()
