"""Writes down every draft that vLLM's worker makes.

Of vLLM it changes one thing: 0.32's kernel of RMSNorm for CPUs norms the keys of every layer of a block drafter by the
weights of the first, where that for GPUs takes each layer's own. With SPECFORGE_NORM=1 they are normed by a plain formula.

With SPECFORGE_TRITON=1 Triton's interpreter (TRITON_INTERPRET=1) stands for a Triton that compiles for CPUs: vLLM looks
whether one is there before it takes its V2 runner, which alone has heads on blocks.
"""

import importlib.util
import json
import os
import sys
import types


def write_down(requests, drafts) -> None:
    with open(os.environ["SPECFORGE_DRAFTS"], "a") as file:
        for request, draft in zip(requests, drafts):
            file.write(json.dumps([request, [int(token) for token in draft]]) + "\n")


def first_runner(module) -> None:
    runner = module.GPUModelRunner
    inner = runner.take_draft_token_ids

    def take_draft_token_ids(self, *arguments, **options):
        taken = inner(self, *arguments, **options)
        if taken is not None:
            write_down(taken.req_ids, taken.draft_token_ids)
        return taken

    runner.take_draft_token_ids = take_draft_token_ids


def second_runner(module) -> None:
    handler = module.DraftTokensHandler
    inner = handler.set_draft_tokens

    def set_draft_tokens(self, input_batch, draft_tokens, *arguments, **options):
        write_down(input_batch.req_ids, draft_tokens.tolist())
        return inner(self, input_batch, draft_tokens, *arguments, **options)

    handler.set_draft_tokens = set_draft_tokens


def interpreter(module) -> None:
    driver = types.SimpleNamespace(is_active=lambda: True)
    module.backends["cpu"] = types.SimpleNamespace(compiler=None, driver=driver)


def norm(module) -> None:
    import torch

    def normalize_context_k(self, keys):
        # [L, tokens, heads, head size]
        wide = keys.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._rms_norm_eps)
        return wide.to(keys.dtype) * self._k_norm_weights[:, None, None, :]

    module.DFlashQwen3Model._normalize_context_k = normalize_context_k


LISTENERS = {
    "vllm.v1.worker.gpu_model_runner": first_runner,
    "vllm.v1.worker.gpu.spec_decode.utils": second_runner,
}
CHANGES = {}
if os.environ.get("SPECFORGE_DRAFTS"):
    CHANGES |= LISTENERS
if os.environ.get("SPECFORGE_NORM"):
    CHANGES["vllm.model_executor.models.qwen3_dflash"] = norm
if os.environ.get("SPECFORGE_TRITON"):
    CHANGES["triton.backends"] = interpreter


class Finder:
    busy = False

    def find_spec(self, name, path=None, target=None):
        if self.busy or name not in CHANGES:
            return None
        self.busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy = False
        if spec is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            CHANGES[name](module)

        spec.loader.exec_module = exec_module
        return spec


if CHANGES:
    sys.meta_path.insert(0, Finder())
