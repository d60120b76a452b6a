"""Lets SGLang's EAGLE-3 run on a host that is none of CUDA, HIP, MUSA or XPU and has no CPU build of its kernels.

- A tree is built and verified by the Triton kernels that SGLang ships for XPU (TRITON_INTERPRET=1 runs them here).
- A verification's attention is that of the `torch_native` backend, which knows no such pass: it is given the lengths,
  all tokens of a request before the tree and the tree itself. Right for chains, where every node sees those before it.

Models, weights, the draft's loop and acceptance are SGLang's own.
"""

import copy
import importlib.util
import sys


def spec_tree(module) -> None:
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


CHANGES = {
    "sglang.kernels.ops.speculative.spec_tree": spec_tree,
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
