"""Writes down every draft that vLLM's worker hands to its scheduler; changes nothing."""

import importlib.util
import json
import os
import sys

MODULE = "vllm.v1.worker.gpu_model_runner"


def listen(module) -> None:
    runner = module.GPUModelRunner
    inner = runner.take_draft_token_ids

    def take_draft_token_ids(self, *arguments, **options):
        taken = inner(self, *arguments, **options)
        if taken is not None:
            with open(os.environ["SPECFORGE_DRAFTS"], "a") as file:
                for request, draft in zip(taken.req_ids, taken.draft_token_ids):
                    file.write(json.dumps([request, [int(token) for token in draft]]) + "\n")
        return taken

    runner.take_draft_token_ids = take_draft_token_ids


class Finder:
    busy = False

    def find_spec(self, name, path=None, target=None):
        if self.busy or name != MODULE:
            return None
        self.busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy = False
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            listen(module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("SPECFORGE_DRAFTS"):
    sys.meta_path.insert(0, Finder())
