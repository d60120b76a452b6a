"""vLLM's ExampleHiddenStatesConnector on a machine without a GPU, by its own option `kv_connector_module_path`.

The connector copies states through CUDA's events and streams. Without a GPU those do nothing here: the copy is done when
the call returns. See docs/capture.md.
"""

import contextlib

import torch

if not torch.cuda.is_available():

    class Nothing:
        def __init__(self, *args, **options):
            pass

        def record(self, *args):
            pass

        def synchronize(self):
            pass

        def wait_event(self, *args):
            pass

        def wait_stream(self, *args):
            pass

        def query(self):
            return True

    torch.cuda.Event = Nothing
    torch.cuda.Stream = Nothing
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    empty_like = torch.empty_like
    torch.empty_like = lambda *args, pin_memory=False, **options: empty_like(*args, **options)

from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (  # noqa: E402
    ExampleHiddenStatesConnector,
)


class CpuHiddenStatesConnector(ExampleHiddenStatesConnector):
    pass
