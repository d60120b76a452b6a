"""Lets SGLang's drafts run on a host that is none of CUDA, HIP, MUSA or XPU and has no CPU build of its kernels.

- A tree is built and verified by the Triton kernels that SGLang ships for XPU (TRITON_INTERPRET=1 runs them here).
- A verification's attention is that of the `torch_native` backend, which knows no such pass: it is given the lengths,
  all tokens of a request before the tree and the tree itself. Right for chains, where every node sees those before it.
- DFlash and DSpark ask for a device that is not this one before anything is loaded: they are told that it is XPU's, and
  that `torch_native` serves a draft. What they then run where no kernel of a GPU is at hand is their own.
- Domino's check that everything is on CUDA and in bfloat16 is left out; its rollout is plain torch.
- The embeddings of DFlash's blocks stay float32: SGLang rounds whatever embeddings it is handed to bfloat16, which a model
  in float32 does not take.

Models, weights, the draft's loop and acceptance are SGLang's own.
"""

import copy
import importlib.util
import sys


def as_xpu(module) -> None:
    module._is_xpu = True


def torch_native(module) -> None:
    backend = module.TorchNativeAttnBackend
    inner = backend.forward_extend

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **options):
        if forward_batch.forward_mode.is_target_verify():
            tree = q.shape[0] // forward_batch.seq_lens.shape[0]
            before = forward_batch.seq_lens
            forward_batch = copy.copy(forward_batch)
            forward_batch.extend_prefix_lens = before
            forward_batch.extend_seq_lens = before * 0 + tree
            forward_batch.seq_lens = before + tree
        return inner(self, q, k, v, layer, forward_batch, save_kv_cache, **options)

    backend.forward_extend = forward_extend


def without_streams(module) -> None:
    # Tells a GPU's allocator who reads a tensor.
    module.torch.Tensor.record_stream = lambda tensor, stream: None


def dflash(module) -> None:
    without_streams(module)
    module.validate_domino_runtime = lambda **options: None


def model_runner(module) -> None:
    inner = module.ModelRunner._extend_forward_kwargs

    def _extend_forward_kwargs(self, forward_batch, pp_proxy_tensors):
        options = inner(self, forward_batch, pp_proxy_tensors)
        if forward_batch.input_embeds is not None:
            options["input_embeds"] = forward_batch.input_embeds
        return options

    module.ModelRunner._extend_forward_kwargs = _extend_forward_kwargs


class Lent:
    """Settings of a server, on the device of another."""

    def __init__(self, settings):
        self.settings = settings

    def __getattr__(self, name):
        return "xpu" if name == "device" else getattr(self.settings, name)


def speculative_hook(module) -> None:
    view = module.resolving_view

    def on_xpu(handle):
        def handled(server_args):
            module.resolving_view = lambda settings: Lent(view(settings))
            try:
                return handle(server_args)
            finally:
                module.resolving_view = view

        return handled

    module._handle_dflash = on_xpu(module._handle_dflash)
    module._handle_dspark = on_xpu(module._handle_dspark)


def choices(module) -> None:
    module.add_draft_attention_backend_choices(["torch_native"])


CHANGES = {
    "sglang.srt.model_executor.model_runner": model_runner,
    "sglang.srt.speculative.dflash_worker_v2": dflash,
    "sglang.srt.speculative.dspark_components.dspark_worker_v2": without_streams,
    "sglang.srt.arg_groups.choices": choices,
    "sglang.srt.arg_groups.speculative_hook": speculative_hook,
    "sglang.kernels.ops.speculative.spec_tree": as_xpu,
    "sglang.kernels.ops.speculative.cache_locs": as_xpu,
    "sglang.srt.layers.attention.torch_native_backend": torch_native,
}


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
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            CHANGES[name](module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
